//! A model is written in another layout or type: one file or a folder of them, tensor by tensor, with
//! all that changes its weights.
//!
//! [`WeightsToWrite`] is planned from headers alone, so that a file's size is known before it is
//! begun; then one tensor is in memory at a time.

use super::gguf::Header;
use super::key_mapping::{Named, Part};
use super::open::TOKENIZERS;
use super::original::{self, OriginalTensor};
use super::quantize;
use super::weights_file::{Stored, to_e4m3};
use super::{
    Checkpoint, DEFAULTS, DEFAULTS_KEY, ENCODERS, OWN_CONFIGS, OWN_CONFIGS_KEY, PARTS, TRANSFORMER,
    TokenizerFiles, TokenizerSource, UNET,
};
use crate::nn::blocks::BlockType;
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// CLIP's tokens.
const CLIP_VOCABULARY: u64 = 49408;

/// Tensors of no more elements stay as wide as they are, since they take no room (ComfyUI-GGUF).
const SMALL: usize = 1024;

/// Parts of the names of tensors that are stored in blocks or 8 bits: the layers that a network has
/// many of, and the embeddings of tokens. What is before and behind these says too much for that.
const NARROWED: [&str; 11] = [
    ".down_blocks.",
    ".mid_block.",
    ".up_blocks.",
    "transformer_blocks.",
    "stream_modulation",
    ".layers.",
    ".noise_refiner.",
    ".context_refiner.",
    ".block.",
    ".embed_tokens.",
    ".token_embedding.",
];

/// The type that weights are to be stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightType(Stored);

/// The types of numbers that stand alone, by name.
const PLAIN: [(&str, Dtype); 4] = [
    ("f32", Dtype::F32),
    ("f16", Dtype::F16),
    ("bf16", Dtype::BF16),
    ("f8_e4m3", Dtype::F8_E4M3),
];

impl WeightType {
    /// The names of all types.
    pub fn names() -> Vec<&'static str> {
        let blocks = quantize::WRITTEN.iter().map(|blocks| blocks.name());
        PLAIN.iter().map(|(name, _)| *name).chain(blocks).collect()
    }
}

impl FromStr for WeightType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.to_lowercase();
        let plain = PLAIN.iter().find(|(name, _)| *name == text);
        let mut blocks = quantize::WRITTEN.into_iter();
        let stored = plain
            .map(|(_, dtype)| Stored::Plain(*dtype))
            .or_else(|| blocks.find(|it| it.name() == text).map(Stored::Blocks));
        let known = || format!("expected one of {}", Self::names().join(", "));
        stored.map(Self).ok_or_else(known)
    }
}

impl fmt::Display for WeightType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0.name())
    }
}

/// The format of a file of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileFormat {
    Safetensors,
    Gguf,
}

/// A tensor to be written.
struct Output {
    name: String,
    parts: Vec<Named>,
    shape: Vec<usize>,
    stored: Stored,
}

impl Output {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn bytes(&self) -> usize {
        let (numbers, bytes) = self.stored.block().unwrap_or((1, 0));
        self.elements() / numbers * bytes
    }
}

/// What rows that are not made of whole blocks of 256 are stored in (llama.cpp).
fn smaller_blocks(blocks: BlockType) -> BlockType {
    match blocks {
        BlockType::Q2K | BlockType::Q3K => BlockType::Q4_0,
        BlockType::Q4K => BlockType::Q5_0,
        BlockType::Q5K => BlockType::Q5_1,
        BlockType::Q6K => BlockType::Q8_0,
        other => other,
    }
}

/// A file of weights that is to be written.
pub struct WeightsToWrite<'a> {
    checkpoint: &'a Checkpoint,
    format: FileFormat,
    asked: Option<WeightType>,
    is_single_file: bool,
    tensors: Vec<Output>,
}

impl<'a> WeightsToWrite<'a> {
    /// A single file under original names: all parts of a model, or as GGUF of one with a transformer
    /// that alone. Errors if it is of a kind that single files do not tell, or the type is none of the
    /// format.
    pub fn single_file(
        checkpoint: &'a Checkpoint,
        format: FileFormat,
        asked: Option<WeightType>,
    ) -> Result<Self> {
        let is_alone = format == FileFormat::Gguf && checkpoint.denoiser() == TRANSFORMER;
        let is_part =
            |part: &&str| checkpoint.has_part(part) && (!is_alone || *part == TRANSFORMER);
        let components: Vec<&str> = PARTS.into_iter().filter(is_part).collect();
        require_clip_vocabulary(checkpoint, &components)?;
        let mut planned = Self::new(checkpoint, format, asked)?;
        planned.is_single_file = true;
        for tensor in original::tensors(checkpoint, &components)? {
            planned.add(tensor);
        }
        planned.sort();
        Ok(planned)
    }

    /// The file of one component of a diffusers folder. Errors as [`Self::single_file`] does.
    pub fn component(
        checkpoint: &'a Checkpoint,
        component: &str,
        asked: Option<WeightType>,
    ) -> Result<Self> {
        let mut planned = Self::new(checkpoint, FileFormat::Safetensors, asked)?;
        let names = checkpoint.tensors_of(component).map(|(name, ..)| name);
        for name in names.filter(|name| !name.ends_with("position_ids")) {
            let own = name.get(component.len() + 1..).unwrap_or_default();
            planned.add(OriginalTensor {
                name: own.into(),
                parts: Named::whole(name.into()),
                is_convolution: false,
            });
        }
        planned.sort();
        Ok(planned)
    }

    fn new(
        checkpoint: &'a Checkpoint,
        format: FileFormat,
        asked: Option<WeightType>,
    ) -> Result<Self> {
        match (format, asked.map(|asked| asked.0)) {
            (FileFormat::Safetensors, Some(Stored::Blocks(blocks))) => bail!(
                "{} is a type of GGUF files\n\nhint: name a file that ends in .gguf",
                blocks.name()
            ),
            (FileFormat::Gguf, Some(Stored::Plain(Dtype::F8_E4M3))) => bail!(
                "f8_e4m3 is no type of GGUF files\n\nhint: q8_0 is one of 8 bits, or name a file that ends in .safetensors"
            ),
            _ => Ok(Self {
                checkpoint,
                format,
                asked,
                is_single_file: false,
                tensors: vec![],
            }),
        }
    }

    /// In the order in which safetensors are written: those of wide numbers first, so that all lie at
    /// multiples of their size.
    fn sort(&mut self) {
        let width = |stored: Stored| stored.block().map_or(0, |(_, bytes)| bytes);
        self.tensors.sort_by(|a, b| {
            let is_gguf = self.format == FileFormat::Gguf;
            let by_width = width(b.stored).cmp(&width(a.stored));
            let by_name = a.name.cmp(&b.name);
            if is_gguf {
                by_name
            } else {
                by_width.then(by_name)
            }
        });
    }

    fn add(&mut self, tensor: OriginalTensor) {
        let OriginalTensor {
            name,
            parts,
            is_convolution,
        } = tensor;
        let shapes = parts
            .iter()
            .filter_map(|it| self.checkpoint.shape_of(&it.name));
        let rows: usize = shapes.clone().filter_map(|shape| shape.first()).sum();
        let mut shape: Vec<usize> = shapes.clone().next().unwrap_or_default().to_vec();
        if let Some(first) = shape.first_mut() {
            *first = rows;
        }
        if parts.iter().any(|it| it.part == Part::Transposed) {
            shape.reverse();
        }
        if is_convolution {
            shape.extend([1, 1]);
        } else if self.format == FileFormat::Safetensors && self.is_matrix(&name, &shape) {
            shape.truncate(2);
        }
        let stored = match self.type_of(&parts, &shape) {
            Stored::Blocks(blocks) => {
                let row = shape.last().copied().unwrap_or(1);
                [blocks, smaller_blocks(blocks)]
                    .into_iter()
                    .find(|blocks| row.is_multiple_of(blocks.block().0))
                    .map_or_else(|| self.narrowest_plain(&parts), Stored::Blocks)
            }
            plain => plain,
        };
        self.tensors.push(Output {
            name,
            parts,
            shape,
            stored,
        });
    }

    /// Whether a tensor of a folder is a matrix in diffusers, and was a convolution of one pixel in the
    /// file that it comes from.
    fn is_matrix(&self, name: &str, shape: &[usize]) -> bool {
        let unet = self.checkpoint.optional_config(UNET);
        let is_linear = unet.is_some_and(|unet| unet["use_linear_projection"] == true);
        let is_projection = name.ends_with("proj_in.weight") || name.ends_with("proj_out.weight");
        matches!(shape, [_, _, 1, 1])
            && (original::is_vae_attention(name) || is_linear && is_projection)
    }

    /// The type in which a tensor's numbers are in the checkpoint's files, or the plain one that is as
    /// wide as those.
    fn own_type(&self, parts: &[Named]) -> Dtype {
        let own = |named: &Named| match self.checkpoint.stored_as(&named.name) {
            Some("f32" | "f64") => Dtype::F32,
            Some("bf16") => Dtype::BF16,
            Some("i64") => Dtype::I64,
            _ => Dtype::F16,
        };
        let mut types = parts.iter().map(own);
        let first = types.next().unwrap_or(Dtype::F32);
        if types.all(|it| it == first) {
            first
        } else {
            Dtype::F32
        }
    }

    /// What is taken for a tensor that stays out of blocks: 16 bits.
    fn narrowest_plain(&self, parts: &[Named]) -> Stored {
        Stored::Plain(match self.own_type(parts) {
            Dtype::F32 => Dtype::F16,
            own => own,
        })
    }

    fn type_of(&self, parts: &[Named], shape: &[usize]) -> Stored {
        let own = self.own_type(parts);
        if own == Dtype::I64 {
            return Stored::Plain(own);
        }
        let elements: usize = shape.iter().product();
        let is_small = shape.len() < 2 || elements <= SMALL;
        let is_gguf = self.format == FileFormat::Gguf;
        if is_small && is_gguf && own != Dtype::F16 {
            return Stored::Plain(Dtype::F32);
        }
        let Some(WeightType(asked)) = self.asked else {
            return Stored::Plain(own);
        };
        let is_narrow = !matches!(asked, Stored::Plain(Dtype::F32 | Dtype::F16 | Dtype::BF16));
        let is_narrowed = |named: &Named| {
            !named.name.starts_with("vae.") && NARROWED.iter().any(|part| named.name.contains(part))
        };
        if !is_narrow || !is_small && parts.iter().all(is_narrowed) {
            asked
        } else if is_small {
            Stored::Plain(own)
        } else {
            self.narrowest_plain(parts)
        }
    }

    /// The number of tensors.
    pub fn count(&self) -> usize {
        self.tensors.len()
    }

    /// The bytes of all weights, without the header.
    pub fn bytes(&self) -> u64 {
        self.tensors
            .iter()
            .map(|tensor| tensor.bytes() as u64)
            .sum()
    }

    /// How many tensors are stored in which type, by its name.
    pub fn types(&self) -> Map<String, Value> {
        let mut types = Map::new();
        for tensor in &self.tensors {
            let count = types.entry(tensor.stored.name()).or_insert(json!(0));
            *count = json!(count.as_u64().unwrap_or(0) + 1);
        }
        types
    }

    /// Writes the file piece by piece through `put`; `on_tensor` hears how many tensors are written.
    /// Errors if a tensor cannot be read, and if one of the two says so.
    pub fn write(
        &self,
        put: &mut dyn FnMut(&[u8]) -> Result<()>,
        on_tensor: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let alignment = match self.format {
            FileFormat::Safetensors => {
                put(&self.safetensors_header())?;
                1
            }
            FileFormat::Gguf => {
                put(&self.gguf_header())?;
                Header::ALIGNMENT
            }
        };
        for (done, tensor) in self.tensors.iter().enumerate() {
            on_tensor(done)?;
            let mut bytes = self
                .read(tensor)
                .with_context(|| format!("tensor `{}` cannot be converted", tensor.name))?;
            bytes.resize(bytes.len().next_multiple_of(alignment), 0);
            put(&bytes)?;
        }
        on_tensor(self.tensors.len())
    }

    fn safetensors_header(&self) -> Vec<u8> {
        let mut header = Map::new();
        // what transformers and diffusers want to see
        let mut metadata = json!({ "format": "pt" });
        for (key, text) in self.notes() {
            metadata[key] = text.into();
        }
        header.insert("__metadata__".into(), metadata);
        let mut at = 0;
        for tensor in &self.tensors {
            let end = at + tensor.bytes();
            let dtype = match tensor.stored {
                Stored::Plain(dtype) => json!(dtype),
                _ => Value::Null,
            };
            let info = json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [at, end] });
            header.insert(tensor.name.clone(), info);
            at = end;
        }
        let mut text = Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        [(text.len() as u64).to_le_bytes().to_vec(), text].concat()
    }

    /// What tensors do not tell of a model, for the header of a single file.
    fn notes(&self) -> Vec<(String, String)> {
        let mut notes = vec![];
        if !self.is_single_file {
            return notes;
        }
        let scheduler = self.checkpoint.optional_config("scheduler");
        if self.checkpoint.denoiser() == UNET {
            let is_v = scheduler.is_some_and(|it| it["prediction_type"] == "v_prediction");
            let prediction = if is_v { "v" } else { "epsilon" };
            notes.push(("modelspec.prediction_type".into(), prediction.into()));
        }
        let mut configs = Map::new();
        for name in OWN_CONFIGS {
            let config = self.checkpoint.optional_config(name);
            let Some(config) = config.and_then(Value::as_object) else {
                continue;
            };
            // not which parts a folder has
            let own = config.iter().filter(|(_, value)| !value.is_array());
            let own: Map<_, _> = own
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect();
            configs.insert(name.into(), own.into());
        }
        notes.push((OWN_CONFIGS_KEY.into(), Value::Object(configs).to_string()));
        notes
    }

    fn gguf_header(&self) -> Vec<u8> {
        /// The version of the layout of blocks.
        const QUANTIZATION: u32 = 2;
        let mut header = Header::default();
        let pooled = "unet.add_embedding.linear_1.weight";
        let has_pooled = self.checkpoint.shape_of(pooled).is_some();
        let architecture = match self.checkpoint.drawn() {
            Some(drawn) => drawn.architecture,
            None if has_pooled => "sdxl",
            None => "sd1",
        };
        header.text("general.architecture", architecture);
        for (key, text) in self.notes() {
            header.text(&key, &text);
        }
        header.number("general.quantization_version", QUANTIZATION);
        header.number("general.file_type", self.file_type());
        for tensor in &self.tensors {
            header.tensor(&tensor.name, &tensor.shape, tensor.stored, tensor.bytes());
        }
        header.into_bytes()
    }

    /// What llama.cpp calls a file of mostly this type.
    fn file_type(&self) -> u32 {
        let name = self.asked.map(|asked| asked.0.name());
        match name.as_deref() {
            Some("f32") => 0,
            Some("bf16") => 32,
            Some("q4_0") => 2,
            Some("q4_1") => 3,
            Some("q8_0") => 7,
            Some("q5_0") => 8,
            Some("q5_1") => 9,
            Some("q2_k") => 10,
            Some("q3_k") => 11,
            Some("q4_k") => 14,
            Some("q5_k") => 16,
            Some("q6_k") => 18,
            _ => 1,
        }
    }

    /// The bytes of a tensor.
    fn read(&self, output: &Output) -> Result<Vec<u8>> {
        let part = |named: &Named| -> Result<Tensor> {
            let tensor = self.checkpoint.read_patched(&named.name)?;
            Ok(match named.part {
                Part::Whole | Part::Rows { .. } => tensor,
                Part::Transposed => tensor.t()?.contiguous()?,
                Part::SwappedHalves => {
                    let half = tensor.dim(0)? / 2;
                    let halves = [tensor.narrow(0, half, half)?, tensor.narrow(0, 0, half)?];
                    Tensor::cat(&halves, 0)?
                }
            })
        };
        let mut parts = output.parts.iter().map(part).collect::<Result<Vec<_>>>()?;
        let first = parts.first().map_or(DType::F32, Tensor::dtype);
        if parts.iter().any(|part| part.dtype() != first) {
            let wide = parts.iter().map(|part| part.to_dtype(DType::F32));
            parts = wide.collect::<Result<_, _>>()?;
        }
        let tensor = match parts.as_slice() {
            [one] => one.clone(),
            several => Tensor::cat(several, 0)?,
        };
        drop(parts);
        let bytes = encoded(&tensor.to_device(&Device::Cpu)?, output.stored)?;
        if bytes.len() != output.bytes() {
            bail!(
                "it has the shape {:?}, where its header says {:?}",
                tensor.dims(),
                output.shape
            );
        }
        Ok(bytes)
    }
}

/// A file of a diffusers folder that holds no weights: its path in the folder, and its bytes.
pub type SmallFile = (PathBuf, Vec<u8>);

/// The components of a model that a folder of diffusers has folders for. Errors if it lacks one.
pub fn components(checkpoint: &Checkpoint) -> Result<Vec<&'static str>> {
    if checkpoint.denoiser() == TRANSFORMER {
        let whole = checkpoint.require_text_encoder();
        whole.and_then(|()| checkpoint.require_vae()).context(
            "a folder holds all parts of a model\n\nhint: name the model's folder, and this with `--diffusion-model`",
        )?;
    }
    let is_there = |part: &&str| checkpoint.has_part(part);
    Ok(PARTS.into_iter().filter(is_there).collect())
}

/// What a folder of diffusers holds beside weights: configurations and tokenizers. `clip` gives the
/// vocabulary and the merges of CLIP's own tokenizer. Errors if a file cannot be read.
pub fn small_files(
    checkpoint: &Checkpoint,
    clip: &dyn Fn() -> Result<[String; 2]>,
) -> Result<Vec<SmallFile>> {
    let mut files = vec![];
    let mut add = |path: &str, text: String| files.push((PathBuf::from(path), text.into_bytes()));
    let mut parts = vec![];
    for component in components(checkpoint)? {
        let config = checkpoint.config(component)?.clone();
        let (config, library, class) = classed(config, component);
        add(&format!("{component}/config.json"), pretty(&config));
        parts.push((component, json!([library, class])));
    }
    let scheduler = checkpoint.config("scheduler")?;
    add("scheduler/scheduler_config.json", pretty(scheduler));
    parts.push(("scheduler", json!(["diffusers", scheduler["_class_name"]])));
    for (encoder, folder) in ENCODERS.into_iter().zip(TOKENIZERS) {
        if !checkpoint.has_part(encoder) {
            continue;
        }
        let of_model = checkpoint.folder.as_ref().map(|it| it.join(folder));
        match of_model.filter(|folder| folder.is_dir()) {
            Some(source) => files.extend(copied(&source, folder)?),
            None => files.extend(tokenizer(checkpoint.tokenizer(encoder)?, folder, clip)?),
        }
        let kind = checkpoint.config(encoder)?["model_type"].as_str();
        let class = match kind {
            Some("t5") => "T5TokenizerFast",
            Some("qwen3") => "Qwen2TokenizerFast",
            _ => "CLIPTokenizer",
        };
        parts.push((folder, json!(["transformers", class])));
    }
    let index = model_index(checkpoint, &parts);
    files.push(("model_index.json".into(), pretty(&index).into_bytes()));
    Ok(files)
}

/// Errors if one of these text encoders is CLIP with other tokens than CLIP's: a single file has no
/// tokenizer, and its readers take CLIP's.
fn require_clip_vocabulary(checkpoint: &Checkpoint, components: &[&str]) -> Result<()> {
    for encoder in components.iter().filter(|it| ENCODERS.contains(it)) {
        let config = checkpoint.config(encoder)?;
        let is_clip = !matches!(config["model_type"].as_str(), Some("t5" | "qwen3"));
        let tokens = config["vocab_size"].as_u64();
        if let Some(tokens) = tokens.filter(|tokens| is_clip && *tokens != CLIP_VOCABULARY) {
            bail!(
                "`{}` has {tokens} tokens of its own, and single files have no tokenizer: their readers take CLIP's {CLIP_VOCABULARY}\n\nhint: name a folder, which has one",
                checkpoint.name
            );
        }
    }
    Ok(())
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

/// A configuration that says its class, and the library and the class of the component.
fn classed(mut config: Value, component: &str) -> (Value, &'static str, String) {
    if ENCODERS.contains(&component) {
        let class = match config["model_type"].as_str() {
            Some("t5") => "T5EncoderModel",
            Some("qwen3") => "Qwen3ForCausalLM",
            _ if component == ENCODERS[0] => "CLIPTextModel",
            _ => "CLIPTextModelWithProjection",
        };
        if config.get("model_type").is_none() {
            config["model_type"] = "clip_text_model".into();
        }
        if config.get("architectures").is_none() {
            config["architectures"] = json!([class]);
        }
        return (config, "transformers", class.into());
    }
    let usual = match component {
        UNET => "UNet2DConditionModel",
        _ => "AutoencoderKL",
    };
    if config.get("_class_name").is_none() {
        config["_class_name"] = usual.into();
    }
    let class = config["_class_name"].as_str().unwrap_or(usual).to_string();
    (config, "diffusers", class)
}

/// model_index.json for these parts; those that a model's own lists besides are left out.
fn model_index(checkpoint: &Checkpoint, parts: &[(&str, Value)]) -> Value {
    let own = checkpoint
        .optional_config("pipeline")
        .and_then(Value::as_object);
    let mut index = own.cloned().unwrap_or_default();
    if !index.contains_key("_class_name") {
        let class = match checkpoint.has_part(ENCODERS[1]) {
            true if checkpoint.has_part(ENCODERS[0]) => "StableDiffusionXLPipeline",
            true => "StableDiffusionXLImg2ImgPipeline",
            false => "StableDiffusionPipeline",
        };
        index.insert("_class_name".into(), class.into());
    }
    if let Some(defaults) = checkpoint.optional_config(DEFAULTS) {
        index.insert(DEFAULTS_KEY.into(), defaults.clone());
    }
    if index.contains_key("safety_checker") {
        index.insert("requires_safety_checker".into(), false.into());
    }
    for (name, value) in &mut index {
        if value.is_array() && !parts.iter().any(|(part, _)| part == name) {
            *value = json!([null, null]);
        }
    }
    for (part, value) in parts {
        let is_listed = index.get(*part).is_some_and(|listed| !listed[0].is_null());
        if !is_listed || *part == "vae" {
            index.insert((*part).into(), value.clone());
        }
    }
    index.into()
}

/// The files of a folder, under another name.
fn copied(source: &Path, folder: &str) -> Result<Vec<SmallFile>> {
    let read = || format!("cannot read the folder `{}`", source.display());
    let mut files = vec![];
    for entry in std::fs::read_dir(source).with_context(read)? {
        let path = entry.with_context(read)?.path();
        if let (true, Some(name)) = (path.is_file(), path.file_name()) {
            let bytes = std::fs::read(&path)
                .with_context(|| format!("cannot read `{}`", path.display()))?;
            files.push((Path::new(folder).join(name), bytes));
        }
    }
    Ok(files)
}

/// The files of a tokenizer that was read from elsewhere.
fn tokenizer(
    source: &TokenizerSource,
    folder: &str,
    clip: &dyn Fn() -> Result<[String; 2]>,
) -> Result<Vec<SmallFile>> {
    let file = |name: &str, text: String| (Path::new(folder).join(name), text.into_bytes());
    let mut config = source.config.as_object().cloned().unwrap_or_default();
    let mut files = match &source.files {
        TokenizerFiles::Json(json) => vec![file("tokenizer.json", json.clone())],
        TokenizerFiles::VocabMerges { vocab, merges } => vec![
            file("vocab.json", vocab.clone()),
            file("merges.txt", merges.clone()),
        ],
        TokenizerFiles::Clip => {
            let [vocab, merges] = clip()?;
            config
                .entry("tokenizer_class")
                .or_insert("CLIPTokenizer".into());
            vec![file("vocab.json", vocab), file("merges.txt", merges)]
        }
    };
    files.push(file("tokenizer_config.json", pretty(&config.into())));
    Ok(files)
}

/// The bytes of a tensor's numbers in a type.
fn encoded(tensor: &Tensor, stored: Stored) -> Result<Vec<u8>> {
    let wide = || tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>();
    Ok(match stored {
        Stored::Plain(Dtype::F32) => wide()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Stored::Plain(Dtype::F16) => {
            let tensor = tensor.flatten_all()?.to_dtype(DType::F16)?;
            let numbers = tensor.to_vec1::<f16>()?;
            numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
        }
        Stored::Plain(Dtype::BF16) => {
            let tensor = tensor.flatten_all()?.to_dtype(DType::BF16)?;
            let numbers = tensor.to_vec1::<bf16>()?;
            numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
        }
        Stored::Plain(Dtype::F8_E4M3) => wide()?.into_iter().map(to_e4m3).collect(),
        Stored::Plain(Dtype::I64) => {
            let whole = wide()?.into_iter().map(|x| x as i64);
            whole.flat_map(i64::to_le_bytes).collect()
        }
        Stored::Blocks(blocks) => quantize::quantize(blocks, &wide()?)?,
        other => bail!("{} is a type that is not written", other.name()),
    })
}
