//! CUDA graphs: a step of a U-Net is some hundred launches, which take the CPU longer than the GPU,
//! so they are captured once and launched together.

use candle_core::{Result, Tensor};

/// A function of tensors that is called repeatedly with the same shapes, as a CUDA graph.
#[derive(Default)]
pub struct GraphCapture {
    #[cfg(feature = "cuda")]
    state: std::cell::RefCell<cuda::State>,
}

impl GraphCapture {
    /// Runs `work` on `inputs`. On a GPU it is captured in the second call, after which only the
    /// inputs are read: whatever else `work` uses must not change. Work that cannot be captured runs
    /// each time.
    pub fn call<const N: usize>(
        &self,
        inputs: [&Tensor; N],
        work: impl Fn([&Tensor; N]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let candle_core::Device::Cuda(device) = inputs[0].device() {
            return cuda::call(&mut self.state.borrow_mut(), device, inputs, work);
        }
        work(inputs)
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::CudaGraph;
    use candle_core::cuda_backend::cudarc::driver::sys::CUgraphInstantiate_flags_enum as Flags;
    use candle_core::cuda_backend::cudarc::driver::sys::CUstreamCaptureMode_enum as Mode;
    use candle_core::{CudaDevice, Result, Tensor};

    #[derive(Default)]
    pub enum State {
        #[default]
        New,
        /// called once, with this output: kernels are loaded and caches are filled
        Warm(Tensor),
        Captured(Captured),
        Refused,
    }

    /// A graph between tensors that stay where they are.
    pub struct Captured {
        graph: CudaGraph,
        inputs: Vec<Tensor>,
        output: Tensor,
    }

    pub fn call<const N: usize>(
        state: &mut State,
        device: &CudaDevice,
        inputs: [&Tensor; N],
        work: impl Fn([&Tensor; N]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if let State::Warm(output) = state {
            *state = capture(device, inputs, output, &work).map_or(State::Refused, State::Captured);
        }
        match state {
            State::Captured(captured) if captured.takes(&inputs) => captured.replay(&inputs),
            state => {
                // keeps what candle uploads for an operation alive for the capture
                let _kept = device.enable_cuda_graph_htod_cache();
                let output = work(inputs)?;
                if let State::New = state {
                    *state = State::Warm(output.clone());
                }
                Ok(output)
            }
        }
    }

    /// Captures `work` without running it. Its output will have the shape and type of this one.
    fn capture<const N: usize>(
        device: &CudaDevice,
        inputs: [&Tensor; N],
        output: &Tensor,
        work: impl Fn([&Tensor; N]) -> Result<Tensor>,
    ) -> Result<Captured> {
        let _kept = device.enable_cuda_graph_htod_cache();
        let own = inputs
            .map(Tensor::copy)
            .into_iter()
            .collect::<Result<Vec<Tensor>>>()?;
        // the graph owns all other memory
        let output = output.copy()?;
        let stream = device.cuda_stream();
        stream
            .begin_capture(Mode::CU_STREAM_CAPTURE_MODE_RELAXED)
            .w()?;
        let captured = own
            .iter()
            .collect::<Vec<_>>()
            .try_into()
            .map_err(|_| candle_core::Error::Msg("a different number of inputs".into()));
        let captured = captured
            .and_then(work)
            .and_then(|y| output.slice_set(&y.contiguous()?, 0, 0));
        // even if that failed, so that the stream is of use again
        let graph = stream
            .end_capture(Flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
            .w();
        captured?;
        match graph? {
            Some(graph) => Ok(Captured {
                graph,
                inputs: own,
                output,
            }),
            None => candle_core::bail!("nothing was captured"),
        }
    }

    impl Captured {
        fn takes(&self, inputs: &[&Tensor]) -> bool {
            self.inputs
                .iter()
                .zip(inputs)
                .all(|(own, input)| own.shape() == input.shape() && own.dtype() == input.dtype())
        }

        fn replay(&self, inputs: &[&Tensor]) -> Result<Tensor> {
            for (own, input) in self.inputs.iter().zip(inputs) {
                own.slice_set(&input.contiguous()?, 0, 0)?;
            }
            self.graph.launch().w()?;
            // the next launch writes over it
            self.output.copy()
        }
    }
}
