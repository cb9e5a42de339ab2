//! The conditional U-Net of latent diffusion (Rombach et al. 2022, arXiv 2112.10752), diffusers'
//! `UNet2DConditionModel`.
//!
//! Every width, depth and head count comes from [`UNetConfig`]; activations are [b, h, w, c]
//! throughout.

use super::backbone::{AddedCond, Conditioning};
use super::unet_config::{AttentionConfig, UNetConfig};
use crate::nn::attention::attention;
use crate::nn::gpu::GraphCapture;
use crate::nn::layers::{Activation, Conv2d, GroupNorm, LayerNorm, Linear, concat};
use crate::nn::weights::Weights;
use crate::nn::{Forward, embed};
use anyhow::{Context, Result};
use candle_core::{D, DType, Result as TensorResult, Tensor};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::sync::OnceLock;

/// Transformer2D's own norm, whatever `norm_eps` says.
const TRANSFORMER_NORM_EPS: f64 = 1e-6;
const LAYER_NORM_EPS: f64 = 1e-5;

/// The weights of the network.
pub struct UNet {
    conv_in: Conv2d,
    time_embedding: TimeEmbedding,
    add_embedding: Option<AddEmbedding>,
    /// the time projections of all residual blocks, fused
    time_projections: Linear,
    down_blocks: Vec<DownBlock>,
    mid_block: Option<MidBlock>,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    activation: Activation,
    center_input_sample: bool,
    cross_attentions: usize,
}

impl UNet {
    /// Reads the network at `w`.
    pub fn new(w: &Weights, config: &UNetConfig) -> Result<Self> {
        let activation = Activation::named(&config.act_fn, "act_fn")?;
        let time_dim = config.time_embedding_dim.unwrap_or(4 * config.width(0)?);
        let shared = Shared {
            groups: config.norm_num_groups,
            eps: config.norm_eps,
            activation,
            time_projections: RefCell::default(),
            cross_attentions: Cell::new(0),
        };
        let first = config.width(0)?;
        let mut skips = vec![first];
        let down_blocks = down_blocks(w, config, &shared, &mut skips)?;
        let mid_block = match config.mid_block_type.as_deref() {
            Some(kind) => Some(MidBlock::read(w, config, &shared, kind)?),
            None => None,
        };
        let up_blocks = up_blocks(w, config, &shared, skips)?;
        Ok(Self {
            conv_in: Conv2d::new(
                &w.at("conv_in"),
                config.in_channels,
                first,
                config.conv_in_kernel,
            )?,
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
            time_projections: Linear::fused(&shared.time_projections.into_inner(), time_dim, true)?,
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
            cross_attentions: shared.cross_attentions.get(),
        })
    }

    /// Binds the conditioning of a batch, and inputs [b, h, w, k] that are concatenated to the
    /// channels of the latents. Errors if the network needs micro-conditioning and none is given.
    pub fn with_conditioning<'a>(
        &'a self,
        cx: Forward<'a>,
        conditioning: &Conditioning,
        concat: Option<Tensor>,
    ) -> TensorResult<ConditionedUNet<'a>> {
        let added_cond = match (&self.add_embedding, &conditioning.added_cond) {
            (None, _) => None,
            (Some(embedding), Some(added_cond)) => Some(embedding.forward(cx, added_cond)?),
            (Some(_), None) => {
                candle_core::bail!("the U-Net needs pooled prompt embeddings and time ids")
            }
        };
        Ok(ConditionedUNet {
            unet: self,
            cx,
            prompts: Prompts {
                context: conditioning.context.clone(),
                keys_values: vec![OnceLock::new(); self.cross_attentions],
            },
            added_cond,
            guidance: conditioning.guidance,
            concat,
            graph: GraphCapture::default(),
        })
    }
}

/// A U-Net bound to the conditioning of a batch. It keeps the keys and values of the prompts after
/// the first step.
pub struct ConditionedUNet<'a> {
    unet: &'a UNet,
    cx: Forward<'a>,
    prompts: Prompts,
    /// [b, time_dim]
    added_cond: Option<Tensor>,
    guidance: Option<f64>,
    /// [b, h, w, k]
    concat: Option<Tensor>,
    graph: GraphCapture,
}

/// The inputs of one step.
#[derive(Clone, Copy)]
pub struct UNetInputs<'a> {
    /// noisy latents [b, h, w, c]
    pub sample: &'a Tensor,
    pub timestep: f64,
    /// Added to the skip connections, in the order in which the down blocks make them: diffusers'
    /// `down_block_additional_residuals`, of a ControlNet. Either none or one for each.
    pub down_residuals: &'a [Tensor],
    /// Added to the output of the mid block: `mid_block_additional_residual`.
    pub mid_residual: Option<&'a Tensor>,
}

impl<'a> UNetInputs<'a> {
    /// Inputs without residuals.
    pub fn new(sample: &'a Tensor, timestep: f64) -> Self {
        Self {
            sample,
            timestep,
            down_residuals: &[],
            mid_residual: None,
        }
    }
}

/// The activations that a pass takes or hands out on its way.
struct Hooks<'a, 'b> {
    /// see [`ConditionedUNet::forward_cached`]
    cache: Option<&'a mut Option<Tensor>>,
    trace: &'a mut (dyn FnMut(&str, &Tensor) + 'b),
}

impl ConditionedUNet<'_> {
    /// The type of the latents that it takes.
    pub fn dtype(&self) -> DType {
        self.prompts.context.dtype()
    }

    /// Predicts noise or velocity [b, h, w, c].
    pub fn forward(&self, inputs: UNetInputs) -> TensorResult<Tensor> {
        let (sample, time) = (self.sample(inputs.sample)?, self.time(&inputs)?);
        let run = |[sample, time]: [&Tensor; 2]| {
            let hooks = Hooks {
                cache: None,
                trace: &mut |_, _| {},
            };
            self.run(UNetInputs { sample, ..inputs }, time, hooks)
        };
        let has_residuals = !inputs.down_residuals.is_empty() || inputs.mid_residual.is_some();
        if has_residuals || self.cx.profile.is_some() {
            // a captured graph reads no other inputs, and its layers cannot be timed
            run([&sample, &time])
        } else {
            self.graph.call([&sample, &time], run)
        }
    }

    /// [`Self::forward`] of the outermost level alone, if `cache` holds the output of the levels
    /// below in an earlier step; else of the whole network, which fills `cache` (DeepCache: Ma et
    /// al. 2023, arXiv 2312.00858).
    pub fn forward_cached(
        &self,
        inputs: UNetInputs,
        cache: &mut Option<Tensor>,
    ) -> TensorResult<Tensor> {
        let (sample, time) = (self.sample(inputs.sample)?, self.time(&inputs)?);
        let hooks = Hooks {
            cache: Some(cache),
            trace: &mut |_, _| {},
        };
        let sample = &sample;
        self.run(UNetInputs { sample, ..inputs }, &time, hooks)
    }

    /// [`Self::forward`], calling `trace` with the name and output of each block: what the parity
    /// tests compare.
    #[cfg(any(feature = "internals", test))]
    pub fn forward_traced(
        &self,
        inputs: UNetInputs,
        trace: &mut dyn FnMut(&str, &Tensor),
    ) -> TensorResult<Tensor> {
        let (sample, time) = (self.sample(inputs.sample)?, self.time(&inputs)?);
        let (sample, hooks) = (&sample, Hooks { cache: None, trace });
        self.run(UNetInputs { sample, ..inputs }, &time, hooks)
    }

    /// Latents with the inputs that are concatenated to their channels.
    fn sample(&self, latents: &Tensor) -> TensorResult<Tensor> {
        match &self.concat {
            Some(more) => concat(self.cx, latents, more),
            None => Ok(latents.clone()),
        }
    }

    /// The embedding of the timestep, projected for all residual blocks: [widths], or [b, widths].
    fn time(&self, inputs: &UNetInputs) -> TensorResult<Tensor> {
        let Self { unet, cx, .. } = self;
        let time =
            unet.time_embedding
                .forward(*cx, inputs.timestep, self.guidance, inputs.sample)?;
        let time = self
            .added_cond
            .as_ref()
            .map_or(Ok(time.clone()), |added| added.broadcast_add(&time))?;
        unet.time_projections
            .forward(*cx, &unet.activation.forward(&time)?)
    }

    fn run(&self, inputs: UNetInputs, time: &Tensor, hooks: Hooks) -> TensorResult<Tensor> {
        let Self {
            unet, cx, prompts, ..
        } = self;
        let (cx, Hooks { cache, trace }) = (*cx, hooks);
        let sample = if unet.center_input_sample {
            ((inputs.sample * 2.0)? - 1.0)?
        } else {
            inputs.sample.clone()
        };
        let (Some((first, lower)), Some((last, upper))) =
            (unet.down_blocks.split_first(), unet.up_blocks.split_last())
        else {
            candle_core::bail!("the U-Net has no blocks");
        };
        let mut x = unet.conv_in.forward(cx, &sample)?;
        trace("conv_in", &x);
        let mut skips = vec![x.clone()];
        x = first.layers(cx, &x, time, prompts, &mut skips)?;
        if let Some(Some(cached)) = &cache {
            x = cached.clone();
            add_residuals(&mut skips, inputs.down_residuals)?;
        } else {
            x = first.downsample(cx, &x, &mut skips)?;
            trace("down_blocks.0", &x);
            for (i, block) in lower.iter().enumerate() {
                x = block.layers(cx, &x, time, prompts, &mut skips)?;
                x = block.downsample(cx, &x, &mut skips)?;
                trace(&format!("down_blocks.{}", i + 1), &x);
            }
            if !matches!(inputs.down_residuals.len(), n if n == 0 || n == skips.len()) {
                candle_core::bail!(
                    "the U-Net has {} skip connections, {} residuals are given",
                    skips.len(),
                    inputs.down_residuals.len()
                );
            }
            add_residuals(&mut skips, inputs.down_residuals)?;
            if let Some(mid_block) = &unet.mid_block {
                x = mid_block.forward(cx, &x, time, prompts)?;
                trace("mid_block", &x);
            }
            if let Some(residual) = inputs.mid_residual {
                x = (x + residual)?;
            }
            for (i, block) in upper.iter().enumerate() {
                x = block.forward(cx, &x, time, prompts, &mut skips)?;
                trace(&format!("up_blocks.{i}"), &x);
            }
            if let Some(cache) = cache {
                *cache = Some(x.clone());
            }
        }
        x = last.forward(cx, &x, time, prompts, &mut skips)?;
        trace(&format!("up_blocks.{}", upper.len()), &x);
        unet.conv_out.forward(
            cx,
            &unet.conv_norm_out.forward_act(cx, &x, unet.activation)?,
        )
    }
}

/// Adds residuals to the skip connections, one to each.
fn add_residuals(skips: &mut [Tensor], residuals: &[Tensor]) -> TensorResult<()> {
    for (skip, residual) in skips.iter_mut().zip(residuals) {
        *skip = (&*skip + residual)?;
    }
    Ok(())
}

/// Prompt embeddings, with their keys and values in all cross-attentions: the same in every step.
struct Prompts {
    /// [b, n, d]
    context: Tensor,
    /// [b, n, 2*width] by [`Cross::index`], computed in the first step
    keys_values: Vec<OnceLock<Tensor>>,
}

impl Prompts {
    /// Keys and values [b, n, 2*width].
    fn keys_values(&self, cx: Forward, cross: &Cross) -> TensorResult<Tensor> {
        let Some(cell) = self.keys_values.get(cross.index) else {
            candle_core::bail!("a cross-attention of another network")
        };
        if let Some(cached) = cell.get() {
            return Ok(cached.clone());
        }
        let projected = cross.to_kv.forward(cx, &self.context)?;
        Ok(cell.get_or_init(|| projected).clone())
    }
}

/// The timestep's sinusoidal embedding, plus that of the guidance scale in distilled networks (Meng
/// et al. 2023, arXiv 2210.03142), through two linear layers.
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

/// Pooled prompt embeddings and embedded time ids through two linear layers.
struct AddEmbedding {
    linear_1: Linear,
    linear_2: Linear,
    dim: usize,
    flip_sin_to_cos: bool,
    freq_shift: f64,
}

impl AddEmbedding {
    fn new(w: &Weights, config: &UNetConfig, time_dim: usize) -> Result<Self> {
        let (dim, inputs) = config.added_cond_dims()?;
        Ok(Self {
            linear_1: Linear::new(&w.at("linear_1"), inputs, time_dim)?,
            linear_2: Linear::new(&w.at("linear_2"), time_dim, time_dim)?,
            dim,
            flip_sin_to_cos: config.flip_sin_to_cos,
            freq_shift: config.freq_shift,
        })
    }

    fn forward(&self, cx: Forward, added_cond: &AddedCond) -> TensorResult<Tensor> {
        let AddedCond {
            text_embeds,
            time_ids,
        } = added_cond;
        let sinusoids = embed::sinusoids(
            &time_ids.concat(),
            self.dim,
            self.flip_sin_to_cos,
            self.freq_shift,
            text_embeds.device(),
        )?;
        let sinusoids = sinusoids
            .reshape((time_ids.len(), ()))?
            .to_dtype(text_embeds.dtype())?; // [b, ids*dim]
        let h = Activation::Silu.forward(
            &self
                .linear_1
                .forward(cx, &Tensor::cat(&[text_embeds, &sinusoids], 1)?)?,
        )?;
        self.linear_2.forward(cx, &h) // [b, time_dim]
    }
}

/// Reads the down blocks, and adds the widths of their skip connections.
fn down_blocks<'a>(
    w: &Weights<'a>,
    config: &UNetConfig,
    shared: &Shared<'a>,
    skips: &mut Vec<usize>,
) -> Result<Vec<DownBlock>> {
    let (levels, mut width) = (config.block_out_channels.len(), config.width(0)?);
    let block = |(i, kind): (usize, &String)| {
        let (out, layers) = (
            config.width(i)?,
            config.layers_per_block.get(i, "layers_per_block")?,
        );
        let depths = config
            .transformer_layers_per_block
            .get(i, "transformer_layers_per_block")?;
        let is_last = i + 1 == levels;
        let block = DownBlock::new(
            &w.at(format!("down_blocks.{i}")),
            width,
            out,
            layers,
            config.attention(i, kind, depths)?,
            shared,
            (!is_last).then_some(config.downsample_padding),
        )?;
        skips.extend(std::iter::repeat_n(out, layers + usize::from(!is_last)));
        width = out;
        Ok(block)
    };
    config
        .down_block_types
        .iter()
        .enumerate()
        .map(block)
        .collect()
}

/// Reads the up blocks, which take the skip connections in reverse.
fn up_blocks<'a>(
    w: &Weights<'a>,
    config: &UNetConfig,
    shared: &Shared<'a>,
    mut skips: Vec<usize>,
) -> Result<Vec<UpBlock>> {
    let levels = config.block_out_channels.len();
    let mut width = config.width(levels - 1)?;
    let block = |(i, kind): (usize, &String)| {
        let level = levels - 1 - i;
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
        let from = skips
            .len()
            .checked_sub(layers)
            .context("the U-Net's layers_per_block do not mirror")?;
        let mut skip = skips.split_off(from);
        skip.reverse();
        let block = UpBlock::new(
            &w.at(format!("up_blocks.{i}")),
            width,
            out,
            &skip,
            config.attention(level, kind, depths)?,
            shared,
            i + 1 < levels,
        )?;
        width = out;
        Ok(block)
    };
    config
        .up_block_types
        .iter()
        .enumerate()
        .map(block)
        .collect()
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
        shared: &Shared<'a>,
        downsample_padding: Option<usize>,
    ) -> Result<Self> {
        let layer = |i: usize| {
            let inputs = if i == 0 { inputs } else { outputs };
            layer(w, i, inputs, outputs, attention.as_ref(), shared)
        };
        let downsample = downsample_padding.map(|p| {
            // diffusers pads below and right only where the configuration says 0
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

    /// [b, h, w, c] -> [b, h/2, w/2, c]; the last block returns its input.
    fn downsample(&self, cx: Forward, x: &Tensor, skips: &mut Vec<Tensor>) -> TensorResult<Tensor> {
        let Some(conv) = &self.downsample else {
            return Ok(x.clone());
        };
        let x = conv.forward(cx, x)?;
        skips.push(x.clone());
        Ok(x)
    }
}

/// Reads one residual block and its transformer, where the block has attention.
fn layer<'a>(
    w: &Weights<'a>,
    i: usize,
    inputs: usize,
    outputs: usize,
    attention: Option<&AttentionConfig>,
    shared: &Shared<'a>,
) -> Result<(Resnet, Option<Transformer>)> {
    let transformer = attention
        .map(|a| Transformer::new(&w.at(format!("attentions.{i}")), a, i, shared))
        .transpose()?;
    Ok((
        Resnet::new(&w.at(format!("resnets.{i}")), inputs, outputs, shared)?,
        transformer,
    ))
}

struct MidBlock {
    first: Resnet,
    /// none in some distilled networks
    second: Option<(Transformer, Resnet)>,
}

impl MidBlock {
    /// Reads the mid block, of the width and depths of the last level.
    fn read<'a>(
        w: &Weights<'a>,
        config: &UNetConfig,
        shared: &Shared<'a>,
        kind: &str,
    ) -> Result<Self> {
        let last = config.block_out_channels.len() - 1;
        let depths = config
            .transformer_layers_per_block
            .get(last, "transformer_layers_per_block")?;
        let attention = config.attention(last, kind, depths)?;
        Self::new(&w.at("mid_block"), config.width(last)?, attention, shared)
    }

    fn new<'a>(
        w: &Weights<'a>,
        width: usize,
        attention: Option<AttentionConfig>,
        shared: &Shared<'a>,
    ) -> Result<Self> {
        let second = |attention| -> Result<_> {
            Ok((
                Transformer::new(&w.at("attentions.0"), &attention, 0, shared)?,
                Resnet::new(&w.at("resnets.1"), width, width, shared)?,
            ))
        };
        let first = Resnet::new(&w.at("resnets.0"), width, width, shared)?;
        Ok(Self {
            first,
            second: attention.map(second).transpose()?,
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
        match &self.second {
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
        shared: &Shared<'a>,
        upsample: bool,
    ) -> Result<Self> {
        let layer = |(i, skip): (usize, &usize)| {
            let inputs = if i == 0 { inputs } else { outputs };
            layer(w, i, inputs + skip, outputs, attention.as_ref(), shared)
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
        // the size of the next level, which need not be twice this one
        let (height, width) = match skips.last() {
            Some(skip) => (skip.dim(1)?, skip.dim(2)?),
            None => (2 * h, 2 * w),
        };
        conv.forward_scaled(cx, &x, height, width)
    }
}

/// What the blocks of a network share while it is built.
struct Shared<'a> {
    groups: usize,
    eps: f64,
    activation: Activation,
    /// the time projections of the residual blocks so far, and their widths: they become
    /// [`UNet::time_projections`]
    time_projections: RefCell<Vec<(Weights<'a>, usize)>>,
    /// the number of cross attentions so far
    cross_attentions: Cell<usize>,
}

/// A residual block (He et al. 2016) with the timestep added between its convolutions.
struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    /// its columns of [`UNet::time_projections`]
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
        config: &Shared<'a>,
    ) -> Result<Self> {
        let mut projections = config.time_projections.borrow_mut();
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

/// A transformer over the pixels of an activation, diffusers' `Transformer2DModel`.
struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<TransformerBlock>,
    proj_out: Linear,
}

impl Transformer {
    /// Reads the transformer of layer `layer`. `use_linear_projection` needs no care: a 1x1 convolution and a
    /// linear layer are the same on [b, h, w, c], and their stored shapes differ by trailing ones.
    fn new(w: &Weights, config: &AttentionConfig, layer: usize, shared: &Shared) -> Result<Self> {
        let w = &w.for_tokens();
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
                .map(|i| {
                    TransformerBlock::new(&w.at(format!("transformer_blocks.{i}")), config, shared)
                })
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
    fn new(w: &Weights, config: &AttentionConfig, shared: &Shared) -> Result<Self> {
        let width = config.width;
        let norm = |name: &str| LayerNorm::new(&w.at(name), width, LAYER_NORM_EPS);
        Ok(Self {
            norm1: norm("norm1")?,
            attn1: Attention::new(
                &w.at("attn1"),
                width,
                config.only_cross.then_some(config.context),
                config.heads,
                shared,
            )?,
            norm2: norm("norm2")?,
            attn2: Attention::new(
                &w.at("attn2"),
                width,
                Some(config.context),
                config.heads,
                shared,
            )?,
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

/// Attention of tokens to themselves or to the prompts.
struct Attention {
    /// queries, keys and values of self-attention; queries alone of cross-attention
    from_x: Linear,
    cross: Option<Cross>,
    to_out: Linear,
    heads: usize,
    width: usize,
}

impl Attention {
    /// Reads the attention of tokens [b, n, width] to themselves, or to prompts [b, m, context].
    fn new(
        w: &Weights,
        width: usize,
        context: Option<usize>,
        heads: usize,
        shared: &Shared,
    ) -> Result<Self> {
        let [q, k, v] = ["to_q", "to_k", "to_v"].map(|name| (w.at(name), width));
        let (from_x, cross) = match context {
            None => (Linear::fused(&[q, k, v], width, false)?, None),
            Some(context) => {
                let index = shared.cross_attentions.get();
                shared.cross_attentions.set(index + 1);
                let cross = Cross {
                    index,
                    to_kv: Linear::fused(&[k, v], context, false)?,
                };
                (Linear::without_bias(&q.0, width, width)?, Some(cross))
            }
        };
        Ok(Self {
            from_x,
            cross,
            to_out: Linear::new(&w.at("to_out.0"), width, width)?,
            heads,
            width,
        })
    }

    /// Attention of x [b, n, width], plus residual [b, n, width].
    fn forward_add(
        &self,
        cx: Forward,
        x: &Tensor,
        prompts: &Prompts,
        residual: &Tensor,
    ) -> TensorResult<Tensor> {
        let part = |x: &Tensor, i: usize| x.narrow(2, i * self.width, self.width);
        let x = self.from_x.forward(cx, x)?;
        let (k, v) = match &self.cross {
            Some(cross) => {
                let kv = prompts.keys_values(cx, cross)?;
                (part(&kv, 0)?, part(&kv, 1)?)
            }
            None => (part(&x, 1)?, part(&x, 2)?),
        };
        self.to_out.forward_add(
            cx,
            &attention(cx, &part(&x, 0)?, &k, &v, self.heads)?,
            residual,
        )
    }
}

/// The keys and values of a cross-attention.
struct Cross {
    /// of all cross-attentions of the network
    index: usize,
    /// context -> keys and values [.., 2*width]
    to_kv: Linear,
}

/// A feed-forward layer with a gated linear unit.
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

    /// x [b, n, width] transformed, plus residual of the same shape.
    fn forward_add(&self, cx: Forward, x: &Tensor, residual: &Tensor) -> TensorResult<Tensor> {
        self.out
            .forward_add(cx, &self.proj.forward(cx, x)?, residual) // [b, n, 4*width] between
    }
}
