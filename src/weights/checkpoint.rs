//! A checkpoint whose headers have been read: its tensors under one naming, its configuration, and
//! what changes its weights as they are read.

use super::embedding::Embedding;
use super::file_hash::FileHashes;
use super::key_mapping::{Named, Part};
use super::lora::{self, LayerNames, Lora};
use super::weights_file::WeightsFile;
use super::{ENCODERS, FLUX_CLASS, PARTS, TRANSFORMER, TokenizerFiles, TokenizerSource, UNET};
use crate::hex::hex;
use crate::nn::blocks::{BlockMatrix, BlockType, row_bytes};
use crate::nn::weights::{TensorSource, Weights, is_same_shape};
use crate::suggest::nearest;
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// The place of a tensor in the checkpoint's files.
struct Entry {
    /// the index of its file
    source: usize,
    key: String,
    part: Part,
    /// the shape of the stored tensor's part, or one with more columns: [`Checkpoint::widened`]
    shape: Vec<usize>,
    dtype: String,
}

/// What a transformer may have in f32 and keep so.
const MOST_WIDE_BYTES: u64 = 4 << 30;

/// A checkpoint whose headers have been read.
pub struct Checkpoint {
    /// for people and file names: the folder's or file's name
    pub name: String,
    pub(super) configs: BTreeMap<String, Value>,
    pub(super) tokenizers: BTreeMap<&'static str, TokenizerSource>,
    /// the folder of diffusers that it was opened from
    pub(super) folder: Option<PathBuf>,
    /// whether its configuration was read, and not inferred from its weights
    pub(super) is_configured: bool,
    pub(super) unexpected_keys: Vec<String>,
    pub(super) assumptions: Vec<String>,
    pub(super) warnings: Vec<String>,
    refiner: Option<Box<Self>>,
    pub(super) vae: Option<Box<Self>>,
    merges: Vec<Merge>,
    loras: Vec<Lora>,
    embeddings: Vec<Embedding>,
    sources: Vec<WeightsFile>,
    entries: BTreeMap<String, Entry>,
}

/// How many bytes the tensors of a network take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockBytes {
    pub all: u64,
    /// those that are in none of the numbered blocks, as `layers.7`
    pub outside: u64,
    /// those of the largest block
    pub largest: u64,
}

/// A weighted difference that is added to a checkpoint's weights: `weight * (other - minus)`, where
/// `minus` is the checkpoint itself if none is given.
pub struct Merge {
    pub other: Checkpoint,
    pub minus: Option<Checkpoint>,
    pub weight: f64,
}

impl Checkpoint {
    pub(super) fn empty(name: String) -> Self {
        Self {
            name,
            configs: BTreeMap::new(),
            tokenizers: BTreeMap::new(),
            folder: None,
            is_configured: false,
            unexpected_keys: vec![],
            assumptions: vec![],
            warnings: vec![],
            refiner: None,
            vae: None,
            merges: vec![],
            loras: vec![],
            embeddings: vec![],
            sources: vec![],
            entries: BTreeMap::new(),
        }
    }

    /// The refiner that finishes what this model begins.
    pub fn refiner(&self) -> Option<&Self> {
        self.refiner.as_deref()
    }

    /// The VAE that decodes in place of the model's own.
    pub fn vae(&self) -> Option<&Self> {
        self.vae.as_deref()
    }

    /// The checkpoints that are merged into its weights as they are read.
    pub fn merges(&self) -> &[Merge] {
        &self.merges
    }

    /// The LoRAs that change its weights as they are read.
    pub fn loras(&self) -> &[Lora] {
        &self.loras
    }

    /// Its textual inversions: words beyond its vocabulary.
    pub fn embeddings(&self) -> &[Embedding] {
        &self.embeddings
    }

    /// Has another model finish what this one begins; it takes over the textual inversions.
    pub fn use_refiner(&mut self, mut refiner: Self) {
        refiner.embeddings = self.embeddings.clone();
        self.refiner = Some(Box::new(refiner));
    }

    /// Applies LoRAs to the weights as they are read, but for those without effect. One that was
    /// distilled to few steps, by its name, brings its scheduler to a U-Net. Errors if one does not
    /// fit, with `strict` also if some of its keys are unexpected.
    pub fn use_loras(
        &mut self,
        loras: impl IntoIterator<Item = Result<Lora>>,
        strict: bool,
    ) -> Result<()> {
        let loras = loras.into_iter().collect::<Result<Vec<_>>>()?;
        if loras.is_empty() {
            return Ok(());
        }
        let names = LayerNames::of(self);
        self.take_control_image(&loras, &names);
        for mut lora in loras {
            lora.match_keys(self, &names)?;
            if let Some(unexpected) = lora.describe_unexpected().filter(|_| strict) {
                bail!("{unexpected}\n\nhint: without `--strict` the rest of it is used");
            }
            if lora.is_without_effect() {
                continue;
            }
            // such names tell of noise levels of U-Nets
            let named = lora.distillation().filter(|_| self.denoiser() == UNET);
            if let (Some(named), Some(Value::Object(scheduler))) =
                (named, self.configs.get_mut("scheduler"))
            {
                scheduler.extend(named.scheduler.as_object().cloned().unwrap_or_default());
            }
            self.loras.push(lora);
        }
        Ok(())
    }

    /// Makes a FLUX.1 that takes latents alone one that takes those of a control image too, if one of
    /// the LoRAs is for that: as in diffusers, with zeros for what the LoRA then changes.
    fn take_control_image(&mut self, loras: &[Lora], names: &LayerNames) {
        const EMBEDDER: &str = "transformer.x_embedder";
        let Some(Value::Object(config)) = self.configs.get_mut(TRANSFORMER) else {
            return;
        };
        let Some(entry) = self.entries.get_mut(&format!("{EMBEDDER}.weight")) else {
            return;
        };
        let [rows, channels] = entry.shape[..] else {
            return;
        };
        let takes = config.get("in_channels").unwrap_or(&Value::Null);
        let gives = config.get("out_channels").unwrap_or(&Value::Null);
        let is_flux1 = config.get("_class_name").is_some_and(|it| it == FLUX_CLASS);
        let is_alike = gives.is_null() || gives == takes;
        let is_told = |lora: &Lora| lora.doubles(EMBEDDER, (rows, channels), names);
        if is_flux1 && is_alike && loras.iter().any(is_told) {
            entry.shape = vec![rows, 2 * channels];
            config.insert("in_channels".into(), (2 * channels).into());
            config.insert("out_channels".into(), channels.into());
        }
    }

    /// The width of the U-Net's text embeddings, `cross_attention_dim`.
    pub(super) fn text_width(&self) -> Option<usize> {
        let takes_text =
            |name: &str| name.starts_with("unet.") && name.ends_with(".attn2.to_k.weight");
        self.entries
            .iter()
            .find(|(name, _)| takes_text(name))
            .and_then(|(_, entry)| entry.shape.get(1).copied())
    }

    /// Adds words beyond the vocabulary, and those that its LoRAs bring, to its refiner too. Errors
    /// if two have the same token and different vectors.
    pub fn use_embeddings(&mut self, embeddings: Vec<Embedding>) -> Result<()> {
        let of_loras = self.loras.iter().map(Lora::embeddings);
        let of_loras = of_loras.collect::<Result<Vec<_>>>()?.concat();
        let mut all: BTreeMap<String, Embedding> = BTreeMap::new();
        let mut order = vec![];
        for embedding in embeddings.into_iter().chain(of_loras) {
            let word = embedding.token.to_lowercase();
            let Some(first) = all.get(&word) else {
                order.push(word.clone());
                all.insert(word, embedding);
                continue;
            };
            if first.is_same(&embedding)? {
                continue;
            }
            let (token, file) = (&embedding.token, &embedding.file);
            // what `--embedding` gives comes first, and its word can be chosen
            let hint = match (&first.hash, &embedding.hash) {
                (_, Some(_)) => {
                    format!("give one another word in prompts: `--embedding {file}:TOKEN`")
                }
                (Some(_), None) => format!(
                    "give the first another word in prompts: `--embedding {}:TOKEN`",
                    first.file
                ),
                (None, None) => "draw with one of these LoRAs alone".into(),
            };
            bail!(
                "two embeddings stand for `{token}`, of `{}` and `{file}`\n\nhint: {hint}",
                first.file
            );
        }
        let embeddings: Vec<Embedding> = order.iter().filter_map(|word| all.remove(word)).collect();
        if let Some(refiner) = &mut self.refiner {
            refiner.embeddings = embeddings.clone();
        }
        self.embeddings = embeddings;
        Ok(())
    }

    /// The checkpoint that holds the weights of a component: this one, or the VAE's.
    fn holder(&self, component: &str) -> &Self {
        self.vae
            .as_deref()
            .filter(|_| component == "vae")
            .unwrap_or(self)
    }

    /// The cause of an error about a checkpoint that is only a part of one.
    pub(super) fn missing_parts(&self, name: &str) -> String {
        let found: Vec<&str> = PARTS.into_iter().filter(|p| self.has(p)).collect();
        let is_missing = |part: &&str| {
            !found.contains(part)
                && *part != TRANSFORMER
                && !ENCODERS[1..].contains(part)
                && (*part != ENCODERS[0] || !self.has(ENCODERS[1]))
        };
        let missing: Vec<&str> = PARTS.into_iter().filter(is_missing).collect();
        let found = if found.is_empty() {
            "nothing that sdgen knows".into()
        } else {
            found.join(", ")
        };
        let missing = missing.join(" and no ");
        format!("`{name}` has no {missing} (it has: {found})")
    }

    /// Errors if there is no VAE, without which latents cannot be decoded.
    pub fn require_vae(&self) -> Result<()> {
        if self.optional_config("vae").is_some() {
            return Ok(());
        }
        if let Some(vae) = self.missing_vae() {
            bail!("`{}` has no VAE\n\nhint: it needs the {vae}", self.name);
        }
        bail!(
            "{}\n\nhint: pass one with `--vae`",
            self.missing_parts(&self.name)
        )
    }

    /// The component that denoises.
    pub fn denoiser(&self) -> &'static str {
        match self.configs.contains_key(TRANSFORMER) {
            true => TRANSFORMER,
            false => UNET,
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

    /// Whether any tensor of a component is there, or in the VAE that decodes in its place.
    pub(super) fn has_part(&self, component: &str) -> bool {
        self.holder(component).has(component)
    }

    pub(super) fn add_source(
        &mut self,
        source: WeightsFile,
        map: impl Fn(&str) -> Vec<Named>,
    ) -> Result<()> {
        let index = self.sources.len();
        for (key, shape, dtype) in source.tensors() {
            let named = map(&key);
            if named.is_empty() {
                self.unexpected_keys.push(key.clone());
            }
            for Named { name, part } in named {
                let shape = part_shape(&shape, &part);
                let entry = Entry {
                    source: index,
                    key: key.clone(),
                    part,
                    shape,
                    dtype: dtype.clone(),
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

    /// Takes a component of another checkpoint in place of its own, with its configuration, and its
    /// tokenizer if it has one.
    /// One component, with its configuration.
    pub(super) fn alone(mut self, component: &str) -> Self {
        let prefix = format!("{component}.");
        self.entries.retain(|name, _| name.starts_with(&prefix));
        self.configs.retain(|name, _| name == component);
        self.tokenizers.clear();
        self
    }

    pub(super) fn take_component(&mut self, mut other: Self, component: &'static str) {
        let prefix = format!("{component}.");
        self.entries.retain(|name, _| !name.starts_with(&prefix));
        let before = self.sources.len();
        self.sources.append(&mut other.sources);
        let taken = other.entries.into_iter().map(|(name, entry)| {
            let source = before + entry.source;
            (name, Entry { source, ..entry })
        });
        self.entries.extend(taken);
        self.configs.append(&mut other.configs);
        self.tokenizers.append(&mut other.tokenizers);
        self.unexpected_keys.append(&mut other.unexpected_keys);
    }

    /// The shape of a tensor by its canonical name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|e| e.shape.as_slice())
    }

    /// Iterates over the canonical names of all tensors.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Counts the numbered children of `prefix`: `prefix0.`, `prefix1.`, ...
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

    /// The names, shapes and stored types of a component's tensors.
    pub(super) fn tensors_of(
        &self,
        component: &str,
    ) -> impl Iterator<Item = (&str, &[usize], &str)> {
        self.entries_of(component)
            .map(|(name, entry)| (name.as_str(), entry.shape.as_slice(), entry.dtype.as_str()))
    }

    /// The type in which a tensor is stored, whichever checkpoint holds its component.
    pub(super) fn stored_as(&self, name: &str) -> Option<&str> {
        let entries = &self.holder(component_of(name)).entries;
        entries.get(name).map(|entry| entry.dtype.as_str())
    }

    /// The shape of a tensor, whichever checkpoint holds its component.
    pub(super) fn shape_of(&self, name: &str) -> Option<&[usize]> {
        self.holder(component_of(name)).shape(name)
    }

    /// Counts the numbered children of a place in a component.
    pub(super) fn count_of(&self, component: &str, prefix: &str) -> usize {
        self.holder(component)
            .count(&format!("{component}.{prefix}"))
    }

    /// Reads a tensor of any component with all that changes it, as wide as that leaves it.
    pub(super) fn read_patched(&self, name: &str) -> Result<Tensor> {
        self.holder(component_of(name)).patched(name)
    }

    /// A tensor with other checkpoints merged into it and then with what LoRAs add, in its stored
    /// type: each as if the result had been saved.
    fn patched(&self, name: &str) -> Result<Tensor> {
        let merged = self.merged(name, self.read_own(name)?)?;
        lora::patch(&self.loras, name, self.widened(name, merged)?)
    }

    /// A tensor with zeros for the columns that its file does not have.
    fn widened(&self, name: &str, stored: Tensor) -> Result<Tensor> {
        let shape = self.entries.get(name).map(|entry| &entry.shape[..]);
        let (Some([rows, columns]), [_, own]) = (shape, stored.dims()) else {
            return Ok(stored);
        };
        match columns.saturating_sub(*own) {
            0 => Ok(stored),
            missing => {
                let zeros = Tensor::zeros((*rows, missing), stored.dtype(), stored.device())?;
                Ok(Tensor::cat(&[&stored, &zeros], 1)?)
            }
        }
    }

    /// Whether the matrices of a component are kept in bf16 though its files have them in f32, or in
    /// blocks that are read as that: those of a large transformer, and of any large network in
    /// blocks, as no machine that draws with it holds twice as much.
    fn is_narrowed(&self, component: &str) -> bool {
        let is_wide = |(name, entry): &(&String, &Entry)| match entry.dtype.as_str() {
            "f32" => component == TRANSFORMER,
            dtype => {
                BlockType::named(dtype).is_some() && self.kept_in_blocks(name, entry).is_none()
            }
        };
        let wide = self.entries_of(component).filter(is_wide);
        let bytes: u64 = wide
            .map(|(_, e)| 4 * e.shape.iter().product::<usize>() as u64)
            .sum();
        bytes > MOST_WIDE_BYTES
    }

    /// The bytes of a tensor that stays in blocks in memory: those of a matrix of whole blocks to which
    /// nothing is added.
    fn kept_in_blocks(&self, name: &str, entry: &Entry) -> Option<u64> {
        let kind = BlockType::named(&entry.dtype)?;
        let [rows, columns, more @ ..] = &*entry.shape else {
            return None;
        };
        if entry.part == Part::Transposed || more.iter().any(|size| *size != 1) {
            return None;
        }
        let component = component_of(name);
        let is_changed = self.loras.iter().any(|lora| lora.changes(name))
            || self.merges.iter().any(|merge| merge.other.has(component));
        let bytes = (rows * row_bytes(kind, *columns)?) as u64;
        (!is_changed).then_some(bytes)
    }

    /// Returns the number of parameters of a component, and the types that they are stored in.
    pub fn summary(&self, component: &str) -> (usize, BTreeSet<&str>) {
        let of = || self.entries_of(component);
        (
            of().map(|(_, e)| e.shape.iter().product::<usize>()).sum(),
            of().map(|(_, e)| e.dtype.as_str()).collect(),
        )
    }

    /// The bytes of a component's weights in memory, where they stay as narrow as in their file:
    /// [`Weights::get_stored`].
    pub fn stored_bytes(&self, component: &str) -> u64 {
        self.block_bytes(component, |_| true).all
    }

    /// The same of the tensors for whose names in the component `is_read` holds, by their blocks.
    pub fn block_bytes(&self, component: &str, is_read: impl Fn(&str) -> bool) -> BlockBytes {
        let is_narrowed = self.is_narrowed(component);
        let width = |dtype: &str| {
            if is_narrowed || matches!(dtype, "f16" | "bf16" | "f8_e4m3" | "f8_e5m2") {
                2
            } else {
                4
            }
        };
        let (mut bytes_of, mut blocks) = (BlockBytes::default(), BTreeMap::new());
        for (full_name, entry) in self.entries_of(component) {
            let name = full_name.get(component.len() + 1..).unwrap_or_default();
            if !is_read(name) {
                continue;
            }
            let numbers = entry.shape.iter().product::<usize>() as u64;
            let in_blocks = self.kept_in_blocks(full_name, entry);
            let bytes = in_blocks.unwrap_or_else(|| width(&entry.dtype) * numbers);
            bytes_of.all += bytes;
            let is_number = |part: &str| part.parse::<usize>().is_ok();
            let mut end = 0;
            let number = name.split('.').find(|part| {
                end += part.len() + 1;
                is_number(part)
            });
            match number.and_then(|_| name.get(..end)) {
                Some(block) => *blocks.entry(block).or_insert(0) += bytes,
                None => bytes_of.outside += bytes,
            }
        }
        bytes_of.largest = blocks.into_values().max().unwrap_or(0);
        bytes_of
    }

    /// The shapes of a component's tensors, by their canonical names without the component's.
    pub fn shapes<'a>(
        &'a self,
        component: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a [usize])> {
        let of_component = |name: &'a String| name.get(component.len() + 1..);
        self.entries_of(component)
            .filter_map(move |(name, entry)| Some((of_component(name)?, &*entry.shape)))
    }

    /// The size of all its files in bytes.
    pub fn bytes(&self) -> u64 {
        self.sources.iter().map(|s| s.len).sum()
    }

    /// The configuration of a component, in diffusers' words; `pipeline` is `model_index.json`.
    /// Errors name the component if it has none.
    pub fn config(&self, component: &str) -> Result<&Value> {
        self.optional_config(component)
            .with_context(|| format!("`{}` has no configuration of its {component}", self.name))
    }

    /// The configuration of a component that may be missing.
    pub fn optional_config(&self, component: &str) -> Option<&Value> {
        self.configs.get(component)
    }

    /// The tokenizer of a text encoder. Errors if there is none.
    pub fn tokenizer(&self, encoder: &str) -> Result<&TokenizerSource> {
        self.tokenizers
            .get(encoder)
            .with_context(|| format!("`{}` has no tokenizer for its {encoder}", self.name))
    }

    /// Keys of its files that belong to no component.
    pub fn unexpected_keys(&self) -> &[String] {
        &self.unexpected_keys
    }

    /// What had to be assumed because no configuration says it, for people.
    pub fn assumptions(&self) -> &[String] {
        &self.assumptions
    }

    /// Assumptions that are wrong for some known models.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// A fingerprint of the weights: SHA-256 over the names, stored types and first 4 KiB of all
    /// tensors. The same weights as folder and as single file have the same fingerprint; f16 and
    /// f32 copies do not.
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

    /// The only file that it consists of, for people; none of folders.
    pub fn only_file(&self) -> Option<&WeightsFile> {
        match self.sources.as_slice() {
            [file] => Some(file),
            _ => None,
        }
    }

    /// SHA-256 of the only file that it consists of, by which A1111 and sites that share models know
    /// it; none of folders. Errors if the file cannot be read.
    pub fn file_hash(&self, hashes: &FileHashes) -> Result<Option<String>> {
        self.only_file()
            .map(|file| file.file_hash(hashes))
            .transpose()
    }

    /// SHA-256 of what draws besides weights: the configurations of its parts, the scheduler's, and
    /// the tokenizers, of its refiner and its other VAE too. None where all of it is inferred from
    /// the weights.
    pub fn config_hash(&self) -> Option<String> {
        let parts = [Some(self), self.refiner(), self.vae()];
        let mut configured = parts
            .into_iter()
            .flatten()
            .filter(|part| part.is_configured)
            .peekable();
        configured.peek()?;
        let mut hash = Sha256::new();
        for part in configured {
            for (component, config) in &part.configs {
                hash.update(component.as_bytes());
                update_with(&mut hash, config);
            }
            for (encoder, TokenizerSource { files, config }) in &part.tokenizers {
                hash.update(encoder.as_bytes());
                match files {
                    TokenizerFiles::Json(text) => hash.update(text.as_bytes()),
                    TokenizerFiles::VocabMerges { vocab, merges } => {
                        hash.update(vocab.as_bytes());
                        hash.update(merges.as_bytes());
                    }
                    TokenizerFiles::Clip => (),
                }
                update_with(&mut hash, config);
            }
        }
        Some(hex(&hash.finalize()))
    }

    /// The weights of one component, to build a network from.
    pub fn weights<'a>(&'a self, component: &str, device: &'a Device, dtype: DType) -> Weights<'a> {
        Weights::new(self.holder(component), component, device, dtype)
    }

    /// Reads a network from the weights of one component, or from its tensors below `parts`. Errors
    /// if it leaves one of them unused, but for what many files have besides a network's weights:
    /// its configuration and its weights do not belong together.
    pub fn read_network<T>(
        &self,
        component: &str,
        parts: &[&str],
        (device, dtype): (&Device, DType),
        build: impl FnOnce(&Weights) -> Result<T>,
    ) -> Result<T> {
        let source = Recorded {
            checkpoint: self.holder(component),
            read: Mutex::default(),
        };
        let network = build(&Weights::new(&source, component, device, dtype))?;
        let read = source.read.into_inner().unwrap_or_default();
        let is_part = |name: &str| {
            let name = name.strip_prefix(component).unwrap_or_default();
            let name = name.strip_prefix('.').unwrap_or_default();
            parts.is_empty() || parts.iter().any(|part| name.starts_with(part))
        };
        let unused: Vec<&str> = self
            .entries_of(component)
            .map(|(name, _)| name.as_str())
            .filter(|name| !read.contains(*name) && is_part(name))
            .filter(|name| !is_leftover(name))
            .collect();
        let Some(first) = unused.first() else {
            return Ok(network);
        };
        bail!(
            "the configuration of `{component}` leaves {} of its tensors in `{}` unused, such as `{first}`\n\nhint: its configuration and its weights do not belong together; fetch both again",
            unused.len(),
            source.checkpoint.name
        )
    }

    /// Merges another checkpoint into those parts of this one that both have. Errors if a tensor of
    /// these is missing there, or has another shape.
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
                    .is_some_and(|found| is_same_shape(&found.shape, &entry.shape));
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

    /// Reads a tensor from this checkpoint's files, on the CPU.
    fn read_own(&self, name: &str) -> Result<Tensor> {
        let entry = self
            .entries
            .get(name)
            .with_context(|| self.missing_tensor(name))?;
        let source = self
            .sources
            .get(entry.source)
            .with_context(|| format!("the file of tensor `{name}` is not open"))?;
        source.read_part(&entry.key, &entry.part)
    }

    /// A tensor of this checkpoint with what is merged into it, in its stored type.
    fn merged(&self, name: &str, own: Tensor) -> Result<Tensor> {
        let component = component_of(name);
        let mut merged: Option<Tensor> = None;
        let merges = self.merges.iter();
        for merge in merges.filter(|merge| merge.other.has(component)) {
            let wide = own.to_dtype(DType::F32)?;
            let minus = merge.minus.as_ref().filter(|minus| minus.has(component));
            let base = match minus {
                Some(minus) => minus.read_own(name)?.to_dtype(DType::F32)?,
                None => wide.clone(),
            };
            let other = merge.other.read_own(name)?.to_dtype(DType::F32)?;
            let difference = (other.reshape(wide.shape())? - base.reshape(wide.shape())?)?;
            let added = (difference * merge.weight)?;
            merged = Some((merged.unwrap_or(wide) + added)?);
        }
        match merged {
            Some(merged) => Ok(merged.to_dtype(own.dtype())?),
            None => Ok(own),
        }
    }

    /// The error for a tensor that is not there.
    pub(super) fn missing_tensor(&self, name: &str) -> String {
        let component = component_of(name);
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

/// The component of a tensor.
fn component_of(name: &str) -> &str {
    name.split('.').next().unwrap_or_default()
}

/// Whether a tensor is one that no network reads, and many files have.
pub(super) fn is_leftover(name: &str) -> bool {
    LEFTOVERS.iter().any(|leftover| name.contains(leftover))
}

/// Parts of the names of tensors that files have besides what a network reads: positions counted
/// up, what CLIP's training and its image encoder need, and the projection of an encoder whose
/// hidden states alone are used.
const LEFTOVERS: [&str; 8] = [
    "position_ids",
    "num_batches_tracked",
    "logit_scale",
    "attn_mask",
    "vision_model.",
    "visual_projection",
    "text_encoder.text_projection",
    "text_encoder.text_model.text_projection",
];

/// A checkpoint that remembers which of its tensors were read.
struct Recorded<'a> {
    checkpoint: &'a Checkpoint,
    read: Mutex<BTreeSet<String>>,
}

impl TensorSource for Recorded<'_> {
    fn name(&self) -> &str {
        self.checkpoint.name()
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        read.insert(name.into());
        drop(read);
        self.checkpoint.tensor(name, shape)
    }

    fn blocks(&self, name: &str, shape: [usize; 2]) -> Result<Option<BlockMatrix>> {
        let blocks = self.checkpoint.blocks(name, shape)?;
        if blocks.is_some() {
            let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
            read.insert(name.into());
        }
        Ok(blocks)
    }
}

impl TensorSource for Checkpoint {
    fn name(&self) -> &str {
        &self.name
    }

    /// Reads a tensor with all that changes it, those of large transformers in bf16.
    fn tensor(&self, name: &str, _shape: &[usize]) -> Result<Tensor> {
        let patched = self.patched(name)?;
        let component = component_of(name);
        let is_wide = patched.dtype() == DType::F32 && patched.rank() > 1;
        match is_wide && self.is_narrowed(component) {
            true => Ok(patched.to_dtype(DType::BF16)?),
            false => Ok(patched),
        }
    }

    fn blocks(&self, name: &str, shape: [usize; 2]) -> Result<Option<BlockMatrix>> {
        let entry = self.entries.get(name).filter(|entry| {
            is_same_shape(&entry.shape, &shape) && self.kept_in_blocks(name, entry).is_some()
        });
        let Some((entry, source)) = entry.and_then(|it| Some((it, self.sources.get(it.source)?)))
        else {
            return Ok(None);
        };
        let rows = source.read_blocks(&entry.key, &entry.part)?;
        let [outputs, inputs] = shape;
        Ok(rows.and_then(|rows| BlockMatrix::new(outputs, inputs, rows)))
    }
}

/// Keys of configurations that say who wrote them, and draw nothing.
const PROVENANCE: [&str; 11] = [
    "_diffusers_version",
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "architectures",
    "special_tokens_map_file",
    "tokenizer_file",
    "feature_extractor",
    "safety_checker",
];

/// Adds a configuration to a hash, whatever the order of its keys. What is null counts as absent.
fn update_with(hash: &mut Sha256, config: &Value) {
    match config {
        Value::Object(map) => {
            let sorted: BTreeMap<_, _> = map
                .iter()
                .filter(|(key, value)| !value.is_null() && !PROVENANCE.contains(&key.as_str()))
                .collect();
            hash.update(b"{");
            for (key, value) in sorted {
                hash.update(Value::from(key.as_str()).to_string().as_bytes());
                hash.update(b":");
                update_with(hash, value);
            }
            hash.update(b"}");
        }
        Value::Array(values) => {
            hash.update(b"[");
            for value in values {
                update_with(hash, value);
                hash.update(b",");
            }
            hash.update(b"]");
        }
        // 1 and 1.0 are the same
        Value::Number(number) => match number.as_f64() {
            Some(number) => hash.update(number.to_le_bytes()),
            None => hash.update(number.to_string().as_bytes()),
        },
        other => hash.update(other.to_string().as_bytes()),
    }
}

/// The shape of a part of a stored tensor.
fn part_shape(shape: &[usize], part: &Part) -> Vec<usize> {
    let mut shape = shape.to_vec();
    match (part, shape.first_mut()) {
        (Part::Rows { count, of, .. }, Some(rows)) => *rows = *rows / of * count,
        (Part::Transposed, _) => shape.reverse(),
        _ => (),
    }
    shape
}
