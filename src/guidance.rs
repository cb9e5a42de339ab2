//! Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) around the U-Net: what a sampler calls `denoise`.

use crate::model::unet::UNet;
use crate::schedule::Prediction;
use candle_core::{Result, Tensor};

/// A U-Net with its conditioning, seen as a denoiser.
pub struct Guided<'a> {
    pub unet: &'a UNet,
    /// prompt embeddings [b, n, d]
    pub context: Tensor,
    /// embeddings of what to steer away from [b, n, d]; none turns guidance off
    pub negative: Option<Tensor>,
    pub scale: f64,
    pub prediction: Prediction,
}

impl Guided<'_> {
    /// Noisy latents [b, h, w, c] = x0 + sigma * noise, at `timestep` -> the estimate of x0, in f32.
    pub fn denoise(&self, x: &Tensor, sigma: f64, timestep: f64) -> Result<Tensor> {
        let scalings = self.prediction.scalings(sigma);
        let input = (x * scalings.c_in)?.to_dtype(self.context.dtype())?;
        let output = match &self.negative {
            None => self.unet.forward(&input, timestep, &self.context)?.to_dtype(x.dtype())?,
            Some(negative) => {
                // unconditional half first, in picture order
                let input = Tensor::cat(&[&input, &input], 0)?; // [2b, h, w, c]
                let context = Tensor::cat(&[negative, &self.context], 0)?; // [2b, n, d]
                let halves = self.unet.forward(&input, timestep, &context)?.to_dtype(x.dtype())?.chunk(2, 0)?;
                let [unconditional, conditional] = halves.as_slice() else { candle_core::bail!("the guided pair cannot be halved") };
                (unconditional + ((conditional - unconditional)? * self.scale)?)?
            }
        };
        (x * scalings.c_skip)? + (output * scalings.c_out)?
    }
}
