//! LoRA files and their relatives: small changes to a checkpoint's weights, made as each weight is
//! read.
//!
//! [`Lora::open`] reads a header alone, [`Lora::fit`] finds the weights that the file's layers
//! change, [`patch`] changes one. It hides the formats: names of kohya's trainer, of diffusers'
//! (old, and PEFT's) and of the original layout; LoRA and LoCon (Hu et al. 2021, arXiv 2106.09685),
//! DoRA (Liu et al. 2024, arXiv 2402.09353), LoHa and LoKr (Yeh et al. 2023, arXiv 2309.14859), and
//! whole differences.

use super::safetensors::Source;
use super::{Checkpoint, key_mapping};
use crate::pipeline::family::{Distillation, Family};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Ends of keys, and what a tensor is in its layer.
const SLOTS: [(&str, &str); 34] = [
    (".lora_down.weight", DOWN),
    (".lora_A.weight", DOWN),
    (".lora_A.default.weight", DOWN),
    (".lora.down.weight", DOWN),
    ("_lora.down.weight", DOWN),
    (".lora_linear_layer.down.weight", DOWN),
    (".lora_up.weight", UP),
    (".lora_B.weight", UP),
    (".lora_B.default.weight", UP),
    (".lora.up.weight", UP),
    ("_lora.up.weight", UP),
    (".lora_linear_layer.up.weight", UP),
    (".lora_mid.weight", MID),
    (".alpha", ALPHA),
    (".dora_scale", DORA),
    (".lora_magnitude_vector.weight", MAGNITUDE),
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
];
const LOKR_CORE: &str = "lokr_t2";
const DOWN: &str = "down";
const UP: &str = "up";
const MID: &str = "mid";
const ALPHA: &str = "alpha";
/// magnitudes of DoRA, one a row or one a column
const DORA: &str = "dora";
/// PEFT's, one a row
const MAGNITUDE: &str = "magnitude";
const DIFF: &str = "diff";
const DIFF_B: &str = "diff_b";

/// How a tag in a prompt begins.
const TAG: &str = "<lora:";

/// What trainers put before a layer's name, and our component.
const COMPONENTS: [(&str, &str); 4] = [
    ("lora_unet_", "unet_"),
    ("lora_te1_", "text_encoder_"),
    ("lora_te2_", "text_encoder_2_"),
    ("lora_te_", "text_encoder_"),
];

/// What diffusers once called layers, flattened, and what they are called.
const OLD_NAMES: [(&str, &str); 5] = [
    ("_processor_", "_"),
    ("self_attn_to_q", "self_attn_q_proj"),
    ("self_attn_to_k", "self_attn_k_proj"),
    ("self_attn_to_v", "self_attn_v_proj"),
    ("self_attn_to_out", "self_attn_out_proj"),
];

/// Whether a key is one of such files, and of no checkpoint.
pub fn is_adapter_key(key: &str) -> bool {
    const MARKS: [&str; 6] = [
        ".lora_",
        ".lora.",
        "_lora.",
        ".hada_",
        ".lokr_",
        ".dora_scale",
    ];
    const STARTS: [&str; 3] = ["lora_unet_", "lora_te", "lycoris_"];
    let has_difference = key.ends_with(".diff") || key.ends_with(".diff_b");
    has_difference
        || STARTS.iter().any(|start| key.starts_with(start))
        || MARKS.iter().any(|mark| key.contains(mark))
}

/// A file's tensors for one layer: what each is -> its key.
type Layer = BTreeMap<&'static str, String>;

/// An open file of changes.
pub struct Lora {
    /// the file's, without its ending
    pub name: String,
    /// how much of the change is made; negative makes its opposite
    pub strength: f64,
    source: Source,
    /// by their names in the file
    layers: BTreeMap<String, Layer>,
    /// keys that are of no layer
    strange: Vec<String>,
    /// canonical name of a weight -> the layer that changes it
    changes: BTreeMap<String, String>,
    /// keys that change nothing in the model that it was fitted to
    unfit: Vec<String>,
    /// what PEFT says of itself in the header
    peft: Value,
}

impl Lora {
    /// Whether a file is one, by its header; one that cannot be read is not.
    pub fn is_at(path: &Path) -> bool {
        path.is_file()
            && Source::open(path)
                .is_ok_and(|source| source.tensors().any(|(key, ..)| is_adapter_key(&key)))
    }

    /// Reads a file's header. Errors if it is no LoRA, or cannot be read.
    pub fn open(path: &Path, strength: f64) -> Result<Self> {
        let source = Source::open(path)?;
        let (mut layers, mut strange) = (BTreeMap::<String, Layer>::new(), vec![]);
        for (key, ..) in source.tensors() {
            match split(&key) {
                Some((layer, slot)) => {
                    drop(layers.entry(layer.into()).or_default().insert(slot, key))
                }
                None => strange.push(key),
            }
        }
        if !source.tensors().any(|(key, ..)| is_adapter_key(&key)) {
            bail!(
                "`{}` is no LoRA\n\nhint: a whole model goes with `--model`, a VAE with `--vae`",
                path.display()
            );
        }
        let peft = source
            .metadata("lora_adapter_metadata")
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default();
        let name = path
            .file_stem()
            .map(|s| s.to_string_lossy().into_owned())
            .unwrap_or_default();
        Ok(Self {
            name,
            strength,
            source,
            layers,
            strange,
            changes: BTreeMap::new(),
            unfit: vec![],
            peft,
        })
    }

    /// Finds the weights of a model that its layers change. Errors if there are none, or if it was
    /// made for a model that reads other texts.
    pub fn fit(&mut self, model: &Checkpoint, known: &Known) -> Result<()> {
        (self.changes, self.unfit) = (BTreeMap::new(), self.strange.clone());
        for (name, layer) in &self.layers {
            let base = known.find(name);
            let is_free = |weight: &String| !self.changes.contains_key(weight);
            let weight = base
                .map(|base| format!("{base}.weight"))
                .filter(is_free)
                .filter(|weight| {
                    let shape = model.shape(weight).unwrap_or_default();
                    self.size(layer).is_some_and(|(rows, columns)| {
                        shape.first() == Some(&rows)
                            && shape
                                .get(1..)
                                .is_some_and(|rest| rest.iter().product::<usize>() == columns)
                    })
                });
            let bias = base
                .filter(|_| layer.contains_key(DIFF_B))
                .map(|base| format!("{base}.bias"))
                .filter(|bias| {
                    let of = layer.get(DIFF_B).and_then(|key| self.source.shape(key));
                    is_free(bias) && of.is_some() && model.shape(bias) == of
                });
            let fits = |slot: &&str| {
                if *slot == DIFF_B {
                    bias.is_some()
                } else {
                    weight.is_some()
                }
            };
            self.unfit.extend(
                layer
                    .iter()
                    .filter(|(slot, _)| !fits(slot))
                    .map(|(_, key)| key.clone()),
            );
            self.changes.extend(
                weight
                    .into_iter()
                    .chain(bias)
                    .map(|changed| (changed, name.clone())),
            );
        }
        let (own, models) = (self.text_width(), model.text_width());
        if !self.changes.is_empty() && (own.is_none() || models.is_none() || own == models) {
            return Ok(());
        }
        let why = match (self.family(), own.zip(models)) {
            (Some(family), _) => format!("it seems to be for {family}"),
            (None, Some((own, models))) if own != models => {
                format!("it takes texts {own} wide, the model's are {models}")
            }
            _ => format!(
                "none of its {} tensors is for a layer of it, such as {}",
                self.total(),
                examples(&self.unfit)
            ),
        };
        let hint = "a LoRA goes with the models of the family that it was made for: `sdgen inspect` tells which";
        bail!(
            "the LoRA `{}` does not fit `{}`: {why}\n\nhint: {hint}",
            self.name,
            model.name
        )
    }

    fn total(&self) -> usize {
        self.source.tensors().count()
    }

    /// How many tensors fit the model, for people.
    pub fn coverage(&self) -> String {
        let parts: BTreeSet<&str> = self
            .changes
            .keys()
            .filter_map(|name| name.split('.').next())
            .collect();
        let (total, parts) = (
            self.total(),
            parts.into_iter().collect::<Vec<_>>().join(", "),
        );
        let fit = total - self.unfit.len();
        format!(
            "LoRA `{}` at {}: {fit} of {total} tensors fit, they change {} weights of {parts}",
            self.name,
            self.strength,
            self.changes.len()
        )
    }

    /// What of it changes nothing in the model, for people.
    pub fn misfit(&self) -> Option<String> {
        let (unfit, total) = (self.unfit.len(), self.total());
        (unfit > 0).then(|| {
            format!(
                "{unfit} of {total} tensors of the LoRA `{}` fit nowhere in the model, such as {}",
                self.name,
                examples(&self.unfit)
            )
        })
    }

    /// Whether it changes a weight of the model that it was fitted to.
    pub fn changes(&self, name: &str) -> bool {
        self.changes.contains_key(name)
    }

    /// SHA-256 of all behind the header, as A1111 tells LoRAs apart: it does not change with notes
    /// in the header.
    pub fn hash(&self) -> Result<String> {
        self.source.data_hash()
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.source.len
    }

    /// How it was distilled to few steps, by its name.
    pub fn distillation(&self) -> Option<Distillation> {
        Distillation::named(&self.name)
    }

    /// Which trainer's names it has.
    pub fn format(&self) -> &'static str {
        let has = |mark: &str| self.layers.keys().any(|name| name.contains(mark));
        let is_peft = self
            .layers
            .values()
            .flat_map(BTreeMap::values)
            .any(|key| key.contains(".lora_A."));
        match () {
            () if has("lora_unet_input_blocks_") || has("lora_unet_output_blocks_") => {
                "kohya, original block names"
            }
            () if has("lora_unet_") || has("lora_te") => "kohya",
            () if has("lycoris_") => "LyCORIS",
            () if is_peft => "diffusers, PEFT",
            () => "diffusers, old",
        }
    }

    /// What its layers are made of.
    pub fn methods(&self) -> BTreeSet<&'static str> {
        let of = |layer: &Layer| {
            let is_weighed = layer.contains_key(DORA) || layer.contains_key(MAGNITUDE);
            let method = Kind::of(layer).map(|kind| match kind {
                Kind::LowRank
                    if layer
                        .get(DOWN)
                        .and_then(|key| self.source.shape(key))
                        .is_some_and(|shape| shape.len() > 2) =>
                {
                    "LoCon"
                }
                Kind::LowRank => "LoRA",
                Kind::Hadamard => "LoHa",
                Kind::Kronecker => "LoKr",
                Kind::Whole => "differences",
            });
            method.into_iter().chain(is_weighed.then_some("DoRA"))
        };
        self.layers.values().flat_map(of).collect()
    }

    /// Ranks of its layers.
    pub fn ranks(&self) -> BTreeSet<usize> {
        self.layers
            .values()
            .filter_map(|layer| self.rank(layer))
            .collect()
    }

    /// Alphas of its layers, in order; none where its layers' ranks stand for them. Errors if one
    /// cannot be read.
    pub fn alphas(&self) -> Result<Vec<f64>> {
        let alphas = self
            .layers
            .values()
            .filter_map(|layer| layer.get(ALPHA))
            .map(|key| self.number(key));
        let peft = self
            .peft
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(key, _)| key.ends_with("lora_alpha"));
        let mut alphas = alphas
            .chain(peft.filter_map(|(_, alpha)| alpha.as_f64()).map(Ok))
            .collect::<Result<Vec<f64>>>()?;
        alphas.sort_by(f64::total_cmp);
        alphas.dedup();
        Ok(alphas)
    }

    /// (component, its layers), as names tell without a model.
    pub fn parts(&self) -> BTreeMap<&'static str, usize> {
        let mut parts = BTreeMap::new();
        for name in self.layers.keys() {
            *parts.entry(component(&flat(name))).or_default() += 1;
        }
        parts
    }

    /// Tensors that are nothing that sdgen knows.
    pub fn strange(&self) -> usize {
        self.strange.len()
    }

    /// The width of the texts that its U-Net takes, if it changes what takes them.
    fn text_width(&self) -> Option<usize> {
        let takes_text = |name: &str| {
            name.contains("attn2") && (name.ends_with("to_k") || name.ends_with("to_v"))
        };
        self.layers
            .iter()
            .filter(|(name, _)| takes_text(name))
            .find_map(|(_, layer)| Some(self.size(layer)?.1))
    }

    /// The family that it seems to be for, by the width of its texts, else by names that only one
    /// has.
    pub fn family(&self) -> Option<&'static str> {
        let has = |marks: &[&str]| {
            self.layers
                .keys()
                .any(|name| marks.iter().any(|mark| name.contains(mark)))
        };
        match self.text_width() {
            Some(768) => Some(Family::Sd1.name()),
            Some(1024) => Some(Family::Sd2.name()),
            Some(1280) => Some(Family::SdxlRefiner.name()),
            Some(2048) => Some(Family::Sdxl.name()),
            Some(_) => None,
            None if has(&[
                "double_blocks",
                "single_blocks",
                "single_transformer_blocks",
                "joint_blocks",
                "lora_te3_",
            ]) =>
            {
                Some("a family that sdgen does not draw")
            }
            None => has(&["lora_te2_", "text_encoder_2."]).then(|| Family::Sdxl.name()),
        }
    }

    /// (rows, columns) of what a layer adds to a weight; none if its tensors do not go together.
    fn size(&self, layer: &Layer) -> Option<(usize, usize)> {
        let shape = |slot: &str| layer.get(slot).and_then(|key| self.source.shape(key));
        let matrix = |slot: &str| {
            let (rows, rest) = shape(slot)?.split_first()?;
            Some((*rows, rest.iter().product::<usize>()))
        };
        let product = |[a, b, core]: [&str; 3]| {
            let ((a_rows, a_columns), (b_rows, b_columns)) = (matrix(a)?, matrix(b)?);
            let (rows, inner) = if core == MID || shape(core).is_none() {
                (a_rows, a_columns)
            } else {
                (a_columns, a_rows)
            };
            match shape(core) {
                None => (inner == b_rows).then_some((rows, b_columns)),
                Some([p, q, kernel @ ..]) => (inner == *p && b_rows == *q)
                    .then(|| (rows, b_columns * kernel.iter().product::<usize>())),
                Some(_) => None,
            }
        };
        match Kind::of(layer)? {
            Kind::LowRank => product(LOW_RANK),
            Kind::Hadamard => {
                product(HADAMARD[0]).filter(|size| product(HADAMARD[1]).as_ref() == Some(size))
            }
            Kind::Kronecker => {
                let factor = |(whole, product_of): (&str, [&str; 3])| {
                    matrix(whole).or_else(|| product(product_of))
                };
                let [(a, b), (c, d)] = [factor(KRONECKER[0])?, factor(KRONECKER[1])?];
                Some((a * c, b * d))
            }
            Kind::Whole => matrix(DIFF),
        }
    }

    fn rank(&self, layer: &Layer) -> Option<usize> {
        let slots = [DOWN, "hada_w1_b", "lokr_w2_b", "lokr_w1_b"];
        let key = slots.iter().find_map(|slot| layer.get(slot))?;
        self.source
            .shape(key)?
            .first()
            .copied()
            .filter(|rank| *rank > 0)
    }

    /// Alpha divided by the rank; a layer without alpha has its rank for it.
    fn scale(&self, layer: &Layer, weight: &str) -> Result<f64> {
        let Some(rank) = self.rank(layer).map(|rank| rank as f64) else {
            return Ok(1.0);
        };
        if let Some(key) = layer.get(ALPHA) {
            return Ok(self.number(key)? / rank);
        }
        let Some((component, name)) = weight.trim_end_matches(".weight").split_once('.') else {
            return Ok(1.0);
        };
        let said = |key: &str| self.peft.get(format!("{component}.{key}"));
        let is_named = |key: &str| {
            name.strip_suffix(key)
                .is_some_and(|before| before.is_empty() || before.ends_with('.'))
        };
        let own = said("alpha_pattern")
            .and_then(Value::as_object)
            .and_then(|p| p.iter().find(|(key, _)| is_named(key)))
            .map(|(_, a)| a);
        let alpha = own
            .or_else(|| said("lora_alpha"))
            .and_then(Value::as_f64)
            .unwrap_or(rank);
        // rank-stabilised: Kalajdzievski 2023, arXiv 2312.03732
        let is_stabilised = said("use_rslora").and_then(Value::as_bool) == Some(true);
        Ok(alpha / if is_stabilised { rank.sqrt() } else { rank })
    }

    fn number(&self, key: &str) -> Result<f64> {
        let values = widened(&self.source.read(key)?)?;
        let number = values
            .first()
            .with_context(|| format!("tensor `{key}` of the LoRA `{}` is empty", self.name))?;
        Ok(f64::from(*number))
    }

    /// What it adds to a weight [rows, ..] at strength 1, in its order, and by what that is to be
    /// multiplied.
    fn change(&self, name: &str, weight: &Tensor) -> Result<(Vec<f32>, f32)> {
        let layer = self
            .changes
            .get(name)
            .and_then(|layer| self.layers.get(layer))
            .context("a layer went missing")?;
        if let Some(key) = layer.get(DIFF_B).filter(|_| name.ends_with(".bias")) {
            return Ok((widened(&self.source.read(key)?)?, 1.0));
        }
        let (change, scale) = (self.product(layer)?, self.scale(layer, name)? as f32);
        match (layer.get(MAGNITUDE), layer.get(DORA)) {
            (None, None) => Ok((change, scale)),
            (magnitude, dora) => {
                let key = magnitude.or(dora).context("a layer went missing")?;
                let magnitudes = self.source.read(key)?;
                let of_rows =
                    magnitude.is_some() || magnitudes.dims().first() == weight.dims().first();
                let change = decompose(weight, change, scale, &widened(&magnitudes)?, of_rows)
                    .with_context(|| {
                        format!(
                            "tensor `{key}` of the LoRA `{}` does not fit `{name}`",
                            self.name
                        )
                    })?;
                Ok((change, 1.0))
            }
        }
    }

    /// A layer's matrices multiplied.
    fn product(&self, layer: &Layer) -> Result<Vec<f32>> {
        let read = |slot: &str| self.matrix(layer, slot);
        let product = |[a, b, core]: [&str; 3]| -> Result<Tensor> {
            let (a, b) = (read(a)?, read(b)?);
            let Some(key) = layer.get(core) else {
                return Ok(a.matmul(&b)?);
            };
            // Tucker's decomposition: a core [p, q, kernel] between the two
            let stored = self.source.read(key)?.to_dtype(DType::F32)?;
            let (p, q) = (stored.dim(0)?, stored.dim(1)?);
            let stored = stored.reshape((p, q, ()))?;
            let (kernel, columns) = (stored.dim(2)?, b.dim(1)?);
            let inner = stored
                .transpose(1, 2)?
                .reshape((p * kernel, q))?
                .matmul(&b)?; // [p * kernel, columns]
            let inner = inner
                .reshape((p, kernel, columns))?
                .transpose(1, 2)?
                .reshape((p, columns * kernel))?;
            Ok(if core == MID { a } else { a.t()?.contiguous()? }.matmul(&inner)?)
        };
        match Kind::of(layer).context("a layer went missing")? {
            Kind::LowRank => widened(&product(LOW_RANK)?),
            Kind::Hadamard => {
                let [mut first, second] = [
                    widened(&product(HADAMARD[0])?)?,
                    widened(&product(HADAMARD[1])?)?,
                ];
                first.par_iter_mut().zip(&second).for_each(|(a, b)| *a *= b);
                Ok(first)
            }
            Kind::Kronecker => {
                let factor = |(whole, of): (&str, [&str; 3])| {
                    if layer.contains_key(whole) {
                        read(whole)
                    } else {
                        product(of)
                    }
                };
                let [a, b] = [factor(KRONECKER[0])?, factor(KRONECKER[1])?];
                kronecker(&a, &b)
            }
            Kind::Whole => widened(&read(DIFF)?),
        }
    }

    /// A tensor [rows, ..] as a matrix in f32.
    fn matrix(&self, layer: &Layer, slot: &str) -> Result<Tensor> {
        let tensor = self
            .source
            .read(layer.get(slot).context("a tensor went missing")?)?
            .to_dtype(DType::F32)?;
        let rows = tensor.dim(0)?;
        Ok(tensor.reshape((rows, ()))?)
    }
}

/// How a layer's tensors make its change.
#[derive(Clone, Copy)]
enum Kind {
    /// up times down
    LowRank,
    /// two such products, element by element
    Hadamard,
    /// the Kronecker product of two matrices, which may be products
    Kronecker,
    /// the change itself
    Whole,
}

/// (left, right, core)
const LOW_RANK: [&str; 3] = [UP, DOWN, MID];
const HADAMARD: [[&str; 3]; 2] = [
    ["hada_w1_a", "hada_w1_b", "hada_t1"],
    ["hada_w2_a", "hada_w2_b", "hada_t2"],
];
const KRONECKER: [(&str, [&str; 3]); 2] = [
    ("lokr_w1", ["lokr_w1_a", "lokr_w1_b", "no core"]),
    ("lokr_w2", ["lokr_w2_a", "lokr_w2_b", LOKR_CORE]),
];

impl Kind {
    fn of(layer: &Layer) -> Option<Self> {
        let has = |slot: &str| layer.contains_key(slot);
        match () {
            () if has(UP) && has(DOWN) => Some(Self::LowRank),
            () if HADAMARD
                .iter()
                .flat_map(|[a, b, _]| [a, b])
                .all(|slot| has(slot)) =>
            {
                Some(Self::Hadamard)
            }
            () if KRONECKER
                .iter()
                .all(|(whole, [a, b, _])| has(whole) || has(a) && has(b)) =>
            {
                Some(Self::Kronecker)
            }
            () if has(DIFF) => Some(Self::Whole),
            () => None,
        }
    }
}

/// A weight of the checkpoint with what the LoRAs that change it add, in its own type; as it is, if
/// none does.
pub fn patch(loras: &[Lora], name: &str, weight: Tensor) -> Result<Tensor> {
    let mut sum: Option<Vec<f32>> = None;
    for lora in loras.iter().filter(|lora| lora.changes(name)) {
        let (change, scale) = lora
            .change(name, &weight)
            .with_context(|| format!("the LoRA `{}` cannot be applied to `{name}`", lora.name))?;
        let sum = match &mut sum {
            Some(sum) => sum,
            none => none.insert(widened(&weight)?),
        };
        let strength = lora.strength as f32 * scale;
        sum.par_iter_mut()
            .zip(&change)
            .for_each(|(sum, change)| *sum += strength * change);
    }
    match sum {
        Some(sum) => narrowed(sum, &weight),
        None => Ok(weight),
    }
}

/// A prompt without A1111's tags `<lora:name:X>`, and what they name; X is 1 where there is none.
/// Errors if it is no number.
pub fn take_tags(prompt: &str) -> Result<(String, Vec<(String, f64)>)> {
    let (mut text, mut tags, mut rest) = (String::new(), vec![], prompt);
    while let Some((before, tag, after)) = rest.split_once(TAG).and_then(|(before, tag)| {
        let (tag, after) = tag.split_once('>')?;
        Some((before, tag, after))
    }) {
        let (name, strength) = tag.split_once(':').unwrap_or((tag, "1"));
        let strength = strength
            .trim()
            .parse()
            .ok()
            .filter(|strength: &f64| strength.is_finite());
        let strength = strength
            .with_context(|| format!("`{TAG}{tag}>` has no number\n\nhint: `{TAG}{name}:0.8>`"))?;
        tags.push((name.trim().into(), strength));
        text += before;
        rest = after;
    }
    text += rest;
    Ok(if tags.is_empty() {
        (text, tags)
    } else {
        (text.trim().into(), tags)
    })
}

/// The file of a LoRA that a prompt names. Errors name the nearest that is in the folder.
pub fn find_named(folder: &Path, name: &str) -> Result<PathBuf> {
    let path = folder.join(format!("{name}.safetensors"));
    if path.is_file() {
        return Ok(path);
    }
    let files = std::fs::read_dir(folder)
        .with_context(|| format!("cannot read the folder `{}`", folder.display()))?;
    let there: Vec<String> = files
        .filter_map(|file| {
            Some(
                file.ok()?
                    .path()
                    .file_stem()?
                    .to_string_lossy()
                    .into_owned(),
            )
        })
        .collect();
    let near = key_mapping::nearest(name, there.iter().map(String::as_str))
        .map(|near| format!("did you mean `{near}`? "))
        .unwrap_or_default();
    bail!(
        "`{}` has no LoRA `{name}`\n\nhint: {near}its file would be `{}`",
        folder.display(),
        path.display()
    )
}

/// What DoRA adds to a weight [rows, columns, ..] of which `scale` times `change` is the low-rank
/// part: their sum is brought to these lengths, row by row or column by column, and the weight
/// taken off again.
fn decompose(
    weight: &Tensor,
    mut change: Vec<f32>,
    scale: f32,
    magnitudes: &[f32],
    of_rows: bool,
) -> Result<Vec<f32>> {
    let columns = weight.dims().get(1).copied().unwrap_or(1);
    let row: usize = weight.dims().iter().skip(1).product();
    let kernel = row / columns.max(1);
    let lengths = if of_rows { weight.dim(0)? } else { columns };
    if magnitudes.len() != lengths {
        bail!("it has {} lengths, there are {lengths}", magnitudes.len());
    }
    let weight = widened(weight)?;
    change
        .par_iter_mut()
        .zip(&weight)
        .for_each(|(sum, weight)| *sum = weight + scale * *sum);
    if of_rows {
        change
            .par_chunks_mut(row.max(1))
            .zip(magnitudes)
            .for_each(|(sum, magnitude)| {
                let squares: f64 = sum.iter().map(|value| f64::from(*value).powi(2)).sum();
                let factor = magnitude / (squares.sqrt() as f32 + f32::EPSILON);
                sum.iter_mut().for_each(|value| *value *= factor);
            });
    } else {
        let mut squares = vec![0f64; columns];
        for row in change.chunks(row.max(1)) {
            squares
                .iter_mut()
                .zip(row.chunks(kernel.max(1)))
                .for_each(|(s, v)| *s += v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>());
        }
        let factors: Vec<f32> = squares
            .iter()
            .zip(magnitudes)
            .map(|(s, m)| m / (s.sqrt() as f32 + f32::EPSILON))
            .collect();
        change.par_chunks_mut(row.max(1)).for_each(|row| {
            row.chunks_mut(kernel.max(1))
                .zip(&factors)
                .for_each(|(values, factor)| values.iter_mut().for_each(|v| *v *= factor));
        });
    }
    change
        .par_iter_mut()
        .zip(&weight)
        .for_each(|(sum, weight)| *sum -= weight);
    Ok(change)
}

/// [a, b] and [c, d] -> [a * c, b * d], row by row.
fn kronecker(left: &Tensor, right: &Tensor) -> Result<Vec<f32>> {
    let ((a, b), (c, d)) = (left.dims2()?, right.dims2()?);
    let (left, right) = (widened(left)?, widened(right)?);
    let mut product = vec![0f32; a * b * c * d];
    if !product.is_empty() {
        let rows = left
            .par_chunks_exact(b)
            .flat_map(|l| right.par_chunks_exact(d).map(move |r| (l, r)));
        let rows: Vec<_> = rows.collect();
        product
            .par_chunks_exact_mut(b * d)
            .zip(rows)
            .for_each(|(out, (l, r))| {
                out.chunks_exact_mut(d)
                    .zip(l)
                    .for_each(|(out, l)| out.iter_mut().zip(r).for_each(|(out, r)| *out = l * r));
            });
    }
    Ok(product)
}

/// A tensor's values in f32.
fn widened(tensor: &Tensor) -> Result<Vec<f32>> {
    let tensor = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::F16 => tensor
            .to_vec1::<f16>()?
            .into_par_iter()
            .map(f32::from)
            .collect(),
        DType::BF16 => tensor
            .to_vec1::<bf16>()?
            .into_par_iter()
            .map(f32::from)
            .collect(),
        _ => tensor.to_dtype(DType::F32)?.to_vec1()?,
    })
}

/// A tensor of these numbers, of the shape and type of another.
fn narrowed(numbers: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    let shape = like.dims();
    Ok(match like.dtype() {
        DType::F16 => Tensor::from_vec(
            numbers
                .into_par_iter()
                .map(f16::from_f32)
                .collect::<Vec<_>>(),
            shape,
            &Device::Cpu,
        )?,
        DType::BF16 => Tensor::from_vec(
            numbers
                .into_par_iter()
                .map(bf16::from_f32)
                .collect::<Vec<_>>(),
            shape,
            &Device::Cpu,
        )?,
        _ => Tensor::from_vec(numbers, shape, &Device::Cpu)?,
    })
}

/// The layer of a key, and what it is there.
fn split(key: &str) -> Option<(&str, &'static str)> {
    SLOTS
        .iter()
        .find_map(|(end, slot)| Some((key.strip_suffix(end)?, *slot)))
}

/// A layer's name as kohya's trainer would say it, without what PEFT puts before it.
fn flat(layer: &str) -> String {
    let layer = layer
        .strip_prefix("base_model.model.")
        .unwrap_or(layer)
        .replace('.', "_");
    let layer = OLD_NAMES
        .iter()
        .fold(layer, |layer, (old, new)| layer.replace(old, new));
    if layer.ends_with("_to_out") {
        format!("{layer}_0")
    } else {
        layer
    }
}

/// The component of a flattened name.
fn component(flat: &str) -> &'static str {
    let starts = |marks: &[&str]| marks.iter().any(|mark| flat.starts_with(mark));
    match () {
        () if starts(&["lora_te2_", "text_encoder_2_"]) => "text_encoder_2",
        () if starts(&[
            "lora_te",
            "text_encoder_",
            "text_model_",
            "lycoris_text_model_",
        ]) =>
        {
            "text_encoder"
        }
        () => "unet",
    }
}

fn examples(keys: &[String]) -> String {
    keys.iter()
        .take(2)
        .map(|key| format!("`{key}`"))
        .collect::<Vec<_>>()
        .join(" and ")
}

/// A model's layers by their flattened names, which makes underscores unambiguous.
pub struct Known(BTreeMap<String, String>);

impl Known {
    pub fn of(model: &Checkpoint) -> Self {
        let count = |prefix: &str| model.count(&format!("unet.{prefix}"));
        let mut known = BTreeMap::new();
        for layer in model
            .names()
            .filter_map(|name| name.strip_suffix(".weight"))
        {
            if let Some(original) = layer
                .strip_prefix("unet.")
                .and_then(|layer| key_mapping::to_original(layer, count))
            {
                known.insert(
                    format!("unet_{}", original.replace('.', "_")),
                    layer.to_string(),
                );
            }
            if !layer.starts_with("vae.") {
                known.insert(layer.replace('.', "_"), layer.to_string());
            }
        }
        Self(known)
    }

    /// The layer of the model that a file's layer is for.
    fn find(&self, layer: &str) -> Option<&String> {
        let flat = flat(layer);
        if let Some((rest, component)) = COMPONENTS
            .iter()
            .find_map(|(start, component)| Some((flat.strip_prefix(start)?, component)))
        {
            return self.0.get(&format!("{component}{rest}"));
        }
        let bare = flat.strip_prefix("lycoris_").unwrap_or(&flat);
        ["", "unet_", "text_encoder_"]
            .iter()
            .find_map(|component| self.0.get(&format!("{component}{bare}")))
    }
}
