//! The arguments that every layer of a forward pass shares.

use super::backend::Backend;
use super::padding::PaddingMode;
use super::profile::Profile;
use candle_core::Device;

/// What a forward pass needs besides its input. Networks hold none of it, so threads that share
/// one may each have their own.
#[derive(Debug, Clone, Copy)]
pub struct Forward<'a> {
    /// That of the network's weights, which are laid out for it.
    pub backend: Backend,
    /// of rows and of columns
    pub padding: [PaddingMode; 2],
    /// counts and times the layers, if there is one
    pub profile: Option<&'a Profile>,
}

impl<'a> Forward<'a> {
    /// A pass on the device's own backend, padded with zeros and not profiled.
    pub fn on(device: &Device) -> Self {
        Self {
            backend: Backend::of(device),
            padding: Default::default(),
            profile: None,
        }
    }

    /// The same with other padding modes of rows and of columns.
    pub fn padded(self, padding: [PaddingMode; 2]) -> Self {
        Self { padding, ..self }
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
