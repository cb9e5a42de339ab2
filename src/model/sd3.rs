//! Stable Diffusion 3's transformer (Esser et al. 2024, arXiv 2403.03206), diffusers'
//! `SD3Transformer2DModel`: text and picture with weights of their own in all blocks; in Stable
//! Diffusion 3.5 medium the picture also attends to itself alone in some.

use super::joint::{ContinuousNorm, Embedder, FEED_FORWARD, JointBlock, Kind, Widths};
use super::{Conditioning, require_neutral};
use crate::nn::Forward;
use crate::nn::embed::sinusoids;
use crate::nn::layers::{Activation, Conv2d, LayerNorm, Linear};
use crate::nn::stack::Stack;
use crate::nn::weights::Weights;
use crate::weights::config::{parse, require_sizes};
use anyhow::{Result, ensure};
use candle_core::{DType, Result as TensorResult, Tensor};
use serde::Deserialize;
use serde_json::{Value, json};

/// The side of the squares of latents that become a token.
pub const PATCH: usize = 2;
/// The sines of a timestep.
const SINES: usize = 256;
const EPS: f64 = 1e-6;
/// Tokens of a prompt: CLIP's and T5's.
const TEXT_TOKENS: usize = 333;
/// Widths of a token that are held at once.
const ACTIVATIONS: u64 = 28;

/// `transformer/config.json`, with diffusers' defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct Sd3Config {
    /// of the latents that it was trained on, in each direction
    pub sample_size: usize,
    pub in_channels: usize,
    pub num_layers: usize,
    pub attention_head_dim: usize,
    pub num_attention_heads: usize,
    pub joint_attention_dim: usize,
    pub pooled_projection_dim: usize,
    /// squares in each direction that there are positions for
    pub pos_embed_max_size: usize,
    /// the blocks in which the picture also attends to itself alone
    pub dual_attention_layers: Vec<usize>,
    /// how queries and keys are normalised, if they are
    pub qk_norm: Option<String>,
}

impl Default for Sd3Config {
    fn default() -> Self {
        Self {
            sample_size: 128,
            in_channels: 16,
            num_layers: 18,
            attention_head_dim: 64,
            num_attention_heads: 18,
            joint_attention_dim: 4096,
            pooled_projection_dim: 2048,
            pos_embed_max_size: 96,
            dual_attention_layers: vec![],
            qk_norm: None,
        }
    }
}

impl Sd3Config {
    /// Parses config.json. A value that would change the result and is not supported is an error
    /// that names it.
    pub fn from_json(value: &Value) -> Result<Self> {
        let config: Self = parse("transformer", value)?;
        require_sizes(
            "transformer",
            [
                ("sample_size", config.sample_size, 2..=1 << 12),
                ("in_channels", config.in_channels, 1..=1 << 12),
                ("num_layers", config.num_layers, 1..=256),
                ("attention_head_dim", config.attention_head_dim, 1..=1 << 12),
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
                ("pos_embed_max_size", config.pos_embed_max_size, 1..=1 << 12),
            ],
        )?;
        require_neutral(
            "transformer",
            value,
            &[
                ("patch_size", json!(PATCH)),
                ("out_channels", json!(config.in_channels)),
                ("caption_projection_dim", json!(config.widths().all())),
            ],
        )?;
        ensure!(
            config
                .qk_norm
                .as_deref()
                .is_none_or(|kind| kind == "rms_norm"),
            "`qk_norm` of the transformer is `{}`, which sdgen does not support",
            config.qk_norm.as_deref().unwrap_or_default()
        );
        Ok(config)
    }

    /// Height and width of the latents that the model was trained on.
    pub fn sample_size(&self) -> (usize, usize) {
        (self.sample_size, self.sample_size)
    }

    /// The latents of the largest picture that there are positions for, in each direction.
    pub fn largest_side(&self) -> usize {
        PATCH * self.pos_embed_max_size
    }

    fn widths(&self) -> Widths {
        Widths {
            heads: self.num_attention_heads,
            head: self.attention_head_dim,
            has_qk_norm: self.qk_norm.is_some(),
        }
    }

    /// A rough estimate of the memory of the activations of `batch` latents [h, w], in bytes.
    pub fn activation_bytes(&self, batch: usize, h: usize, w: usize) -> u64 {
        let tokens = h.div_ceil(PATCH) * w.div_ceil(PATCH) + TEXT_TOKENS;
        4 * ACTIVATIONS * (batch * tokens * self.widths().all()) as u64
    }

    /// The operations of one run for a picture of so many latents: of each weight of a block two at
    /// every token, and those of attention.
    pub fn operations(&self, latents: f64) -> f64 {
        let (picture, width) = (latents / (PATCH * PATCH) as f64, self.widths().all() as f64);
        let tokens = picture + TEXT_TOKENS as f64;
        let weights = (4 + 2 * FEED_FORWARD) as f64 * width * width;
        let block = 2.0 * tokens * weights + 4.0 * tokens * tokens * width;
        let dual = 8.0 * picture * width * width + 4.0 * picture * picture * width;
        self.num_layers as f64 * block
            + self.dual_attention_layers.len() as f64 * dual
            + 2.0 * TEXT_TOKENS as f64 * width * self.joint_attention_dim as f64
    }
}

/// The network.
pub struct Sd3 {
    proj: Conv2d,
    /// [max, max, width]
    positions: Tensor,
    time: Embedder,
    pooled: Embedder,
    context_embedder: Linear,
    transformer_blocks: Stack<JointBlock>,
    norm_out: ContinuousNorm,
    proj_out: Linear,
    dtype: DType,
}

impl Sd3 {
    /// Reads the network at `w`.
    pub fn new(w: &Weights, config: &Sd3Config) -> Result<Self> {
        let widths = config.widths();
        let (width, channels, most) = (widths.all(), config.in_channels, config.pos_embed_max_size);
        let (embeds, squares) = (w.at("time_text_embed"), w.at("pos_embed"));
        let norm_out = Linear::new(&w.at("norm_out.linear"), width, 2 * width)?;
        let (last, dual) = (config.num_layers - 1, config.dual_attention_layers.clone());
        // as narrow as in the file: those of the largest picture are a tenth of the weights
        let positions = squares.get_stored("pos_embed", &[1, most * most, width])?;
        Ok(Self {
            proj: Conv2d::strided(&squares.at("proj"), channels, width, PATCH, PATCH, (0, 0))?,
            positions: positions.reshape((most, most, width))?,
            time: Embedder::new(&embeds.at("timestep_embedder"), SINES, width)?,
            pooled: Embedder::new(
                &embeds.at("text_embedder"),
                config.pooled_projection_dim,
                width,
            )?,
            context_embedder: Linear::new(
                &w.at("context_embedder"),
                config.joint_attention_dim,
                width,
            )?,
            transformer_blocks: Stack::numbered(
                &w.at("transformer_blocks"),
                config.num_layers,
                move |w, i| {
                    let kind = Kind {
                        is_dual: dual.contains(&i),
                        is_last: i == last,
                    };
                    JointBlock::new(w, widths, kind)
                },
            )?,
            norm_out: ContinuousNorm::new(LayerNorm::without_weights(w, width, EPS)?, norm_out),
            proj_out: Linear::new(&w.at("proj_out"), width, PATCH * PATCH * channels)?,
            dtype: w.arithmetic(),
        })
    }

    /// Binds the prompts of a batch. Errors if what the network takes beside them is not given.
    pub fn with_conditioning<'a>(
        &'a self,
        cx: Forward<'a>,
        conditioning: &Conditioning,
    ) -> TensorResult<ConditionedSd3<'a>> {
        let Some(added) = &conditioning.added_cond else {
            candle_core::bail!("the transformer takes a pooled text")
        };
        let context = conditioning.context.to_dtype(self.dtype)?;
        Ok(ConditionedSd3 {
            network: self,
            cx,
            context: self.context_embedder.forward(cx, &context)?,
            told: self
                .pooled
                .forward(cx, &added.text_embeds.to_dtype(self.dtype)?)?,
        })
    }

    /// Latents [b, h, w, c] as tokens [b, h/2*w/2, width] with their positions, which are those of
    /// the middle of the largest picture.
    fn tokens(&self, cx: Forward, latents: &Tensor) -> TensorResult<Tensor> {
        let squares = self.proj.forward(cx, latents)?; // [b, h/2, w/2, width]
        let (b, h, w, width) = squares.dims4()?;
        let most = self.positions.dim(0)?;
        if h.max(w) > most {
            candle_core::bail!("there are positions for {most}x{most} squares, not for {h}x{w}");
        }
        let positions = self
            .positions
            .narrow(0, (most - h) / 2, h)?
            .narrow(1, (most - w) / 2, w)?
            .to_dtype(squares.dtype())?;
        squares
            .broadcast_add(&positions)?
            .reshape((b, h * w, width))
    }
}

/// The network with the prompts of a batch.
pub struct ConditionedSd3<'a> {
    network: &'a Sd3,
    cx: Forward<'a>,
    /// [b, n, width]
    context: Tensor,
    /// what is added to the embedding of the timestep, [b, width]
    told: Tensor,
}

impl ConditionedSd3<'_> {
    /// The type that it computes in.
    pub fn dtype(&self) -> DType {
        self.network.dtype
    }

    /// Predicts the velocity: latents [b, h, w, c], timestep 0 to 1000 -> [b, h, w, c].
    pub fn forward(&self, latents: &Tensor, timestep: f64) -> TensorResult<Tensor> {
        self.forward_without(&[], latents, timestep)
    }

    /// The same without these blocks, counted from 0.
    pub fn forward_without(
        &self,
        blocks: &[usize],
        latents: &Tensor,
        timestep: f64,
    ) -> TensorResult<Tensor> {
        let Self {
            network,
            cx,
            context,
            told,
        } = self;
        let (cx, (b, h, w, c)) = (*cx, latents.dims4()?);
        if h % PATCH + w % PATCH > 0 {
            candle_core::bail!("latents of {h}x{w} are not made of squares of {PATCH}x{PATCH}");
        }
        let sines = sinusoids(&[timestep], SINES, true, 0.0, latents.device())?;
        let time = network.time.forward(cx, &sines.to_dtype(network.dtype)?)?;
        let time = Activation::Silu.forward(&told.broadcast_add(&time)?)?;
        let mut text = context.clone();
        let mut picture = network.tokens(cx, latents)?;
        let mut numbers = 0..;
        network.transformer_blocks.each(|block| {
            let is_run = numbers.next().is_some_and(|nth| !blocks.contains(&nth));
            if is_run {
                (text, picture) = block.forward(cx, (&text, &picture), &time, None)?;
            }
            Ok(())
        })?;
        let picture = network.norm_out.forward(cx, &picture, &time)?;
        network
            .proj_out
            .forward(cx, &picture)?
            .reshape(&[b, h / PATCH, w / PATCH, PATCH, PATCH, c])?
            .permute([0, 1, 3, 2, 4, 5])?
            .reshape((b, h, w, c))
    }
}
