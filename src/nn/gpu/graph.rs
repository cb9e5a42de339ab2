//! Work that is done many times over, recorded and handed to the GPU as one graph: a step of a
//! U-Net is some hundred launches, which together take the CPU longer than the GPU.

use candle_core::{Result, Tensor};

/// A function of tensors that is called with the same shapes again and again.
#[derive(Default)]
pub struct Recorder {
    #[cfg(feature = "cuda")]
    state: std::cell::RefCell<cuda::State>,
}

impl Recorder {
    /// `work` of `inputs`. On a GPU it is recorded in the second call, after which only the inputs
    /// are looked at: whatever else it uses must stay as it is. What cannot be recorded is done
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
        /// called once, with this output: kernels are loaded, and what stays the same is known
        Warm(Tensor),
        Recorded(Recorded),
        Refused,
    }

    /// A graph between tensors that stay where they are.
    pub struct Recorded {
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
            *state = record(device, inputs, output, &work).map_or(State::Refused, State::Recorded);
        }
        match state {
            State::Recorded(recorded) if recorded.takes(&inputs) => recorded.replay(&inputs),
            state => {
                // what candle uploads for an operation, it keeps for the recording
                let _kept = device.enable_cuda_graph_htod_cache();
                let output = work(inputs)?;
                if let State::New = state {
                    *state = State::Warm(output.clone());
                }
                Ok(output)
            }
        }
    }

    /// Records `work` without doing it. Its output will look like this one.
    fn record<const N: usize>(
        device: &CudaDevice,
        inputs: [&Tensor; N],
        output: &Tensor,
        work: impl Fn([&Tensor; N]) -> Result<Tensor>,
    ) -> Result<Recorded> {
        let _kept = device.enable_cuda_graph_htod_cache();
        let own = inputs
            .map(Tensor::copy)
            .into_iter()
            .collect::<Result<Vec<Tensor>>>()?;
        // all other memory of the recording is its own
        let output = output.copy()?;
        let stream = device.cuda_stream();
        stream
            .begin_capture(Mode::CU_STREAM_CAPTURE_MODE_RELAXED)
            .w()?;
        let recorded = own
            .iter()
            .collect::<Vec<_>>()
            .try_into()
            .map_err(|_| candle_core::Error::Msg("another number of inputs".into()));
        let recorded = recorded
            .and_then(work)
            .and_then(|y| output.slice_set(&y.contiguous()?, 0, 0));
        // even if that failed, so that the stream is of use again
        let graph = stream
            .end_capture(Flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
            .w();
        recorded?;
        match graph? {
            Some(graph) => Ok(Recorded {
                graph,
                inputs: own,
                output,
            }),
            None => candle_core::bail!("nothing was recorded"),
        }
    }

    impl Recorded {
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
