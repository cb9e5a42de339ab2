//! ESRGAN's network of dense blocks, which doubles its features before the last layers.

use super::UpscalerConfig;
use crate::nn::Forward;
use crate::nn::layers::{Conv2d, concat};
use crate::nn::weights::Weights;
use anyhow::Result;
use candle_core::{Result as TensorResult, Tensor};

/// The slope of its leaky ReLUs.
const SLOPE: f64 = 0.2;
/// The factor of a block's output where it is added to the block's input.
const RESIDUAL_SCALE: f64 = 0.2;

/// RRDBNet, Wang et al. 2018 (ESRGAN, arXiv 1809.00219), figure 4; Real-ESRGAN's for 2x begins with
/// a pixel unshuffle.
pub(super) struct Rrdb {
    unshuffle: usize,
    conv_first: Conv2d,
    pub(super) blocks: Vec<[Dense; 3]>,
    conv_body: Conv2d,
    /// each after its doubling
    doublings: Vec<Conv2d>,
    conv_hr: Conv2d,
    conv_last: Conv2d,
}

impl Rrdb {
    pub(super) fn new(
        w: &Weights,
        config: &UpscalerConfig,
        [blocks, growth, doublings]: [usize; 3],
        is_plus: bool,
    ) -> Result<Self> {
        let UpscalerConfig {
            channels,
            width,
            unshuffle,
            ..
        } = *config;
        let slope = (w.zeros(&[width])? + SLOPE)?;
        let leaky = |name: String| {
            anyhow::Ok(Conv2d::new(&w.at(name), width, width, 3)?.leaky(slope.clone()))
        };
        let dense = |block: usize, i: usize| {
            Dense::new(
                &w.at(format!("body.{block}.rdb{i}")),
                width,
                growth,
                is_plus,
            )
        };
        Ok(Self {
            unshuffle,
            conv_first: Conv2d::new(
                &w.at("conv_first"),
                channels * unshuffle * unshuffle,
                width,
                3,
            )?,
            blocks: (0..blocks)
                .map(|block| Ok([dense(block, 1)?, dense(block, 2)?, dense(block, 3)?]))
                .collect::<Result<_>>()?,
            conv_body: Conv2d::new(&w.at("conv_body"), width, width, 3)?,
            doublings: (0..doublings)
                .map(|i| leaky(format!("up.{i}")))
                .collect::<Result<_>>()?,
            conv_hr: leaky("conv_hr".into())?,
            conv_last: Conv2d::new(&w.at("conv_last"), width, channels, 3)?,
        })
    }

    pub(super) fn features(
        &self,
        cx: Forward,
        rgb: &Tensor,
        done: &mut dyn FnMut(),
    ) -> TensorResult<Tensor> {
        let first = self
            .conv_first
            .forward(cx, &pixel_unshuffle(rgb, self.unshuffle)?)?;
        let mut x = first.clone();
        for [one, two, three] in &self.blocks {
            let y = three.forward(cx, &two.forward(cx, &one.forward(cx, &x)?)?)?;
            x = (x + (y * RESIDUAL_SCALE)?)?;
            done();
        }
        self.conv_body.forward_add(cx, &x, None, Some(&first))
    }

    pub(super) fn enlarge(&self, cx: Forward, features: &Tensor) -> TensorResult<Tensor> {
        let mut x = features.clone();
        for conv in &self.doublings {
            let (_, h, w, _) = x.dims4()?;
            x = conv.forward_scaled(cx, &x, 2 * h, 2 * w)?;
        }
        self.conv_last.forward(cx, &self.conv_hr.forward(cx, &x)?)
    }
}

/// A dense block: each convolution takes the block's input and the outputs of all before it.
pub(super) struct Dense {
    convs: Vec<Conv2d>,
    last: Conv2d,
    /// ESRGAN+'s: the block's input is added to the second output, and that to the fourth
    shortcut: Option<Conv2d>,
}

impl Dense {
    const CONVS: usize = 4;

    fn new(w: &Weights, width: usize, growth: usize, is_plus: bool) -> Result<Self> {
        let slope = (w.zeros(&[growth])? + SLOPE)?;
        let seen = |i: usize| width + i * growth;
        let conv = |i: usize| {
            anyhow::Ok(
                Conv2d::new(&w.at(format!("conv{}", i + 1)), seen(i), growth, 3)?
                    .leaky(slope.clone()),
            )
        };
        let last = Conv2d::scaled_by(
            &w.at(format!("conv{}", Self::CONVS + 1)),
            seen(Self::CONVS),
            width,
            3,
            RESIDUAL_SCALE,
        )?;
        Ok(Self {
            convs: (0..Self::CONVS).map(conv).collect::<Result<_>>()?,
            last,
            shortcut: is_plus
                .then(|| Conv2d::without_bias(&w.at("conv1x1"), width, growth, 1, 1))
                .transpose()?,
        })
    }

    /// [b, h, w, c] -> [b, h, w, c].
    fn forward(&self, cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
        let (mut seen, mut second) = (x.clone(), None);
        for (i, conv) in self.convs.iter().enumerate() {
            let mut y = conv.forward(cx, &seen)?;
            match (&self.shortcut, i) {
                (Some(shortcut), 1) => {
                    y = (y + shortcut.forward(cx, x)?)?;
                    second = Some(y.clone());
                }
                (_, 3) => {
                    if let Some(second) = &second {
                        y = (y + second)?;
                    }
                }
                _ => (),
            }
            seen = concat(cx, &seen, &y)?;
        }
        self.last.forward_add(cx, &seen, None, Some(x))
    }
}

/// Pixel unshuffle of [b, r*h, r*w, c] -> [b, h, w, c*r*r], in torch's order: channel, row, column.
fn pixel_unshuffle(x: &Tensor, r: usize) -> TensorResult<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let x = x
        .reshape((b, h / r, r, w / r, r, c))?
        .permute((0, 1, 3, 5, 2, 4))?; // [b, h, w, c, r, r]
    x.reshape((b, h / r, w / r, c * r * r))
}
