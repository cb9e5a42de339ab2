//! What a person is told when a model cannot be had, and what to do about it.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::path::Path;

use anyhow::anyhow;
use indicatif::HumanBytes;

use super::client::{ConnectionError, Response};
use super::reference::Reference;
use super::selection::{SelectionError, listed};
use super::{Hub, Wanted};

/// The error where the cache does not have the model and the network is off.
pub fn offline(error: SelectionError, reference: &Reference, cache_dir: &Path) -> anyhow::Error {
    let Reference {
        id, repo, revision, ..
    } = reference;
    let dir = cache_dir.display();
    let cause = match error {
        SelectionError::Absent if revision == "main" => {
            format!("`{repo}` is not in the hub's cache `{dir}`")
        }
        SelectionError::Absent => {
            format!("revision `{revision}` of `{repo}` is not in the hub's cache `{dir}`")
        }
        SelectionError::Missing(file) => {
            format!("`{repo}` is incomplete in the hub's cache `{dir}`: `{file}` is missing")
        }
        SelectionError::Other(error) => return error,
    };
    if reference.wanted == Wanted::Tokenizer {
        return anyhow!(
            "the text encoder comes without its tokenizer; {cause}, and the network is off\n\n\
             hint: put the tokenizer.json of `{repo}` (11 MB at most) beside the text encoder's file, or draw once without `--offline` and with HF_HUB_OFFLINE \
             unset: it is fetched then, and no other file"
        );
    }
    anyhow!(
        "{cause}, and the network is off\n\n\
         hint: run `sdgen pull {id}` once, without `--offline` and with HF_HUB_OFFLINE unset"
    )
}

/// The error where `files`, all that the repository has, do not make a model.
pub fn not_a_model(
    error: SelectionError,
    reference: &Reference,
    files: &BTreeSet<String>,
) -> anyhow::Error {
    let repo = &reference.repo;
    let file = match error {
        SelectionError::Absent => {
            return anyhow!("`{repo}` is empty\n\nhint: check its page on the hub");
        }
        SelectionError::Missing(file) => file,
        SelectionError::Other(error) => return error,
    };
    let pickled = |file: &&String| file.ends_with(".bin") || file.ends_with(".ckpt");
    // A whole checkpoint lies at the top; below are the parts of one.
    let choice =
        |f: &&String| f.ends_with(".safetensors") && (reference.file.is_some() || !f.contains('/'));
    let hint = if files.iter().any(|f| choice(&f)) {
        format!(
            "to use one of its files, name it:{}",
            listed(repo, files.iter().filter(choice))
        )
    } else if let Some(pickle) = files.iter().find(pickled) {
        format!(
            "it has pickled weights only (`{pickle}`), which can run code when read; \
             look for a `safetensors` conversion of it on the hub"
        )
    } else {
        "sdgen draws with diffusers folders and `.safetensors` checkpoints".to_string()
    };
    anyhow!("`{repo}` has no `{file}`\n\nhint: {hint}")
}

/// The error of a cache that cannot be written, with `missing` bytes still to come.
pub fn disk(error: &io::Error, path: &Path, missing: u64, reference: &Reference) -> anyhow::Error {
    let (path, id) = (path.display(), &reference.id);
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => anyhow!(
            "no space left on the disk for `{path}` ({} still to come)\n\n\
             hint: free some space, or set HF_HOME to a folder on another disk, and run \
             `sdgen pull {id}` again",
            HumanBytes(missing)
        ),
        _ => anyhow!(
            "cannot write `{path}` in the hub's cache: {error}\n\n\
             hint: set HF_HOME to a folder that you may write to"
        ),
    }
}

/// The error of a connection that could not be made.
pub fn unreachable(error: &ConnectionError, reference: &Reference) -> anyhow::Error {
    let ConnectionError { origin, reason } = error;
    if reason.contains("certificate") {
        return anyhow!(
            "cannot reach `{origin}`: {reason}\n\n\
             hint: where a company signs its connections itself, SSL_CERT_FILE names the file of \
             its certificates"
        );
    }
    anyhow!(
        "cannot reach `{origin}`: {reason}\n\n\
         hint: check the network and HF_ENDPOINT, then run `sdgen pull {}` again",
        reference.id
    )
}

/// The error of a response that is a refusal; of a file's where one was asked for.
pub fn refused(
    response: &Response,
    file: Option<&str>,
    hub: &Hub,
    reference: &Reference,
) -> anyhow::Error {
    let Reference {
        id, repo, revision, ..
    } = reference;
    let endpoint = &hub.endpoint;
    let status = response.status;
    let code = response.error_code.as_deref().unwrap_or_default();
    match (status, code) {
        (401 | 403, "GatedRepo") => anyhow!(
            "`{repo}` is gated: its licence must be accepted first ({status})\n\n\
             hint: accept it on {endpoint}/{repo}, then set HF_TOKEN to a token from \
             {endpoint}/settings/tokens"
        ),
        (401, _) if hub.token.is_some() && code != "RepoNotFound" => anyhow!(
            "the hub does not accept the token for `{repo}` ({status})\n\n\
             hint: set HF_TOKEN to a valid token from {endpoint}/settings/tokens"
        ),
        (401 | 403, _) => anyhow!(
            "`{repo}` does not exist, or is not open to everyone ({status})\n\n\
             hint: check the name; for a private or gated model accept its licence on \
             {endpoint}/{repo} and set HF_TOKEN to a token from {endpoint}/settings/tokens"
        ),
        (404, "RevisionNotFound") => anyhow!(
            "`{repo}` has no revision `{revision}` ({status})\n\n\
             hint: its branches are listed on {endpoint}/{repo}/tree/main; without `@{revision}` \
             it is `main`"
        ),
        (404, _) => match file {
            Some(file) => anyhow!(
                "`{repo}` has no file `{file}` ({status})\n\n\
                 hint: its files are listed on {endpoint}/{repo}/tree/{revision}"
            ),
            None => anyhow!(
                "`{repo}` does not exist on the hub ({status})\n\n\
                 hint: check the name, or look for it on {endpoint}/models"
            ),
        },
        (429, _) => anyhow!(
            "the hub takes no more requests for now ({status})\n\n\
             hint: wait a few minutes, or set HF_TOKEN, then run `sdgen pull {id}` again"
        ),
        _ => anyhow!(
            "the hub answers {status} for `{}`\n\nhint: run `sdgen pull {id}` again later",
            file.unwrap_or(repo)
        ),
    }
}
