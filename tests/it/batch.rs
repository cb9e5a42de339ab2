//! Many pictures: lists, sweeps, batches, what fails, what ends a run, and how it goes on. Drives
//! the program as a script would.

use crate::common::*;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn with_stdin(command: &mut Command, text: &str) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    child.wait_with_output().unwrap()
}

fn lines(output: &Output) -> Vec<String> {
    stdout(output).lines().map(String::from).collect()
}

fn records(output: &Output) -> Vec<Value> {
    stdout(output)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn events(output: &Output, name: &str) -> Vec<Value> {
    let all = stderr(output)
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect(line))
        .collect::<Vec<_>>();
    all.into_iter()
        .filter(|event| event["event"] == name)
        .collect()
}

/// Every file of a folder, hidden ones too, in order. A run may be writing some of them.
fn names(folder: &Path) -> Vec<String> {
    let files = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| !entry.path().is_dir());
    files
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect()
}

/// The same, with their bytes.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    names(folder)
        .into_iter()
        .map(|name| (name.clone(), fs::read(folder.join(name)).unwrap()))
        .collect()
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

// Lists

#[test]
fn a_text_list_has_one_prompt_a_line_and_skips_empty_ones() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("list.txt"),
        "\u{feff}a frog\r\n\n   \nein Käfer 🐞\n{not json}\n",
    )
    .unwrap();
    let output = succeed(tiny(dir.path()).args(["--from", "list.txt", "-s", "1..3"]));
    assert_eq!(
        lines(&output),
        [
            "a-frog-1.png",
            "a-frog-2.png",
            "ein-käfer-1.png",
            "ein-käfer-2.png",
            "not-json-1.png",
            "not-json-2.png"
        ]
    );
}

#[test]
fn a_line_of_objects_may_set_every_option_of_a_picture_and_the_command_line_gives_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let list = r#"
        {"prompt": "one", "negative": "x", "width": 24, "height": 8, "seed": 7, "steps": 3, "guidance": 2.5, "sampler": "DPM++ 2M", "schedule": "karras", "clip_skip": 2, "deep_cache": 2, "guidance_rescale": 0.5}
        {"prompt": "two", "seed": "3,9", "cfg-scale": 1, "sampling_method": "ddim", "eta": 0.5, "output": "own/{seed}.webp", "negative_prompt": null}

        {"prompt": "three", "seed": "0..2", "clip-skip": 1}
        {"prompt": "four", "count": 2}"#;
    fs::write(dir.path().join("list.jsonl"), list).unwrap();
    let mut command = tiny(dir.path());
    let output = succeed(command.args([
        "--from",
        "list.jsonl",
        "--json",
        "-n",
        "toad",
        "-s",
        "5",
        "-g",
        "4",
        "-o",
        "out/",
        "--dry-run",
    ]));
    let records = records(&output);
    let seen: Vec<Value> = records
        .iter()
        .map(|r| {
            json!([
                r["path"],
                r["seed"],
                r["negative"],
                r["guidance"],
                r["sampler"]
            ])
        })
        .collect();
    assert_eq!(
        json!(seen),
        json!([
            ["out/one-7.png", 7, "x", 2.5, "dpmpp-2m"],
            ["out/own/3.webp", 3, "toad", 1.0, "ddim"],
            ["out/own/9.webp", 9, "toad", 1.0, "ddim"],
            ["out/three-0.png", 0, "toad", 4.0, "pndm"],
            ["out/three-1.png", 1, "toad", 4.0, "pndm"],
            ["out/four-5.png", 5, "toad", 4.0, "pndm"],
            ["out/four-6.png", 6, "toad", 4.0, "pndm"],
        ])
    );
    let first = &records[0];
    assert_eq!(
        json!([first["width"], first["height"], first["steps"]]),
        json!([24, 8, 3])
    );
    assert_eq!(
        json!([
            first["schedule"],
            first["clip_skip"],
            first["deep_cache"],
            first["guidance_rescale"]
        ]),
        json!(["karras", 2, 2, 0.5])
    );
    assert_eq!(
        json!([records[1]["eta"], records[3]["eta"], records[3]["dtype"]]),
        json!([0.5, null, "f32"])
    );
    // and they are drawn so
    let drawn = succeed(tiny(dir.path()).args([
        "--from",
        "list.jsonl",
        "--json",
        "-n",
        "toad",
        "-s",
        "5",
        "-g",
        "4",
        "-o",
        "out/",
    ]));
    for (line, planned) in stdout(&drawn).lines().zip(&records) {
        let drawn: Value = serde_json::from_str(line).unwrap();
        let bytes = fs::read(dir.path().join(drawn["path"].as_str().unwrap())).unwrap();
        let metadata = sdgen::image::read_metadata(&bytes).unwrap().unwrap().sdgen;
        assert_eq!(drawn["path"], planned["path"]);
        for (key, value) in metadata.as_object().unwrap() {
            assert!(drawn[key] == *value && planned[key] == *value, "{key}");
        }
    }
    assert_eq!(lines(&drawn).len(), 7);
}

#[test]
fn a_line_that_is_too_long_or_no_text_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |list: &[u8], texts: [&str; 2]| {
        fs::write(dir.path().join("list.txt"), list).unwrap();
        let mut command = tiny(dir.path());
        fail(command.args(["--from", "list.txt", "--dry-run"]), 2, &texts);
    };
    let endless = [b"a cat\n".as_slice(), &vec![b'x'; 3 << 20]].concat();
    refused(
        &endless,
        ["line 2 of `list.txt`", "longer than 1048576 bytes"],
    );
    refused(b"a cat\r\na dog\n\xff\n", ["line 3 of `list.txt`", "UTF-8"]);
}

#[test]
fn stdin_is_a_list_of_prompts_or_under_from_of_objects() {
    let dir = tempfile::tempdir().unwrap();
    let planned = |args: &[&str], text: &str| {
        let output = with_stdin(
            tiny(dir.path()).args(args).args(["-s", "1", "--dry-run"]),
            text,
        );
        assert_eq!(code(&output), Some(0), "{}", stderr(&output));
        lines(&output)
    };
    assert_eq!(planned(&[], "a\nb\n"), ["a-1.png", "b-1.png"]);
    assert_eq!(planned(&["-"], "{\"prompt\": \"a\"}\n"), ["prompt-a-1.png"]);
    assert_eq!(
        planned(&["--from", "-"], "\na\nb\n"),
        ["a-1.png", "b-1.png"]
    );
    assert_eq!(
        planned(
            &["--from", "-"],
            "\n {\"prompt\": \"a\", \"seed\": 4}\n{\"prompt\": \"b\"}\n"
        ),
        ["a-4.png", "b-1.png"]
    );
}

#[test]
fn a_wrong_line_is_named_with_its_file_its_number_and_what_was_meant() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [(&str, &[&str]); 16] = [
        (
            r#"{"prompt": "x", "stepz": 3}"#,
            &["line 2 of `list.jsonl`", "`stepz`", "did you mean `steps`?"],
        ),
        (
            r#"{"prompt": "x", "clip_skp": 3}"#,
            &["`clip_skp`", "did you mean `clip-skip`?"],
        ),
        (
            r#"{"prompt": "x", "zzzzzzzz": 3}"#,
            &["`zzzzzzzz`", "keys are prompt, negative"],
        ),
        (
            r#"{"prompt": "x", "model": "sd15"}"#,
            &["unknown key `model`"],
        ),
        (r#"{"promt": "x"}"#, &["line 2 of `list.jsonl`", "`prompt`"]),
        (r#"{"prompt": 5}"#, &["`prompt`"]),
        (
            r#"{"prompt": "x", "steps": "many"}"#,
            &["`steps` cannot be `many`", "1 to 1000 steps"],
        ),
        (
            r#"{"prompt": "x", "negative": 3}"#,
            &["`negative` cannot be `3`", "expected a string"],
        ),
        (
            r#"{"prompt": "x", "steps": 0}"#,
            &["`steps` cannot be `0`", "1 to 1000"],
        ),
        (
            r#"{"prompt": "x", "sampler": "eulr"}"#,
            &["unknown sampler `eulr`", "`euler`"],
        ),
        (r#"{"prompt": "x", "seed": "9..3"}"#, &["`9..3` is empty"]),
        (
            r#"{"prompt": "x", "seed": [1, 2]}"#,
            &["`seed` cannot be `[1,2]`", "expected a number"],
        ),
        (
            r#"{"prompt": "x", "width": 13}"#,
            &["line 2 of `list.jsonl`", "--width 13", "multiple of 8"],
        ),
        (
            r#"{"prompt": "x", "output": "x.gif"}"#,
            &["line 2 of `list.jsonl`", "`gif`"],
        ),
        (
            r#"{"prompt": "x""#,
            &["line 2 of `list.jsonl`", "not a JSON object", "column"],
        ),
        (r#"["x"]"#, &["line 2 of `list.jsonl`", "not a JSON object"]),
    ];
    for (line, texts) in cases {
        fs::write(
            dir.path().join("list.jsonl"),
            format!("{{\"prompt\": \"fine\"}}\n{line}\n"),
        )
        .unwrap();
        fail(tiny(dir.path()).args(["--from", "list.jsonl"]), 2, texts);
    }
    fs::write(dir.path().join("list.txt"), b"fine\n\xff\n").unwrap();
    fail(
        tiny(dir.path()).args(["--from", "list.txt"]),
        2,
        &["line 2 of `list.txt`: it cannot be read as UTF-8"],
    );
    fs::write(dir.path().join("empty.txt"), "\n\n").unwrap();
    fail(
        tiny(dir.path()).args(["--from", "empty.txt"]),
        2,
        &["`empty.txt` has no prompts"],
    );
    fail(
        tiny(dir.path()).args(["--from", "missing.txt"]),
        2,
        &["cannot read the list `missing.txt`"],
    );
    fail(
        tiny(dir.path()).args(["a frog", "--from", "list.txt"]),
        2,
        &["`--from`", "put the prompt into the list"],
    );
    // before any model is looked for
    fs::write(
        dir.path().join("list.jsonl"),
        "{\"prompt\": \"x\", \"stepz\": 3}",
    )
    .unwrap();
    fail(
        sdgen(dir.path()).args(["--from", "list.jsonl", "-m", "missing/model"]),
        2,
        &["`stepz`"],
    );
}

#[test]
fn outputs_of_lines_stay_in_the_folder_of_the_option_unless_they_may_leave_it() {
    let dir = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    let absolute = outside.path().join("x.png");
    let draw = |output: &str, extra: &[&str]| {
        let line = json!({ "prompt": "x", "seed": 1, "output": output });
        fs::write(dir.path().join("list.jsonl"), format!("{line}\n")).unwrap();
        let mut command = tiny(dir.path());
        command.args(["--from", "list.jsonl"]).args(extra);
        command
    };
    for extra in [
        &[][..],
        &["-o", "out/"],
        &["-o", "out/{seed}.png", "--resume"],
    ] {
        for output in ["../x.png", "a/../../x.png", absolute.to_str().unwrap()] {
            let said = fail(
                &mut draw(output, extra),
                2,
                &["line 1 of", "--outputs-anywhere"],
            );
            assert!(said.contains(&format!("`{output}` leads out of")), "{said}");
        }
    }
    assert_eq!(names(outside.path()).len(), 0);
    // below the folder of `-o`
    let at = |output: &str, option: &str| {
        let mut command = draw(output, &["--dry-run", "-o", option]);
        lines(&succeed(&mut command)).remove(0)
    };
    assert_eq!(at("a/x.png", "out/"), "out/a/x.png");
    assert_eq!(at("a/", "out/sub/{seed}.jpg"), "out/sub/a/x-1.png");
    assert_eq!(at("{seed}.png", "{{b}}/{model}/y.png"), "{b}/1.png");
    assert_eq!(at("x.png", "one.png"), "x.png");
    succeed(&mut draw(
        absolute.to_str().unwrap(),
        &["--outputs-anywhere"],
    ));
    assert!(absolute.is_file());
    succeed(&mut draw(
        "../x.png",
        &["-o", "out/", "--outputs-anywhere", "--dry-run"],
    ));
}

#[test]
fn two_lines_may_not_name_one_file() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("list.jsonl"),
        "{\"prompt\": \"x\"}\n{\"prompt\": \"y\", \"output\": \"x-1.png\"}\n",
    )
    .unwrap();
    let texts = [
        "line 1 of `list.jsonl`",
        "line 2 of `list.jsonl`",
        "`x-1.png`",
    ];
    fail(
        tiny(dir.path()).args(["--from", "list.jsonl", "-s", "1"]),
        2,
        &texts,
    );
}

// Sweeps

#[test]
fn sweeps_are_every_combination_for_every_prompt_and_seed_and_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = tiny(dir.path());
    let output = succeed(command.args([
        "x",
        "-s",
        "4,5",
        "--sweep",
        "sampler=ddim,DPM++ 2M",
        "--sweep",
        "guidance=1,2.5",
        "--dry-run",
    ]));
    let named = |seed: u64| {
        [
            "ddim-guidance-1",
            "ddim-guidance-2.5",
            "dpm-2m-guidance-1",
            "dpm-2m-guidance-2.5",
        ]
        .map(|n| format!("x-{seed}-sampler-{n}.png"))
    };
    assert_eq!(lines(&output), [named(4), named(5)].concat());
    // one random seed for all, so that the pictures compare
    let output = succeed(tiny(dir.path()).args([
        "x",
        "--sweep",
        "clip-skip=1,2",
        "-o",
        "{seed}/{sweep}.png",
    ]));
    let seed = stderr(&output)
        .trim()
        .strip_prefix("seed ")
        .unwrap()
        .to_string();
    assert_eq!(
        lines(&output),
        [
            format!("{seed}/clip-skip-1.png"),
            format!("{seed}/clip-skip-2.png")
        ]
    );
    assert!(
        fs::read(dir.path().join(&lines(&output)[0])).unwrap()
            != fs::read(dir.path().join(&lines(&output)[1])).unwrap()
    );
}

#[test]
fn every_option_of_a_picture_can_be_swept() {
    let dir = tempfile::tempdir().unwrap();
    let swept = |sweep: &str, key: &str| {
        let mut command = tiny(dir.path());
        let output = succeed(command.args([
            "x",
            "-s",
            "1",
            "--sampler",
            "ddim",
            "--dry-run",
            "--json",
            "--sweep",
            sweep,
        ]));
        Value::from_iter(
            records(&output)
                .into_iter()
                .map(|record| record[key].clone()),
        )
    };
    assert_eq!(swept("seed=3..5,9", "seed"), json!([3, 4, 9]));
    assert_eq!(swept("steps=1,3", "steps"), json!([1, 3]));
    assert_eq!(swept("width=8,32", "width"), json!([8, 32]));
    assert_eq!(swept("height=8,32", "height"), json!([8, 32]));
    assert_eq!(swept("eta=0,0.5", "eta"), json!([0.0, 0.5]));
    assert_eq!(
        swept("schedule=karras,beta", "schedule"),
        json!(["karras", "beta"])
    );
    assert_eq!(swept("deep_cache=1,2", "deep_cache"), json!([1, 2]));
    assert_eq!(
        swept("guidance_rescale=0,0.7", "guidance_rescale"),
        json!([0.0, 0.7])
    );
    assert_eq!(swept("negative=,blue", "negative"), json!(["", "blue"]));
    assert_eq!(swept("cfg-scale=2,3", "guidance"), json!([2.0, 3.0]));
}

#[test]
fn a_sweep_takes_ranges_with_the_end_excluded_and_steps() {
    let dir = tempfile::tempdir().unwrap();
    let swept = |text: &str, key: &str| {
        let mut command = tiny(dir.path());
        command.args(["x", "-s", "1", "--dry-run", "--json", "--sweep", text]);
        let values = records(&succeed(&mut command));
        Value::from_iter(values.iter().map(|record| record[key].clone()))
    };
    assert_eq!(swept("steps=3..6", "steps"), json!([3, 4, 5]));
    assert_eq!(swept("steps=10..31:10,5", "steps"), json!([10, 20, 30, 5]));
    assert_eq!(
        swept("guidance=1..2:0.3", "guidance"),
        json!([1.0, 1.3, 1.6, 1.9])
    );
    // 0.1 three times is 0.3, which is the end
    assert_eq!(
        swept("guidance_rescale=0..0.3:0.1", "guidance_rescale"),
        json!([0.0, 0.1, 0.2])
    );
    for (text, told) in [
        ("guidance=1.5..3", "has no step"),
        ("steps=6..3", "is empty"),
        ("steps=3..6:0", "is empty"),
        ("guidance=0..1:0.0000000001", "more than 1000000 values"),
    ] {
        fail(
            tiny(dir.path()).args(["x", "-s", "1", "--sweep", text]),
            2,
            &[told, "--sweep"],
        );
    }
}

#[test]
fn prompts_can_be_swept() {
    let dir = tempfile::tempdir().unwrap();
    let swept = |arguments: &[&str]| {
        let mut command = tiny(dir.path());
        command.args(["-s", "1", "--dry-run"]).args(arguments);
        lines(&succeed(&mut command))
    };
    assert_eq!(
        swept(&["--sweep", "prompt=a cat, a dog"]),
        ["a-cat-1.png", "a-dog-1.png"]
    );
    assert_eq!(
        swept(&["--sweep", "prompt=a,b", "--sweep", "steps=2,3"]),
        [
            "a-1-steps-2.png",
            "a-1-steps-3.png",
            "b-1-steps-2.png",
            "b-1-steps-3.png"
        ]
    );
    assert_eq!(
        swept(&["--sweep", r"prompt=a cat\, red,b"]),
        ["a-cat-red-1.png", "b-1.png"]
    );
    let mut command = tiny(dir.path());
    fail(
        command.args(["x", "--sweep", "prompt=a,b"]),
        2,
        &["another prompt"],
    );
    let mut command = tiny(dir.path());
    fail(
        command.args(["--sweep", "prompt=a,,b"]),
        2,
        &["empty prompt"],
    );
}

#[test]
fn lines_that_begin_with_a_hash_are_comments() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("list.txt"),
        "# my prompts\na cat\n  # more\na dog # mine\n",
    )
    .unwrap();
    fs::write(
        dir.path().join("list.jsonl"),
        "# mine\n{\"prompt\": \"a cat\"}\n",
    )
    .unwrap();
    let drawn = |list: &str| {
        let mut command = tiny(dir.path());
        lines(&succeed(command.args([
            "--from",
            list,
            "-s",
            "1",
            "--dry-run",
        ])))
    };
    assert_eq!(drawn("list.txt"), ["a-cat-1.png", "a-dog-1.png"]);
    assert_eq!(drawn("list.jsonl"), ["a-cat-1.png"]);
}

#[test]
fn a_sweep_that_cannot_be_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [(&[&str], &[&str]); 6] = [
        (
            &["--sweep", "guidance"],
            &["`--sweep guidance` has no values", "guidance=3,5,7"],
        ),
        (
            &["--sweep", "guidence=3"],
            &["`guidence`", "did you mean `guidance`?"],
        ),
        (
            &["--sweep", "steps=1,x"],
            &["`--sweep steps`", "cannot be `x`"],
        ),
        (&["--sweep", "count=1,2"], &["cannot vary `count`"]),
        (
            &["--sweep", "steps=1", "--sweep", "steps=2"],
            &["given twice"],
        ),
        (&["--sweep", "width=8,13", "-s", "1"], &["--width 13"]),
    ];
    for (args, texts) in cases {
        fail(tiny(dir.path()).arg("x").args(args), 2, texts);
    }
    fail(
        tiny(dir.path()).args(["x", "-s", "1", "--sweep", "steps=1,2", "-o", "{seed}.png"]),
        2,
        &["`{sweep}`"],
    );
}

// Batches

#[test]
fn pictures_of_a_mixed_list_are_the_same_in_any_batch_any_order_and_alone() {
    let dir = tempfile::tempdir().unwrap();
    let list = [
        json!({"prompt": "a frog", "seed": "1..4", "sampler": "euler-a"}),
        json!({"prompt": "a house", "seed": 2, "sampler": "euler-a", "negative": "the cat", "clip_skip": 2}),
        json!({"prompt": "a frog", "seed": 9, "width": 32, "sampler": "euler-a"}),
        json!({"prompt": "the cat", "seed": "5,6", "guidance": 1}),
        json!({"prompt": "the cat", "seed": 7, "sampler": "euler-a", "deep_cache": 2}),
        json!({"prompt": "the cat", "seed": 8, "sampler": "euler-a", "guidance_rescale": 0.7}),
        json!({"prompt": "the house", "seed": "3,1", "sampler": "euler-a", "steps": 3}),
    ];
    let write = |name: &str, list: &[Value]| {
        let text: String = list.iter().map(|line| format!("{line}\n")).collect();
        fs::write(dir.path().join(name), text).unwrap();
    };
    write("list.jsonl", &list);
    let mut reversed = list.to_vec();
    reversed.reverse();
    write("reversed.jsonl", &reversed);
    let draw = |folder: &str, args: &[&str]| {
        let output = succeed(tiny(dir.path()).args(args).args([
            "-o",
            &format!("{folder}/{{prompt}}-{{seed}}-{{width}}-{{steps}}.png"),
        ]));
        (lines(&output).len(), contents(&dir.path().join(folder)))
    };
    let (count, expected) = draw("one", &["--from", "list.jsonl", "-b", "1"]);
    assert_eq!((count, expected.len()), (11, 11));
    assert!(draw("two", &["--from", "list.jsonl", "-b", "2"]).1 == expected);
    assert!(draw("five", &["--from", "list.jsonl", "-b", "5"]).1 == expected);
    assert!(draw("auto", &["--from", "list.jsonl"]).1 == expected);
    assert!(draw("reversed", &["--from", "reversed.jsonl", "-b", "5"]).1 == expected);
    for (i, line) in list.iter().enumerate() {
        write(&format!("{i}.jsonl"), std::slice::from_ref(line));
        for (name, bytes) in draw(&format!("alone-{i}"), &["--from", &format!("{i}.jsonl")]).1 {
            assert!(expected[&name] == bytes, "{name}");
        }
    }
}

#[test]
fn batches_are_packed_across_prompts_and_lines_and_stdout_keeps_the_order_of_the_list() {
    let dir = tempfile::tempdir().unwrap();
    let sizes = [16, 24, 16, 24, 16, 24];
    let list: String = sizes
        .iter()
        .enumerate()
        .map(|(i, w)| format!("{{\"prompt\": \"p{i}\", \"width\": {w}}}\n"))
        .collect();
    fs::write(dir.path().join("list.jsonl"), list).unwrap();
    let output = succeed(tiny(dir.path()).args([
        "--from",
        "list.jsonl",
        "-s",
        "1",
        "-b",
        "3",
        "--progress",
        "json",
    ]));
    assert_eq!(
        lines(&output),
        (0..6).map(|i| format!("p{i}-1.png")).collect::<Vec<_>>()
    );
    let drawn: Vec<Value> = events(&output, "stage")
        .into_iter()
        .filter(|stage| stage["name"] == "drawing")
        .collect();
    assert_eq!(drawn.len(), 2);
}

#[test]
fn what_sdxl_is_told_of_sizes_is_a_setting_like_others() {
    let dir = tempfile::tempdir().unwrap();
    let list = [
        r#"{"prompt": "a frog", "seed": 1, "output": "plain.png"}"#,
        r#"{"prompt": "a frog", "seed": 1, "output": "own.png", "original_size": "16x24", "crop": "0,0", "target-size": "16x24"}"#,
        r#"{"prompt": "a frog", "seed": 1, "output": "told.png", "original_size": "300x512", "crop": "60,4", "target-size": "700x1024"}"#,
    ];
    std::fs::write(dir.path().join("list.jsonl"), list.join("\n")).unwrap();
    let draw = |extra: &[&str]| {
        let mut command = sdgen(dir.path());
        command
            .args([
                "--from",
                "list.jsonl",
                "-W",
                "16",
                "-H",
                "24",
                "--steps",
                "2",
                "--json",
                "-m",
            ])
            .arg(fixture("sdxl"))
            .args(extra);
        let output = succeed(&mut command);
        stdout(&output)
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect::<Vec<Value>>()
    };
    let drawn = draw(&[]);
    assert_eq!(
        drawn[0]["sha256"], drawn[1]["sha256"],
        "the defaults are the picture's own"
    );
    assert_ne!(drawn[0]["sha256"], drawn[2]["sha256"]);
    assert_eq!(
        [
            &drawn[2]["original_size"],
            &drawn[2]["crop"],
            &drawn[2]["target_size"]
        ],
        ["300x512", "60,4", "700x1024"]
    );
    let text =
        String::from_utf8_lossy(&std::fs::read(dir.path().join("told.png")).unwrap()).into_owned();
    assert!(text.contains("Original size: 300x512, Crop: \"60,4\", Target size: 700x1024"));
    // batches of mixed sizes change nothing, and what is there is found again
    let one_by_one = draw(&["--force", "-b", "1"]);
    assert!(
        drawn
            .iter()
            .zip(&one_by_one)
            .all(|(a, b)| a["sha256"] == b["sha256"])
    );
    assert!(
        draw(&["--resume"])
            .iter()
            .all(|line| line["skipped"] == true)
    );
    std::fs::write(
        dir.path().join("list.jsonl"),
        list.join("\n").replace("60,4", "60,5"),
    )
    .unwrap();
    let again = draw(&["--resume"]);
    assert_eq!(
        [&again[1]["skipped"], &again[2]["skipped"]],
        [&Value::Bool(true), &Value::Null]
    );
    succeed(
        sdgen(dir.path())
            .args(["check", "told.png", "-m"])
            .arg(fixture("sdxl")),
    );
    let wrong = [
        (
            "--crop=4",
            "expected two numbers up to 16384 with `,` between",
        ),
        ("--original-size=4,4", "with `x` between"),
    ];
    for (option, text) in wrong {
        fail(
            sdgen(dir.path())
                .args(["x", option, "-m"])
                .arg(fixture("sdxl")),
            2,
            &[text],
        );
    }
    for option in ["--original-size=8x8", "--crop=1,1", "--target-size=8x8"] {
        let name = option.split('=').next().unwrap();
        fail(
            sdgen(dir.path())
                .args(["x", option, "-m"])
                .arg(fixture("sd1")),
            2,
            &[&format!("`{name}` means nothing to `sd1`")],
        );
    }
    // its noise levels were aligned by themselves
    let mut command = sdgen(dir.path());
    command
        .args([
            "x",
            "-W",
            "16",
            "-H",
            "16",
            "--steps",
            "2",
            "--schedule",
            "ays",
            "--json",
            "-m",
        ])
        .arg(fixture("sdxl"));
    assert!(stdout(&succeed(&mut command)).contains(r#""schedule":"ays-sdxl""#));
    fail(
        sdgen(dir.path()).args(["x", "--sweep", "crop=1,1"]),
        2,
        &["`--sweep` cannot vary `crop`"],
    );
}

#[test]
fn a_refiner_works_in_batches_and_is_a_setting_like_others() {
    let dir = tempfile::tempdir().unwrap();
    let command = |extra: &[&str]| {
        let mut command = sdgen(dir.path());
        command
            .args(["-W", "16", "-H", "16", "-s", "1..4", "-m"])
            .arg(fixture("sdxl"))
            .args(extra);
        command
    };
    let refiner = fixture("sdxl_refiner");
    let refined = |extra: &[&str]| {
        let mut command = command(&[
            "a frog",
            "--steps",
            "4",
            "--refine-at",
            "0.5",
            "--refiner",
            refiner.to_str().unwrap(),
            "--json",
        ]);
        let output = succeed(command.args(extra));
        let lines: Vec<Value> = stdout(&output)
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        (lines, output)
    };
    let hashes = |lines: &[Value]| {
        lines
            .iter()
            .map(|line| line["sha256"].clone())
            .collect::<Vec<_>>()
    };
    // no step twice, no weights twice: both networks stay for the batches to come
    let (alone, output) = refined(&["-b", "1", "-v", "-o", "alone/"]);
    let said = stderr(&output);
    for (stage, times) in [
        ("encoding the prompt", 2),
        ("reading the U-Net", 2),
        ("drawing", 3),
        ("refining", 3),
        ("decoding", 3),
    ] {
        assert_eq!(
            said.lines()
                .filter(|l| l.starts_with(&format!("{stage}: ")))
                .count(),
            times,
            "{stage} in {said}"
        );
    }
    let (batched, output) = refined(&["-b", "3", "-o", "batch/", "--progress", "json"]);
    assert_eq!(hashes(&batched), hashes(&alone));
    let steps: Vec<u64> = events(&output, "step")
        .iter()
        .filter(|step| step["index"] == 0)
        .map(|step| step["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [1, 2, 3, 4]);
    let plain = succeed(command(&["a frog", "--steps", "4", "--json", "-o", "plain/"]).arg("-q"));
    let plain: Vec<Value> = stdout(&plain)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_ne!(hashes(&plain), hashes(&alone));
    assert_eq!(
        (&alone[0]["refiner"], &alone[0]["refine_at"]),
        (&Value::from("sdxl_refiner"), &Value::from(0.5))
    );
    // in files, for `--resume` and `check`
    assert!(
        refined(&["-o", "alone/", "--resume"])
            .0
            .iter()
            .all(|line| line["skipped"] == true)
    );
    assert!(
        refined(&["-o", "alone/", "--resume", "--refine-at", "0.4"])
            .0
            .iter()
            .all(|line| line["skipped"].is_null())
    );
    let path = batched[0]["path"].as_str().unwrap();
    let text = String::from_utf8_lossy(&std::fs::read(dir.path().join(path)).unwrap()).into_owned();
    assert!(text.contains("Refiner: sdxl_refiner, Refiner switch at: 0.5"));
    succeed(
        sdgen(dir.path())
            .args(["check", path, "-m"])
            .arg(fixture("sdxl"))
            .arg("--refiner")
            .arg(&refiner),
    );
    let output = sdgen(dir.path())
        .args(["check", path, "-m"])
        .arg(fixture("sdxl"))
        .arg("--refiner")
        .arg(fixture("sdxl"))
        .output()
        .unwrap();
    assert!(
        stderr(&output).contains("other weights"),
        "{}",
        stderr(&output)
    );
    // every sampler but one can hand over
    for sampler in [
        "ddim",
        "euler-a",
        "dpmpp-2m",
        "dpmpp-2m-sde",
        "dpmpp-sde",
        "dpmpp-2s-a",
        "heun",
        "dpm2",
        "lms",
        "unipc",
        "deis",
        "ddpm",
        "lcm",
        "tcd",
    ] {
        refined(&["--sampler", sampler, "-o", &format!("{sampler}/")]);
    }
    let refiner = refiner.to_str().unwrap();
    let sd1 = fixture("sd1");
    fail(
        &mut command(&["x", "--refiner", refiner, "--sampler", "pndm"]),
        2,
        &["`pndm` cannot be handed over"],
    );
    fail(
        &mut command(&[
            "x",
            "--refiner",
            refiner,
            "--steps",
            "4",
            "--refine-at",
            "0.999",
        ]),
        2,
        &["the model 4 and its refiner 0 of 4 steps"],
    );
    fail(
        &mut command(&["x", "--refine-at", "0.5"]),
        2,
        &["`--refine-at` without `--refiner`", "hint: "],
    );
    fail(
        &mut command(&["x", "--refiner", sd1.to_str().unwrap()]),
        3,
        &["`sd1` cannot refine"],
    );
    fail(
        sdgen(dir.path()).args(["x", "-m", refiner]),
        3,
        &[
            "`sdxl_refiner` is a refiner",
            "hint: pass it with `--refiner`",
        ],
    );
}

// Failures

/// A checkpoint that has no number for the word `frog`.
fn without_frogs(to: &Path) {
    copy_folder(&fixture("sd1"), to);
    let checkpoint = sdgen::weights::Checkpoint::open(sdgen::weights::Origin::Path(to)).unwrap();
    let tokenizer = checkpoint.tokenizer("text_encoder").unwrap();
    let ids = |text: &str| {
        sdgen::text::tokenizer::Tokenizer::new(&tokenizer.files, &tokenizer.config)
            .unwrap()
            .ids(text)
            .unwrap()
    };
    let (frog, others) = (ids("frog"), ids("a house the cat"));
    let token = frog.into_iter().find(|id| !others.contains(id)).unwrap() as usize;
    let path = to.join("text_encoder/model.safetensors");
    let mut tensors = load(&path);
    let key = tensors
        .keys()
        .find(|key| key.ends_with("token_embedding.weight"))
        .unwrap()
        .clone();
    let table = tensors[&key].clone();
    let (rows, width) = table.dims2().unwrap();
    let mut values: Vec<f32> = table
        .to_dtype(candle_core::DType::F32)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap();
    values[token * width..(token + 1) * width].fill(f32::NAN);
    tensors.insert(
        key,
        candle_core::Tensor::from_vec(values, (rows, width), &candle_core::Device::Cpu).unwrap(),
    );
    save(&tensors, &path);
}

#[test]
fn a_picture_that_fails_is_reported_and_the_rest_of_its_batch_is_saved() {
    let dir = tempfile::tempdir().unwrap();
    without_frogs(&dir.path().join("m"));
    fs::write(
        dir.path().join("list.txt"),
        "a house\na frog\nthe cat\nthe house\n",
    )
    .unwrap();
    let draw = |list: &str, extra: &[&str]| {
        let mut command = sdgen(dir.path());
        command.args([
            "--steps", "2", "-W", "16", "-H", "16", "-m", "m", "-s", "1", "--from", list,
        ]);
        command.args(extra).output().unwrap()
    };
    let output = draw("list.txt", &["-b", "4"]);
    let said = stderr(&output);
    assert_eq!(code(&output), Some(6), "{said}");
    assert!(
        said.contains("error: line 2 of `list.txt` (`a frog`, seed 1): the picture is not finite"),
        "{said}"
    );
    assert!(
        said.contains("1 of 4 pictures failed, 3 are saved"),
        "{said}"
    );
    assert_eq!(
        lines(&output),
        ["a-house-1.png", "the-cat-1.png", "the-house-1.png"]
    );
    assert!(!dir.path().join("a-frog-1.png").exists());
    // it has its record, in its place
    let records = records(&draw("list.txt", &["--force", "--json", "-b", "2"]));
    assert_eq!(
        Value::from_iter(records.iter().map(|r| r["path"].clone())),
        json!([
            "a-house-1.png",
            "a-frog-1.png",
            "the-cat-1.png",
            "the-house-1.png"
        ])
    );
    let errors: Vec<&str> = records.iter().filter_map(|r| r["error"].as_str()).collect();
    assert!(
        errors.len() == 1 && errors[0].contains("not finite") && records[1]["sha256"].is_null(),
        "{records:?}"
    );
    // the others are what they are without it
    let together = contents(dir.path());
    fs::write(dir.path().join("fine.txt"), "a house\nthe cat\nthe house\n").unwrap();
    assert_eq!(code(&draw("fine.txt", &["--force", "-b", "1"])), Some(0));
    assert!(together["the-cat-1.png"] == contents(dir.path())["the-cat-1.png"]);
    // a resumed run tries it again, and skips the rest
    assert_eq!(code(&draw("list.txt", &["--resume"])), Some(6));
    // if nothing is drawn the code is the cause's
    fs::write(dir.path().join("frogs.txt"), "a frog\nfrog\n").unwrap();
    let output = draw("frogs.txt", &[]);
    assert_eq!(code(&output), Some(5), "{}", stderr(&output));
    let output = draw("list.txt", &["--force", "--progress", "json"]);
    assert_eq!(events(&output, "failed")[0]["index"], 1);
    let end = &events(&output, "end")[0];
    assert_eq!(
        (&end["saved"], &end["failed"], &end["skipped"]),
        (&json!(3), &json!(1), &json!(0))
    );
}

#[test]
fn a_file_that_cannot_be_written_fails_alone() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("out")).unwrap();
    let list = "{\"prompt\": \"x\", \"output\": \"out/x.png\"}\n{\"prompt\": \"y\"}\n{\"prompt\": \"z\"}\n";
    fs::write(dir.path().join("list.jsonl"), list).unwrap();
    let mut command = tiny(dir.path());
    command.args([
        "--from",
        "list.jsonl",
        "-s",
        "1",
        "-b",
        "1",
        "--steps",
        "400",
        "--progress",
        "json",
    ]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap())
        .lines()
        .map(|line| line.unwrap());
    // the folder goes away when all is checked and the first picture is being drawn
    assert!(said.any(|line| line.contains("\"drawing\"")));
    fs::remove_dir(dir.path().join("out")).unwrap();
    let failed = said.find(|line| line.contains("\"failed\"")).unwrap();
    assert!(
        failed.contains("line 1 of `list.jsonl`") && failed.contains("cannot write"),
        "{failed}"
    );
    said.for_each(drop);
    let output = child.wait_with_output().unwrap();
    assert_eq!(code(&output), Some(6));
    assert_eq!(lines(&output), ["y-1.png", "z-1.png"]);
}

#[test]
fn settings_that_do_not_fit_into_a_jpeg_are_an_error_before_drawing() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("list.txt"),
        format!("fine\n{}\n", "x".repeat(40_000)),
    )
    .unwrap();
    let texts = ["line 2 of `list.txt`", "too long to be stored in a JPEG"];
    fail(
        tiny(dir.path()).args(["--from", "list.txt", "-s", "1", "--format", "jpg"]),
        2,
        &texts,
    );
    assert_eq!(names(dir.path()), ["list.txt"]);
    succeed(tiny(dir.path()).args([
        "--from",
        "list.txt",
        "-s",
        "1",
        "--format",
        "jpg",
        "--no-metadata",
    ]));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_ends_the_run_and_keeps_what_is_saved() {
    let dir = tempfile::tempdir().unwrap();
    // a small file system of one's own
    let script = "mount -t tmpfs -o size=40k none . && cd . && \"$@\"; code=$?; ls -A; exit $code";
    let mut command = Command::new("unshare");
    command.args([
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        script,
        "sh",
        env!("CARGO_BIN_EXE_sdgen"),
    ]);
    command
        .args([
            "x", "-s", "1..100", "-b", "2", "--steps", "1", "-W", "32", "-H", "32", "-q",
        ])
        .current_dir(dir.path());
    let output = command.output().expect("this test needs `unshare`");
    assert!(
        !stderr(&output).contains("unshare:") && !stderr(&output).contains("mount:"),
        "this test needs to mount a file system in a namespace of its own: {}",
        stderr(&output)
    );
    assert_eq!(
        code(&output),
        Some(6),
        "{}{}",
        stdout(&output),
        stderr(&output)
    );
    assert!(
        stderr(&output).contains("no space is left on the disk for `x-"),
        "{}",
        stderr(&output)
    );
    assert_eq!(
        stderr(&output).matches("error:").count(),
        1,
        "{}",
        stderr(&output)
    );
    let said = lines(&output);
    let saved = said.len() / 2;
    // the paths that were said, and after them those that are there
    let mut paths = said[..saved].to_vec();
    paths.sort();
    assert!(saved > 2 && paths == said[saved..], "{said:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_file_system_without_links_and_without_safe_renames_is_saved_to_all_the_same() {
    const CALLS: [libc::c_long; 2] = [libc::SYS_renameat2, libc::SYS_linkat];
    for errno in [libc::EPERM, libc::EINVAL, libc::EOPNOTSUPP] {
        let dir = tempfile::tempdir().unwrap();
        let mut command = tiny(dir.path());
        command.args(["x", "-s", "0..3", "-b", "1", "-o", "out/"]);
        refuse_calls(&mut command, &CALLS, errno);
        succeed(&mut command);
        assert_eq!(
            names(&dir.path().join("out")),
            ["x-0.png", "x-1.png", "x-2.png"]
        );
        // what is there is still not replaced
        fail(&mut command, 2, &["exists already, and 2 more"]);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn what_saving_will_need_is_tried_before_drawing() {
    // no file system is without a rename of any kind, but this one
    const CALLS: [libc::c_long; 4] = [
        libc::SYS_renameat2,
        libc::SYS_linkat,
        libc::SYS_renameat,
        libc::SYS_rename,
    ];
    let dir = tempfile::tempdir().unwrap();
    let mut command = tiny(dir.path());
    command.args(["x", "-s", "0..3", "-o", "u/"]);
    refuse_calls(&mut command, &CALLS, libc::EPERM);
    fail(&mut command, 2, &["no permission to write `u"]);
    assert!(!dir.path().join("u").exists());
}

#[cfg(unix)]
#[test]
fn pictures_go_into_a_folder_whose_name_is_not_utf8() {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let dir = tempfile::tempdir().unwrap();
    let folder = std::ffi::OsStr::from_bytes(b"caf\xe9/");
    let mut command = tiny(dir.path());
    command.args(["x", "-s", "0..3", "-b", "1", "--progress", "json", "-o"]);
    let output = succeed(command.arg(folder));
    let paths: Vec<&[u8]> = output.stdout.split(|byte| *byte == b'\n').collect();
    assert_eq!(
        paths[..3],
        [
            &b"caf\xe9/x-0.png"[..],
            b"caf\xe9/x-1.png",
            b"caf\xe9/x-2.png"
        ]
    );
    for path in &paths[..3] {
        let path = std::ffi::OsString::from_vec(path.to_vec());
        assert!(dir.path().join(path).is_file());
    }
    assert_eq!(events(&output, "picture")[2]["path"], "caf\u{fffd}/x-2.png");
    let mut command = tiny(dir.path());
    command.args([
        "x",
        "-s",
        "0..3",
        "--resume",
        "--json",
        "--manifest",
        "m.jsonl",
        "-o",
    ]);
    let output = succeed(command.arg(folder));
    let records = records(&output);
    assert_eq!(records[0]["path"], "caf\u{fffd}/x-0.png");
    assert_eq!(records[0]["skipped"], true);
    // and as the results of an upscaler
    let mut command = sdgen(dir.path());
    command
        .arg("upscale")
        .arg(dir.path().join(folder).join("x-0.png"));
    succeed(command.args(["-m", "lanczos", "-o"]).arg(folder));
    assert!(dir.path().join(folder).join("x-0-2x.png").is_file());
}

#[cfg(target_os = "linux")]
#[test]
fn a_limit_of_file_sizes_fails_a_picture_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = sdgen(dir.path());
    command.args(["a frog", "--steps", "1", "-s", "1", "-o", "u/"]);
    // in blocks of 512 bytes
    let output = after("ulimit -f 8", &command).output().unwrap();
    assert_eq!(
        code(&output),
        Some(1),
        "{:?} {}",
        output.status,
        stderr(&output)
    );
    assert!(
        stderr(&output).contains("larger than this process may write")
            && stderr(&output).contains("ulimit -f"),
        "{}",
        stderr(&output)
    );
    assert!(!dir.path().join("u").exists());
}

#[test]
fn a_folder_that_was_made_for_nothing_goes_again() {
    let dir = tempfile::tempdir().unwrap();
    without_frogs(&dir.path().join("m"));
    let mut command = sdgen(dir.path());
    command.args(["a frog", "--steps", "2", "-W", "16", "-H", "16", "-m", "m"]);
    fail(
        command.args(["-s", "1", "-o", "new/deep/"]),
        5,
        &["not finite"],
    );
    assert!(!dir.path().join("new").exists());
}

// stdout

#[cfg(unix)]
#[test]
fn a_reader_that_goes_away_ends_the_run_after_the_pictures_under_way() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = tiny(dir.path());
    command.args(["x", "-s", "0..200", "-b", "2", "--steps", "20"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut first).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    assert_eq!((code(&output), first.as_str()), (Some(0), "x-0.png\n"));
    let said = stderr(&output);
    assert!(said.contains("nobody reads stdout any more: "), "{said}");
    let saved = names(dir.path());
    assert!(
        (2..200).contains(&saved.len()) && saved.len().is_multiple_of(2),
        "{saved:?}"
    );
    // a bare `head` in front of everything that reads
    for arguments in [&["models"][..], &["help", "batches"], &["man"]] {
        let mut child = sdgen(dir.path())
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!((code(&output), stderr(&output).as_str()), (Some(0), ""));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_stdout_is_told_from_failed_pictures() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    for json in [&[][..], &["--json"]] {
        let dir = tempfile::tempdir().unwrap();
        let mut command = tiny(dir.path());
        command.args(["x", "-s", "0..200", "-b", "2", "--steps", "20"]);
        let output = command.args(json).stdout(full()).output().unwrap();
        let said = stderr(&output);
        assert_eq!(code(&output), Some(1), "{said}");
        assert!(
            said.contains("cannot write to stdout") && !said.contains("failed,"),
            "{said}"
        );
        assert_eq!(said.matches("error:").count(), 1, "{said}");
        let saved = names(dir.path()).len();
        assert!(
            (2..200).contains(&saved) && saved.is_multiple_of(2),
            "{saved}"
        );
        assert!(
            said.contains(&format!("{saved} of 200 pictures are saved")),
            "{said}"
        );
    }
}

/// Whether a value is as a part of the schema says; `what` names it. Knows no more of JSON Schema
/// than the file uses.
fn require_schema(value: &Value, schema: &Value, what: &str) {
    let types = |value: &Value| match value {
        Value::Null => vec!["null"],
        Value::Bool(_) => vec!["boolean"],
        Value::Number(number) if number.is_f64() => vec!["number"],
        Value::Number(_) => vec!["number", "integer"],
        Value::String(_) => vec!["string"],
        Value::Array(_) => vec!["array"],
        Value::Object(_) => vec!["object"],
    };
    for (key, rule) in schema.as_object().unwrap() {
        match key.as_str() {
            "description" => {}
            "type" => {
                let allowed: Vec<&str> = match rule {
                    Value::String(one) => vec![one],
                    several => several
                        .as_array()
                        .unwrap()
                        .iter()
                        .map(|t| t.as_str().unwrap())
                        .collect(),
                };
                assert!(
                    types(value).iter().any(|t| allowed.contains(t)),
                    "{what}: {value}"
                );
            }
            "enum" => assert!(rule.as_array().unwrap().contains(value), "{what}: {value}"),
            "minimum" => assert!(value.as_f64() >= rule.as_f64(), "{what}: {value}"),
            "pattern" => {
                // the two that there are
                let is_right = |text: &str| match rule.as_str().unwrap() {
                    "^[0-9a-f]{64}$" => {
                        text.len() == 64 && text.bytes().all(|b| b"0123456789abcdef".contains(&b))
                    }
                    "^[0-9]+$" => !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()),
                    other => panic!("unknown pattern {other}"),
                };
                assert!(value.as_str().is_none_or(is_right), "{what}: {value}");
            }
            "items" => {
                for item in value.as_array().into_iter().flatten() {
                    require_schema(item, rule, what);
                }
            }
            "required" => {
                for name in rule.as_array().unwrap() {
                    let is_there = value.is_null() || value.get(name.as_str().unwrap()).is_some();
                    assert!(is_there, "{what} lacks {name}: {value}");
                }
            }
            "properties" => {
                for (name, value) in value.as_object().into_iter().flatten() {
                    let place = format!("{what}.{name}");
                    // other readers may take what they do not know; what we write is described
                    let rule = rule
                        .get(name)
                        .unwrap_or_else(|| panic!("{place} is not described"));
                    require_schema(value, rule, &place);
                }
            }
            other => panic!("unknown rule {other}"),
        }
    }
}

#[test]
fn every_record_is_as_the_schema_says_and_has_every_key() {
    let dir = tempfile::tempdir().unwrap();
    let text = stdout(&succeed(sdgen(dir.path()).args(["help", "schema"])));
    let schema: Value = serde_json::from_str(&text).unwrap();
    let require = |output: &Output, kind: &str, count: usize| {
        let records = records(output);
        assert_eq!(records.len(), count, "{kind}");
        for record in &records {
            require_schema(record, &schema["$defs"][kind], kind);
        }
        records
    };
    let run = |arguments: &[&str]| {
        let mut command = tiny(dir.path());
        succeed(command.args(["--json"]).args(arguments))
    };
    let seed = "18446744073709551614";
    let plain = require(&run(&["x", "-s", seed]), "picture", 1);
    assert_eq!(plain[0]["seed_text"], seed);
    assert!(plain[0]["source"].is_null() && plain[0]["loras"] == json!([]));
    require(&run(&["x", "-s", seed, "--resume"]), "picture", 1);
    require(&run(&["x", "-s", "1", "--dry-run"]), "picture", 1);
    let everything = [
        "x",
        "-s",
        "1",
        "--trace",
        "--hires",
        "2",
        "--tile",
        "xy",
        "-o",
        "all.png",
        "--schedule",
        "karras",
        "--sampler",
        "euler-a",
        "--eta",
        "0.5",
        "--to",
        "y",
        "--to-seed",
        "9",
        "--frames",
        "2",
        "-o",
        "f/",
        "--upscale",
        "lanczos",
    ];
    let records = require(&run(&everything), "picture", 2);
    assert!(records[1]["trace"].is_object() && records[1]["to"].is_object());
    let image = format!("x-{seed}.png");
    let over = [
        "y",
        "-s",
        "1",
        "-i",
        &image,
        "--mask",
        &image,
        "--only-masked=8",
    ];
    let records = require(&run(&over), "picture", 1);
    assert_eq!(records[0]["source"]["alpha"], false);
    // those that fail
    without_frogs(&dir.path().join("m"));
    let mut command = sdgen(dir.path());
    command.args([
        "a frog", "--steps", "2", "-W", "16", "-H", "16", "-m", "m", "-s", "1",
    ]);
    let output = command.arg("--json").output().unwrap();
    assert!(require(&output, "picture", 1)[0]["error"].is_string());
    let mut command = sdgen(dir.path());
    command.args(["check", &image, "f", "missing.png", "--json", "-m"]);
    let output = command.arg(fixture("sd1")).output().unwrap();
    require(&output, "check", 4);
    let mut command = sdgen(dir.path());
    let upscale = ["upscale", "missing.png", &image, "-m", "lanczos", "--json"];
    require(&command.args(upscale).output().unwrap(), "upscale", 2);
}

// Interrupts

#[cfg(unix)]
fn signal(child: &Child, name: &str) {
    assert!(
        Command::new("kill")
            .args([&format!("-{name}"), &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
}

/// Waits until there is a picture, and gives the child back.
#[cfg(unix)]
fn after_the_first_picture(folder: &Path, command: &mut Command) -> Child {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while !names(folder).iter().any(|name| name.ends_with(".png")) {
        // a limit for what hangs: no machine is that slow
        assert!(start.elapsed() < Duration::from_secs(300) && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

#[cfg(unix)]
#[test]
fn the_first_ctrl_c_saves_the_picture_under_way_and_resume_goes_on() {
    for name in ["INT", "TERM"] {
        let dir = tempfile::tempdir().unwrap();
        let mut command = tiny(dir.path());
        command.args(["x", "-s", "0..60", "-b", "2", "--steps", "60"]);
        let child = after_the_first_picture(dir.path(), &mut command);
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        let (said, drawn) = (stderr(&output), lines(&output));
        assert_eq!(code(&output), Some(130), "{said}");
        assert!(
            said.contains(&format!(
                "interrupted: {} of 60 pictures are done",
                drawn.len()
            )) && said.contains("--resume"),
            "{said}"
        );
        assert!(said.contains("the same again stops at once"), "{said}");
        let mut sorted = drawn.clone();
        sorted.sort();
        assert!(
            drawn.len() < 60 && drawn.len() % 2 == 0 && sorted == names(dir.path()),
            "{drawn:?}"
        );
        let output = succeed(command.arg("--resume"));
        assert!(
            stderr(&output).contains(&format!("{} of 60 pictures are there already", drawn.len()))
        );
        assert_eq!(
            lines(&output),
            (0..60)
                .map(|seed| format!("x-{seed}.png"))
                .collect::<Vec<_>>()
        );
        assert_eq!(names(dir.path()).len(), 60);
    }
}

#[cfg(unix)]
#[test]
fn a_run_that_is_interrupted_when_all_is_drawn_has_drawn_all() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = tiny(dir.path());
    // in one batch, so that the first picture is saved when nothing is left to draw
    command.args(["x", "-s", "0..4", "-b", "4"]);
    let child = after_the_first_picture(dir.path(), &mut command);
    signal(&child, "INT");
    let output = child.wait_with_output().unwrap();
    assert_eq!(code(&output), Some(0), "{}", stderr(&output));
    assert_eq!(lines(&output).len(), 4);
}

#[cfg(unix)]
#[test]
fn the_second_ctrl_c_stops_at_once_and_leaves_nothing_unfinished() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = tiny(dir.path());
    // the first picture takes no time, the second long enough to be interrupted twice
    fs::write(
        dir.path().join("list.jsonl"),
        "{\"prompt\": \"x\", \"steps\": 1}\n{\"prompt\": \"y\", \"width\": 128, \"height\": 128}\n",
    )
    .unwrap();
    let mut child = after_the_first_picture(
        dir.path(),
        command.args([
            "--from",
            "list.jsonl",
            "-s",
            "1",
            "--sampler",
            "euler",
            "--steps",
            "900",
        ]),
    );
    signal(&child, "INT");
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains("the same again stops at once")));
    assert!(
        child.try_wait().unwrap().is_none(),
        "the second picture takes too little time for this test"
    );
    signal(&child, "INT");
    // had it stopped after the picture under way, that would be there
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(names(dir.path()), ["list.jsonl", "x-1.png"]);
}

// Resume

#[test]
fn resume_skips_what_is_there_with_the_same_settings_and_draws_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let run = |extra: &[&str]| {
        let mut command = tiny(dir.path());
        // a number that only survives if floats are read exactly
        succeed(
            command
                .args([
                    "x",
                    "-s",
                    "0..4",
                    "-g",
                    "1.1000000000000003",
                    "--resume",
                    "--progress",
                    "json",
                ])
                .args(extra),
        )
    };
    let drawn = |output: &Output| {
        events(output, "picture")
            .iter()
            .map(|e| e["index"].as_u64().unwrap())
            .collect::<Vec<_>>()
    };
    let first = run(&[]);
    assert_eq!(drawn(&first), [0, 1, 2, 3]);
    let whole = contents(dir.path());
    let again = run(&[]);
    assert!(drawn(&again).is_empty() && stdout(&again) == stdout(&first));
    assert_eq!(events(&again, "end")[0]["skipped"], 4);
    assert!(
        events(&again, "stage").is_empty(),
        "nothing is loaded for nothing"
    );
    // missing, cut, of another program, without settings
    fs::remove_file(dir.path().join("x-0.png")).unwrap();
    fs::write(
        dir.path().join("x-1.png"),
        &whole["x-1.png"][..whole["x-1.png"].len() - 40],
    )
    .unwrap();
    fs::write(dir.path().join("x-2.png"), "not a picture").unwrap();
    succeed(tiny(dir.path()).args([
        "x",
        "-s",
        "3",
        "--force",
        "--no-metadata",
        "-g",
        "1.1000000000000003",
    ]));
    // what may be another's is not lost
    let mut refused = tiny(dir.path());
    refused.args(["x", "-s", "0..4", "-g", "1.1000000000000003", "--resume"]);
    fail(
        &mut refused,
        2,
        &["`x-2.png` exists already, and 1 more", "--force"],
    );
    assert_eq!(
        fs::read(dir.path().join("x-2.png")).unwrap(),
        b"not a picture"
    );
    assert!(!dir.path().join("x-0.png").exists());
    let repaired = run(&["--json", "--force"]);
    assert_eq!(drawn(&repaired), [0, 1, 2, 3]);
    assert!(contents(dir.path()) == whole);
    // one is skipped, and its record says so
    fs::remove_file(dir.path().join("x-1.png")).unwrap();
    let records = records(&run(&["--json"]));
    assert_eq!(
        Value::from_iter(records.iter().map(|r| r["skipped"].clone())),
        json!([true, null, true, true])
    );
    assert_eq!(
        records[0]["sha256"],
        serde_json::from_str::<Value>(&lines(&repaired)[0]).unwrap()["sha256"]
    );
    // other settings, another model: all again
    for change in [
        &["--clip-skip", "2"][..],
        &["-n", "blue"],
        &["--deep-cache", "2"],
        &["--eta", "0.5", "--sampler", "ddim"],
    ] {
        assert_eq!(drawn(&run(change)).len(), 4, "{change:?}");
        assert!(drawn(&run(change)).is_empty(), "{change:?}");
    }
    let other = fixture("sd2");
    assert_eq!(drawn(&run(&["-m", other.to_str().unwrap()])).len(), 4);
}

#[test]
fn resume_keeps_the_numbers_of_equal_names() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("list.txt"), "a frog\nA frog!\na  frog\n").unwrap();
    let run = || succeed(tiny(dir.path()).args(["--from", "list.txt", "-s", "1", "--resume"]));
    let first = run();
    assert_eq!(
        lines(&first),
        ["a-frog-1.png", "a-frog-1-2.png", "a-frog-1-3.png"]
    );
    let whole = contents(dir.path());
    fs::remove_file(dir.path().join("a-frog-1-2.png")).unwrap();
    assert_eq!(stdout(&run()), stdout(&first));
    assert!(contents(dir.path()) == whole);
}

#[test]
fn resume_does_not_go_with_what_it_cannot_compare() {
    let dir = tempfile::tempdir().unwrap();
    fail(
        tiny(dir.path()).args(["x", "--resume"]),
        2,
        &["random seeds", "--seed"],
    );
    fail(
        tiny(dir.path()).args(["x", "-s", "1", "--resume", "-o", "-"]),
        2,
        &["`-o -`"],
    );
    fail(
        tiny(dir.path()).args(["x", "-s", "1", "--resume", "--no-metadata"]),
        2,
        &["--no-metadata"],
    );
    // seeds in the list are seeds
    fs::write(
        dir.path().join("list.jsonl"),
        "{\"prompt\": \"x\", \"seed\": 3}\n",
    )
    .unwrap();
    succeed(tiny(dir.path()).args(["--from", "list.jsonl", "--resume"]));
}

#[cfg(unix)]
#[test]
fn forty_pictures_survive_any_number_of_kills() {
    let dir = tempfile::tempdir().unwrap();
    let list: String = (0..10)
        .map(|i| {
            format!(
                "{{\"prompt\": \"a frog {i}\", \"seed\": \"0..4\", \"steps\": {}}}\n",
                1 + i % 2
            )
        })
        .collect();
    fs::write(dir.path().join("list.jsonl"), list).unwrap();
    // the embedded model
    let run = |folder: &str| {
        let mut command = sdgen(dir.path());
        command
            .args(["--from", "list.jsonl", "--resume", "-o", folder])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    };
    let start = Instant::now();
    assert!(run("calm/").status().unwrap().success());
    let mut whole_ms = start.elapsed().as_millis() as u64;
    let folder = dir.path().join("torn");
    let pictures = || {
        if folder.exists() {
            names(&folder)
        } else {
            vec![]
        }
    };
    let mut in_the_middle = 0;
    for i in 1..=20 {
        let mut child = run("torn/").spawn().unwrap();
        // moments spread over a quarter of a run by the golden ratio: no two alike
        std::thread::sleep(Duration::from_millis(i * 618 % 1000 * whole_ms / 4000));
        child.kill().unwrap();
        child.wait().unwrap();
        for name in pictures().iter().filter(|name| name.ends_with(".png")) {
            assert!(
                image::open(folder.join(name)).is_ok(),
                "{name} is not whole"
            );
        }
        let saved = pictures()
            .iter()
            .filter(|name| name.ends_with(".png"))
            .count();
        in_the_middle += usize::from((1..40).contains(&saved));
        if saved == 40 {
            // all is there: anew, and killed sooner, as the first run may have been slowed down by
            // others
            assert!(run("torn/").status().unwrap().success());
            assert!(contents(&folder) == contents(&dir.path().join("calm")));
            fs::remove_dir_all(&folder).unwrap();
            whole_ms /= 2;
        }
    }
    assert!(in_the_middle >= 5, "the run is over too soon for this test");
    assert!(run("torn/").status().unwrap().success());
    let (calm, torn) = (contents(&dir.path().join("calm")), contents(&folder));
    assert_eq!(calm.len(), 40);
    assert_eq!(
        torn.keys().collect::<Vec<_>>(),
        calm.keys().collect::<Vec<_>>()
    );
    assert!(torn == calm);
}

#[cfg(unix)]
#[test]
fn what_a_killed_run_has_left_is_removed_but_not_what_another_run_is_writing() {
    let dir = tempfile::tempdir().unwrap();
    let (dead, alive, foreign) = (".sdgen-dead.tmp", ".sdgen-alive.tmp", ".other.tmp");
    for name in [dead, alive, foreign] {
        fs::write(dir.path().join(name), "half").unwrap();
    }
    let other = fs::File::open(dir.path().join(alive)).unwrap();
    other.lock().unwrap();
    succeed(tiny(dir.path()).args(["x", "-s", "1"]));
    assert_eq!(names(dir.path()), [foreign, alive, "x-1.png"]);
}

// What programs read

#[test]
fn a_dry_run_prints_the_work_list_and_reads_no_weights() {
    let dir = tempfile::tempdir().unwrap();
    let output = succeed(tiny(dir.path()).args(["x", "-s", "1..4", "-o", "out/", "--dry-run"]));
    assert_eq!(
        lines(&output),
        ["out/x-1.png", "out/x-2.png", "out/x-3.png"]
    );
    assert!(
        stderr(&output).contains("3 pictures, about 0.0 GB of memory, about a second\n"),
        "{}",
        stderr(&output)
    );
    assert!(names(dir.path()).is_empty());
    let output = succeed(tiny(dir.path()).args(["x", "-s", "1", "--dry-run", "--json", "-v"]));
    let record = &records(&output)[0];
    assert_eq!(record["path"], "x-1.png");
    assert!(
        record["model_hash"].as_str().unwrap().len() == 64 && !stderr(&output).contains("reading")
    );
    fail(
        tiny(dir.path()).args(["x", "-s", "1", "-W", "13", "--dry-run"]),
        2,
        &["--width 13"],
    );
}

#[test]
fn events_tell_programs_what_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let output = succeed(tiny(dir.path()).args([
        "x",
        "-s",
        "1,2",
        "-b",
        "1",
        "--steps",
        "3",
        "--sampler",
        "euler",
        "--progress",
        "json",
    ]));
    assert_eq!(events(&output, "start")[0]["jobs"], 2);
    let steps: Vec<Value> = events(&output, "step")
        .iter()
        .map(|e| json!([e["index"], e["step"], e["of"]]))
        .collect();
    // of the whole run: the two pictures cost the same, decoding as much as five steps
    let remaining: Vec<f64> = events(&output, "step")
        .iter()
        .map(|e| e["remaining_s"].as_f64().unwrap())
        .collect();
    assert!(remaining[2] > 0.0 && remaining[5] == 0.0, "{remaining:?}");
    assert_eq!(
        json!(steps),
        json!([
            [0, 1, 3],
            [0, 2, 3],
            [0, 3, 3],
            [1, 1, 3],
            [1, 2, 3],
            [1, 3, 3]
        ])
    );
    let pictures = events(&output, "picture");
    assert_eq!(
        json!([pictures[0]["path"], pictures[1]["path"]]),
        json!(["x-1.png", "x-2.png"])
    );
    assert!(pictures[0]["seconds"].as_f64().unwrap() > 0.0);
    let stages = events(&output, "stage");
    assert!(stages.iter().any(|e| e["name"] == "reading the U-Net"));
    let last: Value = serde_json::from_str(stderr(&output).lines().last().unwrap()).unwrap();
    assert_eq!(
        json!([
            last["event"],
            last["saved"],
            last["failed"],
            last["skipped"]
        ]),
        json!(["end", 2, 0, 0])
    );
    // an error is a note, and the end comes all the same
    let output = tiny(dir.path())
        .args(["x", "-s", "1", "--progress", "json"])
        .output()
        .unwrap();
    assert_eq!(code(&output), Some(2));
    assert!(
        events(&output, "note")[0]["text"]
            .as_str()
            .unwrap()
            .contains("x-1.png` exists already")
    );
    assert_eq!(events(&output, "end")[0]["saved"], 0);
}

#[test]
fn the_manifest_has_the_records_of_a_run_as_pictures_land() {
    let dir = tempfile::tempdir().unwrap();
    let run = |extra: &[&str]| {
        let mut command = tiny(dir.path());
        command
            .args(["x", "-s", "1..4", "--manifest", "m.jsonl"])
            .args(extra)
            .output()
            .unwrap()
    };
    let output = run(&[]);
    assert_eq!(lines(&output), ["x-1.png", "x-2.png", "x-3.png"]);
    let manifest = || fs::read_to_string(dir.path().join("m.jsonl")).unwrap();
    let first: Vec<Value> = manifest()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        Value::from_iter(first.iter().map(|r| r["seed"].clone())),
        json!([1, 2, 3])
    );
    assert!(first[0]["timings"].is_object() && first[0]["sha256"].as_str().unwrap().len() == 64);
    let output = run(&["-o", "other/"]);
    assert_eq!(code(&output), Some(2));
    assert!(
        stderr(&output).contains("m.jsonl") && !dir.path().join("other").exists(),
        "{}",
        stderr(&output)
    );
    fs::remove_file(dir.path().join("x-2.png")).unwrap();
    let output = run(&["--resume", "--json"]);
    assert_eq!(stdout(&output), manifest());
    assert_eq!(
        Value::from_iter(records(&output).iter().map(|r| r["sha256"].clone())),
        Value::from_iter(first.iter().map(|r| r["sha256"].clone()))
    );
    // what is no manifest stays
    fs::write(dir.path().join("m.jsonl"), "my notes").unwrap();
    let output = run(&["--resume"]);
    assert_eq!(code(&output), Some(2));
    assert_eq!(manifest(), "my notes");
    assert_eq!(code(&run(&["--resume", "--force"])), Some(0));
    assert_eq!(manifest().lines().count(), 3);
}

// Contact sheets

#[test]
fn a_grid_shows_every_picture_that_is_there() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("list.txt"), "a frog\na cat\n").unwrap();
    let draw = |extra: &[&str]| {
        tiny(dir.path())
            .args([
                "--from", "list.txt", "-s", "1..4", "-o", "x/", "--grid", "grid.png",
            ])
            .args(extra)
            .output()
            .unwrap()
    };
    assert_eq!(code(&draw(&[])), Some(0));
    let sheet = image::open(dir.path().join("grid.png")).unwrap().to_rgb8();
    assert!(
        sheet.width() > 3 * 16 && sheet.height() > 2 * 16,
        "{:?}",
        sheet.dimensions()
    );
    for name in names(&dir.path().join("x")) {
        let picture = image::open(dir.path().join("x").join(&name))
            .unwrap()
            .to_rgb8();
        let has = |x: u32, y: u32| {
            picture
                .enumerate_pixels()
                .all(|(i, j, pixel)| sheet.get_pixel(x + i, y + j) == pixel)
        };
        let places =
            (0..sheet.width() - 15).flat_map(|x| (0..sheet.height() - 15).map(move |y| (x, y)));
        assert!(
            places.into_iter().any(|(x, y)| has(x, y)),
            "{name} is not on the sheet"
        );
    }
    let again = draw(&["--force", "--grid", "grid.png"]);
    assert_eq!(code(&again), Some(0), "{}", stderr(&again));
    let refused = tiny(dir.path())
        .args(["a frog", "-s", "9", "--grid", "grid.png"])
        .output()
        .unwrap();
    assert!(
        code(&refused) == Some(2) && stderr(&refused).contains("grid.png"),
        "{}",
        stderr(&refused)
    );
    let to_stdout = tiny(dir.path())
        .args(["a frog", "-s", "9", "-o", "-", "--grid", "other.png"])
        .output()
        .unwrap();
    assert_eq!(code(&to_stdout), Some(2));
}
