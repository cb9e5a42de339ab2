//! Rotary position embeddings (Su et al. 2021, arXiv 2104.09864): queries and keys are turned by
//! angles that grow with their position.

use super::Forward;
use candle_core::{DType, Device, Result, Tensor};

/// Which numbers of a head are turned together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// 2i and 2i + 1
    Adjacent,
    /// i and i + d/2
    Halves,
}

/// The cosines and sines of the angles of n positions, for heads of width d.
#[derive(Clone)]
pub struct Rotary {
    /// [n, d/2], in f32
    cos: Tensor,
    sin: Tensor,
    pairs: Pairs,
}

impl Rotary {
    /// The angles [n][d/2] of all positions, in order.
    pub fn new(angles: &[Vec<f64>], pairs: Pairs, device: &Device) -> Result<Self> {
        let table = |of: fn(f64) -> f64| {
            let values = angles.iter().flatten().map(|angle| of(*angle) as f32);
            let width = angles.first().map_or(0, Vec::len);
            Tensor::from_vec(values.collect::<Vec<_>>(), (angles.len(), width), device)
        };
        Ok(Self {
            cos: table(f64::cos)?,
            sin: table(f64::sin)?,
            pairs,
        })
    }

    /// Turns the heads of x [b, n, heads*d], in f32; the result has the type of x.
    pub fn turn(&self, cx: Forward, x: &Tensor, heads: usize) -> Result<Tensor> {
        cx.timed("rotary", [x.elem_count(), 0, 0], || {
            let (b, n, width) = x.dims3()?;
            // the heads of a token stand side by side and have one position
            let repeated = |table: &Tensor| {
                let (positions, half) = table.dims2()?;
                let table = table.unsqueeze(1)?.broadcast_as((positions, heads, half))?;
                table.reshape((positions * heads, half))
            };
            let (cos, sin) = (repeated(&self.cos)?, repeated(&self.sin)?);
            let rows = x
                .to_dtype(DType::F32)?
                .reshape((b, 1, n * heads, width / heads))?
                .contiguous()?;
            let turned = match self.pairs {
                Pairs::Adjacent => candle_nn::rotary_emb::rope_i(&rows, &cos, &sin)?,
                Pairs::Halves => candle_nn::rotary_emb::rope(&rows, &cos, &sin)?,
            };
            turned.reshape((b, n, width))?.to_dtype(x.dtype())
        })
    }
}

/// The frequencies of one axis of `width` numbers: theta^(-2i/width), i below width/2.
pub fn frequencies(theta: f64, width: usize) -> impl Iterator<Item = f64> {
    (0..width / 2).map(move |i| theta.powf(-(2.0 * i as f64) / width as f64))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn pairs_of_every_head_are_turned_by_the_angle_of_their_token() {
        let x: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let x = Tensor::from_vec(x, (1, 2, 8), &Device::Cpu).unwrap();
        let angles = [vec![0.5, -1.0], vec![2.0, 0.0]];
        for (pairs, partner) in [(Pairs::Adjacent, 1), (Pairs::Halves, 2)] {
            let rotary = Rotary::new(&angles, pairs, &Device::Cpu).unwrap();
            let turned = rotary.turn(Forward::on(&Device::Cpu), &x, 2).unwrap();
            let turned = turned.to_vec3::<f32>().unwrap();
            for (token, angles) in angles.iter().enumerate() {
                for head in 0..2 {
                    for (i, angle) in angles.iter().enumerate() {
                        let first = if partner == 1 { 2 * i } else { i };
                        let at = |k: usize| (token * 8 + head * 4 + k) as f64;
                        let (a, b) = (at(first), at(first + partner));
                        let expected = [
                            a * angle.cos() - b * angle.sin(),
                            b * angle.cos() + a * angle.sin(),
                        ];
                        for (k, expected) in [first, first + partner].into_iter().zip(expected) {
                            let got = f64::from(turned[0][token][head * 4 + k]);
                            assert!(
                                (got - expected).abs() < 1e-5,
                                "{pairs:?} {token} {head} {k}"
                            );
                        }
                    }
                }
            }
        }
    }
}
