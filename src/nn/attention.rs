//! Scaled dot-product attention.

use super::cost::measured;
use super::cpu;
use candle_core::{Result, Tensor};

/// Scores held at once by the plain path, in elements: 4,096 tokens in 8 heads would need 0.5 GiB a picture.
const MAX_SCORES: usize = 1 << 23;

/// softmax(q k' / sqrt(d)) v for q [b, n, heads*d] and k, v [b, m, heads*d], giving [b, n, heads*d].
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, n, c) = q.dims3()?;
    // the scores, and their product with v
    measured(("attention", [2 * b * n, k.dim(1)?, c]), || {
        if q.device().is_cpu() {
            return q.contiguous()?.apply_op3_no_bwd(&k.contiguous()?, &v.contiguous()?, &cpu::Attention { heads });
        }
        attention_plain(q, k, v, heads, None)
    })
}

/// The same as a composition of candle's operations, in slices of queries: the path of devices without a kernel, and its
/// oracle. `mask` [n, m] is added to the scores.
pub fn attention_plain(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Option<&Tensor>) -> Result<Tensor> {
    let (b, n, c) = q.dims3()?;
    let m = k.dim(1)?;
    let d = c / heads;
    let scale = 1.0 / (d as f64).sqrt();
    let split = |x: &Tensor, len: usize| x.reshape((b, len, heads, d))?.transpose(1, 2)?.contiguous(); // [b, heads, len, d]
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
    use super::*;
    use candle_core::Device;

    #[test]
    fn attention_kernel_equals_its_plain_composition() {
        for (b, n, m, heads, d) in [(1, 1, 1, 1, 8), (2, 65, 77, 3, 40), (3, 67, 67, 2, 64), (1, 1100, 1100, 1, 160), (2, 30, 1, 5, 7)] {
            let random = |len: usize| Tensor::randn(0f32, 2.0, (b, len, heads * d), &Device::Cpu).unwrap();
            let (q, k, v) = (random(n), random(m), random(m));
            let difference = (attention(&q, &k, &v, heads).unwrap() - attention_plain(&q, &k, &v, heads, None).unwrap()).unwrap();
            // sums of up to m weighted values around 2, and another exp
            let worst = difference.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            assert!(worst < 5e-5, "{b}x{n} to {m}, {heads} heads of {d}: {worst:e}");
        }
    }
}
