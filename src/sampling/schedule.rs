//! Noise levels: from a checkpoint's `scheduler_config.json` to the sigmas and timesteps of a run.
//!
//! [`plan`] gives what diffusers' `OtherScheduler.from_config(checkpoint.config).set_timesteps(n)`
//! gives: settings in the file stay when another sampler is chosen, settings that it lacks take
//! the defaults of that sampler's class. Everything is f64 on the host except where torch's f32
//! decides a value (the betas and what follows from them). The module hides diffusers' table of
//! defaults, its spacings and its conversions of sigmas.
//!
//! Throughout, x = x0 + sigma * noise (the "variance exploding" form of Karras et al. 2022,
//! arXiv 2206.00364); a sigma is a noise level, a timestep is what the network is told.
//!
//! Read next: `sampler`, which walks a [`Plan`].

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::sampling::noise_levels::{BetaSchedule, DiscreteLevels};
use crate::sampling::prediction::Prediction;
use crate::sampling::sampler::{Sampler, nearest};
use crate::sampling::sigmas::{AYS_SD, AYS_SDXL, SigmaSchedule, exponential, linspace};

/// How the timesteps of a run are spread over those of training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum TimestepSpacing {
    Leading,
    Linspace,
    Trailing,
}

/// Where the last step ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FinalSigma {
    Zero,
    SigmaMin,
}

/// The family of exponential integrators of DPM-Solver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) enum Algorithm {
    /// Integrates the predicted picture (DPM-Solver++).
    #[serde(rename = "dpmsolver++", alias = "deis")]
    PlusPlus,
    /// Integrates the predicted noise (DPM-Solver).
    #[serde(rename = "dpmsolver")]
    Plain,
    /// DPM-Solver++ for the stochastic equation.
    #[serde(rename = "sde-dpmsolver++")]
    SdePlusPlus,
    /// DPM-Solver for the stochastic equation.
    #[serde(rename = "sde-dpmsolver")]
    Sde,
}

impl Algorithm {
    fn is_sde(self) -> bool {
        matches!(self, Self::SdePlusPlus | Self::Sde)
    }
}

/// The correction term of a multistep method; each class replaces the names of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum SolverType {
    Midpoint,
    Heun,
    Bh1,
    Bh2,
    Logrho,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Interpolation {
    Linear,
    LogLinear,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum TimestepType {
    Discrete,
    Continuous,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum Variance {
    /// That of the posterior; its logarithm is the same here.
    #[serde(rename = "fixed_small", alias = "fixed_small_log")]
    Small,
    #[serde(rename = "fixed_large")]
    Large,
}

/// What of `scheduler_config.json` changes a result. `None` is a key that the file lacks, where
/// diffusers' classes differ in their default.
#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    /// What the network predicts.
    pub prediction: Prediction,
    sampler: Sampler,
    train_timesteps: usize,
    beta_start: Option<f64>,
    beta_end: Option<f64>,
    beta_schedule: Option<BetaSchedule>,
    trained_betas: Option<Vec<f32>>,
    rescale_betas_zero_snr: bool,
    spacing: Option<TimestepSpacing>,
    steps_offset: Option<usize>,
    set_alpha_to_one: Option<bool>,
    clip_sample: Option<bool>,
    clip_sample_range: f64,
    law: Option<SigmaSchedule>,
    sigma_min: Option<f64>,
    sigma_max: Option<f64>,
    final_sigma: FinalSigma,
    interpolation: Interpolation,
    timestep_type: TimestepType,
    lambda_min_clipped: f64,
    solver: SolverConfig,
    variance: Variance,
    skip_prk_steps: bool,
    original_inference_steps: usize,
    timestep_scaling: f64,
    /// Read as diffusers' Stable Diffusion pipelines read it, see [`Self::for_pipeline`].
    pipeline: bool,
}

#[derive(Clone, Debug)]
struct SolverConfig {
    order: Option<usize>,
    algorithm: Algorithm,
    solver_type: Option<SolverType>,
    lower_order_final: bool,
    euler_at_final: bool,
    predict_x0: bool,
    disable_corrector: Vec<usize>,
}

/// Reads single keys of the file; a value of the wrong kind is an error that names both.
struct Keys<'a>(&'a Map<String, Value>);

impl Keys<'_> {
    fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.0.get(key).filter(|value| !value.is_null()) else {
            return Ok(None);
        };
        T::deserialize(value).map(Some).map_err(|cause| {
            anyhow!("the scheduler's `{key}` is {value}, which is not supported ({cause})")
        })
    }

    fn or<T: DeserializeOwned>(&self, key: &str, default: T) -> Result<T> {
        Ok(self.get(key)?.unwrap_or(default))
    }

    /// Refuses a flag that changes the result in a way no sampler here knows.
    fn refuse(&self, key: &str) -> Result<()> {
        match self.0.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => Ok(()),
            Some(value) => bail!("the scheduler's `{key}` is {value}, which is not supported"),
        }
    }
}

impl SchedulerConfig {
    /// Reads a parsed `scheduler_config.json`. Errors if the class is unknown or a value is not
    /// supported, naming key and value.
    pub fn from_json(value: &Value) -> Result<Self> {
        let map = value
            .as_object()
            .context("the scheduler's config is not a JSON object")?;
        let keys = Keys(map);
        let refused = [
            "thresholding",
            "use_flow_sigmas",
            "use_dynamic_shifting",
            "solver_p",
        ];
        refused.iter().try_for_each(|key| keys.refuse(key))?;
        let mut solver = SolverConfig::read(&keys)?;
        let sampler = read_class(&keys, &solver)?;
        solver.solver_type = solver.solver_type.map(|chosen| sampler.solver_type(chosen));
        let train_timesteps = keys.or("num_train_timesteps", 1000)?;
        ensure!(
            (2..=1_000_000).contains(&train_timesteps),
            "the scheduler's `num_train_timesteps` is {train_timesteps}, which is not supported"
        );
        let config = Self {
            prediction: keys.or("prediction_type", Prediction::Epsilon)?,
            sampler,
            train_timesteps,
            beta_start: keys.get("beta_start")?,
            beta_end: keys.get("beta_end")?,
            beta_schedule: keys.get("beta_schedule")?,
            trained_betas: keys.get("trained_betas")?,
            rescale_betas_zero_snr: keys.or("rescale_betas_zero_snr", false)?,
            spacing: keys.get("timestep_spacing")?,
            steps_offset: keys.get("steps_offset")?,
            set_alpha_to_one: keys.get("set_alpha_to_one")?,
            clip_sample: keys.get("clip_sample")?,
            clip_sample_range: keys.or("clip_sample_range", 1.0)?,
            law: read_law(&keys)?,
            sigma_min: keys.get("sigma_min")?,
            sigma_max: keys.get("sigma_max")?,
            final_sigma: keys.or("final_sigmas_type", FinalSigma::Zero)?,
            interpolation: keys.or("interpolation_type", Interpolation::Linear)?,
            timestep_type: keys.or("timestep_type", TimestepType::Discrete)?,
            lambda_min_clipped: keys.or("lambda_min_clipped", f64::NEG_INFINITY)?,
            solver,
            variance: keys.or("variance_type", Variance::Small)?,
            skip_prk_steps: keys.or("skip_prk_steps", false)?,
            original_inference_steps: keys.or("original_inference_steps", 50)?,
            timestep_scaling: keys.or("timestep_scaling", 10.0)?,
            pipeline: false,
        };
        config.check()
    }

    /// Applies what diffusers' Stable Diffusion pipelines change in an outdated config of their
    /// own scheduler: `steps_offset` becomes 1 and `clip_sample` false. As there, a key that the
    /// file lacks keeps the default of another class when another sampler is chosen.
    pub fn for_pipeline(mut self) -> Self {
        self.pipeline = true;
        self.steps_offset = self.steps_offset.map(|_| 1);
        self.clip_sample = self.clip_sample.map(|_| false);
        self
    }

    /// The sampler of the checkpoint's scheduler class.
    pub fn sampler(&self) -> Sampler {
        self.sampler
    }

    fn check(self) -> Result<Self> {
        let betas = self
            .trained_betas
            .as_ref()
            .map_or(self.train_timesteps, Vec::len);
        ensure!(
            betas == self.train_timesteps,
            "the scheduler's `trained_betas` has {betas} values for {} timesteps",
            self.train_timesteps
        );
        let order = self.solver.order.unwrap_or(2);
        ensure!(
            (1..=3).contains(&order),
            "the scheduler's `solver_order` is {order}, which is not supported"
        );
        Ok(self)
    }
}

impl SolverConfig {
    fn read(keys: &Keys) -> Result<Self> {
        Ok(Self {
            order: keys.get("solver_order")?,
            algorithm: keys.or("algorithm_type", Algorithm::PlusPlus)?,
            solver_type: keys.get("solver_type")?,
            lower_order_final: keys.or("lower_order_final", true)?,
            euler_at_final: keys.or("euler_at_final", false)?,
            predict_x0: keys.or("predict_x0", true)?,
            disable_corrector: keys.or("disable_corrector", Vec::new())?,
        })
    }
}

fn read_class(keys: &Keys, solver: &SolverConfig) -> Result<Sampler> {
    let class: String = keys
        .get("_class_name")?
        .context("the scheduler's config has no `_class_name`")?;
    if class == "DPMSolverMultistepScheduler" {
        return Ok(match (solver.algorithm.is_sde(), solver.order) {
            (false, _) => Sampler::Dpmpp2m,
            (true, Some(3)) => Sampler::Dpmpp3mSde,
            (true, _) => Sampler::Dpmpp2mSde,
        });
    }
    Sampler::ALL
        .into_iter()
        .find(|sampler| sampler.class() == Some(&class))
        .with_context(|| {
            format!("the scheduler's `_class_name` is \"{class}\", which is not supported")
        })
}

fn read_law(keys: &Keys) -> Result<Option<SigmaSchedule>> {
    let flags = [
        ("use_karras_sigmas", SigmaSchedule::Karras),
        ("use_lu_lambdas", SigmaSchedule::Lu),
        ("use_exponential_sigmas", SigmaSchedule::Exponential),
        ("use_beta_sigmas", SigmaSchedule::Beta),
    ];
    let mut law = None;
    for (key, value) in flags {
        if keys.or(key, false)? {
            ensure!(
                law.is_none(),
                "the scheduler's `{key}` contradicts another of its sigma laws"
            );
            law = Some(value);
        }
    }
    Ok(law)
}

/// A schedule that a person can choose instead of the checkpoint's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "&str", try_from = "String")]
pub enum Schedule {
    /// Karras et al. 2022, eq. 5, rho = 7.
    Karras,
    /// Log-linear in sigma.
    Exponential,
    /// Quantiles of a beta distribution, Lee et al. 2024 (arXiv 2407.12173).
    Beta,
    /// Spaced from the last timestep of training down; also called sgm-uniform.
    Trailing,
    /// Spaced from the first timestep up.
    Leading,
    /// Spaced over all timesteps, both ends included.
    Linspace,
    /// Align Your Steps, Sabour et al. 2024 (arXiv 2404.14507), for SD1.5.
    Ays,
    /// Align Your Steps for SDXL.
    AysSdxl,
}

impl Schedule {
    /// Every schedule, in the order of the help text.
    pub const ALL: [Self; 8] = [
        Self::Karras,
        Self::Exponential,
        Self::Beta,
        Self::Trailing,
        Self::Leading,
        Self::Linspace,
        Self::Ays,
        Self::AysSdxl,
    ];

    fn names(self) -> &'static [&'static str] {
        match self {
            Self::Karras => &["karras"],
            Self::Exponential => &["exponential"],
            Self::Beta => &["beta"],
            Self::Trailing => &["trailing", "sgm-uniform", "sgm_uniform"],
            Self::Leading => &["leading"],
            Self::Linspace => &["linspace"],
            Self::Ays => &["ays", "align-your-steps", "align_your_steps"],
            Self::AysSdxl => &["ays-sdxl", "ays_sdxl"],
        }
    }

    fn law(self) -> Option<SigmaSchedule> {
        match self {
            Self::Karras => Some(SigmaSchedule::Karras),
            Self::Exponential => Some(SigmaSchedule::Exponential),
            Self::Beta => Some(SigmaSchedule::Beta),
            Self::Ays => Some(SigmaSchedule::Table(&AYS_SD)),
            Self::AysSdxl => Some(SigmaSchedule::Table(&AYS_SDXL)),
            Self::Trailing | Self::Leading | Self::Linspace => None,
        }
    }

    fn spacing(self) -> Option<TimestepSpacing> {
        match self {
            Self::Trailing => Some(TimestepSpacing::Trailing),
            Self::Leading => Some(TimestepSpacing::Leading),
            Self::Linspace => Some(TimestepSpacing::Linspace),
            _ => None,
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.names()[0])
    }
}

impl From<Schedule> for &str {
    fn from(schedule: Schedule) -> Self {
        schedule.names()[0]
    }
}

impl TryFrom<String> for Schedule {
    type Error = anyhow::Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl FromStr for Schedule {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let lower = text.trim().to_lowercase().replace(' ', "-");
        let found = Self::ALL
            .into_iter()
            .find(|schedule| schedule.names().contains(&lower.as_str()));
        found.with_context(|| {
            let close = nearest(&lower, Self::ALL.iter().map(|schedule| schedule.names()[0]));
            format!("unknown schedule `{text}`\n\nhint: did you mean {close}?")
        })
    }
}

/// How a sampler's class in diffusers places its timesteps.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Grid {
    /// n whole timesteps; noise levels exactly those of training.
    Discrete,
    /// n timesteps that may be fractions; noise levels interpolated.
    Fractional,
    /// The first n of n + 1 whole timesteps.
    Multistep,
    /// A subset of the steps of distillation.
    Distilled,
}

impl Sampler {
    fn grid(self) -> Grid {
        match self {
            Self::Ddim | Self::Ddpm | Self::Pndm => Grid::Discrete,
            Self::Lcm | Self::Tcd => Grid::Distilled,
            Self::Dpmpp2m | Self::Dpmpp2mSde | Self::Dpmpp3mSde | Self::UniPc | Self::Deis => {
                Grid::Multistep
            }
            _ => Grid::Fractional,
        }
    }

    /// The correction that the class of a solver puts in place of one that it has not.
    fn solver_type(self, chosen: SolverType) -> SolverType {
        match (self, chosen) {
            (Self::UniPc, SolverType::Bh1) => SolverType::Bh1,
            (Self::UniPc, _) => SolverType::Bh2,
            (Self::Deis, _) => SolverType::Logrho,
            (_, SolverType::Heun) if self.is_dpm_multistep() => SolverType::Heun,
            _ if self.is_dpm_multistep() => SolverType::Midpoint,
            _ => chosen,
        }
    }

    fn is_dpm_multistep(self) -> bool {
        matches!(self, Self::Dpmpp2m | Self::Dpmpp2mSde | Self::Dpmpp3mSde)
    }
}

/// The settings of one sampler's class: the file's where the class knows the key, else the class's.
struct Settings<'a> {
    config: &'a SchedulerConfig,
    sampler: Sampler,
    spacing: TimestepSpacing,
    law: Option<SigmaSchedule>,
    steps_offset: usize,
    final_sigma: FinalSigma,
    /// Whether this is the checkpoint's own scheduler as it is, corrected by the pipeline.
    corrected: bool,
}

impl<'a> Settings<'a> {
    fn resolve(
        config: &'a SchedulerConfig,
        sampler: Sampler,
        schedule: Option<Schedule>,
    ) -> Result<Self> {
        let grid = sampler.grid();
        // anything else is a new scheduler, made with `from_config`
        let own = sampler == config.sampler && schedule.is_none();
        let default_spacing = match grid {
            Grid::Discrete | Grid::Distilled => TimestepSpacing::Leading,
            Grid::Fractional | Grid::Multistep => TimestepSpacing::Linspace,
        };
        let fixed_steps = matches!(sampler, Sampler::Pndm | Sampler::Lcm | Sampler::Tcd);
        if let Some(chosen) = schedule
            .filter(|chosen| (fixed_steps && chosen.law().is_some()) || grid == Grid::Distilled)
        {
            bail!(
                "`{sampler}` has steps of its own and cannot follow the schedule `{chosen}`\n\n\
                 hint: leave `--schedule` out, or choose another sampler, such as `dpmpp-2m`"
            );
        }
        let knows_laws =
            matches!(grid, Grid::Fractional | Grid::Multistep) && sampler != Sampler::EulerA;
        let law = match schedule {
            Some(chosen) => chosen.law(),
            None => config.law.filter(|law| {
                knows_laws && (*law != SigmaSchedule::Lu || sampler.is_dpm_multistep())
            }),
        };
        let knows_final =
            sampler.is_dpm_multistep() || matches!(sampler, Sampler::Euler | Sampler::UniPc);
        Ok(Self {
            config,
            sampler,
            spacing: schedule
                .and_then(Schedule::spacing)
                .or(config.spacing)
                .unwrap_or(default_spacing),
            law,
            steps_offset: config
                .steps_offset
                .unwrap_or((config.pipeline && own).into()),
            corrected: config.pipeline && own,
            final_sigma: if knows_final {
                config.final_sigma
            } else {
                FinalSigma::Zero
            },
        })
    }

    fn noise_levels(&self) -> DiscreteLevels {
        let knows_zero_snr = match self.sampler.grid() {
            Grid::Discrete => self.sampler != Sampler::Pndm,
            Grid::Distilled => true,
            Grid::Fractional => matches!(
                self.sampler,
                Sampler::Euler | Sampler::EulerA | Sampler::Dpmpp2sA
            ),
            Grid::Multistep => self.sampler != Sampler::Deis,
        };
        let betas = self.betas();
        if !(knows_zero_snr && self.config.rescale_betas_zero_snr) {
            return DiscreteLevels::from_betas(&betas);
        }
        let last = match self.sampler.grid() {
            // diffusers' stand-in for an infinite sigma
            Grid::Fractional | Grid::Multistep => 2_f32.powi(-24),
            // there diffusers divides by it only where the network predicts noise, which has
            // no answer; this is near enough to infinity and leaves x finite in f32
            Grid::Discrete | Grid::Distilled => 1e-16,
        };
        DiscreteLevels::with_zero_terminal_snr(betas, last)
    }

    fn betas(&self) -> Vec<f32> {
        let config = self.config;
        if let Some(betas) = &config.trained_betas {
            return betas.clone();
        }
        let stable = matches!(
            self.sampler,
            Sampler::Heun
                | Sampler::Dpm2
                | Sampler::Dpm2A
                | Sampler::DpmppSde
                | Sampler::Lcm
                | Sampler::Tcd
        );
        let (default_start, default_end) = if stable {
            (0.00085, 0.012)
        } else {
            (0.0001, 0.02)
        };
        let distilled = self.sampler.grid() == Grid::Distilled;
        let default = if distilled {
            BetaSchedule::ScaledLinear
        } else {
            BetaSchedule::Linear
        };
        config.beta_schedule.unwrap_or(default).betas(
            config.beta_start.unwrap_or(default_start),
            config.beta_end.unwrap_or(default_end),
            config.train_timesteps,
        )
    }

    /// The timesteps of `n` steps, descending. Errors if there are too few to choose from.
    fn spaced(&self, n: usize, levels: &DiscreteLevels) -> Result<Vec<f64>> {
        let train = self.config.train_timesteps;
        let last = train - self.clipped(levels).min(train - 1);
        // a multistep grid has one more point, and drops the last
        let points = n + usize::from(self.sampler.grid() == Grid::Multistep);
        let whole = self.sampler.grid() != Grid::Fractional;
        let round = |t: f64| if whole { t.round_ties_even() } else { t };
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

    /// How many of the noisiest timesteps are left out: those whose lambda = -log(sigma) is low.
    fn clipped(&self, levels: &DiscreteLevels) -> usize {
        if self.sampler.is_dpm_multistep() {
            levels.timesteps_below(self.config.lambda_min_clipped)
        } else {
            0
        }
    }

    /// Sigmas and timesteps of a law; `spaced` are the sigmas at the spaced timesteps.
    fn follow(
        &self,
        law: SigmaSchedule,
        n: usize,
        spaced: &[f64],
        levels: &DiscreteLevels,
    ) -> (Vec<f64>, Vec<f64>) {
        let multistep = self.sampler.grid() == Grid::Multistep;
        let (first, last) = match multistep {
            true => (Some(levels.sigma_max()), Some(levels.sigma_min())),
            false => (spaced.first().copied(), spaced.last().copied()),
        };
        // two classes of diffusers do not look at these settings here
        let limits = law != SigmaSchedule::Lu
            && !(law == SigmaSchedule::Karras
                && matches!(self.sampler, Sampler::Lms | Sampler::DpmppSde));
        let high = self
            .config
            .sigma_max
            .filter(|_| limits)
            .or(first)
            .unwrap_or(1.0);
        let low = self
            .config
            .sigma_min
            .filter(|_| limits)
            .or(last)
            .unwrap_or(1.0);
        let sigmas = law.sigmas(high, low, n);
        let cosine = self.config.beta_schedule == Some(BetaSchedule::Cosine);
        let rounds = match (self.sampler, law) {
            (Sampler::Dpm2 | Sampler::Dpm2A, SigmaSchedule::Karras) => true,
            (sampler, SigmaSchedule::Karras | SigmaSchedule::Lu) if sampler.is_dpm_multistep() => {
                !cosine
            }
            (_, SigmaSchedule::Karras | SigmaSchedule::Table(_)) => {
                self.sampler.grid() != Grid::Fractional
            }
            _ => self.sampler.grid() == Grid::Discrete,
        };
        let timesteps = sigmas.iter().map(|sigma| {
            let t = levels.timestep(*sigma);
            match (rounds, multistep) {
                (true, _) => t.round_ties_even(),
                (false, true) => t.trunc(), // diffusers stores whole numbers
                (false, false) => t,
            }
        });
        let timesteps = timesteps.collect();
        (sigmas, timesteps)
    }

    /// The sigma after the last step.
    fn last_sigma(&self, sigmas: &[f64], levels: &DiscreteLevels) -> f64 {
        let lowest = levels.sigma_min();
        let repeated = sigmas.last().copied().unwrap_or(lowest);
        match (self.sampler, self.final_sigma) {
            (Sampler::Deis, _) if self.law.is_some() => repeated,
            (Sampler::Deis, _) => lowest,
            (Sampler::UniPc, FinalSigma::SigmaMin) if self.law.is_some() => repeated,
            (_, FinalSigma::SigmaMin) => lowest,
            (_, FinalSigma::Zero) => 0.0,
        }
    }

    /// Distillation steps, Luo et al. 2023 (arXiv 2310.04378).
    fn distilled(&self, n: usize, strength: f64) -> Result<Vec<f64>> {
        let original = self.config.original_inference_steps;
        ensure!(
            (1..=self.config.train_timesteps).contains(&original),
            "the scheduler's `original_inference_steps` is {original}, which is not supported"
        );
        ensure!(
            n <= original,
            "`{}` was distilled for at most {original} steps, not {n}\n\nhint: use `--steps 4`",
            self.sampler
        );
        let ratio = self.config.train_timesteps / original;
        let original = (original as f64 * strength) as usize;
        ensure!(
            n <= original,
            "`--strength {strength}` leaves less than {n} steps\n\nhint: use more, or fewer `--steps`"
        );
        let stride = original as f64 / n as f64;
        let pick = |i: usize| original - (i as f64 * stride).floor() as usize;
        Ok((0..n).map(|i| (pick(i) * ratio - 1) as f64).collect())
    }
}

/// What a multistep solver needs besides the sigmas.
#[derive(Clone, Debug)]
pub(crate) struct Solver {
    pub(crate) order: usize,
    pub(crate) algorithm: Algorithm,
    pub(crate) solver_type: SolverType,
    pub(crate) lower_order_final: bool,
    pub(crate) euler_at_final: bool,
    pub(crate) predict_x0: bool,
    pub(crate) disable_corrector: Vec<usize>,
}

/// One run: which algorithm, at which noise levels.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The algorithm.
    pub sampler: Sampler,
    /// What the network is told at each of the n levels; may repeat a value (PNDM).
    pub timesteps: Vec<f64>,
    /// The n noise levels and, last, where the run ends.
    pub sigmas: Vec<f64>,
    /// Timesteps of the evaluations in the middle of a step, where the sampler has them.
    pub(crate) middle_timesteps: Vec<f64>,
    /// Noise levels of those evaluations.
    pub(crate) middle_sigmas: Vec<f64>,
    /// From which level to which each evaluation moves x, where diffusers computes that from the
    /// timestep alone and so may miss the next level.
    pub(crate) transfers: Vec<(f64, f64)>,
    pub(crate) prediction: Prediction,
    pub(crate) eta: f64,
    pub(crate) clip: Option<f64>,
    pub(crate) solver: Solver,
    pub(crate) large_variance: bool,
    /// Evaluations of PNDM's Runge-Kutta start.
    pub(crate) prk_evaluations: usize,
    pub(crate) timestep_scaling: f64,
    /// Steps of the whole run that others take before and after this part of it.
    pub(crate) before: usize,
    pub(crate) after: usize,
    train_timesteps: usize,
    init_noise_sigma: f64,
}

impl Plan {
    /// The factor of the unit noise that a run starts from.
    pub fn init_noise_sigma(&self) -> f64 {
        self.init_noise_sigma
    }

    /// The noise level where the run begins.
    pub fn first_sigma(&self) -> f64 {
        self.sigmas.first().copied().unwrap_or(0.0)
    }

    /// What x = x0 + sigma * noise is divided by to give diffusers' latents of this sampler.
    pub fn latents_scale(&self, sigma: f64) -> f64 {
        if self.is_variance_preserving() {
            sigma.hypot(1.0)
        } else {
            1.0
        }
    }

    /// Steps of the whole run before this part of it.
    pub fn before(&self) -> usize {
        self.before
    }

    /// In which step of the whole run, from 0, an evaluation is.
    pub fn step_of(&self, evaluation: usize) -> usize {
        self.before
            + if self.sampler.is_two_stage() {
                evaluation / 2
            } else {
                evaluation
            }
    }

    /// How often the network runs.
    pub fn evaluations(&self) -> usize {
        let (steps, ends) = (self.own_steps(), self.sigmas.last() == Some(&0.0));
        match self.sampler.is_two_stage() {
            true => 2 * steps - usize::from(ends),
            false => steps,
        }
    }

    fn own_steps(&self) -> usize {
        self.sigmas.len().saturating_sub(1)
    }

    /// Steps of the whole run, of which this may be a part.
    pub(crate) fn steps(&self) -> usize {
        self.before + self.own_steps() + self.after
    }

    /// Cuts a run in two at a share of the way from noise to picture, by timesteps, as diffusers'
    /// `denoising_end` and `denoising_start` do. A second part has no history of the first. Errors
    /// if one of them would have no step.
    pub fn split(&self, at: f64) -> Result<[Self; 2]> {
        ensure!(
            self.sampler != Sampler::Pndm,
            "`pndm` cannot be handed over to a refiner\n\nhint: use another sampler, such as `euler`"
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
            .truncate(k + usize::from(self.sampler.is_two_stage()));
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

    /// Whether diffusers' latents for this sampler are variance-preserving:
    /// x / sqrt(1 + sigma^2).
    pub(crate) fn is_variance_preserving(&self) -> bool {
        self.sampler.grid() != Grid::Fractional
    }
}

/// Lays out a run of `steps` steps.
///
/// `schedule` replaces the checkpoint's schedule. `eta` is the share of fresh noise of the
/// samplers that have one: 0 (no noise) by default for `ddim` and `tcd`, as in diffusers'
/// pipelines, 1 for the ancestral ones. Errors if the sampler cannot do what is asked.
pub fn plan(
    config: &SchedulerConfig,
    sampler: Sampler,
    schedule: Option<Schedule>,
    steps: usize,
    eta: Option<f64>,
) -> Result<Plan> {
    plan_late(config, sampler, schedule, steps, eta, (0, 1.0))
}

/// The same without its first steps, for a run that begins with a picture to which the noise of
/// that level is added: those that a strength (0..=1) leaves out, as in diffusers. `in_all_steps`,
/// as in its pipeline of latent consistency models: `lcm` takes as many steps over what the
/// strength leaves. Errors too if it leaves out all of them.
pub fn plan_from_picture(
    config: &SchedulerConfig,
    sampler: Sampler,
    schedule: Option<Schedule>,
    steps: usize,
    eta: Option<f64>,
    strength: f64,
    in_all_steps: bool,
) -> Result<Plan> {
    let taken = (steps as f64 * strength) as usize;
    let least = (1.0 / steps as f64 * 1000.0).ceil() / 1000.0;
    ensure!(
        taken > 0,
        "`--strength {strength}` leaves none of {steps} steps\n\nhint: use at least {least}, or more `--steps`"
    );
    let late = if in_all_steps && sampler == Sampler::Lcm {
        (0, strength)
    } else {
        (steps.saturating_sub(taken), 1.0)
    };
    plan_late(config, sampler, schedule, steps, eta, late)
}

fn plan_late(
    config: &SchedulerConfig,
    sampler: Sampler,
    schedule: Option<Schedule>,
    steps: usize,
    eta: Option<f64>,
    (skipped, share): (usize, f64),
) -> Result<Plan> {
    let train = config.train_timesteps;
    ensure!(
        (1..=train).contains(&steps),
        "{steps} steps are not possible\n\nhint: use 1 to {train}"
    );
    let settings = Settings::resolve(config, sampler, schedule)?;
    let levels = settings.noise_levels();
    let mut plan = Plan {
        sampler,
        timesteps: Vec::new(),
        sigmas: Vec::new(),
        middle_timesteps: Vec::new(),
        middle_sigmas: Vec::new(),
        transfers: Vec::new(),
        prediction: config.prediction,
        eta: resolve_eta(sampler, eta)?,
        clip: settings.clip(),
        solver: settings.solver()?,
        large_variance: config.variance == Variance::Large,
        prk_evaluations: 0,
        timestep_scaling: config.timestep_scaling,
        before: 0,
        after: 0,
        train_timesteps: train,
        init_noise_sigma: 1.0,
    };
    match sampler.grid() {
        Grid::Distilled => plan.lay_distilled(&settings, &levels, steps, share)?,
        Grid::Discrete if sampler == Sampler::Pndm => {
            plan.lay_pndm(&settings, &levels, steps, skipped)?
        }
        Grid::Discrete if settings.law.is_none() => plan.lay_discrete(&settings, &levels, steps)?,
        _ => plan.lay_interpolated(&settings, &levels, steps)?,
    }
    let sigmas = &plan.sigmas[..plan.timesteps.len()];
    let falling = sigmas.windows(2).all(|pair| pair[0] > pair[1])
        && sigmas.iter().all(|sigma| sigma.is_finite() && *sigma > 0.0);
    ensure!(
        falling || sampler == Sampler::Pndm,
        "{steps} steps of `{sampler}` do not give falling noise levels here\n\nhint: use fewer steps, or another `--schedule`"
    );
    plan.lay_middles(&levels);
    if sampler != Sampler::Pndm {
        plan.drop_first(skipped);
    }
    let top = plan.first_sigma();
    let added = plan.is_variance_preserving() || settings.spacing == TimestepSpacing::Leading;
    plan.init_noise_sigma = if added { top.hypot(1.0) } else { top };
    Ok(plan)
}

fn resolve_eta(sampler: Sampler, eta: Option<f64>) -> Result<f64> {
    let default = match sampler {
        Sampler::Ddim | Sampler::Tcd => 0.0,
        Sampler::EulerA | Sampler::Dpm2A | Sampler::Dpmpp2sA => 1.0,
        _ if eta.is_some() => bail!(
            "`{sampler}` takes no `--eta`\n\nhint: `ddim`, `tcd`, `euler-a`, `dpm2-a` and `dpmpp-2s-a` do"
        ),
        _ => 0.0,
    };
    let eta = eta.unwrap_or(default);
    ensure!(
        (0.0..=1.0).contains(&eta),
        "`--eta` is {eta}\n\nhint: use a value from 0 to 1"
    );
    Ok(eta)
}

impl Settings<'_> {
    fn clip(&self) -> Option<f64> {
        let config = self.config;
        let default = match self.sampler {
            Sampler::Ddim | Sampler::Ddpm => !self.corrected,
            Sampler::Heun | Sampler::Lcm => false,
            _ => return None,
        };
        config
            .clip_sample
            .unwrap_or(default)
            .then_some(config.clip_sample_range)
    }

    /// A sampler named after an order and an algorithm has them, unless it is the checkpoint's.
    fn solver(&self) -> Result<Solver> {
        let (file, own) = (&self.config.solver, self.sampler == self.config.sampler);
        let (order, algorithm) = match self.sampler {
            Sampler::Dpmpp2m if !own => (2, Algorithm::PlusPlus),
            Sampler::Dpmpp2mSde if !own => (2, Algorithm::SdePlusPlus),
            Sampler::Dpmpp3mSde if !own => (3, Algorithm::SdePlusPlus),
            _ => (file.order.unwrap_or(2), file.algorithm),
        };
        if self.sampler.is_dpm_multistep() {
            self.check_algorithm(algorithm, order)?;
        }
        let solver_type = self
            .sampler
            .solver_type(file.solver_type.unwrap_or(SolverType::Midpoint));
        Ok(Solver {
            order,
            algorithm,
            solver_type,
            lower_order_final: file.lower_order_final,
            euler_at_final: file.euler_at_final || self.final_sigma == FinalSigma::Zero,
            predict_x0: file.predict_x0,
            disable_corrector: file.disable_corrector.clone(),
        })
    }

    /// The solvers that integrate the noise cannot step to sigma 0.
    fn check_algorithm(&self, algorithm: Algorithm, order: usize) -> Result<()> {
        let name = match algorithm {
            Algorithm::Plain => "dpmsolver",
            Algorithm::Sde => "sde-dpmsolver",
            Algorithm::PlusPlus | Algorithm::SdePlusPlus => return Ok(()),
        };
        ensure!(
            self.final_sigma == FinalSigma::SigmaMin,
            "the scheduler's `algorithm_type` is \"{name}\", which needs `final_sigmas_type` \"sigma_min\""
        );
        let known = algorithm == Algorithm::Plain || order < 3;
        ensure!(
            known,
            "the scheduler's `solver_order` is 3, which `algorithm_type` \"{name}\" has not"
        );
        Ok(())
    }
}

impl Plan {
    /// Noise levels at timesteps, or those of a law with the timesteps that fit them.
    fn lay_interpolated(
        &mut self,
        settings: &Settings,
        levels: &DiscreteLevels,
        n: usize,
    ) -> Result<()> {
        let config = settings.config;
        let mut timesteps = settings.spaced(n, levels)?;
        timesteps.iter_mut().for_each(|t| *t = f64::from(*t as f32));
        let mut sigmas: Vec<f64> = timesteps
            .iter()
            .map(|t| levels.interpolated_sigma(*t))
            .collect();
        let euler = self.sampler == Sampler::Euler;
        let log_linear = euler && config.interpolation == Interpolation::LogLinear;
        if log_linear {
            sigmas = exponential(levels.sigma_max(), levels.sigma_min(), n + 1);
        }
        if let Some(law) = settings.law {
            (sigmas, timesteps) = settings.follow(law, n, &sigmas, levels);
        }
        if sigmas.len() == timesteps.len() {
            sigmas.push(settings.last_sigma(&sigmas, levels));
        }
        if euler
            && config.timestep_type == TimestepType::Continuous
            && config.prediction == Prediction::V
        {
            timesteps = sigmas
                .iter()
                .take(n)
                .map(|sigma| 0.25 * sigma.ln())
                .collect();
        }
        self.sigmas = sigmas
            .into_iter()
            .map(|sigma| f64::from(sigma as f32))
            .collect();
        self.timesteps = timesteps.into_iter().map(|t| f64::from(t as f32)).collect();
        Ok(())
    }

    /// Whole timesteps, each with its training noise level.
    fn lay_discrete(
        &mut self,
        settings: &Settings,
        levels: &DiscreteLevels,
        n: usize,
    ) -> Result<()> {
        self.timesteps = settings.spaced(n, levels)?;
        self.sigmas = self
            .timesteps
            .iter()
            .map(|t| levels.sigma_at(*t))
            .collect::<Result<_>>()?;
        if self.sampler == Sampler::Ddpm {
            self.sigmas.push(0.0);
            return Ok(());
        }
        let end = settings.final_discrete_sigma(levels);
        let stride = (settings.config.train_timesteps / n) as f64;
        for (t, sigma) in self.timesteps.iter().zip(&self.sigmas) {
            let target = if *t >= stride {
                levels.sigma_at(t - stride)?
            } else {
                end
            };
            self.transfers.push((*sigma, target));
        }
        self.sigmas
            .extend(self.transfers.last().map(|(_, target)| *target));
        Ok(())
    }

    fn lay_distilled(
        &mut self,
        settings: &Settings,
        levels: &DiscreteLevels,
        n: usize,
        share: f64,
    ) -> Result<()> {
        self.timesteps = settings.distilled(n, share)?;
        self.sigmas = self
            .timesteps
            .iter()
            .map(|t| levels.sigma_at(*t))
            .collect::<Result<_>>()?;
        let end = if self.sampler == Sampler::Tcd {
            levels.sigma_at(0.0)?
        } else {
            0.0
        };
        self.sigmas.push(end);
        for (i, sigma) in self.sigmas[..n].iter().enumerate() {
            let next = self.timesteps.get(i + 1).copied().unwrap_or(0.0);
            // TCD's timestep s, in f32 as torch multiplies
            let s = ((1.0 - self.eta) as f32 * next as f32).floor();
            self.transfers
                .push((*sigma, levels.sigma_at(f64::from(s))?));
        }
        Ok(())
    }

    /// PNDM (Liu et al. 2022, arXiv 2202.09778): pseudo Runge-Kutta steps at the start unless they
    /// are skipped, then linear multistep ones. A run that begins later counts its evaluations
    /// anew, as diffusers does: its second goes back to where the first began.
    fn lay_pndm(
        &mut self,
        settings: &Settings,
        levels: &DiscreteLevels,
        n: usize,
        skipped: usize,
    ) -> Result<()> {
        let config = settings.config;
        ensure!(
            config.prediction != Prediction::Sample,
            "`pndm` does not work with the scheduler's `prediction_type` \"sample\""
        );
        let spaced = settings.spaced(n, levels)?;
        let stride = (config.train_timesteps / n) as f64;
        let end = settings.final_discrete_sigma(levels);
        let level = |t: f64| if t < 0.0 { Ok(end) } else { levels.sigma_at(t) };
        let mut transfers = Vec::new();
        if config.skip_prk_steps {
            self.timesteps = spaced.clone();
            // the second level is evaluated twice
            if let Some(second) = spaced.get(1) {
                self.timesteps.insert(1, *second);
            }
            self.timesteps.drain(..skipped);
            self.before = skipped;
        } else {
            ensure!(
                skipped == 0,
                "`pndm` with Runge-Kutta steps cannot begin with a picture\n\nhint: use another `--sampler`"
            );
            ensure!(n >= 4, "`pndm` needs at least 4 steps here, not {n}");
            let half = (config.train_timesteps / n / 2) as f64;
            for pair in spaced[..4].windows(2) {
                // the same grid as diffusers' repeat and tile: t, two middles, the next t
                let (t, next) = (pair[0], pair[1]);
                self.timesteps.extend([t, next + half, next + half, next]);
                transfers.extend([
                    (t, t - half),
                    (t, next + half),
                    (t, next + half - half),
                    (t, next),
                ]);
            }
            self.prk_evaluations = self.timesteps.len();
            self.timesteps.extend(&spaced[3..]);
        }
        for (i, t) in self.timesteps.iter().enumerate().skip(self.prk_evaluations) {
            transfers.push(if i == 1 {
                (t + stride, *t)
            } else {
                (*t, t - stride)
            });
        }
        for (from, to) in transfers {
            self.transfers.push((level(from)?, level(to)?));
        }
        self.sigmas = self
            .timesteps
            .iter()
            .map(|t| levels.sigma_at(*t))
            .collect::<Result<_>>()?;
        self.sigmas
            .extend(self.transfers.last().map(|(_, target)| *target));
        Ok(())
    }

    /// The middles of the steps, geometric in sigma, for the samplers that evaluate there.
    fn lay_middles(&mut self, levels: &DiscreteLevels) {
        let ancestral = match self.sampler {
            Sampler::Dpm2A | Sampler::Dpmpp2sA => true,
            Sampler::Dpm2 | Sampler::DpmppSde => false,
            _ => return,
        };
        for pair in self.sigmas.windows(2).filter(|pair| pair[1] > 0.0) {
            let (sigma, next) = (pair[0], pair[1]);
            let target = if ancestral {
                ancestral_step(sigma, next, self.eta).0
            } else {
                next
            };
            let middle = (sigma * target).sqrt();
            self.middle_sigmas.push(middle);
            self.middle_timesteps.push(levels.timestep(middle));
        }
    }
}

impl Settings<'_> {
    /// The noise level "before" timestep 0.
    fn final_discrete_sigma(&self, levels: &DiscreteLevels) -> f64 {
        let zero = self
            .config
            .set_alpha_to_one
            .unwrap_or(self.sampler != Sampler::Pndm);
        if zero { 0.0 } else { levels.sigma_min() }
    }
}

/// Splits a step from sigma to next into a deterministic part, down to the first result, and
/// noise of the second, so that their squares sum to next squared (k-diffusion).
pub(crate) fn ancestral_step(sigma: f64, next: f64, eta: f64) -> (f64, f64) {
    let fresh = next * next * (sigma * sigma - next * next) / (sigma * sigma);
    let up = next.min(eta * fresh.max(0.0).sqrt());
    let down = (next * next - up * up).max(0.0).sqrt();
    (down, up)
}
