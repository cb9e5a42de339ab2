//! Linear layers and convolutions: one kernel, an implicit GEMM.

use super::{CHUNK, Launch, Params, Work, int, processors, suffix};
use crate::nn::PaddingMode;
use candle_core::{Result, Shape, Tensor};
use std::ops::Range;

/// The largest number of rows or columns, which the kernel counts in 16 bits.
const MAX_SIDE: usize = 1 << 14;

/// Lays out weights [out, in, ..] as the kernel reads them: [out, .., in].
pub fn rows(weight: &Tensor) -> Result<Tensor> {
    match weight.rank() {
        4 => weight.permute((0, 2, 3, 1))?.contiguous(),
        _ => weight.contiguous(),
    }
}

/// Interleaves the two halves of the first dimension: first of the first, first of the second,
/// second of the first, ..
pub fn interleaved(x: &Tensor) -> Result<Tensor> {
    let n = x.dim(0)?;
    x.reshape((2, n / 2, ()))?
        .transpose(0, 1)?
        .contiguous()?
        .reshape(x.shape())
}

/// y = x w' and its epilogue: x is [b, h, w, in], of which a convolution gathers rows, and w is
/// [out, taps, in].
pub struct Gemm {
    pub x: Tensor,
    pub weight: Tensor,
    /// [out]: added
    pub bias: Option<Tensor>,
    /// [out] or [b, out], whose rows may stand apart: added
    pub shift: Option<Tensor>,
    /// [b, rows, w', out]: added
    pub residual: Option<Tensor>,
    /// [out]: the slope of a leaky ReLU
    pub slope: Option<Tensor>,
    /// GEGLU, for weights that are [`interleaved`]: the result is every other output times the exact
    /// GELU of the next.
    pub gated: bool,
    /// taps a side
    pub size: usize,
    pub stride: usize,
    /// rows and columns of padding before the image
    pub before: usize,
    /// (height, width) to which the input is scaled first
    pub scaled: (usize, usize),
    /// rows of the output that are computed
    pub rows: Range<usize>,
    pub out_width: usize,
    /// of rows and of columns
    pub padding_modes: [PaddingMode; 2],
}

impl Gemm {
    /// The product of a linear layer: x [rows, in], weight [out, in].
    pub fn linear(
        x: Tensor,
        weight: Tensor,
        bias: Option<Tensor>,
        residual: Option<Tensor>,
        gated: bool,
    ) -> Result<Self> {
        let (m, k) = x.dims2()?;
        let x = x.reshape((m, 1, 1, k))?;
        let (shift, slope, before, scaled) = (None, None, 0, (1, 1));
        Ok(Self {
            x,
            weight,
            bias,
            shift,
            residual,
            slope,
            gated,
            size: 1,
            stride: 1,
            before,
            scaled,
            rows: 0..1,
            out_width: 1,
            padding_modes: Default::default(),
        })
    }

    /// Sides m, n, k of the product.
    fn sides(&self) -> Result<(usize, usize, usize)> {
        Ok((
            self.x.dim(0)? * self.rows.len() * self.out_width,
            self.weight.dim(0)?,
            self.weight.elem_count() / self.weight.dim(0)?.max(1),
        ))
    }

    fn cut(&self) -> Result<Cut> {
        let (m, n, k) = self.sides()?;
        Ok(Cut::best(
            m,
            n,
            k * self.x.dtype().size_in_bytes(),
            processors(self.x.device()),
        ))
    }
}

/// How a product is cut for the multiprocessors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    /// side of a block's tile
    tile: usize,
    /// slices of k, summed in a second launch
    splits: usize,
}

impl Cut {
    /// Bytes of k that a tile is wide.
    const WIDTH: usize = 128;

    /// Chooses by a model of the time: that of the multiprocessor with most blocks, and of the
    /// partial sums' trip through memory.
    fn best(m: usize, n: usize, row_bytes: usize, processors: usize) -> Self {
        let steps = row_bytes.div_ceil(Self::WIDTH);
        let time = |cut: &Self| {
            let blocks = m.div_ceil(cut.tile) * n.div_ceil(cut.tile) * cut.splits;
            // microseconds for a step of a tile, alone on its multiprocessor; small tiles read more
            // for what they multiply
            let step = if cut.tile == 128 { 0.55 } else { 0.2 };
            let parts = if cut.splits > 1 {
                3.0 + (m * n * cut.splits) as f64 * 8.0 / 2e6
            } else {
                0.0
            };
            blocks.div_ceil(processors) as f64 * (steps.div_ceil(cut.splits) as f64 * step + 1.5)
                + parts
        };
        let cuts = [128, 64]
            .into_iter()
            .flat_map(|tile| [1, 2, 3, 4, 6, 8, 12, 16].map(|splits| Self { tile, splits }));
        let possible = cuts.filter(|cut| cut.splits == 1 || steps / cut.splits >= 4);
        possible
            .min_by(|a, b| time(a).total_cmp(&time(b)))
            .unwrap_or(Self {
                tile: 64,
                splits: 1,
            })
    }

    fn threads(self) -> usize {
        if self.tile == 128 { 256 } else { 128 }
    }

    /// Bytes of shared memory: stages of tiles of both factors, and what each row sees.
    fn shared(self) -> usize {
        let stages = if self.tile == 128 { 3 } else { 4 };
        stages * 2 * self.tile * Self::WIDTH + self.tile * 8
    }
}

/// As `struct Gemm` of gemm.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct GemmParams {
    x: u64,
    weight: u64,
    bias: u64,
    shift: u64,
    residual: u64,
    slope: u64,
    y: u64,
    parts: u64,
    m: i32,
    n: i32,
    k: i32,
    channels: i32,
    size: i32,
    stride: i32,
    before: i32,
    stored: [i32; 2],
    scaled: [i32; 2],
    first_row: i32,
    rows: i32,
    out_width: i32,
    circular: [i32; 2],
    per_shift: i32,
    shift_stride: i32,
    splits: i32,
    gated: i32,
    wide: i32,
    aligned: i32,
}

impl Work for Gemm {
    fn input(&self) -> &Tensor {
        &self.x
    }

    /// [b, rows, w', out], or half as many if gated.
    fn shape(&self) -> Result<Shape> {
        let outputs = self.weight.dim(0)?;
        Ok((
            self.x.dim(0)?,
            self.rows.len(),
            self.out_width,
            if self.gated { outputs / 2 } else { outputs },
        )
            .into())
    }

    fn scratch(&self) -> usize {
        match (self.sides(), self.cut()) {
            (Ok((m, n, _)), Ok(cut)) if cut.splits > 1 => cut.splits * m * n,
            _ => 0,
        }
    }

    fn launches(
        &self,
        address: &mut dyn FnMut(&Tensor) -> Result<u64>,
        output: u64,
        scratch: u64,
    ) -> Result<Vec<Launch>> {
        let (m, n, k) = self.sides()?;
        let cut = self.cut()?;
        let (b, h, w, channels) = self.x.dims4()?;
        if self.scaled.0.max(self.scaled.1) > MAX_SIDE {
            candle_core::bail!("an image of more than {MAX_SIDE} pixels a side");
        }
        let mut of = |x: &Option<Tensor>| x.as_ref().map_or(Ok(0), &mut *address);
        let [bias, shift, residual, slope] = [
            of(&self.bias)?,
            of(&self.shift)?,
            of(&self.residual)?,
            of(&self.slope)?,
        ];
        let (x, weight) = (address(&self.x)?, address(&self.weight)?);
        let chunk = CHUNK / self.x.dtype().size_in_bytes();
        let at_chunks = |addresses: &[u64]| addresses.iter().all(|at| at % CHUNK as u64 == 0);
        let outputs = if self.gated { n / 2 } else { n };
        let (per_shift, shift_stride) = match &self.shift {
            Some(shift) if shift.rank() == 2 => (m / b, shift.stride()[0]),
            _ => (m, 0),
        };
        let params = Params::new(&GemmParams {
            x,
            weight,
            bias,
            shift,
            residual,
            slope,
            y: output,
            parts: scratch,
            m: int(m)?,
            n: int(n)?,
            k: int(k)?,
            channels: int(channels)?,
            size: int(self.size)?,
            stride: int(self.stride)?,
            before: int(self.before)?,
            stored: [int(h)?, int(w)?],
            scaled: [int(self.scaled.0)?, int(self.scaled.1)?],
            first_row: int(self.rows.start)?,
            rows: int(self.rows.len())?,
            out_width: int(self.out_width)?,
            circular: self.padding_modes.map(|mode| mode.is_circular().into()),
            per_shift: int(per_shift)?,
            shift_stride: int(shift_stride)?,
            splits: int(cut.splits)?,
            gated: self.gated.into(),
            wide: (channels.is_multiple_of(chunk) && at_chunks(&[x, weight])).into(),
            aligned: (outputs.is_multiple_of(chunk)
                && shift_stride.is_multiple_of(chunk)
                && at_chunks(&[bias, shift, residual, output]))
            .into(),
        });
        let suffix = suffix(self.x.dtype())?;
        let grid = [n.div_ceil(cut.tile) * m.div_ceil(cut.tile), cut.splits];
        let mut launches = vec![Launch {
            kernel: format!("gemm_{}_{suffix}", cut.tile),
            grid,
            threads: cut.threads(),
            shared: cut.shared(),
            params,
        }];
        if cut.splits > 1 {
            let chunks = m * n.div_ceil(if self.gated { 2 * chunk } else { chunk });
            let kernel = format!("gemm_parts_{suffix}");
            launches.push(Launch {
                kernel,
                grid: [chunks.div_ceil(256), 1],
                threads: 256,
                shared: 0,
                params,
            });
        }
        Ok(launches)
    }
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::emulated::{random, same, wide};
    use super::*;
    use crate::nn::plain;
    use candle_core::DType;

    #[test]
    fn products_are_cut_for_all_multiprocessors() {
        // SD1.5 at 512x512, guided: its widest level fills them, its narrowest is split
        assert_eq!(Cut::best(8192, 320, 2 * 2880, 132).splits, 1);
        assert!(Cut::best(128, 1280, 2 * 11520, 132).splits > 2);
        for (m, n, k) in [
            (1, 320, 1280),
            (154, 768, 768),
            (8192, 2560, 320),
            (131_072, 320, 2880),
        ] {
            let cut = Cut::best(m, n, 2 * k, 132);
            assert!(cut.splits <= (2 * k).div_ceil(Cut::WIDTH), "{cut:?}");
        }
    }

    #[test]
    fn the_gemm_kernel_equals_its_plain_composition() {
        for dtype in [DType::F16, DType::BF16, DType::F32] {
            for (m, k, n) in [
                (1, 8, 8),
                (3, 77, 6),
                (65, 40, 130),
                (130, 72, 264),
                (20, 1032, 48),
                (5, 640, 14),
            ] {
                let (x, weight) = (random(&[m, k], dtype), random(&[n, k], dtype));
                let (bias, residual) = (random(&[n], dtype), random(&[m, n], dtype));
                for (bias, residual, gated) in [
                    (None, None, false),
                    (Some(&bias), Some(&residual), false),
                    (Some(&bias), None, true),
                    (None, Some(&residual), false),
                ] {
                    let plain = plain::gemm(
                        &wide(&x),
                        &wide(&weight),
                        bias.map(wide).as_ref(),
                        residual.map(wide).as_ref(),
                        gated,
                    );
                    let turned = |x: &Tensor| {
                        if gated {
                            interleaved(x).unwrap()
                        } else {
                            x.clone()
                        }
                    };
                    let gemm = Gemm::linear(
                        x.clone(),
                        turned(&weight),
                        bias.map(turned),
                        residual.cloned(),
                        gated,
                    )
                    .unwrap();
                    let cut = gemm.cut().unwrap();
                    same(
                        &super::super::run(gemm).unwrap(),
                        &plain.unwrap(),
                        &format!("{m}x{k}x{n} {dtype:?} {gated} {cut:?}"),
                    );
                }
            }
        }
    }

    #[test]
    fn the_gemm_kernel_convolves_as_its_plain_composition_does() {
        // channels, outputs, height and width, taps a side, stride, padding, scaled height and
        // width, rows
        let cases = [
            (8, 24, (5, 7), 3, 1, (1, 1), None, None),
            (4, 40, (6, 6), 3, 1, (1, 1), None, None),
            (40, 4, (9, 3), 3, 1, (1, 1), None, Some(2..7)),
            (72, 16, (8, 8), 3, 2, (1, 1), None, None),
            (16, 9, (7, 8), 3, 2, (0, 1), None, None),
            (24, 136, (4, 5), 1, 1, (0, 0), None, None),
            (16, 8, (3, 4), 3, 1, (1, 1), Some((6, 8)), None),
            (8, 16, (4, 3), 3, 1, (1, 1), Some((7, 5)), Some(1..4)),
            (3, 5, (6, 5), 5, 1, (2, 2), None, None),
            (1032, 8, (2, 2), 3, 1, (1, 1), None, None),
        ];
        for (i, (channels, n, (h, w), size, stride, padding, scaled, rows)) in
            cases.into_iter().enumerate()
        {
            for dtype in [DType::F16, DType::BF16, DType::F32] {
                let padding_modes = [i % 2 == 1, i % 3 == 1].map(|is_circular| {
                    if is_circular {
                        PaddingMode::Circular
                    } else {
                        PaddingMode::Zeros
                    }
                });
                let b = 2;
                let (x, weight) = (
                    random(&[b, h, w, channels], dtype),
                    random(&[n, channels, size, size], dtype),
                );
                let (height, width) = scaled.unwrap_or((h, w));
                let plain = plain::conv2d(
                    &plain::scale_nearest(&wide(&x), height, width).unwrap(),
                    &wide(&weight),
                    stride,
                    padding,
                    padding_modes,
                )
                .unwrap();
                let rows = rows.clone().unwrap_or(0..plain.dim(1).unwrap());
                let plain = plain.narrow(1, rows.start, rows.len()).unwrap();
                let (bias, slope, residual) = (
                    random(&[n], dtype),
                    random(&[n], dtype),
                    random(plain.dims(), dtype),
                );
                let shift = if i % 2 == 0 {
                    random(&[b, n], dtype)
                } else {
                    random(&[n], dtype)
                };
                let each = wide(&shift)
                    .broadcast_as((b, n))
                    .unwrap()
                    .reshape((b, 1, 1, n))
                    .unwrap();
                let plain = plain
                    .broadcast_add(&wide(&bias))
                    .unwrap()
                    .broadcast_add(&each)
                    .unwrap();
                let plain =
                    plain::leaky_relu(&(plain + wide(&residual)).unwrap(), &wide(&slope)).unwrap();
                let gemm = Gemm {
                    x,
                    weight: super::rows(&weight).unwrap(),
                    bias: Some(bias),
                    shift: Some(shift),
                    residual: Some(residual),
                    slope: Some(slope),
                    gated: false,
                    size,
                    stride,
                    before: padding.0,
                    scaled: (height, width),
                    rows,
                    out_width: plain.dim(2).unwrap(),
                    padding_modes,
                };
                let cut = gemm.cut().unwrap();
                same(
                    &super::super::run(gemm).unwrap(),
                    &plain,
                    &format!("case {i} {dtype:?} {cut:?}"),
                );
            }
        }
    }
}
