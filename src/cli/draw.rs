//! The plain command: from arguments to saved images.
//!
//! `run` tells the whole story. What is checked before it is in [`crate::cli::preflight`], what
//! is said to the person in [`crate::cli::announce`]; files are written by [`crate::batch::writer`]
//! beside the drawing of the next images.

use crate::batch::contact_sheet::save_sheet;
use crate::batch::jobs::JobList;
use crate::batch::report::{OrderedReport, Outcome, Outcomes, Print, ReportFailed};
use crate::batch::resume::{self, ResumeOptions};
use crate::batch::step_images::StepImages;
use crate::batch::work_list::{Task, WorkList};
use crate::batch::writer::{ImageWriter, QUEUE_LENGTH, Summary, WriteEvent};
use crate::cli::announce::announce;
use crate::cli::args::{DrawArgs, StepsArg};
use crate::cli::exit_code::{self, Code, Failure};
use crate::cli::model_args::ModelArgs;
use crate::cli::preflight;
use crate::cli::progress::{Progress, ProgressMode, in_words};
use crate::cli::signals;
use crate::cli::stdout::{self, say};
use crate::cli::terminal::Terminal;
use crate::cli::upscale::Upscaler;
use crate::nn::device::{Compute, NO_THREAD, require_memory};
use crate::pipeline::event::{Event, Generated};
use crate::pipeline::job::Job;
use crate::pipeline::{Pipeline, RunOptions};
use crate::weights::Checkpoint;
use crate::weights::file_hash::FileHashes;
use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::Instant;

/// Draws, says how it ends, and returns the exit code.
pub fn draw(args: &DrawArgs) -> u8 {
    let start = Instant::now();
    let (terminal, chosen) = match args.show.map(Terminal::choose).transpose() {
        Ok(terminal) => (terminal, Ok(())),
        Err(error) => (None, Err(error)),
    };
    let progress =
        Arc::new(Progress::new(args.progress, args.quiet, args.verbose).showing(terminal));
    let mut summary = Summary::default();
    let result = chosen
        .code(2)
        .and_then(|()| run(args, &progress, &mut summary));
    progress.finish();
    let seconds = start.elapsed().as_secs_f64();
    progress.detail(format!("all: {seconds:.2} s"));
    if let Err(failure) = &result {
        progress.say(&failure.text());
    }
    let Summary {
        saved,
        failed,
        skipped,
        ..
    } = summary;
    progress.event(
        "end",
        json!({ "saved": saved, "failed": failed, "skipped": skipped, "seconds": seconds }),
    );
    result.map_or_else(|failure| failure.code, |()| 0)
}

fn run(args: &DrawArgs, progress: &Arc<Progress>, summary: &mut Summary) -> Result<(), Failure> {
    let Prepared {
        list,
        notes,
        pipeline,
        upscaler,
        mut work,
        batch_size,
        memory_bytes,
    } = Prepared::new(args)?;
    let finished = finished(args, &mut work);
    let print = |line: &[u8]| progress.aside(|| say(line));
    if args.verify {
        return verify(args, &work, &finished, &print);
    }
    summary.skipped = finished.len();
    if !args.dry_run && !args.no_metadata && finished.len() < work.tasks.len() {
        name_by_files(&pipeline.checkpoint, &mut work, progress).code(3)?;
    }
    let skipped = finished.len();
    let mut report = args.report(&work.tasks, finished, &print);
    let announce = || announce(args, &list, &notes, &work, &pipeline, skipped, progress);
    if args.dry_run {
        announce();
        let left = report.left();
        let jobs: Vec<&Job> = left.iter().map(|task| &task.job).collect();
        let seconds = pipeline.seconds(&jobs);
        return dry_run(&work, &mut report, memory_bytes, seconds, progress);
    }
    let _made = preflight::check_files(args, &list, &work).code(2)?;
    if pipeline.compute.device.is_cpu() {
        require_memory(memory_bytes, pipeline.weight_bytes()).code(4)?;
    }
    if let Some(path) = &args.manifest {
        report
            .open_manifest(path, args.write_options().overwrite)
            .code(2)?;
    }
    let left = report.left();
    save_steps(args, &pipeline, &left, progress).code(2)?;
    announce();
    report.flush().code(1)?;
    signals::listen(
        progress,
        "finishing the picture under way; the same again stops at once",
    )
    .context("cannot listen for signals")
    .code(1)?;
    progress.event("start", json!({ "jobs": left.len() }));
    let costs = left.iter().map(|task| (task.index, task.cost() as f64));
    progress.plan(costs.collect());
    let drawing = Drawing {
        pipeline: &pipeline,
        work: &work,
        batch_size,
        upscaler: upscaler.as_ref(),
        progress,
    };
    let written = drawing.run(args, &left, report, summary)?;
    if let (Some(path), Ok(())) = (&args.grid, &written) {
        save_sheet(path, &list, &work.tasks, args.write_options()).code(1)?;
    }
    end(&list, &work, summary, written, progress)
}

/// Everything that is decided before the first image is drawn.
struct Prepared {
    list: JobList,
    /// What prompts have that is not what it looks like.
    notes: Vec<String>,
    pipeline: Pipeline,
    upscaler: Option<Upscaler>,
    work: WorkList,
    batch_size: usize,
    /// About the memory that drawing needs.
    memory_bytes: u64,
}

impl Prepared {
    /// Reads the list, opens the model and resolves what is asked for.
    fn new(args: &DrawArgs) -> Result<Self, Failure> {
        let mut list = JobList::read(&args.source()).code(2)?;
        preflight::check_options(args, &list).code(2)?;
        let notes = preflight::prompt_notes(&list);
        let model = ModelArgs {
            lora: preflight::take_loras(args, &mut list).code(2)?,
            ..args.model.clone()
        };
        let compute = Compute::choose(args.device, args.dtype).code(2)?;
        let shows_downloads = !args.quiet && args.progress != ProgressMode::Json;
        let checkpoint = model.open(args.strict, shows_downloads).code(3)?;
        let upscaler = args
            .upscale
            .as_deref()
            .map(|asked| Upscaler::asked(asked, &compute))
            .transpose()
            .code(3)?;
        let pipeline = Pipeline::new(checkpoint, compute, args.pipeline_options()).code(2)?;
        let mut work = WorkList::resolve(&list, &pipeline).code(2)?;
        if let Some(shard) = args.shard {
            shard.take(&mut work.tasks).code(2)?;
        }
        let upscaling_bytes = preflight::plan_upscaling(&mut work, upscaler.as_ref()).code(2)?;
        let batch_size = args
            .batch_size
            .unwrap_or_else(|| pipeline.auto_batch_size(&work.jobs()));
        let memory_bytes = pipeline
            .memory_bytes(&work.jobs(), batch_size)
            .max(upscaling_bytes);
        Ok(Self {
            list,
            notes,
            pipeline,
            upscaler,
            work,
            batch_size,
            memory_bytes,
        })
    }
}

impl DrawArgs {
    /// Whether anything more than its path is reported of an image.
    fn wants_details(&self) -> bool {
        self.json || self.manifest.is_some()
    }

    fn report<'a>(
        &self,
        tasks: &'a [Task],
        finished: Outcomes,
        print: &'a Print<'a>,
    ) -> OrderedReport<'a> {
        OrderedReport::new(tasks, finished, self.json, self.wants_details(), print)
    }
}

/// The images that are there already, if these are looked for.
fn finished(args: &DrawArgs, work: &mut WorkList) -> Outcomes {
    if !args.resume && !args.verify {
        return HashMap::new();
    }
    let options = ResumeOptions {
        needs_trace: args.trace,
        wants_hash: args.wants_details(),
        vae_tiling: args.vae_tiling,
    };
    resume::finished(&mut work.tasks, options)
}

/// Tells what A1111 and sites that share models call the files of a model and its VAE: their hashes.
fn name_by_files(checkpoint: &Checkpoint, work: &mut WorkList, progress: &Progress) -> Result<()> {
    const SLOW_BYTES: u64 = 1 << 30;
    let hashes = FileHashes::of_user();
    let hash = |model: &Checkpoint| -> Result<Option<Arc<str>>> {
        let file = model.only_file();
        if let Some(file) = file.filter(|file| file.len >= SLOW_BYTES)
            && hashes.known(file.path()).is_none()
        {
            progress.note(format!(
                "reading `{}` once for its SHA-256, which pictures remember",
                file.path().display()
            ));
        }
        Ok(model.file_hash(&hashes)?.map(Arc::from))
    };
    let model_sha256 = hash(checkpoint)?;
    let vae_sha256 = checkpoint.vae().map(hash).transpose()?.flatten();
    for task in &mut work.tasks {
        let settings = &mut task.job.settings;
        settings.model_sha256.clone_from(&model_sha256);
        settings.vae_sha256.clone_from(&vae_sha256);
    }
    Ok(())
}

/// Has the steps of images saved if they are to be. Errors if that is not possible.
fn save_steps(
    args: &DrawArgs,
    pipeline: &Pipeline,
    tasks: &[&Task],
    progress: &Progress,
) -> Result<()> {
    let Some(StepsArg { folder, every }) = &args.save_steps else {
        return Ok(());
    };
    ensure!(
        pipeline.config.preview.is_some(),
        "no previews are known of this VAE's latents\n\nhint: leave `--save-steps` out"
    );
    progress.save_steps(StepImages::new(
        folder,
        *every,
        tasks,
        args.write_options(),
    )?);
    Ok(())
}

/// Prints the work list, and the memory and time that it needs.
fn dry_run(
    work: &WorkList,
    report: &mut OrderedReport,
    memory_bytes: u64,
    seconds: Option<f64>,
    progress: &Progress,
) -> Result<(), Failure> {
    let time = match seconds {
        Some(seconds) if seconds < 1.0 => ", about a second".into(),
        Some(seconds) => format!(", about {}", in_words(seconds)),
        None => String::new(),
    };
    progress.note(format!(
        "{} pictures, about {:.1} GB of memory{time}",
        work.tasks.len(),
        memory_bytes as f64 / 1e9
    ));
    let mut tasks = work.tasks.iter();
    tasks
        .try_for_each(|task| report.add(task, Some(Outcome::default())))
        .code(1)
}

/// Prints which images are not there. Errors if there are any.
fn verify(
    args: &DrawArgs,
    work: &WorkList,
    finished: &Outcomes,
    print: &Print,
) -> Result<(), Failure> {
    let mut report = args.report(&work.tasks, HashMap::new(), print);
    for task in &work.tasks {
        let is_missing = !finished.contains_key(&task.index);
        report
            .add(task, is_missing.then(Outcome::default))
            .code(1)?;
    }
    let (missing, total) = (work.tasks.len() - finished.len(), work.tasks.len());
    if missing == 0 {
        return Ok(());
    }
    let hint = "the same command with `--resume` instead of `--verify` draws them";
    Err(anyhow!(
        "{missing} of {total} pictures are missing or have other settings\n\nhint: {hint}"
    ))
    .code(6)
}

/// The models that draw the images of a run.
struct Drawing<'a> {
    pipeline: &'a Pipeline,
    work: &'a WorkList,
    batch_size: usize,
    upscaler: Option<&'a Upscaler>,
    progress: &'a Progress,
}

impl<'a> Drawing<'a> {
    /// Draws jobs while another thread writes their files, and returns how the writing ended.
    /// Errors if nothing could be drawn with.
    fn run(
        &self,
        args: &DrawArgs,
        tasks: &[&'a Task],
        report: OrderedReport<'a>,
        summary: &'a mut Summary,
    ) -> Result<Result<()>, Failure> {
        let jobs: Vec<&Job> = tasks.iter().map(|task| &task.job).collect();
        let has_ended = AtomicBool::new(false);
        let (sender, receiver) = sync_channel(QUEUE_LENGTH);
        let (work, progress) = (self.work, self.progress);
        let on_write = |event: WriteEvent| show(work, progress, event);
        let mut writer = ImageWriter {
            options: args.write_options(),
            work,
            report,
            summary,
            has_ended: &has_ended,
            on_event: &on_write,
        };
        let (drawn, written) = std::thread::scope(|scope| {
            let writer = std::thread::Builder::new()
                .spawn_scoped(scope, move || writer.run(receiver))
                .context(NO_THREAD)?;
            let stop =
                || signals::requested() || stdout::is_closed() || has_ended.load(Ordering::Relaxed);
            let mut on_event = |event: Event| match event {
                Event::NextBatch { .. } if stop() => ControlFlow::Break(()),
                event => {
                    let place = |image: usize| tasks.get(image).map_or(image, |task| task.index);
                    progress.show_event(&event, place);
                    ControlFlow::Continue(())
                }
            };
            let options = RunOptions {
                batch_size: self.batch_size,
                trace: args.trace,
                keep_networks: false,
            };
            let mut sink = |index: usize, image: Result<Generated>| {
                let image = image.and_then(|image| self.upscaled(image));
                if let Some(task) = tasks.get(index) {
                    // a writer that has ended says why
                    sender.send((*task, image)).unwrap_or_default();
                }
            };
            let drawn = self
                .pipeline
                .generate_all(&jobs, options, &mut on_event, &mut sink);
            progress.finish();
            drop(sender);
            let broken = |_| Err(anyhow!("the writing of files broke down"));
            anyhow::Ok((drawn, writer.join().unwrap_or_else(broken)))
        })
        .code(1)?;
        drawn.code(1)?;
        Ok(written)
    }

    fn upscaled(&self, drawn: Generated) -> Result<Generated> {
        match self.upscaler {
            Some(upscaler) => Ok(Generated {
                image: upscaler.upscale(&drawn.image, self.progress)?,
                ..drawn
            }),
            None => Ok(drawn),
        }
    }
}

/// Shows what the writing of files tells.
fn show(work: &WorkList, progress: &Progress, event: WriteEvent) {
    match event {
        WriteEvent::IsFlat(task) => progress.note(format!(
            "warning: {} has one colour everywhere; the checkpoint may be damaged",
            work.place(task)
        )),
        WriteEvent::Saved(task, drawn) => {
            progress.show(&drawn.image);
            let seconds = drawn.sampling_s + drawn.decoding_s;
            progress.event(
                "picture",
                json!({
                    "index": task.index,
                    "path": task.path.as_ref().map(|path| path.to_string_lossy()),
                    "seconds": seconds,
                }),
            );
        }
        WriteEvent::Failed(task, error) => {
            let text = exit_code::text(error);
            if work.tasks.len() > 1 {
                progress.say(&text);
            }
            progress.event("failed", json!({ "index": task.index, "error": text }));
        }
    }
}

/// The exit code and the last word of a run.
fn end(
    list: &JobList,
    work: &WorkList,
    summary: &mut Summary,
    written: Result<()>,
    progress: &Progress,
) -> Result<(), Failure> {
    let (total, done) = (work.tasks.len(), summary.saved + summary.skipped);
    let partly = |code| if done > 0 { 6 } else { code };
    if let Err(mut error) = written {
        if total > 1 {
            error = error.context(format!("{done} of {total} pictures are saved"));
        }
        // where only the report failed, no picture has
        let code = match error.is::<ReportFailed>() {
            true => 1,
            false => partly(1),
        };
        return Err(Failure { code, error });
    }
    if signals::requested() && done < total {
        let seed = list
            .random_seed
            .map(|seed| format!("--seed {seed} "))
            .unwrap_or_default();
        let hint = format!("\n\nhint: the same command with `{seed}--resume` draws the rest");
        return Err(Failure {
            code: signals::EXIT_CODE,
            error: anyhow!("interrupted: {done} of {total} pictures are done{hint}"),
        });
    }
    let Some(first) = summary.first_failure.take() else {
        if stdout::is_closed() && done < total {
            progress.note(format!(
                "nobody reads stdout any more: {done} of {total} pictures are done"
            ));
        }
        return Ok(());
    };
    let first = Failure::new(first, 1);
    if total == 1 {
        return Err(first);
    }
    let failed = summary.failed;
    Err(Failure {
        code: partly(first.code),
        error: anyhow!("{failed} of {total} pictures failed, {done} are saved"),
    })
}
