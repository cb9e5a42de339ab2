//! A checkpoint: which tensors a model has, under one naming, and the configuration that goes with
//! them.
//!
//! [`Checkpoint::open`] (in `open.rs`) reads headers and JSON only and checks that all parts are
//! there; [`Weights`](crate::nn::weights::Weights) then hands tensors to the networks, one at a time.
//! This module hides where things lie: a diffusers folder, a single original file, the embedded
//! model, the parts of one in files of their own (`split`), safetensors or GGUF (`weights_file`). Foreign names are in `key_mapping` and
//! `transformers`, the configuration of single files in `infer_config`,
//! the choice of files in [`model_files`], what LoRAs change in [`lora`], learned words in
//! [`embedding`].

mod checkpoint;
pub mod config;
pub mod convert;
pub mod distillation;
pub mod embedding;
pub mod file;
pub mod file_hash;
mod gguf;
mod infer_config;
mod key_mapping;
pub mod lora;
pub mod model_files;
mod open;
mod original;
mod quantize;
mod split;
mod transformers;
mod weights_file;

pub use checkpoint::{BlockBytes, Checkpoint, Merge};
pub use open::{Origin, UPSCALERS, role};
pub use split::PartFile;

use serde_json::Value;

/// Names of model families, for people.
pub mod family_name {
    pub const SD1: &str = "Stable Diffusion 1.x";
    pub const SD2: &str = "Stable Diffusion 2.x";
    pub const SDXL: &str = "Stable Diffusion XL";
    pub const SDXL_REFINER: &str = "Stable Diffusion XL refiner";
    pub const SD3: &str = "Stable Diffusion 3";
    pub const FLUX1: &str = "FLUX.1";
    pub const FLUX2_KLEIN: &str = "FLUX.2 klein";
    pub const Z_IMAGE: &str = "Z-Image";
}

/// The files of a checkpoint's tokenizer.
pub enum TokenizerFiles {
    /// `tokenizer.json`
    Json(String),
    /// `vocab.json` and `merges.txt`
    VocabMerges { vocab: String, merges: String },
    /// none: CLIP's vocabulary is used
    Clip,
}

/// The tokenizer of a checkpoint.
pub struct TokenizerSource {
    pub files: TokenizerFiles,
    /// `tokenizer_config.json`, or empty
    pub config: Value,
}

/// The components that have weights. Text encoders may be missing, and a refiner does not need a
/// VAE.
pub const PARTS: [&str; 6] = [
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    UNET,
    TRANSFORMER,
    "vae",
];
/// The networks that denoise: a model has one of them.
pub const UNET: &str = "unet";
pub const TRANSFORMER: &str = "transformer";
/// diffusers' classes of the transformers that are drawn.
pub const SD3_CLASS: &str = "SD3Transformer2DModel";
pub const FLUX_CLASS: &str = "FluxTransformer2DModel";
pub const FLUX2_CLASS: &str = "Flux2Transformer2DModel";
pub const Z_IMAGE_CLASS: &str = "ZImageTransformer2DModel";
/// The key in the header of a single file under which `sdgen convert` keeps configurations of which its
/// tensors tell nothing, and which these are.
const OWN_CONFIGS_KEY: &str = "sdgen.configs";
const OWN_CONFIGS: [&str; 3] = ["scheduler", "pipeline", DEFAULTS];
/// The configuration with steps and guidance of the checkpoint's own, and its key in a folder's
/// model_index.json, whose readers pass over what begins like this.
pub const DEFAULTS: &str = "defaults";
const DEFAULTS_KEY: &str = "_sdgen_defaults";

/// diffusers' class of the pipeline of FLUX.1 Kontext, whose transformer is that of dev.
pub const KONTEXT_PIPELINE: &str = "FluxKontextPipeline";
/// The text encoders. A U-Net's second also projects the whole text.
pub const ENCODERS: [&str; 3] = ["text_encoder", "text_encoder_2", "text_encoder_3"];
