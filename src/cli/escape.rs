//! Text from outside, such as names of files and what pictures and models say of themselves, must
//! not move the cursor, change colours or reorder a line of the terminal that it is shown in.

use std::borrow::Cow;

/// The text with its control characters written out, as in `\u{1b}`; lines and tabs stay.
pub fn escaped(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_control) {
        return text.into();
    }
    let mut safe = String::new();
    for c in text.chars() {
        if is_control(c) {
            safe.extend(c.escape_unicode());
        } else {
            safe.push(c);
        }
    }
    safe.into()
}

/// Controls of terminals (C0 and C1) and of the direction of writing.
fn is_control(c: char) -> bool {
    let turns = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    turns || c.is_control() && !matches!(c, '\n' | '\t')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controls_are_written_out_and_all_other_text_stays() {
        let cases = [
            ("a\x1b[31mb\x07", r"a\u{1b}[31mb\u{7}"),
            ("\u{9b}2J\r\x7f", r"\u{9b}2J\u{d}\u{7f}"),
            ("gnp.\u{202e}sgpj", r"gnp.\u{202e}sgpj"),
            (
                "two\nlines\tçafé ضفدع 🐸\u{200d}",
                "two\nlines\tçafé ضفدع 🐸\u{200d}",
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(escaped(text), expected);
        }
    }
}
