//! RealPLKSR: Lee et al. 2024 (arXiv 2404.11848), as trainers of upscalers have it: blocks with a
//! large kernel over some of their channels, whose result is added to the enlarged input.

use super::UpscalerConfig;
use crate::nn::Forward;
use crate::nn::layers::{Activation, Conv2d, GroupNorm, LayerNorm, concat};
use crate::nn::weights::Weights;
use anyhow::Result;
use candle_core::{Result as TensorResult, Tensor};
use candle_nn::ops::sigmoid;

/// The groups of its norms, which no tensor tells.
const GROUPS: usize = 4;
const GROUP_EPS: f64 = 1e-5;
const LAYER_EPS: f64 = 1e-6;

/// The sizes of its blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocks {
    pub count: usize,
    /// a side of the large kernel, and the channels that it sees
    pub kernel: usize,
    pub part: usize,
    pub has_attention: bool,
    /// layer norms before the blocks, instead of group norms behind them
    pub has_layer_norm: bool,
}

pub(super) struct Plksr {
    first: Conv2d,
    pub(super) blocks: Vec<Block>,
    last: Conv2d,
}

impl Plksr {
    pub(super) fn new(w: &Weights, config: &UpscalerConfig, blocks: &Blocks) -> Result<Self> {
        let UpscalerConfig {
            channels,
            width,
            factor,
            ..
        } = *config;
        let block = |n: usize| Block::new(&w.at(format!("feats.{n}")), width, blocks);
        // a dropout stands before the last
        let last = w.at(format!("feats.{}", blocks.count + 2));
        Ok(Self {
            first: Conv2d::new(&w.at("feats.0"), channels, width, 3)?,
            blocks: (1..=blocks.count).map(block).collect::<Result<_>>()?,
            last: Conv2d::new(&last, width, channels * factor * factor, 3)?,
        })
    }

    /// [b, h, w, channels] in 0..=1 -> [b, h, w, channels * factor * factor].
    pub(super) fn features(
        &self,
        cx: Forward,
        rgb: &Tensor,
        done: &mut dyn FnMut(),
    ) -> TensorResult<Tensor> {
        let mut x = self.first.forward(cx, rgb)?;
        for block in &self.blocks {
            x = block.forward(cx, &x)?;
            done();
        }
        self.last.forward(cx, &x)
    }
}

pub(super) struct Block {
    layer_norm: Option<LayerNorm>,
    mixer: [Conv2d; 2],
    large: Conv2d,
    /// the channels that the large kernel sees
    part: usize,
    attention: Option<Conv2d>,
    refine: Conv2d,
    group_norm: Option<GroupNorm>,
}

impl Block {
    fn new(w: &Weights, width: usize, blocks: &Blocks) -> Result<Self> {
        let (part, has_layer_norm) = (blocks.part, blocks.has_layer_norm);
        let layer_norm = || LayerNorm::new(&w.at("layer_norm"), width, LAYER_EPS);
        let group_norm = || GroupNorm::new(&w.at("norm"), GROUPS, width, GROUP_EPS);
        let attention = || Conv2d::new(&w.at("attn.f.0"), width, width, 3);
        Ok(Self {
            layer_norm: has_layer_norm.then(layer_norm).transpose()?,
            mixer: [
                Conv2d::new(&w.at("channel_mixer.0"), width, 2 * width, 3)?,
                Conv2d::new(&w.at("channel_mixer.2"), 2 * width, width, 3)?,
            ],
            large: Conv2d::new(&w.at("lk.conv"), part, part, blocks.kernel)?,
            part,
            attention: blocks.has_attention.then(attention).transpose()?,
            refine: Conv2d::new(&w.at("refine"), width, width, 1)?,
            group_norm: (!has_layer_norm).then(group_norm).transpose()?,
        })
    }

    /// [b, h, w, c] -> [b, h, w, c].
    fn forward(&self, cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
        let mut y = match &self.layer_norm {
            Some(norm) => norm.forward(cx, x)?,
            None => x.clone(),
        };
        let [one, two] = &self.mixer;
        y = two.forward(cx, &Activation::Mish.forward(&one.forward(cx, &y)?)?)?;
        let (_, _, _, width) = y.dims4()?;
        let seen = y.narrow(3, 0, self.part)?.contiguous()?;
        let large = self.large.forward(cx, &seen)?;
        y = match width - self.part {
            0 => large,
            rest => concat(cx, &large, &y.narrow(3, self.part, rest)?.contiguous()?)?,
        };
        if let Some(attention) = &self.attention {
            y = (&y * sigmoid(&attention.forward(cx, &y)?)?)?;
        }
        y = self.refine.forward(cx, &y)?;
        if let Some(norm) = &self.group_norm {
            y = norm.forward(cx, &y)?;
        }
        x + y
    }
}
