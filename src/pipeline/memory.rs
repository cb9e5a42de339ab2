//! How much memory and time a run needs, estimated from headers and configurations alone.

use super::Pipeline;
use super::config::PipelineConfig;
use super::job::Job;
use super::settings::{Reference, Settings};
use crate::model::{BackboneConfig, ModelKind};
use crate::nn::cpu::peak_flops;
use crate::nn::device::require_memory;
use crate::weights::{BlockBytes, Checkpoint};
use anyhow::Result;
use std::collections::HashMap;

/// Images in a forward pass where nobody says: more bring little speed, and all of them wait for
/// the last.
const AUTO_BATCH: usize = 4;

impl Pipeline {
    /// Estimates the peak memory of generating these jobs in batches of this size, in bytes: a
    /// language model or T5, the denoising network with its activations, or the VAE with its own, whichever
    /// is the largest.
    pub fn memory_bytes(&self, jobs: &[&Job], batch_size: usize) -> u64 {
        let checkpoint = &self.checkpoint;
        let base = self.weight_bytes();
        let encoder = self.config.base.encoder.sentence_bytes(checkpoint);
        let encoder = encoder.map_or(0, |bytes| held(bytes, self.reads_again));
        let refiner = checkpoint
            .refiner()
            .map_or(0, |it| it.stored_bytes(it.denoiser()));
        // the base of a single batch is freed before its refiner is read
        let weights = if jobs.len() > batch_size {
            base + refiner
        } else {
            base.max(refiner)
        };
        let of_job = |job: &&Job| {
            let (h, w) = self.final_latents(&job.settings);
            let batch = job.guidance.passes() * batch_size;
            let references = self.reference_latents(&job.settings);
            let backbone = &self.config.base.backbone;
            let denoising = weights + backbone.activation_bytes(batch, h, w, references);
            denoising.max(self.vae_bytes(&job.settings)).max(encoder)
        };
        jobs.iter().map(of_job).max().unwrap_or(0)
    }

    /// The bytes of the denoising network's weights that are held at once, which every image needs.
    pub fn weight_bytes(&self) -> u64 {
        let denoiser = self.checkpoint.denoiser();
        held(
            self.checkpoint.block_bytes(denoiser, |_| true),
            self.reads_again,
        )
    }

    /// Estimates the peak memory of decoding an image, or of encoding a larger reference picture of
    /// it, in bytes, with the weights of the VAE.
    pub fn vae_bytes(&self, settings: &Settings) -> u64 {
        let bytes =
            |(h, w): (usize, usize)| self.config.vae.decode_bytes(h, w, settings.vae_tiling);
        let activations = self.vae_latents(settings).map(bytes).max().unwrap_or(0);
        activations.saturating_add(self.checkpoint.stored_bytes("vae"))
    }

    /// Returns the largest of the usual batch sizes for which the memory suffices.
    pub fn auto_batch_size(&self, jobs: &[&Job]) -> usize {
        let fits = |n: &usize| {
            !self.compute.device.is_cpu() || require_memory(self.memory_bytes(jobs, *n), 0).is_ok()
        };
        (1..=AUTO_BATCH).rev().find(fits).unwrap_or(1)
    }

    /// Estimates the seconds that a CPU takes for these jobs, from the number of operations and how
    /// many a second it can do; `None` on other devices.
    pub fn seconds(&self, jobs: &[&Job]) -> Option<f64> {
        if !self.compute.device.is_cpu() {
            return None;
        }
        let mut known = HashMap::new();
        let mut of_size = |h: usize, w: usize, references: usize| -> (f64, f64) {
            *known.entry((h, w, references)).or_insert_with(|| {
                let factor = self.config.vae.factor();
                let area = (h / factor * (w / factor)) as f64;
                let unet = match &self.config.base.backbone {
                    BackboneConfig::UNet(_) => unet_operations(&self.checkpoint, area),
                    BackboneConfig::Sd3(config) => config.operations(area),
                    BackboneConfig::Flux(config) => config.operations(area + references as f64),
                    BackboneConfig::Flux2(config) => config.operations(area + references as f64),
                    BackboneConfig::ZImage(config) => config.operations(area),
                };
                (unet, decoder_operations(&self.checkpoint, area))
            })
        };
        let mut total = 0.0;
        for job in jobs {
            let (settings, passes) = (&job.settings, job.guidance.passes() as f64);
            let (width, height) = settings.final_size();
            let second = job.hires_plan.as_ref().map_or(0, |plan| plan.evaluations());
            let first = job.evaluations() - second;
            let references = self.reference_latents(settings);
            let (unet, _) = of_size(settings.height, settings.width, references);
            let (larger, decoder) = of_size(height, width, references);
            total += passes * (first as f64 * unet + second as f64 * larger) + decoder;
        }
        Some(total / (peak_flops() * EFFICIENCY))
    }

    /// Whether an image, or one of its reference pictures, is larger than one tile of the VAE, in which
    /// it would be the same.
    pub(super) fn has_tiles(&self, settings: &Settings) -> bool {
        let tile = self.config.vae.tile();
        self.vae_latents(settings).any(|(h, w)| h.max(w) > tile)
    }

    /// Height and width of the latents of all that the VAE decodes or encodes for an image.
    fn vae_latents(&self, settings: &Settings) -> impl Iterator<Item = (usize, usize)> {
        let factor = self.config.vae.factor();
        let of_reference =
            move |Reference { width, height, .. }: &Reference| (height / factor, width / factor);
        let references = settings.references.iter().map(of_reference);
        [self.final_latents(settings)].into_iter().chain(references)
    }

    /// How many latents an image's reference pictures add to those that the network sees.
    fn reference_latents(&self, settings: &Settings) -> usize {
        if self.config.base.kind == ModelKind::Control {
            return 0; // they are channels of the picture's own
        }
        let latents = self.vae_latents(settings).skip(1);
        latents.map(|(h, w)| h * w).sum()
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

/// Of a network of so many bytes, those that are held at once: all, or where blocks are read again,
/// what is in none of them, and two.
fn held(bytes: BlockBytes, reads_again: bool) -> u64 {
    match reads_again {
        false => bytes.all,
        true => (bytes.outside + 2 * bytes.largest).min(bytes.all),
    }
}

/// Whether there is not enough memory for the networks of a checkpoint, one after the other, to draw
/// a picture of its own size. Errors if its configuration is damaged.
pub(super) fn is_short(checkpoint: &Checkpoint, config: &PipelineConfig) -> Result<bool> {
    let backbone = &config.base.backbone;
    let (h, w) = backbone.sample_size()?;
    let denoising =
        checkpoint.stored_bytes(checkpoint.denoiser()) + backbone.activation_bytes(1, h, w, 0);
    let encoder = config.base.encoder.sentence_bytes(checkpoint)?.all;
    Ok(require_memory(denoising.max(encoder), 0).is_err())
}

/// Which part of the operations that a CPU can do in a second networks come to: 1.1 for SD1.5, whose
/// convolutions by Winograd's formula are counted as direct ones, a third for the embedded model,
/// whose layers are small (assets/docs/benchmarks.md).
const EFFICIENCY: f64 = 0.8;
/// Tokens of a prompt that attention looks at.
const PROMPT_TOKENS: f64 = 77.0;

/// The operations of one run of the U-Net for one image with `area` latents: of each weight two at
/// every position of its level, and those of attention.
fn unet_operations(checkpoint: &Checkpoint, area: f64) -> f64 {
    let lowest = checkpoint.count("unet.down_blocks.").saturating_sub(1);
    let of_tensor = |(name, shape): (&str, &[usize])| {
        let number = |part: usize| name.split('.').nth(part)?.parse::<usize>().ok();
        let level = match name.split('.').next().unwrap_or_default() {
            "down_blocks" => number(1).unwrap_or(0) + usize::from(name.contains("downsamplers")),
            "mid_block" => lowest,
            "up_blocks" => {
                let level = lowest.saturating_sub(number(1).unwrap_or(0));
                level.saturating_sub(usize::from(name.contains("upsamplers")))
            }
            _ => 0,
        };
        let positions = area / 4f64.powi(level as i32);
        let of_prompt = name.contains("attn2.to_k") || name.contains("attn2.to_v");
        let is_single = name.contains("time_emb") || name.contains("add_embedding");
        let reads = match (of_prompt, is_single) {
            // once for all steps
            (true, _) => 0.0,
            (_, true) => 1.0,
            _ => positions,
        };
        let channels = shape.first().copied().unwrap_or(0) as f64;
        let looks_at = if name.ends_with("attn1.to_q.weight") {
            positions
        } else if name.ends_with("attn2.to_q.weight") {
            PROMPT_TOKENS
        } else {
            0.0
        };
        2.0 * reads * shape.iter().product::<usize>() as f64 + 4.0 * positions * looks_at * channels
    };
    checkpoint.shapes("unet").map(of_tensor).sum()
}

/// The operations of decoding one image of `area` latents.
fn decoder_operations(checkpoint: &Checkpoint, area: f64) -> f64 {
    let last = checkpoint.count("vae.decoder.up_blocks.").saturating_sub(1);
    let of_tensor = |(name, shape): (&str, &[usize])| {
        let Some(name) = name.strip_prefix("decoder.") else {
            return 0.0;
        };
        let number = name
            .split('.')
            .nth(1)
            .and_then(|number| number.parse().ok());
        let doublings = match name.split('.').next().unwrap_or_default() {
            "up_blocks" => number.unwrap_or(0) + usize::from(name.contains("upsamplers")),
            "conv_out" => last,
            _ => 0,
        };
        2.0 * area * 4f64.powi(doublings as i32) * shape.iter().product::<usize>() as f64
    };
    checkpoint.shapes("vae").map(of_tensor).sum()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::weights::Origin;

    #[test]
    fn where_blocks_are_read_again_two_of_them_are_held() {
        let bytes = BlockBytes {
            all: 100,
            outside: 10,
            largest: 20,
        };
        assert_eq!((held(bytes, false), held(bytes, true)), (100, 50));
        let few = BlockBytes { all: 45, ..bytes };
        assert_eq!(held(few, true), 45);
        let checkpoint = Checkpoint::open(Origin::Embedded).unwrap();
        let of_vae = checkpoint.block_bytes("vae", |_| true);
        assert_eq!(of_vae.all, checkpoint.stored_bytes("vae"));
        let outside = checkpoint.block_bytes("vae", |name| !name.contains(".0."));
        assert!(
            outside.all < of_vae.all && 0 < outside.outside,
            "{outside:?}"
        );
    }

    #[test]
    fn operations_are_those_that_the_layers_do() {
        // of the embedded model, counted by `sdgen bench --size mini`, which sees every product
        let checkpoint = Checkpoint::open(Origin::Embedded).unwrap();
        let area = 8.0 * 8.0;
        let unet = unet_operations(&checkpoint, area) / 1e9;
        let decoder = decoder_operations(&checkpoint, area) / 1e9;
        let near = |estimate: f64, counted: f64| (estimate / counted - 1.0).abs() < 0.1;
        assert!(
            near(unet, 0.2739) && near(decoder, 0.8697),
            "{unet} {decoder}"
        );
    }
}
