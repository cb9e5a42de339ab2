//! From a prompt to the embedding that the U-Net attends to: [`prompt`], then [`tokenizer`], then
//! [`clip`], put together in [`encoder`].

pub mod clip;
pub mod encoder;
pub mod prompt;
pub mod tokenizer;
