//! The Hugging Face hub: finds a model in the cache that Python's `huggingface_hub` shares, and
//! fetches what is missing.
//!
//! `owner/name` goes in, the folder of a snapshot comes out. The cache is read first, and no
//! request is made when it has every file that sdgen needs; with `offline` no network code runs at
//! all. Start at [`Hub::snapshot`]; `selection` says which files make a model, `download` brings
//! them, `client` speaks HTTP, `cache` knows the folders, `errors` what a person is told.
//!
//! # What `hf-hub` does, and what it does not
//! The crate (0.5, synchronous) provides the names of the cache's layout and the HTTP client: TLS,
//! proxies, user agent, token. Its own download is not used. That of 0.5 puts a file under its
//! final name unverified, appends to a partial file even when the server starts again from the
//! first byte, sends the token to the storage behind a redirect, has no limits of time, takes
//! another lock than Python does and waits five seconds for it, moves `refs/main` before the
//! snapshot is complete, and drops the header that tells a gated repository from a missing one.
//!
//! Version 1.0 locks as Python does and has Xet and progress of its own, but does not continue a
//! file that broke off, compares neither checksum nor size of files that do not come through Xet,
//! takes the body of a refusal for the file, knows no HF_HUB_OFFLINE and no limits of time, and
//! waits ten seconds for the lock. It also brings 149 crates that nothing else here needs (tokio,
//! reqwest, hf-xet, aws-lc-sys), where 0.5 brings 22: measured, they take about 300 seconds of one
//! core in an unoptimised build from empty, two and a half minutes on two cores.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

#[cfg(feature = "hub")]
mod cache;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod download;
#[cfg(feature = "hub")]
mod errors;
#[cfg(feature = "hub")]
mod reference;
#[cfg(feature = "hub")]
mod selection;

#[cfg(feature = "hub")]
use self::{
    cache::RepoCache,
    download::Download,
    reference::Reference,
    selection::{MODEL_INDEX, SelectionError, select},
};

/// Which part of a repository is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// all that draws
    Model,
    /// of a repository that is a model, only its VAE
    Vae,
    /// a language model that encodes text, with its tokenizer
    TextEncoder,
    /// that tokenizer alone
    Tokenizer,
}

const ENDPOINT: &str = "https://huggingface.co";

/// How long the hub may stay silent before it counts as unreachable; `HF_HUB_DOWNLOAD_TIMEOUT`.
const TIMEOUT_S: u64 = 30;

/// The hub that models come from: where it and its cache are, and whether the network may be used.
#[cfg_attr(
    not(feature = "hub"),
    allow(dead_code, reason = "only downloads need an address and a token")
)]
pub struct Hub {
    /// Address of the hub without a slash at its end; the token is sent to this origin only.
    pub endpoint: String,
    /// Folder of the cache, which Python's `huggingface_hub` shares.
    pub cache_dir: PathBuf,
    /// Access token for private and gated models.
    pub token: Option<String>,
    /// Never touch the network.
    pub offline: bool,
    /// How long a connection, or a read on it, may take.
    pub timeout: Duration,
}

impl Hub {
    /// Reads `HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE` and their kin
    /// from the environment; `offline` (the flag) alone is enough to stay off the network.
    pub fn from_env(offline: bool) -> Hub {
        let is_given = |value: &OsString| !value.is_empty();
        Hub::from_lookup(offline, &|name| {
            // where HOME is not set, the system's list of users tells
            let fallback = || {
                let home = (name == "HOME").then(std::env::home_dir);
                home.flatten().map(OsString::from)
            };
            std::env::var_os(name).filter(is_given).or_else(fallback)
        })
    }

    /// [`Hub::from_env`] over any source of variables. An empty value counts as unset.
    pub fn from_lookup(offline: bool, lookup: &dyn Fn(&str) -> Option<OsString>) -> Hub {
        let raw = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let text = |name: &str| raw(name)?.into_string().ok();
        let user = raw("HOME").or_else(|| raw("USERPROFILE"));
        let user = PathBuf::from(user.unwrap_or_default());
        // as Python's expanduser and expandvars
        let path = |name: &str| {
            let path = PathBuf::from(raw(name)?);
            let path = match path.strip_prefix("~") {
                Ok(rest) => user.join(rest),
                Err(_) => path,
            };
            Some(match path.to_str() {
                Some(text) => expand_variables(text, &text_of(lookup)).into(),
                None => path,
            })
        };

        let home = path("HF_HOME").unwrap_or_else(|| {
            let caches = path("XDG_CACHE_HOME").unwrap_or_else(|| user.join(".cache"));
            caches.join("huggingface")
        });
        let cache_dir = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .unwrap_or_else(|| home.join("hub"));
        let token = text("HF_TOKEN").or_else(|| {
            let file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
            fs::read_to_string(file).ok()
        });
        let timeout_s = text("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|s| s.parse().ok());
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_string());

        Hub {
            endpoint: endpoint.trim_end_matches('/').to_string(),
            cache_dir,
            token: token
                .map(|token| token.trim().to_string())
                .filter(|token| !token.is_empty()),
            offline: offline || text("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value)),
            timeout: Duration::from_secs(timeout_s.filter(|&s| s > 0).unwrap_or(TIMEOUT_S)),
        }
    }

    /// Returns the snapshot of `owner/name[@revision]` in the cache: the folder of a diffusers
    /// model, or the path of the checkpoint where the repository is a single `.safetensors` file or
    /// `owner/name/path/file.safetensors` names one.
    ///
    /// Only the files that sdgen reads are fetched, one variant of the weights (`fp16` where it is
    /// complete), with a bar on stderr if `progress`. A file takes its final name when its size and
    /// checksum are right; one that broke off is continued by the next call.
    ///
    /// Errors if `id` is not a reference, if a file is missing and the network is off, on
    /// everything that the hub, the connection or the disk refuses, and in a build without the
    /// feature `hub`.
    pub fn snapshot(&self, id: &str, progress: bool) -> Result<PathBuf> {
        self.part(id, Wanted::Model, progress)
    }

    /// The same where only a part of a model is wanted: no other files are fetched.
    #[cfg(not(feature = "hub"))]
    pub fn part(&self, id: &str, _wanted: Wanted, _progress: bool) -> Result<PathBuf> {
        anyhow::bail!(
            "`{id}` is a model of the hub, and this sdgen was built without it\n\n\
             hint: build it with `cargo build --release --features hub`, or name a folder or a \
             `.safetensors` file"
        )
    }
}

#[cfg(feature = "hub")]
impl Hub {
    /// The same where only a part of a model is wanted: no other files are fetched.
    pub fn part(&self, id: &str, wanted: Wanted, progress: bool) -> Result<PathBuf> {
        let mut reference = Reference::parse(id)?;
        reference.wanted = wanted;
        match self.cached(&reference) {
            Ok(path) => Ok(path),
            Err(error) if self.offline => Err(errors::offline(error, &reference, &self.cache_dir)),
            Err(_) => Download::new(self, &reference, progress)?.run(),
        }
    }

    /// The snapshot if the cache alone has it. Makes no request.
    fn cached(&self, reference: &Reference) -> Result<PathBuf, SelectionError> {
        let cache = RepoCache::new(&self.cache_dir, reference);
        let commit = cache
            .commit_of(&reference.revision)
            .ok_or(SelectionError::Absent)?;
        let folder = cache.snapshot_path(&commit);
        let files = cache::files_below(&folder);
        if files.is_empty() {
            return Err(SelectionError::Absent);
        }
        let selection = select(reference, &files, &mut |file| {
            cache::read_json(&folder.join(file))
        })?;
        // One checkpoint lying in the cache may be one of many files of its repository, which only
        // the hub can tell; once told, it is written down.
        let guessed = reference.file.is_none() && selection.checkpoint.is_some();
        if guessed && !self.offline && !cache.no_index_path(&commit).exists() {
            return Err(SelectionError::Missing(MODEL_INDEX.to_string()));
        }
        Ok(selection.path(folder))
    }
}

/// The values of variables that are text.
fn text_of<'a>(
    lookup: &'a dyn Fn(&str) -> Option<OsString>,
) -> impl Fn(&str) -> Option<String> + 'a {
    |name| lookup(name)?.into_string().ok()
}

/// Puts in the values of `$NAME` and `${NAME}`; what is not set stays as it is.
fn expand_variables(text: &str, value: &dyn Fn(&str) -> Option<String>) -> String {
    let (mut out, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once('$') {
        out += before;
        let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let (name, end) = match after
            .strip_prefix('{')
            .and_then(|inner| inner.split_once('}'))
        {
            Some((name, end)) => (name, end),
            None => after.split_at(after.find(|c| !is_part(c)).unwrap_or(after.len())),
        };
        match value(name).filter(|_| !name.is_empty()) {
            Some(value) => {
                out += &value;
                rest = end;
            }
            None => {
                out.push('$');
                rest = after;
            }
        }
    }
    out + rest
}

/// Python's reading of a boolean variable.
fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str())
}

#[cfg(all(test, not(feature = "hub")))]
mod tests {
    use super::*;

    #[test]
    fn a_build_without_the_hub_says_so() {
        let hub = Hub::from_lookup(false, &|_| None);
        let error = hub.snapshot("me/model", false).err().map(|e| e.to_string());
        assert!(error.is_some_and(|error| error.contains("built without it")));
    }
}
