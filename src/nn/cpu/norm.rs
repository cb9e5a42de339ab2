//! Group normalisation of [b, h, w, c], with SiLU, and layer normalisation over the last dimension.
//!
//! A group norm reads its input twice: once for sums of numbers and of squares, once to write the
//! output.

use super::concat::uninit;
use super::gemm::{slice, with_slice};
use super::vector::{Kernel, LANES, Vector, dispatch};
use super::vector_math::{layer_norm, moments};
use candle_core::{CpuStorage, CustomOp1, CustomOp3, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// About how many elements a task has: few enough for a core's own cache, enough that scheduling it
/// costs nothing.
const BLOCK: usize = 1 << 15;

/// The length of one task over `len` elements in rows of `n`: whole rows, and at least one task for
/// each thread.
fn task_len(len: usize, n: usize) -> usize {
    let block = BLOCK.min(len / rayon::current_num_threads());
    block.div_ceil(n).max(1) * n
}

/// Group normalisation of images in bands of rows.
pub struct GroupNorm {
    pub groups: usize,
    pub eps: f64,
}

/// The affine map that normalises an image: per channel, y = (x - center) * scale + shift.
#[derive(Default)]
pub struct Affine {
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
        let Affine {
            center,
            scale,
            shift,
        } = self.affine;
        let c = center.len();
        for (y, x) in self.y.chunks_exact_mut(c).zip(self.x.chunks_exact(c)) {
            let affine = center
                .chunks(LANES)
                .zip(scale.chunks(LANES))
                .zip(shift.chunks(LANES));
            for ((y, x), ((center, scale), shift)) in
                y.chunks_mut(LANES).zip(x.chunks(LANES)).zip(affine)
            {
                let centered = V::load_some(x).sub(V::load_some(center));
                let normal = V::load_some(shift).plus(centered, V::load_some(scale));
                (if self.silu { normal.silu() } else { normal }).store_some(y);
            }
        }
    }
}

/// Normalises x [b, h, w, c] with its halo -> [b, above + h + below, w, c].
pub struct Normalise<'a> {
    /// one an image
    pub affine: &'a [Affine],
    pub silu: bool,
    /// [b, above, w, c]
    pub above: Option<&'a Tensor>,
    /// [b, below, w, c]
    pub below: Option<&'a Tensor>,
}

impl CustomOp1 for Normalise<'_> {
    fn name(&self) -> &'static str {
        "normalise"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, _, w, c) = layout.shape().dims4()?;
        let fits = |rows: &&Tensor| matches!(rows.dims4(), Ok((rows_b, _, rows_w, rows_c)) if (rows_b, rows_w, rows_c) == (b, w, c));
        if self.affine.len() != b
            || self.affine.iter().any(|a| a.center.len() != c)
            || ![self.above, self.below].iter().flatten().all(fits)
        {
            bail!("normalisation of {:?}", layout.shape());
        }
        let x = slice(x, layout)?;
        let (y, rows) = with_slice(self.above, |above| {
            with_slice(self.below, |below| {
                let parts = [above.unwrap_or_default(), x, below.unwrap_or_default()];
                let len = parts.iter().map(|part| part.len()).sum();
                let mut y = uninit(len);
                let block = task_len(len, c);
                let mut tasks = vec![];
                for ((i, mut y), affine) in y.chunks_exact_mut(len / b).enumerate().zip(self.affine)
                {
                    for x in parts {
                        let x = &x[i * (x.len() / b)..][..x.len() / b];
                        let (part, rest) = y.split_at_mut(x.len());
                        let blocks = part.chunks_mut(block).zip(x.chunks(block));
                        tasks.extend(blocks.map(|(y, x)| Apply {
                            affine,
                            silu: self.silu,
                            x,
                            y,
                        }));
                        y = rest;
                    }
                }
                tasks.into_par_iter().for_each(dispatch);
                (y, len / (b * w * c))
            })
        })??;
        Ok((CpuStorage::F32(y), Shape::from((b, rows, w, c))))
    }
}

impl GroupNorm {
    /// Computes the map of each image from its bands of rows from top to bottom, for weight and bias
    /// `[c]`.
    pub fn statistics(
        &self,
        parts: &[&Tensor],
        weight: &Tensor,
        bias: &Tensor,
    ) -> Result<Vec<Affine>> {
        let mut images: Vec<Vec<Vec<[f64; 2]>>> = vec![];
        let mut pixels = 0;
        for part in parts {
            let (b, h, w, c) = part.dims4()?;
            if b * h * w * c == 0
                || weight.dims() != [c]
                || bias.dims() != [c]
                || !c.is_multiple_of(self.groups)
            {
                bail!(
                    "group norm of {:?} in {} groups with {:?} weights and {:?} biases",
                    part.shape(),
                    self.groups,
                    weight,
                    bias
                );
            }
            images.resize(b, vec![]);
            pixels += h * w;
            // blocks are cut from one image by its shape alone, so that its sums depend on nothing
            // else
            let (image, block) = (h * w * c, (BLOCK / c).max(1) * c);
            let sums: Vec<_> = with_slice(Some(part), |x| {
                let x = x.unwrap_or_default();
                x.par_chunks_exact(image)
                    .flat_map(|x| x.par_chunks(block))
                    .map(|x| self.sums(x, c))
                    .collect()
            })?;
            for (image, sums) in images
                .iter_mut()
                .zip(sums.chunks_exact(image.div_ceil(block)))
            {
                image.extend_from_slice(sums);
            }
        }
        with_slice(Some(weight), |weight| {
            with_slice(Some(bias), |bias| {
                let (weight, bias) = (weight.unwrap_or_default(), bias.unwrap_or_default());
                images
                    .iter()
                    .map(|partial| self.affine(partial, pixels, weight, bias))
                    .collect()
            })
        })?
    }

    /// Per group, the sums of the numbers of x [pixels, c] and of their squares.
    fn sums(&self, x: &[f32], c: usize) -> Vec<[f64; 2]> {
        let (mut sums, mut squares) = (vec![0.0; c], vec![0.0; c]);
        moments(x, &mut sums, &mut squares);
        let groups = sums
            .chunks_exact(c / self.groups)
            .zip(squares.chunks_exact(c / self.groups));
        groups
            .map(|(sums, squares)| [sums.iter().sum(), squares.iter().sum()])
            .collect()
    }

    /// From the sums of an image's blocks, added in order.
    fn affine(
        &self,
        partial: &[Vec<[f64; 2]>],
        pixels: usize,
        weight: &[f32],
        bias: &[f32],
    ) -> Affine {
        let width = weight.len() / self.groups;
        let count = (pixels * width) as f64;
        let mut affine = Affine::default();
        for (group, (weight, bias)) in weight
            .chunks_exact(width)
            .zip(bias.chunks_exact(width))
            .enumerate()
        {
            let mean = partial.iter().map(|sums| sums[group][0]).sum::<f64>() / count;
            let square = partial.iter().map(|sums| sums[group][1]).sum::<f64>() / count;
            // rounding may leave less than nothing where all numbers are the same
            let deviation = ((square - mean * mean).max(0.0) + self.eps).sqrt();
            // what rounding takes from the mean is in the shift: x - center is exact where x is
            // near the mean
            let center = mean as f32;
            for (weight, bias) in weight.iter().zip(bias) {
                let scale = f64::from(*weight) / deviation;
                affine.center.push(center);
                affine.scale.push(scale as f32);
                affine
                    .shift
                    .push((f64::from(*bias) + (f64::from(center) - mean) * scale) as f32);
            }
        }
        affine
    }
}

/// x [.., n], weight `[n]`, bias `[n]` -> [.., n].
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
            bail!(
                "layer norm of {:?} with {} weights and {} biases",
                lx.shape(),
                weight.len(),
                bias.len()
            );
        }
        let mut y = uninit(x.len());
        let block = task_len(x.len(), n);
        y.par_chunks_mut(block)
            .zip(x.par_chunks(block))
            .for_each(|(y, x)| {
                for (y, x) in y.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
                    layer_norm(y, x, weight, bias, self.eps as f32);
                }
            });
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }
}
