//! The command: everything that knows arguments, terminals and exit codes. The plain one is
//! [`draw`].

pub mod announce;
pub mod args;
pub mod bench;
pub mod check;
pub mod config;
pub mod convert;
pub mod draw;
pub mod escape;
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
pub mod usage;

use crate::alloc;
use crate::cli::args::{Cli, Command};
use crate::cli::escape::escaped;
use crate::cli::exit_code::{Code, Failure};
use crate::cli::stdout::say;
use crate::nn::device::{NO_THREAD, start_threads};
use crate::pipeline::model_spec::ModelFinder;
use anyhow::Context;
use clap::CommandFactory;
use std::io::Write;
use std::process::ExitCode;

/// The stack of the thread that everything begins on, whatever `ulimit -s` says.
const STACK_BYTES: usize = 8 << 20;

/// The `sdgen` command: parses the process's arguments, runs, and returns the exit code. Errors are
/// printed on stderr.
pub fn main() -> ExitCode {
    alloc::on_exhaustion(end_without_memory);
    signals::take_file_limits_for_errors();
    let started = std::thread::Builder::new()
        .stack_size(STACK_BYTES)
        .spawn(parse_and_run)
        .context(NO_THREAD);
    ExitCode::from(match started.code(1) {
        // a panic has said what it is
        Ok(thread) => thread.join().unwrap_or(PANIC),
        Err(failure) => said(failure),
    })
}

/// The exit code of a panic, as the standard library has it.
const PANIC: u8 = 101;

fn parse_and_run() -> u8 {
    let result = Cli::from_env().code(2).and_then(run);
    result.unwrap_or_else(said)
}

/// Prints an error, and returns the exit code.
fn said(failure: Failure) -> u8 {
    // to a closed stderr nothing can be said
    writeln!(std::io::stderr(), "{}", escaped(&failure.text())).ok();
    failure.code
}

/// Ends the process where the system has not so many bytes left, which no estimate has foreseen.
fn end_without_memory(bytes: usize) {
    let megabytes = bytes.div_ceil(1_000_000);
    writeln!(
        std::io::stderr(),
        "error: the system has no memory left: {megabytes} MB more were asked for\n\n\
         hint: draw a smaller picture, with `--vae-tiling on` or a smaller `--batch-size`; pictures \
         that were finished are saved"
    )
    .ok();
    signals::end_at_once(4);
}

/// Runs the command on a thread of the pool that all kernels share: waking one for every kernel
/// would cost more than a small kernel does.
fn run(cli: Cli) -> Result<u8, Failure> {
    let asked = cli.threads();
    let threads = start_threads(asked.map(|threads| threads.max(1))).code(1)?;
    if let Some(asked) = asked.filter(|asked| threads < *asked) {
        let said = format!(
            "warning: {threads} threads are used: {asked} are more than help, or than the system gives"
        );
        writeln!(std::io::stderr(), "{said}").ok();
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
            Self::Convert(args) => convert::run(&args),
            Self::Bench(args) => say(&bench::run(&args).code(1)?).code(1),
            Self::Pull { model } => {
                let finder = ModelFinder {
                    offline: false,
                    shows_progress: true,
                };
                let folder = finder.pull(&model).code(3)?;
                say(format!("{}\n", folder.display())).code(1)
            }
            Self::Models(args) => say(models::run(&args)).code(1),
            Self::Completions { shell } => {
                let mut script = vec![];
                clap_complete::generate(shell, &mut Cli::command(), "sdgen", &mut script);
                say(script).code(1)
            }
            Self::Man => help::man(),
            Self::Help { topic } => help::help(topic.as_deref()),
        }
    }
}
