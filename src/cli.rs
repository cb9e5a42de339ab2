//! The command line: arguments as typed, and [`run`], which tells the whole story of a picture in one function.

use crate::bench::BenchArgs;
use crate::device::{Compute, DTypeChoice, DeviceChoice, limit_threads, require_memory};
use crate::family::SHORT_NAMES;
use crate::image::{Format, Metadata, Parameters, a1111_sampler, a1111_schedule, parameters};
use crate::output::{self, Destination, Naming};
use crate::pipeline::{self, Drawn, NotFinite};
use crate::progress::{Progress, ProgressMode};
use crate::request::{Job, Request, Seeds};
use crate::sampler::Sampler;
use crate::schedule::{Prediction, Schedule};
use crate::weights::hub::Hub;
use crate::weights::{Checkpoint, ModelError, Origin, nearest};
use anyhow::{Context, Error, Result, anyhow, bail};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use serde_json::{Value, json};
use std::ffi::{OsStr, OsString};
use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

const EXAMPLES: &str = "\
Examples:
  sdgen \"a frog in a top hat\"                       the embedded model: no download
  sdgen -m sd15 \"a castle at dusk\" --seed 7 -c 4    Stable Diffusion 1.5 from the hub, seeds 7 to 10
  sdgen -m model.safetensors \"a fox\" -o fox.jpg     any SD1.x/2.x checkpoint
  sdgen \"a cat\" -o - | display                      the picture's bytes on stdout
  sdgen \"a red fish\" --json | jq -r .path           one JSON object a picture";

/// Turns a sentence into a picture.
#[derive(Debug, Parser)]
#[command(name = "sdgen", version, about, after_help = EXAMPLES, args_conflicts_with_subcommands = true, args_override_self = true, disable_help_flag = true, max_term_width = 120)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    draw: DrawArgs,
    /// Print this help
    #[arg(short, long, global = true, action = clap::ArgAction::HelpShort, help_heading = "Machine")]
    help: Option<bool>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Tell what a checkpoint is, from its headers alone
    Inspect {
        /// Folder, .safetensors file, hub id or short name
        model: OsString,
        /// One JSON object on stdout
        #[arg(long)]
        json: bool,
        /// Never touch the network
        #[arg(long)]
        offline: bool,
    },
    /// Time the steps of this machine on real layer sizes, with random weights
    Bench(BenchArgs),
    /// Fetch a model from the hub into its cache
    Pull {
        /// Hub id (owner/name) or short name
        model: String,
    },
    /// Print a completion script for a shell
    Completions { shell: clap_complete::Shell },
}

/// What to draw, and how.
#[derive(Debug, Args)]
pub struct DrawArgs {
    /// What to draw; `-`, or nothing with a pipe on stdin: one prompt a line
    pub prompt: Option<String>,
    /// Folder, .safetensors file, hub id (owner/name) or short name (mini, sd15, sd21, turbo)
    #[arg(short, long, env = "SDGEN_MODEL", hide_env_values = true, value_name = "REF", help_heading = "Model")]
    pub model: Option<OsString>,
    /// What the network predicts, where the checkpoint does not say: epsilon or v
    #[arg(long, hide_possible_values = true, value_name = "TYPE", help_heading = "Model")]
    pub prediction: Option<PredictionChoice>,
    /// Never touch the network; also HF_HUB_OFFLINE=1
    #[arg(long, help_heading = "Model")]
    pub offline: bool,

    /// What to steer away from
    #[arg(short, long, alias = "negative-prompt", value_name = "TEXT", help_heading = "Picture")]
    pub negative: Option<String>,
    /// Width in pixels [default: the model's]
    #[arg(short = 'W', long, value_name = "PX", help_heading = "Picture")]
    pub width: Option<usize>,
    /// Height in pixels [default: the model's]
    #[arg(short = 'H', long, value_name = "PX", help_heading = "Picture")]
    pub height: Option<usize>,
    /// Seed, list (3,7,9) or range (0..100, end excluded) [default: random, printed]
    #[arg(short, long, value_name = "N", help_heading = "Picture")]
    pub seed: Option<Seeds>,
    /// Pictures a prompt, with seeds N, N+1, ...
    #[arg(short, long, alias = "batch-count", default_value = "1", value_parser = at_least_one, hide_default_value = true, value_name = "N", help_heading = "Picture")]
    pub count: usize,

    /// Denoising steps [default: the model's]
    #[arg(long, value_parser = steps, value_name = "N", help_heading = "Sampling")]
    pub steps: Option<usize>,
    /// How closely to follow the prompt; 1 turns guidance off and halves the work [default: the model's]
    #[arg(short, long, aliases = ["cfg-scale", "guidance-scale"], value_parser = finite, value_name = "X", help_heading = "Sampling")]
    pub guidance: Option<f64>,
    /// ddim, pndm, euler, euler-a, dpmpp-2m, dpmpp-2m-sde, heun, lms, unipc, deis, ddpm, lcm, ... [default: the checkpoint's]
    #[arg(long, alias = "sampling-method", value_name = "NAME", help_heading = "Sampling")]
    pub sampler: Option<Sampler>,
    /// karras, exponential, beta, sgm-uniform, trailing, leading, linspace, ays [default: the checkpoint's]
    #[arg(long, alias = "scheduler", value_name = "NAME", help_heading = "Sampling")]
    pub schedule: Option<Schedule>,
    /// Noise added each step, for ddim and its like (0 to 1)
    #[arg(long, value_parser = fraction, value_name = "X", help_heading = "Sampling")]
    pub eta: Option<f64>,
    /// Which layer of the text encoder to use: 1 the last, 2 the one before, ...
    #[arg(long, default_value = "1", value_parser = at_least_one, hide_default_value = true, value_name = "N", help_heading = "Sampling")]
    pub clip_skip: usize,
    /// Run the U-Net's inner levels in every Nth step only (DeepCache): faster, but another picture
    #[arg(long, default_value = "1", value_parser = at_least_one, hide_default_value = true, value_name = "N", help_heading = "Sampling")]
    pub deep_cache: usize,

    /// File, folder ending in `/`, template ({prompt} {seed} {index} {model} ...), `-` for stdout [default: {prompt}-{seed}.png]
    #[arg(short, long, value_name = "PATH", help_heading = "Output")]
    pub output: Option<OsString>,
    /// png, jpg or webp [default: from the name, else png]
    #[arg(long, value_name = "FORMAT", help_heading = "Output")]
    pub format: Option<Format>,
    /// Overwrite what is there
    #[arg(long, help_heading = "Output")]
    pub force: bool,
    /// Leave prompt and settings out of the file
    #[arg(long, help_heading = "Output")]
    pub no_metadata: bool,
    /// One JSON object a picture on stdout
    #[arg(long, help_heading = "Output")]
    pub json: bool,

    /// auto, cpu, cuda[:N] or metal
    #[arg(long, default_value = "auto", hide_default_value = true, value_name = "NAME", help_heading = "Machine")]
    pub device: DeviceChoice,
    /// Type of weights and activations: auto, f32, bf16 or f16
    #[arg(
        long,
        default_value = "auto",
        hide_default_value = true,
        hide_possible_values = true,
        value_name = "TYPE",
        help_heading = "Machine"
    )]
    pub dtype: DTypeChoice,
    /// CPU threads [default: all cores]
    #[arg(long, value_parser = at_least_one, value_name = "N", help_heading = "Machine")]
    pub threads: Option<usize>,
    /// Pictures a forward pass; never changes a picture
    #[arg(short, long, value_parser = at_least_one, value_name = "N", help_heading = "Machine")]
    pub batch_size: Option<usize>,
    /// What to show while drawing: auto, bar or none
    #[arg(
        long,
        default_value = "auto",
        hide_default_value = true,
        hide_possible_values = true,
        value_name = "MODE",
        help_heading = "Machine"
    )]
    pub progress: ProgressMode,
    /// Say nothing but errors
    #[arg(short, long, conflicts_with = "verbose", help_heading = "Machine")]
    pub quiet: bool,
    /// Say what takes how long
    #[arg(short, long, help_heading = "Machine")]
    pub verbose: bool,
}

/// `--prediction`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum PredictionChoice {
    Epsilon,
    #[value(alias = "v-prediction", alias = "v_prediction")]
    V,
}

impl From<PredictionChoice> for Prediction {
    fn from(choice: PredictionChoice) -> Self {
        match choice {
            PredictionChoice::Epsilon => Self::Epsilon,
            PredictionChoice::V => Self::V,
        }
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| (1..=1_000_000).contains(n)).ok_or_else(|| "expected a whole number from 1".into())
}

fn steps(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| (1..=1000).contains(n)).ok_or_else(|| "expected 1 to 1000 steps".into())
}

fn finite(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|x: &f64| x.is_finite() && *x >= 0.0).ok_or_else(|| "expected a number from 0".into())
}

fn fraction(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|x: &f64| (0.0..=1.0).contains(x)).ok_or_else(|| "expected a number from 0 to 1".into())
}

/// An error and the exit code it ends with (CLI contract: 2 arguments, 3 model, 4 memory, 5 not finite, 1 the rest).
pub struct Failure {
    pub code: u8,
    error: Error,
}

impl Failure {
    /// Prints `error: cause`, a blank line and `hint: remedy` on stderr.
    pub fn report(&self) {
        let parts: Vec<String> = self.error.chain().map(|e| e.to_string()).collect();
        let (mut causes, mut hint) = (vec![], None);
        for part in &parts {
            let (cause, remedy) = part.split_once("\n\nhint: ").map_or((part.as_str(), None), |(c, r)| (c, Some(r)));
            causes.push(cause);
            hint = hint.or(remedy);
        }
        eprintln!("error: {}", causes.join(": "));
        if let Some(hint) = hint {
            eprintln!("\nhint: {hint}");
        }
    }
}

/// Gives an error its exit code.
trait Code<T> {
    fn code(self, code: u8) -> Result<T, Failure>;
}

impl<T> Code<T> for Result<T> {
    fn code(self, code: u8) -> Result<T, Failure> {
        self.map_err(|error| {
            let code = if error.is::<NotFinite>() {
                5
            } else if error.is::<ModelError>() {
                3
            } else {
                code
            };
            Failure { code, error }
        })
    }
}

/// Runs the program, on a thread of the pool that all kernels share: waking one for every kernel would cost more than a
/// small kernel does.
pub fn run(cli: Cli) -> Result<(), Failure> {
    let threads = match &cli.command {
        None => cli.draw.threads,
        Some(Command::Bench(args)) => args.threads,
        Some(_) => None,
    };
    if let Some(threads) = threads {
        limit_threads(threads.max(1)).code(2)?;
    }
    rayon::scope(|_| act(cli))
}

fn act(cli: Cli) -> Result<(), Failure> {
    match cli.command {
        None => draw(&cli.draw),
        Some(Command::Inspect { model, json, offline }) => {
            let checkpoint = open(Some(&model), offline, true).code(3)?;
            let text = if json {
                format!("{}\n", crate::inspect::as_json(&checkpoint).code(3)?)
            } else {
                crate::inspect::as_text(&checkpoint).code(3)?
            };
            say(&text).code(1)
        }
        Some(Command::Bench(args)) => say(&crate::bench::run(&args).code(1)?).code(1),
        Some(Command::Pull { model }) => pull(&model).code(3),
        Some(Command::Completions { shell }) => {
            clap_complete::generate(shell, &mut Cli::command(), "sdgen", &mut std::io::stdout());
            Ok(())
        }
    }
}

/// The plain command: from arguments to pictures.
fn draw(args: &DrawArgs) -> Result<(), Failure> {
    let start = Instant::now();
    let prompts = prompts(args.prompt.as_deref()).code(2)?;
    let (destination, format) = Destination::parse(args.output.as_deref(), args.format).code(2)?;
    if matches!(destination, Destination::Stdout) && args.json {
        return Err(anyhow!("`-o -` and `--json` both want stdout")).code(2);
    }
    let compute = Compute::choose(args.device, args.dtype).code(2)?;
    let mut progress = Progress::new(args.progress, args.quiet, args.verbose);
    let checkpoint = open(args.model.as_deref(), args.offline, !args.quiet).code(3)?;
    let request = Request::resolve(args, prompts, &checkpoint).code(2)?;
    let paths = paths(&destination, format, &request, &checkpoint, args.force).code(2)?;
    if compute.device.is_cpu() {
        require_memory(request.memory_bytes(&checkpoint)).code(4)?;
    }
    announce(args, &request, &checkpoint, &progress);
    let model_hash = checkpoint.hash().code(3)?;
    pipeline::generate(&checkpoint, &request, &compute, &mut progress, &mut |drawn| {
        let settings = settings(&request, drawn.job, &checkpoint, &model_hash);
        let metadata = (!args.no_metadata).then(|| metadata(&request, drawn.job, &settings));
        let bytes = drawn.picture.encode(format, metadata.as_ref())?;
        match paths.get(drawn.job.index) {
            None => {
                let mut stdout = std::io::stdout();
                stdout.write_all(&bytes).and_then(|()| stdout.flush()).context("cannot write the picture to stdout")
            }
            Some(path) => {
                output::save(path, &bytes, args.force)?;
                let line = if args.json { record(path, settings, &drawn).to_string() } else { path.display().to_string() };
                say(&format!("{line}\n"))
            }
        }
    })
    .code(1)?;
    progress.detail(format!("all: {:.2} s", start.elapsed().as_secs_f64()));
    Ok(())
}

/// Prints to stdout; a reader that went away (`| head -1`) is no error.
fn say(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to stdout"),
    }
}

/// The prompt of the command line, or those of stdin, one a line.
fn prompts(prompt: Option<&str>) -> Result<Vec<String>> {
    let missing = || anyhow!("no prompt\n\nhint: sdgen \"a frog in a top hat\"");
    match prompt {
        Some(text) if text != "-" => Ok(vec![text.to_string()]),
        None if std::io::stdin().is_terminal() => Err(missing()),
        _ => {
            let mut prompts = vec![];
            for (i, line) in std::io::stdin().lock().lines().enumerate() {
                let line = line.with_context(|| format!("line {} of stdin cannot be read as UTF-8 text", i + 1))?;
                if !line.trim().is_empty() {
                    prompts.push(line);
                }
            }
            if prompts.is_empty() { Err(missing()) } else { Ok(prompts) }
        }
    }
}

/// Finds a model: the embedded one, a path, or the hub.
fn open(model: Option<&OsStr>, offline: bool, progress: bool) -> Result<Checkpoint> {
    let Some(model) = model.filter(|m| *m != "mini") else { return Checkpoint::open(Origin::Embedded) };
    if model.is_empty() {
        bail!("the model path is empty\n\nhint: leave `--model` (or $SDGEN_MODEL) out for the embedded model");
    }
    let path = Path::new(model);
    if path.exists() {
        return Checkpoint::open(Origin::Path(path));
    }
    let Some(id) = model.to_str().and_then(hub_id) else {
        if path.components().count() == 1 && path.extension().is_none() {
            let known = SHORT_NAMES.iter().map(|(short, _)| *short).chain(["mini"]);
            let near = nearest(&path.to_string_lossy(), known.clone()).map(|n| format!("did you mean `{n}`? ")).unwrap_or_default();
            let known: Vec<&str> = known.collect();
            bail!(
                "`{}` is no file, no folder and no short name\n\nhint: {near}short names are {}; hub ids look like owner/name",
                path.display(),
                known.join(", ")
            );
        }
        return Checkpoint::open(Origin::Path(path));
    };
    let folder: PathBuf = Hub::from_env(offline).snapshot(&id, progress)?;
    Checkpoint::open(Origin::Path(&folder))
}

/// A short name's hub id, or the text itself if it looks like one: `owner/name`, perhaps with `@revision` or a file.
fn hub_id(text: &str) -> Option<String> {
    if let Some((_, id)) = SHORT_NAMES.iter().find(|(short, _)| *short == text) {
        return Some((*id).into());
    }
    let parts: Vec<&str> = text.split('/').collect();
    let word = |s: &str| !s.is_empty() && !s.starts_with('.') && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.@".contains(c));
    let file = parts.len() == 2 && [".safetensors", ".ckpt"].iter().any(|e| text.ends_with(e));
    (parts.len() >= 2 && parts.iter().all(|p| word(p)) && !file).then(|| text.into())
}

fn pull(model: &str) -> Result<()> {
    let id = hub_id(model).with_context(|| format!("`{model}` is no hub id\n\nhint: hub ids look like owner/name"))?;
    let folder = Hub::from_env(false).snapshot(&id, true)?;
    say(&format!("{}\n", folder.display()))
}

/// Where each picture goes; none for stdout.
fn paths(destination: &Destination, format: Format, request: &Request, checkpoint: &Checkpoint, force: bool) -> Result<Vec<PathBuf>> {
    let sampler = request.sampler.to_string();
    let namings: Vec<Naming> = request.jobs.iter().map(|job| naming(job, request, checkpoint, &sampler)).collect();
    let paths = output::plan_paths(destination, format, &namings)?;
    output::check_writable(destination, &paths, force)?;
    Ok(paths)
}

fn naming<'a>(job: &'a Job, request: &'a Request, checkpoint: &'a Checkpoint, sampler: &'a str) -> Naming<'a> {
    Naming {
        prompt: &job.prompt,
        negative: &request.negative,
        seed: job.seed,
        index: job.index,
        model: &checkpoint.name,
        width: request.width,
        height: request.height,
        steps: request.steps,
        guidance: request.guidance,
        sampler,
    }
}

/// Says what was chosen for the person: the seed if it is random, and what could not be known.
fn announce(args: &DrawArgs, request: &Request, checkpoint: &Checkpoint, progress: &Progress) {
    if let (None, Some(job)) = (&args.seed, request.jobs.first()) {
        progress.note(format!("seed {}", job.seed));
    }
    if !request.guided() && args.negative.is_some() {
        progress.note("warning: the negative prompt has no effect without guidance");
    }
    if let (Some(doubt), None) = (&checkpoint.doubt, args.prediction) {
        progress.note(format!("warning: {doubt}"));
    }
    for assumed in &checkpoint.assumed {
        progress.detail(format!("assumed: {assumed}"));
    }
    if !checkpoint.ignored.is_empty() {
        progress.detail(format!("{} tensors are not needed: {}", checkpoint.ignored.len(), checkpoint.ignored.join(", ")));
    }
    let guidance = if request.guided() { format!("guidance {}", request.guidance) } else { "no guidance".into() };
    progress.detail(format!(
        "{}: {}x{}, {} steps of {}, {guidance}",
        checkpoint.name, request.width, request.height, request.steps, request.sampler
    ));
}

/// Everything that is needed to draw a picture again.
fn settings(request: &Request, job: &Job, checkpoint: &Checkpoint, model_hash: &str) -> Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "prompt": job.prompt, "negative": request.negative, "seed": job.seed,
        "width": request.width, "height": request.height, "steps": request.steps, "guidance": request.guidance,
        "sampler": request.sampler.to_string(), "schedule": request.schedule.map(|s| s.to_string()),
        "eta": request.eta, "clip_skip": request.clip_skip, "deep_cache": request.deep_cache, "prediction": request.prediction.to_string(),
        "model": checkpoint.name, "model_hash": model_hash,
    })
}

fn metadata(request: &Request, job: &Job, settings: &Value) -> Metadata {
    let text = |key: &str| settings.get(key).and_then(Value::as_str).unwrap_or_default();
    let settings_beyond_one = [("Clip skip", request.clip_skip), ("Deep cache", request.deep_cache)];
    let extra: Vec<_> = settings_beyond_one.into_iter().filter(|(_, n)| *n > 1).map(|(name, n)| (name, n.to_string())).collect();
    let fields = Parameters {
        prompt: &job.prompt,
        negative: &request.negative,
        steps: request.steps,
        sampler: a1111_sampler(request.sampler),
        schedule: request.schedule.map(a1111_schedule),
        guidance: request.guidance,
        seed: job.seed,
        width: request.width,
        height: request.height,
        model_hash: text("model_hash").get(..10),
        model: text("model"),
        extra: &extra,
    };
    Metadata { parameters: parameters(&fields), sdgen: settings.clone() }
}

/// One `--json` line.
fn record(path: &Path, settings: Value, drawn: &Drawn) -> Value {
    let mut record = json!({ "path": path.to_string_lossy(), "sha256": drawn.picture.sha256() });
    if let (Some(record), Value::Object(settings)) = (record.as_object_mut(), settings) {
        record.extend(settings);
        record.insert("timings".into(), json!({ "sampling_s": drawn.sampling_s, "decoding_s": drawn.decoding_s }));
    }
    record
}
