//! `--lora`: files of every format, against diffusers and against their formulas. Goldens:
//! `fixtures/lora.py`.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use sdgen::image::read_metadata;
use sdgen::weights::lora::Lora;
use sdgen::weights::{Checkpoint, Origin};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

fn lora(name: &str) -> String {
    fixture(&format!("lora/{name}.safetensors"))
        .to_str()
        .unwrap()
        .into()
}

fn command(folder: &Path, model: &Path, options: &[&str], output: &str) -> Command {
    let mut command = sdgen(folder);
    command.args([
        "a frog", "-s", "7", "--steps", "2", "-g", "5", "-W", "16", "-H", "16", "--force", "-o",
        output, "-m",
    ]);
    command.arg(model).args(options);
    command
}

fn draw(folder: &Path, options: &[&str], output: &str) -> RgbImage {
    succeed(&mut command(folder, &fixture("sd1"), options, output));
    image::open(folder.join(output)).unwrap().to_rgb8()
}

#[test]
fn pictures_with_loras_of_every_format_are_those_of_diffusers_and_of_the_formulas() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = load(&fixture("lora/goldens.safetensors"));
    let runs = &goldens("lora")["runs"];
    let runs = runs.as_array().unwrap();
    assert_eq!(runs.len(), 16);
    for run in runs {
        let name = run["name"].as_str().unwrap();
        let mut plain = sdgen(dir.path());
        plain.args([
            run["prompt"].as_str().unwrap(),
            "-n",
            run["negative_prompt"].as_str().unwrap(),
            "--force",
            "-m",
        ]);
        plain.arg(fixture(run["model"].as_str().unwrap()));
        for key in ["seed", "steps", "guidance", "width", "height"] {
            plain.args([format!("--{key}"), run[key].to_string()]);
        }
        plain.args(["--prompt-syntax", "plain", "-q", "-o", "plain.png"]);
        succeed(&mut plain);
        for file in run["loras"].as_array().unwrap() {
            let path = fixture("lora").join(file[0].as_str().unwrap());
            plain
                .arg("--lora")
                .arg(format!("{}:{}", path.display(), file[1]));
        }
        succeed(plain.args(["--strict", "-o", "with.png"]));
        let golden = levels(&tensors[&format!("run.{name}.image")]);
        let [without, with] = ["plain.png", "with.png"]
            .map(|file| image::open(dir.path().join(file)).unwrap().to_rgb8());
        assert_same_levels(name, with.as_raw(), &golden);
        // measured: 43 to 215
        assert!(
            worst_level(without.as_raw(), &golden) > VISIBLE,
            "{name}: the LoRA should matter"
        );
    }
}

#[test]
fn a_strength_of_zero_changes_no_bit_and_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    draw(dir.path(), &[], "plain.png");
    draw(
        dir.path(),
        &[
            "--lora",
            &format!("{}:0", lora("kohya")),
            "--lora",
            &format!("{}:0.0", lora("lokr")),
        ],
        "zero.png",
    );
    let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    assert!(read("plain.png") == read("zero.png"));
}

/// A model's weight of the sd1 fixture, changed by these.
fn weight(loras: &[(&str, f64)], part: &str, name: &str) -> Tensor {
    let mut checkpoint = Checkpoint::open(Origin::Path(&fixture("sd1"))).unwrap();
    let opened = loras.iter().map(|(file, strength)| {
        let path = if file.contains('/') {
            file.to_string()
        } else {
            lora(file)
        };
        Lora::open(Path::new(&path), *strength)
    });
    checkpoint.use_loras(opened, true).unwrap();
    let shape = checkpoint
        .shape(&format!("{part}.{name}"))
        .unwrap()
        .to_vec();
    checkpoint
        .weights(part, &Device::Cpu, DType::F32)
        .get(name, &shape)
        .unwrap()
}

/// A weight of the sd1 fixture's U-Net, changed by a LoRA of these tensors and this header.
fn changed(
    tensors: &[(&str, Tensor)],
    header: &[(&str, &str)],
    strength: f64,
    name: &str,
) -> Tensor {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let header = header
        .iter()
        .map(|(key, value)| (key.to_string(), value.to_string()));
    let tensors = tensors
        .iter()
        .map(|(key, t)| (key.to_string(), t.contiguous().unwrap()));
    let tensors: HashMap<String, Tensor> = tensors.collect();
    safetensors::serialize_to_file(&tensors, Some(header.collect()), &path).unwrap();
    weight(&[(path.to_str().unwrap(), strength)], "unet", name)
}

/// Numbers from -1 to 1, times `scale`.
fn numbers(seed: u32, shape: &[usize], scale: f64) -> Tensor {
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count as u32)
        .map(|i| {
            let mixed = (i + 1 + seed * 7919).wrapping_mul(2654435761) >> 8;
            (f64::from(mixed) / f64::from(1 << 23) * scale - scale) as f32
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The weights of the fixture are f16, and rounded to that.
fn assert_near(what: &str, got: &Tensor, exact: &Tensor) {
    assert_eq!(got.dims(), exact.dims(), "{what}");
    let off = largest(&(got - exact).unwrap());
    assert!(off < 2e-3 * largest(exact).max(1.0), "{what}: off by {off}");
}

const LINEAR: &str = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
const CONVOLUTION: &str = "down_blocks.0.resnets.0.conv1";

#[test]
fn the_strength_of_dora_is_that_of_the_product_before_it_is_normalized() {
    let name = format!("{LINEAR}.weight");
    let plain = weight(&[], "unet", &name);
    let (rows, columns) = plain.dims2().unwrap();
    let (down, up) = (numbers(1, &[2, columns], 0.3), numbers(2, &[rows, 2], 0.3));
    let lengths = (numbers(3, &[rows, 1], 0.5) + 1.5).unwrap();
    for (strength, key) in [
        (0.5, "lora_magnitude_vector"),
        (1.0, "lora_magnitude_vector"),
        (-0.7, "dora_scale"),
    ] {
        // peft's DoraLinearLayer, whose scaling holds the strength
        let sum = (&plain + (up.matmul(&down).unwrap() * strength).unwrap()).unwrap();
        let norms = sum.sqr().unwrap().sum_keepdim(1).unwrap().sqrt().unwrap();
        let factors = (&lengths / norms).unwrap();
        let exact = sum.broadcast_mul(&factors).unwrap();
        let keys =
            ["lora_A.weight", "lora_B.weight", key].map(|end| format!("unet.{LINEAR}.{end}"));
        let tensors = [
            (&*keys[0], down.clone()),
            (&*keys[1], up.clone()),
            (&*keys[2], lengths.flatten_all().unwrap()),
        ];
        assert_near(key, &changed(&tensors, &[], strength, &name), &exact);
    }
}

#[test]
fn the_header_of_peft_gives_alphas_by_regular_expressions_and_lora_bias_changes_the_bias() {
    let name = format!("{LINEAR}.weight");
    let plain = weight(&[], "unet", &name);
    let (rows, columns) = plain.dims2().unwrap();
    let (down, up) = (numbers(1, &[2, columns], 0.3), numbers(2, &[rows, 2], 0.3));
    let config = r#"{"unet.lora_alpha": 2, "unet.alpha_pattern": {"attn2\\..*": 1, "attn[1]\\.to_(q|k)": 6, "to_q": 9}}"#;
    let keys = ["lora_A.weight", "lora_B.weight"].map(|end| format!("unet.{LINEAR}.{end}"));
    let tensors = [(&*keys[0], down.clone()), (&*keys[1], up.clone())];
    let header = [("lora_adapter_metadata", config)];
    let exact = (&plain + (up.matmul(&down).unwrap() * 3.0).unwrap()).unwrap();
    assert_near("alpha", &changed(&tensors, &header, 1.0, &name), &exact);

    // the bias of a convolution, at alpha / rank
    let name = format!("{CONVOLUTION}.bias");
    let plain = weight(&[], "unet", &name);
    let kernels = weight(&[], "unet", &format!("{CONVOLUTION}.weight"));
    let (rows, columns, h, w) = kernels.dims4().unwrap();
    let own = numbers(3, &[rows], 0.5);
    let keys = ["lora_A.weight", "lora_B.weight", "lora_B.bias"]
        .map(|end| format!("unet.{CONVOLUTION}.{end}"));
    let tensors = [
        (&*keys[0], numbers(1, &[4, columns, h, w], 0.1)),
        (&*keys[1], numbers(2, &[rows, 4, 1, 1], 0.1)),
        (&*keys[2], own.clone()),
    ];
    let exact = (&plain + (own * 0.25).unwrap()).unwrap();
    assert_near("bias", &changed(&tensors, &header, 0.5, &name), &exact);
}

#[test]
fn glora_multiplies_the_weight_and_adds_to_it() {
    for layer in [LINEAR, CONVOLUTION] {
        let name = format!("{layer}.weight");
        let plain = weight(&[], "unet", &name);
        let (rows, columns) = (plain.dim(0).unwrap(), plain.dim(1).unwrap());
        let kernel: &[usize] = &vec![1; plain.rank() - 2];
        let shape = |a, b| [&[a, b], kernel].concat();
        let a1 = numbers(1, &shape(columns, 2), 0.1);
        let a2 = numbers(2, &shape(2, columns), 0.1);
        let b1 = numbers(3, &shape(rows, 2), 0.1);
        let b2 = numbers(4, &[&[2, columns], &plain.dims()[2..]].concat(), 0.1);
        let start = format!("lycoris_{}", layer.replace('.', "_"));
        let keys = ["a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"]
            .map(|end| format!("{start}.{end}"));
        let tensors = [
            (&*keys[0], a1.clone()),
            (&*keys[1], a2.clone()),
            (&*keys[2], b1.clone()),
            (&*keys[3], b2.clone()),
            (&*keys[4], Tensor::new(1f32, &Device::Cpu).unwrap()),
        ];
        let matrix = |t: &Tensor| t.flatten_from(1).unwrap();
        let inputs = plain.flatten_from(2.min(plain.rank() - 1)).unwrap();
        let multiplied = if layer == LINEAR {
            plain.matmul(&a1).unwrap().matmul(&a2).unwrap()
        } else {
            // [rows, columns, h * w] -> a matrix for each position
            let inputs = inputs.transpose(1, 2).unwrap().contiguous().unwrap();
            let product = inputs
                .broadcast_matmul(&matrix(&a1))
                .unwrap()
                .broadcast_matmul(&matrix(&a2))
                .unwrap();
            product
                .transpose(1, 2)
                .unwrap()
                .reshape(plain.shape())
                .unwrap()
        };
        let added = matrix(&b1).matmul(&matrix(&b2)).unwrap();
        let sum = (multiplied + added.reshape(plain.shape()).unwrap()).unwrap();
        // alpha 1 of rank 2
        let exact = (&plain + (sum * (0.8 / 2.0)).unwrap()).unwrap();
        assert_near(layer, &changed(&tensors, &[], 0.8, &name), &exact);
    }
}

#[test]
fn ia3_multiplies_rows_or_columns() {
    for (layer, on_input) in [
        (LINEAR, 0u32),
        (LINEAR, 1),
        (CONVOLUTION, 0),
        (CONVOLUTION, 1),
    ] {
        let name = format!("{layer}.weight");
        let plain = weight(&[], "unet", &name);
        let kernel: &[usize] = &vec![1; plain.rank() - 2];
        let count = plain.dim(on_input as usize).unwrap();
        let factors = numbers(5, &[count], 0.5);
        let stored = match layer {
            LINEAR => factors.clone(),
            _ => factors.reshape([&[1, count], kernel].concat()).unwrap(),
        };
        let start = format!("lycoris_{}", layer.replace('.', "_"));
        let keys = ["weight", "on_input"].map(|end| format!("{start}.{end}"));
        let mark = Tensor::new(i64::from(on_input), &Device::Cpu).unwrap();
        let tensors = [(&*keys[0], stored), (&*keys[1], mark)];
        let along = match on_input {
            0 => factors.reshape([&[count, 1], kernel].concat()).unwrap(),
            _ => factors.reshape([&[1, count], kernel].concat()).unwrap(),
        };
        let exact = (&plain + plain.broadcast_mul(&(along * 0.6).unwrap()).unwrap()).unwrap();
        assert_near(&name, &changed(&tensors, &[], 0.6, &name), &exact);
    }
}

#[test]
fn orthogonal_finetuning_turns_rows_and_rescales_them() {
    let name = format!("{LINEAR}.weight");
    let plain = weight(&[], "unet", &name);
    let (rows, _) = plain.dims2().unwrap();
    // blocks of two, each by the angle whose half has the tangent 0.5
    let block = [0.0, 0.5f32, 0.0, 0.0].repeat(rows / 2);
    let (sin, cos) = (2.0 * 0.5f64.atan()).sin_cos();
    let [even, odd] = [0, 1].map(|first| {
        let rows: Vec<u32> = (0..rows as u32 / 2).map(|i| 2 * i + first).collect();
        let rows = Tensor::new(rows, &Device::Cpu).unwrap();
        plain.index_select(&rows, 0).unwrap()
    });
    let mixed = |a: f64, b: f64| ((&even * a).unwrap() + (&odd * b).unwrap()).unwrap();
    let pairs = |a: Tensor, b: Tensor| {
        Tensor::stack(&[a, b], 1)
            .unwrap()
            .reshape(plain.shape())
            .unwrap()
    };
    let start = format!("lycoris_{}", LINEAR.replace('.', "_"));
    let keys = ["oft_blocks", "rescale", "alpha"].map(|end| format!("{start}.{end}"));
    let factors = (numbers(6, &[rows, 1], 0.3) + 1.0).unwrap();
    let blocks = |shape: &[usize]| Tensor::from_vec(block.clone(), shape, &Device::Cpu).unwrap();
    let none = Tensor::new(0f32, &Device::Cpu).unwrap();
    let s = 0.5;
    let half = s * cos + 1.0 - s;
    let diagonal = [
        (&*keys[0], blocks(&[rows / 2, 2, 2])),
        (&*keys[1], factors.clone()),
        (&*keys[2], none.clone()),
    ];
    let exact = pairs(mixed(half, -s * sin), mixed(s * sin, half));
    let exact = exact.broadcast_mul(&factors).unwrap();
    assert_near("diag-OFT", &changed(&diagonal, &[], s, &name), &exact);
    // the butterfly's first stage is of the same blocks, and turns the other way
    let butterfly = [(&*keys[0], blocks(&[1, rows / 2, 2, 2])), (&*keys[2], none)];
    let exact = pairs(mixed(cos, sin), mixed(-sin, cos));
    assert_near("BOFT", &changed(&butterfly, &[], 1.0, &name), &exact);
}

#[test]
fn whole_factors_of_lokr_take_the_scale_that_the_header_tells() {
    let name = format!("{LINEAR}.weight");
    let plain = weight(&[], "unet", &name);
    let (rows, columns) = plain.dims2().unwrap();
    let whole = numbers(1, &[rows, columns], 0.1);
    let start = format!("lycoris_{}", LINEAR.replace('.', "_"));
    let keys = ["lokr_w1", "lokr_w2", "alpha"].map(|end| format!("{start}.{end}"));
    for (alpha, header, scale) in [
        // 8 to the power of 1.5: rank-stabilised
        (22.627f32, &[("ss_network_dim", "8")][..], 8f64.sqrt()),
        (8.0, &[("ss_network_dim", "8")], 1.0),
        (22.627, &[], 1.0),
    ] {
        let tensors = [
            (
                &*keys[0],
                Tensor::ones((1, 1), DType::F32, &Device::Cpu).unwrap(),
            ),
            (&*keys[1], whole.clone()),
            (&*keys[2], Tensor::new(alpha, &Device::Cpu).unwrap()),
        ];
        let exact = (&plain + (&whole * scale).unwrap()).unwrap();
        assert_near("LoKr", &changed(&tensors, header, 1.0, &name), &exact);
    }
}

#[test]
fn tags_find_loras_in_folders_below_the_one_that_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("loras/styles/deep");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::copy(lora("kohya"), folder.join("ink.safetensors")).unwrap();
    let tagged = |tag: &str, output: &str| {
        let mut command = sdgen(dir.path());
        let small = [
            "-s",
            "7",
            "--steps",
            "2",
            "-W",
            "16",
            "-H",
            "16",
            "--lora-dir",
            "loras",
        ];
        command
            .arg(format!("a frog {tag}"))
            .args(small)
            .arg("-m")
            .arg(fixture("sd1"));
        command.args(["--force", "-o", output]);
        command
    };
    succeed(&mut tagged("<lora:ink:1>", "a.png"));
    succeed(&mut tagged("<lora:styles/deep/ink:1>", "b.png"));
    assert!(pixels(&dir.path().join("a.png")) == pixels(&dir.path().join("b.png")));
    let said = ["has no LoRA `inc`", "did you mean `ink`?"];
    fail(&mut tagged("<lora:inc:1>", "c.png"), 2, &said);
    std::fs::copy(lora("old"), dir.path().join("loras/styles/ink.safetensors")).unwrap();
    let said = [
        "`ink` is both `",
        "hint: name it with its folder, as in `<lora:styles/",
    ];
    fail(&mut tagged("<lora:ink:1>", "c.png"), 2, &said);
}

#[test]
fn a_t_lora_says_what_it_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let start = format!("lycoris_{}", LINEAR.replace('.', "_"));
    let tensors = [
        ("q_layer.weight", numbers(1, &[2, 32], 0.1)),
        ("p_layer.weight", numbers(2, &[32, 2], 0.1)),
        ("lambda_layer", numbers(3, &[1, 2], 0.1)),
    ];
    let tensors = tensors.map(|(end, tensor)| (format!("{start}.{end}"), tensor));
    save(&HashMap::from(tensors), &dir.path().join("t.safetensors"));
    let options = ["--lora", "t.safetensors"];
    let said = [
        "is a T-LoRA",
        "lacks what its change is a difference from",
        "hint: ",
    ];
    fail(
        &mut command(dir.path(), &fixture("sd1"), &options, "x.png"),
        3,
        &said,
    );
}

#[test]
fn what_loras_change_adds_up_in_any_order_and_goes_by_their_strength() {
    let name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight";
    let plain = weight(&[], "unet", name);
    let change = |loras: &[(&str, f64)]| (weight(loras, "unet", name) - &plain).unwrap();
    let (kohya, old) = (change(&[("kohya", 1.0)]), change(&[("old", 1.0)]));
    assert!(largest(&kohya) > 0.1 && largest(&old) > 0.1);
    // The file's weights are f16, and rounded to that after each change. Below 1 that is off by up to
    // 2^-12, and what is compared is made of two roundings on one side and, with strengths 0.5 and
    // 2, of two and a half on the other: 1.1e-3, twice that between 1 and 2.
    let same =
        |a: &Tensor, b: &Tensor| assert!(largest(&(a - b).unwrap()) < 2e-3 * largest(b).max(1.0));
    let both = ((&kohya * 0.5).unwrap() - (&old * 2.0).unwrap()).unwrap();
    same(&change(&[("kohya", 0.5), ("old", -2.0)]), &both);
    same(&change(&[("old", -2.0), ("kohya", 0.5)]), &both);
    same(
        &change(&[("kohya", 1.0), ("kohya", 1.0)]),
        &(&kohya * 2.0).unwrap(),
    );
    // what none changes is the very tensor
    let bias = "down_blocks.0.attentions.0.proj_in.bias";
    assert_eq!(
        largest(&(weight(&[("kohya", 1.0)], "unet", bias) - weight(&[], "unet", bias)).unwrap()),
        0.0
    );
}

/// The sd1 fixture with its U-Net's weights of this type, each changed by `change`.
fn saved(folder: &Path, dtype: DType, change: impl Fn(&str, Tensor) -> Tensor) {
    copy_folder(&fixture("sd1"), folder);
    let path = folder.join("unet/diffusion_pytorch_model.safetensors");
    let narrow = load(&path).into_iter().map(|(name, t)| {
        let t = change(&name, t.to_dtype(dtype).unwrap())
            .to_dtype(dtype)
            .unwrap();
        (name, t)
    });
    save(&narrow.collect(), &path);
}

#[test]
fn a_changed_weight_of_a_narrow_file_stays_narrow_and_is_that_of_a_model_merged_and_saved() {
    let dir = tempfile::tempdir().unwrap();
    let [model, merged] = ["m", "merged"].map(|name| dir.path().join(name));
    saved(&model, DType::F16, |_, t| t);
    let changed = |name: &str, lora_file: &str| {
        let mut checkpoint = Checkpoint::open(Origin::Path(&model)).unwrap();
        checkpoint
            .use_loras([Lora::open(Path::new(&lora(lora_file)), 1.0)], true)
            .unwrap();
        let shape = checkpoint.shape(&format!("unet.{name}")).unwrap().to_vec();
        assert_eq!(
            checkpoint.stored_bytes("unet"),
            Checkpoint::open(Origin::Path(&model))
                .unwrap()
                .stored_bytes("unet")
        );
        checkpoint
            .weights("unet", &Device::Cpu, DType::F32)
            .get_stored(name, &shape)
            .unwrap()
    };
    let name = "down_blocks.0.resnets.0.conv1.weight";
    let plain = load(&model.join("unet/diffusion_pytorch_model.safetensors"))[name].clone();
    let with = changed(name, "locon");
    assert_eq!(with.dtype(), DType::F16);
    let exact = (plain.to_dtype(DType::F32).unwrap()
        + (weight(&[("locon", 1.0)], "unet", name) - weight(&[], "unet", name)).unwrap())
    .unwrap();
    assert!(
        largest(&(with.to_dtype(DType::F32).unwrap() - &exact).unwrap()) < 1e-3 * largest(&exact)
    );

    // the same picture, to the byte, as that of a model that was changed tensor by tensor and saved
    saved(&merged, DType::F16, |name, _| changed(name, "locon"));
    let picture = |model: &Path, options: &[&str], output: &str| {
        succeed(&mut command(dir.path(), model, options, output));
        image::open(dir.path().join(output)).unwrap().to_rgb8()
    };
    let with = picture(&model, &["--lora", &lora("locon")], "lora.png");
    assert!(with == picture(&merged, &[], "merged.png"));
    assert!(with != picture(&model, &[], "plain.png"));
}

#[test]
fn a_lora_changes_what_was_merged() {
    let dir = tempfile::tempdir().unwrap();
    let [model, other, both] = ["m", "other", "both"].map(|name| dir.path().join(name));
    saved(&model, DType::F32, |_, t| t);
    saved(&other, DType::F32, |_, t| (t * 0.9).unwrap());
    // half of each, saved
    saved(&both, DType::F32, |_, t| (t * 0.95).unwrap());
    let draw = |model: &Path, options: &[&str], output: &str| {
        succeed(&mut command(dir.path(), model, options, output));
        image::open(dir.path().join(output)).unwrap().to_rgb8()
    };
    let file = lora("kohya");
    let merge = format!("{}:0.5", other.display());
    let together = draw(
        &model,
        &["--merge", &merge, "--lora", &file],
        "together.png",
    );
    let by_hand = draw(&both, &["--lora", &file], "hand.png");
    assert!(worst_level(together.as_raw(), by_hand.as_raw()) <= 1);
    assert!(worst_level(together.as_raw(), draw(&both, &[], "merged.png").as_raw()) > VISIBLE);
}

#[test]
fn a_picture_with_a_lora_is_the_same_on_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let on = |threads: &str| {
        draw(
            dir.path(),
            &["--lora", &lora("loha"), "--threads", threads],
            "a.png",
        )
    };
    assert!(on("1") == on("3"));
}

#[test]
fn a_lora_for_another_model_is_an_error_that_says_for_which() {
    let dir = tempfile::tempdir().unwrap();
    // as wide as real ones; the first layer fits Stable Diffusion 1.x, too
    let zeros = |rows: usize, columns: usize| {
        Tensor::zeros((rows, columns), DType::F32, &Device::Cpu).unwrap()
    };
    for (width, family) in [
        (768, "Stable Diffusion 1.x"),
        (1024, "Stable Diffusion 2.x"),
        (2048, "Stable Diffusion XL"),
    ] {
        let mut tensors = HashMap::new();
        for (layer, inputs) in [("attn1_to_q", 32), ("attn2_to_k", width)] {
            let layer =
                format!("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{layer}");
            tensors.insert(format!("{layer}.lora_down.weight"), zeros(2, inputs));
            tensors.insert(format!("{layer}.lora_up.weight"), zeros(32, 2));
        }
        save(&tensors, &dir.path().join("style.safetensors"));
        let said =
            format!("the LoRA `style` does not fit `sd1`: it seems to be for {family}\n\nhint: ");
        fail(
            &mut command(
                dir.path(),
                &fixture("sd1"),
                &["--lora", "style.safetensors"],
                "x.png",
            ),
            3,
            &[&said],
        );
        assert!(
            stdout(&succeed(
                sdgen(dir.path()).args(["inspect", "style.safetensors"])
            ))
            .starts_with(&format!("style: LoRA for {family}\n"))
        );
    }
    let said = "the LoRA `original_names` does not fit `sd1`: it takes text embeddings of width 96, those of the model have 64";
    let sdxl = ["--lora", &lora("original_names")];
    fail(
        &mut command(dir.path(), &fixture("sd1"), &sdxl, "x.png"),
        3,
        &[said],
    );
    let flux = [(
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight".to_string(),
        zeros(2, 8),
    )]
    .into();
    save(&flux, &dir.path().join("flux.safetensors"));
    fail(
        &mut command(
            dir.path(),
            &fixture("sd1"),
            &["--lora", "flux.safetensors"],
            "x.png",
        ),
        3,
        &["it seems to be for FLUX.1"],
    );
    let nowhere = [
        ("unet.nowhere.lora_A.weight".to_string(), zeros(2, 8)),
        ("unet.nowhere.lora_B.weight".to_string(), zeros(8, 2)),
    ]
    .into();
    save(&nowhere, &dir.path().join("nowhere.safetensors"));
    let texts =
        ["none of its 2 tensors matches one of its layers, such as `unet.nowhere.lora_A.weight`"];
    fail(
        &mut command(
            dir.path(),
            &fixture("sd1"),
            &["--lora", "nowhere.safetensors"],
            "x.png",
        ),
        3,
        &texts,
    );
    // even if nothing of it would be used
    fail(
        &mut command(
            dir.path(),
            &fixture("sd1"),
            &["--lora", "nowhere.safetensors:0"],
            "x.png",
        ),
        3,
        &texts,
    );
}

#[test]
fn a_lora_that_fits_in_part_is_a_warning_with_counts_and_with_strict_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = load(Path::new(&lora("kohya")));
    let total = tensors.len();
    let bundled = Tensor::zeros((2, 64), DType::F32, &Device::Cpu).unwrap();
    tensors.insert("bundle_emb.word.string_to_param.*".into(), bundled.clone());
    // its name is none of a word's vectors, its shape is another's, one is without its other half
    tensors.insert("bundle_emb.word.step".into(), bundled.clone());
    tensors.insert("lora_unet_conv_in.diff".into(), bundled.clone());
    tensors.insert("lora_unet_conv_out.lora_down.weight".into(), bundled);
    save(&tensors, &dir.path().join("part.safetensors"));
    let run = |options: &[&str]| {
        command(
            dir.path(),
            &fixture("sd1"),
            &[&["--lora", "part.safetensors"], options].concat(),
            "x.png",
        )
    };
    let said = stderr(&succeed(&mut run(&["-v"])));
    let misfit = format!(
        "3 of {} tensors of the LoRA `part` fit nowhere in the model, such as `bundle_emb.word.step`",
        total + 4
    );
    assert!(said.contains(&format!("warning: {misfit}")), "{said}");
    let coverage = format!(
        "LoRA `part` at 1: {} of {} tensors fit, they change 9 weights of text_encoder, unet; it brings `word`",
        total + 1,
        total + 4
    );
    assert!(said.contains(&coverage), "{said}");
    fail(
        &mut run(&["--strict"]),
        3,
        &[&misfit, "hint: without `--strict`"],
    );
    assert!(!stderr(&succeed(&mut run(&["-q"]))).contains("warning"));
}

#[test]
fn every_tensor_of_a_lora_over_all_layers_of_real_checkpoints_fits() {
    let dir = tempfile::tempdir().unwrap();
    for (recipe, encoders) in [
        ("sd1", &[("lora_te_", 12, 768)][..]),
        ("sd2", &[("lora_te_", 23, 1024)]),
        ("sdxl", &[("lora_te1_", 12, 768), ("lora_te2_", 32, 1280)]),
        ("ssd1b", &[("lora_te1_", 12, 768), ("lora_te2_", 32, 1280)]),
    ] {
        let real = json(&fixture(&format!("real_{recipe}.json")));
        let mut layers: Vec<(String, Vec<u64>)> = vec![];
        for (key, shape) in real.as_object().unwrap() {
            let layer = key
                .strip_prefix("model.diffusion_model.")
                .and_then(|key| key.strip_suffix(".weight"));
            let shape: Vec<u64> = shape
                .as_array()
                .unwrap()
                .iter()
                .map(|d| d.as_u64().unwrap())
                .collect();
            layers.extend(
                layer
                    .filter(|_| shape.len() > 1)
                    .map(|layer| (format!("lora_unet_{}", layer.replace('.', "_")), shape)),
            );
        }
        for (start, count, width) in encoders {
            for i in 0..*count {
                for name in [
                    "self_attn_q_proj",
                    "self_attn_k_proj",
                    "self_attn_v_proj",
                    "self_attn_out_proj",
                    "mlp_fc1",
                    "mlp_fc2",
                ] {
                    let wide = |by: &str| if name == by { 4 * width } else { *width };
                    layers.push((
                        format!("{start}text_model_encoder_layers_{i}_{name}"),
                        vec![wide("mlp_fc1"), wide("mlp_fc2")],
                    ));
                }
            }
        }
        let mut shapes = serde_json::Map::new();
        for (layer, shape) in &layers {
            let ones = vec![1; shape.len() - 2];
            shapes.insert(
                format!("{layer}.lora_down.weight"),
                json!([&[4], &shape[1..]].concat()),
            );
            shapes.insert(
                format!("{layer}.lora_up.weight"),
                json!([&[shape[0], 4], &*ones].concat()),
            );
            shapes.insert(format!("{layer}.alpha"), json!([]));
        }
        sparse(&real, &dir.path().join("real.safetensors"));
        sparse(&shapes.into(), &dir.path().join("all.safetensors"));
        let mut checkpoint =
            Checkpoint::open(Origin::Path(&dir.path().join("real.safetensors"))).unwrap();
        checkpoint
            .use_loras([Lora::open(&dir.path().join("all.safetensors"), 1.0)], true)
            .unwrap();
        let total = 3 * layers.len();
        let said = format!(
            "{total} of {total} tensors fit, they change {} weights of text_encoder, ",
            layers.len()
        );
        assert!(
            checkpoint.loras()[0].describe_matched().contains(&said),
            "{recipe}: {}",
            checkpoint.loras()[0].describe_matched()
        );
        let family = if encoders.len() == 2 {
            "Stable Diffusion XL"
        } else {
            &format!("Stable Diffusion {}.x", &recipe[2..])
        };
        assert_eq!(checkpoint.loras()[0].family(), Some(family));
    }
}

#[test]
fn files_that_are_no_lora_or_not_there_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let run = |file: &str| command(dir.path(), &fixture("sd1"), &["--lora", file], "x.png");
    fail(
        &mut run("nothing.safetensors:0.5"),
        3,
        &["cannot open `nothing.safetensors`"],
    );
    fail(
        &mut run("nothing.safetensors:nan"),
        2,
        &["`nan` behind the colon: expected a number"],
    );
    let unet = fixture("sd1/unet/diffusion_pytorch_model.safetensors");
    fail(
        &mut run(unet.to_str().unwrap()),
        3,
        &["is only a U-Net, not a LoRA", "`--model`"],
    );
    // a file's own colon is no strength
    std::fs::copy(lora("kohya"), dir.path().join("a:2")).unwrap();
    succeed(&mut run("a:2"));
    let name = read_metadata(&std::fs::read(dir.path().join("x.png")).unwrap())
        .unwrap()
        .unwrap()
        .sdgen["loras"][0]
        .clone();
    assert_eq!(
        (&name["name"], &name["strength"]),
        (&json!("a:2"), &json!(1.0))
    );
    let hint = format!("and this with `--lora {}`", lora("kohya"));
    fail(
        sdgen(dir.path()).args(["x", "-m", &lora("kohya")]),
        3,
        &["is a LoRA, not a model", &hint],
    );
}

#[test]
fn tags_in_a_prompt_stand_for_options_and_are_taken_out_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let folder = fixture("lora");
    let folder = folder.to_str().unwrap();
    let run = |prompt: &str, options: &[&str], output: &str| {
        let mut command = sdgen(dir.path());
        command.args([
            prompt, "-s", "7", "--steps", "2", "-W", "16", "-H", "16", "--force", "-q", "-o",
            output, "-m",
        ]);
        command.arg(fixture("sd1")).args(options);
        command
    };
    let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    succeed(&mut run(
        "a frog",
        &[
            "--lora",
            &format!("{}:0.5", lora("kohya")),
            "--lora",
            &lora("old"),
        ],
        "options.png",
    ));
    succeed(&mut run(
        "<lora:kohya:0.5>a frog <lora:old>",
        &["--lora-dir", folder],
        "tags.png",
    ));
    assert!(read("options.png") == read("tags.png"));
    let tagged = |tags: &str| {
        let prompt = format!("a frog {tags}");
        succeed(&mut run(&prompt, &["--lora-dir", folder], "tags.png"));
        pixels(&dir.path().join("tags.png"))
    };
    let [both, text, unet] =
        ["0.8", "0.8:0", "0:0.6"].map(|x| tagged(&format!("<lora:kohya:{x}>")));
    assert!(both != text && both != unet && text != unet);
    assert!(tagged("<lyco:kohya:0.8> <hypernet:x:1>") == both);
    assert!(tagged("<lora:kohya:0.8:0.8:lbw=ALL>") == both);
    let two = tagged("<lora:kohya:0.8:0.6>");
    assert!(tagged("<lora:kohya:unet=0.6:te=0.8>") == two);
    assert!(tagged("<lora:kohya:0.8:0><lora:kohya:0:0.6>") == two);
    succeed(&mut run(
        "a frog <lora:kohya:0.8:0.6>",
        &["--lora-dir", folder],
        "two.png",
    ));
    succeed(
        sdgen(dir.path())
            .args(["check", "two.png", "--lora", &lora("kohya"), "-m"])
            .arg(fixture("sd1")),
    );
    fail(
        &mut run(
            "a frog <lora:kohya:1:1:4>",
            &["--lora-dir", folder],
            "x.png",
        ),
        2,
        &["a LoRA of fewer ranks"],
    );
    fail(
        &mut run("a frog <lora:kohya:1>", &[], "x.png"),
        2,
        &[
            "the prompt names the LoRA `kohya`",
            "hint: `--lora-dir DIR`",
        ],
    );
    fail(
        &mut run("a frog <lora:kohia:1>", &["--lora-dir", folder], "x.png"),
        2,
        &["has no LoRA `kohia`", "did you mean `kohya`?"],
    );
    fail(
        &mut run("a frog <lora:kohya:much>", &["--lora-dir", folder], "x.png"),
        2,
        &["strength in `<lora:kohya:much>` is not a number"],
    );
    std::fs::write(
        dir.path().join("list.txt"),
        "a <lora:kohya:1>\nb <lora:kohya:0.5>\n",
    )
    .unwrap();
    let mut list = sdgen(dir.path());
    let list = list
        .args([
            "--from",
            "list.txt",
            "-s",
            "1",
            "-o",
            "x/",
            "--lora-dir",
            folder,
            "-m",
        ])
        .arg(fixture("sd1"));
    fail(list, 2, &["prompts name different LoRAs"]);
    // nothing is a tag there
    succeed(&mut run(
        "a frog <lora:kohya:1>",
        &["--prompt-syntax", "plain"],
        "plain.png",
    ));
    let said = read_metadata(&read("plain.png")).unwrap().unwrap().sdgen;
    assert_eq!(
        (&said["prompt"], said.get("loras")),
        (&json!("a frog <lora:kohya:1>"), None)
    );
}

#[test]
fn inspect_tells_what_a_lora_is() {
    let dir = tempfile::tempdir().unwrap();
    let said = |name: &str| -> Value {
        serde_json::from_str(&stdout(&succeed(sdgen(dir.path()).args([
            "inspect",
            "--json",
            &lora(name),
        ]))))
        .unwrap()
    };
    for (name, format, methods, ranks, alphas, parts) in [
        (
            "kohya",
            "kohya",
            json!(["LoCon", "LoRA"]),
            json!([2, 3, 4]),
            json!([1.5]),
            json!({ "text_encoder": 3, "unet": 6 }),
        ),
        (
            "dora",
            "kohya",
            json!(["DoRA", "LoRA"]),
            json!([2]),
            json!([2.0]),
            json!({ "unet": 3 }),
        ),
        (
            "peft_rank",
            "diffusers, PEFT",
            json!(["LoRA"]),
            json!([3]),
            json!([]),
            json!({ "text_encoder": 3, "unet": 4 }),
        ),
        (
            "peft_alpha",
            "diffusers, PEFT",
            json!(["LoRA"]),
            json!([3]),
            json!([1.5, 2.0]),
            json!({ "text_encoder": 3, "unet": 4 }),
        ),
        (
            "old",
            "diffusers, old",
            json!(["LoRA"]),
            json!([4]),
            json!([]),
            json!({ "text_encoder": 2, "unet": 3 }),
        ),
        (
            "loha",
            "kohya",
            json!(["LoHa"]),
            json!([2]),
            json!([1.0]),
            json!({ "unet": 3 }),
        ),
        (
            "differences",
            "kohya",
            json!(["differences"]),
            json!([]),
            json!([]),
            json!({ "unet": 3 }),
        ),
    ] {
        let said = said(name);
        let told =
            ["kind", "format", "methods", "ranks", "alphas", "parts"].map(|key| said[key].clone());
        assert_eq!(
            json!(told),
            json!(["LoRA", format, methods, ranks, alphas, parts]),
            "{name}"
        );
    }
    assert_eq!(
        said("original_names")["format"],
        "kohya, original block names"
    );
    let text = stdout(&succeed(
        sdgen(dir.path()).args(["inspect", &lora("peft_rank")]),
    ));
    for line in [
        "peft_rank: LoRA for a model that",
        "  rank          3\n",
        "  alpha         the rank\n",
        "  unet          4 layers\n",
    ] {
        assert!(text.contains(line), "{text}");
    }
}

#[test]
fn pictures_remember_their_loras_and_resume_and_check_know_them() {
    let dir = tempfile::tempdir().unwrap();
    let (kohya, lokr) = (lora("kohya"), lora("lokr"));
    draw(dir.path(), &[], "plain.png");
    draw(
        dir.path(),
        &["--lora", &format!("{kohya}:0.7"), "--lora", &lokr],
        "with.png",
    );
    let metadata = read_metadata(&std::fs::read(dir.path().join("with.png")).unwrap())
        .unwrap()
        .unwrap();
    let hash = |file: &str| Lora::open(Path::new(file), 1.0).unwrap().hash().unwrap();
    let (first, second) = (hash(&kohya), hash(&lokr));
    let said = json!([{ "name": "kohya", "hash": first, "strength": 0.7 }, { "name": "lokr", "hash": second, "strength": 1.0 }]);
    assert_eq!(metadata.sdgen["loras"], said);
    let hashes = format!(
        "Lora hashes: \"kohya: {}, lokr: {}\"",
        &first[..12],
        &second[..12]
    );
    assert!(
        metadata.parameters.contains(&hashes),
        "{}",
        metadata.parameters
    );
    let plain = read_metadata(&std::fs::read(dir.path().join("plain.png")).unwrap())
        .unwrap()
        .unwrap();
    assert!(plain.sdgen.get("loras").is_none() && !plain.parameters.contains("Lora"));

    let check = |loras: &[&str]| {
        let mut command = sdgen(dir.path());
        command
            .args(["check", "plain.png", "with.png", "-m"])
            .arg(fixture("sd1"));
        let output = command
            .args(loras.iter().flat_map(|lora| ["--lora", lora]))
            .output()
            .unwrap();
        (
            output.status.code().unwrap(),
            stdout(&output),
            stderr(&output),
        )
    };
    // its file may have another name by now
    std::fs::copy(&kohya, dir.path().join("renamed-lcm.safetensors")).unwrap();
    let (code, said, errors) = check(&[&lokr, "renamed-lcm.safetensors", &lora("old")]);
    assert_eq!(
        (code, &*said),
        (0, "plain.png: identical\nwith.png: identical\n"),
        "{errors}"
    );
    let (code, said, errors) = check(&[&lokr, &lora("old")]);
    assert_eq!(
        (
            code,
            said.contains("plain.png: identical\n"),
            said.contains("with.png: failed\n")
        ),
        (6, true, true),
        "{said}{errors}"
    );
    let asked = format!(
        "`with.png`: it was drawn with the LoRA `kohya`, SHA-256 {}\n\nhint: pass its file with `--lora`",
        &first[..12]
    );
    assert!(errors.contains(&asked), "{errors}");

    let resumed = |options: &[&str]| {
        let run = [
            "a frog", "-s", "7", "--steps", "2", "-g", "5", "-W", "16", "-H", "16", "-o",
            "with.png", "--resume", "-m",
        ];
        let said = stderr(&succeed(
            sdgen(dir.path())
                .args(run)
                .arg(fixture("sd1"))
                .args(options),
        ));
        said.contains("1 of 1 pictures are there already")
    };
    assert!(resumed(&[
        "--lora",
        &format!("{kohya}:0.7"),
        "--lora",
        &lokr
    ]));
    assert!(!resumed(&[
        "--lora",
        &format!("{kohya}:0.8"),
        "--lora",
        &lokr
    ]));
    assert!(!resumed(&[]));
    assert!(resumed(&[]));
}

#[test]
fn a_lora_that_was_distilled_sets_steps_guidance_and_sampler_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let dry_run = |file: &str, options: &[&str]| -> Value {
        let name = file.split(':').next().unwrap();
        std::fs::copy(lora("peft_rank"), dir.path().join(name)).unwrap();
        let args = ["x", "-s", "1", "--dry-run", "--json", "--lora", file, "-m"];
        let output = succeed(
            sdgen(dir.path())
                .args(args)
                .arg(fixture("sd1"))
                .args(options),
        );
        let said: Value = serde_json::from_str(&stdout(&output)).unwrap();
        json!([
            said["sampler"],
            said["steps"],
            said["guidance"],
            said["eta"]
        ])
    };
    assert_eq!(
        dry_run("lcm-lora-sdv1-5.safetensors", &[]),
        json!(["lcm", 4, 1.0, null])
    );
    assert_eq!(
        dry_run("lcm-lora-sdv1-5.safetensors:0", &[]),
        json!(["pndm", 50, 7.5, null])
    );
    assert_eq!(
        dry_run("sd15_lightning_8step_lora.safetensors", &[]),
        json!(["euler", 8, 1.0, null])
    );
    assert_eq!(
        dry_run("Hyper-SD15-4steps-lora.safetensors:0.9", &[]),
        json!(["ddim", 4, 1.0, null])
    );
    assert_eq!(
        dry_run("tcd-lora.safetensors", &[]),
        json!(["tcd", 4, 1.0, 0.3])
    );
    assert_eq!(
        dry_run("style.safetensors", &[]),
        json!(["pndm", 50, 7.5, null])
    );
    assert_eq!(
        dry_run(
            "lcm.safetensors",
            &["--steps", "6", "-g", "2", "--sampler", "ddim"]
        ),
        json!(["ddim", 6, 2.0, null])
    );
    let text = stdout(&succeed(
        sdgen(dir.path()).args(["inspect", "lcm-lora-sdv1-5.safetensors"]),
    ));
    assert!(
        text.contains("  distilled     latent consistency, by its name: 4 steps\n"),
        "{text}"
    );
}

/// A LoRA that brings a word: the layers of a LoRA, and the tensors of an embedding.
fn bundle(path: &Path, layers: &str, word: &str, inner: &[(&str, Tensor)]) {
    let mut tensors = load(Path::new(&lora(layers)));
    let inner = inner.iter();
    tensors.extend(inner.map(|(key, t)| (format!("bundle_emb.{word}.{key}"), t.clone())));
    save(&tensors, path);
}

#[test]
fn a_word_that_a_lora_brings_is_learned_as_from_a_file_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| dir.path().join(name);
    std::fs::create_dir(place("loras")).unwrap();
    let vectors = load(&fixture("embeddings/a1111.safetensors"))["emb_params"].clone();
    let pair = load(&fixture("embeddings/pair.safetensors"));
    let [clip_l, clip_g] = ["clip_l", "clip_g"].map(|key| pair[key].clone());
    save(
        &HashMap::from([("emb_params".into(), vectors.clone())]),
        &place("word.safetensors"),
    );
    save(&pair, &place("pair.safetensors"));
    for (name, key) in [
        ("star", "string_to_param.*"),
        ("params", "emb_params"),
        ("clip", "clip_l"),
    ] {
        let path = place(&format!("loras/{name}.safetensors"));
        bundle(&path, "kohya", "ohwx", &[(key, vectors.clone())]);
    }
    let both = [("clip_l", clip_l), ("clip_g", clip_g)];
    bundle(
        &place("loras/xl.safetensors"),
        "original_names",
        "ohwx",
        &both,
    );
    let picture = |model: &str, prompt: &str, options: &[&str]| {
        let mut command = sdgen(dir.path());
        command.args([prompt, "-s", "7", "--steps", "2", "-g", "5", "-W", "16"]);
        command.args(["-H", "16", "--strict", "--force", "-o", "x.png", "-m"]);
        succeed(command.arg(fixture(model)).args(options));
        image::open(place("x.png")).unwrap().to_rgb8()
    };
    for (model, layers, word, names) in [
        ("sd1", "kohya", "word", &["star", "params", "clip"][..]),
        ("sdxl", "original_names", "pair", &["xl"]),
    ] {
        let layers = lora(layers);
        let alone = picture(model, "a photo of ohwx", &["--lora", &layers]);
        let word = format!("{word}.safetensors:ohwx");
        let apart = ["--lora", &layers, "--embedding", &word];
        let apart = picture(model, "a photo of ohwx", &apart);
        assert!(apart != alone, "the word should matter");
        for name in names {
            let file = format!("loras/{name}.safetensors");
            let bundled = picture(model, "a photo of ohwx", &["--lora", &file]);
            assert!(bundled == apart, "{model}, {name}");
            let tag = format!("a photo of ohwx<lora:{name}:1>");
            let tagged = picture(model, &tag, &["--lora-dir", "loras"]);
            assert!(tagged == apart, "{model}, {name} by its tag");
            // the word has no strength, the layers have
            let off = picture(model, "a photo of ohwx", &["--lora", &format!("{file}:0")]);
            let word = picture(model, "a photo of ohwx", &["--embedding", &word]);
            assert!(off == word, "{model}, {name} at 0");
        }
    }
}

#[test]
fn a_picture_with_a_word_of_a_lora_is_checked_and_resumed_by_the_lora_alone() {
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| dir.path().join(name);
    let vectors = load(&fixture("embeddings/a1111.safetensors"))["emb_params"].clone();
    let bring = |name: &str, word: &str, vectors: &Tensor| {
        let path = place(&format!("{name}.safetensors"));
        bundle(&path, "kohya", word, &[("emb_params", vectors.clone())]);
    };
    bring("one", "ohwx", &vectors);
    bring("same", "OHWX", &vectors);
    bring("other", "ohwx", &(&vectors * 2.0).unwrap());
    save(
        &HashMap::from([("emb_params".into(), (&vectors * 2.0).unwrap())]),
        &place("word.safetensors"),
    );
    let command = |options: &[&str]| {
        let mut command = sdgen(dir.path());
        command.args(["ohwx", "-s", "7", "--steps", "2", "-W", "16", "-H", "16"]);
        command
            .args(["-o", "x.png", "-m"])
            .arg(fixture("sd1"))
            .args(options);
        command
    };
    succeed(&mut command(&["--lora", "one.safetensors"]));
    let metadata = read_metadata(&std::fs::read(place("x.png")).unwrap())
        .unwrap()
        .unwrap();
    let hash = Lora::open(&place("one.safetensors"), 1.0).unwrap().hash();
    assert_eq!(metadata.sdgen["loras"][0]["hash"], hash.unwrap());
    let check = |lora: &str| {
        let mut command = sdgen(dir.path());
        command.args(["check", "x.png", "--lora", lora, "-m"]);
        command.arg(fixture("sd1")).output().unwrap()
    };
    let same = check("one.safetensors");
    assert_eq!(stdout(&same), "x.png: identical\n", "{}", stderr(&same));
    let other = check("other.safetensors");
    assert!(
        stderr(&other).contains("it was drawn with the LoRA `one`"),
        "{}",
        stderr(&other)
    );
    let resumed = |lora: &str| {
        let run = succeed(&mut command(&["--resume", "--lora", lora]));
        stderr(&run).contains("1 of 1 pictures are there already")
    };
    assert!(resumed("one.safetensors"));
    assert!(!resumed("other.safetensors"));

    // what is brought twice must be the same
    let twice = ["--lora", "one.safetensors", "--lora", "same.safetensors"];
    succeed(command(&twice).arg("--force"));
    for (options, texts) in [
        (
            ["--lora", "one.safetensors", "--lora", "other.safetensors"],
            [
                "two embeddings stand for `ohwx`, of `one.safetensors` and `other.safetensors`",
                "hint: draw with one of these LoRAs alone",
            ],
        ),
        (
            [
                "--lora",
                "one.safetensors",
                "--embedding",
                "word.safetensors:ohwx",
            ],
            [
                "two embeddings stand for `ohwx`, of `word.safetensors` and `one.safetensors`",
                "hint: give the first another word in prompts: `--embedding word.safetensors:TOKEN`",
            ],
        ),
    ] {
        fail(command(&options).arg("--force"), 3, &texts);
    }
    let said = stdout(&succeed(
        sdgen(dir.path()).args(["inspect", "one.safetensors"]),
    ));
    assert!(said.contains("  words         ohwx\n"), "{said}");
    bring("flat", "ohwx", &vectors.unsqueeze(0).unwrap());
    fail(
        command(&["--lora", "flat.safetensors"]).arg("--force"),
        3,
        &[
            "tensor `bundle_emb.ohwx.emb_params` of `flat.safetensors`",
            "vectors of a word have two dimensions",
        ],
    );
}

/// The adapter of a case of `lora_trained.safetensors`, as its library saves it, and its layer.
fn trained(folder: &Path, case: &Value, all: &HashMap<String, Tensor>) -> (String, String) {
    let own = format!("{}/", case["name"].as_str().unwrap());
    let layer = case["layer"].as_str().unwrap().to_string();
    let tensors = all.iter().filter_map(|(key, tensor)| {
        let key = key.strip_prefix(&own)?;
        let is_of_test = ["outputs", "bias"].contains(&key);
        (!is_of_test).then(|| (key.to_string(), tensor.clone()))
    });
    let path = folder.join("adapter_model.safetensors");
    save(&tensors.collect(), &path);
    let config = folder.join("adapter_config.json");
    if case["by"] == "peft" {
        std::fs::write(config, case["config"].to_string()).unwrap();
    } else {
        std::fs::remove_file(config).ok();
    }
    (path.to_str().unwrap().into(), layer)
}

fn trained_cases() -> (Vec<Value>, HashMap<String, Tensor>) {
    let path = fixture("lora_trained.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let cases = header.metadata().as_ref().unwrap()["cases"].clone();
    let Value::Array(cases) = serde_json::from_str(&cases).unwrap() else {
        panic!("the cases are no list");
    };
    (cases, load(&path))
}

#[test]
fn what_peft_says_beside_a_file_is_asked_for_where_it_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let (cases, all) = trained_cases();
    for (name, is_needed) in [
        ("peft, oft", true),
        ("peft, ia3 of a convolution", true),
        ("peft, ia3", false),
        ("peft, boft", false),
    ] {
        let case = cases.iter().find(|case| case["name"] == name).unwrap();
        let (file, _) = trained(dir.path(), case, &all);
        let config = dir.path().join("adapter_config.json");
        std::fs::remove_file(&config).unwrap();
        match Lora::open(Path::new(&file), 1.0) {
            Err(error) => {
                let error = format!("{error:#}");
                assert!(
                    is_needed && error.contains("`adapter_config.json`"),
                    "{error}"
                );
            }
            Ok(_) => assert!(!is_needed, "{name}"),
        }
        std::fs::write(&config, "{").unwrap();
        let Err(error) = Lora::open(Path::new(&file), 1.0) else {
            panic!("{name} was read with a damaged configuration");
        };
        assert!(format!("{error:#}").contains("adapter_config.json` is damaged"));
    }
}

#[test]
fn a_layer_gives_what_it_gave_in_training_by_lycoris_and_by_peft() {
    // PEFT turns the patches of overlapping kernels and adds them up
    const REFUSED: &str = "peft, oft of a convolution";
    let dir = tempfile::tempdir().unwrap();
    let (cases, all) = trained_cases();
    assert_eq!(cases.len(), 58);
    let mut wrong = vec![];
    for case in &cases {
        let (file, layer) = trained(dir.path(), case, &all);
        let name = case["name"].as_str().unwrap();
        let loras = [(&*file, case["strength"].as_f64().unwrap())];
        let opened = Lora::open(Path::new(&file), loras[0].1);
        let mut checkpoint = Checkpoint::open(Origin::Path(&fixture("sd1"))).unwrap();
        if let Err(error) = checkpoint.use_loras([opened], true) {
            wrong.push(format!("{name}: {error:#}"));
            continue;
        }
        let get = |end: &str| {
            let shape = checkpoint.shape(&format!("unet.{layer}.{end}"))?.to_vec();
            let weights = checkpoint.weights("unet", &Device::Cpu, DType::F32);
            Some(weights.get(&format!("{layer}.{end}"), &shape))
        };
        let weight = match get("weight").unwrap() {
            Ok(weight) => weight.flatten_from(1).unwrap(),
            Err(error) => {
                let error = format!("{error:#}");
                if name != REFUSED || !error.contains("`merge_and_unload`") {
                    wrong.push(format!("{name}: {error}"));
                }
                continue;
            }
        };
        if name == REFUSED {
            wrong.push(format!("{name}: is no change of a weight"));
        }
        let inputs = &all[&format!("inputs/{layer}")];
        let outputs = inputs.matmul(&weight.t().unwrap()).unwrap();
        let largest = |t: &Tensor| {
            let t = t.abs().unwrap().flatten_all().unwrap();
            t.max(0).unwrap().to_scalar::<f32>().unwrap()
        };
        let golden = &all[&format!("{name}/outputs")];
        let mut off = largest(&(&outputs - golden).unwrap()) / largest(golden);
        if let Some(golden) = all.get(&format!("{name}/bias")) {
            let bias = get("bias").unwrap().unwrap();
            off = off.max(largest(&(&bias - golden).unwrap()) / largest(golden));
        }
        // the file's weights are f16, and so is the sum: 2^-11 of each of up to 288 products
        if off > 2e-3 {
            wrong.push(format!("{name}: off by {off}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
