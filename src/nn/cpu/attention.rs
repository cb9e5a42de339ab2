//! Attention without a whole score matrix: each task takes some queries of one head, so scores stay in cache.

use super::math::softmax;
use super::product::{Matrix, Output, product, slice};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, bail};
use gemm::Parallelism;
use rayon::prelude::*;

/// Scores of one task, in elements (1 MiB).
const SCORES: usize = 1 << 18;

/// q [b, n, heads*d], k and v [b, m, heads*d] -> softmax(q k' / sqrt(d)) v, [b, n, heads*d].
pub struct Attention {
    pub heads: usize,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((b, n, c), (bk, m, ck)) = (lq.shape().dims3()?, lk.shape().dims3()?);
        let (q, k, v, heads) = (slice(q, lq)?, slice(k, lk)?, slice(v, lv)?, self.heads);
        if bk != b || ck != c || lv.shape() != lk.shape() || heads == 0 || !c.is_multiple_of(heads) || m == 0 {
            bail!("attention of {:?} to {:?} in {heads} heads", lq.shape(), lk.shape());
        }
        let d = c / heads;
        let scale = 1.0 / (d as f32).sqrt();
        let rows = (SCORES / m).clamp(1, n.max(1));
        let slices = n.div_ceil(rows);
        let mut y = vec![0f32; b * n * c];
        let output = Output(y.as_mut_ptr());
        (0..b * heads * slices).into_par_iter().for_each_init(Vec::new, |scores: &mut Vec<f32>, task| {
            let (image, head, start) = (task / (heads * slices), task / slices % heads, task % slices * rows);
            let len = rows.min(n - start);
            scores.resize(len * m, 0.0);
            let (query, key) = ((image * n + start) * c + head * d, image * m * c + head * d);
            let at = |x: &[f32], offset: usize, row, column| Matrix { data: x[offset..].as_ptr(), row, column };
            // SAFETY: q and y hold [b, n, c], k and v [b, m, c], scores [len, m]; all rows and columns named here lie inside.
            // Tasks differ in image, head or rows, so no two write the same part of y.
            unsafe {
                product(len, d, m, at(q, query, c, 1), at(k, key, 1, c), scale, scores.as_mut_ptr(), m, false, Parallelism::None);
                scores.chunks_exact_mut(m).for_each(softmax);
                product(len, m, d, at(scores, 0, m, 1), at(v, key, c, 1), 1.0, output.at(query), c, false, Parallelism::None);
            }
        });
        Ok((CpuStorage::F32(y), lq.shape().clone()))
    }
}
