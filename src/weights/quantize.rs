//! Numbers become the blocks of GGUF files: the inverse of what [`BlockType`] widens.
//!
//! The types of 32 numbers come out as the `gguf` Python package writes them, byte by byte. Of those of
//! 256 the format alone is given; scales are searched for as in llama.cpp, so that the weighted squares
//! of what is lost are small.

use crate::nn::blocks::BlockType;
use anyhow::{Result, bail};
use half::f16;
use rayon::prelude::*;

/// Numbers of a block of the types that end in K.
const K: usize = 256;

/// The types that are written.
pub(super) const WRITTEN: [BlockType; 10] = [
    BlockType::Q8_0,
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::Q5_0,
    BlockType::Q5_1,
    BlockType::Q2K,
    BlockType::Q3K,
    BlockType::Q4K,
    BlockType::Q5K,
    BlockType::Q6K,
];

/// The bytes of numbers that make whole blocks. Errors if the type is not written.
pub(super) fn quantize(kind: BlockType, values: &[f32]) -> Result<Vec<u8>> {
    Ok(match kind {
        BlockType::Q8_0 => each(values, |x: &[f32; 32], out: &mut [u8; 34]| {
            let d = x.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0;
            put_half(out, 0, d);
            for (out, x) in out[2..].iter_mut().zip(x) {
                *out = (x * inverse(d)).round() as i8 as u8;
            }
        }),
        BlockType::Q4_0 => each(values, |x: &[f32; 32], out: &mut [u8; 18]| {
            let d = put_signed(x, 8.0, out);
            put_nibbles(&mut out[2..], |i| code(x[i] * inverse(d) + 8.5, 15));
        }),
        BlockType::Q4_1 => each(values, |x: &[f32; 32], out: &mut [u8; 20]| {
            let (d, min) = put_range(x, 15.0, out);
            put_nibbles(&mut out[4..], |i| code((x[i] - min) * inverse(d) + 0.5, 15));
        }),
        BlockType::Q5_0 => each(values, |x: &[f32; 32], out: &mut [u8; 22]| {
            let d = put_signed(x, 16.0, out);
            put_fives(&mut out[2..], |i| code(x[i] * inverse(d) + 16.5, 31));
        }),
        BlockType::Q5_1 => each(values, |x: &[f32; 32], out: &mut [u8; 24]| {
            let (d, min) = put_range(x, 31.0, out);
            put_fives(&mut out[4..], |i| code((x[i] - min) * inverse(d) + 0.5, 31));
        }),
        BlockType::Q2K => each(values, |x: &[f32; K], out: &mut [u8; 84]| {
            let search = Search {
                codes: 3,
                first: -0.5,
                steps: 15,
                weight: |x, _| x.abs(),
            };
            let (own, [d, dmin]) = search.affine::<16>(x, 15);
            put_half(out, 80, d);
            put_half(out, 82, dmin);
            let (d, dmin) = (widened(d), widened(dmin));
            for (j, (scale, min)) in own.iter().enumerate() {
                out[j] = scale | min << 4;
            }
            for (i, x) in x.iter().enumerate() {
                let (scale, min) = own[i / 16];
                let q = nearest(*x, d * f32::from(scale), dmin * f32::from(min), 3);
                out[16 + i / 128 * 32 + i % 32] |= q << (i % 128 / 32 * 2);
            }
        }),
        BlockType::Q3K => each(values, |x: &[f32; K], out: &mut [u8; 110]| {
            let (d, own) = symmetric_scales(x, 4, 32.0);
            put_half(out, 108, d);
            for (j, scale) in own.iter().enumerate() {
                let scale = (scale + 32) as u8;
                out[96 + j % 8] |= (scale & 15) << (j / 8 * 4);
                out[104 + j % 4] |= scale >> 4 << (j / 4 * 2);
            }
            let d = widened(d);
            for (i, x) in x.iter().enumerate() {
                let q = signed_code(*x, d * f32::from(own[i / 16]), 4);
                out[32 + i / 128 * 32 + i % 32] |= (q & 3) << (i % 128 / 32 * 2);
                out[i % 32] |= q >> 2 << (i / 32);
            }
        }),
        BlockType::Q4K => each(values, |x: &[f32; K], out: &mut [u8; 144]| {
            let search = Search {
                codes: 15,
                first: -1.0,
                steps: 20,
                weight: |x, mean| mean + x.abs(),
            };
            let codes = put_scales_and_mins(search, x, out);
            for (i, q) in codes.into_iter().enumerate() {
                out[16 + i / 64 * 32 + i % 32] |= q << (i % 64 / 32 * 4);
            }
        }),
        BlockType::Q5K => each(values, |x: &[f32; K], out: &mut [u8; 176]| {
            let search = Search {
                codes: 31,
                first: -0.5,
                steps: 15,
                weight: |x, mean| mean + x.abs(),
            };
            let codes = put_scales_and_mins(search, x, out);
            for (i, q) in codes.into_iter().enumerate() {
                out[48 + i / 64 * 32 + i % 32] |= (q & 15) << (i % 64 / 32 * 4);
                out[16 + i % 32] |= q >> 4 << (i / 32);
            }
        }),
        BlockType::Q6K => each(values, |x: &[f32; K], out: &mut [u8; 210]| {
            let (d, own) = symmetric_scales(x, 32, 128.0);
            put_half(out, 208, d);
            for (out, scale) in out[192..208].iter_mut().zip(own) {
                *out = scale as u8;
            }
            let d = widened(d);
            for (i, x) in x.iter().enumerate() {
                let q = signed_code(*x, d * f32::from(own[i / 16]), 32);
                let (half, at) = (i / 128, i % 128);
                out[half * 64 + at % 64] |= (q & 15) << (at / 64 * 4);
                out[128 + half * 32 + at % 32] |= q >> 4 << (at / 32 * 2);
            }
        }),
        other => bail!("{} is a type that is read and not written", other.name()),
    })
}

/// Converts each N numbers to a block of B bytes, in parallel.
fn each<const N: usize, const B: usize>(
    values: &[f32],
    convert: impl Fn(&[f32; N], &mut [u8; B]) + Sync,
) -> Vec<u8> {
    /// Blocks of a task.
    const PIECE: usize = 1 << 8;
    let blocks = values.as_chunks::<N>().0;
    let mut out = vec![0; blocks.len() * B];
    let all = out.as_chunks_mut::<B>().0;
    all.par_iter_mut()
        .zip(blocks)
        .with_min_len(PIECE)
        .for_each(|(out, block)| convert(block, out));
    out
}

fn put_half(out: &mut [u8], at: usize, value: f32) {
    out[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// A scale as it is read back.
fn widened(scale: f32) -> f32 {
    f16::from_f32(scale).to_f32()
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// A number cut to a code of at most `most`.
fn code(x: f32, most: u8) -> u8 {
    (x as u8).min(most)
}

/// Puts the scale with which the number that is farthest from 0 becomes the code `-half`.
fn put_signed(x: &[f32; 32], half: f32, out: &mut [u8]) -> f32 {
    let mut farthest = x[0];
    for x in x {
        if x.abs() > farthest.abs() {
            farthest = *x;
        }
    }
    let d = farthest / -half;
    put_half(out, 0, d);
    d
}

/// Puts the scale with which the range of numbers becomes codes up to `most`, and its lower end.
fn put_range(x: &[f32; 32], most: f32, out: &mut [u8]) -> (f32, f32) {
    let (min, max) = range(x);
    let d = (max - min) / most;
    put_half(out, 0, d);
    put_half(out, 2, min);
    (d, min)
}

fn range(x: &[f32]) -> (f32, f32) {
    let first = x.first().copied().unwrap_or_default();
    let wider = |(min, max): (f32, f32), x: &f32| (min.min(*x), max.max(*x));
    x.iter().fold((first, first), wider)
}

/// Puts 32 codes of four bits: the first 16 in the lower halves of bytes.
fn put_nibbles(out: &mut [u8], code: impl Fn(usize) -> u8) {
    for (i, out) in out.iter_mut().enumerate() {
        *out = code(i) | code(i + 16) << 4;
    }
}

/// Puts 32 codes of five bits: first the fifth bits.
fn put_fives(out: &mut [u8], code: impl Fn(usize) -> u8) {
    for i in 0..32 {
        out[i / 8] |= code(i) >> 4 << (i % 8);
    }
    put_nibbles(&mut out[4..], |i| code(i) & 15);
}

/// The code whose value `scale * code - min` is nearest.
fn nearest(x: f32, scale: f32, min: f32, most: u8) -> u8 {
    code((x + min) * inverse(scale) + 0.5, most)
}

/// The code whose value `scale * (code - half)` is nearest, of twice as many.
fn signed_code(x: f32, scale: f32, half: i32) -> u8 {
    let scaled = x * inverse(scale);
    // rounded, which the standard library does by a call
    let q = (scaled + 0.5f32.copysign(scaled)) as i32;
    (q.clamp(-half, half - 1) + half) as u8
}

/// A search for the scale and the minimum of a few numbers.
struct Search {
    /// the largest code
    codes: u8,
    /// how many codes more than these the range is first divided by, which grows by a tenth
    first: f32,
    steps: usize,
    /// what an error of a number counts, by it and the root of the mean square of all
    weight: fn(f32, f32) -> f32,
}

impl Search {
    /// Scale and minimum of each N numbers as codes of at most `most`, and what these are multiples
    /// of.
    fn affine<const N: usize>(&self, x: &[f32; K], most: u8) -> (Vec<(u8, u8)>, [f32; 2]) {
        let found: Vec<(f32, f32)> = x.as_chunks::<N>().0.iter().map(|x| self.find(x)).collect();
        let largest = found.iter().fold((0f32, 0f32), |largest, (scale, min)| {
            (largest.0.max(*scale), largest.1.max(*min))
        });
        let steps = [largest.0, largest.1].map(|largest| largest / f32::from(most));
        let coded = |(scale, min): &(f32, f32)| {
            (
                code(scale * inverse(steps[0]) + 0.5, most),
                code(min * inverse(steps[1]) + 0.5, most),
            )
        };
        (found.iter().map(coded).collect(), steps)
    }

    /// The scale and the minimum, not below 0, whose values `scale * code - minimum` lose least.
    fn find<const N: usize>(&self, x: &[f32; N]) -> (f32, f32) {
        let mean = (x.iter().map(|x| x * x).sum::<f32>() / N as f32).sqrt();
        let (min, max) = range(x);
        let min = min.min(0.0);
        if max <= min {
            return (0.0, -min);
        }
        let most = f32::from(self.codes);
        let weights = x.map(|x| (self.weight)(x, mean));
        let w: f32 = sum(&weights, |weight, _, _| weight, x, x);
        let wx = sum(&weights, |weight, x, _| weight * x, x, x);
        let codes_of = |codes: f32| {
            let factor = codes / (max - min);
            // what is not below 0 is rounded by cutting it off
            x.map(|x| ((factor * (x - min)).clamp(0.0, most) + 0.5) as i32 as f32)
        };
        let lost = |q: &[f32; N], scale: f32, least: f32| {
            let of = |weight: f32, x: f32, q: f32| {
                let error = scale * q + least - x;
                weight * error * error
            };
            sum(&weights, of, x, q)
        };
        let start = (max - min) / most;
        let mut best = (lost(&codes_of(most), start, min), start, min);
        for step in 0..=self.steps {
            let q = codes_of(most + self.first + 0.1 * step as f32);
            // the scale and the minimum that are best for these codes, by least squares
            let wq = sum(&weights, |weight, _, q| weight * q, x, &q);
            let wqq = sum(&weights, |weight, _, q| weight * q * q, x, &q);
            let wxq = sum(&weights, |weight, x, q| weight * x * q, x, &q);
            let determinant = w * wqq - wq * wq;
            if determinant <= 0.0 {
                continue;
            }
            let mut scale = (w * wxq - wx * wq) / determinant;
            let mut least = (wqq * wx - wq * wxq) / determinant;
            if least > 0.0 {
                (scale, least) = (wxq / wqq, 0.0);
            }
            let error = lost(&q, scale, least);
            if error < best.0 {
                best = (error, scale, least);
            }
        }
        (best.1, -best.2)
    }
}

/// The sum of a function of each weight, number and code, in as many partial sums as the compiler
/// makes vectors of.
#[inline(always)]
fn sum<const N: usize>(
    weights: &[f32; N],
    of: impl Fn(f32, f32, f32) -> f32,
    x: &[f32; N],
    q: &[f32; N],
) -> f32 {
    const LANES: usize = 8;
    let mut sums = [0f32; LANES];
    let [weights, x, q] = [weights, x, q].map(|all| all.as_chunks::<LANES>().0);
    for ((weights, x), q) in weights.iter().zip(x).zip(q) {
        for i in 0..LANES {
            sums[i] += of(weights[i], x[i], q[i]);
        }
    }
    sums.iter().sum()
}

/// Puts what Q4_K and Q5_K begin with, eight scales and minima, and returns the codes.
fn put_scales_and_mins(search: Search, x: &[f32; K], out: &mut [u8]) -> [u8; K] {
    let (own, [d, dmin]) = search.affine::<32>(x, 63);
    put_half(out, 0, d);
    put_half(out, 2, dmin);
    let packed = &mut out[4..16];
    for (j, (scale, min)) in own.iter().enumerate() {
        if j < 4 {
            packed[j] |= scale;
            packed[j + 4] |= min;
        } else {
            packed[j + 4] = scale & 15 | (min & 15) << 4;
            packed[j - 4] |= scale >> 4 << 6;
            packed[j] |= min >> 4 << 6;
        }
    }
    let (d, dmin) = (widened(d), widened(dmin));
    std::array::from_fn(|i| {
        let (scale, min) = own[i / 32];
        nearest(
            x[i],
            d * f32::from(scale),
            dmin * f32::from(min),
            search.codes,
        )
    })
}

/// The scale of each 16 numbers as a code from `-most` on, and what these are multiples of, where
/// numbers are codes from `-half` on.
fn symmetric_scales(x: &[f32; K], half: i32, most: f32) -> (f32, [i8; 16]) {
    let mut found = [0f32; 16];
    for (found, x) in found.iter_mut().zip(x.as_chunks::<16>().0) {
        *found = symmetric_scale(x, half);
    }
    let farthest = found
        .iter()
        .fold(0f32, |farthest, scale| match scale.abs() > farthest.abs() {
            true => *scale,
            false => farthest,
        });
    let d = farthest / -most;
    let coded = found.map(|scale| (scale * inverse(d)).round().clamp(-most, most - 1.0) as i8);
    (d, coded)
}

/// The scale with which codes from `-half` on lose least of these numbers, those far from 0 counting
/// more.
fn symmetric_scale(x: &[f32; 16], half: i32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let farthest = x
        .iter()
        .fold(0f32, |farthest, x| match x.abs() > farthest.abs() {
            true => *x,
            false => farthest,
        });
    if farthest == 0.0 {
        return 0.0;
    }
    let (low, high) = (-half as f32, half as f32 - 1.0);
    let squares = x.map(|x| x * x);
    let mut best = (0f32, 0f32);
    for step in -9..=9 {
        let divided = -(half as f32 + 0.1 * step as f32) / farthest;
        // adding 1.5 * 2^23 rounds to a whole number
        let q = x.map(|x| ((divided * x).clamp(low, high) + ROUND) - ROUND);
        let product = sum(&squares, |square, x, q| square * x * q, x, &q);
        let square = sum(&squares, |square, _, q| square * q * q, x, &q);
        // what is gained is product² / square
        if square > 0.0 && product * product > best.0 * square {
            best = (product * product / square, product / square);
        }
    }
    best.1
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::weights_file::WeightsFile;
    use super::*;
    use candle_core::DType;
    use std::path::Path;

    fn golden() -> WeightsFile {
        let file = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/fixtures/gguf/quantized.safetensors"
        );
        WeightsFile::open(Path::new(file)).unwrap()
    }

    fn numbers(file: &WeightsFile, name: &str) -> Vec<f32> {
        let tensor = file.read(name).unwrap().to_dtype(DType::F32).unwrap();
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn blocks_of_32_are_the_bytes_of_the_gguf_package() {
        let file = golden();
        let source = numbers(&file, "source");
        let mut compared = 0;
        for kind in WRITTEN.into_iter().filter(|kind| kind.block().0 == 32) {
            let expected: Vec<u8> = numbers(&file, kind.name())
                .into_iter()
                .map(|byte| byte as u8)
                .collect();
            assert!(
                quantize(kind, &source).unwrap() == expected,
                "{}",
                kind.name()
            );
            compared += 1;
        }
        assert_eq!(compared, 5);
    }

    /// The root of the mean square of what is lost, relative to that of the numbers.
    fn loss(kind: BlockType, source: &[f32]) -> f64 {
        let back = kind.dequantize(&quantize(kind, source).unwrap());
        assert_eq!(back.len(), source.len());
        let square = |x: f32| f64::from(x) * f64::from(x);
        let lost: f64 = back.iter().zip(source).map(|(a, b)| square(a - b)).sum();
        (lost / source.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
    }

    #[test]
    fn more_bits_lose_less_and_blocks_of_256_less_than_those_of_32_of_as_many_bits() {
        let source = numbers(&golden(), "source");
        let all: Vec<f64> = WRITTEN.iter().map(|kind| loss(*kind, &source)).collect();
        let [q8, q4_0, q4_1, q5_0, q5_1, q2k, q3k, q4k, q5k, q6k] = *all else {
            unreachable!()
        };
        // 4.5 and 5.5 bits a number each; 3.4 and 2.6 bits; 6.6 bits
        assert!(
            q4k < q4_0 && q4k < q4_1 * 1.05 && q5k < q5_0 && q5k < q5_1 * 1.05,
            "{all:?}"
        );
        assert!(
            q8 < q6k && q6k < q5k && q5k < q4k && q4k < q3k && q3k < q2k,
            "{all:?}"
        );
        assert!(q2k < 0.35 && q3k < 0.2 && q6k < 0.02, "{all:?}");
    }

    #[test]
    fn numbers_that_are_all_alike_or_of_one_sign_come_back() {
        for kind in WRITTEN {
            for (values, most) in [
                (vec![0f32; K], 0.0),
                (vec![1.5; K], 0.02),
                (vec![-1.5; K], 0.02),
                ((0..K).map(|i| 1.0 + i as f32 / 256.0).collect(), 0.25),
            ] {
                let back = kind.dequantize(&quantize(kind, &values).unwrap());
                for (a, b) in back.iter().zip(&values) {
                    let error = (a - b).abs();
                    assert!(error <= most * b.abs(), "{}: {a} for {b}", kind.name());
                }
            }
        }
    }
}
