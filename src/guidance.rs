//! Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) around the U-Net: what a sampler calls `denoise`.

use crate::model::unet::Told;
use crate::schedule::Prediction;
use candle_core::{D, Result, Tensor};

/// A U-Net with its conditioning, seen as a denoiser.
pub struct Guided<'a> {
    /// told of the prompts; with `pairs`, of what to steer away from and then of the prompts
    pub unet: Told<'a>,
    pub pairs: bool,
    pub scale: f64,
    /// how much of the guided output's spread is brought back to that of the prompt's alone, 0..=1
    pub rescale: f64,
    pub prediction: Prediction,
    pub reuse: Reuse,
}

/// How the U-Net's inner levels are reused from step to step (DeepCache).
pub struct Reuse {
    /// they run in every `interval`th step only
    interval: usize,
    /// calls so far
    calls: usize,
    inner: Option<Tensor>,
}

impl Reuse {
    /// The inner levels run in the first of every `interval` steps; 1 reuses nothing.
    pub fn every(interval: usize) -> Self {
        Self { interval, calls: 0, inner: None }
    }

    fn forward(&mut self, unet: &Told, input: &Tensor, timestep: f64) -> Result<Tensor> {
        if self.interval <= 1 {
            return unet.forward(input, timestep);
        }
        if self.calls.is_multiple_of(self.interval) {
            self.inner = None;
        }
        self.calls += 1;
        unet.forward_reusing(input, timestep, &mut self.inner)
    }
}

impl Guided<'_> {
    /// Noisy latents [b, h, w, c] = x0 + sigma * noise, at `timestep` -> the estimate of x0, in f32.
    pub fn denoise(&mut self, x: &Tensor, sigma: f64, timestep: f64) -> Result<Tensor> {
        let scalings = self.prediction.scalings(sigma);
        let input = (x * scalings.c_in)?.to_dtype(self.unet.dtype())?;
        let input = if self.pairs { Tensor::cat(&[&input, &input], 0)? } else { input }; // [b, h, w, c] or [2b, h, w, c]
        let output = self.reuse.forward(&self.unet, &input, timestep)?.to_dtype(x.dtype())?;
        let output = if self.pairs {
            let halves = output.chunk(2, 0)?;
            let [unconditional, conditional] = halves.as_slice() else { candle_core::bail!("the guided pair cannot be halved") };
            let guided = (unconditional + ((conditional - unconditional)? * self.scale)?)?;
            if self.rescale > 0.0 { rescaled(&guided, conditional, self.rescale)? } else { guided }
        } else {
            output
        };
        (x * scalings.c_skip)? + (output * scalings.c_out)?
    }
}

/// Lin et al. 2023 (arXiv 2305.08891), section 3.4: guidance makes a picture's values spread too far. Both [b, h, w, c].
fn rescaled(guided: &Tensor, conditional: &Tensor, share: f64) -> Result<Tensor> {
    let spread = |x: &Tensor| {
        let x = x.flatten_from(1)?; // [b, h*w*c]
        x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?.sqr()?.sum_keepdim(D::Minus1)?.sqrt() // [b, 1]
    };
    let factor = (((spread(conditional)? / spread(guided)?)? * share)? + (1.0 - share))?; // [b, 1]
    guided.broadcast_mul(&factor.reshape(((), 1, 1, 1))?)
}
