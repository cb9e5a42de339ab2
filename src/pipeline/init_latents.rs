//! The latents of init images, encoded once for all images that are drawn over them.

use super::Run;
use super::inpaint::InitImage;
use super::job::Job;
use super::settings::{Settings, Source, Tile};
use crate::image::Image;
use crate::model::{ModelKind, Posterior};
use anyhow::Result;
use candle_core::Tensor;
use std::collections::HashMap;
use std::sync::Arc;

/// Init images that are kept for later images at most.
const MAX_CACHED: usize = 64;
/// Pixels of those that are kept for compositing, in all.
const MAX_CACHED_PIXELS: usize = 1 << 26;

/// The latents of one init image.
pub struct InitLatents {
    pub image: Posterior,
    /// what of it is repainted, if not all
    pub inpaint: Option<InpaintLatents>,
    /// what the drawing is composited into
    composite: Option<InitImage>,
}

/// The part of an image that is repainted.
pub struct InpaintLatents {
    /// [1, h, w, 1], 1 where it is repainted
    pub mask: Tensor,
    /// the same of each pixel of a latent, [1, h, w, pixels], for networks that see it so
    pub pixels: Option<Tensor>,
    /// of the image with grey where it is repainted
    pub masked_image: Posterior,
}

/// The source, the size that it is brought to, and the axes on which it is seamless.
type Key = (Arc<Source>, usize, usize, Option<Tile>);

/// The key of an image's init image; none for an image from noise alone.
fn key(settings: &Settings) -> Option<Key> {
    Some((
        settings.source.clone()?,
        settings.width,
        settings.height,
        settings.tile,
    ))
}

/// The init latents of a run.
#[derive(Default)]
pub struct InitLatentsCache(HashMap<Key, Arc<InitLatents>>);

impl InitLatentsCache {
    /// Returns the init latents of a batch, in its order; empty if it starts from noise alone.
    pub fn get(&mut self, batch: &[&Job], run: &Run) -> Result<Vec<Arc<InitLatents>>> {
        let mut all = vec![];
        for job in batch {
            let Some(key) = key(&job.settings) else {
                continue;
            };
            let latents = match self.0.get(&key) {
                Some(cached) => cached.clone(),
                None => {
                    let latents = Arc::new(InitLatents::encode(&job.settings, &key.0, run)?);
                    self.insert(key, latents.clone());
                    latents
                }
            };
            all.push(latents);
        }
        Ok(all)
    }

    /// Whether one of these jobs needs an encoder that has not run for it yet.
    pub fn needs_encoder<'j>(&self, mut jobs: impl Iterator<Item = &'j Job>) -> bool {
        jobs.any(|job| {
            let is_cached = |key| self.0.contains_key(&key);
            job.hires_plan.is_some() || !key(&job.settings).is_none_or(is_cached)
        })
    }

    fn insert(&mut self, key: Key, latents: Arc<InitLatents>) {
        let pixels = |latents: &Arc<InitLatents>| {
            latents
                .composite
                .as_ref()
                .map_or(0, InitImage::composite_pixels)
        };
        let total = self.0.values().map(pixels).sum::<usize>() + pixels(&latents);
        if self.0.len() >= MAX_CACHED || total > MAX_CACHED_PIXELS {
            self.0.clear();
        }
        self.0.insert(key, latents);
    }

    /// Composites a drawn image into its init image, if only a part of that is repainted.
    pub fn composite(&self, job: &Job, drawn: Image) -> Result<Image> {
        let Settings {
            source,
            width,
            height,
            ..
        } = &job.settings;
        let Some(source) = source.as_ref().filter(|source| source.repaints()) else {
            return Ok(drawn);
        };
        let cached = key(&job.settings).and_then(|key| self.0.get(&key)?.composite.as_ref());
        Ok(match cached {
            Some(init) => init.composite(drawn),
            // forgotten, as there were too many
            None => InitImage::read(source, *width, *height)?.composite(drawn),
        })
    }
}

impl InitLatents {
    /// Encodes an image that was just drawn, for the second pass over it.
    pub fn of_drawn(drawn: &Image, settings: &Settings, run: &Run) -> Result<Self> {
        let image = run.encode(&drawn.to_tensor(run.device())?, settings)?;
        Ok(Self {
            image,
            inpaint: None,
            composite: None,
        })
    }

    fn encode(settings: &Settings, source: &Source, run: &Run) -> Result<Self> {
        let init = InitImage::read(source, settings.width, settings.height)?;
        let image = run.encode(&init.picture.to_tensor(run.device())?, settings)?;
        let masked = init.masked_rgb(run.device())?;
        let masked = masked.map(|rgb| run.encode(&rgb, settings)).transpose()?;
        let mask = init.mask(run.vae_factor(), run.device())?;
        let pixels = match run.pipeline.config.base.kind {
            ModelKind::Fill => init.mask_of_pixels(run.vae_factor(), run.device())?,
            _ => None,
        };
        let inpaint = mask.zip(masked).map(|(mask, masked_image)| InpaintLatents {
            mask,
            pixels,
            masked_image,
        });
        Ok(Self {
            image,
            composite: inpaint.is_some().then_some(init),
            inpaint,
        })
    }
}
