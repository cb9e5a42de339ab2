//! The `sdgen` command: parse, run, exit with the code.

use std::process::ExitCode;

#[global_allocator]
static MEMORY: sdgen::Reuse = sdgen::Reuse;

fn main() -> ExitCode {
    sdgen::main()
}
