//! What the network predicts, and how its output becomes an estimate of the clean latents.
//!
//! The three numbers of [`Scalings`] are the whole difference between the prediction types: the
//! samplers know none of them.
//!
//! Read next: `noise_levels`, which says how noisy latents are made.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What the network predicts; read as diffusers writes it, written as `--prediction` takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity of Salimans and Ho 2022 (arXiv 2202.00512).
    #[serde(rename(serialize = "v", deserialize = "v_prediction"), alias = "v")]
    V,
    /// The clean latents themselves.
    #[serde(alias = "original_sample")]
    Sample,
    /// The noise less the clean latents, of flow matching.
    Flow,
}

/// The three numbers of `denoised = c_skip * x + c_out * network(c_in * x, timestep)`, Karras et
/// al. 2022 (arXiv 2206.00364), eq. 7.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scalings {
    /// Weight of the input.
    pub c_skip: f64,
    /// Weight of the network's output.
    pub c_out: f64,
    /// Factor of the network's input.
    pub c_in: f64,
}

impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Epsilon => "epsilon",
            Self::V => "v",
            Self::Sample => "sample",
            Self::Flow => "flow",
        })
    }
}

impl Prediction {
    /// The scalings at noise level `sigma` (above 0) of x = x0 + sigma * noise, for a network that
    /// was trained on variance-preserving inputs, x / sqrt(1 + sigma^2); flow matching has levels of
    /// its own.
    pub fn scalings(self, sigma: f64) -> Scalings {
        let variance = sigma * sigma + 1.0;
        let c_in = variance.sqrt().recip();
        let (c_skip, c_out) = match self {
            Self::Epsilon | Self::Flow => (1.0, -sigma),
            Self::V => (variance.recip(), -sigma * c_in),
            Self::Sample => (0.0, 1.0),
        };
        Scalings {
            c_skip,
            c_out,
            c_in,
        }
    }
}
