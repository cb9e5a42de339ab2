//! From resolved request to pictures: encode the prompts, sample latents, decode them.
//!
//! Each stage's weights are freed before the next stage's are read by scope; with several batches the U-Net stays, so
//! that every picture is finished as soon as its batch is.

use crate::device::Compute;
use crate::guidance::{Guided, Reuse};
use crate::image::Picture;
use crate::model::unet::UNet;
use crate::model::vae::Decoder;
use crate::noise::Generator;
use crate::progress::Progress;
use crate::request::{Job, Request};
use crate::sampler;
use crate::text::clip::Clip;
use crate::text::tokenizer::Tokenizer;
use crate::weights::{Checkpoint, ModelError};
use anyhow::{Context, Result};
use candle_core::{DType, Result as TensorResult, Tensor};
use std::collections::HashMap;
use std::time::Instant;

/// A picture is not made of numbers any more: NaN or infinity in the latents.
#[derive(Debug)]
pub struct NotFinite {
    /// what went wrong, when
    pub place: String,
}

impl std::fmt::Display for NotFinite {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(
            f,
            "the picture is not finite (NaN or infinity) {}\n\nhint: the checkpoint is damaged, or overflows in this `--dtype`; nothing was written",
            self.place
        )
    }
}

impl std::error::Error for NotFinite {}

/// One finished picture.
pub struct Drawn<'a> {
    pub job: &'a Job,
    pub picture: Picture,
    /// seconds of denoising and decoding, divided by the batch
    pub sampling_s: f64,
    pub decoding_s: f64,
}

/// What the U-Net attends to.
struct Contexts<'a> {
    /// embeddings [1, n, d] by prompt
    prompts: HashMap<&'a str, Tensor>,
    /// embedding of the negative prompt [1, n, d], with guidance
    negative: Option<Tensor>,
}

/// Draws every job of the request and hands each picture to `sink` as soon as it is decoded.
pub fn generate(
    checkpoint: &Checkpoint,
    request: &Request,
    compute: &Compute,
    progress: &mut Progress,
    sink: &mut dyn FnMut(Drawn) -> Result<()>,
) -> Result<()> {
    let contexts = encode(checkpoint, request, compute, progress)?;
    let (mut unet, mut decoder) = (None, None);
    let mut batches = request.jobs.chunks(request.batch_size.max(1)).peekable();
    while let Some(batch) = batches.next() {
        let network = match unet.take() {
            Some(network) => network,
            None => {
                progress.stage("reading the U-Net");
                UNet::new(&checkpoint.weights("unet", &compute.device, compute.dtype), &request.unet).context(ModelError)?
            }
        };
        let start = Instant::now();
        let latents = sample(&network, batch, request, &contexts, compute, progress)?;
        let sampling_s = start.elapsed().as_secs_f64() / batch.len() as f64;
        // kept for the next batch; after the last its memory is free for the VAE
        unet = batches.peek().is_some().then_some(network);
        let decoder = match &mut decoder {
            Some(decoder) => decoder,
            none => {
                progress.stage("reading the VAE");
                none.insert(Decoder::new(&checkpoint.weights("vae", &compute.device, DType::F32), &request.vae).context(ModelError)?)
            }
        };
        progress.stage("decoding");
        let start = Instant::now();
        let pictures = decode(decoder, &latents)?;
        let decoding_s = start.elapsed().as_secs_f64() / batch.len() as f64;
        for (job, picture) in batch.iter().zip(pictures) {
            sink(Drawn { job, picture, sampling_s, decoding_s })?;
        }
    }
    progress.finish();
    Ok(())
}

/// Embeds every prompt and the negative one, each once; the encoder is freed on return.
fn encode<'a>(checkpoint: &Checkpoint, request: &'a Request, compute: &Compute, progress: &mut Progress) -> Result<Contexts<'a>> {
    progress.stage("encoding the prompt");
    let tokenizer = Tokenizer::new(&checkpoint.tokenizer, &checkpoint.tokenizer_config).context(ModelError)?;
    let clip = Clip::new(&checkpoint.weights("text_encoder", &compute.device, compute.dtype), &request.clip).context(ModelError)?;
    let embed = |text: &str, skip: usize| -> Result<Tensor> {
        let tokens = tokenizer.encode(text, request.clip.max_position_embeddings)?;
        if let Some(cut) = tokens.cut {
            progress.note(format!("warning: the prompt is longer than {} tokens; this was cut off: {cut}", tokens.ids.len()));
        }
        Ok(clip.forward(&tokens.ids, skip)?)
    };
    let mut prompts = HashMap::new();
    for job in &request.jobs {
        if !prompts.contains_key(job.prompt.as_str()) {
            prompts.insert(job.prompt.as_str(), embed(&job.prompt, request.clip_skip - 1)?);
        }
    }
    // as in diffusers, layers are skipped for the prompt alone
    let negative = request.guided().then(|| embed(&request.negative, 0)).transpose()?;
    Ok(Contexts { prompts, negative })
}

/// Denoises one batch: latents [b, h, w, c]. Every picture has its own generator, so neighbours never matter.
fn sample(
    unet: &UNet,
    batch: &[Job],
    request: &Request,
    contexts: &Contexts,
    compute: &Compute,
    progress: &mut Progress,
) -> Result<Tensor> {
    let (h, w, c) = request.latent_shape();
    let embedded = |job: &Job| contexts.prompts.get(job.prompt.as_str()).context("a prompt was not encoded");
    let context = Tensor::cat(&batch.iter().map(embedded).collect::<Result<Vec<_>>>()?, 0)?; // [b, n, d]
    let negative = contexts.negative.as_ref().map(|n| n.repeat((batch.len(), 1, 1))).transpose()?; // [b, n, d]
    let reuse = Reuse::every(request.deep_cache);
    let mut guided = Guided { unet, context, negative, scale: request.guidance, prediction: request.prediction, reuse };
    let mut generators: Vec<Generator> = batch.iter().map(|job| Generator::new(job.seed)).collect();
    let mut noise = || -> TensorResult<Tensor> {
        let each = generators.iter_mut().map(|g| g.latents(h, w, c)).collect::<TensorResult<Vec<_>>>()?;
        Tensor::cat(&each, 0)?.to_device(&compute.device) // [b, h, w, c]
    };
    let first = (noise()? * request.plan.init_noise_sigma())?;
    progress.stage("drawing");
    let total = request.plan.evaluations();
    let mut done = 0;
    let mut bad_step = None;
    let mut denoise = |x: &Tensor, sigma: f64, timestep: f64| {
        let denoised = guided.denoise(x, sigma, timestep)?;
        done += 1;
        progress.step(done, total);
        if bad_step.is_none() && !finite(&denoised)? {
            bad_step = Some(done);
            candle_core::bail!("not finite");
        }
        Ok(denoised)
    };
    let result = sampler::sample(&request.plan, first, &mut denoise, &mut noise, &mut |_| Ok(()));
    match bad_step {
        Some(step) => Err(NotFinite { place: format!("after {step} of {total} denoising steps") }.into()),
        None => Ok(result?),
    }
}

/// Latents [b, h, w, c] -> pictures, one at a time: a decode needs far more memory than a latent.
fn decode(decoder: &Decoder, latents: &Tensor) -> Result<Vec<Picture>> {
    let mut pictures = vec![];
    for i in 0..latents.dim(0)? {
        let rgb = decoder.decode(&latents.narrow(0, i, 1)?)?; // [1, h, w, 3]
        if !finite(&rgb)? {
            return Err(NotFinite { place: "after decoding".into() }.into());
        }
        pictures.extend(Picture::from_tensor(&rgb)?);
    }
    Ok(pictures)
}

fn finite(x: &Tensor) -> TensorResult<bool> {
    Ok(x.to_dtype(DType::F32)?.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite())
}
