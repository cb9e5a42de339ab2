//! Kernels for the CPU as candle CustomOps, f32, on rayon's pool. Results never depend on the
//! number of threads: work is cut by shape alone and partial sums are added in order. Each has its
//! plain composition, and the test that compares them, in [`super::layers`].

mod attend;
mod attention;
mod ceiling;
mod conv;
mod copy;
mod math;
mod norm;
mod panels;
mod product;
mod vector;
mod winograd;

pub use attend::Attended;
pub use attention::Attention;
pub use ceiling::ceiling;
pub use conv::Conv2d;
pub use copy::Concat;
pub use norm::{Affine, GroupNorm, LayerNorm, Normalise};
pub use panels::Pack;
pub use product::Product;
