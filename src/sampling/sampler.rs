//! Samplers: from noise to latents, one function per algorithm.
//!
//! Each walks the noise levels of a [`SamplingPlan`] in the form x = x0 + sigma * noise, asks
//! `denoise` for x0 and draws unit normals from `noise`. Where diffusers has the sampler, the
//! latents after every evaluation of the network are diffusers' own, else k-diffusion's. History
//! belongs to one call: nothing is kept between runs. The module hides the arithmetic of the
//! solvers.
//!
//! Read next: `plan`, which lays out the levels.

use std::collections::VecDeque;

use candle_core::{Result, Tensor};

use crate::sampling::plan::{Ancestral, SamplingPlan, ancestral_step};
use crate::sampling::scheduler_config::{Algorithm, SolverType};

/// What a caller sees after each evaluation of the network.
pub struct Step<'a> {
    /// The evaluation, counted from 0.
    pub index: usize,
    /// The noisy latents, [b, h, w, c], scaled as diffusers' scheduler of this sampler scales them.
    pub latents: &'a Tensor,
    /// The noise level at which the next evaluation takes `latents`; 0 after the last one.
    pub sigma: f64,
    /// The network's estimate of the finished latents, [b, h, w, c].
    pub denoised: &'a Tensor,
}

type Denoise<'a> = dyn FnMut(&Tensor, f64, f64) -> Result<Tensor> + 'a;
type Noise<'a> = dyn FnMut() -> Result<Tensor> + 'a;
type OnStep<'a> = dyn FnMut(&Step) -> Result<Option<Tensor>> + 'a;

/// Runs the sampler of a plan from noise to latents.
///
/// `x` is unit noise times [`SamplingPlan::init_noise_sigma`], f32, [b, h, w, c].
/// `denoise(x, sigma, timestep)` gives x0 for x = x0 + sigma * noise. `noise()` gives unit normals
/// like `x`, asked for in diffusers' order. `on_step` sees the latents after every evaluation, and
/// may put others in their place. Returns the latents that diffusers would decode. Errors are those
/// of the closures and of the tensors.
pub fn sample(
    plan: &SamplingPlan,
    x: Tensor,
    denoise: &mut dyn FnMut(&Tensor, f64, f64) -> Result<Tensor>,
    noise: &mut dyn FnMut() -> Result<Tensor>,
    on_step: &mut dyn FnMut(&Step) -> Result<Option<Tensor>>,
) -> Result<Tensor> {
    let mut run = Run {
        plan,
        denoise,
        noise,
        on_step,
        done: 0,
    };
    let x = (plan.sampler.spec().run)(&mut run, x)?;
    match plan.latents_scale(plan.sigmas.last().copied().unwrap_or(0.0)) {
        1.0 => Ok(x),
        scale => x / scale,
    }
}

/// One run of a sampler: its plan, the caller's closures, and how far it is.
///
/// A sampler asks [`Run::denoised_at`] for an estimate of x0 at each level of the plan, and calls
/// [`Run::report`] once after every evaluation of the network.
pub(super) struct Run<'a> {
    plan: &'a SamplingPlan,
    /// (x, sigma, timestep) to x0.
    denoise: &'a mut Denoise<'a>,
    /// Unit normals like x.
    noise: &'a mut Noise<'a>,
    /// Sees the latents after every evaluation, and may replace them.
    on_step: &'a mut OnStep<'a>,
    /// Evaluations of the network so far.
    done: usize,
}

impl Run<'_> {
    /// Estimates x0 between the levels of the plan.
    fn denoised(&mut self, x: &Tensor, sigma: f64, timestep: f64) -> Result<Tensor> {
        (self.denoise)(x, sigma, timestep)
    }

    /// Estimates x0 at level i of the plan.
    fn denoised_at(&mut self, x: &Tensor, i: usize) -> Result<Tensor> {
        (self.denoise)(x, self.plan.sigmas[i], self.plan.timesteps[i])
    }

    /// Shows the caller `x`, at noise level `sigma`, after one evaluation. Returns it, or what the
    /// caller puts in its place.
    fn report(&mut self, x: Tensor, sigma: f64, denoised: &Tensor) -> Result<Tensor> {
        let (plan, index, total) = (self.plan, self.done, self.plan.evaluations());
        let scale = plan.latents_scale(sigma);
        let next = if plan.sampler.spec().is_two_stage() {
            sigma // may lie between two levels
        } else {
            // not always `sigma`: PNDM begun late evaluates at other levels than it reaches
            plan.sigmas.get(index + 1).copied().unwrap_or(0.0)
        };
        let latents = if scale == 1.0 {
            x.clone()
        } else {
            (&x / scale)?
        };
        let next = if index + 1 < total { next } else { 0.0 };
        self.done += 1;
        match (self.on_step)(&Step {
            index,
            latents: &latents,
            sigma: next,
            denoised,
        })? {
            Some(other) => other * scale,
            None => Ok(x),
        }
    }

    /// Adds sigma * fresh noise to x; draws none for sigma 0.
    fn add_noise(&mut self, x: Tensor, sigma: f64) -> Result<Tensor> {
        if sigma > 0.0 {
            sum(&[(1.0, &x), (sigma, &(self.noise)()?)])
        } else {
            Ok(x)
        }
    }

    /// Brings x from the level `down` of an ancestral step up to the next.
    fn renew(&mut self, x: Tensor, step: &Ancestral) -> Result<Tensor> {
        let x = match step.keep {
            1.0 => x,
            keep => (x * keep)?,
        };
        self.add_noise(x, step.up)
    }

    /// Clips estimated latents to the plan's range, if it has one.
    fn clip(&self, denoised: &Tensor) -> Result<Tensor> {
        match self.plan.clip {
            Some(range) => denoised.clamp(-range, range),
            None => Ok(denoised.clone()),
        }
    }
}

/// The weighted sum of some tensors of one shape.
fn sum(terms: &[(f64, &Tensor)]) -> Result<Tensor> {
    let Some(((weight, first), rest)) = terms.split_first() else {
        candle_core::bail!("a sum of no terms");
    };
    let mut total = (*first * *weight)?;
    for (weight, term) in rest.iter().filter(|(weight, _)| *weight != 0.0) {
        total = (total + (*term * *weight)?)?;
    }
    Ok(total)
}

/// The noise in x, (x - denoised) / sigma, which is also dx/dsigma of the ODE.
fn derivative(x: &Tensor, denoised: &Tensor, sigma: f64) -> Result<Tensor> {
    (x - denoised)? / sigma
}

/// Euler's method on dx/dsigma, Karras et al. 2022.
pub(super) fn euler(run: &mut Run, mut x: Tensor) -> Result<Tensor> {
    let plan = run.plan;
    for (i, pair) in plan
        .sigmas
        .windows(2)
        .enumerate()
        .take(plan.timesteps.len())
    {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = run.denoised_at(&x, i)?;
        let slope = derivative(&x, &denoised, sigma)?;
        x = sum(&[(1.0, &x), (next - sigma, &slope)])?;
        x = run.report(x, next, &denoised)?;
    }
    Ok(x)
}

/// Euler's method down to less noise than the next level has, then fresh noise up to it.
pub(super) fn euler_ancestral(run: &mut Run, mut x: Tensor) -> Result<Tensor> {
    let plan = run.plan;
    for (i, pair) in plan.sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = run.denoised_at(&x, i)?;
        let step = plan.ancestral(sigma, next);
        let slope = derivative(&x, &denoised, sigma)?;
        x = sum(&[(1.0, &x), (step.down - sigma, &slope)])?;
        x = run.renew(x, &step)?;
        x = run.report(x, next, &denoised)?;
    }
    Ok(x)
}

/// Song et al. 2020, eq. 12. Clipping changes x0 but not the noise, as in diffusers.
pub(super) fn ddim(run: &mut Run, mut x: Tensor) -> Result<Tensor> {
    let plan = run.plan;
    for (i, pair) in plan.sigmas.windows(2).enumerate() {
        let (sigma, next) = plan.transfers.get(i).copied().unwrap_or((pair[0], pair[1]));
        let denoised = run.denoised_at(&x, i)?;
        let slope = derivative(&x, &denoised, sigma)?;
        let (down, up) = ancestral_step(sigma, next, plan.eta);
        let denoised = run.clip(&denoised)?;
        x = sum(&[(1.0, &denoised), (down, &slope)])?;
        x = run.add_noise(x, up)?;
        // diffusers takes a result of level `next` for one of the next timestep's level
        if next != pair[1] {
            x = (x * (pair[1].hypot(1.0) / next.hypot(1.0)))?;
        }
        x = run.report(x, pair[1], &denoised)?;
    }
    Ok(x)
}

/// Ho et al. 2020, algorithm 2, on a subset of the timesteps.
pub(super) fn ddpm(run: &mut Run, mut x: Tensor) -> Result<Tensor> {
    let plan = run.plan;
    for (i, pair) in plan.sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = run.denoised_at(&x, i)?;
        let denoised = run.clip(&denoised)?;
        let kept = (next / sigma).powi(2);
        x = sum(&[(1.0 - kept, &denoised), (kept, &x)])?;
        let std = if plan.large_variance {
            // beta of the step, 1 - alpha / alpha_next, over alpha_next
            let ratio = (1.0 + next * next) / (1.0 + sigma * sigma);
            ((1.0 - ratio) * (1.0 + next * next)).sqrt()
        } else {
            ancestral_step(sigma, next, 1.0).1
        };
        if plan.timesteps[i] > 0.0 {
            x = run.add_noise(x, std)?;
        }
        x = run.report(x, next, &denoised)?;
    }
    Ok(x)
}

/// Liu et al. 2022: multistep on the network's output, which is then moved from one noise level
/// to another. A network that predicts v has its v extrapolated, as in diffusers.
pub(super) fn pndm(run: &mut Run, x: Tensor) -> Result<Tensor> {
    let plan = run.plan;
    let mut x = (x / plan.sigmas[0].hypot(1.0))?; // variance preserving
    let mut history: VecDeque<Tensor> = VecDeque::new();
    let mut start = x.clone();
    let mut weighted: Option<Tensor> = None;
    for (i, (from, to)) in plan.transfers.iter().copied().enumerate() {
        let sigma = plan.sigmas[i];
        let scaled = (&x * sigma.hypot(1.0))?;
        let denoised = run.denoised_at(&scaled, i)?;
        let output = network_output(plan, &scaled, &denoised, sigma)?;
        let output = if i < plan.prk_evaluations {
            if i % 4 == 0 {
                start = x.clone();
                history.push_front(output.clone());
            }
            runge_kutta(&mut weighted, output, i % 4)?
        } else {
            start = if i == 1 { start } else { x.clone() };
            linear_multistep(&mut history, output, i == 1)?
        };
        x = move_level(plan, &start, &output, from, to)?;
        let level = run.report((&x * to.hypot(1.0))?, to, &denoised)?;
        x = (level / to.hypot(1.0))?;
    }
    let end = plan.sigmas.last().copied().unwrap_or(0.0);
    x * end.hypot(1.0)
}

/// The network's output, from the estimate of x0 that was made of it.
fn network_output(
    plan: &SamplingPlan,
    x: &Tensor,
    denoised: &Tensor,
    sigma: f64,
) -> Result<Tensor> {
    let scalings = plan.scalings(sigma);
    sum(&[
        (-scalings.c_skip / scalings.c_out, x),
        (scalings.c_out.recip(), denoised),
    ])
}

/// Moves a variance-preserving x along one network output (Liu et al. 2022, eq. 9).
fn move_level(
    plan: &SamplingPlan,
    x: &Tensor,
    output: &Tensor,
    from: f64,
    to: f64,
) -> Result<Tensor> {
    let scaled = (x * from.hypot(1.0))?;
    let scalings = plan.scalings(from);
    let denoised = sum(&[(scalings.c_skip, &scaled), (scalings.c_out, output)])?;
    let slope = derivative(&scaled, &denoised, from)?;
    sum(&[(1.0, &scaled), (to - from, &slope)])? / to.hypot(1.0)
}

/// One of the four evaluations of a classic Runge-Kutta step.
fn runge_kutta(weighted: &mut Option<Tensor>, output: Tensor, stage: usize) -> Result<Tensor> {
    let weight = if stage == 0 || stage == 3 {
        1.0 / 6.0
    } else {
        1.0 / 3.0
    };
    let total = match weighted.take() {
        Some(before) => sum(&[(1.0, &before), (weight, &output)])?,
        None => (&output * weight)?,
    };
    if stage == 3 {
        return Ok(total);
    }
    *weighted = Some(total);
    Ok(output)
}

/// Adams-Bashforth of as high an order as the history allows, at most four. The first step is
/// evaluated twice and averaged (`repeated`).
fn linear_multistep(
    history: &mut VecDeque<Tensor>,
    output: Tensor,
    repeated: bool,
) -> Result<Tensor> {
    if repeated {
        return match history.front() {
            Some(last) => sum(&[(0.5, &output), (0.5, last)]),
            None => Ok(output),
        };
    }
    history.push_front(output);
    history.truncate(4);
    let weights: &[f64] = match history.len() {
        1 => &[1.0],
        2 => &[1.5, -0.5],
        3 => &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
        _ => &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
    };
    let terms: Vec<(f64, &Tensor)> = weights.iter().copied().zip(history.iter()).collect();
    sum(&terms)
}

/// Weights of one step of an exponential integrator.
struct Weights {
    x: f64,
    history: [f64; 3],
    noise: f64,
}

/// DPM-Solver++ and DPM-Solver, multistep, for the ODE and the SDE: Lu et al. 2022 (arXiv
/// 2211.01095), algorithm 2 and appendix; the orders at start and end are diffusers'.
pub(super) fn dpm_multistep(run: &mut Run, mut x: Tensor) -> Result<Tensor> {
    let plan = run.plan;
    let n = plan.timesteps.len();
    let short = plan.solver.lower_order_final && plan.steps() < 15;
    let mut history: VecDeque<Tensor> = VecDeque::new();
    for i in 0..n {
        let (sigma, next) = (plan.sigmas[i], plan.sigmas[i + 1]);
        let denoised = run.denoised_at(&x, i)?;
        history.push_front(match plan.solver.algorithm {
            Algorithm::PlusPlus | Algorithm::SdePlusPlus => denoised.clone(),
            Algorithm::Plain | Algorithm::Sde => derivative(&x, &denoised, sigma)?,
        });
        history.truncate(3);
        let order = match n - i + plan.after {
            1 if plan.solver.euler_at_final || short => 1,
            2 if short => plan.solver.order.min(2),
            _ => plan.solver.order,
        };
        let weights = dpm_weights(plan, i, order.min(i + 1));
        let mut terms = vec![(weights.x, &x)];
        terms.extend(weights.history.into_iter().zip(&history));
        let moved = sum(&terms)?;
        x = run.add_noise(moved, weights.noise)?;
        x = run.report(x, next, &denoised)?;
    }
    Ok(x)
}

/// Step i as weights of x, of the last three outputs, newest first, and of noise.
///
/// With h the step in -log(sigma), D0 the newest output and D1, D2 the divided differences, the
/// step is x * c_x + c_0 * D0 + c_1 * D1 + c_2 * D2 + c_n * noise.
fn dpm_weights(plan: &SamplingPlan, i: usize, order: usize) -> Weights {
    let (sigma, next) = (plan.sigmas[i], plan.sigmas[i + 1]);
    let step = |j: usize| (plan.sigmas[i - j] / plan.sigmas[i + 1 - j]).ln();
    let h = step(0);
    let shrink = next / sigma; // exp(-h)
    let algorithm = plan.solver.algorithm;
    let (x, c0, noise) = match algorithm {
        Algorithm::PlusPlus => (shrink, 1.0 - shrink, 0.0),
        Algorithm::Plain => (1.0, next - sigma, 0.0),
        Algorithm::SdePlusPlus => {
            let lost = 1.0 - shrink * shrink;
            (shrink * shrink, lost, next * lost.max(0.0).sqrt())
        }
        Algorithm::Sde => {
            let spread = (sigma * sigma - next * next).max(0.0).sqrt();
            (1.0, 2.0 * (next - sigma), spread)
        }
    };
    let heun = match algorithm {
        Algorithm::PlusPlus => 1.0 - (1.0 - shrink) / h,
        Algorithm::Plain => next - (sigma - next) / h,
        Algorithm::SdePlusPlus => 1.0 - (1.0 - shrink * shrink) / (2.0 * h),
        Algorithm::Sde => 2.0 * (next - (sigma - next) / h),
    };
    let c1 = if order == 3 || plan.solver.solver_type == SolverType::Heun {
        heun
    } else {
        0.5 * c0
    };
    let history = match order {
        1 => [c0, 0.0, 0.0],
        2 => {
            let r0 = step(1) / h;
            [c0 + c1 / r0, -c1 / r0, 0.0]
        }
        _ => {
            let c2 = match algorithm {
                Algorithm::Plain => 0.5 * next - (sigma - next - next * h) / (h * h),
                // as in diffusers; the expansion (and k-diffusion) has + 0.5 here, which gives
                // Gaussian data its own spread where this gives a tenth more at 60 steps
                Algorithm::SdePlusPlus => (1.0 - shrink * shrink - 2.0 * h) / (4.0 * h * h) - 0.5,
                _ => 0.5 - (shrink - 1.0 + h) / (h * h),
            };
            let (r0, r1) = (step(1) / h, step(2) / h);
            // D1 = d0 + r0 / (r0 + r1) * (d0 - d1), D2 = (d0 - d1) / (r0 + r1)
            let by_d0 = c1 + (c1 * r0 + c2) / (r0 + r1);
            let by_d1 = -(c1 * r0 + c2) / (r0 + r1);
            let (a, b) = (by_d0 / r0, by_d1 / r1);
            [c0 + a, b - a, -b]
        }
    };
    Weights { x, history, noise }
}

/// Karras et al. 2022, algorithm 1: Euler, then the trapezoid with the slope found there.
pub(super) fn heun(run: &mut Run, mut x: Tensor) -> Result<Tensor> {
    let plan = run.plan;
    for (i, pair) in plan.sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = run.denoised_at(&x, i)?;
        let denoised = run.clip(&denoised)?;
        let slope = derivative(&x, &denoised, sigma)?;
        let ahead = sum(&[(1.0, &x), (next - sigma, &slope)])?;
        let ahead = run.report(ahead, next, &denoised)?;
        if next == 0.0 {
            return Ok(ahead);
        }
        let denoised = run.denoised_at(&ahead, i + 1)?;
        let denoised = run.clip(&denoised)?;
        let slope_ahead = derivative(&ahead, &denoised, next)?;
        let half = 0.5 * (next - sigma);
        x = sum(&[(1.0, &x), (half, &slope), (half, &slope_ahead)])?;
        x = run.report(x, next, &denoised)?;
    }
    Ok(x)
}

/// DPM-Solver-2: the slope in the middle of the step, geometric in sigma; the ancestral form
/// steps to less noise and adds fresh noise.
pub(super) fn dpm2(run: &mut Run, mut x: Tensor) -> Result<Tensor> {
    let plan = run.plan;
    for (i, pair) in plan.sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = run.denoised_at(&x, i)?;
        let slope = derivative(&x, &denoised, sigma)?;
        let middle = plan.middle_sigmas.get(i).copied().unwrap_or(0.0);
        let halfway = sum(&[(1.0, &x), (middle - sigma, &slope)])?;
        let halfway = run.report(halfway, middle, &denoised)?;
        if next == 0.0 {
            return Ok(halfway);
        }
        let denoised = run.denoised(&halfway, middle, plan.middle_timesteps[i])?;
        let slope = derivative(&halfway, &denoised, middle)?;
        let step = plan.ancestral(sigma, next);
        x = sum(&[(1.0, &x), (step.down - sigma, &slope)])?;
        x = run.renew(x, &step)?;
        x = run.report(x, next, &denoised)?;
    }
    Ok(x)
}

/// DPM-Solver++(2S) with ancestral noise, after k-diffusion's `sample_dpmpp_2s_ancestral`.
pub(super) fn dpmpp_2s_ancestral(run: &mut Run, mut x: Tensor) -> Result<Tensor> {
    let plan = run.plan;
    for (i, pair) in plan.sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = run.denoised_at(&x, i)?;
        if next == 0.0 {
            return run.report(denoised.clone(), next, &denoised);
        }
        let step = plan.ancestral(sigma, next);
        let middle = plan.middle_sigmas[i];
        let halfway = exponential_step(&x, &denoised, middle / sigma)?;
        let halfway = run.report(halfway, middle, &denoised)?;
        let denoised = run.denoised(&halfway, middle, plan.middle_timesteps[i])?;
        x = exponential_step(&x, &denoised, step.down / sigma)?;
        x = run.renew(x, &step)?;
        x = run.report(x, next, &denoised)?;
    }
    Ok(x)
}

/// The exact step of x towards a constant `denoised`; `ratio` is the next sigma over the present.
fn exponential_step(x: &Tensor, denoised: &Tensor, ratio: f64) -> Result<Tensor> {
    sum(&[(ratio, x), (1.0 - ratio, denoised)])
}

/// DPM-Solver++ (SDE), after k-diffusion's `sample_dpmpp_sde` with r = 1/2.
///
/// Both stages ride one Brownian path over sigma, drawn here from left to right: one unit normal
/// for the half before the middle, one for the half after it.
pub(super) fn dpmpp_sde(run: &mut Run, mut x: Tensor) -> Result<Tensor> {
    let plan = run.plan;
    for (i, pair) in plan.sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = run.denoised_at(&x, i)?;
        if next == 0.0 {
            return run.report(denoised.clone(), next, &denoised);
        }
        let middle = plan.middle_sigmas[i];
        let first = (run.noise)()?;
        let (down, up) = ancestral_step(sigma, middle, 1.0);
        let halfway = sum(&[
            (1.0, &exponential_step(&x, &denoised, down / sigma)?),
            (up, &first),
        ])?;
        let halfway = run.report(halfway, middle, &denoised)?;
        let denoised = run.denoised(&halfway, middle, plan.middle_timesteps[i])?;
        let second = (run.noise)()?;
        let (before, after) = ((sigma - middle).sqrt(), (middle - next).sqrt());
        let (down, up) = ancestral_step(sigma, next, 1.0);
        let unit = up / (sigma - next).sqrt();
        let moved = exponential_step(&x, &denoised, down / sigma)?;
        x = sum(&[
            (1.0, &moved),
            (before * unit, &first),
            (after * unit, &second),
        ])?;
        x = run.report(x, next, &denoised)?;
    }
    Ok(x)
}

/// Linear multistep: Adams-Bashforth over uneven sigmas, of order four.
pub(super) fn lms(run: &mut Run, mut x: Tensor) -> Result<Tensor> {
    let plan = run.plan;
    let mut slopes: VecDeque<Tensor> = VecDeque::new();
    for (i, pair) in plan.sigmas.windows(2).enumerate() {
        let denoised = run.denoised_at(&x, i)?;
        slopes.push_front(derivative(&x, &denoised, pair[0])?);
        slopes.truncate(4);
        let weights = lagrange_integrals(&plan.sigmas[..=i], slopes.len(), pair[1]);
        let mut terms = vec![(1.0, &x)];
        terms.extend(weights.into_iter().zip(&slopes));
        x = sum(&terms)?;
        x = run.report(x, pair[1], &denoised)?;
    }
    Ok(x)
}

/// The integrals, from the last of `sigmas` to `next`, of the Lagrange polynomials through the
/// last `order` of `sigmas`, newest first; Gauss' rule of two points, exact up to order four.
fn lagrange_integrals(sigmas: &[f64], order: usize, next: f64) -> Vec<f64> {
    let nodes: Vec<f64> = sigmas.iter().rev().take(order).copied().collect();
    let (centre, half) = (0.5 * (nodes[0] + next), 0.5 * (next - nodes[0]));
    let offset = half / 3_f64.sqrt();
    let basis = |k: usize, tau: f64| {
        let others = nodes.iter().enumerate().filter(|(j, _)| *j != k);
        others
            .map(|(_, node)| (tau - node) / (nodes[k] - node))
            .product::<f64>()
    };
    (0..order)
        .map(|k| half * (basis(k, centre - offset) + basis(k, centre + offset)))
        .collect()
}

/// Zhang and Chen 2022, in log(rho): the noise predictions' Lagrange polynomial in log(sigma),
/// integrated over sigma.
pub(super) fn deis(run: &mut Run, mut x: Tensor) -> Result<Tensor> {
    let plan = run.plan;
    let n = plan.timesteps.len();
    let mut slopes: VecDeque<Tensor> = VecDeque::new();
    for (i, pair) in plan.sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = run.denoised_at(&x, i)?;
        slopes.push_front(derivative(&x, &denoised, sigma)?);
        slopes.truncate(3);
        let left = if plan.solver.lower_order_final && plan.steps() < 15 {
            n - i + plan.after
        } else {
            n
        };
        let order = plan.solver.order.min(i + 1).min(left);
        let nodes: Vec<f64> = (0..order).map(|k| plan.sigmas[i - k].ln()).collect();
        x = if order == 1 && plan.is_flow() {
            // the same, where x0 would be lost beside a million times as much noise
            exponential_step(&x, &denoised, next / sigma)?
        } else {
            let mut terms = vec![(1.0, &x)];
            for (k, slope) in slopes.iter().enumerate().take(order) {
                let weight = deis_weight(&nodes, k, next) - deis_weight(&nodes, k, sigma);
                terms.push((weight, slope));
            }
            sum(&terms)?
        };
        x = run.report(x, next, &denoised)?;
    }
    Ok(x)
}

/// An antiderivative in rho of the k-th Lagrange polynomial in log(rho) through `nodes`.
fn deis_weight(nodes: &[f64], k: usize, rho: f64) -> f64 {
    if rho == 0.0 {
        return 0.0;
    }
    let log_rho = rho.ln();
    let others: Vec<f64> = nodes
        .iter()
        .enumerate()
        .filter(|(j, _)| *j != k)
        .map(|(_, node)| *node)
        .collect();
    let scale: f64 = others.iter().map(|other| nodes[k] - other).product();
    let integral = match others[..] {
        [] => rho,
        [c] => rho * (log_rho - c - 1.0),
        [c, d, ..] => rho * ((log_rho - c) * (log_rho - d) - 2.0 * log_rho + c + d + 2.0),
    };
    integral / scale
}

/// Zhao et al. 2023: a predictor and a corrector that share their evaluations.
pub(super) fn unipc(run: &mut Run, mut x: Tensor) -> Result<Tensor> {
    let plan = run.plan;
    let (n, solver) = (plan.timesteps.len(), &plan.solver);
    let mut history: VecDeque<Tensor> = VecDeque::new(); // newest first
    let mut last: Option<(Tensor, usize)> = None;
    for i in 0..n {
        let denoised = run.denoised_at(&x, i)?;
        let output = if solver.predict_x0 {
            denoised.clone()
        } else {
            derivative(&x, &denoised, plan.sigmas[i])?
        };
        if let Some((before, order)) = last
            .take()
            .filter(|_| !solver.disable_corrector.contains(&(plan.before + i - 1)))
        {
            let step = UniPcStep::new(plan, i - 1, order);
            x = step.advance(&before, &history, Some(&output), &step.corrector())?;
        }
        history.push_front(output);
        history.truncate(solver.order);
        let left = if solver.lower_order_final {
            n - i + plan.after
        } else {
            n
        };
        let order = solver.order.min(left).min(i + 1);
        let step = UniPcStep::new(plan, i, order);
        let ahead = step.advance(&x, &history, None, &step.predictor())?;
        last = Some((x, order));
        x = ahead;
        x = run.report(x, plan.sigmas[i + 1], &denoised)?;
    }
    Ok(x)
}

/// The numbers of one step of UniPC, from level i to the next.
struct UniPcStep {
    /// Steps back in -log(sigma) over the present step, then 1 for the present step.
    ratios: Vec<f64>,
    /// The right-hand side of the order conditions.
    conditions: Vec<f64>,
    /// Weight of x, of the newest output and of the differences of outputs.
    weights: (f64, f64, f64),
}

impl UniPcStep {
    fn new(plan: &SamplingPlan, i: usize, order: usize) -> Self {
        let (sigma, next) = (plan.sigmas[i], plan.sigmas[i + 1]);
        let h = (sigma / next).ln();
        let back = |k: usize| (sigma / plan.sigmas[i - k]).ln() / h;
        let mut ratios: Vec<f64> = (1..order).map(back).collect();
        ratios.push(1.0);
        let (hh, phi_1) = if plan.solver.predict_x0 {
            (-h, next / sigma - 1.0)
        } else {
            (h, sigma / next - 1.0)
        };
        let b_h = if plan.solver.solver_type == SolverType::Bh1 {
            hh
        } else {
            phi_1
        };
        let (mut phi, mut factorial) = (phi_1 / hh - 1.0, 1.0);
        let mut conditions = Vec::new();
        for k in 1..=order {
            conditions.push(phi * factorial / b_h);
            factorial *= (k + 1) as f64;
            phi = phi / hh - 1.0 / factorial;
        }
        let weights = if plan.solver.predict_x0 {
            (next / sigma, -phi_1, -b_h)
        } else {
            (1.0, -next * phi_1, -next * b_h)
        };
        Self {
            ratios,
            conditions,
            weights,
        }
    }

    /// Weights of the differences to older outputs; the authors fix that of order two.
    fn predictor(&self) -> Vec<f64> {
        match self.ratios.len() {
            1 => Vec::new(),
            2 => vec![0.5],
            order => vandermonde(&self.ratios[..order - 1], &self.conditions[..order - 1]),
        }
    }

    /// Weights of the differences to older outputs and, last, to the newest.
    fn corrector(&self) -> Vec<f64> {
        match self.ratios.len() {
            1 => vec![0.5],
            _ => vandermonde(&self.ratios, &self.conditions),
        }
    }

    /// Steps from x with the outputs up to the start of the step in `history` and, for the
    /// corrector, the one at its end in `ahead`.
    fn advance(
        &self,
        x: &Tensor,
        history: &VecDeque<Tensor>,
        ahead: Option<&Tensor>,
        rhos: &[f64],
    ) -> Result<Tensor> {
        let (of_x, of_newest, of_difference) = self.weights;
        let others = history
            .iter()
            .skip(1)
            .take(self.ratios.len() - 1)
            .chain(ahead);
        let mut terms = vec![(of_x, x)];
        let mut newest = of_newest;
        for ((other, ratio), rho) in others.zip(&self.ratios).zip(rhos) {
            let weight = of_difference * rho / ratio;
            terms.push((weight, other));
            newest -= weight;
        }
        terms.extend(history.front().map(|output| (newest, output)));
        sum(&terms)
    }
}

/// Solves sum over j of nodes[j]^i * w[j] = values[i] by Gaussian elimination; the nodes differ.
fn vandermonde(nodes: &[f64], values: &[f64]) -> Vec<f64> {
    let n = nodes.len();
    let mut rows: Vec<Vec<f64>> = (0..n)
        .map(|i| {
            nodes
                .iter()
                .map(|node| node.powi(i as i32))
                .chain([values[i]])
                .collect()
        })
        .collect();
    for pivot in 0..n {
        for below in pivot + 1..n {
            let factor = rows[below][pivot] / rows[pivot][pivot];
            let (above, rest) = rows.split_at_mut(below);
            for (entry, over) in rest[0].iter_mut().zip(&above[pivot]) {
                *entry -= factor * over;
            }
        }
    }
    let mut weights = vec![0.0; n];
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|j| rows[i][j] * weights[j]).sum();
        weights[i] = (rows[i][n] - known) / rows[i][i];
    }
    weights
}

/// The refined exponential solver of order two, Zhang et al. 2023 (arXiv 2308.02157), multistep,
/// after ComfyUI's `sample_res_multistep`: x0 on a line through its last two estimates.
pub(super) fn res_multistep(run: &mut Run, mut x: Tensor) -> Result<Tensor> {
    let plan = run.plan;
    let mut before: Option<(Tensor, f64)> = None; // the last estimate, and its step in -log(sigma)
    for (i, pair) in plan.sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = run.denoised_at(&x, i)?;
        let (h, shrink) = ((sigma / next).ln(), next / sigma);
        x = match before.take().filter(|_| next > 0.0) {
            Some((older, last)) => {
                let bend = (1.0 - (1.0 - shrink) / h) * h / last;
                let of_newest = 1.0 - shrink + bend;
                sum(&[(shrink, &x), (of_newest, &denoised), (-bend, &older)])?
            }
            None => exponential_step(&x, &denoised, shrink)?,
        };
        x = run.report(x, next, &denoised)?;
        before = Some((denoised, h));
    }
    Ok(x)
}

/// Luo et al. 2023, algorithm 3: jump to the end, then add noise again.
pub(super) fn lcm(run: &mut Run, mut x: Tensor) -> Result<Tensor> {
    /// The standard deviation of the data that the boundary condition assumes.
    const SIGMA_DATA: f64 = 0.5;
    let plan = run.plan;
    for (i, pair) in plan.sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = run.denoised_at(&x, i)?;
        let denoised = run.clip(&denoised)?;
        let boundary = if plan.is_flow() {
            denoised.clone()
        } else {
            let scaled = plan.timesteps[i] * plan.timestep_scaling;
            let norm = scaled.hypot(SIGMA_DATA);
            let c_skip = (SIGMA_DATA / norm).powi(2);
            sum(&[(scaled / norm, &denoised), (c_skip / sigma.hypot(1.0), &x)])?
        };
        x = run.add_noise(boundary, next)?;
        x = run.report(x, next, &denoised)?;
    }
    Ok(x)
}

/// Zheng et al. 2024, algorithm 4: DDIM to timestep s, then noise up to the next level; eta is
/// their gamma.
pub(super) fn tcd(run: &mut Run, mut x: Tensor) -> Result<Tensor> {
    let plan = run.plan;
    for (i, pair) in plan.sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        let target = plan.transfers[i].1;
        let denoised = run.denoised_at(&x, i)?;
        x = exponential_step(&x, &denoised, target / sigma)?;
        x = run.add_noise(x, (next * next - target * target).max(0.0).sqrt())?;
        x = run.report(x, next, &denoised)?;
    }
    Ok(x)
}
