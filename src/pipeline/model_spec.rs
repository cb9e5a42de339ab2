//! Which model a pipeline is made of, and where its parts are found.

use super::family::{SHORT_NAMES, VAE_SHORT_NAMES};
use super::options::{VaeTiling, finite, split_value};
use super::{Pipeline, PipelineOptions};
use crate::error::{Error, ErrorKind, WrongArgument};
use crate::hub::{Hub, Wanted};
use crate::nn::device::{Compute, DTypeChoice, DeviceChoice};
use crate::sampling::Prediction;
use crate::suggest::nearest;
use crate::weights::embedding::Embedding;
use crate::weights::file;
use crate::weights::lora::Lora;
use crate::weights::{Checkpoint, Merge, Origin};
use anyhow::{Context, Result, bail};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// Which model to load, on which device, and what is added to it.
///
/// Models are named as on the command line: a folder of diffusers or ComfyUI, a `.safetensors` file, an id of the
/// Hugging Face hub (`owner/name`), or a short name such as `sd15` or `sdxl`.
///
/// ```no_run
/// # fn main() -> Result<(), sdgen::Error> {
/// let spec = sdgen::ModelSpec::new("sd15").lora("watercolour.safetensors", 0.8);
/// let pipeline = sdgen::Pipeline::load(&spec)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ModelSpec {
    /// the model; none for the embedded one
    pub model: Option<OsString>,
    /// the network that denoises, in a file of its own, in place of that of the model, if one is
    /// named, which gives the other parts
    pub diffusion_model: Option<OsString>,
    /// text encoders in place of its own, or for a model that has none
    pub text_encoders: Vec<OsString>,
    /// whether T5 is left out of a model that draws without it too
    pub no_t5: bool,
    /// LoRAs that change its weights as they are read
    pub loras: Vec<LoraSpec>,
    /// words learned by textual inversion, as `FILE[:TOKEN]`
    pub embeddings: Vec<OsString>,
    /// a VAE in place of its own
    pub vae: Option<OsString>,
    /// models of whose weights a fraction is added, as `REF:FRACTION`
    pub merges: Vec<OsString>,
    /// the model whose weights are taken away from those of `merges`
    pub minus: Option<OsString>,
    /// the model that finishes the latents
    pub refiner: Option<OsString>,
    /// whether the network is never touched
    pub offline: bool,
    /// where networks run
    pub device: DeviceChoice,
    /// the type of weights, and on a GPU of the arithmetic
    pub dtype: DTypeChoice,
    /// what the network predicts; none: what the checkpoint says
    pub prediction: Option<Prediction>,
    /// whether the VAE decodes in tiles
    pub vae_tiling: VaeTiling,
}

/// A LoRA and its strength.
#[derive(Debug, Clone)]
pub struct LoraSpec {
    /// its `.safetensors` file
    pub path: PathBuf,
    /// how much of its change is made; negative for the opposite
    pub strength: f64,
    /// the same for text encoders
    pub text_strength: f64,
}

impl LoraSpec {
    /// Opens the file. Errors if it is not a LoRA.
    pub fn open(&self) -> Result<Lora> {
        Ok(Lora::open(&self.path, self.strength)?.with_text_strength(self.text_strength))
    }
}

impl LoraSpec {
    /// Reads `FILE[:STRENGTH]`. Errors if what stands behind a file's name, or a number, is no
    /// strength.
    pub(crate) fn parse(text: OsString) -> Result<Self, String> {
        let (path, strength) = split_value(&text, |name| Path::new(name).exists(), finite)?;
        let strength = strength.unwrap_or(1.0);
        Ok(Self {
            path: path.into(),
            strength,
            text_strength: strength,
        })
    }
}

impl ModelSpec {
    /// The embedded model, which needs no file.
    pub fn embedded() -> Self {
        Self::default()
    }

    /// The model of this name: a folder, a file, a hub id or a short name.
    pub fn new(model: impl Into<OsString>) -> Self {
        Self {
            model: Some(model.into()),
            ..Self::default()
        }
    }

    /// Adds a LoRA, with a strength of which 1 is its whole change.
    pub fn lora(mut self, path: impl Into<PathBuf>, strength: f64) -> Self {
        self.loras.push(LoraSpec {
            path: path.into(),
            strength,
            text_strength: strength,
        });
        self
    }

    /// Decodes with another VAE.
    pub fn vae(self, vae: impl Into<OsString>) -> Self {
        Self {
            vae: Some(vae.into()),
            ..self
        }
    }

    /// Has another model draw the last steps.
    pub fn refiner(self, refiner: impl Into<OsString>) -> Self {
        Self {
            refiner: Some(refiner.into()),
            ..self
        }
    }

    /// Runs on this device.
    pub fn device(self, device: DeviceChoice) -> Self {
        Self { device, ..self }
    }

    /// Keeps weights in this type.
    pub fn dtype(self, dtype: DTypeChoice) -> Self {
        Self { dtype, ..self }
    }

    /// Opens the model with these LoRAs and embeddings in place of its own. `strict` refuses LoRAs
    /// that fit only in part; downloads are shown on stderr if `shows_progress`.
    pub(crate) fn open_with(
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
        let mut checkpoint = match (&self.model, &self.diffusion_model) {
            (Some(model), Some(transformer)) => {
                let mut checkpoint = finder.open(Some(model))?;
                checkpoint.use_transformer(finder.open(Some(transformer))?)?;
                checkpoint
            }
            (model, transformer) => finder.open(transformer.as_deref().or(model.as_deref()))?,
        };
        let encoders = self.text_encoders.iter();
        let encoders = encoders.map(|encoder| finder.text_encoder(encoder));
        let encoders: Vec<PathBuf> = encoders.collect::<Result<_>>()?;
        if !encoders.is_empty() {
            checkpoint.use_text_encoders(&encoders)?;
        }
        if self.no_t5 {
            checkpoint.leave_out_t5()?;
        }
        if let Some(refiner) = &self.refiner {
            checkpoint.use_refiner(finder.open(Some(refiner))?);
        }
        if let Some(vae) = &self.vae {
            checkpoint.use_vae(&finder.vae(vae)?)?;
        }
        finder.complete(&mut checkpoint)?;
        for asked in &self.merges {
            checkpoint.merge(finder.merge(asked, self.minus.as_deref())?)?;
        }
        checkpoint.use_loras(loras, strict)?;
        checkpoint.use_embeddings(embeddings)?;
        Ok(checkpoint)
    }

    fn open(&self) -> Result<Checkpoint> {
        let loras = self.loras.iter().map(LoraSpec::open);
        let embeddings = self.embeddings.iter().map(|asked| Embedding::asked(asked));
        self.open_with(loras, embeddings.collect::<Result<_>>()?, false, false)
    }
}

impl Pipeline {
    /// Finds a model, which is fetched if it is one of the hub and not in the cache yet, and reads
    /// its headers; weights are read when the first image needs them.
    ///
    /// Errors if the model is missing, damaged or of a family that is not supported, or if the
    /// device is not there.
    pub fn load(spec: &ModelSpec) -> Result<Self, Error> {
        let compute = Compute::choose(spec.device, spec.dtype)
            .map_err(|error| Error::new(ErrorKind::Params, error))?;
        let options = PipelineOptions {
            prediction: spec.prediction,
            vae_tiling: spec.vae_tiling,
        };
        let checkpoint = spec
            .open()
            .and_then(|model| Self::new(model, compute, options));
        checkpoint.map_err(|error| Error::new(ErrorKind::Model, error))
    }
}

/// Finds models by reference: the embedded one, a path, a hub id or a short name.
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
        if !file::is_absent(path) {
            return Checkpoint::open(Origin::Path(path));
        }
        if let Some(id) = model.to_str().and_then(hub_id) {
            let folder = Hub::from_env(self.offline).snapshot(&id, self.shows_progress)?;
            return Checkpoint::open(Origin::Path(&folder));
        }
        let is_word = path.components().count() == 1;
        let name = path.to_string_lossy();
        if is_word && (path.extension().is_none() || short_name_near(&name).is_some()) {
            bail!(not_a_model(&name));
        }
        Checkpoint::open(Origin::Path(path))
    }

    /// Fetches the tokenizer of a text encoder whose file has none and lies beside none. Only this
    /// is fetched.
    fn complete(self, checkpoint: &mut Checkpoint) -> Result<()> {
        let complete = checkpoint.require_text_encoder().is_ok();
        if let Some(repo) = checkpoint.wants_tokenizer_of().filter(|_| complete) {
            checkpoint.use_tokenizer(&self.part(repo, Wanted::Tokenizer)?)?;
        }
        Ok(())
    }

    fn part(self, id: &str, wanted: Wanted) -> Result<PathBuf> {
        Hub::from_env(self.offline).part(id, wanted, self.shows_progress)
    }

    /// The path of a text encoder, fetched with its tokenizer if it is one of the hub.
    fn text_encoder(self, encoder: &OsStr) -> Result<PathBuf> {
        let path = Path::new(encoder);
        if !file::is_absent(path) {
            return Ok(path.into());
        }
        if let Some(id) = encoder.to_str().and_then(hub_id) {
            return self.part(&id, Wanted::TextEncoder);
        }
        bail!(
            "there is no text encoder `{}`\n\nhint: `--text-encoder` takes a .safetensors file, a folder, or a hub id (owner/name), of which no other part is fetched",
            path.display()
        )
    }

    /// The path of a VAE, fetched if it is one of the hub.
    fn vae(self, vae: &OsStr) -> Result<PathBuf> {
        let path = Path::new(vae);
        if !file::is_absent(path) {
            return Ok(path.into());
        }
        if let Some(id) = vae.to_str().and_then(hub_id) {
            return self.part(&id, Wanted::Vae);
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
        let is_model = |name: &str| Path::new(name).exists() || name == "mini";
        let (model, share) = split_value(asked, is_model, finite)
            .and_then(|(model, share)| Ok((model, share.ok_or("it has no share")?)))
            .map_err(|why| WrongArgument(format!("`--merge {}`: {why}\n\nhint: `--merge other.safetensors:0.3` takes three tenths of it", asked.display())))?;
        Ok(Merge {
            other: self.open(Some(&model))?,
            minus: minus.map(|minus| self.open(Some(minus))).transpose()?,
            weight: share,
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

/// What is said of a word that names no model.
fn not_a_model(word: &str) -> String {
    let known: Vec<&str> = SHORT_NAMES
        .iter()
        .map(|(short, _)| *short)
        .chain(["mini"])
        .collect();
    let near = short_name_near(word)
        .map(|near| format!("did you mean `{near}`? "))
        .unwrap_or_default();
    format!(
        "`{word}` is not a file, a folder or a short name\n\nhint: {near}short names are {}; hub ids look like owner/name",
        known.join(", ")
    )
}

/// The short name that was meant: by another spelling, by the name that its repository has on the
/// hub, or by a name that is nearly one.
fn short_name_near(word: &str) -> Option<&'static str> {
    let plain = |name: &str| name.to_lowercase().replace(['-', '_', '.', ' '], "");
    let word = plain(word);
    let abbreviated = word
        .strip_prefix("stablediffusion")
        .map(|rest| format!("sd{}", rest.trim_start_matches('v')));
    let is_it = |name: &str| {
        let name = plain(name);
        name == word || abbreviated.as_ref() == Some(&name)
    };
    let spelled = SHORT_NAMES
        .iter()
        .find(|(short, id)| is_it(short) || id.rsplit('/').next().is_some_and(is_it));
    let short_names = SHORT_NAMES.iter().map(|(short, _)| *short);
    spelled
        .map(|(short, _)| *short)
        .or_else(|| nearest(&word, short_names.chain(["mini"])))
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
    let is_file = parts.len() == 2
        && [".safetensors", ".gguf", ".ckpt"]
            .iter()
            .any(|e| text.ends_with(e));
    (parts.len() >= 2 && parts.iter().all(|part| is_word(part)) && !is_file).then(|| text.into())
}
