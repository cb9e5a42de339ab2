//! The networks, one file each, read top-down: [`unet`], [`sd3`], [`flux`], [`flux2`] and [`z_image`] denoise latents, [`vae`] encodes
//! images to latents and decodes them, [`taesd`] does so with less work, [`tiles`] lets both do it
//! in parts; [`upscaler`] enlarges images. [`backbone`] is what the pipeline knows of the network
//! that denoises. Here: which of the two autoencoders a checkpoint has.

pub mod backbone;
pub mod flux;
pub mod flux2;
mod joint;
pub mod latent_format;
pub mod sd3;
pub mod taesd;
pub mod tiles;
pub mod unet;
pub mod unet_config;
pub mod upscaler;
pub mod vae;
pub mod z_image;

use crate::nn::Forward;
use crate::nn::weights::Weights;
use anyhow::{Result, bail};
use candle_core::{Result as TensorResult, Tensor};
use serde_json::Value;

pub use backbone::{
    AddedCond, Backbone, BackboneConfig, Conditioning, Denoiser, ExtraInputs, ModelKind,
};
pub use latent_format::LatentFormat;

/// The side of a tile in pixels where a configuration gives none: diffusers' for TAESD, and that of
/// SD1.5's VAE.
const TILE_PX: usize = 512;

/// `vae/config.json` of either class of autoencoder.
#[derive(Debug, Clone)]
pub enum Autoencoder {
    Kl(vae::VaeConfig),
    Tiny(taesd::TaesdConfig),
}

impl Autoencoder {
    /// Parses config.json. A value that would change the result and is not supported is an error
    /// that names it.
    pub fn from_json(value: &Value) -> Result<Self> {
        match value.get("_class_name").and_then(Value::as_str) {
            Some("AutoencoderTiny") => taesd::TaesdConfig::from_json(value).map(Self::Tiny),
            _ => vae::VaeConfig::from_json(value).map(Self::Kl),
        }
    }

    /// Pixels per latent, in each direction.
    pub fn factor(&self) -> usize {
        match self {
            Self::Kl(config) => config.factor(),
            Self::Tiny(config) => config.factor(),
        }
    }

    /// The scale of its latents.
    pub fn latent_format(&self) -> LatentFormat {
        match self {
            Self::Kl(config) => config.latent_format(),
            Self::Tiny(config) => config.latent_format(),
        }
    }

    /// The side of the tiles of a tiled decode, in latents.
    pub fn tile(&self) -> usize {
        let side = match self {
            Self::Kl(config) => config.tile_px(),
            Self::Tiny(_) => TILE_PX,
        };
        (side / self.factor()).max(1)
    }

    /// Estimates the peak memory of decoding latents [h, w] besides the weights, in bytes:
    /// activations in f32, and the image three times, in bands, whole, and on its way to bytes.
    pub fn decode_bytes(&self, h: usize, w: usize, tiled: bool) -> u64 {
        let pixels = |h: usize, w: usize| (h * w * self.factor() * self.factor()) as u64;
        // at full size; the last upsampling keeps the width of the size before
        let widest =
            |channels: &[usize]| channels.iter().take(2).copied().max().unwrap_or(1) as u64;
        let bytes_a_pixel = match self {
            // one activation, and a quarter of the next, as it goes in bands
            Self::Kl(config) => widest(&config.block_out_channels).saturating_mul(5),
            Self::Tiny(config) => widest(&config.decoder_block_out_channels).saturating_mul(5 * 4),
        };
        let side = if tiled { self.tile() } else { h.max(w) };
        bytes_a_pixel
            .saturating_mul(pixels(side.min(h), side.min(w)))
            .saturating_add(3 * 3 * 4 * pixels(h, w))
    }

    /// Reads the encoder of the VAE at `w`.
    pub fn encoder(&self, w: &Weights) -> Result<Encoder> {
        Ok(match self {
            Self::Kl(config) => Encoder::Kl(Box::new(vae::Encoder::new(w, config)?)),
            Self::Tiny(config) => Encoder::Tiny(taesd::Encoder::new(w, config)?),
        })
    }

    /// Reads the decoder of the VAE at `w`.
    pub fn decoder(&self, w: &Weights) -> Result<Decoder> {
        Ok(match self {
            Self::Kl(config) => Decoder::Kl(Box::new(vae::Decoder::new(w, config)?)),
            Self::Tiny(config) => Decoder::Tiny(taesd::Decoder::new(w, config)?),
        })
    }
}

/// The network that encodes images to latents.
pub enum Encoder {
    Kl(Box<vae::Encoder>),
    Tiny(taesd::Encoder),
}

impl Encoder {
    /// Encodes RGB [b, factor*h, factor*w, 3] in 0..=1 to a distribution of the model's latents [b,
    /// h, w, c], if asked to in tiles of this many latents a side.
    pub fn encode(
        &self,
        cx: Forward,
        rgb: &Tensor,
        tile: Option<usize>,
    ) -> TensorResult<Posterior> {
        match self {
            Self::Kl(encoder) => encoder.encode(cx, rgb, tile),
            Self::Tiny(encoder) => encoder.encode(cx, rgb, tile),
        }
    }
}

/// The normal distribution of images' latents, each [b, h, w, c].
#[derive(Debug, Clone)]
pub struct Posterior {
    pub mean: Tensor,
    /// none if the autoencoder is deterministic
    pub std: Option<Tensor>,
}

impl Posterior {
    /// Concatenates the distributions of several images along the batch.
    pub fn cat<'a>(each: impl Iterator<Item = &'a Self>) -> TensorResult<Self> {
        let each: Vec<&Self> = each.collect();
        let means: Vec<&Tensor> = each.iter().map(|one| &one.mean).collect();
        let stds: Vec<&Tensor> = each.iter().filter_map(|one| one.std.as_ref()).collect();
        let std = if stds.is_empty() {
            None
        } else {
            Some(Tensor::cat(&stds, 0)?)
        };
        Ok(Self {
            mean: Tensor::cat(&means, 0)?,
            std,
        })
    }

    /// Draws latents; `noise`, unit normals, is called only if the distribution has a spread.
    pub fn sample(&self, noise: &mut dyn FnMut() -> TensorResult<Tensor>) -> TensorResult<Tensor> {
        match &self.std {
            Some(std) => &self.mean + (std * noise()?)?,
            None => Ok(self.mean.clone()),
        }
    }
}

/// The network that decodes latents to images.
pub enum Decoder {
    Kl(Box<vae::Decoder>),
    Tiny(taesd::Decoder),
}

impl Decoder {
    /// Decodes the model's latents [b, h, w, c] to RGB [b, factor*h, factor*w, 3],
    /// nominally in 0..=1. Errors if the channel count is not the VAE's.
    pub fn decode(&self, cx: Forward, latents: &Tensor) -> TensorResult<Tensor> {
        match self {
            Self::Kl(decoder) => decoder.decode(cx, latents),
            Self::Tiny(decoder) => decoder.decode(cx, latents),
        }
    }
}

/// Errors if one of these keys has another value than its neutral one.
fn require_neutral(network: &str, config: &Value, neutral: &[(&str, Value)]) -> Result<()> {
    for (key, expected) in neutral {
        let found = config.get(key).unwrap_or(expected);
        let same_number =
            matches!((found.as_f64(), expected.as_f64()), (Some(a), Some(b)) if a == b);
        if found != expected && !found.is_null() && !same_number {
            bail!("`{key}` of the {network} is {found}, which sdgen does not support");
        }
    }
    Ok(())
}
