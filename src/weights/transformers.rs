//! The families of transformers that denoise, as data: by which tensors a file of each is known,
//! how its names become diffusers', and which other parts go with it.
//!
//! What is drawn of them has a [`Drawn`]; the others are known by name, for errors. Files that hold
//! only a part of a model are put together in `split`.

use super::infer_config;
use super::key_mapping::{Named, Part, is_block_number};
use super::{Checkpoint, family_name};
use anyhow::Result;

/// A family of transformers.
pub struct Transformer {
    pub name: &'static str,
    /// lists of beginnings of keys, without a prefix of [`PREFIXES`]: a file of this family has one
    /// of each list
    marks: &'static [&'static [&'static str]],
    /// none: it is not drawn
    pub drawn: Option<&'static Drawn>,
}

/// Counts the blocks whose names begin so.
type CountBlocks<'a> = dyn Fn(&str) -> usize + 'a;

/// What is known of a family that is drawn.
pub struct Drawn {
    /// the layer that takes latents in, under diffusers' name: its rows are the network's width
    embedder: &'static str,
    /// the layer that takes the text encoder's states in, and how many states side by side
    context: (&'static str, usize),
    /// diffusers' names of a tensor under either name, none of what is not used; `None` where no
    /// layer has it
    map: fn(&str) -> Option<Vec<Named>>,
    /// the original names of its layers, without what their tensors are called; it is told how to
    /// count blocks by the beginning of diffusers' names
    layers: fn(&CountBlocks) -> Vec<String>,
    /// fills in the configurations of transformer, scheduler and pipeline
    pub configure: fn(&mut Checkpoint) -> Result<()>,
    /// the published ones by their width; the first stands for those of no known width
    releases: &'static [Release],
}

/// A published model, and where the parts are that go with its transformer.
pub struct Release {
    width: usize,
    pub name: &'static str,
    /// the repository of the hub that has all parts
    pub repo: &'static str,
    pub encoder: &'static str,
    pub vae: &'static str,
}

/// What stands before the names of a transformer in files: nothing, ComfyUI's prefixes of a whole
/// checkpoint and of a saved patch, ours.
const PREFIXES: [&str; 4] = [
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "",
];

/// In the order in which they are tested: some have the keys of others too.
const FAMILIES: [Transformer; 18] = [
    other("Chroma", &[&["distilled_guidance_layer."]]),
    other("FLUX.3", &[&["early_stream_modulations."]]),
    other("FLUX.2 dev", &[FLUX2, FLUX2_GUIDANCE]),
    Transformer {
        name: family_name::FLUX2_KLEIN,
        marks: &[FLUX2],
        drawn: Some(&KLEIN),
    },
    other("HunyuanVideo", &[&["txt_in.individual_token_refiner."]]),
    other(
        "FLUX.1",
        &[&[
            "double_blocks.",
            "single_transformer_blocks.0.proj_mlp.",
            "time_text_embed.guidance_embedder.",
        ]],
    ),
    other(
        "Stable Diffusion 3",
        &[&["joint_blocks.", "transformer_blocks.0.norm1_context."]],
    ),
    Transformer {
        name: family_name::Z_IMAGE,
        marks: &[&["layers.0.adaLN_modulation.0."]],
        drawn: Some(&Z_IMAGE),
    },
    other("Lumina 2", &[&["cap_embedder.0."]]),
    other("Qwen-Image 2.1", &[&["txt_in.text_norm."]]),
    other("Qwen-Image", &[&["transformer_blocks.0.img_mod.1."]]),
    other("Krea 2", &[&["txtfusion.projector."]]),
    other("HiDream", &[&["double_stream_blocks.0.block."]]),
    other("AuraFlow", &[&["double_layers.0.attn.w1q."]]),
    other("SANA", &[&["blocks.0.cross_attn.q_linear."]]),
    other("Wan", &[&["head.modulation"]]),
    other(
        "LTX-Video",
        &[&["patchify_proj.", "transformer_blocks.27.scale_shift_table"]],
    ),
    other(
        "Cosmos",
        &[&["net.blocks.0.self_attn.", "net.x_embedder.proj.1."]],
    ),
];

/// FLUX.2's shared modulation, under the original name and diffusers'.
const FLUX2: &[&str] = &["single_stream_modulation.lin"];
/// The guidance scale as an input.
const FLUX2_GUIDANCE: &[&str] = &["guidance_in.", "time_guidance_embed.guidance_embedder."];

const KLEIN: Drawn = Drawn {
    embedder: "x_embedder.weight",
    context: ("context_embedder.weight", 3),
    map: flux2,
    layers: flux2_layers,
    configure: infer_config::flux2,
    releases: &[
        Release {
            width: 3072,
            name: "FLUX.2 klein 4B",
            repo: "black-forest-labs/FLUX.2-klein-4B",
            encoder: "Qwen3 4B",
            vae: "FLUX.2's",
        },
        Release {
            width: 4096,
            name: "FLUX.2 klein 9B",
            repo: "black-forest-labs/FLUX.2-klein-9B",
            encoder: "Qwen3 8B",
            vae: "FLUX.2's",
        },
    ],
};

const Z_IMAGE: Drawn = Drawn {
    embedder: "all_x_embedder.2-1.weight",
    context: ("cap_embedder.1.weight", 1),
    map: z_image,
    layers: z_image_layers,
    configure: infer_config::z_image,
    releases: &[Release {
        width: 3840,
        name: family_name::Z_IMAGE,
        repo: "Tongyi-MAI/Z-Image-Turbo",
        encoder: "Qwen3 4B",
        vae: "FLUX.1's",
    }],
};

const fn other(name: &'static str, marks: &'static [&'static [&'static str]]) -> Transformer {
    Transformer {
        name,
        marks,
        drawn: None,
    }
}

/// The family of a file with these keys, and what stands before the names of its transformer; none
/// if there is no transformer in it.
pub fn find<'a>(
    keys: impl Iterator<Item = &'a str>,
) -> Option<(&'static Transformer, &'static str)> {
    let keys: Vec<&str> = keys.collect();
    let is_of = |family: &Transformer, prefix: &str| {
        let has = |mark: &&str| {
            let mut inner = keys.iter().filter_map(|key| key.strip_prefix(prefix));
            inner.any(|key| key.starts_with(mark))
        };
        family.marks.iter().all(|marks| marks.iter().any(has))
    };
    FAMILIES.iter().find_map(|family| {
        let mut prefixes = PREFIXES.into_iter();
        Some((family, prefixes.find(|prefix| is_of(family, prefix))?))
    })
}

/// The layers of a checkpoint's transformer by their original names, and the tensors here that the
/// weight of each is; none if its family is not drawn.
pub fn original_layers(checkpoint: &Checkpoint) -> Vec<(String, Vec<Named>)> {
    let Some((
        Transformer {
            drawn: Some(drawn), ..
        },
        _,
    )) = find(checkpoint.names())
    else {
        return vec![];
    };
    let count = |blocks: &str| checkpoint.count(&format!("transformer.{blocks}"));
    let layers = (drawn.layers)(&count).into_iter();
    let with_tensors = |layer: String| Some((drawn.names(&format!("{layer}.weight"))?, layer));
    layers
        .filter_map(with_tensors)
        .map(|(tensors, layer)| (layer, tensors))
        .collect()
}

impl Drawn {
    /// The names of a tensor, given by its key without prefix; none if no layer has it.
    pub fn names(&self, key: &str) -> Option<Vec<Named>> {
        let mut names = (self.map)(key)?;
        for named in &mut names {
            named.name.insert_str(0, "transformer.");
        }
        Some(names)
    }

    /// Which of the published models a transformer is.
    pub fn release(&self, checkpoint: &Checkpoint) -> Option<&'static Release> {
        let width = checkpoint.shape(&format!("transformer.{}", self.embedder));
        let width = width.and_then(|shape| shape.first());
        let of_width = self
            .releases
            .iter()
            .find(|release| Some(&release.width) == width);
        of_width.or(self.releases.first())
    }

    /// The width of the text encoder whose states a transformer takes.
    pub fn encoder_width(&self, checkpoint: &Checkpoint) -> Option<usize> {
        let (layer, states) = self.context;
        let shape = checkpoint.shape(&format!("transformer.{layer}"))?;
        Some(shape.last()? / states)
    }
}

/// The layers of FLUX.2 outside of its blocks: original and diffusers' names.
const FLUX2_FIXED: [(&str, &str); 11] = [
    ("img_in.", "x_embedder."),
    ("txt_in.", "context_embedder."),
    (
        "time_in.in_layer.",
        "time_guidance_embed.timestep_embedder.linear_1.",
    ),
    (
        "time_in.out_layer.",
        "time_guidance_embed.timestep_embedder.linear_2.",
    ),
    (
        "guidance_in.in_layer.",
        "time_guidance_embed.guidance_embedder.linear_1.",
    ),
    (
        "guidance_in.out_layer.",
        "time_guidance_embed.guidance_embedder.linear_2.",
    ),
    (
        "double_stream_modulation_img.lin.",
        "double_stream_modulation_img.linear.",
    ),
    (
        "double_stream_modulation_txt.lin.",
        "double_stream_modulation_txt.linear.",
    ),
    (
        "single_stream_modulation.lin.",
        "single_stream_modulation.linear.",
    ),
    ("final_layer.linear.", "proj_out."),
    ("final_layer.adaLN_modulation.1.", "norm_out.linear."),
];

/// Those of a block with a stream each for text and picture, but for the fused ones.
const FLUX2_DOUBLE: [(&str, &str); 10] = [
    ("img_attn.norm.query_norm.", "attn.norm_q."),
    ("img_attn.norm.key_norm.", "attn.norm_k."),
    ("img_attn.proj.", "attn.to_out.0."),
    ("img_mlp.0.", "ff.linear_in."),
    ("img_mlp.2.", "ff.linear_out."),
    ("txt_attn.norm.query_norm.", "attn.norm_added_q."),
    ("txt_attn.norm.key_norm.", "attn.norm_added_k."),
    ("txt_attn.proj.", "attn.to_add_out."),
    ("txt_mlp.0.", "ff_context.linear_in."),
    ("txt_mlp.2.", "ff_context.linear_out."),
];

/// Those of a block with one stream.
const FLUX2_SINGLE: [(&str, &str); 4] = [
    ("linear1.", "attn.to_qkv_mlp_proj."),
    ("linear2.", "attn.to_out."),
    ("norm.query_norm.", "attn.norm_q."),
    ("norm.key_norm.", "attn.norm_k."),
];

/// The layers of FLUX.2 in Black Forest Labs' code.
fn flux2_layers(count: &CountBlocks) -> Vec<String> {
    const FUSED: [&str; 2] = ["img_attn.qkv.", "txt_attn.qkv."];
    let old = |names: &'static [(&str, &str)]| names.iter().map(|(old, _)| *old);
    let double = old(&FLUX2_DOUBLE).chain(FUSED);
    let double = (0..count("transformer_blocks.")).flat_map(|i| {
        double
            .clone()
            .map(move |name| format!("double_blocks.{i}.{name}"))
    });
    let single = (0..count("single_transformer_blocks."))
        .flat_map(|i| old(&FLUX2_SINGLE).map(move |name| format!("single_blocks.{i}.{name}")));
    let all = old(&FLUX2_FIXED)
        .map(String::from)
        .chain(double)
        .chain(single);
    all.map(|name| name.trim_end_matches('.').into()).collect()
}

/// Maps a key of FLUX.2, under Black Forest Labs' name or diffusers'.
fn flux2(key: &str) -> Option<Vec<Named>> {
    const BLOCKS: [&str; 2] = ["transformer_blocks.", "single_transformer_blocks."];
    // a norm's numbers are called its scale
    let weight = |name: &str| match name.strip_suffix(".scale") {
        Some(layer) => format!("{layer}.weight"),
        None => name.into(),
    };
    let renamed = |names: &[(&str, &str)], key: &str| {
        names.iter().find_map(|(old, new)| {
            key.strip_prefix(old)
                .map(|rest| weight(&format!("{new}{rest}")))
        })
    };
    let is_diffusers = BLOCKS.iter().chain(FLUX2_FIXED.iter().map(|(_, new)| new));
    if is_diffusers.into_iter().any(|start| key.starts_with(start)) {
        return Some(Named::whole(key.into()));
    }
    if let Some(name) = renamed(&FLUX2_FIXED, key) {
        // original code shifts and scales, diffusers' scales and shifts
        let part = match key.starts_with("final_layer.adaLN_modulation.") {
            true => Part::SwappedHalves,
            false => Part::Whole,
        };
        return Some(vec![Named { name, part }]);
    }
    let (kind, rest) = key.split_once('.')?;
    let (number, layer) = rest.split_once('.')?;
    if !is_block_number(number) {
        return None;
    }
    match kind {
        "single_blocks" => {
            let name = renamed(&FLUX2_SINGLE, layer)?;
            Some(Named::whole(format!(
                "single_transformer_blocks.{number}.{name}"
            )))
        }
        "double_blocks" => {
            let block = format!("transformer_blocks.{number}");
            let attention = format!("{block}.attn");
            if let Some(end) = layer.strip_prefix("img_attn.qkv.") {
                return Some(fused(&attention, ["to_q", "to_k", "to_v"], end));
            }
            if let Some(end) = layer.strip_prefix("txt_attn.qkv.") {
                let names = ["add_q_proj", "add_k_proj", "add_v_proj"];
                return Some(fused(&attention, names, end));
            }
            Some(Named::whole(format!(
                "{block}.{}",
                renamed(&FLUX2_DOUBLE, layer)?
            )))
        }
        _ => None,
    }
}

/// The layers of Z-Image that ComfyUI calls otherwise: its names and diffusers'.
const Z_IMAGE_FIXED: [(&str, &str); 2] = [
    ("x_embedder.", "all_x_embedder.2-1."),
    ("final_layer.", "all_final_layer.2-1."),
];

/// Those of a block, but for the fused one.
const Z_IMAGE_BLOCK: [(&str, &str); 3] = [
    ("attention.out.", "attention.to_out.0."),
    ("attention.q_norm.", "attention.norm_q."),
    ("attention.k_norm.", "attention.norm_k."),
];

/// The layers of Z-Image that have other names than diffusers'.
fn z_image_layers(count: &CountBlocks) -> Vec<String> {
    let fixed = Z_IMAGE_FIXED
        .iter()
        .map(|(old, _)| old.trim_end_matches('.').to_string());
    let blocks = ["layers", "noise_refiner", "context_refiner"];
    let of_blocks = blocks.iter().flat_map(|kind| {
        let blocks = 0..count(&format!("{kind}."));
        blocks.flat_map(move |i| ["qkv", "out"].map(|name| format!("{kind}.{i}.attention.{name}")))
    });
    fixed.chain(of_blocks).collect()
}

/// Maps a key of Z-Image, under ComfyUI's name or diffusers'.
fn z_image(key: &str) -> Option<Vec<Named>> {
    const OUTSIDE: [&str; 4] = [
        "t_embedder.",
        "cap_embedder.",
        "x_pad_token",
        "cap_pad_token",
    ];
    const BLOCKS: [&str; 3] = ["layers", "noise_refiner", "context_refiner"];
    const LAYERS: [&str; 7] = [
        "attention.",
        "attention_norm1.",
        "attention_norm2.",
        "feed_forward.",
        "ffn_norm1.",
        "ffn_norm2.",
        "adaLN_modulation.0.",
    ];
    // left over from Lumina 2, and used by nothing
    if key == "norm_final.weight" {
        return Some(vec![]);
    }
    let is_diffusers = OUTSIDE
        .iter()
        .chain(Z_IMAGE_FIXED.iter().map(|(_, new)| new));
    if is_diffusers.into_iter().any(|start| key.starts_with(start)) {
        return Some(Named::whole(key.into()));
    }
    let renamed = |names: &[(&str, &str)], key: &str| {
        names
            .iter()
            .find_map(|(old, new)| key.strip_prefix(old).map(|rest| format!("{new}{rest}")))
    };
    if let Some(name) = renamed(&Z_IMAGE_FIXED, key) {
        return Some(Named::whole(name));
    }
    let (kind, rest) = key.split_once('.')?;
    let (number, layer) = rest.split_once('.')?;
    if !BLOCKS.contains(&kind) || !is_block_number(number) {
        return None;
    }
    let block = format!("{kind}.{number}");
    if let Some(end) = layer.strip_prefix("attention.qkv.") {
        return Some(fused(
            &format!("{block}.attention"),
            ["to_q", "to_k", "to_v"],
            end,
        ));
    }
    let is_layer = LAYERS.iter().any(|start| layer.starts_with(start));
    let name = renamed(&Z_IMAGE_BLOCK, layer).or_else(|| is_layer.then(|| layer.into()))?;
    Some(Named::whole(format!("{block}.{name}")))
}

/// The layers below `parent` that are one after the other in a fused tensor.
fn fused(parent: &str, names: [&str; 3], end: &str) -> Vec<Named> {
    let of = names.len();
    let part = |(index, name): (usize, &str)| Named {
        name: format!("{parent}.{name}.{end}"),
        part: Part::Rows { index, of },
    };
    names.into_iter().enumerate().map(part).collect()
}

/// The language models that encode text, by their width.
pub fn qwen3_name(width: usize) -> &'static str {
    match width {
        1024 => "Qwen3 0.6B",
        2048 => "Qwen3 1.7B",
        2560 => "Qwen3 4B",
        4096 => "Qwen3 8B",
        _ => "Qwen3",
    }
}

/// A layer that a language model's file has if it is Qwen3, behind the prefix of its names.
const QWEN3_MARK: &str = "layers.0.self_attn.q_norm.weight";

/// What stands before `layers.` in a file that holds Qwen3; none if it holds none. One that reads
/// pictures too is another model.
pub fn qwen3_prefix<'a>(keys: impl Iterator<Item = &'a str>) -> Option<String> {
    let mut found = None;
    for key in keys {
        if key.contains("visual.") {
            return None;
        }
        found = found.or_else(|| key.strip_suffix(QWEN3_MARK));
    }
    found
        .filter(|prefix| prefix.is_empty() || prefix.ends_with('.'))
        .map(String::from)
}

/// Maps a key of Qwen3 in a file whose names have this prefix; none if it is of something else.
pub fn qwen3(prefix: &str, key: &str) -> Option<Vec<Named>> {
    let whole = prefix.strip_suffix("model.").unwrap_or(prefix);
    if key.strip_prefix(whole) == Some("lm_head.weight") {
        return Some(Named::whole("text_encoder.lm_head.weight".into()));
    }
    let rest = key.strip_prefix(prefix)?;
    let is_layer = ["layers.", "embed_tokens.", "norm."]
        .iter()
        .any(|start| rest.starts_with(start));
    is_layer.then(|| Named::whole(format!("text_encoder.model.{rest}")))
}

/// Other text encoders, by the beginning of a key that only their files have.
pub const OTHER_ENCODERS: [(&str, &str); 6] = [
    ("encoder.block.0.layer.0.SelfAttention.", "T5"),
    ("model.layers.0.post_feedforward_layernorm.", "Gemma"),
    ("visual.", "a model of language and pictures (Qwen-VL)"),
    (
        "model.visual.",
        "a model of language and pictures (Qwen-VL)",
    ),
    ("model.layers.0.self_attn.k_proj.bias", "Qwen2.5"),
    (
        "model.layers.0.self_attn.",
        "a language model such as Mistral",
    ),
];
