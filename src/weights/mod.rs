//! A checkpoint: which tensors a model has, under one naming, and the configuration that goes with
//! them.
//!
//! [`Checkpoint::open`] reads headers and JSON only and checks that all parts are there;
//! [`Weights`] then hands tensors to the networks, one at a time. It hides where things lie: a
//! diffusers folder, a single original file, the embedded model. Foreign names are in [`names`],
//! the shapes-to-configuration guess of single files in [`guess`], the hub in [`hub`], what LoRAs
//! change in [`lora`], words that it has learned in [`embedding`].

pub mod embedding;
mod infer_config;
mod key_mapping;
pub mod lora;
mod safetensors;

use crate::hex::hex;
use crate::nn::Backend;
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use embedding::Embedding;
use key_mapping::{Layout, Named, Part};
use lora::{Known, Lora};
use safetensors::Source;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

pub use key_mapping::nearest;

/// Marks an error as the model's fault, whose exit code it decides: a setting or a weight that
/// cannot be used.
#[derive(Debug)]
pub struct ModelError;

impl std::fmt::Display for ModelError {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("this model cannot be used")
    }
}

/// The model inside the program.
static MINI: &[u8] = include_bytes!("../../assets/mini.safetensors");

/// The tokenizer's files as a checkpoint holds them.
pub enum TokenizerFiles {
    /// `tokenizer.json`
    Json(String),
    /// `vocab.json` and `merges.txt`
    VocabMerges { vocab: String, merges: String },
    /// none of its own: CLIP's vocabulary
    Clip,
}

/// A tokenizer as a checkpoint holds it.
pub struct TokenizerSource {
    pub files: TokenizerFiles,
    /// `tokenizer_config.json`, empty if there is none
    pub config: Value,
}

/// Where a checkpoint's bytes come from.
pub enum Origin<'a> {
    Embedded,
    Path(&'a Path),
}

struct Entry {
    source: usize,
    key: String,
    part: Part,
    /// of the stored tensor's part, in elements
    shape: Vec<usize>,
    dtype: String,
}

/// A checkpoint whose headers have been read.
pub struct Checkpoint {
    /// for people and file names: the folder's or file's name
    pub name: String,
    /// component -> its configuration, in diffusers' words; `pipeline` is `model_index.json`
    pub configs: BTreeMap<String, Value>,
    /// by the text encoder that reads its tokens
    pub tokenizers: BTreeMap<&'static str, TokenizerSource>,
    /// keys that belong to no component
    pub ignored: Vec<String>,
    /// what had to be assumed because no configuration says it
    pub assumed: Vec<String>,
    /// an assumption that is wrong for some known models
    pub doubt: Option<String>,
    /// what finishes pictures that this one begins
    pub refiner: Option<Box<Self>>,
    /// decodes in place of its own VAE
    pub vae: Option<Box<Self>>,
    /// what is added to its weights as they are read
    pub merges: Vec<Merge>,
    /// what changes its weights as they are read
    pub loras: Vec<Lora>,
    /// words beyond its vocabulary
    pub embeddings: Vec<Embedding>,
    sources: Vec<Source>,
    entries: BTreeMap<String, Entry>,
}

/// Another checkpoint's share of the weights: `share` times what it has more than `minus`, or than
/// the first one.
pub struct Merge {
    pub other: Checkpoint,
    pub minus: Option<Checkpoint>,
    pub share: f64,
}

/// The parts that hold weights. The first or the second encoder may be missing, and a refiner needs
/// no VAE.
pub const PARTS: [&str; 4] = ["text_encoder", "text_encoder_2", "unet", "vae"];
/// The parts that read a prompt; the second projects it too.
pub const ENCODERS: [&str; 2] = ["text_encoder", "text_encoder_2"];

/// What can be used to enlarge pictures.
pub const UPSCALERS: &str = "ESRGAN, Real-ESRGAN and its compact networks (RRDBNet, SRVGGNetCompact) can be used, from .safetensors files";

/// Keys of single files of families that are not drawn: SD3's and Flux' transformers.
const OTHER_FAMILIES: [&str; 2] = [
    "model.diffusion_model.joint_blocks.",
    "model.diffusion_model.double_blocks.",
];

impl Checkpoint {
    /// Opens a folder, a file or the embedded model; reads headers and configuration only.
    /// Errors say what is missing or damaged, and what to do.
    pub fn open(origin: Origin) -> Result<Self> {
        let checkpoint = match origin {
            Origin::Embedded => {
                Self::canonical("mini".into(), Source::embedded("the embedded model", MINI)?)?
            }
            Origin::Path(path) if path.is_dir() => Self::folder(path)?,
            Origin::Path(path) if path.exists() => Self::file(path)?,
            Origin::Path(path) => bail!(
                "`{}` does not exist\n\nhint: pass a diffusers folder, a .safetensors file, a hub id (owner/name) or a short name with `--model`",
                path.display()
            ),
        };
        Ok(checkpoint)
    }

    fn empty(name: String) -> Self {
        Self {
            name,
            configs: BTreeMap::new(),
            tokenizers: BTreeMap::new(),
            ignored: vec![],
            assumed: vec![],
            doubt: None,
            refiner: None,
            vae: None,
            merges: vec![],
            loras: vec![],
            embeddings: vec![],
            sources: vec![],
            entries: BTreeMap::new(),
        }
    }

    fn folder(path: &Path) -> Result<Self> {
        let index_path = path.join("model_index.json");
        if !index_path.exists() {
            let files: Vec<PathBuf> = std::fs::read_dir(path)
                .with_context(|| format!("cannot read folder `{}`", path.display()))?
                .filter_map(|e| Some(e.ok()?.path()))
                .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
                .collect();
            return match files.as_slice() {
                [one] => Self::file(one),
                [] => bail!(
                    "`{}` has no model_index.json and no .safetensors file\n\nhint: pass the folder of a diffusers model, or one .safetensors file",
                    path.display()
                ),
                many => bail!(
                    "`{}` has {} .safetensors files and no model_index.json\n\nhint: name one, for example `--model {}`",
                    path.display(),
                    many.len(),
                    many.first()
                        .map(|p| p.display().to_string())
                        .unwrap_or_default()
                ),
            };
        }
        let index = read_json(&index_path)?;
        let mut checkpoint = Self::empty(folder_name(path));
        let listed = |part: &str| {
            index
                .get(part)
                .is_some_and(|v| v.get(0).is_some_and(|v| !v.is_null()))
        };
        let joint = listed(ENCODERS[1]);
        let needed = |part: &str| match part {
            "text_encoder" | "tokenizer" | "vae" => listed(part) || !joint,
            "text_encoder_2" | "tokenizer_2" => joint,
            _ => true,
        };
        for part in PARTS
            .into_iter()
            .chain(["scheduler", "tokenizer", "tokenizer_2"])
            .filter(|part| needed(part))
        {
            if !path.join(part).is_dir() {
                let listed = listed(part);
                let also = if listed {
                    ", though model_index.json lists it"
                } else {
                    ""
                };
                bail!(
                    "`{}` has no folder `{part}`{also}\n\nhint: fetch the whole model again, for example with `sdgen pull`",
                    path.display()
                );
            }
        }
        for part in PARTS.into_iter().filter(|part| needed(part)) {
            let folder = path.join(part);
            checkpoint
                .configs
                .insert(part.into(), read_json(&folder.join("config.json"))?);
            for file in weight_files(&folder)? {
                checkpoint.add_source(Source::open(&file)?, |key| {
                    key_mapping::from_diffusers(part, key)
                })?;
            }
        }
        checkpoint.configs.insert(
            "scheduler".into(),
            read_json(&path.join("scheduler/scheduler_config.json"))?,
        );
        for (encoder, folder) in ENCODERS
            .into_iter()
            .zip(["tokenizer", "tokenizer_2"])
            .filter(|(_, folder)| needed(folder))
        {
            checkpoint
                .tokenizers
                .insert(encoder, tokenizer(&path.join(folder))?);
        }
        checkpoint.configs.insert("pipeline".into(), index);
        Ok(checkpoint)
    }

    fn file(path: &Path) -> Result<Self> {
        let source = Source::open(path)?;
        let name = path
            .file_stem()
            .map(|s| s.to_string_lossy().into_owned())
            .unwrap_or_default();
        let keys: Vec<String> = source.tensors().map(|(k, ..)| k).collect();
        match key_mapping::layout(keys.iter().map(String::as_str)) {
            Layout::Original
                if keys
                    .iter()
                    .any(|k| OTHER_FAMILIES.iter().any(|p| k.starts_with(p))) =>
            {
                bail!("{}", unknown(path, &keys))
            }
            Layout::Original => {
                let mut checkpoint = Self::empty(name);
                let map = key_mapping::from_original(keys.iter().map(String::as_str));
                let extra = infer_config::Extra::of(&source, &keys);
                checkpoint.add_source(source, |key| map.get(key).cloned().unwrap_or_default())?;
                checkpoint.require_parts(path)?;
                infer_config::configure(&mut checkpoint, extra)?;
                Ok(checkpoint)
            }
            Layout::Canonical => Self::canonical(name, source),
            Layout::Adapter => bail!(
                "`{}` is a LoRA, no model: it only changes one\n\nhint: pass a whole checkpoint with `--model`, and this with `--lora {0}`",
                path.display()
            ),
            Layout::Unknown => bail!("{}", unknown(path, &keys)),
        }
    }

    /// A file that brings its configuration and tokenizer in its header.
    fn canonical(name: String, source: Source) -> Result<Self> {
        let path = source.path().to_path_buf();
        let mut checkpoint = Self::empty(name);
        let text = |key: &str| {
            source.metadata(key).with_context(|| {
                format!("`{}` has no `{key}` in its header\n\nhint: pass a diffusers folder or an original single file", path.display())
            })
        };
        let configs: BTreeMap<String, Value> = serde_json::from_str(text("sdgen.configs")?)
            .context("the embedded configuration is damaged")?;
        let files = TokenizerFiles::VocabMerges {
            vocab: text("sdgen.vocab")?.into(),
            merges: text("sdgen.merges")?.into(),
        };
        let config = configs.get("tokenizer").cloned().unwrap_or_default();
        checkpoint
            .tokenizers
            .insert(ENCODERS[0], TokenizerSource { files, config });
        checkpoint.configs = configs;
        checkpoint.add_source(source, |key| {
            vec![Named {
                name: key.into(),
                part: Part::Whole,
            }]
        })?;
        checkpoint.require_parts(&path)?;
        Ok(checkpoint)
    }

    /// Decodes with another VAE: a folder with its config.json, a model's folder, or one
    /// .safetensors file, which brings no scaling and shift factor and takes this model's. Errors if there is
    /// none at `path`, or one for other latents.
    pub fn use_vae(&mut self, path: &Path) -> Result<()> {
        let own = self.configs.get("vae").filter(|own| {
            own.get("_class_name")
                .is_none_or(|class| class != "AutoencoderTiny")
        });
        let scale = own.and_then(|own| own.get("scaling_factor")?.as_f64());
        let shift = own.and_then(|own| own.get("shift_factor").cloned());
        let vae = Self::open_vae(path, scale.unwrap_or_else(|| infer_config::vae_scale(self)))?;
        let channels =
            |config: &Value, key: &str| config.get(key).and_then(Value::as_u64).unwrap_or(4);
        let mut config = vae.config("vae")?.clone();
        let is_tiny = config["_class_name"] == "AutoencoderTiny";
        if let (true, false, Some(config), Some(shift)) =
            (path.is_file(), is_tiny, config.as_object_mut(), shift)
        {
            config.insert("shift_factor".into(), shift);
        }
        let (decodes, draws) = (
            channels(&config, "latent_channels"),
            channels(self.config("unet")?, "out_channels"),
        );
        if decodes != draws {
            bail!(
                "`{}` decodes {decodes} channels, `{}` draws in {draws}\n\nhint: a VAE goes with the family it was made for",
                vae.name,
                self.name
            );
        }
        self.configs.insert("vae".into(), config);
        self.vae = Some(Box::new(vae));
        Ok(())
    }

    fn open_vae(path: &Path, scaling_factor: f64) -> Result<Self> {
        let shown = path.display();
        if path.is_dir() {
            let nested = path.join("vae");
            let folder = if path.join("config.json").exists() {
                path
            } else {
                &nested
            };
            let whole = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
            let model = whole.parent().filter(|_| whole.ends_with("vae"));
            let mut vae = Self::empty(folder_name(model.unwrap_or(&whole)));
            let config = read_json(&folder.join("config.json")).with_context(|| {
                format!("`{shown}` is no VAE\n\nhint: pass the folder that holds its config.json")
            })?;
            vae.configs.insert("vae".into(), config);
            for file in weight_files(folder)? {
                vae.add_source(Source::open(&file)?, |key| {
                    key_mapping::from_diffusers("vae", key)
                })?;
            }
            return Ok(vae);
        }
        let source = Source::open(path)?;
        let mut vae = Self::empty(
            path.file_stem()
                .map(|s| s.to_string_lossy().into_owned())
                .unwrap_or_default(),
        );
        let keys: Vec<String> = source.tensors().map(|(k, ..)| k).collect();
        let map = key_mapping::from_vae(keys.iter().map(String::as_str));
        vae.add_source(source, |key| map.get(key).cloned().unwrap_or_default())?;
        let config = infer_config::autoencoder(&vae, scaling_factor)
            .with_context(|| format!("`{shown}` is no VAE that sdgen knows"))?;
        vae.configs.insert("vae".into(), config);
        Ok(vae)
    }

    /// Opens a network that enlarges pictures: one .safetensors file. Errors say what it is if it
    /// is none.
    pub fn open_upscaler(path: &Path) -> Result<Self> {
        let source = Source::open(path)?;
        let mut upscaler = Self::empty(
            path.file_stem()
                .map(|s| s.to_string_lossy().into_owned())
                .unwrap_or_default(),
        );
        let keys: Vec<String> = source.tensors().map(|(k, ..)| k).collect();
        let map = key_mapping::from_upscaler(keys.iter().map(String::as_str));
        upscaler.add_source(source, |key| map.get(key).cloned().unwrap_or_default())?;
        let averaged = keys.iter().any(|key| key.starts_with("params_ema."));
        let odd = upscaler
            .ignored
            .iter()
            .find(|key| !averaged || !key.starts_with("params."));
        if let (Some(odd), _) | (None, Some(odd)) =
            (odd, keys.first().filter(|_| !upscaler.has("upscaler")))
        {
            let starts = |p: &str| keys.iter().any(|k| k.starts_with(p));
            let what = match key_mapping::layout(keys.iter().map(String::as_str)) {
                Layout::Original | Layout::Canonical => "is a checkpoint that draws, no upscaler",
                Layout::Adapter => "is a LoRA, no upscaler",
                Layout::Unknown if starts("layers.0.") => {
                    "is an upscaler with attention (SwinIR, HAT, DAT), which sdgen does not run"
                }
                Layout::Unknown => "is no upscaler that sdgen knows",
            };
            bail!(
                "`{}` {what}: it has a tensor `{odd}`\n\nhint: {UPSCALERS}",
                path.display()
            );
        }
        Ok(upscaler)
    }

    /// Changes weights by these as they are read; one of strength 0 is left out. One that was
    /// distilled to few steps, by its name, brings its scheduler. Errors if one does not fit, with
    /// `strict` also if it fits in part.
    pub fn use_loras(
        &mut self,
        loras: impl IntoIterator<Item = Result<Lora>>,
        strict: bool,
    ) -> Result<()> {
        let mut known = None;
        for lora in loras {
            let mut lora = lora?;
            lora.fit(self, known.get_or_insert_with(|| Known::of(self)))?;
            if let Some(misfit) = lora.misfit().filter(|_| strict) {
                bail!("{misfit}\n\nhint: without `--strict` the rest of it is used");
            }
            if lora.strength == 0.0 {
                continue;
            }
            if let (Some(named), Some(Value::Object(scheduler))) =
                (lora.distillation(), self.configs.get_mut("scheduler"))
            {
                scheduler.extend(named.scheduler.as_object().cloned().unwrap_or_default());
            }
            self.loras.push(lora);
        }
        Ok(())
    }

    /// The width of the texts that its U-Net takes.
    fn text_width(&self) -> Option<usize> {
        let takes_text =
            |name: &str| name.starts_with("unet.") && name.ends_with(".attn2.to_k.weight");
        self.entries
            .iter()
            .find(|(name, _)| takes_text(name))
            .and_then(|(_, entry)| entry.shape.get(1).copied())
    }

    /// Gives it words beyond its vocabulary, and its refiner. Errors if two have one token.
    pub fn use_embeddings(&mut self, embeddings: Vec<Embedding>) -> Result<()> {
        let mut known = BTreeSet::new();
        if let Some(again) = embeddings
            .iter()
            .find(|one| !known.insert(one.token.to_lowercase()))
        {
            let (token, file) = (&again.token, &again.file);
            bail!(
                "two embeddings stand for `{token}`\n\nhint: give one another word in prompts: `--embedding {file}:TOKEN`"
            );
        }
        if let Some(refiner) = &mut self.refiner {
            refiner.embeddings = embeddings.clone();
        }
        self.embeddings = embeddings;
        Ok(())
    }

    /// What holds the weights of a component.
    fn holder(&self, component: &str) -> &Self {
        self.vae
            .as_deref()
            .filter(|_| component == "vae")
            .unwrap_or(self)
    }

    fn require_parts(&self, path: &Path) -> Result<()> {
        if (self.has(ENCODERS[0]) || self.has(ENCODERS[1])) && self.has("unet") {
            return Ok(());
        }
        let hint = "pass a whole checkpoint; this file is only a part of one";
        bail!(
            "{}\n\nhint: {hint}",
            self.lacks(&path.display().to_string())
        );
    }

    /// What is wrong with a checkpoint that is only a part of one.
    fn lacks(&self, name: &str) -> String {
        let found: Vec<&str> = PARTS.into_iter().filter(|p| self.has(p)).collect();
        let is_missing = |part: &&str| {
            !found.contains(part)
                && (*part != ENCODERS[1])
                && (*part != ENCODERS[0] || !self.has(ENCODERS[1]))
        };
        let missing: Vec<&str> = PARTS.into_iter().filter(is_missing).collect();
        let found = if found.is_empty() {
            "nothing that is known".into()
        } else {
            found.join(", ")
        };
        let missing = missing.join(" and no ");
        format!("`{name}` has no {missing} (it has: {found})")
    }

    /// Errors if there is no VAE, without which latents cannot be decoded.
    pub fn require_vae(&self) -> Result<()> {
        if self.configs.contains_key("vae") {
            Ok(())
        } else {
            bail!("{}\n\nhint: pass one with `--vae`", self.lacks(&self.name))
        }
    }

    /// Whether any tensor of a component is there.
    pub fn has(&self, component: &str) -> bool {
        let prefix = format!("{component}.");
        self.entries
            .range(prefix.clone()..)
            .next()
            .is_some_and(|(k, _)| k.starts_with(&prefix))
    }

    fn add_source(&mut self, source: Source, map: impl Fn(&str) -> Vec<Named>) -> Result<()> {
        let index = self.sources.len();
        for (key, shape, dtype) in source.tensors() {
            let named = map(&key);
            if named.is_empty() {
                self.ignored.push(key.clone());
            }
            for Named { name, part } in named {
                let shape = part_shape(&shape, &part);
                let entry = Entry {
                    source: index,
                    key: key.clone(),
                    part,
                    shape,
                    dtype: format!("{dtype:?}").to_lowercase(),
                };
                if let Some(before) = self.entries.insert(name, entry) {
                    bail!(
                        "`{}` has tensor `{}` twice, once as `{key}`",
                        source.path().display(),
                        before.key
                    );
                }
            }
        }
        self.sources.push(source);
        Ok(())
    }

    /// Shape of a tensor by canonical name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|e| e.shape.as_slice())
    }

    /// Canonical names of all tensors.
    fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// How many numbered children `prefix` has: `prefix0.`, `prefix1.`, ...
    pub fn count(&self, prefix: &str) -> usize {
        (0..)
            .take_while(|i| {
                let p = format!("{prefix}{i}.");
                self.entries
                    .range(p.clone()..)
                    .next()
                    .is_some_and(|(k, _)| k.starts_with(&p))
            })
            .count()
    }

    fn entries_of(&self, component: &str) -> impl Iterator<Item = (&String, &Entry)> {
        let prefix = format!("{component}.");
        self.holder(component)
            .entries
            .range(prefix.clone()..)
            .take_while(move |(k, _)| k.starts_with(&prefix))
    }

    /// (parameters, stored types) of a component.
    pub fn summary(&self, component: &str) -> (usize, BTreeSet<&str>) {
        let of = || self.entries_of(component);
        (
            of().map(|(_, e)| e.shape.iter().product::<usize>()).sum(),
            of().map(|(_, e)| e.dtype.as_str()).collect(),
        )
    }

    /// Bytes of a component's weights in memory, where they stay as narrow as their file:
    /// [`Weights::get_stored`].
    pub fn stored_bytes(&self, component: &str) -> u64 {
        let width = |dtype: &str| {
            if matches!(dtype, "f16" | "bf16") {
                2
            } else {
                4
            }
        };
        self.entries_of(component)
            .map(|(_, e)| width(&e.dtype) * e.shape.iter().product::<usize>() as u64)
            .sum()
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.sources.iter().map(|s| s.len).sum()
    }

    /// The configuration of a component; an error names it if there is none.
    pub fn config(&self, component: &str) -> Result<&Value> {
        self.configs
            .get(component)
            .with_context(|| format!("`{}` has no configuration of its {component}", self.name))
    }

    /// A fingerprint of the weights: SHA-256 over the names, stored types and first 4 KiB of all
    /// tensors. The same weights as folder and as single file have the same fingerprint; f16 and
    /// f32 copies have not.
    pub fn hash(&self) -> Result<String> {
        let mut hash = Sha256::new();
        for (name, entry) in &self.entries {
            hash.update(name.as_bytes());
            hash.update(entry.dtype.as_bytes());
            if let Some(source) = self.sources.get(entry.source) {
                hash.update(source.sample(&entry.key, &entry.part)?);
            }
        }
        Ok(hex(&hash.finalize()))
    }

    /// The weights of one component, to build a network from.
    pub fn weights<'a>(&'a self, component: &str, device: &'a Device, dtype: DType) -> Weights<'a> {
        Weights {
            checkpoint: Some(self.holder(component)),
            prefix: component.into(),
            device,
            dtype,
            backend: Backend::of(device),
        }
    }

    /// Adds a share of another checkpoint's weights: all of this one's parts that it has too.
    /// Errors if a tensor of those is missing there, or has another shape.
    pub fn merge(&mut self, merge: Merge) -> Result<()> {
        for other in [Some(&merge.other), merge.minus.as_ref()]
            .into_iter()
            .flatten()
        {
            for (name, entry) in &self.entries {
                let has_part = name.split('.').next().is_some_and(|part| other.has(part));
                let same = other
                    .entries
                    .get(name)
                    .is_some_and(|found| trimmed(&found.shape) == trimmed(&entry.shape));
                if has_part && !same {
                    let hint = "models of one family can be merged";
                    bail!(
                        "`{}` does not go with `{}`: it has no tensor `{name}` of shape {:?}\n\nhint: {hint}",
                        other.name,
                        self.name,
                        entry.shape
                    );
                }
            }
        }
        self.merges.push(merge);
        Ok(())
    }

    /// A tensor with the shares of others and then with what LoRAs add, in its own type: each as if
    /// it was made and saved.
    fn read(&self, name: &str) -> Result<Tensor> {
        let own = self.read_own(name)?;
        let part = name.split('.').next().unwrap_or_default();
        let mut merged: Option<Tensor> = None;
        for Merge {
            other,
            minus,
            share,
        } in self.merges.iter().filter(|merge| merge.other.has(part))
        {
            let wide = own.to_dtype(DType::F32)?;
            let base = match minus.as_ref().filter(|minus| minus.has(part)) {
                Some(minus) => minus.read_own(name)?.to_dtype(DType::F32)?,
                None => wide.clone(),
            };
            let more = ((other
                .read_own(name)?
                .to_dtype(DType::F32)?
                .reshape(wide.shape())?
                - base.reshape(wide.shape())?)?
                * *share)?;
            merged = Some((merged.unwrap_or(wide) + more)?);
        }
        let merged = merged
            .map(|merged| merged.to_dtype(own.dtype()))
            .transpose()?
            .unwrap_or(own);
        lora::patch(&self.loras, name, merged)
    }

    fn read_own(&self, name: &str) -> Result<Tensor> {
        let entry = self.entries.get(name).with_context(|| self.missing(name))?;
        let source = self
            .sources
            .get(entry.source)
            .context("a source went missing")?;
        let tensor = source.read(&entry.key)?;
        Ok(match entry.part {
            Part::Whole => tensor,
            Part::Rows { index, of } => {
                let rows = tensor.dim(0)? / of;
                tensor.narrow(0, index * rows, rows)?
            }
            Part::Transposed => tensor.t()?.contiguous()?,
        })
    }

    fn missing(&self, name: &str) -> String {
        let component = name.split('.').next().unwrap_or_default();
        let prefix = format!("{component}.");
        let near = nearest(
            name,
            self.entries
                .keys()
                .map(String::as_str)
                .filter(|k| k.starts_with(&prefix)),
        );
        let near = near
            .map(|n| format!("; the nearest it has is `{n}`"))
            .unwrap_or_default();
        format!(
            "`{}` has no tensor `{name}`{near}\n\nhint: its configuration and its weights do not belong together",
            self.name
        )
    }
}

/// A place in a checkpoint's names, from which a network takes its tensors.
#[derive(Clone)]
pub struct Weights<'a> {
    /// none: random weights
    checkpoint: Option<&'a Checkpoint>,
    prefix: String,
    device: &'a Device,
    dtype: DType,
    backend: Backend,
}

impl<'a> Weights<'a> {
    /// Weights of any name and shape, random and of sensible size: for benchmarks.
    pub fn random(device: &'a Device, dtype: DType) -> Self {
        Self {
            checkpoint: None,
            prefix: "random".into(),
            device,
            dtype,
            backend: Backend::of(device),
        }
    }

    /// The place `name` below this one.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        Self {
            prefix: format!("{}.{name}", self.prefix),
            ..self.clone()
        }
    }

    /// The same for another backend than the fastest of the device.
    pub fn with_backend(self, backend: Backend) -> Self {
        Self { backend, ..self }
    }

    /// The backend that layers are laid out for.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Reads the tensor `name` of exactly this shape, in the type of the arithmetic (on CPUs f32);
    /// trailing dimensions of size 1 may differ (a linear layer stored as a 1x1 convolution).
    /// Errors name the tensor, its shape and the expected one.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let dtype = if self.backend == Backend::Cpu {
            DType::F32
        } else {
            self.dtype
        };
        Ok(self
            .read(name, shape)?
            .to_dtype(dtype)?
            .to_device(self.device)?)
    }

    /// The same in the type in which large weights are kept: on CPUs, unless a narrower one was
    /// asked for, that of the file, since products widen weights as they read them.
    pub fn get_stored(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.read(name, shape)?;
        let dtype = if self.device.is_cpu() && self.dtype == DType::F32 {
            tensor.dtype()
        } else {
            self.dtype
        };
        Ok(tensor.to_dtype(dtype)?.to_device(self.device)?)
    }

    fn read(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let name = format!("{}.{name}", self.prefix);
        let Some(checkpoint) = self.checkpoint else {
            let fan_in = shape.iter().skip(1).product::<usize>().max(1) as f32;
            let bound = 1.0 / fan_in.sqrt();
            return Ok(Tensor::rand(-bound, bound, shape, &Device::Cpu)?);
        };
        let tensor = checkpoint.read(&name)?;
        if trimmed(tensor.dims()) != trimmed(shape) {
            bail!(
                "tensor `{name}` of `{}` has shape {:?}, its configuration says {shape:?}\n\nhint: its configuration and its weights do not belong together",
                checkpoint.name,
                tensor.dims()
            );
        }
        Ok(tensor.reshape(shape)?)
    }

    /// Zeros in place of a tensor that a layer has not, in the type of the arithmetic.
    pub fn zeros(&self, shape: &[usize]) -> Result<Tensor> {
        let dtype = if self.backend == Backend::Cpu {
            DType::F32
        } else {
            self.dtype
        };
        Ok(Tensor::zeros(shape, dtype, self.device)?)
    }

    /// Where the weights go.
    pub fn device(&self) -> &Device {
        self.device
    }
}

fn trimmed(shape: &[usize]) -> &[usize] {
    let end = shape.iter().rposition(|d| *d != 1).map_or(0, |i| i + 1);
    shape.get(..end).unwrap_or_default()
}

fn part_shape(shape: &[usize], part: &Part) -> Vec<usize> {
    let mut shape = shape.to_vec();
    match (part, shape.first_mut()) {
        (Part::Rows { of, .. }, Some(rows)) => *rows /= of,
        (Part::Transposed, _) => shape.reverse(),
        _ => (),
    }
    shape
}

fn folder_name(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    // a snapshot in the hub's cache: .../models--owner--name/snapshots/<commit>
    let name = path
        .ancestors()
        .filter_map(|p| p.file_name()?.to_str())
        .find_map(|n| n.strip_prefix("models--"));
    match name {
        Some(name) => name.replace("--", "/"),
        None => path
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_else(|| "model".into()),
    }
}

fn tokenizer(folder: &Path) -> Result<TokenizerSource> {
    let mut config = serde_json::Map::new();
    // special_tokens_map.json wins over tokenizer_config.json, as in transformers: SD2.1 pads with
    // `!` only by it
    for file in ["tokenizer_config.json", "special_tokens_map.json"] {
        let path = folder.join(file);
        if path.exists() {
            config.extend(read_json(&path)?.as_object().cloned().unwrap_or_default());
        }
    }
    let (vocab, merges) = (folder.join("vocab.json"), folder.join("merges.txt"));
    let files = if vocab.exists() && merges.exists() {
        TokenizerFiles::VocabMerges {
            vocab: read_text(&vocab)?,
            merges: read_text(&merges)?,
        }
    } else {
        TokenizerFiles::Json(read_text(&folder.join("tokenizer.json"))?)
    };
    Ok(TokenizerSource {
        files,
        config: config.into(),
    })
}

/// The weight files of one component's folder: full precision first, then `fp16`; one file, or all
/// shards of an index.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut unfinished = None;
    for variant in ["", ".fp16"] {
        for stem in ["diffusion_pytorch_model", "model"] {
            let one = folder.join(format!("{stem}{variant}.safetensors"));
            if one.exists() {
                return Ok(vec![one]);
            }
            for index in [
                format!("{stem}.safetensors.index{variant}.json"),
                format!("{stem}{variant}.safetensors.index.json"),
            ] {
                let index = folder.join(index);
                match index.exists().then(|| shards(folder, &index)) {
                    Some(Ok(files)) => return Ok(files),
                    Some(Err(error)) => unfinished = unfinished.or(Some(error)),
                    None => (),
                }
            }
        }
    }
    if let Some(error) = unfinished {
        return Err(error);
    }
    let others: Vec<String> = std::fs::read_dir(folder)?
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|n| n.ends_with(".bin") || n.ends_with(".ckpt") || n.ends_with(".pt"))
        .collect();
    let hint = if others.is_empty() {
        "fetch the model again, for example with `sdgen pull`".into()
    } else {
        format!(
            "it has only {}, a PyTorch pickle; convert the model to safetensors with diffusers: `save_pretrained(..., safe_serialization=True)`",
            others.join(", ")
        )
    };
    bail!(
        "`{}` has no safetensors weights\n\nhint: {hint}",
        folder.display()
    )
}

fn shards(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let json = read_json(index)?;
    let map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .with_context(|| format!("`{}` has no weight_map", index.display()))?;
    let files: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
    files
        .into_iter()
        .map(|file| {
            let plain = Path::new(file).file_name().is_some_and(|n| n == file);
            let path = folder.join(file);
            if !plain || !path.exists() {
                bail!("`{}` lists the shard `{file}`, which is not there\n\nhint: fetch the model again", index.display());
            }
            Ok(path)
        })
        .collect()
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))
}

fn read_json(path: &Path) -> Result<Value> {
    let text = read_text(path)?;
    // Python writes `"lambda_min_clipped": -Infinity`, which is that setting's default, and no JSON
    let text = text.replace(": -Infinity", ": null");
    serde_json::from_str(&text).with_context(|| format!("`{}` is not valid JSON", path.display()))
}

fn unknown(path: &Path, keys: &[String]) -> String {
    let shown = path.display();
    let starts = |p: &str| keys.iter().any(|k| k.starts_with(p));
    let (what, hint) = if OTHER_FAMILIES
        .into_iter()
        .chain(["double_blocks.", "transformer."])
        .any(starts)
    {
        (
            "is a model of a family that sdgen does not draw yet",
            "Stable Diffusion 1.x, 2.x and XL work today",
        )
    } else if starts("decoder.") || starts("encoder.down") {
        (
            "is a VAE alone, no whole model",
            "pass it with `--vae`, and a whole checkpoint with `--model`",
        )
    } else if starts("down_blocks.") {
        (
            "is a U-Net alone, no whole model",
            "pass the folder that holds model_index.json",
        )
    } else if starts("text_model.") {
        (
            "is a text encoder alone, no whole model",
            "pass the folder that holds model_index.json",
        )
    } else if ["emb_params", "clip_l", "<"].into_iter().any(starts) && Embedding::is_in(path) {
        (
            "is an embedding, no model: it only adds a word",
            "pass a whole checkpoint with `--model`, and this with `--embedding`",
        )
    } else if [
        "conv_first.",
        "model.1.sub.",
        "params_ema.",
        "params.",
        "RRDB_trunk.",
    ]
    .into_iter()
    .any(starts)
    {
        (
            "is an upscaler, which draws nothing by itself",
            "`sdgen upscale -m` takes it",
        )
    } else {
        let first: Vec<&str> = keys.iter().take(3).map(String::as_str).collect();
        return format!(
            "`{shown}` is no Stable Diffusion checkpoint (its first tensors: {})\n\nhint: pass a whole checkpoint with `--model`",
            first.join(", ")
        );
    };
    format!("`{shown}` {what}\n\nhint: {hint}")
}
