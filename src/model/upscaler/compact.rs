//! Real-ESRGAN's compact network, whose work is done at the size of the input.

use super::UpscalerConfig;
use crate::nn::Forward;
use crate::nn::layers::Conv2d;
use crate::nn::weights::Weights;
use anyhow::{Result, bail};
use candle_core::{Result as TensorResult, Tensor};

/// Real-ESRGAN's SRVGGNetCompact (Wang et al. 2021, arXiv 2107.10833, and its code): convolutions at
/// the size of the input, whose result, shuffled to pixels, is added to the enlarged input.
pub(super) struct Compact {
    pub(super) convs: Vec<Conv2d>,
}

impl Compact {
    pub(super) fn new(w: &Weights, config: &UpscalerConfig, convolutions: usize) -> Result<Self> {
        let UpscalerConfig {
            channels,
            width,
            factor,
            ..
        } = *config;
        let conv = |i: usize| {
            let inputs = if i == 0 { channels } else { width };
            if i + 1 == convolutions {
                return Conv2d::new(
                    &w.at(format!("body.{}", 2 * i)),
                    inputs,
                    channels * factor * factor,
                    3,
                );
            }
            let slope = w
                .at(format!("body.{}", 2 * i + 1))
                .get("weight", &[width])?;
            Ok(Conv2d::new(&w.at(format!("body.{}", 2 * i)), inputs, width, 3)?.leaky(slope))
        };
        if convolutions < 2 {
            bail!("an upscaler needs at least two convolutions, this one has {convolutions}");
        }
        Ok(Self {
            convs: (0..convolutions).map(conv).collect::<Result<_>>()?,
        })
    }

    pub(super) fn features(
        &self,
        cx: Forward,
        rgb: &Tensor,
        done: &mut dyn FnMut(),
    ) -> TensorResult<Tensor> {
        self.convs.iter().try_fold(rgb.clone(), |x, conv| {
            let y = conv.forward(cx, &x);
            done();
            y
        })
    }
}
