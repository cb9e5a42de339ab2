//! FLUX.2's transformer (Black Forest Labs 2025), diffusers' `Flux2Transformer2DModel`: text and
//! picture as one sequence of tokens, first with weights of their own, then with shared ones; the
//! timestep scales and shifts what enters each layer, by the same numbers in all blocks. Reference
//! pictures follow the drawn one in the sequence, and nothing of them is drawn.

use super::joint::{ContinuousNorm, Modulation};
use super::{Conditioning, require_neutral};
use crate::nn::Forward;
use crate::nn::attention::{QkNorm, attention};
use crate::nn::embed::sinusoids;
use crate::nn::layers::{Activation, LayerNorm, Linear, swiglu};
use crate::nn::rotary::{Pairs, Rotary, frequencies};
use crate::nn::stack::Stack;
use crate::nn::weights::Weights;
use crate::weights::config::{parse, require_sizes};
use anyhow::{Result, bail, ensure};
use candle_core::{DType, Device, Result as TensorResult, Tensor};
use serde::Deserialize;
use serde_json::{Value, json};

/// The latents of the pictures of 1024x1024 pixels that it was trained on, in each direction.
const SAMPLE_SIZE: usize = 64;

/// Widths of a token that are held at once, measured in activations of the widest layer.
const ACTIVATIONS: u64 = 24;

/// Tokens of a prompt, which every picture is drawn with.
const TEXT_TOKENS: usize = 512;

/// How far apart pictures are on the first axis of positions: the drawn one at 0, reference pictures
/// at 10, 20, ...
const PICTURE_DISTANCE: usize = 10;

/// `transformer/config.json`, with diffusers' defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct Flux2Config {
    pub in_channels: usize,
    pub num_layers: usize,
    pub num_single_layers: usize,
    pub attention_head_dim: usize,
    pub num_attention_heads: usize,
    pub joint_attention_dim: usize,
    pub timestep_guidance_channels: usize,
    pub mlp_ratio: f64,
    pub axes_dims_rope: Vec<usize>,
    pub rope_theta: f64,
    pub eps: f64,
    /// whether the guidance scale is an input; the default is FLUX.2 dev's
    pub guidance_embeds: bool,
}

impl Default for Flux2Config {
    fn default() -> Self {
        Self {
            in_channels: 128,
            num_layers: 8,
            num_single_layers: 48,
            attention_head_dim: 128,
            num_attention_heads: 48,
            joint_attention_dim: 15360,
            timestep_guidance_channels: 256,
            mlp_ratio: 3.0,
            axes_dims_rope: vec![32; 4],
            rope_theta: 2000.0,
            eps: 1e-6,
            guidance_embeds: true,
        }
    }
}

impl Flux2Config {
    /// Parses config.json. A value that would change the result and is not supported is an error
    /// that names it.
    pub fn from_json(value: &Value) -> Result<Self> {
        let neutral = [("patch_size", json!(1)), ("out_channels", Value::Null)];
        let same = value.get("out_channels") == value.get("in_channels");
        require_neutral("transformer", value, &neutral[..2 - usize::from(same)])?;
        let config: Self = parse("transformer", value)?;
        if config.guidance_embeds {
            bail!(
                "the transformer takes the guidance scale as an input (FLUX.2 dev), which sdgen does not draw\n\nhint: FLUX.2 klein is drawn"
            );
        }
        require_sizes(
            "transformer",
            [
                ("in_channels", config.in_channels, 1..=1 << 12),
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
                    "timestep_guidance_channels",
                    config.timestep_guidance_channels,
                    2..=1 << 12,
                ),
            ],
        )?;
        ensure!(
            config.axes_dims_rope.len() == 4
                && config.axes_dims_rope.iter().all(|width| width % 2 == 0)
                && config.axes_dims_rope.iter().sum::<usize>() == config.attention_head_dim,
            "`axes_dims_rope` of the transformer is {:?}, which does not fit: expected four even numbers that sum to `attention_head_dim` {}",
            config.axes_dims_rope,
            config.attention_head_dim
        );
        ensure!(
            (0.1..=64.0).contains(&config.mlp_ratio),
            "`mlp_ratio` of the transformer is {}, which does not fit: expected a number from 0.1 to 64",
            config.mlp_ratio
        );
        Ok(config)
    }

    /// Height and width of the latents that the model was trained on.
    pub fn sample_size(&self) -> (usize, usize) {
        (SAMPLE_SIZE, SAMPLE_SIZE)
    }

    fn width(&self) -> usize {
        self.attention_head_dim * self.num_attention_heads
    }

    /// How many heads there are, and the width of each.
    fn heads(&self) -> (usize, usize) {
        (self.num_attention_heads, self.attention_head_dim)
    }

    fn mlp_width(&self) -> usize {
        (self.width() as f64 * self.mlp_ratio) as usize
    }

    /// A rough estimate of the memory of the activations of a batch of so many latents each, those of
    /// reference pictures too, in bytes.
    pub fn activation_bytes(&self, batch: usize, latents: usize) -> u64 {
        4 * ACTIVATIONS * (batch * (latents + TEXT_TOKENS) * self.width()) as u64
    }

    /// The operations of one run for a picture of so many latents, those of reference pictures too: of
    /// each weight of a block two at every token, and those of attention.
    pub fn operations(&self, latents: f64) -> f64 {
        let (tokens, width, mlp) = (
            latents + TEXT_TOKENS as f64,
            self.width() as f64,
            self.mlp_width() as f64,
        );
        let block = 2.0 * tokens * (4.0 * width * width + 3.0 * width * mlp)
            + 4.0 * tokens * tokens * width;
        (self.num_layers + self.num_single_layers) as f64 * block
            + 2.0 * TEXT_TOKENS as f64 * width * self.joint_attention_dim as f64
    }
}

/// The network.
pub struct Flux2 {
    time: [Linear; 2],
    x_embedder: Linear,
    context_embedder: Linear,
    double_stream_modulation: [Linear; 2],
    single_stream_modulation: Linear,
    transformer_blocks: Stack<DoubleBlock>,
    single_transformer_blocks: Stack<SingleBlock>,
    norm_out: ContinuousNorm,
    proj_out: Linear,
    config: Flux2Config,
    dtype: DType,
}

impl Flux2 {
    /// Reads the network at `w`.
    pub fn new(w: &Weights, config: &Flux2Config) -> Result<Self> {
        let (width, channels) = (config.width(), config.in_channels);
        let linear =
            |name: &str, inputs, outputs| Linear::without_bias(&w.at(name), inputs, outputs);
        let time = "time_guidance_embed.timestep_embedder";
        Ok(Self {
            time: [
                linear(
                    &format!("{time}.linear_1"),
                    config.timestep_guidance_channels,
                    width,
                )?,
                linear(&format!("{time}.linear_2"), width, width)?,
            ],
            x_embedder: linear("x_embedder", channels, width)?,
            context_embedder: linear("context_embedder", config.joint_attention_dim, width)?,
            double_stream_modulation: [
                linear("double_stream_modulation_img.linear", width, 6 * width)?,
                linear("double_stream_modulation_txt.linear", width, 6 * width)?,
            ],
            single_stream_modulation: linear("single_stream_modulation.linear", width, 3 * width)?,
            transformer_blocks: Stack::new(&w.at("transformer_blocks"), config.num_layers, {
                let config = config.clone();
                move |w| DoubleBlock::new(w, &config)
            })?,
            single_transformer_blocks: Stack::new(
                &w.at("single_transformer_blocks"),
                config.num_single_layers,
                {
                    let config = config.clone();
                    move |w| SingleBlock::new(&w.at("attn"), &config)
                },
            )?,
            norm_out: ContinuousNorm::new(
                LayerNorm::without_weights(w, width, config.eps)?,
                linear("norm_out.linear", width, 2 * width)?,
            ),
            proj_out: linear("proj_out", width, channels)?,
            config: config.clone(),
            dtype: w.arithmetic(),
        })
    }

    /// Binds the prompts of a batch, and the latents of its reference pictures, each [b, h, w, c].
    pub fn with_conditioning<'a>(
        &'a self,
        cx: Forward<'a>,
        conditioning: &Conditioning,
        references: &[Tensor],
    ) -> TensorResult<ConditionedFlux2<'a>> {
        let context = conditioning.context.to_dtype(self.dtype)?;
        let mut sizes = vec![];
        let mut tokens = vec![];
        for reference in references {
            let (b, h, w, c) = reference.dims4()?;
            let reference = reference.to_dtype(self.dtype)?.reshape((b, h * w, c))?;
            tokens.push(self.x_embedder.forward(cx, &reference)?);
            sizes.push((h, w));
        }
        Ok(ConditionedFlux2 {
            network: self,
            cx,
            context: self.context_embedder.forward(cx, &context)?,
            references: tokens,
            sizes,
        })
    }

    /// The embedding of a timestep of 0 to 1000 after its nonlinearity, [1, width].
    fn time(&self, cx: Forward, timestep: f64, device: &Device) -> TensorResult<Tensor> {
        let [first, second] = &self.time;
        let channels = self.config.timestep_guidance_channels;
        let sines = sinusoids(&[timestep], channels, true, 0.0, device)?;
        let x = first.forward(cx, &sines.to_dtype(self.dtype)?)?;
        let x = second.forward(cx, &Activation::Silu.forward(&x)?)?;
        Activation::Silu.forward(&x)
    }

    /// The angles of text tokens, then of pictures [h, w].
    fn rotary(
        &self,
        tokens: usize,
        pictures: impl Iterator<Item = (usize, usize)>,
        device: &Device,
    ) -> TensorResult<Rotary> {
        let text = (0..tokens).map(|l| [0, 0, 0, l]);
        let of_picture = |(nth, (h, w)): (usize, (usize, usize))| {
            (0..h * w).map(move |i| [PICTURE_DISTANCE * nth, i / w, i % w, 0])
        };
        let pictures = pictures.enumerate().flat_map(of_picture);
        let angles = |position: [usize; 4]| {
            let axes = position.into_iter().zip(&self.config.axes_dims_rope);
            axes.flat_map(|(at, width)| {
                frequencies(self.config.rope_theta, *width).map(move |f| at as f64 * f)
            })
            .collect()
        };
        let angles: Vec<Vec<f64>> = text.chain(pictures).map(angles).collect();
        Rotary::new(&angles, Pairs::Adjacent, device)
    }
}

/// The network with the prompts of a batch.
pub struct ConditionedFlux2<'a> {
    network: &'a Flux2,
    cx: Forward<'a>,
    /// [b, n, width]
    context: Tensor,
    /// the tokens of each reference picture, [b, h*w, width], and its height and width in latents
    references: Vec<Tensor>,
    sizes: Vec<(usize, usize)>,
}

impl ConditionedFlux2<'_> {
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
            references,
            sizes,
        } = self;
        let (cx, (b, h, w, c)) = (*cx, latents.dims4()?);
        let time = network.time(cx, timestep, latents.device())?;
        let [of_picture, of_text] = &network.double_stream_modulation;
        let of_picture = Modulation::of(&of_picture.forward(cx, &time)?, 2)?;
        let of_text = Modulation::of(&of_text.forward(cx, &time)?, 2)?;
        let single = Modulation::of(&network.single_stream_modulation.forward(cx, &time)?, 1)?;
        let mut text = context.clone();
        let mut picture = network
            .x_embedder
            .forward(cx, &latents.reshape((b, h * w, c))?)?;
        if !references.is_empty() {
            let all: Vec<&Tensor> = [&picture].into_iter().chain(references).collect();
            picture = Tensor::cat(&all, 1)?; // [b, h*w + those of the references, width]
        }
        let tokens = text.dim(1)?;
        let sizes = [(h, w)].into_iter().chain(sizes.iter().copied());
        let rotary = network.rotary(tokens, sizes, latents.device())?;
        network.transformer_blocks.each(|block| {
            let modulations = (&*of_text, &*of_picture);
            (text, picture) = block.forward(cx, (&text, &picture), modulations, &rotary)?;
            Ok(())
        })?;
        let mut x = Tensor::cat(&[&text, &picture], 1)?; // [b, n + h*w, width]
        let Some(modulation) = single.first() else {
            candle_core::bail!("single blocks have one modulation")
        };
        network.single_transformer_blocks.each(|block| {
            x = block.forward(cx, &x, modulation, &rotary)?;
            Ok(())
        })?;
        let picture = x.narrow(1, tokens, h * w)?.contiguous()?;
        let picture = network.norm_out.forward(cx, &picture, &time)?;
        network
            .proj_out
            .forward(cx, &picture)?
            .reshape((b, h, w, c))
    }
}

/// A block in which text and picture have weights of their own and attend to both.
struct DoubleBlock {
    norm: LayerNorm,
    picture: Stream,
    text: Stream,
    heads: usize,
}

/// The layers of one of the two.
struct Stream {
    qkv: Linear,
    norms: QkNorm,
    to_out: Linear,
    linear_in: Linear,
    linear_out: Linear,
}

impl Stream {
    fn new(
        w: &Weights,
        config: &Flux2Config,
        projections: [&str; 3],
        norms: [&str; 2],
        [out, ff]: [&str; 2],
    ) -> Result<Self> {
        let w = w.for_tokens();
        let (width, mlp, attn) = (config.width(), config.mlp_width(), w.at("attn"));
        let fused = projections.map(|name| (attn.at(name), width));
        Ok(Self {
            qkv: Linear::fused(&fused, width, false)?,
            norms: QkNorm::new(&attn, norms, config.heads(), config.eps)?,
            to_out: Linear::without_bias(&attn.at(out), width, width)?,
            linear_in: Linear::without_bias(&w.at(ff).at("linear_in"), width, 2 * mlp)?,
            linear_out: Linear::without_bias(&w.at(ff).at("linear_out"), mlp, width)?,
        })
    }

    /// The rest of a block after attention.
    fn finish(
        &self,
        cx: Forward,
        x: &Tensor,
        attended: &Tensor,
        norm: &LayerNorm,
        modulation: &[Modulation],
    ) -> TensorResult<Tensor> {
        let [of_attention, of_ff] = modulation else {
            candle_core::bail!("a block has two modulations")
        };
        let x = of_attention.leave(x, &self.to_out.forward(cx, attended)?)?;
        let inner = self.linear_in.forward(cx, &of_ff.enter(cx, norm, &x)?)?;
        of_ff.leave(&x, &self.linear_out.forward(cx, &swiglu(cx, &inner)?)?)
    }
}

impl DoubleBlock {
    fn new(w: &Weights, config: &Flux2Config) -> Result<Self> {
        Ok(Self {
            norm: LayerNorm::without_weights(w, config.width(), config.eps)?,
            picture: Stream::new(
                w,
                config,
                ["to_q", "to_k", "to_v"],
                ["norm_q", "norm_k"],
                ["to_out.0", "ff"],
            )?,
            text: Stream::new(
                w,
                config,
                ["add_q_proj", "add_k_proj", "add_v_proj"],
                ["norm_added_q", "norm_added_k"],
                ["to_add_out", "ff_context"],
            )?,
            heads: config.num_attention_heads,
        })
    }

    /// Text [b, n, width] and picture [b, m, width], with the modulations of each.
    fn forward(
        &self,
        cx: Forward,
        (text, picture): (&Tensor, &Tensor),
        (of_text, of_picture): (&[Modulation], &[Modulation]),
        rotary: &Rotary,
    ) -> TensorResult<(Tensor, Tensor)> {
        let project = |stream: &Stream, x: &Tensor, modulation: &[Modulation]| {
            let Some(of_attention) = modulation.first() else {
                candle_core::bail!("a block has two modulations")
            };
            let x = of_attention.enter(cx, &self.norm, x)?;
            stream.norms.split(cx, &stream.qkv.forward(cx, &x)?)
        };
        let of_text_qkv = project(&self.text, text, of_text)?;
        let of_picture_qkv = project(&self.picture, picture, of_picture)?;
        let mut both = vec![];
        for (a, b) in of_text_qkv.iter().zip(&of_picture_qkv) {
            both.push(Tensor::cat(&[a, b], 1)?);
        }
        let [q, k, v] = both.as_slice() else {
            candle_core::bail!("queries, keys and values are three")
        };
        let (q, k) = (
            rotary.turn(cx, q, self.heads)?,
            rotary.turn(cx, k, self.heads)?,
        );
        let attended = attention(cx, &q, &k, v, self.heads)?;
        let tokens = text.dim(1)?;
        let part = |from, len| attended.narrow(1, from, len)?.contiguous();
        let (a, b) = (part(0, tokens)?, part(tokens, picture.dim(1)?)?);
        Ok((
            self.text.finish(cx, text, &a, &self.norm, of_text)?,
            self.picture
                .finish(cx, picture, &b, &self.norm, of_picture)?,
        ))
    }
}

/// A block in which text and picture are one sequence, and attention and the rest run side by side.
struct SingleBlock {
    norm: LayerNorm,
    to_qkv_mlp_proj: Linear,
    norms: QkNorm,
    to_out: Linear,
    width: usize,
    mlp: usize,
}

impl SingleBlock {
    fn new(w: &Weights, config: &Flux2Config) -> Result<Self> {
        let w = &w.for_tokens();
        let (width, mlp) = (config.width(), config.mlp_width());
        Ok(Self {
            norm: LayerNorm::without_weights(w, width, config.eps)?,
            to_qkv_mlp_proj: Linear::without_bias(
                &w.at("to_qkv_mlp_proj"),
                width,
                3 * width + 2 * mlp,
            )?,
            norms: QkNorm::new(w, ["norm_q", "norm_k"], config.heads(), config.eps)?,
            to_out: Linear::without_bias(&w.at("to_out"), width + mlp, width)?,
            width,
            mlp,
        })
    }

    /// Tokens [b, n, width].
    fn forward(
        &self,
        cx: Forward,
        x: &Tensor,
        modulation: &Modulation,
        rotary: &Rotary,
    ) -> TensorResult<Tensor> {
        let heads = self.norms.heads();
        let entered = modulation.enter(cx, &self.norm, x)?;
        let projected = self.to_qkv_mlp_proj.forward(cx, &entered)?;
        let [q, k, v] = self
            .norms
            .split(cx, &projected.narrow(2, 0, 3 * self.width)?)?;
        let (q, k) = (rotary.turn(cx, &q, heads)?, rotary.turn(cx, &k, heads)?);
        let attended = attention(cx, &q, &k, &v, heads)?;
        let inner = swiglu(cx, &projected.narrow(2, 3 * self.width, 2 * self.mlp)?)?;
        let both = Tensor::cat(&[&attended, &inner], 2)?;
        modulation.leave(x, &self.to_out.forward(cx, &both)?)
    }
}
