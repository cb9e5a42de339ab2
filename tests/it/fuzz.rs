//! Readers of what comes from outside, fed with broken input for as long as one likes: none may
//! panic, hang or take much memory. What these find becomes a test of its own.
//!
//! ```sh
//! SDGEN_FUZZ_SECONDS=600 cargo test --test it -- fuzz:: --ignored --nocapture
//! ```
//!
//! `SDGEN_FUZZ_SEED` chooses other inputs; a failure says the input, or the folder that has it.

use crate::common::*;
use sdgen::batch::dynamic_prompts::{Template, Wildcards};
use sdgen::text::prompt::{Prompts, Syntax, notes};
use sdgen::text::tags::take_tags;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// What one input may take, in a debug build beside other tests.
const LONGEST: Duration = Duration::from_secs(20);
/// The address space of a run, in KiB: the program's own, its threads' and 2 GB.
const ADDRESS_SPACE_KIB: u64 = 6_000_000;

fn number(name: &str, default: u64) -> u64 {
    let value = std::env::var(name).ok();
    value.map_or(default, |value| value.parse().unwrap())
}

/// Random numbers of one input.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        // SplitMix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as usize % n.max(1)
    }

    fn of<'a, T: ?Sized>(&mut self, all: &[&'a T]) -> &'a T {
        all[self.below(all.len())]
    }
}

/// Calls `one` with the random numbers of one input after another until the time is over.
fn each(name: &str, mut one: impl FnMut(&mut Rng)) {
    let seconds = number("SDGEN_FUZZ_SECONDS", 20);
    let seed = number("SDGEN_FUZZ_SEED", 1);
    let start = Instant::now();
    let mut inputs = 0;
    while start.elapsed().as_secs() < seconds {
        let begun = Instant::now();
        one(&mut Rng(seed.wrapping_mul(1 << 40).wrapping_add(inputs)));
        assert!(
            begun.elapsed() < LONGEST,
            "{name}: input {inputs} of seed {seed} took {:?}",
            begun.elapsed()
        );
        inputs += 1;
    }
    println!("{name}: {inputs} inputs");
}

/// Runs the program; what it says of the input is its own affair, as long as it says it.
fn survives(folder: &Path, args: &[&str]) {
    let mut command = Command::new("sh");
    let limit = format!("ulimit -v {ADDRESS_SPACE_KIB}; exec \"$0\" \"$@\"");
    let program = sdgen(folder).get_program().to_owned();
    command.args(["-c", &limit]).arg(program).args(args);
    let quiet = [
        ("HF_HUB_OFFLINE", "1"),
        ("RAYON_NUM_THREADS", "2"),
        ("RUST_BACKTRACE", "0"),
    ];
    command.current_dir(folder).envs(quiet);
    command
        .env("XDG_CONFIG_HOME", folder)
        .env_remove("SDGEN_MODEL");
    let output = command.output().unwrap();
    let said = stderr(&output);
    let is_fine = output.status.signal().is_none()
        && output.status.code().is_some_and(|code| code <= 6)
        && !said.contains("panicked");
    if !is_fine {
        let kept = std::env::temp_dir().join("sdgen-fuzz");
        let _ = fs::remove_dir_all(&kept);
        copy_folder(folder, &kept);
        panic!(
            "{:?} of {args:?}, kept in {}:\n{said}",
            output.status,
            kept.display()
        );
    }
}

const NUMBERS: [&str; 14] = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "65536",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "1e308",
    "0.5",
    "-0.0",
    "1e-320",
];

fn random_value(rng: &mut Rng, depth: usize) -> Value {
    match rng.below(if depth < 3 { 9 } else { 6 }) {
        0 => Value::Null,
        1 => json!(rng.below(2) == 0),
        2 | 3 => serde_json::from_str(rng.of(&NUMBERS)).unwrap(),
        4 => json!(rng.of(&[
            "",
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "v_prediction",
            "F16",
            "é"
        ])),
        5 => json!("x".repeat(rng.below(300))),
        6 => json!([]),
        7 => (0..rng.below(6))
            .map(|_| random_value(rng, depth + 1))
            .collect(),
        _ => json!({ "a": random_value(rng, depth + 1) }),
    }
}

/// Changes some values of a tree, or removes or repeats them.
fn mutate(value: &mut Value, rng: &mut Rng, odds: usize) {
    if rng.below(odds) == 0 {
        *value = random_value(rng, 0);
        return;
    }
    match value {
        Value::Object(map) => {
            if rng.below(odds) == 0
                && let Some(key) = map.keys().nth(rng.below(map.len())).cloned()
            {
                map.remove(&key);
            }
            map.values_mut().for_each(|value| mutate(value, rng, odds));
        }
        Value::Array(all) => {
            if rng.below(odds) == 0 {
                match rng.below(3) {
                    0 => all.truncate(rng.below(all.len())),
                    1 => all.extend(all.first().cloned()),
                    _ => all.reverse(),
                }
            }
            all.iter_mut().for_each(|value| mutate(value, rng, odds));
        }
        _ => {}
    }
}

/// A text of pieces, with a stretch of it repeated now and then.
fn text(pieces: &[&str], rng: &mut Rng) -> String {
    let mut text = String::new();
    for _ in 0..rng.below(24) {
        text += rng.of(pieces);
    }
    if rng.below(8) == 0 {
        let times = 1 << rng.below(12);
        text = text.repeat(times).chars().take(60_000).collect();
    }
    text
}

const OF_PROMPTS: [&str; 38] = [
    "(",
    ")",
    "[",
    "]",
    ":",
    "|",
    "\\",
    "a",
    "cat ",
    "dog",
    " AND ",
    "BREAK",
    "0.5",
    "3",
    ":1.5)",
    "1e9",
    "<lora:x:1>",
    "<",
    ">",
    "<x:y",
    "#",
    "\n",
    "\t",
    "\0",
    "é",
    "\u{1f600}",
    "\u{301}",
    "[a:b:0.5]",
    "[a|b]",
    "(x:1.2)",
    "(x:-1)",
    ",",
    ", ",
    ".",
    "-",
    "+",
    "<|endoftext|>",
    "!!!",
];
const OF_TEMPLATES: [&str; 33] = [
    "{",
    "}",
    "{",
    "}",
    "|",
    "|",
    "$$",
    "2$$",
    "1-3$$",
    "-2$$",
    "3-$$",
    "0$$",
    "::",
    "2::",
    "0.5::",
    "0::",
    "__",
    "__a__",
    "__b/c__",
    "__@a__",
    "~",
    "@",
    "!",
    "\\",
    "#",
    "\n",
    " ",
    "${x=1}",
    "%{",
    "a",
    "é",
    "\u{1f600}",
    " and $$",
];

#[test]
#[ignore = "takes as long as SDGEN_FUZZ_SECONDS says"]
fn prompts() {
    each("prompts", |rng| {
        let prompt = text(&OF_PROMPTS, rng);
        let calls = 1 + rng.below(1000);
        let tried = catch_unwind(AssertUnwindSafe(|| {
            let text = prompt.as_str().into();
            let _ = Prompts::parse(&text, &"".into(), None, Syntax::A1111, calls.into());
            notes(&prompt, rng.below(2) == 0);
            let _ = take_tags(&prompt);
        }));
        assert!(tried.is_ok(), "{prompt:?} in {calls} calls");
    });
}

#[test]
#[ignore = "takes as long as SDGEN_FUZZ_SECONDS says"]
fn templates() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("b")).unwrap();
    fs::write(dir.path().join("a.txt"), "x\n{y|__b/c__}\n").unwrap();
    fs::write(dir.path().join("b/c.txt"), "{2$$z|w|v}\n# no\n5::u\n").unwrap();
    let mut wildcards = Wildcards::new(dir.path());
    each("templates", |rng| {
        let template = text(&OF_TEMPLATES, rng);
        let tried = catch_unwind(AssertUnwindSafe(|| {
            if let Ok(read) = Template::parse(&template, &mut wildcards) {
                read.draw(rng.below(1 << 40) as u64);
                if read.count() <= 20_000 {
                    assert!(read.all().len() as u64 <= read.count());
                }
            }
        }));
        assert!(tried.is_ok(), "{template:?}");
    });
}

#[test]
#[ignore = "takes as long as SDGEN_FUZZ_SECONDS says"]
fn lists() {
    let dir = tempfile::tempdir().unwrap();
    let keys = [
        "prompt", "seed", "negative", "width", "steps", "sampler", "schedule", "output",
        "guidance", "count", "to", "frames", "strength", "image", "lora", "crop", "eta", "x",
    ];
    each("lists", |rng| {
        let mut list = Vec::new();
        for _ in 0..rng.below(6) {
            let mut line = serde_json::Map::new();
            line.insert("prompt".into(), json!(text(&OF_PROMPTS, rng)));
            for _ in 0..rng.below(5) {
                line.insert(rng.of(&keys).into(), random_value(rng, 1));
            }
            let mut line = Value::Object(line).to_string().into_bytes();
            if rng.below(4) == 0 && !line.is_empty() {
                let at = rng.below(line.len());
                line[at] = rng.below(256) as u8;
            }
            list.extend(line);
            list.push(b'\n');
        }
        let name = rng.of(&["list.jsonl", "list.txt", "list"]);
        fs::write(dir.path().join(name), list).unwrap();
        let dynamic = rng.of(&["--dynamic=all", "--dynamic", "-q"]);
        survives(
            dir.path(),
            &[
                "--from",
                name,
                "--dry-run",
                "-s",
                "1",
                dynamic,
                "-o",
                "out/",
            ],
        );
        fs::remove_file(dir.path().join(name)).unwrap();
    });
}

/// Writes a safetensors file of this header and so many bytes.
fn write_file(path: &Path, header: &[u8], length: u64, data: u64) {
    let mut file = length.to_le_bytes().to_vec();
    file.extend(header);
    let end = file.len() as u64 + data;
    fs::write(path, file).unwrap();
    fs::File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(end)
        .unwrap();
}

/// A header with shapes from a fixture, some of them.
fn real_header(rng: &mut Rng) -> (serde_json::Map<String, Value>, u64) {
    let name = rng.of(&["real_sd1.json", "real_sd2.json", "real_sdxl.json"]);
    let shapes = json_of(name);
    let skip = rng.below(shapes.len());
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (key, shape) in shapes.iter().skip(skip / 4).take(1 + rng.below(1200)) {
        let sizes = shape
            .as_array()
            .unwrap()
            .iter()
            .map(|size| size.as_u64().unwrap());
        let bytes = 2 * sizes.product::<u64>();
        let entry = json!({ "dtype": "F16", "shape": shape, "data_offsets": [end, end + bytes] });
        header.insert(key.clone(), entry);
        end += bytes;
    }
    (header, end)
}

fn json_of(name: &str) -> serde_json::Map<String, Value> {
    json(&fixture(name)).as_object().unwrap().clone()
}

/// What the program says of a file as each thing that it may be.
fn try_as_everything(folder: &Path, file: &str, rng: &mut Rng) {
    match rng.below(5) {
        0 => survives(folder, &["inspect", file, "--json"]),
        1 => survives(folder, &["x", "-s", "1", "--dry-run", "-m", file]),
        2 => survives(folder, &["x", "-s", "1", "--dry-run", "--lora", file]),
        3 => survives(folder, &["x", "-s", "1", "--dry-run", "--vae", file]),
        _ => survives(folder, &["x", "-s", "1", "--dry-run", "--embedding", file]),
    }
}

#[test]
#[ignore = "takes as long as SDGEN_FUZZ_SECONDS says"]
fn headers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    each("headers", |rng| {
        let (header, mut end) = real_header(rng);
        let mut header = Value::Object(header);
        mutate(&mut header, rng, 400);
        let mut bytes = header.to_string().into_bytes();
        for _ in 0..rng.below(3) * rng.below(3) {
            let at = rng.below(bytes.len());
            bytes[at] = rng.below(256) as u8;
        }
        let mut length = bytes.len() as u64;
        match rng.below(8) {
            0 => length = rng.of(&NUMBERS).parse().unwrap_or(u64::MAX),
            1 => end = end.saturating_sub(rng.below(1 << 20) as u64),
            2 => bytes.truncate(rng.below(bytes.len())),
            _ => {}
        }
        write_file(&path, &bytes, length, end);
        try_as_everything(dir.path(), "x.safetensors", rng);
    });
}

#[test]
#[ignore = "takes as long as SDGEN_FUZZ_SECONDS says"]
fn tensor_names() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let words = [
        "model",
        "diffusion_model",
        "unet",
        "lora_unet_",
        "lora_te",
        "text_encoder",
        "text_model",
        "encoder",
        "layers",
        "input_blocks",
        "down_blocks",
        "mid_block",
        "attentions",
        "0",
        "1",
        "4294967295",
        "18446744073709551616",
        "-1",
        "to_q",
        "weight",
        "bias",
        "alpha",
        "lora_down",
        "lora_A",
        "hada_w1_a",
        "lokr_w1",
        "emb_params",
        "string_to_param",
        "*",
        "",
        "é",
        "first_stage_model",
        "conv_in",
        "transformer_blocks",
        "cond_stage_model",
        "dora_scale",
    ];
    each("names", |rng| {
        let (mut header, mut end) = (serde_json::Map::new(), 0u64);
        if rng.below(2) == 0 {
            (header, end) = real_header(rng);
        }
        for _ in 0..rng.below(40) {
            let joint = rng.of(&[".", "_", ".", "."]);
            let count = 1 + rng.below(7);
            let parts: Vec<&str> = (0..count).map(|_| rng.of(&words)).collect();
            let shape: Vec<usize> = (0..rng.below(5)).map(|_| rng.below(9)).collect();
            let bytes = 4 * shape.iter().product::<usize>() as u64;
            let entry =
                json!({ "dtype": "F32", "shape": shape, "data_offsets": [end, end + bytes] });
            if header.insert(parts.join(joint), entry).is_none() {
                end += bytes;
            }
        }
        let bytes = Value::Object(header).to_string().into_bytes();
        write_file(&path, &bytes, bytes.len() as u64, end);
        try_as_everything(dir.path(), "x.safetensors", rng);
    });
}

#[test]
#[ignore = "takes as long as SDGEN_FUZZ_SECONDS says"]
fn configs() {
    let models = ["sd1", "sd2", "sdxl", "odd"];
    each("configs", |rng| {
        let dir = tempfile::tempdir().unwrap();
        let model = fixture(rng.of(&models));
        for part in fs::read_dir(&model).unwrap() {
            let part = part.unwrap().path();
            if !part.is_dir() {
                continue;
            }
            let to = dir.path().join("m").join(part.file_name().unwrap());
            fs::create_dir_all(&to).unwrap();
            for file in fs::read_dir(&part).unwrap() {
                let file = file.unwrap().path();
                let to = to.join(file.file_name().unwrap());
                let is_config = file.file_name().is_some_and(|name| {
                    name.to_str()
                        .is_some_and(|name| name.ends_with("config.json"))
                });
                if !is_config {
                    symlink(&file, &to).unwrap();
                    continue;
                }
                let mut config = json(&file);
                mutate(&mut config, rng, 25);
                fs::write(&to, config.to_string()).unwrap();
            }
        }
        let index = json(&model.join("model_index.json"));
        fs::write(dir.path().join("m/model_index.json"), index.to_string()).unwrap();
        let size = [
            "-W", "16", "-H", "16", "--steps", "1", "-s", "1", "-m", "m", "-o", "x.png",
        ];
        let sampler = rng.of(&["euler", "ddim", "pndm", "dpmpp-2m"]);
        let mut args = vec!["a cat"];
        args.extend(size);
        match rng.below(4) {
            0 => survives(dir.path(), &args),
            1 => {
                args.extend(["--sampler", sampler, "--dry-run"]);
                survives(dir.path(), &args);
            }
            2 => survives(dir.path(), &["inspect", "m"]),
            _ => {
                args.extend(["--sampler", sampler]);
                survives(dir.path(), &args);
            }
        }
    });
}
