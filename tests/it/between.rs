//! Pictures between others: variations of a seed, and frames on the way to another prompt or seed.
//! Drives the program as a script would.

use crate::common::*;
use std::path::Path;
use std::process::Command;

fn three_steps(folder: &Path) -> Command {
    let mut command = tiny(folder);
    command.args(["--steps", "3", "-q"]);
    command
}

fn draw(folder: &Path, prompt: &str, name: &str, options: &[&str]) {
    succeed(three_steps(folder).args([prompt, "-o", name]).args(options));
}

fn pixels(folder: &Path, name: &str) -> Vec<u8> {
    sdgen::image::Image::decode(&std::fs::read(folder.join(name)).unwrap())
        .unwrap()
        .rgb
}

fn distance(a: &[u8], b: &[u8]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
        .sum::<f64>()
        .sqrt()
}

fn metadata(folder: &Path, name: &str) -> sdgen::image::Metadata {
    sdgen::image::read_metadata(&std::fs::read(folder.join(name)).unwrap())
        .unwrap()
        .unwrap()
}

#[test]
fn a_variation_is_the_plain_picture_at_0_the_other_seeds_at_1_and_near_the_first_between() {
    let dir = tempfile::tempdir().unwrap();
    for sampler in ["ddim", "euler-a"] {
        draw(
            dir.path(),
            "a cat",
            &format!("{sampler}-plain.png"),
            &["-s", "3", "--sampler", sampler],
        );
        draw(
            dir.path(),
            "a cat",
            &format!("{sampler}-other.png"),
            &["-s", "8", "--sampler", sampler],
        );
        for strength in ["0", "0.1", "0.5", "1"] {
            let variation = format!("8:{strength}");
            draw(
                dir.path(),
                "a cat",
                &format!("{sampler}-{strength}.png"),
                &["-s", "3", "--sampler", sampler, "--variation", &variation],
            );
        }
        let [plain, other, same, near, far, all] = ["plain", "other", "0", "0.1", "0.5", "1"]
            .map(|name| pixels(dir.path(), &format!("{sampler}-{name}.png")));
        assert!(same == plain, "{sampler}");
        // an ancestral sampler's later noise is the first seed's
        assert_eq!(all == other, sampler == "ddim");
        assert!(
            0.0 < distance(&near, &plain) && distance(&near, &plain) < distance(&far, &plain),
            "{sampler}"
        );
    }
}

#[test]
fn a_variation_is_remembered_drawn_again_and_may_be_a_lines_or_swept() {
    let dir = tempfile::tempdir().unwrap();
    draw(
        dir.path(),
        "a cat",
        "a.png",
        &["-s", "3", "--variation", "8:0.25"],
    );
    let known = metadata(dir.path(), "a.png");
    assert_eq!(known.sdgen["variation"], "8:0.25");
    assert!(
        known
            .parameters
            .contains(", Variation seed: 8, Variation seed strength: 0.25, "),
        "{}",
        known.parameters
    );
    std::fs::write(
        dir.path().join("jobs.jsonl"),
        r#"{"prompt": "a cat", "seed": 3, "variation": "8:0.25", "output": "b.png"}"#,
    )
    .unwrap();
    succeed(three_steps(dir.path()).args(["--from", "jobs.jsonl"]));
    assert!(pixels(dir.path(), "a.png") == pixels(dir.path(), "b.png"));
    succeed(three_steps(dir.path()).args([
        "a cat",
        "-s",
        "3",
        "--sweep",
        "variation=8:0.25,9:0.25",
        "-b",
        "2",
    ]));
    assert!(pixels(dir.path(), "a.png") == pixels(dir.path(), "a-cat-3-variation-8-0-25.png"));
    assert!(pixels(dir.path(), "a.png") != pixels(dir.path(), "a-cat-3-variation-9-0-25.png"));
    succeed(
        sdgen(dir.path())
            .args(["check", "a.png", "a-cat-3-variation-9-0-25.png", "--model"])
            .arg(fixture("sd1")),
    );
}

#[test]
fn a_variation_that_cannot_be_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    for wrong in ["8", "8:", "x:0.5", "8:1.5", "8:-0.1", "8:nan", ""] {
        fail(
            three_steps(dir.path()).args(["a cat", &format!("--variation={wrong}")]),
            2,
            &["--variation", "SEED:X", "9:0.2"],
        );
    }
}

#[test]
fn the_first_and_the_last_frame_are_the_plain_pictures_and_those_between_lie_between() {
    let dir = tempfile::tempdir().unwrap();
    let draw = |prompt: &str, name: &str, options: &[&str]| {
        succeed(
            sdgen(dir.path())
                .args([
                    prompt, "-s", "3", "--steps", "8", "-W", "64", "-H", "64", "-q", "-o", name,
                ])
                .args(options),
        );
    };
    draw("a red apple", "apple.png", &[]);
    draw("a pineapple", "pineapple.png", &[]);
    draw("a red apple", "other.png", &["-s", "9"]);
    draw("a pineapple", "both.png", &["-s", "9"]);
    for (option, last) in [
        (&["--to", "a pineapple"][..], "pineapple.png"),
        (&["--to-seed", "9"], "other.png"),
        (&["--to", "a pineapple", "--to-seed", "9"], "both.png"),
    ] {
        draw(
            "a red apple",
            "{frame:02}.png",
            &[option, &["--frames", "7", "--force"]].concat(),
        );
        let frames: Vec<Vec<u8>> = (0..7)
            .map(|frame| pixels(dir.path(), &format!("{frame:02}.png")))
            .collect();
        let [first, last] = ["apple.png", last].map(|name| pixels(dir.path(), name));
        assert!(frames[0] == first && frames[6] == last, "{option:?}");
        let whole = distance(&first, &last);
        for frame in &frames[1..6] {
            let (gone, left) = (distance(frame, &first), distance(frame, &last));
            assert!(
                0.0 < gone && 0.0 < left && gone.min(left) < 0.8 * whole,
                "{option:?}: {gone} {left} {whole}"
            );
        }
        assert!(
            distance(&frames[1], &first) < distance(&frames[5], &first),
            "{option:?}"
        );
    }
}

#[test]
fn frames_of_sdxl_and_of_ancestral_samplers_end_at_the_plain_pictures_of_the_other_prompt() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("sdxl");
    for (prompt, options) in [
        (
            "a cat",
            &["--to", "a house", "--frames", "3", "-o", "{frame}.png"][..],
        ),
        ("a house", &["-o", "plain.png"]),
    ] {
        let args = [
            prompt,
            "-s",
            "3",
            "--steps",
            "3",
            "-W",
            "16",
            "-H",
            "16",
            "--sampler",
            "euler-a",
            "--clip-skip",
            "2",
            "-q",
        ];
        succeed(
            sdgen(dir.path())
                .args(args)
                .args(["-n", "blue", "-m"])
                .arg(&model)
                .args(options),
        );
    }
    assert!(pixels(dir.path(), "2.png") == pixels(dir.path(), "plain.png"));
    assert!(pixels(dir.path(), "1.png") != pixels(dir.path(), "plain.png"));
}

#[test]
fn frames_are_pictures_of_the_list_with_names_that_ffmpeg_counts_through() {
    let dir = tempfile::tempdir().unwrap();
    let animation = [
        "a cat",
        "-s",
        "3,5",
        "--to",
        "a house",
        "--to-seed",
        "8",
        "--frames",
        "3",
    ];
    let said = succeed(
        three_steps(dir.path())
            .args(animation)
            .args(["-b", "4", "--trace"]),
    );
    let names: Vec<String> = [3, 5]
        .into_iter()
        .flat_map(|seed| (0..3).map(move |frame| format!("a-cat-{seed}-{frame:04}.png")))
        .collect();
    assert_eq!(stdout(&said).lines().collect::<Vec<_>>(), names);
    let middle = metadata(dir.path(), &names[4]);
    assert_eq!(
        middle.sdgen["to"],
        serde_json::json!({"prompt": "a house", "share": 0.5})
    );
    assert_eq!(middle.sdgen["variation"], "8:0.5");
    let said = ", To: a house, To share: 0.5, Variation seed: 8, Variation seed strength: 0.5, ";
    assert!(middle.parameters.contains(said), "{}", middle.parameters);

    // what is missing is drawn again, and any part alone, in the same bytes
    let file = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    let all: Vec<Vec<u8>> = names.iter().map(|name| file(name)).collect();
    std::fs::remove_file(dir.path().join(&names[1])).unwrap();
    let args = [&animation[..], &["--trace", "--resume", "--shard", "1/2"]].concat();
    assert_eq!(
        stdout(&succeed(three_steps(dir.path()).args(args)))
            .lines()
            .count(),
        3
    );
    assert!(names.iter().zip(&all).all(|(name, all)| file(name) == *all));
    succeed(
        sdgen(dir.path())
            .args(["check", "-m"])
            .arg(fixture("sd1"))
            .args(&names),
    );

    // by lines, where the command line says how many
    let line = r#"{"prompt": "a cat", "seed": 5, "to": "a house", "to_seed": 8, "output": "lines/{frame:03}.png"}"#;
    std::fs::write(dir.path().join("jobs.jsonl"), line).unwrap();
    succeed(three_steps(dir.path()).args(["--from", "jobs.jsonl", "--frames", "3"]));
    assert!(pixels(dir.path(), "lines/001.png") == pixels(dir.path(), &names[4]));
    let swept = [
        "a cat",
        "-s",
        "3",
        "--sweep",
        "to=a house,a dog",
        "--frames",
        "2",
        "--dry-run",
    ];
    let said = stdout(&succeed(three_steps(dir.path()).args(swept)));
    assert_eq!(
        said.lines().nth(2),
        Some("a-cat-3-to-a-dog-0000.png"),
        "{said}"
    );
}

#[test]
fn an_animation_that_cannot_be_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    for (options, texts) in [
        (
            &["--to", "a dog"][..],
            &["`--to` does not say in how many", "--frames 24"][..],
        ),
        (
            &["--to-seed", "9"],
            &["`--to-seed` does not say in how many", "--frames 24"],
        ),
        (
            &["--frames", "5"],
            &["`--frames` does not say to what", "--to-seed 9"],
        ),
        (
            &["--to", "a dog", "--frames", "1"],
            &["--frames", "a whole number from 2 to"],
        ),
        (
            &["--to-seed", "9", "--frames", "3", "--variation", "4:0.1"],
            &["`--variation` and `--to-seed`"],
        ),
        (
            &["--to", "a dog", "--sweep", "frames=2,3"],
            &["cannot vary `frames`"],
        ),
        (
            &["--to", "a dog", "--frames", "3", "-o", "one.png"],
            &["`one.png` is one file, but 3", "{frame:04}"],
        ),
        (
            &[
                "--to",
                "a dog",
                "--frames",
                "3",
                "-s",
                "4",
                "-o",
                "{seed}.png",
            ],
            &["`{frame:04}` for the frames"],
        ),
    ] {
        fail(three_steps(dir.path()).arg("a cat").args(options), 2, texts);
    }
    std::fs::write(
        dir.path().join("jobs.jsonl"),
        r#"{"prompt": "a cat", "to": "a dog"}"#,
    )
    .unwrap();
    fail(
        three_steps(dir.path()).args(["--from", "jobs.jsonl"]),
        2,
        &["line 1", "`--to` does not say"],
    );
}
