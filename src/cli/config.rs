//! `sdgen.toml`: the user's own defaults.
//!
//! A key is an option of the plain command by its long name or an alias, with `-` or `_`; a value
//! is what the command line would have. They become clap's default values, so that clap itself
//! reads, checks and overrides them: the command line wins over the environment, and that over the
//! file.

use crate::pipeline::options::unknown_key;
use crate::weights::file::require_finite;
use anyhow::{Context, Error, Result, anyhow, bail};
use clap::error::ErrorKind as ClapErrorKind;
use clap::{Arg, ArgAction, Command};
use std::error::Error as _;
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};

/// Options of the plain command that are of one run, and not for a file.
const NOT_IN_FILE: [&str; 11] = [
    "config",
    "dry-run",
    "from",
    "help",
    "no-config",
    "prompt",
    "resume",
    "shard",
    "sweep",
    "verify",
    "version",
];
/// Options that other commands take from the file too, where they have them.
const OF_ALL_COMMANDS: [&str; 4] = ["device", "dtype", "offline", "threads"];

/// The defaults of one file.
pub struct Config {
    path: PathBuf,
    entries: Vec<Entry>,
}

/// A key with its values: several only where an option may be given again.
struct Entry {
    key: String,
    values: Vec<String>,
    /// From 1.
    line: usize,
}

/// Which file is read.
enum Choice {
    /// The user's own, if it is there.
    Usual,
    Named(PathBuf),
    None,
}

impl Config {
    /// Reads the file that `--config` among the arguments names, or else the user's own. `None` if
    /// that is not there, or with `--no-config`. Errors name the line.
    pub fn find(arguments: &[OsString]) -> Result<Option<Self>> {
        let (path, must_exist) = match Choice::of(arguments) {
            Choice::None => return Ok(None),
            Choice::Named(path) => (path, true),
            Choice::Usual => match usual_path(|name| std::env::var_os(name)) {
                Some(path) => (path, false),
                None => return Ok(None),
            },
        };
        require_finite(&path)?;
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound && !must_exist => return Ok(None),
            text => text.with_context(|| format!("cannot read `{}`", path.display()))?,
        };
        let entries = parse(&text).map_err(|(line, error)| at_line(&path, line, error))?;
        Ok(Some(Self { path, entries }))
    }

    /// Makes these the defaults of the command. Errors name the line of a key that it does not
    /// have, or of a value that its option cannot take.
    pub fn apply(&self, mut command: Command) -> Result<Command> {
        for entry in &self.entries {
            command = entry
                .apply(command)
                .map_err(|error| at_line(&self.path, entry.line, error))?;
        }
        Ok(command)
    }

    /// Where the defaults come from, for the end of the help.
    pub fn footer(&self) -> String {
        let keys: Vec<&str> = self.entries.iter().map(|entry| &*entry.key).collect();
        let path = self.path.display();
        if keys.is_empty() {
            return format!("Defaults: none in {path}");
        }
        format!("Defaults: {} from {path}", keys.join(", "))
    }
}

impl Choice {
    /// The last of `--config` and `--no-config`, before everything else is parsed: what is in the
    /// file is part of the parser.
    fn of(arguments: &[OsString]) -> Self {
        let mut choice = Self::Usual;
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.to_str() {
                Some("--") => break,
                Some("--no-config") => choice = Self::None,
                // clap says what is wrong where nothing follows
                Some("--config") => choice = arguments.next().map_or(choice, Self::named),
                Some(text) => {
                    if let Some(path) = text.strip_prefix("--config=") {
                        choice = Self::named(path);
                    }
                }
                None => {}
            }
        }
        choice
    }

    fn named(path: impl AsRef<OsStr>) -> Self {
        Self::Named(path.as_ref().into())
    }
}

/// `sdgen/sdgen.toml` in the user's folder of configurations.
fn usual_path(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let given = |name: &str| variable(name).filter(|value| !value.is_empty());
    let folder = match given("XDG_CONFIG_HOME") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(&given("HOME")?).join(".config"),
    };
    Some(folder.join("sdgen").join("sdgen.toml"))
}

/// Reads the keys in the order of their lines. Errors come with their line.
fn parse(text: &str) -> Result<Vec<Entry>, (usize, Error)> {
    let line = |at: usize| 1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count();
    let table = DeTable::parse(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        (line(start), anyhow!("{}", error.message()))
    })?;
    let mut entries = vec![];
    for (key, value) in table.get_ref() {
        let line = line(key.span().start);
        let key = key.get_ref().to_string();
        let values = match value.get_ref() {
            DeValue::Array(values) => values
                .iter()
                .map(|value| text_of(&key, value.get_ref()))
                .collect(),
            value => text_of(&key, value).map(|text| vec![text]),
        };
        let values = values.map_err(|error| (line, error))?;
        entries.push(Entry { key, values, line });
    }
    entries.sort_by_key(|entry| entry.line);
    Ok(entries)
}

/// A value as the command line would have it.
fn text_of(key: &str, value: &DeValue) -> Result<String> {
    match value {
        DeValue::String(text) => Ok(text.to_string()),
        DeValue::Integer(number) => Ok(number.to_string()),
        DeValue::Float(number) => Ok(number.to_string()),
        DeValue::Boolean(flag) => Ok(flag.to_string()),
        DeValue::Table(_) => {
            bail!("`{key}` is a table\n\nhint: the keys are not in sections: `steps = 20`")
        }
        DeValue::Array(_) | DeValue::Datetime(_) => {
            bail!("`{key}` takes a text, a number, true or false")
        }
    }
}

impl Entry {
    /// Makes this the default of its option.
    fn apply(&self, command: Command) -> Result<Command> {
        let Self { key, values, .. } = self;
        let Some(arg) = find(&command, &key.replace('_', "-")) else {
            bail!(unknown_key(key, &keys(&command)));
        };
        let is_list = matches!(arg.get_action(), ArgAction::Append);
        if values.len() != 1 && !is_list {
            bail!("`{key}` takes one value, not {}", values.len());
        }
        self.check(&command, arg)?;
        let id = arg.get_id().clone();
        let command = command.mut_arg(&id, |arg| self.set(arg));
        if !OF_ALL_COMMANDS.contains(&&*id.as_str().replace('_', "-")) {
            return Ok(command);
        }
        let names: Vec<String> = command
            .get_subcommands()
            .filter(|other| other.get_arguments().any(|arg| *arg.get_id() == id))
            .map(|other| other.get_name().to_string())
            .collect();
        let set = |command: Command, name: String| {
            command.mut_subcommand(name, |other| other.mut_arg(&id, |arg| self.set(arg)))
        };
        Ok(names.into_iter().fold(command, set))
    }

    /// Errors if the option cannot have these values, as clap's own parser finds.
    fn check(&self, command: &Command, arg: &Arg) -> Result<()> {
        let Self { key, values, .. } = self;
        let is_flag = matches!(arg.get_action(), ArgAction::SetTrue);
        let cause = if is_flag {
            let is_bool = values.iter().all(|value| value.parse::<bool>().is_ok());
            (!is_bool).then(|| "expected true or false".into())
        } else {
            let long = arg.get_long().unwrap_or_default();
            let typed = values.iter().map(|value| format!("--{long}={value}"));
            let parsed = command
                .clone()
                .try_get_matches_from(["sdgen".to_string()].into_iter().chain(typed));
            parsed.err().and_then(|error| cause(&error, arg))
        };
        match cause {
            Some(cause) => bail!("`{key}` cannot be `{}`: {cause}", values.join(", ")),
            None => Ok(()),
        }
    }

    fn set(&self, arg: Arg) -> Arg {
        // a flag shows no default, and clap refuses to hide that
        let is_flag = matches!(arg.get_action(), ArgAction::SetTrue);
        arg.default_values(self.values.clone())
            .hide_default_value(!is_flag)
    }
}

/// Why a value is refused; `None` for an error that is not of the value alone, such as an option
/// that needs another one.
fn cause(error: &clap::Error, arg: &Arg) -> Option<String> {
    let values = arg.get_possible_values();
    let names: Vec<&str> = values.iter().map(|value| value.get_name()).collect();
    match error.kind() {
        ClapErrorKind::InvalidValue if !names.is_empty() => {
            Some(format!("expected one of {}", names.join(", ")))
        }
        ClapErrorKind::InvalidValue | ClapErrorKind::ValueValidation => {
            let cause = error.source().map(|cause| cause.to_string());
            Some(cause.unwrap_or("not a value of this option".into()))
        }
        _ => None,
    }
}

/// The option that a key of the file means.
fn find<'a>(command: &'a Command, key: &str) -> Option<&'a Arg> {
    let mut arguments = command.get_arguments();
    arguments.find(|arg| names(arg).contains(&key))
}

/// An option's names in a file: its long name and its aliases.
fn names(arg: &Arg) -> Vec<&str> {
    let Some(long) = arg.get_long().filter(|long| !NOT_IN_FILE.contains(long)) else {
        return vec![];
    };
    let aliases = arg.get_all_aliases().unwrap_or_default();
    [long].into_iter().chain(aliases).collect()
}

fn keys(command: &Command) -> Vec<&str> {
    command.get_arguments().flat_map(names).collect()
}

/// An error with its file and line.
fn at_line(path: &Path, line: usize, error: Error) -> Error {
    error.context(format!("line {line} of `{}`", path.display()))
}
