//! Group normalisation of [b, h, w, c] in two passes, with SiLU in the second.

use super::math::affine_silu;
use super::product::slice;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape};
use rayon::prelude::*;

/// Pixels of one partial sum; fixed, so that sums do not depend on the number of threads.
const PIXELS: usize = 256;

/// x [b, h, w, c], weight [c], bias [c] -> [b, h, w, c].
pub struct GroupNorm {
    pub groups: usize,
    pub eps: f64,
    pub silu: bool,
}

impl CustomOp3 for GroupNorm {
    fn name(&self) -> &'static str {
        "group-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
        bias: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (b, h, w, c) = lx.shape().dims4()?;
        let (x, weight, bias) = (slice(x, lx)?, slice(weight, lw)?, slice(bias, lb)?);
        let mut y = vec![0f32; x.len()];
        let image = h * w * c;
        for (x, y) in x.chunks_exact(image).zip(y.chunks_exact_mut(image)).take(b) {
            let (scale, shift) = self.affine(x, c, weight, bias);
            y.par_chunks_mut(PIXELS * c).zip(x.par_chunks(PIXELS * c)).for_each(|(y, x)| {
                for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                    affine_silu(y, x, &scale, &shift, self.silu);
                }
            });
        }
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }
}

impl GroupNorm {
    /// Per channel, the scale and shift that normalise one image [h*w, c]: mean and variance by f64 sums.
    fn affine(&self, x: &[f32], c: usize, weight: &[f32], bias: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let sums = |term: &(dyn Fn(usize, f64) -> f64 + Sync)| -> Vec<f64> {
            let partial: Vec<Vec<f64>> = x
                .par_chunks(PIXELS * c)
                .map(|pixels| {
                    let mut sums = vec![0f64; c];
                    for pixel in pixels.chunks_exact(c) {
                        for (i, (sum, x)) in sums.iter_mut().zip(pixel).enumerate() {
                            *sum += term(i, f64::from(*x));
                        }
                    }
                    sums
                })
                .collect();
            let width = c / self.groups;
            let total = |group: usize| partial.iter().flat_map(|s| &s[group * width..(group + 1) * width]).sum::<f64>();
            let count = (x.len() / self.groups) as f64;
            (0..self.groups).map(|g| total(g) / count).flat_map(|mean| std::iter::repeat_n(mean, width)).collect()
        };
        let mean = sums(&|_, x| x);
        let variance = sums(&|i, x| (x - mean[i]) * (x - mean[i]));
        let scale: Vec<f64> = variance.iter().zip(weight).map(|(v, w)| f64::from(*w) / (v + self.eps).sqrt()).collect();
        let shift = mean.iter().zip(&scale).zip(bias).map(|((m, s), b)| (f64::from(*b) - m * s) as f32).collect();
        (scale.into_iter().map(|s| s as f32).collect(), shift)
    }
}
