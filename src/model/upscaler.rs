//! Networks that enlarge images, one file each: ESRGAN's RRDBNet, Real-ESRGAN's compact one, SPAN and
//! RealPLKSR. Their configuration is inferred from the names and shapes of their tensors. [`Upscaler::upscale`] works
//! in tiles, so that memory does not grow with the image. Networks of one channel enlarge red, green
//! and blue each by itself, those of four the transparency too.

mod compact;
mod plksr;
mod rrdb;
mod span;

use crate::error::NotFinite;
use crate::image::Image;
use crate::nn::Forward;
use crate::nn::layers::is_finite;
use crate::nn::weights::Weights;
use crate::weights::{Checkpoint, UPSCALERS};
use anyhow::{Context, Result};
use candle_core::{Device, Result as TensorResult, Tensor};
use compact::Compact;
use plksr::Plksr;
use rrdb::Rrdb;
use span::Span;
use std::ops::Range;

/// The longest side of a tile with its margin, in pixels of the input: 576 pixels of an RRDBNet of
/// the usual width are 0.8 GB.
pub const TILE_PX: usize = 576;
/// The margin around a tile, in pixels of the input. The networks' receptive field is larger: with
/// their published weights, a photograph enlarged in tiles differs in some places by a level of 255
/// from one that is enlarged whole.
const MARGIN_PX: usize = 64;
/// The longest side of a part whose features are turned into pixels at once, in pixels of the
/// input.
const PART_PX: usize = 128;
/// The receptive field of a pixel of the result in the features, in each direction.
const REACH: usize = 2;
/// The most doublings, and pixels a side that become channels; a file with more is a mistake.
const MOST: usize = 4;
/// The largest scale of a network whose last layer is shuffled to pixels.
const MOST_SHUFFLED: usize = 16;

/// The architecture and sizes of an upscaler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpscalerConfig {
    architecture: Architecture,
    /// of the image: 1 for grey, 3, or 4 with transparency
    channels: usize,
    /// channels inside
    width: usize,
    /// pixels a side of the image that become channels of one pixel
    unshuffle: usize,
    /// the scale of the result
    pub factor: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Architecture {
    /// RRDBNet: residual blocks, growth channels of their layers, and doublings after them
    Rrdb {
        blocks: usize,
        growth: usize,
        doublings: usize,
        /// ESRGAN+'s second residual path (Rakotonirina and Rasoanaivo 2020, arXiv 2001.08073)
        is_plus: bool,
    },
    /// SRVGGNetCompact: convolutions, the last one included
    Compact { convolutions: usize },
    /// SPAN, which may take pixels without their mean
    Span { is_normalised: bool },
    /// RealPLKSR
    Plksr(plksr::Blocks),
}

impl UpscalerConfig {
    /// Infers the configuration from the tensors' names and shapes. Errors if they are not those of a
    /// known network.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let shape = |name: &str| match checkpoint.shape(&format!("upscaler.{name}.weight")) {
            Some(&[outputs, inputs, 3, 3]) => Some((outputs, inputs)),
            _ => None,
        };
        let root = |n: usize, channels: usize, most: usize| {
            let is_known = matches!(channels, 1 | 3 | 4);
            (1..=most).find(|side| is_known && channels * side * side == n)
        };
        let children = |name: &str| checkpoint.count(&format!("upscaler.{name}."));
        let of_span = || -> Option<Self> {
            let &[width, channels, 1, 1] = checkpoint.shape("upscaler.conv_1.sk.weight")? else {
                return None;
            };
            let (outputs, _) = shape("upsampler.0")?;
            let is_normalised = checkpoint.shape("upscaler.no_norm").is_none();
            (channels == 3 || !is_normalised).then_some(Self {
                architecture: Architecture::Span { is_normalised },
                channels,
                width,
                unshuffle: 1,
                factor: root(outputs, channels, MOST_SHUFFLED)?,
            })
        };
        let of_plksr = || -> Option<Self> {
            let has = |name: &str| {
                checkpoint
                    .shape(&format!("upscaler.feats.1.{name}"))
                    .is_some()
            };
            let (width, channels) = shape("feats.0")?;
            let &[part, _, kernel, _] = checkpoint.shape("upscaler.feats.1.lk.conv.weight")? else {
                return None;
            };
            // a dropout without tensors stands between the blocks and the last layer
            let count = children("feats").checked_sub(1)?;
            let (outputs, _) = shape(&format!("feats.{}", count + 2))?;
            let blocks = plksr::Blocks {
                count,
                kernel,
                part,
                has_attention: has("attn.f.0.weight"),
                has_layer_norm: has("layer_norm.bias"),
            };
            let is_possible = count > 0 && part <= width && kernel % 2 == 1;
            is_possible.then_some(Self {
                architecture: Architecture::Plksr(blocks),
                channels,
                width,
                unshuffle: 1,
                factor: root(outputs, channels, MOST_SHUFFLED)?,
            })
        };
        let known = || -> Option<Self> {
            let Some((width, inputs)) = shape("conv_first") else {
                let convolutions = children("body").checked_add(1)? / 2;
                let (width, channels) = shape("body.0")?;
                let (outputs, _) = shape(&format!("body.{}", 2 * convolutions.checked_sub(1)?))?;
                return Some(Self {
                    architecture: Architecture::Compact { convolutions },
                    channels,
                    width,
                    unshuffle: 1,
                    factor: root(outputs, channels, MOST_SHUFFLED)?,
                });
            };
            let ((growth, _), (channels, _)) = (shape("body.0.rdb1.conv1")?, shape("conv_last")?);
            let (unshuffle, doublings) = (root(inputs, channels, MOST)?, children("up"));
            let factor = (doublings <= MOST && (1usize << doublings).is_multiple_of(unshuffle))
                .then(|| (1 << doublings) / unshuffle)?;
            Some(Self {
                architecture: Architecture::Rrdb {
                    blocks: children("body"),
                    growth,
                    doublings,
                    is_plus: checkpoint
                        .shape("upscaler.body.0.rdb1.conv1x1.weight")
                        .is_some(),
                },
                channels,
                width,
                unshuffle,
                factor,
            })
        };
        let found = if checkpoint.shape("upscaler.conv_1.sk.weight").is_some() {
            of_span()
        } else if checkpoint.shape("upscaler.feats.0.weight").is_some() {
            of_plksr()
        } else {
            known()
        };
        found.with_context(|| {
            format!(
                "`{}` has layers of sizes that no known upscaler has\n\nhint: {UPSCALERS}",
                checkpoint.name
            )
        })
    }
}

/// A network that enlarges images.
pub struct Upscaler {
    network: Network,
    config: UpscalerConfig,
    device: Device,
}

impl Upscaler {
    /// Reads the weights of the upscaler at `w`.
    pub fn new(w: &Weights, config: UpscalerConfig) -> Result<Self> {
        let network = match &config.architecture {
            &Architecture::Rrdb {
                blocks,
                growth,
                doublings,
                is_plus,
            } => Network::Rrdb(Box::new(Rrdb::new(
                w,
                &config,
                [blocks, growth, doublings],
                is_plus,
            )?)),
            Architecture::Compact { convolutions } => {
                Network::Compact(Compact::new(w, &config, *convolutions)?)
            }
            Architecture::Span { is_normalised } => {
                Network::Span(Box::new(Span::new(w, &config, *is_normalised)?))
            }
            Architecture::Plksr(blocks) => Network::Plksr(Plksr::new(w, &config, blocks)?),
        };
        Ok(Self {
            network,
            config,
            device: w.device().clone(),
        })
    }

    /// Where its weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Estimates the peak memory of enlarging an image [height, width] besides images, in bytes.
    pub fn bytes(&self, height: usize, width: usize) -> u64 {
        let UpscalerConfig {
            ref architecture,
            width: channels,
            unshuffle,
            factor,
            channels: of_image,
        } = self.config;
        // one pass for each colour goes through the network at the same time
        let passes = if of_image == 1 { 3 } else { 1 };
        let side = |n: usize| n.min(TILE_PX) / unshuffle;
        // the channels of a block's tensors: its input, features, their concatenation, and the
        // network's input
        let features = match architecture {
            Architecture::Rrdb { growth, .. } => 5 * channels + 8 * growth,
            Architecture::Compact { .. } => 2 * channels,
            Architecture::Span { .. } => 9 * channels,
            Architecture::Plksr(_) => 7 * channels,
        };
        let part = (PART_PX + 2 * REACH * unshuffle) * factor;
        4 * passes * (side(height) * side(width) * features + 2 * part * part * channels) as u64
    }

    /// Enlarges an image of any size by `factor` in both directions, in tiles of up to `side` pixels
    /// with their margins. Calls `done` with the number of steps done and of all. A network of four
    /// channels enlarges its transparency [height, width], too; all others leave that to the caller,
    /// and return none. Errors if the result is not finite.
    pub fn upscale(
        &self,
        cx: Forward,
        picture: &Image,
        alpha: Option<&[u8]>,
        side: usize,
        done: &mut dyn FnMut(usize, usize),
    ) -> Result<(Image, Option<Vec<u8>>)> {
        let UpscalerConfig {
            unshuffle,
            factor,
            channels,
            ..
        } = self.config;
        let source = Pixels {
            picture,
            alpha,
            channels,
        };
        let mut enlarged_alpha = alpha
            .filter(|_| channels == 4)
            .map(|_| vec![0; picture.width * factor * picture.height * factor]);
        let (width, height) = (picture.width * factor, picture.height * factor);
        let mut result = Image {
            width,
            height,
            rgb: vec![0; width * height * 3],
        };
        let (rows, columns) = (
            tiles(picture.height, side, unshuffle),
            tiles(picture.width, side, unshuffle),
        );
        let (mut step, steps) = (0, rows.len() * columns.len() * self.network.layers());
        for (y, x) in rows
            .iter()
            .flat_map(|y| columns.iter().map(move |x| (y, x)))
        {
            let seen = source.patch(y.seen.clone(), x.seen.clone(), &self.device)?;
            let features = self.network.features(cx, &seen, &mut || {
                step += 1;
                done(step, steps);
            })?; // [1, seen / unshuffle, .., c]
            for (top, left) in y
                .parts()
                .flat_map(|top| x.parts().map(move |left| (top.clone(), left)))
            {
                let kept = [(1, y, &top), (2, x, &left)]
                    .map(|(dim, tile, own)| (dim, tile.seen.start, tile.around(own, unshuffle)));
                let near = |t: &Tensor, of: usize| -> TensorResult<Tensor> {
                    let cut = |t: Tensor, (dim, from, kept): &(usize, usize, Range<usize>)| {
                        t.narrow(*dim, (kept.start - from) / of, kept.len() / of)
                    };
                    kept.iter().try_fold(t.clone(), cut)?.contiguous()
                };
                let rgb =
                    self.network
                        .enlarge(cx, &near(&features, unshuffle)?, &near(&seen, 1)?)?; // [1, kept * factor, .., 3]
                if !is_finite(&rgb)? {
                    return Err(NotFinite {
                        place: "after upscaling".into(),
                    }
                    .into());
                }
                let (rgb, levels) = split(&rgb)?;
                let part = Image::from_tensor(&rgb)?
                    .pop()
                    .context("nothing was enlarged")?;
                let [above, before] =
                    [top.start - kept[0].2.start, left.start - kept[1].2.start].map(|n| n * factor);
                let length = left.len() * factor * 3;
                for row in 0..top.len() * factor {
                    let from = ((above + row) * part.width + before) * 3;
                    let to = ((top.start * factor + row) * width + left.start * factor) * 3;
                    result.rgb[to..to + length].copy_from_slice(&part.rgb[from..from + length]);
                    if let (Some(all), Some(levels)) = (&mut enlarged_alpha, &levels) {
                        let (from, to, length) = (from / 3, to / 3, length / 3);
                        all[to..to + length].copy_from_slice(&levels[from..from + length]);
                    }
                }
            }
        }
        Ok((result, enlarged_alpha))
    }
}

/// A tile along one side, in pixels of the input.
struct Tile {
    /// the pixels that it covers
    own: Range<usize>,
    /// the same with the margin; it may go beyond the image's end, to a multiple of the pixels that
    /// become one
    seen: Range<usize>,
}

impl Tile {
    /// Row or column ranges whose features are turned into pixels at once.
    fn parts(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let Range { start, end } = self.own;
        (start..end)
            .step_by(PART_PX)
            .map(move |start| start..(start + PART_PX).min(end))
    }

    /// A part with its receptive field in the features.
    fn around(&self, part: &Range<usize>, unshuffle: usize) -> Range<usize> {
        let reach = REACH * unshuffle;
        let (start, end) = (
            part.start / unshuffle * unshuffle,
            part.end.next_multiple_of(unshuffle),
        );
        start.saturating_sub(reach).max(self.seen.start)..(end + reach).min(self.seen.end)
    }
}

/// Cuts a length of `n` pixels into tiles of about the same length, which are up to `side` pixels
/// long with their margins, if that is possible.
fn tiles(n: usize, side: usize, unshuffle: usize) -> Vec<Tile> {
    let padded = n.next_multiple_of(unshuffle);
    let own = |count: usize| padded.div_ceil(count).next_multiple_of(unshuffle);
    let is_small = |count: &usize| {
        own(*count) + MARGIN_PX * (count - 1).min(2) <= side || own(*count) <= MARGIN_PX
    };
    let step = own((1..).find(is_small).unwrap_or(1));
    let tile = |start: usize| {
        let own = start..(start + step).min(n);
        Tile {
            seen: own.start.saturating_sub(MARGIN_PX)
                ..(own.end + MARGIN_PX)
                    .next_multiple_of(unshuffle)
                    .min(padded),
            own,
        }
    };
    (0..n).step_by(step).map(tile).collect()
}

/// An image as a network takes it.
struct Pixels<'a> {
    picture: &'a Image,
    /// [height, width]; opaque where there is none
    alpha: Option<&'a [u8]>,
    channels: usize,
}

impl Pixels<'_> {
    /// A part [b, rows, columns, channels] in 0..=1, mirrored beyond the end: a batch of red, green
    /// and blue for a network of one channel.
    fn patch(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        device: &Device,
    ) -> TensorResult<Tensor> {
        let inside = |at: usize, n: usize| {
            if at < n {
                at
            } else {
                (2 * (n - 1)).saturating_sub(at)
            }
        };
        let picture = self.picture;
        let passes: &[&[usize]] = match self.channels {
            1 => &[&[0], &[1], &[2]],
            4 => &[&[0, 1, 2, 3]],
            _ => &[&[0, 1, 2]],
        };
        let shape = (passes.len(), rows.len(), columns.len(), self.channels);
        let mut values = Vec::with_capacity(passes.len() * rows.len() * columns.len() * 4);
        for channels in passes {
            for y in rows.clone() {
                for x in columns.clone() {
                    let at = inside(y, picture.height) * picture.width + inside(x, picture.width);
                    for &channel in *channels {
                        let level = match channel {
                            3 => self.alpha.map_or(u8::MAX, |alpha| alpha[at]),
                            _ => picture.rgb[at * 3 + channel],
                        };
                        values.push(f32::from(level) / 255.0);
                    }
                }
            }
        }
        Tensor::from_vec(values, shape, device)
    }
}

/// RGB [1, h, w, 3] of a network's result [b, h, w, channels], and of four channels the levels of the
/// transparency.
fn split(result: &Tensor) -> TensorResult<(Tensor, Option<Vec<u8>>)> {
    let (b, h, w, channels) = result.dims4()?;
    match channels {
        1 => {
            let rgb = result.reshape((b, h, w))?.permute((1, 2, 0))?; // [h, w, 3]
            Ok((rgb.unsqueeze(0)?.contiguous()?, None))
        }
        4 => {
            let rgb = result.narrow(3, 0, 3)?.contiguous()?;
            let alpha = result.narrow(3, 3, 1)?.flatten_all()?.to_vec1::<f32>()?;
            let levels = alpha
                .iter()
                .map(|value| (value.clamp(0.0, 1.0) * 255.0).round_ties_even() as u8);
            Ok((rgb, Some(levels.collect())))
        }
        _ => Ok((result.clone(), None)),
    }
}

enum Network {
    Rrdb(Box<Rrdb>),
    Compact(Compact),
    Span(Box<Span>),
    Plksr(Plksr),
}

impl Network {
    /// The number of times that [`Self::features`] calls `done`.
    fn layers(&self) -> usize {
        match self {
            Self::Rrdb(network) => network.blocks.len(),
            Self::Compact(network) => network.convs.len(),
            Self::Span(_) => span::BLOCKS,
            Self::Plksr(network) => network.blocks.len(),
        }
    }

    /// The body of the network: RGB [b, h, w, 3] in 0..=1 -> [b, h / unshuffle, w / unshuffle, c].
    fn features(&self, cx: Forward, rgb: &Tensor, done: &mut dyn FnMut()) -> TensorResult<Tensor> {
        match self {
            Self::Rrdb(network) => network.features(cx, rgb, done),
            Self::Compact(network) => network.features(cx, rgb, done),
            Self::Span(network) => network.features(cx, rgb, done),
            Self::Plksr(network) => network.features(cx, rgb, done),
        }
    }

    /// The upsampling head: features [b, h / unshuffle, w / unshuffle, c] and the RGB [b, h, w, 3] they
    /// are of -> [b, factor*h, factor*w, 3].
    fn enlarge(&self, cx: Forward, features: &Tensor, rgb: &Tensor) -> TensorResult<Tensor> {
        match self {
            Self::Rrdb(network) => network.enlarge(cx, features),
            Self::Compact(_) | Self::Plksr(_) => shuffled(features, rgb, true),
            Self::Span(_) => shuffled(features, rgb, false),
        }
    }
}

/// Shuffles features [b, h, w, c * r * r] to pixels [b, r*h, r*w, c]; with `adds` each of the pixels
/// [b, h, w, c] that they are of is added to the r * r that it becomes.
fn shuffled(features: &Tensor, pixels: &Tensor, adds: bool) -> TensorResult<Tensor> {
    let ((b, h, w, outputs), (_, _, _, c)) = (features.dims4()?, pixels.dims4()?);
    let r = (outputs / c).isqrt();
    // channel, row and column of the larger image, in this order, as torch has them
    let shuffled = features
        .reshape((b, h, w, c, r, r))?
        .permute((0, 1, 4, 2, 5, 3))?; // [b, h, r, w, r, c]
    let sum = if adds {
        let pixels = pixels.reshape((b, h, 1, w, 1, c))?;
        (shuffled + pixels.broadcast_as((b, h, r, w, r, c))?)?
    } else {
        shuffled.contiguous()?
    };
    sum.reshape((b, r * h, r * w, c))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::{DType, IndexOp};
    use std::path::PathBuf;

    #[test]
    fn networks_of_every_scale_equal_pytorchs() {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/upscaler");
        let source = crate::image::load::Input::read(&folder.join("source.png"))
            .unwrap()
            .picture;
        let goldens =
            candle_core::safetensors::load(folder.join("goldens.safetensors"), &Device::Cpu)
                .unwrap();
        for (name, golden) in &goldens {
            let checkpoint =
                Checkpoint::open_upscaler(&folder.join(format!("{name}.safetensors"))).unwrap();
            let config = UpscalerConfig::of(&checkpoint).unwrap();
            let network = Upscaler::new(
                &checkpoint.weights("upscaler", &Device::Cpu, DType::F32),
                config,
            )
            .unwrap();
            let whole = |n: usize| 0..n.next_multiple_of(network.config.unshuffle);
            let pixels = Pixels {
                picture: &source,
                alpha: None,
                channels: 3,
            };
            let seen = pixels
                .patch(whole(source.height), whole(source.width), &Device::Cpu)
                .unwrap();
            let cx = Forward::on(&Device::Cpu);
            let features = network.network.features(cx, &seen, &mut || ()).unwrap();
            let (h, w, _) = golden.dims3().unwrap();
            let rgb = network
                .network
                .enlarge(cx, &features, &seen)
                .unwrap()
                .i((0, ..h, ..w))
                .unwrap();
            let off = (rgb - golden)
                .unwrap()
                .abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap();
            assert!(off < 1e-4, "{name} is off by {off:e}");
        }
        assert_eq!(goldens.len(), 11);
    }

    #[test]
    fn tiles_cover_a_side_once_and_see_no_more_than_they_may() {
        for (n, side, unshuffle) in [
            (1, 576, 1),
            (575, 576, 1),
            (577, 576, 2),
            (1024, 576, 1),
            (4099, 576, 4),
            (300, 10, 2),
        ] {
            let tiles = tiles(n, side, unshuffle);
            let joined: Vec<usize> = tiles.iter().flat_map(|tile| tile.own.clone()).collect();
            assert!(joined.iter().copied().eq(0..n), "{n} in tiles of {side}");
            for tile in &tiles {
                assert!(tile.seen.start % unshuffle == 0 && tile.seen.len() % unshuffle == 0);
                assert!(
                    tile.seen.len() <= side.max(3 * MARGIN_PX),
                    "{:?} of {n}",
                    tile.seen
                );
            }
        }
        assert_eq!(tiles(576, TILE_PX, 1).len(), 1);
    }
}
