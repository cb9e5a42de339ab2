//! What is said of each image on stdout and in the manifest, in the order of the list, whatever the
//! order in which images are finished.

use crate::batch::work_list::Task;
use crate::pipeline::fingerprint::Trace;
use crate::pipeline::settings::Settings;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// An image that is there.
#[derive(Default)]
pub struct Outcome {
    /// Hash of the pixels; `None` if nobody asks, or for a JPEG of an earlier run.
    pub sha256: Option<String>,
    /// `None` for an image of an earlier run.
    pub timings: Option<Timings>,
    /// `None` without `--trace`, or for an image of an earlier run without it.
    pub trace: Option<Trace>,
    /// Whether it is of an earlier run.
    pub skipped: bool,
}

/// The time that an image took.
#[derive(Debug, Clone, Copy)]
pub struct Timings {
    pub sampling_s: f64,
    pub decoding_s: f64,
}

/// The outcome of each finished job by its index; `None` for a job that failed.
pub type Outcomes = HashMap<usize, Option<Outcome>>;

/// Where lines of text go.
pub type Print<'a> = dyn Fn(&str) -> Result<()> + Sync + 'a;

/// Reports outcomes in the order of the list.
pub struct OrderedReport<'a> {
    print: &'a Print<'a>,
    /// Whether stdout gets objects instead of paths.
    json: bool,
    /// Whether more than the path is reported.
    wants_details: bool,
    next: std::slice::Iter<'a, Task>,
    /// Outcomes of jobs whose turn has not come.
    outcomes: Outcomes,
    manifest: Option<File>,
}

impl<'a> OrderedReport<'a> {
    /// A report on these jobs, some of which may be finished.
    pub fn new(
        tasks: &'a [Task],
        outcomes: Outcomes,
        json: bool,
        wants_details: bool,
        print: &'a Print<'a>,
    ) -> Self {
        Self {
            print,
            json,
            wants_details,
            next: tasks.iter(),
            outcomes,
            manifest: None,
        }
    }

    /// Whether the hashes of images are wanted.
    pub fn wants_details(&self) -> bool {
        self.wants_details
    }

    /// Writes a line for each image into a file, too. Errors if it is there and may not be
    /// overwritten.
    pub fn open_manifest(&mut self, path: &Path, overwrite: bool) -> Result<()> {
        let mut options = File::options();
        if overwrite {
            options.write(true).create(true).truncate(true);
        } else {
            options.write(true).create_new(true);
        }
        let file = options
            .open(path)
            .with_context(|| format!("cannot make the manifest `{}`", path.display()))?;
        self.manifest = Some(file);
        Ok(())
    }

    /// The jobs that have no outcome yet.
    pub fn left(&self) -> Vec<&'a Task> {
        let tasks = self.next.as_slice().iter();
        tasks
            .filter(|task| !self.outcomes.contains_key(&task.index))
            .collect()
    }

    /// Takes the outcome of a job and reports all whose turn has come.
    pub fn add(&mut self, task: &Task, outcome: Option<Outcome>) -> Result<()> {
        self.outcomes.entry(task.index).or_insert(outcome);
        self.flush()
    }

    /// Reports all whose turn has come.
    pub fn flush(&mut self) -> Result<()> {
        while let Some(task) = self.next.as_slice().first() {
            let Some(outcome) = self.outcomes.remove(&task.index) else {
                break;
            };
            self.next.next();
            self.report(task, outcome)?;
        }
        Ok(())
    }

    /// Reports what is left, for a run that ends early.
    pub fn finish(&mut self) -> Result<()> {
        while let Some(task) = self.next.next() {
            if let Some(outcome) = self.outcomes.remove(&task.index) {
                self.report(task, outcome)?;
            }
        }
        Ok(())
    }

    fn report(&mut self, task: &Task, outcome: Option<Outcome>) -> Result<()> {
        let (Some(path), Some(outcome)) = (&task.path, outcome) else {
            return Ok(());
        };
        let mut record = format!("{}\n", path.display());
        if self.wants_details {
            let json = format!("{}\n", as_json(path, &task.job.settings, outcome));
            if let Some(manifest) = &mut self.manifest {
                manifest
                    .write_all(json.as_bytes())
                    .context("cannot write the manifest")?;
            }
            if self.json {
                record = json;
            }
        }
        (self.print)(&record)
    }
}

/// One line of `--json`.
fn as_json(path: &Path, settings: &Settings, outcome: Outcome) -> Value {
    let mut record = json!({ "path": path.to_string_lossy() });
    if let (Some(record), Value::Object(settings)) = (record.as_object_mut(), json!(settings)) {
        record.extend(outcome.sha256.map(|hash| ("sha256".into(), hash.into())));
        record.extend(settings);
        let timings = |Timings {
                           sampling_s,
                           decoding_s,
                       }| {
            let timings = json!({ "sampling_s": sampling_s, "decoding_s": decoding_s });
            ("timings".into(), timings)
        };
        record.extend(outcome.timings.map(timings));
        record.extend(outcome.trace.map(|trace| (Trace::KEY.into(), json!(trace))));
        record.extend(outcome.skipped.then(|| ("skipped".into(), true.into())));
    }
    record
}
