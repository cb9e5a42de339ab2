//! Which files of a model's folder are read: weights, tokenizer, JSON.
//!
//! [`weight_files`] holds the rules for weights, for folders and for repositories of the hub alike.

use super::file::read_text;
use super::{TokenizerFiles, TokenizerSource};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The file names, without ending, of a model's weights: diffusers' and transformers'.
const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];

/// The precision of the weights that are taken where a network comes in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// files without a variant: usually f32
    Full,
    /// the variant `fp16`
    Half,
}

impl Precision {
    fn in_order(self) -> [Self; 2] {
        match self {
            Self::Full => [Self::Full, Self::Half],
            Self::Half => [Self::Half, Self::Full],
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::Full => "",
            Self::Half => ".fp16",
        }
    }
}

/// The weight files of one network, by their names in its folder.
#[derive(Debug, PartialEq, Eq)]
pub struct WeightFiles {
    /// the index that lists the files, where the weights are sharded
    pub index: Option<String>,
    /// one file, or all shards
    pub files: Vec<String>,
}

/// Why a folder has no complete weights.
#[derive(Debug)]
pub enum NoWeights {
    /// neither a weight file nor an index is there
    Absent,
    /// an index lists a shard that is not in the folder
    MissingShard { index: String, shard: String },
    /// an index has no shards
    EmptyIndex(String),
    /// an index cannot be read
    Unreadable(anyhow::Error),
}

/// Chooses the weight files of one network among those for which `exists` is true: of the preferred
/// precision if all its files are there, else of the other; one file before shards. `read_index`
/// parses an index, which is called `model.fp16.safetensors.index.json` or, as diffusers writes it,
/// `model.safetensors.index.fp16.json`. Where shards are missing the error names one of full
/// precision, if that has an index.
pub fn weight_files(
    stems: &[&str],
    preferred: Precision,
    exists: &dyn Fn(&str) -> bool,
    read_index: &mut dyn FnMut(&str) -> Result<Value>,
) -> Result<WeightFiles, NoWeights> {
    let mut incomplete = vec![];
    for precision in preferred.in_order() {
        let variant = precision.suffix();
        for stem in stems {
            let single = format!("{stem}{variant}.safetensors");
            if exists(&single) {
                return Ok(WeightFiles {
                    index: None,
                    files: vec![single],
                });
            }
            let indices = [
                format!("{stem}.safetensors.index{variant}.json"),
                format!("{stem}{variant}.safetensors.index.json"),
            ];
            for index in indices.into_iter().filter(|index| exists(index)) {
                let content = read_index(&index).map_err(NoWeights::Unreadable)?;
                let Some(shards) = shards(&content) else {
                    return Err(NoWeights::EmptyIndex(index));
                };
                let is_there = |shard: &str| {
                    let is_plain = Path::new(shard).file_name().is_some_and(|n| n == shard);
                    is_plain && exists(shard)
                };
                match shards.iter().find(|shard| !is_there(shard)) {
                    Some(shard) => {
                        let shard = shard.clone();
                        incomplete.push((precision, NoWeights::MissingShard { index, shard }));
                    }
                    None => {
                        return Ok(WeightFiles {
                            index: Some(index),
                            files: shards.into_iter().collect(),
                        });
                    }
                }
            }
        }
    }
    let reported = incomplete
        .into_iter()
        .min_by_key(|(precision, _)| *precision != Precision::Full);
    Err(reported.map_or(NoWeights::Absent, |(_, error)| error))
}

/// The files that an index lists, each once; nothing where it is not an index.
fn shards(index: &Value) -> Option<BTreeSet<String>> {
    index
        .get("weight_map")?
        .as_object()?
        .values()
        .map(|shard| shard.as_str().map(String::from))
        .collect::<Option<BTreeSet<_>>>()
        .filter(|shards| !shards.is_empty())
}

/// Returns the paths of the weight files in one component's folder: full precision first, then
/// `fp16`. Errors say what is there instead, or which file is missing.
pub fn weight_paths(folder: &Path) -> Result<Vec<PathBuf>> {
    let found = weight_files(
        &STEMS,
        Precision::Full,
        &|file| folder.join(file).exists(),
        &mut |index| read_json(&folder.join(index)),
    );
    match found {
        Ok(found) => Ok(found.files.iter().map(|file| folder.join(file)).collect()),
        Err(NoWeights::MissingShard { index, shard }) => bail!(
            "`{}` lists the shard `{shard}`, which is not there\n\nhint: fetch the model again",
            folder.join(index).display()
        ),
        Err(NoWeights::EmptyIndex(index)) => bail!(
            "`{}` lists no shards\n\nhint: fetch the model again",
            folder.join(index).display()
        ),
        Err(NoWeights::Unreadable(error)) => Err(error),
        Err(NoWeights::Absent) => bail!(
            "`{}` has no safetensors weights\n\nhint: {}",
            folder.display(),
            remedy_for_absent(folder)?
        ),
    }
}

/// What to do about a folder without safetensors weights.
fn remedy_for_absent(folder: &Path) -> Result<String> {
    let pickles: Vec<String> = std::fs::read_dir(folder)
        .with_context(|| format!("cannot read folder `{}`", folder.display()))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.ends_with(".bin") || name.ends_with(".ckpt") || name.ends_with(".pt"))
        .collect();
    Ok(if pickles.is_empty() {
        "fetch the model again, for example with `sdgen pull`".into()
    } else {
        format!(
            "it has only {}, a PyTorch pickle; convert the model to safetensors with diffusers: `save_pretrained(..., safe_serialization=True)`",
            pickles.join(", ")
        )
    })
}

/// Reads the tokenizer of a model's folder. A language model's is in tokenizer.json (`is_chat`),
/// CLIP's there only where vocab.json and merges.txt are not.
pub fn tokenizer(folder: &Path, is_chat: bool) -> Result<TokenizerSource> {
    let mut config = serde_json::Map::new();
    // special_tokens_map.json wins over tokenizer_config.json, as in transformers: only there does
    // SD2.1 say that it pads with `!`
    for file in ["tokenizer_config.json", "special_tokens_map.json"] {
        let path = folder.join(file);
        if path.exists() {
            config.extend(read_json(&path)?.as_object().cloned().unwrap_or_default());
        }
    }
    // words that were added to the vocabulary, with their ids
    let added = folder.join("added_tokens.json");
    if added.exists() {
        config.insert("added_tokens".into(), read_json(&added)?);
    }
    let (vocab, merges) = (folder.join("vocab.json"), folder.join("merges.txt"));
    let files = if !is_chat && vocab.exists() && merges.exists() {
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

/// The name of a model in a folder: the folder's, or `owner/name` in the hub's cache.
pub fn folder_name(path: &Path) -> String {
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

/// The name of a model in a file: the file's without its ending.
pub fn file_name(path: &Path) -> String {
    path.file_stem()
        .map(|stem| stem.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Parses a JSON file.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = read_text(path)?;
    // Python writes `"lambda_min_clipped": -Infinity`, which is not JSON; it is that setting's
    // default
    let text = text.replace(": -Infinity", ": null");
    serde_json::from_str(text.trim_start_matches('\u{feff}'))
        .with_context(|| format!("`{}` is not valid JSON", path.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    const SINGLE: &str = "model.safetensors";
    const HALF: &str = "model.fp16.safetensors";
    const INDEX: &str = "model.safetensors.index.json";
    const HALF_INDEX: &str = "model.safetensors.index.fp16.json";
    const HALF_INDEX_TOO: &str = "model.fp16.safetensors.index.json";

    /// What is chosen in a folder of these files, whose indices list the shards `a` and `b`, or for
    /// `fp16` `c`.
    fn chosen(preferred: Precision, files: &[&str]) -> Result<WeightFiles, NoWeights> {
        weight_files(
            &["model"],
            preferred,
            &|file| files.contains(&file),
            &mut |index| {
                Ok(if index.contains("fp16") {
                    json!({ "weight_map": { "x": "c" } })
                } else {
                    json!({ "weight_map": { "x": "b", "y": "a", "z": "a" } })
                })
            },
        )
    }

    #[test]
    fn the_preferred_precision_is_taken_if_it_is_complete() {
        let found = |preferred, files: &[&str]| chosen(preferred, files).unwrap().files;
        for (preferred, first, second) in [
            (Precision::Full, SINGLE, HALF),
            (Precision::Half, HALF, SINGLE),
        ] {
            assert_eq!(found(preferred, &[SINGLE, HALF]), [first]);
            assert_eq!(found(preferred, &[second]), [second]);
        }
        assert_eq!(found(Precision::Half, &[SINGLE, HALF_INDEX]), [SINGLE]);
        assert_eq!(found(Precision::Full, &[HALF, INDEX, "a"]), [HALF]);
    }

    #[test]
    fn shards_come_once_each_with_their_index() {
        for (files, index, shards) in [
            (&[INDEX, "a", "b"][..], INDEX, &["a", "b"][..]),
            (&[HALF_INDEX, "c"], HALF_INDEX, &["c"]),
            (&[HALF_INDEX_TOO, "c"], HALF_INDEX_TOO, &["c"]),
        ] {
            let found = chosen(Precision::Half, files).unwrap();
            assert_eq!(found.index.as_deref(), Some(index));
            assert_eq!(found.files, shards);
        }
    }

    #[test]
    fn a_missing_shard_of_full_precision_is_reported_first() {
        for preferred in [Precision::Full, Precision::Half] {
            let error = chosen(preferred, &[INDEX, HALF_INDEX, "a"]).unwrap_err();
            assert!(matches!(error, NoWeights::MissingShard { shard, .. } if shard == "b"));
            let error = chosen(preferred, &[HALF_INDEX]).unwrap_err();
            assert!(matches!(error, NoWeights::MissingShard { shard, .. } if shard == "c"));
            assert!(matches!(chosen(preferred, &["a"]), Err(NoWeights::Absent)));
        }
    }

    #[test]
    fn a_shard_outside_of_the_folder_counts_as_missing() {
        let read = |_: &str| Ok(json!({ "weight_map": { "x": "../evil" } }));
        let error = weight_files(
            &["model"],
            Precision::Full,
            &|file| [INDEX, "../evil"].contains(&file),
            &mut { read },
        );
        assert!(matches!(error, Err(NoWeights::MissingShard { shard, .. }) if shard == "../evil"));
    }
}
