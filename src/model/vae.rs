//! The decoder of the latent autoencoder (Rombach et al. 2022), diffusers' `AutoencoderKL`.

use super::TILE_PX;
use super::unet::require_neutral;
use crate::nn::attention::attention;
use crate::nn::layers::{Activation, Conv2d, GroupNorm, Linear};
use crate::nn::strips::Strips;
use crate::weights::Weights;
use anyhow::{Context, Result, bail};
use candle_core::{Result as TensorResult, Tensor};
use serde::Deserialize;
use serde_json::{Value, json};

/// Fixed in diffusers' autoencoder.
const NORM_EPS: f64 = 1e-6;

/// `vae/config.json`, with diffusers' defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct VaeConfig {
    pub out_channels: usize,
    pub latent_channels: usize,
    pub block_out_channels: Vec<usize>,
    pub layers_per_block: usize,
    pub norm_num_groups: usize,
    pub act_fn: String,
    pub scaling_factor: f64,
    pub use_post_quant_conv: bool,
    pub mid_block_add_attention: bool,
    pub up_block_types: Vec<String>,
    /// side of the pictures that it was trained on, or height and width
    pub sample_size: Value,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            out_channels: 3,
            latent_channels: 4,
            block_out_channels: vec![64],
            layers_per_block: 1,
            norm_num_groups: 32,
            act_fn: "silu".into(),
            scaling_factor: 0.18215,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
            up_block_types: vec![],
            // not diffusers' 32, whose tiles of 4 latents nobody means
            sample_size: TILE_PX.into(),
        }
    }
}

impl VaeConfig {
    /// Parses config.json. A value that would change the result and is not supported is an error that names it.
    pub fn from_json(value: &Value) -> Result<Self> {
        require_neutral(
            "VAE",
            value,
            &[("latents_mean", Value::Null), ("latents_std", Value::Null), ("_class_name", json!("AutoencoderKL"))],
        )?;
        let config: Self = serde_json::from_value(value.clone())
            .context("the VAE's config.json is damaged or uses a value that sdgen does not support")?;
        if config.block_out_channels.is_empty() {
            bail!("block_out_channels of the VAE is empty");
        }
        if let Some(other) = config.up_block_types.iter().find(|t| *t != "UpDecoderBlock2D") {
            bail!("the VAE has a block `{other}`, which sdgen does not support");
        }
        if config.out_channels != 3 {
            bail!("out_channels of the VAE is {}, pictures need 3", config.out_channels);
        }
        Ok(config)
    }

    /// Pixels a latent, in each direction.
    pub fn factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    /// Side of the tiles of a tiled decode in pixels, as in diffusers.
    pub fn tile_px(&self) -> usize {
        let side = self.sample_size.get(0).unwrap_or(&self.sample_size);
        side.as_u64().and_then(|side| side.try_into().ok()).unwrap_or(TILE_PX)
    }
}

/// The decoder.
pub struct Decoder {
    post_quant_conv: Option<Conv2d>,
    conv_in: Conv2d,
    mid_resnets: [Resnet; 2],
    mid_attention: Option<Attention>,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    activation: Activation,
    latent_channels: usize,
    scaling_factor: f64,
}

impl Decoder {
    /// Reads the decoder of the VAE at `w`.
    pub fn new(w: &Weights, config: &VaeConfig) -> Result<Self> {
        let (latent, groups) = (config.latent_channels, config.norm_num_groups);
        let post_quant_conv = config.use_post_quant_conv.then(|| Conv2d::new(&w.at("post_quant_conv"), latent, latent, 1)).transpose()?;
        let activation = Activation::named(&config.act_fn, "act_fn")?;
        let w = w.at("decoder");
        let widths: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last) = (widths.first().copied().unwrap_or_default(), widths.last().copied().unwrap_or_default());
        let resnet = |name: &str, inputs, outputs| Resnet::new(&w.at(name), inputs, outputs, groups, activation);
        let mut up_blocks = vec![];
        let mut width = first;
        for (i, out) in widths.iter().copied().enumerate() {
            let layer = |j: usize| resnet(&format!("up_blocks.{i}.resnets.{j}"), if j == 0 { width } else { out }, out);
            let upsample =
                (i + 1 < widths.len()).then(|| Conv2d::new(&w.at(format!("up_blocks.{i}.upsamplers.0.conv")), out, out, 3)).transpose()?;
            up_blocks.push(UpBlock { resnets: (0..=config.layers_per_block).map(layer).collect::<Result<_>>()?, upsample });
            width = out;
        }
        Ok(Self {
            post_quant_conv,
            conv_in: Conv2d::new(&w.at("conv_in"), latent, first, 3)?,
            mid_resnets: [resnet("mid_block.resnets.0", first, first)?, resnet("mid_block.resnets.1", first, first)?],
            mid_attention: config
                .mid_block_add_attention
                .then(|| Attention::new(&w.at("mid_block.attentions.0"), first, groups))
                .transpose()?,
            up_blocks,
            conv_norm_out: GroupNorm::new(&w.at("conv_norm_out"), groups, last, NORM_EPS)?,
            conv_out: Conv2d::new(&w.at("conv_out"), last, 3, 3)?,
            activation,
            latent_channels: latent,
            scaling_factor: config.scaling_factor,
        })
    }

    /// Decodes the latents of the diffusion [b, h, w, c] to RGB [b, factor*h, factor*w, 3], nominally in 0..=1.
    /// Errors if the channel count is not the VAE's.
    pub fn decode(&self, latents: &Tensor) -> TensorResult<Tensor> {
        let rgb = self.forward(&(latents / self.scaling_factor)?)?;
        (rgb / 2.0)? + 0.5
    }

    /// Unscaled latents [b, h, w, c] -> RGB [b, factor*h, factor*w, 3] around -1..=1.
    pub fn forward(&self, z: &Tensor) -> TensorResult<Tensor> {
        let channels = z.dim(3)?;
        if channels != self.latent_channels {
            candle_core::bail!("the VAE decodes {} channels, the latents have {channels}", self.latent_channels);
        }
        let z = match &self.post_quant_conv {
            Some(conv) => conv.forward(z)?,
            None => z.clone(),
        };
        let [first, second] = &self.mid_resnets;
        let mut x = first.forward(self.conv_in.forward(&z)?.try_into()?)?;
        if let Some(attention) = &self.mid_attention {
            x = attention.forward(&x.whole()?)?.try_into()?;
        }
        x = second.forward(x)?;
        for block in &self.up_blocks {
            x = block.forward(x)?;
        }
        let normal = self.conv_norm_out.of(&x.parts())?;
        let mut rgb = Strips::default();
        for window in x.windows() {
            rgb.push(&window?.convolve_normal(&normal, self.activation, &self.conv_out, None)?)?;
        }
        rgb.whole()
    }
}

struct UpBlock {
    resnets: Vec<Resnet>,
    upsample: Option<Conv2d>,
}

impl UpBlock {
    fn forward(&self, mut x: Strips) -> TensorResult<Strips> {
        for resnet in &self.resnets {
            x = resnet.forward(x)?;
        }
        let Some(conv) = &self.upsample else { return Ok(x) };
        let mut y = Strips::default();
        for window in x.windows() {
            y.push(&window?.convolve_doubled(conv)?)?;
        }
        Ok(y)
    }
}

struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
    activation: Activation,
}

impl Resnet {
    fn new(w: &Weights, inputs: usize, outputs: usize, groups: usize, activation: Activation) -> Result<Self> {
        Ok(Self {
            norm1: GroupNorm::new(&w.at("norm1"), groups, inputs, NORM_EPS)?,
            conv1: Conv2d::new(&w.at("conv1"), inputs, outputs, 3)?,
            norm2: GroupNorm::new(&w.at("norm2"), groups, outputs, NORM_EPS)?,
            conv2: Conv2d::new(&w.at("conv2"), outputs, outputs, 3)?,
            conv_shortcut: (inputs != outputs).then(|| Conv2d::new(&w.at("conv_shortcut"), inputs, outputs, 1)).transpose()?,
            activation,
        })
    }

    fn forward(&self, x: Strips) -> TensorResult<Strips> {
        let normal = self.norm1.of(&x.parts())?;
        let (mut h, mut shortcut) = (Strips::default(), Strips::default());
        for window in x.windows() {
            let window = window?;
            h.push(&window.convolve_normal(&normal, self.activation, &self.conv1, None)?)?;
            let strip = self.conv_shortcut.as_ref().map(|conv| conv.forward(&window.strip)).transpose()?;
            shortcut.push(strip.as_ref().unwrap_or(&window.strip))?;
        }
        let normal = self.norm2.of(&h.parts())?;
        let mut y = Strips::default();
        for (window, shortcut) in h.windows().zip(shortcut) {
            y.push(&window?.convolve_normal(&normal, self.activation, &self.conv2, Some(&shortcut))?)?;
        }
        Ok(y)
    }
}

/// One-headed self-attention over all pixels.
struct Attention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Attention {
    fn new(w: &Weights, width: usize, groups: usize) -> Result<Self> {
        let linear = |name: &str| Linear::new(&w.at(name), width, width);
        let group_norm = GroupNorm::new(&w.at("group_norm"), groups, width, NORM_EPS)?;
        Ok(Self { group_norm, to_q: linear("to_q")?, to_k: linear("to_k")?, to_v: linear("to_v")?, to_out: linear("to_out.0")? })
    }

    fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let tokens = self.group_norm.forward(x)?.reshape((b, h * w, c))?;
        let (q, k, v) = (self.to_q.forward(&tokens)?, self.to_k.forward(&tokens)?, self.to_v.forward(&tokens)?);
        self.to_out.forward_add(&attention(&q, &k, &v, 1)?, x)?.reshape((b, h, w, c))
    }
}
