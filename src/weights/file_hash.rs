//! SHA-256 of whole files, by which A1111 and sites that share models know them.
//!
//! A file of many gigabytes is read once: its hash is remembered by size and time in the user's
//! folder of caches. In the hub's cache the name of a blob is its hash already.

use crate::hex::hex;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// Smaller files are read again faster than one would notice.
const MIN_REMEMBERED_BYTES: u64 = 32 << 20;
/// The most files that are remembered.
const MAX_REMEMBERED: usize = 1000;

/// What tells that a file is still the one that was read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Stamp {
    bytes: u64,
    modified_ns: u64,
    /// a change of contents always changes it, even where the time of modification was set back
    #[serde(default)]
    changed_ns: i64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Remembered {
    #[serde(flatten)]
    stamp: Stamp,
    sha256: String,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Option<Self> {
        let modified = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        #[cfg(unix)]
        let changed_ns = {
            use std::os::unix::fs::MetadataExt;
            let seconds = metadata.ctime().wrapping_mul(1_000_000_000);
            seconds.wrapping_add(metadata.ctime_nsec())
        };
        #[cfg(not(unix))]
        let changed_ns = 0;
        Some(Self {
            bytes: metadata.len(),
            modified_ns: modified.as_nanos().try_into().ok()?,
            changed_ns,
        })
    }
}

/// Hashes of files, as remembered by one user.
pub struct FileHashes {
    /// the file that remembers them; none where no folder is known
    memory: Option<PathBuf>,
}

impl FileHashes {
    /// Those in the user's folder of caches: `$XDG_CACHE_HOME/sdgen`, else `~/.cache/sdgen`.
    pub fn of_user() -> Self {
        let folder = |name: &str| {
            let path = PathBuf::from(std::env::var_os(name)?);
            path.is_absolute().then_some(path)
        };
        let home = || folder("HOME").or_else(|| folder("USERPROFILE"));
        let caches = folder("XDG_CACHE_HOME").or_else(|| Some(home()?.join(".cache")));
        Self {
            memory: caches.map(|caches| caches.join("sdgen/sha256.json")),
        }
    }

    /// The hash of a file in hex if it is known without reading the file.
    pub fn known(&self, path: &Path) -> Option<String> {
        let path = path.canonicalize().ok()?;
        let in_blobs = path
            .parent()
            .is_some_and(|folder| folder.ends_with("blobs"));
        let name = path.file_name()?.to_str()?;
        let is_hash = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
        if in_blobs && is_hash {
            return Some(name.to_ascii_lowercase());
        }
        let remembered = self.read().remove(path.to_str()?)?;
        let stamp = Stamp::of(&path.metadata().ok()?)?;
        (remembered.stamp == stamp).then_some(remembered.sha256)
    }

    /// The hash of a file in hex, and remembers it. Errors if the file cannot be read; that it
    /// cannot be remembered is none.
    pub fn sha256(&self, path: &Path) -> Result<String> {
        if let Some(known) = self.known(path) {
            return Ok(known);
        }
        let read = || -> std::io::Result<(String, Metadata)> {
            let mut file = File::open(path)?;
            let metadata = file.metadata()?;
            let (mut hash, mut piece) = (Sha256::new(), vec![0; 1 << 20]);
            loop {
                match file.read(&mut piece)? {
                    0 => return Ok((hex(&hash.finalize()), metadata)),
                    n => hash.update(piece.get(..n).unwrap_or_default()),
                }
            }
        };
        let (sha256, metadata) =
            read().with_context(|| format!("cannot read `{}`", path.display()))?;
        if metadata.len() >= MIN_REMEMBERED_BYTES {
            self.remember(path, &metadata, &sha256);
        }
        Ok(sha256)
    }

    fn read(&self) -> BTreeMap<String, Remembered> {
        let text = self.memory.as_ref().map(std::fs::read_to_string);
        let text = text.and_then(Result::ok).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    fn remember(&self, path: &Path, metadata: &Metadata, sha256: &str) {
        let path = path.canonicalize().ok();
        let key = path.as_deref().and_then(Path::to_str);
        let (Some(memory), Some(key), Some(stamp)) = (&self.memory, key, Stamp::of(metadata))
        else {
            return;
        };
        let sha256 = sha256.into();
        let mut all = self.read();
        if all.len() >= MAX_REMEMBERED {
            all.retain(|path, _| Path::new(path).exists());
            while all.len() >= MAX_REMEMBERED && all.pop_first().is_some() {}
        }
        all.insert(key.into(), Remembered { stamp, sha256 });
        // several processes may write: the last one's file is whole, and what another one had found
        // meanwhile is found again
        let write = || -> Option<()> {
            let folder = memory.parent()?;
            std::fs::create_dir_all(folder).ok()?;
            let mut file = tempfile::NamedTempFile::new_in(folder).ok()?;
            serde_json::to_writer(&mut file, &all).ok()?;
            file.persist(memory).ok()?;
            Some(())
        };
        // without it the file is read again the next time
        write().unwrap_or_default();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const OF_ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn a_hash_is_remembered_until_the_file_changes() {
        let dir = tempfile::tempdir().unwrap();
        let hashes = FileHashes {
            memory: Some(dir.path().join("caches/sdgen/sha256.json")),
        };
        let path = dir.path().join("x.safetensors");
        std::fs::write(&path, "abc").unwrap();
        assert_eq!(hashes.sha256(&path).unwrap(), OF_ABC);
        assert_eq!(hashes.known(&path), None, "a small file is not remembered");
        hashes.remember(&path, &path.metadata().unwrap(), OF_ABC);
        assert_eq!(hashes.known(&path).as_deref(), Some(OF_ABC));
        // the same size and time of modification, other contents
        let modified = path.metadata().unwrap().modified().unwrap();
        std::fs::write(&path, "abd").unwrap();
        File::options()
            .append(true)
            .open(&path)
            .unwrap()
            .set_modified(modified)
            .unwrap();
        assert_eq!(hashes.known(&path), None);
    }

    #[test]
    fn a_blob_of_the_hub_says_its_hash_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = dir.path().join("models--a--b/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        let hashes = FileHashes { memory: None };
        std::fs::write(blobs.join(OF_ABC), "anything").unwrap();
        assert_eq!(hashes.sha256(&blobs.join(OF_ABC)).unwrap(), OF_ABC);
        std::fs::write(blobs.join("0123"), "abc").unwrap();
        assert_eq!(hashes.sha256(&blobs.join("0123")).unwrap(), OF_ABC);
    }
}
