//! The conditional U-Net of latent diffusion (Rombach et al. 2022, arXiv 2112.10752), diffusers'
//! `UNet2DConditionModel`.
//!
//! Every width, depth and head count comes from [`UNetConfig`]; activations are [b, h, w, c]
//! throughout.

use crate::nn::attention::attention;
use crate::nn::gpu::Recorder;
use crate::nn::layers::{Activation, Conv2d, GroupNorm, LayerNorm, Linear, concat};
use crate::nn::{Forward, embed};
use crate::weights::Weights;
use anyhow::{Context, Result, bail};
use candle_core::{D, DType, Result as TensorResult, Tensor};
use serde::Deserialize;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

/// Transformer2D's own norm, whatever `norm_eps` says.
const TRANSFORMER_NORM_EPS: f64 = 1e-6;
const LAYER_NORM_EPS: f64 = 1e-5;

/// A value for all blocks, or one a block.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum PerBlock<T> {
    One(T),
    Each(Vec<T>),
}

impl<T: Copy> PerBlock<T> {
    fn get(&self, block: usize, key: &str) -> Result<T> {
        match self {
            Self::One(value) => Ok(*value),
            Self::Each(values) => values
                .get(block)
                .copied()
                .with_context(|| format!("`{key}` of the U-Net has no value for block {block}")),
        }
    }
}

/// How many transformer blocks layers have: one number for all, or for each block one, or one for
/// each of its layers.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Depths {
    One(usize),
    Each(Vec<PerBlock<usize>>),
}

impl Depths {
    /// Those of a block's layers.
    fn get(&self, block: usize, key: &str) -> Result<PerBlock<usize>> {
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
    /// width of the guidance's embedding, where the network was distilled with guidance as an input
    pub time_cond_proj_dim: Option<usize>,
    /// none, or `text_time`: pooled text and sinusoids of numbers are embedded beside the timestep
    pub addition_embed_type: Option<String>,
    /// sinusoids of each of those numbers
    pub addition_time_embed_dim: Option<usize>,
    /// pooled text and all sinusoids together
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

/// What the network takes beside the latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beside {
    Nothing,
    /// the mask and the latents of what is not repainted: inpainting models
    Masked,
    /// the latents of the source picture: InstructPix2Pix (Brooks et al. 2022, arXiv 2211.09800)
    Picture,
}

impl UNetConfig {
    /// By its channels. Errors if they are those of no kind of model.
    pub fn beside(&self) -> Result<Beside> {
        Ok(match self.in_channels.checked_sub(self.out_channels) {
            Some(0) => Beside::Nothing,
            Some(more) if more == self.out_channels + 1 => Beside::Masked,
            Some(more) if more == self.out_channels => Beside::Picture,
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
        let config: Self = serde_json::from_value(value.clone()).context(
            "the U-Net's config.json is damaged or uses a value that sdgen does not support",
        )?;
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

    /// Height and width of the latents that the model was trained on.
    pub fn sample_size(&self) -> Result<(usize, usize)> {
        Ok((
            self.sample_size.get(0, "sample_size")?,
            self.sample_size.get(1, "sample_size")?,
        ))
    }

    /// How many numbers the network is told of a picture's sizes, besides pooled text of width
    /// `pooled`; 0 if neither. Errors if its configuration does not add up.
    pub fn added_ids(&self, pooled: usize) -> Result<usize> {
        if self.addition_embed_type.is_none() {
            return Ok(0);
        }
        let (dim, inputs) = self.added_dims()?;
        match inputs.checked_sub(pooled) {
            Some(rest) if rest.is_multiple_of(dim) => Ok(rest / dim),
            _ => bail!(
                "projection_class_embeddings_input_dim {inputs} of the U-Net is not {pooled} of pooled text and a multiple of addition_time_embed_dim {dim}"
            ),
        }
    }

    /// `addition_time_embed_dim` and `projection_class_embeddings_input_dim`.
    fn added_dims(&self) -> Result<(usize, usize)> {
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

    fn width(&self, block: usize) -> Result<usize> {
        self.block_out_channels
            .get(block)
            .copied()
            .context("the U-Net has too few block_out_channels")
    }

    /// What the attention of one block needs; none if the block has none.
    fn attention(
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

/// Errors if any of these keys has another value than the one that changes nothing.
pub fn require_neutral(network: &str, config: &Value, neutral: &[(&str, Value)]) -> Result<()> {
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

/// What the network is told of the pictures of a batch besides their noise.
#[derive(Clone)]
pub struct Conditioning {
    /// prompt embeddings [b, n, d]
    pub context: Tensor,
    /// for networks with [`UNetConfig::added_ids`]
    pub added: Option<Added>,
    /// the scale of guidance, for networks with [`UNetConfig::time_cond_proj_dim`]; others do not
    /// look at it
    pub guidance: Option<f64>,
}

/// SDXL's further conditioning (Podell et al. 2023, arXiv 2307.01952).
#[derive(Clone)]
pub struct Added {
    /// pooled prompt embeddings [b, p]
    pub pooled: Tensor,
    /// sizes and crops, a list for each picture
    pub ids: Vec<Vec<f64>>,
}

impl From<Tensor> for Conditioning {
    fn from(context: Tensor) -> Self {
        Self {
            context,
            added: None,
            guidance: None,
        }
    }
}

impl Conditioning {
    /// What is told first of the `other` pictures or prompts, then of these.
    pub fn after(&self, other: &Self) -> TensorResult<Self> {
        let added = match (&other.added, &self.added) {
            (Some(a), Some(b)) => Some(Added {
                pooled: Tensor::cat(&[&a.pooled, &b.pooled], 0)?,
                ids: [&*a.ids, &b.ids].concat(),
            }),
            _ => None,
        };
        Ok(Self {
            context: Tensor::cat(&[&other.context, &self.context], 0)?,
            added,
            guidance: self.guidance,
        })
    }
}

/// The network.
pub struct UNet {
    conv_in: Conv2d,
    time_embedding: TimeEmbedding,
    add_embedding: Option<AddEmbedding>,
    /// those of all residual blocks
    time_projections: Linear,
    down_blocks: Vec<DownBlock>,
    mid_block: Option<MidBlock>,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    activation: Activation,
    center_input_sample: bool,
}

impl UNet {
    /// Reads the network at `w`.
    pub fn new(w: &Weights, config: &UNetConfig) -> Result<Self> {
        let activation = Activation::named(&config.act_fn, "act_fn")?;
        let blocks = config.block_out_channels.len();
        let time_dim = config.time_embedding_dim.unwrap_or(4 * config.width(0)?);
        let resnet = ResnetConfig {
            groups: config.norm_num_groups,
            eps: config.norm_eps,
            activation,
            projections: RefCell::default(),
        };
        let (conv_in, first) = (config.conv_in_kernel, config.width(0)?);
        let mut skips = vec![first];
        let mut width = first;
        let mut down_blocks = vec![];
        for (i, kind) in config.down_block_types.iter().enumerate() {
            let (out, layers) = (
                config.width(i)?,
                config.layers_per_block.get(i, "layers_per_block")?,
            );
            let attention = config.attention(
                i,
                kind,
                config
                    .transformer_layers_per_block
                    .get(i, "transformer_layers_per_block")?,
            )?;
            let w = w.at(format!("down_blocks.{i}"));
            let downsample = i + 1 < blocks;
            down_blocks.push(DownBlock::new(
                &w,
                width,
                out,
                layers,
                attention,
                &resnet,
                downsample.then_some(config.downsample_padding),
            )?);
            skips.extend(std::iter::repeat_n(out, layers + usize::from(downsample)));
            width = out;
        }
        let mid_block = match config.mid_block_type.as_deref() {
            None => None,
            Some(kind) => {
                let depths = config
                    .transformer_layers_per_block
                    .get(blocks - 1, "transformer_layers_per_block")?;
                Some(MidBlock::new(
                    &w.at("mid_block"),
                    width,
                    config.attention(blocks - 1, kind, depths)?,
                    &resnet,
                )?)
            }
        };
        let mut up_blocks = vec![];
        for (i, kind) in config.up_block_types.iter().enumerate() {
            let level = blocks - 1 - i;
            let (out, layers) = (
                config.width(level)?,
                config.layers_per_block.get(level, "layers_per_block")? + 1,
            );
            let depths = match &config.reverse_transformer_layers_per_block {
                Some(depths) => depths.get(i, "reverse_transformer_layers_per_block")?,
                None => config
                    .transformer_layers_per_block
                    .get(level, "transformer_layers_per_block")?,
            };
            let attention = config.attention(level, kind, depths)?;
            let from = skips
                .len()
                .checked_sub(layers)
                .context("the U-Net's layers_per_block do not mirror")?;
            let mut skip = skips.split_off(from);
            skip.reverse();
            up_blocks.push(UpBlock::new(
                &w.at(format!("up_blocks.{i}")),
                width,
                out,
                &skip,
                attention,
                &resnet,
                i + 1 < blocks,
            )?);
            width = out;
        }
        Ok(Self {
            conv_in: Conv2d::new(&w.at("conv_in"), config.in_channels, first, conv_in)?,
            time_embedding: TimeEmbedding::new(
                &w.at("time_embedding"),
                config,
                time_dim,
                activation,
            )?,
            add_embedding: config
                .addition_embed_type
                .is_some()
                .then(|| AddEmbedding::new(&w.at("add_embedding"), config, time_dim))
                .transpose()?,
            time_projections: Linear::fused(&resnet.projections.into_inner(), time_dim, true)?,
            down_blocks,
            mid_block,
            up_blocks,
            conv_norm_out: GroupNorm::new(
                &w.at("conv_norm_out"),
                config.norm_num_groups,
                first,
                config.norm_eps,
            )?,
            conv_out: Conv2d::new(
                &w.at("conv_out"),
                first,
                config.out_channels,
                config.conv_out_kernel,
            )?,
            activation,
            center_input_sample: config.center_input_sample,
        })
    }

    /// The network, told of b pictures. Errors if it wants to know more of them.
    pub fn told<'a>(
        &'a self,
        cx: Forward<'a>,
        conditioning: &Conditioning,
    ) -> TensorResult<Told<'a>> {
        let added = match (&self.add_embedding, &conditioning.added) {
            (None, _) => None,
            (Some(embedding), Some(added)) => Some(embedding.forward(cx, added)?),
            (Some(_), None) => candle_core::bail!("the U-Net wants pooled text and sizes"),
        };
        let prompts = Prompts {
            embedding: conditioning.context.clone(),
            projected: RefCell::default(),
        };
        Ok(Told {
            unet: self,
            cx,
            prompts,
            added,
            guidance: conditioning.guidance,
            recorder: Recorder::default(),
        })
    }
}

/// A network that was told of the pictures of a batch. What follows from that alone is worked out
/// in the first step.
pub struct Told<'a> {
    unet: &'a UNet,
    cx: Forward<'a>,
    prompts: Prompts,
    /// [b, time_dim]
    added: Option<Tensor>,
    guidance: Option<f64>,
    recorder: Recorder,
}

impl<'a> Told<'a> {
    /// The arguments of its forward passes.
    pub fn cx(&self) -> Forward<'a> {
        self.cx
    }

    /// Type of the latents that it takes.
    pub fn dtype(&self) -> DType {
        self.prompts.embedding.dtype()
    }

    /// Latents [b, h, w, c], one timestep -> prediction [b, h, w, c].
    pub fn forward(&self, latents: &Tensor, timestep: f64) -> TensorResult<Tensor> {
        let time = self.time(latents, timestep)?;
        let run = |[latents, time]: [&Tensor; 2]| self.run(latents, time, None, &mut |_, _| {});
        if self.cx.profile.is_some() {
            // the layers of a recorded step cannot be timed
            run([latents, &time])
        } else {
            self.recorder.call([latents, &time], run)
        }
    }

    /// [`Self::forward`] of the outermost level alone, when `inner` holds what the levels below
    /// gave in an earlier step; else of all, which fills `inner` (DeepCache: Ma et al. 2023, arXiv
    /// 2312.00858).
    pub fn forward_reusing(
        &self,
        latents: &Tensor,
        timestep: f64,
        inner: &mut Option<Tensor>,
    ) -> TensorResult<Tensor> {
        self.run(
            latents,
            &self.time(latents, timestep)?,
            Some(inner),
            &mut |_, _| {},
        )
    }

    /// [`Self::forward`], showing the activations after each block by name: what the parity tests
    /// compare.
    pub fn traced(
        &self,
        latents: &Tensor,
        timestep: f64,
        show: &mut dyn FnMut(&str, &Tensor),
    ) -> TensorResult<Tensor> {
        self.run(latents, &self.time(latents, timestep)?, None, show)
    }

    /// The embedding of a timestep, projected for all residual blocks: [widths], or [b, widths].
    fn time(&self, latents: &Tensor, timestep: f64) -> TensorResult<Tensor> {
        let Self {
            unet,
            cx,
            added,
            guidance,
            ..
        } = self;
        let time = unet
            .time_embedding
            .forward(*cx, timestep, *guidance, latents)?;
        let time = added
            .as_ref()
            .map_or(Ok(time.clone()), |added| added.broadcast_add(&time))?;
        unet.time_projections
            .forward(*cx, &unet.activation.forward(&time)?)
    }

    fn run(
        &self,
        latents: &Tensor,
        time: &Tensor,
        inner: Option<&mut Option<Tensor>>,
        show: &mut dyn FnMut(&str, &Tensor),
    ) -> TensorResult<Tensor> {
        let Self { unet, prompts, .. } = self;
        let cx = self.cx;
        let latents = if unet.center_input_sample {
            ((latents * 2.0)? - 1.0)?
        } else {
            latents.clone()
        };
        let mut x = unet.conv_in.forward(cx, &latents)?;
        show("conv_in", &x);
        let mut skips = vec![x.clone()];
        let (Some((first, lower)), Some((last, upper))) =
            (unet.down_blocks.split_first(), unet.up_blocks.split_last())
        else {
            candle_core::bail!("a U-Net without blocks");
        };
        x = first.layers(cx, &x, time, prompts, &mut skips)?;
        if let Some(Some(inner)) = &inner {
            x = inner.clone();
        } else {
            x = first.downsample(cx, &x, &mut skips)?;
            show("down_blocks.0", &x);
            for (i, block) in lower.iter().enumerate() {
                x = block.downsample(
                    cx,
                    &block.layers(cx, &x, time, prompts, &mut skips)?,
                    &mut skips,
                )?;
                show(&format!("down_blocks.{}", i + 1), &x);
            }
            if let Some(mid_block) = &unet.mid_block {
                x = mid_block.forward(cx, &x, time, prompts)?;
                show("mid_block", &x);
            }
            for (i, block) in upper.iter().enumerate() {
                x = block.forward(cx, &x, time, prompts, &mut skips)?;
                show(&format!("up_blocks.{i}"), &x);
            }
            if let Some(inner) = inner {
                *inner = Some(x.clone());
            }
        }
        x = last.forward(cx, &x, time, prompts, &mut skips)?;
        show(&format!("up_blocks.{}", upper.len()), &x);
        unet.conv_out.forward(
            cx,
            &unet.conv_norm_out.forward_act(cx, &x, unet.activation)?,
        )
    }
}

/// Prompt embeddings, with the keys and values that cross attentions make of them: the same in
/// every step.
struct Prompts {
    /// [b, n, d]
    embedding: Tensor,
    /// by the address of the attention, which is borrowed as long
    projected: RefCell<HashMap<*const Attention, Tensor>>,
}

impl Prompts {
    /// Keys and values [b, n, 2*width] of an attention of this network, if it attends to prompts.
    fn of(&self, cx: Forward, attention: &Attention) -> TensorResult<Option<Tensor>> {
        let Some(layer) = &attention.from_context else {
            return Ok(None);
        };
        if let Some(known) = self.projected.borrow().get(&std::ptr::from_ref(attention)) {
            return Ok(Some(known.clone()));
        }
        let projected = layer.forward(cx, &self.embedding)?;
        self.projected
            .borrow_mut()
            .insert(attention, projected.clone());
        Ok(Some(projected))
    }
}

/// Timestep -> sinusoids, perhaps plus those of guidance (Meng et al. 2023, arXiv 2210.03142) ->
/// two linear layers.
struct TimeEmbedding {
    cond_proj: Option<Linear>,
    linear_1: Linear,
    linear_2: Linear,
    activation: Activation,
    dim: usize,
    flip_sin_to_cos: bool,
    freq_shift: f64,
}

impl TimeEmbedding {
    fn new(
        w: &Weights,
        config: &UNetConfig,
        time_dim: usize,
        activation: Activation,
    ) -> Result<Self> {
        let dim = config.width(0)?;
        let cond_proj = config
            .time_cond_proj_dim
            .map(|guidance_dim| Linear::without_bias(&w.at("cond_proj"), guidance_dim, dim));
        Ok(Self {
            cond_proj: cond_proj.transpose()?,
            linear_1: Linear::new(&w.at("linear_1"), dim, time_dim)?,
            linear_2: Linear::new(&w.at("linear_2"), time_dim, time_dim)?,
            activation,
            dim,
            flip_sin_to_cos: config.flip_sin_to_cos,
            freq_shift: config.freq_shift,
        })
    }

    fn forward(
        &self,
        cx: Forward,
        timestep: f64,
        guidance: Option<f64>,
        like: &Tensor,
    ) -> TensorResult<Tensor> {
        let t = embed::sinusoids(
            &[timestep],
            self.dim,
            self.flip_sin_to_cos,
            self.freq_shift,
            like.device(),
        )?;
        let mut t = t.to_dtype(like.dtype())?;
        if let (Some(cond_proj), Some(guidance)) = (&self.cond_proj, guidance) {
            let w = embed::guidance(guidance, cond_proj.inputs(), like.device())?
                .to_dtype(like.dtype())?;
            t = cond_proj.forward_add(cx, &w, &t)?;
        }
        let h = self.activation.forward(&self.linear_1.forward(cx, &t)?)?;
        self.linear_2.forward(cx, &h)?.squeeze(0) // [time_dim]
    }
}

/// Pooled text and sinusoids of a picture's sizes -> two linear layers.
struct AddEmbedding {
    linear_1: Linear,
    linear_2: Linear,
    dim: usize,
    flip_sin_to_cos: bool,
    freq_shift: f64,
}

impl AddEmbedding {
    fn new(w: &Weights, config: &UNetConfig, time_dim: usize) -> Result<Self> {
        let (dim, inputs) = config.added_dims()?;
        Ok(Self {
            linear_1: Linear::new(&w.at("linear_1"), inputs, time_dim)?,
            linear_2: Linear::new(&w.at("linear_2"), time_dim, time_dim)?,
            dim,
            flip_sin_to_cos: config.flip_sin_to_cos,
            freq_shift: config.freq_shift,
        })
    }

    fn forward(&self, cx: Forward, Added { pooled, ids }: &Added) -> TensorResult<Tensor> {
        let sinusoids = embed::sinusoids(
            &ids.concat(),
            self.dim,
            self.flip_sin_to_cos,
            self.freq_shift,
            pooled.device(),
        )?;
        let sinusoids = sinusoids
            .reshape((ids.len(), ()))?
            .to_dtype(pooled.dtype())?; // [b, ids*dim]
        let h = Activation::Silu.forward(
            &self
                .linear_1
                .forward(cx, &Tensor::cat(&[pooled, &sinusoids], 1)?)?,
        )?;
        self.linear_2.forward(cx, &h) // [b, time_dim]
    }
}

struct DownBlock {
    layers: Vec<(Resnet, Option<Transformer>)>,
    downsample: Option<Conv2d>,
}

impl DownBlock {
    fn new<'a>(
        w: &Weights<'a>,
        inputs: usize,
        outputs: usize,
        layers: usize,
        attention: Option<AttentionConfig>,
        resnet: &ResnetConfig<'a>,
        downsample_padding: Option<usize>,
    ) -> Result<Self> {
        let layer = |i: usize| {
            let inputs = if i == 0 { inputs } else { outputs };
            layer(w, i, inputs, outputs, attention.as_ref(), resnet)
        };
        let downsample = downsample_padding.map(|p| {
            // diffusers pads after the picture only where the configuration says 0
            let padding = if p == 0 { (0, 1) } else { (p, p) };
            Conv2d::strided(
                &w.at("downsamplers.0.conv"),
                outputs,
                outputs,
                3,
                2,
                padding,
            )
        });
        Ok(Self {
            layers: (0..layers).map(layer).collect::<Result<_>>()?,
            downsample: downsample.transpose()?,
        })
    }

    fn layers(
        &self,
        cx: Forward,
        x: &Tensor,
        time: &Tensor,
        prompts: &Prompts,
        skips: &mut Vec<Tensor>,
    ) -> TensorResult<Tensor> {
        let mut x = x.clone();
        for (resnet, transformer) in &self.layers {
            x = resnet.forward(cx, &x, time)?;
            if let Some(transformer) = transformer {
                x = transformer.forward(cx, &x, prompts)?;
            }
            skips.push(x.clone());
        }
        Ok(x)
    }

    /// [b, h, w, c] -> [b, h/2, w/2, c], or what it was given where the block does not scale.
    fn downsample(&self, cx: Forward, x: &Tensor, skips: &mut Vec<Tensor>) -> TensorResult<Tensor> {
        let Some(conv) = &self.downsample else {
            return Ok(x.clone());
        };
        let x = conv.forward(cx, x)?;
        skips.push(x.clone());
        Ok(x)
    }
}

/// One residual block and its transformer, where the block has attention.
fn layer<'a>(
    w: &Weights<'a>,
    i: usize,
    inputs: usize,
    outputs: usize,
    attention: Option<&AttentionConfig>,
    resnet: &ResnetConfig<'a>,
) -> Result<(Resnet, Option<Transformer>)> {
    let transformer = attention
        .map(|a| Transformer::new(&w.at(format!("attentions.{i}")), a, i))
        .transpose()?;
    Ok((
        Resnet::new(&w.at(format!("resnets.{i}")), inputs, outputs, resnet)?,
        transformer,
    ))
}

struct MidBlock {
    first: Resnet,
    /// none in some distilled networks
    attended: Option<(Transformer, Resnet)>,
}

impl MidBlock {
    fn new<'a>(
        w: &Weights<'a>,
        width: usize,
        attention: Option<AttentionConfig>,
        resnet: &ResnetConfig<'a>,
    ) -> Result<Self> {
        let attended = |attention| -> Result<_> {
            Ok((
                Transformer::new(&w.at("attentions.0"), &attention, 0)?,
                Resnet::new(&w.at("resnets.1"), width, width, resnet)?,
            ))
        };
        let first = Resnet::new(&w.at("resnets.0"), width, width, resnet)?;
        Ok(Self {
            first,
            attended: attention.map(attended).transpose()?,
        })
    }

    fn forward(
        &self,
        cx: Forward,
        x: &Tensor,
        time: &Tensor,
        prompts: &Prompts,
    ) -> TensorResult<Tensor> {
        let x = self.first.forward(cx, x, time)?;
        match &self.attended {
            Some((transformer, second)) => {
                second.forward(cx, &transformer.forward(cx, &x, prompts)?, time)
            }
            None => Ok(x),
        }
    }
}

struct UpBlock {
    layers: Vec<(Resnet, Option<Transformer>)>,
    upsample: Option<Conv2d>,
}

impl UpBlock {
    fn new<'a>(
        w: &Weights<'a>,
        inputs: usize,
        outputs: usize,
        skips: &[usize],
        attention: Option<AttentionConfig>,
        resnet: &ResnetConfig<'a>,
        upsample: bool,
    ) -> Result<Self> {
        let layer = |(i, skip): (usize, &usize)| {
            let inputs = if i == 0 { inputs } else { outputs };
            layer(w, i, inputs + skip, outputs, attention.as_ref(), resnet)
        };
        let upsample = upsample
            .then(|| Conv2d::new(&w.at("upsamplers.0.conv"), outputs, outputs, 3))
            .transpose()?;
        Ok(Self {
            layers: skips.iter().enumerate().map(layer).collect::<Result<_>>()?,
            upsample,
        })
    }

    fn forward(
        &self,
        cx: Forward,
        x: &Tensor,
        time: &Tensor,
        prompts: &Prompts,
        skips: &mut Vec<Tensor>,
    ) -> TensorResult<Tensor> {
        let mut x = x.clone();
        for (resnet, transformer) in &self.layers {
            if let Some(skip) = skips.pop() {
                x = concat(cx, &x, &skip)?; // [b, h, w, c + skip]
            }
            x = resnet.forward(cx, &x, time)?;
            if let Some(transformer) = transformer {
                x = transformer.forward(cx, &x, prompts)?;
            }
        }
        let Some(conv) = &self.upsample else {
            return Ok(x);
        };
        let (_, h, w, _) = x.dims4()?;
        // the size of the level above, which need not be twice this one
        let (height, width) = match skips.last() {
            Some(skip) => (skip.dim(1)?, skip.dim(2)?),
            None => (2 * h, 2 * w),
        };
        conv.forward_scaled(cx, &x, height, width)
    }
}

/// What all residual blocks of a network share.
struct ResnetConfig<'a> {
    groups: usize,
    eps: f64,
    activation: Activation,
    /// the projections of the timestep so far, one after the other, and their widths: see
    /// [`UNet::time_projections`]
    projections: RefCell<Vec<(Weights<'a>, usize)>>,
}

/// Residual block (He et al. 2016) with the timestep added between its convolutions.
struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    /// its part of the projections of the timestep
    time: Range<usize>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
    activation: Activation,
}

impl Resnet {
    fn new<'a>(
        w: &Weights<'a>,
        inputs: usize,
        outputs: usize,
        config: &ResnetConfig<'a>,
    ) -> Result<Self> {
        let mut projections = config.projections.borrow_mut();
        let start = projections.iter().map(|(_, width)| width).sum();
        projections.push((w.at("time_emb_proj"), outputs));
        Ok(Self {
            norm1: GroupNorm::new(&w.at("norm1"), config.groups, inputs, config.eps)?,
            conv1: Conv2d::new(&w.at("conv1"), inputs, outputs, 3)?,
            time: start..start + outputs,
            norm2: GroupNorm::new(&w.at("norm2"), config.groups, outputs, config.eps)?,
            conv2: Conv2d::new(&w.at("conv2"), outputs, outputs, 3)?,
            conv_shortcut: (inputs != outputs)
                .then(|| Conv2d::new(&w.at("conv_shortcut"), inputs, outputs, 1))
                .transpose()?,
            activation: config.activation,
        })
    }

    fn forward(&self, cx: Forward, x: &Tensor, time: &Tensor) -> TensorResult<Tensor> {
        let time = time.narrow(D::Minus1, self.time.start, self.time.len())?; // [c] or [b, c]
        let h = self.conv1.forward_add(
            cx,
            &self.norm1.forward_act(cx, x, self.activation)?,
            Some(&time),
            None,
        )?;
        let h = self.norm2.forward_act(cx, &h, self.activation)?;
        let shortcut = self
            .conv_shortcut
            .as_ref()
            .map(|conv| conv.forward(cx, x))
            .transpose()?;
        self.conv2
            .forward_add(cx, &h, None, Some(shortcut.as_ref().unwrap_or(x)))
    }
}

/// What the attention of one block is made of.
struct AttentionConfig {
    width: usize,
    heads: usize,
    /// transformer blocks of each layer
    depths: PerBlock<usize>,
    context: usize,
    groups: usize,
    only_cross: bool,
}

/// Transformer over the pixels of an activation, diffusers' `Transformer2DModel`.
struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<TransformerBlock>,
    proj_out: Linear,
}

impl Transformer {
    /// Reads that of layer `layer`. `use_linear_projection` needs no care: a 1x1 convolution and a
    /// linear layer are the same on [b, h, w, c], and their stored shapes differ by trailing ones.
    fn new(w: &Weights, config: &AttentionConfig, layer: usize) -> Result<Self> {
        let depth = config.depths.get(layer, "transformer_layers_per_block")?;
        let projection = |name: &str| Linear::new(&w.at(name), config.width, config.width);
        Ok(Self {
            norm: GroupNorm::new(
                &w.at("norm"),
                config.groups,
                config.width,
                TRANSFORMER_NORM_EPS,
            )?,
            proj_in: projection("proj_in")?,
            blocks: (0..depth)
                .map(|i| TransformerBlock::new(&w.at(format!("transformer_blocks.{i}")), config))
                .collect::<Result<_>>()?,
            proj_out: projection("proj_out")?,
        })
    }

    fn forward(&self, cx: Forward, x: &Tensor, prompts: &Prompts) -> TensorResult<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let mut tokens = self
            .proj_in
            .forward(cx, &self.norm.forward(cx, x)?.reshape((b, h * w, c))?)?; // [b, h*w, c]
        for block in &self.blocks {
            tokens = block.forward(cx, &tokens, prompts)?;
        }
        self.proj_out
            .forward_add(cx, &tokens, x)?
            .reshape((b, h, w, c))
    }
}

struct TransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff: GegluFeedForward,
}

impl TransformerBlock {
    fn new(w: &Weights, config: &AttentionConfig) -> Result<Self> {
        let width = config.width;
        let norm = |name: &str| LayerNorm::new(&w.at(name), width, LAYER_NORM_EPS);
        Ok(Self {
            norm1: norm("norm1")?,
            attn1: Attention::new(
                &w.at("attn1"),
                width,
                config.only_cross.then_some(config.context),
                config.heads,
            )?,
            norm2: norm("norm2")?,
            attn2: Attention::new(&w.at("attn2"), width, Some(config.context), config.heads)?,
            norm3: norm("norm3")?,
            ff: GegluFeedForward::new(&w.at("ff.net"), width)?,
        })
    }

    fn forward(&self, cx: Forward, x: &Tensor, prompts: &Prompts) -> TensorResult<Tensor> {
        let x = self
            .attn1
            .forward_add(cx, &self.norm1.forward(cx, x)?, prompts, x)?;
        let x = self
            .attn2
            .forward_add(cx, &self.norm2.forward(cx, &x)?, prompts, &x)?;
        self.ff.forward_add(cx, &self.norm3.forward(cx, &x)?, &x)
    }
}

struct Attention {
    /// queries, keys and values of what attends to itself; queries alone of what attends to
    /// something else
    from_x: Linear,
    /// keys and values of that
    from_context: Option<Linear>,
    to_out: Linear,
    heads: usize,
    width: usize,
}

impl Attention {
    /// That of tokens [b, n, width] to themselves, or to something [b, m, context] else.
    fn new(w: &Weights, width: usize, context: Option<usize>, heads: usize) -> Result<Self> {
        let [q, k, v] = ["to_q", "to_k", "to_v"].map(|name| (w.at(name), width));
        let (from_x, from_context) = match context {
            None => (Linear::fused(&[q, k, v], width, false)?, None),
            Some(context) => (
                Linear::without_bias(&q.0, width, width)?,
                Some(Linear::fused(&[k, v], context, false)?),
            ),
        };
        Ok(Self {
            from_x,
            from_context,
            to_out: Linear::new(&w.at("to_out.0"), width, width)?,
            heads,
            width,
        })
    }

    /// x [b, n, width] attends; the result is added to residual [b, n, width].
    fn forward_add(
        &self,
        cx: Forward,
        x: &Tensor,
        prompts: &Prompts,
        residual: &Tensor,
    ) -> TensorResult<Tensor> {
        let part = |x: &Tensor, i: usize| x.narrow(2, i * self.width, self.width);
        let (x, seen) = (self.from_x.forward(cx, x)?, prompts.of(cx, self)?);
        let (k, v) = match &seen {
            Some(seen) => (part(seen, 0)?, part(seen, 1)?),
            None => (part(&x, 1)?, part(&x, 2)?),
        };
        self.to_out.forward_add(
            cx,
            &attention(cx, &part(&x, 0)?, &k, &v, self.heads)?,
            residual,
        )
    }
}

/// Feed-forward layer with a gated linear unit.
struct GegluFeedForward {
    proj: Linear,
    out: Linear,
}

impl GegluFeedForward {
    fn new(w: &Weights, width: usize) -> Result<Self> {
        let inner = 4 * width;
        Ok(Self {
            proj: Linear::geglu(&w.at("0.proj"), width, inner)?,
            out: Linear::new(&w.at("2"), inner, width)?,
        })
    }

    /// x [b, n, width], and residual of the same shape -> their sum, x transformed.
    fn forward_add(&self, cx: Forward, x: &Tensor, residual: &Tensor) -> TensorResult<Tensor> {
        self.out
            .forward_add(cx, &self.proj.forward(cx, x)?, residual) // [b, n, 4*width] between
    }
}
