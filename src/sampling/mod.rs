//! Samplers, their noise levels and their noise: numbers only, no network.

pub mod noise;
pub mod noise_levels;
pub mod prediction;
pub mod sampler;
pub mod schedule;
mod sigmas;
