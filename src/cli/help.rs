//! `sdgen help` and `sdgen man`: the pages of `assets/docs` as plain text, the help of commands, and
//! a man page. Hides which of a page's Markdown is meant for web pages only.

use crate::cli::args::Cli;
use crate::cli::exit_code::{Code, Failure};
use crate::cli::stdout::say;
use crate::suggest::nearest;
use anyhow::{Result, bail};
use clap::CommandFactory;

/// A page of the documentation.
struct Topic {
    name: &'static str,
    /// its line in the list of topics
    about: &'static str,
    /// Markdown
    page: &'static str,
}

const TOPICS: [Topic; 10] = [
    Topic {
        name: "models",
        about: "checkpoints, the hub, the embedded model, few-step models, VAEs, merging",
        page: include_str!("../../assets/docs/models.md"),
    },
    Topic {
        name: "prompts",
        about: "weights, prompt editing, BREAK, AND, learned words",
        page: include_str!("../../assets/docs/prompts.md"),
    },
    Topic {
        name: "sampling",
        about: "seeds, steps, guidance, samplers, schedules",
        page: include_str!("../../assets/docs/sampling.md"),
    },
    Topic {
        name: "pictures",
        about: "img2img, inpainting, hires, upscaling, seamless pictures, animations",
        page: include_str!("../../assets/docs/pictures.md"),
    },
    Topic {
        name: "lora",
        about: "LoRA and LyCORIS",
        page: include_str!("../../assets/docs/lora.md"),
    },
    Topic {
        name: "batches",
        about: "lists, sweeps, file names, dynamic prompts, resume, clusters",
        page: include_str!("../../assets/docs/batches.md"),
    },
    Topic {
        name: "scripting",
        about: "stdout, JSON, exit codes, metadata, check, trace",
        page: include_str!("../../assets/docs/scripting.md"),
    },
    Topic {
        name: "parity",
        about: "what equals diffusers, and how closely",
        page: include_str!("../../assets/docs/parity.md"),
    },
    Topic {
        name: "benchmarks",
        about: "time and memory",
        page: include_str!("../../assets/docs/benchmarks.md"),
    },
    Topic {
        name: "gpu",
        about: "NVIDIA, Apple and ARM: what is known and what is not",
        page: include_str!("../../assets/docs/gpu.md"),
    },
];

/// Prints the page of a topic or the help of a command; without a name the usual help and the list
/// of topics. Errors if the name is neither, and names the nearest that is one.
pub(crate) fn help(name: Option<&str>) -> Result<(), Failure> {
    let text = match name {
        Some(name) => help_on(name).code(2)?,
        None => overview(),
    };
    say(&text).code(1)
}

/// Prints a man page in roff, with all options.
pub(crate) fn man() -> Result<(), Failure> {
    let cli = Cli::command().mut_args(|arg| arg.hide_short_help(false));
    let mut page = vec![];
    clap_mangen::Man::new(cli)
        .render(&mut page)
        .map_err(anyhow::Error::from)
        .code(1)?;
    say(&page).code(1)
}

/// The schema of the lines of `--json`.
const SCHEMA: &str = include_str!("../../assets/docs/records.schema.json");

/// Where a name is both a topic and a command, it is the topic; the command has `--help`.
fn help_on(name: &str) -> Result<String> {
    if let Some(topic) = TOPICS.iter().find(|topic| topic.name == name) {
        return Ok(plain(topic.page));
    }
    if name == "schema" {
        return Ok(SCHEMA.into());
    }
    let mut cli = Cli::command();
    cli.build();
    if let Some(command) = cli.find_subcommand_mut(name) {
        return Ok(command.render_help().to_string());
    }
    let topics = TOPICS.map(|topic| topic.name);
    let commands: Vec<&str> = cli.get_subcommands().map(|c| c.get_name()).collect();
    let near = nearest(name, topics.into_iter().chain(commands))
        .map(|near| format!("did you mean `{near}`? "))
        .unwrap_or_default();
    bail!(
        "there is no help on `{name}`\n\nhint: {near}topics are {}",
        topics.join(", ")
    )
}

fn overview() -> String {
    let mut cli = Cli::command();
    let examples = cli.get_after_help().map(ToString::to_string);
    let mut end = examples.unwrap_or_default();
    end.push_str("\n\nTopics, for `sdgen help TOPIC`:\n");
    for Topic { name, about, .. } in &TOPICS {
        end.push_str(&format!("  {name:<12}{about}\n"));
    }
    cli = cli.after_help(end);
    cli.render_help().to_string()
}

/// Turns Markdown into plain text: code is indented, and pictures are left out.
fn plain(markdown: &str) -> String {
    let mut text = String::new();
    let mut is_code = false;
    for line in markdown.lines() {
        if line.starts_with("```") {
            is_code = !is_code;
            continue;
        }
        let is_repeated_blank = line.is_empty() && text.ends_with("\n\n");
        if !is_code && (line.starts_with("![") || is_repeated_blank) {
            continue;
        }
        if is_code && !line.is_empty() {
            text.push_str("    ");
        }
        text.push_str(line);
        text.push('\n');
    }
    text
}
