//! From a prompt to the embedding that the U-Net attends to: [`tokenizer`], then [`clip`].

pub mod clip;
pub mod tokenizer;
