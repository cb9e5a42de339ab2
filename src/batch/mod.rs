//! Many images: the work list, which part of it is this process's, and where images go.

pub mod contact_sheet;
pub mod dynamic_prompts;
pub mod jobs;
pub mod output_path;
pub mod report;
pub mod resume;
pub mod shard;
pub mod step_images;
pub mod work_list;
pub mod writer;
