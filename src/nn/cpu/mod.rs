//! Kernels for the CPU as candle CustomOps, f32, on rayon's pool. Results never depend on the
//! number of threads: work is cut by shape alone and partial sums are added in order. Each has its
//! plain composition in [`super::plain`]; the tests of [`super::layers`] compare them.

mod activation;
mod attention;
mod concat;
mod conv;
mod gemm;
pub mod instructions;
mod int8;
mod keep_awake;
mod norm;
mod panels;
mod peak_flops;
mod tiles;
mod vector;
mod vector_math;
mod winograd;

pub use activation::{GeluTanh, SwiGlu};
pub use attention::Attention;
pub use concat::Concat;
pub use conv::Conv2d;
pub use gemm::{BlocksGemm, Gemm};
pub use int8::{Int8Gemm, Int8Matrix};
pub use keep_awake::KeepAwake;
pub use norm::{Affine, GroupNorm, LayerNorm, Normalise};
pub use panels::Pack;
pub use peak_flops::{ceiling, peak_flops};
pub use tiles::{Tiles, instructions_of};
