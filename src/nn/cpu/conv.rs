//! Convolution of [b, h, w, c]: slices of the input's patches as rows of a matrix, times the packed weights.

use super::product::{Matrix, product, slice};
use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, bail};
use gemm::Parallelism;
use rayon::prelude::*;

/// Elements of unfolded input held at once (16 MiB).
const UNFOLDED: usize = 1 << 22;

/// Input channels that one task repacks.
const PACKED: usize = 32;

/// Weights [out, in, k, k] as checkpoints store them -> [k*k*in, out], the right side of one matrix product.
pub struct Pack;

impl CustomOp1 for Pack {
    fn name(&self) -> &'static str {
        "pack-conv2d"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (outputs, inputs, k, _) = layout.shape().dims4()?;
        let (weight, taps) = (slice(storage, layout)?, k * k);
        let mut packed = vec![0f32; weight.len()];
        // for each block of input channels, its rows under every tap of the kernel
        let mut blocks: Vec<Vec<&mut [f32]>> = (0..inputs.div_ceil(PACKED)).map(|_| Vec::with_capacity(taps)).collect();
        for tap in packed.chunks_exact_mut(inputs * outputs) {
            for (block, rows) in blocks.iter_mut().zip(tap.chunks_mut(PACKED * outputs)) {
                block.push(rows);
            }
        }
        blocks.par_iter_mut().enumerate().for_each(|(i, block)| {
            for (o, weight) in weight.chunks_exact(inputs * taps).enumerate() {
                for (row, weight) in weight[i * PACKED * taps..].chunks_exact(taps).take(PACKED).enumerate() {
                    for (rows, value) in block.iter_mut().zip(weight) {
                        rows[row * outputs + o] = *value;
                    }
                }
            }
        });
        Ok((CpuStorage::F32(packed), Shape::from((taps * inputs, outputs))))
    }
}

/// x [b, h, w, c], weight [size*size*c, out], bias [out] -> [b, h', w', out].
pub struct Conv2d {
    pub size: usize,
    pub stride: usize,
    /// zeros before and after, in both directions
    pub padding: (usize, usize),
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
        let ((b, h, w, c), (depth, outputs)) = (lx.shape().dims4()?, lw.shape().dims2()?);
        let (x, weight, bias) = (slice(x, lx)?, slice(weight, lw)?, slice(bias, lb)?);
        let padded = |n: usize| n + self.padding.0 + self.padding.1;
        if depth != self.size * self.size * c || bias.len() != outputs || padded(h) < self.size || padded(w) < self.size {
            bail!("convolution of {:?} with {:?}", lx.shape(), lw.shape());
        }
        let out = |n: usize| (padded(n) - self.size) / self.stride + 1;
        let (out_h, out_w) = (out(h), out(w));
        let mut y = bias.repeat(b * out_h * out_w);
        let pixels = b * out_h * out_w;
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
            let (a, b) =
                (Matrix { data: patches.as_ptr(), row: depth, column: 1 }, Matrix { data: weight.as_ptr(), row: outputs, column: 1 });
            // SAFETY: patches hold [count, depth], weight [depth, outputs], y [count, outputs]
            unsafe { product(count, depth, outputs, a, b, 1.0, y.as_mut_ptr(), outputs, true, Parallelism::Rayon(0)) };
        }
        Ok((CpuStorage::F32(y), Shape::from((b, out_h, out_w, outputs))))
    }
}

impl Conv2d {
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
