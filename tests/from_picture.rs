//! Pictures drawn from pictures: the same as diffusers', and what is around them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use candle_core::{DType, Device, Tensor};
use common::*;
use sdgen::image::{Format, Picture};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;

fn goldens() -> (Vec<Value>, HashMap<String, Tensor>) {
    let folder = fixture("from_picture");
    let tensors = candle_core::safetensors::load(folder.join("goldens.safetensors"), &Device::Cpu).unwrap();
    (json(&folder.join("goldens.json"))["runs"].as_array().unwrap().clone(), tensors)
}

/// Levels [h, w, 3] or [h, w] as a picture.
fn levels(t: &Tensor) -> Picture {
    let values: Vec<u8> = t.flatten_all().unwrap().to_vec1().unwrap();
    let rgb = if t.rank() == 2 { values.into_iter().flat_map(|level| [level; 3]).collect() } else { values };
    Picture { height: t.dim(0).unwrap(), width: t.dim(1).unwrap(), rgb }
}

fn save(path: &Path, picture: &Picture) {
    std::fs::write(path, picture.encode(Format::Png, None).unwrap()).unwrap();
}

fn read(path: &Path) -> Picture {
    Picture::decode(&std::fs::read(path).unwrap()).unwrap()
}

/// A fixture with another first convolution.
fn widened(model: &str, conv_in: &Tensor, to: &Path) {
    copy_folder(&fixture(model), to);
    let path = to.join("unet/diffusion_pytorch_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    tensors.insert("conv_in.weight".into(), conv_in.to_dtype(DType::F16).unwrap());
    candle_core::safetensors::save(&tensors, &path).unwrap();
    edit_json(&to.join("unet/config.json"), |config| {
        config.insert("in_channels".into(), conv_in.dim(1).unwrap().into());
    });
}

fn sampler_of(run: &Value) -> Vec<String> {
    let Some(class) = run["scheduler"].as_str() else { return vec![] };
    let kwargs = &run["scheduler_kwargs"];
    let sampler = match class {
        "DDIMScheduler" => "ddim",
        "DDPMScheduler" => "ddpm",
        "EulerDiscreteScheduler" => "euler",
        "EulerAncestralDiscreteScheduler" => "euler-a",
        "DPMSolverMultistepScheduler" if kwargs["algorithm_type"] == "sde-dpmsolver++" => "dpmpp-2m-sde",
        "DPMSolverMultistepScheduler" => "dpmpp-2m",
        "HeunDiscreteScheduler" => "heun",
        "KDPM2DiscreteScheduler" => "dpm2",
        "UniPCMultistepScheduler" => "unipc",
        "DEISMultistepScheduler" => "deis",
        "TCDScheduler" => "tcd",
        other => panic!("no name for {other}"),
    };
    let mut args = vec!["--sampler".into(), sampler.into()];
    if kwargs["use_karras_sigmas"] == true {
        args.extend(["--schedule".into(), "karras".into()]);
    }
    args
}

#[test]
fn pictures_from_pictures_are_diffusers_own() {
    let (runs, tensors) = goldens();
    let mut wrong = vec![];
    for run in &runs {
        let name = run["name"].as_str().unwrap();
        let golden = |part: &str| tensors.get(&format!("run.{name}.{part}"));
        let dir = tempfile::tempdir().unwrap();
        let model = run["model"].as_str().unwrap();
        match tensors.get(&format!("{}.conv_in", name.rsplit_once('.').unwrap().0)) {
            Some(conv_in) => widened(model, conv_in, &dir.path().join(model)),
            None => copy_folder(&fixture(model), &dir.path().join(model)),
        }
        save(&dir.path().join("source.png"), &levels(golden("picture").unwrap()));
        let mut command = sdgen(dir.path());
        command.args(["-m", model, "-i", "source.png", "-o", "drawn.png", "-q"]);
        for key in ["seed", "steps", "guidance", "strength", "eta", "image_guidance"] {
            let value = &run[key];
            if value.is_null() || (key == "eta" && value == 0.0) || (key == "strength" && !run["image_guidance"].is_null()) {
                continue;
            }
            command.arg(format!("--{}={value}", key.replace('_', "-")));
        }
        command.args(["-n", run["negative_prompt"].as_str().unwrap(), run["prompt"].as_str().unwrap()]).args(sampler_of(run));
        if let Some(mask) = golden("mask") {
            save(&dir.path().join("mask.png"), &levels(mask));
            command.args(["--mask", "mask.png", "--feather", "0"]);
        }
        succeed(&mut command);
        let drawn = read(&dir.path().join("drawn.png"));
        let mut want = levels(&golden("image").unwrap().squeeze(0).unwrap());
        if let Some(mask) = golden("mask") {
            // diffusers does not put the source back
            let (mask, source) = (levels(mask), levels(golden("picture").unwrap()));
            for ((want, mask), source) in want.rgb.iter_mut().zip(&mask.rgb).zip(&source.rgb) {
                *want = if *mask < 128 { *source } else { *want };
            }
        }
        let difference = drawn.difference(&want);
        if difference.largest > 1 || difference.psnr_db < 60.0 {
            wrong.push(format!("{name}: {} levels, {:.1} dB", difference.largest, difference.psnr_db));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
