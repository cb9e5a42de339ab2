//! `sdgen convert`: what is written draws what it was made of, under original names and diffusers', in
//! every type.

use crate::common::*;
use crate::split::model_folder;
use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Rows of CLIP's vocabulary.
const CLIP_ROWS: usize = 49408;

/// The models whose single files are written.
const MODELS: [&str; 6] = ["sd1", "sdxl", "flux", "klein", "z_image", "sd3"];

/// A folder with one of these models, which says nothing that single files do not tell.
struct Model {
    dir: tempfile::TempDir,
    name: &'static str,
}

impl Model {
    fn new(name: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join(name);
        let of_transformer = |key: &str, parts: [usize; 3]| {
            edit_json(&folder.join("transformer/config.json"), |config| {
                config.insert(key.into(), json!(parts));
            });
        };
        match name {
            "sd1" | "sdxl" => with_full_vocabulary(name, &folder),
            _ => model_folder(name, &folder),
        }
        match name {
            "sd1" | "sdxl" => edit_json(&folder.join("unet/config.json"), |config| {
                config.insert("norm_num_groups".into(), 32.into());
            }),
            "flux" => of_transformer("axes_dims_rope", [4, 6, 6]),
            "z_image" => of_transformer("axes_dims", [4, 6, 6]),
            _ => (),
        }
        let clips: &[&str] = match name {
            "flux" => &["text_encoder"],
            "sd3" => &["text_encoder", "text_encoder_2"],
            _ => &[],
        };
        clips.iter().for_each(|clip| full_vocabulary(&folder, clip));
        Self { dir, name }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn sdgen(&self) -> Command {
        sdgen(self.dir.path())
    }

    fn convert(&self, args: &[&str]) -> Command {
        let mut command = self.sdgen();
        command.arg("convert").args(args);
        command
    }

    /// The name of a file for a single file of this model, with a tokenizer beside it if that has one.
    fn single(&self, name: &str) -> String {
        let tokenizers = ["tokenizer", "tokenizer_2", "tokenizer_3"];
        let mut files =
            tokenizers.map(|it| self.path(&format!("{}/{it}/tokenizer.json", self.name)));
        files.reverse();
        std::fs::create_dir_all(self.path("single")).unwrap();
        if let Some(file) = files.iter().find(|file| file.exists()) {
            std::fs::copy(file, self.path("single/tokenizer.json")).unwrap();
        }
        // its name tells that Z-Image was distilled
        format!("single/{name}-turbo.safetensors")
    }

    fn picture(&self, args: &[&str]) -> Vec<u8> {
        let (side, guidance) = match self.name {
            "sd1" | "sdxl" => ("16", "5"),
            // a name that says `turbo` turns it off
            "flux" | "sd3" => ("64", "2"),
            _ => ("64", "1"),
        };
        let mut command = self.sdgen();
        command
            .args([
                "a frog in a top hat",
                "-W",
                side,
                "-H",
                side,
                "-s",
                "7",
                "--steps",
                "2",
            ])
            .args(["--no-metadata", "--force", "-o", "x.png", "-g", guidance])
            .args(args);
        succeed(&mut command);
        pixels(&self.path("x.png"))
    }

    /// The bytes of all weights in a folder, by their files.
    fn weights(&self, folder: &str) -> Vec<(PathBuf, Vec<u8>)> {
        let root = self.path(folder);
        let mut all = vec![];
        for part in sdgen::weights::PARTS {
            for stem in ["model", "diffusion_pytorch_model"] {
                let file = Path::new(part).join(format!("{stem}.safetensors"));
                if let Ok(bytes) = std::fs::read(root.join(&file)) {
                    all.push((file, bytes));
                }
            }
        }
        assert!(all.len() > 2, "{folder}");
        all
    }

    /// A transformer's file, with what else draws.
    fn with_others(&self, file: &str) -> Vec<String> {
        let mut args = vec!["-m".to_string(), file.into()];
        if !["sd1", "sdxl"].contains(&self.name) {
            args.extend(["--text-encoder", self.name, "--vae", self.name].map(String::from));
        }
        args
    }

    fn picture_with_others(&self, file: &str) -> Vec<u8> {
        let args = self.with_others(file);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.picture(&args)
    }

    /// What is in the folder that was not there at first.
    fn leftovers(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.contains(".sdgen-")).collect()
    }
}

/// Gives a CLIP of a folder a row for each word of CLIP's vocabulary, and that tokenizer.
fn full_vocabulary(folder: &Path, component: &str) {
    let file = folder.join(component).join("model.safetensors");
    let mut clip = load(&file);
    let key = clip
        .keys()
        .find(|key| key.ends_with("token_embedding.weight"));
    let key = key.unwrap().clone();
    let rows = clip[&key].dim(0).unwrap();
    let picked: Vec<u32> = (0..CLIP_ROWS).map(|i| (i % rows) as u32).collect();
    let picked = Tensor::new(picked, &Device::Cpu).unwrap();
    clip.insert(key.clone(), clip[&key].index_select(&picked, 0).unwrap());
    save(&clip, &file);
    edit_json(&folder.join(component).join("config.json"), |config| {
        config.insert("vocab_size".into(), CLIP_ROWS.into());
        // as the width tells
        config.insert("num_attention_heads".into(), 1.into());
        if config["eos_token_id"] != 2 {
            config.insert("eos_token_id".into(), (CLIP_ROWS - 1).into());
        }
    });
    let tokenizer = folder.join(component.replace("text_encoder", "tokenizer"));
    let [vocab, merges] = sdgen::text::tokenizer::clip_files().unwrap();
    std::fs::write(tokenizer.join("vocab.json"), vocab).unwrap();
    std::fs::write(tokenizer.join("merges.txt"), merges).unwrap();
}

#[test]
fn a_single_file_draws_what_its_folder_draws_and_becomes_the_same_folder() {
    for name in MODELS {
        let model = Model::new(name);
        let expected = model.picture(&["-m", name]);
        let single = model.single("all");
        let said = succeed(&mut model.convert(&[name, &single]));
        assert_eq!(stdout(&said).trim_end(), single);
        assert!(model.picture(&["-m", &single]) == expected, "{name}");
        succeed(&mut model.convert(&[name, "first"]));
        succeed(&mut model.convert(&[&single, "back"]));
        assert!(model.weights("first") == model.weights("back"), "{name}");
        for folder in ["first", "back"] {
            assert!(
                model.picture(&["-m", folder]) == expected,
                "{name}: {folder}"
            );
        }
        assert_eq!(model.leftovers(), [""; 0]);
    }
}

#[test]
fn a_gguf_file_in_f16_becomes_the_folder_it_was_made_of() {
    for name in MODELS {
        let model = Model::new(name);
        succeed(&mut model.convert(&[name, "half", "--type", "f16"]));
        succeed(&mut model.convert(&["half", "x-turbo.gguf"]));
        let mut back = model.convert(&["x-turbo.gguf", "back", "--type", "f16"]);
        if !["sd1", "sdxl"].contains(&name) {
            // it is the transformer alone
            fail(
                &mut back,
                2,
                &["a folder holds all parts", "--diffusion-model"],
            );
            back = model.convert(&["half", "back", "--diffusion-model", "x-turbo.gguf"]);
        }
        succeed(&mut back);
        assert!(model.weights("half") == model.weights("back"), "{name}");
        assert!(
            model.picture_with_others("x-turbo.gguf") == model.picture_with_others("half"),
            "{name}"
        );
    }
}

#[test]
fn what_tensors_do_not_tell_is_in_the_header_of_a_single_file() {
    let model = Model::new("sd1");
    edit_json(
        &model.path("sd1/scheduler/scheduler_config.json"),
        |config| {
            config.insert("_class_name".into(), "DDIMScheduler".into());
            config.insert("prediction_type".into(), "v_prediction".into());
            config.insert("rescale_betas_zero_snr".into(), true.into());
            config.insert("timestep_spacing".into(), "trailing".into());
        },
    );
    let expected = model.picture(&["-m", "sd1"]);
    for file in ["x.safetensors", "x.gguf"] {
        succeed(&mut model.convert(&["sd1", file]));
        assert!(model.picture(&["-m", file]) == expected, "{file}");
    }
    // a base model whose file's name does not say so
    let model = Model::new("klein");
    edit_json(&model.path("klein/model_index.json"), |index| {
        index.insert("is_distilled".into(), false.into());
    });
    let file = model.single("x");
    succeed(&mut model.convert(&["klein", &file]));
    let told = succeed(model.sdgen().args(["inspect", &file, "--json"]));
    let told: Value = serde_json::from_slice(&told.stdout).unwrap();
    assert_eq!(told["steps"], 50, "{told}");
    // what is damaged there is said
    let bytes = std::fs::read(model.path(&file)).unwrap();
    let at = bytes
        .windows(13)
        .position(|it| it == b"sdgen.configs")
        .unwrap();
    let brace = at + bytes[at..].iter().position(|it| *it == b'{').unwrap();
    let damaged = [&bytes[..brace], b"[", &bytes[brace + 1..]].concat();
    std::fs::write(model.path(&file), damaged).unwrap();
    let mut inspect = model.sdgen();
    fail(
        inspect.args(["inspect", &file]),
        3,
        &["`sdgen.configs` in the header of"],
    );
}

#[test]
fn blocks_and_fp8_draw_what_their_widened_numbers_draw() {
    for (name, kind) in [
        ("klein", "q8_0"),
        ("z_image", "q5_1"),
        ("flux", "q4_0"),
        ("sd1", "q4_k"),
        ("sdxl", "q6_k"),
        ("sd1", "f8_e4m3"),
        ("klein", "f8_e4m3"),
    ] {
        let model = Model::new(name);
        let narrow = match kind {
            "f8_e4m3" => model.single("narrow"),
            _ => "narrow-turbo.gguf".into(),
        };
        let mut command = model.convert(&[name, &narrow, "--type", kind, "--json"]);
        let record: Value = serde_json::from_slice(&succeed(&mut command).stdout).unwrap();
        assert_eq!(record["path"], narrow);
        // narrow rows are not made of whole blocks of 256
        let stored = match (name, kind) {
            (_, "q4_k") => "q5_0",
            (_, "q6_k") => "q8_0",
            _ => kind,
        };
        assert!(record["types"][stored].as_u64().unwrap() > 10, "{record}");
        let wide = model.single("wide");
        succeed(&mut model.convert(&[&narrow, &wide, "--type", "f32"]));
        let narrow = model.picture_with_others(&narrow);
        assert!(narrow == model.picture_with_others(&wide), "{name} {kind}");
        assert!(narrow != model.picture(&["-m", name]), "{name} {kind}");
    }
}

#[test]
fn what_changes_weights_becomes_part_of_them() {
    let model = Model::new("klein");
    std::fs::copy(
        fixture("klein/lora.safetensors"),
        model.path("lora.safetensors"),
    )
    .unwrap();
    let lora = ["--lora", "lora.safetensors:0.8"];
    let expected = model.picture(&[&["-m", "klein"], &lora[..]].concat());
    let single = model.single("changed");
    succeed(&mut model.convert(&[&["klein", &single], &lora[..]].concat()));
    assert!(worst_level(&model.picture(&["-m", &single]), &expected) <= 1);
    assert!(worst_level(&model.picture(&["-m", "klein"]), &expected) > 1);

    let model = Model::new("sd1");
    let other = model.path("other");
    copy_folder(&model.path("sd1"), &other);
    for file in [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ] {
        let halved = |(key, tensor): (String, Tensor)| (key, (tensor * 0.5).unwrap());
        let tensors = load(&other.join(file)).into_iter().map(halved).collect();
        save(&tensors, &other.join(file));
    }
    let changes = ["--merge", "other:0.3", "--vae", "other/vae"];
    let expected = model.picture(&[&["-m", "sd1"], &changes[..]].concat());
    for out in [&*model.single("changed"), "changed"] {
        succeed(&mut model.convert(&[&["sd1", out], &changes[..]].concat()));
        assert!(
            worst_level(&model.picture(&["-m", out]), &expected) <= 1,
            "{out}"
        );
    }
    assert!(worst_level(&model.picture(&["-m", "sd1"]), &expected) > 1);
}

#[test]
fn the_embedded_model_as_a_folder_draws_what_it_draws() {
    let model = Model::new("sd1");
    let convert = ["mini", "folder", "--type", "f32"];
    succeed(&mut model.convert(&convert));
    let frog = ["a frog", "--steps", "3", "-s", "7"];
    let draw = |of: &str, name: &str| {
        let path = model.path(name);
        let mut sdgen = model.sdgen();
        sdgen.args(frog).args(["-m", of, "-o"]).arg(&path);
        succeed(&mut sdgen);
        path
    };
    let [embedded, folder] = [draw("mini", "a.png"), draw("folder", "b.png")];
    assert_eq!(worst_level(&pixels(&embedded), &pixels(&folder)), 0);
    // its guidance too, and its steps
    let mut inspect = model.sdgen();
    let shown = stdout(&succeed(inspect.args(["inspect", "--json", "folder"])));
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(
        (&shown["steps"], &shown["guidance"]),
        (&20.into(), &2.5.into())
    );
}

#[test]
fn what_cannot_be_written_is_said_and_nothing_is_left() {
    let model = Model::new("sd1");
    let single = "all.safetensors";
    succeed(&mut model.convert(&["sd1", single]));
    for (args, code, says) in [
        (&["sd1", single][..], 2, &["exists already", "--force"][..]),
        (&["sd1", "x.ckpt"], 2, &["end in .ckpt", "hint: "]),
        (&["sd1", "none/x.gguf"], 2, &["no folder", "mkdir"]),
        (
            &["sd1", "x.safetensors", "--type", "q8_0"],
            2,
            &["type of GGUF files"],
        ),
        (
            &["sd1", "x.gguf", "--type", "f8_e4m3"],
            2,
            &["no type of GGUF files", "q8_0"],
        ),
        (
            &["sd1", "x.gguf", "--type", "q9"],
            2,
            &["expected one of f32, f16"],
        ),
        (&["nothing.safetensors", "x.gguf"], 3, &["does not exist"]),
        (&["sd1", "sd1"], 2, &["exists already", "--force"]),
        (
            &["mini", "x.safetensors"],
            2,
            &["2228 tokens of its own", "hint: name a folder"],
        ),
        (&["mini", "x.gguf"], 2, &["2228 tokens of its own"]),
    ] {
        fail(&mut model.convert(args), code, says);
    }
    std::fs::create_dir(model.path("mine")).unwrap();
    std::fs::write(model.path("mine/letter.txt"), "dear").unwrap();
    let mut over_mine = model.convert(&["sd1", "mine", "--force"]);
    fail(&mut over_mine, 2, &["no folder of a model"]);
    assert!(model.path("mine/letter.txt").exists());
    // a tensor that cannot be read is found when half of the file is written
    let mut tensors = load(&model.path(single));
    let key = "model.diffusion_model.out.2.bias";
    let bias = tensors[key].to_dtype(candle_core::DType::U32).unwrap();
    tensors.insert(key.into(), bias);
    save(&tensors, &model.path("odd.safetensors"));
    for out in ["x.safetensors", "x.gguf", "x"] {
        let says = ["stored as U32", "hint: "];
        fail(&mut model.convert(&["odd.safetensors", out]), 1, &says);
        assert!(!model.path(out).exists());
    }
    assert_eq!(model.leftovers(), [""; 0]);
    // what is there is replaced
    succeed(&mut model.convert(&["sd1", single, "--force", "--type", "bf16"]));
    for _ in 0..2 {
        succeed(&mut model.convert(&[single, "folder", "--force"]));
    }
    assert!(model.path("folder/unet/config.json").exists());
    assert_eq!(model.leftovers(), [""; 0]);
}
