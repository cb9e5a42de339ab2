//! Ctrl-C and SIGTERM: the first asks the run to end after the pictures under way, the second ends
//! it at once.

use crate::cli::progress::Progress;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the program exits with.
pub const EXIT_CODE: u8 = 130;

static REQUESTED: AtomicBool = AtomicBool::new(false);
static SAVING: Mutex<()> = Mutex::new(());

/// Whether the run was asked to end.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

/// While this is held, the program does not end: a file is being written, and nothing of it may be
/// left over.
pub fn hold_off() -> MutexGuard<'static, ()> {
    SAVING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Listens from now on. Errors if the system does not let it.
#[cfg(unix)]
pub fn listen(progress: &Arc<Progress>) -> std::io::Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
    let progress = progress.clone();
    std::thread::spawn(move || {
        for _ in signals.forever() {
            if REQUESTED.swap(true, Ordering::Relaxed) {
                let _saved = hold_off();
                signal_hook::low_level::exit(EXIT_CODE.into());
            }
            progress.note("finishing the picture under way; the same again stops at once");
        }
    });
    Ok(())
}

/// Elsewhere the system ends the program at once; no half picture is left under a name then either.
#[cfg(not(unix))]
pub fn listen(_: &Arc<Progress>) -> std::io::Result<()> {
    Ok(())
}
