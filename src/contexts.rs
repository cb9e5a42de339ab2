//! What the U-Net is told of prompts: each text is embedded once for all pictures that need it.
//!
//! Hides how many texts a picture has: the negative prompt, what `AND` joins, and what each of them is at a step.

use crate::family::{AESTHETIC_SCORES, REFINER_IDS};
use crate::guidance::Guidance;
use crate::model::unet::{Added, Conditioning};
use crate::progress::Progress;
use crate::request::{Job, ModelConfig};
use crate::text::encoder::{Embedded, Encoder};
use crate::text::prompt::{Changing, Syntax};
use crate::trace::Trace;
use anyhow::{Context, Error, Result};
use candle_core::{Result as TensorResult, Tensor};
use std::collections::HashMap;
use std::sync::Arc;

/// A text, the layers skipped for it, and how it is read; none for no text at all, whose embedding is zeros.
type Key = Option<(Arc<str>, usize, Syntax)>;

/// The texts of a batch at a step: for each of its rows, one block of pictures after the other, whether it is negative.
#[derive(PartialEq)]
pub struct Texts(Vec<(Key, bool)>);

/// Embedded texts.
pub struct Contexts<'a> {
    pub config: &'a ModelConfig,
    known: HashMap<Key, Embedded>,
}

impl<'a> Contexts<'a> {
    pub fn new(config: &'a ModelConfig) -> Self {
        Self { config, known: HashMap::new() }
    }

    fn negative(&self, job: &Job, text: &Arc<str>) -> Key {
        let is_nothing = self.config.empty_is_zeros && job.settings.negative.is_empty();
        // as in diffusers, layers are skipped for the prompt alone
        (!is_nothing).then(|| (text.clone(), 0, job.settings.prompt_syntax))
    }

    fn positive(&self, job: &Job, text: &Arc<str>) -> Key {
        Some((text.clone(), job.settings.clip_skip - 1, job.settings.prompt_syntax))
    }

    /// Every text that a picture needs on its way.
    fn keys(&self, job: &Job) -> Vec<Key> {
        let negative = (job.guidance != Guidance::Off).then(|| job.prompts.negative.texts().map(|text| self.negative(job, text)));
        let positive = job.prompts.parts.iter().flat_map(|part| part.prompt.texts()).map(|text| self.positive(job, text));
        negative.into_iter().flatten().chain(positive).collect()
    }

    pub fn has(&self, job: &Job) -> bool {
        self.keys(job).iter().all(|key| self.known.contains_key(key))
    }

    /// Embeds each text of these jobs once; what is known already is kept, what they do not need is forgotten.
    pub fn encode<'j>(&mut self, jobs: impl Iterator<Item = &'j Job>, encoder: &Encoder, progress: &Progress) -> Result<()> {
        let mut before = std::mem::take(&mut self.known);
        for key in jobs.flat_map(|job| self.keys(job)).collect::<Vec<_>>() {
            if self.known.contains_key(&key) {
                continue;
            }
            let embedded = match (before.remove(&key), &key) {
                (Some(embedded), _) => embedded,
                (None, None) => encoder.encode("", 0, Syntax::Plain)?.0.zeros_like()?,
                (None, Some((text, skip, syntax))) => {
                    let (embedded, cut) = encoder.encode(text, *skip, *syntax)?;
                    if let Some(cut) = cut {
                        let tokens = embedded.context.dim(1)?;
                        progress.note(format!("warning: the prompt is longer than {tokens} tokens; this was cut off: {cut}"));
                    }
                    embedded
                }
            };
            self.known.insert(key, embedded);
        }
        Ok(())
    }

    fn get(&self, key: &Key) -> Result<&Embedded> {
        self.known.get(key).context("a prompt was not encoded")
    }

    /// How many tokens the network is told of for a job, which all its texts are repeated to.
    pub fn tokens(&self, job: &Job) -> Result<usize> {
        let mut all = 1;
        for key in self.keys(job) {
            let tokens = self.get(&key)?.context.dim(1)?;
            all = all / greatest_common_divisor(all, tokens) * tokens;
        }
        Ok(all)
    }

    /// Adds a job's first texts to its trace, as the model reads them or its refiner.
    pub fn trace(&self, job: &Job, by_refiner: bool, trace: &mut Trace) -> Result<()> {
        if let Some(part) = job.prompts.parts.first() {
            trace.text(0, by_refiner, self.get(&self.positive(job, part.prompt.at(0)))?)?;
        }
        if job.guidance != Guidance::Off {
            trace.text(1, by_refiner, self.get(&self.negative(job, job.prompts.negative.at(0)))?)?;
        }
        Ok(())
    }

    /// The texts of a batch at a step, from 0.
    pub fn at(&self, batch: &[&Job], step: usize) -> Texts {
        let Some(first) = batch.first() else { return Texts(vec![]) };
        let parts = first.prompts.parts.len();
        let negatives = first.guidance.passes().saturating_sub(parts);
        let row = |job: &Job, row: usize| {
            let at = |prompt: &Changing| prompt.at(step).clone();
            match row.checked_sub(negatives).and_then(|i| job.prompts.parts.get(i)) {
                Some(part) => (self.positive(job, &at(&part.prompt)), false),
                None => (self.negative(job, &at(&job.prompts.negative)), true),
            }
        };
        Texts((0..negatives + parts).flat_map(|i| batch.iter().map(move |job| row(job, i))).collect())
    }

    /// What the network is told of a batch with these texts.
    pub fn of(&self, batch: &[&Job], texts: &Texts) -> Result<Conditioning> {
        let tokens = batch.iter().map(|job| self.tokens(job)).max_by_key(|tokens| tokens.as_ref().map_or(usize::MAX, |n| *n));
        let tokens = tokens.context("the batch is empty")??;
        let embedded = texts.0.iter().map(|(key, _)| self.get(key)).collect::<Result<Vec<_>>>()?;
        // keys and values that are there twice change no attention
        let repeated = |text: &&Embedded| text.context.repeat((1, tokens / text.context.dim(1)?, 1));
        let contexts = embedded.iter().map(repeated).collect::<TensorResult<Vec<_>>>()?;
        let pooled: Vec<&Tensor> = embedded.iter().filter_map(|embedded| embedded.pooled.as_ref()).collect();
        let numbers = |(job, (_, is_negative)): (&&Job, &(Key, bool))| match (job.settings.sizes(), self.config.added_ids) {
            ([original_height, original_width, top, left, ..], REFINER_IDS) => {
                vec![original_height, original_width, top, left, AESTHETIC_SCORES[usize::from(*is_negative)]]
            }
            (sizes, _) => sizes.to_vec(),
        };
        let ids = || batch.iter().cycle().zip(&texts.0).map(numbers).collect();
        let added = (!pooled.is_empty()).then(|| Ok::<_, Error>(Added { pooled: Tensor::cat(&pooled, 0)?, ids: ids() })).transpose()?;
        let guidance = batch.first().map(|job| job.settings.guidance);
        Ok(Conditioning { context: Tensor::cat(&contexts, 0)?, added, guidance })
    }
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a.max(1) } else { greatest_common_divisor(b, a % b) }
}
