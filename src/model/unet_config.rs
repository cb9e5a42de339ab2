//! `unet/config.json`: every width, depth and head count of a [`super::unet::UNet`].

use super::{ModelKind, require_neutral};
use crate::weights::config::{parse, require_booleans, require_size, require_sizes};
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

/// Activations of the widest of the outer levels that are held at once, measured.
const ACTIVATIONS: u64 = 12;

/// The most layers of a block, and the most transformer blocks of a layer.
const MAX_DEPTH: usize = 256;

/// The most channels, of latents and of layers, and the longest side of latents.
const MAX_CHANNELS: usize = 1024;
const MAX_WIDTH: usize = 1 << 16;
const MAX_SIDE: usize = 1 << 12;

/// A value for all blocks, or one a block.
#[derive(Debug, Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "expected one value, or a list with one for each block"
)]
pub enum PerBlock<T> {
    One(T),
    Each(Vec<T>),
}

impl<T: Copy> PerBlock<T> {
    pub(super) fn get(&self, block: usize, key: &str) -> Result<T> {
        match self {
            Self::One(value) => Ok(*value),
            Self::Each(values) => values
                .get(block)
                .copied()
                .with_context(|| format!("`{key}` of the U-Net has no value for block {block}")),
        }
    }
}

impl PerBlock<usize> {
    fn largest(&self) -> usize {
        match self {
            Self::One(value) => *value,
            Self::Each(values) => values.iter().copied().max().unwrap_or(0),
        }
    }
}

/// The number of transformer blocks of layers: one for all, or for each block either one or a list
/// with one for each of its layers.
#[derive(Debug, Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a number, or a list with a number or a list of numbers for each block"
)]
pub enum Depths {
    One(usize),
    Each(Vec<PerBlock<usize>>),
}

impl Depths {
    /// The numbers of the layers of `block`.
    pub(super) fn get(&self, block: usize, key: &str) -> Result<PerBlock<usize>> {
        match self {
            Self::One(depth) => Ok(PerBlock::One(*depth)),
            Self::Each(depths) => depths
                .get(block)
                .cloned()
                .with_context(|| format!("`{key}` of the U-Net has no value for block {block}")),
        }
    }
}

/// `unet/config.json`, with diffusers' defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct UNetConfig {
    pub sample_size: PerBlock<usize>,
    pub in_channels: usize,
    pub out_channels: usize,
    pub center_input_sample: bool,
    pub flip_sin_to_cos: bool,
    pub freq_shift: f64,
    pub down_block_types: Vec<String>,
    pub mid_block_type: Option<String>,
    pub up_block_types: Vec<String>,
    pub only_cross_attention: PerBlock<bool>,
    pub block_out_channels: Vec<usize>,
    pub layers_per_block: PerBlock<usize>,
    pub downsample_padding: usize,
    pub act_fn: String,
    pub norm_num_groups: usize,
    pub norm_eps: f64,
    pub cross_attention_dim: PerBlock<usize>,
    pub transformer_layers_per_block: Depths,
    /// of the up blocks, where they do not mirror the down blocks
    pub reverse_transformer_layers_per_block: Option<Depths>,
    /// the number of heads, in spite of its name (diffusers' issue 2011)
    pub attention_head_dim: PerBlock<usize>,
    pub time_embedding_dim: Option<usize>,
    /// width of the embedding of the guidance scale, where the network was distilled with it as an
    /// input
    pub time_cond_proj_dim: Option<usize>,
    /// none, or `text_time`: pooled prompt embeddings and time ids are added to the timestep's
    pub addition_embed_type: Option<String>,
    /// width of the sinusoidal embedding of a time id
    pub addition_time_embed_dim: Option<usize>,
    /// width of pooled prompt embeddings and embedded time ids together
    pub projection_class_embeddings_input_dim: Option<usize>,
    pub conv_in_kernel: usize,
    pub conv_out_kernel: usize,
}

impl Default for UNetConfig {
    fn default() -> Self {
        let with = |name: &str, at: &[usize]| {
            (0..4)
                .map(|i| {
                    if at.contains(&i) {
                        name.into()
                    } else {
                        format!("CrossAttn{name}")
                    }
                })
                .collect()
        };
        Self {
            sample_size: PerBlock::One(64),
            in_channels: 4,
            out_channels: 4,
            center_input_sample: false,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            down_block_types: with("DownBlock2D", &[3]),
            mid_block_type: Some("UNetMidBlock2DCrossAttn".into()),
            up_block_types: with("UpBlock2D", &[0]),
            only_cross_attention: PerBlock::One(false),
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: PerBlock::One(2),
            downsample_padding: 1,
            act_fn: "silu".into(),
            norm_num_groups: 32,
            norm_eps: 1e-5,
            cross_attention_dim: PerBlock::One(1280),
            transformer_layers_per_block: Depths::One(1),
            reverse_transformer_layers_per_block: None,
            attention_head_dim: PerBlock::One(8),
            time_embedding_dim: None,
            time_cond_proj_dim: None,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            projection_class_embeddings_input_dim: None,
            conv_in_kernel: 3,
            conv_out_kernel: 3,
        }
    }
}

impl UNetConfig {
    /// The task of the network, by its number of input channels. Errors if no kind of
    /// model has that many.
    pub fn kind(&self) -> Result<ModelKind> {
        Ok(match self.in_channels.checked_sub(self.out_channels) {
            Some(0) => ModelKind::TextToImage,
            Some(more) if more == self.out_channels + 1 => ModelKind::Inpaint,
            Some(more) if more == self.out_channels => ModelKind::InstructPix2Pix,
            _ => bail!(
                "the U-Net takes {} channels and gives {}: a kind of model that sdgen does not draw",
                self.in_channels,
                self.out_channels
            ),
        })
    }

    /// Parses config.json. A value that would change the result and is not supported is an error
    /// that names it.
    pub fn from_json(value: &Value) -> Result<Self> {
        let neutral = [
            ("_class_name", json!("UNet2DConditionModel")),
            ("num_attention_heads", Value::Null),
            ("encoder_hid_dim", Value::Null),
            ("encoder_hid_dim_type", Value::Null),
            ("dual_cross_attention", json!(false)),
            ("class_embed_type", Value::Null),
            ("num_class_embeds", Value::Null),
            ("resnet_time_scale_shift", json!("default")),
            ("resnet_skip_time_act", json!(false)),
            ("resnet_out_scale_factor", json!(1.0)),
            ("mid_block_scale_factor", json!(1.0)),
            ("time_embedding_type", json!("positional")),
            ("time_embedding_act_fn", Value::Null),
            ("timestep_post_act", Value::Null),
            ("attention_type", json!("default")),
            ("class_embeddings_concat", json!(false)),
            ("cross_attention_norm", Value::Null),
        ];
        require_neutral("U-Net", value, &neutral)?;
        // both are read in either way, as their weights are
        require_booleans(
            "U-Net",
            value,
            &["use_linear_projection", "upcast_attention"],
        )?;
        let config: Self = parse("U-Net", value)?;
        config.check_sizes()?;
        if let Some(other) = config
            .addition_embed_type
            .as_deref()
            .filter(|kind| *kind != "text_time")
        {
            bail!("`addition_embed_type` of the U-Net is `{other}`, which sdgen does not support");
        }
        let blocks = config.block_out_channels.len();
        if blocks == 0
            || config.down_block_types.len() != blocks
            || config.up_block_types.len() != blocks
        {
            bail!(
                "block_out_channels, down_block_types and up_block_types of the U-Net differ in length"
            );
        }
        for width in &config.block_out_channels {
            if config.norm_num_groups == 0 || width % config.norm_num_groups != 0 {
                bail!(
                    "norm_num_groups {} of the U-Net does not divide its width {width}",
                    config.norm_num_groups
                );
            }
        }
        Ok(config)
    }

    /// Errors if a size is beyond those of any U-Net.
    fn check_sizes(&self) -> Result<()> {
        let require = |key, size, range| require_size("U-Net", key, size, range);
        let depths = |depths: &Depths| match depths {
            Depths::One(depth) => *depth,
            Depths::Each(each) => each.iter().map(PerBlock::largest).max().unwrap_or(0),
        };
        require("block_out_channels", self.block_out_channels.len(), 1..=10)
            .context("the number of blocks does not fit")?;
        for width in &self.block_out_channels {
            require("block_out_channels", *width, 1..=MAX_WIDTH)?;
        }
        let padding = self.downsample_padding;
        let (h, w) = self.sample_size()?;
        require_sizes(
            "U-Net",
            [
                ("in_channels", self.in_channels, 1..=MAX_CHANNELS),
                ("out_channels", self.out_channels, 1..=MAX_CHANNELS),
                ("sample_size", h, 1..=MAX_SIDE),
                ("sample_size", w, 1..=MAX_SIDE),
                ("downsample_padding", padding, 0..=1),
                (
                    "layers_per_block",
                    self.layers_per_block.largest(),
                    0..=MAX_DEPTH,
                ),
                (
                    "transformer_layers_per_block",
                    depths(&self.transformer_layers_per_block),
                    0..=MAX_DEPTH,
                ),
                (
                    "reverse_transformer_layers_per_block",
                    self.reverse_transformer_layers_per_block
                        .as_ref()
                        .map_or(0, depths),
                    0..=MAX_DEPTH,
                ),
                (
                    "cross_attention_dim",
                    self.cross_attention_dim.largest(),
                    1..=MAX_WIDTH,
                ),
                (
                    "time_embedding_dim",
                    self.time_embedding_dim.unwrap_or(1),
                    1..=MAX_WIDTH,
                ),
                (
                    "time_cond_proj_dim",
                    self.time_cond_proj_dim.unwrap_or(1),
                    1..=MAX_WIDTH,
                ),
                (
                    "addition_time_embed_dim",
                    self.addition_time_embed_dim.unwrap_or(1),
                    0..=MAX_WIDTH,
                ),
                (
                    "projection_class_embeddings_input_dim",
                    self.projection_class_embeddings_input_dim.unwrap_or(1),
                    // pooled prompt embeddings beside those of six time ids
                    0..=7 * MAX_WIDTH,
                ),
                ("conv_in_kernel", self.conv_in_kernel, 1..=15),
                ("conv_out_kernel", self.conv_out_kernel, 1..=15),
            ],
        )?;
        ensure!(
            self.conv_in_kernel % 2 == 1 && self.conv_out_kernel % 2 == 1,
            "`conv_in_kernel` and `conv_out_kernel` of the U-Net are {} and {}, which does not \
             fit: expected odd numbers",
            self.conv_in_kernel,
            self.conv_out_kernel
        );
        Ok(())
    }

    /// Height and width of the latents that the model was trained on.
    pub fn sample_size(&self) -> Result<(usize, usize)> {
        Ok((
            self.sample_size.get(0, "sample_size")?,
            self.sample_size.get(1, "sample_size")?,
        ))
    }

    /// The number of time ids (sizes and crops) that the network takes with pooled prompt
    /// embeddings of width `pooled`, if there are any; 0 if it takes neither. Errors if its widths do
    /// not add up.
    pub fn time_ids(&self, pooled: Option<usize>) -> Result<usize> {
        if self.addition_embed_type.is_none() {
            return Ok(0);
        }
        let pooled = pooled.context(
            "the U-Net is one of Stable Diffusion XL, but its second text encoder is missing\n\nhint: the parts of the model do not belong together; fetch it again",
        )?;
        let (dim, inputs) = self.added_cond_dims()?;
        match inputs.checked_sub(pooled) {
            Some(rest) if rest.is_multiple_of(dim) => Ok(rest / dim),
            _ => bail!(
                "projection_class_embeddings_input_dim {inputs} of the U-Net is not {pooled} of pooled prompt embeddings and a multiple of addition_time_embed_dim {dim}"
            ),
        }
    }

    /// `addition_time_embed_dim` and `projection_class_embeddings_input_dim`.
    pub(super) fn added_cond_dims(&self) -> Result<(usize, usize)> {
        let dim = self
            .addition_time_embed_dim
            .filter(|dim| *dim > 0)
            .context("the U-Net has no `addition_time_embed_dim`")?;
        let inputs = self.projection_class_embeddings_input_dim;
        Ok((
            dim,
            inputs.context("the U-Net has no `projection_class_embeddings_input_dim`")?,
        ))
    }

    fn heads(&self, block: usize) -> Result<usize> {
        let (heads, width) = (
            self.attention_head_dim.get(block, "attention_head_dim")?,
            self.width(block)?,
        );
        if heads == 0 || width % heads != 0 {
            bail!("attention_head_dim {heads} of the U-Net does not divide its width {width}");
        }
        Ok(heads)
    }

    /// A rough estimate of the memory of the activations of `batch` latents [h, w], in bytes.
    pub fn activation_bytes(&self, batch: usize, h: usize, w: usize) -> u64 {
        let widest = self.block_out_channels.iter().take(2).copied().max();
        4 * ACTIVATIONS * (batch * h * w * widest.unwrap_or(1)) as u64
    }

    pub(super) fn width(&self, block: usize) -> Result<usize> {
        self.block_out_channels
            .get(block)
            .copied()
            .context("the U-Net has too few block_out_channels")
    }

    /// The attention of a block; none if the block has none.
    pub(super) fn attention(
        &self,
        block: usize,
        kind: &str,
        depths: PerBlock<usize>,
    ) -> Result<Option<AttentionConfig>> {
        match kind {
            "DownBlock2D" | "UpBlock2D" | "UNetMidBlock2D" => Ok(None),
            "CrossAttnDownBlock2D" | "CrossAttnUpBlock2D" | "UNetMidBlock2DCrossAttn" => {
                Ok(Some(AttentionConfig {
                    width: self.width(block)?,
                    heads: self.heads(block)?,
                    depths,
                    context: self.cross_attention_dim.get(block, "cross_attention_dim")?,
                    groups: self.norm_num_groups,
                    only_cross: kind != "UNetMidBlock2DCrossAttn"
                        && self
                            .only_cross_attention
                            .get(block, "only_cross_attention")?,
                }))
            }
            other => bail!("the U-Net has a block `{other}`, which sdgen does not support"),
        }
    }
}

/// The sizes of the transformers of one block.
pub(super) struct AttentionConfig {
    pub width: usize,
    pub heads: usize,
    /// transformer blocks of each layer
    pub depths: PerBlock<usize>,
    pub context: usize,
    pub groups: usize,
    pub only_cross: bool,
}
