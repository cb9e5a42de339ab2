//! The families of models, as data: how each is recognised and what it draws by default.

use crate::weights::Checkpoint;
use anyhow::{Result, bail};
use serde_json::Value;

/// A family of checkpoints that share their way of conditioning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Stable Diffusion 1.x: OpenAI's CLIP-L, noise prediction
    Sd1,
    /// Stable Diffusion 2.x: OpenCLIP-H's penultimate layer, often v-prediction
    Sd2,
}

/// What the plain command uses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Defaults {
    pub steps: usize,
    pub guidance: f64,
}

/// As in the papers' and the model cards' examples.
const STABLE_DIFFUSION: Defaults = Defaults { steps: 50, guidance: 7.5 };

/// (short name, hub id)
pub const SHORT_NAMES: [(&str, &str); 3] = [
    ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ("sd21", "stabilityai/stable-diffusion-2-1"),
    ("turbo", "stabilityai/sd-turbo"),
];

impl Family {
    /// Recognises the family by the checkpoint's own configuration. Errors name families that are not drawn yet.
    pub fn detect(checkpoint: &Checkpoint) -> Result<Self> {
        let unet = checkpoint.config("unet")?;
        if unet.get("addition_embed_type").is_some_and(|v| v == "text_time") || checkpoint.has("text_encoder_2") {
            bail!("`{}` is an SDXL model, which sdgen does not draw yet\n\nhint: Stable Diffusion 1.x and 2.x work", checkpoint.name);
        }
        if let Some(channels) = unet.get("in_channels").and_then(Value::as_u64) {
            let latent = checkpoint.config("vae")?.get("latent_channels").and_then(Value::as_u64).unwrap_or(4);
            if channels != latent {
                bail!(
                    "the U-Net of `{}` takes {channels} channels, its VAE has {latent}: an inpainting, upscaling or editing model, which sdgen does not draw yet",
                    checkpoint.name
                );
            }
        }
        let exact_gelu = checkpoint.config("text_encoder")?.get("hidden_act").is_some_and(|a| a == "gelu");
        Ok(if exact_gelu { Self::Sd2 } else { Self::Sd1 })
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sd1 => "Stable Diffusion 1.x",
            Self::Sd2 => "Stable Diffusion 2.x",
        }
    }

    /// Steps and guidance of the family, or the checkpoint's own (the embedded model brings some).
    pub fn defaults(self, checkpoint: &Checkpoint) -> Defaults {
        let own = checkpoint.configs.get("defaults");
        let number = |key: &str| own.and_then(|d| d.get(key)?.as_f64());
        Defaults {
            steps: number("steps").map_or(STABLE_DIFFUSION.steps, |s| s as usize),
            guidance: number("guidance").unwrap_or(STABLE_DIFFUSION.guidance),
        }
    }
}
