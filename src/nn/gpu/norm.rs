//! Group normalisation, optionally with SiLU, and layer normalisation.

use super::{CHUNK, Launch, Params, Work, int, processors, suffix};
use candle_core::{DType, Result, Shape, Tensor};

const THREADS: usize = 256;
/// The most slices of an image, each with sums of its own.
const MAX_SLICES: usize = 64;

/// Sums over groups of channels of x [b, h, w, c], which may be a band of an image -> f32 [b,
/// slices, groups, 2]: of the differences from `origin`, and of their squares. The sums of bands are
/// concatenated along the second dimension.
pub struct GroupSums {
    pub x: Tensor,
    /// [b, .., c]: the first pixel of each image, the same for all bands
    pub origin: Tensor,
    pub groups: usize,
}

/// Group normalisation of x [b, h, w, c] (Wu & He 2018, arXiv 1803.08494) by the sums of whole
/// images, optionally followed by SiLU.
pub struct GroupApply {
    pub x: Tensor,
    pub origin: Tensor,
    pub sums: Tensor,
    pub weight: Tensor,
    pub bias: Tensor,
    /// pixels of a whole image
    pub pixels: usize,
    pub eps: f64,
    pub silu: bool,
}

/// As `struct GroupSums` of norm.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct GroupSumsParams {
    x: u64,
    origin: u64,
    sums: u64,
    pixels: i32,
    channels: i32,
    groups: i32,
    slices: i32,
    origin_stride: i32,
}

/// As `struct GroupApply` of norm.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct GroupApplyParams {
    x: u64,
    origin: u64,
    weight: u64,
    bias: u64,
    sums: u64,
    y: u64,
    pixels: i32,
    channels: i32,
    groups: i32,
    slices: i32,
    origin_stride: i32,
    all: i32,
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

/// The suffix of a kernel's name, and how many elements it moves at once.
fn kind(x: &Tensor, channels: usize, addresses: &[u64]) -> Result<(String, usize)> {
    let suffix = suffix(x.dtype())?;
    let chunk = CHUNK / x.dtype().size_in_bytes();
    let wide = channels.is_multiple_of(chunk) && addresses.iter().all(|at| at % CHUNK as u64 == 0);
    Ok(if wide {
        (format!("wide_{suffix}"), chunk)
    } else {
        (suffix.into(), 1)
    })
}

impl GroupSums {
    /// The number of slices: enough for all multiprocessors, and each of several rows.
    fn slices(&self) -> Result<usize> {
        let (b, h, w, _) = self.x.dims4()?;
        Ok((2 * processors(self.x.device()))
            .div_ceil(b)
            .min((h * w).div_ceil(16))
            .clamp(1, MAX_SLICES))
    }
}

impl Work for GroupSums {
    fn input(&self) -> &Tensor {
        &self.x
    }

    fn dtype(&self) -> DType {
        DType::F32
    }

    fn shape(&self) -> Result<Shape> {
        Ok((self.x.dim(0)?, self.slices()?, self.groups, 2).into())
    }

    fn launches(
        &self,
        address: &mut dyn FnMut(&Tensor) -> Result<u64>,
        output: u64,
        _scratch: u64,
    ) -> Result<Vec<Launch>> {
        let (b, h, w, channels) = self.x.dims4()?;
        let (x, slices) = (address(&self.x)?, self.slices()?);
        let (kind, at_once) = kind(&self.x, channels, &[x])?;
        let params = Params::new(&GroupSumsParams {
            x,
            origin: address(&self.origin)?,
            sums: output,
            pixels: int(h * w)?,
            channels: int(channels)?,
            groups: int(self.groups)?,
            slices: int(slices)?,
            origin_stride: int(self.origin.elem_count() / b)?,
        });
        let rows_at_once = (THREADS / (channels / at_once)).max(1);
        Ok(vec![Launch {
            kernel: format!("group_sums_{kind}"),
            grid: [slices, b],
            threads: THREADS,
            shared: rows_at_once * channels * 8,
            params,
        }])
    }
}

impl Work for GroupApply {
    fn input(&self) -> &Tensor {
        &self.x
    }

    fn launches(
        &self,
        address: &mut dyn FnMut(&Tensor) -> Result<u64>,
        output: u64,
        _scratch: u64,
    ) -> Result<Vec<Launch>> {
        let (b, h, w, channels) = self.x.dims4()?;
        let (_, slices, groups, _) = self.sums.dims4()?;
        let [x, weight, bias] = [
            address(&self.x)?,
            address(&self.weight)?,
            address(&self.bias)?,
        ];
        let (kind, at_once) = kind(&self.x, channels, &[x, weight, bias, output])?;
        let params = Params::new(&GroupApplyParams {
            x,
            origin: address(&self.origin)?,
            weight,
            bias,
            sums: address(&self.sums)?,
            y: output,
            pixels: int(h * w)?,
            channels: int(channels)?,
            groups: int(groups)?,
            slices: int(slices)?,
            origin_stride: int(self.origin.elem_count() / b)?,
            all: int(self.pixels)?,
            silu: self.silu.into(),
            eps: self.eps as f32,
        });
        let blocks = (h * w * channels / at_once)
            .div_ceil(4 * THREADS)
            .min((8 * processors(self.x.device())).div_ceil(b));
        let kernel = format!("group_apply_{kind}");
        Ok(vec![Launch {
            kernel,
            grid: [blocks.max(1), b],
            threads: THREADS,
            shared: channels * 8,
            params,
        }])
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

    fn launches(
        &self,
        address: &mut dyn FnMut(&Tensor) -> Result<u64>,
        output: u64,
        _scratch: u64,
    ) -> Result<Vec<Launch>> {
        let channels = self.weight.elem_count();
        let rows = self.x.elem_count() / channels;
        let [x, weight, bias] = [
            address(&self.x)?,
            address(&self.weight)?,
            address(&self.bias)?,
        ];
        let (kind, _) = kind(&self.x, channels, &[x, weight, bias, output])?;
        let params = LayerNormParams {
            x,
            weight,
            bias,
            y: output,
            rows: int(rows)?,
            channels: int(channels)?,
            eps: self.eps as f32,
        };
        let grid = [rows.div_ceil(THREADS / 32), 1];
        Ok(vec![Launch {
            kernel: format!("layer_norm_{kind}"),
            grid,
            threads: THREADS,
            shared: 0,
            params: Params::new(&params),
        }])
    }
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::emulated::{random, same, wide};
    use super::*;
    use crate::nn::plain;

    const TYPES: [DType; 3] = [DType::F16, DType::BF16, DType::F32];

    #[test]
    fn the_group_norm_kernel_equals_its_plain_composition() {
        for (b, h, w, c, groups, zero) in [
            (1, 1, 1, 8, 4, 0.0),
            (2, 5, 7, 40, 4, 0.0),
            (1, 16, 9, 35, 5, 0.0),
            (3, 8, 8, 1280, 32, 0.0),
            (1, 2, 3, 2560, 32, 0.0),
            (1, 9, 9, 64, 8, 20.0),
        ] {
            for (dtype, silu) in TYPES.into_iter().zip([true, false, true]) {
                let x = (random(&[b, h, w, c], DType::F32) + zero)
                    .unwrap()
                    .to_dtype(dtype)
                    .unwrap();
                let (weight, bias) = (random(&[c], dtype), random(&[c], dtype));
                let plain =
                    plain::group_norm(&wide(&x), &wide(&weight), &wide(&bias), groups, 1e-5)
                        .unwrap();
                let plain = if silu {
                    candle_nn::ops::silu(&plain).unwrap()
                } else {
                    plain
                };
                // whole, and in two parts
                for cut in [h, h.div_ceil(2)] {
                    let parts: Vec<Tensor> = [(0, cut), (cut, h - cut)]
                        .into_iter()
                        .filter(|(_, rows)| *rows > 0)
                        .map(|(from, rows)| x.narrow(1, from, rows).unwrap().contiguous().unwrap())
                        .collect();
                    let origin = if parts.len() == 1 {
                        x.clone()
                    } else {
                        x.narrow(1, 0, 1)
                            .unwrap()
                            .narrow(2, 0, 1)
                            .unwrap()
                            .force_contiguous()
                            .unwrap()
                    };
                    let sums = |x: &Tensor| {
                        super::super::run(GroupSums {
                            x: x.clone(),
                            origin: origin.clone(),
                            groups,
                        })
                        .unwrap()
                    };
                    let sums = Tensor::cat(&parts.iter().map(sums).collect::<Vec<_>>(), 1).unwrap();
                    let apply = |x: &Tensor| {
                        let (x, origin, sums, weight, bias) = (
                            x.clone(),
                            origin.clone(),
                            sums.clone(),
                            weight.clone(),
                            bias.clone(),
                        );
                        super::super::run(GroupApply {
                            x,
                            origin,
                            sums,
                            weight,
                            bias,
                            pixels: h * w,
                            eps: 1e-5,
                            silu,
                        })
                        .unwrap()
                    };
                    let y = Tensor::cat(&parts.iter().map(apply).collect::<Vec<_>>(), 1).unwrap();
                    same(
                        &y,
                        &plain,
                        &format!("{b}x{h}x{w}, {c} in {groups} {dtype:?}"),
                    );
                }
            }
        }
    }

    #[test]
    fn the_layer_norm_kernel_equals_its_plain_composition() {
        for (rows, c) in [(1, 8), (9, 7), (17, 320), (3, 1280)] {
            for dtype in TYPES {
                let (x, weight, bias) = (
                    random(&[1, rows, c], dtype),
                    random(&[c], dtype),
                    random(&[c], dtype),
                );
                let plain =
                    plain::layer_norm(&wide(&x), &wide(&weight), &wide(&bias), 1e-5).unwrap();
                same(
                    &super::super::run(LayerNorm {
                        x,
                        weight,
                        bias,
                        eps: 1e-5,
                    })
                    .unwrap(),
                    &plain,
                    &format!("{rows}x{c} {dtype:?}"),
                );
            }
        }
    }
}
