//! A work list on several machines: parts that need no coordinator, and what is still missing
//! afterwards.

use crate::common::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// A list of pictures of unlike cost, quick ones of a tiny random checkpoint.
fn list(folder: &Path, to: &str) -> Command {
    let lines = [
        "{\"prompt\": \"a frog\", \"seed\": \"0..6\"}",
        "{\"prompt\": \"a large cat\", \"seed\": \"3,5\", \"width\": 48, \"steps\": 4}",
    ];
    std::fs::write(folder.join("list.jsonl"), lines.join("\n")).unwrap();
    let mut command = sdgen(folder);
    for system in [
        "SLURM_ARRAY_TASK_ID",
        "JOB_COMPLETION_INDEX",
        "AWS_BATCH_JOB_ARRAY_INDEX",
        "CI_NODE_INDEX",
        "BUILDKITE_PARALLEL_JOB",
    ] {
        command.env_remove(system);
    }
    command.args([
        "--from",
        "list.jsonl",
        "--steps",
        "2",
        "-W",
        "16",
        "-H",
        "16",
        "--sampler",
        "euler-a",
        "-q",
        "-m",
    ]);
    command.arg(fixture("sd1")).args(["-o", &format!("{to}/")]);
    command
}

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap());
    entries
        .map(|entry| {
            (
                entry.file_name().into_string().unwrap(),
                std::fs::read(entry.path()).unwrap(),
            )
        })
        .collect()
}

#[test]
fn parts_together_are_the_whole_list_byte_for_byte_in_any_batch_size() {
    let dir = tempfile::tempdir().unwrap();
    let whole = stdout(&succeed(list(dir.path(), "whole").args(["-b", "3"])));
    let pictures = contents(&dir.path().join("whole"));
    assert_eq!(pictures.len(), 8);
    for batch in ["1", "2", "5"] {
        let to = format!("parts-{batch}");
        let part = |i| {
            stdout(&succeed(list(dir.path(), &to).args([
                "-b",
                batch,
                "--shard",
                &format!("{i}/3"),
            ])))
        };
        let parts: Vec<String> = (0..3).map(part).collect();
        assert!(parts.iter().all(|part| !part.is_empty()), "{parts:?}");
        assert!(
            contents(&dir.path().join(&to)) == pictures,
            "batches of {batch}"
        );
        let mut paths: Vec<&str> = parts.iter().flat_map(|part| part.lines()).collect();
        paths.sort_unstable();
        let mut expected: Vec<String> = whole
            .lines()
            .map(|path| path.replace("whole", &to))
            .collect();
        expected.sort_unstable();
        assert_eq!(paths, expected);
    }
}

#[test]
fn the_variables_of_an_array_job_name_the_part() {
    let dir = tempfile::tempdir().unwrap();
    let dry = |command: &mut Command| stdout(&succeed(command.arg("--dry-run")));
    let second = dry(list(dir.path(), "x").args(["--shard", "1/4"]));
    let slurm = [
        ("SLURM_ARRAY_TASK_ID", "2"),
        ("SLURM_ARRAY_TASK_MIN", "1"),
        ("SLURM_ARRAY_TASK_COUNT", "4"),
    ];
    assert_eq!(
        dry(list(dir.path(), "x").args(["--shard", "auto"]).envs(slurm)),
        second
    );
    assert_eq!(
        dry(list(dir.path(), "x")
            .args(["--shard", "auto"])
            .envs([("JOB_COMPLETION_INDEX", "1"), ("JOB_COMPLETIONS", "4")])),
        second
    );
    fail(
        list(dir.path(), "x").args(["--shard", "auto"]),
        2,
        &["none of SLURM_ARRAY_TASK_ID", "--shard 0/4"],
    );
    fail(
        list(dir.path(), "x").args(["--shard", "4/4"]),
        2,
        &["--shard", "from 0 to N-1"],
    );
}

#[test]
fn a_part_may_be_empty() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(
        stdout(&succeed(list(dir.path(), "x").args(["--shard", "11/12"]))),
        ""
    );
}

#[test]
fn parts_of_random_seeds_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for option in [&["--shard", "0/2"][..], &["--verify"]] {
        fail(
            sdgen(dir.path()).arg("a frog").args(option),
            2,
            &[option[0], "random seeds", "--seed"],
        );
    }
}

#[test]
fn verify_says_what_is_missing_or_has_other_settings_and_draws_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let verify = |options: &[&str]| {
        let output = list(dir.path(), "x")
            .arg("--verify")
            .args(options)
            .output()
            .unwrap();
        (output.status.code(), stdout(&output), stderr(&output))
    };
    let (code, missing, said) = verify(&[]);
    assert_eq!((code, missing.lines().count()), (Some(6), 8));
    assert!(
        said.contains("8 of 8 pictures are missing") && said.contains("--resume"),
        "{said}"
    );
    assert!(!dir.path().join("x").exists());
    succeed(&mut list(dir.path(), "x"));
    assert_eq!(verify(&[]), (Some(0), String::new(), String::new()));
    std::fs::remove_file(dir.path().join("x/a-frog-4.png")).unwrap();
    assert_eq!(verify(&[]).1, "x/a-frog-4.png\n");
    let (code, missing, _) = verify(&["--negative", "blue"]);
    assert_eq!((code, missing.lines().count()), (Some(6), 8));
    assert!(!dir.path().join("x/a-frog-4.png").exists());
}
