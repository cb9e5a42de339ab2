//! What one picture is: everything that determines its pixels, as the metadata in its file says it.

use crate::image::{Metadata, Parameters, a1111_sampler, a1111_schedule, parameters};
use crate::sampler::Sampler;
use crate::schedule::{Prediction, Schedule};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::sync::Arc;

/// The settings of one picture. The same settings and model give the same pixels on the same kind of machine; the
/// field names are the keys of the `sdgen` JSON in the picture's file and of a `--json` line. Texts are shared, as a
/// list may have a million pictures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// of the program
    pub version: Arc<str>,
    pub prompt: Arc<str>,
    /// empty for none
    pub negative: Arc<str>,
    pub seed: u64,
    /// pixels
    pub width: usize,
    /// pixels
    pub height: usize,
    pub steps: usize,
    pub guidance: f64,
    pub sampler: Sampler,
    /// none: the checkpoint's own
    pub schedule: Option<Schedule>,
    /// none: the sampler's own
    pub eta: Option<f64>,
    /// 1: the last layer of the text encoder, 2: the one before, ...
    pub clip_skip: usize,
    /// the U-Net's inner levels run in every so manyth step
    pub deep_cache: usize,
    pub prediction: Prediction,
    /// of the U-Net's and the text encoder's weights: f32, bf16 or f16
    pub dtype: Arc<str>,
    pub model: Arc<str>,
    /// [`crate::weights::Checkpoint::hash`]
    pub model_hash: Arc<str>,
}

impl Settings {
    /// Whether the network runs twice a step. As in diffusers, guidance at or below 1 is off.
    pub fn guided(&self) -> bool {
        self.guidance > 1.0
    }

    /// Whether these settings draw the same picture: all is equal but the program's version.
    pub fn draws_the_same_as(&self, other: &Self) -> bool {
        *self == Self { version: self.version.clone(), ..other.clone() }
    }

    /// What the picture's file remembers: these settings as JSON, and as A1111's text.
    pub fn metadata(&self) -> Metadata {
        let beyond_one = [("Clip skip", self.clip_skip), ("Deep cache", self.deep_cache)];
        let extra: Vec<_> = beyond_one.into_iter().filter(|(_, n)| *n > 1).map(|(name, n)| (name, n.to_string())).collect();
        let fields = Parameters {
            prompt: &self.prompt,
            negative: &self.negative,
            steps: self.steps,
            sampler: a1111_sampler(self.sampler),
            schedule: self.schedule.map(a1111_schedule),
            guidance: self.guidance,
            seed: self.seed,
            width: self.width,
            height: self.height,
            model_hash: self.model_hash.get(..10),
            model: &self.model,
            extra: &extra,
        };
        Metadata { parameters: parameters(&fields), sdgen: json!(self) }
    }
}
