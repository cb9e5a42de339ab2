//! Weights and configurations under all their names: what is read alike, what is refused by name,
//! and what does not belong together.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use sdgen::sampling::{Sampler, SamplingPlan, SchedulerConfig, plan};
use sdgen::weights::lora::{LayerNames, Lora};
use sdgen::weights::{Checkpoint, Origin};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

type Tensors = HashMap<String, Tensor>;

fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(Origin::Path(path)).unwrap_or_else(|error| panic!("{error:#}"))
}

/// A tiny fixture's single file, and the folder with what single files do not say and all have.
fn single(model: &str, dir: &Path) -> (PathBuf, PathBuf) {
    let (folder, file) = (dir.join(model), dir.join(format!("{model}.safetensors")));
    copy_folder(&fixture(model), &folder);
    single_file(&format!("single_{model}.json"), &folder, &file);
    (folder, file)
}

fn scheduler(checkpoint: &Checkpoint) -> SchedulerConfig {
    let config = checkpoint.config("scheduler").unwrap();
    SchedulerConfig::from_json(config).unwrap().for_pipeline()
}

/// The plan of each sampler, by its name; for those that cannot, why not.
fn plans(config: &SchedulerConfig) -> Vec<(Sampler, String)> {
    let shown = |plan: anyhow::Result<SamplingPlan>| match plan {
        Ok(plan) => format!("{plan:?}"),
        Err(error) => error.to_string(),
    };
    Sampler::ALL
        .into_iter()
        .map(|sampler| (sampler, shown(plan(config, sampler, None, 6, None))))
        .collect()
}

#[test]
fn a_single_file_takes_the_steps_of_its_folder_with_every_sampler() {
    for model in ["sd1", "sd2", "sdxl", "sdxl_refiner"] {
        let dir = tempfile::tempdir().unwrap();
        let (folder, file) = single(model, dir.path());
        let (folder, file) = (scheduler(&open(&folder)), scheduler(&open(&file)));
        let own = file.sampler().unwrap();
        assert_eq!(folder.sampler().unwrap(), own, "{model}");
        for (of_folder, of_file) in plans(&folder).into_iter().zip(plans(&file)) {
            assert_eq!(of_folder, of_file, "{model}");
        }
    }
}

#[test]
fn a_single_file_that_is_merged_takes_the_steps_of_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, file) = (dir.path().join("m"), dir.path().join("m.safetensors"));
    with_full_vocabulary("sd1", &folder);
    edit_json(&folder.join("unet/config.json"), |c| {
        drop(c.insert("norm_num_groups".into(), 32.into()))
    });
    single_file("single_sd1.json", &folder, &file);
    for (model, output) in [(&folder, "folder.png"), (&file, "file.png")] {
        let merge = format!("{}:0.5", model.display());
        let mut command = quick(dir.path(), model);
        command.args(["a frog", "-s", "1", "--sampler", "dpmpp-2m", "-o", output]);
        succeed(command.args(["--merge", &merge]));
    }
    assert!(pixels(&dir.path().join("folder.png")) == pixels(&dir.path().join("file.png")));
}

#[test]
fn latents_are_clipped_and_runge_kutta_begins_only_where_the_file_says_so() {
    let config = |edit: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let mut config = json!({
            "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "steps_offset": 1,
        });
        edit(config.as_object_mut().unwrap());
        SchedulerConfig::from_json(&config).unwrap().for_pipeline()
    };
    let absent = plans(&config(&|_| ()));
    let said = plans(&config(&|config| {
        config.insert("clip_sample".into(), false.into());
        config.insert("skip_prk_steps".into(), true.into());
    }));
    assert_eq!(absent, said);
    let runge_kutta = plans(&config(&|config| {
        drop(config.insert("skip_prk_steps".into(), false.into()))
    }));
    assert_ne!(absent, runge_kutta);
}

#[test]
fn a_scheduler_without_a_sampler_here_is_no_reason_to_refuse_another_sampler() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("m");
    copy_folder(&fixture("sd1"), &model);
    let set = |class: &str| {
        edit_json(&model.join("scheduler/scheduler_config.json"), |config| {
            drop(config.insert("_class_name".into(), class.into()))
        })
    };
    for class in [
        "SASolverScheduler",
        "IPNDMScheduler",
        "DPMSolverSinglestepScheduler",
    ] {
        set(class);
        fail(
            quick(dir.path(), &model).args(["a frog", "-s", "1", "-o", "no.png"]),
            3,
            &[class, "hint: choose one with `--sampler`"],
        );
        succeed(quick(dir.path(), &model).args([
            "a frog",
            "-s",
            "1",
            "--sampler",
            "euler",
            "--force",
            "-o",
            "a.png",
        ]));
        let said = stdout(&succeed(sdgen(dir.path()).args(["inspect", "m"])));
        assert!(said.contains("Stable Diffusion 1.x"), "{said}");
    }
    set("FlaxPNDMScheduler");
    succeed(quick(dir.path(), &model).args(["a frog", "-s", "1", "-o", "flax.png"]));
    for class in [
        "FlowMatchEulerDiscreteScheduler",
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
    ] {
        set(class);
        for sampler in [&[][..], &["--sampler", "euler"]] {
            fail(
                quick(dir.path(), &model)
                    .args(["a frog", "-o", "no.png"])
                    .args(sampler),
                3,
                &[class, "which sdgen does not draw"],
            );
        }
    }
}

#[test]
fn tensors_that_say_that_a_file_is_drawn_in_another_way_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (_, file) = single("sdxl", dir.path());
    let plain = load(&file);
    for (key, what) in [
        ("edm_mean", "Playground v2.5"),
        ("edm_std", "Playground v2.5"),
        ("edm_vpred.sigma_max", "CosXL"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("depth_model.model.pretrained.cls_token", "depth map"),
        ("model.diffusion_model.label_emb.weight", "x4"),
        ("noise_augmentor.data_mean", "unCLIP"),
        (
            "cond_stage_model.roberta.embeddings.word_embeddings.weight",
            "AltDiffusion",
        ),
        (
            "model.diffusion_model.position_net.null_positive_feature",
            "GLIGEN",
        ),
        (
            "model.diffusion_model.input_blocks.1.2.temporal.weight",
            "no layer",
        ),
        ("first_stage_model.decoder.time_stack.0.weight", "no layer"),
    ] {
        let mut tensors = plain.clone();
        tensors.insert(
            key.into(),
            Tensor::ones(4, DType::F32, &Device::Cpu).unwrap(),
        );
        save(&tensors, &dir.path().join("x.safetensors"));
        for command in [
            &["inspect", "x.safetensors"][..],
            &["a frog", "-m", "x.safetensors"],
        ] {
            fail(sdgen(dir.path()).args(command), 3, &[what, key]);
        }
    }
    // what training leaves, and copies, change nothing
    let mut tensors = plain;
    for key in [
        "model_ema.decay",
        "betas",
        "conditioner.embedders.1.model.logit_scale",
    ] {
        tensors.insert(
            key.into(),
            Tensor::ones(1, DType::F32, &Device::Cpu).unwrap(),
        );
    }
    save(&tensors, &dir.path().join("x.safetensors"));
    assert_eq!(
        open(&dir.path().join("x.safetensors")).hash().unwrap(),
        open(&file).hash().unwrap()
    );
}

#[test]
fn empty_markers_of_v_prediction_and_zero_snr_are_obeyed() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, file) = single("sdxl", dir.path());
    let mut tensors = load(&file);
    for marker in ["v_pred", "ztsnr"] {
        let empty = Tensor::zeros(0, DType::F32, &Device::Cpu).unwrap();
        tensors.insert(marker.into(), empty);
    }
    save(&tensors, &file);
    edit_json(&folder.join("scheduler/scheduler_config.json"), |config| {
        config.insert("prediction_type".into(), "v_prediction".into());
        config.insert("rescale_betas_zero_snr".into(), true.into());
        config.insert("timestep_spacing".into(), "trailing".into());
    });
    assert_eq!(
        plans(&scheduler(&open(&folder))),
        plans(&scheduler(&open(&file)))
    );
}

#[test]
fn sd2s_inpainting_file_predicts_noise_at_512() {
    let dir = tempfile::tempdir().unwrap();
    let mut shapes = json(&fixture("real_sd2.json"));
    shapes["model.diffusion_model.input_blocks.0.0.weight"][1] = 9.into();
    sparse(&shapes, &dir.path().join("x.safetensors"));
    let said = stdout(&succeed(sdgen(dir.path()).args([
        "inspect",
        "x.safetensors",
        "--json",
    ])));
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(
        (&said["prediction"], &said["width"]),
        (&"epsilon".into(), &512.into())
    );
}

#[test]
fn of_open_clips_24_layers_the_last_is_left_out_and_of_23_none() {
    let layers = |keep: &dyn Fn(&str) -> bool| {
        let dir = tempfile::tempdir().unwrap();
        let mut shapes = json(&fixture("real_sd2.json"));
        shapes.as_object_mut().unwrap().retain(|key, _| keep(key));
        sparse(&shapes, &dir.path().join("x.safetensors"));
        let model = open(&dir.path().join("x.safetensors"));
        model.config("text_encoder").unwrap()["num_hidden_layers"].clone()
    };
    assert_eq!(layers(&|_| true), 23);
    assert_eq!(layers(&|key| !key.contains(".resblocks.23.")), 23);
    assert_eq!(
        layers(&|key| !key.contains(".resblocks.22.") && !key.contains(".resblocks.23.")),
        22
    );
}

/// Renames the keys of a file; those that become nothing are left out.
fn renamed(tensors: &Tensors, rename: impl Fn(&str) -> Option<String>) -> Tensors {
    tensors
        .iter()
        .filter_map(|(key, tensor)| Some((rename(key)?, tensor.clone())))
        .collect()
}

/// Asserts that a file is read as the same model as another: weights and configurations.
fn assert_same_model(name: &str, tensors: &Tensors, expected: &Path) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(expected.file_name().unwrap());
    save(tensors, &path);
    let (own, expected) = (open(&path), open(expected));
    assert_eq!(own.hash().unwrap(), expected.hash().unwrap(), "{name}");
    for part in ["unet", "vae", "text_encoder", "text_encoder_2", "scheduler"] {
        assert_eq!(
            own.optional_config(part),
            expected.optional_config(part),
            "{name}"
        );
    }
}

#[test]
fn single_files_are_read_under_all_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, file) = single("sd1", dir.path());
    let plain = load(&file);
    let replaced = |pairs: &[(&str, &str)]| {
        renamed(&plain, |key| {
            Some(
                pairs
                    .iter()
                    .fold(key.to_string(), |key, (old, new)| key.replace(old, new)),
            )
        })
    };
    let prefixed = |prefix: &str| renamed(&plain, |key| Some(format!("{prefix}{key}")));
    let attention = [
        ("attn_1.q.", "attn_1.to_q."),
        ("attn_1.k.", "attn_1.to_k."),
        ("attn_1.v.", "attn_1.to_v."),
        ("attn_1.proj_out.", "attn_1.to_out.0."),
        ("attn_1.norm.", "attn_1.group_norm."),
    ];
    let bare = replaced(&[("transformer.text_model.", "transformer.")]);
    let clip_l = [(
        "cond_stage_model.transformer.",
        "cond_stage_model.clip_l.transformer.",
    )];
    let comfy = [(
        "cond_stage_model.transformer.",
        "text_encoders.clip_l.transformer.",
    )];
    let vae = load(&folder.join("vae/diffusion_pytorch_model.safetensors"));
    let mut with_diffusers_vae = renamed(&plain, |key| {
        (!key.starts_with("first_stage")).then(|| key.to_string())
    });
    with_diffusers_vae.extend(renamed(&vae, |key| {
        Some(format!("first_stage_model.{key}"))
    }));
    let both = bare.clone().into_iter().chain(plain.clone()).collect();
    for (name, tensors) in [
        ("attention of the VAE", replaced(&attention)),
        ("no text_model", bare),
        ("with and without text_model", both),
        ("clip_l", replaced(&clip_l)),
        ("ComfyUI's text encoder", replaced(&comfy)),
        ("state_dict", prefixed("state_dict.")),
        ("model", prefixed("model.")),
        ("diffusers' VAE", with_diffusers_vae),
    ] {
        assert_same_model(name, &tensors, &file);
    }
}

#[test]
fn the_text_encoders_of_sd2_and_sdxl_are_read_under_transformers_names_too() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, file) = single("sd2", dir.path());
    let rest = |tensors: &Tensors, part: &str| {
        renamed(tensors, |key| {
            (!key.starts_with(part)).then(|| key.to_string())
        })
    };
    let mut tensors = rest(&load(&file), "cond_stage_model.");
    let text = load(&folder.join("text_encoder/model.safetensors"));
    tensors.extend(renamed(&text, |key| {
        Some(format!("cond_stage_model.transformer.{key}"))
    }));
    assert_same_model("sd2", &tensors, &file);

    let (folder, file) = single("sdxl", dir.path());
    let plain = load(&file);
    let text = load(&folder.join("text_encoder_2/model.safetensors"));
    for prefix in [
        "conditioner.embedders.1.transformer.",
        "cond_stage_model.clip_g.transformer.",
    ] {
        let mut tensors = rest(&plain, "conditioner.embedders.1.");
        tensors.extend(renamed(&text, |key| Some(format!("{prefix}{key}"))));
        assert_same_model(prefix, &tensors, &file);
    }
    let mut tensors = plain.clone();
    let projection = "conditioner.embedders.1.model.text_projection";
    tensors.remove(projection).unwrap();
    tensors.insert(
        format!("{projection}.weight"),
        text["text_projection.weight"].clone(),
    );
    assert_same_model("projection as a layer", &tensors, &file);
}

#[test]
fn a_vae_is_read_under_all_its_names() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, file) = single("sd1", dir.path());
    let own = load(&folder.join("vae/diffusion_pytorch_model.safetensors"));
    let prefix = "first_stage_model.";
    let original = renamed(&load(&file), |key| {
        key.strip_prefix(prefix).map(String::from)
    });
    let hash = |tensors: &Tensors| {
        let path = dir.path().join("vae.safetensors");
        save(tensors, &path);
        let mut model = open(&folder);
        model
            .use_vae(&path)
            .unwrap_or_else(|error| panic!("{error:#}"));
        model.vae().unwrap().hash().unwrap()
    };
    let expected = hash(&own);
    let prefixed =
        |tensors: &Tensors, prefix: &str| renamed(tensors, |key| Some(format!("{prefix}{key}")));
    for (name, tensors) in [
        ("original", original.clone()),
        ("first_stage_model", prefixed(&original, prefix)),
        ("vae", prefixed(&own, "vae.")),
        ("state_dict", prefixed(&original, "state_dict.")),
        ("both", prefixed(&original, "state_dict.first_stage_model.")),
        ("model", prefixed(&own, "model.")),
    ] {
        assert_eq!(hash(&tensors), expected, "{name}");
    }
}

#[test]
fn a_lora_fits_under_the_names_of_comfy_ui_and_of_transformers_without_text_model() {
    for (model, second) in [("sd1", false), ("sdxl", true)] {
        let dir = tempfile::tempdir().unwrap();
        let (folder, _) = single(model, dir.path());
        let checkpoint = open(&folder);
        let count = |prefix: &str| checkpoint.count(&format!("unet.{prefix}"));
        let width = |name: &str| checkpoint.shape(name).unwrap().to_vec();
        // the first layer with attention: in the first block, or after it and its downsampler
        let (block, input) = match second {
            false => (0, 1),
            true => (1, 2 + count("down_blocks.0.resnets.")),
        };
        let unet = format!("down_blocks.{block}.attentions.0.transformer_blocks.0.attn2.to_v");
        let text = "encoder.layers.0.self_attn.q_proj";
        let original = format!("input_blocks.{input}.1.transformer_blocks.0.attn2.to_v");
        let mut layers = vec![
            (
                width(&format!("unet.{unet}.weight")),
                format!("diffusion_model.{original}"),
                format!("unet.{unet}"),
            ),
            (
                width(&format!("text_encoder.text_model.{text}.weight")),
                format!("text_encoders.clip_l.transformer.text_model.{text}"),
                format!("text_encoder.{text}"),
            ),
        ];
        if second {
            layers.push((
                width(&format!("text_encoder_2.text_model.{text}.weight")),
                format!("text_encoders.clip_g.transformer.text_model.{text}"),
                format!("text_encoder_2.{text}"),
            ));
        }
        for names in [0, 1] {
            let mut tensors = Tensors::new();
            for (shape, comfy, bare) in &layers {
                let (name, ends) = match names {
                    0 => (comfy, ["lora_up", "lora_down"]),
                    _ => (bare, ["lora_B", "lora_A"]),
                };
                let ones = |shape: (usize, usize)| Tensor::ones(shape, DType::F32, &Device::Cpu);
                let sizes = [(shape[0], 2), (2, shape[1])];
                for (end, size) in ends.iter().zip(sizes) {
                    tensors.insert(format!("{name}.{end}.weight"), ones(size).unwrap());
                }
            }
            let path = dir.path().join("lora.safetensors");
            save(&tensors, &path);
            let mut lora = Lora::open(&path, 1.0).unwrap();
            lora.match_keys(&checkpoint, &LayerNames::of(&checkpoint))
                .unwrap();
            assert_eq!(lora.describe_unexpected(), None, "{model}");
            for (_, _, bare) in &layers {
                let name = bare.replace(".encoder.layers", ".text_model.encoder.layers");
                assert!(lora.changes(&format!("{name}.weight")), "{model}: {name}");
            }
        }
    }
}

/// Writes tensors of any stored type.
fn write(tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)], path: &Path) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn fp8_is_read_as_the_numbers_that_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("m");
    copy_folder(&fixture("sd1"), &folder);
    let unet = folder.join("unet/diffusion_pytorch_model.safetensors");
    let plain = load(&unet);
    let draw = |output: &str| {
        succeed(quick(dir.path(), &folder).args(["a frog", "-s", "1", "-o", output]));
        pixels(&dir.path().join(output))
    };
    // e5m2 is the upper half of an f16; a scale of the whole tensor undoes the division
    let (mut narrow, mut scaled, mut wide) = (vec![], vec![], Tensors::new());
    for (name, tensor) in &plain {
        let halves: Vec<half::f16> = tensor
            .to_dtype(DType::F16)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        let bytes: Vec<u8> = halves
            .iter()
            .map(|half| (half.to_bits() >> 8) as u8)
            .collect();
        let values: Vec<f32> = bytes
            .iter()
            .map(|byte| half::f16::from_bits(u16::from(*byte) << 8).to_f32())
            .collect();
        let shape = tensor.dims().to_vec();
        wide.insert(
            name.clone(),
            Tensor::from_vec(values, shape.as_slice(), &Device::Cpu).unwrap(),
        );
        narrow.push((name.clone(), Dtype::F8_E5M2, shape.clone(), bytes.clone()));
        scaled.push((name.clone(), Dtype::F8_E5M2, shape, bytes));
        if let Some(layer) = name.strip_suffix(".weight") {
            let scale = 1f32.to_le_bytes().to_vec();
            scaled.push((format!("{layer}.scale_weight"), Dtype::F32, vec![], scale));
        }
    }
    save(&wide, &unet);
    let expected = draw("wide.png");
    write(&narrow, &unet);
    assert!(draw("narrow.png") == expected);
    write(&scaled, &unet);
    assert!(draw("scaled.png") == expected);
}

#[test]
fn int8_with_comfyuis_notes_is_read_as_the_numbers_that_it_holds_rotated_back_too() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("m");
    copy_folder(&fixture("sd1"), &folder);
    let unet = folder.join("unet/diffusion_pytorch_model.safetensors");
    let (name, layer) = (
        "mid_block.attentions.0.proj_in.weight",
        "mid_block.attentions.0.proj_in",
    );
    let plain = load(&unet);
    let (rows, columns) = (plain[name].dim(0).unwrap(), plain[name].dim(1).unwrap());
    let codes: Vec<i8> = (0..rows * columns)
        .map(|i| (i * 37 % 255) as u8 as i8)
        .collect();
    // H4 (x) H4, of numbers of 1/4
    let sign = |i: usize, j: usize| if i + j == 3 { -1f32 } else { 1.0 };
    let entry = |i: usize, j: usize| sign(i / 4, j / 4) * sign(i % 4, j % 4) / 4.0;
    let rotated = |scale: &dyn Fn(usize) -> f32| -> Vec<f32> {
        let number = |row: usize, column: usize| {
            let group = column / 16 * 16;
            (0..16)
                .map(|i| {
                    f32::from(codes[row * columns + group + i]) * scale(row) * entry(i, column % 16)
                })
                .sum::<f32>()
        };
        (0..rows)
            .flat_map(|row| (0..columns).map(move |column| (row, column)))
            .map(|(row, column)| number(row, column))
            .collect()
    };
    let read = |scales: &[f32], shape: Vec<usize>, note: Option<&str>| {
        let bytes = |x: &Tensor| -> Vec<u8> {
            let values: Vec<f32> = values(&x.to_dtype(DType::F32).unwrap());
            values.iter().flat_map(|x| x.to_le_bytes()).collect()
        };
        let mut all: Vec<_> = plain
            .iter()
            .filter(|(key, _)| *key != name)
            .map(|(key, x)| (key.clone(), Dtype::F32, x.dims().to_vec(), bytes(x)))
            .collect();
        let shape_of = plain[name].dims().to_vec();
        let raw = codes.iter().map(|code| *code as u8).collect();
        all.push((name.into(), Dtype::I8, shape_of, raw));
        let scales = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
        all.push((format!("{layer}.weight_scale"), Dtype::F32, shape, scales));
        if let Some(note) = note {
            let bytes = note.as_bytes().to_vec();
            all.push((
                format!("{layer}.comfy_quant"),
                Dtype::U8,
                vec![bytes.len()],
                bytes,
            ));
        }
        write(&all, &unet);
        let checkpoint = Checkpoint::open(Origin::Path(&folder))?;
        let weights = checkpoint.weights("unet", &Device::Cpu, DType::F32);
        let shape = [rows, columns];
        weights.at(layer).get("weight", &shape).map(|x| values(&x))
    };
    let near = |got: Vec<f32>, expected: Vec<f32>| {
        let most = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        let off = got.iter().zip(&expected).map(|(a, b)| (a - b).abs() / most);
        assert!(off.fold(0f32, f32::max) < 1e-6);
    };
    let plainly = |scale: &dyn Fn(usize) -> f32| -> Vec<f32> {
        let row = |i: usize| scale(i / columns);
        codes
            .iter()
            .enumerate()
            .map(|(i, code)| f32::from(*code) * row(i))
            .collect()
    };
    let of_row = |row: usize| 0.01 + row as f32 * 0.001;
    let of_rows: Vec<f32> = (0..rows).map(of_row).collect();
    let tensorwise = r#"{"format": "int8_tensorwise"}"#;
    let turned = r#"{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 16}"#;
    near(
        read(&[0.02], vec![], Some(tensorwise)).unwrap(),
        plainly(&|_| 0.02),
    );
    near(
        read(&of_rows, vec![rows, 1], Some(tensorwise)).unwrap(),
        plainly(&of_row),
    );
    near(read(&of_rows, vec![rows], None).unwrap(), plainly(&of_row));
    near(
        read(&of_rows, vec![rows, 1], Some(turned)).unwrap(),
        rotated(&of_row),
    );
    for (note, says) in [
        (r#"{"format": "nvfp4"}"#, "nvfp4, which sdgen does not read"),
        (&turned.replace("16", "12"), "groups of 12"),
        ("{", "the note `mid_block.attentions.0.proj_in.comfy_quant`"),
    ] {
        let error = read(&of_rows, vec![rows], Some(note)).unwrap_err();
        assert!(format!("{error:#}").contains(says), "{error:#}");
    }
}

#[test]
fn a_safetensors_file_whose_header_is_as_long_as_a_pickle_begins_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let key = "lora_unet_mid_block_attentions_0_proj_in";
    let header = json!({
        format!("{key}.lora_down.weight"): {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]},
        format!("{key}.lora_up.weight"): {"dtype": "F32", "shape": [1, 1], "data_offsets": [4, 8]},
    })
    .to_string();
    for length in [640, 1152, 66176] {
        let text = header.clone() + &" ".repeat(length - header.len());
        let bytes = [&(length as u64).to_le_bytes(), text.as_bytes(), &[0; 8]].concat();
        assert!(bytes.starts_with(&[0x80, 2]) || bytes.starts_with(&[0x80, 4]));
        std::fs::write(dir.path().join("x.safetensors"), bytes).unwrap();
        succeed(sdgen(dir.path()).args(["inspect", "x.safetensors"]));
    }
}

#[test]
fn configurations_and_weights_that_do_not_belong_together_are_errors_that_name_both() {
    let set = |file: &'static str, key: &'static str, value: Value| {
        move |folder: &Path| {
            edit_json(&folder.join(file), |c| {
                drop(c.insert(key.into(), value.clone()))
            })
        }
    };
    let (unet, vae, text) = (
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
    );
    let vocabulary = |edit: &'static dyn Fn(&mut serde_json::Map<String, Value>)| {
        move |folder: &Path| edit_json(&folder.join("tokenizer/vocab.json"), edit)
    };
    let merges = |lines: usize| {
        move |folder: &Path| {
            let path = folder.join("tokenizer/merges.txt");
            let text = std::fs::read_to_string(&path).unwrap();
            let kept: Vec<&str> = text.lines().take(lines).collect();
            std::fs::write(path, kept.join("\n")).unwrap();
        }
    };
    type Case<'a> = (Box<dyn Fn(&Path) + 'a>, &'a [&'a str]);
    let plain = json!(["DownBlock2D", "DownBlock2D"]);
    let cases: Vec<Case> = vec![
        (
            Box::new(set(text, "num_hidden_layers", json!(1))),
            &["`text_encoder`", "unused", "encoder.layers.1"],
        ),
        (
            Box::new(set(unet, "down_block_types", plain)),
            &["`unet`", "unused", "attentions"],
        ),
        (
            Box::new(set(unet, "mid_block_type", Value::Null)),
            &["`unet`", "unused", "mid_block"],
        ),
        (
            Box::new(set(unet, "transformer_layers_per_block", json!(0))),
            &["`unet`", "unused", "transformer_blocks"],
        ),
        (
            Box::new(set(vae, "layers_per_block", json!(0))),
            &["`vae`", "unused"],
        ),
        (Box::new(merges(1)), &["merges.txt has 0 merges"]),
        (Box::new(merges(200)), &["merges.txt has 199 merges"]),
        (
            Box::new(vocabulary(&|vocab| drop(vocab.remove("<|endoftext|>")))),
            &["lacks its token `<|endoftext|>`"],
        ),
        (
            Box::new(vocabulary(&|vocab| {
                drop(vocab.insert("<|more|>".into(), 914.into()))
            })),
            &["up to id 914", "`text_encoder` has 914 embeddings"],
        ),
        (
            Box::new(set(vae, "shift_factor", json!("0.1"))),
            &["`shift_factor` of the VAE is \"0.1\"", "expected a number"],
        ),
        (
            Box::new(set(vae, "scaling_factor", json!(0))),
            &["`scaling_factor`", "not 0"],
        ),
        (
            Box::new(set(unet, "layers_per_block", json!("two"))),
            &[
                "`layers_per_block` of the U-Net is \"two\"",
                "a list with one for each block",
            ],
        ),
        (
            Box::new(set(unet, "in_channels", json!(-4))),
            &[
                "`in_channels` of the U-Net is -4",
                "expected a whole number from 0",
            ],
        ),
        (
            Box::new(set(text, "hidden_act", json!(7))),
            &["`hidden_act` of the text encoder is 7", "expected a string"],
        ),
        (
            Box::new(set(
                "model_index.json",
                "force_zeros_for_empty_prompt",
                json!("yes"),
            )),
            &["`force_zeros_for_empty_prompt`", "\"yes\"", "true or false"],
        ),
        (
            Box::new(set(unet, "downsample_padding", json!(100))),
            &["`downsample_padding`", "100"],
        ),
        (
            Box::new(set(unet, "sample_size", json!(1_u64 << 60))),
            &["`sample_size` of the U-Net is 1152921504606846976"],
        ),
        (
            Box::new(set(vae, "block_out_channels", json!(vec![32; 70]))),
            &["`block_out_channels` of the VAE is 70"],
        ),
        (
            Box::new(set(
                "scheduler/scheduler_config.json",
                "steps_offset",
                json!(u64::MAX),
            )),
            &["`steps_offset` is 18446744073709551615"],
        ),
    ];
    for (edit, texts) in cases {
        let dir = tempfile::tempdir().unwrap();
        copy_folder(&fixture("sd1"), &dir.path().join("m"));
        edit(&dir.path().join("m"));
        let output = quick(dir.path(), Path::new("m"))
            .args(["a frog", "-s", "1", "-o", "x.png"])
            .output()
            .unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(3), "{texts:?}: {said}");
        for text in texts {
            assert!(said.contains(text), "`{text}` is missing in: {said}");
        }
        assert!(!dir.path().join("x.png").exists());
    }
}

#[test]
fn words_that_were_added_to_a_tokenizer_are_their_own_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("m");
    copy_folder(&fixture("sd1"), &folder);
    let weights = folder.join("text_encoder/model.safetensors");
    let mut text = load(&weights);
    let key = text
        .keys()
        .find(|k| k.ends_with("token_embedding.weight"))
        .unwrap()
        .clone();
    let rows = &text[&key];
    // the new word has the row of another one
    let vocabulary = json(&folder.join("tokenizer/vocab.json"));
    let word = "the";
    let id = vocabulary[format!("{word}</w>")].as_u64().unwrap() as usize;
    let other = rows.narrow(0, id, 1).unwrap();
    let rows = Tensor::cat(&[rows, &other], 0).unwrap();
    text.insert(key, rows);
    save(&text, &weights);
    edit_json(&folder.join("text_encoder/config.json"), |c| {
        drop(c.insert("vocab_size".into(), 915.into()))
    });
    let draw = |prompt: &str| {
        succeed(quick(dir.path(), &folder).args([
            prompt,
            "-s",
            "1",
            "--prompt-syntax",
            "plain",
            "--force",
            "-o",
            "x.png",
        ]));
        pixels(&dir.path().join("x.png"))
    };
    std::fs::write(
        folder.join("tokenizer/added_tokens.json"),
        r#"{"<toy>": 914}"#,
    )
    .unwrap();
    let expected = draw(&format!("a {word} in the house"));
    assert!(draw("a <toy> in the house") == expected);
    // the same in tokenizer_config.json
    std::fs::remove_file(folder.join("tokenizer/added_tokens.json")).unwrap();
    edit_json(&folder.join("tokenizer/tokenizer_config.json"), |config| {
        let token = json!({"content": "<toy>", "lstrip": false, "normalized": true, "rstrip": false, "single_word": false, "special": false});
        config.insert("added_tokens_decoder".into(), json!({"914": token}));
    });
    assert!(draw("a <toy> in the house") == expected);
    // an id that the vocabulary does not reach
    std::fs::write(
        folder.join("tokenizer/added_tokens.json"),
        r#"{"<you>": 9000}"#,
    )
    .unwrap();
    fail(
        quick(dir.path(), &folder).args(["x", "-s", "1", "--force", "-o", "x.png"]),
        3,
        &["`<you>` has the id 9000"],
    );
}

/// A file with this header and some zeros behind it.
fn with_header(header: &str, bytes: usize, path: &Path) {
    let start = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&start, header.as_bytes(), &vec![0; bytes]].concat()).unwrap();
}

#[test]
fn sizes_in_headers_are_bounded_before_they_are_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let entry = json!({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]});
    let at = Instant::now();
    let run = |texts: &[&str]| {
        fail(
            sdgen(dir.path()).args(["inspect", "x.safetensors"]),
            3,
            texts,
        );
        fail(
            tiny(dir.path()).args(["x", "--vae", "x.safetensors"]),
            3,
            &[],
        );
    };
    for key in [
        "model.diffusion_model.input_blocks.4294967295.0.op.weight",
        "model.diffusion_model.output_blocks.18446744073709551615.0.in_layers.0.weight",
        "first_stage_model.decoder.up.4294967295.block.0.conv1.weight",
        "first_stage_model.decoder.up.18446744073709551615.block.0.conv1.weight",
        "cond_stage_model.model.transformer.resblocks.4294967295.ln_1.weight",
    ] {
        with_header(&json!({ key: entry }).to_string(), 0, &path);
        run(&["x.safetensors"]);
    }
    let huge =
        json!({"dtype": "F32", "shape": [0, 1_u64 << 62, 1_u64 << 62], "data_offsets": [0, 0]});
    with_header(
        &json!({ "model.diffusion_model.x": huge }).to_string(),
        0,
        &path,
    );
    run(&["damaged", "model.diffusion_model.x"]);
    let many: Vec<String> = (0..300_000)
        .map(|i| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#))
        .collect();
    with_header(&format!("{{{}}}", many.join(",")), 0, &path);
    run(&["lists 300000 tensors"]);
    assert!(at.elapsed() < Duration::from_secs(60), "{:?}", at.elapsed());
}

#[test]
fn what_is_no_model_is_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    write(
        "lfs.safetensors",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3438167534\n",
    );
    write(
        "page.safetensors",
        b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>",
    );
    write(
        "error.safetensors",
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    );
    write(
        "json.safetensors",
        br#"{"error":"Unauthorized","message":"log in to download"}"#,
    );
    write("zeros.safetensors", &[0; 5000]);
    write("archive.safetensors", b"\x1f\x8b\x08\0 and so on");
    std::fs::create_dir(dir.path().join("folder.safetensors")).unwrap();
    let mut cases = vec![
        (
            "lfs.safetensors",
            "is a pointer of Git LFS: the file itself of 3438167534 bytes",
        ),
        ("page.safetensors", "is a web page"),
        ("error.safetensors", "is an XML text"),
        ("json.safetensors", "log in to download"),
        ("zeros.safetensors", "begins with zeros"),
        ("archive.safetensors", "is a compressed archive"),
        (
            "https://huggingface.co/owner/name/blob/main/x.safetensors",
            "is an address, not a file",
        ),
    ];
    #[cfg(unix)]
    {
        use std::os::unix::fs::symlink;
        symlink("loop.safetensors", dir.path().join("loop.safetensors")).unwrap();
        symlink("nothing", dir.path().join("dead.safetensors")).unwrap();
        symlink("/dev/zero", dir.path().join("device.safetensors")).unwrap();
        let pipe = dir.path().join("pipe.safetensors");
        let made = std::process::Command::new("mkfifo").arg(pipe).status();
        assert!(made.unwrap().success());
        cases.extend([
            ("loop.safetensors", "is a link that leads nowhere"),
            (
                "dead.safetensors",
                "is a link to a file that does not exist",
            ),
            ("device.safetensors", "is a device, not a file"),
            ("pipe.safetensors", "is a named pipe, not a file"),
        ]);
    }
    for (file, what) in cases {
        fail(
            sdgen(dir.path()).args(["x", "-m", file]),
            3,
            &[file, what, "hint: "],
        );
        for option in ["--lora", "--vae", "--embedding"] {
            fail(
                tiny(dir.path()).args(["x", option, file]),
                3,
                &[file, what, "hint: "],
            );
        }
    }
    for option in ["--lora", "--embedding"] {
        let file = "folder.safetensors";
        fail(
            tiny(dir.path()).args(["x", option, file]),
            3,
            &[file, "is a folder"],
        );
    }
}

#[cfg(unix)]
#[test]
fn a_config_that_is_no_file_is_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    for (file, target, what) in [
        ("unet/config.json", "/dev/zero", "is a device"),
        ("tokenizer/merges.txt", "/dev/zero", "is a device"),
        (
            "scheduler/scheduler_config.json",
            "scheduler_config.json",
            "leads nowhere",
        ),
    ] {
        let folder = dir.path().join(file.replace('/', "-"));
        copy_folder(&fixture("sd1"), &folder);
        std::fs::remove_file(folder.join(file)).unwrap();
        std::os::unix::fs::symlink(target, folder.join(file)).unwrap();
        fail(
            quick(dir.path(), &folder).args(["x", "-s", "1"]),
            3,
            &[what],
        );
    }
    let folder = dir.path().join("clone");
    copy_folder(&fixture("sd1"), &folder);
    std::fs::write(
        folder.join("unet/diffusion_pytorch_model.safetensors"),
        "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 10\n",
    )
    .unwrap();
    fail(
        quick(dir.path(), &folder).args(["x", "-s", "1"]),
        3,
        &["Git LFS", "git lfs pull"],
    );
}
