//! The command: everything that knows arguments, terminals and exit codes. The plain one is
//! [`draw`].

pub mod announce;
pub mod args;
pub mod bench;
pub mod check;
pub mod config;
pub mod draw;
pub mod exit_code;
pub mod help;
pub mod inspect;
pub mod model_args;
pub mod models;
pub mod preflight;
pub mod progress;
pub mod signals;
pub mod stdout;
pub mod terminal;
pub mod upscale;

use crate::cli::args::{Cli, Command};
use crate::cli::exit_code::{Code, Failure};
use crate::cli::stdout::say;
use crate::nn::device::limit_threads;
use crate::pipeline::model_spec::ModelFinder;
use clap::CommandFactory;

/// Runs the program on the process's arguments and returns its exit code; errors are printed on
/// stderr.
pub fn run() -> u8 {
    let result = Cli::from_env().code(2).and_then(run_command);
    result.unwrap_or_else(|failure| {
        eprintln!("{}", failure.text());
        failure.code
    })
}

/// Runs the command on a thread of the pool that all kernels share: waking one for every kernel
/// would cost more than a small kernel does.
fn run_command(cli: Cli) -> Result<u8, Failure> {
    if let Some(threads) = cli.threads() {
        limit_threads(threads.max(1)).code(2)?;
    }
    match cli.command {
        None => Ok(rayon::scope(|_| draw::draw(&cli.draw))),
        Some(command) => rayon::scope(|_| command.run()).map(|()| 0),
    }
}

impl Command {
    fn run(self) -> Result<(), Failure> {
        match self {
            Self::Inspect(args) => inspect::run(&args),
            Self::Check(args) => check::run(&args),
            Self::Upscale(args) => upscale::run(&args),
            Self::Bench(args) => say(&bench::run(&args).code(1)?).code(1),
            Self::Pull { model } => {
                let finder = ModelFinder {
                    offline: false,
                    shows_progress: true,
                };
                let folder = finder.pull(&model).code(3)?;
                say(&format!("{}\n", folder.display())).code(1)
            }
            Self::Models(args) => say(&models::run(&args)).code(1),
            Self::Completions { shell } => {
                let stdout = &mut std::io::stdout();
                clap_complete::generate(shell, &mut Cli::command(), "sdgen", stdout);
                Ok(())
            }
            Self::Man => help::man(),
            Self::Help { topic } => help::help(topic.as_deref()),
        }
    }
}
