//! The files of the LoRAs that prompts name.

use crate::suggest::nearest;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// How deep, and how many files, folders of LoRAs are looked through.
const MAX_DEPTH: usize = 8;
const MAX_FILES: usize = 100_000;

/// Returns the file of a LoRA that a prompt names: by its path below the folder, or as in A1111 by
/// its name alone, in whatever folder below it lies. Errors name the nearest that is there, or those
/// that share the name.
pub fn find_named(folder: &Path, name: &str) -> Result<PathBuf> {
    let path = folder.join(format!("{name}.safetensors"));
    if path.is_file() {
        return Ok(path);
    }
    std::fs::read_dir(folder)
        .with_context(|| format!("cannot read the folder `{}`", folder.display()))?;
    let files = files_below(folder);
    let stem = |file: &PathBuf| Some(file.file_stem()?.to_string_lossy().into_owned());
    let same: Vec<&PathBuf> = files
        .iter()
        .filter(|file| stem(file).as_deref() == Some(name))
        .collect();
    match same.as_slice() {
        [one] => return Ok((*one).clone()),
        [] => (),
        [first, second, ..] => bail!(
            "`{name}` is both `{}` and `{}`\n\nhint: name it with its folder, as in `<lora:{}:1>`",
            first.display(),
            second.display(),
            first
                .strip_prefix(folder)
                .unwrap_or(first)
                .with_extension("")
                .display()
        ),
    }
    let there: Vec<String> = files.iter().filter_map(stem).collect();
    let near = nearest(name, there.iter().map(String::as_str))
        .map(|near| format!("did you mean `{near}`? "))
        .unwrap_or_default();
    bail!(
        "`{}` has no LoRA `{name}`\n\nhint: {near}its file would be `{}`",
        folder.display(),
        path.display()
    )
}

/// The .safetensors files below a folder, in the order of their paths; folders that cannot be read
/// have none.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let (mut files, mut folders) = (vec![], vec![(folder.to_path_buf(), 0)]);
    while let Some((folder, depth)) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.extend((depth < MAX_DEPTH).then_some((path, depth + 1)));
            } else if path.extension().is_some_and(|end| end == "safetensors") {
                files.push(path);
            }
        }
        if files.len() >= MAX_FILES || folders.len() >= MAX_FILES {
            break;
        }
    }
    files.sort();
    files
}
