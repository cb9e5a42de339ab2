//! `sdgen models`: short names, and what lies in the hub's cache.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::common::*;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A repository in a cache, with files of these sizes in its only snapshot.
fn cache_model(cache: &Path, id: &str, files: &[(&str, usize)]) {
    let folder = cache.join(format!("models--{}", id.replace('/', "--")));
    fs::create_dir_all(folder.join("refs")).unwrap();
    fs::write(folder.join("refs/main"), COMMIT).unwrap();
    for (name, bytes) in files {
        let path = folder.join("snapshots").join(COMMIT).join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, vec![0; *bytes]).unwrap();
    }
}

#[test]
fn models_have_short_names_and_what_is_in_the_cache_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let sd15 = "stable-diffusion-v1-5/stable-diffusion-v1-5";
    cache_model(
        &cache,
        sd15,
        &[("unet/config.json", 1000), ("vae/x.safetensors", 2_500_000)],
    );
    cache_model(&cache, "somebody/some-model", &[("model.safetensors", 300)]);
    let list = |args: &[&str]| {
        let mut command = sdgen(dir.path());
        command.arg("models").args(args).env("HF_HUB_CACHE", &cache);
        stdout(&succeed(&mut command))
    };
    let records: Vec<Value> = list(&["--json"])
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let find = |key: &str, value: &str| {
        let mut records = records.iter();
        records.find(|record| record[key] == value).unwrap().clone()
    };
    assert_eq!(
        find("name", "mini"),
        json!({ "name": "mini", "hub_id": null, "cached": [] })
    );
    let snapshot = |bytes: usize| json!([{ "revision": "main", "commit": COMMIT, "bytes": bytes }]);
    assert_eq!(
        find("name", "sd15"),
        json!({ "name": "sd15", "hub_id": sd15, "cached": snapshot(2_501_000) })
    );
    assert_eq!(
        find("hub_id", "somebody/some-model"),
        json!({ "name": null, "hub_id": "somebody/some-model", "cached": snapshot(300) })
    );
    assert_eq!(find("name", "sdxl")["cached"], json!([]));
    let with_file = find("name", "sdxl-lightning")["hub_id"].clone();
    assert!(with_file.as_str().unwrap().ends_with(".safetensors"));

    let table = list(&[]);
    let line = |start: &str| table.lines().find(|line| line.starts_with(start)).unwrap();
    assert!(line("mini ").contains("embedded"));
    assert!(line("sd15 ").ends_with("main (0123456789ab) 2.5 MB"));
    assert!(line("- ").contains("somebody/some-model"));
    assert_eq!(table.lines().count(), records.len());
}

#[test]
fn without_a_cache_the_short_names_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = sdgen(dir.path());
    command.arg("models").env("HF_HUB_CACHE", "nowhere");
    let table = stdout(&succeed(&mut command));
    assert!(table.lines().count() > 10 && table.contains("taesd"));
}
