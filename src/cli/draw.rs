//! The plain command: from arguments to saved pictures.
//!
//! [`run`] tells the whole story. Hides what happens around the drawing: what is there already,
//! what fails, what ends the run early, and that files are written beside the drawing of the next
//! pictures.

use crate::batch::contact_sheet::{Cell, sheet};
use crate::batch::jobs::List;
use crate::batch::output_path::{self, Destination, DiskFull};
use crate::cli::exit_code::{Code, Failure};
use crate::cli::progress::{Progress, ProgressMode};
use crate::cli::signals;
use crate::cli::terminal::Terminal;
use crate::cli::upscale::{Upscaler, require_drawn};
use crate::cli::{DrawArgs, LoraArg, VaeTiling, merge, open_both, say, use_vae};
use crate::image::{Format, Picture, read_metadata};
use crate::nn::device::{Compute, require_memory};
use crate::pipeline::family::Family;
use crate::pipeline::fingerprint::Trace;
use crate::pipeline::guidance::Guidance;
use crate::pipeline::params::Settings;
use crate::pipeline::resolve::{Job, Request};
use crate::pipeline::{self, Drawn};
use crate::text::prompt::Syntax;
use crate::weights::Checkpoint;
use crate::weights::embedding::Embedding;
use crate::weights::lora::{self, Lora};
use anyhow::{Context, Result, anyhow};
use rayon::iter::{IntoParallelRefMutIterator, ParallelIterator};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Instant;

/// Drawn pictures that wait to be written at most; the drawing waits then.
const WAITING: usize = 4;

/// What became of the pictures of a run.
#[derive(Default)]
struct Tally {
    saved: usize,
    failed: usize,
    skipped: usize,
    first_failure: Option<Failure>,
}

/// Draws, says how it ends, and returns the exit code.
pub fn draw(args: &DrawArgs) -> u8 {
    let start = Instant::now();
    let (terminal, chosen) = match args.show.map(Terminal::choose).transpose() {
        Ok(terminal) => (terminal, Ok(())),
        Err(error) => (None, Err(error)),
    };
    let progress =
        Arc::new(Progress::new(args.progress, args.quiet, args.verbose).showing(terminal));
    let mut tally = Tally::default();
    let result = chosen
        .code(2)
        .and_then(|()| run(args, &progress, &mut tally));
    progress.finish();
    let seconds = start.elapsed().as_secs_f64();
    progress.detail(format!("all: {seconds:.2} s"));
    if let Err(failure) = &result {
        progress.say(&failure.text());
    }
    progress.event("end", json!({ "saved": tally.saved, "failed": tally.failed, "skipped": tally.skipped, "seconds": seconds }));
    result.map_or_else(|failure| failure.code, |()| 0)
}

fn run(args: &DrawArgs, progress: &Arc<Progress>, tally: &mut Tally) -> Result<(), Failure> {
    let mut list = List::read(args).code(2)?;
    check(args, &list).code(2)?;
    let loras = take_loras(args, &mut list).code(2)?;
    let compute = Compute::choose(args.device, args.dtype).code(2)?;
    let shows = !args.quiet && args.progress != ProgressMode::Json;
    let mut checkpoint = open_both(
        args.model.as_deref(),
        args.refiner.as_deref(),
        args.offline,
        shows,
    )
    .code(3)?;
    if let Some(vae) = &args.vae {
        use_vae(&mut checkpoint, vae, args.offline, shows).code(3)?;
    }
    merge(
        &mut checkpoint,
        &args.merge,
        args.minus.as_deref(),
        args.offline,
        shows,
    )
    .code(3)?;
    checkpoint
        .use_loras(
            loras
                .iter()
                .map(|lora| Lora::open(&lora.path, lora.strength)),
            args.strict,
        )
        .code(3)?;
    let embeddings = args
        .embedding
        .iter()
        .map(|asked| Embedding::asked(asked))
        .collect::<Result<Vec<_>>>()
        .code(3)?;
    checkpoint.use_embeddings(embeddings).code(3)?;
    let upscaler = args
        .upscale
        .as_deref()
        .map(|asked| Upscaler::asked(asked, &compute))
        .transpose()
        .code(3)?;
    let mut request = Request::resolve(args, &list, &checkpoint, &compute).code(2)?;
    if let Some(shard) = args.shard {
        shard.take(&mut request.jobs).code(2)?;
    }
    let mut upscaling_bytes = 0;
    if let Some(upscaler) = &upscaler {
        for job in &request.jobs {
            let (width, height) = job.settings.final_size();
            upscaler
                .size(width, height)
                .with_context(|| request.place(job))
                .code(2)?;
            upscaling_bytes = upscaling_bytes.max(upscaler.bytes(width, height));
        }
        request
            .jobs
            .iter_mut()
            .for_each(|job| job.settings = upscaler.told(job.settings.clone()));
    }
    let mut landed = HashMap::new();
    if args.resume || args.verify {
        landed = request
            .jobs
            .par_iter_mut()
            .filter_map(|job| Some((job.index, Some(present(job, args)?))))
            .collect();
    }
    let memory_bytes = request
        .memory_bytes(&checkpoint, request.batch_size)
        .max(upscaling_bytes);
    let mut records = Records {
        landed,
        ..Records::new(args, &request, progress)
    };
    if args.verify {
        return verify(&request, &mut records);
    }
    if args.resume {
        tally.skipped = records.landed.len();
    }
    if args.dry_run {
        announce(args, &list, &request, &checkpoint, tally.skipped, progress);
        progress.note(format!(
            "{} pictures, about {:.1} GB of memory",
            request.jobs.len(),
            memory_bytes as f64 / 1e9
        ));
        return request
            .jobs
            .iter()
            .try_for_each(|job| records.land(job, Some(Landed::default())))
            .code(1);
    }
    check_files(args, &list, &request).code(2)?;
    if compute.device.is_cpu() {
        require_memory(memory_bytes).code(4)?;
    }
    records.open_manifest(args).code(2)?;
    announce(args, &list, &request, &checkpoint, tally.skipped, progress);
    records.flush().code(1)?;
    signals::listen(progress)
        .context("cannot listen for signals")
        .code(1)?;
    let left: Vec<&Job> = request
        .jobs
        .iter()
        .filter(|job| !records.landed.contains_key(&job.index) && !records.is_out(job))
        .collect();
    progress.event("start", json!({ "jobs": left.len() }));

    let full = AtomicBool::new(false);
    let (sender, receiver) = sync_channel(WAITING);
    let mut writer = Writer {
        args,
        request: &request,
        progress,
        records,
        tally,
        full: &full,
    };
    let (drawn, written) = std::thread::scope(|scope| {
        let writer = scope.spawn(move || writer.write(receiver));
        let stop = || signals::requested() || full.load(Ordering::Relaxed);
        // a writer that has ended says why
        let mut sink = |job, drawn: Result<Drawn>| {
            let drawn = drawn.and_then(|drawn| match &upscaler {
                Some(upscaler) => Ok(Drawn {
                    picture: upscaler.upscale(&drawn.picture, progress)?,
                    ..drawn
                }),
                None => Ok(drawn),
            });
            sender.send((job, drawn)).unwrap_or_default();
        };
        let drawn = pipeline::generate(
            &checkpoint,
            &request,
            &left,
            &compute,
            progress,
            &stop,
            &mut sink,
        );
        drop(sender);
        (
            drawn,
            writer
                .join()
                .unwrap_or_else(|_| Err(anyhow!("the writing of files broke down"))),
        )
    });
    drawn.code(1)?;
    if let (Some(path), Ok(())) = (&args.grid, &written) {
        grid(path, args, &list, &request).code(1)?;
    }
    end(&list, &request, tally, written)
}

/// Saves a contact sheet of the pictures that are there: a row for each prompt and columns for
/// seeds, or columns for the last sweep and rows for all else.
fn grid(path: &Path, args: &DrawArgs, list: &List, request: &Request) -> Result<()> {
    let cell = |job: &Job| {
        let item = list.items.get(job.index)?;
        let picture = Picture::decode(&std::fs::read(job.path.as_ref()?).ok()?).ok()?;
        let (prompt, seed) = (item.prompt.to_string(), format!("seed {}", item.seed));
        let (row, column) = match item.sweep.labels.split_last() {
            None => (prompt, seed),
            Some((last, others)) => ([&[prompt, seed], others].concat().join(", "), last.clone()),
        };
        Some(Cell {
            row,
            column,
            picture,
        })
    };
    let cells: Vec<Cell> = request.jobs.iter().filter_map(cell).collect();
    if cells.is_empty() {
        return Ok(());
    }
    let format = Format::of_path(path)?.unwrap_or(Format::Png);
    output_path::save(
        path,
        &sheet(&cells)?.encode(format, None)?,
        args.force || args.resume,
    )
}

/// Says which pictures are not there.
fn verify(request: &Request, records: &mut Records) -> Result<(), Failure> {
    let there = std::mem::take(&mut records.landed);
    for job in request.jobs.iter() {
        records
            .land(job, (!there.contains_key(&job.index)).then(Landed::default))
            .code(1)?;
    }
    let (missing, total) = (request.jobs.len() - there.len(), request.jobs.len());
    let hint = "the same command with `--resume` instead of `--verify` draws them";
    match missing {
        0 => Ok(()),
        _ => Err(anyhow!(
            "{missing} of {total} pictures are missing or have other settings\n\nhint: {hint}"
        ))
        .code(6),
    }
}

/// The exit code and the last word of a run.
fn end(
    list: &List,
    request: &Request,
    tally: &mut Tally,
    written: Result<()>,
) -> Result<(), Failure> {
    let (total, done) = (request.jobs.len(), tally.saved + tally.skipped);
    let partly = |code| if done > 0 { 6 } else { code };
    let fail = |code, error| Err(Failure { code, error });
    let seed = list
        .random_seed
        .map(|seed| format!("--seed {seed} "))
        .unwrap_or_default();
    let resume = format!("\n\nhint: the same command with `{seed}--resume` draws the rest");
    match (written, tally.first_failure.take()) {
        (Err(error), _) => fail(
            partly(1),
            if total > 1 {
                error.context(format!("{done} of {total} pictures are saved"))
            } else {
                error
            },
        ),
        (Ok(()), _) if signals::requested() => {
            let hint = if done < total { &*resume } else { "" };
            fail(
                signals::EXIT_CODE,
                anyhow!("interrupted: {done} of {total} pictures are done{hint}"),
            )
        }
        (Ok(()), None) => Ok(()),
        (Ok(()), Some(first)) if total == 1 => Err(first),
        (Ok(()), Some(first)) => fail(
            partly(first.code),
            anyhow!(
                "{} of {total} pictures failed, {done} are saved",
                tally.failed
            ),
        ),
    }
}

/// The LoRAs of the run: those of options, then those of tags, which are taken out of prompts.
/// Errors if prompts differ in them.
fn take_loras(args: &DrawArgs, list: &mut List) -> Result<Vec<LoraArg>> {
    let mut of_all = None;
    for item in list
        .items
        .iter_mut()
        .filter(|item| item.options.prompt_syntax != Some(Syntax::Plain))
    {
        let (text, tags) = lora::take_tags(&item.prompt)?;
        if !tags.is_empty() {
            item.prompt = text.into();
        }
        if *of_all.get_or_insert_with(|| tags.clone()) != tags {
            return Err(anyhow!(
                "prompts name different LoRAs\n\nhint: LoRAs are of a whole run; make one of each, `--lora` is for all"
            ));
        }
    }
    let find = |(name, strength): (String, f64)| {
        let hint = "`--lora-dir DIR` says where its file is; `--prompt-syntax plain` takes every character for itself";
        let folder = args
            .lora_dir
            .as_ref()
            .with_context(|| format!("the prompt names the LoRA `{name}`\n\nhint: {hint}"))?;
        Ok(LoraArg {
            path: lora::find_named(folder, &name)?,
            strength,
        })
    };
    let named = of_all
        .unwrap_or_default()
        .into_iter()
        .map(find)
        .collect::<Result<Vec<_>>>()?;
    Ok(args.lora.iter().cloned().chain(named).collect())
}

/// What contradicts before a model is looked at.
fn check(args: &DrawArgs, list: &List) -> Result<()> {
    let to_stdout = list
        .outputs
        .iter()
        .any(|(destination, _)| matches!(destination, Destination::Stdout));
    if to_stdout && args.json {
        return Err(anyhow!("`-o -` and `--json` both want stdout"));
    }
    if args.trace && args.no_metadata && !args.json && args.manifest.is_none() {
        return Err(anyhow!(
            "with `--no-metadata` nothing keeps what `--trace` finds\n\nhint: `--json` or `--manifest FILE` does"
        ));
    }
    if args.show.is_some() && args.progress == ProgressMode::Json {
        return Err(anyhow!("`--show` and `--progress json` both want stderr"));
    }
    if to_stdout && args.grid.is_some() {
        return Err(anyhow!("`--grid` is made of files, but `-o -` writes none"));
    }
    if let Some(path) = &args.grid {
        Format::of_path(path)?;
        output_path::check_writable(&[path], true, args.force || args.resume)?;
    }
    if let (true, Some(option)) = (
        to_stdout,
        if args.verify {
            Some("--verify")
        } else {
            args.resume.then_some("--resume")
        },
    ) {
        return Err(anyhow!(
            "`{option}` looks for files, but `-o -` writes none"
        ));
    }
    let by_others = [
        ("--resume", args.resume),
        ("--verify", args.verify),
        ("--shard", args.shard.is_some()),
    ];
    if let (Some(seed), Some((option, _))) = (
        list.random_seed,
        by_others.iter().find(|(_, is_used)| *is_used),
    ) {
        return Err(anyhow!(
            "`{option}` cannot know the random seeds of another run\n\nhint: `--seed {seed}`, or the seed that was printed"
        ));
    }
    Ok(())
}

/// Finds out before drawing whether every picture can be stored.
fn check_files(args: &DrawArgs, list: &List, request: &Request) -> Result<()> {
    let is_template = |job: &Job| {
        let output = list
            .items
            .get(job.index)
            .and_then(|item| list.outputs.get(item.output));
        output.is_some_and(|(destination, _)| matches!(destination, Destination::Template(_)))
    };
    for make_folders in [false, true] {
        let jobs = request
            .jobs
            .iter()
            .filter(|job| is_template(job) == make_folders);
        let paths: Vec<&Path> = jobs.filter_map(|job| job.path.as_deref()).collect();
        output_path::check_writable(&paths, make_folders, args.force || args.resume)?;
    }
    for job in request
        .jobs
        .iter()
        .filter(|job| job.format == Format::Jpg && !args.no_metadata)
    {
        let trace = args.trace.then(|| {
            Trace::blank(
                1 + usize::from(job.guidance != Guidance::Off),
                job.refine.is_some(),
                job.evaluations(),
            )
        });
        job.settings
            .metadata(trace.as_ref())
            .check(job.format)
            .with_context(|| request.place(job))?;
    }
    Ok(())
}

/// A picture's file, if it is whole and has these very settings. Where nobody asks for tiles or for
/// none, it has what the file has: the free memory of another moment is no reason to draw again.
fn present(job: &mut Job, args: &DrawArgs) -> Option<Landed> {
    let bytes = std::fs::read(job.path.as_ref()?).ok()?;
    let sdgen = read_metadata(&bytes).ok()??.sdgen;
    require_drawn(&sdgen).ok()?;
    let trace = args.trace.then(|| Trace::of(&sdgen).ok()?).flatten();
    let settings: Settings = serde_json::from_value(sdgen).ok()?;
    let asked = match args.vae_tiling {
        VaeTiling::Auto => Settings {
            vae_tiling: settings.vae_tiling,
            ..job.settings.clone()
        },
        _ => job.settings.clone(),
    };
    let picture = settings
        .draws_the_same_as(&asked)
        .then(|| Picture::decode(&bytes).ok())
        .flatten()?;
    job.settings = asked;
    let sha256 = (wants_hash(args) && job.format != Format::Jpg).then(|| picture.sha256());
    Some(Landed {
        sha256,
        trace,
        skipped: true,
        ..Landed::default()
    })
}

/// Whether anybody wants to know more of a picture than its path.
fn wants_hash(args: &DrawArgs) -> bool {
    args.json || args.manifest.is_some()
}

/// Says what was chosen for the person: the seed if it is random, what is skipped, and what could
/// not be known.
fn announce(
    args: &DrawArgs,
    list: &List,
    request: &Request,
    checkpoint: &Checkpoint,
    skipped: usize,
    progress: &Progress,
) {
    if let Some(seed) = list.random_seed {
        progress.note(format!("seed {seed}"));
    }
    if args.resume {
        progress.note(format!(
            "{skipped} of {} pictures are there already",
            request.jobs.len()
        ));
    }
    let unguided = |has: fn(&Settings) -> bool| {
        request
            .jobs
            .iter()
            .any(|job| job.guidance == Guidance::Off && has(&job.settings))
    };
    for (has, what) in [
        (
            unguided(|settings| !settings.negative.is_empty()),
            "the negative prompt",
        ),
        (
            unguided(|settings| settings.guidance_rescale > 0.0),
            "`--guidance-rescale`",
        ),
    ] {
        if has {
            progress.note(format!(
                "warning: {what} has no effect without classifier-free guidance"
            ));
        }
    }
    for Embedding { token, file, .. } in &checkpoint.embeddings {
        if !request.jobs.iter().any(|job| {
            job.settings
                .embeddings
                .iter()
                .any(|used| used.name == *token)
        }) {
            progress.note(format!(
                "warning: no prompt has the word `{token}`, so the embedding `{file}` has no effect"
            ));
        }
    }
    if let (Some(doubt), None) = (&checkpoint.doubt, args.prediction) {
        progress.note(format!("warning: {doubt}"));
    }
    if let (Some(Job { settings, .. }), VaeTiling::Auto) = (
        request.jobs.iter().find(|job| job.settings.vae_tiling),
        args.vae_tiling,
    ) {
        let whole = request.vae_bytes(
            checkpoint,
            &Settings {
                vae_tiling: false,
                ..settings.clone()
            },
        ) as f64
            / 1e9;
        let Settings { width, height, .. } = settings;
        progress.note(format!("{width}x{height} is decoded in tiles: the whole would need about {whole:.1} GB of memory"));
    }
    for lora in &checkpoint.loras {
        progress.detail(lora.coverage());
        if let Some(misfit) = lora.misfit() {
            progress.note(format!("warning: {misfit}"));
        }
    }
    if let Some(distilled) = Family::detect(checkpoint)
        .ok()
        .and_then(|family| family.defaults(checkpoint).distilled)
    {
        progress.detail(format!("distilled: {distilled}"));
    }
    for assumed in &checkpoint.assumed {
        progress.detail(format!("assumed: {assumed}"));
    }
    if !checkpoint.ignored.is_empty() {
        progress.detail(format!(
            "{} tensors are not needed: {}",
            checkpoint.ignored.len(),
            checkpoint.ignored.join(", ")
        ));
    }
    if let Some(Job { settings, .. }) = request.jobs.first() {
        let guidance = if settings.guidance > 1.0 {
            format!("guidance {}", settings.guidance)
        } else {
            "no guidance".into()
        };
        let Settings {
            model,
            width,
            height,
            steps,
            sampler,
            ..
        } = settings;
        progress.detail(format!(
            "{model}: {width}x{height}, {steps} steps of {sampler}, {guidance}"
        ));
    }
}

/// Writes pictures while the next are drawn.
struct Writer<'a> {
    args: &'a DrawArgs,
    request: &'a Request,
    progress: &'a Progress,
    records: Records<'a>,
    tally: &'a mut Tally,
    /// set when nothing more can be written
    full: &'a AtomicBool,
}

impl<'a> Writer<'a> {
    /// Takes pictures until no more come. Errors are those after which no other picture can be
    /// written either.
    fn write(&mut self, drawn: Receiver<(&'a Job, Result<Drawn>)>) -> Result<()> {
        let mut ended = Ok(());
        for (job, drawn) in drawn {
            if !self.full.load(Ordering::Relaxed) {
                ended = self.take(job, drawn);
                self.full.store(ended.is_err(), Ordering::Relaxed);
            }
        }
        ended.and(self.records.finish())
    }

    fn take(&mut self, job: &'a Job, drawn: Result<Drawn>) -> Result<()> {
        let seconds = drawn
            .as_ref()
            .map_or(0.0, |drawn| drawn.sampling_s + drawn.decoding_s);
        match drawn.and_then(|drawn| self.save(job, drawn)) {
            Ok(landed) => {
                self.tally.saved += 1;
                self.progress.event(
                    "picture",
                    json!({ "index": job.index, "path": job.path, "seconds": seconds }),
                );
                self.records.land(job, Some(landed))
            }
            Err(error) if error.is::<DiskFull>() => Err(error),
            Err(error) => {
                self.tally.failed += 1;
                let mut failure = match Err::<(), _>(error).code(1) {
                    Ok(()) => return Ok(()),
                    Err(failure) => failure,
                };
                if self.request.jobs.len() > 1 {
                    failure.error = failure.error.context(self.request.place(job));
                    self.progress.say(&failure.text());
                }
                self.progress.event(
                    "failed",
                    json!({ "index": job.index, "error": failure.text() }),
                );
                self.tally.first_failure.get_or_insert(failure);
                self.records.land(job, None)
            }
        }
    }

    fn save(&self, job: &Job, drawn: Drawn) -> Result<Landed> {
        if drawn.picture.is_flat() {
            self.progress.note(format!(
                "warning: {} has one colour everywhere; the checkpoint may be damaged",
                self.request.place(job)
            ));
        }
        let metadata =
            (!self.args.no_metadata).then(|| job.settings.metadata(drawn.trace.as_ref()));
        let bytes = drawn.picture.encode(job.format, metadata.as_ref())?;
        match &job.path {
            Some(path) => {
                let _whole = signals::hold_off();
                output_path::save(path, &bytes, self.args.force || self.args.resume)?;
            }
            None => {
                let mut stdout = std::io::stdout();
                stdout
                    .write_all(&bytes)
                    .and_then(|()| stdout.flush())
                    .context("cannot write the picture to stdout")?;
            }
        }
        self.progress.show(&drawn.picture);
        let sha256 = self.records.wanted.then(|| drawn.picture.sha256());
        Ok(Landed {
            sha256,
            timings: Some((drawn.sampling_s, drawn.decoding_s)),
            trace: drawn.trace,
            skipped: false,
        })
    }
}

/// A picture that is there.
#[derive(Default)]
struct Landed {
    /// of the pixels; none if nobody asks, or of a JPEG of an earlier run
    sha256: Option<String>,
    /// seconds of sampling and decoding
    timings: Option<(f64, f64)>,
    /// none without `--trace`, or of an earlier run without it
    trace: Option<Trace>,
    /// it is of an earlier run
    skipped: bool,
}

/// What is said of each picture on stdout and in the manifest, in the order of the list.
struct Records<'a> {
    progress: &'a Progress,
    json: bool,
    /// whether anybody wants to know more than the path
    wanted: bool,
    next: std::slice::Iter<'a, Job>,
    /// what became of pictures whose turn has not come, none if they failed
    landed: HashMap<usize, Option<Landed>>,
    manifest: Option<File>,
}

impl<'a> Records<'a> {
    fn new(args: &DrawArgs, request: &'a Request, progress: &'a Progress) -> Self {
        Self {
            progress,
            json: args.json,
            wanted: wants_hash(args),
            next: request.jobs.iter(),
            landed: HashMap::new(),
            manifest: None,
        }
    }

    fn open_manifest(&mut self, args: &DrawArgs) -> Result<()> {
        let Some(path) = &args.manifest else {
            return Ok(());
        };
        let mut options = File::options();
        match args.force || args.resume {
            true => options.write(true).create(true).truncate(true),
            false => options.write(true).create_new(true),
        };
        let file = options
            .open(path)
            .with_context(|| format!("cannot make the manifest `{}`", path.display()))?;
        self.manifest = Some(file);
        Ok(())
    }

    /// Whether the picture's turn is over.
    fn is_out(&self, job: &Job) -> bool {
        self.next
            .as_slice()
            .first()
            .is_none_or(|next| next.index > job.index)
    }

    /// Takes what became of a picture and says all whose turn has come.
    fn land(&mut self, job: &Job, landed: Option<Landed>) -> Result<()> {
        self.landed.entry(job.index).or_insert(landed);
        self.flush()
    }

    fn flush(&mut self) -> Result<()> {
        while let Some(job) = self.next.as_slice().first() {
            let Some(landed) = self.landed.remove(&job.index) else {
                break;
            };
            self.next.next();
            self.say(job, landed)?;
        }
        Ok(())
    }

    /// Says what is left, for a run that ends early.
    fn finish(&mut self) -> Result<()> {
        while let Some(job) = self.next.next() {
            if let Some(landed) = self.landed.remove(&job.index) {
                self.say(job, landed)?;
            }
        }
        Ok(())
    }

    fn say(&mut self, job: &Job, landed: Option<Landed>) -> Result<()> {
        let (Some(path), Some(landed)) = (&job.path, landed) else {
            return Ok(());
        };
        let mut record = format!("{}\n", path.display());
        if self.wanted {
            let json = format!("{}\n", as_json(path, &job.settings, landed));
            if let Some(manifest) = &mut self.manifest {
                manifest
                    .write_all(json.as_bytes())
                    .context("cannot write the manifest")?;
            }
            if self.json {
                record = json;
            }
        }
        self.progress.aside(|| say(&record))
    }
}

/// One line of `--json`.
fn as_json(path: &Path, settings: &Settings, landed: Landed) -> Value {
    let mut record = json!({ "path": path.to_string_lossy() });
    if let (Some(record), Value::Object(settings)) = (record.as_object_mut(), json!(settings)) {
        record.extend(landed.sha256.map(|hash| ("sha256".into(), hash.into())));
        record.extend(settings);
        let timings = |(sampling_s, decoding_s)| {
            (
                "timings".into(),
                json!({ "sampling_s": sampling_s, "decoding_s": decoding_s }),
            )
        };
        record.extend(landed.timings.map(timings));
        record.extend(landed.trace.map(|trace| (Trace::KEY.into(), json!(trace))));
        record.extend(landed.skipped.then(|| ("skipped".into(), true.into())));
    }
    record
}
