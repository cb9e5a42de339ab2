//! Seamless pictures: convolutions see the other end of a picture beyond its edge, where else they
//! see zeros.

use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How copies of a picture fit together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Tile {
    /// side by side
    X,
    /// one above the other
    Y,
    /// both
    Xy,
}

/// Whether the pictures of a network are seamless. All its convolutions look here, so that it is
/// told once.
#[derive(Debug, Clone, Default)]
pub struct Wrap(Arc<[AtomicBool; 2]>);

impl Wrap {
    /// From now on.
    pub fn set(&self, tile: Option<Tile>) {
        self.store([
            matches!(tile, Some(Tile::Y | Tile::Xy)),
            matches!(tile, Some(Tile::X | Tile::Xy)),
        ]);
    }

    /// Whether rows go on at the other end, and columns: what is above the first row is the last
    /// one.
    pub fn get(&self) -> [bool; 2] {
        let Self(wraps) = self;
        [
            wraps[0].load(Ordering::Relaxed),
            wraps[1].load(Ordering::Relaxed),
        ]
    }

    /// Does work on pictures that have edges.
    pub fn suspended<R>(&self, work: impl FnOnce() -> R) -> R {
        let wraps = self.get();
        self.store([false; 2]);
        let result = work();
        self.store(wraps);
        result
    }

    fn store(&self, wraps: [bool; 2]) {
        self.0
            .iter()
            .zip(wraps)
            .for_each(|(to, value)| to.store(value, Ordering::Relaxed));
    }
}
