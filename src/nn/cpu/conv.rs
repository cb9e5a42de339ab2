//! Convolution of [b, h, w, c]: slices of the input's patches as rows of a matrix, times the packed weights; by
//! [`super::winograd`] where that is faster.

use super::product::{Matrix, Output, product, slice, under, with_slice};
use super::winograd;
use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor, bail};
use gemm::Parallelism;
use rayon::prelude::*;

/// Elements of unfolded input held at once (16 MiB).
const UNFOLDED: usize = 1 << 22;

/// Input channels that one task repacks.
const PACKED: usize = 32;

/// Weights [out, in, k, k] as checkpoints store them -> [panels, k*k*in, width]: for each `width` output channels, zeros
/// after the last, the right side of one matrix product.
pub struct Pack {
    width: usize,
}

impl CustomOp1 for Pack {
    fn name(&self) -> &'static str {
        "pack-conv2d"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (outputs, inputs, k, _) = layout.shape().dims4()?;
        let (weight, taps, width) = (slice(storage, layout)?, k * k, self.width.min(outputs));
        if weight.is_empty() {
            bail!("a convolution from {inputs} to {outputs} channels");
        }
        let (panels, slabs) = (outputs.div_ceil(width), inputs.div_ceil(PACKED));
        let mut packed = vec![0f32; panels * taps * inputs * width];
        // for each panel and block of input channels, its rows under every tap of the kernel
        let mut blocks: Vec<Vec<&mut [f32]>> = (0..panels * slabs).map(|_| Vec::with_capacity(taps)).collect();
        for (blocks, panel) in blocks.chunks_exact_mut(slabs).zip(packed.chunks_exact_mut(taps * inputs * width)) {
            for tap in panel.chunks_exact_mut(inputs * width) {
                for (block, rows) in blocks.iter_mut().zip(tap.chunks_mut(PACKED * width)) {
                    block.push(rows);
                }
            }
        }
        blocks.par_iter_mut().enumerate().for_each(|(i, block)| {
            let (panel, slab) = (i / slabs, i % slabs);
            for (o, weight) in weight.chunks_exact(inputs * taps).skip(panel * width).take(width).enumerate() {
                for (row, weight) in weight[slab * PACKED * taps..].chunks_exact(taps).take(PACKED).enumerate() {
                    for (rows, value) in block.iter_mut().zip(weight) {
                        rows[row * width + o] = *value;
                    }
                }
            }
        });
        Ok((CpuStorage::F32(packed), Shape::from((panels, taps * inputs, width))))
    }
}

/// x [b, h, w, c], weight [panels, size*size*c, width], bias [out] -> [b, h', w', out].
pub struct Conv2d {
    pub size: usize,
    pub stride: usize,
    /// zeros before and after, in both directions
    pub padding: (usize, usize),
    /// [b, h', w', out]: added to the result
    pub residual: Option<Tensor>,
}

impl CustomOp3 for Conv2d {
    fn name(&self) -> &'static str {
        "conv2d"
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
        let ((b, h, w, c), (panels, depth, width)) = (lx.shape().dims4()?, lw.shape().dims3()?);
        let (x, weight, bias) = (slice(x, lx)?, slice(weight, lw)?, slice(bias, lb)?);
        let outputs = bias.len();
        if depth != self.size * self.size * c
            || width != self.pack().width.min(outputs)
            || panels != outputs.div_ceil(width)
            || self.padding.0 + self.padding.1 + h.min(w) < self.size
            || self.residual.as_ref().is_some_and(|r| r.dims() != [b, self.out(h), self.out(w), outputs])
        {
            bail!("convolution of {:?} with {:?}", lx.shape(), lw.shape());
        }
        let y = if self.is_winograd() && winograd::pays(h, w) {
            with_slice(&self.residual, |residual| winograd::convolve(x, (b, h, w, c), weight, bias, residual))?
        } else {
            self.unfolded(x, (b, h, w, c), weight, bias)?
        };
        Ok((CpuStorage::F32(y), Shape::from((b, self.out(h), self.out(w), outputs))))
    }
}

impl Conv2d {
    /// How the weights are packed at load.
    pub fn pack(&self) -> Pack {
        Pack { width: if self.is_winograd() { winograd::WIDTH } else { usize::MAX } }
    }

    /// Whether Winograd's algorithm can do it, for pictures that are large enough.
    fn is_winograd(&self) -> bool {
        self.size == 3 && self.stride == 1 && self.padding == (1, 1)
    }

    /// Height or width of the output.
    fn out(&self, n: usize) -> usize {
        (n + self.padding.0 + self.padding.1 - self.size) / self.stride + 1
    }

    /// The convolution as products of unfolded patches and the panels of weights.
    pub(super) fn unfolded(&self, x: &[f32], (b, h, w, c): (usize, usize, usize, usize), weight: &[f32], bias: &[f32]) -> Result<Vec<f32>> {
        let (depth, outputs) = (self.size * self.size * c, bias.len());
        let width = self.pack().width.min(outputs);
        let panels = outputs.div_ceil(width);
        let (out_h, out_w) = (self.out(h), self.out(w));
        let pixels = b * out_h * out_w;
        let mut y = under(&self.residual, Some(bias), pixels, outputs)?;
        let rows = (UNFOLDED / depth).clamp(1, pixels.max(1));
        let in_place = self.size == 1 && self.stride == 1 && self.padding == (0, 0);
        let mut unfolded = vec![0f32; if in_place { 0 } else { rows * depth }];
        for (i, y) in y.chunks_mut(rows * outputs).enumerate() {
            let count = y.len() / outputs;
            let patches = if in_place {
                &x[i * rows * c..]
            } else {
                unfolded.par_chunks_mut(depth).take(count).enumerate().for_each(|(j, patch)| {
                    let pixel = i * rows + j;
                    let (image, oy, ox) = (pixel / (out_h * out_w), pixel / out_w % out_h, pixel % out_w);
                    self.unfold(&x[image * h * w * c..(image + 1) * h * w * c], (h, w, c), (oy, ox), patch);
                });
                &unfolded
            };
            let threads = if panels == 1 { Parallelism::Rayon(0) } else { Parallelism::None };
            let y = Output(y.as_mut_ptr());
            (0..panels).into_par_iter().for_each(|panel| {
                let columns = width.min(outputs - panel * width);
                let a = Matrix { data: patches.as_ptr(), row: depth, column: 1 };
                let b = Matrix { data: weight[panel * depth * width..].as_ptr(), row: width, column: 1 };
                // SAFETY: patches hold [count, depth], weight [panels, depth, width], y [count, outputs] of which each
                // panel has columns of its own
                unsafe { product(count, depth, columns, a, b, 1.0, y.at(panel * width), outputs, true, threads) };
            });
        }
        Ok(y)
    }

    /// Copies what output pixel (oy, ox) sees of one image [h, w, c] into `patch` [size, size, c], with zeros outside.
    fn unfold(&self, image: &[f32], (h, w, c): (usize, usize, usize), (oy, ox): (usize, usize), patch: &mut [f32]) {
        let before = self.padding.0;
        let (top, left) = (oy * self.stride, ox * self.stride);
        // columns of the kernel that lie inside of the image: first.. last
        let first = before.saturating_sub(left).min(self.size);
        let last = (w + before).saturating_sub(left).clamp(first, self.size);
        for (ky, taps) in patch.chunks_exact_mut(self.size * c).enumerate() {
            let inside = (top + ky).checked_sub(before).filter(|y| *y < h && first < last);
            let Some(y) = inside else {
                taps.fill(0.0);
                continue;
            };
            let from = (y * w + left + first - before) * c;
            taps[..first * c].fill(0.0);
            taps[first * c..last * c].copy_from_slice(&image[from..from + (last - first) * c]);
            taps[last * c..].fill(0.0);
        }
    }
}
