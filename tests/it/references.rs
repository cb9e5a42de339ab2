//! `--reference`: pictures that FLUX.2 klein looks at, against diffusers (`tests/fixtures/flow.py`).

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use sdgen::image::{Format, Image, read_metadata};
use sdgen::model::{Autoencoder, BackboneConfig, Conditioning, ExtraInputs};
use sdgen::nn::Forward;
use sdgen::nn::device::Compute;
use sdgen::pipeline::guidance::{CfgDenoiser, DeepCache, Guidance};
use sdgen::sampling::noise::Generator;
use sdgen::sampling::{self, Mu, Sampler, SchedulerConfig, plan};
use sdgen::text::encoder::{PromptEncoder, TextEncoderConfigs};
use sdgen::text::prompt::Syntax;
use sdgen::weights::{Checkpoint, Origin};
use sdgen::{ModelSpec, Params, Pipeline};
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;

const LATENTS: f32 = 1e-3;

/// The picture of this size that the goldens were drawn after.
pub fn picture((width, height): (usize, usize)) -> Image {
    let level = |x: usize, y: usize, c: usize| (x * (3 + c) + y * (5 + 2 * c) + x * y / 16) as u8;
    let pixel = |i: usize| [0, 1, 2].map(|c| level(i % width, i / width, c));
    Image {
        width,
        height,
        rgb: (0..width * height).flat_map(pixel).collect(),
    }
}

fn write(path: &Path, image: &Image) {
    std::fs::write(path, image.encode(Format::Png, None).unwrap()).unwrap();
}

fn runs() -> Vec<Value> {
    let runs = goldens("klein")["reference_runs"].clone();
    serde_json::from_value(runs).unwrap()
}

fn sizes(run: &Value) -> Vec<(usize, usize)> {
    serde_json::from_value(run["references"].clone()).unwrap()
}

/// A folder with a copy of klein, and the pictures `100.png` and `64.png`.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&fixture("klein"), &dir.path().join("klein"));
    write(&dir.path().join("100.png"), &picture((100, 70)));
    write(&dir.path().join("64.png"), &picture((64, 80)));
    dir
}

fn draw(folder: &Path, args: &[&str]) -> Command {
    let mut command = sdgen(folder);
    command.args(["-m", "klein", "--steps", "2", "--force"]);
    command.args(args);
    command
}

fn pixels_of(folder: &Path, args: &[&str]) -> Vec<u8> {
    succeed(draw(folder, args).args(["-o", "x.png"]));
    pixels(&folder.join("x.png"))
}

#[test]
fn latents_after_every_step_are_diffusers_own_with_one_reference_and_with_two_and_guidance() {
    let checkpoint = Checkpoint::open(Origin::Path(&fixture("klein"))).unwrap();
    let goldens = load(&fixture("klein/goldens.safetensors"));
    let weights = |part: &'static str| checkpoint.weights(part, &Device::Cpu, DType::F32);
    let cx = Forward::on(&Device::Cpu);
    let compute = Compute::cpu();
    let configs = TextEncoderConfigs::of(&checkpoint).unwrap();
    let text = PromptEncoder::new(&checkpoint, &configs, &compute, None).unwrap();
    let backbone = BackboneConfig::of(&checkpoint).unwrap();
    let backbone = backbone.build(&weights("transformer")).unwrap();
    let vae = Autoencoder::from_json(checkpoint.config("vae").unwrap()).unwrap();
    let vae = vae.encoder(&weights("vae")).unwrap();
    let scheduler = SchedulerConfig::from_json(checkpoint.config("scheduler").unwrap()).unwrap();
    let mut compared = 0;
    for (i, run) in runs().iter().enumerate() {
        let number = |key: &str| run[key].as_u64().unwrap() as usize;
        let (h, w) = (number("height") / 16, number("width") / 16);
        let scheduler = scheduler.clone().for_picture(h * w, Some(Mu::Empirical));
        let plan = plan(&scheduler, Sampler::Euler, None, number("steps"), None).unwrap();
        let scale = run["guidance"].as_f64().unwrap();
        let passes = if scale > 1.0 { 2 } else { 1 };
        let latents = |(width, height): (usize, usize)| {
            let whole = picture((width, height)).to_tensor(&Device::Cpu).unwrap();
            let [width, height] = [width, height].map(|side| (side, side / 16 * 16));
            let cut = whole.narrow(1, (height.0 - height.1) / 2, height.1);
            let cut = cut.unwrap().narrow(2, (width.0 - width.1) / 2, width.1);
            let rgb = cut.unwrap().contiguous().unwrap();
            let mean = vae.encode(cx, &rgb, None).unwrap().mean;
            Tensor::cat(&vec![mean; passes], 0).unwrap()
        };
        let extra = ExtraInputs {
            concat: None,
            references: sizes(run).into_iter().map(latents).collect(),
        };
        let encode = |prompt: &str| {
            let embeds = text.encode(prompt, 0, Syntax::Plain, None).unwrap().0;
            Conditioning::from(embeds.prompt_embeds)
        };
        let prompt = encode(run["prompt"].as_str().unwrap());
        let (conditioning, guidance) = match passes {
            1 => (prompt, Guidance::Off),
            _ => (
                Conditioning::cat(&encode(""), &prompt).unwrap(),
                Guidance::Text(1),
            ),
        };
        let mut guided = CfgDenoiser {
            model: backbone.bind(cx, &conditioning, extra).unwrap(),
            guidance,
            weights: vec![1.0],
            scale,
            rescale: 0.0,
            deep_cache: DeepCache::every(1),
            skip: None,
        };
        let mut generator = Generator::new(run["seed"].as_u64().unwrap());
        let noise = generator.latents(h, w, 16).unwrap();
        sampling::sample(
            &plan,
            (noise * plan.init_noise_sigma()).unwrap(),
            &mut |x, sigma, timestep| guided.denoise(x, plan.scalings(sigma), timestep),
            &mut || candle_core::bail!("no noise is drawn"),
            &mut |step| {
                let golden = &goldens[&format!("reference.{i}.{}", step.index)];
                assert_eq!(step.latents.dims(), golden.dims());
                let off = difference(step.latents, golden);
                assert!(off <= LATENTS, "run {i}, step {}: {off:e}", step.index);
                compared += 1;
                Ok(None)
            },
        )
        .unwrap();
    }
    assert_eq!(compared, 5);
}

#[test]
fn pictures_are_diffusers_own_of_the_first_references_size_and_alone_as_in_a_batch() {
    let dir = folder();
    let goldens = load(&fixture("klein/goldens.safetensors"));
    let runs = runs();
    assert_eq!(runs.len(), 2);
    for (i, run) in runs.iter().enumerate() {
        edit_json(&dir.path().join("klein/model_index.json"), |index| {
            index.insert("is_distilled".into(), run["is_distilled"].clone());
        });
        let mut command = draw(dir.path(), &[run["prompt"].as_str().unwrap(), "-v"]);
        for (width, _) in sizes(run) {
            command.args(["--reference", &format!("{width}.png")]);
        }
        let mut options = vec![("-s", "seed"), ("--steps", "steps"), ("-g", "guidance")];
        if i > 0 {
            options.extend([("-W", "width"), ("-H", "height")]);
        }
        for (option, key) in options {
            command.args([option, &run[key].to_string()]);
        }
        // twice, in one batch and one after the other: the encoder of the VAE runs for the first
        for batch in ["2", "1"] {
            let out = ["-c", "2", "-b", batch, "-o", "{seed}.png"];
            let said = stderr(&succeed(command.args(out)));
            assert_eq!(said.matches("encoding the picture").count(), 1, "{said}");
            let golden = levels(&goldens[&format!("reference.{i}.picture")]);
            let drawn = pixels(&dir.path().join("7.png"));
            assert_same_levels(&format!("run {i}, batch {batch}"), &drawn, &golden);
        }
    }
}

#[test]
fn each_picture_of_a_list_has_references_of_its_own_alone_or_in_a_batch() {
    let dir = folder();
    let other = picture((66, 65));
    write(&dir.path().join("66.png"), &other);
    let mut mirrored = other.clone();
    mirrored.rgb.reverse();
    write(&dir.path().join("67.png"), &mirrored);
    // an empty list takes away what the command line gives; the third and the fourth make a batch
    let lines = [
        json!({"prompt": "a frog", "seed": 1}),
        json!({"prompt": "a frog", "seed": 1, "reference": []}),
        json!({"prompt": "a frog", "seed": 1, "reference": "66.png"}),
        json!({"prompt": "a frog", "seed": 1, "reference": ["67.png"]}),
        json!({"prompt": "a frog", "seed": 1, "reference": ["66.png", "64.png"]}),
        json!({"prompt": "a frog", "seed": 1, "reference": ["64.png", "66.png"]}),
    ];
    let text: Vec<String> = lines.iter().map(Value::to_string).collect();
    std::fs::write(dir.path().join("list.jsonl"), text.join("\n")).unwrap();
    let common = ["-W", "64", "-H", "64", "--reference", "100.png"];
    let list = ["--from", "list.jsonl", "-b", "4", "-o", "{index}.png"];
    succeed(draw(dir.path(), &common).args(list));
    let drawn: Vec<Vec<u8>> = (0..lines.len())
        .map(|i| pixels(&dir.path().join(format!("{i}.png"))))
        .collect();
    let alone = |references: &[&str]| {
        let mut args = vec!["a frog", "-s", "1", "-W", "64", "-H", "64"];
        for reference in references {
            args.extend(["--reference", *reference]);
        }
        pixels_of(dir.path(), &args)
    };
    for (drawn, references) in drawn.iter().zip([
        &["100.png"][..],
        &[],
        &["66.png"],
        &["67.png"],
        &["66.png", "64.png"],
        &["64.png", "66.png"],
    ]) {
        assert!(*drawn == alone(references), "{references:?}");
    }
    for i in 0..drawn.len() {
        assert!(!drawn[..i].contains(&drawn[i]), "picture {i}");
    }
    fail(
        draw(dir.path(), &["--from", "bad.jsonl"]).current_dir({
            let line = r#"{"prompt": "a frog", "reference": 7}"#;
            std::fs::write(dir.path().join("bad.jsonl"), line).unwrap();
            dir.path()
        }),
        2,
        &["line 1", "`reference` cannot be `7`", "a list of names"],
    );
}

#[test]
fn what_a_picture_says_of_its_references_draws_it_again_until_they_change() {
    let dir = folder();
    write(&dir.path().join("init.png"), &picture((64, 64)));
    let references = ["--reference", "64.png", "--reference", "100.png"];
    for (name, args) in [
        ("plain.png", &[][..]),
        (
            "init-strength.png",
            &["-i", "init.png", "--strength", "0.5"],
        ),
        ("hires.png", &["-W", "64", "-H", "64", "--hires", "2x"]),
    ] {
        let mut command = draw(dir.path(), &["a frog", "-s", "5", "-o", name, "--trace"]);
        succeed(command.args(references).args(args));
        let check = ["check", name, "-m", "klein"];
        let said = stdout(&succeed(sdgen(dir.path()).args(check)));
        assert!(said.contains("identical"), "{said}");
        let before = pixels(&dir.path().join(name));
        let without = ["a frog", "-s", "5", "-W", "64", "-H", "80"];
        let without = match args.is_empty() {
            true => pixels_of(dir.path(), &without),
            false => pixels_of(dir.path(), &[&["a frog", "-s", "5"], args].concat()),
        };
        assert!(before != without, "{name}");
    }
    let bytes = std::fs::read(dir.path().join("plain.png")).unwrap();
    let metadata = read_metadata(&bytes).unwrap().unwrap();
    assert!(
        metadata
            .parameters
            .contains("References: \"64.png, 100.png\"")
    );
    let said = &metadata.sdgen["references"];
    let size = |i: usize| (said[i]["width"].clone(), said[i]["height"].clone());
    assert_eq!(said[1]["image"], "100.png");
    assert_eq!(
        (size(0), size(1)),
        ((64.into(), 80.into()), (96.into(), 64.into()))
    );
    // the same command has nothing left to do
    let again = ["a frog", "-s", "5", "-o", "plain.png", "--verify"];
    let mut verify = sdgen(dir.path());
    verify.args(["-m", "klein", "--steps", "2"]).args(again);
    succeed(verify.args(references));
    write(&dir.path().join("100.png"), &picture((64, 70)));
    assert_eq!(verify.output().unwrap().status.code(), Some(6));
    let mut check = sdgen(dir.path());
    check.args(["check", "plain.png", "-m", "klein"]);
    let mut says = |text: &str| {
        let output = check.output().unwrap();
        assert_eq!(output.status.code(), Some(6));
        let said = stderr(&output);
        assert!(said.contains(text) && said.contains("hint: "), "{said}");
    };
    says("`100.png` is another picture than it was");
    std::fs::remove_file(dir.path().join("100.png")).unwrap();
    says("cannot read the picture `100.png`");
}

#[test]
fn a_dry_run_counts_the_references() {
    let dir = folder();
    let large = Image {
        width: 1024,
        height: 1024,
        rgb: vec![90; 3 << 20],
    };
    write(&dir.path().join("large.png"), &large);
    let gigabytes = |references: &[&str]| -> f64 {
        let mut command = draw(dir.path(), &["a frog", "-W", "64", "-H", "64", "--dry-run"]);
        let said = stderr(&succeed(command.args(references)));
        let before = said.split(" GB of memory").next().unwrap();
        before.rsplit(' ').next().unwrap().parse().unwrap()
    };
    // three bands of a million pixels and the activations of the VAE's last level, in f32
    assert!(gigabytes(&["--reference", "large.png"]) > gigabytes(&[]) + 0.05);
    let records = |references: &[&str]| {
        let mut command = draw(dir.path(), &["a frog", "-W", "64", "-H", "64", "--dry-run"]);
        let output = succeed(command.arg("--json").args(references));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["references"].clone()
    };
    assert_eq!(records(&[]), json!([]));
    assert_eq!(records(&["--reference", "large.png"])[0]["width"], 1024);
}

#[test]
fn what_cannot_be_a_reference_is_an_error() {
    let dir = folder();
    write(&dir.path().join("small.png"), &picture((63, 80)));
    write(&dir.path().join("long.png"), &picture((520, 64)));
    std::fs::write(dir.path().join("text.png"), "no picture").unwrap();
    for (file, says) in [
        ("small.png", "63x80 pixels, at least 64 a side"),
        ("long.png", "more than 8 times the other"),
        ("text.png", "no picture of a known kind"),
        ("none.png", "cannot read the picture `none.png`"),
        (".", "is a folder"),
    ] {
        let mut command = draw(dir.path(), &["a frog", "--reference", file]);
        fail(&mut command, 2, &[says, "hint: "]);
    }
    let mut command = draw(dir.path(), &["a frog"]);
    for _ in 0..11 {
        command.args(["--reference", "64.png"]);
    }
    fail(
        &mut command,
        2,
        &["11 reference pictures are too many", "up to four"],
    );
    // what a reference is not
    let mut command = draw(dir.path(), &["a frog", "--reference", "64.png"]);
    fail(command.args(["--strength", "0.5"]), 2, &["`--image FILE`"]);
    let mut command = tiny(dir.path());
    command.args(["a frog", "--reference", "small.png"]);
    fail(
        &mut command,
        2,
        &[
            "`--reference` means nothing to `sd1`",
            "FLUX.2 klein",
            "hint: ",
        ],
    );
}

#[test]
fn the_library_takes_references_as_the_command_does() {
    let dir = folder();
    let file = |name: &str| dir.path().join(name);
    let pipeline = Pipeline::load(&ModelSpec::new(file("klein"))).unwrap();
    let params = Params::new("a frog").seed(3).steps(2);
    let params = params.reference(file("64.png")).reference(file("100.png"));
    let drawn = pipeline
        .generate(&params, |_| ControlFlow::Continue(()))
        .unwrap();
    let args = [
        "a frog",
        "-s",
        "3",
        "--reference",
        "64.png",
        "--reference",
        "100.png",
    ];
    assert!(drawn.rgb == pixels_of(dir.path(), &args));
    assert_eq!((drawn.width, drawn.height), (64, 80));
}
