//! `sdgen check`: draws pictures again from what their files say of them, and compares. A
//! regression test in one line.

use crate::batch::resume::{UNREADABLE, settings_of};
use crate::cli::exit_code::{Code, Failure};
use crate::cli::model_args::ModelArgs;
use crate::cli::progress::{Progress, ProgressMode};
use crate::cli::stdout::{self, say};
use crate::cli::upscale::Upscaler;
use crate::error;
use crate::image::{Difference, Format, Image, read_metadata};
use crate::nn::device::{Compute, DTypeChoice, DeviceChoice, require_memory};
use crate::pipeline::event::{Event, Generated};
use crate::pipeline::fingerprint::Trace;
use crate::pipeline::job::Job;
use crate::pipeline::model_spec::LoraSpec;
use crate::pipeline::options::VaeTiling;
use crate::pipeline::resolve::Resolver;
use crate::pipeline::settings::{Settings, UsedEmbedding, UsedLora};
use crate::pipeline::{Pipeline, PipelineOptions, RunOptions};
use crate::weights::embedding::Embedding;
use crate::weights::file::read;
use crate::weights::lora::Lora;
use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Arg, Args, ValueEnum};
use serde_json::json;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::DirEntry;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The images to compare, and how closely.
#[derive(Debug, Args)]
#[command(mut_arg("model", |arg| of_check(arg, MODEL_HELP)))]
#[command(mut_arg("lora", |arg| of_check(arg, LORA_HELP).value_name("FILE")))]
#[command(mut_arg("embedding", |arg| of_check(arg, EMBEDDING_HELP).value_name("FILE")))]
#[command(mut_arg("vae", |arg| of_check(arg, VAE_HELP)))]
#[command(mut_arg("merge", |arg| of_check(arg, MERGE_HELP)))]
#[command(mut_arg("minus", |arg| of_check(arg, MINUS_HELP)))]
#[command(mut_arg("refiner", |arg| of_check(arg, REFINER_HELP)))]
#[command(mut_arg("offline", |arg| arg.help_heading(None::<&'static str>)))]
pub struct CheckArgs {
    /// Pictures that sdgen has drawn, or folders of them
    #[arg(required = true)]
    pictures: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    /// The network that they were upscaled with
    #[arg(long, value_name = "FILE")]
    upscaler: Option<OsString>,
    /// Least PSNR in dB that still counts as the same [default: every pixel is equal]
    #[arg(long, value_name = "DB", value_parser = decibels, allow_negative_numbers = true)]
    min_psnr: Option<f64>,
    /// Compare what is drawn with this picture, not with the one that says how
    #[arg(long, value_name = "FILE")]
    expect: Option<PathBuf>,
    /// Fetch models that pictures name and that are not in the hub's cache
    #[arg(long, conflicts_with = "offline")]
    allow_download: bool,
    /// auto, cpu, cuda[:N] or metal
    #[arg(
        long,
        default_value = "auto",
        hide_default_value = true,
        value_name = "NAME"
    )]
    device: DeviceChoice,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// One JSON object a picture on stdout
    #[arg(long)]
    json: bool,
    /// Say nothing but errors
    #[arg(short, long)]
    quiet: bool,
}

/// The exit code where images cannot be compared.
const UNCHECKED: u8 = 6;

const MODEL_HELP: &str = "The model that they were drawn with [default: the one that each names]";
const LORA_HELP: &str =
    "The LoRAs that they were drawn with; how much of each, they say themselves";
const EMBEDDING_HELP: &str =
    "The embeddings that their prompts use; for which word, they say themselves";
const VAE_HELP: &str = "The VAE that they were drawn with, for those drawn with another than the \
    model's own [default: that of the hub that each names]";
const MERGE_HELP: &str = "What was merged into the model that they were drawn with";
const MINUS_HELP: &str = "The model that was taken away from that";
const REFINER_HELP: &str =
    "The refiner that they were drawn with [default: the one that each names]";

fn decibels(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| !number.is_nan());
    number.ok_or_else(|| "expected a number".into())
}

/// An option of [`ModelArgs`] with the words of this command.
fn of_check(arg: Arg, help: &'static str) -> Arg {
    arg.help(help)
        .help_heading(None::<&'static str>)
        .hide_short_help(false)
}

/// An image, and what its file says of it.
struct Drawing {
    /// Its place among all that are checked, from 0.
    index: usize,
    settings: Settings,
    trace: Option<Trace>,
    format: Format,
    /// The pixels that it should have when it is drawn again.
    expected: Image,
}

/// How an image that was drawn again compares.
struct Comparison {
    difference: Difference,
    /// The first stage that differs from the trace; `None` without a trace, `Some(None)` if no
    /// stage does.
    first_difference: Option<Option<String>>,
}

/// Compares every image and prints a line for each, in the order of the arguments. Errors if any
/// differs, or cannot be compared.
pub fn run(args: &CheckArgs) -> Result<(), Failure> {
    let progress = Progress::new(ProgressMode::Auto, args.quiet, false);
    let (mut paths, mut drawings, mut failed) = (vec![], vec![], vec![]);
    for path in &args.pictures {
        match pictures_at(path, &progress) {
            Ok(found) => paths.extend(found),
            Err(error) => {
                failed.push((paths.len(), error));
                paths.push(path.clone());
            }
        }
    }
    let mut report = Report::new(args, &progress, &paths);
    for (index, error) in failed {
        report.fail(index, Failure::new(error, UNCHECKED))?;
    }
    for (index, path) in paths.iter().enumerate() {
        if report.has(index) {
            continue;
        }
        match Drawing::read(index, path, args.expect.as_deref()) {
            Ok(drawing) => drawings.push(drawing),
            Err(error) => report.fail(index, Failure::new(error, UNCHECKED))?,
        }
    }
    let adapters = Adapters::read(&args.model).code(3)?;
    // images of one model and type are drawn together
    while let Some(first) = drawings.first().filter(|_| !stdout::is_closed()) {
        let first = first.settings.clone();
        let (group, rest) = drawings
            .into_iter()
            .partition(|drawing: &Drawing| args.are_drawn_together(&drawing.settings, &first));
        drawings = rest;
        check_group(args, &adapters, &group, &first, &mut report)?;
    }
    report.end()
}

/// The images of a folder, in the order of their names, or the path itself if it is none; folders
/// in it are named on stderr, not looked into. Errors if a folder has no images.
fn pictures_at(path: &Path, progress: &Progress) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.into()]);
    }
    let entries = std::fs::read_dir(path).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let entries = entries.context("the folder cannot be read")?;
    let is_picture =
        |path: &PathBuf| path.is_file() && matches!(Format::of_path(path), Ok(Some(_)));
    let (mut folders, others): (Vec<_>, Vec<_>) = entries
        .iter()
        .map(DirEntry::path)
        .partition(|path| path.is_dir());
    let mut paths: Vec<PathBuf> = others.into_iter().filter(is_picture).collect();
    paths.sort();
    folders.sort();
    let nested = folders.first().map(|folder| folder.display().to_string());
    ensure!(
        !paths.is_empty(),
        "it is a folder without pictures{}",
        nested
            .as_ref()
            .map(|nested| format!(
                "\n\nhint: folders in it are not looked into; name them, such as `{nested}`"
            ))
            .unwrap_or_default()
    );
    if let Some(nested) = nested {
        let others = match folders.len() {
            1 => String::new(),
            count => format!(" and {} more", count - 1),
        };
        progress.note(format!(
            "folders in `{}` are not looked into: `{nested}`{others}",
            path.display()
        ));
    }
    Ok(paths)
}

impl CheckArgs {
    /// Whether two images are drawn by the same model.
    fn are_drawn_together(&self, a: &Settings, b: &Settings) -> bool {
        let asked = self
            .model
            .model
            .as_ref()
            .or(self.model.diffusion_model.as_ref());
        let same_model = asked.is_some() || a.model == b.model;
        let same_vae =
            a.vae == b.vae || self.model.vae.is_some() && a.vae.is_some() && b.vae.is_some();
        same_model
            && same_vae
            && (&a.loras, &a.embeddings) == (&b.loras, &b.embeddings)
            && (&a.upscaler, a.upscale) == (&b.upscaler, b.upscale)
            && (&a.dtype, &a.refiner) == (&b.dtype, &b.refiner)
    }

    /// The model of an image: what its settings name, or what stands in for that.
    fn model_of(&self, settings: &Settings) -> ModelArgs {
        let asked = &self.model;
        let or_named = |asked: &Option<OsString>, named: &Arc<str>| {
            asked.clone().unwrap_or_else(|| OsString::from(&**named))
        };
        let vae = settings.vae.as_deref().and_then(|named| {
            let of_hub = named.contains('/').then(|| OsString::from(named));
            asked.vae.clone().or(of_hub)
        });
        let refiner = settings.refiner.as_ref();
        let is_in_parts = asked.diffusion_model.is_some() && asked.model.is_none();
        ModelArgs {
            model: (!is_in_parts).then(|| or_named(&asked.model, &settings.model)),
            refiner: refiner.map(|named| or_named(&asked.refiner, named)),
            offline: asked.offline || self.stays_offline(settings),
            vae,
            ..asked.clone()
        }
    }

    /// Whether the hub is not asked for the model of an image: where it is the image that names a
    /// part of it, which may come from anywhere.
    fn stays_offline(&self, settings: &Settings) -> bool {
        let asked = &self.model;
        let is_named = asked.model.is_none() && asked.diffusion_model.is_none()
            || asked.vae.is_none() && settings.vae.is_some()
            || asked.refiner.is_none() && settings.refiner.is_some();
        is_named && !self.allow_download
    }

    /// What is wrong where the model of an image cannot be opened.
    fn cannot_open(&self, settings: &Settings) -> String {
        let cause = "its model cannot be opened";
        let named = [
            Some(&settings.model),
            settings.vae.as_ref(),
            settings.refiner.as_ref(),
        ];
        let is_of_hub = |name: &Arc<str>| name.contains('/') && !Path::new(&**name).exists();
        if self.stays_offline(settings) && named.into_iter().flatten().any(is_of_hub) {
            return format!(
                "{cause}\n\nhint: `--allow-download` fetches what it names from the hub; `--model`, `--vae` and `--refiner` name others"
            );
        }
        cause.into()
    }

    /// The upscaler of an image. Without a hash it has no weights, and its name is enough.
    fn upscaler_of(&self, settings: &Settings, compute: &Compute) -> Result<Option<Upscaler>> {
        let Some(name) = settings.upscaler.as_deref() else {
            return Ok(None);
        };
        let reference = match settings.upscaler_hash {
            None => Some(OsStr::new(name)),
            Some(_) => self.upscaler.as_deref(),
        };
        reference
            .map(|reference| Upscaler::open(reference, settings.upscale, compute))
            .transpose()
    }
}

/// The LoRAs and embeddings of the arguments, to be found by their hashes.
struct Adapters {
    loras: HashMap<String, PathBuf>,
    embeddings: Vec<Embedding>,
}

impl Adapters {
    fn read(args: &ModelArgs) -> Result<Self> {
        let hashed =
            |LoraSpec { path, .. }: &LoraSpec| Ok((Lora::open(path, 1.0)?.hash()?, path.clone()));
        Ok(Self {
            loras: args.lora.iter().map(hashed).collect::<Result<_>>()?,
            embeddings: args.embeddings()?,
        })
    }

    /// A LoRA that an image was drawn with and that is not among these.
    fn missing<'a>(&self, settings: &'a Settings) -> Option<&'a UsedLora> {
        let mut used = settings.loras.iter();
        used.find(|lora| !self.loras.contains_key(&*lora.hash))
    }

    /// The LoRAs of an image. A name tells of a distillation too, so it is that of the drawing.
    fn loras_of(&self, settings: &Settings) -> impl Iterator<Item = Result<Lora>> {
        settings.loras.iter().filter_map(|used| {
            let lora = Lora::open(self.loras.get(&*used.hash)?, used.strength);
            Some(lora.map(|mut lora| {
                lora.name = used.name.to_string();
                lora.text_strength = used.text_strength.unwrap_or(used.strength);
                lora
            }))
        })
    }

    /// The embeddings of an image, and no others: its prompt may have a word that meant nothing
    /// when it was drawn.
    fn embeddings_of(&self, settings: &Settings) -> Vec<Embedding> {
        let of_use = |used: &UsedEmbedding| {
            let mut embeddings = self.embeddings.iter();
            let embedding =
                embeddings.find(|embedding| embedding.hash.as_ref() == Some(&used.hash))?;
            Some(Embedding {
                token: used.name.clone(),
                ..embedding.clone()
            })
        };
        settings.embeddings.iter().filter_map(of_use).collect()
    }
}

/// Checks images of one model, that of the first one's settings.
fn check_group(
    args: &CheckArgs,
    adapters: &Adapters,
    group: &[Drawing],
    first: &Settings,
    report: &mut Report,
) -> Result<(), Failure> {
    match open(args, adapters, first) {
        Ok((pipeline, upscaler)) => compare(group, &pipeline, upscaler.as_ref(), report),
        Err(failure) => report.fail_all(group, failure),
    }
}

/// Opens what has drawn an image.
fn open(
    args: &CheckArgs,
    adapters: &Adapters,
    first: &Settings,
) -> Result<(Pipeline, Option<Upscaler>), Failure> {
    if let Some(UsedLora { name, hash, .. }) = adapters.missing(first) {
        return Err(anyhow!(
            "it was drawn with the LoRA `{name}`, SHA-256 {hash:.12}\n\nhint: pass its file with `--lora`"
        ))
        .code(UNCHECKED);
    }
    let dtype = DTypeChoice::from_str(&first.dtype, true)
        .map_err(|_| {
            anyhow!(
                "it was drawn in an unknown type of weights, `{}`",
                first.dtype
            )
        })
        .code(UNCHECKED)?;
    let compute = Compute::choose(args.device, dtype).code(2)?;
    let (loras, embeddings) = (adapters.loras_of(first), adapters.embeddings_of(first));
    let checkpoint = args
        .model_of(first)
        .open_with(loras, embeddings, false, !args.quiet)
        .with_context(|| args.cannot_open(first))
        .code(3)?;
    let upscaler = args.upscaler_of(first, &compute).code(3)?;
    let options = PipelineOptions {
        prediction: None,
        vae_tiling: VaeTiling::Off,
    };
    let pipeline = Pipeline::new(checkpoint, compute, options).code(3)?;
    pipeline.identity().code(3)?;
    Ok((pipeline, upscaler))
}

impl Drawing {
    /// Reads an image, and the one that it should look like if that is another.
    fn read(index: usize, path: &Path, expect: Option<&Path>) -> Result<Self> {
        let bytes = read(path).context("it cannot be read")?;
        let metadata = read_metadata(&bytes)?.context("it does not say how it was drawn")?;
        let trace = Trace::of(&metadata.sdgen).context(UNREADABLE)?;
        let settings = settings_of(metadata.sdgen)?;
        let format = Format::of_bytes(&bytes).context("it is neither PNG, JPEG nor WebP")?;
        let expected = match expect {
            Some(path) => {
                let bytes =
                    read(path).with_context(|| format!("`{}` cannot be read", path.display()))?;
                Image::decode(&bytes).with_context(|| format!("`{}` is damaged", path.display()))?
            }
            None => Image::decode(&bytes).context("it is damaged")?,
        };
        Ok(Self {
            index,
            settings,
            trace,
            format,
            expected,
        })
    }
}

/// Prints how images compare, in the order of the arguments, and counts those that differ and those
/// that cannot be compared.
struct Report<'a> {
    args: &'a CheckArgs,
    progress: &'a Progress,
    paths: &'a [PathBuf],
    /// The line of each image, once it is known.
    lines: Vec<Option<String>>,
    /// How many lines are printed.
    printed: usize,
    differing: usize,
    unchecked: usize,
    /// The exit code of the first that cannot be compared.
    cause: u8,
    hint: &'static str,
}

impl<'a> Report<'a> {
    fn new(args: &'a CheckArgs, progress: &'a Progress, paths: &'a [PathBuf]) -> Self {
        Self {
            args,
            progress,
            paths,
            lines: vec![None; paths.len()],
            printed: 0,
            differing: 0,
            unchecked: 0,
            cause: UNCHECKED,
            hint: "",
        }
    }

    /// Whether an image has its line.
    fn has(&self, index: usize) -> bool {
        self.lines.get(index).is_some_and(Option::is_some)
    }

    fn path(&self, index: usize) -> &'a Path {
        let path = self.paths.get(index);
        path.map_or(Path::new(""), PathBuf::as_path)
    }

    /// Notes how an image compares.
    fn add(&mut self, index: usize, comparison: Comparison) -> Result<(), Failure> {
        let path = self.path(index);
        let Comparison { difference, .. } = &comparison;
        let is_same = match self.args.min_psnr {
            Some(least) => difference.psnr_db >= least,
            None => difference.pixels == 0,
        };
        self.differing += usize::from(!is_same);
        self.explain(path, &comparison, is_same);
        let line = match self.args.json {
            true => record(path, Some(is_same), Some(&comparison), None),
            false => verdict(path, is_same, &comparison.difference),
        };
        self.print(index, line)
    }

    /// Notes that an image cannot be compared.
    fn fail(&mut self, index: usize, failure: Failure) -> Result<(), Failure> {
        let path = self.path(index);
        if self.unchecked == 0 {
            self.cause = failure.code;
        }
        self.unchecked += 1;
        let Failure { code, error } = failure;
        let (reason, _) = error::split(&error);
        let error = error.context(format!("`{}`", path.display()));
        self.progress.say(&Failure { code, error }.text());
        let line = match self.args.json {
            true => record(path, None, None, Some(reason)),
            false => format!("{}: failed\n", path.display()),
        };
        self.print(index, line)
    }

    /// Notes that none of these can be compared, for the same reason.
    fn fail_all(&mut self, group: &[Drawing], failure: Failure) -> Result<(), Failure> {
        let Failure { code, error } = failure;
        let (reason, remedy) = error::split(&error);
        let hint = remedy.map_or(String::new(), |remedy| format!("\n\nhint: {remedy}"));
        for Drawing { index, .. } in group {
            if !self.has(*index) {
                let error = anyhow!("{reason}{hint}");
                self.fail(*index, Failure { code, error })?;
            }
        }
        Ok(())
    }

    /// Prints all lines whose turn has come.
    fn print(&mut self, index: usize, line: String) -> Result<(), Failure> {
        if let Some(place) = self.lines.get_mut(index) {
            *place = Some(line);
        }
        while let Some(Some(line)) = self.lines.get(self.printed) {
            self.progress.aside(|| say(line)).code(1)?;
            self.printed += 1;
        }
        Ok(())
    }

    /// Says where an image begins to differ, as far as its trace tells.
    fn explain(&mut self, path: &Path, comparison: &Comparison, is_same: bool) {
        let path = path.display();
        match &comparison.first_difference {
            Some(Some(stage)) => self
                .progress
                .note(format!("`{path}`: first differs at {stage}")),
            Some(None) if comparison.difference.pixels > 0 => self.progress.note(format!(
                "`{path}`: no stage differs: the pixels it is compared with come from elsewhere"
            )),
            None if !is_same => {
                self.hint = "\n\nhint: of pictures drawn with `--trace` this tells the first stage that differs";
            }
            _ => {}
        }
    }

    fn end(self) -> Result<(), Failure> {
        let Self {
            differing,
            unchecked,
            hint,
            ..
        } = self;
        let total = self.paths.len();
        let missing = match unchecked {
            0 => String::new(),
            n => format!("{n} of {total} pictures cannot be checked"),
        };
        if differing > 0 {
            let joint = if unchecked > 0 { ", " } else { "" };
            return Err(anyhow!(
                "{differing} of {total} pictures are not the same{joint}{missing}{hint}"
            ))
            .code(1);
        }
        if unchecked > 0 {
            let code = if unchecked == total {
                self.cause
            } else {
                UNCHECKED
            };
            return Err(Failure {
                code,
                error: anyhow!(missing),
            });
        }
        Ok(())
    }
}

/// Draws the images of one model again and reports how each differs.
fn compare(
    group: &[Drawing],
    pipeline: &Pipeline,
    upscaler: Option<&Upscaler>,
    report: &mut Report,
) -> Result<(), Failure> {
    let mut resolver = match Resolver::new(pipeline).code(3) {
        Ok(resolver) => resolver,
        Err(failure) => return report.fail_all(group, failure),
    };
    let (mut jobs, mut drawn_again) = (vec![], vec![]);
    for drawing in group {
        let settings = &drawing.settings;
        let job = require_same(pipeline, upscaler, settings)
            .and_then(|()| resolver.decide(settings.clone()))
            .code(UNCHECKED);
        let job = job.and_then(|job| {
            if pipeline.compute.device.is_cpu() {
                let needed = pipeline.memory_bytes(&[&job], 1);
                require_memory(needed, pipeline.weight_bytes()).code(4)?;
            }
            Ok(job)
        });
        match job {
            Ok(job) => {
                jobs.push(job);
                drawn_again.push(drawing);
            }
            Err(failure) => report.fail(drawing.index, failure)?,
        }
    }
    let jobs: Vec<&Job> = jobs.iter().collect();
    let options = RunOptions {
        batch_size: 1,
        trace: group.iter().any(|drawing| drawing.trace.is_some()),
        keep_networks: false,
    };
    let progress = report.progress;
    let reported = RefCell::new(Ok(()));
    let mut sink = |index: usize, drawn: Result<Generated>| {
        let mut reported = reported.borrow_mut();
        if let (Some(drawing), true) = (drawn_again.get(index), reported.is_ok()) {
            let comparison = drawn.and_then(|drawn| drawing.compare(drawn, upscaler, progress));
            *reported = match comparison.code(UNCHECKED) {
                Ok(comparison) => report.add(drawing.index, comparison),
                Err(failure) => report.fail(drawing.index, failure),
            };
        }
    };
    let mut on_event = |event: Event| match event {
        Event::NextBatch { .. } if stdout::is_closed() || reported.borrow().is_err() => {
            ControlFlow::Break(())
        }
        event => {
            progress.show_event(&event, |image| image);
            ControlFlow::Continue(())
        }
    };
    let drawn = pipeline.generate_all(&jobs, options, &mut on_event, &mut sink);
    progress.finish();
    reported.into_inner()?;
    match drawn.code(UNCHECKED) {
        Ok(()) => Ok(()),
        Err(failure) => report.fail_all(group, failure),
    }
}

/// Errors if an image was drawn with something else than this pipeline, and says what to pass.
fn require_same(pipeline: &Pipeline, upscaler: Option<&Upscaler>, of: &Settings) -> Result<()> {
    let identity = pipeline.identity()?;
    let tokens = |used: &UsedEmbedding| {
        let mut embeddings = pipeline.checkpoint.embeddings().iter();
        embeddings.any(|embedding| embedding.token == used.name)
    };
    if (&of.model_hash, &of.refiner_hash) != (&identity.model_hash, &identity.refiner_hash) {
        bail!(
            "it was drawn with other weights than those of `{}`\n\nhint: pass the model that drew it with `--model`",
            pipeline.checkpoint.name
        );
    }
    if of.vae_hash != identity.vae_hash {
        bail!(
            "it was drawn with the VAE `{}`\n\nhint: pass that with `--vae`",
            of.vae.as_deref().unwrap_or_default()
        );
    }
    if of.merges != identity.merges {
        let named: Vec<String> = of
            .merges
            .iter()
            .map(|merged| format!("`{}:{}`", merged.model, merged.share))
            .collect();
        let named = if named.is_empty() {
            "nothing".into()
        } else {
            named.join(", ")
        };
        bail!(
            "it was drawn with {named} merged into the model\n\nhint: pass the same with `--merge` and `--minus`"
        );
    }
    if let Some(UsedEmbedding { name, hash }) = of.embeddings.iter().find(|used| !tokens(used)) {
        bail!(
            "its prompt uses the embedding `{name}`, SHA-256 {hash:.10}\n\nhint: pass its file with `--embedding`"
        );
    }
    if of.upscaler_hash.as_ref() != upscaler.and_then(|upscaler| upscaler.hash.as_ref()) {
        bail!(
            "it was made larger by the network `{}`\n\nhint: pass that with `--upscaler`",
            of.upscaler.as_deref().unwrap_or_default()
        );
    }
    // last, as its other VAE has a configuration too
    if let (Some(of), Some(own)) = (&of.config_hash, &identity.config_hash)
        && of != own
    {
        bail!(
            "it was drawn with another configuration, scheduler or tokenizer than those of `{}`\n\nhint: pass the model that drew it with `--model`; its .json and .txt files count, not its weights alone",
            pipeline.checkpoint.name
        );
    }
    Ok(())
}

impl Drawing {
    /// Compares with what was drawn again, after the same trip through a file.
    fn compare(
        &self,
        drawn: Generated,
        upscaler: Option<&Upscaler>,
        progress: &Progress,
    ) -> Result<Comparison> {
        let larger = upscaler
            .map(|upscaler| upscaler.upscale(&drawn.image, progress))
            .transpose()?;
        let picture = larger.as_ref().unwrap_or(&drawn.image);
        let picture = Image::decode(&picture.encode(self.format, None)?)?;
        let [(w, h), (expected_w, expected_h)] =
            [&picture, &self.expected].map(|picture| (picture.width, picture.height));
        ensure!(
            (w, h) == (expected_w, expected_h),
            "it is drawn in {w}x{h}, {expected_w}x{expected_h} is expected"
        );
        let traces = self.trace.as_ref().zip(drawn.trace.as_ref());
        Ok(Comparison {
            difference: picture.difference(&self.expected),
            first_difference: traces.map(|(known, drawn)| known.first_difference(drawn)),
        })
    }
}

/// One line of `--json`; `is_same` is `None` where nothing could be compared.
fn record(
    path: &Path,
    is_same: Option<bool>,
    compared: Option<&Comparison>,
    error: Option<String>,
) -> String {
    let difference = compared.map(|compared| &compared.difference);
    let psnr_db = difference.map(|d| d.psnr_db).filter(|db| db.is_finite());
    let first_difference = compared.and_then(|compared| compared.first_difference.as_ref());
    let record = json!({
        "path": path.to_string_lossy(),
        "same": is_same,
        "psnr_db": psnr_db,
        "pixels": difference.map(|d| d.pixels),
        "largest": difference.map(|d| d.largest),
        "traced": first_difference.is_some(),
        "first_difference": first_difference,
        "error": error,
    });
    format!("{record}\n")
}

/// One line for people.
fn verdict(path: &Path, is_same: bool, difference: &Difference) -> String {
    let path = path.display();
    let Difference {
        pixels,
        largest,
        psnr_db,
    } = difference;
    if *pixels == 0 {
        return format!("{path}: identical\n");
    }
    let verdict = if is_same { "close" } else { "differs" };
    format!("{path}: {verdict}, {psnr_db:.1} dB, {pixels} pixels by up to {largest} levels\n")
}
