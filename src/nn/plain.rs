//! The operations of layers as compositions of candle's own: [`super::Backend::Plain`], and the
//! reference that every kernel is compared with.

use super::PaddingMode;
use candle_core::{D, DType, Module, Result, Tensor};

/// Attention scores held at once, in elements: 4,096 tokens in 8 heads would need 0.5 GiB an image.
const MAX_SCORES: usize = 1 << 23;

/// Elements of the largest im2col buffer: candle's kernels index it with 32 bits, and an image of
/// 1024x1024 pixels would need 10 GB of it in the VAE.
const MAX_IM2COL: usize = 1 << 28;

/// x [m, k] times weight [n, k], plus bias `[n]`, plus residual [m, n]. With `gated`, [m, n/2]: the
/// first half of the columns times the exact GELU of the second.
pub fn gemm(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    gated: bool,
) -> Result<Tensor> {
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

/// Convolves x [b, h, w, in] by weight [out, in, k, k], in bands of rows so that the im2col buffer
/// is bounded.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    stride: usize,
    padding: (usize, usize),
    padding_modes: [PaddingMode; 2],
) -> Result<Tensor> {
    conv2d_banded(x, weight, stride, padding, padding_modes, MAX_IM2COL)
}

/// The same with a bound of the im2col buffer, in elements; at least one row is convolved at once.
fn conv2d_banded(
    x: &Tensor,
    weight: &Tensor,
    stride: usize,
    padding: (usize, usize),
    padding_modes: [PaddingMode; 2],
    max_im2col: usize,
) -> Result<Tensor> {
    let ((b, h, w, c), size) = (x.dims4()?, weight.dim(3)?);
    let out = |n: usize| (n + padding.0 + padding.1 + stride).saturating_sub(size) / stride;
    let rows = (max_im2col / (b * out(w) * c * size * size).max(1)).clamp(1, out(h).max(1));
    let is_candles =
        padding.0 == padding.1 && padding_modes == [PaddingMode::Zeros; 2] && rows >= out(h);
    let (x, padding) = if is_candles {
        (x.clone(), padding.0)
    } else {
        (pad(x, padding, padding_modes)?, 0)
    };
    let x = x.permute((0, 3, 1, 2))?.contiguous()?; // [b, in, h, w]
    let band = |top: usize| {
        let seen = || {
            x.narrow(
                2,
                top * stride,
                (rows.min(out(h) - top) - 1) * stride + size,
            )?
            .contiguous()
        };
        if is_candles { x.clone() } else { seen()? }.conv2d(weight, padding, stride, 1, 1)
    };
    let bands = (0..out(h))
        .step_by(rows)
        .map(band)
        .collect::<Result<Vec<_>>>()?;
    Tensor::cat(&bands, 2)?.permute((0, 2, 3, 1))?.contiguous() // [b, h', w', out]
}

/// Pads rows and columns of [b, h, w, c].
fn pad(x: &Tensor, (before, after): (usize, usize), modes: [PaddingMode; 2]) -> Result<Tensor> {
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

/// Leaky ReLU of [.., c] with a slope `[c]` below 0.
pub fn leaky_relu(x: &Tensor, slope: &Tensor) -> Result<Tensor> {
    x.relu()? + x.minimum(0.0)?.broadcast_mul(slope)?
}

/// Scales [b, h, w, c] to `height` x `width`, each pixel from the nearest one before it.
pub fn scale_nearest(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
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

/// Group normalisation of [b, h, w, c].
pub fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let dtype = x.dtype();
    let x = x
        .to_dtype(DType::F32)?
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

/// SiLU of the first half of the last dimension times its second half: [.., 2n] -> [.., n].
pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    let halves = x.chunk(2, D::Minus1)?;
    let [gate, x] = halves.as_slice() else {
        candle_core::bail!("an odd width cannot be halved")
    };
    candle_nn::ops::silu(&gate.contiguous()?)? * x
}

/// Layer normalisation over the last dimension.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    candle_nn::LayerNorm::new(weight.clone(), bias.clone(), eps).forward(x)
}

/// softmax(q k' / sqrt(d) + mask) v for q [b, n, heads*d], k and v [b, m, heads*d] and mask [n, m],
/// giving [b, n, heads*d]; in slices of queries.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    let (b, n, c) = q.dims3()?;
    let m = k.dim(1)?;
    let d = c / heads;
    let scale = 1.0 / (d as f64).sqrt();
    let split =
        |x: &Tensor, len: usize| x.reshape((b, len, heads, d))?.transpose(1, 2)?.contiguous(); // [b, heads, len, d]
    let q = (split(q, n)? * scale)?;
    let k = split(k, m)?.transpose(2, 3)?; // [b, heads, d, m]
    let v = split(v, m)?;
    let rows = (MAX_SCORES / (b * heads * m)).clamp(1, n);
    let mut parts = Vec::with_capacity(n.div_ceil(rows));
    for start in (0..n).step_by(rows) {
        let len = rows.min(n - start);
        let mut scores = q.narrow(2, start, len)?.contiguous()?.matmul(&k)?; // [b, heads, len, m]
        if let Some(mask) = mask {
            scores = scores.broadcast_add(&mask.narrow(0, start, len)?)?;
        }
        let weights = candle_nn::ops::softmax_last_dim(&scores)?;
        parts.push(weights.matmul(&v)?); // [b, heads, len, d]
    }
    Tensor::cat(&parts, 2)?.transpose(1, 2)?.reshape((b, n, c)) // [b, n, heads*d]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::PaddingMode::{Circular, Zeros};
    use super::*;
    use crate::nn::testing::normal;

    fn worst(a: &Tensor, b: &Tensor) -> f32 {
        let off = (a - b).unwrap().abs().unwrap().max_all().unwrap();
        off.to_scalar().unwrap()
    }

    #[test]
    fn a_convolution_in_bands_is_that_of_the_whole() {
        let modes = [
            [Zeros; 2],
            [Zeros, Circular],
            [Circular, Zeros],
            [Circular; 2],
        ];
        let sizes = [
            (7, 5, 3, 1, (1, 1)),
            (9, 4, 3, 2, (1, 1)),
            (8, 6, 3, 2, (0, 1)),
            (5, 6, 1, 1, (0, 0)),
            (2, 9, 5, 1, (2, 2)),
        ];
        for ((h, w, size, stride, padding), modes) in sizes
            .into_iter()
            .flat_map(|size| modes.map(|modes| (size, modes)))
        {
            let x = normal(0f32, 1.0, (2, h, w, 3));
            let weight = normal(0f32, 0.3, (4, 3, size, size));
            let whole = conv2d(&x, &weight, stride, padding, modes).unwrap();
            let row = 2 * whole.dim(2).unwrap() * 3 * size * size;
            for max_im2col in [0, row, 2 * row, 3 * row + 1, 100 * row] {
                let parts = conv2d_banded(&x, &weight, stride, padding, modes, max_im2col).unwrap();
                assert!(
                    worst(&parts, &whole) < 1e-5,
                    "{h}x{w}, size {size}, stride {stride}, {modes:?}, {max_im2col} at once"
                );
            }
        }
    }
}
