//! Encoding and decoding in overlapping tiles, for images that are too large to be processed whole:
//! diffusers' `AutoencoderKL.tiled_encode` and `tiled_decode`. Norms and attention see one tile, so
//! the result differs slightly.

use crate::nn::Forward;
use candle_core::{Result, Tensor};

/// Tiles overlap by their side divided by this.
const OVERLAP: usize = 4;

/// Applies `f` to x [b, h, w, c] in tiles of this `side` and blends what comes out: about `f` of
/// the whole x, [b, r*h, r*w, d] for some ratio r. Along axes that are padded circularly the tiles
/// overlap across the edge; `f` itself is padded with zeros, as the opposite edge of a tile is not
/// the image's.
pub fn apply(
    cx: Forward,
    x: &Tensor,
    side: usize,
    f: impl Fn(Forward, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut longer = x.clone();
    for (dim, mode) in [1, 2].into_iter().zip(cx.padding) {
        if mode.is_circular() {
            let start = longer.narrow(dim, 0, (side / OVERLAP).min(longer.dim(dim)?))?;
            longer = Tensor::cat(&[&longer, &start], dim)?;
        }
    }
    let zeros = cx.padded(Default::default());
    let mut y = each(&longer, side, |tile| f(zeros, tile))?;
    for dim in [1, 2] {
        let (length, longer, made) = (x.dim(dim)?, longer.dim(dim)?, y.dim(dim)?);
        let scaled = |n: usize| n * made / longer;
        // the start is blended with what follows the end
        y = blend(
            &y,
            &y.narrow(dim, 0, scaled(length))?,
            dim,
            scaled(longer - length),
        )?;
    }
    y.contiguous()
}

fn each(x: &Tensor, side: usize, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    let step = (side - side / OVERLAP).max(1);
    let (mut rows, mut above) = (vec![], vec![]);
    for top in (0..h).step_by(step) {
        let (mut row, mut cut): (Vec<Tensor>, Vec<Tensor>) = (vec![], vec![]);
        for (i, left) in (0..w).step_by(step).enumerate() {
            let (rows, columns) = (side.min(h - top), side.min(w - left));
            let mut y = f(&x
                .narrow(1, top, rows)?
                .narrow(2, left, columns)?
                .contiguous()?)?;
            let made = y.dim(1)?;
            let scaled = |n: usize| n * made / rows;
            let overlap = scaled(side.saturating_sub(step));
            if let Some(above) = above.get(i) {
                y = blend(above, &y, 1, overlap)?;
            }
            if let Some(left) = row.last() {
                y = blend(left, &y, 2, overlap)?;
            }
            cut.push(y.narrow(1, 0, scaled(step.min(rows)))?.narrow(
                2,
                0,
                scaled(step.min(columns)),
            )?);
            row.push(y);
        }
        rows.push(Tensor::cat(&cut, 2)?);
        above = row;
    }
    Tensor::cat(&rows, 1)?.contiguous()
}

/// Blends the first `overlap` rows (`dim` 1) or columns (2) of `tile` with the last ones of the tile
/// `before` it, with linear weights.
fn blend(before: &Tensor, tile: &Tensor, dim: usize, overlap: usize) -> Result<Tensor> {
    let (ends, length) = (before.dim(dim)?, tile.dim(dim)?);
    let overlap = overlap.min(ends).min(length);
    if overlap == 0 {
        return Ok(tile.clone());
    }
    let mut shape = [1; 4];
    shape[dim] = overlap;
    let weight = Tensor::arange(0f32, overlap as f32, tile.device())?
        .affine(1.0 / overlap as f64, 0.0)?
        .reshape(&shape)?;
    let (old, new) = (
        before.narrow(dim, ends - overlap, overlap)?,
        tile.narrow(dim, 0, overlap)?,
    );
    let mixed = (&old + (new - &old)?.broadcast_mul(&weight)?)?;
    Tensor::cat(&[mixed, tile.narrow(dim, overlap, length - overlap)?], dim)
}
