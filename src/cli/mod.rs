//! The command line: arguments as typed, and [`run`], which gives them to their command. The plain
//! one is [`crate::cli::draw`].

pub mod bench;
pub mod check;
pub mod draw;
pub mod exit_code;
pub mod inspect;
pub mod progress;
pub mod signals;
pub mod terminal;
pub mod upscale;

use crate::batch::dynamic_prompts::Dynamic;
use crate::batch::jobs::Seeds;
use crate::batch::shard::Shard;
use crate::cli::bench::BenchArgs;
use crate::cli::check::CheckArgs;
use crate::cli::draw::draw;
use crate::cli::exit_code::{Code, Failure};
use crate::cli::progress::ProgressMode;
use crate::cli::terminal::ShowChoice;
use crate::cli::upscale::UpscaleArgs;
use crate::hub::Hub;
use crate::image::Format;
use crate::image::load::Fit;
use crate::nn::device::{DTypeChoice, DeviceChoice, limit_threads};
use crate::pipeline::family::{SHORT_NAMES, VAE_SHORT_NAMES};
use crate::pipeline::params::{Border, Point, Size, Tile};
use crate::sampling::noise::Variation;
use crate::sampling::sampler::Sampler;
use crate::sampling::schedule::{Prediction, Schedule};
use crate::text::prompt::Syntax;
use crate::weights::embedding::Embedding;
use crate::weights::lora::Lora;
use crate::weights::{Checkpoint, Merge, Origin, nearest};
use anyhow::{Context, Result, bail};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const EXAMPLES: &str = "\
Examples:
  sdgen \"a frog in a top hat\"                       the embedded model: no download
  sdgen -m sd15 \"a castle at dusk\" --seed 7 -c 4    Stable Diffusion 1.5 from the hub, seeds 7 to 10
  sdgen -m model.safetensors \"a fox\" -o fox.jpg     any SD1.x, 2.x or XL checkpoint
  sdgen \"a cat\" -o - | display                      the picture's bytes on stdout
  sdgen \"a red fish\" --json | jq -r .path           one JSON object a picture
  sdgen --from prompts.txt -s 1..5 -o x/ --resume   once more, and it goes on where it ended
  sdgen \"a cat\" -s 1 --sweep steps=10,20 --sweep guidance=3,5,7";

/// Turns a sentence into a picture.
#[derive(Debug, Parser)]
#[command(name = "sdgen", version, about, after_help = EXAMPLES, args_conflicts_with_subcommands = true, args_override_self = true, disable_help_flag = true, max_term_width = 120)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    draw: DrawArgs,
    /// Print this help; --help tells of all options
    #[arg(short, long, global = true, action = clap::ArgAction::HelpShort, help_heading = "Machine")]
    help: Option<bool>,
}

impl Cli {
    /// Reads the process's arguments; ends it with help or an error if they say so. `--help` has
    /// the lines of `-h`, and those that it hides.
    pub fn from_env() -> Self {
        let mut command = Self::command();
        if std::env::args_os().any(|arg| arg == "--help") {
            command = command.mut_args(|arg| arg.hide_short_help(false));
        }
        Self::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
    }
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
    /// Draw pictures again from their own metadata and compare; exit 0 only if all are the same
    Check(CheckArgs),
    /// Make pictures larger by a network (ESRGAN, Real-ESRGAN), or by Lanczos' formula
    Upscale(UpscaleArgs),
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
    /// Folder, .safetensors file, hub id (owner/name) or short name (mini, sd15, sdxl, turbo, lcm,
    /// ...)
    #[arg(
        short,
        long,
        env = "SDGEN_MODEL",
        hide_env_values = true,
        value_name = "REF",
        help_heading = "Model"
    )]
    pub model: Option<OsString>,
    /// Change the model by a LoRA, by the share X [default: 1]; if given again, by each
    #[arg(long, value_name = "FILE[:X]", help_heading = "Model")]
    pub lora: Vec<LoraArg>,
    /// The folder of the LoRAs that prompts name as A1111's do: <lora:NAME:X>
    #[arg(
        hide_short_help = true,
        long,
        value_name = "DIR",
        help_heading = "Model"
    )]
    pub lora_dir: Option<PathBuf>,
    /// Take a LoRA that fits the model only in part for an error
    #[arg(hide_short_help = true, long, help_heading = "Model")]
    pub strict: bool,
    /// A word that the model has learned (textual inversion), and what it is in prompts [default:
    /// the file's name]
    #[arg(
        hide_short_help = true,
        long,
        value_name = "FILE[:TOKEN]",
        help_heading = "Model"
    )]
    pub embedding: Vec<OsString>,
    /// What the network predicts if the checkpoint does not say: epsilon or v
    #[arg(
        hide_short_help = true,
        long,
        hide_possible_values = true,
        value_name = "TYPE",
        help_heading = "Model"
    )]
    pub prediction: Option<PredictionChoice>,
    /// Another VAE: folder, .safetensors file, hub id or short name (taesd, taesdxl,
    /// sdxl-vae-fp16-fix)
    #[arg(long, value_name = "REF", help_heading = "Model")]
    pub vae: Option<OsString>,
    /// Decode in tiles: on, off or auto, where the whole does not fit in memory
    #[arg(
        hide_short_help = true,
        long,
        default_value = "auto",
        hide_default_value = true,
        hide_possible_values = true,
        value_name = "WHEN",
        help_heading = "Model"
    )]
    pub vae_tiling: VaeTiling,
    /// Add a share of another model's weights as they are read: (1 - X) of the model's own and X of
    /// its
    #[arg(
        hide_short_help = true,
        long,
        value_name = "REF:X",
        help_heading = "Model"
    )]
    pub merge: Vec<OsString>,
    /// A third model: what is merged is X of what the other has more than it
    #[arg(
        hide_short_help = true,
        long,
        requires = "merge",
        value_name = "REF",
        help_heading = "Model"
    )]
    pub minus: Option<OsString>,
    /// A model that draws the last steps, such as sdxl-refiner
    #[arg(long, value_name = "REF", help_heading = "SDXL")]
    pub refiner: Option<OsString>,
    /// Never touch the network; also HF_HUB_OFFLINE=1
    #[arg(long, help_heading = "Model")]
    pub offline: bool,

    #[command(flatten)]
    pub picture: PictureArgs,

    /// A list: .txt of prompts, .jsonl of objects with options; `-`: stdin
    #[arg(long, value_name = "FILE", help_heading = "Many pictures")]
    pub from: Option<PathBuf>,
    /// Each value of an option; if given again, each combination
    #[arg(long, value_name = "KEY=A,B,...", help_heading = "Many pictures")]
    pub sweep: Vec<String>,
    /// Prompts are templates: {red|green} frog, {2$$a|b|c}, __list__; random for each seed, or =all
    #[arg(hide_short_help = true, long, num_args = 0..=1, require_equals = true, default_missing_value = "random", hide_possible_values = true, value_name = "HOW", help_heading = "Many pictures")]
    pub dynamic: Option<Dynamic>,
    /// Where __list__ finds list.txt, a line for each alternative [default: wildcards]
    #[arg(
        hide_short_help = true,
        long,
        requires = "dynamic",
        value_name = "FOLDER",
        help_heading = "Many pictures"
    )]
    pub wildcards: Option<PathBuf>,
    /// Skip what is there with the same settings; overwrite what has others
    #[arg(long, conflicts_with_all = ["no_metadata", "force"], help_heading = "Many pictures")]
    pub resume: bool,
    /// Draw only part I of N of the list, from 0; auto: as Slurm, Kubernetes and others say
    #[arg(long, value_name = "I/N|auto", help_heading = "Many pictures")]
    pub shard: Option<Shard>,
    /// Draw nothing; print which pictures are missing or have other settings
    #[arg(long, conflicts_with_all = ["resume", "dry_run", "no_metadata"], help_heading = "Many pictures")]
    pub verify: bool,
    /// Print the work list and the memory it needs; read no weights, draw nothing
    #[arg(long, help_heading = "Many pictures")]
    pub dry_run: bool,
    /// A contact sheet of all pictures as well
    #[arg(long, value_name = "FILE", help_heading = "Many pictures")]
    pub grid: Option<PathBuf>,
    /// Write what --json prints into a file
    #[arg(
        hide_short_help = true,
        long,
        value_name = "FILE",
        help_heading = "Many pictures"
    )]
    pub manifest: Option<PathBuf>,
    /// Pictures a forward pass; never changes a picture [default: up to 4]
    #[arg(short, long, value_parser = at_least_one, value_name = "N", help_heading = "Many pictures")]
    pub batch_size: Option<usize>,

    /// png, jpg or webp [default: from the name, else png]
    #[arg(long, value_name = "FORMAT", help_heading = "Output")]
    pub format: Option<Format>,
    /// Overwrite what is there
    #[arg(long, help_heading = "Output")]
    pub force: bool,
    /// Make each picture larger: an upscaler's .safetensors file or lanczos, and perhaps how many
    /// times
    #[arg(
        hide_short_help = true,
        long,
        value_name = "FILE[:X]",
        help_heading = "Output"
    )]
    pub upscale: Option<OsString>,
    /// Draw in the terminal too: auto, kitty, iterm, sixel, blocks, blocks256
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "auto", hide_possible_values = true, value_name = "HOW", help_heading = "Output")]
    pub show: Option<ShowChoice>,
    /// Leave prompt and settings out of the file
    #[arg(long, help_heading = "Output")]
    pub no_metadata: bool,
    /// One JSON object a picture on stdout
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// Keep a hash of every stage, for `sdgen check` to compare
    #[arg(hide_short_help = true, long, help_heading = "Output")]
    pub trace: bool,

    /// auto, cpu, cuda[:N] or metal
    #[arg(
        long,
        default_value = "auto",
        hide_default_value = true,
        value_name = "NAME",
        help_heading = "Machine"
    )]
    pub device: DeviceChoice,
    /// Type of weights and activations: auto, f32, bf16 or f16
    #[arg(
        hide_short_help = true,
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
    /// What to show while drawing: auto, bar, json (events, one a line) or none
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

/// What may differ from picture to picture. Each option is also a key of a list's lines; all but
/// `count`, `crop`, `extend`, `frames` and `output` may be swept.
#[derive(Debug, Clone, Args)]
pub struct PictureArgs {
    /// What to steer away from
    #[arg(
        short,
        long,
        alias = "negative-prompt",
        value_name = "TEXT",
        help_heading = "Picture"
    )]
    pub negative: Option<Arc<str>>,
    /// How prompts are read: a1111, with (weights:1.2), [a:b:0.5], AND, BREAK and any length; or
    /// plain [default: a1111]
    #[arg(
        hide_short_help = true,
        long,
        hide_possible_values = true,
        value_name = "NAME",
        help_heading = "Picture"
    )]
    pub prompt_syntax: Option<Syntax>,
    /// Width in pixels [default: the model's]
    #[arg(short = 'W', long, value_name = "PX", help_heading = "Picture")]
    pub width: Option<usize>,
    /// Height in pixels [default: the model's]
    #[arg(short = 'H', long, value_name = "PX", help_heading = "Picture")]
    pub height: Option<usize>,
    /// Seed, list (3,7,9) or range (0..100, end excluded) [default: random]
    #[arg(short, long, value_name = "N", help_heading = "Picture")]
    pub seed: Option<Seeds>,
    /// Pictures a prompt, with seeds N, N+1, ...
    #[arg(short, long, alias = "batch-count", value_parser = at_least_one, value_name = "N", help_heading = "Picture")]
    pub count: Option<usize>,
    /// Mix the noise of another seed in, by X from 0 to 1: like the picture, but not quite
    #[arg(
        long,
        value_name = "SEED:X",
        hide_short_help = true,
        help_heading = "Picture"
    )]
    pub variation: Option<Variation>,
    /// Go on to this prompt, picture by picture: see --frames
    #[arg(
        long,
        hide_short_help = true,
        value_name = "PROMPT",
        help_heading = "Picture"
    )]
    pub to: Option<Arc<str>>,
    /// Go on to the noise of this seed, picture by picture: see --frames
    #[arg(
        long,
        hide_short_help = true,
        value_name = "N",
        help_heading = "Picture"
    )]
    pub to_seed: Option<u64>,
    /// Pictures on the way to --to and --to-seed, numbered for ffmpeg
    #[arg(long, hide_short_help = true, value_parser = frames, value_name = "N", help_heading = "Picture")]
    pub frames: Option<usize>,
    /// Copies of the picture fit together side by side (x), one above the other (y), or both (xy)
    #[arg(
        long,
        hide_possible_values = true,
        hide_short_help = true,
        value_name = "x|y|xy",
        help_heading = "Picture"
    )]
    pub tile: Option<Tile>,

    /// Denoising steps [default: the model's]
    #[arg(long, value_parser = steps, value_name = "N", help_heading = "Sampling")]
    pub steps: Option<usize>,
    /// Strength of the prompt; 1 is off and halves the work [default: the model's]
    #[arg(short, long, aliases = ["cfg-scale", "guidance-scale"], value_parser = finite, value_name = "X", help_heading = "Sampling")]
    pub guidance: Option<f64>,
    /// Bring what guidance overshoots back by this share (0 to 1); 0.7 for zero-terminal-SNR models
    #[arg(hide_short_help = true, long, value_parser = fraction, value_name = "X", help_heading = "Sampling")]
    pub guidance_rescale: Option<f64>,
    /// ddim, pndm, euler, euler-a, dpmpp-2m, dpmpp-2m-sde, heun, lms, unipc, deis, ddpm, lcm, ...
    /// [default: the checkpoint's]
    #[arg(
        long,
        alias = "sampling-method",
        value_name = "NAME",
        help_heading = "Sampling"
    )]
    pub sampler: Option<Sampler>,
    /// karras, exponential, beta, sgm-uniform, trailing, leading, linspace, ays [default: the
    /// checkpoint's]
    #[arg(
        long,
        alias = "scheduler",
        value_name = "NAME",
        help_heading = "Sampling"
    )]
    pub schedule: Option<Schedule>,
    /// Noise added each step, for ddim and its like (0 to 1)
    #[arg(long, value_parser = fraction, value_name = "X", help_heading = "Sampling")]
    pub eta: Option<f64>,
    /// Which layer of the text encoder to use: 1 the usual, 2 the one before, ...
    #[arg(long, value_parser = at_least_one, value_name = "N", help_heading = "Sampling")]
    pub clip_skip: Option<usize>,
    /// Run the U-Net's inner levels every Nth step only: faster, another picture
    #[arg(hide_short_help = true, long, value_parser = at_least_one, value_name = "N", help_heading = "Sampling")]
    pub deep_cache: Option<usize>,

    /// Start from this picture, or from each one of a folder
    #[arg(
        short,
        long,
        alias = "init-img",
        value_name = "FILE",
        help_heading = "From a picture"
    )]
    pub image: Option<PathBuf>,
    /// How much of it is drawn anew, 0 to 1 [default: 0.75; 1 for inpainting models]
    #[arg(long, value_parser = fraction, value_name = "X", help_heading = "From a picture")]
    pub strength: Option<f64>,
    /// Repaint where this picture is white [default: where the first one is transparent]
    #[arg(long, value_name = "FILE", help_heading = "From a picture")]
    pub mask: Option<PathBuf>,
    /// Draw what is repainted at full size, with this many pixels around it [default: 32]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "32", value_name = "PX", help_heading = "From a picture")]
    pub only_masked: Option<usize>,
    /// Paint this many pixels around it: 256, or left=128,top=64
    #[arg(long, value_name = "PX", help_heading = "From a picture")]
    pub extend: Option<Border>,
    /// Pixels over which what is repainted fades in [default: 8]
    #[arg(
        hide_short_help = true,
        long,
        value_name = "PX",
        help_heading = "From a picture"
    )]
    pub feather: Option<usize>,
    /// How it is brought to another shape: crop, pad or stretch [default: crop]
    #[arg(
        hide_short_help = true,
        long,
        hide_possible_values = true,
        value_name = "HOW",
        help_heading = "From a picture"
    )]
    pub fit: Option<Fit>,
    /// How closely models that edit pictures, such as InstructPix2Pix, follow it [default: 1.5]
    #[arg(hide_short_help = true, long, value_parser = finite, value_name = "X", help_heading = "From a picture")]
    pub image_guidance: Option<f64>,

    /// Draw it small, then again larger by this factor over what was drawn
    #[arg(long, value_parser = factor, value_name = "FACTOR", help_heading = "From a picture")]
    pub hires: Option<f64>,
    /// How much is drawn anew the second time, 0 to 1 [default: 0.5]
    #[arg(hide_short_help = true, long, value_parser = fraction, value_name = "X", help_heading = "From a picture")]
    pub hires_strength: Option<f64>,

    /// What the model is told of the picture's size before scaling [default: the picture's]
    #[arg(
        hide_short_help = true,
        long,
        value_name = "WxH",
        help_heading = "SDXL"
    )]
    pub original_size: Option<Size>,
    /// What the model is told was cropped at the left and top [default: 0,0]
    #[arg(
        hide_short_help = true,
        long,
        value_name = "X,Y",
        help_heading = "SDXL"
    )]
    pub crop: Option<Point>,
    /// What the model is told of the picture's size [default: the picture's]
    #[arg(
        hide_short_help = true,
        long,
        value_name = "WxH",
        help_heading = "SDXL"
    )]
    pub target_size: Option<Size>,
    /// Share of the way from noise to picture at which the refiner takes over [default: 0.8]
    #[arg(long, value_parser = fraction, value_name = "X", help_heading = "SDXL")]
    pub refine_at: Option<f64>,

    /// File, folder/, template, or `-` for stdout [default: {prompt}-{seed}.png]
    #[arg(short, long, value_name = "PATH", help_heading = "Output")]
    pub output: Option<OsString>,
}

/// `--lora`: a file, perhaps with how much of its change is made behind a colon.
#[derive(Debug, Clone)]
pub struct LoraArg {
    pub path: PathBuf,
    pub strength: f64,
}

impl From<OsString> for LoraArg {
    fn from(text: OsString) -> Self {
        let split = text
            .to_str()
            .filter(|text| !Path::new(text).exists())
            .and_then(|text| text.rsplit_once(':'));
        let strength = |text: &str| {
            text.parse()
                .ok()
                .filter(|strength: &f64| strength.is_finite())
        };
        match split.and_then(|(path, text)| Some((path, strength(text)?))) {
            Some((path, strength)) => Self {
                path: path.into(),
                strength,
            },
            None => Self {
                path: text.into(),
                strength: 1.0,
            },
        }
    }
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

/// `--vae-tiling`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VaeTiling {
    /// where the whole does not fit into memory; on CPUs, as GPUs do not say what they have left
    Auto,
    On,
    Off,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|n| (1..=1_000_000).contains(n))
        .ok_or_else(|| "expected a whole number from 1".into())
}

fn steps(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|n| (1..=1000).contains(n))
        .ok_or_else(|| "expected 1 to 1000 steps".into())
}

fn frames(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|n| (2..=1_000_000).contains(n))
        .ok_or_else(|| "expected two pictures or more".into())
}

fn finite(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|x: &f64| x.is_finite() && *x >= 0.0)
        .ok_or_else(|| "expected a number from 0".into())
}

fn fraction(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|x: &f64| (0.0..=1.0).contains(x))
        .ok_or_else(|| "expected a number from 0 to 1".into())
}

fn factor(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('x').unwrap_or(text).parse().ok();
    number
        .filter(|x: &f64| *x > 1.0 && *x <= 8.0)
        .ok_or_else(|| "expected a factor above 1 and up to 8, such as 2x".into())
}

/// Runs the program and returns its exit code; what goes wrong is said on stderr. It runs on a
/// thread of the pool that all kernels share: waking one for every kernel would cost more than a
/// small kernel does.
pub fn run(cli: Cli) -> u8 {
    let threads = match &cli.command {
        None => cli.draw.threads,
        Some(Command::Bench(args)) => args.threads,
        Some(Command::Check(args)) => args.threads,
        Some(Command::Upscale(args)) => args.threads,
        Some(_) => None,
    };
    let result = threads
        .map_or(Ok(()), |threads| limit_threads(threads.max(1)).code(2))
        .and_then(|()| match cli.command {
            None => Ok(rayon::scope(|_| draw(&cli.draw))),
            Some(command) => rayon::scope(|_| command.run()).map(|()| 0),
        });
    result.unwrap_or_else(|failure| {
        eprintln!("{}", failure.text());
        failure.code
    })
}

impl Command {
    fn run(self) -> Result<(), Failure> {
        match self {
            Self::Inspect {
                model,
                json,
                offline,
            } => {
                let path = Path::new(&model);
                if Embedding::is_in(path) {
                    return say(&crate::cli::inspect::embedding(
                        &Embedding::asked(&model).code(3)?,
                        json,
                    ))
                    .code(1);
                }
                let text = match Lora::is_at(path)
                    .then(|| Lora::open(path, 1.0))
                    .transpose()
                    .code(3)?
                {
                    Some(lora) if json => {
                        format!("{}\n", crate::cli::inspect::lora_as_json(&lora).code(3)?)
                    }
                    Some(lora) => crate::cli::inspect::lora_as_text(&lora).code(3)?,
                    None => {
                        let checkpoint = open(Some(&model), offline, true).code(3)?;
                        if json {
                            format!("{}\n", crate::cli::inspect::as_json(&checkpoint).code(3)?)
                        } else {
                            crate::cli::inspect::as_text(&checkpoint).code(3)?
                        }
                    }
                };
                say(&text).code(1)
            }
            Self::Check(args) => crate::cli::check::run(&args),
            Self::Upscale(args) => crate::cli::upscale::run(&args),
            Self::Bench(args) => say(&crate::cli::bench::run(&args).code(1)?).code(1),
            Self::Pull { model } => pull(&model).code(3),
            Self::Completions { shell } => {
                clap_complete::generate(
                    shell,
                    &mut Cli::command(),
                    "sdgen",
                    &mut std::io::stdout(),
                );
                Ok(())
            }
        }
    }
}

/// Prints to stdout; a reader that went away (`| head -1`) is no error.
pub(crate) fn say(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to stdout"),
    }
}

/// Adds what `--merge` and `--minus` name to a model.
pub(crate) fn merge(
    checkpoint: &mut Checkpoint,
    merges: &[OsString],
    minus: Option<&OsStr>,
    offline: bool,
    progress: bool,
) -> Result<()> {
    for asked in merges {
        let split = asked
            .to_str()
            .and_then(|text| text.rsplit_once(':'))
            .and_then(|(model, share)| Some((model, share.parse().ok()?)));
        let Some((model, share)) = split.filter(|(_, share): &(_, f64)| share.is_finite()) else {
            bail!(
                "`--merge {}` has no share\n\nhint: `--merge other.safetensors:0.3`",
                asked.display()
            );
        };
        let other = open(Some(OsStr::new(model)), offline, progress)?;
        let minus = minus
            .map(|minus| open(Some(minus), offline, progress))
            .transpose()?;
        checkpoint.merge(Merge {
            other,
            minus,
            share,
        })?;
    }
    Ok(())
}

/// Finds a model and perhaps the one that refines what it draws.
pub(crate) fn open_both(
    model: Option<&OsStr>,
    refiner: Option<&OsStr>,
    offline: bool,
    progress: bool,
) -> Result<Checkpoint> {
    let mut checkpoint = open(model, offline, progress)?;
    checkpoint.refiner = refiner
        .map(|refiner| open(Some(refiner), offline, progress))
        .transpose()?
        .map(Box::new);
    Ok(checkpoint)
}

/// Has a model decode with another VAE: that at a path, or one of the hub.
pub(crate) fn use_vae(
    checkpoint: &mut Checkpoint,
    vae: &OsStr,
    offline: bool,
    progress: bool,
) -> Result<()> {
    let path = Path::new(vae);
    match vae.to_str().and_then(hub_id).filter(|_| !path.exists()) {
        Some(id) => checkpoint.use_vae(&Hub::from_env(offline).vae(&id, progress)?),
        None if !path.exists() => {
            let known: Vec<&str> = VAE_SHORT_NAMES.iter().map(|(short, _)| *short).collect();
            bail!(
                "there is no VAE `{}`\n\nhint: `--vae` takes a folder, a .safetensors file, a hub id (owner/name) or one of {}",
                path.display(),
                known.join(", ")
            )
        }
        None => checkpoint.use_vae(path),
    }
}

/// Finds a model: the embedded one, a path, or the hub.
pub(crate) fn open(model: Option<&OsStr>, offline: bool, progress: bool) -> Result<Checkpoint> {
    let Some(model) = model.filter(|m| *m != "mini") else {
        return Checkpoint::open(Origin::Embedded);
    };
    if model.is_empty() {
        bail!(
            "the model path is empty\n\nhint: leave `--model` (or $SDGEN_MODEL) out for the embedded model"
        );
    }
    let path = Path::new(model);
    if path.exists() {
        return Checkpoint::open(Origin::Path(path));
    }
    let Some(id) = model.to_str().and_then(hub_id) else {
        if path.components().count() == 1 && path.extension().is_none() {
            let known = SHORT_NAMES.iter().map(|(short, _)| *short).chain(["mini"]);
            let near = nearest(&path.to_string_lossy(), known.clone())
                .map(|n| format!("did you mean `{n}`? "))
                .unwrap_or_default();
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

/// A short name's hub id, or the text itself if it looks like one: `owner/name`, perhaps with
/// `@revision` or a file.
fn hub_id(text: &str) -> Option<String> {
    if let Some((_, id)) = SHORT_NAMES
        .iter()
        .chain(&VAE_SHORT_NAMES)
        .find(|(short, _)| *short == text)
    {
        return Some((*id).into());
    }
    let parts: Vec<&str> = text.split('/').collect();
    let word = |s: &str| {
        !s.is_empty()
            && !s.starts_with('.')
            && s.chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.@".contains(c))
    };
    let file = parts.len() == 2 && [".safetensors", ".ckpt"].iter().any(|e| text.ends_with(e));
    (parts.len() >= 2 && parts.iter().all(|p| word(p)) && !file).then(|| text.into())
}

fn pull(model: &str) -> Result<()> {
    let id = hub_id(model)
        .with_context(|| format!("`{model}` is no hub id\n\nhint: hub ids look like owner/name"))?;
    let folder = Hub::from_env(false).snapshot(&id, true)?;
    say(&format!("{}\n", folder.display()))
}
