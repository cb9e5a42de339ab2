//! All integration tests, one program: it is linked once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

mod batch;
mod between;
mod check;
mod checkpoints;
mod cli;
mod config;
mod convert;
mod distilled;
mod docs;
mod dynamic;
mod embeddings;
mod flow;
mod from_picture;
#[cfg(unix)]
mod fuzz;
mod gguf;
mod help;
#[cfg(feature = "hub")]
mod hub;
mod input;
mod instructions;
mod layers;
mod library;
mod lora;
mod lora_transformers;
mod memory;
mod merge;
mod mini;
mod mmdit;
mod models;
mod noise;
mod output;
mod parity;
mod pictures;
mod prompts;
mod references;
mod refused;
mod samplers;
mod shard;
mod sheet;
mod snapshots;
mod split;
mod steps;
mod tile;
mod traps;
mod upscale;
mod vae;
mod weights;
