//! Writes files beside the drawing of the next images.

use crate::batch::output_path::{self, DiskFull, Overwrite};
use crate::batch::report::{OrderedReport, Outcome, Timings};
use crate::batch::work_list::{Task, WorkList};
use crate::error;
use crate::pipeline::event::Generated;
use anyhow::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;

/// Images that may wait to be written; the drawing waits then.
pub const QUEUE_LENGTH: usize = 4;

/// The number of images that were saved, failed or skipped.
#[derive(Default)]
pub struct Summary {
    pub saved: usize,
    pub failed: usize,
    pub skipped: usize,
    pub first_failure: Option<Error>,
}

/// How images are written.
#[derive(Debug, Clone, Copy)]
pub struct WriteOptions {
    /// Whether a file remembers how it was drawn.
    pub metadata: bool,
    /// Which files may be replaced.
    pub overwrite: Overwrite,
}

/// An event of an [`ImageWriter`].
pub enum WriteEvent<'a> {
    /// The image has one colour everywhere.
    IsFlat(&'a Task),
    Saved(&'a Task, &'a Generated),
    Failed(&'a Task, &'a Error),
}

/// Encodes and saves images, and reports them in the order of the list.
pub struct ImageWriter<'a> {
    pub options: WriteOptions,
    pub work: &'a WorkList,
    pub report: OrderedReport<'a>,
    pub summary: &'a mut Summary,
    /// Set when nothing more can be written or reported.
    pub has_ended: &'a AtomicBool,
    pub on_event: &'a (dyn Fn(WriteEvent) + Sync),
}

impl<'a> ImageWriter<'a> {
    /// Takes images until no more come. Errors are those after which no other image can be written
    /// or reported either; after the latter, images that were under way are saved all the same.
    pub fn run(&mut self, images: Receiver<(&'a Task, Result<Generated>)>) -> Result<()> {
        let (mut ended, mut is_full) = (Ok(()), false);
        for (task, drawn) in images {
            if is_full {
                continue;
            }
            if let Err(error) = self.take(task, drawn) {
                is_full = error.is::<DiskFull>();
                self.has_ended.store(true, Ordering::Relaxed);
                ended = ended.and(Err(error));
            }
        }
        let reported = self.report.finish();
        ended.and(reported)
    }

    fn take(&mut self, task: &'a Task, drawn: Result<Generated>) -> Result<()> {
        let mut error = match drawn.and_then(|drawn| self.save(task, drawn)) {
            Ok(outcome) => {
                self.summary.saved += 1;
                return self.report.add(task, Some(outcome));
            }
            Err(error) => error,
        };
        let outcome = Outcome {
            error: Some(error::split(&error).0),
            ..Outcome::default()
        };
        if error.is::<DiskFull>() {
            // it is the reason why the run ends, whatever becomes of the report
            self.report.add(task, Some(outcome)).ok();
            return Err(error);
        }
        self.summary.failed += 1;
        if self.work.tasks.len() > 1 {
            error = error.context(self.work.place(task));
        }
        (self.on_event)(WriteEvent::Failed(task, &error));
        self.summary.first_failure.get_or_insert(error);
        self.report.add(task, Some(outcome))
    }

    fn save(&self, task: &Task, drawn: Generated) -> Result<Outcome> {
        if drawn.image.is_flat() {
            (self.on_event)(WriteEvent::IsFlat(task));
        }
        let remembers = self.options.metadata;
        let metadata = remembers.then(|| task.job.settings.metadata(drawn.trace.as_ref()));
        let bytes = drawn.image.encode(task.format, metadata.as_ref())?;
        match &task.path {
            Some(path) => output_path::save(path, &bytes, self.options.overwrite)?,
            None => output_path::write_to_stdout(&bytes)?,
        }
        (self.on_event)(WriteEvent::Saved(task, &drawn));
        let wants_hash = self.report.wants_details();
        Ok(Outcome {
            sha256: wants_hash.then(|| drawn.image.sha256()),
            timings: Some(Timings {
                sampling_s: drawn.sampling_s,
                decoding_s: drawn.decoding_s,
            }),
            trace: drawn.trace,
            ..Outcome::default()
        })
    }
}
