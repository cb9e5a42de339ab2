//! `sdgen` turns a sentence into a picture: text encoder, denoising network, VAE and sampler, from
//! safetensors weights, on candle.
//!
//! ```
//! use sdgen::{ModelSpec, Params, Pipeline};
//! use std::ops::ControlFlow;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let pipeline = Pipeline::load(&ModelSpec::embedded())?;
//! let frog = Params::new("a frog in a top hat").seed(7).steps(8);
//! let image = pipeline.generate(&frog, |_| ControlFlow::Continue(()))?;
//! let png = image.to_bytes(sdgen::Format::Png)?;
//! assert!(png.starts_with(b"\x89PNG"));
//! # Ok(())
//! # }
//! ```
//!
//! A [`Pipeline`] is a model that stays in memory and may be shared by threads; [`Params`] are what
//! is asked of an image; [`Event`]s tell how far it is. The `sdgen` command is built on the same
//! pipeline. Features: `cli` (the command), `hub` (models by name from the Hugging Face hub),
//! `mini` (the embedded model), all on by default; `cuda`, `cudnn` and `metal` for GPUs.
#![cfg_attr(not(feature = "internals"), deny(missing_docs))]
// Much of the library is there for the command; a build without it does not use that.
#![cfg_attr(not(feature = "cli"), allow(dead_code, unused_imports))]

// Modules are private. The crate's own tests and benchmarks see them by the feature `internals`.
#[cfg(feature = "internals")]
pub mod alloc;
#[cfg(not(feature = "internals"))]
mod alloc;
#[cfg(all(feature = "cli", feature = "internals"))]
pub mod batch;
#[cfg(all(feature = "cli", not(feature = "internals")))]
mod batch;
#[cfg(all(feature = "cli", feature = "internals"))]
pub mod cli;
#[cfg(all(feature = "cli", not(feature = "internals")))]
mod cli;
#[cfg(feature = "internals")]
pub mod error;
#[cfg(not(feature = "internals"))]
mod error;
#[cfg(feature = "internals")]
pub mod hex;
#[cfg(not(feature = "internals"))]
mod hex;
#[cfg(feature = "internals")]
pub mod hub;
#[cfg(not(feature = "internals"))]
mod hub;
#[cfg(feature = "internals")]
pub mod image;
#[cfg(not(feature = "internals"))]
mod image;
#[cfg(feature = "internals")]
pub mod model;
#[cfg(not(feature = "internals"))]
mod model;
#[cfg(feature = "internals")]
pub mod nn;
#[cfg(not(feature = "internals"))]
mod nn;
#[cfg(feature = "internals")]
pub mod pipeline;
#[cfg(not(feature = "internals"))]
mod pipeline;
#[cfg(feature = "internals")]
pub mod sampling;
#[cfg(not(feature = "internals"))]
mod sampling;
#[cfg(feature = "internals")]
pub mod suggest;
#[cfg(not(feature = "internals"))]
mod suggest;
#[cfg(feature = "internals")]
pub mod text;
#[cfg(not(feature = "internals"))]
mod text;
#[cfg(feature = "internals")]
pub mod weights;
#[cfg(not(feature = "internals"))]
mod weights;

pub use crate::error::{Error, ErrorKind};
pub use crate::image::{Format, Image};
pub use crate::nn::device::{DTypeChoice, DeviceChoice};
pub use crate::pipeline::Pipeline;
pub use crate::pipeline::event::{Event, Preview};
pub use crate::pipeline::model_spec::{LoraSpec, ModelSpec};
pub use crate::pipeline::options::VaeTiling;
pub use crate::pipeline::resolve::Params;
pub use crate::sampling::{Prediction, Sampler, Schedule};

#[doc(hidden)]
pub use crate::alloc::Reuse;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub use crate::cli::main;
