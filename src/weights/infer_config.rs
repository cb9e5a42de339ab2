//! The configuration of a single original file, from the shapes in its header: such files bring no
//! config.json. What shapes cannot tell (heads, norm groups, scheduler, prediction) is the family's,
//! and is listed among the assumptions.

use super::distillation::{Bearer, Distillation};
use super::transformers::EncoderKind;
use super::weights_file::WeightsFile;
use super::{
    Checkpoint, ENCODERS, FLUX_CLASS, FLUX2_CLASS, KONTEXT_PIPELINE, SD3_CLASS, TRANSFORMER,
    TokenizerFiles, TokenizerSource, Z_IMAGE_CLASS,
};
use anyhow::{Context, Result};
use candle_core::DType;
use serde_json::{Map, Value, json};

/// Hints about the prediction type that single files carry besides their weights.
pub struct Extra {
    v_prediction: Option<bool>,
    zero_snr: bool,
}

impl Extra {
    /// Looks for `v_pred` and `ztsnr` marker keys, ModelSpec's header text and CompVis' step
    /// counter.
    pub fn of(source: &WeightsFile, keys: &[String]) -> Self {
        let marker = |name: &str| keys.iter().any(|k| k == name);
        let spec = source
            .metadata("modelspec.prediction_type")
            .map(|p| p.starts_with('v'));
        // trained for 875,000 steps: Stable Diffusion 2.0-base, the one 2.x model that predicts noise
        let steps = keys.iter().find(|k| *k == "global_step").and_then(|k| {
            source
                .read(k)
                .ok()?
                .to_dtype(DType::F32)
                .ok()?
                .flatten_all()
                .ok()?
                .to_vec1::<f32>()
                .ok()?
                .first()
                .copied()
        });
        let base = steps.map(|s| s != 875_000.0).filter(|v| !v);
        Self {
            v_prediction: if marker("v_pred") {
                Some(true)
            } else {
                spec.or(base)
            },
            zero_snr: marker("ztsnr"),
        }
    }
}

/// What a single file's prediction, size and scheduler follow from.
struct Traits {
    /// it has SDXL's second text encoder
    is_xl: bool,
    /// its text encoder is OpenCLIP's, as in Stable Diffusion 2.x
    is_second_generation: bool,
    v_prediction: bool,
    zero_snr: bool,
    distillation: Option<Distillation>,
}

impl Traits {
    fn of(checkpoint: &mut Checkpoint, unet: &Map<String, Value>, extra: &Extra) -> Self {
        let is_xl = checkpoint.has(ENCODERS[1]);
        let is_second_generation =
            !is_xl && unet.get("use_linear_projection") == Some(&Value::Bool(true));
        let distillation = Distillation::named(&checkpoint.name, Bearer::Model);
        // models with a distillation's name were made from ones that predict noise, and so was the
        // one that Stability made for inpainting
        let is_inpainting = unet.get("in_channels") == Some(&9.into());
        let known = extra
            .v_prediction
            .or(distillation.as_ref().map(|_| false))
            .or((is_second_generation && is_inpainting).then_some(false));
        if known.is_none() && is_second_generation {
            checkpoint.warnings.push(
                "assumed v-prediction, as in Stable Diffusion 2.1; for a 2.0 base model use `--prediction epsilon -W 512 -H 512`"
                    .into(),
            );
        }
        Self {
            is_xl,
            is_second_generation,
            v_prediction: known.unwrap_or(is_second_generation),
            zero_snr: extra.zero_snr,
            distillation,
        }
    }

    /// The size of the latents that the model was trained on, height and width.
    fn sample_size(&self) -> usize {
        match self.distillation.as_ref().and_then(|named| named.side_px) {
            Some(side_px) => side_px / 8,
            None if self.is_xl => 128,
            None if self.is_second_generation && self.v_prediction => 96,
            None => 64,
        }
    }

    /// The scheduler's configuration.
    fn scheduler(&self) -> Map<String, Value> {
        let class = if self.is_xl {
            "EulerDiscreteScheduler"
        } else if self.is_second_generation || self.zero_snr {
            // PNDM does not support zero terminal SNR
            "DDIMScheduler"
        } else {
            "PNDMScheduler"
        };
        // what the published files say, and no more: a sampler of another class takes its own
        // defaults for what they leave out
        let config = json!({
            "_class_name": class,
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "set_alpha_to_one": false,
            "clip_sample": false,
            "skip_prk_steps": true,
            "steps_offset": 1,
        });
        let mut config = config.as_object().cloned().unwrap_or_default();
        if self.is_xl {
            config.insert("timestep_spacing".into(), "leading".into());
        }
        if self.v_prediction {
            config.insert("prediction_type".into(), "v_prediction".into());
        }
        if self.zero_snr {
            // a model with zero terminal SNR has to start from the very last timestep
            config.insert("timestep_spacing".into(), "trailing".into());
            config.insert("rescale_betas_zero_snr".into(), true.into());
        }
        if let Some(named) = &self.distillation {
            config.extend(named.scheduler.as_object().cloned().unwrap_or_default());
        }
        config
    }
}

/// Fills in the configurations that a diffusers folder would hold.
pub fn configure(checkpoint: &mut Checkpoint, extra: Extra) -> Result<()> {
    let mut unet = unet(checkpoint)?;
    let traits = Traits::of(checkpoint, &unet, &extra);
    unet.insert("sample_size".into(), traits.sample_size().into());
    let scheduler = traits.scheduler();
    let setting = |key: &str| {
        scheduler
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let spacing = match setting("timestep_spacing") {
        "" => String::new(),
        spacing => format!("{spacing} timesteps, "),
    };
    let prediction = match setting("prediction_type") {
        "" => "epsilon",
        prediction => prediction,
    };
    checkpoint.assumptions.push(format!(
        "{}, {spacing}predicts {prediction}",
        setting("_class_name")
    ));
    let scale = vae_scale(checkpoint);
    checkpoint.assumptions.push(format!(
        "32 norm groups, CLIP's vocabulary, betas 0.00085 to 0.012 (scaled linear), VAE scale {}",
        scale.scaling_factor
    ));
    for encoder in ENCODERS {
        if checkpoint.has(encoder) {
            let is_open_clip = traits.is_second_generation || encoder == ENCODERS[1];
            configure_encoder(checkpoint, encoder, is_open_clip)?;
        }
    }
    if traits.is_xl {
        configure_added_conditions(checkpoint, &mut unet)?;
    }
    if checkpoint.has("vae") {
        checkpoint
            .configs
            .insert("vae".into(), vae(checkpoint, scale)?);
    }
    checkpoint.configs.extend([
        ("unet".into(), unet.into()),
        ("scheduler".into(), scheduler.into()),
    ]);
    Ok(())
}

/// Fills in the configuration of a text encoder and its tokenizer. CLIP-L was trained with
/// quick_gelu and padded with its end token, OpenCLIP's encoders with the exact GELU and `!`.
fn configure_encoder(
    checkpoint: &mut Checkpoint,
    encoder: &'static str,
    is_open_clip: bool,
) -> Result<()> {
    let activation = if is_open_clip { "gelu" } else { "quick_gelu" };
    let config = text(checkpoint, encoder, activation)?;
    let mut tokenizer = clip_tokenizer(is_open_clip);
    tokenizer.config["model_max_length"] = config["max_position_embeddings"].clone();
    checkpoint.tokenizers.insert(encoder, tokenizer);
    checkpoint.configs.insert(encoder.into(), config);
    Ok(())
}

/// CLIP's tokenizer as it pads for either kind of encoder.
pub fn clip_tokenizer(is_open_clip: bool) -> TokenizerSource {
    let pad = if is_open_clip { "!" } else { "<|endoftext|>" };
    TokenizerSource {
        files: TokenizerFiles::Clip,
        config: json!({ "pad_token": pad }),
    }
}

/// Fills in how SDXL's U-Net takes the pooled prompt embeddings and the time ids: six of these for a
/// base model, five for a refiner, which lacks the first text encoder.
fn configure_added_conditions(
    checkpoint: &mut Checkpoint,
    unet: &mut Map<String, Value>,
) -> Result<()> {
    let is_base = checkpoint.has(ENCODERS[0]);
    let inputs = size(checkpoint, "unet.add_embedding.linear_1.weight", 1)?;
    let pooled = size(checkpoint, "text_encoder_2.text_projection.weight", 0)?;
    let dim = inputs.saturating_sub(pooled) / if is_base { 6 } else { 5 };
    unet.insert("addition_embed_type".into(), "text_time".into());
    unet.insert("addition_time_embed_dim".into(), dim.into());
    unet.insert(
        "projection_class_embeddings_input_dim".into(),
        inputs.into(),
    );
    checkpoint.configs.insert(
        "pipeline".into(),
        json!({ "force_zeros_for_empty_prompt": is_base }),
    );
    Ok(())
}

/// The size of one dimension of a tensor that must be there.
fn size(checkpoint: &Checkpoint, name: &str, dim: usize) -> Result<usize> {
    let shape = checkpoint
        .shape(name)
        .with_context(|| checkpoint.missing_tensor(name))?;
    shape.get(dim).copied().with_context(|| {
        format!(
            "tensor `{name}` of `{}` has shape {shape:?}, with too few dimensions",
            checkpoint.name
        )
    })
}

/// The U-Net's configuration.
fn unet(c: &Checkpoint) -> Result<Map<String, Value>> {
    // the number of transformer blocks of each layer; empty for a block without attention
    let depths = |block: &str| -> Vec<usize> {
        let attentions = c.count(&format!("{block}.attentions."));
        (0..attentions)
            .map(|i| c.count(&format!("{block}.attentions.{i}.transformer_blocks.")))
            .collect()
    };
    let middle = depths("unet.mid_block").first().copied();
    let blocks = c.count("unet.down_blocks.");
    let (mut widths, mut layers, mut down, mut up) = (vec![], vec![], vec![], vec![]);
    let (mut down_depths, mut up_depths) = (vec![], vec![]);
    let (mut cross_attention_dim, mut linear) = (None, false);
    for i in 0..blocks {
        let block = format!("unet.down_blocks.{i}");
        widths.push(size(c, &format!("{block}.resnets.0.conv1.weight"), 0)?);
        layers.push(c.count(&format!("{block}.resnets.")));
        let (down_depth, up_depth) = (depths(&block), depths(&format!("unet.up_blocks.{i}")));
        down.push(if down_depth.is_empty() {
            "DownBlock2D"
        } else {
            "CrossAttnDownBlock2D"
        });
        up.push(if up_depth.is_empty() {
            "UpBlock2D"
        } else {
            "CrossAttnUpBlock2D"
        });
        if !down_depth.is_empty() {
            cross_attention_dim = Some(size(
                c,
                &format!("{block}.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
                1,
            )?);
            linear = c
                .shape(&format!("{block}.attentions.0.proj_in.weight"))
                .is_some_and(|s| s.len() == 2);
        }
        // the mid block takes its depth from the last block, which may have no attention itself
        down_depths.push(if down_depth.is_empty() {
            json!(middle.unwrap_or(1))
        } else {
            json!(down_depth)
        });
        up_depths.push(up_depth);
    }
    let middle = match (middle, c.count("unet.mid_block.resnets.")) {
        (Some(_), _) => Some("UNetMidBlock2DCrossAttn"),
        (None, 0) => None,
        (None, _) => Some("UNetMidBlock2D"),
    };
    // 1.x: eight heads at every width; 2.x and XL: as many heads of 64 as fit
    let heads = if linear {
        json!(widths.iter().map(|w| (w / 64).max(1)).collect::<Vec<_>>())
    } else {
        json!(8)
    };
    let config = json!({
        "in_channels": size(c, "unet.conv_in.weight", 1)?, "out_channels": size(c, "unet.conv_out.weight", 0)?,
        "block_out_channels": widths, "layers_per_block": layers,
        "transformer_layers_per_block": down_depths, "reverse_transformer_layers_per_block": up_depths,
        "down_block_types": down, "mid_block_type": middle, "up_block_types": up,
        "cross_attention_dim": cross_attention_dim.context("the U-Net has no cross attention")?,
        "use_linear_projection": linear, "attention_head_dim": heads,
    });
    Ok(config.as_object().cloned().unwrap_or_default())
}

/// Fills in the configurations of a FLUX.2 klein from its transformer. Files of the distilled model
/// and of the base have the same shapes: the name tells.
pub fn flux2(checkpoint: &mut Checkpoint) -> Result<()> {
    let c = &*checkpoint;
    let width = size(c, "transformer.x_embedder.weight", 0)?;
    let head = size(c, "transformer.transformer_blocks.0.attn.norm_q.weight", 0)?;
    let inner = size(c, "transformer.transformer_blocks.0.ff.linear_in.weight", 0)?;
    let time = "transformer.time_guidance_embed.timestep_embedder.linear_1.weight";
    let guidance = "transformer.time_guidance_embed.guidance_embedder.linear_1.weight";
    let config = json!({
        "_class_name": FLUX2_CLASS,
        "in_channels": size(c, "transformer.x_embedder.weight", 1)?,
        "num_layers": c.count("transformer.transformer_blocks."),
        "num_single_layers": c.count("transformer.single_transformer_blocks."),
        "attention_head_dim": head, "num_attention_heads": width / head.max(1),
        "joint_attention_dim": size(c, "transformer.context_embedder.weight", 1)?,
        "timestep_guidance_channels": size(c, time, 1)?,
        // a half of the rows gates the other
        "mlp_ratio": (inner / 2) as f64 / width.max(1) as f64,
        "axes_dims_rope": vec![head / 4; 4], "rope_theta": 2000, "eps": 1e-6,
        "guidance_embeds": c.shape(guidance).is_some(),
    });
    let scheduler = json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
        "shift": 3.0, "use_dynamic_shifting": true, "time_shift_type": "exponential",
        "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096,
    });
    let is_distilled = !has_word(&checkpoint.name, "base");
    let pipeline = json!({ "_class_name": "Flux2KleinPipeline", "is_distilled": is_distilled });
    checkpoint.assumptions.push(match is_distilled {
        true => "distilled to four steps, as its name does not say `base`".into(),
        false => "not distilled, as its name says `base`".into(),
    });
    checkpoint.assumptions.push(
        "four equal parts of rotary positions, theta 2000; dynamic shift of noise levels".into(),
    );
    checkpoint.configs.extend([
        (TRANSFORMER.into(), config),
        ("scheduler".into(), scheduler),
        ("pipeline".into(), pipeline),
    ]);
    Ok(())
}

/// Fills in the configurations of a Z-Image from its transformer. Turbo's has the shapes of the
/// base's: the name tells.
pub fn z_image(checkpoint: &mut Checkpoint) -> Result<()> {
    /// Latents of a token: a square of 2x2.
    const PATCH: usize = 4;
    let c = &*checkpoint;
    let dim = size(c, "transformer.all_x_embedder.2-1.weight", 0)?;
    let head = size(c, "transformer.layers.0.attention.norm_q.weight", 0)?;
    let heads = dim / head.max(1);
    let config = json!({
        "_class_name": Z_IMAGE_CLASS,
        "in_channels": size(c, "transformer.all_x_embedder.2-1.weight", 1)? / PATCH,
        "dim": dim, "n_heads": heads, "n_kv_heads": heads,
        "n_layers": c.count("transformer.layers."),
        "n_refiner_layers": c.count("transformer.noise_refiner."),
        "cap_feat_dim": size(c, "transformer.cap_embedder.1.weight", 1)?,
        // 32, 48 and 48 of 128
        "axes_dims": [head / 4, head * 3 / 8, head * 3 / 8],
        "norm_eps": 1e-5, "rope_theta": 256.0, "t_scale": 1000.0,
    });
    let is_turbo = has_word(&checkpoint.name, "turbo");
    let scheduler = json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
        "shift": if is_turbo { 3.0 } else { 6.0 }, "use_dynamic_shifting": false,
    });
    checkpoint.assumptions.push(match is_turbo {
        true => "distilled to eight steps (shift 3), as its name says `turbo`".into(),
        false => "not distilled (shift 6), as its name does not say `turbo`".into(),
    });
    checkpoint.assumptions.push(
        "rotary positions in parts of a quarter and twice three eighths, theta 256; a VAE in a file has FLUX.1's scale and shift".into(),
    );
    checkpoint.configs.extend([
        (TRANSFORMER.into(), config),
        ("scheduler".into(), scheduler),
        (
            "pipeline".into(),
            json!({ "_class_name": "ZImagePipeline" }),
        ),
    ]);
    Ok(())
}

/// Fills in the configurations of a FLUX.1 from its transformer: dev takes the guidance scale as an
/// input, schnell does not.
pub fn flux1(checkpoint: &mut Checkpoint) -> Result<()> {
    let c = &*checkpoint;
    let width = size(c, "transformer.x_embedder.weight", 0)?;
    let head = size(c, "transformer.transformer_blocks.0.attn.norm_q.weight", 0)?;
    let pooled = "transformer.time_text_embed.text_embedder.linear_1.weight";
    let guidance = "transformer.time_text_embed.guidance_embedder.linear_1.weight";
    let is_dev = c.shape(guidance).is_some();
    // 16, 56 and 56 of 128
    let side = head * 7 / 32 * 2;
    let config = json!({
        "_class_name": FLUX_CLASS,
        "in_channels": size(c, "transformer.x_embedder.weight", 1)?,
        "out_channels": size(c, "transformer.proj_out.weight", 0)?,
        "num_layers": c.count("transformer.transformer_blocks."),
        "num_single_layers": c.count("transformer.single_transformer_blocks."),
        "attention_head_dim": head, "num_attention_heads": width / head.max(1),
        "joint_attention_dim": size(c, "transformer.context_embedder.weight", 1)?,
        "pooled_projection_dim": size(c, pooled, 1)?,
        "guidance_embeds": is_dev,
        "axes_dims_rope": [head - 2 * side, side, side],
    });
    let scheduler = json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
        "shift": if is_dev { 3.0 } else { 1.0 }, "use_dynamic_shifting": is_dev,
        "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096,
    });
    let class = if has_word(&checkpoint.name, "kontext") {
        let why = "looks at a picture, as its name says `kontext`";
        checkpoint.assumptions.push(why.into());
        KONTEXT_PIPELINE
    } else {
        "FluxPipeline"
    };
    checkpoint.assumptions.push(match is_dev {
        true => "levels of dev (dynamic shift), as guidance is an input".into(),
        false => "levels of schnell (no shift), as guidance is no input".into(),
    });
    checkpoint.assumptions.push(
        "rotary positions in parts of an eighth and twice seven sixteenths; a VAE in a file has FLUX.1's scale and shift".into(),
    );
    checkpoint.configs.extend([
        (TRANSFORMER.into(), config),
        ("scheduler".into(), scheduler),
        ("pipeline".into(), json!({ "_class_name": class })),
    ]);
    Ok(())
}

/// Fills in the configurations of a Stable Diffusion 3 from its transformer.
pub fn sd3(checkpoint: &mut Checkpoint) -> Result<()> {
    /// The width of a head where no norm tells it.
    const HEAD: usize = 64;
    let c = &*checkpoint;
    let width = size(c, "transformer.pos_embed.proj.weight", 0)?;
    let channels = size(c, "transformer.pos_embed.proj.weight", 1)?;
    let positions = size(c, "transformer.pos_embed.pos_embed", 1)?;
    let blocks = c.count("transformer.transformer_blocks.");
    let has = |i: usize, name: &str| {
        let name = format!("transformer.transformer_blocks.{i}.{name}.weight");
        c.shape(&name).is_some()
    };
    let norm = "transformer.transformer_blocks.0.attn.norm_q.weight";
    let head = c.shape(norm).and_then(|shape| shape.first().copied());
    let dual: Vec<usize> = (0..blocks).filter(|i| has(*i, "attn2.to_q")).collect();
    let pooled = "transformer.time_text_embed.text_embedder.linear_1.weight";
    let config = json!({
        "_class_name": SD3_CLASS, "sample_size": 128, "patch_size": 2,
        "in_channels": channels, "out_channels": channels, "num_layers": blocks,
        "attention_head_dim": head.unwrap_or(HEAD),
        "num_attention_heads": width / head.unwrap_or(HEAD).max(1),
        "joint_attention_dim": size(c, "transformer.context_embedder.weight", 1)?,
        "caption_projection_dim": width, "pooled_projection_dim": size(c, pooled, 1)?,
        "pos_embed_max_size": positions.isqrt(), "dual_attention_layers": dual,
        "qk_norm": head.map(|_| "rms_norm"),
    });
    let scheduler = json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
    });
    checkpoint
        .assumptions
        .push("shift 3 of noise levels; the scale and shift of latents of its family".into());
    checkpoint.configs.extend([
        (TRANSFORMER.into(), config),
        ("scheduler".into(), scheduler),
        (
            "pipeline".into(),
            json!({ "_class_name": "StableDiffusion3Pipeline" }),
        ),
    ]);
    Ok(())
}

/// Fills in the configuration of a T5 that encodes text.
fn t5(checkpoint: &mut Checkpoint, component: &str) -> Result<()> {
    let c = &*checkpoint;
    let attention = format!("{component}.encoder.block.0.layer.0.SelfAttention");
    let ff = format!("{component}.encoder.block.0.layer.1.DenseReluDense");
    let bias = format!("{attention}.relative_attention_bias.weight");
    let own = format!("{component}.shared.weight");
    let embeddings = match c.shape(&own) {
        Some(_) => own,
        None => format!("{component}.encoder.embed_tokens.weight"),
    };
    let heads = size(c, &bias, 1)?;
    let config = json!({
        "model_type": "t5", "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6,
        "vocab_size": size(c, &embeddings, 0)?, "d_model": size(c, &embeddings, 1)?,
        "num_layers": c.count(&format!("{component}.encoder.block.")), "num_heads": heads,
        "d_kv": size(c, &format!("{attention}.q.weight"), 0)? / heads.max(1),
        "d_ff": size(c, &format!("{ff}.wi_0.weight"), 0)?,
        "relative_attention_num_buckets": size(c, &bias, 0)?,
        "relative_attention_max_distance": 128,
    });
    checkpoint.configs.insert(component.into(), config);
    Ok(())
}

/// Whether a file's name has a word, whatever stands between its words.
fn has_word(name: &str, word: &str) -> bool {
    name.to_lowercase()
        .split(|c: char| !c.is_alphanumeric())
        .any(|own| own == word)
}

/// Fills in the configuration of a text encoder, and CLIP's tokenizer.
pub fn text_encoder(
    checkpoint: &mut Checkpoint,
    component: &'static str,
    kind: EncoderKind,
) -> Result<()> {
    match kind {
        EncoderKind::Clip => configure_encoder(checkpoint, component, component == ENCODERS[1]),
        EncoderKind::T5 => t5(checkpoint, component),
        EncoderKind::Qwen3 => qwen3(checkpoint),
    }
}

/// Fills in the configuration of a Qwen3 that encodes text.
fn qwen3(checkpoint: &mut Checkpoint) -> Result<()> {
    let c = &*checkpoint;
    let layer = "text_encoder.model.layers.0";
    let rows = |name: &str| size(c, &format!("{layer}.{name}.weight"), 0);
    let head = rows("self_attn.q_norm")?;
    let heads = |name: &str| Ok::<_, anyhow::Error>(rows(name)? / head.max(1));
    let embeddings = "text_encoder.model.embed_tokens.weight";
    let config = json!({
        "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "vocab_size": size(c, embeddings, 0)?, "hidden_size": size(c, embeddings, 1)?,
        "num_hidden_layers": c.count("text_encoder.model.layers."), "head_dim": head,
        "num_attention_heads": heads("self_attn.q_proj")?,
        "num_key_value_heads": heads("self_attn.k_proj")?,
        "intermediate_size": rows("mlp.gate_proj")?,
    });
    checkpoint.configs.insert(ENCODERS[0].into(), config);
    Ok(())
}

/// The configuration of a VAE alone.
pub fn autoencoder(c: &Checkpoint, scale: VaeScale) -> Result<Value> {
    if c.shape("vae.decoder.layers.0.weight").is_none() {
        return vae(c, scale);
    }
    // TAESD numbers all its layers through: some blocks, then upsampling, which has no weights, and a
    // convolution
    let has = |layer: usize, name: &str| {
        c.shape(&format!("vae.decoder.layers.{layer}.{name}"))
            .is_some()
    };
    let (mut layer, mut blocks) = (2, vec![]);
    let out_channels = loop {
        let run = (layer..)
            .take_while(|layer| has(*layer, "conv.0.weight"))
            .count();
        blocks.push(run);
        layer += run;
        if !has(layer + 1, "weight") {
            break size(c, &format!("vae.decoder.layers.{layer}.weight"), 0)?;
        }
        layer += 2;
    };
    let width = size(c, "vae.decoder.layers.0.weight", 0)?;
    Ok(json!({
        "_class_name": "AutoencoderTiny", "latent_channels": size(c, "vae.decoder.layers.0.weight", 1)?, "out_channels": out_channels,
        "decoder_block_out_channels": vec![width; blocks.len()], "num_decoder_blocks": blocks,
    }))
}

/// `scaling_factor` and `shift_factor` of a model's latents.
#[derive(Clone, Copy)]
pub struct VaeScale {
    pub scaling_factor: f64,
    pub shift_factor: Option<f64>,
}

/// The scale of the latents of a model's family; of other transformers than Stable Diffusion 3's,
/// FLUX.1's.
pub fn vae_scale(model: &Checkpoint) -> VaeScale {
    let transformer = model.optional_config(TRANSFORMER);
    let class = transformer.and_then(|config| config.get("_class_name")?.as_str());
    let (scaling_factor, shift_factor) = if class == Some(SD3_CLASS) {
        (1.5305, Some(0.0609))
    } else if model.has(TRANSFORMER) {
        (0.3611, Some(0.1159))
    } else if model.has(ENCODERS[1]) {
        (0.13025, None)
    } else {
        (0.18215, None)
    };
    VaeScale {
        scaling_factor,
        shift_factor,
    }
}

/// The configuration of an AutoencoderKL, or of FLUX.2's, which has the statistics of its latents.
fn vae(c: &Checkpoint, scale: VaeScale) -> Result<Value> {
    let blocks = c.count("vae.decoder.up_blocks.");
    let mut widths = vec![];
    for i in (0..blocks).rev() {
        widths.push(size(
            c,
            &format!("vae.decoder.up_blocks.{i}.resnets.0.conv1.weight"),
            0,
        )?);
    }
    let layers = c
        .count("vae.decoder.up_blocks.0.resnets.")
        .saturating_sub(1);
    let is_flux2 = c.shape("vae.bn.running_mean").is_some();
    Ok(json!({
        "_class_name": if is_flux2 { "AutoencoderKLFlux2" } else { "AutoencoderKL" },
        "latent_channels": size(c, "vae.decoder.conv_in.weight", 1)?, "out_channels": size(c, "vae.decoder.conv_out.weight", 0)?,
        "in_channels": 3, "down_block_types": vec!["DownEncoderBlock2D"; blocks], "up_block_types": vec!["UpDecoderBlock2D"; blocks],
        "block_out_channels": widths, "layers_per_block": layers, "scaling_factor": scale.scaling_factor, "shift_factor": scale.shift_factor,
        "use_quant_conv": c.shape("vae.quant_conv.weight").is_some(),
        "use_post_quant_conv": c.shape("vae.post_quant_conv.weight").is_some(),
    }))
}

/// The configuration of a CLIP text encoder.
fn text(c: &Checkpoint, component: &str, activation: &str) -> Result<Value> {
    let model = format!("{component}.text_model");
    let width = size(c, &format!("{model}.embeddings.token_embedding.weight"), 1)?;
    let vocab = size(c, &format!("{model}.embeddings.token_embedding.weight"), 0)?;
    let projection = c
        .shape(&format!("{component}.text_projection.weight"))
        .and_then(|shape| shape.first());
    Ok(json!({
        "hidden_size": width, "vocab_size": vocab, "projection_dim": projection.unwrap_or(&width),
        "max_position_embeddings": size(c, &format!("{model}.embeddings.position_embedding.weight"), 0)?,
        "num_hidden_layers": c.count(&format!("{model}.encoder.layers.")), "num_attention_heads": (width / 64).max(1),
        "intermediate_size": size(c, &format!("{model}.encoder.layers.0.mlp.fc1.weight"), 0)?,
        "hidden_act": activation,
    }))
}
