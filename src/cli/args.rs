//! The command line as typed: subcommands, options and their help.
//!
//! What may differ from image to image is declared in [`JobOptions`], what makes a model in
//! [`ModelArgs`]; the options of other subcommands stand with these.

use crate::batch::dynamic_prompts::Dynamic;
use crate::batch::jobs::JobSource;
use crate::batch::output_path::Overwrite;
use crate::batch::shard::Shard;
use crate::batch::writer::WriteOptions;
use crate::cli::bench::BenchArgs;
use crate::cli::check::CheckArgs;
use crate::cli::config::Config;
use crate::cli::convert::ConvertArgs;
use crate::cli::inspect::InspectArgs;
use crate::cli::model_args::ModelArgs;
use crate::cli::models::ModelsArgs;
use crate::cli::progress::ProgressMode;
use crate::cli::terminal::ShowChoice;
use crate::cli::upscale::UpscaleArgs;
use crate::cli::usage;
use crate::image::Format;
use crate::nn::device::{DTypeChoice, DeviceChoice};
use crate::pipeline::PipelineOptions;
use crate::pipeline::options::{JobOptions, VaeTiling, at_least_one, split_value};
use crate::sampling::Prediction;
use anyhow::Result;
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  sdgen \"a frog in a top hat\"                       the embedded model: no download
  sdgen -m sd15 \"a castle at dusk\" --seed 7 -c 4    Stable Diffusion 1.5 from the hub, seeds 7 to 10
  sdgen -m model.safetensors \"a fox\" -o fox.jpg     any SD1.x, 2.x or XL checkpoint
  sdgen \"a cat\" -o - | display                      the picture's bytes on stdout
  sdgen \"a frog\" --json | jq -r .path               one JSON object a picture
  sdgen --from prompts.txt -s 1..5 -o x/ --resume   once more, and it goes on where it ended
  sdgen \"a cat\" -s 1 --sweep steps=10,20 --sweep guidance=3,5,7";

/// Turns a sentence into a picture.
#[derive(Debug, Parser)]
#[command(name = "sdgen", version, about, after_help = EXAMPLES, args_conflicts_with_subcommands = true, args_override_self = true, disable_help_flag = true, disable_help_subcommand = true, max_term_width = 120)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub draw: DrawArgs,
    /// Defaults of these options, as KEY = VALUE in TOML [default: sdgen/sdgen.toml in
    /// $XDG_CONFIG_HOME or ~/.config]
    #[arg(long, global = true, hide_short_help = true)]
    #[arg(value_name = "FILE", help_heading = "Machine")]
    pub config: Option<PathBuf>,
    /// Read no file of defaults
    #[arg(long, global = true, hide_short_help = true, help_heading = "Machine")]
    pub no_config: bool,
    /// Print this help; --help tells of all options
    #[arg(short, long, global = true, action = clap::ArgAction::HelpShort, help_heading = "Machine")]
    help: Option<bool>,
}

impl Cli {
    /// Reads the process's arguments over the user's defaults; ends the process with help if the
    /// arguments say so. `--help` has the lines of `-h`, and those that it hides. Errors if the
    /// arguments or the file of defaults are wrong.
    pub fn from_env() -> Result<Self> {
        let arguments: Vec<OsString> = std::env::args_os().collect();
        let mut command = Self::command();
        if let Some(config) = Config::find(&arguments)? {
            let footer = config.footer();
            command = config
                .apply(command)?
                .after_help(format!("{EXAMPLES}\n\n{footer}"));
        }
        if arguments.iter().any(|argument| argument == "--help") {
            command = command.mut_args(|arg| arg.hide_short_help(false));
        }
        // a value may be a number below zero, of which its option says what it thinks
        command = command.mut_args(|arg| match arg.get_action().takes_values() {
            true => arg.allow_negative_numbers(true),
            false => arg,
        });
        let matches = command.try_get_matches_from_mut(&arguments);
        let parsed = matches.and_then(|matches| Self::from_arg_matches(&matches));
        parsed.map_err(|error| usage::refused(error, &command, &arguments))
    }

    /// CPU threads to use, if the command has such an option and it is given.
    pub fn threads(&self) -> Option<usize> {
        match &self.command {
            None => self.draw.threads,
            Some(Command::Bench(args)) => args.threads,
            Some(Command::Check(args)) => args.threads,
            Some(Command::Upscale(args)) => args.threads,
            Some(_) => None,
        }
    }
}

/// All commands but the plain one.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Tell what a checkpoint is, from its headers alone
    Inspect(InspectArgs),
    /// Draw pictures again from their own metadata and compare; exit 0 if all are equal
    Check(Box<CheckArgs>),
    /// Make pictures larger by a network (ESRGAN, Real-ESRGAN), or by Lanczos' formula
    Upscale(UpscaleArgs),
    /// Write a model in another layout or type, with its LoRAs, merges and VAE
    Convert(Box<ConvertArgs>),
    /// Time the steps of this machine on real layer sizes, with random weights
    Bench(BenchArgs),
    /// Fetch a model from the hub into its cache
    Pull {
        /// Hub id (owner/name) or short name
        model: String,
    },
    /// List the short names of models, and what is in the hub's cache
    Models(ModelsArgs),
    /// Print a completion script for a shell
    Completions { shell: clap_complete::Shell },
    /// Print a man page
    Man,
    /// Print the help of a command, or a page on a topic: models, prompts, batches, ...
    Help {
        /// A topic or a command [default: the usual help, and the list of topics]
        topic: Option<String>,
    },
}

/// The plain command: a prompt or a list, and how to draw it.
#[derive(Debug, Args)]
pub struct DrawArgs {
    /// What to draw; `-`, or nothing with a pipe on stdin: one prompt a line
    pub prompt: Option<String>,
    /// The prompt, for those whose hands know it as an option
    #[arg(short = 'p', long = "prompt", hide = true, conflicts_with = "prompt")]
    pub prompt_option: Option<String>,
    #[command(flatten)]
    pub model: ModelArgs,
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
    /// What the network predicts if the checkpoint does not say: epsilon or v
    #[arg(
        hide_short_help = true,
        long,
        hide_possible_values = true,
        value_name = "TYPE",
        help_heading = "Model"
    )]
    pub prediction: Option<PredictionChoice>,
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

    #[command(flatten)]
    pub job: JobOptions,

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
    /// Skip pictures that are there with the same settings, overwrite others
    #[arg(long, conflicts_with = "no_metadata", help_heading = "Many pictures")]
    pub resume: bool,
    /// Lists may name outputs outside of the folder of --output
    #[arg(hide_short_help = true, long, help_heading = "Many pictures")]
    pub outputs_anywhere: bool,
    /// Draw only part I of N of the list, from 0; auto: as Slurm, Kubernetes and others say
    #[arg(long, value_name = "I/N|auto", help_heading = "Many pictures")]
    pub shard: Option<Shard>,
    /// Draw nothing; print which pictures are missing or have other settings
    #[arg(long, conflicts_with_all = ["resume", "dry_run", "no_metadata"], help_heading = "Many pictures")]
    pub verify: bool,
    /// Print the work list, its memory and time; draw nothing
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
    /// Save what pictures look like after each step, or every Nth, as small PNG files
    #[arg(long, hide_short_help = true)]
    #[arg(value_name = "DIR[:N]", help_heading = "Output")]
    #[arg(value_parser = OsStringValueParser::new().try_map(StepsArg::parse))]
    pub save_steps: Option<StepsArg>,
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

    #[arg(
        help = "auto, cpu, cuda[:N] or metal",
        long,
        default_value = "auto",
        hide_default_value = true,
        value_name = "NAME",
        help_heading = "Machine"
    )]
    pub device: DeviceChoice,
    /// Type of weights and activations: auto, f32, bf16, f16 or int8
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

impl DrawArgs {
    /// Where the prompts come from.
    pub fn source(&self) -> JobSource<'_> {
        JobSource {
            prompt: self.prompt.as_deref().or(self.prompt_option.as_deref()),
            from: self.from.as_deref(),
            options: &self.job,
            sweeps: &self.sweep,
            dynamic: self.dynamic,
            wildcards: self.wildcards.as_deref().unwrap_or(Path::new("wildcards")),
            format: self.format,
            outputs_anywhere: self.outputs_anywhere,
        }
    }

    /// How files are written.
    pub fn write_options(&self) -> WriteOptions {
        WriteOptions {
            metadata: !self.no_metadata,
            overwrite: match (self.force, self.resume) {
                (true, _) => Overwrite::All,
                (false, true) => Overwrite::Own,
                (false, false) => Overwrite::Never,
            },
        }
    }

    /// What holds for all images, beside the model.
    pub fn pipeline_options(&self) -> PipelineOptions {
        PipelineOptions {
            prediction: self.prediction.map(Into::into),
            vae_tiling: self.vae_tiling,
        }
    }
}

/// `--save-steps`: a folder, perhaps with a number of steps behind a colon.
#[derive(Debug, Clone)]
pub struct StepsArg {
    pub folder: PathBuf,
    /// Every how many steps an image is saved, from 1.
    pub every: usize,
}

impl StepsArg {
    fn parse(text: OsString) -> Result<Self, String> {
        let is_folder = |text: &str| Path::new(text).exists();
        let (folder, every) = split_value(&text, is_folder, at_least_one)?;
        Ok(Self {
            folder: folder.into(),
            every: every.unwrap_or(1),
        })
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
