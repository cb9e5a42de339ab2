//! The hub's client against a server on loopback that speaks the hub's protocol: the listing of a
//! repository, `resolve` with its checksums in headers, large files redirected to another origin.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::common::{fail, sdgen, stderr, stdout, succeed};
use sdgen::hub::{Hub, Wanted};
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const OTHER_COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";
const TOKEN: &str = "hf_secret";

/// A hub that speaks https with a certificate of its own, and answers every request with 404.
fn start_https() -> u16 {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let pem = |name: &str| fs::read(crate::common::fixture("hub").join(name)).unwrap();
    let certificate = CertificateDer::from_pem_slice(&pem("server.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_slice(&pem("server.key")).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(
        rustls::crypto::ring::default_provider(),
    ))
    .with_safe_default_protocol_versions()
    .unwrap()
    .with_no_client_auth()
    .with_single_cert(vec![certificate], key)
    .unwrap();
    let (config, listener) = (Arc::new(config), TcpListener::bind("127.0.0.1:0").unwrap());
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let connection = rustls::ServerConnection::new(config.clone()).unwrap();
            let mut stream = rustls::StreamOwned::new(connection, stream);
            let mut lines = BufReader::new(&mut stream).lines();
            while lines
                .next()
                .is_some_and(|line| line.is_ok_and(|line| !line.is_empty()))
            {}
            let answer =
                b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            stream.write_all(answer).unwrap_or_default();
            stream.conn.send_close_notify();
            stream.flush().unwrap_or_default();
        }
    });
    port
}

#[test]
fn a_hub_behind_an_authority_of_its_own_is_trusted_where_ssl_cert_file_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let port = start_https();
    let pull = |certificates: Option<PathBuf>| {
        let mut command = sdgen(dir.path());
        command
            .args(["pull", "owner/tiny"])
            .env("HF_HUB_OFFLINE", "0")
            .env("HF_HOME", dir.path())
            .env("HF_ENDPOINT", format!("https://localhost:{port}"))
            .env_remove("SSL_CERT_DIR")
            .env_remove("SSL_CERT_FILE");
        if let Some(certificates) = certificates {
            command.env("SSL_CERT_FILE", certificates);
        }
        command
    };
    let unknown = [
        "cannot reach `https://localhost",
        "certificate",
        "SSL_CERT_FILE names the file",
    ];
    fail(&mut pull(None), 3, &unknown);
    let known = crate::common::fixture("hub").join("ca.pem");
    fail(
        &mut pull(Some(known)),
        3,
        &["`owner/tiny` does not exist on the hub (404)"],
    );
    let nothing = dir.path().join("nothing.pem");
    let said = [
        "SSL_CERT_FILE is `",
        "where no certificate can be read",
        "hint: ",
    ];
    fail(&mut pull(Some(nothing)), 3, &said);
}

#[test]
fn paths_in_variables_are_expanded_as_python_expands_them() {
    let hub = |variables: &[(&str, &str)]| {
        let lookup = |name: &str| {
            let found = variables.iter().find(|(own, _)| *own == name);
            found.map(|(_, value)| OsString::from(value))
        };
        Hub::from_lookup(true, &lookup).cache_dir
    };
    for (value, expected) in [
        ("$HOME/hf", "/home/me/hf/hub"),
        ("${HOME}/hf", "/home/me/hf/hub"),
        ("~/$NAME-x", "/home/me/n-x/hub"),
        ("/a/$UNKNOWN/b$", "/a/$UNKNOWN/b$/hub"),
        ("/a/${UNKNOWN}/b", "/a/${UNKNOWN}/b/hub"),
    ] {
        let variables = [("HOME", "/home/me"), ("NAME", "n"), ("HF_HOME", value)];
        assert_eq!(hub(&variables), PathBuf::from(expected), "{value}");
    }
}

/// What one request said.
#[derive(Clone, Debug)]
struct Seen {
    /// Whether it came to the storage behind the redirect.
    storage: bool,
    path: String,
    authorization: Option<String>,
    range: Option<String>,
}

/// What the server holds and how it misbehaves.
#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    seen: Vec<Seen>,
    /// Storage sends so many bytes and hangs up, so many times.
    hang_up: Option<(usize, usize)>,
    /// Storage knows nothing of `Range`.
    ignores_range: bool,
    /// Storage refuses the signed address, so many times.
    expired: usize,
    /// Storage changes a byte.
    corrupts: bool,
    /// Every request is answered with this status and `X-Error-Code`.
    refuses: Option<(u16, &'static str)>,
    /// No answer at all.
    silent: bool,
    /// The repository, in place of `me/model`.
    repo: Option<String>,
}

/// How long a silent server holds a connection open before it closes it: longer than any machine
/// takes to notice 200 ms without an answer.
const SILENCE: Duration = Duration::from_secs(120);

/// The hub and its storage, on two ports.
struct Server {
    hub: String,
    state: Arc<Mutex<State>>,
}

fn hex_sha256(bytes: &[u8]) -> String {
    sdgen::hex::hex(&Sha256::digest(bytes))
}

/// Large files are the weights; the etag of the others has the length of git's SHA-1.
fn etag(name: &str, bytes: &[u8]) -> String {
    let sha256 = hex_sha256(bytes);
    if is_large(name) {
        sha256
    } else {
        sha256[..40].to_string()
    }
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".bin")
}

impl Server {
    fn start(files: BTreeMap<String, Vec<u8>>) -> Server {
        let state = Arc::new(Mutex::new(State {
            files,
            ..State::default()
        }));
        let hub = TcpListener::bind("127.0.0.1:0").unwrap();
        let storage = TcpListener::bind("127.0.0.1:0").unwrap();
        let storage_url = format!("http://{}", storage.local_addr().unwrap());
        let hub_url = format!("http://{}", hub.local_addr().unwrap());
        for (listener, at_storage) in [(hub, false), (storage, true)] {
            let (state, storage_url) = (state.clone(), storage_url.clone());
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (state, storage_url) = (state.clone(), storage_url.clone());
                    std::thread::spawn(move || serve(stream, at_storage, &storage_url, &state));
                }
            });
        }
        Server {
            hub: hub_url,
            state,
        }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    fn seen(&self) -> Vec<Seen> {
        self.state.lock().unwrap().seen.clone()
    }

    fn forget(&self) {
        self.set(|state| state.seen.clear());
    }

    /// Requests for contents of `file`, not for its one byte with the headers.
    fn transfers(&self, file: &str) -> Vec<Seen> {
        let probe = Some("bytes=0-0".to_string());
        let of_file = |seen: &Seen| seen.path.ends_with(file) && seen.range != probe;
        self.seen().into_iter().filter(of_file).collect()
    }
}

fn serve(
    mut stream: TcpStream,
    storage: bool,
    storage_url: &str,
    state: &Mutex<State>,
) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let target = line.split(' ').nth(1)?.to_string();
    let path = target.split('?').next()?.to_string();
    let (mut authorization, mut range) = (None, None);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        match name.to_ascii_lowercase().as_str() {
            "authorization" => authorization = Some(value.trim().to_string()),
            "range" => range = Some(value.trim().to_string()),
            _ => {}
        }
    }

    let mut state = state.lock().unwrap();
    let seen = Seen {
        storage,
        path: path.clone(),
        authorization,
        range: range.clone(),
    };
    state.seen.push(seen);
    if state.silent {
        drop(state);
        std::thread::sleep(SILENCE);
        return None;
    }
    let mut answer = |head: String, body: &[u8]| {
        let close = "Connection: close\r\n\r\n";
        stream
            .write_all(format!("HTTP/1.1 {head}\r\n{close}").as_bytes())
            .ok()?;
        stream.write_all(body).ok()
    };
    if let Some((status, code)) = state.refuses {
        return answer(
            format!("{status} No\r\nX-Error-Code: {code}\r\nContent-Length: 0"),
            b"",
        );
    }
    let repo = state.repo.clone().unwrap_or("me/model".into());
    if path.starts_with(&format!("/api/models/{repo}/revision/")) {
        let file = |(name, bytes): (&String, &Vec<u8>)| {
            format!(r#"{{"rfilename": "{name}", "size": {}}}"#, bytes.len())
        };
        let files: Vec<String> = state.files.iter().map(file).collect();
        let body = format!(
            r#"{{"sha": "{COMMIT}", "siblings": [{}]}}"#,
            files.join(",")
        );
        return answer(
            format!("200 OK\r\nContent-Length: {}", body.len()),
            body.as_bytes(),
        );
    }
    let at_resolve = path.strip_prefix(&format!("/{repo}/resolve/{COMMIT}/"));
    let cached = path.strip_prefix("/api/resolve-cache/");
    let name = match storage {
        true => path.strip_prefix("/bucket/"),
        false => at_resolve.or(cached),
    };
    let found = name.and_then(|name| Some((name.to_string(), state.files.get(name)?.clone())));
    let Some((name, mut bytes)) = found else {
        return answer(
            "404 Not Found\r\nX-Error-Code: EntryNotFound\r\nContent-Length: 0".into(),
            b"",
        );
    };
    let (etag, size) = (etag(&name, &bytes), bytes.len());
    if !storage && cached.is_none() {
        // Large files lie elsewhere, small ones behind a path of the hub itself.
        let location = match is_large(&name) {
            true => format!("{storage_url}/bucket/{name}?signature=https://x"),
            false => format!("/api/resolve-cache/{name}?etag=https://x"),
        };
        return answer(
            format!(
                "302 Found\r\nLocation: {location}\r\nX-Repo-Commit: {COMMIT}\r\n\
                 X-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {size}\r\nETag: \"of-the-redirect\"\r\nContent-Length: 0"
            ),
            b"",
        );
    }
    if storage && state.expired > 0 {
        state.expired -= 1;
        return answer("403 Forbidden\r\nContent-Length: 0".into(), b"");
    }
    if storage && state.corrupts {
        bytes[size / 2] ^= 1;
    }
    let start_end = range.filter(|_| !(storage && state.ignores_range));
    let (status, body) = match start_end
        .as_deref()
        .and_then(|r| r.strip_prefix("bytes=")?.split_once('-'))
    {
        Some((start, end)) => {
            let start: usize = start.parse().ok()?;
            let end = end.parse().unwrap_or(size - 1);
            (
                format!("206 Partial\r\nContent-Range: bytes {start}-{end}/{size}"),
                &bytes[start..=end],
            )
        }
        None => ("200 OK".to_string(), &bytes[..]),
    };
    let mut sent = body;
    if let Some((after, times @ 1..)) = state.hang_up.filter(|_| storage) {
        sent = &body[..after.min(body.len())];
        state.hang_up = Some((after, times - 1));
    }
    drop(state);
    let head = format!(
        "{status}\r\nETag: \"{etag}\"\r\nContent-Length: {}",
        body.len()
    );
    answer(head, sent)
}

/// Contents that differ from file to file.
fn contents(name: &str, size: usize) -> Vec<u8> {
    let seed = name
        .bytes()
        .fold(7u8, |a, b| a.wrapping_mul(31).wrapping_add(b));
    (0..size)
        .map(|i| {
            (i as u8)
                .wrapping_mul(seed | 1)
                .wrapping_add((i >> 8) as u8)
        })
        .collect()
}

const INDEX: &str = r#"{"_class_name": "StableDiffusionPipeline",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": [null, null], "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}"#;

/// What sdgen needs of [`diffusers_repo`], where `fp16` is not complete for the U-Net and not there
/// for the VAE.
const NEEDED: [&str; 14] = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];

/// A repository with every kind of file that the hub's repositories have.
fn diffusers_repo() -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let unneeded = [
        "README.md",
        "feature_extractor/preprocessor_config.json",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder/pytorch_model.fp16.bin",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "v1-5-pruned.safetensors",
        "vae/diffusion_pytorch_model.bin",
    ];
    for name in NEEDED.into_iter().chain(unneeded) {
        let size = if is_large(name) { 300_000 } else { 1_000 };
        files.insert(name.to_string(), contents(name, size));
    }
    let shards = |variant: &str| {
        format!(
            r#"{{"weight_map": {{"a": "diffusion_pytorch_model{variant}-00001-of-00002.safetensors",
                "b": "diffusion_pytorch_model{variant}-00002-of-00002.safetensors",
                "c": "diffusion_pytorch_model{variant}-00002-of-00002.safetensors"}}}}"#
        )
    };
    let mut json = |name: &str, text: String| files.insert(name.to_string(), text.into_bytes());
    json("model_index.json", INDEX.to_string());
    json(
        "unet/diffusion_pytorch_model.safetensors.index.json",
        shards(""),
    );
    json(
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        shards(".fp16"),
    );
    files
}

/// One checkpoint at the top.
fn single_repo() -> BTreeMap<String, Vec<u8>> {
    let names = ["README.md", "model.safetensors", "extra/lora.safetensors"];
    names
        .into_iter()
        .map(|name| (name.to_string(), contents(name, 200_000)))
        .collect()
}

fn hub(server: &Server, cache: &Path) -> Hub {
    Hub {
        endpoint: server.hub.clone(),
        cache_dir: cache.to_path_buf(),
        token: None,
        offline: false,
        timeout: Duration::from_secs(10),
    }
}

fn offline(server: &Server, cache: &Path) -> Hub {
    Hub {
        offline: true,
        ..hub(server, cache)
    }
}

fn repo_dir(cache: &Path) -> PathBuf {
    cache.join("models--me--model")
}

/// Every file below `folder`, relative to it.
fn tree(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().into_string().unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(
                tree(&entry.path())
                    .iter()
                    .map(|below| format!("{name}/{below}")),
            ),
            false => found.push(name),
        }
    }
    found.sort();
    found
}

fn error_of(result: anyhow::Result<PathBuf>) -> String {
    format!("{:#}", result.expect_err("a failure"))
}

/// Both parts of an error are there: the cause without a full stop, and what to type.
fn assert_says(error: &str, cause: &str, hint: &str) {
    let (said, hinted) = error
        .split_once("\n\nhint: ")
        .unwrap_or_else(|| panic!("no hint: {error}"));
    assert!(said.contains(cause), "`{cause}` is not in: {error}");
    assert!(hinted.contains(hint), "`{hint}` is not in: {error}");
    assert!(!said.ends_with('.'), "{error}");
}

#[test]
fn only_the_needed_files_come_and_the_second_call_asks_nothing() {
    let (server, dir) = (
        Server::start(diffusers_repo()),
        tempfile::tempdir().unwrap(),
    );
    let folder = hub(&server, dir.path())
        .snapshot("me/model", false)
        .unwrap();
    assert_eq!(folder, repo_dir(dir.path()).join("snapshots").join(COMMIT));
    // The unfinished fp16 variant's index is read to see that it is unfinished.
    let mut expected = NEEDED.to_vec();
    expected.push("unet/diffusion_pytorch_model.safetensors.index.fp16.json");
    expected.sort();
    assert_eq!(tree(&folder), expected);
    for name in tree(&folder) {
        assert_eq!(
            fs::read(folder.join(&name)).unwrap(),
            diffusers_repo()[&name],
            "{name}"
        );
    }

    server.forget();
    let again = hub(&server, dir.path())
        .snapshot("me/model", false)
        .unwrap();
    assert_eq!(again, folder);
    assert_eq!(
        offline(&server, dir.path())
            .snapshot("me/model", false)
            .unwrap(),
        folder
    );
    assert!(server.seen().is_empty(), "{:?}", server.seen());
}

#[test]
fn what_is_written_has_the_layout_of_huggingface_hub() {
    let (server, dir) = (
        Server::start(diffusers_repo()),
        tempfile::tempdir().unwrap(),
    );
    let folder = hub(&server, dir.path())
        .snapshot("me/model", false)
        .unwrap();
    let repo = repo_dir(dir.path());
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    for (name, up) in [
        ("model_index.json", "../.."),
        ("vae/diffusion_pytorch_model.safetensors", "../../.."),
    ] {
        let etag = etag(name, &diffusers_repo()[name]);
        let link = fs::read_link(folder.join(name)).unwrap();
        assert_eq!(link, Path::new(up).join("blobs").join(&etag));
        assert!(repo.join("blobs").join(etag).is_file());
    }
    assert!(
        tree(&repo.join("blobs"))
            .iter()
            .all(|blob| !blob.contains('.')),
        "{:?}",
        tree(&repo)
    );
}

#[test]
fn complete_fp16_weights_are_preferred() {
    let mut files = diffusers_repo();
    let names = [
        "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ];
    for name in names {
        files.insert(name.to_string(), contents(name, 1000));
    }
    let (server, dir) = (Server::start(files), tempfile::tempdir().unwrap());
    let folder = hub(&server, dir.path())
        .snapshot("me/model", false)
        .unwrap();
    let weights: Vec<String> = tree(&folder)
        .into_iter()
        .filter(|name| is_large(name))
        .collect();
    assert_eq!(
        weights,
        [
            "text_encoder/model.fp16.safetensors",
            "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
            "vae/diffusion_pytorch_model.fp16.safetensors",
        ]
    );
}

/// Writes files as Python does: contents under `blobs`, relative links under `snapshots`.
fn write_python_cache(cache: &Path, commit: &str, files: &BTreeMap<String, Vec<u8>>) -> PathBuf {
    let repo = repo_dir(cache);
    let folder = repo.join("snapshots").join(commit);
    fs::create_dir_all(repo.join("blobs")).unwrap();
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), commit).unwrap();
    for (name, bytes) in files {
        let (link, etag) = (folder.join(name), etag(name, bytes));
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        fs::write(repo.join("blobs").join(&etag), bytes).unwrap();
        let target = format!(
            "{}../../blobs/{etag}",
            "../".repeat(name.matches('/').count())
        );
        std::os::unix::fs::symlink(target, link).unwrap();
    }
    folder
}

#[test]
fn a_cache_that_python_wrote_is_read_without_a_request() {
    let (server, dir) = (Server::start(BTreeMap::new()), tempfile::tempdir().unwrap());
    // Python's user wanted the f32 weights.
    let mut files = diffusers_repo();
    files.retain(|name, _| !name.contains("fp16"));
    let folder = write_python_cache(dir.path(), OTHER_COMMIT, &files);
    for hub in [hub(&server, dir.path()), offline(&server, dir.path())] {
        assert_eq!(hub.snapshot("me/model", false).unwrap(), folder);
        assert_eq!(
            hub.snapshot(&format!("me/model@{OTHER_COMMIT}"), false)
                .unwrap(),
            folder
        );
        let file = hub
            .snapshot("me/model/v1-5-pruned.safetensors", false)
            .unwrap();
        assert_eq!(file, folder.join("v1-5-pruned.safetensors"));
    }
    assert!(server.seen().is_empty(), "{:?}", server.seen());
}

#[test]
fn files_missing_in_the_cache_are_fetched_and_no_others() {
    let (server, dir) = (
        Server::start(diffusers_repo()),
        tempfile::tempdir().unwrap(),
    );
    let mut files = diffusers_repo();
    files.retain(|name, _| name != "vae/config.json");
    let folder = write_python_cache(dir.path(), COMMIT, &files);
    // A link whose blob is gone is a missing file.
    let gone = "text_encoder/model.fp16.safetensors";
    fs::remove_file(fs::canonicalize(folder.join(gone)).unwrap()).unwrap();
    fs::remove_file(folder.join("text_encoder/model.safetensors")).unwrap();

    let error = error_of(offline(&server, dir.path()).snapshot("me/model", false));
    assert_says(
        &error,
        "`text_encoder/model.safetensors` is missing",
        "sdgen pull me/model",
    );
    assert!(server.seen().is_empty(), "{:?}", server.seen());

    assert_eq!(
        hub(&server, dir.path())
            .snapshot("me/model", false)
            .unwrap(),
        folder
    );
    assert_eq!(fs::read(folder.join(gone)).unwrap(), diffusers_repo()[gone]);
    let asked = |seen: &Seen| !seen.path.ends_with("vae/config.json") && !seen.path.ends_with(gone);
    let others = server.seen().into_iter().filter(|seen| asked(seen)).count();
    assert_eq!(others, 1, "the listing alone: {:?}", server.seen());
}

#[test]
fn offline_asks_nothing_and_says_how_to_get_the_model() {
    let (server, dir) = (
        Server::start(diffusers_repo()),
        tempfile::tempdir().unwrap(),
    );
    let error = error_of(offline(&server, dir.path()).snapshot("me/model", false));
    assert_says(
        &error,
        "`me/model` is not in the hub's cache",
        "sdgen pull me/model",
    );
    assert_says(&error, "the network is off", "HF_HUB_OFFLINE");
    assert_says(&error, "off", "--offline");
    let error = error_of(offline(&server, dir.path()).snapshot("me/model@dev", false));
    assert_says(&error, "revision `dev`", "sdgen pull me/model@dev");
    assert!(server.seen().is_empty(), "{:?}", server.seen());
    assert!(tree(dir.path()).is_empty(), "nothing is written");
}

#[test]
fn a_transfer_that_breaks_off_is_continued_at_once() {
    let (server, dir) = (Server::start(single_repo()), tempfile::tempdir().unwrap());
    server.set(|state| state.hang_up = Some((70_000, 1)));
    let file = hub(&server, dir.path())
        .snapshot("me/model", false)
        .unwrap();
    assert_eq!(fs::read(file).unwrap(), single_repo()["model.safetensors"]);
    let ranges: Vec<Option<String>> = server
        .transfers("model.safetensors")
        .into_iter()
        .filter(|s| s.storage)
        .map(|s| s.range)
        .collect();
    assert_eq!(ranges, [None, Some("bytes=70000-".to_string())]);
}

#[test]
fn an_interrupted_download_is_continued_by_the_next_call() {
    let (server, dir) = (Server::start(single_repo()), tempfile::tempdir().unwrap());
    server.set(|state| state.hang_up = Some((10_000, 1000)));
    let error = error_of(hub(&server, dir.path()).snapshot("me/model", false));
    assert_says(&error, "the connection broke off", "sdgen pull me/model");
    let blobs = repo_dir(dir.path()).join("blobs");
    let etag = hex_sha256(&single_repo()["model.safetensors"]);
    assert_eq!(
        tree(&blobs),
        [format!("{etag}.incomplete")],
        "nothing under the final name"
    );
    assert!(!repo_dir(dir.path()).join("snapshots").exists());
    assert!(!repo_dir(dir.path()).join("refs").exists());

    server.set(|state| state.hang_up = None);
    server.forget();
    let file = hub(&server, dir.path())
        .snapshot("me/model", false)
        .unwrap();
    assert_eq!(fs::read(file).unwrap(), single_repo()["model.safetensors"]);
    assert_eq!(tree(&blobs), [etag]);
    let transfers = server.transfers("model.safetensors");
    let range = transfers
        .iter()
        .find(|seen| seen.storage)
        .and_then(|seen| seen.range.clone());
    assert_eq!(
        range.as_deref(),
        Some("bytes=50000-"),
        "five tries of 10000 bytes were kept"
    );
}

#[test]
fn a_half_file_is_started_again_where_the_server_cannot_continue_or_it_was_wrong() {
    let whole = &single_repo()["model.safetensors"];
    let half = whole[..100_000].to_vec();
    let too_long = vec![0; whole.len() + 1];
    let wrong = vec![0; 100_000];
    let wrong_whole = vec![0; whole.len()];
    for (part, ignores_range) in [
        (half, true),
        (too_long, false),
        (wrong, false),
        (wrong_whole, false),
    ] {
        let (server, dir) = (Server::start(single_repo()), tempfile::tempdir().unwrap());
        server.set(|state| state.ignores_range = ignores_range);
        let blobs = repo_dir(dir.path()).join("blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(
            blobs.join(format!("{}.incomplete", hex_sha256(whole))),
            part,
        )
        .unwrap();
        let file = hub(&server, dir.path())
            .snapshot("me/model", false)
            .unwrap();
        assert_eq!(&fs::read(file).unwrap(), whole);
        assert_eq!(tree(&blobs), [hex_sha256(whole)]);
        if ignores_range {
            let transfers = server
                .transfers("model.safetensors")
                .into_iter()
                .filter(|seen| seen.storage);
            assert_eq!(transfers.count(), 1, "the whole file is taken as it comes");
        }
    }
}

#[test]
fn a_signed_address_that_has_run_out_is_asked_for_again() {
    let (server, dir) = (Server::start(single_repo()), tempfile::tempdir().unwrap());
    server.set(|state| state.expired = 2);
    let file = hub(&server, dir.path())
        .snapshot("me/model", false)
        .unwrap();
    assert_eq!(fs::read(file).unwrap(), single_repo()["model.safetensors"]);
}

#[test]
fn the_weights_come_last_so_that_half_a_model_does_not_look_whole() {
    let (server, dir) = (
        Server::start(diffusers_repo()),
        tempfile::tempdir().unwrap(),
    );
    server.set(|state| state.hang_up = Some((0, 1000)));
    error_of(hub(&server, dir.path()).snapshot("me/model", false));
    let folder = repo_dir(dir.path()).join("snapshots").join(COMMIT);
    for name in NEEDED {
        assert_eq!(folder.join(name).exists(), !is_large(name), "{name}");
    }
    let seen = server.seen();
    let first = |name: &str| {
        seen.iter()
            .position(|seen| seen.path.ends_with(name))
            .unwrap()
    };
    assert!(
        first("tokenizer/special_tokens_map.json") < first("tokenizer/vocab.json"),
        "what may be absent comes first"
    );
}

#[test]
fn a_wrong_checksum_is_refused_and_leaves_nothing() {
    let (server, dir) = (Server::start(single_repo()), tempfile::tempdir().unwrap());
    server.set(|state| state.corrupts = true);
    let error = error_of(hub(&server, dir.path()).snapshot("me/model", false));
    assert_says(
        &error,
        "`model.safetensors` of `me/model`",
        "sdgen pull me/model",
    );
    assert_says(&error, "checksum is wrong", "again");
    assert!(
        tree(&repo_dir(dir.path())).is_empty(),
        "{:?}",
        tree(dir.path())
    );
}

#[test]
fn the_token_goes_to_the_hub_and_not_to_its_storage() {
    let (server, dir) = (Server::start(single_repo()), tempfile::tempdir().unwrap());
    let hub = Hub {
        token: Some(TOKEN.to_string()),
        ..hub(&server, dir.path())
    };
    hub.snapshot("me/model", false).unwrap();
    let seen = server.seen();
    assert!(seen.iter().any(|seen| seen.storage) && seen.iter().any(|seen| !seen.storage));
    for seen in seen {
        let expected = (!seen.storage).then(|| format!("Bearer {TOKEN}"));
        assert_eq!(seen.authorization, expected, "{seen:?}");
    }
}

#[test]
fn refusals_say_what_to_do() {
    let (server, dir) = (Server::start(single_repo()), tempfile::tempdir().unwrap());
    let anonymous = hub(&server, dir.path());
    let known = Hub {
        token: Some(TOKEN.to_string()),
        ..hub(&server, dir.path())
    };
    let cases = [
        (
            &anonymous,
            401,
            "GatedRepo",
            "`me/model` is gated",
            "HF_TOKEN",
        ),
        (
            &known,
            403,
            "GatedRepo",
            "`me/model` is gated",
            "accept it on http://127.0.0.1",
        ),
        (
            &anonymous,
            401,
            "RepoNotFound",
            "`me/model` does not exist, or is not open",
            "licence",
        ),
        (&known, 401, "", "does not accept the token", "HF_TOKEN"),
        (
            &anonymous,
            404,
            "RepoNotFound",
            "`me/model` does not exist",
            "check the name",
        ),
        (
            &anonymous,
            404,
            "RevisionNotFound",
            "no revision `main`",
            "branches",
        ),
        (&anonymous, 429, "", "no more requests", "wait"),
        (&anonymous, 503, "", "503", "later"),
    ];
    for (hub, status, code, cause, hint) in cases {
        server.set(|state| state.refuses = Some((status, code)));
        assert_says(&error_of(hub.snapshot("me/model", false)), cause, hint);
    }
    assert!(tree(dir.path()).is_empty(), "nothing is written");
}

#[test]
fn no_connection_and_no_answer_are_told_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(single_repo());
    server.set(|state| state.silent = true);
    let hub = Hub {
        timeout: Duration::from_millis(200),
        ..hub(&server, dir.path())
    };
    let start = Instant::now();
    assert_says(
        &error_of(hub.snapshot("me/model", false)),
        "cannot reach `http://127.0.0.1",
        "HF_ENDPOINT",
    );
    assert!(start.elapsed() < SILENCE / 2, "{:?}", start.elapsed());

    let closed = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let hub = Hub {
        endpoint: format!("http://{closed}"),
        ..hub
    };
    let error = error_of(hub.snapshot("me/model", false));
    assert_says(&error, "onnection refused", "check the network");
}

#[test]
fn a_file_is_named_by_its_path_and_a_single_checkpoint_needs_no_name() {
    let (server, dir) = (Server::start(single_repo()), tempfile::tempdir().unwrap());
    let hub = hub(&server, dir.path());
    let folder = repo_dir(dir.path()).join("snapshots").join(COMMIT);
    let named = hub
        .snapshot("me/model/extra/lora.safetensors", false)
        .unwrap();
    assert_eq!(named, folder.join("extra/lora.safetensors"));
    assert_eq!(tree(&folder), ["extra/lora.safetensors"]);
    assert_eq!(
        hub.snapshot("me/model", false).unwrap(),
        folder.join("model.safetensors")
    );
    server.forget();
    hub.snapshot("me/model", false).unwrap();
    hub.snapshot("me/model/extra/lora.safetensors", false)
        .unwrap();
    assert!(server.seen().is_empty(), "{:?}", server.seen());

    let error = error_of(hub.snapshot("me/model/absent.safetensors", false));
    assert_says(
        &error,
        "`me/model` has no `absent.safetensors`",
        "me/model/model.safetensors",
    );
}

#[test]
fn one_cached_checkpoint_of_many_files_is_not_taken_for_the_model() {
    let mut files = single_repo();
    files.insert("other.safetensors".to_string(), contents("other", 1000));
    let (server, dir) = (Server::start(files), tempfile::tempdir().unwrap());
    let hub = hub(&server, dir.path());
    hub.snapshot("me/model/model.safetensors", false).unwrap();
    let error = error_of(hub.snapshot("me/model", false));
    assert_says(
        &error,
        "2 checkpoints",
        "me/model/model.safetensors\n    me/model/other.safetensors",
    );
}

#[test]
fn repositories_that_cannot_be_drawn_with_are_refused_before_their_weights_come() {
    let pickled = |name: &String, _: &mut Vec<u8>| !name.ends_with(".safetensors");
    let mut files = diffusers_repo();
    files.retain(pickled);
    let (server, dir) = (Server::start(files), tempfile::tempdir().unwrap());
    let error = error_of(hub(&server, dir.path()).snapshot("me/model", false));
    assert_says(
        &error,
        "has no `text_encoder/model.safetensors`",
        "pickled weights only",
    );

    let mut files = diffusers_repo();
    files.remove("vae/diffusion_pytorch_model.safetensors");
    let (server, dir) = (Server::start(files), tempfile::tempdir().unwrap());
    let error = error_of(hub(&server, dir.path()).snapshot("me/model", false));
    assert_says(
        &error,
        "has no `vae/diffusion_pytorch_model.safetensors`",
        "name it:\n    me/model/v1-5-pruned.safetensors",
    );
    assert!(!error.contains("safety_checker") && server.seen().iter().all(|seen| !seen.storage));

    let mut files = diffusers_repo();
    let index = INDEX
        .replace("unet", "transformer")
        .replace("StableDiffusionPipeline", "FluxPipeline");
    files.insert("model_index.json".to_string(), index.into_bytes());
    let (server, dir) = (Server::start(files), tempfile::tempdir().unwrap());
    let error = error_of(hub(&server, dir.path()).snapshot("me/model", false));
    assert_says(
        &error,
        "`FluxPipeline`, which sdgen does not draw",
        "Stable Diffusion",
    );
    assert!(server.seen().iter().all(|seen| !seen.storage));
}

#[test]
fn names_that_lead_out_of_the_cache_are_refused() {
    // A repository whose index names a shard far outside.
    let mut files = diffusers_repo();
    files.retain(|name, _| !name.contains("fp16"));
    let index = r#"{"weight_map": {"a": "../../../../evil.safetensors"}}"#;
    files.insert(
        "unet/diffusion_pytorch_model.safetensors.index.json".to_string(),
        index.into(),
    );
    files.insert(
        "text_encoder/model.fp16.safetensors".to_string(),
        vec![0; 10],
    );
    files.insert("unet/../../../../evil.safetensors".to_string(), vec![0; 10]);
    let (server, dir) = (Server::start(files), tempfile::tempdir().unwrap());
    let hub = hub(&server, dir.path());
    let error = error_of(hub.snapshot("me/model", false));
    assert_says(
        &error,
        "has no `unet/../../../../evil.safetensors`",
        "v1-5-pruned",
    );
    server.forget();
    for id in [
        "me",
        "me/",
        "/model",
        "me/..",
        "me/model/../x.safetensors",
        "me/model@../../x",
        "me/model@",
        "",
    ] {
        assert_says(
            &error_of(hub.snapshot(id, false)),
            "not a model of the hub",
            "owner/name",
        );
    }
    let error = error_of(hub.snapshot("me/model/model.ckpt", false));
    assert_says(
        &error,
        "not a `.safetensors` or `.gguf` file",
        "owner/name/file.safetensors",
    );
    assert!(server.seen().is_empty());
}

#[test]
fn a_server_that_is_no_hub_is_told_as_such() {
    let (server, dir) = (Server::start(single_repo()), tempfile::tempdir().unwrap());
    server.set(|state| state.refuses = Some((200, "")));
    let error = error_of(hub(&server, dir.path()).snapshot("me/model", false));
    assert_says(&error, "does not answer as the hub does", "HF_ENDPOINT");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told_and_the_file_does_not_appear() {
    let (server, dir) = (Server::start(single_repo()), tempfile::tempdir().unwrap());
    let blobs = repo_dir(dir.path()).join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    let etag = hex_sha256(&single_repo()["model.safetensors"]);
    std::os::unix::fs::symlink("/dev/full", blobs.join(format!("{etag}.incomplete"))).unwrap();
    let error = error_of(hub(&server, dir.path()).snapshot("me/model", false));
    assert_says(&error, "no space left on the disk", "HF_HOME");
    assert!(!blobs.join(etag).exists());
}

#[test]
fn an_unusable_cache_folder_is_told() {
    let (server, dir) = (Server::start(single_repo()), tempfile::tempdir().unwrap());
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = error_of(hub(&server, &file).snapshot("me/model", false));
    assert_says(&error, "cannot write", "HF_HOME");
}

#[test]
fn many_at_once_fetch_each_file_once() {
    let (server, dir) = (
        Server::start(diffusers_repo()),
        tempfile::tempdir().unwrap(),
    );
    let folders: Vec<PathBuf> = std::thread::scope(|scope| {
        let run = || {
            hub(&server, dir.path())
                .snapshot("me/model", false)
                .unwrap()
        };
        let threads: Vec<_> = (0..6).map(|_| scope.spawn(run)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(folders.iter().all(|folder| folder == &folders[0]));
    for name in tree(&folders[0]) {
        assert_eq!(
            fs::read(folders[0].join(&name)).unwrap(),
            diffusers_repo()[&name],
            "{name}"
        );
        if is_large(&name) {
            let transfers = server.transfers(&name);
            assert_eq!(
                transfers.iter().filter(|seen| seen.storage).count(),
                1,
                "{name}"
            );
        }
    }
    assert!(
        tree(dir.path())
            .iter()
            .all(|name| !name.contains(".incomplete") && !name.contains(".sdgen-"))
    );
}

fn from(variables: &[(&str, &str)], offline: bool) -> Hub {
    let lookup = |name: &str| {
        let (_, value) = variables.iter().find(|(variable, _)| *variable == name)?;
        Some(OsString::from(value))
    };
    Hub::from_lookup(offline, &lookup)
}

#[test]
fn the_cache_is_where_python_has_it() {
    let at = |variables: &[(&str, &str)]| from(variables, false).cache_dir;
    let home = ("HOME", "/home/me");
    assert_eq!(at(&[home]), Path::new("/home/me/.cache/huggingface/hub"));
    assert_eq!(
        at(&[home, ("XDG_CACHE_HOME", "/xdg")]),
        Path::new("/xdg/huggingface/hub")
    );
    assert_eq!(
        at(&[home, ("HF_HOME", "")]),
        Path::new("/home/me/.cache/huggingface/hub")
    );
    assert_eq!(
        at(&[home, ("HF_HOME", "~/hf"), ("XDG_CACHE_HOME", "/xdg")]),
        Path::new("/home/me/hf/hub")
    );
    let old = ("HUGGINGFACE_HUB_CACHE", "/old");
    assert_eq!(at(&[home, ("HF_HOME", "/hf"), old]), Path::new("/old"));
    assert_eq!(
        at(&[home, ("HF_HOME", "/hf"), old, ("HF_HUB_CACHE", "/new")]),
        Path::new("/new")
    );
}

#[test]
fn offline_is_the_flag_or_the_variable() {
    for value in ["1", "true", "True", "YES", "on"] {
        assert!(from(&[("HF_HUB_OFFLINE", value)], false).offline, "{value}");
    }
    for value in ["0", "false", "", "no"] {
        assert!(
            !from(&[("HF_HUB_OFFLINE", value)], false).offline,
            "{value}"
        );
        assert!(from(&[("HF_HUB_OFFLINE", value)], true).offline, "{value}");
    }
}

#[test]
fn endpoint_token_and_timeout_come_from_the_environment() {
    let hub = from(&[("HOME", "/nowhere")], false);
    assert_eq!(
        (hub.endpoint.as_str(), hub.token),
        ("https://huggingface.co", None)
    );
    let hub = from(
        &[
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "7"),
        ],
        false,
    );
    assert_eq!(
        (hub.endpoint.as_str(), hub.timeout),
        ("http://mirror", Duration::from_secs(7))
    );

    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().to_str().unwrap();
    fs::write(dir.path().join("token"), "of-the-login\n").unwrap();
    fs::write(dir.path().join("elsewhere"), "of-the-path").unwrap();
    let elsewhere = format!("{home}/elsewhere");
    let token = |more: &[(&str, &str)]| {
        let variables: Vec<(&str, &str)> =
            [("HF_HOME", home)].iter().chain(more).copied().collect();
        from(&variables, false).token
    };
    assert_eq!(token(&[]).as_deref(), Some("of-the-login"));
    assert_eq!(
        token(&[("HF_TOKEN_PATH", &elsewhere)]).as_deref(),
        Some("of-the-path")
    );
    assert_eq!(
        token(&[("HF_TOKEN_PATH", &elsewhere), ("HF_TOKEN", "of-the-shell")]).as_deref(),
        Some("of-the-shell")
    );
}

/// A fixture's files, as a repository would hold them.
fn fixture_repo(name: &str) -> BTreeMap<String, Vec<u8>> {
    fn walk(root: &Path, folder: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, files);
            } else if !path
                .file_name()
                .unwrap()
                .to_string_lossy()
                .starts_with("goldens")
            {
                files.insert(
                    path.strip_prefix(root).unwrap().to_str().unwrap().into(),
                    fs::read(&path).unwrap(),
                );
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name);
    let mut files = BTreeMap::new();
    walk(&root, &root, &mut files);
    files
}

/// The program, in a folder of its own, with this hub and its cache.
fn online(server: &Server, folder: &Path, cache: &Path) -> Command {
    let mut command = sdgen(folder);
    command
        .env("HF_ENDPOINT", &server.hub)
        .env("HF_HUB_CACHE", cache)
        .env_remove("HF_HUB_OFFLINE");
    command
}

#[test]
fn the_program_pulls_a_model_and_draws_it_offline_with_the_same_picture_as_from_the_folder() {
    let (dir, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(fixture_repo("sd1"));
    let run = |args: &[&str]| {
        stdout(&succeed(
            online(&server, dir.path(), cache.path()).args(args),
        ))
    };
    let folder = run(&["pull", "me/model"]);
    assert!(Path::new(folder.trim()).join("model_index.json").exists());
    let requests = server.seen().len();
    let draw = |model: &str, output: &str| {
        run(&[
            "a frog",
            "-s",
            "1",
            "--steps",
            "2",
            "-W",
            "16",
            "-H",
            "16",
            "--no-metadata",
            "--offline",
            "-m",
            model,
            "-o",
            output,
        ]);
        fs::read(dir.path().join(output)).unwrap()
    };
    let local = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/sd1");
    assert!(draw("me/model", "hub.png") == draw(local, "folder.png"));
    assert_eq!(server.seen().len(), requests, "--offline asked the hub");
}

/// A repository that is a VAE, as `madebyollin/taesd` is.
fn vae_repo() -> BTreeMap<String, Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/taesd/vae");
    let file = |name: &str| (name.to_string(), fs::read(folder.join(name)).unwrap());
    let other = |name: &str| (name.to_string(), contents(name, 1000));
    let own = ["config.json", "diffusion_pytorch_model.safetensors"].map(file);
    own.into_iter()
        .chain(
            [
                "README.md",
                "taesd_decoder.safetensors",
                "taesd_encoder.safetensors",
            ]
            .map(other),
        )
        .collect()
}

#[test]
fn of_a_vae_and_of_a_models_vae_no_other_files_come() {
    for (files, below) in [(vae_repo(), ""), (diffusers_repo(), "vae/")] {
        let (server, dir) = (Server::start(files), tempfile::tempdir().unwrap());
        let folder = hub(&server, dir.path())
            .part("me/model", Wanted::Vae, false)
            .unwrap();
        assert_eq!(folder, repo_dir(dir.path()).join("snapshots").join(COMMIT));
        assert_eq!(
            tree(&folder),
            ["config.json", "diffusion_pytorch_model.safetensors"]
                .map(|name| format!("{below}{name}"))
        );
        server.forget();
        assert_eq!(
            hub(&server, dir.path())
                .part("me/model", Wanted::Vae, false)
                .unwrap(),
            folder
        );
        assert_eq!(
            offline(&server, dir.path())
                .part("me/model", Wanted::Vae, false)
                .unwrap(),
            folder
        );
        assert!(server.seen().is_empty(), "{:?}", server.seen());
        // to pull a VAE nobody has to say that it is one; a model is fetched whole then
        hub(&server, dir.path())
            .snapshot("me/model", false)
            .unwrap();
        assert_eq!(server.seen().is_empty(), below.is_empty());
        assert_eq!(folder.join("model_index.json").exists(), !below.is_empty());
    }
}

#[test]
fn a_vae_of_the_hub_decodes_and_pictures_that_name_it_are_checked_with_it() {
    let (dir, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(vae_repo());
    let run = |args: &[&str]| {
        let mut command = online(&server, dir.path(), cache.path());
        let output = command.args(args).output().unwrap();
        (output.status.success(), stdout(&output), stderr(&output))
    };
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/sd1");
    let draw = |vae: &str, output: &str| {
        let (drawn, _, said) = run(&[
            "a frog", "-s", "1", "--steps", "2", "-W", "16", "-H", "16", "-m", model, "--vae", vae,
            "-o", output,
        ]);
        assert!(drawn, "{said}");
        image::open(dir.path().join(output)).unwrap()
    };
    let local = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/taesd/vae");
    assert!(draw("me/model", "hub.png") == draw(local, "local.png"));
    let (same, said, error) = run(&["check", "hub.png", "-m", model, "--offline"]);
    assert!(same && said == "hub.png: identical\n", "{said}{error}");
    // a name that is none of the hub's does not tell where the VAE is
    let (same, _, error) = run(&["check", "local.png", "-m", model, "--offline"]);
    assert!(
        !same
            && error.contains("it was drawn with the VAE `taesd`\n\nhint: pass that with `--vae`"),
        "{error}"
    );
}

#[test]
fn of_a_model_the_text_encoder_or_its_tokenizer_comes_alone() {
    let klein = || {
        let mut files = fixture_repo("klein");
        // as Qwen's tokenizers are saved; a language model's is read from tokenizer.json only
        for name in ["tokenizer/vocab.json", "tokenizer/merges.txt"] {
            files.insert(name.into(), b"{}".to_vec());
        }
        files
    };
    let tokenizer = [
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ];
    let encoder = ["text_encoder/config.json", "text_encoder/model.safetensors"];
    for (wanted, files) in [
        (Wanted::Tokenizer, tokenizer.to_vec()),
        (Wanted::TextEncoder, [encoder, tokenizer].concat()),
    ] {
        let (server, dir) = (Server::start(klein()), tempfile::tempdir().unwrap());
        let fetch = |hub: Hub| hub.part("me/model", wanted, false).unwrap();
        let folder = fetch(hub(&server, dir.path()));
        assert_eq!(tree(&folder), files);
        server.forget();
        assert_eq!(fetch(offline(&server, dir.path())), folder);
        assert!(server.seen().is_empty(), "{:?}", server.seen());
        let whole = hub(&server, dir.path())
            .snapshot("me/model", false)
            .unwrap();
        assert!(whole.join("model_index.json").exists());
        assert!(!whole.join("tokenizer/vocab.json").exists());
    }
    // of a model with several all come, with their tokenizers
    let server = Server::start(fixture_repo("flux"));
    let dir = tempfile::tempdir().unwrap();
    let fetch = |hub: Hub| hub.part("me/model", Wanted::TextEncoder, false).unwrap();
    let folder = fetch(hub(&server, dir.path()));
    let files = [
        "model_index.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "tokenizer_2/tokenizer.json",
        "tokenizer_2/tokenizer_config.json",
    ];
    assert_eq!(tree(&folder), files);
    server.forget();
    assert_eq!(fetch(offline(&server, dir.path())), folder);
    assert!(server.seen().is_empty(), "{:?}", server.seen());
    // a repository that is a language model
    let alone: BTreeMap<String, Vec<u8>> = klein()
        .into_iter()
        .filter_map(|(name, bytes)| {
            let (folder, name) = name.split_once('/')?;
            ["text_encoder", "tokenizer"]
                .contains(&folder)
                .then(|| (name.to_string(), bytes))
        })
        .collect();
    let (server, dir) = (Server::start(alone), tempfile::tempdir().unwrap());
    let folder = hub(&server, dir.path()).part("me/model", Wanted::TextEncoder, false);
    let files = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(tree(&folder.unwrap()), files);
}

#[test]
fn the_tokenizer_of_a_text_encoder_in_a_file_is_fetched_once_and_a_model_of_the_hub_lends_parts() {
    let (dir, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(fixture_repo("klein"));
    server.set(|state| state.repo = Some("black-forest-labs/FLUX.2-klein-4B".into()));
    let klein = crate::common::fixture("klein");
    let copy = |from: &str, to: &str| {
        fs::copy(klein.join(from), dir.path().join(to)).unwrap();
    };
    copy(
        "transformer/diffusion_pytorch_model.safetensors",
        "klein-x.safetensors",
    );
    copy("text_encoder/model.safetensors", "qwen.safetensors");
    let draw = |args: &[&str]| {
        let mut command = online(&server, dir.path(), cache.path());
        command
            .args([
                "a frog",
                "-W",
                "64",
                "-H",
                "64",
                "-s",
                "7",
                "--steps",
                "1",
                "--no-metadata",
            ])
            .args(["--force", "-o", "x.png"])
            .args(args);
        let output = succeed(&mut command);
        (fs::read(dir.path().join("x.png")).unwrap(), stderr(&output))
    };
    let folder = klein.to_str().unwrap();
    let (expected, _) = draw(&["-m", folder]);
    let split = ["-m", "klein-x.safetensors", "--vae", folder];
    let file = [&split[..], &["--text-encoder", "qwen.safetensors"]].concat();
    let (picture, said) = draw(&file);
    assert!(picture == expected);
    let told = "fetching 2 files of `black-forest-labs/FLUX.2-klein-4B`, ";
    assert!(said.contains(told), "{said}");
    let asked: Vec<String> = server.seen().into_iter().map(|seen| seen.path).collect();
    assert!(
        asked.iter().all(|path| !path.ends_with(".safetensors")),
        "{asked:?}"
    );
    server.forget();
    assert!(draw(&[&file[..], &["--offline"]].concat()).0 == expected);
    assert!(server.seen().is_empty(), "{:?}", server.seen());
    // the short name of a model stands for the repository that lends its parts
    let lent = [&split[..2], &["--text-encoder", "klein", "--vae", "klein"]].concat();
    assert!(draw(&lent).0 == expected);
    let snapshot = cache
        .path()
        .join("models--black-forest-labs--FLUX.2-klein-4B/snapshots");
    let files = tree(&snapshot.join(COMMIT));
    assert!(
        files.iter().all(|file| !file.starts_with("transformer/")),
        "{files:?}"
    );
}
