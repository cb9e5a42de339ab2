//! `sdgen models`: the short names of models, and what lies in the hub's cache.

use crate::hub::Hub;
use crate::pipeline::family::{SHORT_NAMES, VAE_SHORT_NAMES};
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Characters of a commit that are shown.
const SHORT_COMMIT: usize = 12;

/// How to list the models.
#[derive(Debug, Args)]
pub struct ModelsArgs {
    /// One JSON object a model on stdout
    #[arg(long)]
    json: bool,
}

/// A model that has a short name or lies in the cache.
struct Model {
    short_name: Option<&'static str>,
    /// `owner/name`, perhaps with a file; `None` for the embedded model.
    hub_id: Option<String>,
    snapshots: Vec<Snapshot>,
}

/// One revision of a repository in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Snapshot {
    /// The branch or tag that it was fetched by, if one leads to it.
    revision: Option<String>,
    commit: String,
    /// The size of all its files.
    bytes: u64,
}

/// Lists all models: those with short names, then the rest of the cache.
pub fn run(args: &ModelsArgs) -> String {
    let models = models(&Hub::from_env(true).cache_dir);
    let lines: Vec<String> = if args.json {
        models
            .iter()
            .map(|model| as_json(model).to_string())
            .collect()
    } else {
        as_table(&models)
    };
    lines.into_iter().map(|line| line + "\n").collect()
}

fn models(cache_dir: &Path) -> Vec<Model> {
    let mut cached = cached(cache_dir);
    let mut models = vec![Model {
        short_name: Some("mini"),
        hub_id: None,
        snapshots: vec![],
    }];
    for (short_name, id) in SHORT_NAMES.iter().chain(&VAE_SHORT_NAMES) {
        let snapshots = cached.get(&repository(id)).cloned();
        models.push(Model {
            short_name: Some(short_name),
            hub_id: Some(id.to_string()),
            snapshots: snapshots.unwrap_or_default(),
        });
    }
    for (_, id) in SHORT_NAMES.iter().chain(&VAE_SHORT_NAMES) {
        cached.remove(&repository(id));
    }
    models.extend(cached.into_iter().map(|(id, snapshots)| Model {
        short_name: None,
        hub_id: Some(id),
        snapshots,
    }));
    models
}

/// `owner/name` of a hub id, which may name a file as well.
fn repository(id: &str) -> String {
    let parts: Vec<&str> = id.split('/').take(2).collect();
    parts.join("/")
}

/// The repositories of models in a cache, with their snapshots; empty if there is no cache.
fn cached(cache_dir: &Path) -> BTreeMap<String, Vec<Snapshot>> {
    let mut repositories = BTreeMap::new();
    for folder in fs::read_dir(cache_dir).into_iter().flatten().flatten() {
        let name = folder.file_name().to_string_lossy().into_owned();
        let Some(id) = name.strip_prefix("models--") else {
            continue;
        };
        let snapshots = snapshots(&folder.path());
        if !snapshots.is_empty() {
            repositories.insert(id.replacen("--", "/", 1), snapshots);
        }
    }
    repositories
}

/// The snapshots of a repository's folder, by commit.
fn snapshots(folder: &Path) -> Vec<Snapshot> {
    let mut revisions = BTreeMap::new();
    for (name, path) in files(&folder.join("refs"), "") {
        if let Ok(commit) = fs::read_to_string(path) {
            revisions.insert(commit.trim().to_string(), name);
        }
    }
    let mut snapshots = vec![];
    let entries = fs::read_dir(folder.join("snapshots"));
    for entry in entries.into_iter().flatten().flatten() {
        let commit = entry.file_name().to_string_lossy().into_owned();
        let sizes = files(&entry.path(), "").into_iter().map(|(_, path)| {
            // the files are links to blobs
            fs::metadata(path).map_or(0, |metadata| metadata.len())
        });
        snapshots.push(Snapshot {
            revision: revisions.get(&commit).cloned(),
            bytes: sizes.sum(),
            commit,
        });
    }
    snapshots.sort_by(|a, b| a.commit.cmp(&b.commit));
    snapshots
}

/// All files below a folder, with their names from there on.
fn files(folder: &Path, prefix: &str) -> Vec<(String, PathBuf)> {
    let mut all = vec![];
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            all.extend(files(&entry.path(), &format!("{name}/")));
        } else {
            all.push((name, entry.path()));
        }
    }
    all
}

fn as_json(model: &Model) -> Value {
    let snapshot = |snapshot: &Snapshot| json!({ "revision": snapshot.revision, "commit": snapshot.commit, "bytes": snapshot.bytes });
    json!({
        "name": model.short_name, "hub_id": model.hub_id,
        "cached": model.snapshots.iter().map(snapshot).collect::<Vec<_>>(),
    })
}

/// Lines of a table: short name, hub id, and what of it is in the cache.
fn as_table(models: &[Model]) -> Vec<String> {
    let id = |model: &Model| match &model.hub_id {
        Some(id) => id.clone(),
        None => "embedded in this program".into(),
    };
    let name = |model: &Model| model.short_name.unwrap_or("-");
    let width = |column: &dyn Fn(&Model) -> usize| models.iter().map(column).max().unwrap_or(0);
    let name_width = width(&|model| name(model).len());
    let id_width = width(&|model| id(model).len());
    let line = |model: &Model| {
        let cached: Vec<String> = model.snapshots.iter().map(in_words).collect();
        let line = format!(
            "{:<name_width$}  {:<id_width$}  {}",
            name(model),
            id(model),
            cached.join(", ")
        );
        line.trim_end().to_string()
    };
    models.iter().map(line).collect()
}

/// A snapshot for a person: `main (5ede9e4bf3e3) 2.1 GB`.
fn in_words(snapshot: &Snapshot) -> String {
    let commit = snapshot.commit.get(..SHORT_COMMIT);
    let commit = commit.unwrap_or(&snapshot.commit);
    let revision = match &snapshot.revision {
        Some(revision) => format!("{revision} ({commit})"),
        None => commit.into(),
    };
    format!("{revision} {}", size_of(snapshot.bytes))
}

fn size_of(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}
