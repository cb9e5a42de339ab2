//! The file of the user's defaults: what it sets, what wins over it, and what is said of mistakes
//! in it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::common::*;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// Writes the user's own file; [`sdgen`] looks for it in the folder that it runs in.
fn write_config(folder: &Path, text: &str) {
    fs::create_dir_all(folder.join("sdgen")).unwrap();
    fs::write(folder.join("sdgen/sdgen.toml"), text).unwrap();
}

/// A file with a tiny model and tiny images.
fn tiny_config(folder: &Path) -> String {
    let model = fixture("sd1");
    let text = format!(
        "# what I like\nmodel = '{}'\nsteps = 2\nwidth = 16\nheight = 16\ncfg_scale = 3.5\n",
        model.display()
    );
    write_config(folder, &text);
    text
}

/// The settings of the only image that is planned.
fn planned(folder: &Path, args: &[&str]) -> Value {
    let output = succeed(
        sdgen(folder)
            .args(["x", "-s", "1", "--dry-run", "--json"])
            .args(args),
    );
    serde_json::from_str(&stdout(&output)).unwrap()
}

#[test]
fn the_command_line_wins_over_the_environment_and_that_over_the_file() {
    let dir = tempfile::tempdir().unwrap();
    tiny_config(dir.path());
    let of = |record: &Value| {
        json!([
            record["model"],
            record["steps"],
            record["width"],
            record["guidance"]
        ])
    };
    assert_eq!(of(&planned(dir.path(), &[])), json!(["sd1", 2, 16, 3.5]));
    let typed = planned(dir.path(), &["--steps", "3", "-g", "1"]);
    assert_eq!(of(&typed), json!(["sd1", 3, 16, 1.0]));
    let with_env = |args: &[&str]| {
        let mut command = sdgen(dir.path());
        let args = ["x", "-s", "1", "--dry-run", "--json"].iter().chain(args);
        let output = succeed(command.args(args).env("SDGEN_MODEL", fixture("sd2")));
        of(&serde_json::from_str(&stdout(&output)).unwrap())
    };
    assert_eq!(with_env(&[]), json!(["sd2", 2, 16, 3.5]));
    let sd1 = fixture("sd1");
    let named = with_env(&["-m", sd1.to_str().unwrap()]);
    assert_eq!(named, json!(["sd1", 2, 16, 3.5]));
}

#[test]
fn lines_of_a_list_win_over_the_file() {
    let dir = tempfile::tempdir().unwrap();
    tiny_config(dir.path());
    let list = "{\"prompt\": \"a\", \"steps\": 1}\n{\"prompt\": \"b\"}\n";
    fs::write(dir.path().join("list.jsonl"), list).unwrap();
    let output =
        succeed(sdgen(dir.path()).args(["--from", "list.jsonl", "-s", "1", "--dry-run", "--json"]));
    let steps: Vec<Value> = stdout(&output)
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["steps"].clone())
        .collect();
    assert_eq!(json!(steps), json!([1, 2]));
}

#[test]
fn another_file_can_be_named_and_none_can_be_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    tiny_config(dir.path());
    fs::write(dir.path().join("other.toml"), "steps = 7\njson = true\n").unwrap();
    for args in [&["--config", "other.toml"][..], &["--config=other.toml"]] {
        let record = planned(dir.path(), args);
        assert_eq!(
            json!([record["model"], record["steps"]]),
            json!(["mini", 7])
        );
    }
    let record = planned(dir.path(), &["--no-config"]);
    assert_eq!(record["model"], "mini");
    fail(
        sdgen(dir.path()).args(["x", "--config", "missing.toml"]),
        2,
        &["cannot read `missing.toml`"],
    );
    // the usual one does not have to be there
    fs::remove_file(dir.path().join("sdgen/sdgen.toml")).unwrap();
    assert_eq!(planned(dir.path(), &[])["model"], "mini");
}

#[test]
fn an_image_of_the_files_defaults_is_the_one_of_the_same_options() {
    let dir = tempfile::tempdir().unwrap();
    tiny_config(dir.path());
    succeed(sdgen(dir.path()).args(["x", "-s", "1", "-o", "file.png"]));
    let mut command = sdgen(dir.path());
    command.args(["x", "-s", "1", "-o", "typed.png", "--no-config", "-m"]);
    command
        .arg(fixture("sd1"))
        .args(["--steps", "2", "-W", "16", "-H", "16", "-g", "3.5"]);
    succeed(&mut command);
    let read = |name: &str| fs::read(dir.path().join(name)).unwrap();
    assert!(read("file.png") == read("typed.png"));
}

#[test]
fn a_mistake_is_named_with_its_file_and_line_and_what_was_meant() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [(&str, &[&str]); 9] = [
        (
            "steps = 2\n\nstepz = 3\n",
            &[
                "line 3 of `",
                "sdgen.toml`",
                "`stepz`",
                "did you mean `steps`?",
            ],
        ),
        (
            "steps = 0\n",
            &[
                "line 1 of `",
                "`steps` cannot be `0`: expected 1 to 1000 steps",
            ],
        ),
        (
            "device = 'cpu'\ndtype = 'f64'\n",
            &[
                "line 2 of `",
                "`dtype` cannot be `f64`",
                "f32, bf16, f16, int8",
            ],
        ),
        ("steps = \n", &["line 1 of `", "sdgen.toml`"]),
        ("a = 1\na = 2\n", &["line 2 of `"]),
        (
            "[image]\nsteps = 2\n",
            &["line 1 of `", "`image` is a table"],
        ),
        (
            "from = 'list.txt'\n",
            &["line 1 of `", "unknown key `from`"],
        ),
        ("steps = [1, 2]\n", &["`steps` takes one value, not 2"]),
        ("steps = 2024-01-01\n", &["`steps` takes a text, a number"]),
    ];
    for (text, texts) in cases {
        write_config(dir.path(), text);
        fail(sdgen(dir.path()).args(["x", "--dry-run"]), 2, texts);
    }
    // the file does not matter where none is read
    succeed(sdgen(dir.path()).args(["x", "--dry-run", "--no-config", "-q"]));
}

#[test]
fn flags_and_options_that_may_be_given_again_have_defaults_too() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), "json = true\nlora = ['no.safetensors']\n");
    fail(
        sdgen(dir.path()).args(["x", "--dry-run"]),
        3,
        &["no.safetensors"],
    );
    write_config(dir.path(), "json = true\n");
    let output = succeed(sdgen(dir.path()).args(["x", "-s", "1", "--dry-run"]));
    let record: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(record["seed"], 1);
}

#[test]
fn other_commands_take_the_machine_from_the_file() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), "steps = 1\ndevice = 'cuda:99'\n");
    fail(
        sdgen(dir.path()).args(["upscale", "x.png", "-m", "lanczos"]),
        2,
        &["CUDA"],
    );
    let mut command = sdgen(dir.path());
    command.args(["upscale", "x.png", "-m", "lanczos", "--device", "cpu"]);
    fail(&mut command, 2, &["x.png"]);
}

#[test]
fn the_end_of_the_help_says_which_file_was_read() {
    let dir = tempfile::tempdir().unwrap();
    tiny_config(dir.path());
    for flag in ["-h", "--help"] {
        let help = stdout(&succeed(sdgen(dir.path()).arg(flag)));
        let end = help.trim_end().lines().last().unwrap();
        assert!(
            end.starts_with("Defaults: model, steps, width, height, cfg_scale from "),
            "{end}"
        );
        assert!(end.ends_with("sdgen.toml"), "{end}");
        let help = stdout(&succeed(sdgen(dir.path()).args([flag, "--no-config"])));
        assert!(!help.contains("Defaults: "));
    }
    let help = stdout(&succeed(sdgen(dir.path()).arg("--help")));
    assert!(help.contains("--config <FILE>") && help.contains("--no-config"));
}
