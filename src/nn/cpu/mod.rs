//! Kernels for the CPU as candle CustomOps, f32, on rayon's pool. Results never depend on the number of threads: work is
//! cut by shape alone and partial sums are added in order. Each has its plain composition, and the test that compares
//! them, in [`super::layers`].

mod attention;
mod conv;
mod copy;
mod geglu;
mod math;
mod norm;
mod product;
mod vector;
mod winograd;

pub use attention::Attention;
pub use conv::Conv2d;
pub use copy::{Concat, Upsample};
pub use geglu::Geglu;
pub use norm::GroupNorm;
pub use product::Product;
