//! The peak arithmetic of this machine: multiply-adds in registers or tiles, with no loads and stores.

use super::tiles::Tiles;
use super::vector::{Kernel, LANES, Vector, dispatch};
use crate::nn::Precision;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Multiply-adds of one chain, about 20 ms.
const LENGTH: usize = 1 << 23;

/// Measures the floating-point operations per second of all threads together, on vectors.
pub fn peak_flops() -> f64 {
    best(|done| dispatch(Chains(done)))
}

/// Measures the same of products of this precision, by what computes them: one of f32 on tiles is
/// the three of bf16 that make it. `None` where tiles are emulated.
pub fn ceiling(precision: Precision) -> Option<f64> {
    let Some(tiles) = Tiles::chosen(precision) else {
        return Some(peak_flops());
    };
    let products = match precision {
        Precision::F32 => 3.0,
        Precision::Bf16 => 1.0,
    };
    let flops = (!tiles.is_emulated()).then(|| {
        best(|done| {
            done.fetch_add(tiles.spin(), Ordering::Relaxed);
        })
    });
    Some(flops? / products)
}

/// The operations per second that all threads together count in `work`, the best of five runs.
fn best(work: impl Fn(&AtomicU64) + Sync) -> f64 {
    let run = || {
        let (start, done) = (Instant::now(), AtomicU64::new(0));
        rayon::broadcast(|_| work(&done));
        done.into_inner() as f64 / start.elapsed().as_secs_f64()
    };
    (0..5).map(|_| run()).fold(0.0, f64::max)
}

/// Chains of multiply-adds, as many as hide an addition's latency; counts its operations.
struct Chains<'a>(&'a AtomicU64);

impl Kernel for Chains<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let chains = if V::WIDE {
            chains::<V, 12>()
        } else {
            chains::<V, 6>()
        };
        self.0
            .fetch_add((2 * chains * LENGTH * LANES) as u64, Ordering::Relaxed);
    }
}

#[inline(always)]
fn chains<V: Vector, const N: usize>() -> usize {
    let (a, b) = (V::splat(black_box(0.5)), V::splat(black_box(1e-3)));
    let mut sums = [V::splat(black_box(1.0)); N];
    for _ in 0..LENGTH {
        for sum in &mut sums {
            *sum = sum.plus(a, b);
        }
    }
    let mut numbers = [0.0; LANES];
    sums.iter()
        .fold(V::splat(0.0), |total, sum| total.add(*sum))
        .store(&mut numbers);
    black_box(numbers);
    N
}
