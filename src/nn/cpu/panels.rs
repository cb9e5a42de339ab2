//! Weights of products, packed once at load: panels of 32 output channels side by side, in the type
//! of the file. Those in blocks stay as they are stored, and become panels piece by piece.

use super::vector::{LANES, Lanes, Vector, floats};
use crate::nn::blocks::BlockMatrix;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, WithDType, bail};
use half::{bf16, f16};
use rayon::prelude::*;

/// Vectors of output channels in a panel.
pub const PANEL: usize = 2;

/// Output channels in a panel.
pub const WIDTH: usize = PANEL * LANES;

/// Input channels that one task packs.
const PACKED: usize = 32;

/// Vectors of a panel that hold any of `outputs` channels.
pub fn vectors(outputs: usize, panel: usize) -> usize {
    (outputs - panel * WIDTH).div_ceil(LANES).min(PANEL)
}

/// Packs weights [out, in, ..taps] as checkpoints store them -> [panels, taps*in, 32]: for each 32
/// output channels, with zeros after the last, the right side of one matrix product.
pub struct Pack {
    /// A gated layer: 16 channels of the first half of the output beside the same 16 of the second.
    pub gated: bool,
}

impl CustomOp1 for Pack {
    fn name(&self) -> &'static str {
        "pack"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("weights are packed from contiguous memory")
        };
        let (storage, shape) = match storage {
            CpuStorage::F32(weight) => self.pack(&weight[start..end], layout.dims())?,
            CpuStorage::F16(weight) => self.pack(&weight[start..end], layout.dims())?,
            CpuStorage::BF16(weight) => self.pack(&weight[start..end], layout.dims())?,
            _ => bail!("weights are packed as f32, f16 or bf16"),
        };
        Ok((storage, shape))
    }
}

impl Pack {
    fn pack<T: WithDType>(&self, weight: &[T], shape: &[usize]) -> Result<(CpuStorage, Shape)> {
        let &[outputs, inputs, ref taps @ ..] = shape else {
            bail!("weights {shape:?} cannot be packed")
        };
        let taps: usize = taps.iter().product();
        if weight.is_empty() || self.gated && outputs % 2 != 0 {
            bail!("a product from {inputs} to {outputs} channels");
        }
        let panels = self.panels(outputs);
        let slabs = inputs.div_ceil(PACKED);
        let mut packed = vec![T::from_f64(0.0); panels * taps * inputs * WIDTH];
        // for each panel and slab of input channels, its rows under every tap of the kernel
        let mut blocks: Vec<Vec<&mut [T]>> = (0..panels * slabs)
            .map(|_| Vec::with_capacity(taps))
            .collect();
        for (blocks, panel) in blocks
            .chunks_exact_mut(slabs)
            .zip(packed.chunks_exact_mut(taps * inputs * WIDTH))
        {
            for tap in panel.chunks_exact_mut(inputs * WIDTH) {
                for (block, rows) in blocks.iter_mut().zip(tap.chunks_mut(PACKED * WIDTH)) {
                    block.push(rows);
                }
            }
        }
        blocks.par_iter_mut().enumerate().for_each(|(i, block)| {
            let (panel, slab) = (i / slabs, i % slabs);
            for column in 0..WIDTH {
                let Some(output) = self.output(panel, column, outputs) else {
                    continue;
                };
                let weight = &weight[output * inputs * taps..][..inputs * taps];
                for (row, weight) in weight[slab * PACKED * taps..]
                    .chunks_exact(taps)
                    .take(PACKED)
                    .enumerate()
                {
                    for (rows, value) in block.iter_mut().zip(weight) {
                        rows[row * WIDTH + column] = *value;
                    }
                }
            }
        });
        Ok((
            T::to_cpu_storage_owned(packed),
            Shape::from((panels, taps * inputs, WIDTH)),
        ))
    }

    /// Panels for that many output channels.
    pub fn panels(&self, outputs: usize) -> usize {
        if self.gated {
            (outputs / 2).div_ceil(LANES)
        } else {
            outputs.div_ceil(WIDTH)
        }
    }

    /// The output channel in a column of a panel, if there is one.
    pub(super) fn output(&self, panel: usize, column: usize, outputs: usize) -> Option<usize> {
        if !self.gated {
            return Some(panel * WIDTH + column).filter(|o| *o < outputs);
        }
        let (half, within) = (outputs / 2, panel * LANES + column % LANES);
        (within < half).then_some(column / LANES * half + within)
    }
}

/// Packed weights [panels, depth, 32].
#[derive(Clone, Copy)]
pub enum Panels<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl<'a> Panels<'a> {
    /// The panels of a contiguous tensor.
    pub fn of(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("packed weights are contiguous")
        };
        Ok(match storage {
            CpuStorage::F32(weight) => Self::F32(&weight[start..end]),
            CpuStorage::F16(weight) => Self::F16(&weight[start..end]),
            CpuStorage::BF16(weight) => Self::Bf16(&weight[start..end]),
            _ => bail!("packed weights are f32, f16 or bf16"),
        })
    }

    /// Sixteen of them from `at` on.
    #[inline(always)]
    pub fn load<V: Vector>(self, at: usize) -> V {
        match self {
            Self::F32(weight) => V::load_some(&weight[at..][..LANES]),
            Self::F16(weight) => V::load_f16(&weight[at..]),
            Self::Bf16(weight) => V::load_bf16(&weight[at..]),
        }
    }

    /// All of `to` from `at` on.
    #[inline(always)]
    pub fn widen<V: Vector>(self, at: usize, to: &mut [Lanes]) {
        match self {
            Self::F32(weight) => {
                for (to, from) in to.iter_mut().zip(weight[at..].as_chunks().0) {
                    V::load(from).store(&mut to.0);
                }
            }
            Self::F16(weight) => {
                for (to, from) in to.iter_mut().zip(weight[at..].chunks_exact(LANES)) {
                    V::load_f16(from).store(&mut to.0);
                }
            }
            Self::Bf16(weight) => {
                for (to, from) in to.iter_mut().zip(weight[at..].chunks_exact(LANES)) {
                    V::load_bf16(from).store(&mut to.0);
                }
            }
        }
    }
}

/// The right side of a product.
#[derive(Clone, Copy)]
pub enum Right<'a> {
    Panels(Panels<'a>),
    /// weights [out, in] in blocks, and how they would be packed
    Blocks(&'a BlockMatrix, &'a Pack),
}

impl Right<'_> {
    /// Terms of which pieces of a sum are multiples.
    pub fn step(self) -> usize {
        match self {
            Self::Panels(_) => 1,
            Self::Blocks(matrix, _) => matrix.block(),
        }
    }

    /// All of `to` [terms, PANEL], terms of one panel from `at` on: the panel's number times the terms
    /// of all, and its first term.
    #[inline(always)]
    pub fn widen<V: Vector>(self, at: usize, to: &mut [Lanes]) {
        match self {
            Self::Panels(panels) => panels.widen::<V>(at * WIDTH, to),
            Self::Blocks(matrix, pack) => widen_blocks::<V>(matrix, pack, at, to),
        }
    }
}

/// See [`Right::widen`].
#[inline(always)]
fn widen_blocks<V: Vector>(matrix: &BlockMatrix, pack: &Pack, at: usize, to: &mut [Lanes]) {
    /// Vectors of terms that are widened at once: those of the largest block.
    const PIECE: usize = 16;
    let (outputs, inputs) = matrix.dims();
    let (panel, start) = (at / inputs, at % inputs);
    let mut rows = [[Lanes::default(); PIECE]; LANES];
    for (piece, to) in to.chunks_mut(PIECE * LANES * PANEL).enumerate() {
        let first = start + piece * PIECE * LANES;
        let vectors = to.len() / (LANES * PANEL);
        for lane in 0..PANEL {
            for (column, row) in rows.iter_mut().enumerate() {
                // a row that is not there is zeros
                let output = pack.output(panel, lane * LANES + column, outputs);
                let numbers = floats(&mut row[..vectors]);
                matrix.write(output.unwrap_or(outputs), first, numbers);
            }
            for (i, to) in to.chunks_exact_mut(LANES * PANEL).enumerate() {
                let mut square = [V::splat(0.0); LANES];
                for (vector, row) in square.iter_mut().zip(&rows) {
                    *vector = V::load(&row[i].0);
                }
                let columns = V::transpose(square);
                for (to, column) in to.chunks_exact_mut(PANEL).zip(&columns) {
                    column.store(&mut to[lane].0);
                }
            }
        }
    }
}
