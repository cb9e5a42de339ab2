//! GGUF files, as they are downloaded: transformers under their original names, text encoders under
//! llama.cpp's with their tokenizer, whole checkpoints. They draw what safetensors files of the same
//! numbers draw.

use crate::common::*;
use crate::split::{Parts, original_flux2};
use candle_core::{DType, Device, Tensor};
use half::f16;
use sdgen::nn::weights::TensorSource;
use sdgen::weights::lora::Lora;
use sdgen::weights::{Checkpoint, Origin};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

type Tensors = HashMap<String, Tensor>;

/// The numbers of ggml's types.
const F32: u32 = 0;
const F16: u32 = 1;
const Q8_0: u32 = 8;
/// Numbers of a block of Q8_0.
const BLOCK: usize = 32;

/// A value of metadata, with the number of its type in front.
fn text(value: &str) -> Vec<u8> {
    [8_u32.to_le_bytes().to_vec(), string(value)].concat()
}

fn texts(values: &[String]) -> Vec<u8> {
    let mut bytes = [9_u32.to_le_bytes(), 8_u32.to_le_bytes()].concat();
    bytes.extend((values.len() as u64).to_le_bytes());
    bytes.extend(values.iter().flat_map(|value| string(value)));
    bytes
}

fn numbers(values: &[i32]) -> Vec<u8> {
    let mut bytes = [9_u32.to_le_bytes(), 5_u32.to_le_bytes()].concat();
    bytes.extend((values.len() as u64).to_le_bytes());
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

fn string(value: &str) -> Vec<u8> {
    let mut bytes = (value.len() as u64).to_le_bytes().to_vec();
    bytes.extend(value.as_bytes());
    bytes
}

/// A tensor in blocks, and the numbers that these hold.
fn in_blocks(tensor: &Tensor) -> (Vec<u8>, Tensor) {
    let (mut bytes, mut held) = (vec![], vec![]);
    for block in values(tensor).chunks(BLOCK) {
        let largest = block.iter().fold(0f32, |most, x| most.max(x.abs()));
        let scale = f16::from_f32(largest / 127.0);
        bytes.extend(scale.to_le_bytes());
        for x in block {
            let code = (x / scale.to_f32().max(1e-9)).round() as i8;
            bytes.push(code as u8);
            held.push(scale.to_f32() * f32::from(code));
        }
    }
    (
        bytes,
        Tensor::from_vec(held, tensor.shape(), tensor.device()).unwrap(),
    )
}

/// Writes a file, its matrices of this type where their rows are made of whole blocks, and returns
/// the numbers that it holds.
fn write(tensors: &Tensors, metadata: &[(&str, Vec<u8>)], kind: u32, to: &Path) -> Tensors {
    let sorted: BTreeMap<&String, &Tensor> = tensors.iter().collect();
    let (mut infos, mut data, mut held) = (vec![], vec![], Tensors::new());
    for (name, tensor) in sorted {
        let tensor = tensor.to_dtype(DType::F32).unwrap();
        let fits = tensor.rank() > 1 && tensor.dims().last().unwrap().is_multiple_of(BLOCK);
        let kind = if tensor.rank() < 2 || kind == Q8_0 && !fits {
            F32
        } else {
            kind
        };
        let (bytes, tensor): (Vec<u8>, Tensor) = match kind {
            Q8_0 => in_blocks(&tensor),
            F16 => {
                let halves = tensor.to_dtype(DType::F16).unwrap();
                let flat = halves.flatten_all().unwrap().to_vec1::<f16>().unwrap();
                (flat.iter().flat_map(|x| x.to_le_bytes()).collect(), halves)
            }
            _ => (
                values(&tensor)
                    .iter()
                    .flat_map(|x| x.to_le_bytes())
                    .collect(),
                tensor,
            ),
        };
        infos.extend(string(name));
        infos.extend((tensor.rank() as u32).to_le_bytes());
        for size in tensor.dims().iter().rev() {
            infos.extend((*size as u64).to_le_bytes());
        }
        infos.extend(kind.to_le_bytes());
        infos.extend((data.len() as u64).to_le_bytes());
        data.extend(bytes);
        data.resize(data.len().next_multiple_of(32), 0);
        held.insert(name.clone(), tensor);
    }
    let mut file = [b"GGUF".to_vec(), 3_u32.to_le_bytes().to_vec()].concat();
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        file.extend(string(key));
        file.extend(value);
    }
    file.extend(infos);
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(data);
    std::fs::write(to, file).unwrap();
    held
}

/// A text encoder under llama.cpp's names.
fn llama(encoder: &Tensors) -> Tensors {
    let renamed = |key: &String| {
        let key = key.strip_prefix("model.").unwrap_or(key);
        [
            ("embed_tokens", "token_embd"),
            ("layers.", "blk."),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ]
        .iter()
        .fold(key.to_string(), |key, (theirs, ours)| {
            key.replace(theirs, ours)
        })
    };
    let others = |key: &&String| !matches!(key.as_str(), "model.norm.weight" | "norm.weight");
    let keys = encoder.keys().filter(others);
    keys.map(|key| (renamed(key), encoder[key].clone()))
        .collect()
}

/// The metadata of a tokenizer.json.
fn tokenizer(json: &Value) -> Vec<(&'static str, Vec<u8>)> {
    let vocabulary = json["model"]["vocab"].as_object().unwrap();
    let mut tokens: BTreeMap<u64, (String, i32)> = vocabulary
        .iter()
        .map(|(token, id)| (id.as_u64().unwrap(), (token.clone(), 1)))
        .collect();
    for added in json["added_tokens"].as_array().unwrap() {
        let kind = if added["special"] == true { 3 } else { 4 };
        let token = added["content"].as_str().unwrap().to_string();
        tokens.insert(added["id"].as_u64().unwrap(), (token, kind));
    }
    let merge = |pair: &Value| {
        let sides = [&pair[0], &pair[1]].map(|side| side.as_str().unwrap());
        sides.join(" ")
    };
    let merges = json["model"]["merges"].as_array().unwrap();
    let merges: Vec<String> = merges.iter().map(merge).collect();
    let (tokens, kinds): (Vec<String>, Vec<i32>) = tokens.into_values().unzip();
    vec![
        ("general.architecture", text("qwen3")),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("qwen2")),
        ("tokenizer.ggml.tokens", texts(&tokens)),
        ("tokenizer.ggml.token_type", numbers(&kinds)),
        ("tokenizer.ggml.merges", texts(&merges)),
    ]
}

#[test]
fn transformers_and_text_encoders_draw_what_safetensors_of_the_same_numbers_draw() {
    let parts = Parts::new();
    parts.write_others();
    let original = original_flux2(&parts.transformer);
    let said = [("general.architecture", text("flux"))];
    let vae = ["--vae", "vaes/flux2_ae.safetensors"];
    let qwen = json(&fixture("klein/tokenizer/tokenizer.json"));
    std::fs::create_dir(parts.path("alone")).unwrap();
    for kind in [F32, F16, Q8_0] {
        let held = write(&original, &said, kind, &parts.path("klein-x.gguf"));
        parts.write("same/klein-x.safetensors", &held);
        let encoder = "alone/qwen3-x.gguf";
        let held = write(
            &llama(&parts.encoder),
            &tokenizer(&qwen),
            kind,
            &parts.path(encoder),
        );
        let names: Tensors = parts
            .encoder
            .keys()
            .filter_map(|key| {
                let one = Tensors::from([(key.clone(), parts.encoder[key].clone())]);
                let name = llama(&one).into_keys().next()?;
                Some((key.clone(), held[&name].clone()))
            })
            .collect();
        parts.write("clips/qwen.safetensors", &names);
        let plain = [
            "-m",
            "same/klein-x.safetensors",
            "--text-encoder",
            "clips/qwen.safetensors",
        ];
        let expected = parts.picture(&[&plain[..], &vae].concat());
        let own = ["-m", "klein-x.gguf", "--text-encoder", encoder];
        assert!(
            parts.picture(&[&own[..], &vae].concat()) == expected,
            "{kind}"
        );
    }
    // a folder as ComfyUI has it
    for (from, to) in [
        ("klein-x.gguf", "comfy/unet/klein-x.gguf"),
        ("alone/qwen3-x.gguf", "comfy/clip/qwen3-x.gguf"),
        (
            "vaes/flux2_ae.safetensors",
            "comfy/vae/flux2_ae.safetensors",
        ),
    ] {
        std::fs::create_dir_all(parts.path(to).parent().unwrap()).unwrap();
        std::fs::copy(parts.path(from), parts.path(to)).unwrap();
    }
    let own = ["-m", "klein-x.gguf", "--text-encoder", "alone/qwen3-x.gguf"];
    let expected = parts.picture(&[&own[..], &vae].concat());
    assert!(parts.picture(&["-m", "comfy"]) == expected);
    let inspect = |name: &str| stdout(&succeed(sdgen(parts.dir.path()).args(["inspect", name])));
    let text = inspect("klein-x.gguf");
    assert!(
        text.contains("transformer of FLUX.2 klein") && text.contains("q8_0"),
        "{text}"
    );
    let text = inspect("alone/qwen3-x.gguf");
    assert!(
        text.contains("text encoder") && !text.contains("tokenizer.json"),
        "{text}"
    );
}

#[test]
fn whole_checkpoints_and_damaged_files() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain.safetensors");
    let folder = dir.path().join("sd1");
    with_full_vocabulary("sd1", &folder);
    single_file("single_sd1.json", &folder, &plain);
    let tensors = load(&plain);
    write(&tensors, &[], F32, &dir.path().join("model.gguf"));
    let draw = |model: &str| {
        let mut command = quick(dir.path(), Path::new(model));
        command.args(["a frog", "-s", "3", "--force", "-o", "x.png"]);
        command
    };
    let picture = |model: &str| {
        succeed(&mut draw(model));
        pixels(&dir.path().join("x.png"))
    };
    assert_eq!(picture("model.gguf"), picture("plain.safetensors"));
    let whole = std::fs::read(dir.path().join("model.gguf")).unwrap();
    for (bytes, says) in [
        (
            &whole[..whole.len() / 2],
            ["not a whole GGUF file", "cut short"],
        ),
        (
            &whole[..20],
            ["not a whole GGUF file", "fetch the file again"],
        ),
        (
            &[&b"GGUF\x01\0\0\0"[..], &whole[8..]].concat(),
            ["version 1", "hint: "],
        ),
    ] {
        std::fs::write(dir.path().join("model.gguf"), bytes).unwrap();
        fail(&mut draw("model.gguf"), 3, &says);
    }
}

#[test]
fn matrices_stay_in_blocks_in_memory_unless_a_lora_changes_them() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain.safetensors");
    let folder = dir.path().join("sd1");
    with_full_vocabulary("sd1", &folder);
    single_file("single_sd1.json", &folder, &plain);
    let q8 = dir.path().join("q8.gguf");
    let held = write(&load(&plain), &[], Q8_0, &q8);
    save(&held, &dir.path().join("same.safetensors"));
    let lora = fixture("lora/kohya.safetensors");
    let open = |loras: &[f64]| {
        let mut checkpoint = Checkpoint::open(Origin::Path(&q8)).unwrap();
        let loras = loras.iter().map(|strength| Lora::open(&lora, *strength));
        checkpoint.use_loras(loras, true).unwrap();
        checkpoint
    };
    let (without, with) = (open(&[]), open(&[0.7]));
    let (mut kept, mut changed) = (0, 0);
    for (name, shape) in without.shapes("unet") {
        let full = format!("unet.{name}");
        let of_blocks = |checkpoint: &Checkpoint| match shape {
            [rows, columns] => checkpoint.blocks(&full, [*rows, *columns]).unwrap(),
            _ => None,
        };
        let Some(matrix) = of_blocks(&without) else {
            assert!(
                shape.len() != 2 || !shape[1].is_multiple_of(BLOCK),
                "{name}"
            );
            continue;
        };
        let mut numbers = vec![0f32; shape[0] * shape[1]];
        for (row, numbers) in numbers.chunks_exact_mut(shape[1]).enumerate() {
            matrix.write(row, 0, numbers);
        }
        let read = without.weights("unet", &Device::Cpu, DType::F32);
        assert_eq!(numbers, values(&read.get(name, shape).unwrap()), "{name}");
        kept += 1;
        changed += usize::from(of_blocks(&with).is_none());
    }
    assert!(
        kept > 10 && changed > 0 && kept > changed,
        "{kept} {changed}"
    );
    // 34 bytes of 32 numbers
    let bytes = [&without, &with].map(|it| it.stored_bytes("unet"));
    assert!(bytes[0] < bytes[1], "{bytes:?}");
    for more in [vec![], vec!["--lora", lora.to_str().unwrap()]] {
        let [got, expected] = ["q8.gguf", "same.safetensors"].map(|model| {
            let mut command = quick(dir.path(), Path::new(model));
            command.args(["a frog", "-s", "3", "--force", "-o", "x.png"]);
            succeed(command.args(&more));
            pixels(&dir.path().join("x.png"))
        });
        assert_same_levels("q8_0", &got, &expected);
    }
}

#[test]
fn t5_under_the_names_of_llama_cpp_reads_what_it_reads_under_its_own() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&fixture("flux"), &dir.path().join("flux"));
    let encoder = load(&fixture("flux/text_encoder_2/model.safetensors"));
    std::fs::create_dir(dir.path().join("t5")).unwrap();
    let tokenizer = fixture("flux/tokenizer_2/tokenizer.json");
    std::fs::copy(tokenizer, dir.path().join("t5/tokenizer.json")).unwrap();
    // other numbers than those of the folder
    let halved = |(key, tensor): (&String, &Tensor)| (key.clone(), (tensor * 0.5).unwrap());
    let encoder: Tensors = encoder.iter().map(halved).collect();
    save(&encoder, &dir.path().join("t5/plain.safetensors"));
    let renamed = |key: &String| {
        [
            ("encoder.block.", "enc.blk."),
            (
                "layer.0.SelfAttention.relative_attention_bias",
                "attn_rel_b",
            ),
            ("layer.0.SelfAttention.", "attn_"),
            ("layer.0.layer_norm", "attn_norm"),
            ("layer.1.DenseReluDense.wi_0", "ffn_gate"),
            ("layer.1.DenseReluDense.wi_1", "ffn_up"),
            ("layer.1.DenseReluDense.wo", "ffn_down"),
            ("layer.1.layer_norm", "ffn_norm"),
            ("shared", "token_embd"),
            ("encoder.final_layer_norm", "enc.output_norm"),
        ]
        .iter()
        .fold(key.clone(), |key, (ours, theirs)| key.replace(ours, theirs))
    };
    let theirs: Tensors = encoder
        .iter()
        .map(|(key, x)| (renamed(key), x.clone()))
        .collect();
    let said = [("general.architecture", text("t5encoder"))];
    write(&theirs, &said, F32, &dir.path().join("t5/theirs.gguf"));
    let picture = |args: &[&str]| {
        let mut command = sdgen(dir.path());
        command.args(["a frog", "-m", "flux", "-W", "64", "-H", "64", "-s", "7"]);
        command
            .args(["--steps", "1", "--force", "-o", "x.png"])
            .args(args);
        succeed(&mut command);
        pixels(&dir.path().join("x.png"))
    };
    let plain = picture(&["--text-encoder", "t5/plain.safetensors"]);
    assert_eq!(picture(&["--text-encoder", "t5/theirs.gguf"]), plain);
    assert_ne!(picture(&[]), plain);
}
