//! Opens what was named as a file, and says what it is where it is something else: a pipe, a
//! device, a folder, an address, a page that a server sent in its place.

use anyhow::{Context, Error, Result, anyhow, bail};
use std::fs::{File, FileType, Metadata};
use std::io::Read;
use std::path::Path;

/// The most bytes that a text of a model may have; a tokenizer's are a few million.
const MAX_TEXT_BYTES: u64 = 256 << 20;

/// Opens a regular file and returns it with its size in bytes. Errors say what lies there instead,
/// without waiting for it.
pub fn open(path: &Path) -> Result<(File, u64)> {
    let found = look_up(path)?;
    if let Some(kind) = other_kind(found.file_type()) {
        return Err(no_file(path, kind));
    }
    let file = File::open(path).with_context(|| format!("cannot open `{}`", path.display()))?;
    Ok((file, found.len()))
}

/// Errors if reading a path would wait for ever or never end: it is a named pipe, a socket or a
/// device. The pipes that a shell makes of commands (`<(..)`) are read.
pub fn require_finite(path: &Path) -> Result<()> {
    let is_of_shell = ["/dev/fd", "/dev/stdin", "/proc/self/fd"]
        .iter()
        .any(|folder| path.starts_with(folder));
    let kind = std::fs::metadata(path).map(|found| found.file_type());
    match kind.ok().filter(|kind| !kind.is_dir()).and_then(other_kind) {
        Some(kind) if !(is_of_shell && kind == PIPE) => Err(no_file(path, kind)),
        _ => Ok(()),
    }
}

/// Reads all of what [`require_finite`] lets pass.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    require_finite(path)?;
    Ok(std::fs::read(path)?)
}

/// The error where a path is of another kind than files.
fn no_file(path: &Path, kind: &str) -> Error {
    anyhow!(
        "`{}` is {kind}, not a file\n\nhint: name a file on a disk",
        path.display()
    )
}

/// Reads a whole text. Errors as [`open`] does, and if it is no text or longer than any real one.
pub fn read_text(path: &Path) -> Result<String> {
    let shown = path.display();
    let (file, len) = open(path)?;
    if len > MAX_TEXT_BYTES {
        bail!("`{shown}` has {len} bytes, more than any file of its kind");
    }
    let mut bytes = vec![];
    file.take(MAX_TEXT_BYTES)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read `{shown}`"))?;
    match String::from_utf8(bytes) {
        Ok(text) => match stand_in(text.as_bytes()) {
            Some((what, hint)) => bail!("`{shown}` {what}\n\nhint: {hint}"),
            None => Ok(text),
        },
        Err(_) => bail!("`{shown}` is not text in UTF-8"),
    }
}

/// Returns what the system knows of a path. Errors say why there is nothing.
fn look_up(path: &Path) -> Result<Metadata> {
    let shown = path.display();
    std::fs::metadata(path).map_err(|cause| {
        let text = path.to_string_lossy();
        if let Some((_, rest)) = text.split_once("://") {
            let parts: Vec<&str> = rest.split('/').collect();
            let hint = match parts.as_slice() {
                ["huggingface.co" | "hf.co", owner, name, ..] => {
                    format!("models of the hub go by their id, `--model {owner}/{name}`")
                }
                _ => "fetch it with a browser or curl, and name the file".into(),
            };
            return anyhow!("`{shown}` is an address, not a file\n\nhint: {hint}");
        }
        let is_link = path
            .symlink_metadata()
            .is_ok_and(|link| link.file_type().is_symlink());
        match cause.kind() {
            std::io::ErrorKind::NotFound if is_link => anyhow!(
                "`{shown}` is a link to a file that does not exist\n\nhint: fetch that file, or name another"
            ),
            _ if is_link => anyhow!(
                "`{shown}` is a link that leads nowhere ({cause})\n\nhint: name the file itself"
            ),
            _ => anyhow!(cause).context(format!("cannot open `{shown}`")),
        }
    })
}

/// Whether there is nothing at a path, not even a link, and it is no address either.
pub fn is_absent(path: &Path) -> bool {
    let is_address = path.to_string_lossy().contains("://");
    let found = path.symlink_metadata();
    !is_address && found.is_err_and(|cause| cause.kind() == std::io::ErrorKind::NotFound)
}

/// How errors call a pipe.
const PIPE: &str = "a named pipe";

/// What a path is that is neither a file nor a link to one.
fn other_kind(kind: FileType) -> Option<&'static str> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return Some(PIPE);
        }
        if kind.is_socket() {
            return Some("a socket");
        }
        if kind.is_char_device() || kind.is_block_device() {
            return Some("a device");
        }
    }
    match (kind.is_file(), kind.is_dir()) {
        (true, _) => None,
        (_, true) => Some("a folder"),
        _ => Some("a special file"),
    }
}

/// What a file is that was saved in the place of another, by its first bytes, and what to do.
pub fn stand_in(start: &[u8]) -> Option<(String, &'static str)> {
    const AGAIN: &str = "fetch the file again, signed in if its site asks for that";
    let text = String::from_utf8_lossy(start.get(..1024).unwrap_or(start));
    let text = text.trim_start_matches('\u{feff}').trim_start();
    let lower = text
        .get(..text.len().min(64))
        .unwrap_or(text)
        .to_lowercase();
    if let Some(pointer) = text.strip_prefix("version https://git-lfs.github.com/spec/") {
        let size = pointer
            .lines()
            .find_map(|line| line.strip_prefix("size "))
            .and_then(|size| size.trim().parse::<u64>().ok())
            .map(|size| format!(" of {size} bytes"))
            .unwrap_or_default();
        return Some((
            format!("is a pointer of Git LFS: the file itself{size} was not fetched"),
            "run `git lfs pull` in its folder, or fetch the model with `sdgen pull`",
        ));
    }
    if lower.starts_with("<!doctype html") || lower.starts_with("<html") {
        return Some((
            "is a web page, such as one that asks to sign in".into(),
            AGAIN,
        ));
    }
    if lower.starts_with("<?xml") || lower.starts_with("<error") {
        return Some((
            "is an XML text, such as the error of a server".into(),
            AGAIN,
        ));
    }
    None
}
