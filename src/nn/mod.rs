//! The layers that all networks are made of, on activations [b, h, w, c] and tokens [b, n, c].
//!
//! Read [`layers`] first; [`bands`] holds pictures that are too large to be held twice,
//! [`attention`] is scaled dot-product attention without a whole score matrix, [`embed`] the
//! sinusoidal timestep embedding, [`padding`] seamless pictures, [`profile`] what each layer takes, `cpu`
//! and `gpu` the fused kernels behind the layers.

pub mod attention;
pub mod bands;
pub mod cpu;
pub mod device;
pub mod embed;
pub mod gpu;
pub mod layers;
pub mod padding;
pub mod profile;
