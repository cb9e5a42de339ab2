//! `--vae`: another decoder than the model's own, in every form in which one is found.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::*;
use std::collections::HashMap;
use std::path::Path;

/// `sd1/` and the same with TAESD for its VAE.
fn models(folder: &Path) {
    with_base("sd1", &folder.join("kl"));
    with_base("taesd", &folder.join("tiny"));
}

fn draw(folder: &Path, model: &str, options: &[&str], output: &str) -> Vec<u8> {
    let small = ["a frog", "-s", "7", "--steps", "2", "-W", "16", "-H", "16", "-q", "-m", model, "-o", output];
    succeed(sdgen(folder).args(small).args(options));
    std::fs::read(folder.join(output)).unwrap()
}

#[test]
fn a_vae_decodes_the_same_inside_of_a_model_and_beside_it_in_any_layout() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path());
    let kl = draw(dir.path(), "kl", &["--no-metadata"], "kl.png");
    let tiny = draw(dir.path(), "tiny", &["--no-metadata"], "tiny.png");
    assert!(kl != tiny);
    let weights = |model: &str| dir.path().join(model).join("vae/diffusion_pytorch_model.safetensors");
    // the original layouts: TAESD's decoder alone, and the VAE of a whole checkpoint, with its prefix and without
    let renamed: HashMap<_, _> = load(&weights("tiny"))
        .into_iter()
        .filter_map(|(key, tensor)| {
            let (layer, rest) = key.strip_prefix("decoder.layers.")?.split_once('.')?;
            Some((format!("{}.{rest}", layer.parse::<usize>().unwrap() + 1), tensor))
        })
        .collect();
    save(&renamed, &dir.path().join("taesd_decoder.safetensors"));
    single_file("single_sd1.json", &dir.path().join("kl"), &dir.path().join("whole.safetensors"));
    let whole = load(&dir.path().join("whole.safetensors"));
    let alone = whole.into_iter().filter_map(|(key, tensor)| Some((key.strip_prefix("first_stage_model.")?.to_string(), tensor)));
    save(&alone.collect(), &dir.path().join("alone.safetensors"));
    let file = "vae/diffusion_pytorch_model.safetensors";
    let (in_tiny, in_kl) = (format!("tiny/{file}"), format!("kl/{file}"));
    for (i, vae) in ["tiny/vae", "tiny", &in_tiny, "taesd_decoder.safetensors"].into_iter().enumerate() {
        assert!(draw(dir.path(), "kl", &["--no-metadata", "--vae", vae], &format!("a{i}.png")) == tiny, "{vae}");
    }
    for (i, vae) in ["kl/vae", "kl", &in_kl, "whole.safetensors", "alone.safetensors"].into_iter().enumerate() {
        assert!(draw(dir.path(), "tiny", &["--no-metadata", "--vae", vae], &format!("b{i}.png")) == kl, "{vae}");
    }
}

#[test]
fn a_file_without_a_configuration_takes_the_scale_of_the_model_that_it_decodes_for() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path());
    edit_json(&dir.path().join("kl/vae/config.json"), |c| drop(c.insert("scaling_factor".into(), 0.13025.into())));
    let own = draw(dir.path(), "kl", &["--no-metadata"], "own.png");
    let file = draw(dir.path(), "kl", &["--no-metadata", "--vae", "kl/vae/diffusion_pytorch_model.safetensors"], "file.png");
    assert!(own == file);
}

#[test]
fn pictures_remember_their_vae_and_resume_and_check_know_it() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path());
    draw(dir.path(), "kl", &[], "own.png");
    draw(dir.path(), "kl", &["--vae", "tiny/vae"], "other.png");
    let metadata = sdgen::image::read_metadata(&std::fs::read(dir.path().join("other.png")).unwrap()).unwrap().unwrap();
    let hash = metadata.sdgen["vae_hash"].as_str().unwrap();
    assert_eq!(metadata.sdgen["vae"], "tiny");
    assert!(metadata.parameters.contains(&format!("VAE: tiny, VAE hash: {}", &hash[..10])), "{}", metadata.parameters);

    let resume = |options: &[&str]| {
        let small = ["a frog", "-s", "7", "--steps", "2", "-W", "16", "-H", "16", "-m", "kl", "-o", "own.png", "--resume"];
        stderr(&succeed(sdgen(dir.path()).args(small).args(options)))
    };
    assert!(resume(&[]).contains("1 of 1 pictures are there already"));
    assert!(resume(&["--vae", "tiny/vae"]).contains("0 of 1 pictures are there already"));
    assert!(resume(&["--vae", "tiny/vae"]).contains("1 of 1 pictures are there already"));
    assert!(resume(&[]).contains("0 of 1 pictures are there already"));

    let check = |options: &[&str]| {
        let output = sdgen(dir.path()).args(["check", "own.png", "other.png", "-m", "kl"]).args(options).output().unwrap();
        (output.status.code(), stdout(&output), stderr(&output))
    };
    assert_eq!(check(&["--vae", "tiny/vae"]).1, "own.png: identical\nother.png: identical\n");
    let (code, said, errors) = check(&[]);
    assert_eq!((code, &*said), (Some(1), "own.png: identical\nother.png: failed\n"), "{errors}");
    assert!(errors.contains("it was drawn with the VAE `tiny`\n\nhint: pass that with `--vae`"), "{errors}");
    assert!(check(&["--vae", "kl/vae"]).1.contains("other.png: failed"));
}

#[test]
fn what_is_no_vae_or_one_for_other_latents_says_so() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path());
    with_base("odd", &dir.path().join("odd"));
    let run = |vae: &str| {
        let mut command = sdgen(dir.path());
        command.args(["x", "-m", "kl", "--vae", vae, "-o", "x.png"]);
        command
    };
    fail(&mut run("nothing"), 3, &["cannot open `nothing`"]);
    fail(&mut run("kl/tokenizer"), 3, &["`kl/tokenizer` is no VAE", "config.json"]);
    fail(&mut run("kl/unet/diffusion_pytorch_model.safetensors"), 3, &["is no VAE that sdgen knows"]);
    fail(&mut run("odd/vae"), 3, &["`odd` decodes 8 channels, `kl` draws in 4", "hint:"]);
    edit_json(&dir.path().join("tiny/vae/config.json"), |c| drop(c.insert("upsampling_scaling_factor".into(), 4.into())));
    fail(&mut run("tiny/vae"), 3, &["`upsampling_scaling_factor` of the VAE is 4"]);
}
