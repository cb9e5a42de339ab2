//! The block types of GGUF files: numbers of a few bits that share scales, 32 or 256 of them a block,
//! as ggml lays them out.
//!
//! Values are those of the `gguf` Python package's `dequantize`, bit for bit. A [`BlockMatrix`] is
//! the weights of a product that stay in blocks in memory.

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

/// Converts each block by a function, which is named here, since one that is passed is not inlined into
/// code for other instructions.
macro_rules! each {
    ($raw:ident, $out:ident, $convert:ident) => {{
        let (blocks, all) = ($raw.as_chunks().0, $out.as_chunks_mut().0);
        for (out, block) in all.iter_mut().zip(blocks) {
            $convert(block, out);
        }
    }};
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

    /// The type of this name.
    pub fn named(name: &str) -> Option<Self> {
        (0..=23)
            .filter_map(|number| Self::of(number).ok())
            .find(|kind| kind.name() == name)
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
        /// Numbers of a task.
        const PIECE: usize = 1 << 15;
        let (numbers, bytes) = self.block();
        let mut out = vec![0f32; raw.len() / bytes * numbers];
        let pieces = raw.par_chunks(PIECE / numbers * bytes);
        out.par_chunks_mut(PIECE)
            .zip(pieces)
            .for_each(|(out, raw)| self.write(raw, out));
        out
    }

    /// Writes the numbers of whole blocks to the beginning of `out`.
    ///
    /// All of it is inlined, so that it is compiled for the instructions of the kernel around it.
    #[inline(always)]
    pub fn write(self, raw: &[u8], out: &mut [f32]) {
        match self {
            Self::Q4_0 => each!(raw, out, q4_0),
            Self::Q4_1 => each!(raw, out, q4_1),
            Self::Q5_0 => each!(raw, out, q5_0),
            Self::Q5_1 => each!(raw, out, q5_1),
            Self::Q8_0 => each!(raw, out, q8_0),
            Self::Q2K => each!(raw, out, q2_k),
            Self::Q3K => each!(raw, out, q3_k),
            Self::Q4K => each!(raw, out, q4_k),
            Self::Q5K => each!(raw, out, q5_k),
            Self::Q6K => each!(raw, out, q6_k),
            Self::Iq4Nl => each!(raw, out, iq4_nl),
            Self::Iq4Xs => each!(raw, out, iq4_xs),
        }
    }
}

#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half(block, 0);
    for (out, q) in out.iter_mut().zip(nibbles(sixteen(block, 2))) {
        *out = d * (f32::from(q) - 8.0);
    }
}

#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for (out, q) in out.iter_mut().zip(nibbles(sixteen(block, 4))) {
        *out = d * f32::from(q) + m;
    }
}

#[inline(always)]
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half(block, 0);
    for (out, q) in out.iter_mut().zip(five_bits(block, 2, 6)) {
        *out = d * (f32::from(q) - 16.0);
    }
}

#[inline(always)]
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for (out, q) in out.iter_mut().zip(five_bits(block, 4, 8)) {
        *out = d * f32::from(q) + m;
    }
}

#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half(block, 0);
    for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        for (out, q) in out.iter_mut().zip(sixteen(block, 2 + i * 16)) {
            *out = d * f32::from(q as i8);
        }
    }
}

#[inline(always)]
fn q2_k(block: &[u8; 84], out: &mut [f32; K]) {
    let (d, min) = (half(block, 80), half(block, 82));
    for (j, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (scale, min) = (d * f32::from(block[j] & 15), min * f32::from(block[j] >> 4));
        for (out, q) in out.iter_mut().zip(two_bits(&block[16..80], j)) {
            *out = scale * f32::from(q) - min;
        }
    }
}

#[inline(always)]
fn q3_k(block: &[u8; 110], out: &mut [f32; K]) {
    let (high, q, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half(block, 108);
    for (j, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        // six bits of each scale: four in the first eight bytes, two in the last four
        let low = packed[j % 8] >> (j / 8 * 4) & 15;
        let top = packed[8 + j % 4] >> (j / 4 * 2) & 3;
        let scale = d * (f32::from(low | top << 4) - 32.0);
        let bits = sixteen(high, j % 2 * 16);
        for ((out, q), high) in out.iter_mut().zip(two_bits(q, j)).zip(bits) {
            *out = scale * (f32::from(q | (high >> (j / 2) & 1) << 2) - 4.0);
        }
    }
}

#[inline(always)]
fn q4_k(block: &[u8; 144], out: &mut [f32; K]) {
    let (d, min) = (half(block, 0), half(block, 2));
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, m) = scale_and_min(&block[4..16], j);
        let (scale, min) = (d * scale, min * m);
        for (out, q) in out.iter_mut().zip(four_bits(&block[16..], j)) {
            *out = scale * f32::from(q) - min;
        }
    }
}

#[inline(always)]
fn q5_k(block: &[u8; 176], out: &mut [f32; K]) {
    let (d, min) = (half(block, 0), half(block, 2));
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, m) = scale_and_min(&block[4..16], j);
        let (scale, min) = (d * scale, min * m);
        let q = four_bits(&block[48..], j).into_iter();
        for ((out, q), high) in out.iter_mut().zip(q).zip(&block[16..48]) {
            *out = scale * f32::from(q | (high >> j & 1) << 4) - min;
        }
    }
}

#[inline(always)]
fn q6_k(block: &[u8; 210], out: &mut [f32; K]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half(block, 208);
    for (j, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(scales[j] as i8);
        // halves of 128 numbers: 64 bytes of nibbles, 32 of pairs of bits
        let (half, at) = (j / 8, j % 8 * 16);
        let low = sixteen(low, half * 64 + at % 64);
        let high = sixteen(high, half * 32 + at % 32);
        let (of_low, of_high) = (at / 64 * 4, at / 32 * 2);
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            let q = low >> of_low & 15 | (high >> of_high & 3) << 4;
            *out = scale * (f32::from(q) - 32.0);
        }
    }
}

#[inline(always)]
fn iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half(block, 0);
    for (out, q) in out.iter_mut().zip(nibbles(sixteen(block, 2))) {
        *out = d * IQ4[usize::from(q & 15)];
    }
}

#[inline(always)]
fn iq4_xs(block: &[u8; 136], out: &mut [f32; K]) {
    let (d, high) = (half(block, 0), u16::from_le_bytes([block[2], block[3]]));
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let low = block[4 + j / 2] >> (j % 2 * 4) & 15;
        let top = (high >> (2 * j) & 3) as u8;
        let scale = d * (f32::from(low | top << 4) - 32.0);
        for (out, q) in out.iter_mut().zip(nibbles(sixteen(block, 8 + j * 16))) {
            *out = scale * IQ4[usize::from(q & 15)];
        }
    }
}

/// The f16 at a byte of a block.
#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The sixteen bytes from this one on.
#[inline(always)]
fn sixteen(bytes: &[u8], at: usize) -> [u8; 16] {
    let mut sixteen = [0; 16];
    sixteen.copy_from_slice(&bytes[at..at + 16]);
    sixteen
}

/// The numbers of four bits in 16 bytes: first the lower halves, then the upper ones.
#[inline(always)]
fn nibbles(bytes: [u8; 16]) -> [u8; 32] {
    let mut numbers = [0; 32];
    for (i, byte) in bytes.into_iter().enumerate() {
        (numbers[i], numbers[i + 16]) = (byte & 15, byte >> 4);
    }
    numbers
}

/// The same with a fifth bit for each, which are 32 bits from the byte `high` on.
#[inline(always)]
fn five_bits(block: &[u8], high: usize, low: usize) -> [u8; 32] {
    let mut numbers = nibbles(sixteen(block, low));
    for (i, number) in numbers.iter_mut().enumerate() {
        *number |= (block[high + i / 8] >> (i % 8) & 1) << 4;
    }
    numbers
}

/// Sixteen numbers of two bits, the jth of a block of 256: in each half of the block, four rounds of
/// 32 numbers.
#[inline(always)]
fn two_bits(bytes: &[u8], j: usize) -> [u8; 16] {
    let mut numbers = sixteen(bytes, j / 8 * 32 + j % 2 * 16);
    for number in &mut numbers {
        *number = *number >> (j % 8 / 2 * 2) & 3;
    }
    numbers
}

/// Thirty-two numbers of four bits, the jth of a block of 256: of each 32 bytes first the lower halves,
/// then the upper ones.
#[inline(always)]
fn four_bits(bytes: &[u8], j: usize) -> [u8; 32] {
    let mut numbers = [0; 32];
    let bytes = &bytes[j / 2 * 32..][..32];
    for (number, byte) in numbers.iter_mut().zip(bytes) {
        *number = if j.is_multiple_of(2) {
            byte & 15
        } else {
            byte >> 4
        };
    }
    numbers
}

/// Scale and minimum j of the eight of a block of Q4_K or Q5_K, six bits each in twelve bytes.
#[inline(always)]
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

/// Rows [rows, in] of a matrix, each of whole blocks of one type.
pub struct Rows {
    pub kind: BlockType,
    pub raw: Vec<u8>,
}

/// Weights [out, in] in blocks, which stay so in memory and are widened where they are multiplied.
pub struct BlockMatrix {
    outputs: usize,
    inputs: usize,
    parts: Vec<Rows>,
}

impl BlockMatrix {
    /// A matrix of these rows; none where they are not whole blocks, or do not fill it.
    pub fn new(outputs: usize, inputs: usize, parts: Vec<Rows>) -> Option<Self> {
        let rows = |Rows { kind, raw }: &Rows| {
            let bytes = row_bytes(*kind, inputs)?;
            raw.len().is_multiple_of(bytes).then(|| raw.len() / bytes)
        };
        let rows = parts.iter().map(rows).sum::<Option<usize>>()?;
        (rows == outputs && inputs > 0).then_some(Self {
            outputs,
            inputs,
            parts,
        })
    }

    /// The rows of several of the same width, one after the other; none where widths differ.
    pub fn cat(all: Vec<Self>) -> Option<Self> {
        let inputs = all.first()?.inputs;
        if all.iter().any(|one| one.inputs != inputs) {
            return None;
        }
        Some(Self {
            outputs: all.iter().map(|one| one.outputs).sum(),
            inputs,
            parts: all.into_iter().flat_map(|one| one.parts).collect(),
        })
    }

    /// Rows and columns.
    pub fn dims(&self) -> (usize, usize) {
        (self.outputs, self.inputs)
    }

    /// The numbers of the largest block of a row.
    pub fn block(&self) -> usize {
        let numbers = self.parts.iter().map(|part| part.kind.block().0);
        numbers.max().unwrap_or(1)
    }

    /// Writes numbers of a row from `first` on, which begins a block, to all of `out`, which ends with
    /// one; zeros if there is no such row.
    #[inline(always)]
    pub fn write(&self, row: usize, first: usize, out: &mut [f32]) {
        let mut row = row;
        for Rows { kind, raw } in &self.parts {
            let ((numbers, bytes), inputs) = (kind.block(), self.inputs);
            let of_row = inputs / numbers * bytes;
            let rows = raw.len() / of_row;
            if row < rows {
                let from = row * of_row + first / numbers * bytes;
                let raw = &raw[from..from + out.len() / numbers * bytes];
                kind.write(raw, out);
                return;
            }
            row -= rows;
        }
        out.fill(0.0);
    }
}

/// The bytes of a row of so many numbers, if it is made of whole blocks.
pub fn row_bytes(kind: BlockType, inputs: usize) -> Option<usize> {
    let (numbers, bytes) = kind.block();
    (inputs > 0 && inputs.is_multiple_of(numbers)).then(|| inputs / numbers * bytes)
}
