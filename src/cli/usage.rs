//! What is said of a command line that cannot be understood: as every error, a cause and a hint.

use anyhow::{Error, anyhow};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use std::ffi::OsString;

/// Names that other programs give to options, and what those are here.
const OTHER_NAMES: [(&[&str], &str); 13] = [
    (&["-w", "--W"], "`-W N` or `--width N` is the width"),
    (&["--H"], "`-H N` or `--height N` is the height"),
    (
        &["--size", "--resolution", "--dimensions", "--aspect-ratio"],
        "`--width N` and `--height N` (`-W`, `-H`) are the size in pixels",
    ),
    (
        &[
            "--num-inference-steps",
            "--ddim-steps",
            "--sample-steps",
            "--sampling-steps",
            "--num-steps",
        ],
        "`--steps N` is their number",
    ),
    (
        &["--scale", "--cfg", "--guidance-scale-value"],
        "`--guidance X` is classifier-free guidance",
    ),
    (
        &[
            "--n-iter",
            "--n-samples",
            "--num-images",
            "--num-images-per-prompt",
            "--num",
            "-N",
        ],
        "`--count N` draws so many",
    ),
    (
        &["--outdir", "--output-dir", "--out", "--save"],
        "`--output FOLDER/` or `--output FILE` is where pictures go",
    ),
    (
        &["--init-image", "--input-image", "--img", "--init"],
        "`--image FILE` is the picture to start from",
    ),
    (
        &["--ckpt", "--checkpoint", "--model-id", "--model-path"],
        "`--model REF` is a folder, a file, a hub id or a short name",
    ),
    (
        &["--denoise", "--denoising-strength"],
        "`--strength X` is how much of a picture is drawn anew",
    ),
    (
        &["--neg", "--uncond", "--n-prompt"],
        "`--negative TEXT` is what a picture should not have",
    ),
    (
        &["--precision", "--type", "--torch-dtype"],
        "`--dtype f32|bf16|f16` is the type of weights and activations",
    ),
    (
        &["--gpu", "--cuda", "--cpu", "--metal"],
        "`--device cpu|cuda|metal` is where networks run",
    ),
];

/// The error of arguments that clap refuses. Ends the process with what was asked for where they ask
/// for help or the version.
pub fn refused(error: clap::Error, command: &clap::Command, arguments: &[OsString]) -> Error {
    if !error.use_stderr() {
        error.exit();
    }
    if is_about_words(&error)
        && let Some(meant) = several_words(command, arguments)
    {
        return anyhow!("a prompt of several words needs quotes\n\nhint: {meant}");
    }
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    // the usage follows, and where help is
    let text = text.split("\n\nUsage:").next().unwrap_or(text);
    let text = text
        .split("\n\nFor more information")
        .next()
        .unwrap_or(text);
    let (cause, hint) = match text.split_once("\n\nhint: ") {
        Some((cause, hint)) => (cause, Some(hint.trim().to_string())),
        None => match text.split_once("\n\n  tip: ") {
            Some((cause, tips)) => (cause, tips_of(&error, tips)),
            None => (text, None),
        },
    };
    let cause: Vec<&str> = cause.lines().map(str::trim).collect();
    let subcommand = arguments
        .iter()
        .skip(1)
        .find_map(|word| command.find_subcommand(word))
        .map(|command| format!("{} ", command.get_name()))
        .unwrap_or_default();
    let hint = other_name(&error)
        .map(String::from)
        .or(hint)
        .unwrap_or_else(|| format!("`sdgen {subcommand}--help` tells all options"));
    anyhow!("{}\n\nhint: {hint}", cause.join(" ").trim_end())
}

/// What clap proposes, in a line: an option, or that a word be a value; the latter is no help with
/// an option that does not exist.
fn tips_of(error: &clap::Error, tips: &str) -> Option<String> {
    let is_option = unknown(error).is_some_and(|word| word.starts_with('-'));
    let tips: Vec<&str> = tips
        .split("\n")
        .map(|tip| tip.trim().trim_start_matches("tip: "))
        .filter(|tip| !(tip.is_empty() || is_option && tip.starts_with("to pass")))
        .collect();
    (!tips.is_empty()).then(|| tips.join("; "))
}

/// What an option of another program is called here.
fn other_name(error: &clap::Error) -> Option<&'static str> {
    let typed = unknown(error)?;
    let name = typed.split('=').next()?.replace('_', "-");
    let mut known = OTHER_NAMES.iter();
    known
        .find(|(names, _)| names.contains(&name.as_str()))
        .map(|(_, hint)| *hint)
}

/// The argument that the command does not have.
fn unknown(error: &clap::Error) -> Option<&str> {
    match (error.kind(), error.get(ContextKind::InvalidArg)) {
        (ErrorKind::UnknownArgument, Some(ContextValue::String(word))) => Some(word),
        _ => None,
    }
}

/// Whether an error is about words that are no value of an option.
fn is_about_words(error: &clap::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::UnknownArgument | ErrorKind::InvalidSubcommand | ErrorKind::ArgumentConflict
    )
}

/// The command that was meant where a prompt has no quotes, so that each of its words is an argument
/// of its own; `None` where no two words stand side by side.
fn several_words(command: &clap::Command, arguments: &[OsString]) -> Option<String> {
    let words: Vec<&str> = arguments
        .iter()
        .skip(1)
        .map(|it| it.to_str())
        .collect::<Option<_>>()?;
    let takes_value = |word: &str| {
        command.get_arguments().any(|arg| {
            let long = word.strip_prefix("--");
            let short = word.strip_prefix('-').and_then(|rest| rest.chars().next());
            let names = arg.get_long_and_visible_aliases().unwrap_or_default();
            let aliases = arg.get_all_aliases().unwrap_or_default();
            let is_it = match long {
                Some(long) => names.contains(&long) || aliases.contains(&long),
                None => word.len() == 2 && arg.get_short() == short,
            };
            // `--show=blocks`: its value never stands apart
            is_it && arg.get_action().takes_values() && !arg.is_require_equals_set()
        })
    };
    let mut is_value = false;
    let is_bare: Vec<bool> = words
        .iter()
        .map(|word| {
            let is_option = word.starts_with('-') && word.len() > 1;
            let is_bare = !is_option && !is_value;
            is_value = is_option && takes_value(word);
            is_bare
        })
        .collect();
    let start = is_bare.windows(2).position(|pair| pair == [true, true])?;
    let length = is_bare.iter().skip(start).take_while(|bare| **bare).count();
    let first = words.get(start)?;
    if command.find_subcommand(first).is_some() && start == 0 {
        return None;
    }
    let (before, rest) = words.split_at(start);
    let (prompt, after) = rest.split_at(length);
    let quoted = |word: &&str| match word.contains([' ', '"', '$', '(', '<', '*', ';', '&', '|']) {
        true => format!("'{word}'"),
        false => word.to_string(),
    };
    let prompt = format!("\"{}\"", prompt.join(" "));
    let parts = before
        .iter()
        .map(quoted)
        .chain([prompt])
        .chain(after.iter().map(quoted));
    Some(
        ["sdgen".to_string()]
            .into_iter()
            .chain(parts)
            .collect::<Vec<_>>()
            .join(" "),
    )
}
