//! A work list + what a checkpoint brings -> what will be drawn. Every contradiction dies here,
//! before a weight is read.

use crate::batch::jobs::{List, Swept};
use crate::batch::output_path::{Naming, plan_paths};
use crate::cli::{DrawArgs, PictureArgs, VaeTiling};
use crate::image::Format;
use crate::model::{Autoencoder, BackboneConfig, ModelKind};
use crate::nn::device::{Compute, available_memory, require_memory};
use crate::pipeline::family::{Family, REFINE_AT};
use crate::pipeline::guidance::Guidance;
use crate::pipeline::inpaint::Sources;
use crate::pipeline::params::{Hires, Merged, Settings, UsedEmbedding, UsedLora};
use crate::pipeline::preview::Preview;
use crate::sampling::sampler::Sampler;
use crate::sampling::schedule::{
    Plan, Prediction, Schedule, SchedulerConfig, plan, plan_from_picture,
};
use crate::text::encoder::{EncoderConfig, Finder};
use crate::text::prompt::{Prompts, Syntax};
use crate::weights::embedding::Embedding;
use crate::weights::lora::Lora;
use crate::weights::{Checkpoint, ModelError};
use anyhow::{Context, Result, bail};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Pixels of a side; more are mistakes.
pub const MAX_SIDE_PX: usize = 16384;
/// How much of a source picture is drawn anew where nobody says.
const STRENGTH: f64 = 0.75;
/// The same of what was drawn small.
const HIRES_STRENGTH: f64 = 0.5;
/// InstructPix2Pix' own.
const IMAGE_GUIDANCE: f64 = 1.5;
/// A source picture is brought down to the model's own number of pixels from so many times that on.
const MUCH_LARGER: f64 = 2.0;
/// Pictures a forward pass where none are asked for: more bring little, and all of them wait for
/// the last.
const AUTO_BATCH: usize = 4;

/// One picture to draw.
#[derive(Debug, Clone)]
pub struct Job {
    /// its place in the whole work list, from 0
    pub index: usize,
    /// its line in the list that it comes from, from 1
    pub line: Option<usize>,
    pub settings: Settings,
    pub guidance: Guidance,
    pub prompts: Arc<Prompts>,
    pub plan: Arc<Plan>,
    /// what the refiner does then
    pub refine: Option<Arc<Plan>>,
    /// how it is then drawn again, larger
    pub enlarge: Option<Arc<Plan>>,
    /// none for stdout
    pub path: Option<PathBuf>,
    pub format: Format,
}

impl Job {
    /// How often networks run for it, a guided pair counted once.
    pub fn evaluations(&self) -> usize {
        [
            Some(&self.plan),
            self.refine.as_ref(),
            self.enlarge.as_ref(),
        ]
        .into_iter()
        .flatten()
        .map(|plan| plan.evaluations())
        .sum()
    }

    /// The second picture of one that is drawn twice.
    pub fn enlarged(&self) -> Option<Self> {
        let (
            plan,
            Hires {
                width,
                height,
                strength,
                ..
            },
        ) = (self.enlarge.clone()?, self.settings.hires?);
        let settings = Settings {
            width,
            height,
            strength: Some(strength),
            hires: None,
            ..self.settings.clone()
        };
        Some(Self {
            settings,
            plan,
            enlarge: None,
            ..self.clone()
        })
    }

    /// Of the prompts that `AND` joins.
    pub fn weights(&self) -> impl Iterator<Item = f64> {
        self.prompts.parts.iter().map(|part| part.weight)
    }

    /// Whether both can be denoised in one batch: they share all that one forward pass shares.
    pub fn packs_with(&self, other: &Self) -> bool {
        let (a, b) = (&self.settings, &other.settings);
        Arc::ptr_eq(&self.plan, &other.plan)
            && (a.width, a.height, a.hires, a.tile, a.deep_cache)
                == (b.width, b.height, b.hires, b.tile, b.deep_cache)
            && self.weights().eq(other.weights())
            && (a.guidance, a.guidance_rescale, a.image_guidance)
                == (b.guidance, b.guidance_rescale, b.image_guidance)
            && a.source.as_ref().map(|source| source.repaints())
                == b.source.as_ref().map(|source| source.repaints())
    }
}

/// A resolved run: nothing is left open and nothing contradicts.
pub struct Request {
    pub jobs: Vec<Job>,
    /// what [`Job::line`] counts in
    pub list: String,
    pub batch_size: usize,
    /// whether every picture brings a trace
    pub trace: bool,
    pub model: ModelConfig,
    pub refiner: Option<ModelConfig>,
    pub vae: Autoencoder,
    /// for people who watch, if the VAE is one that it is known of
    pub preview: Option<Preview>,
    plans: Vec<(PlanKey, Plans)>,
    /// the checkpoint's embeddings, and what finds them in prompts
    embeddings: Vec<Embedding>,
    finder: Option<Finder>,
}

/// What of a checkpoint makes latents from prompts.
pub struct ModelConfig {
    pub backbone: BackboneConfig,
    pub encoder: EncoderConfig,
    pub scheduler: SchedulerConfig,
    /// how many numbers the U-Net is told of a picture's sizes
    pub added_ids: usize,
    /// whether no negative prompt means zeros, not the embedding of no text
    pub empty_is_zeros: bool,
    pub kind: ModelKind,
}

impl ModelConfig {
    fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let backbone = BackboneConfig::from_json(checkpoint.config("unet")?)?;
        let encoder = EncoderConfig::of(checkpoint)?;
        let added_ids = encoder
            .pooled()
            .map_or(Ok(0), |pooled| backbone.time_ids(pooled))?;
        let pipeline = checkpoint.configs.get("pipeline");
        let force_zeros =
            pipeline.and_then(|pipeline| pipeline.get("force_zeros_for_empty_prompt")?.as_bool());
        Ok(Self {
            scheduler: SchedulerConfig::from_json(checkpoint.config("scheduler")?)?.for_pipeline(),
            // diffusers' default, of pipelines that know it
            empty_is_zeros: force_zeros.unwrap_or(added_ids > 0),
            kind: backbone.kind()?,
            backbone,
            encoder,
            added_ids,
        })
    }

    /// Of a picture that is drawn over another; none where the network sees that one, and starts
    /// from noise alone.
    fn strength(&self, asked: Option<f64>) -> Option<f64> {
        match self.kind {
            ModelKind::TextToImage => Some(asked.unwrap_or(STRENGTH)),
            ModelKind::Inpaint => Some(asked.unwrap_or(1.0)),
            ModelKind::InstructPix2Pix => asked,
        }
    }

    fn image_guidance(&self, asked: Option<f64>) -> Option<f64> {
        asked.or((self.kind == ModelKind::InstructPix2Pix).then_some(IMAGE_GUIDANCE))
    }

    /// Errors if the network needs a source picture and there is none, or cannot do what is asked
    /// with it.
    fn check_source(&self, settings: &Settings) -> Result<()> {
        let Settings {
            source,
            strength,
            image_guidance,
            model,
            ..
        } = settings;
        match (self.kind, source) {
            (ModelKind::Inpaint, None) => bail!(
                "`{model}` is for inpainting\n\nhint: it needs `--image FILE` and `--mask FILE`"
            ),
            (ModelKind::Inpaint, Some(source)) if !source.repaints() => {
                bail!(
                    "`{model}` is for inpainting\n\nhint: tell it where with `--mask FILE`, white is repainted"
                )
            }
            (ModelKind::InstructPix2Pix, None) => {
                bail!(
                    "`{model}` edits pictures\n\nhint: it needs one, `--image FILE`, and for a prompt what to change"
                )
            }
            (ModelKind::InstructPix2Pix, Some(_)) if strength.is_some() => {
                bail!(
                    "`--strength` means nothing to `{model}`\n\nhint: `--image-guidance` is how closely it follows the picture"
                )
            }
            (ModelKind::TextToImage | ModelKind::Inpaint, _) if image_guidance.is_some() => {
                bail!(
                    "`--image-guidance` means nothing to `{model}`\n\nhint: leave it out; it is for models such as InstructPix2Pix"
                )
            }
            _ => Ok(()),
        }
    }

    /// The configuration of a model that takes over latents of this one. Errors if their latents
    /// are not the same.
    fn refined_by(&self, refiner: &Checkpoint) -> Result<Self> {
        let other = Self::of(refiner)?;
        if self.added_ids == 0
            || other.added_ids == 0
            || self.backbone.latent_channels() != other.backbone.in_channels()
        {
            bail!(
                "`{}` cannot refine what this model begins\n\nhint: `--refiner` is for two models of SDXL's family",
                refiner.name
            );
        }
        Ok(other)
    }
}

type PlanKey = (
    Sampler,
    Option<Schedule>,
    usize,
    Option<f64>,
    Prediction,
    Option<f64>,
    Option<f64>,
    Option<f64>,
);

/// As of [`Job`].
#[derive(Clone)]
struct Plans {
    first: Arc<Plan>,
    refine: Option<Arc<Plan>>,
    enlarge: Option<Arc<Plan>>,
}

impl Request {
    /// A run of this checkpoint with nothing to draw yet. Errors if the checkpoint cannot be drawn
    /// with.
    pub fn new(checkpoint: &Checkpoint) -> Result<Self> {
        let parse = || -> Result<Self> {
            if Family::detect(checkpoint)? == Family::SdxlRefiner {
                bail!(
                    "`{}` is a refiner, which finishes pictures and cannot begin any\n\nhint: pass it with `--refiner`, for example beside `--model sdxl`",
                    checkpoint.name
                );
            }
            checkpoint.require_vae()?;
            let model = ModelConfig::of(checkpoint)?;
            let refiner = checkpoint
                .refiner
                .as_deref()
                .map(|refiner| model.refined_by(refiner))
                .transpose()?;
            let vae = Autoencoder::from_json(checkpoint.config("vae")?)?;
            if vae.latent_channels() != model.backbone.latent_channels() {
                let (latent, out) = (vae.latent_channels(), model.backbone.latent_channels());
                bail!(
                    "the U-Net of `{}` draws in {out} channels, its VAE has {latent}",
                    checkpoint.name
                );
            }
            Ok(Self {
                jobs: vec![],
                list: String::new(),
                batch_size: 1,
                trace: false,
                preview: Preview::of(&vae, model.added_ids > 0),
                finder: model.encoder.finder(checkpoint)?,
                embeddings: checkpoint.embeddings.clone(),
                model,
                refiner,
                vae,
                plans: vec![],
            })
        };
        parse().context(ModelError)
    }

    /// Resolves a work list for this checkpoint. Errors name the option and what it may be, and the
    /// line of the list.
    pub fn resolve(
        args: &DrawArgs,
        list: &List,
        checkpoint: &Checkpoint,
        compute: &Compute,
    ) -> Result<Self> {
        let mut request = Self {
            list: list.name.clone(),
            trace: args.trace,
            ..Self::new(checkpoint)?
        };
        let mut sources = Sources::default();
        let defaults = Family::detect(checkpoint)
            .context(ModelError)?
            .defaults(checkpoint);
        let prediction = args
            .prediction
            .map_or(request.model.scheduler.prediction, Into::into);
        let (height, width) = request.model.backbone.sample_size()?;
        let (height, width) = (height * request.vae.factor(), width * request.vae.factor());
        let sampler = request.model.scheduler.sampler();
        let [version, dtype, model, no_negative] = [
            env!("CARGO_PKG_VERSION"),
            compute.dtype.as_str(),
            &checkpoint.name,
            "",
        ]
        .map(Arc::<str>::from);
        let refiner = checkpoint
            .refiner
            .as_ref()
            .map(|refiner| Arc::<str>::from(&*refiner.name));
        let vae = checkpoint
            .vae
            .as_ref()
            .map(|vae| Arc::<str>::from(&*vae.name));
        for item in &list.items {
            let options = &item.options;
            let source = list.of_line(item.line, sources.find(options))?;
            let (width, height) = match &source {
                Some((source, of)) if source.only_masked.is_none() => {
                    request.size_over(options, *of, (width, height))
                }
                _ => (
                    options.width.unwrap_or(width),
                    options.height.unwrap_or(height),
                ),
            };
            let settings = Settings {
                version: version.clone(),
                prompt: item.prompt.clone(),
                negative: options.negative.as_ref().unwrap_or(&no_negative).clone(),
                prompt_syntax: options.prompt_syntax.unwrap_or(Syntax::A1111),
                seed: item.seed,
                variation: item.variation(),
                to: item.to(),
                width: options.width.unwrap_or(width),
                height: options.height.unwrap_or(height),
                tile: options.tile,
                steps: options.steps.unwrap_or(defaults.steps),
                guidance: options.guidance.unwrap_or(defaults.guidance),
                guidance_rescale: options.guidance_rescale.unwrap_or(0.0),
                sampler: options.sampler.unwrap_or(sampler),
                schedule: options.schedule.map(|schedule| match schedule {
                    Schedule::Ays if request.model.added_ids > 0 => Schedule::AysSdxl,
                    other => other,
                }),
                strength: source
                    .as_ref()
                    .and_then(|_| request.model.strength(options.strength)),
                image_guidance: source
                    .as_ref()
                    .and_then(|_| request.model.image_guidance(options.image_guidance)),
                source: source.map(|(source, _)| source),
                hires: request.hires(options, width, height)?,
                eta: options.eta.or(defaults
                    .eta
                    .filter(|_| options.sampler.unwrap_or(sampler) == Sampler::Tcd)),
                original_size: options.original_size,
                crop: options.crop,
                target_size: options.target_size,
                refiner: refiner.clone(),
                refiner_hash: None,
                refine_at: options.refine_at.or(refiner.as_ref().map(|_| REFINE_AT)),
                clip_skip: options.clip_skip.unwrap_or(1),
                deep_cache: options.deep_cache.unwrap_or(1),
                prediction,
                dtype: dtype.clone(),
                model: model.clone(),
                model_hash: no_negative.clone(),
                loras: Arc::default(),
                embeddings: Arc::default(),
                vae: vae.clone(),
                vae_hash: None,
                merges: vec![],
                vae_tiling: false,
                upscaler: None,
                upscaler_hash: None,
                upscale: None,
            };
            let (_, format) = list
                .outputs
                .get(item.output)
                .context("a picture has no destination")?;
            list.of_line(item.line, request.add(settings, item.line, *format))?;
        }
        request.name(list)?;
        // last, as it looks into the files
        let model_hash: Arc<str> = checkpoint.hash().context(ModelError)?.into();
        let refiner_hash = checkpoint
            .refiner
            .as_ref()
            .map(|refiner| refiner.hash())
            .transpose()
            .context(ModelError)?
            .map(Arc::from);
        let vae_hash = checkpoint
            .vae
            .as_ref()
            .map(|vae| vae.hash())
            .transpose()
            .context(ModelError)?
            .map(Arc::from);
        let merges = Merged::all(checkpoint).context(ModelError)?;
        let used = |lora: &Lora| {
            Ok(UsedLora {
                name: (&*lora.name).into(),
                hash: lora.hash()?.into(),
                strength: lora.strength,
            })
        };
        let loras: Arc<[UsedLora]> = checkpoint
            .loras
            .iter()
            .map(used)
            .collect::<Result<_>>()
            .context(ModelError)?;
        let available = compute.device.is_cpu().then(available_memory).flatten();
        let mut jobs = std::mem::take(&mut request.jobs);
        for job in &mut jobs {
            job.settings.vae_tiling = request.has_tiles(&job.settings)
                && match args.vae_tiling {
                    VaeTiling::Auto => available.is_some_and(|available| {
                        request.vae_bytes(checkpoint, &job.settings) > available
                    }),
                    choice => choice == VaeTiling::On,
                };
            job.settings.model_hash = model_hash.clone();
            job.settings.refiner_hash = refiner_hash.clone();
            job.settings.vae_hash = vae_hash.clone();
            job.settings.merges = merges.clone();
            job.settings.loras = loras.clone();
        }
        request.jobs = jobs;
        let fits = |n: &usize| {
            !compute.device.is_cpu() || require_memory(request.memory_bytes(checkpoint, *n)).is_ok()
        };
        request.batch_size = args
            .batch_size
            .unwrap_or_else(|| (1..=AUTO_BATCH).rev().find(fits).unwrap_or(1));
        Ok(request)
    }

    /// Width and height of a picture over one of the size `of`: its own, in the steps that the
    /// model has. Where they are much more than the model draws by itself, they are brought down to
    /// that.
    fn size_over(
        &self,
        options: &PictureArgs,
        of: (usize, usize),
        own: (usize, usize),
    ) -> (usize, usize) {
        let step = self.vae.factor().max(8);
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
                let scale = if w * h > MUCH_LARGER * area {
                    (area / (w * h)).sqrt()
                } else {
                    1.0
                };
                (whole(w * scale), whole(h * scale))
            }
        }
    }

    /// The second, larger picture of one of this size.
    fn hires(&self, options: &PictureArgs, width: usize, height: usize) -> Result<Option<Hires>> {
        let Some(factor) = options.hires else {
            return match options.hires_strength {
                Some(_) => bail!(
                    "`--hires-strength` without `--hires`\n\nhint: `--hires 2x` draws it again at twice the size"
                ),
                None => Ok(None),
            };
        };
        let step = self.vae.factor().max(8) as f64;
        let larger =
            |pixels: usize| (pixels as f64 * factor / step).round() as usize * step as usize;
        let strength = options.hires_strength.unwrap_or(HIRES_STRENGTH);
        Ok(Some(Hires {
            factor,
            strength,
            width: larger(width),
            height: larger(height),
        }))
    }

    /// Adds a picture. Errors if this checkpoint cannot draw it.
    pub fn add(
        &mut self,
        mut settings: Settings,
        line: Option<usize>,
        format: Format,
    ) -> Result<()> {
        check_size("width", settings.width, self.vae.factor())?;
        check_size("height", settings.height, self.vae.factor())?;
        let sized = [
            ("original-size", settings.original_size.is_some()),
            ("crop", settings.crop.is_some()),
            ("target-size", settings.target_size.is_some()),
        ];
        if let (0, Some((name, _))) = (
            self.model.added_ids,
            sized.into_iter().find(|(_, is_given)| *is_given),
        ) {
            bail!(
                "`--{name}` means nothing to `{}`\n\nhint: leave it out; only models of SDXL's family are told of sizes",
                settings.model
            );
        }
        self.model.check_source(&settings)?;
        if let Some(hires) = settings.hires {
            check_size("hires", hires.width.max(hires.height), self.vae.factor())?;
            let repaints = settings
                .source
                .as_ref()
                .is_some_and(|source| source.repaints());
            let others = [
                ("refiner", self.refiner.is_some()),
                ("mask", repaints),
                ("image-guidance", settings.image_guidance.is_some()),
            ];
            if let Some((name, _)) = others.into_iter().find(|(_, is_given)| *is_given) {
                bail!(
                    "`--hires` and `--{name}` cannot be used together\n\nhint: draw first, then `--image` what was drawn at another size"
                );
            }
        }
        let (skip, layers) = (settings.clip_skip, self.model.encoder.layers());
        if skip > layers {
            bail!("`--clip-skip {skip}` leaves nothing of the text encoder's {layers} layers");
        }
        let Settings {
            sampler,
            schedule,
            steps,
            eta,
            prediction,
            refine_at,
            strength,
            hires,
            ..
        } = settings;
        let enlarged_by = hires.map(|hires| hires.strength);
        let key = (
            sampler,
            schedule,
            steps,
            eta,
            prediction,
            refine_at,
            strength,
            enlarged_by,
        );
        let Plans {
            first: plan,
            refine,
            enlarge,
        } = match self.plans.iter().find(|(known, _)| *known == key) {
            Some((_, plans)) => plans.clone(),
            None => {
                let mut scheduler = self.model.scheduler.clone();
                scheduler.prediction = prediction;
                // a latent consistency model's, which it knows by the guidance that its network
                // takes
                let in_all = self.model.backbone.embeds_guidance();
                let late = |strength| {
                    plan_from_picture(&scheduler, sampler, schedule, steps, eta, strength, in_all)
                };
                let whole = match strength {
                    Some(strength) => late(strength)?,
                    None => plan(&scheduler, sampler, schedule, steps, eta)?,
                };
                let enlarge = enlarged_by
                    .map(late)
                    .transpose()
                    .context("`--hires-strength`")?
                    .map(Arc::new);
                let (first, refine) = match (&self.refiner, refine_at) {
                    (None, None) => (Arc::new(whole), None),
                    (Some(refiner), Some(at)) => {
                        let [first, _] = whole.split(at)?;
                        let [_, second] =
                            plan(&refiner.scheduler, sampler, schedule, steps, eta)?.split(at)?;
                        (Arc::new(first), Some(Arc::new(second)))
                    }
                    _ => {
                        bail!("`--refine-at` without `--refiner`\n\nhint: `--refiner sdxl-refiner`")
                    }
                };
                let plans = Plans {
                    first,
                    refine,
                    enlarge,
                };
                self.plans.push((key, plans.clone()));
                plans
            }
        };
        // as in diffusers, guidance at or below 1 is off, and a network that takes its scale as an
        // input runs once
        let is_on = settings.guidance > 1.0 && !self.model.backbone.embeds_guidance();
        let prompts = self.prompts(&settings)?;
        settings.embeddings = self.embeddings(&prompts, settings.prompt_syntax)?;
        if prompts.parts.len() > 1 && (!is_on || settings.image_guidance.is_some()) {
            bail!(
                "prompts that `AND` joins need guidance by text alone\n\nhint: use `--guidance` above 1, or write it in lower case"
            );
        }
        let guidance = match settings.image_guidance {
            Some(scale) if is_on && scale >= 1.0 => Guidance::TextAndPicture(scale),
            None if is_on => Guidance::Text(prompts.parts.len()),
            _ => Guidance::Off,
        };
        self.jobs.push(Job {
            index: self.jobs.len(),
            line,
            settings,
            guidance,
            prompts,
            plan,
            refine,
            enlarge,
            path: None,
            format,
        });
        Ok(())
    }

    /// A picture's prompts, read once for all seeds of one.
    fn prompts(&self, settings: &Settings) -> Result<Arc<Prompts>> {
        let Settings {
            prompt,
            negative,
            prompt_syntax,
            steps,
            to,
            ..
        } = settings;
        if let Some(Job {
            settings: last,
            prompts,
            ..
        }) = self.jobs.last()
            && (
                &last.prompt,
                &last.negative,
                &last.to,
                &last.prompt_syntax,
                &last.steps,
            ) == (prompt, negative, to, prompt_syntax, steps)
        {
            return Ok(prompts.clone());
        }
        let to = to.as_ref().map(|to| (&to.prompt, to.share));
        Prompts::parse(prompt, negative, to, *prompt_syntax, *steps).map(Arc::new)
    }

    /// The embeddings that a picture's prompts use, in the order in which they were given.
    fn embeddings(&self, prompts: &Arc<Prompts>, syntax: Syntax) -> Result<Arc<[UsedEmbedding]>> {
        let Some(finder) = &self.finder else {
            return Ok(Arc::default());
        };
        if let Some(last) = self
            .jobs
            .last()
            .filter(|last| Arc::ptr_eq(&last.prompts, prompts))
        {
            return Ok(last.settings.embeddings.clone());
        }
        let found = prompts
            .texts()
            .map(|text| finder.find(text, syntax))
            .collect::<Result<Vec<_>>>()?
            .concat();
        let used = self
            .embeddings
            .iter()
            .filter(|embedding| found.contains(&embedding.token));
        Ok(used
            .map(|used| UsedEmbedding {
                name: used.token.clone(),
                hash: used.hash.clone(),
            })
            .collect())
    }

    /// Gives every picture its path. Errors if two would have one.
    fn name(&mut self, list: &List) -> Result<()> {
        let mut by_output = vec![vec![]; list.outputs.len()];
        for (index, item) in list.items.iter().enumerate() {
            if let Some(indices) = by_output.get_mut(item.output) {
                indices.push(index);
            }
        }
        let mut taken: HashMap<PathBuf, usize> = HashMap::new();
        for ((destination, format), indices) in list.outputs.iter().zip(by_output) {
            let pairs = indices
                .iter()
                .filter_map(|&i| Some((self.jobs.get(i)?, list.items.get(i)?)));
            let namings: Vec<Naming> = pairs.map(|(job, item)| naming(job, &item.sweep)).collect();
            for (index, path) in indices
                .iter()
                .zip(plan_paths(destination, *format, &namings)?)
            {
                if let Some(first) = taken
                    .insert(path.clone(), *index)
                    .filter(|_| list.outputs.len() > 1)
                {
                    let (first, second) = (
                        self.place(&self.jobs[first]),
                        self.place(&self.jobs[*index]),
                    );
                    bail!(
                        "{first} and {second} would both be `{}`\n\nhint: give each its own `output`",
                        path.display()
                    );
                }
                if let Some(job) = self.jobs.get_mut(*index) {
                    job.path = Some(path);
                }
            }
        }
        Ok(())
    }

    /// Where a picture was asked for, for people: ``line 3 of `jobs.txt` (`a frog`, seed 7)``.
    pub fn place(&self, job: &Job) -> String {
        let Settings { prompt, seed, .. } = &job.settings;
        let start: String = prompt.chars().take(60).collect();
        let dots = if start.len() < prompt.len() {
            "..."
        } else {
            ""
        };
        match job.line {
            Some(line) => format!(
                "line {line} of {} (`{start}{dots}`, seed {seed})",
                self.list
            ),
            None => format!("`{start}{dots}`, seed {seed}"),
        }
    }

    /// A rough estimate of the memory that drawing needs at its peak, in bytes: the larger of the
    /// U-Net with its activations and the VAE with its own.
    pub fn memory_bytes(&self, checkpoint: &Checkpoint, batch_size: usize) -> u64 {
        let base = checkpoint.stored_bytes("unet");
        let refiner = checkpoint
            .refiner
            .as_ref()
            .map_or(0, |refiner| refiner.stored_bytes("unet"));
        // a single batch's base is freed before its refiner is read
        let unet_weights = if self.jobs.len() > batch_size {
            base + refiner
        } else {
            base.max(refiner)
        };
        let of_job = |job: &Job| {
            let (h, w) = self.final_latents(&job.settings);
            let batch = job.guidance.passes() * batch_size;
            let unet = unet_weights + self.model.backbone.activation_bytes(batch, h, w);
            unet.max(self.vae_bytes(checkpoint, &job.settings))
        };
        self.jobs.iter().map(of_job).max().unwrap_or(0)
    }

    /// The same of the VAE alone.
    pub fn vae_bytes(&self, checkpoint: &Checkpoint, settings: &Settings) -> u64 {
        let (h, w) = self.final_latents(settings);
        self.vae
            .decode_bytes(h, w, settings.vae_tiling)
            .saturating_add(checkpoint.stored_bytes("vae"))
    }

    /// Latents a side of the tiles in which a picture is decoded, if it is.
    pub fn tile(&self, settings: &Settings) -> Option<usize> {
        settings.vae_tiling.then(|| self.vae.tile())
    }

    /// Whether a picture is larger than one tile of a tiled decode, in which it would be the same.
    fn has_tiles(&self, settings: &Settings) -> bool {
        let (h, w) = self.final_latents(settings);
        h.max(w) > self.vae.tile()
    }

    /// (height, width) of the latents that are decoded at last.
    fn final_latents(&self, settings: &Settings) -> (usize, usize) {
        let (width, height) = settings.final_size();
        (height / self.vae.factor(), width / self.vae.factor())
    }

    /// (height, width, channels) of a picture's latents.
    pub fn latent_shape(&self, settings: &Settings) -> (usize, usize, usize) {
        (
            settings.height / self.vae.factor(),
            settings.width / self.vae.factor(),
            self.model.backbone.latent_channels(),
        )
    }
}

fn naming<'a>(job: &'a Job, sweep: &'a Swept) -> Naming<'a> {
    let Settings {
        prompt,
        negative,
        seed,
        width,
        height,
        steps,
        guidance,
        sampler,
        model,
        source,
        ..
    } = &job.settings;
    let Swept { name, frame, .. } = sweep;
    Naming {
        prompt,
        negative,
        seed: *seed,
        index: job.index,
        model,
        width: *width,
        height: *height,
        steps: *steps,
        guidance: *guidance,
        sampler: sampler.name(),
        sweep: name,
        frame: frame.map(|frame| frame.number),
        image: source
            .as_ref()
            .and_then(|source| Path::new(&*source.image).file_stem()?.to_str())
            .unwrap_or_default(),
    }
}

fn check_size(name: &str, pixels: usize, factor: usize) -> Result<()> {
    let factor = factor.max(8);
    if pixels == 0 || !pixels.is_multiple_of(factor) || pixels > MAX_SIDE_PX {
        let near = (pixels.min(MAX_SIDE_PX) / factor).max(1) * factor;
        bail!(
            "`--{name} {pixels}` is not possible: it must be a multiple of {factor} from {factor} to {MAX_SIDE_PX}\n\nhint: try `--{name} {near}`"
        );
    }
    Ok(())
}
