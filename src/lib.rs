//! `sdgen` turns a sentence into a picture: a CLIP text encoder, a latent U-Net, a sampler and a
//! VAE, from safetensors weights, on candle.
//!
//! The command line is the interface; this library is what the command, its tests and its
//! benchmarks share. Start at [`cli::draw::draw`], which tells the whole story, and go down one
//! level at a time: [`pipeline::generate`], [`sampling::sampler::sample`],
//! [`pipeline::guidance::Guided`], [`model::unet::UNet`].

pub mod alloc;
#[cfg(feature = "cli")]
pub mod batch;
#[cfg(feature = "cli")]
pub mod cli;
pub mod error;
pub mod hex;
pub mod hub;
pub mod image;
pub mod model;
pub mod nn;
pub mod pipeline;
pub mod sampling;
pub mod text;
pub mod weights;
