//! Group normalisation with what follows it, and layer normalisation.

use super::{CHUNK, Launch, Params, Work, processors, suffix};
use candle_core::{Result, Shape, Tensor};

const THREADS: usize = 256;
/// Slices of a picture whose sums are kept apart.
const MAX_SLICES: usize = 64;

/// Group normalisation of x [b, h, w, c] (Wu & He 2018, arXiv 1803.08494), perhaps followed by SiLU.
pub struct GroupNorm {
    pub x: Tensor,
    pub weight: Tensor,
    pub bias: Tensor,
    pub groups: usize,
    pub eps: f64,
    pub silu: bool,
}

/// As `struct GroupNorm` of norm.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct GroupNormParams {
    x: u64,
    weight: u64,
    bias: u64,
    y: u64,
    parts: u64,
    pixels: i32,
    channels: i32,
    groups: i32,
    slices: i32,
    silu: i32,
    eps: f32,
}

/// As `struct LayerNorm` of norm.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct LayerNormParams {
    x: u64,
    weight: u64,
    bias: u64,
    y: u64,
    rows: i32,
    channels: i32,
    eps: f32,
}

/// The end of a kernel's name, and how many numbers it moves at once.
fn kind(x: &Tensor, channels: usize, addresses: &[u64]) -> Result<(String, usize)> {
    let suffix = suffix(x.dtype())?;
    let chunk = CHUNK / x.dtype().size_in_bytes();
    let wide = channels.is_multiple_of(chunk) && addresses.iter().all(|at| at % CHUNK as u64 == 0);
    Ok(if wide { (format!("wide_{suffix}"), chunk) } else { (suffix.into(), 1) })
}

impl GroupNorm {
    /// Enough slices that all multiprocessors have some, and that each has some rows of its own.
    fn slices(&self) -> Result<usize> {
        let (b, h, w, _) = self.x.dims4()?;
        Ok((2 * processors(self.x.device())).div_ceil(b).min((h * w).div_ceil(16)).clamp(1, MAX_SLICES))
    }
}

impl Work for GroupNorm {
    fn input(&self) -> &Tensor {
        &self.x
    }

    fn shape(&self) -> Result<Shape> {
        Ok(self.x.shape().clone())
    }

    fn scratch(&self) -> usize {
        self.slices().unwrap_or(0) * self.x.dim(0).unwrap_or(0) * self.groups * 2
    }

    fn launches(&self, address: &mut dyn FnMut(&Tensor) -> Result<u64>, output: u64, scratch: u64) -> Result<Vec<Launch>> {
        let (b, h, w, channels) = self.x.dims4()?;
        let (pixels, slices) = (h * w, self.slices()?);
        let [x, weight, bias] = [address(&self.x)?, address(&self.weight)?, address(&self.bias)?];
        let (kind, at_once) = kind(&self.x, channels, &[x, weight, bias, output])?;
        let int = |x: usize| i32::try_from(x).map_err(candle_core::Error::wrap);
        let params = Params::new(&GroupNormParams {
            x,
            weight,
            bias,
            y: output,
            parts: scratch,
            pixels: int(pixels)?,
            channels: int(channels)?,
            groups: int(self.groups)?,
            slices: int(slices)?,
            silu: self.silu.into(),
            eps: self.eps as f32,
        });
        let across = channels / at_once;
        let rows_at_once = (THREADS / across).max(1);
        let blocks = (pixels * across).div_ceil(4 * THREADS).min((8 * processors(self.x.device())).div_ceil(b));
        let launch =
            |name: &str, blocks, shared| Launch { kernel: format!("{name}_{kind}"), grid: [blocks, b], threads: THREADS, shared, params };
        Ok(vec![launch("group_sums", slices, rows_at_once * channels * 8), launch("group_apply", blocks.max(1), channels * 8)])
    }
}

/// Layer normalisation of the last dimension of x [.., c] (Ba et al. 2016, arXiv 1607.06450).
pub struct LayerNorm {
    pub x: Tensor,
    pub weight: Tensor,
    pub bias: Tensor,
    pub eps: f64,
}

impl Work for LayerNorm {
    fn input(&self) -> &Tensor {
        &self.x
    }

    fn shape(&self) -> Result<Shape> {
        Ok(self.x.shape().clone())
    }

    fn launches(&self, address: &mut dyn FnMut(&Tensor) -> Result<u64>, output: u64, _scratch: u64) -> Result<Vec<Launch>> {
        let channels = self.weight.elem_count();
        let rows = self.x.elem_count() / channels;
        let [x, weight, bias] = [address(&self.x)?, address(&self.weight)?, address(&self.bias)?];
        let (kind, _) = kind(&self.x, channels, &[x, weight, bias, output])?;
        let int = |x: usize| i32::try_from(x).map_err(candle_core::Error::wrap);
        let params = LayerNormParams { x, weight, bias, y: output, rows: int(rows)?, channels: int(channels)?, eps: self.eps as f32 };
        let grid = [rows.div_ceil(THREADS / 32), 1];
        Ok(vec![Launch { kernel: format!("layer_norm_{kind}"), grid, threads: THREADS, shared: 0, params: Params::new(&params) }])
    }
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::emulated::{self, random, same};
    use super::*;
    use crate::nn::layers::{group_norm_plain, layer_norm_plain};
    use candle_core::DType;

    const TYPES: [DType; 3] = [DType::F16, DType::BF16, DType::F32];

    fn wide(x: &Tensor) -> Tensor {
        x.to_dtype(DType::F32).unwrap()
    }

    #[test]
    fn the_group_norm_kernel_equals_its_plain_composition() {
        if !emulated::is_there() {
            return;
        }
        for (b, h, w, c, groups, zero) in [
            (1, 1, 1, 8, 4, 0.0),
            (2, 5, 7, 40, 4, 0.0),
            (1, 16, 9, 35, 5, 0.0),
            (3, 8, 8, 1280, 32, 0.0),
            (1, 2, 3, 2560, 32, 0.0),
            (1, 9, 9, 64, 8, 20.0),
        ] {
            for (dtype, silu) in TYPES.into_iter().zip([true, false, true]) {
                let x = (random(&[b, h, w, c], DType::F32) + zero).unwrap().to_dtype(dtype).unwrap();
                let (weight, bias) = (random(&[c], dtype), random(&[c], dtype));
                let plain = group_norm_plain(&wide(&x), &wide(&weight), &wide(&bias), groups, 1e-5).unwrap();
                let plain = if silu { candle_nn::ops::silu(&plain).unwrap() } else { plain };
                let norm = GroupNorm { x, weight, bias, groups, eps: 1e-5, silu };
                same(&super::super::run(norm).unwrap(), &plain, &format!("{b}x{h}x{w}, {c} in {groups} {dtype:?}"));
            }
        }
    }

    #[test]
    fn the_layer_norm_kernel_equals_its_plain_composition() {
        if !emulated::is_there() {
            return;
        }
        for (rows, c) in [(1, 8), (9, 7), (17, 320), (3, 1280)] {
            for dtype in TYPES {
                let (x, weight, bias) = (random(&[1, rows, c], dtype), random(&[c], dtype), random(&[c], dtype));
                let plain = layer_norm_plain(&wide(&x), &wide(&weight), &wide(&bias), 1e-5).unwrap();
                same(&super::super::run(LayerNorm { x, weight, bias, eps: 1e-5 }).unwrap(), &plain, &format!("{rows}x{c} {dtype:?}"));
            }
        }
    }
}
