//! `--trace`: a short hash of what every stage made of one picture, so that two drawings can be
//! compared stage by stage.
//!
//! Hides what is hashed and what the stages are called. Only a picture's own slice of its batch is
//! hashed, so that a trace depends on neither batch nor neighbours. Read next: [`crate::cli::check`],
//! which compares.

use crate::hex::hex;
use crate::image::Image;
use crate::text::encoder::PromptEmbeds;
use candle_core::{DType, Result, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

/// Bytes of a hash that are kept.
const HASH_BYTES: usize = 8;
/// The prompt's stages, and with guidance the negative prompt's.
const TEXTS: [[&str; 2]; 2] = [
    ["tokens", "text embedding"],
    ["negative tokens", "negative embedding"],
];
const NOISE: &str = "noise";
const PIXELS: &str = "pixels";

/// The two stages of a text.
fn text_stages(nth: usize, by_refiner: bool) -> Option<[String; 2]> {
    TEXTS.get(nth).map(|names| {
        names.map(|name| format!("{}{name}", if by_refiner { "refiner's " } else { "" }))
    })
}

/// The two stages of a step, from 1, and how many there are: the guided network's guess of the
/// finished latents, and what the sampler makes of it.
fn step_stages(step: usize, total: usize) -> [String; 2] {
    ["U-Net", "sampler"].map(|stage| format!("step {step} of {total}, {stage}"))
}

/// Stages in the order of drawing, each with the first 16 hex digits of SHA-256 over its
/// little-endian values.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Trace(Map<String, Value>);

impl Trace {
    /// Its key beside a picture's settings.
    pub const KEY: &str = "trace";

    /// Reads it from what a picture's file says, if it says anything of it. Errors if that is no
    /// trace.
    pub fn of(sdgen: &Value) -> serde_json::Result<Option<Self>> {
        sdgen.get(Self::KEY).map(Self::deserialize).transpose()
    }

    /// Takes the prompt (`nth` 0) or the negative one (1) as the model reads it, or its refiner.
    pub fn text(&mut self, nth: usize, by_refiner: bool, text: &PromptEmbeds) -> Result<()> {
        let Some([tokens, embedding]) = text_stages(nth, by_refiner) else {
            return Ok(());
        };
        self.keep(
            tokens,
            text.token_ids.iter().flat_map(|id| id.to_le_bytes()),
        );
        let parts: Vec<Tensor> = [
            Some(&text.prompt_embeds),
            text.pooled_prompt_embeds.as_ref(),
        ]
        .into_iter()
        .flatten()
        .map(Tensor::flatten_all)
        .collect::<Result<_>>()?;
        self.keep_values(embedding, &Tensor::cat(&parts, 0)?)
    }

    /// Takes the unit noise that the latents start from, [1, h, w, c].
    pub fn noise(&mut self, noise: &Tensor) -> Result<()> {
        self.keep_values(NOISE, noise)
    }

    /// Takes what evaluation `step` of `total`, from 1, came to; both [1, h, w, c].
    pub fn step(
        &mut self,
        step: usize,
        total: usize,
        denoised: &Tensor,
        latents: &Tensor,
    ) -> Result<()> {
        step_stages(step, total)
            .into_iter()
            .zip([denoised, latents])
            .try_for_each(|(stage, values)| self.keep_values(stage, values))
    }

    pub fn picture(&mut self, picture: &Image) {
        self.keep(PIXELS, picture.rgb.iter().copied());
    }

    /// A trace as long as that of a picture with so many texts and evaluations, with or without a
    /// refiner.
    pub fn blank(texts: usize, is_refined: bool, evaluations: usize) -> Self {
        let readers = [Some(false), is_refined.then_some(true)]
            .into_iter()
            .flatten();
        let texts = readers.flat_map(|by_refiner| {
            (0..texts)
                .filter_map(move |nth| text_stages(nth, by_refiner))
                .flatten()
        });
        let names = texts.chain([NOISE, PIXELS].map(String::from));
        let steps = (1..=evaluations).flat_map(|step| step_stages(step, evaluations));
        let mut trace = Self::default();
        names.chain(steps).for_each(|stage| trace.keep(stage, []));
        trace
    }

    /// The first stage that is not the same in both; none if all are.
    pub fn first_difference(&self, other: &Self) -> Option<String> {
        let parted = self
            .0
            .iter()
            .zip(&other.0)
            .find(|(a, b)| a != b)
            .map(|(ours, _)| ours);
        // or one goes on where the other ends
        let more = || {
            self.0
                .iter()
                .nth(other.0.len())
                .or_else(|| other.0.iter().nth(self.0.len()))
        };
        parted.or_else(more).map(|(stage, _)| stage.clone())
    }

    fn keep(&mut self, stage: impl Into<String>, bytes: impl IntoIterator<Item = u8>) {
        let digest = Sha256::digest(Vec::from_iter(bytes));
        let hash = hex(&digest[..HASH_BYTES]);
        self.0.insert(stage.into(), hash.into());
    }

    fn keep_values(&mut self, stage: impl Into<String>, values: &Tensor) -> Result<()> {
        let values = values
            .to_dtype(DType::F32)?
            .flatten_all()?
            .to_vec1::<f32>()?;
        self.keep(stage, values.iter().flat_map(|value| value.to_le_bytes()));
        Ok(())
    }
}
