//! What is named as a file and is none, the files of something else, and results that would meet.

use crate::common::*;
use serde_json::json;

#[cfg(unix)]
#[test]
fn no_picture_or_configuration_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.png");
    let made = std::process::Command::new("mkfifo").arg(&path).status();
    assert!(made.unwrap().success());
    succeed(tiny(dir.path()).args(["x", "-s", "1", "-o", "x.png"]));
    let what = ["is a named pipe, not a file", "hint: "];
    for args in [
        ["x", "-i", "p.png"].as_slice(),
        &["x", "-i", "x.png", "--mask", "p.png"],
        &["x", "--config", "p.png"],
        &["upscale", "-m", "lanczos", "p.png"],
    ] {
        let mut command = tiny(dir.path());
        if args[0] == "upscale" {
            command = sdgen(dir.path());
        }
        fail(command.args(args), 2, &what);
    }
    for args in [
        ["check", "p.png"].as_slice(),
        &["check", "x.png", "--expect", "p.png"],
        &["check", "/dev/zero"],
    ] {
        let output = sdgen(dir.path()).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(6), "{args:?}");
        assert!(stderr(&output).contains("not a file"), "{args:?}");
    }
    // a file in the place of the picture that is not there is no picture of sdgen's
    fail(
        tiny(dir.path()).args(["x", "-s", "1", "-o", "p.png", "--resume"]),
        2,
        &["p.png"],
    );
}

#[test]
fn a_list_that_is_none_is_refused_by_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 33\n";
    for (name, text, says) in [
        ("a.json", "[{\"prompt\": \"a cat\"}]", "is a JSON array"),
        (
            "b.json",
            "[\n  {\"prompt\": \"a cat\"}\n]",
            "is a JSON array",
        ),
        (
            "c.txt",
            "a cat\n{\"prompt\": \"a cat\"}\n",
            "is a JSON object",
        ),
        ("d.txt", "<!DOCTYPE html>\n<p>\n", "is a web page"),
        ("e.txt", pointer, "is a pointer of Git LFS"),
    ] {
        std::fs::write(dir.path().join(name), text).unwrap();
        let mut command = tiny(dir.path());
        fail(command.args(["--from", name]), 2, &[name, says, "hint: "]);
    }
    std::fs::create_dir(dir.path().join("wildcards")).unwrap();
    std::fs::write(dir.path().join("wildcards/x.txt"), pointer).unwrap();
    fail(
        tiny(dir.path()).args(["--dynamic", "a __x__"]),
        2,
        &["x.txt", "is a pointer of Git LFS"],
    );
    // brackets that begin a prompt are A1111's
    std::fs::write(dir.path().join("f.txt"), "[a cat] on a mat\n{a dog}\n").unwrap();
    succeed(tiny(dir.path()).args(["--from", "f.txt", "-s", "1", "--dry-run"]));
}

#[test]
fn two_results_are_never_written_to_one_path() {
    let dir = tempfile::tempdir().unwrap();
    for (args, options) in [
        (["-o", "x.png", "--grid", "./x.png"], ["--grid", "--output"]),
        (
            ["-o", "x.png", "--manifest", "x.png"],
            ["--manifest", "--output"],
        ),
        (
            ["-o", "x.png", "--save-steps", "x.png"],
            ["--save-steps", "--output"],
        ),
        (
            ["--grid", "g.png", "--manifest", "g.png"],
            ["--manifest", "--grid"],
        ),
    ] {
        let mut command = tiny(dir.path());
        command.args(["x", "-s", "1", "--force"]).args(args);
        fail(
            &mut command,
            2,
            &[options[0], options[1], "would both write"],
        );
    }
    std::fs::write(
        dir.path().join("l.jsonl"),
        "{\"prompt\": \"a\", \"output\": \"-\"}\n{\"prompt\": \"b\"}\n",
    )
    .unwrap();
    fail(
        tiny(dir.path()).args(["--from", "l.jsonl", "-o", "o/"]),
        2,
        &["goes to stdout, others into files"],
    );
    assert!(!dir.path().join("x.png").exists() && !dir.path().join("o").exists());
}

#[test]
fn models_of_other_pipelines_and_parts_that_do_not_belong_together_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("m");
    copy_folder(&fixture("sd1"), &model);
    for class in ["StableDiffusionUpscalePipeline", "FluxPipeline"] {
        edit_json(&model.join("model_index.json"), |index| {
            index.insert("_class_name".into(), class.into());
        });
        fail(
            sdgen(dir.path()).args(["x", "-m", "m"]),
            3,
            &[class, "hint: "],
        );
    }
    let swap = |of: &str, from: &str| {
        std::fs::remove_dir_all(&model).unwrap();
        copy_folder(&fixture(of), &model);
        std::fs::remove_dir_all(model.join("unet")).unwrap();
        copy_folder(&fixture(from).join("unet"), &model.join("unet"));
    };
    for (of, from, says) in [
        ("sd1", "sdxl", "its second text encoder is missing"),
        ("sdxl", "sd1", "takes nothing of its second text encoder"),
    ] {
        swap(of, from);
        fail(
            sdgen(dir.path()).args(["x", "-m", "m"]),
            3,
            &[says, "hint: "],
        );
        fail(sdgen(dir.path()).args(["inspect", "m"]), 3, &[says]);
    }
    let index = fixture("sd1/model_index.json");
    let says = ["is a configuration, not weights", "name the folder"];
    fail(sdgen(dir.path()).args(["x", "-m"]).arg(index), 3, &says);
    for text in ["Entry not found", "Invalid username or password."] {
        std::fs::write(dir.path().join("n.safetensors"), text).unwrap();
        let mut command = sdgen(dir.path());
        fail(
            command.args(["x", "-m", "n.safetensors"]),
            3,
            &[text, "hint: "],
        );
    }
}

#[test]
fn check_tells_pictures_of_others_and_contact_sheets_and_takes_no_nan() {
    let dir = tempfile::tempdir().unwrap();
    succeed(tiny(dir.path()).args(["x", "-s", "1", "-o", "x.png", "--grid", "g.png"]));
    let output = sdgen(dir.path()).args(["check", "g.png"]).output().unwrap();
    assert_eq!(output.status.code(), Some(6));
    assert!(stderr(&output).contains("is a contact sheet"));
    fail(
        sdgen(dir.path()).args(["check", "x.png", "--min-psnr", "nan"]),
        2,
        &["expected a number"],
    );
}

#[cfg(target_os = "linux")]
#[test]
fn completions_that_cannot_be_written_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let full = std::fs::File::options().write(true).open("/dev/full");
    let mut command = sdgen(dir.path());
    command.args(["completions", "bash"]).stdout(full.unwrap());
    fail(&mut command, 1, &["cannot write to stdout"]);
}

#[test]
fn a_lora_of_rank_0_fits_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q";
    let header = json!({
        format!("{layer}.lora_down.weight"): { "dtype": "F32", "shape": [0, 32], "data_offsets": [0, 0] },
        format!("{layer}.lora_up.weight"): { "dtype": "F32", "shape": [32, 0], "data_offsets": [0, 0] },
    });
    let header = header.to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    std::fs::write(dir.path().join("empty.safetensors"), file).unwrap();
    let mut command = tiny(dir.path());
    let said = fail(
        command.args(["x", "--lora", "empty.safetensors"]),
        3,
        &["empty", "hint: "],
    );
    assert!(!said.contains("reshape"), "{said}");
}
