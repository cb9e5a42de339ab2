//! `--show`: pictures in the terminal, in kitty's, iTerm2's or sixel graphics, else in half blocks,
//! two pixels a character.
//!
//! Hides which of them it is and how each is written. The terminal is known by environment
//! variables alone: one that is asked and does not answer would hold up the drawing, and one behind
//! a multiplexer answers for itself alone.

use crate::image::{Format, Image};
use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::ValueEnum;
use image::RgbImage;
use image::imageops::{FilterType, resize};
use std::io::IsTerminal;

/// Leaves room for the prompt on a terminal of the usual 24 lines, and for a few pictures on
/// others.
const MAX_ROWS: usize = 24;
/// Columns and rows of a terminal that does not tell its size.
const USUAL_SIZE: (usize, usize) = (80, 24);
/// Lines that stay free: the bar's, and the one above it.
const FREE_ROWS: usize = 2;
/// Characters of base64 a command of kitty's may have.
const KITTY_CHUNK: usize = 4096;
/// Names the picture that is taken back; any number that no other program is likely to use.
const KITTY_ID: u32 = 29540;
/// Pixels of a character, in graphics that count in pixels, where the terminal does not tell.
const CELL_PX: (usize, usize) = (8, 16);

/// `--show`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ShowChoice {
    /// what the terminal at stderr understands
    Auto,
    Kitty,
    Iterm,
    Sixel,
    /// half blocks in 24-bit colours
    Blocks,
    /// half blocks in 256 colours
    Blocks256,
}

/// A terminal that shows pictures.
pub struct Terminal {
    graphics: Graphics,
    columns: usize,
    rows: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Graphics {
    Kitty,
    Iterm,
    Sixel,
    Blocks { true_colour: bool },
}

impl Terminal {
    /// The one at stderr, as chosen or by what the environment says of it. Errors if nothing is
    /// chosen and stderr is not a terminal, or one without colours.
    pub fn choose(choice: ShowChoice) -> Result<Self> {
        let stderr = std::io::stderr();
        let graphics = match choice {
            ShowChoice::Kitty => Some(Graphics::Kitty),
            ShowChoice::Iterm => Some(Graphics::Iterm),
            ShowChoice::Sixel => Some(Graphics::Sixel),
            ShowChoice::Blocks => Some(Graphics::Blocks { true_colour: true }),
            ShowChoice::Blocks256 => Some(Graphics::Blocks { true_colour: false }),
            ShowChoice::Auto if !stderr.is_terminal() => None,
            ShowChoice::Auto => {
                Graphics::detect(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
            }
        };
        let Some(graphics) = graphics else {
            bail!(
                "stderr is not a terminal that can show a picture\n\nhint: leave `--show` out, or choose how: `--show=blocks`"
            );
        };
        let size = terminal_size::terminal_size_of(stderr)
            .map(|(columns, rows)| (columns.0.into(), rows.0.into()));
        let (columns, rows) = size
            .filter(|(columns, rows)| *columns > 0 && *rows > 0)
            .unwrap_or(USUAL_SIZE);
        Ok(Self {
            graphics,
            columns,
            rows,
        })
    }

    /// Whether a picture can be written over the one before: how many lines a sixel picture takes
    /// is not known.
    pub fn can_overwrite(&self) -> bool {
        self.graphics != Graphics::Sixel
    }

    /// Returns the text that draws a picture at the cursor, as large as one of `width` x `height` pixels fits, and
    /// leaves the cursor at the start of the line below; and how many lines that takes. Only a
    /// passing one can be taken back. Errors if the values do not make the picture.
    pub fn draw(
        &self,
        picture: &Image,
        width: usize,
        height: usize,
        passing: bool,
    ) -> Result<(String, usize)> {
        let (columns, rows) = fit(width, height, self.columns, self.rows);
        let text = match self.graphics {
            Graphics::Kitty => kitty(&png(picture)?, columns, rows, passing.then_some(KITTY_ID)),
            Graphics::Iterm => iterm(&png(picture)?, columns, rows),
            Graphics::Sixel => sixel(&scaled(picture, columns * CELL_PX.0, rows * CELL_PX.1)?),
            Graphics::Blocks { true_colour } => {
                blocks(&scaled(picture, columns, 2 * rows)?, true_colour)
            }
        };
        Ok((text, rows))
    }

    /// Returns the text that removes a picture of so many lines, of which the cursor is at the start of the line
    /// below.
    pub fn erase(&self, rows: usize) -> String {
        // kitty's pictures lie above the text and stay when it is erased
        let delete = if self.graphics == Graphics::Kitty {
            format!("\x1b_Ga=d,d=I,i={KITTY_ID},q=2\x1b\\")
        } else {
            String::new()
        };
        format!("\x1b[{rows}A\r\x1b[J{delete}")
    }
}

impl Graphics {
    /// By the environment; none without colours.
    fn detect(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let term = variable("TERM").filter(|term| term != "dumb")?;
        let program = variable("TERM_PROGRAM").unwrap_or_default();
        let multiplexed = ["TMUX", "STY", "ZELLIJ"]
            .into_iter()
            .any(|name| variable(name).is_some());
        if !multiplexed && !term.starts_with("screen") && !term.starts_with("tmux") {
            if variable("KITTY_WINDOW_ID").is_some()
                || matches!(&*term, "xterm-kitty" | "xterm-ghostty")
                || program == "ghostty"
            {
                return Some(Self::Kitty);
            }
            // LC_TERMINAL comes along over ssh
            if matches!(&*program, "iTerm.app" | "WezTerm" | "mintty")
                || variable("LC_TERMINAL").is_some_and(|name| name == "iTerm2")
            {
                return Some(Self::Iterm);
            }
            if ["foot", "mlterm", "yaft"]
                .into_iter()
                .any(|name| term.starts_with(name))
            {
                return Some(Self::Sixel);
            }
        }
        let true_colour = variable("COLORTERM")
            .is_some_and(|depth| matches!(&*depth, "truecolor" | "24bit"))
            || term.ends_with("-direct");
        Some(Self::Blocks { true_colour })
    }
}

/// Columns and rows of the terminal for a picture, in its proportions: a character is twice as high
/// as wide. None stands for less than 1x2 pixels, and the last column stays free, since behind it
/// some terminals begin a line.
fn fit(
    width: usize,
    height: usize,
    terminal_columns: usize,
    terminal_rows: usize,
) -> (usize, usize) {
    let (width, height) = (width.max(1) as f64, height.max(1) as f64);
    let most_rows = terminal_rows.saturating_sub(FREE_ROWS).min(MAX_ROWS);
    let scale = (terminal_columns.saturating_sub(1) as f64 / width)
        .min(2.0 * most_rows as f64 / height)
        .min(1.0);
    let places = |length: f64| (length.round() as usize).max(1);
    (places(width * scale), places(height * scale / 2.0))
}

fn png(picture: &Image) -> Result<Vec<u8>> {
    picture.encode(Format::Png, None)
}

fn scaled(picture: &Image, width: usize, height: usize) -> Result<RgbImage> {
    let Image {
        width: w,
        height: h,
        rgb,
    } = picture;
    let pixels = RgbImage::from_raw(u32::try_from(*w)?, u32::try_from(*h)?, rgb.clone());
    let pixels =
        pixels.with_context(|| format!("{} values do not make a picture of {w}x{h}", rgb.len()))?;
    Ok(resize(
        &pixels,
        u32::try_from(width)?,
        u32::try_from(height)?,
        FilterType::Triangle,
    ))
}

/// Kitty's graphics protocol: a PNG in base64, in commands of limited length, that nothing is
/// answered to.
fn kitty(png: &[u8], columns: usize, rows: usize, id: Option<u32>) -> String {
    let data = STANDARD.encode(png);
    let id = id.map(|id| format!(",i={id}")).unwrap_or_default();
    let mut keys = format!("a=T,f=100,q=2,c={columns},r={rows}{id},");
    let mut text = String::new();
    let mut rest = data.as_str();
    while !rest.is_empty() {
        let (chunk, more) = rest.split_at(rest.len().min(KITTY_CHUNK));
        text += &format!("\x1b_G{keys}m={};{chunk}\x1b\\", u8::from(!more.is_empty()));
        keys.clear();
        rest = more;
    }
    text + "\n"
}

/// iTerm2's inline images: a PNG in base64.
fn iterm(png: &[u8], columns: usize, rows: usize) -> String {
    let (size, data) = (png.len(), STANDARD.encode(png));
    format!(
        "\x1b]1337;File=inline=1;size={size};width={columns};height={rows};preserveAspectRatio=0:{data}\x07\n"
    )
}

/// Sixel graphics (DEC STD 070) in 6 levels a channel, ordered dithering by Bayer's matrix.
fn sixel(picture: &RgbImage) -> String {
    const LEVELS: usize = 6;
    const BAYER: [[u8; 4]; 4] = [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]];
    let (width, height) = picture.dimensions();
    // the place of a pixel's colour among all of them
    let colour = |x: u32, y: u32| {
        let threshold = (f64::from(BAYER[y as usize % 4][x as usize % 4]) + 0.5) / 16.0;
        let level =
            |value: &u8| (f64::from(*value) / 255.0 * (LEVELS - 1) as f64 + threshold) as usize;
        picture
            .get_pixel(x, y)
            .0
            .iter()
            .fold(0, |place, value| place * LEVELS + level(value))
    };
    let mut text = format!("\x1bP0;1;0q\"1;1;{width};{height}");
    for place in 0..LEVELS.pow(3) {
        let percent = |level: usize| level * 100 / (LEVELS - 1);
        let (r, g, b) = (
            percent(place / LEVELS / LEVELS),
            percent(place / LEVELS % LEVELS),
            percent(place % LEVELS),
        );
        text += &format!("#{place};2;{r};{g};{b}");
    }
    for top in (0..height).step_by(6) {
        let mut bands = vec![None; LEVELS.pow(3)];
        for y in top..height.min(top + 6) {
            for x in 0..width {
                let band: &mut Vec<u8> =
                    bands[colour(x, y)].get_or_insert_with(|| vec![0; width as usize]);
                band[x as usize] |= 1 << (y - top);
            }
        }
        for (place, band) in bands
            .iter()
            .enumerate()
            .filter_map(|(place, band)| Some((place, band.as_ref()?)))
        {
            text += &format!("#{place}");
            for run in band.chunk_by(|a, b| a == b) {
                text += &format!("!{}{}", run.len(), char::from(63 + run[0]));
            }
            text.push('$');
        }
        text.push('-');
    }
    text + "\x1b\\\n"
}

/// Upper half blocks: the upper pixel in the text's colour, the lower in the background's.
fn blocks(picture: &RgbImage, true_colour: bool) -> String {
    let colour = |place: u8, pixel: [u8; 3]| match (true_colour, pixel) {
        (true, [r, g, b]) => format!("\x1b[{place}8;2;{r};{g};{b}m"),
        (false, pixel) => format!("\x1b[{place}8;5;{}m", nearest_of_256(pixel)),
    };
    let (width, height) = picture.dimensions();
    let mut text = String::new();
    for y in (0..height.saturating_sub(1)).step_by(2) {
        let mut before = None;
        for x in 0..width {
            let pixels = [picture.get_pixel(x, y).0, picture.get_pixel(x, y + 1).0];
            if before != Some(pixels) {
                text += &colour(3, pixels[0]);
                text += &colour(4, pixels[1]);
                before = Some(pixels);
            }
            text.push('▀');
        }
        text += "\x1b[0m\n";
    }
    text
}

/// The nearest of xterm's colour cube (16 to 231) and greys (232 to 255).
fn nearest_of_256([r, g, b]: [u8; 3]) -> usize {
    const CUBE: [u8; 6] = [0, 95, 135, 175, 215, 255];
    let level = |value: u8| (0..6).min_by_key(|&i| CUBE[i].abs_diff(value)).unwrap_or(0);
    let [i, j, k] = [r, g, b].map(level);
    let grey = ((usize::from(r) + usize::from(g) + usize::from(b)).saturating_sub(9) / 30).min(23);
    let off = |colour: [u8; 3]| {
        [r, g, b]
            .iter()
            .zip(colour)
            .map(|(a, b)| usize::from(a.abs_diff(b)).pow(2))
            .sum::<usize>()
    };
    let (cube, greys) = ([CUBE[i], CUBE[j], CUBE[k]], [8 + 10 * grey as u8; 3]);
    if off(greys) < off(cube) {
        232 + grey
    } else {
        16 + 36 * i + 6 * j + k
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A picture of 1x2 pixels: red over blue.
    fn red_over_blue() -> Image {
        Image {
            width: 1,
            height: 2,
            rgb: vec![255, 0, 0, 0, 0, 255],
        }
    }

    fn drawn(graphics: Graphics, picture: &Image, passing: bool) -> String {
        Terminal {
            graphics,
            columns: 80,
            rows: 24,
        }
        .draw(picture, picture.width, picture.height, passing)
        .unwrap_or_default()
        .0
    }

    #[test]
    fn the_terminal_is_known_by_its_environment_and_not_through_a_multiplexer() {
        let blocks = |true_colour| Some(Graphics::Blocks { true_colour });
        let cases = [
            ("", None),
            ("TERM=dumb COLORTERM=truecolor", None),
            ("TERM=xterm-256color", blocks(false)),
            ("TERM=xterm-256color COLORTERM=truecolor", blocks(true)),
            ("TERM=xterm-direct", blocks(true)),
            ("TERM=xterm-kitty", Some(Graphics::Kitty)),
            (
                "TERM=xterm-256color KITTY_WINDOW_ID=1",
                Some(Graphics::Kitty),
            ),
            (
                "TERM=xterm-256color TERM_PROGRAM=ghostty",
                Some(Graphics::Kitty),
            ),
            (
                "TERM=xterm-256color TERM_PROGRAM=WezTerm",
                Some(Graphics::Iterm),
            ),
            (
                "TERM=xterm-256color LC_TERMINAL=iTerm2",
                Some(Graphics::Iterm),
            ),
            ("TERM=foot", Some(Graphics::Sixel)),
            ("TERM=tmux-256color KITTY_WINDOW_ID=1", blocks(false)),
            (
                "TERM=screen.xterm-256color TERM_PROGRAM=iTerm.app COLORTERM=24bit",
                blocks(true),
            ),
            ("TERM=xterm-kitty ZELLIJ=0", blocks(false)),
        ];
        for (environment, expected) in cases {
            let variables: Vec<_> = environment
                .split(' ')
                .filter_map(|variable| variable.split_once('='))
                .collect();
            let variable = |name: &str| {
                variables
                    .iter()
                    .find(|(known, _)| *known == name)
                    .map(|(_, value)| value.to_string())
            };
            assert_eq!(Graphics::detect(variable), expected, "{environment}");
        }
    }

    #[test]
    fn half_blocks_hold_two_pixels_and_say_a_colour_once() {
        let picture = Image {
            width: 3,
            height: 4,
            rgb: [[255, 0, 0].repeat(6), [0, 0, 255].repeat(6)].concat(),
        };
        let expected = "\x1b[38;2;255;0;0m\x1b[48;2;255;0;0m▀▀▀\x1b[0m\n\x1b[38;2;0;0;255m\x1b[48;2;0;0;255m▀▀▀\x1b[0m\n";
        assert_eq!(
            drawn(Graphics::Blocks { true_colour: true }, &picture, false),
            expected
        );
        let few = drawn(
            Graphics::Blocks { true_colour: false },
            &red_over_blue(),
            false,
        );
        assert_eq!(few, "\x1b[38;5;196m\x1b[48;5;21m▀\x1b[0m\n");
    }

    #[test]
    fn the_nearest_of_256_colours_may_be_a_grey() {
        let cases = [
            ([0, 0, 0], 16),
            ([255, 255, 255], 231),
            ([128, 128, 128], 244),
            ([9, 9, 9], 232),
            ([238, 238, 238], 255),
        ];
        for (colour, expected) in cases
            .into_iter()
            .chain([([250, 130, 5], 208), ([94, 0, 1], 52)])
        {
            assert_eq!(nearest_of_256(colour), expected, "{colour:?}");
        }
    }

    #[test]
    fn kitty_gets_a_png_in_pieces_and_answers_nothing() {
        let text = drawn(Graphics::Kitty, &red_over_blue(), false);
        let data = STANDARD.encode(png(&red_over_blue()).unwrap_or_default());
        assert_eq!(
            text,
            format!("\x1b_Ga=T,f=100,q=2,c=1,r=1,m=0;{data}\x1b\\\n")
        );
        let large = kitty(&[7; 7000], 40, 20, Some(5));
        let pieces: Vec<&str> = large.split("\x1b\\").collect();
        let [first, second, third, end] = pieces[..] else {
            unreachable!("{pieces:?}")
        };
        assert!(
            first.starts_with("\x1b_Ga=T,f=100,q=2,c=40,r=20,i=5,m=1;")
                && second.starts_with("\x1b_Gm=1;"),
            "{large}"
        );
        assert!(third.starts_with("\x1b_Gm=0;") && end == "\n", "{large}");
        let data = |piece: &str| piece.split_once(';').map_or(0, |(_, data)| data.len());
        assert_eq!(
            (data(first), data(second), data(third)),
            (4096, 4096, 9336 - 2 * 4096)
        );
    }

    #[test]
    fn iterm_gets_a_png_with_its_size() {
        let data = png(&red_over_blue()).unwrap_or_default();
        let expected = format!(
            "\x1b]1337;File=inline=1;size={};width=1;height=1;preserveAspectRatio=0:{}\x07\n",
            data.len(),
            STANDARD.encode(&data)
        );
        assert_eq!(drawn(Graphics::Iterm, &red_over_blue(), false), expected);
    }

    #[test]
    fn sixels_are_bands_of_six_rows_a_colour_at_a_time() {
        let red = RgbImage::from_pixel(3, 7, image::Rgb([255, 0, 0]));
        let text = sixel(&red);
        assert!(
            text.starts_with("\x1bP0;1;0q\"1;1;3;7#0;2;0;0;0#1;2;0;0;20#2;"),
            "{text}"
        );
        // six rows are all bits above `?`, the seventh the lowest
        assert!(
            text.ends_with("#215;2;100;100;100#180!3~$-#180!3@$-\x1b\\\n"),
            "{text}"
        );
    }

    #[test]
    fn a_preview_is_taken_back_and_a_finished_picture_is_not() {
        let terminal = Terminal {
            graphics: Graphics::Kitty,
            columns: 80,
            rows: 24,
        };
        assert_eq!(
            terminal.erase(5),
            "\x1b[5A\r\x1b[J\x1b_Ga=d,d=I,i=29540,q=2\x1b\\"
        );
        let has_id =
            |passing| drawn(Graphics::Kitty, &red_over_blue(), passing).contains(",i=29540,");
        assert!(has_id(true) && !has_id(false));
        assert_eq!(
            Terminal {
                graphics: Graphics::Iterm,
                ..terminal
            }
            .erase(5),
            "\x1b[5A\r\x1b[J"
        );
    }

    #[test]
    fn a_picture_keeps_its_proportions_within_the_terminal_and_24_rows() {
        assert_eq!(fit(512, 512, 200, 60), (48, 24));
        assert_eq!(fit(512, 512, 200, 12), (20, 10), "two lines stay free");
        assert_eq!(fit(1024, 512, 81, 60), (80, 20));
        assert_eq!(fit(512, 1024, 80, 60), (24, 24));
    }

    #[test]
    fn a_small_picture_is_not_enlarged_and_a_thin_one_stays_visible() {
        assert_eq!(fit(16, 16, 80, 24), (16, 8));
        assert_eq!(fit(4096, 1, 81, 24), (80, 1));
        assert_eq!(fit(8, 8, 0, 0), (1, 1));
    }
}
