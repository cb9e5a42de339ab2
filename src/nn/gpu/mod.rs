//! Kernels for NVIDIA's GPUs from compute capability 8.0 on, in f16, bf16 and f32, as candle
//! CustomOps.
//!
//! `kernels/` holds their source, which `build.rs` compiles with nvcc for the feature `cuda`. Their
//! launch parameters are computed here, without a GPU: a [`Work`] says which kernels run on how many
//! blocks, and `launch` runs them. The tests run the same launches of the same source on the CPU,
//! where `kernels/host.h` emulates the machine, and compare the results with the plain composition.
//! Sums are f32 throughout; a product of f32 is three of tf32, which leaves about 21 bits.

mod attention;
#[cfg(all(test, target_os = "linux"))]
pub mod emulated;
mod gemm;
mod graph;
mod launch;
mod norm;

pub use attention::Attention;
pub use gemm::{Gemm, interleaved, rows};
pub use graph::GraphCapture;
pub use launch::run;
pub use norm::{GroupApply, GroupSums, LayerNorm};

use candle_core::{DType, Device, Result, Shape, Tensor};

/// Kernels to run, one after the other, that fill one output.
pub trait Work {
    /// The main input: the output is on its device, and of its type unless [`Self::dtype`] says
    /// otherwise.
    fn input(&self) -> &Tensor;

    /// The type of the output: the input's by default.
    fn dtype(&self) -> DType {
        self.input().dtype()
    }

    /// The shape of the output: the input's by default.
    fn shape(&self) -> Result<Shape> {
        Ok(self.input().shape().clone())
    }

    /// The number of floats of scratch memory.
    fn scratch(&self) -> usize {
        0
    }

    /// The launches, given the addresses of the output and the scratch memory, and `address` for
    /// those of other tensors, which are of one type. The address of an absent tensor is 0.
    fn launches(
        &self,
        address: &mut dyn FnMut(&Tensor) -> Result<u64>,
        output: u64,
        scratch: u64,
    ) -> Result<Vec<Launch>>;
}

/// A kernel on blocks of threads.
pub struct Launch {
    pub kernel: String,
    /// across and down
    pub grid: [usize; 2],
    pub threads: usize,
    /// bytes of shared memory
    pub shared: usize,
    pub params: Params,
}

/// The bytes of a kernel's one argument, a struct of addresses and 32-bit numbers as the kernel
/// declares it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Params([u64; 32]);

impl Params {
    fn new<T: Copy>(value: &T) -> Self {
        const { assert!(size_of::<T>() <= 256 && align_of::<T>() <= 8) };
        let mut bytes = [0u64; 32];
        // SAFETY: T is plain data that fits
        unsafe {
            std::ptr::copy_nonoverlapping(
                std::ptr::from_ref(value).cast::<u8>(),
                bytes.as_mut_ptr().cast(),
                size_of::<T>(),
            )
        };
        Self(bytes)
    }
}

/// A size as kernels take it. Errors if 32 bits cannot hold it.
fn int(x: usize) -> Result<i32> {
    i32::try_from(x).map_err(candle_core::Error::wrap)
}

/// Bytes that a thread moves at once.
const CHUNK: usize = 16;

/// The suffix of the names of kernels for a type. Errors if there are none.
fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F16 => Ok("f16"),
        DType::BF16 => Ok("bf16"),
        DType::F32 => Ok("f32"),
        other => candle_core::bail!("no kernels for {other:?}"),
    }
}

/// The number of multiprocessors that work is cut for, where the device does not say.
const PROCESSORS: usize = 132;

fn processors(device: &Device) -> usize {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => launch::processors(device),
        _ => PROCESSORS,
    }
}
