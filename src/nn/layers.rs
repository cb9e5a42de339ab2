//! Linear, convolution, normalisation and activation layers.

use super::{Backend, Forward, PaddingMode, cpu, gpu};
use crate::weights::Weights;
use anyhow::{Result, bail};
use candle_core::{D, DType, Module, Result as TensorResult, Tensor};
use std::ops::Range;

/// The weights of a product in the layout that their device wants.
enum WeightLayout {
    /// CPU: in panels, by [`cpu::Pack`]
    Packed(Tensor),
    /// GPU: [out, .., in], and gated rows in turn
    Rows(Tensor),
    /// others: as checkpoints store them, [out, in, ..]
    Plain(Tensor),
}

impl WeightLayout {
    fn new(w: &Weights, shape: &[usize], gated: bool) -> Result<Self> {
        Ok(Self::of(w.backend(), &Self::read(w, shape)?, gated)?)
    }

    fn read(w: &Weights, shape: &[usize]) -> Result<Tensor> {
        if w.backend() == Backend::Cpu {
            w.get_stored("weight", shape)
        } else {
            w.get("weight", shape)
        }
    }

    fn of(backend: Backend, weight: &Tensor, gated: bool) -> TensorResult<Self> {
        match backend {
            Backend::Cpu => Self::pack(weight, gated),
            // candle's own, through cuDNN
            Backend::Gpu if cfg!(feature = "cudnn") && weight.rank() == 4 => {
                Ok(Self::Plain(weight.clone()))
            }
            Backend::Gpu if gated => Ok(Self::Rows(gpu::interleaved(weight)?)),
            Backend::Gpu => Ok(Self::Rows(gpu::rows(weight)?)),
            Backend::Plain => Ok(Self::Plain(weight.clone())),
        }
    }

    fn pack(weight: &Tensor, gated: bool) -> TensorResult<Self> {
        Ok(Self::Packed(
            weight
                .contiguous()?
                .apply_op1_no_bwd(&cpu::Pack { gated })?,
        ))
    }
}

/// y = x W' + b over the last dimension.
pub struct Linear {
    weight: WeightLayout,
    bias: Option<Tensor>,
    inputs: usize,
    outputs: usize,
    /// Whether the first half of the outputs times the exact GELU of the second is what comes out.
    gated: bool,
}

impl Linear {
    /// Reads `weight` [out, in] and `bias` [out].
    pub fn new(w: &Weights, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self {
            bias: Some(w.get("bias", &[outputs])?),
            ..Self::without_bias(w, inputs, outputs)?
        })
    }

    /// Reads `weight` [out, in] alone.
    pub fn without_bias(w: &Weights, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self {
            weight: WeightLayout::new(w, &[outputs, inputs], false)?,
            bias: None,
            inputs,
            outputs,
            gated: false,
        })
    }

    /// Several layers that take the same: their outputs next to each other. Reads `weight` [out,
    /// in] of each place, and `bias` [out] if they have one.
    pub fn joined(layers: &[(Weights, usize)], inputs: usize, biased: bool) -> Result<Self> {
        let each = |read: &dyn Fn(&Weights, usize) -> Result<Tensor>| {
            layers
                .iter()
                .map(|(w, outputs)| read(w, *outputs))
                .collect::<Result<Vec<_>>>()
        };
        let mut weights = each(&|w, outputs| WeightLayout::read(w, &[outputs, inputs]))?;
        // files may hold some narrower than others
        if weights
            .iter()
            .any(|weight| weight.dtype() != weights[0].dtype())
        {
            weights = weights
                .iter()
                .map(|weight| weight.to_dtype(DType::F32))
                .collect::<TensorResult<_>>()?;
        }
        let bias = biased
            .then(|| {
                Ok::<_, anyhow::Error>(Tensor::cat(
                    &each(&|w, outputs| w.get("bias", &[outputs]))?,
                    0,
                )?)
            })
            .transpose()?;
        let backend = layers.first().map_or(Backend::Plain, |(w, _)| w.backend());
        let weight = WeightLayout::of(backend, &Tensor::cat(&weights, 0)?, false)?;
        Ok(Self {
            weight,
            bias,
            inputs,
            outputs: layers.iter().map(|(_, outputs)| outputs).sum(),
            gated: false,
        })
    }

    /// Reads `weight` [2*out, in] and `bias` [2*out] of a gated linear unit (Shazeer 2020, arXiv
    /// 2002.05202): the first half of what they give times the exact GELU of the second.
    pub fn geglu(w: &Weights, inputs: usize, outputs: usize) -> Result<Self> {
        let (weight, bias) = (
            WeightLayout::new(w, &[2 * outputs, inputs], true)?,
            w.get("bias", &[2 * outputs])?,
        );
        let bias = if let WeightLayout::Rows(_) = weight {
            gpu::interleaved(&bias)?
        } else {
            bias
        };
        Ok(Self {
            weight,
            bias: Some(bias),
            inputs,
            outputs: 2 * outputs,
            gated: true,
        })
    }

    /// Width of what it takes.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// [.., in] -> [.., out].
    pub fn forward(&self, cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
        self.apply(cx, x, None)
    }

    /// [.., in] -> [.., out], plus `residual` of that many elements.
    pub fn forward_add(&self, cx: Forward, x: &Tensor, residual: &Tensor) -> TensorResult<Tensor> {
        self.apply(cx, x, Some(residual))
    }

    fn apply(&self, cx: Forward, x: &Tensor, residual: Option<&Tensor>) -> TensorResult<Tensor> {
        let mut shape = x.dims().to_vec();
        let flat = x.reshape(((), self.inputs))?; // [rows, in]
        let residual = residual
            .map(|r| r.reshape(((), self.outputs))?.contiguous())
            .transpose()?;
        let sides = [flat.dim(0)?, self.inputs, self.outputs];
        let y = cx.timed("linear", sides, || self.gemm(&flat, residual))?; // [rows, out]
        if let Some(last) = shape.last_mut() {
            *last = y.dim(1)?;
        }
        y.reshape(shape)
    }

    /// [rows, in], perhaps residual [rows, out] -> [rows, out].
    fn gemm(&self, x: &Tensor, residual: Option<Tensor>) -> TensorResult<Tensor> {
        match &self.weight {
            WeightLayout::Packed(weight) => {
                let op = cpu::Gemm {
                    outputs: self.outputs,
                    bias: self.bias.clone(),
                    residual,
                    gated: self.gated,
                };
                x.contiguous()?.apply_op2_no_bwd(weight, &op)
            }
            WeightLayout::Rows(weight) => {
                let gemm = gpu::Gemm::linear(
                    x.contiguous()?,
                    weight.clone(),
                    self.bias.clone(),
                    residual,
                    self.gated,
                )?;
                gpu::run(gemm)?.flatten_to(2)
            }
            WeightLayout::Plain(weight) => {
                gemm_plain(x, weight, self.bias.as_ref(), residual.as_ref(), self.gated)
            }
        }
    }
}

/// x [m, k] times weight [n, k], plus bias [n], plus residual [m, n], as a composition of candle's
/// operations: the path of devices without a kernel, and its oracle. With `gated`, [m, n/2].
pub(super) fn gemm_plain(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    gated: bool,
) -> TensorResult<Tensor> {
    let mut y = x.matmul(&weight.t()?)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    if let Some(residual) = residual {
        y = (y + residual)?;
    }
    if !gated {
        return Ok(y);
    }
    let halves = y.chunk(2, D::Minus1)?;
    let [x, gate] = halves.as_slice() else {
        candle_core::bail!("an odd width cannot be halved")
    };
    x * gate.gelu_erf()?
}

/// What a convolution does besides.
#[derive(Default)]
struct Extra<'a> {
    /// (height, width) to which the input is scaled first
    scaled: Option<(usize, usize)>,
    /// the rows of the output that are wanted: all, if none are named
    rows: Option<Range<usize>>,
    /// [out]: added everywhere, or [b, out]
    shift: Option<&'a Tensor>,
    /// [b, rows, w', out]: added
    residual: Option<&'a Tensor>,
}

/// A 2D convolution over [b, h, w, c].
pub struct Conv2d {
    weight: WeightLayout,
    bias: Tensor,
    /// [out]: what is below 0 is multiplied by it
    slope: Option<Tensor>,
    size: usize,
    stride: usize,
    /// what is added, zeros or the other end: (before, after) in both directions
    padding: (usize, usize),
}

impl Conv2d {
    /// Reads `weight` [out, in, k, k] and `bias` [out]; stride 1, and padding that keeps height and
    /// width.
    pub fn new(w: &Weights, inputs: usize, outputs: usize, size: usize) -> Result<Self> {
        Self::strided(w, inputs, outputs, size, 1, (size / 2, size / 2))
    }

    /// Reads `weight` and `bias`; stride and padding (before, after) as given.
    pub fn strided(
        w: &Weights,
        inputs: usize,
        outputs: usize,
        size: usize,
        stride: usize,
        padding: (usize, usize),
    ) -> Result<Self> {
        let weight = WeightLayout::new(w, &[outputs, inputs, size, size], false)?;
        let bias = w.get("bias", &[outputs])?;
        Ok(Self {
            weight,
            bias,
            slope: None,
            size,
            stride,
            padding,
        })
    }

    /// Reads `weight` [out, in, 3, 3] alone; padding that keeps height and width, but for the
    /// stride.
    pub fn without_bias(w: &Weights, inputs: usize, outputs: usize, stride: usize) -> Result<Self> {
        let weight = WeightLayout::new(w, &[outputs, inputs, 3, 3], false)?;
        Ok(Self {
            weight,
            bias: w.zeros(&[outputs])?,
            slope: None,
            size: 3,
            stride,
            padding: (1, 1),
        })
    }

    /// The same convolution, after which all that is below 0 is multiplied by a slope [out] (leaky
    /// ReLU and PReLU, He et al. 2015, arXiv 1502.01852), in the same pass where the device can.
    pub fn leaky(self, slope: Tensor) -> Self {
        Self {
            slope: Some(slope),
            ..self
        }
    }

    /// Reads `weight` and `bias` of a convolution whose result is multiplied by `factor`; padding
    /// that keeps height and width.
    pub fn times(
        w: &Weights,
        inputs: usize,
        outputs: usize,
        size: usize,
        factor: f64,
    ) -> Result<Self> {
        let (weight, bias) = (
            (w.get("weight", &[outputs, inputs, size, size])? * factor)?,
            (w.get("bias", &[outputs])? * factor)?,
        );
        let weight = WeightLayout::of(w.backend(), &weight, false)?;
        Ok(Self {
            weight,
            bias,
            slope: None,
            size,
            stride: 1,
            padding: (size / 2, size / 2),
        })
    }

    /// [b, h, w, in] -> [b, h', w', out].
    pub fn forward(&self, cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
        self.forward_add(cx, x, None, None)
    }

    /// [b, h, w, in] -> [b, h', w', out], plus `shift` [out] everywhere or [b, out] for each
    /// picture, plus `residual` [b, h', w', out].
    pub fn forward_add(
        &self,
        cx: Forward,
        x: &Tensor,
        shift: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> TensorResult<Tensor> {
        self.run(
            cx,
            x,
            Extra {
                shift,
                residual,
                ..Extra::default()
            },
        )
    }

    /// The same of x scaled to `height` x `width`, each pixel from the nearest one before it.
    pub fn forward_scaled(
        &self,
        cx: Forward,
        x: &Tensor,
        height: usize,
        width: usize,
    ) -> TensorResult<Tensor> {
        self.run(
            cx,
            x,
            Extra {
                scaled: Some((height, width)),
                ..Extra::default()
            },
        )
    }

    /// What x [b, h, w, in] gives for `rows` of the output alone, plus `residual` [b, rows, w',
    /// out].
    pub fn forward_rows(
        &self,
        cx: Forward,
        x: &Tensor,
        rows: Range<usize>,
        residual: Option<&Tensor>,
    ) -> TensorResult<Tensor> {
        self.run(
            cx,
            x,
            Extra {
                rows: Some(rows),
                residual,
                ..Extra::default()
            },
        )
    }

    /// The same of x scaled to twice its height and width.
    pub fn forward_rows_doubled(
        &self,
        cx: Forward,
        x: &Tensor,
        rows: Range<usize>,
    ) -> TensorResult<Tensor> {
        let (_, h, w, _) = x.dims4()?;
        self.run(
            cx,
            x,
            Extra {
                rows: Some(rows),
                scaled: Some((2 * h, 2 * w)),
                ..Extra::default()
            },
        )
    }

    fn run(&self, cx: Forward, x: &Tensor, extra: Extra) -> TensorResult<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let (h, w) = extra.scaled.unwrap_or((h, w));
        let out = |n: usize| {
            (n + self.padding.0 + self.padding.1 + self.stride).saturating_sub(self.size)
                / self.stride
        };
        let rows = extra.rows.clone().unwrap_or(0..out(h));
        let kind = ["convolution", "convolution 3x3"][usize::from(self.size == 3)];
        let sides = [
            b * rows.len() * out(w),
            self.size * self.size * c,
            self.bias.dim(0)?,
        ];
        cx.timed(kind, sides, || {
            self.apply(cx.padding, x, rows, out(w), extra)
        })
    }

    fn apply(
        &self,
        padding_modes: [PaddingMode; 2],
        x: &Tensor,
        rows: Range<usize>,
        out_width: usize,
        Extra {
            scaled,
            shift,
            residual,
            ..
        }: Extra,
    ) -> TensorResult<Tensor> {
        let (size, stride, padding) = (self.size, self.stride, self.padding);
        let residual = residual.map(Tensor::contiguous).transpose()?;
        let bias = || {
            shift.map_or(Ok(self.bias.clone()), |shift| {
                shift.broadcast_add(&self.bias)
            })
        };
        match &self.weight {
            WeightLayout::Packed(weight) => {
                let op = cpu::Conv2d {
                    size,
                    stride,
                    padding,
                    padding_modes,
                    rows,
                    scaled,
                    residual,
                    slope: self.slope.clone(),
                };
                x.contiguous()?.apply_op3_no_bwd(weight, &bias()?, &op)
            }
            WeightLayout::Rows(weight) => {
                let gemm = gpu::Gemm {
                    x: x.contiguous()?,
                    weight: weight.clone(),
                    bias: Some(self.bias.clone()),
                    shift: shift.cloned(),
                    residual,
                    slope: self.slope.clone(),
                    gated: false,
                    size,
                    stride,
                    before: padding.0,
                    scaled: scaled.unwrap_or((x.dim(1)?, x.dim(2)?)),
                    rows,
                    out_width,
                    padding_modes,
                };
                gpu::run(gemm)
            }
            WeightLayout::Plain(weight) => {
                let bias = bias()?;
                let scaled = scaled
                    .map(|(height, width)| scale_plain(x, height, width))
                    .transpose()?;
                let y = conv2d_plain(
                    scaled.as_ref().unwrap_or(x),
                    weight,
                    stride,
                    padding,
                    padding_modes,
                )?;
                let bias = if bias.rank() == 2 {
                    bias.reshape((bias.dim(0)?, 1, 1, bias.dim(1)?))?
                } else {
                    bias
                };
                let y = y.narrow(1, rows.start, rows.len())?.broadcast_add(&bias)?;
                let y = residual.map_or(Ok(y.clone()), |residual| y + residual)?;
                self.slope
                    .as_ref()
                    .map_or(Ok(y.clone()), |slope| leaky_plain(&y, slope))
            }
        }
    }
}

/// What candle's convolution lays out at once at most, in numbers: of each pixel of the result all
/// that the weights see there. Its kernels count them in 32 bits, and a picture of 1024x1024 pixels
/// would need 10 GB of them in the VAE.
const MAX_UNFOLDED: usize = 1 << 28;

/// The same by candle's own convolution: the path of devices without a kernel, and its oracle.
/// Weight [out, in, k, k].
pub(super) fn conv2d_plain(
    x: &Tensor,
    weight: &Tensor,
    stride: usize,
    padding: (usize, usize),
    padding_modes: [PaddingMode; 2],
) -> TensorResult<Tensor> {
    conv2d_in_parts(x, weight, stride, padding, padding_modes, MAX_UNFOLDED)
}

/// In parts of rows that lay out at most so many numbers, if one row does.
fn conv2d_in_parts(
    x: &Tensor,
    weight: &Tensor,
    stride: usize,
    padding: (usize, usize),
    padding_modes: [PaddingMode; 2],
    unfolded: usize,
) -> TensorResult<Tensor> {
    let ((b, h, w, c), size) = (x.dims4()?, weight.dim(3)?);
    let out = |n: usize| (n + padding.0 + padding.1 + stride).saturating_sub(size) / stride;
    let rows = (unfolded / (b * out(w) * c * size * size).max(1)).clamp(1, out(h).max(1));
    let is_plain =
        padding.0 == padding.1 && padding_modes == [PaddingMode::Zeros; 2] && rows >= out(h);
    let (x, padding) = if is_plain {
        (x.clone(), padding.0)
    } else {
        (pad(x, padding, padding_modes)?, 0)
    };
    let x = x.permute((0, 3, 1, 2))?.contiguous()?; // [b, in, h, w]
    let part = |top: usize| {
        let seen = || {
            x.narrow(
                2,
                top * stride,
                (rows.min(out(h) - top) - 1) * stride + size,
            )?
            .contiguous()
        };
        if is_plain { x.clone() } else { seen()? }.conv2d(weight, padding, stride, 1, 1)
    };
    let parts = (0..out(h))
        .step_by(rows)
        .map(part)
        .collect::<TensorResult<Vec<_>>>()?;
    Tensor::cat(&parts, 2)?.permute((0, 2, 3, 1))?.contiguous() // [b, h', w', out]
}

/// [.., c] with what is below 0 times slopes [c].
pub(super) fn leaky_plain(x: &Tensor, slope: &Tensor) -> TensorResult<Tensor> {
    x.relu()? + x.minimum(0.0)?.broadcast_mul(slope)?
}

/// Pads rows and columns of [b, h, w, c].
fn pad(
    x: &Tensor,
    (before, after): (usize, usize),
    modes: [PaddingMode; 2],
) -> TensorResult<Tensor> {
    let mut x = x.contiguous()?;
    for (dim, mode) in [1, 2].into_iter().zip(modes) {
        let n = x.dim(dim)?;
        x = if mode.is_circular() {
            let from = (0..before + n + after).map(|i| ((i + before * (n - 1)) % n) as u32);
            x.index_select(&Tensor::from_iter(from, x.device())?, dim)?
        } else {
            x.pad_with_zeros(dim, before, after)?
        };
    }
    x.contiguous()
}

/// Group normalisation over [b, h, w, c], optionally followed by SiLU (Wu & He 2018, arXiv
/// 1803.08494).
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// Reads `weight` and `bias` [channels]. Errors if the groups do not divide the channels.
    pub fn new(w: &Weights, groups: usize, channels: usize, eps: f64) -> Result<Self> {
        if groups == 0 || !channels.is_multiple_of(groups) {
            bail!("norm_num_groups {groups} does not divide {channels} channels");
        }
        Ok(Self {
            weight: w.get("weight", &[channels])?,
            bias: w.get("bias", &[channels])?,
            groups,
            eps,
        })
    }

    /// Normalises [b, h, w, c].
    pub fn forward(&self, cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
        self.apply(cx, x, false)
    }

    /// Normalises and applies `activation`, in one pass where the device can.
    pub fn forward_act(
        &self,
        cx: Forward,
        x: &Tensor,
        activation: Activation,
    ) -> TensorResult<Tensor> {
        match activation {
            Activation::Silu => self.apply(cx, x, true),
            other => other.forward(&self.apply(cx, x, false)?),
        }
    }

    fn apply(&self, cx: Forward, x: &Tensor, silu: bool) -> TensorResult<Tensor> {
        let x = x.contiguous()?;
        self.bind(cx, &[&x])?.apply(&x, None, None, silu)
    }

    /// Computes the statistics of an image, which may be in several bands from top to bottom: [b,
    /// rows, w, c] each, contiguous.
    pub fn bind<'a>(
        &'a self,
        cx: Forward<'a>,
        parts: &[&Tensor],
    ) -> TensorResult<BoundGroupNorm<'a>> {
        let Some(first) = parts.first() else {
            candle_core::bail!("the image has no bands")
        };
        let sides = [parts.iter().map(|x| x.elem_count()).sum(), 0, 0];
        let statistics = cx.timed("group norm", sides, || match cx.backend {
            Backend::Cpu => {
                let norm = cpu::GroupNorm {
                    groups: self.groups,
                    eps: self.eps,
                };
                norm.statistics(parts, &self.weight, &self.bias)
                    .map(Statistics::Cpu)
            }
            Backend::Gpu => {
                // a copy, as a view would keep the whole part
                let origin = if let [whole] = parts {
                    (*whole).clone()
                } else {
                    first.narrow(1, 0, 1)?.narrow(2, 0, 1)?.force_contiguous()?
                };
                let sums = |x: &&Tensor| {
                    gpu::run(gpu::GroupSums {
                        x: (*x).clone(),
                        origin: origin.clone(),
                        groups: self.groups,
                    })
                };
                let sums = Tensor::cat(
                    &parts.iter().map(sums).collect::<TensorResult<Vec<_>>>()?,
                    1,
                )?;
                let pixels = parts
                    .iter()
                    .map(|x| Ok(x.dim(1)? * x.dim(2)?))
                    .sum::<TensorResult<usize>>()?;
                Ok(Statistics::Gpu {
                    sums,
                    origin,
                    pixels,
                })
            }
            Backend::Plain => Ok(Statistics::Unknown),
        })?;
        Ok(BoundGroupNorm {
            norm: self,
            cx,
            statistics,
        })
    }
}

/// A group norm with the statistics of a batch of images.
pub struct BoundGroupNorm<'a> {
    norm: &'a GroupNorm,
    cx: Forward<'a>,
    statistics: Statistics,
}

enum Statistics {
    Cpu(Vec<cpu::Affine>),
    /// see [`gpu::GroupSums`]
    Gpu {
        sums: Tensor,
        origin: Tensor,
        pixels: usize,
    },
    /// computed when the image is normalised, which is then a whole one
    Unknown,
}

impl BoundGroupNorm<'_> {
    /// Normalises rows of the image with their halo, and applies `activation`: [b, rows, w, c],
    /// perhaps [b, above, w, c] and [b, below, w, c] -> [b, above + rows + below, w, c].
    pub fn forward_act(
        &self,
        x: &Tensor,
        above: Option<&Tensor>,
        below: Option<&Tensor>,
        activation: Activation,
    ) -> TensorResult<Tensor> {
        match activation {
            Activation::Silu => self.apply(x, above, below, true),
            other => other.forward(&self.apply(x, above, below, false)?),
        }
    }

    fn apply(
        &self,
        x: &Tensor,
        above: Option<&Tensor>,
        below: Option<&Tensor>,
        silu: bool,
    ) -> TensorResult<Tensor> {
        self.cx.timed("normalise", [x.elem_count(), 0, 0], || {
            let GroupNorm {
                weight,
                bias,
                groups,
                eps,
            } = self.norm;
            match &self.statistics {
                Statistics::Cpu(affine) => x.apply_op1_no_bwd(&cpu::Normalise {
                    affine,
                    silu,
                    above,
                    below,
                }),
                Statistics::Gpu {
                    sums,
                    origin,
                    pixels,
                } => {
                    let parts: Vec<&Tensor> = above.into_iter().chain([x]).chain(below).collect();
                    let x = Tensor::cat(&parts, 1)?;
                    let (sums, origin, weight, bias) =
                        (sums.clone(), origin.clone(), weight.clone(), bias.clone());
                    gpu::run(gpu::GroupApply {
                        x,
                        origin,
                        sums,
                        weight,
                        bias,
                        pixels: *pixels,
                        eps: *eps,
                        silu,
                    })
                }
                Statistics::Unknown => {
                    let y = group_norm_plain(x, weight, bias, *groups, *eps)?;
                    if silu {
                        candle_nn::ops::silu(&y)
                    } else {
                        Ok(y)
                    }
                }
            }
        })
    }
}

/// Group normalisation as a composition of candle's operations: the path of devices without a
/// kernel, and its oracle.
pub(super) fn group_norm_plain(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
) -> TensorResult<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let dtype = x.dtype();
    let x = x
        .to_dtype(candle_core::DType::F32)?
        .reshape((b, h * w, groups, c / groups))?;
    let mean = x.mean_keepdim(3)?.mean_keepdim(1)?; // [b, 1, groups, 1]
    let x = x.broadcast_sub(&mean)?;
    let variance = x.sqr()?.mean_keepdim(3)?.mean_keepdim(1)?;
    let x = x
        .broadcast_div(&(variance + eps)?.sqrt()?)?
        .reshape((b, h, w, c))?
        .to_dtype(dtype)?;
    x.broadcast_mul(weight)?.broadcast_add(bias)
}

/// Layer normalisation over the last dimension (Ba et al. 2016).
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Reads `weight` and `bias` [width].
    pub fn new(w: &Weights, width: usize, eps: f64) -> Result<Self> {
        Ok(Self {
            weight: w.get("weight", &[width])?,
            bias: w.get("bias", &[width])?,
            eps,
        })
    }

    /// Normalises [.., width].
    pub fn forward(&self, cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
        cx.timed("layer norm", [x.elem_count(), 0, 0], || {
            let Self { weight, bias, eps } = self;
            match cx.backend {
                Backend::Cpu => {
                    x.contiguous()?
                        .apply_op3_no_bwd(weight, bias, &cpu::LayerNorm { eps: *eps })
                }
                Backend::Gpu => gpu::run(gpu::LayerNorm {
                    x: x.contiguous()?,
                    weight: weight.clone(),
                    bias: bias.clone(),
                    eps: *eps,
                }),
                Backend::Plain => layer_norm_plain(x, weight, bias, *eps),
            }
        })
    }
}

/// The same by candle's own: the path of devices without a kernel, and its oracle.
pub(super) fn layer_norm_plain(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> TensorResult<Tensor> {
    candle_nn::LayerNorm::new(weight.clone(), bias.clone(), eps).forward(x)
}

/// The nonlinearities that configurations name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// exact, by the error function
    Gelu,
    /// x sigmoid(1.702 x), of OpenAI's CLIP
    QuickGelu,
    Relu,
    Mish,
}

impl Activation {
    /// By its name in a configuration.
    pub fn named(name: &str, key: &str) -> Result<Self> {
        Ok(match name {
            "silu" | "swish" => Self::Silu,
            "gelu" => Self::Gelu,
            "quick_gelu" => Self::QuickGelu,
            "relu" => Self::Relu,
            "mish" => Self::Mish,
            other => bail!(
                "`{key}` is `{other}`, which sdgen does not know\n\nhint: silu, gelu, quick_gelu, relu and mish are supported"
            ),
        })
    }

    /// Element by element.
    pub fn forward(self, x: &Tensor) -> TensorResult<Tensor> {
        match self {
            Self::Silu => candle_nn::ops::silu(x),
            Self::Gelu => x.gelu_erf(),
            Self::QuickGelu => x * candle_nn::ops::sigmoid(&(x * 1.702)?)?,
            Self::Relu => x.relu(),
            Self::Mish => candle_nn::ops::mish(x),
        }
    }
}

/// Nearest-neighbour scaling of [b, h, w, c] to `height` x `width` as a composition of candle's
/// operations: the path of devices without a kernel, and its oracle.
pub(super) fn scale_plain(x: &Tensor, height: usize, width: usize) -> TensorResult<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    if height == 2 * h && width == 2 * w {
        let x = x
            .reshape((b, h, 1, w, 1, c))?
            .broadcast_as((b, h, 2, w, 2, c))?;
        return x.reshape((b, height, width, c));
    }
    let index = |to: usize, from: usize| {
        Tensor::from_iter((0..to).map(|i| (i * from / to) as u32), x.device())
    };
    x.contiguous()?
        .index_select(&index(height, h)?, 1)?
        .index_select(&index(width, w)?, 2)
}

/// [b, h, w, c] and [b, h, w, d] side by side -> [b, h, w, c + d].
pub fn concat(cx: Forward, a: &Tensor, b: &Tensor) -> TensorResult<Tensor> {
    cx.timed(
        "concat",
        [a.elem_count() + b.elem_count(), 0, 0],
        || match cx.backend {
            Backend::Cpu => a
                .contiguous()?
                .apply_op2_no_bwd(&b.contiguous()?, &cpu::Concat),
            _ => Tensor::cat(&[a, b], 3),
        },
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::{Device, IndexOp, Tensor};

    /// The largest difference; NaN where there is one, which is what a weight did not write.
    fn worst(a: &Tensor, b: &Tensor) -> f32 {
        values(&(a - b).unwrap().abs().unwrap())
            .into_iter()
            .max_by(f32::total_cmp)
            .unwrap()
    }

    fn cpu() -> Forward<'static> {
        Forward::on(&Device::Cpu)
    }

    /// A case in all padding modes.
    fn padded<T: Copy>(case: T) -> [(T, [PaddingMode; 2]); 4] {
        let modes = [PaddingMode::Zeros, PaddingMode::Circular];
        [0, 1, 2, 3].map(|i| (case, [modes[i / 2], modes[i % 2]]))
    }

    fn on<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap()
            .install(work)
    }

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn group_norm(channels: usize, groups: usize) -> GroupNorm {
        let weight = Tensor::randn(1f32, 0.5, channels, &Device::Cpu).unwrap();
        let bias = Tensor::randn(0f32, 0.5, channels, &Device::Cpu).unwrap();
        GroupNorm {
            weight,
            bias,
            groups,
            eps: 1e-5,
        }
    }

    fn layer_norm(width: usize) -> LayerNorm {
        let GroupNorm {
            weight, bias, eps, ..
        } = group_norm(width, 1);
        LayerNorm { weight, bias, eps }
    }

    #[test]
    fn group_norm_kernel_equals_its_plain_composition() {
        let sizes = [(1, 1), (1, 7), (2, 3), (7, 5), (33, 17), (65, 67)];
        let channels = [
            (1, 1),
            (8, 2),
            (12, 3),
            (7, 7),
            (32, 32),
            (20, 4),
            (330, 10),
        ];
        for (n, ((h, w), (c, groups))) in sizes
            .into_iter()
            .flat_map(|s| channels.map(|c| (s, c)))
            .enumerate()
        {
            let x = (Tensor::randn(0f32, 1.0, (n % 3 + 1, h, w, c), &Device::Cpu).unwrap() + 3.0)
                .unwrap();
            let norm = group_norm(c, groups);
            let plain = group_norm_plain(&x, &norm.weight, &norm.bias, groups, norm.eps).unwrap();
            // the plain mean is a sum of up to 140,000 numbers in f32
            assert!(
                worst(&norm.forward(cpu(), &x).unwrap(), &plain) < 1e-4,
                "{h}x{w}, {c} in {groups}"
            );
            let silu = candle_nn::ops::silu(&plain).unwrap();
            assert!(
                worst(
                    &norm.forward_act(cpu(), &x, Activation::Silu).unwrap(),
                    &silu
                ) < 1e-4,
                "{h}x{w}, {c} in {groups}, silu"
            );
        }
    }

    #[test]
    fn norms_are_right_far_from_zero() {
        let (b, h, w, c, groups) = (2, 40, 30, 48, 6);
        let x = (Tensor::randn(0f32, 1.0, (b, h, w, c), &Device::Cpu).unwrap() + 1000.0).unwrap();
        let f64 = |x: &Tensor| x.to_dtype(candle_core::DType::F64).unwrap();
        let exact = |x: Tensor, over: &[usize], weight: &Tensor, bias: &Tensor| {
            let x = x.broadcast_sub(&x.mean_keepdim(over).unwrap()).unwrap();
            let deviation = (x.sqr().unwrap().mean_keepdim(over).unwrap() + 1e-5)
                .unwrap()
                .sqrt()
                .unwrap();
            let x = x
                .broadcast_div(&deviation)
                .unwrap()
                .reshape((b, h, w, c))
                .unwrap();
            x.broadcast_mul(&f64(weight))
                .unwrap()
                .broadcast_add(&f64(bias))
                .unwrap()
                .to_dtype(candle_core::DType::F32)
                .unwrap()
        };
        let norm = group_norm(c, groups);
        let plain = exact(
            f64(&x).reshape((b, h * w, groups, c / groups)).unwrap(),
            &[1, 3],
            &norm.weight,
            &norm.bias,
        );
        assert!(worst(&norm.forward(cpu(), &x).unwrap(), &plain) < 1e-5);
        assert!(
            worst(
                &norm.forward_act(cpu(), &x, Activation::Silu).unwrap(),
                &candle_nn::ops::silu(&plain).unwrap()
            ) < 1e-5
        );
        let norm = layer_norm(c);
        let plain = exact(f64(&x), &[3], &norm.weight, &norm.bias);
        // its mean is an f32, and those near 1000 are 6e-5 apart
        assert!(worst(&norm.forward(cpu(), &x).unwrap(), &plain) < 1e-3);
    }

    #[test]
    fn norms_of_what_is_the_same_everywhere_are_the_bias() {
        for (h, w, value) in [(1, 1, 0.0), (5, 3, 0.1), (65, 67, 1000.3), (65, 67, -3e7)] {
            let x = Tensor::full(value as f32, (2, h, w, 35), &Device::Cpu).unwrap();
            let norm = group_norm(35, 5);
            let bias = norm.bias.broadcast_as(x.shape()).unwrap();
            assert!(worst(&norm.forward(cpu(), &x).unwrap(), &bias) < 1e-6);
            assert!(
                worst(
                    &norm.forward_act(cpu(), &x, Activation::Silu).unwrap(),
                    &candle_nn::ops::silu(&bias.contiguous().unwrap()).unwrap()
                ) < 1e-6
            );
            let norm = layer_norm(35);
            assert!(
                worst(
                    &norm.forward(cpu(), &x).unwrap(),
                    &norm.bias.broadcast_as(x.shape()).unwrap()
                ) < 1e-6
            );
        }
    }

    #[test]
    fn norms_give_the_same_bits_on_any_number_of_threads_and_beside_any_neighbours() {
        for (h, w, c, groups) in [(1, 1, 7, 7), (8, 8, 1280, 32), (65, 67, 50, 5)] {
            let x = Tensor::randn(1f32, 2.0, (3, h, w, c), &Device::Cpu).unwrap();
            let (group, layer) = (group_norm(c, groups), layer_norm(c));
            let norms: [&(dyn Fn(&Tensor) -> Tensor + Sync); 2] = [
                &|x| group.forward_act(cpu(), x, Activation::Silu).unwrap(),
                &|x| layer.forward(cpu(), x).unwrap(),
            ];
            for norm in norms {
                let all = values(&on(1, || norm(&x)));
                assert!(all == values(&on(2, || norm(&x))));
                for (i, one) in all.chunks_exact(h * w * c).enumerate() {
                    assert!(one == values(&norm(&x.i(i..=i).unwrap())));
                }
            }
        }
    }

    #[test]
    fn layer_norm_kernel_equals_candles_own() {
        for (n, width) in [1, 7, 16, 63, 65, 320, 768, 1280].into_iter().enumerate() {
            // around 0, as candle's own is the less exact elsewhere
            let x = Tensor::randn(0f32, 1.0, (n % 3 + 1, 77, width), &Device::Cpu).unwrap();
            let norm = layer_norm(width);
            let plain = layer_norm_plain(&x, &norm.weight, &norm.bias, norm.eps).unwrap();
            // the plain mean is a sum of up to 140,000 numbers in f32
            assert!(
                worst(&norm.forward(cpu(), &x).unwrap(), &plain) < 5e-5,
                "{width}"
            );
        }
    }

    #[test]
    fn convolution_kernel_equals_candles_own() {
        let sizes = [(1, 1), (2, 3), (9, 6), (17, 33), (65, 67)];
        let kinds = [
            (3, 1, (1, 1)),
            (3, 2, (1, 1)),
            (3, 2, (0, 1)),
            (1, 1, (0, 0)),
            (5, 1, (2, 2)),
        ];
        for (((b, (h, w)), (size, stride, padding)), modes) in (1..)
            .zip(sizes)
            .flat_map(|s| kinds.map(|k| (s, k)))
            .flat_map(padded)
        {
            let (b, inputs, outputs) = (b % 3 + 1, if size == 3 { 35 } else { 5 }, 7);
            let x = Tensor::randn(0f32, 1.0, (b, h, w, inputs), &Device::Cpu).unwrap();
            let weight =
                Tensor::randn(0f32, 0.3, (outputs, inputs, size, size), &Device::Cpu).unwrap();
            let bias = Tensor::randn(0f32, 1.0, outputs, &Device::Cpu).unwrap();
            if h + padding.0 + padding.1 < size {
                continue;
            }
            let plain = conv2d_plain(&x, &weight, stride, padding, modes)
                .unwrap()
                .broadcast_add(&bias)
                .unwrap();
            let conv = Conv2d {
                weight: WeightLayout::pack(&weight, false).unwrap(),
                bias,
                slope: None,
                size,
                stride,
                padding,
            };
            let [shift, residual] = [&plain.i((0, 0, 0)).unwrap(), &plain]
                .map(|like| like.rand_like(-1.0, 1.0).unwrap());
            let added = (plain.broadcast_add(&shift).unwrap() + &residual).unwrap();
            assert!(
                worst(
                    &conv
                        .forward_add(cpu().padded(modes), &x, Some(&shift), Some(&residual))
                        .unwrap(),
                    &added
                ) < 1e-4
            );
            let shifts = (Tensor::arange(0f32, b as f32, &Device::Cpu)
                .unwrap()
                .unsqueeze(1)
                .unwrap()
                * 3.0)
                .unwrap();
            let shifts = shifts.broadcast_add(&shift).unwrap(); // [b, outputs]
            let added = plain
                .broadcast_add(&shifts.reshape((b, 1, 1, outputs)).unwrap())
                .unwrap();
            assert!(
                worst(
                    &conv
                        .forward_add(cpu().padded(modes), &x, Some(&shifts), None)
                        .unwrap(),
                    &added
                ) < 1e-4
            );
            assert!(
                worst(&conv.forward(cpu().padded(modes), &x).unwrap(), &plain) < 1e-4,
                "{b}x{h}x{w}, size {size}, stride {stride}, padding {padding:?}, {modes:?}"
            );
            let added = leaky_plain(&(&plain + &residual).unwrap(), &shift).unwrap();
            assert!(
                worst(
                    &conv
                        .leaky(shift)
                        .forward_add(cpu().padded(modes), &x, None, Some(&residual))
                        .unwrap(),
                    &added
                ) < 1e-4
            );
        }
    }

    #[test]
    fn a_plain_convolution_in_parts_is_that_of_the_whole() {
        let sizes = [
            (7, 5, 3, 1, (1, 1)),
            (9, 4, 3, 2, (1, 1)),
            (8, 6, 3, 2, (0, 1)),
            (5, 6, 1, 1, (0, 0)),
            (2, 9, 5, 1, (2, 2)),
        ];
        for ((h, w, size, stride, padding), modes) in sizes.into_iter().flat_map(padded) {
            let x = Tensor::randn(0f32, 1.0, (2, h, w, 3), &Device::Cpu).unwrap();
            let weight = Tensor::randn(0f32, 0.3, (4, 3, size, size), &Device::Cpu).unwrap();
            let whole = conv2d_plain(&x, &weight, stride, padding, modes).unwrap();
            let row = 2 * whole.dim(2).unwrap() * 3 * size * size;
            for unfolded in [0, row, 2 * row, 3 * row + 1, 100 * row] {
                let parts = conv2d_in_parts(&x, &weight, stride, padding, modes, unfolded).unwrap();
                assert!(
                    worst(&parts, &whole) < 1e-5,
                    "{h}x{w}, size {size}, stride {stride}, {modes:?}, {unfolded} at once"
                );
            }
        }
    }

    #[test]
    fn concatenation_equals_candles_own() {
        for (h, w) in [(1, 1), (3, 5), (33, 65)] {
            let [x, other] =
                [7, 12].map(|c| Tensor::randn(0f32, 1.0, (3, h, w, c), &Device::Cpu).unwrap());
            assert_eq!(
                worst(
                    &concat(cpu(), &x, &other).unwrap(),
                    &Tensor::cat(&[&x, &other], 3).unwrap()
                ),
                0.0
            );
        }
    }

    #[test]
    fn a_convolution_scales_its_input_as_its_plain_composition_does() {
        let sizes = [
            ((1, 1), (2, 2)),
            ((3, 5), (6, 10)),
            ((4, 3), (7, 5)),
            ((33, 65), (66, 130)),
            ((2, 2), (1, 5)),
            ((9, 10), (19, 19)),
        ];
        let cases = sizes
            .into_iter()
            .flat_map(|s| [(s, 3), (s, 1)])
            .zip((1..=3).cycle());
        for (((((h, w), (to_h, to_w)), size), b), modes) in cases.flat_map(padded) {
            let x = Tensor::randn(0f32, 1.0, (b, h, w, 19), &Device::Cpu).unwrap();
            let weight = Tensor::randn(0f32, 0.3, (35, 19, size, size), &Device::Cpu).unwrap();
            let bias = Tensor::randn(0f32, 1.0, 35, &Device::Cpu).unwrap();
            let padding = (size / 2, size / 2);
            let plain = conv2d_plain(
                &scale_plain(&x, to_h, to_w).unwrap(),
                &weight,
                1,
                padding,
                modes,
            )
            .unwrap()
            .broadcast_add(&bias)
            .unwrap();
            let conv = Conv2d {
                weight: WeightLayout::pack(&weight, false).unwrap(),
                bias,
                slope: None,
                size,
                stride: 1,
                padding,
            };
            assert!(
                worst(
                    &conv
                        .forward_scaled(cpu().padded(modes), &x, to_h, to_w)
                        .unwrap(),
                    &plain
                ) < 1e-4,
                "{h}x{w} to {to_h}x{to_w}, {modes:?}"
            );
        }
    }

    #[test]
    fn product_kernel_equals_its_plain_composition() {
        let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
        for (m, k, n) in [
            (1, 1, 2),
            (3, 77, 6),
            (65, 33, 130),
            (4, 320, 66),
            (300, 300, 98),
            (257, 515, 640),
        ] {
            let (x, weight, bias, residual) = (
                random(&[m, k]),
                random(&[n, k]),
                random(&[n]),
                random(&[m, n]),
            );
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let stored = weight.to_dtype(dtype).unwrap();
                let wide = stored.to_dtype(DType::F32).unwrap();
                for (bias, residual, gated) in [
                    (None, None, false),
                    (Some(&bias), None, false),
                    (None, Some(&residual), false),
                    (Some(&bias), Some(&residual), false),
                    (None, None, true),
                    (Some(&bias), None, true),
                ] {
                    let weight = WeightLayout::pack(&stored, gated).unwrap();
                    let layer = Linear {
                        weight,
                        bias: bias.cloned(),
                        inputs: k,
                        outputs: n,
                        gated,
                    };
                    let plain = gemm_plain(&x, &wide, bias, residual, gated).unwrap();
                    let largest = worst(&plain, &plain.zeros_like().unwrap());
                    assert!(
                        worst(&layer.apply(cpu(), &x, residual).unwrap(), &plain)
                            < 2e-6 * largest.max(1.0),
                        "{m} {k} {n} {dtype:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn products_and_attention_give_the_same_bits_on_any_number_of_threads() {
        let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
        let (x, weight, bias) = (random(&[2, 700, 320]), random(&[640, 320]), random(&[640]));
        let layer = Linear {
            weight: WeightLayout::pack(&weight, true).unwrap(),
            bias: Some(bias),
            inputs: 320,
            outputs: 640,
            gated: true,
        };
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let y = pool.install(|| layer.forward(cpu(), &x).unwrap());
            let y = pool.install(|| crate::nn::attention::attention(cpu(), &y, &y, &y, 8).unwrap());
            y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert!(on(1) == on(2) && on(1) == on(5));
    }
}
