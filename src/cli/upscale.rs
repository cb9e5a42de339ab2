//! `sdgen upscale`: pictures of any origin, made larger by a network or by Lanczos' formula.
//!
//! [`Upscaler`] is both, and what [`crate::cli::check`] repeats; the rest is the command: where results
//! go, and what they remember.

use crate::batch::output_path::{self, Destination, DiskFull, MadeFolders, Overwrite};
use crate::batch::resume::UPSCALED_FROM;
use crate::cli::exit_code::{Code, Failure};
use crate::cli::progress::{Progress, ProgressMode};
use crate::cli::stdout::{self, require_no_terminal, say};
use crate::error::{self, ModelError, OutOfMemory, WrongArgument};
use crate::image::MAX_SIDE_PX;
use crate::image::load::{Fit, Input, fit_with_alpha, resized_levels};
use crate::image::{Extras, Format, Image, Metadata, read_metadata};
use crate::model::upscaler::{self, TILE_PX, UpscalerConfig};
use crate::nn::Forward;
use crate::nn::device::{Compute, DTypeChoice, DeviceChoice, require_memory};
use crate::pipeline::fingerprint::Trace;
use crate::pipeline::options::split_value;
use crate::pipeline::settings::Settings;
use crate::weights::{Checkpoint, UPSCALERS, file};
use anyhow::{Context, Error, Result, anyhow, bail};
use candle_core::DType;
use clap::Args;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// The name of the upscaler that needs no network.
const LANCZOS: &str = "lanczos";
/// The scale of Lanczos' formula where none is asked for.
const LANCZOS_SCALE: f64 = 2.0;
/// A result's name where none is asked for; the format's extension follows.
const DEFAULT_NAME: &str = "{name}-{scale}x";
/// The placeholders of a result's name.
const PLACEHOLDERS: [&str; 3] = ["{name}", "{scale}", "{index}"];
/// The images to enlarge, and how.
#[derive(Debug, Args)]
pub struct UpscaleArgs {
    /// Pictures of any origin: PNG, JPEG, WebP, TIFF, BMP or GIF
    #[arg(required = true)]
    pictures: Vec<PathBuf>,
    /// An ESRGAN or Real-ESRGAN network, a .safetensors file; or `lanczos`, which needs none
    #[arg(short, long, value_name = "FILE")]
    model: Option<OsString>,
    /// How many times larger in both directions, such as 2 or 1.5 [default: the network's; 2]
    #[arg(long, value_parser = scale, value_name = "X")]
    scale: Option<f64>,
    /// File, folder/, template of {name}, {scale} and {index}, or `-` for stdout [default:
    /// {name}-{scale}x.png]
    #[arg(short, long, value_name = "PATH")]
    output: Option<OsString>,
    /// png, jpg or webp [default: from the name, else png]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Overwrite what is there
    #[arg(long)]
    force: bool,
    /// Leave out what the source says of itself, and how it was upscaled
    #[arg(long)]
    no_metadata: bool,
    /// One JSON object a picture on stdout
    #[arg(long)]
    json: bool,
    /// auto, cpu, cuda[:N] or metal
    #[arg(
        long,
        default_value = "auto",
        hide_default_value = true,
        value_name = "NAME"
    )]
    device: DeviceChoice,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Say nothing but errors
    #[arg(short, long)]
    quiet: bool,
}

impl UpscaleArgs {
    /// Which files may be replaced.
    fn overwrite(&self) -> Overwrite {
        match self.force {
            true => Overwrite::All,
            false => Overwrite::Never,
        }
    }
}

fn scale(text: &str) -> Result<f64, String> {
    let number = text
        .trim_matches('x')
        .parse()
        .ok()
        .filter(|x: &f64| (0.01..=64.0).contains(x));
    number.ok_or_else(|| "expected a number up to 64, such as 2 or 1.5".into())
}

/// A network or a formula that makes images larger.
pub struct Upscaler {
    /// the file's name without extension
    pub name: Arc<str>,
    /// of its weights; none of Lanczos' formula, which has none
    pub hash: Option<Arc<str>>,
    /// how many times larger its pictures are
    pub scale: f64,
    network: Option<upscaler::Upscaler>,
    factor: usize,
    is_on_cpu: bool,
}

impl Upscaler {
    /// The one of `MODEL:SCALE`, as `--upscale` has it, or of `MODEL` alone.
    pub fn asked(text: &OsStr, compute: &Compute) -> Result<Self> {
        let is_upscaler = |name: &str| name == LANCZOS || Path::new(name).exists();
        let (model, scale) = split_value(text, is_upscaler, scale).map_err(|why| {
            WrongArgument(format!(
                "`--upscale {}`: {why}\n\nhint: `--upscale {LANCZOS}:2` is twice as large",
                text.display()
            ))
        })?;
        Self::open(&model, scale, compute)
    }

    /// Reads a network's file, or takes `lanczos`. Errors say what the file is if it is not such a
    /// network.
    pub fn open(model: &OsStr, scale: Option<f64>, compute: &Compute) -> Result<Self> {
        if model == LANCZOS {
            let scale = scale.unwrap_or(LANCZOS_SCALE);
            return Ok(Self {
                name: LANCZOS.into(),
                hash: None,
                scale,
                network: None,
                factor: 1,
                is_on_cpu: true,
            });
        }
        let path = Path::new(model);
        if file::is_absent(path) {
            bail!(
                "there is no file `{}`\n\nhint: {UPSCALERS}; `{LANCZOS}` needs no file",
                path.display()
            );
        }
        let checkpoint = Checkpoint::open_upscaler(path)?;
        let config = UpscalerConfig::of(&checkpoint)?;
        let factor = config.factor;
        let weights = checkpoint.weights("upscaler", &compute.device, DType::F32);
        let network = upscaler::Upscaler::new(&weights, config).context(ModelError)?;
        let hash = checkpoint.hash()?.into();
        let is_on_cpu = compute.device.is_cpu();
        let (name, scale) = (
            checkpoint.name.as_str().into(),
            scale.unwrap_or(factor as f64),
        );
        Ok(Self {
            name,
            hash: Some(hash),
            scale,
            network: Some(network),
            factor,
            is_on_cpu,
        })
    }

    /// Width and height of what a picture becomes. Errors if that is too large.
    pub fn size(&self, width: usize, height: usize) -> Result<(usize, usize)> {
        let side = |n: usize| ((n as f64 * self.scale).round() as usize).max(1);
        let (width, height) = (side(width), side(height));
        if width.max(height) > MAX_SIDE_PX {
            bail!(
                "upscaled, it would be {width}x{height} pixels, more than {MAX_SIDE_PX} on a side\n\nhint: choose a smaller scale"
            );
        }
        Ok((width, height))
    }

    /// About the memory that it needs for a picture, in bytes; of a GPU's, nothing is known.
    pub fn bytes(&self, width: usize, height: usize) -> u64 {
        let Some(network) = self.network.as_ref().filter(|_| self.is_on_cpu) else {
            return 0;
        };
        // the network's picture, and the result with what becomes of it on its way to a file
        let pixels = (width * height) as f64
            * ((self.factor * self.factor) as f64 + 3.0 * self.scale * self.scale);
        3 * pixels as u64 + network.bytes(height, width)
    }

    /// The settings of a picture that it has made of one with these.
    pub fn told(&self, settings: Settings) -> Settings {
        Settings {
            upscaler: Some(self.name.clone()),
            upscaler_hash: self.hash.clone(),
            upscale: Some(self.scale),
            ..settings
        }
    }

    /// A picture made larger; a network's result of another scale is brought to it by Lanczos'
    /// formula. Errors if the result would be too large, or does not fit into memory.
    pub fn upscale(&self, picture: &Image, progress: &Progress) -> Result<Image> {
        Ok(self.upscale_with_alpha(picture, None, progress)?.0)
    }

    /// The same with its transparency [height, width], which a network of four channels enlarges, and
    /// Lanczos' formula beside all others.
    fn upscale_with_alpha(
        &self,
        picture: &Image,
        alpha: Option<&[u8]>,
        progress: &Progress,
    ) -> Result<(Image, Option<Vec<u8>>)> {
        let (width, height) = self.size(picture.width, picture.height)?;
        let Some(network) = &self.network else {
            return Ok(match alpha {
                Some(alpha) => {
                    let (picture, alpha) = fit_with_alpha(picture, alpha, width, height);
                    (picture, Some(alpha))
                }
                None => (picture.fit(width, height, Fit::Stretch), None),
            });
        };
        let place = || {
            format!(
                "{width}x{height} pixels do not fit\n\nhint: choose a smaller scale, or a part of the picture"
            )
        };
        require_memory(self.bytes(picture.width, picture.height), 0)
            .context(OutOfMemory)
            .with_context(place)?;
        progress.task("upscaling");
        let cx = Forward::on(network.device());
        let mut on_step = |done, total| progress.step(done, total);
        let (larger, enlarged) = network.upscale(cx, picture, alpha, TILE_PX, &mut on_step)?;
        let of_network = [larger.width, larger.height];
        let own = [picture.width, picture.height];
        let alpha = match (&enlarged, alpha) {
            (Some(enlarged), _) => Some(resized_levels(enlarged, of_network, [width, height])),
            (None, Some(alpha)) => Some(resized_levels(alpha, own, [width, height])),
            (None, None) => None,
        };
        Ok((larger.fit(width, height, Fit::Stretch), alpha))
    }

    /// One line of `--json`: of a picture and the seconds it took, or of why there is none.
    fn record(
        &self,
        source: &Path,
        to: &Destination,
        made: Result<(&Image, f64), &Error>,
    ) -> Value {
        let picture = made.as_ref().ok().map(|(picture, _)| picture);
        let timings = made
            .as_ref()
            .ok()
            .map(|(_, seconds)| json!({ "upscaling_s": seconds }));
        json!({
            "path": file_of(to).map(|path| path.to_string_lossy()),
            "sha256": picture.map(|picture| picture.sha256()),
            "source": source.to_string_lossy(),
            "width": picture.map(|picture| picture.width),
            "height": picture.map(|picture| picture.height),
            "upscaler": self.name,
            "upscaler_hash": self.hash,
            "upscale": self.scale,
            "timings": timings,
            "error": made.err().map(|error| error::split(error).0),
        })
    }

    /// What a picture remembers that was made from `source`. If that is as it was drawn, it can be
    /// drawn again, and so can the result.
    fn metadata(&self, source: &Source) -> Metadata {
        let known = source.metadata.clone().unwrap_or(Metadata {
            parameters: String::new(),
            sdgen: Value::Null,
        });
        let drawn = serde_json::from_value::<Settings>(known.sdgen.clone()).ok();
        if let Some(settings) = drawn.filter(|drawn| {
            source.is_lossless
                && drawn.upscaler.is_none()
                && known.sdgen.get(UPSCALED_FROM).is_none()
        }) {
            return self
                .told(settings)
                .metadata(Trace::of(&known.sdgen).ok().flatten().as_ref());
        }
        let mut sdgen = known.sdgen.as_object().cloned().unwrap_or_default();
        sdgen.extend([
            ("upscaler".into(), json!(self.name)),
            ("upscaler_hash".into(), json!(self.hash)),
            ("upscale".into(), json!(self.scale)),
            (UPSCALED_FROM.into(), json!(source.input.sha256())),
        ]);
        let pairs = format!(
            "Postprocess upscale by: {}, Postprocess upscaler: {}",
            self.scale, self.name
        );
        let parameters = if known.parameters.is_empty() {
            pairs
        } else {
            format!("{}, {pairs}", known.parameters)
        };
        Metadata {
            parameters,
            sdgen: Value::Object(sdgen),
        }
    }
}

/// A picture to enlarge, with what its file says of it.
struct Source {
    input: Input,
    metadata: Option<Metadata>,
    /// its pixels are those that were written
    is_lossless: bool,
}

impl Source {
    fn read(path: &Path) -> Result<Self> {
        let (input, bytes) = Input::with_bytes(path)?;
        let is_lossless = Format::of_bytes(&bytes).is_some_and(|format| format != Format::Jpg);
        Ok(Self {
            input,
            metadata: read_metadata(&bytes).ok().flatten(),
            is_lossless,
        })
    }
}

/// Upscales every picture and prints its path. One that fails leaves the others alone.
pub fn run(args: &UpscaleArgs) -> Result<(), Failure> {
    let progress = Progress::new(ProgressMode::Auto, args.quiet, false);
    let Some(model) = &args.model else {
        let hint =
            format!("`-m FILE.safetensors` names one; {UPSCALERS}; `-m {LANCZOS}` needs none");
        return Err(anyhow!(
            "no upscaler is named, and none is built in\n\nhint: {hint}"
        ))
        .code(2);
    };
    let compute = Compute::choose(args.device, DTypeChoice::Auto).code(2)?;
    progress.stage("reading the upscaler");
    let upscaler = Upscaler::open(model, args.scale, &compute).code(3)?;
    let (results, _made) = plan(args, upscaler.scale).code(2)?;
    let total = results.len();
    let (mut saved, mut failed, mut first_failure) = (0, 0, None);
    for (source, (destination, format)) in args.pictures.iter().zip(&results) {
        if stdout::is_closed() {
            break;
        }
        let result = save(args, &upscaler, source, destination, *format, &progress);
        match result {
            Ok(record) => {
                saved += 1;
                print(args, destination, &record, &progress).code(1)?;
            }
            Err(Failure { error, .. }) if error.is::<DiskFull>() && total > 1 => {
                let error = error.context(format!("{saved} of {total} pictures are saved"));
                return Err(error).code(if saved > 0 { 6 } else { 1 });
            }
            Err(failure) => {
                if args.json {
                    let record = upscaler.record(source, destination, Err(&failure.error));
                    print(args, destination, &record, &progress).code(1)?;
                }
                if total > 1 {
                    progress.say(&failure.text());
                }
                failed += 1;
                first_failure = first_failure.or(Some(failure));
            }
        }
    }
    progress.finish();
    match first_failure {
        None => Ok(()),
        Some(failure) if total == 1 => Err(failure),
        Some(failure) => {
            let code = if saved > 0 { 6 } else { failure.code };
            Err(anyhow!(
                "{failed} of {total} pictures failed, {saved} are saved"
            ))
            .code(code)
        }
    }
}

/// Where each result goes, decided and found possible before anything is done, and the folders that
/// were made for them.
fn plan(args: &UpscaleArgs, scale: f64) -> Result<(Vec<(Destination, Format)>, MadeFolders)> {
    let typed = args.output.clone().unwrap_or_else(|| DEFAULT_NAME.into());
    if typed == "-" {
        if args.pictures.len() > 1 {
            bail!(
                "`-o -` takes one picture, but {} are to be upscaled\n\nhint: `-o FOLDER/` takes any number",
                args.pictures.len()
            );
        }
        if args.json {
            bail!("`-o -` and `--json` both want stdout");
        }
        require_no_terminal()?;
        let results = vec![(Destination::Stdout, args.format.unwrap_or(Format::Png))];
        return Ok((results, MadeFolders::default()));
    }
    // a folder whose name is not UTF-8 is taken as it stands
    let folder = match typed.to_str() {
        None => output_path::folder_of_output(Path::new(&typed)),
        Some(_) => PathBuf::new(),
    };
    let named = Path::new(&typed).strip_prefix(&folder);
    let mut template = match named {
        Ok(named) if !folder.as_os_str().is_empty() => named.to_string_lossy().into_owned(),
        _ => typed.to_string_lossy().into_owned(),
    };
    if template.is_empty() {
        template += DEFAULT_NAME;
    }
    if template.ends_with(std::path::is_separator) {
        template += DEFAULT_NAME;
    }
    let is_template = PLACEHOLDERS.iter().any(|name| template.contains(name));
    let rest = PLACEHOLDERS
        .iter()
        .fold(template.clone(), |rest, name| rest.replace(name, ""));
    if rest.contains(['{', '}']) {
        bail!(
            "`{template}` has an unknown placeholder\n\nhint: use one of {}",
            PLACEHOLDERS.join(", ")
        );
    }
    if is_template && Path::new(&rest).extension().is_none() {
        template += &format!(".{}", args.format.unwrap_or(Format::Png));
    }
    let mut taken: HashMap<String, &Path> = HashMap::new();
    let mut results = vec![];
    for (index, source) in args.pictures.iter().enumerate() {
        let stem = source
            .file_stem()
            .map(|stem| stem.to_string_lossy())
            .unwrap_or_default();
        let name = stem.replace('{', "{{").replace('}', "}}");
        let values = [name, scale.to_string(), index.to_string()];
        let path = PLACEHOLDERS
            .iter()
            .zip(&values)
            .fold(template.clone(), |path, (name, value)| {
                path.replace(name, value)
            });
        let path = folder.join(path);
        let (destination, format) = Destination::parse(Some(path.as_os_str()), args.format)?;
        if let Destination::File(path) = &destination
            && let Some(first) = taken.insert(path.to_string_lossy().to_lowercase(), source)
        {
            let hint =
                "`{name}` and `{index}` in `-o` tell them apart, as in `-o '{name}-{index}.png'`";
            bail!(
                "`{}` and `{}` would both become `{}`\n\nhint: {hint}",
                first.display(),
                source.display(),
                path.display()
            );
        }
        results.push((destination, format));
    }
    let paths: Vec<&Path> = results
        .iter()
        .filter_map(|(destination, _)| file_of(destination))
        .collect();
    let made = output_path::check_writable(&paths, is_template, args.overwrite())?;
    Ok((results, made))
}

fn file_of(destination: &Destination) -> Option<&Path> {
    if let Destination::File(path) = destination {
        Some(path)
    } else {
        None
    }
}

/// Upscales one picture, saves it and returns its record.
fn save(
    args: &UpscaleArgs,
    upscaler: &Upscaler,
    path: &Path,
    destination: &Destination,
    format: Format,
    progress: &Progress,
) -> Result<Value, Failure> {
    // as with `-i`, a picture that cannot be read is a wrong argument
    let source = Source::read(path).code(2)?;
    let has_alpha = format != Format::Jpg;
    if source.input.alpha.is_some() && !has_alpha {
        progress.note(format!(
            "`{}` is transparent in places; a JPEG cannot be, and shows it on white",
            path.display()
        ));
    }
    let start = Instant::now();
    let place = || format!("`{}` cannot be upscaled", path.display());
    let (picture, alpha) = if has_alpha {
        let Input { picture, alpha, .. } = &source.input;
        upscaler.upscale_with_alpha(picture, alpha.as_deref(), progress)
    } else {
        upscaler.upscale_with_alpha(&source.input.over_white(), None, progress)
    }
    .with_context(place)
    .code(1)?;
    let upscaling_s = start.elapsed().as_secs_f64();
    let metadata = (!args.no_metadata).then(|| upscaler.metadata(&source));
    let extras = Extras {
        alpha: alpha.as_deref(),
        icc_profile: source.input.icc_profile.as_deref(),
    };
    let bytes = picture
        .encode_with(format, metadata.as_ref(), extras)
        .with_context(place)
        .code(1)?;
    match file_of(destination) {
        Some(to) => output_path::save(to, &bytes, args.overwrite()),
        None => output_path::write_to_stdout(&bytes),
    }
    .code(1)?;
    Ok(upscaler.record(path, destination, Ok((&picture, upscaling_s))))
}

/// Prints the record of a picture, or its path.
fn print(
    args: &UpscaleArgs,
    destination: &Destination,
    record: &Value,
    progress: &Progress,
) -> Result<()> {
    let Some(path) = file_of(destination) else {
        return Ok(());
    };
    let mut line = match args.json {
        true => record.to_string().into_bytes(),
        false => path.as_os_str().as_encoded_bytes().to_vec(),
    };
    line.push(b'\n');
    progress.aside(|| say(&line))
}
