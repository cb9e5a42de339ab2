//! The documentation: every example that needs nothing but the embedded model is run as it stands,
//! by a shell; all others are read as the program would read them. Links and the file guide lead to
//! files that are there.
//!
//! An example that names a model is run with a tiny one in its place and `--dry-run`, unless it needs
//! other files as well.
//!
//! In a block ```` ```sh ```` each line with `sdgen` in it is an example, and the lines of a page
//! share a folder, in which [`prepare`] puts some pictures. The text of ```` ```json jobs.jsonl ````
//! is written to that file, and ```` ```sh no_run ```` is only read.
#![cfg(unix)]

use crate::common::*;
use clap::{ArgMatches, CommandFactory};
use image::RgbImage;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Options that name files or models that are not here.
const NEEDS: [&str; 12] = [
    "model",
    "diffusion_model",
    "text_encoder",
    "vae",
    "refiner",
    "lora",
    "lora_dir",
    "embedding",
    "merge",
    "minus",
    "upscale",
    "upscaler",
];
/// Models that are always here.
const BUILT_IN: [&str; 2] = ["mini", "lanczos"];
/// Commands that fetch a model, or take minutes.
const NOT_HERE: [&str; 2] = ["pull", "bench"];

fn root(path: &str) -> PathBuf {
    fixture("../..").join(path)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root(path)).unwrap()
}

/// A fenced block: the words behind its fence, and its lines.
struct Block<'a> {
    info: Vec<&'a str>,
    lines: Vec<&'a str>,
}

fn blocks(page: &str) -> Vec<Block<'_>> {
    let mut blocks: Vec<Block> = vec![];
    let mut is_open = false;
    for line in page.lines() {
        match line.strip_prefix("```") {
            Some(info) if !is_open => blocks.push(Block {
                info: info.split_whitespace().collect(),
                lines: vec![],
            }),
            None if is_open => blocks.last_mut().unwrap().lines.push(line),
            _ => {}
        }
        if line.starts_with("```") {
            is_open = !is_open;
        }
    }
    blocks
}

/// A folder in which examples are run.
struct Shell {
    dir: tempfile::TempDir,
}

impl Shell {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let shell = Self { dir };
        // whose words are kept, and which draws nothing
        shell.script(
            "words/sdgen",
            r#"for word; do printf '%s\0' "$word"; done > "$TEMP/words.txt""#,
        );
        // a pipeline ends with the code of its last command alone
        let run = format!(
            r#"'{}' "$@"; code=$?; echo $code >> "$TEMP/codes.txt"; exit $code"#,
            env!("CARGO_BIN_EXE_sdgen")
        );
        shell.script("run/sdgen", &run);
        // the same with a tiny model in place of another, and without drawing
        let tiny = format!(
            r#"n=$#; while [ $n -gt 0 ]; do word=$1; shift; n=$((n - 1))
if [ "$word" = -m ]; then shift; n=$((n - 1)); set -- "$@" -m '{}'; else set -- "$@" "$word"; fi
done
'{}' "$@" --dry-run -q > /dev/null; code=$?; echo $code >> "$TEMP/codes.txt"; exit $code"#,
            fixture("sd1").display(),
            env!("CARGO_BIN_EXE_sdgen")
        );
        shell.script("dry/sdgen", &tiny);
        for tool in ["display", "jq", "parallel"] {
            for folder in ["words", "run", "dry"] {
                shell.script(&format!("{folder}/{tool}"), "cat > /dev/null");
            }
        }
        prepare(&shell.folder());
        shell
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("here")
    }

    fn script(&self, name: &str, text: &str) {
        let path = self.dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A line, run with the commands of a folder in front of all others.
    fn command(&self, commands: &str, line: &str) -> Command {
        let others = std::env::var("PATH").unwrap();
        let path = format!("{}:{others}", self.dir.path().join(commands).display());
        let mut command = Command::new("sh");
        command
            .args(["-c", line])
            .current_dir(self.folder())
            .env("PATH", path)
            .env("TEMP", self.dir.path())
            .env("XDG_CONFIG_HOME", self.dir.path())
            .env("HF_HUB_OFFLINE", "1")
            .env_remove("SDGEN_MODEL")
            .stdin(Stdio::null());
        command
    }

    /// Reads an example's arguments as the program does.
    fn parse(&self, line: &str) -> ArgMatches {
        let start = line.find("sdgen ").unwrap();
        // what `parallel` puts in
        let line = line[start..].replace("{}/", "0/");
        succeed(&mut self.command("words", &line));
        let words = std::fs::read_to_string(self.dir.path().join("words.txt")).unwrap();
        let words = words.split_terminator('\0');
        sdgen::cli::args::Cli::command()
            .try_get_matches_from(["sdgen"].into_iter().chain(words))
            .unwrap_or_else(|error| panic!("{line}\n{error}"))
    }

    /// Runs an example with the commands of a folder.
    fn run(&self, commands: &str, line: &str) {
        let codes = self.dir.path().join("codes.txt");
        std::fs::write(&codes, "").unwrap();
        let output = self.command(commands, line).output().unwrap();
        let codes = std::fs::read_to_string(codes).unwrap();
        assert!(
            output.status.success() && !codes.is_empty() && codes.lines().all(|code| code == "0"),
            "{line}\n{}",
            stderr(&output)
        );
    }
}

/// What examples are drawn from, besides what earlier lines of their page have drawn.
fn prepare(folder: &Path) {
    std::fs::create_dir_all(folder.join("photos")).unwrap();
    let photo = RgbImage::from_fn(160, 128, |x, y| {
        image::Rgb([x as u8, (2 * y) as u8, (x ^ y) as u8])
    });
    for name in ["photo.png", "photos/1.png", "photos/2.png"] {
        photo.save(folder.join(name)).unwrap();
    }
    let mask = |width, height| {
        RgbImage::from_fn(width, height, |_, y| {
            image::Rgb([if y < height / 2 { 255 } else { 0 }; 3])
        })
    };
    mask(128, 128).save(folder.join("top.png")).unwrap();
    mask(160, 128).save(folder.join("face.png")).unwrap();
    std::fs::write(folder.join("prompts.txt"), "a frog\na panda\n").unwrap();
}

fn is_example(line: &str) -> bool {
    let command = line.split(" #").next();
    command.is_some_and(|command| command.contains("sdgen "))
}

/// Whether an example can only be read here.
fn needs_more(matches: &ArgMatches) -> bool {
    let (name, matches) = matches.subcommand().unwrap_or(("", matches));
    let is_elsewhere = |option: &str| {
        let values = matches.try_get_raw(option).ok().flatten();
        values.is_some_and(|mut values| {
            values.any(|value| !BUILT_IN.contains(&value.to_str().unwrap()))
        })
    };
    NOT_HERE.contains(&name) || NEEDS.into_iter().any(is_elsewhere)
}

/// Whether an example draws, and needs no more than another model.
fn needs_only_a_model(matches: &ArgMatches) -> bool {
    let others = NEEDS.into_iter().filter(|option| *option != "model");
    let is_given = |option: &str| matches.try_get_raw(option).ok().flatten().is_some();
    let mut others = others.chain(["image", "mask", "reference"]);
    matches.subcommand().is_none() && !others.any(is_given)
}

/// Errors if the shell would read something else than what stands in an example: inside of double
/// quotes it replaces `$` and backquotes, and takes backslashes away.
fn check_quotes(line: &str) {
    let command = line.split(" #").next().unwrap();
    let outside_single = command.split('\'').step_by(2).collect::<String>();
    for quoted in outside_single.split('"').skip(1).step_by(2) {
        let found = quoted.find(['$', '`', '\\', '!']);
        assert!(
            found.is_none(),
            "the shell changes what is in double quotes: {line}"
        );
    }
}

/// Runs and reads the examples of a page, of which there are at least so many.
fn check(path: &str, least_run: usize, least_read: usize) {
    let page = read(path);
    let shell = Shell::new();
    let (mut run, mut only_read) = (0, 0);
    for Block { info, lines } in blocks(&page) {
        match info[..] {
            ["sh", ref how @ ..] => {
                for line in lines.iter().filter(|line| is_example(line)) {
                    let is_command = line.starts_with("sdgen ") || line.contains("| sdgen ");
                    check_quotes(line);
                    let matches = shell.parse(line);
                    if how == ["no_run"] || !is_command {
                        only_read += 1;
                    } else if !needs_more(&matches) {
                        shell.run("run", line);
                        run += 1;
                    } else if needs_only_a_model(&matches) {
                        shell.run("dry", line);
                        run += 1;
                    } else {
                        only_read += 1;
                    }
                }
            }
            [_, name] => {
                let path = shell.folder().join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, lines.join("\n") + "\n").unwrap();
            }
            _ => {}
        }
    }
    assert!(
        run >= least_run && only_read >= least_read,
        "{path}: {run} examples were run and {only_read} read"
    );
}

#[test]
fn the_examples_of_the_readme_work() {
    check("README.md", 13, 1);
}

#[test]
fn the_examples_on_models_work() {
    check("assets/docs/models.md", 8, 4);
}

#[test]
fn the_examples_on_prompts_work() {
    check("assets/docs/prompts.md", 5, 2);
}

#[test]
fn the_examples_on_sampling_work() {
    check("assets/docs/sampling.md", 3, 0);
}

#[test]
fn the_examples_on_pictures_work() {
    check("assets/docs/pictures.md", 12, 2);
}

#[test]
fn the_examples_on_lora_are_read() {
    check("assets/docs/lora.md", 0, 5);
}

#[test]
fn the_examples_on_batches_work() {
    check("assets/docs/batches.md", 12, 2);
}

#[test]
fn the_examples_on_scripting_work() {
    check("assets/docs/scripting.md", 9, 0);
}

#[test]
fn the_examples_on_benchmarks_are_read() {
    check("assets/docs/benchmarks.md", 0, 3);
}

#[test]
fn the_examples_of_the_help_work() {
    let shell = Shell::new();
    let help = stdout(&succeed(sdgen(&shell.folder()).arg("-h")));
    let (_, examples) = help.split_once("Examples:").unwrap();
    let (mut run, mut only_read) = (0, 0);
    for line in examples.lines().filter(|line| line.starts_with("  sdgen ")) {
        // what it is for stands behind three blanks
        let line = line.trim().split("   ").next().unwrap();
        if needs_more(&shell.parse(line)) {
            only_read += 1;
        } else {
            shell.run("run", line);
            run += 1;
        }
    }
    assert!(run >= 5 && only_read >= 2, "{run}, {only_read}");
}

/// The Markdown files that people read.
fn pages() -> Vec<String> {
    let docs = std::fs::read_dir(root("assets/docs")).unwrap().map(|file| {
        let name = file.unwrap().file_name().into_string().unwrap();
        format!("assets/docs/{name}")
    });
    let others = [
        "README.md",
        "CHANGELOG.md",
        "src/README.md",
        "tests/README.md",
        "tests/fixtures/README.md",
        "assets/mini/README.md",
    ];
    docs.chain(others.map(String::from)).collect()
}

#[test]
fn links_between_pages_lead_somewhere() {
    let mut followed = 0;
    for path in pages() {
        let page = read(&path);
        let folder = root(&path).parent().unwrap().to_path_buf();
        for link in page.split("](").skip(1) {
            let (target, _) = link.split_once(')').unwrap();
            if !target.contains("://") {
                assert!(folder.join(target).exists(), "{path} links to {target}");
                followed += 1;
            }
        }
    }
    assert!(followed >= 20, "{followed}");
}

/// The source files below a folder, by their paths in `src`.
fn sources(folder: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            let path = path.strip_prefix(root("src")).unwrap();
            found.push(path.to_str().unwrap().to_owned());
        }
    }
}

#[test]
fn the_file_guide_has_a_line_for_every_source_file() {
    let guide = read("src/README.md");
    let named: Vec<&str> = guide.split('`').skip(1).step_by(2).collect();
    let mut files = vec![];
    sources(&root("src"), &mut files);
    assert!(files.len() > 50);
    files.retain(|path| !named.contains(&path.as_str()));
    assert!(files.is_empty(), "src/README.md has no line for {files:?}");
    let gone: Vec<_> = named
        .iter()
        .filter(|name| name.ends_with(".rs") && name.contains('/') && !name.contains(' '))
        .filter(|name| !root("src").join(name).exists() && !root(name).exists())
        .collect();
    assert!(gone.is_empty(), "src/README.md has lines for {gone:?}");
}
