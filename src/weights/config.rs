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
                "`{key}` of the {network} is {}, which does not fit: {cause}",
                shortened(value)
            ),
            None => anyhow!("config.json of the {network} is damaged: {cause}"),
        }
    })
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

/// A value for an error message, which may be a list of thousands.
fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text,
    }
}
