//! CLIP's byte-level BPE (Radford et al. 2021) on the `tokenizers` crate.
//!
//! Built from a checkpoint's `tokenizer.json`, or `vocab.json` and `merges.txt`, or CLIP's own
//! vocabulary, which is part of the program: a single-file checkpoint brings none. It also knows the
//! tokens of textual inversions.

use super::prompt::Segment;
use crate::weights::TokenizerFiles;
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{
    Lowercase, NFC, Replace, Sequence as Normalizers, replace::ReplacePattern,
};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::normalizer::Range as In;
use tokenizers::{AddedToken, NormalizedString, Normalizer, SplitDelimiterBehavior};

/// CLIP's 48,894 merges; its vocabulary follows from them.
const CLIP_MERGES: &str = include_str!("../../assets/clip/merges.txt");
const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
/// Contractions, runs of letters, single digits, runs of anything else.
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// Tokens that CLIP was trained on, start and end included.
const CLIP_TOKENS: usize = 77;

/// The token ids of a prompt, and what did not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// start, text, end, padding: always the model's number of tokens
    pub ids: Vec<u32>,
    /// the text that was cut off, if any
    pub cut: Option<String>,
}

/// As many tokens of a long prompt as the model takes at once.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// start, text, end, padding
    pub ids: Vec<u32>,
    /// the factor of each token's embedding
    pub weights: Vec<f32>,
}

/// The number of last tokens among which a chunk may end early at a comma, so that a phrase stays
/// whole; A1111's default.
const COMMA_REACH: usize = 20;

/// Tokens that stay in one chunk: a single one, or all vectors of a textual inversion.
struct Word {
    ids: Vec<u32>,
    /// the position in the text, in bytes
    from: usize,
}

/// A token of a textual inversion, beyond the vocabulary.
struct TextualInversion {
    token: Arc<str>,
    /// the token as the tokenizer normalizes text: in lower case
    normalized: String,
    ids: Range<u32>,
}

/// Turns text into token ids.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    comma: Option<u32>,
    start: u32,
    end: u32,
    pad: u32,
    max_tokens: usize,
    /// the longest first
    inversions: Vec<TextualInversion>,
}

impl Tokenizer {
    /// Builds the tokenizer of a checkpoint. `config` is its `tokenizer_config.json`. Errors if the
    /// files do not fit together.
    pub fn new(files: &TokenizerFiles, config: &Value) -> Result<Self> {
        let mut inner = match files {
            TokenizerFiles::Json(json) => {
                let mut inner: tokenizers::Tokenizer = json
                    .parse()
                    .map_err(|e| anyhow!("tokenizer.json is damaged: {e}"))?;
                inner.with_padding(None);
                inner.with_truncation(None).map_err(|e| anyhow!("{e}"))?;
                inner
            }
            TokenizerFiles::VocabMerges { vocab, merges } => {
                let vocab: HashMap<String, u32> =
                    serde_json::from_str(vocab).context("vocab.json is damaged")?;
                build(vocab, pairs(merges)?)?
            }
            TokenizerFiles::Clip => {
                let merges = pairs(CLIP_MERGES)?;
                build(clip_vocab(&merges), merges)?
            }
        };
        let named = |key: &str, default: &str| {
            let value = config.get(key);
            value
                .and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str()))
                .unwrap_or(default)
                .to_string()
        };
        let (start, end, pad) = (
            named("bos_token", START),
            named("eos_token", END),
            named("pad_token", END),
        );
        // as in transformers these are never split, and stand for themselves in a prompt: SD2.x's
        // padding `!` does (transformers matches the start token, and the end token unless it pads,
        // in lower-cased text)
        let token =
            |text: &str, normalized: bool| AddedToken::from(text, true).normalized(normalized);
        let special = [
            token(&pad, false),
            token(&start, true),
            token(&end, pad != end),
        ];
        inner
            .add_special_tokens(special)
            .map_err(|e| anyhow!("{e}"))?;
        let id = |token: &str| {
            inner
                .token_to_id(token)
                .with_context(|| format!("the tokenizer has no token `{token}`"))
        };
        let (start, end, pad) = (id(&start)?, id(&end)?, id(&pad)?);
        let max_tokens = config
            .get("model_max_length")
            .and_then(Value::as_u64)
            .map_or(CLIP_TOKENS, |n| n.min(100_000) as usize);
        if max_tokens < 3 {
            bail!("model_max_length of the tokenizer is {max_tokens}, too few for any word");
        }
        Ok(Self {
            start,
            end,
            pad,
            max_tokens,
            comma: inner.token_to_id(",</w>"),
            inner,
            inversions: vec![],
        })
    }

    /// Adds a token of these ids, which is matched wherever it stands by itself. Errors if no text
    /// can contain it, or if the ids do not fit into a chunk.
    pub fn add_token(&mut self, token: &Arc<str>, ids: Range<u32>, positions: usize) -> Result<()> {
        let normalized = self.normalized(token)?.get().trim().to_string();
        ensure!(
            !normalized.is_empty(),
            "`{token}` is not a word that a prompt can contain"
        );
        let (n, room) = (ids.len(), self.room(positions));
        ensure!(
            n <= room,
            "`{token}` has {n} vectors, the model takes {room} tokens at once"
        );
        self.inversions.push(TextualInversion {
            token: token.clone(),
            normalized,
            ids,
        });
        self.inversions
            .sort_by_key(|inversion| std::cmp::Reverse(inversion.normalized.len()));
        Ok(())
    }

    /// Returns the added tokens that a text contains, in order.
    pub fn added_tokens(&self, text: &str) -> Result<Vec<Arc<str>>> {
        Ok(self
            .find_inversions(&self.normalized(text)?)
            .into_iter()
            .map(|(_, inversion)| inversion.token.clone())
            .collect())
    }

    /// The number of tokens in a chunk, without start and end.
    fn room(&self, positions: usize) -> usize {
        self.max_tokens.min(positions).saturating_sub(2)
    }

    fn normalized(&self, text: &str) -> Result<NormalizedString> {
        let mut normalized = NormalizedString::from(text);
        let normalizer = self.inner.get_normalizer();
        normalizer
            .map_or(Ok(()), |normalizer| normalizer.normalize(&mut normalized))
            .map_err(unreadable)?;
        Ok(normalized)
    }

    /// Finds textual inversions in a normalized text, leftmost-longest: their byte ranges in it.
    fn find_inversions(&self, text: &NormalizedString) -> Vec<(Range<usize>, &TextualInversion)> {
        let text = text.get();
        let mut found: Vec<(Range<usize>, &TextualInversion)> = vec![];
        for (from, _) in text.char_indices().filter(|_| !self.inversions.is_empty()) {
            let (before, rest) = text.split_at(from);
            let matches = |inversion: &&TextualInversion| {
                let token = &*inversion.normalized;
                rest.strip_prefix(token)
                    .is_some_and(|after| !runs_on(before, token) && !runs_on(token, after))
            };
            if found.last().is_none_or(|(last, _)| last.end <= from)
                && let Some(inversion) = self.inversions.iter().find(matches)
            {
                found.push((from..from + inversion.normalized.len(), inversion));
            }
        }
        found
    }

    /// Tokenizes a text, without start and end.
    fn words(&self, text: &str) -> Result<Vec<Word>> {
        let (mut words, mut at) = (vec![], 0);
        if !self.inversions.is_empty() {
            let normalized = self.normalized(text)?;
            for (range, inversion) in self.find_inversions(&normalized) {
                let range = normalized
                    .convert_offsets(In::Normalized(range))
                    .context("an added token lies outside of the prompt")?;
                self.push_words(text, at..range.start, &mut words)?;
                words.push(Word {
                    ids: inversion.ids.clone().collect(),
                    from: range.start,
                });
                at = range.end;
            }
        }
        self.push_words(text, at..text.len(), &mut words)?;
        Ok(words)
    }

    /// Tokenizes a byte range of a text with the vocabulary alone.
    fn push_words(&self, text: &str, range: Range<usize>, words: &mut Vec<Word>) -> Result<()> {
        let encoding = self
            .inner
            .encode(text.get(range.clone()).unwrap_or_default(), false)
            .map_err(unreadable)?;
        let each = encoding.get_ids().iter().zip(encoding.get_offsets());
        words.extend(each.map(|(id, (from, _))| Word {
            ids: vec![*id],
            from: range.start + from,
        }));
        Ok(())
    }

    /// Returns all ids with start and end, neither cut nor padded: what tests compare.
    #[cfg(any(feature = "internals", test))]
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let words = self.words(text)?.into_iter().flat_map(|word| word.ids);
        Ok(std::iter::once(self.start)
            .chain(words)
            .chain([self.end])
            .collect())
    }

    /// Returns exactly `max_tokens` ids (at most `positions`, the encoder's): cut after the last that
    /// fits, or padded.
    pub fn encode(&self, text: &str, positions: usize) -> Result<Tokens> {
        let length = self.max_tokens.min(positions);
        let words = self.words(text)?;
        let all = || {
            words
                .iter()
                .flat_map(|word| word.ids.iter().map(|id| (*id, word.from)))
        };
        let room = self.room(positions);
        let cut = all()
            .nth(room)
            .and_then(|(_, from)| text.get(from..))
            .map(|s| s.trim().to_string());
        let mut ids = vec![self.start];
        ids.extend(all().map(|(id, _)| id).take(room).chain([self.end]));
        ids.resize(length, self.pad);
        Ok(Tokens { ids, cut })
    }

    /// Splits a whole prompt into chunks of `max_tokens` ids (at most `positions`, the encoder's), at
    /// least one. As in A1111 each segment is tokenized by itself.
    pub fn chunks(&self, segments: &[Segment], positions: usize) -> Result<Vec<Chunk>> {
        let room = self.room(positions).max(1);
        let mut chunker = Chunker {
            tokenizer: self,
            room,
            done: vec![],
            open: vec![],
            comma: None,
        };
        for segment in segments {
            match segment {
                Segment::Break => chunker.close(),
                Segment::Text { text, weight } => self
                    .words(text)?
                    .iter()
                    .for_each(|word| chunker.push(&word.ids, *weight)),
            }
        }
        if !chunker.open.is_empty() || chunker.done.is_empty() {
            chunker.close();
        }
        Ok(chunker.done)
    }
}

/// The chunks that [`Tokenizer::chunks`] has filled so far.
struct Chunker<'a> {
    tokenizer: &'a Tokenizer,
    room: usize,
    done: Vec<Chunk>,
    /// tokens of the chunk that is filled, with their weights
    open: Vec<(u32, f32)>,
    /// the position of its last comma
    comma: Option<usize>,
}

impl Chunker<'_> {
    /// Adds tokens that stay together.
    fn push(&mut self, ids: &[u32], weight: f32) {
        if self.tokenizer.comma.is_some_and(|comma| ids == [comma]) {
            self.comma = Some(self.open.len());
        } else if self.open.len() == self.room
            && let Some(comma) = self.comma.filter(|comma| self.room - comma <= COMMA_REACH)
        {
            let next = self.open.split_off(comma + 1);
            self.close();
            self.open = next;
        }
        if self.open.len() + ids.len() > self.room {
            self.close();
        }
        self.open.extend(ids.iter().map(|id| (*id, weight)));
    }

    /// Pads the open chunk and begins the next one.
    fn close(&mut self) {
        let Tokenizer {
            start, end, pad, ..
        } = *self.tokenizer;
        let (mut ids, mut weights): (Vec<u32>, Vec<f32>) = std::iter::once((start, 1.0))
            .chain(self.open.drain(..))
            .unzip();
        ids.push(end);
        ids.resize(self.room + 2, pad);
        weights.resize(self.room + 2, 1.0);
        self.done.push(Chunk { ids, weights });
        self.comma = None;
    }
}

fn unreadable(e: tokenizers::Error) -> anyhow::Error {
    anyhow!("cannot tokenize the prompt: {e}")
}

/// Whether a word of one text continues in the next one.
fn runs_on(text: &str, next: &str) -> bool {
    text.chars().next_back().is_some_and(char::is_alphabetic)
        && next.chars().next().is_some_and(char::is_alphabetic)
}

/// Parses the merges file, without its version line.
fn pairs(merges: &str) -> Result<Vec<(String, String)>> {
    let lines = merges
        .lines()
        .filter(|l| !l.starts_with("#version") && !l.trim().is_empty());
    lines
        .map(|l| {
            l.split_once(' ')
                .map(|(a, b)| (a.into(), b.into()))
                .with_context(|| format!("merges.txt has a line without two parts: `{l}`"))
        })
        .collect()
}

/// Builds CLIP's vocabulary in its order: bytes, bytes that end a word, merges, start and end.
fn clip_vocab(merges: &[(String, String)]) -> HashMap<String, u32> {
    // GPT-2's byte alphabet: printable bytes stand for themselves, the others follow from 256 up
    let printable =
        |b: &u32| (33..=126).contains(b) || (161..=172).contains(b) || (174..=255).contains(b);
    let others = (0..256u32).filter(|b| !printable(b)).count() as u32;
    let alphabet = (0..256u32)
        .filter(printable)
        .chain(256..256 + others)
        .filter_map(char::from_u32)
        .map(String::from);
    let bytes: Vec<String> = alphabet.collect();
    let ends = bytes.iter().map(|b| format!("{b}</w>"));
    let merged = merges.iter().map(|(a, b)| format!("{a}{b}"));
    let all = bytes
        .iter()
        .cloned()
        .chain(ends)
        .chain(merged)
        .chain([START.to_string(), END.to_string()]);
    all.zip(0..).collect()
}

fn build(
    vocab: HashMap<String, u32>,
    merges: Vec<(String, String)>,
) -> Result<tokenizers::Tokenizer> {
    let wrong = |e: tokenizers::Error| {
        anyhow!("the tokenizer's vocabulary and merges do not fit together: {e}")
    };
    let bpe = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
        .unk_token(END.into())
        .end_of_word_suffix("</w>".into())
        .build()
        .map_err(wrong)?;
    let mut inner = tokenizers::Tokenizer::new(bpe);
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(wrong)?;
    inner
        .with_normalizer(Some(Normalizers::new(vec![
            NFC.into(),
            spaces.into(),
            Lowercase.into(),
        ])))
        .map_err(wrong)?;
    let words = Split::new(
        SplitPattern::Regex(WORDS.into()),
        SplitDelimiterBehavior::Removed,
        true,
    )
    .map_err(wrong)?;
    let bytes = ByteLevel::new(false, true, true);
    inner.with_pre_tokenizer(Some(PreTokenizers::new(vec![words.into(), bytes.into()])));
    Ok(inner)
}
