//! `sdgen check`: draws pictures again from what their files say of them, and compares. A
//! regression test in one line.

use crate::cli::exit_code::{Code, Failure};
use crate::cli::progress::{Progress, ProgressMode};
use crate::cli::upscale::{Upscaler, require_drawn};
use crate::cli::{merge, open_both, say, use_vae};
use crate::image::{Difference, Format, Picture, read_metadata};
use crate::nn::device::{Compute, DTypeChoice, DeviceChoice, require_memory};
use crate::pipeline;
use crate::pipeline::fingerprint::Trace;
use crate::pipeline::params::{Merged, Settings, UsedEmbedding, UsedLora};
use crate::pipeline::resolve::{Job, Request};
use crate::weights::Checkpoint;
use crate::weights::embedding::Embedding;
use crate::weights::lora::Lora;
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde_json::json;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// What to compare, and how closely.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Pictures that sdgen has drawn
    #[arg(required = true)]
    pictures: Vec<PathBuf>,
    /// The model that they were drawn with [default: the one that each names]
    #[arg(
        short,
        long,
        env = "SDGEN_MODEL",
        hide_env_values = true,
        value_name = "REF"
    )]
    model: Option<OsString>,
    /// The refiner that they were drawn with [default: the one that each names]
    #[arg(long, value_name = "REF")]
    refiner: Option<OsString>,
    /// The VAE that they were drawn with, for those drawn with another than the model's own
    /// [default: that of the hub that each names]
    #[arg(long, value_name = "REF")]
    vae: Option<OsString>,
    /// What was merged into the model that they were drawn with
    #[arg(long, value_name = "REF:X")]
    merge: Vec<OsString>,
    /// The model that was taken away from that
    #[arg(long, requires = "merge", value_name = "REF")]
    minus: Option<OsString>,
    /// The network that they were upscaled with
    #[arg(long, value_name = "FILE")]
    upscaler: Option<OsString>,
    /// The LoRAs that they were drawn with; how much of each, they say themselves
    #[arg(long, value_name = "FILE")]
    lora: Vec<PathBuf>,
    /// The embeddings that their prompts use; for which word, they say themselves
    #[arg(long, value_name = "FILE")]
    embedding: Vec<OsString>,
    /// Least PSNR in dB that still counts as the same [default: every pixel is equal]
    #[arg(long, value_name = "DB")]
    min_psnr: Option<f64>,
    /// Compare what is drawn with this picture, not with the one that says how
    #[arg(long, value_name = "FILE")]
    expect: Option<PathBuf>,
    /// Never touch the network; also HF_HUB_OFFLINE=1
    #[arg(long)]
    offline: bool,
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

/// A picture, and what its file says of it.
struct Known {
    path: PathBuf,
    settings: Settings,
    trace: Option<Trace>,
    format: Format,
    /// what the drawn one should look like
    expected: Picture,
}

/// How a picture that was drawn again compares.
struct Compared {
    difference: Difference,
    /// the first stage that is not as traced, if any; none without a trace
    first_difference: Option<Option<String>>,
}

/// Takes what came of a picture.
type Tell<'a> = dyn FnMut(&Path, Result<Compared>) -> Result<(), Failure> + 'a;

/// Compares every picture and prints a line for each. Errors if any differs or cannot be drawn
/// again.
pub fn run(args: &CheckArgs) -> Result<(), Failure> {
    let progress = Progress::new(ProgressMode::Auto, args.quiet, false);
    let (mut bad, mut hint) = (0, "");
    let mut tell = |path: &Path, outcome: Result<Compared>| -> Result<(), Failure> {
        let same = outcome
            .as_ref()
            .is_ok_and(|Compared { difference, .. }| match args.min_psnr {
                Some(least) => difference.psnr_db >= least,
                None => difference.pixels == 0,
            });
        bad += usize::from(!same);
        let compared = match outcome {
            Ok(compared) => {
                match &compared.first_difference {
                    Some(Some(stage)) => {
                        progress.note(format!("`{}`: first differs at {stage}", path.display()))
                    }
                    Some(None) if compared.difference.pixels > 0 => {
                        progress
                            .note(format!("`{}`: no stage differs: the pixels it is compared with come from elsewhere", path.display()));
                    }
                    None if !same => {
                        hint = "\n\nhint: of pictures drawn with `--trace` this tells the first stage that differs"
                    }
                    _ => {}
                }
                Some(compared)
            }
            Err(error) => {
                progress.say(
                    &Failure {
                        code: 1,
                        error: error.context(format!("`{}`", path.display())),
                    }
                    .text(),
                );
                None
            }
        };
        say(&line(path, same, compared.as_ref(), args.json)).code(1)
    };
    let mut known: Vec<Known> = vec![];
    for path in &args.pictures {
        match read(path, args.expect.as_deref()) {
            Ok(picture) => known.push(picture),
            Err(error) => tell(path, Err(error))?,
        }
    }
    let hashed = |path: &PathBuf| Ok((path.clone(), Lora::open(path, 1.0)?.hash()?));
    let loras: HashMap<String, PathBuf> = args
        .lora
        .iter()
        .map(|path| hashed(path).map(|(path, hash)| (hash, path)))
        .collect::<Result<_>>()
        .code(3)?;
    let embeddings = args
        .embedding
        .iter()
        .map(|asked| Embedding::asked(asked))
        .collect::<Result<Vec<_>>>()
        .code(3)?;
    // pictures of one model and type are drawn together
    while let Some(first) = known.first() {
        let first = first.settings.clone();
        let (group, rest): (Vec<Known>, Vec<Known>) =
            known.into_iter().partition(|Known { settings: s, .. }| {
                let same_model = args.model.is_some() || s.model == first.model;
                let same_vae = s.vae == first.vae
                    || args.vae.is_some() && s.vae.is_some() && first.vae.is_some();
                let same_changes = s.loras == first.loras && s.embeddings == first.embeddings;
                let same_upscaler = s.upscaler == first.upscaler && s.upscale == first.upscale;
                same_model
                    && same_vae
                    && same_changes
                    && same_upscaler
                    && s.dtype == first.dtype
                    && s.refiner == first.refiner
            });
        known = rest;
        if let Some(UsedLora { name, hash, .. }) = first
            .loras
            .iter()
            .find(|lora| !loras.contains_key(&*lora.hash))
        {
            for known in &group {
                let hint = "pass its file with `--lora`";
                tell(
                    &known.path,
                    Err(anyhow::anyhow!(
                        "it was drawn with the LoRA `{name}`, SHA-256 {hash:.12}\n\nhint: {hint}"
                    )),
                )?;
            }
            continue;
        }
        let dtype = DTypeChoice::from_str(&first.dtype, true)
            .map_err(anyhow::Error::msg)
            .context("unknown type of weights")
            .code(1)?;
        let compute = Compute::choose(args.device, dtype).code(2)?;
        let reference = args.model.as_deref().unwrap_or(OsStr::new(&*first.model));
        let refiner = first
            .refiner
            .as_deref()
            .map(|refiner| args.refiner.as_deref().unwrap_or(OsStr::new(refiner)));
        let mut checkpoint = open_both(Some(reference), refiner, args.offline, !args.quiet)
            .with_context(|| {
                format!(
                    "the model of `{}` cannot be opened",
                    group[0].path.display()
                )
            })
            .code(3)?;
        let named = first.vae.as_deref().map(|vae| {
            args.vae
                .clone()
                .or_else(|| vae.contains('/').then(|| OsString::from(vae)))
        });
        if let Some(vae) = named.flatten() {
            use_vae(&mut checkpoint, &vae, args.offline, !args.quiet).code(3)?;
        }
        merge(
            &mut checkpoint,
            &args.merge,
            args.minus.as_deref(),
            args.offline,
            !args.quiet,
        )
        .code(3)?;
        // a name tells of a distillation too, so it is that of the drawing
        let again = first.loras.iter().filter_map(|used| {
            let lora = Lora::open(loras.get(&*used.hash)?, used.strength);
            Some(lora.map(|mut lora| {
                lora.name = used.name.to_string();
                lora
            }))
        });
        checkpoint.use_loras(again, false).code(3)?;
        // no others: a prompt may have a word that meant nothing when it was drawn
        let again = first.embeddings.iter().filter_map(|used| {
            let embedding = embeddings
                .iter()
                .find(|embedding| embedding.hash == used.hash)?;
            Some(Embedding {
                token: used.name.clone(),
                ..embedding.clone()
            })
        });
        checkpoint.use_embeddings(again.collect()).code(3)?;
        // without a hash it has no weights, and its name is enough
        let reference = first
            .upscaler
            .as_deref()
            .map(OsStr::new)
            .filter(|_| first.upscaler_hash.is_none());
        let reference = reference.or(args
            .upscaler
            .as_deref()
            .filter(|_| first.upscaler.is_some()));
        let upscaler = reference
            .map(|reference| Upscaler::open(reference, first.upscale, &compute))
            .transpose()
            .code(3)?;
        compare(
            group,
            &checkpoint,
            upscaler.as_ref(),
            &compute,
            &progress,
            &mut tell,
        )?;
    }
    if bad == 0 {
        Ok(())
    } else {
        Err(anyhow::anyhow!(
            "{bad} of {} pictures are not the same{hint}",
            args.pictures.len()
        ))
        .code(1)
    }
}

/// Reads a picture, and the one that it should look like if that is another.
fn read(path: &Path, expect: Option<&Path>) -> Result<Known> {
    let bytes = std::fs::read(path).context("it cannot be read")?;
    let metadata = read_metadata(&bytes)?.context("it does not say how it was drawn")?;
    let unreadable = "what it says of its drawing cannot be read";
    require_drawn(&metadata.sdgen)?;
    let trace = Trace::of(&metadata.sdgen).context(unreadable)?;
    let settings = serde_json::from_value(metadata.sdgen).context(unreadable)?;
    let format = Format::of_bytes(&bytes).context("it is neither PNG, JPEG nor WebP")?;
    let expected = match expect {
        Some(path) => {
            let bytes = std::fs::read(path)
                .with_context(|| format!("`{}` cannot be read", path.display()))?;
            Picture::decode(&bytes).with_context(|| format!("`{}` is damaged", path.display()))?
        }
        None => Picture::decode(&bytes).context("it is damaged")?,
    };
    Ok(Known {
        path: path.into(),
        settings,
        trace,
        format,
        expected,
    })
}

/// Draws the pictures of one model again and tells how each differs.
fn compare(
    group: Vec<Known>,
    checkpoint: &Checkpoint,
    upscaler: Option<&Upscaler>,
    compute: &Compute,
    progress: &Progress,
    tell: &mut Tell,
) -> Result<(), Failure> {
    let hash = checkpoint.hash().code(3)?;
    let vae_hash = checkpoint
        .vae
        .as_ref()
        .map(|vae| vae.hash())
        .transpose()
        .code(3)?;
    let refiner_hash = checkpoint
        .refiner
        .as_ref()
        .map(|refiner| refiner.hash())
        .transpose()
        .code(3)?;
    let merges = Merged::all(checkpoint).code(3)?;
    let mut request = Request::new(checkpoint).code(3)?;
    request.trace = group.iter().any(|known| known.trace.is_some());
    let has = |used: &UsedEmbedding| {
        checkpoint
            .embeddings
            .iter()
            .any(|embedding| embedding.token == used.name)
    };
    let mut drawn_again: Vec<&Known> = vec![];
    for known in &group {
        let of = &known.settings;
        let added = if *of.model_hash != *hash
            || of.refiner_hash.as_deref() != refiner_hash.as_deref()
        {
            let hint = "pass the model that drew it with `--model`";
            Err(anyhow::anyhow!(
                "it was drawn with other weights than those of `{}`\n\nhint: {hint}",
                checkpoint.name
            ))
        } else if of.vae_hash.as_deref() != vae_hash.as_deref() {
            let vae = of.vae.as_deref().unwrap_or_default();
            Err(anyhow::anyhow!(
                "it was drawn with the VAE `{vae}`\n\nhint: pass that with `--vae`"
            ))
        } else if of.merges != merges {
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
            Err(anyhow::anyhow!(
                "it was drawn with {named} merged into the model\n\nhint: pass the same with `--merge` and `--minus`"
            ))
        } else if let Some(UsedEmbedding { name, hash }) =
            of.embeddings.iter().find(|used| !has(used))
        {
            let hint = "pass its file with `--embedding`";
            Err(anyhow::anyhow!(
                "its prompt uses the embedding `{name}`, SHA-256 {hash:.10}\n\nhint: {hint}"
            ))
        } else if of.upscaler_hash.as_deref()
            != upscaler.and_then(|upscaler| upscaler.hash.as_deref())
        {
            let name = of.upscaler.as_deref().unwrap_or_default();
            Err(anyhow::anyhow!(
                "it was made larger by the network `{name}`\n\nhint: pass that with `--upscaler`"
            ))
        } else {
            request.add(known.settings.clone(), None, known.format)
        };
        match added {
            Ok(()) => drawn_again.push(known),
            Err(error) => tell(&known.path, Err(error))?,
        }
    }
    if compute.device.is_cpu() {
        require_memory(request.memory_bytes(checkpoint, 1)).code(4)?;
    }
    let jobs: Vec<&Job> = request.jobs.iter().collect();
    let mut told = Ok(());
    pipeline::generate(
        checkpoint,
        &request,
        &jobs,
        compute,
        progress,
        &|| false,
        &mut |job, drawn| {
            let Some(known) = drawn_again.get(job.index) else {
                return;
            };
            let outcome = drawn.and_then(|drawn| {
                let larger = upscaler
                    .map(|upscaler| upscaler.upscale(&drawn.picture, progress))
                    .transpose()?;
                let difference = difference(larger.as_ref().unwrap_or(&drawn.picture), known)?;
                let traces = known.trace.as_ref().zip(drawn.trace.as_ref());
                Ok(Compared {
                    difference,
                    first_difference: traces.map(|(known, drawn)| known.first_difference(drawn)),
                })
            });
            if told.is_ok() {
                told = tell(&known.path, outcome);
            }
        },
    )
    .code(1)?;
    told
}

/// How a drawn picture differs from the expected one, after the same trip through a file.
fn difference(drawn: &Picture, known: &Known) -> Result<Difference> {
    let drawn = Picture::decode(&drawn.encode(known.format, None)?)?;
    let sizes = [&drawn, &known.expected].map(|p| (p.width, p.height));
    if sizes[0] != sizes[1] {
        let [(w, h), (expected_w, expected_h)] = sizes;
        bail!("it is drawn in {w}x{h}, {expected_w}x{expected_h} is expected");
    }
    Ok(drawn.difference(&known.expected))
}

fn line(path: &Path, same: bool, compared: Option<&Compared>, json: bool) -> String {
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
