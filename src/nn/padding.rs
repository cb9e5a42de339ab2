//! What convolutions see beyond the edge of an image.

/// What convolutions see beyond the edge of an image along one axis: torch's `padding_mode`.
/// Circular in both axes makes images that tile seamlessly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PaddingMode {
    #[default]
    Zeros,
    /// the opposite edge
    Circular,
}

impl PaddingMode {
    /// Whether the opposite edge is seen.
    pub fn is_circular(self) -> bool {
        self == Self::Circular
    }
}
