//! Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) around the network: what a sampler
//! calls `denoise`.

use crate::model::Denoiser;
use crate::sampling::Scalings;
use candle_core::{D, Result, Tensor};

/// A network with its conditioning, seen as a denoiser.
pub struct CfgDenoiser<'a> {
    /// bound to the conditioning of all passes, one block of images after the other
    pub model: Denoiser<'a>,
    pub guidance: Guidance,
    /// of each prompt of a picture beside the others
    pub weights: Vec<f64>,
    pub scale: f64,
    /// how much of the guided output's spread is brought back to that of the prompt's alone, 0..=1
    pub rescale: f64,
    pub deep_cache: DeepCache,
}

/// What the network is told of in every step, and what is steered away from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Guidance {
    /// nothing: the prompts alone
    Off,
    /// the negative prompts, then so many prompts of each picture
    Text(usize),
    /// the negative prompts without the source picture, the negative prompts with it, and the
    /// prompts with it; the scale between the first two (Brooks et al. 2022, arXiv 2211.09800, eq.
    /// 3)
    TextAndImage(f64),
}

impl Guidance {
    /// How often the network sees each picture in a step.
    pub fn passes(self) -> usize {
        match self {
            Self::Off => 1,
            Self::Text(prompts) => 1 + prompts,
            Self::TextAndImage(_) => 3,
        }
    }
}

/// How the U-Net's inner levels are reused from step to step (DeepCache).
pub struct DeepCache {
    /// they run in every `interval`th step only
    interval: usize,
    /// calls so far
    calls: usize,
    inner: Option<Tensor>,
}

impl DeepCache {
    /// The inner levels run in the first of every `interval` steps; 1 reuses nothing.
    pub fn every(interval: usize) -> Self {
        Self {
            interval,
            calls: 0,
            inner: None,
        }
    }

    fn forward(&mut self, model: &Denoiser, input: &Tensor, timestep: f64) -> Result<Tensor> {
        if self.interval <= 1 {
            return model.forward(input, timestep);
        }
        if self.calls.is_multiple_of(self.interval) {
            self.inner = None;
        }
        self.calls += 1;
        model.forward_cached(input, timestep, &mut self.inner)
    }
}

impl CfgDenoiser<'_> {
    /// Noisy latents [b, h, w, c] with the scalings of their noise level, at `timestep` -> the
    /// estimate of the clean latents x0, in f32.
    pub fn denoise(&mut self, x: &Tensor, scalings: Scalings, timestep: f64) -> Result<Tensor> {
        let input = (x * scalings.c_in)?;
        let passes = self.guidance.passes();
        let input = if passes > 1 {
            Tensor::cat(&vec![&input; passes], 0)?
        } else {
            input
        }; // [passes*b, h, w, c]
        let output = self.deep_cache.forward(&self.model, &input, timestep)?;
        let parts = output.chunk(passes, 0)?;
        let output = match (self.guidance, &parts[..]) {
            (Guidance::Text(_), [unconditional, conditional, ..]) => {
                let mut guided = unconditional.clone();
                for (conditional, weight) in parts.iter().skip(1).zip(&self.weights) {
                    guided = (guided + ((conditional - unconditional)? * (self.scale * weight))?)?;
                }
                if self.rescale > 0.0 {
                    rescaled(&guided, conditional, self.rescale)?
                } else {
                    guided
                }
            }
            (Guidance::TextAndImage(scale), [unconditional, picture, conditional]) => {
                let towards_text = ((conditional - picture)? * self.scale)?;
                ((unconditional + towards_text)? + ((picture - unconditional)? * scale)?)?
            }
            _ => output,
        };
        (x * scalings.c_skip)? + (output * scalings.c_out)?
    }
}

/// Lin et al. 2023 (arXiv 2305.08891), section 3.4: guidance makes a picture's values spread too
/// far. Both [b, h, w, c].
fn rescaled(guided: &Tensor, conditional: &Tensor, share: f64) -> Result<Tensor> {
    let spread = |x: &Tensor| {
        let x = x.flatten_from(1)?; // [b, h*w*c]
        x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?
            .sqr()?
            .sum_keepdim(D::Minus1)?
            .sqrt() // [b, 1]
    };
    let factor = (((spread(conditional)? / spread(guided)?)? * share)? + (1.0 - share))?; // [b, 1]
    guided.broadcast_mul(&factor.reshape(((), 1, 1, 1))?)
}
