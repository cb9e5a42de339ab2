//! One safetensors file: its header, checked, and its bytes on demand. Nothing is mapped: a tensor
//! is read when asked for, so a file that shrinks meanwhile is an error rather than a crash, and
//! memory holds only what was asked for.

use super::file_hash::FileHashes;
use super::key_mapping::Part;
use crate::hex::hex;
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::{Dtype, tensor::Metadata};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The largest header that is read; larger ones are hostile or broken (safetensors' own limit).
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The number of bytes of a tensor that go into a fingerprint.
const SAMPLE_BYTES: usize = 4096;

/// The suffix of the scales [rows] of an 8-bit tensor, one factor for each row of its first
/// dimension.
const SCALE: &str = "_scale";

enum Bytes {
    File(Mutex<File>),
    #[cfg(feature = "mini")]
    Embedded(&'static [u8]),
}

/// An open safetensors file.
pub struct SafetensorsFile {
    path: PathBuf,
    bytes: Bytes,
    /// offset of the data behind the header, in bytes
    data_start: u64,
    /// size of the whole file in bytes
    pub len: u64,
    header: Metadata,
}

impl SafetensorsFile {
    /// Opens a file and checks its header against its size. Errors name the file and what is wrong
    /// with it.
    pub fn open(path: &Path) -> Result<Self> {
        let shown = path.display();
        let mut file = File::open(path).with_context(|| format!("cannot open `{shown}`"))?;
        let len = file
            .metadata()
            .with_context(|| format!("cannot read `{shown}`"))?
            .len();
        let mut start = vec![];
        let mut limited = (&mut file).take(8);
        limited
            .read_to_end(&mut start)
            .with_context(|| format!("cannot read `{shown}`"))?;
        refuse_other_formats(&start, path)?;
        let header_len = header_len(&start, len)
            .with_context(|| format!("`{shown}` is not a safetensors file"))?;
        (&mut file)
            .take(header_len)
            .read_to_end(&mut start)
            .with_context(|| format!("cannot read `{shown}`"))?;
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

    fn checked(path: PathBuf, start: &[u8], len: u64, bytes: Bytes) -> Result<Self> {
        let shown = path.display();
        // parsing checks that tensors neither overlap nor leave gaps, and are as long as shape and
        // type say
        let header: Metadata = serde_json::from_slice(start.get(8..).unwrap_or_default())
            .with_context(|| format!("the header of `{shown}` is damaged"))?;
        let end = header
            .tensors()
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
        Ok(Self {
            path,
            bytes,
            data_start,
            len,
            header,
        })
    }

    /// The file's path, or the name of the embedded model.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The value of a key in the header's metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.header
            .metadata()
            .as_ref()?
            .get(key)
            .map(String::as_str)
    }

    /// Iterates over (name, shape, stored type) of every tensor; the scales of 8-bit tensors belong
    /// to them and are not listed.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Vec<usize>, Dtype)> {
        let scales = |name: &str| {
            name.strip_suffix(SCALE)
                .is_some_and(|n| self.header.info(n).is_some_and(|t| t.dtype == Dtype::I8))
        };
        self.header
            .tensors()
            .into_iter()
            .filter(move |(name, _)| !scales(name))
            .map(|(name, t)| (name, t.shape.clone(), t.dtype))
    }

    /// The names of all tensors that [`Self::tensors`] lists.
    pub fn keys(&self) -> Vec<String> {
        self.tensors().map(|(key, ..)| key).collect()
    }

    /// The shape of a tensor.
    pub fn shape(&self, key: &str) -> Option<&[usize]> {
        Some(&self.header.info(key)?.shape)
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
            .header
            .info(key)
            .with_context(|| format!("no tensor `{key}`"))?;
        let (mut from, mut to) = info.data_offsets;
        if let Part::Rows { index, of } = part {
            let bytes = (to - from) / of;
            (from, to) = (from + index * bytes, from + (index + 1) * bytes);
        }
        let read = |to| {
            self.bytes_of(from, to)
                .with_context(|| format!("cannot read tensor `{key}` of `{}`", self.path.display()))
        };
        let (Part::Transposed, [rows, columns]) = (part, &*info.shape) else {
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

    /// Reads one tensor in its stored shape on the CPU, f16 and bf16 as they are, all else as f32.
    /// Errors name file and tensor.
    pub fn read(&self, key: &str) -> Result<Tensor> {
        let shown = self.path.display();
        let info = self
            .header
            .info(key)
            .with_context(|| format!("`{shown}` has no tensor `{key}`"))?;
        let (from, to) = info.data_offsets;
        let raw = self
            .bytes_of(from, to)
            .with_context(|| format!("cannot read tensor `{key}` of `{shown}`"))?;
        let shape = info.shape.as_slice();
        let values = match info.dtype {
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
            Dtype::I8 => self.rescale(key, info.shape.first().copied().unwrap_or(1), &raw)?,
            other => bail!(
                "tensor `{key}` of `{shown}` is stored as {other:?}\n\nhint: f32, f16, bf16, f64 and i8 with scales can be read; convert the file to one of these"
            ),
        };
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    /// Multiplies the bytes of an 8-bit tensor by the scale of their row.
    fn rescale(&self, key: &str, rows: usize, raw: &[u8]) -> Result<Vec<f32>> {
        let name = format!("{key}{SCALE}");
        let scales = match self.header.info(&name) {
            Some(info) if info.dtype != Dtype::I8 => self
                .read(&name)?
                .to_dtype(DType::F32)?
                .flatten_all()?
                .to_vec1::<f32>()?,
            _ => vec![],
        };
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
                    .for_each(|(out, b)| *out = f32::from(*b as i8) * scale);
            });
        Ok(values)
    }
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
        bail!("its header claims {header} bytes, more than any real one");
    }
    if header + 8 > len {
        bail!(
            "its header claims {header} bytes, the file has {len}\n\nhint: the download was interrupted; fetch the file again"
        );
    }
    Ok(header)
}

/// Errors if a file is a PyTorch pickle, which can run code when it is opened, or a GGUF file.
fn refuse_other_formats(start: &[u8], path: &Path) -> Result<()> {
    let extension = path
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or("")
        .to_lowercase();
    let pickled = start.starts_with(b"PK\x03\x04")
        || start.starts_with(&[0x80, 2])
        || start.starts_with(&[0x80, 4]);
    if pickled || matches!(extension.as_str(), "ckpt" | "pt" | "pth" | "bin") {
        bail!(
            "`{}` is a PyTorch pickle, which may run code when it is opened\n\nhint: convert it once with python -c \"import sys,torch;from safetensors.torch import save_file;d=torch.load(sys.argv[1],weights_only=True);d=next((d[k] for k in ('state_dict','params_ema','params','string_to_param') if k in d),d);save_file({{k:v.contiguous() for k,v in d.items() if hasattr(v,'contiguous')}},'model.safetensors')\" {0}",
            path.display()
        );
    }
    if start.starts_with(b"GGUF") {
        bail!(
            "`{}` is a GGUF file, which sdgen does not read\n\nhint: use the model's .safetensors file",
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
        let source = SafetensorsFile::open(file.path()).unwrap();
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
            let error = SafetensorsFile::open(file.path())
                .unwrap()
                .read("w")
                .unwrap_err()
                .to_string();
            assert!(error.contains("`w_scale`"), "{error}");
        }
    }
}
