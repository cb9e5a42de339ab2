//! Convolution of [b, h, w, c] as one product whose left side, im2col's, is gathered from the image
//! as it is needed; by [`super::winograd`] where that is faster.

use super::gemm::{Epilogue, Left, gemm, slice, with_slice};
use super::panels::{Panels, Right, WIDTH};
use super::tiles::{ROWS, TERMS, Tiles};
use super::vector::Lanes;
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

    /// Where the pixel of an image at a stored row and column is among all.
    fn index(&self, image: usize, row: usize, column: usize) -> usize {
        (image * self.rows + row) * self.columns + column
    }

    /// The pixel [c] of an image at a stored row and column.
    pub fn pixel(&self, image: usize, row: usize, column: usize) -> &'a [f32] {
        &self.x[self.index(image, row, column) * self.c..][..self.c]
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
    /// the unit that multiplies, if it is not the vectors'
    pub tiles: Option<Tiles>,
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
            if self.tiles.is_none_or(|tiles| !tiles.beats_winograd())
                && self.is_winograd()
                && winograd::pays(self.rows.len(), w)
            {
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
        // every pixel is seen by several others, and made to rows of tiles once
        let lines = match self.tiles {
            Some(tiles) if self.size > self.stride && images.c.is_multiple_of(TERMS) => {
                Some((tiles.parts(), tiles.lines_of(images.x)))
            }
            _ => None,
        };
        let left = Im2col {
            conv: self,
            images,
            sides: (h, w),
            lines,
        };
        gemm(shape, left, Right::Panels(weight), epilogue, self.tiles)
    }
}

/// Rows of im2col: the pixels [size, size, c] that an output pixel sees.
struct Im2col<'a> {
    conv: &'a Conv2d,
    images: Images<'a>,
    /// height and width of the output
    sides: (usize, usize),
    /// each pixel as rows of tiles [c/32, parts], and the parts
    lines: Option<(usize, Vec<Lanes>)>,
}

impl Im2col<'_> {
    /// Calls `each` with the runs of terms that come from one pixel: where the pixel is among all,
    /// if it is not padding, and a range of its channels.
    #[inline(always)]
    fn runs(
        &self,
        pixel: usize,
        terms: Range<usize>,
        mut each: impl FnMut(Option<usize>, Range<usize>),
    ) {
        let Self {
            conv,
            images,
            sides: (h, w),
            ..
        } = self;
        let (image, oy, ox) = (pixel / (h * w), conv.rows.start + pixel / w % h, pixel % w);
        let c = images.c;
        let mut at = terms.start;
        while at < terms.end {
            let (tap, channel) = (at / c, at % c);
            let len = (c - channel).min(terms.end - at);
            let (y, x) = (
                oy * conv.stride + tap / conv.size,
                ox * conv.stride + tap % conv.size,
            );
            let row = images.row(y, conv.padding.0);
            let column = images.column(x, conv.padding.0);
            let seen = row
                .zip(column)
                .map(|(row, column)| images.index(image, row, column));
            each(seen, channel..channel + len);
            at += len;
        }
    }
}

impl Left for Im2col<'_> {
    #[inline(always)]
    fn row(&self, pixel: usize, terms: Range<usize>, patch: &mut [f32]) {
        let (c, mut patch) = (self.images.c, patch);
        self.runs(pixel, terms, |seen, channels| {
            let (part, rest) = std::mem::take(&mut patch).split_at_mut(channels.len());
            match seen {
                Some(seen) => part.copy_from_slice(&self.images.x[seen * c..][channels]),
                None => part.fill(0.0),
            }
            patch = rest;
        });
    }

    #[inline(always)]
    fn lines(&self, pixel: usize, terms: Range<usize>, to: &mut [Lanes]) -> bool {
        let Some((parts, lines)) = &self.lines else {
            return false;
        };
        let each = self.images.c / TERMS * parts;
        let mut rows = to.iter_mut().step_by(ROWS);
        self.runs(pixel, terms, |seen, channels| {
            let range = channels.start / TERMS * parts..channels.end / TERMS * parts;
            let count = range.len();
            match seen {
                Some(seen) => {
                    let lines = &lines[seen * each..][range];
                    lines
                        .iter()
                        .zip(rows.by_ref())
                        .for_each(|(line, row)| *row = *line);
                }
                None => rows
                    .by_ref()
                    .take(count)
                    .for_each(|row| *row = Lanes::default()),
            }
        });
        true
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::Pack;
    use super::super::tiles::every_unit;
    use super::*;
    use crate::nn::PaddingMode::{Circular, Zeros};
    use crate::nn::Precision;
    use crate::nn::testing::normal;

    #[test]
    fn convolutions_on_tiles_equal_those_of_vectors() {
        // channels of whole rows of tiles, which are made once, and others
        let cases = [
            (3, 1, (1, 1), 64, [Zeros; 2], None),
            (3, 1, (1, 1), 32, [Circular, Zeros], Some((14, 18))),
            (3, 2, (0, 1), 96, [Zeros, Circular], None),
            (3, 2, (1, 1), 35, [Circular; 2], None),
            (1, 1, (0, 0), 64, [Zeros; 2], None),
            (5, 1, (2, 2), 3, [Zeros; 2], Some((9, 8))),
        ];
        for (size, stride, padding, c, padding_modes, scaled) in cases {
            let (b, h, w, outputs) = (2, 7, 9, 37);
            let x = normal(0f32, 1.0, (b, h, w, c));
            let weight = normal(0f32, 0.3, (outputs, c, size, size));
            let weight = weight.apply_op1_no_bwd(&Pack { gated: false }).unwrap();
            let bias = normal(0f32, 1.0, (b, outputs));
            let height = scaled.map_or(h, |(height, _)| height);
            let height = (height + padding.0 + padding.1 - size) / stride + 1;
            let convolved = |tiles| {
                let op = Conv2d {
                    size,
                    stride,
                    padding,
                    padding_modes,
                    rows: 1..height,
                    scaled,
                    residual: None,
                    slope: None,
                    tiles,
                };
                let y = x.apply_op3_no_bwd(&weight, &bias, &op).unwrap();
                y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            let expected = convolved(None);
            let largest = expected.iter().fold(1f32, |most, x| most.max(x.abs()));
            for tiles in every_unit() {
                let tolerance = match tiles.precision {
                    Precision::F32 => 2e-5,
                    Precision::Bf16 => 1e-2,
                };
                let y = convolved(Some(tiles));
                assert_eq!(y.len(), expected.len());
                for (y, expected) in y.iter().zip(&expected) {
                    let off = (y - expected).abs() / largest;
                    assert!(off < tolerance, "{size} {stride} {c} {tiles:?}: {off:e}");
                }
            }
        }
    }
}
