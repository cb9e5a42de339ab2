//! Which images of a run are there already, by what their files say of themselves.

use crate::batch::report::{Outcome, Outcomes};
use crate::batch::work_list::Task;
use crate::image::{Format, Image, read_metadata};
use crate::pipeline::fingerprint::Trace;
use crate::pipeline::options::VaeTiling;
use crate::pipeline::settings::Settings;
use crate::weights::file::read;
use anyhow::{Context, Result, bail};
use rayon::iter::{IntoParallelRefMutIterator, ParallelIterator};
use serde_json::Value;

/// Metadata key: the hash of the pixels that an upscaled image was made from, where these cannot be
/// drawn again.
pub const UPSCALED_FROM: &str = "upscaled_from";

/// The key of metadata that says how many pictures a contact sheet has.
pub const CONTACT_SHEET: &str = "contact_sheet";
/// The error for metadata of another shape than ours.
pub const UNREADABLE: &str = "what it says of its drawing cannot be read";

/// How finished images are recognised and reported.
#[derive(Debug, Clone, Copy)]
pub struct ResumeOptions {
    /// Whether a file needs a trace.
    pub needs_trace: bool,
    /// Whether the hash of the pixels is reported.
    pub wants_hash: bool,
    pub vae_tiling: VaeTiling,
}

/// The settings that an image was drawn with. Errors if they do not lead to its pixels.
pub fn settings_of(sdgen: Value) -> Result<Settings> {
    if sdgen.is_null() {
        bail!("another program has drawn it");
    }
    if sdgen.get(CONTACT_SHEET).is_some() {
        bail!("it is a contact sheet\n\nhint: check the pictures on it");
    }
    if sdgen.get(UPSCALED_FROM).is_some() {
        bail!(
            "it was upscaled from a file, which cannot be drawn again\n\nhint: check the picture that it was made from"
        );
    }
    serde_json::from_value(sdgen).context(UNREADABLE)
}

/// The jobs whose files are complete and have exactly their settings.
pub fn finished(tasks: &mut [Task], options: ResumeOptions) -> Outcomes {
    tasks
        .par_iter_mut()
        .filter_map(|task| Some((task.index, Some(outcome(task, options)?))))
        .collect()
}

/// The outcome of a job that an earlier run has finished. Where nobody asks for tiles or for none,
/// the job takes over what the file has: the free memory of another moment is not a reason to draw
/// again.
fn outcome(task: &mut Task, options: ResumeOptions) -> Option<Outcome> {
    let bytes = read(task.path.as_ref()?).ok()?;
    let sdgen = read_metadata(&bytes).ok()??.sdgen;
    let trace = options
        .needs_trace
        .then(|| Trace::of(&sdgen).ok()?)
        .flatten();
    let settings = settings_of(sdgen).ok()?;
    let mut asked = task.job.settings.clone();
    if options.vae_tiling == VaeTiling::Auto {
        asked.vae_tiling = settings.vae_tiling;
    }
    if !settings.draws_the_same_as(&asked) {
        return None;
    }
    let picture = Image::decode(&bytes).ok()?;
    task.job.settings = asked;
    Some(Outcome {
        sha256: (options.wants_hash && task.format != Format::Jpg).then(|| picture.sha256()),
        trace,
        skipped: true,
        ..Outcome::default()
    })
}
