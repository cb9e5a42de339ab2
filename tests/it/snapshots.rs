//! What people read, word by word: the help of every command, and the errors that they meet most.
//!
//! The texts lie in `snapshots/`. A change that is meant is accepted with
//! `INSTA_UPDATE=always cargo test --test it -- snapshots`, and reviewed in the diff.

use crate::common::*;
use clap::CommandFactory;
use insta::assert_snapshot;
use sdgen::cli::args::Cli;
use std::path::Path;
use std::process::Command;

#[test]
fn claps_own_checks_of_the_command_line_hold() {
    Cli::command().debug_assert();
}

/// The program, with lines as wide as in a terminal of 100 columns.
fn wide(folder: &Path) -> Command {
    let mut command = sdgen(folder);
    command.env("COLUMNS", "100");
    command
}

#[test]
fn the_help_of_every_command_is_as_reviewed() {
    let dir = tempfile::tempdir().unwrap();
    let help = |args: &[&str]| stdout(&succeed(wide(dir.path()).args(args)));
    assert_snapshot!("help", help(&["--help"]));
    assert_snapshot!("help_short", help(&["-h"]));
    let cli = Cli::command();
    assert!(cli.get_subcommands().count() > 0);
    for command in cli.get_subcommands() {
        let name = command.get_name();
        assert_snapshot!(format!("help_{name}"), help(&[name, "--help"]));
    }
}

/// Runs each line of arguments, which all fail, and writes what a terminal would show.
fn errors(folder: &Path, lines: &[&str]) -> String {
    let mut shown = String::new();
    for line in lines {
        let mut command = wide(folder);
        command.env("HF_HOME", "hf").args(arguments(line));
        let output = command.output().unwrap();
        let code = output.status.code().unwrap();
        assert_ne!(code, 0, "{line}");
        let said = stdout(&output) + stderr(&output).trim_end();
        shown += &format!("$ sdgen {line}\n{said}\nexit code {code}\n\n");
    }
    shown
}

/// The arguments of a line, where those with spaces stand between quotes.
fn arguments(line: &str) -> impl Iterator<Item = String> {
    let parts = line.split('\'').enumerate();
    parts.flat_map(|(i, part)| match i % 2 {
        0 => part.split_whitespace().map(String::from).collect(),
        _ => vec![part.to_owned()],
    })
}

/// A folder with the checkpoint `sd1` and some files that are not what they are taken for.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    copy_folder(&fixture("sd1"), &at("sd1"));
    copy_folder(&fixture("sd1"), &at("no-unet"));
    std::fs::remove_dir_all(at("no-unet/unet")).unwrap();
    std::fs::copy(fixture("input/slope.png"), at("slope.png")).unwrap();
    for (name, text) in [
        ("text.png", "a text"),
        ("text.safetensors", "a text, longer than eight bytes"),
        ("empty.txt", "\n"),
        ("key.jsonl", "{\"prompt\": \"a cat\", \"sede\": 1}\n"),
        ("json.jsonl", "{\"prompt\": \"a cat\"}\n{\"prompt\"\n"),
        (
            "twice.jsonl",
            "{\"prompt\": \"a cat\", \"output\": \"x.png\"}\n{\"prompt\": \"a dog\", \"output\": \"x.png\"}\n",
        ),
    ] {
        std::fs::write(at(name), text).unwrap();
    }
    dir
}

#[test]
fn errors_of_arguments_are_as_reviewed() {
    let dir = folder();
    let lines = [
        "x --sampler eulr",
        "x --schedule karas",
        "x --nonsense",
        "x -W 0",
        "x -W 13",
        "x -H 1000000",
        "x --steps 0",
        "x --steps 1001",
        "x --strength 2",
        "x -g nan",
        "x --eta 2",
        "x --sampler euler --eta 1",
        "x -s minus",
        "x -s 9..3",
        "x -c 0",
        "x -m sd1 --clip-skip 99",
        "x --dtype f8",
        "x --device gpu",
        "x --crop 4",
        "x --tile z",
        "x --shard 5/3",
        "x --sweep steps",
        "x --sweep nonsense=1,2",
        "x --mask slope.png",
        "x -o - -c 2",
        "x -o - --json",
        "x --show",
        "x --resume --no-metadata",
    ];
    assert_snapshot!("errors_of_arguments", errors(dir.path(), &lines));
}

#[test]
fn errors_of_prompts_and_lists_are_as_reviewed() {
    let dir = folder();
    let lines = [
        "",
        "'a (cat:1.2.3)'",
        "'a AND b' -g 1",
        "'a {cat|dog' --dynamic",
        "'a __animal__' --dynamic",
        "'a cat <lora:missing:1>'",
        "--from missing.txt",
        "--from empty.txt",
        "--from key.jsonl",
        "--from json.jsonl",
        "--from twice.jsonl",
    ];
    assert_snapshot!("errors_of_prompts_and_lists", errors(dir.path(), &lines));
}

#[test]
fn errors_of_models_are_as_reviewed() {
    let dir = folder();
    let lines = [
        "x -m missing.safetensors",
        "x -m sd14",
        "x -m owner/name",
        "x -m no-unet",
        "x -m text.safetensors",
        "x -m slope.png",
        "x -m sd1 --lora missing.safetensors",
        "x -m sd1 --lora text.safetensors",
        "x -m sd1 --lora sd1/unet/diffusion_pytorch_model.safetensors",
        "x -m sd1 --embedding text.safetensors",
        "x -m sd1 --vae missing.safetensors",
        "x -m sd1 --refiner sd1",
        "x -m sd1 --prediction z",
        "inspect missing.safetensors",
        "inspect text.safetensors",
        "pull owner/name",
        "pull owner",
    ];
    assert_snapshot!("errors_of_models", errors(dir.path(), &lines));
}

#[test]
fn errors_of_pictures_and_places_are_as_reviewed() {
    let dir = folder();
    let lines = [
        "x -i missing.png",
        "x -i text.png",
        "x -o missing/x.png",
        "x -o slope.png",
        "x -o x.tga",
        "x -o {nonsense}.png",
        "check missing.png",
        "check slope.png",
        "check text.png",
        "upscale slope.png",
        "upscale slope.png -m sd1",
        "upscale missing.png -m lanczos",
        "upscale slope.png -m lanczos -o slope.png",
    ];
    assert_snapshot!("errors_of_pictures_and_places", errors(dir.path(), &lines));
}
