//! The plain command: from arguments to saved images.
//!
//! [`run`] tells the whole story. What is checked before it is in [`crate::cli::preflight`], what
//! is said to the person in [`crate::cli::announce`]; files are written by [`crate::batch::writer`]
//! beside the drawing of the next images.

use crate::batch::contact_sheet::save_sheet;
use crate::batch::jobs::JobList;
use crate::batch::report::{OrderedReport, Outcome, Outcomes};
use crate::batch::resume::{self, ResumeOptions};
use crate::batch::writer::{ImageWriter, QUEUE_LENGTH, Summary, WriteEvent, WriteOptions};
use crate::cli::announce::announce;
use crate::cli::args::DrawArgs;
use crate::cli::exit_code::{self, Code, Failure};
use crate::cli::model_args::ModelArgs;
use crate::cli::preflight;
use crate::cli::progress::{Progress, ProgressMode};
use crate::cli::signals;
use crate::cli::stdout::say;
use crate::cli::terminal::Terminal;
use crate::cli::upscale::Upscaler;
use crate::nn::device::{Compute, require_memory};
use crate::pipeline::resolve::{Job, Request};
use crate::pipeline::{self, Drawn};
use crate::weights::Checkpoint;
use anyhow::{Context, Result, anyhow};
use serde_json::json;
use std::collections::HashMap;
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
    let mut list = JobList::read(&args.source()).code(2)?;
    preflight::check_options(args, &list).code(2)?;
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
    let options = args.run_options();
    let mut request = Request::resolve(&options, &list, &checkpoint, &compute).code(2)?;
    if let Some(shard) = args.shard {
        shard.take(&mut request.jobs).code(2)?;
    }
    let upscaling_bytes = preflight::plan_upscaling(&mut request, upscaler.as_ref()).code(2)?;
    let memory_bytes = request
        .memory_bytes(&checkpoint, request.batch_size)
        .max(upscaling_bytes);
    let finished = finished(args, &mut request);
    let print = |line: &str| progress.aside(|| say(line));
    if args.verify {
        return verify(args, &request, &finished, &print);
    }
    summary.skipped = finished.len();
    let mut report = args.report(&request.jobs, finished, &print);
    if args.dry_run {
        announce(
            args,
            &list,
            &request,
            &checkpoint,
            summary.skipped,
            progress,
        );
        return dry_run(&request, &mut report, memory_bytes, progress);
    }
    preflight::check_files(args, &list, &request).code(2)?;
    if compute.device.is_cpu() {
        require_memory(memory_bytes).code(4)?;
    }
    if let Some(path) = &args.manifest {
        report.open_manifest(path, args.overwrites()).code(2)?;
    }
    announce(
        args,
        &list,
        &request,
        &checkpoint,
        summary.skipped,
        progress,
    );
    let left = report.left();
    report.flush().code(1)?;
    signals::listen(progress)
        .context("cannot listen for signals")
        .code(1)?;
    progress.event("start", json!({ "jobs": left.len() }));
    let drawing = Drawing {
        checkpoint: &checkpoint,
        request: &request,
        compute: &compute,
        upscaler: upscaler.as_ref(),
        progress,
    };
    let written = drawing.run(args, &left, report, summary)?;
    if let (Some(path), Ok(())) = (&args.grid, &written) {
        save_sheet(path, &list, &request.jobs, args.overwrites()).code(1)?;
    }
    end(&list, &request, summary, written)
}

impl DrawArgs {
    /// Whether anything more than its path is reported of an image.
    fn wants_details(&self) -> bool {
        self.json || self.manifest.is_some()
    }

    fn report<'a>(
        &self,
        jobs: &'a [Job],
        finished: Outcomes,
        print: &'a (dyn Fn(&str) -> Result<()> + Sync),
    ) -> OrderedReport<'a> {
        OrderedReport::new(jobs, finished, self.json, self.wants_details(), print)
    }
}

/// The images that are there already, if these are looked for.
fn finished(args: &DrawArgs, request: &mut Request) -> Outcomes {
    if !args.resume && !args.verify {
        return HashMap::new();
    }
    let options = ResumeOptions {
        needs_trace: args.trace,
        wants_hash: args.wants_details(),
        vae_tiling: args.vae_tiling,
    };
    resume::finished(&mut request.jobs, options)
}

/// Prints the work list and the memory that it needs.
fn dry_run(
    request: &Request,
    report: &mut OrderedReport,
    memory_bytes: u64,
    progress: &Progress,
) -> Result<(), Failure> {
    progress.note(format!(
        "{} pictures, about {:.1} GB of memory",
        request.jobs.len(),
        memory_bytes as f64 / 1e9
    ));
    let mut jobs = request.jobs.iter();
    jobs.try_for_each(|job| report.add(job, Some(Outcome::default())))
        .code(1)
}

/// Prints which images are not there. Errors if there are any.
fn verify(
    args: &DrawArgs,
    request: &Request,
    finished: &Outcomes,
    print: &(dyn Fn(&str) -> Result<()> + Sync),
) -> Result<(), Failure> {
    let mut report = args.report(&request.jobs, HashMap::new(), print);
    for job in &request.jobs {
        let is_missing = !finished.contains_key(&job.index);
        report.add(job, is_missing.then(Outcome::default)).code(1)?;
    }
    let (missing, total) = (request.jobs.len() - finished.len(), request.jobs.len());
    if missing == 0 {
        return Ok(());
    }
    let hint = "the same command with `--resume` instead of `--verify` draws them";
    Err(anyhow!(
        "{missing} of {total} pictures are missing or have other settings\n\nhint: {hint}"
    ))
    .code(6)
}

/// What draws the images of a run.
struct Drawing<'a> {
    checkpoint: &'a Checkpoint,
    request: &'a Request,
    compute: &'a Compute,
    upscaler: Option<&'a Upscaler>,
    progress: &'a Progress,
}

impl<'a> Drawing<'a> {
    /// Draws jobs while another thread writes their files, and returns how the writing ended.
    /// Errors if nothing could be drawn with.
    fn run(
        &self,
        args: &DrawArgs,
        jobs: &[&'a Job],
        report: OrderedReport<'a>,
        summary: &'a mut Summary,
    ) -> Result<Result<()>, Failure> {
        let is_full = AtomicBool::new(false);
        let (sender, receiver) = sync_channel(QUEUE_LENGTH);
        let (request, progress) = (self.request, self.progress);
        let on_event = |event: WriteEvent| show(request, progress, event);
        let mut writer = ImageWriter {
            options: WriteOptions {
                metadata: !args.no_metadata,
                overwrite: args.overwrites(),
            },
            request: self.request,
            report,
            summary,
            is_full: &is_full,
            on_event: &on_event,
        };
        let (drawn, written) = std::thread::scope(|scope| {
            let writer = scope.spawn(move || writer.run(receiver));
            let stop = || signals::requested() || is_full.load(Ordering::Relaxed);
            let mut sink = |job, drawn: Result<Drawn>| {
                let drawn = drawn.and_then(|drawn| self.upscaled(drawn));
                // a writer that has ended says why
                sender.send((job, drawn)).unwrap_or_default();
            };
            let drawn = pipeline::generate(
                self.checkpoint,
                self.request,
                jobs,
                self.compute,
                self.progress,
                &stop,
                &mut sink,
            );
            drop(sender);
            let broken = |_| Err(anyhow!("the writing of files broke down"));
            (drawn, writer.join().unwrap_or_else(broken))
        });
        drawn.code(1)?;
        Ok(written)
    }

    fn upscaled(&self, drawn: Drawn) -> Result<Drawn> {
        match self.upscaler {
            Some(upscaler) => Ok(Drawn {
                picture: upscaler.upscale(&drawn.picture, self.progress)?,
                ..drawn
            }),
            None => Ok(drawn),
        }
    }
}

/// Shows what the writing of files tells.
fn show(request: &Request, progress: &Progress, event: WriteEvent) {
    match event {
        WriteEvent::IsFlat(job) => progress.note(format!(
            "warning: {} has one colour everywhere; the checkpoint may be damaged",
            request.place(job)
        )),
        WriteEvent::Saved(job, drawn) => {
            progress.show(&drawn.picture);
            let seconds = drawn.sampling_s + drawn.decoding_s;
            progress.event(
                "picture",
                json!({ "index": job.index, "path": job.path, "seconds": seconds }),
            );
        }
        WriteEvent::Failed(job, error) => {
            let text = exit_code::text(error);
            if request.jobs.len() > 1 {
                progress.say(&text);
            }
            progress.event("failed", json!({ "index": job.index, "error": text }));
        }
    }
}

/// The exit code and the last word of a run.
fn end(
    list: &JobList,
    request: &Request,
    summary: &mut Summary,
    written: Result<()>,
) -> Result<(), Failure> {
    let (total, done) = (request.jobs.len(), summary.saved + summary.skipped);
    let partly = |code| if done > 0 { 6 } else { code };
    if let Err(mut error) = written {
        if total > 1 {
            error = error.context(format!("{done} of {total} pictures are saved"));
        }
        return Err(Failure {
            code: partly(1),
            error,
        });
    }
    if signals::requested() {
        let seed = list
            .random_seed
            .map(|seed| format!("--seed {seed} "))
            .unwrap_or_default();
        let hint = if done < total {
            format!("\n\nhint: the same command with `{seed}--resume` draws the rest")
        } else {
            String::new()
        };
        return Err(Failure {
            code: signals::EXIT_CODE,
            error: anyhow!("interrupted: {done} of {total} pictures are done{hint}"),
        });
    }
    let Some(first) = summary.first_failure.take() else {
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
