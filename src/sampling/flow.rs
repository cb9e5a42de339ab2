//! The noise levels of flow matching (Lipman et al. 2022, arXiv 2210.02747): latents on a straight
//! line from picture to noise, x = (1 - sigma) x0 + sigma noise, of which a shift decides where the
//! steps fall (Esser et al. 2024, arXiv 2403.03206).
//!
//! [`FlowConfig`] is what diffusers' `FlowMatchEulerDiscreteScheduler` reads of a checkpoint.

use anyhow::{Result, bail, ensure};
use serde::Deserialize;

use crate::sampling::kinds::Schedule;
use crate::sampling::sigmas::SigmaSchedule;

/// How sigmas are shifted by a number mu that depends on the picture, `time_shift_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum TimeShift {
    Exponential,
    Linear,
}

/// How mu follows from the number of image tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mu {
    /// on the line through two points (tokens, mu): FLUX.1
    Linear([(f64, f64); 2]),
    /// by the number of steps too: FLUX.2
    Empirical,
}

impl Mu {
    /// Its value for a picture of so many tokens in so many steps.
    fn at(self, tokens: usize, steps: usize) -> f64 {
        let (tokens, steps) = (tokens as f64, steps as f64);
        match self {
            Self::Linear([(x0, y0), (x1, y1)]) => y0 + (y1 - y0) / (x1 - x0) * (tokens - x0),
            Self::Empirical => {
                // Black Forest Labs' fits for 10 and for 200 steps
                let of_200 = 0.000_169_27 * tokens + 0.456_666_66;
                if tokens > 4300.0 {
                    return of_200;
                }
                let of_10 = 8.738_095_24e-5 * tokens + 1.898_333_33;
                let slope = (of_200 - of_10) / 190.0;
                slope * steps + of_200 - 200.0 * slope
            }
        }
    }
}

/// The keys of `scheduler_config.json` that change a result.
#[derive(Clone, Debug)]
pub(super) struct FlowConfig {
    /// of all pictures, where none depends on the picture
    pub(super) shift: f64,
    /// the one that does, `use_dynamic_shifting`
    pub(super) dynamic: Option<TimeShift>,
    pub(super) mu: Mu,
    /// the level that the last step begins at, if it is given
    pub(super) shift_terminal: Option<f64>,
    /// the even levels end at the lowest that a step of training has, and not a step above 0
    pub(super) ends_at_lowest: bool,
    /// between the highest and the lowest of the shifted levels, in their place
    pub(super) sigma_schedule: Option<SigmaSchedule>,
    /// tokens of the picture that is drawn
    pub(super) tokens: usize,
}

/// The lowest level of training.
const LOWEST: f64 = 0.001;

impl FlowConfig {
    /// The levels of n steps, falling, and 0: as diffusers' pipelines of FLUX and Z-Image have them.
    /// `schedule` replaces the file's. Errors if they do not fall, or if the schedule is for models
    /// of another kind.
    pub(super) fn sigmas(&self, n: usize, schedule: Option<Schedule>) -> Result<Vec<f64>> {
        let between_ends = match schedule {
            None => self.sigma_schedule,
            Some(schedule) => match schedule.spec().sigmas {
                Some(SigmaSchedule::Table(_)) | None => bail!(
                    "models of flow matching do not follow the schedule `{schedule}`\n\nhint: `karras`, `exponential` and `beta` replace the levels of their own"
                ),
                between_ends => between_ends,
            },
        };
        let shifted = |sigma: f64| self.shift * sigma / (1.0 + (self.shift - 1.0) * sigma);
        let last = match (self.ends_at_lowest, self.dynamic) {
            (false, _) => 1.0 / n as f64,
            (true, Some(_)) => LOWEST,
            // diffusers counts from levels that are shifted already, and shifts them again
            (true, None) => shifted(LOWEST),
        };
        let even = |i: usize| match n {
            1 => 1.0,
            n => 1.0 + (last - 1.0) * i as f64 / (n - 1) as f64,
        };
        let mu = self.mu.at(self.tokens, n);
        let mut sigmas: Vec<f64> = (0..n)
            .map(even)
            .map(|sigma| match self.dynamic {
                Some(TimeShift::Exponential) => mu.exp() / (mu.exp() + (1.0 / sigma - 1.0)),
                Some(TimeShift::Linear) => mu / (mu + (1.0 / sigma - 1.0)),
                None => shifted(sigma),
            })
            .collect();
        if let (Some(terminal), Some(end)) = (self.shift_terminal, sigmas.last().copied()) {
            let scale = (1.0 - end) / (1.0 - terminal);
            for sigma in &mut sigmas {
                *sigma = 1.0 - (1.0 - *sigma) / scale;
            }
        }
        if let (Some(rule), Some(low)) = (between_ends, sigmas.last().copied()) {
            sigmas = rule.sigmas(sigmas[0], low, n);
        }
        sigmas.push(0.0);
        ensure!(
            sigmas.windows(2).all(|pair| pair[0] > pair[1]),
            "{n} steps do not give falling noise levels with the scheduler's shift\n\nhint: use fewer steps"
        );
        Ok(sigmas
            .into_iter()
            .map(|sigma| f64::from(sigma as f32))
            .collect())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_those_of_diffusers_schedulers() {
        let flow = |shift, dynamic, mu, shift_terminal, tokens| FlowConfig {
            shift,
            dynamic,
            mu,
            shift_terminal,
            ends_at_lowest: false,
            sigma_schedule: None,
            tokens,
        };
        let line = Mu::Linear([(256.0, 0.5), (4096.0, 1.15)]);
        let qwen = Mu::Linear([(256.0, 0.5), (8192.0, 0.9)]);
        let exponential = Some(TimeShift::Exponential);
        // of Z-Image-Turbo, FLUX.1 dev, FLUX.1 schnell, FLUX.2 klein, Qwen-Image
        for (config, expected) in [
            (
                flow(3.0, None, line, None, 0),
                [1.0, 0.95455, 0.9, 0.83333, 0.75, 0.64286, 0.5, 0.3].as_slice(),
            ),
            (
                flow(3.0, exponential, line, None, 1024),
                &[1.0, 0.84923, 0.65249, 0.38494],
            ),
            (
                flow(3.0, exponential, line, None, 4096),
                &[1.0, 0.90453, 0.75951, 0.51284],
            ),
            (flow(1.0, None, line, None, 1024), &[1.0, 0.75, 0.5, 0.25]),
            (
                flow(3.0, exponential, Mu::Empirical, None, 1024),
                &[1.0, 0.95809, 0.88398, 0.7175],
            ),
            (
                flow(3.0, exponential, Mu::Empirical, None, 4096),
                &[1.0, 0.96738, 0.90814, 0.7672],
            ),
            (
                flow(1.0, exponential, qwen, Some(0.02), 4096),
                &[
                    1.0, 0.91602, 0.82005, 0.70929, 0.58007, 0.42735, 0.24405, 0.02,
                ],
            ),
        ] {
            let sigmas = config.sigmas(expected.len(), None).unwrap();
            assert_eq!(sigmas.len(), expected.len() + 1);
            assert_eq!(sigmas.last(), Some(&0.0));
            for (sigma, expected) in sigmas.iter().zip(expected) {
                assert!((sigma - expected).abs() < 2e-5, "{sigmas:?} {expected:?}");
            }
        }
        // Stable Diffusion 3
        let twice = FlowConfig {
            ends_at_lowest: true,
            ..flow(3.0, None, line, None, 0)
        };
        let sigmas = twice.sigmas(28, None).unwrap();
        for (i, expected) in [
            (0, 1.0),
            (1, 0.98738),
            (25, 0.19983),
            (27, 0.0089286),
            (28, 0.0),
        ] {
            assert!((sigmas[i] - expected).abs() < 1e-5, "{sigmas:?}");
        }
        assert!((Mu::Empirical.at(4096, 50) - 2.0234).abs() < 1e-4);
        assert!((Mu::Empirical.at(16384, 4) - 3.23).abs() < 1e-2);
        assert_eq!(
            flow(1.0, None, line, None, 0).sigmas(1, None).unwrap(),
            [1.0, 0.0]
        );
        assert!(flow(1.0, None, line, Some(1.5), 0).sigmas(4, None).is_err());
    }
}
