//! A1111's tags `<lora:name:strength>` in prompts.

use crate::suggest::nearest;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// The beginning of a tag.
const TAG: &str = "<lora:";

/// Removes the tags from a prompt; returns it with the names and strengths of the tags. A tag
/// without a strength has 1. Errors if a strength is not a number.
pub fn take_tags(prompt: &str) -> Result<(String, Vec<(String, f64)>)> {
    let (mut text, mut tags, mut rest) = (String::new(), vec![], prompt);
    while let Some((before, tag, after)) = rest.split_once(TAG).and_then(|(before, tag)| {
        let (tag, after) = tag.split_once('>')?;
        Some((before, tag, after))
    }) {
        let (name, strength) = tag.split_once(':').unwrap_or((tag, "1"));
        let strength = strength
            .trim()
            .parse()
            .ok()
            .filter(|strength: &f64| strength.is_finite());
        let strength = strength.with_context(|| {
            format!("the strength in `{TAG}{tag}>` is not a number\n\nhint: `{TAG}{name}:0.8>`")
        })?;
        tags.push((name.trim().into(), strength));
        text += before;
        rest = after;
    }
    text += rest;
    Ok(if tags.is_empty() {
        (text, tags)
    } else {
        (text.trim().into(), tags)
    })
}

/// Returns the file of a LoRA that a prompt names. Errors name the nearest that is in the folder.
pub fn find_named(folder: &Path, name: &str) -> Result<PathBuf> {
    let path = folder.join(format!("{name}.safetensors"));
    if path.is_file() {
        return Ok(path);
    }
    let files = std::fs::read_dir(folder)
        .with_context(|| format!("cannot read the folder `{}`", folder.display()))?;
    let there: Vec<String> = files
        .filter_map(|file| {
            Some(
                file.ok()?
                    .path()
                    .file_stem()?
                    .to_string_lossy()
                    .into_owned(),
            )
        })
        .collect();
    let near = nearest(name, there.iter().map(String::as_str))
        .map(|near| format!("did you mean `{near}`? "))
        .unwrap_or_default();
    bail!(
        "`{}` has no LoRA `{name}`\n\nhint: {near}its file would be `{}`",
        folder.display(),
        path.display()
    )
}
