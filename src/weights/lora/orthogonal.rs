//! Orthogonal finetuning (Qiu et al. 2023, arXiv 2306.07280) as LyCORIS has it: rows of a weight are
//! turned in blocks (diag-OFT), or in several stages of blocks (BOFT, Liu et al. 2023, arXiv
//! 2311.06243); and as PEFT has it: columns are turned.

use super::peft::PeftConfig;
use anyhow::{Context, Result, ensure};
use rayon::prelude::*;

/// The turns of a layer.
pub struct Rotation {
    /// blocks of a stage
    blocks: usize,
    /// rows of a block
    size: usize,
    is_butterfly: bool,
}

impl Rotation {
    /// Reads the shape of `oft_blocks`: [blocks, size, size], or [stages, blocks, size, size].
    /// Nothing if that is none of these.
    pub fn of(shape: &[usize]) -> Option<Self> {
        let (stages, blocks, size, is_butterfly) = match *shape {
            [blocks, size, columns] if size == columns => (1, blocks, size, false),
            [stages, blocks, size, columns] if size == columns && size % 2 == 0 => {
                (stages, blocks, size, true)
            }
            _ => return None,
        };
        let rotation = Self {
            blocks,
            size,
            is_butterfly,
        };
        // the rows that the last stage brings together must divide all rows
        let reach = size.checked_shl(stages.saturating_sub(1).try_into().ok()?)?;
        let is_whole = size > 0 && stages > 0 && stages < 32;
        let rows = blocks.checked_mul(size)?;
        (is_whole && rows > 0 && (!is_butterfly || rows.is_multiple_of(reach))).then_some(rotation)
    }

    /// Rows of the weight.
    pub fn rows(&self) -> usize {
        self.blocks * self.size
    }

    /// Turns a weight of [rows, columns] by a share of `strength`, of the turns of `oft_blocks`;
    /// `constraint` above 0 is the largest norm of these, in units of the number of rows.
    pub fn apply(
        &self,
        oft_blocks: &[f32],
        constraint: f64,
        strength: f64,
        mut weight: Vec<f32>,
    ) -> Result<Vec<f32>> {
        let area = self.size * self.size;
        let columns = weight.len() / self.rows();
        let limit = constraint * self.rows() as f64;
        let turns = rotations(oft_blocks, self.size, limit)?;
        for (stage, turns) in turns.chunks_exact(area * self.blocks).enumerate() {
            // stage i of the butterfly brings rows together that are 2^i half blocks apart
            let half = (self.size / 2).max(1) << stage;
            let place = |row: usize| {
                if !self.is_butterfly {
                    return row;
                }
                let (group, within) = (row / (2 * half), row % (2 * half));
                group * 2 * half + within % 2 * half + within / 2
            };
            let mut turned = vec![0f32; weight.len()];
            let rows: Vec<(usize, Vec<f32>)> = (0..self.rows())
                .into_par_iter()
                .map(|row| {
                    let (block, own) = (row / self.size, row % self.size);
                    let turn = turns.get(block * area..).unwrap_or_default();
                    let mut sum = vec![0f32; columns];
                    for other in 0..self.size {
                        // R of the butterfly, its transpose in blocks
                        let at = if self.is_butterfly {
                            own * self.size + other
                        } else {
                            other * self.size + own
                        };
                        let identity = f64::from(u8::from(own == other));
                        let factor = turn.get(at).copied().unwrap_or(identity);
                        let factor = (strength * (factor - identity) + identity) as f32;
                        let from = place(block * self.size + other) * columns;
                        let values = weight.get(from..from + columns).unwrap_or_default();
                        sum.iter_mut()
                            .zip(values)
                            .for_each(|(sum, value)| *sum += factor * value);
                    }
                    (place(row), sum)
                })
                .collect();
            for (row, values) in rows {
                if let Some(out) = turned.get_mut(row * columns..(row + 1) * columns) {
                    out.copy_from_slice(&values);
                }
            }
            weight = turned;
        }
        Ok(weight)
    }
}

/// Cayley's transform (I + Q) (I - Q)^-1 of each block [size, size], where Q is the block minus its
/// transpose, scaled down where the norm of all is above the limit, if that is above 0.
fn rotations(blocks: &[f32], size: usize, limit: f64) -> Result<Vec<f64>> {
    let mut skew: Vec<f64> = blocks
        .chunks_exact(size * size)
        .flat_map(|block| {
            let at = |row: usize, column: usize| {
                f64::from(block.get(row * size + column).copied().unwrap_or(0.0))
            };
            (0..size * size)
                .map(|i| at(i / size, i % size) - at(i % size, i / size))
                .collect::<Vec<_>>()
        })
        .collect();
    let norm = skew.iter().map(|value| value * value).sum::<f64>().sqrt() + 1e-8;
    ensure!(norm.is_finite(), "its turns are not finite");
    if limit > 0.0 && norm > limit {
        skew.iter_mut().for_each(|value| *value *= limit / norm);
    }
    let turned: Vec<Vec<f64>> = skew
        .par_chunks_exact(size * size)
        .map(|q| cayley(q, size))
        .collect::<Result<_>>()?;
    Ok(turned.concat())
}

/// (I + Q) (I - Q)^-1 of a skew-symmetric Q, by Gauss' elimination: both factors commute, so that it
/// solves (I - Q) X = I + Q.
fn cayley(q: &[f64], size: usize) -> Result<Vec<f64>> {
    let identity = |i: usize| f64::from(u8::from(i / size == i % size));
    let part = |sign: f64| -> Vec<Vec<f64>> {
        let all: Vec<f64> = (0..).zip(q).map(|(i, q)| identity(i) + sign * q).collect();
        all.chunks_exact(size).map(<[f64]>::to_vec).collect()
    };
    let (mut left, mut right) = (part(-1.0), part(1.0));
    for column in 0..size {
        let largest =
            |a: &usize, b: &usize| left[*a][column].abs().total_cmp(&left[*b][column].abs());
        let pivot = (column..size).max_by(largest).context("an empty block")?;
        left.swap(column, pivot);
        right.swap(column, pivot);
        let (own_left, own_right) = (left[column].clone(), right[column].clone());
        for row in (0..size).filter(|row| *row != column) {
            let factor = left[row][column] / own_left[column];
            for (to, from) in [(&mut left[row], &own_left), (&mut right[row], &own_right)] {
                to.iter_mut()
                    .zip(from)
                    .for_each(|(to, from)| *to -= factor * from);
            }
        }
    }
    let solved = right.iter().enumerate().flat_map(|(row, values)| {
        values
            .iter()
            .map(|v| v / left[row][row])
            .collect::<Vec<_>>()
    });
    Ok(solved.collect())
}

/// The shape of PEFT's turns of a layer.
pub struct PeftTurns {
    stages: usize,
    /// blocks of a stage that are stored; a single one may stand for all
    blocks: usize,
    /// columns of a block
    size: usize,
    is_butterfly: bool,
}

/// One stage of turns: it turns blocks of columns, in the order that `places` has.
pub struct InputStage {
    size: usize,
    /// a matrix [size, size] for each block, or one for all
    matrices: Vec<f64>,
    places: Vec<usize>,
}

impl PeftTurns {
    /// Reads the shape of `oft_R` [blocks, size * (size - 1) / 2] or `boft_R` [stages, blocks, size,
    /// size]. Nothing if that is neither, or does not divide the columns.
    pub fn of(shape: &[usize], columns: usize) -> Option<Self> {
        let (stages, blocks, size, is_butterfly) = match *shape {
            [blocks, upper] => {
                let size = (1.0 + (1.0 + 8.0 * upper as f64).sqrt()) / 2.0;
                (1, blocks, size.round() as usize, false)
            }
            [stages, blocks, size, width] if size == width => (stages, blocks, size, true),
            _ => return None,
        };
        if let [_, upper] = *shape
            && size.checked_mul(size.checked_sub(1)?)? / 2 != upper
        {
            return None;
        }
        let is_whole = blocks.checked_mul(size)? == columns && size > 0;
        let is_shared = !is_butterfly && blocks == 1 && size > 0 && columns.is_multiple_of(size);
        // stage i of the butterfly brings 2^i pairs of half blocks together
        let reach = size.checked_shl(stages.saturating_sub(1).try_into().ok()?)?;
        let has_pairs = stages == 1
            || size.is_multiple_of(2) && stages < 32 && reach > 0 && columns.is_multiple_of(reach);
        (columns > 0 && stages > 0 && has_pairs && (is_whole || is_shared)).then_some(Self {
            stages,
            blocks,
            size,
            is_butterfly,
        })
    }

    /// The stages of turns of these stored values.
    pub fn matrices(&self, stored: &[f32], config: &PeftConfig) -> Result<Vec<InputStage>> {
        let size = self.size;
        let skew = if self.is_butterfly {
            halved_skew(stored, size)
        } else {
            self.skew_of_upper(stored, config)
        };
        let norm: f64 = skew.iter().map(|value| value * value).sum();
        ensure!(norm.is_finite(), "its turns are not finite");
        // its series is Cayley's transform of Q, its exact one that of -Q
        let is_series = !self.is_butterfly && config.is_on("use_cayley_neumann");
        let terms = config.number("num_cayley_neumann_terms").unwrap_or(5.0) as usize;
        let of_block = |q: &[f64]| {
            if is_series {
                Ok(series(q, size, terms))
            } else {
                cayley(&q.iter().map(|value| -value).collect::<Vec<_>>(), size)
            }
        };
        let matrices = skew
            .par_chunks_exact((size * size).max(1))
            .map(of_block)
            .collect::<Result<Vec<_>>>()?
            .concat();
        let stage = matrices.len() / self.stages;
        let stages = matrices.chunks_exact(stage.max(1)).enumerate();
        let places = |stage: usize| match self.stages {
            1 => vec![],
            _ => butterfly(self.blocks * size, size << stage, (size / 2).max(1)),
        };
        Ok(stages
            .map(|(stage, matrices)| InputStage {
                size,
                matrices: matrices.into(),
                places: places(stage),
            })
            .collect())
    }

    /// Skew-symmetric matrices of their upper triangles; with `coft` the norm of each is at most
    /// `eps` divided by the root of their number.
    fn skew_of_upper(&self, stored: &[f32], config: &PeftConfig) -> Vec<f64> {
        let size = self.size;
        let limit = config.number("eps").unwrap_or(6e-5) / (self.blocks as f64).sqrt();
        let of_block = |upper: &[f32]| {
            let mut q = vec![0f64; size * size];
            let mut values = upper.iter().map(|value| f64::from(*value));
            for row in 0..size {
                for column in row + 1..size {
                    let value = values.next().unwrap_or(0.0);
                    q[row * size + column] = value;
                    q[column * size + row] = -value;
                }
            }
            let norm = q.iter().map(|value| value * value).sum::<f64>().sqrt();
            if config.is_on("coft") && norm > limit {
                q.iter_mut().for_each(|value| *value *= limit / norm);
            }
            q
        };
        let blocks = stored.chunks_exact((size * (size - 1) / 2).max(1));
        blocks.flat_map(of_block).collect()
    }
}

/// Half of each block [size, size] minus its transpose.
fn halved_skew(stored: &[f32], size: usize) -> Vec<f64> {
    let blocks = stored.chunks_exact((size * size).max(1));
    let of_block = |block: &[f32]| -> Vec<f64> {
        let at = |row: usize, column: usize| f64::from(block[row * size + column]);
        (0..size * size)
            .map(|i| 0.5 * (at(i / size, i % size) - at(i % size, i / size)))
            .collect()
    };
    blocks.flat_map(of_block).collect()
}

/// PEFT's series for Cayley's transform of Q [size, size]: I + 2Q + 2Q^2 + .. + Q^(terms - 1).
fn series(q: &[f64], size: usize, terms: usize) -> Vec<f64> {
    // more terms change nothing that f32 can hold, but where the series does not converge
    const MOST_TERMS: usize = 64;
    let terms = terms.min(MOST_TERMS);
    let times_q = |power: &[f64]| -> Vec<f64> {
        (0..size * size)
            .map(|i| {
                let (row, column) = (i / size, i % size);
                (0..size)
                    .map(|k| power[row * size + k] * q[k * size + column])
                    .sum()
            })
            .collect()
    };
    let mut sum: Vec<f64> = (0..size * size)
        .map(|i| f64::from(u8::from(i / size == i % size)))
        .collect();
    let mut add = |power: &[f64], factor: f64| {
        let values = sum.iter_mut().zip(power);
        values.for_each(|(sum, value)| *sum += factor * value);
    };
    let mut power = q.to_vec();
    match terms {
        0 | 1 => (),
        2 => add(&power, 2.0),
        _ => {
            add(&power, 2.0);
            power = times_q(&power);
            add(&power, 2.0);
            for _ in 3..terms - 1 {
                power = times_q(&power);
                add(&power, 2.0);
            }
            add(&times_q(&power), 1.0);
        }
    }
    sum
}

/// The order of columns in which PEFT turns them in a stage of its butterfly: in each group, runs of
/// half a block with even numbers come before those with odd ones.
fn butterfly(columns: usize, group: usize, half: usize) -> Vec<usize> {
    let runs = group / half;
    let order: Vec<usize> = (0..runs).step_by(2).chain((1..runs).step_by(2)).collect();
    (0..columns)
        .map(|i| {
            let (start, within) = (i / group * group, i % group);
            let run = order.get(within / half).copied().unwrap_or(0);
            start + run * half + within % half
        })
        .collect()
}

/// Turns the columns of a weight of [rows, columns]: W R^T for each stage's R.
pub fn rotate_inputs(stages: &[InputStage], columns: usize, mut weight: Vec<f32>) -> Vec<f32> {
    weight.par_chunks_mut(columns.max(1)).for_each(|row| {
        for stage in stages {
            // R = P B P^T, where (P v)[i] = v[places[i]]
            let place = |i: usize| stage.places.get(i).copied().unwrap_or(i);
            let mut ordered = vec![0f64; row.len()];
            for (i, value) in row.iter().enumerate() {
                if let Some(to) = ordered.get_mut(place(i)) {
                    *to = f64::from(*value);
                }
            }
            let area = stage.size * stage.size;
            let mut matrices = stage.matrices.chunks_exact(area.max(1)).cycle();
            let turned: Vec<f64> = ordered
                .chunks(stage.size)
                .flat_map(|block| {
                    let matrix = matrices.next().unwrap_or_default();
                    let lines = matrix.chunks_exact(stage.size);
                    let dot = |line: &[f64]| line.iter().zip(block).map(|(a, b)| a * b).sum();
                    lines.map(dot).collect::<Vec<f64>>()
                })
                .collect();
            for (i, value) in row.iter_mut().enumerate() {
                *value = turned.get(place(i)).copied().unwrap_or(0.0) as f32;
            }
        }
    });
    weight
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_two_turns_by_the_angle_whose_half_has_the_tangent_q() {
        // Q = [[0, t], [-t, 0]] is the rotation by 2 atan t; diag-OFT applies its transpose
        let t = 0.5f64;
        let (sin, cos) = (2.0 * t.atan()).sin_cos();
        let rotation = Rotation::of(&[1, 2, 2]).unwrap();
        let blocks = [0.0, t as f32, 0.0, 0.0];
        let turned = rotation
            .apply(&blocks, 0.0, 1.0, vec![1.0, 0.0, 0.0, 1.0])
            .unwrap();
        for (own, exact) in turned.iter().zip([cos, -sin, sin, cos]) {
            assert!((f64::from(*own) - exact).abs() < 1e-6, "{turned:?}");
        }
        // half of it lies half way on the straight line to the identity
        let half = rotation
            .apply(&blocks, 0.0, 0.5, vec![1.0, 0.0, 0.0, 1.0])
            .unwrap();
        assert!((f64::from(half[0]) - (1.0 + cos) / 2.0).abs() < 1e-6);
        // a norm of t * sqrt 2 is brought down to 0.1 for each of two rows
        let small = rotation
            .apply(&blocks, 0.1, 1.0, vec![1.0, 0.0, 0.0, 1.0])
            .unwrap();
        let angle = 2.0 * (0.2 / 2f64.sqrt()).atan();
        assert!((f64::from(small[0]) - angle.cos()).abs() < 1e-6);
    }

    #[test]
    fn stages_of_a_butterfly_bring_rows_together_that_are_further_and_further_apart() {
        // four rows, blocks of two: first neighbours, then rows 0 and 2, 1 and 3
        let rotation = Rotation::of(&[2, 2, 2, 2]).unwrap();
        let t = 1.0f32; // by 90 degrees
        let turn = [0.0, t, 0.0, 0.0];
        let none = [0.0; 4];
        let apply = |blocks: [[f32; 4]; 4]| {
            rotation
                .apply(&blocks.concat(), 0.0, 1.0, vec![1.0, 2.0, 3.0, 4.0])
                .unwrap()
                .iter()
                .map(|value| value.round())
                .collect::<Vec<_>>()
        };
        assert_eq!(apply([turn, none, none, none]), [2.0, -1.0, 3.0, 4.0]);
        assert_eq!(apply([none, none, turn, none]), [3.0, 2.0, -1.0, 4.0]);
        assert_eq!(apply([none, none, none, turn]), [1.0, 4.0, 3.0, -2.0]);
    }
}
