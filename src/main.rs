//! The `sdgen` command: parse, run, report an error once, exit with its code.

use clap::Parser;
use std::process::ExitCode;

#[global_allocator]
static MEMORY: sdgen::alloc::Reuse = sdgen::alloc::Reuse;

fn main() -> ExitCode {
    match sdgen::cli::run(sdgen::cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.report();
            ExitCode::from(failure.code)
        }
    }
}
