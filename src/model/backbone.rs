//! The network that denoises latents, of whichever architecture, as the pipeline sees it.

use super::unet::{ConditionedUNet, UNet, UNetInputs};
use super::unet_config::UNetConfig;
use crate::nn::Forward;
use crate::nn::weights::Weights;
use anyhow::Result;
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
}

/// The prompts of a batch as a network takes them.
#[derive(Clone)]
pub struct Conditioning {
    /// prompt embeddings [b, n, d]
    pub context: Tensor,
    /// for networks with [`BackboneConfig::time_ids`]
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
            added_cond: None,
            guidance: None,
        }
    }
}

impl Conditioning {
    /// Concatenates two along the batch. The guidance scale is the first one's.
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
}

/// The configuration of a backbone.
#[derive(Debug, Clone)]
pub enum BackboneConfig {
    UNet(UNetConfig),
}

impl BackboneConfig {
    /// Parses config.json. A value that would change the result and is not supported is an error
    /// that names it.
    pub fn from_json(value: &Value) -> Result<Self> {
        UNetConfig::from_json(value).map(Self::UNet)
    }

    /// The task of the network, by its number of input channels. Errors if no kind of
    /// model has that many.
    pub fn kind(&self) -> Result<ModelKind> {
        let Self::UNet(config) = self;
        config.kind()
    }

    /// Height and width of the latents that the model was trained on.
    pub fn sample_size(&self) -> Result<(usize, usize)> {
        let Self::UNet(config) = self;
        config.sample_size()
    }

    /// Channels of the network's input.
    pub fn in_channels(&self) -> usize {
        let Self::UNet(config) = self;
        config.in_channels
    }

    /// Channels of the latents.
    pub fn latent_channels(&self) -> usize {
        let Self::UNet(config) = self;
        config.out_channels
    }

    /// The number of time ids (sizes and crops) that the network takes with pooled prompt
    /// embeddings of width `pooled`, if there are any; 0 if it takes neither. Errors if its widths do
    /// not add up.
    pub fn time_ids(&self, pooled: Option<usize>) -> Result<usize> {
        let Self::UNet(config) = self;
        config.time_ids(pooled)
    }

    /// Whether the network was distilled with the guidance scale as an input.
    pub fn embeds_guidance(&self) -> bool {
        let Self::UNet(config) = self;
        config.time_cond_proj_dim.is_some()
    }

    /// A rough estimate of the memory of the activations of `batch` latents [h, w], in bytes.
    pub fn activation_bytes(&self, batch: usize, h: usize, w: usize) -> u64 {
        let Self::UNet(config) = self;
        config.activation_bytes(batch, h, w)
    }

    /// Reads the network at `w`.
    pub fn build(&self, w: &Weights) -> Result<Backbone> {
        let Self::UNet(config) = self;
        Ok(Backbone::UNet(Box::new(UNet::new(w, config)?)))
    }
}

/// The network that denoises latents.
pub enum Backbone {
    UNet(Box<UNet>),
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
        let Self::UNet(unet) = self;
        let concat = extra
            .concat
            .map(|concat| concat.to_dtype(conditioning.context.dtype()))
            .transpose()?;
        Ok(Denoiser::UNet(unet.with_conditioning(
            cx,
            conditioning,
            concat,
        )?))
    }
}

/// A backbone with all inputs of a batch but latents and timestep.
pub enum Denoiser<'a> {
    UNet(ConditionedUNet<'a>),
}

impl Denoiser<'_> {
    /// Predicts noise, velocity or whatever the network was trained for: latents [b, h, w, c] ->
    /// [b, h, w, c], in the latents' type.
    pub fn forward(&self, latents: &Tensor, timestep: f64) -> TensorResult<Tensor> {
        let Self::UNet(unet) = self;
        let sample = latents.to_dtype(unet.dtype())?;
        unet.forward(UNetInputs::new(&sample, timestep))?
            .to_dtype(latents.dtype())
    }

    /// The same with the deep features of an earlier step, if `cache` holds them; else of the whole
    /// network, which fills `cache` (DeepCache: Ma et al. 2023, arXiv 2312.00858).
    pub fn forward_cached(
        &self,
        latents: &Tensor,
        timestep: f64,
        cache: &mut Option<Tensor>,
    ) -> TensorResult<Tensor> {
        let Self::UNet(unet) = self;
        let sample = latents.to_dtype(unet.dtype())?;
        unet.forward_cached(UNetInputs::new(&sample, timestep), cache)?
            .to_dtype(latents.dtype())
    }
}
