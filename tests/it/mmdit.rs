//! FLUX.1 and Stable Diffusion 3 from single files and in parts: under the names of Black Forest Labs
//! and Stability, and in one file, they draw the same pictures as the folder. LoRAs in the layouts of
//! trainers change the same weights.

use crate::common::*;
use crate::split::{Tensors, model_folder, original_vae, part, prefixed};
use candle_core::{DType, Device, Tensor};
use sdgen::weights::lora::Lora;
use sdgen::weights::{Checkpoint, Origin};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Command;

/// Rows of CLIP's vocabulary.
const CLIP_ROWS: usize = 49408;

/// Diffusers' names and the original ones.
type Pairs = &'static [(&'static str, &'static str)];

/// Names of layers that are the same in all blocks of one kind, diffusers' and the original.
struct Names {
    fixed: Pairs,
    /// beginnings of diffusers' and of original blocks, with their layers; several of diffusers' are one
    /// after the other in one of the original
    blocks: &'static [(&'static str, &'static str, Pairs)],
}

const FLUX: Names = Names {
    fixed: &[
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        (
            "time_text_embed.timestep_embedder.linear_1",
            "time_in.in_layer",
        ),
        (
            "time_text_embed.timestep_embedder.linear_2",
            "time_in.out_layer",
        ),
        (
            "time_text_embed.text_embedder.linear_1",
            "vector_in.in_layer",
        ),
        (
            "time_text_embed.text_embedder.linear_2",
            "vector_in.out_layer",
        ),
        (
            "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.in_layer",
        ),
        (
            "time_text_embed.guidance_embedder.linear_2",
            "guidance_in.out_layer",
        ),
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        ("proj_out", "final_layer.linear"),
    ],
    blocks: &[
        (
            "transformer_blocks",
            "double_blocks",
            &[
                ("norm1.linear", "img_mod.lin"),
                ("norm1_context.linear", "txt_mod.lin"),
                ("attn.norm_q", "img_attn.norm.query_norm"),
                ("attn.norm_k", "img_attn.norm.key_norm"),
                ("attn.norm_added_q", "txt_attn.norm.query_norm"),
                ("attn.norm_added_k", "txt_attn.norm.key_norm"),
                ("attn.to_q attn.to_k attn.to_v", "img_attn.qkv"),
                (
                    "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
                    "txt_attn.qkv",
                ),
                ("attn.to_out.0", "img_attn.proj"),
                ("attn.to_add_out", "txt_attn.proj"),
                ("ff.net.0.proj", "img_mlp.0"),
                ("ff.net.2", "img_mlp.2"),
                ("ff_context.net.0.proj", "txt_mlp.0"),
                ("ff_context.net.2", "txt_mlp.2"),
            ],
        ),
        (
            "single_transformer_blocks",
            "single_blocks",
            &[
                ("norm.linear", "modulation.lin"),
                ("attn.norm_q", "norm.query_norm"),
                ("attn.norm_k", "norm.key_norm"),
                ("attn.to_q attn.to_k attn.to_v proj_mlp", "linear1"),
                ("proj_out", "linear2"),
            ],
        ),
    ],
};

const SD3: Names = Names {
    fixed: &[
        ("pos_embed.proj", "x_embedder.proj"),
        ("context_embedder", "context_embedder"),
        (
            "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.0",
        ),
        (
            "time_text_embed.timestep_embedder.linear_2",
            "t_embedder.mlp.2",
        ),
        ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
        ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        ("proj_out", "final_layer.linear"),
    ],
    blocks: &[(
        "transformer_blocks",
        "joint_blocks",
        &[
            ("norm1.linear", "x_block.adaLN_modulation.1"),
            ("norm1_context.linear", "context_block.adaLN_modulation.1"),
            ("attn.norm_q", "x_block.attn.ln_q"),
            ("attn.norm_k", "x_block.attn.ln_k"),
            ("attn.norm_added_q", "context_block.attn.ln_q"),
            ("attn.norm_added_k", "context_block.attn.ln_k"),
            ("attn.to_q attn.to_k attn.to_v", "x_block.attn.qkv"),
            (
                "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
                "context_block.attn.qkv",
            ),
            ("attn.to_out.0", "x_block.attn.proj"),
            ("attn.to_add_out", "context_block.attn.proj"),
            ("attn2.norm_q", "x_block.attn2.ln_q"),
            ("attn2.norm_k", "x_block.attn2.ln_k"),
            ("attn2.to_q attn2.to_k attn2.to_v", "x_block.attn2.qkv"),
            ("attn2.to_out.0", "x_block.attn2.proj"),
            ("ff.net.0.proj", "x_block.mlp.fc1"),
            ("ff.net.2", "x_block.mlp.fc2"),
            ("ff_context.net.0.proj", "context_block.mlp.fc1"),
            ("ff_context.net.2", "context_block.mlp.fc2"),
        ],
    )],
};

/// Layers that shift and scale: original code has the shift first.
const SWAPPED: [&str; 2] = [
    "norm_out.linear",
    "transformer_blocks.2.norm1_context.linear",
];

impl Names {
    /// The layers of a transformer: the original name, and those of diffusers whose rows it has.
    fn layers(&self) -> Vec<(String, Vec<String>)> {
        let mut all: Vec<(String, Vec<String>)> = self
            .fixed
            .iter()
            .map(|(ours, theirs)| (theirs.to_string(), vec![ours.to_string()]))
            .collect();
        for (ours, theirs, layers) in self.blocks {
            for i in 0..3 {
                all.extend(layers.iter().map(|(names, original)| {
                    let names = names.split(' ').map(|name| format!("{ours}.{i}.{name}"));
                    (format!("{theirs}.{i}.{original}"), names.collect())
                }));
            }
        }
        all
    }

    /// A transformer under original names, as far as it has these layers.
    fn original(&self, diffusers: &Tensors) -> Tensors {
        let mut out = Tensors::new();
        let mut used = 0;
        for (original, names) in self.layers() {
            for end in ["weight", "bias"] {
                let parts = names
                    .iter()
                    .map(|name| diffusers.get(&format!("{name}.{end}")));
                let Some(parts) = parts.collect::<Option<Vec<&Tensor>>>() else {
                    continue;
                };
                used += parts.len();
                let mut tensor = Tensor::cat(&parts, 0).unwrap();
                if SWAPPED.contains(&&*names[0]) {
                    let halves = tensor.chunk(2, 0).unwrap();
                    tensor = Tensor::cat(&[&halves[1], &halves[0]], 0).unwrap();
                }
                // a norm's numbers are called its scale in FLUX's code
                let end = match original.ends_with("_norm") {
                    true => "scale",
                    false => end,
                };
                out.insert(format!("{original}.{end}"), tensor);
            }
        }
        if let Some(positions) = diffusers.get("pos_embed.pos_embed") {
            out.insert("pos_embed".into(), positions.clone());
            used += 1;
        }
        assert_eq!(used, diffusers.len());
        out
    }
}

/// A folder with a fixture and its parts.
struct Parts {
    dir: tempfile::TempDir,
    model: &'static str,
    names: Names,
}

impl Parts {
    fn new(model: &'static str, names: Names) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join(model);
        model_folder(model, &folder);
        if model == "flux" {
            // as the shapes tell of heads of 16
            edit_json(&folder.join("transformer/config.json"), |config| {
                config.insert("axes_dims_rope".into(), json!([4, 6, 6]));
            });
        }
        Self { dir, model, names }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn part(&self, name: &str) -> Tensors {
        part(&self.path(self.model), name)
    }

    fn transformer(&self) -> Tensors {
        self.names.original(&self.part("transformer"))
    }

    /// CLIP with a row for each word of its vocabulary, as `text_model...`.
    fn clip(&self, component: &str) -> Tensors {
        // newer versions of transformers leave `text_model` out of some
        let named = |(key, tensor): (String, Tensor)| match key.starts_with("text_") {
            true => (key, tensor),
            false => (format!("text_model.{key}"), tensor),
        };
        let mut clip: Tensors = self.part(component).into_iter().map(named).collect();
        let rows = clip
            .get_mut("text_model.embeddings.token_embedding.weight")
            .unwrap();
        let times = CLIP_ROWS.div_ceil(rows.dim(0).unwrap());
        *rows = rows
            .repeat((times, 1))
            .unwrap()
            .narrow(0, 0, CLIP_ROWS)
            .unwrap()
            .contiguous()
            .unwrap();
        clip
    }

    /// T5 as published, with its embeddings twice.
    fn t5(&self, component: &str) -> Tensors {
        let mut t5 = self.part(component);
        let embeddings = t5["shared.weight"].clone();
        t5.insert("encoder.embed_tokens.weight".into(), embeddings);
        t5
    }

    fn write(&self, name: &str, tensors: &Tensors) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        save(tensors, &path);
    }

    fn add_tokenizer(&self, folder: &str) {
        let tokenizer = match self.model {
            "flux" => "flux/tokenizer_2/tokenizer.json",
            _ => "sd3/tokenizer_3/tokenizer.json",
        };
        std::fs::create_dir_all(self.path(folder)).unwrap();
        let to = self.path(folder).join("tokenizer.json");
        std::fs::copy(fixture(tokenizer), to).unwrap();
    }

    fn draw(&self, args: &[&str]) -> Command {
        let mut command = sdgen(self.dir.path());
        command
            .args(["a frog in a top hat", "-W", "64", "-H", "64", "-s", "7"])
            .args(["--steps", "2", "-g", "2", "--no-metadata", "--force"])
            .args(["-o", "x.png"])
            .args(args);
        command
    }

    fn picture(&self, args: &[&str]) -> Vec<u8> {
        succeed(&mut self.draw(args));
        std::fs::read(self.path("x.png")).unwrap()
    }

    fn inspect(&self, model: &str) -> Value {
        let output = succeed(sdgen(self.dir.path()).args(["inspect", model, "--json"]));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

/// `--text-encoder` before each of these.
fn encoders<'a>(files: &[&'a str]) -> Vec<&'a str> {
    let each = files.iter().flat_map(|file| ["--text-encoder", file]);
    each.collect()
}

#[test]
fn flux_draws_from_original_names_from_parts_and_from_one_file() {
    let parts = Parts::new("flux", FLUX);
    let original = parts.transformer();
    parts.write("bare.safetensors", &original);
    let whole = prefixed("model.diffusion_model.", &original);
    parts.write("comfy.safetensors", &whole);
    parts.write("diffusers.safetensors", &parts.part("transformer"));
    parts.write("clips/t5xxl.safetensors", &parts.t5("text_encoder_2"));
    parts.write("clips/clip_l.safetensors", &parts.clip("text_encoder"));
    parts.write("vaes/ae.safetensors", &original_vae(&parts.part("vae")));
    parts.add_tokenizer("clips");
    let vae = ["--vae", "vaes/ae.safetensors"];
    // CLIP of the folder has a small vocabulary, that of a file CLIP's own
    let expected = parts.picture(&["-m", "flux"]);
    let of_folder = encoders(&["clips/t5xxl.safetensors", "flux/text_encoder"]);
    for name in ["bare", "comfy", "diffusers"] {
        let file = format!("{name}.safetensors");
        let args = [&["-m", &*file], &of_folder[..], &vae].concat();
        assert!(parts.picture(&args) == expected, "{name}");
    }
    let of_model = [&["-m", "bare.safetensors"], &encoders(&["flux"])[..], &vae].concat();
    assert!(parts.picture(&of_model) == expected);
    let clip = encoders(&["clips/clip_l.safetensors"]);
    let expected = parts.picture(&[&["-m", "flux"], &clip[..]].concat());
    let both = encoders(&["clips/t5xxl.safetensors", "clips/clip_l.safetensors"]);
    let args = [&["--diffusion-model", "bare.safetensors"], &both[..], &vae].concat();
    assert!(parts.picture(&args) == expected);
    // ComfyUI's folders, with what does not fit beside it
    for (from, to) in [
        ("bare", "comfy/diffusion_models/flux1-dev"),
        ("clips/t5xxl", "comfy/text_encoders/t5xxl_fp16"),
        ("clips/clip_l", "comfy/text_encoders/clip_l"),
        ("vaes/ae", "comfy/vae/ae"),
    ] {
        let to = parts.path(&format!("{to}.safetensors"));
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(parts.path(&format!("{from}.safetensors")), to).unwrap();
    }
    parts.add_tokenizer("comfy/text_encoders");
    let qwen = part(&fixture("klein"), "text_encoder");
    parts.write("comfy/text_encoders/qwen_3_4b.safetensors", &qwen);
    assert!(parts.picture(&["-m", "comfy"]) == expected);
    // all in one file
    let mut all = whole.clone();
    let clip = prefixed(
        "text_encoders.clip_l.transformer.",
        &parts.clip("text_encoder"),
    );
    let t5 = prefixed(
        "text_encoders.t5xxl.transformer.",
        &parts.t5("text_encoder_2"),
    );
    all.extend(clip.into_iter().chain(t5));
    all.extend(prefixed("vae.", &original_vae(&parts.part("vae"))));
    let one = Tensor::new(&[1f32], &Device::Cpu).unwrap();
    all.insert("text_encoders.clip_l.logit_scale".into(), one);
    parts.write("whole/flux1-dev.safetensors", &all);
    parts.add_tokenizer("whole");
    assert!(parts.picture(&["-m", "whole/flux1-dev.safetensors"]) == expected);
    let (folder, file) = (
        parts.inspect("comfy"),
        parts.inspect("whole/flux1-dev.safetensors"),
    );
    assert_eq!(folder["model_hash"], file["model_hash"]);
    assert_eq!(
        (&file["family"], &file["steps"], &file["guidance"]),
        (&"FLUX.1".into(), &28.into(), &3.5.into())
    );
    // schnell is what takes no guidance
    all.retain(|key, _| !key.contains("guidance_in"));
    parts.write("whole/schnell.safetensors", &all);
    let schnell = parts.inspect("whole/schnell.safetensors");
    assert_eq!(
        (&schnell["steps"], &schnell["guidance"]),
        (&4.into(), &1.0.into())
    );
    // with guidance by a negative prompt in two passes
    parts.picture(&["-m", "whole/schnell.safetensors", "-n", "a fish"]);
    for (args, code, says) in [
        (
            vec!["-m", "bare.safetensors"],
            3,
            [
                "has no text encoder and no VAE: it is the transformer of FLUX.1 dev",
                "text encoders CLIP-L and T5-XXL: `--text-encoder FILE` for each",
                "VAE, FLUX.1's: `--vae FILE`",
            ],
        ),
        (
            [&["-m", "bare.safetensors"], &both[2..], &vae].concat(),
            3,
            [
                "lacks a text encoder",
                "text encoder T5",
                "--text-encoder FILE",
            ],
        ),
        (
            [&["-m", "bare.safetensors"], &both[..], &both[..2], &vae].concat(),
            3,
            [
                "is T5, of which there is another",
                "hint: ",
                "once for each",
            ],
        ),
        (
            [
                &["-m", "bare.safetensors", "--text-encoder"],
                &["comfy/text_encoders/qwen_3_4b.safetensors"][..],
            ]
            .concat(),
            3,
            [
                "is Qwen3, a text encoder that `bare` does not read",
                "hint: ",
                "T5-XXL",
            ],
        ),
        (
            vec!["-m", "flux", "--no-t5"],
            3,
            [
                "`--no-t5` means nothing to `flux`",
                "hint: ",
                "Stable Diffusion 3",
            ],
        ),
        (
            vec!["-m", "whole/schnell.safetensors", "--true-guidance", "3"],
            2,
            ["`--true-guidance` means nothing", "hint: ", "FLUX.1 dev"],
        ),
    ] {
        fail(&mut parts.draw(&args), code, &says);
    }
    // what is told of a picture is known by its channels: latents, as many again and 256 of a mask;
    // twice the latents; nothing that is known
    let told = |times: usize| {
        let mut told = original.clone();
        let img_in = Tensor::cat(&vec![&original["img_in.weight"]; times], 1).unwrap();
        told.insert("img_in.weight".into(), img_in);
        parts.write("told.safetensors", &told);
        [&["-m", "told.safetensors"], &both[..], &vae].concat()
    };
    let fill = [&told(18)[..], &["-i", "x.png", "--mask", "mask.png"]].concat();
    let white = sdgen::image::Image {
        width: 64,
        height: 64,
        rgb: vec![255; 64 * 64 * 3],
    };
    let white = white.encode(sdgen::image::Format::Png, None).unwrap();
    std::fs::write(parts.path("mask.png"), white).unwrap();
    assert_ne!(parts.picture(&fill), expected);
    parts.picture(&[&told(2)[..], &["--reference", "x.png"]].concat());
    fail(
        &mut parts.draw(&told(6)),
        3,
        &["takes 96 channels and gives 16", "Fill, Canny and Depth"],
    );
}

#[test]
fn stable_diffusion_3_draws_from_original_names_from_parts_and_without_t5() {
    let parts = Parts::new("sd3", SD3);
    let whole = prefixed("model.diffusion_model.", &parts.transformer());
    parts.write("sd3.5_medium.safetensors", &whole);
    parts.write("bare.safetensors", &parts.transformer());
    parts.write("t5xxl.safetensors", &parts.t5("text_encoder_3"));
    parts.write("clip_l.safetensors", &parts.clip("text_encoder"));
    parts.write("clip_g.safetensors", &parts.clip("text_encoder_2"));
    parts.write("vae.safetensors", &original_vae(&parts.part("vae")));
    parts.add_tokenizer("");
    let vae = ["--vae", "vae.safetensors"];
    let expected = parts.picture(&["-m", "sd3"]);
    let of_model = [
        &["-m", "sd3.5_medium.safetensors"],
        &encoders(&["sd3"])[..],
        &vae,
    ]
    .concat();
    assert!(parts.picture(&of_model) == expected);
    // T5 is left out
    let without = parts.picture(&["-m", "sd3", "--no-t5"]);
    assert!(without != expected);
    let args = [&of_model[..], &["--no-t5"]].concat();
    assert!(parts.picture(&args) == without);
    // two of CLIP's in any order
    let clips = encoders(&["clip_g.safetensors", "clip_l.safetensors"]);
    let expected = parts.picture(&[&["-m", "sd3"], &clips[..]].concat());
    let all = encoders(&[
        "t5xxl.safetensors",
        "clip_l.safetensors",
        "clip_g.safetensors",
    ]);
    for model in ["sd3.5_medium.safetensors", "bare.safetensors"] {
        let args = [&["-m", model], &all[..], &vae].concat();
        assert!(parts.picture(&args) == expected, "{model}");
    }
    let without = parts.picture(&[&["-m", "sd3", "--no-t5"], &clips[..]].concat());
    let args = [&["-m", "bare.safetensors"], &clips[..], &vae].concat();
    assert!(parts.picture(&args) == without);
    // Stability's file with all parts, and the one without T5
    let mut file = whole;
    for (prefix, tensors) in [
        (
            "text_encoders.clip_l.transformer.",
            parts.clip("text_encoder"),
        ),
        (
            "text_encoders.clip_g.transformer.",
            parts.clip("text_encoder_2"),
        ),
        ("first_stage_model.", original_vae(&parts.part("vae"))),
    ] {
        file.extend(prefixed(prefix, &tensors));
    }
    parts.write("incl_clips.safetensors", &file);
    assert!(parts.picture(&["-m", "incl_clips.safetensors"]) == without);
    let t5 = parts.t5("text_encoder_3");
    file.extend(prefixed("text_encoders.t5xxl.transformer.", &t5));
    parts.write("incl_t5.safetensors", &file);
    assert!(parts.picture(&["-m", "incl_t5.safetensors"]) == expected);
    let told = parts.inspect("incl_t5.safetensors");
    assert_eq!(
        (&told["family"], &told["steps"], &told["guidance"]),
        (&"Stable Diffusion 3".into(), &28.into(), &7.0.into())
    );
    parts.write("sd3.5_large_turbo.safetensors", &file);
    let told = parts.inspect("sd3.5_large_turbo.safetensors");
    assert_eq!(
        (&told["steps"], &told["guidance"]),
        (&4.into(), &1.0.into())
    );
    fail(
        &mut parts.draw(&["-m", "bare.safetensors"]),
        3,
        &[
            "no text encoder and no VAE: it is the transformer of Stable Diffusion 3",
            "text encoders CLIP-L and CLIP-G, and perhaps T5-XXL",
        ],
    );
    // there are positions for twelve squares of 16 pixels
    let large = ["-m", "sd3", "-W", "208"];
    let said = fail(&mut parts.draw(&large), 2, &["hint: "]);
    assert!(said.contains("192x192 at most, not for 208x64"), "{said}");
}

/// The header of a FLUX.1 of real size.
fn real_flux(is_dev: bool) -> Value {
    let (width, mut shapes) = (3072, serde_json::Map::new());
    let mut layer = |name: &str, rows: usize, columns: usize| {
        shapes.insert(format!("{name}.weight"), json!([rows, columns]));
        shapes.insert(format!("{name}.bias"), json!([rows]));
    };
    layer("img_in", width, 64);
    layer("txt_in", width, 4096);
    for (name, columns) in [("time_in", 256), ("vector_in", 768), ("guidance_in", 256)] {
        if name != "guidance_in" || is_dev {
            layer(&format!("{name}.in_layer"), width, columns);
            layer(&format!("{name}.out_layer"), width, width);
        }
    }
    layer("final_layer.linear", 64, width);
    layer("final_layer.adaLN_modulation.1", 2 * width, width);
    for i in 0..19 {
        for stream in ["img", "txt"] {
            let block = format!("double_blocks.{i}.{stream}");
            layer(&format!("{block}_mod.lin"), 6 * width, width);
            layer(&format!("{block}_attn.qkv"), 3 * width, width);
            layer(&format!("{block}_attn.proj"), width, width);
            layer(&format!("{block}_mlp.0"), 4 * width, width);
            layer(&format!("{block}_mlp.2"), width, 4 * width);
        }
    }
    for i in 0..38 {
        let block = format!("single_blocks.{i}");
        layer(&format!("{block}.modulation.lin"), 3 * width, width);
        layer(&format!("{block}.linear1"), 7 * width, width);
        layer(&format!("{block}.linear2"), width, 5 * width);
    }
    let norm =
        |block: String| ["query_norm", "key_norm"].map(|name| format!("{block}norm.{name}.scale"));
    let double = (0..19).flat_map(|i| {
        ["img", "txt"].map(|stream| norm(format!("double_blocks.{i}.{stream}_attn.")))
    });
    let single = (0..38).map(|i| norm(format!("single_blocks.{i}.")));
    for name in double.chain(single).flatten() {
        shapes.insert(name, json!([128]));
    }
    Value::Object(shapes)
}

#[test]
fn real_files_of_flux_are_told_by_their_headers() {
    let dir = tempfile::tempdir().unwrap();
    // as published
    for (name, is_dev, parameters) in [
        ("flux1-dev", true, 11_901_408_320_u64),
        ("flux1-schnell", false, 11_891_178_560),
    ] {
        sparse(
            &real_flux(is_dev),
            &dir.path().join(format!("{name}.safetensors")),
        );
        let file = format!("{name}.safetensors");
        let told = succeed(sdgen(dir.path()).args(["inspect", &file, "--json"]));
        let told: Value = serde_json::from_slice(&told.stdout).unwrap();
        assert_eq!(told["parameters"], parameters);
        let family = if is_dev {
            "FLUX.1 dev"
        } else {
            "FLUX.1 schnell"
        };
        assert_eq!(
            (&told["kind"], &told["family"]),
            (&"transformer".into(), &family.into())
        );
        let needs = told["needs"][0].as_str().unwrap();
        assert!(
            needs.starts_with("text encoders CLIP-L and T5-XXL: "),
            "{needs}"
        );
    }
    let t5 = json!({
        "shared.weight": [32128, 4096],
        "encoder.block.0.layer.0.SelfAttention.q.weight": [4096, 4096],
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": [32, 64],
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": [10240, 4096],
    });
    sparse(&t5, &dir.path().join("t5.safetensors"));
    let said = stdout(&succeed(
        sdgen(dir.path()).args(["inspect", "t5.safetensors"]),
    ));
    assert!(said.starts_with("t5: text encoder of T5-XXL\n"), "{said}");
    assert!(said.contains("its tokenizer.json beside it"), "{said}");
}

/// All weights of the transformer of a fixture, with this LoRA of which every tensor is used.
fn weights(model: &str, lora: Option<&Tensors>) -> Vec<(String, Vec<f32>)> {
    let dir = tempfile::tempdir().unwrap();
    let mut checkpoint = Checkpoint::open(Origin::Path(&fixture(model))).unwrap();
    if let Some(lora) = lora {
        let path = dir.path().join("x.safetensors");
        save(lora, &path);
        checkpoint
            .use_loras([Lora::open(&path, 0.7)], true)
            .unwrap();
    }
    let all = checkpoint.shapes("transformer");
    let read = |(name, shape): (&str, &[usize])| {
        let weights = checkpoint.weights("transformer", &Device::Cpu, DType::F32);
        (name.to_string(), values(&weights.get(name, shape).unwrap()))
    };
    all.map(read).collect()
}

/// Numbers from -1 to 1, times 0.3.
fn numbers(seed: usize, rows: usize, columns: usize) -> Tensor {
    let number = |i: usize| {
        let mixed = ((i + 1 + seed * 7919) as u32).wrapping_mul(2654435761) >> 8;
        (mixed as f32 / (1 << 23) as f32 - 1.0) * 0.3
    };
    let values: Vec<f32> = (0..rows * columns).map(number).collect();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
}

#[test]
fn loras_in_all_layouts_change_the_same_weights_by_the_same() {
    for (model, names) in [("flux", FLUX), ("sd3", SD3)] {
        let checkpoint = Checkpoint::open(Origin::Path(&fixture(model))).unwrap();
        let shape = |layer: &str| {
            let shape = checkpoint.shape(&format!("transformer.{layer}.weight"))?;
            (shape.len() == 2).then(|| (shape[0], shape[1]))
        };
        let mut files = vec![Tensors::new(); 6];
        let mut changed = 0;
        for (seed, (original, names)) in names.layers().into_iter().enumerate() {
            let Some(shapes) = names.iter().map(|it| shape(it)).collect::<Option<Vec<_>>>() else {
                continue;
            };
            changed += names.len();
            let down = numbers(2 * seed, 2, shapes[0].1);
            let rows: usize = shapes.iter().map(|(rows, _)| rows).sum();
            let up = numbers(2 * seed + 1, rows, 2);
            let mut add = |file: usize, layer: String, ends: [&str; 2], up: &Tensor| {
                files[file].insert(format!("{layer}{}", ends[0]), down.clone());
                files[file].insert(format!("{layer}{}", ends[1]), up.contiguous().unwrap());
            };
            let peft = [".lora_A.weight", ".lora_B.weight"];
            let kohya = [".lora_down.weight", ".lora_up.weight"];
            let flat = |name: &str| format!("lora_unet_{}", name.replace('.', "_"));
            let mut from = 0;
            for (name, (rows, _)) in names.iter().zip(&shapes) {
                let mut own = up.narrow(0, from, *rows).unwrap();
                if SWAPPED.contains(&&**name) {
                    let halves = own.chunk(2, 0).unwrap();
                    own = Tensor::cat(&[&halves[1], &halves[0]], 0).unwrap();
                }
                from += rows;
                add(0, format!("transformer.{name}"), peft, &own);
                add(1, flat(name), kohya, &own);
                let transformer = flat(name).replacen("unet", "transformer", 1);
                add(2, transformer, kohya, &own);
            }
            add(3, flat(&original), kohya, &up);
            add(4, format!("diffusion_model.{original}"), peft, &up);
            add(5, original, peft, &up);
        }
        let expected = weights(model, Some(&files[0]));
        let plain = weights(model, None);
        let differing = expected.iter().zip(&plain).filter(|(a, b)| a.1 != b.1);
        assert_eq!(differing.count(), changed, "{model}");
        for (i, file) in files.iter().enumerate().skip(1) {
            let got = weights(model, Some(file));
            for ((name, got), (_, expected)) in got.iter().zip(&expected) {
                assert!(got == expected, "{model} {i}: {name}");
            }
        }
    }
}

#[test]
fn loras_of_t5_change_its_weights_under_the_names_of_transformers_and_of_kohya() {
    let dir = tempfile::tempdir().unwrap();
    let layers = [
        "encoder.block.0.layer.0.SelfAttention.q",
        "encoder.block.1.layer.0.SelfAttention.o",
        "encoder.block.1.layer.1.DenseReluDense.wi_0",
        "encoder.block.0.layer.1.DenseReluDense.wo",
    ];
    for (model, encoder, prefixes) in [
        ("flux", "text_encoder_2", &["lora_te3_", "lora_te2_"][..]),
        ("sd3", "text_encoder_3", &["lora_te3_"]),
    ] {
        let open = || Checkpoint::open(Origin::Path(&fixture(model))).unwrap();
        let read = |checkpoint: &Checkpoint, layer: &str| {
            let name = format!("{layer}.weight");
            let shape = checkpoint.shape(&format!("{encoder}.{name}")).unwrap();
            let weights = checkpoint.weights(encoder, &Device::Cpu, DType::F32);
            weights.get(&name, shape).unwrap()
        };
        let plain = open();
        let mut files = vec![Tensors::new(); 1 + prefixes.len()];
        for (seed, layer) in layers.into_iter().enumerate() {
            let (rows, columns) = read(&plain, layer).dims2().unwrap();
            let down = numbers(2 * seed, 2, columns);
            let up = numbers(2 * seed + 1, rows, 2);
            let flat = layer.replace('.', "_");
            for (nth, file) in files.iter_mut().enumerate() {
                let [a, b] = match nth.checked_sub(1).map(|nth| prefixes[nth]) {
                    None => ["A", "B"].map(|it| format!("{encoder}.{layer}.lora_{it}.weight")),
                    Some(prefix) => {
                        ["down", "up"].map(|it| format!("{prefix}{flat}.lora_{it}.weight"))
                    }
                };
                file.insert(a, down.clone());
                file.insert(b, up.clone());
            }
        }
        for (nth, file) in files.iter().enumerate() {
            let path = dir.path().join("x.safetensors");
            save(file, &path);
            let mut changed = open();
            changed.use_loras([Lora::open(&path, 0.7)], true).unwrap();
            for (seed, layer) in layers.into_iter().enumerate() {
                let before = read(&plain, layer);
                let (rows, columns) = before.dims2().unwrap();
                let (up, down) = (
                    numbers(2 * seed + 1, rows, 2),
                    numbers(2 * seed, 2, columns),
                );
                let expected = (before + (up.matmul(&down).unwrap() * 0.7).unwrap()).unwrap();
                let got = values(&read(&changed, layer));
                for (got, expected) in got.iter().zip(values(&expected)) {
                    // rounded to f16, as the file is
                    assert!(
                        (got - expected).abs() <= 1e-3 * expected.abs().max(1.0),
                        "{model} {nth} {layer}: {got} {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn loras_of_xlabs_change_the_layers_of_attention() {
    let checkpoint = Checkpoint::open(Origin::Path(&fixture("flux"))).unwrap();
    let (mut peft, mut xlabs) = (Tensors::new(), Tensors::new());
    let layers: [(&str, &str, &[&str]); 6] = [
        (
            "double_blocks.1",
            "qkv_lora1",
            &["attn.to_q", "attn.to_k", "attn.to_v"],
        ),
        (
            "double_blocks.1",
            "qkv_lora2",
            &["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        ),
        ("double_blocks.1", "proj_lora1", &["attn.to_out.0"]),
        ("double_blocks.1", "proj_lora2", &["attn.to_add_out"]),
        (
            "single_blocks.0",
            "qkv_lora",
            &["attn.to_q", "attn.to_k", "attn.to_v"],
        ),
        ("single_blocks.0", "proj_lora", &["proj_out"]),
    ];
    for (seed, (block, name, names)) in layers.into_iter().enumerate() {
        let own = block
            .replace("double_blocks", "transformer_blocks")
            .replace("single_blocks", "single_transformer_blocks");
        let shape = |name: &str| {
            let name = format!("transformer.{own}.{name}.weight");
            checkpoint.shape(&name).unwrap().to_vec()
        };
        let (rows, columns) = (shape(names[0])[0], shape(names[0])[1]);
        let down = numbers(2 * seed, 2, columns);
        let up = numbers(2 * seed + 1, rows * names.len(), 2);
        for (i, name) in names.iter().enumerate() {
            let part = up.narrow(0, i * rows, rows).unwrap().contiguous().unwrap();
            let layer = format!("transformer.{own}.{name}");
            peft.insert(format!("{layer}.lora_A.weight"), down.clone());
            peft.insert(format!("{layer}.lora_B.weight"), part);
        }
        let layer = format!("{block}.processor.{name}");
        xlabs.insert(format!("{layer}.down.weight"), down);
        xlabs.insert(format!("{layer}.up.weight"), up);
    }
    let [expected, got] = [&peft, &xlabs].map(|lora| weights("flux", Some(lora)));
    assert!(expected != weights("flux", None));
    for ((name, got), (_, expected)) in got.iter().zip(&expected) {
        assert!(got == expected, "{name}");
    }
}
