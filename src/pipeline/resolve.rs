//! From what is asked for to what is decided: every default is filled in here, and every
//! contradiction dies here, before a weight is read.

use super::Pipeline;
use super::family::{Defaults, Family, REFINE_AT};
use super::guidance::{Guidance, SkipLayers};
use super::inpaint::InitImageFinder;
use super::job::Job;
use super::options::{GUIDANCES, JobOptions, VaeTiling};
use super::references::ReferenceFinder;
use super::settings::{Hires, PromptBlend, Reference, Settings, Tile, UsedEmbedding};
use crate::error::ModelError;
use crate::image::MAX_SIDE_PX;
use crate::nn::device::available_memory;
use crate::sampling::noise::Variation;
use crate::sampling::{Prediction, Sampler, SamplingPlan, Schedule, plan, plan_img2img};
use crate::text::encoder::T5_LENGTHS;
use crate::text::prompt::{Calls, Prompts, Syntax, without_comments};
use crate::weights::Checkpoint;
use anyhow::{Context, Result, bail, ensure};
use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;

/// How much is drawn anew in the second pass of `hires` where nobody says.
const HIRES_STRENGTH: f64 = 0.5;
/// An init image is brought down to the model's own number of pixels where it has more than this
/// many times as many.
const MUCH_LARGER: f64 = 2.0;

/// What is asked of one image. What is not given is the model's default.
///
/// ```
/// use sdgen::Params;
/// let params = Params::new("a frog in a top hat").seed(7).size(128, 128).steps(20);
/// ```
#[derive(Debug, Clone)]
pub struct Params {
    pub(crate) prompt: Arc<str>,
    pub(crate) seed: u64,
    /// another prompt whose embedding is mixed in
    pub(crate) blend: Option<PromptBlend>,
    /// the noise of another seed that is mixed in
    pub(crate) variation: Option<Variation>,
    /// everything else; what is none is the model's default
    pub(crate) options: Arc<JobOptions>,
}

impl Params {
    /// An image of this prompt, with seed 0.
    pub fn new(prompt: impl Into<Arc<str>>) -> Self {
        let (prompt, seed, options) = (prompt.into(), 0, Arc::default());
        Self {
            prompt,
            seed,
            blend: None,
            variation: None,
            options,
        }
    }

    /// The seed of the noise. The same seed gives the same image, alone or in any batch.
    pub fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// What to steer away from.
    pub fn negative(self, prompt: impl Into<Arc<str>>) -> Self {
        self.with(|options| options.negative = Some(prompt.into()))
    }

    /// Width and height in pixels: multiples of 8, and of what the model takes.
    pub fn size(self, width: usize, height: usize) -> Self {
        self.with(|options| (options.width, options.height) = (Some(width), Some(height)))
    }

    /// Denoising steps, from 1.
    pub fn steps(self, steps: usize) -> Self {
        self.with(|options| options.steps = Some(steps))
    }

    /// The scale of classifier-free guidance; 1 turns it off and halves the work.
    pub fn guidance(self, scale: f64) -> Self {
        self.with(|options| options.guidance = Some(scale))
    }

    /// The sampler.
    pub fn sampler(self, sampler: Sampler) -> Self {
        self.with(|options| options.sampler = Some(sampler.into()))
    }

    /// The schedule of noise levels.
    pub fn schedule(self, schedule: Schedule) -> Self {
        self.with(|options| options.schedule = Some(schedule))
    }

    /// Starts from an image file; `strength` from 0 to 1 says how much of it is drawn anew.
    pub fn init_image(self, path: impl Into<PathBuf>, strength: f64) -> Self {
        self.with(|options| {
            (options.image, options.strength) = (Some(path.into()), Some(strength));
        })
    }

    /// Has an editing model look at this image file too while it draws, after those that were given
    /// before.
    pub fn reference(self, path: impl Into<PathBuf>) -> Self {
        self.with(|options| options.reference.get_or_insert_default().push(path.into()))
    }

    /// Repaints the init image only where this image file is white.
    pub fn mask(self, path: impl Into<PathBuf>) -> Self {
        self.with(|options| options.mask = Some(path.into()))
    }

    /// Makes an image whose copies fit together side by side and one above the other.
    pub fn seamless(self) -> Self {
        self.with(|options| options.tile = Some(Tile::Xy))
    }

    fn with(mut self, change: impl FnOnce(&mut JobOptions)) -> Self {
        change(Arc::make_mut(&mut self.options));
        self
    }
}

/// What the sampling plans of a job depend on.
#[derive(Clone, Copy, PartialEq)]
struct PlanKey {
    sampler: Sampler,
    schedule: Option<Schedule>,
    steps: usize,
    eta: Option<f64>,
    prediction: Prediction,
    refine_at: Option<f64>,
    strength: Option<f64>,
    hires_strength: Option<f64>,
    /// tokens of the picture, and of that of the second pass, where levels depend on them
    tokens: [usize; 2],
}

/// The sampling plans of a job, in the order of [`Job`].
#[derive(Clone)]
struct Plans {
    base: Arc<SamplingPlan>,
    refiner: Option<Arc<SamplingPlan>>,
    hires: Option<Arc<SamplingPlan>>,
}

/// Resolves the images of a run, which share plans, parsed prompts and source images.
pub struct Resolver<'a> {
    pipeline: &'a Pipeline,
    init_images: InitImageFinder,
    references: ReferenceFinder,
    plans: Vec<(PlanKey, Plans)>,
    /// the job before: its prompts are often those of the next
    last: Option<Job>,
    /// free memory at the beginning, in bytes; none where it is not known or not needed
    available: Option<u64>,
    defaults: Defaults,
    /// width and height that the model was trained on, in pixels
    own_size: (usize, usize),
    // texts that all settings share, as a run may have a million images
    version: Arc<str>,
    dtype: Arc<str>,
    model: Arc<str>,
    refiner: Option<Arc<str>>,
    vae: Option<Arc<str>>,
    empty: Arc<str>,
}

impl<'a> Resolver<'a> {
    /// A resolver of images of this pipeline. Errors if the model's configuration is damaged.
    pub fn new(pipeline: &'a Pipeline) -> Result<Self> {
        let (checkpoint, config) = (&pipeline.checkpoint, &pipeline.config);
        let name = |model: &Checkpoint| Arc::<str>::from(model.name.as_str());
        let factor = config.vae.factor();
        let (height, width) = config.base.backbone.sample_size()?;
        Ok(Self {
            pipeline,
            init_images: InitImageFinder::default(),
            references: ReferenceFinder::default(),
            plans: vec![],
            last: None,
            available: pipeline
                .compute
                .device
                .is_cpu()
                .then(available_memory)
                .flatten(),
            defaults: Family::detect(checkpoint)
                .context(ModelError)?
                .defaults(checkpoint),
            own_size: (width * factor, height * factor),
            version: env!("CARGO_PKG_VERSION").into(),
            dtype: pipeline.compute.dtype_name().into(),
            model: name(checkpoint),
            refiner: checkpoint.refiner().map(name),
            vae: checkpoint.vae().map(name),
            empty: "".into(),
        })
    }

    /// Fills in the model's defaults and decides everything about an image. Errors name the option
    /// that is wrong, and what it may be.
    pub fn resolve(&mut self, params: &Params) -> Result<Job> {
        let settings = self.settings(params)?;
        let mut job = self.decide(settings)?;
        job.settings.vae_tiling = self.is_tiled(&job.settings);
        // last, as it looks into the files
        let identity = self.pipeline.identity()?;
        let settings = &mut job.settings;
        settings.model_hash = identity.model_hash.clone();
        settings.config_hash = identity.config_hash.clone();
        settings.refiner_hash = identity.refiner_hash.clone();
        settings.vae_hash = identity.vae_hash.clone();
        settings.merges = identity.merges.clone();
        settings.loras = identity.loras.clone();
        Ok(job)
    }

    /// The settings of an image, with the model's defaults.
    fn settings(&mut self, params: &Params) -> Result<Settings> {
        let Params {
            prompt,
            seed,
            blend,
            variation,
            options,
        } = params;
        let (pipeline, own, defaults) = (self.pipeline, self.own_size, self.defaults);
        let base = &pipeline.config.base;
        let source = self.init_images.find(options)?;
        let count = options.reference.as_ref().map_or(0, Vec::len);
        base.check_references(count, &self.model)?;
        let rule = pipeline.config.reference_sizes();
        let references = self.references.find(options, rule)?;
        // as in diffusers, a picture has the size of the first that it is drawn after
        let of = match (&source, references.first()) {
            (Some((source, of)), _) if source.only_masked.is_none() => Some(*of),
            (None, Some(first)) => Some((first.width, first.height)),
            _ => None,
        };
        let (width, height) = match of {
            Some(of) => self.size_over(options, of, own),
            None => (
                options.width.unwrap_or(own.0),
                options.height.unwrap_or(own.1),
            ),
        };
        let references = self
            .references
            .for_drawing(options, rule, references, (width, height));
        let sampler = match options.sampler {
            Some(named) => named.sampler,
            None => base.scheduler.sampler().context(ModelError)?,
        };
        let reads_sentences = base.encoder.reads_sentences();
        let prompt_syntax = options.prompt_syntax.unwrap_or(match reads_sentences {
            true => Syntax::Plain,
            false => Syntax::A1111,
        });
        if reads_sentences && prompt_syntax == Syntax::A1111 {
            bail!(
                "`--prompt-syntax a1111` means nothing to `{}`, which reads prompts as sentences\n\nhint: leave it out",
                self.model
            );
        }
        let text = |text: &Arc<str>| match (prompt_syntax, without_comments(text)) {
            (Syntax::A1111, Cow::Owned(text)) => Arc::from(text),
            _ => text.clone(),
        };
        Ok(Settings {
            version: self.version.clone(),
            prompt: text(prompt),
            negative: text(options.negative.as_ref().unwrap_or(&self.empty)),
            prompt_syntax,
            seed: *seed,
            variation: *variation,
            to: blend.as_ref().map(|blend| PromptBlend {
                prompt: text(&blend.prompt),
                ..blend.clone()
            }),
            width,
            height,
            tile: options.tile,
            steps: options.steps.unwrap_or(defaults.steps),
            guidance: options.guidance.unwrap_or(defaults.guidance),
            guidance_rescale: options.guidance_rescale.unwrap_or(0.0),
            true_guidance: options.true_guidance,
            skip_layer_guidance: options.skip_layer_guidance.clone(),
            sampler,
            schedule: options.schedule().map(|schedule| match schedule {
                Schedule::Ays if base.added_ids > 0 => Schedule::AysSdxl,
                other => other,
            }),
            strength: source
                .as_ref()
                .and_then(|_| base.strength(options.strength)),
            image_guidance: source
                .as_ref()
                .and_then(|_| base.image_guidance(options.image_guidance)),
            source: source.map(|(source, _)| source),
            references,
            hires: self.hires(options, width, height)?,
            eta: options
                .eta
                .or(defaults.eta.filter(|_| sampler == Sampler::Tcd)),
            original_size: options.original_size,
            crop: options.crop,
            target_size: options.target_size,
            refine_at: options
                .refine_at
                .or(self.refiner.as_ref().map(|_| REFINE_AT)),
            refiner: self.refiner.clone(),
            refiner_hash: None,
            clip_skip: options.clip_skip.unwrap_or(1),
            max_sequence_length: options.max_sequence_length,
            deep_cache: options.deep_cache.unwrap_or(1),
            prediction: pipeline
                .options
                .prediction
                .unwrap_or(base.scheduler.prediction),
            dtype: self.dtype.clone(),
            model: self.model.clone(),
            model_hash: self.empty.clone(),
            config_hash: None,
            model_sha256: None,
            loras: Arc::default(),
            embeddings: Arc::default(),
            vae: self.vae.clone(),
            vae_hash: None,
            vae_sha256: None,
            merges: vec![],
            vae_tiling: false,
            upscaler: None,
            upscaler_hash: None,
            upscale: None,
        })
    }

    /// Width and height of an image after another one of the size `of`: its own, in the steps that
    /// the model has. Where it is much larger than the model's `own` size, it is brought down to
    /// that number of pixels.
    fn size_over(
        &self,
        options: &JobOptions,
        of: (usize, usize),
        own: (usize, usize),
    ) -> (usize, usize) {
        let step = self.pipeline.config.step().max(8);
        if options.extend.is_some() {
            return (of.0.next_multiple_of(step), of.1.next_multiple_of(step));
        }
        let whole = |pixels: f64| ((pixels / step as f64 + 1e-6) as usize).max(1) * step;
        let (w, h) = (of.0 as f64, of.1 as f64);
        match (options.width, options.height) {
            (Some(width), Some(height)) => (width, height),
            (Some(width), None) => (width, whole(width as f64 * h / w)),
            (None, Some(height)) => (whole(height as f64 * w / h), height),
            (None, None) => {
                let area = (own.0 * own.1) as f64;
                let is_much_larger = w * h > MUCH_LARGER * area;
                let scale = if is_much_larger {
                    (area / (w * h)).sqrt()
                } else {
                    1.0
                };
                (whole(w * scale), whole(h * scale))
            }
        }
    }

    /// The second, larger pass of an image of this size.
    fn hires(&self, options: &JobOptions, width: usize, height: usize) -> Result<Option<Hires>> {
        let Some(factor) = options.hires else {
            if options.hires_strength.is_some() {
                bail!(
                    "`--hires-strength` without `--hires`\n\nhint: `--hires 2x` draws it again at \
                     twice the size"
                );
            }
            return Ok(None);
        };
        let step = self.pipeline.config.step().max(8);
        let larger = |pixels: usize| (pixels as f64 * factor / step as f64).round() as usize * step;
        let strength = options.hires_strength.unwrap_or(HIRES_STRENGTH);
        let (width, height) = (larger(width), larger(height));
        Ok(Some(Hires {
            factor,
            strength,
            width,
            height,
        }))
    }

    /// Decides everything about an image whose settings are complete but for what is told of the
    /// model's files. Errors if this pipeline cannot generate it.
    pub fn decide(&mut self, mut settings: Settings) -> Result<Job> {
        let base = &self.pipeline.config.base;
        self.check(&settings)?;
        let Plans {
            base: plan,
            refiner: refiner_plan,
            hires: hires_plan,
        } = self.plans(&settings)?;
        // as in diffusers, guidance at or below 1 is off, and a network that takes its scale as an
        // input runs once, unless it is guided by the negative prompt too
        let is_on = match settings.true_guidance {
            Some(scale) => scale > 1.0,
            None => settings.guidance > 1.0 && !base.backbone.embeds_guidance(),
        };
        let (prompts, hires_prompts) = self.prompts(&settings)?;
        settings.embeddings = self.learned_words(&prompts, settings.prompt_syntax)?;
        if prompts.parts.len() > 1 && (!is_on || settings.image_guidance.is_some()) {
            bail!(
                "prompts that `AND` joins need guidance by text alone\n\nhint: use `--guidance` \
                 above 1, or write it in lower case"
            );
        }
        let guidance = match settings.image_guidance {
            Some(scale) if is_on && scale >= 1.0 => Guidance::TextAndImage(scale),
            None if is_on => Guidance::Text(prompts.parts.len()),
            _ => Guidance::Off,
        };
        let job = Job {
            settings,
            guidance,
            prompts,
            hires_prompts,
            plan,
            refiner_plan,
            hires_plan,
        };
        self.last = Some(job.clone());
        Ok(job)
    }

    /// Whether an image is to be decoded in tiles.
    fn is_tiled(&self, settings: &Settings) -> bool {
        self.pipeline.has_tiles(settings)
            && match self.pipeline.options.vae_tiling {
                VaeTiling::Auto => self
                    .available
                    .is_some_and(|available| self.pipeline.vae_bytes(settings) > available),
                VaeTiling::On => true,
                VaeTiling::Off => false,
            }
    }

    /// Errors if settings contradict each other or the model.
    fn check(&self, settings: &Settings) -> Result<()> {
        let config = &self.pipeline.config;
        let step = config.step();
        check_size("width", settings.width, step)?;
        check_size("height", settings.height, step)?;
        let (width, height) = settings.final_size();
        if let Some(most) = config.base.backbone.largest_side()
            && width.max(height) > most * config.vae.factor()
        {
            let most = most * config.vae.factor();
            bail!(
                "`{}` has positions for pictures of {most}x{most} at most, not for \
                 {width}x{height}\n\nhint: draw a smaller one, and `--upscale` it",
                settings.model
            );
        }
        let Settings {
            guidance,
            image_guidance,
            true_guidance,
            ..
        } = settings;
        for scale in [Some(*guidance), *image_guidance, *true_guidance] {
            ensure!(
                scale.is_none_or(|scale| GUIDANCES.contains(&scale)),
                "a guidance of {} is not possible: it must be a number from 0 to {}",
                scale.unwrap_or_default(),
                GUIDANCES.end()
            );
        }
        let given = |options: &[(&'static str, bool)]| {
            options
                .iter()
                .find(|(_, is_given)| *is_given)
                .map(|(name, _)| *name)
        };
        let of_unets = given(&[
            ("tile", settings.tile.is_some()),
            ("deep-cache", settings.deep_cache > 1),
            (
                "clip-skip",
                settings.clip_skip > 1 && config.base.encoder.layers() == 1,
            ),
            ("prediction", settings.prediction != Prediction::Flow),
        ]);
        if let (true, Some(name)) = (config.base.scheduler.is_flow(), of_unets) {
            bail!(
                "`--{name}` means nothing to `{}`\n\nhint: leave it out; only U-Nets take it",
                settings.model
            );
        }
        let takes_scale = config.base.backbone.embeds_guidance();
        if true_guidance.is_some() && !(takes_scale && config.base.scheduler.is_flow()) {
            bail!(
                "`--true-guidance` means nothing to `{}`\n\nhint: `--guidance` is its guidance by \
                 the negative prompt; the other is for models that take that as an input, such as \
                 FLUX.1 dev",
                settings.model
            );
        }
        if let Some(SkipLayers { blocks, .. }) = &settings.skip_layer_guidance {
            let count = config.base.backbone.blocks_to_skip();
            if count == 0 {
                bail!(
                    "`--skip-layer-guidance` means nothing to `{}`\n\nhint: leave it out; only the \
                     transformers of Stable Diffusion 3 take it",
                    settings.model
                );
            }
            if let Some(block) = blocks.iter().find(|block| **block >= count) {
                bail!(
                    "`--skip-layer-guidance` names the block {block}, `{}` has those from 0 to {}\n\n\
                     hint: name others, as in `--skip-layer-guidance 2.8:7,8,9`",
                    settings.model,
                    count - 1
                );
            }
            if *guidance <= 1.0 {
                bail!(
                    "`--skip-layer-guidance` needs guidance by the negative prompt\n\nhint: use \
                     `--guidance` above 1"
                );
            }
        }
        let sizes = given(&[
            ("original-size", settings.original_size.is_some()),
            ("crop", settings.crop.is_some()),
            ("target-size", settings.target_size.is_some()),
        ]);
        if let (0, Some(name)) = (config.base.added_ids, sizes) {
            bail!(
                "`--{name}` means nothing to `{}`\n\nhint: leave it out; only models of SDXL's \
                 family are told of sizes",
                settings.model
            );
        }
        config.base.check_source(settings)?;
        config
            .base
            .check_references(settings.references.len(), &settings.model)?;
        for Reference { width, height, .. } in settings.references.iter() {
            check_size("reference", *width.max(height), step)?;
        }
        if let Some(hires) = settings.hires {
            check_size("hires", hires.width.max(hires.height), step)?;
            let repaints = settings
                .source
                .as_ref()
                .is_some_and(|source| source.repaints());
            let other = given(&[
                ("refiner", config.refiner.is_some()),
                ("mask", repaints),
                ("image-guidance", settings.image_guidance.is_some()),
            ]);
            if let Some(name) = other {
                bail!(
                    "`--hires` and `--{name}` cannot be used together\n\nhint: draw first, then \
                     `--image` what was drawn at another size"
                );
            }
        }
        if let Some(length) = settings.max_sequence_length {
            if !config.base.encoder.takes_length() {
                bail!(
                    "`--max-sequence-length` means nothing to `{}`\n\nhint: leave it out; only models \
                     that read prompts with T5 take it: FLUX.1 and Stable Diffusion 3",
                    settings.model
                );
            }
            if !T5_LENGTHS.contains(&length) {
                bail!(
                    "T5 cannot take {length} tokens of a prompt\n\nhint: `--max-sequence-length` is a \
                     number from {} to {}",
                    T5_LENGTHS.start(),
                    T5_LENGTHS.end()
                );
            }
        }
        let (skip, layers) = (settings.clip_skip, config.base.encoder.layers());
        if skip > layers {
            bail!("`--clip-skip {skip}` leaves nothing of the text encoder's {layers} layers");
        }
        Ok(())
    }

    /// The sampling plans of an image, which all images that agree in them share.
    fn plans(&mut self, settings: &Settings) -> Result<Plans> {
        let key = PlanKey {
            sampler: settings.sampler,
            schedule: settings.schedule,
            steps: settings.steps,
            eta: settings.eta,
            prediction: settings.prediction,
            refine_at: settings.refine_at,
            strength: settings.strength,
            hires_strength: settings.hires.map(|hires| hires.strength),
            tokens: self.tokens(settings),
        };
        if let Some((_, plans)) = self.plans.iter().find(|(other, _)| *other == key) {
            return Ok(plans.clone());
        }
        let plans = self.new_plans(&key)?;
        self.plans.push((key, plans.clone()));
        Ok(plans)
    }

    /// What the network sees of an image, and of its second pass, in tokens, where levels depend on
    /// them; else 0.
    fn tokens(&self, settings: &Settings) -> [usize; 2] {
        let config = &self.pipeline.config;
        if !config.base.scheduler.is_flow() {
            return [0; 2];
        }
        let step = config.step();
        let tokens = |width: usize, height: usize| (width / step) * (height / step);
        let (width, height) = settings.final_size();
        [
            tokens(settings.width, settings.height),
            tokens(width, height),
        ]
    }

    fn new_plans(&self, key: &PlanKey) -> Result<Plans> {
        let config = &self.pipeline.config;
        let PlanKey {
            sampler,
            schedule,
            steps,
            eta,
            refine_at,
            ..
        } = *key;
        let mut scheduler = config.base.scheduler.clone();
        scheduler.prediction = key.prediction;
        // latent consistency models, U-Nets which are known by their guidance input, take all steps
        // whatever the strength
        let takes_all_steps =
            config.base.backbone.embeds_guidance() && !config.base.scheduler.is_flow();
        let [own, larger] = key
            .tokens
            .map(|tokens| scheduler.clone().for_picture(tokens, config.base.mu()));
        let from_image = |scheduler, strength| {
            let all = takes_all_steps;
            plan_img2img(scheduler, sampler, schedule, steps, eta, strength, all)
        };
        let whole = match key.strength {
            Some(strength) => from_image(&own, strength)?,
            None => plan(&own, sampler, schedule, steps, eta)?,
        };
        let hires = key
            .hires_strength
            .map(|strength| from_image(&larger, strength))
            .transpose()
            .context("`--hires-strength`")?;
        let (base, refiner) = match (&config.refiner, refine_at) {
            (None, None) => (whole, None),
            (Some(refiner), Some(at)) => {
                let [first, _] = whole.split(at)?;
                let [_, second] =
                    plan(&refiner.scheduler, sampler, schedule, steps, eta)?.split(at)?;
                (first, Some(second))
            }
            _ => bail!("`--refine-at` without `--refiner`\n\nhint: `--refiner sdxl-refiner`"),
        };
        let [refiner, hires] = [refiner, hires].map(|plan| plan.map(Arc::new));
        Ok(Plans {
            base: Arc::new(base),
            refiner,
            hires,
        })
    }

    /// The parsed prompts of an image, and of its second pass; all seeds of a prompt share them.
    fn prompts(&self, settings: &Settings) -> Result<(Arc<Prompts>, Option<Arc<Prompts>>)> {
        let key = |s: &Settings| {
            (
                s.prompt.clone(),
                s.negative.clone(),
                s.to.clone(),
                s.prompt_syntax,
                s.steps,
                s.sampler.spec().calls_per_step(),
                s.hires.is_some(),
            )
        };
        if let Some(last) = self
            .last
            .as_ref()
            .filter(|last| key(&last.settings) == key(settings))
        {
            return Ok((last.prompts.clone(), last.hires_prompts.clone()));
        }
        let Settings {
            prompt,
            negative,
            prompt_syntax,
            steps,
            sampler,
            to,
            ..
        } = settings;
        let to = to.as_ref().map(|blend| (&blend.prompt, blend.weight));
        let of_pass = |is_second_pass| {
            let calls = Calls {
                count: steps * sampler.spec().calls_per_step(),
                is_second_pass,
            };
            Prompts::parse(prompt, negative, to, *prompt_syntax, calls).map(Arc::new)
        };
        let second = settings.hires.map(|_| of_pass(true)).transpose()?;
        Ok((of_pass(false)?, second))
    }

    /// The learned words that an image's prompts use, in the order in which they were given. Those
    /// of LoRAs are not listed: the LoRAs are.
    fn learned_words(
        &self,
        prompts: &Arc<Prompts>,
        syntax: Syntax,
    ) -> Result<Arc<[UsedEmbedding]>> {
        let Some(finder) = &self.pipeline.config.learned_words else {
            return Ok(Arc::default());
        };
        if let Some(last) = self
            .last
            .as_ref()
            .filter(|last| Arc::ptr_eq(&last.prompts, prompts))
        {
            return Ok(last.settings.embeddings.clone());
        }
        let found = prompts.texts().map(|text| finder.find(text, syntax));
        let found = found.collect::<Result<Vec<_>>>()?.concat();
        let all = self.pipeline.checkpoint.embeddings().iter();
        let used = all
            .filter(|embedding| found.contains(&embedding.token))
            .filter_map(|embedding| {
                Some(UsedEmbedding {
                    name: embedding.token.clone(),
                    hash: embedding.hash.clone()?,
                })
            });
        Ok(used.collect())
    }
}

/// Errors if a side is not a multiple of the VAE's factor, and at least of 8, or too large.
fn check_size(name: &str, pixels: usize, factor: usize) -> Result<()> {
    let factor = factor.max(8);
    if pixels == 0 || !pixels.is_multiple_of(factor) || pixels > MAX_SIDE_PX {
        let near = (pixels.min(MAX_SIDE_PX) / factor).max(1) * factor;
        bail!(
            "`--{name} {pixels}` is not possible: it must be a multiple of {factor} from {factor} \
             to {MAX_SIDE_PX}\n\nhint: try `--{name} {near}`"
        );
    }
    Ok(())
}
