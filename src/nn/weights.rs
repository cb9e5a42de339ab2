//! Where networks take their weights from: a [`Weights`] cursor walks the names of a
//! [`TensorSource`].
//!
//! The cursor checks shapes and decides the type and the device of each tensor. It hides what is
//! behind the source: a checkpoint's files with all that is merged into them, or random numbers.

use super::Backend;
use super::blocks::BlockMatrix;
use anyhow::{Result, bail};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

/// Tensors by name.
pub trait TensorSource: Sync {
    /// The name of the source, for error messages.
    fn name(&self) -> &str;

    /// Reads a tensor to the CPU, in the type in which it is stored (f32 where that is neither f16
    /// nor bf16). `shape` is what the network expects; the source may return another one, which is
    /// an error of its caller. Errors if there is no tensor of that name, or it cannot be read.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor>;

    /// Reads a matrix [rows, columns] that is stored in blocks as it is; none where it is not, or where
    /// [`Self::tensor`] gives other numbers than are stored.
    fn blocks(&self, _name: &str, _shape: [usize; 2]) -> Result<Option<BlockMatrix>> {
        Ok(None)
    }
}

/// A source that outlives the networks that are read from it.
pub type SharedSource = Arc<dyn TensorSource + Send>;

/// A source that has a tensor of any name and shape: uniform numbers of a sensible size.
struct RandomTensors;

impl TensorSource for RandomTensors {
    fn name(&self) -> &str {
        "random weights"
    }

    fn tensor(&self, _name: &str, shape: &[usize]) -> Result<Tensor> {
        let fan_in = shape.iter().skip(1).product::<usize>().max(1) as f32;
        let bound = 1.0 / fan_in.sqrt();
        let (count, most) = (shape.iter().product::<usize>(), 1 << 22);
        let block = Tensor::rand(-bound, bound, count.min(most), &Device::Cpu)?;
        // billions of numbers repeat some millions
        let all = block.repeat(count.div_ceil(most).max(1))?;
        Ok(all.narrow(0, 0, count)?.reshape(shape)?)
    }
}

/// A place among a source's names, from which a layer takes its tensors.
#[derive(Clone)]
pub struct Weights<'a> {
    source: &'a dyn TensorSource,
    prefix: String,
    device: &'a Device,
    dtype: DType,
    backend: Backend,
    /// the source once more, where blocks are read each time that they are needed
    again: Option<SharedSource>,
    int8: Int8,
}

/// Whether linear layers are to be of 8-bit integers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Int8 {
    Never,
    /// those that many tokens pass, of which this place is none
    Elsewhere,
    Here,
}

/// A place among the names of a source that it keeps.
pub struct OwnedWeights {
    source: SharedSource,
    prefix: String,
    device: Device,
    dtype: DType,
    backend: Backend,
    int8: Int8,
}

impl OwnedWeights {
    /// The place `name` below this one.
    pub fn at(&self, name: impl std::fmt::Display) -> Weights<'_> {
        let prefix = format!("{}.{name}", self.prefix);
        Weights {
            backend: self.backend,
            int8: self.int8,
            ..Weights::new(&*self.source, prefix, &self.device, self.dtype)
        }
    }
}

impl<'a> Weights<'a> {
    /// The place `prefix` of a source, whose tensors go to `device`; `dtype` is the type that was
    /// asked for, see [`Self::get_stored`].
    pub fn new(
        source: &'a dyn TensorSource,
        prefix: impl Into<String>,
        device: &'a Device,
        dtype: DType,
    ) -> Self {
        Self {
            source,
            prefix: prefix.into(),
            device,
            dtype,
            backend: Backend::of(device),
            again: None,
            int8: Int8::Never,
        }
    }

    /// The same, of which linear layers that many tokens pass are of 8-bit integers if `asked`.
    pub fn with_int8(self, asked: bool) -> Self {
        let int8 = match asked {
            true => Int8::Elsewhere,
            false => Int8::Never,
        };
        Self { int8, ..self }
    }

    /// The same place, whose linear layers many tokens pass: not those that see a timestep alone, whose
    /// errors are in all of a picture.
    pub fn for_tokens(&self) -> Self {
        let int8 = match self.int8 {
            Int8::Never => Int8::Never,
            Int8::Elsewhere | Int8::Here => Int8::Here,
        };
        Self {
            int8,
            ..self.clone()
        }
    }

    /// Whether the linear layers of this place are of 8-bit integers.
    pub fn is_int8(&self) -> bool {
        self.int8 == Int8::Here && self.backend == Backend::Cpu
    }

    /// The same, of which networks do not keep the blocks of a [`Stack`](super::stack::Stack) where a
    /// source is given, but read them again from there.
    pub fn reading_again(&self, source: Option<SharedSource>) -> Self {
        Self {
            again: source,
            ..self.clone()
        }
    }

    /// This place, for blocks that are read again, if they are to be.
    pub(super) fn to_read_again(&self) -> Option<OwnedWeights> {
        Some(OwnedWeights {
            source: self.again.clone()?,
            prefix: self.prefix.clone(),
            device: self.device.clone(),
            dtype: self.dtype,
            backend: self.backend,
            int8: self.int8,
        })
    }

    /// Random weights of any name and shape, for benchmarks and tests.
    pub fn random(device: &'a Device, dtype: DType) -> Self {
        Self::new(&RandomTensors, "random", device, dtype)
    }

    /// The place `name` below this one.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        Self {
            prefix: format!("{}.{name}", self.prefix),
            ..self.clone()
        }
    }

    /// Lays weights out for another backend than the fastest of the device.
    pub fn with_backend(self, backend: Backend) -> Self {
        Self { backend, ..self }
    }

    /// The backend that layers are laid out for.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Reads the tensor `name` of exactly this shape, in the type of the arithmetic (on CPUs f32);
    /// trailing dimensions of size 1 may differ (a linear layer stored as a 1x1 convolution).
    /// Errors name the tensor, its shape and the expected one.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        Ok(self
            .read(name, shape)?
            .to_dtype(self.arithmetic())?
            .to_device(self.device)?)
    }

    /// A vector of one number, as [`Self::get`] would read it.
    pub fn constant(&self, value: f64, width: usize) -> Result<Tensor> {
        let vector = Tensor::full(value as f32, width, self.device)?;
        Ok(vector.to_dtype(self.arithmetic())?)
    }

    /// Reads a tensor as [`Self::get`] does, in the type in which large weights are kept: on CPUs,
    /// unless a narrower one was asked for, the type of the file, since products widen weights as
    /// they read them.
    pub fn get_stored(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.read(name, shape)?;
        let dtype = if self.device.is_cpu() && self.dtype == DType::F32 {
            tensor.dtype()
        } else {
            self.dtype
        };
        Ok(tensor.to_dtype(dtype)?.to_device(self.device)?)
    }

    /// Reads a matrix of exactly this shape that is stored in blocks, if it is one and the backend
    /// multiplies by such.
    pub fn get_blocks(&self, name: &str, shape: [usize; 2]) -> Result<Option<BlockMatrix>> {
        match self.backend {
            Backend::Cpu => self
                .source
                .blocks(&format!("{}.{name}", self.prefix), shape),
            Backend::Gpu | Backend::Plain => Ok(None),
        }
    }

    /// Zeros in place of a tensor that a layer does not have, in the type of the arithmetic.
    pub fn zeros(&self, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::zeros(shape, self.arithmetic(), self.device)?)
    }

    /// The device that the weights go to.
    pub fn device(&self) -> &Device {
        self.device
    }

    /// The type of the arithmetic.
    /// The type that networks compute in: on CPUs f32, whatever their weights are kept in.
    pub fn arithmetic(&self) -> DType {
        if self.backend == Backend::Cpu {
            DType::F32
        } else {
            self.dtype
        }
    }

    fn read(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let name = format!("{}.{name}", self.prefix);
        let tensor = self.source.tensor(&name, shape)?;
        if !is_same_shape(tensor.dims(), shape) {
            bail!(
                "tensor `{name}` of `{}` has shape {:?}, its configuration says {shape:?}\n\nhint: its configuration and its weights do not belong together",
                self.source.name(),
                tensor.dims()
            );
        }
        Ok(tensor.reshape(shape)?)
    }
}

/// Whether two shapes are equal but for trailing dimensions of size 1.
pub fn is_same_shape(a: &[usize], b: &[usize]) -> bool {
    let trimmed = |shape: &[usize]| shape.iter().rposition(|d| *d != 1).map_or(0, |i| i + 1);
    a.get(..trimmed(a)) == b.get(..trimmed(b))
}
