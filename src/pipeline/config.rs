//! The configuration of everything a pipeline is made of, parsed before a weight is read.

use super::family::Family;
use super::preview::PreviewMap;
use super::references::{MAX_REFERENCES, ReferenceSizes};
use super::settings::Settings;
use crate::error::ModelError;
use crate::model::{Autoencoder, BackboneConfig, ModelKind};
use crate::sampling::{Mu, SchedulerConfig};
use crate::text::encoder::{AddedTokens, TextEncoderConfigs};
use crate::weights::Checkpoint;
use anyhow::{Context, Result, bail};
use serde_json::Value;

/// How much of an init image is noise at first (`strength`) where nobody says.
const STRENGTH: f64 = 0.75;
/// How closely InstructPix2Pix follows its input image where nobody says; its authors' own.
const IMAGE_GUIDANCE: f64 = 1.5;

/// The parsed configuration of a checkpoint with its refiner and VAE.
pub struct PipelineConfig {
    /// the model that every image begins with
    pub base: ModelConfig,
    /// the model that finishes them
    pub refiner: Option<ModelConfig>,
    pub vae: Autoencoder,
    /// a linear map from latents to small images, if one is known for this VAE
    pub preview: Option<PreviewMap>,
    /// what finds the checkpoint's learned words in prompts
    pub learned_words: Option<AddedTokens>,
}

impl PipelineConfig {
    /// Parses the configuration of a checkpoint. Errors if no image can be begun with it.
    pub fn new(checkpoint: &Checkpoint) -> Result<Self> {
        Self::parse(checkpoint).context(ModelError)
    }

    fn parse(checkpoint: &Checkpoint) -> Result<Self> {
        let name = &checkpoint.name;
        if Family::detect(checkpoint)? == Family::SdxlRefiner {
            bail!(
                "`{name}` is a refiner, which finishes pictures and cannot begin any\n\nhint: \
                 pass it with `--refiner`, for example beside `--model sdxl`"
            );
        }
        checkpoint.require_vae()?;
        let base = ModelConfig::new(checkpoint)?;
        let refiner = checkpoint
            .refiner()
            .map(|refiner| base.refined_by(refiner))
            .transpose()?;
        let vae = Autoencoder::from_json(checkpoint.config("vae")?)?;
        let (latent, out) = (
            vae.latent_format().channels,
            base.backbone.latent_channels(),
        );
        if latent != out {
            bail!(
                "the {} of `{name}` draws in {out} channels, its VAE has {latent}",
                base.backbone.noun()
            );
        }
        Ok(Self {
            preview: PreviewMap::of(&vae, &base.backbone, base.added_ids > 0),
            learned_words: base.encoder.added_tokens(checkpoint)?,
            base,
            refiner,
            vae,
        })
    }

    /// Returns height, width and channels of the latents of an image.
    pub fn latent_shape(&self, settings: &Settings) -> (usize, usize, usize) {
        let factor = self.vae.factor();
        (
            settings.height / factor,
            settings.width / factor,
            self.base.backbone.latent_channels(),
        )
    }

    /// What the sides of pictures are multiples of, in pixels.
    pub fn step(&self) -> usize {
        self.vae.factor() * self.base.backbone.patch()
    }

    /// How reference pictures are brought to a size that the network takes.
    pub fn reference_sizes(&self) -> ReferenceSizes {
        match self.base.backbone {
            _ if self.base.kind == ModelKind::Control => ReferenceSizes::Drawing,
            BackboneConfig::Flux(_) => ReferenceSizes::Kontext,
            _ => ReferenceSizes::Flux2(self.vae.factor()),
        }
    }

    /// Returns the side of the tiles in which an image is decoded, in latents, if it is.
    pub fn tile(&self, settings: &Settings) -> Option<usize> {
        settings.vae_tiling.then(|| self.vae.tile())
    }
}

/// The parsed configuration of a denoising network with its text encoders and its scheduler.
pub struct ModelConfig {
    pub backbone: BackboneConfig,
    pub encoder: TextEncoderConfigs,
    pub scheduler: SchedulerConfig,
    /// how many time ids the network takes (SDXL: sizes and crop); 0 for none
    pub added_ids: usize,
    /// whether an empty negative prompt is embedded as zeros, not as the embedding of no text
    pub empty_is_zeros: bool,
    /// what the network takes beside the latents
    pub kind: ModelKind,
}

impl ModelConfig {
    fn new(checkpoint: &Checkpoint) -> Result<Self> {
        let backbone = BackboneConfig::of(checkpoint)?;
        let encoder = TextEncoderConfigs::of(checkpoint)?;
        let added_ids = backbone.time_ids(encoder.pooled_dim())?;
        let pipeline = checkpoint.optional_config("pipeline");
        let force_zeros = match pipeline
            .and_then(|config| config.get("force_zeros_for_empty_prompt"))
        {
            None | Some(Value::Null) => None,
            Some(Value::Bool(force)) => Some(*force),
            Some(other) => bail!(
                "`force_zeros_for_empty_prompt` of `{}` is {other}, which does not fit: expected true or false",
                checkpoint.name
            ),
        };
        let scheduler = SchedulerConfig::from_json(checkpoint.config("scheduler")?)?.for_pipeline();
        let scheduler = match backbone {
            BackboneConfig::Sd3(_) => scheduler.ending_at_lowest(),
            _ => scheduler,
        };
        if scheduler.is_flow() != backbone.is_flow() {
            let class = checkpoint.config("scheduler")?.get("_class_name");
            bail!(
                "the scheduler of `{}` is {}, and its {} is of another kind, which sdgen does not draw\n\nhint: the parts of the model do not belong together; fetch it again",
                checkpoint.name,
                class.cloned().unwrap_or_default(),
                backbone.noun()
            );
        }
        Ok(Self {
            scheduler,
            // diffusers' default in the pipelines that know this key
            empty_is_zeros: force_zeros.unwrap_or(added_ids > 0),
            kind: backbone.kind()?,
            backbone,
            encoder,
            added_ids,
        })
    }

    /// Returns how the noise levels follow from the size of a picture, where the scheduler's file does
    /// not say it.
    pub fn mu(&self) -> Option<Mu> {
        match self.backbone {
            BackboneConfig::Flux2(_) => Some(Mu::Empirical),
            BackboneConfig::UNet(_)
            | BackboneConfig::Sd3(_)
            | BackboneConfig::Flux(_)
            | BackboneConfig::ZImage(_) => None,
        }
    }

    /// Returns the strength of img2img; none where the network takes the source as an input and
    /// starts from pure noise.
    pub fn strength(&self, asked: Option<f64>) -> Option<f64> {
        match self.kind {
            ModelKind::TextToImage | ModelKind::Control => Some(asked.unwrap_or(STRENGTH)),
            ModelKind::Inpaint | ModelKind::Fill => Some(asked.unwrap_or(1.0)),
            ModelKind::InstructPix2Pix => asked,
        }
    }

    /// Returns the image guidance scale of a network that edits images.
    pub fn image_guidance(&self, asked: Option<f64>) -> Option<f64> {
        asked.or((self.kind == ModelKind::InstructPix2Pix).then_some(IMAGE_GUIDANCE))
    }

    /// Errors if the network needs a source image and there is none, or if it cannot do what is
    /// asked with it.
    pub fn check_source(&self, settings: &Settings) -> Result<()> {
        let Settings {
            source,
            strength,
            image_guidance,
            model,
            ..
        } = settings;
        match (self.kind, source) {
            (ModelKind::Inpaint | ModelKind::Fill, None) => bail!(
                "`{model}` is for inpainting\n\nhint: it needs `--image FILE` and `--mask FILE`"
            ),
            (ModelKind::Inpaint | ModelKind::Fill, Some(source)) if !source.repaints() => bail!(
                "`{model}` is for inpainting\n\nhint: tell it where with `--mask FILE`, white is \
                 repainted"
            ),
            (ModelKind::InstructPix2Pix, None) => bail!(
                "`{model}` edits pictures\n\nhint: it needs one, `--image FILE`, and for a prompt \
                 what to change"
            ),
            (ModelKind::InstructPix2Pix, Some(_)) if strength.is_some() => bail!(
                "`--strength` means nothing to `{model}`\n\nhint: `--image-guidance` is how \
                 closely it follows the picture"
            ),
            (ModelKind::InstructPix2Pix, _) => Ok(()),
            _ if image_guidance.is_some() => bail!(
                "`--image-guidance` means nothing to `{model}`\n\nhint: leave it out; it is for \
                 models such as InstructPix2Pix"
            ),
            _ => Ok(()),
        }
    }

    /// Errors if the network does not look at so many reference pictures.
    pub fn check_references(&self, count: usize, model: &str) -> Result<()> {
        let is_control = self.kind == ModelKind::Control;
        if count == 0 && is_control {
            bail!(
                "`{model}` draws by the edges or the depth of a picture\n\nhint: it needs a picture of \
                 these: `--reference FILE`"
            );
        }
        if count > 0 && !is_control && !self.backbone.takes_references() {
            bail!(
                "`--reference` means nothing to `{model}`\n\nhint: FLUX.2 klein and FLUX.1 Kontext \
                 look at reference pictures: `-m klein`; what a picture is drawn over is `--image FILE`"
            );
        }
        if matches!(self.backbone, BackboneConfig::Flux(_)) && count > 1 {
            bail!(
                "{count} reference pictures are too many\n\nhint: `{model}` takes one; FLUX.2 klein \
                 takes several: `-m klein`"
            );
        }
        if count > MAX_REFERENCES {
            bail!(
                "{count} reference pictures are too many\n\nhint: `{model}` takes {MAX_REFERENCES} \
                 at most; FLUX.2 klein is made for up to four"
            );
        }
        Ok(())
    }

    /// Parses the configuration of a refiner of this model. Errors if their latents differ.
    fn refined_by(&self, refiner: &Checkpoint) -> Result<Self> {
        let other = Self::new(refiner)?;
        let same_latents = self.backbone.latent_channels() == other.backbone.in_channels();
        if self.added_ids == 0 || other.added_ids == 0 || !same_latents {
            bail!(
                "`{}` cannot refine what this model begins\n\nhint: `--refiner` is for two models \
                 of SDXL's family",
                refiner.name
            );
        }
        Ok(other)
    }
}
