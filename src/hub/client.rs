//! Requests to the hub, through `hf-hub`'s client (TLS, proxies, user agent, token).
//!
//! The client follows no redirect by itself: the headers of the redirect name a large file's
//! checksum, and the token may go to the endpoint only, never to the storage behind it.

use std::error::Error;
use std::io::Read;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::Hub;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// A longer chain of redirects is a circle.
pub const MAX_REDIRECTS: usize = 10;

/// All but the unreserved characters of RFC 3986.
const IN_SEGMENT: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');
const IN_PATH: &AsciiSet = &IN_SEGMENT.remove(b'/');

/// A client of one hub.
pub struct Client {
    endpoint: String,
    timeout: Duration,
    tls: TlsConfig,
    authorized: ApiRepo,
    /// Sends no token: for every origin but the endpoint's.
    anonymous: ApiRepo,
}

/// A response with the headers of the hub's protocol.
pub struct Response {
    pub status: u16,
    pub location: Option<String>,
    pub etag: Option<String>,
    pub linked_etag: Option<String>,
    pub linked_size: Option<u64>,
    pub content_length: Option<u64>,
    pub content_range: Option<String>,
    /// `GatedRepo`, `RepoNotFound`, `RevisionNotFound`, `EntryNotFound`
    pub error_code: Option<String>,
    pub body: Box<dyn Read>,
}

/// A connection that could not be made, or broke off before there was a response.
pub struct ConnectionError {
    /// `scheme://host:port`
    pub origin: String,
    pub reason: String,
}

impl ConnectionError {
    pub fn at(url: &str, error: &dyn Error) -> ConnectionError {
        ConnectionError {
            origin: origin(url),
            reason: error.to_string(),
        }
    }
}

impl Client {
    /// A client for one visit. Errors if it cannot be set up.
    pub fn new(hub: &Hub) -> Result<Client> {
        let api = |token: Option<String>| -> Result<ApiRepo> {
            let builder = ApiBuilder::from_cache(Cache::new(hub.cache_dir.clone()))
                .with_endpoint(hub.endpoint.clone())
                .with_token(token)
                .with_user_agent("sdgen", env!("CARGO_PKG_VERSION"));
            let api = builder.build().context("cannot set up the hub's client")?;
            // A repository is needed to get at the client, whatever is asked for with it.
            Ok(api.repo(Repo::model(String::new())))
        };
        Ok(Client {
            endpoint: hub.endpoint.clone(),
            timeout: hub.timeout,
            tls: TlsConfig::builder().root_certs(trusted(hub)?).build(),
            authorized: api(hub.token.clone())?,
            anonymous: api(None)?,
        })
    }

    /// The address of what the hub says of a repository: its commit and its files with their sizes.
    pub fn info_url(&self, repo: &str, revision: &str) -> String {
        let revision = utf8_percent_encode(revision, IN_SEGMENT);
        let endpoint = &self.endpoint;
        format!("{endpoint}/api/models/{repo}/revision/{revision}?blobs=true")
    }

    /// The address of a file of a commit.
    pub fn file_url(&self, repo: &str, commit: &str, file: &str) -> String {
        let file = utf8_percent_encode(file, IN_PATH);
        format!("{}/{repo}/resolve/{commit}/{file}", self.endpoint)
    }

    /// Whether an address is the hub's own, and not of its storage.
    pub fn is_home(&self, url: &str) -> bool {
        origin(url) == origin(&self.endpoint)
    }

    /// Sends one request. The token goes to the endpoint and nowhere else.
    pub fn get(&self, url: &str, range: Option<&str>) -> Result<Response, ConnectionError> {
        let api = if self.is_home(url) {
            &self.authorized
        } else {
            &self.anonymous
        };
        // The crate's one way to a request with limits of time and with headers in its response.
        let mut request = api
            .info_request()
            .uri(url)
            .header("Accept-Encoding", "identity");
        if let Some(range) = range {
            request = request.header("Range", range);
        }
        let request = request
            .config()
            .tls_config(self.tls.clone())
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(self.timeout))
            .timeout_per_read(Some(self.timeout))
            .build();
        let response = request.call().map_err(|e| ConnectionError::at(url, &e))?;

        let header = |name: &str| Some(response.headers().get(name)?.to_str().ok()?.to_string());
        let number = |name: &str| header(name)?.parse().ok();
        let etag = |name: &str| {
            let etag = header(name)?;
            Some(etag.trim_start_matches("W/").trim_matches('"').to_string())
        };
        Ok(Response {
            status: response.status().as_u16(),
            location: header("location"),
            etag: etag("etag"),
            linked_etag: etag("x-linked-etag"),
            linked_size: number("x-linked-size"),
            content_length: number("content-length"),
            content_range: header("content-range"),
            error_code: header("x-error-code"),
            body: Box::new(response.into_body().into_reader()),
        })
    }

    /// Sends a request and follows its redirects. Returns the response and its address.
    pub fn get_redirected(
        &self,
        url: &str,
        range: Option<&str>,
    ) -> Result<(Response, String), ConnectionError> {
        let mut url = url.to_string();
        let mut response = self.get(&url, range)?;
        for _ in 0..MAX_REDIRECTS {
            let Some(next) = response.redirect(&url) else {
                break;
            };
            url = next;
            response = self.get(&url, range)?;
        }
        Ok((response, url))
    }
}

/// Whom https connections trust: the certificates of `SSL_CERT_FILE` and `SSL_CERT_DIR` where one is
/// set, else those of the system, else Mozilla's, which are built in. Errors if what is set holds no
/// certificate.
fn trusted(hub: &Hub) -> Result<RootCerts> {
    if !hub.endpoint.starts_with("https:") {
        return Ok(RootCerts::WebPki);
    }
    let found = rustls_native_certs::load_native_certs();
    if !found.certs.is_empty() {
        let certificates = found
            .certs
            .iter()
            .map(|der| Certificate::from_der(der).to_owned());
        return Ok(certificates.collect::<Vec<_>>().into());
    }
    let is_set = |name: &&&str| std::env::var_os(**name).is_some_and(|value| !value.is_empty());
    match ["SSL_CERT_FILE", "SSL_CERT_DIR"].iter().find(is_set) {
        None => Ok(RootCerts::WebPki),
        Some(name) => {
            let value = std::env::var_os(name).unwrap_or_default();
            let why = found.errors.first().map(|error| format!(": {error}"));
            bail!(
                "{name} is `{}`, where no certificate can be read{}\n\nhint: it names certificates in PEM form; without it the system's are trusted",
                value.display(),
                why.unwrap_or_default()
            )
        }
    }
}

impl Response {
    /// The address that this response to `url` sends to, if it is a redirect.
    pub fn redirect(&self, url: &str) -> Option<String> {
        let location = self
            .location
            .as_deref()
            .filter(|_| matches!(self.status, 301 | 302 | 303 | 307 | 308))?;
        Some(
            if location.starts_with("http://") || location.starts_with("https://") {
                location.to_string()
            } else if let Some(rest) = location.strip_prefix("//") {
                let (scheme, _) = url.split_once("://")?;
                format!("{scheme}://{rest}")
            } else {
                format!("{}/{}", origin(url), location.trim_start_matches('/'))
            },
        )
    }

    /// The bytes of the whole file, of which this response holds a part: the total of
    /// `bytes 0-0/1234`.
    pub fn total_bytes(&self) -> Option<u64> {
        let (_, total) = self.content_range.as_deref()?.rsplit_once('/')?;
        total.parse().ok()
    }
}

/// `scheme://host:port` of an address, in lower case.
fn origin(url: &str) -> String {
    let scheme = url.find("://").map_or(0, |i| i + 3);
    let end = url
        .get(scheme..)
        .and_then(|rest| rest.find(['/', '?', '#']));
    url.get(..end.map_or(url.len(), |end| scheme + end))
        .unwrap_or(url)
        .to_ascii_lowercase()
}
