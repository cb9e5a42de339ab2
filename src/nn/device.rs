//! Where the arithmetic runs, and in which type.

use crate::nn::Backend;
use anyhow::{Context, Result, anyhow, bail};
use candle_core::{DType, Device};
use std::str::FromStr;

/// The device that a user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    Auto,
    Cpu,
    Cuda(usize),
    Metal,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_lowercase();
        match lower.as_str() {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "metal" => Ok(Self::Metal),
            other => match other.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(index)) => Ok(Self::Cuda(index)),
                _ => Err("expected auto, cpu, cuda, cuda:N or metal".into()),
            },
        }
    }
}

/// The type of weights and activations that a user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum DTypeChoice {
    Auto,
    F32,
    Bf16,
    F16,
}

impl DTypeChoice {
    /// Chooses f32 where no type is named, which is as fast as any other on a CPU; f16 on a GPU with
    /// tensor cores.
    fn on(self, backend: Backend) -> DType {
        match self {
            Self::Auto if backend == Backend::Gpu => DType::F16,
            Self::Auto | Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

/// The device and the type of the U-Net's and text encoder's weights. The VAE and the latents are
/// always f32.
#[derive(Debug, Clone)]
pub struct Compute {
    pub device: Device,
    /// On CPUs the arithmetic is f32 in any case, and f32 here means that weights keep the type of
    /// their file.
    pub dtype: DType,
}

impl Compute {
    /// Chooses: a GPU if the program was built for one and it is there, else the CPU.
    /// Errors name what is missing.
    pub fn choose(device: DeviceChoice, dtype: DTypeChoice) -> Result<Self> {
        let device = match device {
            DeviceChoice::Auto => gpu(0).unwrap_or(Device::Cpu),
            DeviceChoice::Cpu => Device::Cpu,
            DeviceChoice::Cuda(index) => {
                if !cfg!(feature = "cuda") {
                    bail!(
                        "this sdgen was built without CUDA\n\nhint: build it with `cargo build --release --features cuda`, or use `--device cpu`"
                    );
                }
                let hint = "`nvidia-smi` lists the GPUs that there are; `--device cpu` needs none";
                // candle's error has a backtrace and no words of its own
                cuda(index).map_err(|error| {
                    let reason = error.to_string();
                    let reason = reason.lines().next().unwrap_or_default().to_string();
                    anyhow!("CUDA device {index} cannot be used: {reason}\n\nhint: {hint}")
                })?
            }
            DeviceChoice::Metal => {
                if !cfg!(feature = "metal") {
                    bail!(
                        "this sdgen was built without Metal\n\nhint: build it with `cargo build --release --features metal` on a Mac, or use `--device cpu`"
                    );
                }
                Device::new_metal(0).context("the Metal device cannot be used")?
            }
        };
        let dtype = dtype.on(Backend::of(&device));
        Ok(Self { device, dtype })
    }

    /// The type of activations.
    pub fn arithmetic(&self) -> DType {
        if self.device.is_cpu() {
            DType::F32
        } else {
            self.dtype
        }
    }
}

/// A CUDA device with one stream for all threads: work is done in the order in which it is given.
fn cuda(index: usize) -> candle_core::Result<Device> {
    let device = Device::new_cuda_with_stream(index)?;
    #[cfg(feature = "cuda")]
    {
        use candle_core::cuda_backend::WrapErr;
        use candle_core::cuda_backend::cudarc::driver::{result, sys};
        let device = device.as_cuda_device()?;
        let (stream, built) = (
            device.cuda_stream(),
            env!("SDGEN_CUDA_COMPUTE_CAP").parse().unwrap_or(80),
        );
        let (major, minor) = stream.context().compute_capability().w()?;
        if 10 * major + minor < built {
            candle_core::bail!(
                "it has compute capability {major}.{minor}, and this sdgen was built for {}.{} and newer",
                built / 10,
                built % 10
            );
        }
        let mut kept = u64::MAX;
        // SAFETY: with one stream no event has to be waited for; the driver reads the one number
        // that it is given
        unsafe {
            device.disable_event_tracking();
            // freed memory stays at hand, where the driver would give it back whenever the GPU is
            // waited for
            let pool = result::device::get_default_mem_pool(stream.context().cu_device()).w()?;
            let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            sys::cuMemPoolSetAttribute(pool, threshold, std::ptr::from_mut(&mut kept).cast())
                .result()
                .w()?;
        }
    }
    Ok(device)
}

fn gpu(index: usize) -> Option<Device> {
    let cuda = if cfg!(feature = "cuda") {
        cuda(index).ok()
    } else {
        None
    };
    let metal = || {
        if cfg!(feature = "metal") {
            Device::new_metal(index).ok()
        } else {
            None
        }
    };
    cuda.or_else(metal)
}

/// Limits the threads of the pool that all kernels share. Errors if it is set twice.
pub fn limit_threads(threads: usize) -> Result<()> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .context("the thread pool cannot be made")
}

/// Errors if less than `needed` bytes of memory are available. Where that is unknown, succeeds.
pub fn require_memory(needed: u64) -> Result<()> {
    let Some(available) = available_memory() else {
        return Ok(());
    };
    if needed > available {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        bail!(
            "this needs about {:.1} GB of memory, {:.1} GB are free\n\nhint: draw a smaller picture with `--width` and `--height`, or a smaller `--batch-size`",
            gb(needed),
            gb(available)
        );
    }
    Ok(())
}

/// The memory that is available without swapping, in bytes (Linux).
pub fn available_memory() -> Option<u64> {
    proc_bytes("/proc/meminfo", "MemAvailable:")
}

/// The peak memory of this process, in bytes (Linux).
pub fn peak_memory() -> Option<u64> {
    proc_bytes("/proc/self/status", "VmHWM:")
}

/// The peak memory of tensors and graphs on a GPU, in bytes (CUDA).
pub fn peak_gpu_memory(device: &Device) -> Option<u64> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        use candle_core::cuda_backend::cudarc::driver::{result, sys};
        let device = device.cuda_stream().context().cu_device();
        let (mut tensors, mut steps) = (0u64, 0u64);
        // SAFETY: the driver writes the one number for which there is room
        unsafe {
            let pool = result::device::get_default_mem_pool(device).ok()?;
            let most = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH;
            sys::cuMemPoolGetAttribute(pool, most, std::ptr::from_mut(&mut tensors).cast())
                .result()
                .ok()?;
            let most = sys::CUgraphMem_attribute::CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH;
            sys::cuDeviceGetGraphMemAttribute(device, most, std::ptr::from_mut(&mut steps).cast())
                .result()
                .ok()?;
        }
        return Some(tensors + steps);
    }
    let _ = device;
    None
}

/// Reads a line of one of Linux's memory tables, which count in kB.
fn proc_bytes(table: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(table).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(key))?;
    Some(
        line.trim()
            .trim_end_matches("kB")
            .trim()
            .parse::<u64>()
            .ok()?
            * 1024,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_type_follows_the_device_unless_it_is_named() {
        assert_eq!(
            [Backend::Cpu, Backend::Gpu, Backend::Plain].map(|on| DTypeChoice::Auto.on(on)),
            [DType::F32, DType::F16, DType::F32]
        );
        assert_eq!(
            [Backend::Cpu, Backend::Gpu].map(|on| DTypeChoice::F32.on(on)),
            [DType::F32; 2]
        );
        assert_eq!(DTypeChoice::Bf16.on(Backend::Gpu), DType::BF16);
    }
}
