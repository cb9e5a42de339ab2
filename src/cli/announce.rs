//! What a run says to the person before it draws: what was chosen, what is skipped, and what looks
//! like a mistake.

use crate::batch::jobs::JobList;
use crate::batch::work_list::{Task, WorkList};
use crate::cli::args::{Cli, DrawArgs};
use crate::cli::progress::Progress;
use crate::pipeline::Pipeline;
use crate::pipeline::family::{Family, distillation_by_name};
use crate::pipeline::guidance::Guidance;
use crate::pipeline::options::VaeTiling;
use crate::pipeline::settings::Settings;
use crate::weights::Checkpoint;
use crate::weights::embedding::Embedding;
use clap::CommandFactory;

/// Says the seed if it is random, how many images are skipped, what has no effect, and with `-v`
/// what the model is and how it draws.
pub fn announce(
    args: &DrawArgs,
    list: &JobList,
    notes: &[String],
    work: &WorkList,
    pipeline: &Pipeline,
    skipped: usize,
    progress: &Progress,
) {
    let checkpoint = &pipeline.checkpoint;
    if let Some(seed) = list.random_seed {
        progress.note(format!("seed {seed}"));
    }
    if let Some(command) = args.source().prompt.and_then(nearly_a_command) {
        progress.note(format!(
            "this draws a picture of the word; the command is `sdgen {command}`"
        ));
    }
    if args.resume {
        let total = work.tasks.len();
        progress.note(format!("{skipped} of {total} pictures are there already"));
    }
    warn_of_no_effect(work, checkpoint, progress);
    if args.model.is_embedded() {
        tell_of_embedded(work, pipeline, progress);
    }
    for note in notes {
        progress.note(format!("warning: {note}"));
    }
    if !notes.is_empty() {
        progress
            .note("hint: so does A1111; `--prompt-syntax plain` takes every character for itself");
    }
    for warning in checkpoint.warnings() {
        if args.prediction.is_none() {
            progress.note(format!("warning: {warning}"));
        }
    }
    if args.vae_tiling == VaeTiling::Auto {
        tell_of_tiles(work, pipeline, progress);
    }
    if pipeline.reads_again {
        progress.note(
            "memory is short for this model: its weights are read again in every step, which is slower",
        );
    }
    tell_of_model(checkpoint, progress);
    if let Some(task) = work.tasks.first() {
        let settings = &task.job.settings;
        let guidance = if settings.guidance > 1.0 {
            format!("guidance {}", settings.guidance)
        } else {
            "no guidance".into()
        };
        let Settings {
            model,
            width,
            height,
            steps,
            sampler,
            ..
        } = settings;
        progress.detail(format!(
            "{model}: {width}x{height}, {steps} steps of {sampler}, {guidance}"
        ));
    }
}

/// The command of which a prompt is the beginning.
fn nearly_a_command(prompt: &str) -> Option<String> {
    let cli = Cli::command();
    let mut names = cli.get_subcommands().map(clap::Command::get_name);
    let is_beginning = |name: &&str| prompt.len() >= 4 && name.starts_with(prompt);
    names.find(is_beginning).map(String::from)
}

/// Warns of options that change nothing.
fn warn_of_no_effect(work: &WorkList, checkpoint: &Checkpoint, progress: &Progress) {
    let unguided = |has: fn(&Settings) -> bool| {
        let mut jobs = work.tasks.iter().map(|task| &task.job);
        jobs.any(|job| job.guidance == Guidance::Off && has(&job.settings))
    };
    let negative = unguided(|settings| !settings.negative.is_empty());
    let rescale = unguided(|settings| settings.guidance_rescale > 0.0);
    for (is_given, what) in [
        (negative, "the negative prompt"),
        (rescale, "`--guidance-rescale`"),
    ] {
        if is_given {
            progress.note(format!(
                "warning: {what} has no effect without classifier-free guidance"
            ));
        }
    }
    let skips = |task: &Task| task.job.settings.clip_skip > 1;
    if work.tasks.iter().any(skips) && Family::detect(checkpoint).is_ok_and(|f| f == Family::Sdxl) {
        progress.note(
            "warning: `--clip-skip 2` takes a layer further from the end than Stable Diffusion XL was trained with; A1111 and Forge take no notice of it there: leave it out for their picture",
        );
    }
    // a LoRA may be meant without the word that it brings
    let asked = checkpoint.embeddings().iter();
    for Embedding { token, file, .. } in asked.filter(|embedding| embedding.hash.is_some()) {
        let uses = |task: &Task| {
            let mut used = task.job.settings.embeddings.iter();
            used.any(|used| used.name == *token)
        };
        if !work.tasks.iter().any(uses) {
            progress.note(format!(
                "warning: no prompt has the word `{token}`, so the embedding `{file}` has no effect"
            ));
        }
    }
}

/// Says what the embedded model cannot draw: words and sizes that it does not know, and colours of
/// things.
fn tell_of_embedded(work: &WorkList, pipeline: &Pipeline, progress: &Progress) {
    // who asks for more than this has seen it
    const PROMPTS: usize = 1000;
    const WORDS: usize = 12;
    const SIDE_PX: usize = 128;
    let settings = || work.tasks.iter().map(|task| &task.job.settings);
    let texts = || {
        let mut texts: Vec<&str> = settings().map(|settings| &*settings.prompt).collect();
        texts.dedup();
        texts.truncate(PROMPTS);
        texts.into_iter()
    };
    let encoder = &pipeline.config.base.encoder;
    let unknown = encoder.unknown_words(&pipeline.checkpoint, texts());
    let mut says = vec![];
    if let Ok(words) = unknown
        && !words.is_empty()
    {
        let quoted: Vec<String> = words.iter().take(WORDS).map(|w| format!("`{w}`")).collect();
        let more = if words.len() > WORDS { ", ..." } else { "" };
        says.push(format!("does not know {}{more}", quoted.join(", ")));
    }
    if let Some(colour) = texts().find_map(coloured_thing) {
        says.push(format!(
            "knows colours of backgrounds (`on red`), not of things (`{colour}`)"
        ));
    }
    let other_size = settings()
        .map(|settings| (settings.width, settings.height))
        .find(|size| *size != (SIDE_PX, SIDE_PX));
    if let Some((width, height)) = other_size {
        says.push(format!(
            "was trained for {SIDE_PX}x{SIDE_PX} alone, not {width}x{height}"
        ));
    }
    if says.is_empty() {
        return;
    }
    for what in says {
        progress.note(format!("warning: the embedded model {what}"));
    }
    progress.note(
        "hint: `-m sd15` is a model that does (4 GB to fetch); `sdgen help models` tells of others",
    );
}

/// The first colour with the thing that it is of, but for those in which the embedded model knows it.
fn coloured_thing(prompt: &str) -> Option<&str> {
    const COLOURS: [&str; 11] = [
        "white", "black", "gray", "red", "yellow", "green", "blue", "purple", "pink", "brown",
        "teal",
    ];
    const KNOWN: [&str; 7] = [
        "red helmet",
        "red lantern",
        "red paper",
        "green apple",
        "black cat",
        "blue heart",
        "white wine",
    ];
    let words: Vec<&str> = prompt.split(' ').collect();
    let mut at = 0;
    for (i, word) in words.iter().enumerate() {
        let is_background = words[..i].iter().rev().take(2).any(|word| *word == "on");
        if let Some(next) = words.get(i + 1)
            && COLOURS.contains(word)
            && !is_background
            && next.starts_with(char::is_alphabetic)
        {
            let thing = next.trim_end_matches(|c: char| !c.is_alphabetic());
            let phrase = &prompt[at..at + word.len() + 1 + thing.len()];
            if thing != "background" && !COLOURS.contains(&thing) && !KNOWN.contains(&phrase) {
                return Some(phrase);
            }
        }
        at += word.len() + 1;
    }
    None
}

/// Says that images are decoded in tiles, if any is.
fn tell_of_tiles(work: &WorkList, pipeline: &Pipeline, progress: &Progress) {
    let mut all = work.tasks.iter().map(|task| &task.job.settings);
    let Some(settings) = all.find(|settings| settings.vae_tiling) else {
        return;
    };
    let untiled = Settings {
        vae_tiling: false,
        ..settings.clone()
    };
    let gigabytes = pipeline.vae_bytes(&untiled) as f64 / 1e9;
    let Settings { width, height, .. } = settings;
    progress.note(format!(
        "{width}x{height} is decoded in tiles: the whole would need about {gigabytes:.1} GB of memory"
    ));
}

/// Says how LoRAs fit, how the model was distilled, and what was assumed of it.
fn tell_of_model(checkpoint: &Checkpoint, progress: &Progress) {
    for lora in checkpoint.loras() {
        progress.detail(lora.describe_matched());
        if let Some(unexpected) = lora.describe_unexpected() {
            progress.note(format!("warning: {unexpected}"));
        }
    }
    let family = Family::detect(checkpoint).ok();
    if let Some(distilled) = family.and_then(|family| family.defaults(checkpoint).distilled) {
        progress.detail(format!("distilled: {distilled}"));
    }
    if let Some((name, named)) = distillation_by_name(checkpoint) {
        let guidance = if named.guidance > 1.0 {
            format!("guidance {}", named.guidance)
        } else {
            "no guidance".into()
        };
        progress.note(format!(
            "`{name}`: {}; {} steps and {guidance} unless `--steps` and `--guidance` say otherwise",
            named.method, named.steps
        ));
    }
    for assumed in checkpoint.assumptions() {
        progress.detail(format!("assumed: {assumed}"));
    }
    let unexpected = checkpoint.unexpected_keys();
    if !unexpected.is_empty() {
        progress.detail(format!(
            "{} tensors are not needed: {}",
            unexpected.len(),
            unexpected.join(", ")
        ));
    }
}
