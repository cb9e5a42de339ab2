//! What the person sees while waiting: a bar on a terminal, stage lines with `-v`, always on stderr.

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// `--progress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProgressMode {
    /// a bar if stderr is a terminal
    Auto,
    Bar,
    None,
}

/// Says what is going on, to a person.
pub struct Progress {
    bar: Option<ProgressBar>,
    quiet: bool,
    verbose: bool,
    stage: Option<(String, Instant)>,
}

impl Progress {
    /// By the options and by where stderr goes.
    pub fn new(mode: ProgressMode, quiet: bool, verbose: bool) -> Self {
        let shown = match mode {
            ProgressMode::Auto => !quiet && std::io::stderr().is_terminal(),
            ProgressMode::Bar => true,
            ProgressMode::None => false,
        };
        let bar = shown.then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self { bar, quiet, verbose, stage: None }
    }

    /// Whether a bar is drawn.
    pub fn shows_bar(&self) -> bool {
        self.bar.is_some()
    }

    /// Starts a stage; with `-v` the one before is reported with its time.
    pub fn stage(&mut self, name: impl Into<String>) {
        self.end_stage();
        let name = name.into();
        if let Some(bar) = &self.bar {
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
                bar.set_style(style);
            }
            bar.set_message(name.clone());
        }
        self.stage = Some((name, Instant::now()));
    }

    /// One denoising step of `total` is done.
    pub fn step(&mut self, done: usize, total: usize) {
        let Some(bar) = &self.bar else { return };
        let elapsed_s = self.stage.as_ref().map_or(0.0, |(_, start)| start.elapsed().as_secs_f64());
        let per_step = elapsed_s / done.max(1) as f64;
        if bar.length() != Some(total as u64) {
            bar.set_length(total as u64);
        }
        if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len}") {
            bar.set_style(style);
        }
        bar.set_position(done as u64);
        let left = per_step * total.saturating_sub(done) as f64;
        bar.set_message(format!("drawing, {per_step:.2} s a step, {left:.0} s left"));
    }

    /// A line for the person, unless `--quiet`.
    pub fn note(&self, line: impl AsRef<str>) {
        if !self.quiet {
            self.print(line.as_ref());
        }
    }

    /// A line only with `--verbose`.
    pub fn detail(&self, line: impl AsRef<str>) {
        if self.verbose {
            self.print(line.as_ref());
        }
    }

    fn print(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    fn end_stage(&mut self) {
        if let Some((name, start)) = self.stage.take() {
            self.detail(format!("{name}: {:.2} s", start.elapsed().as_secs_f64()));
        }
    }

    /// Nothing more to come: clears the bar.
    pub fn finish(&mut self) {
        self.end_stage();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
