//! The network that denoises latents, of whichever architecture, as the pipeline sees it.

use super::flux::{self, ConditionedFlux, Flux, FluxConfig};
use super::flux2::{ConditionedFlux2, Flux2, Flux2Config};
use super::sd3::{self, ConditionedSd3, Sd3, Sd3Config};
use super::unet::{ConditionedUNet, UNet, UNetInputs};
use super::unet_config::UNetConfig;
use super::z_image::{self, ConditionedZImage, ZImage, ZImageConfig};
use crate::nn::Forward;
use crate::nn::weights::Weights;
use crate::weights::{
    Checkpoint, FLUX_CLASS, FLUX2_CLASS, KONTEXT_PIPELINE, SD3_CLASS, UNET, Z_IMAGE_CLASS,
};
use anyhow::{Result, bail};
use candle_core::{Result as TensorResult, Tensor};
use serde_json::Value;

/// The task that a network is trained for, which decides on its inputs besides the noisy latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelKind {
    TextToImage,
    /// Inpainting models see the mask and the latents of the masked image.
    Inpaint,
    /// InstructPix2Pix sees the latents of the image that it edits (Brooks et al. 2022, arXiv
    /// 2211.09800).
    InstructPix2Pix,
    /// FLUX.1 Fill, for inpainting, sees the latents of the masked image and the mask pixel by pixel.
    Fill,
    /// FLUX.1 Canny and Depth see the latents of a picture of the edges or of the depth of what they
    /// draw, which diffusers calls a control image.
    Control,
}

/// The prompts of a batch as a network takes them.
#[derive(Clone)]
pub struct Conditioning {
    /// prompt embeddings [b, n, d]
    pub context: Tensor,
    /// how many of the n tokens are a prompt's own, row by row, where prompts are padded; empty
    /// where all are
    pub lengths: Vec<usize>,
    /// for networks that take the pooled text
    pub added_cond: Option<AddedCond>,
    /// The guidance scale, for networks that embed it; others ignore it.
    pub guidance: Option<f64>,
}

/// SDXL's micro-conditioning (Podell et al. 2023, arXiv 2307.01952), diffusers'
/// `added_cond_kwargs`.
#[derive(Clone)]
pub struct AddedCond {
    /// pooled prompt embeddings [b, p]
    pub text_embeds: Tensor,
    /// sizes and crops, a list for each image
    pub time_ids: Vec<Vec<f64>>,
}

impl From<Tensor> for Conditioning {
    fn from(context: Tensor) -> Self {
        Self {
            context,
            lengths: vec![],
            added_cond: None,
            guidance: None,
        }
    }
}

impl Conditioning {
    /// The rows of so many from this one on.
    pub fn rows(&self, from: usize, count: usize) -> TensorResult<Self> {
        let narrow = |x: &Tensor| x.narrow(0, from, count);
        let added_cond = match &self.added_cond {
            Some(added) => Some(AddedCond {
                text_embeds: narrow(&added.text_embeds)?,
                time_ids: added
                    .time_ids
                    .iter()
                    .skip(from)
                    .take(count)
                    .cloned()
                    .collect(),
            }),
            None => None,
        };
        Ok(Self {
            context: narrow(&self.context)?,
            lengths: self
                .lengths
                .iter()
                .skip(from)
                .take(count)
                .copied()
                .collect(),
            added_cond,
            guidance: self.guidance,
        })
    }

    /// Concatenates two along the batch, of as many tokens each. The guidance scale is the first
    /// one's.
    pub fn cat(first: &Self, second: &Self) -> TensorResult<Self> {
        let added_cond = match (&first.added_cond, &second.added_cond) {
            (Some(a), Some(b)) => Some(AddedCond {
                text_embeds: Tensor::cat(&[&a.text_embeds, &b.text_embeds], 0)?,
                time_ids: [&*a.time_ids, &b.time_ids].concat(),
            }),
            _ => None,
        };
        Ok(Self {
            context: Tensor::cat(&[&first.context, &second.context], 0)?,
            lengths: [&*first.lengths, &second.lengths].concat(),
            added_cond,
            guidance: first.guidance,
        })
    }
}

/// Inputs that stay the same in all steps, besides the prompts.
#[derive(Clone, Default)]
pub struct ExtraInputs {
    /// [b, h, w, k]: concatenated to the channels of the latents, for other kinds than
    /// [`ModelKind::TextToImage`]
    pub concat: Option<Tensor>,
    /// [b, h, w, c] each: latents of reference pictures, for networks with
    /// [`BackboneConfig::takes_references`]; others ignore them
    pub references: Vec<Tensor>,
}

/// The configuration of a backbone.
#[derive(Debug, Clone)]
pub enum BackboneConfig {
    UNet(Box<UNetConfig>),
    Sd3(Sd3Config),
    Flux(FluxConfig),
    Flux2(Flux2Config),
    ZImage(ZImageConfig),
}

impl BackboneConfig {
    /// Parses the config.json of a checkpoint's denoising network. A value that would change the
    /// result and is not supported is an error that names it.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let component = checkpoint.denoiser();
        let config = checkpoint.config(component)?;
        if component == UNET {
            return Ok(Self::UNet(Box::new(UNetConfig::from_json(config)?)));
        }
        match config.get("_class_name").and_then(Value::as_str) {
            Some(SD3_CLASS) => Sd3Config::from_json(config).map(Self::Sd3),
            Some(FLUX_CLASS) => {
                let pipeline = checkpoint.optional_config("pipeline");
                let class = pipeline.and_then(|it| it.get("_class_name")?.as_str());
                Ok(Self::Flux(FluxConfig {
                    takes_references: class == Some(KONTEXT_PIPELINE),
                    ..FluxConfig::from_json(config)?
                }))
            }
            Some(FLUX2_CLASS) => Flux2Config::from_json(config).map(Self::Flux2),
            Some(Z_IMAGE_CLASS) => ZImageConfig::from_json(config).map(Self::ZImage),
            class => bail!(
                "the transformer of `{}` is a `{}`, which sdgen does not draw\n\nhint: of transformers, those of Stable Diffusion 3, FLUX.1, FLUX.2 klein and Z-Image are drawn",
                checkpoint.name,
                class.unwrap_or("network without a `_class_name`")
            ),
        }
    }

    /// The network's name for people.
    pub fn noun(&self) -> &'static str {
        match self {
            Self::UNet(_) => "U-Net",
            Self::Sd3(_) | Self::Flux(_) | Self::Flux2(_) | Self::ZImage(_) => "transformer",
        }
    }

    /// Whether it was trained by flow matching.
    pub fn is_flow(&self) -> bool {
        match self {
            Self::UNet(_) => false,
            Self::Sd3(_) | Self::Flux(_) | Self::Flux2(_) | Self::ZImage(_) => true,
        }
    }

    /// The task of the network, by its number of input channels. Errors if no kind of
    /// model has that many.
    pub fn kind(&self) -> Result<ModelKind> {
        match self {
            Self::UNet(config) => config.kind(),
            Self::Flux(config) => config.kind(),
            Self::Sd3(_) | Self::Flux2(_) | Self::ZImage(_) => Ok(ModelKind::TextToImage),
        }
    }

    /// Height and width of the latents that the model was trained on.
    pub fn sample_size(&self) -> Result<(usize, usize)> {
        match self {
            Self::UNet(config) => config.sample_size(),
            Self::Sd3(config) => Ok(config.sample_size()),
            Self::Flux(config) => Ok(config.sample_size()),
            Self::Flux2(config) => Ok(config.sample_size()),
            Self::ZImage(config) => Ok(config.sample_size()),
        }
    }

    /// Channels of the network's input.
    pub fn in_channels(&self) -> usize {
        match self {
            Self::UNet(config) => config.in_channels,
            Self::Sd3(config) => config.in_channels,
            Self::Flux(config) => config.in_channels / (flux::PATCH * flux::PATCH),
            Self::Flux2(config) => config.in_channels,
            Self::ZImage(config) => config.in_channels,
        }
    }

    /// Channels of the latents.
    pub fn latent_channels(&self) -> usize {
        match self {
            Self::UNet(config) => config.out_channels,
            Self::Sd3(config) => config.in_channels,
            Self::Flux(config) => config.latent_channels(),
            Self::Flux2(config) => config.in_channels,
            Self::ZImage(config) => config.in_channels,
        }
    }

    /// The side of the squares of latents that the network sees as one: sides of latents are
    /// multiples of it.
    pub fn patch(&self) -> usize {
        match self {
            Self::UNet(_) | Self::Flux2(_) => 1,
            Self::Sd3(_) => sd3::PATCH,
            Self::Flux(_) => flux::PATCH,
            Self::ZImage(_) => z_image::PATCH,
        }
    }

    /// Whether a prompt may be repeated to the length of others: what only looks at it sees the same,
    /// and what has it in its own sequence does not.
    pub fn repeats_prompts(&self) -> bool {
        match self {
            Self::UNet(_) => true,
            Self::Sd3(_) | Self::Flux(_) | Self::Flux2(_) | Self::ZImage(_) => false,
        }
    }

    /// The number of time ids (sizes and crops) that the network takes with pooled prompt
    /// embeddings of width `pooled`, if there are any; 0 if it takes neither. Errors if its widths do
    /// not add up.
    pub fn time_ids(&self, pooled: Option<usize>) -> Result<usize> {
        match self {
            Self::UNet(config) => config.time_ids(pooled),
            Self::Sd3(_) | Self::Flux(_) | Self::Flux2(_) | Self::ZImage(_) => Ok(0),
        }
    }

    /// Whether the network was distilled with the guidance scale as an input.
    pub fn embeds_guidance(&self) -> bool {
        match self {
            Self::UNet(config) => config.time_cond_proj_dim.is_some(),
            Self::Flux(config) => config.guidance_embeds,
            Self::Sd3(_) | Self::Flux2(_) | Self::ZImage(_) => false,
        }
    }

    /// Whether its blocks can be read each time that they are needed.
    pub fn is_stack(&self) -> bool {
        match self {
            Self::UNet(_) => false,
            Self::Sd3(_) | Self::Flux(_) | Self::Flux2(_) | Self::ZImage(_) => true,
        }
    }

    /// The number of its blocks that skip-layer guidance may leave out.
    pub fn blocks_to_skip(&self) -> usize {
        match self {
            Self::Sd3(config) => config.num_layers,
            Self::UNet(_) | Self::Flux(_) | Self::Flux2(_) | Self::ZImage(_) => 0,
        }
    }

    /// The latents of the largest picture that the network can draw, in each direction.
    pub fn largest_side(&self) -> Option<usize> {
        match self {
            Self::Sd3(config) => Some(config.largest_side()),
            Self::UNet(_) | Self::Flux(_) | Self::Flux2(_) | Self::ZImage(_) => None,
        }
    }

    /// Whether the network looks at reference pictures.
    pub fn takes_references(&self) -> bool {
        match self {
            Self::UNet(_) | Self::Sd3(_) | Self::ZImage(_) => false,
            Self::Flux(config) => config.takes_references,
            Self::Flux2(_) => true,
        }
    }

    /// A rough estimate of the memory of the activations of `batch` latents [h, w], each with so many
    /// latents of reference pictures, in bytes.
    pub fn activation_bytes(&self, batch: usize, h: usize, w: usize, references: usize) -> u64 {
        match self {
            Self::UNet(config) => config.activation_bytes(batch, h, w),
            Self::Sd3(config) => config.activation_bytes(batch, h, w),
            Self::Flux(config) => config.activation_bytes(batch, h * w + references),
            Self::Flux2(config) => config.activation_bytes(batch, h * w + references),
            Self::ZImage(config) => config.activation_bytes(batch, h, w),
        }
    }

    /// Reads the network at `w`.
    pub fn build(&self, w: &Weights) -> Result<Backbone> {
        Ok(match self {
            Self::UNet(config) => Backbone::UNet(Box::new(UNet::new(w, config)?)),
            Self::Sd3(config) => Backbone::Sd3(Box::new(Sd3::new(w, config)?)),
            Self::Flux(config) => Backbone::Flux(Box::new(Flux::new(w, config)?)),
            Self::Flux2(config) => Backbone::Flux2(Box::new(Flux2::new(w, config)?)),
            Self::ZImage(config) => Backbone::ZImage(Box::new(ZImage::new(w, config)?)),
        })
    }
}

/// The network that denoises latents.
pub enum Backbone {
    UNet(Box<UNet>),
    Sd3(Box<Sd3>),
    Flux(Box<Flux>),
    Flux2(Box<Flux2>),
    ZImage(Box<ZImage>),
}

impl Backbone {
    /// Binds the inputs that stay the same in all steps of a batch. Errors if the network needs
    /// inputs that are not given.
    pub fn bind<'a>(
        &'a self,
        cx: Forward<'a>,
        conditioning: &Conditioning,
        extra: ExtraInputs,
    ) -> TensorResult<Denoiser<'a>> {
        match self {
            Self::UNet(unet) => {
                let concat = extra
                    .concat
                    .map(|concat| concat.to_dtype(conditioning.context.dtype()))
                    .transpose()?;
                let bound = unet.with_conditioning(cx, conditioning, concat)?;
                Ok(Denoiser::UNet(bound))
            }
            Self::Sd3(network) => Ok(Denoiser::Sd3(network.with_conditioning(cx, conditioning)?)),
            Self::Flux(network) => Ok(Denoiser::Flux(network.with_conditioning(
                cx,
                conditioning,
                extra,
            )?)),
            Self::Flux2(network) => Ok(Denoiser::Flux2(network.with_conditioning(
                cx,
                conditioning,
                &extra.references,
            )?)),
            Self::ZImage(network) => Ok(Denoiser::ZImage(
                network.with_conditioning(cx, conditioning)?,
            )),
        }
    }
}

/// A backbone with all inputs of a batch but latents and timestep.
pub enum Denoiser<'a> {
    UNet(ConditionedUNet<'a>),
    Sd3(ConditionedSd3<'a>),
    Flux(ConditionedFlux<'a>),
    Flux2(ConditionedFlux2<'a>),
    ZImage(ConditionedZImage<'a>),
}

impl Denoiser<'_> {
    /// Predicts noise, velocity or whatever the network was trained for: latents [b, h, w, c] ->
    /// [b, h, w, c], in the latents' type.
    pub fn forward(&self, latents: &Tensor, timestep: f64) -> TensorResult<Tensor> {
        self.forward_cached_if(latents, timestep, None)
    }

    /// The same with the deep features of an earlier step, if `cache` holds them; else of the whole
    /// network, which fills `cache` (DeepCache: Ma et al. 2023, arXiv 2312.00858). Only U-Nets have
    /// such features.
    pub fn forward_cached(
        &self,
        latents: &Tensor,
        timestep: f64,
        cache: &mut Option<Tensor>,
    ) -> TensorResult<Tensor> {
        self.forward_cached_if(latents, timestep, Some(cache))
    }

    /// The same without these blocks. Errors for networks of which none can be left out.
    pub fn forward_without(
        &self,
        blocks: &[usize],
        latents: &Tensor,
        timestep: f64,
    ) -> TensorResult<Tensor> {
        let Self::Sd3(network) = self else {
            candle_core::bail!("no block of this network can be left out")
        };
        network
            .forward_without(blocks, &latents.to_dtype(network.dtype())?, timestep)?
            .to_dtype(latents.dtype())
    }

    fn forward_cached_if(
        &self,
        latents: &Tensor,
        timestep: f64,
        cache: Option<&mut Option<Tensor>>,
    ) -> TensorResult<Tensor> {
        let output = match self {
            Self::UNet(unet) => {
                let sample = latents.to_dtype(unet.dtype())?;
                let inputs = UNetInputs::new(&sample, timestep);
                match cache {
                    Some(cache) => unet.forward_cached(inputs, cache),
                    None => unet.forward(inputs),
                }
            }
            Self::Sd3(network) => network.forward(&latents.to_dtype(network.dtype())?, timestep),
            Self::Flux(network) => network.forward(&latents.to_dtype(network.dtype())?, timestep),
            Self::Flux2(network) => network.forward(&latents.to_dtype(network.dtype())?, timestep),
            Self::ZImage(network) => network.forward(&latents.to_dtype(network.dtype())?, timestep),
        };
        output?.to_dtype(latents.dtype())
    }
}
