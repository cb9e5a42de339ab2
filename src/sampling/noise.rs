//! Seeded normal noise, value for value what torch's CPU generator gives.
//!
//! A seed is a promise: the same seed starts from the same noise as
//! `torch.Generator("cpu").manual_seed(seed)` and `torch.randn`, on every device. The module hides
//! the Mersenne Twister (Matsumoto and Nishimura 1998) and torch's two ways of turning its output
//! into normals (ATen's `DistributionTemplates.h` and `DistributionsHelper.h`): blocks of sixteen
//! values for sixteen and more, one double-precision pair at a time for fewer. Uniform draws are
//! equal bit for bit; normals to a few units in the last place, because torch itself rounds
//! logarithm, sine and cosine differently on different processors.
//!
//! Read next: `sampler`, which draws the noise of its random steps from here.

use std::f32::consts::TAU as TAU_F32;
use std::f64::consts::TAU;
use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device, Result, Tensor};
use serde::{Deserialize, Serialize};

/// Words of state of MT19937.
const STATE: usize = 624;
/// The offset of the word that each word is mixed with.
const SHIFT: usize = 397;
/// Values that torch's vectorised Box-Muller transform makes together.
const BLOCK: usize = 16;
/// Cosine beyond which the angle between two noises is too small to divide by its sine: A1111's.
const NEARLY_PARALLEL: f64 = 0.9995;

/// MT19937 with torch's seeding: the low 32 bits of the seed, Knuth's multiplier.
struct MersenneTwister {
    state: [u32; STATE],
    next: usize,
}

impl MersenneTwister {
    fn new(seed: u64) -> Self {
        let mut state = [0; STATE];
        let mut word = (seed & 0xffff_ffff) as u32;
        for (i, slot) in state.iter_mut().enumerate() {
            if i > 0 {
                word = 1_812_433_253_u32
                    .wrapping_mul(word ^ (word >> 30))
                    .wrapping_add(i as u32);
            }
            *slot = word;
        }
        Self { state, next: STATE }
    }

    fn refill(&mut self) {
        for i in 0..STATE {
            let joined =
                (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % STATE] & 0x7fff_ffff);
            let mixed = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + SHIFT) % STATE] ^ (joined >> 1) ^ mixed;
        }
        self.next = 0;
    }

    /// The next 32 uniform bits.
    fn bits32(&mut self) -> u32 {
        if self.next == STATE {
            self.refill();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// A float uniform in 0..1, made of 24 bits.
    fn uniform_f32(&mut self) -> f32 {
        (self.bits32() & 0x00ff_ffff) as f32 / 16_777_216.0
    }

    /// A double uniform in 0..1, made of 53 bits: the first word drawn is the high one.
    fn uniform_f64(&mut self) -> f64 {
        let high = u64::from(self.bits32());
        let bits = (high << 32) | u64::from(self.bits32());
        (bits & ((1 << 53) - 1)) as f64 / 9_007_199_254_740_992.0
    }
}

/// Another seed, and how far the first noise of a picture goes towards that seed's. A1111's
/// variation seed does so for each column of the latents by itself; at 512x512 its noise is 0.02
/// (strength 0.1) to 0.06 (0.5) of a unit from ours.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Variation {
    pub seed: u64,
    /// 0 to 1: all the way
    pub strength: f64,
}

impl Variation {
    /// Takes the first noise of a picture [1, h, w, c] that far.
    pub fn of(self, noise: &Tensor) -> Result<Tensor> {
        let (_, h, w, c) = noise.dims4()?;
        slerp(
            noise,
            &Generator::new(self.seed)
                .latents(h, w, c)?
                .to_device(noise.device())?,
            self.strength,
        )
    }
}

impl FromStr for Variation {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parts = text.split_once(':').and_then(|(seed, strength)| {
            Some((seed.trim().parse().ok()?, strength.trim().parse().ok()?))
        });
        match parts {
            Some((seed, strength)) if (0.0..=1.0).contains(&strength) => {
                Ok(Self { seed, strength })
            }
            _ => Err("expected SEED:X with X from 0 to 1, such as 9:0.2".into()),
        }
    }
}

impl TryFrom<String> for Variation {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Variation {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.seed, self.strength)
    }
}

impl From<Variation> for String {
    fn from(variation: Variation) -> Self {
        variation.to_string()
    }
}

/// A source of normal noise equal to `torch.Generator("cpu").manual_seed(seed)`.
pub struct Generator {
    bits: MersenneTwister,
    /// The second normal of the last double-precision pair, kept for the next short draw.
    spare: Option<f64>,
}

impl Generator {
    /// Starts from a seed. Like torch's twister, only its low 32 bits count.
    pub fn new(seed: u64) -> Self {
        Self {
            bits: MersenneTwister::new(seed),
            spare: None,
        }
    }

    /// `n` unit normals, as `torch.randn(n)` orders them (any shape with `n` elements).
    pub fn randn(&mut self, n: usize) -> Vec<f32> {
        if n < BLOCK {
            return (0..n).map(|_| self.normal() as f32).collect();
        }
        let mut values: Vec<f32> = (0..n).map(|_| self.bits.uniform_f32()).collect();
        let mut blocks = values.chunks_exact_mut(BLOCK);
        blocks.by_ref().for_each(box_muller);
        if !n.is_multiple_of(BLOCK) {
            // torch draws the last sixteen values anew, over what the full blocks left there
            let tail = &mut values[n - BLOCK..];
            tail.fill_with(|| self.bits.uniform_f32());
            box_muller(tail);
        }
        values
    }

    /// The noise of one picture, drawn as `torch.randn((1, c, h, w))`, laid out `[1, h, w, c]`.
    /// Errors if the tensor cannot be made.
    pub fn latents(&mut self, h: usize, w: usize, c: usize) -> Result<Tensor> {
        let noise = self.randn(c * h * w);
        Tensor::from_vec(noise, (1, c, h, w), &Device::Cpu)?
            .permute((0, 2, 3, 1))? // [1, h, w, c]
            .contiguous()
    }

    /// One normal by Box and Muller 1958 in double precision; the pair's other half is kept.
    fn normal(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let angle = TAU * self.bits.uniform_f64();
        let radius = (-2.0 * (-self.bits.uniform_f64()).ln_1p()).sqrt();
        self.spare = Some(radius * angle.sin());
        radius * angle.cos()
    }
}

/// Spherical interpolation (Shoemake 1985) between two tensors, each seen as one vector: `a` at 0,
/// `b` at 1, and between them as long as they are, where their mean would be too short to be unit
/// noise. Of nearly parallel ones the mean.
fn slerp(a: &Tensor, b: &Tensor, share: f64) -> Result<Tensor> {
    let wide = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let dot = |a: &Tensor, b: &Tensor| -> Result<f64> {
        (wide(a)? * wide(b)?)?.sum_all()?.to_scalar::<f64>()
    };
    let cosine = dot(a, b)? / (dot(a, a)? * dot(b, b)?).sqrt();
    let (of_a, of_b) = if cosine > NEARLY_PARALLEL {
        (1.0 - share, share)
    } else {
        let angle = cosine.acos();
        (
            ((1.0 - share) * angle).sin() / angle.sin(),
            (share * angle).sin() / angle.sin(),
        )
    };
    (a * of_a)? + (b * of_b)?
}

/// Turns sixteen uniform values into normals in place: values i and i + 8 make a pair.
fn box_muller(block: &mut [f32]) {
    let (cosines, sines) = block.split_at_mut(BLOCK / 2);
    for (a, b) in cosines.iter_mut().zip(sines) {
        let radius = (-2.0 * (1.0 - *a).ln()).sqrt();
        let angle = TAU_F32 * *b;
        *a = radius * angle.cos();
        *b = radius * angle.sin();
    }
}
