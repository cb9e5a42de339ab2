//! Models in parts: a transformer, a text encoder and a VAE, each a file of its own as ComfyUI lays
//! them out, or all in one file. Parts are told apart by their tensors, whatever they are called.

use super::key_mapping::{self, Layout};
use super::model_files::{self, file_name, read_json};
use super::open::{TODAY, is_weights, only_file, own_configs};
use super::transformers::{
    self, Drawn, Encoder, EncoderFile, EncoderKind, OTHER_ENCODERS, Release, Transformer,
};
use super::weights_file::WeightsFile;
use super::{Checkpoint, ENCODERS, TRANSFORMER, TokenizerFiles, TokenizerSource, infer_config};
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

/// The repository of T5's tokenizer, which all its versions share.
const T5_TOKENIZER: &str = "google-t5/t5-base";

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
        let source = WeightsFile::open(path)?;
        let keys = source.keys();
        let all = || keys.iter().map(String::as_str);
        let layout = key_mapping::layout(all());
        if layout == Layout::Adapter {
            return Ok(None);
        }
        let encoder = EncoderFile::find(all());
        match transformers::find(all()) {
            Some((family, _)) if family.drawn.is_some() && encoder.is_none() => {
                let checkpoint = Checkpoint::open(super::Origin::Path(path))?;
                return Ok(Some(Self::transformer(checkpoint, family)));
            }
            Some(_) => return Ok(None),
            None => (),
        }
        if let Some(file) = encoder.filter(|_| layout == Layout::Unknown) {
            let encoder = Found::file(path, source, file)?;
            return Ok(Some(Self::encoder(&encoder, encoder.open(ENCODERS[0])?)));
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

    fn encoder(found: &Found, checkpoint: Checkpoint) -> Self {
        let has_tokenizer = checkpoint.tokenizers.contains_key(ENCODERS[0]);
        let needs = if has_tokenizer {
            vec![]
        } else {
            vec!["its tokenizer.json beside it, else it is fetched from the hub (11 MB)".into()]
        };
        let name = found.kind.name(found.width);
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
        source: WeightsFile,
        (family, prefix): (&'static Transformer, &str),
    ) -> Result<Self> {
        let Some(drawn) = family.drawn else {
            bail!(not_drawn(path, family));
        };
        let keys = source.keys();
        let all = || keys.iter().map(String::as_str);
        let qwen3 = transformers::qwen3_prefix(all());
        let reads_qwen3 = drawn.of_kind(EncoderKind::Qwen3).next().is_some();
        let vae = key_mapping::from_vae(all());
        let blocks = transformers::blocks(all(), prefix);
        let of_transformer = |key: &str| drawn.names(key.strip_prefix(prefix)?, blocks);
        let names = |key: &str| {
            of_transformer(key)
                .or_else(|| match reads_qwen3 {
                    true => transformers::qwen3(qwen3.as_deref()?, key),
                    false => key_mapping::from_text_encoders(drawn.t5(), key),
                })
                .or_else(|| vae.get(key).cloned())
                .unwrap_or_default()
        };
        let is_unknown = |key: &&String| {
            let ends = [".weight", ".bias", ".scale"];
            key.starts_with(prefix)
                && of_transformer(key).is_none()
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
        let own = own_configs(&source)?;
        checkpoint.add_source(source, names)?;
        (drawn.configure)(&mut checkpoint).with_context(|| {
            format!(
                "`{}` is not a whole transformer of {}",
                path.display(),
                family.name
            )
        })?;
        checkpoint.configs.extend(own);
        for encoder in drawn.encoders {
            if checkpoint.has(encoder.component) {
                infer_config::text_encoder(&mut checkpoint, encoder.component, encoder.kind)?;
                checkpoint.tokenizer_beside(path, encoder.component, encoder.kind)?;
            }
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
            let keys = WeightsFile::open(&path)?.keys();
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
        for encoder in checkpoint.lacking_encoders() {
            let mut fitting = vec![];
            for (path, keys) in others() {
                let file = EncoderFile::find(keys.iter().map(String::as_str));
                let layout = key_mapping::layout(keys.iter().map(String::as_str));
                if let Some(file) = file.filter(|_| layout == Layout::Unknown)
                    && file.kind == encoder.kind
                {
                    let found = Found::file(path, WeightsFile::open(path)?, file)?;
                    if encoder.fits(found.width, &checkpoint) {
                        fitting.push(path);
                    }
                }
            }
            if let Some(path) = the_only(&fitting, folder, "text encoders", "--text-encoder")? {
                checkpoint.use_text_encoders(std::slice::from_ref(path))?;
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
        let source = WeightsFile::open(path)?;
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
        let widths = [&*self, &other].map(|checkpoint| -> Vec<Option<usize>> {
            let encoders = checkpoint.drawn().map_or(&[][..], |drawn| drawn.encoders);
            encoders.iter().map(|it| it.width(checkpoint)).collect()
        });
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

    /// Reads text with other encoders: files, folders of one, or those of whole models. Errors if there
    /// is none at a path, or one that the transformer does not take.
    pub fn use_text_encoders(&mut self, paths: &[PathBuf]) -> Result<()> {
        let Some(drawn) = self.drawn().filter(|_| self.denoiser() == TRANSFORMER) else {
            bail!(
                "`--text-encoder` means nothing to `{}`: a U-Net's text encoders are part of its file\n\nhint: it is for models with a transformer, such as FLUX.1, FLUX.2 klein and Z-Image",
                self.name
            );
        };
        let mut found = vec![];
        for path in paths {
            found.extend(Found::at(path)?);
        }
        // of two of a kind, the narrower is the first
        found.sort_by_key(|it| it.width);
        let mut taken: Vec<&str> = vec![];
        for encoder in &found {
            let shown = encoder.path.display();
            let own = encoder.kind.name(encoder.width);
            let alike = found.iter().filter(|it| it.kind == encoder.kind).count();
            let places: Vec<&Encoder> = drawn.of_kind(encoder.kind).collect();
            let place = match places.as_slice() {
                [] => bail!(
                    "`{shown}` is {own}, a text encoder that `{}` does not read\n\nhint: it needs the text {}",
                    self.name,
                    self.release()
                        .map_or("encoder of its family", |it| it.encoders)
                ),
                places if places.len() == alike => {
                    places.iter().find(|it| !taken.contains(&it.component))
                }
                places => {
                    let of_width = places.iter().find(|it| it.fits(encoder.width, self));
                    of_width.or(places.first())
                }
            };
            let Some(place) = place.filter(|it| !taken.contains(&it.component)) else {
                bail!(
                    "`{shown}` is {own}, of which there is another\n\nhint: give `--text-encoder` once for each encoder"
                );
            };
            if let Some(wanted) = place.width(self).filter(|wanted| *wanted != encoder.width) {
                let release = self.release();
                bail!(
                    "`{shown}` is {own}, {} wide, `{}` reads {}, {wanted} wide\n\nhint: pass that with `--text-encoder`{}",
                    encoder.width,
                    self.name,
                    match encoder.kind {
                        EncoderKind::Qwen3 => release.map_or(place.name(self), |it| it
                            .encoders
                            .trim_start_matches("encoder ")),
                        _ => place.name(self),
                    },
                    release
                        .map(|release| format!(", for example `--text-encoder {}`", release.repo))
                        .unwrap_or_default()
                );
            }
            taken.push(place.component);
            let encoder = encoder.open(place.component)?;
            self.take_component(encoder, place.component);
        }
        Ok(())
    }

    /// Leaves T5 out of a model that draws without it too. Errors if this does not.
    pub fn leave_out_t5(&mut self) -> Result<()> {
        let optional = |it: &&Encoder| it.kind == EncoderKind::T5 && it.is_optional;
        let t5 = self
            .drawn()
            .and_then(|it| it.encoders.iter().find(optional));
        let Some(t5) = t5 else {
            bail!(
                "`--no-t5` means nothing to `{}`\n\nhint: leave it out; only Stable Diffusion 3 draws without T5 as with it",
                self.name
            );
        };
        let empty = Self::empty(self.name.clone());
        self.take_component(empty, t5.component);
        self.configs.remove(t5.component);
        self.tokenizers.remove(t5.component);
        Ok(())
    }

    /// The text encoders that its transformer reads and that it has not.
    fn lacking_encoders(&self) -> Vec<&'static Encoder> {
        let encoders = self.drawn().map_or(&[][..], |drawn| drawn.encoders);
        let lacks = |it: &&Encoder| self.optional_config(it.component).is_none();
        encoders.iter().filter(lacks).collect()
    }

    /// Reads the tokenizer that lies beside a file, if there is one.
    fn tokenizer_beside(
        &mut self,
        path: &Path,
        component: &'static str,
        kind: EncoderKind,
    ) -> Result<()> {
        let folder = path.parent().unwrap_or(Path::new("."));
        if kind != EncoderKind::Clip && folder.join("tokenizer.json").exists() {
            self.tokenizer_of_folder(folder, component, kind)?;
        }
        Ok(())
    }

    /// Reads the tokenizer of a text encoder's folder: in it, or in one beside it.
    fn tokenizer_of_folder(
        &mut self,
        folder: &Path,
        component: &'static str,
        kind: EncoderKind,
    ) -> Result<()> {
        let beside = |name: &str| folder.parent().map(|parent| parent.join(name));
        let inside = |name: &str| Some(folder.join(name));
        let names = ["tokenizer", "tokenizer_2", "tokenizer_3"];
        let places = [Some(folder.to_path_buf())]
            .into_iter()
            .chain(names.iter().map(|name| inside(name)))
            .chain(names.iter().map(|name| beside(name)));
        for folder in places.flatten() {
            if !folder.join("tokenizer.json").exists() {
                continue;
            }
            let tokenizer = model_files::tokenizer(&folder, true)?;
            // T5's makes pieces, and a language model's merges bytes
            let is_pieces = match &tokenizer.files {
                TokenizerFiles::Json(json) => json.contains("\"Unigram\""),
                _ => false,
            };
            if is_pieces == (kind == EncoderKind::T5) {
                self.tokenizers.insert(component, tokenizer);
                break;
            }
        }
        Ok(())
    }

    /// The text encoder that is there without its tokenizer.
    fn without_tokenizer(&self) -> Option<&'static Encoder> {
        let lacks = |it: &&Encoder| {
            self.optional_config(it.component).is_some()
                && !self.tokenizers.contains_key(it.component)
        };
        self.drawn()?.encoders.iter().find(lacks)
    }

    /// The repository whose tokenizer this model needs and does not have.
    pub fn wants_tokenizer_of(&self) -> Option<&'static str> {
        match self.without_tokenizer()?.kind {
            EncoderKind::T5 => Some(T5_TOKENIZER),
            EncoderKind::Clip | EncoderKind::Qwen3 => Some(self.release()?.repo),
        }
    }

    /// Takes the tokenizer of a model's folder. Errors if it cannot be read.
    pub fn use_tokenizer(&mut self, folder: &Path) -> Result<()> {
        match self.without_tokenizer() {
            Some(encoder) => self.tokenizer_of_folder(folder, encoder.component, encoder.kind),
            None => Ok(()),
        }
    }

    /// What is said of a transformer without a text encoder: which it needs, and where that is.
    pub(super) fn missing_text_encoder(&self) -> Option<String> {
        let release = self.release()?;
        let missing: Vec<&Encoder> = self.lacking_encoders();
        let missing: Vec<&Encoder> = missing.into_iter().filter(|it| !it.is_optional).collect();
        let needed = self.drawn()?.encoders.iter().filter(|it| !it.is_optional);
        let what = match missing.as_slice() {
            [] => return None,
            all if all.len() == needed.count() => release.encoders.to_string(),
            [one, ..] => format!("encoder {}", one.name(self)),
        };
        Some(format!(
            "text {what}: `--text-encoder FILE`{}, or `--text-encoder {}` from the hub",
            if missing.len() > 1 { " for each" } else { "" },
            release.repo
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
        let has_some = ENCODERS.iter().any(|it| self.configs.contains_key(*it));
        let lacks = if has_some { "lacks a" } else { "has no" };
        bail!(
            "`{}` {lacks} text encoder{and}: it is the transformer of {} alone\n\nhint: it needs the {encoder}{vae}",
            self.name,
            self.release().map_or("a model", |release| release.name)
        );
    }

    /// What is known of the family of its transformer, by the names of that.
    pub(super) fn drawn(&self) -> Option<&'static Drawn> {
        let inner = self
            .names()
            .filter_map(|name| name.strip_prefix("transformer."));
        transformers::find(inner)?.0.drawn
    }

    /// Which published model its transformer is.
    pub(super) fn release(&self) -> Option<&'static Release> {
        self.drawn()?.release(self)
    }
}

/// A text encoder that was found, before it is known what it is for.
struct Found {
    path: PathBuf,
    kind: EncoderKind,
    width: usize,
    place: Place,
}

enum Place {
    File {
        prefix: String,
    },
    /// of diffusers or transformers
    Folder {
        config: Value,
    },
}

impl Found {
    /// The encoders of a file or a folder. Errors if there is none.
    fn at(path: &Path) -> Result<Vec<Self>> {
        if !path.is_dir() {
            return Ok(vec![Self::in_file(path)?]);
        }
        let nested = ENCODERS.map(|component| path.join(component));
        let has_config = |folder: &&PathBuf| folder.join("config.json").exists();
        let folders: Vec<&PathBuf> = nested.iter().filter(has_config).collect();
        match (folders.as_slice(), path.join("config.json").exists()) {
            ([], true) => Ok(vec![Self::in_folder(path)?]),
            ([], false) => Ok(vec![Self::in_file(&only_file(path)?)?]),
            (folders, _) => folders
                .iter()
                .map(|folder| Self::in_folder(folder))
                .collect(),
        }
    }

    fn in_folder(folder: &Path) -> Result<Self> {
        let config = read_json(&folder.join("config.json"))?;
        let kind = EncoderKind::of(&config);
        let width = config.get(kind.width_key()).and_then(Value::as_u64);
        Ok(Self {
            path: folder.into(),
            kind,
            width: width.and_then(|it| it.try_into().ok()).unwrap_or(0),
            place: Place::Folder { config },
        })
    }

    fn in_file(path: &Path) -> Result<Self> {
        let source = WeightsFile::open(path)?;
        let keys = source.keys();
        if let Some(file) = EncoderFile::find(keys.iter().map(String::as_str)) {
            return Self::file(path, source, file);
        }
        let shown = path.display();
        let other = OTHER_ENCODERS
            .iter()
            .find(|(start, _)| keys.iter().any(|key| key.starts_with(start)));
        match (other, super::role(path, &keys)) {
            (Some((_, what)), _) => bail!(
                "`{shown}` is {what}, a text encoder that no model here reads\n\nhint: FLUX.2 klein 4B and Z-Image read Qwen3 4B, FLUX.2 klein 9B reads Qwen3 8B, FLUX.1 and Stable Diffusion 3 read CLIP and T5"
            ),
            (None, Some((what, place))) => {
                bail!("`{shown}` {what}, not a text encoder\n\nhint: {place}")
            }
            (None, None) => bail!(
                "`{shown}` is not a text encoder that sdgen knows\n\nhint: `--text-encoder` takes Qwen3, CLIP and T5"
            ),
        }
    }

    fn file(path: &Path, source: WeightsFile, file: EncoderFile) -> Result<Self> {
        let mut tensors = source.tensors();
        let embeddings = tensors.find(|(key, ..)| *key == file.embeddings);
        let width = embeddings.and_then(|(_, shape, _)| shape.get(1).copied());
        Ok(Self {
            path: path.into(),
            kind: file.kind,
            width: width.unwrap_or(0),
            place: Place::File {
                prefix: file.prefix,
            },
        })
    }

    /// The encoder as this component, with its configuration, and its tokenizer where that is beside
    /// it. Errors if it is not whole.
    fn open(&self, component: &'static str) -> Result<Checkpoint> {
        match &self.place {
            Place::Folder { config } => {
                let mut encoder = Checkpoint::empty(model_files::folder_name(&self.path));
                encoder.configs.insert(component.into(), config.clone());
                encoder.add_folder(&self.path, component)?;
                match self.kind {
                    EncoderKind::Clip => encoder.clip_tokenizer(&self.path, component)?,
                    kind => encoder.tokenizer_of_folder(&self.path, component, kind)?,
                }
                Ok(encoder)
            }
            Place::File { prefix } => {
                let mut encoder = Checkpoint::empty(file_name(&self.path));
                let source = WeightsFile::open(&self.path)?;
                if let Some(json) = source.tokenizer() {
                    let tokenizer = TokenizerSource {
                        files: TokenizerFiles::Json(json.into()),
                        config: Value::Null,
                    };
                    encoder.tokenizers.insert(component, tokenizer);
                }
                encoder.add_source(source, |key| match self.kind {
                    EncoderKind::Qwen3 => transformers::qwen3(prefix, key).unwrap_or_default(),
                    _ => key
                        .strip_prefix(prefix)
                        .map(|key| key_mapping::from_diffusers(component, key))
                        .unwrap_or_default(),
                })?;
                infer_config::text_encoder(&mut encoder, component, self.kind).with_context(
                    || format!("`{}` is not a whole text encoder", self.path.display()),
                )?;
                encoder.tokenizer_beside(&self.path, component, self.kind)?;
                Ok(encoder)
            }
        }
    }
}

impl Checkpoint {
    /// Takes the tokenizer that a folder of CLIP's has beside it, or CLIP's own.
    fn clip_tokenizer(&mut self, folder: &Path, component: &'static str) -> Result<()> {
        let name = component.replacen("text_encoder", "tokenizer", 1);
        let beside = folder.parent().map(|parent| parent.join(name));
        let tokenizer = match beside.filter(|folder| folder.is_dir()) {
            Some(folder) => model_files::tokenizer(&folder, false)?,
            None => infer_config::clip_tokenizer(component == ENCODERS[1]),
        };
        self.tokenizers.insert(component, tokenizer);
        Ok(())
    }
}

/// The files of weights of a folder and of those in it that hold parts of models.
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
        paths.extend(files.filter(|path| is_weights(path)));
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
