//! Matrix products with packed weights, after Goto & van de Geijn 2008: operands are blocked for
//! the caches, and the epilogue (bias, residual, gate) is applied to sums that are still in one.

use super::concat::uninit;
use super::panels::{PANEL, Pack, Panels, Right, WIDTH, vectors};
use super::tiles::{self, Side, Tiles};
use super::vector::{Kernel, LANES, Lanes, Vector, dispatch, floats};
use crate::nn::blocks::BlockMatrix;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;
use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

/// Rows that are multiplied at once by a vector of each column: with [`PANEL`], the sums that
/// registers hold.
pub const ROWS: usize = 8;

/// Terms of a sum between two looks whether it ends: without, a step of some processors took a
/// fifth longer where the loop happened to lie across one more cache line.
pub const UNROLLED: usize = 4;

/// Rows of one task, terms that are summed at once, and panels of one task: 256 KiB of the left side
/// and 320 KiB of sums in the L2 cache, 32 KiB of weights in L1.
const BLOCK: usize = 256;
const DEPTH: usize = 256;
const GROUP: usize = 10;

/// Tasks to have at least, so that no thread waits long for the last.
const TASKS: usize = 8;

/// Rows of a thread's share at least.
const SHARE: usize = 32;

thread_local! {
    static SCRATCH: Cell<Vec<Lanes>> = const { Cell::new(Vec::new()) };
}

/// Lends `work` at least `len` vectors of a thread's own memory, which is kept, as new memory costs
/// more than the arithmetic on it.
pub fn with_memory<R>(
    memory: &'static std::thread::LocalKey<Cell<Vec<Lanes>>>,
    len: usize,
    work: impl FnOnce(&mut [Lanes]) -> R,
) -> R {
    let mut taken = memory.take();
    if taken.len() < len {
        taken.resize(len, Lanes::default());
    }
    let result = work(&mut taken[..len]);
    memory.set(taken);
    result
}

/// The output of a kernel, written by many tasks.
pub struct Output(pub *mut f32);

// SAFETY: those who write through `slice` see to it that tasks write disjoint elements
unsafe impl Sync for Output {}

impl Output {
    /// # Safety
    /// The elements must lie inside of the output, and nobody else may touch them meanwhile.
    #[expect(
        clippy::mut_from_ref,
        reason = "tasks share the output, not its elements"
    )]
    pub unsafe fn slice(&self, offset: usize, len: usize) -> &mut [f32] {
        // SAFETY: the caller's promise
        unsafe { std::slice::from_raw_parts_mut(self.0.add(offset), len) }
    }
}

/// Adds the products of term k to sums [R, C]: v holds R rows of `depth` numbers, u panels.
///
/// # Safety
/// v must hold that many, and u must reach to column C of panel k.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "see `tiles`")]
unsafe fn step<V: Vector, const R: usize, const C: usize>(
    v: *const f32,
    depth: usize,
    u: &[Lanes],
    k: usize,
    sums: &mut [[V; C]; R],
) {
    let mut right = [V::splat(0.0); C];
    for c in 0..C {
        // SAFETY: the caller's promise
        right[c] = V::load(unsafe { &u.get_unchecked(k * PANEL + c).0 });
    }
    for row in 0..R {
        // SAFETY: the caller's promise
        let left = V::splat(unsafe { *v.add(row * depth + k) });
        for c in 0..C {
            sums[row][c] = sums[row][c].plus(left, right[c]);
        }
    }
}

/// m [rows, PANEL] (+)= v [rows, lanes*LANES] u [up to lanes*LANES, PANEL], for `columns` vectors
/// of the PANEL, R rows and C vectors at a time.
///
/// The loops over the sums have constant bounds and neither iterators nor checks: with them the
/// compiler kept the sums in memory where this is inlined into a large kernel, and took twice as
/// long.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "constant bounds: see above")]
fn tiles<V: Vector, const R: usize, const C: usize>(
    v: &[Lanes],
    lanes: usize,
    u: &[Lanes],
    columns: usize,
    m: &mut [Lanes],
    add: bool,
) {
    assert!(columns <= PANEL && columns.is_multiple_of(C));
    let depth = (lanes * LANES).min(u.len() / PANEL);
    for (v, m) in v.chunks_exact(R * lanes).zip(m.chunks_exact_mut(R * PANEL)) {
        let v = v.as_ptr().cast::<f32>();
        for column in (0..columns).step_by(C) {
            let mut sums = [[V::splat(0.0); C]; R];
            let mut k = 0;
            while k + UNROLLED <= depth {
                for i in 0..UNROLLED {
                    // SAFETY: k + i is below `depth`
                    unsafe { step::<V, R, C>(v, lanes * LANES, &u[column..], k + i, &mut sums) };
                }
                k += UNROLLED;
            }
            while k < depth {
                // SAFETY: as above
                unsafe { step::<V, R, C>(v, lanes * LANES, &u[column..], k, &mut sums) };
                k += 1;
            }
            for row in 0..R {
                for c in 0..C {
                    // SAFETY: m holds R rows of a panel
                    let m = unsafe { &mut m.get_unchecked_mut(row * PANEL + column + c).0 };
                    let sum = sums[row][c];
                    let sum = if add { V::load(m).add(sum) } else { sum };
                    sum.store(m);
                }
            }
        }
    }
}

/// m [ROWS, PANEL] (+)= v [ROWS, lanes*LANES] u [up to lanes*LANES, PANEL], for `columns` vectors
/// of the PANEL.
#[inline(always)]
pub fn multiply<V: Vector>(
    v: &[Lanes],
    lanes: usize,
    u: &[Lanes],
    columns: usize,
    m: &mut [Lanes],
    add: bool,
) {
    if V::WIDE && columns == PANEL {
        tiles::<V, ROWS, PANEL>(v, lanes, u, columns, m, add);
    } else {
        tiles::<V, { ROWS / 2 }, 1>(v, lanes, u, columns, m, add);
    }
}

/// The operations on a product before it is written: bias, residual, leaky ReLU, in this order.
#[derive(Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// [n], or [parts, n]: one for each of as many equal parts of the rows
    pub bias: Option<&'a [f32]>,
    /// [m, n]
    pub residual: Option<&'a [f32]>,
    /// [n]: the slope of a leaky ReLU after that
    pub slope: Option<&'a [f32]>,
    /// GEGLU: the first half of the columns times the exact GELU of the second is the result, [m,
    /// n/2].
    pub gated: bool,
}

/// The left side [m, k] of a product, of which tasks take what they need.
pub trait Left: Sync {
    /// Fills a slice with a range of terms of a row.
    fn row(&self, row: usize, terms: Range<usize>, to: &mut [f32]);

    /// Writes them as rows of tiles instead, where they are laid out like that: `to` begins with
    /// the first. Returns whether they are.
    #[inline(always)]
    fn lines(&self, _row: usize, _terms: Range<usize>, _to: &mut [Lanes]) -> bool {
        false
    }
}

impl<F: Fn(usize, Range<usize>, &mut [f32]) + Sync> Left for F {
    #[inline(always)]
    fn row(&self, row: usize, terms: Range<usize>, to: &mut [f32]) {
        self(row, terms, to);
    }
}

/// Multiplies left [m, k] by weights of n columns -> [m, n], on `tiles` if there are.
pub fn gemm<L: Left>(
    (m, k, n): (usize, usize, usize),
    left: L,
    weight: Right,
    epilogue: Epilogue,
    tiles: Option<Tiles>,
) -> Vec<f32> {
    let mut y = uninit(if epilogue.gated { m * n / 2 } else { m * n });
    if y.is_empty() {
        return y;
    }
    let output = Output(y.as_mut_ptr());
    let panels = Pack {
        gated: epilogue.gated,
    }
    .panels(n);
    // A thread finds in its own cache the rows that it wrote before, and each gets a share of them.
    // Where there are more weights than rows, it is those that are shared out.
    let threads = rayon::current_num_threads();
    let shares = if n <= 2 * m {
        threads.min(m / SHARE)
    } else {
        1
    };
    let block = tiles.map_or(BLOCK, Tiles::block);
    let blocks = m.div_ceil(block).max(shares);
    let tasks = if shares > 1 { threads } else { TASKS };
    let group = panels.div_ceil(tasks.div_ceil(blocks));
    if let Some(tiles) = tiles {
        let rows = m.div_ceil(blocks).next_multiple_of(tiles::ROWS);
        let groups = panels.div_ceil(group);
        let terms = k.div_ceil(k.div_ceil(tiles.depth()));
        let terms = terms.next_multiple_of(weight.step()).div_ceil(tiles::TERMS);
        (0..blocks * groups).into_par_iter().for_each(|task| {
            let (first, panel) = (task / groups * rows, task % groups * group);
            if first < m {
                let rows = first..m.min(first + rows);
                let lens = MultiplyTiles::<L>::lens(tiles, weight, rows.len(), terms);
                with_memory(&SCRATCH, lens.iter().sum(), |scratch| {
                    let product = MultiplyTiles {
                        tiles,
                        m,
                        k,
                        n,
                        left: &left,
                        weight,
                        epilogue,
                        rows,
                        panels: panel..panels.min(panel + group),
                        terms,
                        lens,
                        scratch,
                        y: &output,
                    };
                    tiles.set_up(|| dispatch(product));
                });
            }
        });
        return y;
    }
    let rows = m.div_ceil(blocks).next_multiple_of(ROWS);
    let group = group.min(GROUP);
    let groups = panels.div_ceil(group);
    (0..blocks * groups).into_par_iter().for_each(|task| {
        let (first, panel) = (task / groups * rows, task % groups * group);
        if first < m {
            let group = group.min(panels - panel);
            let depth = k.div_ceil(k.div_ceil(DEPTH));
            let lanes = depth.next_multiple_of(weight.step()).div_ceil(LANES);
            let tiles = rows / ROWS;
            with_memory(
                &SCRATCH,
                rows * lanes + lanes * LANES * PANEL + group * rows * PANEL,
                |scratch| {
                    let (v, rest) = scratch.split_at_mut(rows * lanes);
                    let (u, sums) = rest.split_at_mut(lanes * LANES * PANEL);
                    dispatch(Multiply {
                        k,
                        n,
                        m,
                        left: &left,
                        weight,
                        epilogue,
                        first,
                        panel,
                        lanes,
                        tiles,
                        v,
                        u,
                        sums,
                        y: &output,
                    });
                },
            );
        }
    });
    y
}

/// A block of rows times a group of panels.
struct Multiply<'a, L> {
    m: usize,
    k: usize,
    n: usize,
    left: &'a L,
    weight: Right<'a>,
    epilogue: Epilogue<'a>,
    /// the first of the rows, and of the panels
    first: usize,
    panel: usize,
    /// vectors of terms that are summed at once, and tiles of rows
    lanes: usize,
    tiles: usize,
    /// [tiles, ROWS, lanes]
    v: &'a mut [Lanes],
    /// [lanes*LANES, PANEL]
    u: &'a mut [Lanes],
    /// [panels, tiles, ROWS, PANEL]
    sums: &'a mut [Lanes],
    y: &'a Output,
}

impl<L: Left> Kernel for Multiply<'_, L> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self {
            m,
            k,
            n,
            left,
            weight,
            epilogue,
            first,
            panel,
            lanes,
            tiles,
            v,
            u,
            sums,
            y,
        } = self;
        let depth = lanes * LANES;
        for start in (0..k).step_by(depth) {
            let terms = start..(start + depth).min(k);
            for (row, v) in v.chunks_exact_mut(lanes).enumerate().take(m - first) {
                left.row(first + row, terms.clone(), &mut floats(v)[..terms.len()]);
            }
            for (i, sums) in sums.chunks_exact_mut(tiles * ROWS * PANEL).enumerate() {
                let at = (panel + i) * k + start;
                let columns = epilogue.columns(n, panel + i);
                weight.widen::<V>(at, &mut u[..terms.len() * PANEL]);
                for (v, sums) in v
                    .chunks_exact(ROWS * lanes)
                    .zip(sums.chunks_exact_mut(ROWS * PANEL))
                {
                    multiply::<V>(
                        v,
                        lanes,
                        &u[..terms.len() * PANEL],
                        columns,
                        sums,
                        start > 0,
                    );
                }
            }
        }
        for (i, sums) in sums.chunks_exact(tiles * ROWS * PANEL).enumerate() {
            for (row, sums) in sums.chunks_exact(PANEL).enumerate().take(m - first) {
                epilogue.write::<V>(first + row, panel + i, (m, n), sums, y);
            }
        }
    }
}

/// A block of rows times some panels, on tiles.
struct MultiplyTiles<'a, L> {
    tiles: Tiles,
    m: usize,
    k: usize,
    n: usize,
    left: &'a L,
    weight: Right<'a>,
    epilogue: Epilogue<'a>,
    rows: Range<usize>,
    panels: Range<usize>,
    /// tiles of terms that are summed at once
    terms: usize,
    /// see [`Self::lens`]
    lens: [usize; 5],
    scratch: &'a mut [Lanes],
    y: &'a Output,
}

impl<L> MultiplyTiles<'_, L> {
    /// Vectors of the left side [strips, terms, parts, 16], of weights [terms, parts, PANEL, 16], of
    /// sums [panels, rows, PANEL], of a row's terms, and of weights in blocks [terms, PANEL].
    fn lens(tiles: Tiles, weight: Right, rows: usize, terms: usize) -> [usize; 5] {
        let parts = tiles.parts();
        let (parts_of_weight, wide) = match weight {
            Right::Panels(panels) => (tiles.parts_of(panels), 0),
            Right::Blocks(..) => (parts, terms * tiles::TERMS * PANEL),
        };
        let height = rows.next_multiple_of(tiles::ROWS);
        [
            height * terms * parts,
            terms * parts_of_weight * PANEL * tiles::ROWS,
            GROUP * height * PANEL,
            terms * tiles::TERMS / LANES,
            wide,
        ]
    }
}

impl<L: Left> Kernel for MultiplyTiles<'_, L> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self {
            tiles,
            m,
            k,
            n,
            left,
            weight,
            epilogue,
            rows,
            panels,
            terms,
            lens,
            scratch,
            y,
        } = self;
        let parts = tiles.parts();
        let parts_of_weight = match weight {
            Right::Panels(panels) => tiles.parts_of(panels),
            Right::Blocks(..) => parts,
        };
        let height = rows.len().next_multiple_of(tiles::ROWS);
        let depth = terms * tiles::TERMS;
        let (v, rest) = scratch.split_at_mut(lens[0]);
        let (u, rest) = rest.split_at_mut(lens[1]);
        let (sums, rest) = rest.split_at_mut(lens[2]);
        let (numbers, wide) = rest.split_at_mut(lens[3]);
        let numbers = floats(numbers);
        for panel in panels.clone().step_by(GROUP) {
            let group = GROUP.min(panels.end - panel);
            for start in (0..k).step_by(depth) {
                let range = start..(start + depth).min(k);
                let terms = range.len().div_ceil(tiles::TERMS);
                let (strip, lines) = (
                    terms * parts * tiles::ROWS,
                    terms * parts_of_weight * PANEL * tiles::ROWS,
                );
                // rows of which all terms are summed at once stay for all panels
                if depth < k || panel == panels.start {
                    for (i, row) in rows.clone().enumerate() {
                        let line = i % tiles::ROWS;
                        let lines = &mut v[i / tiles::ROWS * strip + line..][..strip - line];
                        if !left.lines(row, range.clone(), lines) {
                            let numbers = &mut numbers[..range.len()];
                            left.row(row, range.clone(), numbers);
                            tiles.pack_row::<V>(numbers, lines);
                        }
                    }
                }
                for (i, sums) in sums
                    .chunks_exact_mut(height * PANEL)
                    .take(group)
                    .enumerate()
                {
                    let at = (panel + i) * k + start;
                    let u = &mut u[..lines];
                    match weight {
                        Right::Panels(panels) => {
                            tiles.pack_weight::<V>(panels, at * WIDTH, range.len(), u);
                        }
                        Right::Blocks(..) => {
                            let wide = &mut wide[..range.len() * PANEL];
                            weight.widen::<V>(at, wide);
                            let panel = Panels::F32(floats(wide));
                            tiles.pack_weight::<V>(panel, 0, range.len(), u);
                        }
                    }
                    let left = Side {
                        lines: &v[..height / tiles::ROWS * strip],
                        parts,
                    };
                    let right = Side {
                        lines: u,
                        parts: parts_of_weight,
                    };
                    tiles.multiply(left, right, sums, start > 0);
                }
            }
            for (i, sums) in sums.chunks_exact(height * PANEL).take(group).enumerate() {
                for (row, sums) in rows.clone().zip(sums.chunks_exact(PANEL)) {
                    epilogue.write::<V>(row, panel + i, (m, n), sums, y);
                }
            }
        }
    }
}

impl Epilogue<'_> {
    /// Vectors of a panel that hold columns.
    fn columns(&self, n: usize, panel: usize) -> usize {
        if self.gated { PANEL } else { vectors(n, panel) }
    }

    /// Writes a panel's columns of one row of the result.
    #[inline(always)]
    pub(super) fn write<V: Vector>(
        &self,
        row: usize,
        panel: usize,
        (m, n): (usize, usize),
        sums: &[Lanes],
        y: &Output,
    ) {
        let bias = self
            .bias
            .map(|bias| &bias[row * (bias.len() / n) / m * n..][..n]);
        if self.gated {
            let (half, first) = (n / 2, panel * LANES);
            let len = LANES.min(half - first);
            let gate = plus_some::<V>(V::load(&sums[1].0), bias, half + first, len).gelu();
            let value = plus_some::<V>(V::load(&sums[0].0), bias, first, len).mul(gate);
            // SAFETY: y holds [m, half], and no other task writes these columns of this row
            value.store_some(unsafe { y.slice(row * half + first, len) });
            return;
        }
        for (lane, sums) in sums.iter().enumerate().take(self.columns(n, panel)) {
            let first = panel * WIDTH + lane * LANES;
            let (at, len) = (row * n + first, LANES.min(n - first));
            let mut sum = plus_some::<V>(V::load(&sums.0), bias, first, len);
            sum = plus_some::<V>(sum, self.residual, at, len);
            if let Some(slope) = self.slope {
                sum = sum.leaky(V::load_some(&slope[first..][..len]));
            }
            // SAFETY: y holds [m, n], and no other task writes these columns of this row
            sum.store_some(unsafe { y.slice(at, len) });
        }
    }
}

/// A vector plus `len` of these numbers from `first` on, if there are any.
#[inline(always)]
pub fn plus_some<V: Vector>(x: V, numbers: Option<&[f32]>, first: usize, len: usize) -> V {
    match numbers {
        Some(numbers) => x.add(V::load_some(&numbers[first..][..len])),
        None => x,
    }
}

/// x [m, k] times packed weights, plus bias and residual, perhaps gated.
pub struct Gemm {
    /// columns of the weights
    pub outputs: usize,
    /// `[outputs]`
    pub bias: Option<Tensor>,
    /// [m, outputs]
    pub residual: Option<Tensor>,
    /// see `Epilogue::gated`
    pub gated: bool,
    /// the unit that multiplies, if it is not the vectors'
    pub tiles: Option<Tiles>,
}

impl CustomOp2 for Gemm {
    fn name(&self) -> &'static str {
        "gemm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (k, n) = (lx.shape().dims2()?.1, self.outputs);
        if lw.dims() != [Pack { gated: self.gated }.panels(n), k, WIDTH] {
            bail!(
                "product of {:?} and {:?} with {n} columns",
                lx.shape(),
                lw.shape()
            );
        }
        self.run(x, lx, Right::Panels(Panels::of(weight, lw)?))
    }
}

/// x [m, k] times weights in blocks, with the rest of `gemm`.
pub struct BlocksGemm {
    pub gemm: Gemm,
    pub weight: Arc<BlockMatrix>,
}

impl CustomOp1 for BlocksGemm {
    fn name(&self) -> &'static str {
        "blocks-gemm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout) -> Result<(CpuStorage, Shape)> {
        let (k, n, gated) = (lx.shape().dims2()?.1, self.gemm.outputs, self.gemm.gated);
        if self.weight.dims() != (n, k) {
            bail!(
                "product of {:?} and blocks of {:?}",
                lx.shape(),
                self.weight.dims()
            );
        }
        self.gemm
            .run(x, lx, Right::Blocks(&self.weight, &Pack { gated }))
    }
}

impl Gemm {
    fn run(&self, x: &CpuStorage, lx: &Layout, weight: Right) -> Result<(CpuStorage, Shape)> {
        let ((m, k), n) = (lx.shape().dims2()?, self.outputs);
        let x = slice(x, lx)?;
        let count = |tensor: Option<&Tensor>| tensor.map(Tensor::elem_count);
        if count(self.bias.as_ref()).is_some_and(|count| count != n)
            || count(self.residual.as_ref()).is_some_and(|count| count != m * n || self.gated)
        {
            bail!("bias or residual of a product with {n} columns");
        }
        let left = |row: usize, terms: Range<usize>, to: &mut [f32]| {
            to.copy_from_slice(&x[row * k..][terms])
        };
        let y = with_slice(self.bias.as_ref(), |bias| {
            with_slice(self.residual.as_ref(), |residual| {
                gemm(
                    (m, k, n),
                    left,
                    weight,
                    Epilogue {
                        bias,
                        residual,
                        gated: self.gated,
                        slope: None,
                    },
                    self.tiles,
                )
            })
        })??;
        Ok((
            CpuStorage::F32(y),
            Shape::from((m, if self.gated { n / 2 } else { n })),
        ))
    }
}

/// Lends `work` the elements of a contiguous f32 tensor on the CPU, if there is one.
pub fn with_slice<R>(tensor: Option<&Tensor>, work: impl FnOnce(Option<&[f32]>) -> R) -> Result<R> {
    let Some(tensor) = tensor else {
        return Ok(work(None));
    };
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        bail!("this kernel takes tensors on the CPU")
    };
    Ok(work(Some(slice(storage, layout)?)))
}

/// A contiguous f32 tensor's elements.
pub fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(x), Some((start, end))) => Ok(&x[start..end]),
        _ => bail!("this kernel takes contiguous f32"),
    }
}
