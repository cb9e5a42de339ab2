//! The layers that all networks are made of, on activations [b, h, w, c] and tokens [b, n, c].
//!
//! Read [`layers`] first. [`forward`] holds the arguments of every layer besides its input: the
//! [`backend`] that computes, the [`padding`] mode of convolutions, the [`profile`] that times
//! layers. [`bands`] holds activations that are too large to be held twice, [`attention`] is scaled
//! dot-product attention without a score matrix, [`embed`] the sinusoidal timestep embedding,
//! [`weights`] what layers read their tensors from, [`blocks`] weights that stay quantised, `cpu`
//! and `gpu` are the fused kernels behind the layers.

pub mod attention;
pub mod backend;
pub mod bands;
pub mod blocks;
pub mod cpu;
pub mod device;
pub mod embed;
pub mod forward;
#[cfg_attr(
    not(any(feature = "cuda", feature = "internals", test)),
    expect(
        dead_code,
        reason = "launched with CUDA only; tests run the kernels on the CPU"
    )
)]
pub mod gpu;
pub mod layers;
pub mod padding;
pub mod plain;
pub mod profile;
pub mod rotary;
pub mod stack;
#[cfg(test)]
pub mod testing;
pub mod weights;

pub use backend::Backend;
pub use forward::{Forward, Precision};
pub use padding::PaddingMode;
