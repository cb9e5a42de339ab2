//! All text encoders of a checkpoint: from a prompt to the embeddings that its network attends to.
//!
//! Hides of which architecture an encoder is (`TextEncoder`), and that SDXL has two, of which other
//! hidden states are taken than of a single one. Start at [`PromptEncoder::encode`].

use super::clip::{Clip, ClipConfig};
use super::prompt::{Segment, Syntax, segments};
use super::qwen3::{ChatTokenizer, OF_FLUX2_KLEIN, OF_Z_IMAGE, Qwen3, Qwen3Config, Reading};
use super::t5::{T5, T5Config, T5Tokenizer};
use super::tokenizer::{Chunk, Tokenizer};
use crate::nn::Forward;
use crate::nn::device::Compute;
use crate::nn::weights::SharedSource;
use crate::weights::{
    BlockBytes, Checkpoint, ENCODERS, FLUX_CLASS, SD3_CLASS, TRANSFORMER, Z_IMAGE_CLASS,
};
use anyhow::{Result, bail, ensure};
use candle_core::{DType, Device, Result as TensorResult, Tensor};
use serde_json::Value;
use std::collections::HashSet;
use std::ops::RangeInclusive;
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
    T5(T5Config),
}

impl TextEncoderConfig {
    /// Parses the configuration of any architecture; `class` is that of the transformer that the
    /// checkpoint has.
    fn from_json(config: &Value, class: Option<&str>) -> Result<Self> {
        if Qwen3Config::is_of(config) {
            let reading = match class {
                Some(Z_IMAGE_CLASS) => &OF_Z_IMAGE,
                _ => &OF_FLUX2_KLEIN,
            };
            return Ok(Self::Qwen3(Qwen3Config::from_json(config)?, reading));
        }
        if T5Config::is_of(config) {
            return T5Config::from_json(config).map(Self::T5);
        }
        ClipConfig::from_json(config).map(Self::Clip)
    }

    fn clip(&self) -> Option<&ClipConfig> {
        match self {
            Self::Clip(config) => Some(config),
            Self::Qwen3(..) | Self::T5(_) => None,
        }
    }
}

/// What a network takes of its text encoders.
#[derive(Debug, Clone, Copy)]
enum Output {
    /// the states of all, side by side
    States,
    /// FLUX.1: T5's states of so many tokens, and CLIP's last state of the whole text
    T5AndPooled { tokens: usize },
    /// Stable Diffusion 3: the states of both of CLIP's encoders, side by side, then those of T5 of so
    /// many tokens, all widened to `width` by zeros; and the projections of the whole text
    AllStates { tokens: usize, width: usize },
}

/// Tokens of T5 in Stable Diffusion 3, and in FLUX.1 schnell.
const T5_TOKENS: usize = 256;
/// In FLUX.1 dev.
const T5_TOKENS_OF_DEV: usize = 512;

impl Output {
    /// That of a checkpoint with this transformer, or none.
    fn of(transformer: Option<&Value>) -> Self {
        let value = |key: &str| transformer.and_then(|config| config.get(key));
        match value("_class_name").and_then(Value::as_str) {
            Some(FLUX_CLASS) => Self::T5AndPooled {
                tokens: match value("guidance_embeds") {
                    Some(Value::Bool(true)) => T5_TOKENS_OF_DEV,
                    _ => T5_TOKENS,
                },
            },
            Some(SD3_CLASS) => Self::AllStates {
                tokens: T5_TOKENS,
                width: value("joint_attention_dim")
                    .and_then(Value::as_u64)
                    .and_then(|width| width.try_into().ok())
                    .unwrap_or(4096),
            },
            _ => Self::States,
        }
    }

    /// The same of another number of T5's tokens, if one is given.
    fn with_length(self, length: Option<usize>) -> Self {
        match (self, length) {
            (Self::T5AndPooled { .. }, Some(tokens)) => Self::T5AndPooled { tokens },
            (Self::AllStates { width, .. }, Some(tokens)) => Self::AllStates { tokens, width },
            (output, _) => output,
        }
    }

    /// How many tokens of T5 there are.
    fn tokens(self) -> usize {
        match self {
            Self::States => 0,
            Self::T5AndPooled { tokens } | Self::AllStates { tokens, .. } => tokens,
        }
    }
}

/// The numbers of tokens that T5 can be told to take, as in diffusers.
pub const T5_LENGTHS: RangeInclusive<usize> = 1..=512;

/// The configurations of all text encoders that a checkpoint has, by their component.
#[derive(Debug, Clone)]
pub struct TextEncoderConfigs {
    encoders: Vec<(&'static str, TextEncoderConfig)>,
    output: Output,
}

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
        Ok(Self {
            encoders: configs,
            output: Output::of(transformer),
        })
    }

    fn clips(&self) -> impl Iterator<Item = (&'static str, &ClipConfig)> {
        self.encoders
            .iter()
            .filter_map(|(name, config)| Some((*name, config.clip()?)))
    }

    fn t5(&self) -> Option<(&'static str, &T5Config)> {
        self.encoders
            .iter()
            .find_map(|(name, config)| match config {
                TextEncoderConfig::T5(config) => Some((*name, config)),
                _ => None,
            })
    }

    /// Errors if a network that takes embeddings of width `context`, and pooled ones of width
    /// `pooled`, does not go with these encoders.
    pub fn require(&self, context: usize, pooled: Option<usize>) -> Result<()> {
        let clips: Vec<usize> = self.clips().map(|(_, config)| config.hidden_size).collect();
        let t5 = self.t5().map(|(_, config)| config.d_model);
        let (wanted, fits) = match self.output {
            Output::States => ("a language model", self.reads_sentences()),
            Output::T5AndPooled { .. } => (
                "CLIP-L and T5",
                clips.len() == 1 && self.encoders.len() == 2 && t5.is_some(),
            ),
            Output::AllStates { width, .. } => (
                "CLIP-L, CLIP-G and perhaps T5",
                clips.len() == 2
                    && self.encoders.len() == 2 + usize::from(t5.is_some())
                    && clips.iter().sum::<usize>() <= width
                    && t5.is_none_or(|own| own == width),
            ),
        };
        ensure!(
            fits,
            "its transformer reads the states of {wanted}, and its text encoders are {}",
            self.names()
        );
        let own = self.context_dim();
        ensure!(
            own == context,
            "its text encoder gives embeddings of width {own}, its transformer takes {context}"
        );
        let own = pooled.and(self.pooled_dim());
        ensure!(
            own == pooled,
            "its text encoders give pooled embeddings of width {}, its transformer takes {}",
            own.unwrap_or(0),
            pooled.unwrap_or(0)
        );
        Ok(())
    }

    /// The kinds of all encoders, for people.
    fn names(&self) -> String {
        let name = |(_, config): &(_, TextEncoderConfig)| match config {
            TextEncoderConfig::Clip(_) => "CLIP",
            TextEncoderConfig::Qwen3(..) => "Qwen3",
            TextEncoderConfig::T5(_) => "T5",
        };
        let names: Vec<&str> = self.encoders.iter().map(name).collect();
        match names.is_empty() {
            true => "none".into(),
            false => names.join(", "),
        }
    }

    /// The width of the pooled embedding, if there is one: of a U-Net's encoders, only the second
    /// projects the whole text.
    pub fn pooled_dim(&self) -> Option<usize> {
        match self.output {
            Output::States => self
                .clips()
                .find(|(name, _)| *name == ENCODERS[1])
                .map(|(_, config)| config.projection_dim),
            Output::T5AndPooled { .. } => self.clips().map(|(_, it)| it.hidden_size).next(),
            Output::AllStates { .. } => Some(self.clips().map(|(_, it)| it.projection_dim).sum()),
        }
    }

    /// Whether prompts are read as sentences, by a language model or T5.
    pub fn reads_sentences(&self) -> bool {
        let is_clip = |(_, config): &(_, TextEncoderConfig)| config.clip().is_some();
        !matches!(self.output, Output::States) || !self.encoders.iter().all(is_clip)
    }

    /// Whether prompts are read by T5, which takes as many tokens as it is told.
    pub fn takes_length(&self) -> bool {
        !matches!(self.output, Output::States)
    }

    /// The bytes of the tensors of a language model or of T5 that are read; 0 where there is none.
    pub fn sentence_bytes(&self, checkpoint: &Checkpoint) -> Result<BlockBytes> {
        if let Some((name, _)) = self.t5() {
            let has_shared = checkpoint.shape(&format!("{name}.shared.weight")).is_some();
            return Ok(checkpoint.block_bytes(name, |tensor| T5::reads(has_shared, tensor)));
        }
        let Some((name, TextEncoderConfig::Qwen3(config, reading))) = self.encoders.first() else {
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
        match self.output {
            Output::States => self
                .encoders
                .iter()
                .map(|(_, config)| match config {
                    TextEncoderConfig::Clip(config) => config.hidden_size,
                    TextEncoderConfig::Qwen3(config, reading) => reading.width(config.hidden_size),
                    TextEncoderConfig::T5(config) => config.d_model,
                })
                .sum(),
            Output::T5AndPooled { .. } => self.t5().map_or(0, |(_, config)| config.d_model),
            Output::AllStates { width, .. } => width,
        }
    }

    /// The largest `clip_skip`: one more would leave one of CLIP's encoders without layers, or take
    /// others than those that a language model is read at.
    pub fn layers(&self) -> usize {
        if self.reads_sentences() && !matches!(self.output, Output::AllStates { .. }) {
            return 1;
        }
        let unused = usize::from(self.pooled_dim().is_some());
        self.clips()
            .map(|(_, config)| config.num_hidden_layers.saturating_sub(unused))
            .min()
            .unwrap_or(0)
    }

    /// Builds the tokenizer of each of CLIP's encoders, which knows the checkpoint's textual
    /// inversions too: their ids follow the vocabulary's. Errors if one of them was not made for
    /// these encoders.
    fn tokenizers(&self, checkpoint: &Checkpoint) -> Result<Vec<Tokenizer>> {
        if let (true, Some(embedding)) = (self.reads_sentences(), checkpoint.embeddings().first()) {
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
        self.clips().map(tokenizer).collect()
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
    Joined {
        clips: Vec<ClipPart>,
        t5: Option<Box<(T5Tokenizer, T5)>>,
        output: Output,
    },
}

impl PromptEncoder {
    /// Reads the encoders. The layers of a language model, or of T5, are not kept where a source is given to
    /// read them from `again`.
    pub fn new(
        checkpoint: &Checkpoint,
        configs: &TextEncoderConfigs,
        compute: &Compute,
        again: Option<SharedSource>,
    ) -> Result<Self> {
        let output = match configs.pooled_dim() {
            Some(_) => HiddenStates::Penultimate,
            None => HiddenStates::Last,
        };
        let to = (&compute.device, compute.dtype);
        let device = compute.device.clone();
        let tokenizers = configs.tokenizers(checkpoint)?;
        if let Some((name, TextEncoderConfig::Qwen3(config, reading))) = configs.encoders.first() {
            let source = checkpoint.tokenizer(name)?;
            let tokenizer = ChatTokenizer::new(source, config.vocab_size, reading)?;
            let network = Qwen3::read(checkpoint, name, config, reading, to, again)?;
            let parts = Parts::Chat(Box::new((tokenizer, network)));
            return Ok(Self { parts, device });
        }
        let mut parts = vec![];
        for ((name, config), tokenizer) in configs.clips().zip(tokenizers) {
            // the first one's is an identity where it is not there
            let has_projection = match configs.output {
                Output::States => name == ENCODERS[1],
                Output::T5AndPooled { .. } => false,
                Output::AllStates { .. } => {
                    let projection = format!("{name}.text_projection.weight");
                    name == ENCODERS[1] || checkpoint.shape(&projection).is_some()
                }
            };
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
        if let Output::States = configs.output {
            let parts = Parts::Clip(parts);
            return Ok(Self { parts, device });
        }
        let t5 = configs.t5().map(|(name, config)| {
            let source = checkpoint.tokenizer(name)?;
            let tokenizer = T5Tokenizer::new(source, config.vocab_size)?;
            let network = T5::read(checkpoint, name, config, to, again)?;
            Ok::<_, anyhow::Error>(Box::new((tokenizer, network)))
        });
        Ok(Self {
            parts: Parts::Joined {
                clips: parts,
                t5: t5.transpose()?,
                output: configs.output,
            },
            device,
        })
    }

    /// Encodes a text as the model was trained on it, or from `skip` layers earlier, and by T5 as
    /// `max_sequence_length` tokens where that is given. The second value is the text that was cut
    /// off because it did not fit, which happens in plain syntax only. Errors if the text cannot be
    /// parsed or tokenized.
    pub fn encode(
        &self,
        text: &str,
        skip: usize,
        syntax: Syntax,
        max_sequence_length: Option<usize>,
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
            Parts::Joined { clips, t5, output } => {
                let output = output.with_length(max_sequence_length);
                return joined(cx, clips, t5.as_deref(), output, (text, skip));
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

/// Encodes a text with CLIP's encoders, from `skip` layers earlier, and T5, as far as there is one. The
/// second value is the text that the one with the most tokens did not take.
fn joined(
    cx: Forward,
    clips: &[ClipPart],
    t5: Option<&(T5Tokenizer, T5)>,
    output: Output,
    (text, skip): (&str, usize),
) -> Result<(PromptEmbeds, Option<String>)> {
    let (mut token_ids, mut states, mut pooled, mut cut) = (vec![], vec![], vec![], None);
    for part in clips {
        let tokens = part
            .tokenizer
            .encode(text, part.config.max_position_embeddings)?;
        if let Output::AllStates { .. } = output {
            let (hidden, projected) = part.encode(cx, &tokens.ids, skip)?;
            states.push(hidden);
            pooled.push(match projected {
                Some(projected) => projected,
                None => part.clip.pooled(cx, &tokens.ids)?,
            });
        } else {
            pooled.push(part.clip.pooled(cx, &tokens.ids)?);
        }
        cut = cut.or(tokens.cut);
        token_ids.extend(tokens.ids);
    }
    let pooled_prompt_embeds = Tensor::cat(&pooled, 1)?;
    let of_t5 = match t5 {
        Some((tokenizer, network)) => {
            let tokens = tokenizer.encode(text, output.tokens())?;
            let states = network.forward(cx, &tokens.ids)?;
            cut = tokens.cut;
            token_ids.extend(tokens.ids);
            Some(states)
        }
        None => None,
    };
    let (dtype, device) = (pooled_prompt_embeds.dtype(), pooled_prompt_embeds.device());
    let prompt_embeds = match (output, of_t5) {
        (Output::AllStates { tokens, width }, of_t5) => {
            let of_clip = Tensor::cat(&states, 2)?; // [1, 77, d]
            let missing = width.saturating_sub(of_clip.dim(2)?);
            let of_clip = of_clip.pad_with_zeros(2, 0, missing)?;
            let of_t5 = match of_t5 {
                Some(states) => states.to_dtype(dtype)?,
                None => Tensor::zeros((1, tokens, width), dtype, device)?,
            };
            Tensor::cat(&[of_clip, of_t5], 1)? // [1, 77 + tokens, width]
        }
        (_, Some(states)) => states,
        (_, None) => bail!("the model reads its prompts with T5"),
    };
    let embeds = PromptEmbeds {
        token_ids,
        prompt_embeds,
        pooled_prompt_embeds: Some(pooled_prompt_embeds),
    };
    Ok((embeds, cut))
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
