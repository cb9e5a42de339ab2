//! How much memory a run needs, estimated from configurations alone.

use super::Pipeline;
use super::job::Job;
use super::settings::Settings;
use crate::nn::device::require_memory;

/// Images in a forward pass where nobody says: more bring little speed, and all of them wait for
/// the last.
const AUTO_BATCH: usize = 4;

impl Pipeline {
    /// Estimates the peak memory of generating these jobs in batches of this size, in bytes: the
    /// denoising network with its activations, or the VAE with its own, whichever is larger.
    pub fn memory_bytes(&self, jobs: &[&Job], batch_size: usize) -> u64 {
        let checkpoint = &self.checkpoint;
        let base = checkpoint.stored_bytes("unet");
        let refiner = checkpoint.refiner().map_or(0, |it| it.stored_bytes("unet"));
        // the base of a single batch is freed before its refiner is read
        let weights = if jobs.len() > batch_size {
            base + refiner
        } else {
            base.max(refiner)
        };
        let of_job = |job: &&Job| {
            let (h, w) = self.final_latents(&job.settings);
            let batch = job.guidance.passes() * batch_size;
            let denoising = weights + self.config.base.backbone.activation_bytes(batch, h, w);
            denoising.max(self.vae_bytes(&job.settings))
        };
        jobs.iter().map(of_job).max().unwrap_or(0)
    }

    /// Estimates the peak memory of decoding an image, in bytes, with the weights of the VAE.
    pub fn vae_bytes(&self, settings: &Settings) -> u64 {
        let (h, w) = self.final_latents(settings);
        let activations = self.config.vae.decode_bytes(h, w, settings.vae_tiling);
        activations.saturating_add(self.checkpoint.stored_bytes("vae"))
    }

    /// Returns the largest of the usual batch sizes for which the memory suffices.
    pub fn auto_batch_size(&self, jobs: &[&Job]) -> usize {
        let fits = |n: &usize| {
            !self.compute.device.is_cpu() || require_memory(self.memory_bytes(jobs, *n)).is_ok()
        };
        (1..=AUTO_BATCH).rev().find(fits).unwrap_or(1)
    }

    /// Whether an image is larger than one tile of a tiled decode, in which it would be the same.
    pub(super) fn has_tiles(&self, settings: &Settings) -> bool {
        let (h, w) = self.final_latents(settings);
        h.max(w) > self.config.vae.tile()
    }

    /// Height and width of the latents that are decoded at last.
    fn final_latents(&self, settings: &Settings) -> (usize, usize) {
        let (width, height) = settings.final_size();
        (
            height / self.config.vae.factor(),
            width / self.config.vae.factor(),
        )
    }
}
