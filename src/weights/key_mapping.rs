//! Foreign weight names -> the one naming used inside: diffusers' keys, prefixed by their component
//! (`unet.down_blocks.0...`, `vae.decoder...`, `text_encoder.text_model...`).
//!
//! Pure functions over header entries; nothing here reads a weight. [`layout`] tells which of the maps
//! a file needs.

use super::ENCODERS;
use super::lora::is_adapter_key;
use std::collections::{BTreeMap, BTreeSet};

/// The part of a stored tensor that a tensor's values come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// all of it, in its stored order
    Whole,
    /// `count` of `of` equal blocks of rows, from block `index` on: one of several matrices stored as
    /// one
    Rows {
        index: usize,
        count: usize,
        of: usize,
    },
    /// all of it, transposed
    Transposed,
    /// all of it, the second half of its rows before the first
    SwappedHalves,
}

impl Part {
    /// One of three matrices stored as one.
    pub(super) const fn third(index: usize) -> Self {
        Self::Rows {
            index,
            count: 1,
            of: 3,
        }
    }
}

/// A tensor under its canonical name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    pub name: String,
    pub part: Part,
}

impl Named {
    pub(super) fn whole(name: String) -> Vec<Self> {
        vec![Self {
            name,
            part: Part::Whole,
        }]
    }
}

/// The layout of a single file, by the names in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// CompVis' and Stability's single file: `model.diffusion_model.*`, `first_stage_model.*`,
    /// `cond_stage_model.*`
    Original,
    /// already canonical (the embedded model)
    Canonical,
    /// adapter weights: LoRA and its relatives
    Adapter,
    /// none of these
    Unknown,
}

/// By whose names the tensors behind a prefix are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Names {
    UNet,
    Vae,
    /// transformers' text encoder
    Transformers(&'static str),
    /// OpenCLIP's text encoder
    OpenClip(&'static str),
}

/// The prefixes of components in files that hold several, of checkpoints and LoRAs alike: those of
/// CompVis' and Stability's code, and of ComfyUI.
const PREFIXES: [(&str, Names); 14] = [
    ("model.diffusion_model.", Names::UNet),
    ("first_stage_model.", Names::Vae),
    ("cond_stage_model.transformer.", Names::Transformers(FIRST)),
    ("cond_stage_model.model.", Names::OpenClip(FIRST)),
    (
        "cond_stage_model.clip_l.transformer.",
        Names::Transformers(FIRST),
    ),
    (
        "cond_stage_model.clip_h.transformer.",
        Names::Transformers(FIRST),
    ),
    (
        "cond_stage_model.clip_g.transformer.",
        Names::Transformers(SECOND),
    ),
    (
        "conditioner.embedders.0.transformer.",
        Names::Transformers(FIRST),
    ),
    ("conditioner.embedders.0.model.", Names::OpenClip(SECOND)),
    (
        "conditioner.embedders.1.transformer.",
        Names::Transformers(SECOND),
    ),
    ("conditioner.embedders.1.model.", Names::OpenClip(SECOND)),
    (
        "text_encoders.clip_l.transformer.",
        Names::Transformers(FIRST),
    ),
    (
        "text_encoders.clip_h.transformer.",
        Names::Transformers(FIRST),
    ),
    (
        "text_encoders.clip_g.transformer.",
        Names::Transformers(SECOND),
    ),
];
const FIRST: &str = ENCODERS[0];
const SECOND: &str = ENCODERS[1];

/// Block numbers beyond this are no model's: loops over blocks would not end.
const MAX_BLOCKS: usize = 1000;

/// Whether a part of a key is the number of a block that a model may have.
pub(super) fn is_block_number(text: &str) -> bool {
    text.parse().is_ok_and(|number: usize| number < MAX_BLOCKS)
}

/// Splits a key at the prefix of its component.
fn named(key: &str) -> Option<(Names, &str)> {
    PREFIXES
        .iter()
        .find_map(|(prefix, names)| Some((*names, key.strip_prefix(prefix)?)))
}

/// Splits the name of a text encoder's layer, or of one of the U-Net under its original name, as
/// files for ComfyUI have it: its component, and its name there.
pub fn split_component(layer: &str) -> Option<(&'static str, &str)> {
    if let Some(rest) = layer.strip_prefix("diffusion_model.") {
        return Some(("unet", rest));
    }
    match named(layer)? {
        (Names::UNet, rest) => Some(("unet", rest)),
        (Names::Transformers(encoder), rest) => Some((encoder, rest)),
        (Names::Vae | Names::OpenClip(_), _) => None,
    }
}

/// What stands before all names of a file in which a whole training state was saved, such as
/// `state_dict.`; nothing in most files.
pub fn wrapper<'a>(keys: impl Iterator<Item = &'a str>) -> &'a str {
    let mut found = "";
    for key in keys {
        let at = PREFIXES
            .iter()
            .filter_map(|(prefix, _)| key.find(prefix))
            .min();
        match at.and_then(|at| key.get(..at)) {
            Some("") => return "",
            Some(before) if before.ends_with('.') => found = before,
            _ => (),
        }
    }
    found
}

/// Recognizes the layout of a single file by its keys.
pub fn layout<'a>(keys: impl Iterator<Item = &'a str>) -> Layout {
    let keys: Vec<&str> = keys.collect();
    if keys.iter().any(|key| is_adapter_key(key)) {
        return Layout::Adapter;
    }
    let wrapper = wrapper(keys.iter().copied());
    let is_original = |key: &&str| {
        key.strip_prefix(wrapper)
            .is_some_and(|key| named(key).is_some())
    };
    let starts_as_ours = |key: &&str| {
        ["unet.", "vae.", "text_encoder."]
            .iter()
            .any(|prefix| key.starts_with(prefix))
    };
    if keys.iter().any(is_original) {
        Layout::Original
    } else if keys.iter().any(starts_as_ours) {
        Layout::Canonical
    } else {
        Layout::Unknown
    }
}

/// Beginnings of the keys of language models, with and without the part that makes words.
const LANGUAGE: [&str; 4] = ["model.", "embed_tokens.", "layers.", "norm."];

/// Beginnings of T5's.
const T5: [&str; 4] = [
    "shared.",
    "encoder.block.",
    "encoder.final_layer_norm.",
    "encoder.embed_tokens.",
];

/// What stands before T5's names in files that hold several parts.
const T5_PREFIXES: [&str; 3] = [
    "text_encoders.t5xxl.transformer.",
    "conditioner.embedders.t5xxl.transformer.",
    "t5xxl.transformer.",
];

/// Maps a key of CLIP's encoders, or of T5 as the component `t5`, in a file that holds several parts;
/// none if it is of something else.
pub fn from_text_encoders(t5: Option<&str>, key: &str) -> Option<Vec<Named>> {
    let of_t5 = T5_PREFIXES.iter().find_map(|it| key.strip_prefix(it));
    if let (Some(component), Some(rest)) = (t5, of_t5) {
        return Some(from_diffusers(component, rest));
    }
    match named(key)? {
        (Names::Transformers(encoder), rest) => Some(from_diffusers(encoder, rest)),
        (Names::OpenClip(encoder), rest) => open_clip_key(encoder, rest),
        _ => None,
    }
}

/// Maps a key of one component of a diffusers folder: today's names, and the older ones that files on
/// the hub still have.
pub fn from_diffusers(component: &str, key: &str) -> Vec<Named> {
    if key.ends_with("position_ids") {
        return vec![];
    }
    let key = match component {
        "vae" => vae_attention(key),
        _ if component.starts_with("text_encoder")
            && LANGUAGE.iter().any(|it| key.starts_with(it)) =>
        {
            format!("model.{}", key.strip_prefix("model.").unwrap_or(key))
        }
        _ if component.starts_with("text_encoder") && T5.iter().any(|it| key.starts_with(it)) => {
            key.into()
        }
        _ if component.starts_with("text_encoder")
            && key != "lm_head.weight"
            && !key.starts_with("text_model.")
            && !key.starts_with("text_projection") =>
        {
            format!("text_model.{key}")
        }
        _ => key.to_string(),
    };
    Named::whole(format!("{component}.{key}"))
}

/// Maps old and new diffusers names of the VAE's attention to the new ones.
fn vae_attention(key: &str) -> String {
    let Some((before, last)) = key.split_once(".attentions.0.") else {
        return key.to_string();
    };
    let renamed = [
        ("query.", "to_q."),
        ("key.", "to_k."),
        ("value.", "to_v."),
        ("proj_attn.", "to_out.0."),
    ];
    let last = renamed
        .iter()
        .find_map(|(old, new)| last.strip_prefix(old).map(|rest| format!("{new}{rest}")))
        .unwrap_or_else(|| last.to_string());
    format!("{before}.attentions.0.{last}")
}

/// The keys of a single original file under their canonical names.
pub struct Original {
    /// every key; those that belong to no component (EMA copies, betas, ...) have no names
    pub names: BTreeMap<String, Vec<Named>>,
    /// keys inside of a component that none of its layers has
    pub unknown: Vec<String>,
}

/// Maps every key of a single original file. The last layer of SD2.x's encoder is left out: it
/// conditions on the layer before it.
pub fn from_original<'a>(keys: impl Iterator<Item = &'a str>) -> Original {
    let keys: BTreeSet<&str> = keys.collect();
    let wrapper = wrapper(keys.iter().copied());
    let inner: BTreeSet<&str> = keys
        .iter()
        .filter_map(|key| key.strip_prefix(wrapper))
        .collect();
    let unet = UnetMap::new(&inner);
    let up_blocks = 1 + max_index(&inner, "first_stage_model.decoder.up.").unwrap_or(0);
    let unused = unused_layer(&inner);
    // a refiner has the second encoder alone
    let is_second_alone = inner
        .contains("conditioner.embedders.0.transformer.text_projection.weight")
        && !inner
            .iter()
            .any(|key| key.starts_with("conditioner.embedders.1."));
    let mut original = Original {
        names: BTreeMap::new(),
        unknown: vec![],
    };
    for key in keys {
        let split = key.strip_prefix(wrapper).and_then(named);
        let names = match split {
            Some((Names::UNet, rest)) => {
                let names = unet.map(rest).map(|n| Named::whole(format!("unet.{n}")));
                names.or_else(|| {
                    original.unknown.push(key.into());
                    None
                })
            }
            Some((Names::Vae, rest)) => {
                let names = vae_key(rest, up_blocks).map(|n| Named::whole(format!("vae.{n}")));
                let is_known = names.is_some()
                    || !(rest.starts_with("encoder.") || rest.starts_with("decoder."));
                if !is_known {
                    original.unknown.push(key.into());
                }
                names
            }
            Some((Names::Transformers(encoder), rest)) => {
                let full = format!("text_model.{rest}");
                let before = key.strip_suffix(rest).unwrap_or_default();
                let has_full = inner.contains(&*format!(
                    "{}{full}",
                    before.strip_prefix(wrapper).unwrap_or_default()
                ));
                let is_unused = encoder == FIRST
                    && unused.is_some_and(|layer| {
                        let layer = format!("encoder.layers.{layer}.");
                        rest.trim_start_matches("text_model.").starts_with(&layer)
                    });
                let encoder = if is_second_alone { SECOND } else { encoder };
                (!has_full && !is_unused).then(|| from_diffusers(encoder, rest))
            }
            Some((Names::OpenClip(encoder), rest)) => {
                let unused = unused.filter(|_| encoder == FIRST);
                let layer = rest.strip_prefix("transformer.resblocks.");
                let is_unused = layer
                    .and_then(|rest| rest.split('.').next()?.parse::<usize>().ok())
                    .is_some_and(|layer| Some(layer) == unused);
                let names = open_clip_key(encoder, rest).filter(|_| !is_unused);
                if names.is_none() && layer.is_some() && !is_unused {
                    original.unknown.push(key.into());
                }
                names
            }
            None => None,
        };
        original
            .names
            .insert(key.to_string(), names.unwrap_or_default());
    }
    original
}

/// The layer of SD2.x's encoder that conditions nothing, if a file has it: Stability's files have
/// OpenCLIP's 24 layers, of which the one before the last conditions; those that were converted
/// from diffusers' folders have only the 23, and no projection.
fn unused_layer(keys: &BTreeSet<&str>) -> Option<usize> {
    const ALL: usize = 24;
    let own = |prefix: &str| max_index(keys, prefix).map(|last| last + 1);
    if let Some(layers) = own("cond_stage_model.model.transformer.resblocks.") {
        let has_projection = keys.contains("cond_stage_model.model.text_projection")
            || keys.contains("cond_stage_model.model.text_projection.weight");
        let is_unused = layers == ALL || layers + 1 != ALL && has_projection;
        return is_unused.then(|| layers - 1);
    }
    let layers = [
        "cond_stage_model.transformer.text_model.encoder.layers.",
        "cond_stage_model.transformer.encoder.layers.",
    ];
    let layers = layers.into_iter().find_map(own);
    layers.filter(|layers| *layers == ALL).map(|_| ALL - 1)
}

/// Maps every key of a file that is a VAE, or holds one: by diffusers' names, the original ones, or
/// those of TAESD's decoder.
pub fn from_vae<'a>(keys: impl Iterator<Item = &'a str>) -> BTreeMap<String, Vec<Named>> {
    let keys: BTreeSet<&str> = keys.collect();
    let prefix = vae_prefix(&keys);
    let inner: BTreeSet<&str> = keys
        .iter()
        .filter_map(|key| key.strip_prefix(&*prefix))
        .collect();
    let up_blocks = max_index(&inner, "decoder.up.").map(|last| last + 1);
    let map = |key: &str| match (key.split_once('.'), up_blocks) {
        (_, Some(up_blocks)) => {
            vae_key(key, up_blocks).map(|name| Named::whole(format!("vae.{name}")))
        }
        // TAESD's own code counts the squeezing of the latents as a layer
        (Some((layer, rest)), _) if layer.bytes().all(|b| b.is_ascii_digit()) => {
            let layer = layer.parse::<usize>().ok()?.checked_sub(1)?;
            Some(Named::whole(format!("vae.decoder.layers.{layer}.{rest}")))
        }
        _ if beside_vae_coders(key).is_some() => {
            beside_vae_coders(key).map(|name| Named::whole(format!("vae.{name}")))
        }
        (Some(("encoder" | "decoder", _)), _) => Some(from_diffusers("vae", key)),
        _ => None,
    };
    keys.iter()
        .map(|key| {
            (
                key.to_string(),
                key.strip_prefix(&*prefix).and_then(map).unwrap_or_default(),
            )
        })
        .collect()
}

/// What stands before a VAE's `decoder.` in a file that holds one.
fn vae_prefix(keys: &BTreeSet<&str>) -> String {
    for wrapper in ["", "state_dict.", "model.", "module."] {
        for part in ["first_stage_model.", "vae.", ""] {
            let prefix = format!("{wrapper}{part}");
            let decoder = format!("{prefix}decoder.");
            if keys.iter().any(|key| key.starts_with(&decoder)) {
                return prefix;
            }
        }
    }
    String::new()
}

/// Maps every key of an upscaler, under basicsr's names or the older ones of ESRGAN's authors; keys
/// that are not part of such a network map to nothing. Of Real-ESRGAN's two copies the averaged one
/// is used.
pub fn from_upscaler<'a>(keys: impl Iterator<Item = &'a str>) -> BTreeMap<String, Vec<Named>> {
    let keys: BTreeSet<&str> = keys.collect();
    let has = |prefix: &str| keys.iter().any(|key| key.starts_with(prefix));
    // what training programs wrap a network in: all keys begin with it, or those of an average
    let mut prefix = String::new();
    while let Some(wrapper) = ["module.", "netG.", "params_ema.", "params."]
        .into_iter()
        .find(|wrapper| {
            let whole = format!("{prefix}{wrapper}");
            let is_of_all = !keys.is_empty() && keys.iter().all(|key| key.starts_with(&whole));
            is_of_all || wrapper.starts_with("params") && has(&whole)
        })
    {
        prefix += wrapper;
    }
    let inner: BTreeSet<&str> = keys
        .iter()
        .filter_map(|key| key.strip_prefix(&prefix))
        .collect();
    // ESRGAN's first code also counts layers without weights
    let tail: BTreeSet<usize> = inner
        .iter()
        .filter_map(|key| key.strip_prefix("model.")?.split('.').next()?.parse().ok())
        .collect();
    let tail: Vec<usize> = tail.into_iter().filter(|layer| *layer > 1).collect();
    let number = |text: &str| text.parse::<usize>().ok();
    let layer = |parts: &[&str]| -> Option<String> {
        let kind = ["rdb1", "rdb2", "rdb3"];
        Some(match *parts {
            ["conv_first" | "conv_body" | "conv_hr" | "conv_last"] => parts[0].into(),
            ["body", n] => format!("body.{}", number(n)?),
            ["body" | "RRDB_trunk", n, block, conv]
            | ["model", "1", "sub", n, block, conv, "0"]
            | ["model", "1", "sub", n, block, conv @ "conv1x1"] => {
                let block = block.to_lowercase();
                let is_known = kind.contains(&&*block)
                    && ["conv1", "conv2", "conv3", "conv4", "conv5", "conv1x1"].contains(&conv);
                is_known.then(|| format!("body.{n}.{block}.{conv}"))?
            }
            ["trunk_conv"] | ["model", "1", "sub", _] => "conv_body".into(),
            ["HRconv"] => "conv_hr".into(),
            ["model", "0"] => "conv_first".into(),
            ["model", n] => {
                let at = tail.iter().position(|layer| Some(*layer) == number(n))?;
                match tail.len() - at {
                    1 => "conv_last".into(),
                    2 => "conv_hr".into(),
                    _ => format!("up.{at}"),
                }
            }
            [up] => {
                let n = up
                    .strip_prefix("conv_up")
                    .or_else(|| up.strip_prefix("upconv"))?;
                format!("up.{}", number(n)?.checked_sub(1)?)
            }
            _ => return None,
        })
    };
    let is_span = inner.contains("conv_1.sk.weight");
    let is_plksr = inner.contains("feats.0.weight");
    let map = |key: &str| {
        if is_span && key == "no_norm" {
            return Some(Named::whole("upscaler.no_norm".into()));
        }
        let (layer_name, last) = key
            .rsplit_once('.')
            .filter(|(_, last)| ["weight", "bias"].contains(last))?;
        let parts: Vec<&str> = layer_name.split('.').collect();
        let layer = if is_span {
            is_of_span(&parts).then(|| layer_name.to_string())?
        } else if is_plksr {
            is_of_plksr(&parts).then(|| layer_name.to_string())?
        } else {
            layer(&parts)?
        };
        Some(Named::whole(format!("upscaler.{layer}.{last}")))
    };
    keys.iter()
        .map(|key| {
            (
                key.to_string(),
                key.strip_prefix(&prefix).and_then(map).unwrap_or_default(),
            )
        })
        .collect()
}

/// Whether a layer is one of SPAN's. What it stores of merged convolutions is computed anew.
fn is_of_span(parts: &[&str]) -> bool {
    let (block, conv) = match *parts {
        ["conv_cat"] | ["upsampler", "0"] => return true,
        ["conv_1" | "conv_2", ref conv @ ..] => ("block_1", conv),
        [block, "c1_r" | "c2_r" | "c3_r", ref conv @ ..] => (block, conv),
        _ => return false,
    };
    let number = block.strip_prefix("block_").and_then(|n| n.parse().ok());
    number.is_some_and(|n: usize| (1..=6).contains(&n))
        && matches!(conv, ["sk"] | ["eval_conv"] | ["conv", "0" | "1" | "2"])
}

/// Whether a layer is one of RealPLKSR's.
fn is_of_plksr(parts: &[&str]) -> bool {
    match *parts {
        ["feats", n] => n.parse::<usize>().is_ok(),
        ["feats", n, ref layer @ ..] => {
            let is_layer = matches!(
                layer,
                ["channel_mixer", "0" | "2"]
                    | ["lk", "conv"]
                    | ["attn", "f", "0"]
                    | ["refine" | "norm" | "layer_norm"]
            );
            n.parse::<usize>().is_ok() && is_layer
        }
        _ => false,
    }
}

/// The largest number that follows `prefix` in any key, of those that a model may have.
fn max_index(keys: &BTreeSet<&str>, prefix: &str) -> Option<usize> {
    keys.iter()
        .filter_map(|k| k.strip_prefix(prefix)?.split('.').next()?.parse().ok())
        .filter(|number| *number < MAX_BLOCKS)
        .max()
}

/// The layers of the U-Net outside of its numbered blocks: original and diffusers' names.
const UNET_FIXED: [(&str, &str); 8] = [
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("label_emb.0.0.", "add_embedding.linear_1."),
    ("label_emb.0.2.", "add_embedding.linear_2."),
    ("input_blocks.0.0.", "conv_in."),
    ("out.0.", "conv_norm_out."),
    ("out.2.", "conv_out."),
    ("middle_block.1.", "mid_block.attentions.0."),
];

/// The layers of a residual block: original and diffusers' names.
const RESNET: [(&str, &str); 6] = [
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("emb_layers.1.", "time_emb_proj."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("skip_connection.", "conv_shortcut."),
];

/// Maps a layer of the U-Net back to its original name; neither name has a component or `.weight`.
/// `count` returns the number of a prefix's numbered children in the U-Net.
pub fn to_original(layer: &str, count: impl Fn(&str) -> usize) -> Option<String> {
    let key = format!("{layer}.");
    let renamed = |names: &[(&str, &str)], key: &str| {
        names
            .iter()
            .find_map(|(old, new)| key.strip_prefix(new).map(|rest| format!("{old}{rest}")))
    };
    let original = || {
        let (blocks, rest) = key.split_once('.')?;
        if let Some(rest) = rest
            .strip_prefix("resnets.")
            .filter(|_| blocks == "mid_block")
        {
            let (i, rest) = rest.split_once('.')?;
            return Some(format!(
                "middle_block.{}.{}",
                2 * i.parse::<usize>().ok()?,
                renamed(&RESNET, rest)?
            ));
        }
        let mut parts = rest.splitn(4, '.');
        let block: usize = parts.next()?.parse().ok()?;
        let (kind, i, rest) = (
            parts.next()?,
            parts.next()?.parse::<usize>().ok()?,
            parts.next()?,
        );
        let of = |block: usize, kind: &str| count(&format!("{blocks}.{block}.{kind}."));
        let layers = |block: usize| of(block, "resnets") + of(block, "downsamplers");
        let (side, first) = match blocks {
            "down_blocks" => ("input_blocks", 1 + (0..block).map(layers).sum::<usize>()),
            "up_blocks" => ("output_blocks", (0..block).map(layers).sum()),
            _ => return None,
        };
        Some(match kind {
            "resnets" => format!("{side}.{}.0.{}", first + i, renamed(&RESNET, rest)?),
            "attentions" => format!("{side}.{}.1.{rest}", first + i),
            "downsamplers" => format!("{side}.{}.0.op.", first + of(block, "resnets")),
            "upsamplers" => {
                format!(
                    "{side}.{}.{}.conv.",
                    (first + of(block, "resnets")).checked_sub(1)?,
                    1 + of(block, "attentions").min(1)
                )
            }
            _ => return None,
        })
    };
    let original = renamed(&UNET_FIXED, &key).or_else(original)?;
    original.strip_suffix('.').map(String::from)
}

/// The (block, layer) of each `input_blocks.N` and `output_blocks.N`.
struct UnetMap {
    input: BTreeMap<usize, (usize, usize)>,
    output: BTreeMap<usize, (usize, usize)>,
}

impl UnetMap {
    fn new(keys: &BTreeSet<&str>) -> Self {
        let has = |prefix: String| {
            keys.range(prefix.as_str()..)
                .next()
                .is_some_and(|k| k.starts_with(&prefix))
        };
        let inputs = max_index(keys, "model.diffusion_model.input_blocks.").unwrap_or(0);
        let outputs = max_index(keys, "model.diffusion_model.output_blocks.").unwrap_or(0);
        let (mut input, mut output) = (BTreeMap::new(), BTreeMap::new());
        let (mut block, mut layer) = (0, 0);
        for i in 1..=inputs {
            input.insert(i, (block, layer));
            layer += 1;
            if has(format!("model.diffusion_model.input_blocks.{i}.0.op.")) {
                (block, layer) = (block + 1, 0);
            }
        }
        (block, layer) = (0, 0);
        for i in 0..=outputs {
            output.insert(i, (block, layer));
            layer += 1;
            let up = |j: usize| has(format!("model.diffusion_model.output_blocks.{i}.{j}.conv."));
            if up(1) || up(2) {
                (block, layer) = (block + 1, 0);
            }
        }
        Self { input, output }
    }

    fn map(&self, key: &str) -> Option<String> {
        if let Some(name) = UNET_FIXED
            .iter()
            .find_map(|(old, new)| key.strip_prefix(old).map(|rest| format!("{new}{rest}")))
        {
            return Some(name);
        }
        if let Some(rest) = key.strip_prefix("middle_block.0.") {
            return Some(format!("mid_block.resnets.0.{}", resnet(rest)?));
        }
        if let Some(rest) = key.strip_prefix("middle_block.2.") {
            return Some(format!("mid_block.resnets.1.{}", resnet(rest)?));
        }
        let (side, rest) = key.split_once('.')?;
        let (index, rest) = rest.split_once('.')?;
        let (part, rest) = rest.split_once('.')?;
        let index: usize = index.parse().ok()?;
        let (blocks, map) = match side {
            "input_blocks" => ("down_blocks", &self.input),
            "output_blocks" => ("up_blocks", &self.output),
            _ => return None,
        };
        let (block, layer) = map.get(&index)?;
        Some(
            if let Some(conv) = rest.strip_prefix("op.").filter(|_| side == "input_blocks") {
                // the downsampler is counted as a layer of its block
                format!("down_blocks.{block}.downsamplers.0.conv.{conv}")
            } else if let Some(conv) = rest
                .strip_prefix("conv.")
                .filter(|_| side == "output_blocks")
            {
                format!("up_blocks.{block}.upsamplers.0.conv.{conv}")
            } else if part == "0" {
                format!("{blocks}.{block}.resnets.{layer}.{}", resnet(rest)?)
            } else if part == "1" {
                format!("{blocks}.{block}.attentions.{layer}.{rest}")
            } else {
                return None;
            },
        )
    }
}

/// Maps a name inside a residual block of the U-Net.
fn resnet(key: &str) -> Option<String> {
    RESNET
        .iter()
        .find_map(|(old, new)| key.strip_prefix(old).map(|rest| format!("{new}{rest}")))
}

/// Maps a key of what a VAE has beside encoder and decoder: the convolutions next to the latents,
/// which Black Forest Labs count to these, and the statistics of FLUX.2's latents.
fn beside_vae_coders(key: &str) -> Option<String> {
    let inner = key
        .strip_prefix("encoder.")
        .filter(|inner| inner.starts_with("quant_conv."));
    let inner = inner.or_else(|| {
        key.strip_prefix("decoder.")
            .filter(|inner| inner.starts_with("post_quant_conv."))
    });
    let name = inner.unwrap_or(key);
    let is_it = ["quant_conv.", "post_quant_conv.", "bn."]
        .iter()
        .any(|start| name.starts_with(start));
    is_it.then(|| name.into())
}

/// The layers of a VAE's encoder or decoder outside of its levels: original and diffusers' names.
const VAE_FIXED: [(&str, &str); 15] = [
    ("norm_out.", "conv_norm_out."),
    ("conv_in.", "conv_in."),
    ("conv_out.", "conv_out."),
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
    ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
    ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
    ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
    ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
    ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
    // diffusers' converters of 2023 left the attention's names as they were
    (
        "mid.attn_1.group_norm.",
        "mid_block.attentions.0.group_norm.",
    ),
    ("mid.attn_1.to_q.", "mid_block.attentions.0.to_q."),
    ("mid.attn_1.to_k.", "mid_block.attentions.0.to_k."),
    ("mid.attn_1.to_v.", "mid_block.attentions.0.to_v."),
    ("mid.attn_1.to_out.0.", "mid_block.attentions.0.to_out.0."),
];

/// The beginnings of the layers of a level.
const VAE_LEVEL: [(&str, &str); 3] = [
    ("block.", "resnets."),
    ("downsample.", "downsamplers.0."),
    ("upsample.", "upsamplers.0."),
];

/// The layer beside those of a residual block.
const VAE_SHORTCUT: (&str, &str) = (".nin_shortcut.", ".conv_shortcut.");

/// Maps a VAE key without its prefix. The original numbers decoder levels from the finest, diffusers
/// from the coarsest.
fn vae_key(key: &str, up_blocks: usize) -> Option<String> {
    if let Some(name) = beside_vae_coders(key) {
        return Some(name);
    }
    let (side, rest) = key.split_once('.')?;
    if !matches!(side, "encoder" | "decoder") {
        return None;
    }
    let diffusers = ["mid_block.", "up_blocks.", "down_blocks.", "conv_norm_out."];
    if diffusers.iter().any(|start| rest.starts_with(start)) {
        return Some(vae_attention(key));
    }
    let name = match VAE_FIXED
        .iter()
        .find_map(|(old, new)| rest.strip_prefix(old).map(|r| format!("{new}{r}")))
    {
        Some(name) => name,
        None => {
            let (direction, rest) = rest.split_once('.')?;
            let (level, rest) = rest.split_once('.')?;
            let level: usize = level.parse().ok().filter(|level| *level < MAX_BLOCKS)?;
            let level = match direction {
                "up" => up_blocks.checked_sub(level + 1)?,
                "down" => level,
                _ => return None,
            };
            let rest = VAE_LEVEL.iter().fold(rest.to_string(), |rest, (old, new)| {
                rest.replacen(old, new, 1)
            });
            format!("{direction}_blocks.{level}.{rest}")
        }
    };
    let (old, new) = VAE_SHORTCUT;
    Some(format!("{side}.{}", name.replace(old, new)))
}

/// Maps a tensor of a VAE back to its original name; neither name has a component. `up_blocks` is the
/// number of its decoder's levels.
pub fn vae_to_original(name: &str, up_blocks: usize) -> Option<String> {
    if beside_vae_coders(name).is_some() {
        return Some(name.into());
    }
    let (side, rest) = name.split_once('.')?;
    if !matches!(side, "encoder" | "decoder") {
        return None;
    }
    let (old, new) = VAE_SHORTCUT;
    let rest = rest.replace(new, old);
    let fixed = VAE_FIXED
        .iter()
        .find_map(|(old, new)| rest.strip_prefix(new).map(|end| format!("{old}{end}")));
    let level = || {
        let (direction, rest) = rest.split_once("_blocks.")?;
        let (level, rest) = rest.split_once('.')?;
        let level: usize = level.parse().ok()?;
        let level = match direction {
            "up" => up_blocks.checked_sub(level + 1)?,
            "down" => level,
            _ => return None,
        };
        let rest = VAE_LEVEL.iter().fold(rest.to_string(), |rest, (old, new)| {
            rest.replacen(new, old, 1)
        });
        Some(format!("{direction}.{level}.{rest}"))
    };
    Some(format!("{side}.{}", fixed.or_else(level)?))
}

/// The tensors of OpenCLIP's text encoder outside of its layers: original and transformers' names.
const OPEN_CLIP_FIXED: [(&str, &str); 4] = [
    (
        "positional_embedding",
        "embeddings.position_embedding.weight",
    ),
    (
        "token_embedding.weight",
        "embeddings.token_embedding.weight",
    ),
    ("ln_final.weight", "final_layer_norm.weight"),
    ("ln_final.bias", "final_layer_norm.bias"),
];

/// Those of a layer, but for the fused one.
const OPEN_CLIP_LAYER: [(&str, &str); 5] = [
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("attn.out_proj.", "self_attn.out_proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
];

/// What precedes the number of OpenCLIP's layers.
const OPEN_CLIP_LAYERS: &str = "transformer.resblocks.";

/// The tensors of OpenCLIP's text encoder of so many layers, without its prefix, and those that each
/// is as this component.
pub fn open_clip_tensors(component: &str, layers: usize) -> Vec<(String, Vec<Named>)> {
    let fixed = OPEN_CLIP_FIXED.iter().map(|(old, _)| old.to_string());
    let mut keys: Vec<String> = fixed.chain(["text_projection".into()]).collect();
    for layer in 0..layers {
        let start = format!("{OPEN_CLIP_LAYERS}{layer}");
        for end in ["weight", "bias"] {
            keys.push(format!("{start}.attn.in_proj_{end}"));
            let of_layer = OPEN_CLIP_LAYER.iter();
            keys.extend(of_layer.map(|(old, _)| format!("{start}.{old}{end}")));
        }
    }
    let named = |key: String| Some((open_clip_key(component, &key)?, key));
    let all = keys.into_iter().filter_map(named);
    all.map(|(named, key)| (key, named)).collect()
}

/// Maps a key of OpenCLIP's text encoder, without its prefix; only the second one projects.
fn open_clip_key(component: &str, key: &str) -> Option<Vec<Named>> {
    if let Some((_, new)) = OPEN_CLIP_FIXED.iter().find(|(old, _)| *old == key) {
        return Some(Named::whole(format!("{component}.text_model.{new}")));
    }
    let projection = format!("{component}.text_projection.weight");
    match key {
        "text_projection" if component == SECOND => {
            return Some(vec![Named {
                name: projection,
                part: Part::Transposed,
            }]);
        }
        "text_projection.weight" if component == SECOND => return Some(Named::whole(projection)),
        _ => (),
    }
    let (layer, rest) = key.strip_prefix(OPEN_CLIP_LAYERS)?.split_once('.')?;
    layer
        .parse()
        .ok()
        .filter(|layer: &usize| *layer < MAX_BLOCKS)?;
    let layer = format!("{component}.text_model.encoder.layers.{layer}");
    if let Some(kind) = rest.strip_prefix("attn.in_proj_") {
        let part = |(index, name)| Named {
            name: format!("{layer}.self_attn.{name}_proj.{kind}"),
            part: Part::third(index),
        };
        return Some(["q", "k", "v"].into_iter().enumerate().map(part).collect());
    }
    OPEN_CLIP_LAYER.iter().find_map(|(old, new)| {
        rest.strip_prefix(old)
            .map(|r| Named::whole(format!("{layer}.{new}{r}")))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn original_names_of_every_u_net_go_to_ours_and_back() {
        for recipe in ["sd1", "sd2", "sdxl", "sdxl_refiner", "ssd1b", "vega"] {
            let path = format!(
                "{}/tests/fixtures/real_{recipe}.json",
                env!("CARGO_MANIFEST_DIR")
            );
            let shapes: serde_json::Map<_, _> =
                serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
            let map = from_original(shapes.keys().map(String::as_str)).names;
            let ours: BTreeSet<&str> = map
                .values()
                .flatten()
                .filter_map(|named| named.name.strip_prefix("unet."))
                .collect();
            let has = |prefix: &str| {
                ours.range(prefix..)
                    .next()
                    .is_some_and(|name| name.starts_with(prefix))
            };
            let count = |prefix: &str| (0..).take_while(|i| has(&format!("{prefix}{i}."))).count();
            let mut seen = 0;
            for (original, named) in map.iter().filter_map(|(key, named)| {
                Some((key.strip_prefix("model.diffusion_model.")?, named))
            }) {
                let (layer, end) = original.rsplit_once('.').unwrap();
                let ours = named
                    .first()
                    .unwrap()
                    .name
                    .strip_prefix("unet.")
                    .unwrap()
                    .strip_suffix(&format!(".{end}"))
                    .unwrap();
                assert_eq!(
                    to_original(ours, count).as_deref(),
                    Some(layer),
                    "{recipe}: {ours}"
                );
                seen += 1;
            }
            assert!(seen > 500, "{recipe}");
        }
    }
}
