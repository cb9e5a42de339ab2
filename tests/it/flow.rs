//! Models of flow matching against diffusers, stage by stage, on tiny random checkpoints
//! (`tests/fixtures/flow.py`).

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use sdgen::image::Image;
use sdgen::model::{AddedCond, Autoencoder, Backbone, BackboneConfig, Conditioning, ExtraInputs};
use sdgen::nn::Forward;
use sdgen::nn::device::Compute;
use sdgen::nn::weights::SharedSource;
use sdgen::pipeline::guidance::{CfgDenoiser, DeepCache, Guidance};
use sdgen::sampling::noise::Generator;
use sdgen::sampling::{self, Mu, Sampler, SchedulerConfig, plan, plan_img2img};
use sdgen::text::encoder::{PromptEmbeds, PromptEncoder, TextEncoderConfigs};
use sdgen::text::prompt::Syntax;
use sdgen::weights::{Checkpoint, Origin};
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

const NETWORK: f32 = 1e-4;
const LATENTS: f32 = 1e-3;

/// A tiny model, with what diffusers made of it.
struct Tiny {
    checkpoint: Checkpoint,
    goldens: HashMap<String, Tensor>,
    facts: Value,
}

fn tiny(name: &str) -> Tiny {
    tiny_at(&fixture(name), name)
}

/// The model in a folder, which was made of this fixture.
fn tiny_at(folder: &Path, name: &str) -> Tiny {
    Tiny {
        checkpoint: Checkpoint::open(Origin::Path(folder)).unwrap(),
        goldens: load(&fixture(&format!("{name}/goldens.safetensors"))),
        facts: goldens(name),
    }
}

fn klein() -> Tiny {
    tiny("klein")
}

fn cx() -> Forward<'static> {
    Forward::on(&Device::Cpu)
}

impl Tiny {
    fn encoder(&self) -> PromptEncoder {
        let compute = Compute::cpu();
        let configs = TextEncoderConfigs::of(&self.checkpoint).unwrap();
        PromptEncoder::new(&self.checkpoint, &configs, &compute, None).unwrap()
    }

    fn backbone(&self) -> Backbone {
        let config = BackboneConfig::of(&self.checkpoint).unwrap();
        let weights = self
            .checkpoint
            .weights("transformer", &Device::Cpu, DType::F32);
        config.build(&weights).unwrap()
    }

    fn compare(&self, name: &str, got: &Tensor, tolerance: f32) {
        let golden = &self.goldens[name];
        assert_eq!(got.dims(), golden.dims(), "{name}: shape");
        let off = difference(got, &golden.to_dtype(DType::F32).unwrap());
        assert!(
            off <= tolerance,
            "{name} differs by {off:e}, {tolerance:e} allowed"
        );
    }
}

#[test]
fn prompts_become_the_same_ids_and_embeddings_of_three_layers_padding_too() {
    let klein = klein();
    let encoder = klein.encoder();
    for (i, case) in klein.facts["text"].as_array().unwrap().iter().enumerate() {
        let prompt = case["prompt"].as_str().unwrap();
        let (embeds, cut) = encoder.encode(prompt, 0, Syntax::Plain, None).unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(embeds.token_ids[..ids.len()], ids, "{prompt}");
        assert_eq!(embeds.token_ids.len(), 512);
        assert_eq!(cut, None);
        let rows: Vec<u32> = serde_json::from_value(case["rows"].clone()).unwrap();
        let rows = Tensor::new(rows, &Device::Cpu).unwrap();
        let got = embeds.prompt_embeds.index_select(&rows, 1).unwrap();
        klein.compare(&format!("text.{i}"), &got, NETWORK);
    }
    let long = "frog ".repeat(600);
    let (embeds, cut) = encoder.encode(&long, 0, Syntax::Plain, None).unwrap();
    assert_eq!(embeds.token_ids.len(), 512);
    let cut = cut.unwrap();
    assert!(long.ends_with(&cut) && cut.contains("frog"), "{cut:?}");
}

#[test]
fn the_transformer_predicts_the_same_velocities() {
    let klein = klein();
    let backbone = klein.backbone();
    let conditioning = Conditioning::from(klein.goldens["transformer.context"].clone());
    let denoiser = backbone
        .bind(cx(), &conditioning, ExtraInputs::default())
        .unwrap();
    let latents = &klein.goldens["transformer.latents"];
    let all = denoiser.forward(latents, 700.0).unwrap();
    klein.compare("transformer.output", &all, NETWORK);
    // each picture of a batch as alone
    let conditioning = Conditioning::from(conditioning.context.narrow(0, 1, 1).unwrap());
    let alone = backbone
        .bind(cx(), &conditioning, ExtraInputs::default())
        .unwrap();
    let alone = alone
        .forward(&latents.narrow(0, 1, 1).unwrap(), 700.0)
        .unwrap();
    assert_eq!(values(&alone), values(&all.narrow(0, 1, 1).unwrap()));
}

#[test]
fn the_autoencoder_normalises_packed_latents_both_ways() {
    let klein = klein();
    let config = Autoencoder::from_json(klein.checkpoint.config("vae").unwrap()).unwrap();
    assert_eq!((config.factor(), config.latent_format().channels), (16, 16));
    let weights = klein.checkpoint.weights("vae", &Device::Cpu, DType::F32);
    let encoder = config.encoder(&weights).unwrap();
    let posterior = encoder
        .encode(cx(), &klein.goldens["vae.picture"], None)
        .unwrap();
    assert!(posterior.std.is_none());
    klein.compare("vae.latents", &posterior.mean, NETWORK);
    let decoder = config.decoder(&weights).unwrap();
    let decoded = decoder.decode(cx(), &klein.goldens["vae.latents"]).unwrap();
    klein.compare("vae.decoded", &decoded, NETWORK);
}

#[test]
fn latents_after_every_step_are_the_same_with_guidance_and_without() {
    for (name, rule, side, patch, channels, runs) in [
        ("klein", Some(Mu::Empirical), 16, 1, 16, 3),
        ("z_image", None, 8, 2, 4, 3),
        ("flux", None, 8, 2, 4, 3),
        ("sd3", None, 8, 2, 4, 3),
    ] {
        let compared = latents_after_every_step(&tiny(name), "run", rule, (side, patch, channels));
        assert_eq!(compared, runs, "{name}");
    }
    for name in ["flux", "sd3"] {
        let compared = latents_after_every_step(&tiny(name), "length_run", None, (8, 2, 4));
        assert_eq!(compared, 2, "{name}");
    }
    let dir = tempfile::tempdir().unwrap();
    let schnell = tiny_at(&flux_schnell(dir.path()), "flux");
    let compared = latents_after_every_step(&schnell, "schnell_run", None, (8, 2, 4));
    assert_eq!(compared, 2);
    let without = tiny_at(&sd3_without_t5(dir.path()), "sd3");
    let compared = latents_after_every_step(&without, "without_run", None, (8, 2, 4));
    assert_eq!(compared, 1);
}

/// Makes FLUX.1 dev schnell: without guidance as an input, and with levels of its own.
fn flux_schnell(folder: &Path) -> PathBuf {
    let model = folder.join("flux-schnell");
    copy_folder(&fixture("flux"), &model);
    edit_json(&model.join("transformer/config.json"), |config| {
        config.insert("guidance_embeds".into(), false.into());
    });
    let scheduler = model.join("scheduler/scheduler_config.json");
    std::fs::write(scheduler, goldens("flux")["schnell_scheduler"].to_string()).unwrap();
    let file = model.join("transformer/diffusion_pytorch_model.safetensors");
    let mut tensors = load(&file);
    tensors.retain(|name, _| !name.contains("guidance_embedder"));
    save(&tensors, &file);
    model
}

/// Stable Diffusion 3 without T5, as its folder may be.
fn sd3_without_t5(folder: &Path) -> PathBuf {
    let model = folder.join("sd3-without");
    copy_folder(&fixture("sd3"), &model);
    edit_json(&model.join("model_index.json"), |index| {
        for part in ["text_encoder_3", "tokenizer_3"] {
            std::fs::remove_dir_all(model.join(part)).unwrap();
            index.insert(part.into(), serde_json::json!([null, null]));
        }
    });
    model
}

/// Prompts of any lengths, in a batch.
fn told(prompts: &[PromptEmbeds], guidance: f64) -> Conditioning {
    let contexts: Vec<&Tensor> = prompts.iter().map(|it| &it.prompt_embeds).collect();
    let pooled: Vec<Tensor> = prompts
        .iter()
        .filter_map(|it| it.pooled_prompt_embeds.clone())
        .collect();
    let lengths: Vec<usize> = contexts.iter().map(|x| x.dim(1).unwrap()).collect();
    let longest = *lengths.iter().max().unwrap();
    let padded: Vec<Tensor> = contexts
        .iter()
        .map(|x| x.pad_with_zeros(1, 0, longest - x.dim(1).unwrap()).unwrap())
        .collect();
    Conditioning {
        lengths,
        added_cond: (!pooled.is_empty()).then(|| AddedCond {
            text_embeds: Tensor::cat(&pooled, 0).unwrap(),
            time_ids: vec![vec![]; pooled.len()],
        }),
        guidance: Some(guidance),
        ..Conditioning::from(Tensor::cat(&padded, 0).unwrap())
    }
}

/// Compares the runs from noise of a model, whose latents are squares of so many pixels, of which so
/// many in each direction are a token, and have so many channels. Returns how many runs there were.
fn latents_after_every_step(
    tiny: &Tiny,
    name: &str,
    rule: Option<Mu>,
    (side, patch, channels): (usize, usize, usize),
) -> usize {
    let (encoder, backbone) = (tiny.encoder(), tiny.backbone());
    let scheduler = SchedulerConfig::from_json(tiny.checkpoint.config("scheduler").unwrap());
    let scheduler = match BackboneConfig::of(&tiny.checkpoint).unwrap() {
        BackboneConfig::Sd3(_) => scheduler.unwrap().ending_at_lowest(),
        _ => scheduler.unwrap(),
    };
    let runs = tiny.facts[format!("{name}s")].as_array().unwrap();
    let mut done = 0;
    let runs = runs.iter().enumerate();
    for (i, run) in runs.filter(|(_, run)| run["strength"].is_null()) {
        let number = |key: &str| run[key].as_u64().unwrap() as usize;
        let (h, w) = (number("height") / side, number("width") / side);
        let scheduler = scheduler.clone().for_picture(h * w / patch / patch, rule);
        let plan = plan(&scheduler, Sampler::Euler, None, number("steps"), None).unwrap();
        let sigmas: Vec<f64> = serde_json::from_value(run["sigmas"].clone()).unwrap();
        for (own, golden) in plan.sigmas.iter().zip(&sigmas) {
            assert!((own - golden).abs() < 1e-6, "{:?} {sigmas:?}", plan.sigmas);
        }
        let length = run["max_sequence_length"].as_u64().map(|n| n as usize);
        let encode = |text: &str| encoder.encode(text, 0, Syntax::Plain, length).unwrap().0;
        // of the prompt alone
        let skip = run["clip_skip"].as_u64().unwrap_or(1) as usize - 1;
        let prompt = run["prompt"].as_str().unwrap();
        let prompt = encoder
            .encode(prompt, skip, Syntax::Plain, length)
            .unwrap()
            .0;
        let given = run["guidance"].as_f64().unwrap();
        let embeds = BackboneConfig::of(&tiny.checkpoint)
            .unwrap()
            .embeds_guidance();
        let scale = run["true_guidance"]
            .as_f64()
            .unwrap_or(if embeds { 1.0 } else { given });
        let conditioning = match scale > 1.0 {
            true => {
                let negative = encode(run["negative"].as_str().unwrap_or(""));
                told(&[negative, prompt], given)
            }
            false => told(&[prompt], given),
        };
        let mut guided = CfgDenoiser {
            model: backbone
                .bind(cx(), &conditioning, ExtraInputs::default())
                .unwrap(),
            guidance: if scale > 1.0 {
                Guidance::Text(1)
            } else {
                Guidance::Off
            },
            weights: vec![1.0],
            scale,
            rescale: 0.0,
            deep_cache: DeepCache::every(1),
            skip: None,
        };
        let mut generator = Generator::new(run["seed"].as_u64().unwrap());
        let noise = generator.latents(h, w, channels).unwrap();
        let mut compared = 0;
        sampling::sample(
            &plan,
            (noise * plan.init_noise_sigma()).unwrap(),
            &mut |x, sigma, timestep| guided.denoise(x, plan.scalings(sigma), timestep),
            &mut || candle_core::bail!("no noise is drawn"),
            &mut |step| {
                tiny.compare(&format!("{name}.{i}.{}", step.index), step.latents, LATENTS);
                compared += 1;
                Ok(None)
            },
        )
        .unwrap();
        assert_eq!(compared, number("steps"));
        done += 1;
    }
    done
}

#[test]
fn a_picture_begins_on_the_line_from_it_to_noise_as_many_steps_before_the_end_as_in_diffusers() {
    let scheduler = SchedulerConfig::from_json(klein().checkpoint.config("scheduler").unwrap());
    let scheduler = scheduler.unwrap().for_picture(1024, Some(Mu::Empirical));
    let whole = plan(&scheduler, Sampler::Euler, None, 4, None).unwrap();
    // diffusers leaves int(4 - 4 * strength) out
    for (strength, left_out) in [
        (1.0, 0),
        (0.9, 0),
        (0.75, 1),
        (0.6, 1),
        (0.5, 2),
        (0.3, 2),
        (0.1, 3),
    ] {
        let part =
            plan_img2img(&scheduler, Sampler::Euler, None, 4, None, strength, false).unwrap();
        assert_eq!(part.sigmas, whole.sigmas[left_out..], "{strength}");
        assert_eq!(part.timesteps, whole.timesteps[left_out..], "{strength}");
    }
    assert!(plan_img2img(&scheduler, Sampler::Euler, None, 4, None, 0.0, false).is_err());
    let of = |value: f32| Tensor::full(value, (1, 2, 2, 3), &Device::Cpu).unwrap();
    let noisy = whole.add_noise(&of(2.0), &of(-1.0), 0.25).unwrap();
    assert_eq!(values(&noisy)[0], 0.75 * 2.0 - 0.25);
}

/// The program on a copy of klein.
fn draw(folder: &Path, args: &[&str]) -> Command {
    let mut command = sdgen(folder);
    command
        .args(["-m", "klein", "-W", "64", "-H", "64", "-s", "7"])
        .args(args);
    command
}

#[test]
fn transformers_of_8_bit_integers_draw_nearly_the_same_pictures() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["klein", "z_image", "flux", "sd3"] {
        let model = fixture(name);
        let picture = |dtype: &str| {
            let mut command = sdgen(dir.path());
            command.args(["x", "-W", "64", "-H", "64", "-s", "7", "--steps", "2", "-m"]);
            command
                .arg(&model)
                .args(["--dtype", dtype, "-o", "x.png", "--force"]);
            succeed(&mut command);
            pixels(&dir.path().join("x.png"))
        };
        let off = worst_level(&picture("int8"), &picture("f32"));
        assert!((1..=24).contains(&off), "{name}: {off}");
    }
}

#[test]
fn pictures_are_diffusers_own_alone_and_in_a_batch() {
    let dir = tempfile::tempdir().unwrap();
    let klein = klein();
    copy_folder(&fixture("klein"), &dir.path().join("klein"));
    for (i, run) in klein.facts["runs"].as_array().unwrap().iter().enumerate() {
        edit_json(&dir.path().join("klein/model_index.json"), |index| {
            index.insert("is_distilled".into(), run["is_distilled"].clone());
        });
        let given = |key: &str| run[key].to_string();
        let mut command = draw(
            dir.path(),
            &[run["prompt"].as_str().unwrap(), "-o", "x.png", "--force"],
        );
        for (option, key) in [
            ("-s", "seed"),
            ("-W", "width"),
            ("-H", "height"),
            ("--steps", "steps"),
            ("-g", "guidance"),
        ] {
            command.args([option, &given(key)]);
        }
        succeed(&mut command);
        let golden = levels(&klein.goldens[&format!("run.{i}.picture")]);
        assert_same_levels(
            &format!("run {i}"),
            &pixels(&dir.path().join("x.png")),
            &golden,
        );
    }
    let args = ["a frog", "--steps", "2", "-c", "3", "-o", "{seed}.png"];
    succeed(draw(dir.path(), &args).args(["-b", "3"]));
    succeed(
        draw(
            dir.path(),
            &["a frog", "--steps", "2", "-s", "8", "-o", "alone.png"],
        )
        .args(["-b", "1"]),
    );
    let [batch, alone] = ["8.png", "alone.png"].map(|name| pixels(&dir.path().join(name)));
    assert_eq!(batch, alone);
}

/// What `inspect` tells of a model, which is of this family and draws 1024x1024.
fn inspected(folder: &Path, model: &str, family: &str) -> Value {
    let output = succeed(sdgen(folder).args(["inspect", model, "--json"]));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["family"], family);
    assert_eq!(
        (&told["width"], &told["height"]),
        (&1024.into(), &1024.into())
    );
    told
}

#[test]
fn defaults_come_with_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("klein");
    copy_folder(&fixture("klein"), &model);
    let said = |is_distilled: bool| {
        edit_json(&model.join("model_index.json"), |index| {
            index.insert("is_distilled".into(), is_distilled.into());
        });
        let told = inspected(dir.path(), "klein", "FLUX.2 klein");
        assert_eq!(
            (&told["prediction"], &told["sampler"]),
            (&"flow".into(), &"euler".into())
        );
        (told["steps"].clone(), told["guidance"].clone())
    };
    assert_eq!(said(true), (4.into(), 1.0.into()));
    assert_eq!(said(false), (50.into(), 4.0.into()));
}

#[test]
fn z_image_turbo_is_known_by_its_shift() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("z");
    copy_folder(&fixture("z_image"), &model);
    let said = |shift: f64| {
        edit_json(&model.join("scheduler/scheduler_config.json"), |config| {
            config.insert("shift".into(), shift.into());
        });
        let told = inspected(dir.path(), "z", "Z-Image");
        (told["steps"].clone(), told["guidance"].clone())
    };
    assert_eq!(said(3.0), (8.into(), 1.0.into()));
    assert_eq!(said(6.0), (50.into(), 5.0.into()));
}

#[test]
fn z_image_draws_in_every_way_and_a_batch_is_as_each_alone() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&fixture("z_image"), &dir.path().join("z"));
    let draw = |args: &[&str]| {
        let mut command = sdgen(dir.path());
        command
            .args(["-m", "z", "-W", "64", "-H", "48", "--steps", "2"])
            .args(args);
        command
    };
    let picture = |name: &str| pixels(&dir.path().join(name));
    // prompts and negatives of other lengths beside it change nothing
    let list = "{\"prompt\": \"a frog\", \"seed\": 7}\n\
                {\"prompt\": \"a frog\", \"seed\": 8}\n\
                {\"prompt\": \"a frog on a very long and winding road to nowhere\", \"seed\": 7}\n";
    std::fs::write(dir.path().join("list.jsonl"), list).unwrap();
    let guided = ["-g", "3", "--negative", "a red fish with more words"];
    succeed(draw(&["--from", "list.jsonl", "-b", "3", "-o", "{index}.png"]).args(guided));
    succeed(draw(&["a frog", "-s", "8", "-b", "1", "-o", "alone.png"]).args(guided));
    let names: Vec<String> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".png") && name != "alone.png")
        .collect();
    let alone = picture("alone.png");
    let same = names.iter().filter(|name| picture(name) == alone).count();
    assert_eq!((names.len(), same), (3, 1), "{names:?}");
    succeed(&mut draw(&["a frog", "-s", "7", "-o", "x.png"]));
    let second = ["a frog", "-s", "7", "--hires", "2", "-o", "h.png"];
    succeed(&mut draw(&second));
    let varied = ["a frog", "-s", "7", "--variation", "3:0.2", "-o", "v.png"];
    succeed(&mut draw(&varied));
    // on the way from a prompt to one of another length, the first and the last are the two alone
    let to = "a frog that sits on a long and very winding road";
    succeed(&mut draw(&[to, "-s", "7", "-o", "to.png"]));
    let way = ["a frog", "-s", "7", "--to", to, "--frames", "3"];
    succeed(draw(&way).args(["-o", "way{frame}.png"]));
    let ways: Vec<Vec<u8>> = ["x", "to"]
        .map(|name| picture(&format!("{name}.png")))
        .into();
    let frames: Vec<Vec<u8>> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("way"))
        .map(|name| picture(&name))
        .collect();
    assert_eq!(frames.len(), 3);
    let ends = frames.iter().filter(|frame| ways.contains(frame)).count();
    assert_eq!(ends, 2);
    succeed(sdgen(dir.path()).args(["check", "-m", "z", "x.png", "h.png", "v.png", "alone.png"]));
    for (args, says) in [
        (["-W", "72"], "multiple of 16"),
        (["--sampler", "ddim"], "models of flow matching"),
        (["--clip-skip", "2"], "means nothing to `z`"),
    ] {
        fail(
            &mut draw(&[&["x"][..], &args].concat()),
            2,
            &[says, "hint: "],
        );
    }
    let config = dir.path().join("z/transformer/config.json");
    for (key, value, says) in [
        ("all_patch_size", serde_json::json!([4]), "all_patch_size"),
        ("siglip_feat_dim", 8.into(), "siglip_feat_dim"),
        ("n_kv_heads", 1.into(), "n_kv_heads"),
        ("axes_dims", serde_json::json!([8, 8]), "axes_dims"),
        ("n_heads", 3.into(), "n_heads"),
        ("cap_feat_dim", 24.into(), "do not belong together"),
        ("n_layers", 3.into(), "layers.2"),
        ("n_layers", 1.into(), "unused"),
    ] {
        let before = std::fs::read(&config).unwrap();
        edit_json(&config, |config| {
            config.insert(key.into(), value);
        });
        fail(&mut draw(&["x", "-s", "1"]), 3, &[says]);
        std::fs::write(&config, before).unwrap();
    }
}

#[test]
fn pictures_from_pictures_and_every_second_pass_are_drawn() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&fixture("klein"), &dir.path().join("klein"));
    succeed(&mut draw(dir.path(), &["a frog", "-o", "x.png"]));
    let from = ["a frog", "-i", "x.png", "-o", "y.png", "--strength", "0.5"];
    succeed(&mut draw(dir.path(), &from));
    let [a, b] = ["x.png", "y.png"].map(|name| pixels(&dir.path().join(name)));
    assert_ne!(a, b);
    let mask = Image {
        width: 64,
        height: 64,
        rgb: (0..64 * 64)
            .flat_map(|i| [if i % 64 < 32 { 255 } else { 0 }; 3])
            .collect(),
    };
    std::fs::write(
        dir.path().join("m.png"),
        mask.encode(sdgen::image::Format::Png, None).unwrap(),
    )
    .unwrap();
    succeed(&mut draw(
        dir.path(),
        &["a frog", "-i", "x.png", "--mask", "m.png", "-o", "z.png"],
    ));
    let [a, b] = ["x.png", "z.png"].map(|name| pixels(&dir.path().join(name)));
    let kept = |pixel: usize| pixel % 64 >= 48;
    assert!(
        (0..64 * 64)
            .filter(|pixel| kept(*pixel))
            .all(|p| a[3 * p..3 * p + 3] == b[3 * p..3 * p + 3])
    );
    assert_ne!(a, b);
    succeed(&mut draw(
        dir.path(),
        &["a frog", "--hires", "2", "-o", "h.png"],
    ));
    let (output, checked) = (["h.png", "x.png", "8.png"], ["h.png", "x.png"]);
    succeed(&mut draw(
        dir.path(),
        &["a frog", "-s", "8", "--variation", "3:0.2", "-o", output[2]],
    ));
    succeed(
        sdgen(dir.path())
            .args(["check", "8.png", "-m", "klein"])
            .args(checked),
    );
}

#[test]
fn a_lora_in_diffusers_layout_changes_the_picture_as_in_diffusers() {
    let dir = tempfile::tempdir().unwrap();
    let klein = klein();
    copy_folder(&fixture("klein"), &dir.path().join("klein"));
    let prompt = klein.facts["lora"]["prompt"].as_str().unwrap();
    let args = [
        prompt,
        "--steps",
        "2",
        "--strict",
        "-o",
        "x.png",
        "--lora",
        "klein/lora.safetensors:0.7",
    ];
    let output = succeed(draw(dir.path(), &args).arg("-v"));
    assert!(
        stderr(&output).contains("26 of 26 tensors fit"),
        "{}",
        stderr(&output)
    );
    let golden = levels(&klein.goldens["lora.picture"]);
    assert_same_levels("LoRA", &pixels(&dir.path().join("x.png")), &golden);
    // one of another family fits nothing
    let other = fixture("lora/kohya.safetensors");
    fail(
        draw(dir.path(), &["x", "--lora"]).arg(other),
        3,
        &["does not fit", "hint: "],
    );
}

#[test]
fn samplers_of_flow_matching_draw_from_noise_from_a_picture_and_inside_a_mask() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&fixture("klein"), &dir.path().join("klein"));
    let given = image::RgbImage::from_fn(64, 64, |x, y| image::Rgb([x as u8 * 3, y as u8 * 3, 90]));
    given.save(dir.path().join("in.png")).unwrap();
    let mask = image::GrayImage::from_fn(64, 64, |x, _| image::Luma([u8::from(x >= 32) * 255]));
    mask.save(dir.path().join("mask.png")).unwrap();
    let samplers = "sampler=euler,Heun,dpm2,lms,DPM++ 2M Karras,unipc,deis,res_multistep,euler-a,\
                    dpm2-a,dpmpp-2s-a,dpmpp-sde,dpmpp-2m-sde,dpmpp-3m-sde,lcm";
    let ways: [(&str, &[&str]); 3] = [
        ("noise", &[]),
        ("picture", &["-i", "in.png", "--strength", "0.8"]),
        (
            "mask",
            &["-i", "in.png", "--mask", "mask.png", "--strength", "0.8"],
        ),
    ];
    for (way, args) in ways {
        succeed(
            draw(
                dir.path(),
                &["a frog", "--steps", "6", "--sweep", samplers, "-o"],
            )
            .arg(format!("{way}/{{sampler}}.png"))
            .args(args),
        );
        let folder = std::fs::read_dir(dir.path().join(way)).unwrap();
        let pictures: Vec<Vec<u8>> = folder.map(|file| pixels(&file.unwrap().path())).collect();
        assert_eq!(pictures.len(), 15);
        for (i, picture) in pictures.iter().enumerate() {
            assert!(!pictures[..i].contains(picture), "{way} {i}");
            if way == "mask" {
                for (at, (own, given)) in picture.iter().zip(given.as_raw()).enumerate() {
                    assert!(
                        at / 3 % 64 >= 24 || own.abs_diff(*given) == 0,
                        "{i} at {at}"
                    );
                }
            }
        }
    }
}

#[test]
fn what_means_nothing_to_a_transformer_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("klein");
    copy_folder(&fixture("klein"), &model);
    for (args, says) in [
        (
            ["--sampler", "ddim"],
            "does not draw with models of flow matching",
        ),
        (["--sampler", "tcd"], "`unipc`, `deis`, `lcm` do"),
        (["--schedule", "ays"], "levels of their own"),
        (
            ["--schedule", "trailing"],
            "`karras`, `exponential` and `beta`",
        ),
        (["--tile", "xy"], "means nothing to `klein`"),
        (["--deep-cache", "2"], "means nothing to `klein`"),
        (["--clip-skip", "2"], "means nothing to `klein`"),
        (["--prediction", "v"], "means nothing to `klein`"),
        (["--prompt-syntax", "a1111"], "means nothing to `klein`"),
        (["--original-size", "64x64"], "means nothing to `klein`"),
        (["--eta", "0.5"], "takes no `--eta`"),
        (["-W", "72"], "multiple of 16"),
    ] {
        fail(
            &mut draw(dir.path(), &[&["x"][..], &args].concat()),
            2,
            &[says, "hint: "],
        );
    }
    let word = fixture("embeddings/a1111.safetensors");
    fail(
        draw(dir.path(), &["x", "--embedding"]).arg(word),
        3,
        &["learns no words so"],
    );
    for (part, key, value, says) in [
        ("transformer", "guidance_embeds", true.into(), "FLUX.2 dev"),
        (
            "transformer",
            "axes_dims_rope",
            serde_json::json!([4, 4, 4]),
            "axes_dims_rope",
        ),
        (
            "transformer",
            "joint_attention_dim",
            64.into(),
            "do not belong together",
        ),
        (
            "transformer",
            "num_layers",
            3.into(),
            "transformer_blocks.2",
        ),
        ("transformer", "num_layers", 1.into(), "unused"),
        (
            "transformer",
            "_class_name",
            "AuraFlowTransformer2DModel".into(),
            "does not draw",
        ),
        ("text_encoder", "num_hidden_layers", 20.into(), "27"),
        ("text_encoder", "hidden_act", "gelu".into(), "hidden_act"),
        ("vae", "patch_size", serde_json::json!([1, 1]), "patch_size"),
        (
            "scheduler",
            "stochastic_sampling",
            true.into(),
            "stochastic_sampling",
        ),
        (
            "scheduler",
            "_class_name",
            "DDIMScheduler".into(),
            "use_dynamic_shifting",
        ),
        ("scheduler", "shift", serde_json::json!(-1), "`shift`"),
    ] {
        let file = if part == "scheduler" {
            "scheduler_config.json"
        } else {
            "config.json"
        };
        let path = model.join(part).join(file);
        let before = std::fs::read(&path).unwrap();
        edit_json(&path, |config| {
            config.insert(key.into(), value);
        });
        let output = draw(dir.path(), &["x"]).output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(3), "{part} {key}: {said}");
        assert!(
            said.contains(says) && !said.contains("panicked"),
            "{part} {key}: {said}"
        );
        std::fs::write(&path, before).unwrap();
    }
}

#[test]
fn z_image_reads_the_states_before_the_last_layer_of_the_prompt_alone() {
    let tiny = tiny("z_image");
    let encoder = tiny.encoder();
    for (i, case) in tiny.facts["text"].as_array().unwrap().iter().enumerate() {
        let prompt = case["prompt"].as_str().unwrap();
        let (embeds, cut) = encoder.encode(prompt, 0, Syntax::Plain, None).unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!((embeds.token_ids, cut), (ids, None), "{prompt}");
        tiny.compare(&format!("text.{i}"), &embeds.prompt_embeds, NETWORK);
    }
    let (embeds, cut) = encoder
        .encode(&"frog ".repeat(600), 0, Syntax::Plain, None)
        .unwrap();
    assert_eq!(embeds.prompt_embeds.dims(), [1, 512, 16]);
    assert!(cut.unwrap().ends_with("frog "));
}

#[test]
fn z_images_transformer_predicts_the_same_velocities_with_prompts_of_any_length() {
    let tiny = tiny("z_image");
    let backbone = tiny.backbone();
    let latents = &tiny.goldens["transformer.latents"];
    let contexts = [0, 1, 2].map(|i| &tiny.goldens[&format!("transformer.context.{i}")]);
    let lengths = contexts.map(|context| context.dim(1).unwrap());
    assert_eq!(lengths, [7, 40, 64]);
    // what stands after a prompt's own tokens is not read
    let padded: Vec<Tensor> = contexts
        .iter()
        .map(|context| {
            let missing = 64 - context.dim(1).unwrap();
            let noise = Tensor::full(7f32, (1, missing, 16), &Device::Cpu).unwrap();
            Tensor::cat(&[*context, &noise], 1).unwrap()
        })
        .collect();
    let conditioning = Conditioning {
        lengths: lengths.to_vec(),
        ..Conditioning::from(Tensor::cat(&padded, 0).unwrap())
    };
    let all = backbone
        .bind(cx(), &conditioning, ExtraInputs::default())
        .unwrap();
    // diffusers' 0.3 of the way from noise
    let all = all.forward(latents, 700.0).unwrap();
    tiny.compare("transformer.output", &all, NETWORK);
    for (i, context) in contexts.into_iter().enumerate() {
        let alone = backbone
            .bind(
                cx(),
                &Conditioning::from(context.clone()),
                ExtraInputs::default(),
            )
            .unwrap();
        let alone = alone
            .forward(&latents.narrow(0, i, 1).unwrap(), 700.0)
            .unwrap();
        assert_eq!(values(&alone), values(&all.narrow(0, i, 1).unwrap()), "{i}");
    }
}

#[test]
fn z_images_autoencoder_shifts_and_scales_latents_both_ways() {
    let tiny = tiny("z_image");
    let config = Autoencoder::from_json(tiny.checkpoint.config("vae").unwrap()).unwrap();
    let weights = tiny.checkpoint.weights("vae", &Device::Cpu, DType::F32);
    let encoder = config.encoder(&weights).unwrap();
    let posterior = encoder
        .encode(cx(), &tiny.goldens["vae.picture"], None)
        .unwrap();
    tiny.compare("vae.mean", &posterior.mean, NETWORK);
    tiny.compare("vae.std", &posterior.std.unwrap(), NETWORK);
    let decoder = config.decoder(&weights).unwrap();
    let decoded = decoder.decode(cx(), &tiny.goldens["vae.mean"]).unwrap();
    tiny.compare("vae.decoded", &decoded, NETWORK);
}

#[test]
fn z_images_pictures_are_diffusers_own_with_guidance_and_from_a_picture() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = tiny("z_image");
    copy_folder(&fixture("z_image"), &dir.path().join("z"));
    let init = &tiny.goldens["init"];
    let (_, height, width, _) = init.dims4().unwrap();
    let rgb = init.flatten_all().unwrap().to_vec1::<u8>().unwrap();
    let init = Image { width, height, rgb };
    std::fs::write(
        dir.path().join("init.png"),
        init.encode(sdgen::image::Format::Png, None).unwrap(),
    )
    .unwrap();
    for (i, run) in tiny.facts["runs"].as_array().unwrap().iter().enumerate() {
        let text = |key: &str| run[key].as_str().unwrap().to_string();
        let given = |key: &str| run[key].to_string();
        let mut command = sdgen(dir.path());
        command.args(["-m", "z", "-o", "x.png", "--force"]);
        command.args([&text("prompt"), "--negative", &text("negative")]);
        for (option, key) in [
            ("-s", "seed"),
            ("-W", "width"),
            ("-H", "height"),
            ("--steps", "steps"),
            ("-g", "guidance"),
        ] {
            command.args([option, &given(key)]);
        }
        if !run["strength"].is_null() {
            command.args(["-i", "init.png", "--strength", &given("strength")]);
        }
        succeed(&mut command);
        let golden = levels(&tiny.goldens[&format!("run.{i}.picture")]);
        assert_same_levels(
            &format!("run {i}"),
            &pixels(&dir.path().join("x.png")),
            &golden,
        );
    }
}

#[test]
fn t5_reads_prompts_with_their_padding_and_clip_the_whole_text() {
    for (name, tokens, before, width) in [("flux", 512, 0, 24), ("sd3", 256, 77, 40)] {
        let tiny = tiny(name);
        let encoder = tiny.encoder();
        for (i, case) in tiny.facts["text"].as_array().unwrap().iter().enumerate() {
            let prompt = case["prompt"].as_str().unwrap();
            let (embeds, cut) = encoder.encode(prompt, 0, Syntax::Plain, None).unwrap();
            assert_eq!(cut, None);
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            let of_t5 = &embeds.token_ids[embeds.token_ids.len() - tokens..];
            assert_eq!(of_t5[..ids.len()], ids, "{prompt}");
            assert!(of_t5[ids.len()..].iter().all(|id| *id == 0));
            if name == "flux" {
                let ids: Vec<u32> = serde_json::from_value(case["clip_ids"].clone()).unwrap();
                assert_eq!(embeds.token_ids[..77], ids, "{prompt}");
            }
            assert_eq!(embeds.prompt_embeds.dims(), [1, before + tokens, width]);
            let rows: Vec<u32> = serde_json::from_value(case["rows"].clone()).unwrap();
            let rows = Tensor::new(rows, &Device::Cpu).unwrap();
            let got = embeds.prompt_embeds.index_select(&rows, 1).unwrap();
            tiny.compare(&format!("text.{i}"), &got, NETWORK);
            let pooled = embeds.pooled_prompt_embeds.unwrap();
            tiny.compare(&format!("pooled.{i}"), &pooled, NETWORK);
        }
        // what is too long ends with the end token
        let (embeds, cut) = encoder
            .encode(&"frog ".repeat(600), 0, Syntax::Plain, None)
            .unwrap();
        assert!(cut.unwrap().ends_with("frog "));
        assert_eq!(embeds.token_ids.last(), Some(&1));
    }
    let dir = tempfile::tempdir().unwrap();
    let without = tiny_at(&sd3_without_t5(dir.path()), "sd3");
    let (embeds, _) = without
        .encoder()
        .encode("a frog in a top hat", 0, Syntax::Plain, None)
        .unwrap();
    let shape: Vec<usize> = serde_json::from_value(without.facts["without"].clone()).unwrap();
    assert_eq!(embeds.prompt_embeds.dims(), shape);
    let [of_clip, zeros] = [(0, 100), (100, 233)]
        .map(|(from, len)| embeds.prompt_embeds.narrow(1, from, len).unwrap());
    without.compare("without.text", &of_clip, NETWORK);
    assert_eq!(largest(&zeros), 0.0);
    let pooled = embeds.pooled_prompt_embeds.unwrap();
    without.compare("without.pooled", &pooled, NETWORK);
}

#[test]
fn transformers_of_text_and_picture_predict_the_same_velocities() {
    let dir = tempfile::tempdir().unwrap();
    let variant = |part: &str| {
        let model = dir.path().join(part);
        copy_folder(&fixture("sd3"), &model);
        std::fs::remove_dir_all(model.join("transformer")).unwrap();
        std::fs::rename(model.join(part), model.join("transformer")).unwrap();
        tiny_at(&model, "sd3")
    };
    for (tiny, name, timestep) in [
        (tiny("flux"), "transformer", 700.0),
        (tiny("sd3"), "transformer", 712.5),
        (variant("transformer_plain"), "transformer_plain", 712.5),
        (variant("transformer_large"), "transformer_large", 712.5),
    ] {
        let backbone = tiny.backbone();
        let golden = |name: &str| tiny.goldens[&format!("transformer.{name}")].clone();
        let latents = golden("latents");
        let (context, pooled) = (golden("context"), golden("pooled"));
        let velocities = |rows: std::ops::Range<usize>| {
            let part = |x: &Tensor| x.narrow(0, rows.start, rows.len()).unwrap();
            let prompt = PromptEmbeds {
                token_ids: vec![],
                prompt_embeds: part(&context),
                pooled_prompt_embeds: Some(part(&pooled)),
            };
            let conditioning = Conditioning {
                lengths: vec![],
                ..told(&[prompt], 3.5)
            };
            let bound = backbone
                .bind(cx(), &conditioning, ExtraInputs::default())
                .unwrap();
            bound.forward(&part(&latents), timestep).unwrap()
        };
        let all = velocities(0..2);
        tiny.compare(&format!("{name}.output"), &all, NETWORK);
        // each picture of a batch as alone
        let alone = velocities(1..2);
        assert_eq!(values(&alone), values(&all.narrow(0, 1, 1).unwrap()));
    }
}

#[test]
fn t5_takes_as_many_tokens_as_it_is_told_up_to_512_and_no_other_encoder_is_told() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&fixture("flux"), &dir.path().join("flux"));
    copy_folder(&fixture("klein"), &dir.path().join("klein"));
    let draw = |model: &str, args: &[&str]| {
        let mut command = sdgen(dir.path());
        command
            .args(["-m", model, "--steps", "1", "-W", "32", "-H", "32"])
            .args(args);
        command
    };
    let cases: [(&str, &str, &[&str]); 3] = [
        (
            "klein",
            "64",
            &["means nothing to `klein`", "hint: leave it out"],
        ),
        (
            "flux",
            "513",
            &[
                "513 tokens",
                "hint: `--max-sequence-length` is a number from 1 to 512",
            ],
        ),
        ("flux", "0", &["--max-sequence-length"]),
    ];
    for (model, length, says) in cases {
        let args = ["a frog", "--max-sequence-length", length];
        fail(&mut draw(model, &args), 2, says);
    }
    // those of another length are not in one batch, nor is one's embedding the other's; from a list
    let prompt = "a frog in a top hat";
    let line = |more: &str| format!(r#"{{"prompt": "{prompt}", "seed": 1{more}}}"#);
    let jobs = [
        line(""),
        line(r#", "max_sequence_length": 4"#),
        line(r#", "max-sequence-length": 512"#),
    ];
    std::fs::write(dir.path().join("jobs.jsonl"), jobs.join("\n")).unwrap();
    let list = [
        "--from",
        "jobs.jsonl",
        "--batch-size",
        "3",
        "-o",
        "list/{index}.png",
    ];
    let said = succeed(&mut draw("flux", &list));
    let said = String::from_utf8_lossy(&said.stderr);
    assert!(said.contains("this was cut off"), "{said}");
    let alone = [
        prompt,
        "-s",
        "1",
        "--max-sequence-length",
        "4",
        "-o",
        "x.png",
    ];
    succeed(&mut draw("flux", &alone));
    let pictures = std::fs::read_dir(dir.path().join("list")).unwrap();
    let mut paths: Vec<_> = pictures.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let [usual, short, whole] = [0, 1, 2].map(|i| pixels(&paths[i]));
    assert_eq!(short, pixels(&dir.path().join("x.png")));
    assert_ne!(short, usual);
    assert_eq!(whole, usual);
}

#[test]
fn blocks_are_left_out_of_stable_diffusion_3_alone_and_by_their_numbers() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&fixture("sd3"), &dir.path().join("sd3"));
    let draw = |model: &str, args: &[&str]| {
        let mut command = sdgen(dir.path());
        command
            .args([
                "a frog", "-s", "1", "--steps", "4", "-W", "32", "-H", "32", "-m", model,
            ])
            .args(["-o", "x.png", "--force", "-q"])
            .args(args);
        command
    };
    let flux = fixture("flux");
    let flux = flux.to_str().unwrap();
    let cases: [(&str, &[&str], &str); 5] = [
        (flux, &["--skip-layer-guidance", "2.8"], "means nothing to"),
        (
            "sd3",
            &["--skip-layer-guidance", "2.8"],
            "names the block 7, `sd3` has those from 0 to 2",
        ),
        (
            "sd3",
            &["-g", "1", "--skip-layer-guidance", "2.8:1"],
            "needs guidance",
        ),
        (
            "sd3",
            &["--skip-layer-guidance", "2.8:one"],
            "SCALE[:BLOCKS[:START:STOP]]",
        ),
        (
            "sd3",
            &["--skip-layer-guidance", "2.8:1:0.5:0.2"],
            "SCALE[:BLOCKS[:START:STOP]]",
        ),
    ];
    for (model, args, says) in cases {
        fail(&mut draw(model, args), 2, &[says]);
    }
    let picture = |args: &[&str]| {
        succeed(&mut draw("sd3", args));
        pixels(&dir.path().join("x.png"))
    };
    let plain = picture(&[]);
    // one of four steps, the second, is strictly between the hundredth and two fifths of them
    let skipping = picture(&["--skip-layer-guidance", "2.8:1:0.01:0.4"]);
    assert_ne!(plain, skipping);
    assert_eq!(plain, picture(&["--skip-layer-guidance", "0:1:0.01:0.4"]));
    assert_eq!(plain, picture(&["--skip-layer-guidance", "2.8:1:0.3:0.5"]));
    // in a batch as alone, and from a list
    let jobs = r#"{"prompt": "a frog", "seed": 2, "skip_layer_guidance": "2.8:1:0.01:0.4"}
{"prompt": "a frog", "seed": 1, "skip_layer_guidance": "2.8:1:0.01:0.4"}"#;
    std::fs::write(dir.path().join("jobs.jsonl"), jobs).unwrap();
    let mut command = sdgen(dir.path());
    command
        .args([
            "--from",
            "jobs.jsonl",
            "--steps",
            "4",
            "-W",
            "32",
            "-H",
            "32",
            "-m",
            "sd3",
        ])
        .args(["-o", "{seed}.png", "--batch-size", "2", "-q"]);
    succeed(&mut command);
    assert_eq!(skipping, pixels(&dir.path().join("1.png")));
}

/// FLUX.1 with a transformer that is told of a picture.
fn flux_told(told: &str, to: &Path) {
    copy_folder(&fixture("flux"), to);
    std::fs::remove_dir_all(to.join("transformer")).unwrap();
    let transformer = fixture(&format!("flux_told/{told}"));
    copy_folder(&transformer, &to.join("transformer"));
}

#[test]
fn dev_with_a_control_lora_draws_by_a_picture_as_in_diffusers() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&fixture("flux"), &dir.path().join("flux"));
    let look = crate::references::picture((100, 70));
    let bytes = look.encode(sdgen::image::Format::Png, None).unwrap();
    std::fs::write(dir.path().join("look.png"), bytes).unwrap();
    let name = "flux1-canny-dev-lora.safetensors";
    let file = fixture(&format!("control_lora/{name}"));
    std::fs::copy(file, dir.path().join(name)).unwrap();
    let tensors = load(&fixture("control_lora/goldens.safetensors"));
    let facts = goldens("control_lora");
    let runs = facts["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 2);
    for (i, run) in runs.iter().enumerate() {
        let of = |key: &str| run[key].to_string();
        let lora = match run["lora"].as_f64() {
            Some(strength) => format!("{name}:{strength}"),
            None => name.into(),
        };
        let (seed, width, height) = (of("seed"), of("width"), of("height"));
        let (steps, guidance) = (of("steps"), of("guidance"));
        let shape = ["-s", &seed, "-W", &width, "-H", &height];
        let prompt = run["prompt"].as_str().unwrap();
        let how = [prompt, "--steps", &steps, "-g", &guidance, "-o", "x.png"];
        let with = ["--lora", &lora, "--strict", "--reference", "look.png"];
        let args = [&shape[..], &how, &with, &["--force"]].concat();
        succeed(sdgen(dir.path()).args(["-m", "flux"]).args(&args));
        let drawn = pixels(&dir.path().join("x.png"));
        let golden = levels(&tensors[&format!("run.{i}.picture")]);
        assert_same_levels(&lora, &drawn, &golden);
        succeed(sdgen(dir.path()).args(["check", "x.png", "-m", "flux", "--lora", &lora]));
    }
    // it asks for the picture, and its name sets the guidance
    let mut dry = sdgen(dir.path());
    dry.args(["x", "-m", "flux", "--lora", name, "--dry-run", "--json"]);
    fail(
        &mut dry,
        2,
        &["by the edges or the depth", "`--reference FILE`"],
    );
    let told = succeed(dry.args(["--reference", "look.png"]));
    let told: Value = serde_json::from_slice(&told.stdout).unwrap();
    assert_eq!(told["guidance"], 30.0);
}

#[test]
fn models_that_are_told_of_a_picture_say_what_they_need_and_draw_larger_too() {
    let dir = tempfile::tempdir().unwrap();
    let picture = crate::references::picture((100, 70));
    let bytes = picture.encode(sdgen::image::Format::Png, None).unwrap();
    std::fs::write(dir.path().join("look.png"), bytes).unwrap();
    for (told, name, takes, guidance) in [
        (
            "fill",
            "flux-fill",
            "a picture and a mask: for inpainting",
            30,
        ),
        ("control", "flux-canny", "a picture of edges or depth", 30),
        ("control", "flux-depth", "a picture of edges or depth", 10),
    ] {
        flux_told(told, &dir.path().join(name));
        let said = stdout(&succeed(sdgen(dir.path()).args(["inspect", name])));
        let defaults = format!("50 steps of euler, guidance {guidance}");
        assert!(said.contains(takes) && said.contains(&defaults), "{said}");
    }
    let draw = |args: &[&str]| {
        let mut command = sdgen(dir.path());
        command.args([
            "a frog", "-s", "1", "--steps", "2", "-o", "x.png", "--force", "-q",
        ]);
        command.args(args);
        command
    };
    let cases: [(&[&str], &str); 5] = [
        (&["-m", "flux-fill"], "`flux-fill` is for inpainting"),
        (&["-m", "flux-fill", "-i", "look.png"], "white is repainted"),
        (
            &["-m", "flux-depth"],
            "draws by the edges or the depth of a picture",
        ),
        (
            &[
                "-m",
                "flux-canny",
                "--reference",
                "look.png",
                "--reference",
                "look.png",
            ],
            "2 reference pictures are too many",
        ),
        (
            &["-m", "flux-canny", "--reference", "none.png"],
            "`none.png`",
        ),
    ];
    for (args, says) in cases {
        fail(&mut draw(args), 2, &[says, "hint: "]);
    }
    // a picture has the size of the one that it is drawn by, in whole latents
    let size = |args: &[&str]| {
        succeed(&mut draw(args));
        let drawn = Image::decode(&std::fs::read(dir.path().join("x.png")).unwrap()).unwrap();
        (drawn.width, drawn.height, drawn.rgb)
    };
    let by = ["-m", "flux-depth", "--reference", "look.png"];
    let own = size(&by);
    assert_eq!((own.0, own.1), (96, 64));
    let larger = size(&[&by[..], &["-W", "48", "-H", "32", "--hires", "2x"]].concat());
    assert_eq!((larger.0, larger.1), (96, 64));
    assert_ne!(own.2, larger.2);
    // and may be drawn over another one, of which a part is repainted
    let over = [
        "-i", "look.png", "--mask", "look.png", "-W", "96", "-H", "64",
    ];
    let over = size(&[&by[..], &over].concat());
    assert_ne!(own.2, over.2);
}

#[test]
fn pictures_of_flux_and_sd3_are_diffusers_own_with_all_guidance_and_from_a_picture() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["flux", "sd3"] {
        copy_folder(&fixture(name), &dir.path().join(name));
    }
    flux_schnell(dir.path());
    sd3_without_t5(dir.path());
    copy_folder(&fixture("flux"), &dir.path().join("flux-kontext"));
    edit_json(&dir.path().join("flux-kontext/model_index.json"), |index| {
        index.insert("_class_name".into(), "FluxKontextPipeline".into());
    });
    let look = crate::references::picture((100, 70));
    std::fs::write(
        dir.path().join("look.png"),
        look.encode(sdgen::image::Format::Png, None).unwrap(),
    )
    .unwrap();
    let tiny_vae = fixture("taesd/vae");
    for told in ["fill", "control"] {
        flux_told(told, &dir.path().join(told));
    }
    for (model, of, name, runs) in [
        ("flux", "flux", "run", 4),
        ("flux-schnell", "flux", "schnell_run", 2),
        ("flux-kontext", "flux", "kontext_run", 2),
        ("fill", "flux_told", "fill_run", 2),
        ("control", "flux_told", "control_run", 2),
        ("flux", "flux_told", "tiny_run", 2),
        ("sd3", "sd3", "run", 4),
        ("sd3", "sd3", "skip_run", 1),
        ("flux", "flux", "length_run", 2),
        ("sd3", "sd3", "length_run", 2),
        ("sd3-without", "sd3", "without_length_run", 1),
        ("sd3-without", "sd3", "without_run", 1),
    ] {
        let tensors = load(&fixture(&format!("{of}/goldens.safetensors")));
        let save = |name: &str| {
            let (_, height, width, _) = tensors[name].dims4().unwrap();
            let rgb = levels(&tensors[name]);
            let image = Image { width, height, rgb };
            let bytes = image.encode(sdgen::image::Format::Png, None).unwrap();
            std::fs::write(dir.path().join(format!("{name}.png")), bytes).unwrap();
            image.rgb
        };
        let init = save("init");
        let mask = (model == "fill").then(|| save("mask"));
        let facts = goldens(of);
        let all = facts[format!("{name}s")].as_array().unwrap();
        assert_eq!(all.len(), runs);
        for (i, run) in all.iter().enumerate() {
            let mut command = sdgen(dir.path());
            command.args(["-m", model, "-o", "x.png", "--force"]);
            if name == "tiny_run" {
                command.arg("--vae").arg(&tiny_vae);
            }
            command.arg(run["prompt"].as_str().unwrap());
            for (option, key) in [
                ("-s", "seed"),
                ("-W", "width"),
                ("-H", "height"),
                ("--steps", "steps"),
                ("-g", "guidance"),
                ("--true-guidance", "true_guidance"),
                ("--skip-layer-guidance", "skip_layer_guidance"),
                ("--strength", "strength"),
                ("--negative", "negative"),
                ("--clip-skip", "clip_skip"),
                ("--max-sequence-length", "max_sequence_length"),
            ] {
                match &run[key] {
                    Value::Null => continue,
                    Value::String(text) => command.args([option, text]),
                    number => command.args([option, &number.to_string()]),
                };
            }
            if !run["strength"].is_null() {
                command.args(["-i", "init.png"]);
            }
            if !run["reference"].is_null() {
                command.args(["--reference", "look.png"]);
            }
            let mut golden = levels(&tensors[&format!("{name}.{i}.picture")]);
            if let Some(mask) = &mask {
                command.args(["--mask", "mask.png", "--feather", "0"]);
                // diffusers does not put the source back
                for ((golden, mask), init) in golden.iter_mut().zip(mask).zip(&init) {
                    *golden = if *mask < 128 { *init } else { *golden };
                }
            }
            succeed(&mut command);
            assert_same_levels(
                &format!("{model} {i}"),
                &pixels(&dir.path().join("x.png")),
                &golden,
            );
            if name != "tiny_run" {
                succeed(sdgen(dir.path()).args(["check", "x.png", "-m", model]));
            }
        }
    }
    // a picture is as large as what the model looks at, and only Kontext looks at one
    let looking = ["x", "--reference", "look.png", "--dry-run", "--json"];
    let told = succeed(sdgen(dir.path()).args(["-m", "flux-kontext"]).args(looking));
    let told = stdout(&told);
    assert!(told.contains("1248") && told.contains("832"), "{told}");
    for (model, more, says) in [
        ("flux", None, "`--reference` means nothing to `flux`"),
        (
            "flux-kontext",
            Some(["--reference", "init.png"]),
            "2 reference pictures are too many",
        ),
    ] {
        let mut command = sdgen(dir.path());
        command
            .args(["-m", model])
            .args(looking)
            .args(more.iter().flatten());
        fail(&mut command, 2, &[says, "hint: "]);
    }
}

#[test]
fn a_large_transformer_in_f32_is_kept_in_bf16() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("z");
    copy_folder(&fixture("z_image"), &model);
    // zeros, which take no room on the disk
    let open = |rows: usize| {
        let bytes = rows * 4096 * 4;
        let tensors = [
            ("large", format!("[{rows},4096]"), 0, bytes),
            ("norm", "[4]".into(), bytes, bytes + 16),
            ("small", "[2,2]".into(), bytes + 16, bytes + 32),
        ];
        let entries: Vec<String> = tensors
            .iter()
            .map(|(name, shape, from, to)| {
                format!(
                    r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}"#
                )
            })
            .collect();
        let header = format!("{{{}}}", entries.join(","));
        let path = model.join("transformer/diffusion_pytorch_model.safetensors");
        let start = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
        std::fs::write(&path, &start).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len((start.len() + bytes + 32) as u64).unwrap();
        let checkpoint = Checkpoint::open(Origin::Path(&model)).unwrap();
        let weights = checkpoint.weights("transformer", &Device::Cpu, DType::F32);
        let kept = weights.get_stored("small", &[2, 2]).unwrap().dtype();
        let norm = weights.get_stored("norm", &[4]).unwrap().dtype();
        (kept, norm, checkpoint.stored_bytes("transformer"))
    };
    let wide = 1000 * 4096 * 4 + 32;
    assert_eq!(open(1000), (DType::F32, DType::F32, wide));
    // more than 4 GiB
    let narrow = 270_000 * 4096 * 2 + 16;
    assert_eq!(open(270_000), (DType::BF16, DType::F32, narrow));
}

#[test]
fn blocks_that_are_read_again_in_every_step_draw_the_same() {
    for name in ["klein", "z_image", "flux", "sd3"] {
        let tiny = tiny(name);
        let shared = Arc::new(Checkpoint::open(Origin::Path(&fixture(name))).unwrap());
        let again = || -> SharedSource { shared.clone() };
        let compute = Compute::cpu();
        let configs = TextEncoderConfigs::of(&shared).unwrap();
        let encoder = PromptEncoder::new(&shared, &configs, &compute, Some(again())).unwrap();
        let embeds =
            |encoder: &PromptEncoder| encoder.encode("a frog", 0, Syntax::Plain, None).unwrap().0;
        let prompt = embeds(&encoder);
        let kept = embeds(&tiny.encoder()).prompt_embeds;
        assert_eq!(values(&prompt.prompt_embeds), values(&kept), "{name}");
        let weights = shared.weights("transformer", &Device::Cpu, DType::F32);
        let config = BackboneConfig::of(&shared).unwrap();
        let backbone = config.build(&weights.reading_again(Some(again()))).unwrap();
        let latents = &tiny.goldens["transformer.latents"].narrow(0, 0, 1).unwrap();
        let [read, kept] = [&backbone, &tiny.backbone()].map(|backbone| {
            let conditioning = told(std::slice::from_ref(&prompt), 3.5);
            let bound = backbone
                .bind(cx(), &conditioning, ExtraInputs::default())
                .unwrap();
            // as often as there are steps
            bound.forward(latents, 900.0).unwrap();
            values(&bound.forward(latents, 700.0).unwrap())
        });
        assert_eq!(read, kept, "{name}");
    }
}
