//! The one place that assembles a model from the arguments: the checkpoint, its VAE, what is merged
//! into it, LoRAs, embeddings and the refiner, each a path, a hub id or a short name.

use crate::pipeline::model_spec::{LoraSpec, ModelSpec};
use crate::weights::Checkpoint;
use crate::weights::embedding::Embedding;
use crate::weights::lora::Lora;
use anyhow::Result;
use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use std::ffi::OsString;

/// Which model draws, and what is added to it.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// Folder, .safetensors or .gguf file, hub id (owner/name) or short name (mini, sd15, sdxl,
    /// turbo, ...)
    #[arg(short, long, env = "SDGEN_MODEL", hide_env_values = true)]
    #[arg(value_name = "REF", help_heading = "Model")]
    pub model: Option<OsString>,
    /// The transformer, in a file of its own, in place of that of --model, or with --text-encoder and
    /// --vae
    #[arg(long, hide_short_help = true)]
    #[arg(value_name = "REF", help_heading = "Model")]
    pub diffusion_model: Option<OsString>,
    /// The text encoder of a model without one, or another one: .safetensors file, folder or hub id;
    /// once for each of several
    #[arg(long, hide_short_help = true)]
    #[arg(value_name = "REF", help_heading = "Model")]
    pub text_encoder: Vec<OsString>,
    /// Draw without T5, of models that can (Stable Diffusion 3): less memory, and it reads less of the
    /// prompt
    #[arg(long, help_heading = "Model", hide_short_help = true)]
    pub no_t5: bool,
    /// Apply a LoRA, with strength X [default: 1]; may be given again
    #[arg(long, value_name = "FILE[:X]", help_heading = "Model")]
    #[arg(value_parser = OsStringValueParser::new().try_map(LoraSpec::parse))]
    pub lora: Vec<LoraSpec>,
    /// A word that the model has learned (textual inversion), and what it is in prompts [default:
    /// the file's name]
    #[arg(long, hide_short_help = true)]
    #[arg(value_name = "FILE[:TOKEN]", help_heading = "Model")]
    pub embedding: Vec<OsString>,
    /// Another VAE: folder, .safetensors file, hub id or short name (taesd, taesdxl,
    /// taesd3, taef1, sdxl-vae-fp16-fix)
    #[arg(long, value_name = "REF", help_heading = "Model")]
    pub vae: Option<OsString>,
    /// Add a share of another model's weights as they are read: (1 - X) of the model's own and X of
    /// its
    #[arg(long, hide_short_help = true)]
    #[arg(value_name = "REF:X", help_heading = "Model")]
    pub merge: Vec<OsString>,
    /// A third model: what is merged is X of what the other has more than it
    #[arg(long, hide_short_help = true, requires = "merge")]
    #[arg(value_name = "REF", help_heading = "Model")]
    pub minus: Option<OsString>,
    /// A model that draws the last steps, such as sdxl-refiner
    #[arg(long, value_name = "REF", help_heading = "SDXL")]
    pub refiner: Option<OsString>,
    /// Never touch the network; also HF_HUB_OFFLINE=1
    #[arg(long, help_heading = "Model")]
    pub offline: bool,
}

impl ModelArgs {
    /// Whether the model is the one that is part of the program.
    pub fn is_embedded(&self) -> bool {
        let model = self.diffusion_model.as_ref().or(self.model.as_ref());
        model.is_none_or(|model| model == "mini")
    }

    /// Opens the model with everything that is added to it; `strict` refuses LoRAs that fit only in
    /// part. Downloads are shown if `shows_progress`. Errors name what cannot be found or read.
    pub fn open(&self, strict: bool, shows_progress: bool) -> Result<Checkpoint> {
        let loras = self.lora.iter().map(LoraSpec::open);
        self.open_with(loras, self.embeddings()?, strict, shows_progress)
    }

    /// Opens the model with these LoRAs and embeddings in place of the arguments'.
    pub fn open_with(
        &self,
        loras: impl IntoIterator<Item = Result<Lora>>,
        embeddings: Vec<Embedding>,
        strict: bool,
        shows_progress: bool,
    ) -> Result<Checkpoint> {
        self.spec()
            .open_with(loras, embeddings, strict, shows_progress)
    }

    /// The model as the library knows it.
    fn spec(&self) -> ModelSpec {
        let Self {
            model,
            diffusion_model,
            text_encoder,
            no_t5,
            lora,
            embedding,
            vae,
            merge,
            minus,
            refiner,
            offline,
        } = self.clone();
        ModelSpec {
            model,
            diffusion_model,
            text_encoders: text_encoder,
            no_t5,
            loras: lora,
            embeddings: embedding,
            vae,
            merges: merge,
            minus,
            refiner,
            offline,
            ..ModelSpec::default()
        }
    }

    /// Reads the embeddings.
    pub fn embeddings(&self) -> Result<Vec<Embedding>> {
        let asked = self.embedding.iter();
        asked.map(|asked| Embedding::asked(asked)).collect()
    }
}
