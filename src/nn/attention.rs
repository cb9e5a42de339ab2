//! Scaled dot-product attention.

use super::layers::count_product;
use candle_core::{Result, Tensor};

/// Scores held at once, in elements: queries are taken in slices so that the score matrix stays in cache-sized memory
/// (4,096 tokens in 8 heads would need 0.5 GiB a picture).
const MAX_SCORES: usize = 1 << 23;

/// softmax(q k' / sqrt(d)) v for q [b, n, heads*d] and k, v [b, m, heads*d], giving [b, n, heads*d].
/// `mask` [n, m] is added to the scores.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Option<&Tensor>) -> Result<Tensor> {
    let (b, n, c) = q.dims3()?;
    let m = k.dim(1)?;
    let d = c / heads;
    let scale = 1.0 / (d as f64).sqrt();
    let split = |x: &Tensor, len: usize| x.reshape((b, len, heads, d))?.transpose(1, 2)?.contiguous(); // [b, heads, len, d]
    let q = (split(q, n)? * scale)?;
    let k = split(k, m)?.transpose(2, 3)?; // [b, heads, d, m]
    let v = split(v, m)?;
    count_product(2 * b * heads * n, m, d); // the scores, and their product with v
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
