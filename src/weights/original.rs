//! A model under its original names: the tensors of a single file, as Stability, Black Forest Labs and
//! ComfyUI call them. The inverse of how `key_mapping` and `transformers` read such files, made from
//! the same tables.

use super::checkpoint::is_leftover;
use super::key_mapping::{self, Named};
use super::transformers::{Drawn, EncoderKind};
use super::{Checkpoint, ENCODERS, SD3_CLASS, TRANSFORMER, UNET};
use anyhow::{Result, bail};
use std::collections::BTreeSet;

/// A tensor of a single file.
pub(super) struct OriginalTensor {
    pub name: String,
    /// the tensors here that its rows come from, in their order
    pub parts: Vec<Named>,
    /// it is a convolution of one pixel, where the tensor here is a matrix
    pub is_convolution: bool,
}

/// The tensors of a file with these components of a checkpoint. Errors if one of them has no name
/// there.
pub(super) fn tensors(
    checkpoint: &Checkpoint,
    components: &[&'static str],
) -> Result<Vec<OriginalTensor>> {
    let mut all = vec![];
    for component in components {
        let before = all.len();
        match *component {
            UNET => all.extend(unet(checkpoint)),
            TRANSFORMER => all.extend(transformer(checkpoint, components == [TRANSFORMER])),
            "vae" => all.extend(vae(checkpoint)),
            encoder => all.extend(text_encoder(checkpoint, encoder)),
        }
        let written: BTreeSet<&str> = all
            .iter()
            .skip(before)
            .flat_map(|tensor: &OriginalTensor| &tensor.parts)
            .map(|part| part.name.as_str())
            .collect();
        let mut own = checkpoint.tensors_of(component).map(|(name, ..)| name);
        if let Some(name) = own.find(|name| !written.contains(name) && !is_leftover(name)) {
            bail!(
                "`{}` has a tensor `{name}`, which has no name in single files\n\nhint: convert it to a folder: `sdgen convert MODEL FOLDER/`",
                checkpoint.name
            );
        }
        let is_missing = |part: &&Named| checkpoint.shape_of(&part.name).is_none();
        let mut parts = all.iter().skip(before).flat_map(|tensor| &tensor.parts);
        if let Some(part) = parts.find(is_missing) {
            bail!(checkpoint.missing_tensor(&part.name));
        }
    }
    require_readable(checkpoint, &all)?;
    Ok(all)
}

/// Errors if the file of a model with a U-Net would be read as another one.
fn require_readable(checkpoint: &Checkpoint, tensors: &[OriginalTensor]) -> Result<()> {
    if checkpoint.denoiser() != UNET {
        return Ok(());
    }
    let names = tensors.iter().map(|tensor| tensor.name.as_str());
    let read = key_mapping::from_original(names).names;
    for OriginalTensor { name, parts, .. } in tensors {
        if read.get(name) != Some(parts) {
            bail!(
                "`{}` is of a kind that single files do not tell: its tensor `{name}` would be taken for another\n\nhint: convert it to a folder: `sdgen convert MODEL FOLDER/`",
                checkpoint.name
            );
        }
    }
    Ok(())
}

fn whole(name: String, part: &str) -> OriginalTensor {
    OriginalTensor {
        name,
        parts: Named::whole(part.into()),
        is_convolution: false,
    }
}

fn unet(checkpoint: &Checkpoint) -> Vec<OriginalTensor> {
    let count = |prefix: &str| checkpoint.count(&format!("unet.{prefix}"));
    let original = |(name, ..): (&str, &[usize], &str)| {
        let (layer, end) = name.strip_prefix("unet.")?.rsplit_once('.')?;
        let layer = key_mapping::to_original(layer, count)?;
        Some(whole(format!("model.diffusion_model.{layer}.{end}"), name))
    };
    checkpoint.tensors_of(UNET).filter_map(original).collect()
}

/// The tensors of a transformer, behind ComfyUI's prefix unless it is alone in its file.
fn transformer(checkpoint: &Checkpoint, is_alone: bool) -> Vec<OriginalTensor> {
    let Some(drawn) = checkpoint.drawn() else {
        return vec![];
    };
    let prefix = if is_alone {
        ""
    } else {
        "model.diffusion_model."
    };
    let mut all: Vec<OriginalTensor> = drawn
        .original_tensors(checkpoint)
        .into_iter()
        .map(|(name, parts)| OriginalTensor {
            name: format!("{prefix}{name}"),
            parts,
            is_convolution: false,
        })
        .collect();
    let renamed = all.iter().flat_map(|tensor| &tensor.parts);
    let renamed: BTreeSet<String> = renamed.map(|part| part.name.clone()).collect();
    let blocks = checkpoint.count("transformer.transformer_blocks.");
    let rest = checkpoint.tensors_of(TRANSFORMER).filter_map(|(name, ..)| {
        let own = name.strip_prefix("transformer.")?;
        let is_same = drawn.names(own, blocks) == Some(Named::whole(name.into()));
        (is_same && !renamed.contains(name)).then(|| whole(format!("{prefix}{own}"), name))
    });
    all.extend(rest);
    all
}

fn vae(checkpoint: &Checkpoint) -> Vec<OriginalTensor> {
    let class = checkpoint.optional_config(TRANSFORMER);
    let is_sd3 = class.is_some_and(|config| config["_class_name"] == SD3_CLASS);
    // as Stability's files have it, and those for ComfyUI of other families
    let prefix = match checkpoint.denoiser() == UNET || is_sd3 {
        true => "first_stage_model.",
        false => "vae.",
    };
    let up_blocks = checkpoint.count_of("vae", "decoder.up_blocks.");
    let original = |(name, shape, _): (&str, &[usize], &str)| {
        let own = name.strip_prefix("vae.")?;
        let original = key_mapping::vae_to_original(own, up_blocks)?;
        let is_convolution = is_vae_attention(own) && shape.len() == 2;
        Some(OriginalTensor {
            is_convolution,
            ..whole(format!("{prefix}{original}"), name)
        })
    };
    checkpoint.tensors_of("vae").filter_map(original).collect()
}

/// Whether a tensor is a matrix of a VAE's attention, by its name in the VAE.
pub(super) fn is_vae_attention(name: &str) -> bool {
    name.contains(".attentions.") && name.contains(".to_") && name.ends_with(".weight")
}

fn text_encoder(checkpoint: &Checkpoint, component: &'static str) -> Vec<OriginalTensor> {
    let prefix = match checkpoint.drawn() {
        Some(drawn) => comfy_prefix(checkpoint, drawn, component),
        None => match stability_prefix(checkpoint, component) {
            (prefix, false) => prefix.into(),
            (prefix, true) => return open_clip(checkpoint, component, prefix),
        },
    };
    let original = |(name, ..): (&str, &[usize], &str)| {
        let own = name.strip_prefix(component)?.strip_prefix('.')?;
        Some(whole(format!("{prefix}{own}"), name))
    };
    checkpoint
        .tensors_of(component)
        .filter_map(original)
        .collect()
}

/// What stands before the names of a text encoder in ComfyUI's files of a whole model.
fn comfy_prefix(checkpoint: &Checkpoint, drawn: &Drawn, component: &str) -> String {
    let mut encoders = drawn.encoders.iter();
    let encoder = encoders.find(|it| it.component == component);
    let name = match encoder.map(|it| it.kind) {
        Some(EncoderKind::T5) => "t5xxl".into(),
        Some(EncoderKind::Qwen3) => {
            let config = checkpoint.optional_config(component);
            let width = config.and_then(|config| config.get("hidden_size")?.as_u64());
            let name = EncoderKind::Qwen3.name(width.unwrap_or(0) as usize);
            name.to_lowercase().replace([' ', '.'], "_")
        }
        _ if component == ENCODERS[0] => "clip_l".into(),
        _ => "clip_g".into(),
    };
    format!("text_encoders.{name}.transformer.")
}

/// What stands before the names of a U-Net's text encoder in Stability's files, and whether these are
/// OpenCLIP's.
fn stability_prefix(checkpoint: &Checkpoint, component: &str) -> (&'static str, bool) {
    let unet = checkpoint.optional_config(UNET);
    let is_linear = unet.is_some_and(|unet| unet["use_linear_projection"] == true);
    let [has_first, has_second] = [ENCODERS[0], ENCODERS[1]].map(|it| checkpoint.has(it));
    match (component == ENCODERS[0], has_first && has_second) {
        (true, true) => ("conditioner.embedders.0.transformer.", false),
        (true, false) if is_linear => ("cond_stage_model.model.", true),
        (true, false) => ("cond_stage_model.transformer.", false),
        (false, true) => ("conditioner.embedders.1.model.", true),
        // a refiner reads with the second alone
        (false, false) => ("conditioner.embedders.0.model.", true),
    }
}

fn open_clip(checkpoint: &Checkpoint, component: &str, prefix: &str) -> Vec<OriginalTensor> {
    let layers = checkpoint.count_of(component, "text_model.encoder.layers.");
    let all = key_mapping::open_clip_tensors(component, layers);
    let is_there = |part: &Named| checkpoint.shape_of(&part.name).is_some();
    all.into_iter()
        .filter(|(_, parts)| parts.iter().any(is_there))
        .map(|(key, parts)| OriginalTensor {
            name: format!("{prefix}{key}"),
            parts,
            is_convolution: false,
        })
        .collect()
}
