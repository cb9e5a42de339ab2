//! Errors of the library: what went wrong, of which kind it is, and what to do about it.

use std::fmt;

/// Separates the cause of an error from its remedy in the texts of errors.
const REMEDY: &str = "\n\nhint: ";

/// What kind of thing went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The parameters contradict each other or the model.
    Params,
    /// The model is missing, unreadable, damaged, or of a family that is not supported.
    Model,
    /// The machine or the device has not enough memory.
    OutOfMemory,
    /// NaN or infinity appeared in latents or pixels.
    NotFinite,
    /// The caller ended it.
    Cancelled,
    /// Anything else: a file that cannot be read, a device that fails.
    Other,
}

/// Why something could not be done.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    cause: anyhow::Error,
}

impl Error {
    /// An error of this kind, unless the cause itself tells another one.
    pub(crate) fn new(kind: ErrorKind, cause: anyhow::Error) -> Self {
        let kind = kind_of(&cause).unwrap_or(kind);
        Self { kind, cause }
    }

    /// Returns what kind of thing went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Returns what went wrong, in one line.
    pub fn message(&self) -> String {
        split(&self.cause).0
    }

    /// Returns what to do about it, where there is something to do. Options are named as on the
    /// command line.
    pub fn remedy(&self) -> Option<String> {
        split(&self.cause).1
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.message())
    }
}

impl std::error::Error for Error {}

/// The kind of an error that has a mark of its own anywhere in its chain of causes.
pub fn kind_of(error: &anyhow::Error) -> Option<ErrorKind> {
    if error.is::<NotFinite>() {
        Some(ErrorKind::NotFinite)
    } else if error.is::<OutOfMemory>() || error.chain().any(is_out_of_memory) {
        Some(ErrorKind::OutOfMemory)
    } else if error.is::<Cancelled>() {
        Some(ErrorKind::Cancelled)
    } else if error.is::<WrongArgument>() {
        Some(ErrorKind::Params)
    } else if error.is::<ModelError>() {
        Some(ErrorKind::Model)
    } else {
        None
    }
}

/// Whether the system says that it has no memory left, as for a file that is mapped into it.
fn is_out_of_memory(cause: &(dyn std::error::Error + 'static)) -> bool {
    let io = cause.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::OutOfMemory)
}

/// Splits a chain of causes into what went wrong and what to do about it.
pub fn split(error: &anyhow::Error) -> (String, Option<String>) {
    let (mut causes, mut remedy) = (vec![], None);
    for part in error.chain().map(ToString::to_string) {
        let (cause, hint) = match part.split_once(REMEDY) {
            Some((cause, hint)) => (cause.to_string(), Some(hint.to_string())),
            None => (part, None),
        };
        causes.push(cause);
        remedy = remedy.or(hint);
    }
    (causes.join(": "), remedy)
}

/// Marks an error: an argument cannot be what it was given for. Its text is the error's.
#[derive(Debug)]
pub struct WrongArgument(pub String);

impl fmt::Display for WrongArgument {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WrongArgument {}

/// Marks an error as the model's fault: a setting or a weight that cannot be used.
#[derive(Debug)]
pub struct ModelError;

impl fmt::Display for ModelError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("this model cannot be used")
    }
}

/// Marks an error: NaN or infinity appeared.
#[derive(Debug)]
pub struct NotFinite {
    /// where it appeared, such as `after decoding`
    pub place: String,
}

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { place } = self;
        write!(
            f,
            "the picture is not finite (NaN or infinity) {place}{REMEDY}the checkpoint is damaged, \
             or overflows in this `--dtype`; nothing was written"
        )
    }
}

impl std::error::Error for NotFinite {}

/// Marks an error: the device has no memory left.
#[derive(Debug)]
pub struct OutOfMemory;

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "the device has not enough memory{REMEDY}draw a smaller picture with `--width` and \
             `--height`, or use `--vae-tiling on` or `--dtype f16`"
        )
    }
}

impl std::error::Error for OutOfMemory {}

/// Marks an error: the caller answered a step with `Break`.
#[derive(Debug)]
pub struct Cancelled;

impl fmt::Display for Cancelled {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("the generation was cancelled")
    }
}

impl std::error::Error for Cancelled {}

/// What devices say that have no memory left: CUDA, and Metal of a tensor and of a computation.
const NO_MEMORY: [&str; 3] = [
    "out of memory",
    "failed to create metal resource: buffer",
    "insufficient memory",
];

/// Marks an error of a device that has no memory left. candle's backends have no type of error for
/// this, only their words.
pub fn mark_out_of_memory(error: anyhow::Error) -> anyhow::Error {
    let text = format!("{error:#}").to_lowercase().replace('_', " ");
    if NO_MEMORY.iter().any(|words| text.contains(words)) {
        error.context(OutOfMemory)
    } else {
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_memory_is_known_by_its_words() {
        let cuda = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
        let metal = "Metal error Failed to create metal resource: Buffer";
        let late = "Command buffer had following error: Insufficient Memory \
                    (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)";
        for words in [cuda, metal, late] {
            let error = mark_out_of_memory(anyhow::anyhow!(words).context("the batch failed"));
            assert!(error.is::<OutOfMemory>(), "{words}");
        }
        let other = anyhow::anyhow!("no kernel image is available");
        assert!(!mark_out_of_memory(other).is::<OutOfMemory>());
    }

    #[test]
    fn an_error_has_its_kind_from_anywhere_in_its_chain_and_one_remedy() {
        let inner = anyhow::anyhow!("no tensor `a`\n\nhint: look at `b`");
        let error = Error::new(ErrorKind::Other, inner.context(ModelError).context("outer"));
        assert_eq!(error.kind(), ErrorKind::Model);
        assert_eq!(
            error.message(),
            "outer: this model cannot be used: no tensor `a`"
        );
        assert_eq!(error.remedy().as_deref(), Some("look at `b`"));
    }
}
