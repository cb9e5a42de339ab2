//! A finished picture: pixels from a tensor, and the file formats with what they remember.
//!
//! Hides how each format carries metadata: PNG in text chunks, JPEG and WebP in EXIF. Both hold
//! A1111's `parameters` text, which prompt readers parse, and the `sdgen` JSON, which draws the
//! picture again. Where a picture goes is told by [`crate::batch::output_path`].

pub mod load;

use std::fmt;
use std::io::Cursor;
use std::path::Path;
use std::str::FromStr;

use crate::hex::hex;
use anyhow::{Context, bail};
use candle_core::{Device, Tensor};
use image::codecs::jpeg::JpegEncoder;
use image::codecs::webp::WebPEncoder;
use image::{ExtendedColorType, ImageDecoder, ImageEncoder, ImageFormat};
use sha2::{Digest, Sha256};

/// The longest side of an image in pixels; more are mistakes.
pub const MAX_SIDE_PX: usize = 16384;
/// Close to the eye's limit; the encoder keeps the colour at full resolution (4:4:4).
const JPEG_QUALITY: u8 = 95;
/// The text that A1111 writes and that prompt readers look for.
const PARAMETERS_KEYWORD: &str = "parameters";
/// The JSON that draws the picture again.
const SDGEN_KEYWORD: &str = "sdgen";

/// Pixels of one picture: 8-bit RGB, row by row from the top, `width * height * 3` values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// [height, width, 3] in 0..=255.
    pub rgb: Vec<u8>,
}

/// How two pictures differ.
pub struct Difference {
    /// pixels that differ
    pub pixels: usize,
    /// by how much at most, in levels of 255
    pub largest: u8,
    /// peak signal-to-noise ratio; infinite if nothing differs
    pub psnr_db: f64,
}

impl Image {
    /// Takes RGB [b, h, w, 3] f32, clamped to 0..=1, to one picture for each batch item. Rounds
    /// half to even, as numpy does for diffusers. Errors if a value is NaN or infinite; to keep
    /// the other pictures of a batch then, convert it item by item.
    pub fn from_tensor(t: &Tensor) -> candle_core::Result<Vec<Image>> {
        let (b, height, width, channels) = t.dims4()?;
        if channels != 3 {
            candle_core::bail!("a picture has 3 channels, not {channels}");
        }
        let values = t.flatten_all()?.to_vec1::<f32>()?; // [b*h*w*3]
        let broken = values.iter().filter(|value| !value.is_finite()).count();
        if broken > 0 {
            let total = values.len();
            candle_core::bail!(
                "the picture is not finite: {broken} of {total} values are NaN or infinite"
            );
        }
        let mut levels = values
            .iter()
            .map(|value| (value.clamp(0.0, 1.0) * 255.0).round_ties_even() as u8);
        let size = height * width * 3;
        Ok((0..b)
            .map(|_| Image {
                width,
                height,
                rgb: levels.by_ref().take(size).collect(),
            })
            .collect())
    }

    /// RGB [1, h, w, 3] in 0..=1.
    pub fn to_tensor(&self, device: &Device) -> candle_core::Result<Tensor> {
        let values: Vec<f32> = self
            .rgb
            .iter()
            .map(|level| f32::from(*level) / 255.0)
            .collect();
        Tensor::from_vec(values, (1, self.height, self.width, 3), device)
    }

    /// Reads a PNG, JPEG or WebP file. Errors if it is damaged anywhere.
    pub fn decode(bytes: &[u8]) -> anyhow::Result<Image> {
        let decoded = image::load_from_memory(bytes)?.into_rgb8();
        Ok(Image {
            width: decoded.width() as usize,
            height: decoded.height() as usize,
            rgb: decoded.into_raw(),
        })
    }

    /// SHA-256 of the pixels alone, 64 lower-case hex digits: equal for the same picture in any
    /// lossless format and with any metadata.
    pub fn sha256(&self) -> String {
        hex(&Sha256::digest(&self.rgb))
    }

    /// Whether every pixel has the same colour, the mark of a decoder that overflowed.
    pub fn is_flat(&self) -> bool {
        let mut pixels = self.rgb.chunks_exact(3);
        let first = pixels.next();
        pixels.all(|pixel| Some(pixel) == first)
    }

    /// How it differs from another picture of the same size.
    pub fn difference(&self, other: &Image) -> Difference {
        let off = |(a, b): (&u8, &u8)| a.abs_diff(*b);
        let each = || self.rgb.iter().zip(&other.rgb).map(off);
        let square: f64 = each().map(|off| f64::from(off).powi(2)).sum();
        Difference {
            pixels: self
                .rgb
                .chunks_exact(3)
                .zip(other.rgb.chunks_exact(3))
                .filter(|(a, b)| a != b)
                .count(),
            largest: each().max().unwrap_or(0),
            psnr_db: 10.0 * (255f64.powi(2) * self.rgb.len() as f64 / square).log10(),
        }
    }

    /// Encodes the image as a file of this format, without metadata. Errors if the image is larger
    /// than the format takes.
    pub fn to_bytes(&self, format: Format) -> anyhow::Result<Vec<u8>> {
        self.encode(format, None)
    }

    /// The bytes of a file: PNG and WebP lossless, JPEG at quality 95 without chroma subsampling.
    /// Errors if the format cannot hold this size (JPEG 65535, WebP 16384 pixels a side) or, for
    /// JPEG, this much metadata (see `Metadata::check`).
    pub fn encode(&self, format: Format, metadata: Option<&Metadata>) -> anyhow::Result<Vec<u8>> {
        self.encode_with(format, metadata, Extras::default())
    }

    /// The same, with transparency, which JPEG leaves out, and a colour profile.
    pub fn encode_with(
        &self,
        format: Format,
        metadata: Option<&Metadata>,
        extras: Extras,
    ) -> anyhow::Result<Vec<u8>> {
        let (width, height) = (u32::try_from(self.width)?, u32::try_from(self.height)?);
        // The encoders of `image` panic on this.
        if self.rgb.len() as u64 != u64::from(width) * u64::from(height) * 3 {
            bail!(
                "{} values do not make a picture of {width}x{height}",
                self.rgb.len()
            );
        }
        if let Some(metadata) = metadata {
            metadata.check(format)?;
        }
        let alpha = extras.alpha.filter(|_| format != Format::Jpg);
        if alpha.is_some_and(|alpha| alpha.len() * 3 != self.rgb.len()) {
            bail!("the transparency is not of the picture's size");
        }
        let rgba = alpha.map(|alpha| {
            let pixels = self.rgb.chunks_exact(3).zip(alpha);
            pixels
                .flat_map(|(rgb, alpha)| [rgb[0], rgb[1], rgb[2], *alpha])
                .collect::<Vec<u8>>()
        });
        let raster = Raster {
            width,
            height,
            pixels: rgba.as_deref().unwrap_or(&self.rgb),
            has_alpha: rgba.is_some(),
            icc_profile: extras.icc_profile,
        };
        let mut bytes = Vec::new();
        match format {
            Format::Png => raster.write_png(&mut bytes, metadata)?,
            Format::Jpg => {
                let encoder = JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY);
                raster.write_with_exif(encoder, metadata)?;
            }
            Format::Webp => {
                let encoder = WebPEncoder::new_lossless(&mut bytes);
                raster.write_with_exif(encoder, metadata)?;
            }
        }
        Ok(bytes)
    }
}

/// What a file holds beside a picture's colours.
#[derive(Debug, Clone, Copy, Default)]
pub struct Extras<'a> {
    /// [height, width], 0 for transparent
    pub alpha: Option<&'a [u8]>,
    /// of RGB
    pub icc_profile: Option<&'a [u8]>,
}

/// Pixels on their way into a file.
struct Raster<'a> {
    width: u32,
    height: u32,
    /// RGB, or RGBA
    pixels: &'a [u8],
    has_alpha: bool,
    icc_profile: Option<&'a [u8]>,
}

impl Raster<'_> {
    fn write_png(&self, bytes: &mut Vec<u8>, metadata: Option<&Metadata>) -> anyhow::Result<()> {
        let mut info = png::Info::with_size(self.width, self.height);
        info.icc_profile = self.icc_profile.map(Into::into);
        let mut encoder = png::Encoder::with_info(bytes, info)?;
        encoder.set_color(if self.has_alpha {
            png::ColorType::Rgba
        } else {
            png::ColorType::Rgb
        });
        encoder.set_depth(png::BitDepth::Eight);
        // 1024x1024 in 45 ms and 1.27 MB, where `Balanced` takes 1.2 s for 1.22 MB.
        encoder.set_compression(png::Compression::Fast);
        if let Some(Metadata { parameters, sdgen }) = metadata {
            for (keyword, text) in [
                (PARAMETERS_KEYWORD, parameters),
                (SDGEN_KEYWORD, &sdgen.to_string()),
            ] {
                // Neither chunk may hold a NUL.
                let text = text.replace('\0', "\u{fffd}");
                if text.chars().all(is_latin1_text) {
                    encoder.add_text_chunk(keyword.to_owned(), text)?;
                } else {
                    encoder.add_itxt_chunk(keyword.to_owned(), text)?;
                }
            }
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(self.pixels)?;
        writer.finish()?;
        Ok(())
    }

    fn write_with_exif(
        &self,
        mut encoder: impl ImageEncoder,
        metadata: Option<&Metadata>,
    ) -> anyhow::Result<()> {
        if let Some(profile) = self.icc_profile {
            encoder.set_icc_profile(profile.to_vec())?;
        }
        if let Some(metadata) = metadata {
            encoder.set_exif_metadata(exif::write(metadata)?)?;
        }
        let colour = if self.has_alpha {
            ExtendedColorType::Rgba8
        } else {
            ExtendedColorType::Rgb8
        };
        encoder.write_image(self.pixels, self.width, self.height, colour)?;
        Ok(())
    }
}

/// What a `tEXt` chunk may hold: printable Latin-1 and line feeds (PNG, third edition, 11.3.3.2).
fn is_latin1_text(c: char) -> bool {
    matches!(c, '\n' | ' '..='~' | '\u{a0}'..='\u{ff}')
}

/// File formats that can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Lossless, text chunks.
    Png,
    /// Lossy, EXIF.
    Jpg,
    /// Lossless, EXIF.
    Webp,
}

impl Format {
    /// By a file's first bytes; none if it is of no kind that we write.
    pub fn of_bytes(bytes: &[u8]) -> Option<Format> {
        match image::guess_format(bytes).ok()? {
            image::ImageFormat::Png => Some(Format::Png),
            image::ImageFormat::Jpeg => Some(Format::Jpg),
            image::ImageFormat::WebP => Some(Format::Webp),
            _ => None,
        }
    }

    /// The format that a file name's extension names, in any case; `None` without an extension.
    /// Errors if the extension is no format that can be written.
    pub fn of_path(path: &Path) -> anyhow::Result<Option<Format>> {
        path.extension()
            .map(|extension| extension.to_string_lossy().parse())
            .transpose()
    }

    /// The file name extension, without the dot.
    pub fn extension(self) -> &'static str {
        match self {
            Format::Png => "png",
            Format::Jpg => "jpg",
            Format::Webp => "webp",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.extension())
    }
}

impl FromStr for Format {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> anyhow::Result<Format> {
        match name.to_ascii_lowercase().as_str() {
            "png" => Ok(Format::Png),
            "jpg" | "jpeg" => Ok(Format::Jpg),
            "webp" => Ok(Format::Webp),
            _ => bail!(
                "cannot write pictures as `{name}`\n\nhint: the formats are `png`, `jpg` and `webp`; `--format` chooses one whatever the name says"
            ),
        }
    }
}

/// What a picture file remembers of how it was drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Metadata {
    /// A1111's text, from [`parameters`]; empty if a file that was read has none.
    pub parameters: String,
    /// Everything needed to draw it again; null if the file was written by another program.
    pub sdgen: serde_json::Value,
}

impl Metadata {
    /// Errors if the format has no room for this: JPEG's EXIF segment ends at 64 KiB, some 15,000
    /// characters of prompt. Known before anything is drawn.
    pub fn check(&self, format: Format) -> anyhow::Result<()> {
        // A segment's length counts itself (2 bytes) and `Exif\0\0` (6).
        const MOST_BYTES: usize = u16::MAX as usize - 8;
        if format == Format::Jpg && exif::write(self)?.len() > MOST_BYTES {
            bail!(
                "prompt and settings are too long to be stored in a JPEG\n\nhint: use `--format png`, or leave them out with `--no-metadata`"
            );
        }
        Ok(())
    }
}

/// Reads what [`Image::encode`] or A1111 has stored in a PNG, JPEG or WebP file; `None` if the
/// picture carries nothing of it. Errors if the bytes are no such picture or its `sdgen` part is
/// no JSON.
pub fn read_metadata(bytes: &[u8]) -> anyhow::Result<Option<Metadata>> {
    let (parameters, sdgen) = match image::guess_format(bytes) {
        Ok(ImageFormat::Png) => read_text_chunks(bytes)?,
        Ok(format @ (ImageFormat::Jpeg | ImageFormat::WebP)) => {
            let mut decoder =
                image::ImageReader::with_format(Cursor::new(bytes), format).into_decoder()?;
            decoder
                .exif_metadata()?
                .map(|tiff| exif::read(&tiff))
                .unwrap_or_default()
        }
        _ => bail!("this is not a PNG, JPEG or WebP picture"),
    };
    if parameters.is_none() && sdgen.is_none() {
        return Ok(None);
    }
    let sdgen = sdgen
        .map(|json| serde_json::from_str(&json).context("the picture's `sdgen` part is not JSON"))
        .transpose()?;
    Ok(Some(Metadata {
        parameters: parameters.unwrap_or_default(),
        sdgen: sdgen.unwrap_or_default(),
    }))
}

/// `parameters` and `sdgen` text of a PNG.
fn read_text_chunks(bytes: &[u8]) -> anyhow::Result<(Option<String>, Option<String>)> {
    let reader = png::Decoder::new(Cursor::new(bytes)).read_info()?;
    let info = reader.info();
    let text = |keyword: &str| {
        let latin1 = info
            .uncompressed_latin1_text
            .iter()
            .find(|chunk| chunk.keyword == keyword);
        let utf8 = info.utf8_text.iter().find(|chunk| chunk.keyword == keyword);
        match (latin1, utf8) {
            (Some(chunk), _) => Ok(Some(chunk.text.clone())),
            (None, Some(chunk)) => chunk.get_text().map(Some),
            (None, None) => Ok(None),
        }
    };
    Ok((text(PARAMETERS_KEYWORD)?, text(SDGEN_KEYWORD)?))
}

/// The EXIF block of JPEG and WebP (CIPA DC-008-2023, "Exif 3.0", section 4.6): the `parameters`
/// text is its UserComment in UTF-16, as A1111 writes it through piexif; the `sdgen` JSON is its
/// MakerNote, the place for a program's own data.
mod exif {
    use std::io::Cursor;

    use exif::experimental::Writer;
    use exif::{Error, Exif, Field, In, Reader, Tag, Value};

    use super::Metadata;

    const UNICODE: &[u8] = b"UNICODE\0";
    const ASCII: &[u8] = b"ASCII\0\0\0";
    const UNSPECIFIED: &[u8] = b"\0\0\0\0\0\0\0\0";
    /// Marks the MakerNote as ours; UTF-8 JSON follows.
    const SIGNATURE: &[u8] = b"sdgen\0";

    /// Returns the bytes of a block with both texts. Errors if they are larger than 4 GB.
    pub fn write(metadata: &Metadata) -> Result<Vec<u8>, Error> {
        let note = [SIGNATURE, metadata.sdgen.to_string().as_bytes()].concat();
        let mut comment = UNICODE.to_vec();
        comment.extend(
            metadata
                .parameters
                .encode_utf16()
                .flat_map(u16::to_be_bytes),
        );
        let fields =
            [(Tag::MakerNote, note), (Tag::UserComment, comment)].map(|(tag, bytes)| Field {
                tag,
                ifd_num: In::PRIMARY,
                value: Value::Undefined(bytes, 0),
            });
        let mut writer = Writer::new();
        for field in &fields {
            writer.push_field(field);
        }
        let mut block = Cursor::new(Vec::new());
        let little_endian = false;
        writer.write(&mut block, little_endian)?;
        Ok(block.into_inner())
    }

    /// Reads the `parameters` and the `sdgen` text; each is `None` where the block lacks or garbles
    /// it.
    pub fn read(block: &[u8]) -> (Option<String>, Option<String>) {
        let tiff = block.strip_prefix(b"Exif\0\0").unwrap_or(block); // as Pillow has it in WebP
        let Ok(exif) = Reader::new()
            .continue_on_error(true)
            .read_raw(tiff.to_vec())
            .or_else(|error| error.distill_partial_result(|_| {}))
        else {
            return (None, None);
        };
        let parameters = bytes_of(&exif, Tag::UserComment).map(comment_text);
        let sdgen = bytes_of(&exif, Tag::MakerNote)
            .and_then(|note| note.strip_prefix(SIGNATURE))
            .map(|json| String::from_utf8_lossy(json).into_owned());
        (parameters, sdgen)
    }

    fn bytes_of(exif: &Exif, tag: Tag) -> Option<&[u8]> {
        match &exif.get_field(tag, In::PRIMARY)?.value {
            Value::Undefined(bytes, _) | Value::Byte(bytes) => Some(bytes),
            _ => None,
        }
    }

    fn comment_text(comment: &[u8]) -> String {
        if let Some(text) = comment.strip_prefix(UNICODE) {
            let units: Vec<u16> = text
                .chunks_exact(2)
                .map(|pair| u16::from_be_bytes([pair[0], pair[1]]))
                .collect();
            return String::from_utf16_lossy(&units);
        }
        let text = comment
            .strip_prefix(ASCII)
            .or_else(|| comment.strip_prefix(UNSPECIFIED))
            .unwrap_or(comment);
        String::from_utf8_lossy(text).into_owned()
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn the_block_has_the_bytes_that_it_always_had() {
            let metadata = Metadata {
                parameters: "a".to_owned(),
                sdgen: serde_json::json!([1]),
            };
            let expected = [
                b"MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\0\0\0\x1a\0\0\0\0".as_slice(),
                b"\0\x02\x92\x7c\0\x07\0\0\0\x09\0\0\0\x38",
                b"\x92\x86\0\x07\0\0\0\x0a\0\0\0\x42\0\0\0\0",
                b"sdgen\0[1]\0UNICODE\0\0a",
            ];
            let block = write(&metadata).ok();
            assert_eq!(block, Some(expected.concat()));
        }
    }
}

/// What A1111's `parameters` text says of a picture, by A1111's names.
#[derive(Debug, Clone, Copy)]
pub struct Parameters<'a> {
    /// As typed, weights included.
    pub prompt: &'a str,
    /// As typed; empty for none.
    pub negative: &'a str,
    /// Denoising steps.
    pub steps: usize,
    /// `Euler a`, `DPM++ 2M`, ...
    pub sampler: &'a str,
    /// `Karras`, `Exponential`, ...; `None` for the sampler's own.
    pub schedule: Option<&'a str>,
    /// `CFG scale`.
    pub guidance: f64,
    /// Of this picture.
    pub seed: u64,
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// First hex digits of the checkpoint's SHA-256.
    pub model_hash: Option<&'a str>,
    /// The checkpoint's name without folder and extension.
    pub model: &'a str,
    /// Further pairs such as `("Clip skip", "2")`, in A1111's order.
    pub extra: &'a [(&'a str, String)],
}

/// A1111's `parameters` text (`create_infotext` in its processing.py): the prompt, a line
/// `Negative prompt: ...` if there is one, then one line of `Name: value` pairs.
pub fn parameters(fields: &Parameters<'_>) -> String {
    let Parameters {
        prompt,
        negative,
        steps,
        sampler,
        schedule,
        guidance,
        seed,
        width,
        height,
        ..
    } = *fields;
    let mut pairs = vec![
        ("Steps", steps.to_string()),
        ("Sampler", sampler.to_owned()),
    ];
    pairs.extend(schedule.map(|schedule| ("Schedule type", schedule.to_owned())));
    pairs.push(("CFG scale", guidance.to_string()));
    pairs.push(("Seed", seed.to_string()));
    pairs.push(("Size", format!("{width}x{height}")));
    pairs.extend(
        fields
            .model_hash
            .map(|hash| ("Model hash", hash.to_owned())),
    );
    pairs.push(("Model", fields.model.to_owned()));
    pairs.extend(fields.extra.iter().cloned());
    pairs.push((
        "Version",
        concat!("sdgen ", env!("CARGO_PKG_VERSION")).to_owned(),
    ));

    let pairs: Vec<String> = pairs
        .iter()
        .map(|(name, value)| format!("{name}: {}", quote(value)))
        .collect();
    let negative = if negative.is_empty() {
        String::new()
    } else {
        format!("\nNegative prompt: {negative}")
    };
    format!("{prompt}{negative}\n{}", pairs.join(", "))
        .trim()
        .to_owned()
}

/// A value that holds a separator becomes a JSON string, as A1111's `quote` does.
fn quote(value: &str) -> String {
    if value.contains([',', '\n', ':']) {
        serde_json::Value::from(value).to_string()
    } else {
        value.to_owned()
    }
}
