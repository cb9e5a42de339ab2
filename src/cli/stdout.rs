//! stdout carries data only: paths, JSON and tables.

use crate::cli::escape::escaped;
use anyhow::{Context, Result, ensure};
use std::io::{ErrorKind, IsTerminal, Write, stdout};
use std::sync::atomic::{AtomicBool, Ordering};

static CLOSED: AtomicBool = AtomicBool::new(false);

/// Prints text; a reader that went away (`| head -1`) is not an error, but see [`is_closed`].
pub fn say(text: impl AsRef<[u8]>) -> Result<()> {
    let (text, mut stdout) = (text.as_ref(), stdout().lock());
    let written = if stdout.is_terminal() {
        stdout.write_all(escaped(&String::from_utf8_lossy(text)).as_bytes())
    } else {
        stdout.write_all(text)
    };
    match written.and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => {
            CLOSED.store(true, Ordering::Relaxed);
            Ok(())
        }
        other => other.context("cannot write to stdout"),
    }
}

/// Errors if what is written would be shown: a terminal cannot take a picture's bytes.
pub fn require_no_terminal() -> Result<()> {
    ensure!(
        !stdout().is_terminal(),
        "`-o -` would write the bytes of a picture to the terminal\n\nhint: send them on with `| display` or `> picture.png`; `sdgen --show` draws in the terminal"
    );
    Ok(())
}

/// Whether the reader of what is printed has gone away, so that more of it is in vain.
pub fn is_closed() -> bool {
    CLOSED.load(Ordering::Relaxed)
}
