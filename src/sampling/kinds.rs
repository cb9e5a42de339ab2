//! The samplers and schedules that can be chosen by name: each is declared here, and only here.
//!
//! A new sampler is a row of the table below and a function in `sampler`; a new schedule is a row.
//! The rows hold what diffusers' classes differ in, so that no other file of this folder asks for a
//! sampler by its name. The module hides how names are matched.
//!
//! Read next: `scheduler_config`, which reads a checkpoint's settings by a row, and `sampler`.

use std::fmt;
use std::str::FromStr;

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use crate::sampling::noise_levels::BetaSchedule;
use crate::sampling::sampler::{self, Run};
use crate::sampling::scheduler_config::{Algorithm, SolverType, TimestepSpacing};
use crate::sampling::sigmas::{AYS_SD, AYS_SDXL, SigmaSchedule};

/// Declares a closed set of things that are chosen by name: the enum, a row for each, and the
/// conversions from and to the names. Rows have a `name` and `aliases`.
macro_rules! table {
    (
        $(#[$about:meta])*
        $kind:ident: $spec:ident, called $noun:literal;
        $($(#[$doc:meta])* $variant:ident = $row:expr;)+
    ) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(into = "&str", try_from = "String")]
        pub enum $kind {
            $($(#[$doc])* $variant,)+
        }

        impl $kind {
            /// Every one of them, in the order of the help text.
            pub const ALL: [Self; [$(Self::$variant),+].len()] = [$(Self::$variant),+];

            /// Its row of the table.
            pub fn spec(self) -> &'static $spec {
                match self {
                    $(Self::$variant => {
                        const ROW: $spec = $row;
                        &ROW
                    })+
                }
            }

            /// The name on the command line.
            pub fn name(self) -> &'static str {
                self.spec().name
            }

            /// The names of all, with commas between them.
            pub fn names() -> String {
                Self::ALL.map(Self::name).join(", ")
            }
        }

        impl fmt::Display for $kind {
            fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str(self.name())
            }
        }

        impl From<$kind> for &str {
            fn from(kind: $kind) -> Self {
                kind.name()
            }
        }

        impl TryFrom<String> for $kind {
            type Error = anyhow::Error;

            fn try_from(name: String) -> anyhow::Result<Self> {
                name.parse()
            }
        }

        impl FromStr for $kind {
            type Err = anyhow::Error;

            fn from_str(text: &str) -> anyhow::Result<Self> {
                let wanted = simplify(text);
                let found = Self::ALL.into_iter().find(|kind| {
                    let spec = kind.spec();
                    let names = [spec.name, spec.a1111].map(simplify);
                    names.contains(&wanted) || spec.aliases.contains(&wanted.as_str())
                });
                found.ok_or_else(|| {
                    let close = nearest(&wanted, Self::ALL.map(Self::name));
                    anyhow::anyhow!("unknown {} `{text}`\n\nhint: did you mean {close}?", $noun)
                })
            }
        }
    };
}

/// What one sampler is called, what it needs, and what runs it.
pub struct SamplerSpec {
    /// The name on the command line.
    pub name: &'static str,
    /// What else people write: lower case, letters and digits only, with `p` for `+`.
    pub aliases: &'static [&'static str],
    /// The class of diffusers that this sampler equals, where there is one.
    pub class: Option<&'static str>,
    /// A1111's name, for the parameters in an image's metadata.
    pub a1111: &'static str,
    /// The algorithm, over the levels of a plan.
    pub(super) run: fn(&mut Run, Tensor) -> Result<Tensor>,
    /// The default fraction of fresh noise, of a sampler that takes `--eta`.
    pub(super) eta: Option<f64>,
    /// Where the network runs a second time in every step but the last.
    pub(super) second_stage: Option<SecondStage>,
    /// How it draws with models of flow matching, if it does.
    pub(super) flow: Option<FlowForm>,
    /// The defaults of the class, and which keys of a config it knows.
    pub(super) traits: ClassTraits,
}

/// What a sampler works on where the model is one of flow matching.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlowForm {
    /// The latents themselves, on a line from picture to noise.
    Line,
    /// The latents divided by 1 - sigma, as solvers in log(sigma / (1 - sigma)) have it.
    Ratio,
}

impl Sampler {
    /// How it draws with models of flow matching. Errors if it does not, naming those that do.
    pub(super) fn flow_form(self) -> anyhow::Result<FlowForm> {
        self.spec().flow.ok_or_else(|| {
            let others = Self::ALL.into_iter().filter(|s| s.spec().flow.is_some());
            let names: Vec<String> = others.map(|other| format!("`{other}`")).collect();
            anyhow::anyhow!(
                "`{self}` does not draw with models of flow matching\n\nhint: {} do",
                names.join(", ")
            )
        })
    }
}

impl SamplerSpec {
    /// Whether it takes `--eta`, the fraction of the noise that is drawn anew in each step.
    pub fn takes_eta(&self) -> bool {
        self.eta.is_some()
    }

    /// Whether the network runs twice in every step but the last.
    pub fn is_two_stage(&self) -> bool {
        self.second_stage.is_some()
    }

    /// How often the network runs in every step but the last.
    pub fn calls_per_step(&self) -> usize {
        1 + usize::from(self.is_two_stage())
    }

    /// Whether diffusers' latents are variance-preserving, x / sqrt(1 + sigma^2), and not
    /// x = x0 + sigma * noise.
    pub fn is_variance_preserving(&self) -> bool {
        self.traits.grid != Grid::Fractional
    }

    /// Whether it can follow a schedule; some samplers have steps of their own.
    pub fn accepts(&self, schedule: Schedule) -> bool {
        match self.traits.grid {
            Grid::Distilled => false,
            Grid::Pndm => schedule.spec().sigmas.is_none(),
            Grid::Discrete | Grid::Fractional | Grid::Multistep => true,
        }
    }
}

/// Where in a step a sampler of two stages evaluates the network for the second time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SecondStage {
    /// At the next level.
    End,
    /// Between the levels, halfway in log(sigma).
    Middle,
}

/// How a class of diffusers places its timesteps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grid {
    /// n whole timesteps; noise levels exactly those of training.
    Discrete,
    /// The same, the second evaluated twice or the first three in four stages each.
    Pndm,
    /// n timesteps that may be fractions; noise levels interpolated.
    Fractional,
    /// The first n of n + 1 whole timesteps.
    Multistep,
    /// A subset of the steps of distillation.
    Distilled,
}

impl Grid {
    /// The spacing of a class whose config has no `timestep_spacing`.
    pub(super) fn default_spacing(self) -> TimestepSpacing {
        match self {
            Self::Discrete | Self::Pndm | Self::Distilled => TimestepSpacing::Leading,
            Self::Fractional | Self::Multistep => TimestepSpacing::Linspace,
        }
    }

    /// What stands in for the product of the alphas at the last timestep under a zero terminal
    /// signal-to-noise ratio, where sigma would be infinite.
    pub(super) fn zero_snr_alpha(self) -> f32 {
        match self {
            // diffusers'
            Self::Fractional | Self::Multistep => 2_f32.powi(-24),
            // there diffusers divides by it only where the network predicts noise, which has no
            // answer; this is near enough to infinity and leaves x finite in f32
            Self::Discrete | Self::Pndm | Self::Distilled => 1e-16,
        }
    }
}

/// The level that the last step ends at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FinalLevel {
    /// No noise.
    Zero,
    /// The lowest level of training.
    SigmaMin,
    /// What `final_sigmas_type` says.
    Configured,
}

/// What the classes of diffusers differ in besides their algorithm.
#[derive(Clone, Copy)]
pub(super) struct ClassTraits {
    pub(super) grid: Grid,
    /// The betas of a config that has none: first, last, and what lies between.
    pub(super) betas: (f64, f64, BetaSchedule),
    /// Whether it knows `rescale_betas_zero_snr`.
    pub(super) zero_snr: bool,
    /// Whether it knows `use_karras_sigmas`, `use_exponential_sigmas` and `use_beta_sigmas`.
    pub(super) sigma_schedules: bool,
    /// Whether Karras' sigmas lie between `sigma_min` and `sigma_max`, if the config has them.
    pub(super) limits_karras: bool,
    /// Whether it rounds the timesteps of Karras' sigmas, although others may be fractions.
    pub(super) rounds_karras: bool,
    pub(super) final_level: FinalLevel,
    /// Whether the lowest level is the last one of a sigma schedule, where there is one.
    pub(super) repeats_last_sigma: bool,
    /// Whether each step goes down by the same number of timesteps, even past the next one.
    pub(super) fixed_stride: bool,
    /// Whether it can take all its steps over what an img2img strength leaves.
    pub(super) fits_strength: bool,
    /// The default of `clip_sample`, if it knows that.
    pub(super) clip_sample: Option<bool>,
    /// Whether it knows `interpolation_type` and `timestep_type`.
    pub(super) continuous: bool,
    /// The names of `solver_type` that it knows; the first replaces all others. Any, if empty.
    pub(super) solver_types: &'static [SolverType],
    /// Whether the middle of a step lies halfway in log(sigma / (1 - sigma)) of flow matching.
    pub(super) halves_flow_ratio: bool,
    /// The order and algorithm that tell the samplers of DPMSolverMultistepScheduler apart.
    pub(super) dpm_solver: Option<(usize, Algorithm)>,
}

/// The betas of Ho et al. 2020 (arXiv 2006.11239).
const DDPM_BETAS: (f64, f64, BetaSchedule) = (0.0001, 0.02, BetaSchedule::Linear);
/// The ends of Stable Diffusion's betas, but not what lies between them.
const STABLE_ENDS: (f64, f64, BetaSchedule) = (0.00085, 0.012, BetaSchedule::Linear);
/// The betas of Stable Diffusion.
const STABLE_BETAS: (f64, f64, BetaSchedule) = (0.00085, 0.012, BetaSchedule::ScaledLinear);

const DISCRETE: ClassTraits = ClassTraits {
    grid: Grid::Discrete,
    betas: DDPM_BETAS,
    zero_snr: true,
    sigma_schedules: false,
    limits_karras: true,
    rounds_karras: false,
    final_level: FinalLevel::Zero,
    repeats_last_sigma: false,
    fixed_stride: false,
    fits_strength: false,
    clip_sample: Some(true),
    continuous: false,
    solver_types: &[],
    halves_flow_ratio: false,
    dpm_solver: None,
};
const FRACTIONAL: ClassTraits = ClassTraits {
    grid: Grid::Fractional,
    zero_snr: false,
    sigma_schedules: true,
    clip_sample: None,
    ..DISCRETE
};
const MULTISTEP: ClassTraits = ClassTraits {
    grid: Grid::Multistep,
    zero_snr: true,
    ..FRACTIONAL
};
const DPM_SOLVER: ClassTraits = ClassTraits {
    final_level: FinalLevel::Configured,
    solver_types: &[SolverType::Midpoint, SolverType::Heun],
    ..MULTISTEP
};
const DISTILLED: ClassTraits = ClassTraits {
    grid: Grid::Distilled,
    betas: STABLE_BETAS,
    clip_sample: None,
    ..DISCRETE
};

table! {
    /// The algorithms.
    Sampler: SamplerSpec, called "sampler";

    /// Song et al. 2020 (arXiv 2010.02502).
    Ddim = SamplerSpec {
        name: "ddim",
        aliases: &[],
        class: Some("DDIMScheduler"),
        a1111: "DDIM",
        run: sampler::ddim,
        eta: Some(0.0),
        second_stage: None,
        flow: None,
        traits: ClassTraits { fixed_stride: true, ..DISCRETE },
    };
    /// Liu et al. 2022 (arXiv 2202.09778), also known as PLMS.
    Pndm = SamplerSpec {
        name: "pndm",
        aliases: &["plms"],
        class: Some("PNDMScheduler"),
        a1111: "PLMS",
        run: sampler::pndm,
        eta: None,
        second_stage: None,
        flow: None,
        traits: ClassTraits { grid: Grid::Pndm, zero_snr: false, clip_sample: None, ..DISCRETE },
    };
    /// Karras et al. 2022 (arXiv 2206.00364), algorithm 2 with Euler steps alone, without churn.
    Euler = SamplerSpec {
        name: "euler",
        aliases: &["keuler"],
        class: Some("EulerDiscreteScheduler"),
        a1111: "Euler",
        run: sampler::euler,
        eta: None,
        second_stage: None,
        flow: Some(FlowForm::Line),
        traits: ClassTraits {
            zero_snr: true,
            final_level: FinalLevel::Configured,
            continuous: true,
            ..FRACTIONAL
        },
    };
    /// Euler with noise added back after each step (k-diffusion).
    EulerA = SamplerSpec {
        name: "euler-a",
        aliases: &["eulerancestral", "keulera", "keulerancestral"],
        class: Some("EulerAncestralDiscreteScheduler"),
        a1111: "Euler a",
        run: sampler::euler_ancestral,
        eta: Some(1.0),
        second_stage: None,
        flow: Some(FlowForm::Line),
        traits: ClassTraits { zero_snr: true, sigma_schedules: false, ..FRACTIONAL },
    };
    /// DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095).
    Dpmpp2m = SamplerSpec {
        name: "dpmpp-2m",
        aliases: &["kdpmpp2m", "dpmsolver", "dpmsolverpp", "dpmpp"],
        class: Some("DPMSolverMultistepScheduler"),
        a1111: "DPM++ 2M",
        run: sampler::dpm_multistep,
        eta: None,
        second_stage: None,
        flow: Some(FlowForm::Ratio),
        traits: ClassTraits { dpm_solver: Some((2, Algorithm::PlusPlus)), ..DPM_SOLVER },
    };
    /// SDE-DPM-Solver++(2M), same paper.
    Dpmpp2mSde = SamplerSpec {
        name: "dpmpp-2m-sde",
        aliases: &["kdpmpp2msde", "dpmpp2msdegpu"],
        class: Some("DPMSolverMultistepScheduler"),
        a1111: "DPM++ 2M SDE",
        run: sampler::dpm_multistep,
        eta: None,
        second_stage: None,
        flow: Some(FlowForm::Ratio),
        traits: ClassTraits { dpm_solver: Some((2, Algorithm::SdePlusPlus)), ..DPM_SOLVER },
    };
    /// DPM-Solver++ for the stochastic equation, single step (k-diffusion).
    DpmppSde = SamplerSpec {
        name: "dpmpp-sde",
        aliases: &["kdpmppsde", "dpmppsdegpu"],
        class: Some("DPMSolverSDEScheduler"),
        a1111: "DPM++ SDE",
        run: sampler::dpmpp_sde,
        eta: None,
        second_stage: Some(SecondStage::Middle),
        flow: Some(FlowForm::Ratio),
        traits: ClassTraits { betas: STABLE_ENDS, limits_karras: false, ..FRACTIONAL },
    };
    /// SDE-DPM-Solver++ of third order.
    Dpmpp3mSde = SamplerSpec {
        name: "dpmpp-3m-sde",
        aliases: &["kdpmpp3msde", "dpmpp3msdegpu"],
        class: Some("DPMSolverMultistepScheduler"),
        a1111: "DPM++ 3M SDE",
        run: sampler::dpm_multistep,
        eta: None,
        second_stage: None,
        flow: Some(FlowForm::Ratio),
        traits: ClassTraits { dpm_solver: Some((3, Algorithm::SdePlusPlus)), ..DPM_SOLVER },
    };
    /// DPM-Solver++(2S) with noise added back after each step (k-diffusion).
    Dpmpp2sA = SamplerSpec {
        name: "dpmpp-2s-a",
        aliases: &["dpmpp2sancestral", "kdpmpp2sa", "kdpmpp2sancestral"],
        class: None,
        a1111: "DPM++ 2S a",
        run: sampler::dpmpp_2s_ancestral,
        eta: Some(1.0),
        second_stage: Some(SecondStage::Middle),
        flow: Some(FlowForm::Line),
        traits: ClassTraits { zero_snr: true, halves_flow_ratio: true, ..FRACTIONAL },
    };
    /// Karras et al. 2022, algorithm 1.
    Heun = SamplerSpec {
        name: "heun",
        aliases: &["kheun"],
        class: Some("HeunDiscreteScheduler"),
        a1111: "Heun",
        run: sampler::heun,
        eta: None,
        second_stage: Some(SecondStage::End),
        flow: Some(FlowForm::Line),
        traits: ClassTraits { betas: STABLE_ENDS, clip_sample: Some(false), ..FRACTIONAL },
    };
    /// DPM-Solver-2, Lu et al. 2022 (arXiv 2206.00927), as Karras et al. write it.
    Dpm2 = SamplerSpec {
        name: "dpm2",
        aliases: &["kdpm2"],
        class: Some("KDPM2DiscreteScheduler"),
        a1111: "DPM2",
        run: sampler::dpm2,
        eta: None,
        second_stage: Some(SecondStage::Middle),
        flow: Some(FlowForm::Line),
        traits: ClassTraits { betas: STABLE_ENDS, rounds_karras: true, ..FRACTIONAL },
    };
    /// DPM-Solver-2 with noise added back after each step.
    Dpm2A = SamplerSpec {
        name: "dpm2-a",
        aliases: &["dpm2ancestral", "kdpm2a", "kdpm2ancestral"],
        class: Some("KDPM2AncestralDiscreteScheduler"),
        a1111: "DPM2 a",
        run: sampler::dpm2,
        eta: Some(1.0),
        second_stage: Some(SecondStage::Middle),
        flow: Some(FlowForm::Line),
        traits: ClassTraits { betas: STABLE_ENDS, rounds_karras: true, ..FRACTIONAL },
    };
    /// Linear multistep, of order four (k-diffusion).
    Lms = SamplerSpec {
        name: "lms",
        aliases: &["klms"],
        class: Some("LMSDiscreteScheduler"),
        a1111: "LMS",
        run: sampler::lms,
        eta: None,
        second_stage: None,
        flow: Some(FlowForm::Line),
        traits: ClassTraits { limits_karras: false, ..FRACTIONAL },
    };
    /// The refined exponential solver, Zhang et al. 2023 (arXiv 2308.02157), multistep (ComfyUI).
    ResMultistep = SamplerSpec {
        name: "res-multistep",
        aliases: &["res"],
        class: None,
        a1111: "Res Multistep",
        run: sampler::res_multistep,
        eta: None,
        second_stage: None,
        flow: Some(FlowForm::Line),
        traits: ClassTraits { zero_snr: true, ..FRACTIONAL },
    };
    /// Zhao et al. 2023 (arXiv 2302.04867).
    UniPc = SamplerSpec {
        name: "unipc",
        aliases: &[],
        class: Some("UniPCMultistepScheduler"),
        a1111: "UniPC",
        run: sampler::unipc,
        eta: None,
        second_stage: None,
        flow: Some(FlowForm::Ratio),
        traits: ClassTraits {
            final_level: FinalLevel::Configured,
            repeats_last_sigma: true,
            solver_types: &[SolverType::Bh2, SolverType::Bh1],
            ..MULTISTEP
        },
    };
    /// Zhang and Chen 2022 (arXiv 2204.13902).
    Deis = SamplerSpec {
        name: "deis",
        aliases: &[],
        class: Some("DEISMultistepScheduler"),
        a1111: "DEIS",
        run: sampler::deis,
        eta: None,
        second_stage: None,
        flow: Some(FlowForm::Ratio),
        traits: ClassTraits {
            zero_snr: false,
            final_level: FinalLevel::SigmaMin,
            repeats_last_sigma: true,
            solver_types: &[SolverType::Logrho],
            ..MULTISTEP
        },
    };
    /// Ho et al. 2020 (arXiv 2006.11239).
    Ddpm = SamplerSpec {
        name: "ddpm",
        aliases: &[],
        class: Some("DDPMScheduler"),
        a1111: "DDPM",
        run: sampler::ddpm,
        eta: None,
        second_stage: None,
        flow: None,
        traits: DISCRETE,
    };
    /// Luo et al. 2023 (arXiv 2310.04378).
    Lcm = SamplerSpec {
        name: "lcm",
        aliases: &[],
        class: Some("LCMScheduler"),
        a1111: "LCM",
        run: sampler::lcm,
        eta: None,
        second_stage: None,
        flow: Some(FlowForm::Ratio),
        traits: ClassTraits { fits_strength: true, clip_sample: Some(false), ..DISTILLED },
    };
    /// Zheng et al. 2024 (arXiv 2402.19159).
    Tcd = SamplerSpec {
        name: "tcd",
        aliases: &[],
        class: Some("TCDScheduler"),
        a1111: "TCD",
        run: sampler::tcd,
        eta: Some(0.0),
        second_stage: None,
        flow: None,
        traits: ClassTraits { final_level: FinalLevel::SigmaMin, ..DISTILLED },
    };
}

/// What one schedule is called, and what it replaces.
pub struct ScheduleSpec {
    /// The name on the command line.
    pub name: &'static str,
    /// What else people write: lower case, letters and digits only.
    pub aliases: &'static [&'static str],
    /// A1111's name, for the parameters in an image's metadata.
    pub a1111: &'static str,
    /// The sigmas, of a schedule that gives them by itself.
    pub(super) sigmas: Option<SigmaSchedule>,
    /// The spacing of the timesteps, of a schedule that keeps the checkpoint's noise levels.
    pub(super) spacing: Option<TimestepSpacing>,
}

table! {
    /// A schedule that replaces the checkpoint's.
    Schedule: ScheduleSpec, called "schedule";

    /// Karras et al. 2022 (arXiv 2206.00364), eq. 5, rho = 7.
    Karras = ScheduleSpec {
        name: "karras",
        aliases: &[],
        a1111: "Karras",
        sigmas: Some(SigmaSchedule::Karras),
        spacing: None,
    };
    /// Log-linear in sigma.
    Exponential = ScheduleSpec {
        name: "exponential",
        aliases: &[],
        a1111: "Exponential",
        sigmas: Some(SigmaSchedule::Exponential),
        spacing: None,
    };
    /// Quantiles of a beta distribution, Lee et al. 2024 (arXiv 2407.12173).
    Beta = ScheduleSpec {
        name: "beta",
        aliases: &[],
        a1111: "Beta",
        sigmas: Some(SigmaSchedule::Beta),
        spacing: None,
    };
    /// Spaced from the last timestep of training down; also called sgm-uniform.
    Trailing = ScheduleSpec {
        name: "trailing",
        aliases: &["sgmuniform"],
        a1111: "SGM Uniform",
        sigmas: None,
        spacing: Some(TimestepSpacing::Trailing),
    };
    /// Spaced from the first timestep up.
    Leading = ScheduleSpec {
        name: "leading",
        aliases: &["ddimuniform"],
        a1111: "DDIM",
        sigmas: None,
        spacing: Some(TimestepSpacing::Leading),
    };
    /// Spaced over all timesteps, both ends included.
    Linspace = ScheduleSpec {
        name: "linspace",
        aliases: &["normal"],
        a1111: "Uniform",
        sigmas: None,
        spacing: Some(TimestepSpacing::Linspace),
    };
    /// Align Your Steps, Sabour et al. 2024 (arXiv 2404.14507), for SD 1.5.
    Ays = ScheduleSpec {
        name: "ays",
        aliases: &["alignyoursteps"],
        a1111: "Align Your Steps",
        sigmas: Some(SigmaSchedule::Table(&AYS_SD)),
        spacing: None,
    };
    /// Align Your Steps for SDXL.
    AysSdxl = ScheduleSpec {
        name: "ays-sdxl",
        aliases: &[],
        a1111: "Align Your Steps",
        sigmas: Some(SigmaSchedule::Table(&AYS_SDXL)),
        spacing: None,
    };
}

/// A sampler as people write it: perhaps with a schedule behind it, as in `DPM++ 2M Karras`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct NamedSampler {
    pub sampler: Sampler,
    pub schedule: Option<Schedule>,
}

impl From<Sampler> for NamedSampler {
    fn from(sampler: Sampler) -> Self {
        Self {
            sampler,
            schedule: None,
        }
    }
}

impl From<NamedSampler> for String {
    fn from(NamedSampler { sampler, schedule }: NamedSampler) -> Self {
        match schedule {
            Some(schedule) => format!("{sampler} {schedule}"),
            None => sampler.to_string(),
        }
    }
}

impl TryFrom<String> for NamedSampler {
    type Error = anyhow::Error;

    fn try_from(name: String) -> anyhow::Result<Self> {
        name.parse()
    }
}

impl FromStr for NamedSampler {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        text.parse::<Sampler>().map(Self::from).or_else(|error| {
            let words = text.match_indices([' ', '-', '_']).map(|(at, _)| at);
            let named = |at: usize| {
                Some(Self {
                    sampler: text[..at].parse().ok()?,
                    schedule: Some(text[at..].parse().ok()?),
                })
            };
            words.into_iter().find_map(named).ok_or(error)
        })
    }
}

/// Lower case, `+` as `p`, letters and digits only: `DPM++ 2M` and `dpmpp_2m` become one.
fn simplify(name: &str) -> String {
    name.to_lowercase()
        .replace('+', "p")
        .chars()
        .filter(|c| c.is_ascii_alphanumeric())
        .collect()
}

/// The three nearest of some names to a mistyped one: "`a`, `b` or `c`".
fn nearest<const N: usize>(wanted: &str, mut names: [&str; N]) -> String {
    names.sort_by_key(|name| strsim::levenshtein(wanted, &simplify(name)));
    match names[..] {
        [a, b, c, ..] => format!("`{a}`, `{b}` or `{c}`"),
        _ => names.join(", "),
    }
}
