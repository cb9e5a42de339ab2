//! What one picture is: everything that determines its pixels, as the metadata in its file says it.

use super::fingerprint::Trace;
use super::guidance::SkipLayers;
use crate::image::load::Fit;
use crate::image::{MAX_SIDE_PX, Metadata, Parameters, parameters};
use crate::nn::PaddingMode;
use crate::sampling::noise::Variation;
use crate::sampling::{Prediction, Sampler, Schedule};
use crate::text::prompt::Syntax;
use crate::weights::{Checkpoint, Merge};
use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::sync::Arc;

/// The settings of one picture. The same settings and model give the same pixels on the same kind
/// of machine; the field names are the keys of the `sdgen` JSON in the picture's file and of a
/// `--json` line. Texts are shared, as a list may have a million pictures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// of the program
    pub version: Arc<str>,
    pub prompt: Arc<str>,
    /// the prompt that an animation goes to, and how far it is
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<PromptBlend>,
    /// empty for none
    pub negative: Arc<str>,
    #[serde(default)]
    pub prompt_syntax: Syntax,
    pub seed: u64,
    /// the noise of another seed that is mixed in
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variation: Option<Variation>,
    /// pixels
    pub width: usize,
    /// pixels
    pub height: usize,
    /// none: copies do not fit together
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tile: Option<Tile>,
    pub steps: usize,
    pub guidance: f64,
    /// 0: not at all; pictures of older versions do not say it
    #[serde(default)]
    pub guidance_rescale: f64,
    /// of a model that takes `guidance` as an input: guidance by the negative prompt; none: off
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub true_guidance: Option<f64>,
    /// guidance away from the network without some of its blocks; none: off
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_layer_guidance: Option<SkipLayers>,
    pub sampler: Sampler,
    /// none: the checkpoint's own
    pub schedule: Option<Schedule>,
    /// none: the sampler's own
    pub eta: Option<f64>,
    /// the picture that it is drawn over
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Arc<Source>>,
    /// the pictures that the model looks at
    #[serde(default, skip_serializing_if = "<[Reference]>::is_empty")]
    pub references: Arc<[Reference]>,
    /// how much of the source is noise at first; none: all of it
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strength: Option<f64>,
    /// of a model that takes the source as an input: how closely it is followed
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_guidance: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hires: Option<Hires>,
    /// of the picture as SDXL is to believe it was before it was scaled; none: the picture's own
    pub original_size: Option<Size>,
    /// left and top, as SDXL is to believe it was cropped; none: not at all
    pub crop: Option<Point>,
    /// of the picture as SDXL is to believe it is; none: the picture's own
    pub target_size: Option<Size>,
    /// the model that takes over, its hash, and at which share of the way from noise to picture
    pub refiner: Option<Arc<str>>,
    pub refiner_hash: Option<Arc<str>>,
    pub refine_at: Option<f64>,
    /// 1: the last layer of the text encoder, 2: the one before, ...
    pub clip_skip: usize,
    /// how many tokens T5 takes; none: the model's own
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sequence_length: Option<usize>,
    /// the U-Net's inner levels run in every `deep_cache`th step only
    pub deep_cache: usize,
    pub prediction: Prediction,
    /// of the U-Net's and the text encoder's weights: f32, bf16 or f16
    pub dtype: Arc<str>,
    pub model: Arc<str>,
    /// [`crate::weights::Checkpoint::hash`]
    pub model_hash: Arc<str>,
    /// [`crate::weights::Checkpoint::config_hash`]; pictures of older versions do not say it
    #[serde(default)]
    pub config_hash: Option<Arc<str>>,
    /// of the model's file, as A1111 names it; none of folders, and where no picture is written
    #[serde(default)]
    pub model_sha256: Option<Arc<str>>,
    /// what changes the model's weights
    #[serde(default, skip_serializing_if = "<[UsedLora]>::is_empty")]
    pub loras: Arc<[UsedLora]>,
    /// the embeddings that its prompts use
    #[serde(default, skip_serializing_if = "<[UsedEmbedding]>::is_empty")]
    pub embeddings: Arc<[UsedEmbedding]>,
    /// none: the model's own
    pub vae: Option<Arc<str>>,
    /// as of the model
    pub vae_hash: Option<Arc<str>>,
    #[serde(default)]
    pub vae_sha256: Option<Arc<str>>,
    /// what was added to the model's weights
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub merges: Vec<Merged>,
    /// it decodes in tiles; pictures of older versions do not say it
    #[serde(default)]
    pub vae_tiling: bool,
    /// what made the decoded picture larger, its hash, and how many times; none: nothing
    pub upscaler: Option<Arc<str>>,
    /// none of what has no weights
    pub upscaler_hash: Option<Arc<str>>,
    pub upscale: Option<f64>,
}

/// A model of which a share was added to another, or of what it has more than a third.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Merged {
    pub model: Arc<str>,
    pub hash: Arc<str>,
    pub share: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minus: Option<Arc<str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minus_hash: Option<Arc<str>>,
}

impl Merged {
    /// Of all that is merged into a checkpoint.
    pub fn all(checkpoint: &Checkpoint) -> Result<Vec<Self>> {
        let one = |Merge {
                       other,
                       minus,
                       weight,
                   }: &Merge| {
            let minus_hash = minus
                .as_ref()
                .map(|minus| minus.hash())
                .transpose()?
                .map(Arc::from);
            let (model, hash) = (other.name.as_str().into(), other.hash()?.into());
            Ok(Self {
                model,
                hash,
                share: *weight,
                minus: minus.as_ref().map(|minus| minus.name.as_str().into()),
                minus_hash,
            })
        };
        checkpoint.merges().iter().map(one).collect()
    }
}

/// A LoRA that a picture is drawn with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UsedLora {
    pub name: Arc<str>,
    /// [`crate::weights::lora::Lora::hash`]
    pub hash: Arc<str>,
    /// how much of its change is made
    pub strength: f64,
    /// the same for text encoders, where it differs
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_strength: Option<f64>,
}

/// An embedding that a prompt uses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UsedEmbedding {
    /// what stands for it in the prompt
    pub name: Arc<str>,
    /// [`crate::weights::embedding::Embedding::hash`]
    pub hash: Arc<str>,
}

/// A picture that is drawn again, larger, over what was drawn.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Hires {
    /// how much larger
    pub factor: f64,
    /// how much is drawn anew
    pub strength: f64,
    /// pixels
    pub width: usize,
    pub height: usize,
}

/// Another prompt, whose embedding is mixed into the first one's along the straight line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptBlend {
    pub prompt: Arc<str>,
    /// 0: none of it, to 1: the other prompt alone
    #[serde(rename = "share")]
    pub weight: f64,
}

/// What a picture is drawn over, and where.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Source {
    /// the file
    pub image: Arc<str>,
    /// [`crate::image::load::Input::sha256`]
    pub image_hash: Arc<str>,
    pub fit: Fit,
    /// the file that is white where the picture is repainted
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<Arc<str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask_hash: Option<Arc<str>>,
    /// its transparent parts are repainted
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub alpha: bool,
    /// pixels over which what is drawn fades in, from the edge of what is repainted inwards
    pub feather: usize,
    /// what is repainted is cut out with this many pixels around it, drawn at full size and put
    /// back
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub only_masked: Option<usize>,
    /// what is added around the picture and painted
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extend: Option<Border>,
}

/// A picture that a model looks at while it draws.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    /// the file
    pub image: Arc<str>,
    /// [`crate::image::load::Input::sha256`]
    pub image_hash: Arc<str>,
    /// pixels, as the model looks at it
    pub width: usize,
    pub height: usize,
}

/// Pixels at each side: `left=128,top=64`, or `256` for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Border {
    pub left: usize,
    pub top: usize,
    pub right: usize,
    pub bottom: usize,
}

impl std::str::FromStr for Border {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.trim().parse().ok().filter(|n| *n <= MAX_SIDE_PX);
        if let Some(all) = number(text) {
            return Ok(Self {
                left: all,
                top: all,
                right: all,
                bottom: all,
            });
        }
        let mut border = Self::default();
        let mut named = vec![];
        for part in text.split(',') {
            let (side, pixels) = part.split_once('=').unwrap_or((part, ""));
            let name = side.trim();
            if named.contains(&name) {
                return Err(format!("`{name}` stands there twice"));
            }
            named.push(name);
            let side = match name {
                "left" => &mut border.left,
                "top" => &mut border.top,
                "right" => &mut border.right,
                "bottom" => &mut border.bottom,
                _ => return Err("expected pixels, or sides with pixels: left=128,top=64".into()),
            };
            *side = number(pixels)
                .ok_or_else(|| format!("`{part}` has no number of pixels up to {MAX_SIDE_PX}"))?;
        }
        Ok(border)
    }
}

impl TryFrom<String> for Border {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Border> for String {
    fn from(border: Border) -> Self {
        format!(
            "left={},top={},right={},bottom={}",
            border.left, border.top, border.right, border.bottom
        )
    }
}

/// Two numbers of pixels: 1024x768, or 4,60.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Pair<const SEPARATOR: char>(pub usize, pub usize);
/// Width and height.
pub type Size = Pair<'x'>;
/// Left and top.
pub type Point = Pair<','>;

impl<const SEPARATOR: char> std::str::FromStr for Pair<SEPARATOR> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.trim().parse().ok().filter(|n| *n <= MAX_SIDE_PX);
        let pair = text
            .split_once(SEPARATOR)
            .and_then(|(a, b)| Some(Self(number(a)?, number(b)?)));
        pair.ok_or_else(|| {
            format!("expected two numbers up to {MAX_SIDE_PX} with `{SEPARATOR}` between")
        })
    }
}

impl<const SEPARATOR: char> TryFrom<String> for Pair<SEPARATOR> {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl<const SEPARATOR: char> std::fmt::Display for Pair<SEPARATOR> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}{SEPARATOR}{}", self.0, self.1)
    }
}

impl<const SEPARATOR: char> From<Pair<SEPARATOR>> for String {
    fn from(pair: Pair<SEPARATOR>) -> Self {
        pair.to_string()
    }
}

/// How copies of an image fit together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Tile {
    /// side by side
    X,
    /// one above the other
    Y,
    /// both
    Xy,
}

impl Settings {
    /// The padding modes of rows and of columns.
    pub fn padding(&self) -> [PaddingMode; 2] {
        let mode = |is_circular| {
            if is_circular {
                PaddingMode::Circular
            } else {
                PaddingMode::Zeros
            }
        };
        [Tile::Y, Tile::X].map(|axis| mode(self.tile == Some(axis) || self.tile == Some(Tile::Xy)))
    }

    /// What SDXL is told of the picture: original height and width, top and left of the crop,
    /// height and width.
    pub fn sizes(&self) -> [f64; 6] {
        let own = Pair(self.width, self.height);
        let (original, Pair(left, top), target) = (
            self.original_size.unwrap_or(own),
            self.crop.unwrap_or(Pair(0, 0)),
            self.target_size.unwrap_or(own),
        );
        [original.1, original.0, top, left, target.1, target.0].map(|n| n as f64)
    }

    /// Width and height of the picture that is saved, if it is not put back into another.
    pub fn final_size(&self) -> (usize, usize) {
        self.hires.map_or((self.width, self.height), |hires| {
            (hires.width, hires.height)
        })
    }

    /// Whether these settings draw the same picture: all is equal but the program's version and the
    /// names of files. What one of them does not say of its configuration is no difference.
    pub fn draws_the_same_as(&self, other: &Self) -> bool {
        let own = || self.config_hash.clone();
        *self
            == Self {
                version: self.version.clone(),
                config_hash: own().and(other.config_hash.clone()).or_else(own),
                model_sha256: self.model_sha256.clone(),
                vae_sha256: self.vae_sha256.clone(),
                ..other.clone()
            }
    }

    /// What the picture's file remembers: these settings as JSON, beside them the trace, and as
    /// A1111's text.
    pub fn metadata(&self, trace: Option<&Trace>) -> Metadata {
        let beyond_one = [
            ("Clip skip", self.clip_skip),
            ("Deep cache", self.deep_cache),
        ];
        let mut extra: Vec<_> = beyond_one
            .into_iter()
            .filter(|(_, n)| *n > 1)
            .map(|(name, n)| (name, n.to_string()))
            .collect();
        if let Some(PromptBlend { prompt, weight }) = &self.to {
            extra.extend([("To", prompt.to_string()), ("To share", weight.to_string())]);
        }
        if let Some(Variation { seed, strength }) = self.variation {
            extra.extend([
                ("Variation seed", seed.to_string()),
                ("Variation seed strength", strength.to_string()),
            ]);
        }
        // those of one direction as the extension Asymmetric Tiling says them
        let tiled = [
            (Tile::X, "Tile X"),
            (Tile::Y, "Tile Y"),
            (Tile::Xy, "Tiling"),
        ];
        extra.extend(
            tiled
                .into_iter()
                .filter(|(tile, _)| self.tile == Some(*tile))
                .map(|(_, name)| (name, "True".into())),
        );
        extra.extend(
            (self.guidance_rescale > 0.0)
                .then(|| ("CFG Rescale", self.guidance_rescale.to_string())),
        );
        extra.extend(
            self.max_sequence_length
                .map(|length| ("Max sequence length", length.to_string())),
        );
        extra.extend(
            self.true_guidance
                .map(|scale| ("True CFG scale", scale.to_string())),
        );
        extra.extend(
            self.skip_layer_guidance
                .clone()
                .map(|skip| ("Skip layer guidance", skip.into())),
        );
        extra.extend(
            self.strength
                .map(|strength| ("Denoising strength", strength.to_string())),
        );
        extra.extend(
            self.image_guidance
                .map(|scale| ("Image CFG scale", scale.to_string())),
        );
        extra.extend(
            self.source
                .as_ref()
                .map(|source| ("Init image", source.image.to_string())),
        );
        extra.extend(
            self.source
                .as_ref()
                .and_then(|source| Some(("Mask", source.mask.as_ref()?.to_string()))),
        );
        let references: Vec<&str> = self.references.iter().map(|it| &*it.image).collect();
        extra.extend((!references.is_empty()).then(|| ("References", references.join(", "))));
        if let Some(Hires {
            factor, strength, ..
        }) = self.hires
        {
            let is_over = self.strength.is_some();
            extra.extend([
                ("Hires upscale", factor.to_string()),
                ("Hires upscaler", "Lanczos".into()),
            ]);
            // A1111 has one for both
            extra.extend((!is_over).then(|| ("Denoising strength", strength.to_string())));
        }
        extra.extend(
            self.original_size
                .map(|size| ("Original size", size.to_string())),
        );
        extra.extend(self.crop.map(|point| ("Crop", point.to_string())));
        extra.extend(
            self.target_size
                .map(|size| ("Target size", size.to_string())),
        );
        extra.extend(
            self.refiner
                .as_ref()
                .map(|refiner| ("Refiner", refiner.to_string())),
        );
        extra.extend(
            self.refine_at
                .map(|at| ("Refiner switch at", at.to_string())),
        );
        let short = |lora: &UsedLora| Some(format!("{}: {}", lora.name, lora.hash.get(..12)?));
        let loras: Vec<String> = self.loras.iter().filter_map(short).collect();
        extra.extend((!loras.is_empty()).then(|| ("Lora hashes", loras.join(", "))));
        let short = |used: &UsedEmbedding| Some(format!("{}: {}", used.name, used.hash.get(..12)?));
        let inverted: Vec<String> = self.embeddings.iter().filter_map(short).collect();
        extra.extend((!inverted.is_empty()).then(|| ("TI hashes", inverted.join(", "))));
        extra.extend(self.vae.as_ref().map(|vae| ("VAE", vae.to_string())));
        extra.extend(
            self.vae_sha256
                .as_ref()
                .and_then(|hash| Some(("VAE hash", hash.get(..10)?.to_string()))),
        );
        for Merged {
            model,
            share,
            minus,
            ..
        } in &self.merges
        {
            let minus = minus
                .as_ref()
                .map(|minus| format!(" - {minus}"))
                .unwrap_or_default();
            extra.push(("Merged", format!("{model}{minus}: {share}")));
        }
        extra.extend(self.vae_tiling.then(|| ("VAE tiling", "True".into())));
        extra.extend(
            self.upscale
                .map(|by| ("Postprocess upscale by", by.to_string())),
        );
        extra.extend(
            self.upscaler
                .as_ref()
                .map(|upscaler| ("Postprocess upscaler", upscaler.to_string())),
        );
        let fields = Parameters {
            prompt: &self.prompt,
            negative: &self.negative,
            steps: self.steps,
            sampler: self.sampler.spec().a1111,
            schedule: self.schedule.map(|schedule| schedule.spec().a1111),
            guidance: self.guidance,
            seed: self.seed,
            width: self.width,
            height: self.height,
            model_hash: self.model_sha256.as_deref().and_then(|hash| hash.get(..10)),
            model: &self.model,
            extra: &extra,
        };
        let mut sdgen = json!(self);
        if let (Some(trace), Some(sdgen)) = (trace, sdgen.as_object_mut()) {
            sdgen.insert(Trace::KEY.into(), json!(trace));
        }
        Metadata {
            parameters: parameters(&fields),
            sdgen,
        }
    }
}
