//! Models that were distilled: to few steps, with guidance as an input.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::*;
use serde_json::{Value, json};
use std::path::Path;

/// What the plain command would draw with.
fn plan(folder: &Path) -> (Value, Value, Value) {
    let output = succeed(sdgen(folder).args(["x", "-s", "1", "-m", "m", "--dry-run", "--json"]));
    let said: Value = serde_json::from_str(&stdout(&output)).unwrap();
    (said["sampler"].clone(), said["steps"].clone(), said["guidance"].clone())
}

#[test]
fn the_plain_command_takes_steps_and_guidance_from_the_distillation() {
    let cases = [
        ("turbo", json!({}), ("euler", 1, 1.0), "1 steps of euler, guidance off"),
        ("turbo", json!({ "_class_name": "EulerAncestralDiscreteScheduler" }), ("euler-a", 1, 1.0), "adversarial distillation"),
        ("turbo", json!({ "_class_name": "LCMScheduler" }), ("lcm", 4, 1.0), "latent consistency"),
        ("turbo", json!({ "_class_name": "TCDScheduler" }), ("tcd", 4, 1.0), "trajectory consistency"),
        ("lcm", json!({}), ("lcm", 4, 8.5), "4 steps of lcm, guidance 8.5"),
        ("lcm", json!({ "_class_name": "DDIMScheduler" }), ("ddim", 4, 8.5), "latent consistency, guidance built in"),
        // no distillation: other spacing, zero terminal SNR, another sampler
        ("turbo", json!({ "timestep_spacing": "leading" }), ("euler", 50, 7.5), "guidance 7.5"),
        ("turbo", json!({ "prediction_type": "v_prediction", "rescale_betas_zero_snr": true }), ("euler", 50, 7.5), "guidance 7.5"),
        ("turbo", json!({ "_class_name": "DDIMScheduler" }), ("ddim", 50, 7.5), "guidance 7.5"),
        ("sd1", json!({}), ("pndm", 50, 7.5), "guidance 7.5"),
    ];
    for (name, scheduler, (sampler, steps, guidance), told) in cases {
        let dir = tempfile::tempdir().unwrap();
        with_base(name, &dir.path().join("m"));
        edit_json(&dir.path().join("m/scheduler/scheduler_config.json"), |c| c.extend(scheduler.as_object().unwrap().clone()));
        assert_eq!(plan(dir.path()), (json!(sampler), json!(steps), json!(guidance)), "{name} with {scheduler}");
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
        let small = ["a frog", "-s", "7", "-W", "16", "-H", "16", "-m", "m", "--no-metadata", "-o", output];
        let said = stderr(&succeed(sdgen(dir.path()).args(small).args(options)));
        (std::fs::read(dir.path().join(output)).unwrap(), said)
    };
    let (plain, said) = draw(&[], "a.png");
    assert!(!said.contains("negative"), "{said}");
    assert!(plain != draw(&["-g", "3"], "b.png").0, "guidance changes nothing");
    let (negative, said) = draw(&["-n", "a house"], "c.png");
    assert!(said.contains("warning: the negative prompt has no effect without classifier-free guidance"), "{said}");
    assert!(plain == negative);
    let (rescaled, said) = draw(&["--guidance-rescale", "0.5"], "d.png");
    assert!(said.contains("warning: `--guidance-rescale` has no effect without classifier-free guidance"), "{said}");
    assert!(plain == rescaled);
}

#[test]
fn a_model_of_one_step_that_does_not_say_so_is_known_by_its_name_on_the_hub() {
    for (name, steps) in [("models--IDKiro--sdxs-512-dreamshaper", 1), ("models--someone--else", 50)] {
        let dir = tempfile::tempdir().unwrap();
        let snapshot = dir.path().join(name).join("snapshots/0123");
        with_base("bksdm", &snapshot);
        let output = succeed(sdgen(dir.path()).args(["x", "-s", "1", "--dry-run", "--json", "-m"]).arg(&snapshot));
        let said: Value = serde_json::from_str(&stdout(&output)).unwrap();
        assert_eq!(said["steps"], steps, "{name}");
    }
}
