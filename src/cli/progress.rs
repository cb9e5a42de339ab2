//! What is said while drawing, always on stderr: a bar and lines for people, or events for
//! programs.
//!
//! `--progress json` writes one JSON object a line, each with its `event`; pictures are known by
//! `index`, their place in the whole work list from 0:
//!
//! | event | with |
//! | --- | --- |
//! | `start` | `jobs`: how many pictures there are to draw |
//! | `stage` | `name` |
//! | `step` | `index`, `step` (from 1), `of`, `remaining_s`: about the seconds to the end of the run |
//! | `picture` | `index`, `path` (null for stdout), `seconds` of drawing it |
//! | `failed` | `index`, `error` |
//! | `note` | `text`: what a person would be told, the error that ends the run too |
//! | `end` | `saved`, `failed`, `skipped`, `seconds` of the whole run; always the last line |

use crate::batch::step_images::StepImages;
use crate::cli::escape::escaped;
use crate::cli::terminal::Terminal;
use crate::image::Image;
use crate::pipeline::event::Event;
use candle_core::Result as TensorResult;
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// `--progress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProgressMode {
    /// a bar if stderr is a terminal
    Auto,
    Bar,
    Json,
    None,
}

/// Previews come no more often: a step of a small model takes less time than a terminal needs.
const PREVIEW_INTERVAL: Duration = Duration::from_millis(100);

/// Says what is going on; may be shared by threads.
pub struct Progress {
    show: Show,
    /// where pictures are shown, if they are
    terminal: Option<Terminal>,
    /// lines of the preview right above the bar
    preview_rows: AtomicUsize,
    quiet: bool,
    verbose: bool,
    /// The files of `--save-steps`.
    steps: OnceLock<StepImages>,
    /// Whether saving a step has failed, which is said once.
    steps_failed: AtomicBool,
    now: Mutex<Now>,
}

enum Show {
    Bar(ProgressBar),
    Events,
    Lines,
}

#[derive(Default)]
struct Now {
    stage: Option<(String, Instant)>,
    /// index of every picture in the batch under way
    batch: Vec<usize>,
    /// which pictures of how many, for people
    title: String,
    previewed: Option<Instant>,
    /// denoising steps of the batch, as far as previews came
    step: usize,
    run: Run,
}

/// How far the whole run is, in any unit of work.
#[derive(Default)]
struct Run {
    /// of every picture, by its index
    costs: HashMap<usize, f64>,
    /// pictures whose batch has begun
    begun: HashSet<usize>,
    total: f64,
    /// of all batches but the one under way
    done: f64,
    batch: f64,
    start: Option<Instant>,
}

impl Run {
    /// A batch begins. Pictures of one that failed may come again.
    fn begin(&mut self, indices: &[usize]) {
        self.start.get_or_insert_with(Instant::now);
        self.done += std::mem::take(&mut self.batch);
        for index in indices {
            let cost = self.costs.get(index).copied().unwrap_or(0.0);
            self.batch += cost;
            if !self.begun.insert(*index) {
                self.done -= cost;
            }
        }
    }

    /// Seconds until the end, where a part of the batch under way is done; `None` if nothing is
    /// known of the run.
    fn remaining_s(&self, part: f64) -> Option<f64> {
        let done = self.done + part * self.batch;
        let elapsed_s = self.start?.elapsed().as_secs_f64();
        (done > 0.0).then(|| elapsed_s * (self.total - done).max(0.0) / done)
    }
}

impl Progress {
    /// Chooses what is shown by the options and by where stderr goes.
    pub fn new(mode: ProgressMode, quiet: bool, verbose: bool) -> Self {
        let show = match mode {
            ProgressMode::Json => Show::Events,
            ProgressMode::Auto if quiet || !std::io::stderr().is_terminal() => Show::Lines,
            ProgressMode::None => Show::Lines,
            ProgressMode::Auto | ProgressMode::Bar => {
                let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
                bar.enable_steady_tick(Duration::from_millis(200));
                Show::Bar(bar)
            }
        };
        Self {
            show,
            terminal: None,
            preview_rows: AtomicUsize::new(0),
            quiet,
            verbose,
            steps: OnceLock::new(),
            steps_failed: AtomicBool::new(false),
            now: Mutex::default(),
        }
    }

    /// Shows pictures there too.
    pub fn showing(self, terminal: Option<Terminal>) -> Self {
        Self { terminal, ..self }
    }

    /// Saves previews from now on, too.
    pub fn save_steps(&self, steps: StepImages) {
        // there is one list of jobs in a run
        self.steps.set(steps).ok();
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An event for programs: `fields` is an object.
    pub fn event(&self, name: &str, fields: Value) {
        if let (Show::Events, Value::Object(fields)) = (&self.show, fields) {
            let mut event = serde_json::Map::from_iter([("event".to_string(), name.into())]);
            event.extend(fields);
            write_line(&Value::Object(event).to_string());
        }
    }

    /// Notes what each picture of the run costs, by its index, so that the time to the end is known.
    pub fn plan(&self, costs: HashMap<usize, f64>) {
        let total = costs.values().sum();
        self.now().run = Run {
            costs,
            total,
            ..Run::default()
        };
    }

    /// Starts a stage; with `-v` the one before is reported with its time.
    pub fn stage(&self, name: &str) {
        self.end_stage();
        if let Show::Bar(bar) = &self.show {
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
                bar.set_style(style);
            }
            bar.set_message(escaped(name).into_owned());
        }
        self.now().stage = Some((name.to_string(), Instant::now()));
        self.event("stage", json!({ "name": name }));
    }

    /// Starts a stage whose steps are shown but are not denoising steps.
    pub fn task(&self, title: &str) {
        self.stage(title);
        let mut now = self.now();
        (now.title, now.batch) = (title.into(), vec![]);
    }

    /// Starts to draw a batch: the index of each picture, and how many of how many pictures came
    /// before.
    pub fn batch(&self, indices: Vec<usize>, before: usize, total: usize) {
        self.stage("drawing");
        let mut now = self.now();
        now.title = match indices.len() {
            _ if total == 1 => "drawing".into(),
            1 => format!("drawing {} of {total}", before + 1),
            n => format!("drawing {}-{} of {total}", before + 1, before + n),
        };
        now.run.begin(&indices);
        now.batch = indices;
        now.step = 0;
    }

    /// One denoising step of `total` is done.
    pub fn step(&self, done: usize, total: usize) {
        let now = self.now();
        let elapsed_s = now
            .stage
            .as_ref()
            .map_or(0.0, |(_, start)| start.elapsed().as_secs_f64());
        let per_step = elapsed_s / done.max(1) as f64;
        let of_batch = per_step * total.saturating_sub(done) as f64;
        let of_run = now.run.remaining_s(done as f64 / total.max(1) as f64);
        let left = of_run.unwrap_or(of_batch);
        for index in &now.batch {
            let fields = json!({ "index": index, "step": done, "of": total, "remaining_s": left });
            self.event("step", fields);
        }
        let Show::Bar(bar) = &self.show else { return };
        if bar.length() != Some(total as u64) {
            bar.set_length(total as u64);
        }
        if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len}") {
            bar.set_style(style);
        }
        bar.set_position(done as u64);
        let left = in_words(left);
        bar.set_message(format!(
            "{}, {per_step:.2} s a step, {left} left",
            now.title
        ));
    }

    /// Shows a finished picture, in the place of a preview. It is drawn and saved by then: an error
    /// is no reason to stop.
    pub fn show(&self, picture: &Image) {
        let Some(terminal) = &self.terminal else {
            return;
        };
        if let Ok((text, _)) = terminal.draw(picture, picture.width, picture.height, false) {
            self.overwrite(terminal, &text, 0);
        }
    }

    /// Shows in one place what the pictures of a batch, of `width` x `height` together, will be, if
    /// there is a bar; and saves them if the steps are saved.
    pub fn preview(
        &self,
        width: usize,
        height: usize,
        picture: impl FnOnce() -> TensorResult<Image>,
    ) {
        let (indices, step) = {
            let mut now = self.now();
            now.step += 1;
            (now.batch.clone(), now.step)
        };
        let steps = self.steps.get().filter(|steps| steps.takes(step));
        let terminal = self.terminal_for_preview();
        if steps.is_none() && terminal.is_none() {
            return;
        }
        let Ok(picture) = picture() else {
            return;
        };
        if let Some(steps) = steps
            && let Err(error) = steps.save(&indices, step, &picture)
            && !self.steps_failed.swap(true, Ordering::Relaxed)
        {
            self.note(format!("warning: a step is not saved: {error:#}"));
        }
        if let Some(terminal) = terminal
            && let Ok((text, rows)) = terminal.draw(&picture, width, height, true)
        {
            self.overwrite(terminal, &text, rows);
        }
    }

    /// The terminal, if it is time for a preview there.
    fn terminal_for_preview(&self) -> Option<&Terminal> {
        let (Some(terminal), Show::Bar(_), false) = (&self.terminal, &self.show, self.quiet) else {
            return None;
        };
        let mut now = self.now();
        let is_time = now
            .previewed
            .is_none_or(|before| before.elapsed() >= PREVIEW_INTERVAL);
        if !is_time || !terminal.can_overwrite() || !std::io::stderr().is_terminal() {
            return None;
        }
        now.previewed = Some(Instant::now());
        Some(terminal)
    }

    /// Writes over the preview; what is written is one of so many lines, or stays.
    fn overwrite(&self, terminal: &Terminal, text: &str, rows: usize) {
        let write = || {
            let before = match self.preview_rows.swap(rows, Ordering::Relaxed) {
                0 => String::new(),
                before => terminal.erase(before),
            };
            write!(std::io::stderr(), "{before}{text}").ok();
        };
        match &self.show {
            Show::Bar(bar) => bar.suspend(write),
            _ => write(),
        }
    }

    /// Shows what a pipeline tells. `index` gives the place in the whole work list of an image of
    /// the run.
    pub fn show_event(&self, event: &Event, index: impl Fn(usize) -> usize) {
        match event {
            Event::Stage(name) => self.stage(name),
            Event::Batch {
                images,
                before,
                total,
            } => {
                self.batch(
                    images.iter().map(|image| index(*image)).collect(),
                    *before,
                    *total,
                );
            }
            Event::Step { done, total } => self.step(*done, *total),
            Event::Preview(preview) => {
                self.preview(preview.width, preview.height, || preview.image());
            }
            Event::Warning(text) => self.note(format!("warning: {text}")),
            _ => {}
        }
    }

    /// Lets others write to the terminal. A preview stays there, and the next begins below.
    pub fn aside<R>(&self, write: impl FnOnce() -> R) -> R {
        match &self.show {
            Show::Bar(bar) => bar.suspend(|| {
                self.preview_rows.store(0, Ordering::Relaxed);
                write()
            }),
            _ => write(),
        }
    }

    /// A line for the person, unless `--quiet`.
    pub fn note(&self, line: impl AsRef<str>) {
        if !self.quiet {
            self.say(line.as_ref());
        }
    }

    /// A line only with `--verbose`.
    pub fn detail(&self, line: impl AsRef<str>) {
        if self.verbose {
            self.say(line.as_ref());
        }
    }

    /// Prints a line that must be seen, such as an error.
    pub fn say(&self, text: &str) {
        match &self.show {
            Show::Events => self.event("note", json!({ "text": text })),
            Show::Bar(_) | Show::Lines => self.aside(|| write_line(text)),
        }
    }

    fn end_stage(&self) {
        if let Some((name, start)) = self.now().stage.take() {
            self.detail(format!("{name}: {:.2} s", start.elapsed().as_secs_f64()));
        }
    }

    /// Nothing more is drawn: clears the bar.
    pub fn finish(&self) {
        self.end_stage();
        if let Some(terminal) = &self.terminal {
            self.overwrite(terminal, "", 0);
        }
        if let Show::Bar(bar) = &self.show {
            bar.finish_and_clear();
        }
    }
}

/// A time in the two units that tell most of it: `48 s`, `3 min 20 s`, `2 h 5 min`.
pub fn in_words(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match seconds {
        0..100 => format!("{seconds} s"),
        100..6000 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// Writes a line to stderr; the run goes on if nobody reads it any more.
fn write_line(text: &str) {
    writeln!(std::io::stderr(), "{}", escaped(text)).ok();
}
