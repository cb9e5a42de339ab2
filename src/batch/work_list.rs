//! The images of a run, fully decided, with the file that each goes to.

use super::jobs::{JobList, JobSpec, SweepPoint};
use super::output_path::{Naming, plan_paths};
use crate::image::Format;
use crate::pipeline::Pipeline;
use crate::pipeline::job::Job;
use crate::pipeline::resolve::{Params, Resolver};
use crate::pipeline::settings::Settings;
use anyhow::{Context, Result, bail};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Characters of a prompt that name an image in messages.
const PROMPT_START: usize = 60;

/// One image of a run.
#[derive(Debug, Clone)]
pub struct Task {
    /// Its place in the whole work list, from 0, of which a shard may have a part.
    pub index: usize,
    /// Its line in the list that it comes from, from 1.
    pub line: Option<usize>,
    pub job: Job,
    /// Where it goes; `None` for stdout.
    pub path: Option<PathBuf>,
    pub format: Format,
}

impl Task {
    /// About how much work it is: the network's runs, and the decoding as five more, times pixels. The
    /// network sees those of reference pictures too.
    pub fn cost(&self) -> u64 {
        let Job {
            settings, guidance, ..
        } = &self.job;
        let runs = self.job.evaluations() * guidance.passes();
        let own = settings.width * settings.height;
        let references = settings.references.iter();
        let seen: usize = references.map(|it| it.width * it.height).sum();
        (runs * (own + seen) + 5 * own) as u64
    }
}

/// The images of a run.
pub struct WorkList {
    pub tasks: Vec<Task>,
    /// What [`Task::line`] counts in.
    name: String,
}

impl WorkList {
    /// Decides every image of a list. Errors name the option that is wrong and what it may be, and
    /// the line of the list.
    pub fn resolve(list: &JobList, pipeline: &Pipeline) -> Result<Self> {
        let mut resolver = Resolver::new(pipeline)?;
        let mut tasks = vec![];
        for (index, spec) in list.jobs.iter().enumerate() {
            let JobSpec { line, output, .. } = *spec;
            let job = list.of_line(line, resolver.resolve(&Params::from(spec)))?;
            let (_, format) = list
                .outputs
                .get(output)
                .context("an image has no destination")?;
            let format = *format;
            tasks.push(Task {
                index,
                line,
                job,
                path: None,
                format,
            });
        }
        let name = list.name.clone();
        let mut work = Self { tasks, name };
        work.name_files(list)?;
        Ok(work)
    }

    /// The jobs of all images.
    pub fn jobs(&self) -> Vec<&Job> {
        self.tasks.iter().map(|task| &task.job).collect()
    }

    /// Gives every image its path. Errors if two would have one.
    fn name_files(&mut self, list: &JobList) -> Result<()> {
        let mut by_output = vec![vec![]; list.outputs.len()];
        for (index, spec) in list.jobs.iter().enumerate() {
            if let Some(indices) = by_output.get_mut(spec.output) {
                indices.push(index);
            }
        }
        let mut taken: HashMap<PathBuf, usize> = HashMap::new();
        for ((destination, format), indices) in list.outputs.iter().zip(by_output) {
            let pair = |&i: &usize| Some((self.tasks.get(i)?, list.jobs.get(i)?));
            let pairs = indices.iter().filter_map(pair);
            let namings: Vec<Naming> = pairs
                .map(|(task, spec)| naming(task, &spec.sweep))
                .collect();
            let paths = plan_paths(destination, *format, &namings)?;
            for (index, path) in indices.into_iter().zip(paths) {
                let first = taken.insert(path.clone(), index);
                if let Some(first) = first.filter(|_| list.outputs.len() > 1) {
                    let place = |i: usize| self.tasks.get(i).map(|task| self.place(task));
                    bail!(
                        "{} and {} would both be `{}`\n\nhint: give each its own `output`",
                        place(first).unwrap_or_default(),
                        place(index).unwrap_or_default(),
                        path.display()
                    );
                }
                if let Some(task) = self.tasks.get_mut(index) {
                    task.path = Some(path);
                }
            }
        }
        Ok(())
    }

    /// Where an image was asked for, for people: ``line 3 of `jobs.txt` (`a frog`, seed 7)``.
    pub fn place(&self, task: &Task) -> String {
        let Settings { prompt, seed, .. } = &task.job.settings;
        let start: String = prompt.chars().take(PROMPT_START).collect();
        let dots = if start.len() < prompt.len() {
            "..."
        } else {
            ""
        };
        match task.line {
            Some(line) => {
                format!(
                    "line {line} of {} (`{start}{dots}`, seed {seed})",
                    self.name
                )
            }
            None => format!("`{start}{dots}`, seed {seed}"),
        }
    }
}

impl From<&JobSpec> for Params {
    fn from(spec: &JobSpec) -> Self {
        Self {
            prompt: spec.prompt.clone(),
            seed: spec.seed,
            blend: spec.blend(),
            variation: spec.variation(),
            options: spec.options.clone(),
        }
    }
}

fn naming<'a>(task: &'a Task, sweep: &'a SweepPoint) -> Naming<'a> {
    let settings = &task.job.settings;
    let SweepPoint { name, frame, .. } = sweep;
    let stem = |image: &'a str| Path::new(image).file_stem()?.to_str();
    Naming {
        prompt: &settings.prompt,
        negative: &settings.negative,
        seed: settings.seed,
        index: task.index,
        model: &settings.model,
        width: settings.width,
        height: settings.height,
        steps: settings.steps,
        guidance: settings.guidance,
        sampler: settings.sampler.name(),
        sweep: name,
        frame: frame.map(|frame| frame.number),
        image: settings
            .source
            .as_ref()
            .and_then(|source| stem(&source.image))
            .unwrap_or_default(),
    }
}
