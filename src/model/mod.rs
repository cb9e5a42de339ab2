//! The networks, one file each, read top-down: [`unet`] predicts noise in latents, [`vae`] turns latents into pictures,
//! [`taesd`] does so with less work. Here: which of the two a checkpoint has.

pub mod taesd;
pub mod unet;
pub mod vae;

use crate::weights::Weights;
use anyhow::Result;
use candle_core::{Result as TensorResult, Tensor};
use serde_json::Value;

/// `vae/config.json`, by the class that it names.
#[derive(Debug, Clone)]
pub enum Autoencoder {
    Kl(vae::VaeConfig),
    Tiny(taesd::TaesdConfig),
}

impl Autoencoder {
    /// Parses config.json. A value that would change the result and is not supported is an error that names it.
    pub fn from_json(value: &Value) -> Result<Self> {
        match value.get("_class_name").and_then(Value::as_str) {
            Some("AutoencoderTiny") => taesd::TaesdConfig::from_json(value).map(Self::Tiny),
            _ => vae::VaeConfig::from_json(value).map(Self::Kl),
        }
    }

    /// Pixels a latent, in each direction.
    pub fn factor(&self) -> usize {
        match self {
            Self::Kl(config) => config.factor(),
            Self::Tiny(config) => config.factor(),
        }
    }

    /// Channels of the activations, the largest picture first.
    pub fn widths(&self) -> &[usize] {
        match self {
            Self::Kl(config) => &config.block_out_channels,
            Self::Tiny(config) => &config.decoder_block_out_channels,
        }
    }

    /// Reads the decoder of the VAE at `w`.
    pub fn decoder(&self, w: &Weights) -> Result<Decoder> {
        Ok(match self {
            Self::Kl(config) => Decoder::Kl(Box::new(vae::Decoder::new(w, config)?)),
            Self::Tiny(config) => Decoder::Tiny(taesd::Decoder::new(w, config)?),
        })
    }
}

/// What turns latents into pictures.
pub enum Decoder {
    Kl(Box<vae::Decoder>),
    Tiny(taesd::Decoder),
}

impl Decoder {
    /// Decodes the latents of the diffusion [b, h, w, c] to RGB [b, factor*h, factor*w, 3], nominally in 0..=1.
    /// Errors if the channel count is not the VAE's.
    pub fn decode(&self, latents: &Tensor) -> TensorResult<Tensor> {
        match self {
            Self::Kl(decoder) => decoder.decode(latents),
            Self::Tiny(decoder) => decoder.decode(latents),
        }
    }
}
