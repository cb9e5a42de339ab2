//! PEFT's configuration, which diffusers puts into a LoRA's header: the alphas of its layers, some of
//! them by regular expressions over the layers' names.

use anyhow::{Context, Result, ensure};
use fancy_regex::Regex;
use serde_json::Value;
use std::collections::BTreeMap;

/// The most regular expressions of a file; names without special characters do not count.
const MAX_EXPRESSIONS: usize = 4096;

/// The configuration of all components.
#[derive(Default)]
pub struct PeftConfig {
    values: Value,
    /// component -> its `alpha_pattern`, in the file's order
    alphas: BTreeMap<String, Vec<(Pattern, f64)>>,
}

impl PeftConfig {
    /// Reads the header's text; text that is not JSON says nothing. Errors if a pattern is no
    /// regular expression.
    pub fn of(text: &str) -> Result<Self> {
        let values: Value = serde_json::from_str(text).unwrap_or_default();
        let mut alphas = BTreeMap::<String, Vec<_>>::new();
        let mut expressions = 0;
        for (key, value) in values.as_object().into_iter().flatten() {
            let (Some(component), Some(patterns)) =
                (key.strip_suffix(".alpha_pattern"), value.as_object())
            else {
                continue;
            };
            for (pattern, alpha) in patterns {
                let (pattern, alpha) = (Pattern::of(pattern)?, alpha.as_f64());
                expressions += usize::from(matches!(pattern, Pattern::Expression(_)));
                ensure!(
                    expressions <= MAX_EXPRESSIONS,
                    "its `{key}` has more than {MAX_EXPRESSIONS} regular expressions"
                );
                let all = alphas.entry(component.to_string()).or_default();
                all.extend(alpha.map(|alpha| (pattern, alpha)));
            }
        }
        Ok(Self { values, alphas })
    }

    /// The alphas that hold for whole components.
    pub fn lora_alphas(&self) -> impl Iterator<Item = f64> {
        let all = self.values.as_object().into_iter().flatten();
        all.filter(|(key, _)| key.ends_with("lora_alpha"))
            .filter_map(|(_, alpha)| alpha.as_f64())
    }

    /// The scale of a layer of a component whose rank is known: alpha divided by the rank, or by its
    /// root where the LoRA is rank-stabilised (Kalajdzievski 2023, arXiv 2312.03732).
    pub fn scale(&self, component: &str, layer: &str, rank: f64) -> Result<f64> {
        let setting = |key: &str| self.values.get(format!("{component}.{key}"));
        let mut alpha = setting("lora_alpha").and_then(Value::as_f64);
        // the first that matches, as PEFT's get_pattern_key
        for (pattern, own) in self.alphas.get(component).into_iter().flatten() {
            if pattern.matches(layer)? {
                alpha = Some(*own);
                break;
            }
        }
        let is_stabilised = setting("use_rslora").and_then(Value::as_bool) == Some(true);
        Ok(alpha.unwrap_or(rank) / if is_stabilised { rank.sqrt() } else { rank })
    }
}

/// A key of `alpha_pattern`, which PEFT matches as `(.*\.)?(KEY)$`.
enum Pattern {
    /// letters, digits and underscores; a point stands for any character
    Name(String),
    Expression(Box<Regex>),
}

impl Pattern {
    fn of(key: &str) -> Result<Self> {
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"_.".contains(&byte);
        if key.bytes().all(is_name) {
            return Ok(Self::Name(key.into()));
        }
        let expression = Regex::new(&format!(r"^(.*\.)?({key})$")).with_context(|| {
            format!("its `alpha_pattern` has the key `{key}`, which is no regular expression")
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
                .with_context(|| format!("its `alpha_pattern` `{expression}` cannot be matched")),
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
                Pattern::of(key).unwrap().matches(LAYER).unwrap(),
                is_match,
                "{key}"
            );
        }
    }

    #[test]
    fn the_first_key_that_matches_gives_the_alpha() {
        let text = r#"{"unet.lora_alpha": 4, "unet.alpha_pattern": {"attn\\d.*": 8, "to_k": 16}}"#;
        let config = PeftConfig::of(text).unwrap();
        assert_eq!(config.scale("unet", LAYER, 2.0).unwrap(), 4.0);
        assert_eq!(config.scale("unet", "conv_in", 2.0).unwrap(), 2.0);
        assert_eq!(config.scale("text_encoder", LAYER, 2.0).unwrap(), 1.0);
        assert!(PeftConfig::of(r#"{"unet.alpha_pattern": {"to_(k": 8}}"#).is_err());
    }
}
