//! Models in parts: a transformer, a text encoder and a VAE, each a file of its own as ComfyUI lays
//! them out, or all in one file. Parts are told apart by their tensors, whatever they are called.

use super::key_mapping::{self, Layout};
use super::model_files::{self, file_name, read_json};
use super::open::{TODAY, only_file};
use super::safetensors::SafetensorsFile;
use super::transformers::{self, Drawn, OTHER_ENCODERS, Release, Transformer};
use super::{Checkpoint, ENCODERS, TRANSFORMER, infer_config};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The folders of a ComfyUI that hold the parts of models, some by their older names.
const FOLDERS: [&str; 6] = [
    "checkpoints",
    "diffusion_models",
    "unet",
    "text_encoders",
    "clip",
    "vae",
];
/// Where repositories for ComfyUI have these folders.
const SPLIT_FILES: &str = "split_files";

/// The ending of what ComfyUI writes beside 8-bit tensors, for itself.
const COMFY_NOTE: &str = "comfy_quant";

/// A file that is a part of a model.
pub struct PartFile {
    /// the file's, without its ending
    pub name: String,
    /// `transformer`, `text encoder` or `VAE`
    pub kind: &'static str,
    /// what it is of, such as `FLUX.2 klein 4B`
    pub family: String,
    pub parameters: usize,
    pub stored_as: Vec<String>,
    pub bytes: u64,
    /// the option that takes it
    pub option: &'static str,
    /// what has to come with it, and from where
    pub needs: Vec<String>,
    pub assumptions: Vec<String>,
}

impl PartFile {
    /// Tells from its header which part of a model a file is; none if it is something else. Errors
    /// if it is damaged.
    pub fn at(path: &Path) -> Result<Option<Self>> {
        if !path.is_file() {
            return Ok(None);
        }
        let source = SafetensorsFile::open(path)?;
        let keys = source.keys();
        let all = || keys.iter().map(String::as_str);
        let layout = key_mapping::layout(all());
        if layout == Layout::Adapter {
            return Ok(None);
        }
        let encoder = transformers::qwen3_prefix(all());
        match transformers::find(all()) {
            Some((family, _)) if family.drawn.is_some() && encoder.is_none() => {
                let checkpoint = Checkpoint::open(super::Origin::Path(path))?;
                return Ok(Some(Self::transformer(checkpoint, family)));
            }
            Some(_) => return Ok(None),
            None => (),
        }
        if encoder.is_some() {
            let mut checkpoint = Checkpoint::empty(file_name(path));
            let has_tokenizer = checkpoint.add_qwen3(path, source)?.is_some();
            return Ok(Some(Self::encoder(checkpoint, has_tokenizer)));
        }
        // what is left of a whole checkpoint is told by what it lacks
        let is_vae = layout == Layout::Unknown
            && super::role(path, &keys).is_some_and(|(what, _)| what == "is only a VAE");
        if !is_vae || keys.iter().all(|key| !key.contains("decoder.conv_in.")) {
            return Ok(None);
        }
        let scale = infer_config::vae_scale(&Checkpoint::empty(String::new()));
        Ok(Some(Self::vae(Checkpoint::open_vae(path, scale)?)))
    }

    fn of(checkpoint: Checkpoint, kind: &'static str, component: &str, family: String) -> Self {
        let (parameters, stored_as) = checkpoint.summary(component);
        Self {
            parameters,
            stored_as: stored_as.into_iter().map(String::from).collect(),
            bytes: checkpoint.bytes(),
            kind,
            family,
            option: "--vae",
            needs: vec![],
            assumptions: vec![],
            name: checkpoint.name,
        }
    }

    fn transformer(checkpoint: Checkpoint, family: &Transformer) -> Self {
        let release = checkpoint.release();
        let name = release.map_or(family.name, |release| release.name);
        let needs = [checkpoint.missing_text_encoder(), checkpoint.missing_vae()];
        Self {
            option: "--diffusion-model",
            needs: needs.into_iter().flatten().collect(),
            assumptions: checkpoint.assumptions.clone(),
            ..Self::of(checkpoint, TRANSFORMER, TRANSFORMER, name.into())
        }
    }

    fn encoder(checkpoint: Checkpoint, has_tokenizer: bool) -> Self {
        let name = checkpoint.encoder_name();
        let needs = if has_tokenizer {
            vec![]
        } else {
            vec!["its tokenizer.json beside it, else it is fetched from the hub (11 MB)".into()]
        };
        Self {
            option: "--text-encoder",
            needs,
            ..Self::of(checkpoint, "text encoder", ENCODERS[0], name.into())
        }
    }

    fn vae(checkpoint: Checkpoint) -> Self {
        let channels = checkpoint.shape("vae.decoder.conv_in.weight");
        let channels = channels.and_then(|shape| shape.get(1).copied());
        let is_flux2 = checkpoint.shape("vae.bn.running_mean").is_some();
        let family = match channels {
            _ if is_flux2 => "FLUX.2",
            Some(16) => "FLUX.1 and Z-Image, or Stable Diffusion 3",
            Some(4) => "Stable Diffusion 1.x, 2.x or XL",
            _ => "a model of no known channels",
        };
        Self::of(checkpoint, "VAE", "vae", family.into())
    }
}

impl Checkpoint {
    /// Opens a file with the transformer of a family: alone, or with the other parts.
    pub(super) fn transformer_file(
        path: &Path,
        source: SafetensorsFile,
        (family, prefix): (&'static Transformer, &str),
    ) -> Result<Self> {
        let Some(drawn) = family.drawn else {
            bail!(not_drawn(path, family));
        };
        let keys = source.keys();
        let all = || keys.iter().map(String::as_str);
        let encoder = transformers::qwen3_prefix(all());
        let vae = key_mapping::from_vae(all());
        let names = |key: &str| {
            let of_transformer = key.strip_prefix(prefix).and_then(|key| drawn.names(key));
            of_transformer
                .or_else(|| transformers::qwen3(encoder.as_deref()?, key))
                .or_else(|| vae.get(key).cloned())
                .unwrap_or_default()
        };
        let is_unknown = |key: &&String| {
            let ends = [".weight", ".bias", ".scale"];
            let inner = key.strip_prefix(prefix);
            inner.is_some_and(|key| drawn.names(key).is_none())
                && ends.iter().any(|end| key.ends_with(end))
                && names(key).is_empty()
                && (!prefix.is_empty() || !key.contains("encoder"))
        };
        let unknown = keys.iter().find(is_unknown);
        if let Some(key) = unknown {
            bail!(
                "`{}` is a transformer like that of {}, with a tensor `{key}` that no layer of it has\n\nhint: it is a kind of model that sdgen does not draw",
                path.display(),
                family.name
            );
        }
        let mut checkpoint = Self::empty(file_name(path));
        checkpoint.add_source(source, names)?;
        checkpoint
            .unexpected_keys
            .retain(|key| !key.ends_with(COMFY_NOTE));
        (drawn.configure)(&mut checkpoint).with_context(|| {
            format!(
                "`{}` is not a whole transformer of {}",
                path.display(),
                family.name
            )
        })?;
        if encoder.is_some() {
            infer_config::qwen3(&mut checkpoint)?;
            checkpoint.tokenizer_beside(path)?;
        }
        if checkpoint.has("vae") {
            let scale = infer_config::vae_scale(&checkpoint);
            let config = infer_config::autoencoder(&checkpoint, scale)?;
            checkpoint.configs.insert("vae".into(), config);
        }
        Ok(checkpoint)
    }

    /// Opens a folder without model_index.json: one file, or the parts of one model.
    pub(super) fn folder_of_parts(folder: &Path) -> Result<Self> {
        let paths = part_paths(folder)?;
        if let [one] = paths.as_slice() {
            return Self::open(super::Origin::Path(one));
        }
        let mut headers = vec![];
        for path in paths {
            let keys = SafetensorsFile::open(&path)?.keys();
            headers.push((path, keys));
        }
        let mut found = vec![];
        for (path, keys) in &headers {
            if let Some((family, _)) = transformers::find(keys.iter().map(String::as_str)) {
                found.push((path, family));
            }
        }
        let drawn: Vec<_> = found
            .iter()
            .filter(|(_, family)| family.drawn.is_some())
            .collect();
        let path = match drawn.as_slice() {
            [(path, _)] => *path,
            [] => match found.first() {
                Some((path, family)) => bail!(not_drawn(path, family)),
                None => return Self::open(super::Origin::Path(&only_file(folder)?)),
            },
            [(first, _), ..] => bail!(
                "`{}` has {} transformers\n\nhint: name one, for example `--diffusion-model {}`, with `--text-encoder FILE` and `--vae FILE`",
                folder.display(),
                drawn.len(),
                first.display()
            ),
        };
        let mut checkpoint = Self::open(super::Origin::Path(path))?;
        let others = || headers.iter().filter(|(other, _)| other != path);
        if checkpoint.optional_config(ENCODERS[0]).is_none() {
            let mut fitting = vec![];
            for (path, keys) in others() {
                if transformers::qwen3_prefix(keys.iter().map(String::as_str)).is_some() {
                    let mut encoder = Self::empty(file_name(path));
                    encoder.add_qwen3(path, SafetensorsFile::open(path)?)?;
                    if encoder.encoder_width() == checkpoint.wanted_encoder_width() {
                        fitting.push(path);
                    }
                }
            }
            if let Some(path) = the_only(&fitting, folder, "text encoders", "--text-encoder")? {
                checkpoint.use_text_encoder(path)?;
            }
        }
        if checkpoint.optional_config("vae").is_none() {
            let mut fitting = vec![];
            for (path, keys) in others() {
                let is_vae =
                    super::role(path, keys).is_some_and(|(what, _)| what == "is only a VAE");
                let scale = infer_config::vae_scale(&checkpoint);
                let vae = is_vae.then(|| Self::open_vae(path, scale).ok()).flatten();
                if vae.is_some_and(|vae| checkpoint.require_channels(&vae).is_ok()) {
                    fitting.push(path);
                }
            }
            if let Some(path) = the_only(&fitting, folder, "VAEs", "--vae")? {
                checkpoint.add_vae(path)?;
            }
        }
        Ok(checkpoint)
    }

    /// Takes a VAE file for the model's own.
    fn add_vae(&mut self, path: &Path) -> Result<()> {
        let scale = infer_config::vae_scale(self);
        let config = Self::open_vae(path, scale)?.config("vae")?.clone();
        let source = SafetensorsFile::open(path)?;
        let keys = source.keys();
        let names = key_mapping::from_vae(keys.iter().map(String::as_str));
        self.add_source(source, |key| names.get(key).cloned().unwrap_or_default())?;
        self.configs.insert("vae".into(), config);
        Ok(())
    }

    /// Draws with the transformer of another checkpoint, from which nothing else is taken. Errors if
    /// one of the two has none, or if they are not of one family.
    pub fn use_transformer(&mut self, other: Self) -> Result<()> {
        for checkpoint in [&*self, &other] {
            if checkpoint.denoiser() != TRANSFORMER {
                bail!(
                    "`{}` is drawn by a U-Net, where `--diffusion-model` stands for a transformer\n\nhint: name one of the two models; $SDGEN_MODEL counts as `--model`",
                    checkpoint.name
                );
            }
        }
        let class = |checkpoint: &Self| {
            let class = checkpoint.configs.get(TRANSFORMER)?.get("_class_name")?;
            class.as_str().map(String::from)
        };
        let widths = [&*self, &other].map(Self::wanted_encoder_width);
        if class(self) != class(&other) || widths[0] != widths[1] {
            let name = |checkpoint: &Self| {
                let release = checkpoint.release().map(|release| release.name);
                release.map_or(class(checkpoint).unwrap_or_default(), String::from)
            };
            bail!(
                "`{}` is a transformer of {}, and `{}` of {}\n\nhint: `--model` names the model that the transformer was made from",
                other.name,
                name(&other),
                self.name,
                name(self)
            );
        }
        self.name.clone_from(&other.name);
        self.take_component(other.alone(TRANSFORMER), TRANSFORMER);
        Ok(())
    }

    /// Reads text with another encoder: a file, the folder of one, or that of a whole model. Errors
    /// if there is none at `path`, or one that the transformer does not take.
    pub fn use_text_encoder(&mut self, path: &Path) -> Result<()> {
        if self.denoiser() != TRANSFORMER {
            bail!(
                "`--text-encoder` means nothing to `{}`: a U-Net's text encoders are part of its file\n\nhint: it is for models with a transformer, FLUX.2 klein and Z-Image",
                self.name
            );
        }
        let shown = path.display();
        let mut encoder = Self::empty(file_name(path));
        if path.is_dir() {
            let nested = path.join(ENCODERS[0]);
            let folder = if nested.join("config.json").exists() {
                &nested
            } else {
                path
            };
            if folder.join("config.json").exists() {
                encoder.name = model_files::folder_name(path);
                let config = read_json(&folder.join("config.json"))?;
                encoder.configs.insert(ENCODERS[0].into(), config);
                encoder.add_folder(folder, ENCODERS[0])?;
                encoder.tokenizer_of_folder(folder)?;
            } else {
                let file = only_file(path)?;
                encoder.name = file_name(&file);
                encoder.add_encoder_file(&file)?;
            }
        } else {
            encoder.add_encoder_file(path)?;
        }
        let (own, wanted) = (encoder.encoder_width(), self.wanted_encoder_width());
        if let (Some(own), Some(wanted)) = (own, wanted)
            && own != wanted
        {
            let release = self.release();
            bail!(
                "`{shown}` is {}, {own} wide, `{}` reads {}, {wanted} wide\n\nhint: pass that with `--text-encoder`{}",
                encoder.encoder_name(),
                self.name,
                release.map_or(transformers::qwen3_name(wanted), |release| release.encoder),
                release
                    .map(|release| format!(", for example `--text-encoder {}`", release.repo))
                    .unwrap_or_default()
            );
        }
        self.take_component(encoder, ENCODERS[0]);
        Ok(())
    }

    /// Adds a file that must hold Qwen3.
    fn add_encoder_file(&mut self, path: &Path) -> Result<()> {
        let source = SafetensorsFile::open(path)?;
        let keys = source.keys();
        if transformers::qwen3_prefix(keys.iter().map(String::as_str)).is_none() {
            let shown = path.display();
            let other = OTHER_ENCODERS
                .iter()
                .find(|(start, _)| keys.iter().any(|key| key.starts_with(start)));
            match (other, super::role(path, &keys)) {
                (Some((_, what)), _) => bail!(
                    "`{shown}` is {what}, a text encoder that no model here reads\n\nhint: FLUX.2 klein 4B and Z-Image read Qwen3 4B, FLUX.2 klein 9B reads Qwen3 8B"
                ),
                (None, Some((what, place))) => {
                    bail!("`{shown}` {what}, not a text encoder\n\nhint: {place}")
                }
                (None, None) => bail!(
                    "`{shown}` is not a text encoder that sdgen knows\n\nhint: `--text-encoder` takes Qwen3"
                ),
            }
        }
        if let Some(path) = self.add_qwen3(path, source)? {
            self.tokenizer_of_folder(&path)?;
        }
        Ok(())
    }

    /// Adds a file of Qwen3 and its configuration. Returns the folder of its tokenizer, if that is
    /// beside it.
    fn add_qwen3(&mut self, path: &Path, source: SafetensorsFile) -> Result<Option<PathBuf>> {
        let keys = source.keys();
        let prefix =
            transformers::qwen3_prefix(keys.iter().map(String::as_str)).unwrap_or_default();
        self.add_source(source, |key| {
            transformers::qwen3(&prefix, key).unwrap_or_default()
        })?;
        infer_config::qwen3(self)
            .with_context(|| format!("`{}` is not a whole text encoder", path.display()))?;
        let folder = path.parent().unwrap_or(Path::new("."));
        Ok(folder
            .join("tokenizer.json")
            .exists()
            .then(|| folder.to_path_buf()))
    }

    /// Reads the tokenizer that lies beside a file, if there is one.
    fn tokenizer_beside(&mut self, path: &Path) -> Result<()> {
        let folder = path.parent().unwrap_or(Path::new("."));
        if folder.join("tokenizer.json").exists() {
            self.tokenizer_of_folder(folder)?;
        }
        Ok(())
    }

    /// Reads the tokenizer of a text encoder's folder: in it, or in one beside it.
    fn tokenizer_of_folder(&mut self, folder: &Path) -> Result<()> {
        let beside = folder.parent().map(|parent| parent.join("tokenizer"));
        let inside = folder.join("tokenizer");
        let places = [Some(folder.to_path_buf()), Some(inside), beside];
        let found = places
            .into_iter()
            .flatten()
            .find(|place| place.join("tokenizer.json").exists());
        if let Some(folder) = found {
            let tokenizer = model_files::tokenizer(&folder, true)?;
            self.tokenizers.insert(ENCODERS[0], tokenizer);
        }
        Ok(())
    }

    /// The repository whose tokenizer this model needs and does not have.
    pub fn wants_tokenizer_of(&self) -> Option<&'static str> {
        let has_encoder = self.optional_config(ENCODERS[0]).is_some();
        let lacks = has_encoder && !self.tokenizers.contains_key(ENCODERS[0]);
        self.release().filter(|_| lacks).map(|release| release.repo)
    }

    /// Takes the tokenizer of a model's folder. Errors if it cannot be read.
    pub fn use_tokenizer(&mut self, folder: &Path) -> Result<()> {
        self.tokenizer_of_folder(folder)
    }

    /// What is said of a transformer without a text encoder: which it needs, and where that is.
    pub(super) fn missing_text_encoder(&self) -> Option<String> {
        let is_there =
            self.denoiser() != TRANSFORMER || self.optional_config(ENCODERS[0]).is_some();
        let release = self.release().filter(|_| !is_there)?;
        Some(format!(
            "text encoder {}: `--text-encoder FILE`, or `--text-encoder {}` from the hub",
            release.encoder, release.repo
        ))
    }

    /// The same of a VAE.
    pub(super) fn missing_vae(&self) -> Option<String> {
        let release = self
            .release()
            .filter(|_| self.optional_config("vae").is_none())?;
        Some(format!(
            "VAE, {}: `--vae FILE`, or `--vae {}` from the hub",
            release.vae, release.repo
        ))
    }

    /// Errors if there is a transformer and nothing that reads text for it.
    pub fn require_text_encoder(&self) -> Result<()> {
        let Some(encoder) = self.missing_text_encoder() else {
            return Ok(());
        };
        let (and, vae) = match self.missing_vae() {
            Some(vae) => (" and no VAE", format!("; {vae}")),
            None => ("", String::new()),
        };
        bail!(
            "`{}` has no text encoder{and}: it is the transformer of {} alone\n\nhint: it needs the {encoder}{vae}",
            self.name,
            self.release().map_or("a model", |release| release.name)
        );
    }

    /// What is known of the family of its transformer, by the names of that.
    fn drawn(&self) -> Option<&'static Drawn> {
        let inner = self
            .names()
            .filter_map(|name| name.strip_prefix("transformer."));
        transformers::find(inner)?.0.drawn
    }

    /// Which published model its transformer is.
    pub(super) fn release(&self) -> Option<&'static Release> {
        self.drawn()?.release(self)
    }

    fn wanted_encoder_width(&self) -> Option<usize> {
        self.drawn()?.encoder_width(self)
    }

    fn encoder_width(&self) -> Option<usize> {
        let config = self.optional_config(ENCODERS[0])?;
        config
            .get("hidden_size")
            .and_then(Value::as_u64)?
            .try_into()
            .ok()
    }

    fn encoder_name(&self) -> &'static str {
        transformers::qwen3_name(self.encoder_width().unwrap_or(0))
    }
}

/// The safetensors files of a folder and of those in it that hold parts of models.
fn part_paths(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut folders = vec![folder.to_path_buf()];
    for root in [folder.to_path_buf(), folder.join(SPLIT_FILES)] {
        folders.extend(FOLDERS.iter().map(|name| root.join(name)));
    }
    let mut paths = vec![];
    for folder in folders.into_iter().filter(|folder| folder.is_dir()) {
        let entries = std::fs::read_dir(&folder)
            .with_context(|| format!("cannot read folder `{}`", folder.display()))?;
        let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
        paths.extend(files.filter(|path| path.extension().is_some_and(|end| end == "safetensors")));
    }
    paths.sort();
    if paths.is_empty() {
        only_file(folder)?;
    }
    Ok(paths)
}

/// The only one of the files that fit; none if none does.
fn the_only<'a>(
    fitting: &[&'a PathBuf],
    folder: &Path,
    kind: &str,
    option: &str,
) -> Result<Option<&'a PathBuf>> {
    match fitting {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        [first, ..] => bail!(
            "`{}` has {} {kind} that fit\n\nhint: name one, for example `{option} {}`, and the transformer with `--diffusion-model`",
            folder.display(),
            fitting.len(),
            first.display()
        ),
    }
}

/// The error for a file with a transformer that is not drawn.
fn not_drawn(path: &Path, family: &Transformer) -> String {
    format!(
        "`{}` is a model of a family that sdgen does not draw yet: a transformer of {}\n\nhint: {TODAY}",
        path.display(),
        family.name
    )
}
