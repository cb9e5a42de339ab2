//! stdout carries data only: paths, JSON and tables.

use anyhow::{Context, Result};
use std::io::{ErrorKind, Write, stdout};

/// Prints text; a reader that went away (`| head -1`) is not an error.
pub fn say(text: &str) -> Result<()> {
    match stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to stdout"),
    }
}
