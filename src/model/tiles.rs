//! Decoding in overlapping tiles, for pictures that are too large to be decoded whole: diffusers'
//! `AutoencoderKL.tiled_decode`. Norms and attention see one tile, so the picture is a slightly other one.

use candle_core::{Result, Tensor};

/// Tiles overlap by one part in this many.
const OVERLAP: usize = 4;

/// Decodes latents [b, h, w, c] in tiles of `side` latents to what `decode` makes of them whole, [b, f*h, f*w, 3] about.
pub fn decode(latents: &Tensor, side: usize, decode: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (_, h, w, _) = latents.dims4()?;
    let step = (side - side / OVERLAP).max(1);
    let (mut rows, mut above) = (vec![], vec![]);
    for top in (0..h).step_by(step) {
        let (mut row, mut cut): (Vec<Tensor>, Vec<Tensor>) = (vec![], vec![]);
        for (i, left) in (0..w).step_by(step).enumerate() {
            let (rows, columns) = (side.min(h - top), side.min(w - left));
            let mut rgb = decode(&latents.narrow(1, top, rows)?.narrow(2, left, columns)?.contiguous()?)?;
            let factor = rgb.dim(1)? / rows;
            let overlap = factor * side.saturating_sub(step);
            if let Some(above) = above.get(i) {
                rgb = blend(above, &rgb, 1, overlap)?;
            }
            if let Some(left) = row.last() {
                rgb = blend(left, &rgb, 2, overlap)?;
            }
            cut.push(rgb.narrow(1, 0, factor * step.min(rows))?.narrow(2, 0, factor * step.min(columns))?);
            row.push(rgb);
        }
        rows.push(Tensor::cat(&cut, 2)?);
        above = row;
    }
    Tensor::cat(&rows, 1)?.contiguous()
}

/// `tile`, whose first `overlap` rows (`dim` 1) or columns (2) come gradually from the end of the one `before` it.
fn blend(before: &Tensor, tile: &Tensor, dim: usize, overlap: usize) -> Result<Tensor> {
    let (ends, length) = (before.dim(dim)?, tile.dim(dim)?);
    let overlap = overlap.min(ends).min(length);
    if overlap == 0 {
        return Ok(tile.clone());
    }
    let mut shape = [1; 4];
    shape[dim] = overlap;
    let share = Tensor::arange(0f32, overlap as f32, tile.device())?.affine(1.0 / overlap as f64, 0.0)?.reshape(&shape)?;
    let (old, new) = (before.narrow(dim, ends - overlap, overlap)?, tile.narrow(dim, 0, overlap)?);
    let mixed = (&old + (new - &old)?.broadcast_mul(&share)?)?;
    Tensor::cat(&[mixed, tile.narrow(dim, overlap, length - overlap)?], dim)
}
