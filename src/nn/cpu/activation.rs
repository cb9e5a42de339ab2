//! Functions of each element, as vectors on all threads, where candle computes them one by one on one.

use super::concat::uninit;
use super::gemm::slice;
use super::vector::{Kernel, LANES, Vector, dispatch};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, bail};
use rayon::prelude::*;

/// Elements that one task computes.
const CHUNK: usize = 1 << 14;

/// SiLU of the first half of each row times the second half (SwiGLU, Shazeer 2020, arXiv 2002.05202):
/// contiguous [.., 2n] -> [.., n].
pub struct SwiGlu;

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut shape = layout.dims().to_vec();
        let Some(width) = shape.last_mut().filter(|width| width.is_multiple_of(2)) else {
            bail!("an odd width cannot be halved")
        };
        *width /= 2;
        let width = *width;
        let x = slice(x, layout)?;
        let mut y = uninit(x.len() / 2);
        if width > 0 {
            let tasks = y.par_chunks_mut(width).zip(x.par_chunks(2 * width));
            tasks.for_each(|(y, x)| dispatch(Gated { y, x }));
        }
        Ok((CpuStorage::F32(y), Shape::from(shape)))
    }
}

/// A row of [`SwiGlu`].
struct Gated<'a> {
    y: &'a mut [f32],
    x: &'a [f32],
}

impl Kernel for Gated<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { y, x } = self;
        let (gate, x) = x.split_at(y.len());
        let chunks = gate.chunks(LANES).zip(x.chunks(LANES));
        for (y, (gate, x)) in y.chunks_mut(LANES).zip(chunks) {
            V::load_some(gate).silu().mul(V::load_some(x)).store_some(y);
        }
    }
}

/// GELU by the tangent's formula (Hendrycks & Gimpel 2016, arXiv 1606.08415) of a contiguous tensor.
pub struct GeluTanh;

impl CustomOp1 for GeluTanh {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout)?;
        let mut y = uninit(x.len());
        let tasks = y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
        tasks.for_each(|(y, x)| dispatch(Chunk { y, x }));
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }
}

struct Chunk<'a> {
    y: &'a mut [f32],
    x: &'a [f32],
}

impl Kernel for Chunk<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { y, x } = self;
        for (y, x) in y.chunks_mut(LANES).zip(x.chunks(LANES)) {
            V::load_some(x).gelu_tanh().store_some(y);
        }
    }
}
