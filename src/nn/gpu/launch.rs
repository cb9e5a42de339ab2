//! Runs [`Work`] on a device.

use super::Work;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

/// Runs `work` and returns its output.
pub fn run(work: impl Work) -> Result<Tensor> {
    let input = work.input().clone();
    input.apply_op1_no_bwd(&Operation(work))
}

struct Operation<W>(W);

impl<W: Work> CustomOp1 for Operation<W> {
    fn name(&self) -> &'static str {
        "gpu"
    }

    #[cfg(all(test, target_os = "linux"))]
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((super::emulated::emulate(&self.0)?, self.0.shape()?))
    }

    #[cfg(not(all(test, target_os = "linux")))]
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        candle_core::bail!("a kernel for GPUs on a CPU")
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        Ok((cuda::launch(&storage.device, &self.0)?, self.0.shape()?))
    }
}

#[cfg(feature = "cuda")]
pub use cuda::processors;

#[cfg(feature = "cuda")]
mod cuda {
    use super::super::{Params, Work};
    use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    use candle_core::cuda_backend::cudarc::driver::{
        CudaFunction, CudaModule, CudaSlice, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg,
    };
    use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
    use candle_core::cuda_backend::{CudaStorageSlice, DeviceId, WrapErr};
    use candle_core::{CudaDevice, CudaStorage, DType, Error, Result, Storage, Tensor};
    use half::{bf16, f16};
    use std::collections::HashMap;
    use std::collections::hash_map::Entry;
    use std::sync::{Arc, LazyLock, Mutex};

    /// The compiled `kernels/`, by build.rs.
    static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

    /// The kernels and properties of devices that were looked up so far.
    #[derive(Default)]
    struct Cache {
        images: HashMap<DeviceId, Arc<CudaModule>>,
        kernels: HashMap<(DeviceId, String), CudaFunction>,
        processors: HashMap<DeviceId, usize>,
    }

    static CACHE: LazyLock<Mutex<Cache>> = LazyLock::new(Mutex::default);

    // SAFETY: plain numbers, of which the driver reads as many as the kernel declares
    unsafe impl DeviceRepr for Params {}

    /// The shared memory that every kernel may have, in bytes.
    const SHARED: usize = 48 << 10;

    fn cached<T>(look: impl FnOnce(&mut Cache) -> Result<T>) -> Result<T> {
        let mut cache = CACHE
            .lock()
            .map_err(|_| Error::Msg("another thread failed as it loaded kernels".into()))?;
        look(&mut cache)
    }

    /// The number of multiprocessors of a device.
    pub fn processors(device: &CudaDevice) -> usize {
        let ask = || {
            let count = device
                .cuda_stream()
                .context()
                .attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
            count
                .ok()
                .and_then(|count| usize::try_from(count).ok())
                .unwrap_or(super::super::PROCESSORS)
        };
        cached(|cache| Ok(*cache.processors.entry(device.id()).or_insert_with(ask)))
            .unwrap_or(super::super::PROCESSORS)
    }

    /// Looks up a kernel. All are loaded with the first one.
    fn kernel(device: &CudaDevice, name: &str) -> Result<CudaFunction> {
        cached(|cache| {
            let key = (device.id(), name.to_string());
            if let Some(kernel) = cache.kernels.get(&key) {
                return Ok(kernel.clone());
            }
            let image = match cache.images.entry(device.id()) {
                Entry::Occupied(image) => image.into_mut(),
                Entry::Vacant(none) => none.insert(
                    device
                        .cuda_stream()
                        .context()
                        .load_module(Ptx::from_binary(IMAGE.to_vec()))
                        .w()?,
                ),
            };
            let kernel = image.load_function(name).w()?;
            cache.kernels.insert(key, kernel.clone());
            Ok(kernel)
        })
    }

    pub fn launch(device: &CudaDevice, work: &impl Work) -> Result<CudaStorage> {
        let elements = work.shape()?.elem_count();
        match work.dtype() {
            DType::F16 => launch_as::<f16>(device, work, elements).map(CudaStorageSlice::F16),
            DType::BF16 => launch_as::<bf16>(device, work, elements).map(CudaStorageSlice::BF16),
            DType::F32 => launch_as::<f32>(device, work, elements).map(CudaStorageSlice::F32),
            other => candle_core::bail!("no kernels for {other:?}"),
        }
        .map(|slice| CudaStorage {
            slice,
            device: device.clone(),
        })
    }

    fn launch_as<T: DeviceRepr>(
        device: &CudaDevice,
        work: &impl Work,
        elements: usize,
    ) -> Result<CudaSlice<T>> {
        let stream = device.cuda_stream();
        // SAFETY: the kernels write all of the output, and of the scratch memory what they read
        let output = unsafe { device.alloc::<T>(elements)? };
        let scratch = match work.scratch() {
            0 => None,
            // SAFETY: the same
            floats => Some(unsafe { device.alloc::<f32>(floats)? }),
        };
        let mut address = |x: &Tensor| {
            let (storage, layout) = x.storage_and_layout();
            let Storage::Cuda(storage) = &*storage else {
                candle_core::bail!("a tensor that is not on the GPU")
            };
            // there is one stream, on which memory is freed too: an address holds for all that is
            // launched in turn
            let start = match &storage.slice {
                CudaStorageSlice::F16(slice) => slice.device_ptr(&stream).0,
                CudaStorageSlice::BF16(slice) => slice.device_ptr(&stream).0,
                CudaStorageSlice::F32(slice) => slice.device_ptr(&stream).0,
                _ => candle_core::bail!("no kernels for {:?}", x.dtype()),
            };
            Ok(start + (layout.start_offset() * x.dtype().size_in_bytes()) as u64)
        };
        let scratch_at = scratch
            .as_ref()
            .map_or(0, |scratch| scratch.device_ptr(&stream).0);
        let launches = work.launches(&mut address, output.device_ptr(&stream).0, scratch_at)?;
        for launch in launches {
            let kernel = kernel(device, &launch.kernel)?;
            if launch.shared > SHARED {
                kernel
                    .set_attribute(
                        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                        launch.shared as i32,
                    )
                    .w()?;
            }
            let [x, y] = launch.grid.map(|blocks| blocks as u32);
            let config = LaunchConfig {
                grid_dim: (x, y, 1),
                block_dim: (launch.threads as u32, 1, 1),
                shared_mem_bytes: launch.shared as u32,
            };
            // SAFETY: parameters are as the kernel declares them, and the tensors behind their
            // addresses are borrowed by `work`
            unsafe {
                stream
                    .launch_builder(&kernel)
                    .arg(&launch.params)
                    .launch(config)
            }
            .w()?;
        }
        Ok(output)
    }
}
