//! SPAN, Wan et al. 2023 (arXiv 2311.12770): six blocks whose features weigh themselves, and no
//! attention with weights of its own.

use super::UpscalerConfig;
use crate::nn::Forward;
use crate::nn::layers::{Conv2d, concat};
use crate::nn::weights::Weights;
use anyhow::Result;
use candle_core::{Result as TensorResult, Tensor};
use candle_nn::ops::{sigmoid, silu};

/// The number of blocks, which are alike.
pub(super) const BLOCKS: usize = 6;
/// The mean colour of the pictures that it was trained with, and the levels of a channel.
const MEAN: [f32; 3] = [0.4488, 0.4371, 0.4040];
const LEVELS: f64 = 255.0;

pub(super) struct Span {
    /// the mean that is subtracted from pixels, if they are normalised
    mean: Option<Tensor>,
    conv_1: Conv2d,
    blocks: Vec<[Conv2d; 3]>,
    conv_2: Conv2d,
    conv_cat: Conv2d,
    upsampler: Conv2d,
}

impl Span {
    pub(super) fn new(w: &Weights, config: &UpscalerConfig, is_normalised: bool) -> Result<Self> {
        let UpscalerConfig {
            channels,
            width,
            factor,
            ..
        } = *config;
        let merged = |name: String| merged(&w.at(name), width, width);
        let block = |n: usize| {
            let conv = |i: usize| merged(format!("block_{n}.c{i}_r"));
            anyhow::Ok([conv(1)?, conv(2)?, conv(3)?])
        };
        Ok(Self {
            mean: is_normalised
                .then(|| Tensor::new(&MEAN, w.device()))
                .transpose()?,
            conv_1: self::merged(&w.at("conv_1"), channels, width)?,
            blocks: (1..=BLOCKS).map(block).collect::<Result<_>>()?,
            conv_2: merged("conv_2".into())?,
            conv_cat: Conv2d::new(&w.at("conv_cat"), 4 * width, width, 1)?,
            upsampler: Conv2d::new(&w.at("upsampler.0"), width, channels * factor * factor, 3)?,
        })
    }

    /// [b, h, w, channels] in 0..=1 -> [b, h, w, channels * factor * factor].
    pub(super) fn features(
        &self,
        cx: Forward,
        rgb: &Tensor,
        done: &mut dyn FnMut(),
    ) -> TensorResult<Tensor> {
        let rgb = match &self.mean {
            Some(mean) => (rgb.broadcast_sub(mean)? * LEVELS)?,
            None => rgb.clone(),
        };
        let first = self.conv_1.forward(cx, &rgb)?;
        let (mut x, mut of_first, mut inner) = (first.clone(), first.clone(), first.clone());
        for (n, [one, two, three]) in self.blocks.iter().enumerate() {
            inner = silu(&one.forward(cx, &x)?)?;
            let y = three.forward(cx, &silu(&two.forward(cx, &inner)?)?)?;
            let attention = (sigmoid(&y)? - 0.5)?;
            x = ((y + x)? * attention)?;
            if n == 0 {
                of_first = x.clone();
            }
            done();
        }
        let last = self.conv_2.forward(cx, &x)?;
        let all = concat(
            cx,
            &concat(cx, &first, &last)?,
            &concat(cx, &of_first, &inner)?,
        )?;
        self.upsampler
            .forward(cx, &self.conv_cat.forward(cx, &all)?)
    }
}

/// A convolution that was trained as three in a row, 1x1, 3x3 and 1x1, and a fourth of 1x1 beside
/// them: as one of 3x3, for which a picture's edge is that of the first.
fn merged(w: &Weights, inputs: usize, outputs: usize) -> Result<Conv2d> {
    const GAIN: usize = 2;
    let read = |name: &str, outputs: usize, inputs: usize, size: usize| {
        let w = w.at(name);
        let weight = w.get("weight", &[outputs, inputs, size, size])?;
        anyhow::Ok((weight, w.get("bias", &[outputs])?))
    };
    let (first, last) = (GAIN * inputs, GAIN * outputs);
    let (w1, b1) = read("conv.0", first, inputs, 1)?;
    let (w2, b2) = read("conv.1", last, first, 3)?;
    let (w3, b3) = read("conv.2", outputs, last, 1)?;
    let (skip, skip_bias) = read("sk", outputs, inputs, 1)?;
    let places = w2
        .reshape((last, first, 9))?
        .permute((2, 0, 1))?
        .contiguous()?; // [9, last, first]
    let (w1, w3) = (w1.reshape((first, inputs))?, w3.reshape((outputs, last))?);
    let weight = w3.broadcast_matmul(&places)?.broadcast_matmul(&w1)?; // [9, outputs, inputs]
    let skip = skip.reshape((1, outputs, inputs))?;
    let around = skip.zeros_like()?.repeat((4, 1, 1))?;
    let weight = (weight + Tensor::cat(&[&around, &skip, &around], 0)?)?
        .permute((1, 2, 0))?
        .reshape((outputs, inputs, 3, 3))?;
    let bias = places.sum(0)?.matmul(&b1.reshape((first, 1))?)?; // [last, 1]
    let bias = w3.matmul(&(bias + b2.reshape((last, 1))?)?)?;
    let bias = ((bias.reshape(outputs)? + b3)? + skip_bias)?;
    Conv2d::of(w.backend(), &weight.contiguous()?, bias)
}
