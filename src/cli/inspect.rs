//! `sdgen inspect`: what a checkpoint, a part of one or a LoRA is, from its headers alone.

use crate::cli::exit_code::{Code, Failure};
use crate::cli::stdout::say;
use crate::model::{Autoencoder, BackboneConfig, ModelKind};
use crate::pipeline::family::Family;
use crate::pipeline::model_spec::ModelFinder;
use crate::sampling::SchedulerConfig;
use crate::weights::embedding::Embedding;
use crate::weights::lora::Lora;
use crate::weights::{Checkpoint, PARTS, PartFile};
use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use std::ffi::OsString;
use std::path::Path;

/// Pixels a latent of all known models, for one without a VAE.
const USUAL_FACTOR: usize = 8;

/// The file to describe.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Folder, .safetensors file, hub id or short name
    model: OsString,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
    /// Never touch the network
    #[arg(long)]
    offline: bool,
}

/// Prints what a checkpoint, a LoRA or an embedding is.
pub fn run(args: &InspectArgs) -> Result<(), Failure> {
    say(&described(args).code(3)?).code(1)
}

fn described(args: &InspectArgs) -> Result<String> {
    let path = Path::new(&args.model);
    if Embedding::is_in(path) {
        return Ok(embedding(&Embedding::asked(&args.model)?, args.json));
    }
    if Lora::is_at(path) {
        let lora = Lora::open(path, 1.0)?;
        return if args.json {
            Ok(format!("{}\n", lora_as_json(&lora)?))
        } else {
            lora_as_text(&lora)
        };
    }
    if let Some(part) = PartFile::at(path)? {
        return Ok(part_file(&part, args.json));
    }
    let finder = ModelFinder {
        offline: args.offline,
        shows_progress: true,
    };
    let checkpoint = finder.open(Some(&args.model))?;
    if args.json {
        Ok(format!("{}\n", as_json(&checkpoint)?))
    } else {
        as_text(&checkpoint)
    }
}

fn parts(checkpoint: &Checkpoint) -> impl Iterator<Item = &'static str> {
    PARTS.into_iter().filter(|part| checkpoint.has(part))
}

/// Describes a checkpoint as one object: name, family, prediction, sampler, size, parts with parameters and stored types.
pub fn as_json(checkpoint: &Checkpoint) -> Result<Value> {
    let family = Family::detect(checkpoint)?;
    let scheduler = SchedulerConfig::from_json(checkpoint.config("scheduler")?)?.for_pipeline();
    let unet = BackboneConfig::of(checkpoint)?;
    let factor = checkpoint
        .optional_config("vae")
        .map_or(Ok(USUAL_FACTOR), |vae| {
            Ok::<_, anyhow::Error>(Autoencoder::from_json(vae)?.factor())
        })?;
    let (height, width) = unet.sample_size()?;
    let defaults = family.defaults(checkpoint);
    let part = |name: &str| {
        let (parameters, dtypes) = checkpoint.summary(name);
        (
            name.to_string(),
            json!({ "parameters": parameters, "stored_as": dtypes }),
        )
    };
    let parts: serde_json::Map<_, _> = parts(checkpoint).map(part).collect();
    Ok(json!({
        "name": checkpoint.name, "family": family.name(), "prediction": scheduler.prediction.to_string(),
        "sampler": scheduler.sampler().ok(), "width": width * factor, "height": height * factor,
        "steps": defaults.steps, "guidance": defaults.guidance, "distilled": defaults.distilled, "bytes": checkpoint.bytes(), "model_hash": checkpoint.hash()?,
        "takes": match unet.kind()? {
            ModelKind::TextToImage => Value::Null,
            ModelKind::Inpaint | ModelKind::Fill => "a picture and a mask: for inpainting".into(),
            ModelKind::InstructPix2Pix => "a picture, which it edits".into(),
            ModelKind::Control => "a picture of edges or depth, by which it draws".into(),
        },
        "parts": parts,
        "assumed": checkpoint.warnings().iter().chain(checkpoint.assumptions()).collect::<Vec<_>>(), "unused_tensors": checkpoint.unexpected_keys().len(),
    }))
}

/// Describes a checkpoint for a person.
pub fn as_text(checkpoint: &Checkpoint) -> Result<String> {
    let json = as_json(checkpoint)?;
    let text = |key: &str| {
        json.get(key)
            .map(|v| v.as_str().map_or_else(|| v.to_string(), String::from))
            .unwrap_or_default()
    };
    let mut out = format!("{}: {}\n", text("name"), text("family"));
    let hash = text("model_hash");
    out += &format!("  hash          {}\n", hash.get(..10).unwrap_or(&hash));
    out += &format!("  prediction    {}\n", text("prediction"));
    out += &format!(
        "  draws         {}x{} in {} steps of {}, guidance {}\n",
        text("width"),
        text("height"),
        text("steps"),
        text("sampler"),
        if json.get("guidance").and_then(Value::as_f64) == Some(1.0) {
            "off".into()
        } else {
            text("guidance")
        }
    );
    if let Some(distilled) = json.get("distilled").and_then(Value::as_str) {
        out += &format!("  distilled     {distilled}\n");
    }
    if let Some(takes) = json.get("takes").and_then(Value::as_str) {
        out += &format!("  takes         {takes}\n");
    }
    out += &format!(
        "  file size     {:.1} MB\n",
        checkpoint.bytes() as f64 / 1e6
    );
    for part in parts(checkpoint) {
        let (parameters, dtypes) = checkpoint.summary(part);
        let dtypes: Vec<&str> = dtypes.into_iter().collect();
        out += &format!(
            "  {part:<16}{:.1} M parameters, {}\n",
            parameters as f64 / 1e6,
            dtypes.join(" and ")
        );
    }
    if checkpoint.require_vae().is_err() {
        out += "  vae           none: this model cannot draw by itself\n";
    }
    for assumed in checkpoint.warnings().iter().chain(checkpoint.assumptions()) {
        out += &format!(
            "  assumed       {}\n",
            assumed.trim_start_matches("assumed ")
        );
    }
    Ok(out)
}

/// Describes a file that is a part of a model: what it is of, what takes it, and what it needs.
fn part_file(part: &PartFile, as_json: bool) -> String {
    let PartFile {
        name,
        kind,
        family,
        parameters,
        stored_as,
        bytes,
        option,
        needs,
        assumptions,
    } = part;
    if as_json {
        let json = json!({
            "name": name, "kind": kind, "family": family, "parameters": parameters,
            "stored_as": stored_as, "bytes": bytes, "option": option, "needs": needs,
            "assumed": assumptions,
        });
        return format!("{json}\n");
    }
    let mut out = format!("{name}: {kind} of {family}\n");
    out += &format!(
        "  weights       {:.1} M parameters, {}\n",
        *parameters as f64 / 1e6,
        stored_as.join(" and ")
    );
    out += &format!("  file size     {:.1} MB\n", *bytes as f64 / 1e6);
    out += &format!("  option        {option}\n");
    for need in needs {
        out += &format!("  needs         {need}\n");
    }
    for assumed in assumptions {
        out += &format!("  assumed       {assumed}\n");
    }
    out
}

/// Describes a LoRA as one object: name, family that it seems to be for, format of its names,
/// methods, ranks, alphas, parts with their layers.
pub fn lora_as_json(lora: &Lora) -> Result<Value> {
    let distillation = lora.distillation();
    Ok(json!({
        "name": lora.name, "kind": "LoRA", "family": lora.family(), "format": lora.format(), "methods": lora.methods(),
        "ranks": lora.ranks(), "alphas": lora.alphas()?, "parts": lora.parts(), "words": lora.words().collect::<Vec<_>>(), "unknown_tensors": lora.unknown_keys().len(),
        "distilled": distillation.as_ref().map(|named| named.method), "steps": distillation.as_ref().map(|named| named.steps),
        "bytes": lora.bytes(), "hash": lora.hash()?,
    }))
}

/// Describes a LoRA for a person.
pub fn lora_as_text(lora: &Lora) -> Result<String> {
    let all =
        |numbers: &mut dyn Iterator<Item = String>| match numbers.collect::<Vec<_>>().as_slice() {
            [] => "none".into(),
            [one] => one.clone(),
            [first, .., last] => format!("{first} to {last}"),
        };
    let hash = lora.hash()?;
    let mut out = format!(
        "{}: LoRA for {}\n",
        lora.name,
        lora.family()
            .unwrap_or("a model that its shapes do not tell")
    );
    out += &format!("  hash          {}\n", hash.get(..12).unwrap_or(&hash));
    out += &format!("  names         {}\n", lora.format());
    out += &format!(
        "  layers        {}\n",
        lora.methods().into_iter().collect::<Vec<_>>().join(", ")
    );
    out += &format!(
        "  rank          {}\n",
        all(&mut lora.ranks().iter().map(usize::to_string))
    );
    let alphas = lora.alphas()?;
    let alpha = if alphas.is_empty() {
        "the rank".into()
    } else {
        all(&mut alphas.iter().map(f64::to_string))
    };
    out += &format!("  alpha         {alpha}\n");
    for (part, layers) in lora.parts() {
        out += &format!("  {part:<14}{layers} layers\n");
    }
    if let Some(named) = lora.distillation() {
        out += &format!("  distilled     {}: {} steps\n", named.method, named.steps);
    }
    let words: Vec<&str> = lora.words().collect();
    if !words.is_empty() {
        out += &format!("  words         {}\n", words.join(", "));
    }
    if !lora.unknown_keys().is_empty() {
        out += &format!("  unknown       {} tensors\n", lora.unknown_keys().len());
    }
    Ok(out + &format!("  file size     {:.1} MB\n", lora.bytes() as f64 / 1e6))
}

/// Describes an embedding: its vectors, their widths, and the model families with those widths.
pub fn embedding(embedding: &Embedding, as_json: bool) -> String {
    let Embedding {
        token,
        hash,
        vectors,
        ..
    } = embedding;
    let (widths, family) = (embedding.widths(), embedding.family());
    if as_json {
        let json = json!({ "kind": "embedding", "name": token, "vectors": vectors, "widths": widths, "family": family, "hash": hash });
        return format!("{json}\n");
    }
    let widths: Vec<String> = widths.iter().map(usize::to_string).collect();
    let mut out = format!(
        "{token}: embedding (textual inversion) for {}\n",
        family.unwrap_or("a model of no known widths")
    );
    let hash = hash.as_deref().unwrap_or_default();
    out += &format!("  hash          {}\n", hash.get(..10).unwrap_or(hash));
    out + &format!("  vectors       {vectors}, {} wide\n", widths.join(" and "))
}
