//! The names of a LoRA's tensors: which layer each belongs to and what it is there, and which layers
//! of the model that one changes, as some files have several layers of the model as one.

use crate::weights::key_mapping::{self, Named, Part};
use crate::weights::{Checkpoint, transformers};
use std::collections::BTreeMap;

/// The endings of keys, and the slot of the tensor in its layer.
const SLOTS: [(&str, &str); 57] = [
    (".lora_down.weight", DOWN),
    (".lora_A.weight", DOWN),
    (".lora_A.default.weight", DOWN),
    (".lora.down.weight", DOWN),
    ("_lora.down.weight", DOWN),
    (".lora_linear_layer.down.weight", DOWN),
    (".lora_down.default.weight", DOWN),
    (".lora_up.weight", UP),
    (".lora_up.default.weight", UP),
    (".lora_B.weight", UP),
    (".lora_B.default.weight", UP),
    (".lora.up.weight", UP),
    ("_lora.up.weight", UP),
    (".lora_linear_layer.up.weight", UP),
    (".lora_mid.weight", MID),
    (".lora_B.bias", UP_BIAS),
    (".lora_B.default.bias", UP_BIAS),
    (".lora_up.bias", UP_BIAS),
    (".lora.up.bias", UP_BIAS),
    (".alpha", ALPHA),
    (".dora_scale", DORA),
    (".lora_magnitude_vector.weight", MAGNITUDE),
    (".lora_magnitude_vector.default.weight", MAGNITUDE),
    (".lora_magnitude_vector", MAGNITUDE),
    (".diff", DIFF),
    (".w_norm", DIFF),
    (".diff_b", DIFF_B),
    (".b_norm", DIFF_B),
    (".hada_w1_a", "hada_w1_a"),
    (".hada_w1_b", "hada_w1_b"),
    (".hada_t1", "hada_t1"),
    (".hada_w2_a", "hada_w2_a"),
    (".hada_w2_b", "hada_w2_b"),
    (".hada_t2", "hada_t2"),
    (".lokr_w1", "lokr_w1"),
    (".lokr_w1_a", "lokr_w1_a"),
    (".lokr_w1_b", "lokr_w1_b"),
    (".lokr_w2", "lokr_w2"),
    (".lokr_w2_a", "lokr_w2_a"),
    (".lokr_w2_b", "lokr_w2_b"),
    (".lokr_t2", LOKR_CORE),
    (".a1.weight", "a1"),
    (".a2.weight", GLORA_DOWN),
    (".b1.weight", "b1"),
    (".b2.weight", "b2"),
    (".bm.weight", "bm"),
    (".oft_blocks", OFT),
    (".rescale", RESCALE),
    (".on_input", ON_INPUT),
    (".oft_R.weight", PEFT_OFT),
    (".boft_R", PEFT_BOFT),
    (".boft_s", RESCALE),
    (".ia3_l", PEFT_IA3),
    (".scale", SCALE),
    // after all longer endings
    (".up.weight", UP),
    (".down.weight", DOWN),
    (".weight", FACTORS),
];
pub const LOKR_CORE: &str = "lokr_t2";
pub const DOWN: &str = "down";
pub const UP: &str = "up";
pub const MID: &str = "mid";
pub const ALPHA: &str = "alpha";
/// DoRA's magnitudes, one for each row or for each column
pub const DORA: &str = "dora";
/// DoRA's magnitudes as PEFT has them, one for each row
pub const MAGNITUDE: &str = "magnitude";
pub const DIFF: &str = "diff";
pub const DIFF_B: &str = "diff_b";
/// what PEFT's `lora_bias` adds to the layer's bias
pub const UP_BIAS: &str = "up_bias";
pub const GLORA_DOWN: &str = "a2";
/// the turns of orthogonal finetuning, and a factor for each row
pub const OFT: &str = "oft_blocks";
pub const RESCALE: &str = "rescale";
/// IA3's factors, and whether there is one for each column rather than row
pub const FACTORS: &str = "factors";
pub const ON_INPUT: &str = "on_input";
/// a norm's numbers, in the place of the model's
pub const SCALE: &str = "scale";
/// the turns of PEFT's OFT and BOFT, and the factors of its IA3
pub const PEFT_OFT: &str = "oft_R";
pub const PEFT_BOFT: &str = "boft_R";
pub const PEFT_IA3: &str = "ia3_l";

/// What only T-LoRAs have.
pub const TLORA_MARK: &str = ".lambda_layer";

/// The prefixes of kohya's and OneTrainer's layer names, and the components that they stand for: of
/// transformers as of U-Nets.
const COMPONENTS: [(&str, &str); 8] = [
    ("lora_unet_", "unet_"),
    ("lora_transformer_", "unet_"),
    ("transformer_", "unet_"),
    ("lora_te1_", "text_encoder_"),
    ("lora_te2_", "text_encoder_2_"),
    // kohya's trainer numbers T5 so, which is the second encoder of FLUX.1
    ("lora_te3_", "text_encoder_3_"),
    ("lora_te3_", "text_encoder_2_"),
    ("lora_te_", "text_encoder_"),
];

/// Old names of diffusers' layers, flattened, and the present ones.
const OLD_NAMES: [(&str, &str); 5] = [
    ("_processor_", "_"),
    ("self_attn_to_q", "self_attn_q_proj"),
    ("self_attn_to_k", "self_attn_k_proj"),
    ("self_attn_to_v", "self_attn_v_proj"),
    ("self_attn_to_out", "self_attn_out_proj"),
];

/// The ends of Z-Image's layers by diffusers' names and by its own, flattened, and which rows of the
/// latter the former are; all others have the same names.
const Z_IMAGE_LAYERS: [(&str, &str, Part); 4] = [
    ("_attention_to_q", "_attention_qkv", Part::third(0)),
    ("_attention_to_k", "_attention_qkv", Part::third(1)),
    ("_attention_to_v", "_attention_qkv", Part::third(2)),
    ("_attention_to_out_0", "_attention_out", Part::Whole),
];

/// The ends of FLUX.1's layers by its own names, flattened, and by those of XLabs' trainer, which of
/// the first of a single block takes queries, keys and values alone.
const XLABS_LAYERS: [(&str, &str); 6] = [
    ("_img_attn_qkv", "_qkv_lora1"),
    ("_txt_attn_qkv", "_qkv_lora2"),
    ("_img_attn_proj", "_proj_lora1"),
    ("_txt_attn_proj", "_proj_lora2"),
    // whose endings `_lora.down.weight` are those of other files too
    (SINGLE, "_qkv"),
    ("_linear2", "_proj"),
];
const SINGLE: &str = "_linear1";

/// The beginnings of the flattened names of layers that only transformers have.
const OF_TRANSFORMERS: [&str; 13] = [
    "transformer_",
    "single_transformer_blocks_",
    "sformer_blocks_",
    "double_blocks_",
    "single_blocks_",
    "joint_blocks_",
    "img_in",
    "txt_in",
    "time_in_",
    "vector_in_",
    "guidance_in_",
    "final_layer_",
    "double_stream_modulation_",
];

/// A layer of a model that a file's layer changes, by all of it or by some of its rows.
pub struct Target {
    pub layer: String,
    pub part: Part,
}

/// Whether a key is a LoRA's (or a relative's) and no checkpoint has it.
pub fn is_adapter_key(key: &str) -> bool {
    const MARKS: [&str; 14] = [
        "_lora1.",
        "_lora2.",
        ".lora_",
        ".lora.",
        "_lora.",
        ".hada_",
        ".lokr_",
        ".dora_scale",
        ".oft_blocks",
        ".on_input",
        ".oft_R",
        ".boft_R",
        ".ia3_l",
        TLORA_MARK,
    ];
    const STARTS: [&str; 4] = ["lora_unet_", "lora_transformer_", "lora_te", "lycoris_"];
    let has_difference = key.ends_with(".diff") || key.ends_with(".diff_b");
    has_difference
        || STARTS.iter().any(|start| key.starts_with(start))
        || MARKS.iter().any(|mark| key.contains(mark))
}

/// The tensors of one layer: slot -> key in the file.
pub type Layer = BTreeMap<&'static str, String>;

/// Splits a key into its layer's name and its slot.
pub fn split(key: &str) -> Option<(&str, &'static str)> {
    SLOTS
        .iter()
        .find_map(|(end, slot)| Some((key.strip_suffix(end)?, *slot)))
}

/// A layer's name as kohya's trainer writes it, with underscores and without PEFT's prefix.
fn flattened(layer: &str) -> String {
    let layer = layer
        .strip_prefix("base_model.model.")
        .unwrap_or(layer)
        .replace('.', "_");
    OLD_NAMES
        .iter()
        .fold(layer, |layer, (old, new)| layer.replace(old, new))
}

/// A layer's flattened name without what says its component.
fn inner(layer: &str) -> String {
    const STARTS: [&str; 3] = ["lora_unet_", "lora_transformer_", "lycoris_"];
    let split = key_mapping::split_component(layer);
    let flat = flattened(split.map_or(layer, |(_, rest)| rest));
    let bare = STARTS.iter().find_map(|start| flat.strip_prefix(start));
    bare.map_or(flat.clone(), String::from)
}

/// Whether a layer is one of Z-Image's blocks, by its name in the file.
pub fn is_of_z_image(layer: &str) -> bool {
    let inner = inner(layer);
    let inner = inner.strip_prefix("transformer_").unwrap_or(&inner);
    let starts = ["layers_", "noise_refiner_", "context_refiner_"];
    let parts = ["_attention_", "_feed_forward_", "_adaLN_modulation"];
    starts.iter().any(|start| inner.starts_with(start))
        && parts.iter().any(|part| inner.contains(part))
}

/// Whether a layer is one of T5's blocks, by its name in the file.
pub fn is_of_t5(layer: &str) -> bool {
    flattened(layer).contains("_encoder_block_") || layer.starts_with("lora_te3_")
}

/// The component of a layer, by its name in the file.
pub fn component(layer: &str) -> &'static str {
    let split = key_mapping::split_component(layer);
    let flat = flattened(layer);
    let bare = inner(layer);
    let starts = |marks: &[&str]| marks.iter().any(|mark| flat.starts_with(mark));
    if is_of_z_image(layer) || OF_TRANSFORMERS.iter().any(|mark| bare.starts_with(mark)) {
        "transformer"
    } else if let Some((component, _)) = split {
        component
    } else if starts(&["lora_te2_", "text_encoder_2_"]) {
        "text_encoder_2"
    } else if starts(&["lora_te3_", "text_encoder_3_"]) {
        "text_encoder_3"
    } else if starts(&[
        "lora_te",
        "text_encoder_",
        "text_model_",
        "lycoris_text_model_",
    ]) {
        "text_encoder"
    } else {
        "unet"
    }
}

/// A model's layers by their flattened names: looking them up makes underscores unambiguous.
pub struct LayerNames(BTreeMap<String, Vec<Target>>);

impl LayerNames {
    /// Lists the layers of a model under diffusers' and the original names.
    pub fn of(model: &Checkpoint) -> Self {
        let count = |prefix: &str| model.count(&format!("unet.{prefix}"));
        let mut names = BTreeMap::<String, Vec<Target>>::new();
        let mut add = |name: String, layer: &str, part: Part| {
            let layer = layer.into();
            let targets = names.entry(name).or_default();
            targets.push(Target { layer, part });
        };
        for layer in model
            .names()
            .filter_map(|name| name.strip_suffix(".weight"))
        {
            if let Some(original) = layer
                .strip_prefix("unet.")
                .and_then(|layer| key_mapping::to_original(layer, count))
            {
                let name = format!("unet_{}", original.replace('.', "_"));
                add(name, layer, Part::Whole);
            }
            if let Some(inner) = layer.strip_prefix("transformer.") {
                let name = format!("unet_{}", inner.replace('.', "_"));
                // some programs take `tran` for a prefix
                let cut = name.replacen("unet_transformer_blocks_", "unet_sformer_blocks_", 1);
                if cut != name {
                    add(cut, layer, Part::Whole);
                }
                for (end, original, part) in Z_IMAGE_LAYERS {
                    if let Some(before) = name.strip_suffix(end) {
                        add(format!("{before}{original}"), layer, part);
                    }
                }
                add(name, layer, Part::Whole);
            } else if !layer.starts_with("vae.") {
                let name = layer.replace('.', "_");
                // transformers 5.6 and later have no `text_model`
                let bare = layer.replacen(".text_model.", ".", 1).replace('.', "_");
                if bare != name {
                    add(bare, layer, Part::Whole);
                }
                add(name, layer, Part::Whole);
            }
        }
        for (original, tensors) in transformers::original_layers(model) {
            let name = format!("unet_{}", original.replace('.', "_"));
            for Named { name: weight, part } in tensors {
                if let (Some(layer), true) = (
                    weight.strip_suffix(".weight"),
                    model.shape(&weight).is_some(),
                ) {
                    for (end, own) in XLABS_LAYERS {
                        let part = match (end, &part) {
                            (
                                SINGLE,
                                Part::Rows {
                                    index, count: 1, ..
                                },
                            ) => Part::third(*index),
                            (SINGLE, _) => continue,
                            (_, part) => part.clone(),
                        };
                        if let Some(before) = name.strip_suffix(end) {
                            add(format!("{before}{own}"), layer, part);
                        }
                    }
                    add(name.clone(), layer, part);
                }
            }
        }
        Self(names)
    }

    /// The layers of the model that a file's layer changes.
    pub fn find(&self, layer: &str) -> &[Target] {
        let layer = layer.strip_prefix("base_model.model.").unwrap_or(layer);
        let split = key_mapping::split_component(layer)
            .map(|(component, rest)| format!("{component}_{}", flattened(rest)));
        let flat = flattened(layer);
        let in_component = |(start, component): &(&str, &str)| {
            Some(format!("{component}{}", flat.strip_prefix(start)?))
        };
        let bare = flat.strip_prefix("lycoris_").unwrap_or(&flat);
        let anywhere = ["", "unet_", "text_encoder_"].map(|start| format!("{start}{bare}"));
        split
            .into_iter()
            .chain(COMPONENTS.iter().filter_map(in_component))
            .chain(anywhere)
            .find_map(|name| self.get(name))
            .map_or(&[], Vec::as_slice)
    }

    fn get(&self, name: String) -> Option<&Vec<Target>> {
        let of_list = || self.0.get(&format!("{name}_0"));
        let found = self.0.get(&name);
        found.or_else(|| name.ends_with("_to_out").then(of_list).flatten())
    }
}
