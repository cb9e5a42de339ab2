//! What a person types for a model of the hub.

use super::Wanted;
use anyhow::{Result, anyhow};

/// `owner/name[/path/file.safetensors][@revision]`
pub struct Reference {
    /// As it was typed, for hints.
    pub id: String,
    /// `owner/name`
    pub repo: String,
    /// A branch, a tag, `refs/pr/1` or a commit.
    pub revision: String,
    /// The one file that is wanted.
    pub file: Option<String>,
    /// Which part of a model is wanted.
    pub wanted: Wanted,
}

impl Reference {
    /// Errors if `id` has another form, or a part of it would lead out of the cache.
    pub fn parse(id: &str) -> Result<Reference> {
        let hint = "hint: a model of the hub is `owner/name`, `owner/name@revision` or \
                    `owner/name/file.safetensors`";
        let (path, revision) = id.split_once('@').unwrap_or((id, "main"));
        let parts: Vec<&str> = path.split('/').collect();
        let well_formed = |part: &&str| {
            let plain = |c: char| c.is_alphanumeric() || "-_. +()[],".contains(c);
            !part.is_empty() && *part != "." && *part != ".." && part.chars().all(plain)
        };
        let revision_fits = revision.split('/').all(|part| well_formed(&part));
        let [owner, name, file @ ..] = parts.as_slice() else {
            return Err(anyhow!("`{id}` is not a model of the hub\n\n{hint}"));
        };
        if !parts.iter().all(well_formed) || !revision_fits {
            return Err(anyhow!("`{id}` is not a model of the hub\n\n{hint}"));
        }
        let file = (!file.is_empty()).then(|| file.join("/"));
        let is_other = |file: &&String| {
            let ends = [".safetensors", ".gguf"];
            !ends.iter().any(|end| file.ends_with(end))
        };
        if let Some(file) = file.as_ref().filter(is_other) {
            return Err(anyhow!(
                "`{file}` of `{owner}/{name}` is not a `.safetensors` or `.gguf` file\n\n{hint}"
            ));
        }
        Ok(Reference {
            id: id.to_string(),
            repo: format!("{owner}/{name}"),
            revision: revision.to_string(),
            file,
            wanted: Wanted::Model,
        })
    }
}

/// Whether a revision is a commit's full hash, which never moves.
pub fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}
