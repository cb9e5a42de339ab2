//! The peak arithmetic of this machine: multiply-adds in registers, with no loads and stores.

use super::vector::{Kernel, LANES, Vector, dispatch};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Multiply-adds of one chain, about 20 ms.
const LENGTH: usize = 1 << 23;

/// Measures the floating-point operations per second of all threads together, the best of five
/// runs.
pub fn peak_flops() -> f64 {
    let run = || {
        let (start, done) = (Instant::now(), AtomicU64::new(0));
        rayon::broadcast(|_| dispatch(Chains(&done)));
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
