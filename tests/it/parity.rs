//! The same numbers as diffusers, stage by stage, on tiny random checkpoints of four kinds
//! (tests/fixtures/README.md). Every comparison names the first tensor that differs, by how much,
//! and what was allowed.

use crate::common::{assert_same_levels, goldens, levels, sampler_of, values, with_base};
use candle_core::{DType, Device, Tensor};
use sdgen::image::Image;
use sdgen::model::unet::{UNet, UNetInputs};
use sdgen::model::unet_config::{PerBlock, UNetConfig};
use sdgen::model::{AddedCond, Autoencoder, Conditioning, Decoder, Denoiser, tiles};
use sdgen::nn::Forward;
use sdgen::nn::device::{Compute, DTypeChoice, DeviceChoice};
use sdgen::pipeline::guidance::{CfgDenoiser, DeepCache, Guidance};
use sdgen::sampling::noise::Generator;
use sdgen::sampling::{self, Sampler, SchedulerConfig, plan};
use sdgen::text::encoder::{PromptEmbeds, PromptEncoder, TextEncoderConfigs};
use sdgen::text::prompt::Syntax;
use sdgen::text::tokenizer::Tokenizer;
use sdgen::weights::{Checkpoint, ENCODERS, Origin};
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};

const MODELS: [&str; 4] = ["sd1", "sd2", "odd", "sdxl"];
const REFINER: &str = "sdxl_refiner";
/// those that share parts with one of the others
const VARIANTS: [&str; 7] = ["turbo", "lcm", "ztsnr", "bksdm", "ssd", "vega", "taesd"];
/// f32 sums in another order than torch's
const NETWORK: f32 = 1e-4;
/// several guided steps multiply those differences
const LATENTS: f32 = 1e-3;

struct Fixture {
    checkpoint: Checkpoint,
    tensors: HashMap<String, Tensor>,
    json: Value,
}

fn fixture(name: &str) -> Fixture {
    let whole = tempfile::tempdir().unwrap();
    with_base(name, whole.path());
    Fixture {
        checkpoint: Checkpoint::open(Origin::Path(whole.path())).unwrap(),
        tensors: fixture_tensors(name),
        json: goldens(name),
    }
}

/// Where the networks run: the CPU, or what SDGEN_TEST_DEVICE names, as `--device` does.
/// `tests/bench/gpu.sh` sets it.
fn device() -> Device {
    let choice =
        std::env::var("SDGEN_TEST_DEVICE").map_or(DeviceChoice::Cpu, |name| name.parse().unwrap());
    Compute::choose(choice, DTypeChoice::F32).unwrap().device
}

fn cx() -> Forward<'static> {
    Forward::on(&device())
}

fn fixture_tensors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(
        crate::common::fixture(name).join("goldens.safetensors"),
        &device(),
    )
    .unwrap()
}

impl Fixture {
    fn golden(&self, name: &str) -> &Tensor {
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("no golden `{name}`"))
    }

    fn encoder(&self) -> PromptEncoder {
        let compute = Compute {
            device: device(),
            ..Compute::cpu()
        };
        PromptEncoder::new(
            &self.checkpoint,
            &TextEncoderConfigs::of(&self.checkpoint).unwrap(),
            &compute,
            None,
        )
        .unwrap()
    }

    /// What the pictures of the U-Net's goldens are told, or one of them.
    fn told(&self, one: Option<usize>) -> Conditioning {
        let rows = |name: &str| {
            let all = self.golden(name);
            one.map_or(all.clone(), |i| all.narrow(0, i, 1).unwrap())
        };
        let added = self.tensors.contains_key("unet.ids").then(|| AddedCond {
            text_embeds: rows("unet.pooled"),
            time_ids: rows("unet.ids")
                .to_dtype(DType::F64)
                .unwrap()
                .to_vec2()
                .unwrap(),
        });
        Conditioning {
            context: rows("unet.context"),
            lengths: vec![],
            added_cond: added,
            guidance: None,
        }
    }

    fn unet(&self) -> UNet {
        let config = UNetConfig::from_json(self.checkpoint.config("unet").unwrap()).unwrap();
        UNet::new(
            &self.checkpoint.weights("unet", &device(), DType::F32),
            &config,
        )
        .unwrap()
    }

    fn decoder(&self) -> Decoder {
        let config = Autoencoder::from_json(self.checkpoint.config("vae").unwrap()).unwrap();
        config
            .decoder(&self.checkpoint.weights("vae", &device(), DType::F32))
            .unwrap()
    }
}

/// The largest difference, relative to the largest golden value.
fn compare(name: &str, got: &Tensor, golden: &Tensor, tolerance: f32) {
    assert_eq!(got.dims(), golden.dims(), "{name}: shape");
    let golden = golden.to_dtype(DType::F32).unwrap();
    let difference = crate::common::difference(got, &golden);
    assert!(
        difference <= tolerance,
        "{name} is the first that differs: {difference:e} relative, {tolerance:e} allowed\n got {:?}\nwant {:?}",
        &values(got)[..6],
        &values(&golden)[..6]
    );
}

#[test]
fn prompts_become_the_same_ids_and_embeddings() {
    let mut compared = 0;
    let mut compare = |name: &str, got: &Tensor, golden: &Tensor, tolerance: f32| {
        compare(name, got, golden, tolerance);
        compared += 1;
    };
    for model in MODELS.into_iter().chain([REFINER]) {
        let f = fixture(model);
        let encoder = f.encoder();
        for (i, case) in f.json["text"].as_array().unwrap().iter().enumerate() {
            let prompt = case["prompt"].as_str().unwrap();
            let ids = |key: &str| -> Vec<u32> {
                case[key]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|v| v.as_u64().unwrap() as u32)
                    .collect()
            };
            let (embedded, cut) = encoder.encode(prompt, 0, Syntax::Plain, None).unwrap();
            for (part, key) in ENCODERS.into_iter().zip(["ids", "ids_2"]) {
                let Ok(source) = f.checkpoint.tokenizer(part) else {
                    continue;
                };
                let tokenizer = Tokenizer::new(&source.files, &source.config).unwrap();
                let tokens = tokenizer.encode(prompt, ids(key).len()).unwrap();
                let uncut = ids(&format!("{key}_uncut"));
                assert_eq!(tokens.ids, ids(key), "{model}: {key} of `{prompt}`");
                assert_eq!(
                    tokenizer.ids(prompt).unwrap(),
                    uncut,
                    "{model}: uncut {key} of `{prompt}`"
                );
                assert_eq!(
                    tokens.cut.is_some(),
                    uncut.len() > tokens.ids.len(),
                    "{model}: cut of `{prompt}`"
                );
                assert_eq!(cut, tokens.cut, "{model}: cut of `{prompt}`");
            }
            compare(
                &format!("{model} text.{i}.embeds"),
                &embedded.prompt_embeds,
                f.golden(&format!("text.{i}.embeds")),
                NETWORK,
            );
            if let Some(pooled) = embedded.pooled_prompt_embeds {
                compare(
                    &format!("{model} text.{i}.pooled"),
                    &pooled,
                    f.golden(&format!("text.{i}.pooled")),
                    NETWORK,
                );
            }
            for skip in [1, 2] {
                let name = format!("text.{i}.embeds_clip_skip_{skip}");
                if f.tensors.contains_key(&name) {
                    compare(
                        &format!("{model} {name}"),
                        &encoder
                            .encode(prompt, skip, Syntax::Plain, None)
                            .unwrap()
                            .0
                            .prompt_embeds,
                        f.golden(&name),
                        NETWORK,
                    );
                }
            }
        }
    }
    // five models: four texts each, pooled for SDXL's two, one text with one layer skipped, and
    // three times with two
    assert_eq!(compared, 5 * 4 + 2 * 4 + 5 + 3);
}

#[test]
fn the_unet_predicts_the_same_after_every_block() {
    let mut all = 0;
    for model in MODELS.into_iter().chain([REFINER]).chain(VARIANTS) {
        let f = fixture(model);
        let unet = f.unet();
        for case in f.json["unet"].as_array().into_iter().flatten() {
            let name = case["name"].as_str().unwrap();
            let start = format!("unet.{name}.");
            let mut left: BTreeSet<&str> = f
                .tensors
                .keys()
                .filter_map(|golden| golden.strip_prefix(&start))
                .filter(|block| !["latents", "timesteps"].contains(block) && !is_inner(block))
                .collect();
            all += left.len();
            let latents = f.golden(&format!("unet.{name}.latents"));
            let timesteps = f
                .golden(&format!("unet.{name}.timesteps"))
                .to_vec1::<f32>()
                .unwrap();
            for (i, timestep) in timesteps.into_iter().enumerate() {
                let one = |t: &Tensor| t.narrow(0, i, 1).unwrap();
                let mut show = |block: &str, got: &Tensor| {
                    let golden = format!("unet.{name}.{block}");
                    if let Some(want) = f.tensors.get(&golden) {
                        compare(&format!("{model} {golden}[{i}]"), got, &one(want), NETWORK);
                        left.remove(block);
                    }
                };
                let told = Conditioning {
                    guidance: case["guidance"].as_f64(),
                    ..f.told(Some(i))
                };
                let out = unet
                    .with_conditioning(cx(), &told, None)
                    .unwrap()
                    .forward_traced(
                        UNetInputs::new(&one(latents), f64::from(timestep)),
                        &mut show,
                    )
                    .unwrap();
                compare(
                    &format!("{model} unet.{name}.out[{i}]"),
                    &out,
                    &one(f.golden(&format!("unet.{name}.out"))),
                    NETWORK,
                );
                left.remove("out");
            }
            assert!(
                left.is_empty(),
                "{model} {start}: {left:?} are not compared"
            );
        }
    }
    assert_eq!(all, 113, "goldens of U-Nets");
}

/// Whether a golden is from within a block: our network shows whole blocks only. What differs there
/// makes the block differ.
fn is_inner(golden: &str) -> bool {
    ["conv_norm_out", "time_embedding"].contains(&golden)
        || golden.contains(".attentions.")
        || golden.contains(".resnets.")
}

/// Groups of one channel would take out all that the timestep adds, and the test above would not
/// see it missing.
#[test]
fn what_is_compared_depends_on_the_timestep() {
    let mut compared = 0;
    for model in MODELS.into_iter().chain([REFINER]).chain(VARIANTS) {
        let f = fixture(model);
        if let Some(latents) = f.tensors.get("unet.square.latents") {
            let (unet, told) = (
                f.unet(),
                Conditioning {
                    guidance: f.json["unet"][0]["guidance"].as_f64(),
                    ..f.told(None)
                },
            );
            let at = |timestep: f64| {
                unet.with_conditioning(cx(), &told, None)
                    .unwrap()
                    .forward(UNetInputs::new(latents, timestep))
                    .unwrap()
            };
            let (early, late) = (at(400.0), at(20.0));
            // a hundred times what is allowed between us and diffusers
            assert!(
                crate::common::difference(&late, &early) > 100.0 * NETWORK,
                "{model}: the timestep changes nothing"
            );
            compared += 1;
        }
    }
    assert_eq!(compared, 9, "U-Nets");
}

#[test]
fn the_vae_decodes_the_same_in_tiles() {
    let f = fixture("sd1");
    let (decoder, config) = (
        f.decoder(),
        Autoencoder::from_json(f.checkpoint.config("vae").unwrap()).unwrap(),
    );
    let latents = (f.golden("vae.tiled.latents") * 0.18215).unwrap();
    let decoded = tiles::apply(cx(), &latents, config.tile(), |cx, tile| {
        decoder.decode(cx, tile)
    })
    .unwrap();
    compare(
        "vae.tiled.decoded",
        &((decoded * 2.0).unwrap() - 1.0).unwrap(),
        f.golden("vae.tiled.decoded"),
        NETWORK,
    );
}

#[test]
fn the_vae_decodes_the_same() {
    for model in MODELS.into_iter().chain(["taesd"]) {
        let f = fixture(model);
        let decoder = f.decoder();
        for shape in ["square", "odd"] {
            let latents = f.golden(&format!("vae.{shape}.latents"));
            let decoded = match &decoder {
                Decoder::Kl(decoder) => decoder.forward(cx(), latents),
                // its scale is 1, and what diffusers' gives is in -1..=1
                Decoder::Tiny(decoder) => {
                    (decoder.decode(cx(), latents).unwrap() * 2.0).unwrap() - 1.0
                }
            };
            compare(
                &format!("{model} vae.{shape}.decoded"),
                &decoded.unwrap(),
                f.golden(&format!("vae.{shape}.decoded")),
                NETWORK,
            );
        }
    }
}

#[test]
fn the_vae_encodes_the_same() {
    let pictures = fixture_tensors("from_picture");
    for model in MODELS.into_iter().chain(["taesd"]) {
        let f = fixture(model);
        let config = Autoencoder::from_json(f.checkpoint.config("vae").unwrap()).unwrap();
        let encoder = config
            .encoder(&f.checkpoint.weights("vae", &device(), DType::F32))
            .unwrap();
        for shape in ["square", "wide"] {
            // those of later models are beside the runs that begin with a picture
            let later = format!("encode.{model}.{shape}");
            let golden = |name: &str| match pictures.get(&format!("{later}.{name}")) {
                Some(golden) => golden,
                None => f.golden(&format!("vae.{shape}.{name}")),
            };
            let picture = golden("picture");
            let rgb = match picture.dtype() {
                DType::U8 => {
                    (picture.to_dtype(DType::F32).unwrap().unsqueeze(0).unwrap() / 255.0).unwrap()
                }
                _ => ((picture / 2.0).unwrap() + 0.5).unwrap(),
            };
            let posterior = encoder.encode(cx(), &rgb, None).unwrap();
            let unscaled = |x: Tensor| match &config {
                Autoencoder::Kl(config) => (x / config.scaling_factor).unwrap(),
                Autoencoder::Tiny(_) => x,
            };
            compare(
                &format!("{model} vae.{shape}.mean"),
                &unscaled(posterior.mean),
                golden("mean"),
                NETWORK,
            );
            assert_eq!(
                posterior.std.is_some(),
                matches!(config, Autoencoder::Kl(_)),
                "{model}"
            );
            if let Some(std) = posterior.std {
                let logvar = (unscaled(std).log().unwrap() * 2.0).unwrap();
                compare(
                    &format!("{model} vae.{shape}.logvar"),
                    &logvar,
                    golden("logvar"),
                    NETWORK,
                );
            }
        }
    }
}

/// What all pictures of a run are told, a refiner's with a score.
fn told(embedded: &PromptEmbeds, run: &Value, score: Option<f64>) -> Conditioning {
    let count = run["count"].as_u64().unwrap() as usize;
    // (height, width), then (top, left), then (height, width)
    let own = [run["height"].clone(), run["width"].clone()];
    let pair = |key: &str| run[key].as_array().cloned().unwrap_or(own.to_vec());
    let mut ids: Vec<f64> = ["original_size", "crop", "target_size"]
        .into_iter()
        .flat_map(pair)
        .map(|n| n.as_f64().unwrap())
        .collect();
    if let Some(score) = score {
        ids.splice(4.., [score]);
    }
    let added = embedded
        .pooled_prompt_embeds
        .as_ref()
        .map(|pooled| AddedCond {
            text_embeds: pooled.repeat((count, 1)).unwrap(),
            time_ids: vec![ids; count],
        });
    Conditioning {
        context: embedded.prompt_embeds.repeat((count, 1, 1)).unwrap(),
        lengths: vec![],
        added_cond: added,
        guidance: run["guidance"].as_f64(),
    }
}

/// DeepCache has no counterpart in diffusers; for the same input what is reused is what would be
/// computed.
#[test]
fn reused_inner_levels_change_nothing_for_the_same_input_and_something_for_another() {
    for model in MODELS {
        let f = fixture(model);
        let unet = f.unet();
        let shape = f.json["unet"][0]["name"].as_str().unwrap();
        let (latents, unet) = (
            f.golden(&format!("unet.{shape}.latents")),
            unet.with_conditioning(cx(), &f.told(None), None).unwrap(),
        );
        let full = unet.forward(UNetInputs::new(latents, 500.0)).unwrap();
        let mut inner = None;
        for _ in 0..2 {
            compare(
                &format!("{model} reused"),
                &unet
                    .forward_cached(UNetInputs::new(latents, 500.0), &mut inner)
                    .unwrap(),
                &full,
                0.0,
            );
        }
        let other = (latents * 0.5).unwrap();
        let (reused, exact) = (
            unet.forward_cached(UNetInputs::new(&other, 100.0), &mut inner),
            unet.forward(UNetInputs::new(&other, 100.0)).unwrap(),
        );
        let difference = (reused.unwrap() - exact)
            .unwrap()
            .abs()
            .unwrap()
            .mean_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        assert!(
            difference > 1e-6,
            "{model}: the inner levels were not reused"
        );
    }
}

fn with<'a>(inputs: UNetInputs<'a>, down_residuals: &'a [Tensor]) -> UNetInputs<'a> {
    UNetInputs {
        down_residuals,
        ..inputs
    }
}

/// A residual of a skip connection is seen first by the up block that the skip leads to, as in
/// diffusers, where `down_block_additional_residuals` are not seen by the mid block.
#[test]
fn residuals_of_a_controlnet_are_added_to_the_skip_connections_and_after_the_mid_block() {
    for model in MODELS {
        let f = fixture(model);
        let unet = f.unet();
        let unet = unet.with_conditioning(cx(), &f.told(None), None).unwrap();
        let shape = f.json["unet"][0]["name"].as_str().unwrap();
        let inputs = UNetInputs::new(f.golden(&format!("unet.{shape}.latents")), 500.0);
        let config = UNetConfig::from_json(f.checkpoint.config("unet").unwrap()).unwrap();
        // the outputs of all blocks, by name
        let trace = |inputs: UNetInputs| {
            let mut blocks = vec![];
            let out = unet.forward_traced(inputs, &mut |name, x| {
                blocks.push((name.to_string(), x.clone()));
            });
            blocks.push(("out".into(), out.unwrap()));
            blocks
        };
        let plain = trace(inputs);
        let by_name = |name: &str| &plain.iter().find(|(block, _)| block == name).unwrap().1;
        let changed = |inputs: UNetInputs| {
            let blocks = trace(inputs);
            let mut each = plain.iter().zip(&blocks);
            let first = each.find(|((_, plain), (_, x))| {
                let off = (plain - x).unwrap().abs().unwrap().max_all().unwrap();
                off.to_scalar::<f32>().unwrap() > 0.0
            });
            first.map(|((name, _), _)| name.clone())
        };
        // the shape of every skip connection: conv_in's, and those of each down block's layers
        let levels = config.block_out_channels.len();
        let mut skips = vec![by_name("conv_in").zeros_like().unwrap()];
        let mut up_blocks = vec![levels - 1];
        for level in 0..levels {
            let (b, h, w, _) = skips.last().unwrap().dims4().unwrap();
            let c = config.block_out_channels[level];
            let layers = match &config.layers_per_block {
                PerBlock::One(layers) => *layers,
                PerBlock::Each(layers) => layers[level],
            };
            let zeros = |h, w| Tensor::zeros((b, h, w, c), DType::F32, &device()).unwrap();
            skips.extend((0..layers).map(|_| zeros(h, w)));
            up_blocks.extend((0..layers).map(|_| levels - 1 - level));
            if level + 1 < levels {
                let down = by_name(&format!("down_blocks.{level}")).dims4().unwrap();
                skips.push(zeros(down.1, down.2));
                up_blocks.push(levels - 2 - level);
            }
        }
        assert_eq!(changed(with(inputs, &skips)), None, "{model}: zeros");
        for (i, up_block) in up_blocks.into_iter().enumerate() {
            let mut residuals = skips.clone();
            residuals[i] = (&residuals[i] + 1.0).unwrap();
            assert_eq!(
                changed(with(inputs, &residuals)),
                Some(format!("up_blocks.{up_block}")),
                "{model}: skip {i}"
            );
        }
        let deepest = skips.last().unwrap().ones_like().unwrap();
        let mid = UNetInputs {
            mid_residual: Some(&deepest),
            ..inputs
        };
        assert_eq!(changed(mid), Some("up_blocks.0".into()), "{model}: mid");
        let too_few = unet
            .forward(with(inputs, &skips[1..]))
            .unwrap_err()
            .to_string();
        assert!(too_few.contains("skip connections"), "{too_few}");
    }
}

#[test]
fn latents_after_every_step_and_pictures_are_the_same() {
    let mut runs = 0;
    for model in MODELS.into_iter().chain(VARIANTS) {
        let f = fixture(model);
        let (encoder, unet, decoder) = (f.encoder(), f.unet(), f.decoder());
        let embeds_guidance = f.checkpoint.config("unet").unwrap()["time_cond_proj_dim"].is_u64();
        let config = SchedulerConfig::from_json(f.checkpoint.config("scheduler").unwrap())
            .unwrap()
            .for_pipeline();
        for run in f.json["runs"].as_array().unwrap() {
            let name = run["name"].as_str().unwrap();
            let count = run["count"].as_u64().unwrap() as usize;
            let (sampler, schedule) = sampler_of(run).unwrap_or((config.sampler().unwrap(), None));
            let steps = run["steps"].as_u64().unwrap() as usize;
            let eta = run["eta"].as_f64().filter(|e| *e > 0.0);
            let plan = plan(&config, sampler, schedule, steps, eta).unwrap();
            let skip = run["clip_skip"].as_u64().unwrap_or(0) as usize;
            let guidance = run["guidance"].as_f64().unwrap();
            let prompt = encoder
                .encode(run["prompt"].as_str().unwrap(), skip, Syntax::Plain, None)
                .unwrap()
                .0;
            let negative =
                (guidance > 1.0 && !embeds_guidance).then(|| {
                    match run["negative_prompt"].as_str() {
                        Some(text) => encoder.encode(text, 0, Syntax::Plain, None).unwrap().0,
                        None => prompt.zeros_like().unwrap(),
                    }
                });
            let (conditioning, negative) = (
                told(&prompt, run, None),
                negative.map(|negative| told(&negative, run, None)),
            );
            let deep_cache = DeepCache::every(1);
            let (scale, rescale) = (guidance, run["guidance_rescale"].as_f64().unwrap_or(0.0));
            let kind = if negative.is_some() {
                Guidance::Text(1)
            } else {
                Guidance::Off
            };
            let conditioning = match negative {
                Some(negative) => Conditioning::cat(&negative, &conditioning).unwrap(),
                None => conditioning,
            };
            let unet = unet.with_conditioning(cx(), &conditioning, None).unwrap();
            let mut guided = CfgDenoiser {
                skip: None,
                model: Denoiser::UNet(unet),
                guidance: kind,
                weights: vec![1.0],
                scale,
                rescale,
                deep_cache,
            };
            let first = f.golden(&format!("run.{name}.noise"));
            let (_, h, w, c) = first.dims4().unwrap();
            // picture i has seed + i, or its own seed where the run lists them
            let seed = |i: usize| {
                run["seeds"]
                    .get(i)
                    .and_then(Value::as_u64)
                    .unwrap_or(run["seed"].as_u64().unwrap() + i as u64)
            };
            let mut generators: Vec<Generator> =
                (0..count).map(|i| Generator::new(seed(i))).collect();
            let mut noise = || {
                Tensor::cat(
                    &generators
                        .iter_mut()
                        .map(|g| g.latents(h, w, c).unwrap())
                        .collect::<Vec<_>>(),
                    0,
                )?
                .to_device(&device())
            };
            let unit = noise().unwrap();
            compare(&format!("{model} run.{name}.noise"), &unit, first, 1e-6);
            let golden = f.golden(&format!("run.{name}.latents"));
            let mut compared = 0;
            let result = sampling::sample(
                &plan,
                (unit * plan.init_noise_sigma()).unwrap(),
                &mut |x, sigma, timestep| guided.denoise(x, plan.scalings(sigma), timestep),
                &mut noise,
                &mut |step| {
                    compare(
                        &format!("{model} run.{name}.latents[{}]", step.index),
                        step.latents,
                        &golden.get(step.index)?,
                        LATENTS,
                    );
                    compared += 1;
                    Ok(None)
                },
            )
            .unwrap();
            assert_eq!(
                compared,
                golden.dim(0).unwrap(),
                "{model} run.{name}: steps"
            );
            compare_pictures(&f, name, &decoder.decode(cx(), &result).unwrap());
            runs += 1;
        }
    }
    assert_eq!(runs, 59, "runs of all models");
}

/// Decoded pictures [b, h, w, 3] and the golden ones of a run.
fn compare_pictures(f: &Fixture, name: &str, decoded: &Tensor) {
    let golden = f.golden(&format!("run.{name}.image"));
    let pictures = Image::from_tensor(decoded).unwrap();
    assert_eq!(pictures.len(), golden.dim(0).unwrap(), "run.{name}");
    for (i, picture) in pictures.iter().enumerate() {
        let golden = levels(&golden.get(i).unwrap());
        assert_same_levels(&format!("picture {i} of run.{name}"), &picture.rgb, &golden);
    }
}

#[test]
fn a_refiner_goes_on_where_the_base_ends_as_in_diffusers() {
    let (base, refiner) = (fixture("sdxl"), fixture(REFINER));
    let stages = [
        (&base, base.encoder(), base.unet()),
        (&refiner, refiner.encoder(), refiner.unet()),
    ];
    let decoder = base.decoder();
    let runs = refiner.json["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 9);
    for run in runs {
        let name = run["name"].as_str().unwrap();
        let count = run["count"].as_u64().unwrap() as usize;
        let guidance = run["guidance"].as_f64().unwrap();
        let golden = refiner.golden(&format!("run.{name}.latents"));
        let (mut latents, mut compared) = (None::<Tensor>, 0);
        for (i, (f, encoder, unet)) in stages.iter().enumerate() {
            let config = SchedulerConfig::from_json(f.checkpoint.config("scheduler").unwrap())
                .unwrap()
                .for_pipeline();
            let (sampler, schedule) = sampler_of(run).unwrap_or((Sampler::Euler, None));
            let whole = plan(
                &config,
                sampler,
                schedule,
                run["steps"].as_u64().unwrap() as usize,
                None,
            )
            .unwrap();
            let plan = whole.split(run["refine_at"].as_f64().unwrap()).unwrap()[i].clone();
            if i == 0 {
                assert_eq!(
                    plan.evaluations() as u64,
                    run["base_steps"].as_u64().unwrap(),
                    "{name}: steps of the base"
                );
            }
            let scores = [[None, None], [Some(6.0), Some(2.5)]][i];
            let prompt = encoder
                .encode(run["prompt"].as_str().unwrap(), 0, Syntax::Plain, None)
                .unwrap()
                .0;
            // zeros for the base, the embedding of no text for the refiner
            let negative = match (run["negative_prompt"].as_str(), i) {
                (None, 0) => prompt.zeros_like().unwrap(),
                (text, _) => {
                    encoder
                        .encode(text.unwrap_or(""), 0, Syntax::Plain, None)
                        .unwrap()
                        .0
                }
            };
            let negative = (guidance > 1.0).then(|| told(&negative, run, scores[1]));
            let (conditioning, deep_cache) = (told(&prompt, run, scores[0]), DeepCache::every(1));
            let (scale, rescale) = (guidance, 0.0);
            let kind = if negative.is_some() {
                Guidance::Text(1)
            } else {
                Guidance::Off
            };
            let conditioning = match negative {
                Some(negative) => Conditioning::cat(&negative, &conditioning).unwrap(),
                None => conditioning,
            };
            let unet = unet.with_conditioning(cx(), &conditioning, None).unwrap();
            let mut guided = CfgDenoiser {
                skip: None,
                model: Denoiser::UNet(unet),
                guidance: kind,
                weights: vec![1.0],
                scale,
                rescale,
                deep_cache,
            };
            let first = match latents.take() {
                None => {
                    let noise = refiner.golden(&format!("run.{name}.noise"));
                    assert_eq!(noise.dim(0).unwrap(), count);
                    (noise * plan.init_noise_sigma()).unwrap()
                }
                Some(begun) => (begun * plan.handover_scale()).unwrap(),
            };
            let mut denoise = |x: &Tensor, sigma: f64, timestep: f64| {
                guided.denoise(x, plan.scalings(sigma), timestep)
            };
            let mut on_step = |step: &sampling::Step| {
                compare(
                    &format!("run.{name}.latents[{compared}]"),
                    step.latents,
                    &golden.get(compared)?,
                    LATENTS,
                );
                compared += 1;
                Ok(None)
            };
            let mut no_noise = || candle_core::bail!("none of these draws noise");
            latents = Some(
                sampling::sample(&plan, first, &mut denoise, &mut no_noise, &mut on_step).unwrap(),
            );
        }
        assert_eq!(compared, golden.dim(0).unwrap(), "{name}: steps");
        compare_pictures(
            &refiner,
            name,
            &decoder.decode(cx(), &latents.unwrap()).unwrap(),
        );
    }
}
