//! Pictures between others: variations of a seed. Drives the program as a script would.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::*;
use std::path::Path;
use std::process::Command;

/// Quick pictures of a tiny random checkpoint.
fn tiny(folder: &Path) -> Command {
    let mut command = sdgen(folder);
    command.args(["--steps", "3", "-W", "16", "-H", "16", "-q", "-m"]).arg(fixture("sd1"));
    command
}

fn draw(folder: &Path, prompt: &str, name: &str, options: &[&str]) {
    succeed(tiny(folder).args([prompt, "-o", name]).args(options));
}

fn pixels(folder: &Path, name: &str) -> Vec<u8> {
    sdgen::image::Picture::decode(&std::fs::read(folder.join(name)).unwrap()).unwrap().rgb
}

fn distance(a: &[u8], b: &[u8]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt()
}

fn metadata(folder: &Path, name: &str) -> sdgen::image::Metadata {
    sdgen::image::read_metadata(&std::fs::read(folder.join(name)).unwrap()).unwrap().unwrap()
}

#[test]
fn a_variation_is_the_plain_picture_at_0_the_other_seeds_at_1_and_near_the_first_between() {
    let dir = tempfile::tempdir().unwrap();
    for sampler in ["ddim", "euler-a"] {
        draw(dir.path(), "a cat", &format!("{sampler}-plain.png"), &["-s", "3", "--sampler", sampler]);
        draw(dir.path(), "a cat", &format!("{sampler}-other.png"), &["-s", "8", "--sampler", sampler]);
        for strength in ["0", "0.1", "0.5", "1"] {
            let variation = format!("8:{strength}");
            draw(dir.path(), "a cat", &format!("{sampler}-{strength}.png"), &["-s", "3", "--sampler", sampler, "--variation", &variation]);
        }
        let [plain, other, same, near, far, all] =
            ["plain", "other", "0", "0.1", "0.5", "1"].map(|name| pixels(dir.path(), &format!("{sampler}-{name}.png")));
        assert!(same == plain, "{sampler}");
        // an ancestral sampler's later noise is the first seed's
        assert_eq!(all == other, sampler == "ddim");
        assert!(0.0 < distance(&near, &plain) && distance(&near, &plain) < distance(&far, &plain), "{sampler}");
    }
}

#[test]
fn a_variation_is_remembered_drawn_again_and_may_be_a_lines_or_swept() {
    let dir = tempfile::tempdir().unwrap();
    draw(dir.path(), "a cat", "a.png", &["-s", "3", "--variation", "8:0.25"]);
    let known = metadata(dir.path(), "a.png");
    assert_eq!(known.sdgen["variation"], "8:0.25");
    assert!(known.parameters.contains(", Variation seed: 8, Variation seed strength: 0.25, "), "{}", known.parameters);
    std::fs::write(dir.path().join("jobs.jsonl"), r#"{"prompt": "a cat", "seed": 3, "variation": "8:0.25", "output": "b.png"}"#).unwrap();
    succeed(tiny(dir.path()).args(["--from", "jobs.jsonl"]));
    assert!(pixels(dir.path(), "a.png") == pixels(dir.path(), "b.png"));
    succeed(tiny(dir.path()).args(["a cat", "-s", "3", "--sweep", "variation=8:0.25,9:0.25", "-b", "2"]));
    assert!(pixels(dir.path(), "a.png") == pixels(dir.path(), "a-cat-3-variation-8-0-25.png"));
    assert!(pixels(dir.path(), "a.png") != pixels(dir.path(), "a-cat-3-variation-9-0-25.png"));
    succeed(sdgen(dir.path()).args(["check", "a.png", "a-cat-3-variation-9-0-25.png", "--model"]).arg(fixture("sd1")));
}

#[test]
fn a_variation_that_cannot_be_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    for wrong in ["8", "8:", "x:0.5", "8:1.5", "8:-0.1", "8:nan", ""] {
        fail(tiny(dir.path()).args(["a cat", &format!("--variation={wrong}")]), 2, &["--variation", "SEED:X", "9:0.2"]);
    }
}
