//! Reading a `config.json`: what is wrong in one is named with its key, its value and what is
//! expected there.

use anyhow::{Result, anyhow, ensure};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::ops::RangeInclusive;

/// Parses the configuration of a network; `T` has a default for every key. Errors name the key,
/// its value and what is expected.
pub fn parse<T: DeserializeOwned>(network: &str, config: &Value) -> Result<T> {
    let Some(keys) = config.as_object() else {
        return Err(anyhow!("config.json of the {network} is not a JSON object"));
    };
    T::deserialize(config).map_err(|cause| {
        let wrong = keys.iter().find_map(|(key, value)| {
            let alone = json!({ key.as_str(): value });
            Some((key, value, T::deserialize(&alone).err()?))
        });
        match wrong {
            Some((key, value, cause)) => anyhow!(
                "`{key}` of the {network} is {}, which does not fit: {}",
                shortened(value),
                expected(&cause)
            ),
            None => anyhow!(
                "config.json of the {network} is damaged: {}",
                expected(&cause)
            ),
        }
    })
}

/// What serde expected, in the words of JSON.
fn expected(cause: &serde_json::Error) -> String {
    let text = cause.to_string();
    let Some((_, expected)) = text.rsplit_once("expected ") else {
        return text;
    };
    let expected = match expected {
        "usize" | "u64" | "u32" => "a whole number from 0",
        "i64" | "i32" => "a whole number",
        "f64" | "f32" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "a map" => "an object",
        other => other,
    };
    format!("expected {expected}")
}

/// Errors if one of these keys is there and neither true nor false.
pub fn require_booleans(network: &str, config: &Value, keys: &[&str]) -> Result<()> {
    for key in keys {
        if let Some(value) = config.get(key) {
            ensure!(
                value.is_boolean() || value.is_null(),
                "`{key}` of the {network} is {}, which does not fit: expected true or false",
                shortened(value)
            );
        }
    }
    Ok(())
}

/// Returns a number of a configuration. Errors if the key has a value of another kind.
pub fn number(network: &str, config: &Value, key: &str) -> Result<Option<f64>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value.as_f64().map(Some).ok_or_else(|| {
            anyhow!(
                "`{key}` of the {network} is {}, which does not fit: expected a number",
                shortened(value)
            )
        }),
    }
}

/// Errors if a size that a network is built by is beyond those of any model.
pub fn require_size(
    network: &str,
    key: &str,
    size: usize,
    range: RangeInclusive<usize>,
) -> Result<()> {
    ensure!(
        range.contains(&size),
        "`{key}` of the {network} is {size}, which does not fit: expected {} to {}",
        range.start(),
        range.end()
    );
    Ok(())
}

/// [`require_size`] of several keys.
pub fn require_sizes(
    network: &str,
    sizes: impl IntoIterator<Item = (&'static str, usize, RangeInclusive<usize>)>,
) -> Result<()> {
    sizes
        .into_iter()
        .try_for_each(|(key, size, range)| require_size(network, key, size, range))
}

/// A value for an error message, which may be a list of thousands.
fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text,
    }
}
