//! Which timesteps and sigmas of training a run of n steps visits, as each class of diffusers
//! chooses them.
//!
//! Read next: `plan`, which makes a run of them.

use anyhow::{Result, ensure};

use crate::sampling::kinds::Grid;
use crate::sampling::noise_levels::DiscreteLevels;
use crate::sampling::scheduler_config::{FinalSigma, SamplerConfig, TimestepSpacing};
use crate::sampling::sigmas::{SigmaSchedule, linspace};

impl SamplerConfig<'_> {
    /// The timesteps of `n` steps, descending. Errors if there are too few to choose from.
    pub(super) fn timesteps(&self, n: usize, levels: &DiscreteLevels) -> Result<Vec<f64>> {
        let (train, grid) = (self.file.train_timesteps, self.traits.grid);
        let last = train - self.clipped(levels).min(train - 1);
        // a multistep grid has one more point, and drops the last
        let points = n + usize::from(grid == Grid::Multistep);
        let round = |t: f64| {
            if grid == Grid::Fractional {
                t
            } else {
                t.round_ties_even()
            }
        };
        let mut timesteps: Vec<f64> = match self.spacing {
            TimestepSpacing::Linspace => linspace(0.0, (last - 1) as f64, points)
                .into_iter()
                .rev()
                .map(round)
                .collect(),
            TimestepSpacing::Leading => {
                let ratio = last / points;
                ensure!(
                    ratio > 0,
                    "{n} steps are too many for {last} timesteps\n\nhint: use fewer steps"
                );
                (0..points)
                    .rev()
                    .map(|i| (i * ratio + self.steps_offset) as f64)
                    .collect()
            }
            TimestepSpacing::Trailing => {
                let ratio = train as f64 / n as f64;
                // numpy.arange: as many as fit, each a multiple of the first difference
                let stride = last as f64 - (last as f64 - ratio);
                let count = (last as f64 / ratio).ceil() as usize;
                (0..count)
                    .map(|i| (last as f64 - i as f64 * stride).round_ties_even() - 1.0)
                    .collect()
            }
        };
        timesteps.truncate(n);
        Ok(timesteps)
    }

    /// The number of the noisiest timesteps that are left out, `lambda_min_clipped`.
    fn clipped(&self, levels: &DiscreteLevels) -> usize {
        if self.traits.dpm_solver.is_some() {
            levels.timesteps_below(self.file.lambda_min_clipped)
        } else {
            0
        }
    }

    /// The `n` sigmas of a schedule and the timesteps that fit them; `spaced` are the sigmas at
    /// the evenly spaced timesteps.
    pub(super) fn scheduled(
        &self,
        schedule: SigmaSchedule,
        n: usize,
        spaced: &[f64],
        levels: &DiscreteLevels,
    ) -> (Vec<f64>, Vec<f64>) {
        let (first, last) = if self.traits.grid == Grid::Multistep {
            (levels.sigma_max(), levels.sigma_min())
        } else {
            (
                spaced.first().copied().unwrap_or(1.0),
                spaced.last().copied().unwrap_or(1.0),
            )
        };
        let (mut high, mut low) = (first, last);
        if self.has_sigma_limits(schedule) {
            high = self.file.sigma_max.unwrap_or(first);
            low = self.file.sigma_min.unwrap_or(last);
        }
        let sigmas = schedule.sigmas(high, low, n);
        let timesteps = sigmas
            .iter()
            .map(|sigma| self.rounded(levels.timestep(*sigma), schedule))
            .collect();
        (sigmas, timesteps)
    }

    /// Whether the class looks at `sigma_min` and `sigma_max` with this schedule.
    fn has_sigma_limits(&self, schedule: SigmaSchedule) -> bool {
        match schedule {
            SigmaSchedule::Lu => false,
            SigmaSchedule::Karras => self.traits.limits_karras,
            _ => true,
        }
    }

    /// The timestep that the class tells the network for a sigma of this schedule.
    fn rounded(&self, timestep: f64, schedule: SigmaSchedule) -> f64 {
        let grid = self.traits.grid;
        let rounds = match schedule {
            SigmaSchedule::Karras if self.traits.rounds_karras => true,
            SigmaSchedule::Karras | SigmaSchedule::Lu if self.traits.dpm_solver.is_some() => {
                !self.has_cosine_betas()
            }
            SigmaSchedule::Karras | SigmaSchedule::Table(_) => grid != Grid::Fractional,
            _ => grid == Grid::Discrete,
        };
        match (rounds, grid) {
            (true, _) => timestep.round_ties_even(),
            (false, Grid::Multistep) => timestep.trunc(), // diffusers stores whole numbers
            (false, _) => timestep,
        }
    }

    /// The sigma after the last step; `sigmas` are those of all steps.
    pub(super) fn last_sigma(&self, sigmas: &[f64], levels: &DiscreteLevels) -> f64 {
        match self.final_sigma {
            FinalSigma::Zero => 0.0,
            FinalSigma::SigmaMin => sigmas
                .last()
                .copied()
                .filter(|_| self.traits.repeats_last_sigma && self.sigma_schedule.is_some())
                .unwrap_or(levels.sigma_min()),
        }
    }

    /// The noise level "before" timestep 0, `set_alpha_to_one`.
    pub(super) fn final_discrete_sigma(&self, levels: &DiscreteLevels) -> f64 {
        let zero = self
            .file
            .set_alpha_to_one
            .unwrap_or(self.traits.grid != Grid::Pndm);
        if zero { 0.0 } else { levels.sigma_min() }
    }

    /// `n` of the steps that a network was distilled for, or of the first `fraction` of them, 0 to
    /// 1: Luo et al. 2023 (arXiv 2310.04378). Errors if there are fewer.
    pub(super) fn distilled_timesteps(&self, n: usize, fraction: f64) -> Result<Vec<f64>> {
        let original = self.file.original_inference_steps;
        ensure!(
            (1..=self.file.train_timesteps).contains(&original),
            "the scheduler's `original_inference_steps` is {original}, which is not supported"
        );
        ensure!(
            n <= original,
            "`{}` was distilled for at most {original} steps, not {n}\n\nhint: use `--steps 4`",
            self.sampler
        );
        let ratio = self.file.train_timesteps / original;
        let original = (original as f64 * fraction) as usize;
        ensure!(
            n <= original,
            "`--strength {fraction}` leaves less than {n} steps\n\nhint: use more, or fewer `--steps`"
        );
        let stride = original as f64 / n as f64;
        let pick = |i: usize| original - (i as f64 * stride).floor() as usize;
        Ok((0..n).map(|i| (pick(i) * ratio - 1) as f64).collect())
    }
}
