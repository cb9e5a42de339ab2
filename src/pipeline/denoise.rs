//! The denoising of one batch: from noise, or from init latents, to finished latents.
//!
//! [`Denoising::run`] walks a sampling plan. Hides the order in which diffusers draws random
//! numbers: every image has its own generator, so neighbours in a batch never matter.

use super::Run;
use super::config::ModelConfig;
use super::event::{Event, Preview};
use super::fingerprint::Trace;
use super::guidance::{CfgDenoiser, DeepCache, Guidance, SkippingPass};
use super::init_latents::InitLatents;
use super::job::Job;
use super::prompt_cache::PromptCache;
use super::references::for_passes;
use super::settings::Settings;
use crate::error::{Cancelled, NotFinite};
use crate::model::{Backbone, Conditioning, ExtraInputs, LatentFormat, ModelKind, Posterior};
use crate::nn::layers::is_finite;
use crate::sampling::noise::Generator;
use crate::sampling::{self, SamplingPlan, Step};
use anyhow::Result;
use candle_core::{Result as TensorResult, Tensor};
use std::sync::Arc;

/// How far the denoising of a batch is, through all its passes.
pub struct Denoising {
    generators: Vec<Generator>,
    /// a hash of every stage of each image, where they are asked for
    pub traces: Vec<Trace>,
    /// height, width and channels of the latents of the present pass
    pub latent_shape: (usize, usize, usize),
    /// latents of each reference picture in the size of the present pass, [b, h, w, c]
    pub references: Vec<Posterior>,
    /// evaluations of networks so far
    done: usize,
    /// evaluations of networks in all passes
    total: usize,
}

/// Where a pass begins.
#[derive(Clone, Copy)]
pub enum Init<'a> {
    /// from noise, and from init images where there are any
    Images(&'a [Arc<InitLatents>]),
    /// from the latents of another model, [b, h, w, c]
    Handover(&'a Tensor),
}

/// What a pass begins with.
struct InitState {
    /// noisy latents, [b, h, w, c]
    latents: Tensor,
    /// what the network takes beside the latents, [passes*b, h, w, k]
    concat: Option<Tensor>,
    /// what is put back after every step
    inpaint: Option<InpaintState>,
}

impl Denoising {
    /// The beginning of a batch with the latents of its reference pictures, [b, h, w, c] each. Errors
    /// if it is empty.
    pub fn new(batch: &[&Job], references: Vec<Posterior>, run: &Run) -> Result<Self> {
        let Some(first) = batch.first() else {
            anyhow::bail!("the batch is empty")
        };
        let traces = batch
            .iter()
            .filter(|_| run.options.trace)
            .map(|_| Trace::default());
        Ok(Self {
            generators: batch
                .iter()
                .map(|job| Generator::new(job.settings.seed))
                .collect(),
            traces: traces.collect(),
            latent_shape: run.pipeline.config.latent_shape(&first.settings),
            references,
            done: 0,
            total: first.evaluations(),
        })
    }

    /// Denoises a batch with one model and returns its latents, [b, h, w, c]. Errors if the latents
    /// are not finite any more, or if the caller cancels.
    pub fn run(
        &mut self,
        backbone: &Backbone,
        prompts: &PromptCache,
        batch: &[&Job],
        init: Init,
        run: &Run,
    ) -> Result<Tensor> {
        let Some(first) = batch.first() else {
            anyhow::bail!("the batch is empty")
        };
        let Job {
            settings, guidance, ..
        } = first;
        // as in A1111, prompts count from where a picture begins, and a refiner goes on
        let (plan, first_call) = match (&first.refiner_plan, init) {
            (Some(plan), Init::Handover(_)) => {
                (plan, plan.before() * plan.sampler.spec().calls_per_step())
            }
            _ => (&first.plan, 0),
        };
        let cx = run.forward(settings);
        let mut texts = prompts.at(batch, first_call);
        let state = self.init(init, plan, batch, prompts, run)?;
        let references = match prompts.config.kind {
            ModelKind::Control => &[][..],
            _ => &self.references,
        };
        let extra = ExtraInputs {
            concat: state.concat,
            references: for_passes(references, guidance.passes())?,
        };
        // the network that leaves blocks out sees the prompts, and no negative ones
        let bind_skipping = |all: &Conditioning| {
            let rows = all.context.dim(0)? / guidance.passes();
            let prompts = all.rows(rows, rows * (guidance.passes() - 1))?;
            backbone.bind(cx, &prompts, ExtraInputs::default())
        };
        let conditioning = prompts.of(batch, &texts)?;
        let skip = match (&settings.skip_layer_guidance, guidance) {
            (Some(options), Guidance::Text(_)) => Some(SkippingPass {
                model: bind_skipping(&conditioning)?,
                options: options.clone(),
                calls: 0,
                total: plan.evaluations(),
            }),
            _ => None,
        };
        let mut denoiser = CfgDenoiser {
            model: backbone.bind(cx, &conditioning, extra.clone())?,
            skip,
            guidance: *guidance,
            weights: first.prompt_weights().collect(),
            scale: settings.true_guidance.unwrap_or(settings.guidance),
            rescale: settings.guidance_rescale,
            deep_cache: DeepCache::every(settings.deep_cache),
        };
        let Self {
            generators,
            traces,
            latent_shape,
            done,
            total,
            ..
        } = self;
        let (before, total) = (*done, *total);
        let mut failure: Option<anyhow::Error> = None;
        let mut denoise = |x: &Tensor, sigma: f64, timestep: f64| {
            let now = prompts.at(batch, first_call + *done - before);
            if now != texts {
                let conditioning = prompts.of(batch, &now).map_err(candle_core::Error::wrap)?;
                denoiser.model = backbone.bind(cx, &conditioning, extra.clone())?;
                if let Some(skip) = &mut denoiser.skip {
                    skip.model = bind_skipping(&conditioning)?;
                }
                texts = now;
            }
            let denoised = denoiser.denoise(x, plan.scalings(sigma), timestep)?;
            *done += 1;
            let step = Event::Step { done: *done, total };
            if run.events.emit(step).is_break() {
                failure = Some(Cancelled.into());
            } else if !is_finite(&denoised)? {
                // some samplers run the network more than once in a step
                let unit = match total == settings.steps {
                    true => "denoising steps",
                    false => "runs of the network",
                };
                let place = format!("after {done} of {total} {unit}");
                failure = Some(NotFinite { place }.into());
            }
            match failure {
                Some(_) => candle_core::bail!("the denoising was ended"),
                None => Ok(denoised),
            }
        };
        let mut on_step = |step: &Step| {
            preview(step, settings, batch.len(), run);
            for (i, trace) in traces.iter_mut().enumerate() {
                let own = |x: &Tensor| x.narrow(0, i, 1);
                let number = before + step.index + 1;
                trace.step(number, total, &own(step.denoised)?, &own(step.latents)?)?;
            }
            state
                .inpaint
                .as_ref()
                .map(|inpaint| inpaint.restore(step, plan))
                .transpose()
        };
        let mut noise = || draw_noise(generators, *latent_shape, run);
        let result = sampling::sample(plan, state.latents, &mut denoise, &mut noise, &mut on_step);
        match failure {
            Some(failure) => Err(failure),
            None => Ok(result?),
        }
    }

    /// What a pass begins with.
    fn init(
        &mut self,
        init: Init,
        plan: &SamplingPlan,
        batch: &[&Job],
        prompts: &PromptCache,
        run: &Run,
    ) -> Result<InitState> {
        match init {
            Init::Handover(latents) => {
                for (trace, job) in self.traces.iter_mut().zip(batch) {
                    prompts.trace(job, true, trace)?;
                }
                let latents = (latents * plan.handover_scale())?;
                Ok(InitState {
                    latents,
                    concat: None,
                    inpaint: None,
                })
            }
            Init::Images(images) => self.init_from_images(images, plan, batch, prompts, run),
        }
    }

    /// What a pass from noise begins with, in diffusers' order of drawing random numbers.
    fn init_from_images(
        &mut self,
        images: &[Arc<InitLatents>],
        plan: &SamplingPlan,
        batch: &[&Job],
        prompts: &PromptCache,
        run: &Run,
    ) -> Result<InitState> {
        let Some(Job {
            settings, guidance, ..
        }) = batch.first()
        else {
            anyhow::bail!("the batch is empty")
        };
        let Self {
            generators,
            latent_shape,
            references,
            ..
        } = self;
        let mut draw = || draw_noise(generators, *latent_shape, run);
        let config = prompts.config;
        let control = match config.kind {
            ModelKind::Control => references.first().map(|it| it.sample(&mut draw)),
            _ => None,
        };
        let control = control.transpose()?;
        let image = init_image(images, config, settings.strength, &mut draw)?;
        let noise = with_variations(draw()?, batch)?;
        let mask = inpaint_mask(images)?;
        let latent_format = run.pipeline.config.vae.latent_format();
        let concat = Concat {
            images,
            config,
            guidance: *guidance,
            latent_format,
            control,
        };
        let concat = concat.make(mask.as_ref(), &mut draw)?;
        if self.done == 0 {
            // prompts and noise are traced in the first pass only, steps in all of them
            for (i, (trace, job)) in self.traces.iter_mut().zip(batch).enumerate() {
                prompts.trace(job, false, trace)?;
                trace.noise(&noise.narrow(0, i, 1)?)?;
            }
        }
        let latents = match &image {
            // diffusers' inpainting forgets an image of which all is repainted
            Some(image) if mask.is_none() || settings.strength < Some(1.0) => {
                plan.add_noise(image, &noise, plan.first_sigma())?
            }
            _ => (&noise * plan.init_noise_sigma())?,
        };
        let inpaint = image
            .zip(mask)
            .filter(|_| matches!(config.kind, ModelKind::TextToImage | ModelKind::Control))
            .map(|(image, mask)| InpaintState { image, noise, mask });
        Ok(InitState {
            latents,
            concat,
            inpaint,
        })
    }
}

/// Shows the caller what the images of a batch will be.
fn preview(step: &Step, settings: &Settings, images: usize, run: &Run) {
    let Some(map) = &run.pipeline.config.preview else {
        return;
    };
    let make = || map.picture(step.denoised);
    let (width, height) = (settings.width * images, settings.height);
    let _ = run.events.emit(Event::Preview(&Preview {
        make: &make,
        width,
        height,
    }));
}

/// The latents of the init images, [b, h, w, c], where the network starts from them.
fn init_image(
    images: &[Arc<InitLatents>],
    config: &ModelConfig,
    strength: Option<f64>,
    noise: &mut dyn FnMut() -> TensorResult<Tensor>,
) -> TensorResult<Option<Tensor>> {
    let is_needed = match config.kind {
        ModelKind::TextToImage | ModelKind::Fill | ModelKind::Control => true,
        ModelKind::Inpaint => strength < Some(1.0),
        ModelKind::InstructPix2Pix => false,
    };
    if !is_needed || images.is_empty() {
        return Ok(None);
    }
    Posterior::cat(images.iter().map(|init| &init.image))?
        .sample(noise)
        .map(Some)
}

/// The masks of a batch, [b, h, w, 1], 1 where it is repainted; none if all of it is.
fn inpaint_mask(images: &[Arc<InitLatents>]) -> TensorResult<Option<Tensor>> {
    let masks = images
        .iter()
        .filter_map(|init| Some(&init.inpaint.as_ref()?.mask));
    let masks: Vec<&Tensor> = masks.collect();
    if masks.is_empty() {
        Ok(None)
    } else {
        Tensor::cat(&masks, 0).map(Some)
    }
}

/// What some networks take beside the latents: inpainting models the mask and the masked image,
/// InstructPix2Pix the image, FLUX.1 Canny and Depth the control image.
struct Concat<'a> {
    images: &'a [Arc<InitLatents>],
    config: &'a ModelConfig,
    guidance: Guidance,
    latent_format: LatentFormat,
    /// the latents of the control image, [b, h, w, c]
    control: Option<Tensor>,
}

impl Concat<'_> {
    /// [passes*b, h, w, k], or none for a network that takes nothing.
    fn make(
        &self,
        mask: Option<&Tensor>,
        noise: &mut dyn FnMut() -> TensorResult<Tensor>,
    ) -> TensorResult<Option<Tensor>> {
        let passes = self.guidance.passes();
        let repeated = |concat: &Tensor| Tensor::cat(&vec![concat; passes], 0);
        if let Some(mask) = mask {
            let inpaint = || self.images.iter().filter_map(|init| init.inpaint.as_ref());
            // diffusers draws noise for it, whether the network takes it or not
            let masked = Posterior::cat(inpaint().map(|it| &it.masked_image))?.sample(noise)?;
            let pixels = || {
                let pixels: Vec<&Tensor> = inpaint().filter_map(|it| it.pixels.as_ref()).collect();
                Tensor::cat(&pixels, 0)
            };
            let concat = match self.config.kind {
                ModelKind::Inpaint => Some(Tensor::cat(&[mask, &masked], 3)?),
                ModelKind::Fill => Some(Tensor::cat(&[masked, pixels()?], 3)?),
                _ => None,
            };
            if let Some(concat) = concat {
                return repeated(&concat).map(Some);
            }
        }
        if let Some(control) = &self.control {
            return repeated(control).map(Some);
        }
        if self.config.kind != ModelKind::InstructPix2Pix {
            return Ok(None);
        }
        let image = Posterior::cat(self.images.iter().map(|init| &init.image))?;
        // the network sees it as the VAE encodes it
        let image = self.latent_format.process_out(&image.mean)?;
        let unconditional = image.zeros_like()?;
        let row = |pass| {
            if pass == 0 && passes > 1 {
                &unconditional
            } else {
                &image
            }
        };
        Tensor::cat(&(0..passes).map(row).collect::<Vec<_>>(), 0).map(Some)
    }
}

/// The unmasked latents of a batch, put back after every step with the noise of that step.
struct InpaintState {
    /// latents [b, h, w, c]
    image: Tensor,
    noise: Tensor,
    /// [b, h, w, 1], 1 where it is repainted
    mask: Tensor,
}

impl InpaintState {
    /// A step's latents with the unmasked ones put back.
    fn restore(&self, step: &Step, plan: &SamplingPlan) -> TensorResult<Tensor> {
        let noisy = plan.add_noise(&self.image, &self.noise, step.sigma)?;
        let noisy = (noisy / plan.latents_scale(step.sigma))?;
        &noisy + (step.latents - &noisy)?.broadcast_mul(&self.mask)?
    }
}

/// Unit noise of a batch, [b, h, w, c], from each image's own generator.
fn draw_noise(
    generators: &mut [Generator],
    (h, w, c): (usize, usize, usize),
    run: &Run,
) -> TensorResult<Tensor> {
    let draw = |generator: &mut Generator| generator.latents(h, w, c)?.to_device(run.device());
    Tensor::cat(
        &generators
            .iter_mut()
            .map(draw)
            .collect::<TensorResult<Vec<_>>>()?,
        0,
    )
}

/// The first noise of a batch, [b, h, w, c], each image's mixed with the noise of another seed
/// where it asks for that.
fn with_variations(noise: Tensor, batch: &[&Job]) -> TensorResult<Tensor> {
    if batch.iter().all(|job| job.settings.variation.is_none()) {
        return Ok(noise);
    }
    let own = |(i, job): (usize, &&Job)| {
        let own = noise.narrow(0, i, 1)?;
        job.settings
            .variation
            .map_or(Ok(own.clone()), |variation| variation.of(&own))
    };
    Tensor::cat(
        &batch
            .iter()
            .enumerate()
            .map(own)
            .collect::<TensorResult<Vec<_>>>()?,
        0,
    )
}
