//! Z-Image's transformer (Z-Image team 2025, arXiv 2511.22699), diffusers'
//! `ZImageTransformer2DModel`: picture and prompt are refined each by itself, then go through all
//! layers as one sequence; the timestep scales what enters each layer and gates what leaves it.

use super::{Conditioning, require_neutral};
use crate::nn::Forward;
use crate::nn::attention::{QkNorm, attention};
use crate::nn::embed::sinusoids;
use crate::nn::layers::{Activation, LayerNorm, Linear, RmsNorm, swiglu};
use crate::nn::rotary::{Pairs, Rotary, frequencies};
use crate::nn::stack::Stack;
use crate::nn::weights::Weights;
use crate::weights::config::{parse, require_sizes};
use anyhow::{Result, ensure};
use candle_core::{DType, Device, Result as TensorResult, Tensor};
use serde::Deserialize;
use serde_json::{Value, json};

/// The latents of the pictures of 1024x1024 pixels that it was trained on, in each direction.
const SAMPLE_SIZE: usize = 128;
/// The side of the squares of latents that become a token.
pub const PATCH: usize = 2;
/// Sequences are padded to a multiple of this many tokens, and padding is attended to.
const SEQUENCE_MULTIPLE: usize = 32;
/// The widest embedding of a timestep.
const TIME_WIDTH: usize = 256;
/// What the timestep's sines become first.
const TIME_HIDDEN: usize = 1024;
/// Of heads; the configuration's `norm_eps` is that of all other norms.
const QK_EPS: f64 = 1e-5;
/// Of the norm of the output.
const OUT_EPS: f64 = 1e-6;
/// Widths of a token that are held at once.
const ACTIVATIONS: u64 = 16;
/// Tokens of a prompt of some length, for estimates.
const TEXT_TOKENS: usize = 96;

/// `transformer/config.json`, with diffusers' defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct ZImageConfig {
    pub in_channels: usize,
    pub dim: usize,
    pub n_layers: usize,
    pub n_refiner_layers: usize,
    pub n_heads: usize,
    pub norm_eps: f64,
    /// the width of the prompt's embeddings
    pub cap_feat_dim: usize,
    pub rope_theta: f64,
    pub t_scale: f64,
    pub axes_dims: Vec<usize>,
}

impl Default for ZImageConfig {
    fn default() -> Self {
        Self {
            in_channels: 16,
            dim: 3840,
            n_layers: 30,
            n_refiner_layers: 2,
            n_heads: 30,
            norm_eps: 1e-5,
            cap_feat_dim: 2560,
            rope_theta: 256.0,
            t_scale: 1000.0,
            axes_dims: vec![32, 48, 48],
        }
    }
}

impl ZImageConfig {
    /// Parses config.json. A value that would change the result and is not supported is an error
    /// that names it.
    pub fn from_json(value: &Value) -> Result<Self> {
        let config: Self = parse("transformer", value)?;
        require_sizes(
            "transformer",
            [
                ("in_channels", config.in_channels, 1..=1 << 12),
                ("dim", config.dim, 2..=1 << 16),
                ("n_layers", config.n_layers, 1..=256),
                ("n_refiner_layers", config.n_refiner_layers, 0..=256),
                ("n_heads", config.n_heads, 1..=1 << 12),
                ("cap_feat_dim", config.cap_feat_dim, 1..=1 << 20),
            ],
        )?;
        ensure!(
            config.dim.is_multiple_of(config.n_heads),
            "`dim` of the transformer is {}, which does not fit: expected a multiple of `n_heads` {}",
            config.dim,
            config.n_heads
        );
        ensure!(
            config.axes_dims.len() == 3
                && config.axes_dims.iter().all(|width| width % 2 == 0)
                && config.axes_dims.iter().sum::<usize>() == config.head_dim(),
            "`axes_dims` of the transformer is {:?}, which does not fit: expected three even numbers that sum to `dim` / `n_heads` = {}",
            config.axes_dims,
            config.head_dim()
        );
        require_neutral(
            "transformer",
            value,
            &[
                ("all_patch_size", json!([PATCH])),
                ("all_f_patch_size", json!([1])),
                ("n_kv_heads", json!(config.n_heads)),
                ("qk_norm", json!(true)),
                ("siglip_feat_dim", Value::Null),
            ],
        )?;
        Ok(config)
    }

    /// Height and width of the latents that the model was trained on.
    pub fn sample_size(&self) -> (usize, usize) {
        (SAMPLE_SIZE, SAMPLE_SIZE)
    }

    fn head_dim(&self) -> usize {
        self.dim / self.n_heads
    }

    fn mlp_width(&self) -> usize {
        (self.dim as f64 / 3.0 * 8.0) as usize
    }

    fn time_width(&self) -> usize {
        self.dim.min(TIME_WIDTH)
    }

    /// A rough estimate of the memory of the activations of `batch` latents [h, w], in bytes.
    pub fn activation_bytes(&self, batch: usize, h: usize, w: usize) -> u64 {
        let tokens = h.div_ceil(PATCH) * w.div_ceil(PATCH) + TEXT_TOKENS;
        4 * ACTIVATIONS * (batch * tokens * self.dim) as u64
    }

    /// The operations of one run for a picture of so many latents: of each weight of a block two at
    /// every token, and those of attention.
    pub fn operations(&self, latents: f64) -> f64 {
        let (picture, width) = (latents / (PATCH * PATCH) as f64, self.dim as f64);
        let block = |tokens: f64| {
            2.0 * tokens * (4.0 * width * width + 3.0 * width * self.mlp_width() as f64)
                + 4.0 * tokens * tokens * width
        };
        self.n_layers as f64 * block(picture + TEXT_TOKENS as f64)
            + self.n_refiner_layers as f64 * block(picture)
    }
}

/// The network.
pub struct ZImage {
    time: [Linear; 2],
    x_embedder: Linear,
    x_pad_token: Tensor,
    cap_norm: RmsNorm,
    cap_embedder: Linear,
    cap_pad_token: Tensor,
    noise_refiner: Stack<Block>,
    context_refiner: Stack<Block>,
    layers: Stack<Block>,
    norm_out: LayerNorm,
    /// of the output's scale
    modulation: Linear,
    linear_out: Linear,
    config: ZImageConfig,
    dtype: DType,
}

impl ZImage {
    /// Reads the network at `w`.
    pub fn new(w: &Weights, config: &ZImageConfig) -> Result<Self> {
        let (dim, time, patch) = (
            config.dim,
            config.time_width(),
            PATCH * PATCH * config.in_channels,
        );
        let blocks = |name: &str, n: usize, is_modulated: bool| {
            let config = config.clone();
            Stack::new(&w.at(name), n, move |w| {
                Block::new(w, &config, is_modulated)
            })
        };
        let (mlp, caption) = (w.at("t_embedder.mlp"), w.at("cap_embedder"));
        let out = w.at("all_final_layer.2-1");
        Ok(Self {
            time: [
                Linear::new(&mlp.at(0), TIME_WIDTH, TIME_HIDDEN)?,
                Linear::new(&mlp.at(2), TIME_HIDDEN, time)?,
            ],
            x_embedder: Linear::new(&w.at("all_x_embedder.2-1"), patch, dim)?,
            x_pad_token: w.get("x_pad_token", &[1, dim])?,
            cap_norm: RmsNorm::new(&caption.at(0), config.cap_feat_dim, config.norm_eps)?,
            cap_embedder: Linear::new(&caption.at(1), config.cap_feat_dim, dim)?,
            cap_pad_token: w.get("cap_pad_token", &[1, dim])?,
            noise_refiner: blocks("noise_refiner", config.n_refiner_layers, true)?,
            context_refiner: blocks("context_refiner", config.n_refiner_layers, false)?,
            layers: blocks("layers", config.n_layers, true)?,
            norm_out: LayerNorm::without_weights(w, dim, OUT_EPS)?,
            modulation: Linear::new(&out.at("adaLN_modulation.1"), time, dim)?,
            linear_out: Linear::new(&out.at("linear"), dim, patch)?,
            config: config.clone(),
            dtype: w.arithmetic(),
        })
    }

    /// Binds the prompts of a batch, which are refined here, once for all steps.
    pub fn with_conditioning<'a>(
        &'a self,
        cx: Forward<'a>,
        conditioning: &Conditioning,
    ) -> TensorResult<ConditionedZImage<'a>> {
        let (rows, tokens, _) = conditioning.context.dims3()?;
        let mut prompts: Vec<(Tensor, usize)> = vec![];
        for row in 0..rows {
            let tokens = conditioning.lengths.get(row).copied().unwrap_or(tokens);
            let own = conditioning
                .context
                .narrow(0, row, 1)?
                .narrow(1, 0, tokens)?;
            let caption = self.caption(cx, &own.to_dtype(self.dtype)?)?;
            match prompts.last_mut() {
                Some((last, n)) if last.dim(1)? == caption.dim(1)? => {
                    *last = Tensor::cat(&[&*last, &caption], 0)?;
                    *n += 1;
                }
                _ => prompts.push((caption, 1)),
            }
        }
        Ok(ConditionedZImage {
            network: self,
            cx,
            prompts,
        })
    }

    /// The embeddings of one prompt [1, n, cap_feat_dim] -> [1, n padded, dim].
    fn caption(&self, cx: Forward, embeds: &Tensor) -> TensorResult<Tensor> {
        let embeds = self.cap_norm.forward(cx, embeds)?;
        let embedded = self.cap_embedder.forward(cx, &embeds)?;
        let mut x = padded(&embedded, &self.cap_pad_token)?;
        let rotary = self.rotary((0..x.dim(1)?).map(|i| [1 + i, 0, 0]), x.device())?;
        self.context_refiner.each(|block| {
            x = block.forward(cx, &x, None, &rotary)?;
            Ok(())
        })?;
        Ok(x)
    }

    /// The embedding of a timestep of 0 to 1000, [1, width]. The network counts from noise to
    /// picture.
    fn time(&self, cx: Forward, timestep: f64, device: &Device) -> TensorResult<Tensor> {
        let [first, second] = &self.time;
        let t = (1000.0 - timestep as f32) / 1000.0 * self.config.t_scale as f32;
        let sines = sinusoids(&[t.into()], TIME_WIDTH, true, 0.0, device)?;
        let x = first.forward(cx, &sines.to_dtype(self.dtype)?)?;
        second.forward(cx, &Activation::Silu.forward(&x)?)
    }

    /// The angles of tokens at these places, which diffusers rounds to f32.
    fn rotary(
        &self,
        places: impl Iterator<Item = [usize; 3]>,
        device: &Device,
    ) -> TensorResult<Rotary> {
        let angles = |place: [usize; 3]| {
            let axes = place.into_iter().zip(&self.config.axes_dims);
            axes.flat_map(|(at, width)| {
                frequencies(self.config.rope_theta, *width)
                    .map(move |f| f64::from((at as f64 * f) as f32))
            })
            .collect()
        };
        let angles: Vec<Vec<f64>> = places.map(angles).collect();
        Rotary::new(&angles, Pairs::Adjacent, device)
    }

    /// Latents [b, h, w, c] as tokens [b, h/2*w/2, 4c], of which each is its rows one after the
    /// other.
    fn patches(&self, latents: &Tensor) -> TensorResult<Tensor> {
        let (b, h, w, c) = latents.dims4()?;
        latents
            .reshape(&[b, h / PATCH, PATCH, w / PATCH, PATCH, c])?
            .permute([0, 1, 3, 2, 4, 5])?
            .reshape((b, h / PATCH * (w / PATCH), PATCH * PATCH * c))
    }
}

/// x [b, n, dim] followed by as many pad tokens [1, dim] as a sequence needs.
fn padded(x: &Tensor, pad_token: &Tensor) -> TensorResult<Tensor> {
    let (b, n, dim) = x.dims3()?;
    let missing = n.next_multiple_of(SEQUENCE_MULTIPLE) - n;
    if missing == 0 {
        return Ok(x.clone());
    }
    let padding = pad_token.unsqueeze(0)?.broadcast_as((b, missing, dim))?;
    Tensor::cat(&[x, &padding.contiguous()?], 1)
}

/// The network with the prompts of a batch.
pub struct ConditionedZImage<'a> {
    network: &'a ZImage,
    cx: Forward<'a>,
    /// those of neighbours that are of the same length, [n, length, dim], and n
    prompts: Vec<(Tensor, usize)>,
}

impl ConditionedZImage<'_> {
    /// The type that it computes in.
    pub fn dtype(&self) -> DType {
        self.network.dtype
    }

    /// Predicts the velocity: latents [b, h, w, c], timestep 0 to 1000 -> [b, h, w, c].
    pub fn forward(&self, latents: &Tensor, timestep: f64) -> TensorResult<Tensor> {
        let (cx, network) = (self.cx, self.network);
        let (_, h, w, c) = latents.dims4()?;
        if h % PATCH + w % PATCH > 0 {
            candle_core::bail!("latents of {h}x{w} are not made of squares of {PATCH}x{PATCH}");
        }
        let time = network.time(cx, timestep, latents.device())?;
        let (mut outputs, mut row) = (vec![], 0);
        for (prompts, n) in &self.prompts {
            let tokens = network.patches(&latents.narrow(0, row, *n)?)?;
            let tokens = self.velocities(&tokens, prompts, (h / PATCH, w / PATCH), &time)?;
            let squares = tokens.reshape(&[*n, h / PATCH, w / PATCH, PATCH, PATCH, c])?;
            outputs.push(
                squares
                    .permute([0, 1, 3, 2, 4, 5])?
                    .reshape((*n, h, w, c))?,
            );
            row += n;
        }
        // it was trained to predict the way from noise to picture
        Tensor::cat(&outputs, 0)?.neg()
    }

    /// Tokens of pictures [b, h*w, 4c] and their prompts [b, length, dim] -> [b, h*w, 4c].
    fn velocities(
        &self,
        tokens: &Tensor,
        prompts: &Tensor,
        (h, w): (usize, usize),
        time: &Tensor,
    ) -> TensorResult<Tensor> {
        let (cx, network) = (self.cx, self.network);
        let embedded = network.x_embedder.forward(cx, tokens)?;
        let mut picture = padded(&embedded, &network.x_pad_token)?;
        let (own, length) = (picture.dim(1)?, prompts.dim(1)?);
        let places = (0..own).map(|i| match i < h * w {
            true => [length + 1, i / w, i % w],
            false => [0; 3],
        });
        let rotary = network.rotary(places.clone(), tokens.device())?;
        network.noise_refiner.each(|block| {
            picture = block.forward(cx, &picture, Some(time), &rotary)?;
            Ok(())
        })?;
        let places = places.chain((0..length).map(|i| [1 + i, 0, 0]));
        let rotary = network.rotary(places, tokens.device())?;
        let mut x = Tensor::cat(&[&picture, prompts], 1)?;
        network.layers.each(|block| {
            x = block.forward(cx, &x, Some(time), &rotary)?;
            Ok(())
        })?;
        let picture = x.narrow(1, 0, h * w)?.contiguous()?;
        let scale = Activation::Silu.forward(time)?;
        let scale = (network.modulation.forward(cx, &scale)?.unsqueeze(1)? + 1.0)?;
        let picture = network.norm_out.forward(cx, &picture)?;
        network
            .linear_out
            .forward(cx, &picture.broadcast_mul(&scale)?)
    }
}

/// Attention, then a feed-forward network, each between two norms.
struct Block {
    /// what the timestep makes of a block; none where it is not told of it
    modulation: Option<Linear>,
    attention_norms: [RmsNorm; 2],
    qkv: Linear,
    norms: QkNorm,
    to_out: Linear,
    ffn_norms: [RmsNorm; 2],
    gate_up: Linear,
    down: Linear,
}

impl Block {
    fn new(w: &Weights, config: &ZImageConfig, is_modulated: bool) -> Result<Self> {
        let (dim, mlp) = (config.dim, config.mlp_width());
        let norms = |name: &str| -> Result<[RmsNorm; 2]> {
            let norm = |i| RmsNorm::new(&w.at(format!("{name}{i}")), dim, config.norm_eps);
            Ok([norm(1)?, norm(2)?])
        };
        let tokens = w.for_tokens();
        let (attn, ffn) = (tokens.at("attention"), tokens.at("feed_forward"));
        let modulation = || Linear::new(&w.at("adaLN_modulation.0"), config.time_width(), 4 * dim);
        Ok(Self {
            modulation: is_modulated.then(modulation).transpose()?,
            attention_norms: norms("attention_norm")?,
            qkv: Linear::fused(
                &["to_q", "to_k", "to_v"].map(|name| (attn.at(name), dim)),
                dim,
                false,
            )?,
            norms: QkNorm::new(
                &attn,
                ["norm_q", "norm_k"],
                (config.n_heads, config.head_dim()),
                QK_EPS,
            )?,
            to_out: Linear::without_bias(&attn.at("to_out.0"), dim, dim)?,
            ffn_norms: norms("ffn_norm")?,
            gate_up: Linear::fused(&[(ffn.at("w1"), mlp), (ffn.at("w3"), mlp)], dim, false)?,
            down: Linear::without_bias(&ffn.at("w2"), mlp, dim)?,
        })
    }

    /// Tokens [b, n, dim], and the embedding of the timestep [1, width].
    fn forward(
        &self,
        cx: Forward,
        x: &Tensor,
        time: Option<&Tensor>,
        rotary: &Rotary,
    ) -> TensorResult<Tensor> {
        let modulation = match (&self.modulation, time) {
            (Some(modulation), Some(time)) => {
                let numbers = modulation.forward(cx, time)?.unsqueeze(1)?;
                Some(numbers.chunk(4, 2)?)
            }
            _ => None,
        };
        // scale and gate of attention, then those of the feed-forward network
        let of = |i: usize| modulation.as_ref().and_then(|numbers| numbers.get(i));
        let enter = |x: &Tensor, norm: &RmsNorm, i: usize| match of(i) {
            Some(scale) => norm.forward(cx, x)?.broadcast_mul(&(scale + 1.0)?),
            None => norm.forward(cx, x),
        };
        let leave = |x: &Tensor, output: &Tensor, norm: &RmsNorm, i: usize| {
            let output = norm.forward(cx, output)?;
            match of(i) {
                Some(gate) => x + output.broadcast_mul(&gate.tanh()?)?,
                None => x + output,
            }
        };
        let [before, after] = &self.attention_norms;
        let projected = self.qkv.forward(cx, &enter(x, before, 0)?)?;
        let [q, k, v] = self.norms.split(cx, &projected)?;
        let heads = self.norms.heads();
        let (q, k) = (rotary.turn(cx, &q, heads)?, rotary.turn(cx, &k, heads)?);
        let attended = attention(cx, &q, &k, &v, heads)?;
        let x = leave(x, &self.to_out.forward(cx, &attended)?, after, 1)?;
        let [before, after] = &self.ffn_norms;
        let inner = self.gate_up.forward(cx, &enter(&x, before, 2)?)?;
        leave(&x, &self.down.forward(cx, &swiglu(cx, &inner)?)?, after, 3)
    }
}
