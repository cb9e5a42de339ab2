//! Pictures in strips of rows, for activations that are too large to be held twice.
//!
//! What a strip was normalised into is still in a cache when the convolution reads it, and a
//! strip's memory is free as soon as the one below it was read. On devices without kernels there is
//! one strip.

use super::gpu::{Engine, engine};
use super::layers::{Activation, Conv2d, Normal};
use candle_core::{Result, Tensor};
use std::collections::VecDeque;

/// Numbers of a strip of one picture, about.
const STRIP: usize = 1 << 22;
/// The same on a GPU, where a strip has to keep all multiprocessors busy.
const GPU_STRIP: usize = 1 << 24;
/// Rows of a strip are a multiple of it: those of Winograd's tiles.
const ROWS: usize = 4;

/// A picture [b, h, w, c] in strips, from top to bottom.
#[derive(Default)]
pub struct Strips(VecDeque<Tensor>);

impl Strips {
    /// Adds [b, rows, w, c] at the bottom, cut into strips.
    pub fn push(&mut self, x: &Tensor) -> Result<()> {
        let (_, h, w, c) = x.dims4()?;
        let numbers = match engine(x.device()) {
            Engine::Cpu => STRIP,
            Engine::Gpu => GPU_STRIP,
            Engine::Plain => return self.push_cut(x, h),
        };
        // whatever the batch: sums over a picture are sums of its strips' sums
        self.push_cut(x, (numbers / (w * c).max(1) / ROWS).max(1) * ROWS)
    }

    fn push_cut(&mut self, x: &Tensor, rows: usize) -> Result<()> {
        let h = x.dim(1)?;
        for top in (0..h).step_by(rows) {
            self.0
                .push_back(x.narrow(1, top, rows.min(h - top))?.contiguous()?);
        }
        Ok(())
    }

    /// The strips, from top to bottom.
    pub fn parts(&self) -> Vec<&Tensor> {
        self.0.iter().collect()
    }

    /// The whole picture [b, h, w, c].
    pub fn whole(self) -> Result<Tensor> {
        match self.0.as_slices() {
            ([one], []) => Ok(one.clone()),
            _ => Tensor::cat(&self.parts(), 1)?.contiguous(),
        }
    }

    /// The strips from top to bottom, each with the rows next to it as `conv` sees them. A strip is
    /// dropped when the one below it was taken.
    pub fn windows(self, conv: &Conv2d) -> Result<Windows> {
        let (mut above, mut end) = (None, None);
        // of a single one the convolution finds the other end itself
        if let (true, [first, .., last]) = (conv.wraps_rows(), &*self.parts()) {
            above = Some(last.narrow(1, last.dim(1)? - 1, 1)?.force_contiguous()?);
            end = Some(first.narrow(1, 0, 1)?.force_contiguous()?);
        }
        Ok(Windows {
            above,
            strips: self.0,
            end,
        })
    }
}

impl IntoIterator for Strips {
    type Item = Tensor;
    type IntoIter = std::collections::vec_deque::IntoIter<Tensor>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl TryFrom<Tensor> for Strips {
    type Error = candle_core::Error;

    fn try_from(x: Tensor) -> Result<Self> {
        let mut strips = Self::default();
        strips.push(&x)?;
        Ok(strips)
    }
}

/// See [`Strips::windows`].
pub struct Windows {
    above: Option<Tensor>,
    strips: VecDeque<Tensor>,
    /// below the last one
    end: Option<Tensor>,
}

impl Iterator for Windows {
    type Item = Result<Window>;

    fn next(&mut self) -> Option<Self::Item> {
        let strip = self.strips.pop_front()?;
        let window = || {
            let below = self
                .strips
                .front()
                .map(|next| next.narrow(1, 0, 1)?.contiguous())
                .transpose()?
                .or_else(|| self.end.take());
            let above = match below {
                // a copy, as a view would keep the whole strip
                Some(_) => self
                    .above
                    .replace(strip.narrow(1, strip.dim(1)? - 1, 1)?.force_contiguous()?),
                None => self.above.take(),
            };
            Ok(Window {
                above,
                strip,
                below,
            })
        };
        Some(window())
    }
}

/// A strip, and what a 3x3 convolution sees besides.
pub struct Window {
    /// [b, 1, w, c]; none at the top, unless it goes on at the bottom
    above: Option<Tensor>,
    /// [b, rows, w, c]
    pub strip: Tensor,
    /// [b, 1, w, c]; none at the bottom, unless it goes on at the top
    below: Option<Tensor>,
}

impl Window {
    /// The strip's part of a convolution that keeps the size, of the picture normalised and
    /// activated, plus `residual` [b, rows, w, out] -> [b, rows, w, out].
    pub fn convolve_normal(
        &self,
        normal: &Normal,
        activation: Activation,
        conv: &Conv2d,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let x = normal.forward_act(
            &self.strip,
            self.above.as_ref(),
            self.below.as_ref(),
            activation,
        )?;
        let first = usize::from(self.above.is_some());
        conv.forward_rows(&x, first..first + self.strip.dim(1)?, residual)
    }

    /// The strip's part of a 3x3 convolution of every second pixel that sees more only below and
    /// right of the picture [b, rows/2, w/2, out]; of an even number of rows.
    pub fn convolve_halved(&self, conv: &Conv2d) -> Result<Tensor> {
        match &self.below {
            Some(below) => conv.forward(&Tensor::cat(&[&self.strip, below], 1)?),
            None => conv.forward(&self.strip),
        }
    }

    /// The strip's part of a convolution that keeps the size, of the picture scaled to twice its
    /// size -> [b, 2*rows, 2*w, out].
    pub fn convolve_doubled(&self, conv: &Conv2d) -> Result<Tensor> {
        let parts: Vec<&Tensor> = self
            .above
            .iter()
            .chain([&self.strip])
            .chain(&self.below)
            .collect();
        let x = Tensor::cat(&parts, 1)?;
        let first = 2 * usize::from(self.above.is_some());
        conv.forward_rows_doubled(&x, first..first + 2 * self.strip.dim(1)?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::nn::layers::GroupNorm;
    use crate::nn::padding::Tile;
    use crate::weights::Weights;
    use candle_core::{DType, Device};

    fn cut(x: &Tensor, rows: usize) -> Strips {
        let mut strips = Strips::default();
        strips.push_cut(x, rows).unwrap();
        strips
    }

    /// The largest difference; NaN where there is one.
    fn worst(a: &Tensor, b: &Tensor) -> f32 {
        assert_eq!(a.dims(), b.dims());
        let off = (a - b)
            .unwrap()
            .abs()
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        off.into_iter().max_by(f32::total_cmp).unwrap()
    }

    #[test]
    fn layers_give_the_same_for_strips_as_for_the_whole_picture() {
        compare(
            &[
                (1, 1),
                (4, 5),
                (5, 4),
                (9, 17),
                (33, 20),
                (65, 67),
                (70, 18),
            ],
            &[1, 4, 8, 100],
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn layers_of_a_gpu_give_the_same_for_strips_as_for_the_whole_picture() {
        if crate::nn::gpu::emulated::is_there() {
            crate::nn::gpu::emulated::on(|| compare(&[(4, 5), (9, 6)], &[4, 100]));
        }
    }

    fn compare(sizes: &[(usize, usize)], strips: &[usize]) {
        let weights = Weights::random(&Device::Cpu, DType::F32);
        let sizes = sizes.iter().copied().zip([1, 2, 3].into_iter().cycle());
        for (((h, w), b), tile) in
            sizes.flat_map(|size| [None, Some(Tile::X), Some(Tile::Y)].map(|tile| (size, tile)))
        {
            weights.wrap().set(tile);
            let (norm, conv) = (
                GroupNorm::new(&weights, 5, 35, 1e-6).unwrap(),
                Conv2d::new(&weights, 35, 19, 3).unwrap(),
            );
            let x = (Tensor::randn(0f32, 1.0, (b, h, w, 35), &Device::Cpu).unwrap() + 2.0).unwrap();
            let halving = Conv2d::strided(&weights, 35, 19, 3, 2, (0, 1)).unwrap();
            let residual = Tensor::randn(0f32, 1.0, (b, h, w, 19), &Device::Cpu).unwrap();
            let whole = conv
                .forward_add(
                    &norm.forward_act(&x, Activation::Silu).unwrap(),
                    None,
                    Some(&residual),
                )
                .unwrap();
            let doubled = conv.forward_scaled(&x, 2 * h, 2 * w).unwrap();
            for &rows in strips {
                let normal = norm.of(&cut(&x, rows).parts()).unwrap();
                let (mut strips, mut doubled_strips) = (Strips::default(), Strips::default());
                for (window, residual) in cut(&x, rows)
                    .windows(&conv)
                    .unwrap()
                    .zip(cut(&residual, rows))
                {
                    let window = window.unwrap();
                    strips
                        .push(
                            &window
                                .convolve_normal(&normal, Activation::Silu, &conv, Some(&residual))
                                .unwrap(),
                        )
                        .unwrap();
                    doubled_strips
                        .push(&window.convolve_doubled(&conv).unwrap())
                        .unwrap();
                }
                assert!(
                    worst(&strips.whole().unwrap(), &whole) < 1e-4,
                    "{h}x{w} in strips of {rows}, {tile:?}"
                );
                if rows.is_multiple_of(2) && h.is_multiple_of(2) {
                    let mut halved = Strips::default();
                    for window in cut(&x, rows).windows(&halving).unwrap() {
                        halved
                            .push(&window.unwrap().convolve_halved(&halving).unwrap())
                            .unwrap();
                    }
                    let whole = halving.forward(&x).unwrap();
                    assert!(
                        worst(&halved.whole().unwrap(), &whole) < 1e-4,
                        "{h}x{w} in strips of {rows}, {tile:?}, halved"
                    );
                }
                assert!(
                    worst(&doubled_strips.whole().unwrap(), &doubled) < 1e-4,
                    "{h}x{w} in strips of {rows}, {tile:?}, doubled"
                );
            }
        }
    }

    #[test]
    fn a_large_picture_is_cut_alike_in_any_batch() {
        let heights = |b: usize| {
            let x = Tensor::zeros((b, 70, 1024, 128), DType::F32, &Device::Cpu).unwrap();
            Strips::try_from(x)
                .unwrap()
                .parts()
                .iter()
                .map(|strip| strip.dim(1).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(heights(1), [32, 32, 6]);
        assert_eq!(heights(2), heights(1));
    }
}
