//! Flash attention (Dao et al. 2022, arXiv 2205.14135).

use super::{Launch, Params, Work, int, suffix};
use crate::nn::attention::row_stride;
use candle_core::{DType, Result, Tensor};

/// The head widths of the kernels; other widths take the next larger one.
const WIDTHS: [usize; 8] = [16, 32, 48, 64, 80, 96, 128, 160];
/// Queries of a block, and keys of a tile.
const TILE: usize = 64;

/// softmax(q k' / sqrt(d)) v for q [b, n, heads*d] and k, v [b, m, heads*d], whose rows may have a
/// [`row_stride`](crate::nn::attention::row_stride).
pub struct Attention {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub heads: usize,
}

impl Attention {
    /// Whether there is a kernel for q [b, n, heads*d] and k [b, m, heads*d].
    pub fn serves(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<bool> {
        let (c, m) = (q.dim(2)?, k.dim(1)?);
        let d = c / heads;
        let aligned = |x: &Tensor| {
            x.layout().start_offset().is_multiple_of(8)
                && row_stride(x).is_none_or(|stride| stride.is_multiple_of(8))
        };
        let type_serves = matches!(q.dtype(), DType::F16 | DType::BF16);
        Ok(type_serves
            && d.is_multiple_of(8)
            && d <= WIDTHS[WIDTHS.len() - 1]
            && m > 0
            && [q, k, v].into_iter().all(aligned))
    }
}

/// As `struct Attention` of attention.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct AttentionParams {
    q: u64,
    k: u64,
    v: u64,
    y: u64,
    n: i32,
    m: i32,
    heads: i32,
    d: i32,
    strides: [i32; 3],
    scale: f32,
}

impl Work for Attention {
    fn input(&self) -> &Tensor {
        &self.q
    }

    fn launches(
        &self,
        address: &mut dyn FnMut(&Tensor) -> Result<u64>,
        output: u64,
        _scratch: u64,
    ) -> Result<Vec<Launch>> {
        let (b, n, c) = self.q.dims3()?;
        let (d, m) = (c / self.heads, self.k.dim(1)?);
        let Some(width) = WIDTHS.into_iter().find(|width| d <= *width) else {
            candle_core::bail!("heads of {d} are too wide")
        };
        let stride = |x: &Tensor| int(row_stride(x).unwrap_or(c));
        let params = AttentionParams {
            q: address(&self.q)?,
            k: address(&self.k)?,
            v: address(&self.v)?,
            y: output,
            n: int(n)?,
            m: int(m)?,
            heads: int(self.heads)?,
            d: int(d)?,
            strides: [stride(&self.q)?, stride(&self.k)?, stride(&self.v)?],
            scale: std::f32::consts::LOG2_E / (d as f32).sqrt(),
        };
        let kernel = format!("attention_{width}_{}", suffix(self.q.dtype())?);
        let grid = [n.div_ceil(TILE), b * self.heads];
        Ok(vec![Launch {
            kernel,
            grid,
            threads: 128,
            shared: 4 * TILE * (2 * width + 16),
            params: Params::new(&params),
        }])
    }
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::emulated::{random, same, wide};
    use super::*;
    use crate::nn::plain;

    #[test]
    fn the_attention_kernel_equals_its_plain_composition() {
        let sizes = [
            (1, 1, 1, 1, 8),
            (2, 65, 77, 3, 40),
            (1, 64, 64, 2, 64),
            (1, 70, 130, 1, 160),
            (2, 16, 193, 2, 80),
            (1, 5, 9, 1, 16),
        ];
        let more = [(1, 33, 65, 2, 24), (1, 64, 1, 1, 96), (1, 17, 64, 1, 128)];
        for (b, n, m, heads, d) in sizes.into_iter().chain(more) {
            for dtype in [DType::F16, DType::BF16] {
                // the parts of one product, as networks make them
                let (c, kv) = (heads * d, random(&[b, m, 2 * heads * d], dtype));
                let q = random(&[b, n, 3 * c], dtype).narrow(2, c, c).unwrap();
                let [k, v] = [0, c].map(|from| kv.narrow(2, from, c).unwrap());
                let plain = plain::attention(&wide(&q), &wide(&k), &wide(&v), heads, None).unwrap();
                assert!(Attention::serves(&q, &k, &v, heads).unwrap());
                same(
                    &super::super::run(Attention { q, k, v, heads }).unwrap(),
                    &plain,
                    &format!("{b}x{n} to {m}, {heads} heads of {d} {dtype:?}"),
                );
            }
        }
    }

    #[test]
    fn attention_of_widths_without_a_kernel_is_left_to_others() {
        let tensor =
            |c: usize, dtype| Tensor::zeros((1, 4, c), dtype, &candle_core::Device::Cpu).unwrap();
        for (c, heads, dtype) in [
            (512, 1, DType::F16),
            (15, 3, DType::F16),
            (64, 1, DType::F32),
        ] {
            let x = tensor(c, dtype);
            assert!(!Attention::serves(&x, &x, &x, heads).unwrap());
        }
    }
}
