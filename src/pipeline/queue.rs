//! The images that are left to generate, and how they become batches.

use super::job::Job;
use anyhow::{Error, Result};
use std::collections::VecDeque;

/// How many jobs a batch looks ahead for others that fit beside its first; the prompts of as many
/// are encoded together.
pub const LOOKAHEAD: usize = 128;

/// A job and its place in the run, from 0.
#[derive(Clone, Copy)]
pub struct Queued<'a> {
    pub index: usize,
    pub job: &'a Job,
}

/// The jobs that are left.
pub struct BatchQueue<'a> {
    jobs: VecDeque<Queued<'a>>,
    /// parts of batches that failed or were split, the next one last
    again: Vec<Vec<Queued<'a>>>,
    batch_size: usize,
}

impl<'a> BatchQueue<'a> {
    /// All jobs of a run, which become batches of at most `batch_size`.
    pub fn new(jobs: &[&'a Job], batch_size: usize) -> Self {
        let queued = |(index, job): (usize, &&'a Job)| Queued { index, job };
        Self {
            jobs: jobs.iter().enumerate().map(queued).collect(),
            again: vec![],
            batch_size,
        }
    }

    /// How many jobs are left.
    pub fn remaining(&self) -> usize {
        self.jobs.len() + self.again.iter().map(Vec::len).sum::<usize>()
    }

    /// The jobs that are left, about in their order.
    pub fn iter(&self) -> impl Iterator<Item = &'a Job> {
        self.again
            .iter()
            .flatten()
            .chain(&self.jobs)
            .map(|queued| queued.job)
    }

    /// The jobs that come next, as far as batches look ahead.
    pub fn upcoming(&self) -> impl Iterator<Item = &'a Job> {
        self.jobs.iter().take(LOOKAHEAD).map(|queued| queued.job)
    }

    /// Whether there are more jobs than batches look ahead.
    pub fn is_long(&self) -> bool {
        self.jobs.len() > LOOKAHEAD
    }

    /// Takes the first job that is left, with those of the next that can be denoised beside it.
    pub fn next_batch(&mut self) -> Option<Vec<Queued<'a>>> {
        if let Some(batch) = self.again.pop() {
            return Some(batch);
        }
        let first = self.jobs.pop_front()?;
        let mut batch = vec![first];
        let mut i = 0;
        while batch.len() < self.batch_size && i < LOOKAHEAD {
            match self.jobs.get(i) {
                None => break,
                Some(next) if next.job.packs_with(first.job) => batch.extend(self.jobs.remove(i)),
                Some(_) => i += 1,
            }
        }
        Some(batch)
    }

    /// Keeps the jobs whose `key` equals the first job's, and returns the rest to the queue.
    pub fn take_matching(
        &mut self,
        batch: Vec<Queued<'a>>,
        key: impl Fn(&Job) -> Result<usize>,
    ) -> Result<Vec<Queued<'a>>> {
        let mut first = None;
        let (mut matching, mut others) = (vec![], vec![]);
        for queued in batch {
            let key = key(queued.job)?;
            if *first.get_or_insert(key) == key {
                matching.push(queued);
            } else {
                others.push(queued);
            }
        }
        self.again
            .extend(Some(others).filter(|others| !others.is_empty()));
        Ok(matching)
    }

    /// Takes back a batch that failed, in halves, so that its other images are generated; returns
    /// the error with the job where there was only one.
    pub fn put_back(
        &mut self,
        mut batch: Vec<Queued<'a>>,
        error: Error,
    ) -> Option<(Queued<'a>, Error)> {
        if let [queued] = batch[..] {
            return Some((queued, error));
        }
        let second = batch.split_off(batch.len().div_ceil(2));
        self.again.extend([second, batch]);
        None
    }

    /// Makes all later batches at most this large.
    pub fn limit(&mut self, batch_size: usize) {
        self.batch_size = batch_size;
    }
}
