//! Samplers, their noise levels and their noise: numbers only, no network.

pub mod noise;
pub mod sampler;
pub mod schedule;
