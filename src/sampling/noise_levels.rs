//! The noise levels a network was trained on: how its inputs are made of clean latents and noise,
//! what it wants to be given, and which timestep it is told.
//!
//! Throughout, x = x0 + sigma * noise (the "variance exploding" form of Karras et al. 2022, arXiv
//! 2206.00364); a sigma is a noise level, a timestep is what the network is told. The module hides
//! diffusers' betas and the rounding of torch and numpy that decides their last bits.
//!
//! Read next: `plan`, which chooses some of these levels.

use std::f64::consts::FRAC_PI_2;

use anyhow::Context;
use candle_core::{Result, Tensor};
use serde::Deserialize;

use crate::sampling::prediction::{Prediction, Scalings};
use crate::sampling::sigmas::linspace_f32;

/// The timestep that networks of flow matching are told of pure noise.
const FLOW_TIMESTEPS: f64 = 1000.0;

/// The noise levels of a network. k-diffusion's `DiscreteSchedule`, ComfyUI's `ModelSampling`.
#[derive(Clone, Debug)]
pub enum NoiseLevels {
    /// Those of a diffusion in discrete steps, x = x0 + sigma * noise; the network sees
    /// x / sqrt(1 + sigma^2) and is told the step.
    Discrete(DiscreteLevels),
    /// Those of flow matching, x = (1 - sigma) x0 + sigma * noise, from 1 to 0; the network sees x,
    /// is told a thousand times sigma and predicts noise - x0.
    Flow,
    /// The same divided by 1 - sigma: x = x0 + r * noise with r = sigma / (1 - sigma), which
    /// takes the place of sigma. Solvers that step in log(r) work on it as on the others.
    FlowRatio,
}

/// What diffusers takes off a sigma of 1 (UniPCMultistepScheduler), where r would be infinite.
const LARGEST_RATIO: f64 = 1e6 - 1.0;

impl NoiseLevels {
    /// Adds unit noise to clean latents, both [b, h, w, c], up to the level `sigma`.
    pub fn add_noise(&self, x0: &Tensor, noise: &Tensor, sigma: f64) -> Result<Tensor> {
        match self {
            Self::Discrete(_) | Self::FlowRatio => x0 + (noise * sigma)?,
            Self::Flow => (x0 * (1.0 - sigma))? + (noise * sigma)?,
        }
    }

    /// The weights that turn the network's output at the level `sigma` into x0.
    pub fn scalings(&self, prediction: Prediction, sigma: f64) -> Scalings {
        match self {
            Self::Discrete(_) => prediction.scalings(sigma),
            Self::Flow => Scalings {
                c_skip: 1.0,
                c_out: -sigma,
                c_in: 1.0,
            },
            Self::FlowRatio => Scalings {
                c_skip: (1.0 + sigma).recip(),
                c_out: -sigma / (1.0 + sigma),
                c_in: (1.0 + sigma).recip(),
            },
        }
    }

    /// The timestep that the network is told at the level `sigma`; may be a fraction.
    pub fn timestep(&self, sigma: f64) -> f64 {
        match self {
            Self::Discrete(levels) => levels.timestep(sigma),
            Self::Flow => FLOW_TIMESTEPS * sigma,
            Self::FlowRatio => FLOW_TIMESTEPS * sigma / (1.0 + sigma),
        }
    }

    /// What x is divided by to give latents as the network was trained on them: between data and
    /// noise of about the same variance.
    pub fn trained_scale(&self, sigma: f64) -> f64 {
        match self {
            Self::Discrete(_) => sigma.hypot(1.0),
            Self::Flow => 1.0,
            Self::FlowRatio => 1.0 + sigma,
        }
    }
}

/// The level r of [`NoiseLevels::FlowRatio`] for a sigma of flow matching, 0 to 1.
pub(super) fn flow_ratio(sigma: f64) -> f64 {
    (sigma / (1.0 - sigma)).min(LARGEST_RATIO)
}

/// The noise levels of a discrete diffusion, by timestep. There are at least two.
#[derive(Clone, Debug)]
pub struct DiscreteLevels {
    sigmas: Vec<f64>,
    /// Rounded to f32, as numpy leaves them, because timesteps are cut to whole numbers later. (At
    /// the very top the last bit decides between two timesteps, and there numpy's own logarithm
    /// can be off by one: not with Stable Diffusion's betas.)
    logs: Vec<f64>,
}

impl DiscreteLevels {
    /// The levels of a training with these betas, one a timestep.
    pub(super) fn from_betas(betas: &[f32]) -> Self {
        Self::from_alphas_cumprod(&alphas_cumprod(betas))
    }

    /// The same, rescaled to a zero terminal signal-to-noise ratio; `last` stands in for the zero
    /// that the product of the alphas ends with, as its sigma would be infinite.
    pub(super) fn with_zero_terminal_snr(mut betas: Vec<f32>, last: f32) -> Self {
        rescale_zero_terminal_snr(&mut betas);
        let mut alphas = alphas_cumprod(&betas);
        if let Some(end) = alphas.last_mut() {
            *end = last;
        }
        Self::from_alphas_cumprod(&alphas)
    }

    /// With `alphas` the products of 1 - beta, f32 as torch has them, sigma^2 = (1 - a) / a.
    fn from_alphas_cumprod(alphas: &[f32]) -> Self {
        let sigmas: Vec<f64> = alphas
            .iter()
            .map(|a| f64::from(((1.0 - a) / a).sqrt()))
            .collect();
        let logs = sigmas
            .iter()
            .map(|sigma| f64::from(sigma.ln() as f32))
            .collect();
        Self { sigmas, logs }
    }

    /// The level of the first timestep.
    pub(super) fn sigma_min(&self) -> f64 {
        self.sigmas.first().copied().unwrap_or(0.0)
    }

    /// The level of the last timestep.
    pub(super) fn sigma_max(&self) -> f64 {
        self.sigmas.last().copied().unwrap_or(0.0)
    }

    /// The number of timesteps, counted from the noisiest, whose lambda = -log(sigma) is below
    /// `lambda_min`.
    pub(super) fn timesteps_below(&self, lambda_min: f64) -> usize {
        let is_below = |sigma: &&f64| -sigma.ln() < lambda_min;
        self.sigmas.iter().filter(is_below).count()
    }

    /// The sigma at a whole timestep. Errors beyond those of training.
    pub(super) fn sigma_at(&self, timestep: f64) -> anyhow::Result<f64> {
        let found = self
            .sigmas
            .get(timestep as usize)
            .filter(|_| timestep >= 0.0)
            .copied();
        found.with_context(|| {
            format!(
                "the schedule asks for timestep {timestep} of {}\n\nhint: use fewer steps",
                self.sigmas.len()
            )
        })
    }

    /// The sigma at a fractional timestep, linearly interpolated.
    pub(super) fn interpolated_sigma(&self, timestep: f64) -> f64 {
        let low = (timestep.max(0.0) as usize).min(self.sigmas.len() - 1);
        let high = (low + 1).min(self.sigmas.len() - 1);
        let fraction = (timestep - low as f64).clamp(0.0, 1.0);
        self.sigmas[low] + fraction * (self.sigmas[high] - self.sigmas[low])
    }

    /// The timestep of a sigma, interpolated in log(sigma).
    pub(super) fn timestep(&self, sigma: f64) -> f64 {
        let log_sigma = sigma.max(1e-10).ln();
        let below = self.logs.partition_point(|log| *log <= log_sigma);
        let low = below.saturating_sub(1).min(self.logs.len() - 2);
        let (a, b) = (self.logs[low], self.logs[low + 1]);
        let weight = ((a - log_sigma) / (a - b)).clamp(0.0, 1.0);
        (1.0 - weight) * low as f64 + weight * (low + 1) as f64
    }
}

/// How the betas of training are spread over its timesteps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum BetaSchedule {
    /// Ho et al. 2020 (arXiv 2006.11239).
    Linear,
    /// Linear in the square root of beta, Rombach et al. 2021 (arXiv 2112.10752).
    ScaledLinear,
    /// Nichol and Dhariwal 2021 (arXiv 2102.09672), eq. 17.
    #[serde(rename = "squaredcos_cap_v2")]
    Cosine,
    Exp,
    Laplace,
    /// Xu et al. 2022 (arXiv 2203.02923).
    Sigmoid,
}

impl BetaSchedule {
    /// The betas of `n` timesteps; the schedules that are defined by the product of the alphas
    /// ignore `start` and `end`.
    pub(super) fn betas(self, start: f64, end: f64, n: usize) -> Vec<f32> {
        match self {
            Self::Linear => linspace_f32(start, end, n),
            Self::ScaledLinear => linspace_f32(start.sqrt(), end.sqrt(), n)
                .into_iter()
                .map(|root| root * root)
                .collect(),
            Self::Sigmoid => linspace_f32(-6.0, 6.0, n)
                .into_iter()
                .map(|x| 1.0 / (1.0 + (-x).exp()) * (end - start) as f32 + start as f32)
                .collect(),
            Self::Cosine => {
                betas_for_alpha_bar(n, |t| ((t + 0.008) / 1.008 * FRAC_PI_2).cos().powi(2))
            }
            Self::Exp => betas_for_alpha_bar(n, |t| (-12.0 * t).exp()),
            Self::Laplace => betas_for_alpha_bar(n, |t| {
                let half = 0.5 - t;
                let log_snr = -0.5 * 1_f64.copysign(half) * (1.0 - 2.0 * half.abs() + 1e-6).ln();
                let snr = log_snr.exp();
                (snr / (1.0 + snr)).sqrt()
            }),
        }
    }
}

/// The betas, at most 0.999, whose alphas have the products `alpha_bar` of the time in 0..=1:
/// Nichol and Dhariwal 2021 (arXiv 2102.09672).
fn betas_for_alpha_bar(n: usize, alpha_bar: impl Fn(f64) -> f64) -> Vec<f32> {
    let at = |i: usize| alpha_bar(i as f64 / n as f64);
    (0..n)
        .map(|i| (1.0 - at(i + 1) / at(i)).min(0.999) as f32)
        .collect()
}

/// The products of the alphas, 1 - beta: torch.cumprod of f32, which accumulates in f64 on the CPU.
fn alphas_cumprod(betas: &[f32]) -> Vec<f32> {
    let products = betas.iter().scan(1_f64, |product, beta| {
        *product *= f64::from(1.0 - beta);
        Some(*product as f32)
    });
    products.collect()
}

/// Rescales betas so that no signal is left at the last timestep: Lin et al. 2023 (arXiv
/// 2305.08891), algorithm 1.
fn rescale_zero_terminal_snr(betas: &mut [f32]) {
    let roots: Vec<f32> = alphas_cumprod(betas).into_iter().map(f32::sqrt).collect();
    let (Some(&first), Some(&last)) = (roots.first(), roots.last()) else {
        return;
    };
    let scale = first / (first - last);
    let mut previous = 1_f32;
    for (beta, root) in betas.iter_mut().zip(roots) {
        let root = (root - last) * scale;
        *beta = 1.0 - root * root / previous;
        previous = root * root;
    }
}
