//! Qwen3 (Qwen Team 2025, arXiv 2505.09388) as a text encoder: a causal transformer of which hidden
//! states in its middle are taken, not what it would say next. With its tokenizer and the frame
//! that its prompts are put in.

use crate::nn::Forward;
use crate::nn::layers::{Embedding, Linear, RmsNorm, swiglu};
use crate::nn::plain;
use crate::nn::rotary::{Pairs, Rotary, frequencies};
use crate::nn::stack::Stack;
use crate::nn::weights::{SharedSource, Weights};
use crate::weights::config::{parse, require_sizes};
use crate::weights::{Checkpoint, TokenizerFiles, TokenizerSource};
use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::{DType, Device, Result as TensorResult, Tensor};
use serde::Deserialize;
use serde_json::Value;

/// The most tokens of a prompt.
const TOKENS: usize = 512;
/// The token of padding.
const PADDING: &str = "<|endoftext|>";

/// How a family of models has a prompt read.
#[derive(Debug, PartialEq, Eq)]
pub struct Reading {
    /// what follows the prompt in its conversation
    answer: &'static str,
    /// the hidden states that are taken, as transformers counts them: 0 is the first layer's input;
    /// those below 0 count from the last layer's output, -1
    states: &'static [isize],
    /// whether prompts are padded to the same length, and padding is read
    is_padded: bool,
}

/// FLUX.2 klein's.
pub const OF_FLUX2_KLEIN: Reading = Reading {
    answer: "<think>\n\n</think>\n\n",
    states: &[9, 18, 27],
    is_padded: true,
};
/// Z-Image's.
pub const OF_Z_IMAGE: Reading = Reading {
    answer: "",
    states: &[-2],
    is_padded: false,
};

impl Reading {
    /// The width of the embeddings of an encoder's hidden states of this width.
    pub fn width(&self, hidden: usize) -> usize {
        self.states.len() * hidden
    }

    /// How many layers of an encoder are run.
    pub fn depth(&self, config: &Qwen3Config) -> Result<usize> {
        Ok(self.layers(config)?.into_iter().max().unwrap_or(0))
    }

    /// The layers whose outputs are taken, counted from 1. Errors if the encoder has not so many.
    fn layers(&self, config: &Qwen3Config) -> Result<Vec<usize>> {
        let depth = config.num_hidden_layers;
        let layer = |state: &isize| match usize::try_from(*state) {
            Ok(layer) => layer,
            Err(_) => (depth + 1).saturating_sub(state.unsigned_abs()),
        };
        let layers: Vec<usize> = self.states.iter().map(layer).collect();
        if let Some(layer) = layers.iter().find(|layer| !(1..=depth).contains(*layer)) {
            bail!(
                "the text encoder has {depth} layers, the model takes the output of its layer {layer}\n\nhint: the parts of the model do not belong together; fetch it again"
            );
        }
        Ok(layers)
    }
}

/// `text_encoder/config.json`, with the defaults of transformers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct Qwen3Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_parameters: RopeParameters,
}

/// Where newer versions of transformers write `rope_theta`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct RopeParameters {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
}

impl Default for Qwen3Config {
    fn default() -> Self {
        Self {
            vocab_size: 151_936,
            hidden_size: 4096,
            intermediate_size: 22_016,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 32,
            head_dim: 128,
            rms_norm_eps: 1e-6,
            rope_theta: None,
            rope_parameters: RopeParameters::default(),
        }
    }
}

impl Qwen3Config {
    /// Whether a text encoder is of this architecture.
    pub fn is_of(config: &Value) -> bool {
        config.get("model_type").is_some_and(|kind| kind == "qwen3")
    }

    /// Parses config.json. A value that would change the result and is not supported is an error
    /// that names it.
    pub fn from_json(value: &Value) -> Result<Self> {
        let config: Self = parse("text encoder", value)?;
        require_sizes(
            "text encoder",
            [
                ("vocab_size", config.vocab_size, 1..=1 << 22),
                ("hidden_size", config.hidden_size, 1..=1 << 16),
                ("intermediate_size", config.intermediate_size, 1..=1 << 18),
                ("num_hidden_layers", config.num_hidden_layers, 1..=512),
                (
                    "num_attention_heads",
                    config.num_attention_heads,
                    1..=1 << 10,
                ),
                (
                    "num_key_value_heads",
                    config.num_key_value_heads,
                    1..=1 << 10,
                ),
                ("head_dim", config.head_dim, 2..=1 << 12),
            ],
        )?;
        ensure!(
            config
                .num_attention_heads
                .is_multiple_of(config.num_key_value_heads)
                && config.head_dim.is_multiple_of(2),
            "`num_key_value_heads` {} or `head_dim` {} of the text encoder does not fit its {} heads",
            config.num_key_value_heads,
            config.head_dim,
            config.num_attention_heads
        );
        for (key, neutral) in [("attention_bias", false), ("use_sliding_window", false)] {
            if value
                .get(key)
                .is_some_and(|found| *found != neutral && !found.is_null())
            {
                bail!("`{key}` of the text encoder is true, which sdgen does not support");
            }
        }
        let kind = config
            .rope_parameters
            .rope_type
            .as_deref()
            .unwrap_or("default");
        ensure!(
            kind == "default" && value.get("rope_scaling").is_none_or(Value::is_null),
            "the text encoder scales its positions (`rope_scaling`), which sdgen does not support"
        );
        let activation = value
            .get("hidden_act")
            .and_then(Value::as_str)
            .unwrap_or("silu");
        ensure!(
            activation == "silu",
            "`hidden_act` of the text encoder is `{activation}`, which sdgen does not support"
        );
        Ok(config)
    }

    fn rope_theta(&self) -> f64 {
        let theta = self.rope_parameters.rope_theta.or(self.rope_theta);
        theta.unwrap_or(1e6)
    }
}

/// Qwen's tokenizer, in the frame of a conversation of one message.
pub struct ChatTokenizer {
    inner: tokenizers::Tokenizer,
    padding: u32,
    reading: &'static Reading,
}

/// A prompt's tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatTokens {
    pub ids: Vec<u32>,
    /// how many are no padding
    pub len: usize,
    /// the text that was cut off, if any
    pub cut: Option<String>,
}

impl ChatTokenizer {
    /// Builds the tokenizer of a checkpoint, whose prompts are read so. Errors if its files are
    /// damaged, or if it has more tokens than the encoder has rows.
    pub fn new(source: &TokenizerSource, rows: usize, reading: &'static Reading) -> Result<Self> {
        let TokenizerFiles::Json(json) = &source.files else {
            bail!(
                "the tokenizer of the text encoder has no tokenizer.json\n\nhint: fetch the model again"
            )
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
        let padding = inner.token_to_id(PADDING).with_context(|| {
            format!("the tokenizer lacks its token `{PADDING}`\n\nhint: fetch the tokenizer again")
        })?;
        Ok(Self {
            inner,
            padding,
            reading,
        })
    }

    /// The ids of a prompt as a text encoder reads it: a user's message, and the beginning of an
    /// answer.
    pub fn encode(&self, prompt: &str) -> Result<ChatTokens> {
        let text = format!(
            "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{}",
            self.reading.answer
        );
        let encoded = self
            .inner
            .encode(text.as_str(), false)
            .map_err(|cause| anyhow!("the prompt cannot be tokenized: {cause}"))?;
        let mut ids = encoded.get_ids().to_vec();
        let len = ids.len().min(TOKENS);
        let cut = encoded.get_offsets().get(TOKENS).and_then(|(from, _)| {
            text.get(*from..)
                .map(|rest| rest.split("<|im_end|>").next().unwrap_or(rest).to_string())
        });
        let padded = if self.reading.is_padded { TOKENS } else { len };
        ids.resize(padded, self.padding);
        Ok(ChatTokens { ids, len, cut })
    }
}

/// The encoder, as far as it is needed.
pub struct Qwen3 {
    embed_tokens: Embedding,
    layers: Stack<Layer>,
    taps: Vec<usize>,
    rotary_theta: f64,
    head_dim: usize,
    dtype: DType,
}

impl Qwen3 {
    /// Reads the encoder of a checkpoint, with the layers up to the last whose output is taken; they
    /// are not kept where a source is given to read them from `again`. Errors if there are not so
    /// many.
    pub fn read(
        checkpoint: &Checkpoint,
        component: &str,
        config: &Qwen3Config,
        reading: &Reading,
        to: (&Device, DType),
        again: Option<SharedSource>,
    ) -> Result<Self> {
        let (taps, depth) = (reading.layers(config)?, reading.depth(config)?);
        // a language model has the encoder below itself
        let embeddings = format!("{component}.model.embed_tokens.weight");
        let inner = match checkpoint.shape(&embeddings) {
            Some(_) => "model.",
            None => "",
        };
        // later layers, and what makes words of their output, are not read
        let used: Vec<String> = (0..depth).map(|i| format!("{inner}layers.{i}.")).collect();
        let used: Vec<&str> = used.iter().map(String::as_str).collect();
        checkpoint.read_network(component, &used, to, |w| {
            let w = w.reading_again(again);
            match inner {
                "" => Self::new(&w, config, &taps, depth),
                _ => Self::new(&w.at("model"), config, &taps, depth),
            }
        })
    }

    fn new(w: &Weights, config: &Qwen3Config, taps: &[usize], depth: usize) -> Result<Self> {
        let (rows, width) = (config.vocab_size, config.hidden_size);
        Ok(Self {
            embed_tokens: Embedding::new(&w.at("embed_tokens"), rows, width)?,
            layers: Stack::new(&w.at("layers"), depth, {
                let config = config.clone();
                move |w| Layer::new(w, &config)
            })?,
            taps: taps.to_vec(),
            rotary_theta: config.rope_theta(),
            head_dim: config.head_dim,
            dtype: w.arithmetic(),
        })
    }

    /// Encodes ids, of which the first `len` are text and the others padding: the outputs of the
    /// tapped layers side by side, [1, n, taps*hidden]. Padding sees the text, and nothing sees
    /// padding.
    pub fn forward(&self, cx: Forward, ids: &[u32], len: usize) -> TensorResult<Tensor> {
        let device = self.embed_tokens.device();
        let mut x = self.embed_tokens.forward(ids)?.unsqueeze(0)?;
        let angles: Vec<Vec<f64>> = (0..ids.len())
            .map(|at| {
                frequencies(self.rotary_theta, self.head_dim)
                    .map(|f| at as f64 * f)
                    .collect()
            })
            .collect();
        let rotary = Rotary::new(&angles, Pairs::Halves, device)?;
        let mask = mask(ids.len(), len, device)?.to_dtype(self.dtype)?;
        let (mut tapped, mut done) = (vec![], 0);
        self.layers.each(|layer| {
            x = layer.forward(cx, &x, &rotary, &mask, len)?;
            done += 1;
            if self.taps.contains(&done) {
                tapped.push(x.clone());
            }
            Ok(())
        })?;
        Tensor::cat(&tapped, 2)
    }
}

/// What is added to scores [n, len]: 0 up to a token itself, minus infinity after it.
fn mask(n: usize, len: usize, device: &Device) -> TensorResult<Tensor> {
    let value = |i: usize| match i % len > i / len {
        true => f32::NEG_INFINITY,
        false => 0.0,
    };
    Tensor::from_vec(
        (0..n * len).map(value).collect::<Vec<_>>(),
        (n, len),
        device,
    )
}

struct Layer {
    input_layernorm: RmsNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    q_norm: RmsNorm,
    k_norm: RmsNorm,
    o_proj: Linear,
    post_attention_layernorm: RmsNorm,
    gate_up: Linear,
    down_proj: Linear,
    heads: usize,
    kv_heads: usize,
}

impl Layer {
    fn new(w: &Weights, config: &Qwen3Config) -> Result<Self> {
        let (hidden, inner, eps) = (
            config.hidden_size,
            config.intermediate_size,
            config.rms_norm_eps,
        );
        let (own, shared) = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        );
        let (attn, mlp) = (w.at("self_attn"), w.at("mlp"));
        let norm = |w: &Weights, name: &str, width| RmsNorm::new(&w.at(name), width, eps);
        let linear =
            |name: &str, inputs, outputs| Linear::without_bias(&attn.at(name), inputs, outputs);
        Ok(Self {
            input_layernorm: norm(w, "input_layernorm", hidden)?,
            q_proj: linear("q_proj", hidden, own)?,
            k_proj: linear("k_proj", hidden, shared)?,
            v_proj: linear("v_proj", hidden, shared)?,
            q_norm: norm(&attn, "q_norm", config.head_dim)?,
            k_norm: norm(&attn, "k_norm", config.head_dim)?,
            o_proj: linear("o_proj", own, hidden)?,
            post_attention_layernorm: norm(w, "post_attention_layernorm", hidden)?,
            gate_up: Linear::fused(
                &[(mlp.at("gate_proj"), inner), (mlp.at("up_proj"), inner)],
                hidden,
                false,
            )?,
            down_proj: Linear::without_bias(&mlp.at("down_proj"), inner, hidden)?,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
        })
    }

    /// x [1, n, hidden], of which the first `len` are keys.
    fn forward(
        &self,
        cx: Forward,
        x: &Tensor,
        rotary: &Rotary,
        mask: &Tensor,
        len: usize,
    ) -> TensorResult<Tensor> {
        let (b, n, _) = x.dims3()?;
        let entered = self.input_layernorm.forward(cx, x)?;
        let turned = |projection: &Linear, norm: &RmsNorm, heads: usize| {
            let heads_of = projection
                .forward(cx, &entered)?
                .reshape((b, n, heads, ()))?;
            let normed = norm.forward(cx, &heads_of)?.reshape((b, n, ()))?;
            rotary.turn(cx, &normed, heads)
        };
        let q = turned(&self.q_proj, &self.q_norm, self.heads)?;
        let k = turned(&self.k_proj, &self.k_norm, self.kv_heads)?.narrow(1, 0, len)?;
        let v = self.v_proj.forward(cx, &entered)?.narrow(1, 0, len)?;
        // each key and value is that of several heads
        let repeated = |x: &Tensor| {
            let each = self.heads / self.kv_heads;
            let x = x.contiguous()?.reshape((b, len, self.kv_heads, 1, ()))?;
            let x = x.repeat((1, 1, 1, each, 1))?;
            x.reshape((b, len, ()))
        };
        let (k, v) = (repeated(&k)?, repeated(&v)?);
        let attended = plain::attention(&q, &k, &v, self.heads, Some(mask))?;
        let x = (x + self.o_proj.forward(cx, &attended)?)?;
        let entered = self.post_attention_layernorm.forward(cx, &x)?;
        let inner = swiglu(cx, &self.gate_up.forward(cx, &entered)?)?;
        &x + self.down_proj.forward(cx, &inner)?
    }
}
