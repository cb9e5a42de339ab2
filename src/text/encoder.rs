//! All text encoders of a checkpoint: from a prompt to what its U-Net is told of it.
//!
//! Hides that SDXL has two encoders, which are asked for other hidden states than a single one is.

use super::clip::{Clip, ClipConfig};
use super::prompt::{Piece, Syntax, pieces};
use super::tokenizer::{Chunk, Tokenizer};
use crate::nn::Forward;
use crate::nn::device::Compute;
use crate::weights::{Checkpoint, ENCODERS};
use anyhow::{Result, ensure};
use candle_core::{DType, Device, Result as TensorResult, Tensor};
use std::sync::Arc;

/// What a U-Net is told of a prompt.
#[derive(Clone)]
pub struct Embedded {
    /// token ids of all encoders, one after the other, those of learned words all the same; none
    /// for nothing at all
    pub ids: Vec<u32>,
    /// [1, n, d]
    pub context: Tensor,
    /// of the whole text, [1, p], where an encoder gives it
    pub pooled: Option<Tensor>,
}

impl Embedded {
    /// What lies between this (`share` 0) and another (1), on the straight line.
    pub fn toward(&self, other: &Self, share: f64) -> TensorResult<Self> {
        let mix = |a: &Tensor, b: &Tensor| (a * (1.0 - share))? + (b * share)?;
        let pooled = self.pooled.as_ref().zip(other.pooled.as_ref());
        Ok(Self {
            ids: [&*self.ids, &other.ids].concat(),
            context: mix(&self.context, &other.context)?,
            pooled: pooled.map(|(a, b)| mix(a, b)).transpose()?,
        })
    }

    /// Nothing at all, in the shape of this.
    pub fn zeros_like(&self) -> TensorResult<Self> {
        Ok(Self {
            ids: vec![],
            context: self.context.zeros_like()?,
            pooled: self.pooled.as_ref().map(Tensor::zeros_like).transpose()?,
        })
    }
}

/// The encoders that a checkpoint has, by their component.
#[derive(Debug, Clone)]
pub struct EncoderConfig(Vec<(&'static str, ClipConfig)>);

impl EncoderConfig {
    /// Parses the configuration of every text encoder.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let there = ENCODERS
            .into_iter()
            .filter(|name| checkpoint.optional_config(name).is_some());
        Ok(Self(
            there
                .map(|name| Ok((name, ClipConfig::from_json(checkpoint.config(name)?)?)))
                .collect::<Result<_>>()?,
        ))
    }

    /// Width of the pooled embedding: none unless there is a second encoder, which projects.
    pub fn pooled(&self) -> Option<usize> {
        self.0
            .iter()
            .find(|(name, _)| *name == ENCODERS[1])
            .map(|(_, config)| config.projection_dim)
    }

    /// How many layers can be counted back from the last one that is used.
    pub fn layers(&self) -> usize {
        let unused = usize::from(self.pooled().is_some());
        self.0
            .iter()
            .map(|(_, config)| config.num_hidden_layers.saturating_sub(unused))
            .min()
            .unwrap_or(0)
    }

    /// The tokenizer of each encoder, which knows the checkpoint's embeddings too: their ids follow
    /// the vocabulary's. Errors if one of them is not made for these encoders.
    fn tokenizers(&self, checkpoint: &Checkpoint) -> Result<Vec<Tokenizer>> {
        let tokenizer = |(name, config): &(&'static str, ClipConfig)| {
            let source = checkpoint.tokenizer(name)?;
            let mut tokenizer = Tokenizer::new(&source.files, &source.config)?;
            let mut next = config.vocab_size as u32;
            for embedding in &checkpoint.embeddings {
                embedding.vectors_for(name, config.hidden_size)?;
                ensure!(
                    self.pooled().is_some() || embedding.parts.len() == 1,
                    "{}",
                    embedding.mismatch("the one encoder of this model takes one kind")
                );
                let end = next + embedding.vectors as u32;
                tokenizer.learn(&embedding.token, next..end, config.max_position_embeddings)?;
                next = end;
            }
            Ok(tokenizer)
        };
        self.0.iter().map(tokenizer).collect()
    }

    /// What finds the checkpoint's embeddings in prompts; none where it has none. Errors as
    /// [`Self::tokenizers`].
    pub fn finder(&self, checkpoint: &Checkpoint) -> Result<Option<Finder>> {
        if checkpoint.embeddings.is_empty() {
            return Ok(None);
        }
        Ok(self.tokenizers(checkpoint)?.into_iter().next().map(Finder))
    }
}

/// Finds learned words in prompts.
pub struct Finder(Tokenizer);

impl Finder {
    /// The tokens of those that stand in a text. Errors if that cannot be read.
    pub fn find(&self, text: &str, syntax: Syntax) -> Result<Vec<Arc<str>>> {
        if syntax == Syntax::Plain {
            return self.0.learned(text);
        }
        let mut found = vec![];
        for piece in pieces(text)? {
            if let Piece::Text { text, .. } = piece {
                found.extend(self.0.learned(&text)?);
            }
        }
        Ok(found)
    }
}

/// The text encoders with their tokenizers.
pub struct Encoder {
    parts: Vec<(Tokenizer, Clip, ClipConfig)>,
    device: Device,
    /// whether the U-Net is told of the whole text too
    is_pooled: bool,
}

impl Encoder {
    /// Reads the encoders.
    pub fn new(checkpoint: &Checkpoint, config: &EncoderConfig, compute: &Compute) -> Result<Self> {
        let part = |((name, config), tokenizer): (&(&'static str, ClipConfig), Tokenizer)| {
            let weights = checkpoint.weights(name, &compute.device, compute.dtype);
            let mut clip = if *name == ENCODERS[1] {
                Clip::projected(&weights, config)
            } else {
                Clip::new(&weights, config)
            }?;
            let learned = checkpoint
                .embeddings
                .iter()
                .map(|embedding| embedding.vectors_for(name, config.hidden_size));
            clip.learn(&learned.collect::<Result<Vec<_>>>()?)?;
            Ok((tokenizer, clip, config.clone()))
        };
        let tokenizers = config.tokenizers(checkpoint)?;
        Ok(Self {
            parts: config
                .0
                .iter()
                .zip(tokenizers)
                .map(part)
                .collect::<Result<_>>()?,
            device: compute.device.clone(),
            is_pooled: config.pooled().is_some(),
        })
    }

    /// Embeds a text as the model was trained to see it, or as it is `skip` layers earlier; and
    /// what of it did not fit, which is none in A1111's syntax. Errors if that cannot be read.
    pub fn encode(
        &self,
        text: &str,
        skip: usize,
        syntax: Syntax,
    ) -> Result<(Embedded, Option<String>)> {
        let pieces = match syntax {
            Syntax::A1111 => Some(pieces(text)?),
            Syntax::Plain => None,
        };
        let cx = Forward::on(&self.device);
        let (mut ids, mut contexts, mut whole, mut rest) = (vec![], vec![], None, None);
        for (tokenizer, clip, config) in &self.parts {
            let chunks = match &pieces {
                Some(pieces) => tokenizer.chunks(pieces, config.max_position_embeddings)?,
                None => {
                    let tokens = tokenizer.encode(text, config.max_position_embeddings)?;
                    rest = rest.or(tokens.cut);
                    vec![Chunk {
                        weights: vec![1.0; tokens.ids.len()],
                        ids: tokens.ids,
                    }]
                }
            };
            let mut hidden = vec![];
            for Chunk { ids: own, weights } in chunks {
                if self.is_pooled {
                    let (one, pooled) = clip.penultimate(cx, &own, skip)?;
                    hidden.push(weighted(&one, &weights)?);
                    whole = whole.or(pooled);
                } else {
                    hidden.push(weighted(&clip.forward(cx, &own, skip)?, &weights)?);
                }
                // a learned word has another id beside others, and is the same all the same
                ids.extend(own.into_iter().map(|id| id.min(config.vocab_size as u32)));
            }
            contexts.push(Tensor::cat(&hidden, 1)?);
        }
        Ok((
            Embedded {
                ids,
                context: Tensor::cat(&contexts, 2)?,
                pooled: whole,
            },
            rest,
        ))
    }
}

/// [1, n, d] with each token's embedding times its weight [n], and the mean of all that it had
/// before.
fn weighted(hidden: &Tensor, weights: &[f32]) -> TensorResult<Tensor> {
    if weights.iter().all(|weight| *weight == 1.0) {
        return Ok(hidden.clone());
    }
    let weights = Tensor::new(weights, hidden.device())?
        .to_dtype(hidden.dtype())?
        .reshape((1, (), 1))?;
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
