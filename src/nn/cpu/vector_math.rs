//! Simple loops, which the compiler can vectorise, compiled once for each instruction set.

#[cfg(target_arch = "x86_64")]
use super::instructions::{Vectors, vectors};
use super::vector::LANES;

/// Compiles a loop for AVX-512, AVX2 and the baseline, and picks at run time what was
/// chosen.
macro_rules! vectorised {
    ($(#[$doc:meta])* pub fn $name:ident($($arg:ident: $type:ty),*) $body:block) => {
        $(#[$doc])*
        pub fn $name($($arg: $type),*) {
            #[inline(always)]
            fn body($($arg: $type),*) $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f")]
                fn avx512($($arg: $type),*) { body($($arg),*) }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $type),*) { body($($arg),*) }
                match vectors() {
                    // SAFETY: only instructions that the processor has are chosen
                    Vectors::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above
                    Vectors::Avx2 => return unsafe { avx2($($arg),*) },
                    Vectors::Portable => {}
                }
            }
            body($($arg),*)
        }
    };
}

vectorised! {
    /// Adds each channel's sum and sum of squares of x [pixels, channels], in f64: there the square of
    /// an f32 is exact, and the variance is right however far the mean is from 0.
    pub fn moments(x: &[f32], sums: &mut [f64], squares: &mut [f64]) {
        let channels = sums.len();
        let mut fours = x.chunks_exact(4 * channels);
        for four in &mut fours {
            let (a, b) = four.split_at(2 * channels);
            let ((a, b), (c, d)) = (a.split_at(channels), b.split_at(channels));
            for (((sum, square), (a, b)), (c, d)) in sums.iter_mut().zip(&mut *squares).zip(a.iter().zip(b)).zip(c.iter().zip(d)) {
                let [a, b, c, d] = [*a, *b, *c, *d].map(f64::from);
                *sum += (a + b) + (c + d);
                *square += (a * a + b * b) + (c * c + d * d);
            }
        }
        for pixel in fours.remainder().chunks_exact(channels) {
            for ((sum, square), x) in sums.iter_mut().zip(&mut *squares).zip(pixel) {
                let x = f64::from(*x);
                *sum += x;
                *square += x * x;
            }
        }
    }
}

vectorised! {
    /// y = (x - mean) / sqrt(variance + eps) * weight + bias of one row; all of one length.
    pub fn layer_norm(y: &mut [f32], x: &[f32], weight: &[f32], bias: &[f32], eps: f32) {
        let mean = mean_of(x, |x| x);
        let variance = mean_of(x, |x| (x - mean) * (x - mean));
        let scale = 1.0 / (variance + eps).sqrt();
        for ((y, x), (weight, bias)) in y.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
            *y = (x - mean) * scale * weight + bias;
        }
    }
}

/// The mean of a function of a row's numbers, by partial sums that are then added in pairs.
#[inline(always)]
fn mean_of(x: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    // as many chains of additions as hide an addition's latency
    const SUMS: usize = 4 * LANES;
    let mut sums = [0f32; SUMS];
    let chunks = x.chunks_exact(SUMS);
    for (sum, x) in sums.iter_mut().zip(chunks.remainder()) {
        *sum = term(*x);
    }
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += term(*x);
        }
    }
    let mut half = SUMS;
    while half > 1 {
        half /= 2;
        for i in 0..half {
            sums[i] += sums[i + half];
        }
    }
    sums[0] / x.len() as f32
}
