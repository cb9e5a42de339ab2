//! Arguments and family defaults -> what will be drawn. Every contradiction dies here, before a weight is read.

use crate::cli::DrawArgs;
use crate::family::Family;
use crate::model::unet::UNetConfig;
use crate::model::vae::VaeConfig;
use crate::sampler::Sampler;
use crate::schedule::{Plan, Prediction, Schedule, SchedulerConfig, plan};
use crate::text::clip::ClipConfig;
use crate::weights::{Checkpoint, ModelError};
use anyhow::{Context, Result, bail};

/// Pixels of a side; more are mistakes.
const MAX_SIDE_PX: usize = 16384;
/// Pictures a run may ask for.
const MAX_JOBS: usize = 1_000_000;

/// The parsed configurations of a checkpoint's parts.
struct Configs {
    unet: UNetConfig,
    vae: VaeConfig,
    clip: ClipConfig,
    scheduler: SchedulerConfig,
}

impl Configs {
    fn parse(checkpoint: &Checkpoint) -> Result<Self> {
        Ok(Self {
            unet: UNetConfig::from_json(checkpoint.config("unet")?)?,
            vae: VaeConfig::from_json(checkpoint.config("vae")?)?,
            clip: ClipConfig::from_json(checkpoint.config("text_encoder")?)?,
            scheduler: SchedulerConfig::from_json(checkpoint.config("scheduler")?)?.for_pipeline(),
        })
    }
}

/// One picture to draw.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub index: usize,
    pub prompt: String,
    pub seed: u64,
}

/// A resolved run: nothing is left open and nothing contradicts.
pub struct Request {
    pub jobs: Vec<Job>,
    pub negative: String,
    /// pixels
    pub width: usize,
    pub height: usize,
    pub steps: usize,
    pub guidance: f64,
    pub sampler: Sampler,
    pub schedule: Option<Schedule>,
    pub eta: Option<f64>,
    /// 1: the last layer of the text encoder, 2: the one before, ...
    pub clip_skip: usize,
    /// the U-Net's inner levels run in every so manyth step
    pub deep_cache: usize,
    pub batch_size: usize,
    pub prediction: Prediction,
    pub plan: Plan,
    pub unet: UNetConfig,
    pub vae: VaeConfig,
    pub clip: ClipConfig,
}

impl Request {
    /// Resolves the arguments for this checkpoint. Errors name the option and what it may be.
    pub fn resolve(args: &DrawArgs, prompts: Vec<String>, checkpoint: &Checkpoint) -> Result<Self> {
        let family = Family::detect(checkpoint).context(ModelError)?;
        let defaults = family.defaults(checkpoint);
        let Configs { unet, vae, clip, mut scheduler } = Configs::parse(checkpoint).context(ModelError)?;
        if let Some(prediction) = args.prediction {
            scheduler.prediction = prediction.into();
        }
        let factor = vae.factor();
        let (sample_height, sample_width) = unet.sample_size()?;
        let width = size("width", args.width.unwrap_or(sample_width * factor), factor)?;
        let height = size("height", args.height.unwrap_or(sample_height * factor), factor)?;
        let steps = args.steps.unwrap_or(defaults.steps);
        let guidance = args.guidance.unwrap_or(defaults.guidance);
        if args.clip_skip > clip.num_hidden_layers {
            bail!("`--clip-skip {}` leaves nothing of the text encoder's {} layers", args.clip_skip, clip.num_hidden_layers);
        }
        let sampler = args.sampler.unwrap_or_else(|| scheduler.sampler());
        Ok(Self {
            jobs: jobs(prompts, args)?,
            negative: args.negative.clone().unwrap_or_default(),
            width,
            height,
            steps,
            guidance,
            sampler,
            schedule: args.schedule,
            eta: args.eta,
            clip_skip: args.clip_skip,
            deep_cache: args.deep_cache,
            batch_size: args.batch_size.unwrap_or(1),
            prediction: scheduler.prediction,
            plan: plan(&scheduler, sampler, args.schedule, steps, args.eta)?,
            unet,
            vae,
            clip,
        })
    }

    /// Whether the network runs twice a step. As in diffusers, guidance at or below 1 is off.
    pub fn guided(&self) -> bool {
        self.guidance > 1.0
    }

    /// A rough estimate of the memory that drawing needs at its peak, in bytes: the larger of the U-Net with its
    /// activations and the VAE with its own (five of its widest full-size ones live at once, in f32).
    pub fn memory_bytes(&self, checkpoint: &Checkpoint) -> u64 {
        let weights = |part: &str| 4 * checkpoint.summary(part).0 as u64;
        let pixels = (self.width * self.height) as u64;
        let widest = |channels: &[usize]| channels.iter().take(2).copied().max().unwrap_or(1) as u64;
        let latents = pixels / (self.vae.factor() * self.vae.factor()) as u64;
        let pair = if self.guided() { 2 } else { 1 };
        let unet = weights("unet") + 4 * 12 * pair * self.batch_size as u64 * latents * widest(&self.unet.block_out_channels);
        let vae = weights("vae") + 4 * 5 * pixels * widest(&self.vae.block_out_channels);
        unet.max(vae)
    }

    /// (height, width, channels) of the latents.
    pub fn latent_shape(&self) -> (usize, usize, usize) {
        (self.height / self.vae.factor(), self.width / self.vae.factor(), self.unet.in_channels)
    }
}

fn size(name: &str, pixels: usize, factor: usize) -> Result<usize> {
    let factor = factor.max(8);
    if pixels == 0 || !pixels.is_multiple_of(factor) || pixels > MAX_SIDE_PX {
        let near = (pixels.min(MAX_SIDE_PX) / factor).max(1) * factor;
        bail!(
            "`--{name} {pixels}` is not possible: it must be a multiple of {factor} from {factor} to {MAX_SIDE_PX}\n\nhint: try `--{name} {near}`"
        );
    }
    Ok(pixels)
}

/// Every prompt with every seed, prompts outermost.
fn jobs(prompts: Vec<String>, args: &DrawArgs) -> Result<Vec<Job>> {
    let seeds = match &args.seed {
        Some(seeds) => seeds.values(args.count)?,
        None => {
            let first = random_seed()?;
            (0..args.count as u64).map(|i| first + i).collect()
        }
    };
    if prompts.len().saturating_mul(seeds.len()) > MAX_JOBS {
        bail!("this asks for more than {MAX_JOBS} pictures\n\nhint: check `--seed` and `--count`");
    }
    let pairs = prompts.iter().flat_map(|prompt| seeds.iter().map(move |seed| (prompt.clone(), *seed)));
    Ok(pairs.enumerate().map(|(index, (prompt, seed))| Job { index, prompt, seed }).collect())
}

/// A seed that is easy to type again: 32 bits of the system's randomness.
fn random_seed() -> Result<u64> {
    use std::hash::{BuildHasher, Hasher};
    // the standard library keys every RandomState from the system's generator
    let hasher = std::collections::hash_map::RandomState::new().build_hasher();
    Ok(hasher.finish() & 0xffff_ffff)
}

/// `--seed`: numbers and ranges, separated by commas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seeds(Vec<std::ops::Range<u64>>);

impl Seeds {
    /// The seeds; with a count of n, each single number N stands for N, N+1, ... N+n-1.
    fn values(&self, count: usize) -> Result<Vec<u64>> {
        let several = self.0.len() > 1 || self.0.iter().any(|r| r.end - r.start > 1);
        if several && count > 1 {
            bail!("`--count` needs a single `--seed`\n\nhint: write the seeds as a range, for example `--seed 0..{count}`");
        }
        let total = self.0.iter().map(|r| r.end - r.start).fold(0u64, u64::saturating_add);
        if total > MAX_JOBS as u64 {
            bail!("`--seed` names {total} seeds, more than {MAX_JOBS}");
        }
        let values = self.0.iter().cloned().flatten();
        Ok(values.flat_map(|seed| (0..count as u64).map(move |i| seed.wrapping_add(i))).collect())
    }
}

impl std::str::FromStr for Seeds {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |s: &str| s.trim().parse::<u64>().with_context(|| format!("`{s}` is no seed: a number from 0 to {}", u64::MAX - 1));
        let range = |part: &str| match part.split_once("..") {
            Some((from, to)) => {
                let (from, to) = (number(from)?, number(to)?);
                if from >= to {
                    bail!("the range `{part}` is empty");
                }
                Ok(from..to)
            }
            None => {
                let seed = number(part)?;
                Ok(seed..seed.checked_add(1).context("this seed is too large")?)
            }
        };
        Ok(Self(text.split(',').map(range).collect::<Result<_>>()?))
    }
}
