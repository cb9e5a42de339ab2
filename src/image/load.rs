//! Pictures that come from outside: what img2img, masks and upscaling start from.
//!
//! Hides formats, colour modes, orientation and limits: whatever a file holds, an [`Input`] is
//! 8-bit RGB the right way up, with its transparency apart. [`Image::fit`] brings it to the size
//! of a drawing. Pictures that we drew ourselves, and what they remember, are [`crate::image`]'s.

use std::f64::consts::PI;
use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

use anyhow::{Context, Result, bail};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::hex::hex;
use crate::image::Image;
use crate::image::MAX_SIDE_PX;
use crate::weights::file::require_finite;

/// The largest file, and the largest decoded picture: 16384x16384 in 8-bit RGB still fits.
const MAX_BYTES: u64 = 1 << 30;

/// A picture from a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// The colours as stored, also where nothing of them shows.
    pub picture: Image,
    /// [height, width], 0 for transparent; `None` where all of it is opaque.
    pub alpha: Option<Vec<u8>>,
    /// What its colours mean (ICC), where that is said and is of RGB; they are as stored.
    pub icc_profile: Option<Vec<u8>>,
}

/// How a picture of another shape gets to a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Fit {
    /// The largest part from its middle that has the shape.
    Crop,
    /// The whole in the middle; its edges are drawn out over what it leaves.
    Pad,
    /// The whole, distorted.
    Stretch,
}

impl Input {
    /// Reads a PNG, JPEG, WebP, TIFF, BMP or GIF file of any colour mode, turned as its EXIF
    /// orientation says; of an animation the first frame. 16 bits are rounded to 8, colour profiles
    /// are not applied. Errors, naming the file, if it cannot be read, is no such picture, is cut
    /// short, or is over [`MAX_SIDE_PX`] on a side or a gigabyte in memory, which its header tells
    /// before anything is decoded.
    pub fn read(path: &Path) -> Result<Input> {
        Ok(Self::with_bytes(path)?.0)
    }

    /// The same, and the bytes of the file.
    pub fn with_bytes(path: &Path) -> Result<(Input, Vec<u8>)> {
        let name = path.display();
        if path.is_dir() {
            bail!("`{name}` is a folder, where a picture is expected\n\nhint: name one file of it");
        }
        require_finite(path)?;
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes))
            .with_context(|| format!("cannot read the picture `{name}`\n\nhint: is the path right, and may you read it?"))?;
        let input =
            Input::decode(&bytes).with_context(|| format!("cannot read the picture `{name}`"))?;
        Ok((input, bytes))
    }

    fn decode(bytes: &[u8]) -> Result<Input> {
        const KINDS: &str = "pictures may be PNG, JPEG, WebP, TIFF, BMP or GIF";
        const DAMAGED: &str = "it is damaged or cut short\n\nhint: copy or export it again";
        if bytes.is_empty() {
            bail!("it is empty\n\nhint: {KINDS}");
        }
        if bytes.len() as u64 > MAX_BYTES {
            bail!(
                "the file has more than {} MB\n\nhint: {KINDS}, and smaller",
                MAX_BYTES >> 20
            );
        }
        let Some(format) = image::guess_format(bytes)
            .ok()
            .filter(ImageFormat::reading_enabled)
        else {
            bail!("it is no picture of a known kind\n\nhint: {KINDS}");
        };
        let mut limits = Limits::no_limits();
        limits.max_alloc = Some(MAX_BYTES);
        let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
        reader.limits(limits);
        let mut decoder = reader.into_decoder().context(DAMAGED)?;
        let (width, height) = decoder.dimensions();
        if width.max(height) as usize > MAX_SIDE_PX || decoder.total_bytes() > MAX_BYTES {
            let most = MAX_BYTES >> 20;
            bail!(
                "it is {width}x{height} pixels, more than {MAX_SIDE_PX} on a side or {most} MB in memory\n\nhint: scale it down first"
            );
        }
        if width == 0 || height == 0 || format == ImageFormat::Jpeg && !jpeg_is_whole(bytes) {
            bail!(DAMAGED);
        }
        // A garbled EXIF block is no reason to refuse the picture.
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        // That of CMYK or grey means nothing once the picture is RGB.
        let icc_profile = decoder.icc_profile().ok().flatten();
        let icc_profile = icc_profile.filter(|icc| icc.get(16..20) == Some(b"RGB "));
        let mut decoded = DynamicImage::from_decoder(decoder).context(DAMAGED)?;
        decoded.apply_orientation(orientation);
        let (width, height) = (decoded.width() as usize, decoded.height() as usize);
        let alpha = decoded.color().has_alpha().then(|| {
            decoded
                .to_rgba8()
                .pixels()
                .map(|pixel| pixel.0[3])
                .collect()
        });
        let alpha = alpha.filter(|alpha: &Vec<u8>| alpha.iter().any(|&level| level != u8::MAX));
        Ok(Input {
            picture: Image {
                width,
                height,
                rgb: decoded.into_rgb8().into_raw(),
            },
            alpha,
            icc_profile,
        })
    }

    /// SHA-256 of the decoded pixels, RGB and then alpha where there is any, as 64 lower-case hex
    /// digits: it knows a picture again in another file.
    pub fn sha256(&self) -> String {
        let hash = Sha256::new()
            .chain_update(&self.picture.rgb)
            .chain_update(self.alpha.as_deref().unwrap_or_default());
        hex(&hash.finalize())
    }

    /// What a white page behind it shows: where a picture starts that has no use for transparency.
    pub fn over_white(&self) -> Image {
        self.over(u8::MAX)
    }

    fn over(&self, background: u8) -> Image {
        let mut picture = self.picture.clone();
        for (pixel, &alpha) in picture
            .rgb
            .chunks_exact_mut(3)
            .zip(self.alpha.as_deref().unwrap_or_default())
        {
            let (alpha, rest) = (u32::from(alpha), u32::from(u8::MAX - alpha));
            for level in pixel {
                *level =
                    ((u32::from(*level) * alpha + u32::from(background) * rest + 127) / 255) as u8;
            }
        }
        picture
    }

    /// It as a mask [height, width], by its brightness (ITU-R 601, as Pillow's `L`): 255 is
    /// repainted, 0 is kept. What is transparent is kept.
    pub fn mask(&self, width: usize, height: usize, fit: Fit) -> Vec<u8> {
        let luma = |p: &[u8]| {
            ((u32::from(p[0]) * 19595 + u32::from(p[1]) * 38470 + u32::from(p[2]) * 7471 + 0x8000)
                >> 16) as u8
        };
        let (from_width, from_height) = (self.picture.width, self.picture.height);
        let grey: Vec<u8> = self.over(0).rgb.chunks_exact(3).map(luma).collect();
        fitted::<1>(&grey, [from_width, from_height], [width, height], fit)
    }

    /// Its transparency as a mask [height, width]: 255, to be repainted, where nothing shows.
    /// `None` where all is opaque.
    pub fn transparency(&self, width: usize, height: usize, fit: Fit) -> Option<Vec<u8>> {
        let clear: Vec<u8> = self
            .alpha
            .as_ref()?
            .iter()
            .map(|alpha| u8::MAX - alpha)
            .collect();
        Some(fitted::<1>(
            &clear,
            [self.picture.width, self.picture.height],
            [width, height],
            fit,
        ))
    }
}

impl Image {
    /// Brings it to a size, in the same bits as Pillow's `resize` with `LANCZOS`, which diffusers
    /// uses; a picture that has the size stays as it is. No side may be 0.
    pub fn fit(&self, width: usize, height: usize, fit: Fit) -> Image {
        Image {
            width,
            height,
            rgb: fitted::<3>(&self.rgb, [self.width, self.height], [width, height], fit),
        }
    }
}

/// Brings a picture and its transparency [height, width] to a size as Pillow's `resize` does: a colour
/// counts by how much of it shows.
pub fn fit_with_alpha(
    picture: &Image,
    alpha: &[u8],
    width: usize,
    height: usize,
) -> (Image, Vec<u8>) {
    let from = [picture.width, picture.height];
    let mut shown = picture.clone();
    for (pixel, alpha) in shown.rgb.chunks_exact_mut(3).zip(alpha) {
        for level in pixel {
            let product = u32::from(*level) * u32::from(*alpha) + 128;
            *level = ((product + (product >> 8)) >> 8) as u8;
        }
    }
    let mut shown = shown.fit(width, height, Fit::Stretch);
    let alpha = resized_levels(alpha, from, [width, height]);
    for (pixel, alpha) in shown.rgb.chunks_exact_mut(3).zip(&alpha) {
        for level in pixel.iter_mut().filter(|_| !matches!(*alpha, 0 | u8::MAX)) {
            *level = (u32::from(*level) * 255 / u32::from(*alpha)).min(255) as u8;
        }
    }
    (shown, alpha)
}

/// Levels [h, w] at another size, distorted if its shape is another.
pub fn resized_levels(levels: &[u8], from: [usize; 2], to: [usize; 2]) -> Vec<u8> {
    fitted::<1>(levels, from, to, Fit::Stretch)
}

/// The decoder fills in what a JPEG lacks at its end, so its end is looked for: the marker EOI
/// after the first scan began. An EXIF thumbnail has one too, but lies in a segment before.
fn jpeg_is_whole(bytes: &[u8]) -> bool {
    const SOS: u8 = 0xda;
    let mut at = 2;
    while let Some(&[0xff, marker, high, low]) = bytes
        .get(at..at + 4)
        .and_then(|segment| <&[u8; 4]>::try_from(segment).ok())
    {
        if marker == SOS {
            return bytes[at..].windows(2).any(|pair| pair == [0xff, 0xd9]);
        }
        // A marker may be preceded by any number of fill bytes.
        at += if marker == 0xff {
            1
        } else {
            2 + usize::from(u16::from_be_bytes([high, low]))
        };
    }
    false
}

/// Pixels [h, w, C] at another size.
fn fitted<const C: usize>(pixels: &[u8], from: [usize; 2], to: [usize; 2], fit: Fit) -> Vec<u8> {
    let [from_x, from_y] = from.map(|side| side as f64);
    let [to_x, to_y] = to.map(|side| side as f64);
    match fit {
        Fit::Stretch => resized::<C>(pixels, from, to, [[0.0, from_x], [0.0, from_y]]),
        Fit::Crop => {
            let scale = (from_x / to_x).min(from_y / to_y);
            let middle =
                |from: f64, to: f64| [(from - to * scale) / 2.0, (from + to * scale) / 2.0];
            resized::<C>(
                pixels,
                from,
                to,
                [middle(from_x, to_x), middle(from_y, to_y)],
            )
        }
        Fit::Pad => {
            let scale = (to_x / from_x).min(to_y / from_y);
            let side = |from: f64, to: usize| ((from * scale).round() as usize).clamp(1, to);
            let (width, height) = (side(from_x, to[0]), side(from_y, to[1]));
            let inner = resized::<C>(
                pixels,
                from,
                [width, height],
                [[0.0, from_x], [0.0, from_y]],
            );
            let inside = |at: usize, to: usize, side: usize| {
                at.saturating_sub((to - side) / 2).min(side - 1)
            };
            let rows = (0..to[1]).map(|y| inside(y, to[1], height) * width);
            rows.flat_map(|row| (0..to[0]).map(move |x| (row + inside(x, to[0], width)) * C))
                .flat_map(|at| inner[at..at + C].to_vec())
                .collect()
        }
    }
}

/// Pixels [h, w, C] of a part of a picture, its left and right, then top and bottom edge, at
/// another size: Pillow's `ImagingResample`, columns before rows, with 8 bits between.
fn resized<const C: usize>(
    pixels: &[u8],
    from: [usize; 2],
    to: [usize; 2],
    part: [[f64; 2]; 2],
) -> Vec<u8> {
    let [width, height] = to;
    let whole = |axis: usize| from[axis] == to[axis] && part[axis] == [0.0, from[axis] as f64];
    let mut rows = pixels.to_vec();
    if !whole(0) {
        let taps = Taps::of(from[0], width, part[0]);
        rows = vec![0; width * from[1] * C];
        rows.par_chunks_exact_mut(width * C)
            .zip(pixels.par_chunks_exact(from[0] * C))
            .for_each(|(out, row)| {
                for (pixel, (first, weights)) in out.chunks_exact_mut(C).zip(&taps.0) {
                    let mut sums = [HALF; C];
                    for (source, weight) in row[first * C..].chunks_exact(C).zip(weights) {
                        sums.iter_mut()
                            .zip(source)
                            .for_each(|(sum, &level)| *sum += weight * i32::from(level));
                    }
                    pixel
                        .iter_mut()
                        .zip(sums)
                        .for_each(|(level, sum)| *level = rounded(sum));
                }
            });
    }
    if whole(1) {
        return rows;
    }
    let taps = Taps::of(from[1], height, part[1]);
    let mut out = vec![0; width * height * C];
    out.par_chunks_exact_mut(width * C)
        .zip(&taps.0)
        .for_each(|(out, (first, weights))| {
            let mut sums = vec![HALF; width * C];
            for (row, weight) in rows[first * width * C..]
                .chunks_exact(width * C)
                .zip(weights)
            {
                sums.iter_mut()
                    .zip(row)
                    .for_each(|(sum, &level)| *sum += weight * i32::from(level));
            }
            out.iter_mut()
                .zip(sums)
                .for_each(|(level, sum)| *level = rounded(sum));
        });
    out
}

/// Weights are integers of so many bits behind the point; sums then fit into 32 bits.
const POINT_BITS: u32 = 22;
const HALF: i32 = 1 << (POINT_BITS - 1);

fn rounded(sum: i32) -> u8 {
    (sum >> POINT_BITS).clamp(0, 255) as u8
}

/// For each pixel of a resized row the first pixel of the source that it is made of, and the
/// weights from there on.
struct Taps(Vec<(usize, Vec<i32>)>);

impl Taps {
    fn of(from: usize, to: usize, [start, end]: [f64; 2]) -> Taps {
        const LOBES: f64 = 3.0;
        let sinc = |x: f64| {
            if x == 0.0 {
                1.0
            } else {
                (PI * x).sin() / (PI * x)
            }
        };
        let lanczos = |x: f64| {
            if (-LOBES..LOBES).contains(&x) {
                sinc(x) * sinc(x / LOBES)
            } else {
                0.0
            }
        };
        let step = (end - start) / to as f64;
        // Reduced, each pixel of the result sees all of the source that lies under it.
        let spread = step.max(1.0);
        let taps = (0..to).map(|i| {
            let centre = start + (i as f64 + 0.5) * step;
            let first = (centre - LOBES * spread + 0.5).max(0.0) as usize;
            let last = ((centre + LOBES * spread + 0.5) as usize).min(from);
            let weights: Vec<f64> = (first..last)
                .map(|at| lanczos((at as f64 - centre + 0.5) / spread))
                .collect();
            let sum: f64 = weights.iter().sum();
            (
                first,
                weights
                    .iter()
                    .map(|weight| (weight / sum * f64::from(1 << POINT_BITS)).round() as i32)
                    .collect(),
            )
        });
        Taps(taps.collect())
    }
}
