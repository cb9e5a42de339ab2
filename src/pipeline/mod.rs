//! From parameters to images: prompts are encoded, latents denoised, images decoded.
//!
//! [`Pipeline::generate_all`] tells the whole story. Hides how images are packed into batches, how
//! a batch that fails is taken apart, and when weights are read and freed. Read next: [`resolve`],
//! which decides everything before, and [`denoise`], which walks a sampling plan.

pub mod config;
pub mod denoise;
pub mod event;
pub mod family;
pub mod fingerprint;
pub mod guidance;
pub mod init_latents;
pub mod inpaint;
pub mod job;
pub mod memory;
pub mod model_spec;
pub mod networks;
pub mod options;
pub mod preview;
pub mod prompt_cache;
pub mod queue;
pub mod references;
pub mod resolve;
pub mod settings;

use crate::error::ModelError;
use crate::error::{Cancelled, Error, ErrorKind, NotFinite, OutOfMemory, mark_out_of_memory};
use crate::image::Image;
use crate::image::load::Fit;
use crate::model::{ModelKind, Posterior, tiles};
use crate::nn::Forward;
use crate::nn::cpu::KeepAwake;
use crate::nn::device::Compute;
use crate::nn::layers::is_finite;
use crate::nn::weights::SharedSource;
use crate::sampling::Prediction;
use crate::weights::Checkpoint;
use crate::weights::lora::Lora;
use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use config::PipelineConfig;
use denoise::{Denoising, Init};
use event::{Event, Events, Generated, OnEvent};
use init_latents::{InitLatents, InitLatentsCache};
use job::Job;
use networks::{Model, Networks};
use options::VaeTiling;
use prompt_cache::PromptCache;
use queue::{BatchQueue, Queued};
use references::ReferenceLatents;
use resolve::{Params, Resolver};
use settings::{Merged, Settings, UsedLora};
use std::cell::RefCell;
use std::ops::ControlFlow;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// A model that is ready to generate images.
///
/// Networks are read when they are needed first and stay in memory. A pipeline may be shared by
/// threads: each image has the pixels that it has when it is generated alone.
pub struct Pipeline {
    pub(crate) checkpoint: Arc<Checkpoint>,
    /// whether the blocks of large networks are read each time that they are needed, as memory is
    /// short
    pub(crate) reads_again: bool,
    pub(crate) compute: Compute,
    pub(crate) config: PipelineConfig,
    pub(crate) options: PipelineOptions,
    networks: Networks,
    identity: OnceLock<Identity>,
}

/// What holds for all images of a pipeline, and is not a part of its checkpoint.
#[derive(Debug, Clone, Copy)]
pub struct PipelineOptions {
    /// what the network predicts; none: what the checkpoint says
    pub prediction: Option<Prediction>,
    pub vae_tiling: VaeTiling,
}

/// How a run goes about its images.
#[derive(Debug, Clone, Copy)]
pub struct RunOptions {
    /// images in a forward pass at most; never changes an image
    pub batch_size: usize,
    /// whether each image brings a hash of every stage
    pub trace: bool,
    /// whether networks stay in memory; else each is freed as soon as the run needs it no more
    pub keep_networks: bool,
}

/// What tells a pipeline's model from all others, as the metadata of an image says it.
pub struct Identity {
    pub model_hash: Arc<str>,
    pub config_hash: Option<Arc<str>>,
    pub refiner_hash: Option<Arc<str>>,
    pub vae_hash: Option<Arc<str>>,
    pub merges: Vec<Merged>,
    pub loras: Arc<[UsedLora]>,
}

impl Identity {
    fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let hash = |model: &Checkpoint| model.hash().map(Arc::<str>::from);
        let used = |lora: &Lora| {
            let (name, hash) = (lora.name.as_str().into(), lora.hash()?.into());
            Ok(UsedLora {
                name,
                hash,
                strength: lora.strength,
                text_strength: Some(lora.text_strength).filter(|own| *own != lora.strength),
            })
        };
        Ok(Self {
            model_hash: hash(checkpoint)?,
            config_hash: checkpoint.config_hash().map(Arc::from),
            refiner_hash: checkpoint.refiner().map(hash).transpose()?,
            vae_hash: checkpoint.vae().map(hash).transpose()?,
            merges: Merged::all(checkpoint)?,
            loras: checkpoint.loras().iter().map(used).collect::<Result<_>>()?,
        })
    }
}

impl Pipeline {
    /// A pipeline of an opened checkpoint. Reads no weights. Errors if no image can be begun with
    /// it.
    pub fn new(checkpoint: Checkpoint, compute: Compute, options: PipelineOptions) -> Result<Self> {
        let config = PipelineConfig::new(&checkpoint)?;
        let compute = match config.base.backbone.is_flow() {
            true => compute.for_transformer(),
            false => compute,
        };
        let networks = Networks::default();
        let reads_again = compute.device.is_cpu()
            && config.base.backbone.is_stack()
            && memory::is_short(&checkpoint, &config).context(ModelError)?;
        Ok(Self {
            checkpoint: checkpoint.into(),
            reads_again,
            compute,
            config,
            options,
            networks,
            identity: OnceLock::new(),
        })
    }

    /// Returns the hashes of everything that the weights are made of. Looks into the files the
    /// first time, and errors if they cannot be read.
    pub fn identity(&self) -> Result<&Identity> {
        if let Some(identity) = self.identity.get() {
            return Ok(identity);
        }
        let identity = Identity::of(&self.checkpoint).context(ModelError)?;
        Ok(self.identity.get_or_init(|| identity))
    }

    /// Generates all jobs. Each image is given to `sink` with its place in the run as soon as it is
    /// decoded, or the reason why there is none; errors are those that leave nothing to generate
    /// with.
    pub fn generate_all(
        &self,
        jobs: &[&Job],
        options: RunOptions,
        on_event: &mut OnEvent,
        sink: &mut Sink,
    ) -> Result<()> {
        let events = Events::new(on_event);
        let mut run = Run::new(self, options, &events, sink);
        let mut queue = BatchQueue::new(jobs, options.batch_size);
        let remaining = |queue: &BatchQueue| Event::NextBatch {
            remaining: queue.remaining(),
        };
        while queue.remaining() > 0 && events.emit(remaining(&queue)).is_continue() {
            let Some(batch) = queue.next_batch() else {
                break;
            };
            // threads of the pool that sleep would take longer to wake than a small kernel takes
            let _awake = self.compute.device.is_cpu().then(KeepAwake::start);
            run.encode_prompts(&jobs_of(&batch), &queue)?;
            // prompts of different numbers of tokens cannot be stacked
            let batch = queue.take_matching(batch, |job| run.base_prompts.tokens(job))?;
            let before = jobs.len() - queue.remaining() - batch.len();
            run.announce(&batch, before, jobs.len());
            match run
                .denoise_batch(&jobs_of(&batch), &queue)
                .map_err(mark_out_of_memory)
            {
                Ok(denoised) => run.decode_batch(&batch, denoised, &queue)?,
                Err(error) if error.is::<ModelError>() => return Err(error),
                Err(error) => run.retry(batch, error, &mut queue),
            }
        }
        Ok(())
    }
}

impl Pipeline {
    /// Generates one image. `on_event` is told what happens; see [`Event`] for its answers. It must
    /// not use the pipeline itself, which may be waiting for the answer.
    ///
    /// The pipeline may be shared by threads: each image has the pixels that it has alone.
    ///
    /// ```
    /// use sdgen::{ModelSpec, Params, Pipeline};
    /// use std::ops::ControlFlow;
    ///
    /// # fn main() -> Result<(), sdgen::Error> {
    /// let pipeline = Pipeline::load(&ModelSpec::embedded())?;
    /// let params = Params::new("a frog in a top hat").seed(7).steps(8);
    /// let image = pipeline.generate(&params, |_| ControlFlow::Continue(()))?;
    /// assert_eq!((image.width, image.height), (128, 128));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Errors name the parameter that is wrong ([`ErrorKind::Params`]), or tell that the model is
    /// damaged, that memory does not suffice, that the image is not finite, or that `on_event`
    /// ended it.
    pub fn generate(
        &self,
        params: &Params,
        on_event: impl FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Image, Error> {
        let mut images = self.generate_batch(std::slice::from_ref(params), on_event)?;
        images
            .pop()
            .unwrap_or_else(|| Err(Error::new(ErrorKind::Cancelled, Cancelled.into())))
    }

    /// Generates several images, those that are alike in batches, and returns them in their order,
    /// each or the reason why there is none. Images that `on_event` ends are left out at the end.
    ///
    /// Errors as [`Self::generate`], where nothing can be generated at all.
    pub fn generate_batch(
        &self,
        params: &[Params],
        mut on_event: impl FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Vec<Result<Image, Error>>, Error> {
        let resolve = || {
            let mut resolver = Resolver::new(self)?;
            params
                .iter()
                .map(|params| resolver.resolve(params))
                .collect::<Result<Vec<_>>>()
        };
        let jobs = resolve().map_err(|error| Error::new(ErrorKind::Params, error))?;
        let jobs: Vec<&Job> = jobs.iter().collect();
        let options = RunOptions {
            batch_size: self.auto_batch_size(&jobs),
            trace: false,
            keep_networks: true,
        };
        let mut images: Vec<Option<Result<Image, Error>>> = jobs.iter().map(|_| None).collect();
        let mut take = |index: usize, result: Result<Generated>| {
            let image = result.map(|generated| generated.image);
            if let Some(place) = images.get_mut(index) {
                *place = Some(image.map_err(|error| Error::new(ErrorKind::Other, error)));
            }
        };
        self.generate_all(&jobs, options, &mut on_event, &mut take)
            .map_err(|error| Error::new(ErrorKind::Other, error))?;
        Ok(images.into_iter().flatten().collect())
    }
}

/// The jobs of a batch.
fn jobs_of<'a>(batch: &[Queued<'a>]) -> Vec<&'a Job> {
    batch.iter().map(|queued| queued.job).collect()
}

/// Takes the outcome of each image, by its place in the run.
pub type Sink<'a> = dyn FnMut(usize, Result<Generated>) + 'a;

/// One call of [`Pipeline::generate_all`]: what it has cached, and where its events go.
pub struct Run<'a> {
    pipeline: &'a Pipeline,
    options: RunOptions,
    events: &'a Events<'a>,
    sink: RefCell<&'a mut Sink<'a>>,
    base_prompts: PromptCache<'a>,
    refiner_prompts: Option<PromptCache<'a>>,
    init_latents: InitLatentsCache,
    reference_latents: ReferenceLatents,
}

/// The latents of a batch, [b, h, w, c], and what was noted on the way to them.
struct Denoised {
    latents: Tensor,
    denoising: Denoising,
    /// seconds that each image took
    sampling_s: f64,
}

impl<'a> Run<'a> {
    fn new(
        pipeline: &'a Pipeline,
        options: RunOptions,
        events: &'a Events<'a>,
        sink: &'a mut Sink<'a>,
    ) -> Self {
        Self {
            pipeline,
            options,
            events,
            sink: RefCell::new(sink),
            base_prompts: PromptCache::new(&pipeline.config.base),
            refiner_prompts: pipeline.config.refiner.as_ref().map(PromptCache::new),
            init_latents: InitLatentsCache::default(),
            reference_latents: ReferenceLatents::default(),
        }
    }

    fn base(&self) -> Model<'a> {
        let Pipeline {
            checkpoint,
            config,
            networks,
            ..
        } = self.pipeline;
        let again = || -> SharedSource { checkpoint.clone() };
        Model {
            checkpoint,
            again: self.pipeline.reads_again.then(again),
            config: &config.base,
            networks: &networks.base,
        }
    }

    fn refiner(&self) -> Option<Model<'a>> {
        let Pipeline {
            checkpoint,
            config,
            networks,
            ..
        } = self.pipeline;
        let (checkpoint, config) = checkpoint.refiner().zip(config.refiner.as_ref())?;
        Some(Model {
            checkpoint,
            again: None,
            config,
            networks: &networks.refiner,
        })
    }

    /// The device that tensors are on.
    pub fn device(&self) -> &'a Device {
        &self.pipeline.compute.device
    }

    /// What the forward passes for an image with these settings share.
    pub fn forward(&self, settings: &Settings) -> Forward<'static> {
        Forward::on(self.device())
            .padded(settings.padding())
            .with_precision(self.pipeline.compute.precision())
    }

    /// Pixels a latent, in each direction.
    pub fn vae_factor(&self) -> usize {
        self.pipeline.config.vae.factor()
    }

    /// Encodes the prompts of a batch, and those of what comes next, and reads the base model.
    fn encode_prompts(&mut self, batch: &[&Job], queue: &BatchQueue) -> Result<()> {
        let (base, keep) = (self.base(), self.options.keep_networks);
        encode(
            &mut self.base_prompts,
            &base,
            batch,
            queue,
            self.pipeline,
            keep,
            self.events,
        )?;
        base.networks
            .backbone(&base, &self.pipeline.compute, self.events)
            .map(drop)
    }

    /// Tells that a batch begins.
    fn announce(&self, batch: &[Queued], before: usize, total: usize) {
        let images: Vec<usize> = batch.iter().map(|queued| queued.index).collect();
        let _ = self.events.emit(Event::Batch {
            images: &images,
            before,
            total,
        });
    }

    /// Denoises a batch: with the base model, with the refiner that finishes what it began, and
    /// once more over the result enlarged, as the jobs say.
    fn denoise_batch(&mut self, batch: &[&'a Job], queue: &BatchQueue) -> Result<Denoised> {
        let start = Instant::now();
        let (compute, events) = (&self.pipeline.compute, self.events);
        let base = self.base();
        let references = self.references(batch)?;
        let mut denoising = Denoising::new(batch, references, self)?;
        let init = {
            let mut cache = std::mem::take(&mut self.init_latents);
            let init = cache.get(batch, self);
            self.init_latents = cache;
            init?
        };
        if !self.keeps_vae_encoder(batch, queue) {
            self.pipeline.networks.vae_encoder.free();
        }
        let backbone = base.networks.backbone(&base, compute, events)?;
        let mut latents = denoising.run(
            &backbone,
            &self.base_prompts,
            batch,
            Init::Images(&init),
            self,
        )?;
        if let Some(refiner) = self.refiner() {
            drop(backbone);
            // kept for the next batch; after the last its memory is free for the refiner
            if queue.remaining() == 0 && !self.options.keep_networks {
                base.networks.backbone.free();
            }
            latents = self.refine(refiner, &mut denoising, batch, queue, &latents)?;
        } else if let Some(passes) = hires_passes(batch) {
            let init = self.enlarge(&latents, batch, &passes)?;
            if self.pipeline.config.base.kind == ModelKind::Control {
                // of the larger size
                denoising.references = self.references(&passes.iter().collect::<Vec<_>>())?;
            }
            denoising.latent_shape = self.pipeline.config.latent_shape(&passes[0].settings);
            events.stage("drawing it again, larger");
            let passes: Vec<&Job> = passes.iter().collect();
            latents = denoising.run(
                &backbone,
                &self.base_prompts,
                &passes,
                Init::Images(&init),
                self,
            )?;
        }
        let sampling_s = start.elapsed().as_secs_f64() / batch.len() as f64;
        Ok(Denoised {
            latents,
            denoising,
            sampling_s,
        })
    }

    /// The latents of a batch's reference pictures.
    fn references(&mut self, batch: &[&Job]) -> Result<Vec<Posterior>> {
        let mut cache = std::mem::take(&mut self.reference_latents);
        let references = cache.get(batch, self);
        self.reference_latents = cache;
        references
    }

    /// Has the refiner finish the latents of a batch.
    fn refine(
        &mut self,
        refiner: Model<'a>,
        denoising: &mut Denoising,
        batch: &[&Job],
        queue: &BatchQueue,
        latents: &Tensor,
    ) -> Result<Tensor> {
        let (pipeline, keep, events) = (self.pipeline, self.options.keep_networks, self.events);
        let Some(mut prompts) = self.refiner_prompts.take() else {
            anyhow::bail!("the refiner has no prompts")
        };
        let encoded = encode(&mut prompts, &refiner, batch, queue, pipeline, keep, events);
        let refined = encoded.and_then(|()| {
            let backbone = refiner
                .networks
                .backbone(&refiner, &pipeline.compute, events)?;
            events.stage("refining");
            denoising.run(&backbone, &prompts, batch, Init::Handover(latents), self)
        });
        self.refiner_prompts = Some(prompts);
        refined
    }

    /// Decodes the latents of the first pass, enlarges the images and encodes them again.
    fn enlarge(
        &self,
        latents: &Tensor,
        batch: &[&Job],
        passes: &[Job],
    ) -> Result<Vec<Arc<InitLatents>>> {
        let enlarge = |(i, (job, pass)): (usize, (&&Job, &Job))| {
            let Settings { width, height, .. } = pass.settings;
            let small = self.decode(latents, i, &job.settings)?;
            let large = small.fit(width, height, Fit::Stretch);
            InitLatents::of_drawn(&large, &pass.settings, self).map(Arc::new)
        };
        batch.iter().zip(passes).enumerate().map(enlarge).collect()
    }

    /// Decodes the images of a batch, one at a time, as a decode needs far more memory than a
    /// latent, and hands them out.
    fn decode_batch(
        &mut self,
        batch: &[Queued<'a>],
        denoised: Denoised,
        queue: &BatchQueue,
    ) -> Result<()> {
        let Denoised {
            latents,
            mut denoising,
            sampling_s,
        } = denoised;
        if queue.remaining() == 0 && !self.options.keep_networks {
            self.pipeline.networks.base.backbone.free();
            self.pipeline.networks.refiner.backbone.free();
        }
        self.decoder()?;
        self.events.stage("decoding");
        for (i, Queued { index, job }) in batch.iter().enumerate() {
            let start = Instant::now();
            let image = self.decode(&latents, i, &job.settings);
            let image = image.and_then(|image| self.init_latents.composite(job, image));
            let mut trace = denoising.traces.get_mut(i).map(std::mem::take);
            if let (Some(trace), Ok(image)) = (&mut trace, &image) {
                trace.picture(image);
            }
            let decoding_s = start.elapsed().as_secs_f64();
            let result = image.map(|image| Generated {
                image,
                sampling_s,
                decoding_s,
                trace,
            });
            self.hand_out(*index, result.map_err(mark_out_of_memory));
        }
        Ok(())
    }

    /// Puts a batch that failed back into the queue, in halves; a single job has failed for good.
    fn retry(&self, batch: Vec<Queued<'a>>, error: anyhow::Error, queue: &mut BatchQueue<'a>) {
        if error.is::<Cancelled>() {
            for Queued { index, .. } in batch {
                self.hand_out(index, Err(Cancelled.into()));
            }
            return;
        }
        if error.is::<OutOfMemory>() && batch.len() > 1 {
            let (before, now) = (batch.len(), batch.len().div_ceil(2));
            queue.limit(now);
            self.events.warn(format!(
                "no memory for a batch of {before}; going on with {now}"
            ));
        }
        if let Some((Queued { index, .. }, error)) = queue.put_back(batch, error) {
            self.hand_out(index, Err(error));
        }
    }

    fn hand_out(&self, index: usize, result: Result<Generated>) {
        let result = result.map_err(|error| self.with_loras(error));
        if let Ok(Generated { image, .. }) = &result {
            let _ = self.events.emit(Event::Image { index, image });
        }
        if let Ok(mut sink) = self.sink.try_borrow_mut() {
            sink(index, result);
        }
    }

    /// Names the LoRAs where it may be theirs that an image is not finite.
    fn with_loras(&self, error: anyhow::Error) -> anyhow::Error {
        let loras = self.pipeline.checkpoint.loras();
        if loras.is_empty() || !error.is::<NotFinite>() {
            return error;
        }
        let names: Vec<String> = loras
            .iter()
            .map(|lora| format!("`{}`", lora.name))
            .collect();
        let names = names.join(", ");
        error.context(format!(
            "with the LoRA {names}\n\nhint: the LoRA is damaged or too strong, or the checkpoint is; \
             draw once without `--lora` to find out; nothing was written"
        ))
    }

    fn decoder(&self) -> Result<Arc<crate::model::Decoder>> {
        let Pipeline {
            checkpoint,
            config,
            networks,
            compute,
            ..
        } = self.pipeline;
        networks.vae_decoder(checkpoint, config, compute, self.events)
    }

    /// Whether the VAE's encoder is needed again, so that it stays in memory.
    fn keeps_vae_encoder(&self, batch: &[&Job], queue: &BatchQueue) -> bool {
        self.options.keep_networks
            || batch.iter().any(|job| job.hires_plan.is_some())
            || self.init_latents.needs_encoder(queue.iter())
            || self
                .reference_latents
                .needs_encoder(queue.iter(), self.pipeline.config.reference_sizes())
    }

    /// Encodes RGB [1, h, w, 3] in 0..=1 to the latents of an image with these settings.
    pub fn encode(&self, rgb: &Tensor, settings: &Settings) -> Result<Posterior> {
        let Pipeline {
            checkpoint,
            config,
            networks,
            compute,
            ..
        } = self.pipeline;
        let encoder = networks.vae_encoder(checkpoint, config, compute, self.events)?;
        Ok(encoder.encode(self.forward(settings), rgb, config.tile(settings))?)
    }

    /// Decodes image `i` of latents [b, h, w, c]. Errors if it is not finite.
    fn decode(&self, latents: &Tensor, i: usize, settings: &Settings) -> Result<Image> {
        let decoder = self.decoder()?;
        let cx = self.forward(settings);
        let latents = latents.narrow(0, i, 1)?;
        let rgb = match self.pipeline.config.tile(settings) {
            Some(side) => tiles::apply(cx, &latents, side, |cx, tile| decoder.decode(cx, tile))?,
            None => decoder.decode(cx, &latents)?,
        }; // [1, h, w, 3]
        if !is_finite(&rgb)? {
            return Err(NotFinite {
                place: "after decoding".into(),
            }
            .into());
        }
        Image::from_tensor(&rgb)?
            .pop()
            .context("nothing was decoded")
    }
}

/// The second, larger passes of a batch, if it has any.
fn hires_passes(batch: &[&Job]) -> Option<Vec<Job>> {
    let passes: Vec<Job> = batch.iter().filter_map(|job| job.hires_pass()).collect();
    Some(passes).filter(|passes| !passes.is_empty())
}

/// Encodes the prompts of a batch, where they are not cached, and those of what comes next.
fn encode(
    prompts: &mut PromptCache,
    model: &Model,
    batch: &[&Job],
    queue: &BatchQueue,
    pipeline: &Pipeline,
    keep: bool,
    events: &Events,
) -> Result<()> {
    if batch.iter().all(|job| prompts.has(job)) {
        return Ok(());
    }
    let encoder = model
        .networks
        .text_encoder(model, &pipeline.compute, events)?;
    prompts.encode(
        batch.iter().copied().chain(queue.upcoming()),
        &encoder,
        events,
    )?;
    if !keep && !queue.is_long() {
        model.networks.text_encoder.free();
    }
    Ok(())
}
