//! The contract with scripts: arguments, streams, exit codes, files. Drives the program as a shell
//! would.

use crate::common::*;
use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn the_plain_command_draws_with_the_embedded_model() {
    let dir = tempfile::tempdir().unwrap();
    let output = succeed(sdgen(dir.path()).args(["a frog in a top hat", "-s", "1"]));
    assert_eq!(stdout(&output), "a-frog-in-a-top-hat-1.png\n");
    assert_eq!(files(dir.path()), ["a-frog-in-a-top-hat-1.png"]);
    let picture = image::open(dir.path().join("a-frog-in-a-top-hat-1.png"))
        .unwrap()
        .to_rgb8();
    let first = picture.get_pixel(0, 0);
    assert!(picture.pixels().any(|p| p != first), "the picture is flat");
}

#[test]
fn a_random_seed_is_printed_and_draws_the_same_again() {
    let dir = tempfile::tempdir().unwrap();
    let output = succeed(tiny(dir.path()).arg("x").args(["-o", "a.png"]));
    let said = stderr(&output);
    let seed = said.trim().strip_prefix("seed ").expect(&said);
    succeed(tiny(dir.path()).arg("x").args(["-o", "b.png", "-s", seed]));
    let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    assert!(read("a.png") == read("b.png"));
}

#[test]
fn same_seed_gives_the_same_picture_in_any_batch_and_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    // an ancestral sampler, which draws noise at every step
    let draw = |extra: &[&str]| {
        succeed(
            tiny(dir.path())
                .arg("a frog")
                .args(["--sampler", "euler-a"])
                .args(extra),
        )
    };
    draw(&["-s", "5", "-c", "4", "-o", "count/"]);
    draw(&["-s", "5..9", "-b", "3", "-o", "batch/"]);
    draw(&["-s", "5,6,7,8", "--threads", "1", "-o", "thread/"]);
    for seed in ["5", "6", "7", "8"] {
        draw(&["-s", seed, "-o", "single/"]);
    }
    let names = files(&dir.path().join("single"));
    assert_eq!(names.len(), 4);
    for other in ["count", "batch", "thread"] {
        assert_eq!(files(&dir.path().join(other)), names);
        for name in &names {
            let read = |folder: &str| std::fs::read(dir.path().join(folder).join(name)).unwrap();
            assert!(
                read("single") == read(other),
                "{other}/{name} differs from the single run"
            );
        }
    }
}

#[test]
fn bad_arguments_exit_2_and_say_what_is_possible() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [(&[&str], &[&str]); 15] = [
        (&["--sampler", "eulr"], &["eulr", "euler"]),
        (&["--schedule", "karas"], &["karas", "karras"]),
        (&["-W", "0"], &["--width 0", "multiple of 8"]),
        (&["-W", "13"], &["--width 13", "multiple of 8"]),
        (&["-H", "1000000"], &["--height 1000000"]),
        (&["--steps", "0"], &["steps"]),
        (&["--steps", "1001"], &["1 to 1000"]),
        (&["--strength", "2"], &["--strength"]),
        (&["-g", "nan"], &["guidance"]),
        (&["--eta", "2"], &["eta", "0 to 1"]),
        (&["-s", "minus"], &["`minus` is not a seed"]),
        (&["-s", "9..3"], &["`9..3` is empty"]),
        (&["-c", "0"], &["count"]),
        (&["--clip-skip", "99"], &["--clip-skip 99"]),
        (&["--dtype", "f8"], &["f8", "bf16"]),
    ];
    for (args, texts) in cases {
        let output = tiny(dir.path()).arg("x").args(args).output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        for text in texts {
            assert!(
                said.contains(text),
                "{args:?}: `{text}` is missing in: {said}"
            );
        }
        assert!(output.stdout.is_empty() && files(dir.path()).is_empty());
    }
}

#[test]
fn a_device_that_is_not_built_in_says_how_to_build_it() {
    let dir = tempfile::tempdir().unwrap();
    if !cfg!(feature = "cuda") {
        fail(
            tiny(dir.path()).arg("x").args(["--device", "cuda"]),
            2,
            &["built without CUDA", "--features cuda"],
        );
    }
    if !cfg!(feature = "metal") {
        fail(
            tiny(dir.path()).arg("x").args(["--device", "metal"]),
            2,
            &["built without Metal"],
        );
    }
}

#[test]
fn an_existing_picture_is_not_overwritten_without_force() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("x.png"), "mine").unwrap();
    fail(
        tiny(dir.path()).arg("x").args(["-o", "x.png", "-s", "1"]),
        2,
        &["x.png", "--force"],
    );
    assert_eq!(std::fs::read(dir.path().join("x.png")).unwrap(), b"mine");
    succeed(
        tiny(dir.path())
            .arg("x")
            .args(["-o", "x.png", "-s", "1", "--force"]),
    );
    assert!(image::open(dir.path().join("x.png")).is_ok());
    assert_eq!(files(dir.path()), ["x.png"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_place_that_cannot_be_written_is_an_error_before_drawing() {
    let dir = tempfile::tempdir().unwrap();
    fail(
        tiny(dir.path())
            .arg("x")
            .args(["-o", "/proc/nothing/x.png"]),
        2,
        &["/proc/nothing"],
    );
    fail(
        tiny(dir.path()).arg("x").args(["-o", "missing/x.png"]),
        2,
        &["missing"],
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let output = tiny(dir.path())
        .arg("x")
        .args(["-o", "-", "-s", "1"])
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("cannot write the picture to stdout"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn stdout_takes_the_bytes_of_one_picture() {
    let dir = tempfile::tempdir().unwrap();
    let output = succeed(tiny(dir.path()).arg("x").args(["-o", "-", "-s", "1"]));
    assert!(image::load_from_memory(&output.stdout).is_ok());
    assert!(files(dir.path()).is_empty());
    fail(
        tiny(dir.path()).arg("x").args(["-o", "-", "-c", "2"]),
        2,
        &["takes one picture"],
    );
    fail(
        tiny(dir.path()).arg("x").args(["-o", "-", "--json"]),
        2,
        &["--json"],
    );
}

#[cfg(unix)]
#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = tiny(dir.path())
        .arg("x")
        .args(["-s", "1", "-c", "3"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success() && !stderr(&output).contains("panicked"),
        "{}",
        stderr(&output)
    );
    assert_eq!(files(dir.path()).len(), 3);
}

#[test]
fn prompts_come_from_stdin_one_a_line() {
    let dir = tempfile::tempdir().unwrap();
    for (i, args) in [&["-"][..], &[]].into_iter().enumerate() {
        let mut command = sdgen(dir.path());
        command
            .args(args)
            .args([
                "--steps",
                "1",
                "-s",
                "1",
                "-W",
                "16",
                "-H",
                "16",
                "-o",
                &format!("{i}/"),
                "-m",
            ])
            .arg(fixture("sd1"));
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all("a frog\n\nein Käfer 🐞\n".as_bytes())
            .unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(stdout(&output).lines().count(), 2);
        assert_eq!(files(&dir.path().join(i.to_string())).len(), 2);
    }
    fail(&mut sdgen(dir.path()), 2, &["no prompt"]);
}

#[cfg(unix)]
#[test]
fn a_prompt_that_is_not_utf8_is_refused() {
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    let output = sdgen(dir.path())
        .arg(std::ffi::OsStr::from_bytes(b"a \xff frog"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("UTF-8"));
    let mut child = sdgen(dir.path())
        .arg("-")
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"fine\na \xff frog\n")
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("line 2 of stdin"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn json_has_one_object_a_picture_and_the_picture_carries_the_same_settings() {
    let dir = tempfile::tempdir().unwrap();
    let output = succeed(tiny(dir.path()).arg("a frog").args([
        "-s",
        "3",
        "-c",
        "2",
        "--json",
        "-n",
        "toad",
        "-g",
        "4",
        "--sampler",
        "DPM++ 2M",
        "--schedule",
        "karras",
    ]));
    let lines: Vec<Value> = stdout(&output)
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    for (line, seed) in lines.iter().zip([3, 4]) {
        assert_eq!(line["seed"], seed);
        assert_eq!(line["prompt"], "a frog");
        assert_eq!(line["negative"], "toad");
        assert_eq!(line["sampler"], "dpmpp-2m");
        assert_eq!(line["schedule"], "karras");
        assert_eq!(line["model"], "sd1");
        assert_eq!(line["model_hash"].as_str().unwrap().len(), 64);
        let bytes = std::fs::read(dir.path().join(line["path"].as_str().unwrap())).unwrap();
        let metadata = sdgen::image::read_metadata(&bytes).unwrap().unwrap();
        for key in [
            "prompt",
            "negative",
            "seed",
            "steps",
            "guidance",
            "sampler",
            "model_hash",
        ] {
            assert_eq!(metadata.sdgen[key], line[key], "{key}");
        }
        assert!(
            metadata
                .parameters
                .starts_with("a frog\nNegative prompt: toad\nSteps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4"),
            "{}",
            metadata.parameters
        );
    }
    let output = succeed(
        tiny(dir.path())
            .arg("bare")
            .args(["-s", "3", "--no-metadata"]),
    );
    let bytes = std::fs::read(dir.path().join(stdout(&output).trim())).unwrap();
    assert!(sdgen::image::read_metadata(&bytes).unwrap().is_none());
}

#[test]
fn every_sampler_and_schedule_draws() {
    let dir = tempfile::tempdir().unwrap();
    for sampler in sdgen::sampling::Sampler::ALL {
        succeed(tiny(dir.path()).arg("x").args([
            "-s",
            "1",
            "--steps",
            "4",
            "--sampler",
            &sampler.to_string(),
            "-o",
            &format!("{sampler}.png"),
        ]));
    }
    for schedule in sdgen::sampling::Schedule::ALL {
        succeed(tiny(dir.path()).arg("x").args([
            "-s",
            "1",
            "--sampler",
            "euler",
            "--schedule",
            &schedule.to_string(),
            "-o",
            &format!("{schedule}.png"),
        ]));
    }
}

#[test]
fn guidance_negative_prompt_prediction_and_clip_skip_change_the_picture() {
    let dir = tempfile::tempdir().unwrap();
    let draw = |name: &str, extra: &[&str]| {
        succeed(
            tiny(dir.path())
                .arg("a frog")
                .args(["-s", "1", "--no-metadata", "-o", name])
                .args(extra),
        );
        std::fs::read(dir.path().join(name)).unwrap()
    };
    let plain = draw("plain.png", &[]);
    let others = [
        draw("guidance.png", &["-g", "1"]),
        draw("negative.png", &["-n", "the house"]),
        draw("clip.png", &["--clip-skip", "2"]),
        draw("prediction.png", &["--prediction", "v"]),
        draw("eta.png", &["--sampler", "ddim", "--eta", "1"]),
    ];
    assert!(others.iter().all(|other| *other != plain));
    let output =
        succeed(
            tiny(dir.path())
                .arg("a frog")
                .args(["-s", "1", "-g", "1", "-n", "the house"]),
        );
    assert!(stderr(&output).contains("no effect without classifier-free guidance"));
}

#[test]
fn quiet_says_nothing_and_verbose_says_the_stages() {
    let dir = tempfile::tempdir().unwrap();
    let output = succeed(tiny(dir.path()).arg("x").args(["-q"]));
    assert!(stderr(&output).is_empty());
    let output = succeed(tiny(dir.path()).arg("x").args(["-v", "-s", "8"]));
    for stage in [
        "encoding the prompt",
        "reading the U-Net",
        "drawing",
        "reading the VAE",
        "decoding",
        "tensors are not needed",
    ] {
        assert!(
            stderr(&output).contains(stage),
            "{stage} is missing in {}",
            stderr(&output)
        );
    }
    let output = succeed(
        tiny(dir.path())
            .arg("x")
            .args(["--progress", "bar", "-s", "9"]),
    );
    assert_eq!(stdout(&output).lines().count(), 1);
}

#[test]
fn completions_inspect_and_bench_write_to_stdout() {
    let dir = tempfile::tempdir().unwrap();
    let output = succeed(sdgen(dir.path()).args(["completions", "bash"]));
    assert!(stdout(&output).contains("_sdgen"));
    let output = succeed(sdgen(dir.path()).args(["inspect", "mini"]));
    assert!(stdout(&output).starts_with("mini: Stable Diffusion"));
    let output = succeed(sdgen(dir.path()).args(["inspect", "mini", "--json"]));
    let said: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(said["name"], "mini");
    let output = succeed(sdgen(dir.path()).args(["bench", "--size", "mini", "-n", "1", "--json"]));
    let said: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert!(
        said["unet_step"]["best_s"].as_f64().unwrap() > 0.0
            && said["vae_decode"]["gflops"].as_f64().unwrap() > 0.0,
        "{said}"
    );
    let output =
        succeed(sdgen(dir.path()).args(["bench", "--size", "mini", "-n", "1", "-W", "32"]));
    assert!(stdout(&output).contains("U-Net step, guided"));
}

#[test]
fn bench_names_the_instructions_and_compares_with_their_ceiling() {
    let dir = tempfile::tempdir().unwrap();
    let bench = |args: &[&str]| {
        let mut command = sdgen(dir.path());
        command.args(["bench", "--size", "mini", "-n", "1", "-W", "16", "-H", "16"]);
        command.args(args);
        command
    };
    let said = stdout(&succeed(&mut bench(&["--instructions", "portable"])));
    assert!(
        said.lines().next().unwrap().ends_with(", portable"),
        "{said}"
    );
    assert!(
        said.lines()
            .any(|line| line.contains("GFLOP/s") && line.ends_with(" %"))
    );
    // the option wins over the environment
    let mut command = bench(&["--instructions", "amx", "--only", "unet", "--json"]);
    let output = succeed(command.env("SDGEN_INSTRUCTIONS", "portable"));
    let said: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let is_there = said["instructions"] == "amx";
    assert!(
        is_there || said["instructions"] == "amx, emulated",
        "{said}"
    );
    assert_eq!(said["ceiling_gflops"].is_number(), is_there);
    let possible = "amx, avx512-bf16, ";
    fail(
        &mut bench(&["--instructions", "sse2"]),
        2,
        &["sse2", possible],
    );
}

#[test]
fn the_environment_names_the_instructions_which_draw_the_same_picture() {
    let dir = tempfile::tempdir().unwrap();
    let draw = |instructions: &str, dtype: &str| {
        let mut command = tiny(dir.path());
        command.args(["x", "-s", "1", "-o", "x.png", "--force", "--dtype", dtype]);
        command.env("SDGEN_INSTRUCTIONS", instructions);
        command
    };
    let drawn = |instructions: &str, dtype: &str| {
        succeed(&mut draw(instructions, dtype));
        pixels(&dir.path().join("x.png"))
    };
    let expected = drawn("portable", "f32");
    for instructions in ["", "amx", "avx512-bf16"] {
        let off = worst_level(&drawn(instructions, "f32"), &expected);
        assert!(off <= 1, "{instructions}: {off}");
    }
    // products of bf16 are others, and not far from those of f32
    let wide = drawn("portable", "bf16");
    for instructions in ["amx", "avx512-bf16"] {
        let narrow = drawn(instructions, "bf16");
        let off = worst_level(&narrow, &wide);
        assert!((1..=12).contains(&off), "{instructions}: {off}");
    }
    // sums of 8-bit integers are exact, but what is rounded to 8 bits was computed in f32
    let off = worst_level(&drawn("", "int8"), &drawn("portable", "int8"));
    assert!(off <= 24, "{off}");
    fail(
        &mut draw("sse2", "f32"),
        2,
        &[
            "SDGEN_INSTRUCTIONS is `sse2`",
            "hint: on this processor it may be amx, avx512-bf16, ",
        ],
    );
}

#[test]
fn the_model_comes_from_the_environment_when_no_option_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = sdgen(dir.path());
    let output = succeed(
        command
            .args([
                "x", "-s", "1", "--steps", "1", "-W", "16", "-H", "16", "--json",
            ])
            .env("SDGEN_MODEL", fixture("sd2")),
    );
    assert!(stdout(&output).contains(r#""model":"sd2""#));
}

#[test]
fn help_names_every_option_of_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let help = stdout(&succeed(sdgen(dir.path()).arg("--help")));
    for option in [
        "--model",
        "--negative",
        "--width",
        "--height",
        "--seed",
        "--count",
        "--batch-size",
        "--steps",
        "--guidance",
        "--sampler",
        "--schedule",
        "--eta",
        "--clip-skip",
        "--output",
        "--original-size",
        "--crop",
        "--target-size",
        "--refiner",
        "--refine-at",
        "--vae-tiling",
        "--format",
        "--force",
        "--resume",
        "--from",
        "--sweep",
        "--dry-run",
        "--manifest",
        "--device",
        "--dtype",
        "--threads",
        "--json",
        "--show",
        "--trace",
        "--progress",
        "--offline",
        "Examples:",
    ] {
        assert!(help.contains(option), "{option} is missing");
    }
    let short = stdout(&succeed(sdgen(dir.path()).arg("-h")));
    assert!(
        short.lines().count() < 100,
        "the short help is longer than a screen or two"
    );
    assert!(
        short.contains("--seed") && !short.contains("--vae-tiling"),
        "{short}"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_picture_that_does_not_fit_into_memory_is_refused_before_drawing() {
    let dir = tempfile::tempdir().unwrap();
    fail(
        tiny(dir.path())
            .arg("x")
            .args(["-W", "16384", "-H", "16384", "-s", "1", "-b", "64"]),
        4,
        &["GB of memory", "--width"],
    );
}

/// What `script` (of util-linux) sees of a command in a terminal of its own that knows 24-bit
/// colours.
#[cfg(target_os = "linux")]
fn in_terminal(folder: &Path, options: &str) -> String {
    let command = format!(
        "'{}' 'a frog' -s 1 -o a.png --force {options}",
        env!("CARGO_BIN_EXE_sdgen")
    );
    let mut script = std::process::Command::new("script");
    for name in [
        "TMUX",
        "STY",
        "ZELLIJ",
        "KITTY_WINDOW_ID",
        "TERM_PROGRAM",
        "LC_TERMINAL",
        "SDGEN_MODEL",
    ] {
        script.env_remove(name);
    }
    script
        .args(["-qec", &command, "/dev/null"])
        .current_dir(folder)
        .stdin(std::process::Stdio::null());
    let output = script
        .env("TERM", "xterm-256color")
        .env("COLORTERM", "truecolor")
        .output()
        .expect("this test needs the program `script`, of the package bsdutils or util-linux");
    assert!(output.status.success(), "{}", stdout(&output));
    stdout(&output)
}

#[cfg(target_os = "linux")]
#[test]
fn a_terminal_shows_the_picture_and_before_it_previews_in_the_same_place() {
    let dir = tempfile::tempdir().unwrap();
    let seen = in_terminal(dir.path(), "--show");
    // 128x128 pixels in 22 of the usual 24 lines
    let (erase, row) = ("\x1b[22A\r\x1b[J", "\x1b[38;2;");
    assert!(seen.matches(erase).count() >= 1, "no preview was replaced");
    let (_, last) = seen.rsplit_once(erase).unwrap();
    assert_eq!(
        last.lines().filter(|line| line.contains('▀')).count(),
        22,
        "{last}"
    );
    assert!(last.contains(row) && last.contains("a.png"), "{last}");
    for options in ["--show -q", "--show --progress none"] {
        let seen = in_terminal(dir.path(), options);
        assert_eq!(
            (
                seen.matches(erase).count(),
                seen.lines().filter(|line| line.contains('▀')).count()
            ),
            (0, 22),
            "{options}"
        );
    }
    assert!(!in_terminal(dir.path(), "").contains('▀'));
}

#[test]
fn a_shown_picture_goes_to_stderr_and_its_bytes_to_stdout() {
    use base64::Engine;
    let dir = tempfile::tempdir().unwrap();
    let output = succeed(sdgen(dir.path()).args([
        "a frog",
        "--steps",
        "2",
        "-s",
        "1",
        "-o",
        "-",
        "--no-metadata",
        "--show=kitty",
    ]));
    let said = stderr(&output);
    let pieces = said
        .strip_prefix("\x1b_Ga=T,")
        .unwrap()
        .strip_suffix("\x1b\\\n")
        .unwrap();
    let data: String = pieces
        .split("\x1b\\")
        .filter_map(|piece| piece.split_once(';'))
        .map(|(_, data)| data)
        .collect();
    assert!(
        base64::engine::general_purpose::STANDARD
            .decode(data)
            .unwrap()
            == output.stdout
    );
}

#[test]
fn show_without_a_terminal_or_beside_events_is_an_error_before_drawing() {
    let dir = tempfile::tempdir().unwrap();
    fail(
        sdgen(dir.path()).args(["a frog", "--show"]),
        2,
        &["stderr is not a terminal", "--show=blocks"],
    );
    fail_events(sdgen(dir.path()).args(["a frog", "--show=blocks", "--progress", "json"]));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

fn fail_events(command: &mut std::process::Command) {
    let output = command.output().unwrap();
    assert!(
        output.status.code() == Some(2)
            && stderr(&output).contains("`--show` and `--progress json` both want stderr")
    );
}

#[test]
fn clip_skip_of_sdxl_is_said_to_be_another_picture_than_a1111s() {
    let dir = tempfile::tempdir().unwrap();
    let said = |model: &str, skip: &str| {
        let mut command = sdgen(dir.path());
        command.args(["a frog", "-s", "1", "--dry-run", "--clip-skip", skip, "-m"]);
        stderr(&succeed(command.arg(fixture(model))))
    };
    let warning = "warning: `--clip-skip 2` takes a layer further from the end";
    assert!(said("sdxl", "2").contains(warning));
    assert!(!said("sdxl", "1").contains(warning));
    assert!(!said("sd1", "2").contains(warning));
}

// Resources

#[cfg(target_os = "linux")]
#[test]
fn a_limit_of_addresses_is_known_before_drawing_and_where_it_is_not_it_ends_with_a_message() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = tiny(dir.path());
    command.args([
        "x",
        "-s",
        "1",
        "-W",
        "1024",
        "-H",
        "1024",
        "--threads",
        "1",
        "-o",
        "x.png",
    ]);
    // in kB; the program itself takes some of it
    let output = after("ulimit -v 600000", &command).output().unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(4), "{:?} {said}", output.status);
    assert!(
        said.contains("B are free") && said.contains("`ulimit -v` leaves no more"),
        "{said}"
    );
    // of the formula's results nothing is estimated
    let small = image::RgbImage::new(200, 200);
    small.save(dir.path().join("small.png")).unwrap();
    let mut command = sdgen(dir.path());
    command.args([
        "upscale",
        "small.png",
        "-m",
        "lanczos",
        "--scale",
        "64",
        "--threads",
        "1",
    ]);
    let output = after("ulimit -v 600000", &command).output().unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(4), "{:?} {said}", output.status);
    assert!(
        said.contains("error: the system has no memory left"),
        "{said}"
    );
    assert_eq!(files(dir.path()), ["small.png"]);
}

#[cfg(target_os = "linux")]
#[test]
fn without_threads_it_ends_with_a_message() {
    const CALLS: [libc::c_long; 2] = [libc::SYS_clone3, libc::SYS_clone];
    let dir = tempfile::tempdir().unwrap();
    let mut command = tiny(dir.path());
    command.args(["x", "-s", "1"]);
    refuse_calls(&mut command, &CALLS, libc::EAGAIN);
    fail(&mut command, 1, &["no thread", "ulimit -u"]);
}

#[test]
fn more_threads_than_help_are_fewer() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = tiny(dir.path());
    let output = succeed(command.args(["x", "-s", "1", "--threads", "1000000"]));
    assert!(
        stderr(&output).contains("threads are used: 1000000 are more than help"),
        "{}",
        stderr(&output)
    );
}

#[cfg(target_os = "linux")]
#[test]
fn the_stack_is_large_enough_whatever_the_shell_says() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = tiny(dir.path());
    command.args(["x", "-s", "1"]).env("RUST_MIN_STACK", "1");
    succeed(&mut after("ulimit -s 128", &command));
    let mut command = sdgen(dir.path());
    succeed(&mut after("ulimit -s 128", command.arg("--help")));
}

// What reaches a terminal

#[test]
fn text_from_outside_reaches_the_terminal_escaped() {
    let dir = tempfile::tempdir().unwrap();
    let name = "\u{1b}[31mred\u{9b}2J.safetensors";
    std::fs::write(dir.path().join(name), "no model").unwrap();
    let escaped = r"\u{1b}[31mred\u{9b}2J.safetensors";
    let mut draw = sdgen(dir.path());
    let said = fail(draw.args(["x", "-m", name]), 3, &[escaped]);
    assert!(
        !said.chars().any(|c| c.is_control() && c != '\n'),
        "{said:?}"
    );
    let mut inspect = sdgen(dir.path());
    fail(inspect.args(["inspect", name]), 3, &[escaped]);
}

#[cfg(target_os = "linux")]
#[test]
fn the_bytes_of_a_picture_do_not_go_to_a_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let program = env!("CARGO_BIN_EXE_sdgen");
    image::RgbImage::new(8, 8)
        .save(dir.path().join("a.png"))
        .unwrap();
    for arguments in ["'a frog' -o -", "upscale a.png -m lanczos -o -"] {
        let output = std::process::Command::new("script")
            .args(["-qec", &format!("'{program}' {arguments}"), "/dev/null"])
            .current_dir(dir.path())
            .env("XDG_CONFIG_HOME", dir.path())
            .stdin(Stdio::null())
            .output()
            .expect("this test needs the program `script`, of the package bsdutils or util-linux");
        let said = stdout(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(
            said.contains("to the terminal") && said.contains("> picture.png"),
            "{said}"
        );
    }
    // a path in a terminal is escaped, too
    let output = std::process::Command::new("script")
        .args([
            "-qec",
            &format!("'{program}' upscale a.png -m lanczos -o \"$(printf 'b\\033[2J.png')\""),
            "/dev/null",
        ])
        .current_dir(dir.path())
        .env("XDG_CONFIG_HOME", dir.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        stdout(&output).contains(r"b\u{1b}[2J.png"),
        "{}",
        stdout(&output)
    );
}

// First mistakes

#[test]
fn a_prompt_without_quotes_is_told_with_the_command_that_was_meant() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        (
            &["a", "frog", "in", "a", "top", "hat"][..],
            r#"sdgen "a frog in a top hat""#,
        ),
        (
            &["a", "frog", "-s", "7", "--show=blocks"],
            r#"sdgen "a frog" -s 7 --show=blocks"#,
        ),
        (
            &["-s", "7", "a", "frog", "-c4"],
            r#"sdgen -s 7 "a frog" -c4"#,
        ),
        (
            &["--steps", "3", "two", "cats", "-n", "a dog"],
            r#"sdgen --steps 3 "two cats" -n 'a dog'"#,
        ),
        (&["inspect", "it", "please"], "`sdgen inspect --help`"),
    ];
    for (arguments, meant) in cases {
        let mut command = sdgen(dir.path());
        let said = fail(command.args(arguments), 2, &[meant]);
        assert_eq!(
            said.contains("needs quotes"),
            arguments[0] != "inspect",
            "{said}"
        );
    }
    assert!(files(dir.path()).is_empty());
}

#[test]
fn what_other_programs_call_a_prompt_is_one() {
    let dir = tempfile::tempdir().unwrap();
    for option in ["-p", "--prompt"] {
        let mut command = tiny(dir.path());
        let output = succeed(command.args([option, "a frog", "-s", "1", "--force"]));
        assert_eq!(stdout(&output), "a-frog-1.png\n");
    }
    fail(
        tiny(dir.path()).args(["a frog", "-p", "a cat"]),
        2,
        &["cannot be used with"],
    );
}

#[test]
fn numbers_that_are_out_of_range_are_told_the_range() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        (&["-g", "-5"][..], "expected a number from 0"),
        (&["-s", "-1"], "without `--seed` it is random"),
        (&["--steps", "-3"], "expected 1 to 1000 steps"),
        (
            &["-c", "99999999999"],
            "expected a whole number from 1 to 1000000",
        ),
        (
            &["--to", "b", "--frames", "99999999999"],
            "expected a whole number from 2 to 1000000",
        ),
        (&["-b", "0"], "expected a whole number from 1 to 1000000"),
    ];
    for (arguments, text) in cases {
        fail(tiny(dir.path()).arg("x").args(arguments), 2, &[text]);
    }
}

#[test]
fn the_beginning_of_a_command_is_drawn_and_the_command_told() {
    let dir = tempfile::tempdir().unwrap();
    let output = succeed(tiny(dir.path()).args(["model", "-s", "1"]));
    assert!(
        stderr(&output).contains("the command is `sdgen models`"),
        "{}",
        stderr(&output)
    );
    let output = succeed(tiny(dir.path()).args(["frog", "-s", "1"]));
    assert!(
        !stderr(&output).contains("the command is"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_damaged_picture_has_one_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("bad.png"), b"\x89PNG\r\n\x1a\ncut").unwrap();
    fail(
        tiny(dir.path()).args(["x", "-s", "1", "-i", "bad.png"]),
        2,
        &["bad.png"],
    );
    let mut upscale = sdgen(dir.path());
    fail(
        upscale.args(["upscale", "bad.png", "-m", "lanczos"]),
        2,
        &["bad.png"],
    );
    let mut upscale = sdgen(dir.path());
    let output = upscale
        .args(["upscale", "bad.png", "-m", "lanczos", "--json"])
        .output()
        .unwrap();
    let record: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert!(
        record["error"].is_string() && record["sha256"].is_null(),
        "{record}"
    );
}

#[test]
fn a_lora_that_is_not_finite_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = load(&fixture("lora/kohya.safetensors"));
    let name = tensors
        .keys()
        .find(|name| name.contains("lora_up"))
        .unwrap();
    let (name, tensor) = (name.clone(), tensors[name].clone());
    tensors.insert(name, (tensor * f64::NAN).unwrap());
    save(&tensors, &dir.path().join("broken.safetensors"));
    let mut command = tiny(dir.path());
    let texts = [
        "with the LoRA `broken`",
        "not finite",
        "hint: the LoRA is damaged",
    ];
    fail(
        command.args(["x", "-s", "1", "--lora", "broken.safetensors"]),
        5,
        &texts,
    );
}
