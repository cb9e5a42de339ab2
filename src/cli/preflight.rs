//! What is found out before anything is drawn: contradictions, files that cannot be written, LoRAs
//! that prompts name.

use crate::batch::jobs::{JobList, JobSpec};
use crate::batch::output_path::{self, Destination, MadeFolders};
use crate::batch::work_list::{Task, WorkList};
use crate::cli::args::DrawArgs;
use crate::cli::progress::ProgressMode;
use crate::cli::stdout::require_no_terminal;
use crate::cli::upscale::Upscaler;
use crate::image::Format;
use crate::pipeline::fingerprint::Trace;
use crate::pipeline::guidance::Guidance;
use crate::pipeline::model_spec::LoraSpec;
use crate::text::prompt::{self, Syntax, without_comments};
use crate::text::tags::{LoraTag, take_tags};
use crate::weights::lora;
use anyhow::{Context, Result, anyhow, bail};
use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};

/// Errors if options contradict each other, before a model is looked at.
pub fn check_options(args: &DrawArgs, list: &JobList) -> Result<()> {
    let mut outputs = list.outputs.iter();
    let to_stdout = outputs.any(|(destination, _)| matches!(destination, Destination::Stdout));
    if to_stdout && args.json {
        bail!("`-o -` and `--json` both want stdout");
    }
    if args.trace && args.no_metadata && !args.json && args.manifest.is_none() {
        bail!(
            "with `--no-metadata` nothing keeps what `--trace` finds\n\nhint: `--json` or `--manifest FILE` does"
        );
    }
    if args.show.is_some() && args.progress == ProgressMode::Json {
        bail!("`--show` and `--progress json` both want stderr");
    }
    if to_stdout {
        require_no_terminal()?;
    }
    if to_stdout && list.outputs.len() > 1 {
        bail!(
            "one picture of the list goes to stdout, others into files\n\nhint: draw that one by a command of its own, with `-o -`"
        );
    }
    if to_stdout && args.grid.is_some() {
        bail!("`--grid` is made of files, but `-o -` writes none");
    }
    let written = [("--grid", &args.grid), ("--manifest", &args.manifest)];
    if let Some((option, _)) = written
        .into_iter()
        .find(|(_, path)| path.as_deref() == Some(Path::new("-")))
    {
        bail!(
            "`{option} -` has no file\n\nhint: name one; `--json` prints an object a picture on stdout"
        );
    }
    if let Some(path) = &args.grid {
        Format::of_path(path)?;
    }
    let looks_for_files = [("--verify", args.verify), ("--resume", args.resume)];
    let mut given = looks_for_files
        .into_iter()
        .filter(|(_, is_given)| *is_given);
    if let (true, Some((option, _))) = (to_stdout, given.next()) {
        bail!("`{option}` looks for files, but `-o -` writes none");
    }
    let by_others = [
        ("--resume", args.resume),
        ("--verify", args.verify),
        ("--shard", args.shard.is_some()),
    ];
    let mut given = by_others.into_iter().filter(|(_, is_given)| *is_given);
    if let (Some(seed), Some((option, _))) = (list.random_seed, given.next()) {
        bail!(
            "`{option}` cannot know the random seeds of another run\n\nhint: `--seed {seed}`, or the seed that was printed"
        );
    }
    Ok(())
}

/// Says what stands in the prompts as text although it looks like syntax, or is left out; every
/// kind of it once.
pub fn prompt_notes(list: &JobList) -> Vec<String> {
    const MOST: usize = 8;
    let (mut notes, mut seen) = (vec![], HashSet::new());
    for JobSpec {
        prompt, options, ..
    } in &list.jobs
    {
        let texts = [
            (Some(prompt), false),
            (options.negative.as_ref(), true),
            (options.to.as_ref(), false),
        ];
        for (text, is_negative) in texts {
            let Some(text) = text.filter(|_| options.prompt_syntax != Some(Syntax::Plain)) else {
                continue;
            };
            if seen.insert((text.clone(), is_negative)) {
                notes.extend(prompt::notes(text, is_negative));
            }
        }
    }
    let mut known = HashSet::new();
    notes.retain(|note| known.insert(note.clone()));
    if notes.len() > MOST {
        let more = notes.len() - MOST;
        notes.truncate(MOST);
        notes.push(format!("{more} more such places in prompts"));
    }
    notes
}

/// The LoRAs of the run: those of `--lora`, then those of A1111's tags, which are taken out of the
/// prompts. Errors if prompts differ in their tags, or a tag's file is not found.
pub fn take_loras(args: &DrawArgs, list: &mut JobList) -> Result<Vec<LoraSpec>> {
    let mut of_all = None;
    for item in list
        .jobs
        .iter_mut()
        .filter(|item| item.options.prompt_syntax != Some(Syntax::Plain))
    {
        let (text, tags) = take_tags(&without_comments(&item.prompt))?;
        if text != *item.prompt {
            item.prompt = text.into();
        }
        if *of_all.get_or_insert_with(|| tags.clone()) != tags {
            return Err(anyhow!(
                "prompts name different LoRAs\n\nhint: LoRAs are of a whole run; make one of each, `--lora` is for all"
            ));
        }
    }
    let find = |tag: LoraTag| {
        let name = &tag.name;
        let hint = "`--lora-dir DIR` says where its file is; `--prompt-syntax plain` takes every character for itself";
        let folder = args
            .lora_dir
            .as_ref()
            .with_context(|| format!("the prompt names the LoRA `{name}`\n\nhint: {hint}"))?;
        Ok(LoraSpec {
            path: lora::find_named(folder, name)?,
            strength: tag.strength,
            text_strength: tag.text_strength,
        })
    };
    let named = of_all
        .unwrap_or_default()
        .into_iter()
        .map(find)
        .collect::<Result<Vec<_>>>()?;
    Ok(args.model.lora.iter().cloned().chain(named).collect())
}

/// Notes in the settings that images are made larger, and returns about how many bytes of memory
/// that takes. Errors if one would be too large.
pub fn plan_upscaling(work: &mut WorkList, upscaler: Option<&Upscaler>) -> Result<u64> {
    let Some(upscaler) = upscaler else {
        return Ok(0);
    };
    let mut bytes = 0;
    for task in &work.tasks {
        let (width, height) = task.job.settings.final_size();
        upscaler
            .size(width, height)
            .with_context(|| work.place(task))?;
        bytes = bytes.max(upscaler.bytes(width, height));
    }
    for Task { job, .. } in &mut work.tasks {
        job.settings = upscaler.told(job.settings.clone());
    }
    Ok(bytes)
}

/// Errors if two options would write to one path.
fn require_apart(args: &DrawArgs, work: &WorkList) -> Result<()> {
    let steps = args.save_steps.as_ref();
    let written = [
        ("--grid", args.grid.as_deref()),
        ("--manifest", args.manifest.as_deref()),
        ("--save-steps", steps.map(|steps| steps.folder.as_path())),
    ];
    let images = work.tasks.iter().map(|task| task.path.as_deref());
    let mut before: Vec<(&str, &Path)> = vec![];
    for (option, path) in written {
        let Some(path) = path else { continue };
        let same = |other: Option<&Path>| other.is_some_and(|other| bare(other).eq(bare(path)));
        let with = match before.iter().find(|(_, other)| same(Some(other))) {
            Some((other, _)) => Some(*other),
            None => images.clone().any(same).then_some("--output"),
        };
        if let Some(with) = with {
            bail!(
                "`{option}` and `{with}` would both write `{}`\n\nhint: name another path for one of them",
                path.display()
            );
        }
        before.push((option, path));
    }
    Ok(())
}

/// A path without what changes nothing about it.
fn bare(path: &Path) -> impl Iterator<Item = Component<'_>> {
    path.components().filter(|part| *part != Component::CurDir)
}

/// Makes the folders of images, and returns them. Errors if an image cannot be stored: its file
/// exists or cannot be written, or its metadata is too large for its format.
pub fn check_files(args: &DrawArgs, list: &JobList, work: &WorkList) -> Result<MadeFolders> {
    // a template's folders are made, and those that lists name below `--output`
    let makes_folder = |task: &Task| {
        let spec = list.jobs.get(task.index);
        spec.is_some_and(|spec| {
            let destination = list.outputs.get(spec.output).map(|(to, _)| to);
            matches!(destination, Some(Destination::Template(_)))
                || spec.options.output != args.job.output
        })
    };
    require_apart(args, work)?;
    let overwrite = args.write_options().overwrite;
    let grid: Vec<&Path> = args.grid.iter().map(PathBuf::as_path).collect();
    let mut made = output_path::check_writable(&grid, true, overwrite)?;
    for make_folders in [false, true] {
        let tasks = work
            .tasks
            .iter()
            .filter(|task| makes_folder(task) == make_folders);
        let paths: Vec<&Path> = tasks.filter_map(|task| task.path.as_deref()).collect();
        made.extend(output_path::check_writable(
            &paths,
            make_folders,
            overwrite,
        )?);
    }
    for task in work
        .tasks
        .iter()
        .filter(|task| task.format == Format::Jpg && !args.no_metadata)
    {
        let job = &task.job;
        let trace = args.trace.then(|| {
            Trace::blank(
                1 + usize::from(job.guidance != Guidance::Off),
                job.refiner_plan.is_some(),
                job.evaluations(),
            )
        });
        job.settings
            .metadata(trace.as_ref())
            .check(task.format)
            .with_context(|| work.place(task))?;
    }
    Ok(made)
}
