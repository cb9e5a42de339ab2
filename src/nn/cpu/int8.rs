//! Products of 8-bit integers: weights with one scale for each row, activations with one for each row
//! that is found when they are multiplied (LLM.int8()'s vector-wise scheme, Dettmers et al. 2022,
//! arXiv 2208.07339, without its outliers).
//!
//! Sums are exact in 32 bits for up to 66,000 terms, whatever makes them; processors with VNNI multiply
//! four times as many in a cycle as f32. Its instructions take one side without a sign: activations
//! are stored plus 128, and 128 times a column's weights are taken from its sums.

use super::concat::uninit;
use super::gemm::{Epilogue, Output, ROWS, slice, with_memory, with_slice};
use super::instructions::{Vectors, vectors};
use super::panels::{PANEL, Pack, WIDTH};
use super::vector::{Kernel, LANES, Lanes, Vector, dispatch};
use crate::nn::blocks::BlockMatrix;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::cell::Cell;
use std::sync::Arc;

/// Terms that are summed at once for each column.
const QUAD: usize = 4;

/// Terms between two visits of a row's sums: 24 KiB of weights in the nearest cache.
const DEPTH: usize = 768;

/// Rows of one task: 0.8 MB of activations with 3,072 terms in the second cache.
const BLOCK: usize = 256;

/// Tasks to have at least, so that no thread waits long for the last.
const TASKS: usize = 8;

/// The largest magnitude of a number.
const MOST: f32 = 127.0;

/// 1.5 * 2^23: adding it rounds to a whole number.
const ROUND: f32 = 12_582_912.0;

/// What makes activations numbers without a sign.
const OFFSET: i32 = 128;

/// Terms of which a sum cannot overflow.
const MOST_TERMS: usize = i32::MAX as usize / (255 * 127);

thread_local! {
    static SCRATCH: Cell<Vec<Lanes>> = const { Cell::new(Vec::new()) };
}

/// Weights [n, k] as 8-bit integers in panels of 32 columns.
pub struct Int8Matrix {
    /// [panels, k/4, 32, 4], zeros where there is no weight
    weights: Vec<i8>,
    /// [panels, 32]: of each column
    scales: Vec<f32>,
    /// [panels, 32]: 128 times the sum of each column
    offsets: Vec<i32>,
    outputs: usize,
    inputs: usize,
    gated: bool,
}

impl Int8Matrix {
    /// Whether a matrix of so many columns can be one.
    pub fn takes(inputs: usize) -> bool {
        inputs > 0 && inputs <= MOST_TERMS
    }

    /// Rounds weights [out, in] to 8 bits; gated ones as [`Pack`] lays them out.
    pub fn of(weight: &Tensor, gated: bool) -> Result<Self> {
        let (outputs, inputs) = weight.dims2()?;
        let numbers = weight.to_dtype(candle_core::DType::F32)?.contiguous()?;
        with_slice(Some(&numbers), |numbers| {
            let numbers = numbers.unwrap_or_default();
            let row = |output: usize, to: &mut [f32]| {
                to.copy_from_slice(&numbers[output * inputs..][..inputs]);
            };
            Self::new((outputs, inputs), gated, row)
        })
    }

    /// The same of weights in blocks.
    pub fn of_blocks(matrix: &BlockMatrix, gated: bool) -> Self {
        let row = |output: usize, to: &mut [f32]| matrix.write(output, 0, to);
        Self::new(matrix.dims(), gated, row)
    }

    fn new(
        (outputs, inputs): (usize, usize),
        gated: bool,
        row: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        let pack = Pack { gated };
        let panels = pack.panels(outputs);
        let (quads, columns) = (inputs.div_ceil(QUAD), panels * WIDTH);
        let mut weights = vec![0i8; columns * quads * QUAD];
        let (mut scales, mut offsets) = (vec![0f32; columns], vec![0i32; columns]);
        weights
            .par_chunks_mut(WIDTH * quads * QUAD)
            .zip(scales.par_chunks_mut(WIDTH))
            .zip(offsets.par_chunks_mut(WIDTH))
            .enumerate()
            .for_each(|(panel, ((weights, scales), offsets))| {
                let mut numbers = vec![0f32; inputs];
                for column in 0..WIDTH {
                    let Some(output) = pack.output(panel, column, outputs) else {
                        continue;
                    };
                    row(output, &mut numbers);
                    let scale = scale_of(&numbers);
                    scales[column] = scale;
                    let inverse = 1.0 / scale;
                    for (i, number) in numbers.iter().enumerate() {
                        // what is not finite is 0 here, and its scale is not finite
                        let rounded = (number * inverse + ROUND - ROUND) as i8;
                        weights[(i / QUAD * WIDTH + column) * QUAD + i % QUAD] = rounded;
                        offsets[column] += OFFSET * i32::from(rounded);
                    }
                }
            });
        Self {
            weights,
            scales,
            offsets,
            outputs,
            inputs,
            gated,
        }
    }
}

/// What a row's numbers are multiples of: the largest is 127 times that. A row of zeros has 1, one with
/// a number that is not finite NaN.
fn scale_of(row: &[f32]) -> f32 {
    let most = row.iter().fold(0f32, |most, x| most.max(x.abs()));
    let unreal: f32 = row.iter().map(|x| x * 0.0).sum();
    match most {
        0.0 => 1.0 + unreal,
        _ => most / MOST + unreal,
    }
}

/// x [m, k] times weights of 8 bits, plus bias and residual, perhaps gated.
pub struct Int8Gemm {
    pub weight: Arc<Int8Matrix>,
    /// `[outputs]`
    pub bias: Option<Tensor>,
    /// [m, outputs]
    pub residual: Option<Tensor>,
}

impl CustomOp1 for Int8Gemm {
    fn name(&self) -> &'static str {
        "int8-gemm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (m, k) = layout.shape().dims2()?;
        let (n, gated) = (self.weight.outputs, self.weight.gated);
        let count = |tensor: Option<&Tensor>| tensor.map(Tensor::elem_count);
        if k != self.weight.inputs
            || count(self.bias.as_ref()).is_some_and(|count| count != n)
            || count(self.residual.as_ref()).is_some_and(|count| count != m * n || gated)
        {
            bail!("product of {:?} and {n} columns of 8 bits", layout.shape());
        }
        let x = slice(x, layout)?;
        let y = with_slice(self.bias.as_ref(), |bias| {
            with_slice(self.residual.as_ref(), |residual| {
                let epilogue = Epilogue {
                    bias,
                    residual,
                    slope: None,
                    gated,
                };
                product(x, m, &self.weight, epilogue, Unit::fastest())
            })
        })??;
        Ok((
            CpuStorage::F32(y),
            Shape::from((m, if gated { n / 2 } else { n })),
        ))
    }
}

/// Multiplies x [m, k] by weights of n columns -> [m, n].
fn product(x: &[f32], m: usize, weight: &Int8Matrix, epilogue: Epilogue, unit: Unit) -> Vec<f32> {
    let (n, k) = (weight.outputs, weight.inputs);
    let mut y = uninit(if weight.gated { m * n / 2 } else { m * n });
    if y.is_empty() {
        return y;
    }
    let output = Output(y.as_mut_ptr());
    let stride = k.next_multiple_of(QUAD);
    // rows that are not there are multiplied too
    let height = m.next_multiple_of(ROWS);
    let mut rows = vec![OFFSET as u8; height * stride];
    let mut scales = vec![0f32; height];
    rows.par_chunks_mut(stride)
        .zip(scales.par_iter_mut())
        .zip(x.par_chunks(k))
        .for_each(|((to, scale), x)| dispatch(Quantize { x, to, scale }));
    let panels = weight.scales.len() / WIDTH;
    let threads = rayon::current_num_threads();
    let shares = if n <= 2 * m { threads.min(m / 32) } else { 1 };
    let blocks = m.div_ceil(BLOCK).max(shares);
    let tasks = if shares > 1 { threads } else { TASKS };
    let group = panels.div_ceil(tasks.div_ceil(blocks));
    let block = m.div_ceil(blocks).next_multiple_of(ROWS);
    let groups = panels.div_ceil(group);
    (0..blocks * groups).into_par_iter().for_each(|task| {
        let (first, panel) = (task / groups * block, task % groups * group);
        if first < m {
            let last = height.min(first + block);
            with_memory(&SCRATCH, (last - first) * PANEL, |sums| {
                for panel in panel..panels.min(panel + group) {
                    let quads = stride / QUAD;
                    let weights = &weight.weights[panel * WIDTH * stride..][..WIDTH * stride];
                    for start in (0..quads).step_by(DEPTH / QUAD) {
                        let depth = (DEPTH / QUAD).min(quads - start);
                        let weights = &weights[start * WIDTH * QUAD..][..depth * WIDTH * QUAD];
                        for (i, sums) in sums.chunks_exact_mut(ROWS * PANEL).enumerate() {
                            let at = (first + i * ROWS) * stride + start * QUAD;
                            unit.multiply(&rows[at..], stride, weights, sums, start > 0);
                        }
                    }
                    dispatch(Finish {
                        weight,
                        panel,
                        scales: &scales[first..m.min(last)],
                        sums,
                        first,
                        m,
                        epilogue,
                        y: &output,
                    });
                }
            });
        }
    });
    y
}

/// Rounds a row of activations to 8 bits, plus 128, and finds its scale.
struct Quantize<'a> {
    x: &'a [f32],
    to: &'a mut [u8],
    scale: &'a mut f32,
}

impl Kernel for Quantize<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { x, to, scale } = self;
        let zero = V::splat(0.0);
        let (mut most, mut unreal) = (zero, zero);
        for x in x.chunks(LANES) {
            let x = V::load_some(x);
            most = most.max(x).max(zero.sub(x));
            unreal = unreal.plus(x, zero);
        }
        let (mut all, mut sum) = ([0f32; LANES], [0f32; LANES]);
        most.store(&mut all);
        unreal.store(&mut sum);
        let (mut most, mut unreal) = (0f32, 0f32);
        for i in 0..LANES {
            most = if all[i] > most { all[i] } else { most };
            unreal += sum[i];
        }
        // NaN where a number is not finite, so that the result is not either
        *scale = most / MOST + unreal;
        let inverse = V::splat(if most > 0.0 { MOST / most } else { 0.0 });
        // a whole number then stands in the low bits
        let round = V::splat(ROUND);
        let mut rounded = [0f32; LANES];
        for (x, to) in x.chunks(LANES).zip(to.chunks_mut(LANES)) {
            round.plus(V::load_some(x), inverse).store(&mut rounded);
            for (to, rounded) in to.iter_mut().zip(&rounded) {
                *to = rounded.to_bits() as u8 ^ OFFSET as u8;
            }
        }
    }
}

/// Writes the results of a panel's columns.
struct Finish<'a> {
    weight: &'a Int8Matrix,
    panel: usize,
    /// of each row
    scales: &'a [f32],
    /// [rows, PANEL]: sums of integers, as their bits
    sums: &'a mut [Lanes],
    /// the first of the rows, of m
    first: usize,
    m: usize,
    epilogue: Epilogue<'a>,
    y: &'a Output,
}

impl Kernel for Finish<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self {
            weight,
            panel,
            scales,
            sums,
            first,
            m,
            epilogue,
            y,
        } = self;
        let offsets = &weight.offsets[panel * WIDTH..][..WIDTH];
        let columns = &weight.scales[panel * WIDTH..][..WIDTH];
        for (i, (scale, sums)) in scales.iter().zip(sums.chunks_exact_mut(PANEL)).enumerate() {
            for (lane, sums) in sums.iter_mut().enumerate() {
                for (j, sum) in sums.0.iter_mut().enumerate() {
                    let column = lane * LANES + j;
                    let whole = sum.to_bits() as i32 - offsets[column];
                    *sum = whole as f32 * (scale * columns[column]);
                }
            }
            epilogue.write::<V>(first + i, panel, (m, weight.outputs), sums, y);
        }
    }
}

/// What multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// `vpdpbusd` of 512 bits
    Avx512Vnni,
    /// `vpdpbusd` of 256 bits
    AvxVnni,
    Portable,
}

impl Unit {
    /// Those that this processor has.
    #[cfg(test)]
    fn all() -> impl Iterator<Item = Self> {
        [Self::Avx512Vnni, Self::AvxVnni, Self::Portable]
            .into_iter()
            .filter(|unit| unit.is_there())
    }

    /// The fastest among the instructions that were chosen.
    fn fastest() -> Self {
        let chosen: &[Self] = match vectors() {
            Vectors::Avx512 => &[Self::Avx512Vnni, Self::AvxVnni],
            Vectors::Avx2 => &[Self::AvxVnni],
            Vectors::Portable => &[],
        };
        let mut there = chosen.iter().filter(|unit| unit.is_there());
        there.next().copied().unwrap_or(Self::Portable)
    }

    #[cfg(target_arch = "x86_64")]
    fn is_there(self) -> bool {
        match self {
            Self::Avx512Vnni => {
                is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni")
            }
            Self::AvxVnni => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("avxvnni")
            }
            Self::Portable => true,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_there(self) -> bool {
        self == Self::Portable
    }

    /// Sums [ROWS, PANEL] of integers (+)= ROWS rows of x, `stride` apart, times weights [quads, 32, 4].
    fn multiply(self, x: &[u8], stride: usize, weights: &[i8], sums: &mut [Lanes], add: bool) {
        let quads = weights.len() / (WIDTH * QUAD);
        assert!(
            x.len() >= (ROWS - 1) * stride + quads * QUAD
                && sums.len() == ROWS * PANEL
                && weights.len() == quads * WIDTH * QUAD
        );
        #[cfg(target_arch = "x86_64")]
        match self {
            // SAFETY: the instructions are there, as `is_there` has it, and the sides are as long as
            // they must be
            Self::Avx512Vnni => unsafe { return x86::wide(x, stride, weights, sums, add) },
            // SAFETY: as above
            Self::AvxVnni => unsafe { return x86::narrow(x, stride, weights, sums, add) },
            Self::Portable => {}
        }
        for (row, sums) in sums.chunks_exact_mut(PANEL).enumerate() {
            let mut all = [0i32; WIDTH];
            if add {
                for (all, sum) in all.iter_mut().zip(sums.iter().flat_map(|sums| &sums.0)) {
                    *all = sum.to_bits() as i32;
                }
            }
            let x = x[row * stride..].as_chunks::<QUAD>().0;
            for (weights, x) in weights.chunks_exact(WIDTH * QUAD).zip(x) {
                for (sum, weights) in all.iter_mut().zip(weights.as_chunks::<QUAD>().0) {
                    for (weight, x) in weights.iter().zip(x) {
                        *sum += i32::from(*weight) * i32::from(*x);
                    }
                }
            }
            for (sum, all) in sums.iter_mut().flat_map(|sums| &mut sums.0).zip(all) {
                *sum = f32::from_bits(all as u32);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(
    clippy::needless_range_loop,
    reason = "constant bounds, see `gemm::tiles`"
)]
mod x86 {
    use super::{Lanes, PANEL, QUAD, ROWS, WIDTH};
    use std::arch::x86_64::*;

    /// See [`super::Unit::multiply`].
    ///
    /// # Safety
    /// The instructions must be there, and the sides as long as that asserts.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub unsafe fn wide(x: &[u8], stride: usize, weights: &[i8], sums: &mut [Lanes], add: bool) {
        let (x, to) = (x.as_ptr(), sums.as_mut_ptr());
        let mut all = [[_mm512_setzero_si512(); PANEL]; ROWS];
        // SAFETY: the caller's promise: all reads and writes are inside of the slices
        unsafe {
            if add {
                for row in 0..ROWS {
                    for column in 0..PANEL {
                        all[row][column] = _mm512_loadu_si512(to.add(row * PANEL + column).cast());
                    }
                }
            }
            for quad in 0..weights.len() / (WIDTH * QUAD) {
                let right = weights.as_ptr().add(quad * WIDTH * QUAD);
                let mut columns = [_mm512_setzero_si512(); PANEL];
                for column in 0..PANEL {
                    columns[column] = _mm512_loadu_si512(right.add(column * 64).cast());
                }
                for row in 0..ROWS {
                    let left = x.add(row * stride + quad * QUAD).cast::<i32>();
                    let left = _mm512_set1_epi32(left.read_unaligned());
                    for column in 0..PANEL {
                        all[row][column] =
                            _mm512_dpbusd_epi32(all[row][column], left, columns[column]);
                    }
                }
            }
            for row in 0..ROWS {
                for column in 0..PANEL {
                    _mm512_storeu_si512(to.add(row * PANEL + column).cast(), all[row][column]);
                }
            }
        }
    }

    /// Rows whose sums fit into 16 registers beside a row and the weights.
    const FEW: usize = 2;
    /// Registers of a row's sums.
    const PARTS: usize = WIDTH / 8;

    /// The same of 256 bits.
    ///
    /// # Safety
    /// As above.
    #[target_feature(enable = "avx2,avxvnni")]
    pub unsafe fn narrow(x: &[u8], stride: usize, weights: &[i8], sums: &mut [Lanes], add: bool) {
        for first in (0..ROWS).step_by(FEW) {
            let (x, to) = (x.as_ptr(), sums.as_mut_ptr().cast::<__m256i>());
            let mut all = [[_mm256_setzero_si256(); PARTS]; FEW];
            // SAFETY: the caller's promise: all reads and writes are inside of the slices
            unsafe {
                let to = to.add(first * PARTS);
                if add {
                    for row in 0..FEW {
                        for part in 0..PARTS {
                            all[row][part] = _mm256_loadu_si256(to.add(row * PARTS + part));
                        }
                    }
                }
                for quad in 0..weights.len() / (WIDTH * QUAD) {
                    let right = weights.as_ptr().add(quad * WIDTH * QUAD).cast::<__m256i>();
                    let mut left = [_mm256_setzero_si256(); FEW];
                    for row in 0..FEW {
                        let from = x.add((first + row) * stride + quad * QUAD).cast::<i32>();
                        left[row] = _mm256_set1_epi32(from.read_unaligned());
                    }
                    for part in 0..PARTS {
                        let columns = _mm256_loadu_si256(right.add(part));
                        for row in 0..FEW {
                            all[row][part] =
                                _mm256_dpbusd_avx_epi32(all[row][part], left[row], columns);
                        }
                    }
                }
                for row in 0..FEW {
                    for part in 0..PARTS {
                        _mm256_storeu_si256(to.add(row * PARTS + part), all[row][part]);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::nn::testing::normal;
    use candle_core::Device;

    fn multiplied(x: &Tensor, weight: &Int8Matrix, epilogue: Epilogue, unit: Unit) -> Vec<f32> {
        let m = x.dim(0).unwrap();
        let x: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
        product(&x, m, weight, epilogue, unit)
    }

    #[test]
    fn products_of_every_unit_are_those_of_the_numbers() {
        for (m, k, n, gated) in [
            (1, 5, 3, false),
            (9, 64, 33, false),
            (70, 1601, 130, false),
            (300, 100, 64, true),
            (17, 770, 20, true),
        ] {
            // whole numbers of which the largest is 127, so that none is rounded
            let whole = |(rows, len): (usize, usize), unit: f32| {
                let mut all: Vec<f32> = normal(0f32, 40.0, rows * len).to_vec1().unwrap();
                for (i, x) in all.iter_mut().enumerate() {
                    let least = if i % len == 0 { MOST } else { -MOST };
                    *x = x.round().clamp(least, MOST) * unit;
                }
                Tensor::from_vec(all, (rows, len), &Device::Cpu).unwrap()
            };
            let (x, weight) = (whole((m, k), 0.25), whole((n, k), 1.0 / 1024.0));
            let [bias, residual] = [n, m * n].map(|len| {
                let all: Vec<f32> = normal(0f32, 0.5, len).to_vec1().unwrap();
                all
            });
            let matrix = Int8Matrix::of(&weight, gated).unwrap();
            let epilogue = Epilogue {
                bias: Some(&bias),
                residual: Some(&residual).filter(|_| !gated).map(|all| &all[..]),
                slope: None,
                gated,
            };
            let rows: Vec<Vec<f32>> = x.to_vec2().unwrap();
            let columns: Vec<Vec<f32>> = weight.to_vec2().unwrap();
            let sum = |row: usize, column: usize| {
                let terms = rows[row].iter().zip(&columns[column]);
                let sum: f64 = terms.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                sum + f64::from(bias[column])
            };
            let mut first = None;
            for unit in Unit::all() {
                let y = multiplied(&x, &matrix, epilogue, unit);
                let width = if gated { n / 2 } else { n };
                for (i, y) in y.iter().enumerate() {
                    let (row, column) = (i / width, i % width);
                    let expected = if gated {
                        let gate = sum(row, width + column) as f32;
                        let mut of_gate = Tensor::new(&[gate], &Device::Cpu).unwrap();
                        of_gate = of_gate.gelu_erf().unwrap();
                        sum(row, column) * f64::from(of_gate.to_vec1::<f32>().unwrap()[0])
                    } else {
                        sum(row, column) + f64::from(residual[i])
                    };
                    let off = (f64::from(*y) - expected).abs();
                    assert!(
                        off < 1e-4 * (1.0 + expected.abs()),
                        "{unit:?} {m} {k} {n}: {y} {expected}"
                    );
                }
                // integers are exact
                assert_eq!(first.get_or_insert_with(|| y.clone()), &y, "{unit:?}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_so_and_rows_of_zeros_are_zeros() {
        let weight = normal(0f32, 1.0, (40, 50));
        let matrix = Int8Matrix::of(&weight, false).unwrap();
        let mut x = vec![1f32; 3 * 50];
        x[..50].fill(0.0);
        x[70] = f32::NAN;
        x[120] = f32::INFINITY;
        let x = Tensor::from_vec(x, (3, 50), &Device::Cpu).unwrap();
        let y = multiplied(&x, &matrix, Epilogue::default(), Unit::fastest());
        assert!(y[..40].iter().all(|y| *y == 0.0));
        assert!(y[40..].iter().all(|y| !y.is_finite()));
        let weight = (weight * f64::INFINITY).unwrap();
        let matrix = Int8Matrix::of(&weight, false).unwrap();
        let y = multiplied(&x, &matrix, Epilogue::default(), Unit::fastest());
        assert!(y.iter().all(|y| !y.is_finite()));
    }

    #[test]
    fn products_of_8_bits_are_the_same_bits_on_any_number_of_threads() {
        let [x, weight] = [(600, 100), (360, 100)].map(|shape| normal(0f32, 1.0, shape));
        let matrix = Int8Matrix::of(&weight, false).unwrap();
        let on = |threads| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap()
                .install(|| multiplied(&x, &matrix, Epilogue::default(), Unit::fastest()))
        };
        assert!(on(1) == on(3));
    }
}
