//! Where the arithmetic runs, and in which type.

use crate::nn::cpu::instructions;
use crate::nn::{Backend, Precision};
use anyhow::{Context, Result, anyhow, bail};
use candle_core::{DType, Device};
use std::num::NonZero;
use std::path::Path;
use std::str::FromStr;

/// A PB; what needs more is a mistake.
const IMPOSSIBLE_BYTES: u64 = 1 << 50;

/// Where networks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// A GPU that this build can use, if there is one; else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU, by its number from 0.
    Cuda(usize),
    /// Apple's GPU.
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

/// The type in which weights are kept, and on a GPU the type of the arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum DTypeChoice {
    /// f16 on an NVIDIA GPU, for transformers bf16; f32 elsewhere
    #[default]
    Auto,
    /// 32 bits; weights of narrower files stay as narrow as they are
    F32,
    /// bfloat16
    Bf16,
    /// IEEE half precision
    F16,
    /// 8-bit integers in the attention and feed-forward layers of the denoising network, on CPUs; all
    /// else as with auto
    Int8,
}

impl DTypeChoice {
    /// By itself f32 on a CPU, f16 where tensor cores take that.
    fn on(self, backend: Backend) -> DType {
        match self {
            Self::Auto if backend == Backend::Gpu => DType::F16,
            Self::Auto | Self::F32 | Self::Int8 => DType::F32,
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
    /// On CPUs activations are f32 all the same, and f32 means that weights stay as narrow as their
    /// file; bf16, that products are of numbers rounded to bf16 where there are instructions for
    /// it.
    pub dtype: DType,
    /// Whether somebody asked for that type.
    pub is_asked: bool,
    /// Whether linear layers of the denoising network multiply 8-bit integers, on a CPU.
    pub int8: bool,
}

impl Compute {
    /// Chooses: a GPU if the program was built for one and it is there, else the CPU, with the
    /// instructions that the environment names if it does. Errors name what is missing.
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
        if let Some(set) = instructions::of_environment()? {
            instructions::force(set);
        }
        let int8 = dtype == DTypeChoice::Int8;
        if int8 && !device.is_cpu() {
            bail!("`--dtype int8` is for CPUs\n\nhint: add `--device cpu`, or leave it out");
        }
        Ok(Self {
            dtype: dtype.on(Backend::of(&device)),
            is_asked: dtype != DTypeChoice::Auto,
            int8,
            device,
        })
    }

    /// The CPU, with weights as they are stored.
    pub fn cpu() -> Self {
        Self {
            device: Device::Cpu,
            dtype: DType::F32,
            is_asked: true,
            int8: false,
        }
    }

    /// What was chosen, as `--dtype` names it.
    pub fn dtype_name(&self) -> &'static str {
        match self.int8 {
            true => "int8",
            false => self.dtype.as_str(),
        }
    }

    /// The same for transformers, whose activations leave the range of f16.
    pub fn for_transformer(self) -> Self {
        match (self.dtype, self.is_asked) {
            (DType::F16, false) => Self {
                dtype: DType::BF16,
                ..self
            },
            _ => self,
        }
    }

    /// How exactly a CPU computes products.
    pub fn precision(&self) -> Precision {
        if self.dtype == DType::BF16 {
            Precision::Bf16
        } else {
            Precision::F32
        }
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

/// The stack of each thread that computes, whatever the environment says.
const STACK_BYTES: usize = 4 << 20;
/// Threads beside those that compute: one that writes files, one for signals, one for the bar.
const OTHER_THREADS: usize = 3;
/// More threads than this for each core only wait for each other.
const MOST_THREADS_PER_CORE: usize = 4;
/// A machine of few cores may have so many all the same.
const ALWAYS_ALLOWED_THREADS: usize = 16;

/// Starts the pool that all kernels share, with as many threads as asked for or as there are cores;
/// with fewer where that is too many, or more than the system gives. Returns how many. Errors if it
/// gives none, or if the pool is started twice.
pub fn start_threads(asked: Option<usize>) -> Result<usize> {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let most = (MOST_THREADS_PER_CORE * cores).max(ALWAYS_ALLOWED_THREADS);
    // rayon's own variable
    let usual = || std::env::var("RAYON_NUM_THREADS").ok()?.parse().ok();
    let wanted = asked
        .or_else(usual)
        .filter(|threads| *threads > 0)
        .unwrap_or(cores)
        .min(most);
    let threads = wanted.min(possible_threads(wanted + OTHER_THREADS)?);
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .stack_size(STACK_BYTES)
        .build_global()
        .context("the thread pool cannot be made")?;
    Ok(threads)
}

/// How many threads can compute if the system gives up to so many in all. A pool of which one
/// thread cannot start cannot be made a second time, so that this is found out before.
fn possible_threads(total: usize) -> Result<usize> {
    let (hold, wait) = std::sync::mpsc::sync_channel::<()>(0);
    let wait = std::sync::Arc::new(std::sync::Mutex::new(wait));
    let (mut started, mut refused) = (vec![], None);
    while started.len() < total && refused.is_none() {
        let wait = wait.clone();
        let waits = move || {
            // until the sender is gone
            wait.lock().map(|wait| wait.recv().is_err()).ok();
        };
        match std::thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn(waits)
        {
            Ok(thread) => started.push(thread),
            Err(error) => refused = Some(error),
        }
    }
    drop(hold);
    let count = started.len();
    for thread in started {
        thread.join().ok();
    }
    match (count.saturating_sub(OTHER_THREADS), refused) {
        (0, Some(error)) => Err(error).context(NO_THREAD),
        (0, None) => bail!(NO_THREAD),
        (threads, _) => Ok(threads),
    }
}

/// The error where the system gives no thread.
pub const NO_THREAD: &str = "no thread can be started\n\nhint: `ulimit -u`, `ulimit -v` and the \
    container say how many there may be and how much memory they may have";

/// Errors if the system says that it has less memory left than `needed` bytes, of which `weights`
/// are the model's. Where it says nothing, all is well.
pub fn require_memory(needed: u64, weights: u64) -> Result<()> {
    let Some(available) = available_memory().filter(|available| needed > *available) else {
        return Ok(());
    };
    if needed > IMPOSSIBLE_BYTES {
        bail!(
            "this needs more memory than any machine has\n\nhint: the sizes in the model's configuration cannot be right"
        );
    }
    let size = |bytes: u64| match bytes {
        0..1_000_000_000 => format!("{} MB", bytes / 1_000_000),
        bytes => format!("{:.1} GB", bytes as f64 / 1e9),
    };
    let hint = if weights > available {
        format!(
            "its weights alone are {}; take a smaller model, or a machine or container with more memory",
            size(weights)
        )
    } else if address_space() == Some(available) {
        "`ulimit -v` leaves no more, in the shell that started it; raise it, or draw a smaller picture".into()
    } else {
        "draw a smaller picture with `--width` and `--height`, or a smaller `--batch-size`".into()
    };
    bail!(
        "this needs about {} of memory, {} are free\n\nhint: {hint}",
        size(needed),
        size(available)
    )
}

/// Bytes that this process can still take: what the machine has without swapping, and what limits
/// of its container (control groups) and of its shell (`ulimit -v`) leave (Linux).
pub fn available_memory() -> Option<u64> {
    let machine = proc_bytes("/proc/meminfo", "MemAvailable:");
    let groups = std::fs::read_to_string("/proc/self/cgroup");
    let of_groups = groups
        .ok()
        .and_then(|groups| memory_of_groups(&groups, "/sys/fs/cgroup".as_ref()));
    [machine, of_groups, address_space()]
        .into_iter()
        .flatten()
        .min()
}

/// What the limits of control groups leave, of version 1 or 2, each with those above it: `groups`
/// is `/proc/self/cgroup`, `root` where they are mounted. In a container the path may be that of
/// the host; what is mounted at the root is its own group then.
fn memory_of_groups(groups: &str, root: &Path) -> Option<u64> {
    let left_of_group = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let (root, files) = match controllers {
            "" => (
                root.into(),
                ["memory.max", "memory.current", "inactive_file "],
            ),
            some if some.split(',').any(|name| name == "memory") => (
                root.join("memory"),
                [
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                    "total_inactive_file ",
                ],
            ),
            _ => return None,
        };
        let [limit, usage, cache] = files;
        let left = |folder: &Path| {
            let text = |file: &str| std::fs::read_to_string(root.join(folder).join(file)).ok();
            let number = |file: &str| text(file)?.trim().parse::<u64>().ok();
            // what was read from files goes when memory is wanted
            let stat = text("memory.stat").unwrap_or_default();
            let cached = stat
                .lines()
                .find_map(|line| line.strip_prefix(cache)?.trim().parse().ok());
            let used = number(usage)?.saturating_sub(cached.unwrap_or(0));
            Some(number(limit)?.saturating_sub(used))
        };
        let path = Path::new(path.trim_start_matches('/'));
        path.ancestors().filter_map(left).min()
    };
    groups.lines().filter_map(left_of_group).min()
}

/// What the limit of the process's addresses leaves (`ulimit -v`).
fn address_space() -> Option<u64> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max address space"))?;
    let limit: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(limit.saturating_sub(proc_bytes("/proc/self/status", "VmSize:")?))
}

/// The most memory that this process ever held, in bytes (Linux).
pub fn peak_memory() -> Option<u64> {
    proc_bytes("/proc/self/status", "VmHWM:")
}

/// The most memory of a GPU that was ever taken for tensors and recorded steps, in bytes (CUDA).
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

/// A line of one of Linux's memory tables, which count in kB.
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
    #[allow(clippy::unwrap_used)]
    fn the_limits_of_control_groups_count_with_those_above_them() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let left = |groups: &str| memory_of_groups(groups, root.path());
        // version 2: the tightest of all levels, without what is only cached
        assert_eq!(left("0::/a/b\n"), None);
        write("a/b/memory.max", "max\n");
        write("a/b/memory.current", "700\n");
        assert_eq!(left("0::/a/b\n"), None);
        write("a/memory.max", "5000\n");
        write("a/memory.current", "1000\n");
        write("a/memory.stat", "anon 300\ninactive_file 600\n");
        assert_eq!(left("0::/a/b\n"), Some(4600));
        write("a/b/memory.max", "1000\n");
        assert_eq!(left("0::/a/b\n"), Some(300));
        // a container sees its own group as the root
        write("memory.max", "900\n");
        write("memory.current", "1000\n");
        assert_eq!(left("0::/../../elsewhere\n"), Some(0));
        assert_eq!(left("0::/\n"), Some(0));
        // version 1
        write("memory/c/memory.limit_in_bytes", "2000\n");
        write("memory/c/memory.usage_in_bytes", "500\n");
        write("memory/c/memory.stat", "total_inactive_file 100\n");
        assert_eq!(left("3:cpu,cpuacct:/c\n5:memory:/c\n"), Some(1600));
        assert_eq!(left("3:cpu,cpuacct:/c\n1:name=systemd:/c\n"), None);
    }

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
        let of_transformers = |choice: DTypeChoice, on| {
            let compute = Compute {
                dtype: choice.on(on),
                is_asked: choice != DTypeChoice::Auto,
                ..Compute::cpu()
            };
            compute.for_transformer().dtype
        };
        let auto = [Backend::Cpu, Backend::Gpu].map(|on| of_transformers(DTypeChoice::Auto, on));
        assert_eq!(auto, [DType::F32, DType::BF16]);
        let asked = of_transformers(DTypeChoice::F16, Backend::Gpu);
        assert_eq!(asked, DType::F16);
    }
}
