//! The families of models, as data: how each is recognised and what it draws by default.

use crate::model::flux::FluxConfig;
use crate::model::{BackboneConfig, ModelKind};
use crate::text::encoder::TextEncoderConfigs;
use crate::weights::distillation::{Bearer, Distillation, TCD_ETA};
use crate::weights::{Checkpoint, DEFAULTS, TRANSFORMER, UNET, family_name};
use anyhow::{Result, bail, ensure};
use serde_json::Value;
use std::ops::RangeInclusive;

/// A family of checkpoints that share their way of conditioning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Stable Diffusion 1.x: OpenAI's CLIP-L, noise prediction
    Sd1,
    /// Stable Diffusion 2.x: OpenCLIP-H's penultimate layer, often v-prediction
    Sd2,
    /// Stable Diffusion XL: both encoders' penultimate layers, pooled text, and the picture's sizes
    Sdxl,
    /// finishes what SDXL began: the second encoder alone, and an aesthetic score
    SdxlRefiner,
    /// Stable Diffusion 3 and 3.5: both of CLIP's encoders and T5, attended to together with the picture
    Sd3,
    /// FLUX.1: T5's states and CLIP's pooled text, in one sequence with the picture
    Flux1,
    /// FLUX.2 klein: a language model's states, and a transformer on packed latents
    Flux2Klein,
    /// Z-Image: the same language model's states, in one sequence with the picture
    ZImage,
}

/// What the plain command uses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Defaults {
    pub steps: usize,
    /// 1 is off
    pub guidance: f64,
    /// of TCD's sampler; none: the sampler's own
    pub eta: Option<f64>,
    /// for people: how the model was made to need few steps
    pub distilled: Option<&'static str>,
}

/// As in the papers' and the model cards' examples.
const STABLE_DIFFUSION: Defaults = Defaults {
    steps: 50,
    guidance: 7.5,
    eta: None,
    distilled: None,
};
const SDXL: Defaults = Defaults {
    steps: 50,
    guidance: 5.0,
    eta: None,
    distilled: None,
};

/// diffusers' own.
const SD3: Defaults = Defaults {
    steps: 28,
    guidance: 7.0,
    eta: None,
    distilled: None,
};

/// diffusers' own, of dev, whose guidance is an input.
const FLUX1: Defaults = Defaults {
    steps: 28,
    guidance: 3.5,
    eta: None,
    distilled: None,
};

/// diffusers' of the base model; the distilled one draws in four steps.
const FLUX2_KLEIN: Defaults = Defaults {
    steps: 50,
    guidance: 4.0,
    eta: None,
    distilled: None,
};

/// As in the example of the base model's card, where the guidance is one less.
const Z_IMAGE: Defaults = Defaults {
    steps: 50,
    guidance: 5.0,
    eta: None,
    distilled: None,
};

/// As in the examples of the model cards: FLUX.1 Fill, and Canny, whose edges are followed more closely
/// than Depth's.
const FLUX1_TOLD: Defaults = Defaults {
    steps: 50,
    guidance: 30.0,
    ..FLUX1
};
const FLUX1_DEPTH: f64 = 10.0;

/// The shift of its scheduler.
const Z_IMAGE_SHIFT: f64 = 6.0;

/// Numbers that SDXL's U-Net is told of a picture: its original size, its crop, and its size.
pub const BASE_IDS: usize = 6;
/// Those of its refiner's: original size, crop, and an aesthetic score.
pub const REFINER_IDS: usize = 5;
/// That score, of what to draw and of what to steer away from: diffusers' defaults.
pub const AESTHETIC_SCORES: [f64; 2] = [6.0, 2.5];
/// Where a refiner takes over, as a share of the way from noise to picture.
pub const REFINE_AT: f64 = 0.8;

/// (short name, hub id)
pub const SHORT_NAMES: [(&str, &str); 27] = [
    ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ("sd21", "stabilityai/stable-diffusion-2-1"),
    ("turbo", "stabilityai/sd-turbo"),
    ("lcm", "SimianLuo/LCM_Dreamshaper_v7"),
    ("sdxs", "IDKiro/sdxs-512-dreamshaper"),
    ("tiny-sd", "segmind/tiny-sd"),
    ("small-sd", "segmind/small-sd"),
    ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0"),
    ("sdxl-turbo", "stabilityai/sdxl-turbo"),
    (
        "sdxl-lightning",
        "ByteDance/SDXL-Lightning/sdxl_lightning_4step.safetensors",
    ),
    ("ssd1b", "segmind/SSD-1B"),
    ("vega", "segmind/Segmind-Vega"),
    (
        "sdxl-refiner",
        "stabilityai/stable-diffusion-xl-refiner-1.0",
    ),
    ("sd3", "stabilityai/stable-diffusion-3-medium-diffusers"),
    ("sd35-medium", "stabilityai/stable-diffusion-3.5-medium"),
    ("sd35-large", "stabilityai/stable-diffusion-3.5-large"),
    ("sd35-turbo", "stabilityai/stable-diffusion-3.5-large-turbo"),
    ("flux-dev", "black-forest-labs/FLUX.1-dev"),
    ("flux-schnell", "black-forest-labs/FLUX.1-schnell"),
    ("flux-fill", "black-forest-labs/FLUX.1-Fill-dev"),
    ("flux-canny", "black-forest-labs/FLUX.1-Canny-dev"),
    ("flux-depth", "black-forest-labs/FLUX.1-Depth-dev"),
    ("kontext", "black-forest-labs/FLUX.1-Kontext-dev"),
    ("klein", "black-forest-labs/FLUX.2-klein-4B"),
    ("klein-base", "black-forest-labs/FLUX.2-klein-base-4B"),
    ("z-image-turbo", "Tongyi-MAI/Z-Image-Turbo"),
    ("z-image", "Tongyi-MAI/Z-Image"),
];

/// The same of VAEs.
pub const VAE_SHORT_NAMES: [(&str, &str); 5] = [
    ("taesd", "madebyollin/taesd"),
    ("taesdxl", "madebyollin/taesdxl"),
    ("taesd3", "madebyollin/taesd3"),
    ("taef1", "madebyollin/taef1"),
    ("sdxl-vae-fp16-fix", "madebyollin/sdxl-vae-fp16-fix"),
];

impl Family {
    /// Recognises the family by the checkpoint's own configuration. Errors name families that are
    /// not drawn yet.
    pub fn detect(checkpoint: &Checkpoint) -> Result<Self> {
        checkpoint.require_text_encoder()?;
        let encoders = TextEncoderConfigs::of(checkpoint)?;
        let backbone = BackboneConfig::of(checkpoint)?;
        let transformer = match &backbone {
            BackboneConfig::UNet(_) => None,
            BackboneConfig::Sd3(config) => {
                let pooled = Some(config.pooled_projection_dim);
                Some((Self::Sd3, config.joint_attention_dim, pooled))
            }
            BackboneConfig::Flux(config) => {
                let pooled = Some(config.pooled_projection_dim);
                Some((Self::Flux1, config.joint_attention_dim, pooled))
            }
            BackboneConfig::Flux2(config) => {
                Some((Self::Flux2Klein, config.joint_attention_dim, None))
            }
            BackboneConfig::ZImage(config) => Some((Self::ZImage, config.cap_feat_dim, None)),
        };
        if let Some((family, context, pooled)) = transformer {
            if let Err(cause) = encoders.require(context, pooled) {
                bail!(
                    "the parts of `{}` do not belong together: {cause}\n\nhint: fetch the model again",
                    checkpoint.name
                );
            }
            return Ok(family);
        }
        ensure!(
            !encoders.reads_sentences(),
            "the text encoder of `{}` is a language model, which no U-Net reads\n\nhint: the parts of the model do not belong together; fetch it again",
            checkpoint.name
        );
        let pooled = encoders.pooled_dim();
        let ids = backbone.time_ids(pooled)?;
        if pooled.is_some() {
            return match ids {
                BASE_IDS => Ok(Self::Sdxl),
                REFINER_IDS => Ok(Self::SdxlRefiner),
                0 => bail!(
                    "the U-Net of `{}` takes nothing of its second text encoder\n\nhint: the parts of the model do not belong together; fetch it again",
                    checkpoint.name
                ),
                ids => bail!(
                    "the U-Net of `{}` is told {ids} numbers of a picture, which sdgen does not know",
                    checkpoint.name
                ),
            };
        }
        let exact_gelu = checkpoint
            .config("text_encoder")?
            .get("hidden_act")
            .is_some_and(|a| a == "gelu");
        Ok(if exact_gelu { Self::Sd2 } else { Self::Sd1 })
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sd1 => family_name::SD1,
            Self::Sd2 => family_name::SD2,
            Self::Sdxl => family_name::SDXL,
            Self::SdxlRefiner => family_name::SDXL_REFINER,
            Self::Sd3 => family_name::SD3,
            Self::Flux1 => family_name::FLUX1,
            Self::Flux2Klein => family_name::FLUX2_KLEIN,
            Self::ZImage => family_name::Z_IMAGE,
        }
    }

    /// Steps and guidance of the family, of the model's distillation, or the checkpoint's own (the
    /// embedded model brings some).
    pub fn defaults(self, checkpoint: &Checkpoint) -> Defaults {
        let own = checkpoint.optional_config(DEFAULTS);
        let number = |key: &str, range: RangeInclusive<f64>| {
            let number = own.and_then(|own| own.get(key)?.as_f64());
            number.filter(|number| range.contains(number))
        };
        let family = match self {
            Self::Sd1 | Self::Sd2 => STABLE_DIFFUSION,
            Self::Sdxl | Self::SdxlRefiner => SDXL,
            Self::Sd3 => SD3,
            Self::Flux1 => FLUX1,
            Self::Flux2Klein => FLUX2_KLEIN,
            Self::ZImage => Z_IMAGE,
        };
        let distilled = match self {
            Self::Sd3 => sd3_distilled(checkpoint),
            Self::Flux1 => flux1_told(checkpoint).or_else(|| flux1_distilled(checkpoint)),
            Self::Flux2Klein => klein_distilled(checkpoint),
            Self::ZImage => z_image_distilled(checkpoint),
            _ => distilled(checkpoint),
        };
        let defaults = distilled.unwrap_or(family);
        Defaults {
            steps: number("steps", 1.0..=1000.0).map_or(defaults.steps, |s| s as usize),
            guidance: number("guidance", 0.0..=10_000.0).unwrap_or(defaults.guidance),
            ..defaults
        }
    }
}

/// What Stable Diffusion 3.5 Large Turbo draws with. It has nothing of its own but its name.
fn sd3_distilled(checkpoint: &Checkpoint) -> Option<Defaults> {
    let is_turbo = checkpoint.name.to_lowercase().contains("turbo");
    is_turbo.then_some(Defaults {
        steps: 4,
        guidance: 1.0,
        eta: None,
        distilled: Some("to four steps without guidance, by its name"),
    })
}

/// What a FLUX.1 that is told of a picture draws with. Only its name, or that of the LoRA that made it
/// so, tells edges from depth.
fn flux1_told(checkpoint: &Checkpoint) -> Option<Defaults> {
    let config = FluxConfig::from_json(checkpoint.optional_config(TRANSFORMER)?).ok()?;
    let loras = checkpoint.loras().iter().map(|lora| &lora.name);
    let mut names = loras.chain([&checkpoint.name]);
    let is_canny = names.any(|name| name.to_lowercase().contains("canny"));
    match config.kind().ok()? {
        ModelKind::Control if !is_canny => Some(Defaults {
            guidance: FLUX1_DEPTH,
            ..FLUX1_TOLD
        }),
        ModelKind::Control | ModelKind::Fill => Some(FLUX1_TOLD),
        _ => None,
    }
}

/// What FLUX.1 schnell draws with, which dev is not: it takes no guidance scale.
fn flux1_distilled(checkpoint: &Checkpoint) -> Option<Defaults> {
    let takes_scale = checkpoint
        .optional_config(TRANSFORMER)?
        .get("guidance_embeds");
    (takes_scale != Some(&Value::Bool(true))).then_some(Defaults {
        steps: 4,
        guidance: 1.0,
        eta: None,
        distilled: Some("to four steps without guidance"),
    })
}

/// What a FLUX.2 klein that says it was distilled draws with.
fn klein_distilled(checkpoint: &Checkpoint) -> Option<Defaults> {
    let index = checkpoint.optional_config("pipeline")?;
    let is_distilled = index.get("is_distilled").and_then(Value::as_bool)?;
    is_distilled.then_some(Defaults {
        steps: 4,
        guidance: 1.0,
        eta: None,
        distilled: Some("to four steps without guidance"),
    })
}

/// What Z-Image-Turbo draws with. It is known by its scheduler, whose shift is half of the base
/// model's.
fn z_image_distilled(checkpoint: &Checkpoint) -> Option<Defaults> {
    let shift = checkpoint
        .optional_config("scheduler")?
        .get("shift")?
        .as_f64()?;
    (shift < Z_IMAGE_SHIFT).then_some(Defaults {
        steps: 8,
        guidance: 1.0,
        eta: None,
        distilled: Some("to eight steps without guidance"),
    })
}

/// The name, of a LoRA or else of the model, that tells of a distillation, and what it tells.
pub fn distillation_by_name(checkpoint: &Checkpoint) -> Option<(&str, Distillation)> {
    // the names of transformers, and of their LoRAs, tell of distillations of another kind
    if checkpoint.denoiser() != UNET {
        return None;
    }
    let mut loras = checkpoint.loras().iter();
    if let Some(of_lora) = loras.find_map(|lora| Some((&*lora.name, lora.distillation()?))) {
        return Some(of_lora);
    }
    let model = &checkpoint.name;
    Some((model, Distillation::named(model, Bearer::Model)?))
}

/// What a model that was distilled to a few steps draws with: by its name, or by what its
/// configuration says of its distillation. Numbers are those of diffusers' pipelines and of the
/// model cards.
fn distilled(checkpoint: &Checkpoint) -> Option<Defaults> {
    let config = |part: &str, key: &str| {
        checkpoint
            .optional_config(part)?
            .get(key)
            .filter(|value| !value.is_null())
    };
    let scheduler = |key: &str| {
        config("scheduler", key)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let of = |steps, guidance, eta, distilled| {
        Some(Defaults {
            steps,
            guidance,
            eta,
            distilled: Some(distilled),
        })
    };
    let by_name = distillation_by_name(checkpoint).map(|(_, named)| Defaults {
        steps: named.steps,
        guidance: named.guidance,
        eta: Some(named.eta),
        distilled: Some(named.method),
    });
    match scheduler("_class_name") {
        _ if config("unet", "time_cond_proj_dim").is_some() => {
            of(4, 8.5, None, "latent consistency, guidance built in")
        }
        _ if by_name.is_some() => by_name,
        "LCMScheduler" => of(4, 1.0, None, "latent consistency"),
        "TCDScheduler" => of(4, 1.0, Some(TCD_ETA), "trajectory consistency"),
        // what was trained on all timesteps and draws from the last one on predicts v, as noise is
        // no answer there
        "EulerDiscreteScheduler" | "EulerAncestralDiscreteScheduler"
            if scheduler("timestep_spacing") == "trailing"
                && matches!(scheduler("prediction_type"), "" | "epsilon") =>
        {
            // Turbo draws in one step to four, Lightning in as many as its name says
            of(4, 1.0, None, "to few steps, by its scheduler")
        }
        _ => None,
    }
}
