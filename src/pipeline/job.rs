//! One image that is fully decided: what it is, and how its latents are denoised.

use super::guidance::Guidance;
use super::settings::{Hires, Reference, Settings};
use crate::sampling::SamplingPlan;
use crate::text::prompt::Prompts;
use std::sync::Arc;

/// An image to generate. Nothing about it is open, and nothing contradicts.
#[derive(Debug, Clone)]
pub struct Job {
    /// everything that determines its pixels
    pub settings: Settings,
    /// how often the network runs in a step, and on what
    pub guidance: Guidance,
    /// its prompts, parsed
    pub prompts: Arc<Prompts>,
    /// those of the second, larger pass
    pub hires_prompts: Option<Arc<Prompts>>,
    /// the noise levels of the base model
    pub plan: Arc<SamplingPlan>,
    /// those of the refiner that takes over
    pub refiner_plan: Option<Arc<SamplingPlan>>,
    /// those of the second, larger pass
    pub hires_plan: Option<Arc<SamplingPlan>>,
}

impl Job {
    /// How often networks run for it; a guided pair counts once.
    pub fn evaluations(&self) -> usize {
        let plans = [
            Some(&self.plan),
            self.refiner_plan.as_ref(),
            self.hires_plan.as_ref(),
        ];
        plans
            .into_iter()
            .flatten()
            .map(|plan| plan.evaluations())
            .sum()
    }

    /// The second, larger pass of an image that is drawn twice.
    pub fn hires_pass(&self) -> Option<Self> {
        let (plan, prompts) = (self.hires_plan.clone()?, self.hires_prompts.clone()?);
        let Hires {
            width,
            height,
            strength,
            ..
        } = self.settings.hires?;
        let strength = Some(strength);
        let settings = Settings {
            width,
            height,
            strength,
            hires: None,
            ..self.settings.clone()
        };
        Some(Self {
            settings,
            plan,
            prompts,
            hires_plan: None,
            hires_prompts: None,
            ..self.clone()
        })
    }

    /// The weights of the prompts that `AND` joins.
    pub fn prompt_weights(&self) -> impl Iterator<Item = f64> {
        self.prompts.parts.iter().map(|part| part.weight)
    }

    /// Whether both can be denoised in one batch: they share all that one forward pass shares.
    pub fn packs_with(&self, other: &Self) -> bool {
        let (a, b) = (&self.settings, &other.settings);
        let repaints = |settings: &Settings| Some(settings.source.as_ref()?.repaints());
        // as many tokens, at the same positions
        let size = |reference: &Reference| (reference.width, reference.height);
        let sizes =
            |settings: &'_ Settings| -> Vec<_> { settings.references.iter().map(size).collect() };
        Arc::ptr_eq(&self.plan, &other.plan)
            && (a.width, a.height, a.hires, a.tile) == (b.width, b.height, b.hires, b.tile)
            && self.prompt_weights().eq(other.prompt_weights())
            && (
                a.guidance,
                a.guidance_rescale,
                a.true_guidance,
                &a.skip_layer_guidance,
                a.image_guidance,
                a.deep_cache,
            ) == (
                b.guidance,
                b.guidance_rescale,
                b.true_guidance,
                &b.skip_layer_guidance,
                b.image_guidance,
                b.deep_cache,
            )
            && a.max_sequence_length == b.max_sequence_length
            && repaints(a) == repaints(b)
            && sizes(a) == sizes(b)
    }
}
