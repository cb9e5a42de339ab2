//! The block types of GGUF files: numbers of a few bits that share scales, 32 or 256 of them a block,
//! as ggml lays them out.
//!
//! Values are those of the `gguf` Python package's `dequantize`, bit for bit.

use half::f16;
use rayon::prelude::*;

/// Numbers of a block of the types that end in K.
const K: usize = 256;

/// The numbers that four bits stand for in types that are not linear.
const IQ4: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
    89.0, 113.0,
];

/// How a GGUF file stores numbers in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
}

impl BlockType {
    /// The type of a number in a file, or its name if it is not read.
    pub fn of(number: u32) -> Result<Self, &'static str> {
        Ok(match number {
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2K,
            11 => Self::Q3K,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            20 => Self::Iq4Nl,
            23 => Self::Iq4Xs,
            9 => return Err("Q8_1"),
            15 => return Err("Q8_K"),
            16 => return Err("IQ2_XXS"),
            17 => return Err("IQ2_XS"),
            18 => return Err("IQ3_XXS"),
            19 => return Err("IQ1_S"),
            21 => return Err("IQ3_S"),
            22 => return Err("IQ2_S"),
            24 => return Err("I8"),
            25 => return Err("I16"),
            26 => return Err("I32"),
            27 => return Err("I64"),
            28 => return Err("F64"),
            29 => return Err("IQ1_M"),
            34 => return Err("TQ1_0"),
            35 => return Err("TQ2_0"),
            39 => return Err("MXFP4"),
            _ => return Err("a type of no known number"),
        })
    }

    /// Its name, in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Q2K => "q2_k",
            Self::Q3K => "q3_k",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
            Self::Iq4Nl => "iq4_nl",
            Self::Iq4Xs => "iq4_xs",
        }
    }

    /// The numbers of a block, and its bytes.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::Q4_0 | Self::Iq4Nl => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q2K => (K, 84),
            Self::Q3K => (K, 110),
            Self::Q4K => (K, 144),
            Self::Q5K => (K, 176),
            Self::Q6K => (K, 210),
            Self::Iq4Xs => (K, 136),
        }
    }

    /// The numbers of whole blocks.
    pub fn dequantize(self, raw: &[u8]) -> Vec<f32> {
        match self {
            Self::Q4_0 => each(raw, |block: &[u8; 18], out: &mut [f32; 32]| {
                let d = half(block, 0);
                nibbles(&block[2..], |i, q| out[i] = d * (f32::from(q) - 8.0));
            }),
            Self::Q4_1 => each(raw, |block: &[u8; 20], out: &mut [f32; 32]| {
                let (d, m) = (half(block, 0), half(block, 2));
                nibbles(&block[4..], |i, q| out[i] = d * f32::from(q) + m);
            }),
            Self::Q5_0 => each(raw, |block: &[u8; 22], out: &mut [f32; 32]| {
                let d = half(block, 0);
                nibbles(&block[6..], |i, q| {
                    out[i] = d * (f32::from(q | fifth(&block[2..6], i)) - 16.0);
                });
            }),
            Self::Q5_1 => each(raw, |block: &[u8; 24], out: &mut [f32; 32]| {
                let (d, m) = (half(block, 0), half(block, 2));
                nibbles(&block[8..], |i, q| {
                    out[i] = d * f32::from(q | fifth(&block[4..8], i)) + m;
                });
            }),
            Self::Q8_0 => each(raw, |block: &[u8; 34], out: &mut [f32; 32]| {
                let d = half(block, 0);
                for (out, q) in out.iter_mut().zip(&block[2..]) {
                    *out = d * f32::from(*q as i8);
                }
            }),
            Self::Q2K => each(raw, |block: &[u8; 84], out: &mut [f32; K]| {
                let (scales, q) = (&block[..16], &block[16..80]);
                let (d, min) = (half(block, 80), half(block, 82));
                for (i, out) in out.iter_mut().enumerate() {
                    let scale = scales[i / 16];
                    let (scale, min) = (d * f32::from(scale & 15), min * f32::from(scale >> 4));
                    *out = scale * f32::from(two_bits(q, i)) - min;
                }
            }),
            Self::Q3K => each(raw, |block: &[u8; 110], out: &mut [f32; K]| {
                let (high, q, packed) = (&block[..32], &block[32..96], &block[96..108]);
                let d = half(block, 108);
                for (i, out) in out.iter_mut().enumerate() {
                    // six bits of each scale: four in the first eight bytes, two in the last four
                    let j = i / 16;
                    let low = packed[j % 8] >> (j / 8 * 4) & 15;
                    let top = packed[8 + j % 4] >> (j / 4 * 2) & 3;
                    let scale = d * (f32::from(low | top << 4) - 32.0);
                    let bit = high[i % 32] >> (i / 32) & 1;
                    *out = scale * (f32::from(two_bits(q, i) | bit << 2) - 4.0);
                }
            }),
            Self::Q4K => each(raw, |block: &[u8; 144], out: &mut [f32; K]| {
                let (d, min) = (half(block, 0), half(block, 2));
                for (i, out) in out.iter_mut().enumerate() {
                    let (scale, m) = scale_and_min(&block[4..16], i / 32);
                    *out = d * scale * f32::from(four_bits(&block[16..], i)) - min * m;
                }
            }),
            Self::Q5K => each(raw, |block: &[u8; 176], out: &mut [f32; K]| {
                let (d, min) = (half(block, 0), half(block, 2));
                for (i, out) in out.iter_mut().enumerate() {
                    let (scale, m) = scale_and_min(&block[4..16], i / 32);
                    let bit = block[16 + i % 32] >> (i / 32) & 1;
                    let q = four_bits(&block[48..], i) | bit << 4;
                    *out = d * scale * f32::from(q) - min * m;
                }
            }),
            Self::Q6K => each(raw, |block: &[u8; 210], out: &mut [f32; K]| {
                let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
                let d = half(block, 208);
                for (i, out) in out.iter_mut().enumerate() {
                    // halves of 128 numbers: 64 bytes of nibbles, 32 of pairs of bits
                    let (half, at) = (i / 128, i % 128);
                    let nibble = low[half * 64 + at % 64] >> (at / 64 * 4) & 15;
                    let pair = high[half * 32 + at % 32] >> (at / 32 * 2) & 3;
                    let scale = d * f32::from(scales[i / 16] as i8);
                    *out = scale * (f32::from(nibble | pair << 4) - 32.0);
                }
            }),
            Self::Iq4Nl => each(raw, |block: &[u8; 18], out: &mut [f32; 32]| {
                let d = half(block, 0);
                nibbles(&block[2..], |i, q| out[i] = d * IQ4[usize::from(q & 15)]);
            }),
            Self::Iq4Xs => each(raw, |block: &[u8; 136], out: &mut [f32; K]| {
                let (d, high) = (half(block, 0), u16::from_le_bytes([block[2], block[3]]));
                for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    let low = block[4 + j / 2] >> (j % 2 * 4) & 15;
                    let top = (high >> (2 * j) & 3) as u8;
                    let scale = d * (f32::from(low | top << 4) - 32.0);
                    nibbles(&block[8 + j * 16..][..16], |i, q| {
                        out[i] = scale * IQ4[usize::from(q & 15)];
                    });
                }
            }),
        }
    }
}

/// Converts each block of B bytes to N numbers, in parallel.
fn each<const B: usize, const N: usize>(
    raw: &[u8],
    convert: impl Fn(&[u8; B], &mut [f32; N]) + Sync,
) -> Vec<f32> {
    /// Blocks of a task.
    const PIECE: usize = 1 << 10;
    let blocks = raw.as_chunks::<B>().0;
    let mut out = vec![0f32; blocks.len() * N];
    let all = out.as_chunks_mut::<N>().0;
    all.par_iter_mut()
        .zip(blocks)
        .with_min_len(PIECE)
        .for_each(|(out, block)| convert(block, out));
    out
}

/// The f16 at a byte of a block.
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The numbers of four bits in 16 bytes: first the lower halves, then the upper ones.
fn nibbles(bytes: &[u8], mut each: impl FnMut(usize, u8)) {
    for (i, byte) in bytes.iter().take(16).enumerate() {
        each(i, byte & 15);
        each(i + 16, byte >> 4);
    }
}

/// The fifth bit of number i of 32, where it belongs.
fn fifth(bits: &[u8], i: usize) -> u8 {
    (bits[i / 8] >> (i % 8) & 1) << 4
}

/// Number i of 256 of two bits: in each half of 64 bytes, four rounds of 32.
fn two_bits(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3
}

/// Number i of 256 of four bits: of each 32 bytes first the lower halves, then the upper ones.
fn four_bits(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4) & 15
}

/// Scale and minimum j of the eight of a block of Q4_K or Q5_K, six bits each in twelve bytes.
fn scale_and_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            packed[j + 4] & 15 | packed[j - 4] >> 6 << 4,
            packed[j + 4] >> 4 | packed[j] >> 6 << 4,
        )
    };
    (scale.into(), min.into())
}
