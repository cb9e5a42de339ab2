//! Models in parts, each a file of its own, and whole ones in one file: under the names of Black
//! Forest Labs, of ComfyUI and of diffusers they draw the same pictures as the folder.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

pub type Tensors = HashMap<String, Tensor>;

/// The number of norm groups that files of VAEs stand for.
const GROUPS: usize = 32;

/// A fixture with a VAE of 32 norm groups.
pub fn model_folder(name: &str, to: &Path) {
    copy_folder(&fixture(name), to);
    let file = to.join("vae/diffusion_pytorch_model.safetensors");
    save(&widened(load(&file)), &file);
    edit_json(&to.join("vae/config.json"), |config| {
        config.insert("norm_num_groups".into(), GROUPS.into());
        config.insert("block_out_channels".into(), json!([32, 32, 32, 64]));
    });
}

/// A VAE with each of its channels four times, but for those of pictures and latents.
fn widened(vae: Tensors) -> Tensors {
    let is_beside = |key: &str| {
        ["bn.", "quant_conv.", "post_quant_conv."]
            .iter()
            .any(|start| key.starts_with(start))
    };
    let wide = |(key, tensor): (String, Tensor)| {
        let is_inner = |dim: usize| {
            let is_edge = match dim {
                0 => key.starts_with("encoder.conv_out.") || key.starts_with("decoder.conv_out."),
                _ => key.starts_with("encoder.conv_in.") || key.starts_with("decoder.conv_in."),
            };
            !is_edge && dim < 2.min(tensor.rank()) && !is_beside(&key)
        };
        let times: Vec<usize> = (0..tensor.rank())
            .map(|dim| if is_inner(dim) { 4 } else { 1 })
            .collect();
        if times.is_empty() {
            return (key, tensor);
        }
        // sums of four times as many stay what they were
        let share = if is_inner(1) { 0.25 } else { 1.0 };
        let tensor = (tensor.repeat(times).unwrap() * share).unwrap();
        (key, tensor)
    };
    vae.into_iter().map(wide).collect()
}

pub fn part(folder: &Path, part: &str) -> Tensors {
    let file = match part {
        "text_encoder" | "text_encoder_2" | "text_encoder_3" => "model",
        _ => "diffusion_pytorch_model",
    };
    load(&folder.join(part).join(format!("{file}.safetensors")))
}

/// A transformer of FLUX.2 under the names of Black Forest Labs' code.
pub fn original_flux2(diffusers: &Tensors) -> Tensors {
    let fixed = [
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        (
            "time_guidance_embed.timestep_embedder.linear_1",
            "time_in.in_layer",
        ),
        (
            "time_guidance_embed.timestep_embedder.linear_2",
            "time_in.out_layer",
        ),
        (
            "double_stream_modulation_img.linear",
            "double_stream_modulation_img.lin",
        ),
        (
            "double_stream_modulation_txt.linear",
            "double_stream_modulation_txt.lin",
        ),
        (
            "single_stream_modulation.linear",
            "single_stream_modulation.lin",
        ),
        ("proj_out", "final_layer.linear"),
    ];
    let double = [
        ("attn.norm_q.weight", "img_attn.norm.query_norm.scale"),
        ("attn.norm_k.weight", "img_attn.norm.key_norm.scale"),
        ("attn.to_out.0.weight", "img_attn.proj.weight"),
        ("ff.linear_in.weight", "img_mlp.0.weight"),
        ("ff.linear_out.weight", "img_mlp.2.weight"),
        ("attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale"),
        ("attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale"),
        ("attn.to_add_out.weight", "txt_attn.proj.weight"),
        ("ff_context.linear_in.weight", "txt_mlp.0.weight"),
        ("ff_context.linear_out.weight", "txt_mlp.2.weight"),
    ];
    let single = [
        ("attn.norm_q.weight", "norm.query_norm.scale"),
        ("attn.norm_k.weight", "norm.key_norm.scale"),
        ("attn.to_qkv_mlp_proj.weight", "linear1.weight"),
        ("attn.to_out.weight", "linear2.weight"),
    ];
    let of = |name: &str| diffusers[name].clone();
    let mut out = Tensors::new();
    for (ours, theirs) in fixed {
        out.insert(format!("{theirs}.weight"), of(&format!("{ours}.weight")));
    }
    let scale_shift = of("norm_out.linear.weight").chunk(2, 0).unwrap();
    let shift_scale = Tensor::cat(&[&scale_shift[1], &scale_shift[0]], 0).unwrap();
    out.insert("final_layer.adaLN_modulation.1.weight".into(), shift_scale);
    for block in 0..2 {
        for (ours, theirs) in double {
            out.insert(
                format!("double_blocks.{block}.{theirs}"),
                of(&format!("transformer_blocks.{block}.{ours}")),
            );
        }
        for (ours, theirs) in [
            (["to_q", "to_k", "to_v"], "img_attn"),
            (["add_q_proj", "add_k_proj", "add_v_proj"], "txt_attn"),
        ] {
            let parts =
                ours.map(|name| of(&format!("transformer_blocks.{block}.attn.{name}.weight")));
            let fused = Tensor::cat(&parts, 0).unwrap();
            out.insert(format!("double_blocks.{block}.{theirs}.qkv.weight"), fused);
        }
        for (ours, theirs) in single {
            out.insert(
                format!("single_blocks.{block}.{theirs}"),
                of(&format!("single_transformer_blocks.{block}.{ours}")),
            );
        }
    }
    assert_eq!(
        out.values().map(Tensor::elem_count).sum::<usize>(),
        diffusers.values().map(Tensor::elem_count).sum::<usize>()
    );
    out
}

/// A VAE of four levels under the names of CompVis' code; FLUX.2's counts the convolutions next to
/// the latents to encoder and decoder.
pub fn original_vae(diffusers: &Tensors) -> Tensors {
    let rename = |key: &str| {
        let mut key = key.to_string();
        for level in 0..4 {
            key = key
                .replace(&format!("down_blocks.{level}."), &format!("down.{level}."))
                .replace(
                    &format!("up_blocks.{level}."),
                    &format!("up.{}.", 3 - level),
                );
        }
        for (ours, theirs) in [
            ("mid_block.resnets.0.", "mid.block_1."),
            ("mid_block.resnets.1.", "mid.block_2."),
            ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."),
            ("mid_block.attentions.0.to_out.0.", "mid.attn_1.proj_out."),
            ("mid_block.attentions.0.to_", "mid.attn_1."),
            ("resnets.", "block."),
            ("downsamplers.0.", "downsample."),
            ("upsamplers.0.", "upsample."),
            ("conv_shortcut.", "nin_shortcut."),
            ("conv_norm_out.", "norm_out."),
        ] {
            key = key.replace(ours, theirs);
        }
        match key.split_once('.') {
            Some(("quant_conv", _)) => format!("encoder.{key}"),
            Some(("post_quant_conv", _)) => format!("decoder.{key}"),
            _ => key,
        }
    };
    let renamed = |(key, tensor): (&String, &Tensor)| {
        let theirs = rename(key);
        let is_conv = theirs.contains("mid.attn_1.") && tensor.rank() == 2;
        let tensor = match is_conv {
            true => tensor.unsqueeze(2).unwrap().unsqueeze(3).unwrap(),
            false => tensor.clone(),
        };
        (theirs, tensor)
    };
    diffusers.iter().map(renamed).collect()
}

pub fn prefixed(prefix: &str, tensors: &Tensors) -> Tensors {
    let named = |(key, tensor): (&String, &Tensor)| (format!("{prefix}{key}"), tensor.clone());
    tensors.iter().map(named).collect()
}

/// A folder with the fixture in `klein` and its parts as files.
pub struct Parts {
    pub dir: tempfile::TempDir,
    pub transformer: Tensors,
    pub encoder: Tensors,
    vae: Tensors,
}

impl Parts {
    pub fn new() -> Self {
        Self::of("klein")
    }

    fn of(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join(name);
        model_folder(name, &folder);
        Self {
            transformer: part(&folder, "transformer"),
            encoder: part(&folder, "text_encoder"),
            vae: part(&folder, "vae"),
            dir,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file, in a folder that need not be there.
    pub fn write(&self, name: &str, tensors: &Tensors) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        save(tensors, &path);
    }

    /// Puts the tokenizer, of both models the same, beside a text encoder's file.
    fn add_tokenizer(&self, folder: &str) {
        std::fs::create_dir_all(self.path(folder)).unwrap();
        std::fs::copy(
            fixture("klein/tokenizer/tokenizer.json"),
            self.path(folder).join("tokenizer.json"),
        )
        .unwrap();
    }

    /// Text encoder and VAE as ComfyUI has them.
    pub fn write_others(&self) {
        self.write("clips/qwen.safetensors", &self.encoder);
        self.add_tokenizer("clips");
        self.write("vaes/flux2_ae.safetensors", &original_vae(&self.vae));
    }

    fn draw(&self, args: &[&str]) -> Command {
        let mut command = sdgen(self.dir.path());
        command
            .args(["a frog", "-W", "64", "-H", "64", "-s", "7", "--steps", "2"])
            .args(["--no-metadata", "--force", "-o", "x.png"])
            .args(args);
        command
    }

    pub fn picture(&self, args: &[&str]) -> Vec<u8> {
        succeed(&mut self.draw(args));
        std::fs::read(self.path("x.png")).unwrap()
    }

    fn inspect(&self, model: &str) -> Value {
        let output = succeed(sdgen(self.dir.path()).args(["inspect", model, "--json"]));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

const OTHERS: [&str; 4] = [
    "--text-encoder",
    "clips/qwen.safetensors",
    "--vae",
    "vaes/flux2_ae.safetensors",
];

#[test]
fn a_transformer_alone_draws_with_text_encoder_and_vae_whatever_its_names() {
    let parts = Parts::new();
    parts.write_others();
    let original = original_flux2(&parts.transformer);
    parts.write("bare.safetensors", &original);
    parts.write(
        "comfy.safetensors",
        &prefixed("model.diffusion_model.", &original),
    );
    parts.write(
        "saved.safetensors",
        &prefixed("diffusion_model.", &original),
    );
    parts.write("diffusers.safetensors", &parts.transformer);
    let expected = parts.picture(&["-m", "klein"]);
    for name in ["bare", "comfy", "saved", "diffusers"] {
        let file = format!("{name}.safetensors");
        for option in ["-m", "--diffusion-model"] {
            let args = [&[option, &*file], &OTHERS[..]].concat();
            assert!(parts.picture(&args) == expected, "{option} {name}");
        }
    }
    // language models are read from tokenizer.json, whatever lies beside it
    for name in ["vocab.json", "merges.txt"] {
        std::fs::write(parts.path("klein/tokenizer").join(name), "{}").unwrap();
    }
    assert!(parts.picture(&["-m", "klein"]) == expected);
    // a diffusers VAE in one file, the encoder of a folder, and both from a whole model
    parts.write("vaes/diffusers.safetensors", &parts.vae);
    for others in [
        [
            "--text-encoder",
            "klein/text_encoder",
            "--vae",
            "vaes/diffusers.safetensors",
        ],
        ["--text-encoder", "klein", "--vae", "klein"],
    ] {
        let args = [&["-m", "bare.safetensors"], &others[..]].concat();
        assert!(parts.picture(&args) == expected, "{others:?}");
    }
    // LoRAs find their layers
    let lora = ["--lora", "klein/lora.safetensors:0.7", "--strict"];
    let changed = parts.picture(&[&["-m", "klein"], &lora[..]].concat());
    assert!(changed != expected);
    let args = [&["-m", "bare.safetensors"], &OTHERS[..], &lora].concat();
    assert!(parts.picture(&args) == changed);
    // from a picture, the VAE's encoder too
    let from = ["-i", "p.png", "--strength", "0.5"];
    std::fs::write(parts.path("p.png"), &expected).unwrap();
    let expected = parts.picture(&[&["-m", "klein"], &from[..]].concat());
    let args = [&["-m", "bare.safetensors"], &OTHERS[..], &from].concat();
    assert!(parts.picture(&args) == expected);
}

#[test]
fn a_folder_of_parts_is_a_model_and_what_does_not_fit_lies_beside() {
    let parts = Parts::new();
    let original = original_flux2(&parts.transformer);
    let vae = original_vae(&parts.vae);
    let expected = parts.picture(&["-m", "klein"]);
    for [model, transformer, encoder, vaes] in [
        ["comfy", "diffusion_models/", "text_encoders/", "vae/"],
        ["older", "unet/", "clip/", "vae/"],
        ["flat", "", "", ""],
        [
            "hub",
            "split_files/diffusion_models/",
            "split_files/text_encoders/",
            "split_files/vae/",
        ],
    ] {
        parts.write(
            &format!("{model}/{transformer}klein-x.safetensors"),
            &original,
        );
        parts.write(
            &format!("{model}/{encoder}qwen.safetensors"),
            &parts.encoder,
        );
        parts.add_tokenizer(format!("{model}/{encoder}").trim_end_matches('/'));
        parts.write(&format!("{model}/{vaes}ae.safetensors"), &vae);
        assert!(parts.picture(&["-m", model]) == expected, "{model}");
    }
    // the same weights, with the same fingerprint
    let (folder, split) = (parts.inspect("klein"), parts.inspect("comfy"));
    assert_eq!(split["name"], "klein-x");
    for key in [
        "family",
        "model_hash",
        "parts",
        "width",
        "prediction",
        "sampler",
        "steps",
    ] {
        assert_eq!(folder[key], split[key], "{key}");
    }
    // encoders of another width, CLIP's, and VAEs for other latents are no choice
    let wide: Tensors = parts
        .encoder
        .iter()
        .map(|(key, tensor)| {
            let times: Vec<usize> = vec![2; tensor.rank()];
            (key.clone(), tensor.repeat(times).unwrap())
        })
        .collect();
    parts.write("comfy/text_encoders/qwen_8b.safetensors", &wide);
    parts.write(
        "comfy/text_encoders/clip_l.safetensors",
        &part(&fixture("sd1"), "text_encoder"),
    );
    parts.write("comfy/vae/sd.safetensors", &part(&fixture("sd1"), "vae"));
    assert!(parts.picture(&["-m", "comfy"]) == expected);
    // two that fit are one too many
    parts.write("comfy/vae/again.safetensors", &vae);
    let says = [
        "`comfy` has 2 VAEs that fit",
        "hint: ",
        "`--vae comfy/vae/ae",
        "--diffusion-model",
    ];
    fail(&mut parts.draw(&["-m", "comfy"]), 3, &says[..2]);
    parts.write("older/unet/other.safetensors", &original);
    let says = [
        "`older` has 2 transformers",
        "--diffusion-model older/unet/",
    ];
    fail(&mut parts.draw(&["-m", "older"]), 3, &says);
}

#[test]
fn all_parts_in_one_file_are_a_model() {
    let parts = Parts::new();
    let mut all = prefixed(
        "model.diffusion_model.",
        &original_flux2(&parts.transformer),
    );
    all.extend(prefixed(
        "text_encoders.qwen3_4b.transformer.",
        &parts.encoder,
    ));
    all.extend(prefixed("vae.", &original_vae(&parts.vae)));
    parts.write("whole/all.safetensors", &all);
    parts.add_tokenizer("whole");
    let expected = parts.picture(&["-m", "klein"]);
    for model in ["whole", "whole/all.safetensors"] {
        assert!(parts.picture(&["-m", model]) == expected, "{model}");
    }
    let (folder, file) = (
        parts.inspect("klein"),
        parts.inspect("whole/all.safetensors"),
    );
    assert_eq!(folder["model_hash"], file["model_hash"]);
}

/// A transformer of Z-Image under ComfyUI's names.
fn comfy_z_image(diffusers: &Tensors) -> Tensors {
    let mut out = Tensors::new();
    for (key, tensor) in diffusers {
        let mut name = key.clone();
        for (ours, theirs) in [
            ("all_x_embedder.2-1.", "x_embedder."),
            ("all_final_layer.2-1.", "final_layer."),
            ("attention.to_out.0.", "attention.out."),
            ("attention.norm_q.", "attention.q_norm."),
            ("attention.norm_k.", "attention.k_norm."),
        ] {
            name = name.replace(ours, theirs);
        }
        if let Some(block) = name.strip_suffix("to_q.weight") {
            let parts =
                ["to_q", "to_k", "to_v"].map(|part| &diffusers[&format!("{block}{part}.weight")]);
            out.insert(
                format!("{block}qkv.weight"),
                Tensor::cat(&parts, 0).unwrap(),
            );
        } else if !["to_k.weight", "to_v.weight"]
            .iter()
            .any(|end| name.ends_with(end))
        {
            out.insert(name, tensor.clone());
        }
    }
    // nothing reads it
    out.insert(
        "norm_final.weight".into(),
        Tensor::ones(32, DType::F16, &Device::Cpu).unwrap(),
    );
    out
}

#[test]
fn z_image_draws_from_comfys_files_as_from_its_folder() {
    let parts = Parts::of("z_image");
    // a quarter and twice three eighths of the heads' width, as in the published model
    edit_json(&parts.path("z_image/transformer/config.json"), |config| {
        config.insert("axes_dims".into(), json!([4, 6, 6]));
    });
    let expected = parts.picture(&["-m", "z_image"]);
    let comfy = comfy_z_image(&parts.transformer);
    let encoder = prefixed("model.", &parts.encoder);
    parts.write("z/text_encoders/qwen_3_4b.safetensors", &encoder);
    parts.add_tokenizer("z/text_encoders");
    let vae = original_vae(&parts.vae);
    parts.write("z/vae/ae.safetensors", &vae);
    parts.write("z/diffusion_models/z_image_turbo_bf16.safetensors", &comfy);
    assert!(parts.picture(&["-m", "z"]) == expected);
    let (folder, split) = (parts.inspect("z_image"), parts.inspect("z"));
    for key in [
        "family",
        "model_hash",
        "parts",
        "width",
        "prediction",
        "sampler",
        "steps",
        "guidance",
    ] {
        assert_eq!(folder[key], split[key], "{key}");
    }
    let others = [
        "--text-encoder",
        "z/text_encoders/qwen_3_4b.safetensors",
        "--vae",
        "z/vae/ae.safetensors",
    ];
    parts.write(
        "turbo.safetensors",
        &prefixed("model.diffusion_model.", &comfy),
    );
    parts.write("diffusers-turbo.safetensors", &parts.transformer);
    for file in ["turbo.safetensors", "diffusers-turbo.safetensors"] {
        let args = [&["--diffusion-model", file], &others[..]].concat();
        assert!(parts.picture(&args) == expected, "{file}");
    }
    let mut all = prefixed("model.diffusion_model.", &comfy);
    all.extend(prefixed(
        "text_encoders.qwen3_4b.transformer.model.",
        &parts.encoder,
    ));
    all.extend(prefixed("vae.", &vae));
    parts.write("all/turbo.safetensors", &all);
    parts.add_tokenizer("all");
    assert!(parts.picture(&["-m", "all"]) == expected);
    // the base model by its name, and what is missing
    parts.write("z_image_bf16.safetensors", &comfy);
    let told = parts.inspect("z_image_bf16.safetensors");
    assert_eq!(
        (&told["kind"], &told["family"]),
        (&"transformer".into(), &"Z-Image".into())
    );
    let needs = told["needs"].to_string();
    for part in ["Qwen3 4B", "FLUX.1's", "`--vae Tongyi-MAI/Z-Image-Turbo`"] {
        assert!(needs.contains(part), "{needs}");
    }
    assert!(
        parts.picture(&[&["-m", "z_image_bf16.safetensors"], &others[..]].concat()) != expected
    );
    // klein's VAE decodes other latents
    let klein = Parts::new();
    parts.write("z/vae/ae.safetensors", &original_vae(&klein.vae));
    fail(
        &mut parts.draw(&["-m", "z"]),
        3,
        &["`z_image_turbo_bf16` has no VAE", "FLUX.1's"],
    );
}

#[test]
fn pictures_of_parts_are_checked_and_a_name_tells_of_the_base_model() {
    let parts = Parts::new();
    parts.write_others();
    let original = original_flux2(&parts.transformer);
    for (name, steps) in [
        ("flux-2-klein-4b", 4),
        ("flux-2-klein-base-4b", 50),
        ("database", 4),
    ] {
        let file = format!("{name}.safetensors");
        parts.write(&file, &original);
        let args = ["-m", &*file, "a", "--dry-run", "--json"];
        let output = succeed(sdgen(parts.dir.path()).args(args).args(OTHERS));
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(told["steps"], steps, "{name}");
    }
    let mut command = sdgen(parts.dir.path());
    command.args([
        "a frog", "-W", "64", "-H", "64", "--steps", "1", "-o", "y.png",
    ]);
    let model = [
        &["--diffusion-model", "flux-2-klein-4b.safetensors"],
        &OTHERS[..],
    ]
    .concat();
    let output = succeed(command.args(&model).arg("-v"));
    assert!(
        stderr(&output).contains("assumed: distilled to four steps"),
        "{}",
        stderr(&output)
    );
    let output = succeed(
        sdgen(parts.dir.path())
            .args(["check", "y.png"])
            .args(&model),
    );
    assert_eq!(stdout(&output), "y.png: identical\n");
}

#[test]
fn what_is_missing_is_named_with_the_place_to_get_it() {
    let parts = Parts::new();
    parts.write_others();
    parts.write("klein-x.safetensors", &original_flux2(&parts.transformer));
    let model = ["-m", "klein-x.safetensors"];
    let repo = "black-forest-labs/FLUX.2-klein-4B";
    fail(
        &mut parts.draw(&model),
        3,
        &[
            "`klein-x` has no text encoder and no VAE: it is the transformer of FLUX.2 klein",
            "hint: it needs the text encoder Qwen3 4B: `--text-encoder FILE`",
            &format!("`--text-encoder {repo}` from the hub"),
            &format!("`--vae {repo}` from the hub"),
        ],
    );
    fail(
        parts.draw(&model).args(&OTHERS[..2]),
        3,
        &["`klein-x` has no VAE\n", "FLUX.2's: `--vae FILE`", repo],
    );
    let said = fail(
        parts.draw(&model).args(&OTHERS[2..]),
        3,
        &["has no text encoder:"],
    );
    assert!(!said.contains("VAE"), "{said}");
    // the tokenizer is not in the encoder's file
    std::fs::remove_file(parts.path("clips/tokenizer.json")).unwrap();
    fail(
        parts
            .draw(&model)
            .args(OTHERS)
            .env("HF_HUB_CACHE", parts.path("cache")),
        3,
        &[
            "the text encoder comes without its tokenizer",
            "the network is off",
            &format!("put the tokenizer.json of `{repo}`"),
            "beside the text encoder's file",
        ],
    );
    // parts that do not fit
    let wide: Tensors = parts
        .encoder
        .iter()
        .map(|(key, tensor)| (key.clone(), tensor.repeat(vec![2; tensor.rank()]).unwrap()))
        .collect();
    parts.write("clips/wide.safetensors", &wide);
    for (args, says) in [
        (
            ["--text-encoder", "clips/wide.safetensors"],
            [
                "is Qwen3, 32 wide, `klein-x` reads Qwen3 4B, 16 wide",
                "--text-encoder black",
            ],
        ),
        (
            ["--text-encoder", "vaes/flux2_ae.safetensors"],
            ["is only a VAE, not a text encoder", "`--vae` takes it"],
        ),
        (
            ["--vae", "clips/qwen.safetensors"],
            ["is only a text encoder", "`--text-encoder`"],
        ),
        (
            ["--text-encoder", "nothing"],
            ["there is no text encoder `nothing`", "hub id"],
        ),
        (
            ["--lora", "klein-x.safetensors"],
            ["not a LoRA", "`--diffusion-model` takes it"],
        ),
    ] {
        fail(parts.draw(&model).args(args), 3, &says);
    }
    let sd = fixture("sd1");
    fail(
        parts.draw(&["-m"]).arg(sd).args(&OTHERS[..2]),
        3,
        &["`--text-encoder` means nothing to `sd1`", "FLUX.2 klein"],
    );
    let mut cut = original_flux2(&parts.transformer);
    cut.remove("double_blocks.0.img_attn.norm.query_norm.scale");
    parts.write("cut.safetensors", &cut);
    fail(
        parts.draw(&["-m", "cut.safetensors"]).args(OTHERS),
        3,
        &["`cut.safetensors` is not a whole transformer of FLUX.2 klein"],
    );
    let mut more = original_flux2(&parts.transformer);
    more.insert(
        "double_blocks.0.extra.weight".into(),
        Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap(),
    );
    parts.write("more.safetensors", &more);
    fail(
        parts.draw(&["-m", "more.safetensors"]).args(OTHERS),
        3,
        &["`double_blocks.0.extra.weight` that no layer of it has"],
    );
}

/// The header of a klein transformer of real size: width, width of the text, blocks.
fn real_klein(width: usize, text: usize, [double, single]: [usize; 2]) -> Value {
    let mut shapes = json!({
        "img_in.weight": [width, 128], "txt_in.weight": [width, text],
        "time_in.in_layer.weight": [width, 256], "time_in.out_layer.weight": [width, width],
        "double_stream_modulation_img.lin.weight": [6 * width, width],
        "double_stream_modulation_txt.lin.weight": [6 * width, width],
        "single_stream_modulation.lin.weight": [3 * width, width],
        "final_layer.linear.weight": [128, width],
        "final_layer.adaLN_modulation.1.weight": [2 * width, width],
    });
    for block in 0..double {
        for side in ["img", "txt"] {
            for (name, shape) in [
                ("attn.qkv.weight", json!([3 * width, width])),
                ("attn.norm.query_norm.scale", json!([128])),
                ("attn.norm.key_norm.scale", json!([128])),
                ("attn.proj.weight", json!([width, width])),
                ("mlp.0.weight", json!([6 * width, width])),
                ("mlp.2.weight", json!([width, 3 * width])),
            ] {
                shapes[format!("double_blocks.{block}.{side}_{name}")] = shape;
            }
        }
    }
    for block in 0..single {
        for (name, shape) in [
            ("linear1.weight", json!([9 * width, width])),
            ("linear2.weight", json!([width, 4 * width])),
            ("norm.query_norm.scale", json!([128])),
            ("norm.key_norm.scale", json!([128])),
        ] {
            shapes[format!("single_blocks.{block}.{name}")] = shape;
        }
    }
    shapes
}

/// The header of a Qwen3 of real size.
fn real_qwen3(hidden: usize, inner: usize) -> Value {
    let mut shapes =
        json!({ "model.embed_tokens.weight": [151_936, hidden], "model.norm.weight": [hidden] });
    for layer in 0..36 {
        for (name, shape) in [
            ("input_layernorm.weight", json!([hidden])),
            ("post_attention_layernorm.weight", json!([hidden])),
            ("self_attn.q_norm.weight", json!([128])),
            ("self_attn.k_norm.weight", json!([128])),
            ("self_attn.q_proj.weight", json!([4096, hidden])),
            ("self_attn.k_proj.weight", json!([1024, hidden])),
            ("self_attn.v_proj.weight", json!([1024, hidden])),
            ("self_attn.o_proj.weight", json!([hidden, 4096])),
            ("mlp.gate_proj.weight", json!([inner, hidden])),
            ("mlp.up_proj.weight", json!([inner, hidden])),
            ("mlp.down_proj.weight", json!([hidden, inner])),
        ] {
            shapes[format!("model.layers.{layer}.{name}")] = shape;
        }
    }
    shapes
}

#[test]
fn a_transformer_takes_the_place_of_that_of_a_model() {
    let parts = Parts::new();
    let original = original_flux2(&parts.transformer);
    parts.write("tuned.safetensors", &original);
    let tuned = ["-m", "klein", "--diffusion-model", "tuned.safetensors"];
    let own = parts.picture(&["-m", "klein"]);
    assert!(own == parts.picture(&tuned));
    let mut other = original.clone();
    let last = other.get_mut("final_layer.linear.weight").unwrap();
    *last = (&*last * 0.5).unwrap();
    parts.write("tuned.safetensors", &other);
    assert!(own != parts.picture(&tuned));
    // its own settings name it, and are checked with the same options
    let run = |args: &[&str]| {
        let mut command = sdgen(parts.dir.path());
        command.args(args).args(tuned);
        command
    };
    succeed(&mut run(&[
        "a frog", "-W", "64", "-H", "64", "-s", "7", "-o", "y.png",
    ]));
    succeed(&mut run(&["check", "y.png"]));
    model_folder("z_image", &parts.path("z"));
    for (model, says) in [
        ("z", ["is a transformer of FLUX.2 klein", "`z` of Z-Image"]),
        ("mini", ["`mini` is drawn by a U-Net", "$SDGEN_MODEL"]),
    ] {
        fail(parts.draw(&["-m", model]).args(&tuned[2..]), 3, &says);
    }
}

#[test]
fn parts_are_named_from_their_headers_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, shapes: &Value| sparse(shapes, &dir.path().join(name));
    let said = |name: &str, args: &[&str]| {
        stdout(&succeed(
            sdgen(dir.path()).args(["inspect", name]).args(args),
        ))
    };
    file("a.safetensors", &real_klein(3072, 7680, [5, 20]));
    file("b.safetensors", &real_klein(4096, 12288, [8, 24]));
    file("q4.safetensors", &real_qwen3(2560, 9728));
    file("q8.safetensors", &real_qwen3(4096, 12288));
    let text = said("a.safetensors", &[]);
    for part in [
        "a: transformer of FLUX.2 klein 4B\n",
        "3875.5 M parameters, f16\n",
        "option        --diffusion-model\n",
        "needs         text encoder Qwen3 4B: `--text-encoder FILE`, or `--text-encoder black-forest-labs/FLUX.2-klein-4B` from the hub\n",
        "needs         VAE, FLUX.2's: `--vae FILE`, or `--vae black-forest-labs/FLUX.2-klein-4B` from the hub\n",
        "assumed       distilled to four steps, as its name does not say `base`\n",
    ] {
        assert!(text.contains(part), "`{part}` is missing in {text}");
    }
    let json: Value = serde_json::from_str(&said("b.safetensors", &["--json"])).unwrap();
    assert_eq!(
        (&json["kind"], &json["family"], &json["option"]),
        (
            &"transformer".into(),
            &"FLUX.2 klein 9B".into(),
            &"--diffusion-model".into()
        )
    );
    assert!(
        json["needs"][0].as_str().unwrap().contains("Qwen3 8B"),
        "{json}"
    );
    assert_eq!(json["parameters"], 9_078_581_248_u64);
    let text = said("q4.safetensors", &[]);
    assert!(text.starts_with("q4: text encoder of Qwen3 4B\n"), "{text}");
    assert!(
        text.contains("needs         its tokenizer.json beside it"),
        "{text}"
    );
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let text = said("q8.safetensors", &[]);
    assert!(text.starts_with("q8: text encoder of Qwen3 8B\n"), "{text}");
    assert!(!text.contains("needs"), "{text}");
    let parts = Parts::new();
    parts.write("flux2.safetensors", &original_vae(&parts.vae));
    let sd = part(&fixture("sd1"), "vae");
    parts.write("sd.safetensors", &sd);
    let conv = &sd["decoder.conv_in.weight"];
    let mut flux = sd.clone();
    flux.insert(
        "decoder.conv_in.weight".into(),
        Tensor::cat(&[conv, conv, conv, conv], 1).unwrap(),
    );
    parts.write("ae.safetensors", &flux);
    for (name, family) in [
        ("flux2", "FLUX.2"),
        ("sd", "Stable Diffusion 1.x, 2.x or XL"),
        ("ae", "FLUX.1 and Z-Image, or Stable Diffusion 3"),
    ] {
        let told = parts.inspect(&format!("{name}.safetensors"));
        assert_eq!(
            (&told["kind"], &told["family"]),
            (&"VAE".into(), &family.into())
        );
    }
}

#[test]
fn transformers_that_are_not_drawn_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut dev = real_klein(6144, 15360, [1, 1]);
    dev["guidance_in.in_layer.weight"] = json!([6144, 256]);
    sparse(&dev, &dir.path().join("FLUX.2 dev.safetensors"));
    for (name, key) in [
        ("Chroma", "distilled_guidance_layer.in_proj.bias"),
        ("FLUX.3", "early_stream_modulations.image.lin.weight"),
        ("Lumina 2", "cap_embedder.0.weight"),
        ("Qwen-Image", "transformer_blocks.0.img_mod.1.weight"),
        ("Qwen-Image 2.1", "txt_in.text_norm.weight"),
        ("Krea 2", "txtfusion.projector.weight"),
    ] {
        let key = match name {
            "Chroma" | "Lumina 2" => format!("model.diffusion_model.{key}"),
            _ => key.into(),
        };
        // one tensor alone could be an embedding
        let other = format!("{key}.too");
        let shapes = json!({ key: [2, 2], other: [2, 2] });
        sparse(&shapes, &dir.path().join(format!("{name}.safetensors")));
    }
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        let says = [
            "is a model of a family that sdgen does not draw yet",
            &format!("a transformer of {name}\n"),
            "FLUX.2 klein and Z-Image work today",
        ];
        for command in [&["inspect"][..], &["x", "-m"], &["x", "--diffusion-model"]] {
            fail(sdgen(dir.path()).args(command).arg(&path), 3, &says);
        }
    }
    sparse(
        &json!({ "encoder.block.0.layer.0.SelfAttention.q.weight": [2, 2] }),
        &dir.path().join("t5.safetensors"),
    );
    sparse(
        &real_klein(3072, 7680, [1, 1]),
        &dir.path().join("klein.safetensors"),
    );
    let says = ["is only a text encoder (T5)", "`--text-encoder` takes it"];
    fail(
        sdgen(dir.path()).args(["x", "-m", "t5.safetensors"]),
        3,
        &says,
    );
    let args = [
        "x",
        "-m",
        "klein.safetensors",
        "--text-encoder",
        "t5.safetensors",
    ];
    fail(
        sdgen(dir.path()).args(args),
        3,
        &["`t5.safetensors` is T5, a text encoder that `klein` does not read"],
    );
}
