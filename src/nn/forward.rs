//! The arguments that every layer of a forward pass shares.

use super::backend::Backend;
use super::padding::PaddingMode;
use super::profile::Profile;
use candle_core::Device;

/// How exactly products are computed; sums are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// in f32, or by as many bf16 products as come near to that
    #[default]
    F32,
    /// On CPUs with instructions for it, of numbers that are rounded to bf16; in f32 on others. On
    /// GPUs the type of the weights says it.
    Bf16,
}

/// The arguments of a forward pass besides its input. Networks keep none of them, so threads that
/// share a network may each pass their own.
#[derive(Debug, Clone, Copy)]
pub struct Forward<'a> {
    /// the backend for which the network's weights are laid out
    pub backend: Backend,
    /// of rows and of columns
    pub padding: [PaddingMode; 2],
    pub precision: Precision,
    /// the profile that counts and times the layers, if any
    pub profile: Option<&'a Profile>,
}

impl<'a> Forward<'a> {
    /// A pass on the device's own backend, padded with zeros and not profiled.
    pub fn on(device: &Device) -> Self {
        Self {
            backend: Backend::of(device),
            padding: Default::default(),
            precision: Precision::default(),
            profile: None,
        }
    }

    /// The same with other padding modes of rows and of columns.
    pub fn padded(self, padding: [PaddingMode; 2]) -> Self {
        Self { padding, ..self }
    }

    /// The same with products of another precision.
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// Runs a layer, timed if there is a profile. `sides` are those m, k, n of its product [m, k]
    /// [k, n]; the last two are 0 for layers that do not multiply.
    #[inline]
    pub(super) fn timed<R>(
        self,
        kind: &'static str,
        sides: [usize; 3],
        work: impl FnOnce() -> R,
    ) -> R {
        match self.profile {
            Some(profile) => profile.timed((kind, sides), work),
            None => work(),
        }
    }
}
