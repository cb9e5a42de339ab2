//! Inputs of tests.

use super::{Precision, cpu::Tiles};
use candle_core::{Device, Shape, Tensor};
use rand_mt::Mt;
use std::cell::RefCell;

thread_local! {
    /// A test runs on a thread of its own, so that its inputs are the same in every run.
    static GENERATOR: RefCell<Mt> = RefCell::new(Mt::new(0));
}

/// Normal numbers in f32 (Box & Muller 1958). Unlike candle's, which cannot be seeded on the CPU,
/// they are the same in every run: a tolerance that holds once holds always.
#[allow(clippy::unwrap_used)]
pub fn normal(mean: f32, std: f32, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let values: Vec<f32> = GENERATOR.with_borrow_mut(|generator| {
        let mut uniform = || (f64::from(generator.next_u32()) + 0.5) / 2f64.powi(32);
        (0..shape.elem_count())
            .map(|_| {
                let radius = (-2.0 * uniform().ln()).sqrt();
                let unit = radius * (std::f64::consts::TAU * uniform()).cos();
                mean + std * unit as f32
            })
            .collect()
    });
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The tolerance of a comparison with products of f32: the first where kernels compute them, the
/// second where they compute three of bf16, which are a little less exact (see `nn/cpu/tiles.rs`).
pub fn tolerance(of_f32: f32, of_three: f32) -> f32 {
    match Tiles::chosen(Precision::F32) {
        None => of_f32,
        Some(_) => of_three,
    }
}
