//! The gate of a feed-forward layer.

use super::math::gated_gelu;
use super::product::slice;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, bail};
use rayon::prelude::*;

/// [.., 2*n] -> [.., n]: the first half times the exact GELU of the second.
pub struct Geglu;

impl CustomOp1 for Geglu {
    fn name(&self) -> &'static str {
        "geglu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(storage, layout)?;
        let mut shape = layout.dims().to_vec();
        let Some(last) = shape.last_mut() else { bail!("geglu takes a tensor with dimensions") };
        *last /= 2;
        let n = *last;
        let mut y = vec![0f32; x.len() / 2];
        y.par_chunks_mut(n).zip(x.par_chunks(2 * n)).for_each(|(y, x)| {
            let (x, gate) = x.split_at(n);
            gated_gelu(y, x, gate);
        });
        Ok((CpuStorage::F32(y), Shape::from(shape)))
    }
}
