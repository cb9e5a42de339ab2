//! Fetches what a snapshot lacks: asks for the listing, lets [`select`] choose, and brings each
//! file into the cache, locked, continued where it broke off, and verified.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::cache::{self, RepoCache, read_json};
use super::client::{Client, ConnectionError, MAX_REDIRECTS, Response};
use super::reference::{Reference, is_commit};
use super::selection::select;
use super::{ENDPOINT, Hub, errors};
use crate::hex::hex;

/// A transfer that breaks off is taken up again this often before the person is asked to.
const ATTEMPTS: usize = 5;
const PAUSE_BETWEEN_ATTEMPTS: Duration = Duration::from_millis(500);

/// One visit to the hub for one reference.
pub struct Download<'a> {
    hub: &'a Hub,
    reference: &'a Reference,
    cache: RepoCache,
    client: Client,
    bar: ProgressBar,
    /// Whether stderr is told how much is fetched.
    shows_size: bool,
}

/// The files of a repository at a commit, as the hub lists them.
struct Listing {
    commit: String,
    /// Sizes in bytes, where the hub tells them.
    files: BTreeMap<String, Option<u64>>,
}

/// Where the bytes of a file are, and what they must be.
struct FileMetadata {
    /// The address of the bytes, which may be signed for a short time.
    location: String,
    /// The checksum (SHA-256 of a large file, git's SHA-1 of a small one) that names the blob.
    etag: String,
    size: u64,
}

impl FileMetadata {
    /// Whether the etag is a checksum of the contents as they are.
    fn is_sha256(&self) -> bool {
        self.etag.len() == 64 && self.etag.bytes().all(|b| b.is_ascii_hexdigit())
    }
}

/// Why one request for the bytes of a file did not bring them all.
enum TransferError {
    /// The connection broke off or made no sense; another try may help.
    Interrupted(String),
    /// Another try would meet the same.
    Fatal(anyhow::Error),
}

impl<'a> Download<'a> {
    pub fn new(hub: &'a Hub, reference: &'a Reference, progress: bool) -> Result<Download<'a>> {
        let bar = if progress {
            ProgressBar::new(0)
        } else {
            ProgressBar::hidden()
        };
        bar.set_style(ProgressStyle::with_template(
            "{wide_msg} [{bar:24}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        )?);
        Ok(Download {
            hub,
            reference,
            cache: RepoCache::new(&hub.cache_dir, reference),
            client: Client::new(hub)?,
            bar,
            shows_size: progress,
        })
    }

    /// Brings all files of the model into the cache. Returns what to open.
    pub fn run(&self) -> Result<PathBuf> {
        let listing = self.listing()?;
        let Listing { commit, files } = &listing;
        let names: BTreeSet<String> = files.keys().cloned().collect();
        let selection = select(self.reference, &names, &mut |file| {
            read_json(&self.fetch(&listing, file)?)
        })
        .map_err(|error| errors::not_a_model(error, self.reference, &names))?;

        let folder = self.cache.snapshot_path(commit);
        let missing: Vec<&String> = selection
            .files
            .iter()
            .filter(|file| !folder.join(file).is_file())
            .collect();
        let to_come: u64 = missing
            .iter()
            .filter_map(|file| files.get(*file).copied().flatten())
            .sum();
        if self.shows_size && !missing.is_empty() {
            let (files, repo) = (missing.len(), &self.reference.repo);
            let size = HumanBytes(to_come);
            // who closed stderr does not want to know
            writeln!(io::stderr(), "fetching {files} files of `{repo}`, {size}").unwrap_or(());
        }
        self.bar.set_length(self.bar.position() + to_come);
        for file in missing {
            self.fetch(&listing, file)?;
        }

        // The refs come last, so that an older complete snapshot is not forgotten for half a new
        // one.
        if selection.checkpoint.is_some() && self.reference.file.is_none() {
            self.write(&self.cache.no_index_path(commit), "")?;
        }
        if &self.reference.revision != commit {
            self.write(&self.cache.ref_path(&self.reference.revision), commit)?;
        }
        self.bar.finish_and_clear();
        Ok(selection.path(folder))
    }

    /// Asks the hub for the commit and the files of the revision.
    fn listing(&self) -> Result<Listing> {
        let Reference { repo, revision, .. } = self.reference;
        let url = self.client.info_url(repo, revision);
        let (mut response, url) = self
            .client
            .get_redirected(&url, None)
            .map_err(|e| self.unreachable(&e))?;
        if response.status != 200 {
            return Err(self.refused(&response, None));
        }
        let mut body = Vec::new();
        response
            .body
            .read_to_end(&mut body)
            .map_err(|error| self.unreachable(&ConnectionError::at(&url, &error)))?;
        let info: Option<Value> = serde_json::from_slice(&body).ok();
        info.as_ref().and_then(Listing::parse).with_context(|| {
            format!(
                "`{}` does not answer as the hub does\n\n\
                 hint: HF_ENDPOINT is the hub's address, by default `{ENDPOINT}`",
                self.hub.endpoint
            )
        })
    }

    /// Sees to it that `file` is in the snapshot, whole and verified. Returns its path there.
    fn fetch(&self, listing: &Listing, file: &str) -> Result<PathBuf> {
        let pointer = self.cache.snapshot_path(&listing.commit).join(file);
        if pointer.is_file() {
            return Ok(pointer);
        }
        self.bar.set_message(file.to_string());
        let metadata = self.file_metadata(&listing.commit, file)?;
        if listing.files.get(file).copied().flatten().is_none() {
            self.bar.inc_length(metadata.size);
        }
        let start = self.bar.position();

        let blob = self.cache.blob_path(&metadata.etag);
        let lock = self.lock(&metadata.etag, file)?;
        if fs::metadata(&blob).map(|found| found.len()).ok() != Some(metadata.size) {
            // Without a lock (some network file systems) no other process may share the name.
            let part = match &lock {
                Some(_) => format!("{}.incomplete", metadata.etag),
                None => format!("{}.{}.incomplete", metadata.etag, std::process::id()),
            };
            let part = blob.with_file_name(part);
            self.transfer(listing, file, &metadata, &part)?;
            fs::rename(&part, &blob).map_err(|e| self.disk(&e, &blob))?;
        }
        self.bar.set_position(start + metadata.size);
        cache::link(&blob, &pointer, file).map_err(|e| self.disk(&e, &pointer))?;
        Ok(pointer)
    }

    /// Asks for one byte of `file` to learn its checksum, its size, and where a large file really
    /// is.
    fn file_metadata(&self, commit: &str, file: &str) -> Result<FileMetadata> {
        let mut url = self.client.file_url(&self.reference.repo, commit, file);
        let (mut etag, mut size) = (None, None);
        for _ in 0..MAX_REDIRECTS {
            let mut response = self
                .client
                .get(&url, Some("bytes=0-0"))
                .map_err(|e| self.unreachable(&e))?;
            etag = etag.or(response.linked_etag.take());
            size = size.or(response.linked_size);
            if let Some(next) = response.redirect(&url) {
                if !self.client.is_home(&next)
                    && let (Some(etag), Some(size)) = (&etag, size)
                {
                    return Ok(FileMetadata {
                        location: next,
                        etag: etag.clone(),
                        size,
                    });
                }
                url = next;
                continue;
            }
            size = match response.status {
                200 => size.or(response.content_length),
                206 => size.or(response.total_bytes()),
                _ => return Err(self.refused(&response, Some(file))),
            };
            // An etag becomes a file's name.
            let is_name = |etag: &String| {
                let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
                !etag.is_empty() && etag.bytes().all(plain)
            };
            return match (etag.or(response.etag).filter(is_name), size) {
                (Some(etag), Some(size)) => Ok(FileMetadata {
                    location: url,
                    etag,
                    size,
                }),
                _ => Err(anyhow!(
                    "the hub tells no checksum and size of `{file}`\n\n\
                     hint: HF_ENDPOINT is the hub's address, by default `{ENDPOINT}`"
                )),
            };
        }
        Err(anyhow!(
            "the hub redirects `{file}` in a circle\n\nhint: try again later, or check HF_ENDPOINT"
        ))
    }

    /// Brings the whole of a file to `part` and verifies it, continuing what is there already. A
    /// part with a wrong checksum is deleted.
    fn transfer(
        &self,
        listing: &Listing,
        file: &str,
        metadata: &FileMetadata,
        part: &Path,
    ) -> Result<()> {
        let start = self.bar.position();
        let mut location = metadata.location.clone();
        let mut cause = String::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                std::thread::sleep(PAUSE_BETWEEN_ATTEMPTS);
                // A signed address runs out.
                location = self.file_metadata(&listing.commit, file)?.location;
            }
            // What cannot be verified in the end is not continued.
            if !metadata.is_sha256() || length(part) > metadata.size {
                self.remove(part)?;
            }
            let resumed_at = length(part);
            self.bar.set_position(start + resumed_at);
            self.bar.reset_eta();
            match self.receive(&location, file, metadata.size, part) {
                Ok(()) => {}
                Err(TransferError::Fatal(error)) => return Err(error),
                Err(TransferError::Interrupted(why)) => {
                    cause = format!("the connection broke off ({why})");
                    continue;
                }
            }
            if !metadata.is_sha256()
                || sha256(part).map_err(|e| self.disk(&e, part))? == metadata.etag
            {
                return Ok(());
            }
            self.remove(part)?;
            cause = "its checksum is wrong".to_string();
            if resumed_at == 0 {
                break;
            }
        }
        let Reference { id, repo, .. } = self.reference;
        Err(anyhow!(
            "`{file}` of `{repo}` could not be downloaded: {cause}\n\n\
             hint: run `sdgen pull {id}` again; it continues with what is missing"
        ))
    }

    /// Sends one request for what `part` lacks of `size` bytes and appends them to it.
    fn receive(&self, url: &str, file: &str, size: u64, part: &Path) -> Result<(), TransferError> {
        let on_disk = |e: io::Error| TransferError::Fatal(self.disk(&e, part));
        fs::create_dir_all(part.parent().unwrap_or(part)).map_err(on_disk)?;
        let mut output = OpenOptions::new()
            .append(true)
            .create(true)
            .open(part)
            .map_err(on_disk)?;
        let mut received = length(part);
        if received < size {
            let (mut response, continued) = self.request_from(received, url, file)?;
            if !continued {
                output.set_len(0).map_err(on_disk)?;
                let position = self.bar.position().saturating_sub(received);
                self.bar.set_position(position);
                received = 0;
            }
            let mut buffer = vec![0; 1 << 18];
            loop {
                let n = response
                    .body
                    .read(&mut buffer)
                    .map_err(|e| TransferError::Interrupted(e.to_string()))?;
                let Some(chunk) = buffer.get(..n).filter(|chunk| !chunk.is_empty()) else {
                    break;
                };
                output.write_all(chunk).map_err(on_disk)?;
                received += n as u64;
                self.bar.inc(n as u64);
            }
        }
        if received != size {
            let why = format!("{received} of {size} bytes came");
            return Err(TransferError::Interrupted(why));
        }
        output.sync_all().map_err(on_disk)
    }

    /// Asks for the bytes of a file from `start` on. Returns the response and whether it begins
    /// there; a server that cannot continue begins at the beginning.
    fn request_from(
        &self,
        start: u64,
        url: &str,
        file: &str,
    ) -> Result<(Response, bool), TransferError> {
        let range = (start > 0).then(|| format!("bytes={start}-"));
        let (response, url) = self
            .client
            .get_redirected(url, range.as_deref())
            .map_err(|e| TransferError::Fatal(self.unreachable(&e)))?;
        match response.status {
            206 => Ok((response, true)),
            200 => Ok((response, start == 0)),
            // Elsewhere a refusal is of a signed address that has run out.
            status if status >= 500 || !self.client.is_home(&url) => {
                Err(TransferError::Interrupted(format!("status {status}")))
            }
            _ => Err(TransferError::Fatal(self.refused(&response, Some(file)))),
        }
    }

    /// Waits for other processes that fetch the same blob, by the lock that Python takes too.
    /// `None` where the file system has no locks.
    fn lock(&self, etag: &str, file: &str) -> Result<Option<File>> {
        let path = self.cache.lock_path(etag);
        let folder = path.parent().unwrap_or(&path);
        fs::create_dir_all(folder).map_err(|e| self.disk(&e, folder))?;
        let lock = OpenOptions::new().append(true).create(true).open(&path);
        let lock = lock.map_err(|e| self.disk(&e, &path))?;
        if lock.try_lock().is_ok() {
            return Ok(Some(lock));
        }
        self.bar
            .set_message(format!("{file} (another process fetches it)"));
        self.bar.tick();
        Ok(lock.lock().is_ok().then_some(lock))
    }

    fn write(&self, path: &Path, text: &str) -> Result<()> {
        cache::write(path, text).map_err(|e| self.disk(&e, path))
    }

    fn remove(&self, part: &Path) -> Result<()> {
        match fs::remove_file(part) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(self.disk(&e, part)),
            _ => Ok(()),
        }
    }

    fn disk(&self, error: &io::Error, path: &Path) -> anyhow::Error {
        let total = self.bar.length().unwrap_or(0);
        let missing = total.saturating_sub(self.bar.position());
        errors::disk(error, path, missing, self.reference)
    }

    fn unreachable(&self, error: &ConnectionError) -> anyhow::Error {
        errors::unreachable(error, self.reference)
    }

    fn refused(&self, response: &Response, file: Option<&str>) -> anyhow::Error {
        errors::refused(response, file, self.hub, self.reference)
    }
}

impl Listing {
    /// Reads the hub's `{"sha": .., "siblings": [{"rfilename": .., "size": ..}, ..]}`, leaving out
    /// names that would lead out of the snapshot. `None` where it is something else.
    fn parse(info: &Value) -> Option<Listing> {
        let commit = info
            .get("sha")?
            .as_str()
            .filter(|sha| is_commit(sha))?
            .to_string();
        let mut files = BTreeMap::new();
        for sibling in info.get("siblings")?.as_array()? {
            let name = sibling.get("rfilename")?.as_str()?;
            let outside =
                |part: &str| part.is_empty() || part == "." || part == ".." || part.contains('\\');
            if !name.split('/').any(outside) {
                let size = sibling.get("size").and_then(Value::as_u64);
                files.insert(name.to_string(), size);
            }
        }
        Some(Listing { commit, files })
    }
}

/// Bytes of a file; 0 where there is none.
fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |found| found.len())
}

/// SHA-256 of a file's contents, in hexadecimal.
fn sha256(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut input = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = input.read(&mut buffer)?;
        let Some(chunk) = buffer.get(..n).filter(|chunk| !chunk.is_empty()) else {
            break;
        };
        hasher.update(chunk);
    }
    Ok(hex(&hasher.finalize()))
}
