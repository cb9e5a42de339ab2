//! Ctrl-C and SIGTERM: the first asks the run to end after the pictures under way, the second ends
//! it at once.

#[cfg(unix)]
use crate::batch::output_path;
use crate::cli::progress::Progress;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The exit code of an interrupted run.
pub const EXIT_CODE: u8 = 130;

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Whether the run was asked to end.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

/// Starts to listen for the signals; the first is answered with what is `said`. Errors if the system does
/// not allow it.
#[cfg(unix)]
pub fn listen(progress: &Arc<Progress>, said: &'static str) -> std::io::Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
    let progress = progress.clone();
    std::thread::Builder::new().spawn(move || {
        for _ in signals.forever() {
            if REQUESTED.swap(true, Ordering::Relaxed) {
                let _saved = output_path::hold_saves();
                signal_hook::low_level::exit(EXIT_CODE.into());
            }
            progress.note(said);
        }
    })?;
    Ok(())
}

/// Has a file that grows beyond `ulimit -f` fail to be written, where the signal for it would end
/// the process and leave what there is of the file.
pub fn take_file_limits_for_errors() {
    #[cfg(unix)]
    {
        let nobody_asks = Arc::new(AtomicBool::new(false));
        // where the signal cannot be caught, the process ends as it would have
        signal_hook::flag::register(signal_hook::consts::SIGXFSZ, nobody_asks).ok();
    }
}

/// Ends the process without running anything more of it.
pub fn end_at_once(code: u8) {
    #[cfg(unix)]
    signal_hook::low_level::exit(code.into());
    #[cfg(not(unix))]
    std::process::exit(code.into());
}

/// Elsewhere the system ends the program at once; no half picture is left under a name then either.
#[cfg(not(unix))]
pub fn listen(_: &Arc<Progress>, _: &'static str) -> std::io::Result<()> {
    Ok(())
}
