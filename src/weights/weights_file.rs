//! One file of weights, safetensors or GGUF: its header, checked, and its bytes on demand. Nothing is
//! mapped: a tensor is read when asked for, so a file that shrinks meanwhile is an error rather than a
//! crash, and memory holds only what was asked for.

use super::file;
use super::file_hash::FileHashes;
use super::gguf::{self, GgufHeader};
use super::key_mapping::Part;
use crate::hex::hex;
use crate::nn::blocks::{BlockType, Rows};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::{Dtype, tensor::Metadata};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The largest header that is read; larger ones are hostile or broken (safetensors' own limit).
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The number of bytes of a tensor that go into a fingerprint.
const SAMPLE_BYTES: usize = 4096;

/// The most tensors that a file may list: the largest models have some ten thousand.
const MAX_TENSORS: usize = 200_000;

/// The most elements that a tensor may have, dimensions of size 0 left out.
pub(super) const MAX_ELEMENTS: usize = 1 << 40;

/// The key that every tensor has in a header.
const OFFSETS: &[u8] = b"\"data_offsets\"";

/// The number of first bytes by which a file that is no safetensors is recognised.
const RECOGNISED_BY: u64 = 1024;

/// The suffix of the scales [rows] of an 8-bit tensor, one factor for each row of its first
/// dimension.
const SCALE: &str = "_scale";

/// The ending of what says that a file's 8-bit floats have scales.
const SCALED_FP8: &str = "scaled_fp8";

/// Endings of what belongs to an 8-bit `.weight`: its scale, and that of what it is multiplied
/// with in 8 bits.
const COMPANIONS: [&str; 5] = [
    NOTE,
    ".scale_weight",
    ".weight_scale",
    ".scale_input",
    ".input_scale",
];

/// The ending of ComfyUI's note on a quantised layer, in JSON.
const NOTE: &str = ".comfy_quant";

/// The longest note that is read.
const MAX_NOTE_BYTES: usize = 1 << 16;

/// The key of the metadata under which these notes stand in newer files.
const NOTES: &str = "_quantization_metadata";

/// The formats of notes whose numbers are read.
const FORMATS: [&str; 3] = ["float8_e4m3fn", "float8_e5m2", "int8_tensorwise"];

/// Endings of what only weights have that others quantised, and whose they are.
const QUANTISED_BY_OTHERS: [(&str, &str); 3] = [
    (".quant_state.bitsandbytes__nf4", "bitsandbytes' NF4"),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes' FP4"),
    (".wscales", "Nunchaku's SVDQuant"),
];

/// What ComfyUI notes of a quantised layer.
#[derive(Debug, Clone, Deserialize)]
struct Note {
    format: String,
    /// whether each group of a row's numbers is rotated
    #[serde(default)]
    convrot: bool,
    #[serde(default = "Note::group")]
    convrot_groupsize: usize,
}

impl Note {
    fn group() -> usize {
        256
    }
}

#[derive(Deserialize)]
struct Notes {
    #[serde(default)]
    layers: HashMap<String, Note>,
}

enum Bytes {
    File(Mutex<File>),
    #[cfg(feature = "mini")]
    Embedded(&'static [u8]),
}

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    Plain(Dtype),
    Blocks(BlockType),
    /// in a type of this name, which is not read
    Unread(&'static str),
}

impl Stored {
    /// The type of a number in a GGUF file.
    pub(super) fn of_ggml(number: u32) -> Self {
        match number {
            0 => Self::Plain(Dtype::F32),
            1 => Self::Plain(Dtype::F16),
            30 => Self::Plain(Dtype::BF16),
            _ => BlockType::of(number).map_or_else(Self::Unread, Self::Blocks),
        }
    }

    /// The number of the type in a GGUF file; none if such files do not have it.
    pub(super) fn ggml(self) -> Option<u32> {
        /// More than any type's.
        const END: u32 = 64;
        (0..END).find(|number| Self::of_ggml(*number) == self)
    }

    /// The numbers that are stored together, and their bytes; none of a type that is not read.
    pub(super) fn block(self) -> Option<(usize, usize)> {
        match self {
            Self::Plain(dtype) => Some((1, dtype.bitsize() / 8)),
            Self::Blocks(blocks) => Some(blocks.block()),
            Self::Unread(_) => None,
        }
    }

    /// Its name, in lower case.
    pub(super) fn name(self) -> String {
        match self {
            Self::Plain(dtype) => format!("{dtype:?}").to_lowercase(),
            Self::Blocks(blocks) => blocks.name().into(),
            Self::Unread(name) => name.to_lowercase(),
        }
    }

    fn is_8_bit(self) -> bool {
        matches!(self, Self::Plain(dtype) if dtype == Dtype::I8 || is_fp8(dtype))
    }
}

/// A tensor of the file.
struct Info {
    stored: Stored,
    shape: Vec<usize>,
    /// its first byte behind the header, and the one after its last
    data_offsets: (usize, usize),
}

/// An open file of weights.
pub struct WeightsFile {
    path: PathBuf,
    bytes: Bytes,
    /// offset of the data behind the header, in bytes
    data_start: u64,
    /// size of the whole file in bytes
    pub len: u64,
    tensors: BTreeMap<String, Info>,
    metadata: HashMap<String, String>,
    /// of quantised layers
    notes: HashMap<String, Note>,
    /// tokenizer.json of a text encoder, where the file holds one
    tokenizer: Option<String>,
}

impl WeightsFile {
    /// Opens a file and checks its header against its size. Errors name the file and what is wrong
    /// with it.
    pub fn open(path: &Path) -> Result<Self> {
        let shown = path.display();
        let (mut file, len) = file::open(path)?;
        let mut start = vec![];
        let mut read = |start: &mut Vec<u8>, bytes: u64| {
            (&mut file)
                .take(bytes)
                .read_to_end(start)
                .with_context(|| format!("cannot read `{shown}`"))
        };
        read(&mut start, RECOGNISED_BY)?;
        if start.starts_with(gguf::MAGIC) {
            file.rewind()?;
            let header = GgufHeader::read(BufReader::new(&mut file), len)
                .with_context(|| format!("`{shown}` is not a whole GGUF file"))?;
            return Self::of_gguf(path, header, len, file);
        }
        refuse_other_formats(&start, path)?;
        let header_len = header_len(&start, len)
            .with_context(|| format!("`{shown}` is not a safetensors file"))?;
        read(&mut start, (8 + header_len).saturating_sub(RECOGNISED_BY))?;
        start.truncate(usize::try_from(8 + header_len)?);
        Self::checked(
            path.to_path_buf(),
            &start,
            len,
            Bytes::File(Mutex::new(file)),
        )
    }

    /// Opens a file that is part of the program.
    #[cfg(feature = "mini")]
    pub fn embedded(name: &str, bytes: &'static [u8]) -> Result<Self> {
        let header_len = header_len(bytes, bytes.len() as u64)?;
        let header = bytes
            .get(..8 + usize::try_from(header_len)?)
            .context("short header")?;
        Self::checked(
            PathBuf::from(name),
            header,
            bytes.len() as u64,
            Bytes::Embedded(bytes),
        )
    }

    fn of_gguf(path: &Path, header: GgufHeader, len: u64, file: File) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (name, tensor) in header.tensors {
            let from = usize::try_from(tensor.from)?;
            let info = Info {
                stored: tensor.stored,
                shape: tensor.shape,
                data_offsets: (from, from + usize::try_from(tensor.bytes)?),
            };
            tensors.insert(name, info);
        }
        Ok(Self {
            path: path.into(),
            bytes: Bytes::File(Mutex::new(file)),
            data_start: header.data_start,
            len,
            tensors,
            metadata: header.notes,
            notes: HashMap::new(),
            tokenizer: header.tokenizer,
        })
    }

    fn checked(path: PathBuf, start: &[u8], len: u64, bytes: Bytes) -> Result<Self> {
        let shown = path.display();
        let listed = start
            .windows(OFFSETS.len())
            .filter(|bytes| *bytes == OFFSETS)
            .count();
        if listed > MAX_TENSORS {
            bail!("the header of `{shown}` lists {listed} tensors, more than any model has");
        }
        // parsing checks that tensors neither overlap nor leave gaps, and are as long as shape and
        // type say
        let header: Metadata = serde_json::from_slice(start.get(8..).unwrap_or_default())
            .with_context(|| format!("the header of `{shown}` is damaged"))?;
        let elements = |shape: &[usize]| {
            let mut sizes = shape.iter().map(|size| (*size).max(1));
            sizes
                .try_fold(1_usize, |product, size| product.checked_mul(size))
                .filter(|elements| *elements <= MAX_ELEMENTS)
        };
        let tensors = header.tensors();
        if let Some((name, info)) = tensors
            .iter()
            .find(|(_, info)| elements(&info.shape).is_none())
        {
            bail!(
                "the header of `{shown}` is damaged: tensor `{name}` has shape {:?}",
                info.shape
            );
        }
        let end = tensors
            .values()
            .map(|t| t.data_offsets.1 as u64)
            .max()
            .unwrap_or(0);
        let data_start = start.len() as u64;
        if data_start + end > len {
            bail!(
                "`{shown}` is cut short: its header promises {} bytes, the file has {len}\n\nhint: the download was interrupted; fetch the file again",
                data_start + end
            );
        }
        let mut checked = Self {
            path,
            bytes,
            data_start,
            len,
            tensors: tensors
                .into_iter()
                .map(|(name, info)| {
                    let info = Info {
                        stored: Stored::Plain(info.dtype),
                        shape: info.shape.clone(),
                        data_offsets: info.data_offsets,
                    };
                    (name, info)
                })
                .collect(),
            metadata: header.metadata().clone().unwrap_or_default(),
            notes: HashMap::new(),
            tokenizer: None,
        };
        checked.notes = checked.read_notes()?;
        Ok(checked)
    }

    /// Reads the notes on quantised layers. Errors name a way of quantising that is not read.
    fn read_notes(&self) -> Result<HashMap<String, Note>> {
        let shown = self.path.display();
        let mut notes = HashMap::new();
        if let Some(text) = self.metadata(NOTES) {
            let all: Notes = serde_json::from_str(text)
                .with_context(|| format!("`{NOTES}` in the header of `{shown}` is damaged"))?;
            notes.extend(all.layers);
        }
        for (name, info) in &self.tensors {
            let by = QUANTISED_BY_OTHERS
                .iter()
                .find(|(end, _)| name.ends_with(end));
            if let Some((_, by)) = by {
                bail!(
                    "`{shown}` is quantised as {by}, which sdgen does not read\n\nhint: fetch the model as fp8 or GGUF, such as Q4_K_M"
                );
            }
            let (Some(layer), (from, to)) = (name.strip_suffix(NOTE), info.data_offsets) else {
                continue;
            };
            let note = (to - from <= MAX_NOTE_BYTES).then(|| {
                let bytes = self.bytes_of(from, to)?;
                Ok::<_, anyhow::Error>(serde_json::from_slice(&bytes)?)
            });
            let note = note
                .context("it is too long")
                .flatten()
                .with_context(|| format!("the note `{name}` of `{shown}` is damaged"))?;
            notes.insert(layer.to_string(), note);
        }
        for (layer, note) in &notes {
            if !FORMATS.contains(&&*note.format) {
                bail!(
                    "`{shown}` has its layer `{layer}` as {}, which sdgen does not read\n\nhint: fetch the model as fp8, int8 or GGUF, such as Q4_K_M",
                    note.format
                );
            }
        }
        Ok(notes)
    }

    /// The file's path, or the name of the embedded model.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The value of a key in the header's metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// tokenizer.json of the text encoder in a GGUF file, if that holds its tokenizer.
    pub fn tokenizer(&self) -> Option<&str> {
        self.tokenizer.as_deref()
    }

    fn info(&self, key: &str) -> Option<&Info> {
        self.tensors.get(key)
    }

    /// Iterates over (name, shape, stored type) of every tensor, by name; the scales of 8-bit
    /// tensors belong to them and are not listed.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Vec<usize>, String)> {
        let is_8_bit = |name: &str| self.info(name).is_some_and(|info| info.stored.is_8_bit());
        let scales = move |name: &str| {
            name.ends_with(SCALED_FP8)
                || name.strip_suffix(SCALE).is_some_and(is_8_bit)
                || COMPANIONS
                    .iter()
                    .filter_map(|end| name.strip_suffix(end))
                    .any(|layer| is_8_bit(&format!("{layer}.weight")))
        };
        self.tensors
            .iter()
            .filter(move |(name, _)| !scales(name))
            .map(|(name, t)| (name.clone(), t.shape.clone(), t.stored.name()))
    }

    /// The names of all tensors that [`Self::tensors`] lists.
    pub fn keys(&self) -> Vec<String> {
        self.tensors().map(|(key, ..)| key).collect()
    }

    /// The shape of a tensor.
    pub fn shape(&self, key: &str) -> Option<&[usize]> {
        Some(&self.info(key)?.shape)
    }

    /// SHA-256 of the data without the header, in hex.
    pub fn data_hash(&self) -> Result<String> {
        const PIECE: usize = 1 << 22;
        let (mut hash, end) = (Sha256::new(), usize::try_from(self.len - self.data_start)?);
        for from in (0..end).step_by(PIECE) {
            hash.update(
                self.bytes_of(from, end.min(from + PIECE))
                    .with_context(|| format!("cannot read `{}`", self.path.display()))?,
            );
        }
        Ok(hex(&hash.finalize()))
    }

    /// SHA-256 of the whole file, in hex.
    pub fn file_hash(&self, hashes: &FileHashes) -> Result<String> {
        match &self.bytes {
            #[cfg(feature = "mini")]
            Bytes::Embedded(bytes) => Ok(hex(&Sha256::digest(bytes))),
            Bytes::File(_) => hashes.sha256(&self.path),
        }
    }

    /// Returns the first bytes of a tensor's part, for fingerprints.
    pub fn sample(&self, key: &str, part: &Part) -> Result<Vec<u8>> {
        let info = self
            .info(key)
            .with_context(|| format!("no tensor `{key}`"))?;
        let (mut from, mut to) = info.data_offsets;
        if let Part::Rows { index, count, of } = part {
            let bytes = (to - from) / of;
            (from, to) = (from + index * bytes, from + (index + count) * bytes);
        }
        let read_from = |from, to| {
            self.bytes_of(from, to)
                .with_context(|| format!("cannot read tensor `{key}` of `{}`", self.path.display()))
        };
        if *part == Part::SwappedHalves {
            let half = from + (to - from) / 2;
            let mut bytes = read_from(half, to.min(half + SAMPLE_BYTES))?;
            let more = SAMPLE_BYTES - bytes.len();
            bytes.extend(read_from(from, half.min(from + more))?);
            return Ok(bytes);
        }
        let read = |to| read_from(from, to);
        let (Part::Transposed, [rows, columns], Stored::Plain(_)) =
            (part, &*info.shape, info.stored)
        else {
            return read(to.min(from + SAMPLE_BYTES));
        };
        let raw = read(to)?;
        let size = raw.len() / (rows * columns).max(1);
        let elements = (0..*columns)
            .flat_map(|column| (0..*rows).map(move |row| (row * columns + column) * size));
        Ok(elements
            .take(SAMPLE_BYTES.div_ceil(size.max(1)))
            .filter_map(|at| raw.get(at..at + size))
            .flatten()
            .copied()
            .collect())
    }

    fn bytes_of(&self, from: usize, to: usize) -> Result<Vec<u8>> {
        match &self.bytes {
            #[cfg(feature = "mini")]
            Bytes::Embedded(bytes) => {
                let start = usize::try_from(self.data_start)?;
                Ok(bytes
                    .get(start + from..start + to)
                    .context("it lies outside of the file")?
                    .to_vec())
            }
            Bytes::File(file) => {
                let mut raw = vec![0u8; to - from];
                let mut file = file
                    .lock()
                    .map_err(|_| anyhow::anyhow!("the file was left locked by a failed reader"))?;
                file.seek(SeekFrom::Start(self.data_start + from as u64))?;
                file.read_exact(&mut raw)?;
                Ok(raw)
            }
        }
    }

    /// Reads a part of one tensor on the CPU: f16 and bf16 as they are, fp8 without a scale as f16,
    /// which holds each of its values, all else as f32. Of a block of rows no other bytes are read.
    /// Errors name file and tensor.
    pub fn read_part(&self, key: &str, part: &Part) -> Result<Tensor> {
        let tensor = || self.read(key);
        Ok(match *part {
            Part::Whole => tensor()?,
            Part::Rows { index, count, of } => {
                if self.info(key).is_some_and(Info::has_separate_rows) {
                    return self.read_rows(key, index..index + count, of);
                }
                let tensor = tensor()?;
                let rows = tensor.dim(0)? / of;
                tensor.narrow(0, index * rows, count * rows)?
            }
            Part::Transposed => tensor()?.t()?.contiguous()?,
            Part::SwappedHalves => {
                let tensor = tensor()?;
                let half = tensor.dim(0)? / 2;
                let (first, second) = (tensor.narrow(0, 0, half)?, tensor.narrow(0, half, half)?);
                Tensor::cat(&[second, first], 0)?
            }
        })
    }

    /// Reads a part of a matrix that is stored in blocks as it is; none of what is not, or whose rows are
    /// not apart. Errors name file and tensor.
    pub fn read_blocks(&self, key: &str, part: &Part) -> Result<Option<Vec<Rows>>> {
        let Some((info, kind)) = self.info(key).and_then(|info| match info.stored {
            Stored::Blocks(kind) if info.has_separate_rows() => Some((info, kind)),
            _ => None,
        }) else {
            return Ok(None);
        };
        let (from, to) = info.data_offsets;
        let read = |from, to| {
            let raw = self.bytes_of(from, to).with_context(|| {
                format!("cannot read tensor `{key}` of `{}`", self.path.display())
            })?;
            Ok::<_, anyhow::Error>(Rows { kind, raw })
        };
        Ok(match *part {
            Part::Whole => Some(vec![read(from, to)?]),
            Part::Rows { index, count, of } => {
                let bytes = (to - from) / of;
                let (from, to) = (from + index * bytes, from + (index + count) * bytes);
                Some(vec![read(from, to)?])
            }
            Part::SwappedHalves => {
                let half = from + (to - from) / 2;
                Some(vec![read(half, to)?, read(from, half)?])
            }
            Part::Transposed => None,
        })
    }

    /// Reads a whole tensor in its stored shape, as [`Self::read_part`] does.
    pub fn read(&self, key: &str) -> Result<Tensor> {
        self.read_rows(key, 0..1, 1)
    }

    /// Reads some of `of` equal blocks of a tensor's rows.
    fn read_rows(&self, key: &str, blocks: Range<usize>, of: usize) -> Result<Tensor> {
        let shown = self.path.display();
        let info = self
            .info(key)
            .with_context(|| format!("`{shown}` has no tensor `{key}`"))?;
        let mut shape = info.shape.clone();
        let (start, end) = info.data_offsets;
        let (mut from, mut bytes) = (start, end - start);
        if let (2.., Some(rows)) = (of, shape.first_mut()) {
            let of_row = bytes / (*rows).max(1);
            let block = *rows / of;
            *rows = blocks.len() * block;
            from += blocks.start * block * of_row;
            bytes = of_row * *rows;
        }
        let raw = self
            .bytes_of(from, from + bytes)
            .with_context(|| format!("cannot read tensor `{key}` of `{shown}`"))?;
        let shape = shape.as_slice();
        let dtype = match info.stored {
            Stored::Plain(dtype) => dtype,
            Stored::Blocks(blocks) => {
                return Ok(Tensor::from_vec(
                    blocks.dequantize(&raw),
                    shape,
                    &Device::Cpu,
                )?);
            }
            Stored::Unread(name) => bail!(
                "tensor `{key}` of `{shown}` is stored as {name}, which sdgen does not read\n\nhint: fetch the model in another type, such as Q8_0 or Q4_K_M"
            ),
        };
        let values = match dtype {
            Dtype::F16 => {
                return Ok(Tensor::from_vec(
                    numbers(&raw, f16::from_le_bytes),
                    shape,
                    &Device::Cpu,
                )?);
            }
            Dtype::BF16 => {
                return Ok(Tensor::from_vec(
                    numbers(&raw, bf16::from_le_bytes),
                    shape,
                    &Device::Cpu,
                )?);
            }
            Dtype::F32 => numbers(&raw, f32::from_le_bytes),
            Dtype::F64 => numbers(&raw, |bytes| f64::from_le_bytes(bytes) as f32),
            Dtype::I64 => numbers(&raw, |bytes| i64::from_le_bytes(bytes) as f32),
            Dtype::I8 => {
                let rows = info.shape.first().copied().unwrap_or(1);
                let mut values = self.rescale(key, rows, &raw, |byte| f32::from(byte as i8))?;
                if let Some(note) = self.note(key).filter(|note| note.convrot) {
                    let columns = values.len() / rows.max(1);
                    rotate(&mut values, columns, note.convrot_groupsize).with_context(|| {
                        format!("tensor `{key}` of `{shown}` cannot be rotated back")
                    })?;
                }
                values
            }
            dtype if is_fp8(dtype) => {
                let widen = if dtype == Dtype::F8_E5M2 {
                    from_e5m2
                } else {
                    from_e4m3
                };
                if self.scale_of(key).is_none() {
                    let values = numbers(&raw, |[byte]| widen(byte));
                    return Ok(Tensor::from_vec(values, shape, &Device::Cpu)?);
                }
                let rows = info.shape.first().copied().unwrap_or(1);
                self.rescale(key, rows, &raw, |byte| widen(byte).to_f32())?
            }
            other => bail!(
                "tensor `{key}` of `{shown}` is stored as {other:?}\n\nhint: f32, f16, bf16, f64, fp8 and i8 with scales can be read; convert the file to one of these"
            ),
        };
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    /// What is noted of a tensor's layer.
    fn note(&self, key: &str) -> Option<&Note> {
        self.notes.get(key.strip_suffix(".weight")?)
    }

    /// The name of the scale of an 8-bit tensor.
    fn scale_of(&self, key: &str) -> Option<String> {
        let layer = key.strip_suffix(".weight");
        std::iter::once(format!("{key}{SCALE}"))
            .chain(layer.map(|layer| format!("{layer}.scale_weight")))
            .find(|name| self.info(name).is_some())
    }

    /// Multiplies the numbers of an 8-bit tensor by the scale of their row, or by the one that all
    /// have.
    fn rescale(
        &self,
        key: &str,
        rows: usize,
        raw: &[u8],
        number: impl Fn(u8) -> f32 + Sync,
    ) -> Result<Vec<f32>> {
        let name = self
            .scale_of(key)
            .unwrap_or_else(|| format!("{key}{SCALE}"));
        let is_float = self
            .info(key)
            .is_some_and(|info| info.stored != Stored::Plain(Dtype::I8));
        let mut scales = match self.info(&name) {
            Some(info) if info.stored != Stored::Plain(Dtype::I8) => self
                .read(&name)?
                .to_dtype(DType::F32)?
                .flatten_all()?
                .to_vec1::<f32>()?,
            _ => vec![],
        };
        if let ([scale], true) = (&*scales, is_float || self.note(key).is_some()) {
            scales = vec![*scale; rows];
        }
        if scales.len() != rows || raw.is_empty() {
            bail!(
                "`{}` has tensor `{key}` in 8 bits without its {rows} scales `{name}`\n\nhint: convert the file to f16",
                self.path.display()
            );
        }
        let (mut values, row) = (vec![0f32; raw.len()], raw.len() / rows);
        values
            .par_chunks_exact_mut(row)
            .zip(raw.par_chunks_exact(row))
            .zip(&scales)
            .for_each(|((out, bytes), scale)| {
                out.iter_mut()
                    .zip(bytes)
                    .for_each(|(out, byte)| *out = number(*byte) * scale);
            });
        Ok(values)
    }
}

impl Info {
    /// Whether rows can be read one by one: the scales of 8 bits belong to all of them, and a block
    /// may reach over the end of a row where it was reshaped.
    fn has_separate_rows(&self) -> bool {
        match self.stored {
            Stored::Plain(_) => !self.stored.is_8_bit(),
            Stored::Blocks(blocks) => {
                let row: usize = self.shape.iter().skip(1).product();
                row.is_multiple_of(blocks.block().0)
            }
            Stored::Unread(_) => true,
        }
    }
}

/// Multiplies each group of a row by a normalised Hadamard matrix, which is its own inverse: Kronecker
/// powers of the one of four rows whose only negative number stands on the other diagonal. Errors if
/// rows are not made of groups, or a group's length is no power of four.
fn rotate(values: &mut [f32], columns: usize, group: usize) -> Result<()> {
    if !(group.is_power_of_two() && group.trailing_zeros().is_multiple_of(2))
        || group < 4
        || !columns.is_multiple_of(group)
    {
        bail!("its rows of {columns} numbers are not made of groups of {group}");
    }
    values.par_chunks_exact_mut(group).for_each(|group| {
        let mut step = 1;
        while step < group.len() {
            for square in group.chunks_exact_mut(4 * step) {
                let (first, second) = square.split_at_mut(2 * step);
                let ((a, b), (c, d)) = (first.split_at_mut(step), second.split_at_mut(step));
                let rows = a.iter_mut().zip(b).zip(c.iter_mut().zip(d));
                for ((a, b), (c, d)) in rows {
                    let half = (*a + *b + *c + *d) / 2.0;
                    (*a, *b, *c, *d) = (half - *d, half - *c, half - *b, half - *a);
                }
            }
            step *= 4;
        }
    });
    Ok(())
}

fn is_fp8(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2)
}

/// The value of a byte as 8-bit floating point with 5 bits of exponent (Micikevicius et al. 2022,
/// arXiv 2209.05433): the upper half of an f16.
fn from_e5m2(byte: u8) -> f16 {
    f16::from_bits(u16::from(byte) << 8)
}

/// The same with 4 bits of exponent, which has no infinity.
fn from_e4m3(byte: u8) -> f16 {
    /// What the exponents of an f16 are larger by than those of the same bits here.
    const BIAS: f32 = 256.0;
    let (sign, magnitude) = (u16::from(byte & 0x80), u16::from(byte & 0x7f));
    if magnitude == 0x7f {
        return f16::NAN;
    }
    f16::from_f32(f16::from_bits(sign << 8 | magnitude << 7).to_f32() * BIAS)
}

/// The byte of the number that is nearest, of two as near the even one; the largest for those beyond.
pub(super) fn to_e4m3(x: f32) -> u8 {
    const LARGEST: u8 = 0x7e;
    if x.is_nan() {
        return 0x7f;
    }
    let value = |byte: u8| from_e4m3(byte).to_f32();
    let (mut low, mut high) = (0, LARGEST);
    // the largest that is not above it
    while low < high {
        let middle = (low + high).div_ceil(2);
        if value(middle) <= x.abs() {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if low < LARGEST {
        let middle = (value(low) + value(low + 1)) / 2.0;
        if x.abs() > middle || x.abs() == middle && low % 2 == 1 {
            low += 1;
        }
    }
    sign | low
}

/// Converts stored elements of N bytes to numbers, in parallel.
fn numbers<const N: usize, T: Send>(raw: &[u8], convert: impl Fn([u8; N]) -> T + Sync) -> Vec<T> {
    const PIECE: usize = 1 << 14;
    raw.as_chunks::<N>()
        .0
        .par_iter()
        .with_min_len(PIECE)
        .map(|bytes| convert(*bytes))
        .collect()
}

fn header_len(start: &[u8], len: u64) -> Result<u64> {
    let Some(first) = start.first_chunk::<8>() else {
        bail!("it has {len} bytes, too few for a header")
    };
    let header = u64::from_le_bytes(*first);
    if header > MAX_HEADER_BYTES {
        let text = start.get(..40).unwrap_or(start);
        if let Some(text) = readable(text) {
            bail!(
                "it begins with the text `{text}`\n\nhint: fetch it again, signed in if its site asks for that"
            );
        }
        bail!(
            "its header claims {header} bytes, more than any real one\n\nhint: fetch it again, or name another file"
        );
    }
    if header + 8 > len {
        bail!(
            "its header claims {header} bytes, the file has {len}\n\nhint: the download was interrupted; fetch the file again"
        );
    }
    Ok(header)
}

/// The first line of what begins with text.
fn readable(start: &[u8]) -> Option<&str> {
    let text = match std::str::from_utf8(start) {
        Ok(text) => text,
        Err(error) => std::str::from_utf8(start.get(..error.valid_up_to())?).ok()?,
    };
    let line = text.lines().next()?.trim_end();
    (line.len() >= 8 && !line.contains(char::is_control)).then_some(line)
}

/// Errors if a file is in another format, such as a PyTorch pickle, which can run code when it is
/// opened, or no model at all.
fn refuse_other_formats(start: &[u8], path: &Path) -> Result<()> {
    let extension = path
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or("")
        .to_lowercase();
    let claimed = start
        .first_chunk::<8>()
        .map(|length| u64::from_le_bytes(*length));
    // a header may be as long as a pickle begins
    if start.get(8) == Some(&b'{') && claimed.is_some_and(|length| length <= MAX_HEADER_BYTES) {
        return Ok(());
    }
    if let Some((what, hint)) = file::stand_in(start) {
        bail!("`{}` {what}\n\nhint: {hint}", path.display());
    }
    let again = "fetch the file again";
    let other = if extension == "json" {
        let what = "is a configuration, not weights".to_string();
        Some((what, "name the folder that it is in"))
    } else if start.first() == Some(&b'{') {
        let text: String = String::from_utf8_lossy(start)
            .chars()
            .filter(|c| !c.is_control())
            .take(120)
            .collect();
        Some((
            format!("is JSON, such as the error of a server: {text}"),
            again,
        ))
    } else if start.len() as u64 == RECOGNISED_BY && start.iter().all(|byte| *byte == 0) {
        let what = "begins with zeros, as files do that were not written to the end";
        Some((what.into(), again))
    } else if [&b"\x1f\x8b"[..], b"7z\xbc\xaf", b"Rar!"]
        .iter()
        .any(|archive| start.starts_with(archive))
    {
        Some((
            "is a compressed archive".into(),
            "unpack it, and name the file inside",
        ))
    } else {
        None
    };
    if let Some((what, hint)) = other {
        bail!("`{}` {what}\n\nhint: {hint}", path.display());
    }
    let pickled = start.starts_with(b"PK\x03\x04")
        || start.starts_with(&[0x80, 2])
        || start.starts_with(&[0x80, 4]);
    if pickled || matches!(extension.as_str(), "ckpt" | "pt" | "pth" | "bin") {
        bail!(
            "`{}` is a PyTorch pickle, which may run code when it is opened\n\nhint: convert it once with python -c \"import sys,torch;from safetensors.torch import save_file;d=torch.load(sys.argv[1],weights_only=True);d=next((d[k] for k in ('state_dict','params_ema','params','string_to_param') if k in d),d);save_file({{k:v.contiguous() for k,v in d.items() if hasattr(v,'contiguous')}},'model.safetensors')\" {0}",
            path.display()
        );
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use safetensors::tensor::TensorView;

    type Stored<'a> = (&'a str, Dtype, &'a [usize], &'a [u8]);

    fn file(tensors: &[Stored]) -> tempfile::NamedTempFile {
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            (
                *name,
                TensorView::new(*dtype, shape.to_vec(), bytes).unwrap(),
            )
        });
        let file = tempfile::Builder::new()
            .suffix(".safetensors")
            .tempfile()
            .unwrap();
        std::fs::write(file.path(), safetensors::serialize(views, None).unwrap()).unwrap();
        file
    }

    #[test]
    fn eight_bits_take_the_scale_of_their_row() {
        let scales: Vec<u8> = [0.5f32, 2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let bytes: Vec<u8> = [1i8, -127, 0, 3, -4, 127]
            .iter()
            .map(|v| *v as u8)
            .collect();
        let file = file(&[
            ("w", Dtype::I8, &[2, 3], &bytes),
            ("w_scale", Dtype::F32, &[2], &scales),
        ]);
        let source = WeightsFile::open(file.path()).unwrap();
        assert_eq!(
            source.tensors().map(|(name, ..)| name).collect::<Vec<_>>(),
            ["w"]
        );
        let tensor = source.read("w").unwrap();
        assert_eq!(
            tensor.to_vec2::<f32>().unwrap(),
            [[0.5, -63.5, 0.0], [6.0, -8.0, 254.0]]
        );
    }

    #[test]
    fn fp8_with_four_bits_of_exponent_holds_the_published_numbers() {
        // Micikevicius et al. 2022, table 1
        for (byte, value) in [
            (0x00, 0.0),
            (0x01, 0.001953125),
            (0x07, 0.013671875),
            (0x08, 0.015625),
            (0x38, 1.0),
            (0xc4, -3.0),
            (0x7e, 448.0),
        ] {
            assert_eq!(from_e4m3(byte).to_f32(), value, "{byte:08b}");
        }
        assert!(from_e4m3(0x7f).is_nan() && from_e4m3(0xff).is_nan());
    }

    #[test]
    fn every_number_of_fp8_is_its_own_and_others_go_to_the_nearest() {
        for byte in (0..=255).filter(|byte| byte & 0x7f != 0x7f) {
            assert_eq!(to_e4m3(from_e4m3(byte).to_f32()), byte, "{byte:08b}");
        }
        for (x, byte) in [
            (1e9, 0x7e),
            (f32::NEG_INFINITY, 0xfe),
            // between 1 and 1.125, and 1.125 and 1.25
            (1.0625, 0x38),
            (1.1875, 0x3a),
            (1.19, 0x3a),
            (-1.0626, 0xb9),
            // half of the smallest
            (0.0009765625, 0),
            (0.00098, 1),
        ] {
            assert_eq!(to_e4m3(x), byte, "{x}");
        }
    }

    #[test]
    fn eight_bits_without_their_scales_are_an_error_that_names_them() {
        let scales = 1f32.to_le_bytes();
        let wrong: [&[Stored]; 3] = [
            &[("w", Dtype::I8, &[2, 2], &[1, 2, 3, 4])],
            &[
                ("w", Dtype::I8, &[2, 2], &[1, 2, 3, 4]),
                ("w_scale", Dtype::F32, &[1], &scales),
            ],
            &[
                ("w", Dtype::I8, &[0, 2], &[]),
                ("w_scale", Dtype::F32, &[1], &scales),
            ],
        ];
        for tensors in wrong {
            let file = file(tensors);
            let error = WeightsFile::open(file.path())
                .unwrap()
                .read("w")
                .unwrap_err()
                .to_string();
            assert!(error.contains("`w_scale`"), "{error}");
        }
    }
}
