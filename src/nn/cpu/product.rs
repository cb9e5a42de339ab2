//! Matrix products through the `gemm` crate, on rayon's pool, with the bias added inside.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail};
use gemm::Parallelism;
use rayon::prelude::*;

/// Rows that one task fills.
const FILLED: usize = 64;

/// A matrix in memory: the first element, elements between rows and between columns.
#[derive(Clone, Copy)]
pub struct Matrix {
    pub data: *const f32,
    pub row: usize,
    pub column: usize,
}

/// The output of a kernel, written by many tasks.
pub struct Output(pub *mut f32);

// SAFETY: those who write through `at` see to it that tasks write disjoint elements
unsafe impl Sync for Output {}

impl Output {
    /// # Safety
    /// `offset` must lie inside of the output.
    pub unsafe fn at(&self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's promise
        unsafe { self.0.add(offset) }
    }
}

/// out (+)= scale * a b, for a [m, k] and b [k, n] into out [m, n] whose rows are `out_row` elements apart.
///
/// # Safety
/// All elements that the shapes and strides name must lie inside of live allocations, and nobody else may touch those of
/// `out` meanwhile.
#[expect(clippy::too_many_arguments, reason = "a matrix product has this many")]
pub unsafe fn product(
    m: usize,
    k: usize,
    n: usize,
    a: Matrix,
    b: Matrix,
    scale: f32,
    out: *mut f32,
    out_row: usize,
    add: bool,
    threads: Parallelism,
) {
    let strides = |matrix: &Matrix| (matrix.column as isize, matrix.row as isize);
    let ((a_column, a_row), (b_column, b_row)) = (strides(&a), strides(&b));
    // SAFETY: the caller's promise
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            out_row as isize,
            add,
            a.data,
            a_column,
            a_row,
            b.data,
            b_column,
            b_row,
            1.0,
            scale,
            false,
            false,
            false,
            threads,
        );
    }
}

/// x [m, k], weight [k, n], and perhaps bias [n] and residual [m, n] -> [m, n].
pub struct Product {
    /// [m, n]: added to the result
    pub residual: Option<Tensor>,
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, weight: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(x, lx, weight, lw, None)
    }
}

impl CustomOp3 for Product {
    fn name(&self) -> &'static str {
        "product-bias"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
        bias: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run(x, lx, weight, lw, Some(slice(bias, lb)?))
    }
}

impl Product {
    fn run(&self, x: &CpuStorage, lx: &Layout, weight: &CpuStorage, lw: &Layout, bias: Option<&[f32]>) -> Result<(CpuStorage, Shape)> {
        let ((m, k), (rows, n)) = (lx.shape().dims2()?, lw.shape().dims2()?);
        let (x, CpuStorage::F32(weight), [row, column]) = (slice(x, lx)?, weight, lw.stride()) else { bail!("product takes f32") };
        let weight = &weight[lw.start_offset()..];
        if rows != k
            || x.len() != m * k
            || bias.is_some_and(|b| b.len() != n)
            || self.residual.as_ref().is_some_and(|r| r.elem_count() != m * n)
            || (k * n > 0 && weight.len() <= (k - 1) * row + (n - 1) * column)
        {
            bail!("product of {:?} and {:?}", lx.shape(), lw.shape());
        }
        let mut y = under(&self.residual, bias, m, n)?;
        let add = bias.is_some() || self.residual.is_some();
        let (a, b) = (Matrix { data: x.as_ptr(), row: k, column: 1 }, Matrix { data: weight.as_ptr(), row: *row, column: *column });
        // SAFETY: the lengths were checked above, and y is ours
        unsafe { product(m, k, n, a, b, 1.0, y.as_mut_ptr(), n, add, Parallelism::Rayon(0)) };
        Ok((CpuStorage::F32(y), Shape::from((m, n))))
    }
}

/// What a product of m rows and n columns is added to: residual [m, n] and bias [n], where there are any, else zeros.
pub fn under(residual: &Option<Tensor>, bias: Option<&[f32]>, m: usize, n: usize) -> Result<Vec<f32>> {
    if m * n == 0 {
        return Ok(vec![]);
    }
    with_slice(residual, |residual| laid(residual, bias, m, n))
}

/// The elements of a tensor on the CPU, if there is one.
pub fn with_slice<R>(tensor: &Option<Tensor>, work: impl FnOnce(Option<&[f32]>) -> R) -> Result<R> {
    let Some(tensor) = tensor else { return Ok(work(None)) };
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("this kernel takes tensors on the CPU") };
    Ok(work(Some(slice(storage, layout)?)))
}

fn laid(residual: Option<&[f32]>, bias: Option<&[f32]>, m: usize, n: usize) -> Vec<f32> {
    let mut y = vec![0f32; m * n];
    let rows = y.par_chunks_mut(n * FILLED);
    match (residual, bias) {
        (None, None) => (),
        (None, Some(bias)) => rows.for_each(|rows| rows.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(bias))),
        (Some(residual), None) => rows.zip(residual.par_chunks(n * FILLED)).for_each(|(rows, residual)| rows.copy_from_slice(residual)),
        (Some(residual), Some(bias)) => rows.zip(residual.par_chunks(n * FILLED)).for_each(|(rows, residual)| {
            for (row, residual) in rows.chunks_exact_mut(n).zip(residual.chunks_exact(n)) {
                row.iter_mut().zip(residual).zip(bias).for_each(|((y, r), b)| *y = r + b);
            }
        }),
    }
    y
}

/// A contiguous f32 tensor's elements.
pub fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(x), Some((start, end))) => Ok(&x[start..end]),
        _ => bail!("this kernel takes contiguous f32"),
    }
}
