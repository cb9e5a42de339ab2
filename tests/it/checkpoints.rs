//! Checkpoints as people have them: folders, single files, real headers, damaged ones.

use crate::common::*;
use candle_core::{Device, Tensor};
use sdgen::sampling::noise::Generator;
use sdgen::text::tokenizer::Tokenizer;
use sdgen::weights::TokenizerFiles;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::Path;

fn small(command: &mut std::process::Command, model: &Path, output: &str) {
    command
        .args([
            "a frog in a top hat",
            "-s",
            "7",
            "--steps",
            "3",
            "-W",
            "16",
            "-H",
            "16",
            "-o",
            output,
            "-m",
        ])
        .arg(model);
}

/// Whether `folder.png` and `file.png` have the same pixels and settings, but for what tells a file
/// from a folder.
fn is_same_picture(folder: &Path) -> bool {
    let read = |name: &str| {
        let bytes = std::fs::read(folder.join(name)).unwrap();
        let metadata = sdgen::image::read_metadata(&bytes).unwrap().unwrap();
        let mut settings = metadata.sdgen.as_object().unwrap().clone();
        settings.retain(|key, _| !["config_hash", "model_sha256"].contains(&key.as_str()));
        (image::load_from_memory(&bytes).unwrap().to_rgb8(), settings)
    };
    read("folder.png") == read("file.png")
}

#[test]
fn a_folder_and_its_single_file_give_the_same_picture() {
    for model in ["sd1", "sd2", "sdxl", "sdxl_refiner"] {
        let (dir, is_refiner) = (tempfile::tempdir().unwrap(), model == "sdxl_refiner");
        let (folder, file) = (dir.path().join("tiny"), dir.path().join("tiny.safetensors"));
        with_full_vocabulary(model, &folder);
        // what single files do not say and all known ones have
        edit_json(&folder.join("unet/config.json"), |c| {
            drop(c.insert("norm_num_groups".into(), 32.into()))
        });
        single_file(&format!("single_{model}.json"), &folder, &file);
        for (model, output) in [(&folder, "folder.png"), (&file, "file.png")] {
            let mut command = sdgen(dir.path());
            if is_refiner {
                small(&mut command, &fixture("sdxl"), output);
                command.args(["--refine-at", "0.5", "--refiner"]).arg(model);
            } else {
                small(&mut command, model, output);
            }
            succeed(&mut command);
        }
        assert!(
            is_same_picture(dir.path()),
            "{model}: folder and single file differ"
        );
        if model == "sdxl" {
            // many files of SDXL leave the VAE out
            let without = load(&file)
                .into_iter()
                .filter(|(key, _)| !key.starts_with("first_stage_model."))
                .collect();
            save(&without, &file);
            let mut command = sdgen(dir.path());
            small(&mut command, &file, "vae.png");
            succeed(
                command
                    .arg("--vae")
                    .arg(folder.join("vae/diffusion_pytorch_model.safetensors")),
            );
            assert!(
                image::open(dir.path().join("vae.png")).unwrap()
                    == image::open(dir.path().join("file.png")).unwrap()
            );
        }
    }
}

#[test]
fn a_u_net_whose_layers_differ_gives_the_same_picture_from_its_single_file() {
    for name in ["ssd", "vega", "bksdm"] {
        let dir = tempfile::tempdir().unwrap();
        let (folder, file, u_net) = (
            dir.path().join("m"),
            dir.path().join("m.safetensors"),
            dir.path().join("unet.safetensors"),
        );
        let recipe_file = format!("single_{name}.json");
        let recipe = json(&fixture(&recipe_file));
        let base = recipe["base"].as_str().unwrap();
        with_full_vocabulary(base, &folder);
        std::fs::write(folder.join("unet/config.json"), recipe["unet"].to_string()).unwrap();
        save(
            &random(&recipe),
            &folder.join("unet/diffusion_pytorch_model.safetensors"),
        );
        // the U-Net's names by its own recipe, all others by its base's
        single_file(&recipe_file, &folder, &u_net);
        let mut own = load(&u_net);
        assemble(
            &others(&json(&fixture(&format!("single_{base}.json")))),
            &folder,
            &file,
        );
        own.extend(load(&file));
        save(&own, &file);
        for (model, output) in [(&folder, "folder.png"), (&file, "file.png")] {
            let mut command = sdgen(dir.path());
            small(&mut command, model, output);
            succeed(&mut command);
        }
        assert!(
            is_same_picture(dir.path()),
            "{name}: folder and single file differ"
        );
    }
}

/// A recipe without its U-Net.
fn others(recipe: &Value) -> Value {
    let is_other = |entry: &&Value| !entry["from"][0].as_str().unwrap().starts_with("unet.");
    let entries: Vec<&Value> = recipe["entries"]
        .as_array()
        .unwrap()
        .iter()
        .filter(is_other)
        .collect();
    json!({ "entries": entries, "ignored": recipe["ignored"] })
}

/// Weights of a recipe's U-Net: matrices that keep the size of what they multiply, norms and biases
/// near their usual values.
fn random(recipe: &Value) -> HashMap<String, Tensor> {
    let mut generator = Generator::new(1);
    let mut tensor = |entry: &Value| {
        let name = entry["from"][0]
            .as_str()
            .unwrap()
            .strip_prefix("unet.")
            .unwrap()
            .to_string();
        let shape: Vec<usize> = entry["shape"]
            .as_array()
            .unwrap()
            .iter()
            .map(|d| d.as_u64().unwrap() as usize)
            .collect();
        let (scale, shift) = match shape.len() {
            1 if name.ends_with("weight") => (0.2, 1.0),
            1 => (0.1, 0.0),
            _ => (
                (shape[1..].iter().product::<usize>() as f64).sqrt().recip(),
                0.0,
            ),
        };
        let noise = generator.latents(1, shape.iter().product(), 1).unwrap();
        (
            name,
            noise.affine(scale, shift).unwrap().reshape(shape).unwrap(),
        )
    };
    recipe["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(&mut tensor)
        .collect()
}

#[test]
fn real_headers_are_recognised_without_reading_weights() {
    // parameters as published: 860 M, 866 M, 2.57 B, 2.26 B, 1.3 B and 745 M
    for (recipe, family, prediction, size, parameters) in [
        (
            "real_sd1.json",
            "Stable Diffusion 1.x",
            "epsilon",
            512,
            859_520_964,
        ),
        (
            "real_sd2.json",
            "Stable Diffusion 2.x",
            "v",
            768,
            865_910_724,
        ),
        (
            "real_sdxl.json",
            "Stable Diffusion XL",
            "epsilon",
            1024,
            2_567_463_684_u64,
        ),
        (
            "real_sdxl_refiner.json",
            "Stable Diffusion XL refiner",
            "epsilon",
            1024,
            2_259_526_660,
        ),
        (
            "real_ssd1b.json",
            "Stable Diffusion XL",
            "epsilon",
            1024,
            1_331_334_404,
        ),
        (
            "real_vega.json",
            "Stable Diffusion XL",
            "epsilon",
            1024,
            745_225_604,
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("real.safetensors");
        sparse(&json(&fixture(recipe)), &path);
        let output = succeed(sdgen(dir.path()).args(["inspect", "real.safetensors", "--json"]));
        let said: Value = serde_json::from_str(&stdout(&output)).unwrap();
        assert_eq!(said["family"], family);
        assert!(
            said["prediction"].as_str().unwrap().starts_with(prediction),
            "{said}"
        );
        assert_eq!(said["width"], size);
        assert_eq!(said["parts"]["unet"]["parameters"], parameters);
        let output = succeed(sdgen(dir.path()).args(["inspect", "real.safetensors"]));
        assert!(stdout(&output).contains(family));
    }
}

#[test]
fn weights_in_half_precision_need_half_the_memory() {
    let dir = tempfile::tempdir().unwrap();
    sparse(
        &json(&fixture("real_sdxl.json")),
        &dir.path().join("real.safetensors"),
    );
    let output = succeed(sdgen(dir.path()).args([
        "x",
        "-m",
        "real.safetensors",
        "--dry-run",
        "-b",
        "1",
        "-s",
        "1",
        "-o",
        "x.png",
    ]));
    let said = stderr(&output);
    let gb: f64 = said
        .split("about ")
        .nth(1)
        .and_then(|rest| rest.split(" GB").next())
        .unwrap()
        .parse()
        .unwrap();
    // 5.1 GB of U-Net, and activations
    assert!((5.1..8.0).contains(&gb), "{said}");
}

#[test]
fn clips_tokenizer_gives_transformers_ids() {
    let goldens = json(&fixture("tokenizer.json"));
    let clip =
        |pad: &str| Tokenizer::new(&TokenizerFiles::Clip, &json!({ "pad_token": pad })).unwrap();
    let ids = |v: &Value| -> Vec<u32> {
        v.as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_u64().unwrap() as u32)
            .collect()
    };
    let (sd1, sd2) = (clip("<|endoftext|>"), clip("!"));
    let texts = goldens["texts"].as_array().unwrap();
    let padded = goldens["padded"].as_array().unwrap();
    assert_eq!((texts.len(), padded.len()), (335, 20));
    for case in texts {
        let text = case["text"].as_str().unwrap();
        assert_eq!(sd1.ids(text).unwrap(), ids(&case["ids"]), "{text:?}");
    }
    for case in padded {
        let text = case["text"].as_str().unwrap();
        assert_eq!(
            sd1.encode(text, 77).unwrap().ids,
            ids(&case["sd1"]),
            "{text:?}"
        );
        assert_eq!(
            sd2.encode(text, 77).unwrap().ids,
            ids(&case["sd2"]),
            "{text:?}"
        );
    }
}

#[test]
fn a_long_plain_prompt_is_cut_with_a_warning_that_quotes_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let prompt = format!("{}then zebras", "the house ".repeat(40));
    let plain = ["--prompt-syntax", "plain"];
    let output = succeed(
        sdgen(dir.path())
            .args(plain)
            .args([&prompt, "-s", "1", "--steps", "1", "-o", "x.png", "-m"])
            .arg(fixture("sd1")),
    );
    let said = stderr(&output);
    assert!(
        said.contains("longer than 77 tokens") && said.trim_end().ends_with("then zebras"),
        "{said}"
    );
}

#[test]
fn a_missing_model_says_what_to_pass() {
    let dir = tempfile::tempdir().unwrap();
    let run = |model: &str| {
        let mut command = sdgen(dir.path());
        command.args(["x", "-m", model]);
        command
    };
    fail(
        &mut run("nothing.safetensors"),
        3,
        &["`nothing.safetensors` does not exist", "hint:"],
    );
    fail(&mut run(""), 3, &["model path is empty"]);
    fail(&mut run("sd155"), 3, &["`sd155`", "did you mean `sd15`?"]);
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    fail(
        &mut run("empty"),
        3,
        &["`empty` has no model_index.json and no .safetensors or .gguf file"],
    );
    fail(&mut run("some/model"), 3, &["some/model", "offline"]);
}

#[test]
fn a_folder_with_a_missing_component_names_it() {
    for part in ["unet", "vae", "text_encoder", "tokenizer", "scheduler"] {
        let dir = tempfile::tempdir().unwrap();
        copy_folder(&fixture("sd1"), &dir.path().join("m"));
        std::fs::remove_dir_all(dir.path().join("m").join(part)).unwrap();
        fail(
            sdgen(dir.path()).args(["x", "-m", "m"]),
            3,
            &[&format!("no folder `{part}`")],
        );
    }
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&fixture("sd1"), &dir.path().join("m"));
    std::fs::rename(
        dir.path()
            .join("m/unet/diffusion_pytorch_model.safetensors"),
        dir.path().join("m/unet/diffusion_pytorch_model.bin"),
    )
    .unwrap();
    fail(
        sdgen(dir.path()).args(["x", "-m", "m"]),
        3,
        &["no safetensors weights", "pickle"],
    );
}

#[test]
fn damaged_files_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    let run = |model: &str| {
        let mut command = sdgen(dir.path());
        command.args(["x", "-m", model]);
        command
    };
    let header = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    write("empty.safetensors", b"");
    fail(
        &mut run("empty.safetensors"),
        3,
        &["empty.safetensors", "too few for a header"],
    );
    write("huge.safetensors", &u64::MAX.to_le_bytes());
    fail(&mut run("huge.safetensors"), 3, &["header claims"]);
    write(
        "short.safetensors",
        &[&1000u64.to_le_bytes(), &b"{}"[..]].concat(),
    );
    fail(
        &mut run("short.safetensors"),
        3,
        &["header claims 1000 bytes", "interrupted"],
    );
    write(
        "cut.safetensors",
        &header(r#"{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}"#),
    );
    fail(&mut run("cut.safetensors"), 3, &["cut short"]);
    write(
        "overlap.safetensors",
        &[
            header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#),
            vec![0; 12],
        ]
        .concat(),
    );
    fail(&mut run("overlap.safetensors"), 3, &["damaged", "offset"]);
    write(
        "large.safetensors",
        &header(
            r#"{"a":{"dtype":"F32","shape":[9223372036854775807,9223372036854775807],"data_offsets":[0,8]}}"#,
        ),
    );
    fail(&mut run("large.safetensors"), 3, &["large.safetensors"]);
    write("model.ckpt", b"PK\x03\x04rest");
    fail(&mut run("model.ckpt"), 3, &["pickle", "convert"]);
    write("renamed.safetensors", b"\x80\x02}q\x00rest of it");
    fail(&mut run("renamed.safetensors"), 3, &["pickle"]);
    let one = |name: &str, key: &str| {
        let tensors = [(
            key.to_string(),
            Tensor::zeros((2, 2), candle_core::DType::F32, &Device::Cpu).unwrap(),
        )]
        .into();
        save(&tensors, &dir.path().join(name));
    };
    one(
        "lora.safetensors",
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
    );
    fail(&mut run("lora.safetensors"), 3, &["is a LoRA"]);
    one("vae.safetensors", "decoder.conv_in.weight");
    fail(&mut run("vae.safetensors"), 3, &["is only a VAE"]);
    one(
        "part.safetensors",
        "model.diffusion_model.input_blocks.0.0.weight",
    );
    fail(
        &mut run("part.safetensors"),
        3,
        &["has no text_encoder and no vae", "it has: unet"],
    );
    one("other.safetensors", "something.else");
    fail(
        &mut run("other.safetensors"),
        3,
        &["not a Stable Diffusion checkpoint", "something.else"],
    );
}

#[test]
fn wrong_shapes_missing_tensors_and_unknown_settings_are_named() {
    let broken = |edit: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        copy_folder(&fixture("sd1"), &dir.path().join("m"));
        edit(&dir.path().join("m"));
        dir
    };
    let unet = |folder: &Path| folder.join("unet/config.json");
    let set = |folder: &Path, file: &str, key: &str, value: Value| {
        edit_json(&folder.join(file), |c| drop(c.insert(key.into(), value)))
    };
    type Case<'a> = (&'a dyn Fn(&Path), &'a [&'a str]);
    let cases: [Case; 7] = [
        (
            &|f| {
                edit_json(&unet(f), |c| {
                    drop(c.insert("cross_attention_dim".into(), 48.into()))
                })
            },
            &["attn2.to_k.weight", "its configuration says [32, 48]"],
        ),
        (
            &|f| set(f, "unet/config.json", "class_embed_type", json!("timestep")),
            &["`class_embed_type` of the U-Net is \"timestep\""],
        ),
        (
            &|f| set(f, "unet/config.json", "act_fn", json!("swash")),
            &["`act_fn` is `swash`"],
        ),
        (
            &|f| {
                set(
                    f,
                    "unet/config.json",
                    "mid_block_type",
                    json!("UNetMidBlock2DSimpleCrossAttn"),
                )
            },
            &["UNetMidBlock2DSimpleCrossAttn"],
        ),
        (
            &|f| set(f, "unet/config.json", "norm_num_groups", json!(7)),
            &["norm_num_groups 7"],
        ),
        (
            &|f| {
                set(
                    f,
                    "scheduler/scheduler_config.json",
                    "beta_schedule",
                    json!("wavy"),
                )
            },
            &["beta_schedule", "wavy"],
        ),
        (
            &|f| {
                set(
                    f,
                    "scheduler/scheduler_config.json",
                    "prediction_type",
                    json!("fortune"),
                )
            },
            &["prediction_type", "fortune"],
        ),
    ];
    for (edit, texts) in cases {
        let dir = broken(edit);
        let output = sdgen(dir.path())
            .args(["x", "--steps", "1", "-m", "m"])
            .output()
            .unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(3), "{said}");
        for text in texts {
            assert!(said.contains(text), "`{text}` is missing in: {said}");
        }
    }
    let dir = broken(&|f| {
        let path = f.join("vae/diffusion_pytorch_model.safetensors");
        let mut tensors = load(&path);
        tensors.remove("decoder.conv_in.weight").unwrap();
        save(&tensors, &path);
    });
    let output = sdgen(dir.path())
        .args(["x", "--steps", "1", "-m", "m"])
        .output()
        .unwrap();
    assert!(
        stderr(&output)
            .contains("no tensor `vae.decoder.conv_in.weight`; the nearest it has is `vae."),
        "{}",
        stderr(&output)
    );
}

#[test]
fn weights_that_are_not_numbers_write_no_picture() {
    for (part, key) in [("unet", "conv_in.bias"), ("vae", "decoder.conv_out.bias")] {
        let dir = tempfile::tempdir().unwrap();
        copy_folder(&fixture("sd1"), &dir.path().join("m"));
        let path = dir
            .path()
            .join("m")
            .join(part)
            .join("diffusion_pytorch_model.safetensors");
        let mut tensors = load(&path);
        let bias = tensors[key].clone();
        tensors.insert(key.into(), (bias.zeros_like().unwrap() / 0.0).unwrap());
        save(&tensors, &path);
        fail(
            sdgen(dir.path()).args(["x", "--steps", "2", "-q", "-m", "m", "-o", "x.png"]),
            5,
            &["not finite"],
        );
        assert!(!dir.path().join("x.png").exists());
    }
}

#[test]
fn a_scheduler_config_with_pythons_infinity_is_read() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&fixture("sd1"), &dir.path().join("m"));
    let path = dir.path().join("m/scheduler/scheduler_config.json");
    let text = std::fs::read_to_string(&path).unwrap().replacen(
        '{',
        "{ \"lambda_min_clipped\": -Infinity,",
        1,
    );
    std::fs::write(&path, text).unwrap();
    succeed(sdgen(dir.path()).args([
        "x",
        "--steps",
        "2",
        "-q",
        "-m",
        "m",
        "-o",
        "x.png",
        "--sampler",
        "dpmpp-2m",
    ]));
}

#[test]
fn a_picture_of_one_colour_is_saved_with_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&fixture("sd1"), &dir.path().join("model"));
    let path = dir
        .path()
        .join("model/vae/diffusion_pytorch_model.safetensors");
    let mut tensors = load(&path);
    for (name, tensor) in &mut tensors {
        if name.starts_with("decoder.conv_out") {
            *tensor = tensor.zeros_like().unwrap();
        }
    }
    save(&tensors, &path);
    let output = succeed(sdgen(dir.path()).args([
        "a frog", "--steps", "1", "-s", "1", "-W", "16", "-H", "16", "-m", "model", "-o", "a.png",
    ]));
    assert!(
        stderr(&output).contains("warning: `a frog`, seed 1 has one colour everywhere"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_picture_tells_the_sha256_of_its_models_file_as_a1111_does() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, file) = (dir.path().join("tiny"), dir.path().join("tiny.safetensors"));
    with_full_vocabulary("sd1", &folder);
    edit_json(&folder.join("unet/config.json"), |c| {
        drop(c.insert("norm_num_groups".into(), 32.into()))
    });
    single_file("single_sd1.json", &folder, &file);
    let told = |model: &Path| {
        let mut command = sdgen(dir.path());
        small(&mut command, model, "x.png");
        succeed(command.arg("--force"));
        let bytes = std::fs::read(dir.path().join("x.png")).unwrap();
        sdgen::image::read_metadata(&bytes).unwrap().unwrap()
    };
    let sha256 = sdgen::hex::hex(&Sha256::digest(std::fs::read(&file).unwrap()));
    let of_file = told(&file);
    assert_eq!(of_file.sdgen["model_sha256"], sha256);
    let name = format!("Model hash: {}, Model: tiny", &sha256[..10]);
    assert!(of_file.parameters.contains(&name), "{}", of_file.parameters);
    // a folder has no such file
    assert!(!told(&folder).parameters.contains("Model hash"));
}
