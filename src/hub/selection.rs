//! Which files of a repository make a model: a pure function of their names and of a few small JSON
//! files, the same for a repository on the hub and for a snapshot in the cache.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Result, anyhow};
use serde_json::Value;

use super::Wanted;
use super::reference::Reference;
use crate::weights::model_files::{self, NoWeights, Precision};
use crate::weights::{FLUX_CLASS, FLUX2_CLASS, SD3_CLASS, Z_IMAGE_CLASS};

/// The list of a diffusers pipeline's components.
pub const MODEL_INDEX: &str = "model_index.json";

/// The files that a component of `model_index.json` consists of.
#[derive(Clone, Copy)]
enum Component {
    Scheduler,
    Tokenizer,
    /// A network whose weights are `{stem}.safetensors`, `{stem}.fp16.safetensors` or shards.
    Network {
        stem: &'static str,
    },
}

/// The components that sdgen reads. The safety checker and its feature extractor stay where they
/// are.
const COMPONENTS: [(&str, Component); 10] = [
    ("scheduler", Component::Scheduler),
    ("tokenizer", Component::Tokenizer),
    ("tokenizer_2", Component::Tokenizer),
    ("tokenizer_3", Component::Tokenizer),
    ("text_encoder", Component::Network { stem: "model" }),
    ("text_encoder_2", Component::Network { stem: "model" }),
    ("text_encoder_3", Component::Network { stem: "model" }),
    (
        "unet",
        Component::Network {
            stem: "diffusion_pytorch_model",
        },
    ),
    (
        "transformer",
        Component::Network {
            stem: "diffusion_pytorch_model",
        },
    ),
    (
        "vae",
        Component::Network {
            stem: "diffusion_pytorch_model",
        },
    ),
];

/// Why a listing of files does not make a model.
#[derive(Debug)]
pub enum SelectionError {
    /// Nothing of the repository is there.
    Absent,
    /// A file that sdgen needs is not in the listing.
    Missing(String),
    /// Anything else, with its own message.
    Other(anyhow::Error),
}

impl From<anyhow::Error> for SelectionError {
    fn from(error: anyhow::Error) -> SelectionError {
        SelectionError::Other(error)
    }
}

/// Lists up to twelve files, one a line, in the form that can be typed.
pub fn listed<'a>(repo: &str, files: impl Iterator<Item = &'a String>) -> String {
    files
        .take(12)
        .map(|file| format!("\n    {repo}/{file}"))
        .collect()
}

/// The files of a repository that make a model.
#[derive(Debug)]
pub struct Selection {
    /// In the order in which to fetch them.
    pub files: Vec<String>,
    /// The file to open; `None` where it is the folder.
    pub checkpoint: Option<String>,
}

impl Selection {
    /// What the person opens, in the folder of a snapshot.
    pub fn path(&self, folder: PathBuf) -> PathBuf {
        match &self.checkpoint {
            Some(file) => folder.join(file),
            None => folder,
        }
    }
}

/// Selects from `files`, the listing of a repository or of a snapshot, what sdgen needs; `read`
/// parses one of them. The weights come last and what a model can do without comes first, so an
/// interrupted download never looks complete.
pub fn select(
    reference: &Reference,
    files: &BTreeSet<String>,
    read: &mut dyn FnMut(&str) -> Result<Value>,
) -> Result<Selection, SelectionError> {
    if let Some(file) = &reference.file {
        let file = present(files, file.clone())?;
        return Ok(Selection {
            files: vec![file.clone()],
            checkpoint: Some(file),
        });
    }
    match reference.wanted {
        Wanted::Vae if files.contains("vae/config.json") => return vae(files, "vae/", read),
        Wanted::TextEncoder => return text_encoder(files, read),
        Wanted::Tokenizer => {
            return Ok(Selection {
                files: chat_tokenizer_files(files, tokenizer_folder(files))?,
                checkpoint: None,
            });
        }
        Wanted::Model | Wanted::Vae => (),
    }
    if !files.contains(MODEL_INDEX) {
        let is_vae = |config: &Value| {
            config
                .get("_class_name")
                .and_then(Value::as_str)
                .is_some_and(|c| c.starts_with("Autoencoder"))
        };
        if files.contains("config.json") && is_vae(&read("config.json")?) {
            return vae(files, "", read);
        }
        let file = single_checkpoint(&reference.repo, files)?;
        return Ok(Selection {
            files: vec![file.clone()],
            checkpoint: Some(file),
        });
    }

    select_pipeline(reference, files, read)
}

/// Whether the transformer that `model_index.json` lists is of a class that is drawn.
fn is_drawn_transformer(index: &Value) -> bool {
    let class = index.get("transformer").and_then(|listed| listed.get(1));
    class
        .and_then(Value::as_str)
        .is_some_and(|class| [SD3_CLASS, FLUX_CLASS, FLUX2_CLASS, Z_IMAGE_CLASS].contains(&class))
}

/// Whether a tokenizer that `model_index.json` lists is CLIP's, and not a language model's.
fn is_clip(index: &Value, tokenizer: &str) -> bool {
    let class = index.get(tokenizer).and_then(|listed| listed.get(1));
    let class = class.and_then(Value::as_str);
    class.is_none_or(|class| class.contains("CLIP"))
}

/// Selects the components that `model_index.json` lists and that sdgen reads.
fn select_pipeline(
    reference: &Reference,
    files: &BTreeSet<String>,
    read: &mut dyn FnMut(&str) -> Result<Value>,
) -> Result<Selection, SelectionError> {
    let index = read(MODEL_INDEX)?;
    // "vae": ["diffusers", "AutoencoderKL"], or [null, null] where a pipeline goes without
    let listed = |name: &str| {
        index
            .get(name)
            .and_then(|v| v.get(0))
            .is_some_and(|v| !v.is_null())
    };
    if !listed("unet") && !is_drawn_transformer(&index) {
        let class = index
            .get("_class_name")
            .and_then(Value::as_str)
            .unwrap_or("pipeline");
        return Err(SelectionError::Other(anyhow!(
            "`{}` is a `{class}`, which sdgen does not draw\n\nhint: Stable Diffusion models, \
             FLUX.1, FLUX.2 klein and Z-Image are drawn; try `sdgen pull stable-diffusion-v1-5/stable-diffusion-v1-5`",
            reference.repo
        )));
    }
    let mut small = vec![MODEL_INDEX.to_string()];
    let mut large = Vec::new();
    for (name, component) in COMPONENTS.into_iter().filter(|(name, _)| listed(name)) {
        match component {
            Component::Scheduler => {
                small.push(present(files, format!("{name}/scheduler_config.json"))?)
            }
            Component::Tokenizer if is_clip(&index, name) => {
                small.extend(tokenizer_files(files, name)?)
            }
            Component::Tokenizer => small.extend(chat_tokenizer_files(files, &format!("{name}/"))?),
            Component::Network { stem } => {
                small.push(present(files, format!("{name}/config.json"))?);
                large.extend(weight_files(files, &format!("{name}/"), stem, read)?);
            }
        }
    }
    small.extend(large);
    Ok(Selection {
        files: small,
        checkpoint: None,
    })
}

/// Selects a language model that encodes text: that of a diffusers model, or a repository that is
/// one.
fn text_encoder(
    files: &BTreeSet<String>,
    read: &mut dyn FnMut(&str) -> Result<Value>,
) -> Result<Selection, SelectionError> {
    let is_alone = !files.contains(MODEL_INDEX) && files.contains("config.json");
    let all = ["text_encoder/", "text_encoder_2/", "text_encoder_3/"];
    let of_model = all.map(|folder| files.contains(&format!("{folder}config.json")));
    if let (false, [_, true, _]) = (is_alone, of_model) {
        return text_encoders(files, read);
    }
    let folder = if is_alone { "" } else { "text_encoder/" };
    let mut needed = vec![present(files, format!("{folder}config.json"))?];
    needed.extend(chat_tokenizer_files(files, tokenizer_folder(files))?);
    needed.extend(weight_files(files, folder, "model", read)?);
    Ok(Selection {
        files: needed,
        checkpoint: None,
    })
}

/// Selects all text encoders of a diffusers model with several, and their tokenizers.
fn text_encoders(
    files: &BTreeSet<String>,
    read: &mut dyn FnMut(&str) -> Result<Value>,
) -> Result<Selection, SelectionError> {
    let index = read(MODEL_INDEX)?;
    let (mut small, mut large) = (vec![MODEL_INDEX.to_string()], vec![]);
    for (name, component) in COMPONENTS {
        let is_listed = index
            .get(name)
            .and_then(|v| v.get(0))
            .is_some_and(|v| !v.is_null());
        match component {
            Component::Tokenizer if is_listed && is_clip(&index, name) => {
                small.extend(tokenizer_files(files, name)?);
            }
            Component::Tokenizer if is_listed => {
                small.extend(chat_tokenizer_files(files, &format!("{name}/"))?);
            }
            Component::Network { stem } if is_listed && name.starts_with("text_encoder") => {
                small.push(present(files, format!("{name}/config.json"))?);
                large.extend(weight_files(files, &format!("{name}/"), stem, read)?);
            }
            _ => (),
        }
    }
    small.extend(large);
    Ok(Selection {
        files: small,
        checkpoint: None,
    })
}

/// The folder of a language model's tokenizer.
fn tokenizer_folder(files: &BTreeSet<String>) -> &'static str {
    match files.contains("tokenizer.json") {
        true => "",
        false => "tokenizer/",
    }
}

/// Selects the tokenizer of a language model, which is read from `tokenizer.json` only.
fn chat_tokenizer_files(
    files: &BTreeSet<String>,
    folder: &str,
) -> Result<Vec<String>, SelectionError> {
    let mut found = vec![format!("{folder}tokenizer_config.json")];
    found.retain(|file| files.contains(file));
    found.push(present(files, format!("{folder}tokenizer.json"))?);
    Ok(found)
}

/// Selects a VAE whose files begin with `folder`.
fn vae(
    files: &BTreeSet<String>,
    folder: &str,
    read: &mut dyn FnMut(&str) -> Result<Value>,
) -> Result<Selection, SelectionError> {
    let mut needed = vec![format!("{folder}config.json")];
    needed.extend(weight_files(
        files,
        folder,
        "diffusion_pytorch_model",
        read,
    )?);
    Ok(Selection {
        files: needed,
        checkpoint: None,
    })
}

fn present(files: &BTreeSet<String>, file: String) -> Result<String, SelectionError> {
    if files.contains(&file) {
        Ok(file)
    } else {
        Err(SelectionError::Missing(file))
    }
}

/// Returns the only `.safetensors` at the top of a repository; errors if there are several.
fn single_checkpoint(repo: &str, files: &BTreeSet<String>) -> Result<String, SelectionError> {
    let top = |file: &&String| file.ends_with(".safetensors") && !file.contains('/');
    let found: Vec<&String> = files.iter().filter(top).collect();
    match found.as_slice() {
        [] => Err(SelectionError::Missing(MODEL_INDEX.to_string())),
        [file] => Ok((*file).clone()),
        _ => Err(SelectionError::Other(anyhow!(
            "`{repo}` has {} checkpoints and no `{MODEL_INDEX}`\n\nhint: name one of them:{}",
            found.len(),
            listed(repo, found.iter().copied())
        ))),
    }
}

/// Selects `vocab.json` with `merges.txt`, else `tokenizer.json`, after the settings that go with
/// them.
fn tokenizer_files(files: &BTreeSet<String>, name: &str) -> Result<Vec<String>, SelectionError> {
    let optional = [
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ];
    let mut found: Vec<String> = optional
        .iter()
        .map(|file| format!("{name}/{file}"))
        .collect();
    found.retain(|file| files.contains(file));
    let (vocab, merges) = (format!("{name}/vocab.json"), format!("{name}/merges.txt"));
    let whole = format!("{name}/tokenizer.json");
    if files.contains(&whole) && !(files.contains(&vocab) && files.contains(&merges)) {
        found.push(whole);
    } else {
        found.extend([present(files, vocab)?, present(files, merges)?]);
    }
    Ok(found)
}

/// Selects the weights of one network, `fp16` if these are complete.
fn weight_files(
    files: &BTreeSet<String>,
    folder: &str,
    stem: &str,
    read: &mut dyn FnMut(&str) -> Result<Value>,
) -> Result<Vec<String>, SelectionError> {
    let path = |file: &str| format!("{folder}{file}");
    let found = model_files::weight_files(
        &[stem],
        Precision::Half,
        &|file| files.contains(&path(file)),
        &mut |index| read(&path(index)),
    );
    let found = found.map_err(|error| match error {
        NoWeights::Absent => SelectionError::Missing(path(&format!("{stem}.safetensors"))),
        NoWeights::MissingShard { shard, .. } => SelectionError::Missing(path(&shard)),
        NoWeights::EmptyIndex(index) => {
            SelectionError::Other(anyhow!("`{}` lists no shards", path(&index)))
        }
        NoWeights::Unreadable(error) => SelectionError::Other(error),
    })?;
    let files = found.index.iter().chain(&found.files);
    Ok(files.map(|file| path(file)).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Selects from `files`; those ending in `.json` hold what `contents` says of them.
    fn select_from(
        id: &str,
        files: &[&str],
        contents: &[(&str, Value)],
    ) -> Result<Selection, SelectionError> {
        let files = files.iter().map(|file| file.to_string()).collect();
        let reference = Reference::parse(id).unwrap();
        select(&reference, &files, &mut |file| {
            let found = contents.iter().find(|(name, _)| *name == file);
            Ok(found.map_or(Value::Null, |(_, value)| value.clone()))
        })
    }

    fn index() -> (&'static str, Value) {
        let index = json!({
            "_class_name": "StableDiffusionPipeline",
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "text_encoder_2": [null, null],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
        });
        (MODEL_INDEX, index)
    }

    const PIPELINE: [&str; 8] = [
        "model_index.json",
        "safety_checker/model.safetensors",
        "text_encoder_2/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ];

    #[test]
    fn of_a_pipeline_the_listed_components_come_and_their_weights_last() {
        let selection = select_from("me/model", &PIPELINE, &[index()]).unwrap();
        let expected = [
            "model_index.json",
            "tokenizer/tokenizer_config.json",
            "tokenizer/vocab.json",
            "tokenizer/merges.txt",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
        ];
        assert_eq!(selection.files, expected);
        assert_eq!(selection.checkpoint, None);
    }

    #[test]
    fn fp16_shards_are_taken_if_all_are_there() {
        let shard = |name: &str| format!("unet/diffusion_pytorch_model.fp16-{name}.safetensors");
        let fp16_index = "unet/diffusion_pytorch_model.safetensors.index.fp16.json";
        let shards = json!({ "weight_map": {
            "a": "diffusion_pytorch_model.fp16-1.safetensors",
            "b": "diffusion_pytorch_model.fp16-2.safetensors",
        }});
        let contents = [index(), (fp16_index, shards)];
        let (one, two) = (shard("1"), shard("2"));
        let mut files = PIPELINE.to_vec();
        files.extend([fp16_index, &one]);
        let half = select_from("me/model", &files, &contents).unwrap();
        let whole_file = "unet/diffusion_pytorch_model.safetensors";
        assert_eq!(half.files.last().unwrap(), whole_file);
        files.push(&two);
        let all = select_from("me/model", &files, &contents).unwrap();
        assert!(
            all.files
                .ends_with(&[fp16_index.into(), one.clone(), two.clone()])
        );
        assert!(!all.files.contains(&whole_file.to_string()));
    }

    #[test]
    fn the_first_missing_file_is_named() {
        let without = |file: &str| -> Vec<&str> {
            PIPELINE.into_iter().filter(|name| *name != file).collect()
        };
        for file in ["tokenizer/merges.txt", "unet/config.json", PIPELINE[7]] {
            let error = select_from("me/model", &without(file), &[index()]).unwrap_err();
            assert!(
                matches!(&error, SelectionError::Missing(missing) if missing == file),
                "{error:?}"
            );
        }
    }

    #[test]
    fn a_checkpoint_is_the_named_file_or_the_only_one_at_the_top() {
        let files = ["README.md", "model.safetensors", "loras/x.safetensors"];
        for (id, file) in [
            ("me/model", "model.safetensors"),
            ("me/model/loras/x.safetensors", "loras/x.safetensors"),
        ] {
            let selection = select_from(id, &files, &[]).unwrap();
            assert_eq!(selection.checkpoint.as_deref(), Some(file));
            assert_eq!(selection.files, [file]);
        }
        let two = ["a.safetensors", "b.safetensors"];
        let error = select_from("me/model", &two, &[]).unwrap_err();
        assert!(matches!(error, SelectionError::Other(_)), "{error:?}");
    }

    #[test]
    fn a_vae_is_known_by_its_class() {
        let files = ["config.json", "diffusion_pytorch_model.safetensors"];
        let config = ("config.json", json!({ "_class_name": "AutoencoderTiny" }));
        let selection = select_from("me/vae", &files, &[config]).unwrap();
        assert_eq!(selection.files, files);
        assert_eq!(selection.checkpoint, None);
    }
}
