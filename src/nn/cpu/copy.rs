//! Copies that candle does element by element on one thread, by whole rows on all threads.

use super::product::slice;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, bail};
use rayon::prelude::*;

/// Rows that one task copies.
const ROWS: usize = 64;

/// a [b, h, w, c] and b [b, h, w, d] -> [b, h, w, c + d].
pub struct Concat;

impl CustomOp2 for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }

    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout, b: &CpuStorage, lb: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((n, h, w, c), (nb, hb, wb, d)) = (la.shape().dims4()?, lb.shape().dims4()?);
        if (n, h, w) != (nb, hb, wb) || c == 0 || d == 0 {
            bail!("concatenation of {:?} and {:?}", la.shape(), lb.shape());
        }
        let (a, b) = (slice(a, la)?, slice(b, lb)?);
        let mut y = vec![0f32; n * h * w * (c + d)];
        let tasks = y.par_chunks_mut(ROWS * (c + d)).zip(a.par_chunks(ROWS * c)).zip(b.par_chunks(ROWS * d));
        tasks.for_each(|((y, a), b)| {
            for ((y, a), b) in y.chunks_exact_mut(c + d).zip(a.chunks_exact(c)).zip(b.chunks_exact(d)) {
                let (left, right) = y.split_at_mut(c);
                left.copy_from_slice(a);
                right.copy_from_slice(b);
            }
        });
        Ok((CpuStorage::F32(y), Shape::from((n, h, w, c + d))))
    }
}

/// x [b, h, w, c] -> [b, height, width, c], each pixel from the nearest one before it.
pub struct Upsample {
    pub height: usize,
    pub width: usize,
}

impl CustomOp1 for Upsample {
    fn name(&self) -> &'static str {
        "upsample-nearest"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, h, w, c) = layout.shape().dims4()?;
        let (x, height, width) = (slice(x, layout)?, self.height, self.width);
        let mut y = vec![0f32; b * height * width * c];
        if !y.is_empty() && !x.is_empty() {
            y.par_chunks_exact_mut(width * c).enumerate().for_each(|(i, row)| {
                let from = ((i / height) * h + i % height * h / height) * w * c;
                let source = &x[from..from + w * c];
                for (ox, pixel) in row.chunks_exact_mut(c).enumerate() {
                    let at = ox * w / width * c;
                    pixel.copy_from_slice(&source[at..at + c]);
                }
            });
        }
        Ok((CpuStorage::F32(y), Shape::from((b, height, width, c))))
    }
}
