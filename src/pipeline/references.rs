//! Reference pictures, which an editing model looks at while it draws.
//!
//! [`ReferenceFinder`] makes settings of options and reads each file once; [`ReferenceLatents`]
//! encodes each picture once for all images of a run that it is given to. Hides how a picture is
//! brought to a size that the network takes, which is not that of the drawing.

use super::Run;
use super::job::Job;
use super::options::JobOptions;
use super::settings::{Reference, Settings};
use crate::image::Image;
use crate::image::load::{Fit, Input};
use crate::model::Posterior;
use anyhow::{Context, Result, ensure};
use candle_core::{Result as TensorResult, Tensor};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The most that one image may be given. diffusers has no limit; Black Forest Labs take up to ten
/// for FLUX.2's largest models, and four for klein (docs.bfl.ml).
pub const MAX_REFERENCES: usize = 10;
/// What diffusers' `Flux2ImageProcessor.check_image_input` asks of a picture: the shortest side, and
/// how much longer the other may be.
const MIN_SIDE_PX: usize = 64;
const MAX_ASPECT: usize = 8;
/// The number of pixels above which `Flux2KleinPipeline` makes a picture smaller.
const MAX_AREA_PX: usize = 1024 * 1024;
/// The sizes that FLUX.1 Kontext was trained on, `PREFERRED_KONTEXT_RESOLUTIONS` of diffusers.
const KONTEXT_SIZES: [(usize, usize); 17] = [
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
];
/// Pictures whose latents are kept for later images at most.
const MAX_CACHED: usize = 64;

/// Finds the reference pictures that options name.
#[derive(Default)]
pub struct ReferenceFinder {
    /// one for all images of a run that have the same
    found: HashMap<Vec<PathBuf>, Arc<[Reference]>>,
    /// the same at the size of drawings
    drawn: HashMap<Drawn, Arc<[Reference]>>,
}

/// Files, and the size of a drawing.
type Drawn = (Vec<PathBuf>, (usize, usize));

impl ReferenceFinder {
    /// Returns the reference pictures that the options name, in their order, in sizes by this rule.
    /// Errors if a file cannot be read, or has a shape that the network was not trained on.
    pub fn find(&mut self, options: &JobOptions, rule: ReferenceSizes) -> Result<Arc<[Reference]>> {
        let Some(paths) = options.reference.as_ref().filter(|paths| !paths.is_empty()) else {
            return Ok(Arc::default());
        };
        if let Some(found) = self.found.get(paths) {
            return Ok(found.clone());
        }
        let read = |path: &PathBuf| {
            let image = path
                .to_str()
                .with_context(|| format!("the name `{}` is not UTF-8 text", path.display()))?;
            let input = Input::read(path)?;
            let own = (input.picture.width, input.picture.height);
            let [_, (width, height)] = rule
                .of(own)
                .with_context(|| format!("`{image}` cannot be a reference picture"))?;
            Ok(Reference {
                image: image.into(),
                image_hash: input.sha256().into(),
                width,
                height,
            })
        };
        let found: Arc<[Reference]> = paths.iter().map(read).collect::<Result<_>>()?;
        self.found.insert(paths.clone(), found.clone());
        Ok(found)
    }

    /// Returns the reference pictures that the options name as a drawing of this size has them, which
    /// is another one by [`ReferenceSizes::Drawing`] only.
    pub fn for_drawing(
        &mut self,
        options: &JobOptions,
        rule: ReferenceSizes,
        found: Arc<[Reference]>,
        (width, height): (usize, usize),
    ) -> Arc<[Reference]> {
        let Some(paths) = options.reference.as_ref().filter(|_| rule.is_of_drawing()) else {
            return found;
        };
        let key = (paths.clone(), (width, height));
        let of_drawing = |reference: &Reference| Reference {
            width,
            height,
            ..reference.clone()
        };
        self.drawn
            .entry(key)
            .or_insert_with(|| found.iter().map(of_drawing).collect())
            .clone()
    }
}

/// How a picture is brought to a size that the network takes.
#[derive(Debug, Clone, Copy)]
pub enum ReferenceSizes {
    /// made smaller where it is large, then cropped to whole latents of so many pixels a side
    Flux2(usize),
    /// resized to the size of the nearest shape that it was trained on
    Kontext,
    /// resized to the size of what is drawn, which is its own where nobody says
    Drawing,
}

impl ReferenceSizes {
    /// The sizes that a picture is resized to, and then cropped to. Errors if its shape is out of
    /// bounds.
    fn of(self, own: (usize, usize)) -> Result<[(usize, usize); 2]> {
        match self {
            Self::Flux2(factor) => sizes(own, factor),
            Self::Kontext => {
                let aspect = own.0 as f64 / own.1.max(1) as f64;
                let off = |(w, h): &(usize, usize)| (aspect - *w as f64 / *h as f64).abs();
                let nearest = KONTEXT_SIZES
                    .into_iter()
                    .min_by(|a, b| off(a).total_cmp(&off(b)));
                Ok([nearest.unwrap_or(own); 2])
            }
            Self::Drawing => Ok([own; 2]),
        }
    }

    fn is_of_drawing(self) -> bool {
        matches!(self, Self::Drawing)
    }
}

/// The sizes that a picture is resized to, and then cropped to, as diffusers' `Flux2KleinPipeline`
/// does it: at most a million pixels, then whole latents. Errors if its shape is out of bounds.
fn sizes((width, height): (usize, usize), factor: usize) -> Result<[(usize, usize); 2]> {
    let shortest = MIN_SIDE_PX.max(factor);
    ensure!(
        width.min(height) >= shortest,
        "it is {width}x{height} pixels, at least {shortest} a side are needed\n\nhint: enlarge it first: `sdgen upscale`"
    );
    ensure!(
        width.max(height) <= MAX_ASPECT * width.min(height),
        "it is {width}x{height} pixels, one side more than {MAX_ASPECT} times the other\n\nhint: crop it first"
    );
    let area = width * height;
    let resized = if area > MAX_AREA_PX {
        let scale = (MAX_AREA_PX as f64 / area as f64).sqrt();
        let smaller = |side: usize| (side as f64 * scale) as usize;
        (smaller(width), smaller(height))
    } else {
        (width, height)
    };
    let whole = |side: usize| side / factor * factor;
    Ok([resized, (whole(resized.0), whole(resized.1))])
}

/// A picture as the network looks at it while it makes a `drawing` of this size: its middle, in a
/// size by this rule.
fn prepared(picture: &Image, rule: ReferenceSizes, drawing: (usize, usize)) -> Result<Image> {
    let [(width, height), cropped] = match rule {
        ReferenceSizes::Drawing => [drawing; 2],
        _ => rule.of((picture.width, picture.height))?,
    };
    Ok(middle(&picture.fit(width, height, Fit::Stretch), cropped))
}

/// The middle of a picture, which is not smaller; where that is not exact, more is cut off at the
/// right and at the bottom.
fn middle(picture: &Image, (width, height): (usize, usize)) -> Image {
    let left = (picture.width - width) / 2;
    let top = (picture.height - height) / 2;
    let rows = picture.rgb.chunks_exact(picture.width * 3);
    let row = |row: &[u8]| {
        let levels = row.iter().copied().skip(left * 3);
        levels.take(width * 3).collect::<Vec<u8>>()
    };
    let rgb = rows.skip(top).take(height).flat_map(row).collect();
    Image { width, height, rgb }
}

/// The hash of a picture, whether it is encoded in tiles, and the size of the drawing where its own
/// depends on that.
type Key = (Arc<str>, bool, Option<(usize, usize)>);

fn key(reference: &Reference, settings: &Settings, rule: ReferenceSizes) -> Key {
    let drawing = (settings.width, settings.height);
    let drawing = rule.is_of_drawing().then_some(drawing);
    (reference.image_hash.clone(), settings.vae_tiling, drawing)
}

/// The latents of the reference pictures of a run.
#[derive(Default)]
pub struct ReferenceLatents(HashMap<Key, Posterior>);

impl ReferenceLatents {
    /// Returns the latents of a batch's reference pictures, [b, h, w, c] of each in its turn. All
    /// images of the batch have as many, of the same sizes.
    pub fn get(&mut self, batch: &[&Job], run: &Run) -> Result<Vec<Posterior>> {
        let count = batch.first().map_or(0, |job| job.settings.references.len());
        let mut all = vec![];
        for nth in 0..count {
            let mut latents = vec![];
            for job in batch {
                let settings = &job.settings;
                if let Some(reference) = settings.references.get(nth) {
                    latents.push(self.of_one(reference, settings, run)?);
                }
            }
            all.push(Posterior::cat(latents.iter())?);
        }
        Ok(all)
    }

    /// [1, h, w, c]
    fn of_one(
        &mut self,
        reference: &Reference,
        settings: &Settings,
        run: &Run,
    ) -> Result<Posterior> {
        let rule = run.pipeline.config.reference_sizes();
        let key = key(reference, settings, rule);
        if let Some(latents) = self.0.get(&key) {
            return Ok(latents.clone());
        }
        let Reference {
            image, image_hash, ..
        } = reference;
        let input = Input::read(Path::new(&**image))?;
        ensure!(
            input.sha256() == **image_hash,
            "`{image}` is another picture than it was\n\nhint: what is drawn after it would be another one too"
        );
        let drawing = (settings.width, settings.height);
        let picture = prepared(&input.over_white(), rule, drawing)?;
        let latents = run.encode(&picture.to_tensor(run.device())?, settings)?;
        if self.0.len() >= MAX_CACHED {
            self.0.clear();
        }
        self.0.insert(key, latents.clone());
        Ok(latents)
    }

    /// Whether one of these jobs needs an encoder that has not run for it yet.
    pub fn needs_encoder<'j>(
        &self,
        mut jobs: impl Iterator<Item = &'j Job>,
        rule: ReferenceSizes,
    ) -> bool {
        jobs.any(|job| {
            let settings = &job.settings;
            let is_known = |it: &Reference| self.0.contains_key(&key(it, settings, rule));
            !settings.references.iter().all(is_known)
        })
    }
}

/// Latents [b, h, w, c] of each reference picture, for a network that runs so often for each image
/// of the batch: as in diffusers, the middle of the distribution.
pub fn for_passes(latents: &[Posterior], passes: usize) -> TensorResult<Vec<Tensor>> {
    let repeat = |latents: &Posterior| Tensor::cat(&vec![&latents.mean; passes], 0);
    latents.iter().map(repeat).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_diffusers_pipeline() {
        // computed by Flux2ImageProcessor._resize_to_target_area and the lines after it
        for (own, expected) in [
            ((100, 70), [(100, 70), (96, 64)]),
            ((64, 64), [(64, 64), (64, 64)]),
            ((1024, 1024), [(1024, 1024), (1024, 1024)]),
            ((1025, 1024), [(1024, 1023), (1024, 1008)]),
            ((4000, 3000), [(1182, 886), (1168, 880)]),
            ((3000, 4000), [(886, 1182), (880, 1168)]),
            ((8000, 1000), [(2896, 362), (2896, 352)]),
            ((1920, 1080), [(1365, 768), (1360, 768)]),
        ] {
            assert_eq!(sizes(own, 16).unwrap(), expected, "{own:?}");
        }
        for (own, says) in [((63, 100), "at least 64"), ((513, 64), "more than 8 times")] {
            let error = sizes(own, 16).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn what_is_no_whole_latent_is_cut_off_around_the_middle() {
        let rgb = (0..100 * 70)
            .flat_map(|i| [(i % 100) as u8, (i / 100) as u8, 0])
            .collect();
        let picture = Image {
            width: 100,
            height: 70,
            rgb,
        };
        let cut = prepared(&picture, ReferenceSizes::Flux2(16), (32, 32)).unwrap();
        assert_eq!((cut.width, cut.height), (96, 64));
        assert_eq!(cut.rgb[..3], [2, 3, 0]);
        assert_eq!(cut.rgb[96 * 64 * 3 - 3..], [97, 66, 0]);
        // of an odd rest the smaller half is cut off at the left and at the top
        let cut = middle(&picture, (97, 69));
        assert_eq!(cut.rgb[..3], [1, 0, 0]);
    }
}
