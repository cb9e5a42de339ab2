//! The scale of latents.

use candle_core::{Result, Tensor};

/// The relation of the latents that a model denoises to those of its VAE, whose mean and spread are
/// others: diffusers' `scaling_factor` and `shift_factor`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentFormat {
    pub channels: usize,
    pub scaling_factor: f64,
    pub shift_factor: f64,
}

impl LatentFormat {
    /// Errors if it leaves nothing of latents.
    pub fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.scaling_factor.is_normal() && self.shift_factor.is_finite(),
            "`scaling_factor` and `shift_factor` of the VAE are {} and {}, which does not fit: \
             expected numbers, the first not 0",
            self.scaling_factor,
            self.shift_factor
        );
        Ok(())
    }

    /// Latents of the VAE -> latents of the model: (x - shift) * scale.
    pub fn process_in(&self, x: &Tensor) -> Result<Tensor> {
        if self.shift_factor == 0.0 {
            return x * self.scaling_factor;
        }
        (x - self.shift_factor)? * self.scaling_factor
    }

    /// Latents of the model -> latents of the VAE: x / scale + shift.
    pub fn process_out(&self, x: &Tensor) -> Result<Tensor> {
        let x = (x / self.scaling_factor)?;
        if self.shift_factor == 0.0 {
            return Ok(x);
        }
        x + self.shift_factor
    }
}
