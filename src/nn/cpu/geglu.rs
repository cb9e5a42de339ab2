//! The gate of a feed-forward layer.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, bail, cpu::erf::erf_f32};
use rayon::prelude::*;

/// [.., 2*n] -> [.., n]: the first half times the exact GELU of the second.
pub struct Geglu;

impl CustomOp1 for Geglu {
    fn name(&self) -> &'static str {
        "geglu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut shape = layout.dims().to_vec();
        let (CpuStorage::F32(x), Some((start, end)), Some(last)) = (storage, layout.contiguous_offsets(), shape.last_mut()) else {
            bail!("geglu takes contiguous f32")
        };
        let n = *last / 2;
        *last = n;
        let mut y = vec![0f32; (end - start) / 2];
        y.par_chunks_mut(n).zip(x[start..end].par_chunks(2 * n)).for_each(|(y, x)| {
            let (x, gate) = x.split_at(n);
            for ((y, x), gate) in y.iter_mut().zip(x).zip(gate) {
                *y = x * gate * 0.5 * (1.0 + erf_f32(gate * std::f32::consts::FRAC_1_SQRT_2));
            }
        });
        Ok((CpuStorage::F32(y), Shape::from(shape)))
    }
}
