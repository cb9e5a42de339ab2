//! What a user may ask of one image, before any model is looked at.
//!
//! [`JobOptions`] is the one declaration of these options: clap reads them from the command line,
//! serde from the lines of a list, from a sweep and from a configuration file. Both call the same
//! function for each type of value, so that all of them accept and refuse the same. Read next:
//! [`crate::pipeline::resolve`], which fills in what is left open.

use crate::image::load::Fit;
use crate::pipeline::guidance::SkipLayers;
use crate::pipeline::settings::{Border, Point, Size, Tile};
use crate::sampling::noise::Variation;
use crate::sampling::{NamedSampler, Sampler, Schedule};
use crate::suggest::nearest;
use crate::text::prompt::Syntax;
use anyhow::{Context, Result, anyhow, bail};
use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer, Serialize, forward_to_deserialize_any};
use serde_json::{Map, Value};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::ops::{Range, RangeInclusive};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

/// The most images that a run may ask for.
pub const MAX_JOBS: usize = 1_000_000;

/// The scales of guidance that can be asked for; far beyond, latents overflow.
pub const GUIDANCES: RangeInclusive<f64> = 0.0..=10_000.0;

/// What may differ from image to image; `None` leaves the choice to the model. Each field is an
/// option of the command line and a key of a list's lines, where `-` may stand for `_`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "cli", derive(clap::Args))]
pub struct JobOptions {
    /// What to steer away from
    #[serde(alias = "negative_prompt", alias = "negative-prompt")]
    #[cfg_attr(feature = "cli", arg(short, long, alias = "negative-prompt"))]
    #[cfg_attr(feature = "cli", arg(value_name = "TEXT", help_heading = "Picture"))]
    pub negative: Option<Arc<str>>,
    /// How prompts are read: a1111, with (weights:1.2), [a:b:0.5], AND, BREAK and any length; or
    /// plain [default: a1111]
    #[serde(alias = "prompt-syntax")]
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true))]
    #[cfg_attr(feature = "cli", arg(hide_possible_values = true))]
    #[cfg_attr(feature = "cli", arg(value_name = "NAME", help_heading = "Picture"))]
    pub prompt_syntax: Option<Syntax>,
    /// Width in pixels [default: the model's]
    #[serde(deserialize_with = "by_parser::pixels")]
    #[cfg_attr(feature = "cli", arg(short = 'W', long, value_parser = pixels))]
    #[cfg_attr(feature = "cli", arg(value_name = "PX", help_heading = "Picture"))]
    pub width: Option<usize>,
    /// Height in pixels [default: the model's]
    #[serde(deserialize_with = "by_parser::pixels")]
    #[cfg_attr(feature = "cli", arg(short = 'H', long, value_parser = pixels))]
    #[cfg_attr(feature = "cli", arg(value_name = "PX", help_heading = "Picture"))]
    pub height: Option<usize>,
    /// Seed, list (3,7,9) or range (0..100, end excluded) [default: random]
    #[cfg_attr(feature = "cli", arg(short, long))]
    #[cfg_attr(feature = "cli", arg(value_name = "N", help_heading = "Picture"))]
    pub seed: Option<Seeds>,
    /// Pictures a prompt, with seeds N, N+1, ...
    #[serde(alias = "batch_count", alias = "batch-count")]
    #[serde(deserialize_with = "by_parser::at_least_one")]
    #[cfg_attr(feature = "cli", arg(short, long, alias = "batch-count", value_parser = at_least_one))]
    #[cfg_attr(feature = "cli", arg(value_name = "N", help_heading = "Picture"))]
    pub count: Option<usize>,
    /// Mix in the noise of another seed, by X from 0 to 1: a similar picture
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true))]
    #[cfg_attr(feature = "cli", arg(value_name = "SEED:X", help_heading = "Picture"))]
    pub variation: Option<Variation>,
    /// Go on to this prompt, picture by picture: see --frames
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true))]
    #[cfg_attr(feature = "cli", arg(value_name = "PROMPT", help_heading = "Picture"))]
    pub to: Option<Arc<str>>,
    /// Go on to the noise of this seed, picture by picture: see --frames
    #[serde(alias = "to-seed", deserialize_with = "by_parser::one_seed")]
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true, value_parser = one_seed))]
    #[cfg_attr(feature = "cli", arg(value_name = "N", help_heading = "Picture"))]
    pub to_seed: Option<u64>,
    /// Pictures on the way to --to and --to-seed, numbered for ffmpeg
    #[serde(deserialize_with = "by_parser::frames")]
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true, value_parser = frames))]
    #[cfg_attr(feature = "cli", arg(value_name = "N", help_heading = "Picture"))]
    pub frames: Option<usize>,
    /// Copies of the picture fit together side by side (x), one above the other (y), or both (xy)
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true))]
    #[cfg_attr(feature = "cli", arg(hide_possible_values = true))]
    #[cfg_attr(feature = "cli", arg(value_name = "x|y|xy", help_heading = "Picture"))]
    pub tile: Option<Tile>,

    /// Denoising steps [default: the model's]
    #[serde(deserialize_with = "by_parser::steps")]
    #[cfg_attr(feature = "cli", arg(long, value_parser = steps))]
    #[cfg_attr(feature = "cli", arg(value_name = "N", help_heading = "Sampling"))]
    pub steps: Option<usize>,
    /// Strength of the prompt; 1 is off and halves the work [default: the model's]
    #[serde(alias = "cfg_scale", alias = "cfg-scale")]
    #[serde(alias = "guidance_scale", alias = "guidance-scale")]
    #[serde(deserialize_with = "by_parser::guidance")]
    #[cfg_attr(feature = "cli", arg(short, long, aliases = ["cfg-scale", "guidance-scale"]))]
    #[cfg_attr(feature = "cli", arg(value_parser = guidance))]
    #[cfg_attr(feature = "cli", arg(value_name = "X", help_heading = "Sampling"))]
    pub guidance: Option<f64>,
    /// Rescale guided predictions towards their unguided contrast, 0 to 1; 0.7 for
    /// zero-terminal-SNR models
    #[serde(alias = "guidance-rescale", deserialize_with = "by_parser::fraction")]
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true, value_parser = fraction))]
    #[cfg_attr(feature = "cli", arg(value_name = "X", help_heading = "Sampling"))]
    pub guidance_rescale: Option<f64>,
    /// Guidance by a negative prompt too, of models that take --guidance as an input (FLUX.1 dev); it
    /// doubles the work
    #[serde(
        alias = "true-guidance",
        alias = "true_cfg_scale",
        alias = "true-cfg-scale"
    )]
    #[serde(deserialize_with = "by_parser::guidance")]
    #[cfg_attr(
        feature = "cli",
        arg(long, hide_short_help = true, alias = "true-cfg-scale")
    )]
    #[cfg_attr(feature = "cli", arg(value_parser = guidance))]
    #[cfg_attr(feature = "cli", arg(value_name = "X", help_heading = "Sampling"))]
    pub true_guidance: Option<f64>,
    /// Steer away from what Stable Diffusion 3.5 medium draws without some blocks too, in early steps:
    /// SCALE[:BLOCKS[:START:STOP]], such as 2.8 or 2.8:7,8,9:0.01:0.2
    #[serde(alias = "skip-layer-guidance")]
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true))]
    #[cfg_attr(feature = "cli", arg(value_name = "X", help_heading = "Sampling"))]
    pub skip_layer_guidance: Option<SkipLayers>,
    /// The sampler by name
    #[serde(alias = "sampling_method", alias = "sampling-method")]
    #[cfg_attr(feature = "cli", arg(help = names_help(Sampler::names())))]
    #[cfg_attr(feature = "cli", arg(long, alias = "sampling-method"))]
    #[cfg_attr(feature = "cli", arg(value_name = "NAME", help_heading = "Sampling"))]
    pub sampler: Option<NamedSampler>,
    /// The schedule by name
    #[serde(alias = "scheduler")]
    #[cfg_attr(feature = "cli", arg(help = names_help(Schedule::names())))]
    #[cfg_attr(feature = "cli", arg(long, alias = "scheduler"))]
    #[cfg_attr(feature = "cli", arg(value_name = "NAME", help_heading = "Sampling"))]
    pub schedule: Option<Schedule>,
    /// Noise added each step, for ddim and its like (0 to 1)
    #[serde(deserialize_with = "by_parser::fraction")]
    #[cfg_attr(feature = "cli", arg(long, value_parser = fraction))]
    #[cfg_attr(feature = "cli", arg(value_name = "X", help_heading = "Sampling"))]
    pub eta: Option<f64>,
    /// Which layer of the text encoder to use: 1 the last, 2 the one before, ...
    #[serde(alias = "clip-skip", deserialize_with = "by_parser::at_least_one")]
    #[cfg_attr(feature = "cli", arg(long, value_parser = at_least_one))]
    #[cfg_attr(feature = "cli", arg(value_name = "N", help_heading = "Sampling"))]
    pub clip_skip: Option<usize>,
    /// Tokens of the prompt that T5 takes, up to 512 (FLUX.1, Stable Diffusion 3) [default: the model's]
    #[serde(alias = "max-sequence-length")]
    #[serde(deserialize_with = "by_parser::at_least_one")]
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true, value_parser = at_least_one))]
    #[cfg_attr(feature = "cli", arg(value_name = "N", help_heading = "Sampling"))]
    pub max_sequence_length: Option<usize>,
    /// Run the U-Net's inner levels every Nth step only: faster, another picture
    #[serde(alias = "deep-cache", deserialize_with = "by_parser::at_least_one")]
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true, value_parser = at_least_one))]
    #[cfg_attr(feature = "cli", arg(value_name = "N", help_heading = "Sampling"))]
    pub deep_cache: Option<usize>,

    /// Start from this picture, or from each one of a folder
    #[serde(alias = "init_img", alias = "init-img")]
    #[cfg_attr(feature = "cli", arg(short, long, alias = "init-img"))]
    #[cfg_attr(
        feature = "cli",
        arg(value_name = "FILE", help_heading = "From a picture")
    )]
    pub image: Option<PathBuf>,
    /// How much of it is drawn anew, 0 to 1 [default: 0.75; 1 for inpainting models]
    #[serde(deserialize_with = "by_parser::fraction")]
    #[cfg_attr(feature = "cli", arg(long, value_parser = fraction))]
    #[cfg_attr(
        feature = "cli",
        arg(value_name = "X", help_heading = "From a picture")
    )]
    pub strength: Option<f64>,
    /// Repaint where this picture is white [default: where the first one is transparent]
    #[cfg_attr(feature = "cli", arg(long))]
    #[cfg_attr(
        feature = "cli",
        arg(value_name = "FILE", help_heading = "From a picture")
    )]
    pub mask: Option<PathBuf>,
    /// Inpaint at full resolution, with this many pixels around the mask [default: 32]
    #[serde(alias = "only-masked", deserialize_with = "by_parser::pixels")]
    #[cfg_attr(feature = "cli", arg(long, num_args = 0..=1, require_equals = true))]
    #[cfg_attr(feature = "cli", arg(default_missing_value = "32", value_parser = pixels))]
    #[cfg_attr(
        feature = "cli",
        arg(value_name = "PX", help_heading = "From a picture")
    )]
    pub only_masked: Option<usize>,
    /// Paint this many pixels around it: 256, or left=128,top=64
    #[serde(deserialize_with = "by_parser::border")]
    #[cfg_attr(feature = "cli", arg(long))]
    #[cfg_attr(
        feature = "cli",
        arg(value_name = "PX", help_heading = "From a picture")
    )]
    pub extend: Option<Border>,
    /// Pixels over which what is repainted fades in [default: 8]
    #[serde(deserialize_with = "by_parser::pixels")]
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true, value_parser = pixels))]
    #[cfg_attr(
        feature = "cli",
        arg(value_name = "PX", help_heading = "From a picture")
    )]
    pub feather: Option<usize>,
    /// How it is brought to another shape: crop, pad or stretch [default: crop]
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true))]
    #[cfg_attr(feature = "cli", arg(hide_possible_values = true))]
    #[cfg_attr(
        feature = "cli",
        arg(value_name = "HOW", help_heading = "From a picture")
    )]
    pub fit: Option<Fit>,
    /// How closely models that edit pictures, such as InstructPix2Pix, follow it [default: 1.5]
    #[serde(alias = "image-guidance", deserialize_with = "by_parser::guidance")]
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true, value_parser = guidance))]
    #[cfg_attr(
        feature = "cli",
        arg(value_name = "X", help_heading = "From a picture")
    )]
    pub image_guidance: Option<f64>,

    /// A picture that an editing model (FLUX.2 klein, FLUX.1 Kontext) looks at; once for each of several
    #[serde(deserialize_with = "one_or_more")]
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true))]
    #[cfg_attr(
        feature = "cli",
        arg(value_name = "FILE", help_heading = "From a picture")
    )]
    pub reference: Option<Vec<PathBuf>>,

    /// Draw it small, then again larger by this factor over what was drawn
    #[serde(deserialize_with = "by_parser::factor")]
    #[cfg_attr(feature = "cli", arg(long, value_parser = factor))]
    #[cfg_attr(
        feature = "cli",
        arg(value_name = "FACTOR", help_heading = "From a picture")
    )]
    pub hires: Option<f64>,
    /// How much is drawn anew the second time, 0 to 1 [default: 0.5]
    #[serde(alias = "hires-strength", deserialize_with = "by_parser::fraction")]
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true, value_parser = fraction))]
    #[cfg_attr(
        feature = "cli",
        arg(value_name = "X", help_heading = "From a picture")
    )]
    pub hires_strength: Option<f64>,

    /// What the model is told of the picture's size before scaling [default: the picture's]
    #[serde(alias = "original-size")]
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true))]
    #[cfg_attr(feature = "cli", arg(value_name = "WxH", help_heading = "SDXL"))]
    pub original_size: Option<Size>,
    /// What the model is told was cropped at the left and top [default: 0,0]
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true))]
    #[cfg_attr(feature = "cli", arg(value_name = "X,Y", help_heading = "SDXL"))]
    pub crop: Option<Point>,
    /// What the model is told of the picture's size [default: the picture's]
    #[serde(alias = "target-size")]
    #[cfg_attr(feature = "cli", arg(long, hide_short_help = true))]
    #[cfg_attr(feature = "cli", arg(value_name = "WxH", help_heading = "SDXL"))]
    pub target_size: Option<Size>,
    /// How far the base model draws before the refiner, 0 to 1 [default: 0.8]
    #[serde(alias = "refine-at", deserialize_with = "by_parser::fraction")]
    #[cfg_attr(feature = "cli", arg(long, value_parser = fraction))]
    #[cfg_attr(feature = "cli", arg(value_name = "X", help_heading = "SDXL"))]
    pub refine_at: Option<f64>,

    /// File, folder/, template, or `-` for stdout [default: {prompt}-{seed}.png]
    #[cfg_attr(feature = "cli", arg(short, long))]
    #[cfg_attr(feature = "cli", arg(value_name = "PATH", help_heading = "Output"))]
    pub output: Option<PathBuf>,
}

impl JobOptions {
    /// Reads one option by its name or an alias. Errors name the nearest key, or say what the
    /// option may be.
    pub fn of_key(key: &str, value: &Value) -> Result<Self> {
        if !field_names::<Self>().contains(&key) {
            let keys: Vec<&str> = ["prompt"].into_iter().chain(Self::keys()).collect();
            bail!(unknown_key(key, &keys));
        }
        let object = Map::from_iter([(key.to_string(), value.clone())]);
        serde_json::from_value(Value::Object(object)).map_err(|error| {
            let value = value
                .as_str()
                .map_or_else(|| value.to_string(), String::from);
            anyhow!("`{key}` cannot be `{value}`: {error}")
        })
    }

    /// All names and aliases, with `-` and with `_`.
    pub fn all_keys() -> &'static [&'static str] {
        field_names::<Self>()
    }

    /// All names and aliases, as the command line spells them.
    pub fn keys() -> Vec<&'static str> {
        let mut keys = Self::all_keys().to_vec();
        keys.retain(|key| !key.contains('_'));
        keys
    }

    /// The names of the options that are given, as the command line spells them. Errors if a path
    /// is not UTF-8.
    pub fn given(&self) -> Result<Vec<String>> {
        let Value::Object(fields) = serde_json::to_value(self)? else {
            return Ok(vec![]);
        };
        let given = fields.into_iter().filter(|(_, value)| !value.is_null());
        Ok(given.map(|(name, _)| name.replace('_', "-")).collect())
    }

    /// The schedule, which may be in the sampler's name.
    pub fn schedule(&self) -> Option<Schedule> {
        self.schedule.or_else(|| self.sampler?.schedule)
    }

    /// These options, with those of `base` where nothing is given.
    pub fn over(self, base: &Self) -> Self {
        let schedule = self.schedule().or(base.schedule);
        Self {
            negative: self.negative.or_else(|| base.negative.clone()),
            prompt_syntax: self.prompt_syntax.or(base.prompt_syntax),
            width: self.width.or(base.width),
            height: self.height.or(base.height),
            seed: self.seed.or_else(|| base.seed.clone()),
            count: self.count.or(base.count),
            variation: self.variation.or(base.variation),
            to: self.to.or_else(|| base.to.clone()),
            to_seed: self.to_seed.or(base.to_seed),
            frames: self.frames.or(base.frames),
            tile: self.tile.or(base.tile),
            steps: self.steps.or(base.steps),
            guidance: self.guidance.or(base.guidance),
            guidance_rescale: self.guidance_rescale.or(base.guidance_rescale),
            true_guidance: self.true_guidance.or(base.true_guidance),
            skip_layer_guidance: self
                .skip_layer_guidance
                .or_else(|| base.skip_layer_guidance.clone()),
            sampler: self.sampler.or(base.sampler),
            schedule,
            eta: self.eta.or(base.eta),
            clip_skip: self.clip_skip.or(base.clip_skip),
            max_sequence_length: self.max_sequence_length.or(base.max_sequence_length),
            deep_cache: self.deep_cache.or(base.deep_cache),
            image: self.image.or_else(|| base.image.clone()),
            strength: self.strength.or(base.strength),
            mask: self.mask.or_else(|| base.mask.clone()),
            only_masked: self.only_masked.or(base.only_masked),
            extend: self.extend.or(base.extend),
            feather: self.feather.or(base.feather),
            fit: self.fit.or(base.fit),
            image_guidance: self.image_guidance.or(base.image_guidance),
            reference: self.reference.or_else(|| base.reference.clone()),
            hires: self.hires.or(base.hires),
            hires_strength: self.hires_strength.or(base.hires_strength),
            original_size: self.original_size.or(base.original_size),
            crop: self.crop.or(base.crop),
            target_size: self.target_size.or(base.target_size),
            refine_at: self.refine_at.or(base.refine_at),
            output: self.output.or_else(|| base.output.clone()),
        }
    }
}

/// Whether the VAE decodes in tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum VaeTiling {
    /// where the whole does not fit into memory; on CPUs, as GPUs do not say what they have left
    #[default]
    Auto,
    /// always
    On,
    /// never
    Off,
}

/// The error for a key that no option has.
pub fn unknown_key(key: &str, known: &[&str]) -> anyhow::Error {
    let hint = match nearest(&key.replace('_', "-"), known.iter().copied()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("keys are {}", known.join(", ")),
    };
    anyhow!("unknown key `{key}`\n\nhint: {hint}")
}

/// `--seed`: numbers and ranges, separated by commas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "Scalar")]
pub struct Seeds(Vec<Range<u64>>);

impl Seeds {
    /// The seeds; with a count of n, each single number N stands for N, N+1, ... N+n-1. Errors if
    /// there are several seeds and a count, or more seeds than a run may have.
    pub fn values(&self, count: usize) -> Result<Vec<u64>> {
        let several = self.0.len() > 1 || self.0.iter().any(|r| r.end - r.start > 1);
        if several && count > 1 {
            bail!(
                "`--count` needs a single `--seed`\n\nhint: write the seeds as a range, for example `--seed 0..{count}`"
            );
        }
        let total = self
            .0
            .iter()
            .map(|r| r.end - r.start)
            .fold(0u64, u64::saturating_add);
        if total > MAX_JOBS as u64 {
            bail!("`--seed` names {total} seeds, more than {MAX_JOBS}");
        }
        let values = self.0.iter().cloned().flatten();
        Ok(values
            .flat_map(|seed| (0..count as u64).map(move |i| seed.wrapping_add(i)))
            .collect())
    }
}

impl FromStr for Seeds {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |s: &str| {
            s.trim().parse::<u64>().with_context(|| {
                let hint = match s.trim().starts_with('-') {
                    true => "\n\nhint: without `--seed` it is random, and printed",
                    false => "",
                };
                format!(
                    "`{s}` is not a seed: a number from 0 to {}{hint}",
                    u64::MAX - 1
                )
            })
        };
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

impl TryFrom<Scalar> for Seeds {
    type Error = anyhow::Error;

    fn try_from(Scalar(text): Scalar) -> Result<Self> {
        text.parse()
    }
}

impl From<Seeds> for String {
    fn from(Seeds(ranges): Seeds) -> Self {
        let parts: Vec<String> = ranges
            .iter()
            .map(|Range { start, end }| match end - start {
                1 => start.to_string(),
                _ => format!("{start}..{end}"),
            })
            .collect();
        parts.join(",")
    }
}

/// The help text of an option that takes one of these names.
#[cfg(feature = "cli")]
fn names_help(names: String) -> String {
    format!("{names} [default: the checkpoint's]")
}

/// Reads a whole number from 1 to a million.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|n| (1..=1_000_000).contains(n))
        .ok_or_else(|| "expected a whole number from 1 to 1000000".into())
}

/// Splits `NAME:VALUE` at its last colon; `is_name` knows the names that are there. A text that is
/// a name as a whole has no value. Errors if a number, or what stands behind a name, is no value.
pub fn split_value<T>(
    text: &OsStr,
    is_name: impl Fn(&str) -> bool,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<(OsString, Option<T>), String> {
    let split = text
        .to_str()
        .filter(|text| !is_name(text))
        .and_then(|text| text.rsplit_once(':'));
    let Some((name, value)) = split else {
        return Ok((text.into(), None));
    };
    match parse(value) {
        Ok(value) => Ok((name.into(), Some(value))),
        Err(expected) if value.parse::<f64>().is_ok() || is_name(name) => {
            Err(format!("`{value}` behind the colon: {expected}"))
        }
        Err(_) => Ok((text.into(), None)),
    }
}

/// Reads a finite number.
pub fn finite(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite());
    number.ok_or_else(|| "expected a number".into())
}

fn pixels(text: &str) -> Result<usize, String> {
    text.parse()
        .map_err(|_| "expected a whole number of pixels".into())
}

fn one_seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| "expected a single seed".into())
}

fn steps(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|n| (1..=1000).contains(n))
        .ok_or_else(|| "expected 1 to 1000 steps".into())
}

fn frames(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|n| (2..=1_000_000).contains(n))
        .ok_or_else(|| "expected a whole number from 2 to 1000000".into())
}

fn guidance(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|x| GUIDANCES.contains(x))
        .ok_or_else(|| format!("expected a number from 0 to {}", GUIDANCES.end()))
}

fn fraction(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|x: &f64| (0.0..=1.0).contains(x))
        .ok_or_else(|| "expected a number from 0 to 1".into())
}

fn factor(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('x').unwrap_or(text).parse().ok();
    number
        .filter(|x: &f64| *x > 1.0 && *x <= 8.0)
        .ok_or_else(|| "expected a factor above 1 and up to 8, such as 2x".into())
}

fn border(text: &str) -> Result<Border, String> {
    text.parse()
}

/// Serde's side of the value parsers: each reads a number or a text by the function of its name.
mod by_parser {
    use super::*;

    macro_rules! by_parser {
        ($($name:ident -> $value:ty),* $(,)?) => {
            $(pub fn $name<'de, D: Deserializer<'de>>(
                deserializer: D,
            ) -> Result<Option<$value>, D::Error> {
                let text = Option::<Scalar>::deserialize(deserializer)?;
                text.map(|Scalar(text)| super::$name(&text))
                    .transpose()
                    .map_err(D::Error::custom)
            })*
        };
    }

    by_parser! {
        at_least_one -> usize,
        border -> Border,
        factor -> f64,
        guidance -> f64,
        fraction -> f64,
        frames -> usize,
        one_seed -> u64,
        pixels -> usize,
        steps -> usize,
    }
}

/// Reads a file's name, or a list of them.
fn one_or_more<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<PathBuf>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(
        untagged,
        expecting = "expected the name of a file, or a list of names"
    )]
    enum OneOrMore {
        One(PathBuf),
        More(Vec<PathBuf>),
    }
    let paths = Option::<OneOrMore>::deserialize(deserializer)?;
    Ok(paths.map(|paths| match paths {
        OneOrMore::One(path) => vec![path],
        OneOrMore::More(paths) => paths,
    }))
}

/// A number or a text, as the text that the command line would have for it.
pub(super) struct Scalar(pub(super) String);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ScalarVisitor;

        impl Visitor<'_> for ScalarVisitor {
            type Value = Scalar;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a number")
            }

            fn visit_str<E>(self, text: &str) -> Result<Scalar, E> {
                Ok(Scalar(text.into()))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Scalar, E> {
                Ok(Scalar(number.to_string()))
            }

            fn visit_i64<E>(self, number: i64) -> Result<Scalar, E> {
                Ok(Scalar(number.to_string()))
            }

            fn visit_f64<E>(self, number: f64) -> Result<Scalar, E> {
                Ok(Scalar(format!("{number:?}")))
            }
        }

        deserializer.deserialize_any(ScalarVisitor)
    }
}

/// The names and aliases of a struct's fields, as serde's derived code asks for them.
pub fn field_names<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    struct FieldNames<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for FieldNames<'_> {
        type Error = serde::de::value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(Self::Error::custom("only the names are wanted"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = fields;
            self.deserialize_any(visitor)
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
            option unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier
            ignored_any
        }
    }

    let mut names: &'static [&'static str] = &[];
    // it always fails, with the names noted
    T::deserialize(FieldNames(&mut names)).err();
    names
}
