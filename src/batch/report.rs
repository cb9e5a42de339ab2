//! What is said of each image on stdout and in the manifest, in the order of the list, whatever the
//! order in which images are finished.

use crate::batch::output_path::Overwrite;
use crate::batch::work_list::Task;
use crate::pipeline::fingerprint::Trace;
use crate::pipeline::options::field_names;
use crate::pipeline::settings::{Merged, Settings, Source};
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::path::Path;

/// A record is not longer.
const MAX_RECORD_BYTES: u64 = 16 << 20;

/// What became of an image: it is there, or failed.
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
    /// Why there is no image.
    pub error: Option<String>,
}

/// The time that an image took.
#[derive(Debug, Clone, Copy)]
pub struct Timings {
    pub sampling_s: f64,
    pub decoding_s: f64,
}

/// The outcome of each job by its index; `None` for one of which nothing is to be said.
pub type Outcomes = HashMap<usize, Option<Outcome>>;

/// Where lines go: text, but for paths that are not UTF-8.
pub type Print<'a> = dyn Fn(&[u8]) -> Result<()> + Sync + 'a;

/// Marks the error of a record that cannot be written. No image has failed.
#[derive(Debug)]
pub struct ReportFailed;

impl fmt::Display for ReportFailed {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("what is drawn cannot be reported")
    }
}

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
    pub fn open_manifest(&mut self, path: &Path, overwrite: Overwrite) -> Result<()> {
        let mut options = File::options();
        options.write(true);
        match overwrite {
            Overwrite::Never => options.create_new(true),
            Overwrite::Own | Overwrite::All => options.create(true).truncate(true),
        };
        if overwrite == Overwrite::Own {
            ensure!(
                is_manifest(path),
                "`{}` exists already, and is not a manifest\n\nhint: `--force` overwrites it all the same",
                path.display()
            );
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
        let has_failed = outcome.error.is_some();
        let mut record = path.as_os_str().as_encoded_bytes().to_vec();
        record.push(b'\n');
        if self.wants_details {
            let json = format!("{}\n", as_json(path, &task.job.settings, outcome));
            if let Some(manifest) = &mut self.manifest {
                manifest
                    .write_all(json.as_bytes())
                    .context("cannot write the manifest")
                    .context(ReportFailed)?;
            }
            if self.json {
                record = json.into_bytes();
            }
        }
        if has_failed && !self.json {
            return Ok(());
        }
        (self.print)(&record).context(ReportFailed)
    }
}

/// Whether a file is a manifest, as far as its first line tells, is empty or is not there.
fn is_manifest(path: &Path) -> bool {
    let mut line = String::new();
    let read = match File::open(path) {
        Ok(file) => BufReader::new(file.take(MAX_RECORD_BYTES)).read_line(&mut line),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    };
    let is_record =
        || serde_json::from_str(&line).is_ok_and(|record: Value| record.get("path").is_some());
    read.is_ok_and(|bytes| bytes == 0 || is_record())
}

/// One line of `--json`: every key is there, null where there is nothing to say.
/// `assets/docs/records.schema.json` describes it.
fn as_json(path: &Path, settings: &Settings, outcome: Outcome) -> Value {
    let Outcome {
        sha256,
        timings,
        trace,
        skipped,
        error,
    } = outcome;
    let mut record = Map::new();
    record.insert("path".into(), path.to_string_lossy().into());
    record.insert("sha256".into(), sha256.into());
    if let Value::Object(settings) = json!(settings) {
        record.extend(settings);
    }
    fill::<Settings>(&mut record);
    if let Some(Value::Object(source)) = record.get_mut("source") {
        fill::<Source>(source);
    }
    for list in ["loras", "embeddings", "merges", "references"] {
        if record.get(list).is_some_and(Value::is_null) {
            record.insert(list.into(), json!([]));
        }
    }
    for merged in record
        .get_mut("merges")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        if let Value::Object(merged) = merged {
            fill::<Merged>(merged);
        }
    }
    // many readers of JSON keep no more than 53 bits of a number
    record.insert("seed_text".into(), settings.seed.to_string().into());
    let timings = timings.map(
        |Timings {
             sampling_s,
             decoding_s,
         }| { json!({ "sampling_s": sampling_s, "decoding_s": decoding_s }) },
    );
    record.insert("timings".into(), timings.into());
    record.insert(Trace::KEY.into(), json!(trace));
    record.insert("skipped".into(), skipped.then_some(true).into());
    record.insert("error".into(), error.into());
    Value::Object(record)
}

/// Adds the fields of a type that an object lacks: false for the one flag, null for all others.
fn fill<'de, T: Deserialize<'de>>(object: &mut Map<String, Value>) {
    for name in field_names::<T>() {
        let unset = if *name == "alpha" {
            false.into()
        } else {
            Value::Null
        };
        object.entry(*name).or_insert(unset);
    }
}
