//! From a prompt to the embeddings that the U-Net attends to: [`prompt`] parses it, [`tags`] takes
//! LoRAs out of it, [`tokenizer`]
//! makes token ids, [`clip`] is the network, and [`encoder`] puts them together.

pub mod clip;
pub mod encoder;
pub mod prompt;
pub mod tags;
pub mod tokenizer;
