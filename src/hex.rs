//! How hashes are written.

use std::fmt::Write;

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
            // a string takes whatever is written
            let _ = write!(text, "{byte:02x}");
            text
        })
}
