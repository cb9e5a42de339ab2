//! All text encoders of a checkpoint: from a prompt to the embeddings that its U-Net attends to.
//!
//! Hides of which architecture an encoder is (`TextEncoder`), and that SDXL has two, of which other
//! hidden states are taken than of a single one. Start at [`PromptEncoder::encode`].

use super::clip::{Clip, ClipConfig};
use super::prompt::{Segment, Syntax, segments};
use super::qwen3::{ChatTokenizer, OF_FLUX2_KLEIN, OF_Z_IMAGE, Qwen3, Qwen3Config, Reading};
use super::tokenizer::{Chunk, Tokenizer};
use crate::nn::Forward;
use crate::nn::device::Compute;
use crate::nn::weights::SharedSource;
use crate::weights::{BlockBytes, Checkpoint, ENCODERS, TRANSFORMER, Z_IMAGE_CLASS};
use anyhow::{Result, bail, ensure};
use candle_core::{DType, Device, Result as TensorResult, Tensor};
use serde_json::Value;
use std::collections::HashSet;
use std::sync::Arc;

/// The embeddings of a prompt, under diffusers' names.
#[derive(Clone)]
pub struct PromptEmbeds {
    /// token ids of all encoders, one after the other, where all learned tokens have the same id;
    /// empty where the embeddings are zeros
    pub token_ids: Vec<u32>,
    /// [1, n, d]
    pub prompt_embeds: Tensor,
    /// [1, p], where an encoder projects the whole text
    pub pooled_prompt_embeds: Option<Tensor>,
}

impl PromptEmbeds {
    /// Interpolates linearly to `other`, which has the same shapes: `weight` 0 is this, 1 the other.
    pub fn lerp(&self, other: &Self, weight: f64) -> TensorResult<Self> {
        let mix = |a: &Tensor, b: &Tensor| (a * (1.0 - weight))? + (b * weight)?;
        let pooled = self
            .pooled_prompt_embeds
            .as_ref()
            .zip(other.pooled_prompt_embeds.as_ref());
        Ok(Self {
            token_ids: [&*self.token_ids, &other.token_ids].concat(),
            prompt_embeds: mix(&self.prompt_embeds, &other.prompt_embeds)?,
            pooled_prompt_embeds: pooled.map(|(a, b)| mix(a, b)).transpose()?,
        })
    }

    /// Returns zeros of the same shapes.
    pub fn zeros_like(&self) -> TensorResult<Self> {
        let pooled = self.pooled_prompt_embeds.as_ref();
        Ok(Self {
            token_ids: vec![],
            prompt_embeds: self.prompt_embeds.zeros_like()?,
            pooled_prompt_embeds: pooled.map(Tensor::zeros_like).transpose()?,
        })
    }
}

/// The configuration of one text encoder, by its architecture.
#[derive(Debug, Clone)]
enum TextEncoderConfig {
    Clip(ClipConfig),
    Qwen3(Qwen3Config, &'static Reading),
}

impl TextEncoderConfig {
    /// Parses the configuration of either architecture; `class` is that of the transformer that the
    /// checkpoint has.
    fn from_json(config: &Value, class: Option<&str>) -> Result<Self> {
        if Qwen3Config::is_of(config) {
            let reading = match class {
                Some(Z_IMAGE_CLASS) => &OF_Z_IMAGE,
                _ => &OF_FLUX2_KLEIN,
            };
            return Ok(Self::Qwen3(Qwen3Config::from_json(config)?, reading));
        }
        ClipConfig::from_json(config).map(Self::Clip)
    }

    fn clip(&self) -> Option<&ClipConfig> {
        match self {
            Self::Clip(config) => Some(config),
            Self::Qwen3(..) => None,
        }
    }
}

/// The configurations of all text encoders that a checkpoint has, by their component.
#[derive(Debug, Clone)]
pub struct TextEncoderConfigs(Vec<(&'static str, TextEncoderConfig)>);

impl TextEncoderConfigs {
    /// Parses the configuration of every text encoder.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let mut configs = vec![];
        let transformer = checkpoint.optional_config(TRANSFORMER);
        let class = transformer.and_then(|config| config.get("_class_name")?.as_str());
        for name in ENCODERS {
            if let Some(config) = checkpoint.optional_config(name) {
                configs.push((name, TextEncoderConfig::from_json(config, class)?));
            }
        }
        Ok(Self(configs))
    }

    /// The width of the pooled embedding, if there is one: only the second encoder projects the
    /// whole text.
    pub fn pooled_dim(&self) -> Option<usize> {
        self.0
            .iter()
            .find(|(name, _)| *name == ENCODERS[1])
            .and_then(|(_, config)| Some(config.clip()?.projection_dim))
    }

    /// Whether prompts are read as a conversation, by a language model.
    pub fn is_chat(&self) -> bool {
        self.0.iter().any(|(_, config)| config.clip().is_none())
    }

    /// The bytes of the tensors of a language model that are read; 0 where there is none.
    pub fn chat_bytes(&self, checkpoint: &Checkpoint) -> Result<BlockBytes> {
        let Some((name, TextEncoderConfig::Qwen3(config, reading))) = self.0.first() else {
            return Ok(BlockBytes::default());
        };
        let depth = reading.depth(config)?;
        let is_read = |tensor: &str| {
            let mut parts = tensor
                .split('.')
                .skip_while(|part| *part != "layers")
                .skip(1);
            let layer = parts.next().and_then(|number| number.parse::<usize>().ok());
            !tensor.starts_with("lm_head") && layer.is_none_or(|layer| layer < depth)
        };
        Ok(checkpoint.block_bytes(name, is_read))
    }

    /// The width of the embeddings that a network attends to.
    pub fn context_dim(&self) -> usize {
        let width = |(_, config): &(_, TextEncoderConfig)| match config {
            TextEncoderConfig::Clip(config) => config.hidden_size,
            TextEncoderConfig::Qwen3(config, reading) => reading.width(config.hidden_size),
        };
        self.0.iter().map(width).sum()
    }

    /// The largest `clip_skip`: one more would leave an encoder without layers, or take others than
    /// those that a language model is read at.
    pub fn layers(&self) -> usize {
        if self.is_chat() {
            return 1;
        }
        let unused = usize::from(self.pooled_dim().is_some());
        self.0
            .iter()
            .filter_map(|(_, config)| Some(config.clip()?.num_hidden_layers.saturating_sub(unused)))
            .min()
            .unwrap_or(0)
    }

    /// Builds the tokenizer of each of CLIP's encoders, which knows the checkpoint's textual
    /// inversions too: their ids follow the vocabulary's. Errors if one of them was not made for
    /// these encoders.
    fn tokenizers(&self, checkpoint: &Checkpoint) -> Result<Vec<Tokenizer>> {
        if let (true, Some(embedding)) = (self.is_chat(), checkpoint.embeddings().first()) {
            bail!(
                "{}",
                embedding.mismatch("the text encoder of this model learns no words so")
            );
        }
        let tokenizer = |(name, config): (&'static str, &ClipConfig)| {
            let source = checkpoint.tokenizer(name)?;
            let mut tokenizer = Tokenizer::new(&source.files, &source.config)?;
            tokenizer.require_rows(config.vocab_size, name)?;
            let mut next = config.vocab_size as u32;
            for embedding in checkpoint.embeddings() {
                embedding.vectors_for(name, config.hidden_size)?;
                ensure!(
                    self.pooled_dim().is_some() || embedding.parts.len() == 1,
                    "{}",
                    embedding.mismatch("the one encoder of this model takes one kind")
                );
                let end = next + embedding.vectors as u32;
                let most = config.max_position_embeddings;
                tokenizer.add_token(&embedding.token, next..end, most)?;
                next = end;
            }
            Ok(tokenizer)
        };
        let clips = self
            .0
            .iter()
            .filter_map(|(name, config)| Some((*name, config.clip()?)));
        clips.map(tokenizer).collect()
    }

    /// The words of texts that are not in the first encoder's vocabulary, neither as they stand nor,
    /// for English plurals, in the singular; each once. Errors if a text cannot be tokenized.
    pub fn unknown_words<'t>(
        &self,
        checkpoint: &Checkpoint,
        texts: impl Iterator<Item = &'t str>,
    ) -> Result<Vec<&'t str>> {
        let mut unknown = vec![];
        let Some(tokenizer) = self.tokenizers(checkpoint)?.into_iter().next() else {
            return Ok(unknown);
        };
        let mut seen = HashSet::new();
        let is_letter = |c: char| c.is_alphabetic();
        for word in texts.flat_map(|text| text.split(move |c: char| !is_letter(c))) {
            if !seen.insert(word) || tokenizer.knows(word)? {
                continue;
            }
            let endings = [("s", ""), ("es", ""), ("ies", "y"), ("ves", "f")];
            let mut singulars = endings
                .iter()
                .filter_map(|(plural, one)| Some(format!("{}{one}", word.strip_suffix(plural)?)));
            if !singulars.any(|one| one.len() > 2 && tokenizer.knows(&one).unwrap_or(false)) {
                unknown.push(word);
            }
        }
        Ok(unknown)
    }

    /// The added tokens of the checkpoint's textual inversions, if it has any. Errors if one of them
    /// was not made for these encoders.
    pub fn added_tokens(&self, checkpoint: &Checkpoint) -> Result<Option<AddedTokens>> {
        if checkpoint.embeddings().is_empty() {
            return Ok(None);
        }
        let tokenizers = self.tokenizers(checkpoint)?;
        Ok(tokenizers.into_iter().next().map(AddedTokens))
    }
}

/// The tokens that textual inversions add to a vocabulary.
pub struct AddedTokens(Tokenizer);

impl AddedTokens {
    /// Returns those that a text contains. Errors if the text cannot be parsed or tokenized.
    pub fn find(&self, text: &str, syntax: Syntax) -> Result<Vec<Arc<str>>> {
        if syntax == Syntax::Plain {
            return self.0.added_tokens(text);
        }
        let mut found = vec![];
        for segment in segments(text)? {
            if let Segment::Text { text, .. } = segment {
                found.extend(self.0.added_tokens(&text)?);
            }
        }
        Ok(found)
    }
}

/// Which hidden states of an encoder become the prompt's embeddings.
#[derive(Clone, Copy)]
enum HiddenStates {
    /// the last layer's after the final norm
    Last,
    /// the last layer's input, and the projection of the whole text where the encoder has one
    Penultimate,
}

/// One of CLIP's encoders with its tokenizer.
struct ClipPart {
    tokenizer: Tokenizer,
    clip: Clip,
    output: HiddenStates,
    config: ClipConfig,
}

impl ClipPart {
    /// Encodes token ids [n]: hidden states [1, n, hidden] as they are `skip` layers before the
    /// usual ones, and the pooled projection [1, projection] where there is one.
    fn encode(
        &self,
        cx: Forward,
        ids: &[u32],
        skip: usize,
    ) -> TensorResult<(Tensor, Option<Tensor>)> {
        match self.output {
            HiddenStates::Last => Ok((self.clip.forward(cx, ids, skip)?, None)),
            HiddenStates::Penultimate => self.clip.penultimate(cx, ids, skip),
        }
    }
}

/// All text encoders of a checkpoint, with their tokenizers.
pub struct PromptEncoder {
    parts: Parts,
    device: Device,
}

enum Parts {
    Clip(Vec<ClipPart>),
    Chat(Box<(ChatTokenizer, Qwen3)>),
}

impl PromptEncoder {
    /// Reads the encoders. The layers of a language model are not kept where a source is given to
    /// read them from `again`.
    pub fn new(
        checkpoint: &Checkpoint,
        configs: &TextEncoderConfigs,
        compute: &Compute,
        again: Option<SharedSource>,
    ) -> Result<Self> {
        let output = if configs.pooled_dim().is_some() {
            HiddenStates::Penultimate
        } else {
            HiddenStates::Last
        };
        let to = (&compute.device, compute.dtype);
        let device = compute.device.clone();
        let tokenizers = configs.tokenizers(checkpoint)?;
        if let Some((name, TextEncoderConfig::Qwen3(config, reading))) = configs.0.first() {
            let source = checkpoint.tokenizer(name)?;
            let tokenizer = ChatTokenizer::new(source, config.vocab_size, reading)?;
            let network = Qwen3::read(checkpoint, name, config, reading, to, again)?;
            let parts = Parts::Chat(Box::new((tokenizer, network)));
            return Ok(Self { parts, device });
        }
        let mut parts = vec![];
        for ((name, config), tokenizer) in configs.0.iter().zip(tokenizers) {
            let Some(config) = config.clip() else {
                continue;
            };
            let has_projection = *name == ENCODERS[1];
            let mut clip =
                checkpoint.read_network(name, &[], to, |weights| match has_projection {
                    true => Clip::with_projection(weights, config),
                    false => Clip::new(weights, config),
                })?;
            let learned = checkpoint
                .embeddings()
                .iter()
                .map(|embedding| embedding.vectors_for(name, config.hidden_size))
                .collect::<Result<Vec<_>>>()?;
            clip.add_embeddings(&learned)?;
            parts.push(ClipPart {
                tokenizer,
                clip,
                output,
                config: config.clone(),
            });
        }
        Ok(Self {
            parts: Parts::Clip(parts),
            device,
        })
    }

    /// Encodes a text as the model was trained on it, or from `skip` layers earlier. The second
    /// value is the text that was cut off because it did not fit, which happens in plain syntax
    /// only. Errors if the text cannot be parsed or tokenized.
    pub fn encode(
        &self,
        text: &str,
        skip: usize,
        syntax: Syntax,
    ) -> Result<(PromptEmbeds, Option<String>)> {
        let cx = Forward::on(&self.device);
        let clips = match &self.parts {
            Parts::Clip(clips) => clips,
            Parts::Chat(chat) => {
                let (tokenizer, network) = &**chat;
                let tokens = tokenizer.encode(text)?;
                let embeds = PromptEmbeds {
                    prompt_embeds: network.forward(cx, &tokens.ids, tokens.len)?,
                    token_ids: tokens.ids,
                    pooled_prompt_embeds: None,
                };
                return Ok((embeds, tokens.cut));
            }
        };
        let segments = match syntax {
            Syntax::A1111 => Some(segments(text)?),
            Syntax::Plain => None,
        };
        let (mut token_ids, mut prompt_embeds) = (vec![], vec![]);
        let (mut pooled_prompt_embeds, mut cut) = (None, None);
        for part in clips {
            let (tokenizer, most) = (&part.tokenizer, part.config.max_position_embeddings);
            let chunks = match &segments {
                Some(segments) => tokenizer.chunks(segments, most)?,
                None => {
                    let tokens = tokenizer.encode(text, most)?;
                    cut = cut.or(tokens.cut);
                    vec![Chunk {
                        weights: vec![1.0; tokens.ids.len()],
                        ids: tokens.ids,
                    }]
                }
            };
            let mut hidden = vec![];
            for Chunk { ids, weights } in chunks {
                let (states, pooled) = part.encode(cx, &ids, skip)?;
                hidden.push(weighted(&states, &weights)?);
                pooled_prompt_embeds = pooled_prompt_embeds.or(pooled);
                // which id a learned token has depends on the others that were loaded
                let unknown = part.config.vocab_size as u32;
                token_ids.extend(ids.into_iter().map(|id| id.min(unknown)));
            }
            prompt_embeds.push(Tensor::cat(&hidden, 1)?); // [1, n, hidden]
        }
        Ok((
            PromptEmbeds {
                token_ids,
                prompt_embeds: Tensor::cat(&prompt_embeds, 2)?, // [1, n, d]
                pooled_prompt_embeds,
            },
            cut,
        ))
    }
}

/// Multiplies each token's hidden state [1, n, d] by its weight [n], and then all of them by one
/// number that brings their mean back to what it was, as A1111 does.
fn weighted(hidden: &Tensor, weights: &[f32]) -> TensorResult<Tensor> {
    if weights.iter().all(|weight| *weight == 1.0) {
        return Ok(hidden.clone());
    }
    let weights = Tensor::new(weights, hidden.device())?
        .to_dtype(hidden.dtype())?
        .reshape((1, (), 1))?; // [1, n, 1]
    let scaled = hidden.broadcast_mul(&weights)?;
    let mean = |x: &Tensor| x.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>();
    let ratio = mean(hidden)? / mean(&scaled)?;
    &scaled
        * if ratio.is_finite() {
            f64::from(ratio)
        } else {
            1.0
        }
}
