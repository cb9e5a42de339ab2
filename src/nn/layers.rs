//! Linear, convolution, normalisation and activation layers.

use super::backend::{Conv, Gemm, GroupNormParams, GroupStatistics, WeightLayout};
use super::blocks::BlockMatrix;
use super::cpu::Int8Matrix;
use super::{Backend, Forward};
use crate::nn::weights::Weights;
use anyhow::{Result, bail};
use candle_core::{DType, Device, Result as TensorResult, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// Reads `weight` in the type that the backend's products take.
fn read_weight(w: &Weights, shape: &[usize]) -> Result<Tensor> {
    if w.backend() == Backend::Cpu {
        w.get_stored("weight", shape)
    } else {
        w.get("weight", shape)
    }
}

/// Reads `weight` and lays it out.
fn layout(w: &Weights, shape: &[usize], gated: bool) -> Result<WeightLayout> {
    Ok(WeightLayout::new(
        w.backend(),
        &read_weight(w, shape)?,
        gated,
    )?)
}

/// The same of a linear layer, whose weights stay in blocks where they are stored in them, and are
/// rounded to 8 bits where that was asked for.
fn linear_layout(w: &Weights, shape: [usize; 2], gated: bool) -> Result<WeightLayout> {
    let is_int8 = w.is_int8() && Int8Matrix::takes(shape[1]);
    Ok(match w.get_blocks("weight", shape)? {
        Some(matrix) => in_blocks(matrix, gated, is_int8),
        None if is_int8 => {
            let matrix = Int8Matrix::of(&read_weight(w, &shape)?, gated)?;
            WeightLayout::Int8(Arc::new(matrix))
        }
        None => layout(w, &shape, gated)?,
    })
}

fn in_blocks(matrix: BlockMatrix, gated: bool, is_int8: bool) -> WeightLayout {
    match is_int8 {
        true => WeightLayout::Int8(Arc::new(Int8Matrix::of_blocks(&matrix, gated))),
        false => WeightLayout::Blocks(Arc::new(matrix)),
    }
}

/// y = x W' + b over the last dimension.
pub struct Linear {
    weight: WeightLayout,
    bias: Option<Tensor>,
    inputs: usize,
    outputs: usize,
    /// GEGLU: the first half of the outputs times the exact GELU of the second is the result
    gated: bool,
}

impl Linear {
    /// Reads `weight` [out, in] and `bias` `[out]`.
    pub fn new(w: &Weights, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self {
            bias: Some(w.get("bias", &[outputs])?),
            ..Self::without_bias(w, inputs, outputs)?
        })
    }

    /// Reads `weight` [out, in] alone.
    pub fn without_bias(w: &Weights, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self {
            weight: linear_layout(w, [outputs, inputs], false)?,
            bias: None,
            inputs,
            outputs,
            gated: false,
        })
    }

    /// Fuses layers of the same input into one, whose outputs are theirs side by side. Reads
    /// `weight` [out, in] of each, and `bias` `[out]` if `biased`.
    pub fn fused(layers: &[(Weights, usize)], inputs: usize, biased: bool) -> Result<Self> {
        let each = |read: &dyn Fn(&Weights, usize) -> Result<Tensor>| {
            layers
                .iter()
                .map(|(w, outputs)| read(w, *outputs))
                .collect::<Result<Vec<_>>>()
        };
        let stored_in_blocks = layers
            .iter()
            .map(|(w, outputs)| w.get_blocks("weight", [*outputs, inputs]))
            .collect::<Result<Option<Vec<_>>>>()?;
        let backend = layers.first().map_or(Backend::Plain, |(w, _)| w.backend());
        let is_int8 = Int8Matrix::takes(inputs) && layers.iter().all(|(w, _)| w.is_int8());
        let weight = match stored_in_blocks.and_then(BlockMatrix::cat) {
            Some(matrix) => in_blocks(matrix, false, is_int8),
            None => {
                let mut weights = each(&|w, outputs| read_weight(w, &[outputs, inputs]))?;
                // a file may hold some of them in a narrower type than others
                let is_other = |weight: &Tensor| weight.dtype() != weights[0].dtype();
                if weights.iter().any(is_other) {
                    weights = weights
                        .iter()
                        .map(|weight| weight.to_dtype(DType::F32))
                        .collect::<TensorResult<_>>()?;
                }
                let weight = Tensor::cat(&weights, 0)?;
                if is_int8 {
                    WeightLayout::Int8(Arc::new(Int8Matrix::of(&weight, false)?))
                } else {
                    WeightLayout::new(backend, &weight, false)?
                }
            }
        };
        let bias = biased
            .then(|| {
                Ok::<_, anyhow::Error>(Tensor::cat(
                    &each(&|w, outputs| w.get("bias", &[outputs]))?,
                    0,
                )?)
            })
            .transpose()?;
        Ok(Self {
            weight,
            bias,
            inputs,
            outputs: layers.iter().map(|(_, outputs)| outputs).sum(),
            gated: false,
        })
    }

    /// Reads `weight` [2*out, in] and `bias` `[2*out]` of a GEGLU (Shazeer 2020, arXiv 2002.05202):
    /// the first half of its outputs times the exact GELU of the second.
    pub fn geglu(w: &Weights, inputs: usize, outputs: usize) -> Result<Self> {
        let weight = linear_layout(w, [2 * outputs, inputs], true)?;
        let bias = weight.gated_bias(w.get("bias", &[2 * outputs])?)?;
        Ok(Self {
            weight,
            bias: Some(bias),
            inputs,
            outputs: 2 * outputs,
            gated: true,
        })
    }

    /// The width of its input.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// [.., in] -> [.., out].
    pub fn forward(&self, cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
        self.apply(cx, x, None)
    }

    /// [.., in] -> [.., out], plus `residual` of as many elements.
    pub fn forward_add(&self, cx: Forward, x: &Tensor, residual: &Tensor) -> TensorResult<Tensor> {
        self.apply(cx, x, Some(residual))
    }

    fn apply(&self, cx: Forward, x: &Tensor, residual: Option<&Tensor>) -> TensorResult<Tensor> {
        let mut shape = x.dims().to_vec();
        let flat = x.reshape(((), self.inputs))?; // [rows, in]
        let residual = residual
            .map(|r| r.reshape(((), self.outputs))?.contiguous())
            .transpose()?;
        let gemm = Gemm {
            outputs: self.outputs,
            bias: self.bias.as_ref(),
            residual,
            gated: self.gated,
            precision: cx.precision,
        };
        let sides = [flat.dim(0)?, self.inputs, self.outputs];
        let y = cx.timed("linear", sides, || self.weight.gemm(&flat, gemm))?; // [rows, out]
        if let Some(last) = shape.last_mut() {
            *last = y.dim(1)?;
        }
        y.reshape(shape)
    }
}

/// A table of vectors, of which those of ids are taken.
pub struct Embedding {
    rows: EmbeddingRows,
    width: usize,
    device: Device,
    dtype: DType,
}

enum EmbeddingRows {
    /// [rows, width], as narrow as its file
    Stored(Tensor),
    Blocks(BlockMatrix),
}

impl Embedding {
    /// Reads `weight` [rows, width].
    pub fn new(w: &Weights, rows: usize, width: usize) -> Result<Self> {
        let rows = match w.get_blocks("weight", [rows, width])? {
            Some(matrix) => EmbeddingRows::Blocks(matrix),
            None => EmbeddingRows::Stored(w.get_stored("weight", &[rows, width])?),
        };
        Ok(Self {
            rows,
            width,
            device: w.device().clone(),
            dtype: w.arithmetic(),
        })
    }

    /// n ids -> [n, width] in the type of the arithmetic. Errors if there is no row of an id.
    pub fn forward(&self, ids: &[u32]) -> TensorResult<Tensor> {
        match &self.rows {
            EmbeddingRows::Stored(table) => table
                .index_select(&Tensor::new(ids, &self.device)?, 0)?
                .to_dtype(self.dtype),
            EmbeddingRows::Blocks(matrix) => {
                let mut rows = vec![0f32; ids.len() * self.width];
                for (id, row) in ids.iter().zip(rows.chunks_exact_mut(self.width)) {
                    if *id as usize >= matrix.dims().0 {
                        candle_core::bail!("there is no embedding of the id {id}");
                    }
                    matrix.write(*id as usize, 0, row);
                }
                Tensor::from_vec(rows, (ids.len(), self.width), &self.device)?.to_dtype(self.dtype)
            }
        }
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

/// The optional arguments of a convolution.
#[derive(Default)]
struct Extra<'a> {
    /// (height, width) to which the input is scaled first
    scaled: Option<(usize, usize)>,
    /// the rows of the output that are computed; none: all
    rows: Option<Range<usize>>,
    /// [out] or [b, out]: added
    shift: Option<&'a Tensor>,
    /// [b, rows, w', out]: added
    residual: Option<&'a Tensor>,
}

/// A 2D convolution over [b, h, w, c].
pub struct Conv2d {
    weight: WeightLayout,
    bias: Tensor,
    /// [out]: the slope of a leaky ReLU
    slope: Option<Tensor>,
    size: usize,
    stride: usize,
    /// rows and columns of padding before and after the image
    padding: (usize, usize),
}

impl Conv2d {
    /// Reads `weight` [out, in, k, k] and `bias` `[out]`; stride 1, and padding that keeps height
    /// and width.
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
        Ok(Self {
            weight: layout(w, &[outputs, inputs, size, size], false)?,
            bias: w.get("bias", &[outputs])?,
            slope: None,
            size,
            stride,
            padding,
        })
    }

    /// Reads `weight` [out, in, k, k] alone; padding that keeps height and width, but for the
    /// stride.
    pub fn without_bias(
        w: &Weights,
        inputs: usize,
        outputs: usize,
        size: usize,
        stride: usize,
    ) -> Result<Self> {
        Ok(Self {
            weight: layout(w, &[outputs, inputs, size, size], false)?,
            bias: w.zeros(&[outputs])?,
            slope: None,
            size,
            stride,
            padding: (size / 2, size / 2),
        })
    }

    /// Reads `weight` and `bias` of a convolution whose result is multiplied by `factor`; padding
    /// that keeps height and width.
    pub fn scaled_by(
        w: &Weights,
        inputs: usize,
        outputs: usize,
        size: usize,
        factor: f64,
    ) -> Result<Self> {
        let weight = (w.get("weight", &[outputs, inputs, size, size])? * factor)?;
        Self::of(w.backend(), &weight, (w.get("bias", &[outputs])? * factor)?)
    }

    /// A convolution of this weight [out, in, k, k] and this bias `[out]`; padding that keeps height
    /// and width.
    pub fn of(backend: Backend, weight: &Tensor, bias: Tensor) -> Result<Self> {
        let (_, _, size, _) = weight.dims4()?;
        Ok(Self {
            weight: WeightLayout::new(backend, weight, false)?,
            bias,
            slope: None,
            size,
            stride: 1,
            padding: (size / 2, size / 2),
        })
    }

    /// The same convolution followed by a leaky ReLU of this slope `[out]` (also PReLU, He et al.
    /// 2015, arXiv 1502.01852), in one pass where the backend can.
    pub fn leaky(self, slope: Tensor) -> Self {
        Self {
            slope: Some(slope),
            ..self
        }
    }

    /// [b, h, w, in] -> [b, h', w', out].
    pub fn forward(&self, cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
        self.forward_add(cx, x, None, None)
    }

    /// [b, h, w, in] -> [b, h', w', out], plus `shift` `[out]`, or [b, out] with a row for each
    /// image, plus `residual` [b, h', w', out].
    pub fn forward_add(
        &self,
        cx: Forward,
        x: &Tensor,
        shift: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> TensorResult<Tensor> {
        let extra = Extra {
            shift,
            residual,
            ..Extra::default()
        };
        self.apply(cx, x, extra)
    }

    /// The same of x scaled to `height` x `width`, each pixel from the nearest one before it.
    pub fn forward_scaled(
        &self,
        cx: Forward,
        x: &Tensor,
        height: usize,
        width: usize,
    ) -> TensorResult<Tensor> {
        let extra = Extra {
            scaled: Some((height, width)),
            ..Extra::default()
        };
        self.apply(cx, x, extra)
    }

    /// Computes `rows` of the output of x [b, h, w, in] alone, plus `residual` [b, rows, w', out].
    pub fn forward_rows(
        &self,
        cx: Forward,
        x: &Tensor,
        rows: Range<usize>,
        residual: Option<&Tensor>,
    ) -> TensorResult<Tensor> {
        let extra = Extra {
            rows: Some(rows),
            residual,
            ..Extra::default()
        };
        self.apply(cx, x, extra)
    }

    /// Computes `rows` of the output of x scaled to twice its height and width.
    pub fn forward_rows_doubled(
        &self,
        cx: Forward,
        x: &Tensor,
        rows: Range<usize>,
    ) -> TensorResult<Tensor> {
        let (_, h, w, _) = x.dims4()?;
        let extra = Extra {
            rows: Some(rows),
            scaled: Some((2 * h, 2 * w)),
            ..Extra::default()
        };
        self.apply(cx, x, extra)
    }

    fn apply(&self, cx: Forward, x: &Tensor, extra: Extra) -> TensorResult<Tensor> {
        let Extra {
            scaled,
            rows,
            shift,
            residual,
        } = extra;
        let (b, h, w, c) = x.dims4()?;
        let (h, w) = scaled.unwrap_or((h, w));
        let out = |n: usize| {
            (n + self.padding.0 + self.padding.1 + self.stride).saturating_sub(self.size)
                / self.stride
        };
        let rows = rows.unwrap_or(0..out(h));
        let kind = ["convolution", "convolution 3x3"][usize::from(self.size == 3)];
        let sides = [
            b * rows.len() * out(w),
            self.size * self.size * c,
            self.bias.dim(0)?,
        ];
        cx.timed(kind, sides, || {
            let conv = Conv {
                size: self.size,
                stride: self.stride,
                padding: self.padding,
                padding_modes: cx.padding,
                scaled,
                rows,
                width: out(w),
                bias: &self.bias,
                shift,
                residual: residual.map(Tensor::contiguous).transpose()?,
                slope: self.slope.as_ref(),
                precision: cx.precision,
            };
            self.weight.conv2d(x, conv)
        })
    }
}

/// Group normalisation over [b, h, w, c], optionally followed by SiLU (Wu & He 2018, arXiv
/// 1803.08494).
pub struct GroupNorm(GroupNormParams);

impl GroupNorm {
    /// Reads `weight` and `bias` `[channels]`. Errors if the groups do not divide the channels.
    pub fn new(w: &Weights, groups: usize, channels: usize, eps: f64) -> Result<Self> {
        if groups == 0 || !channels.is_multiple_of(groups) {
            bail!("norm_num_groups {groups} does not divide {channels} channels");
        }
        Ok(Self(GroupNormParams {
            weight: w.get("weight", &[channels])?,
            bias: w.get("bias", &[channels])?,
            groups,
            eps,
        }))
    }

    /// Normalises [b, h, w, c].
    pub fn forward(&self, cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
        let x = x.contiguous()?;
        self.bind(cx, &[&x])?.apply(&x, None, None, false)
    }

    /// Normalises and applies `activation`, in one pass where the backend can.
    pub fn forward_act(
        &self,
        cx: Forward,
        x: &Tensor,
        activation: Activation,
    ) -> TensorResult<Tensor> {
        let x = x.contiguous()?;
        self.bind(cx, &[&x])?
            .forward_act(&x, None, None, activation)
    }

    /// Computes the statistics of a batch of images in bands of rows from top to bottom, [b, rows,
    /// w, c] each and contiguous.
    pub fn bind<'a>(
        &'a self,
        cx: Forward<'a>,
        bands: &[&Tensor],
    ) -> TensorResult<BoundGroupNorm<'a>> {
        let Self(norm) = self;
        let sides = [bands.iter().map(|x| x.elem_count()).sum(), 0, 0];
        let statistics = cx.timed("group norm", sides, || {
            cx.backend.group_statistics(bands, norm)
        })?;
        Ok(BoundGroupNorm {
            norm,
            cx,
            statistics,
        })
    }
}

/// A group norm with the statistics of a batch of images.
pub struct BoundGroupNorm<'a> {
    norm: &'a GroupNormParams,
    cx: Forward<'a>,
    statistics: GroupStatistics,
}

impl BoundGroupNorm<'_> {
    /// Normalises rows of the images with their halo, and applies `activation`: [b, rows, w, c],
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
            self.statistics.normalise(x, above, below, self.norm, silu)
        })
    }
}

/// Layer normalisation over the last dimension (Ba et al. 2016, arXiv 1607.06450).
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Reads `weight` and `bias` `[width]`.
    pub fn new(w: &Weights, width: usize, eps: f64) -> Result<Self> {
        Ok(Self {
            weight: w.get("weight", &[width])?,
            bias: w.get("bias", &[width])?,
            eps,
        })
    }

    /// Normalises [.., width].
    pub fn forward(&self, cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
        let Self { weight, bias, eps } = self;
        cx.timed("layer norm", [x.elem_count(), 0, 0], || {
            cx.backend.layer_norm(x, weight, bias, *eps)
        })
    }
}

impl LayerNorm {
    /// The norm of networks whose modulation scales and shifts instead of weights.
    pub fn without_weights(w: &Weights, width: usize, eps: f64) -> Result<Self> {
        let weight = w.constant(1.0, width)?;
        let bias = w.constant(0.0, width)?;
        Ok(Self { weight, bias, eps })
    }
}

/// Root mean square normalisation over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467).
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Reads `weight` `[width]`.
    pub fn new(w: &Weights, width: usize, eps: f64) -> Result<Self> {
        Ok(Self {
            weight: w.get("weight", &[width])?,
            eps,
        })
    }

    /// Normalises [.., width], with sums in f32.
    pub fn forward(&self, cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
        cx.timed("rms norm", [x.elem_count(), 0, 0], || {
            candle_nn::ops::rms_norm(&x.contiguous()?, &self.weight, self.eps as f32)
        })
    }
}

/// Applies SiLU to the first half of the last dimension and multiplies it by the second (SwiGLU,
/// Shazeer 2020, arXiv 2002.05202): [.., 2n] -> [.., n].
pub fn swiglu(cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
    cx.timed("swiglu", [x.elem_count(), 0, 0], || cx.backend.swiglu(x))
}

/// GELU of every element, by the tangent's formula.
pub fn gelu_tanh(cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
    cx.timed("gelu", [x.elem_count(), 0, 0], || cx.backend.gelu_tanh(x))
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
    /// Parses the name that a configuration gives under `key`.
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

    /// Applies the function to every element.
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

/// Concatenates [b, h, w, c] and [b, h, w, d] -> [b, h, w, c + d].
pub fn concat(cx: Forward, a: &Tensor, b: &Tensor) -> TensorResult<Tensor> {
    cx.timed("concat", [a.elem_count() + b.elem_count(), 0, 0], || {
        cx.backend.concat(a, b)
    })
}

/// Whether no value is NaN or infinite.
pub fn is_finite(x: &Tensor) -> TensorResult<bool> {
    Ok(x.to_dtype(DType::F32)?
        .abs()?
        .sum_all()?
        .to_scalar::<f32>()?
        .is_finite())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::nn::testing::{normal, tolerance};
    use crate::nn::{PaddingMode, plain};
    use candle_core::{Device, IndexOp, Tensor};

    /// The largest difference; NaN where there is one, where a kernel did not write.
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
        let weight = normal(1f32, 0.5, channels);
        let bias = normal(0f32, 0.5, channels);
        GroupNorm(GroupNormParams {
            weight,
            bias,
            groups,
            eps: 1e-5,
        })
    }

    fn layer_norm(width: usize) -> LayerNorm {
        let GroupNorm(GroupNormParams {
            weight, bias, eps, ..
        }) = group_norm(width, 1);
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
            let x = (normal(0f32, 1.0, (n % 3 + 1, h, w, c)) + 3.0).unwrap();
            let norm = group_norm(c, groups);
            let plain =
                plain::group_norm(&x, &norm.0.weight, &norm.0.bias, groups, norm.0.eps).unwrap();
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
        let x = (normal(0f32, 1.0, (b, h, w, c)) + 1000.0).unwrap();
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
            &norm.0.weight,
            &norm.0.bias,
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
            let bias = norm.0.bias.broadcast_as(x.shape()).unwrap();
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
            let x = normal(1f32, 2.0, (3, h, w, c));
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
            let x = normal(0f32, 1.0, (n % 3 + 1, 77, width));
            let norm = layer_norm(width);
            let plain = plain::layer_norm(&x, &norm.weight, &norm.bias, norm.eps).unwrap();
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
            let x = normal(0f32, 1.0, (b, h, w, inputs));
            let weight = normal(0f32, 0.3, (outputs, inputs, size, size));
            let bias = normal(0f32, 1.0, outputs);
            if h + padding.0 + padding.1 < size {
                continue;
            }
            let plain = plain::conv2d(&x, &weight, stride, padding, modes)
                .unwrap()
                .broadcast_add(&bias)
                .unwrap();
            let conv = Conv2d {
                weight: WeightLayout::new(Backend::Cpu, &weight, false).unwrap(),
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
                ) < tolerance(1e-4, 5e-4)
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
                ) < tolerance(1e-4, 5e-4)
            );
            assert!(
                worst(&conv.forward(cpu().padded(modes), &x).unwrap(), &plain)
                    < tolerance(1e-4, 5e-4),
                "{b}x{h}x{w}, size {size}, stride {stride}, padding {padding:?}, {modes:?}"
            );
            let added = plain::leaky_relu(&(&plain + &residual).unwrap(), &shift).unwrap();
            assert!(
                worst(
                    &conv
                        .leaky(shift)
                        .forward_add(cpu().padded(modes), &x, None, Some(&residual))
                        .unwrap(),
                    &added
                ) < tolerance(1e-4, 5e-4)
            );
        }
    }

    #[test]
    fn concatenation_equals_candles_own() {
        for (h, w) in [(1, 1), (3, 5), (33, 65)] {
            let [x, other] = [7, 12].map(|c| normal(0f32, 1.0, (3, h, w, c)));
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
    fn swiglu_kernel_equals_its_plain_composition() {
        for (rows, width) in [(1, 1), (5, 17), (40, 96)] {
            let x = normal(0f32, 1.0, (2, rows, 2 * width));
            let (y, expected) = (swiglu(cpu(), &x).unwrap(), plain::swiglu(&x).unwrap());
            assert_eq!(y.dims(), expected.dims());
            assert!(worst(&y, &expected) < 1e-5);
        }
        assert!(swiglu(cpu(), &normal(0f32, 1.0, (2, 3))).is_err());
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
            let x = normal(0f32, 1.0, (b, h, w, 19));
            let weight = normal(0f32, 0.3, (35, 19, size, size));
            let bias = normal(0f32, 1.0, 35);
            let padding = (size / 2, size / 2);
            let plain = plain::conv2d(
                &plain::scale_nearest(&x, to_h, to_w).unwrap(),
                &weight,
                1,
                padding,
                modes,
            )
            .unwrap()
            .broadcast_add(&bias)
            .unwrap();
            let conv = Conv2d {
                weight: WeightLayout::new(Backend::Cpu, &weight, false).unwrap(),
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
                ) < tolerance(1e-4, 5e-4),
                "{h}x{w} to {to_h}x{to_w}, {modes:?}"
            );
        }
    }

    #[test]
    fn product_kernel_equals_its_plain_composition() {
        let random = |shape: &[usize]| normal(0f32, 1.0, shape);
        let tolerance = tolerance(2e-6, 2e-5);
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
                    let weight = WeightLayout::new(Backend::Cpu, &stored, gated).unwrap();
                    let layer = Linear {
                        weight,
                        bias: bias.cloned(),
                        inputs: k,
                        outputs: n,
                        gated,
                    };
                    let plain = plain::gemm(&x, &wide, bias, residual, gated).unwrap();
                    let largest = worst(&plain, &plain.zeros_like().unwrap());
                    assert!(
                        worst(&layer.apply(cpu(), &x, residual).unwrap(), &plain)
                            < tolerance * largest.max(1.0),
                        "{m} {k} {n} {dtype:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn products_and_attention_give_the_same_bits_on_any_number_of_threads() {
        let random = |shape: &[usize]| normal(0f32, 1.0, shape);
        let (x, weight, bias) = (random(&[2, 700, 320]), random(&[640, 320]), random(&[640]));
        let layer = Linear {
            weight: WeightLayout::new(Backend::Cpu, &weight, true).unwrap(),
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
