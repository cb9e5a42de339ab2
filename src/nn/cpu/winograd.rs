//! Convolution 3x3 of [b, h, w, c] with a quarter of the multiplications: F(4x4, 3x3) of Winograd
//! 1980, by Lavin & Gray 2016 (arXiv 1509.09308).
//!
//! The image is cut into tiles of 4x4 output pixels. The 6x6 input pixels that a tile sees are
//! transformed to 36 positions (B' d B), the kernel to as many (G g G'), each position is a matrix
//! product over tiles and channels, and its sums are transformed to pixels (A' m A).
//!
//! Weights stay as [`super::panels`] packs them and are transformed in each call, a slab of input
//! channels at a time: for 128 tiles that is a tenth of the work, there is less to read than 36
//! numbers for each 9, and it takes no memory.
//!
//! Rounding: against sums in f64 of normal numbers, the root mean square of the error over that of
//! the values is 0.80e-6 for 128 input channels and 0.87e-6 for 1280, since a slab is summed by
//! itself (im2col and one long sum: 0.6e-6 and 1.9e-6). The usual points +-1 and +-2
//! would give more than twice as much; F(2x2, 3x3), which has more than twice the products, half.

use super::concat::uninit;
use super::conv::Images;
use super::gemm::{Output, ROWS, multiply, plus_some, with_memory};
use super::panels::{PANEL, Panels, WIDTH, vectors};
use super::vector::{Kernel, LANES, Lanes, Vector, dispatch};
use rayon::prelude::*;
use std::cell::Cell;
use std::ops::Range;

/// Output pixels along a side of a tile, and input pixels that they see.
const TILE: usize = 4;
const SEEN: usize = TILE + 2;
const POSITIONS: usize = SEEN * SEEN;

/// The points +-A and +-B at which polynomials are evaluated, besides 0 and infinity.
const A: f32 = 0.625;
const B: f32 = 1.5;

/// Tiles, input channels at once, and panels of one task. A transformed tile that is read serves all
/// panels, as the L3 cache would be too slow for one; weights and sums, 1.7 MiB, fit the L2 cache.
const TILES: usize = 128;
const DEPTH: usize = 64;
const PANELS: usize = 2;

/// The cost of transforming a kernel, in multiplications of the product: as measured, Winograd and
/// im2col take the same time for about 78 pixels.
const WEIGHT_TRANSFORM: usize = 400;

/// The operands of a convolution, and how it is cut into tasks.
struct Plan<'a> {
    images: Images<'a>,
    /// [panels, 3, 3, inputs, 32]
    weight: Panels<'a>,
    /// [outputs] or [b, outputs]
    bias: &'a [f32],
    /// [b, out_rows, w, outputs]
    residual: Option<&'a [f32]>,
    /// [outputs]
    slope: Option<&'a [f32]>,
    outputs: usize,
    /// the rows of the output that are computed
    out_rows: Range<usize>,
    /// tiles in a column and a row of one image, and in all images
    down: usize,
    across: usize,
    tiles: usize,
    /// tiles of one task
    rows: usize,
    /// vectors of input channels in a slab
    lanes: usize,
}

thread_local! {
    /// The output of [`TransformInput`], and the memory of [`Multiply`]: see [`with_memory`].
    static TRANSFORMED: Cell<Vec<Lanes>> = const { Cell::new(Vec::new()) };
    static SCRATCH: Cell<Vec<Lanes>> = const { Cell::new(Vec::new()) };
}

/// Whether this is faster than im2col, for a guided pair of images [h, w]. It is decided for a pair
/// whatever the batch, as the two differ in their last bits and an image must not depend on its
/// neighbours.
pub fn pays(h: usize, w: usize) -> bool {
    let rows = (2 * h.div_ceil(TILE) * w.div_ceil(TILE)).next_multiple_of(ROWS);
    rows * POSITIONS + WEIGHT_TRANSFORM < 2 * h * w * 9
}

/// Convolves images [b, h, w, inputs] with weight [panels, 3*3*inputs, 32] and bias [outputs] or [b,
/// outputs], adds residual [b, out_rows, w, outputs], applies the slope [outputs] of a leaky ReLU ->
/// `out_rows` of [b, h, w, outputs].
pub fn convolve(
    images: Images,
    out_rows: Range<usize>,
    outputs: usize,
    weight: Panels,
    bias: &[f32],
    residual: Option<&[f32]>,
    slope: Option<&[f32]>,
) -> Vec<f32> {
    let Images {
        b, w, c: inputs, ..
    } = images;
    let mut y = uninit(b * out_rows.len() * w * outputs);
    let output = Output(y.as_mut_ptr());
    let (down, across) = (out_rows.len().div_ceil(TILE), w.div_ceil(TILE));
    let tiles = b * down * across;
    let rows = tiles.div_ceil(tiles.div_ceil(TILES)).next_multiple_of(ROWS);
    let lanes = inputs.div_ceil(inputs.div_ceil(DEPTH)).div_ceil(LANES);
    let plan = Plan {
        images,
        weight,
        bias,
        residual,
        slope,
        outputs,
        out_rows,
        down,
        across,
        tiles,
        rows,
        lanes,
    };
    let (groups, slabs, panels) = (
        tiles.div_ceil(rows),
        inputs.div_ceil(lanes * LANES),
        outputs.div_ceil(WIDTH),
    );
    let slab = POSITIONS * rows * lanes;
    let (shares, at_once) = (
        panels.div_ceil(PANELS),
        rayon::current_num_threads().min(groups),
    );
    with_memory(&TRANSFORMED, at_once * slabs * slab, |transformed| {
        for first in (0..groups).step_by(at_once) {
            let count = at_once.min(groups - first);
            transformed
                .par_chunks_mut(slab)
                .take(count * slabs)
                .enumerate()
                .for_each(|(i, v)| {
                    dispatch(TransformInput {
                        plan: &plan,
                        tile: (first + i / slabs) * rows,
                        input: i % slabs * lanes * LANES,
                        v,
                    });
                });
            (0..count * shares).into_par_iter().for_each(|i| {
                let (group, panel) = (i / shares, i % shares * PANELS);
                let v = &transformed[group * slabs * slab..][..slabs * slab];
                with_memory(
                    &SCRATCH,
                    PANELS * POSITIONS * PANEL * (lanes * LANES + rows),
                    |scratch| {
                        let (u, m) =
                            scratch.split_at_mut(PANELS * POSITIONS * PANEL * lanes * LANES);
                        let panels = panel..(panel + PANELS).min(panels);
                        dispatch(Multiply {
                            plan: &plan,
                            tile: (first + group) * rows,
                            panels,
                            v,
                            u,
                            m,
                            y: &output,
                        });
                    },
                );
            });
        }
    });
    y
}

/// Transforms a slab of input channels of a group of tiles.
struct TransformInput<'a> {
    plan: &'a Plan<'a>,
    /// the first of the tiles, and of the channels
    tile: usize,
    input: usize,
    /// [rows/ROWS, 36, ROWS, lanes]
    v: &'a mut [Lanes],
}

impl Kernel for TransformInput<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Plan {
            images,
            tiles,
            rows,
            lanes,
            ..
        } = *self.plan;
        let inputs = images.c;
        let count = (lanes * LANES).min(inputs - self.input);
        for row in 0..rows.min(tiles - self.tile) {
            let (image, top, left) = self.plan.corner(self.tile + row);
            // pixel (out_rows.start + top - 1 + i, left - 1 + j) of the image, if there is one
            let mut pixels: [[&[f32]; SEEN]; SEEN] = [[&[]; SEEN]; SEEN];
            let columns: [Option<usize>; SEEN] =
                std::array::from_fn(|j| images.column(left + j, 1));
            for (i, line) in pixels.iter_mut().enumerate() {
                let Some(row) = images.row(self.plan.out_rows.start + top + i, 1) else {
                    continue;
                };
                for (pixel, column) in line.iter_mut().zip(columns) {
                    if let Some(column) = column {
                        *pixel = &images.pixel(image, row, column)[self.input..][..count];
                    }
                }
            }
            for lane in 0..count.div_ceil(LANES) {
                let mut d = [[V::splat(0.0); SEEN]; SEEN];
                for (d, pixels) in d.iter_mut().zip(&pixels) {
                    for (d, pixel) in d.iter_mut().zip(pixels) {
                        if !pixel.is_empty() {
                            *d = V::load_some(&pixel[lane * LANES..]);
                        }
                    }
                }
                let v = Inputs::square(d);
                let block = &mut self.v[row / ROWS * POSITIONS * ROWS * lanes..]
                    [..POSITIONS * ROWS * lanes];
                for (i, line) in v.iter().enumerate() {
                    for (j, v) in line.iter().enumerate() {
                        v.store(&mut block[((i * SEEN + j) * ROWS + row % ROWS) * lanes + lane].0);
                    }
                }
            }
        }
    }
}

/// Multiplies a group of tiles with the weights of some panels of output channels, and writes their
/// pixels.
struct Multiply<'a> {
    plan: &'a Plan<'a>,
    /// the first of the tiles
    tile: usize,
    panels: Range<usize>,
    /// [slabs, rows/ROWS, 36, ROWS, lanes]
    v: &'a [Lanes],
    /// [panels, 36, lanes*LANES, PANEL]
    u: &'a mut [Lanes],
    /// [panels, rows/ROWS, 36, ROWS, PANEL]
    m: &'a mut [Lanes],
    y: &'a Output,
}

impl Kernel for Multiply<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Plan {
            images: Images { c: inputs, .. },
            rows,
            lanes,
            ..
        } = *self.plan;
        let depth = lanes * LANES;
        let (weights, sums) = (POSITIONS * depth * PANEL, POSITIONS * rows * PANEL);
        for (slab, input) in self
            .v
            .chunks_exact(POSITIONS * rows * lanes)
            .zip((0..inputs).step_by(depth))
        {
            let count = depth.min(inputs - input);
            for (panel, u) in self.panels.clone().zip(self.u.chunks_exact_mut(weights)) {
                self.plan.transform_weights::<V>(input, count, panel, u);
            }
            for position in 0..POSITIONS {
                let v = |block: usize| {
                    slab.chunks_exact(ROWS * lanes)
                        .nth(block * POSITIONS + position)
                        .unwrap_or_default()
                };
                let each = self.panels.clone().zip(
                    self.u
                        .chunks_exact(weights)
                        .zip(self.m.chunks_exact_mut(sums)),
                );
                for (panel, (u, m)) in each {
                    let u = &u[position * depth * PANEL..][..count * PANEL];
                    for (block, m) in m.chunks_exact_mut(POSITIONS * ROWS * PANEL).enumerate() {
                        if panel == self.panels.start {
                            // from far, and in pieces too short for the processor to foresee
                            for lanes in v(block + 1) {
                                V::prefetch(lanes);
                            }
                        }
                        let m = &mut m[position * ROWS * PANEL..][..ROWS * PANEL];
                        multiply::<V>(
                            v(block),
                            lanes,
                            u,
                            vectors(self.plan.outputs, panel),
                            m,
                            input > 0,
                        );
                    }
                }
            }
        }
        for (panel, m) in self.panels.zip(self.m.chunks_exact(sums)) {
            self.plan.transform_output::<V>(self.tile, panel, m, self.y);
        }
    }
}

impl Plan<'_> {
    /// Transforms the kernel of `count` input channels from `input` on for a panel, into u [36,
    /// lanes*LANES, PANEL].
    #[inline(always)]
    fn transform_weights<V: Vector>(
        &self,
        input: usize,
        count: usize,
        panel: usize,
        u: &mut [Lanes],
    ) {
        let Plan {
            weight,
            images: Images { c: inputs, .. },
            lanes,
            ..
        } = *self;
        let plane = lanes * LANES * PANEL;
        let u = &mut u[..POSITIONS * plane];
        for k in 0..count {
            for lane in 0..vectors(self.outputs, panel) {
                let mut g = [[V::splat(0.0); 3]; 3];
                for (i, line) in g.iter_mut().enumerate() {
                    for (j, g) in line.iter_mut().enumerate() {
                        let tap = panel * 9 + i * 3 + j;
                        *g = weight.load((tap * inputs + input + k) * WIDTH + lane * LANES);
                    }
                }
                for (i, line) in Weights::square(g).iter().enumerate() {
                    for (j, sum) in line.iter().enumerate() {
                        sum.store(&mut u[(i * SEEN + j) * plane + k * PANEL + lane].0);
                    }
                }
            }
        }
    }

    /// Transforms the sums m [rows/ROWS, 36, ROWS, PANEL] of the tiles from `tile` on to pixels.
    #[inline(always)]
    fn transform_output<V: Vector>(&self, tile: usize, panel: usize, m: &[Lanes], y: &Output) {
        let Plan {
            images: Images { w, .. },
            bias,
            residual,
            slope,
            outputs,
            ref out_rows,
            tiles,
            rows,
            ..
        } = *self;
        for row in 0..rows.min(tiles - tile) {
            let (image, top, left) = self.corner(tile + row);
            let bias = if bias.len() == outputs {
                bias
            } else {
                &bias[image * outputs..][..outputs]
            };
            let block = &m[row / ROWS * POSITIONS * ROWS * PANEL..][..POSITIONS * ROWS * PANEL];
            for lane in 0..vectors(self.outputs, panel) {
                let first = panel * WIDTH + lane * LANES;
                let len = LANES.min(outputs - first);
                let bias = V::load_some(&bias[first..][..len]);
                let mut m = [[V::splat(0.0); SEEN]; SEEN];
                for (i, line) in m.iter_mut().enumerate() {
                    for (j, m) in line.iter_mut().enumerate() {
                        *m = V::load(&block[((i * SEEN + j) * ROWS + row % ROWS) * PANEL + lane].0);
                    }
                }
                for (i, line) in Outputs::square(m)
                    .iter()
                    .enumerate()
                    .take(out_rows.len() - top)
                {
                    for (j, sum) in line.iter().enumerate().take(w - left) {
                        let at =
                            ((image * out_rows.len() + top + i) * w + left + j) * outputs + first;
                        let mut sum = plus_some::<V>(sum.add(bias), residual, at, len);
                        if let Some(slope) = slope {
                            sum = sum.leaky(V::load_some(&slope[first..][..len]));
                        }
                        // SAFETY: y holds [b, out_rows, w, outputs], and no other task writes these
                        // channels of this tile
                        sum.store_some(unsafe { y.slice(at, len) });
                    }
                }
            }
        }
    }

    /// The image of a tile, and its top left pixel.
    fn corner(&self, tile: usize) -> (usize, usize, usize) {
        let (row, column) = (tile / self.across, tile % self.across);
        (row / self.down, row % self.down * TILE, column * TILE)
    }
}

/// One of the three transforms along a line, from I numbers to O.
trait Transform<const I: usize, const O: usize> {
    fn line<V: Vector>(x: [V; I]) -> [V; O];

    /// Along columns, then along rows.
    #[inline(always)]
    fn square<V: Vector>(x: [[V; I]; I]) -> [[V; O]; O] {
        let mut half = [[V::splat(0.0); I]; O];
        for j in 0..I {
            let mut column = [V::splat(0.0); I];
            for (to, row) in column.iter_mut().zip(&x) {
                *to = row[j];
            }
            for (row, from) in half.iter_mut().zip(&Self::line(column)) {
                row[j] = *from;
            }
        }
        let mut all = [[V::splat(0.0); O]; O];
        for (all, half) in all.iter_mut().zip(&half) {
            *all = Self::line(*half);
        }
        all
    }
}

/// B': a row is the polynomial whose roots are all other points; those of +-p differ in the sign of
/// their odd part.
struct Inputs;

impl Transform<SEEN, SEEN> for Inputs {
    #[inline(always)]
    fn line<V: Vector>([d0, d1, d2, d3, d4, d5]: [V; SEEN]) -> [V; SEEN] {
        let c = V::splat;
        let (even_a, odd_a) = (d4.plus(c(-B * B), d2), d3.plus(c(-B * B), d1));
        let (even_b, odd_b) = (d4.plus(c(-A * A), d2), d3.plus(c(-A * A), d1));
        let zero = d4.plus(c(-A * A - B * B), d2).plus(c(A * A * B * B), d0);
        let infinity = d5.plus(c(-A * A - B * B), d3).plus(c(A * A * B * B), d1);
        [
            zero,
            even_a.plus(c(A), odd_a),
            even_a.plus(c(-A), odd_a),
            even_b.plus(c(B), odd_b),
            even_b.plus(c(-B), odd_b),
            infinity,
        ]
    }
}

/// G: the kernel's value at each point, over the product of the point's distances to all others.
struct Weights;

impl Transform<3, SEEN> for Weights {
    #[inline(always)]
    fn line<V: Vector>([g0, g1, g2]: [V; 3]) -> [V; SEEN] {
        const OVER_A: f32 = 1.0 / (2.0 * A * A * (A * A - B * B));
        const OVER_B: f32 = 1.0 / (2.0 * B * B * (B * B - A * A));
        let c = V::splat;
        let nothing = c(0.0);
        let even_a = nothing.plus(c(OVER_A), g0).plus(c(OVER_A * A * A), g2);
        let even_b = nothing.plus(c(OVER_B), g0).plus(c(OVER_B * B * B), g2);
        let (odd_a, odd_b) = (
            nothing.plus(c(OVER_A * A), g1),
            nothing.plus(c(OVER_B * B), g1),
        );
        let zero = nothing.plus(c(1.0 / (A * A * B * B)), g0);
        [
            zero,
            even_a.add(odd_a),
            even_a.sub(odd_a),
            even_b.add(odd_b),
            even_b.sub(odd_b),
            g2,
        ]
    }
}

/// A': the coefficients of the product from its values at the points.
struct Outputs;

impl Transform<SEEN, TILE> for Outputs {
    #[inline(always)]
    fn line<V: Vector>([zero, a, minus_a, b, minus_b, infinity]: [V; SEEN]) -> [V; TILE] {
        let (c, nothing) = (V::splat, V::splat(0.0));
        let (even_a, odd_a, even_b, odd_b) = (
            a.add(minus_a),
            a.sub(minus_a),
            b.add(minus_b),
            b.sub(minus_b),
        );
        [
            zero.add(even_a).add(even_b),
            nothing.plus(c(A), odd_a).plus(c(B), odd_b),
            nothing.plus(c(A * A), even_a).plus(c(B * B), even_b),
            infinity.plus(c(A * A * A), odd_a).plus(c(B * B * B), odd_b),
        ]
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::{Conv2d, Pack, gemm::Epilogue};
    use super::*;
    use crate::nn::testing::normal;
    use candle_core::Tensor;

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn images(x: &[f32], (b, h, w, c): (usize, usize, usize, usize)) -> Images<'_> {
        Images {
            x,
            rows: h,
            columns: w,
            b,
            h,
            w,
            c,
            padding_modes: Default::default(),
        }
    }

    /// x, weight [outputs, inputs, 3, 3] and bias
    fn noise(b: usize, h: usize, w: usize, inputs: usize, outputs: usize) -> [Tensor; 3] {
        let noise = |shape: &[usize]| normal(0f32, 1.0, shape);
        [
            noise(&[b, h, w, inputs]),
            noise(&[outputs, inputs, 3, 3]),
            noise(&[outputs]),
        ]
    }

    fn convolved([x, weight, bias]: &[Tensor; 3]) -> Vec<f32> {
        let packed = values(&weight.apply_op1_no_bwd(&Pack { gated: false }).unwrap());
        convolve(
            images(&values(x), x.dims4().unwrap()),
            0..x.dim(1).unwrap(),
            weight.dim(0).unwrap(),
            Panels::F32(&packed),
            &values(bias),
            None,
            None,
        )
    }

    fn convolved_in_f64([x, weight, bias]: &[Tensor; 3]) -> Vec<f64> {
        let ((b, h, w, inputs), outputs) = (x.dims4().unwrap(), bias.dim(0).unwrap());
        let (x, weight, bias) = (values(x), values(weight), values(bias));
        let mut y = Vec::new();
        for pixel in 0..b * h * w {
            let (image, row, column) = (pixel / (h * w), pixel / w % h, pixel % w);
            for o in 0..outputs {
                let mut sum = f64::from(bias[o]);
                for (i, j) in (0..3).flat_map(|i| (0..3).map(move |j| (i, j))) {
                    if (1..=h).contains(&(row + i)) && (1..=w).contains(&(column + j)) {
                        let from = ((image * h + row + i - 1) * w + column + j - 1) * inputs;
                        let taps = weight[o * inputs * 9..].iter().skip(i * 3 + j).step_by(9);
                        sum += x[from..from + inputs]
                            .iter()
                            .zip(taps)
                            .map(|(x, g)| f64::from(*x) * f64::from(*g))
                            .sum::<f64>();
                    }
                }
                y.push(sum);
            }
        }
        y
    }

    #[test]
    fn winograd_equals_the_sum_it_stands_for_at_any_size() {
        let sizes = [
            (1, 1),
            (1, 7),
            (2, 3),
            (4, 4),
            (5, 9),
            (8, 17),
            (33, 31),
            (65, 67),
        ];
        let channels = [(1, 1), (5, 7), (16, 32), (35, 33), (130, 49), (300, 3)];
        for (n, ((h, w), (inputs, outputs))) in sizes
            .into_iter()
            .flat_map(|s| channels.map(|c| (s, c)))
            .enumerate()
        {
            // the largest images with few channels, for time
            if h * w * inputs * outputs > 3_000_000 {
                continue;
            }
            let case = noise(n % 3 + 1, h, w, inputs, outputs);
            let exact = convolved_in_f64(&case);
            // numbers near 1 may cancel to far less
            let largest = exact.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
            for (x, exact) in convolved(&case).into_iter().zip(exact) {
                // the error that the module states, with room for the unluckiest of so many
                let off = (f64::from(x) - exact).abs() / largest;
                assert!(off < 1e-5, "{h}x{w}, {inputs} to {outputs}: {off:e}");
            }
        }
    }

    #[test]
    fn the_error_stays_where_the_module_says() {
        for inputs in [128, 1280] {
            let case = noise(1, 16, 16, inputs, 16);
            let exact = convolved_in_f64(&case);
            let square = |x: f64| x * x;
            let power: f64 = exact.iter().map(|x| square(*x)).sum();
            let error: f64 = convolved(&case)
                .into_iter()
                .zip(exact)
                .map(|(x, exact)| square(f64::from(x) - exact))
                .sum();
            let off = (error / power).sqrt();
            println!("{inputs} channels: {off:.2e}");
            assert!(off < 2e-6, "{inputs} channels: {off:e}");
        }
    }

    /// `cargo test --release --lib winograd -- --ignored --nocapture`
    #[test]
    #[ignore = "a benchmark: best of five, in turns, in one process"]
    fn winograd_beside_im2col() {
        let unet = [
            (2, 64, 320, 320),
            (2, 64, 960, 320),
            (2, 32, 640, 640),
            (2, 32, 1920, 640),
            (2, 16, 1280, 1280),
            (2, 8, 1280, 1280),
        ];
        let vae = [
            (1, 512, 128, 128),
            (1, 256, 256, 256),
            (1, 128, 512, 512),
            (1, 64, 512, 512),
        ];
        let seconds = |work: &dyn Fn() -> Vec<f32>| {
            let start = std::time::Instant::now();
            std::hint::black_box(work());
            start.elapsed().as_secs_f64()
        };
        for (b, side, inputs, outputs) in unet.into_iter().chain(vae) {
            let [x, weight, bias] = noise(b, side, side, inputs, outputs);
            let weight = values(&weight.apply_op1_no_bwd(&Pack { gated: false }).unwrap());
            let (x, bias, shape) = (values(&x), values(&bias), (b, side, side, inputs));
            let op = Conv2d {
                size: 3,
                stride: 1,
                padding: (1, 1),
                padding_modes: Default::default(),
                rows: 0..side,
                scaled: None,
                residual: None,
                slope: None,
                tiles: None,
            };
            let (mut plain, mut winograd) = (f64::MAX, f64::MAX);
            for _ in 0..5 {
                plain = plain.min(seconds(&|| {
                    op.im2col(
                        images(&x, shape),
                        outputs,
                        Panels::F32(&weight),
                        Epilogue {
                            bias: Some(&bias),
                            ..Epilogue::default()
                        },
                    )
                }));
                winograd = winograd.min(seconds(&|| {
                    convolve(
                        images(&x, shape),
                        0..side,
                        outputs,
                        Panels::F32(&weight),
                        &bias,
                        None,
                        None,
                    )
                }));
            }
            println!(
                "{shape:?} to {outputs}: {:.1} ms, {:.1} ms, {:.2}",
                plain * 1e3,
                winograd * 1e3,
                winograd / plain
            );
        }
    }

    #[test]
    fn winograd_gives_the_same_bits_on_any_number_of_threads() {
        let case = noise(2, 33, 50, 140, 70);
        let on = |threads| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap()
                .install(|| convolved(&case))
        };
        assert!(on(1) == on(2) && on(1) == on(5));
    }
}
