//! CLIP's text transformer (Radford et al. 2021, arXiv 2103.00020), OpenAI's and OpenCLIP's alike.

use crate::nn::layers::{Activation, LayerNorm, Linear};
use crate::nn::weights::Weights;
use crate::nn::{Forward, plain};
use crate::weights::config::{parse, require_size};
use anyhow::{Result, bail};
use candle_core::{Device, Result as TensorResult, Tensor};
use serde::Deserialize;
use serde_json::Value;
use std::ops::Range;

/// The fields of `text_encoder/config.json`, with transformers' defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct ClipConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub max_position_embeddings: usize,
    pub hidden_act: String,
    pub layer_norm_eps: f64,
    pub projection_dim: usize,
    pub eos_token_id: u32,
}

impl Default for ClipConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
            projection_dim: 512,
            eos_token_id: 49407,
        }
    }
}

impl ClipConfig {
    /// Parses config.json. Errors name the field that is wrong.
    pub fn from_json(value: &Value) -> Result<Self> {
        const NAME: &str = "text encoder";
        let config: Self = parse(NAME, value)?;
        for (key, size, most) in [
            ("vocab_size", config.vocab_size, 1 << 24),
            ("hidden_size", config.hidden_size, 1 << 16),
            ("intermediate_size", config.intermediate_size, 1 << 20),
            ("num_hidden_layers", config.num_hidden_layers, 256),
            (
                "max_position_embeddings",
                config.max_position_embeddings,
                4096,
            ),
            ("projection_dim", config.projection_dim, 1 << 16),
        ] {
            require_size(NAME, key, size, 1..=most)?;
        }
        if config.num_attention_heads == 0
            || !config
                .hidden_size
                .is_multiple_of(config.num_attention_heads)
        {
            bail!(
                "num_attention_heads {} does not divide hidden_size {} of the text encoder",
                config.num_attention_heads,
                config.hidden_size
            );
        }
        Ok(config)
    }
}

/// The `eos_token_id` in configurations of before transformers 4.31, whatever the token is.
const WRONG_EOS: u32 = 2;

/// The text encoder.
pub struct Clip {
    /// [vocabulary, hidden]
    tokens: Tensor,
    /// [positions, hidden]
    positions: Tensor,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
    text_projection: Option<Linear>,
    eos_token_id: u32,
    vocab_size: usize,
}

impl Clip {
    /// Reads the encoder at `w` (its `text_model`).
    pub fn new(w: &Weights, config: &ClipConfig) -> Result<Self> {
        let w = w.at("text_model");
        let (hidden, embeddings) = (config.hidden_size, w.at("embeddings"));
        let activation = Activation::named(&config.hidden_act, "hidden_act")?;
        Ok(Self {
            tokens: embeddings.get("token_embedding.weight", &[config.vocab_size, hidden])?,
            positions: embeddings.get(
                "position_embedding.weight",
                &[config.max_position_embeddings, hidden],
            )?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::new(&w.at(format!("encoder.layers.{i}")), config, activation))
                .collect::<Result<_>>()?,
            final_layer_norm: LayerNorm::new(
                &w.at("final_layer_norm"),
                hidden,
                config.layer_norm_eps,
            )?,
            text_projection: None,
            eos_token_id: config.eos_token_id,
            vocab_size: config.vocab_size,
        })
    }

    /// Reads the encoder together with its `text_projection`, which [`Self::penultimate`] applies.
    pub fn with_projection(w: &Weights, config: &ClipConfig) -> Result<Self> {
        let projection = Linear::without_bias(
            &w.at("text_projection"),
            config.hidden_size,
            config.projection_dim,
        )?;
        Ok(Self {
            text_projection: Some(projection),
            ..Self::new(w, config)?
        })
    }

    /// Adds embeddings, each [n, hidden], for the ids that follow the vocabulary's.
    pub fn add_embeddings(&mut self, rows: &[&Tensor]) -> Result<()> {
        let (dtype, device) = (self.tokens.dtype(), self.tokens.device().clone());
        let rows = rows
            .iter()
            .map(|rows| rows.to_dtype(dtype)?.to_device(&device))
            .collect::<TensorResult<Vec<_>>>()?;
        if !rows.is_empty() {
            self.tokens = Tensor::cat(
                &std::iter::once(&self.tokens)
                    .chain(&rows)
                    .collect::<Vec<_>>(),
                0,
            )?;
        }
        Ok(())
    }

    /// Encodes ids `[n]` to hidden states [1, n, hidden] after the final norm, without the last
    /// `skip` layers. Errors if an id is outside of the vocabulary or `skip` is not below the
    /// number of layers.
    pub fn forward(&self, cx: Forward, ids: &[u32], skip: usize) -> TensorResult<Tensor> {
        let depth = self.layers.len().saturating_sub(skip);
        self.final_layer_norm
            .forward(cx, &self.run(cx, self.embed(ids)?, 0..depth)?)
    }

    /// Encodes ids `[n]` to hidden states [1, n, hidden] as they enter the last layer, or the one
    /// `skip` layers before it, without the final norm. An encoder with a projection also returns
    /// the projection [1, projection] of the whole text. Errors as [`Self::forward`] does.
    pub fn penultimate(
        &self,
        cx: Forward,
        ids: &[u32],
        skip: usize,
    ) -> TensorResult<(Tensor, Option<Tensor>)> {
        let depth = self.layers.len().saturating_sub(1 + skip);
        let hidden = self.run(cx, self.embed(ids)?, 0..depth)?;
        let Some(projection) = &self.text_projection else {
            return Ok((hidden, None));
        };
        let last = self.run(cx, hidden.clone(), depth..self.layers.len())?;
        let end = self
            .final_layer_norm
            .forward(cx, &last.narrow(1, self.end(ids), 1)?)?
            .squeeze(1)?; // [1, hidden]
        Ok((hidden, Some(projection.forward(cx, &end)?)))
    }

    /// Encodes ids `[n]` to the hidden state that stands for the whole text, [1, hidden], after the
    /// final norm and not projected.
    pub fn pooled(&self, cx: Forward, ids: &[u32]) -> TensorResult<Tensor> {
        let last = self.run(cx, self.embed(ids)?, 0..self.layers.len())?;
        let end = last.narrow(1, self.end(ids), 1)?;
        self.final_layer_norm.forward(cx, &end)?.squeeze(1)
    }

    /// The position of the end token, whose hidden state stands for the whole text: the first one,
    /// as padding may be the same token; ids of added tokens are larger than it.
    fn end(&self, ids: &[u32]) -> usize {
        let in_vocabulary = ids.iter().filter(|id| (**id as usize) < self.vocab_size);
        let end = if self.eos_token_id == WRONG_EOS {
            in_vocabulary.max()
        } else {
            Some(&self.eos_token_id)
        };
        ids.iter().position(|id| Some(id) == end).unwrap_or(0)
    }

    /// Sums token and position embeddings of ids [n] to [1, n, hidden].
    fn embed(&self, ids: &[u32]) -> TensorResult<Tensor> {
        let positions = self.positions.narrow(0, 0, ids.len())?;
        self.tokens
            .index_select(&Tensor::new(ids, self.tokens.device())?, 0)?
            .add(&positions)?
            .unsqueeze(0)
    }

    /// Runs hidden states [1, n, hidden] through some of the layers.
    fn run(&self, cx: Forward, mut x: Tensor, layers: Range<usize>) -> TensorResult<Tensor> {
        let mask = causal_mask(x.dim(1)?, x.device())?.to_dtype(x.dtype())?;
        for layer in self.layers.get(layers).unwrap_or_default() {
            x = layer.forward(cx, &x, &mask)?;
        }
        Ok(x)
    }
}

/// The causal mask [n, n]: 0 up to a token itself, minus infinity after it.
fn causal_mask(n: usize, device: &Device) -> TensorResult<Tensor> {
    let values: Vec<f32> = (0..n * n)
        .map(|i| {
            if i % n > i / n {
                f32::NEG_INFINITY
            } else {
                0.0
            }
        })
        .collect();
    Tensor::from_vec(values, (n, n), device)
}

struct Layer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    activation: Activation,
    heads: usize,
}

impl Layer {
    fn new(w: &Weights, config: &ClipConfig, activation: Activation) -> Result<Self> {
        let (hidden, inner, eps) = (
            config.hidden_size,
            config.intermediate_size,
            config.layer_norm_eps,
        );
        let projection = |name: &str| Linear::new(&w.at("self_attn").at(name), hidden, hidden);
        Ok(Self {
            layer_norm1: LayerNorm::new(&w.at("layer_norm1"), hidden, eps)?,
            q_proj: projection("q_proj")?,
            k_proj: projection("k_proj")?,
            v_proj: projection("v_proj")?,
            out_proj: projection("out_proj")?,
            layer_norm2: LayerNorm::new(&w.at("layer_norm2"), hidden, eps)?,
            fc1: Linear::new(&w.at("mlp.fc1"), hidden, inner)?,
            fc2: Linear::new(&w.at("mlp.fc2"), inner, hidden)?,
            activation,
            heads: config.num_attention_heads,
        })
    }

    fn forward(&self, cx: Forward, x: &Tensor, mask: &Tensor) -> TensorResult<Tensor> {
        let h = self.layer_norm1.forward(cx, x)?;
        let (q, k, v) = (
            self.q_proj.forward(cx, &h)?,
            self.k_proj.forward(cx, &h)?,
            self.v_proj.forward(cx, &h)?,
        );
        let x = (x + self
            .out_proj
            .forward(cx, &plain::attention(&q, &k, &v, self.heads, Some(mask))?)?)?;
        let h = self
            .activation
            .forward(&self.fc1.forward(cx, &self.layer_norm2.forward(cx, &x)?)?)?;
        x + self.fc2.forward(cx, &h)?
    }
}
