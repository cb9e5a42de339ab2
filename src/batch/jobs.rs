//! The work list: which images are asked for, before any model is looked at.
//!
//! A pure function of the options, the list that `--from` names and the files that `--wildcards`
//! holds, so that every machine that reads them sees the same images in the same order. Hides how
//! lines, sweeps, templates and frames multiply. Read next: [`crate::pipeline::resolve`], which
//! fills in what the model brings.

use crate::batch::dynamic_prompts::{Dynamic, Template, Wildcards};
use crate::batch::output_path::{self, Destination};
use crate::image::Format;
use crate::pipeline::options::{JobOptions, MAX_JOBS, Seeds};
use crate::pipeline::settings::PromptBlend;
use crate::sampling::noise::Variation;
use crate::text::prompt::Syntax;
use crate::weights::file::stand_in;
use anyhow::{Context, Result, anyhow, bail, ensure};
use image::ImageFormat;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, IsTerminal, Read, stdin};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Options whose values contain commas, or that say how many images there are.
const NOT_SWEPT: [&str; 6] = ["batch-count", "count", "crop", "extend", "frames", "output"];

/// Extensions of files that hold prompts in another way than a list.
const TABLES: [&str; 7] = ["csv", "tsv", "yaml", "yml", "toml", "xlsx", "ods"];

/// What errors say of lists.
const OBJECTS: &str = "a list is a .txt of prompts, or a .jsonl of objects such as `{\"prompt\": \"a frog\", \"seed\": 7}`";

/// The most bytes of a line of a list; a prompt has far fewer.
const MAX_LINE_BYTES: u64 = 1 << 20;

/// Where prompts come from, and what is made of each of them.
#[derive(Debug, Clone, Copy)]
pub struct JobSource<'a> {
    /// One prompt; `-` for a prompt a line on stdin.
    pub prompt: Option<&'a str>,
    /// A list; `-` for stdin.
    pub from: Option<&'a Path>,
    /// The options of every image whose line has none of its own.
    pub options: &'a JobOptions,
    /// `KEY=V1,V2,...`
    pub sweeps: &'a [String],
    /// Whether prompts are templates, and what becomes of them.
    pub dynamic: Option<Dynamic>,
    /// The folder of the lists that templates name.
    pub wildcards: &'a Path,
    /// The file format of every image; `None`: as its name says.
    pub format: Option<Format>,
    /// Whether a line's `output` may lead out of the folder of the options' one.
    pub outputs_anywhere: bool,
}

impl JobSource<'_> {
    /// Where a line's `output` leads: below the folder of the options' one. Errors if it leads out
    /// of that and may not.
    fn place_output(&self, output: PathBuf) -> Result<PathBuf> {
        if output.as_os_str() == "-" {
            return Ok(output);
        }
        let folder = self
            .options
            .output
            .as_deref()
            .map_or(PathBuf::new(), output_path::folder_of_output);
        let stays = |part: Component| matches!(part, Component::Normal(_) | Component::CurDir);
        ensure!(
            self.outputs_anywhere || output.components().all(stays),
            "`output` `{}` leads out of {}\n\nhint: `--outputs-anywhere` allows that; `-o FOLDER/` is where all outputs of a list go",
            output.display(),
            match folder.as_os_str().is_empty() {
                true => "the current folder".into(),
                false => format!("`{}`", folder.display()),
            }
        );
        Ok(folder.join(output))
    }
}

/// All images that are asked for, in order: line by line, within a line seed by seed, within a
/// seed by the sweeps.
pub struct JobList {
    /// The place that lines are counted in, for errors: the file, or stdin.
    pub name: String,
    pub jobs: Vec<JobSpec>,
    /// Where images go; [`JobSpec::output`] is an index into these.
    pub outputs: Vec<(Destination, Format)>,
    /// The first seed of every prompt that names none.
    pub random_seed: Option<u64>,
}

/// One image that is asked for.
#[derive(Debug, Clone)]
pub struct JobSpec {
    /// Its line in the list, from 1; `None` for a prompt on the command line.
    pub line: Option<usize>,
    pub prompt: Arc<str>,
    pub seed: u64,
    /// Its options; shared by all images that differ only in seed or prompt.
    pub options: Arc<JobOptions>,
    pub sweep: Arc<SweepPoint>,
    /// Index of its destination in the list's outputs.
    pub output: usize,
}

impl JobSpec {
    /// How far the initial noise moves to that of another seed.
    pub fn variation(&self) -> Option<Variation> {
        let of_frame = self
            .options
            .to_seed
            .zip(self.sweep.frame)
            .map(|(seed, frame)| Variation {
                seed,
                strength: frame.fraction,
            });
        of_frame.or(self.options.variation)
    }

    /// The other prompt whose embedding is mixed in, and its weight.
    pub fn blend(&self) -> Option<PromptBlend> {
        let FrameIndex { fraction, .. } = self.sweep.frame?;
        Some(PromptBlend {
            prompt: self.options.to.clone()?,
            weight: fraction,
        })
    }
}

/// One combination of the values of all sweeps.
#[derive(Debug, Clone, Default)]
pub struct SweepPoint {
    /// For file names: `guidance-3-steps-10`; empty without a sweep.
    pub name: String,
    /// For people, one for each sweep: `guidance 3`, `steps 10`.
    pub labels: Vec<String>,
    /// The frame of an animation, which is the innermost sweep.
    pub frame: Option<FrameIndex>,
}

impl SweepPoint {
    /// This point with one more value.
    fn with(&self, name: &str, value: &str) -> Self {
        let labels = self.labels.iter().cloned();
        let in_name = if value.parse::<f64>().is_ok() {
            value.into()
        } else {
            output_path::slug(value, "none")
        };
        let joint = if self.name.is_empty() { "" } else { "-" };
        Self {
            name: format!("{}{joint}{name}-{in_name}", self.name),
            labels: labels.chain([format!("{name} {value}")]).collect(),
            frame: None,
        }
    }

    /// This point as a frame of an animation.
    fn with_frame(&self, frame: FrameIndex) -> Self {
        let FrameIndex { number, .. } = frame;
        let labels = self.labels.iter().cloned();
        let joint = if self.name.is_empty() { "" } else { "-" };
        Self {
            name: format!("{}{joint}{number:04}", self.name),
            labels: labels.chain([format!("frame {number}")]).collect(),
            frame: Some(frame),
        }
    }
}

/// An image on the way to another prompt or seed.
#[derive(Debug, Clone, Copy)]
pub struct FrameIndex {
    /// From 0.
    pub number: usize,
    /// How far along the way, 0 to 1.
    pub fraction: f64,
}

/// A prompt with what its line says beside it.
struct Prompt {
    line: Option<usize>,
    text: Arc<str>,
    /// Options of its own, by name; `None` for a line of plain text.
    keys: Option<Map<String, Value>>,
}

/// Options, and the point of the sweeps that they are of.
type Variant = (Arc<JobOptions>, Arc<SweepPoint>);

impl JobList {
    /// Reads the prompt, or the list. Errors name the line of the list.
    pub fn read(source: &JobSource) -> Result<Self> {
        let missing = "no prompt\n\nhint: sdgen \"a frog in a top hat\"";
        if let Some(prompts) = swept_prompts(source.sweeps)? {
            ensure!(
                source.prompt.is_none() && source.from.is_none(),
                "`--sweep prompt` and another prompt cannot be used together\n\nhint: leave that out, or put all prompts into a list for `--from`"
            );
            let prompts = prompts.iter().map(|prompt| Ok(Prompt::plain(None, prompt)));
            return Self::of(source, String::new(), prompts);
        }
        let (name, reader): (_, Box<dyn BufRead>) = match (source.from, source.prompt) {
            (Some(_), Some(_)) => bail!(
                "a prompt and `--from` cannot be used together\n\nhint: put the prompt into the list"
            ),
            (None, Some(prompt)) if prompt != "-" => {
                let prompt = Prompt::plain(None, prompt);
                return Self::of(source, String::new(), [Ok(prompt)]);
            }
            (None, None) if stdin().is_terminal() => bail!(missing),
            (Some(path), None) if path != "-" => {
                let file = File::open(path)
                    .with_context(|| format!("cannot read the list `{}`", path.display()))?;
                let name = format!("`{}`", path.display());
                (name, Box::new(BufReader::new(file)))
            }
            _ => ("stdin".into(), Box::new(stdin().lock())),
        };
        let list = Self::of(source, name.clone(), prompts(source, &name, reader))?;
        match source.from {
            _ if !list.jobs.is_empty() => Ok(list),
            Some(_) => bail!("{name} has no prompts"),
            None => bail!(missing),
        }
    }

    /// Multiplies prompts by their seeds, templates, sweeps and frames.
    fn of(
        source: &JobSource,
        name: String,
        prompts: impl IntoIterator<Item = Result<Prompt>>,
    ) -> Result<Self> {
        let sweeps = Sweep::parse_all(source.sweeps)?;
        let mut list = Self {
            name,
            jobs: vec![],
            outputs: vec![],
            random_seed: None,
        };
        let mut outputs = HashMap::new();
        let mut dynamic = source
            .dynamic
            .map(|how| (how, Wildcards::new(source.wildcards)));
        // lines without options of their own share those of the command line; these are looked at
        // only if there is such a line, as alone they may be contradictory
        let mut shared = vec![];
        for prompt in prompts {
            let Prompt { line, text, keys } = prompt?;
            if keys.is_none() && shared.is_empty() {
                shared = variants(source.options, &sweeps)?;
            }
            let own = keys
                .map(|keys| {
                    let mut options = options_of_line(keys)?;
                    options.output = options
                        .output
                        .map(|output| source.place_output(output))
                        .transpose()?;
                    variants(&options.over(source.options), &sweeps)
                })
                .transpose();
            let added = own.and_then(|own| {
                let variants = own.as_ref().unwrap_or(&shared);
                let texts = variants
                    .iter()
                    .map(|(options, _)| Texts::of(&text, options, &mut dynamic))
                    .collect::<Result<Vec<_>>>()?;
                list.add(line, variants, &texts, source.format, &mut outputs)
            });
            list.of_line(line, added)?;
        }
        Ok(list)
    }

    /// Adds the line of the list to an error, for a result that comes from a list.
    pub fn of_line<T>(&self, line: Option<usize>, result: Result<T>) -> Result<T> {
        match line {
            Some(line) => result.with_context(|| format!("line {line} of {}", self.name)),
            None => result,
        }
    }

    /// Adds the images of one prompt: seed by seed, within a seed text by text, within a text every
    /// variant of its options.
    fn add(
        &mut self,
        line: Option<usize>,
        variants: &[Variant],
        texts: &[Texts],
        format: Option<Format>,
        outputs: &mut HashMap<Option<PathBuf>, usize>,
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
            .jobs
            .len()
            .saturating_add(count.saturating_mul(of_seed));
        ensure!(
            total <= MAX_JOBS,
            "this asks for more than {MAX_JOBS} pictures\n\nhint: check `--seed`, `--count` and `--sweep`"
        );
        let output = self.output(first, format, outputs)?;
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
                    let job = |(prompt, options)| JobSpec {
                        line,
                        prompt,
                        seed,
                        options,
                        sweep: sweep.clone(),
                        output,
                    };
                    self.jobs.extend(texts.get(nth).cloned().map(job));
                }
            }
        }
        Ok(())
    }

    /// The index of the options' destination, which is added if it is new.
    fn output(
        &mut self,
        options: &JobOptions,
        format: Option<Format>,
        outputs: &mut HashMap<Option<PathBuf>, usize>,
    ) -> Result<usize> {
        if let Some(index) = outputs.get(&options.output) {
            return Ok(*index);
        }
        let typed = options.output.as_deref().map(Path::as_os_str);
        let index = self.outputs.len();
        self.outputs.push(Destination::parse(typed, format)?);
        outputs.insert(options.output.clone(), index);
        Ok(index)
    }

    fn seeds(&mut self, options: &JobOptions) -> Result<Vec<u64>> {
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

/// The prompts of a list, which is one of objects if its name or else its first line says so.
fn prompts<'a>(
    source: &'a JobSource,
    name: &'a str,
    reader: impl BufRead + 'a,
) -> impl Iterator<Item = Result<Prompt>> + 'a {
    let extension = source.from.and_then(Path::extension);
    let extension = extension.and_then(|extension| extension.to_str());
    let is_table = extension.is_some_and(|extension| TABLES.contains(&extension));
    let mut is_json = match extension {
        Some("jsonl") => Some(true),
        Some("txt") => Some(false),
        _ => source.from.is_none().then_some(false),
    };
    (1..).zip(lines(reader)).filter_map(move |(number, line)| {
        let prompt = line.and_then(|line| {
            let line = line.trim_start_matches('\u{feff}');
            // comments as in lists of wildcards
            if line.trim().is_empty() || line.trim_start().starts_with('#') {
                return Ok(None);
            }
            let is_plain = source.options.prompt_syntax == Some(Syntax::Plain);
            ensure!(
                is_plain || !is_options(line),
                "`{}` are options, which a line of text cannot have\n\nhint: `{{\"prompt\": \"a frog\", \"seed\": 7}}`, in a list whose name ends in .jsonl",
                line.trim()
            );
            ensure!(
                !is_table,
                "the list is a table or a document by its name, not a list\n\nhint: {OBJECTS}"
            );
            if is_json.is_none() || is_json == Some(false) && number == 1 {
                refuse_other_formats(line)?;
            }
            // templates may begin with braces, too
            let looks_like_json = line
                .trim_start()
                .strip_prefix('{')
                .is_some_and(|rest| source.dynamic.is_none() || rest.trim_start().starts_with('"'));
            if *is_json.get_or_insert(looks_like_json) {
                return Prompt::parse(number, line).map(Some);
            }
            ensure!(
                source.from.is_none() || is_plain || source.dynamic.is_some() || !is_object(line),
                "it is a JSON object, in a list of texts\n\nhint: objects are read with `--from`, of a list whose name ends in .jsonl or whose first line is one"
            );
            Ok(Some(Prompt::plain(Some(number), line)))
        });
        prompt
            .with_context(|| format!("line {number} of {name}"))
            .transpose()
    })
}

/// Errors if the first line of a list says that it is no list: a JSON array, a web page, a pointer
/// to the file itself.
fn refuse_other_formats(line: &str) -> Result<()> {
    let start = line.trim_start();
    let of_array = start.strip_prefix('[').map(str::trim_start);
    if start == "[" || of_array.is_some_and(|rest| rest.starts_with("{\"") || rest.starts_with('"'))
    {
        bail!(
            "it is a JSON array, which has no prompt in a line\n\nhint: `jq -c '.[]'` makes a .jsonl list of it, with an object in each line"
        );
    }
    let keys = JobOptions::all_keys();
    let columns: Vec<&str> = line.split([',', '\t', ';']).map(str::trim).collect();
    ensure!(
        columns.len() < 2
            || !columns
                .iter()
                .all(|column| *column == "prompt" || keys.contains(column)),
        "it is the head of a table\n\nhint: {OBJECTS}"
    );
    match stand_in(line.as_bytes()) {
        Some((what, hint)) => bail!("the list {what}\n\nhint: {hint}"),
        None => Ok(()),
    }
}

/// The lines of a text, without their ends. Errors if one is no UTF-8, or too long.
fn lines(mut reader: impl BufRead) -> impl Iterator<Item = Result<String>> {
    std::iter::from_fn(move || {
        let mut line = vec![];
        let read = (&mut reader)
            .take(MAX_LINE_BYTES)
            .read_until(b'\n', &mut line);
        match read {
            Ok(0) => return None,
            Ok(_) => (),
            Err(error) => return Some(Err(error.into())),
        }
        if line.len() as u64 == MAX_LINE_BYTES && !line.ends_with(b"\n") {
            return Some(Err(anyhow!(
                "it is longer than {MAX_LINE_BYTES} bytes\n\nhint: a list has a prompt, or a JSON object, in each line"
            )));
        }
        let end = line.strip_suffix(b"\n").map_or(line.len(), |line| {
            line.strip_suffix(b"\r").unwrap_or(line).len()
        });
        line.truncate(end);
        Some(String::from_utf8(line).context("it cannot be read as UTF-8 text"))
    })
}

/// Whether a line is a JSON object.
fn is_object(line: &str) -> bool {
    line.trim_start().starts_with('{') && serde_json::from_str::<Map<String, Value>>(line).is_ok()
}

/// Whether a line looks like `--prompt "a cat" --steps 3`.
fn is_options(line: &str) -> bool {
    let name = line.trim_start().strip_prefix("--");
    name.is_some_and(|name| name.starts_with(|c: char| c.is_ascii_alphabetic()))
}

impl Prompt {
    fn plain(line: Option<usize>, text: &str) -> Self {
        Self {
            line,
            text: text.into(),
            keys: None,
        }
    }

    /// Reads a line of a `.jsonl` list.
    fn parse(line: usize, text: &str) -> Result<Self> {
        let error = |error: serde_json::Error| {
            anyhow!(
                "it is not a JSON object: {}",
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

/// The texts of a prompt's templates, with the options that hold the other texts.
enum Texts {
    /// The same texts for every seed.
    Fixed(Vec<(Arc<str>, Arc<JobOptions>)>),
    /// One text for each seed; the templates are those of the prompt, the negative prompt and the
    /// prompt that an animation goes to.
    Drawn {
        templates: [Option<Template>; 3],
        options: Arc<JobOptions>,
    },
}

impl Texts {
    /// Reads the templates of a prompt and its options, if these are templates.
    fn of(
        prompt: &Arc<str>,
        options: &Arc<JobOptions>,
        dynamic: &mut Option<(Dynamic, Wildcards)>,
    ) -> Result<Self> {
        let Some((how, wildcards)) = dynamic else {
            return Ok(Self::Fixed(vec![(prompt.clone(), options.clone())]));
        };
        let how = *how;
        let parse = |text: &Arc<str>, wildcards: &mut Wildcards| -> Result<Template> {
            let template = Template::parse(text, wildcards)?;
            template.check(how)?;
            Ok(template)
        };
        let mut template = |name: &str, text: Option<&Arc<str>>| {
            text.map(|text| parse(text, wildcards))
                .transpose()
                .with_context(|| format!("the {name}"))
        };
        let templates = [
            template("prompt", Some(prompt))?,
            template("negative prompt", options.negative.as_ref())?,
            template("prompt of `--to`", options.to.as_ref())?,
        ];
        match how {
            Dynamic::Random => Ok(Self::Drawn {
                templates,
                options: options.clone(),
            }),
            Dynamic::All => Self::all(templates, options),
        }
    }

    /// Every text that the templates can come to. Errors if these are too many.
    fn all(templates: [Option<Template>; 3], options: &Arc<JobOptions>) -> Result<Self> {
        let count = templates
            .iter()
            .flatten()
            .map(Template::count)
            .fold(1, u64::saturating_mul);
        ensure!(
            count <= MAX_JOBS as u64,
            "this template comes to more than {MAX_JOBS} texts\n\nhint: `--dynamic` alone draws one of them for each seed"
        );
        let [prompts, negatives, tos] = templates.map(|template| match template {
            Some(template) => template
                .all()
                .into_iter()
                .map(|text| Some(Arc::from(text)))
                .collect(),
            None => vec![None],
        });
        let mut others = vec![];
        for negative in &negatives {
            for to in &tos {
                others.push(with_texts(options, negative.clone(), to.clone()));
            }
        }
        ensure!(
            !prompts.is_empty() && !others.is_empty(),
            "this template comes to no text: it wants more different ones than there are"
        );
        let mut all = vec![];
        for prompt in prompts.into_iter().flatten() {
            let with_prompt = |options: &Arc<JobOptions>| (Arc::clone(&prompt), options.clone());
            all.extend(others.iter().map(with_prompt));
        }
        Ok(Self::Fixed(all))
    }

    /// The number of texts for each seed.
    fn count(&self) -> usize {
        match self {
            Self::Fixed(all) => all.len(),
            Self::Drawn { .. } => 1,
        }
    }

    /// The texts for a seed.
    fn at(&self, seed: u64) -> Vec<(Arc<str>, Arc<JobOptions>)> {
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
    options: &Arc<JobOptions>,
    negative: Option<Arc<str>>,
    to: Option<Arc<str>>,
) -> Arc<JobOptions> {
    if options.negative == negative && options.to == to {
        return options.clone();
    }
    Arc::new(JobOptions {
        negative,
        to,
        ..(**options).clone()
    })
}

/// The options that a line brings. Null, which programs write for an option that is not given,
/// leaves it out.
fn options_of_line(keys: Map<String, Value>) -> Result<JobOptions> {
    let mut options = JobOptions::default();
    for (key, value) in keys {
        options = JobOptions::of_key(&key, &value)?.over(&options);
    }
    Ok(options)
}

/// `--sweep`: an option and its values.
struct Sweep {
    /// The option's own name, whatever alias it was called by.
    name: String,
    /// Each value as typed and as read.
    values: Vec<(String, JobOptions)>,
}

impl Sweep {
    /// Reads all sweeps of a run. Errors if two are of one option.
    fn parse_all(texts: &[String]) -> Result<Vec<Self>> {
        let mut sweeps: Vec<Self> = vec![];
        for text in texts.iter().filter(|text| !text.starts_with(PROMPTS)) {
            let sweep = Self::parse(text)?;
            let Self { name, .. } = &sweep;
            ensure!(
                sweeps.iter().all(|other| other.name != *name),
                "`--sweep {name}` is given twice\n\nhint: one sweep takes all its values: `--sweep {name}=A,B,C`"
            );
            sweeps.push(sweep);
        }
        Ok(sweeps)
    }

    /// Reads `KEY=V1,V2,...`, of which a value of numbers may be a range.
    fn parse(text: &str) -> Result<Self> {
        let split = text.split_once('=');
        let Some((key, values)) = split.filter(|(_, values)| !values.is_empty()) else {
            bail!("`--sweep {text}` has no values\n\nhint: write them as `--sweep guidance=3,5,7`");
        };
        let dashed = key.replace('_', "-");
        ensure!(
            !NOT_SWEPT.contains(&&*dashed),
            "`--sweep` cannot vary `{dashed}`"
        );
        let values: Vec<String> = match key {
            "seed" => {
                let seeds = values.parse::<Seeds>()?.values(1)?;
                seeds.iter().map(u64::to_string).collect()
            }
            _ => {
                let listed = split_at_commas(values).into_iter();
                let ranges = listed.map(|value| range(&value).unwrap_or(Ok(vec![value])));
                let values = ranges.collect::<Result<Vec<_>>>();
                values
                    .with_context(|| format!("`--sweep {dashed}`"))?
                    .concat()
            }
        };
        let read = |value: String| {
            let options = JobOptions::of_key(key, &Value::String(value.clone()))?;
            Ok((value, options))
        };
        let values: Vec<(String, JobOptions)> = values
            .into_iter()
            .map(read)
            .collect::<Result<_>>()
            .with_context(|| format!("`--sweep {dashed}`"))?;
        let mut given = match values.first() {
            Some((_, options)) => options.given()?,
            None => vec![],
        };
        Ok(Self {
            name: given.pop().unwrap_or(dashed),
            values,
        })
    }
}

/// How a sweep of prompts begins.
const PROMPTS: &str = "prompt=";

/// The prompts of `--sweep prompt=A,B,...`, if there is one. Errors if there are two.
fn swept_prompts(sweeps: &[String]) -> Result<Option<Vec<String>>> {
    let mut swept = sweeps.iter().filter_map(|text| text.strip_prefix(PROMPTS));
    let (first, second) = (swept.next(), swept.next());
    ensure!(
        second.is_none(),
        "`--sweep prompt` is given twice\n\nhint: one sweep takes all its values: `--sweep prompt=A,B,C`; `\\,` is a comma"
    );
    let Some(values) = first else { return Ok(None) };
    let prompts: Vec<String> = split_at_commas(values)
        .iter()
        .map(|prompt| prompt.trim().to_string())
        .collect();
    ensure!(
        prompts.iter().all(|prompt| !prompt.is_empty()),
        "`--sweep prompt={values}` has an empty prompt\n\nhint: write them as `--sweep 'prompt=a cat,a dog'`; `\\,` is a comma"
    );
    Ok(Some(prompts))
}

/// The values of a sweep; `\,` is a comma.
fn split_at_commas(values: &str) -> Vec<String> {
    let mut all = vec![String::new()];
    let mut chars = values.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, all.last_mut()) {
            (',', _) => all.push(String::new()),
            ('\\', Some(last)) if chars.next_if_eq(&',').is_some() => last.push(','),
            (c, Some(last)) => last.push(c),
            (_, None) => {}
        }
    }
    all
}

/// The numbers of `A..B` or `A..B:STEP`, the end excluded as in ranges of seeds; `None` if it is no
/// such text.
fn range(text: &str) -> Option<Result<Vec<String>>> {
    let (from, rest) = text.split_once("..")?;
    let (to, step) = rest
        .split_once(':')
        .map_or((rest, None), |(to, step)| (to, Some(step)));
    let decimals = |text: &str| {
        text.split_once('.')
            .map_or(0, |(_, decimals)| decimals.len())
    };
    let number = |text: &str| text.trim().parse::<f64>().ok().filter(|x| x.is_finite());
    let places = [from, to, step.unwrap_or("1")].map(|it| decimals(it.trim()));
    let places = places.into_iter().max().unwrap_or(0);
    let (from, to) = (number(from)?, number(to)?);
    let step = match step {
        Some(step) => number(step)?,
        None if places == 0 => 1.0,
        None => {
            return Some(Err(anyhow!(
                "the range `{text}` has no step\n\nhint: `{text}:0.5` goes on by a half"
            )));
        }
    };
    // what rounding leaves of the end is not one more value
    let count = ((to - from) / step - 1e-9).ceil();
    if step <= 0.0 || count < 1.0 {
        return Some(Err(anyhow!("the range `{text}` is empty")));
    }
    if count > MAX_JOBS as f64 {
        return Some(Err(anyhow!(
            "the range `{text}` has more than {MAX_JOBS} values"
        )));
    }
    let value = |i: usize| format!("{:.places$}", from + i as f64 * step);
    Some(Ok((0..count as usize).map(value).collect()))
}

/// Every combination of the sweeps' values over some options, the last sweep innermost, and within
/// it the frames.
fn variants(base: &JobOptions, sweeps: &[Sweep]) -> Result<Vec<Variant>> {
    let mut points = match base.image.as_deref().filter(|image| image.is_dir()) {
        Some(folder) => images_of_folder(folder, base)?,
        None => vec![(base.clone(), SweepPoint::default())],
    };
    for Sweep { name, values } in sweeps {
        let mut next = vec![];
        for (options, point) in &points {
            for (value, swept) in values {
                next.push((swept.clone().over(options), point.with(name, value)));
            }
        }
        points = next;
    }
    let mut variants = vec![];
    for (options, point) in points {
        let frames = frames(&options, point)?;
        let options = Arc::new(options);
        let variant = |point| (options.clone(), Arc::new(point));
        variants.extend(frames.into_iter().map(variant));
    }
    Ok(variants)
}

/// A point of the sweeps once for each frame of an animation, or alone where there is none.
fn frames(options: &JobOptions, point: SweepPoint) -> Result<Vec<SweepPoint>> {
    let JobOptions {
        to,
        to_seed,
        frames,
        variation,
        ..
    } = options;
    let to_seed = to_seed.map(|_| "--to-seed");
    let frames = match (to.as_ref().map(|_| "--to").or(to_seed), frames) {
        (None, None) => return Ok(vec![point]),
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
        point.with_frame(FrameIndex {
            number,
            fraction: number as f64 / (frames - 1) as f64,
        })
    };
    Ok((0..frames).map(frame).collect())
}

/// The options once for each image of a folder, as their source, in the order of the names.
fn images_of_folder(folder: &Path, base: &JobOptions) -> Result<Vec<(JobOptions, SweepPoint)>> {
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
        let point = SweepPoint {
            name: output_path::slug(&name, "picture"),
            labels: vec![format!("image {name}")],
            frame: None,
        };
        let options = JobOptions {
            image: Some(path),
            ..base.clone()
        };
        (options, point)
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
