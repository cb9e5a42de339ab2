//! A1111's tags `<lora:name:strength>` in prompts, and tags of other names, which it leaves out.

use anyhow::{Context, Result, ensure};

/// A LoRA that a prompt names.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraTag {
    pub name: String,
    /// how much of its change is made to the U-Net
    pub strength: f64,
    /// how much of its change is made to the text encoders
    pub text_strength: f64,
}

/// Removes all tags from a prompt; returns it with the LoRAs that they name, in `<lora:...>` and
/// `<lyco:...>`. As in A1111 one number is for both networks, of two the first is the text
/// encoder's, and a tag without any has 1. Errors if a strength is not a number.
pub fn take_tags(prompt: &str) -> Result<(String, Vec<LoraTag>)> {
    let (mut text, mut tags, mut rest) = (String::new(), vec![], prompt);
    while let Some(tag) = Tag::find(rest) {
        if matches!(tag.name, "lora" | "lyco") {
            tags.push(parse(&tag)?);
        }
        text += tag.before;
        rest = tag.after;
    }
    if rest.len() == prompt.len() {
        return Ok((rest.into(), tags));
    }
    text += rest;
    Ok((text.trim().into(), tags))
}

fn parse(tag: &Tag) -> Result<LoraTag> {
    let (mut positional, mut named) = (vec![], vec![]);
    for argument in tag.arguments.split(':') {
        match argument.split_once('=') {
            Some(pair) if !positional.is_empty() => named.push(pair),
            _ => positional.push(argument.trim()),
        }
    }
    let name = positional.first().copied().unwrap_or_default();
    let number = |nth: usize, key: &str| -> Result<Option<f64>> {
        let by_name = named.iter().rev().find(|(name, _)| name.trim() == key);
        let text = by_name.map(|(_, text)| text.trim());
        let Some(text) = text.or(positional.get(nth).copied()) else {
            return Ok(None);
        };
        let number = text.parse().ok().filter(|number: &f64| number.is_finite());
        let number = number.with_context(|| {
            format!(
                "the strength in `{}` is not a number\n\nhint: `<{}:{name}:0.8>`",
                tag.whole, tag.name
            )
        })?;
        Ok(Some(number))
    };
    ensure!(
        number(3, "dyn")?.is_none(),
        "a LoRA of fewer ranks, as in `{}`, is not made\n\nhint: `<{}:{name}:0.8>`",
        tag.whole,
        tag.name
    );
    let text_strength = number(1, "te")?.unwrap_or(1.0);
    Ok(LoraTag {
        name: name.into(),
        strength: number(2, "unet")?.unwrap_or(text_strength),
        text_strength,
    })
}

/// A tag `<name:arguments>` of A1111's extra networks, and the text before and behind it.
pub struct Tag<'a> {
    pub before: &'a str,
    pub name: &'a str,
    pub arguments: &'a str,
    pub whole: &'a str,
    pub after: &'a str,
}

impl<'a> Tag<'a> {
    /// Finds the first tag of a text.
    pub fn find(text: &'a str) -> Option<Self> {
        let mut ends = text.rfind('>')?;
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        for (from, _) in text.match_indices('<') {
            let inner = &text[from + 1..];
            let length = inner.find(|c| !is_word(c)).filter(|length| *length > 0);
            let Some(arguments) = length.and_then(|length| inner[length..].strip_prefix(':'))
            else {
                continue;
            };
            if from > ends {
                break;
            }
            let Some(end) = arguments.find('>').filter(|end| *end > 0) else {
                continue;
            };
            ends = text.len() - arguments.len() + end;
            return Some(Self {
                before: &text[..from],
                name: &inner[..length.unwrap_or(0)],
                arguments: &arguments[..end],
                whole: &text[from..=ends],
                after: &text[ends + 1..],
            });
        }
        None
    }
}

/// What looks like a tag that is never closed: `<lora:x`.
pub(super) fn unclosed_tag(text: &str) -> Option<&str> {
    let at = text.rfind('<')?;
    let inner = &text[at + 1..];
    let name = &inner[..inner.find(':')?];
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_');
    (is_name && !inner.contains('>')).then_some(&text[at..])
}
