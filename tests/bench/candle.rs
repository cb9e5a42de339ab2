//! One guided SD1.5 step and one VAE decode at 512x512 with candle-transformers' networks, to stand
//! beside `sdgen bench`: `cargo run --release --manifest-path tests/bench/Cargo.toml`. The weights
//! are zeros, which dense arithmetic does not notice. candle gets AVX-512 matrix products, which it
//! leaves off by itself.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::stable_diffusion::unet_2d::{
    BlockConfig, UNet2DConditionModel, UNet2DConditionModelConfig,
};
use candle_transformers::models::stable_diffusion::vae::{AutoEncoderKL, AutoEncoderKLConfig};
use std::time::Instant;

fn main() {
    let device = Device::Cpu;
    let zeros = || VarBuilder::zeros(DType::F32, &device);
    let block = |out_channels, use_cross_attn| BlockConfig {
        out_channels,
        use_cross_attn,
        attention_head_dim: 8,
    };
    let blocks = vec![
        block(320, Some(1)),
        block(640, Some(1)),
        block(1280, Some(1)),
        block(1280, None),
    ];
    let config = UNet2DConditionModelConfig {
        blocks,
        cross_attention_dim: 768,
        ..Default::default()
    };
    let unet = UNet2DConditionModel::new(zeros(), 4, 4, false, config).unwrap();
    let latents = Tensor::randn(0f32, 1.0, (2, 4, 64, 64), &device).unwrap();
    let context = Tensor::randn(0f32, 1.0, (2, 77, 768), &device).unwrap();
    report("U-Net step, guided", || {
        unet.forward(&latents, 500.0, &context).unwrap()
    });
    drop(unet);
    let config = AutoEncoderKLConfig {
        block_out_channels: vec![128, 256, 512, 512],
        layers_per_block: 2,
        ..Default::default()
    };
    let vae = AutoEncoderKL::new(zeros(), 3, 3, config).unwrap();
    let latents = latents.narrow(0, 0, 1).unwrap();
    report("VAE decode", || vae.decode(&latents).unwrap());
}

/// The median of three runs after one that is not counted.
fn report(name: &str, mut work: impl FnMut() -> Tensor) {
    let mut seconds: Vec<f64> = (0..4)
        .map(|_| {
            let start = Instant::now();
            work().sum_all().unwrap().to_scalar::<f32>().unwrap();
            start.elapsed().as_secs_f64()
        })
        .skip(1)
        .collect();
    seconds.sort_by(f64::total_cmp);
    println!(
        "{name:<22}{:>8.2} s median, {:.2} s best",
        seconds[1], seconds[0]
    );
}
