//! Samplers, their noise levels and their noise: numbers only, no network.
//!
//! A run goes through these files: `scheduler_config` reads the checkpoint's settings, `plan` lays
//! out timesteps and sigmas by them (`timesteps`, `sigmas`, `noise_levels`; `flow`), and `sampler` walks
//! them. `kinds` is the table of samplers and schedules, `prediction` turns a network's output
//! into an estimate of the clean latents, and [`noise`] is torch's.

mod flow;
mod kinds;
pub mod noise;
mod noise_levels;
mod plan;
mod prediction;
mod sampler;
mod scheduler_config;
mod sigmas;
mod timesteps;

pub use flow::Mu;
pub use kinds::{NamedSampler, Sampler, Schedule};
pub use plan::{SamplingPlan, plan, plan_img2img};
pub use prediction::{Prediction, Scalings};
pub use sampler::{Step, sample};
pub use scheduler_config::SchedulerConfig;
