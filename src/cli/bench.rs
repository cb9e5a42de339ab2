//! `sdgen bench`: seconds of one denoising step and one decode at the sizes of real models, with
//! random weights.

use crate::model::flux2::Flux2Config;
use crate::model::unet_config::UNetConfig;
use crate::model::vae::{Decoder, VaeConfig};
use crate::model::z_image::ZImageConfig;
use crate::model::{AddedCond, BackboneConfig, Conditioning, ExtraInputs};
use crate::nn::cpu::instructions::{self, Instructions};
use crate::nn::device::{Compute, DTypeChoice, DeviceChoice, peak_gpu_memory, peak_memory};
use crate::nn::profile::{self, Profile};
use crate::nn::weights::Weights;
use crate::nn::{Forward, cpu};
use crate::pipeline::guidance::{CfgDenoiser, DeepCache, Guidance};
use crate::sampling::{Prediction, Scalings};
use crate::text::clip::ClipConfig;
use crate::weights::{Checkpoint, Origin};
use anyhow::{Result, bail};
use candle_core::{DType, Device, Tensor};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::time::Instant;

/// The sizes of a well-known model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Size {
    /// the embedded model
    Mini,
    Sd15,
    Sdxl,
    /// FLUX.2 klein 4B
    Klein,
    ZImage,
}

/// A part that can be timed alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// the network that denoises
    #[value(alias = "transformer")]
    Unet,
    Vae,
}

/// The network to time, and where.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Layer sizes of this model
    #[arg(long, default_value = "sd15")]
    size: Size,
    /// This part alone, so that the peak of memory is its own [default: both]
    #[arg(long, value_name = "PART")]
    only: Option<Part>,
    /// Width in pixels [default: the model's]
    #[arg(short = 'W', long, value_name = "PX")]
    width: Option<usize>,
    /// Height in pixels [default: the model's]
    #[arg(short = 'H', long, value_name = "PX")]
    height: Option<usize>,
    /// Pictures a step; guidance, which U-Nets are timed with, doubles it inside
    #[arg(short, long, default_value = "1", value_parser = clap::value_parser!(u64).range(1..=64))]
    batch: u64,
    /// Timed repetitions after one that is not counted
    #[arg(short = 'n', long, default_value = "3", value_parser = clap::value_parser!(u64).range(1..=100))]
    repeat: u64,
    /// auto, cpu, cuda[:N] or metal
    #[arg(long, default_value = "auto", value_name = "NAME")]
    device: DeviceChoice,
    /// Type of weights and activations
    #[arg(long, default_value = "auto")]
    dtype: DTypeChoice,
    /// amx, avx512-bf16, avx512, avx2 or portable: what a CPU multiplies with [default: the fastest
    /// that it has]
    #[arg(long, value_name = "NAME")]
    instructions: Option<Instructions>,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// The layer sizes of one model.
struct Sizes {
    network: BackboneConfig,
    vae: VaeConfig,
    /// tokens of a prompt, and the width of their embeddings
    context: [usize; 2],
    /// default width and height in pixels
    side: usize,
}

/// Tokens of a prompt, padding too: of CLIP, of FLUX.2 klein, and of a common one of Z-Image's,
/// which are not padded.
const CLIP_TOKENS: usize = 77;
const KLEIN_TOKENS: usize = 512;
const Z_IMAGE_TOKENS: usize = 40;

impl Size {
    fn sizes(self) -> Result<Sizes> {
        let vae = |others: Value| {
            let mut config =
                json!({"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2});
            if let (Some(config), Some(others)) = (config.as_object_mut(), others.as_object()) {
                config.extend(others.clone());
            }
            VaeConfig::from_json(&config)
        };
        let of_unet = |config: &Value| -> Result<BackboneConfig> {
            Ok(BackboneConfig::UNet(Box::new(UNetConfig::from_json(
                config,
            )?)))
        };
        Ok(match self {
            Self::Mini => {
                let checkpoint = Checkpoint::open(Origin::Embedded)?;
                let (network, vae) = (
                    of_unet(checkpoint.config("unet")?)?,
                    VaeConfig::from_json(checkpoint.config("vae")?)?,
                );
                let width = ClipConfig::from_json(checkpoint.config("text_encoder")?)?.hidden_size;
                let side = network.sample_size()?.0 * vae.factor();
                Sizes {
                    network,
                    vae,
                    context: [CLIP_TOKENS, width],
                    side,
                }
            }
            Self::Sd15 => Sizes {
                network: of_unet(&json!({ "cross_attention_dim": 768 }))?,
                vae: vae(json!({}))?,
                context: [CLIP_TOKENS, 768],
                side: 512,
            },
            Self::Sdxl => {
                let config = json!({
                    "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20],
                    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 2048,
                    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
                });
                Sizes {
                    network: of_unet(&config)?,
                    vae: vae(json!({}))?,
                    context: [CLIP_TOKENS, 2048],
                    side: 1024,
                }
            }
            Self::Klein => {
                let config = json!({
                    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
                    "joint_attention_dim": 7680, "guidance_embeds": false,
                });
                let of_vae = json!({
                    "_class_name": "AutoencoderKLFlux2", "latent_channels": 32, "patch_size": [2, 2],
                    "batch_norm_eps": 1e-4,
                });
                Sizes {
                    network: BackboneConfig::Flux2(Flux2Config::from_json(&config)?),
                    vae: vae(of_vae)?,
                    context: [KLEIN_TOKENS, 7680],
                    side: 512,
                }
            }
            Self::ZImage => Sizes {
                network: BackboneConfig::ZImage(ZImageConfig::from_json(&json!({}))?),
                vae: vae(json!({"latent_channels": 16, "use_post_quant_conv": false}))?,
                context: [Z_IMAGE_TOKENS, 2560],
                side: 512,
            },
        })
    }
}

/// Runs the benchmark and returns its report.
pub fn run(args: &BenchArgs) -> Result<String> {
    let mut compute = Compute::choose(args.device, args.dtype)?;
    if let Some(set) = args.instructions {
        instructions::force(set);
    }
    let sizes = args.size.sizes()?;
    if sizes.network.is_flow() {
        compute = compute.for_transformer();
    }
    let (factor, patch) = (sizes.vae.factor(), sizes.network.patch());
    let latents = |pixels: Option<usize>| {
        let step = factor * patch;
        pixels.unwrap_or(sizes.side) / step * patch
    };
    let (width, height) = (latents(args.width), latents(args.height));
    if width == 0 || height == 0 || width > 512 || height > 512 {
        bail!(
            "width and height of a benchmark go from {} to {} pixels",
            factor * patch,
            512 * factor
        );
    }
    let runs = |part: Part| args.only.is_none_or(|only| only == part);
    let network = runs(Part::Unet)
        .then(|| time_network(args, &compute, &sizes, (height, width)))
        .transpose()?;
    let vae = runs(Part::Vae)
        .then(|| time_vae(args, &compute, &sizes.vae, (height, width)))
        .transpose()?;
    let on_cpu = compute.device.is_cpu();
    let ceiling = cpu::ceiling(compute.precision())
        .filter(|_| on_cpu)
        .map(|flops| flops / 1e9);
    let instructions = on_cpu.then(|| cpu::instructions_of(compute.precision()));
    let (network_key, network_title) = match sizes.network {
        BackboneConfig::UNet(_) => ("unet_step", "U-Net step, guided"),
        _ => ("transformer_pass", "transformer, one pass"),
    };
    let report = json!({
        "size": format!("{:?}", args.size).to_lowercase(), "width": width * factor, "height": height * factor, "batch": args.batch,
        "dtype": compute.dtype_name(), "threads": rayon::current_num_threads(),
        network_key: network, "vae_decode": vae, "peak_memory_mb": peak_memory_mb(),
        "peak_gpu_memory_mb": peak_gpu_memory(&compute.device).map(mb),
        "instructions": instructions, "ceiling_gflops": ceiling,
    });
    if args.json {
        return Ok(format!("{report}\n"));
    }
    let title = format!(
        "{:?} {}x{}, batch {}, {}, {} threads{}\n",
        args.size,
        width * factor,
        height * factor,
        args.batch,
        compute.dtype_name(),
        rayon::current_num_threads(),
        instructions.map_or(String::new(), |set| format!(", {set}"))
    );
    let of_gpu = ("peak GPU memory", peak_gpu_memory(&compute.device).map(mb));
    let memory = [("peak memory", peak_memory_mb()), of_gpu];
    let memory: String = memory
        .into_iter()
        .filter_map(|(name, mb)| Some(format!("{name:<22}{:>8.0} MB\n", mb?)))
        .collect();
    let line = ceiling
        .map(|c| {
            format!(
                "{:<22}{c:>8.0} GFLOP/s of products in registers, without loads\n",
                "ceiling"
            )
        })
        .unwrap_or_default();
    let tables: String = [(network_title, network), ("VAE decode", vae)]
        .iter()
        .filter_map(|(name, value)| Some(table(name, value.as_ref()?, ceiling)))
        .collect();
    Ok(title + &tables + &line + &memory)
}

/// Three digits or so.
fn seconds(seconds: f64) -> String {
    if seconds >= 0.995 {
        format!("{seconds:.2} s")
    } else if seconds >= 0.01 {
        format!("{:.0} ms", seconds * 1e3)
    } else {
        format!("{:.2} ms", seconds * 1e3)
    }
}

/// A line for the whole, and one for each kind of layer, with its part of the ceiling (GFLOP/s).
fn table(name: &str, value: &Value, ceiling: Option<f64>) -> String {
    let number =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_f64).unwrap_or_default();
    let n = |key: &str| number(value, key);
    let mut text = format!(
        "{name:<22}{:>8} median, {} best, {:.0} GFLOP/s at best ({:.3} TFLOP), weights made in {:.1} s\n",
        seconds(n("median_s")),
        seconds(n("best_s")),
        n("gflops"),
        n("tflop"),
        n("load_s")
    );
    // calls, milliseconds and operations of each kind, in order of time
    let mut kinds: Vec<(&str, [f64; 3])> = vec![];
    for kernel in value
        .get("kernels")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        let kind = kernel
            .get("kind")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let [calls, ms] = ["calls", "ms"].map(|key| number(kernel, key));
        let gflop = number(kernel, "gflops") * ms / 1e3;
        match kinds.iter_mut().find(|(k, _)| *k == kind) {
            Some((_, sums)) => sums
                .iter_mut()
                .zip([calls, ms, gflop])
                .for_each(|(sum, x)| *sum += x),
            None => kinds.push((kind, [calls, ms, gflop])),
        }
    }
    kinds.sort_by(|a, b| b.1[1].total_cmp(&a.1[1]));
    for (kind, [calls, ms, gflop]) in kinds {
        text += &format!("  {kind:<20}{:>10} {calls:>5.0} calls", seconds(ms / 1e3));
        text += &if gflop > 0.0 {
            let speed = gflop / ms * 1e3;
            let part = ceiling.map(|ceiling| format!(" {:>4.0} %", 100.0 * speed / ceiling));
            format!(
                " {gflop:>7.1} GFLOP {speed:>5.0} GFLOP/s{}\n",
                part.unwrap_or_default()
            )
        } else {
            "\n".into()
        };
    }
    text
}

/// The type that random weights of a network are kept in: the published files of transformers are
/// in bf16.
fn kept(network: &BackboneConfig, compute: &Compute) -> DType {
    match compute.dtype {
        DType::F32 if network.is_flow() => DType::BF16,
        dtype => dtype,
    }
}

fn time_network(
    args: &BenchArgs,
    compute: &Compute,
    sizes: &Sizes,
    (h, w): (usize, usize),
) -> Result<Value> {
    let (b, device) = (args.batch as usize, &compute.device);
    let start = Instant::now();
    let weights = Weights::random(device, kept(&sizes.network, compute));
    let weights = weights.with_int8(compute.int8);
    let network = sizes.network.build(&weights)?;
    let load_s = start.elapsed().as_secs_f64();
    let random =
        |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, device)?.to_dtype(compute.arithmetic());
    let (added, unet) = match &sizes.network {
        BackboneConfig::UNet(config) => (config.addition_embed_type.is_some(), true),
        _ => (false, false),
    };
    let added = added.then(|| {
        Ok::<_, anyhow::Error>(AddedCond {
            text_embeds: random(&[b, 1280])?,
            time_ids: vec![vec![0.0; 6]; b],
        })
    });
    let [tokens, width] = sizes.context;
    let mut conditioning = Conditioning {
        context: random(&[b, tokens, width])?,
        lengths: vec![],
        added_cond: added.transpose()?,
        guidance: None,
    };
    // guidance makes two runs of a step; the transformers were distilled to do without
    let (guidance, scale, scalings) = if unet {
        conditioning = Conditioning::cat(&conditioning, &conditioning)?;
        (Guidance::Text(1), 7.5, Prediction::Epsilon.scalings(1.0))
    } else {
        let velocity = Scalings {
            c_skip: 1.0,
            c_out: -0.5,
            c_in: 1.0,
        };
        (Guidance::Off, 1.0, velocity)
    };
    let guided = |cx| -> Result<_> {
        Ok(CfgDenoiser {
            model: network.bind(cx, &conditioning, ExtraInputs::default())?,
            guidance,
            weights: vec![1.0],
            scale,
            rescale: 0.0,
            deep_cache: DeepCache::every(1),
            skip: None,
        })
    };
    let channels = sizes.network.in_channels();
    let latents = Tensor::randn(0f32, 1.0, (b, h, w, channels), device)?;
    let step = |guided: &mut CfgDenoiser| -> Result<f32> {
        Ok(guided
            .denoise(&latents, scalings, 500.0)?
            .sum_all()?
            .to_scalar::<f32>()?)
    };
    let profile = Profile::new(device);
    let (cx, profiled) = passes(compute, &profile);
    let (mut plain, mut profiled) = (guided(cx)?, guided(profiled)?);
    timed(
        device,
        args.repeat,
        load_s,
        &profile,
        || step(&mut profiled),
        || step(&mut plain),
    )
}

fn time_vae(
    args: &BenchArgs,
    compute: &Compute,
    config: &VaeConfig,
    (h, w): (usize, usize),
) -> Result<Value> {
    let start = Instant::now();
    let decoder = Decoder::new(&Weights::random(&compute.device, DType::F32), config)?;
    let load_s = start.elapsed().as_secs_f64();
    let latents = Tensor::randn(
        0f32,
        1.0,
        (1, h, w, config.latent_format().channels),
        &compute.device,
    )?;
    let decode = |cx| -> Result<f32> {
        Ok(decoder
            .decode(cx, &latents)?
            .sum_all()?
            .to_scalar::<f32>()?)
    };
    let profile = Profile::new(&compute.device);
    let (cx, profiled) = passes(compute, &profile);
    timed(
        &compute.device,
        args.repeat,
        load_s,
        &profile,
        || decode(profiled),
        || decode(cx),
    )
}

/// A forward pass that is not profiled, and one that is.
fn passes<'a>(compute: &Compute, profile: &'a Profile) -> (Forward<'a>, Forward<'a>) {
    let cx = Forward::on(&compute.device).with_precision(compute.precision());
    (
        cx,
        Forward {
            profile: Some(profile),
            ..cx
        },
    )
}

/// Times work, whose result is read back so that a device has finished it. Layers are timed in the
/// same runs on a CPU, and on a GPU in one of their own, in which each is waited for.
fn timed(
    device: &Device,
    repeat: u64,
    load_s: f64,
    profile: &Profile,
    mut profiled: impl FnMut() -> Result<f32>,
    mut plain: impl FnMut() -> Result<f32>,
) -> Result<Value> {
    let _awake = cpu::KeepAwake::start();
    let on_cpu = device.is_cpu();
    profiled()?;
    profile.take();
    let start = Instant::now();
    if !on_cpu {
        profiled()?;
    }
    let (of_one, of_one_s) = (profile.take(), start.elapsed().as_secs_f64());
    let mut work = || if on_cpu { profiled() } else { plain() };
    if !on_cpu {
        work()?;
    }
    let mut seconds = vec![];
    for _ in 0..repeat {
        let start = Instant::now();
        work()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    let of_all = profile.take();
    let (costs, runs, total) = if on_cpu {
        (of_all, repeat as f64, seconds.iter().sum::<f64>())
    } else {
        (of_one, 1.0, of_one_s)
    };
    seconds.sort_by(f64::total_cmp);
    let best = seconds.first().copied().unwrap_or(f64::NAN);
    let median = seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN);
    let operations = costs.values().map(|c| c.flops).sum::<u64>() as f64 / runs;
    let kernel = |((kind, [m, k, n]), cost): (&profile::Layer, &profile::Cost)| {
        let seconds = cost.time.as_secs_f64();
        json!({
            "kind": kind, "m": m, "k": k, "n": n, "calls": cost.calls as f64 / runs, "ms": seconds * 1e3 / runs,
            "share": seconds / total, "gflops": cost.flops as f64 / seconds / 1e9,
        })
    };
    let mut kernels: Vec<_> = costs.iter().collect();
    kernels.sort_by_key(|(_, cost)| std::cmp::Reverse(cost.time));
    Ok(json!({
        "median_s": median, "best_s": best, "tflop": operations / 1e12, "gflops": operations / best / 1e9, "load_s": load_s,
        "kernels": kernels.into_iter().map(kernel).collect::<Vec<_>>(),
    }))
}

/// The most memory that this process ever held, where the system tells.
fn peak_memory_mb() -> Option<f64> {
    peak_memory().map(mb)
}

fn mb(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn networks_and_autoencoders_of_a_size_belong_together() {
        for (size, channels, factor) in [
            (Size::Mini, 32, 16),
            (Size::Sd15, 4, 8),
            (Size::Sdxl, 4, 8),
            (Size::Klein, 128, 16),
            (Size::ZImage, 16, 8),
        ] {
            let sizes = size.sizes().unwrap();
            let format = sizes.vae.latent_format();
            let found = [sizes.network.in_channels(), format.channels];
            assert_eq!(
                (found, sizes.vae.factor()),
                ([channels; 2], factor),
                "{size:?}"
            );
        }
    }
}
