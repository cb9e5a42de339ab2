//! Images in bands of rows, for activations that are too large to be held twice.
//!
//! What a band was normalised into is still in a cache when the convolution reads it, and a band's
//! memory is free as soon as the one below it was read. The plain backend has one band.

use super::layers::{Activation, BoundGroupNorm, Conv2d};
use super::{Backend, Forward};
use candle_core::{Result, Tensor};
use std::collections::VecDeque;

/// About how many elements a band of one image has.
const BAND_ELEMENTS: usize = 1 << 22;
/// The same on a GPU, where a band has to keep all multiprocessors busy.
const GPU_BAND_ELEMENTS: usize = 1 << 24;
/// The rows of a band are a multiple of it, the height of Winograd's tiles.
const ROWS: usize = 4;

/// A batch of images [b, h, w, c] in bands of rows, from top to bottom.
#[derive(Default)]
pub struct RowBands(VecDeque<Tensor>);

impl RowBands {
    /// Cuts [b, h, w, c].
    pub fn split(cx: Forward, x: &Tensor) -> Result<Self> {
        let mut bands = Self::default();
        bands.push(cx, x)?;
        Ok(bands)
    }

    /// Adds [b, rows, w, c] at the bottom, cut into bands.
    pub fn push(&mut self, cx: Forward, x: &Tensor) -> Result<()> {
        let (_, h, w, c) = x.dims4()?;
        let elements = match cx.backend {
            Backend::Cpu => BAND_ELEMENTS,
            Backend::Gpu => GPU_BAND_ELEMENTS,
            Backend::Plain => return self.push_bands(x, h),
        };
        // whatever the batch: sums over an image are sums of its bands' sums
        self.push_bands(x, (elements / (w * c).max(1) / ROWS).max(1) * ROWS)
    }

    fn push_bands(&mut self, x: &Tensor, rows: usize) -> Result<()> {
        let h = x.dim(1)?;
        for top in (0..h).step_by(rows) {
            self.0
                .push_back(x.narrow(1, top, rows.min(h - top))?.contiguous()?);
        }
        Ok(())
    }

    /// The bands, from top to bottom.
    pub fn parts(&self) -> Vec<&Tensor> {
        self.0.iter().collect()
    }

    /// The whole image [b, h, w, c].
    pub fn join(self) -> Result<Tensor> {
        match self.0.as_slices() {
            ([one], []) => Ok(one.clone()),
            _ => Tensor::cat(&self.parts(), 1)?.contiguous(),
        }
    }

    /// The bands from top to bottom, each with the rows around it that a 3x3 convolution sees. A
    /// band is dropped when the one below it was taken.
    pub fn with_halos(self, cx: Forward) -> Result<HaloBands> {
        let (mut above, mut end) = (None, None);
        // where there is one band the convolution finds the opposite edge itself
        if let (true, [first, .., last]) = (cx.padding[0].is_circular(), &*self.parts()) {
            above = Some(last.narrow(1, last.dim(1)? - 1, 1)?.force_contiguous()?);
            end = Some(first.narrow(1, 0, 1)?.force_contiguous()?);
        }
        Ok(HaloBands {
            above,
            bands: self.0,
            end,
        })
    }
}

impl IntoIterator for RowBands {
    type Item = Tensor;
    type IntoIter = std::collections::vec_deque::IntoIter<Tensor>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// The iterator of [`RowBands::with_halos`].
pub struct HaloBands {
    above: Option<Tensor>,
    bands: VecDeque<Tensor>,
    /// below the last one
    end: Option<Tensor>,
}

impl Iterator for HaloBands {
    type Item = Result<HaloBand>;

    fn next(&mut self) -> Option<Self::Item> {
        let band = self.bands.pop_front()?;
        let with_halo = || {
            let below = self
                .bands
                .front()
                .map(|next| next.narrow(1, 0, 1)?.contiguous())
                .transpose()?
                .or_else(|| self.end.take());
            let above = match below {
                // a copy, as a view would keep the whole band
                Some(_) => self
                    .above
                    .replace(band.narrow(1, band.dim(1)? - 1, 1)?.force_contiguous()?),
                None => self.above.take(),
            };
            Ok(HaloBand { above, band, below })
        };
        Some(with_halo())
    }
}

/// A band with its halo: the rows around it that a 3x3 convolution sees.
pub struct HaloBand {
    /// [b, 1, w, c]; none at the top, unless rows are padded circularly
    above: Option<Tensor>,
    /// [b, rows, w, c]
    pub band: Tensor,
    /// [b, 1, w, c]; none at the bottom, unless rows are padded circularly
    below: Option<Tensor>,
}

impl HaloBand {
    /// Normalises, activates and convolves the band by a convolution that keeps the size, and adds
    /// `residual` [b, rows, w, out] -> [b, rows, w, out].
    pub fn norm_conv(
        &self,
        cx: Forward,
        norm: &BoundGroupNorm,
        activation: Activation,
        conv: &Conv2d,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let x = norm.forward_act(
            &self.band,
            self.above.as_ref(),
            self.below.as_ref(),
            activation,
        )?;
        let first = usize::from(self.above.is_some());
        conv.forward_rows(cx, &x, first..first + self.band.dim(1)?, residual)
    }

    /// Convolves the band, of an even number of rows, by a 3x3 convolution of stride 2 that is
    /// padded below and right only -> [b, rows/2, w/2, out].
    pub fn downsample(&self, cx: Forward, conv: &Conv2d) -> Result<Tensor> {
        match &self.below {
            Some(below) => conv.forward(cx, &Tensor::cat(&[&self.band, below], 1)?),
            None => conv.forward(cx, &self.band),
        }
    }

    /// Scales the band to twice its size and convolves it by a convolution that keeps the size ->
    /// [b, 2*rows, 2*w, out].
    pub fn upsample(&self, cx: Forward, conv: &Conv2d) -> Result<Tensor> {
        let parts: Vec<&Tensor> = self
            .above
            .iter()
            .chain([&self.band])
            .chain(&self.below)
            .collect();
        let x = Tensor::cat(&parts, 1)?;
        let first = 2 * usize::from(self.above.is_some());
        conv.forward_rows_doubled(cx, &x, first..first + 2 * self.band.dim(1)?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::nn::PaddingMode;
    use crate::nn::layers::GroupNorm;
    use crate::nn::testing::normal;
    use crate::nn::weights::Weights;
    use candle_core::{DType, Device};

    fn cut(x: &Tensor, rows: usize) -> RowBands {
        let mut bands = RowBands::default();
        bands.push_bands(x, rows).unwrap();
        bands
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
    fn layers_give_the_same_for_bands_as_for_the_whole_picture() {
        compare(
            Backend::Cpu,
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
    fn layers_of_a_gpu_give_the_same_for_bands_as_for_the_whole_picture() {
        compare(Backend::Gpu, &[(4, 5), (9, 6)], &[4, 100]);
    }

    fn compare(backend: Backend, sizes: &[(usize, usize)], bands: &[usize]) {
        let weights = Weights::random(&Device::Cpu, DType::F32).with_backend(backend);
        let sizes = sizes.iter().copied().zip([1, 2, 3].into_iter().cycle());
        let modes = [
            [PaddingMode::Zeros; 2],
            [PaddingMode::Zeros, PaddingMode::Circular],
            [PaddingMode::Circular, PaddingMode::Zeros],
        ];
        for (((h, w), b), padding) in sizes.flat_map(|size| modes.map(|padding| (size, padding))) {
            let cx = Forward {
                backend,
                padding,
                ..Forward::on(&Device::Cpu)
            };
            let (norm, conv) = (
                GroupNorm::new(&weights, 5, 35, 1e-6).unwrap(),
                Conv2d::new(&weights, 35, 19, 3).unwrap(),
            );
            let x = (normal(0f32, 1.0, (b, h, w, 35)) + 2.0).unwrap();
            let halving = Conv2d::strided(&weights, 35, 19, 3, 2, (0, 1)).unwrap();
            let residual = normal(0f32, 1.0, (b, h, w, 19));
            let whole = conv
                .forward_add(
                    cx,
                    &norm.forward_act(cx, &x, Activation::Silu).unwrap(),
                    None,
                    Some(&residual),
                )
                .unwrap();
            let doubled = conv.forward_scaled(cx, &x, 2 * h, 2 * w).unwrap();
            for &rows in bands {
                let bound = norm.bind(cx, &cut(&x, rows).parts()).unwrap();
                let (mut bands, mut doubled_bands) = (RowBands::default(), RowBands::default());
                for (band, residual) in cut(&x, rows)
                    .with_halos(cx)
                    .unwrap()
                    .zip(cut(&residual, rows))
                {
                    let band = band.unwrap();
                    bands
                        .push(
                            cx,
                            &band
                                .norm_conv(cx, &bound, Activation::Silu, &conv, Some(&residual))
                                .unwrap(),
                        )
                        .unwrap();
                    doubled_bands
                        .push(cx, &band.upsample(cx, &conv).unwrap())
                        .unwrap();
                }
                assert!(
                    worst(&bands.join().unwrap(), &whole) < 1e-4,
                    "{h}x{w} in bands of {rows}, {padding:?}"
                );
                if rows.is_multiple_of(2) && h.is_multiple_of(2) {
                    let mut halved = RowBands::default();
                    for band in cut(&x, rows).with_halos(cx).unwrap() {
                        halved
                            .push(cx, &band.unwrap().downsample(cx, &halving).unwrap())
                            .unwrap();
                    }
                    let whole = halving.forward(cx, &x).unwrap();
                    assert!(
                        worst(&halved.join().unwrap(), &whole) < 1e-4,
                        "{h}x{w} in bands of {rows}, {padding:?}, halved"
                    );
                }
                assert!(
                    worst(&doubled_bands.join().unwrap(), &doubled) < 1e-4,
                    "{h}x{w} in bands of {rows}, {padding:?}, doubled"
                );
            }
        }
    }

    #[test]
    fn a_large_picture_is_cut_alike_in_any_batch() {
        let heights = |b: usize| {
            let x = Tensor::zeros((b, 70, 1024, 128), DType::F32, &Device::Cpu).unwrap();
            RowBands::split(Forward::on(&Device::Cpu), &x)
                .unwrap()
                .parts()
                .iter()
                .map(|band| band.dim(1).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(heights(1), [32, 32, 6]);
        assert_eq!(heights(2), heights(1));
    }
}
