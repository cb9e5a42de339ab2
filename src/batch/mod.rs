//! Many pictures: the work list, which part of it is this process's, and where pictures go.

pub mod contact_sheet;
pub mod dynamic_prompts;
pub mod jobs;
pub mod output_path;
pub mod shard;
