//! Sixteen f32 side by side, and kernels over them compiled once for each instruction set. For
//! kernels that keep many sums in registers, which the compiler does not find by itself; simple
//! loops are in [`super::vector_math`].

#[cfg(target_arch = "x86_64")]
use super::instructions::{Vectors, vectors};
use half::{bf16, f16};

/// The elements of a vector.
pub const LANES: usize = 16;

/// Of an f32: its upper half, half a unit of that, and what makes a NaN one that stays NaN in it.
const UPPER: u32 = 0xffff_0000;
const HALF: u32 = 0x8000;
const QUIET: u32 = 0x0040_0000;

/// A vector in memory, aligned so that no load or store crosses a cache line.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
pub struct Lanes(pub [f32; LANES]);

/// Views vectors as their elements.
pub fn floats(lanes: &mut [Lanes]) -> &mut [f32] {
    // SAFETY: a `Lanes` is LANES numbers and nothing else, and any bits are a number
    unsafe { std::slice::from_raw_parts_mut(lanes.as_mut_ptr().cast(), lanes.len() * LANES) }
}

/// Views vectors as their elements.
pub fn numbers(lanes: &[Lanes]) -> &[f32] {
    // SAFETY: as above
    unsafe { std::slice::from_raw_parts(lanes.as_ptr().cast(), lanes.len() * LANES) }
}

/// A vector in registers.
pub trait Vector: Copy {
    /// Whether 32 registers hold whole vectors, not 8 or fewer.
    const WIDE: bool;
    fn splat(x: f32) -> Self;
    fn load(from: &[f32; LANES]) -> Self;
    /// Panics if there are fewer than sixteen.
    fn load_f16(from: &[f16]) -> Self;
    /// Panics if there are fewer than sixteen.
    fn load_bf16(from: &[bf16]) -> Self;
    fn store(self, to: &mut [f32; LANES]);
    /// Prefetches what will be loaded soon.
    fn prefetch(from: &Lanes);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// The smaller; `other` where either is not a number.
    fn min(self, other: Self) -> Self;
    /// The larger; `other` where either is not a number.
    fn max(self, other: Self) -> Self;
    /// self * 2^n, where n + 1.5 * 2^23 is given and the result is neither 0, subnormal nor
    /// infinite.
    fn times_power_of_two(self, shifted: Self) -> Self;
    /// self + a * b, rounded once where the processor can
    fn plus(self, a: Self, b: Self) -> Self;
    /// Numbers whose upper halves are the nearest bf16, ties away from 0. NaN stays NaN.
    fn rounded(self) -> Self;
    /// Numbers whose upper halves are the nearest bf16, ties to even. NaN stays NaN, there too.
    fn rounded_even(self) -> Self;
    /// Numbers whose lower halves are 0.
    fn upper(self) -> Self;
    /// The upper halves side by side, those of `self` in the lower half of each element.
    fn pairs(self, other: Self) -> Self;

    /// 2^x with a relative error below 3e-7, exact 1 at 0, for x up to 126. Below -100 it stays at
    /// 8e-31: small, but products with it are still normal numbers. NaN stays NaN.
    #[inline(always)]
    fn exp2(self) -> Self {
        // adding and subtracting 1.5 * 2^23 rounds to a whole number, which then stands in the low
        // bits
        let round = Self::splat(12_582_912.0);
        let x = Self::splat(-100.0).max(self);
        let shifted = x.add(round);
        let r = x.sub(shifted.sub(round));
        // minimax for the relative error over -0.5..=0.5 (Remez), highest power first
        let p = Self::splat(1.327_647_2e-3);
        let p = Self::splat(9.675_541e-3).plus(p, r);
        let p = Self::splat(5.550_713e-2).plus(p, r);
        let p = Self::splat(2.402_212e-1).plus(p, r);
        let p = Self::splat(6.931_469_4e-1).plus(p, r);
        let p = Self::splat(1.0).plus(p, r);
        p.times_power_of_two(shifted)
    }

    /// x / (1 + e^-x) (SiLU).
    #[inline(always)]
    fn silu(self) -> Self {
        let one = Self::splat(1.0);
        // beyond, the result is less than 1e-34, and exp2 would overflow
        let power = Self::splat(126.0).min(self.mul(Self::splat(-std::f32::consts::LOG2_E)));
        self.div(one.add(power.exp2()))
    }

    /// The error function with an absolute error below 7e-7, a quotient of polynomials
    /// (coefficients of the Eigen library).
    #[inline(always)]
    fn erf(self) -> Self {
        // +-1 to f32's last bit from here on; NaN stays NaN
        let x = Self::splat(-4.0).max(Self::splat(4.0).min(self));
        let square = x.mul(x);
        let p = Self::splat(-2.726_142_3e-10);
        let p = Self::splat(2.770_681_4e-8).plus(p, square);
        let p = Self::splat(-2.101_024_1e-6).plus(p, square);
        let p = Self::splat(-5.692_506_4e-5).plus(p, square);
        let p = Self::splat(-7.349_906_3e-4).plus(p, square);
        let p = Self::splat(-2.954_6e-3).plus(p, square);
        let p = Self::splat(-1.609_603_3e-2).plus(p, square);
        let q = Self::splat(-1.456_607_2e-5);
        let q = Self::splat(-2.133_740_6e-4).plus(q, square);
        let q = Self::splat(-1.682_827e-3).plus(q, square);
        let q = Self::splat(-7.373_329_3e-3).plus(q, square);
        let q = Self::splat(-1.426_473_9e-2).plus(q, square);
        x.mul(p).div(q)
    }

    /// x times the probability that a normal number is below x (GELU, exact to the error of
    /// [`Self::erf`]).
    #[inline(always)]
    fn gelu(self) -> Self {
        let half = self.mul(Self::splat(0.5));
        half.plus(
            half,
            self.mul(Self::splat(std::f32::consts::FRAC_1_SQRT_2)).erf(),
        )
    }

    /// x / (1 + e^-2u), where u = sqrt(2 / pi) (x + 0.044715 x^3): GELU by the tangent's formula.
    #[inline(always)]
    fn gelu_tanh(self) -> Self {
        const LINEAR: f32 = -2.302_208_2; // -2 sqrt(2 / pi) / ln 2
        let (one, square) = (Self::splat(1.0), self.mul(self));
        let power = self.mul(Self::splat(LINEAR).plus(Self::splat(0.044_715 * LINEAR), square));
        // as with SiLU
        self.div(one.add(Self::splat(126.0).min(power).exp2()))
    }

    /// Leaky ReLU or PReLU: negative values times a slope.
    #[inline(always)]
    fn leaky(self, slope: Self) -> Self {
        let zero = Self::splat(0.0);
        zero.max(self).plus(zero.min(self), slope)
    }

    /// Columns of sixteen rows.
    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        let mut columns = [[0.0; LANES]; LANES];
        for (i, row) in rows.iter().enumerate() {
            let mut numbers = [0.0; LANES];
            row.store(&mut numbers);
            for (column, number) in columns.iter_mut().zip(&numbers) {
                column[i] = *number;
            }
        }
        let mut loaded = rows;
        for (to, column) in loaded.iter_mut().zip(&columns) {
            *to = Self::load(column);
        }
        loaded
    }

    /// The first numbers of a slice, zeros after its end.
    #[inline(always)]
    fn load_some(from: &[f32]) -> Self {
        match from.first_chunk() {
            Some(from) => Self::load(from),
            None => {
                let mut all = [0.0; LANES];
                all[..from.len()].copy_from_slice(from);
                Self::load(&all)
            }
        }
    }

    /// As many as the slice holds.
    #[inline(always)]
    fn store_some(self, to: &mut [f32]) {
        match to.first_chunk_mut() {
            Some(to) => self.store(to),
            None => {
                let mut all = [0.0; LANES];
                self.store(&mut all);
                to.copy_from_slice(&all[..to.len()]);
            }
        }
    }
}

/// Work over vectors of any kind. `run` must be `#[inline(always)]`, and all that it calls with
/// vectors. No closure may touch a vector: where the compiler does not inline one, it is compiled
/// without the instructions, each of which becomes a call; nor `map_or` and the like
/// (`tests/it/instructions.rs`).
pub trait Kernel {
    fn run<V: Vector>(self);
}

/// Runs a kernel with the instructions that were chosen, see [`super::instructions`].
pub fn dispatch(kernel: impl Kernel) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        fn avx512(kernel: impl Kernel) {
            kernel.run::<x86::Avx512>();
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2(kernel: impl Kernel) {
            kernel.run::<x86::Avx2>();
        }
        match vectors() {
            // SAFETY: only instructions that the processor has are chosen
            Vectors::Avx512 => return unsafe { avx512(kernel) },
            // SAFETY: as above
            Vectors::Avx2 => return unsafe { avx2(kernel) },
            Vectors::Portable => {}
        }
    }
    kernel.run::<Portable>();
}

/// For every other processor.
#[derive(Clone, Copy)]
struct Portable([f32; LANES]);

impl Vector for Portable {
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Self(*from)
    }

    #[inline(always)]
    fn load_f16(from: &[f16]) -> Self {
        Self(std::array::from_fn(|i| from[i].to_f32()))
    }

    #[inline(always)]
    fn load_bf16(from: &[bf16]) -> Self {
        Self(std::array::from_fn(|i| from[i].to_f32()))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }

    #[inline(always)]
    fn prefetch(_: &Lanes) {}

    #[inline(always)]
    fn add(mut self, other: Self) -> Self {
        for (x, other) in self.0.iter_mut().zip(&other.0) {
            *x += other;
        }
        self
    }

    #[inline(always)]
    fn sub(mut self, other: Self) -> Self {
        for (x, other) in self.0.iter_mut().zip(&other.0) {
            *x -= other;
        }
        self
    }

    #[inline(always)]
    fn mul(mut self, other: Self) -> Self {
        for (x, other) in self.0.iter_mut().zip(&other.0) {
            *x *= other;
        }
        self
    }

    #[inline(always)]
    fn div(mut self, other: Self) -> Self {
        for (x, other) in self.0.iter_mut().zip(&other.0) {
            *x /= other;
        }
        self
    }

    #[inline(always)]
    fn min(mut self, other: Self) -> Self {
        for (x, other) in self.0.iter_mut().zip(&other.0) {
            *x = if *x < *other { *x } else { *other };
        }
        self
    }

    #[inline(always)]
    fn max(mut self, other: Self) -> Self {
        for (x, other) in self.0.iter_mut().zip(&other.0) {
            // as x86 has it, which `f32::max` has not
            *x = if *x > *other { *x } else { *other };
        }
        self
    }

    #[inline(always)]
    fn times_power_of_two(mut self, shifted: Self) -> Self {
        for (x, shifted) in self.0.iter_mut().zip(&shifted.0) {
            *x = f32::from_bits(x.to_bits().wrapping_add(shifted.to_bits() << 23));
        }
        self
    }

    #[inline(always)]
    fn plus(mut self, a: Self, b: Self) -> Self {
        for ((x, a), b) in self.0.iter_mut().zip(&a.0).zip(&b.0) {
            // a fused one is a slow call where the processor has none
            *x = if cfg!(target_arch = "aarch64") {
                a.mul_add(*b, *x)
            } else {
                *a * *b + *x
            };
        }
        self
    }

    #[inline(always)]
    fn rounded(mut self) -> Self {
        for x in &mut self.0 {
            let carry = if x.is_nan() { 0 } else { HALF };
            *x = f32::from_bits(x.to_bits().wrapping_add(carry));
        }
        self
    }

    #[inline(always)]
    fn rounded_even(mut self) -> Self {
        for x in &mut self.0 {
            let bits = x.to_bits();
            *x = f32::from_bits(if x.is_nan() {
                bits | QUIET
            } else {
                bits + (HALF - 1) + (bits >> 16 & 1)
            });
        }
        self
    }

    #[inline(always)]
    fn upper(mut self) -> Self {
        for x in &mut self.0 {
            *x = f32::from_bits(x.to_bits() & UPPER);
        }
        self
    }

    #[inline(always)]
    fn pairs(mut self, other: Self) -> Self {
        for (x, other) in self.0.iter_mut().zip(&other.0) {
            *x = f32::from_bits(x.to_bits() >> 16 | other.to_bits() & UPPER);
        }
        self
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{HALF, LANES, Lanes, QUIET, UPPER, Vector};
    use half::{bf16, f16};
    use std::arch::x86_64::*;

    /// Instructions that the processor is known to have.
    macro_rules! detected {
        ($($body:tt)*) => {
            // SAFETY: only `dispatch` names these types, after it has found their instructions;
            // arrays hold what is read, and there is room for what is written
            unsafe { $($body)* }
        };
    }

    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    impl Vector for Avx512 {
        const WIDE: bool = true;

        #[inline(always)]
        fn splat(x: f32) -> Self {
            detected! { Self(_mm512_set1_ps(x)) }
        }

        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            detected! { Self(_mm512_loadu_ps(from.as_ptr())) }
        }

        #[inline(always)]
        fn load_f16(from: &[f16]) -> Self {
            let from = &from[..LANES];
            detected! { Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast()))) }
        }

        #[inline(always)]
        fn load_bf16(from: &[bf16]) -> Self {
            let from = &from[..LANES];
            detected! {
                let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(high)))
            }
        }

        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            detected! { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
        }

        #[inline(always)]
        fn prefetch(from: &Lanes) {
            detected! { _mm_prefetch::<_MM_HINT_T0>(from.0.as_ptr().cast()) }
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            detected! { Self(_mm512_add_ps(self.0, other.0)) }
        }

        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            detected! { Self(_mm512_sub_ps(self.0, other.0)) }
        }

        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            detected! { Self(_mm512_mul_ps(self.0, other.0)) }
        }

        #[inline(always)]
        fn div(self, other: Self) -> Self {
            detected! { Self(_mm512_div_ps(self.0, other.0)) }
        }

        #[inline(always)]
        fn min(self, other: Self) -> Self {
            detected! { Self(_mm512_min_ps(self.0, other.0)) }
        }

        #[inline(always)]
        fn max(self, other: Self) -> Self {
            detected! { Self(_mm512_max_ps(self.0, other.0)) }
        }

        #[inline(always)]
        fn times_power_of_two(self, shifted: Self) -> Self {
            detected! {
                let power = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted.0));
                Self(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(self.0), power)))
            }
        }

        #[inline(always)]
        fn transpose(mut rows: [Self; LANES]) -> [Self; LANES] {
            detected! {
                // squares of 4x4, in the four quarters of the registers
                for rows in rows.as_chunks_mut::<4>().0 {
                    let [Self(a), Self(b), Self(c), Self(d)] = *rows;
                    let (ab, cd) = (_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d));
                    let (ab_high, cd_high) = (_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d));
                    *rows = [
                        Self(_mm512_shuffle_ps::<0x44>(ab, cd)),
                        Self(_mm512_shuffle_ps::<0xee>(ab, cd)),
                        Self(_mm512_shuffle_ps::<0x44>(ab_high, cd_high)),
                        Self(_mm512_shuffle_ps::<0xee>(ab_high, cd_high)),
                    ];
                }
                // then quarters change places
                let mut columns = rows;
                for i in 0..4 {
                    let [a, b, c, d] = [rows[i].0, rows[i + 4].0, rows[i + 8].0, rows[i + 12].0];
                    let (ab_even, cd_even) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d));
                    let (ab_odd, cd_odd) = (_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d));
                    columns[i] = Self(_mm512_shuffle_f32x4::<0x88>(ab_even, cd_even));
                    columns[i + 4] = Self(_mm512_shuffle_f32x4::<0x88>(ab_odd, cd_odd));
                    columns[i + 8] = Self(_mm512_shuffle_f32x4::<0xdd>(ab_even, cd_even));
                    columns[i + 12] = Self(_mm512_shuffle_f32x4::<0xdd>(ab_odd, cd_odd));
                }
                columns
            }
        }

        #[inline(always)]
        fn plus(self, a: Self, b: Self) -> Self {
            detected! { Self(_mm512_fmadd_ps(a.0, b.0, self.0)) }
        }

        #[inline(always)]
        fn rounded(self) -> Self {
            detected! {
                let (bits, half) = (_mm512_castps_si512(self.0), _mm512_set1_epi32(HALF as i32));
                let number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(self.0, self.0);
                Self(_mm512_castsi512_ps(_mm512_mask_add_epi32(bits, number, bits, half)))
            }
        }

        #[inline(always)]
        fn rounded_even(self) -> Self {
            detected! {
                let bits = _mm512_castps_si512(self.0);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let carry = _mm512_add_epi32(odd, _mm512_set1_epi32(HALF as i32 - 1));
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
                let sum = _mm512_add_epi32(bits, carry);
                let quiet = _mm512_set1_epi32(QUIET as i32);
                Self(_mm512_castsi512_ps(_mm512_mask_or_epi32(sum, nan, bits, quiet)))
            }
        }

        #[inline(always)]
        fn upper(self) -> Self {
            detected! {
                let upper = _mm512_set1_epi32(UPPER as i32);
                Self(_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(self.0), upper)))
            }
        }

        #[inline(always)]
        fn pairs(self, other: Self) -> Self {
            detected! {
                let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(self.0));
                let high = _mm512_castps_si512(other.0);
                let upper = _mm512_set1_epi32(UPPER as i32);
                // low | high & upper
                Self(_mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xf8>(low, high, upper)))
            }
        }
    }

    #[derive(Clone, Copy)]
    pub struct Avx2(__m256, __m256);

    /// Squares of 4x4, in both halves of four registers, transposed.
    #[inline(always)]
    fn squares([a, b, c, d]: [__m256; 4]) -> [__m256; 4] {
        detected! {
            let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
            let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
            [
                _mm256_shuffle_ps::<0x44>(ab, cd),
                _mm256_shuffle_ps::<0xee>(ab, cd),
                _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
                _mm256_shuffle_ps::<0xee>(ab_high, cd_high),
            ]
        }
    }

    /// Columns of eight rows.
    #[inline(always)]
    fn transpose_8(rows: [__m256; 8]) -> [__m256; 8] {
        detected! {
            let [a, b, c, d, e, f, g, h] = rows;
            let (first, second) = (squares([a, b, c, d]), squares([e, f, g, h]));
            let mut columns = rows;
            for i in 0..4 {
                columns[i] = _mm256_permute2f128_ps::<0x20>(first[i], second[i]);
                columns[i + 4] = _mm256_permute2f128_ps::<0x31>(first[i], second[i]);
            }
            columns
        }
    }

    /// See [`Vector::rounded`].
    #[inline(always)]
    fn rounded(x: __m256) -> __m256 {
        detected! {
            let number = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_ORD_Q>(x, x));
            let half = _mm256_and_si256(number, _mm256_set1_epi32(HALF as i32));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), half))
        }
    }

    /// See [`Vector::rounded_even`].
    #[inline(always)]
    fn rounded_even(x: __m256) -> __m256 {
        detected! {
            let bits = _mm256_castps_si256(x);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let carry = _mm256_add_epi32(odd, _mm256_set1_epi32(HALF as i32 - 1));
            let sum = _mm256_castsi256_ps(_mm256_add_epi32(bits, carry));
            let quiet = _mm256_or_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(QUIET as i32)));
            _mm256_blendv_ps(sum, quiet, _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x))
        }
    }

    /// See [`Vector::pairs`].
    #[inline(always)]
    fn pairs(low: __m256, high: __m256) -> __m256 {
        detected! {
            let low = _mm256_srli_epi32::<16>(_mm256_castps_si256(low));
            let both = _mm256_blend_epi16::<0xaa>(low, _mm256_castps_si256(high));
            _mm256_castsi256_ps(both)
        }
    }

    impl Vector for Avx2 {
        const WIDE: bool = false;

        #[inline(always)]
        fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
            let mut columns = rows;
            for half in 0..2 {
                let mut quarters = [[rows[0].0; 8]; 2];
                for (i, row) in rows[half * 8..][..8].iter().enumerate() {
                    (quarters[0][i], quarters[1][i]) = (row.0, row.1);
                }
                for (i, quarter) in quarters.into_iter().enumerate() {
                    for (column, numbers) in columns[i * 8..].iter_mut().zip(transpose_8(quarter)) {
                        *(if half == 0 {
                            &mut column.0
                        } else {
                            &mut column.1
                        }) = numbers;
                    }
                }
            }
            columns
        }

        #[inline(always)]
        fn splat(x: f32) -> Self {
            detected! { Self(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        }

        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            detected! { Self(_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))) }
        }

        #[inline(always)]
        fn load_f16(from: &[f16]) -> Self {
            let from = &from[..LANES];
            detected! {
                let low = _mm_loadu_si128(from.as_ptr().cast());
                let high = _mm_loadu_si128(from.as_ptr().add(8).cast());
                Self(_mm256_cvtph_ps(low), _mm256_cvtph_ps(high))
            }
        }

        #[inline(always)]
        fn load_bf16(from: &[bf16]) -> Self {
            let from = &from[..LANES];
            detected! {
                let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().cast()));
                let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().add(8).cast()));
                let (low, high) = (_mm256_slli_epi32::<16>(low), _mm256_slli_epi32::<16>(high));
                Self(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
            }
        }

        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            detected! {
                _mm256_storeu_ps(to.as_mut_ptr(), self.0);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), self.1);
            }
        }

        #[inline(always)]
        fn prefetch(from: &Lanes) {
            detected! { _mm_prefetch::<_MM_HINT_T0>(from.0.as_ptr().cast()) }
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            detected! { Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
        }

        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            detected! { Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
        }

        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            detected! { Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
        }

        #[inline(always)]
        fn div(self, other: Self) -> Self {
            detected! { Self(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
        }

        #[inline(always)]
        fn min(self, other: Self) -> Self {
            detected! { Self(_mm256_min_ps(self.0, other.0), _mm256_min_ps(self.1, other.1)) }
        }

        #[inline(always)]
        fn max(self, other: Self) -> Self {
            detected! { Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
        }

        #[inline(always)]
        fn times_power_of_two(self, shifted: Self) -> Self {
            detected! {
                let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted.0));
                let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted.1));
                let low = _mm256_add_epi32(_mm256_castps_si256(self.0), low);
                let high = _mm256_add_epi32(_mm256_castps_si256(self.1), high);
                Self(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
            }
        }

        #[inline(always)]
        fn plus(self, a: Self, b: Self) -> Self {
            detected! { Self(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1)) }
        }

        #[inline(always)]
        fn rounded(self) -> Self {
            Self(rounded(self.0), rounded(self.1))
        }

        #[inline(always)]
        fn rounded_even(self) -> Self {
            Self(rounded_even(self.0), rounded_even(self.1))
        }

        #[inline(always)]
        fn upper(self) -> Self {
            detected! {
                let upper = _mm256_castsi256_ps(_mm256_set1_epi32(UPPER as i32));
                Self(_mm256_and_ps(self.0, upper), _mm256_and_ps(self.1, upper))
            }
        }

        #[inline(always)]
        fn pairs(self, other: Self) -> Self {
            Self(pairs(self.0, other.0), pairs(self.1, other.1))
        }
    }
}

/// Runs a kernel with each kind of vector that this processor has.
#[cfg(test)]
pub fn with_every_kind(kernel: impl Kernel + Clone) {
    use super::instructions::Instructions;
    kernel.clone().run::<Portable>();
    #[cfg(target_arch = "x86_64")]
    {
        if Instructions::Avx2.is_there() {
            kernel.clone().run::<x86::Avx2>();
        }
        if Instructions::Avx512.is_there() {
            kernel.run::<x86::Avx512>();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone)]
    struct Arithmetic;

    impl Kernel for Arithmetic {
        fn run<V: Vector>(self) {
            for len in [1, 7, 15, 16, 40] {
                let x: Vec<f32> = (0..len).map(|i| i as f32).collect();
                let mut y = vec![9.0; len];
                let x = V::load_some(&x);
                let sum = x
                    .add(V::splat(3.0))
                    .sub(V::splat(1.0))
                    .plus(x, V::splat(-0.5));
                sum.mul(V::splat(2.0)).max(V::splat(7.0)).store_some(&mut y);
                let expected = |i: usize| {
                    if i < LANES {
                        (i as f32 + 4.0).max(7.0)
                    } else {
                        9.0
                    }
                };
                assert!(
                    y.iter().enumerate().all(|(i, y)| *y == expected(i)),
                    "{y:?}"
                );
            }
        }
    }

    #[test]
    fn vectors_of_every_kind_count_alike_and_stay_inside_of_slices() {
        with_every_kind(Arithmetic);
        dispatch(Arithmetic);
    }

    #[derive(Clone)]
    struct Exp2;

    impl Kernel for Exp2 {
        fn run<V: Vector>(self) {
            let of = |x: f32| {
                let mut y = [0.0; LANES];
                V::splat(x).exp2().store(&mut y);
                y[LANES - 1]
            };
            for i in -99_990..126_000 {
                let x = i as f32 / 1000.0 + 1e-4;
                let real = f64::from(x).exp2();
                let off = (f64::from(of(x)) - real).abs() / real;
                assert!(off < 3e-7, "2^{x} is off by {off:e}");
            }
            assert!(
                of(0.0) == 1.0
                    && of(f32::NEG_INFINITY) < 1e-30
                    && of(-1e9) > 0.0
                    && of(f32::NAN).is_nan()
            );
        }
    }

    #[test]
    fn exp2_is_within_3e7_of_the_real_one() {
        with_every_kind(Exp2);
    }

    #[derive(Clone)]
    struct Activations;

    impl Kernel for Activations {
        fn run<V: Vector>(self) {
            let of = |x: f32, f: fn(V) -> V| {
                let mut y = [0.0; LANES];
                f(V::splat(x)).store(&mut y);
                f64::from(y[LANES - 1])
            };
            for i in -60_000..60_000 {
                let x = i as f32 / 10_000.0;
                let real = candle_core::cpu::erf::erf_f64(f64::from(x));
                assert!(
                    (of(x, V::erf) - real).abs() < 7e-7,
                    "erf({x}) is {}",
                    of(x, V::erf)
                );
                let normal = 0.5
                    + 0.5
                        * candle_core::cpu::erf::erf_f64(
                            f64::from(x) * std::f64::consts::FRAC_1_SQRT_2,
                        );
                assert!(
                    (of(x, V::gelu) - f64::from(x) * normal).abs() < 2e-6,
                    "gelu({x}) is {}",
                    of(x, V::gelu)
                );
            }
            for i in -100_000..100_000 {
                let x = i as f32 / 1_000.0;
                let real = f64::from(x) / (1.0 + f64::from(-x).exp());
                assert!(
                    (of(x, V::silu) - real).abs() < 5e-7 * f64::from(x.abs()).max(1.0),
                    "silu({x}) is {}",
                    of(x, V::silu)
                );
                let x = f64::from(x);
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                let real = 0.5 * x * (1.0 + inner.tanh());
                let own = of(x as f32, V::gelu_tanh);
                assert!(
                    (own - real).abs() < 1e-6 * x.abs().max(1.0),
                    "gelu({x}) is {own} by the tangent"
                );
            }
            assert!(of(f32::NAN, V::gelu_tanh).is_nan() && of(-1e20, V::gelu_tanh).abs() < 1e-6);
            assert!(
                (of(f32::INFINITY, V::erf) - 1.0).abs() < 7e-7
                    && of(f32::NAN, V::erf).is_nan()
                    && of(f32::NAN, V::gelu).is_nan()
            );
            let leaky = |x: V| x.leaky(V::splat(0.25));
            assert!(
                of(-3.0, leaky) == -0.75 && of(3.0, leaky) == 3.0 && of(f32::NAN, leaky).is_nan()
            );
            assert!(
                of(-1e30, V::silu).abs() < 1e-6
                    && of(1e30, V::silu) > 9e29
                    && of(f32::NAN, V::silu).is_nan()
            );
        }
    }

    #[test]
    fn activations_are_those_of_the_real_numbers() {
        with_every_kind(Activations);
    }

    #[derive(Clone)]
    struct Transpose;

    impl Kernel for Transpose {
        fn run<V: Vector>(self) {
            let mut rows = [V::splat(0.0); LANES];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = V::load(&std::array::from_fn(|j| (i * LANES + j) as f32));
            }
            for (j, column) in V::transpose(rows).into_iter().enumerate() {
                let mut numbers = [0.0; LANES];
                column.store(&mut numbers);
                assert!(numbers == std::array::from_fn(|i| (i * LANES + j) as f32));
            }
        }
    }

    #[test]
    fn columns_of_columns_are_rows() {
        with_every_kind(Transpose);
    }

    #[derive(Clone)]
    struct Rounding;

    impl Kernel for Rounding {
        fn run<V: Vector>(self) {
            let all = |f: &dyn Fn(V) -> V, x: f32| {
                let mut y = [0.0; LANES];
                f(V::splat(x)).store(&mut y);
                y[LANES - 1]
            };
            let numbers = (0..1 << 16).flat_map(|top: u32| {
                [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(top << 16 | low))
            });
            for x in numbers {
                let [away, even] = [all(&V::rounded, x), all(&V::rounded_even, x)];
                let even_half = (even.to_bits() >> 16) as u16;
                if x.is_nan() {
                    assert!(away.is_nan() && bf16::from_bits(even_half).is_nan());
                    continue;
                }
                assert_eq!(even_half, bf16::from_f32(x).to_bits(), "{x:e}");
                let up = x.to_bits() & HALF != 0;
                let expected = (x.to_bits() >> 16) + u32::from(up);
                assert_eq!(away.to_bits() >> 16, expected, "{x:e}");
                assert_eq!(all(&V::upper, x).to_bits(), x.to_bits() & UPPER);
                let pair = all(&|x| V::splat(-2.5).pairs(x), x);
                assert_eq!(pair.to_bits(), x.to_bits() & UPPER | 0xc020);
            }
        }
    }

    #[test]
    fn halves_are_the_nearest_bf16_and_nan_stays_nan() {
        with_every_kind(Rounding);
    }
}
