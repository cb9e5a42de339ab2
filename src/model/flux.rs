//! FLUX.1's transformer (Black Forest Labs 2024), diffusers' `FluxTransformer2DModel`: text and
//! picture first with weights of their own, then as one sequence; timestep, pooled text and, in what
//! was distilled so, the guidance scale shift and scale what enters each layer.

use super::joint::{
    ContinuousNorm, Embedder, FEED_FORWARD, JointBlock, Kind, Modulation, Widths, squares,
};
use super::{Conditioning, ExtraInputs, ModelKind, require_neutral};
use crate::nn::Forward;
use crate::nn::attention::{QkNorm, attention};
use crate::nn::embed::sinusoids;
use crate::nn::layers::{Activation, LayerNorm, Linear, gelu_tanh};
use crate::nn::rotary::{Pairs, Rotary, frequencies};
use crate::nn::stack::Stack;
use crate::nn::weights::Weights;
use crate::weights::config::{parse, require_sizes};
use anyhow::{Result, bail, ensure};
use candle_core::{DType, Device, Result as TensorResult, Tensor};
use serde::Deserialize;
use serde_json::{Value, json};

/// The latents of the pictures of 1024x1024 pixels that it was trained on, in each direction.
const SAMPLE_SIZE: usize = 128;
/// The side of the squares of latents that become a token.
pub const PATCH: usize = 2;
/// Pixels of a mask that belong to a latent.
const MASK_PIXELS: usize = 8 * 8;
/// The sines of a timestep, and of a guidance scale.
const SINES: usize = 256;
const ROPE_THETA: f64 = 10_000.0;
const EPS: f64 = 1e-6;
/// Widths of a token that are held at once.
const ACTIVATIONS: u64 = 28;

/// `transformer/config.json`, with diffusers' defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct FluxConfig {
    pub in_channels: usize,
    /// as many as it takes, but where it is told of a picture
    pub out_channels: Option<usize>,
    pub num_layers: usize,
    pub num_single_layers: usize,
    pub attention_head_dim: usize,
    pub num_attention_heads: usize,
    pub joint_attention_dim: usize,
    pub pooled_projection_dim: usize,
    /// whether the guidance scale is an input: of dev, and not of schnell
    pub guidance_embeds: bool,
    pub axes_dims_rope: Vec<usize>,
    /// whether it was trained to look at a picture (Kontext), of which this file says nothing
    #[serde(skip)]
    pub takes_references: bool,
}

impl Default for FluxConfig {
    fn default() -> Self {
        Self {
            in_channels: 64,
            out_channels: None,
            num_layers: 19,
            num_single_layers: 38,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            pooled_projection_dim: 768,
            guidance_embeds: false,
            axes_dims_rope: vec![16, 56, 56],
            takes_references: false,
        }
    }
}

impl FluxConfig {
    /// Parses config.json. A value that would change the result and is not supported is an error
    /// that names it.
    pub fn from_json(value: &Value) -> Result<Self> {
        let config: Self = parse("transformer", value)?;
        require_neutral("transformer", value, &[("patch_size", json!(1))])?;
        require_sizes(
            "transformer",
            [
                ("in_channels", config.in_channels, 4..=1 << 12),
                ("out_channels", config.out_channels(), 4..=1 << 12),
                ("num_layers", config.num_layers, 1..=256),
                ("num_single_layers", config.num_single_layers, 0..=256),
                ("attention_head_dim", config.attention_head_dim, 2..=1 << 12),
                (
                    "num_attention_heads",
                    config.num_attention_heads,
                    1..=1 << 12,
                ),
                (
                    "joint_attention_dim",
                    config.joint_attention_dim,
                    1..=1 << 20,
                ),
                (
                    "pooled_projection_dim",
                    config.pooled_projection_dim,
                    1..=1 << 20,
                ),
            ],
        )?;
        ensure!(
            config.out_channels().is_multiple_of(PATCH * PATCH),
            "the transformer gives {} channels, which does not fit: expected a multiple of 4",
            config.out_channels()
        );
        config.kind()?;
        ensure!(
            config.axes_dims_rope.len() == 3
                && config.axes_dims_rope.iter().all(|width| width % 2 == 0)
                && config.axes_dims_rope.iter().sum::<usize>() == config.attention_head_dim,
            "`axes_dims_rope` of the transformer is {:?}, which does not fit: expected three even numbers that sum to `attention_head_dim` {}",
            config.axes_dims_rope,
            config.attention_head_dim
        );
        Ok(config)
    }

    /// Height and width of the latents that the model was trained on.
    pub fn sample_size(&self) -> (usize, usize) {
        (SAMPLE_SIZE, SAMPLE_SIZE)
    }

    fn out_channels(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    /// Channels of the latents.
    pub fn latent_channels(&self) -> usize {
        self.out_channels() / (PATCH * PATCH)
    }

    /// The task of the network, by what it takes beside the latents. Errors if no kind of model takes
    /// that.
    pub fn kind(&self) -> Result<ModelKind> {
        let (takes, gives) = (self.in_channels, self.out_channels());
        match takes.checked_sub(gives) {
            Some(0) => Ok(ModelKind::TextToImage),
            Some(more) if more == gives => Ok(ModelKind::Control),
            Some(more) if more == gives + MASK_PIXELS * PATCH * PATCH => Ok(ModelKind::Fill),
            _ => bail!(
                "the transformer takes {takes} channels and gives {gives}: a kind of model that sdgen does not draw\n\nhint: of FLUX.1, dev, schnell, Kontext, Fill, Canny and Depth are drawn"
            ),
        }
    }

    /// Tokens of a prompt, as the model was trained.
    pub fn text_tokens(&self) -> usize {
        if self.guidance_embeds { 512 } else { 256 }
    }

    fn widths(&self) -> Widths {
        Widths {
            heads: self.num_attention_heads,
            head: self.attention_head_dim,
            has_qk_norm: true,
        }
    }

    /// A rough estimate of the memory of the activations of a batch of so many latents each, those of
    /// reference pictures too, in bytes.
    pub fn activation_bytes(&self, batch: usize, latents: usize) -> u64 {
        let tokens = latents.div_ceil(PATCH * PATCH) + self.text_tokens();
        4 * ACTIVATIONS * (batch * tokens * self.widths().all()) as u64
    }

    /// The operations of one run for a picture of so many latents, those of reference pictures too: of
    /// each weight of a block two at every token, and those of attention.
    pub fn operations(&self, latents: f64) -> f64 {
        let tokens = latents / (PATCH * PATCH) as f64 + self.text_tokens() as f64;
        let width = self.widths().all() as f64;
        let weights = (4 + 2 * FEED_FORWARD) as f64 * width * width;
        let block = 2.0 * tokens * weights + 4.0 * tokens * tokens * width;
        (self.num_layers + self.num_single_layers) as f64 * block
            + 2.0 * self.text_tokens() as f64 * width * self.joint_attention_dim as f64
    }
}

/// The network.
pub struct Flux {
    time: Embedder,
    guidance: Option<Embedder>,
    pooled: Embedder,
    x_embedder: Linear,
    context_embedder: Linear,
    transformer_blocks: Stack<JointBlock>,
    single_transformer_blocks: Stack<SingleBlock>,
    norm_out: ContinuousNorm,
    proj_out: Linear,
    config: FluxConfig,
    dtype: DType,
}

impl Flux {
    /// Reads the network at `w`.
    pub fn new(w: &Weights, config: &FluxConfig) -> Result<Self> {
        let widths = config.widths();
        let (width, channels) = (widths.all(), config.in_channels);
        let embeds = w.at("time_text_embed");
        let sines = |name: &str| Embedder::new(&embeds.at(name), SINES, width);
        let guidance = || sines("guidance_embedder");
        let norm_out = Linear::new(&w.at("norm_out.linear"), width, 2 * width)?;
        Ok(Self {
            time: sines("timestep_embedder")?,
            guidance: config.guidance_embeds.then(guidance).transpose()?,
            pooled: Embedder::new(
                &embeds.at("text_embedder"),
                config.pooled_projection_dim,
                width,
            )?,
            x_embedder: Linear::new(&w.at("x_embedder"), channels, width)?,
            context_embedder: Linear::new(
                &w.at("context_embedder"),
                config.joint_attention_dim,
                width,
            )?,
            transformer_blocks: Stack::new(
                &w.at("transformer_blocks"),
                config.num_layers,
                move |w| JointBlock::new(w, widths, Kind::default()),
            )?,
            single_transformer_blocks: Stack::new(
                &w.at("single_transformer_blocks"),
                config.num_single_layers,
                move |w| SingleBlock::new(w, widths),
            )?,
            norm_out: ContinuousNorm::new(LayerNorm::without_weights(w, width, EPS)?, norm_out),
            proj_out: Linear::new(&w.at("proj_out"), width, config.out_channels())?,
            config: config.clone(),
            dtype: w.arithmetic(),
        })
    }

    /// Binds the prompts of a batch, and what else it is told of. Errors if what the network takes beside
    /// them is not given.
    pub fn with_conditioning<'a>(
        &'a self,
        cx: Forward<'a>,
        conditioning: &Conditioning,
        extra: ExtraInputs,
    ) -> TensorResult<ConditionedFlux<'a>> {
        let Some(added) = &conditioning.added_cond else {
            candle_core::bail!("the transformer takes a pooled text")
        };
        let device = added.text_embeds.device();
        let mut told = self
            .pooled
            .forward(cx, &added.text_embeds.to_dtype(self.dtype)?)?; // [b, width]
        if let Some(embedder) = &self.guidance {
            let Some(scale) = conditioning.guidance else {
                candle_core::bail!("the transformer takes the guidance scale")
            };
            let scale = self.embedded(cx, embedder, 1000.0 * scale, device)?;
            told = told.broadcast_add(&scale)?;
        }
        let context = conditioning.context.to_dtype(self.dtype)?;
        let (mut tokens, mut sizes) = (vec![], vec![]);
        for reference in &extra.references {
            let (_, h, w, _) = reference.dims4()?;
            let reference = squares(&reference.to_dtype(self.dtype)?)?;
            tokens.push(self.x_embedder.forward(cx, &reference)?);
            sizes.push((h / PATCH, w / PATCH));
        }
        Ok(ConditionedFlux {
            network: self,
            cx,
            context: self.context_embedder.forward(cx, &context)?,
            told,
            concat: extra.concat.map(|it| it.to_dtype(self.dtype)).transpose()?,
            references: tokens,
            sizes,
        })
    }

    /// The embedding of a number, [1, width].
    fn embedded(
        &self,
        cx: Forward,
        embedder: &Embedder,
        number: f64,
        device: &Device,
    ) -> TensorResult<Tensor> {
        let sines = sinusoids(&[number], SINES, true, 0.0, device)?;
        embedder.forward(cx, &sines.to_dtype(self.dtype)?)
    }

    /// The angles of text tokens, then of those of pictures [h, w]; the first is the drawn one.
    fn rotary(
        &self,
        tokens: usize,
        pictures: impl Iterator<Item = (usize, usize)>,
        device: &Device,
    ) -> TensorResult<Rotary> {
        let text = (0..tokens).map(|_| [0; 3]);
        let of_picture =
            |(nth, (h, w)): (usize, (usize, usize))| (0..h * w).map(move |i| [nth, i / w, i % w]);
        let pictures = pictures.enumerate().flat_map(of_picture);
        let angles = |position: [usize; 3]| {
            let axes = position.into_iter().zip(&self.config.axes_dims_rope);
            axes.flat_map(|(at, width)| frequencies(ROPE_THETA, *width).map(move |f| at as f64 * f))
                .collect()
        };
        let angles: Vec<Vec<f64>> = text.chain(pictures).map(angles).collect();
        Rotary::new(&angles, Pairs::Adjacent, device)
    }
}

/// The network with the prompts of a batch.
pub struct ConditionedFlux<'a> {
    network: &'a Flux,
    cx: Forward<'a>,
    /// [b, n, width]
    context: Tensor,
    /// what is added to the embedding of the timestep, [b, width]
    told: Tensor,
    /// what is concatenated to the channels of the latents, [b, h, w, k]
    concat: Option<Tensor>,
    /// the tokens of each reference picture, [b, h*w, width], and its height and width in tokens
    references: Vec<Tensor>,
    sizes: Vec<(usize, usize)>,
}

impl ConditionedFlux<'_> {
    /// The type that it computes in.
    pub fn dtype(&self) -> DType {
        self.network.dtype
    }

    /// Predicts the velocity: latents [b, h, w, c], timestep 0 to 1000 -> [b, h, w, c].
    pub fn forward(&self, latents: &Tensor, timestep: f64) -> TensorResult<Tensor> {
        let Self {
            network,
            cx,
            context,
            told,
            concat,
            references,
            sizes,
        } = self;
        let (cx, (b, h, w, c)) = (*cx, latents.dims4()?);
        let latents = match concat {
            Some(concat) => &Tensor::cat(&[latents, concat], 3)?,
            None => latents,
        };
        let time = network.embedded(cx, &network.time, timestep, latents.device())?;
        let time = Activation::Silu.forward(&told.broadcast_add(&time)?)?;
        let mut text = context.clone();
        let mut picture = network.x_embedder.forward(cx, &squares(latents)?)?;
        let (tokens, of_picture) = (text.dim(1)?, picture.dim(1)?);
        if !references.is_empty() {
            let all: Vec<&Tensor> = [&picture].into_iter().chain(references).collect();
            picture = Tensor::cat(&all, 1)?;
        }
        let sizes = [(h / PATCH, w / PATCH)]
            .into_iter()
            .chain(sizes.iter().copied());
        let rotary = network.rotary(tokens, sizes, latents.device())?;
        network.transformer_blocks.each(|block| {
            (text, picture) = block.forward(cx, (&text, &picture), &time, Some(&rotary))?;
            Ok(())
        })?;
        // [b, n + h*w/4 + those of the references, width]
        let mut x = Tensor::cat(&[&text, &picture], 1)?;
        network.single_transformer_blocks.each(|block| {
            x = block.forward(cx, &x, &time, &rotary)?;
            Ok(())
        })?;
        let picture = x.narrow(1, tokens, of_picture)?.contiguous()?;
        let picture = network.norm_out.forward(cx, &picture, &time)?;
        network
            .proj_out
            .forward(cx, &picture)?
            .reshape(&[b, h / PATCH, w / PATCH, c, PATCH, PATCH])?
            .permute([0, 1, 4, 2, 5, 3])?
            .reshape((b, h, w, c))
    }
}

/// A block in which text and picture are one sequence, and attention and the rest run side by side.
struct SingleBlock {
    modulation: Linear,
    norm: LayerNorm,
    /// queries, keys, values, and the hidden layer
    qkv_mlp: Linear,
    norms: QkNorm,
    proj_out: Linear,
    width: usize,
}

impl SingleBlock {
    fn new(w: &Weights, widths: Widths) -> Result<Self> {
        let tokens = w.for_tokens();
        let (width, attn) = (widths.all(), tokens.at("attn"));
        let mlp = FEED_FORWARD * width;
        let qkv = ["to_q", "to_k", "to_v"].map(|name| (attn.at(name), width));
        let fused: Vec<_> = qkv
            .into_iter()
            .chain([(tokens.at("proj_mlp"), mlp)])
            .collect();
        Ok(Self {
            modulation: Linear::new(&w.at("norm.linear"), width, 3 * width)?,
            norm: LayerNorm::without_weights(w, width, EPS)?,
            qkv_mlp: Linear::fused(&fused, width, true)?,
            norms: QkNorm::new(
                &attn,
                ["norm_q", "norm_k"],
                (widths.heads, widths.head),
                EPS,
            )?,
            proj_out: Linear::new(&tokens.at("proj_out"), width + mlp, width)?,
            width,
        })
    }

    /// Tokens [b, n, width], and the embedding of the timestep after its nonlinearity, [b, width].
    fn forward(
        &self,
        cx: Forward,
        x: &Tensor,
        time: &Tensor,
        rotary: &Rotary,
    ) -> TensorResult<Tensor> {
        let (heads, width) = (self.norms.heads(), self.width);
        let modulation = Modulation::of(&self.modulation.forward(cx, time)?, 1)?;
        let [modulation] = modulation.as_slice() else {
            candle_core::bail!("a single block has one modulation")
        };
        let entered = modulation.enter(cx, &self.norm, x)?;
        let projected = self.qkv_mlp.forward(cx, &entered)?;
        let [q, k, v] = self.norms.split(cx, &projected.narrow(2, 0, 3 * width)?)?;
        let (q, k) = (rotary.turn(cx, &q, heads)?, rotary.turn(cx, &k, heads)?);
        let attended = attention(cx, &q, &k, &v, heads)?;
        let inner = projected.narrow(2, 3 * width, FEED_FORWARD * width)?;
        let inner = gelu_tanh(cx, &inner.contiguous()?)?;
        let both = Tensor::cat(&[&attended, &inner], 2)?;
        modulation.leave(x, &self.proj_out.forward(cx, &both)?)
    }
}
