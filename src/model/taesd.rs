//! TAESD, a tiny distilled autoencoder (Bohan 2023, github.com/madebyollin/taesd), diffusers'
//! `AutoencoderTiny`.
//!
//! Three convolutions a block, no norm and no attention; its images are in 0..=1 by training.

use super::{LatentFormat, Posterior, require_neutral, tiles};
use crate::nn::Forward;
use crate::nn::layers::{Activation, Conv2d};
use crate::nn::weights::Weights;
use crate::weights::config::{parse, require_size};
use anyhow::{Context, Result, bail};
use candle_core::{Result as TensorResult, Tensor};
use serde::Deserialize;
use serde_json::{Value, json};

/// Latents are clamped to -3..=3, softly.
const LATENT_MAGNITUDE: f64 = 3.0;
/// The most sizes from latents to image; a configuration with more is a mistake.
const MAX_STAGES: usize = 8;

/// `vae/config.json`, with diffusers' defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct TaesdConfig {
    pub out_channels: usize,
    pub latent_channels: usize,
    pub encoder_block_out_channels: Vec<usize>,
    pub decoder_block_out_channels: Vec<usize>,
    pub num_encoder_blocks: Vec<usize>,
    pub num_decoder_blocks: Vec<usize>,
    pub act_fn: String,
    pub scaling_factor: f64,
    pub shift_factor: Option<f64>,
}

impl Default for TaesdConfig {
    fn default() -> Self {
        Self {
            out_channels: 3,
            latent_channels: 4,
            encoder_block_out_channels: vec![64; 4],
            decoder_block_out_channels: vec![64; 4],
            num_encoder_blocks: vec![1, 3, 3, 3],
            num_decoder_blocks: vec![3, 3, 3, 1],
            act_fn: "relu".into(),
            scaling_factor: 1.0,
            shift_factor: None,
        }
    }
}

impl TaesdConfig {
    /// Parses config.json. A value that would change the result and is not supported is an error
    /// that names it.
    pub fn from_json(value: &Value) -> Result<Self> {
        require_neutral(
            "VAE",
            value,
            &[
                ("upsample_fn", json!("nearest")),
                ("upsampling_scaling_factor", json!(2)),
            ],
        )?;
        let config: Self = parse("VAE", value)?;
        require_size("VAE", "latent_channels", config.latent_channels, 1..=1024)?;
        let blocks = config
            .num_encoder_blocks
            .iter()
            .chain(&config.num_decoder_blocks);
        for blocks in blocks {
            require_size("VAE", "num_decoder_blocks", *blocks, 0..=256)?;
        }
        config.latent_format().check()?;
        for (side, widths, blocks) in [
            (
                "encoder",
                &config.encoder_block_out_channels,
                &config.num_encoder_blocks,
            ),
            (
                "decoder",
                &config.decoder_block_out_channels,
                &config.num_decoder_blocks,
            ),
        ] {
            let fit =
                widths.len() == blocks.len() && widths.windows(2).all(|pair| pair[0] == pair[1]);
            if !fit || !(1..=MAX_STAGES).contains(&widths.len()) {
                bail!(
                    "{side}_block_out_channels of the VAE are {widths:?}, which sdgen does not support"
                );
            }
        }
        if config.out_channels != 3 {
            bail!(
                "out_channels of the VAE is {}, images need 3",
                config.out_channels
            );
        }
        Ok(config)
    }

    /// The scale of its latents.
    pub fn latent_format(&self) -> LatentFormat {
        LatentFormat {
            channels: self.latent_channels,
            scaling_factor: self.scaling_factor,
            shift_factor: self.shift_factor.unwrap_or(0.0),
        }
    }

    /// Pixels per latent, in each direction.
    pub fn factor(&self) -> usize {
        1 << (self.num_decoder_blocks.len() - 1)
    }
}

/// The encoder.
pub struct Encoder {
    /// the convolution to each size, and the blocks there
    stages: Vec<(Conv2d, Vec<Block>)>,
    conv_out: Conv2d,
    latent_format: LatentFormat,
}

impl Encoder {
    /// Reads the encoder of the VAE at `w`, whose layers are numbered consecutively.
    pub fn new(w: &Weights, config: &TaesdConfig) -> Result<Self> {
        let activation = Activation::named(&config.act_fn, "act_fn")?;
        let width = config
            .encoder_block_out_channels
            .first()
            .copied()
            .context("the VAE has no blocks")?;
        let at = |layer: usize| w.at(format!("encoder.layers.{layer}"));
        let (mut stages, mut layer) = (vec![], 0);
        for blocks in &config.num_encoder_blocks {
            let conv = match layer {
                0 => Conv2d::new(&at(0), 3, width, 3)?,
                _ => Conv2d::without_bias(&at(layer), width, width, 3, 2)?,
            };
            let next = layer + 1 + blocks;
            stages.push((
                conv,
                (layer + 1..next)
                    .map(|layer| Block::new(&at(layer), width, activation))
                    .collect::<Result<_>>()?,
            ));
            layer = next;
        }
        let conv_out = Conv2d::new(&at(layer), width, config.latent_channels, 3)?;
        Ok(Self {
            stages,
            conv_out,
            latent_format: config.latent_format(),
        })
    }

    /// Encodes RGB [b, factor*h, factor*w, 3] in 0..=1 to the model's latents [b, h, w, c], if asked
    /// to in tiles of this many latents a side.
    pub fn encode(
        &self,
        cx: Forward,
        rgb: &Tensor,
        tile: Option<usize>,
    ) -> TensorResult<Posterior> {
        let latents = match tile {
            Some(side) => tiles::apply(
                cx,
                rgb,
                side << self.stages.len().saturating_sub(1),
                |cx, tile| self.forward(cx, tile),
            )?,
            None => self.forward(cx, rgb)?,
        };
        Ok(Posterior {
            mean: self.latent_format.process_in(&latents)?,
            std: None,
        })
    }

    fn forward(&self, cx: Forward, rgb: &Tensor) -> TensorResult<Tensor> {
        let mut x = rgb.clone();
        for (conv, blocks) in &self.stages {
            x = conv.forward(cx, &x)?;
            for block in blocks {
                x = block.forward(cx, &x)?;
            }
        }
        self.conv_out.forward(cx, &x)
    }
}

/// The decoder.
pub struct Decoder {
    conv_in: Conv2d,
    /// the blocks of one size, and the convolution to the next
    stages: Vec<(Vec<Block>, Conv2d)>,
    activation: Activation,
    latent_format: LatentFormat,
}

impl Decoder {
    /// Reads the decoder of the VAE at `w`, whose layers are numbered consecutively, including
    /// those without weights.
    pub fn new(w: &Weights, config: &TaesdConfig) -> Result<Self> {
        let activation = Activation::named(&config.act_fn, "act_fn")?;
        let width = config
            .decoder_block_out_channels
            .first()
            .copied()
            .context("the VAE has no blocks")?;
        let at = |layer: usize| w.at(format!("decoder.layers.{layer}"));
        let (mut stages, mut layer) = (vec![], 2);
        for (i, blocks) in config.num_decoder_blocks.iter().enumerate() {
            let each = (layer..layer + blocks)
                .map(|layer| Block::new(&at(layer), width, activation))
                .collect::<Result<_>>()?;
            let is_last = i + 1 == config.num_decoder_blocks.len();
            layer += blocks + usize::from(!is_last);
            stages.push((
                each,
                match is_last {
                    true => Conv2d::new(&at(layer), width, config.out_channels, 3)?,
                    false => Conv2d::without_bias(&at(layer), width, width, 3, 1)?,
                },
            ));
            layer += 1;
        }
        Ok(Self {
            conv_in: Conv2d::new(&at(0), config.latent_channels, width, 3)?,
            stages,
            activation,
            latent_format: config.latent_format(),
        })
    }

    /// Decodes the model's latents [b, h, w, c] to RGB [b, factor*h, factor*w, 3],
    /// nominally in 0..=1. Errors if the channel count is not the VAE's.
    pub fn decode(&self, cx: Forward, latents: &Tensor) -> TensorResult<Tensor> {
        let channels = latents.dim(3)?;
        if channels != self.latent_format.channels {
            candle_core::bail!(
                "the VAE decodes {} channels, the latents have {channels}",
                self.latent_format.channels
            );
        }
        let z = self.latent_format.process_out(latents)?;
        let z = ((z / LATENT_MAGNITUDE)?.tanh()? * LATENT_MAGNITUDE)?;
        let mut x = self.activation.forward(&self.conv_in.forward(cx, &z)?)?;
        for (i, (blocks, conv)) in self.stages.iter().enumerate() {
            for block in blocks {
                x = block.forward(cx, &x)?;
            }
            let (_, h, w, _) = x.dims4()?;
            x = if i + 1 < self.stages.len() {
                conv.forward_scaled(cx, &x, 2 * h, 2 * w)?
            } else {
                conv.forward(cx, &x)?
            };
        }
        Ok(x)
    }
}

struct Block {
    convs: [Conv2d; 3],
    activation: Activation,
}

impl Block {
    fn new(w: &Weights, width: usize, activation: Activation) -> Result<Self> {
        let conv = |i: usize| Conv2d::new(&w.at(format!("conv.{i}")), width, width, 3);
        Ok(Self {
            convs: [conv(0)?, conv(2)?, conv(4)?],
            activation,
        })
    }

    fn forward(&self, cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
        let [first, second, third] = &self.convs;
        let h = self.activation.forward(&first.forward(cx, x)?)?;
        let h = self.activation.forward(&second.forward(cx, &h)?)?;
        third.forward_add(cx, &h, None, Some(x))?.relu()
    }
}
