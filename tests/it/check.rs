//! `sdgen check`: pictures are drawn again from what their files say, and compared.

use crate::common::*;
use sdgen::pipeline::fingerprint::Trace;
use serde_json::Value;
use std::path::Path;

/// Draws a quick picture with the embedded model.
fn draw(folder: &Path, name: &str, options: &[&str]) {
    succeed(
        sdgen(folder)
            .args(["a frog", "--steps", "2", "-s", "1", "-q", "-o", name])
            .args(options),
    );
}

/// Exit code and stdout of a check.
fn check(folder: &Path, args: &[&str]) -> (i32, String, String) {
    let output = sdgen(folder).arg("check").args(args).output().unwrap();
    (
        output.status.code().unwrap(),
        stdout(&output),
        stderr(&output),
    )
}

/// Changes the pixels of a PNG and leaves what it says of itself.
fn edit(folder: &Path, name: &str, change: impl Fn(&mut sdgen::image::Image)) {
    let path = folder.join(name);
    let bytes = std::fs::read(&path).unwrap();
    let metadata = sdgen::image::read_metadata(&bytes).unwrap().unwrap();
    let mut picture = sdgen::image::Image::decode(&bytes).unwrap();
    change(&mut picture);
    std::fs::write(
        &path,
        picture
            .encode(sdgen::image::Format::Png, Some(&metadata))
            .unwrap(),
    )
    .unwrap();
}

#[test]
fn pictures_that_are_drawn_the_same_again_are_identical_in_every_format() {
    let dir = tempfile::tempdir().unwrap();
    draw(dir.path(), "a.png", &[]);
    draw(dir.path(), "b.jpg", &["-g", "3.3", "--sampler", "euler-a"]);
    draw(
        dir.path(),
        "c.webp",
        &[
            "-W",
            "64",
            "-n",
            "blue",
            "--schedule",
            "karras",
            "--dtype",
            "bf16",
        ],
    );
    draw(dir.path(), "d.png", &["-W", "64", "--dtype", "int8"]);
    let (code, said, errors) = check(dir.path(), &["a.png", "b.jpg", "c.webp", "d.png"]);
    assert_eq!((code, said.lines().count()), (0, 4), "{said}{errors}");
    for name in ["a.png", "b.jpg", "c.webp", "d.png"] {
        assert!(said.contains(&format!("{name}: identical\n")), "{said}");
    }
}

#[test]
fn guidance_rescale_is_remembered_changes_the_picture_and_was_zero_before_it_was_an_option() {
    let dir = tempfile::tempdir().unwrap();
    draw(dir.path(), "plain.png", &["-W", "32", "-H", "32"]);
    draw(
        dir.path(),
        "rescaled.png",
        &["-W", "32", "-H", "32", "--guidance-rescale", "0.7"],
    );
    let read = |name: &str| {
        sdgen::image::read_metadata(&std::fs::read(dir.path().join(name)).unwrap())
            .unwrap()
            .unwrap()
    };
    assert!(
        read("rescaled.png").parameters.contains("CFG Rescale: 0.7"),
        "{}",
        read("rescaled.png").parameters
    );
    assert_eq!(
        check(dir.path(), &["plain.png", "--expect", "rescaled.png"]).0,
        1
    );
    // a picture of a version that did not know the option, nor tiles
    let mut metadata = read("plain.png");
    for key in ["guidance_rescale", "vae_tiling"] {
        metadata.sdgen.as_object_mut().unwrap().remove(key).unwrap();
    }
    let picture =
        sdgen::image::Image::decode(&std::fs::read(dir.path().join("plain.png")).unwrap()).unwrap();
    std::fs::write(
        dir.path().join("old.png"),
        picture
            .encode(sdgen::image::Format::Png, Some(&metadata))
            .unwrap(),
    )
    .unwrap();
    assert_eq!(
        check(dir.path(), &["old.png", "rescaled.png"]).1,
        "old.png: identical\nrescaled.png: identical\n"
    );
}

#[test]
fn a_picture_that_differs_is_an_error_unless_it_is_close_enough() {
    let dir = tempfile::tempdir().unwrap();
    draw(dir.path(), "a.png", &[]);
    edit(dir.path(), "a.png", |picture| picture.rgb[0] ^= 4);
    let (code, said, errors) = check(dir.path(), &["a.png"]);
    assert_eq!(code, 1);
    assert!(
        said.starts_with("a.png: differs, ") && said.contains(" 1 pixels by up to 4 levels"),
        "{said}"
    );
    assert!(
        errors.contains("1 of 1 pictures are not the same"),
        "{errors}"
    );
    let (code, said, _) = check(dir.path(), &["a.png", "--min-psnr", "60"]);
    assert!(code == 0 && said.starts_with("a.png: close, "), "{said}");
    assert_eq!(check(dir.path(), &["a.png", "--min-psnr", "90"]).0, 1);
    let (code, said, _) = check(dir.path(), &["a.png", "--json"]);
    let record: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(
        (code, &record["same"], &record["pixels"], &record["largest"]),
        (1, &false.into(), &1.into(), &4.into())
    );
}

#[test]
fn a_picture_that_cannot_be_drawn_again_is_told_and_the_others_are_compared() {
    let dir = tempfile::tempdir().unwrap();
    draw(dir.path(), "good.png", &[]);
    draw(dir.path(), "silent.png", &["--no-metadata"]);
    std::fs::write(dir.path().join("broken.png"), b"no picture").unwrap();
    let (code, said, errors) = check(
        dir.path(),
        &["silent.png", "good.png", "missing.png", "broken.png"],
    );
    assert_eq!(code, 6);
    // in the order of the arguments
    assert_eq!(
        said,
        "silent.png: failed\ngood.png: identical\nmissing.png: failed\nbroken.png: failed\n"
    );
    assert!(
        errors.contains("`silent.png`: it does not say how it was drawn"),
        "{errors}"
    );
    assert!(
        errors.contains("3 of 4 pictures cannot be checked"),
        "{errors}"
    );
    let (code, said, _) = check(dir.path(), &["--json", "missing.png", "good.png"]);
    let records: Vec<Value> = said
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!((code, records.len()), (6, 2), "{said}");
    assert_eq!(records[0]["path"], "missing.png");
    assert!(
        records[0]["same"].is_null() && records[1]["same"] == true,
        "{said}"
    );
    assert!(
        records[0]["error"]
            .as_str()
            .unwrap()
            .contains("it cannot be read")
            && records[1]["error"].is_null(),
        "{said}"
    );
    // one that differs is what matters most
    edit(dir.path(), "good.png", |picture| picture.rgb[0] ^= 4);
    let (code, _, errors) = check(dir.path(), &["missing.png", "good.png"]);
    assert_eq!(code, 1);
    assert!(
        errors.contains("1 of 2 pictures are not the same, 1 of 2 pictures cannot be checked"),
        "{errors}"
    );
}

#[test]
fn a_folder_stands_for_its_pictures() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["golden/b.webp", "golden/a.png"] {
        std::fs::create_dir_all(dir.path().join("golden/deeper")).unwrap();
        draw(dir.path(), name, &[]);
    }
    std::fs::write(dir.path().join("golden/notes.txt"), "").unwrap();
    draw(dir.path(), "c.png", &[]);
    let (code, said, errors) = check(dir.path(), &["golden", "c.png"]);
    assert_eq!(code, 0, "{errors}");
    assert_eq!(
        said,
        "golden/a.png: identical\ngolden/b.webp: identical\nc.png: identical\n"
    );
    let (code, said, errors) = check(dir.path(), &["c.png", "golden/deeper"]);
    assert_eq!(
        (code, said.as_str()),
        (6, "c.png: identical\ngolden/deeper: failed\n")
    );
    assert!(
        errors.contains("`golden/deeper`: it is a folder without pictures"),
        "{errors}"
    );
}

#[test]
fn settings_that_name_what_is_not_known_are_errors_of_their_file() {
    let dir = tempfile::tempdir().unwrap();
    draw(dir.path(), "good.png", &[]);
    let changes: [(&str, Value); 8] = [
        ("dtype", "f12".into()),
        ("sampler", "magic".into()),
        ("schedule", "magic".into()),
        ("prediction", "magic".into()),
        ("steps", 0.into()),
        ("width", 13.into()),
        ("clip_skip", 99.into()),
        ("model", "no-such-model".into()),
    ];
    let mut names = vec![];
    for (key, value) in changes {
        let name = format!("{key}.png");
        draw(dir.path(), &name, &[]);
        tamper(dir.path(), &name, |sdgen| sdgen[key] = value.clone());
        names.push(name);
    }
    names.push("good.png".into());
    let arguments: Vec<&str> = names.iter().map(String::as_str).collect();
    let (code, said, errors) = check(dir.path(), &arguments);
    assert_eq!(code, 6, "{errors}");
    let expected: String = names
        .iter()
        .map(|name| match name.as_str() {
            "good.png" => "good.png: identical\n".into(),
            name => format!("{name}: failed\n"),
        })
        .collect();
    assert_eq!(said, expected, "{errors}");
    for name in &names[..8] {
        assert!(
            errors.contains(&format!("error: `{name}`: ")),
            "{name}: {errors}"
        );
    }
    // where none can be checked the reason decides
    assert_eq!(check(dir.path(), &["model.png"]).0, 3);
    assert_eq!(check(dir.path(), &["dtype.png"]).0, 6);
}

#[test]
fn a_picture_from_elsewhere_does_not_make_it_ask_the_hub_unless_that_is_allowed() {
    let dir = tempfile::tempdir().unwrap();
    draw(dir.path(), "a.png", &[]);
    tamper(dir.path(), "a.png", |sdgen| {
        sdgen["model"] = "owner/name".into()
    });
    let hub = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    hub.set_nonblocking(true).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = sdgen(dir.path());
        command.arg("check").args(arguments);
        command.env_remove("HF_HUB_OFFLINE");
        command.env("HF_HOME", dir.path().join("cache"));
        let address = format!("http://{}", hub.local_addr().unwrap());
        let mut child = command
            .env("HF_ENDPOINT", address)
            .stderr(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut asked = false;
        let status = loop {
            // a connection is answered by its end
            asked |= hub.accept().is_ok();
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        };
        asked |= hub.accept().is_ok();
        let output = child.wait_with_output().unwrap();
        (asked, status.code(), stderr(&output))
    };
    let (asked, code, errors) = run(&["a.png"]);
    assert_eq!((asked, code), (false, Some(3)), "{errors}");
    assert!(errors.contains("--allow-download"), "{errors}");
    let (asked, _, errors) = run(&["a.png", "--allow-download"]);
    assert!(asked, "{errors}");
    let (asked, _, errors) = run(&["a.png", "-m", "other/name"]);
    assert!(asked, "what the user names is looked for: {errors}");
}

#[test]
fn other_weights_are_told_from_a_changed_program() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("sd1");
    draw(
        dir.path(),
        "a.png",
        &["-W", "16", "-H", "16", "-m", model.to_str().unwrap()],
    );
    let (code, said, errors) = check(dir.path(), &["a.png", "--model", "mini"]);
    assert!(code == 6 && said == "a.png: failed\n", "{said}");
    assert!(
        errors.contains("drawn with other weights") && errors.contains("--model"),
        "{errors}"
    );
    let (code, said, errors) = check(dir.path(), &["a.png", "--model", model.to_str().unwrap()]);
    assert!(code == 0 && said == "a.png: identical\n", "{said}{errors}");
}

#[test]
fn a_golden_picture_can_stand_for_the_file() {
    let dir = tempfile::tempdir().unwrap();
    draw(dir.path(), "a.png", &[]);
    draw(dir.path(), "golden.webp", &["--no-metadata"]);
    draw(dir.path(), "other.png", &["-s", "2"]);
    assert_eq!(
        check(dir.path(), &["a.png", "--expect", "golden.webp"]).0,
        0
    );
    let (code, said, _) = check(dir.path(), &["a.png", "--expect", "other.png"]);
    assert!(code == 1 && said.starts_with("a.png: differs"), "{said}");
}

/// What a PNG says of its drawing.
fn said_of_drawing(folder: &Path, name: &str) -> Value {
    sdgen::image::read_metadata(&std::fs::read(folder.join(name)).unwrap())
        .unwrap()
        .unwrap()
        .sdgen
}

/// Changes what a PNG says of its drawing and leaves the pixels.
fn tamper(folder: &Path, name: &str, change: impl Fn(&mut Value)) {
    let path = folder.join(name);
    let bytes = std::fs::read(&path).unwrap();
    let mut metadata = sdgen::image::read_metadata(&bytes).unwrap().unwrap();
    change(&mut metadata.sdgen);
    let picture = sdgen::image::Image::decode(&bytes).unwrap();
    std::fs::write(
        &path,
        picture
            .encode(sdgen::image::Format::Png, Some(&metadata))
            .unwrap(),
    )
    .unwrap();
}

#[test]
fn a_trace_names_every_stage_and_changes_neither_pixels_nor_settings() {
    let dir = tempfile::tempdir().unwrap();
    draw(dir.path(), "plain.png", &[]);
    let output = succeed(sdgen(dir.path()).args([
        "a frog",
        "--steps",
        "2",
        "-s",
        "1",
        "-o",
        "traced.png",
        "--trace",
        "--json",
    ]));
    let record: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let (plain, mut traced) = (
        said_of_drawing(dir.path(), "plain.png"),
        said_of_drawing(dir.path(), "traced.png"),
    );
    let pixels = |name: &str| {
        sdgen::image::Image::decode(&std::fs::read(dir.path().join(name)).unwrap()).unwrap()
    };
    assert!(pixels("plain.png") == pixels("traced.png"));
    let trace = traced.as_object_mut().unwrap().remove("trace").unwrap();
    assert_eq!((&traced, &record["trace"]), (&plain, &trace));
    let stages: Vec<&String> = trace.as_object().unwrap().keys().collect();
    let [texts, steps] = [
        [
            "tokens",
            "text embedding",
            "negative tokens",
            "negative embedding",
        ],
        [
            "step 1 of 2, U-Net",
            "step 1 of 2, sampler",
            "step 2 of 2, U-Net",
            "step 2 of 2, sampler",
        ],
    ];
    assert_eq!(
        stages,
        [&texts[..], &["noise"], &steps, &["pixels"]].concat()
    );
    assert!(
        pixels("traced.png")
            .sha256()
            .starts_with(trace["pixels"].as_str().unwrap())
    );
    let mut hashes: Vec<&str> = trace
        .as_object()
        .unwrap()
        .values()
        .map(|hash| hash.as_str().unwrap())
        .collect();
    hashes.sort();
    hashes.dedup();
    // the last step ends at the network's guess
    assert!(
        hashes.len() == stages.len() - 1 && hashes.iter().all(|hash| hash.len() == 16),
        "{trace}"
    );
    // without guidance there is no negative prompt
    draw(dir.path(), "alone.png", &["--trace", "-g", "1"]);
    assert_eq!(
        said_of_drawing(dir.path(), "alone.png")["trace"]
            .as_object()
            .unwrap()
            .len(),
        stages.len() - 2
    );
}

#[test]
fn a_trace_has_what_a_refiner_reads_before_its_steps() {
    let dir = tempfile::tempdir().unwrap();
    let drawn = |options: &[&str]| {
        let mut command = sdgen(dir.path());
        command.args([
            "a frog", "-s", "1", "--steps", "2", "-W", "16", "-H", "16", "--trace", "--json",
            "--force", "-o", "a.png", "-m",
        ]);
        command
            .arg(fixture("sdxl"))
            .arg("--refine-at=0.5")
            .arg("--refiner")
            .arg(fixture("sdxl_refiner"))
            .args(options);
        let record: Value = serde_json::from_str(&stdout(&succeed(&mut command))).unwrap();
        record["trace"].as_object().unwrap().clone()
    };
    let trace = drawn(&[]);
    let mut stages: Vec<String> = trace.keys().cloned().collect();
    let read = |whose: &str| {
        [
            "tokens",
            "text embedding",
            "negative tokens",
            "negative embedding",
        ]
        .map(|name| format!("{whose}{name}"))
    };
    let step = |n: usize| ["U-Net", "sampler"].map(|stage| format!("step {n} of 2, {stage}"));
    assert_eq!(
        stages,
        [
            &read("")[..],
            &["noise".into()],
            &step(1),
            &read("refiner's "),
            &step(2),
            &["pixels".into()]
        ]
        .concat()
    );
    // both read the same ids with the second tokenizer, and make something else of them
    assert!(trace["text embedding"] != trace["refiner's text embedding"]);
    // as much is expected of a picture whose file has to hold it
    let mut expected: Vec<String> = serde_json::to_value(Trace::blank(2, true, 2))
        .unwrap()
        .as_object()
        .unwrap()
        .keys()
        .cloned()
        .collect();
    expected.sort();
    stages.sort();
    assert_eq!(stages, expected);
    assert_eq!(drawn(&["-g", "1"]).len(), trace.len() - 4);
}

#[test]
fn a_trace_is_the_same_in_any_batch() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("sd1");
    let run = |batch: &str| {
        let size = [
            "-W",
            "16",
            "-H",
            "24",
            "--steps",
            "3",
            "--sampler",
            "euler-a",
        ];
        let command = [
            "a frog",
            "-s",
            "0..3",
            "-q",
            "--trace",
            "-m",
            model.to_str().unwrap(),
            "-b",
            batch,
            "-o",
            &format!("{batch}/"),
        ];
        succeed(sdgen(dir.path()).args(command).args(size));
        [0, 1, 2].map(|seed| {
            said_of_drawing(dir.path(), &format!("{batch}/a-frog-{seed}.png"))["trace"].clone()
        })
    };
    let (alone, together) = (run("1"), run("3"));
    assert_eq!(alone, together);
    assert!(alone[0]["noise"] != alone[1]["noise"] && alone[0]["tokens"] == alone[1]["tokens"]);
}

#[test]
fn the_first_stage_that_is_not_as_traced_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let other = || Value::from("0123456789abcdef");
    // and whether the pixels differ
    let cases = [
        ("tokens", true, "/prompt", "a cat".into()),
        ("text embedding", true, "/clip_skip", 2.into()),
        ("negative tokens", true, "/negative", "blue".into()),
        ("noise", true, "/seed", 2.into()),
        ("step 1 of 3, U-Net", true, "/guidance", 2.0.into()),
        ("step 1 of 3, sampler", true, "/sampler", "ddpm".into()),
        ("step 2 of 3, U-Net", true, "/deep_cache", 2.into()),
        (
            "step 2 of 3, U-Net",
            false,
            "/trace/step 2 of 3, U-Net",
            other(),
        ),
        (
            "step 3 of 3, sampler",
            false,
            "/trace/step 3 of 3, sampler",
            other(),
        ),
        ("pixels", false, "/trace/pixels", other()),
    ];
    for (stage, differs, at, value) in cases {
        draw(
            dir.path(),
            "a.png",
            &["--trace", "--force", "--steps", "3", "--sampler", "ddim"],
        );
        tamper(dir.path(), "a.png", |sdgen| {
            *sdgen.pointer_mut(at).unwrap() = value.clone()
        });
        let (code, said, errors) = check(dir.path(), &["a.png", "--json"]);
        let record: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(
            (code, &record["same"], &record["first_difference"]),
            (i32::from(differs), &(!differs).into(), &stage.into()),
            "{errors}"
        );
        assert!(
            errors.starts_with(&format!("`a.png`: first differs at {stage}\n"))
                && !errors.contains("--trace"),
            "{errors}"
        );
    }
}

#[test]
fn a_file_that_was_changed_after_drawing_is_told_from_a_drawing_that_changed() {
    let dir = tempfile::tempdir().unwrap();
    for (name, options) in [("traced.png", &["--trace"][..]), ("plain.png", &[])] {
        draw(dir.path(), name, options);
        edit(dir.path(), name, |picture| picture.rgb[0] ^= 4);
    }
    let (code, _, errors) = check(dir.path(), &["traced.png"]);
    assert!(
        code == 1
            && errors.contains("`traced.png`: no stage differs")
            && !errors.contains("--trace"),
        "{errors}"
    );
    let (_, said, _) = check(dir.path(), &["traced.png", "--json"]);
    assert!(
        said.contains(r#""traced":true,"first_difference":null"#),
        "{said}"
    );
    let (code, said, errors) = check(dir.path(), &["plain.png", "--json"]);
    assert!(
        code == 1
            && errors.contains("hint: ")
            && errors.contains("--trace")
            && said.contains(r#""traced":false,"first_difference":null"#),
        "{said}{errors}"
    );
    let (code, _, errors) = check(dir.path(), &["plain.png", "--min-psnr", "60"]);
    assert!(code == 0 && errors.is_empty(), "{errors}");
}

#[test]
fn resume_takes_pictures_with_and_without_a_trace_for_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let run = |options: &[&str]| {
        let output = succeed(
            sdgen(dir.path())
                .args([
                    "a frog", "--steps", "2", "-s", "1", "-q", "--json", "--resume",
                ])
                .args(options),
        );
        serde_json::from_str::<Value>(&stdout(&output)).unwrap()
    };
    let drawn = run(&["--trace", "-o", "traced.png"]);
    run(&["-o", "plain.png"]);
    let skipped = run(&["--trace", "-o", "traced.png"]);
    assert_eq!(
        (&skipped["skipped"], &skipped["trace"]),
        (&true.into(), &drawn["trace"])
    );
    let skipped = run(&["-o", "traced.png"]);
    assert_eq!(
        (&skipped["skipped"], &skipped["trace"]),
        (&true.into(), &Value::Null)
    );
    assert_eq!(run(&["--trace", "-o", "plain.png"])["skipped"], true);
}

#[test]
fn a_trace_that_nothing_keeps_or_that_does_not_fit_is_an_error_before_drawing() {
    let dir = tempfile::tempdir().unwrap();
    let command = |options: &[&str]| {
        let mut command = sdgen(dir.path());
        command.args(["a frog", "-s", "1", "--trace"]).args(options);
        command
    };
    fail(&mut command(&["--no-metadata"]), 2, &["--trace", "--json"]);
    fail(
        &mut command(&["--steps", "1000", "-o", "a.jpg"]),
        2,
        &["too long to be stored in a JPEG"],
    );
    let output = succeed(&mut command(&[
        "--no-metadata",
        "--json",
        "--steps",
        "1",
        "-q",
    ]));
    assert!(stdout(&output).contains(r#""trace":{"tokens":""#));
}

#[test]
fn pictures_of_the_program_before_the_redesign_are_still_drawn_again() {
    let dir = tempfile::tempdir().unwrap();
    let picture = |name: &str| fixture("before").join(name);
    // sums in another order move single values by a level at most
    let check = |name: &str, options: &[&std::path::Path]| {
        let mut command = sdgen(dir.path());
        command
            .args(["check", "--json", "--min-psnr", "45"])
            .arg(picture(name));
        for (option, value) in ["--model", "--lora"].into_iter().zip(options) {
            command.arg(option).arg(value);
        }
        let output = succeed(&mut command);
        let line: Value = serde_json::from_str(&stdout(&output)).unwrap();
        assert_eq!(line["same"], true, "{name}");
    };
    check("mini.png", &[]);
    check("sd1.png", &[&fixture("sd1")]);
    check("sdxl.png", &[&fixture("sdxl")]);
    check(
        "lora.webp",
        &[&fixture("sd1"), &fixture("lora/kohya.safetensors")],
    );
}

#[test]
fn another_configuration_scheduler_or_tokenizer_is_another_model() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("m");
    with_base("sd1", &model);
    let draw = |options: &[&str]| {
        let mut command = sdgen(dir.path());
        command
            .args(["a frog", "-s", "7", "--steps", "2", "-W", "16", "-H", "16"])
            .args(["-m", "m", "-o", "a.png", "--json"])
            .args(options);
        command
    };
    let check = || {
        let mut command = sdgen(dir.path());
        command.args(["check", "a.png", "-m", "m"]);
        command
    };
    succeed(&mut draw(&["-q"]));
    succeed(&mut check());
    type Edit<'a> = &'a dyn Fn(&Path);
    let edits: [(&str, Edit); 3] = [
        ("scheduler/scheduler_config.json", &|path| {
            edit_json(path, |c| drop(c.insert("beta_end".into(), 0.013.into())));
        }),
        ("unet/config.json", &|path| {
            edit_json(path, |c| drop(c.insert("norm_eps".into(), 1e-3.into())));
        }),
        ("tokenizer/vocab.json", &|path| {
            edit_json(path, |c| {
                let ids: Vec<(String, Value)> = c.clone().into_iter().collect();
                let [(a, first), (b, second), ..] = &ids[..] else {
                    panic!("a small vocabulary")
                };
                c.insert(a.clone(), second.clone());
                c.insert(b.clone(), first.clone());
            });
        }),
    ];
    for (file, edit) in edits {
        let path = model.join(file);
        let before = std::fs::read(&path).unwrap();
        edit(&path);
        let output = check().output().unwrap();
        assert_eq!(output.status.code(), Some(6), "{file}");
        let said = "another configuration, scheduler or tokenizer";
        assert!(stderr(&output).contains(said), "{file}");
        let output = draw(&["--verify"]).output().unwrap();
        assert_eq!(output.status.code(), Some(6), "{file}");
        assert!(stderr(&output).contains("have other settings"), "{file}");
        // who wrote it, and the order of its keys, are no difference
        std::fs::write(&path, before).unwrap();
        if file.ends_with("config.json") {
            edit_json(&path, |c| {
                drop(c.insert("_diffusers_version".into(), "9.9.9".into()))
            });
        }
        succeed(&mut check());
        succeed(&mut draw(&["--verify"]));
    }
}
