//! Models that were distilled: to few steps, with guidance as an input.

use crate::common::*;
use sdgen::weights::{Checkpoint, Origin};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

/// What the plain command would draw with.
fn plan(folder: &Path) -> (Value, Value, Value) {
    let output = succeed(sdgen(folder).args(["x", "-s", "1", "-m", "m", "--dry-run", "--json"]));
    let said: Value = serde_json::from_str(&stdout(&output)).unwrap();
    (
        said["sampler"].clone(),
        said["steps"].clone(),
        said["guidance"].clone(),
    )
}

#[test]
fn the_plain_command_takes_steps_and_guidance_from_the_distillation() {
    let cases = [
        (
            "turbo",
            json!({}),
            ("euler", 4, 1.0),
            "4 steps of euler, guidance off",
        ),
        (
            "turbo",
            json!({ "_class_name": "EulerAncestralDiscreteScheduler" }),
            ("euler-a", 4, 1.0),
            "to few steps, by its scheduler",
        ),
        (
            "turbo",
            json!({ "_class_name": "LCMScheduler" }),
            ("lcm", 4, 1.0),
            "latent consistency",
        ),
        (
            "turbo",
            json!({ "_class_name": "TCDScheduler" }),
            ("tcd", 4, 1.0),
            "trajectory consistency",
        ),
        (
            "lcm",
            json!({}),
            ("lcm", 4, 8.5),
            "4 steps of lcm, guidance 8.5",
        ),
        (
            "lcm",
            json!({ "_class_name": "DDIMScheduler" }),
            ("ddim", 4, 8.5),
            "latent consistency, guidance built in",
        ),
        // no distillation: other spacing, zero terminal SNR, another sampler
        (
            "turbo",
            json!({ "timestep_spacing": "leading" }),
            ("euler", 50, 7.5),
            "guidance 7.5",
        ),
        (
            "turbo",
            json!({ "prediction_type": "v_prediction", "rescale_betas_zero_snr": true }),
            ("euler", 50, 7.5),
            "guidance 7.5",
        ),
        (
            "turbo",
            json!({ "_class_name": "DDIMScheduler" }),
            ("ddim", 50, 7.5),
            "guidance 7.5",
        ),
        ("sd1", json!({}), ("pndm", 50, 7.5), "guidance 7.5"),
    ];
    for (name, scheduler, (sampler, steps, guidance), told) in cases {
        let dir = tempfile::tempdir().unwrap();
        with_base(name, &dir.path().join("m"));
        edit_json(&dir.path().join("m/scheduler/scheduler_config.json"), |c| {
            c.extend(scheduler.as_object().unwrap().clone())
        });
        assert_eq!(
            plan(dir.path()),
            (json!(sampler), json!(steps), json!(guidance)),
            "{name} with {scheduler}"
        );
        let said = stdout(&succeed(sdgen(dir.path()).args(["inspect", "m"])));
        assert!(said.contains(told), "{said}");
        assert_eq!(said.contains("  distilled "), steps < 50, "{said}");
    }
}

#[test]
fn a_network_that_takes_guidance_as_an_input_draws_by_it_and_has_no_negative_prompt() {
    let dir = tempfile::tempdir().unwrap();
    with_base("lcm", &dir.path().join("m"));
    let draw = |options: &[&str], output: &str| {
        let small = [
            "a frog",
            "-s",
            "7",
            "-W",
            "16",
            "-H",
            "16",
            "-m",
            "m",
            "--no-metadata",
            "-o",
            output,
        ];
        let said = stderr(&succeed(sdgen(dir.path()).args(small).args(options)));
        (std::fs::read(dir.path().join(output)).unwrap(), said)
    };
    let (plain, said) = draw(&[], "a.png");
    assert!(!said.contains("negative"), "{said}");
    assert!(
        plain != draw(&["-g", "3"], "b.png").0,
        "guidance changes nothing"
    );
    let (negative, said) = draw(&["-n", "a house"], "c.png");
    assert!(
        said.contains(
            "warning: the negative prompt has no effect without classifier-free guidance"
        ),
        "{said}"
    );
    assert!(plain == negative);
    let (rescaled, said) = draw(&["--guidance-rescale", "0.5"], "d.png");
    assert!(
        said.contains(
            "warning: `--guidance-rescale` has no effect without classifier-free guidance"
        ),
        "{said}"
    );
    assert!(plain == rescaled);
}

#[test]
fn a_model_says_by_its_name_on_the_hub_for_how_many_steps_it_was_distilled() {
    for (name, fixture, steps, guidance) in [
        ("IDKiro--sdxs-512-dreamshaper", "bksdm", 1, 1.0),
        ("someone--else", "bksdm", 50, 7.5),
        ("lightning--dreams", "bksdm", 50, 7.5),
        ("someone--lightningStorm_v1", "sd1", 50, 7.5),
        ("someone--turboMix_photoreal", "sd1", 50, 7.5),
        ("someone--animagicalcm_v2", "sd1", 50, 7.5),
        ("someone--hyperdriveV2_8steps", "sd1", 50, 7.5),
        ("stabilityai--sd-turbo", "turbo", 1, 1.0),
        ("Lykon--dreamshaper-xl-v2-turbo", "turbo", 4, 1.0),
        ("someone--XL-Lightning-8-Steps", "turbo", 8, 1.0),
        ("someone--Hyper_8step_CFG", "turbo", 8, 5.0),
        ("someone--Hyper-SDXL-2steps", "turbo", 2, 1.0),
        // it was trained that long
        ("someone--hyperreal-1500steps", "sd1", 50, 7.5),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let snapshot = dir.path().join(format!("models--{name}/snapshots/0123"));
        with_base(fixture, &snapshot);
        let output = succeed(
            sdgen(dir.path())
                .args(["x", "-s", "1", "--dry-run", "--json", "-m"])
                .arg(&snapshot),
        );
        let said: Value = serde_json::from_str(&stdout(&output)).unwrap();
        assert_eq!(
            (&said["steps"], &said["guidance"]),
            (&json!(steps), &json!(guidance)),
            "{name}"
        );
    }
}

#[test]
fn a_single_file_says_by_its_name_how_it_was_distilled() {
    // real files: the name, their layout, then sampler, steps, guidance, prediction, side,
    // scheduler's spacing
    for (name, layout, told) in [
        (
            "sdxl_lightning_4step",
            "sdxl",
            json!(["euler", 4, 1.0, "epsilon", 1024, "trailing"]),
        ),
        (
            "sdxl_lightning_2step",
            "sdxl",
            json!(["euler", 2, 1.0, "epsilon", 1024, "trailing"]),
        ),
        (
            "sdxl_lightning_1step_x0",
            "sdxl",
            json!(["euler", 1, 1.0, "sample", 1024, "trailing"]),
        ),
        (
            "juggernautXL_v9Rdphoto2Lightning",
            "sdxl",
            json!(["euler", 4, 1.0, "epsilon", 1024, "trailing"]),
        ),
        (
            "Hyper-SDXL-8steps",
            "sdxl",
            json!(["ddim", 8, 1.0, "epsilon", 1024, "trailing"]),
        ),
        (
            "Hyper-SDXL-12steps-CFG",
            "sdxl",
            json!(["ddim", 12, 5.0, "epsilon", 1024, "trailing"]),
        ),
        (
            "Hyper-SDXL-1step-Unet-Comfyui.fp16",
            "sdxl",
            json!(["lcm", 1, 1.0, "epsilon", 1024, "leading"]),
        ),
        (
            "sd_xl_turbo_1.0_fp16",
            "sdxl",
            json!(["euler", 1, 1.0, "epsilon", 512, "trailing"]),
        ),
        (
            "DreamShaperXL_Turbo_v2",
            "sdxl",
            json!(["euler", 4, 1.0, "epsilon", 1024, "trailing"]),
        ),
        (
            "sd_turbo",
            "sd2",
            json!(["euler", 1, 1.0, "epsilon", 512, "trailing"]),
        ),
        (
            "dreamshaper_8LCM",
            "sd1",
            json!(["lcm", 4, 1.0, "epsilon", 512, "trailing"]),
        ),
        (
            "lustify_DMD2",
            "sdxl",
            json!(["lcm", 4, 1.0, "epsilon", 1024, "trailing"]),
        ),
        (
            "tcd_2step",
            "sd1",
            json!(["tcd", 2, 1.0, "epsilon", 512, "trailing"]),
        ),
        (
            "hyperrealism",
            "sd1",
            json!(["pndm", 50, 7.5, "epsilon", 512, null]),
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(format!("{name}.safetensors"));
        sparse(&json(&fixture(&format!("real_{layout}.json"))), &path);
        let said: Value = serde_json::from_str(&stdout(&succeed(
            sdgen(dir.path()).args(["inspect", "--json"]).arg(&path),
        )))
        .unwrap();
        let spacing = Checkpoint::open(Origin::Path(&path))
            .unwrap()
            .config("scheduler")
            .unwrap()["timestep_spacing"]
            .clone();
        let keys =
            ["sampler", "steps", "guidance", "prediction", "width"].map(|key| said[key].clone());
        assert_eq!(json!([&keys[..], &[spacing]].concat()), told, "{name}");
        let assumed = said["assumed"].to_string();
        assert!(
            assumed.contains("Scheduler, ") && !assumed.contains("--prediction"),
            "{name}: {assumed}"
        );
        assert_eq!(
            said["distilled"].is_string(),
            name != "hyperrealism",
            "{name}"
        );
    }
}

#[test]
fn tcd_adds_the_noise_of_its_authors_example_and_no_other_sampler_takes_it() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = dir.path().join("m/scheduler/scheduler_config.json");
    with_base("turbo", &dir.path().join("m"));
    edit_json(&scheduler, |c| {
        drop(c.insert("_class_name".into(), "TCDScheduler".into()))
    });
    std::fs::create_dir(dir.path().join("models--a--Hyper-SD")).unwrap();
    copy_folder(
        &dir.path().join("m"),
        &dir.path().join("models--a--Hyper-SD/m"),
    );
    for (model, options, eta) in [
        ("m", &[][..], json!(0.3)),
        ("m", &["--eta", "0"], json!(0.0)),
        ("m", &["--sampler", "euler"], Value::Null),
        ("models--a--Hyper-SD/m", &[], json!(1.0)),
    ] {
        let output = succeed(
            sdgen(dir.path())
                .args(["x", "-s", "1", "--dry-run", "--json", "-m", model])
                .args(options),
        );
        assert_eq!(
            serde_json::from_str::<Value>(&stdout(&output)).unwrap()["eta"],
            eta,
            "{model} {options:?}"
        );
    }
    let output = succeed(sdgen(dir.path()).args([
        "x",
        "-s",
        "1",
        "-v",
        "-W",
        "16",
        "-H",
        "16",
        "-m",
        "models--a--Hyper-SD/m",
    ]));
    assert!(
        stderr(&output).contains("distilled: trajectory segmented consistency, by its name"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_lora_is_a_distillation_only_where_words_of_its_name_say_so_and_then_stderr_says_it() {
    let dir = tempfile::tempdir().unwrap();
    with_base("sd1", &dir.path().join("m"));
    let style = fixture("lora/kohya.safetensors");
    let plan = |lora: &Path, options: &[&str]| {
        let output = succeed(
            sdgen(dir.path())
                .args(["x", "-s", "1", "-m", "m", "--dry-run", "--json", "--lora"])
                .arg(lora)
                .args(options),
        );
        let said: Value = serde_json::from_str(&stdout(&output)).unwrap();
        let keys = ["sampler", "steps", "guidance"].map(|key| said[key].clone());
        (json!(keys), stderr(&output))
    };
    for name in [
        "porsche_911_turbo",
        "lightning_bolts_concept",
        "raiden_white_lightning_v2",
        "magicalCM_v1",
        "art_cd_cover",
        "concept_TCD_actor",
        "hyper-realism",
        "sd_turbojet_engine",
    ] {
        let path = dir.path().join(format!("{name}.safetensors"));
        std::fs::copy(&style, &path).unwrap();
        let (plan, said) = plan(&path, &[]);
        assert_eq!(plan, json!(["pndm", 50, 7.5]), "{name}");
        assert!(!said.contains("by its name"), "{said}");
    }
    // every LoRA of diffusers has this file's name: the repository tells
    let folder = dir
        .path()
        .join("hub/models--latent-consistency--lcm-lora-sdv1-5/snapshots/01");
    std::fs::create_dir_all(&folder).unwrap();
    let lcm = folder.join("pytorch_lora_weights.safetensors");
    std::fs::copy(&style, &lcm).unwrap();
    let (of_lcm, said) = plan(&lcm, &[]);
    assert_eq!(of_lcm, json!(["lcm", 4, 1.0]));
    let told = "`latent-consistency/lcm-lora-sdv1-5`: latent consistency, by its name; 4 steps \
        and no guidance unless `--steps` and `--guidance` say otherwise";
    assert!(said.contains(told), "{said}");
    let given = ["--steps", "9", "-g", "3", "--sampler", "ddim"];
    assert_eq!(plan(&lcm, &given).0, json!(["ddim", 9, 3.0]));
    // trained on pictures, by its own header
    let trained = dir.path().join("sdxl_lightning_4step_lora.safetensors");
    let header = HashMap::from([("ss_num_train_images".to_string(), "20".to_string())]);
    let tensors = load(&style);
    safetensors::serialize_to_file(&tensors, Some(header), &trained).unwrap();
    assert_eq!(plan(&trained, &[]).0, json!(["pndm", 50, 7.5]));
}

#[test]
fn the_name_of_a_lora_tells_a_transformer_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let lora = fixture("klein/lora.safetensors");
    let draw = |name: &str| {
        std::fs::copy(&lora, dir.path().join(name)).unwrap();
        let mut command = sdgen(dir.path());
        command
            .args(["a frog", "-W", "64", "-H", "64", "-s", "7", "--no-metadata"])
            .args(["--force", "-o", "x.png", "--lora", name, "-m"])
            .arg(fixture("klein"));
        let said = stderr(&succeed(&mut command));
        assert!(!said.contains("unless"), "{said}");
        std::fs::read(dir.path().join("x.png")).unwrap()
    };
    assert!(draw("style.safetensors") == draw("klein_lcm-lora.safetensors"));
}
