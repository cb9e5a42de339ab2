//! PEFT's configuration, which diffusers puts into a LoRA's header, and PEFT beside the file, as
//! `adapter_config.json`: the alphas of its layers, some of them by regular expressions over the
//! layers' names, and how other methods were trained.

use anyhow::{Context, Result, ensure};
use fancy_regex::Regex;
use serde_json::Value;
use std::collections::BTreeMap;

/// The most regular expressions of a file; names without special characters do not count.
const MAX_EXPRESSIONS: usize = 4096;

/// The configuration of all components.
#[derive(Default)]
pub struct PeftConfig {
    /// setting -> value, with the component before it if the configuration tells components apart
    values: Value,
    /// whether it is that of a whole file, without components
    is_of_file: bool,
    /// prefix of settings -> its `alpha_pattern` and `rank_pattern`, in the file's order
    alphas: Patterns,
    ranks: Patterns,
}

type Patterns = BTreeMap<String, Vec<(Pattern, f64)>>;

impl PeftConfig {
    /// Reads the header's text; text that is not JSON says nothing. Errors if a pattern is no
    /// regular expression.
    pub fn of_header(text: &str) -> Result<Self> {
        Self::of(serde_json::from_str(text).unwrap_or_default(), false)
    }

    /// Reads `adapter_config.json`. Errors if it is not JSON, or a pattern is no regular expression.
    pub fn of_file(text: &str) -> Result<Self> {
        Self::of(serde_json::from_str(text)?, true)
    }

    fn of(values: Value, is_of_file: bool) -> Result<Self> {
        let (alphas, ranks) = (
            patterns(&values, "alpha_pattern")?,
            patterns(&values, "rank_pattern")?,
        );
        Ok(Self {
            values,
            is_of_file,
            alphas,
            ranks,
        })
    }

    /// Whether it is that of a whole file, which tells how it was trained.
    pub fn is_of_file(&self) -> bool {
        self.is_of_file
    }

    fn prefix(&self, component: &str) -> String {
        if self.is_of_file {
            String::new()
        } else {
            format!("{component}.")
        }
    }

    /// A number of the configuration.
    pub fn number(&self, key: &str) -> Option<f64> {
        self.values.get(key).and_then(Value::as_f64)
    }

    /// Whether a setting is on.
    pub fn is_on(&self, key: &str) -> bool {
        self.values.get(key).and_then(Value::as_bool) == Some(true)
    }

    /// Whether IA3's factors of a layer are of its inputs.
    pub fn is_feedforward(&self, layer: &str) -> Result<bool> {
        Ok(match self.values.get("feedforward_modules") {
            Some(Value::String(pattern)) => Regex::new(&format!("^(?:{pattern})$"))
                .with_context(|| format!("`{pattern}` is no regular expression"))?
                .is_match(layer)?,
            Some(Value::Array(names)) => {
                let mut names = names.iter().filter_map(Value::as_str);
                names.any(|name| layer.ends_with(name))
            }
            _ => false,
        })
    }

    /// The alphas that hold for whole components.
    pub fn lora_alphas(&self) -> impl Iterator<Item = f64> {
        let all = self.values.as_object().into_iter().flatten();
        all.filter(|(key, _)| key.ends_with("lora_alpha") || *key == "alpha")
            .filter_map(|(_, alpha)| alpha.as_f64())
    }

    /// The scale of a layer of a component: alpha divided by the rank, or by its root where the LoRA
    /// is rank-stabilised (Kalajdzievski 2023, arXiv 2312.03732). The rank is that of the tensors, if
    /// they tell it.
    pub fn scale(&self, component: &str, layer: &str, rank: Option<f64>) -> Result<f64> {
        let prefix = self.prefix(component);
        let number = |key: &str| self.number(&format!("{prefix}{key}"));
        let of = |patterns: &Patterns| -> Result<Option<f64>> {
            // the first that matches, as PEFT's get_pattern_key
            for (pattern, own) in patterns.get(&prefix).into_iter().flatten() {
                if pattern.matches(layer)? {
                    return Ok(Some(*own));
                }
            }
            Ok(None)
        };
        let alpha = of(&self.alphas)?.or_else(|| number("lora_alpha").or_else(|| number("alpha")));
        let rank = match rank {
            Some(rank) => Some(rank),
            None => of(&self.ranks)?.or_else(|| number("r")),
        };
        let Some(rank) = rank.filter(|rank| *rank > 0.0) else {
            return Ok(1.0);
        };
        let is_stabilised = self.is_on(&format!("{prefix}use_rslora"));
        Ok(alpha.unwrap_or(rank) / if is_stabilised { rank.sqrt() } else { rank })
    }
}

/// The regular expressions of a setting, by the prefix of its key.
fn patterns(values: &Value, setting: &str) -> Result<Patterns> {
    let mut all = Patterns::new();
    let mut expressions = 0;
    for (key, value) in values.as_object().into_iter().flatten() {
        let (Some(prefix), Some(patterns)) = (key.strip_suffix(setting), value.as_object()) else {
            continue;
        };
        for (pattern, number) in patterns {
            let pattern = Pattern::of(pattern, setting)?;
            expressions += usize::from(matches!(pattern, Pattern::Expression(_)));
            ensure!(
                expressions <= MAX_EXPRESSIONS,
                "its `{key}` has more than {MAX_EXPRESSIONS} regular expressions"
            );
            let all = all.entry(prefix.to_string()).or_default();
            all.extend(number.as_f64().map(|number| (pattern, number)));
        }
    }
    Ok(all)
}

/// A key of `alpha_pattern` or `rank_pattern`, which PEFT matches as `(.*\.)?(KEY)$`.
enum Pattern {
    /// letters, digits and underscores; a point stands for any character
    Name(String),
    Expression(Box<Regex>),
}

impl Pattern {
    fn of(key: &str, setting: &str) -> Result<Self> {
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"_.".contains(&byte);
        if key.bytes().all(is_name) {
            return Ok(Self::Name(key.into()));
        }
        let expression = Regex::new(&format!(r"^(.*\.)?({key})$")).with_context(|| {
            format!("its `{setting}` has the key `{key}`, which is no regular expression")
        })?;
        Ok(Self::Expression(Box::new(expression)))
    }

    fn matches(&self, layer: &str) -> Result<bool> {
        match self {
            Self::Name(name) => {
                let Some(at) = layer.len().checked_sub(name.len()) else {
                    return Ok(false);
                };
                let (before, end) = layer.as_bytes().split_at(at);
                let is_same = |(own, byte): (u8, &u8)| own == b'.' || own == *byte;
                Ok(before.last().is_none_or(|byte| *byte == b'.')
                    && name.bytes().zip(end).all(is_same))
            }
            Self::Expression(expression) => expression
                .is_match(layer)
                .with_context(|| format!("its pattern `{expression}` cannot be matched")),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const LAYER: &str = "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k";

    #[test]
    fn keys_of_alpha_pattern_are_matched_as_peft_matches_them() {
        // after `re.match(rf"(.*\.)?({key})$", LAYER)` of Python
        for (key, is_match) in [
            ("to_k", true),
            ("attn2.to_k", true),
            ("2.to_k", false),
            ("attn2_to_k", false),
            ("attn..to_k", true),
            ("to_k|to_q", true),
            (r"attn\d\.to_[qk]", true),
            (r"down_blocks\.0\..*\.to_k", true),
            (r"down_blocks\.1\..*", false),
            (r".*attn2.*", true),
            ("^to_k", false),
            ("^down_blocks.*", true),
            (r"(?!.*attn1).*to_k", true),
            (LAYER, true),
            ("down_blocks", false),
        ] {
            assert_eq!(
                Pattern::of(key, "alpha_pattern")
                    .unwrap()
                    .matches(LAYER)
                    .unwrap(),
                is_match,
                "{key}"
            );
        }
    }

    #[test]
    fn the_first_key_that_matches_gives_the_alpha() {
        let text = r#"{"unet.lora_alpha": 4, "unet.alpha_pattern": {"attn\\d.*": 8, "to_k": 16}}"#;
        let config = PeftConfig::of_header(text).unwrap();
        assert_eq!(config.scale("unet", LAYER, Some(2.0)).unwrap(), 4.0);
        assert_eq!(config.scale("unet", "conv_in", Some(2.0)).unwrap(), 2.0);
        assert_eq!(config.scale("text_encoder", LAYER, Some(2.0)).unwrap(), 1.0);
        assert!(PeftConfig::of_header(r#"{"unet.alpha_pattern": {"to_(k": 8}}"#).is_err());
    }
}
