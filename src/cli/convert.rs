//! `sdgen convert`: another layout or type of the same weights, with LoRAs, merges and a VAE made part
//! of them.

use crate::batch::output_path::{self, Overwrite, Unfinished};
use crate::cli::exit_code::{Code, Failure};
use crate::cli::progress::{Progress, ProgressMode};
use crate::cli::signals;
use crate::cli::stdout::say;
use crate::error::WrongArgument;
use crate::pipeline::model_spec::{LoraSpec, ModelSpec};
use crate::text::tokenizer::clip_files;
use crate::weights::Checkpoint;
use crate::weights::convert::{self, FileFormat, WeightType, WeightsToWrite};
use anyhow::{Context, Error, Result, anyhow, bail};
use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use serde_json::{Map, Value, json};
use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// What is converted, and into what.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Folder, .safetensors or .gguf file, hub id or short name
    model: OsString,
    /// A .safetensors file, a .gguf file, or a folder (diffusers' layout)
    out: PathBuf,
    /// Type of the weights: f32, f16, bf16, f8_e4m3; in .gguf files also q8_0, q6_k, q5_k, q4_k, q3_k,
    /// q2_k, q5_1, q5_0, q4_1, q4_0 [default: as they are; f16 for those in blocks]
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<WeightType>,
    /// The transformer, in a file of its own, in place of that of MODEL
    #[arg(long, value_name = "REF")]
    diffusion_model: Option<OsString>,
    /// Another VAE
    #[arg(long, value_name = "REF")]
    vae: Option<OsString>,
    /// Add a LoRA to the weights, with strength X [default: 1]; may be given again
    #[arg(long, value_name = "FILE[:X]")]
    #[arg(value_parser = OsStringValueParser::new().try_map(LoraSpec::parse))]
    lora: Vec<LoraSpec>,
    /// Add a share of another model's weights: (1 - X) of the model's own and X of its
    #[arg(long, value_name = "REF:X")]
    merge: Vec<OsString>,
    /// A third model: what is merged is X of what the other has more than it
    #[arg(long, value_name = "REF", requires = "merge")]
    minus: Option<OsString>,
    /// Overwrite what is there
    #[arg(long)]
    force: bool,
    /// Never touch the network
    #[arg(long)]
    offline: bool,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
    /// Say nothing but errors
    #[arg(short, long)]
    quiet: bool,
}

/// What is written.
enum Layout {
    File(FileFormat),
    Folder,
}

impl ConvertArgs {
    /// What is written, by the name of it.
    fn layout(&self) -> Result<Layout> {
        let end = self.out.extension().unwrap_or_default().to_string_lossy();
        Ok(match &*end.to_lowercase() {
            "safetensors" => Layout::File(FileFormat::Safetensors),
            "gguf" => Layout::File(FileFormat::Gguf),
            other @ ("ckpt" | "pt" | "pth" | "bin" | "sft" | "onnx") => bail!(
                "files that end in .{other} are not written\n\nhint: name a .safetensors file, a .gguf file or a folder"
            ),
            _ => Layout::Folder,
        })
    }

    fn open(&self) -> Result<Checkpoint> {
        let spec = ModelSpec {
            model: Some(self.model.clone()),
            diffusion_model: self.diffusion_model.clone(),
            vae: self.vae.clone(),
            merges: self.merge.clone(),
            minus: self.minus.clone(),
            offline: self.offline,
            ..ModelSpec::default()
        };
        let loras = self.lora.iter().map(LoraSpec::open);
        spec.open_with(loras, vec![], false, !self.quiet)
    }

    fn overwrite(&self) -> Overwrite {
        match self.force {
            true => Overwrite::All,
            false => Overwrite::Never,
        }
    }

    /// Errors if something is at the place of the result that may not be replaced.
    fn require_room(&self, layout: &Layout) -> Result<()> {
        let shown = self.out.display();
        if let Layout::File(_) = layout {
            output_path::check_writable(&[&self.out], false, self.overwrite())?;
            return Ok(());
        }
        if self.out.symlink_metadata().is_err() || is_empty(&self.out) {
            return Ok(());
        }
        if !self.force {
            bail!("`{shown}` exists already\n\nhint: `--force` replaces it, another name keeps it");
        }
        if !self.out.join("model_index.json").is_file() {
            bail!(
                "`{shown}` is no folder of a model, and is not replaced\n\nhint: name another folder"
            );
        }
        Ok(())
    }
}

fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// Converts a model and prints the path of the result, or its record.
pub fn run(args: &ConvertArgs) -> Result<(), Failure> {
    let progress = Arc::new(Progress::new(ProgressMode::Auto, args.quiet, false));
    let layout = args.layout().code(2)?;
    args.require_room(&layout).code(2)?;
    let start = Instant::now();
    progress.stage("reading the model");
    let checkpoint = args.open().code(3)?;
    signals::listen(&progress, "stopping; the same again stops at once")
        .context("cannot listen for signals")
        .code(1)?;
    let written = match layout {
        Layout::File(format) => single_file(args, &checkpoint, format, &progress),
        Layout::Folder => folder(args, &checkpoint, &progress),
    };
    progress.finish();
    let written = match written {
        Err(_) if signals::requested() => Err(Failure {
            code: signals::EXIT_CODE,
            error: anyhow!("interrupted: nothing is written"),
        }),
        written => written.code(1),
    }?;
    let mut line = match args.json {
        true => {
            let record = json!({
                "path": args.out.to_string_lossy(), "model": checkpoint.name,
                "tensors": written.tensors, "bytes": written.bytes, "types": written.types,
                "timings": { "converting_s": start.elapsed().as_secs_f64() },
            });
            record.to_string().into_bytes()
        }
        false => args.out.as_os_str().as_encoded_bytes().to_vec(),
    };
    line.push(b'\n');
    say(line).code(1)
}

/// What was written.
#[derive(Default)]
struct Written {
    tensors: usize,
    bytes: u64,
    types: Map<String, Value>,
}

impl Written {
    fn add(&mut self, file: &WeightsToWrite) {
        self.tensors += file.count();
        self.bytes += file.bytes();
        for (name, count) in file.types() {
            let before = self.types.get(&name).and_then(Value::as_u64).unwrap_or(0);
            let count = count.as_u64().unwrap_or(0);
            self.types.insert(name, json!(before + count));
        }
    }
}

fn single_file(
    args: &ConvertArgs,
    checkpoint: &Checkpoint,
    format: FileFormat,
    progress: &Progress,
) -> Result<Written> {
    let planned = WeightsToWrite::single_file(checkpoint, format, args.kind);
    let planned = planned.map_err(|error| wrong_argument(&error))?;
    let mut written = Written::default();
    written.add(&planned);
    progress.task("converting");
    save(&args.out, &planned, args.overwrite(), &mut |done| {
        progress.step(done, planned.count());
    })?;
    Ok(written)
}

/// Errors of a plan are about what was asked for.
fn wrong_argument(error: &Error) -> Error {
    let (cause, remedy) = crate::error::split(error);
    let hint = remedy.map(|remedy| format!("\n\nhint: {remedy}"));
    WrongArgument(format!("{cause}{}", hint.unwrap_or_default())).into()
}

fn folder(args: &ConvertArgs, checkpoint: &Checkpoint, progress: &Progress) -> Result<Written> {
    let small = convert::small_files(checkpoint, &clip_files);
    let small = small.map_err(|error| wrong_argument(&error))?;
    let components = convert::components(checkpoint)?;
    let planned = components
        .iter()
        .map(|component| WeightsToWrite::component(checkpoint, component, args.kind));
    let planned: Vec<WeightsToWrite> = planned
        .collect::<Result<_>>()
        .map_err(|error| wrong_argument(&error))?;
    let total = planned.iter().map(WeightsToWrite::count).sum();
    let out = &args.out;
    let made = output_path::temporary_folder(out).map_err(|error| not_written(out, &error))?;
    let mut written = Written::default();
    progress.task("converting");
    for (path, bytes) in small {
        let path = made.path().join(path);
        let folder = path.parent().unwrap_or(made.path());
        std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(&path, bytes))
            .map_err(|error| not_written(out, &error))?;
    }
    for (component, file) in components.iter().zip(&planned) {
        let stem = match component.starts_with("text_encoder") {
            true => "model",
            false => "diffusion_pytorch_model",
        };
        let path = made
            .path()
            .join(component)
            .join(format!("{stem}.safetensors"));
        let before = written.tensors;
        save(&path, file, Overwrite::Never, &mut |done| {
            progress.step(before + done, total);
        })?;
        written.add(file);
    }
    name_folder(made, out).map_err(|error| not_written(out, &error))?;
    Ok(written)
}

/// Gives a complete folder its name, in place of the one that is there.
fn name_folder(made: tempfile::TempDir, out: &Path) -> io::Result<()> {
    let _saving = output_path::hold_saves();
    if !out.exists() {
        return std::fs::rename(made.path(), out);
    }
    let old = output_path::temporary_folder(out)?;
    let kept = old.path().join("old");
    std::fs::rename(out, &kept)?;
    let named = std::fs::rename(made.path(), out);
    if named.is_err() {
        std::fs::rename(kept, out)?;
    }
    named
}

/// Writes a file of weights under its name when it is complete. Ctrl-C ends it between two tensors.
fn save(
    path: &Path,
    planned: &WeightsToWrite,
    overwrite: Overwrite,
    on_tensor: &mut dyn FnMut(usize),
) -> Result<()> {
    let failed = |error: io::Error| not_written(path, &error);
    let mut file = Unfinished::new(path, overwrite).map_err(failed)?;
    planned.write(
        &mut |bytes| file.write(bytes).map_err(failed),
        &mut |done| {
            on_tensor(done);
            match signals::requested() {
                true => bail!("interrupted"),
                false => Ok(()),
            }
        },
    )?;
    file.finish().map_err(failed)
}

/// The error where the result cannot be written.
fn not_written(path: &Path, error: &io::Error) -> Error {
    let shown = path.display();
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => anyhow!(
            "no space is left on the disk for `{shown}`\n\nhint: free some, or name a place on another disk"
        ),
        ErrorKind::AlreadyExists => anyhow!(
            "`{shown}` exists already\n\nhint: `--force` overwrites it, another name keeps it"
        ),
        ErrorKind::NotFound => {
            anyhow!("`{shown}` cannot be written: its folder is not there\n\nhint: make it first")
        }
        _ => anyhow!("cannot write `{shown}`: {error}"),
    }
}
