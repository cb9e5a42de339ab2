//! A contact sheet: many pictures in one, in labelled rows and columns.
//!
//! Hides the layout and the drawing of text. What the labels say is the caller's choice; the sheet
//! is a [`Image`] like any other.

use std::collections::HashMap;
use std::path::Path;

use ab_glyph::{Font, FontRef, ScaleFont, point};
use anyhow::{Result, bail};
use epaint_default_fonts::{NOTO_EMOJI_REGULAR, UBUNTU_LIGHT};
use serde_json::json;

use crate::batch::jobs::JobList;
use crate::batch::output_path;
use crate::batch::resume::CONTACT_SHEET;
use crate::batch::work_list::Task;
use crate::batch::writer::WriteOptions;
use crate::image::{Format, Image, MAX_SIDE_PX, Metadata};

/// 256 megapixels, 768 MiB of RGB.
const MAX_AREA_PX: usize = 256 << 20;
/// A single row with more columns than this goes on below.
const MAX_COLUMNS_OF_SINGLE_ROW: usize = 8;
/// The longest label of a column; one of a row may be as high as its pictures.
const COLUMN_LABEL_LINES: usize = 3;
const WHITE: u8 = 255;
/// How much darker than white the text is.
const INK: f32 = 235.0;

/// A picture of the sheet and the labels of its place.
pub struct Cell {
    /// Label of its row, any text.
    pub row: String,
    /// Label of its column, any text.
    pub column: String,
    /// Drawn at its full size.
    pub picture: Image,
}

/// Saves a sheet of the images of a list that are there: a row for each prompt and columns for
/// seeds, or columns for the last sweep and rows for all else. There is none if none of them is.
pub fn save_sheet(
    path: &Path,
    list: &JobList,
    tasks: &[Task],
    options: WriteOptions,
) -> Result<()> {
    let cell = |task: &Task| {
        let spec = list.jobs.get(task.index)?;
        let picture = Image::decode(&std::fs::read(task.path.as_ref()?).ok()?).ok()?;
        let (prompt, seed) = (spec.prompt.to_string(), format!("seed {}", spec.seed));
        let (row, column) = match spec.sweep.labels.split_last() {
            None => (prompt, seed),
            Some((last, others)) => ([&[prompt, seed], others].concat().join(", "), last.clone()),
        };
        Some(Cell {
            row,
            column,
            picture,
        })
    };
    let cells: Vec<Cell> = tasks.iter().filter_map(cell).collect();
    if cells.is_empty() {
        return Ok(());
    }
    let format = Format::of_path(path)?.unwrap_or(Format::Png);
    let metadata = options.metadata.then(|| Metadata {
        parameters: format!("a contact sheet of {} pictures", cells.len()),
        sdgen: json!({ CONTACT_SHEET: cells.len() }),
    });
    let bytes = sheet(&cells)?.encode(format, metadata.as_ref())?;
    output_path::save(path, &bytes, options.overwrite)
}

/// Lays pictures out on white, rows and columns in the order in which their labels first appear.
/// Pictures with the same two labels take further columns of that label. Labels that are all equal
/// are left out. A single row of more than 8 columns goes on below, near a square. Errors if there
/// is no picture, if a picture's values do not make its size, or if the sheet would be larger than
/// 16384 pixels on a side or 256 megapixels.
pub fn sheet(cells: &[Cell]) -> Result<Image> {
    for Cell {
        picture: Image { width, height, rgb },
        ..
    } in cells
    {
        let size = width
            .checked_mul(*height)
            .and_then(|area| area.checked_mul(3));
        if rgb.is_empty() || size != Some(rgb.len()) {
            bail!(
                "{} values do not make a picture of {width}x{height}",
                rgb.len()
            );
        }
    }
    let sizes = || {
        cells
            .iter()
            .map(|cell| (cell.picture.width, cell.picture.height))
    };
    let (Some(cell_width), Some(cell_height)) = (
        sizes().map(|(width, _)| width).max(),
        sizes().map(|(_, height)| height).max(),
    ) else {
        bail!("a contact sheet needs a picture");
    };
    let Grid {
        rows,
        columns,
        places,
    } = Grid::new(cells);

    let text = Text::new((cell_width.min(cell_height) / 16).clamp(18, 64))?;
    let gap = text.line_px / 2;
    let row_labels: Vec<_> = rows
        .iter()
        .map(|label| {
            text.wrap(
                label,
                cell_width.max(12 * text.line_px),
                cell_height / text.line_px,
            )
        })
        .collect();
    let column_labels: Vec<_> = columns
        .iter()
        .map(|label| text.wrap(label, cell_width, COLUMN_LABEL_LINES))
        .collect();
    let label_width = row_labels
        .iter()
        .flatten()
        .map(|line| text.width(line))
        .max();
    let label_lines = column_labels.iter().map(Vec::len).max().unwrap_or(0);

    let columns_across = match columns.len() {
        count if rows.len() == 1 && count > MAX_COLUMNS_OF_SINGLE_ROW => {
            (count as f64).sqrt().ceil() as usize
        }
        count => count,
    };
    // A band is all rows, with the labels of their columns above.
    let bands = columns.len().div_ceil(columns_across);
    let top = label_lines * text.line_px;
    let left = label_width.map_or(gap, |label_width| gap + label_width + gap);
    let band_height = top + rows.len() * (cell_height + gap);
    let (width, height) = (
        left + columns_across * (cell_width + gap),
        gap + bands * band_height,
    );
    if width.max(height) > MAX_SIDE_PX || width.saturating_mul(height) > MAX_AREA_PX {
        bail!(
            "the contact sheet would be {width}x{height} pixels, more than {MAX_SIDE_PX} on a side or {} megapixels\n\nhint: put fewer \
             pictures on one sheet",
            MAX_AREA_PX >> 20
        );
    }

    let corner = |row: usize, column: usize| {
        let (band, column) = (column / columns_across, column % columns_across);
        (
            left + column * (cell_width + gap),
            gap + band * band_height + top + row * (cell_height + gap),
        )
    };
    let mut sheet = Image {
        width,
        height,
        rgb: vec![WHITE; width * height * 3],
    };
    for (Cell { picture, .. }, (row, column)) in cells.iter().zip(places) {
        let (x, y) = corner(row, column);
        paste(
            &mut sheet,
            picture,
            x + (cell_width - picture.width) / 2,
            y + (cell_height - picture.height) / 2,
        );
    }
    for (row, lines) in row_labels.iter().enumerate() {
        let (_, y) = corner(row, 0);
        let y = y + cell_height.saturating_sub(lines.len() * text.line_px) / 2;
        for (number, line) in lines.iter().enumerate() {
            text.draw(&mut sheet, line, gap, y + number * text.line_px);
        }
    }
    for (column, lines) in column_labels.iter().enumerate() {
        let (x, y) = corner(0, column);
        for (number, line) in lines.iter().rev().enumerate() {
            let x = x + cell_width.saturating_sub(text.width(line)) / 2;
            text.draw(&mut sheet, line, x, y - (number + 1) * text.line_px);
        }
    }
    Ok(sheet)
}

/// The labels, and the place of each cell.
struct Grid<'a> {
    rows: Vec<&'a str>,
    columns: Vec<&'a str>,
    /// (row, column) of each cell, no two alike.
    places: Vec<(usize, usize)>,
}

impl<'a> Grid<'a> {
    fn new(cells: &'a [Cell]) -> Grid<'a> {
        let (rows, row_of) = labels(cells.iter().map(|cell| cell.row.as_str()));
        let (columns, column_of) = labels(cells.iter().map(|cell| cell.column.as_str()));
        // How many cells came before with the same labels.
        let mut seen = HashMap::new();
        let repeats: Vec<usize> = row_of
            .iter()
            .zip(&column_of)
            .map(|place| {
                let count = seen.entry(place).or_insert(0);
                *count += 1;
                *count - 1
            })
            .collect();
        let mut widths = vec![1; columns.len()];
        for (&column, repeat) in column_of.iter().zip(&repeats) {
            widths[column] = widths[column].max(repeat + 1);
        }
        let starts: Vec<usize> = widths
            .iter()
            .scan(0, |end, width| {
                *end += width;
                Some(*end - width)
            })
            .collect();
        let places = row_of
            .into_iter()
            .zip(column_of)
            .zip(repeats)
            .map(|((row, column), repeat)| (row, starts[column] + repeat))
            .collect();
        let columns = columns
            .into_iter()
            .zip(widths)
            .flat_map(|(label, width)| std::iter::repeat_n(label, width))
            .collect();
        Grid {
            rows,
            columns,
            places,
        }
    }
}

/// The different labels in order, and the number of each cell's own. A label alone says nothing
/// and becomes empty.
fn labels<'a>(of_cells: impl Iterator<Item = &'a str>) -> (Vec<&'a str>, Vec<usize>) {
    let mut known = Vec::new();
    let mut numbers = HashMap::new();
    let of_cells = of_cells
        .map(|label| {
            *numbers.entry(label).or_insert_with(|| {
                known.push(label);
                known.len() - 1
            })
        })
        .collect();
    if let [label] = known.as_mut_slice() {
        *label = "";
    }
    (known, of_cells)
}

/// Copies `picture`, all of which lies within the sheet, to the place of its upper left corner.
fn paste(sheet: &mut Image, picture: &Image, x: usize, y: usize) {
    let rows = sheet.rgb.chunks_exact_mut(sheet.width * 3).skip(y);
    for (row, pixels) in rows.zip(picture.rgb.chunks_exact(picture.width * 3)) {
        row[x * 3..][..pixels.len()].copy_from_slice(pixels);
    }
}

/// Letters of one size.
struct Text {
    /// The first that has a character draws it; one that none has is the first's box.
    fonts: [FontRef<'static>; 2],
    /// Height of a line.
    line_px: usize,
}

impl Text {
    fn new(line_px: usize) -> anyhow::Result<Text> {
        Ok(Text {
            fonts: [
                FontRef::try_from_slice(UBUNTU_LIGHT)?,
                FontRef::try_from_slice(NOTO_EMOJI_REGULAR)?,
            ],
            line_px,
        })
    }

    fn font(&self, c: char) -> impl ScaleFont<&FontRef<'static>> {
        let [first, ..] = &self.fonts;
        self.fonts
            .iter()
            .find(|font| font.glyph_id(c).0 != 0)
            .unwrap_or(first)
            .as_scaled(self.line_px as f32)
    }

    /// Pixels from the left of the first letter to the right of the last, rounded up.
    fn width(&self, line: &str) -> usize {
        line.chars().map(|c| self.advance(c)).sum::<f32>().ceil() as usize
    }

    fn advance(&self, c: char) -> f32 {
        let font = self.font(c);
        font.h_advance(font.glyph_id(c))
    }

    /// Breaks a label into at most `most_lines` lines (one at least) of at most `width` pixels,
    /// between words where it can, and ends it in `...` where it is longer.
    fn wrap(&self, label: &str, width: usize, most_lines: usize) -> Vec<String> {
        let label: String = label
            .chars()
            .filter(|&c| !is_invisible(c))
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        let mut rest = label.trim();
        let mut lines = Vec::new();
        while !rest.is_empty() {
            let fitting = self.fitting(rest, width);
            if fitting == rest.len() {
                lines.push(rest.to_owned());
                break;
            }
            if lines.len() + 1 >= most_lines {
                let fitting = self.fitting(rest, width.saturating_sub(self.width("...")));
                lines.push(format!("{}...", rest[..fitting].trim_end()));
                break;
            }
            let space = rest
                .char_indices()
                .rfind(|&(at, c)| at <= fitting && c == ' ')
                .map(|(at, _)| at);
            let (line, after) = rest.split_at(space.unwrap_or(fitting));
            lines.push(line.trim_end().to_owned());
            rest = after.trim_start();
        }
        lines
    }

    /// Bytes of the longest start of the line within `width` pixels, one character at least.
    fn fitting(&self, line: &str, width: usize) -> usize {
        let mut right = 0.0;
        let mut ends = line.char_indices().map(|(at, c)| (at + c.len_utf8(), c));
        let first = ends.next().map_or(0, |(end, c)| {
            right += self.advance(c);
            end
        });
        ends.take_while(|&(_, c)| {
            right += self.advance(c);
            right <= width as f32
        })
        .last()
        .map_or(first, |(end, _)| end)
    }

    /// Draws one line below and to the right of (x, y); what lies outside of the sheet is cut off.
    fn draw(&self, sheet: &mut Image, line: &str, x: usize, y: usize) {
        let mut right = x as f32;
        for c in line.chars() {
            let font = self.font(c);
            let mut glyph = font.scaled_glyph(c);
            glyph.position = point(right, y as f32 + font.ascent());
            right += font.h_advance(glyph.id);
            let Some(outline) = font.outline_glyph(glyph) else {
                continue;
            };
            let corner = outline.px_bounds().min;
            outline.draw(|dx, dy, coverage| {
                let (x, y) = (
                    corner.x as usize + dx as usize,
                    corner.y as usize + dy as usize,
                );
                if x < sheet.width && y < sheet.height {
                    let start = (y * sheet.width + x) * 3;
                    for level in &mut sheet.rgb[start..start + 3] {
                        *level = level.saturating_sub((coverage * INK) as u8);
                    }
                }
            });
        }
    }
}

/// Joiners, direction marks and variation selectors, which shape their neighbours.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}')
}
