//! Textual inversion (Gal et al. 2022, arXiv 2208.01618): vectors that were learned for a word of
//! the prompt.
//!
//! Hides in which of the formats of A1111, diffusers and kohya a file holds them; a LoRA's file may
//! hold them beside its layers. The text layer's
//! tokenizer finds them in prompts.

use super::file;
use super::key_mapping::{self, Layout};
use super::model_files::file_name;
use super::weights_file::WeightsFile;
use super::{ENCODERS, family_name, role};
use crate::hex::hex;
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

/// What the key of a word in a LoRA's file begins with, and what it ends with for each encoder: the
/// bundles of A1111, as OneTrainer writes them.
const BUNDLE: &str = "bundle_emb.";
const BUNDLED: [(&str, &str); 4] = [
    (".string_to_param.*", ENCODERS[0]),
    (".emb_params", ENCODERS[0]),
    (".clip_l", ENCODERS[0]),
    (".clip_g", ENCODERS[1]),
];

/// Names of pairs for SDXL's two encoders: kohya's and A1111's, and those of diffusers' training
/// scripts.
const PAIRS: [[&str; 2]; 2] = [["clip_l", "clip_g"], ["text_encoders_0", "text_encoders_1"]];

/// A textual inversion: a token beyond the vocabulary, and the vectors that were learned for it.
#[derive(Clone)]
pub struct Embedding {
    /// the word that stands for it in prompts
    pub token: Arc<str>,
    /// SHA-256 of the file, as sites that share models list it; none where the file is a LoRA's,
    /// whose own hash tells the word too
    pub hash: Option<Arc<str>>,
    /// the file, for people
    pub file: String,
    /// how many vectors it has
    pub vectors: usize,
    /// the vectors [vectors, width] for each text encoder; a single one is the first encoder's
    pub parts: BTreeMap<&'static str, Tensor>,
}

impl Embedding {
    /// Reads the embedding that `FILE:TOKEN` names, or `FILE` alone, whose token is the file's name
    /// without extension. Errors say what the file is if it is not an embedding.
    pub fn asked(text: &OsStr) -> Result<Self> {
        let (path, token) = file_and_token(text);
        let file = path.display().to_string();
        ensure!(
            !token.is_empty(),
            "`{}` names no token\n\nhint: `--embedding FILE:TOKEN`",
            text.display()
        );
        ensure!(
            !file::is_absent(path),
            "there is no file `{file}`\n\nhint: `--embedding` takes a .safetensors file, and perhaps its word in prompts: FILE:TOKEN"
        );
        let source = WeightsFile::open(path)?;
        let keys = keys(&source).with_context(|| format!("`{file}` {}", other(&source)))?;
        let whole = std::fs::read(path).with_context(|| format!("cannot read `{file}`"))?;
        Ok(Self {
            hash: Some(hex(&Sha256::digest(whole)).into()),
            ..Self::read(&source, &token, &keys)?
        })
    }

    /// Reads the vectors of a token from these tensors of a file. Errors if they are no vectors, or
    /// encoders have different numbers of them.
    pub fn read(
        source: &WeightsFile,
        token: &str,
        keys: &BTreeMap<&'static str, String>,
    ) -> Result<Self> {
        let file = source.path().display().to_string();
        let mut parts = BTreeMap::new();
        for (encoder, key) in keys {
            let tensor = source.read(key)?;
            let vectors = match tensor.rank() {
                1 => tensor.unsqueeze(0)?,
                2 => tensor,
                _ => bail!(
                    "tensor `{key}` of `{file}` has the shape {:?}, vectors of a word have two dimensions",
                    tensor.dims()
                ),
            }; // [vectors, width]
            parts.insert(*encoder, vectors);
        }
        let counts: Vec<usize> = parts
            .values()
            .map(|part| part.dim(0))
            .collect::<Result<_, _>>()?;
        let vectors = counts.first().copied().unwrap_or(0);
        if vectors == 0 || counts.iter().any(|n| *n != vectors) {
            let counts: Vec<String> = counts.iter().map(usize::to_string).collect();
            bail!(
                "`{file}` has {} vectors for `{token}`\n\nhint: fetch it again; it is not an embedding that can be used",
                counts.join(" and ")
            );
        }
        Ok(Self {
            token: token.into(),
            hash: None,
            file,
            vectors,
            parts,
        })
    }

    /// Whether another one has the same vectors.
    pub fn is_same(&self, other: &Self) -> Result<bool> {
        if !self.parts.keys().eq(other.parts.keys()) {
            return Ok(false);
        }
        for (own, others) in self.parts.values().zip(other.parts.values()) {
            let values = |part: &Tensor| part.to_dtype(DType::F32)?.to_vec2::<f32>();
            if own.dims() != others.dims() || values(own)? != values(others)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether a file holds an embedding, by its header.
    pub fn is_in(path: &Path) -> bool {
        path.is_file() && WeightsFile::open(path).is_ok_and(|source| keys(&source).is_some())
    }

    /// The widths of its vectors, one for each encoder.
    pub fn widths(&self) -> Vec<usize> {
        self.parts
            .values()
            .filter_map(|part| part.dim(1).ok())
            .collect()
    }

    /// The model family with encoders of these widths.
    pub fn family(&self) -> Option<&'static str> {
        match self.widths()[..] {
            [768] => Some(family_name::SD1),
            [1024] => Some(family_name::SD2),
            [768, 1280] => Some(family_name::SDXL),
            _ => None,
        }
    }

    /// Returns the vectors [vectors, width] for an encoder. Errors if it has none, or of another
    /// width.
    pub fn vectors_for(&self, encoder: &str, width: usize) -> Result<&Tensor> {
        let rows = self
            .parts
            .get(encoder)
            .filter(|rows| rows.dim(1).is_ok_and(|own| own == width));
        rows.with_context(|| self.mismatch(&format!("an encoder of this model takes {width}")))
    }

    /// The error for a model that takes other vectors: `wanted` says which.
    pub fn mismatch(&self, wanted: &str) -> String {
        let widths: Vec<String> = self.widths().iter().map(usize::to_string).collect();
        let hint = match self.family() {
            Some(family) => format!("it was made for {family}"),
            None => "it was made for another model".into(),
        };
        format!(
            "the vectors of `{}` are {} wide, {wanted}\n\nhint: {hint}",
            self.file,
            widths.join(" and ")
        )
    }
}

/// Splits a key of a LoRA's file into the word that the LoRA brings and the encoder of its vectors.
pub fn split_bundled(key: &str) -> Option<(&str, &'static str)> {
    let key = key.strip_prefix(BUNDLE)?;
    let mut ends = BUNDLED.iter();
    let (word, encoder) =
        ends.find_map(|(end, encoder)| Some((key.strip_suffix(end)?, *encoder)))?;
    (!word.is_empty()).then_some((word, encoder))
}

/// Splits `FILE:TOKEN`; a file of that whole name is taken first, and a file's token is its name.
fn file_and_token(text: &OsStr) -> (&Path, String) {
    let split = text
        .to_str()
        .filter(|text| !Path::new(text).exists() && !text.contains("://"))
        .and_then(|text| text.rsplit_once(':'));
    match split {
        Some((path, token)) => (Path::new(path), token.trim().into()),
        None => (Path::new(text), file_name(Path::new(text))),
    }
}

/// The keys of an embedding's tensors by their encoder; nothing if a file does not hold one.
fn keys(source: &WeightsFile) -> Option<BTreeMap<&'static str, String>> {
    let tensors: Vec<_> = source.tensors().collect();
    let is_matrix = |shape: &[usize]| matches!(shape, [_] | [_, _]);
    let names = tensors.iter().map(|(key, ..)| key.as_str());
    if key_mapping::layout(names) != Layout::Unknown {
        return None;
    }
    if tensors.iter().any(|(_, shape, _)| !is_matrix(shape)) {
        return None;
    }
    let pair = |names: &[&str; 2]| {
        names
            .iter()
            .all(|name| tensors.iter().any(|(key, ..)| key == name))
    };
    match (&tensors[..], PAIRS.iter().find(|names| pair(names))) {
        // A1111's and kohya's `emb_params`, diffusers' `<token>`
        ([(key, ..)], _) => Some(BTreeMap::from([(ENCODERS[0], key.clone())])),
        ([_, _], Some(names)) => Some(ENCODERS.into_iter().zip(names.map(String::from)).collect()),
        _ => None,
    }
}

/// The error for a file that is not an embedding: what it is instead.
fn other(source: &WeightsFile) -> String {
    let keys = source.keys();
    let (what, hint) = match role(source.path(), &keys) {
        Some((what, place)) => (format!("{what}, not an embedding"), place),
        None => (
            "is not an embedding".into(),
            "those of A1111 and kohya hold `emb_params`, diffusers' one tensor, SDXL's `clip_l` and `clip_g`",
        ),
    };
    format!("{what}: it has {} tensors\n\nhint: {hint}", keys.len())
}
