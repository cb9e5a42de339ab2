//! From jobs to pictures: encode the prompts, sample latents, decode them.
//!
//! Hides how pictures are packed into batches, and how a batch that fails is taken apart. Each
//! stage's weights are freed before the next stage's are read by scope; with several batches the
//! U-Net stays, so that every picture is finished as soon as its batch is.

pub mod family;
pub mod fingerprint;
pub mod guidance;
pub mod init_latents;
pub mod inpaint;
pub mod params;
pub mod preview;
pub mod prompt_cache;
pub mod resolve;

use crate::cli::progress::Progress;
use crate::image::Picture;
use crate::image::load::Fit;
use crate::model::{Autoencoder, Backbone, Decoder, ExtraInputs, ModelKind, Posterior, tiles};
use crate::nn::device::Compute;
use crate::nn::{Forward, cpu};
use crate::pipeline::fingerprint::Trace;
use crate::pipeline::guidance::{Guidance, Guided, Reuse};
use crate::pipeline::init_latents::{Ground, Grounds};
use crate::pipeline::params::Settings;
use crate::pipeline::preview::Preview;
use crate::pipeline::prompt_cache::Contexts;
use crate::pipeline::resolve::{Job, ModelConfig, Request};
use crate::sampling::noise::Generator;
use crate::sampling::sampler::{self, Step};
use crate::sampling::schedule::Plan;
use crate::text::encoder::Encoder;
use crate::weights::{Checkpoint, ModelError};
use anyhow::{Context, Error, Result};
use candle_core::{DType, Result as TensorResult, Tensor};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// A picture is not made of numbers any more: NaN or infinity in the latents.
#[derive(Debug)]
pub struct NotFinite {
    /// what went wrong, when
    pub place: String,
}

impl std::fmt::Display for NotFinite {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(
            f,
            "the picture is not finite (NaN or infinity) {}\n\nhint: the checkpoint is damaged, or overflows in this `--dtype`; nothing was written",
            self.place
        )
    }
}

impl std::error::Error for NotFinite {}

/// The device has no memory left for this.
#[derive(Debug)]
pub struct OutOfMemory;

impl std::fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("the device has not enough memory\n\nhint: draw a smaller picture with `--width` and `--height`, or use `--vae-tiling on` or `--dtype f16`")
    }
}

impl std::error::Error for OutOfMemory {}

/// One finished picture.
pub struct Drawn {
    pub picture: Picture,
    /// seconds of denoising and decoding, divided by the batch
    pub sampling_s: f64,
    pub decoding_s: f64,
    /// if the request asks for it
    pub trace: Option<Trace>,
}

/// Pictures that are looked ahead at: how far a batch reaches for its pictures, and whose prompts
/// are embedded together.
const AHEAD: usize = 128;

/// Draws the jobs and hands each picture to `sink` as soon as it is decoded, or the reason why
/// there is none; errors are those that leave nothing to draw with. Asks `stop` before every batch
/// whether to end there.
pub fn generate<'a>(
    checkpoint: &Checkpoint,
    request: &Request,
    jobs: &[&'a Job],
    compute: &Compute,
    progress: &Progress,
    stop: &dyn Fn() -> bool,
    sink: &mut dyn FnMut(&'a Job, Result<Drawn>),
) -> Result<()> {
    let mut queue = Queue {
        jobs: jobs.iter().copied().collect(),
        again: vec![],
        batch_size: request.batch_size,
    };
    let mut base = Stage::new(checkpoint, &request.model);
    let refiner = checkpoint.refiner.as_deref().zip(request.refiner.as_ref());
    let mut refiner = refiner.map(|(checkpoint, config)| Stage::new(checkpoint, config));
    let mut vae = Vae {
        checkpoint,
        config: &request.vae,
        decoder: None,
    };
    let mut grounds = Grounds::new(checkpoint, &request.vae);
    while let Some(batch) = (!stop()).then(|| queue.next()).flatten() {
        let _awake = compute.device.is_cpu().then(cpu::KeepAwake::start);
        base.prepare(&batch, &queue, compute, progress)?;
        let batch = queue.alike(batch, |job| base.contexts.tokens(job))?;
        let mut steps = Steps::of(&batch, request)?;
        progress.batch(
            batch.iter().map(|job| job.index).collect(),
            jobs.len() - queue.len() - batch.len(),
            jobs.len(),
        );
        let ground = grounds.of(&batch, queue.iter(), compute, progress);
        let start = Instant::now();
        let mut sampled = ground.and_then(|ground| {
            base.sample(&batch, &mut steps, Start::Anew(&ground), compute, progress)
        });
        if let (Some(refiner), Ok(begun)) = (&mut refiner, &sampled) {
            // kept for the next batch; after the last its memory is free for the refiner
            base.unet = base.unet.take().filter(|_| queue.len() > 0);
            refiner.prepare(&batch, &queue, compute, progress)?;
            progress.stage("refining");
            sampled = refiner.sample(&batch, &mut steps, Start::Begun(begun), compute, progress);
        }
        let larger: Vec<Job> = batch.iter().filter_map(|job| job.enlarged()).collect();
        if let (Some(first), Ok(small)) = (larger.first(), &sampled) {
            let decoder = vae.decoder(compute, progress)?;
            let over = |(i, job): (usize, &Job)| {
                let Settings { width, height, .. } = job.settings;
                let drawn = decode(decoder, small, i, &job.settings, request)?;
                grounds.of_drawn(
                    &drawn.fit(width, height, Fit::Stretch),
                    &job.settings,
                    compute,
                    progress,
                )
            };
            let ground = larger
                .iter()
                .enumerate()
                .map(over)
                .collect::<Result<Vec<_>>>();
            steps.latent_shape = request.latent_shape(&first.settings);
            progress.stage("drawing it again, larger");
            let jobs: Vec<&Job> = larger.iter().collect();
            sampled = ground.and_then(|ground| {
                base.sample(&jobs, &mut steps, Start::Anew(&ground), compute, progress)
            });
        }
        let latents = match sampled.map_err(known) {
            Ok(latents) => latents,
            Err(error) => {
                if error.is::<OutOfMemory>() && batch.len() > 1 {
                    queue.batch_size = batch.len().div_ceil(2);
                    progress.note(format!(
                        "warning: no memory for a batch of {}; going on with {}",
                        batch.len(),
                        queue.batch_size
                    ));
                }
                if let Some((job, error)) = queue.put_back(batch, error) {
                    sink(job, Err(error));
                }
                continue;
            }
        };
        let sampling_s = start.elapsed().as_secs_f64() / batch.len() as f64;
        // the same for the VAE
        if queue.len() == 0 {
            (base.unet, refiner) = (None, None);
        }
        let decoder = vae.decoder(compute, progress)?;
        progress.stage("decoding");
        // one at a time: a decode needs far more memory than a latent
        for (i, job) in batch.into_iter().enumerate() {
            let start = Instant::now();
            let drawn = decode(decoder, &latents, i, &job.settings, request)
                .and_then(|drawn| grounds.put_back(job, drawn))
                .map_err(known);
            let mut trace = steps.traces.get_mut(i).map(std::mem::take);
            if let (Some(trace), Ok(picture)) = (&mut trace, &drawn) {
                trace.picture(picture);
            }
            sink(
                job,
                drawn.map(|picture| Drawn {
                    picture,
                    sampling_s,
                    decoding_s: start.elapsed().as_secs_f64(),
                    trace,
                }),
            );
        }
    }
    progress.finish();
    Ok(())
}

/// The decoder: read when it is needed first, and kept.
struct Vae<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a Autoencoder,
    decoder: Option<Decoder>,
}

impl Vae<'_> {
    fn decoder(&mut self, compute: &Compute, progress: &Progress) -> Result<&Decoder> {
        Ok(match &mut self.decoder {
            Some(decoder) => decoder,
            none => {
                progress.stage("reading the VAE");
                let weights = self.checkpoint.weights("vae", &compute.device, DType::F32);
                none.insert(self.config.decoder(&weights).context(ModelError)?)
            }
        })
    }
}

/// What devices say that have no memory left: CUDA, and Metal of a tensor and of a computation.
const NO_MEMORY: [&str; 3] = [
    "out of memory",
    "failed to create metal resource: buffer",
    "insufficient memory",
];

/// Gives an error of the device its kind. The backends of candle have no kind of error for this,
/// only their words.
fn known(error: Error) -> Error {
    let text = format!("{error:#}").to_lowercase().replace('_', " ");
    if NO_MEMORY.iter().any(|words| text.contains(words)) {
        error.context(OutOfMemory)
    } else {
        error
    }
}

/// The jobs that are left, and how they become batches.
struct Queue<'a> {
    jobs: VecDeque<&'a Job>,
    /// parts of batches that failed, the next one last
    again: Vec<Vec<&'a Job>>,
    batch_size: usize,
}

impl<'a> Queue<'a> {
    fn len(&self) -> usize {
        self.jobs.len() + self.again.iter().map(Vec::len).sum::<usize>()
    }

    /// The jobs that are left, about in their order.
    fn iter(&self) -> impl Iterator<Item = &'a Job> {
        self.again.iter().flatten().chain(&self.jobs).copied()
    }

    /// The first job that is left, with those of the next that can be drawn beside it.
    fn next(&mut self) -> Option<Vec<&'a Job>> {
        if let Some(batch) = self.again.pop() {
            return Some(batch);
        }
        let first = self.jobs.pop_front()?;
        let mut batch = vec![first];
        let mut i = 0;
        while batch.len() < self.batch_size && i < AHEAD {
            match self.jobs.get(i) {
                None => break,
                Some(job) if job.packs_with(first) => batch.extend(self.jobs.remove(i)),
                Some(_) => i += 1,
            }
        }
        Some(batch)
    }

    /// Those of a batch that `what` is the same of as of the first; takes back the others.
    fn alike(
        &mut self,
        batch: Vec<&'a Job>,
        what: impl Fn(&Job) -> Result<usize>,
    ) -> Result<Vec<&'a Job>> {
        let each = batch
            .iter()
            .map(|job| what(job))
            .collect::<Result<Vec<_>>>()?;
        let (same, others): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .zip(&each)
            .partition(|(_, is)| Some(*is) == each.first());
        let jobs =
            |part: Vec<(&'a Job, &usize)>| part.into_iter().map(|(job, _)| job).collect::<Vec<_>>();
        self.again
            .extend(Some(jobs(others)).filter(|others| !others.is_empty()));
        Ok(jobs(same))
    }

    /// Takes back a batch that failed, in halves, so that its other pictures are drawn; a single
    /// job is given back.
    fn put_back(&mut self, mut batch: Vec<&'a Job>, error: Error) -> Option<(&'a Job, Error)> {
        if let [job] = batch[..] {
            return Some((job, error));
        }
        let second = batch.split_off(batch.len().div_ceil(2));
        self.again.extend([second, batch]);
        None
    }
}

/// A U-Net with its text encoders: read when needed, freed when not needed any more.
struct Stage<'a> {
    checkpoint: &'a Checkpoint,
    contexts: Contexts<'a>,
    encoder: Option<Encoder>,
    unet: Option<Backbone>,
}

impl<'a> Stage<'a> {
    fn new(checkpoint: &'a Checkpoint, config: &'a ModelConfig) -> Self {
        Self {
            checkpoint,
            contexts: Contexts::new(config),
            encoder: None,
            unet: None,
        }
    }

    /// Embeds the batch's prompts, and those of what comes next, and has the U-Net there.
    fn prepare(
        &mut self,
        batch: &[&Job],
        queue: &Queue,
        compute: &Compute,
        progress: &Progress,
    ) -> Result<()> {
        let config = self.contexts.config;
        if batch.iter().any(|job| !self.contexts.has(job)) {
            let encoder = match self.encoder.take() {
                Some(encoder) => encoder,
                None => {
                    progress.stage("encoding the prompt");
                    Encoder::new(self.checkpoint, &config.encoder, compute).context(ModelError)?
                }
            };
            let next = batch.iter().chain(queue.jobs.iter().take(AHEAD));
            self.contexts.encode(next.copied(), &encoder, progress)?;
            self.encoder = (queue.jobs.len() > AHEAD).then_some(encoder);
        }
        if self.unet.is_none() {
            progress.stage("reading the U-Net");
            let weights = self
                .checkpoint
                .weights("unet", &compute.device, compute.dtype);
            self.unet = Some(config.backbone.build(&weights).context(ModelError)?);
        }
        Ok(())
    }

    /// Denoises one batch: latents [b, h, w, c].
    fn sample(
        &self,
        batch: &[&Job],
        steps: &mut Steps,
        start: Start,
        compute: &Compute,
        progress: &Progress,
    ) -> Result<Tensor> {
        let (
            Some(Job {
                settings,
                guidance,
                plan,
                refine,
                ..
            }),
            Some(unet),
        ) = (batch.first(), &self.unet)
        else {
            anyhow::bail!("nothing to draw")
        };
        let (plan, prediction) = match (refine, &start) {
            (Some(refine), Start::Begun(_)) => (refine, self.contexts.config.scheduler.prediction),
            _ => (plan, settings.prediction),
        };
        let cx = Forward::on(&compute.device).padded(settings.padding());
        let mut texts = self.contexts.at(batch, plan.before());
        let Steps {
            generators,
            traces,
            preview,
            latent_shape: (h, w, c),
            scaling_factor,
            done,
            total,
        } = steps;
        let mut noise = || {
            each(generators, |g| {
                g.latents(*h, *w, *c)?.to_device(&compute.device)
            })
        };
        let (mut extra, mut kept) = (ExtraInputs::default(), None);
        let first = match start {
            Start::Begun(begun) => {
                traces
                    .iter_mut()
                    .zip(batch)
                    .try_for_each(|(trace, job)| self.contexts.trace(job, true, trace))?;
                (begun * plan.handover_scale())?
            }
            Start::Anew(grounds) => {
                let over = Over {
                    grounds,
                    config: self.contexts.config,
                    guidance: *guidance,
                    scaling_factor: *scaling_factor,
                };
                let image = over.image(settings.strength, &mut noise)?;
                let first = varied(noise()?, batch)?;
                // of a picture that is drawn twice the first time alone
                for (i, (trace, job)) in traces
                    .iter_mut()
                    .zip(batch)
                    .enumerate()
                    .filter(|_| *done == 0)
                {
                    self.contexts.trace(job, false, trace)?;
                    trace.noise(&first.narrow(0, i, 1)?)?;
                }
                let mask = over.mask()?;
                extra.concat = over.beside(mask.as_ref(), &mut noise)?;
                let x = match &image {
                    // diffusers' inpainting forgets what it is to repaint all of
                    Some(image) if mask.is_none() || settings.strength < Some(1.0) => {
                        (image + (&first * plan.first_sigma())?)?
                    }
                    _ => (&first * plan.init_noise_sigma())?,
                };
                kept = image
                    .zip(mask)
                    .filter(|_| extra.concat.is_none())
                    .map(|(image, mask)| Kept {
                        image,
                        noise: first,
                        mask,
                    });
                x
            }
        };
        let reuse = Reuse::every(settings.deep_cache);
        let (scale, rescale) = (settings.guidance, settings.guidance_rescale);
        let weights = batch.iter().take(1).flat_map(|job| job.weights()).collect();
        let mut guided = Guided {
            model: unet.bind(cx, &self.contexts.of(batch, &texts)?, extra.clone())?,
            guidance: *guidance,
            weights,
            scale,
            rescale,
            prediction,
            reuse,
        };
        let (before, steps) = (*done, *total);
        let mut bad_step = None;
        let mut denoise = |x: &Tensor, sigma: f64, timestep: f64| {
            let now = self.contexts.at(batch, plan.step_of(*done - before));
            if now != texts {
                let conditioning = self.contexts.of(batch, &now);
                let conditioning = conditioning.map_err(candle_core::Error::wrap)?;
                guided.model = unet.bind(cx, &conditioning, extra.clone())?;
                texts = now;
            }
            let denoised = guided.denoise(x, sigma, timestep)?;
            *done += 1;
            progress.step(*done, *total);
            if bad_step.is_none() && !finite(&denoised)? {
                bad_step = Some(*done);
                candle_core::bail!("not finite");
            }
            Ok(denoised)
        };
        let mut on_step = |step: &Step| {
            if let Some(preview) = preview {
                progress.preview(settings.width * batch.len(), settings.height, || {
                    preview.picture(step.denoised)
                });
            }
            let each = |i: usize, trace: &mut Trace| {
                trace.step(
                    before + step.index + 1,
                    steps,
                    &step.denoised.narrow(0, i, 1)?,
                    &step.latents.narrow(0, i, 1)?,
                )
            };
            traces
                .iter_mut()
                .enumerate()
                .try_for_each(|(i, trace)| each(i, trace))?;
            kept.as_ref()
                .map(|kept| kept.put_into(step, plan))
                .transpose()
        };
        let result = sampler::sample(plan, first, &mut denoise, &mut noise, &mut on_step);
        match bad_step {
            Some(step) => Err(NotFinite {
                place: format!("after {step} of {total} denoising steps"),
            }
            .into()),
            None => Ok(result?),
        }
    }
}

/// Where a batch begins.
enum Start<'a> {
    /// with noise, and with what the pictures are drawn over, if that is not empty
    Anew(&'a [Arc<Ground>]),
    /// with the latents of another stage, [b, h, w, c]
    Begun(&'a Tensor),
}

/// What a batch is drawn over, in diffusers' order of drawing random numbers.
struct Over<'a> {
    /// of each picture, or none at all
    grounds: &'a [Arc<Ground>],
    config: &'a ModelConfig,
    guidance: Guidance,
    scaling_factor: f64,
}

impl Over<'_> {
    /// The latents of the sources [b, h, w, c], where they are needed.
    fn image(
        &self,
        strength: Option<f64>,
        noise: &mut dyn FnMut() -> TensorResult<Tensor>,
    ) -> TensorResult<Option<Tensor>> {
        let needed = match self.config.kind {
            ModelKind::TextToImage => true,
            ModelKind::Inpaint => strength < Some(1.0),
            ModelKind::InstructPix2Pix => false,
        };
        if !needed || self.grounds.is_empty() {
            return Ok(None);
        }
        Posterior::cat(self.grounds.iter().map(|ground| &ground.image))?
            .sample(noise)
            .map(Some)
    }

    /// [b, h, w, 1], 1 where they are repainted; none if all of them is.
    fn mask(&self) -> TensorResult<Option<Tensor>> {
        let masks: Vec<&Tensor> = self
            .grounds
            .iter()
            .filter_map(|ground| Some(&ground.repainted.as_ref()?.mask))
            .collect();
        if masks.is_empty() {
            Ok(None)
        } else {
            Tensor::cat(&masks, 0).map(Some)
        }
    }

    /// What the network sees beside the latents, [passes*b, h, w, k].
    fn beside(
        &self,
        mask: Option<&Tensor>,
        noise: &mut dyn FnMut() -> TensorResult<Tensor>,
    ) -> TensorResult<Option<Tensor>> {
        let passes = self.guidance.passes();
        if let Some(mask) = mask {
            let rest = self
                .grounds
                .iter()
                .filter_map(|ground| Some(&ground.repainted.as_ref()?.rest));
            // diffusers draws for it, whether the network takes it or not
            let rest = Posterior::cat(rest)?.sample(noise)?;
            if self.config.kind == ModelKind::Inpaint {
                let beside = Tensor::cat(&[mask, &rest], 3)?;
                return Tensor::cat(&vec![&beside; passes], 0).map(Some);
            }
        }
        if self.config.kind != ModelKind::InstructPix2Pix {
            return Ok(None);
        }
        let image = (Posterior::cat(self.grounds.iter().map(|ground| &ground.image))?.mean
            / self.scaling_factor)?;
        let unconditional = image.zeros_like()?;
        let rows: Vec<&Tensor> = (0..passes)
            .map(|i| {
                if i == 0 && passes > 1 {
                    &unconditional
                } else {
                    &image
                }
            })
            .collect();
        Tensor::cat(&rows, 0).map(Some)
    }
}

/// What stays of the sources while the rest is repainted: put back after every step, with the noise
/// of that step.
struct Kept {
    /// latents [b, h, w, c]
    image: Tensor,
    noise: Tensor,
    /// [b, h, w, 1]
    mask: Tensor,
}

impl Kept {
    /// A step's latents with this where nothing is repainted.
    fn put_into(&self, step: &Step, plan: &Plan) -> TensorResult<Tensor> {
        let noisy =
            ((&self.image + (&self.noise * step.sigma)?)? / plan.latents_scale(step.sigma))?;
        &noisy + (step.latents - &noisy)?.broadcast_mul(&self.mask)?
    }
}

/// One tensor of each generator, in a row.
fn each(
    generators: &mut [Generator],
    draw: impl Fn(&mut Generator) -> TensorResult<Tensor>,
) -> TensorResult<Tensor> {
    Tensor::cat(
        &generators
            .iter_mut()
            .map(draw)
            .collect::<TensorResult<Vec<_>>>()?,
        0,
    )
}

/// The first noise of a batch [b, h, w, c], each picture's as far on the way to another seed's as
/// it asks for.
fn varied(noise: Tensor, batch: &[&Job]) -> TensorResult<Tensor> {
    if batch.iter().all(|job| job.settings.variation.is_none()) {
        return Ok(noise);
    }
    let each = batch.iter().enumerate().map(|(i, job)| {
        let own = noise.narrow(0, i, 1)?;
        job.settings
            .variation
            .map_or(Ok(own.clone()), |variation| variation.of(&own))
    });
    Tensor::cat(&each.collect::<TensorResult<Vec<_>>>()?, 0)
}

/// How far a batch is, whichever stage it is in. Every picture has its own generator, so neighbours
/// never matter.
struct Steps<'a> {
    generators: Vec<Generator>,
    /// of each picture, where they are asked for
    traces: Vec<Trace>,
    preview: Option<&'a Preview>,
    latent_shape: (usize, usize, usize),
    scaling_factor: f64,
    /// evaluations of networks
    done: usize,
    total: usize,
}

impl<'a> Steps<'a> {
    fn of(batch: &[&Job], request: &'a Request) -> Result<Self> {
        let Some(first) = batch.first() else {
            anyhow::bail!("the batch is empty")
        };
        let generators = batch
            .iter()
            .map(|job| Generator::new(job.settings.seed))
            .collect();
        let traces = batch
            .iter()
            .filter(|_| request.trace)
            .map(|_| Trace::default())
            .collect();
        let (preview, latent_shape) = (
            request.preview.as_ref(),
            request.latent_shape(&first.settings),
        );
        let scaling_factor = request.vae.scaling_factor();
        Ok(Self {
            generators,
            traces,
            preview,
            latent_shape,
            scaling_factor,
            done: 0,
            total: first.evaluations(),
        })
    }
}

/// Picture `i` of latents [b, h, w, c].
fn decode(
    decoder: &Decoder,
    latents: &Tensor,
    i: usize,
    settings: &Settings,
    request: &Request,
) -> Result<Picture> {
    let cx = Forward::on(latents.device()).padded(settings.padding());
    let latents = latents.narrow(0, i, 1)?;
    let rgb = match request.tile(settings) {
        Some(side) => tiles::apply(cx, &latents, side, |cx, tile| decoder.decode(cx, tile))?,
        None => decoder.decode(cx, &latents)?,
    }; // [1, h, w, 3]
    if !finite(&rgb)? {
        return Err(NotFinite {
            place: "after decoding".into(),
        }
        .into());
    }
    Picture::from_tensor(&rgb)?
        .pop()
        .context("nothing was decoded")
}

pub(crate) fn finite(x: &Tensor) -> TensorResult<bool> {
    Ok(x.to_dtype(DType::F32)?
        .abs()?
        .sum_all()?
        .to_scalar::<f32>()?
        .is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_memory_is_known_by_its_words() {
        let cuda = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
        let metal = "Metal error Failed to create metal resource: Buffer";
        let late = "Command buffer had following error: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)";
        for words in [cuda, metal, late] {
            assert!(
                known(anyhow::anyhow!(words).context("the batch failed")).is::<OutOfMemory>(),
                "{words}"
            );
        }
        assert!(!known(anyhow::anyhow!("no kernel image is available")).is::<OutOfMemory>());
    }
}
