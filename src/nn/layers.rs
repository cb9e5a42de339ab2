//! Linear, convolution, normalisation and activation layers.

use super::cost::measured;
use super::cpu;
use crate::weights::Weights;
use anyhow::{Result, bail};
use candle_core::{D, Module, Result as TensorResult, Tensor};

/// y = x W' + b over the last dimension.
pub struct Linear {
    /// [in, out]
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// Reads `weight` [out, in] and `bias` [out].
    pub fn new(w: &Weights, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self { bias: Some(w.get("bias", &[outputs])?), ..Self::without_bias(w, inputs, outputs)? })
    }

    /// Reads `weight` [out, in] alone.
    pub fn without_bias(w: &Weights, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self { weight: w.get("weight", &[outputs, inputs])?.t()?, bias: None })
    }

    /// [.., in] -> [.., out].
    pub fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        self.apply(x, None)
    }

    /// [.., in] -> [.., out], plus `residual` of that many elements.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> TensorResult<Tensor> {
        self.apply(x, Some(residual))
    }

    fn apply(&self, x: &Tensor, residual: Option<&Tensor>) -> TensorResult<Tensor> {
        let mut shape = x.dims().to_vec();
        let inputs = self.weight.dim(0)?;
        let flat = x.reshape(((), inputs))?; // [rows, in]
        let outputs = self.weight.dim(1)?;
        let residual = residual.map(|r| r.reshape(((), outputs))?.contiguous()).transpose()?;
        let y = measured(("linear", [flat.dim(0)?, inputs, outputs]), || product(&flat, &self.weight, self.bias.as_ref(), residual))?; // [rows, out]
        if let Some(last) = shape.last_mut() {
            *last = outputs;
        }
        y.reshape(shape)
    }
}

/// A 2D convolution over [b, h, w, c].
pub struct Conv2d {
    kernel: Kernel,
    bias: Tensor,
    size: usize,
    stride: usize,
    /// zeros added: (before, after) in both directions
    padding: (usize, usize),
}

/// The weights in the layout that their device wants.
enum Kernel {
    /// CPU: [panels, k*k*in, width], the right sides of matrix products
    Packed(Tensor),
    /// GPU: [out, in, k, k] for candle's own convolution
    Oihw(Tensor),
}

impl Conv2d {
    /// Reads `weight` [out, in, k, k] and `bias` [out]; stride 1, and padding that keeps height and width.
    pub fn new(w: &Weights, inputs: usize, outputs: usize, size: usize) -> Result<Self> {
        Self::strided(w, inputs, outputs, size, 1, (size / 2, size / 2))
    }

    /// The same with stride and padding (before, after).
    pub fn strided(w: &Weights, inputs: usize, outputs: usize, size: usize, stride: usize, padding: (usize, usize)) -> Result<Self> {
        let weight = w.get("weight", &[outputs, inputs, size, size])?;
        let bias = w.get("bias", &[outputs])?;
        let kernel = if w.device().is_cpu() {
            Kernel::Packed(weight.contiguous()?.apply_op1_no_bwd(&cpu::Conv2d { size, stride, padding, residual: None }.pack())?)
        } else {
            Kernel::Oihw(weight)
        };
        Ok(Self { kernel, bias, size, stride, padding })
    }

    /// [b, h, w, in] -> [b, h', w', out].
    pub fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        self.forward_add(x, None, None)
    }

    /// [b, h, w, in] -> [b, h', w', out], plus `shift` [out] everywhere, plus `residual` [b, h', w', out].
    pub fn forward_add(&self, x: &Tensor, shift: Option<&Tensor>, residual: Option<&Tensor>) -> TensorResult<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let out = |n: usize| (n + self.padding.0 + self.padding.1 + self.stride).saturating_sub(self.size) / self.stride;
        let kind = ["convolution", "convolution 3x3"][usize::from(self.size == 3)];
        let layer = (kind, [b * out(h) * out(w), self.size * self.size * c, self.bias.dim(0)?]);
        measured(layer, || self.apply(x, shift, residual))
    }

    fn apply(&self, x: &Tensor, shift: Option<&Tensor>, residual: Option<&Tensor>) -> TensorResult<Tensor> {
        let bias = match shift {
            Some(shift) => (&self.bias + shift)?,
            None => self.bias.clone(),
        };
        match &self.kernel {
            Kernel::Packed(weight) => {
                let residual = residual.map(Tensor::contiguous).transpose()?;
                let op = cpu::Conv2d { size: self.size, stride: self.stride, padding: self.padding, residual };
                x.contiguous()?.apply_op3_no_bwd(weight, &bias, &op)
            }
            Kernel::Oihw(weight) => {
                let y = conv2d_plain(x, weight, self.stride, self.padding)?.broadcast_add(&bias)?;
                residual.map_or(Ok(y.clone()), |residual| y + residual)
            }
        }
    }
}

/// The same by candle's own convolution: the path of devices without a kernel, and its oracle. Weight [out, in, k, k].
fn conv2d_plain(x: &Tensor, weight: &Tensor, stride: usize, (before, after): (usize, usize)) -> TensorResult<Tensor> {
    let (x, padding) = if before == after { (x.clone(), before) } else { (pad(x, before, after)?, 0) };
    let x = x.permute((0, 3, 1, 2))?.contiguous()?; // [b, in, h, w]
    x.conv2d(weight, padding, stride, 1, 1)?.permute((0, 2, 3, 1))?.contiguous() // [b, h', w', out]
}

/// x [m, k] times weight [k, n], plus bias [n], plus residual [m, n].
fn product(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, residual: Option<Tensor>) -> TensorResult<Tensor> {
    if !x.device().is_cpu() {
        return product_plain(x, weight, bias, residual.as_ref());
    }
    let op = cpu::Product { residual };
    match bias {
        Some(bias) => x.contiguous()?.apply_op3_no_bwd(weight, bias, &op),
        None => x.contiguous()?.apply_op2_no_bwd(weight, &op),
    }
}

/// The same as a composition of candle's operations: the path of devices without a kernel, and its oracle.
fn product_plain(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, residual: Option<&Tensor>) -> TensorResult<Tensor> {
    let mut y = x.matmul(weight)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    if let Some(residual) = residual {
        y = (y + residual)?;
    }
    Ok(y)
}

/// Zeros around [b, h, w, c].
fn pad(x: &Tensor, before: usize, after: usize) -> TensorResult<Tensor> {
    if before + after == 0 {
        return x.contiguous();
    }
    x.pad_with_zeros(1, before, after)?.pad_with_zeros(2, before, after)?.contiguous()
}

/// Group normalisation over [b, h, w, c], optionally followed by SiLU (Wu & He 2018, arXiv 1803.08494).
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
        Ok(Self { weight: w.get("weight", &[channels])?, bias: w.get("bias", &[channels])?, groups, eps })
    }

    /// Normalises [b, h, w, c].
    pub fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        self.apply(x, false)
    }

    /// Normalises and applies `activation`, in one pass where the device can.
    pub fn forward_act(&self, x: &Tensor, activation: Activation) -> TensorResult<Tensor> {
        match activation {
            Activation::Silu => self.apply(x, true),
            other => other.forward(&self.apply(x, false)?),
        }
    }

    fn apply(&self, x: &Tensor, silu: bool) -> TensorResult<Tensor> {
        measured(("group norm", [x.elem_count(), 0, 0]), || self.run(x, silu))
    }

    fn run(&self, x: &Tensor, silu: bool) -> TensorResult<Tensor> {
        if x.device().is_cpu() {
            let op = cpu::GroupNorm { groups: self.groups, eps: self.eps, silu };
            return x.contiguous()?.apply_op3_no_bwd(&self.weight, &self.bias, &op);
        }
        let y = group_norm_plain(x, &self.weight, &self.bias, self.groups, self.eps)?;
        if silu { candle_nn::ops::silu(&y) } else { Ok(y) }
    }
}

/// Group normalisation as a composition of candle's operations: the path of devices without a kernel, and its oracle.
fn group_norm_plain(x: &Tensor, weight: &Tensor, bias: &Tensor, groups: usize, eps: f64) -> TensorResult<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let dtype = x.dtype();
    let x = x.to_dtype(candle_core::DType::F32)?.reshape((b, h * w, groups, c / groups))?;
    let mean = x.mean_keepdim(3)?.mean_keepdim(1)?; // [b, 1, groups, 1]
    let x = x.broadcast_sub(&mean)?;
    let variance = x.sqr()?.mean_keepdim(3)?.mean_keepdim(1)?;
    let x = x.broadcast_div(&(variance + eps)?.sqrt()?)?.reshape((b, h, w, c))?.to_dtype(dtype)?;
    x.broadcast_mul(weight)?.broadcast_add(bias)
}

/// Layer normalisation over the last dimension (Ba et al. 2016).
pub struct LayerNorm(candle_nn::LayerNorm);

impl LayerNorm {
    /// Reads `weight` and `bias` [width].
    pub fn new(w: &Weights, width: usize, eps: f64) -> Result<Self> {
        Ok(Self(candle_nn::LayerNorm::new(w.get("weight", &[width])?, w.get("bias", &[width])?, eps)))
    }

    /// Normalises [.., width].
    pub fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        measured(("layer norm", [x.elem_count(), 0, 0]), || self.0.forward(x))
    }
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
            other => bail!("`{key}` is `{other}`, which sdgen does not know\n\nhint: silu, gelu, quick_gelu, relu and mish are supported"),
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

/// Gated linear unit (Shazeer 2020, arXiv 2002.05202): [.., 2n] -> [.., n], the first half times the exact GELU of the second.
pub fn geglu(x: &Tensor) -> TensorResult<Tensor> {
    measured(("geglu", [x.elem_count(), 0, 0]), || {
        if x.device().is_cpu() { x.contiguous()?.apply_op1_no_bwd(&cpu::Geglu) } else { geglu_plain(x) }
    })
}

/// The same as a composition of candle's operations: the path of devices without a kernel, and its oracle.
fn geglu_plain(x: &Tensor) -> TensorResult<Tensor> {
    let halves = x.chunk(2, D::Minus1)?;
    let [x, gate] = halves.as_slice() else { candle_core::bail!("an odd width cannot be halved") };
    x * gate.gelu_erf()?
}

/// Nearest-neighbour scaling of [b, h, w, c] to `height` x `width`.
pub fn upsample_nearest(x: &Tensor, height: usize, width: usize) -> TensorResult<Tensor> {
    measured(("upsample", [x.elem_count(), 0, 0]), || {
        if x.device().is_cpu() {
            return x.contiguous()?.apply_op1_no_bwd(&cpu::Upsample { height, width });
        }
        upsample_plain(x, height, width)
    })
}

/// The same as a composition of candle's operations: the path of devices without a kernel, and its oracle.
fn upsample_plain(x: &Tensor, height: usize, width: usize) -> TensorResult<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    if height == 2 * h && width == 2 * w {
        let x = x.reshape((b, h, 1, w, 1, c))?.broadcast_as((b, h, 2, w, 2, c))?;
        return x.reshape((b, height, width, c));
    }
    let index = |to: usize, from: usize| Tensor::from_iter((0..to).map(|i| (i * from / to) as u32), x.device());
    x.contiguous()?.index_select(&index(height, h)?, 1)?.index_select(&index(width, w)?, 2)
}

/// [b, h, w, c] and [b, h, w, d] side by side -> [b, h, w, c + d].
pub fn concat(a: &Tensor, b: &Tensor) -> TensorResult<Tensor> {
    measured(("concat", [a.elem_count() + b.elem_count(), 0, 0]), || {
        if a.device().is_cpu() { a.contiguous()?.apply_op2_no_bwd(&b.contiguous()?, &cpu::Concat) } else { Tensor::cat(&[a, b], 3) }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::{Device, IndexOp, Tensor};

    fn worst(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn group_norm_kernel_equals_its_plain_composition() {
        for (b, h, w, c, groups) in [(1, 1, 1, 8, 2), (2, 7, 5, 12, 3), (3, 33, 17, 32, 32), (1, 65, 67, 20, 4)] {
            let x = (Tensor::randn(0f32, 1.0, (b, h, w, c), &Device::Cpu).unwrap() + 3.0).unwrap();
            let weight = Tensor::randn(1f32, 0.5, c, &Device::Cpu).unwrap();
            let bias = Tensor::randn(0f32, 0.5, c, &Device::Cpu).unwrap();
            let plain = group_norm_plain(&x, &weight, &bias, groups, 1e-5).unwrap();
            let norm = GroupNorm { weight, bias, groups, eps: 1e-5 };
            // f32 rounding of sums in another order
            assert!(worst(&norm.forward(&x).unwrap(), &plain) < 2e-5);
            let silu = candle_nn::ops::silu(&plain).unwrap();
            assert!(worst(&norm.forward_act(&x, Activation::Silu).unwrap(), &silu) < 2e-5);
        }
    }

    #[test]
    fn geglu_kernel_equals_its_plain_composition() {
        for shape in [(1, 1, 2), (2, 77, 130), (3, 65, 1280)] {
            let x = Tensor::randn(0f32, 3.0, shape, &Device::Cpu).unwrap();
            assert!(worst(&geglu(&x).unwrap(), &geglu_plain(&x).unwrap()) < 1e-6 * 20.0);
        }
    }

    #[test]
    fn convolution_kernel_equals_candles_own() {
        let sizes = [(1, 1), (2, 3), (9, 6), (17, 33), (65, 67)];
        let kinds = [(3, 1, (1, 1)), (3, 2, (1, 1)), (3, 2, (0, 1)), (1, 1, (0, 0)), (5, 1, (2, 2))];
        for ((b, (h, w)), (size, stride, padding)) in (1..).zip(sizes).flat_map(|s| kinds.map(|k| (s, k))) {
            let (b, inputs, outputs) = (b % 3 + 1, if size == 3 { 35 } else { 5 }, 7);
            let x = Tensor::randn(0f32, 1.0, (b, h, w, inputs), &Device::Cpu).unwrap();
            let weight = Tensor::randn(0f32, 0.3, (outputs, inputs, size, size), &Device::Cpu).unwrap();
            let bias = Tensor::randn(0f32, 1.0, outputs, &Device::Cpu).unwrap();
            if h + padding.0 + padding.1 < size {
                continue;
            }
            let plain = conv2d_plain(&x, &weight, stride, padding).unwrap().broadcast_add(&bias).unwrap();
            let packed = weight.apply_op1_no_bwd(&cpu::Conv2d { size, stride, padding, residual: None }.pack()).unwrap();
            let conv = Conv2d { kernel: Kernel::Packed(packed), bias, size, stride, padding };
            let [shift, residual] = [&plain.i((0, 0, 0)).unwrap(), &plain].map(|like| like.rand_like(-1.0, 1.0).unwrap());
            let added = (plain.broadcast_add(&shift).unwrap() + &residual).unwrap();
            assert!(worst(&conv.forward_add(&x, Some(&shift), Some(&residual)).unwrap(), &added) < 1e-4);
            assert!(worst(&conv.forward(&x).unwrap(), &plain) < 1e-4, "{b}x{h}x{w}, size {size}, stride {stride}, padding {padding:?}");
        }
    }

    #[test]
    fn copies_equal_candles_own() {
        for ((h, w), (to_h, to_w)) in [((1, 1), (2, 2)), ((3, 5), (6, 10)), ((4, 3), (7, 5)), ((33, 65), (66, 130)), ((2, 2), (1, 5))] {
            let [x, other] = [7, 12].map(|c| Tensor::randn(0f32, 1.0, (3, h, w, c), &Device::Cpu).unwrap());
            assert_eq!(worst(&upsample_nearest(&x, to_h, to_w).unwrap(), &upsample_plain(&x, to_h, to_w).unwrap()), 0.0);
            assert_eq!(worst(&concat(&x, &other).unwrap(), &Tensor::cat(&[&x, &other], 3).unwrap()), 0.0);
        }
    }

    #[test]
    fn product_kernel_equals_candles_own() {
        for (m, k, n) in [(1, 1, 1), (3, 77, 5), (65, 33, 130), (4, 320, 67)] {
            let x = Tensor::randn(0f32, 1.0, (m, k), &Device::Cpu).unwrap();
            let weight = Tensor::randn(0f32, 1.0, (n, k), &Device::Cpu).unwrap().t().unwrap();
            let bias = Tensor::randn(0f32, 1.0, n, &Device::Cpu).unwrap();
            let residual = Tensor::randn(0f32, 1.0, (m, n), &Device::Cpu).unwrap();
            for (bias, residual) in [(None, None), (Some(&bias), None), (None, Some(&residual)), (Some(&bias), Some(&residual))] {
                let kernel = product(&x, &weight, bias, residual.cloned()).unwrap();
                assert!(worst(&kernel, &product_plain(&x, &weight, bias, residual).unwrap()) < 1e-4);
            }
        }
    }
}
