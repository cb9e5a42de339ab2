//! diffusers' `scheduler_config.json`, and what it means for another class of schedulers.
//!
//! [`SchedulerConfig::from_json`] reads the file; [`SchedulerConfig::for_sampler`] then gives what
//! diffusers' `OtherScheduler.from_config(checkpoint.config)` gives: settings in the file stay when
//! another sampler is chosen, settings that it lacks take the defaults of that sampler's class.
//! The module hides diffusers' keys and which class reads them.
//!
//! Read next: `plan`, which lays out a run by these settings.

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::sampling::flow::{FlowConfig, Mu, TimeShift};
use crate::sampling::kinds::{ClassTraits, FinalLevel, Sampler, Schedule};
use crate::sampling::noise_levels::{BetaSchedule, DiscreteLevels};
use crate::sampling::prediction::Prediction;
use crate::sampling::sigmas::SigmaSchedule;

/// How the timesteps of a run are spread over those of training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum TimestepSpacing {
    Leading,
    Linspace,
    Trailing,
}

/// The sigma after the last step, `final_sigmas_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FinalSigma {
    Zero,
    SigmaMin,
}

/// The family of exponential integrators of DPM-Solver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(super) enum Algorithm {
    /// Integrates the predicted clean latents (DPM-Solver++).
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
pub(super) enum SolverType {
    Midpoint,
    Heun,
    Bh1,
    Bh2,
    Logrho,
}

/// How sigmas are interpolated between timesteps, `interpolation_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Interpolation {
    Linear,
    LogLinear,
}

/// What the network is told of a sigma, `timestep_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum TimestepType {
    Discrete,
    Continuous,
}

/// The variance of DDPM's noise, `variance_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum Variance {
    /// That of the posterior; its logarithm is the same here.
    #[serde(rename = "fixed_small", alias = "fixed_small_log")]
    Small,
    #[serde(rename = "fixed_large")]
    Large,
}

/// The keys of `scheduler_config.json` that change a result. `None` stands for a key that the file
/// lacks, where diffusers' classes differ in their default.
#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    /// What the network predicts.
    pub prediction: Prediction,
    /// That of the file's class; none where no sampler here equals it.
    sampler: Option<Sampler>,
    class: String,
    pub(super) train_timesteps: usize,
    beta_start: Option<f64>,
    beta_end: Option<f64>,
    beta_schedule: Option<BetaSchedule>,
    trained_betas: Option<Vec<f32>>,
    rescale_betas_zero_snr: bool,
    spacing: Option<TimestepSpacing>,
    steps_offset: Option<usize>,
    pub(super) set_alpha_to_one: Option<bool>,
    clip_sample: Option<bool>,
    clip_sample_range: f64,
    sigma_schedule: Option<SigmaSchedule>,
    pub(super) sigma_min: Option<f64>,
    pub(super) sigma_max: Option<f64>,
    final_sigma: FinalSigma,
    interpolation: Interpolation,
    timestep_type: TimestepType,
    pub(super) lambda_min_clipped: f64,
    solver: SolverConfig,
    variance: Variance,
    skip_prk_steps: Option<bool>,
    pub(super) original_inference_steps: usize,
    pub(super) timestep_scaling: f64,
    /// Read as diffusers' Stable Diffusion pipelines read it, see [`Self::for_pipeline`].
    pipeline: bool,
    /// Of a model of flow matching, to which most of the others mean nothing.
    pub(super) flow: Option<FlowConfig>,
}

/// The keys of the multistep solvers.
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

    /// Refuses a flag that changes the result in a way that no sampler here supports.
    fn refuse(&self, key: &str) -> Result<()> {
        match self.0.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => Ok(()),
            Some(value) => bail!("the scheduler's `{key}` is {value}, which is not supported"),
        }
    }
}

impl SchedulerConfig {
    /// Reads a parsed `scheduler_config.json`. Errors if the class is for models of another kind or
    /// a value is not supported, naming key and value.
    pub fn from_json(value: &Value) -> Result<Self> {
        let map = value
            .as_object()
            .context("the scheduler's config is not a JSON object")?;
        let keys = Keys(map);
        let flow = flow_sampler(&keys.or("_class_name", String::new())?)
            .map(|_| FlowConfig::read(&keys))
            .transpose()?;
        let refused = ["thresholding", "use_flow_sigmas", "solver_p"];
        refused.iter().try_for_each(|key| keys.refuse(key))?;
        if flow.is_none() {
            keys.refuse("use_dynamic_shifting")?;
        }
        let mut solver = SolverConfig::read(&keys)?;
        let class: String = keys
            .get("_class_name")?
            .context("the scheduler's config has no `_class_name`")?;
        let sampler = read_class(&class, &solver)?;
        if let Some(sampler) = sampler {
            let traits = &sampler.spec().traits;
            solver.solver_type = solver.solver_type.map(|chosen| traits.solver_type(chosen));
        }
        let train_timesteps = keys.or("num_train_timesteps", 1000)?;
        ensure!(
            (2..=1_000_000).contains(&train_timesteps),
            "the scheduler's `num_train_timesteps` is {train_timesteps}, which is not supported"
        );
        let config = Self {
            prediction: match flow {
                Some(_) => Prediction::Flow,
                None => keys.or("prediction_type", Prediction::Epsilon)?,
            },
            sampler,
            class,
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
            sigma_schedule: read_sigma_schedule(&keys)?,
            sigma_min: keys.get("sigma_min")?,
            sigma_max: keys.get("sigma_max")?,
            final_sigma: keys.or("final_sigmas_type", FinalSigma::Zero)?,
            interpolation: keys.or("interpolation_type", Interpolation::Linear)?,
            timestep_type: keys.or("timestep_type", TimestepType::Discrete)?,
            lambda_min_clipped: keys.or("lambda_min_clipped", f64::NEG_INFINITY)?,
            solver,
            variance: keys.or("variance_type", Variance::Small)?,
            skip_prk_steps: keys.get("skip_prk_steps")?,
            original_inference_steps: keys.or("original_inference_steps", 50)?,
            timestep_scaling: keys.or("timestep_scaling", 10.0)?,
            pipeline: false,
            flow,
        };
        config.check()
    }

    /// Applies what diffusers' Stable Diffusion pipelines change in an outdated config of their
    /// own scheduler: `steps_offset` becomes 1 and `clip_sample` false. Where the file lacks them,
    /// no class clips latents, and PNDM has no Runge-Kutta steps: no model of Stable Diffusion is
    /// drawn so.
    pub fn for_pipeline(mut self) -> Self {
        self.pipeline = true;
        self.steps_offset = self.steps_offset.map(|_| 1);
        self.clip_sample = self.clip_sample.map(|_| false);
        self
    }

    /// The same for a picture of so many tokens, by this rule of the model's family, of which the
    /// levels of flow matching may depend.
    pub fn for_picture(mut self, tokens: usize, rule: Option<Mu>) -> Self {
        if let Some(flow) = &mut self.flow {
            flow.tokens = tokens;
            flow.mu = rule.unwrap_or(flow.mu);
        }
        self
    }

    /// The same for a family whose levels of flow matching end at the lowest of training: Stable
    /// Diffusion 3.
    pub fn ending_at_lowest(mut self) -> Self {
        if let Some(flow) = &mut self.flow {
            flow.ends_at_lowest = true;
        }
        self
    }

    /// Whether it is of a model of flow matching.
    pub fn is_flow(&self) -> bool {
        self.flow.is_some()
    }

    /// The sampler of the checkpoint's scheduler class. Errors if there is none for it.
    pub fn sampler(&self) -> Result<Sampler> {
        self.sampler.with_context(|| {
            format!(
                "the scheduler's `_class_name` is \"{}\", which sdgen has no sampler for\n\n\
                 hint: choose one with `--sampler`, such as `euler` or `dpmpp-2m`",
                self.class
            )
        })
    }

    /// The settings of a sampler's class, with `schedule` in place of the file's. Errors if the
    /// sampler cannot follow that schedule.
    pub(super) fn for_sampler(
        &self,
        sampler: Sampler,
        schedule: Option<Schedule>,
    ) -> Result<SamplerConfig<'_>> {
        let spec = sampler.spec();
        let traits = &spec.traits;
        if let Some(chosen) = schedule.filter(|chosen| !spec.accepts(*chosen)) {
            bail!(
                "`{sampler}` has steps of its own and cannot follow the schedule `{chosen}`\n\n\
                 hint: leave `--schedule` out, or choose another sampler, such as `dpmpp-2m`"
            );
        }
        // anything else is a new scheduler, made with `from_config`
        let corrected = self.pipeline && Some(sampler) == self.sampler && schedule.is_none();
        let in_file = self
            .sigma_schedule
            .filter(|schedule| traits.knows_sigma_schedule(*schedule));
        Ok(SamplerConfig {
            file: self,
            sampler,
            traits,
            spacing: schedule
                .and_then(|chosen| chosen.spec().spacing)
                .or(self.spacing)
                .unwrap_or(traits.grid.default_spacing()),
            sigma_schedule: schedule.map_or(in_file, |chosen| chosen.spec().sigmas),
            steps_offset: self.steps_offset.unwrap_or(corrected.into()),
            final_sigma: match traits.final_level {
                FinalLevel::Zero => FinalSigma::Zero,
                FinalLevel::SigmaMin => FinalSigma::SigmaMin,
                FinalLevel::Configured => self.final_sigma,
            },
        })
    }

    fn check(self) -> Result<Self> {
        ensure!(
            self.is_flow() || self.prediction != Prediction::Flow,
            "the scheduler's `prediction_type` is \"flow\", which is not supported"
        );
        let betas = self
            .trained_betas
            .as_ref()
            .map_or(self.train_timesteps, Vec::len);
        ensure!(
            betas == self.train_timesteps,
            "the scheduler's `trained_betas` has {betas} values for {} timesteps",
            self.train_timesteps
        );
        let offset = self.steps_offset.unwrap_or(0);
        ensure!(
            offset < self.train_timesteps,
            "the scheduler's `steps_offset` is {offset}, beyond its {} timesteps",
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

/// The sampler of a class of flow matching.
fn flow_sampler(class: &str) -> Option<Sampler> {
    match class {
        "FlowMatchEulerDiscreteScheduler" => Some(Sampler::Euler),
        "FlowMatchLCMScheduler" => Some(Sampler::Lcm),
        _ => None,
    }
}

impl FlowConfig {
    fn read(keys: &Keys) -> Result<Self> {
        let refused = ["invert_sigmas", "stochastic_sampling", "scale_factors"];
        refused.iter().try_for_each(|key| keys.refuse(key))?;
        let number = |key: &str, default: f64| keys.or(key, default);
        let is_dynamic = keys.or("use_dynamic_shifting", false)?;
        let kind = keys.or("time_shift_type", TimeShift::Exponential)?;
        let shift = number("shift", 1.0)?;
        ensure!(
            shift > 0.0 && shift < 1e6,
            "the scheduler's `shift` is {shift}, which is not supported"
        );
        Ok(Self {
            shift,
            dynamic: is_dynamic.then_some(kind),
            mu: Mu::Linear([
                (
                    number("base_image_seq_len", 256.0)?,
                    number("base_shift", 0.5)?,
                ),
                (
                    number("max_image_seq_len", 4096.0)?,
                    number("max_shift", 1.15)?,
                ),
            ]),
            shift_terminal: keys
                .get::<f64>("shift_terminal")?
                .filter(|level| *level != 0.0),
            ends_at_lowest: false,
            sigma_schedule: read_sigma_schedule(keys)?,
            tokens: 0,
        })
    }
}

/// Parts of the names of classes that scale latents or noise in another way: models that come with
/// them cannot be drawn by the samplers here.
const OTHER_KINDS: [(&str, &str); 8] = [
    ("EDM", "an EDM model"),
    ("CosineDPM", "an EDM model"),
    ("FlowMatch", "a flow model"),
    ("KarrasVe", "a model of exploding variance"),
    ("ScoreSde", "a score model"),
    ("CMStochastic", "a consistency model of pixels"),
    ("VQDiffusion", "a model of discrete tokens"),
    ("Amused", "a model of discrete tokens"),
];

/// The sampler of the file's class, if there is one: where several share it, that of the file's
/// algorithm and, if there is one, of its order. Errors if the class is for models of another kind.
fn read_class(class: &str, solver: &SolverConfig) -> Result<Option<Sampler>> {
    if let Some(sampler) = flow_sampler(class) {
        return Ok(Some(sampler));
    }
    if let Some((_, kind)) = OTHER_KINDS.iter().find(|(part, _)| class.contains(part)) {
        bail!("the scheduler's `_class_name` is \"{class}\", of {kind}, which sdgen does not draw");
    }
    // the same numbers for other array libraries and for many steps at once
    let class = class.strip_prefix("Flax").unwrap_or(class);
    let class = class.replace("ParallelScheduler", "Scheduler");
    let dpm_solver = |sampler: &Sampler| sampler.spec().traits.dpm_solver;
    let candidates: Vec<Sampler> = Sampler::ALL
        .into_iter()
        .filter(|sampler| sampler.spec().class == Some(class.as_str()))
        .filter(|sampler| {
            dpm_solver(sampler)
                .is_none_or(|(_, algorithm)| algorithm.is_sde() == solver.algorithm.is_sde())
        })
        .collect();
    Ok(candidates
        .iter()
        .find(|sampler| dpm_solver(sampler).is_some_and(|(order, _)| Some(order) == solver.order))
        .or(candidates.first())
        .copied())
}

fn read_sigma_schedule(keys: &Keys) -> Result<Option<SigmaSchedule>> {
    let flags = [
        ("use_karras_sigmas", SigmaSchedule::Karras),
        ("use_lu_lambdas", SigmaSchedule::Lu),
        ("use_exponential_sigmas", SigmaSchedule::Exponential),
        ("use_beta_sigmas", SigmaSchedule::Beta),
    ];
    let mut schedule = None;
    for (key, value) in flags {
        if keys.or(key, false)? {
            ensure!(
                schedule.is_none(),
                "the scheduler's `{key}` contradicts another of its sigma schedules"
            );
            schedule = Some(value);
        }
    }
    Ok(schedule)
}

impl ClassTraits {
    /// The name that the class puts in place of a `solver_type` that it does not know.
    fn solver_type(&self, chosen: SolverType) -> SolverType {
        if self.solver_types.contains(&chosen) {
            return chosen;
        }
        self.solver_types.first().copied().unwrap_or(chosen)
    }

    /// Whether the class has a flag for this schedule.
    fn knows_sigma_schedule(&self, schedule: SigmaSchedule) -> bool {
        self.sigma_schedules && (schedule != SigmaSchedule::Lu || self.dpm_solver.is_some())
    }
}

/// The settings of one sampler's class: the file's where the class knows the key, else the class's
/// defaults.
pub(super) struct SamplerConfig<'a> {
    pub(super) file: &'a SchedulerConfig,
    pub(super) sampler: Sampler,
    pub(super) traits: &'static ClassTraits,
    pub(super) spacing: TimestepSpacing,
    pub(super) sigma_schedule: Option<SigmaSchedule>,
    pub(super) steps_offset: usize,
    pub(super) final_sigma: FinalSigma,
}

/// What a multistep solver needs besides the sigmas.
#[derive(Clone, Debug)]
pub(super) struct Solver {
    pub(super) order: usize,
    pub(super) algorithm: Algorithm,
    pub(super) solver_type: SolverType,
    /// Whether the last of few steps are of a lower order.
    pub(super) lower_order_final: bool,
    /// Whether the last step is of order one.
    pub(super) euler_at_final: bool,
    /// Whether UniPC integrates the predicted clean latents, not the noise.
    pub(super) predict_x0: bool,
    /// The steps that UniPC does not correct.
    pub(super) disable_corrector: Vec<usize>,
}

impl SamplerConfig<'_> {
    /// The noise levels of training, as the class computes them.
    pub(super) fn noise_levels(&self) -> DiscreteLevels {
        let file = self.file;
        let (start, end, schedule) = self.traits.betas;
        let betas = file.trained_betas.clone().unwrap_or_else(|| {
            file.beta_schedule.unwrap_or(schedule).betas(
                file.beta_start.unwrap_or(start),
                file.beta_end.unwrap_or(end),
                file.train_timesteps,
            )
        });
        if self.traits.zero_snr && file.rescale_betas_zero_snr {
            DiscreteLevels::with_zero_terminal_snr(betas, self.traits.grid.zero_snr_alpha())
        } else {
            DiscreteLevels::from_betas(&betas)
        }
    }

    /// The range -x..=x that predicted latents are clipped to, if they are.
    pub(super) fn clip(&self) -> Option<f64> {
        let default = self.traits.clip_sample? && !self.file.pipeline;
        self.file
            .clip_sample
            .unwrap_or(default)
            .then_some(self.file.clip_sample_range)
    }

    /// Whether PNDM begins without Runge-Kutta steps, `skip_prk_steps`.
    pub(super) fn skips_prk_steps(&self) -> bool {
        self.file.skip_prk_steps.unwrap_or(self.file.pipeline)
    }

    /// Whether the levels are spaced evenly in log(sigma), `interpolation_type`.
    pub(super) fn is_log_linear(&self) -> bool {
        self.traits.continuous && self.file.interpolation == Interpolation::LogLinear
    }

    /// Whether the network is told log(sigma) / 4 instead of a timestep, `timestep_type`.
    pub(super) fn has_continuous_timesteps(&self) -> bool {
        self.traits.continuous
            && self.file.timestep_type == TimestepType::Continuous
            && self.file.prediction == Prediction::V
    }

    /// Whether DDPM's noise has the variance of the forward process, `variance_type`.
    pub(super) fn has_large_variance(&self) -> bool {
        self.file.variance == Variance::Large
    }

    /// Whether the betas are Nichol and Dhariwal's.
    pub(super) fn has_cosine_betas(&self) -> bool {
        self.file.beta_schedule == Some(BetaSchedule::Cosine)
    }

    /// The settings of the solver: a sampler that is named after an order and an algorithm has
    /// them, unless it is the checkpoint's. Errors if the algorithm does not go with the others.
    pub(super) fn solver(&self) -> Result<Solver> {
        let file = &self.file.solver;
        let (order, algorithm) = match self.traits.dpm_solver {
            Some(named) if Some(self.sampler) != self.file.sampler => named,
            _ => (file.order.unwrap_or(2), file.algorithm),
        };
        if self.traits.dpm_solver.is_some() {
            self.check_algorithm(algorithm, order)?;
        }
        let solver_type = file.solver_type.unwrap_or(SolverType::Midpoint);
        Ok(Solver {
            order,
            algorithm,
            solver_type: self.traits.solver_type(solver_type),
            lower_order_final: file.lower_order_final,
            euler_at_final: file.euler_at_final || self.final_sigma == FinalSigma::Zero,
            predict_x0: file.predict_x0,
            disable_corrector: file.disable_corrector.clone(),
        })
    }

    /// Refuses what the solvers that integrate the noise cannot do: they cannot step to sigma 0.
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
        ensure!(
            algorithm == Algorithm::Plain || order < 3,
            "the scheduler's `solver_order` is 3, which `algorithm_type` \"{name}\" does not support"
        );
        Ok(())
    }
}
