//! Products of bf16 on matrix units: Intel's tiles (AMX, `tdpbf16ps`) and AVX-512's pairs
//! (`vdpbf16ps`), with sums in f32; and both in plain code, equal bit for bit, for processors
//! without them.
//!
//! An f32 is the sum of two bf16 but for 2^-17 of it, so that a product of f32 is three of bf16:
//! high*high + high*low + low*high (a weight that was f16 or bf16 is exact). Against sums in f64 of
//! normal numbers the largest error over the largest result is 4e-6 (one product: 2.6e-3; f32:
//! 5e-7), for 64 terms as for 5,760.
//!
//! What is not finite stays so: NaN is NaN, and infinity is held by the low part alone, as the high
//! one is at most the largest bf16, so that numbers beyond that are no infinity (but for those within
//! 1e-5 of the largest). What overflows may be NaN where it is infinity in f32. Parts below 1.2e-38 count as 0, as the units have it:
//! numbers below 2e-33 lose the digits of their low part, those below 1.2e-38 count as 0.
//!
//! A tile has 16 rows of 64 bytes, each a vector of 16 pairs. A pair holds the terms i and 16 + i
//! of 32 terms of a sum, so that two vectors of f32 become a row without changing places: rows of
//! the left side hold the terms of one row of the product, rows of the right side the same pair of
//! terms for each of 16 columns.

use super::concat::uninit_lanes;
use super::instructions::{Instructions, are_named, instructions, vectors};
use super::panels::{PANEL, Panels, WIDTH};
use super::vector::{Kernel, LANES, Lanes, Vector, dispatch};
use crate::nn::Precision;
use rayon::prelude::*;

/// Rows of a tile.
pub const ROWS: usize = 16;

/// Terms of a sum in a row of a tile.
pub const TERMS: usize = 2 * LANES;

/// The largest bf16.
const LARGEST: f32 = f32::from_bits(0x7f7f_0000);

/// A unit that multiplies bf16, and of how many bf16 a number is made there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiles {
    unit: Unit,
    pub precision: Precision,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// `tdpbf16ps`
    Amx { emulated: bool },
    /// `vdpbf16ps`
    Pairs { emulated: bool },
}

impl Tiles {
    /// The unit for products of this precision among the instructions that were chosen, if there is
    /// one. Three products stand for one of f32 only where somebody named AMX: one block of a tiny
    /// test network makes 2.5e-4 of their error, and 1e-4 is allowed (`tests/it/parity.rs`).
    pub fn chosen(precision: Precision) -> Option<Self> {
        if precision == Precision::F32 && !are_named() {
            return None;
        }
        Self::of(instructions(), precision)
    }

    /// The unit among these instructions, emulated where it is not there. Three products of pairs
    /// would take longer than one of f32.
    pub fn of(set: Instructions, precision: Precision) -> Option<Self> {
        let emulated = !set.is_there();
        let unit = match (set, precision) {
            (Instructions::Amx, _) => Unit::Amx { emulated },
            (Instructions::Avx512Bf16, Precision::Bf16) => Unit::Pairs { emulated },
            _ => return None,
        };
        Some(Self { unit, precision })
    }

    /// Whether it multiplies so much faster than vectors that a convolution by Winograd's algorithm,
    /// with a quarter of the products, takes longer: pairs are twice as fast, tiles 5 to 15 times.
    pub fn beats_winograd(self) -> bool {
        matches!(self.unit, Unit::Amx { .. })
    }

    /// Rows of one task of a product, and terms that are summed at once: of the left side 590 KB in
    /// the second cache of processors with tiles (2 MiB), 390 KB in that of others (1 MiB); and
    /// 48 KiB of weights in the first.
    pub fn block(self) -> usize {
        match self.unit {
            Unit::Amx { .. } => 384,
            Unit::Pairs { .. } => 256,
        }
    }

    /// See [`Self::block`].
    pub fn depth(self) -> usize {
        768 / self.parts()
    }

    /// Bf16 of which a number is made.
    pub fn parts(self) -> usize {
        match self.precision {
            Precision::F32 => 2,
            Precision::Bf16 => 1,
        }
    }

    /// Bf16 of which a weight is made: one that is stored as bf16 is exact.
    pub fn parts_of(self, weight: Panels) -> usize {
        match weight {
            Panels::Bf16(_) => 1,
            _ => self.parts(),
        }
    }

    /// Whether plain code stands for the unit.
    pub fn is_emulated(self) -> bool {
        let (Unit::Amx { emulated } | Unit::Pairs { emulated }) = self.unit;
        emulated
    }

    /// Multiplies for some 20 ms with neither loads nor stores, if the unit is there; returns the
    /// operations.
    pub fn spin(self) -> u64 {
        #[cfg(target_arch = "x86_64")]
        match self.unit {
            Unit::Amx { emulated: false } => {
                const TIMES: usize = 1 << 20;
                self.set_up(|| amx::spin(TIMES));
                return (TIMES * 4 * 2 * ROWS * LANES * TERMS) as u64;
            }
            Unit::Pairs { emulated: false } => {
                const TIMES: usize = 1 << 22;
                // SAFETY: the instructions are there, as `of` has it
                unsafe { pairs::spin(TIMES) };
                return (TIMES * pairs::CHAINS * 2 * 2 * LANES) as u64;
            }
            _ => {}
        }
        0
    }

    /// Runs work that multiplies tiles, with this thread's tiles set up meanwhile.
    pub fn set_up<R>(self, work: impl FnOnce() -> R) -> R {
        #[cfg(target_arch = "x86_64")]
        if self.unit == (Unit::Amx { emulated: false }) {
            let _configured = amx::Configured::new();
            return work();
        }
        work()
    }

    /// Multiplies tiles of rows by two tiles of columns: sums [strips*16, PANEL] (+)= left [strips,
    /// terms/32, parts, 16] right [terms/32, parts, PANEL, 16]. Call it in [`Self::set_up`].
    pub fn multiply(self, left: Side, right: Side, sums: &mut [Lanes], add: bool) {
        let strips = sums.len() / (ROWS * PANEL);
        let terms = right.lines.len() / (right.parts * PANEL * ROWS);
        let strip = terms * left.parts * ROWS;
        assert!(
            terms > 0
                && sums.len() == strips * ROWS * PANEL
                && left.lines.len() == strips * strip
                && right.lines.len() == terms * right.parts * PANEL * ROWS
                && left.parts == self.parts()
                && (1..=left.parts).contains(&right.parts)
        );
        #[cfg(target_arch = "x86_64")]
        match self.unit {
            // SAFETY: the instructions are there, as `of` has it, and the sides hold what they must
            Unit::Amx { emulated: false } => unsafe {
                return amx::multiply(left, right, terms, sums, add);
            },
            // SAFETY: as above
            Unit::Pairs { emulated: false } => unsafe {
                return pairs::multiply(left.lines, right.lines, sums, add);
            },
            _ => {}
        }
        if !add {
            sums.fill(Lanes::default());
        }
        let order: &[(usize, usize)] = match (left.parts, right.parts) {
            (1, _) => &[(0, 0)],
            (_, 1) => &[(1, 0), (0, 0)],
            _ => &[(1, 0), (0, 0), (0, 1)],
        };
        let is_amx = matches!(self.unit, Unit::Amx { .. });
        for (left_strip, sums) in left
            .lines
            .chunks_exact(strip)
            .zip(sums.chunks_exact_mut(ROWS * PANEL))
        {
            for tile in 0..terms {
                for (left_part, right_part) in order {
                    let at = (tile * left.parts + left_part) * ROWS;
                    let rows = &left_strip[at..][..ROWS];
                    let at = (tile * right.parts + right_part) * PANEL * ROWS;
                    for column in 0..PANEL {
                        let columns = &right.lines[at + column * ROWS..][..ROWS];
                        emulation::multiply(is_amx, rows, columns, column, sums);
                    }
                }
            }
        }
    }

    /// Writes terms of a row, with zeros after the last, as rows of left tiles: `lines` begins with
    /// the first of them.
    #[inline(always)]
    pub fn pack_row<V: Vector>(self, numbers: &[f32], lines: &mut [Lanes]) {
        let parts = self.parts();
        for (numbers, lines) in numbers.chunks(TERMS).zip(lines.chunks_mut(parts * ROWS)) {
            let (first, second) = numbers.split_at(numbers.len().min(LANES));
            let pair = [V::load_some(first), V::load_some(second)];
            self.pack::<V>(pair, parts, lines, ROWS);
        }
    }

    /// Rows of c numbers, a multiple of [`TERMS`], as lines [rows, c/32, parts] of tiles.
    pub fn lines_of(self, numbers: &[f32]) -> Vec<Lanes> {
        let mut lines = uninit_lanes(numbers.len() / TERMS * self.parts());
        lines
            .par_chunks_mut(TASK * self.parts())
            .zip(numbers.par_chunks(TASK * TERMS))
            .for_each(|(lines, numbers)| {
                dispatch(Lines {
                    tiles: self,
                    numbers,
                    lines,
                });
            });
        lines
    }

    /// Writes the columns of 16 rows of pairs as a tile of each part, `step` rows apart.
    #[inline(always)]
    pub fn pack_columns<V: Vector>(
        self,
        pairs: &[[V; 2]; LANES],
        lines: &mut [Lanes],
        step: usize,
    ) {
        let mut high = [V::splat(0.0); LANES];
        let mut low = high;
        for (i, pair) in pairs.iter().enumerate() {
            match self.precision {
                Precision::F32 => [high[i], low[i]] = split(*pair),
                Precision::Bf16 => high[i] = nearest(*pair),
            }
        }
        for (column, line) in V::transpose(high).into_iter().zip(&mut *lines) {
            column.store(&mut line.0);
        }
        if self.parts() > 1 {
            for (column, line) in V::transpose(low).into_iter().zip(&mut lines[step..]) {
                column.store(&mut line.0);
            }
        }
    }

    /// Writes a pair of vectors as a row of each part, `step` rows apart.
    #[inline(always)]
    pub fn pack<V: Vector>(self, pair: [V; 2], parts: usize, lines: &mut [Lanes], step: usize) {
        match self.precision {
            Precision::F32 => {
                let [high, low] = split(pair);
                high.store(&mut lines[0].0);
                if parts > 1 {
                    low.store(&mut lines[step].0);
                }
            }
            Precision::Bf16 => nearest(pair).store(&mut lines[0].0),
        }
    }

    /// Writes terms of a panel of weights from `at` on, with zeros after the last, as right tiles.
    #[inline(always)]
    pub fn pack_weight<V: Vector>(
        self,
        weight: Panels,
        at: usize,
        terms: usize,
        lines: &mut [Lanes],
    ) {
        let parts = self.parts_of(weight);
        for (first, lines) in (0..terms)
            .step_by(TERMS)
            .zip(lines.chunks_exact_mut(parts * PANEL * ROWS))
        {
            for i in 0..LANES {
                for column in 0..PANEL {
                    let mut pair = [V::splat(0.0); 2];
                    for (half, numbers) in pair.iter_mut().enumerate() {
                        let term = first + half * LANES + i;
                        if term < terms {
                            *numbers = weight.load::<V>(at + term * WIDTH + column * LANES);
                        }
                    }
                    let lines = &mut lines[column * ROWS + i..];
                    match weight {
                        // exact: nothing to round
                        Panels::Bf16(_) => pair[0].pairs(pair[1]).store(&mut lines[0].0),
                        _ => self.pack::<V>(pair, parts, lines, PANEL * ROWS),
                    }
                }
            }
        }
    }
}

/// Every unit, emulated; and those that are there.
#[cfg(test)]
pub fn every_unit() -> Vec<Tiles> {
    let sets = [
        (Instructions::Amx, Precision::F32),
        (Instructions::Amx, Precision::Bf16),
        (Instructions::Avx512Bf16, Precision::Bf16),
    ];
    let emulated = sets.map(|(set, precision)| {
        let unit = match set {
            Instructions::Amx => Unit::Amx { emulated: true },
            _ => Unit::Pairs { emulated: true },
        };
        Tiles { unit, precision }
    });
    let real = sets.map(|(set, precision)| Tiles::of(set, precision));
    let mut all = emulated.to_vec();
    all.extend(
        real.into_iter()
            .flatten()
            .filter(|tiles| !emulated.contains(tiles)),
    );
    all
}

/// Tiles' rows of one task of [`Tiles::lines_of`].
const TASK: usize = 1024;

/// Numbers to rows of tiles, one after the other.
struct Lines<'a> {
    tiles: Tiles,
    numbers: &'a [f32],
    lines: &'a mut [Lanes],
}

impl Kernel for Lines<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let parts = self.tiles.parts();
        for (numbers, lines) in self
            .numbers
            .chunks_exact(TERMS)
            .zip(self.lines.chunks_exact_mut(parts))
        {
            let pair = [V::load_some(numbers), V::load_some(&numbers[LANES..])];
            self.tiles.pack::<V>(pair, parts, lines, 1);
        }
    }
}

/// The high and the low bf16 of f32s, as pairs.
#[inline(always)]
fn split<V: Vector>(pair: [V; 2]) -> [V; 2] {
    let (mut high, mut low) = (pair, pair);
    for (high, low) in high.iter_mut().zip(&mut low) {
        // NaN stays NaN
        let finite = V::splat(-LARGEST).max(V::splat(LARGEST).min(*high));
        *high = finite.rounded().upper();
        *low = low.sub(*high).rounded();
    }
    [high[0].pairs(high[1]), low[0].pairs(low[1])]
}

/// The nearest bf16 of f32s, as pairs.
#[inline(always)]
fn nearest<V: Vector>([first, second]: [V; 2]) -> V {
    first.rounded_even().pairs(second.rounded_even())
}

/// The instructions that compute products of this precision.
pub fn instructions_of(precision: Precision) -> String {
    match Tiles::chosen(precision) {
        Some(tiles) if tiles.is_emulated() => format!("{}, emulated", instructions()),
        Some(_) => instructions().to_string(),
        None => vectors().to_string(),
    }
}

/// Tiles of one side of a product.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    pub lines: &'a [Lanes],
    /// bf16 of which each number is made, the high one first
    pub parts: usize,
}

/// What the instructions do, in plain code.
mod emulation {
    use super::super::instructions::{Vectors, vectors};
    use super::{LANES, Lanes, PANEL, ROWS};

    /// Adds the products of 16 rows and 16 columns to a column of sums [16, PANEL].
    pub fn multiply(
        is_amx: bool,
        rows: &[Lanes],
        columns: &[Lanes],
        column: usize,
        sums: &mut [Lanes],
    ) {
        let right: Vec<[[f32; LANES]; 2]> = columns.iter().map(halves).collect();
        for (row, sums) in rows.iter().zip(sums.chunks_exact_mut(PANEL)) {
            let (left, sums) = (halves(row), &mut sums[column].0);
            let fast = match vectors() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the processor has these instructions
                Vectors::Avx512 | Vectors::Avx2 => unsafe {
                    fused_row(is_amx, &left, &right, sums)
                },
                // by a slow call on some
                _ => None,
            };
            *sums = fast.unwrap_or_else(|| add_row(is_amx, &left, &right, sums, exactly).0);
        }
    }

    /// The first and the second of each pair, as f32. Denormals are 0.
    fn halves(line: &Lanes) -> [[f32; LANES]; 2] {
        let number = |bits: u32| {
            let x = f32::from_bits(bits);
            if x.is_subnormal() {
                0f32.copysign(x)
            } else {
                x
            }
        };
        [
            line.0.map(|pair| number(pair.to_bits() << 16)),
            line.0.map(|pair| number(pair.to_bits() & 0xffff_0000)),
        ]
    }

    /// The sums of a row, unless one of them came near to what is denormal.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn fused_row(
        is_amx: bool,
        left: &[[f32; LANES]; 2],
        right: &[[[f32; LANES]; 2]],
        sums: &[f32; LANES],
    ) -> Option<[f32; LANES]> {
        let (sums, tiny) = add_row(is_amx, left, right, sums, |a, b, sum| a.mul_add(b, sum));
        (!tiny).then_some(sums)
    }

    /// a * b + sum rounded once, 0 if it is denormal.
    fn exactly(a: f32, b: f32, sum: f32) -> f32 {
        // The product of two bf16 is exact in f64. The sum is not where one is far smaller than the
        // other, but then it is not half way between two f32 either.
        let exact = f64::from(a) * f64::from(b) + f64::from(sum);
        // denormal after rounding to 24 digits
        if exact.abs() < 2f64.powi(-126) - 2f64.powi(-151) {
            0f32.copysign(exact as f32)
        } else {
            exact as f32
        }
    }

    /// The sums of a row, and whether a result of `fused` was denormal or next to that.
    #[inline(always)]
    fn add_row(
        is_amx: bool,
        left: &[[f32; LANES]; 2],
        right: &[[[f32; LANES]; 2]],
        sums: &[f32; LANES],
        fused: impl Fn(f32, f32, f32) -> f32,
    ) -> ([f32; LANES], bool) {
        let flushed = |x: f32| {
            if x.is_subnormal() {
                0f32.copysign(x)
            } else {
                x
            }
        };
        let sums = sums.map(flushed);
        let mut tiny = 0;
        let mut add = |to: &mut [f32; LANES], left: f32, right: &[f32; LANES]| {
            for (to, right) in to.iter_mut().zip(right) {
                *to = fused(left, *right, *to);
                tiny |= u32::from(*to != 0.0 && to.abs() <= f32::MIN_POSITIVE);
            }
        };
        let sums = if is_amx {
            // the first of pairs and the second apart, then their sum to what was there
            let [mut first, mut second] = [[0.0; LANES]; 2];
            for (k, right) in right.iter().enumerate().take(ROWS) {
                add(&mut first, left[0][k], &right[0]);
                add(&mut second, left[1][k], &right[1]);
            }
            std::array::from_fn(|i| flushed(sums[i] + flushed(first[i] + second[i])))
        } else {
            // the second of a pair before the first
            let mut sums = sums;
            for (k, right) in right.iter().enumerate().take(ROWS) {
                add(&mut sums, left[1][k], &right[1]);
                add(&mut sums, left[0][k], &right[0]);
            }
            sums
        };
        (sums, tiny != 0)
    }
}

/// Intel's tiles. Its intrinsics are not stable, assembly is; and a loop that is one block of it
/// keeps the sums in tiles.
#[cfg(target_arch = "x86_64")]
mod amx {
    use super::{Lanes, PANEL, ROWS, Side};
    use std::arch::asm;
    use std::marker::PhantomData;

    /// Bytes of a row of a tile, of a row of sums, and of a tile.
    const LINE: usize = size_of::<Lanes>();
    const SUMS: usize = PANEL * LINE;
    const TILE: usize = ROWS * LINE;

    /// Palette 1: eight tiles of 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Palette([u8; 64]);

    /// Tiles of this thread that are set up, until it is dropped.
    pub struct Configured(PhantomData<*const ()>);

    impl Configured {
        /// Sets tiles up; they must be there.
        pub fn new() -> Self {
            let mut palette = Palette([0; 64]);
            palette.0[0] = 1;
            for tile in 0..8 {
                palette.0[16 + 2 * tile] = LINE as u8;
                palette.0[48 + tile] = ROWS as u8;
            }
            // SAFETY: `Tiles::of` found the instructions, and 64 bytes are read
            unsafe { asm!("ldtilecfg [{}]", in(reg) &palette, options(nostack, readonly)) };
            Self(PhantomData)
        }
    }

    impl Drop for Configured {
        fn drop(&mut self) {
            // SAFETY: as above; no tile is in use between two blocks of assembly
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
        }
    }

    /// Loads tiles of rows, `at` bytes from where the sides' pointers are.
    macro_rules! rows {
        (1, $at:literal) => {
            concat!("tileloadd tmm4, [{left} + {line}*1 + ", $at, "]\n")
        };
        (2, $at:literal) => {
            concat!(
                rows!(1, $at),
                "tileloadd tmm5, [{below} + {line}*1 + ",
                $at,
                "]\n"
            )
        };
    }

    /// Loads two tiles of columns.
    macro_rules! columns {
        ($at:literal, $next:literal) => {
            concat!(
                "tileloadd tmm6, [{right} + {line}*1 + ",
                $at,
                "]\n",
                "tileloadd tmm7, [{right} + {line}*1 + ",
                $next,
                "]\n"
            )
        };
    }

    /// Adds the products of what is loaded.
    macro_rules! products {
        (1) => {
            "tdpbf16ps tmm0, tmm4, tmm6\ntdpbf16ps tmm1, tmm4, tmm7\n"
        };
        (2) => {
            concat!(
                products!(1),
                "tdpbf16ps tmm2, tmm5, tmm6\ntdpbf16ps tmm3, tmm5, tmm7\n"
            )
        };
    }

    /// The products of 32 terms, by the parts of the left and of the right side.
    macro_rules! terms {
        ($strips:tt, 1, 1) => {
            concat!(columns!(0, 1024), rows!($strips, 0), products!($strips))
        };
        ($strips:tt, 2, 1) => {
            concat!(
                columns!(0, 1024),
                rows!($strips, 1024),
                products!($strips),
                rows!($strips, 0),
                products!($strips)
            )
        };
        ($strips:tt, 2, 2) => {
            concat!(
                terms!($strips, 2, 1),
                columns!(2048, 3072),
                products!($strips)
            )
        };
    }

    /// Loads, clears or stores sums.
    macro_rules! sums {
        (load 1) => {
            "tileloadd tmm0, [{sums} + {row}*1]\ntileloadd tmm1, [{sums} + {row}*1 + 64]\n"
        };
        (load 2) => {
            concat!(
                sums!(load 1),
                "tileloadd tmm2, [{sums} + {row}*1 + 2048]\ntileloadd tmm3, [{sums} + {row}*1 + 2112]\n"
            )
        };
        (clear 1) => {
            "tilezero tmm0\ntilezero tmm1\n"
        };
        (clear 2) => {
            concat!(sums!(clear 1), "tilezero tmm2\ntilezero tmm3\n")
        };
        (store 1) => {
            "tilestored [{sums} + {row}*1], tmm0\ntilestored [{sums} + {row}*1 + 64], tmm1\n"
        };
        (store 2) => {
            concat!(
                sums!(store 1),
                "tilestored [{sums} + {row}*1 + 2048], tmm2\ntilestored [{sums} + {row}*1 + 2112], tmm3\n"
            )
        };
    }

    /// The whole loop over terms for one or two strips; `$below` moves on where there are two.
    macro_rules! block {
        ($strips:tt, $left:tt, $right:tt, $below:expr, [$($operands:tt)*]) => {
            asm!(
                "test {add}, {add}",
                "jz 2f",
                sums!(load $strips),
                "jmp 3f",
                "2:",
                sums!(clear $strips),
                "3:",
                terms!($strips, $left, $right),
                concat!("add {left}, ", $left, " * 1024"),
                $below,
                concat!("add {right}, ", $right, " * 2048"),
                "dec {terms}",
                "jnz 3b",
                sums!(store $strips),
                $($operands)*
                line = in(reg) LINE,
                row = in(reg) SUMS,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)
            )
        };
    }

    /// See [`super::Tiles::multiply`].
    ///
    /// # Safety
    /// Tiles must be set up, and the sides must hold `terms` tiles for each strip of the sums.
    pub unsafe fn multiply(left: Side, right: Side, terms: usize, sums: &mut [Lanes], add: bool) {
        let parts = (left.parts, right.parts);
        let strip = terms * left.parts * TILE;
        let mut strips = sums.len() / (ROWS * PANEL);
        let mut rows = left.lines.as_ptr().cast::<u8>();
        let mut sums = sums.as_mut_ptr().cast::<u8>();
        macro_rules! one {
            ($left:tt, $right:tt) => {
                block!(1, $left, $right, "", [
                    left = inout(reg) rows => _, right = inout(reg) right.lines.as_ptr() => _,
                    terms = inout(reg) terms => _, sums = in(reg) sums, add = in(reg) usize::from(add),
                ])
            };
        }
        macro_rules! two {
            ($left:tt, $right:tt) => {
                block!(2, $left, $right, concat!("add {below}, ", $left, " * 1024"), [
                    left = inout(reg) rows => _, below = inout(reg) rows.add(strip) => _,
                    right = inout(reg) right.lines.as_ptr() => _,
                    terms = inout(reg) terms => _, sums = in(reg) sums, add = in(reg) usize::from(add),
                ])
            };
        }
        while strips > 0 {
            let count = strips.min(2);
            // SAFETY: the caller's promise: left holds `strips` strips of so many tiles, right so
            // many pairs of tiles, sums 16 rows for each strip; more than is there is not read
            unsafe {
                match (count, parts) {
                    (1, (1, _)) => one!(1, 1),
                    (1, (_, 1)) => one!(2, 1),
                    (1, _) => one!(2, 2),
                    (_, (1, _)) => two!(1, 1),
                    (_, (_, 1)) => two!(2, 1),
                    _ => two!(2, 2),
                }
                rows = rows.add(count * strip);
                sums = sums.add(count * ROWS * SUMS);
            }
            strips -= count;
        }
    }

    /// Multiplies `times` times four tiles, with neither loads nor stores. Tiles must be set up.
    pub fn spin(times: usize) {
        // SAFETY: only numbers in tiles change
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:", products!(2), "dec {times}", "jnz 2b",
                times = inout(reg) times.max(1) => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, nomem)
            );
        }
    }
}

/// AVX-512's products of pairs.
#[cfg(target_arch = "x86_64")]
mod pairs {
    use super::{Lanes, PANEL, ROWS};
    use std::arch::x86_64::*;

    /// Rows whose sums stay in registers.
    const HALF: usize = 8;

    /// See [`super::Tiles::multiply`], for one part on each side.
    ///
    /// # Safety
    /// The instructions must be there, and the left side must hold as many tiles for each strip of
    /// sums as the right one does for each of two columns.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn multiply(left: &[Lanes], right: &[Lanes], sums: &mut [Lanes], add: bool) {
        let strip = right.len() / PANEL;
        for (left, sums) in left
            .chunks_exact(strip)
            .zip(sums.chunks_exact_mut(ROWS * PANEL))
        {
            for (half, sums) in sums.chunks_exact_mut(HALF * PANEL).enumerate() {
                // SAFETY: the caller's promise: all indices are inside of the slices
                unsafe {
                    block(
                        left.as_ptr().add(half * HALF),
                        right,
                        sums.as_mut_ptr(),
                        add,
                    );
                }
            }
        }
    }

    /// Eight rows of a strip.
    ///
    /// # Safety
    /// `left` must point to a row of a strip of as many tiles as `right` has for each column, and
    /// `sums` to 8 rows.
    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    #[expect(
        clippy::needless_range_loop,
        reason = "constant bounds, see `gemm::tiles`"
    )]
    unsafe fn block(left: *const Lanes, right: &[Lanes], to: *mut Lanes, add: bool) {
        // SAFETY: the caller's promise
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); PANEL]; HALF];
            if add {
                for row in 0..HALF {
                    for column in 0..PANEL {
                        sums[row][column] = _mm512_loadu_ps(to.add(row * PANEL + column).cast());
                    }
                }
            }
            for (tile, right) in right.chunks_exact(PANEL * ROWS).enumerate() {
                let (left, right) = (left.add(tile * ROWS), right.as_ptr());
                for k in 0..ROWS {
                    let mut columns = [_mm512_setzero_ps(); PANEL];
                    for column in 0..PANEL {
                        columns[column] = _mm512_loadu_ps(right.add(column * ROWS + k).cast());
                    }
                    for row in 0..HALF {
                        let pair = _mm512_set1_ps(*left.add(row).cast::<f32>().add(k));
                        for column in 0..PANEL {
                            sums[row][column] = _mm512_dpbf16_ps(
                                sums[row][column],
                                bf16s(pair),
                                bf16s(columns[column]),
                            );
                        }
                    }
                }
            }
            for row in 0..HALF {
                for column in 0..PANEL {
                    _mm512_storeu_ps(to.add(row * PANEL + column).cast(), sums[row][column]);
                }
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    fn bf16s(bits: __m512) -> __m512bh {
        // SAFETY: both are 64 bytes of any bits
        unsafe { std::mem::transmute(bits) }
    }

    /// Sums that hide the latency of a multiplication.
    pub const CHAINS: usize = 16;

    /// Multiplies `times` times [`CHAINS`] vectors, with neither loads nor stores.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn spin(times: usize) {
        let (a, b) = (_mm512_set1_ps(0.5), _mm512_set1_ps(1e-3));
        let mut sums = [_mm512_set1_ps(std::hint::black_box(1.0)); CHAINS];
        for _ in 0..times {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, bf16s(a), bf16s(b));
            }
        }
        std::hint::black_box(sums);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::gemm::{Epilogue, gemm};
    use super::super::panels::{Pack, Right};
    use super::super::vector::with_every_kind;
    use super::*;
    use crate::nn::blocks::{BlockMatrix, BlockType, Rows};
    use crate::nn::testing::normal;
    use candle_core::{DType, Storage, Tensor};
    use std::ops::Range;

    fn bf16(bits: u32) -> f64 {
        let x = f32::from_bits(bits << 16);
        if x.is_subnormal() { 0.0 } else { f64::from(x) }
    }

    fn bits(state: &mut u64) -> u32 {
        *state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (*state >> 33) as u32
    }

    /// 32 products for each of 16 columns, from Intel's description of the instruction, in f64
    /// rounded after each step.
    fn described(is_amx: bool, left: &[u32], right: &[[u32; 16]], sum: f32, column: usize) -> f32 {
        let flush = |x: f64| {
            let tiny = x.abs() < 2f64.powi(-126) - 2f64.powi(-151);
            if tiny { 0.0 } else { f64::from(x as f32) }
        };
        let old = if sum.is_subnormal() {
            0.0
        } else {
            f64::from(sum)
        };
        let product = |k: usize, shift: u32| {
            bf16(left[k] >> shift & 0xffff) * bf16(right[k][column] >> shift & 0xffff)
        };
        let sum = if is_amx {
            let chain = |shift| (0..16).fold(0.0, |sum, k| flush(sum + product(k, shift)));
            flush(old + flush(chain(0) + chain(16)))
        } else {
            (0..16).fold(old, |sum, k| {
                flush(flush(sum + product(k, 16)) + product(k, 0))
            })
        };
        sum as f32
    }

    #[test]
    fn tiles_multiply_as_their_instruction_is_described_to_the_last_bit() {
        let mut state = 7;
        // of ordinary numbers, of tiny ones whose products are denormal or nothing, of any bits
        let kinds: [&dyn Fn(u32) -> u32; 4] = [
            &|x| x & 0x80ff_80ff | 0x3f00_3f00,
            &|x| x & 0x87ff_87ff | 0x1c00_1c00,
            &|x| x & 0x83ff_83ff | 0x1e00_1e00,
            &|x| x,
        ];
        for tiles in every_unit()
            .into_iter()
            .filter(|t| t.precision == Precision::Bf16)
        {
            let is_amx = matches!(tiles.unit, Unit::Amx { .. });
            for (n, kind) in kinds.iter().enumerate() {
                for (strips, terms, add) in [(1, 1, false), (2, 1, true), (3, 2, true)] {
                    let mut lines = |count: usize| -> Vec<Lanes> {
                        (0..count * ROWS)
                            .map(|_| {
                                Lanes(std::array::from_fn(|_| {
                                    f32::from_bits(kind(bits(&mut state)))
                                }))
                            })
                            .collect()
                    };
                    let (left, right) = (lines(strips * terms), lines(terms * PANEL));
                    let before = lines(strips * PANEL);
                    let mut sums = before.clone();
                    let side = |lines| Side { lines, parts: 1 };
                    tiles.set_up(|| tiles.multiply(side(&left), side(&right), &mut sums, add));
                    for (i, sum) in sums.iter().flat_map(|sums| sums.0).enumerate() {
                        let (row, column) = (i / TERMS, i % TERMS);
                        let mut expected = if add { before[i / 16].0[i % 16] } else { 0.0 };
                        for tile in 0..terms {
                            let at = (row / 16 * terms + tile) * 16 + row % 16;
                            let left = left[at].0.map(f32::to_bits);
                            let at = (tile * PANEL + column / 16) * 16;
                            let right: Vec<_> = right[at..][..16]
                                .iter()
                                .map(|x| x.0.map(f32::to_bits))
                                .collect();
                            expected = described(is_amx, &left, &right, expected, column % 16);
                        }
                        let alike = sum.to_bits() == expected.to_bits()
                            || sum.is_nan() && expected.is_nan()
                            || sum == 0.0 && expected == 0.0;
                        assert!(
                            alike,
                            "{tiles:?}, kind {n}: {sum:e} for {expected:e} at {i}"
                        );
                    }
                }
            }
        }
    }

    /// Whether two ways to the same number are one: NaN has many bits.
    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
    }

    #[test]
    fn instructions_that_are_there_equal_their_emulation_to_the_last_bit() {
        let mut state = 3;
        for real in every_unit() {
            let emulated = Tiles {
                unit: match real.unit {
                    Unit::Amx { .. } => Unit::Amx { emulated: true },
                    Unit::Pairs { .. } => Unit::Pairs { emulated: true },
                },
                ..real
            };
            let parts = real.parts();
            for case in 0..200 {
                let (strips, terms) = (1 + case % 3, 1 + case % 4);
                // from tiny to huge from case to case, alike in one
                let exponent =
                    (case as u32 * 37 % 200 + 20) << 7 | (case as u32 * 37 % 200 + 20) << 23;
                let mut lines = |count: usize| -> Vec<Lanes> {
                    let mut number = || bits(&mut state) & 0x81ff_81ff;
                    let line =
                        |_| Lanes(std::array::from_fn(|_| f32::from_bits(number() ^ exponent)));
                    (0..count * ROWS).map(line).collect()
                };
                for right_parts in 1..=parts {
                    let left = lines(strips * terms * parts);
                    let right = lines(terms * PANEL * right_parts);
                    let before = lines(strips * PANEL);
                    let [one, other] = [real, emulated].map(|tiles| {
                        let mut sums = before.clone();
                        let left = Side {
                            lines: &left,
                            parts,
                        };
                        let right = Side {
                            lines: &right,
                            parts: right_parts,
                        };
                        tiles.set_up(|| tiles.multiply(left, right, &mut sums, case % 2 == 0));
                        sums
                    });
                    for (one, other) in one
                        .iter()
                        .flat_map(|x| x.0)
                        .zip(other.iter().flat_map(|x| x.0))
                    {
                        assert!(same(one, other), "{real:?}: {one:e} for {other:e}");
                    }
                }
            }
        }
    }

    /// The two parts of 32 numbers, put together again.
    #[derive(Clone)]
    struct Parts<'a>(&'a [f32], &'a std::sync::Mutex<Vec<f32>>);

    impl Kernel for Parts<'_> {
        fn run<V: Vector>(self) {
            let pair = [V::load_some(&self.0[..16]), V::load_some(&self.0[16..])];
            let [high, low] = split(pair).map(|line| {
                let mut numbers = [0.0; LANES];
                line.store(&mut numbers);
                let part = |bits: u32| {
                    let x = f32::from_bits(bits);
                    if x.is_subnormal() { 0.0 } else { x }
                };
                let half = |shift: u32| numbers.map(|x| part(x.to_bits() >> shift << 16));
                [half(0), half(16)].concat()
            });
            let sum = high.iter().zip(&low).map(|(high, low)| high + low);
            self.1.lock().unwrap().extend(sum);
        }
    }

    #[test]
    fn a_number_is_the_sum_of_its_two_bf16_and_what_is_not_finite_stays_so() {
        let both = |x: f32| {
            let sums = std::sync::Mutex::default();
            with_every_kind(Parts(&[x; 32], &sums));
            let sums = sums.into_inner().unwrap();
            assert!(
                sums.iter().all(|sum| same(*sum, sums[0])),
                "{x:e}: {sums:?}"
            );
            sums[0]
        };
        let mut state = 1;
        for _ in 0..20_000 {
            let x = f32::from_bits(bits(&mut state) << 1 | bits(&mut state) & 1);
            let y = both(x);
            if x.is_nan() {
                assert!(y.is_nan(), "{x:?}");
            } else if x.abs() > 2e-33 {
                let off = (f64::from(x) - f64::from(y)).abs() / f64::from(x).abs();
                assert!(off < 2f64.powi(-17), "{x:e}: {off:e}");
            } else if x.is_normal() {
                let off = (f64::from(x) - f64::from(y)).abs() / f64::from(x).abs();
                assert!(off < 2f64.powi(-8), "{x:e}: {off:e}");
            }
        }
        // the largest may be rounded to infinity
        assert!(!both(f32::MAX).is_nan() && both(f32::MAX) > 0.0);
        for x in [f32::from_bits(0x7f7f_8000), LARGEST, 3.4e38] {
            let off = |x: f32| (f64::from(x) - f64::from(both(x))).abs() / f64::from(x).abs();
            assert!(off(x) < 1e-5 && off(-x) < 1e-5, "{x:e} is {:e}", both(x));
        }
        assert!(both(f32::INFINITY) == f32::INFINITY && both(f32::NEG_INFINITY) == -f32::INFINITY);
        for nan in [0x7f80_0001, 0x7fff_ffff, 0xffff_ffff, 0xff80_8000] {
            assert!(both(f32::from_bits(nan)).is_nan(), "{nan:x}");
        }
        // f16 and bf16 are exact
        for half in 0..=u16::MAX {
            let x = half::f16::from_bits(half).to_f32();
            assert!(x.is_nan() || half % 7 != 0 || both(x) == x, "{x:e}");
        }
    }

    fn product(tiles: Option<Tiles>, x: &Tensor, weight: &Tensor, epilogue: Epilogue) -> Vec<f32> {
        let n = weight.dim(0).unwrap();
        let pack = Pack {
            gated: epilogue.gated,
        };
        let packed = weight.apply_op1_no_bwd(&pack).unwrap();
        let (storage, layout) = packed.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            unreachable!()
        };
        let weight = Right::Panels(Panels::of(storage, layout).unwrap());
        product_with(tiles, x, (weight, n), epilogue)
    }

    fn product_with(
        tiles: Option<Tiles>,
        x: &Tensor,
        (weight, n): (Right, usize),
        epilogue: Epilogue,
    ) -> Vec<f32> {
        let (m, k) = x.dims2().unwrap();
        let x: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
        gemm(
            (m, k, n),
            |row: usize, terms: Range<usize>, to: &mut [f32]| {
                to.copy_from_slice(&x[row * k..][terms])
            },
            weight,
            epilogue,
            tiles,
        )
    }

    /// The error that a product of this precision may have, of its largest result.
    fn tolerance(precision: Precision) -> f32 {
        match precision {
            // as the module states, with room for the product of two sums, of value and gate
            Precision::F32 => 2e-5,
            Precision::Bf16 => 2e-2,
        }
    }

    #[test]
    fn products_on_tiles_equal_those_of_vectors_with_every_epilogue() {
        let shapes = [
            (1, 1, 2),
            (3, 77, 6),
            (65, 33, 130),
            (40, 800, 36),
            (400, 100, 360),
        ];
        for (m, k, n) in shapes {
            let [x, weight] = [(m, k), (n, k)].map(|shape| normal(0f32, 1.0, shape));
            let [bias, slope] = [0.5, 0.2].map(|std| normal(0f32, std, n).to_vec1().unwrap());
            let residual: Vec<f32> = normal(0f32, 1.0, m * n).to_vec1().unwrap();
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let weight = weight.to_dtype(dtype).unwrap();
                let plain = Epilogue::default();
                let epilogues = [
                    plain,
                    Epilogue {
                        bias: Some(&bias),
                        gated: true,
                        ..plain
                    },
                    Epilogue {
                        bias: Some(&bias),
                        residual: Some(&residual),
                        slope: Some(&slope),
                        gated: false,
                    },
                ];
                for (i, epilogue) in epilogues.into_iter().enumerate() {
                    let expected = product(None, &x, &weight, epilogue);
                    let largest = expected.iter().fold(1f32, |most, x| most.max(x.abs()));
                    for tiles in every_unit() {
                        let y = product(Some(tiles), &x, &weight, epilogue);
                        assert_eq!(y.len(), expected.len());
                        for (y, expected) in y.iter().zip(&expected) {
                            let off = (y - expected).abs() / largest;
                            assert!(
                                off < tolerance(tiles.precision),
                                "{m} {k} {n} {dtype:?} {tiles:?}, epilogue {i}: {off:e}"
                            );
                        }
                    }
                }
            }
        }
    }

    /// Random numbers in blocks, whose scales begin at these bytes.
    fn blocks(kind: BlockType, scales: &[usize], (n, k): (usize, usize)) -> BlockMatrix {
        let (numbers, bytes) = kind.block();
        let count = n * k / numbers * bytes;
        let mut raw: Vec<u8> = normal(0f32, 1e3, count)
            .to_vec1::<f32>()
            .unwrap()
            .into_iter()
            .map(|x| x as i32 as u8)
            .collect();
        for (i, block) in raw.chunks_exact_mut(bytes).enumerate() {
            for at in scales {
                let scale = half::f16::from_f32(0.01 + 0.001 * (i % 7) as f32);
                block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
        }
        BlockMatrix::new(n, k, vec![Rows { kind, raw }]).unwrap()
    }

    #[test]
    fn weights_in_blocks_multiply_as_the_numbers_that_they_stand_for() {
        let kinds: [(BlockType, &[usize]); 12] = [
            (BlockType::Q4_0, &[0]),
            (BlockType::Q4_1, &[0, 2]),
            (BlockType::Q5_0, &[0]),
            (BlockType::Q5_1, &[0, 2]),
            (BlockType::Q8_0, &[0]),
            (BlockType::Q2K, &[80, 82]),
            (BlockType::Q3K, &[108]),
            (BlockType::Q4K, &[0, 2]),
            (BlockType::Q5K, &[0, 2]),
            (BlockType::Q6K, &[208]),
            (BlockType::Iq4Nl, &[0]),
            (BlockType::Iq4Xs, &[0]),
        ];
        for (kind, scales) in kinds {
            let small = kind.block().0 == 32;
            // some of whose terms are no whole pieces, and rows that are not there
            for (m, k, n) in [(1, 768, 6), (65, if small { 480 } else { 1280 }, 130)] {
                let matrix = blocks(kind, scales, (n, k));
                let mut wide = vec![0f32; n * k];
                for (row, numbers) in wide.chunks_exact_mut(k).enumerate() {
                    matrix.write(row, 0, numbers);
                }
                let wide = Tensor::from_vec(wide, (n, k), &candle_core::Device::Cpu).unwrap();
                let x = normal(0f32, 1.0, (m, k));
                let bias: Vec<f32> = normal(0f32, 0.5, n).to_vec1().unwrap();
                for gated in [false, true] {
                    let epilogue = Epilogue {
                        bias: Some(&bias),
                        gated,
                        ..Epilogue::default()
                    };
                    let units = every_unit().into_iter().map(Some);
                    for tiles in [None].into_iter().chain(units) {
                        let expected = product(tiles, &x, &wide, epilogue);
                        let right = Right::Blocks(&matrix, &Pack { gated });
                        let y = product_with(tiles, &x, (right, n), epilogue);
                        let largest = expected.iter().fold(1f32, |most, x| most.max(x.abs()));
                        assert_eq!(y.len(), expected.len());
                        for (y, expected) in y.iter().zip(&expected) {
                            let off = (y - expected).abs() / largest;
                            assert!(off < 2e-6, "{kind:?} {m} {k} {n} {tiles:?}: {off:e}");
                        }
                        // the same pieces are the same sums
                        assert!(k == 480 || tiles.is_some() || y == expected);
                    }
                }
            }
        }
    }

    #[test]
    fn three_products_are_as_near_to_f64_as_the_module_says() {
        let tiles = Tiles::of(Instructions::Amx, Precision::F32).unwrap();
        for k in [64, 2880] {
            let (m, n) = (48, 32);
            let [x, weight] = [(m, k), (n, k)].map(|shape| normal(0f32, 1.0, shape));
            let exact = x
                .to_dtype(DType::F64)
                .unwrap()
                .matmul(&weight.to_dtype(DType::F64).unwrap().t().unwrap())
                .unwrap();
            let exact: Vec<f64> = exact.flatten_all().unwrap().to_vec1().unwrap();
            let y = product(Some(tiles), &x, &weight, Epilogue::default());
            let largest = exact.iter().fold(0f64, |most, x| most.max(x.abs()));
            let off = y
                .iter()
                .zip(&exact)
                .map(|(y, x)| (f64::from(*y) - x).abs() / largest);
            let worst = off.fold(0f64, f64::max);
            println!("{k} terms: {worst:.1e}");
            assert!(worst < 6e-6, "{k} terms: {worst:e}");
        }
    }

    #[test]
    fn huge_tiny_and_unreal_numbers_are_multiplied_sensibly() {
        let tiles = Tiles::of(Instructions::Amx, Precision::F32).unwrap();
        let of = |x: f32, w: f32| {
            let x = Tensor::new(&[[1f32, x, 0.0]], &candle_core::Device::Cpu).unwrap();
            let weight = Tensor::new(&[[0.5f32, w, 0.25]], &candle_core::Device::Cpu).unwrap();
            product(Some(tiles), &x, &weight, Epilogue::default())[0]
        };
        let near = |y: f32, expected: f32| (y - expected).abs() <= 1e-5 * expected.abs();
        for (x, w) in [
            (f32::MAX, 0.1),
            (-3.4e38, 0.75),
            (3e38, -1.0),
            (1e-30, 1e30),
        ] {
            assert!(near(of(x, w), 0.5 + x * w), "{x:e} {w:e}: {:e}", of(x, w));
        }
        // weights too
        assert!(near(of(0.1, f32::MAX), 0.1 * f32::MAX));
        assert_eq!(of(1e-40, 1.0), 0.5);
        assert_eq!(of(f32::INFINITY, 2.0), f32::INFINITY);
        assert_eq!(of(f32::INFINITY, -2.0), f32::NEG_INFINITY);
        assert!(of(f32::NAN, 2.0).is_nan() && of(2.0, f32::NAN).is_nan());
        assert!(of(f32::from_bits(0xffff_ffff), 0.0).is_nan());
        assert!(!of(3e38, 3e38).is_finite());
    }

    #[test]
    fn products_on_tiles_give_the_same_bits_on_any_number_of_threads() {
        let [x, weight] = [(900, 100), (360, 100)].map(|shape| normal(0f32, 1.0, shape));
        for tiles in every_unit() {
            let on = |threads| {
                rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .unwrap()
                    .install(|| product(Some(tiles), &x, &weight, Epilogue::default()))
            };
            let alone = product(
                Some(tiles),
                &x.narrow(0, 500, 70).unwrap(),
                &weight,
                Epilogue::default(),
            );
            let all = on(1);
            assert!(all == on(2) && all == on(5) && alone == all[500 * 360..][..70 * 360]);
        }
    }
}
