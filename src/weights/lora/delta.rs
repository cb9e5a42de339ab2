//! What a LoRA adds to a weight: the low-rank product, its relatives, and DoRA's normalization.

use super::layer_names::{
    ALPHA, DIFF, DIFF_B, DORA, DOWN, FACTORS, GLORA_DOWN, LOKR_CORE, Layer, MAGNITUDE, MID, OFT,
    ON_INPUT, PEFT_BOFT, PEFT_IA3, PEFT_OFT, RESCALE, SCALE, UP, UP_BIAS,
};
use super::orthogonal::{PeftTurns, Rotation, rotate_inputs};
use super::{Lora, Match};
use crate::weights::key_mapping::Part;
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use serde_json::Value;

impl Lora {
    /// Whether a layer of this name changes a weight of (rows, columns), with all rows or a part of
    /// its own.
    pub(super) fn fits(
        &self,
        name: &str,
        layer: &Layer,
        (rows, columns): (usize, usize),
        part: &Part,
    ) -> bool {
        let shape = |slot: &str| layer.get(slot).and_then(|key| self.source.shape(key));
        let count = |slot: &str| shape(slot).map(|shape| shape.iter().product::<usize>());
        if *part != Part::Whole {
            // what depends on the whole weight cannot be made of a part of it
            let rows = rows_in_file(part, rows);
            let of_rows = |slot: &str| count(slot).is_none_or(|count| count == rows);
            return Method::of(layer).is_some_and(Method::is_of_itself)
                && of_rows(DORA)
                && of_rows(MAGNITUDE)
                && self.size(layer) == Some((rows, columns));
        }
        match Method::of(layer) {
            Some(Method::Rotation) => {
                shape(OFT)
                    .and_then(Rotation::of)
                    .is_some_and(|rotation| rotation.rows() == rows)
                    && count(RESCALE).is_none_or(|count| count == rows)
            }
            // factors of columns are those of a convolution's inputs, so that the kernel remains
            Some(Method::Factors) => count(FACTORS)
                .is_some_and(|count| count > 0 && (count == rows || columns.is_multiple_of(count))),
            Some(Method::PeftRotation) => {
                let turns = layer.get(PEFT_OFT).or_else(|| layer.get(PEFT_BOFT));
                turns
                    .and_then(|key| PeftTurns::of(self.source.shape(key)?, columns))
                    .is_some()
                    && count(RESCALE).is_none_or(|count| count == rows)
            }
            Some(Method::PeftFactors) => {
                self.factors_of_peft(name, layer)
                    .is_ok_and(|(count, is_of_columns)| match is_of_columns {
                        true => count > 0 && columns.is_multiple_of(count),
                        false => count == rows,
                    })
            }
            Some(Method::Replacement) => columns == 1 && count(SCALE) == Some(rows),
            _ => self.size(layer) == Some((rows, columns)),
        }
    }

    /// The (rows, columns) of a layer's change; nothing if the shapes of its tensors do not match, or
    /// do not tell.
    pub(super) fn size(&self, layer: &Layer) -> Option<(usize, usize)> {
        let shape = |slot: &str| layer.get(slot).and_then(|key| self.source.shape(key));
        let matrix = |slot: &str| {
            let (rows, rest) = shape(slot)?.split_first()?;
            Some((*rows, rest.iter().product::<usize>()))
        };
        let product = |[a, b, core]: [&str; 3]| {
            let ((a_rows, a_columns), (b_rows, b_columns)) = (matrix(a)?, matrix(b)?);
            let (rows, inner) = if [MID, "bm"].contains(&core) || shape(core).is_none() {
                (a_rows, a_columns)
            } else {
                (a_columns, a_rows)
            };
            match shape(core) {
                None => (inner == b_rows && inner > 0).then_some((rows, b_columns)),
                Some([p, q, kernel @ ..]) => (inner == *p && b_rows == *q)
                    .then(|| (rows, b_columns * kernel.iter().product::<usize>())),
                Some(_) => None,
            }
        };
        match Method::of(layer)? {
            Method::LowRank => product(LOW_RANK),
            Method::Hadamard => {
                product(HADAMARD[0]).filter(|size| product(HADAMARD[1]).as_ref() == Some(size))
            }
            Method::Kronecker => {
                let factor = |(whole, product_of): (&str, [&str; 3])| {
                    matrix(whole).or_else(|| product(product_of))
                };
                let [(a, b), (c, d)] = [factor(KRONECKER[0])?, factor(KRONECKER[1])?];
                Some((a * c, b * d))
            }
            Method::Difference => matrix(DIFF),
            Method::Generalized => {
                let size = product(GENERALIZED[1])?;
                let ((inputs, inner), (rank, outputs)) = (matrix("a1")?, matrix(GLORA_DOWN)?);
                let is_square = inner == rank && inputs == outputs && inputs > 0;
                (is_square && size.1.is_multiple_of(inputs)).then_some(size)
            }
            Method::Factors
            | Method::Rotation
            | Method::PeftRotation
            | Method::PeftFactors
            | Method::Replacement => None,
        }
    }

    /// The rank of a layer, if it has one above 0.
    pub(super) fn rank(&self, layer: &Layer) -> Option<usize> {
        let slots = [DOWN, "hada_w1_b", "lokr_w2_b", "lokr_w1_b", GLORA_DOWN];
        let key = slots.iter().find_map(|slot| layer.get(slot))?;
        self.source
            .shape(key)?
            .first()
            .copied()
            .filter(|rank| *rank > 0)
    }

    /// The scale of a layer's product: alpha divided by the rank, where alpha is the rank if none is
    /// given.
    fn scale(&self, layer: &Layer, weight: &str) -> Result<f64> {
        let rank = self.rank(layer).map(|rank| rank as f64);
        if rank.is_none() && (layer.contains_key(ALPHA) || !self.peft.is_of_file()) {
            return self.scale_of_whole(layer);
        }
        if let (Some(key), Some(rank)) = (layer.get(ALPHA), rank) {
            return Ok(self.number(key)? / rank);
        }
        let layer = weight
            .strip_suffix(".weight")
            .or(weight.strip_suffix(".bias"));
        match layer.and_then(|layer| layer.split_once('.')) {
            Some((component, layer)) => self.peft.scale(component, layer, rank),
            None => Ok(1.0),
        }
    }

    /// The scale of a layer without a rank: 1, but for LoKr's whole factors that were rank-stabilised.
    /// Their alpha is the rank of the training to the power of 1.5, the scale its root; that rank is
    /// in the header alone.
    fn scale_of_whole(&self, layer: &Layer) -> Result<f64> {
        let (Some(whole), Some(key)) = (layer.get(KRONECKER[1].0), layer.get(ALPHA)) else {
            return Ok(1.0);
        };
        let number = |value: &Value| {
            value
                .as_f64()
                .or_else(|| value.as_str()?.trim().parse::<f64>().ok())
        };
        let header = |key: &str| self.source.metadata(key);
        let has_kernel = self
            .source
            .shape(whole)
            .is_some_and(|shape| shape.iter().skip(2).any(|side| *side > 1));
        let of_kernels = || {
            let arguments: Value = serde_json::from_str(header("ss_network_args")?).ok()?;
            number(arguments.get("conv_dim")?)
        };
        let rank = has_kernel
            .then(of_kernels)
            .flatten()
            .or_else(|| header("ss_network_dim")?.trim().parse().ok());
        let (Some(rank), alpha) = (rank.filter(|rank| *rank > 1.0), self.number(key)?) else {
            return Ok(1.0);
        };
        let is_stabilised = (alpha / rank.powf(1.5) - 1.0).abs() < ROUNDING;
        Ok(if is_stabilised { rank.sqrt() } else { 1.0 })
    }

    /// The first value of a tensor.
    pub(super) fn number(&self, key: &str) -> Result<f64> {
        let values = to_f32(&self.source.read(key)?)?;
        let number = values
            .first()
            .with_context(|| format!("tensor `{key}` of the LoRA `{}` is empty", self.name))?;
        Ok(f64::from(*number))
    }

    /// The change of a weight [rows, ..], element by element, and a factor of it.
    fn change(&self, name: &str, weight: &Tensor) -> Result<(Vec<f32>, f32)> {
        let Match { layer, part } = self.matched.get(name).context("no layer changes it")?;
        let layer = self.layers.get(layer).context("no layer changes it")?;
        let strength = self.strength_of(name) as f32;
        match Method::of(layer) {
            Some(Method::PeftFactors) => {
                return Ok((self.multiplied_by_peft(layer, name, weight)?, strength));
            }
            Some(Method::PeftRotation) => {
                return Ok((self.rotated_by_peft(layer, weight)?, strength));
            }
            _ => (),
        }
        if name.ends_with(".bias") {
            let of_part = |key: &str| Ok(part_of(part, to_f32(&self.source.read(key)?)?, 1));
            if let Some(key) = layer.get(DIFF_B) {
                return of_part(key).map(|change| (change, strength));
            }
            let key = layer.get(UP_BIAS).context("it has no change of a bias")?;
            let scale = self.scale(layer, name)? as f32;
            return of_part(key).map(|change| (change, strength * scale));
        }
        match Method::of(layer) {
            Some(Method::Rotation) => return Ok((self.rotated(layer, name, weight)?, 1.0)),
            Some(Method::Factors) => return Ok((self.multiplied(layer, weight)?, strength)),
            // as in diffusers, whatever the strength
            Some(Method::Replacement) => return Ok((self.replaced(layer, weight)?, 1.0)),
            _ => (),
        }
        let columns = weight.elem_count() / weight.dim(0)?.max(1);
        let (change, scale) = (
            part_of(part, self.product(layer, weight)?, columns),
            self.scale(layer, name)? as f32,
        );
        match (layer.get(MAGNITUDE), layer.get(DORA)) {
            (None, None) => Ok((change, strength * scale)),
            (magnitude, dora) => {
                let key = magnitude.or(dora).context("it has no magnitudes")?;
                let magnitudes = self.source.read(key)?;
                let of_rows = magnitude.is_some()
                    || magnitudes.dims().first() == Some(&rows_in_file(part, weight.dim(0)?));
                let magnitudes = match of_rows {
                    true => part_of(part, to_f32(&magnitudes)?, 1),
                    false => to_f32(&magnitudes)?,
                };
                // as PEFT, the strength is that of the product before it is normalized
                let scale = strength * scale;
                let change =
                    normalized(weight, change, scale, &magnitudes, of_rows).with_context(|| {
                        format!(
                            "tensor `{key}` of the LoRA `{}` does not fit `{name}`",
                            self.name
                        )
                    })?;
                Ok((change, 1.0))
            }
        }
    }

    /// What orthogonal finetuning makes of a weight [rows, ..], minus the weight. The factors of rows
    /// have no strength, as in LyCORIS.
    fn rotated(&self, layer: &Layer, name: &str, weight: &Tensor) -> Result<Vec<f32>> {
        let key = layer.get(OFT).context("it has no turns")?;
        let blocks = self.source.read(key)?;
        let rotation = Rotation::of(blocks.dims()).context("its turns have no known shape")?;
        let constraint = layer.get(ALPHA).map_or(Ok(0.0), |key| self.number(key))?;
        let weight = to_f32(weight)?;
        let columns = weight.len() / rotation.rows();
        let strength = self.strength_of(name);
        let mut turned = rotation.apply(&to_f32(&blocks)?, constraint, strength, weight.clone())?;
        if let Some(key) = layer.get(RESCALE) {
            let factors = to_f32(&self.source.read(key)?)?;
            let rows = turned.par_chunks_mut(columns.max(1)).zip(&factors);
            rows.for_each(|(row, factor)| row.iter_mut().for_each(|value| *value *= factor));
        }
        turned
            .par_iter_mut()
            .zip(&weight)
            .for_each(|(value, weight)| *value -= weight);
        Ok(turned)
    }

    /// What PEFT's OFT or BOFT makes of a weight [rows, ..], minus the weight. The strength is the
    /// share of that: PEFT has none.
    fn rotated_by_peft(&self, layer: &Layer, weight: &Tensor) -> Result<Vec<f32>> {
        let key = layer.get(PEFT_OFT).or_else(|| layer.get(PEFT_BOFT));
        let stored = self.source.read(key.context("it has no turns")?)?;
        let kernel: usize = weight.dims().iter().skip(2).product();
        ensure!(
            kernel == 1 || layer.contains_key(PEFT_BOFT),
            "PEFT trains its OFT of convolutions as no change of their weights: it adds up what it turned where kernels overlap\n\nhint: have PEFT merge it into the model by `merge_and_unload`, and draw with that"
        );
        let rows = weight.dim(0)?;
        let weight = to_f32(weight)?;
        let columns = weight.len() / rows.max(1);
        let turns =
            PeftTurns::of(stored.dims(), columns).context("its turns have no known shape")?;
        let stages = turns.matrices(&to_f32(&stored)?, &self.peft)?;
        let mut turned = rotate_inputs(&stages, columns, weight.clone());
        if let Some(key) = layer.get(RESCALE) {
            let factors = to_f32(&self.source.read(key)?)?;
            let rows = turned.par_chunks_mut(columns.max(1)).zip(&factors);
            rows.for_each(|(row, factor)| row.iter_mut().for_each(|value| *value *= factor));
        }
        let values = turned.par_iter_mut().zip(&weight);
        values.for_each(|(value, weight)| *value -= weight);
        Ok(turned)
    }

    /// How many factors PEFT's IA3 has for a layer of this name, and whether they are of columns
    /// rather than rows.
    pub(super) fn factors_of_peft(&self, name: &str, layer: &Layer) -> Result<(usize, bool)> {
        let shape = layer.get(PEFT_IA3).and_then(|key| self.source.shape(key));
        match shape.context("it has no factors")? {
            [count, 1] if *count > 1 => Ok((*count, false)),
            [1, count] => Ok((*count, true)),
            // both sides of a convolution have one shape
            [1, count, ..] => {
                let layer = name.strip_prefix("base_model.model.").unwrap_or(name);
                Ok((*count, self.peft.is_feedforward(layer)?))
            }
            _ => bail!("its factors have no known shape"),
        }
    }

    /// What PEFT's IA3 adds to a weight [rows, columns, ..] or a bias [rows]: each row, or each
    /// column, times a factor.
    fn multiplied_by_peft(&self, layer: &Layer, name: &str, weight: &Tensor) -> Result<Vec<f32>> {
        let own = self.matched.get(name).context("no layer changes it")?;
        let (_, is_of_columns) = self.factors_of_peft(&own.layer, layer)?;
        let key = layer.get(PEFT_IA3).context("it has no factors")?;
        let factors = to_f32(&self.source.read(key)?)?;
        let factors: Vec<f32> = factors.iter().map(|factor| factor - 1.0).collect();
        times(weight, &factors, is_of_columns)
    }

    /// What IA3 adds to a weight [rows, columns, ..]: each row, or each column, times a factor.
    fn multiplied(&self, layer: &Layer, weight: &Tensor) -> Result<Vec<f32>> {
        let read = |slot: &str| {
            let key = layer.get(slot).context("it has no factors")?;
            to_f32(&self.source.read(key)?)
        };
        let is_of_columns = read(ON_INPUT)?.first().is_some_and(|value| *value != 0.0);
        let factors = read(FACTORS)?;
        times(weight, &factors, is_of_columns)
    }

    /// What stands in the place of a norm's numbers, minus these.
    fn replaced(&self, layer: &Layer, weight: &Tensor) -> Result<Vec<f32>> {
        let key = layer.get(SCALE).context("it has no numbers of a norm")?;
        let mut change = to_f32(&self.source.read(key)?)?;
        for (value, before) in change.iter_mut().zip(to_f32(weight)?) {
            *value -= before;
        }
        Ok(change)
    }

    /// The product of a layer's matrices, of which GLoRA multiplies the weight [rows, columns, ..].
    fn product(&self, layer: &Layer, weight: &Tensor) -> Result<Vec<f32>> {
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
            Ok(if [MID, "bm"].contains(&core) {
                a
            } else {
                a.t()?.contiguous()?
            }
            .matmul(&inner)?)
        };
        match Method::of(layer).context("its tensors do not make a layer")? {
            Method::LowRank => to_f32(&product(LOW_RANK)?),
            Method::Hadamard => {
                let [mut first, second] = [
                    to_f32(&product(HADAMARD[0])?)?,
                    to_f32(&product(HADAMARD[1])?)?,
                ];
                first.par_iter_mut().zip(&second).for_each(|(a, b)| *a *= b);
                Ok(first)
            }
            Method::Kronecker => {
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
            Method::Difference => to_f32(&read(DIFF)?),
            Method::Generalized => {
                let [[left, right, _], added] = GENERALIZED;
                let mut sum = to_f32(&product(added)?)?;
                // every position of a kernel is a matrix of its own
                let (rows, columns) = (weight.dim(0)?, weight.dims().get(1).copied().unwrap_or(1));
                let kernels = weight.to_dtype(DType::F32)?.reshape((rows, columns, ()))?;
                let kernel = kernels.dim(2)?;
                let inputs = kernels.transpose(1, 2)?.contiguous()?;
                let inputs = inputs.reshape((rows * kernel, columns))?;
                let multiplied = inputs.matmul(&read(left)?)?.matmul(&read(right)?)?;
                let multiplied = multiplied
                    .reshape((rows, kernel, columns))?
                    .transpose(1, 2)?;
                let multiplied = to_f32(&multiplied.contiguous()?)?;
                ensure!(multiplied.len() == sum.len(), "its matrices do not fit");
                sum.par_iter_mut()
                    .zip(&multiplied)
                    .for_each(|(a, b)| *a += b);
                Ok(sum)
            }
            Method::Factors
            | Method::Rotation
            | Method::PeftRotation
            | Method::PeftFactors
            | Method::Replacement => {
                bail!("it is no product")
            }
        }
    }

    /// Reads a tensor [rows, ..] as a matrix in f32.
    fn matrix(&self, layer: &Layer, slot: &str) -> Result<Tensor> {
        let key = layer
            .get(slot)
            .with_context(|| format!("the layer has no tensor `{slot}`"))?;
        let tensor = self.source.read(key)?.to_dtype(DType::F32)?;
        let rows = tensor.dim(0)?;
        Ok(tensor.reshape((rows, ()))?)
    }
}

/// How many rows a file's layer has that changes a weight with so many by a part of its own.
pub(super) fn rows_in_file(part: &Part, rows: usize) -> usize {
    match part {
        Part::Rows { count, of, .. } => rows / count * of,
        Part::Whole | Part::Transposed | Part::SwappedHalves => rows,
    }
}

/// A part of the values [rows, columns] of a file's layer.
fn part_of(part: &Part, mut values: Vec<f32>, columns: usize) -> Vec<f32> {
    match part {
        Part::Rows { index, count, of } => {
            let block = values.len() / columns.max(1) / (*of).max(1) * columns;
            values.drain(..(index * block).min(values.len()));
            values.truncate(count * block);
        }
        Part::SwappedHalves => {
            let half = values.len() / 2;
            values.rotate_left(half);
        }
        Part::Whole | Part::Transposed => {}
    }
    values
}

/// A weight [rows, columns, ..] times a factor for each row, or for each column.
fn times(weight: &Tensor, factors: &[f32], is_of_columns: bool) -> Result<Vec<f32>> {
    let (rows, columns) = (weight.dim(0)?, weight.dims().get(1).copied().unwrap_or(1));
    let expected = if is_of_columns { columns } else { rows };
    ensure!(
        factors.len() == expected,
        "it has {} factors instead of {expected}",
        factors.len()
    );
    let mut change = to_f32(weight)?;
    let row = (change.len() / rows.max(1)).max(1);
    let kernel = (row / columns.max(1)).max(1);
    change
        .par_chunks_mut(row)
        .enumerate()
        .for_each(|(at, values)| {
            for (column, values) in values.chunks_mut(kernel).enumerate() {
                let factor = factors.get(if is_of_columns { column } else { at });
                let factor = factor.copied().unwrap_or(0.0);
                values.iter_mut().for_each(|value| *value *= factor);
            }
        });
    Ok(change)
}

/// How a layer's change is computed from its tensors.
#[derive(Clone, Copy)]
pub(super) enum Method {
    /// up times down
    LowRank,
    /// two such products, element by element
    Hadamard,
    /// the Kronecker product of two matrices, which may be products
    Kronecker,
    /// the change itself
    Difference,
    /// a low-rank product, and the weight times another
    Generalized,
    /// a factor for each row or column
    Factors,
    /// rows are turned
    Rotation,
    /// columns are turned, as PEFT does
    PeftRotation,
    /// a factor for each row or column in place of 1, as PEFT has it
    PeftFactors,
    /// a norm's numbers themselves
    Replacement,
}

/// The share by which a stored alpha may be off its value: that of bf16.
const ROUNDING: f64 = 1e-2;
/// The slots of GLoRA's products: of the weight, and of what is added.
const GENERALIZED: [[&str; 3]; 2] = [["a1", GLORA_DOWN, "no core"], ["b1", "b2", "bm"]];

/// The slots (left, right, core) of LoRA's product.
const LOW_RANK: [&str; 3] = [UP, DOWN, MID];
/// The slots of LoHa's two products.
const HADAMARD: [[&str; 3]; 2] = [
    ["hada_w1_a", "hada_w1_b", "hada_t1"],
    ["hada_w2_a", "hada_w2_b", "hada_t2"],
];
/// The slots of LoKr's two factors: one matrix, or a product.
const KRONECKER: [(&str, [&str; 3]); 2] = [
    ("lokr_w1", ["lokr_w1_a", "lokr_w1_b", "no core"]),
    ("lokr_w2", ["lokr_w2_a", "lokr_w2_b", LOKR_CORE]),
];

impl Method {
    /// Whether its change follows from the layer's tensors alone, not from the weight.
    fn is_of_itself(self) -> bool {
        matches!(
            self,
            Self::LowRank | Self::Hadamard | Self::Kronecker | Self::Difference
        )
    }

    pub(super) fn of(layer: &Layer) -> Option<Self> {
        let has = |slot: &str| layer.contains_key(slot);
        let has_product = |[a, b, _]: &[&str; 3]| has(a) && has(b);
        if has(UP) && has(DOWN) {
            Some(Self::LowRank)
        } else if HADAMARD.iter().all(has_product) {
            Some(Self::Hadamard)
        } else if KRONECKER
            .iter()
            .all(|(whole, factors)| has(whole) || has_product(factors))
        {
            Some(Self::Kronecker)
        } else if GENERALIZED.iter().all(has_product) {
            Some(Self::Generalized)
        } else if has(OFT) {
            Some(Self::Rotation)
        } else if has(PEFT_OFT) || has(PEFT_BOFT) {
            Some(Self::PeftRotation)
        } else if has(PEFT_IA3) {
            Some(Self::PeftFactors)
        } else if has(FACTORS) && has(ON_INPUT) {
            Some(Self::Factors)
        } else if has(SCALE) {
            Some(Self::Replacement)
        } else {
            has(DIFF).then_some(Self::Difference)
        }
    }
}

/// Applies the LoRAs that change a weight to it, in its own type.
pub fn patch(loras: &[Lora], name: &str, weight: Tensor) -> Result<Tensor> {
    let mut sum: Option<Vec<f32>> = None;
    for lora in loras.iter().filter(|lora| lora.changes(name)) {
        let (change, factor) = lora
            .change(name, &weight)
            .with_context(|| format!("the LoRA `{}` cannot be applied to `{name}`", lora.name))?;
        let sum = match &mut sum {
            Some(sum) => sum,
            none => none.insert(to_f32(&weight)?),
        };
        sum.par_iter_mut()
            .zip(&change)
            .for_each(|(sum, change)| *sum += factor * change);
    }
    match sum {
        Some(sum) => from_f32(sum, &weight),
        None => Ok(weight),
    }
}

/// The change that DoRA makes to a weight [rows, columns, ..]: the sum of the weight and `scale`
/// times `change` is normalized to the magnitudes, row by row or column by column, and the weight is
/// subtracted again.
fn normalized(
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
        bail!(
            "it has {} magnitudes instead of {lengths}",
            magnitudes.len()
        );
    }
    let weight = to_f32(weight)?;
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

/// The Kronecker product of [a, b] and [c, d]: [a * c, b * d], row by row.
fn kronecker(left: &Tensor, right: &Tensor) -> Result<Vec<f32>> {
    let ((a, b), (c, d)) = (left.dims2()?, right.dims2()?);
    let (left, right) = (to_f32(left)?, to_f32(right)?);
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

/// The values of a tensor, in f32.
fn to_f32(tensor: &Tensor) -> Result<Vec<f32>> {
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

/// A tensor of these values, in the shape and type of another.
fn from_f32(numbers: Vec<f32>, like: &Tensor) -> Result<Tensor> {
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
