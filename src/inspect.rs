//! `sdgen inspect`: what a checkpoint is, from its headers alone.

use crate::family::Family;
use crate::model::Autoencoder;
use crate::model::unet::{Beside, UNetConfig};
use crate::schedule::SchedulerConfig;
use crate::weights::{Checkpoint, PARTS};
use anyhow::Result;
use serde_json::{Value, json};

/// Pixels a latent of all known models, for one without a VAE.
const USUAL_FACTOR: usize = 8;

fn parts(checkpoint: &Checkpoint) -> impl Iterator<Item = &'static str> {
    PARTS.into_iter().filter(|part| checkpoint.has(part))
}

/// One object: name, family, prediction, sampler, size, parts with parameters and stored types.
pub fn as_json(checkpoint: &Checkpoint) -> Result<Value> {
    let family = Family::detect(checkpoint)?;
    let scheduler = SchedulerConfig::from_json(checkpoint.config("scheduler")?)?.for_pipeline();
    let unet = UNetConfig::from_json(checkpoint.config("unet")?)?;
    let factor =
        checkpoint.configs.get("vae").map_or(Ok(USUAL_FACTOR), |vae| Ok::<_, anyhow::Error>(Autoencoder::from_json(vae)?.factor()))?;
    let (height, width) = unet.sample_size()?;
    let defaults = family.defaults(checkpoint);
    let part = |name: &str| {
        let (parameters, dtypes) = checkpoint.summary(name);
        (name.to_string(), json!({ "parameters": parameters, "stored_as": dtypes }))
    };
    let parts: serde_json::Map<_, _> = parts(checkpoint).map(part).collect();
    Ok(json!({
        "name": checkpoint.name, "family": family.name(), "prediction": scheduler.prediction.to_string(),
        "sampler": scheduler.sampler().to_string(), "width": width * factor, "height": height * factor,
        "steps": defaults.steps, "guidance": defaults.guidance, "distilled": defaults.distilled, "bytes": checkpoint.bytes(), "model_hash": checkpoint.hash()?,
        "takes": match unet.beside()? {
            Beside::Nothing => Value::Null,
            Beside::Masked => "a picture and a mask: for inpainting".into(),
            Beside::Picture => "a picture, which it edits".into(),
        },
        "parts": parts,
        "assumed": checkpoint.doubt.iter().chain(&checkpoint.assumed).collect::<Vec<_>>(), "unused_tensors": checkpoint.ignored.len(),
    }))
}

/// The same for a person.
pub fn as_text(checkpoint: &Checkpoint) -> Result<String> {
    let json = as_json(checkpoint)?;
    let text = |key: &str| json.get(key).map(|v| v.as_str().map_or_else(|| v.to_string(), String::from)).unwrap_or_default();
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
        if json.get("guidance").and_then(Value::as_f64) == Some(1.0) { "off".into() } else { text("guidance") }
    );
    if let Some(distilled) = json.get("distilled").and_then(Value::as_str) {
        out += &format!("  distilled     {distilled}\n");
    }
    if let Some(takes) = json.get("takes").and_then(Value::as_str) {
        out += &format!("  takes         {takes}\n");
    }
    out += &format!("  file size     {:.1} MB\n", checkpoint.bytes() as f64 / 1e6);
    for part in parts(checkpoint) {
        let (parameters, dtypes) = checkpoint.summary(part);
        let dtypes: Vec<&str> = dtypes.into_iter().collect();
        out += &format!("  {part:<16}{:.1} M parameters, {}\n", parameters as f64 / 1e6, dtypes.join(" and "));
    }
    if checkpoint.require_vae().is_err() {
        out += "  vae           none: this model cannot draw by itself\n";
    }
    for assumed in checkpoint.doubt.iter().chain(&checkpoint.assumed) {
        out += &format!("  assumed       {}\n", assumed.trim_start_matches("assumed "));
    }
    Ok(out)
}
