//! Who computes the layers.

use candle_core::Device;

/// Who computes the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// the kernels of [`super::cpu`]
    Cpu,
    /// the kernels of [`super::gpu`]
    Gpu,
    /// Compositions of candle's operations: for devices without kernels, and the reference that
    /// kernels are tested against.
    Plain,
}

impl Backend {
    /// The fastest that a device has.
    pub fn of(device: &Device) -> Self {
        match device {
            Device::Cpu => Self::Cpu,
            Device::Cuda(_) if cfg!(feature = "cuda") => Self::Gpu,
            _ => Self::Plain,
        }
    }
}
