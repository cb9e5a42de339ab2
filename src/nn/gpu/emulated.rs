//! The kernels on the CPU, for tests: their source is compiled with `kernels/host.h` by the
//! system's C++ compiler, and launched as on a GPU. Inputs and outputs are surrounded by guards of
//! NaN.

use super::{Launch, Params, Work};
use crate::nn::testing::normal;
use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor};
use half::{bf16, f16};
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::OnceLock;

type Kernel = extern "C" fn(*const Params);
type Emulate =
    extern "C" fn(Kernel, *const Params, *const [u32; 2], u32, u32, bool) -> *const c_char;

/// The compiled kernels, and the function that emulates a launch.
struct Library {
    handle: usize,
    emulate: Emulate,
}

fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(compile)
}

/// Compiles the kernels. Panics without a C++ compiler: a test that cannot run must not pass.
#[allow(clippy::unwrap_used, clippy::expect_used)]
fn compile() -> Library {
    let folder = tempfile::tempdir().unwrap();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/nn/gpu/kernels/kernels.cu");
    let library = folder.path().join("kernels.so");
    let arguments = [
        "-x",
        "c++",
        "-std=c++17",
        "-O2",
        "-w",
        "-fPIC",
        "-shared",
        "-U_FORTIFY_SOURCE",
        "-o",
    ];
    let compiled = ["c++", "g++", "clang++"].into_iter().find_map(|compiler| {
        let output = std::process::Command::new(compiler)
            .args(arguments)
            .args([library.as_os_str(), source.as_ref()])
            .output();
        // what is not there has this code where the processor is emulated too
        output
            .ok()
            .filter(|output| output.status.code() != Some(127))
    });
    let compiled = compiled
        .expect("the kernels of GPUs are tested with a C++ compiler: install g++ or clang++");
    assert!(
        compiled.status.success(),
        "{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    let path = CString::new(library.to_str().unwrap()).unwrap();
    // SAFETY: the library was just made of this project's source, and stays loaded; `Emulate` is as
    // host.h declares it
    unsafe {
        let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
        assert!(!handle.is_null(), "{:?}", CStr::from_ptr(libc::dlerror()));
        let emulate = libc::dlsym(handle, c"emulate".as_ptr());
        assert!(!emulate.is_null());
        Library {
            handle: handle as usize,
            emulate: std::mem::transmute::<*mut c_void, Emulate>(emulate),
        }
    }
}

/// The lock of the emulated machine, of which there is one.
static MACHINE: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[allow(clippy::unwrap_used)]
fn launch(launch: &Launch, backwards: bool) {
    let library = library();
    let name = CString::new(launch.kernel.as_str()).unwrap();
    // SAFETY: kernels take one argument by address, and `params` holds one
    let error = unsafe {
        let kernel = libc::dlsym(library.handle as *mut c_void, name.as_ptr());
        assert!(!kernel.is_null(), "there is no kernel {}", launch.kernel);
        let kernel = std::mem::transmute::<*mut c_void, Kernel>(kernel);
        let grid = launch.grid.map(|n| n as u32);
        let error = (library.emulate)(
            kernel,
            &launch.params,
            &grid,
            launch.threads as u32,
            launch.shared as u32,
            backwards,
        );
        if error.is_null() {
            None
        } else {
            Some(CStr::from_ptr(error))
        }
    };
    assert!(error.is_none(), "{}: {error:?}", launch.kernel);
}

/// Bytes between guards, at their original offset from a multiple of 16.
struct Guarded {
    /// for alignment
    memory: Vec<u128>,
    start: usize,
    len: usize,
}

impl Guarded {
    const GUARD: usize = 4096;

    fn new(len: usize, offset: usize) -> Self {
        Self {
            memory: vec![u128::MAX; (len + offset + 2 * Self::GUARD).div_ceil(16)],
            start: Self::GUARD + offset,
            len,
        }
    }

    fn of(x: &Tensor) -> Result<Self> {
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            candle_core::bail!("a tensor that is not on the CPU")
        };
        let from = layout.start_offset();
        let to = from
            + 1
            + layout
                .dims()
                .iter()
                .zip(layout.stride())
                .map(|(n, stride)| (n - 1) * stride)
                .sum::<usize>();
        let bytes: &[u8] = match storage {
            // SAFETY: numbers are bytes
            CpuStorage::F32(values) => unsafe { values[from..to].align_to().1 },
            CpuStorage::F16(values) => unsafe { values[from..to].align_to().1 },
            CpuStorage::BF16(values) => unsafe { values[from..to].align_to().1 },
            _ => candle_core::bail!("no kernels for {:?}", x.dtype()),
        };
        let mut guarded = Self::new(bytes.len(), from * x.dtype().size_in_bytes() % 16);
        guarded.bytes()[..bytes.len()].copy_from_slice(bytes);
        Ok(guarded)
    }

    fn address(&self) -> u64 {
        self.memory.as_ptr() as u64 + self.start as u64
    }

    /// All bytes from the start on, with the guard after them.
    fn bytes(&mut self) -> &mut [u8] {
        let start = self.start;
        // SAFETY: numbers are bytes
        unsafe { &mut self.memory.align_to_mut::<u8>().1[start..] }
    }

    fn is_whole(&mut self) -> bool {
        let (start, len) = (self.start, self.len);
        // SAFETY: numbers are bytes
        let all = unsafe { self.memory.align_to::<u8>().1 };
        all[..start]
            .iter()
            .chain(&all[start + len..])
            .all(|byte| *byte == 0xff)
    }
}

/// Runs work with its threads in either order, which must give the same bits.
pub fn emulate(work: &impl Work) -> Result<CpuStorage> {
    let machine = MACHINE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut inputs = vec![];
    let mut address = |x: &Tensor| {
        let guarded = Guarded::of(x)?;
        let address = guarded.address();
        inputs.push(guarded);
        Ok(address)
    };
    let dtype = work.dtype();
    let len = work.shape()?.elem_count() * dtype.size_in_bytes();
    let [mut output, mut scratch] = [len, 4 * work.scratch()].map(|len| Guarded::new(len, 0));
    let launches = work.launches(&mut address, output.address(), scratch.address())?;
    let mut run = |backwards| {
        for of in &launches {
            launch(of, backwards);
        }
        assert!(
            output.is_whole() && scratch.is_whole(),
            "{}: writes where it must not",
            launches[0].kernel
        );
        output.bytes()[..len].to_vec()
    };
    let bytes = run(false);
    assert!(
        bytes == run(true),
        "{}: the order of its threads matters",
        launches[0].kernel
    );
    drop(machine);
    let halves = bytes
        .chunks_exact(2)
        .map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    Ok(match dtype {
        DType::F16 => CpuStorage::F16(halves.map(f16::from_bits).collect()),
        DType::BF16 => CpuStorage::BF16(halves.map(bf16::from_bits).collect()),
        _ => CpuStorage::F32(
            bytes
                .chunks_exact(4)
                .map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
                .collect(),
        ),
    })
}

/// Unit normals.
#[allow(clippy::unwrap_used)]
pub fn random(shape: &[usize], dtype: DType) -> Tensor {
    normal(0f32, 1.0, shape).to_dtype(dtype).unwrap()
}

/// The same values in f32.
#[allow(clippy::unwrap_used)]
pub fn wide(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F32).unwrap()
}

/// Asserts that a kernel's result is that of the plain composition in f32, within the precision of
/// its type.
#[allow(clippy::unwrap_used)]
pub fn same(y: &Tensor, plain: &Tensor, what: &str) {
    let values = |x: &Tensor| wide(x).flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let step = match y.dtype() {
        DType::F16 => 1e-3,
        DType::BF16 => 8e-3,
        _ => 1e-5,
    };
    let (y, plain) = (values(y), values(plain));
    assert_eq!(y.len(), plain.len(), "{what}");
    let largest = plain.iter().fold(1f32, |most, value| most.max(value.abs()));
    let worst = y
        .iter()
        .zip(&plain)
        .map(|(y, plain)| (y - plain).abs())
        .max_by(f32::total_cmp)
        .unwrap_or_default();
    assert!(
        worst <= step * largest,
        "{what}: {worst:e} off, of {largest}"
    );
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::model::unet::{UNet, UNetInputs};
    use crate::model::unet_config::UNetConfig;
    use crate::model::{AddedCond, Autoencoder, Conditioning};
    use crate::nn::{Backend, Forward};
    use crate::weights::{Checkpoint, Origin};

    fn checkpoint(name: &str) -> Checkpoint {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures")
            .join(name);
        Checkpoint::open(Origin::Path(&folder)).unwrap()
    }

    fn cx(backend: Backend) -> Forward<'static> {
        Forward {
            backend,
            ..Forward::on(&Device::Cpu)
        }
    }

    /// The root mean square of the difference, relative to that of the values. The largest single
    /// difference would depend on how a processor rounds.
    fn difference(x: &Tensor, plain: &Tensor) -> f32 {
        let square = |x: &Tensor| {
            x.sqr()
                .unwrap()
                .mean_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap()
        };
        (square(&(wide(x) - plain).unwrap()) / square(plain)).sqrt()
    }

    #[test]
    fn networks_of_these_kernels_are_those_of_the_cpu() {
        for name in ["sd1", "odd", "sdxl"] {
            let checkpoint = checkpoint(name);
            let config = UNetConfig::from_json(checkpoint.config("unet").unwrap()).unwrap();
            let latents = random(&[2, 9, 6, config.in_channels], DType::F32);
            let json = checkpoint.config("unet").unwrap();
            let context = random(
                &[
                    2,
                    77,
                    json["cross_attention_dim"].as_u64().unwrap() as usize,
                ],
                DType::F32,
            );
            let pooled = json["projection_class_embeddings_input_dim"]
                .as_u64()
                .map(|inputs| {
                    let width = inputs as usize
                        - 6 * json["addition_time_embed_dim"].as_u64().unwrap() as usize;
                    random(&[2, width], DType::F32)
                });
            let predict = |backend: Backend, dtype: DType| {
                let as_type = |x: &Tensor| x.to_dtype(dtype).unwrap();
                let unet = UNet::new(
                    &checkpoint
                        .weights("unet", &Device::Cpu, dtype)
                        .with_backend(backend),
                    &config,
                )
                .unwrap();
                let added = pooled.as_ref().map(|pooled| AddedCond {
                    text_embeds: as_type(pooled),
                    time_ids: vec![vec![64.0; 6]; 2],
                });
                let conditioning = Conditioning {
                    context: as_type(&context),
                    lengths: vec![],
                    added_cond: added,
                    guidance: None,
                };
                unet.with_conditioning(cx(backend), &conditioning, None)
                    .unwrap()
                    .forward(UNetInputs::new(&as_type(&latents), 500.0))
                    .unwrap()
            };
            let plain = predict(Backend::Cpu, DType::F32);
            for (dtype, allowed) in [(DType::F32, 1e-5), (DType::F16, 1e-2), (DType::BF16, 8e-2)] {
                let off = difference(&predict(Backend::Gpu, dtype), &plain);
                assert!(off < allowed, "{name} {dtype:?}: {off:e}");
            }
        }
    }

    #[test]
    fn decoders_of_these_kernels_are_those_of_the_cpu() {
        let checkpoint = checkpoint("sd1");
        let config = Autoencoder::from_json(checkpoint.config("vae").unwrap()).unwrap();
        let latents = random(&[1, 5, 6, 4], DType::F32);
        let decode = |backend| {
            let weights = checkpoint
                .weights("vae", &Device::Cpu, DType::F32)
                .with_backend(backend);
            let decoder = config.decoder(&weights).unwrap();
            decoder.decode(cx(backend), &latents).unwrap()
        };
        let off = difference(&decode(Backend::Gpu), &decode(Backend::Cpu));
        assert!(off < 1e-5, "{off:e}");
    }
}
