//! Orthogonal finetuning (Qiu et al. 2023, arXiv 2306.07280) as LyCORIS has it: rows of a weight are
//! turned in blocks (diag-OFT), or in several stages of blocks (BOFT, Liu et al. 2023, arXiv
//! 2311.06243).

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
