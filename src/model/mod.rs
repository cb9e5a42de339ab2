//! The networks, one file each, read top-down: [`unet`] predicts noise in latents, [`vae`] turns latents into pictures.

pub mod unet;
pub mod vae;
