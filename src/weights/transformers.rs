//! The families of transformers that denoise, as data: by which tensors a file of each is known,
//! how its names become diffusers', and which other parts go with it.
//!
//! What is drawn of them has a [`Drawn`]; the others are known by name, for errors. Files that hold
//! only a part of a model are put together in `split`.

use super::infer_config;
use super::key_mapping::{Named, Part, is_block_number};
use super::{Checkpoint, ENCODERS, family_name};
use anyhow::Result;
use serde_json::Value;

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
    /// what GGUF files of it say that they are
    pub architecture: &'static str,
    /// the layer that takes latents in, under diffusers' name: its rows are the network's width
    embedder: &'static str,
    /// what reads its prompts
    pub encoders: &'static [Encoder],
    /// diffusers' names of a tensor under either name, none of what is not used; `None` where no
    /// layer has it. It is told how many blocks of two streams there are
    map: fn(&str, usize) -> Option<Vec<Named>>,
    /// the original names of its layers, without what their tensors are called; it is told how to
    /// count blocks by the beginning of diffusers' names
    layers: fn(&CountBlocks) -> Vec<String>,
    /// fills in the configurations of transformer, scheduler and pipeline
    pub configure: fn(&mut Checkpoint) -> Result<()>,
    /// the published ones by their width; the first stands for those of no known width
    releases: &'static [Release],
}

/// A text encoder of a family.
#[derive(Debug)]
pub struct Encoder {
    pub component: &'static str,
    pub kind: EncoderKind,
    /// the layer that takes its states in, and how many states side by side; none where its width
    /// does not tell whether it fits
    layer: Option<(&'static str, usize)>,
    /// the family draws without it too
    pub is_optional: bool,
}

/// The architectures of text encoders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EncoderKind {
    Clip,
    T5,
    Qwen3,
}

/// CLIP's encoders are this wide, or less, or are the larger one.
const WIDEST_CLIP_L: usize = 1023;

impl EncoderKind {
    /// The name of an encoder of this width.
    pub fn name(self, width: usize) -> &'static str {
        match (self, width) {
            (Self::Clip, ..=WIDEST_CLIP_L) => "CLIP-L",
            (Self::Clip, _) => "CLIP-G",
            (Self::T5, 4096) => "T5-XXL",
            (Self::T5, _) => "T5",
            (Self::Qwen3, 1024) => "Qwen3 0.6B",
            (Self::Qwen3, 2048) => "Qwen3 1.7B",
            (Self::Qwen3, 2560) => "Qwen3 4B",
            (Self::Qwen3, 4096) => "Qwen3 8B",
            (Self::Qwen3, _) => "Qwen3",
        }
    }

    /// The key of its width in its configuration.
    pub fn width_key(self) -> &'static str {
        match self {
            Self::Clip | Self::Qwen3 => "hidden_size",
            Self::T5 => "d_model",
        }
    }

    /// That of an encoder with this configuration.
    pub fn of(config: &Value) -> Self {
        match config.get("model_type").and_then(Value::as_str) {
            Some("t5") => Self::T5,
            Some("qwen3") => Self::Qwen3,
            _ => Self::Clip,
        }
    }
}

/// A text encoder in a file.
pub struct EncoderFile {
    pub kind: EncoderKind,
    /// what stands before its names
    pub prefix: String,
    /// the tensor of its tokens' embeddings, whose rows are as wide as it is
    pub embeddings: String,
}

impl EncoderFile {
    /// Tells which encoder a file is by its keys; none if it is none.
    pub fn find<'a>(keys: impl Iterator<Item = &'a str>) -> Option<Self> {
        const T5: &str = "encoder.block.0.layer.0.SelfAttention.q.weight";
        const CLIP: &str = "text_model.embeddings.token_embedding.weight";
        let keys: Vec<&str> = keys.collect();
        let has = |key: &str| keys.contains(&key);
        let file = |kind, prefix: &str, embeddings: String| Self {
            kind,
            prefix: prefix.into(),
            embeddings,
        };
        if let Some(prefix) = qwen3_prefix(keys.iter().copied()) {
            let embeddings = format!("{prefix}embed_tokens.weight");
            return Some(file(EncoderKind::Qwen3, &prefix, embeddings));
        }
        let prefix_of = |mark: &str| keys.iter().find_map(|key| key.strip_suffix(mark));
        if let Some(prefix) = prefix_of(T5) {
            let shared = format!("{prefix}shared.weight");
            let own = format!("{prefix}encoder.embed_tokens.weight");
            let embeddings = if has(&shared) { shared } else { own };
            return Some(file(EncoderKind::T5, prefix, embeddings));
        }
        // what is a part of a model that reads pictures too is another one
        let prefix = prefix_of(CLIP)?;
        let is_alone = !keys.iter().any(|key| key.starts_with("vision_model."));
        is_alone.then(|| file(EncoderKind::Clip, prefix, format!("{prefix}{CLIP}")))
    }
}

/// A published model, and where the parts are that go with its transformer.
pub struct Release {
    width: usize,
    /// a tensor that others of this width do not have
    mark: Option<&'static str>,
    pub name: &'static str,
    /// the repository of the hub that has all parts
    pub repo: &'static str,
    /// the text encoders that it needs
    pub encoders: &'static str,
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
    Transformer {
        name: family_name::FLUX1,
        marks: &[&[
            "double_blocks.",
            "single_transformer_blocks.0.proj_mlp.",
            "time_text_embed.guidance_embedder.",
        ]],
        drawn: Some(&FLUX1),
    },
    Transformer {
        name: family_name::SD3,
        marks: &[&["joint_blocks.", "transformer_blocks.0.norm1_context."]],
        drawn: Some(&SD3),
    },
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

const fn qwen3_encoder(layer: &'static str, states: usize) -> Encoder {
    Encoder {
        component: ENCODERS[0],
        kind: EncoderKind::Qwen3,
        layer: Some((layer, states)),
        is_optional: false,
    }
}

const fn clip_encoder(index: usize, layer: Option<(&'static str, usize)>) -> Encoder {
    Encoder {
        component: ENCODERS[index],
        kind: EncoderKind::Clip,
        layer,
        is_optional: false,
    }
}

const fn t5_encoder(index: usize, is_optional: bool) -> Encoder {
    Encoder {
        component: ENCODERS[index],
        kind: EncoderKind::T5,
        layer: Some(("context_embedder.weight", 1)),
        is_optional,
    }
}

const SD3: Drawn = Drawn {
    architecture: "sd3",
    embedder: "pos_embed.proj.weight",
    encoders: &[
        clip_encoder(0, None),
        clip_encoder(1, None),
        t5_encoder(2, true),
    ],
    map: sd3,
    layers: sd3_layers,
    configure: infer_config::sd3,
    releases: &[
        Release {
            width: 1536,
            mark: Some("transformer_blocks.0.attn2.to_q.weight"),
            name: "Stable Diffusion 3.5 medium",
            repo: "stabilityai/stable-diffusion-3.5-medium",
            encoders: SD3_ENCODERS,
            vae: "Stable Diffusion 3's",
        },
        Release {
            width: 2432,
            mark: None,
            name: "Stable Diffusion 3.5 large",
            repo: "stabilityai/stable-diffusion-3.5-large",
            encoders: SD3_ENCODERS,
            vae: "Stable Diffusion 3's",
        },
        Release {
            width: 1536,
            mark: None,
            name: "Stable Diffusion 3 medium",
            repo: "stabilityai/stable-diffusion-3-medium-diffusers",
            encoders: SD3_ENCODERS,
            vae: "Stable Diffusion 3's",
        },
    ],
};
const SD3_ENCODERS: &str = "encoders CLIP-L and CLIP-G, and perhaps T5-XXL";

const FLUX1: Drawn = Drawn {
    architecture: "flux",
    embedder: "x_embedder.weight",
    encoders: &[
        clip_encoder(
            0,
            Some(("time_text_embed.text_embedder.linear_1.weight", 1)),
        ),
        t5_encoder(1, false),
    ],
    map: flux1,
    layers: flux1_layers,
    configure: infer_config::flux1,
    releases: &[
        Release {
            width: 3072,
            mark: Some("time_text_embed.guidance_embedder.linear_1.weight"),
            name: "FLUX.1 dev",
            repo: "black-forest-labs/FLUX.1-dev",
            encoders: "encoders CLIP-L and T5-XXL",
            vae: "FLUX.1's",
        },
        Release {
            width: 3072,
            mark: None,
            name: "FLUX.1 schnell",
            repo: "black-forest-labs/FLUX.1-schnell",
            encoders: "encoders CLIP-L and T5-XXL",
            vae: "FLUX.1's",
        },
    ],
};

const KLEIN: Drawn = Drawn {
    architecture: "flux",
    embedder: "x_embedder.weight",
    encoders: &[qwen3_encoder("context_embedder.weight", 3)],
    map: flux2,
    layers: flux2_layers,
    configure: infer_config::flux2,
    releases: &[
        Release {
            width: 3072,
            name: "FLUX.2 klein 4B",
            repo: "black-forest-labs/FLUX.2-klein-4B",
            mark: None,
            encoders: "encoder Qwen3 4B",
            vae: "FLUX.2's",
        },
        Release {
            width: 4096,
            name: "FLUX.2 klein 9B",
            repo: "black-forest-labs/FLUX.2-klein-9B",
            mark: None,
            encoders: "encoder Qwen3 8B",
            vae: "FLUX.2's",
        },
    ],
};

const Z_IMAGE: Drawn = Drawn {
    architecture: "lumina2",
    embedder: "all_x_embedder.2-1.weight",
    encoders: &[qwen3_encoder("cap_embedder.1.weight", 1)],
    map: z_image,
    layers: z_image_layers,
    configure: infer_config::z_image,
    releases: &[Release {
        width: 3840,
        name: family_name::Z_IMAGE,
        repo: "Tongyi-MAI/Z-Image-Turbo",
        mark: None,
        encoders: "encoder Qwen3 4B",
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
    let blocks = count("transformer_blocks.");
    let layers = (drawn.layers)(&count).into_iter();
    let with_tensors =
        |layer: String| Some((drawn.names(&format!("{layer}.weight"), blocks)?, layer));
    layers
        .filter_map(with_tensors)
        .map(|(tensors, layer)| (layer, tensors))
        .collect()
}

impl Drawn {
    /// The tensors of a checkpoint's transformer as its original code has them, without a prefix, and
    /// those here that each consists of. What has the same name in both is left out.
    pub fn original_tensors(&self, checkpoint: &Checkpoint) -> Vec<(String, Vec<Named>)> {
        let count = |blocks: &str| checkpoint.count(&format!("transformer.{blocks}"));
        let blocks = count("transformer_blocks.");
        let mut layers = (self.layers)(&count);
        layers.push(POSITIONS.into());
        let keys = layers.iter().flat_map(|layer| {
            // a norm's numbers are called its scale in Black Forest Labs' code
            let weight = match layer.ends_with("query_norm") || layer.ends_with("key_norm") {
                true => ".scale",
                false => ".weight",
            };
            ["", weight, ".bias"].map(|end| format!("{layer}{end}"))
        });
        let is_there = |named: &Named| checkpoint.shape(&named.name).is_some();
        let named = |key: String| Some((self.names(&key, blocks)?, key));
        keys.filter_map(named)
            .filter(|(named, _)| named.iter().any(is_there))
            .map(|(named, key)| (key, named))
            .collect()
    }

    /// The names of a tensor, given by its key without prefix, in a transformer of so many blocks with
    /// two streams; none if no layer has it.
    pub fn names(&self, key: &str, blocks: usize) -> Option<Vec<Named>> {
        let mut names = (self.map)(key, blocks)?;
        for named in &mut names {
            named.name.insert_str(0, "transformer.");
        }
        Some(names)
    }

    /// Which of the published models a transformer is.
    pub fn release(&self, checkpoint: &Checkpoint) -> Option<&'static Release> {
        let width = checkpoint.shape(&format!("transformer.{}", self.embedder));
        let width = width.and_then(|shape| shape.first());
        let has_mark = |release: &&Release| {
            let has = |mark| checkpoint.shape(&format!("transformer.{mark}")).is_some();
            release.mark.is_none_or(has)
        };
        let mut marked = self.releases.iter().filter(has_mark);
        let of_width = marked.clone().find(|release| Some(&release.width) == width);
        of_width.or(marked.next())
    }

    /// What a kind of encoder is for here, in order.
    pub fn of_kind(&self, kind: EncoderKind) -> impl Iterator<Item = &'static Encoder> {
        self.encoders.iter().filter(move |it| it.kind == kind)
    }

    /// The component of T5, if the family has it.
    pub fn t5(&self) -> Option<&'static str> {
        self.of_kind(EncoderKind::T5).map(|it| it.component).next()
    }
}

impl Encoder {
    /// The width of the encoder whose states a transformer takes; none if that is not told.
    pub fn width(&self, checkpoint: &Checkpoint) -> Option<usize> {
        let (layer, states) = self.layer?;
        let shape = checkpoint.shape(&format!("transformer.{layer}"))?;
        Some(shape.last()? / states)
    }

    /// Whether an encoder of this width may be it.
    pub fn fits(&self, width: usize, checkpoint: &Checkpoint) -> bool {
        match (self.width(checkpoint), self.kind) {
            (Some(wanted), _) => wanted == width,
            (None, EncoderKind::Clip) => {
                (self.component == ENCODERS[0]) == (width <= WIDEST_CLIP_L)
            }
            (None, _) => true,
        }
    }

    /// What it is called.
    pub fn name(&self, checkpoint: &Checkpoint) -> &'static str {
        let first = self.component == ENCODERS[0];
        match self.width(checkpoint) {
            None if self.kind == EncoderKind::Clip && !first => "CLIP-G",
            width => self.kind.name(width.unwrap_or(0)),
        }
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
fn flux2(key: &str, _: usize) -> Option<Vec<Named>> {
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

/// The layers of FLUX.1 outside of its blocks: original and diffusers' names.
const FLUX1_FIXED: [(&str, &str); 10] = [
    ("img_in.", "x_embedder."),
    ("txt_in.", "context_embedder."),
    (
        "time_in.in_layer.",
        "time_text_embed.timestep_embedder.linear_1.",
    ),
    (
        "time_in.out_layer.",
        "time_text_embed.timestep_embedder.linear_2.",
    ),
    (
        "vector_in.in_layer.",
        "time_text_embed.text_embedder.linear_1.",
    ),
    (
        "vector_in.out_layer.",
        "time_text_embed.text_embedder.linear_2.",
    ),
    (
        "guidance_in.in_layer.",
        "time_text_embed.guidance_embedder.linear_1.",
    ),
    (
        "guidance_in.out_layer.",
        "time_text_embed.guidance_embedder.linear_2.",
    ),
    ("final_layer.linear.", "proj_out."),
    (CONTINUOUS, "norm_out.linear."),
];

/// A layer whose rows shift and scale in original code, and scale and shift in diffusers'.
const CONTINUOUS: &str = "final_layer.adaLN_modulation.1.";

/// Those of a block with a stream each for text and picture, but for the fused ones.
const FLUX1_DOUBLE: [(&str, &str); 12] = [
    ("img_mod.lin.", "norm1.linear."),
    ("img_attn.norm.query_norm.", "attn.norm_q."),
    ("img_attn.norm.key_norm.", "attn.norm_k."),
    ("img_attn.proj.", "attn.to_out.0."),
    ("img_mlp.0.", "ff.net.0.proj."),
    ("img_mlp.2.", "ff.net.2."),
    ("txt_mod.lin.", "norm1_context.linear."),
    ("txt_attn.norm.query_norm.", "attn.norm_added_q."),
    ("txt_attn.norm.key_norm.", "attn.norm_added_k."),
    ("txt_attn.proj.", "attn.to_add_out."),
    ("txt_mlp.0.", "ff_context.net.0.proj."),
    ("txt_mlp.2.", "ff_context.net.2."),
];

/// Those of a block with one stream, but for the fused one.
const FLUX1_SINGLE: [(&str, &str); 4] = [
    ("modulation.lin.", "norm.linear."),
    ("linear2.", "proj_out."),
    ("norm.query_norm.", "attn.norm_q."),
    ("norm.key_norm.", "attn.norm_k."),
];

/// Queries, keys, values of a width each and a hidden layer of four.
const SINGLE_PARTS: [(&str, usize, usize); 4] = [
    ("attn.to_q", 0, 1),
    ("attn.to_k", 1, 1),
    ("attn.to_v", 2, 1),
    ("proj_mlp", 3, 4),
];

const OF_PICTURE: [&str; 3] = ["to_q", "to_k", "to_v"];
const OF_TEXT: [&str; 3] = ["add_q_proj", "add_k_proj", "add_v_proj"];

/// The layers of FLUX.1 in Black Forest Labs' code.
fn flux1_layers(count: &CountBlocks) -> Vec<String> {
    let old = |names: &'static [(&str, &str)]| names.iter().map(|(old, _)| *old);
    let double = old(&FLUX1_DOUBLE).chain(["img_attn.qkv.", "txt_attn.qkv."]);
    let single = old(&FLUX1_SINGLE).chain(["linear1."]);
    let mut all: Vec<String> = old(&FLUX1_FIXED).map(String::from).collect();
    for i in 0..count("transformer_blocks.") {
        let names = double.clone();
        all.extend(names.map(|name| format!("double_blocks.{i}.{name}")));
    }
    for i in 0..count("single_transformer_blocks.") {
        let names = single.clone();
        all.extend(names.map(|name| format!("single_blocks.{i}.{name}")));
    }
    trimmed(all)
}

/// Names of layers without the dot that their tensors' names go on with.
fn trimmed(layers: Vec<String>) -> Vec<String> {
    let trimmed = layers.iter().map(|name| name.trim_end_matches('.').into());
    trimmed.collect()
}

/// A key with the beginning that a table renames; a norm's numbers are called its scale in some.
fn renamed(names: &[(&str, &str)], key: &str) -> Option<String> {
    names.iter().find_map(|(old, new)| {
        let rest = key.strip_prefix(old)?;
        let rest = if rest == "scale" { "weight" } else { rest };
        Some(format!("{new}{rest}"))
    })
}

/// The tensor of a layer that shifts and scales, under diffusers' name.
fn continuous(name: String, is_it: bool) -> Vec<Named> {
    let part = if is_it {
        Part::SwappedHalves
    } else {
        Part::Whole
    };
    vec![Named { name, part }]
}

/// Whether a key is diffusers' own, by the names outside of blocks and the beginnings of blocks.
fn is_diffusers(key: &str, fixed: &[(&str, &str)], blocks: &[&str]) -> bool {
    let of_blocks = |start: &&str| {
        let rest = key.strip_prefix(*start);
        let number = rest.and_then(|rest| rest.split('.').next());
        number.is_some_and(is_block_number)
    };
    blocks.iter().any(of_blocks) || fixed.iter().any(|(_, new)| key.starts_with(new))
}

/// Maps a key of FLUX.1, under Black Forest Labs' name or diffusers'.
fn flux1(key: &str, _: usize) -> Option<Vec<Named>> {
    let blocks = ["transformer_blocks.", "single_transformer_blocks."];
    if is_diffusers(key, &FLUX1_FIXED, &blocks) {
        return Some(Named::whole(key.into()));
    }
    if let Some(name) = renamed(&FLUX1_FIXED, key) {
        return Some(continuous(name, key.starts_with(CONTINUOUS)));
    }
    let (kind, rest) = key.split_once('.')?;
    let (number, layer) = rest.split_once('.')?;
    if !is_block_number(number) {
        return None;
    }
    match kind {
        "single_blocks" => {
            let block = format!("single_transformer_blocks.{number}");
            if let Some(end) = layer.strip_prefix("linear1.") {
                let part = |(name, index, count)| Named {
                    name: format!("{block}.{name}.{end}"),
                    part: Part::Rows {
                        index,
                        count,
                        of: 7,
                    },
                };
                return Some(SINGLE_PARTS.map(part).into());
            }
            let name = renamed(&FLUX1_SINGLE, layer)?;
            Some(Named::whole(format!("{block}.{name}")))
        }
        "double_blocks" => {
            let block = format!("transformer_blocks.{number}");
            let attention = format!("{block}.attn");
            if let Some(end) = layer.strip_prefix("img_attn.qkv.") {
                return Some(fused(&attention, OF_PICTURE, end));
            }
            if let Some(end) = layer.strip_prefix("txt_attn.qkv.") {
                return Some(fused(&attention, OF_TEXT, end));
            }
            let name = renamed(&FLUX1_DOUBLE, layer)?;
            Some(Named::whole(format!("{block}.{name}")))
        }
        _ => None,
    }
}

/// The layers of Stable Diffusion 3 outside of its blocks: original and diffusers' names.
const SD3_FIXED: [(&str, &str); 8] = [
    ("x_embedder.proj.", "pos_embed.proj."),
    (
        "t_embedder.mlp.0.",
        "time_text_embed.timestep_embedder.linear_1.",
    ),
    (
        "t_embedder.mlp.2.",
        "time_text_embed.timestep_embedder.linear_2.",
    ),
    (
        "y_embedder.mlp.0.",
        "time_text_embed.text_embedder.linear_1.",
    ),
    (
        "y_embedder.mlp.2.",
        "time_text_embed.text_embedder.linear_2.",
    ),
    ("context_embedder.", "context_embedder."),
    ("final_layer.linear.", "proj_out."),
    (CONTINUOUS, "norm_out.linear."),
];

/// Those of a block, but for the fused ones.
const SD3_BLOCK: [(&str, &str); 15] = [
    ("x_block.adaLN_modulation.1.", "norm1.linear."),
    ("x_block.attn.ln_q.", "attn.norm_q."),
    ("x_block.attn.ln_k.", "attn.norm_k."),
    ("x_block.attn.proj.", "attn.to_out.0."),
    ("x_block.attn2.ln_q.", "attn2.norm_q."),
    ("x_block.attn2.ln_k.", "attn2.norm_k."),
    ("x_block.attn2.proj.", "attn2.to_out.0."),
    ("x_block.mlp.fc1.", "ff.net.0.proj."),
    ("x_block.mlp.fc2.", "ff.net.2."),
    (OF_CONTEXT, "norm1_context.linear."),
    ("context_block.attn.ln_q.", "attn.norm_added_q."),
    ("context_block.attn.ln_k.", "attn.norm_added_k."),
    ("context_block.attn.proj.", "attn.to_add_out."),
    ("context_block.mlp.fc1.", "ff_context.net.0.proj."),
    ("context_block.mlp.fc2.", "ff_context.net.2."),
];

/// The modulation of the text, which of the last block only shifts and scales.
const OF_CONTEXT: &str = "context_block.adaLN_modulation.1.";

/// The layers of Stable Diffusion 3 in Stability's code.
fn sd3_layers(count: &CountBlocks) -> Vec<String> {
    let old = |names: &'static [(&str, &str)]| names.iter().map(|(old, _)| *old);
    let fused = [
        "x_block.attn.qkv.",
        "x_block.attn2.qkv.",
        "context_block.attn.qkv.",
    ];
    let block = old(&SD3_BLOCK).chain(fused);
    let mut all: Vec<String> = old(&SD3_FIXED).map(String::from).collect();
    for i in 0..count("transformer_blocks.") {
        let names = block.clone();
        all.extend(names.map(|name| format!("joint_blocks.{i}.{name}")));
    }
    trimmed(all)
}

/// The positions of Stable Diffusion 3, which are no layer's in Stability's code.
const POSITIONS: &str = "pos_embed";

/// Maps a key of Stable Diffusion 3 in so many blocks, under Stability's name or diffusers'.
fn sd3(key: &str, blocks: usize) -> Option<Vec<Named>> {
    if key == POSITIONS {
        return Some(Named::whole("pos_embed.pos_embed".into()));
    }
    if key == "pos_embed.pos_embed" || is_diffusers(key, &SD3_FIXED, &["transformer_blocks."]) {
        return Some(Named::whole(key.into()));
    }
    if let Some(name) = renamed(&SD3_FIXED, key) {
        return Some(continuous(name, key.starts_with(CONTINUOUS)));
    }
    let rest = key.strip_prefix("joint_blocks.")?;
    let (number, layer) = rest.split_once('.')?;
    if !is_block_number(number) {
        return None;
    }
    let block = format!("transformer_blocks.{number}");
    for (start, parent, names) in [
        ("x_block.attn.qkv.", "attn", OF_PICTURE),
        ("x_block.attn2.qkv.", "attn2", OF_PICTURE),
        ("context_block.attn.qkv.", "attn", OF_TEXT),
    ] {
        if let Some(end) = layer.strip_prefix(start) {
            return Some(fused(&format!("{block}.{parent}"), names, end));
        }
    }
    let name = format!("{block}.{}", renamed(&SD3_BLOCK, layer)?);
    let is_last = number.parse() == Ok(blocks.saturating_sub(1));
    Some(continuous(name, is_last && layer.starts_with(OF_CONTEXT)))
}

/// How many blocks of two streams a file of these keys has, behind a prefix.
pub fn blocks<'a>(keys: impl Iterator<Item = &'a str>, prefix: &str) -> usize {
    let number = |key: &str| {
        let rest = key.strip_prefix(prefix)?.strip_prefix("joint_blocks.")?;
        let number = rest.split('.').next().filter(|it| is_block_number(it))?;
        number.parse::<usize>().ok()
    };
    keys.filter_map(number).max().map_or(0, |last| last + 1)
}

/// The layers of Z-Image that ComfyUI calls otherwise: its names and diffusers'.
const Z_IMAGE_FIXED: [(&str, &str); 2] = [
    ("x_embedder.", "all_x_embedder.2-1."),
    ("final_layer.", "all_final_layer.2-1."),
];

/// What is in its last layer.
const Z_IMAGE_FINAL: [&str; 2] = ["linear", "adaLN_modulation.1"];

/// Those of a block, but for the fused one.
const Z_IMAGE_BLOCK: [(&str, &str); 3] = [
    ("attention.out.", "attention.to_out.0."),
    ("attention.q_norm.", "attention.norm_q."),
    ("attention.k_norm.", "attention.norm_k."),
];

/// The layers of Z-Image that have other names than diffusers'.
fn z_image_layers(count: &CountBlocks) -> Vec<String> {
    let inside = [("x_embedder.", &[""][..]), ("final_layer.", &Z_IMAGE_FINAL)];
    let fixed = inside.iter().flat_map(|(layer, inside)| {
        let names = inside.iter().map(move |name| format!("{layer}{name}"));
        names.collect::<Vec<_>>()
    });
    let blocks = ["layers", "noise_refiner", "context_refiner"];
    let names = Z_IMAGE_BLOCK.map(|(old, _)| old);
    let of_blocks = blocks.iter().flat_map(|kind| {
        let blocks = 0..count(&format!("{kind}."));
        let names = names.iter().chain(&["attention.qkv."]);
        blocks.flat_map(move |i| names.clone().map(move |name| format!("{kind}.{i}.{name}")))
    });
    trimmed(fixed.chain(of_blocks).collect())
}

/// Maps a key of Z-Image, under ComfyUI's name or diffusers'.
fn z_image(key: &str, _: usize) -> Option<Vec<Named>> {
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
        part: Part::Rows {
            index,
            count: 1,
            of,
        },
    };
    names.into_iter().enumerate().map(part).collect()
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
pub const OTHER_ENCODERS: [(&str, &str); 5] = [
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
