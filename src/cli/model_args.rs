//! The one place that assembles a model from the arguments: the checkpoint, its VAE, what is merged
//! into it, LoRAs, embeddings and the refiner, each a path, a hub id or a short name.

use crate::hub::Hub;
use crate::pipeline::family::{SHORT_NAMES, VAE_SHORT_NAMES};
use crate::weights::embedding::Embedding;
use crate::weights::lora::Lora;
use crate::weights::{Checkpoint, Merge, Origin, nearest};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// Which model draws, and what is added to it.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// Folder, .safetensors file, hub id (owner/name) or short name (mini, sd15, sdxl, turbo, lcm,
    /// ...)
    #[arg(short, long, env = "SDGEN_MODEL", hide_env_values = true)]
    #[arg(value_name = "REF", help_heading = "Model")]
    pub model: Option<OsString>,
    /// Change the model by a LoRA, by the share X [default: 1]; if given again, by each
    #[arg(long, value_name = "FILE[:X]", help_heading = "Model")]
    pub lora: Vec<LoraArg>,
    /// A word that the model has learned (textual inversion), and what it is in prompts [default:
    /// the file's name]
    #[arg(long, hide_short_help = true)]
    #[arg(value_name = "FILE[:TOKEN]", help_heading = "Model")]
    pub embedding: Vec<OsString>,
    /// Another VAE: folder, .safetensors file, hub id or short name (taesd, taesdxl,
    /// sdxl-vae-fp16-fix)
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

/// `--lora`: a file, perhaps with the strength of its change behind a colon.
#[derive(Debug, Clone)]
pub struct LoraArg {
    pub path: PathBuf,
    pub strength: f64,
}

impl From<OsString> for LoraArg {
    fn from(text: OsString) -> Self {
        let split = text
            .to_str()
            .filter(|text| !Path::new(text).exists())
            .and_then(|text| text.rsplit_once(':'));
        let strength = |text: &str| text.parse().ok().filter(|x: &f64| x.is_finite());
        match split.and_then(|(path, text)| Some((path, strength(text)?))) {
            Some((path, strength)) => Self {
                path: path.into(),
                strength,
            },
            None => Self {
                path: text.into(),
                strength: 1.0,
            },
        }
    }
}

impl ModelArgs {
    /// Opens the model with everything that is added to it; `strict` refuses LoRAs that fit only in
    /// part. Downloads are shown if `shows_progress`. Errors name what cannot be found or read.
    pub fn open(&self, strict: bool, shows_progress: bool) -> Result<Checkpoint> {
        let loras = self
            .lora
            .iter()
            .map(|lora| Lora::open(&lora.path, lora.strength));
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
        let finder = ModelFinder {
            offline: self.offline,
            shows_progress,
        };
        let mut checkpoint = finder.open(self.model.as_deref())?;
        if let Some(refiner) = &self.refiner {
            checkpoint.refiner = Some(Box::new(finder.open(Some(refiner))?));
        }
        if let Some(vae) = &self.vae {
            checkpoint.use_vae(&finder.vae(vae)?)?;
        }
        for asked in &self.merge {
            checkpoint.merge(finder.merge(asked, self.minus.as_deref())?)?;
        }
        checkpoint.use_loras(loras, strict)?;
        checkpoint.use_embeddings(embeddings)?;
        Ok(checkpoint)
    }

    /// Reads the embeddings.
    pub fn embeddings(&self) -> Result<Vec<Embedding>> {
        let asked = self.embedding.iter();
        asked.map(|asked| Embedding::asked(asked)).collect()
    }
}

/// How models are found by reference.
#[derive(Debug, Clone, Copy)]
pub struct ModelFinder {
    pub offline: bool,
    /// Whether downloads are shown on stderr.
    pub shows_progress: bool,
}

impl ModelFinder {
    /// Opens a model: the embedded one, a path, or one of the hub.
    pub fn open(self, model: Option<&OsStr>) -> Result<Checkpoint> {
        let Some(model) = model.filter(|m| *m != "mini") else {
            return Checkpoint::open(Origin::Embedded);
        };
        if model.is_empty() {
            bail!(
                "the model path is empty\n\nhint: leave `--model` (or $SDGEN_MODEL) out for the embedded model"
            );
        }
        let path = Path::new(model);
        if path.exists() {
            return Checkpoint::open(Origin::Path(path));
        }
        if let Some(id) = model.to_str().and_then(hub_id) {
            let folder = Hub::from_env(self.offline).snapshot(&id, self.shows_progress)?;
            return Checkpoint::open(Origin::Path(&folder));
        }
        if path.components().count() == 1 && path.extension().is_none() {
            bail!(not_a_model(&path.to_string_lossy()));
        }
        Checkpoint::open(Origin::Path(path))
    }

    /// The path of a VAE, fetched if it is one of the hub.
    fn vae(self, vae: &OsStr) -> Result<PathBuf> {
        let path = Path::new(vae);
        if path.exists() {
            return Ok(path.into());
        }
        if let Some(id) = vae.to_str().and_then(hub_id) {
            return Hub::from_env(self.offline).vae(&id, self.shows_progress);
        }
        let known: Vec<&str> = VAE_SHORT_NAMES.iter().map(|(short, _)| *short).collect();
        bail!(
            "there is no VAE `{}`\n\nhint: `--vae` takes a folder, a .safetensors file, a hub id (owner/name) or one of {}",
            path.display(),
            known.join(", ")
        )
    }

    /// Opens what `--merge` names as `REF:X`, and what `--minus` names.
    fn merge(self, asked: &OsStr, minus: Option<&OsStr>) -> Result<Merge> {
        let split = asked
            .to_str()
            .and_then(|text| text.rsplit_once(':'))
            .and_then(|(model, share)| Some((model, share.parse().ok()?)));
        let Some((model, share)) = split.filter(|(_, share): &(_, f64)| share.is_finite()) else {
            bail!(
                "`--merge {}` has no share\n\nhint: `--merge other.safetensors:0.3`",
                asked.display()
            );
        };
        Ok(Merge {
            other: self.open(Some(OsStr::new(model)))?,
            minus: minus.map(|minus| self.open(Some(minus))).transpose()?,
            share,
        })
    }

    /// Fetches a model from the hub and returns its folder.
    pub fn pull(self, model: &str) -> Result<PathBuf> {
        let id = hub_id(model).with_context(|| {
            format!("`{model}` is not a hub id\n\nhint: hub ids look like owner/name")
        })?;
        Hub::from_env(self.offline).snapshot(&id, self.shows_progress)
    }
}

/// The error for a word that names no model.
fn not_a_model(word: &str) -> String {
    let known = SHORT_NAMES.iter().map(|(short, _)| *short).chain(["mini"]);
    let near = nearest(word, known.clone())
        .map(|near| format!("did you mean `{near}`? "))
        .unwrap_or_default();
    let known: Vec<&str> = known.collect();
    format!(
        "`{word}` is not a file, a folder or a short name\n\nhint: {near}short names are {}; hub ids look like owner/name",
        known.join(", ")
    )
}

/// A short name's hub id, or the text itself if it looks like one: `owner/name`, perhaps with
/// `@revision` or a file.
fn hub_id(text: &str) -> Option<String> {
    let mut short_names = SHORT_NAMES.iter().chain(&VAE_SHORT_NAMES);
    if let Some((_, id)) = short_names.find(|(short, _)| *short == text) {
        return Some((*id).into());
    }
    let parts: Vec<&str> = text.split('/').collect();
    let is_word = |s: &str| {
        !s.is_empty()
            && !s.starts_with('.')
            && s.chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.@".contains(c))
    };
    let is_file = parts.len() == 2 && [".safetensors", ".ckpt"].iter().any(|e| text.ends_with(e));
    (parts.len() >= 2 && parts.iter().all(|part| is_word(part)) && !is_file).then(|| text.into())
}
