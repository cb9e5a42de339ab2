//! Attention without a score matrix: FlashAttention, Dao et al. 2022 (arXiv 2205.14135) and Dao
//! 2023 (arXiv 2307.08691).
//!
//! Each task takes some queries of one head past all keys, a block of keys at a time. Of each query
//! it keeps the largest score so far, the sum of the weights exp(score - largest), and the sum of
//! values with these weights; where a block brings a larger score, the two sums are scaled down to
//! it. So scores never leave the nearest cache.
//!
//! Queries lie in the lanes of vectors, keys and values are spread to all lanes one number at a
//! time: then no lane is wasted for any size of head, and a query's largest score and sums need no
//! steps across lanes. Keys and values are laid out for this once per call, in the order in which
//! they are read. On tiles it is the same: keys are rows of the first product, queries its columns;
//! values' numbers are rows of the second, queries again its columns.

use super::concat::{uninit, uninit_lanes};
use super::gemm::{Output, UNROLLED, with_memory};
use super::panels::PANEL;
use super::tiles::{self, Side, TERMS, Tiles};
use super::vector::{Kernel, LANES, Lanes, Vector, dispatch, floats, numbers};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, bail};
use rayon::prelude::*;
use std::cell::Cell;
use std::f32::consts::LOG2_E;

/// Queries of one task. They share what it reads of keys and values.
const QUERIES: usize = 128;

/// Keys of one block: the scores of a group of queries (16 KiB) stay in the nearest cache.
const KEYS: usize = 128;

/// Numbers of a query that the scores' inner loop adds up: a group's (16 KiB) stay in the nearest
/// cache, next to the scores.
const DEPTH: usize = 128;

/// Rows and vectors that an inner loop adds up in registers: every size of head in use is a
/// multiple of 8. And as many on processors with fewer registers.
const ROWS: usize = 8;
const VECTORS: usize = 2;
const FEW_ROWS: usize = 4;
const FEW_VECTORS: usize = 1;

/// q [b, n, heads*d], k and v [b, m, heads*d] -> softmax(q k' / sqrt(d)) v, [b, n, heads*d].
pub struct Attention {
    pub heads: usize,
    /// the unit that multiplies, if it is not the vectors'
    pub tiles: Option<Tiles>,
}

thread_local! {
    /// The memory of [`Attend`]: see [`with_memory`].
    static SCRATCH: Cell<Vec<Lanes>> = const { Cell::new(Vec::new()) };
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
        let ((b, n, c), (bk, m, ck), heads) =
            (lq.shape().dims3()?, lk.shape().dims3()?, self.heads);
        if bk != b
            || ck != c
            || lv.shape() != lk.shape()
            || heads == 0
            || !c.is_multiple_of(heads)
            || m == 0
        {
            bail!(
                "attention of {:?} to {:?} in {heads} heads",
                lq.shape(),
                lk.shape()
            );
        }
        let y = if lq.shape().elem_count() == 0 {
            vec![]
        } else {
            let [q, k, v] = [Rows::of(q, lq)?, Rows::of(k, lk)?, Rows::of(v, lv)?];
            Plan::new([q, k, v], (b, n, m, c), heads, self.tiles)
                .run(|kernel| dispatch(kernel), |kernel| dispatch(kernel))
        };
        Ok((CpuStorage::F32(y), lq.shape().clone()))
    }
}

/// Rows of numbers at a distance of `stride`.
#[derive(Clone, Copy)]
struct Rows<'a> {
    numbers: &'a [f32],
    stride: usize,
}

impl<'a> Rows<'a> {
    /// The rows of a tensor [b, n, c], none of whose sides is 0.
    fn of(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        match (storage, layout.dims(), layout.stride()) {
            (CpuStorage::F32(x), [b, n, c], [picture, row, 1])
                if *b == 1 || *picture == n * row =>
            {
                let end = layout.start_offset() + (b * n - 1) * row + c;
                Ok(Self {
                    numbers: &x[layout.start_offset()..end],
                    stride: *row,
                })
            }
            _ => bail!("this kernel takes rows of f32"),
        }
    }
}

/// The operands of an attention, and how it is cut into tasks.
struct Plan<'a> {
    /// [b, n, c]
    q: Rows<'a>,
    /// [b, m, c]
    k: Rows<'a>,
    v: Rows<'a>,
    b: usize,
    n: usize,
    m: usize,
    /// heads * d
    c: usize,
    heads: usize,
    d: usize,
    /// d, filled up to whole panels
    padded: usize,
    /// keys of a block, and blocks of an image
    keys: usize,
    blocks: usize,
    tiles: Option<Tiles>,
}

impl<'a> Plan<'a> {
    fn new(
        [q, k, v]: [Rows<'a>; 3],
        (b, n, m, c): (usize, usize, usize, usize),
        heads: usize,
        tiles: Option<Tiles>,
    ) -> Self {
        let (d, blocks) = (c / heads, m.div_ceil(KEYS));
        let (rows, keys) = match tiles {
            Some(_) => (tiles::ROWS, TERMS),
            None => (ROWS, LANES),
        };
        Self {
            q,
            k,
            v,
            b,
            n,
            m,
            c,
            heads,
            d,
            padded: d.next_multiple_of(rows),
            keys: m.div_ceil(blocks).next_multiple_of(keys),
            blocks,
            tiles,
        }
    }

    /// The result [b, n, c]. None of the lengths may be 0.
    fn run(&self, pack: impl Fn(Pack) + Sync, attend: impl Fn(Attend) + Sync) -> Vec<f32> {
        let Plan {
            b,
            n,
            c,
            heads,
            padded,
            keys,
            blocks,
            ..
        } = *self;
        let tasks = n.div_ceil(QUERIES);
        let block = self.lines_of_keys() + self.lines_of_values();
        // neither is cleared first: that would cost up to a quarter of the time where there are few
        // keys
        let (mut packed, mut y) = (uninit_lanes(b * blocks * heads * block), uninit(b * n * c));
        packed
            .par_chunks_exact_mut(block)
            .enumerate()
            .for_each(|(i, packed)| {
                pack(Pack {
                    plan: self,
                    image: i / (blocks * heads),
                    head: i % heads,
                    first: i / heads % blocks * keys,
                    packed,
                });
            });
        let output = Output(y.as_mut_ptr());
        (0..b * tasks * heads).into_par_iter().for_each(|i| {
            let work = || {
                with_memory(
                    &SCRATCH,
                    QUERIES / LANES * (self.lines_of_query() + padded + 2)
                        + keys * VECTORS
                        + self.lines_of_weights(),
                    |scratch| {
                        // heads next to each other share cache lines of queries and results
                        let (image, head, first) =
                            (i / (tasks * heads), i % heads, i / heads % tasks * QUERIES);
                        let packed =
                            &packed[image * blocks * heads * block..][..blocks * heads * block];
                        attend(Attend {
                            plan: self,
                            image,
                            head,
                            first,
                            packed,
                            scratch,
                            y: &output,
                        });
                    },
                )
            };
            match self.tiles {
                Some(tiles) => tiles.set_up(work),
                None => work(),
            }
        });
        y
    }

    /// Tiles of a head's numbers, as terms of a sum, with their parts.
    fn lines_of_head(&self, tiles: Tiles) -> usize {
        self.d.div_ceil(TERMS) * tiles.parts()
    }

    /// Vectors of a block of keys of one head: [keys/R, d, R], on tiles [keys/16, d/32, parts, 16].
    fn lines_of_keys(&self) -> usize {
        let each = |tiles| self.lines_of_head(tiles);
        self.tiles
            .map_or(self.keys * self.d / LANES, |tiles| self.keys * each(tiles))
    }

    /// Vectors of its values: [padded/R, keys, R], on tiles [padded/16, keys/32, parts, 16].
    fn lines_of_values(&self) -> usize {
        let each = |tiles: Tiles| self.keys / TERMS * tiles.parts();
        let padded = self.padded;
        self.tiles
            .map_or(self.keys * padded / LANES, |tiles| padded * each(tiles))
    }

    /// Vectors of 16 queries of one head: [d], on tiles [d/32, parts, 16].
    fn lines_of_query(&self) -> usize {
        self.tiles
            .map_or(self.d, |tiles| self.lines_of_head(tiles) * tiles::ROWS)
    }

    /// Vectors of the weights of two groups of 16 queries as terms of a sum: [keys/32, parts,
    /// PANEL, 16].
    fn lines_of_weights(&self) -> usize {
        let each = |tiles: Tiles| self.keys / TERMS * tiles.parts() * PANEL * tiles::ROWS;
        self.tiles.map_or(0, each)
    }
}

/// Lays out a block of keys and values of one head. After the last key it is repeated, and after
/// the last number of a value stands what follows in memory: neither counts.
struct Pack<'a> {
    plan: &'a Plan<'a>,
    image: usize,
    head: usize,
    /// the first of the keys
    first: usize,
    /// keys, then values: see [`Plan::lines_of_keys`]
    packed: &'a mut [Lanes],
}

impl Kernel for Pack<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        if let Some(tiles) = self.plan.tiles {
            self.pack_tiles::<V>(tiles)
        } else if V::WIDE {
            self.pack::<V, ROWS>()
        } else {
            self.pack::<V, FEW_ROWS>()
        }
    }
}

impl Pack<'_> {
    #[inline(always)]
    fn pack_tiles<V: Vector>(self, tiles: Tiles) {
        let Plan {
            k,
            v,
            m,
            d,
            padded,
            keys,
            ..
        } = *self.plan;
        let count = keys.min(m - self.first);
        let at =
            |of: Rows, key: usize| (self.image * m + self.first + key) * of.stride + self.head * d;
        let (to_k, to_v) = self.packed.split_at_mut(self.plan.lines_of_keys());
        let strip = self.plan.lines_of_head(tiles) * tiles::ROWS;
        for key in 0..keys {
            // the last key is repeated: that changes no maximum
            let row = &k.numbers[at(k, key.min(count - 1))..][..d];
            let line = key % tiles::ROWS;
            let lines = &mut to_k[key / tiles::ROWS * strip + line..][..strip - line];
            tiles.pack_row::<V>(row, lines);
        }
        let tile = tiles.parts() * tiles::ROWS;
        let strips = to_v.chunks_exact_mut(keys / TERMS * tile);
        for (first, strip) in (0..padded).step_by(tiles::ROWS).zip(strips) {
            let len = tiles::ROWS.min(d - first);
            for (lines, key) in strip.chunks_exact_mut(tile).zip((0..keys).step_by(TERMS)) {
                let mut pairs = [[V::splat(0.0); 2]; LANES];
                for (i, pair) in pairs.iter_mut().enumerate() {
                    for (half, value) in pair.iter_mut().enumerate() {
                        let key = key + half * LANES + i;
                        if key < count {
                            *value = V::load_some(&v.numbers[at(v, key) + first..][..len]);
                        }
                    }
                }
                tiles.pack_columns::<V>(&pairs, lines, tiles::ROWS);
            }
        }
    }

    #[inline(always)]
    fn pack<V: Vector, const R: usize>(self) {
        let Plan {
            k, v, m, d, keys, ..
        } = *self.plan;
        let last = keys.min(m - self.first) - 1;
        let at = |of: Rows, key: usize| {
            (self.image * m + self.first + key.min(last)) * of.stride + self.head * d
        };
        let (to_k, to_v) = floats(self.packed).split_at_mut(keys * d);
        for key in (0..keys).step_by(LANES) {
            let rows = std::array::from_fn(|i| at(k, key + i));
            for first in starts(d) {
                for (i, column) in (first..d).zip(columns::<V>(k.numbers, rows, first, d)) {
                    spread::<V, R>(column, &mut to_k[key * d + i * R..], d);
                }
            }
        }
        for first in (0..d).step_by(LANES) {
            for key in 0..keys {
                spread::<V, R>(
                    V::load_some(&v.numbers[at(v, key) + first..]),
                    &mut to_v[first * keys + key * R..],
                    keys,
                );
            }
        }
    }
}

/// Takes some queries of one head past all keys.
struct Attend<'a> {
    plan: &'a Plan<'a>,
    image: usize,
    head: usize,
    /// the first of the queries
    first: usize,
    /// [blocks, heads] of keys and values, as [`Pack`] lays them out
    packed: &'a [Lanes],
    scratch: &'a mut [Lanes],
    y: &'a Output,
}

impl Kernel for Attend<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        if let Some(tiles) = self.plan.tiles {
            self.attend_tiles::<V>(tiles)
        } else if V::WIDE {
            self.attend::<V, ROWS, VECTORS>()
        } else {
            self.attend::<V, FEW_ROWS, FEW_VECTORS>()
        }
    }
}

impl Attend<'_> {
    #[inline(always)]
    fn attend_tiles<V: Vector>(mut self, tiles: Tiles) {
        const C: usize = PANEL;
        let Plan {
            m,
            heads,
            padded,
            keys,
            ..
        } = *self.plan;
        let (parts, query) = (tiles.parts(), self.plan.lines_of_query());
        let (queries, scratch) =
            std::mem::take(&mut self.scratch).split_at_mut(QUERIES / LANES * query); // [groups, d/32, parts, C, 16]
        let (values, scratch) = scratch.split_at_mut(QUERIES / LANES * padded); // [groups, padded, C]
        let (state, scratch) = scratch.split_at_mut(QUERIES / LANES * 2); // [groups, 2, C]
        let (scores, weights) = scratch.split_at_mut(keys * C); // [keys, C], [keys/32, parts, C, 16]
        let count = QUERIES.min(self.plan.n - self.first);
        let groups = count.div_ceil(C * LANES);
        self.take_queries_for_tiles::<V>(tiles, queries, count);
        for state in state.chunks_exact_mut(2 * C) {
            state[..C].fill(Lanes([f32::NEG_INFINITY; LANES]));
            state[C..].fill(Lanes([0.0; LANES]));
        }
        let of_keys = self.plan.lines_of_keys();
        let blocks = self
            .packed
            .chunks_exact(of_keys + self.plan.lines_of_values())
            .skip(self.head)
            .step_by(heads);
        for (block, first) in blocks.zip((0..m).step_by(keys)) {
            let (k, v) = block.split_at(of_keys);
            let count = keys.min(m - first);
            for group in 0..groups {
                let queries = &queries[group * query * C..][..query * C];
                let values = &mut values[group * padded * C..][..padded * C];
                let (largest, total) = state[group * 2 * C..][..2 * C].split_at_mut(C);
                let side = |lines| Side { lines, parts };
                tiles.multiply(side(k), side(queries), scores, false);
                let before = load::<V, C>(largest);
                let mut top = before;
                for scores in scores[..count * C].chunks_exact(C) {
                    for (top, score) in top.iter_mut().zip(load::<V, C>(scores)) {
                        *top = top.max(score);
                    }
                }
                let mut sum = weigh::<V, C>(&mut scores[..count * C], top);
                scores[count * C..].fill(Lanes::default());
                let mut scale = [V::splat(0.0); C];
                for i in 0..C {
                    scale[i] = before[i].sub(top[i]).exp2();
                    sum[i] = sum[i].plus(V::load(&total[i].0), scale[i]);
                }
                store::<V, C>(top, largest);
                store::<V, C>(sum, total);
                let tile = parts * C * tiles::ROWS;
                for (scores, weights) in scores
                    .chunks_exact(TERMS * C)
                    .zip(weights.chunks_exact_mut(tile))
                {
                    for i in 0..LANES {
                        for column in 0..C {
                            let pair = [
                                V::load(&scores[i * C + column].0),
                                V::load(&scores[(LANES + i) * C + column].0),
                            ];
                            let lines = &mut weights[column * tiles::ROWS + i..];
                            tiles.pack::<V>(pair, parts, lines, C * tiles::ROWS);
                        }
                    }
                }
                if first > 0 {
                    for values in values.chunks_exact_mut(C) {
                        let mut scaled = load::<V, C>(values);
                        for (value, scale) in scaled.iter_mut().zip(scale) {
                            *value = value.mul(scale);
                        }
                        store::<V, C>(scaled, values);
                    }
                }
                tiles.multiply(side(v), side(weights), values, first > 0);
            }
        }
        self.give_values::<V, C>(values, state, count);
    }

    /// Queries as columns [groups, d/32, parts, C, 16], times what makes exp2(score) their weight.
    #[inline(always)]
    fn take_queries_for_tiles<V: Vector>(&self, tiles: Tiles, queries: &mut [Lanes], count: usize) {
        let Plan { q, n, d, .. } = *self.plan;
        let scale = V::splat(LOG2_E / (d as f32).sqrt());
        let tile = tiles.parts() * PANEL * tiles::ROWS;
        let terms = d.div_ceil(TERMS);
        for vector in 0..count.next_multiple_of(PANEL * LANES) / LANES {
            // the last query fills up its vectors
            let row = |i: usize| {
                let query = (vector * LANES + i).min(count - 1);
                let at = (self.image * n + self.first + query) * q.stride + self.head * d;
                &q.numbers[at..][..d]
            };
            for term in 0..terms {
                let mut pairs = [[V::splat(0.0); 2]; LANES];
                for (i, pair) in pairs.iter_mut().enumerate() {
                    for (half, numbers) in pair.iter_mut().enumerate() {
                        let first = (term * TERMS + half * LANES).min(d);
                        let row = &row(i)[first..(first + LANES).min(d)];
                        *numbers = V::load_some(row).mul(scale);
                    }
                }
                let at = (vector / PANEL * terms + term) * tile + vector % PANEL * tiles::ROWS;
                tiles.pack_columns::<V>(&pairs, &mut queries[at..], PANEL * tiles::ROWS);
            }
        }
    }

    #[inline(always)]
    fn attend<V: Vector, const R: usize, const C: usize>(mut self) {
        let Plan {
            m,
            heads,
            d,
            padded,
            keys,
            ..
        } = *self.plan;
        let (queries, scratch) =
            std::mem::take(&mut self.scratch).split_at_mut(QUERIES / LANES * d); // [groups, d, C]
        let (values, scratch) = scratch.split_at_mut(QUERIES / LANES * padded); // [groups, padded, C]
        let (state, scores) = scratch.split_at_mut(QUERIES / LANES * 2); // [groups, 2, C], [keys, C]
        let count = QUERIES.min(self.plan.n - self.first);
        let groups = count.div_ceil(C * LANES);
        self.take_queries::<V, C>(queries, count);
        for state in state.chunks_exact_mut(2 * C) {
            state[..C].fill(Lanes([f32::NEG_INFINITY; LANES]));
            state[C..].fill(Lanes([0.0; LANES]));
        }
        let blocks = numbers(self.packed)
            .chunks_exact(keys * (d + padded))
            .skip(self.head)
            .step_by(heads);
        for (block, first) in blocks.zip((0..m).step_by(keys)) {
            let (k, v) = block.split_at(keys * d);
            let count = keys.min(m - first);
            for group in 0..groups {
                let queries = &queries[group * d * C..][..d * C];
                let values = &mut values[group * padded * C..][..padded * C];
                let (largest, total) = state[group * 2 * C..][..2 * C].split_at_mut(C);
                let before = load::<V, C>(largest);
                // a panel's last keys may be repetitions of a key: they change no maximum
                let top = score::<V, R, C>(
                    k,
                    d,
                    queries,
                    &mut scores[..count.next_multiple_of(R) * C],
                    before,
                );
                let scores = &mut scores[..count * C];
                let mut sum = weigh::<V, C>(scores, top);
                let mut scale = [V::splat(0.0); C];
                for i in 0..C {
                    scale[i] = before[i].sub(top[i]).exp2();
                    sum[i] = sum[i].plus(V::load(&total[i].0), scale[i]);
                }
                store::<V, C>(top, largest);
                store::<V, C>(sum, total);
                for (v, values) in v.chunks_exact(keys * R).zip(values.chunks_exact_mut(R * C)) {
                    let mut sums = [[V::splat(0.0); C]; R];
                    if first > 0 {
                        for (sums, values) in sums.iter_mut().zip(values.chunks_exact(C)) {
                            for ((sum, value), scale) in sums.iter_mut().zip(values).zip(&scale) {
                                *sum = V::load(&value.0).mul(*scale);
                            }
                        }
                    }
                    let sums = product::<V, R, C>(&v[..count * R], scores, sums);
                    for (sums, values) in sums.into_iter().zip(values.chunks_exact_mut(C)) {
                        store::<V, C>(sums, values);
                    }
                }
            }
        }
        self.give_values::<V, C>(values, state, count);
    }

    /// Queries in lanes [groups, d, C], times what makes exp2(score) their weight.
    #[inline(always)]
    fn take_queries<V: Vector, const C: usize>(&self, queries: &mut [Lanes], count: usize) {
        let Plan { q, n, d, .. } = *self.plan;
        let scale = V::splat(LOG2_E / (d as f32).sqrt());
        for vector in 0..count.next_multiple_of(C * LANES) / LANES {
            // the last query fills up its vectors
            let row = |i: usize| {
                (self.image * n + self.first + i.min(count - 1)) * q.stride + self.head * d
            };
            let rows = std::array::from_fn(|i| row(vector * LANES + i));
            let group = &mut queries[vector / C * d * C..][..d * C];
            for first in starts(d) {
                for (i, column) in (first..d).zip(columns::<V>(q.numbers, rows, first, d)) {
                    column.mul(scale).store(&mut group[i * C + vector % C].0);
                }
            }
        }
    }

    /// Writes the values of `count` queries, divided by the sum of their weights.
    #[inline(always)]
    fn give_values<V: Vector, const C: usize>(
        &self,
        values: &[Lanes],
        state: &[Lanes],
        count: usize,
    ) {
        let Plan {
            n, c, d, padded, ..
        } = *self.plan;
        for vector in 0..count.div_ceil(LANES) {
            let mut scale = state[vector / C * 2 * C + C + vector % C];
            for x in &mut scale.0 {
                *x = 1.0 / *x;
            }
            let scale = V::load(&scale.0);
            let values = &values[vector / C * padded * C..][..padded * C];
            for first in starts(d) {
                let len = LANES.min(d - first);
                let mut columns = [V::splat(0.0); LANES];
                for (i, column) in columns.iter_mut().enumerate().take(len) {
                    *column = V::load(&values[(first + i) * C + vector % C].0).mul(scale);
                }
                for (row, i) in V::transpose(columns).into_iter().zip(vector * LANES..count) {
                    let at = (self.image * n + self.first + i) * c + self.head * d + first;
                    // SAFETY: y holds [b, n, c], and no other task writes this head of this query
                    row.store_some(unsafe { self.y.slice(at, len) });
                }
            }
        }
    }
}

/// Scores [count, C] of a block's keys [keys/R, d, R], and the largest of them and `top` in each
/// lane.
#[inline(always)]
fn score<V: Vector, const R: usize, const C: usize>(
    k: &[f32],
    d: usize,
    queries: &[Lanes],
    scores: &mut [Lanes],
    mut top: [V; C],
) -> [V; C] {
    for (first, queries) in (0..d).step_by(DEPTH).zip(queries.chunks(DEPTH * C)) {
        for (k, scores) in k.chunks_exact(d * R).zip(scores.chunks_exact_mut(R * C)) {
            let mut sums = [[V::splat(0.0); C]; R];
            if first > 0 {
                for (sums, scores) in sums.iter_mut().zip(scores.chunks_exact(C)) {
                    *sums = load::<V, C>(scores);
                }
            }
            let sums = product::<V, R, C>(&k[first * R..], queries, sums);
            for (sums, scores) in sums.into_iter().zip(scores.chunks_exact_mut(C)) {
                store::<V, C>(sums, scores);
            }
            if first + DEPTH >= d {
                for sums in sums {
                    for (top, sum) in top.iter_mut().zip(sums) {
                        *top = top.max(sum);
                    }
                }
            }
        }
    }
    top
}

/// Makes weights exp2(score - top) of scores [count, C], and sums them.
#[inline(always)]
fn weigh<V: Vector, const C: usize>(scores: &mut [Lanes], top: [V; C]) -> [V; C] {
    let mut sum = [V::splat(0.0); C];
    for scores in scores.as_chunks_mut::<C>().0 {
        for ((score, top), sum) in scores.iter_mut().zip(&top).zip(&mut sum) {
            let weight = V::load(&score.0).sub(*top).exp2();
            *sum = sum.add(weight);
            weight.store(&mut score.0);
        }
    }
    sum
}

/// sums [R, C] + a' b for a [k, R] and b [k, C].
#[inline(always)]
fn product<V: Vector, const R: usize, const C: usize>(
    a: &[f32],
    b: &[Lanes],
    mut sums: [[V; C]; R],
) -> [[V; C]; R] {
    let (a, b) = (a.as_chunks::<R>().0, b.as_chunks::<C>().0);
    let terms = a.len().min(b.len());
    let ((a, last_a), (b, last_b)) = (
        a[..terms].as_chunks::<UNROLLED>(),
        b[..terms].as_chunks::<UNROLLED>(),
    );
    for (a, b) in a.iter().zip(b) {
        for i in 0..UNROLLED {
            add_products::<V, R, C>(&a[i], &b[i], &mut sums);
        }
    }
    for (a, b) in last_a.iter().zip(last_b) {
        add_products::<V, R, C>(a, b, &mut sums);
    }
    sums
}

/// Adds the products of R numbers and C vectors to sums [R, C].
#[inline(always)]
fn add_products<V: Vector, const R: usize, const C: usize>(
    a: &[f32; R],
    b: &[Lanes; C],
    sums: &mut [[V; C]; R],
) {
    let right = load::<V, C>(b);
    for (left, sums) in a.iter().zip(sums) {
        let left = V::splat(*left);
        for (sum, right) in sums.iter_mut().zip(&right) {
            *sum = sum.plus(left, *right);
        }
    }
}

#[inline(always)]
fn load<V: Vector, const C: usize>(from: &[Lanes]) -> [V; C] {
    let mut x = [V::splat(0.0); C];
    for (x, from) in x.iter_mut().zip(from) {
        *x = V::load(&from.0);
    }
    x
}

#[inline(always)]
fn store<V: Vector, const C: usize>(x: [V; C], to: &mut [Lanes]) {
    for (x, to) in x.into_iter().zip(to) {
        x.store(&mut to.0);
    }
}

/// Where vectors start that cover a row of d numbers: the last reaches back, rather than past the
/// end.
#[inline(always)]
fn starts(d: usize) -> impl Iterator<Item = usize> {
    (0..d)
        .step_by(LANES)
        .map(move |first| first.min(d.saturating_sub(LANES)))
}

/// Columns from `first` on, sixteen or to the end, of sixteen rows of d numbers that start at these
/// places.
#[inline(always)]
fn columns<V: Vector>(x: &[f32], rows: [usize; LANES], first: usize, d: usize) -> [V; LANES] {
    let mut vectors = [V::splat(0.0); LANES];
    for (vector, row) in vectors.iter_mut().zip(rows) {
        *vector = if d < LANES {
            V::load_some(&x[row..][..d])
        } else {
            V::load_some(&x[row + first..][..LANES])
        };
    }
    V::transpose(vectors)
}

/// Writes a vector into panels of R numbers side by side and `len` numbers below each other, as far
/// as there are panels.
#[inline(always)]
fn spread<V: Vector, const R: usize>(x: V, to: &mut [f32], len: usize) {
    let mut numbers = [0.0; LANES];
    x.store(&mut numbers);
    for (panel, numbers) in numbers.as_chunks::<R>().0.iter().enumerate() {
        if let Some(to) = to
            .get_mut(panel * len * R..)
            .and_then(|to| to.first_chunk_mut())
        {
            *to = *numbers;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::vector::with_every_kind;
    use super::*;
    use crate::nn::Precision;

    #[derive(Clone)]
    struct Compared(Option<Tiles>);

    impl Kernel for Compared {
        fn run<V: Vector>(self) {
            for (b, n, m, heads, d) in [
                (1, 1, 1, 1, 1),
                (2, 33, 17, 2, 7),
                (1, 150, 145, 1, 40),
                (2, 20, 31, 1, 136),
            ] {
                let c = heads * d;
                let waves = |len: usize, pace: f32| {
                    (0..len)
                        .map(|i| 2.0 * (i as f32 * pace).sin())
                        .collect::<Vec<f32>>()
                };
                let (q, k, v) = (
                    waves(b * n * c, 0.7),
                    waves(b * m * c, 1.1),
                    waves(b * m * c, 1.3),
                );
                let rows = |numbers| Rows { numbers, stride: c };
                let y = Plan::new([rows(&q), rows(&k), rows(&v)], (b, n, m, c), heads, self.0)
                    .run(|kernel| kernel.run::<V>(), |kernel| kernel.run::<V>());
                // bf16 has eight binary digits
                let tolerance = match self.0.map(|tiles| tiles.precision) {
                    None => 1e-5,
                    Some(Precision::F32) => 3e-5,
                    Some(Precision::Bf16) => 3e-2,
                };
                for (i, y) in y.iter().enumerate() {
                    let (image, head, row) = (i / (n * c), i % c / d, i / c);
                    let at = |key: usize| (image * m + key) * c + head * d;
                    let weights: Vec<f64> = (0..m)
                        .map(|key| {
                            (0..d)
                                .map(|j| {
                                    f64::from(q[row * c + head * d + j]) * f64::from(k[at(key) + j])
                                })
                                .sum::<f64>()
                        })
                        .map(|score| (score / (d as f64).sqrt()).exp())
                        .collect();
                    let sum: f64 = weights
                        .iter()
                        .enumerate()
                        .map(|(key, weight)| weight * f64::from(v[at(key) + i % d]))
                        .sum();
                    let expected = sum / weights.iter().sum::<f64>();
                    assert!(
                        (f64::from(*y) - expected).abs() < tolerance,
                        "{y} for {expected} at {i} of {b}x{n} to {m}, {heads} heads of {d}, {:?}",
                        self.0
                    );
                }
            }
        }
    }

    #[test]
    fn vectors_of_every_kind_give_the_softmax_in_f64() {
        with_every_kind(Compared(None));
    }

    #[test]
    fn tiles_give_the_softmax_in_f64() {
        for tiles in tiles::every_unit() {
            with_every_kind(Compared(Some(tiles)));
        }
    }
}
