//! How a checkpoint is opened: a diffusers folder, an original single file, a file that brings its
//! configuration, the model inside the program; a VAE or an upscaler alone.
//!
//! Only headers and JSON are read. Errors say what a file is that cannot be opened as what was
//! asked for.

use super::config::number;
use super::embedding::Embedding;
use super::file;
use super::infer_config::{self, VaeScale};
use super::key_mapping::{self, Layout, Named, Part};
use super::model_files::{file_name, folder_name, read_json, tokenizer, weight_paths};
use super::transformers::{EncoderFile, EncoderKind, OTHER_ENCODERS};
use super::weights_file::WeightsFile;
use super::{
    Checkpoint, DEFAULTS, DEFAULTS_KEY, ENCODERS, FLUX_CLASS, KONTEXT_PIPELINE, OWN_CONFIGS,
    OWN_CONFIGS_KEY, PARTS, TRANSFORMER, TokenizerFiles, TokenizerSource, UNET, transformers,
};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where a checkpoint's bytes come from.
pub enum Origin<'a> {
    Embedded,
    Path(&'a Path),
}

/// The upscalers that can be used, for error messages.
pub const UPSCALERS: &str = "ESRGAN, ESRGAN+, Real-ESRGAN and its compact networks (RRDBNet, SRVGGNetCompact), SPAN and RealPLKSR can be used, from .safetensors files";

/// `model_type` of text encoders whose tokenizer is in tokenizer.json.
const WITH_JSON: [&str; 2] = ["qwen3", "t5"];

/// The folders of the tokenizers, in the order of [`ENCODERS`].
pub(super) const TOKENIZERS: [&str; 3] = ["tokenizer", "tokenizer_2", "tokenizer_3"];

/// What errors about other models say.
pub(super) const TODAY: &str =
    "Stable Diffusion 1.x, 2.x, XL, 3.x, FLUX.1, FLUX.2 klein and Z-Image work today";

/// Parts of the names of diffusers' pipelines that draw otherwise with the same parts, or with others.
const OTHER_PIPELINES: [&str; 16] = [
    "Adapter",
    "AltDiffusion",
    "AnimateDiff",
    "ControlNet",
    "Depth2Img",
    "Flux",
    "GLIGEN",
    "ImageVariation",
    "Kandinsky",
    "PaintByExample",
    "PixArt",
    "StableDiffusion3",
    "UnCLIP",
    "Upscale",
    "Video",
    "ZImage",
];

/// Those of these that are drawn.
const DRAWN_PIPELINES: [&str; 15] = [
    KONTEXT_PIPELINE,
    "StableDiffusion3Pipeline",
    "StableDiffusion3Img2ImgPipeline",
    "StableDiffusion3InpaintPipeline",
    "FluxPipeline",
    "FluxImg2ImgPipeline",
    "FluxInpaintPipeline",
    "FluxFillPipeline",
    "FluxControlPipeline",
    "FluxControlImg2ImgPipeline",
    "FluxControlInpaintPipeline",
    "Flux2KleinPipeline",
    "ZImagePipeline",
    "ZImageImg2ImgPipeline",
    "ZImageInpaintPipeline",
];

/// Beginnings of keys of single files that are drawn in another way than their other keys tell.
const OTHER_KINDS: [(&str, &str); 16] = [
    (
        "edm_mean",
        "is an EDM model whose latents have a mean and a spread of their own (Playground v2.5)",
    ),
    (
        "edm_std",
        "is an EDM model whose latents have a mean and a spread of their own (Playground v2.5)",
    ),
    ("edm_vpred.", "is an EDM model that predicts v (CosXL)"),
    ("control_model.", "is a ControlNet together with its model"),
    ("depth_model.", "draws from a depth map"),
    ("low_scale_model.", "enlarges pictures by a prompt (x4)"),
    (
        "model.diffusion_model.label_emb.weight",
        "is told a class or a noise level besides the prompt (the x4 upscaler)",
    ),
    ("noise_augmentor.", "draws from a picture (unCLIP)"),
    ("embedder.model.visual.", "draws from a picture (unCLIP)"),
    ("cc_projection.", "draws from a picture (Zero-1-to-3)"),
    (
        "cond_stage_model.roberta.",
        "has another text encoder (AltDiffusion)",
    ),
    (
        "cond_stage_model.transformer.token_emb.",
        "has another text encoder (latent diffusion of 2021)",
    ),
    (
        "model.diffusion_model.position_net.",
        "draws by boxes (GLIGEN)",
    ),
    (
        "conditioner.embedders.0.open_clip.",
        "draws videos (Stable Video Diffusion)",
    ),
    ("image_proj.", "is an IP-Adapter, not a model"),
    ("ip_adapter.", "is an IP-Adapter, not a model"),
];

/// The configurations that a single file keeps in its header. Errors if they are damaged.
pub(super) fn own_configs(source: &WeightsFile) -> Result<Vec<(String, Value)>> {
    let Some(text) = source.metadata(OWN_CONFIGS_KEY) else {
        return Ok(vec![]);
    };
    let configs: BTreeMap<String, Value> = serde_json::from_str(text).with_context(|| {
        format!(
            "`{OWN_CONFIGS_KEY}` in the header of `{}` is damaged",
            source.path().display()
        )
    })?;
    let is_own = |(name, config): &(String, Value)| {
        OWN_CONFIGS.contains(&name.as_str()) && config.is_object()
    };
    Ok(configs.into_iter().filter(is_own).collect())
}

impl Checkpoint {
    /// Opens a folder, a file or the embedded model; reads headers and configuration only.
    /// Errors say what is missing or damaged, and what to do.
    pub fn open(origin: Origin) -> Result<Self> {
        match origin {
            Origin::Embedded => Self::embedded(),
            Origin::Path(path) if path.is_dir() => Self::folder(path),
            Origin::Path(path) if file::is_absent(path) => bail!(
                "`{}` does not exist\n\nhint: pass a diffusers folder, a .safetensors file, a hub id (owner/name) or a short name with `--model`",
                path.display()
            ),
            Origin::Path(path) => Self::file(path),
        }
    }

    #[cfg(feature = "mini")]
    fn embedded() -> Result<Self> {
        static MINI: &[u8] = include_bytes!("../../assets/mini.safetensors");
        Self::canonical(
            "mini".into(),
            WeightsFile::embedded("the embedded model", MINI)?,
        )
    }

    #[cfg(not(feature = "mini"))]
    fn embedded() -> Result<Self> {
        bail!(
            "this sdgen was built without the embedded model\n\nhint: build it with the feature `mini`, or name a model with `--model`"
        )
    }

    /// Opens the folder of a diffusers model, or one that holds a single file.
    fn folder(path: &Path) -> Result<Self> {
        let index_path = path.join("model_index.json");
        if !index_path.exists() {
            return Self::folder_of_parts(path);
        }
        let index = read_json(&index_path)?;
        if let Some(class) = index.get("_class_name").and_then(Value::as_str)
            && OTHER_PIPELINES.iter().any(|part| class.contains(part))
            && !(DRAWN_PIPELINES.contains(&class) && index.get(TRANSFORMER).is_some())
        {
            bail!(
                "`{}` is for diffusers' `{class}`, which sdgen does not draw\n\nhint: {TODAY}",
                path.display()
            );
        }
        if ![UNET, TRANSFORMER]
            .iter()
            .any(|part| index.get(part).is_some())
        {
            bail!(
                "`{}` lists no `unet` and no `transformer`, so that it is not the index of a model that sdgen draws\n\nhint: fetch the whole model again, for example with `sdgen pull`",
                index_path.display()
            );
        }
        let needed = needed_folders(path, &index)?;
        let is_needed = |folder: &&str| needed.contains(folder);
        let mut checkpoint = Self::empty(folder_name(path));
        checkpoint.folder = Some(path.into());
        checkpoint.is_configured = true;
        for part in PARTS.into_iter().filter(is_needed) {
            let folder = path.join(part);
            checkpoint
                .configs
                .insert(part.into(), read_json(&folder.join("config.json"))?);
            checkpoint.add_folder(&folder, part)?;
        }
        checkpoint.configs.insert(
            "scheduler".into(),
            read_json(&path.join("scheduler/scheduler_config.json"))?,
        );
        for (encoder, folder) in ENCODERS.into_iter().zip(TOKENIZERS) {
            if is_needed(&folder) {
                let config = checkpoint.configs.get(encoder);
                let kind = config.and_then(|config| config["model_type"].as_str());
                let is_chat = kind.is_some_and(|kind| WITH_JSON.contains(&kind));
                checkpoint
                    .tokenizers
                    .insert(encoder, tokenizer(&path.join(folder), is_chat)?);
            }
        }
        if let Some(defaults) = index.get(DEFAULTS_KEY) {
            let defaults = defaults.clone();
            checkpoint.configs.insert(DEFAULTS.into(), defaults);
        }
        checkpoint.configs.insert("pipeline".into(), index);
        Ok(checkpoint)
    }

    /// Adds the weights of one component from its folder.
    pub(super) fn add_folder(&mut self, folder: &Path, component: &str) -> Result<()> {
        for file in weight_paths(folder)? {
            self.add_source(WeightsFile::open(&file)?, |key| {
                key_mapping::from_diffusers(component, key)
            })?;
        }
        Ok(())
    }

    fn file(path: &Path) -> Result<Self> {
        let source = WeightsFile::open(path)?;
        let keys = source.keys();
        let wrapper = key_mapping::wrapper(keys.iter().map(String::as_str));
        let other_kind = keys.iter().find_map(|key| {
            let bare = key.strip_prefix(wrapper)?;
            let (_, what) = OTHER_KINDS
                .iter()
                .find(|(start, _)| bare.starts_with(start))?;
            Some((key, what))
        });
        if let Some((key, what)) = other_kind {
            bail!(
                "`{}` {what}, which sdgen does not draw: it has a tensor `{key}`\n\nhint: {TODAY}",
                path.display()
            );
        }
        let layout = key_mapping::layout(keys.iter().map(String::as_str));
        let transformer = transformers::find(keys.iter().map(String::as_str));
        if let Some(found) = transformer.filter(|_| layout != Layout::Adapter) {
            return Self::transformer_file(path, source, found);
        }
        match layout {
            Layout::Original => Self::original(path, source, &keys),
            Layout::Canonical if source.metadata("sdgen.configs").is_some() => {
                Self::canonical(file_name(path), source)
            }
            Layout::Adapter => bail!(
                "`{}` is a LoRA, not a model: it only changes one\n\nhint: pass a whole checkpoint with `--model`, and this with `--lora {0}`",
                path.display()
            ),
            Layout::Canonical | Layout::Unknown => {
                bail!("{}", not_a_checkpoint(path, &keys))
            }
        }
    }

    /// Opens a single file in CompVis' and Stability's layout, which brings no configuration.
    fn original(path: &Path, source: WeightsFile, keys: &[String]) -> Result<Self> {
        let mut checkpoint = Self::empty(file_name(path));
        let mapped = key_mapping::from_original(keys.iter().map(String::as_str));
        if let Some(key) = mapped.unknown.first() {
            bail!(
                "`{}` has a tensor `{key}`, and {} more, that no layer of Stable Diffusion has\n\nhint: it is a kind of model that sdgen does not draw",
                path.display(),
                mapped.unknown.len() - 1
            );
        }
        let map = mapped.names;
        let extra = infer_config::Extra::of(&source, keys);
        let own = own_configs(&source)?;
        checkpoint.add_source(source, |key| map.get(key).cloned().unwrap_or_default())?;
        checkpoint.require_parts(path)?;
        infer_config::configure(&mut checkpoint, extra)?;
        checkpoint.configs.extend(own);
        Ok(checkpoint)
    }

    /// Opens a file that brings its configuration and tokenizer in its header.
    fn canonical(name: String, source: WeightsFile) -> Result<Self> {
        let path = source.path().to_path_buf();
        let mut checkpoint = Self::empty(name);
        checkpoint.is_configured = true;
        let text = |key: &str| {
            source.metadata(key).with_context(|| {
                format!(
                    "`{}` has no `{key}` in its header\n\nhint: pass a diffusers folder or an original single file",
                    path.display()
                )
            })
        };
        let configs: BTreeMap<String, Value> = serde_json::from_str(text("sdgen.configs")?)
            .context("the embedded configuration is damaged")?;
        let files = TokenizerFiles::VocabMerges {
            vocab: text("sdgen.vocab")?.into(),
            merges: text("sdgen.merges")?.into(),
        };
        let config = configs.get("tokenizer").cloned().unwrap_or_default();
        checkpoint
            .tokenizers
            .insert(ENCODERS[0], TokenizerSource { files, config });
        checkpoint.configs = configs;
        checkpoint.add_source(source, |key| {
            vec![Named {
                name: key.into(),
                part: Part::Whole,
            }]
        })?;
        checkpoint.require_parts(&path)?;
        Ok(checkpoint)
    }

    fn require_parts(&self, path: &Path) -> Result<()> {
        if (self.has(ENCODERS[0]) || self.has(ENCODERS[1])) && self.has("unet") {
            return Ok(());
        }
        bail!(
            "{}\n\nhint: pass a whole checkpoint; this file is only a part of one",
            self.missing_parts(&path.display().to_string())
        );
    }

    /// Decodes with another VAE: a folder with its config.json, a model's folder, or one
    /// .safetensors file, which brings no scaling and shift factor and takes this model's. Errors
    /// if there is none at `path`, or one for other latents.
    pub fn use_vae(&mut self, path: &Path) -> Result<()> {
        let is_tiny = |vae: &Value| {
            vae.get("_class_name")
                .is_some_and(|class| class == "AutoencoderTiny")
        };
        let own = self.optional_config("vae").filter(|own| !is_tiny(own));
        let mut scale = infer_config::vae_scale(self);
        if let Some(own) = own {
            let scaling_factor = number("VAE", own, "scaling_factor")?;
            scale.scaling_factor = scaling_factor.unwrap_or(scale.scaling_factor);
            scale.shift_factor = number("VAE", own, "shift_factor")?;
        }
        let vae = Self::open_vae(path, scale)?;
        self.require_channels(&vae)?;
        self.configs
            .insert("vae".into(), vae.config("vae")?.clone());
        self.vae = Some(Box::new(vae));
        Ok(())
    }

    /// Errors if a VAE decodes other latents than those that are drawn.
    pub(super) fn require_channels(&self, vae: &Self) -> Result<()> {
        let channels =
            |config: &Value, key: &str| config.get(key).and_then(Value::as_u64).unwrap_or(4);
        let config = vae.config("vae")?;
        let is_packed = config
            .get("_class_name")
            .is_some_and(|class| class == "AutoencoderKLFlux2");
        // FLUX.2 draws 2x2 latents as one
        let each = if is_packed { 4 } else { 1 };
        let decoded = each * channels(config, "latent_channels");
        let drawn = match self.denoiser() {
            TRANSFORMER => {
                let config = self.config(TRANSFORMER)?;
                let is_flux = config.get("_class_name").is_some_and(|it| it == FLUX_CLASS);
                let gives = config.get("out_channels").and_then(Value::as_u64);
                match gives {
                    // FLUX.1's takes 2x2 latents as one token, whose channels it counts
                    _ if is_flux => gives.unwrap_or(channels(config, "in_channels")) / 4,
                    _ => channels(config, "in_channels"),
                }
            }
            unet => channels(self.config(unet)?, "out_channels"),
        };
        if decoded != drawn {
            bail!(
                "`{}` decodes {decoded} channels, `{}` draws in {drawn}\n\nhint: a VAE goes with the family it was made for",
                vae.name,
                self.name
            );
        }
        Ok(())
    }

    /// Opens a VAE alone; a file's takes this scale.
    pub(super) fn open_vae(path: &Path, scale: VaeScale) -> Result<Self> {
        let shown = path.display();
        if path.is_dir() {
            let nested = path.join("vae");
            let folder = if path.join("config.json").exists() {
                path
            } else {
                &nested
            };
            let whole = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
            let model = whole.parent().filter(|_| whole.ends_with("vae"));
            let mut vae = Self::empty(folder_name(model.unwrap_or(&whole)));
            let config = read_json(&folder.join("config.json")).with_context(|| {
                format!(
                    "`{shown}` is not a VAE\n\nhint: pass the folder that holds its config.json"
                )
            })?;
            vae.configs.insert("vae".into(), config);
            vae.is_configured = true;
            vae.add_folder(folder, "vae")?;
            return Ok(vae);
        }
        let source = WeightsFile::open(path)?;
        let mut vae = Self::empty(file_name(path));
        let keys = source.keys();
        let map = key_mapping::from_vae(keys.iter().map(String::as_str));
        vae.add_source(source, |key| map.get(key).cloned().unwrap_or_default())?;
        let config =
            infer_config::autoencoder(&vae, scale).with_context(|| match role(path, &keys) {
                Some((what, place)) if !what.ends_with("VAE") => {
                    format!("`{shown}` {what}, not a VAE\n\nhint: {place}")
                }
                _ => format!("`{shown}` is not a VAE that sdgen knows"),
            })?;
        vae.configs.insert("vae".into(), config);
        Ok(vae)
    }

    /// Opens a network that enlarges images: one .safetensors file. Errors say what the file is
    /// instead.
    pub fn open_upscaler(path: &Path) -> Result<Self> {
        let source = WeightsFile::open(path)?;
        let keys = source.keys();
        let map = key_mapping::from_upscaler(keys.iter().map(String::as_str));
        let mut upscaler = Self::empty(file_name(path));
        upscaler.add_source(source, |key| map.get(key).cloned().unwrap_or_default())?;
        let has_average = keys.iter().any(|key| key.contains("params_ema."));
        let unexpected = upscaler
            .unexpected_keys
            .iter()
            .find(|key| !has_average || !key.contains("params."));
        let first = keys.first().filter(|_| !upscaler.has("upscaler"));
        if let Some(key) = unexpected.or(first) {
            bail!("{}", not_an_upscaler(path, &keys, key));
        }
        Ok(upscaler)
    }
}

/// Whether a file has weights, by its name.
pub(super) fn is_weights(path: &Path) -> bool {
    let end = path.extension();
    end.is_some_and(|end| end == "safetensors" || end.eq_ignore_ascii_case("gguf"))
}

/// The one file of weights of a folder.
pub(super) fn only_file(folder: &Path) -> Result<PathBuf> {
    let files: Vec<PathBuf> = std::fs::read_dir(folder)
        .with_context(|| format!("cannot read folder `{}`", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| is_weights(path))
        .collect();
    let shown = folder.display();
    match files.as_slice() {
        [one] => Ok(one.clone()),
        [] => bail!(
            "`{shown}` has no model_index.json and no .safetensors or .gguf file\n\nhint: pass the folder of a diffusers model, or one .safetensors or .gguf file"
        ),
        [first, ..] => bail!(
            "`{shown}` has {} files of weights and no model_index.json\n\nhint: name one, for example `--model {}`",
            files.len(),
            first.display()
        ),
    }
}

/// The folders that a diffusers model needs, by what its model_index.json lists. Errors if one is
/// not there.
fn needed_folders(path: &Path, index: &Value) -> Result<Vec<&'static str>> {
    let is_listed = |part: &str| {
        index
            .get(part)
            .is_some_and(|v| v.get(0).is_some_and(|v| !v.is_null()))
    };
    let has_second = is_listed(ENCODERS[1]);
    let is_needed = |part: &&str| match *part {
        "text_encoder" | "tokenizer" | "vae" => is_listed(part) || !has_second,
        "text_encoder_2" | "tokenizer_2" => has_second,
        "text_encoder_3" | "tokenizer_3" => is_listed(part),
        UNET | TRANSFORMER => is_listed(part) || *part == UNET && !is_listed(TRANSFORMER),
        _ => true,
    };
    let needed: Vec<&str> = PARTS
        .into_iter()
        .chain(["scheduler"])
        .chain(TOKENIZERS)
        .filter(is_needed)
        .collect();
    if let Some(missing) = needed.iter().find(|part| !path.join(part).is_dir()) {
        let also = if is_listed(missing) {
            ", though model_index.json lists it"
        } else {
            ""
        };
        bail!(
            "`{}` has no folder `{missing}`{also}\n\nhint: fetch the whole model again, for example with `sdgen pull`",
            path.display()
        );
    }
    Ok(needed)
}

/// What a file of these keys is, and where it goes; `None` if it is nothing that sdgen knows.
pub fn role(path: &Path, keys: &[String]) -> Option<(&'static str, &'static str)> {
    let layout = key_mapping::layout(keys.iter().map(String::as_str));
    let starts_any = |prefixes: &[&str]| {
        let starts = |key: &String| prefixes.iter().any(|prefix| key.starts_with(prefix));
        keys.iter().any(starts)
    };
    let has_unet = || starts_any(&["unet.", "model.diffusion_model."]);
    let encoder = EncoderFile::find(keys.iter().map(String::as_str));
    let is_encoder = |kind: EncoderKind| encoder.as_ref().is_some_and(|it| it.kind == kind);
    Some(match layout {
        Layout::Adapter => ("is a LoRA", "`--lora` takes it"),
        _ if transformers::find(keys.iter().map(String::as_str))
            .is_some_and(|(family, _)| family.drawn.is_some()) =>
        {
            (
                "is the transformer of a model",
                "`--diffusion-model` takes it",
            )
        }
        _ if transformers::find(keys.iter().map(String::as_str)).is_some() => {
            ("is a model of a family that sdgen does not draw yet", TODAY)
        }
        _ if is_encoder(EncoderKind::Qwen3) => (
            "is only a text encoder (Qwen3)",
            "`--text-encoder` takes it",
        ),
        _ if is_encoder(EncoderKind::T5) => {
            ("is only a text encoder (T5)", "`--text-encoder` takes it")
        }
        Layout::Original | Layout::Canonical if has_unet() => {
            ("is a checkpoint", "`--model` takes it")
        }
        _ if starts_any(&[
            "decoder.",
            "encoder.down",
            "vae.decoder.",
            "first_stage_model.",
            "state_dict.decoder.",
        ]) =>
        {
            ("is only a VAE", "`--vae` takes it")
        }
        _ if starts_any(&["down_blocks.", "unet.", "input_blocks.", "diffusion_model."]) => (
            "is only a U-Net",
            "`--model` takes the folder of its model, which holds model_index.json",
        ),
        _ if starts_any(&["text_model.", "text_encoder.", "transformer.resblocks."]) => (
            "is only a text encoder",
            "`--model` takes the folder of its model, which holds model_index.json",
        ),
        _ if starts_any(&[
            "conv_first.",
            "model.1.sub.",
            "params_ema.",
            "params.",
            "RRDB_trunk.",
            "feats.0.",
            "block_1.c1_r.",
        ]) =>
        {
            (
                "is an upscaler",
                "`sdgen upscale -m` takes it, or `--upscale`",
            )
        }
        _ if OTHER_ENCODERS.iter().any(|(start, _)| starts_any(&[start])) => (
            "is a text encoder of a family that sdgen does not draw yet",
            TODAY,
        ),
        _ if starts_any(&["emb_params", "clip_l", "<"]) && Embedding::is_in(path) => {
            ("is an embedding", "`--embedding` takes it")
        }
        _ => return None,
    })
}

/// The error for a file of these keys that was passed as a checkpoint: what it is instead, and
/// where it goes.
fn not_a_checkpoint(path: &Path, keys: &[String]) -> String {
    let shown = path.display();
    match role(path, keys) {
        Some((what, TODAY)) => format!("`{shown}` {what}\n\nhint: {TODAY}"),
        Some((what, place)) => format!(
            "`{shown}` {what}, not a whole model\n\nhint: {place}; `--model` alone takes a whole checkpoint"
        ),
        None => {
            let first: Vec<&str> = keys.iter().take(3).map(String::as_str).collect();
            format!(
                "`{shown}` is not a Stable Diffusion checkpoint (its first tensors: {})\n\nhint: pass a whole checkpoint with `--model`",
                first.join(", ")
            )
        }
    }
}

/// The error for a file of these keys that was passed as an upscaler, and has the key `unexpected`.
fn not_an_upscaler(path: &Path, keys: &[String], unexpected: &str) -> String {
    let contains = |part: &str| keys.iter().any(|key| key.contains(part));
    let what = match role(path, keys) {
        Some((what, place)) if !what.ends_with("upscaler") => {
            return format!(
                "`{}` {what}, not an upscaler\n\nhint: {place}; {UPSCALERS}",
                path.display()
            );
        }
        _ if keys.iter().any(|key| key.starts_with("layers.0.")) => {
            "is an upscaler with attention (SwinIR, HAT, DAT), which sdgen does not run"
        }
        _ if contains("to_img.init_pos") => {
            "is an upscaler that ends with DySample, which sdgen does not run"
        }
        _ if contains("residual_layer.0.") => {
            "is an upscaler with attention (OmniSR), which sdgen does not run"
        }
        _ => "is not an upscaler that sdgen knows",
    };
    format!(
        "`{}` {what}: it has a tensor `{unexpected}`\n\nhint: {UPSCALERS}",
        path.display()
    )
}
