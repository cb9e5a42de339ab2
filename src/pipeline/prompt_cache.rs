//! Prompt embeddings: each text is encoded once for all images that need it.
//!
//! Hides how many texts a picture has: the negative prompt, what `AND` joins, and what each of them
//! is at a step.

use super::config::ModelConfig;
use super::event::Events;
use super::family::{AESTHETIC_SCORES, REFINER_IDS};
use super::fingerprint::Trace;
use super::guidance::Guidance;
use super::job::Job;
use crate::model::{AddedCond, Conditioning};
use crate::text::encoder::{PromptEmbeds, PromptEncoder};
use crate::text::prompt::{Prompts, ScheduledPrompt, Syntax};
use anyhow::{Context, Error, Result};
use candle_core::Tensor;
use std::collections::HashMap;
use std::sync::Arc;

/// A text, the layers skipped for it, how it is read, and as how many of T5's tokens; none for no text
/// at all, whose embedding is zeros.
type Key = Option<(Arc<str>, usize, Syntax, Option<usize>)>;

/// How often the longest text of a picture is repeated for the sake of others at most.
const MOST_REPEATED: usize = 12;

/// The texts of a batch at a step: for each pass of the network one row an image, pass after pass.
#[derive(PartialEq)]
pub struct BatchPrompts(Vec<Text>);

#[derive(PartialEq)]
struct Text {
    key: Key,
    /// the text that is mixed in, and its weight
    to: Option<(Key, f64)>,
    is_negative: bool,
}

/// The embeddings of the texts that a model reads in a run.
pub struct PromptCache<'a> {
    pub config: &'a ModelConfig,
    embeds: HashMap<Key, PromptEmbeds>,
}

impl<'a> PromptCache<'a> {
    pub fn new(config: &'a ModelConfig) -> Self {
        Self {
            config,
            embeds: HashMap::new(),
        }
    }

    fn negative(&self, job: &Job, text: &Arc<str>) -> Key {
        let is_nothing = self.config.empty_is_zeros && job.settings.negative.is_empty();
        // as in diffusers, layers are skipped for the prompt alone
        (!is_nothing).then(|| {
            let settings = &job.settings;
            let length = settings.max_sequence_length;
            (text.clone(), 0, settings.prompt_syntax, length)
        })
    }

    fn positive(&self, job: &Job, text: &Arc<str>) -> Key {
        Some((
            text.clone(),
            job.settings.clip_skip - 1,
            job.settings.prompt_syntax,
            job.settings.max_sequence_length,
        ))
    }

    /// Every text that a picture needs on its way.
    fn keys(&self, job: &Job) -> Vec<Key> {
        let of_pass = |prompts: &Arc<Prompts>| -> Vec<Key> {
            let Prompts {
                parts,
                negative,
                to,
            } = &**prompts;
            let is_guided = job.guidance != Guidance::Off;
            let negative = is_guided.then(|| negative.texts().map(|text| self.negative(job, text)));
            let positive = parts.iter().map(|part| &part.prompt);
            let positive = positive
                .chain(to.iter().map(|(to, _)| to))
                .flat_map(ScheduledPrompt::texts)
                .map(|text| self.positive(job, text));
            negative.into_iter().flatten().chain(positive).collect()
        };
        let passes = [Some(&job.prompts), job.hires_prompts.as_ref()];
        passes.into_iter().flatten().flat_map(of_pass).collect()
    }

    pub fn has(&self, job: &Job) -> bool {
        self.keys(job)
            .iter()
            .all(|key| self.embeds.contains_key(key))
    }

    /// Embeds each text of these jobs once; what is known already is kept, what they do not need is
    /// forgotten.
    pub fn encode<'j>(
        &mut self,
        jobs: impl Iterator<Item = &'j Job>,
        encoder: &PromptEncoder,
        events: &Events,
    ) -> Result<()> {
        let mut before = std::mem::take(&mut self.embeds);
        for key in jobs.flat_map(|job| self.keys(job)).collect::<Vec<_>>() {
            if self.embeds.contains_key(&key) {
                continue;
            }
            let embedded = match (before.remove(&key), &key) {
                (Some(embedded), _) => embedded,
                (None, None) => encoder.encode("", 0, Syntax::Plain, None)?.0.zeros_like()?,
                (None, Some((text, skip, syntax, length))) => {
                    let (embedded, cut) = encoder.encode(text, *skip, *syntax, *length)?;
                    if let Some(cut) = cut {
                        let tokens = embedded.prompt_embeds.dim(1)?;
                        events.warn(format!(
                            "the prompt is longer than {tokens} tokens; this was cut off: {cut}"
                        ));
                    }
                    embedded
                }
            };
            self.embeds.insert(key, embedded);
        }
        Ok(())
    }

    fn embedded(&self, key: &Key) -> Result<&PromptEmbeds> {
        self.embeds.get(key).context("a prompt was not encoded")
    }

    /// A text's embedding padded to `tokens` by repetition: keys and values that are there twice
    /// change no attention. Where it does not fit a whole number of times, or a network is told how
    /// long a prompt is, its end is repeated.
    fn get(&self, text: &Text, tokens: usize) -> Result<PromptEmbeds> {
        let repeated = |key: &Key| -> Result<PromptEmbeds> {
            let embeds = self.embedded(key)?;
            let own = embeds.prompt_embeds.dim(1)?;
            let mut prompt_embeds = embeds.prompt_embeds.clone(); // [1, own, d]
            if own < tokens && self.config.backbone.repeats_prompts() {
                prompt_embeds = prompt_embeds.repeat((1, tokens / own, 1))?;
            }
            let missing = tokens - prompt_embeds.dim(1)?;
            if missing > 0 {
                // as A1111 does where it makes lengths equal
                let last = embeds.prompt_embeds.narrow(1, own - 1, 1)?;
                let end = last.repeat((1, missing, 1))?;
                prompt_embeds = Tensor::cat(&[&prompt_embeds, &end], 1)?; // [1, tokens, d]
            }
            Ok(PromptEmbeds {
                prompt_embeds,
                ..embeds.clone()
            })
        };
        let embedded = repeated(&text.key)?;
        match &text.to {
            Some((to, weight)) => Ok(embedded.lerp(&repeated(to)?, *weight)?),
            None => Ok(embedded),
        }
    }

    /// How many of a text's tokens are its own; of what is mixed of two, as many as the longer has.
    fn length(&self, text: &Text) -> Result<usize> {
        let own = |key: &Key| Ok::<_, Error>(self.embedded(key)?.prompt_embeds.dim(1)?);
        match &text.to {
            Some((to, weight)) if *weight >= 1.0 => own(to),
            Some((to, weight)) if *weight > 0.0 => Ok(own(&text.key)?.max(own(to)?)),
            _ => own(&text.key),
        }
    }

    /// Returns the context length of a job in tokens, to which all its texts are repeated; the
    /// longest text's where a common multiple of all lengths would be much longer, or texts are not
    /// repeated.
    pub fn tokens(&self, job: &Job) -> Result<usize> {
        let (mut all, mut longest) = (1usize, 1usize);
        for key in self.keys(job) {
            let tokens = self.embedded(&key)?.prompt_embeds.dim(1)?;
            longest = longest.max(tokens);
            all = (all / greatest_common_divisor(all, tokens)).saturating_mul(tokens);
        }
        let is_short = all / longest <= MOST_REPEATED && self.config.backbone.repeats_prompts();
        Ok(if is_short { all } else { longest })
    }

    /// Adds a job's first texts to its trace, as the model reads them or its refiner.
    pub fn trace(&self, job: &Job, by_refiner: bool, trace: &mut Trace) -> Result<()> {
        let negatives = job.guidance.passes() - job.prompts.parts.len();
        let texts = self.at(&[job], 0).0;
        // of each text its own tokens, whatever it is repeated to beside others
        for (nth, text) in [
            texts.get(negatives),
            texts.first().filter(|_| negatives > 0),
        ]
        .into_iter()
        .enumerate()
        {
            if let Some(text) = text {
                let tokens = match &text.to {
                    Some(_) => self.tokens(job)?,
                    None => self.embedded(&text.key)?.prompt_embeds.dim(1)?,
                };
                trace.text(nth, by_refiner, &self.get(text, tokens)?)?;
            }
        }
        Ok(())
    }

    /// The texts of a batch at a call of the network, from 0.
    pub fn at(&self, batch: &[&Job], call: usize) -> BatchPrompts {
        let Some(first) = batch.first() else {
            return BatchPrompts(vec![]);
        };
        let parts = first.prompts.parts.len();
        let negatives = first.guidance.passes().saturating_sub(parts);
        let row = |job: &Job, row: usize| {
            let at = |prompt: &ScheduledPrompt| prompt.at(call).clone();
            match row
                .checked_sub(negatives)
                .and_then(|i| job.prompts.parts.get(i))
            {
                Some(part) => {
                    let to = job
                        .prompts
                        .to
                        .as_ref()
                        .map(|(to, weight)| (self.positive(job, &at(to)), *weight));
                    Text {
                        key: self.positive(job, &at(&part.prompt)),
                        to,
                        is_negative: false,
                    }
                }
                None => Text {
                    key: self.negative(job, &at(&job.prompts.negative)),
                    to: None,
                    is_negative: true,
                },
            }
        };
        BatchPrompts(
            (0..negatives + parts)
                .flat_map(|i| batch.iter().map(move |job| row(job, i)))
                .collect(),
        )
    }

    /// Returns the conditioning of a batch with these texts.
    pub fn of(&self, batch: &[&Job], texts: &BatchPrompts) -> Result<Conditioning> {
        // a batch's jobs are alike in the texts of its model, but those of its refiner may be
        // longer in some
        let tokens = batch
            .iter()
            .map(|job| self.tokens(job))
            .max_by_key(|tokens| tokens.as_ref().map_or(usize::MAX, |n| *n));
        let tokens = tokens.context("the batch is empty")??;
        let embedded = texts
            .0
            .iter()
            .map(|text| self.get(text, tokens))
            .collect::<Result<Vec<_>>>()?;
        let contexts: Vec<&Tensor> = embedded
            .iter()
            .map(|embedded| &embedded.prompt_embeds)
            .collect();
        let pooled: Vec<&Tensor> = embedded
            .iter()
            .filter_map(|embedded| embedded.pooled_prompt_embeds.as_ref())
            .collect();
        let numbers = |(job, Text { is_negative, .. }): (&&Job, &Text)| match (
            job.settings.sizes(),
            self.config.added_ids,
        ) {
            ([original_height, original_width, top, left, ..], REFINER_IDS) => {
                vec![
                    original_height,
                    original_width,
                    top,
                    left,
                    AESTHETIC_SCORES[usize::from(*is_negative)],
                ]
            }
            (sizes, _) => sizes.to_vec(),
        };
        let ids = || batch.iter().cycle().zip(&texts.0).map(numbers).collect();
        let added = (!pooled.is_empty())
            .then(|| {
                Ok::<_, Error>(AddedCond {
                    text_embeds: Tensor::cat(&pooled, 0)?,
                    time_ids: ids(),
                })
            })
            .transpose()?;
        let guidance = batch.first().map(|job| job.settings.guidance);
        let lengths = texts.0.iter().map(|text| self.length(text));
        Ok(Conditioning {
            context: Tensor::cat(&contexts, 0)?,
            lengths: match self.config.backbone.repeats_prompts() {
                true => vec![],
                false => lengths.collect::<Result<_>>()?,
            },
            added_cond: added,
            guidance,
        })
    }
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 {
        a.max(1)
    } else {
        greatest_common_divisor(b, a % b)
    }
}
