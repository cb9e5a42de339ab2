//! The input patches of a convolution as rows of a matrix.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, bail};
use rayon::prelude::*;

/// [1, h, w, c], padded already -> [h'*w', size*size*c]: one row holds all that one output pixel sees.
pub struct Unfold {
    pub size: usize,
    pub stride: usize,
}

impl CustomOp1 for Unfold {
    fn name(&self) -> &'static str {
        "unfold"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, h, w, c) = layout.shape().dims4()?;
        let (CpuStorage::F32(x), Some((start, end))) = (storage, layout.contiguous_offsets()) else { bail!("unfold takes contiguous f32") };
        let x = &x[start..end];
        let Self { size, stride } = *self;
        let (out_h, out_w) = ((h - size) / stride + 1, (w - size) / stride + 1);
        let row = size * size * c;
        let mut y = vec![0f32; out_h * out_w * row];
        y.par_chunks_mut(out_w * row).enumerate().for_each(|(oy, line)| {
            for (ox, patch) in line.chunks_exact_mut(row).enumerate() {
                for (ky, taps) in patch.chunks_exact_mut(size * c).enumerate() {
                    let from = ((oy * stride + ky) * w + ox * stride) * c;
                    taps.copy_from_slice(&x[from..from + size * c]);
                }
            }
        });
        Ok((CpuStorage::F32(y), Shape::from((out_h * out_w, row))))
    }
}
