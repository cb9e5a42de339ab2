//! LoRA files and their relatives: small changes to a checkpoint's weights, made as each weight is
//! read.
//!
//! [`Lora::open`] reads a header alone, [`Lora::match_keys`] finds the weights that the file's layers
//! change, [`patch`] changes one (`delta.rs`). This module hides the formats: names of kohya's
//! trainer, of diffusers' (old, and PEFT's) and of the original layout (`layer_names.rs`); LoRA and
//! LoCon (Hu et al. 2021, arXiv 2106.09685), DoRA (Liu et al. 2024, arXiv 2402.09353), LoHa and LoKr
//! (Yeh et al. 2023, arXiv 2309.14859), GLoRA (Chavan et al. 2023, arXiv 2306.07967), IA3 (Liu et al.
//! 2022, arXiv 2205.05638), orthogonal finetuning (`orthogonal.rs`), and whole differences. The alphas
//! of PEFT's headers and configurations are in `peft.rs`.

mod delta;
mod layer_names;
mod named;
mod orthogonal;
mod peft;

pub use delta::patch;
pub use layer_names::{LayerNames, is_adapter_key};
pub use named::find_named;

use super::distillation::{Bearer, Distillation};
use super::embedding::{Embedding, split_bundled};
use super::file;
use super::key_mapping::Part;
use super::model_files::{file_name, folder_name};
use super::weights_file::WeightsFile;
use super::{Checkpoint, TRANSFORMER, family_name, role, transformers};
use anyhow::{Context, Result, bail};
use delta::{Method, rows_in_file};
use layer_names::{
    ALPHA, DIFF_B, DORA, DOWN, FACTORS, Layer, MAGNITUDE, OFT, ON_INPUT, PEFT_BOFT, PEFT_IA3,
    PEFT_OFT, SCALE, TLORA_MARK, Target, UP_BIAS, component, is_of_t5, is_of_z_image, split,
};
use peft::PeftConfig;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Keys of headers by kohya's trainer that tell of a training on pictures.
const OF_PICTURES: [&str; 5] = [
    "ss_num_train_images",
    "ss_dataset_dirs",
    "ss_datasets",
    "ss_tag_frequency",
    "ss_bucket_info",
];

/// The names that diffusers and PEFT give to every file.
const COMMON_NAMES: [&str; 3] = [
    "pytorch_lora_weights",
    "adapter_model",
    "diffusion_pytorch_model",
];

/// The name that PEFT gives to every file, and to the configuration beside it.
const ADAPTER_MODEL: &str = "adapter_model";
const ADAPTER_CONFIG: &str = "adapter_config.json";

/// PEFT's configuration of a file: the one beside it, or that of its header. Errors if it is damaged.
fn peft_config(path: &Path, source: &WeightsFile) -> Result<PeftConfig> {
    let beside = path.with_file_name(ADAPTER_CONFIG);
    if file_name(path) == ADAPTER_MODEL && beside.is_file() {
        return PeftConfig::of_file(&file::read_text(&beside)?)
            .with_context(|| format!("`{}` is damaged", beside.display()));
    }
    let text = source.metadata("lora_adapter_metadata").unwrap_or("{}");
    PeftConfig::of_header(text)
        .with_context(|| format!("the header of `{}` is damaged", path.display()))
}

/// The name of a LoRA at a path.
fn name_of(path: &Path) -> String {
    let name = file_name(path);
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    if COMMON_NAMES.contains(&name.trim_end_matches(".fp16")) {
        folder_name(folder.unwrap_or(Path::new(".")))
    } else {
        name
    }
}

/// An open LoRA file.
pub struct Lora {
    /// the file's name without its ending; that of its repository or folder where the file's is the
    /// same for every LoRA
    pub name: String,
    /// the factor of its changes; a negative one makes the opposite
    pub strength: f64,
    /// the same for text encoders
    pub text_strength: f64,
    source: WeightsFile,
    /// by their names in the file
    layers: BTreeMap<String, Layer>,
    /// words that it brings -> encoder -> the key of their vectors
    words: BTreeMap<String, BTreeMap<&'static str, String>>,
    /// keys that belong to no layer
    unknown_keys: Vec<String>,
    /// canonical name of a model's weight -> what changes it
    matched: BTreeMap<String, Match>,
    /// keys that change nothing in the model that it was matched with
    unexpected_keys: Vec<String>,
    /// PEFT's configuration from the header
    peft: PeftConfig,
}

/// What of a file changes a weight of the model: a layer, or some of its rows.
struct Match {
    layer: String,
    part: Part,
}

impl Lora {
    /// Whether a file is a LoRA, by its header; false if it cannot be read.
    pub fn is_at(path: &Path) -> bool {
        path.is_file()
            && WeightsFile::open(path)
                .is_ok_and(|source| source.keys().iter().any(|key| is_adapter_key(key)))
    }

    /// Reads a file's header. Errors if it is not a LoRA, or cannot be read.
    pub fn open(path: &Path, strength: f64) -> Result<Self> {
        let source = WeightsFile::open(path)?;
        let keys = source.keys();
        if !keys.iter().any(|key| is_adapter_key(key)) {
            let shown = path.display();
            match role(path, &keys) {
                Some((what, place)) => bail!("`{shown}` {what}, not a LoRA\n\nhint: {place}"),
                None => bail!(
                    "`{shown}` is not a LoRA\n\nhint: those of kohya's trainer, diffusers, PEFT and LyCORIS are known by the names of their tensors"
                ),
            }
        }
        if let Some(key) = keys.iter().find(|key| key.ends_with(TLORA_MARK)) {
            bail!(
                "`{}` is a T-LoRA, and the file lacks what its change is a difference from: the matrices that its training began with (it has `{key}`, but no `base_lambda`)\n\nhint: have the program that trained it merge it into the model, and draw with that",
                path.display()
            );
        }
        let (mut layers, mut unknown_keys) = (BTreeMap::<String, Layer>::new(), vec![]);
        let mut words = BTreeMap::<String, BTreeMap<_, _>>::new();
        for key in keys {
            if let Some((word, encoder)) = split_bundled(&key) {
                words.entry(word.into()).or_default().insert(encoder, key);
                continue;
            }
            match split(&key) {
                Some((layer, slot)) => {
                    let layer: &mut Layer = layers.entry(layer.into()).or_default();
                    layer.insert(slot, key);
                }
                None => unknown_keys.push(key),
            }
        }
        // a tensor of this name is IA3's only beside its mark
        for layer in layers.values_mut() {
            if !layer.contains_key(ON_INPUT) {
                unknown_keys.extend(layer.remove(FACTORS));
            }
        }
        // others of this name belong to weights of 8 bits
        for (name, layer) in &mut layers {
            if !name.ends_with("query_norm") && !name.ends_with("key_norm") {
                unknown_keys.extend(layer.remove(SCALE));
            }
        }
        layers.retain(|_, layer| !layer.is_empty());
        let count = |key: &&String| source.shape(key).map(|shape| shape.iter().product());
        let mut alphas = layers.values().filter_map(|layer| layer.get(ALPHA));
        if let Some(key) = alphas.find(|key| count(key) != Some(1_usize)) {
            bail!(
                "tensor `{key}` of `{}` has {} values, where one is expected\n\nhint: fetch it again; the file is damaged",
                path.display(),
                count(&key).unwrap_or(0)
            );
        }
        let peft = peft_config(path, &source)?;
        let needs_config = |layer: &Layer| {
            let has_kernel = |key: &String| source.shape(key).is_some_and(|shape| shape.len() > 2);
            layer.contains_key(PEFT_OFT) || layer.get(PEFT_IA3).is_some_and(has_kernel)
        };
        if !peft.is_of_file()
            && let Some(layer) = layers.values().find(|layer| needs_config(layer))
        {
            let key = layer.values().next().cloned().unwrap_or_default();
            bail!(
                "`{}` does not tell how its `{key}` was trained\n\nhint: PEFT saves that beside it: put its `{ADAPTER_CONFIG}` there again, with the file named `{ADAPTER_MODEL}.safetensors`",
                path.display()
            );
        }
        Ok(Self {
            name: name_of(path),
            strength,
            text_strength: strength,
            source,
            layers,
            words,
            unknown_keys,
            matched: BTreeMap::new(),
            unexpected_keys: vec![],
            peft,
        })
    }

    /// Changes text encoders by another factor.
    pub fn with_text_strength(self, text_strength: f64) -> Self {
        Self {
            text_strength,
            ..self
        }
    }

    /// The factor of the change of a weight.
    fn strength_of(&self, weight: &str) -> f64 {
        if weight.starts_with("text_encoder") {
            self.text_strength
        } else {
            self.strength
        }
    }

    /// The words that it brings.
    pub fn words(&self) -> impl Iterator<Item = &str> {
        self.words.keys().map(String::as_str)
    }

    /// The words that it brings, with their vectors. Errors if these cannot be read.
    pub fn embeddings(&self) -> Result<Vec<Embedding>> {
        let words = self.words.iter();
        words
            .map(|(word, keys)| Embedding::read(&self.source, word, keys))
            .collect()
    }

    /// Whether it has a change of `layer` for as many columns more as that has already, of (rows, columns).
    pub(super) fn doubles(
        &self,
        layer: &str,
        (rows, columns): (usize, usize),
        names: &LayerNames,
    ) -> bool {
        self.strength != 0.0
            && self.layers.iter().any(|(name, own)| {
                self.size(own) == Some((rows, 2 * columns))
                    && names.find(name).iter().any(|target| target.layer == layer)
            })
    }

    /// Whether it changes nothing, as its strength is 0; words that it brings have no strength.
    pub fn is_without_effect(&self) -> bool {
        (self.strength, self.text_strength) == (0.0, 0.0) && self.words.is_empty()
    }

    /// Finds the weights of a model that its layers change. Errors if there are none, or if the
    /// LoRA was made for a model with text embeddings of another width.
    pub fn match_keys(&mut self, model: &Checkpoint, names: &LayerNames) -> Result<()> {
        (self.matched, self.unexpected_keys) = (BTreeMap::new(), self.unknown_keys.clone());
        let mut other_size = None;
        for (name, layer) in &self.layers {
            let (mut has_weight, mut has_bias) = (false, false);
            for Target { layer: base, part } in names.find(name) {
                let is_free = |weight: &String| !self.matched.contains_key(weight);
                let weight = Some(format!("{base}.weight")).filter(|weight| {
                    is_free(weight) && self.has_size_of(name, layer, model, (weight, part))
                });
                let bias = Some(format!("{base}.bias")).filter(|bias| {
                    is_free(bias) && self.has_bias_of(name, layer, model, (bias, part))
                });
                has_weight |= weight.is_some();
                has_bias |= bias.is_some();
                let changed = weight.into_iter().chain(bias);
                self.matched.extend(changed.map(|weight| {
                    let (layer, part) = (name.clone(), part.clone());
                    (weight, Match { layer, part })
                }));
                if !has_weight && component(name) == TRANSFORMER {
                    let expected = model.shape(&format!("{base}.weight"));
                    other_size = self.size(layer).zip(expected).or(other_size);
                }
            }
            let is_matched = |slot: &str| {
                if [DIFF_B, UP_BIAS].contains(&slot) {
                    has_bias
                } else {
                    has_weight
                }
            };
            let unexpected = layer.iter().filter(|(slot, _)| !is_matched(slot));
            self.unexpected_keys
                .extend(unexpected.map(|(_, key)| key.clone()));
        }
        let (own, models) = (self.text_width(), model.text_width());
        // some of FLUX.1's layers have the names and sizes of FLUX.2's
        let of_model = transformers::find(model.names()).map(|(family, _)| family.name);
        let is_of_other = match self.family() {
            // nor do names tell all of Stable Diffusion 3's from FLUX.1's
            Some(family_name::FLUX1) => {
                ![Some(family_name::FLUX1), Some(family_name::SD3)].contains(&of_model)
            }
            Some(family_name::SD3) => of_model != Some(family_name::SD3),
            _ => false,
        };
        let fits = own.is_none() || models.is_none() || own == models;
        if !self.matched.is_empty() && fits && !is_of_other {
            return Ok(());
        }
        let why = match (self.family(), own.zip(models)) {
            _ if !is_of_other && other_size.is_some() => {
                let ((rows, columns), expected) = other_size.unwrap_or_default();
                format!(
                    "it is for a model of another size: it changes weights of {rows}x{columns} where that has {}",
                    shown(expected)
                )
            }
            (Some(family), _) => format!("it seems to be for {family}"),
            (None, Some((own, models))) if own != models => {
                format!("it takes text embeddings of width {own}, those of the model have {models}")
            }
            _ => format!(
                "none of its {} tensors matches one of its layers, such as {}",
                self.total(),
                examples(&self.unexpected_keys)
            ),
        };
        let hint = "a LoRA goes with the models of the family that it was made for: `sdgen inspect` tells which";
        bail!(
            "the LoRA `{}` does not fit `{}`: {why}\n\nhint: {hint}",
            self.name,
            model.name
        )
    }

    /// Whether a layer's change has as many rows and columns as a weight of the model.
    fn has_size_of(
        &self,
        name: &str,
        layer: &Layer,
        model: &Checkpoint,
        (weight, part): (&str, &Part),
    ) -> bool {
        let Some([rows, rest @ ..]) = model.shape(weight) else {
            return false;
        };
        self.fits(name, layer, (*rows, rest.iter().product()), part)
    }

    /// Whether a layer has a change in the shape of a bias of the model.
    fn has_bias_of(
        &self,
        name: &str,
        layer: &Layer,
        model: &Checkpoint,
        (bias, part): (&str, &Part),
    ) -> bool {
        let Some([rows]) = model.shape(bias) else {
            return false;
        };
        if layer.contains_key(PEFT_IA3) {
            // factors of outputs are the bias' too
            let factors = self.factors_of_peft(name, layer);
            return *part == Part::Whole
                && factors.is_ok_and(|(count, is_of_columns)| !is_of_columns && count == *rows);
        }
        let key = layer.get(DIFF_B).or_else(|| layer.get(UP_BIAS));
        let own = key.and_then(|key| self.source.shape(key));
        own.is_some_and(|shape| *shape == [rows_in_file(part, *rows)])
    }

    fn total(&self) -> usize {
        self.source.tensors().count()
    }

    /// How many of its tensors match the model, for people.
    pub fn describe_matched(&self) -> String {
        let parts: BTreeSet<&str> = self
            .matched
            .keys()
            .filter_map(|name| name.split('.').next())
            .collect();
        let total = self.total();
        let words: Vec<String> = self.words().map(|word| format!("`{word}`")).collect();
        let learned = match words.as_slice() {
            [] => String::new(),
            words => format!("; it brings {}", words.join(", ")),
        };
        format!(
            "LoRA `{}` at {}: {} of {total} tensors fit, they change {} weights of {}{learned}",
            self.name,
            self.strength,
            total - self.unexpected_keys.len(),
            self.matched.len(),
            parts.into_iter().collect::<Vec<_>>().join(", ")
        )
    }

    /// Its tensors that change nothing in the model, for people, if there are any.
    pub fn describe_unexpected(&self) -> Option<String> {
        let keys = &self.unexpected_keys;
        (!keys.is_empty()).then(|| {
            format!(
                "{} of {} tensors of the LoRA `{}` fit nowhere in the model, such as {}",
                keys.len(),
                self.total(),
                self.name,
                examples(keys)
            )
        })
    }

    /// Whether it changes a weight of the model that it was matched with.
    pub fn changes(&self, name: &str) -> bool {
        self.strength_of(name) != 0.0 && self.matched.contains_key(name)
    }

    /// SHA-256 of the data without the header, by which A1111 identifies LoRAs: metadata does not
    /// change it.
    pub fn hash(&self) -> Result<String> {
        self.source.data_hash()
    }

    /// The size of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.source.len
    }

    /// The distillation to few steps that its name tells of. A file that remembers the pictures
    /// that it was trained on is no distillation, whatever its name is.
    pub fn distillation(&self) -> Option<Distillation> {
        let is_of_pictures = OF_PICTURES
            .iter()
            .any(|key| self.source.metadata(key).is_some());
        (!is_of_pictures)
            .then(|| Distillation::named(&self.name, Bearer::Lora))
            .flatten()
    }

    /// The naming of its layers, for people.
    pub fn format(&self) -> &'static str {
        let has = |mark: &str| self.layers.keys().any(|name| name.contains(mark));
        let is_peft = self
            .layers
            .values()
            .flat_map(BTreeMap::values)
            .any(|key| key.contains(".lora_A.") || key.starts_with("base_model.model."));
        let has_original = has("double_blocks") || has("single_blocks");
        if has("lora_unet_input_blocks_")
            || has("lora_unet_output_blocks_")
            || has("lora_unet_") && has_original
        {
            "kohya, original block names"
        } else if has_original {
            "original block names"
        } else if has("lora_unet_") || has("lora_te") {
            "kohya"
        } else if has("lycoris_") {
            "LyCORIS"
        } else if is_peft {
            "diffusers, PEFT"
        } else {
            "diffusers, old"
        }
    }

    /// The methods of its layers, for people.
    pub fn methods(&self) -> BTreeSet<&'static str> {
        let of = |layer: &Layer| {
            let has_magnitudes = layer.contains_key(DORA) || layer.contains_key(MAGNITUDE);
            let method = Method::of(layer).map(|method| match method {
                Method::LowRank
                    if layer
                        .get(DOWN)
                        .and_then(|key| self.source.shape(key))
                        .is_some_and(|shape| shape.len() > 2) =>
                {
                    "LoCon"
                }
                Method::LowRank => "LoRA",
                Method::Hadamard => "LoHa",
                Method::Kronecker => "LoKr",
                Method::Difference => "differences",
                Method::Replacement => "norms",
                Method::Generalized => "GLoRA",
                Method::Factors | Method::PeftFactors => "IA3",
                Method::PeftRotation if layer.contains_key(PEFT_BOFT) => "BOFT",
                Method::PeftRotation => "OFT",
                Method::Rotation => match layer.get(OFT).and_then(|key| self.source.shape(key)) {
                    Some([_, _, _, _]) => "BOFT",
                    _ => "diag-OFT",
                },
            });
            method.into_iter().chain(has_magnitudes.then_some("DoRA"))
        };
        self.layers.values().flat_map(of).collect()
    }

    /// The ranks of its layers.
    pub fn ranks(&self) -> BTreeSet<usize> {
        self.layers
            .values()
            .filter_map(|layer| self.rank(layer))
            .collect()
    }

    /// The alphas of its layers, sorted; empty where each layer's alpha is its rank. Errors if one
    /// cannot be read.
    pub fn alphas(&self) -> Result<Vec<f64>> {
        let alphas = self
            .layers
            .values()
            .filter_map(|layer| layer.get(ALPHA))
            .map(|key| self.number(key));
        let mut alphas = alphas
            .chain(self.peft.lora_alphas().map(Ok))
            .collect::<Result<Vec<f64>>>()?;
        alphas.sort_by(f64::total_cmp);
        alphas.dedup();
        Ok(alphas)
    }

    /// The number of its layers by component, as their names tell.
    pub fn parts(&self) -> BTreeMap<&'static str, usize> {
        let mut parts = BTreeMap::new();
        for name in self.layers.keys() {
            *parts.entry(component(name)).or_default() += 1;
        }
        parts
    }

    /// Keys that are not part of any layer that sdgen knows.
    pub fn unknown_keys(&self) -> &[String] {
        &self.unknown_keys
    }

    /// The width of the text embeddings that its U-Net attends to, if it changes those layers.
    fn text_width(&self) -> Option<usize> {
        let is_cross_attention = |name: &str| {
            name.contains("attn2") && (name.ends_with("to_k") || name.ends_with("to_v"))
        };
        self.layers
            .iter()
            .filter(|(name, _)| is_cross_attention(name))
            .find_map(|(_, layer)| Some(self.size(layer)?.1))
    }

    /// The model family that it seems to be for, by the width of its text embeddings, else by names
    /// that only one family has.
    pub fn family(&self) -> Option<&'static str> {
        let has = |marks: &[&str]| {
            self.layers
                .keys()
                .any(|name| marks.iter().any(|mark| name.contains(mark)))
        };
        match self.text_width() {
            Some(768) => Some(family_name::SD1),
            Some(1024) => Some(family_name::SD2),
            Some(1280) => Some(family_name::SDXL_REFINER),
            Some(2048) => Some(family_name::SDXL),
            Some(_) => None,
            None if has(&["joint_blocks"]) => Some(family_name::SD3),
            None if self.layers.keys().any(|name| is_of_z_image(name)) => {
                Some(family_name::Z_IMAGE)
            }
            None => match self.is_of_flux2() {
                Some(true) => Some(family_name::FLUX2_KLEIN),
                Some(false) => Some(family_name::FLUX1),
                // T5 alone is of FLUX.1 or of Stable Diffusion 3
                None if self.layers.keys().any(|name| is_of_t5(name)) => None,
                None => has(&["lora_te2_", "text_encoder_2."]).then_some(family_name::SDXL),
            },
        }
    }

    /// Whether a transformer's LoRA is for FLUX.2, not for FLUX.1 and its kin, by the names and
    /// proportions of layers; none where these do not tell.
    fn is_of_flux2(&self) -> Option<bool> {
        const OWN: [&str; 3] = ["to_qkv_mlp_proj", "stream_modulation", "_linear_in"];
        const OTHERS: [&str; 7] = [
            "_qkv_lora",
            "_proj_lora",
            "_mod_lin",
            "_proj_mlp",
            "_ff_net_",
            "_norm1_",
            "_norm_linear",
        ];
        // rows for each column of layers that both have
        const PROPORTIONS: [(&str, usize); 2] = [("_linear1", 9), ("_mlp_0", 6)];
        let of_layer = |(name, layer): (&String, &Layer)| {
            let name = name.replace('.', "_");
            let is_single = name.contains("single_transformer_blocks_");
            if OWN.iter().any(|mark| name.contains(mark)) {
                return Some(true);
            }
            if OTHERS.iter().any(|mark| name.contains(mark))
                || is_single
                    && ["_to_q", "_to_k", "_to_v"]
                        .iter()
                        .any(|it| name.ends_with(it))
            {
                return Some(false);
            }
            let (_, rows) = PROPORTIONS.iter().find(|(end, _)| name.ends_with(end))?;
            let (own, columns) = self.size(layer)?;
            Some(own == rows * columns)
        };
        let mut transformers = self
            .layers
            .iter()
            .filter(|(name, _)| component(name) == TRANSFORMER);
        transformers.find_map(of_layer)
    }
}

/// A shape for people.
fn shown(shape: &[usize]) -> String {
    let sides: Vec<String> = shape.iter().map(usize::to_string).collect();
    sides.join("x")
}

/// Two of some keys, for people.
fn examples(keys: &[String]) -> String {
    keys.iter()
        .take(2)
        .map(|key| format!("`{key}`"))
        .collect::<Vec<_>>()
        .join(" and ")
}
