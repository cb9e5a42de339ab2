//! Init images: brought to the size of the drawing, with the mask of what is repainted, and the
//! composition of what was drawn with what stays.
//!
//! [`InitImageFinder`] makes settings of options and reads each file once; [`InitImage`] makes
//! pixels of settings. Hides the geometry: borders, the box around what is repainted, and how a
//! repainted part fades in.

use super::options::JobOptions;
use super::settings::{Border, Source};
use crate::image::Image;
use crate::image::load::{Fit, Input, resized_levels};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Result as TensorResult, Tensor};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Pixels over which a repainted part fades in where nobody says.
const FEATHER: usize = 8;
/// A mask's level from which on it is white, as in diffusers.
const WHITE: u8 = 128;
/// How far the noise of a new border goes from the colour of the edge, in levels.
const BORDER_NOISE: i32 = 24;

/// Finds the init images that options name.
#[derive(Default)]
pub struct InitImageFinder {
    files: HashMap<PathBuf, FileInfo>,
    /// one for all images of a run that weight it
    sources: HashSet<Arc<Source>>,
}

/// An init image, and its width and height.
pub type Found = (Arc<Source>, (usize, usize));

#[derive(Clone)]
struct FileInfo {
    size: (usize, usize),
    hash: Arc<str>,
    is_partly_transparent: bool,
}

impl InitImageFinder {
    /// Returns the init image that the options name, if they do. Errors if they name none and say
    /// more about it, or if a file cannot be read.
    pub fn find(&mut self, options: &JobOptions) -> Result<Option<Found>> {
        let Some(image) = &options.image else {
            let given = [
                ("strength", options.strength.is_some()),
                ("mask", options.mask.is_some()),
                ("only-masked", options.only_masked.is_some()),
                ("extend", options.extend.is_some()),
                ("feather", options.feather.is_some()),
                ("fit", options.fit.is_some()),
                ("image-guidance", options.image_guidance.is_some()),
            ];
            return match given.into_iter().find(|(_, is_given)| *is_given) {
                Some((name, _)) => bail!(
                    "`--{name}` is for pictures that start from another\n\nhint: name that with `--image FILE`"
                ),
                None => Ok(None),
            };
        };
        let info = self.read(image)?;
        let mask = options
            .mask
            .as_deref()
            .map(|mask| Ok::<_, anyhow::Error>((mask, self.read(mask)?)))
            .transpose()?;
        let text = |path: &Path| -> Result<Arc<str>> {
            let text = path
                .to_str()
                .with_context(|| format!("the name `{}` is not UTF-8 text", path.display()))?;
            Ok(text.into())
        };
        let source = Source {
            image: text(image)?,
            image_hash: info.hash,
            fit: options.fit.unwrap_or(Fit::Crop),
            mask: mask.as_ref().map(|(path, _)| text(path)).transpose()?,
            mask_hash: mask.map(|(_, info)| info.hash),
            alpha: info.is_partly_transparent && options.mask.is_none() && options.extend.is_none(),
            feather: options.feather.unwrap_or(FEATHER),
            only_masked: options.only_masked,
            extend: options.extend,
        };
        if source.extend.is_some() {
            let other = [
                ("mask", source.mask.is_some()),
                ("only-masked", source.only_masked.is_some()),
                ("fit", options.fit.is_some()),
            ];
            let sized = [
                ("width", options.width.is_some()),
                ("height", options.height.is_some()),
            ];
            if let Some((name, _)) = other
                .into_iter()
                .chain(sized)
                .find(|(_, is_given)| *is_given)
            {
                bail!(
                    "`--extend` and `--{name}` cannot be used together\n\nhint: the border is what is painted, and gives the size"
                );
            }
            ensure!(
                source.extend != Some(Border::default()),
                "`--extend` adds nothing\n\nhint: `--extend left=128` adds 128 pixels"
            );
        }
        if source.only_masked.is_some() && !source.repaints() {
            bail!(
                "`--only-masked` needs a mask\n\nhint: name it with `--mask FILE`, or make a part of `{}` transparent",
                source.image
            );
        }
        let (width, height) = info.size;
        let border = source.extend.unwrap_or_default();
        let source = match self.sources.get(&source) {
            Some(shared) => shared.clone(),
            None => {
                let source = Arc::new(source);
                self.sources.insert(source.clone());
                source
            }
        };
        Ok(Some((
            source,
            (
                width + border.left + border.right,
                height + border.top + border.bottom,
            ),
        )))
    }

    fn read(&mut self, path: &Path) -> Result<FileInfo> {
        if let Some(info) = self.files.get(path) {
            return Ok(info.clone());
        }
        let input = Input::read(path)?;
        let is_partly_transparent = input
            .alpha
            .as_ref()
            .is_some_and(|alpha| alpha.iter().any(|level| u8::MAX - level >= WHITE));
        let info = FileInfo {
            size: (input.picture.width, input.picture.height),
            hash: input.sha256().into(),
            is_partly_transparent,
        };
        self.files.insert(path.into(), info.clone());
        Ok(info)
    }
}

impl Source {
    /// Whether only a part of it is repainted.
    pub fn repaints(&self) -> bool {
        self.mask.is_some() || self.alpha || self.extend.is_some()
    }
}

/// An init image of the drawing's size.
pub struct InitImage {
    pub picture: Image,
    /// [height * width], whether a pixel is repainted; none if all are
    mask: Option<Vec<bool>>,
    composite: Option<Composite>,
}

/// What the drawing is composited into.
struct Composite {
    whole: Image,
    /// [height * width] of the whole: the weight of what is drawn, of 255
    weights: Vec<u8>,
    region: Region,
}

/// A rectangle of an image, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Region {
    left: usize,
    top: usize,
    width: usize,
    height: usize,
}

impl InitImage {
    /// Reads the files for a drawing of this size. Errors if they have changed since their hashes
    /// were taken, or if nothing would be repainted.
    pub fn read(source: &Source, width: usize, height: usize) -> Result<Self> {
        let input = read(&source.image, &source.image_hash)?;
        let own = (input.picture.width, input.picture.height);
        let (whole, mask) = if let Some(border) = source.extend {
            let (whole, mask) =
                extended(&input.over_white(), border, (width, height), source.feather);
            (whole, Some(mask))
        } else {
            let (width, height) = if source.only_masked.is_some() {
                own
            } else {
                (width, height)
            };
            let levels = match (&source.mask, &source.mask_hash) {
                (Some(mask), Some(hash)) => Some(read(mask, hash)?.mask(width, height, source.fit)),
                _ if source.alpha => input.transparency(width, height, source.fit),
                _ => None,
            };
            let picture = if source.alpha {
                input.picture
            } else {
                input.over_white()
            };
            (picture.fit(width, height, source.fit), levels.map(is_white))
        };
        let Some(mask) = mask else {
            return Ok(Self {
                picture: whole,
                mask: None,
                composite: None,
            });
        };
        let Some(bounds) = bounds(&mask, whole.width) else {
            let name = source.mask.as_ref().unwrap_or(&source.image);
            bail!(
                "`{name}` leaves nothing to repaint\n\nhint: what is white in a mask is repainted, or what is transparent without one"
            );
        };
        let region = match source.only_masked {
            Some(padding) => bounds.grown(padding, (width, height), (whole.width, whole.height)),
            None => Region {
                left: 0,
                top: 0,
                width: whole.width,
                height: whole.height,
            },
        };
        let levels: Vec<u8> = mask.iter().map(|is| if *is { 255 } else { 0 }).collect();
        let part = Image {
            width: region.width,
            height: region.height,
            rgb: region.of(&whole.rgb, whole.width, 3),
        };
        let levels = resized_levels(
            &region.of(&levels, whole.width, 1),
            [region.width, region.height],
            [width, height],
        );
        let weights = feathered(&mask, whole.width, source.feather);
        Ok(Self {
            picture: part.fit(width, height, Fit::Stretch),
            mask: Some(is_white(levels)),
            composite: Some(Composite {
                whole,
                weights,
                region,
            }),
        })
    }

    /// RGB [1, h, w, 3] in 0..=1 with grey where it is repainted; none if all of it is.
    pub fn masked_rgb(&self, device: &Device) -> TensorResult<Option<Tensor>> {
        let Some(mask) = &self.mask else {
            return Ok(None);
        };
        let values =
            self.picture
                .rgb
                .chunks_exact(3)
                .zip(mask)
                .flat_map(|(pixel, is_repainted)| {
                    let pixel = [0, 1, 2]
                        .map(|i| pixel.get(i).map_or(0.0, |level| f32::from(*level) / 255.0));
                    if *is_repainted { [0.5; 3] } else { pixel }
                });
        let shape = (1, self.picture.height, self.picture.width, 3);
        Tensor::from_vec(values.collect(), shape, device).map(Some)
    }

    /// [1, h, w, 1] for latents of so many pixels a side, 1 where they are repainted, 0 where not;
    /// none if all of them are.
    pub fn mask(&self, factor: usize, device: &Device) -> TensorResult<Option<Tensor>> {
        let Some(mask) = &self.mask else {
            return Ok(None);
        };
        let (h, w) = (self.picture.height / factor, self.picture.width / factor);
        let at = |y: usize, x: usize| {
            mask.get(y * factor * self.picture.width + x * factor)
                .copied()
                .unwrap_or(false)
        };
        let values: Vec<f32> = (0..h)
            .flat_map(|y| (0..w).map(move |x| f32::from(u8::from(at(y, x)))))
            .collect();
        Tensor::from_vec(values, (1, h, w, 1), device).map(Some)
    }

    /// [1, h, w, factor*factor] for latents of so many pixels a side, each of these row by row: 1 where
    /// it is repainted, 0 where not; none if all of them are.
    pub fn mask_of_pixels(&self, factor: usize, device: &Device) -> TensorResult<Option<Tensor>> {
        let Some(mask) = &self.mask else {
            return Ok(None);
        };
        let (h, w) = (self.picture.height / factor, self.picture.width / factor);
        let values: Vec<f32> = mask.iter().map(|is| f32::from(u8::from(*is))).collect();
        Tensor::from_vec(values, (h, factor, w, factor), device)?
            .permute((0, 2, 1, 3))?
            .reshape((1, h, w, factor * factor))
            .map(Some)
    }

    /// Counts the pixels that are retained for compositing, 4 bytes each.
    pub fn composite_pixels(&self) -> usize {
        self.composite
            .as_ref()
            .map_or(0, |composite| composite.weights.len())
    }

    /// The picture with what was drawn in its region. Pixels that are not repainted are those of the
    /// source.
    pub fn composite(&self, drawn: Image) -> Image {
        let Some(Composite {
            whole,
            weights,
            region,
        }) = &self.composite
        else {
            return drawn;
        };
        let mut whole = whole.clone();
        let drawn = drawn.fit(region.width, region.height, Fit::Stretch);
        for (y, row) in drawn.rgb.chunks_exact(region.width * 3).enumerate() {
            let start = (region.top + y) * whole.width + region.left;
            let weights = weights.iter().skip(start);
            let pixels = whole.rgb.chunks_exact_mut(3).skip(start);
            for ((old, new), weight) in pixels.zip(row.chunks_exact(3)).zip(weights) {
                for (old, new) in old.iter_mut().zip(new) {
                    let (a, b, weight) = (u32::from(*old), u32::from(*new), u32::from(*weight));
                    *old = ((a * (255 - weight) + b * weight + 127) / 255) as u8;
                }
            }
        }
        whole
    }
}

/// Reads a file that is info by its hash.
fn read(path: &str, hash: &str) -> Result<Input> {
    let input = Input::read(Path::new(path))?;
    ensure!(
        input.sha256() == hash,
        "`{path}` is another picture than it was\n\nhint: what is drawn over it would be another one too"
    );
    Ok(input)
}

fn is_white(levels: Vec<u8>) -> Vec<bool> {
    levels.into_iter().map(|level| level >= WHITE).collect()
}

/// The smallest area with all that is repainted; none if nothing is.
fn bounds(mask: &[bool], width: usize) -> Option<Region> {
    let rows = || mask.chunks_exact(width);
    let any = |row: &[bool]| row.contains(&true);
    let (top, bottom) = (rows().position(any)?, rows().rposition(any)?);
    let left = rows()
        .filter_map(|row| row.iter().position(|is| *is))
        .min()?;
    let right = rows()
        .filter_map(|row| row.iter().rposition(|is| *is))
        .max()?;
    Some(Region {
        left,
        top,
        width: right - left + 1,
        height: bottom - top + 1,
    })
}

impl Region {
    /// With `padding` around it and the proportions of `drawing`, as far as the `whole` picture
    /// reaches.
    fn grown(self, padding: usize, drawing: (usize, usize), whole: (usize, usize)) -> Self {
        let (width, height) = (self.width + 2 * padding, self.height + 2 * padding);
        let width = width.max((height * drawing.0).div_ceil(drawing.1));
        let height = height.max((width * drawing.1).div_ceil(drawing.0));
        let along = |start: usize, length: usize, wanted: usize, whole: usize| {
            let wanted = wanted.min(whole);
            (
                (start + length / 2)
                    .saturating_sub(wanted / 2)
                    .min(whole - wanted),
                wanted,
            )
        };
        let (left, width) = along(self.left, self.width, width, whole.0);
        let (top, height) = along(self.top, self.height, height, whole.1);
        Self {
            left,
            top,
            width,
            height,
        }
    }

    /// Its part of values [h, w, channels].
    fn of(&self, values: &[u8], width: usize, channels: usize) -> Vec<u8> {
        let rows = values
            .chunks_exact(width * channels)
            .skip(self.top)
            .take(self.height);
        rows.flat_map(|row| {
            row.iter()
                .copied()
                .skip(self.left * channels)
                .take(self.width * channels)
        })
        .collect()
    }
}

/// How much of each pixel is drawn, of 255: all from `feather` pixels inside the mask on, nothing
/// outside.
fn feathered(mask: &[bool], width: usize, feather: usize) -> Vec<u8> {
    // distances from what is kept, by the two passes of a chamfer
    let height = mask.len() / width.max(1);
    let far = (feather + 1) as f32;
    let mut distance: Vec<f32> = mask.iter().map(|is| if *is { far } else { 0.0 }).collect();
    let mut pass = |cells: &mut dyn Iterator<Item = usize>, back: isize| {
        for i in cells {
            let (x, y) = ((i % width) as isize, (i / width) as isize);
            let neighbours = [
                (back, 0, 1.0),
                (-1, back, 2f32.sqrt()),
                (0, back, 1.0),
                (1, back, 2f32.sqrt()),
            ];
            for (dx, dy, step) in neighbours {
                let (x, y) = (x + dx, y + dy);
                if (0..width as isize).contains(&x) && (0..height as isize).contains(&y) {
                    let other = distance[y as usize * width + x as usize];
                    distance[i] = distance[i].min(other + step);
                }
            }
        }
    };
    pass(&mut (0..mask.len()), -1);
    pass(&mut (0..mask.len()).rev(), 1);
    distance
        .into_iter()
        .map(|distance| (255.0 * distance / far).round() as u8)
        .collect()
}

/// A picture with a border, in colours of its edge with noise, to a size of at least that; what is
/// to be painted reaches `feather` pixels into it.
fn extended(
    picture: &Image,
    border: Border,
    (width, height): (usize, usize),
    feather: usize,
) -> (Image, Vec<bool>) {
    let (mut rgb, mut mask) = (
        Vec::with_capacity(width * height * 3),
        Vec::with_capacity(width * height),
    );
    // the same whenever it is drawn again (Marsaglia 2003, xorshift)
    let mut state = 0x2545_f491_u32;
    let mut noise = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as i32 % (2 * BORDER_NOISE + 1) - BORDER_NOISE
    };
    // the sides that are extended, as the size may be rounded up
    let (right, bottom) = (
        width - border.left - picture.width,
        height - border.top - picture.height,
    );
    let is_kept = |at: usize, before: usize, length: usize, after: usize| {
        let start = before + if before > 0 { feather } else { 0 };
        let end = before + length - if after > 0 { feather.min(length) } else { 0 };
        (start..end).contains(&at)
    };
    for y in 0..height {
        for x in 0..width {
            let clamp =
                |at: usize, before: usize, length: usize| at.saturating_sub(before).min(length - 1);
            let (from_x, from_y) = (
                clamp(x, border.left, picture.width),
                clamp(y, border.top, picture.height),
            );
            let is_new = (from_x + border.left, from_y + border.top) != (x, y);
            let start = (from_y * picture.width + from_x) * 3;
            for level in picture.rgb.iter().skip(start).take(3) {
                rgb.push(if is_new {
                    (i32::from(*level) + noise()).clamp(0, 255) as u8
                } else {
                    *level
                });
            }
            mask.push(
                !(is_kept(x, border.left, picture.width, right)
                    && is_kept(y, border.top, picture.height, bottom)),
            );
        }
    }
    (Image { width, height, rgb }, mask)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_repainted_fades_in_over_the_feather_and_never_outside_the_mask() {
        let width = 40;
        let mask: Vec<bool> = (0..width * 30)
            .map(|i| (10..40).contains(&(i % width)))
            .collect();
        let weights = feathered(&mask, width, 3);
        let row = &weights[15 * width..16 * width];
        assert_eq!(row[..10], [0; 10]);
        assert_eq!(row[10..14], [64, 128, 191, 255]);
        assert!(
            row[14..].iter().all(|weight| *weight == 255),
            "the picture's edge is none of the mask's: {row:?}"
        );
        assert!(
            feathered(&mask, width, 0)
                .iter()
                .zip(&mask)
                .all(|(weight, is)| *weight == if *is { 255 } else { 0 })
        );
    }

    #[test]
    fn the_area_around_a_mask_has_the_drawings_proportions_and_stays_inside() {
        let area = Region {
            left: 90,
            top: 10,
            width: 10,
            height: 4,
        };
        assert_eq!(
            area.grown(3, (64, 64), (200, 100)),
            Region {
                left: 87,
                top: 4,
                width: 16,
                height: 16
            }
        );
        assert_eq!(
            area.grown(3, (64, 64), (100, 100)),
            Region {
                left: 84,
                top: 4,
                width: 16,
                height: 16
            }
        );
        assert_eq!(
            area.grown(60, (64, 64), (100, 50)),
            Region {
                left: 0,
                top: 0,
                width: 100,
                height: 50
            }
        );
        assert_eq!(
            area.grown(0, (64, 128), (100, 100)),
            Region {
                left: 90,
                top: 2,
                width: 10,
                height: 20
            }
        );
    }

    #[test]
    fn a_border_continues_the_edge_and_the_feather_reaches_into_the_picture() {
        let picture = Image {
            width: 8,
            height: 8,
            rgb: (0..64)
                .flat_map(|i| [if i % 8 < 4 { 50 } else { 200 }; 3])
                .collect(),
        };
        let border = Border {
            left: 6,
            bottom: 2,
            ..Border::default()
        };
        let (whole, mask) = extended(&picture, border, (16, 12), 2);
        let at = |x: usize, y: usize| whole.rgb[(y * 16 + x) * 3];
        assert!(
            (50 - 24..=50 + 24).contains(&i32::from(at(0, 0)))
                && (200 - 24..=200 + 24).contains(&i32::from(at(15, 11)))
        );
        assert_eq!((at(6, 0), at(13, 7)), (50, 200));
        let kept: Vec<usize> = (0..16).filter(|x| !mask[3 * 16 + x]).collect();
        assert_eq!(
            kept,
            [8, 9, 10, 11],
            "two pixels at the left, and two at the right, where the size was rounded up"
        );
        assert!(mask[6 * 16 + 9] && !mask[5 * 16 + 9] && !mask[9]);
    }
}
