//! What is named as a file and is none, the files of something else, and results that would meet.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
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

#[test]
fn what_stands_behind_a_colon_is_a_value_or_the_argument_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = dir.path().join("l.safetensors");
    std::fs::copy(fixture("lora/kohya.safetensors"), &adapter).unwrap();
    for (args, says) in [
        (["--lora", "l.safetensors:abc"], "`abc` behind the colon"),
        (["--lora", "l.safetensors:nan"], "`nan` behind the colon"),
        (
            ["--lora", "absent.safetensors:inf"],
            "`inf` behind the colon",
        ),
        (["--merge", "mini:nan"], "`nan` behind the colon"),
        (["--merge", "mini"], "it has no share"),
        (["--upscale", "lanczos:0"], "`0` behind the colon"),
        (["--upscale", "lanczos:x"], "`x` behind the colon"),
        (["--save-steps", "st:0"], "`0` behind the colon"),
        (["--save-steps", "st:1.5"], "`1.5` behind the colon"),
    ] {
        let mut command = tiny(dir.path());
        fail(
            command.args(["x", "-s", "1"]).args(args),
            2,
            &[says, "hint: "],
        );
    }
    // a name's own colon
    let steps = ["x", "-s", "1", "--save-steps", "at:noon"];
    succeed(tiny(dir.path()).args(steps));
    assert!(dir.path().join("at:noon").is_dir());
}

#[test]
fn a_wrong_command_line_is_told_as_every_error_is() {
    let dir = tempfile::tempdir().unwrap();
    for (args, cause, hint) in [
        (["x", "-w", "512"].as_slice(), "'-w'", "`--width N`"),
        (&["x", "--size", "512x512"], "'--size'", "`--height N`"),
        (&["x", "--num_inference_steps", "4"], "", "`--steps N`"),
        (&["x", "--stepps", "4"], "'--stepps'", "'--steps'"),
        (&["x", "--outdir", "o"], "'--outdir'", "`--output FOLDER/`"),
        (&["x", "--xyzzy"], "'--xyzzy'", "`sdgen --help` tells"),
        (&["upscale"], "<PICTURES>", "`sdgen upscale --help` tells"),
        (&["models", "x"], "'x'", "`sdgen models --help` tells"),
        (&["x", "-g", "1e308"], "from 0 to 10000", "`sdgen --help`"),
        (
            &["x", "--extend", "left=1,left=2"],
            "stands there twice",
            "",
        ),
        (&["x", "--shard", "x"], "--shard <I/N|auto>", ""),
    ] {
        let said = fail(sdgen(dir.path()).args(args), 2, &[cause, hint]);
        let lines: Vec<&str> = said.trim_end().lines().collect();
        assert_eq!(lines.len(), 3, "{args:?}: {said}");
        assert!(lines[0].starts_with("error: "), "{args:?}: {said}");
        assert!(
            lines[1].is_empty() && lines[2].starts_with("hint: "),
            "{args:?}: {said}"
        );
    }
}

#[test]
fn a_models_name_in_another_spelling_is_known() {
    let dir = tempfile::tempdir().unwrap();
    for (typed, meant) in [
        ("SDXL", "sdxl"),
        ("sd1.5", "sd15"),
        ("SD-2.1", "sd21"),
        ("sd-turbo", "turbo"),
        ("stable-diffusion-v1-5", "sd15"),
        ("sdxl_turbo", "sdxl-turbo"),
        ("minni", "mini"),
    ] {
        let says = format!("did you mean `{meant}`?");
        fail(sdgen(dir.path()).args(["x", "-m", typed]), 3, &[&says]);
    }
}

#[test]
fn places_that_cannot_be_are_told_by_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "x").unwrap();
    std::fs::write(dir.path().join("there.png"), "x").unwrap();
    for (args, says) in [
        (["-o", "~/x.png"].as_slice(), ["without quotes", "$HOME/"]),
        (&["-o", "~/a/{seed}.png"], ["without quotes", "$HOME/a"]),
        (&["-o", "file/x.png"], ["`file` is a file", "hint: "]),
        (&["-o", "file/"], ["`file` is a file", "hint: "]),
        (
            &["-o", "none/x.png"],
            ["no folder `none`", "mkdir -p 'none'"],
        ),
        (&["--grid", "-"], ["`--grid -` has no file", "hint: "]),
        (
            &["--manifest", "-"],
            ["`--manifest -` has no file", "`--json`"],
        ),
        (
            &["--grid", "there.png"],
            ["exists already", "another name keeps it"],
        ),
    ] {
        fail(tiny(dir.path()).args(["x", "-s", "1"]).args(args), 2, &says);
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(left.len(), 2, "{left:?}");
    // what a list names lies below the folder of `-o`, which is made as for templates
    let lines = "{\"prompt\": \"a\", \"output\": \"b/x.png\"}\n";
    std::fs::write(dir.path().join("l.jsonl"), lines).unwrap();
    succeed(tiny(dir.path()).args(["--from", "l.jsonl", "-s", "1", "-o", "o/"]));
    assert!(dir.path().join("o/b/x.png").is_file());
}

#[test]
fn tables_are_no_lists() {
    let dir = tempfile::tempdir().unwrap();
    for (name, text, says) in [
        ("a.csv", "a cat\na dog\n", "is a table or a document"),
        ("a.yaml", "- prompt: a cat\n", "is a table or a document"),
        ("a.txt", "prompt,seed\na cat,7\n", "is the head of a table"),
        ("b.txt", "seed\tnegative_prompt\n", "is the head of a table"),
    ] {
        std::fs::write(dir.path().join(name), text).unwrap();
        fail(
            tiny(dir.path()).args(["--from", name]),
            2,
            &[says, ".jsonl"],
        );
    }
    std::fs::write(dir.path().join("c.txt"), "seed, width of a hair\n").unwrap();
    succeed(tiny(dir.path()).args(["--from", "c.txt", "-s", "1", "--dry-run"]));
}

#[test]
fn files_in_the_place_of_others_are_told_by_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let vae = fixture("sd1/vae/diffusion_pytorch_model.safetensors");
    let unet = fixture("sd1/unet/diffusion_pytorch_model.safetensors");
    let lora = fixture("lora/kohya.safetensors");
    let word = fixture("embeddings/a1111.safetensors");
    for (option, file, says) in [
        (
            "--vae",
            &lora,
            ["is a LoRA, not a VAE", "`--lora` takes it"],
        ),
        (
            "--vae",
            &word,
            ["is an embedding, not a VAE", "`--embedding`"],
        ),
        ("--vae", &unet, ["is only a U-Net, not a VAE", "`--model`"]),
        (
            "--lora",
            &word,
            ["is an embedding, not a LoRA", "`--embedding`"],
        ),
        (
            "--lora",
            &vae,
            ["is only a VAE, not a LoRA", "`--vae` takes it"],
        ),
        (
            "--embedding",
            &lora,
            ["is a LoRA, not an embedding", "`--lora`"],
        ),
        (
            "--embedding",
            &vae,
            ["is only a VAE, not", "`--vae` takes it"],
        ),
        (
            "--upscale",
            &lora,
            ["is a LoRA, not an upscaler", "`--lora`"],
        ),
        (
            "--upscale",
            &word,
            ["is an embedding, not an", "`--embedding`"],
        ),
        (
            "--model",
            &word,
            ["is an embedding, not a whole", "`--embedding`"],
        ),
        (
            "--model",
            &vae,
            ["is only a VAE, not a whole", "`--vae` takes it"],
        ),
    ] {
        let mut command = sdgen(dir.path());
        if option != "--model" {
            command = tiny(dir.path());
        }
        fail(command.args(["x", option]).arg(file), 3, &says);
    }
    std::fs::write(dir.path().join("p.png"), "").unwrap();
    let mut command = sdgen(dir.path());
    let folder = ["upscale", "p.png", "-m", "."];
    fail(command.args(folder), 3, &["is a folder, not a file"]);
}

#[test]
fn configurations_of_the_wrong_kind_are_refused_in_words_of_json() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("m");
    copy_folder(&fixture("sd1"), &model);
    let draw = |says: &[&str]| {
        let mut command = sdgen(dir.path());
        let said = fail(command.args(["x", "-m", "m"]), 3, says);
        for word in ["usize", "invalid type", "a sequence", "untagged"] {
            assert!(!said.contains(word), "{said}");
        }
    };
    let unet = model.join("unet/config.json");
    let right = std::fs::read(&unet).unwrap();
    for (key, value, says) in [
        (
            "_class_name",
            json!("UNet3DConditionModel"),
            "does not support",
        ),
        (
            "use_linear_projection",
            json!("yes"),
            "expected true or false",
        ),
        ("upcast_attention", json!(1), "expected true or false"),
        ("in_channels", json!(-4), "expected a whole number from 0"),
        ("in_channels", json!("4"), "expected a whole number from 0"),
        ("norm_eps", json!([1]), "expected a number"),
        ("block_out_channels", json!(32), "expected a list"),
        ("center_input_sample", json!("no"), "expected true or false"),
    ] {
        edit_json(&unet, |config| {
            config.insert(key.into(), value);
        });
        draw(&[key, says]);
        std::fs::write(&unet, &right).unwrap();
    }
    let vae = model.join("vae/config.json");
    edit_json(&vae, |config| {
        config.insert("force_upcast".into(), json!("maybe"));
    });
    draw(&["force_upcast", "expected true or false"]);
    edit_json(&vae, |config| {
        config.remove("force_upcast");
    });
    let index = model.join("model_index.json");
    let whole = std::fs::read_to_string(&index).unwrap();
    for text in ["[]", "{}", "7"] {
        std::fs::write(&index, text).unwrap();
        draw(&["model_index.json", "lists no `unet`", "hint: "]);
    }
    // what editors of Windows put before a text
    std::fs::write(&index, format!("\u{feff}{whole}")).unwrap();
    succeed(sdgen(dir.path()).args(["x", "-m", "m", "-s", "1", "--steps", "1"]));
}

#[test]
fn an_alpha_of_several_numbers_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors =
        candle_core::safetensors::load(fixture("lora/kohya.safetensors"), &Device::Cpu).unwrap();
    let alphas: Vec<String> = tensors
        .keys()
        .filter(|key| key.ends_with(".alpha"))
        .cloned()
        .collect();
    for alpha in alphas {
        let four = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
        tensors.insert(alpha, four);
    }
    candle_core::safetensors::save(&tensors, dir.path().join("l.safetensors")).unwrap();
    let mut command = tiny(dir.path());
    let says = ["alpha", "has 4 values, where one is expected"];
    fail(command.args(["x", "--lora", "l.safetensors"]), 3, &says);
}

#[test]
fn folders_in_a_checked_folder_are_not_passed_over_in_silence() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("o/steps")).unwrap();
    succeed(tiny(dir.path()).args(["x", "-s", "1", "-o", "o/x.png"]));
    let model = fixture("sd1");
    let check = |path: &str| {
        let mut command = sdgen(dir.path());
        command
            .args(["check", path, "-m"])
            .arg(&model)
            .output()
            .unwrap()
    };
    let output = check("o");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("are not looked into: `o/steps`"));
    let output = check(".");
    assert_eq!(output.status.code(), Some(6));
    assert!(
        stderr(&output).contains("such as `./o`"),
        "{}",
        stderr(&output)
    );
}
