//! The implementations of the layers' operations: the one place where kernels are chosen.

use super::blocks::BlockMatrix;
use super::{PaddingMode, Precision, attention, cpu, gpu, plain};
use candle_core::{Device, Result, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// An implementation of the layers' operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// the kernels of [`super::cpu`]
    Cpu,
    /// the kernels of [`super::gpu`]
    Gpu,
    /// Compositions of candle's operations, [`plain`]: for devices without kernels, and the
    /// reference that kernels are compared with.
    Plain,
}

impl Backend {
    /// The fastest that a device has.
    pub fn of(device: &Device) -> Self {
        match device {
            Device::Cpu => Self::Cpu,
            Device::Cuda(_) if cfg!(feature = "cuda") => Self::Gpu,
            _ => Self::Plain,
        }
    }

    /// Scaled dot-product attention of q [b, n, heads*d] to k and v [b, m, heads*d].
    pub(super) fn attention(
        self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        heads: usize,
        precision: Precision,
    ) -> Result<Tensor> {
        if self == Self::Plain {
            return plain::attention(q, k, v, heads, None);
        }
        let [q, k, v] = [
            attention::with_rows(q)?,
            attention::with_rows(k)?,
            attention::with_rows(v)?,
        ];
        match self {
            Self::Cpu => {
                let tiles = cpu::Tiles::chosen(precision);
                q.apply_op3_no_bwd(&k, &v, &cpu::Attention { heads, tiles })
            }
            _ if gpu::Attention::serves(&q, &k, &v, heads)? => {
                gpu::run(gpu::Attention { q, k, v, heads })
            }
            _ => plain::attention(&q, &k, &v, heads, None),
        }
    }

    /// GELU of every element, by the tangent's formula.
    pub(super) fn gelu_tanh(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Cpu => x.contiguous()?.apply_op1_no_bwd(&cpu::GeluTanh),
            Self::Gpu | Self::Plain => x.gelu(),
        }
    }

    /// SiLU of the first half of the last dimension times its second half: [.., 2n] -> [.., n].
    pub(super) fn swiglu(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Cpu => x.contiguous()?.apply_op1_no_bwd(&cpu::SwiGlu),
            Self::Gpu | Self::Plain => plain::swiglu(x),
        }
    }

    /// Layer normalisation over the last dimension.
    pub(super) fn layer_norm(
        self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        eps: f64,
    ) -> Result<Tensor> {
        match self {
            Self::Cpu => x
                .contiguous()?
                .apply_op3_no_bwd(weight, bias, &cpu::LayerNorm { eps }),
            Self::Gpu => gpu::run(gpu::LayerNorm {
                x: x.contiguous()?,
                weight: weight.clone(),
                bias: bias.clone(),
                eps,
            }),
            Self::Plain => plain::layer_norm(x, weight, bias, eps),
        }
    }

    /// The statistics of a batch of images in bands of rows, [b, rows, w, c] each and contiguous.
    pub(super) fn group_statistics(
        self,
        bands: &[&Tensor],
        norm: &GroupNormParams,
    ) -> Result<GroupStatistics> {
        let Some(first) = bands.first() else {
            candle_core::bail!("the image has no bands")
        };
        match self {
            Self::Cpu => {
                let GroupNormParams {
                    weight,
                    bias,
                    groups,
                    eps,
                } = norm;
                let norm = cpu::GroupNorm {
                    groups: *groups,
                    eps: *eps,
                };
                norm.statistics(bands, weight, bias)
                    .map(GroupStatistics::Cpu)
            }
            Self::Gpu => {
                // a copy, as a view would keep the whole band
                let origin = if let [whole] = bands {
                    (*whole).clone()
                } else {
                    first.narrow(1, 0, 1)?.narrow(2, 0, 1)?.force_contiguous()?
                };
                let sums = |x: &&Tensor| {
                    gpu::run(gpu::GroupSums {
                        x: (*x).clone(),
                        origin: origin.clone(),
                        groups: norm.groups,
                    })
                };
                let sums = Tensor::cat(&bands.iter().map(sums).collect::<Result<Vec<_>>>()?, 1)?;
                let pixels = bands
                    .iter()
                    .map(|x| Ok(x.dim(1)? * x.dim(2)?))
                    .sum::<Result<usize>>()?;
                Ok(GroupStatistics::Gpu {
                    sums,
                    origin,
                    pixels,
                })
            }
            Self::Plain => Ok(GroupStatistics::Plain),
        }
    }

    /// [b, h, w, c] and [b, h, w, d] -> [b, h, w, c + d].
    pub(super) fn concat(self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        match self {
            Self::Cpu => a
                .contiguous()?
                .apply_op2_no_bwd(&b.contiguous()?, &cpu::Concat),
            _ => Tensor::cat(&[a, b], 3),
        }
    }
}

/// The parameters of a group norm.
pub(super) struct GroupNormParams {
    /// [c]
    pub weight: Tensor,
    /// [c]
    pub bias: Tensor,
    pub groups: usize,
    pub eps: f64,
}

/// The statistics of a batch of images, by [`Backend::group_statistics`].
pub(super) enum GroupStatistics {
    Cpu(Vec<cpu::Affine>),
    /// see [`gpu::GroupSums`]
    Gpu {
        sums: Tensor,
        origin: Tensor,
        pixels: usize,
    },
    /// computed when the image is normalised, which is then a whole one
    Plain,
}

impl GroupStatistics {
    /// Normalises rows of the images, then applies SiLU if asked to: [b, rows, w, c], perhaps [b,
    /// above, w, c] and [b, below, w, c] -> [b, above + rows + below, w, c].
    pub fn normalise(
        &self,
        x: &Tensor,
        above: Option<&Tensor>,
        below: Option<&Tensor>,
        norm: &GroupNormParams,
        silu: bool,
    ) -> Result<Tensor> {
        let GroupNormParams {
            weight,
            bias,
            groups,
            eps,
        } = norm;
        match self {
            Self::Cpu(affine) => x.apply_op1_no_bwd(&cpu::Normalise {
                affine,
                silu,
                above,
                below,
            }),
            Self::Gpu {
                sums,
                origin,
                pixels,
            } => {
                let parts: Vec<&Tensor> = above.into_iter().chain([x]).chain(below).collect();
                gpu::run(gpu::GroupApply {
                    x: Tensor::cat(&parts, 1)?,
                    origin: origin.clone(),
                    sums: sums.clone(),
                    weight: weight.clone(),
                    bias: bias.clone(),
                    pixels: *pixels,
                    eps: *eps,
                    silu,
                })
            }
            Self::Plain => {
                let y = plain::group_norm(x, weight, bias, *groups, *eps)?;
                if silu {
                    candle_nn::ops::silu(&y)
                } else {
                    Ok(y)
                }
            }
        }
    }
}

/// The weights of a linear layer or a convolution, in the layout that their backend reads.
pub(super) enum WeightLayout {
    /// CPU: panels, by [`cpu::Pack`]
    Packed(Tensor),
    /// CPU, of linear layers: as GGUF stores them
    Blocks(Arc<BlockMatrix>),
    /// CPU, of linear layers: rounded to 8 bits
    Int8(Arc<cpu::Int8Matrix>),
    /// GPU: [out, .., in], and the two halves of gated rows interleaved
    Rows(Tensor),
    /// plain: as checkpoints store them, [out, in, ..]
    Plain(Tensor),
}

/// The arguments of a product with weights [n, k].
pub(super) struct Gemm<'a> {
    /// n
    pub outputs: usize,
    /// [n]
    pub bias: Option<&'a Tensor>,
    /// [m, n]: added
    pub residual: Option<Tensor>,
    /// GEGLU: the first half of the columns times the exact GELU of the second is the result
    pub gated: bool,
    pub precision: Precision,
}

/// The arguments of a convolution with weights [out, in, k, k].
pub(super) struct Conv<'a> {
    /// k
    pub size: usize,
    pub stride: usize,
    /// rows and columns of padding before and after the image
    pub padding: (usize, usize),
    /// of rows and of columns
    pub padding_modes: [PaddingMode; 2],
    /// (height, width) to which the input is scaled first, each pixel from the nearest before it
    pub scaled: Option<(usize, usize)>,
    /// the rows of the output that are computed
    pub rows: Range<usize>,
    /// of the output
    pub width: usize,
    /// [out]: added
    pub bias: &'a Tensor,
    /// [out] or [b, out]: added
    pub shift: Option<&'a Tensor>,
    /// [b, rows, width, out]: added
    pub residual: Option<Tensor>,
    /// [out]: the slope of a leaky ReLU after that
    pub slope: Option<&'a Tensor>,
    pub precision: Precision,
}

impl WeightLayout {
    /// Lays out weights [out, in, ..]; the output of `gated` ones is a GEGLU's.
    pub fn new(backend: Backend, weight: &Tensor, gated: bool) -> Result<Self> {
        match backend {
            Backend::Cpu => {
                let packed = weight
                    .contiguous()?
                    .apply_op1_no_bwd(&cpu::Pack { gated })?;
                Ok(Self::Packed(packed))
            }
            // candle's own, through cuDNN
            Backend::Gpu if cfg!(feature = "cudnn") && weight.rank() == 4 => {
                Ok(Self::Plain(weight.clone()))
            }
            Backend::Gpu if gated => Ok(Self::Rows(gpu::interleaved(weight)?)),
            Backend::Gpu => Ok(Self::Rows(gpu::rows(weight)?)),
            Backend::Plain => Ok(Self::Plain(weight.clone())),
        }
    }

    /// The bias [out] of gated weights as [`Self::gemm`] takes it.
    pub fn gated_bias(&self, bias: Tensor) -> Result<Tensor> {
        match self {
            Self::Rows(_) => gpu::interleaved(&bias),
            _ => Ok(bias),
        }
    }

    /// x [m, k] -> [m, n], or [m, n/2] if gated.
    pub fn gemm(&self, x: &Tensor, gemm: Gemm) -> Result<Tensor> {
        let Gemm {
            outputs,
            bias,
            residual,
            gated,
            precision,
        } = gemm;
        let on_cpu = |residual| cpu::Gemm {
            outputs,
            bias: bias.cloned(),
            residual,
            gated,
            tiles: cpu::Tiles::chosen(precision),
        };
        match self {
            Self::Packed(weight) => x.contiguous()?.apply_op2_no_bwd(weight, &on_cpu(residual)),
            Self::Blocks(weight) => x.contiguous()?.apply_op1_no_bwd(&cpu::BlocksGemm {
                gemm: on_cpu(residual),
                weight: weight.clone(),
            }),
            Self::Int8(weight) => x.contiguous()?.apply_op1_no_bwd(&cpu::Int8Gemm {
                weight: weight.clone(),
                bias: bias.cloned(),
                residual,
            }),
            Self::Rows(weight) => {
                let gemm = gpu::Gemm::linear(
                    x.contiguous()?,
                    weight.clone(),
                    bias.cloned(),
                    residual,
                    gated,
                )?;
                gpu::run(gemm)?.flatten_to(2)
            }
            Self::Plain(weight) => plain::gemm(x, weight, bias, residual.as_ref(), gated),
        }
    }

    /// x [b, h, w, in] -> [b, rows, width, out].
    pub fn conv2d(&self, x: &Tensor, conv: Conv) -> Result<Tensor> {
        let Conv {
            size,
            stride,
            padding,
            padding_modes,
            scaled,
            rows,
            width,
            bias,
            shift,
            residual,
            slope,
            precision,
        } = conv;
        let shifted_bias = || shift.map_or(Ok(bias.clone()), |shift| shift.broadcast_add(bias)); // [out] or [b, out]
        match self {
            Self::Packed(weight) => {
                let op = cpu::Conv2d {
                    size,
                    stride,
                    padding,
                    padding_modes,
                    rows,
                    scaled,
                    residual,
                    slope: slope.cloned(),
                    tiles: cpu::Tiles::chosen(precision),
                };
                x.contiguous()?
                    .apply_op3_no_bwd(weight, &shifted_bias()?, &op)
            }
            Self::Blocks(_) | Self::Int8(_) => {
                candle_core::bail!("no convolution has its weights in blocks or 8 bits")
            }
            Self::Rows(weight) => gpu::run(gpu::Gemm {
                x: x.contiguous()?,
                weight: weight.clone(),
                bias: Some(bias.clone()),
                shift: shift.cloned(),
                residual,
                slope: slope.cloned(),
                gated: false,
                size,
                stride,
                before: padding.0,
                scaled: scaled.unwrap_or((x.dim(1)?, x.dim(2)?)),
                rows,
                out_width: width,
                padding_modes,
            }),
            Self::Plain(weight) => {
                let scaled = scaled
                    .map(|(height, width)| plain::scale_nearest(x, height, width))
                    .transpose()?;
                let x = scaled.as_ref().unwrap_or(x);
                let y = plain::conv2d(x, weight, stride, padding, padding_modes)?;
                let bias = shifted_bias()?;
                let bias = if bias.rank() == 2 {
                    bias.reshape((bias.dim(0)?, 1, 1, bias.dim(1)?))?
                } else {
                    bias
                };
                let y = y.narrow(1, rows.start, rows.len())?.broadcast_add(&bias)?;
                let y = residual.map_or(Ok(y.clone()), |residual| y + residual)?;
                slope.map_or(Ok(y.clone()), |slope| plain::leaky_relu(&y, slope))
            }
        }
    }
}
