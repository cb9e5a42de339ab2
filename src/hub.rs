//! The Hugging Face hub: finds a model in the cache that Python's `huggingface_hub` shares, and
//! fetches what is missing.
//!
//! `owner/name` goes in, the folder of a snapshot comes out; everything of the hub's protocol and
//! of the cache's layout stays in here:
//!
//! ```text
//! models--owner--name/refs/main                  the commit that `main` was when last asked
//!                     snapshots/COMMIT/unet/...  links to
//!                     blobs/ETAG                 contents, named by their checksum
//! ```
//!
//! The cache is read first, and no request is made when it has every file that sdgen needs; with
//! `offline` no network code runs at all. `hf-hub` provides the client (TLS, proxies, token) and
//! the names of the layout. Its own download is not used: it puts a file under its final name
//! unverified, appends to a partial file even when the server starts again from the first byte,
//! and has no time limits. Next: the opened files are read by `Checkpoint`, beside this file.

use crate::hex::hex;
use crate::weights::model_files::{self, NoWeights, Precision};
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::Value;
use sha2::{Digest, Sha256};

const ENDPOINT: &str = "https://huggingface.co";
const MODEL_INDEX: &str = "model_index.json";

/// How long the hub may stay silent before it counts as unreachable; `HF_HUB_DOWNLOAD_TIMEOUT`.
const TIMEOUT_S: u64 = 30;

/// A transfer that breaks off is taken up again this often before the person is asked to.
const ATTEMPTS: usize = 5;
const PAUSE_BETWEEN_ATTEMPTS: Duration = Duration::from_millis(500);
const MAX_REDIRECTS: usize = 10;

/// What a component of `model_index.json` consists of.
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
const COMPONENTS: [(&str, Component); 7] = [
    ("scheduler", Component::Scheduler),
    ("tokenizer", Component::Tokenizer),
    ("tokenizer_2", Component::Tokenizer),
    ("text_encoder", Component::Network { stem: "model" }),
    ("text_encoder_2", Component::Network { stem: "model" }),
    (
        "unet",
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

/// Where the hub and its cache are, and whether the network may be used.
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
        Hub::from_lookup(offline, &|name| std::env::var_os(name))
    }

    /// [`Hub::from_env`] over any source of variables. An empty value counts as unset.
    pub fn from_lookup(offline: bool, lookup: &dyn Fn(&str) -> Option<OsString>) -> Hub {
        let raw = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let text = |name: &str| raw(name)?.into_string().ok();
        let user = raw("HOME").or_else(|| raw("USERPROFILE"));
        let user = PathBuf::from(user.unwrap_or_default());
        let path = |name: &str| {
            let path = PathBuf::from(raw(name)?);
            match path.strip_prefix("~") {
                Ok(rest) => Some(user.join(rest)),
                Err(_) => Some(path),
            }
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

    /// The snapshot of `owner/name[@revision]` in the cache: the folder of a diffusers model, or
    /// the path of the checkpoint where the repository is a single `.safetensors` file or
    /// `owner/name/path/file.safetensors` names one.
    ///
    /// Only the files that sdgen reads are fetched, one variant of the weights (`fp16` where it is
    /// complete), with a bar on stderr if `progress`. A file takes its final name when its size and
    /// checksum are right; one that broke off is continued by the next call.
    ///
    /// Errors if `id` is no reference, if a file is missing and the network is off, and on
    /// everything that the hub, the connection or the disk refuses.
    pub fn snapshot(&self, id: &str, progress: bool) -> Result<PathBuf> {
        self.get(&Reference::parse(id)?, progress)
    }

    /// The same of a VAE: a repository that is one, or of a model's no more than that.
    pub fn vae(&self, id: &str, progress: bool) -> Result<PathBuf> {
        self.get(
            &Reference {
                vae_alone: true,
                ..Reference::parse(id)?
            },
            progress,
        )
    }

    fn get(&self, reference: &Reference, progress: bool) -> Result<PathBuf> {
        match self.cached(reference) {
            Ok(path) => Ok(path),
            Err(unfit) if self.offline => Err(unfit.offline(reference, &self.cache_dir)),
            Err(_) => Download::new(self, reference, progress)?.run(),
        }
    }

    /// The snapshot if the cache alone has it. Makes no request.
    fn cached(&self, reference: &Reference) -> Result<PathBuf, Unfit> {
        let cache = reference.cache(&self.cache_dir);
        let commit = if is_commit(&reference.revision) {
            reference.revision.clone()
        } else {
            let commit = fs::read_to_string(ref_path(&cache, &reference.revision));
            commit.unwrap_or_default().trim().to_string()
        };
        if !is_commit(&commit) {
            return Err(Unfit::Absent);
        }
        let folder = cache.pointer_path(&commit);
        let files = files_below(&folder);
        if files.is_empty() {
            return Err(Unfit::Absent);
        }
        let selection = select(reference, &files, &mut |file| read_json(&folder.join(file)))?;
        // One checkpoint lying in the cache may be one of many files of its repository, which only
        // the hub can tell; once told, it is written down.
        let guessed = reference.file.is_none() && selection.checkpoint.is_some();
        if guessed && !self.offline && !no_index_path(&cache, &commit).exists() {
            return Err(Unfit::Missing(MODEL_INDEX.to_string()));
        }
        Ok(selection.path(folder))
    }
}

/// Python's reading of a boolean variable.
fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str())
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// `owner/name[/path/file.safetensors][@revision]`
struct Reference {
    /// As it was typed, for hints.
    id: String,
    /// `owner/name`
    repo: String,
    /// A branch, a tag, `refs/pr/1` or a commit.
    revision: String,
    /// The one file that is wanted.
    file: Option<String>,
    /// Nothing else of a model is wanted.
    vae_alone: bool,
}

impl Reference {
    fn parse(id: &str) -> Result<Reference> {
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
        if let Some(file) = file.as_ref().filter(|file| !file.ends_with(".safetensors")) {
            return Err(anyhow!(
                "`{file}` of `{owner}/{name}` is not a `.safetensors` file\n\n{hint}"
            ));
        }
        Ok(Reference {
            id: id.to_string(),
            repo: format!("{owner}/{name}"),
            revision: revision.to_string(),
            file,
            vae_alone: false,
        })
    }

    fn hf_repo(&self) -> Repo {
        Repo::with_revision(self.repo.clone(), RepoType::Model, self.revision.clone())
    }

    fn cache(&self, dir: &Path) -> CacheRepo {
        Cache::new(dir.to_path_buf()).repo(self.hf_repo())
    }
}

/// `models--owner--name/{name}`, a place that `hf-hub` has no accessor for.
fn sibling_of_snapshots(cache: &CacheRepo, name: &str) -> PathBuf {
    let mut path = cache.pointer_path("commit");
    path.pop();
    path.pop();
    path.join(name)
}

fn ref_path(cache: &CacheRepo, revision: &str) -> PathBuf {
    sibling_of_snapshots(cache, "refs").join(revision)
}

/// The record, which Python writes too, that `model_index.json` does not exist at this commit.
fn no_index_path(cache: &CacheRepo, commit: &str) -> PathBuf {
    sibling_of_snapshots(cache, ".no_exist")
        .join(commit)
        .join(MODEL_INDEX)
}

/// The files of a snapshot, relative to it with `/`; a link whose blob is gone does not count.
fn files_below(folder: &Path) -> BTreeSet<String> {
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

fn read_json(path: &Path) -> Result<Value> {
    let bytes = fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    serde_json::from_slice(&bytes).map_err(|e| {
        anyhow!(
            "`{path}` is not valid JSON: {e}\n\nhint: delete `{path}` and pull the model again",
            path = path.display()
        )
    })
}

/// Why a listing of files does not make a model.
#[derive(Debug)]
enum Unfit {
    /// Nothing of the repository is there.
    Absent,
    /// A file that sdgen needs is not in the listing.
    Missing(String),
    /// More or other than a missing file; says so itself.
    Other(anyhow::Error),
}

impl From<anyhow::Error> for Unfit {
    fn from(error: anyhow::Error) -> Unfit {
        Unfit::Other(error)
    }
}

impl Unfit {
    /// The error for a person who is offline.
    fn offline(self, reference: &Reference, cache_dir: &Path) -> anyhow::Error {
        let Reference {
            id, repo, revision, ..
        } = reference;
        let dir = cache_dir.display();
        let cause = match self {
            Unfit::Absent if revision == "main" => {
                format!("`{repo}` is not in the hub's cache `{dir}`")
            }
            Unfit::Absent => {
                format!("revision `{revision}` of `{repo}` is not in the hub's cache `{dir}`")
            }
            Unfit::Missing(file) => {
                format!("`{repo}` is incomplete in the hub's cache `{dir}`: `{file}` is missing")
            }
            Unfit::Other(error) => return error,
        };
        anyhow!(
            "{cause}, and the network is off\n\n\
             hint: run `sdgen pull {id}` once, without `--offline` and with HF_HUB_OFFLINE unset"
        )
    }

    /// The error where `files` is all that the repository has.
    fn online(self, reference: &Reference, files: &BTreeSet<String>) -> anyhow::Error {
        let repo = &reference.repo;
        let file = match self {
            Unfit::Absent => {
                return anyhow!("`{repo}` is empty\n\nhint: check its page on the hub");
            }
            Unfit::Missing(file) => file,
            Unfit::Other(error) => return error,
        };
        let pickled = |file: &&String| file.ends_with(".bin") || file.ends_with(".ckpt");
        // A whole checkpoint lies at the top; below are the parts of one.
        let choice = |f: &&String| {
            f.ends_with(".safetensors") && (reference.file.is_some() || !f.contains('/'))
        };
        let hint = if files.iter().any(|f| choice(&f)) {
            format!(
                "to use one of its files, name it:{}",
                listed(repo, files.iter().filter(choice))
            )
        } else if let Some(pickle) = files.iter().find(pickled) {
            format!(
                "it has pickled weights only (`{pickle}`), which can run code when read; \
                 look for a `safetensors` conversion of it on the hub"
            )
        } else {
            "sdgen draws with diffusers folders and `.safetensors` checkpoints".to_string()
        };
        anyhow!("`{repo}` has no `{file}`\n\nhint: {hint}")
    }
}

/// Up to twelve files, one a line, in the form that can be typed.
fn listed<'a>(repo: &str, files: impl Iterator<Item = &'a String>) -> String {
    files
        .take(12)
        .map(|file| format!("\n    {repo}/{file}"))
        .collect()
}

/// The files to have, in the order in which to fetch them, and what the person then opens.
struct Selection {
    files: Vec<String>,
    /// The file to open where it is not the folder.
    checkpoint: Option<String>,
}

impl Selection {
    fn path(&self, folder: PathBuf) -> PathBuf {
        match &self.checkpoint {
            Some(file) => folder.join(file),
            None => folder,
        }
    }
}

/// Picks from `files`, the listing of a repository or of a snapshot, what sdgen needs; `read`
/// parses one of them. The weights come last and what a model can do without comes first, so an
/// interrupted download never looks complete.
fn select(
    reference: &Reference,
    files: &BTreeSet<String>,
    read: &mut dyn FnMut(&str) -> Result<Value>,
) -> Result<Selection, Unfit> {
    if let Some(file) = &reference.file {
        let file = present(files, file.clone())?;
        return Ok(Selection {
            files: vec![file.clone()],
            checkpoint: Some(file),
        });
    }
    if reference.vae_alone && files.contains("vae/config.json") {
        return vae(files, "vae/", read);
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

    let index = read(MODEL_INDEX)?;
    // "vae": ["diffusers", "AutoencoderKL"], or [null, null] where a pipeline goes without
    let listed = |name: &str| {
        index
            .get(name)
            .and_then(|v| v.get(0))
            .is_some_and(|v| !v.is_null())
    };
    if !listed("unet") {
        let class = index
            .get("_class_name")
            .and_then(Value::as_str)
            .unwrap_or("pipeline");
        return Err(Unfit::Other(anyhow!(
            "`{}` is a `{class}` without a U-Net\n\nhint: sdgen draws with Stable Diffusion models; \
             try `sdgen pull stable-diffusion-v1-5/stable-diffusion-v1-5`",
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
            Component::Tokenizer => small.extend(tokenizer_files(files, name)?),
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

/// A VAE whose files begin with `folder`.
fn vae(
    files: &BTreeSet<String>,
    folder: &str,
    read: &mut dyn FnMut(&str) -> Result<Value>,
) -> Result<Selection, Unfit> {
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

fn present(files: &BTreeSet<String>, file: String) -> Result<String, Unfit> {
    if files.contains(&file) {
        Ok(file)
    } else {
        Err(Unfit::Missing(file))
    }
}

/// The only `.safetensors` at the top of a repository.
fn single_checkpoint(repo: &str, files: &BTreeSet<String>) -> Result<String, Unfit> {
    let top = |file: &&String| file.ends_with(".safetensors") && !file.contains('/');
    let found: Vec<&String> = files.iter().filter(top).collect();
    match found.as_slice() {
        [] => Err(Unfit::Missing(MODEL_INDEX.to_string())),
        [file] => Ok((*file).clone()),
        _ => Err(Unfit::Other(anyhow!(
            "`{repo}` has {} checkpoints and no `{MODEL_INDEX}`\n\nhint: name one of them:{}",
            found.len(),
            listed(repo, found.iter().copied())
        ))),
    }
}

/// `vocab.json` with `merges.txt`, else `tokenizer.json`, after the settings that go with them.
fn tokenizer_files(files: &BTreeSet<String>, name: &str) -> Result<Vec<String>, Unfit> {
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

/// The weights of one network, `fp16` if it is complete.
fn weight_files(
    files: &BTreeSet<String>,
    folder: &str,
    stem: &str,
    read: &mut dyn FnMut(&str) -> Result<Value>,
) -> Result<Vec<String>, Unfit> {
    let path = |file: &str| format!("{folder}{file}");
    let found = model_files::weight_files(
        &[stem],
        Precision::Half,
        &|file| files.contains(&path(file)),
        &mut |index| read(&path(index)),
    );
    let found = found.map_err(|error| match error {
        NoWeights::Absent => Unfit::Missing(path(&format!("{stem}.safetensors"))),
        NoWeights::MissingShard { shard, .. } => Unfit::Missing(path(&shard)),
        NoWeights::EmptyIndex(index) => Unfit::Other(anyhow!("`{}` lists no shards", path(&index))),
        NoWeights::Unreadable(error) => Unfit::Other(error),
    })?;
    Ok(found
        .index
        .iter()
        .chain(&found.files)
        .map(|file| path(file))
        .collect())
}

/// One visit to the hub for one reference.
struct Download<'a> {
    hub: &'a Hub,
    reference: &'a Reference,
    cache: CacheRepo,
    /// Sends the token.
    known: ApiRepo,
    /// Sends none: for every origin but the endpoint's.
    stranger: ApiRepo,
    bar: ProgressBar,
}

/// What the hub says of a repository at a commit.
struct Listing {
    commit: String,
    /// Sizes in bytes, where the hub tells them.
    files: BTreeMap<String, Option<u64>>,
}

/// A response with the headers of the hub's protocol; redirects are not followed.
struct Reply {
    status: u16,
    location: Option<String>,
    etag: Option<String>,
    linked_etag: Option<String>,
    linked_size: Option<u64>,
    content_length: Option<u64>,
    content_range: Option<String>,
    /// `GatedRepo`, `RepoNotFound`, `RevisionNotFound`, `EntryNotFound`
    error_code: Option<String>,
    body: Box<dyn Read>,
}

/// Where the bytes of a file are, and what they must be.
struct Remote {
    url: String,
    /// The checksum (SHA-256 of a large file, git's SHA-1 of a small one) that names the blob.
    etag: String,
    size: u64,
}

impl Remote {
    /// Whether the etag is a checksum of the contents as they are.
    fn is_sha256(&self) -> bool {
        self.etag.len() == 64 && self.etag.bytes().all(|b| b.is_ascii_hexdigit())
    }
}

/// How a transfer ends that does not end well.
enum Broken {
    /// The connection broke off or made no sense; another try may help.
    Off(String),
    /// Another try would meet the same.
    Refused(anyhow::Error),
}

impl<'a> Download<'a> {
    fn new(hub: &'a Hub, reference: &'a Reference, progress: bool) -> Result<Download<'a>> {
        let client = |token: Option<String>| -> Result<ApiRepo> {
            let builder = ApiBuilder::from_cache(Cache::new(hub.cache_dir.clone()))
                .with_endpoint(hub.endpoint.clone())
                .with_token(token)
                .with_user_agent("sdgen", env!("CARGO_PKG_VERSION"));
            let api = builder.build().context("cannot set up the hub's client")?;
            Ok(api.repo(reference.hf_repo()))
        };
        let bar = if progress {
            ProgressBar::new(0)
        } else {
            ProgressBar::hidden()
        };
        bar.set_style(ProgressStyle::with_template(
            "{wide_msg} [{bar:24}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        )?);
        Ok(Download {
            hub,
            reference,
            cache: reference.cache(&hub.cache_dir),
            known: client(hub.token.clone())?,
            stranger: client(None)?,
            bar,
        })
    }

    fn run(&self) -> Result<PathBuf> {
        let listing = self.listing()?;
        let Listing { commit, files } = &listing;
        let names: BTreeSet<String> = files.keys().cloned().collect();
        let selection = select(self.reference, &names, &mut |file| {
            read_json(&self.fetch(&listing, file)?)
        })
        .map_err(|unfit| unfit.online(self.reference, &names))?;

        let folder = self.cache.pointer_path(commit);
        let missing: Vec<&String> = selection
            .files
            .iter()
            .filter(|file| !folder.join(file).is_file())
            .collect();
        let to_come: u64 = missing
            .iter()
            .filter_map(|file| files.get(*file).copied().flatten())
            .sum();
        self.bar.set_length(self.bar.position() + to_come);
        for file in missing {
            self.fetch(&listing, file)?;
        }

        // The notes come last, so that an older complete snapshot is not forgotten for half a new
        // one.
        if selection.checkpoint.is_some() && self.reference.file.is_none() {
            self.write_note(&no_index_path(&self.cache, commit), "")?;
        }
        if &self.reference.revision != commit {
            self.write_note(&ref_path(&self.cache, &self.reference.revision), commit)?;
        }
        self.bar.finish_and_clear();
        Ok(selection.path(folder))
    }

    /// Asks the hub for the commit and the files of the revision.
    fn listing(&self) -> Result<Listing> {
        let Reference { repo, revision, .. } = self.reference;
        let endpoint = &self.hub.endpoint;
        let mut url = format!(
            "{endpoint}/api/models/{repo}/revision/{}?blobs=true",
            escaped(revision, "")
        );
        let mut reply = self.get(&url, None)?;
        for _ in 0..MAX_REDIRECTS {
            let Some(next) = reply.redirect(&url) else {
                break;
            };
            url = next;
            reply = self.get(&url, None)?;
        }
        if reply.status != 200 {
            return Err(self.refused(&reply, None));
        }
        let mut body = Vec::new();
        reply
            .body
            .read_to_end(&mut body)
            .map_err(|e| self.unreachable(&url, &e))?;
        let info: Option<Value> = serde_json::from_slice(&body).ok();
        info.as_ref().and_then(Listing::parse).with_context(|| {
            format!(
                "`{endpoint}` does not answer as the hub does\n\n\
                 hint: HF_ENDPOINT is the hub's address, by default `{ENDPOINT}`"
            )
        })
    }

    /// Sees to it that `file` is in the snapshot, whole and verified. Returns its path there.
    fn fetch(&self, listing: &Listing, file: &str) -> Result<PathBuf> {
        let pointer = self.cache.pointer_path(&listing.commit).join(file);
        if pointer.is_file() {
            return Ok(pointer);
        }
        self.bar.set_message(file.to_string());
        let remote = self.resolve(&listing.commit, file)?;
        if listing.files.get(file).copied().flatten().is_none() {
            self.bar.inc_length(remote.size);
        }
        let start = self.bar.position();

        let blob = self.cache.blob_path(&remote.etag);
        let lock = self.lock(&remote.etag, file)?;
        if fs::metadata(&blob).map(|found| found.len()).ok() != Some(remote.size) {
            // Without a lock (some network file systems) no other process may share the name.
            let part = match &lock {
                Some(_) => format!("{}.incomplete", remote.etag),
                None => format!("{}.{}.incomplete", remote.etag, std::process::id()),
            };
            let part = blob.with_file_name(part);
            self.transfer(listing, file, &remote, &part)?;
            fs::rename(&part, &blob).map_err(|e| self.disk(&e, &blob))?;
        }
        self.bar.set_position(start + remote.size);
        self.link(&blob, &pointer, file)?;
        Ok(pointer)
    }

    /// Asks for one byte of `file` to learn its checksum, its size, and where a large file really
    /// is.
    fn resolve(&self, commit: &str, file: &str) -> Result<Remote> {
        let Reference { repo, .. } = self.reference;
        let mut url = format!(
            "{}/{repo}/resolve/{commit}/{}",
            self.hub.endpoint,
            escaped(file, "/")
        );
        let (mut etag, mut size) = (None, None);
        for _ in 0..MAX_REDIRECTS {
            let mut reply = self.get(&url, Some("bytes=0-0".to_string()))?;
            etag = etag.or(reply.linked_etag.take());
            size = size.or(reply.linked_size);
            if let Some(next) = reply.redirect(&url) {
                let elsewhere = origin(&next) != origin(&self.hub.endpoint);
                if elsewhere && let (Some(etag), Some(size)) = (&etag, size) {
                    return Ok(Remote {
                        url: next,
                        etag: etag.clone(),
                        size,
                    });
                }
                url = next;
                continue;
            }
            size = match reply.status {
                200 => size.or(reply.content_length),
                206 => size.or(reply.content_range.as_deref().and_then(total_of)),
                _ => return Err(self.refused(&reply, Some(file))),
            };
            // An etag becomes a file's name.
            let etag = etag.or(reply.etag).filter(|etag| {
                !etag.is_empty()
                    && etag
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
            });
            return match (etag, size) {
                (Some(etag), Some(size)) => Ok(Remote { url, etag, size }),
                _ => Err(anyhow!(
                    "the hub tells no checksum and size of `{file}`\n\n\
                     hint: HF_ENDPOINT is the hub's address, by default `{ENDPOINT}`"
                )),
            };
        }
        Err(anyhow!(
            "the hub redirects `{file}` in a circle\n\nhint: try again later, or check HF_ENDPOINT"
        ))
    }

    /// Brings the whole of `remote` to `part` and verifies it, continuing what is there already.
    /// A part with a wrong checksum is deleted.
    fn transfer(&self, listing: &Listing, file: &str, remote: &Remote, part: &Path) -> Result<()> {
        let repo = &self.reference.repo;
        let start = self.bar.position();
        let mut place = remote.url.clone();
        let mut cause = String::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                std::thread::sleep(PAUSE_BETWEEN_ATTEMPTS);
                place = self.resolve(&listing.commit, file)?.url; // a signed address runs out
            }
            // What cannot be verified in the end is not continued.
            if !remote.is_sha256() || length(part) > remote.size {
                self.remove(part)?;
            }
            let resumed_at = length(part);
            self.bar.set_position(start + resumed_at);
            self.bar.reset_eta();
            match self.receive(&place, file, remote.size, part) {
                Ok(()) => {}
                Err(Broken::Refused(error)) => return Err(error),
                Err(Broken::Off(why)) => {
                    cause = format!("the connection broke off ({why})");
                    continue;
                }
            }
            if !remote.is_sha256() || sha256(part).map_err(|e| self.disk(&e, part))? == remote.etag
            {
                return Ok(());
            }
            self.remove(part)?;
            cause = "its checksum is wrong".to_string();
            if resumed_at == 0 {
                break;
            }
        }
        Err(anyhow!(
            "`{file}` of `{repo}` could not be downloaded: {cause}\n\n\
             hint: run `sdgen pull {}` again; it continues with what is missing",
            self.reference.id
        ))
    }

    /// One request for what `part` lacks of `size` bytes, appended to it.
    fn receive(&self, url: &str, file: &str, size: u64, part: &Path) -> Result<(), Broken> {
        let on_disk = |e: io::Error| Broken::Refused(self.disk(&e, part));
        let parent = part.parent().unwrap_or(part);
        fs::create_dir_all(parent).map_err(on_disk)?;
        let mut output = OpenOptions::new()
            .append(true)
            .create(true)
            .open(part)
            .map_err(on_disk)?;
        let mut received = length(part);
        if received < size {
            let range = (received > 0).then(|| format!("bytes={received}-"));
            let mut url = url.to_string();
            let mut reply = self.get(&url, range.clone()).map_err(Broken::Refused)?;
            for _ in 0..MAX_REDIRECTS {
                let Some(next) = reply.redirect(&url) else {
                    break;
                };
                url = next;
                reply = self.get(&url, range.clone()).map_err(Broken::Refused)?;
            }
            match reply.status {
                206 => {}
                200 if received > 0 => {
                    output.set_len(0).map_err(on_disk)?; // the server begins at the beginning
                    self.bar
                        .set_position(self.bar.position().saturating_sub(received));
                    received = 0;
                }
                200 => {}
                // Elsewhere a refusal is of a signed address that has run out.
                status if status >= 500 || origin(&url) != origin(&self.hub.endpoint) => {
                    return Err(Broken::Off(format!("status {status}")));
                }
                _ => return Err(Broken::Refused(self.refused(&reply, Some(file)))),
            }
            let mut buffer = vec![0; 1 << 18];
            loop {
                let n = reply
                    .body
                    .read(&mut buffer)
                    .map_err(|e| Broken::Off(e.to_string()))?;
                let Some(chunk) = buffer.get(..n).filter(|chunk| !chunk.is_empty()) else {
                    break;
                };
                output.write_all(chunk).map_err(on_disk)?;
                received += n as u64;
                self.bar.inc(n as u64);
            }
        }
        if received != size {
            return Err(Broken::Off(format!("{received} of {size} bytes came")));
        }
        output.sync_all().map_err(on_disk)
    }

    /// A request that follows no redirect. The token goes to the endpoint and nowhere else.
    fn get(&self, url: &str, range: Option<String>) -> Result<Reply> {
        let home = origin(url) == origin(&self.hub.endpoint);
        let client = if home { &self.known } else { &self.stranger };
        let mut request = client
            .info_request()
            .uri(url)
            .header("Accept-Encoding", "identity");
        if let Some(range) = range {
            request = request.header("Range", range);
        }
        let request = request
            .config()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(self.hub.timeout))
            .timeout_per_read(Some(self.hub.timeout))
            .build();
        let response = request.call().map_err(|e| self.unreachable(url, &e))?;

        let status = response.status().as_u16();
        let header = |name: &str| Some(response.headers().get(name)?.to_str().ok()?.to_string());
        let number = |name: &str| header(name)?.parse().ok();
        let etag = |name: &str| {
            Some(
                header(name)?
                    .trim_start_matches("W/")
                    .trim_matches('"')
                    .to_string(),
            )
        };
        Ok(Reply {
            status,
            location: header("location"),
            etag: etag("etag"),
            linked_etag: etag("x-linked-etag"),
            linked_size: number("x-linked-size"),
            content_length: number("content-length"),
            content_range: header("content-range"),
            error_code: header("x-error-code"),
            body: Box::new(response.into_body().into_reader()),
        })
    }

    /// Waits for other processes that fetch the same blob, by the lock that Python takes too. None
    /// where the file system has no locks.
    fn lock(&self, etag: &str, file: &str) -> Result<Option<File>> {
        let folder = self
            .hub
            .cache_dir
            .join(".locks")
            .join(self.reference.hf_repo().folder_name());
        let path = folder.join(format!("{etag}.lock"));
        fs::create_dir_all(&folder).map_err(|e| self.disk(&e, &folder))?;
        let lock = OpenOptions::new().append(true).create(true).open(&path);
        let lock = lock.map_err(|e| self.disk(&e, &path))?;
        if lock.try_lock().is_ok() {
            return Ok(Some(lock));
        }
        self.bar
            .set_message(format!("{file} (another process fetches it)"));
        self.bar.tick();
        Ok(lock.lock().is_ok().then_some(lock))
    }

    /// Makes `pointer` the relative link to `blob` that Python makes, or a copy without links.
    fn link(&self, blob: &Path, pointer: &Path, file: &str) -> Result<()> {
        let name = blob.file_name().unwrap_or_default();
        let up = "../".repeat(2 + file.matches('/').count());
        let target = Path::new(&up).join("blobs").join(name);
        self.put(pointer, |path| {
            symlink(&target, path).or_else(|_| fs::copy(blob, path).map(|_| ()))
        })
    }

    fn write_note(&self, path: &Path, text: &str) -> Result<()> {
        self.put(path, |path| fs::write(path, text))
    }

    /// Makes `path`, in one step for who looks at it, what `make` makes under another name.
    fn put(&self, path: &Path, make: impl FnMut(&Path) -> io::Result<()>) -> Result<()> {
        let folder = path.parent().unwrap_or(path);
        fs::create_dir_all(folder).map_err(|e| self.disk(&e, folder))?;
        let made = tempfile::Builder::new()
            .prefix(".sdgen-")
            .make_in(folder, make);
        let made = made.map_err(|e| self.disk(&e, path))?;
        made.into_temp_path()
            .persist(path)
            .map_err(|e| self.disk(&e.error, path))
    }

    fn remove(&self, part: &Path) -> Result<()> {
        match fs::remove_file(part) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(self.disk(&e, part)),
            _ => Ok(()),
        }
    }

    /// The error of a cache that cannot be written.
    fn disk(&self, error: &io::Error, path: &Path) -> anyhow::Error {
        let (path, id) = (path.display(), &self.reference.id);
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                let missing = self
                    .bar
                    .length()
                    .unwrap_or(0)
                    .saturating_sub(self.bar.position());
                anyhow!(
                    "no space left on the disk for `{path}` ({} still to come)\n\n\
                     hint: free some space, or set HF_HOME to a folder on another disk, and run \
                     `sdgen pull {id}` again",
                    HumanBytes(missing)
                )
            }
            _ => anyhow!(
                "cannot write `{path}` in the hub's cache: {error}\n\n\
                 hint: set HF_HOME to a folder that you may write to"
            ),
        }
    }

    /// The error of a connection that could not be made, or broke off where nothing was gained yet.
    fn unreachable(&self, url: &str, error: &dyn Error) -> anyhow::Error {
        let id = &self.reference.id;
        anyhow!(
            "cannot reach `{}`: {error}\n\n\
             hint: check the network and HF_ENDPOINT, then run `sdgen pull {id}` again",
            origin(url)
        )
    }

    /// The error of an answer that is a refusal.
    fn refused(&self, reply: &Reply, file: Option<&str>) -> anyhow::Error {
        let Reference {
            id, repo, revision, ..
        } = self.reference;
        let endpoint = &self.hub.endpoint;
        let status = reply.status;
        let code = reply.error_code.as_deref().unwrap_or_default();
        match (status, code) {
            (401 | 403, "GatedRepo") => anyhow!(
                "`{repo}` is gated: its licence must be accepted first ({status})\n\n\
                 hint: accept it on {endpoint}/{repo}, then set HF_TOKEN to a token from {endpoint}/settings/tokens"
            ),
            (401, _) if self.hub.token.is_some() && code != "RepoNotFound" => anyhow!(
                "the hub does not accept the token for `{repo}` ({status})\n\n\
                 hint: set HF_TOKEN to a valid token from {endpoint}/settings/tokens"
            ),
            (401 | 403, _) => anyhow!(
                "`{repo}` does not exist, or is not open to everyone ({status})\n\n\
                 hint: check the name; for a private or gated model accept its licence on {endpoint}/{repo} and set \
                 HF_TOKEN to a token from {endpoint}/settings/tokens"
            ),
            (404, "RevisionNotFound") => anyhow!(
                "`{repo}` has no revision `{revision}` ({status})\n\n\
                 hint: its branches are listed on {endpoint}/{repo}/tree/main; without `@{revision}` it is `main`"
            ),
            (404, _) => match file {
                Some(file) => anyhow!(
                    "`{repo}` has no file `{file}` ({status})\n\n\
                     hint: its files are listed on {endpoint}/{repo}/tree/{revision}"
                ),
                None => anyhow!(
                    "`{repo}` does not exist on the hub ({status})\n\n\
                     hint: check the name, or look for it on {endpoint}/models"
                ),
            },
            (429, _) => anyhow!(
                "the hub takes no more requests for now ({status})\n\n\
                 hint: wait a few minutes, or set HF_TOKEN, then run `sdgen pull {id}` again"
            ),
            _ => anyhow!(
                "the hub answers {status} for `{}`\n\nhint: run `sdgen pull {id}` again later",
                file.unwrap_or(repo)
            ),
        }
    }
}

impl Listing {
    /// Reads the hub's `{"sha": .., "siblings": [{"rfilename": .., "size": ..}, ..]}`, leaving out
    /// names that would lead out of the snapshot. None where it is something else.
    fn parse(info: &Value) -> Option<Listing> {
        let commit = info
            .get("sha")?
            .as_str()
            .filter(|sha| is_commit(sha))?
            .to_string();
        let mut files = BTreeMap::new();
        for sibling in info.get("siblings")?.as_array()? {
            let name = sibling.get("rfilename")?.as_str()?;
            let outside =
                |part: &str| part.is_empty() || part == "." || part == ".." || part.contains('\\');
            if !name.split('/').any(outside) {
                files.insert(
                    name.to_string(),
                    sibling.get("size").and_then(Value::as_u64),
                );
            }
        }
        Some(Listing { commit, files })
    }
}

impl Reply {
    /// The address that this answer to `url` sends to, if it is a redirect.
    fn redirect(&self, url: &str) -> Option<String> {
        let location = self
            .location
            .as_deref()
            .filter(|_| matches!(self.status, 301 | 302 | 303 | 307 | 308))?;
        Some(
            if location.starts_with("http://") || location.starts_with("https://") {
                location.to_string()
            } else if let Some(rest) = location.strip_prefix("//") {
                let (scheme, _) = url.split_once("://")?;
                format!("{scheme}://{rest}")
            } else {
                format!("{}/{}", origin(url), location.trim_start_matches('/'))
            },
        )
    }
}

/// `scheme://host:port` of an address, in lower case.
fn origin(url: &str) -> String {
    let scheme = url.find("://").map_or(0, |i| i + 3);
    let end = url
        .get(scheme..)
        .and_then(|rest| rest.find(['/', '?', '#']));
    url.get(..end.map_or(url.len(), |end| scheme + end))
        .unwrap_or(url)
        .to_ascii_lowercase()
}

/// The total of `bytes 0-0/1234`.
fn total_of(content_range: &str) -> Option<u64> {
    content_range.rsplit_once('/')?.1.parse().ok()
}

/// Percent-encodes for a path (RFC 3986, unreserved characters stay), leaving `keep` as well.
fn escaped(text: &str, keep: &str) -> String {
    let plain =
        |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b) || keep.as_bytes().contains(&b);
    let escape = |b: u8| {
        if plain(b) {
            char::from(b).to_string()
        } else {
            format!("%{b:02X}")
        }
    };
    text.bytes().map(escape).collect()
}

/// Bytes of a file; 0 where there is none.
fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |found| found.len())
}

/// SHA-256 of a file's contents, in hexadecimal.
fn sha256(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut input = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = input.read(&mut buffer)?;
        let Some(chunk) = buffer.get(..n).filter(|chunk| !chunk.is_empty()) else {
            break;
        };
        hasher.update(chunk);
    }
    Ok(hex(&hasher.finalize()))
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}
