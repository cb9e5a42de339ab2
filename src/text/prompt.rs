//! The grammar of A1111's prompts: attention weights, prompt editing, alternating words, and `AND`.
//!
//! Only text goes in and out; [`super::tokenizer`] makes tokens of it and [`super::encoder`]
//! embeddings. As in A1111 everything that is not syntax stands for itself. Malformed numbers are
//! errors with their position; nothing else is.

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The factors of round and square brackets without a number.
const ROUND: f32 = 1.1;
const SQUARE: f32 = 1.0 / 1.1;
/// The deepest nesting of square brackets that is parsed; deeper ones stand for themselves.
const MAX_DEPTH: usize = 64;

/// The syntax of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Syntax {
    /// with weights and the rest, in as many chunks of tokens as it needs
    A1111,
    /// every character for itself, cut where the model's tokens end, as diffusers does; pictures of
    /// older versions do not say it
    #[default]
    Plain,
}

/// A part of a prompt, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Segment {
    Text {
        text: String,
        weight: f32,
    },
    /// `BREAK`: the next chunk of tokens begins
    Break,
}

/// All prompts of one image.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompts {
    /// at least one
    pub parts: Vec<ComposablePrompt>,
    pub negative: ScheduledPrompt,
    /// the prompt to interpolate to, and its weight 0..=1
    pub to: Option<(ScheduledPrompt, f64)>,
}

impl Prompts {
    /// Parses a prompt, a negative prompt and perhaps one to interpolate to, for a run of `steps`
    /// steps. Errors name what cannot be parsed, and where.
    pub fn parse(
        prompt: &Arc<str>,
        negative: &Arc<str>,
        to: Option<(&Arc<str>, f64)>,
        syntax: Syntax,
        steps: usize,
    ) -> Result<Self> {
        let one = |text: &Arc<str>| match syntax {
            Syntax::A1111 => ScheduledPrompt::parse(text, steps),
            Syntax::Plain => Ok(ScheduledPrompt::constant(text.clone())),
        };
        let parts = match syntax {
            Syntax::A1111 => composable(prompt, steps)?,
            Syntax::Plain => vec![ComposablePrompt {
                prompt: one(prompt)?,
                weight: 1.0,
            }],
        };
        let to = to
            .map(|(text, weight)| Ok::<_, anyhow::Error>((one(text)?, weight)))
            .transpose()?;
        ensure!(
            to.is_none() || parts.len() == 1,
            "prompts that `AND` joins cannot go to another\n\nhint: write it in lower case, or leave `--to` out"
        );
        let prompts = Self {
            parts,
            negative: one(negative)?,
            to,
        };
        if syntax == Syntax::A1111 {
            prompts
                .texts()
                .try_for_each(|text| segments(text).map(|_| ()))?;
        }
        Ok(prompts)
    }

    /// Iterates over every text of every step.
    pub fn texts(&self) -> impl Iterator<Item = &Arc<str>> {
        let prompts = self
            .parts
            .iter()
            .map(|part| &part.prompt)
            .chain([&self.negative])
            .chain(self.to.iter().map(|(to, _)| to));
        prompts.flat_map(ScheduledPrompt::texts)
    }
}

/// One of the prompts that `AND` joins, with its weight.
#[derive(Debug, Clone, PartialEq)]
pub struct ComposablePrompt {
    pub prompt: ScheduledPrompt,
    pub weight: f64,
}

/// A prompt that may change from step to step (A1111's prompt editing): the texts, each with the
/// first step that it is used in. The first text begins at step 0.
#[derive(Debug, Clone, PartialEq)]
pub struct ScheduledPrompt(Vec<(usize, Arc<str>)>);

impl ScheduledPrompt {
    /// Returns a prompt that is the same in all steps.
    pub fn constant(text: Arc<str>) -> Self {
        Self(vec![(0, text)])
    }

    /// Parses `[a:b:when]` and `[a|b]` for a run of `steps` steps.
    pub fn parse(prompt: &str, steps: usize) -> Result<Self> {
        if !prompt.contains('[') {
            return Ok(Self::constant(prompt.into()));
        }
        let nodes = Parser::new(prompt).nodes(prompt, steps)?;
        let mut texts: Vec<(usize, Arc<str>)> = vec![];
        for step in 0..steps.max(1) {
            let mut text = String::new();
            nodes.iter().for_each(|node| node.write(step, &mut text));
            if texts.last().is_none_or(|(_, last)| **last != *text) {
                texts.push((step, text.into()));
            }
        }
        Ok(Self(texts))
    }

    /// The text of a step.
    pub fn at(&self, step: usize) -> &Arc<str> {
        let after = self.0.partition_point(|(first, _)| *first <= step);
        &self.0[after.saturating_sub(1).min(self.0.len() - 1)].1
    }

    /// Iterates over all texts.
    pub fn texts(&self) -> impl Iterator<Item = &Arc<str>> {
        self.0.iter().map(|(_, text)| text)
    }
}

/// Splits a prompt at `AND` (Liu et al. 2022, arXiv 2206.01714) and parses the weights behind its
/// parts (`a cat AND a dog:0.5`).
fn composable(prompt: &str, steps: usize) -> Result<Vec<ComposablePrompt>> {
    let mut parts = vec![];
    let mut rest = prompt;
    while let Some(at) = word(rest, "AND") {
        parts.push(&rest[..at]);
        rest = &rest[at + 3..];
    }
    parts.push(rest);
    let is_one = parts.len() == 1;
    let part = |text: &str| {
        let (text, weight) = match text
            .rsplit_once(':')
            .map(|(text, number)| (text, number.trim()))
        {
            Some((before, number)) if !is_one && is_plain_number(number) => {
                (before, number.parse().unwrap_or(1.0))
            }
            _ => (text, 1.0),
        };
        Ok(ComposablePrompt {
            prompt: ScheduledPrompt::parse(text, steps)?,
            weight,
        })
    };
    parts.into_iter().map(part).collect()
}

fn is_plain_number(text: &str) -> bool {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    digits.contains(|c: char| c.is_ascii_digit())
        && digits.chars().all(|c| c.is_ascii_digit() || c == '.')
        && digits.matches('.').count() < 2
}

/// The position of a word that stands by itself.
fn word(text: &str, wanted: &str) -> Option<usize> {
    let is_letter = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    text.match_indices(wanted).map(|(at, _)| at).find(|at| {
        !is_letter(text[..*at].chars().next_back())
            && !is_letter(text[at + wanted.len()..].chars().next())
    })
}

/// Parses the weights of a prompt. Brackets that are never closed reach to its end. Errors name a
/// weight that is not a number.
pub fn segments(prompt: &str) -> Result<Vec<Segment>> {
    let mut segments: Vec<Segment> = vec![];
    // the segments at which brackets were opened
    let (mut round, mut square): (Vec<usize>, Vec<usize>) = (vec![], vec![]);
    let mut at = 0;
    while let Some(c) = prompt[at..].chars().next() {
        let rest = &prompt[at..];
        let mut length = c.len_utf8();
        match c {
            '\\' => {
                // a backslash escapes a bracket that follows it, and is removed
                let escaped = rest[1..]
                    .chars()
                    .next()
                    .filter(|next| r"()[]\".contains(*next));
                length += escaped.map_or(0, char::len_utf8);
                push(&mut segments, &rest[1..length]);
            }
            '(' => round.push(segments.len()),
            '[' => square.push(segments.len()),
            ')' if !round.is_empty() => multiply(&mut segments, round.pop(), ROUND),
            ']' if !square.is_empty() => multiply(&mut segments, square.pop(), SQUARE),
            ':' if !round.is_empty() && weight_length(rest).is_some() => {
                length = weight_length(rest).unwrap_or(1);
                let number = rest[1..length - 1].trim();
                let weight = number
                    .parse()
                    .ok()
                    .filter(|weight: &f32| weight.is_finite());
                let Some(weight) = weight else {
                    let place = prompt[..at].chars().count() + 2;
                    bail!(
                        "`{number}` is not a weight, at character {place} of the prompt `{prompt}`\n\nhint: `(word:1.2)`, or `\\(` for a bracket itself"
                    );
                };
                multiply(&mut segments, round.pop(), weight);
            }
            ')' | ']' | ':' => push(&mut segments, &rest[..length]),
            _ => {
                length = rest
                    .find(['\\', '(', ')', '[', ']', ':'])
                    .unwrap_or(rest.len());
                let mut text = &rest[..length];
                while let Some(place) = word(text, "BREAK") {
                    push(&mut segments, text[..place].trim_end());
                    segments.push(Segment::Break);
                    text = text[place + 5..].trim_start();
                }
                push(&mut segments, text);
            }
        }
        at += length;
    }
    for (opened, factor) in round
        .into_iter()
        .map(|at| (at, ROUND))
        .chain(square.into_iter().map(|at| (at, SQUARE)))
    {
        multiply(&mut segments, Some(opened), factor);
    }
    // neighbours of one weight are one text, whose words may run on
    let mut joined: Vec<Segment> = vec![];
    for segment in segments {
        match (joined.last_mut(), segment) {
            (
                Some(Segment::Text { text, weight }),
                Segment::Text {
                    text: more,
                    weight: other,
                },
            ) if *weight == other => text.push_str(&more),
            (_, segment) => joined.push(segment),
        }
    }
    Ok(joined)
}

fn push(segments: &mut Vec<Segment>, text: &str) {
    segments.push(Segment::Text {
        text: text.into(),
        weight: 1.0,
    });
}

fn multiply(segments: &mut [Segment], from: Option<usize>, factor: f32) {
    for segment in segments.iter_mut().skip(from.unwrap_or(usize::MAX)) {
        if let Segment::Text { weight, .. } = segment {
            *weight *= factor;
        }
    }
}

/// The length of `: 1.2 )` at the beginning of a text, if it is there.
fn weight_length(text: &str) -> Option<usize> {
    let after = text.strip_prefix(':')?;
    let number = after.trim_start();
    let digits = number.strip_prefix(['+', '-']).unwrap_or(number);
    let length = digits
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .filter(|length| *length > 0)?;
    digits[length..]
        .trim_start()
        .strip_prefix(')')
        .map(|rest| text.len() - rest.len())
}

/// A node of the syntax tree of prompt editing.
enum Node {
    Text(String),
    /// `[before:after:step]`
    EditAt {
        before: Vec<Node>,
        after: Vec<Node>,
        step: usize,
    },
    /// `[a|b]`: one after the other, step by step
    Alternate(Vec<Vec<Node>>),
}

impl Node {
    fn write(&self, step: usize, to: &mut String) {
        let mut write = |nodes: &[Node]| nodes.iter().for_each(|node| node.write(step, to));
        match self {
            Self::Text(text) => to.push_str(text),
            Self::EditAt {
                before,
                after,
                step: at,
            } => write(if step < *at { before } else { after }),
            Self::Alternate(alternatives) => write(
                alternatives
                    .get(step % alternatives.len().max(1))
                    .map_or(&[], Vec::as_slice),
            ),
        }
    }
}

/// Parses prompt editing and alternating words; brackets that only weigh stay as they are.
struct Parser<'a> {
    rest: &'a str,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            rest: text,
            depth: 0,
        }
    }

    fn nodes(&mut self, prompt: &str, steps: usize) -> Result<Vec<Node>> {
        let mut nodes = self.until(&[], prompt, steps)?;
        // brackets that are closed without being opened
        while let Some(c) = self.rest.chars().next() {
            nodes.push(Node::Text(self.take(c.len_utf8()).into()));
            nodes.extend(self.until(&[], prompt, steps)?);
        }
        Ok(nodes)
    }

    fn take(&mut self, length: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(length);
        self.rest = rest;
        taken
    }

    /// Parses up to one of these characters, which is left there, or to the end.
    fn until(&mut self, ends: &[char], prompt: &str, steps: usize) -> Result<Vec<Node>> {
        let mut nodes = vec![];
        let mut text = String::new();
        let mut round = 0;
        while let Some(c) = self.rest.chars().next() {
            if ends.contains(&c) && (round == 0 || c == ']') {
                break;
            }
            match c {
                '\\' => {
                    let length = 1 + self.rest[1..].chars().next().map_or(0, char::len_utf8);
                    text.push_str(self.take(length));
                }
                '[' if self.depth < MAX_DEPTH => {
                    nodes.push(Node::Text(std::mem::take(&mut text)));
                    nodes.extend(self.brackets(prompt, steps)?);
                }
                _ => {
                    round = match c {
                        '(' => round + 1,
                        ')' if round > 0 => round - 1,
                        _ => round,
                    };
                    text.push_str(self.take(c.len_utf8()));
                }
            }
        }
        nodes.push(Node::Text(text));
        Ok(nodes)
    }

    /// Parses `[...]` of any kind.
    fn brackets(&mut self, prompt: &str, steps: usize) -> Result<Vec<Node>> {
        let begun = self.rest;
        let opening = self.take(1);
        self.depth += 1;
        let mut parts = vec![];
        let mut separators = vec![];
        let closed = loop {
            let start = self.rest;
            let part = self.until(&[':', '|', ']'], prompt, steps)?;
            parts.push((part, &start[..start.len() - self.rest.len()]));
            match self.rest.chars().next() {
                Some(']') => {
                    self.take(1);
                    break true;
                }
                Some(c) => {
                    separators.push(c);
                    self.take(1);
                }
                None => break false,
            }
        };
        self.depth -= 1;
        let has = |c: char| separators.iter().all(|other| *other == c) && !separators.is_empty();
        if closed && has('|') {
            return Ok(vec![Node::Alternate(
                parts.into_iter().map(|(nodes, _)| nodes).collect(),
            )]);
        }
        let when = parts.last().map_or("", |(_, text)| text.trim());
        if closed
            && has(':')
            && parts.len() <= 3
            && when.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        {
            let place = prompt.len() - begun.len();
            let place = prompt
                .get(..place)
                .map_or(0, |before| before.chars().count())
                + 1;
            let at = when.parse().ok().filter(|at: &f64| at.is_finite());
            let hint =
                "a fraction of the steps below 1, or a step: `[cat:dog:0.5]`, `[cat:dog:12]`";
            ensure!(
                at.is_some(),
                "`{when}` is not a step, in the brackets at character {place} of the prompt `{prompt}`\n\nhint: {hint}"
            );
            let at = at.unwrap_or(0.0);
            let is_fraction = at < 1.0 || when.contains('.');
            let step = if is_fraction { at * steps as f64 } else { at } as usize;
            parts.pop();
            let after = parts.pop().map(|(nodes, _)| nodes).unwrap_or_default();
            let before = parts.pop().map(|(nodes, _)| nodes).unwrap_or_default();
            return Ok(vec![Node::EditAt {
                before,
                after,
                step,
            }]);
        }
        // weights or no syntax at all: as typed, with the nodes that are inside
        let mut nodes = vec![Node::Text(opening.into())];
        for (i, (part, _)) in parts.into_iter().enumerate() {
            nodes.extend(
                i.checked_sub(1)
                    .and_then(|i| separators.get(i))
                    .map(|c| Node::Text(c.to_string())),
            );
            nodes.extend(part);
        }
        nodes.extend(closed.then(|| Node::Text("]".into())));
        Ok(nodes)
    }
}
