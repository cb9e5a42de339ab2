//! The networks of a pipeline: read when they are needed first, shared by all that need them.

use super::config::{ModelConfig, PipelineConfig};
use super::event::Events;
use crate::error::ModelError;
use crate::model::{Backbone, Decoder, Encoder};
use crate::nn::device::Compute;
use crate::nn::weights::SharedSource;
use crate::text::encoder::PromptEncoder;
use crate::weights::Checkpoint;
use anyhow::{Context, Result};
use candle_core::DType;
use std::sync::{Arc, Mutex, PoisonError};

/// A network that may be in memory.
pub struct Slot<T>(Mutex<Option<Arc<T>>>);

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Slot<T> {
    /// Returns the network, which is read first if it is not there. While one thread reads it,
    /// others wait. Errors if it cannot be read.
    fn get_or_read(&self, read: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*slot {
            Some(network) => Ok(network.clone()),
            None => {
                let network = Arc::new(read().context(ModelError)?);
                *slot = Some(network.clone());
                Ok(network)
            }
        }
    }

    /// Frees the network as soon as nobody uses it any more.
    pub fn free(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// A denoising network with its text encoders.
#[derive(Default)]
pub struct ModelNetworks {
    pub text_encoder: Slot<PromptEncoder>,
    pub backbone: Slot<Backbone>,
}

impl ModelNetworks {
    /// Returns the text encoders.
    pub fn text_encoder(
        &self,
        model: &Model,
        compute: &Compute,
        events: &Events,
    ) -> Result<Arc<PromptEncoder>> {
        self.text_encoder.get_or_read(|| {
            events.stage("encoding the prompt");
            let again = model.again.clone();
            PromptEncoder::new(model.checkpoint, &model.config.encoder, compute, again)
        })
    }

    /// Returns the denoising network.
    pub fn backbone(
        &self,
        model: &Model,
        compute: &Compute,
        events: &Events,
    ) -> Result<Arc<Backbone>> {
        self.backbone.get_or_read(|| {
            events.stage(&format!("reading the {}", model.config.backbone.noun()));
            let to = (&compute.device, compute.dtype);
            model
                .checkpoint
                .read_network(model.checkpoint.denoiser(), &[], to, |w| {
                    let w = w.reading_again(model.again.clone());
                    let w = w.with_int8(compute.int8);
                    model.config.backbone.build(&w)
                })
        })
    }
}

/// A checkpoint that holds a denoising network, its configuration, and its networks.
#[derive(Clone)]
pub struct Model<'a> {
    pub checkpoint: &'a Checkpoint,
    /// where blocks are read each time that they are needed, if they are
    pub again: Option<SharedSource>,
    pub config: &'a ModelConfig,
    pub networks: &'a ModelNetworks,
}

/// All networks of a pipeline.
#[derive(Default)]
pub struct Networks {
    pub base: ModelNetworks,
    pub refiner: ModelNetworks,
    pub vae_encoder: Slot<Encoder>,
    pub vae_decoder: Slot<Decoder>,
}

impl Networks {
    /// Returns the encoder of the VAE.
    pub fn vae_encoder(
        &self,
        checkpoint: &Checkpoint,
        config: &PipelineConfig,
        compute: &Compute,
        events: &Events,
    ) -> Result<Arc<Encoder>> {
        self.vae_encoder.get_or_read(|| {
            events.stage("encoding the picture");
            let (parts, to) = (
                ["encoder.", "quant_conv.", "bn."],
                (&compute.device, DType::F32),
            );
            checkpoint.read_network("vae", &parts, to, |w| config.vae.encoder(w))
        })
    }

    /// Returns the decoder of the VAE.
    pub fn vae_decoder(
        &self,
        checkpoint: &Checkpoint,
        config: &PipelineConfig,
        compute: &Compute,
        events: &Events,
    ) -> Result<Arc<Decoder>> {
        self.vae_decoder.get_or_read(|| {
            events.stage("reading the VAE");
            let (parts, to) = (
                ["decoder.", "post_quant_conv.", "bn."],
                (&compute.device, DType::F32),
            );
            checkpoint.read_network("vae", &parts, to, |w| config.vae.decoder(w))
        })
    }
}
