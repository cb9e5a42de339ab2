//! Scalar functions that the compiler can vectorise, and loops compiled once for each instruction set.

/// e^x with a relative error below 2e-7, exact 1 at 0, without a branch (Cephes' `expf`). Below -87.3 it stays at 1e-38,
/// above 88.3 at 2e38; NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // adding and subtracting 1.5 * 2^23 rounds to a whole number, which then stands in the low bits
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.3, 88.3);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let p = 1.987_569_1e-4 * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_5e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let power_of_two = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    (p * r * r + r + 1.0) * power_of_two
}

/// The error function with an absolute error below 7e-7 (Abramowitz & Stegun 1964, 7.1.26), without a branch.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.327_591_1 * x.abs());
    let p = 1.061_405_4 * t - 1.453_152_1;
    let p = p * t + 1.421_413_7;
    let p = p * t - 0.284_496_72;
    let p = (p * t + 0.254_829_6) * t;
    (1.0 - p * exp(-x * x)).copysign(x)
}

/// Lanes of a running sum or maximum: fixed, so that results are the same on every instruction set.
const LANES: usize = 16;

/// Compiles a loop for AVX-512, AVX2 and the baseline, and picks at run time.
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
                if is_x86_feature_detected!("avx512f") {
                    // SAFETY: the processor has this instruction set, as just detected
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: as above
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}

vectorised! {
    /// Softmax of one row in place.
    pub fn softmax(row: &mut [f32]) {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let chunks = row.chunks_exact(LANES);
        let tail = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for chunk in chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane = if *x > *lane { *x } else { *lane };
            }
        }
        let max = lanes.iter().copied().fold(tail, f32::max);
        let mut sums = [0f32; LANES];
        let mut chunks = row.chunks_exact_mut(LANES);
        for chunk in &mut chunks {
            for (sum, x) in sums.iter_mut().zip(chunk) {
                *x = exp(*x - max);
                *sum += *x;
            }
        }
        let mut total = 0.0;
        for x in chunks.into_remainder() {
            *x = exp(*x - max);
            total += *x;
        }
        let scale = 1.0 / (total + sums.iter().sum::<f32>());
        for x in row {
            *x *= scale;
        }
    }
}

vectorised! {
    /// y = x * scale + shift, then SiLU if asked for; all of one length.
    pub fn affine_silu(y: &mut [f32], x: &[f32], scale: &[f32], shift: &[f32], silu: bool) {
        for ((y, x), (scale, shift)) in y.iter_mut().zip(x).zip(scale.iter().zip(shift)) {
            *y = x * scale + shift;
        }
        if silu {
            for y in y {
                *y /= 1.0 + exp(-*y);
            }
        }
    }
}

vectorised! {
    /// y = x * gelu(gate), by the error function; all of one length.
    pub fn gated_gelu(y: &mut [f32], x: &[f32], gate: &[f32]) {
        for ((y, x), gate) in y.iter_mut().zip(x).zip(gate) {
            *y = x * gate * 0.5 * (1.0 + erf(gate * std::f32::consts::FRAC_1_SQRT_2));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_2e7_of_the_real_one() {
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0 + 1e-4;
            let real = f64::from(x).exp();
            let off = (f64::from(exp(x)) - real).abs() / real;
            assert!(off < 2e-7, "exp({x}) is off by {off:e}");
        }
        assert!(exp(0.0) == 1.0 && exp(f32::NEG_INFINITY) < 2e-38 && exp(1000.0) > 1e38 && exp(f32::NAN).is_nan());
    }

    #[test]
    fn erf_is_within_7e7_of_the_real_one() {
        for i in -60_000..60_000 {
            let x = i as f32 / 10_000.0;
            let off = (f64::from(erf(x)) - candle_core::cpu::erf::erf_f64(f64::from(x))).abs();
            assert!(off < 7e-7, "erf({x}) is off by {off:e}");
        }
        assert!(erf(f32::INFINITY) == 1.0 && erf(f32::NAN).is_nan());
    }

    #[test]
    fn softmax_of_any_length_sums_to_one() {
        for n in [1, 2, 15, 16, 17, 77, 4096] {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin() * 20.0).collect();
            let total: f64 = x.iter().map(|x| f64::from(*x).exp()).sum();
            let mut y = x.clone();
            softmax(&mut y);
            for (x, y) in x.iter().zip(&y) {
                assert!((f64::from(*x).exp() / total - f64::from(*y)).abs() < 1e-6);
            }
        }
    }
}
