//! What other programs get wrong. Each mistake was made here on purpose, and a test that is named
//! beside it failed; but for 14, 15, 21 and 22, which came with later parts of the program and are
//! pinned by those parts' own tests.
//!
//! | trap | pinned by |
//! | --- | --- |
//! | 1 timestep sinusoid in half precision | here: `the_timestep_embedding_is_exact_to_1e_4_at_t_999` |
//! | 2 tanh GELU, `quick_gelu` where it is not asked for | parity.rs: `the_unet_predicts_the_same_after_every_block`, `prompts_become_the_same_ids_and_embeddings`; single files in checkpoints.rs: `a_folder_and_its_single_file_give_the_same_bytes` |
//! | 3 SDXL without pooled text or sizes, or the last hidden state | parity.rs: `prompts_become_the_same_ids_and_embeddings`, `latents_after_every_step_and_pictures_are_the_same`; here: `the_program_draws_diffusers_pictures` |
//! | 4 one padding token for all | parity.rs: `prompts_become_the_same_ids_and_embeddings`; checkpoints.rs: `clips_tokenizer_gives_transformers_ids`, `a_folder_and_its_single_file_give_the_same_bytes` |
//! | 5 SD1.x's VAE scale for SDXL | parity.rs: `latents_after_every_step_and_pictures_are_the_same`; single files in checkpoints.rs: `a_folder_and_its_single_file_give_the_same_bytes` |
//! | 6 the end of a text found as its largest number | here: `a_text_ends_at_the_first_end_whatever_follows` |
//! | 7 guided halves or prompts of a batch in the wrong order | parity.rs: `latents_after_every_step_and_pictures_are_the_same`; here: `a_picture_does_not_depend_on_what_is_drawn_beside_it` |
//! | 8 timestep spacing rounded otherwise | samplers.rs: `sigmas_and_timesteps_equal_diffusers`; here: `the_program_draws_diffusers_pictures`, `an_outdated_scheduler_config_is_read_as_the_pipeline_reads_it` |
//! | 9 history kept from the picture before | samplers.rs: `a_sampler_keeps_nothing_from_one_run_to_the_next`; here: `a_picture_does_not_depend_on_what_is_drawn_beside_it` |
//! | 10 noise from the device, or one stream for a batch | noise.rs; cli.rs: `same_seed_gives_the_same_picture_in_any_batch_and_any_number_of_threads`; here: `the_program_draws_diffusers_pictures` |
//! | 11 the VAE overflows in f16, a black picture and exit 0 | here: `a_vae_stored_in_f16_is_computed_in_f32`, `a_stage_that_overflows_ends_with_exit_code_5_and_is_named`; checkpoints.rs: `weights_that_are_not_numbers_write_no_picture` |
//! | 12 v-prediction not detected | here: `the_prediction_of_a_single_file_is_found_or_said_to_be_assumed`, `the_prediction_of_the_command_line_wins`; checkpoints.rs: `real_headers_are_recognised_without_reading_weights` |
//! | 13 levels truncated | output.rs: `levels_are_rounded_half_to_even_and_clamped` |
//! | 14 img2img starts one step off, a mask that is not binarised or scaled with its sides swapped | from_picture.rs: `pictures_from_pictures_are_diffusers_own`, `pixels_outside_the_mask_stay_as_they_are_and_those_inside_fade_in` |
//! | 15 a LoRA that is not applied, without a word | lora.rs: `pictures_with_loras_of_every_format_are_those_of_diffusers_and_of_the_formulas`, `a_lora_for_another_model_is_an_error_that_says_for_which`, `a_lora_that_fits_in_part_is_a_warning_with_counts_and_with_strict_an_error` |
//! | 16 `attention_head_dim` read as the width of a head | parity.rs: `the_unet_predicts_the_same_after_every_block`; checkpoints.rs: `a_folder_and_its_single_file_give_the_same_bytes` |
//! | 17 norm groups and epsilons assumed | groups in parity.rs: `the_unet_predicts_the_same_after_every_block`, `the_vae_decodes_the_same`; epsilons here: `every_norm_has_its_own_epsilon` |
//! | 18 a model guessed by its name, an error without the cause | here: `a_part_of_a_model_says_what_it_has_and_what_it_lacks`, `a_checkpoint_is_known_by_its_tensors_whatever_its_name` |
//! | 19 the network is used when off or not needed | here: `no_connection_is_made_unless_needed_and_allowed`; hub.rs: `offline_asks_nothing_and_says_how_to_get_the_model` |
//! | 20 weights read again for each prompt | here: `weights_are_read_once_for_all_prompts_and_seeds`, `six_pictures_of_three_prompts_read_no_more_than_one`, `each_stage_is_entered_once_for_all_prompts` |
//! | 21 a decode that needs more memory than the model | vae.rs: `auto_decodes_in_tiles_what_does_not_fit_into_memory_and_says_so`, `the_memory_of_a_decode_is_that_of_its_widest_activation_or_of_a_tile` |
//! | 22 one failed picture loses its batch, or exits 0 | batch.rs: `a_picture_that_fails_is_reported_and_the_rest_of_its_batch_is_saved`, `a_file_that_cannot_be_written_fails_alone` |
//! | 23 a prompt that is not ASCII | checkpoints.rs: `clips_tokenizer_gives_transformers_ids`; here: `long_prompts_of_any_script_are_cut_between_letters` |
//! | 24 the last step of DPM++ 2M | samplers.rs: `latents_after_every_evaluation_equal_diffusers`; here: `the_last_step_of_dpmpp_lands_on_the_denoised_picture` |

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use clap::{Args, FromArgMatches};
use sdgen::batch::jobs::JobList;
use sdgen::batch::work_list::WorkList;
use sdgen::cli::args::DrawArgs;
use sdgen::model::unet::{UNet, UNetInputs};
use sdgen::model::unet_config::UNetConfig;
use sdgen::model::vae::{Decoder, VaeConfig};
use sdgen::nn::device::{Compute, DTypeChoice, DeviceChoice};
use sdgen::nn::{Forward, embed};
use sdgen::pipeline::event::Generated;
use sdgen::pipeline::{Pipeline, RunOptions};
use sdgen::sampling::{Sampler, Schedule, SchedulerConfig, plan, sample};
use sdgen::text::clip::{Clip, ClipConfig};
use sdgen::text::tokenizer::Tokenizer;
use sdgen::weights::{Checkpoint, Origin, TokenizerFiles};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Runs with these prompts on stdin, one a line, and expects exit code 0.
fn with_prompts(command: &mut Command, prompts: &str) -> std::process::Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(prompts.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    output
}

// 1

#[test]
fn the_timestep_embedding_is_exact_to_1e_4_at_t_999() {
    for (t, dim, flip, shift) in [
        (999.0, 320, true, 0.0),
        (999.0, 32, false, 1.0),
        (500.5, 320, true, 0.0),
        (0.25, 8, false, 0.0),
    ] {
        let embedded = embed::sinusoids(&[t], dim, flip, shift, &Device::Cpu).unwrap();
        assert_eq!(
            (embedded.dims(), embedded.dtype()),
            (&[1, dim][..], DType::F32)
        );
        let half = dim / 2;
        for (i, value) in values(&embedded).into_iter().enumerate() {
            let angle = t * (-(10_000f64.ln()) * (i % half) as f64 / (half as f64 - shift)).exp();
            let expected = if flip == (i < half) {
                angle.cos()
            } else {
                angle.sin()
            };
            // an angle near 1000 has an f32 error of 6e-5; half precision is off by up to 0.3
            assert!(
                (f64::from(value) - expected).abs() < 1e-4,
                "value {i} at t {t} is {value}, not {expected}"
            );
        }
    }
}

// 7, 8, 10, 12, 13 through the program

/// One run of each kind, with every option that runs differ by; parity.rs compares all of them
/// without the program, after every step.
#[test]
fn the_program_draws_diffusers_pictures() {
    let dir = tempfile::tempdir().unwrap();
    for (model, names) in [
        ("sd1", &["ddim_eta", "euler_a_two"][..]),
        ("sd2", &["dpmpp_2m_karras"]),
        ("odd", &["clip_skip_1"]),
        ("sdxl", &["sizes"]),
        ("sdxl_refiner", &["no_negative"]),
    ] {
        let tensors = load(&fixture(model).join("goldens.safetensors"));
        let goldens = goldens(model);
        for name in names {
            let mut runs = goldens["runs"].as_array().unwrap().iter();
            let run = runs.find(|run| run["name"] == **name).unwrap();
            let text = |key: &str| {
                run[key]
                    .as_str()
                    .map_or_else(|| run[key].to_string(), String::from)
            };
            let count = text("count");
            let own = [
                &json(&fixture(model).join("scheduler/scheduler_config.json"))["_class_name"],
                &Value::Null,
            ]
            .contains(&&run["scheduler"]);
            let mut command = sdgen(dir.path());
            command.args([
                "--threads",
                "1",
                "-o",
                &format!("{model}-{name}-{{seed}}.png"),
                "-m",
            ]);
            match run["refine_at"].as_f64() {
                Some(at) => command
                    .arg(fixture("sdxl"))
                    .arg("--refiner")
                    .arg(fixture(model))
                    .arg(format!("--refine-at={at}")),
                None => command.arg(fixture(model)),
            };
            command.args([
                &text("prompt"),
                "-n",
                run["negative_prompt"].as_str().unwrap_or(""),
                "-s",
                &text("seed"),
                "--steps",
                &text("steps"),
            ]);
            // diffusers has (height, width) and (top, left)
            for (option, key, separator) in [
                ("original-size", "original_size", "x"),
                ("crop", "crop", ","),
                ("target-size", "target_size", "x"),
            ] {
                if let Some([a, b]) = run[key].as_array().map(Vec::as_slice) {
                    command.arg(format!("--{option}={b}{separator}{a}"));
                }
            }
            command.args([
                "-g",
                &text("guidance"),
                "-W",
                &text("width"),
                "-H",
                &text("height"),
                "-c",
                &count,
                "-b",
                &count,
            ]);
            command.args([
                "--clip-skip",
                &(1 + run["clip_skip"].as_u64().unwrap_or(0)).to_string(),
            ]);
            if !own {
                command.args(sampler_options(run));
            }
            if run["eta"].as_f64().unwrap_or(0.0) > 0.0 {
                command.args(["--eta", &text("eta")]);
            }
            let output = succeed(&mut command);
            let images = &tensors[&format!("run.{name}.image")];
            assert_eq!(stdout(&output).lines().count(), images.dim(0).unwrap());
            for (i, path) in stdout(&output).lines().enumerate() {
                assert_same_levels(
                    &format!("picture {i} of {model} {name}"),
                    &pixels(&dir.path().join(path)),
                    &levels(&images.get(i).unwrap()),
                );
            }
        }
    }
}

#[test]
fn an_outdated_scheduler_config_is_read_as_the_pipeline_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&fixture("sd1"), &dir.path().join("old"));
    edit_json(
        &dir.path().join("old/scheduler/scheduler_config.json"),
        |c| {
            c.insert("steps_offset".into(), 0.into());
            c.insert("clip_sample".into(), true.into());
        },
    );
    for (model, output) in [
        (fixture("sd1"), "new.png"),
        (dir.path().join("old"), "old.png"),
    ] {
        succeed(quick(dir.path(), &model).args([
            "a frog",
            "-s",
            "1",
            "--sampler",
            "ddim",
            "-o",
            output,
        ]));
    }
    assert_eq!(
        pixels(&dir.path().join("old.png")),
        pixels(&dir.path().join("new.png"))
    );
}

// 6

#[test]
fn a_text_ends_at_the_first_end_whatever_follows() {
    let checkpoint = Checkpoint::open(Origin::Path(&fixture("sdxl_refiner"))).unwrap();
    let config = ClipConfig::from_json(checkpoint.config("text_encoder_2").unwrap()).unwrap();
    let weights = checkpoint.weights("text_encoder_2", &Device::Cpu, DType::F32);
    let pooled = |eos_token_id: u32, ids: &[u32]| {
        let clip = Clip::with_projection(
            &weights,
            &ClipConfig {
                eos_token_id,
                ..config.clone()
            },
        )
        .unwrap();
        values(
            &clip
                .penultimate(Forward::on(&Device::Cpu), ids, 0)
                .unwrap()
                .1
                .unwrap(),
        )
    };
    // no token sees those after it, so the state at a place is that of a text which ends there
    let text = [7, 500, 100, 100, 3];
    let same = |a: Vec<f32>, b: Vec<f32>| a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-4);
    assert!(same(pooled(100, &text), pooled(100, &text[..3])));
    // what older configurations say of every model stands for the largest number
    assert!(same(pooled(2, &text), pooled(500, &text[..2])));
    assert!(!same(pooled(2, &text), pooled(100, &text)));
}

// 7, 9, 10

#[test]
fn a_picture_does_not_depend_on_what_is_drawn_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = ["a frog", "the cat in the house", "ein Käfer"];
    // samplers with history, one of them with noise at every step
    for sampler in ["unipc", "dpmpp-2m-sde"] {
        let draw = |prompts: &str, extra: &[&str]| {
            let mut command = quick(dir.path(), &fixture("sd1"));
            let output = with_prompts(
                command
                    .args([
                        "-n",
                        "the hat",
                        "--steps",
                        "4",
                        "--sampler",
                        sampler,
                        "--json",
                    ])
                    .args(extra),
                prompts,
            );
            let lines: Vec<Value> = stdout(&output)
                .lines()
                .map(|l| serde_json::from_str(l).unwrap())
                .collect();
            lines
                .iter()
                .map(|l| (l["prompt"].clone(), l["seed"].clone(), l["sha256"].clone()))
                .collect::<Vec<_>>()
        };
        let all = prompts.join("\n");
        let one_by_one = draw(&all, &["-s", "5,6", "-o", &format!("{sampler}/one/")]);
        assert_eq!(one_by_one.len(), 6);
        // four and two pictures, prompts mixed
        let batched = draw(
            &all,
            &["-s", "5,6", "-b", "4", "-o", &format!("{sampler}/batch/")],
        );
        assert_eq!(batched, one_by_one, "{sampler} in batches");
        let alone = draw(prompts[2], &["-s", "6", "-o", &format!("{sampler}/alone/")]);
        assert_eq!(alone[0], one_by_one[5], "{sampler} alone");
    }
}

// 11

/// A copy of the tiny SD1 checkpoint in which `edit` has changed the tensors of one part.
fn edited(to: &Path, part: &str, edit: impl Fn(&str, &Tensor) -> Tensor) {
    copy_folder(&fixture("sd1"), to);
    rewrite(&to.join(part), edit);
}

/// Changes every tensor of every weight file in a folder.
fn rewrite(folder: &Path, edit: impl Fn(&str, &Tensor) -> Tensor) {
    let files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    for file in files
        .iter()
        .filter(|f| f.extension().is_some_and(|e| e == "safetensors"))
    {
        let tensors = load(file)
            .into_iter()
            .map(|(key, tensor)| (key.clone(), edit(&key, &tensor)))
            .collect();
        save(&tensors, file);
    }
}

#[test]
fn a_stage_that_overflows_ends_with_exit_code_5_and_is_named() {
    let cases = [
        (
            "text_encoder",
            "text_model.final_layer_norm.bias",
            f64::NAN,
            "after 1 of 3 runs of the network",
        ),
        (
            "unet",
            "conv_out.bias",
            f64::INFINITY,
            "after 1 of 3 runs of the network",
        ),
        (
            "unet",
            "conv_out.bias",
            f64::NEG_INFINITY,
            "after 1 of 3 runs of the network",
        ),
        (
            "vae",
            "decoder.conv_out.bias",
            f64::INFINITY,
            "after decoding",
        ),
        // clamped to 0..=1 this would be a black picture
        (
            "vae",
            "decoder.conv_out.bias",
            f64::NEG_INFINITY,
            "after decoding",
        ),
    ];
    for (part, key, value, place) in cases {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("m");
        edited(&model, part, |k, t| {
            if k == key {
                (t.zeros_like().unwrap() + value).unwrap()
            } else {
                t.clone()
            }
        });
        let mut command = quick(dir.path(), &model);
        fail(
            command.args(["x", "-q", "-s", "1", "-o", "x.png"]),
            5,
            &["not finite", place, "nothing was written"],
        );
        assert!(!dir.path().join("x.png").exists());
    }
}

#[test]
fn a_vae_stored_in_f16_is_computed_in_f32() {
    let dir = tempfile::tempdir().unwrap();
    // activations of some millions, where f16 ends at 65504; the norms take the size out again
    let large = |key: &str, t: &Tensor| {
        let factor = if key.contains("post_quant_conv") || key.contains("decoder.conv_in") {
            1000.0
        } else {
            1.0
        };
        (t * factor).unwrap().to_dtype(DType::F16).unwrap()
    };
    edited(&dir.path().join("f16"), "vae", large);
    edited(&dir.path().join("f32"), "vae", |key, t| {
        large(key, t).to_dtype(DType::F32).unwrap()
    });
    // a GPU computes in half precision if told so: the VAE must not
    let dtypes: &[&str] = if cfg!(any(feature = "cuda", feature = "metal")) {
        &["f32", "f16"]
    } else {
        &["f32"]
    };
    for dtype in dtypes {
        for model in ["f16", "f32"] {
            let mut command = quick(dir.path(), &dir.path().join(model));
            succeed(command.args([
                "a frog",
                "-s",
                "1",
                "--dtype",
                dtype,
                "-o",
                &format!("{dtype}-{model}.png"),
            ]));
        }
        let picture = pixels(&dir.path().join(format!("{dtype}-f16.png")));
        assert!(
            picture.iter().any(|p| *p != picture[0]),
            "the picture is flat"
        );
        assert_eq!(
            picture,
            pixels(&dir.path().join(format!("{dtype}-f32.png")))
        );
    }
}

// 12 and 18: single files as the field has them, with holes for weights

/// Header entries of a real single file: key -> shape, all f16.
fn real_header(recipe: &str) -> Vec<(String, Vec<u64>)> {
    let shapes = json(&fixture(recipe));
    let entry = |(key, shape): (&String, &Value)| {
        (key.clone(), serde_json::from_value(shape.clone()).unwrap())
    };
    shapes.as_object().unwrap().iter().map(entry).collect()
}

/// Writes a header with holes for data, with `metadata` of ModelSpec's kind and a trailing
/// `global_step` if given.
fn write_header(
    path: &Path,
    entries: &[(String, Vec<u64>)],
    metadata: Option<(&str, &str)>,
    global_step: Option<i64>,
) {
    let mut header = serde_json::Map::new();
    if let Some((key, value)) = metadata {
        header.insert("__metadata__".into(), json!({ key: value }));
    }
    let mut offset = 0;
    for (key, shape) in entries {
        let bytes = 2 * shape.iter().product::<u64>();
        header.insert(
            key.clone(),
            json!({ "dtype": "F16", "shape": shape, "data_offsets": [offset, offset + bytes] }),
        );
        offset += bytes;
    }
    if global_step.is_some() {
        header.insert(
            "global_step".into(),
            json!({ "dtype": "I64", "shape": [], "data_offsets": [offset, offset + 8] }),
        );
    }
    let header = Value::Object(header).to_string();
    let mut file = std::fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let end = 8 + header.len() as u64 + offset;
    file.set_len(end).unwrap();
    if let Some(step) = global_step {
        use std::io::Seek;
        file.seek(std::io::SeekFrom::Start(end)).unwrap();
        file.write_all(&step.to_le_bytes()).unwrap();
    }
}

fn inspected(folder: &Path, model: &str) -> Value {
    serde_json::from_str(&stdout(&succeed(
        sdgen(folder).args(["inspect", model, "--json"]),
    )))
    .unwrap()
}

#[test]
fn the_prediction_of_a_single_file_is_found_or_said_to_be_assumed() {
    let spec = |prediction| Some(("modelspec.prediction_type", prediction));
    let cases = [
        ("real_sd1.json", &[][..], None, None, "epsilon", 512),
        ("real_sd1.json", &["v_pred"], None, None, "v", 512),
        ("real_sd1.json", &["v_pred", "ztsnr"], None, None, "v", 512),
        ("real_sd1.json", &[], spec("v"), None, "v", 512),
        ("real_sd1.json", &[], None, Some(840_000), "epsilon", 512),
        ("real_sd2.json", &[], None, None, "v", 768),
        ("real_sd2.json", &["v_pred", "ztsnr"], None, None, "v", 768),
        ("real_sd2.json", &[], spec("v"), None, "v", 768),
        ("real_sd2.json", &[], spec("epsilon"), None, "epsilon", 512),
        ("real_sd2.json", &[], None, Some(875_000), "epsilon", 512),
        ("real_sd2.json", &[], None, Some(110_000), "v", 768),
    ];
    for (recipe, markers, metadata, step, prediction, size) in cases {
        let dir = tempfile::tempdir().unwrap();
        let mut entries = real_header(recipe);
        entries.extend(markers.iter().map(|marker| (marker.to_string(), vec![0])));
        write_header(&dir.path().join("m.safetensors"), &entries, metadata, step);
        let said = inspected(dir.path(), "m.safetensors");
        let case = format!("{recipe} {markers:?} {metadata:?} {step:?}");
        assert_eq!(
            (&said["prediction"], &said["width"]),
            (&json!(prediction), &json!(size)),
            "{case}"
        );
        // what the file does not say is assumed, and said so with the option that overrides it
        let told = !markers.is_empty() || metadata.is_some() || step == Some(875_000);
        let assumed = said["assumed"].to_string().contains("--prediction epsilon");
        assert_eq!(
            assumed,
            recipe == "real_sd2.json" && !told,
            "{case}: {}",
            said["assumed"]
        );
        let checkpoint = Checkpoint::open(Origin::Path(&dir.path().join("m.safetensors"))).unwrap();
        let (scheduler, zero_snr) = (
            checkpoint.config("scheduler").unwrap(),
            markers.contains(&"ztsnr"),
        );
        assert_eq!(
            scheduler["rescale_betas_zero_snr"] == true,
            zero_snr,
            "{case}"
        );
        // a sampler that knows what that is, from the timestep where it matters
        assert_eq!(
            scheduler["timestep_spacing"] == "trailing"
                && scheduler["_class_name"] == "DDIMScheduler",
            zero_snr,
            "{case}"
        );
    }
}

#[test]
fn the_prediction_of_the_command_line_wins() {
    let dir = tempfile::tempdir().unwrap();
    let draw = |model: &str, extra: &[&str]| -> (Value, Value) {
        let mut command = quick(dir.path(), &fixture(model));
        let output = succeed(
            command
                .args(["a frog", "-s", "1", "--json", "--force"])
                .args(extra),
        );
        let said: Value = serde_json::from_str(&stdout(&output)).unwrap();
        (said["prediction"].clone(), said["sha256"].clone())
    };
    for (model, own, other) in [("sd1", "epsilon", "v"), ("sd2", "v", "epsilon")] {
        let (prediction, picture) = draw(model, &[]);
        assert_eq!(prediction, own);
        assert_eq!(
            draw(model, &["--prediction", own]),
            (prediction, picture.clone())
        );
        let (prediction, changed) = draw(model, &["--prediction", other]);
        assert_eq!(prediction, other);
        assert_ne!(changed, picture, "{model}");
        assert_eq!(
            inspected(dir.path(), fixture(model).to_str().unwrap())["prediction"],
            own
        );
    }
}

#[test]
fn a_part_of_a_model_says_what_it_has_and_what_it_lacks() {
    let parts = [
        ("text_encoder", "cond_stage_model."),
        ("unet", "model.diffusion_model."),
        ("vae", "first_stage_model."),
    ];
    let dir = tempfile::tempdir().unwrap();
    for kept in [1, 2, 4, 5, 6] {
        let has = |i: usize| kept >> i & 1 == 1;
        let names = |with: bool| {
            parts
                .iter()
                .enumerate()
                .filter(move |(i, _)| has(*i) == with)
                .map(|(_, (name, _))| *name)
        };
        let prefixes: Vec<&str> = parts
            .iter()
            .enumerate()
            .filter(|(i, _)| has(*i))
            .map(|(_, (_, prefix))| *prefix)
            .collect();
        let mut entries = real_header("real_sd1.json");
        entries.retain(|(key, _)| prefixes.iter().any(|p| key.starts_with(p)));
        write_header(&dir.path().join("part.safetensors"), &entries, None, None);
        let lacks = format!(
            "`part.safetensors` has no {}",
            names(false).collect::<Vec<_>>().join(" and no ")
        );
        let found = format!("(it has: {})", names(true).collect::<Vec<_>>().join(", "));
        for args in [
            &["inspect", "part.safetensors"][..],
            &["x", "-m", "part.safetensors"],
        ] {
            fail(sdgen(dir.path()).args(args), 3, &[&lacks, &found, "hint: "]);
        }
    }
}

#[test]
fn a_model_without_a_vae_is_inspected_and_not_drawn_with() {
    let dir = tempfile::tempdir().unwrap();
    for (recipe, encoders) in [
        ("real_sd1.json", "text_encoder"),
        ("real_sdxl.json", "text_encoder, text_encoder_2"),
    ] {
        let mut entries = real_header(recipe);
        entries.retain(|(key, _)| !key.starts_with("first_stage_model."));
        write_header(&dir.path().join("m.safetensors"), &entries, None, None);
        let said = stdout(&succeed(
            sdgen(dir.path()).args(["inspect", "m.safetensors"]),
        ));
        assert!(said.contains("  vae           none"), "{said}");
        assert!(
            inspected(dir.path(), "m.safetensors")["parts"]
                .get("vae")
                .is_none()
        );
        let lacks = format!("`m` has no vae (it has: {encoders}, unet)");
        fail(
            sdgen(dir.path()).args(["x", "-m", "m.safetensors"]),
            3,
            &[&lacks, "hint: pass one with `--vae`"],
        );
    }
}

#[test]
fn a_checkpoint_is_known_by_its_tensors_whatever_its_name() {
    let dir = tempfile::tempdir().unwrap();
    for (recipe, name, family, prediction) in [
        (
            "real_sd1.json",
            "sd_xl-v2-768-vpred-inpainting.safetensors",
            "Stable Diffusion 1.x",
            "epsilon",
        ),
        (
            "real_sd2.json",
            "v1-5-pruned-emaonly.safetensors",
            "Stable Diffusion 2.x",
            "v",
        ),
        (
            "real_sdxl.json",
            "v1-5-pruned.safetensors",
            "Stable Diffusion XL",
            "epsilon",
        ),
    ] {
        write_header(&dir.path().join(name), &real_header(recipe), None, None);
        let said = inspected(dir.path(), name);
        assert_eq!(
            (&said["family"], &said["prediction"]),
            (&json!(family), &json!(prediction)),
            "{name}"
        );
    }
}

// 17

/// Of diffusers 0.42.1 in f64, eight values each of the U-Net's, the VAE's and the text encoder's
/// output, with weights that are so small before the norms that an epsilon counts. They change only
/// together with this:
/// ```python
/// def load(kind, path, **kwargs):
///     model = kind.from_pretrained(path, **kwargs).double().eval()
///     for name, p in model.named_parameters():
///         parts = set(name.split("."))
///         if parts & {"conv_in", "conv1", "conv2", "time_emb_proj", "proj_in", "embeddings"}:
///             p.mul_(1e-3)
///         if "proj_out" in parts or {"decoder", "to_out"} <= parts:
///             p.mul_(1e-2)
///     return model
/// def wave(*shape): return torch.arange(torch.Size(shape).numel()).double().sin().reshape(shape)
/// def nchw(x): return x.permute(0, 3, 1, 2).contiguous()
/// def nhwc(x): return x.permute(0, 2, 3, 1).contiguous()
/// def show(x): print(x.flatten()[:: x.numel() // 8])
/// for model, width, c, variant in [("sd1", 64, 4, None), ("odd", 24, 8, "fp16")]:
///     unet = load(UNet2DConditionModel, f"{model}/unet")
///     show(nhwc(unet(nchw(wave(1, 4, 4, c)), 100, wave(1, 5, width)).sample))
///     vae = load(AutoencoderKL, f"{model}/vae", variant=variant)
///     show(nhwc(vae.decode(nchw(wave(1, 4, 4, c))).sample))
///     show(load(CLIPTextModel, f"{model}/text_encoder")(torch.arange(1, 9)[None]).last_hidden_state)
/// ```
const SMALL: [(&str, usize, usize, [[f32; 8]; 3]); 2] = [
    (
        "sd1",
        64,
        4,
        [
            [
                -0.2258767, 0.2468984, -0.1254217, 0.1331486, -0.0905162, -0.0413378, 0.0338676,
                0.1203962,
            ],
            [
                0.3089027, 0.1007527, -0.1305166, -0.1842331, 0.4079192, 0.03873355, -0.1431168,
                0.08897881,
            ],
            [
                0.348417, 0.6392451, 0.645237, 0.4163297, 0.2706744, 0.3552896, 0.2890373,
                0.3291768,
            ],
        ],
    ),
    (
        "odd",
        24,
        8,
        [
            [
                -0.33095,
                0.03933808,
                -0.06443357,
                0.222069,
                0.05207918,
                0.05507306,
                0.1085831,
                -0.03128495,
            ],
            [
                -0.7913692, 0.2770285, 0.2702848, 0.2708981, 0.2696843, 0.2691962, 0.2664597,
                0.2876763,
            ],
            [
                2.159477, 1.979191, 1.882109, 1.287969, 1.450576, 0.5472313, 1.222334, 1.37404,
            ],
        ],
    ),
];

/// sin(0), sin(1), ...
fn wave(shape: &[usize]) -> Tensor {
    let values: Vec<f32> = (0..shape.iter().product::<usize>())
        .map(|i| (i as f64).sin() as f32)
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

#[test]
fn every_norm_has_its_own_epsilon() {
    for (model, width, c, goldens) in SMALL {
        let dir = tempfile::tempdir().unwrap();
        copy_folder(&fixture(model), dir.path());
        for part in ["unet", "vae", "text_encoder"] {
            rewrite(&dir.path().join(part), |key, tensor| {
                let has = |names: &[&str]| key.split('.').any(|p| names.contains(&p));
                let small = has(&[
                    "conv_in",
                    "conv1",
                    "conv2",
                    "time_emb_proj",
                    "proj_in",
                    "embeddings",
                ]);
                let output =
                    has(&["proj_out"]) || has(&["decoder"]) && has(&["to_out", "proj_attn"]);
                let factor = if small { 1e-3 } else { 1.0 } * if output { 1e-2 } else { 1.0 };
                if tensor.dtype().is_float() {
                    (tensor.to_dtype(DType::F32).unwrap() * factor).unwrap()
                } else {
                    tensor.clone()
                }
            });
        }
        let checkpoint = Checkpoint::open(Origin::Path(dir.path())).unwrap();
        let weights = |part: &str| checkpoint.weights(part, &Device::Cpu, DType::F32);
        let unet = UNet::new(
            &weights("unet"),
            &UNetConfig::from_json(checkpoint.config("unet").unwrap()).unwrap(),
        )
        .unwrap();
        let vae = Decoder::new(
            &weights("vae"),
            &VaeConfig::from_json(checkpoint.config("vae").unwrap()).unwrap(),
        )
        .unwrap();
        let config = ClipConfig::from_json(checkpoint.config("text_encoder").unwrap()).unwrap();
        let clip = Clip::new(&weights("text_encoder"), &config).unwrap();
        let latents = wave(&[1, 4, 4, c]);
        let cx = Forward::on(&Device::Cpu);
        let outputs = [
            unet.with_conditioning(cx, &wave(&[1, 5, width]).into(), None)
                .unwrap()
                .forward(UNetInputs::new(&latents, 100.0))
                .unwrap(),
            vae.forward(cx, &latents).unwrap(),
            clip.forward(cx, &[1, 2, 3, 4, 5, 6, 7, 8], 0).unwrap(),
        ];
        for ((part, output), golden) in ["U-Net", "VAE", "text encoder"]
            .into_iter()
            .zip(&outputs)
            .zip(goldens)
        {
            let all = values(output);
            let shown: Vec<f32> = all.iter().step_by(all.len() / 8).copied().take(8).collect();
            let off = shown
                .iter()
                .zip(&golden)
                .map(|(a, b)| (a - b).abs())
                .fold(0f32, f32::max);
            // f32 differs from f64 by 1e-5 here, a wrong epsilon by 1e-3 or more
            assert!(
                off < 1e-4,
                "{model}: the {part} differs by {off}\n got {shown:?}\nwant {golden:?}"
            );
        }
    }
}

// 19

/// A hub that knows nothing, and the number of connections it has had.
fn empty_hub() -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (url, count) = (
        format!("http://{}", listener.local_addr().unwrap()),
        Arc::new(AtomicUsize::new(0)),
    );
    let counted = count.clone();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            counted.fetch_add(1, Ordering::SeqCst);
            let _ = stream.read(&mut [0; 4096]);
            let _ =
                stream.write_all(b"HTTP/1.1 404 Not Found\r\nX-Error-Code: RepoNotFound\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    (url, count)
}

#[test]
fn no_connection_is_made_unless_needed_and_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let (url, connections) = empty_hub();
    let online = |args: &[&str]| {
        let mut command = sdgen(dir.path());
        command
            .env("HF_HUB_OFFLINE", "0")
            .env("HF_ENDPOINT", &url)
            .env("HF_HOME", dir.path().join("hf"))
            .args(args);
        command
    };
    let model = fixture("sd1");
    let model = model.to_str().unwrap();
    let small = [
        "x",
        "--steps",
        "1",
        "-W",
        "16",
        "-H",
        "16",
        "-s",
        "1",
        "--threads",
        "1",
        "--force",
    ];
    // online, but nothing has to be fetched: a folder, the embedded model
    succeed(online(&small).args(["-m", model]));
    succeed(&mut online(&small));
    succeed(online(&small).args(["-m", "mini"]));
    succeed(&mut online(&["inspect", model]));
    succeed(&mut online(&["inspect", "mini"]));
    // a path that is not there is a wrong path, and no name on the hub
    fail(
        &mut online(&["x", "-m", "missing.safetensors"]),
        3,
        &["does not exist"],
    );
    fail(
        &mut online(&["inspect", "models/missing.safetensors"]),
        3,
        &["does not exist"],
    );
    fail(
        &mut online(&["x", "-m", "./models/missing"]),
        3,
        &["does not exist"],
    );
    fail(&mut online(&["x", "-m", "sd14"]), 3, &["`sd14`"]);
    // the network is off
    fail(
        &mut online(&["x", "-m", "me/model", "--offline"]),
        3,
        &["me/model", "offline"],
    );
    fail(
        &mut online(&["x", "-m", "sd15", "--offline"]),
        3,
        &["offline"],
    );
    fail(
        &mut online(&["inspect", "me/model", "--offline"]),
        3,
        &["me/model", "offline"],
    );
    fail(
        online(&["x", "--offline"]).env("SDGEN_MODEL", "me/model"),
        3,
        &["me/model", "offline"],
    );
    for args in [
        &["x", "-m", "me/model"][..],
        &["inspect", "me/model"],
        &["pull", "me/model"],
    ] {
        fail(
            online(args).env("HF_HUB_OFFLINE", "1"),
            3,
            &["me/model", "offline"],
        );
    }
    assert_eq!(connections.load(Ordering::SeqCst), 0);
    // and that the hub would have noticed
    for args in [
        &["x", "-m", "me/model"][..],
        &["inspect", "me/model"],
        &["pull", "me/model"],
    ] {
        let before = connections.load(Ordering::SeqCst);
        fail(&mut online(args), 3, &["me/model"]);
        assert!(connections.load(Ordering::SeqCst) > before, "{args:?}");
    }
}

// 20

#[test]
fn weights_are_read_once_for_all_prompts_and_seeds() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&fixture("sd1"), dir.path());
    let prompts = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&prompts, "a frog\nthe cat\na house\n").unwrap();
    let arguments = [
        "sdgen",
        "--from",
        prompts.path().to_str().unwrap(),
        "--steps",
        "2",
        "-W",
        "16",
        "-H",
        "16",
        "-s",
        "1,2",
        "-b",
        "1",
    ];
    let matches = DrawArgs::augment_args(clap::Command::new("sdgen"))
        .try_get_matches_from(arguments)
        .unwrap();
    let args = DrawArgs::from_arg_matches(&matches).unwrap();
    let draw = |unreadable: bool| {
        let checkpoint = Checkpoint::open(Origin::Path(dir.path())).unwrap();
        let compute = Compute::choose(DeviceChoice::Cpu, DTypeChoice::Auto).unwrap();
        let pipeline = Pipeline::new(checkpoint, compute, args.pipeline_options()).unwrap();
        let list = JobList::read(&args.source()).unwrap();
        let work = WorkList::resolve(&list, &pipeline).unwrap();
        let mut pictures = vec![];
        let mut sink = |_: usize, result: anyhow::Result<Generated>| {
            pictures.push(result.unwrap().image.rgb);
            // after the first picture nothing is left on the disk
            for part in ["unet", "vae", "text_encoder"]
                .into_iter()
                .filter(|_| unreadable)
            {
                let folder = std::fs::read_dir(dir.path().join(part)).unwrap();
                for file in folder
                    .map(|e| e.unwrap().path())
                    .filter(|f| f.extension().is_some_and(|e| e == "safetensors"))
                {
                    std::fs::File::options()
                        .write(true)
                        .open(file)
                        .unwrap()
                        .set_len(0)
                        .unwrap();
                }
            }
        };
        let options = RunOptions {
            batch_size: 1,
            trace: false,
            keep_networks: false,
        };
        pipeline
            .generate_all(
                &work.jobs(),
                options,
                &mut |_| ControlFlow::Continue(()),
                &mut sink,
            )
            .unwrap();
        pictures
    };
    let expected = draw(false);
    assert_eq!(expected.len(), 6);
    assert!(draw(true) == expected);
}

/// Bytes that a run has asked the system for: of a process that has ended and not been waited for.
#[cfg(target_os = "linux")]
fn bytes_read(command: &mut Command) -> u64 {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut vec![])
        .unwrap();
    let proc = |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", child.id()));
    while proc("stat").is_ok_and(|stat| !stat.contains(") Z ")) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let io = proc("io").unwrap();
    assert!(child.wait().unwrap().success());
    let read = io.lines().find_map(|line| line.strip_prefix("rchar: "));
    read.unwrap().parse().unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn six_pictures_of_three_prompts_read_no_more_than_one() {
    let dir = tempfile::tempdir().unwrap();
    let read = |name: &str, prompts: &str, seeds: &str| {
        std::fs::write(dir.path().join(name), prompts).unwrap();
        let mut command = quick(dir.path(), &fixture("sd1"));
        // unless told, candle looks up the number of processors in /proc for every product
        command.env("RAYON_NUM_THREADS", "1");
        bytes_read(
            command
                .args(["-s", seeds, "-o", &format!("{name}-{{index}}.png")])
                .stdin(std::fs::File::open(dir.path().join(name)).unwrap()),
        )
    };
    let parts = [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ];
    let smallest = parts
        .iter()
        .map(|part| std::fs::metadata(fixture("sd1").join(part)).unwrap().len())
        .min()
        .unwrap();
    let (one, six) = (
        read("one", "a frog\n", "1"),
        read("six", "a frog\nthe cat\na house\n", "1,2"),
    );
    assert!(
        six < one + smallest / 2,
        "{six} bytes for six pictures, {one} for one"
    );
}

#[test]
fn each_stage_is_entered_once_for_all_prompts() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = quick(dir.path(), &fixture("sd1"));
    let output = with_prompts(
        command.args(["-v", "-s", "1..4", "-b", "2"]),
        "a frog\nthe cat\n",
    );
    assert_eq!(stdout(&output).lines().count(), 6);
    let said = stderr(&output);
    for (stage, times) in [
        ("encoding the prompt", 1),
        ("reading the U-Net", 1),
        ("reading the VAE", 1),
        ("drawing", 3),
        ("decoding", 3),
    ] {
        assert_eq!(
            said.lines()
                .filter(|l| l.starts_with(&format!("{stage}: ")))
                .count(),
            times,
            "{stage} in {said}"
        );
    }
}

// 23

#[test]
fn long_prompts_of_any_script_are_cut_between_letters() {
    let tokenizer = Tokenizer::new(&TokenizerFiles::Clip, &json!({})).unwrap();
    let (start, end) = (49406, 49407);
    for piece in [
        "🐸",
        "👨‍👩‍👧",
        "日本",
        "e\u{301}te\u{301} ",
        "Ёлка ",
        "ﬁİ",
        "กบ",
        "\u{202e}a",
        "a\u{0}b ",
        "\u{10ffff}",
    ] {
        for times in [1, 20, 26, 38, 75, 76, 400] {
            let text = piece.repeat(times);
            let tokens = tokenizer.encode(&text, 77).unwrap();
            assert_eq!(
                (tokens.ids.len(), tokens.ids[0], tokens.ids[76]),
                (77, start, end),
                "{piece:?} {times} times"
            );
            assert_eq!(
                tokens.cut.is_some(),
                tokenizer.ids(&text).unwrap().len() > 77,
                "{piece:?} {times} times"
            );
            assert!(
                tokens.cut.is_none_or(|cut| text.trim().ends_with(&cut)),
                "{piece:?} {times} times"
            );
        }
    }
}

// 24

#[test]
fn the_last_step_of_dpmpp_lands_on_the_denoised_picture() {
    // a network that is sure of its picture: every step goes there, and the last, to no noise at
    // all, arrives
    let picture = wave(&[1, 3, 3, 4]);
    for model in ["sd1", "sd2", "odd"] {
        let config = SchedulerConfig::from_json(&json(
            &fixture(model).join("scheduler/scheduler_config.json"),
        ))
        .unwrap();
        for sampler in [Sampler::Dpmpp2m, Sampler::Dpmpp2mSde, Sampler::Dpmpp3mSde] {
            for (schedule, steps) in [None, Some(Schedule::Karras)]
                .into_iter()
                .flat_map(|s| (1..=30).map(move |n| (s, n)))
            {
                let plan = plan(&config, sampler, schedule, steps, None).unwrap();
                let mut noise = sdgen::sampling::noise::Generator::new(steps as u64);
                let x = (noise.latents(3, 3, 4).unwrap() * plan.init_noise_sigma()).unwrap();
                let result = sample(
                    &plan,
                    x,
                    &mut |_, _, _| Ok(picture.clone()),
                    &mut || noise.latents(3, 3, 4),
                    &mut |_| Ok(None),
                )
                .unwrap();
                let off = values(&(result - &picture).unwrap())
                    .into_iter()
                    .map(f32::abs)
                    .fold(0f32, f32::max);
                assert!(
                    off < 1e-6,
                    "{steps} steps of {sampler} for {model} end {off} away"
                );
            }
        }
    }
}

// 18

#[test]
fn a_single_file_of_another_family_is_named_as_such_and_not_as_half_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let mut entries = real_header("real_sd1.json");
    entries.retain(|(key, _)| !key.starts_with("cond_stage_model."));
    // a block of AuraFlow
    entries.push((
        "model.diffusion_model.double_layers.0.attn.w1q.weight".into(),
        vec![4608, 1536],
    ));
    write_header(
        &dir.path().join("auraflow.safetensors"),
        &entries,
        None,
        None,
    );
    for args in [
        &["inspect", "auraflow.safetensors"][..],
        &["x", "-m", "auraflow.safetensors"],
    ] {
        let said = fail(
            sdgen(dir.path()).args(args),
            3,
            &["`auraflow.safetensors` is a model of a family that sdgen does not draw yet"],
        );
        assert!(!said.contains("only a part"), "{said}");
    }
}
