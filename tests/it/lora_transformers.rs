//! LoRAs of transformers in the layouts that trainers save, on the tiny FLUX.2 klein: each changes
//! the weights as diffusers' own layout does, which `flow` compares with diffusers.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use sdgen::weights::lora::Lora;
use sdgen::weights::{Checkpoint, Origin};
use std::collections::HashMap;
use std::path::Path;

const BLOCK: &str = "transformer_blocks.0";
const SINGLE: &str = "single_transformer_blocks.1";

/// The layers of a klein by the names of Black Forest Labs, with those of diffusers whose rows they
/// are one after the other.
fn layers() -> Vec<(String, Vec<String>)> {
    let in_blocks = [
        (
            "double_blocks.0.img_attn.qkv",
            BLOCK,
            "attn.to_q attn.to_k attn.to_v",
        ),
        (
            "double_blocks.0.txt_attn.qkv",
            BLOCK,
            "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        ),
        ("double_blocks.0.img_attn.proj", BLOCK, "attn.to_out.0"),
        ("double_blocks.0.txt_attn.proj", BLOCK, "attn.to_add_out"),
        ("double_blocks.0.img_mlp.0", BLOCK, "ff.linear_in"),
        ("double_blocks.0.img_mlp.2", BLOCK, "ff.linear_out"),
        ("double_blocks.0.txt_mlp.0", BLOCK, "ff_context.linear_in"),
        ("double_blocks.0.txt_mlp.2", BLOCK, "ff_context.linear_out"),
        ("single_blocks.1.linear1", SINGLE, "attn.to_qkv_mlp_proj"),
        ("single_blocks.1.linear2", SINGLE, "attn.to_out"),
    ];
    let fixed = [
        ("img_in", "x_embedder"),
        ("txt_in", "context_embedder"),
        (
            "time_in.in_layer",
            "time_guidance_embed.timestep_embedder.linear_1",
        ),
        (
            "time_in.out_layer",
            "time_guidance_embed.timestep_embedder.linear_2",
        ),
        (
            "double_stream_modulation_img.lin",
            "double_stream_modulation_img.linear",
        ),
        (
            "double_stream_modulation_txt.lin",
            "double_stream_modulation_txt.linear",
        ),
        (
            "single_stream_modulation.lin",
            "single_stream_modulation.linear",
        ),
        ("final_layer.adaLN_modulation.1", "norm_out.linear"),
        ("final_layer.linear", "proj_out"),
    ];
    let in_blocks = in_blocks.into_iter().map(|(original, block, names)| {
        let names = names.split(' ').map(|name| format!("{block}.{name}"));
        (original.to_string(), names.collect())
    });
    let fixed = fixed
        .into_iter()
        .map(|(original, name)| (original.to_string(), vec![name.to_string()]));
    in_blocks.chain(fixed).collect()
}

fn klein() -> Checkpoint {
    Checkpoint::open(Origin::Path(&fixture("klein"))).unwrap()
}

fn shape(model: &Checkpoint, layer: &str) -> (usize, usize) {
    let shape = model.shape(&format!("transformer.{layer}.weight")).unwrap();
    (shape[0], shape[1])
}

/// Numbers from -1 to 1, times `scale`.
fn numbers(seed: u32, (rows, columns): (usize, usize), scale: f32) -> Tensor {
    let number = |i: u32| {
        let mixed = (i + 1 + seed * 7919).wrapping_mul(2654435761) >> 8;
        (mixed as f32 / (1 << 23) as f32 - 1.0) * scale
    };
    let values: Vec<f32> = (0..(rows * columns) as u32).map(number).collect();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
}

/// The matrices (down, up) of each layer of Black Forest Labs' names, of rank 2.
fn matrices(model: &Checkpoint) -> Vec<(Tensor, Tensor)> {
    let of = |(i, (_, names)): (usize, (String, Vec<String>))| {
        let (rows, columns) = shape(model, &names[0]);
        let seed = i as u32;
        (
            numbers(2 * seed, (2, columns), 0.3),
            numbers(2 * seed + 1, (rows * names.len(), 2), 0.3),
        )
    };
    layers().into_iter().enumerate().map(of).collect()
}

/// Part `index` of `of` of the rows, and of adaLN's the halves in diffusers' order.
fn rows_of(original: &str, up: &Tensor, index: usize, of: usize) -> Tensor {
    let rows = up.dim(0).unwrap();
    if original == "final_layer.adaLN_modulation.1" {
        let half = |from| up.narrow(0, from, rows / 2).unwrap();
        return Tensor::cat(&[half(rows / 2), half(0)], 0).unwrap();
    }
    let part = up.narrow(0, index * rows / of, rows / of).unwrap();
    part.contiguous().unwrap()
}

type Tensors = HashMap<String, Tensor>;

/// A file with diffusers' names: `name` makes a key of a layer and of `A` or `B`.
fn diffusers(name: impl Fn(&str, char) -> String) -> Tensors {
    let model = klein();
    let mut tensors = Tensors::new();
    for ((original, names), (down, up)) in layers().into_iter().zip(matrices(&model)) {
        for (i, layer) in names.iter().enumerate() {
            tensors.insert(name(layer, 'A'), down.clone());
            tensors.insert(name(layer, 'B'), rows_of(&original, &up, i, names.len()));
        }
    }
    tensors
}

/// The same with the original names.
fn original(name: impl Fn(&str, char) -> String) -> Tensors {
    let model = klein();
    let mut tensors = Tensors::new();
    for ((original, _), (down, up)) in layers().into_iter().zip(matrices(&model)) {
        tensors.insert(name(&original, 'A'), down);
        tensors.insert(name(&original, 'B'), up);
    }
    tensors
}

/// kohya's name of a layer's matrix.
fn kohya(prefix: &str, layer: &str, matrix: char) -> String {
    let side = if matrix == 'A' { "down" } else { "up" };
    format!("{prefix}{}.lora_{side}.weight", layer.replace('.', "_"))
}

/// All weights of the transformer as they are with this file, of which every tensor must be used.
fn changed(tensors: &Tensors, strength: f64) -> Vec<(String, Vec<f32>)> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    save(tensors, &path);
    let mut model = klein();
    model
        .use_loras([Lora::open(&path, strength)], true)
        .unwrap();
    weights(&model)
}

fn weights(model: &Checkpoint) -> Vec<(String, Vec<f32>)> {
    let all = model.shapes("transformer");
    let read = |(name, shape): (&str, &[usize])| {
        let weights = model.weights("transformer", &Device::Cpu, DType::F32);
        (name.to_string(), values(&weights.get(name, shape).unwrap()))
    };
    all.map(read).collect()
}

#[test]
fn every_layout_changes_the_same_weights_by_the_same() {
    let peft = |prefix: &'static str| {
        move |layer: &str, matrix: char| format!("{prefix}{layer}.lora_{matrix}.weight")
    };
    let expected = changed(&diffusers(peft("transformer.")), 0.7);
    let plain = weights(&klein());
    let count = expected
        .iter()
        .zip(&plain)
        .filter(|(a, b)| a.1 != b.1)
        .count();
    let names: usize = layers().iter().map(|(_, names)| names.len()).sum();
    assert_eq!(count, names);
    let downs = |layer: &str, matrix: char| kohya("", &format!("diffusion_model.{layer}"), matrix);
    let in_dots = |layer: &str, matrix: char| {
        let flat = downs(layer, matrix);
        let (_, end) = flat.split_at(flat.find(".lora_").unwrap());
        format!("diffusion_model.{layer}{end}")
    };
    let default = |layer: &str, matrix: char| {
        format!("base_model.model.{layer}.lora_{matrix}.default.weight")
    };
    let cut = |layer: &str, matrix: char| {
        let cut = match layer.starts_with("transformer_blocks.") {
            true => layer.replacen("transformer_", "sformer_", 1),
            false => layer.to_string(),
        };
        format!("diffusion_model.{cut}.lora_{matrix}.weight")
    };
    for (what, tensors) in [
        ("no prefix", diffusers(peft(""))),
        ("PEFT's own", diffusers(peft("base_model.model."))),
        (
            "PEFT's own twice",
            diffusers(peft("base_model.model.transformer.")),
        ),
        ("an adapter's name", diffusers(default)),
        ("ComfyUI's prefix", diffusers(peft("diffusion_model."))),
        ("a prefix cut wrongly", diffusers(cut)),
        (
            "OneTrainer",
            diffusers(|l, m| kohya("lora_transformer_", l, m)),
        ),
        (
            "kohya's prefix",
            diffusers(|l, m| kohya("lora_unet_", l, m)),
        ),
        ("LyCORIS", diffusers(|l, m| kohya("lycoris_", l, m))),
        ("ai-toolkit", original(peft("diffusion_model."))),
        ("ComfyUI", original(in_dots)),
        ("original names", original(peft(""))),
        (
            "original names of PEFT",
            original(peft("base_model.model.")),
        ),
        ("original names of an adapter", original(default)),
        (
            "whole original names",
            original(peft("model.diffusion_model.")),
        ),
        ("kohya", original(|l, m| kohya("lora_unet_", l, m))),
    ] {
        let got = changed(&tensors, 0.7);
        for ((name, got), (_, expected)) in got.iter().zip(&expected) {
            assert!(got == expected, "{what}: {name}");
        }
    }
    // an alpha of twice the rank doubles the change, of each part of a fused layer
    let mut kohyas = original(|l, m| kohya("lora_unet_", l, m));
    for (layer, _) in layers() {
        let alpha = Tensor::new(&[4f32], &Device::Cpu).unwrap().squeeze(0);
        let key = format!("lora_unet_{}.alpha", layer.replace('.', "_"));
        kohyas.insert(key, alpha.unwrap());
    }
    let doubled = changed(&diffusers(peft("transformer.")), 1.4);
    for ((name, got), (_, expected)) in changed(&kohyas, 0.7).iter().zip(&doubled) {
        assert!(got == expected, "alpha: {name}");
    }
}

#[test]
fn the_lora_of_diffusers_golden_draws_its_picture_from_a_file_with_fused_layers() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&fixture("klein"), &dir.path().join("klein"));
    let own = load(&fixture("klein/lora.safetensors"));
    let mut tensors = Tensors::new();
    let zeros = |part: usize, up: &Tensor| {
        let parts: Vec<Tensor> = (0..3)
            .map(|i| {
                if i == part {
                    up.clone()
                } else {
                    up.zeros_like().unwrap()
                }
            })
            .collect();
        Tensor::cat(&parts, 0).unwrap()
    };
    let blocks: Vec<(String, Vec<String>)> = [0, 1]
        .iter()
        .flat_map(|i| {
            layers().into_iter().map(move |(original, names)| {
                let at = |name: &str| {
                    let name = name.replace("single_blocks.1", "single_blocks.N");
                    let name = name.replace("blocks.0", "blocks.N");
                    let name =
                        name.replace("single_transformer_blocks.1", "single_transformer_blocks.N");
                    name.replace("blocks.N", &format!("blocks.{i}"))
                };
                (at(&original), names.iter().map(|name| at(name)).collect())
            })
        })
        .collect();
    for (original, names) in blocks {
        for (part, name) in names.iter().enumerate() {
            let Some(down) = own.get(&format!("transformer.{name}.lora_A.weight")) else {
                continue;
            };
            let up = &own[&format!("transformer.{name}.lora_B.weight")];
            let up = if names.len() > 1 {
                zeros(part, up)
            } else {
                up.clone()
            };
            let layer = format!("lora_unet_{}", original.replace('.', "_"));
            tensors.insert(format!("{layer}.lora_down.weight"), down.clone());
            tensors.insert(format!("{layer}.lora_up.weight"), up);
            // as in the header of diffusers' file
            let alpha = Tensor::new(&[3f32], &Device::Cpu).unwrap();
            tensors.insert(format!("{layer}.alpha"), alpha.squeeze(0).unwrap());
        }
    }
    assert_eq!(tensors.len(), 3 * own.len() / 2);
    save(&tensors, &dir.path().join("kohya.safetensors"));
    let facts = &goldens("klein")["lora"];
    let mut command = sdgen(dir.path());
    command.args([
        "-m",
        "klein",
        facts["prompt"].as_str().unwrap(),
        "--steps",
        "2",
    ]);
    command.args(["-W", "64", "-H", "64", "-s", "7", "-o", "x.png", "--strict"]);
    let lora = format!("kohya.safetensors:{}", facts["strength"]);
    succeed(command.args(["--lora", &lora]));
    let golden = &load(&fixture("klein/goldens.safetensors"))["lora.picture"];
    assert_same_levels("kohya", &pixels(&dir.path().join("x.png")), &levels(golden));
    let told = succeed(sdgen(dir.path()).args(["inspect", "kohya.safetensors", "--json"]));
    let told: serde_json::Value = serde_json::from_slice(&told.stdout).unwrap();
    assert_eq!(told["family"], "FLUX.2 klein");
    assert_eq!(told["format"], "kohya, original block names");
}

/// The change of a weight by a file.
fn change(tensors: Tensors, layer: &str) -> Vec<f32> {
    let name = format!("{layer}.weight");
    let of = |weights: Vec<(String, Vec<f32>)>| {
        let mut weights = weights.into_iter();
        weights.find(|(own, _)| *own == name).unwrap().1
    };
    let (with, without) = (of(changed(&tensors, 1.0)), of(weights(&klein())));
    with.iter().zip(&without).map(|(a, b)| a - b).collect()
}

fn assert_near(got: &[f32], expected: &Tensor) {
    let expected = values(expected);
    assert_eq!(got.len(), expected.len());
    let most = expected
        .iter()
        .fold(0f32, |most, value| most.max(value.abs()));
    // the weights of the fixture are f16, and rounded to that
    let off = got.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    let off = off.fold(0f32, f32::max);
    assert!(most > 0.01 && off < 2e-3 * most.max(1.0), "{off} of {most}");
}

#[test]
fn kronecker_products_over_fused_layers_are_split_by_rows() {
    let (left, right) = (numbers(1, (6, 4), 0.5), numbers(2, (16, 8), 0.5));
    // row (a, c) and column (b, d) of the product
    let product = left.reshape((6, 1, 4, 1)).unwrap();
    let product = product.broadcast_mul(&right.reshape((1, 16, 1, 8)).unwrap());
    let product = product.unwrap().reshape((96, 32)).unwrap();
    for (i, name) in ["to_q", "to_k", "to_v"].iter().enumerate() {
        let layer = "diffusion_model.double_blocks.0.img_attn.qkv";
        let tensors = Tensors::from([
            (format!("{layer}.lokr_w1"), left.clone()),
            (format!("{layer}.lokr_w2"), right.clone()),
        ]);
        let expected = product.narrow(0, 32 * i, 32).unwrap().contiguous().unwrap();
        assert_near(&change(tensors, &format!("{BLOCK}.attn.{name}")), &expected);
    }
    let layer = "lycoris_transformer_blocks_0_attn_to_add_out";
    let tensors = Tensors::from([
        (format!("{layer}.lokr_w1"), numbers(1, (4, 4), 0.5)),
        (format!("{layer}.lokr_w2"), numbers(2, (8, 8), 0.5)),
    ]);
    assert!(
        change(tensors, &format!("{BLOCK}.attn.to_add_out"))
            .iter()
            .any(|x| *x != 0.0)
    );
}

#[test]
fn doras_of_fused_layers_take_their_rows_of_the_magnitudes() {
    let model = klein();
    let layer = format!("{BLOCK}.attn.to_k");
    let weights = model.weights("transformer", &Device::Cpu, DType::F32);
    let weight = weights.get(&format!("{layer}.weight"), &[32, 32]).unwrap();
    let (down, up) = (numbers(1, (2, 32), 0.3), numbers(2, (96, 2), 0.3));
    let magnitudes = (numbers(3, (96, 1), 0.5) + 1.5).unwrap();
    let third = |x: &Tensor| x.narrow(0, 32, 32).unwrap().contiguous().unwrap();
    let sum = (&weight + third(&up).matmul(&down).unwrap()).unwrap();
    let norms = sum.sqr().unwrap().sum_keepdim(1).unwrap().sqrt().unwrap();
    let factors = (third(&magnitudes) / norms).unwrap();
    let expected = (sum.broadcast_mul(&factors).unwrap() - &weight).unwrap();
    let name = "lora_unet_double_blocks_0_img_attn_qkv";
    let tensors = Tensors::from([
        (format!("{name}.lora_down.weight"), down),
        (format!("{name}.lora_up.weight"), up),
        (format!("{name}.dora_scale"), magnitudes),
    ]);
    assert_near(&change(tensors, &layer), &expected);
}

/// Writes a file with a low-rank change of each layer of (rows, columns).
fn write(path: &Path, layers: &[(&str, usize, usize)]) {
    let tensors = layers.iter().flat_map(|(name, rows, columns)| {
        [
            (
                format!("{name}.lora_A.weight"),
                numbers(1, (2, *columns), 0.3),
            ),
            (format!("{name}.lora_B.weight"), numbers(2, (*rows, 2), 0.3)),
        ]
    });
    save(&tensors.collect(), path);
}

#[test]
fn what_is_for_another_model_says_for_which() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&fixture("klein"), &dir.path().join("klein"));
    let path = dir.path().join("x.safetensors");
    let refused = |model: &str, says: &str| {
        let mut command = sdgen(dir.path());
        command.args(["-m", model, "a frog", "--lora", "x.safetensors"]);
        fail(&mut command, 3, &["does not fit", says, "hint: "]);
    };
    // of FLUX.1 two of three layers have names and sizes that this klein has too
    let flux1 = [
        ("diffusion_model.double_blocks.0.img_attn.qkv", 96, 32),
        ("diffusion_model.double_blocks.0.img_attn.proj", 32, 32),
        ("diffusion_model.double_blocks.0.img_mlp.0", 128, 32),
    ];
    write(&path, &flux1);
    refused("klein", "it seems to be for FLUX.1");
    let flux1 = [
        ("transformer.transformer_blocks.0.attn.to_q", 32, 32),
        ("transformer.single_transformer_blocks.0.attn.to_q", 32, 32),
    ];
    write(&path, &flux1);
    refused("klein", "it seems to be for FLUX.1");
    // klein 9B's layers are wider
    write(
        &path,
        &[("diffusion_model.double_blocks.0.img_mlp.0", 288, 48)],
    );
    refused("klein", "changes weights of 288x48 where that has 192x32");
    write(
        &path,
        &[("diffusion_model.double_blocks.0.img_mlp.0", 192, 32)],
    );
    let sd1 = fixture("sd1");
    refused(sd1.to_str().unwrap(), "it seems to be for FLUX.2 klein");
    // what fits nowhere is told
    write(
        &path,
        &[
            ("diffusion_model.double_blocks.0.img_attn.qkv", 96, 32),
            ("diffusion_model.double_blocks.7.img_attn.qkv", 96, 32),
        ],
    );
    let mut command = sdgen(dir.path());
    command.args([
        "-m",
        "klein",
        "a frog",
        "--lora",
        "x.safetensors",
        "--strict",
    ]);
    fail(&mut command, 3, &["2 of 4 tensors", "double_blocks.7"]);
}

#[test]
fn every_layout_of_z_images_loras_changes_the_same_weights_by_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let model = || Checkpoint::open(Origin::Path(&fixture("z_image"))).unwrap();
    let fused: [(&str, &[&str]); 7] = [
        (
            "layers.0.attention.qkv",
            &[
                "layers.0.attention.to_q",
                "layers.0.attention.to_k",
                "layers.0.attention.to_v",
            ],
        ),
        ("layers.0.attention.out", &["layers.0.attention.to_out.0"]),
        ("layers.1.feed_forward.w1", &["layers.1.feed_forward.w1"]),
        (
            "layers.1.adaLN_modulation.0",
            &["layers.1.adaLN_modulation.0"],
        ),
        (
            "noise_refiner.0.attention.out",
            &["noise_refiner.0.attention.to_out.0"],
        ),
        (
            "context_refiner.1.feed_forward.w2",
            &["context_refiner.1.feed_forward.w2"],
        ),
        ("cap_embedder.1", &["cap_embedder.1"]),
    ];
    let file = |is_fused: bool, name: &dyn Fn(&str, char) -> String| {
        let mut tensors = Tensors::new();
        for (i, (original, names)) in fused.iter().enumerate() {
            let (rows, columns) = shape(&model(), names[0]);
            let down = numbers(i as u32, (2, columns), 0.3);
            let up = numbers(i as u32 + 9, (rows * names.len(), 2), 0.3);
            if is_fused {
                tensors.insert(name(original, 'A'), down);
                tensors.insert(name(original, 'B'), up);
                continue;
            }
            for (part, layer) in names.iter().enumerate() {
                tensors.insert(name(layer, 'A'), down.clone());
                tensors.insert(name(layer, 'B'), rows_of(original, &up, part, names.len()));
            }
        }
        tensors
    };
    let changed = |tensors: &Tensors| {
        save(tensors, &path);
        let mut model = model();
        model.use_loras([Lora::open(&path, 0.7)], true).unwrap();
        weights(&model)
    };
    let peft = |prefix: &'static str| {
        move |layer: &str, matrix: char| format!("{prefix}{layer}.lora_{matrix}.weight")
    };
    let expected = changed(&file(false, &peft("transformer.")));
    let plain = weights(&model());
    let count = expected
        .iter()
        .zip(&plain)
        .filter(|(a, b)| a.1 != b.1)
        .count();
    assert_eq!(count, 9);
    let kohyas = |layer: &str, matrix: char| kohya("lora_unet_", layer, matrix);
    for (what, tensors) in [
        ("no prefix", file(false, &peft(""))),
        ("PEFT's own", file(false, &peft("base_model.model."))),
        ("ai-toolkit", file(false, &peft("diffusion_model."))),
        ("kohya", file(false, &kohyas)),
        ("kohya, fused", file(true, &kohyas)),
        ("ComfyUI, fused", file(true, &peft("diffusion_model."))),
    ] {
        for ((name, got), (_, expected)) in changed(&tensors).iter().zip(&expected) {
            assert!(got == expected, "{what}: {name}");
        }
    }
    copy_folder(&fixture("klein"), &dir.path().join("klein"));
    let mut command = sdgen(dir.path());
    command.args(["-m", "klein", "a frog", "--lora", "x.safetensors"]);
    fail(&mut command, 3, &["it seems to be for Z-Image", "hint: "]);
}
