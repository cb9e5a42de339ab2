//! Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) around the network: what a sampler
//! calls `denoise`.

use super::options::Scalar;
use crate::model::Denoiser;
use crate::sampling::Scalings;
use candle_core::{D, Result, Tensor};
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// As diffusers and Stability have them for Stable Diffusion 3.5 medium.
const SKIPPED_BLOCKS: [usize; 3] = [7, 8, 9];
const SKIPPING_STEPS: [f64; 2] = [0.01, 0.2];

/// A network with its conditioning, seen as a denoiser.
pub struct CfgDenoiser<'a> {
    /// bound to the conditioning of all passes, one block of images after the other
    pub model: Denoiser<'a>,
    pub guidance: Guidance,
    /// of each prompt of a picture beside the others
    pub weights: Vec<f64>,
    pub scale: f64,
    /// how much of the guided output's spread is brought back to that of the prompt's alone, 0..=1
    pub rescale: f64,
    pub deep_cache: DeepCache,
    /// for [`Guidance::Text`]
    pub skip: Option<SkippingPass<'a>>,
}

/// What the network is told of in every step, and what is steered away from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Guidance {
    /// nothing: the prompts alone
    Off,
    /// the negative prompts, then so many prompts of each picture
    Text(usize),
    /// the negative prompts without the source picture, the negative prompts with it, and the
    /// prompts with it; the scale between the first two (Brooks et al. 2022, arXiv 2211.09800, eq.
    /// 3)
    TextAndImage(f64),
}

impl Guidance {
    /// How often the network sees each picture in a step.
    pub fn passes(self) -> usize {
        match self {
            Self::Off => 1,
            Self::Text(prompts) => 1 + prompts,
            Self::TextAndImage(_) => 3,
        }
    }
}

/// Skip-layer guidance: in some steps the prediction is also steered away from that of the prompts
/// by the network without some of its blocks (Stability's for Stable Diffusion 3.5 medium; after Hong
/// et al. 2023, arXiv 2210.00939).
///
/// As text `SCALE[:BLOCKS[:START:STOP]]`, such as `2.8:7,8,9:0.01:0.2`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "Scalar")]
pub struct SkipLayers {
    pub scale: f64,
    /// the blocks that are left out, from 0
    pub blocks: Vec<usize>,
    /// the share of the steps after which it is on, and that from which on it is off again
    pub steps: [f64; 2],
}

impl FromStr for SkipLayers {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parsed = || {
            let mut parts = text.split(':');
            let number = |text: &str| text.trim().parse::<f64>().ok();
            let scale = number(parts.next()?).filter(|scale| (0.0..=1000.0).contains(scale))?;
            let block = |text: &str| text.trim().parse::<usize>().ok();
            let blocks = match parts.next() {
                Some(blocks) => blocks.split(',').map(block).collect::<Option<_>>()?,
                None => SKIPPED_BLOCKS.to_vec(),
            };
            let steps = match (parts.next(), parts.next(), parts.next()) {
                (None, ..) => SKIPPING_STEPS,
                (Some(start), Some(stop), None) => [number(start)?, number(stop)?],
                _ => return None,
            };
            let [start, stop] = steps;
            (0.0 <= start && start < stop && stop <= 1.0).then_some(Self {
                scale,
                blocks,
                steps,
            })
        };
        parsed().ok_or_else(|| {
            "expected SCALE[:BLOCKS[:START:STOP]], a scale from 0 to 1000, numbers of blocks and shares \
             of the steps, such as 2.8 or 2.8:7,8,9:0.01:0.2"
                .into()
        })
    }
}

impl TryFrom<Scalar> for SkipLayers {
    type Error = String;

    fn try_from(Scalar(text): Scalar) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<SkipLayers> for String {
    fn from(skip: SkipLayers) -> Self {
        let SkipLayers {
            scale,
            blocks,
            steps: [start, stop],
        } = skip;
        let blocks: Vec<String> = blocks.iter().map(usize::to_string).collect();
        format!("{scale}:{}:{start}:{stop}", blocks.join(","))
    }
}

/// The network without some of its blocks, in some of the steps.
pub struct SkippingPass<'a> {
    /// bound to the prompts alone
    pub model: Denoiser<'a>,
    pub options: SkipLayers,
    /// runs of the network so far, and in all
    pub calls: usize,
    pub total: usize,
}

impl SkippingPass<'_> {
    /// Its prediction where this step has one, strictly after the start and before the end.
    fn forward(&mut self, input: &Tensor, timestep: f64) -> Result<Option<Tensor>> {
        let [call, total] = [self.calls, self.total].map(|calls| calls as f64);
        let [start, stop] = self.options.steps.map(|share| total * share);
        self.calls += 1;
        let output = || {
            self.model
                .forward_without(&self.options.blocks, input, timestep)
        };
        (call > start && call < stop).then(output).transpose()
    }
}

/// How the U-Net's inner levels are reused from step to step (DeepCache).
pub struct DeepCache {
    /// they run in every `interval`th step only
    interval: usize,
    /// calls so far
    calls: usize,
    inner: Option<Tensor>,
}

impl DeepCache {
    /// The inner levels run in the first of every `interval` steps; 1 reuses nothing.
    pub fn every(interval: usize) -> Self {
        Self {
            interval,
            calls: 0,
            inner: None,
        }
    }

    fn forward(&mut self, model: &Denoiser, input: &Tensor, timestep: f64) -> Result<Tensor> {
        if self.interval <= 1 {
            return model.forward(input, timestep);
        }
        if self.calls.is_multiple_of(self.interval) {
            self.inner = None;
        }
        self.calls += 1;
        model.forward_cached(input, timestep, &mut self.inner)
    }
}

impl CfgDenoiser<'_> {
    /// Noisy latents [b, h, w, c] with the scalings of their noise level, at `timestep` -> the
    /// estimate of the clean latents x0, in f32.
    pub fn denoise(&mut self, x: &Tensor, scalings: Scalings, timestep: f64) -> Result<Tensor> {
        let input = (x * scalings.c_in)?;
        let passes = self.guidance.passes();
        let input = if passes > 1 {
            Tensor::cat(&vec![&input; passes], 0)?
        } else {
            input
        }; // [passes*b, h, w, c]
        let output = self.deep_cache.forward(&self.model, &input, timestep)?;
        let parts = output.chunk(passes, 0)?;
        let output = match (self.guidance, &parts[..]) {
            (Guidance::Text(_), [unconditional, conditional, ..]) => {
                let mut guided = unconditional.clone();
                for (conditional, weight) in parts.iter().skip(1).zip(&self.weights) {
                    guided = (guided + ((conditional - unconditional)? * (self.scale * weight))?)?;
                }
                if let Some(skip) = &mut self.skip {
                    let (b, prompts) = (x.dim(0)?, passes - 1);
                    let input = input.narrow(0, b, prompts * b)?;
                    if let Some(skipped) = skip.forward(&input, timestep)? {
                        let skipped = skipped.chunk(prompts, 0)?;
                        let pairs = parts.iter().skip(1).zip(&skipped);
                        for ((conditional, skipped), weight) in pairs.zip(&self.weights) {
                            let scale = skip.options.scale * weight;
                            guided = (guided + ((conditional - skipped)? * scale)?)?;
                        }
                    }
                }
                if self.rescale > 0.0 {
                    rescaled(&guided, conditional, self.rescale)?
                } else {
                    guided
                }
            }
            (Guidance::TextAndImage(scale), [unconditional, picture, conditional]) => {
                let towards_text = ((conditional - picture)? * self.scale)?;
                ((unconditional + towards_text)? + ((picture - unconditional)? * scale)?)?
            }
            _ => output,
        };
        (x * scalings.c_skip)? + (output * scalings.c_out)?
    }
}

/// Lin et al. 2023 (arXiv 2305.08891), section 3.4: guidance makes a picture's values spread too
/// far. Both [b, h, w, c].
fn rescaled(guided: &Tensor, conditional: &Tensor, share: f64) -> Result<Tensor> {
    let spread = |x: &Tensor| {
        let x = x.flatten_from(1)?; // [b, h*w*c]
        x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?
            .sqr()?
            .sum_keepdim(D::Minus1)?
            .sqrt() // [b, 1]
    };
    let factor = (((spread(conditional)? / spread(guided)?)? * share)? + (1.0 - share))?; // [b, 1]
    guided.broadcast_mul(&factor.reshape(((), 1, 1, 1))?)
}
