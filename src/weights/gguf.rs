//! The header of a GGUF file: which tensors it has, where, and the tokenizer of a text encoder.
//!
//! The format is ggml's, versions 2 and 3. Dimensions are turned round to row-major; what a tool
//! reshaped gets its shape back (`comfy.gguf.orig_shape.*`); and the tensors of text encoders, which
//! llama.cpp names its own way, get the names that they have in transformers. A tensor of a type
//! that is not read is an error only where it is needed.
//!
//! Everything here comes from a file that may be damaged: counts and lengths are checked against
//! what is left before memory is taken for them.

use super::weights_file::{MAX_ELEMENTS, Stored};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::io::Read;

/// What a GGUF file begins with.
pub(super) const MAGIC: &[u8; 4] = b"GGUF";

/// The largest header that is read: tokenizers take some ten million bytes.
const MAX_BYTES: u64 = 100_000_000;

/// The most tensors and the most metadata that a file may list.
const MAX_ENTRIES: u64 = 200_000;

/// The most lists within lists.
const MAX_DEPTH: usize = 4;

/// The most dimensions of a tensor.
const MAX_RANK: u32 = 8;

/// The most entries of a list that is kept: vocabularies have a quarter of a million.
const MAX_TOKENS: u64 = 1 << 20;

/// The metadata that makes a tokenizer.
const TOKENIZER: [&str; 5] = [
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
];

/// Data begins at a multiple of this many bytes, if the file names no other.
const ALIGNMENT: u64 = 32;

/// The metadata of ComfyUI-GGUF that holds the shape of a tensor before it was reshaped.
const ORIGINAL_SHAPE: &str = "comfy.gguf.orig_shape.";

/// Beginnings of the keys of metadata that say how a model is drawn.
const NOTES: [&str; 2] = ["modelspec.", "sdgen."];

/// How Qwen's tokenizers cut text into words.
const QWEN_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A tensor of the file.
pub(super) struct GgufTensor {
    pub(super) stored: Stored,
    pub(super) shape: Vec<usize>,
    /// its first byte behind the header, and its bytes, 0 where the type is not read
    pub(super) from: u64,
    pub(super) bytes: u64,
}

/// A header.
pub(super) struct GgufHeader {
    pub(super) tensors: BTreeMap<String, GgufTensor>,
    /// where the data begins
    pub(super) data_start: u64,
    /// texts of the metadata that say how a model is drawn
    pub(super) notes: HashMap<String, String>,
    /// tokenizer.json of a text encoder whose tokenizer the file holds
    pub(super) tokenizer: Option<String>,
}

impl GgufHeader {
    /// Reads the header of a file of `len` bytes. Errors say what is wrong with it.
    pub(super) fn read(file: impl Read, len: u64) -> Result<Self> {
        let mut reader = Reader {
            inner: file.take(len.min(MAX_BYTES)),
            at: 0,
        };
        ensure!(reader.array()? == *MAGIC, "it does not begin with `GGUF`");
        let version = reader.u32()?;
        ensure!(
            (2..=3).contains(&version),
            "it is of version {version} of the format, where 2 and 3 are read\n\nhint: fetch a newer file of the model"
        );
        let [tensors, entries] = [reader.u64()?, reader.u64()?];
        ensure!(
            tensors <= MAX_ENTRIES && entries <= MAX_ENTRIES,
            "it claims {tensors} tensors and {entries} entries of metadata, more than any model has"
        );
        let mut metadata = BTreeMap::new();
        for _ in 0..entries {
            let (key, kind) = (reader.string()?, reader.u32()?);
            let most = if key.starts_with(ORIGINAL_SHAPE) {
                MAX_RANK.into()
            } else if TOKENIZER.contains(&key.as_str())
                || key == "general.alignment"
                || NOTES.iter().any(|start| key.starts_with(start))
            {
                MAX_TOKENS
            } else {
                reader.skip(kind, 0)?;
                continue;
            };
            let value = reader.value(kind, most)?;
            metadata.insert(key, value);
        }
        let alignment = metadata.get("general.alignment").and_then(Value::as_u64);
        let alignment = alignment.unwrap_or(ALIGNMENT);
        ensure!(
            alignment.is_power_of_two() && alignment <= 1 << 20,
            "its `general.alignment` is {alignment}"
        );
        let mut found = BTreeMap::new();
        for _ in 0..tensors {
            let (name, tensor) = reader.tensor(&metadata, alignment)?;
            ensure!(
                !found.contains_key(&name),
                "it lists the tensor `{name}` twice"
            );
            found.insert(name, tensor);
        }
        let data_start = reader.at.next_multiple_of(alignment);
        check_places(&found, data_start, len)?;
        Ok(Self {
            tensors: rename(found),
            data_start,
            notes: metadata
                .iter()
                .filter(|(key, _)| NOTES.iter().any(|start| key.starts_with(start)))
                .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_string())))
                .collect(),
            tokenizer: tokenizer(&metadata),
        })
    }
}

/// A header that is written.
#[derive(Default)]
pub(super) struct Header {
    metadata: Vec<u8>,
    entries: u64,
    tensors: Vec<u8>,
    count: u64,
    /// where the next tensor begins behind the header
    next: u64,
}

impl Header {
    /// Each tensor begins at a multiple of this.
    pub(super) const ALIGNMENT: usize = ALIGNMENT as usize;

    pub(super) fn text(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        put_string(&mut self.metadata, value);
    }

    pub(super) fn number(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.metadata.extend(value.to_le_bytes());
    }

    fn key(&mut self, key: &str, kind: u32) {
        put_string(&mut self.metadata, key);
        self.metadata.extend(kind.to_le_bytes());
        self.entries += 1;
    }

    /// Adds a tensor, which follows the one before it.
    pub(super) fn tensor(&mut self, name: &str, shape: &[usize], stored: Stored, bytes: usize) {
        put_string(&mut self.tensors, name);
        self.tensors.extend((shape.len() as u32).to_le_bytes());
        for size in shape.iter().rev() {
            self.tensors.extend((*size as u64).to_le_bytes());
        }
        let kind = stored.ggml().unwrap_or_default();
        self.tensors.extend(kind.to_le_bytes());
        self.tensors.extend(self.next.to_le_bytes());
        self.next += (bytes as u64).next_multiple_of(ALIGNMENT);
        self.count += 1;
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        const VERSION: u32 = 3;
        let mut bytes = [&MAGIC[..], &VERSION.to_le_bytes()].concat();
        bytes.extend(self.count.to_le_bytes());
        bytes.extend(self.entries.to_le_bytes());
        bytes.extend(self.metadata);
        bytes.extend(self.tensors);
        bytes.resize(bytes.len().next_multiple_of(Self::ALIGNMENT), 0);
        bytes
    }
}

fn put_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// Errors if a tensor lies outside of the file or over another.
fn check_places(tensors: &BTreeMap<String, GgufTensor>, data_start: u64, len: u64) -> Result<()> {
    let mut places: Vec<(u64, u64, &str)> = vec![];
    for (name, tensor) in tensors {
        let end = tensor.from.checked_add(tensor.bytes);
        let last = end.and_then(|end| end.checked_add(data_start));
        let Some(last) = last.filter(|last| *last <= len) else {
            bail!(
                "it is cut short: the tensor `{name}` ends behind its {len} bytes\n\nhint: the download was interrupted; fetch the file again"
            );
        };
        places.push((tensor.from, last - data_start, name));
    }
    places.sort_unstable();
    for pair in places.windows(2) {
        ensure!(
            pair[0].1 <= pair[1].0,
            "its tensors `{}` and `{}` lie over each other",
            pair[0].2,
            pair[1].2
        );
    }
    Ok(())
}

/// The number of the type of lists.
const LIST: u32 = 9;

/// Takes a header from its bytes, of which it never asks for more than there may be.
struct Reader<R> {
    inner: std::io::Take<R>,
    at: u64,
}

impl<R: Read> Reader<R> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.inner
            .read_exact(&mut bytes)
            .context("its header is cut short\n\nhint: fetch the file again")?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn string(&mut self) -> Result<String> {
        let len = self.u64()?;
        ensure!(
            len <= self.inner.limit(),
            "its header is damaged: a text has {len} bytes"
        );
        let mut bytes = vec![];
        (&mut self.inner).take(len).read_to_end(&mut bytes)?;
        ensure!(bytes.len() as u64 == len, "its header is cut short");
        self.at += len;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Passes over a value of the type of this number.
    fn skip(&mut self, kind: u32, depth: usize) -> Result<()> {
        if kind != LIST {
            return self.value(kind, 0).map(drop);
        }
        let (kind, len) = (self.u32()?, self.u64()?);
        ensure!(
            depth < MAX_DEPTH && len <= self.inner.limit(),
            "its header is damaged: a list has {len} entries"
        );
        (0..len).try_for_each(|_| self.skip(kind, depth + 1))
    }

    /// A value of metadata, of the type of this number; a list with at most so many entries, none of
    /// them a list.
    fn value(&mut self, kind: u32, most: u64) -> Result<Value> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.array()?).into(),
            1 => i8::from_le_bytes(self.array()?).into(),
            2 => u16::from_le_bytes(self.array()?).into(),
            3 => i16::from_le_bytes(self.array()?).into(),
            4 => self.u32()?.into(),
            5 => i32::from_le_bytes(self.array()?).into(),
            6 => f64::from(f32::from_le_bytes(self.array()?)).into(),
            7 => (self.array::<1>()? != [0]).into(),
            8 => self.string()?.into(),
            LIST => {
                let (kind, len) = (self.u32()?, self.u64()?);
                ensure!(
                    len <= most.min(self.inner.limit()),
                    "its header is damaged: a list has {len} entries"
                );
                let values = (0..len).map(|_| self.value(kind, 0));
                values.collect::<Result<Vec<_>>>()?.into()
            }
            10 => self.u64()?.into(),
            11 => i64::from_le_bytes(self.array()?).into(),
            12 => f64::from_le_bytes(self.array()?).into(),
            other => bail!("its header is damaged: a value is of the type {other}"),
        })
    }

    /// A tensor's name, and what is said of it.
    fn tensor(
        &mut self,
        metadata: &BTreeMap<String, Value>,
        alignment: u64,
    ) -> Result<(String, GgufTensor)> {
        let (name, rank) = (self.string()?, self.u32()?);
        ensure!(
            rank <= MAX_RANK,
            "the tensor `{name}` has {rank} dimensions"
        );
        let dims = (0..rank).map(|_| Ok(usize::try_from(self.u64()?)?));
        let mut shape: Vec<usize> = dims.collect::<Result<_>>()?;
        shape.reverse();
        let elements = elements(&shape)
            .with_context(|| format!("the tensor `{name}` has the shape {shape:?}"))?;
        let (stored, from) = (Stored::of_ggml(self.u32()?), self.u64()?);
        ensure!(
            from.is_multiple_of(alignment),
            "the tensor `{name}` begins at {from}, which is no multiple of {alignment}"
        );
        let bytes = match stored.block() {
            Some((numbers, bytes)) => {
                let row = shape.last().copied().unwrap_or(1);
                ensure!(
                    row.is_multiple_of(numbers),
                    "the tensor `{name}` has rows of {row} numbers in blocks of {numbers}"
                );
                (elements / numbers * bytes) as u64
            }
            None => 0,
        };
        if let Some(original) = metadata.get(&format!("{ORIGINAL_SHAPE}{name}")) {
            let sizes = original.as_array().into_iter().flatten();
            let sizes = sizes.map(|size| usize::try_from(size.as_u64()?).ok());
            let original: Option<Vec<usize>> = sizes.collect();
            let fits = |shape: &Vec<usize>| self::elements(shape) == Some(elements);
            shape = original
                .filter(fits)
                .with_context(|| format!("the tensor `{name}` does not fit its original shape"))?;
        }
        let tensor = GgufTensor {
            stored,
            shape,
            from,
            bytes,
        };
        Ok((name, tensor))
    }
}

/// The number of elements of a shape; none if there are too many.
fn elements(shape: &[usize]) -> Option<usize> {
    let product = shape
        .iter()
        .try_fold(1_usize, |product, size| product.checked_mul(*size));
    product.filter(|elements| *elements <= MAX_ELEMENTS)
}

/// The parts of llama.cpp's names of the layers of a decoder, and transformers'.
const DECODER: [(&str, &str); 11] = [
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The same of T5's encoder.
const T5: [(&str, &str); 10] = [
    ("attn_q", "layer.0.SelfAttention.q"),
    ("attn_k", "layer.0.SelfAttention.k"),
    ("attn_v", "layer.0.SelfAttention.v"),
    ("attn_o", "layer.0.SelfAttention.o"),
    (
        "attn_rel_b",
        "layer.0.SelfAttention.relative_attention_bias",
    ),
    ("attn_norm", "layer.0.layer_norm"),
    ("ffn_gate", "layer.1.DenseReluDense.wi_0"),
    ("ffn_up", "layer.1.DenseReluDense.wi_1"),
    ("ffn_down", "layer.1.DenseReluDense.wo"),
    ("ffn_norm", "layer.1.layer_norm"),
];

/// Gives the tensors of text encoders the names that they have in transformers.
fn rename(tensors: BTreeMap<String, GgufTensor>) -> BTreeMap<String, GgufTensor> {
    if !tensors.contains_key("token_embd.weight") {
        return tensors;
    }
    let is_t5 = tensors.contains_key("enc.output_norm.weight");
    let (start, layers, table, top) = match is_t5 {
        true => (
            "enc.blk.",
            "encoder.block.",
            &T5[..],
            [
                ("token_embd", "shared"),
                ("enc.output_norm", "encoder.final_layer_norm"),
            ],
        ),
        false => (
            "blk.",
            "model.layers.",
            &DECODER[..],
            [
                ("token_embd", "model.embed_tokens"),
                ("output_norm", "model.norm"),
            ],
        ),
    };
    let renamed = |name: &str| {
        let (layer, end) = name.rsplit_once('.')?;
        if let Some((_, name)) = top.iter().find(|(own, _)| *own == layer) {
            return Some(format!("{name}.{end}"));
        }
        let (number, part) = layer.strip_prefix(start)?.split_once('.')?;
        let (_, part) = table.iter().find(|(own, _)| *own == part)?;
        Some(format!("{layers}{number}.{part}.{end}"))
    };
    tensors
        .into_iter()
        .map(|(name, tensor)| (renamed(&name).unwrap_or(name), tensor))
        .collect()
}

/// tokenizer.json of the byte-level BPE of Qwen's models; none of other tokenizers.
fn tokenizer(metadata: &BTreeMap<String, Value>) -> Option<String> {
    /// What llama.cpp calls words that the model itself uses, and those that were added.
    const CONTROL: u64 = 3;
    const ADDED: u64 = 4;
    let key = |name: &str| metadata.get(&format!("tokenizer.ggml.{name}"));
    let text = |name: &str| key(name).and_then(Value::as_str);
    if (text("model"), text("pre")) != (Some("gpt2"), Some("qwen2")) {
        return None;
    }
    let tokens = key("tokens")?.as_array()?;
    let kinds = key("token_type").and_then(Value::as_array);
    let kind = |id: usize| kinds.and_then(|kinds| kinds.get(id)?.as_u64()).unwrap_or(0);
    let (mut vocabulary, mut added) = (serde_json::Map::new(), vec![]);
    for (id, token) in tokens.iter().enumerate() {
        let token = token.as_str()?;
        if matches!(kind(id), CONTROL | ADDED) {
            added.push(json!({
                "id": id, "content": token, "special": kind(id) == CONTROL, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false,
            }));
        } else {
            vocabulary.insert(token.into(), id.into());
        }
    }
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
    });
    let words = json!({
        "type": "Split", "pattern": { "Regex": QWEN_WORDS }, "behavior": "Isolated", "invert": false,
    });
    let json = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": { "type": "NFC" },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [words, byte_level] },
        "post_processor": null,
        "decoder": byte_level,
        "model": { "type": "BPE", "vocab": vocabulary, "merges": key("merges")? },
    });
    Some(json.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::key_mapping::Part;
    use super::super::weights_file::WeightsFile;
    use super::*;
    use candle_core::{DType, Tensor};
    use std::path::PathBuf;

    fn fixture(name: &str) -> PathBuf {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/gguf/");
        PathBuf::from(format!("{folder}{name}"))
    }

    fn bits(tensor: &Tensor) -> Vec<u32> {
        let flat = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
        let values = flat.to_vec1::<f32>().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn blocks_of_every_type_are_the_numbers_of_the_gguf_package() {
        let file = WeightsFile::open(&fixture("blocks.gguf")).unwrap();
        let goldens = WeightsFile::open(&fixture("blocks.safetensors")).unwrap();
        let mut compared = 0;
        for (name, shape, _) in goldens.tensors() {
            let (own, golden) = (file.read(&name).unwrap(), goldens.read(&name).unwrap());
            assert_eq!(own.dims(), shape, "{name}");
            assert_eq!(bits(&own), bits(&golden), "{name}");
            if shape[0] == 3 {
                let part = Part::Rows {
                    index: 1,
                    count: 2,
                    of: 3,
                };
                let rows = file.read_part(&name, &part).unwrap();
                let golden = golden.narrow(0, 1, 2).unwrap();
                assert_eq!(bits(&rows), bits(&golden), "{name}");
            }
            compared += 1;
        }
        assert_eq!(compared, 16);
        let types = file.tensors().map(|(.., stored)| stored);
        assert!(types.into_iter().any(|stored| stored == "iq4_xs"));
        let error = file.read("unread").unwrap_err().to_string();
        assert!(
            error.contains("IQ2_XS") && error.contains("hint: "),
            "{error}"
        );
    }

    #[test]
    fn a_damaged_header_is_an_error_whatever_is_wrong_with_it() {
        let whole = std::fs::read(fixture("blocks.gguf")).unwrap();
        let read = |bytes: &[u8]| GgufHeader::read(bytes, bytes.len() as u64);
        let header = usize::try_from(read(&whole).unwrap().data_start).unwrap();
        for len in 0..header {
            assert!(read(&whole[..len]).is_err(), "{len} bytes");
        }
        let error = |bytes: &[u8]| format!("{:#}", read(bytes).err().unwrap());
        let cut = error(&whole[..whole.len() - 200]);
        assert!(cut.contains("it is cut short: the tensor"), "{cut}");
        // nothing that any byte says takes much memory or ends the program
        for at in 0..header {
            for value in [0, 1, 9, 127, 255] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                drop(read(&bytes));
            }
        }
        let put = |at: usize, new: &[u8]| {
            let mut bytes = whole.clone();
            bytes[at..at + new.len()].copy_from_slice(new);
            error(&bytes)
        };
        assert!(put(4, &[1]).contains("version 1"));
        assert!(put(8, &u64::MAX.to_le_bytes()).contains("more than any model has"));
        let name = whole.windows(4).position(|bytes| bytes == b"q4_k").unwrap();
        assert!(put(name + 4, &[200]).contains("200 dimensions"));
        assert!(put(name + 8, &u64::MAX.to_le_bytes()).contains("the shape"));
        assert!(put(name + 8, &[1]).contains("in blocks of 256"));
        // its place, behind the name, the rank, two dimensions and the type
        assert!(put(name + 4 + 4 + 16 + 4, &[1]).contains("no multiple of 32"));
        assert!(put(name + 4 + 4 + 16 + 4, &[0; 8]).contains("lie over each other"));
        assert!(put(name + 4 + 4 + 16 + 4, &(1_u64 << 62).to_le_bytes()).contains("cut short"));
    }
}
