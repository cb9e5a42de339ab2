//! A run before it begins: which sampler, at which noise levels, told which timesteps.
//!
//! [`plan`] gives what diffusers' `set_timesteps(n)` gives for the class of a sampler. Everything
//! is f64 on the host except where torch's f32 decides a value. The module hides how each class
//! lays out its levels.
//!
//! Read next: `sampler`, which walks a [`SamplingPlan`].

use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::Tensor;

use crate::sampling::kinds::{FlowForm, Grid, Sampler, Schedule, SecondStage};
use crate::sampling::noise_levels::{DiscreteLevels, NoiseLevels, flow_ratio};
use crate::sampling::prediction::{Prediction, Scalings};
use crate::sampling::scheduler_config::{SamplerConfig, SchedulerConfig, Solver, TimestepSpacing};
use crate::sampling::sigmas::exponential;

/// One run: which algorithm, at which noise levels.
#[derive(Clone, Debug)]
pub struct SamplingPlan {
    /// The algorithm.
    pub sampler: Sampler,
    /// The timesteps that the network is told at the n levels; may repeat a value (PNDM).
    pub timesteps: Vec<f64>,
    /// The n noise levels and, last, where the run ends.
    pub sigmas: Vec<f64>,
    /// Timesteps of the evaluations in the middle of a step, where the sampler has them.
    pub(super) middle_timesteps: Vec<f64>,
    /// Noise levels of those evaluations.
    pub(super) middle_sigmas: Vec<f64>,
    /// The levels between which each evaluation moves x, where diffusers computes them from the
    /// timestep alone and so may miss the next level.
    pub(super) transfers: Vec<(f64, f64)>,
    /// The fraction of the noise between two levels that is drawn anew, 0 to 1.
    pub(super) eta: f64,
    /// The range -x..=x that predicted latents are clipped to.
    pub(super) clip: Option<f64>,
    pub(super) solver: Solver,
    pub(super) large_variance: bool,
    /// Evaluations of PNDM's Runge-Kutta start.
    pub(super) prk_evaluations: usize,
    pub(super) timestep_scaling: f64,
    /// The number of steps of the whole run before this part of it.
    pub(super) before: usize,
    /// The number of steps of the whole run after this part of it.
    pub(super) after: usize,
    noise_levels: Arc<NoiseLevels>,
    prediction: Prediction,
    train_timesteps: usize,
    init_noise_sigma: f64,
}

impl SamplingPlan {
    /// A run of a model of flow matching over these levels, without its first `skipped` steps.
    fn of_flow(
        config: &SchedulerConfig,
        (sampler, form): (Sampler, FlowForm),
        mut sigmas: Vec<f64>,
        solver: Solver,
        eta: f64,
        skipped: usize,
    ) -> Self {
        let (noise_levels, init_noise_sigma) = match form {
            FlowForm::Line => (NoiseLevels::Flow, 1.0),
            FlowForm::Ratio => {
                for sigma in &mut sigmas {
                    *sigma = flow_ratio(*sigma);
                }
                let top = sigmas.first().copied().unwrap_or(0.0);
                (NoiseLevels::FlowRatio, 1.0 + top)
            }
        };
        let steps = sigmas.len().saturating_sub(1);
        let middle_sigmas = middle_sigmas(sampler, &noise_levels, &sigmas, eta);
        let told = |sigmas: &[f64]| -> Vec<f64> {
            let timesteps = sigmas.iter().map(|sigma| noise_levels.timestep(*sigma));
            timesteps.collect()
        };
        let mut plan = Self {
            sampler,
            timesteps: told(&sigmas[..steps]),
            middle_timesteps: told(&middle_sigmas),
            middle_sigmas,
            sigmas,
            transfers: vec![],
            eta,
            clip: None,
            solver,
            large_variance: false,
            prk_evaluations: 0,
            timestep_scaling: config.timestep_scaling,
            before: 0,
            after: 0,
            noise_levels: Arc::new(noise_levels),
            prediction: config.prediction,
            train_timesteps: config.train_timesteps,
            init_noise_sigma,
        };
        plan.drop_first(skipped);
        plan
    }

    /// The factor of the unit noise that a run starts from.
    pub fn init_noise_sigma(&self) -> f64 {
        self.init_noise_sigma
    }

    /// The noise level where the run begins.
    pub fn first_sigma(&self) -> f64 {
        self.sigmas.first().copied().unwrap_or(0.0)
    }

    /// Adds unit noise to clean latents, both [b, h, w, c], up to the level `sigma`.
    pub fn add_noise(
        &self,
        x0: &Tensor,
        noise: &Tensor,
        sigma: f64,
    ) -> candle_core::Result<Tensor> {
        self.noise_levels.add_noise(x0, noise, sigma)
    }

    /// The weights that turn the network's output at the level `sigma` into x0.
    pub fn scalings(&self, sigma: f64) -> Scalings {
        self.noise_levels.scalings(self.prediction, sigma)
    }

    /// What x = x0 + sigma * noise is divided by to give diffusers' latents of this sampler.
    pub fn latents_scale(&self, sigma: f64) -> f64 {
        if self.is_flow() || self.sampler.spec().is_variance_preserving() {
            self.noise_levels.trained_scale(sigma)
        } else {
            1.0
        }
    }

    /// Whether the model is one of flow matching.
    pub(super) fn is_flow(&self) -> bool {
        !matches!(*self.noise_levels, NoiseLevels::Discrete(_))
    }

    /// A step from sigma to next with the plan's fraction of fresh noise.
    pub(super) fn ancestral(&self, sigma: f64, next: f64) -> Ancestral {
        Ancestral::new(&self.noise_levels, sigma, next, self.eta)
    }

    /// The number of steps of the whole run before this part of it.
    pub fn before(&self) -> usize {
        self.before
    }

    /// The number of evaluations of the network.
    pub fn evaluations(&self) -> usize {
        let (steps, ends) = (self.own_steps(), self.sigmas.last() == Some(&0.0));
        if self.sampler.spec().is_two_stage() {
            2 * steps - usize::from(ends)
        } else {
            steps
        }
    }

    fn own_steps(&self) -> usize {
        self.sigmas.len().saturating_sub(1)
    }

    /// The number of steps of the whole run, of which this may be a part.
    pub(super) fn steps(&self) -> usize {
        self.before + self.own_steps() + self.after
    }

    /// Cuts a run in two at a fraction of the way from noise to image, by timesteps, as diffusers'
    /// `denoising_end` and `denoising_start` do. A second part has no history of the first. Errors
    /// if one of them would have no step.
    pub fn split(&self, at: f64) -> Result<[Self; 2]> {
        ensure!(
            self.sampler.spec().traits.grid != Grid::Pndm,
            "`{}` cannot be handed over to a refiner\n\nhint: use another sampler, such as `euler`",
            self.sampler
        );
        let train = self.train_timesteps as f64;
        let (cut, steps) = ((train - at * train).round_ties_even(), self.own_steps());
        let k = self.timesteps.iter().take_while(|t| **t >= cut).count();
        ensure!(
            (1..steps).contains(&k),
            "`--refine-at {at}` leaves the model {k} and its refiner {} of {steps} steps",
            steps - k.min(steps)
        );
        let (mut first, mut second) = (self.clone(), self.clone());
        // methods of two stages look at the timestep where a step ends
        first
            .timesteps
            .truncate(k + usize::from(self.sampler.spec().is_two_stage()));
        first.sigmas.truncate(k + 1);
        first.after = steps - k;
        second.drop_first(k);
        Ok([first, second])
    }

    /// Leaves out the first `k` steps.
    fn drop_first(&mut self, k: usize) {
        for list in [
            &mut self.timesteps,
            &mut self.sigmas,
            &mut self.middle_timesteps,
            &mut self.middle_sigmas,
        ] {
            list.drain(..k.min(list.len()));
        }
        self.transfers.drain(..k.min(self.transfers.len()));
        self.before += k;
    }

    /// The factor of diffusers' latents of another run that this one takes over.
    pub fn handover_scale(&self) -> f64 {
        self.latents_scale(self.first_sigma())
    }
}

/// Plans a run of `steps` steps.
///
/// `schedule` replaces the checkpoint's schedule. `eta` is the fraction of fresh noise of the
/// samplers that have one: 0 (no noise) by default for `ddim` and `tcd`, as in diffusers'
/// pipelines, 1 for the ancestral ones. Errors if the sampler cannot do what is asked.
pub fn plan(
    config: &SchedulerConfig,
    sampler: Sampler,
    schedule: Option<Schedule>,
    steps: usize,
    eta: Option<f64>,
) -> Result<SamplingPlan> {
    plan_part(config, sampler, schedule, steps, eta, (0, 1.0))
}

/// The same without its first steps, for a run that begins with an image to which the noise of
/// that level is added: those that a strength (0..=1) leaves out, as in diffusers. With
/// `in_all_steps`, as in its pipeline of latent consistency models, `lcm` takes as many steps over
/// what the strength leaves. Errors too if it leaves out all of them.
pub fn plan_img2img(
    config: &SchedulerConfig,
    sampler: Sampler,
    schedule: Option<Schedule>,
    steps: usize,
    eta: Option<f64>,
    strength: f64,
    in_all_steps: bool,
) -> Result<SamplingPlan> {
    let all = steps as f64;
    // pipelines of flow matching round the other way
    let taken = match config.is_flow() {
        true => steps - (all - all * strength) as usize,
        false => (all * strength) as usize,
    };
    let least = (1.0 / steps as f64 * 1000.0).ceil() / 1000.0;
    ensure!(
        taken > 0,
        "`--strength {strength}` leaves none of {steps} steps\n\nhint: use at least {least}, or more `--steps`"
    );
    let in_all_steps = in_all_steps && !config.is_flow();
    let part = if in_all_steps && sampler.spec().traits.fits_strength {
        (0, strength)
    } else {
        (steps.saturating_sub(taken), 1.0)
    };
    plan_part(config, sampler, schedule, steps, eta, part)
}

/// Plans a run without its first `skipped` steps, or one whose distilled steps are chosen from the
/// last `fraction` of the way.
fn plan_part(
    config: &SchedulerConfig,
    sampler: Sampler,
    schedule: Option<Schedule>,
    steps: usize,
    eta: Option<f64>,
    (skipped, fraction): (usize, f64),
) -> Result<SamplingPlan> {
    let train = config.train_timesteps;
    ensure!(
        (1..=train).contains(&steps),
        "{steps} steps are not possible\n\nhint: use 1 to {train}"
    );
    let settings = config.for_sampler(sampler, schedule)?;
    let eta = resolve_eta(sampler, eta)?;
    let solver = settings.solver()?;
    if let Some(flow) = &config.flow {
        let form = sampler.flow_form()?;
        let sigmas = flow.sigmas(steps, schedule)?;
        return Ok(SamplingPlan::of_flow(
            config,
            (sampler, form),
            sigmas,
            solver,
            eta,
            skipped,
        ));
    }
    let training = settings.noise_levels();
    let grid = settings.traits.grid;
    let levels = match grid {
        Grid::Distilled => Levels::distilled(&settings, &training, steps, fraction, eta)?,
        Grid::Pndm => Levels::pndm(&settings, &training, steps, skipped)?,
        Grid::Discrete if settings.sigma_schedule.is_none() => {
            Levels::discrete(&settings, &training, steps)?
        }
        _ => Levels::interpolated(&settings, &training, steps)?,
    };
    ensure!(
        levels.are_decreasing() || grid == Grid::Pndm,
        "{steps} steps of `{sampler}` do not give decreasing noise levels here\n\nhint: use fewer steps, or another `--schedule`"
    );
    let noise_levels = NoiseLevels::Discrete(training);
    let middle_sigmas = middle_sigmas(sampler, &noise_levels, &levels.sigmas, eta);
    let mut plan = SamplingPlan {
        sampler,
        timesteps: levels.timesteps,
        sigmas: levels.sigmas,
        middle_timesteps: middle_sigmas
            .iter()
            .map(|sigma| noise_levels.timestep(*sigma))
            .collect(),
        middle_sigmas,
        transfers: levels.transfers,
        eta,
        clip: settings.clip(),
        solver,
        large_variance: settings.has_large_variance(),
        prk_evaluations: levels.prk_evaluations,
        timestep_scaling: config.timestep_scaling,
        before: 0,
        after: 0,
        noise_levels: Arc::new(noise_levels),
        prediction: config.prediction,
        train_timesteps: train,
        init_noise_sigma: 1.0,
    };
    if grid == Grid::Pndm {
        plan.before = skipped;
    } else {
        plan.drop_first(skipped);
    }
    let top = plan.first_sigma();
    let added =
        sampler.spec().is_variance_preserving() || settings.spacing == TimestepSpacing::Leading;
    plan.init_noise_sigma = if added { top.hypot(1.0) } else { top };
    Ok(plan)
}

/// The fraction of fresh noise. Errors if the sampler has none to choose, or beyond 0..=1.
fn resolve_eta(sampler: Sampler, eta: Option<f64>) -> Result<f64> {
    let Some(default) = sampler.spec().eta else {
        let takers = Sampler::ALL.into_iter().filter(|s| s.spec().takes_eta());
        let names: Vec<String> = takers.map(|taker| format!("`{taker}`")).collect();
        ensure!(
            eta.is_none(),
            "`{sampler}` takes no `--eta`\n\nhint: {} take it",
            names.join(", ")
        );
        return Ok(0.0);
    };
    let eta = eta.unwrap_or(default);
    ensure!(
        (0.0..=1.0).contains(&eta),
        "`--eta` is {eta}\n\nhint: use a value from 0 to 1"
    );
    Ok(eta)
}

/// The middles of the steps, geometric in sigma, for the samplers that evaluate there: halfway to
/// where the step goes before fresh noise is added.
fn middle_sigmas(
    sampler: Sampler,
    noise_levels: &NoiseLevels,
    sigmas: &[f64],
    eta: f64,
) -> Vec<f64> {
    let spec = sampler.spec();
    if spec.second_stage != Some(SecondStage::Middle) {
        return Vec::new();
    }
    let steps = sigmas.windows(2).filter(|pair| pair[1] > 0.0);
    let middles = steps.map(|pair| {
        let (sigma, next) = (pair[0], pair[1]);
        let target = if spec.takes_eta() {
            Ancestral::new(noise_levels, sigma, next, eta).down
        } else {
            next
        };
        if spec.traits.halves_flow_ratio && matches!(noise_levels, NoiseLevels::Flow) {
            // ComfyUI's, as the ratio of pure noise is infinite
            const AFTER_PURE_NOISE: f64 = 0.9999;
            let ratio = (flow_ratio(sigma) * flow_ratio(target)).sqrt();
            return match sigma < 1.0 {
                true => ratio / (1.0 + ratio),
                false => AFTER_PURE_NOISE,
            };
        }
        (sigma * target).sqrt()
    });
    middles.collect()
}

/// A step down to less noise than the next level has, and fresh noise up to it.
pub(super) struct Ancestral {
    /// The level that the deterministic part goes down to.
    pub(super) down: f64,
    /// The factor of x there before fresh noise is added.
    pub(super) keep: f64,
    /// The factor of that noise.
    pub(super) up: f64,
}

impl Ancestral {
    fn new(noise_levels: &NoiseLevels, sigma: f64, next: f64, eta: f64) -> Self {
        if !matches!(noise_levels, NoiseLevels::Flow) {
            let (down, up) = ancestral_step(sigma, next, eta);
            return Self {
                down,
                keep: 1.0,
                up,
            };
        }
        // on the line from x0 to noise x0 loses its part too, as ComfyUI has it
        let down = next * (1.0 + (next / sigma - 1.0) * eta);
        let keep = (1.0 - next) / (1.0 - down);
        let up = (next * next - (down * keep).powi(2)).max(0.0).sqrt();
        Self { down, keep, up }
    }
}

/// The levels of a run, as [`SamplingPlan`] has them.
#[derive(Default)]
struct Levels {
    timesteps: Vec<f64>,
    sigmas: Vec<f64>,
    transfers: Vec<(f64, f64)>,
    prk_evaluations: usize,
}

impl Levels {
    /// Noise levels at timesteps, or those of a sigma schedule with the timesteps that fit them.
    fn interpolated(settings: &SamplerConfig, training: &DiscreteLevels, n: usize) -> Result<Self> {
        let mut timesteps = settings.timesteps(n, training)?;
        timesteps.iter_mut().for_each(|t| *t = f64::from(*t as f32));
        let mut sigmas: Vec<f64> = timesteps
            .iter()
            .map(|t| training.interpolated_sigma(*t))
            .collect();
        if settings.is_log_linear() {
            sigmas = exponential(training.sigma_max(), training.sigma_min(), n + 1);
        }
        if let Some(schedule) = settings.sigma_schedule {
            (sigmas, timesteps) = settings.scheduled(schedule, n, &sigmas, training);
        }
        if sigmas.len() == timesteps.len() {
            sigmas.push(settings.last_sigma(&sigmas, training));
        }
        if settings.has_continuous_timesteps() {
            let sigmas = sigmas.iter().take(n);
            timesteps = sigmas.map(|sigma| 0.25 * sigma.ln()).collect();
        }
        let in_f32 = |values: Vec<f64>| values.into_iter().map(|v| f64::from(v as f32)).collect();
        Ok(Self {
            timesteps: in_f32(timesteps),
            sigmas: in_f32(sigmas),
            ..Self::default()
        })
    }

    /// Whole timesteps, each with its training noise level.
    fn discrete(settings: &SamplerConfig, training: &DiscreteLevels, n: usize) -> Result<Self> {
        let timesteps = settings.timesteps(n, training)?;
        let mut sigmas = sigmas_at(&timesteps, training)?;
        let mut transfers = Vec::new();
        if settings.traits.fixed_stride {
            let end = settings.final_discrete_sigma(training);
            let stride = (settings.file.train_timesteps / n) as f64;
            for (t, sigma) in timesteps.iter().zip(&sigmas) {
                let target = if *t >= stride {
                    training.sigma_at(t - stride)?
                } else {
                    end
                };
                transfers.push((*sigma, target));
            }
            sigmas.extend(transfers.last().map(|(_, target)| *target));
        } else {
            sigmas.push(0.0);
        }
        Ok(Self {
            timesteps,
            sigmas,
            transfers,
            ..Self::default()
        })
    }

    /// Steps of distillation; each goes down to the timestep (1 - eta) * next, and noise brings it
    /// up to the next again.
    fn distilled(
        settings: &SamplerConfig,
        training: &DiscreteLevels,
        n: usize,
        fraction: f64,
        eta: f64,
    ) -> Result<Self> {
        let timesteps = settings.distilled_timesteps(n, fraction)?;
        let mut sigmas = sigmas_at(&timesteps, training)?;
        let mut transfers = Vec::new();
        for (i, sigma) in sigmas.iter().enumerate() {
            let next = timesteps.get(i + 1).copied().unwrap_or(0.0);
            // TCD's timestep s, in f32 as torch multiplies
            let s = ((1.0 - eta) as f32 * next as f32).floor();
            transfers.push((*sigma, training.sigma_at(f64::from(s))?));
        }
        sigmas.push(settings.last_sigma(&sigmas, training));
        Ok(Self {
            timesteps,
            sigmas,
            transfers,
            ..Self::default()
        })
    }

    /// PNDM (Liu et al. 2022, arXiv 2202.09778): pseudo Runge-Kutta steps at the start unless they
    /// are skipped, then linear multistep ones. A run that begins later counts its evaluations
    /// anew, as diffusers does: its second goes back to where the first began.
    fn pndm(
        settings: &SamplerConfig,
        training: &DiscreteLevels,
        n: usize,
        skipped: usize,
    ) -> Result<Self> {
        ensure!(
            settings.file.prediction != Prediction::Sample,
            "`pndm` does not work with the scheduler's `prediction_type` \"sample\""
        );
        let spaced = settings.timesteps(n, training)?;
        let per_step = settings.file.train_timesteps / n;
        let (timesteps, mut moves, prk_evaluations) = if settings.skips_prk_steps() {
            (plms_timesteps(spaced, skipped), Vec::new(), 0)
        } else {
            ensure!(
                skipped == 0,
                "`pndm` with Runge-Kutta steps cannot begin with a picture\n\nhint: use another `--sampler`"
            );
            ensure!(n >= 4, "`pndm` needs at least 4 steps here, not {n}");
            let (mut timesteps, moves) = prk_start(&spaced, (per_step / 2) as f64);
            let evaluations = timesteps.len();
            timesteps.extend(&spaced[3..]);
            (timesteps, moves, evaluations)
        };
        let stride = per_step as f64;
        for (i, t) in timesteps.iter().enumerate().skip(prk_evaluations) {
            moves.push(if i == 1 {
                (t + stride, *t)
            } else {
                (*t, t - stride)
            });
        }
        let end = settings.final_discrete_sigma(training);
        let level = |t: f64| {
            if t < 0.0 {
                Ok(end)
            } else {
                training.sigma_at(t)
            }
        };
        let transfers = moves
            .into_iter()
            .map(|(from, to)| Ok((level(from)?, level(to)?)))
            .collect::<Result<Vec<_>>>()?;
        let mut sigmas = sigmas_at(&timesteps, training)?;
        sigmas.extend(transfers.last().map(|(_, target)| *target));
        Ok(Self {
            timesteps,
            sigmas,
            transfers,
            prk_evaluations,
        })
    }

    fn are_decreasing(&self) -> bool {
        let sigmas = &self.sigmas[..self.timesteps.len()];
        sigmas.windows(2).all(|pair| pair[0] > pair[1])
            && sigmas.iter().all(|sigma| sigma.is_finite() && *sigma > 0.0)
    }
}

/// The training noise levels of whole timesteps. Errors beyond those of training.
fn sigmas_at(timesteps: &[f64], training: &DiscreteLevels) -> Result<Vec<f64>> {
    timesteps.iter().map(|t| training.sigma_at(*t)).collect()
}

/// The timesteps of PNDM without a Runge-Kutta start: the second is evaluated twice.
fn plms_timesteps(mut spaced: Vec<f64>, skipped: usize) -> Vec<f64> {
    if let Some(second) = spaced.get(1).copied() {
        spaced.insert(1, second);
    }
    spaced.drain(..skipped);
    spaced
}

/// The evaluations of PNDM's first three steps, four each, and the timesteps between which they
/// move x: the same as diffusers' repeat and tile. `half` is half a step. There are at least four
/// timesteps in `spaced`.
fn prk_start(spaced: &[f64], half: f64) -> (Vec<f64>, Vec<(f64, f64)>) {
    let (mut timesteps, mut moves) = (Vec::new(), Vec::new());
    for pair in spaced[..4].windows(2) {
        // t, two middles, the next t
        let (t, next) = (pair[0], pair[1]);
        timesteps.extend([t, next + half, next + half, next]);
        moves.extend([
            (t, t - half),
            (t, next + half),
            (t, next + half - half),
            (t, next),
        ]);
    }
    (timesteps, moves)
}

/// Splits a step from sigma to next into a deterministic part, down to the first result, and
/// noise of the second, so that their squares sum to next squared (k-diffusion).
pub(super) fn ancestral_step(sigma: f64, next: f64, eta: f64) -> (f64, f64) {
    let fresh = next * next * (sigma * sigma - next * next) / (sigma * sigma);
    let up = next.min(eta * fresh.max(0.0).sqrt());
    let down = (next * next - up * up).max(0.0).sqrt();
    (down, up)
}
