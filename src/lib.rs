//! `sdgen` turns a sentence into a picture: a CLIP text encoder, a latent U-Net, a sampler and a
//! VAE, from safetensors weights, on candle.
//!
//! The command line is the interface; this library is what the command, its tests and its
//! benchmarks share. Start at [`draw::draw`], which tells the whole story, and go down one level at
//! a time: [`pipeline::generate`], [`sampler::sample`], [`guidance::Guided`],
//! [`model::unet::UNet`].

pub mod alloc;
pub mod bench;
pub mod canvas;
pub mod check;
pub mod cli;
pub mod contexts;
pub mod device;
pub mod draw;
pub mod dynamic;
pub mod failure;
pub mod family;
pub mod ground;
pub mod guidance;
pub mod hex;
pub mod image;
pub mod input;
pub mod inspect;
pub mod interrupt;
pub mod list;
pub mod model;
pub mod nn;
pub mod noise;
pub mod output;
pub mod pipeline;
pub mod preview;
pub mod progress;
pub mod request;
pub mod sampler;
pub mod schedule;
pub mod settings;
pub mod shard;
pub mod sheet;
pub mod terminal;
pub mod text;
pub mod trace;
pub mod upscale;
pub mod weights;
