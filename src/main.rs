//! The `sdgen` command: parse, run, exit with the code.

use std::process::ExitCode;

#[global_allocator]
static MEMORY: sdgen::alloc::Reuse = sdgen::alloc::Reuse;

fn main() -> ExitCode {
    ExitCode::from(sdgen::cli::run())
}
