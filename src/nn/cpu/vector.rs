//! Sixteen f32 side by side, and kernels over them compiled once for each instruction set. For kernels that keep many
//! sums in registers, which the compiler does not find by itself; simple loops are in [`super::math`].

/// Numbers in a vector.
pub const LANES: usize = 16;

/// A vector's place in memory, where no load or store crosses a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Lanes(pub [f32; LANES]);

/// A vector in registers.
pub trait Vector: Copy {
    /// Whether 32 registers hold whole vectors, not 8 or fewer.
    const WIDE: bool;
    fn splat(x: f32) -> Self;
    fn load(from: &[f32; LANES]) -> Self;
    fn store(self, to: &mut [f32; LANES]);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    /// self + a * b, rounded once where the processor can
    fn plus(self, a: Self, b: Self) -> Self;

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

/// Work over vectors of any kind. `run` must be `#[inline(always)]`, and all that it calls with vectors.
pub trait Kernel {
    fn run<V: Vector>(self);
}

/// Runs a kernel with the best instructions that this processor has.
pub fn dispatch(kernel: impl Kernel) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        fn avx512(kernel: impl Kernel) {
            kernel.run::<x86::Avx512>();
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2(kernel: impl Kernel) {
            kernel.run::<x86::Avx2>();
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has this instruction set, as just detected
            return unsafe { avx512(kernel) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: as above
            return unsafe { avx2(kernel) };
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
    fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }

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
    fn plus(mut self, a: Self, b: Self) -> Self {
        for ((x, a), b) in self.0.iter_mut().zip(&a.0).zip(&b.0) {
            // a fused one is a slow call where the processor has none
            *x = if cfg!(target_arch = "aarch64") { a.mul_add(*b, *x) } else { *a * *b + *x };
        }
        self
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, Vector};
    use std::arch::x86_64::*;

    /// Instructions that the processor is known to have.
    macro_rules! detected {
        ($($body:tt)*) => {
            // SAFETY: only `dispatch` names these types, after it has found their instructions; arrays hold what is read
            // and written
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
        fn store(self, to: &mut [f32; LANES]) {
            detected! { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
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
        fn plus(self, a: Self, b: Self) -> Self {
            detected! { Self(_mm512_fmadd_ps(a.0, b.0, self.0)) }
        }
    }

    #[derive(Clone, Copy)]
    pub struct Avx2(__m256, __m256);

    impl Vector for Avx2 {
        const WIDE: bool = false;

        #[inline(always)]
        fn splat(x: f32) -> Self {
            detected! { Self(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        }

        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            detected! { Self(_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))) }
        }

        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            detected! {
                _mm256_storeu_ps(to.as_mut_ptr(), self.0);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), self.1);
            }
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
        fn plus(self, a: Self, b: Self) -> Self {
            detected! { Self(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1)) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Probe<'a> {
        x: &'a [f32],
        y: &'a mut [f32],
    }

    impl Kernel for Probe<'_> {
        #[inline(always)]
        fn run<V: Vector>(self) {
            let x = V::load_some(self.x);
            x.add(V::splat(3.0)).sub(V::splat(1.0)).plus(x, V::splat(-0.5)).store_some(self.y);
        }
    }

    #[test]
    fn vectors_of_every_kind_count_alike_and_stay_inside_of_slices() {
        for len in [1, 7, 15, 16, 40] {
            let x: Vec<f32> = (0..len).map(|i| i as f32).collect();
            let check = |run: &dyn Fn(Probe)| {
                let mut y = vec![9.0; len];
                run(Probe { x: &x, y: &mut y });
                let expected = |i: usize| if i < LANES { i as f32 * 0.5 + 2.0 } else { 9.0 };
                assert!(y.iter().enumerate().all(|(i, y)| *y == expected(i)), "{y:?}");
            };
            check(&|probe| dispatch(probe));
            check(&|probe| probe.run::<Portable>());
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                check(&|probe| probe.run::<x86::Avx2>());
            }
        }
    }
}
