//! The configuration of a single original file, from its header's shapes: such files bring no config.json.
//! What shapes cannot tell (heads, norm groups, schedule, prediction) is the family's, and is listed as assumed.

use super::Checkpoint;
use super::source::Source;
use anyhow::{Context, Result};
use candle_core::DType;
use serde_json::{Value, json};

/// Hints about the prediction type that single files carry besides their weights.
pub struct Extra {
    v_prediction: Option<bool>,
    zero_snr: bool,
}

impl Extra {
    /// Looks for `v_pred` and `ztsnr` marker keys, ModelSpec's header text and CompVis' step counter.
    pub fn of(source: &Source, keys: &[String]) -> Self {
        let marker = |name: &str| keys.iter().any(|k| k == name);
        let spec = source.metadata("modelspec.prediction_type").map(|p| p.starts_with('v'));
        // 875,000 steps: Stable Diffusion 2.0-base, the one 2.x model that predicts noise
        let steps = keys
            .iter()
            .find(|k| *k == "global_step")
            .and_then(|k| source.read(k).ok()?.to_dtype(DType::F32).ok()?.flatten_all().ok()?.to_vec1::<f32>().ok()?.first().copied());
        let base = steps.map(|s| s != 875_000.0).filter(|v| !v);
        Self { v_prediction: if marker("v_pred") { Some(true) } else { spec.or(base) }, zero_snr: marker("ztsnr") }
    }
}

/// Fills in the configurations that a diffusers folder would hold.
pub fn configure(checkpoint: &mut Checkpoint, extra: Extra) -> Result<()> {
    let unet = unet(checkpoint)?;
    let second_generation = unet.get("use_linear_projection") == Some(&Value::Bool(true));
    let v_prediction = extra.v_prediction.unwrap_or(second_generation);
    if extra.v_prediction.is_none() && second_generation {
        checkpoint.doubt =
            Some("assumed v-prediction, as in Stable Diffusion 2.1; for a 2.0 base model use `--prediction epsilon -W 512 -H 512`".into());
    }
    let unet = with(unet, "sample_size", json!(if second_generation && v_prediction { 96 } else { 64 }));
    let prediction = if v_prediction { "v_prediction" } else { "epsilon" };
    let text = text(checkpoint, second_generation)?;
    let vae = vae(checkpoint)?;
    let scheduler = json!({
        "_class_name": if second_generation { "DDIMScheduler" } else { "PNDMScheduler" },
        "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "set_alpha_to_one": false, "clip_sample": false, "skip_prk_steps": true, "steps_offset": 1,
        "timestep_spacing": "leading", "prediction_type": prediction, "rescale_betas_zero_snr": extra.zero_snr,
    });
    checkpoint.assumed.push("32 norm groups, CLIP's vocabulary, betas 0.00085 to 0.012 (scaled linear), VAE scale 0.18215".into());
    let pad = if second_generation { "!" } else { "<|endoftext|>" };
    checkpoint.tokenizer_config = json!({ "pad_token": pad, "model_max_length": text["max_position_embeddings"] });
    for (part, config) in [("unet", unet), ("vae", vae), ("text_encoder", text), ("scheduler", scheduler)] {
        checkpoint.configs.insert(part.into(), config);
    }
    Ok(())
}

fn with(mut config: Value, key: &str, value: Value) -> Value {
    if let Some(map) = config.as_object_mut() {
        map.insert(key.into(), value);
    }
    config
}

/// Size of one dimension of a tensor that must be there.
fn size(checkpoint: &Checkpoint, name: &str, dim: usize) -> Result<usize> {
    let shape = checkpoint.shape(name).with_context(|| checkpoint.missing(name))?;
    shape
        .get(dim)
        .copied()
        .with_context(|| format!("tensor `{name}` of `{}` has shape {shape:?}, with too few dimensions", checkpoint.name))
}

fn unet(c: &Checkpoint) -> Result<Value> {
    let blocks = c.count("unet.down_blocks.");
    let (mut widths, mut layers, mut depths, mut down, mut up) = (vec![], vec![], vec![], vec![], vec![]);
    let (mut context, mut linear) = (None, false);
    for i in 0..blocks {
        let block = format!("unet.down_blocks.{i}");
        widths.push(size(c, &format!("{block}.resnets.0.conv1.weight"), 0)?);
        layers.push(c.count(&format!("{block}.resnets.")));
        let depth = c.count(&format!("{block}.attentions.0.transformer_blocks."));
        depths.push(depth.max(1));
        down.push(if depth > 0 { "CrossAttnDownBlock2D" } else { "DownBlock2D" });
        let attended = c.count(&format!("unet.up_blocks.{i}.attentions.")) > 0;
        up.push(if attended { "CrossAttnUpBlock2D" } else { "UpBlock2D" });
        if depth > 0 {
            context = Some(size(c, &format!("{block}.attentions.0.transformer_blocks.0.attn2.to_k.weight"), 1)?);
            linear = c.shape(&format!("{block}.attentions.0.proj_in.weight")).is_some_and(|s| s.len() == 2);
        }
    }
    // 1.x: eight heads at every width; 2.x: as many heads of 64 as fit
    let heads = if linear { json!(widths.iter().map(|w| w / 64).collect::<Vec<_>>()) } else { json!(8) };
    Ok(json!({
        "in_channels": size(c, "unet.conv_in.weight", 1)?, "out_channels": size(c, "unet.conv_out.weight", 0)?,
        "block_out_channels": widths, "layers_per_block": layers, "transformer_layers_per_block": depths,
        "down_block_types": down, "up_block_types": up,
        "cross_attention_dim": context.context("the U-Net has no cross attention")?,
        "use_linear_projection": linear, "attention_head_dim": heads,
        "addition_embed_type": if c.shape("unet.add_embedding.linear_1.weight").is_some() { json!("text_time") } else { Value::Null },
    }))
}

fn vae(c: &Checkpoint) -> Result<Value> {
    let blocks = c.count("vae.decoder.up_blocks.");
    let mut widths = vec![];
    for i in (0..blocks).rev() {
        widths.push(size(c, &format!("vae.decoder.up_blocks.{i}.resnets.0.conv1.weight"), 0)?);
    }
    let layers = c.count("vae.decoder.up_blocks.0.resnets.").saturating_sub(1);
    Ok(json!({
        "latent_channels": size(c, "vae.decoder.conv_in.weight", 1)?, "out_channels": size(c, "vae.decoder.conv_out.weight", 0)?,
        "block_out_channels": widths, "layers_per_block": layers, "scaling_factor": 0.18215,
        "use_post_quant_conv": c.shape("vae.post_quant_conv.weight").is_some(),
    }))
}

fn text(c: &Checkpoint, second_generation: bool) -> Result<Value> {
    let model = "text_encoder.text_model";
    let width = size(c, &format!("{model}.embeddings.token_embedding.weight"), 1)?;
    let vocab = size(c, &format!("{model}.embeddings.token_embedding.weight"), 0)?;
    Ok(json!({
        "hidden_size": width, "vocab_size": vocab,
        "max_position_embeddings": size(c, &format!("{model}.embeddings.position_embedding.weight"), 0)?,
        "num_hidden_layers": c.count(&format!("{model}.encoder.layers.")), "num_attention_heads": (width / 64).max(1),
        "intermediate_size": size(c, &format!("{model}.encoder.layers.0.mlp.fc1.weight"), 0)?,
        // CLIP-L was trained with quick_gelu, OpenCLIP's encoders with the exact one
        "hidden_act": if second_generation { "gelu" } else { "quick_gelu" },
    }))
}
