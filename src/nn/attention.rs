//! Scaled dot-product attention.

use super::Forward;
use super::layers::RmsNorm;
use super::weights::Weights;
use candle_core::{Result, Tensor};

/// The distance of the rows of x [b, n, c] in memory, where each row is contiguous and all are
/// evenly spaced: true of a part of a wider tensor's columns.
pub fn row_stride(x: &Tensor) -> Option<usize> {
    match *x.stride() {
        [image, row, 1]
            if x.dim(0).is_ok_and(|b| b == 1) || x.dim(1).is_ok_and(|n| image == n * row) =>
        {
            Some(row)
        }
        _ => None,
    }
}

/// x itself where kernels can read its rows, else a copy.
pub(super) fn with_rows(x: &Tensor) -> Result<Tensor> {
    if row_stride(x).is_some() {
        Ok(x.clone())
    } else {
        x.contiguous()
    }
}

/// softmax(q k' / sqrt(d)) v for q [b, n, heads*d] and k, v [b, m, heads*d], giving [b, n,
/// heads*d].
pub fn attention(cx: Forward, q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, n, c) = q.dims3()?;
    // the scores, and their product with v
    cx.timed("attention", [2 * b * n, k.dim(1)?, c], || {
        cx.backend.attention(q, k, v, heads, cx.precision)
    })
}

/// The norms of the queries and keys of each head (Dehghani et al. 2023, arXiv 2302.05442).
pub struct QkNorm {
    q: RmsNorm,
    k: RmsNorm,
    heads: usize,
}

impl QkNorm {
    /// Reads the two norms, of so many heads of this width.
    pub fn new(
        w: &Weights,
        [q, k]: [&str; 2],
        (heads, width): (usize, usize),
        eps: f64,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            q: RmsNorm::new(&w.at(q), width, eps)?,
            k: RmsNorm::new(&w.at(k), width, eps)?,
            heads,
        })
    }

    /// How many heads there are.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// q and k [b, n, heads*d] of a projection [b, n, 3*heads*d], normalised, and its v.
    pub fn split(&self, cx: Forward, qkv: &Tensor) -> Result<[Tensor; 3]> {
        let (b, n, _) = qkv.dims3()?;
        let parts = qkv.chunk(3, 2)?;
        let [q, k, v] = parts.as_slice() else {
            candle_core::bail!("queries, keys and values are three")
        };
        let normed = |norm: &RmsNorm, x: &Tensor| {
            let heads = x.contiguous()?.reshape((b, n, self.heads, ()))?;
            norm.forward(cx, &heads)?.reshape((b, n, ()))
        };
        Ok([normed(&self.q, q)?, normed(&self.k, k)?, v.clone()])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::nn::plain;
    use crate::nn::testing::{normal, tolerance};
    use candle_core::Device;

    fn cpu() -> Forward<'static> {
        Forward::on(&Device::Cpu)
    }

    fn random(b: usize, len: usize, c: usize) -> Tensor {
        normal(0f32, 2.0, (b, len, c))
    }

    fn worst(a: &Tensor, b: &Tensor) -> f32 {
        (a - b)
            .unwrap()
            .abs()
            .unwrap()
            .flatten_all()
            .unwrap()
            .max(0)
            .unwrap()
            .to_scalar()
            .unwrap()
    }

    #[test]
    fn attention_kernel_equals_its_plain_composition() {
        let uneven = [
            (1, 1, 1, 1, 8),
            (2, 65, 77, 3, 40),
            (3, 67, 67, 2, 64),
            (1, 1100, 1100, 1, 160),
            (2, 30, 1, 5, 7),
        ];
        let sizes = uneven
            .into_iter()
            .chain([(1, 130, 1100, 1, 512), (2, 129, 257, 2, 72)]);
        let keys = [1, 15, 16, 17, 31, 33, 77, 129]
            .into_iter()
            .flat_map(|m| [7, 8, 40, 64, 72, 80, 160].map(|d| (2, m % 45 + 20, m, 2, d)));
        for (b, n, m, heads, d) in sizes.chain(keys) {
            let (q, k, v) = (
                random(b, n, heads * d),
                random(b, m, heads * d),
                random(b, m, heads * d),
            );
            let off = worst(
                &attention(cpu(), &q, &k, &v, heads).unwrap(),
                &plain::attention(&q, &k, &v, heads, None).unwrap(),
            );
            // scores reach 20, of which a last bit is 2e-6 and shifts weights by as much, in both;
            // values are around 2
            assert!(
                off < tolerance(2e-4, 1e-3),
                "{b}x{n} to {m}, {heads} heads of {d}: {off:e}"
            );
        }
    }

    #[test]
    fn the_key_of_a_huge_score_takes_all_weight_and_keys_of_far_lower_scores_count_alike() {
        let (n, m, d) = (35, 300, 40);
        let v = random(1, m, d);
        for strongest in [0, 77, m - 1] {
            // a query's score is `size` at one key, and its opposite at all others
            for size in [1e2f64, 1e4, 1e9] {
                let q = Tensor::ones((1, n, d), candle_core::DType::F32, &Device::Cpu).unwrap();
                let ones: Vec<f32> = (0..m * d)
                    .map(|i| if i / d == strongest { 1.0 } else { -1.0 })
                    .collect();
                let k = Tensor::from_vec(ones, (1, m, d), &Device::Cpu).unwrap();
                let k = (k * (size / (d as f64).sqrt())).unwrap();
                let y = attention(cpu(), &q, &k, &v, 1).unwrap();
                let expected = v
                    .narrow(1, strongest, 1)
                    .unwrap()
                    .repeat((1, n, 1))
                    .unwrap();
                assert!(
                    worst(&y, &expected) < tolerance(1e-5, 1e-4),
                    "{size} at {strongest}"
                );
                // all scores alike, however low
                let k = (k.narrow(1, (strongest + 1) % m, 1).unwrap())
                    .repeat((1, m, 1))
                    .unwrap();
                let y = attention(cpu(), &q, &k, &v, 1).unwrap();
                let expected = v.mean_keepdim(1).unwrap().repeat((1, n, 1)).unwrap();
                assert!(
                    worst(&y, &expected) < tolerance(1e-5, 1e-4),
                    "-{size} everywhere"
                );
            }
        }
    }

    #[test]
    fn nan_is_not_hidden() {
        let (q, k, v) = (random(1, 20, 16), random(1, 33, 16), random(1, 33, 16));
        for (row, of_k) in [(0, true), (32, true), (3, false)] {
            let mut x = if of_k { &k } else { &q }
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap();
            x[row * 16 + 5] = f32::NAN;
            let x = Tensor::from_vec(x, if of_k { k.shape() } else { q.shape() }, &Device::Cpu)
                .unwrap();
            let y = if of_k {
                attention(cpu(), &q, &x, &v, 2)
            } else {
                attention(cpu(), &x, &k, &v, 2)
            };
            let y = y.unwrap().to_vec3::<f32>().unwrap();
            for (i, y) in y[0].iter().enumerate() {
                // the first head only, and of q the row only
                assert!(
                    y[..8].iter().all(|y| y.is_nan() == (of_k || i == row))
                        && y[8..].iter().all(|y| !y.is_nan()),
                    "{y:?}"
                );
            }
        }
    }

    #[test]
    fn attention_gives_the_same_bits_on_any_number_of_threads_in_any_batch() {
        let bits = |x: Tensor| {
            x.flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
                .into_iter()
                .map(f32::to_bits)
                .collect::<Vec<_>>()
        };
        for (n, m, heads, d) in [(300, 300, 3, 40), (150, 77, 2, 24), (130, 200, 1, 512)] {
            let (q, k, v) = (
                random(3, n, heads * d),
                random(3, m, heads * d),
                random(3, m, heads * d),
            );
            let on = |threads| {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .unwrap();
                bits(
                    pool.install(|| attention(cpu(), &q, &k, &v, heads))
                        .unwrap(),
                )
            };
            let all = on(1);
            assert!(all == on(2) && all == on(5));
            for (i, alone) in all.chunks(n * heads * d).enumerate() {
                let of = |x: &Tensor| x.narrow(0, i, 1).unwrap();
                assert!(alone == bits(attention(cpu(), &of(&q), &of(&k), &of(&v), heads).unwrap()));
            }
        }
    }

    #[test]
    fn parts_of_a_wider_tensor_are_read_where_they_stand() {
        let (b, n, c) = (2, 37, 48);
        let joined = random(b, n, 3 * c);
        let [q, k, v] = [0, 1, 2].map(|i| joined.narrow(2, i * c, c).unwrap());
        assert_eq!(row_stride(&k), Some(3 * c));
        let apart = [&q, &k, &v].map(|x| x.contiguous().unwrap());
        let [y, same] = [
            attention(cpu(), &q, &k, &v, 3),
            attention(cpu(), &apart[0], &apart[1], &apart[2], 3),
        ]
        .map(|y| y.unwrap());
        assert_eq!(worst(&y, &same), 0.0);
        // rows that are not in one piece are laid out first
        let turned = q
            .transpose(1, 2)
            .unwrap()
            .contiguous()
            .unwrap()
            .transpose(1, 2)
            .unwrap();
        assert_eq!(row_stride(&turned), None);
        assert_eq!(
            worst(&attention(cpu(), &turned, &k, &v, 3).unwrap(), &same),
            0.0
        );
    }

    #[test]
    fn attention_to_nothing_is_an_error() {
        let (q, k) = (random(2, 5, 12), random(2, 4, 12));
        let none = Tensor::zeros((2, 0, 12), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(attention(cpu(), &q, &none, &none, 2).is_err());
        assert!(attention(cpu(), &q, &k, &k, 5).is_err());
        assert!(attention(cpu(), &q, &k, &random(2, 5, 12), 2).is_err());
        assert_eq!(
            attention(cpu(), &none, &k, &k, 2).unwrap().dims(),
            [2, 0, 12]
        );
    }
}
