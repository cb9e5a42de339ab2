//! What several test files share: running the program, and building checkpoints in a temporary
//! folder.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use candle_core::{DType, Device, Tensor};
use sdgen::sampling::{Sampler, Schedule, SchedulerConfig};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// This project, wherever it is now: a test may run on another machine than it was built on.
pub fn project() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

pub fn fixture(name: &str) -> PathBuf {
    project().join("tests/fixtures").join(name)
}

/// The program, in a folder of its own, with no settings of the machine's owner and no network.
pub fn sdgen(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sdgen"));
    for name in [
        "SDGEN_MODEL",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_TOKEN",
        "HF_ENDPOINT",
    ] {
        command.env_remove(name);
    }
    command
        .env("HF_HUB_OFFLINE", "1")
        // where the file of the user's defaults is looked for
        .env("XDG_CONFIG_HOME", folder)
        .current_dir(folder)
        .stdin(std::process::Stdio::null());
    command
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The sampler and schedule of a run in the goldens, whose scheduler is read as a checkpoint's is.
/// `None` for a run with the checkpoint's own.
pub fn sampler_of(run: &Value) -> Option<(Sampler, Option<Schedule>)> {
    let mut config = run["scheduler_kwargs"].clone();
    config["_class_name"] = run["scheduler"].as_str()?.into();
    let sampler = SchedulerConfig::from_json(&config)
        .unwrap()
        .sampler()
        .unwrap();
    let is_karras = config["use_karras_sigmas"] == true;
    Some((sampler, is_karras.then_some(Schedule::Karras)))
}

/// The same as options.
pub fn sampler_options(run: &Value) -> Vec<String> {
    let Some((sampler, schedule)) = sampler_of(run) else {
        return vec![];
    };
    let mut options = vec![format!("--sampler={sampler}")];
    options.extend(schedule.map(|schedule| format!("--schedule={schedule}")));
    options
}

/// A quick picture with one of the tiny checkpoints; what is not given comes from the arguments
/// that follow.
pub fn quick(folder: &Path, model: &Path) -> Command {
    let mut command = sdgen(folder);
    command
        .args(["--steps", "2", "-W", "16", "-H", "16", "-m"])
        .arg(model);
    command
}

/// The same with the fixture that most tests use.
pub fn tiny(folder: &Path) -> Command {
    quick(folder, &fixture("sd1"))
}

/// Has the kernel refuse system calls of the program, as file systems and limits do that not every
/// machine has: `errno` is what each call fails with (seccomp's filters, Linux 3.5).
#[cfg(target_os = "linux")]
pub fn refuse_calls(command: &mut Command, calls: &'static [libc::c_long], errno: i32) {
    use std::os::unix::process::CommandExt;
    let op = |code: u32, jump_false: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: jump_false,
        k,
    };
    // the number of the call is at the start of what the filter sees
    let mut filter = vec![op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
    let refuse = libc::SECCOMP_RET_ERRNO | errno as u32;
    for call in calls {
        filter.push(op(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            1,
            *call as u32,
        ));
        filter.push(op(libc::BPF_RET | libc::BPF_K, 0, refuse));
    }
    filter.push(op(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW));
    let install = move || {
        let program = libc::sock_fprog {
            len: filter.len() as u16,
            filter: filter.as_mut_ptr(),
        };
        // SAFETY: the filter lives until both calls are done
        let failed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) != 0
        };
        if failed {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: between fork and exec there are two system calls and no allocation
    unsafe { command.pre_exec(install) };
}

/// Runs a command in a shell, after `before`, such as a limit.
#[cfg(unix)]
pub fn after(before: &str, command: &Command) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("{before} && exec \"$@\""), "sh"]);
    shell.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell.current_dir(command.get_current_dir().unwrap());
    shell.stdin(std::process::Stdio::null());
    shell
}

/// Runs and expects exit code 0.
pub fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{:?}: {}",
        output.status,
        stderr(&output)
    );
    output
}

/// Runs and expects this exit code, an error that holds every text, nothing on stdout, and no
/// panic.
pub fn fail(command: &mut Command, code: i32, texts: &[&str]) -> String {
    let output = command.output().unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.starts_with("error: "), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    assert!(output.stdout.is_empty(), "an error belongs on stderr alone");
    for text in texts {
        assert!(said.contains(text), "`{text}` is missing in: {said}");
    }
    said
}

pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &to.join(entry.file_name()));
        } else if !entry.file_name().to_string_lossy().starts_with("goldens") {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// A copy of a fixture; where it holds only what it does not share with another, with what they
/// share.
pub fn with_base(name: &str, to: &Path) {
    if !fixture(name).join("model_index.json").exists() {
        copy_folder(&fixture(goldens(name)["base"].as_str().unwrap()), to);
    }
    copy_folder(&fixture(name), to);
}

/// What diffusers was asked for the goldens of a fixture. Python writes an infinite number as
/// `-Infinity`, which is not JSON: null stands for it.
pub fn goldens(name: &str) -> Value {
    let text = std::fs::read_to_string(fixture(name).join("goldens.json")).unwrap();
    serde_json::from_str(&text.replace("-Infinity", "null")).unwrap()
}

pub fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

pub fn edit_json(path: &Path, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let mut value = json(path);
    edit(value.as_object_mut().unwrap());
    std::fs::write(path, value.to_string()).unwrap();
}

pub fn load(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

pub fn save(tensors: &HashMap<String, Tensor>, path: &Path) {
    candle_core::safetensors::save(tensors, path).unwrap();
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest absolute value.
pub fn largest(tensor: &Tensor) -> f32 {
    values(tensor).into_iter().map(f32::abs).fold(0.0, f32::max)
}

/// The largest difference, relative to the largest expected value.
pub fn difference(got: &Tensor, expected: &Tensor) -> f32 {
    largest(&(got - expected).unwrap()) / largest(expected).max(1e-6)
}

/// The levels of a picture in a file, [h, w, 3].
pub fn pixels(path: &Path) -> Vec<u8> {
    image::open(path).unwrap().to_rgb8().into_raw()
}

/// The levels of golden pictures.
pub fn levels(golden: &Tensor) -> Vec<u8> {
    golden.flatten_all().unwrap().to_vec1().unwrap()
}

/// By how many levels two pictures differ at most.
pub fn worst_level(a: &[u8], b: &[u8]) -> u8 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

/// Levels that rounding cannot explain: twenty times what it may move.
pub const VISIBLE: u8 = 20;

/// Asserts that a picture is the golden one, but for rounding. f32 sums in another order move a
/// value that lies next to the middle between two levels to the other one. Of values that are off
/// by 1/20 of a level on average, 2e-4 of the range, as many move; measured are up to 2 in 100.
pub fn assert_same_levels(name: &str, got: &[u8], golden: &[u8]) {
    let worst = worst_level(got, golden);
    let moved = got.iter().zip(golden).filter(|(a, b)| a != b).count();
    assert!(
        worst <= 1 && moved * 20 < got.len(),
        "{name} differs by up to {worst} levels, in {moved} of {} values",
        got.len()
    );
}

/// A copy of a fixture whose vocabulary is CLIP's whole one, as single files assume: its embedding
/// rows are repeated.
pub fn with_full_vocabulary(name: &str, to: &Path) {
    copy_folder(&fixture(name), to);
    let merges = std::fs::read_to_string(project().join("assets/clip/merges.txt")).unwrap();
    for part in sdgen::weights::ENCODERS
        .into_iter()
        .filter(|part| to.join(part).is_dir())
    {
        let weights = to.join(part).join("model.safetensors");
        let mut text = load(&weights);
        let key = text
            .keys()
            .find(|k| k.ends_with("token_embedding.weight"))
            .unwrap()
            .clone();
        let small = text[&key].clone();
        let rows: Vec<u32> = (0..49408u32)
            .map(|i| i % small.dim(0).unwrap() as u32)
            .collect();
        text.insert(
            key,
            small
                .index_select(&Tensor::new(rows, &Device::Cpu).unwrap(), 0)
                .unwrap(),
        );
        save(&text, &weights);
        edit_json(&to.join(part).join("config.json"), |c| {
            c.insert("vocab_size".into(), 49408.into());
            if c["eos_token_id"] != 2 {
                c.insert("eos_token_id".into(), 49407.into());
            }
        });
        let tokenizer = to.join(part.replace("text_encoder", "tokenizer"));
        std::fs::write(tokenizer.join("vocab.json"), vocabulary(&merges)).unwrap();
        std::fs::write(tokenizer.join("merges.txt"), &merges).unwrap();
    }
}

fn vocabulary(merges: &str) -> String {
    let printable =
        |b: &u32| (33..=126).contains(b) || (161..=172).contains(b) || (174..=255).contains(b);
    let bytes: Vec<String> = (0..256)
        .filter(printable)
        .chain(256..324)
        .map(|c| char::from_u32(c).unwrap().to_string())
        .collect();
    let merged = merges
        .lines()
        .filter(|l| !l.starts_with("#version"))
        .map(|l| l.replace(' ', ""));
    let specials = ["<|startoftext|>".to_string(), "<|endoftext|>".to_string()];
    let all = bytes
        .iter()
        .cloned()
        .chain(bytes.iter().map(|b| format!("{b}</w>")))
        .chain(merged)
        .chain(specials);
    let map: serde_json::Map<String, Value> = all.enumerate().map(|(i, t)| (t, i.into())).collect();
    Value::Object(map).to_string()
}

/// Assembles the original single file of a folder by its recipe (`single_*.json`).
pub fn single_file(recipe: &str, folder: &Path, to: &Path) {
    assemble(&json(&fixture(recipe)), folder, to);
}

/// The same by any recipe.
pub fn assemble(recipe: &Value, folder: &Path, to: &Path) {
    let mut parts = HashMap::new();
    for part in sdgen::weights::PARTS
        .into_iter()
        .filter(|part| folder.join(part).is_dir())
    {
        let file = if part.starts_with("text_encoder") {
            "model"
        } else {
            "diffusion_pytorch_model"
        };
        for (key, tensor) in load(&folder.join(part).join(format!("{file}.safetensors"))) {
            parts.insert(format!("{part}.{key}"), tensor);
        }
    }
    let mut out = HashMap::new();
    for entry in recipe["entries"].as_array().unwrap() {
        let from: Vec<&Tensor> = entry["from"]
            .as_array()
            .unwrap()
            .iter()
            .map(|k| &parts[k.as_str().unwrap()])
            .collect();
        let tensor = match entry["op"].as_str().unwrap() {
            "same" => from[0].clone(),
            "conv1x1" => from[0].unsqueeze(2).unwrap().unsqueeze(3).unwrap(),
            "concat" => Tensor::cat(&from, 0).unwrap(),
            "transpose" => from[0].t().unwrap().contiguous().unwrap(),
            other => panic!("unknown op {other}"),
        };
        out.insert(entry["key"].as_str().unwrap().to_string(), tensor);
    }
    for entry in recipe["ignored"].as_array().unwrap() {
        let shape: Vec<usize> = entry["shape"]
            .as_array()
            .unwrap()
            .iter()
            .map(|d| d.as_u64().unwrap() as usize)
            .collect();
        out.insert(
            entry["key"].as_str().unwrap().to_string(),
            Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap(),
        );
    }
    save(&out, to);
}

/// A file with a real header and holes for data.
pub fn sparse(shapes: &Value, path: &Path) {
    let mut offset = 0;
    let mut header = serde_json::Map::new();
    for (key, shape) in shapes.as_object().unwrap() {
        let bytes = 2 * shape
            .as_array()
            .unwrap()
            .iter()
            .map(|d| d.as_u64().unwrap())
            .product::<u64>();
        header.insert(
            key.clone(),
            json!({ "dtype": "F16", "shape": shape, "data_offsets": [offset, offset + bytes] }),
        );
        offset += bytes;
    }
    let header = Value::Object(header).to_string();
    let mut start = (header.len() as u64).to_le_bytes().to_vec();
    start.extend(header.as_bytes());
    std::fs::write(path, &start).unwrap();
    std::fs::File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(start.len() as u64 + offset)
        .unwrap();
}

/// Numbers below what it is given, the same ones in every run (Marsaglia 2003, xorshift).
pub fn random_numbers() -> impl FnMut(usize) -> usize {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    move |n| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as usize % n
    }
}

/// Runs the named test again in a process of its own and returns true, or returns false in there.
/// For what the system counts for whole processes.
pub fn alone(test: &str) -> bool {
    const MARK: &str = "SDGEN_TEST_ALONE";
    if std::env::var_os(MARK).is_some() {
        return false;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command
        .args([test, "--exact", "--nocapture"])
        .env(MARK, "1")
        .output()
        .unwrap();
    let said = stdout(&output);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}{}",
        stderr(&output)
    );
    true
}
