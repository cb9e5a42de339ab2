//! The latent autoencoder (Rombach et al. 2022), diffusers' `AutoencoderKL`.

use super::{LatentFormat, Posterior, TILE_PX, require_neutral, tiles};
use crate::nn::Forward;
use crate::nn::attention::attention;
use crate::nn::bands::RowBands;
use crate::nn::layers::{Activation, Conv2d, GroupNorm, Linear};
use crate::nn::weights::Weights;
use crate::weights::config::{number, parse, require_booleans, require_size, require_sizes};
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
    pub shift_factor: Option<f64>,
    pub use_quant_conv: bool,
    pub use_post_quant_conv: bool,
    pub mid_block_add_attention: bool,
    pub down_block_types: Vec<String>,
    pub up_block_types: Vec<String>,
    /// side of the images that it was trained on, or height and width
    pub sample_size: Value,
    /// of FLUX.2's (`AutoencoderKLFlux2`), whose model sees each 2x2 latents as one, normalised by
    /// the statistics of a training's: what is added to their variance
    #[serde(skip)]
    pub packed_eps: Option<f64>,
}

/// The class of FLUX.2's.
const FLUX2: &str = "AutoencoderKLFlux2";
/// `batch_norm_eps` of a configuration without one.
const BATCH_NORM_EPS: f64 = 1e-4;

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
            shift_factor: None,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
            down_block_types: vec![],
            up_block_types: vec![],
            // diffusers' default is 32, whose tiles of 4 latents are of no use
            sample_size: TILE_PX.into(),
            packed_eps: None,
        }
    }
}

impl VaeConfig {
    /// Parses config.json. A value that would change the result and is not supported is an error
    /// that names it.
    pub fn from_json(value: &Value) -> Result<Self> {
        let is_packed = value.get("_class_name").is_some_and(|class| class == FLUX2);
        let class = if is_packed { FLUX2 } else { "AutoencoderKL" };
        require_neutral(
            "VAE",
            value,
            &[
                ("latents_mean", Value::Null),
                ("latents_std", Value::Null),
                ("_class_name", json!(class)),
                ("decoder_block_out_channels", Value::Null),
                ("patch_size", json!([2, 2])),
            ],
        )?;
        require_booleans("VAE", value, &["force_upcast"])?;
        let mut config: Self = parse("VAE", value)?;
        if is_packed {
            let eps = number("VAE", value, "batch_norm_eps")?;
            config.packed_eps = Some(eps.unwrap_or(BATCH_NORM_EPS));
            config.scaling_factor = 1.0;
        }
        if config.block_out_channels.is_empty() {
            bail!("block_out_channels of the VAE is empty");
        }
        require_size(
            "VAE",
            "block_out_channels",
            config.block_out_channels.len(),
            1..=10,
        )
        .context("the number of blocks does not fit")?;
        require_sizes(
            "VAE",
            [
                ("latent_channels", config.latent_channels, 1..=1024),
                ("layers_per_block", config.layers_per_block, 0..=256),
            ],
        )?;
        for width in &config.block_out_channels {
            require_size("VAE", "block_out_channels", *width, 1..=1 << 24)?;
        }
        config.latent_format().check()?;
        for (types, known) in [
            (&config.down_block_types, "DownEncoderBlock2D"),
            (&config.up_block_types, "UpDecoderBlock2D"),
        ] {
            if let Some(other) = types.iter().find(|t| *t != known) {
                bail!("the VAE has a block `{other}`, which sdgen does not support");
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
        let of_each = if self.packed_eps.is_some() { 4 } else { 1 };
        LatentFormat {
            channels: of_each * self.latent_channels,
            scaling_factor: self.scaling_factor,
            shift_factor: self.shift_factor.unwrap_or(0.0),
        }
    }

    /// Pixels per latent, in each direction.
    pub fn factor(&self) -> usize {
        let packed = usize::from(self.packed_eps.is_some());
        1 << (self.block_out_channels.len() - 1 + packed)
    }

    /// The side of the tiles of a tiled decode in pixels, as in diffusers.
    pub fn tile_px(&self) -> usize {
        let side = self.sample_size.get(0).unwrap_or(&self.sample_size);
        side.as_u64()
            .and_then(|side| side.try_into().ok())
            .unwrap_or(TILE_PX)
    }
}

/// The encoder.
pub struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    quant_conv: Option<Conv2d>,
    activation: Activation,
    latent_format: LatentFormat,
    packing: Option<Packing>,
    factor: usize,
}

impl Encoder {
    /// Reads the encoder of the VAE at `w`.
    pub fn new(w: &Weights, config: &VaeConfig) -> Result<Self> {
        let (moments, groups) = (2 * config.latent_channels, config.norm_num_groups);
        let quant_conv = config
            .use_quant_conv
            .then(|| Conv2d::new(&w.at("quant_conv"), moments, moments, 1))
            .transpose()?;
        let activation = Activation::named(&config.act_fn, "act_fn")?;
        let packing = Packing::of(w, config)?;
        let w = w.at("encoder");
        let widths = &config.block_out_channels;
        let (first, last) = (
            widths.first().copied().unwrap_or_default(),
            widths.last().copied().unwrap_or_default(),
        );
        let (mut down_blocks, mut width) = (vec![], first);
        for (i, out) in widths.iter().copied().enumerate() {
            let w = w.at(format!("down_blocks.{i}"));
            let layer = |j: usize| {
                Resnet::new(
                    &w.at(format!("resnets.{j}")),
                    if j == 0 { width } else { out },
                    out,
                    groups,
                    activation,
                )
            };
            let halve = || Conv2d::strided(&w.at("downsamplers.0.conv"), out, out, 3, 2, (0, 1));
            let downsample = (i + 1 < widths.len()).then(halve).transpose()?;
            down_blocks.push(DownBlock {
                resnets: (0..config.layers_per_block)
                    .map(layer)
                    .collect::<Result<_>>()?,
                downsample,
            });
            width = out;
        }
        Ok(Self {
            conv_in: Conv2d::new(&w.at("conv_in"), 3, first, 3)?,
            down_blocks,
            mid_block: MidBlock::new(&w.at("mid_block"), config, activation)?,
            conv_norm_out: GroupNorm::new(&w.at("conv_norm_out"), groups, last, NORM_EPS)?,
            conv_out: Conv2d::new(&w.at("conv_out"), last, moments, 3)?,
            quant_conv,
            activation,
            latent_format: config.latent_format(),
            packing,
            factor: config.factor(),
        })
    }

    /// Encodes RGB [b, factor*h, factor*w, 3] in 0..=1 to a distribution of the model's latents [b,
    /// h, w, c], if asked to in tiles of this many latents a side.
    pub fn encode(
        &self,
        cx: Forward,
        rgb: &Tensor,
        tile: Option<usize>,
    ) -> TensorResult<Posterior> {
        let rgb = ((rgb * 2.0)? - 1.0)?;
        let moments = match tile {
            Some(side) => tiles::apply(cx, &rgb, side * self.factor, |cx, tile| {
                self.moments(cx, tile)
            })?,
            None => self.moments(cx, &rgb)?,
        };
        let c = moments.dim(3)? / 2;
        let (mean, logvar) = (
            moments.narrow(3, 0, c)?.contiguous()?,
            moments.narrow(3, c, c)?.clamp(-30.0, 20.0)?,
        );
        if let Some(packing) = &self.packing {
            // diffusers' pipelines take the mode
            let mean = packing.process_in(&mean)?;
            return Ok(Posterior { mean, std: None });
        }
        let std = (logvar * 0.5)?.exp()?;
        Ok(Posterior {
            mean: self.latent_format.process_in(&mean)?,
            std: Some((std * self.latent_format.scaling_factor)?),
        })
    }

    /// RGB [b, factor*h, factor*w, 3] in -1..=1 -> mean and log variance of the VAE's latents [b, h,
    /// w, 2c].
    fn moments(&self, cx: Forward, rgb: &Tensor) -> TensorResult<Tensor> {
        let mut x = RowBands::split(cx, &self.conv_in.forward(cx, rgb)?)?;
        for block in &self.down_blocks {
            x = block.forward(cx, x)?;
        }
        x = self.mid_block.forward(cx, x)?;
        let norm = self.conv_norm_out.bind(cx, &x.parts())?;
        let mut moments = RowBands::default();
        for band in x.with_halos(cx)? {
            moments.push(
                cx,
                &band?.norm_conv(cx, &norm, self.activation, &self.conv_out, None)?,
            )?;
        }
        let moments = moments.join()?;
        match &self.quant_conv {
            Some(conv) => conv.forward(cx, &moments),
            None => Ok(moments),
        }
    }
}

/// The decoder.
pub struct Decoder {
    post_quant_conv: Option<Conv2d>,
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    activation: Activation,
    latent_format: LatentFormat,
    packing: Option<Packing>,
    channels: usize,
}

impl Decoder {
    /// Reads the decoder of the VAE at `w`.
    pub fn new(w: &Weights, config: &VaeConfig) -> Result<Self> {
        let (latent, groups) = (config.latent_channels, config.norm_num_groups);
        let post_quant_conv = config
            .use_post_quant_conv
            .then(|| Conv2d::new(&w.at("post_quant_conv"), latent, latent, 1))
            .transpose()?;
        let activation = Activation::named(&config.act_fn, "act_fn")?;
        let packing = Packing::of(w, config)?;
        let w = w.at("decoder");
        let widths: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last) = (
            widths.first().copied().unwrap_or_default(),
            widths.last().copied().unwrap_or_default(),
        );
        let mut up_blocks = vec![];
        let mut width = first;
        for (i, out) in widths.iter().copied().enumerate() {
            let w = w.at(format!("up_blocks.{i}"));
            let layer = |j: usize| {
                Resnet::new(
                    &w.at(format!("resnets.{j}")),
                    if j == 0 { width } else { out },
                    out,
                    groups,
                    activation,
                )
            };
            let double = || Conv2d::new(&w.at("upsamplers.0.conv"), out, out, 3);
            let upsample = (i + 1 < widths.len()).then(double).transpose()?;
            up_blocks.push(UpBlock {
                resnets: (0..=config.layers_per_block)
                    .map(layer)
                    .collect::<Result<_>>()?,
                upsample,
            });
            width = out;
        }
        Ok(Self {
            post_quant_conv,
            conv_in: Conv2d::new(&w.at("conv_in"), latent, first, 3)?,
            mid_block: MidBlock::new(&w.at("mid_block"), config, activation)?,
            up_blocks,
            conv_norm_out: GroupNorm::new(&w.at("conv_norm_out"), groups, last, NORM_EPS)?,
            conv_out: Conv2d::new(&w.at("conv_out"), last, 3, 3)?,
            activation,
            latent_format: config.latent_format(),
            packing,
            channels: latent,
        })
    }

    /// Decodes the model's latents [b, h, w, c] to RGB [b, factor*h, factor*w, 3],
    /// nominally in 0..=1. Errors if the channel count is not the VAE's.
    pub fn decode(&self, cx: Forward, latents: &Tensor) -> TensorResult<Tensor> {
        let latents = match &self.packing {
            Some(packing) => packing.process_out(latents)?,
            None => self.latent_format.process_out(latents)?,
        };
        let rgb = self.forward(cx, &latents)?;
        (rgb / 2.0)? + 0.5
    }

    /// The VAE's latents [b, h, w, c] -> RGB [b, factor*h, factor*w, 3] around -1..=1.
    pub fn forward(&self, cx: Forward, z: &Tensor) -> TensorResult<Tensor> {
        let channels = z.dim(3)?;
        if channels != self.channels {
            candle_core::bail!(
                "the VAE decodes {} channels, the latents have {channels}",
                self.channels
            );
        }
        let z = match &self.post_quant_conv {
            Some(conv) => conv.forward(cx, z)?,
            None => z.clone(),
        };
        let mut x = self
            .mid_block
            .forward(cx, RowBands::split(cx, &self.conv_in.forward(cx, &z)?)?)?;
        for block in &self.up_blocks {
            x = block.forward(cx, x)?;
        }
        let norm = self.conv_norm_out.bind(cx, &x.parts())?;
        let mut rgb = RowBands::default();
        for band in x.with_halos(cx)? {
            rgb.push(
                cx,
                &band?.norm_conv(cx, &norm, self.activation, &self.conv_out, None)?,
            )?;
        }
        rgb.join()
    }
}

/// How FLUX.2's model sees latents: each 2x2 of them as one of four times the channels, with the mean
/// and the spread of a training's latents taken out of it.
struct Packing {
    /// [4c]
    mean: Tensor,
    std: Tensor,
}

impl Packing {
    fn of(w: &Weights, config: &VaeConfig) -> Result<Option<Self>> {
        let Some(eps) = config.packed_eps else {
            return Ok(None);
        };
        let channels = [4 * config.latent_channels];
        let w = w.at("bn");
        Ok(Some(Self {
            mean: w.get("running_mean", &channels)?,
            std: (w.get("running_var", &channels)? + eps)?.sqrt()?,
        }))
    }

    /// Latents of the VAE [b, 2h, 2w, c] -> latents of the model [b, h, w, 4c].
    fn process_in(&self, x: &Tensor) -> TensorResult<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let x = x
            .reshape(&[b, h / 2, 2, w / 2, 2, c])?
            .permute([0, 1, 3, 5, 2, 4])?
            .reshape((b, h / 2, w / 2, 4 * c))?;
        x.broadcast_sub(&self.mean)?.broadcast_div(&self.std)
    }

    /// Latents of the model [b, h, w, 4c] -> latents of the VAE [b, 2h, 2w, c].
    fn process_out(&self, x: &Tensor) -> TensorResult<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let x = x.broadcast_mul(&self.std)?.broadcast_add(&self.mean)?;
        x.reshape(&[b, h, w, c / 4, 2, 2])?
            .permute([0, 1, 4, 2, 5, 3])?
            .reshape((b, 2 * h, 2 * w, c / 4))
    }
}

struct DownBlock {
    resnets: Vec<Resnet>,
    downsample: Option<Conv2d>,
}

impl DownBlock {
    fn forward(&self, cx: Forward, mut x: RowBands) -> TensorResult<RowBands> {
        for resnet in &self.resnets {
            x = resnet.forward(cx, x)?;
        }
        let Some(conv) = &self.downsample else {
            return Ok(x);
        };
        let mut y = RowBands::default();
        for band in x.with_halos(cx)? {
            y.push(cx, &band?.downsample(cx, conv)?)?;
        }
        // bands of half the height are cut anew
        RowBands::split(cx, &y.join()?)
    }
}

/// The blocks of the deepest level, whose width is the last one.
struct MidBlock {
    resnets: [Resnet; 2],
    attention: Option<Attention>,
}

impl MidBlock {
    fn new(w: &Weights, config: &VaeConfig, activation: Activation) -> Result<Self> {
        let (width, groups) = (
            config
                .block_out_channels
                .last()
                .copied()
                .unwrap_or_default(),
            config.norm_num_groups,
        );
        let resnet = |name: &str| Resnet::new(&w.at(name), width, width, groups, activation);
        let attention = || Attention::new(&w.at("attentions.0"), width, groups);
        Ok(Self {
            resnets: [resnet("resnets.0")?, resnet("resnets.1")?],
            attention: config.mid_block_add_attention.then(attention).transpose()?,
        })
    }

    fn forward(&self, cx: Forward, x: RowBands) -> TensorResult<RowBands> {
        let [first, second] = &self.resnets;
        let mut x = first.forward(cx, x)?;
        if let Some(attention) = &self.attention {
            x = RowBands::split(cx, &attention.forward(cx, &x.join()?)?)?;
        }
        second.forward(cx, x)
    }
}

struct UpBlock {
    resnets: Vec<Resnet>,
    upsample: Option<Conv2d>,
}

impl UpBlock {
    fn forward(&self, cx: Forward, mut x: RowBands) -> TensorResult<RowBands> {
        for resnet in &self.resnets {
            x = resnet.forward(cx, x)?;
        }
        let Some(conv) = &self.upsample else {
            return Ok(x);
        };
        let mut y = RowBands::default();
        for band in x.with_halos(cx)? {
            y.push(cx, &band?.upsample(cx, conv)?)?;
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
    fn new(
        w: &Weights,
        inputs: usize,
        outputs: usize,
        groups: usize,
        activation: Activation,
    ) -> Result<Self> {
        Ok(Self {
            norm1: GroupNorm::new(&w.at("norm1"), groups, inputs, NORM_EPS)?,
            conv1: Conv2d::new(&w.at("conv1"), inputs, outputs, 3)?,
            norm2: GroupNorm::new(&w.at("norm2"), groups, outputs, NORM_EPS)?,
            conv2: Conv2d::new(&w.at("conv2"), outputs, outputs, 3)?,
            conv_shortcut: (inputs != outputs)
                .then(|| Conv2d::new(&w.at("conv_shortcut"), inputs, outputs, 1))
                .transpose()?,
            activation,
        })
    }

    fn forward(&self, cx: Forward, x: RowBands) -> TensorResult<RowBands> {
        let norm = self.norm1.bind(cx, &x.parts())?;
        let (mut h, mut shortcut) = (RowBands::default(), RowBands::default());
        for band in x.with_halos(cx)? {
            let band = band?;
            h.push(
                cx,
                &band.norm_conv(cx, &norm, self.activation, &self.conv1, None)?,
            )?;
            let projected = self
                .conv_shortcut
                .as_ref()
                .map(|conv| conv.forward(cx, &band.band))
                .transpose()?;
            shortcut.push(cx, projected.as_ref().unwrap_or(&band.band))?;
        }
        let norm = self.norm2.bind(cx, &h.parts())?;
        let mut y = RowBands::default();
        for (band, shortcut) in h.with_halos(cx)?.zip(shortcut) {
            y.push(
                cx,
                &band?.norm_conv(cx, &norm, self.activation, &self.conv2, Some(&shortcut))?,
            )?;
        }
        Ok(y)
    }
}

/// One-headed self-attention over all pixels.
struct Attention {
    group_norm: GroupNorm,
    /// queries, keys and values
    to_qkv: Linear,
    to_out: Linear,
}

impl Attention {
    fn new(w: &Weights, width: usize, groups: usize) -> Result<Self> {
        Ok(Self {
            group_norm: GroupNorm::new(&w.at("group_norm"), groups, width, NORM_EPS)?,
            to_qkv: Linear::fused(
                &["to_q", "to_k", "to_v"].map(|name| (w.at(name), width)),
                width,
                true,
            )?,
            to_out: Linear::new(&w.at("to_out.0"), width, width)?,
        })
    }

    fn forward(&self, cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let tokens = self.group_norm.forward(cx, x)?.reshape((b, h * w, c))?;
        let qkv = self.to_qkv.forward(cx, &tokens)?;
        let part = |i: usize| qkv.narrow(2, i * c, c);
        self.to_out
            .forward_add(cx, &attention(cx, &part(0)?, &part(1)?, &part(2)?, 1)?, x)?
            .reshape((b, h, w, c))
    }
}
