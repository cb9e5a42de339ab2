//! T5's encoder (Raffel et al. 2020, arXiv 1910.10683; version 1.1, with gates) and its tokenizer,
//! which read a whole sentence where CLIP reads a caption.

use crate::nn::Forward;
use crate::nn::layers::{Embedding, Linear, RmsNorm, gelu_tanh};
use crate::nn::stack::Stack;
use crate::nn::weights::{SharedSource, Weights};
use crate::weights::config::{parse, require_sizes};
use crate::weights::{Checkpoint, TokenizerFiles, TokenizerSource};
use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::{D, DType, Device, Result as TensorResult, Tensor};
use serde::Deserialize;
use serde_json::Value;

/// The tokens that end and pad a text.
const END: &str = "</s>";
const PADDING: &str = "<pad>";

/// The names of the embeddings of tokens, of which files have one or both.
const EMBEDDINGS: [&str; 2] = ["shared", "encoder.embed_tokens"];

/// `text_encoder_2/config.json`, with the defaults of transformers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct T5Config {
    pub vocab_size: usize,
    pub d_model: usize,
    /// the width of a head
    pub d_kv: usize,
    pub d_ff: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub relative_attention_num_buckets: usize,
    pub relative_attention_max_distance: usize,
    pub layer_norm_epsilon: f64,
}

impl Default for T5Config {
    fn default() -> Self {
        Self {
            vocab_size: 32_128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
        }
    }
}

impl T5Config {
    /// Whether a text encoder is of this architecture.
    pub fn is_of(config: &Value) -> bool {
        config.get("model_type").is_some_and(|kind| kind == "t5")
    }

    /// Parses config.json. A value that would change the result and is not supported is an error
    /// that names it.
    pub fn from_json(value: &Value) -> Result<Self> {
        let config: Self = parse("text encoder", value)?;
        require_sizes(
            "text encoder",
            [
                ("vocab_size", config.vocab_size, 1..=1 << 22),
                ("d_model", config.d_model, 1..=1 << 16),
                ("d_kv", config.d_kv, 1..=1 << 12),
                ("d_ff", config.d_ff, 1..=1 << 18),
                ("num_layers", config.num_layers, 1..=512),
                ("num_heads", config.num_heads, 1..=1 << 10),
                (
                    "relative_attention_num_buckets",
                    config.relative_attention_num_buckets,
                    4..=1 << 12,
                ),
                (
                    "relative_attention_max_distance",
                    config.relative_attention_max_distance,
                    config.relative_attention_num_buckets..=1 << 20,
                ),
            ],
        )?;
        let activation = value
            .get("feed_forward_proj")
            .and_then(Value::as_str)
            .unwrap_or("relu");
        ensure!(
            activation == "gated-gelu",
            "`feed_forward_proj` of the text encoder is `{activation}`, which sdgen does not support\n\nhint: models here read T5 of version 1.1, `gated-gelu`"
        );
        Ok(config)
    }

    fn inner(&self) -> usize {
        self.num_heads * self.d_kv
    }
}

/// T5's tokenizer: pieces of words, the likeliest together.
pub struct T5Tokenizer {
    inner: tokenizers::Tokenizer,
    end: u32,
    padding: u32,
}

/// A prompt's tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct T5Tokens {
    pub ids: Vec<u32>,
    /// the text that was cut off, if any
    pub cut: Option<String>,
}

impl T5Tokenizer {
    /// Builds the tokenizer of a checkpoint. Errors if its files are damaged, or if it has more tokens
    /// than the encoder has rows.
    pub fn new(source: &TokenizerSource, rows: usize) -> Result<Self> {
        let TokenizerFiles::Json(json) = &source.files else {
            bail!("the tokenizer of T5 has no tokenizer.json\n\nhint: fetch the model again")
        };
        let mut inner: tokenizers::Tokenizer = json
            .parse()
            .map_err(|cause| anyhow!("tokenizer.json is damaged: {cause}"))?;
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|cause| anyhow!("{cause}"))?;
        let last = inner.get_vocab(true).into_values().max().unwrap_or(0) as usize;
        ensure!(
            last < rows,
            "the tokenizer has ids up to {last}, the text encoder {rows} embeddings\n\nhint: the two do not belong together; fetch both again"
        );
        let id = |token: &str| {
            inner.token_to_id(token).with_context(|| {
                format!(
                    "the tokenizer lacks its token `{token}`\n\nhint: fetch the tokenizer again"
                )
            })
        };
        let (end, padding) = (id(END)?, id(PADDING)?);
        Ok(Self {
            inner,
            end,
            padding,
        })
    }

    /// The ids of a prompt and its end, padded or cut to so many.
    pub fn encode(&self, prompt: &str, length: usize) -> Result<T5Tokens> {
        let encoded = self
            .inner
            .encode(prompt, false)
            .map_err(|cause| anyhow!("the prompt cannot be tokenized: {cause}"))?;
        let most = length.saturating_sub(1);
        let mut ids = encoded.get_ids().to_vec();
        let cut = encoded
            .get_offsets()
            .get(most)
            .and_then(|(from, _)| Some(prompt.get(*from..)?.to_string()));
        ids.truncate(most);
        ids.push(self.end);
        ids.resize(length, self.padding);
        Ok(T5Tokens { ids, cut })
    }
}

/// The encoder.
pub struct T5 {
    embeddings: Embedding,
    /// [buckets, heads]
    relative_attention_bias: Tensor,
    layers: Stack<Layer>,
    final_layer_norm: RmsNorm,
    config: T5Config,
}

impl T5 {
    /// Reads the encoder of a checkpoint. Its layers are not kept where a source is given to read
    /// them from `again`.
    pub fn read(
        checkpoint: &Checkpoint,
        component: &str,
        config: &T5Config,
        (device, dtype): (&Device, DType),
        again: Option<SharedSource>,
    ) -> Result<Self> {
        // its states grow beyond the numbers of f16
        let dtype = match dtype {
            DType::F16 if !device.is_cpu() => DType::BF16,
            dtype => dtype,
        };
        let parts = ["encoder.block.", "encoder.final_layer_norm."];
        let has = |name: &&str| {
            let name = format!("{component}.{name}.weight");
            checkpoint.shape(&name).is_some()
        };
        let [first, ..] = EMBEDDINGS;
        let embeddings = EMBEDDINGS.into_iter().find(has).unwrap_or(first);
        checkpoint.read_network(component, &parts, (device, dtype), |w| {
            Self::new(&w.reading_again(again), config, embeddings)
        })
    }

    fn new(w: &Weights, config: &T5Config, embeddings: &str) -> Result<Self> {
        let encoder = w.at("encoder");
        let (width, buckets) = (config.d_model, config.relative_attention_num_buckets);
        let first = encoder.at("block.0.layer.0.SelfAttention.relative_attention_bias");
        Ok(Self {
            embeddings: Embedding::new(&w.at(embeddings), config.vocab_size, width)?,
            relative_attention_bias: first.get("weight", &[buckets, config.num_heads])?,
            layers: Stack::new(&encoder.at("block"), config.num_layers, {
                let config = config.clone();
                move |w| Layer::new(&w.at("layer"), &config)
            })?,
            final_layer_norm: RmsNorm::new(
                &encoder.at("final_layer_norm"),
                width,
                config.layer_norm_epsilon,
            )?,
            config: config.clone(),
        })
    }

    /// Whether a network reads a tensor of this name: the embeddings are in some files twice.
    pub fn reads(has_shared: bool, name: &str) -> bool {
        !(has_shared && name.starts_with(EMBEDDINGS[1]))
    }

    /// Encodes ids, of which padding is read as text is: [1, n, d_model].
    pub fn forward(&self, cx: Forward, ids: &[u32]) -> TensorResult<Tensor> {
        let mut x = self.embeddings.forward(ids)?.unsqueeze(0)?;
        let bias = self.bias(ids.len())?;
        self.layers.each(|layer| {
            x = layer.forward(cx, &x, &bias)?;
            Ok(())
        })?;
        self.final_layer_norm.forward(cx, &x)
    }

    /// What is added to the scores of n tokens by their distance, [1, heads, n, n]; the first layer's
    /// is that of all.
    fn bias(&self, n: usize) -> TensorResult<Tensor> {
        let T5Config {
            num_heads,
            relative_attention_num_buckets,
            relative_attention_max_distance,
            ..
        } = self.config;
        let of = |i: usize| {
            let (buckets, most) = (
                relative_attention_num_buckets,
                relative_attention_max_distance,
            );
            bucket(i / n, i % n, buckets, most)
        };
        let ids: Vec<u32> = (0..n * n).map(of).collect();
        let ids = Tensor::from_vec(ids, n * n, self.relative_attention_bias.device())?;
        self.relative_attention_bias
            .index_select(&ids, 0)?
            .reshape((1, n, n, num_heads))?
            .permute((0, 3, 1, 2))?
            .contiguous()
    }
}

/// The bucket of the distance from one token to another: a half of all for those before, and for
/// those after; a half of these for a distance each, the others for ever longer ranges.
fn bucket(from: usize, to: usize, buckets: usize, most: usize) -> u32 {
    let each = buckets / 2;
    let exact = each / 2;
    let start = if to > from { each } else { 0 };
    let distance = from.abs_diff(to);
    let own = if distance < exact {
        distance
    } else {
        // in f32, as transformers has it
        let share = (distance as f32 / exact as f32).ln() / (most as f32 / exact as f32).ln();
        (exact + (share * (each - exact) as f32) as usize).min(each - 1)
    };
    (start + own) as u32
}

struct Layer {
    attention_norm: RmsNorm,
    qkv: Linear,
    o: Linear,
    ff_norm: RmsNorm,
    wi: Linear,
    wo: Linear,
    heads: usize,
}

impl Layer {
    fn new(w: &Weights, config: &T5Config) -> Result<Self> {
        let (width, inner) = (config.d_model, config.inner());
        let (attention, ff) = (w.at("0.SelfAttention"), w.at("1.DenseReluDense"));
        let norm = |name: &str| RmsNorm::new(&w.at(name), width, config.layer_norm_epsilon);
        let qkv = ["q", "k", "v"].map(|name| (attention.at(name), inner));
        let gated = ["wi_0", "wi_1"].map(|name| (ff.at(name), config.d_ff));
        Ok(Self {
            attention_norm: norm("0.layer_norm")?,
            qkv: Linear::fused(&qkv, width, false)?,
            o: Linear::without_bias(&attention.at("o"), inner, width)?,
            ff_norm: norm("1.layer_norm")?,
            wi: Linear::fused(&gated, width, false)?,
            wo: Linear::without_bias(&ff.at("wo"), config.d_ff, width)?,
            heads: config.num_heads,
        })
    }

    /// x [1, n, d_model]; what is added to scores, [1, heads, n, n].
    fn forward(&self, cx: Forward, x: &Tensor, bias: &Tensor) -> TensorResult<Tensor> {
        let entered = self.attention_norm.forward(cx, x)?;
        let qkv = self.qkv.forward(cx, &entered)?.chunk(3, D::Minus1)?;
        let [q, k, v] = qkv.as_slice() else {
            candle_core::bail!("queries, keys and values are three")
        };
        let attended = attention(q, k, v, self.heads, bias)?;
        let x = self.o.forward_add(cx, &attended, x)?.reshape(x.shape())?;
        let entered = self.ff_norm.forward(cx, &x)?;
        let inner = self.wi.forward(cx, &entered)?.chunk(2, D::Minus1)?;
        let [gate, inner] = inner.as_slice() else {
            candle_core::bail!("an odd width cannot be halved")
        };
        let inner = (gelu_tanh(cx, &gate.contiguous()?)? * inner)?;
        self.wo.forward_add(cx, &inner, &x)?.reshape(x.shape())
    }
}

/// softmax(q k' + bias) v for [1, n, heads*d] each; scores are not scaled.
fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    bias: &Tensor,
) -> TensorResult<Tensor> {
    let (b, n, width) = q.dims3()?;
    let split = |x: &Tensor| {
        x.reshape((b, n, heads, width / heads))?
            .transpose(1, 2)?
            .contiguous() // [b, heads, n, d]
    };
    let scores = split(q)?.matmul(&split(k)?.transpose(2, 3)?)?;
    let weights = candle_nn::ops::softmax_last_dim(&scores.broadcast_add(bias)?)?;
    let attended = weights.matmul(&split(v)?)?;
    attended.transpose(1, 2)?.reshape((b, n, width))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_fall_into_buckets_as_in_transformers() {
        // `T5Attention._relative_position_bucket` of these distances from a token to another
        for (distance, expected) in [
            (0, 0),
            (-1, 1),
            (-7, 7),
            (-8, 8),
            (-11, 8),
            (-12, 9),
            (-16, 10),
            (-32, 12),
            (-64, 14),
            (-90, 14),
            (-91, 15),
            (-500, 15),
            (1, 17),
            (8, 24),
            (127, 31),
        ] {
            let to = (500 + distance) as usize;
            assert_eq!(bucket(500, to, 32, 128), expected, "{distance}");
        }
    }
}
