//! Seeded normal noise, value for value what torch's CPU generator gives.
//!
//! A seed is a promise: the same seed starts from the same noise as
//! `torch.Generator("cpu").manual_seed(seed)` and `torch.randn`, on every device. The module hides
//! torch's two ways of turning the output of the Mersenne Twister (Matsumoto and Nishimura 1998)
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
use rand_mt::Mt;
use serde::{Deserialize, Serialize};

/// Values that torch's vectorised Box-Muller transform makes together.
const BLOCK: usize = 16;
/// Cosine beyond which the angle between two noises is too small to divide by its sine: A1111's.
const NEARLY_PARALLEL: f64 = 0.9995;

/// A float uniform in 0..1, made of 24 bits as torch makes it.
fn uniform_f32(bits: &mut Mt) -> f32 {
    (bits.next_u32() & 0x00ff_ffff) as f32 / 16_777_216.0
}

/// A double uniform in 0..1, made of 53 bits as torch makes it: the first word drawn is the high
/// one.
fn uniform_f64(bits: &mut Mt) -> f64 {
    let high = u64::from(bits.next_u32());
    let word = (high << 32) | u64::from(bits.next_u32());
    (word & ((1 << 53) - 1)) as f64 / 9_007_199_254_740_992.0
}

/// A1111's variation seed: another seed, and how far the initial noise of an image is moved towards
/// that seed's. A1111 interpolates each column of the latents by itself; at 512x512 its noise is
/// 0.02 (strength 0.1) to 0.06 (0.5) of a unit from ours.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Variation {
    /// The other seed.
    pub seed: u64,
    /// The weight of its noise, 0 to 1.
    pub strength: f64,
}

impl Variation {
    /// Moves the initial noise of one image, [1, h, w, c]. Errors are those of the tensors.
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
    bits: Mt,
    /// The second normal of the last double-precision pair, kept for the next short draw.
    spare: Option<f64>,
}

impl Generator {
    /// Starts from a seed. Like torch's twister, only its low 32 bits count.
    pub fn new(seed: u64) -> Self {
        Self {
            bits: Mt::new(seed as u32),
            spare: None,
        }
    }

    /// `n` unit normals, as `torch.randn(n)` orders them (any shape with `n` elements).
    pub fn randn(&mut self, n: usize) -> Vec<f32> {
        if n < BLOCK {
            return (0..n).map(|_| self.normal() as f32).collect();
        }
        let mut values: Vec<f32> = (0..n).map(|_| uniform_f32(&mut self.bits)).collect();
        let mut blocks = values.chunks_exact_mut(BLOCK);
        blocks.by_ref().for_each(box_muller);
        if !n.is_multiple_of(BLOCK) {
            // torch draws the last sixteen values anew, over what the full blocks left there
            let tail = &mut values[n - BLOCK..];
            tail.fill_with(|| uniform_f32(&mut self.bits));
            box_muller(tail);
        }
        values
    }

    /// The noise of one image, drawn as `torch.randn((1, c, h, w))`, laid out `[1, h, w, c]`.
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
        let angle = TAU * uniform_f64(&mut self.bits);
        let radius = (-2.0 * (-uniform_f64(&mut self.bits)).ln_1p()).sqrt();
        self.spare = Some(radius * angle.sin());
        radius * angle.cos()
    }
}

/// Interpolates spherically (Shoemake 1985) between two tensors, each seen as one vector: `a` at
/// weight 0, `b` at 1, and in between a vector of their length, where a weighted mean would be too
/// short to be unit noise. Nearly parallel ones are averaged.
fn slerp(a: &Tensor, b: &Tensor, weight: f64) -> Result<Tensor> {
    let wide = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let dot = |a: &Tensor, b: &Tensor| -> Result<f64> {
        (wide(a)? * wide(b)?)?.sum_all()?.to_scalar::<f64>()
    };
    let cosine = dot(a, b)? / (dot(a, a)? * dot(b, b)?).sqrt();
    let (of_a, of_b) = if cosine > NEARLY_PARALLEL {
        (1.0 - weight, weight)
    } else {
        let angle = cosine.acos();
        (
            ((1.0 - weight) * angle).sin() / angle.sin(),
            (weight * angle).sin() / angle.sin(),
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
