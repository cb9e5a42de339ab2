//! Concatenation by whole rows on all threads, where candle copies element by element on one; and
//! memory that is not zeroed.

use super::gemm::slice;
use super::vector::{LANES, Lanes};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, bail};
use rayon::prelude::*;

/// Memory for a kernel's output, not zeroed; NaN in debug builds, so that a test sees what was not
/// written.
pub fn uninit(len: usize) -> Vec<f32> {
    memory(len, f32::NAN)
}

/// The same for vectors.
pub fn uninit_lanes(len: usize) -> Vec<Lanes> {
    memory(len, Lanes([f32::NAN; LANES]))
}

#[expect(
    clippy::uninit_vec,
    reason = "a kernel writes all of it, zeroing it first would cost time"
)]
fn memory<T: Copy>(len: usize, nan: T) -> Vec<T> {
    if cfg!(debug_assertions) {
        return vec![nan; len];
    }
    let mut memory = Vec::with_capacity(len);
    // SAFETY: the capacity is there, and a kernel writes every element before it reads any or hands
    // them out
    unsafe {
        memory.set_len(len);
    }
    memory
}

/// Rows that one task copies.
const ROWS: usize = 64;

/// Concatenates a [b, h, w, c] and b [b, h, w, d] -> [b, h, w, c + d].
pub struct Concat;

impl CustomOp2 for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((n, h, w, c), (nb, hb, wb, d)) = (la.shape().dims4()?, lb.shape().dims4()?);
        if (n, h, w) != (nb, hb, wb) || c == 0 || d == 0 {
            bail!("concatenation of {:?} and {:?}", la.shape(), lb.shape());
        }
        let (a, b) = (slice(a, la)?, slice(b, lb)?);
        let mut y = uninit(n * h * w * (c + d));
        let tasks = y
            .par_chunks_mut(ROWS * (c + d))
            .zip(a.par_chunks(ROWS * c))
            .zip(b.par_chunks(ROWS * d));
        tasks.for_each(|((y, a), b)| {
            for ((y, a), b) in y
                .chunks_exact_mut(c + d)
                .zip(a.chunks_exact(c))
                .zip(b.chunks_exact(d))
            {
                let (left, right) = y.split_at_mut(c);
                left.copy_from_slice(a);
                right.copy_from_slice(b);
            }
        });
        Ok((CpuStorage::F32(y), Shape::from((n, h, w, c + d))))
    }
}
