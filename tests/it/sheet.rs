//! Contact sheets, on pictures of one colour.
#![allow(clippy::unwrap_used)]

use sdgen::batch::contact_sheet::{Cell, sheet};
use sdgen::image::Image;

const WHITE: [u8; 3] = [255; 3];
/// Between pictures, and around them: half a line of the smallest text.
const GAP: usize = 9;

fn plain(width: usize, height: usize, colour: [u8; 3]) -> Image {
    Image {
        width,
        height,
        rgb: colour.repeat(width * height),
    }
}

fn cell(row: &str, column: &str, picture: Image) -> Cell {
    Cell {
        row: row.to_owned(),
        column: column.to_owned(),
        picture,
    }
}

/// A square of 64 pixels whose red tells it from others.
fn square(row: &str, column: &str, red: u8) -> Cell {
    cell(row, column, plain(64, 64, [red, 0, 200]))
}

fn pixel(picture: &Image, x: usize, y: usize) -> [u8; 3] {
    let start = (y * picture.width + x) * 3;
    [
        picture.rgb[start],
        picture.rgb[start + 1],
        picture.rgb[start + 2],
    ]
}

/// Left, top, width and height of all pixels of a colour.
fn place_of(sheet: &Image, colour: [u8; 3]) -> (usize, usize, usize, usize) {
    let found: Vec<_> = (0..sheet.height)
        .flat_map(|y| (0..sheet.width).map(move |x| (x, y)))
        .filter(|&(x, y)| pixel(sheet, x, y) == colour)
        .collect();
    let (left, right) = (
        found.iter().map(|p| p.0).min().unwrap(),
        found.iter().map(|p| p.0).max().unwrap(),
    );
    let (top, bottom) = (
        found.iter().map(|p| p.1).min().unwrap(),
        found.iter().map(|p| p.1).max().unwrap(),
    );
    assert_eq!(
        found.len(),
        (right - left + 1) * (bottom - top + 1),
        "not a whole rectangle"
    );
    (left, top, right - left + 1, bottom - top + 1)
}

fn corner_of(sheet: &Image, red: u8) -> (usize, usize) {
    let (x, y, ..) = place_of(sheet, [red, 0, 200]);
    (x, y)
}

/// Whether there is text, which is grey and dark, in the rectangle.
fn has_text(sheet: &Image, x: std::ops::Range<usize>, y: std::ops::Range<usize>) -> bool {
    y.into_iter().any(|y| {
        x.clone()
            .any(|x| matches!(pixel(sheet, x, y), [r, g, b] if r == g && g == b && r < 100))
    })
}

#[test]
fn a_single_picture_gets_a_margin_and_no_labels() {
    let sheet = sheet(&[square("row", "column", 1)]).unwrap();
    assert_eq!((sheet.width, sheet.height), (64 + 2 * GAP, 64 + 2 * GAP));
    assert_eq!(place_of(&sheet, [1, 0, 200]), (GAP, GAP, 64, 64));
    assert_eq!(pixel(&sheet, 0, 0), WHITE);
}

#[test]
fn rows_and_columns_stand_in_order_of_first_appearance_with_their_labels() {
    let cells = [
        square("b", "y", 1),
        square("b", "x", 2),
        square("a", "x", 3),
        square("a", "y", 4),
    ];
    let sheet = sheet(&cells).unwrap();
    let (left, top) = corner_of(&sheet, 1);
    assert!(left > 2 * GAP && top > 2 * GAP, "no room for labels");
    assert_eq!(corner_of(&sheet, 2), (left + 64 + GAP, top));
    assert_eq!(corner_of(&sheet, 3), (left + 64 + GAP, top + 64 + GAP));
    assert_eq!(corner_of(&sheet, 4), (left, top + 64 + GAP));
    assert_eq!(
        (sheet.width, sheet.height),
        (left + 2 * (64 + GAP), top + 2 * (64 + GAP))
    );
    for x in [left, left + 64 + GAP] {
        assert!(has_text(&sheet, x..x + 64, 0..top), "no label above {x}");
    }
    for y in [top, top + 64 + GAP] {
        assert!(has_text(&sheet, 0..left, y..y + 64), "no label left of {y}");
    }
}

#[test]
fn equal_labels_are_left_out() {
    let rows = sheet(&[square("a", "same", 1), square("b", "same", 2)]).unwrap();
    assert_eq!(corner_of(&rows, 1).1, GAP);
    assert!(corner_of(&rows, 1).0 > 2 * GAP);
    let columns = sheet(&[square("same", "a", 1), square("same", "b", 2)]).unwrap();
    assert_eq!(corner_of(&columns, 1).0, GAP);
    assert!(corner_of(&columns, 1).1 > 2 * GAP);
}

#[test]
fn a_missing_combination_leaves_its_place_white() {
    let sheet = sheet(&[
        square("a", "x", 1),
        square("a", "y", 2),
        square("b", "y", 3),
    ])
    .unwrap();
    let ((x, _), (_, y)) = (corner_of(&sheet, 1), corner_of(&sheet, 3));
    assert!((y..y + 64).all(|y| (x..x + 64).all(|x| pixel(&sheet, x, y) == WHITE)));
}

#[test]
fn smaller_pictures_are_centred_in_cells_of_the_largest_sides() {
    let cells = [
        cell("", "", plain(80, 40, [1, 0, 200])),
        cell("", "", plain(20, 60, [2, 0, 200])),
    ];
    let sheet = sheet(&cells).unwrap();
    assert_eq!(place_of(&sheet, [1, 0, 200]), (GAP, GAP + 10, 80, 40));
    assert_eq!(
        place_of(&sheet, [2, 0, 200]),
        (GAP + 80 + GAP + 30, GAP, 20, 60)
    );
}

#[test]
fn pictures_with_the_same_labels_take_further_columns() {
    let sheet = sheet(&[
        square("a", "x", 1),
        square("a", "y", 2),
        square("a", "x", 3),
        square("b", "x", 4),
    ])
    .unwrap();
    let (left, top) = corner_of(&sheet, 1);
    assert_eq!(corner_of(&sheet, 3), (left + 64 + GAP, top));
    assert_eq!(corner_of(&sheet, 2), (left + 2 * (64 + GAP), top));
    assert_eq!(corner_of(&sheet, 4), (left, top + 64 + GAP));
}

#[test]
fn a_long_single_row_goes_on_below_with_its_labels() {
    let cells: Vec<Cell> = (1..=10)
        .map(|seed| square("", &format!("seed {seed}"), seed))
        .collect();
    let sheet = sheet(&cells).unwrap();
    let (left, top) = corner_of(&sheet, 1);
    assert_eq!(corner_of(&sheet, 4), (left + 3 * (64 + GAP), top));
    let (x, below) = corner_of(&sheet, 5);
    assert_eq!(x, left);
    assert!(has_text(&sheet, left..left + 64, top + 64..below));
    assert_eq!(corner_of(&sheet, 10).0, left + 64 + GAP);
}

#[test]
fn long_labels_are_broken_and_cut_and_never_touch_a_picture() {
    let long = "a very long label ".repeat(100) + &"w".repeat(500);
    let sheet = sheet(&[
        square(&long, &long, 1),
        square(&long, "x", 2),
        square("b", "x", 3),
    ])
    .unwrap();
    for red in 1..=3 {
        let (_, _, width, height) = place_of(&sheet, [red, 0, 200]);
        assert_eq!((width, height), (64, 64));
    }
    assert_eq!(corner_of(&sheet, 2).0 - corner_of(&sheet, 1).0, 64 + GAP);
    assert!(
        sheet.width < 600 && sheet.height < 300,
        "{}x{}",
        sheet.width,
        sheet.height
    );
}

#[test]
fn any_character_leaves_a_mark() {
    for label in ["é", "ß", "Ω", "ж", "🐸", "你", "ع", "\u{10ffff}"] {
        let sheet = sheet(&[square("", label, 1), square("", "", 2)]).unwrap();
        let (left, top) = corner_of(&sheet, 1);
        assert!(
            has_text(&sheet, left..left + 64, 0..top),
            "nothing for {label}"
        );
    }
}

#[test]
fn labels_of_nothing_visible_take_no_room() {
    let sheet = sheet(&[square("", " \n", 1), square("", "\u{200d}\u{fe0f}", 2)]).unwrap();
    assert_eq!(corner_of(&sheet, 1), (GAP, GAP));
}

#[test]
fn a_sheet_that_is_too_large_is_an_error_with_its_size_and_the_way_out() {
    let wide: Vec<Cell> = (0..2)
        .map(|column| cell("", &column.to_string(), plain(9000, 1, [0; 3])))
        .collect();
    let error = sheet(&wide).unwrap_err().to_string();
    assert!(
        error.contains("18027x") && error.contains("hint: put fewer pictures"),
        "{error}"
    );
    // Both sides are allowed, the area is not.
    let large = [
        cell("0", "0", plain(16_000, 1, [0; 3])),
        cell("0", "0", plain(1, 8_200, [0; 3])),
        cell("1", "0", plain(1, 1, [0; 3])),
    ];
    assert!(sheet(&large).is_err());
}

#[test]
fn no_picture_and_a_broken_picture_are_errors() {
    assert!(sheet(&[]).is_err());
    assert!(sheet(&[cell("", "", plain(0, 0, WHITE))]).is_err());
    assert!(
        sheet(&[cell(
            "",
            "",
            Image {
                width: 2,
                height: 2,
                rgb: vec![0; 11]
            }
        )])
        .is_err()
    );
}
