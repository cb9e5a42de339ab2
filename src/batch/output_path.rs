//! Where pictures go: file names from templates, checks before anything is drawn, atomic writes.
//!
//! Hides how a prompt becomes a legal file name (it can never leave its folder) and how a picture
//! appears under its name only when it is complete. What is in the file is told by
//! [`crate::image`].

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf, is_separator};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, anyhow, bail};
use tempfile::{NamedTempFile, PersistError};

use crate::image::{Format, read_metadata};
use crate::weights::file::require_finite;

/// The name of a picture when none is asked for; the format's extension follows.
const DEFAULT_NAME: &str = "{prompt}-{seed}";
/// Longest word sequence that a value puts into a name.
const SLUG_CHARS: usize = 60;
/// Its longest length in bytes of UTF-8: file systems end a name at 255 bytes, and seed and extension need their part.
const SLUG_BYTES: usize = 150;
/// Digits of the largest seed.
const MOST_DIGITS: usize = 20;
/// How the names of temporary files start and end.
const TEMPORARY: (&str, &str) = (".sdgen-", ".tmp");
/// A picture of ours is not larger; more bytes of another's are not read.
const MAX_PICTURE_BYTES: u64 = 1 << 30;

/// Held while a file is saved. The process has one set of signal handlers, so there is one lock.
static SAVING: Mutex<()> = Mutex::new(());

/// Which files may be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overwrite {
    Never,
    /// Pictures that say that sdgen has made them.
    Own,
    All,
}

impl Overwrite {
    /// Whether the file at `path`, which is there, may be replaced.
    fn allows(self, path: &Path) -> bool {
        match self {
            Self::Never => false,
            Self::Own => is_own(path),
            Self::All => true,
        }
    }
}

/// Whether a file is a picture that says that sdgen has made it. A link that leads nowhere holds
/// nothing that could be lost.
fn is_own(path: &Path) -> bool {
    if require_finite(path).is_err() {
        return false;
    }
    let Ok(file) = fs::File::open(path) else {
        return fs::metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound);
    };
    let mut start = vec![];
    let mut file = file.take(MAX_PICTURE_BYTES);
    let has_format = file.by_ref().take(64).read_to_end(&mut start).is_ok()
        && Format::of_bytes(&start).is_some();
    has_format
        && file.read_to_end(&mut start).is_ok()
        && read_metadata(&start).is_ok_and(|read| read.is_some_and(|read| !read.sdgen.is_null()))
}

/// Where the pictures of a run go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// The bytes of one picture.
    Stdout,
    /// One picture, under exactly this name.
    File(PathBuf),
    /// Any number of pictures, each name made from its [`Naming`].
    Template(Template),
}

/// A path with placeholders, as typed or the default in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Taken as it stands; empty unless the folder's name is not UTF-8.
    folder: PathBuf,
    pieces: Vec<Piece>,
    /// The default name: its extension comes from the format, and equal names are numbered.
    is_default: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    /// `digits`: a number is filled with zeros to this width.
    Value {
        field: Field,
        digits: usize,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Prompt,
    Negative,
    Seed,
    Index,
    Model,
    Width,
    Height,
    Steps,
    Guidance,
    Sampler,
    Sweep,
    Frame,
    Image,
}

impl Field {
    const ALL: [(&'static str, Field); 13] = [
        ("prompt", Field::Prompt),
        ("seed", Field::Seed),
        ("index", Field::Index),
        ("model", Field::Model),
        ("width", Field::Width),
        ("height", Field::Height),
        ("steps", Field::Steps),
        ("guidance", Field::Guidance),
        ("sampler", Field::Sampler),
        ("negative", Field::Negative),
        ("sweep", Field::Sweep),
        ("frame", Field::Frame),
        ("image", Field::Image),
    ];

    fn is_whole_number(self) -> bool {
        !matches!(
            self,
            Field::Prompt
                | Field::Negative
                | Field::Model
                | Field::Sampler
                | Field::Guidance
                | Field::Sweep
        )
    }
}

/// The values of placeholders for one image.
#[derive(Debug, Clone, Copy)]
pub struct Naming<'a> {
    /// The prompt as typed.
    pub prompt: &'a str,
    /// Empty for none.
    pub negative: &'a str,
    /// The seed of this image.
    pub seed: u64,
    /// Place in the work list.
    pub index: usize,
    /// The model as the person refers to it.
    pub model: &'a str,
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// The sampler as `--sampler` names it.
    pub sampler: &'a str,
    /// The values that `--sweep` has set, fit for a name: `guidance-3-steps-10`; empty without a sweep.
    pub sweep: &'a str,
    /// The frame of an animation, from 0.
    pub frame: Option<usize>,
    /// The name of the init image's file, without its extension; empty for none.
    pub image: &'a str,
}

impl Naming<'_> {
    fn value(&self, field: Field) -> String {
        match field {
            Field::Prompt => slug(self.prompt, "picture"),
            Field::Negative => slug(self.negative, "none"),
            Field::Seed => self.seed.to_string(),
            Field::Index => self.index.to_string(),
            Field::Model => slug(self.model, "model"),
            Field::Width => self.width.to_string(),
            Field::Height => self.height.to_string(),
            Field::Steps => self.steps.to_string(),
            Field::Guidance => self.guidance.to_string(),
            Field::Sampler => slug(self.sampler, "sampler"),
            Field::Sweep => self.sweep.to_owned(),
            Field::Frame => self.frame.unwrap_or_default().to_string(),
            Field::Image => slug(self.image, "none"),
        }
    }
}

impl Destination {
    /// Reads `--output` and `--format`: nothing is the default name in the current folder, `-` the
    /// bytes, a path that ends in `/` the default name in that folder, a path with `{placeholders}`
    /// a template, any other path one file. `{{` and `}}` are braces. The format is the one asked
    /// for, else the extension's, else PNG. Errors on an empty path, an extension that is not a format
    /// or not the one asked for, and a placeholder that is unknown or not closed.
    pub fn parse(
        output: Option<&OsStr>,
        format: Option<Format>,
    ) -> anyhow::Result<(Destination, Format)> {
        let Some(output) = output else {
            let template = Template::default_in(PathBuf::new(), Vec::new())?;
            return Ok((
                Destination::Template(template),
                format.unwrap_or(Format::Png),
            ));
        };
        if output.is_empty() {
            bail!(
                "`--output` is empty\n\nhint: give a file, a folder ending in `/`, or `-` for the bytes"
            );
        }
        if output == "-" {
            return Ok((Destination::Stdout, format.unwrap_or(Format::Png)));
        }
        let typed = output.display();
        let (folder, pieces) = split_template(output)?;
        match output.to_string_lossy().rsplit(is_separator).next() {
            Some("") => {
                let template = Template::default_in(folder, pieces)?;
                return Ok((
                    Destination::Template(template),
                    format.unwrap_or(Format::Png),
                ));
            }
            Some("." | "..") => {
                bail!("`{typed}` is a folder\n\nhint: `-o {typed}/` puts the pictures into it")
            }
            _ => {}
        }
        // An extension is typed: what a placeholder puts after a dot does not count.
        let tail = match pieces.as_slice() {
            [] => folder.clone(),
            [.., Piece::Text(text)] => PathBuf::from(format!("name{text}")),
            [.., Piece::Value { .. }] => PathBuf::new(),
        };
        let named = match (Format::of_path(&tail), format) {
            // The person has said what the file is, whatever its name looks like.
            (Err(_), Some(_)) => None,
            (named, _) => named?,
        };
        let format = match (named, format) {
            (Some(named), Some(format)) if named != format => {
                bail!(
                    "`{typed}` names {named}, but `--format` asks for {format}\n\nhint: leave `--format` out, or change the name"
                )
            }
            (named, format) => format.or(named).unwrap_or(Format::Png),
        };
        let mut template = Template {
            folder,
            pieces,
            is_default: false,
        };
        let Some(path) = template.fixed() else {
            if tail.extension().is_none() {
                template.pieces.push(Piece::Text(format!(".{format}")));
            }
            return Ok((Destination::Template(template), format));
        };
        Ok((Destination::File(path), format))
    }
}

impl Template {
    fn default_in(folder: PathBuf, mut pieces: Vec<Piece>) -> anyhow::Result<Template> {
        pieces.extend(parse_pieces(DEFAULT_NAME)?);
        Ok(Template {
            folder,
            pieces,
            is_default: true,
        })
    }

    /// The path if it is the same for every picture.
    fn fixed(&self) -> Option<PathBuf> {
        let mut path = self.folder.clone();
        for piece in &self.pieces {
            let Piece::Text(text) = piece else {
                return None;
            };
            path.as_mut_os_string().push(text);
        }
        Some(path)
    }

    fn fill(&self, naming: &Naming<'_>) -> PathBuf {
        let mut path = self.folder.clone();
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => path.as_mut_os_string().push(text),
                Piece::Value { field, digits } => {
                    let value = naming.value(*field);
                    path.as_mut_os_string().push(format!("{value:0>digits$}"));
                }
            }
        }
        path
    }
}

/// The folder of what `--output` says, as typed: of a template that part of its path that all
/// pictures share. Empty for the current folder.
pub fn folder_of_output(output: &Path) -> PathBuf {
    if output.as_os_str() == "-" {
        return PathBuf::new();
    }
    let Some(text) = output.to_str() else {
        let is_folder = output.to_string_lossy().ends_with(is_separator);
        let folder = if is_folder {
            Some(output)
        } else {
            output.parent()
        };
        return folder.map_or(PathBuf::new(), PathBuf::from);
    };
    let mut end = text.rfind(is_separator).map_or(0, |at| at + 1);
    // Braces that are doubled are part of a name.
    let mut at = 0;
    while let Some(found) = text.get(at..end).and_then(|rest| rest.find('{')) {
        at += found;
        if text.get(at + 1..).is_some_and(|rest| rest.starts_with('{')) {
            at += 2;
            continue;
        }
        let before = text.get(..at).and_then(|text| text.rfind(is_separator));
        end = before.map_or(0, |at| at + 1);
    }
    text.get(..end).map_or(PathBuf::new(), PathBuf::from)
}

/// Splits a path into a folder that is taken as it stands and what holds placeholders. The whole
/// holds them where it is UTF-8, else the name of the file where that is.
fn split_template(output: &OsStr) -> anyhow::Result<(PathBuf, Vec<Piece>)> {
    if let Some(text) = output.to_str() {
        return Ok((PathBuf::new(), parse_pieces(text)?));
    }
    let is_folder = output.to_string_lossy().ends_with(is_separator);
    let (path, text) = (Path::new(output), Path::new(output).file_name());
    match (path.parent(), text.and_then(OsStr::to_str)) {
        (Some(folder), Some(text)) if !is_folder => {
            // with its separator, as the name is appended
            Ok((folder.join(""), parse_pieces(text)?))
        }
        _ => Ok((PathBuf::from(output), Vec::new())),
    }
}

/// Splits at placeholders: `{seed}`, `{seed:05}`; `{{` and `}}` are braces.
fn parse_pieces(template: &str) -> anyhow::Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut text = String::new();
    let mut rest = template;
    while let Some(at) = rest.find(['{', '}']) {
        text.push_str(&rest[..at]);
        let (brace, after) = rest[at..].split_at(1);
        if let Some(after) = after.strip_prefix(brace) {
            text.push_str(brace);
            rest = after;
            continue;
        }
        let Some((inside, after)) = (brace == "{").then(|| after.split_once('}')).flatten() else {
            bail!(
                "`{template}` has a lone `{brace}`\n\nhint: write `{brace}{brace}` for the brace itself"
            );
        };
        if !text.is_empty() {
            pieces.push(Piece::Text(std::mem::take(&mut text)));
        }
        pieces.push(parse_placeholder(inside)?);
        rest = after;
    }
    text.push_str(rest);
    if !text.is_empty() {
        pieces.push(Piece::Text(text));
    }
    Ok(pieces)
}

/// Takes what stands between the braces.
fn parse_placeholder(inside: &str) -> anyhow::Result<Piece> {
    let (name, padding) = inside
        .split_once(':')
        .map_or((inside, None), |(name, padding)| (name, Some(padding)));
    let Some(&(_, field)) = Field::ALL.iter().find(|(known, _)| *known == name) else {
        let known: Vec<String> = Field::ALL
            .iter()
            .map(|(known, _)| format!("`{{{known}}}`"))
            .collect();
        bail!(
            "unknown placeholder `{{{name}}}`\n\nhint: use one of {}; write `{{{{` for the brace itself",
            known.join(", ")
        );
    };
    let digits = match padding {
        None => 0,
        Some(_) if !field.is_whole_number() => {
            bail!("`{{{inside}}}` pads with zeros what is not a whole number\n\nhint: write `{{{name}}}`")
        }
        Some(padding) => padding
            .strip_prefix('0')
            .and_then(|digits| digits.parse().ok())
            .filter(|digits| (1..=MOST_DIGITS).contains(digits))
            .ok_or_else(|| {
                anyhow!("`{{{inside}}}` has no meaning\n\nhint: `{{{name}:05}}` fills with zeros to 5 digits, {MOST_DIGITS} at most")
            })?,
    };
    Ok(Piece::Value { field, digits })
}

/// Lower-case words joined by `-`, letters and digits of any script kept: one legal path component
/// of at most [`SLUG_CHARS`] characters, without dots, never empty (`fallback` then), never a name
/// that Windows reserves.
pub(crate) fn slug(text: &str, fallback: &str) -> String {
    let mut slug = String::new();
    let mut chars = 0;
    // Apostrophes and invisible characters do not end a word: `don't` is `dont`.
    let visible: String = text
        .chars()
        .filter(|&c| !is_joined_over(c))
        .flat_map(char::to_lowercase)
        .collect();
    for word in visible
        .split(|c| !is_name_char(c))
        .filter(|word| !word.is_empty())
    {
        let joint = usize::from(!slug.is_empty());
        let fits = chars + joint + word.chars().count() <= SLUG_CHARS
            && slug.len() + joint + word.len() <= SLUG_BYTES;
        // Cut at a word, or within one where words are too long for it (Chinese has no spaces).
        if !fits && slug.len() > SLUG_BYTES / 5 {
            break;
        }
        slug.push_str(&"-"[..joint]);
        chars += joint;
        for c in word.chars() {
            if chars == SLUG_CHARS || slug.len() + c.len_utf8() > SLUG_BYTES {
                break;
            }
            slug.push(c);
            chars += 1;
        }
        if !fits {
            break;
        }
    }
    if slug.is_empty() {
        return fallback.to_owned();
    }
    if is_reserved(&slug) {
        return format!("{fallback}-{slug}");
    }
    slug
}

/// Letters, digits, and the marks that are part of a letter.
fn is_name_char(c: char) -> bool {
    c.is_alphanumeric() || is_mark(c)
}

/// Combining marks that [`char::is_alphanumeric`] leaves out (Unicode's Mn and Mc without
/// `Alphabetic`): accents, Hebrew and Arabic points, viramas and tone marks from Devanagari to
/// Khmer, Japanese voicing marks.
fn is_mark(c: char) -> bool {
    matches!(
        c,
        '\u{300}'..='\u{34e}' | '\u{350}'..='\u{36f}' | '\u{591}'..='\u{5bd}' | '\u{64b}'..='\u{65f}'
        | '\u{93c}' | '\u{94d}' | '\u{9bc}' | '\u{9cd}' | '\u{a3c}' | '\u{a4d}' | '\u{abc}' | '\u{acd}'
        | '\u{b3c}' | '\u{b4d}' | '\u{bcd}' | '\u{c4d}' | '\u{cbc}' | '\u{ccd}' | '\u{d4d}' | '\u{dca}'
        | '\u{e3a}' | '\u{e47}'..='\u{e4e}' | '\u{eba}' | '\u{ec8}'..='\u{ecd}'
        | '\u{f39}' | '\u{f71}'..='\u{f84}' | '\u{1037}' | '\u{1039}' | '\u{103a}' | '\u{17c9}'..='\u{17d3}'
        | '\u{3099}' | '\u{309a}'
    )
}

/// Dropped without ending the word: apostrophes, soft hyphen, joiners, marks of writing direction,
/// variation selectors, and the fillers that Unicode counts among the letters though nothing shows.
fn is_joined_over(c: char) -> bool {
    matches!(
        c,
        '\'' | '\u{2019}' | '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}'
        | '\u{115f}' | '\u{1160}' | '\u{3164}' | '\u{ffa0}'
    )
}

/// Device names of Windows, which cannot be file names, with or without an extension.
fn is_reserved(name: &str) -> bool {
    let numbered = name
        .strip_prefix("com")
        .or_else(|| name.strip_prefix("lpt"));
    matches!(name, "con" | "prn" | "aux" | "nul")
        || numbered.is_some_and(|number| {
            matches!(
                number,
                "0" | "1" | "2" | "3" | "4" | "5" | "6" | "7" | "8" | "9" | "¹" | "²" | "³"
            )
        })
}

/// The paths of the whole work list, in its order, decided before anything is drawn; none for
/// [`Destination::Stdout`]. Equal default names are told apart by `-2`, `-3`, ... Errors if
/// several pictures go to one file or stdout, or a template gives two of them one name.
pub fn plan_paths(
    destination: &Destination,
    format: Format,
    jobs: &[Naming<'_>],
) -> anyhow::Result<Vec<PathBuf>> {
    let count = jobs.len();
    match destination {
        Destination::Stdout if count > 1 => {
            bail!(
                "`-o -` takes one picture, but {count} are to be drawn\n\nhint: `-o '{DEFAULT_NAME}.{format}'` names each"
            )
        }
        Destination::Stdout => Ok(Vec::new()),
        Destination::File(path) if count > 1 => {
            let seeds: HashSet<u64> = jobs.iter().map(|job| job.seed).collect();
            let frames: HashSet<usize> = jobs.iter().filter_map(|job| job.frame).collect();
            let placeholder = match (seeds.len() == count, frames.len() == count) {
                (_, true) => "{frame:04}",
                (true, _) => "{seed}",
                _ => "{index}",
            };
            let mut template = path.with_extension("").into_os_string();
            template.push(format!("-{placeholder}.{format}"));
            bail!(
                "`{}` is one file, but {count} pictures are to be drawn\n\nhint: `-o '{}'` names each",
                path.display(),
                template.display()
            )
        }
        Destination::File(path) => Ok(vec![path.clone(); count]),
        Destination::Template(template) if template.is_default => {
            Ok(numbered_paths(template, format, jobs))
        }
        Destination::Template(template) => {
            let mut taken: HashMap<String, u64> = HashMap::with_capacity(count);
            let mut paths = Vec::with_capacity(count);
            for (number, job) in (1..).zip(jobs) {
                let path = template.fill(job);
                if let Some(first) = taken.insert(folded(&path), number) {
                    let placeholder = match job.frame {
                        Some(_) => "`{frame:04}` for the frames",
                        None if job.sweep.is_empty() => "`{seed}` if the seeds differ",
                        None => "`{sweep}` for what is swept",
                    };
                    bail!(
                        "the template names both picture {first} and picture {number} `{}`\n\nhint: add `{{index}}`, or {placeholder}",
                        path.display()
                    );
                }
                paths.push(path);
            }
            Ok(paths)
        }
    }
}

/// Default names; the second picture that would get a name gets `-2` after it, and so on.
fn numbered_paths(template: &Template, format: Format, jobs: &[Naming<'_>]) -> Vec<PathBuf> {
    let mut taken = HashSet::with_capacity(jobs.len());
    let mut next_numbers: HashMap<PathBuf, u64> = HashMap::new();
    let mut paths = Vec::with_capacity(jobs.len());
    for job in jobs {
        let mut stem = template.fill(job);
        if !job.sweep.is_empty() {
            stem.as_mut_os_string().push(format!("-{}", job.sweep));
        }
        let mut path = stem.clone();
        path.as_mut_os_string().push(format!(".{format}"));
        while !taken.insert(folded(&path)) {
            let number = next_numbers.entry(stem.clone()).or_insert(2);
            path = stem.clone();
            path.as_mut_os_string().push(format!("-{number}.{format}"));
            *number += 1;
        }
        paths.push(path);
    }
    paths
}

/// Paths that are one file where the file system ignores case are equal.
fn folded(path: &Path) -> String {
    path.to_string_lossy().to_lowercase()
}

/// Folders that were made for pictures. Those that are still empty when this is dropped go again.
#[derive(Debug, Default)]
pub struct MadeFolders(Vec<PathBuf>);

impl MadeFolders {
    /// Makes a folder and those above it that are missing.
    pub fn make(&mut self, folder: &Path) -> anyhow::Result<()> {
        let is_missing = |folder: &&Path| !folder.as_os_str().is_empty() && !folder.exists();
        let missing: Vec<&Path> = folder.ancestors().take_while(is_missing).collect();
        self.0.extend(missing.into_iter().rev().map(PathBuf::from));
        fs::create_dir_all(folder).map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists | ErrorKind::NotADirectory => no_folder(folder),
            _ => anyhow!("cannot make the folder `{}`: {error}", folder.display()),
        })
    }

    /// Takes over the folders of another.
    pub fn extend(&mut self, mut other: Self) {
        self.0.append(&mut other.0);
    }
}

impl Drop for MadeFolders {
    fn drop(&mut self) {
        for folder in self.0.iter().rev() {
            // one that holds anything stays
            fs::remove_dir(folder).ok();
        }
    }
}

/// Finds out before anything is drawn whether the planned paths can be written, by doing in each
/// folder what [`save`] will do. Makes their folders if `make_folders` is given, as templates want
/// it, and removes what killed runs have left there. Errors if a file exists that may not be
/// replaced, if a path is a folder or a device, or if a folder is missing, cannot be made or cannot
/// be written.
pub fn check_writable(
    paths: &[&Path],
    make_folders: bool,
    overwrite: Overwrite,
) -> anyhow::Result<MadeFolders> {
    let mut existing = Vec::new();
    for path in paths {
        if exists(path)? && !overwrite.allows(path) {
            existing.push(path);
        }
    }
    if let Some(first) = existing.first() {
        let others = match existing.len() {
            1 => String::new(),
            count => format!(", and {} more", count - 1),
        };
        return Err(exists_error(first, &others, overwrite));
    }
    let folders: BTreeSet<&Path> = paths.iter().copied().map(folder_of).collect();
    let mut made = MadeFolders::default();
    for folder in folders {
        let is_of_shell = folder.starts_with("~") && !Path::new("~").exists();
        if make_folders && !is_of_shell {
            made.make(folder)?;
        } else if !folder.is_dir() {
            return Err(no_folder(folder));
        }
        repeated(|| try_to_save(folder)).map_err(|error| write_error(folder, error))?;
        remove_leftovers(folder);
    }
    Ok(made)
}

/// The error where a file is to be written into a folder that is not there.
fn no_folder(folder: &Path) -> anyhow::Error {
    let shown = folder.display();
    if let Some(file) = folder.ancestors().find(|part| part.is_file()) {
        return anyhow!(
            "`{}` is a file, not a folder\n\nhint: name a folder, or the file itself and `--force` to overwrite it",
            file.display()
        );
    }
    match folder.strip_prefix("~") {
        Ok(rest) => anyhow!(
            "there is no folder `{shown}`\n\nhint: a shell takes `~` for your home only without quotes; in them it is `$HOME/{}`",
            rest.display()
        ),
        Err(_) => {
            anyhow!("there is no folder `{shown}`\n\nhint: make it first: `mkdir -p '{shown}'`")
        }
    }
}

/// Writes a file and names it as [`save`] does, and removes it.
fn try_to_save(folder: &Path) -> io::Result<()> {
    let mut file = temporary_file(folder)?;
    file.write_all(TEMPORARY.0.as_bytes())?;
    let name = file.path().with_extension("check.tmp");
    name_file(file, &name, false)?;
    fs::remove_file(&name)
}

/// Whether a file is at `path`. Errors if anything else is there or the path cannot be one.
fn exists(path: &Path) -> anyhow::Result<bool> {
    let metadata = match fs::symlink_metadata(path) {
        // A path below a file is reported with its folder.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(false);
        }
        // A link is what it leads to, or a file to replace if it leads nowhere.
        Ok(metadata) if metadata.is_symlink() => fs::metadata(path).unwrap_or(metadata),
        metadata => metadata.with_context(|| format!("cannot write `{}`", path.display()))?,
    };
    if metadata.is_dir() {
        bail!(
            "`{0}` is a folder\n\nhint: `-o '{0}/'` puts the pictures into it",
            path.display()
        );
    }
    // Renaming over a device would replace it.
    if !metadata.is_file() && !metadata.is_symlink() {
        bail!(
            "`{}` is not a file\n\nhint: `-o -` writes the picture's bytes to stdout",
            path.display()
        );
    }
    Ok(true)
}

/// Writes a picture so that it appears under `path` only when it is complete and on the disk. A
/// file that is there by then and may not be replaced stays, and that is an error, as is a full
/// disk or a folder that cannot be written; nothing of the picture is left then.
pub fn save(path: &Path, bytes: &[u8], overwrite: Overwrite) -> anyhow::Result<()> {
    let _saving = hold_saves();
    // Again: what is there may have changed while the picture was drawn.
    let replaces = exists(path)?;
    if replaces && !overwrite.allows(path) {
        return Err(exists_error(path, "", overwrite));
    }
    let write = || -> io::Result<()> {
        let mut file = temporary_file(folder_of(path))?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?; // some file systems report a full disk only here
        name_file(file, path, replaces || overwrite == Overwrite::All)
    };
    match repeated(write) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            Err(exists_error(path, "", overwrite))
        }
        Err(error) => Err(write_error(path, error)),
    }
}

/// A file that is written piece by piece, and has its name only when it is complete and on the disk.
/// Nothing of it is left if it is dropped before.
pub struct Unfinished {
    file: NamedTempFile,
    path: PathBuf,
    overwrite: Overwrite,
}

impl Unfinished {
    /// Begins a file beside its place. Errors if the folder cannot be written.
    pub fn new(path: &Path, overwrite: Overwrite) -> io::Result<Self> {
        Ok(Self {
            file: temporary_file(folder_of(path))?,
            path: path.into(),
            overwrite,
        })
    }

    /// Adds bytes. Errors as the system says, such as that the disk is full.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    /// Gives it its name. Errors if something is there by now that may not be replaced.
    pub fn finish(self) -> io::Result<()> {
        let _saving = hold_saves();
        self.file.as_file().sync_all()?;
        name_file(self.file, &self.path, self.overwrite == Overwrite::All)
    }
}

/// A folder beside its place, which is gone when dropped.
pub fn temporary_folder(path: &Path) -> io::Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY.0).suffix(TEMPORARY.1);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o777));
    }
    builder.tempdir_in(folder_of(path))
}

/// Writes a file once more if it is gone before it has its name: a run that starts just now may
/// have taken it for a leftover, before it was locked.
fn repeated(mut write: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    for _ in 0..3 {
        match write() {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            other => return other,
        }
    }
    write()
}

/// Gives a complete file its name. Errors if the name is taken, unless it replaces what is there.
fn name_file(file: NamedTempFile, path: &Path, replaces: bool) -> io::Result<()> {
    if replaces {
        file.persist(path)?;
        return Ok(());
    }
    let PersistError { error, file } = match file.persist_noclobber(path) {
        Ok(_) => return Ok(()),
        Err(error) => error,
    };
    if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::NotFound) {
        return Err(error);
    }
    // Some file systems can neither refuse to replace a file when renaming nor link to one: mounts
    // of object stores, for one.
    if fs::symlink_metadata(path).is_ok() {
        return Err(ErrorKind::AlreadyExists.into());
    }
    file.persist(path)?;
    Ok(())
}

/// Waits until no file is being saved. While the result is held none is saved, so that the process
/// can end without leaving a temporary file.
pub fn hold_saves() -> MutexGuard<'static, ()> {
    SAVING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes the bytes of an image to stdout. A reader that has gone away wants no more of them; any
/// other reason why they are not taken is an error.
pub fn write_to_stdout(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write the picture to stdout"),
    }
}

/// A file next to its final place, so that the rename stays on one file system; gone when dropped,
/// and locked, so that what is left of a killed process is known by its lock being gone.
fn temporary_file(folder: &Path) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY.0).suffix(TEMPORARY.1);
    #[cfg(unix)]
    {
        // What any program gives a new file; the umask takes its part off.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    let file = builder.tempfile_in(folder)?;
    // Where the file system has no locks, leftovers stay.
    file.as_file().try_lock().ok();
    Ok(file)
}

/// Removes temporary files of processes that do not live any more.
fn remove_leftovers(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(TEMPORARY.0)
            && name.ends_with(TEMPORARY.1)
            && fs::File::options()
                .write(true)
                .open(entry.path())
                .is_ok_and(|file| file.try_lock().is_ok())
        {
            fs::remove_file(entry.path()).ok();
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// The error that no space is left for this path.
#[derive(Debug)]
pub struct DiskFull(String);

impl fmt::Display for DiskFull {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let path = &self.0;
        write!(
            f,
            "no space is left on the disk for `{path}`\n\nhint: free some, or put the pictures elsewhere with `-o FOLDER/`"
        )
    }
}

impl std::error::Error for DiskFull {}

fn exists_error(path: &Path, others: &str, overwrite: Overwrite) -> anyhow::Error {
    let path = path.display();
    match overwrite {
        Overwrite::Own => anyhow!(
            "`{path}` exists already{others}, and does not say that sdgen has made it\n\nhint: `--force` overwrites it all the same, another name keeps it"
        ),
        _ => anyhow!(
            "`{path}` exists already{others}\n\nhint: `--force` overwrites it, another name keeps it"
        ),
    }
}

fn write_error(path: &Path, error: io::Error) -> anyhow::Error {
    let path = path.display();
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => DiskFull(path.to_string()).into(),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            anyhow!(
                "no permission to write `{path}`\n\nhint: put the pictures elsewhere with `-o FOLDER/`"
            )
        }
        ErrorKind::FileTooLarge => anyhow!(
            "`{path}` would be larger than this process may write\n\nhint: `ulimit -f` says how large, in the shell that started it"
        ),
        _ => anyhow!("cannot write `{path}`: {error}"),
    }
}
