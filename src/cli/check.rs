//! `sdgen check`: draws pictures again from what their files say of them, and compares. A
//! regression test in one line.

use crate::batch::resume::{UNREADABLE, settings_of};
use crate::cli::exit_code::{Code, Failure};
use crate::cli::model_args::ModelArgs;
use crate::cli::progress::{Progress, ProgressMode};
use crate::cli::stdout::say;
use crate::cli::upscale::Upscaler;
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
use crate::weights::lora::Lora;
use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Arg, Args, ValueEnum};
use serde_json::json;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
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
    /// Pictures that sdgen has drawn
    #[arg(required = true)]
    pictures: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    /// The network that they were upscaled with
    #[arg(long, value_name = "FILE")]
    upscaler: Option<OsString>,
    /// Least PSNR in dB that still counts as the same [default: every pixel is equal]
    #[arg(long, value_name = "DB")]
    min_psnr: Option<f64>,
    /// Compare what is drawn with this picture, not with the one that says how
    #[arg(long, value_name = "FILE")]
    expect: Option<PathBuf>,
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

/// An option of [`ModelArgs`] with the words of this command.
fn of_check(arg: Arg, help: &'static str) -> Arg {
    arg.help(help)
        .help_heading(None::<&'static str>)
        .hide_short_help(false)
}

/// An image, and what its file says of it.
struct Drawing {
    path: PathBuf,
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

/// Compares every image and prints a line for each. Errors if any differs or cannot be drawn again.
pub fn run(args: &CheckArgs) -> Result<(), Failure> {
    let progress = Progress::new(ProgressMode::Auto, args.quiet, false);
    let mut report = Report {
        args,
        progress: &progress,
        differing: 0,
        hint: "",
    };
    let mut drawings = vec![];
    for path in &args.pictures {
        match Drawing::read(path, args.expect.as_deref()) {
            Ok(drawing) => drawings.push(drawing),
            Err(error) => report.add(path, Err(error))?,
        }
    }
    let adapters = Adapters::read(&args.model).code(3)?;
    // images of one model and type are drawn together
    while let Some(first) = drawings.first() {
        let first = first.settings.clone();
        let (group, rest) = drawings
            .into_iter()
            .partition(|drawing: &Drawing| args.are_drawn_together(&drawing.settings, &first));
        drawings = rest;
        check_group(args, &adapters, group, &first, &mut report)?;
    }
    report.end()
}

impl CheckArgs {
    /// Whether two images are drawn by the same model.
    fn are_drawn_together(&self, a: &Settings, b: &Settings) -> bool {
        let same_model = self.model.model.is_some() || a.model == b.model;
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
        ModelArgs {
            model: Some(or_named(&asked.model, &settings.model)),
            refiner: refiner.map(|named| or_named(&asked.refiner, named)),
            vae,
            ..asked.clone()
        }
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
            let embedding = embeddings.find(|embedding| embedding.hash == used.hash)?;
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
    group: Vec<Drawing>,
    first: &Settings,
    report: &mut Report,
) -> Result<(), Failure> {
    if let Some(UsedLora { name, hash, .. }) = adapters.missing(first) {
        let error = || {
            anyhow!(
                "it was drawn with the LoRA `{name}`, SHA-256 {hash:.12}\n\nhint: pass its file with `--lora`"
            )
        };
        return group
            .iter()
            .try_for_each(|drawing| report.add(&drawing.path, Err(error())));
    }
    let dtype = DTypeChoice::from_str(&first.dtype, true)
        .map_err(anyhow::Error::msg)
        .context("unknown type of weights")
        .code(1)?;
    let compute = Compute::choose(args.device, dtype).code(2)?;
    let place = || match group.first() {
        Some(drawing) => format!("the model of `{}` cannot be opened", drawing.path.display()),
        None => String::new(),
    };
    let (loras, embeddings) = (adapters.loras_of(first), adapters.embeddings_of(first));
    let checkpoint = args
        .model_of(first)
        .open_with(loras, embeddings, false, !args.quiet)
        .with_context(place)
        .code(3)?;
    let upscaler = args.upscaler_of(first, &compute).code(3)?;
    let options = PipelineOptions {
        prediction: None,
        vae_tiling: VaeTiling::Off,
    };
    let pipeline = Pipeline::new(checkpoint, compute, options).code(3)?;
    compare(group, &pipeline, upscaler.as_ref(), report)
}

impl Drawing {
    /// Reads an image, and the one that it should look like if that is another.
    fn read(path: &Path, expect: Option<&Path>) -> Result<Self> {
        let bytes = std::fs::read(path).context("it cannot be read")?;
        let metadata = read_metadata(&bytes)?.context("it does not say how it was drawn")?;
        let trace = Trace::of(&metadata.sdgen).context(UNREADABLE)?;
        let settings = settings_of(metadata.sdgen)?;
        let format = Format::of_bytes(&bytes).context("it is neither PNG, JPEG nor WebP")?;
        let expected = match expect {
            Some(path) => {
                let bytes = std::fs::read(path)
                    .with_context(|| format!("`{}` cannot be read", path.display()))?;
                Image::decode(&bytes).with_context(|| format!("`{}` is damaged", path.display()))?
            }
            None => Image::decode(&bytes).context("it is damaged")?,
        };
        Ok(Self {
            path: path.into(),
            settings,
            trace,
            format,
            expected,
        })
    }
}

/// Prints how images compare, and counts those that differ.
struct Report<'a> {
    args: &'a CheckArgs,
    progress: &'a Progress,
    differing: usize,
    hint: &'static str,
}

impl Report<'_> {
    fn add(&mut self, path: &Path, outcome: Result<Comparison>) -> Result<(), Failure> {
        let is_same =
            outcome
                .as_ref()
                .is_ok_and(|Comparison { difference, .. }| match self.args.min_psnr {
                    Some(least) => difference.psnr_db >= least,
                    None => difference.pixels == 0,
                });
        self.differing += usize::from(!is_same);
        let comparison = match outcome {
            Ok(comparison) => {
                self.explain(path, &comparison, is_same);
                Some(comparison)
            }
            Err(error) => {
                let error = error.context(format!("`{}`", path.display()));
                self.progress.say(&Failure { code: 1, error }.text());
                None
            }
        };
        say(&line(path, is_same, comparison.as_ref(), self.args.json)).code(1)
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
        let (differing, hint) = (self.differing, self.hint);
        if differing == 0 {
            return Ok(());
        }
        let total = self.args.pictures.len();
        Err(anyhow!(
            "{differing} of {total} pictures are not the same{hint}"
        ))
        .code(1)
    }
}

/// Draws the images of one model again and reports how each differs.
fn compare(
    group: Vec<Drawing>,
    pipeline: &Pipeline,
    upscaler: Option<&Upscaler>,
    report: &mut Report,
) -> Result<(), Failure> {
    pipeline.identity().code(3)?;
    let mut resolver = Resolver::new(pipeline).code(3)?;
    let (mut jobs, mut drawn_again) = (vec![], vec![]);
    for drawing in &group {
        let settings = &drawing.settings;
        let job = require_same(pipeline, upscaler, settings)
            .and_then(|()| resolver.decide(settings.clone()));
        match job {
            Ok(job) => {
                jobs.push(job);
                drawn_again.push(drawing);
            }
            Err(error) => report.add(&drawing.path, Err(error))?,
        }
    }
    let jobs: Vec<&Job> = jobs.iter().collect();
    if pipeline.compute.device.is_cpu() {
        require_memory(pipeline.memory_bytes(&jobs, 1)).code(4)?;
    }
    let options = RunOptions {
        batch_size: 1,
        trace: group.iter().any(|drawing| drawing.trace.is_some()),
        keep_networks: false,
    };
    let progress = report.progress;
    let mut reported = Ok(());
    let mut sink = |index: usize, drawn: Result<Generated>| {
        if let (Some(drawing), true) = (drawn_again.get(index), reported.is_ok()) {
            let comparison = drawn.and_then(|drawn| drawing.compare(drawn, upscaler, progress));
            reported = report.add(&drawing.path, comparison);
        }
    };
    let mut on_event = |event: Event| {
        progress.show_event(&event, |image| image);
        ControlFlow::Continue(())
    };
    pipeline
        .generate_all(&jobs, options, &mut on_event, &mut sink)
        .code(1)?;
    progress.finish();
    reported
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

/// One line of the report.
fn line(path: &Path, same: bool, compared: Option<&Comparison>, json: bool) -> String {
    let difference = compared.map(|compared| &compared.difference);
    if json {
        let number = |value: fn(&Difference) -> serde_json::Value| difference.map(value);
        let mut record = json!({
            "path": path.to_string_lossy(), "same": same,
            "psnr_db": number(|d| if d.psnr_db.is_finite() { d.psnr_db.into() } else { serde_json::Value::Null }),
            "pixels": number(|d| d.pixels.into()), "largest": number(|d| d.largest.into()),
        });
        if let (Some(stage), Some(record)) = (
            compared.and_then(|c| c.first_difference.as_ref()),
            record.as_object_mut(),
        ) {
            record.insert("first_difference".into(), json!(stage));
        }
        return format!("{record}\n");
    }
    let path = path.display();
    match difference {
        None => format!("{path}: failed\n"),
        Some(Difference { pixels: 0, .. }) => format!("{path}: identical\n"),
        Some(Difference {
            pixels,
            largest,
            psnr_db,
        }) => {
            let verdict = if same { "close" } else { "differs" };
            format!(
                "{path}: {verdict}, {psnr_db:.1} dB, {pixels} pixels by up to {largest} levels\n"
            )
        }
    }
}
