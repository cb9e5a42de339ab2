//! Convolution of [b, h, w, c] as one product whose left side, im2col's, is gathered from the image
//! as it is needed; by [`super::winograd`] where that is faster.

use super::gemm::{Epilogue, gemm, slice, with_slice};
use super::panels::{Panels, WIDTH};
use super::winograd;
use crate::nn::PaddingMode;
use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor, bail};
use std::ops::Range;

/// Images [b, rows, columns, c], read as if they were scaled to [b, h, w, c]: each pixel from the
/// nearest one before it.
#[derive(Clone, Copy)]
pub struct Images<'a> {
    pub x: &'a [f32],
    pub rows: usize,
    pub columns: usize,
    pub b: usize,
    pub h: usize,
    pub w: usize,
    pub c: usize,
    /// of rows and of columns
    pub padding_modes: [PaddingMode; 2],
}

impl<'a> Images<'a> {
    /// The stored row of row y - `before`; none in a padding of zeros.
    pub fn row(&self, y: usize, before: usize) -> Option<usize> {
        let y = inside(y, before, self.h, self.padding_modes[0])?;
        Some(if self.rows == self.h {
            y
        } else {
            y * self.rows / self.h
        })
    }

    /// The stored column of column x - `before`; none in a padding of zeros.
    pub fn column(&self, x: usize, before: usize) -> Option<usize> {
        let x = inside(x, before, self.w, self.padding_modes[1])?;
        Some(if self.columns == self.w {
            x
        } else {
            x * self.columns / self.w
        })
    }

    /// The pixel [c] of an image at a stored row and column.
    pub fn pixel(&self, image: usize, row: usize, column: usize) -> &'a [f32] {
        &self.x[((image * self.rows + row) * self.columns + column) * self.c..][..self.c]
    }
}

/// The index of `at` - `before` among `len`; none in a padding of zeros.
fn inside(at: usize, before: usize, len: usize, mode: PaddingMode) -> Option<usize> {
    match at.checked_sub(before) {
        Some(at) if at < len => Some(at),
        _ if mode.is_circular() => Some((at + before * (len - 1)) % len),
        _ => None,
    }
}

/// x [b, h, w, c], packed weight [panels, size*size*c, 32], bias `[out]` or [b, out] -> rows of [b,
/// h', w', out].
pub struct Conv2d {
    pub size: usize,
    pub stride: usize,
    /// before and after, in both directions
    pub padding: (usize, usize),
    /// of rows and of columns
    pub padding_modes: [PaddingMode; 2],
    /// the rows of the output that are computed
    pub rows: Range<usize>,
    /// (height, width) to which the image is scaled before it is convolved, each pixel from the
    /// nearest one before it
    pub scaled: Option<(usize, usize)>,
    /// [b, rows, w', out]: added to the result
    pub residual: Option<Tensor>,
    /// `[out]`: the slope of a leaky ReLU after that
    pub slope: Option<Tensor>,
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
        let (b, rows, columns, c) = lx.shape().dims4()?;
        let (h, w) = self.scaled.unwrap_or((rows, columns));
        let (x, weight, bias) = (slice(x, lx)?, Panels::of(weight, lw)?, slice(bias, lb)?);
        let outputs = lb.shape().dim(D::Minus1)?;
        if lw.dims() != [outputs.div_ceil(WIDTH), self.size * self.size * c, WIDTH]
            || rows * columns * h * w == 0
            || (bias.len() != outputs && bias.len() != b * outputs)
            || self.padding.0 + self.padding.1 + h.min(w) < self.size
            || self.rows.end > self.out(h)
            || self
                .slope
                .as_ref()
                .is_some_and(|slope| slope.dims() != [outputs])
            || self
                .residual
                .as_ref()
                .is_some_and(|r| r.dims() != [b, self.rows.len(), self.out(w), outputs])
        {
            bail!("convolution of {:?} with {:?}", lx.shape(), lw.shape());
        }
        let images = Images {
            x,
            rows,
            columns,
            b,
            h,
            w,
            c,
            padding_modes: self.padding_modes,
        };
        let convolved = |residual: Option<&[f32]>, slope: Option<&[f32]>| {
            if self.is_winograd() && winograd::pays(self.rows.len(), w) {
                winograd::convolve(
                    images,
                    self.rows.clone(),
                    outputs,
                    weight,
                    bias,
                    residual,
                    slope,
                )
            } else {
                self.im2col(
                    images,
                    outputs,
                    weight,
                    Epilogue {
                        bias: Some(bias),
                        residual,
                        slope,
                        gated: false,
                    },
                )
            }
        };
        let y = with_slice(self.residual.as_ref(), |residual| {
            with_slice(self.slope.as_ref(), |slope| convolved(residual, slope))
        })??;
        Ok((
            CpuStorage::F32(y),
            Shape::from((b, self.rows.len(), self.out(w), outputs)),
        ))
    }
}

impl Conv2d {
    /// Whether Winograd's algorithm can compute it.
    fn is_winograd(&self) -> bool {
        self.size == 3 && self.stride == 1 && self.padding == (1, 1)
    }

    /// Height or width of the whole output.
    fn out(&self, n: usize) -> usize {
        (n + self.padding.0 + self.padding.1 - self.size) / self.stride + 1
    }

    /// The convolution as a product of im2col's rows and the weights.
    pub(super) fn im2col(
        &self,
        images: Images,
        outputs: usize,
        weight: Panels,
        epilogue: Epilogue,
    ) -> Vec<f32> {
        let (h, w) = (self.rows.len(), self.out(images.w));
        let shape = (images.b * h * w, self.size * self.size * images.c, outputs);
        let left = |pixel: usize, terms: Range<usize>, patch: &mut [f32]| {
            self.im2col_row(
                images,
                (pixel / (h * w), self.rows.start + pixel / w % h, pixel % w),
                terms,
                patch,
            );
        };
        gemm(shape, left, weight, epilogue)
    }

    /// Copies a range of im2col's row of output pixel (oy, ox): the pixels [size, size, c] that it
    /// sees.
    fn im2col_row(
        &self,
        images: Images,
        (image, oy, ox): (usize, usize, usize),
        terms: Range<usize>,
        mut patch: &mut [f32],
    ) {
        let c = images.c;
        let mut at = terms.start;
        while at < terms.end {
            let (tap, channel) = (at / c, at % c);
            let len = (c - channel).min(terms.end - at);
            let (part, rest) = patch.split_at_mut(len);
            let (y, x) = (
                oy * self.stride + tap / self.size,
                ox * self.stride + tap % self.size,
            );
            match (
                images.row(y, self.padding.0),
                images.column(x, self.padding.0),
            ) {
                (Some(row), Some(column)) => {
                    let pixel = images.pixel(image, row, column);
                    part.copy_from_slice(&pixel[channel..][..len]);
                }
                _ => part.fill(0.0),
            }
            (patch, at) = (rest, at + len);
        }
    }
}
