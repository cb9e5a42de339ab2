//! Group normalisation of [b, h, w, c], with SiLU, and layer normalisation over the last dimension.
//!
//! A group norm reads its input twice: once for sums of numbers and of squares, once to write the output.

use super::copy::fresh;
use super::math::{layer_norm, moments};
use super::product::slice;
use super::vector::{Kernel, LANES, Vector, dispatch};
use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, bail};
use rayon::prelude::*;

/// Numbers of one task, about: small enough for a processor's own cache, large enough that handing it out costs nothing.
const BLOCK: usize = 1 << 15;

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
        let (_, h, w, c) = lx.shape().dims4()?;
        let (x, weight, bias) = (slice(x, lx)?, slice(weight, lw)?, slice(bias, lb)?);
        if x.is_empty() || weight.len() != c || bias.len() != c || !c.is_multiple_of(self.groups) {
            bail!("group norm of {:?} in {} groups with {} weights and {} biases", lx.shape(), self.groups, weight.len(), bias.len());
        }
        let mut y = fresh(x.len());
        // blocks are cut from one image by its shape alone, so that its sums depend on nothing else
        let (image, block) = (h * w * c, (BLOCK / c).max(1) * c);
        let partial: Vec<Vec<[f64; 2]>> = x.par_chunks_exact(image).flat_map(|x| x.par_chunks(block)).map(|x| self.sums(x, c)).collect();
        let affine: Vec<Affine> =
            partial.chunks_exact(image.div_ceil(block)).map(|partial| self.affine(partial, h * w, weight, bias)).collect();
        let images = y.par_chunks_exact_mut(image).zip(x.par_chunks_exact(image)).zip(&affine);
        images.for_each(|((y, x), affine)| {
            y.par_chunks_mut(block).zip(x.par_chunks(block)).for_each(|(y, x)| dispatch(Apply { affine, silu: self.silu, x, y }));
        });
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }
}

/// What normalises an image: per channel, y = (x - center) * scale + shift.
#[derive(Default)]
struct Affine {
    center: Vec<f32>,
    scale: Vec<f32>,
    shift: Vec<f32>,
}

/// Normalises pixels.
struct Apply<'a> {
    affine: &'a Affine,
    silu: bool,
    /// [pixels, c]
    x: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for Apply<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Affine { center, scale, shift } = self.affine;
        let c = center.len();
        for (y, x) in self.y.chunks_exact_mut(c).zip(self.x.chunks_exact(c)) {
            let affine = center.chunks(LANES).zip(scale.chunks(LANES)).zip(shift.chunks(LANES));
            for ((y, x), ((center, scale), shift)) in y.chunks_mut(LANES).zip(x.chunks(LANES)).zip(affine) {
                let centered = V::load_some(x).sub(V::load_some(center));
                let normal = V::load_some(shift).plus(centered, V::load_some(scale));
                (if self.silu { normal.silu() } else { normal }).store_some(y);
            }
        }
    }
}

impl GroupNorm {
    /// Per group, the sums of the numbers of x [pixels, c] and of their squares.
    fn sums(&self, x: &[f32], c: usize) -> Vec<[f64; 2]> {
        let (mut sums, mut squares) = (vec![0.0; c], vec![0.0; c]);
        moments(x, &mut sums, &mut squares);
        let groups = sums.chunks_exact(c / self.groups).zip(squares.chunks_exact(c / self.groups));
        groups.map(|(sums, squares)| [sums.iter().sum(), squares.iter().sum()]).collect()
    }

    /// From the sums of an image's blocks, added in order.
    fn affine(&self, partial: &[Vec<[f64; 2]>], pixels: usize, weight: &[f32], bias: &[f32]) -> Affine {
        let width = weight.len() / self.groups;
        let count = (pixels * width) as f64;
        let mut affine = Affine::default();
        for (group, (weight, bias)) in weight.chunks_exact(width).zip(bias.chunks_exact(width)).enumerate() {
            let mean = partial.iter().map(|sums| sums[group][0]).sum::<f64>() / count;
            let square = partial.iter().map(|sums| sums[group][1]).sum::<f64>() / count;
            // rounding may leave less than nothing where all numbers are the same
            let deviation = ((square - mean * mean).max(0.0) + self.eps).sqrt();
            // what rounding takes from the mean is in the shift: x - center is exact where x is near the mean
            let center = mean as f32;
            for (weight, bias) in weight.iter().zip(bias) {
                let scale = f64::from(*weight) / deviation;
                affine.center.push(center);
                affine.scale.push(scale as f32);
                affine.shift.push((f64::from(*bias) + (f64::from(center) - mean) * scale) as f32);
            }
        }
        affine
    }
}

/// x [.., n], weight [n], bias [n] -> [.., n].
pub struct LayerNorm {
    pub eps: f64,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
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
        let n = lx.shape().dim(D::Minus1)?;
        let (x, weight, bias) = (slice(x, lx)?, slice(weight, lw)?, slice(bias, lb)?);
        if n == 0 || weight.len() != n || bias.len() != n {
            bail!("layer norm of {:?} with {} weights and {} biases", lx.shape(), weight.len(), bias.len());
        }
        let mut y = fresh(x.len());
        let block = (BLOCK / n).max(1) * n;
        y.par_chunks_mut(block).zip(x.par_chunks(block)).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
                layer_norm(y, x, weight, bias, self.eps as f32);
            }
        });
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }
}
