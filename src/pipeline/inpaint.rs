//! What a picture is drawn over: a source picture brought to its size, which part of it is
//! repainted, and how what was drawn is put back.
//!
//! [`Sources`] makes settings of arguments and reads no more of a file than once; [`Canvas`] makes
//! pixels of settings. Hides the geometry: borders, the box around what is repainted, and how a
//! repainted part fades in.

use crate::image::Picture;
use crate::image::load::{Fit, Input, resized_levels};
use crate::pipeline::options::JobOptions;
use crate::pipeline::params::{Border, Source};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Result as TensorResult, Tensor};
use std::collections::HashMap;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Pixels over which a repainted part fades in where nobody says.
const FEATHER: usize = 8;
/// A mask's level from which on it is white, as in diffusers.
const WHITE: u8 = 128;
/// How far the noise of a new border goes from the colour of the edge, in levels.
const BORDER_NOISE: i32 = 24;

/// What is known of the files that a list names.
#[derive(Default)]
pub struct Sources<'a> {
    files: HashMap<PathBuf, Known>,
    /// by the address of the options, which are borrowed as long: pictures that differ by their
    /// seeds share them
    found: HashMap<*const JobOptions, Option<Found>>,
    options: PhantomData<&'a JobOptions>,
}

/// A source picture, and its width and height.
pub type Found = (Arc<Source>, (usize, usize));

#[derive(Clone)]
struct Known {
    size: (usize, usize),
    hash: Arc<str>,
    is_partly_transparent: bool,
}

impl<'a> Sources<'a> {
    /// What the options say of a source picture. Errors if there is none and they say more.
    pub fn find(&mut self, options: &'a JobOptions) -> Result<Option<Found>> {
        if let Some(found) = self.found.get(&std::ptr::from_ref(options)) {
            return Ok(found.clone());
        }
        let found = self.look(options)?;
        self.found.insert(options, found.clone());
        Ok(found)
    }

    fn look(&mut self, options: &JobOptions) -> Result<Option<Found>> {
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
        let known = self.read(image)?;
        let mask = options
            .mask
            .as_deref()
            .map(|mask| Ok::<_, anyhow::Error>((mask, self.read(mask)?)))
            .transpose()?;
        let text = |path: &Path| -> Result<Arc<str>> {
            let text = path
                .to_str()
                .with_context(|| format!("the name `{}` is no UTF-8 text", path.display()))?;
            Ok(text.into())
        };
        let source = Source {
            image: text(image)?,
            image_hash: known.hash,
            fit: options.fit.unwrap_or(Fit::Crop),
            mask: mask.as_ref().map(|(path, _)| text(path)).transpose()?,
            mask_hash: mask.map(|(_, known)| known.hash),
            alpha: known.is_partly_transparent
                && options.mask.is_none()
                && options.extend.is_none(),
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
        let (width, height) = known.size;
        let border = source.extend.unwrap_or_default();
        Ok(Some((
            Arc::new(source),
            (
                width + border.left + border.right,
                height + border.top + border.bottom,
            ),
        )))
    }

    fn read(&mut self, path: &Path) -> Result<Known> {
        if let Some(known) = self.files.get(path) {
            return Ok(known.clone());
        }
        let input = Input::read(path)?;
        let is_partly_transparent = input
            .alpha
            .as_ref()
            .is_some_and(|alpha| alpha.iter().any(|level| u8::MAX - level >= WHITE));
        let known = Known {
            size: (input.picture.width, input.picture.height),
            hash: input.sha256().into(),
            is_partly_transparent,
        };
        self.files.insert(path.into(), known.clone());
        Ok(known)
    }
}

impl Source {
    /// Whether only a part of it is repainted.
    pub fn repaints(&self) -> bool {
        self.mask.is_some() || self.alpha || self.extend.is_some()
    }
}

/// A source picture of the drawing's size.
pub struct Canvas {
    pub picture: Picture,
    /// [height * width], whether a pixel is repainted; none if all are
    mask: Option<Vec<bool>>,
    back: Option<Back>,
}

/// Where a repainted part goes.
struct Back {
    whole: Picture,
    /// [height * width] of the whole: how much of it comes from what is drawn, of 255
    share: Vec<u8>,
    place: Area,
}

/// Pixels of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Area {
    left: usize,
    top: usize,
    width: usize,
    height: usize,
}

impl Canvas {
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
                back: None,
            });
        };
        let Some(bounds) = bounds(&mask, whole.width) else {
            let name = source.mask.as_ref().unwrap_or(&source.image);
            bail!(
                "`{name}` leaves nothing to repaint\n\nhint: what is white in a mask is repainted, or what is transparent without one"
            );
        };
        let place = match source.only_masked {
            Some(padding) => bounds.grown(padding, (width, height), (whole.width, whole.height)),
            None => Area {
                left: 0,
                top: 0,
                width: whole.width,
                height: whole.height,
            },
        };
        let levels: Vec<u8> = mask.iter().map(|is| if *is { 255 } else { 0 }).collect();
        let part = Picture {
            width: place.width,
            height: place.height,
            rgb: place.of(&whole.rgb, whole.width, 3),
        };
        let levels = resized_levels(
            &place.of(&levels, whole.width, 1),
            [place.width, place.height],
            [width, height],
        );
        let share = shares(&mask, whole.width, source.feather);
        Ok(Self {
            picture: part.fit(width, height, Fit::Stretch),
            mask: Some(is_white(levels)),
            back: Some(Back {
                whole,
                share,
                place,
            }),
        })
    }

    /// RGB [1, h, w, 3] in 0..=1 with grey where it is repainted; none if all of it is.
    pub fn kept_rgb(&self, device: &Device) -> TensorResult<Option<Tensor>> {
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

    /// Those of the source that drawings are put back into: 4 bytes each.
    pub fn pixels(&self) -> usize {
        self.back.as_ref().map_or(0, |back| back.share.len())
    }

    /// The picture with what was drawn in its place. Pixels that are not repainted are those of the
    /// source.
    pub fn put_back(&self, drawn: Picture) -> Picture {
        let Some(Back {
            whole,
            share,
            place,
        }) = &self.back
        else {
            return drawn;
        };
        let mut whole = whole.clone();
        let drawn = drawn.fit(place.width, place.height, Fit::Stretch);
        for (y, row) in drawn.rgb.chunks_exact(place.width * 3).enumerate() {
            let start = (place.top + y) * whole.width + place.left;
            let shares = share.iter().skip(start);
            let pixels = whole.rgb.chunks_exact_mut(3).skip(start);
            for ((old, new), share) in pixels.zip(row.chunks_exact(3)).zip(shares) {
                for (old, new) in old.iter_mut().zip(new) {
                    let (a, b, share) = (u32::from(*old), u32::from(*new), u32::from(*share));
                    *old = ((a * (255 - share) + b * share + 127) / 255) as u8;
                }
            }
        }
        whole
    }
}

/// Reads a file that is known by its hash.
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
fn bounds(mask: &[bool], width: usize) -> Option<Area> {
    let rows = || mask.chunks_exact(width);
    let any = |row: &[bool]| row.contains(&true);
    let (top, bottom) = (rows().position(any)?, rows().rposition(any)?);
    let left = rows()
        .filter_map(|row| row.iter().position(|is| *is))
        .min()?;
    let right = rows()
        .filter_map(|row| row.iter().rposition(|is| *is))
        .max()?;
    Some(Area {
        left,
        top,
        width: right - left + 1,
        height: bottom - top + 1,
    })
}

impl Area {
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
fn shares(mask: &[bool], width: usize, feather: usize) -> Vec<u8> {
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
    picture: &Picture,
    border: Border,
    (width, height): (usize, usize),
    feather: usize,
) -> (Picture, Vec<bool>) {
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
    (Picture { width, height, rgb }, mask)
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
        let share = shares(&mask, width, 3);
        let row = &share[15 * width..16 * width];
        assert_eq!(row[..10], [0; 10]);
        assert_eq!(row[10..14], [64, 128, 191, 255]);
        assert!(
            row[14..].iter().all(|share| *share == 255),
            "the picture's edge is none of the mask's: {row:?}"
        );
        assert!(
            shares(&mask, width, 0)
                .iter()
                .zip(&mask)
                .all(|(share, is)| *share == if *is { 255 } else { 0 })
        );
    }

    #[test]
    fn the_area_around_a_mask_has_the_drawings_proportions_and_stays_inside() {
        let area = Area {
            left: 90,
            top: 10,
            width: 10,
            height: 4,
        };
        assert_eq!(
            area.grown(3, (64, 64), (200, 100)),
            Area {
                left: 87,
                top: 4,
                width: 16,
                height: 16
            }
        );
        assert_eq!(
            area.grown(3, (64, 64), (100, 100)),
            Area {
                left: 84,
                top: 4,
                width: 16,
                height: 16
            }
        );
        assert_eq!(
            area.grown(60, (64, 64), (100, 50)),
            Area {
                left: 0,
                top: 0,
                width: 100,
                height: 50
            }
        );
        assert_eq!(
            area.grown(0, (64, 128), (100, 100)),
            Area {
                left: 90,
                top: 2,
                width: 10,
                height: 20
            }
        );
    }

    #[test]
    fn a_border_continues_the_edge_and_the_feather_reaches_into_the_picture() {
        let picture = Picture {
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
