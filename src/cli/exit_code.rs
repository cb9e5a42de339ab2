//! How the program ends when it does not succeed: an error with its exit code, said once.

use crate::error::{self, ErrorKind};
use anyhow::{Error, Result};

/// An error and the exit code it ends with (assets/docs/scripting.md: 2 arguments, 3 model, 4 memory, 5 not finite, 6
/// some of many, 1 the rest, 130 interrupted).
#[derive(Debug)]
pub struct Failure {
    pub code: u8,
    pub error: Error,
}

impl Failure {
    /// An error with this code, unless the error itself says what kind it is.
    pub fn new(error: Error, code: u8) -> Self {
        let code = match error::kind_of(&error) {
            Some(ErrorKind::NotFinite) => 5,
            Some(ErrorKind::OutOfMemory) => 4,
            Some(ErrorKind::Model) => 3,
            Some(ErrorKind::Params) => 2,
            _ => code,
        };
        Self { code, error }
    }

    /// The error as it is printed.
    pub fn text(&self) -> String {
        text(&self.error)
    }
}

/// `error: cause`, and where there is a remedy a blank line and `hint: remedy`.
pub fn text(error: &Error) -> String {
    let (cause, remedy) = error::split(error);
    let hint = remedy
        .map(|remedy| format!("\n\nhint: {remedy}"))
        .unwrap_or_default();
    format!("error: {cause}{hint}")
}

/// Gives an error its exit code.
pub trait Code<T> {
    /// This code, unless the error itself says what kind it is.
    fn code(self, code: u8) -> Result<T, Failure>;
}

impl<T> Code<T> for Result<T> {
    fn code(self, code: u8) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(error, code))
    }
}
