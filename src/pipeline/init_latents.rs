//! Source pictures in latents: what [`crate::pipeline::inpaint`] reads, encoded.
//!
//! Hides when the encoder's weights are there, and that a picture is encoded once for all that is
//! drawn over it.

use crate::cli::progress::Progress;
use crate::image::Picture;
use crate::model::{Autoencoder, Encoder, Posterior};
use crate::nn::Forward;
use crate::nn::device::Compute;
use crate::pipeline::inpaint::Canvas;
use crate::pipeline::params::{Settings, Source, Tile};
use crate::pipeline::resolve::Job;
use crate::weights::{Checkpoint, ModelError};
use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use std::collections::HashMap;
use std::sync::Arc;

/// Sources that are kept for later pictures at most, and the pixels of those that drawings are put
/// back into.
const KEPT: usize = 64;
const KEPT_PIXELS: usize = 1 << 26;

/// One source picture.
pub struct Ground {
    pub image: Posterior,
    /// what of it is repainted, if not all
    pub repainted: Option<Repainted>,
    /// where that is put back
    canvas: Option<Canvas>,
}

/// A part of a picture.
pub struct Repainted {
    /// [1, h, w, 1], 1 where it is repainted
    pub mask: Tensor,
    /// of the picture with grey there
    pub rest: Posterior,
}

type Key = (Arc<Source>, usize, usize, Option<Tile>);

/// The source, the size that it is brought to, and whether it is seamless; none for a picture from
/// noise alone.
fn key(settings: &Settings) -> Option<Key> {
    Some((
        settings.source.clone()?,
        settings.width,
        settings.height,
        settings.tile,
    ))
}

/// The sources of a run.
pub struct Grounds<'a> {
    checkpoint: &'a Checkpoint,
    vae: &'a Autoencoder,
    known: HashMap<Key, Arc<Ground>>,
    encoder: Option<Encoder>,
}

impl<'a> Grounds<'a> {
    pub fn new(checkpoint: &'a Checkpoint, vae: &'a Autoencoder) -> Self {
        Self {
            checkpoint,
            vae,
            known: HashMap::new(),
            encoder: None,
        }
    }

    /// Those of a batch, in its order; empty if it is drawn from noise alone. `next` are the jobs
    /// after it.
    pub fn of<'j>(
        &mut self,
        batch: &[&Job],
        mut next: impl Iterator<Item = &'j Job>,
        compute: &Compute,
        progress: &Progress,
    ) -> Result<Vec<Arc<Ground>>> {
        let mut grounds = vec![];
        for job in batch {
            let Some(key) = key(&job.settings) else {
                continue;
            };
            let ground = match self.known.get(&key) {
                Some(known) => known.clone(),
                None => {
                    let ground = Arc::new(self.ground(&job.settings, &key.0, compute, progress)?);
                    let pixels =
                        |ground: &Arc<Ground>| ground.canvas.as_ref().map_or(0, Canvas::pixels);
                    if self.known.len() >= KEPT
                        || self.known.values().map(pixels).sum::<usize>() + pixels(&ground)
                            > KEPT_PIXELS
                    {
                        self.known.clear();
                    }
                    self.known.insert(key, ground.clone());
                    ground
                }
            };
            grounds.push(ground);
        }
        if !next.any(|job| {
            job.enlarge.is_some()
                || key(&job.settings).is_some_and(|key| !self.known.contains_key(&key))
        }) {
            self.encoder = None;
        }
        Ok(grounds)
    }

    /// A picture that was just drawn and is drawn over at once.
    pub fn of_drawn(
        &mut self,
        drawn: &Picture,
        settings: &Settings,
        compute: &Compute,
        progress: &Progress,
    ) -> Result<Arc<Ground>> {
        let image = self.encode(
            &drawn.to_tensor(&compute.device)?,
            settings,
            compute,
            progress,
        )?;
        Ok(Arc::new(Ground {
            image,
            repainted: None,
            canvas: None,
        }))
    }

    /// A drawn picture, put back into its source if it is a part of that.
    pub fn put_back(&self, job: &Job, drawn: Picture) -> Result<Picture> {
        let Settings {
            source,
            width,
            height,
            ..
        } = &job.settings;
        let Some(source) = source.as_ref().filter(|source| source.repaints()) else {
            return Ok(drawn);
        };
        Ok(
            match key(&job.settings).and_then(|key| self.known.get(&key)?.canvas.as_ref()) {
                Some(canvas) => canvas.put_back(drawn),
                // forgotten, as there were too many
                None => Canvas::read(source, *width, *height)?.put_back(drawn),
            },
        )
    }

    fn encoder(&mut self, compute: &Compute, progress: &Progress) -> Result<&Encoder> {
        Ok(match &mut self.encoder {
            Some(encoder) => encoder,
            none => {
                progress.stage("encoding the picture");
                let weights = self.checkpoint.weights("vae", &compute.device, DType::F32);
                none.insert(self.vae.encoder(&weights).context(ModelError)?)
            }
        })
    }

    /// RGB [1, h, w, 3] of a picture with these settings.
    fn encode(
        &mut self,
        rgb: &Tensor,
        settings: &Settings,
        compute: &Compute,
        progress: &Progress,
    ) -> Result<Posterior> {
        let tile = settings.vae_tiling.then(|| self.vae.tile());
        let encoder = self.encoder(compute, progress)?;
        let cx = Forward::on(&compute.device).padded(settings.padding());
        Ok(encoder.encode(cx, rgb, tile)?)
    }

    fn ground(
        &mut self,
        settings: &Settings,
        source: &Source,
        compute: &Compute,
        progress: &Progress,
    ) -> Result<Ground> {
        let mut encode = |rgb: &Tensor| self.encode(rgb, settings, compute, progress);
        let canvas = Canvas::read(source, settings.width, settings.height)?;
        let image = encode(&canvas.picture.to_tensor(&compute.device)?)?;
        let rest = canvas
            .kept_rgb(&compute.device)?
            .map(|kept| encode(&kept))
            .transpose()?;
        let mask = canvas.mask(self.vae.factor(), &compute.device)?;
        let repainted = mask.zip(rest).map(|(mask, rest)| Repainted { mask, rest });
        Ok(Ground {
            image,
            canvas: repainted.is_some().then_some(canvas),
            repainted,
        })
    }
}
