//! The work list: which pictures are asked for, before any model is looked at.
//!
//! A pure function of the arguments, the list that `--from` names and those that `--wildcards`
//! holds, so that every machine that reads them sees the same pictures in the same order. Hides how
//! lines and sweeps become options: each value is given to the command line's own parser, so that
//! names, aliases and checks are the same everywhere. Read next: [`crate::pipeline::resolve`], which fills in
//! what the model brings.

use crate::batch::dynamic_prompts::{Dynamic, Template, Wildcards};
use crate::batch::output_path::{self, Destination};
use crate::cli::{DrawArgs, PictureArgs};
use crate::image::Format;
use crate::pipeline::params::Toward;
use crate::sampling::noise::Variation;
use crate::weights::nearest;
use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Args, FromArgMatches};
use image::ImageFormat;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::error::Error;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, IsTerminal, stdin};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Pictures a run may ask for.
const MAX_JOBS: usize = 1_000_000;
/// Options whose values are texts; of all others they are numbers.
const TEXTS: &str = "negative prompt-syntax variation to tile sampler schedule original-size crop target-size output image mask fit";

/// Every picture that is asked for, in order: line by line, there seed by seed, there through the
/// sweeps.
pub struct List {
    /// what lines are counted in, for errors: the file, or stdin
    pub name: String,
    pub items: Vec<Item>,
    /// where pictures go, referred to by the items
    pub outputs: Vec<(Destination, Format)>,
    /// the first seed of each prompt that has none of its own
    pub random_seed: Option<u64>,
}

/// One picture that is asked for.
pub struct Item {
    /// its line in the list, from 1; none for a prompt on the command line
    pub line: Option<usize>,
    pub prompt: Arc<str>,
    pub seed: u64,
    /// as given for it; what is left open is the model's
    pub options: Arc<PictureArgs>,
    pub sweep: Arc<Swept>,
    /// its place in [`List::outputs`]
    pub output: usize,
}

/// What sweeps have set for a picture.
#[derive(Default, Clone)]
pub struct Swept {
    /// for file names: `guidance-3-steps-10`, or nothing
    pub name: String,
    /// for people, one a sweep: `guidance 3`, `steps 10`
    pub labels: Vec<String>,
    /// of the frames of an animation, as if they were a sweep
    pub frame: Option<Frame>,
}

/// A picture on the way to another prompt or seed.
#[derive(Clone, Copy)]
pub struct Frame {
    /// from 0
    pub number: usize,
    /// of the way, 0 to 1
    pub share: f64,
}

impl Item {
    /// How far the first noise goes to that of another seed.
    pub fn variation(&self) -> Option<Variation> {
        let of_frame =
            self.options
                .to_seed
                .zip(self.sweep.frame)
                .map(|(seed, Frame { share, .. })| Variation {
                    seed,
                    strength: share,
                });
        of_frame.or(self.options.variation)
    }

    /// How far it is to another prompt, and to which.
    pub fn to(&self) -> Option<Toward> {
        let Frame { share, .. } = self.sweep.frame?;
        Some(Toward {
            prompt: self.options.to.clone()?,
            share,
        })
    }
}

/// A prompt with what its line says beside it.
struct Prompt {
    line: Option<usize>,
    text: Arc<str>,
    /// options of its own, by name
    keys: Option<Map<String, Value>>,
}

impl List {
    /// Reads the prompt, or the list, that the arguments name. Errors name the line of the list.
    pub fn read(args: &DrawArgs) -> Result<Self> {
        let missing = || anyhow!("no prompt\n\nhint: sdgen \"a frog in a top hat\"");
        let ending = |wanted: &str| {
            args.from
                .as_deref()
                .and_then(Path::extension)
                .is_some_and(|e| e == wanted)
        };
        // a list whose name does not tell is one of objects if its first line is
        let mut is_json = if ending("txt") || args.from.is_none() {
            Some(false)
        } else {
            ending("jsonl").then_some(true)
        };
        let (name, source): (_, Box<dyn BufRead>) = match (&args.from, args.prompt.as_deref()) {
            (Some(_), Some(_)) => bail!(
                "a prompt and `--from` cannot be used together\n\nhint: put the prompt into the list"
            ),
            (None, Some(prompt)) if prompt != "-" => {
                return Self::of(
                    args,
                    String::new(),
                    [Ok(Prompt {
                        line: None,
                        text: prompt.into(),
                        keys: None,
                    })],
                );
            }
            (None, None) if stdin().is_terminal() => return Err(missing()),
            (Some(path), None) if path != "-" => {
                let file = File::open(path)
                    .with_context(|| format!("cannot read the list `{}`", path.display()))?;
                (
                    format!("`{}`", path.display()),
                    Box::new(BufReader::new(file)),
                )
            }
            _ => ("stdin".into(), Box::new(stdin().lock())),
        };
        let prompts = (1..).zip(source.lines()).filter_map(|(number, line)| {
            let line = line.map_err(|error| match error.kind() {
                ErrorKind::InvalidData => anyhow!("it cannot be read as UTF-8 text"),
                _ => error.into(),
            });
            let prompt = line.and_then(|line| {
                let line = line.trim_start_matches('\u{feff}');
                if line.trim().is_empty() {
                    return Ok(None);
                }
                // templates may begin with braces, too
                let object = line.trim_start().strip_prefix('{').is_some_and(|rest| {
                    args.dynamic.is_none() || rest.trim_start().starts_with('"')
                });
                if *is_json.get_or_insert(object) {
                    return Prompt::parse(number, line).map(Some);
                }
                Ok(Some(Prompt {
                    line: Some(number),
                    text: line.into(),
                    keys: None,
                }))
            });
            prompt
                .with_context(|| format!("line {number} of {name}"))
                .transpose()
        });
        let list = Self::of(args, name.clone(), prompts)?;
        match &args.from {
            _ if !list.items.is_empty() => Ok(list),
            Some(_) => bail!("{name} has no prompts"),
            None => Err(missing()),
        }
    }

    /// The pictures of some prompts.
    fn of(
        args: &DrawArgs,
        name: String,
        prompts: impl IntoIterator<Item = Result<Prompt>>,
    ) -> Result<Self> {
        let mut options = Options::new();
        let sweeps = args
            .sweep
            .iter()
            .map(|text| options.sweep(text))
            .collect::<Result<Vec<_>>>()?;
        if let Some((key, _)) = sweeps
            .iter()
            .enumerate()
            .find_map(|(i, sweep)| sweeps.iter().take(i).find(|other| other.0 == sweep.0))
        {
            bail!(
                "`--sweep {key}` is given twice\n\nhint: one sweep takes all its values: `--sweep {key}=A,B,C`"
            );
        }
        // lines without options of their own share those of the command line, which alone may be
        // none that can be drawn
        let mut plain = vec![];
        let mut list = Self {
            name,
            items: vec![],
            outputs: vec![],
            random_seed: None,
        };
        let mut outputs = HashMap::new();
        let folder = args.wildcards.as_deref().unwrap_or(Path::new("wildcards"));
        let mut dynamic = args.dynamic.map(|how| (how, Wildcards::new(folder)));
        for prompt in prompts {
            let Prompt { line, text, keys } = prompt?;
            if keys.is_none() && plain.is_empty() {
                plain = options.swept(&args.picture, &sweeps)?;
            }
            let own = keys
                .map(|keys| {
                    options
                        .of_line(&args.picture, keys)
                        .and_then(|own| options.swept(&own, &sweeps))
                })
                .transpose();
            let added = own.and_then(|own| {
                let variants = own.as_ref().unwrap_or(&plain);
                let texts = variants
                    .iter()
                    .map(|(options, _)| Texts::of(&text, options, &mut dynamic))
                    .collect::<Result<Vec<_>>>()?;
                list.add(line, variants, &texts, args.format, &mut outputs)
            });
            list.of_line(line, added)?;
        }
        Ok(list)
    }

    /// A result whose error names the line that it comes from, if it is one of a list.
    pub fn of_line<T>(&self, line: Option<usize>, result: Result<T>) -> Result<T> {
        match line {
            Some(line) => result.with_context(|| format!("line {line} of {}", self.name)),
            None => result,
        }
    }

    /// Adds the pictures of one prompt: seed by seed, there text by text, there every variant of
    /// its options.
    fn add(
        &mut self,
        line: Option<usize>,
        variants: &[Variant],
        texts: &[Texts],
        format: Option<Format>,
        outputs: &mut HashMap<Option<OsString>, usize>,
    ) -> Result<()> {
        let seeds = variants
            .iter()
            .map(|(options, _)| self.seeds(options))
            .collect::<Result<Vec<_>>>()?;
        let (Some((first, _)), Some(count)) = (variants.first(), seeds.iter().map(Vec::len).min())
        else {
            return Ok(());
        };
        let of_seed = texts
            .iter()
            .map(Texts::count)
            .fold(0, usize::saturating_add);
        let total = self
            .items
            .len()
            .saturating_add(count.saturating_mul(of_seed));
        ensure!(
            total <= MAX_JOBS,
            "this asks for more than {MAX_JOBS} pictures\n\nhint: check `--seed`, `--count` and `--sweep`"
        );
        let output = match outputs.get(&first.output) {
            Some(known) => *known,
            None => {
                self.outputs
                    .push(Destination::parse(first.output.as_deref(), format)?);
                *outputs
                    .entry(first.output.clone())
                    .or_insert(self.outputs.len() - 1)
            }
        };
        for i in 0..count {
            let seeds: Vec<u64> = seeds
                .iter()
                .filter_map(|seeds| seeds.get(i).copied())
                .collect();
            let texts: Vec<_> = texts
                .iter()
                .zip(&seeds)
                .map(|(texts, seed)| texts.at(*seed))
                .collect();
            for nth in 0..texts.iter().map(Vec::len).max().unwrap_or(0) {
                for (((_, sweep), texts), &seed) in variants.iter().zip(&texts).zip(&seeds) {
                    let text = texts.get(nth).cloned();
                    let item = |(prompt, options)| Item {
                        line,
                        prompt,
                        seed,
                        options,
                        sweep: sweep.clone(),
                        output,
                    };
                    self.items.extend(text.map(item));
                }
            }
        }
        Ok(())
    }

    fn seeds(&mut self, options: &PictureArgs) -> Result<Vec<u64>> {
        let count = options.count.unwrap_or(1);
        match &options.seed {
            Some(seeds) => seeds.values(count),
            None => {
                let first = *self.random_seed.get_or_insert_with(random_seed);
                Ok((0..count as u64).map(|i| first + i).collect())
            }
        }
    }
}

impl Prompt {
    /// Reads a line of a `.jsonl` list.
    fn parse(line: usize, text: &str) -> Result<Self> {
        let error = |error: serde_json::Error| {
            anyhow!(
                "it is no JSON object: {}",
                error.to_string().replace(" at line 1 column", ", column")
            )
        };
        let mut keys: Map<String, Value> = serde_json::from_str(text).map_err(error)?;
        match keys.remove("prompt") {
            Some(Value::String(prompt)) => Ok(Self {
                line: Some(line),
                text: prompt.into(),
                keys: Some(keys),
            }),
            _ => bail!(
                "it has no text under the key `prompt`\n\nhint: a line looks like {{\"prompt\": \"a frog\", \"seed\": 7}}"
            ),
        }
    }
}

/// What templates come to, with the options that say the other texts.
enum Texts {
    /// for every seed
    Fixed(Vec<(Arc<str>, Arc<PictureArgs>)>),
    /// by the seed: of the prompt, the negative one and the one that it goes to
    Drawn {
        templates: [Option<Template>; 3],
        options: Arc<PictureArgs>,
    },
}

impl Texts {
    /// Reads the templates of a prompt and its options, if these are any.
    fn of(
        prompt: &Arc<str>,
        options: &Arc<PictureArgs>,
        dynamic: &mut Option<(Dynamic, Wildcards)>,
    ) -> Result<Self> {
        let Some((how, wildcards)) = dynamic else {
            return Ok(Self::Fixed(vec![(prompt.clone(), options.clone())]));
        };
        let mut template = |name: &str, text: Option<&Arc<str>>| {
            text.map(|text| Template::parse(text, wildcards))
                .transpose()
                .with_context(|| format!("the {name}"))
        };
        let templates = [
            template("prompt", Some(prompt))?,
            template("negative prompt", options.negative.as_ref())?,
            template("prompt of `--to`", options.to.as_ref())?,
        ];
        if *how == Dynamic::Random {
            return Ok(Self::Drawn {
                templates,
                options: options.clone(),
            });
        }
        let count = templates
            .iter()
            .flatten()
            .map(Template::count)
            .fold(1, u64::saturating_mul);
        let hint = "`--dynamic` alone draws one of them for each seed";
        ensure!(
            count <= MAX_JOBS as u64,
            "this template comes to more than {MAX_JOBS} texts\n\nhint: {hint}"
        );
        let [prompts, negatives, tos] = templates.map(|template| match template {
            Some(template) => template
                .all()
                .into_iter()
                .map(|text| Some(Arc::from(text)))
                .collect(),
            None => vec![None],
        });
        let mut all = vec![];
        let others = negatives.iter().flat_map(|negative| {
            tos.iter()
                .map(move |to| with_texts(options, negative.clone(), to.clone()))
        });
        let others: Vec<_> = others.collect();
        for prompt in prompts.into_iter().flatten() {
            all.extend(
                others
                    .iter()
                    .map(|options| (Arc::clone(&prompt), options.clone())),
            );
        }
        Ok(Self::Fixed(all))
    }

    /// How many there are for a seed.
    fn count(&self) -> usize {
        match self {
            Self::Fixed(all) => all.len(),
            Self::Drawn { .. } => 1,
        }
    }

    fn at(&self, seed: u64) -> Vec<(Arc<str>, Arc<PictureArgs>)> {
        match self {
            Self::Fixed(all) => all.clone(),
            Self::Drawn { templates, options } => {
                let [text, negative, to] = templates
                    .each_ref()
                    .map(|template| Some(Arc::<str>::from(template.as_ref()?.draw(seed))));
                vec![(text.unwrap_or_default(), with_texts(options, negative, to))]
            }
        }
    }
}

/// The options with these texts; the same ones where nothing changes.
fn with_texts(
    options: &Arc<PictureArgs>,
    negative: Option<Arc<str>>,
    to: Option<Arc<str>>,
) -> Arc<PictureArgs> {
    if options.negative == negative && options.to == to {
        return options.clone();
    }
    Arc::new(PictureArgs {
        negative,
        to,
        ..(**options).clone()
    })
}

/// Options by their long names, read as the command line reads them.
struct Options(clap::Command);

/// `--sweep`: a key and its values.
type Sweep = (String, Vec<String>);
/// Options, and what sweeps have set there.
type Variant = (Arc<PictureArgs>, Arc<Swept>);

impl Options {
    fn new() -> Self {
        Self(PictureArgs::augment_args_for_update(
            clap::Command::new("sdgen")
                .no_binary_name(true)
                .disable_help_flag(true),
        ))
    }

    /// The long name of an option that may be called by an alias, with `_` for `-` too. Errors name
    /// the nearest.
    fn long_name(&self, key: &str) -> Result<String> {
        let wanted = key.replace('_', "-");
        let names = |option: &clap::Arg| {
            option
                .get_all_aliases()
                .unwrap_or_default()
                .into_iter()
                .chain(option.get_long())
                .map(String::from)
                .collect::<Vec<_>>()
        };
        if let Some(option) = self
            .0
            .get_arguments()
            .find(|option| names(option).contains(&wanted))
        {
            return Ok(option.get_long().unwrap_or_default().into());
        }
        let all: Vec<String> = ["prompt".into()]
            .into_iter()
            .chain(self.0.get_arguments().flat_map(names))
            .collect();
        let hint = match nearest(&wanted, all.iter().map(String::as_str)) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("keys are {}", all.join(", ")),
        };
        bail!("unknown key `{key}`\n\nhint: {hint}")
    }

    /// Sets the option of this long name. Errors say what it may be.
    fn set(&mut self, options: &mut PictureArgs, long: &str, value: &str) -> Result<()> {
        let matches = self
            .0
            .try_get_matches_from_mut([format!("--{long}={value}")]);
        let set = matches.and_then(|matches| options.update_from_arg_matches(&matches));
        set.map_err(|error| {
            let cause = error
                .source()
                .map(|cause| format!(": {cause}"))
                .unwrap_or_default();
            anyhow!("`{long}` cannot be `{value}`{cause}")
        })
    }

    /// The options of a line that brings its own.
    fn of_line(&mut self, base: &PictureArgs, keys: Map<String, Value>) -> Result<PictureArgs> {
        let mut options = base.clone();
        for (key, value) in keys {
            let long = self.long_name(&key)?;
            let is_text = TEXTS.split(' ').any(|name| name == long);
            let value = match value {
                // what programs write for an option that is not given
                Value::Null => continue,
                Value::String(text) if is_text || matches!(&*long, "seed" | "extend" | "hires") => {
                    text
                }
                Value::Number(number) if !is_text => number.to_string(),
                other => bail!(
                    "`{key}` wants a {}, not {other}",
                    if is_text { "text" } else { "number" }
                ),
            };
            self.set(&mut options, &long, &value)?;
        }
        Ok(options)
    }

    /// Reads `KEY=V1,V2,...`.
    fn sweep(&mut self, text: &str) -> Result<Sweep> {
        let Some((key, values)) = text
            .split_once('=')
            .filter(|(_, values)| !values.is_empty())
        else {
            bail!("`--sweep {text}` has no values\n\nhint: write them as `--sweep guidance=3,5,7`");
        };
        let long = self
            .long_name(key)
            .with_context(|| format!("`--sweep {text}`"))?;
        let values = match &*long {
            "count" | "crop" | "extend" | "frames" | "output" => {
                bail!("`--sweep` cannot vary `{long}`")
            }
            "seed" => values
                .parse::<Seeds>()?
                .values(1)?
                .iter()
                .map(u64::to_string)
                .collect(),
            _ => values.split(',').map(String::from).collect(),
        };
        Ok((long, values))
    }

    /// Every combination of the sweeps' values over some options, the last sweep innermost.
    fn swept(&mut self, base: &PictureArgs, sweeps: &[Sweep]) -> Result<Vec<Variant>> {
        let mut variants = match base.image.as_deref().filter(|image| image.is_dir()) {
            Some(folder) => pictures_in(folder, base)?,
            None => vec![(base.clone(), Swept::default())],
        };
        for (long, values) in sweeps {
            let mut next = vec![];
            for (options, Swept { name, labels, .. }) in &variants {
                for value in values {
                    let mut options = options.clone();
                    self.set(&mut options, long, value)
                        .with_context(|| format!("`--sweep {long}`"))?;
                    let labels = labels
                        .iter()
                        .cloned()
                        .chain([format!("{long} {value}")])
                        .collect();
                    let value = if value.parse::<f64>().is_ok() {
                        value.clone()
                    } else {
                        output_path::slug(value, "none")
                    };
                    let joint = if name.is_empty() { "" } else { "-" };
                    next.push((
                        options,
                        Swept {
                            name: format!("{name}{joint}{long}-{value}"),
                            labels,
                            frame: None,
                        },
                    ));
                }
            }
            variants = next;
        }
        let mut all = vec![];
        for (options, swept) in variants {
            let (frames, options) = (frames(&options, swept)?, Arc::new(options));
            all.extend(
                frames
                    .into_iter()
                    .map(|swept| (options.clone(), Arc::new(swept))),
            );
        }
        Ok(all)
    }
}

/// What is swept, once for each frame of an animation, or alone where there is none.
fn frames(options: &PictureArgs, swept: Swept) -> Result<Vec<Swept>> {
    let PictureArgs {
        to,
        to_seed,
        frames,
        variation,
        ..
    } = options;
    let to = [to.as_ref().map(|_| "--to"), to_seed.map(|_| "--to-seed")]
        .into_iter()
        .flatten()
        .next();
    let frames = match (to, frames) {
        (None, None) => return Ok(vec![swept]),
        (Some(_), Some(frames)) => *frames,
        (Some(option), None) => {
            bail!(
                "`{option}` does not say in how many pictures\n\nhint: `--frames 24`, the first and the last included"
            )
        }
        (None, Some(_)) => bail!(
            "`--frames` does not say to what\n\nhint: `--to \"another prompt\"`, `--to-seed 9`, or both"
        ),
    };
    ensure!(
        to_seed.is_none() || variation.is_none(),
        "`--variation` and `--to-seed` both change the noise\n\nhint: leave one of them out"
    );
    let frame = |number: usize| {
        let joint = if swept.name.is_empty() { "" } else { "-" };
        let labels = swept
            .labels
            .iter()
            .cloned()
            .chain([format!("frame {number}")])
            .collect();
        let frame = Frame {
            number,
            share: number as f64 / (frames - 1) as f64,
        };
        Swept {
            name: format!("{}{joint}{number:04}", swept.name),
            labels,
            frame: Some(frame),
        }
    };
    Ok((0..frames).map(frame).collect())
}

/// The options with each picture of a folder for a source, by name.
fn pictures_in(folder: &Path, base: &PictureArgs) -> Result<Vec<(PictureArgs, Swept)>> {
    let read = || -> std::io::Result<Vec<PathBuf>> {
        std::fs::read_dir(folder)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    let mut paths =
        read().with_context(|| format!("cannot read the folder `{}`", folder.display()))?;
    paths.retain(|path| path.is_file() && ImageFormat::from_path(path).is_ok());
    paths.sort();
    ensure!(
        !paths.is_empty(),
        "`{}` is a folder without pictures",
        folder.display()
    );
    let variant = |path: PathBuf| {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let swept = Swept {
            name: output_path::slug(&name, "picture"),
            labels: vec![format!("image {name}")],
            frame: None,
        };
        (
            PictureArgs {
                image: Some(path),
                ..base.clone()
            },
            swept,
        )
    };
    Ok(paths.into_iter().map(variant).collect())
}

/// A seed that is easy to type again: 32 bits of the system's randomness.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // the standard library keys every RandomState from the system's generator
    let hasher = std::collections::hash_map::RandomState::new().build_hasher();
    hasher.finish() & 0xffff_ffff
}

/// `--seed`: numbers and ranges, separated by commas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seeds(Vec<std::ops::Range<u64>>);

impl Seeds {
    /// The seeds; with a count of n, each single number N stands for N, N+1, ... N+n-1.
    fn values(&self, count: usize) -> Result<Vec<u64>> {
        let several = self.0.len() > 1 || self.0.iter().any(|r| r.end - r.start > 1);
        if several && count > 1 {
            bail!(
                "`--count` needs a single `--seed`\n\nhint: write the seeds as a range, for example `--seed 0..{count}`"
            );
        }
        let total = self
            .0
            .iter()
            .map(|r| r.end - r.start)
            .fold(0u64, u64::saturating_add);
        if total > MAX_JOBS as u64 {
            bail!("`--seed` names {total} seeds, more than {MAX_JOBS}");
        }
        let values = self.0.iter().cloned().flatten();
        Ok(values
            .flat_map(|seed| (0..count as u64).map(move |i| seed.wrapping_add(i)))
            .collect())
    }
}

impl std::str::FromStr for Seeds {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |s: &str| {
            s.trim()
                .parse::<u64>()
                .with_context(|| format!("`{s}` is no seed: a number from 0 to {}", u64::MAX - 1))
        };
        let range = |part: &str| match part.split_once("..") {
            Some((from, to)) => {
                let (from, to) = (number(from)?, number(to)?);
                if from >= to {
                    bail!("the range `{part}` is empty");
                }
                Ok(from..to)
            }
            None => {
                let seed = number(part)?;
                Ok(seed..seed.checked_add(1).context("this seed is too large")?)
            }
        };
        Ok(Self(text.split(',').map(range).collect::<Result<_>>()?))
    }
}
