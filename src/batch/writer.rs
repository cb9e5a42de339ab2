//! Writes files beside the drawing of the next images.

use crate::batch::output_path::{self, DiskFull};
use crate::batch::report::{OrderedReport, Outcome, Timings};
use crate::batch::work_list::{Task, WorkList};
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
    /// Whether files that are there may be replaced.
    pub overwrite: bool,
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
    /// Set when nothing more can be written.
    pub is_full: &'a AtomicBool,
    pub on_event: &'a (dyn Fn(WriteEvent) + Sync),
}

impl<'a> ImageWriter<'a> {
    /// Takes images until no more come. Errors are those after which no other image can be written
    /// either.
    pub fn run(&mut self, images: Receiver<(&'a Task, Result<Generated>)>) -> Result<()> {
        let mut ended = Ok(());
        for (task, drawn) in images {
            if !self.is_full.load(Ordering::Relaxed) {
                ended = self.take(task, drawn);
                self.is_full.store(ended.is_err(), Ordering::Relaxed);
            }
        }
        ended.and(self.report.finish())
    }

    fn take(&mut self, task: &'a Task, drawn: Result<Generated>) -> Result<()> {
        match drawn.and_then(|drawn| self.save(task, drawn)) {
            Ok(outcome) => {
                self.summary.saved += 1;
                self.report.add(task, Some(outcome))
            }
            Err(error) if error.is::<DiskFull>() => Err(error),
            Err(mut error) => {
                self.summary.failed += 1;
                if self.work.tasks.len() > 1 {
                    error = error.context(self.work.place(task));
                }
                (self.on_event)(WriteEvent::Failed(task, &error));
                self.summary.first_failure.get_or_insert(error);
                self.report.add(task, None)
            }
        }
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
            skipped: false,
        })
    }
}
