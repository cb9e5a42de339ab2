//! The hub's cache on disk, in the layout that Python's `huggingface_hub` shares:
//!
//! ```text
//! models--owner--name/refs/main                  the commit that `main` was when last asked
//!                     snapshots/COMMIT/unet/...  links to
//!                     blobs/ETAG                 contents, named by their checksum
//!                     .no_exist/COMMIT/...       files that the commit does not have
//! .locks/models--owner--name/ETAG.lock           held by the process that fetches a blob
//! ```
//!
//! `hf-hub` knows the names of folders, snapshots and blobs. Reading refs, links that are made in
//! one step, and the rest of the layout are this file's.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use serde_json::Value;

use super::reference::{Reference, is_commit};
use super::selection::MODEL_INDEX;

/// The part of the cache that holds one repository.
pub struct RepoCache {
    /// Folder of the whole cache.
    dir: PathBuf,
    /// `models--owner--name`
    folder_name: String,
    layout: CacheRepo,
}

impl RepoCache {
    pub fn new(dir: &Path, reference: &Reference) -> RepoCache {
        let repo = Repo::with_revision(
            reference.repo.clone(),
            RepoType::Model,
            reference.revision.clone(),
        );
        RepoCache {
            dir: dir.to_path_buf(),
            folder_name: repo.folder_name(),
            layout: Cache::new(dir.to_path_buf()).repo(repo),
        }
    }

    /// The folder of a commit's files.
    pub fn snapshot_path(&self, commit: &str) -> PathBuf {
        self.layout.pointer_path(commit)
    }

    /// The file that the links of snapshots lead to.
    pub fn blob_path(&self, etag: &str) -> PathBuf {
        self.layout.blob_path(etag)
    }

    /// The file that holds a revision's commit.
    pub fn ref_path(&self, revision: &str) -> PathBuf {
        self.folder().join("refs").join(revision)
    }

    /// The record, which Python writes too, that `model_index.json` does not exist at this commit.
    pub fn no_index_path(&self, commit: &str) -> PathBuf {
        self.folder()
            .join(".no_exist")
            .join(commit)
            .join(MODEL_INDEX)
    }

    /// The file whose lock is held while a blob is fetched.
    pub fn lock_path(&self, etag: &str) -> PathBuf {
        self.dir
            .join(".locks")
            .join(&self.folder_name)
            .join(format!("{etag}.lock"))
    }

    /// The commit that a revision was when the hub was last asked; `None` if it never was.
    pub fn commit_of(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_string());
        }
        let text = fs::read_to_string(self.ref_path(revision)).ok()?;
        Some(text.trim().to_string()).filter(|commit| is_commit(commit))
    }

    fn folder(&self) -> PathBuf {
        self.dir.join(&self.folder_name)
    }
}

/// Makes `pointer`, the path of `file` in a snapshot, the relative link to `blob` that Python
/// makes; a copy where the system has no links.
pub fn link(blob: &Path, pointer: &Path, file: &str) -> io::Result<()> {
    let name = blob.file_name().unwrap_or_default();
    let up = "../".repeat(2 + file.matches('/').count());
    let target = Path::new(&up).join("blobs").join(name);
    make_atomically(pointer, |path| {
        symlink(&target, path).or_else(|_| fs::copy(blob, path).map(|_| ()))
    })
}

/// Writes a small file such that no reader sees half of it.
pub fn write(path: &Path, text: &str) -> io::Result<()> {
    make_atomically(path, |path| fs::write(path, text))
}

/// Has `make` make a file under a temporary name and renames it to `path`.
fn make_atomically(path: &Path, make: impl FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder)?;
    let made = tempfile::Builder::new()
        .prefix(".sdgen-")
        .make_in(folder, make)?;
    made.into_temp_path().persist(path).map_err(|e| e.error)
}

/// The files of a snapshot, relative to it with `/`; a link whose blob is gone does not count.
pub fn files_below(folder: &Path) -> BTreeSet<String> {
    let mut files = BTreeSet::new();
    let mut folders = vec![String::new()];
    while let Some(prefix) = folders.pop() {
        let entries = fs::read_dir(folder.join(&prefix))
            .into_iter()
            .flatten()
            .flatten();
        for entry in entries {
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let path = format!("{prefix}{name}");
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(format!("{path}/"));
            } else if entry.path().is_file() {
                files.insert(path);
            }
        }
    }
    files
}

/// Reads a JSON file of a snapshot. Errors, naming it, if it cannot be read or is not JSON.
pub fn read_json(path: &Path) -> Result<Value> {
    let bytes = fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    serde_json::from_slice(&bytes).map_err(|e| {
        anyhow!(
            "`{path}` is not valid JSON: {e}\n\nhint: delete `{path}` and pull the model again",
            path = path.display()
        )
    })
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}
