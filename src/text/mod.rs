//! From a prompt to the embeddings that the U-Net attends to: [`prompt`] parses it, [`tags`] takes
//! LoRAs out of it, [`tokenizer`]
//! makes token ids, [`clip`] is the network, and [`encoder`] puts them together; [`t5`]
//! and [`qwen3`] are tokenizer and network of the transformer families.

pub mod clip;
pub mod encoder;
pub mod prompt;
pub mod qwen3;
pub mod t5;
pub mod tags;
pub mod tokenizer;
