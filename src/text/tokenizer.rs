//! CLIP's byte-level BPE (Radford et al. 2021) on the `tokenizers` crate.
//!
//! Built from a checkpoint's `tokenizer.json`, or `vocab.json` and `merges.txt`, or CLIP's own
//! vocabulary, which is part of the program: a single-file checkpoint brings none.

use super::prompt::Piece;
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

/// A prompt's token ids, and what did not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// start, text, end, padding: always the model's number of tokens
    pub ids: Vec<u32>,
    /// the text that was cut off, if any
    pub cut: Option<String>,
}

/// Some of a long prompt's tokens: as many as the model takes at once.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// start, text, end, padding
    pub ids: Vec<u32>,
    /// what the embedding of each is multiplied by
    pub weights: Vec<f32>,
}

/// A chunk is left early at a comma among so many of its last tokens, as A1111 does, so that a
/// phrase stays whole.
const COMMA_REACH: usize = 20;

/// What stands together in a text: a token, or all vectors of a word that was learned.
struct Word {
    ids: Vec<u32>,
    /// its place in the text, in bytes
    from: usize,
}

/// A word beyond the vocabulary.
struct Learned {
    token: Arc<str>,
    /// the token as the tokenizer reads text: in lower case
    normal: String,
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
    learned: Vec<Learned>,
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
            learned: vec![],
        })
    }

    /// Has these ids stand for a token, wherever that stands by itself. Errors if it is none, or if
    /// they do not fit into a chunk.
    pub fn learn(&mut self, token: &Arc<str>, ids: Range<u32>, positions: usize) -> Result<()> {
        let normal = self.normalized(token)?.get().trim().to_string();
        ensure!(
            !normal.is_empty(),
            "`{token}` is no word that could stand in a prompt"
        );
        let (n, room) = (ids.len(), self.room(positions));
        ensure!(
            n <= room,
            "`{token}` has {n} vectors, the model takes {room} tokens at once"
        );
        self.learned.push(Learned {
            token: token.clone(),
            normal,
            ids,
        });
        self.learned
            .sort_by_key(|learned| std::cmp::Reverse(learned.normal.len()));
        Ok(())
    }

    /// The learned tokens that stand in a text.
    pub fn learned(&self, text: &str) -> Result<Vec<Arc<str>>> {
        Ok(self
            .places(&self.normalized(text)?)
            .into_iter()
            .map(|(_, learned)| learned.token.clone())
            .collect())
    }

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

    /// Where learned tokens stand in a text, in the bytes of its normal form: the first that can,
    /// of those the longest.
    fn places(&self, text: &NormalizedString) -> Vec<(Range<usize>, &Learned)> {
        let text = text.get();
        let mut places: Vec<(Range<usize>, &Learned)> = vec![];
        for (from, _) in text.char_indices().filter(|_| !self.learned.is_empty()) {
            let (before, rest) = text.split_at(from);
            let stands = |learned: &&Learned| {
                rest.strip_prefix(&*learned.normal).is_some_and(|after| {
                    !runs_on(before, &learned.normal) && !runs_on(&learned.normal, after)
                })
            };
            if places.last().is_none_or(|(last, _)| last.end <= from)
                && let Some(learned) = self.learned.iter().find(stands)
            {
                places.push((from..from + learned.normal.len(), learned));
            }
        }
        places
    }

    /// The text between start and end.
    fn words(&self, text: &str) -> Result<Vec<Word>> {
        let (mut words, mut at) = (vec![], 0);
        if !self.learned.is_empty() {
            let normalized = self.normalized(text)?;
            for (place, learned) in self.places(&normalized) {
                let place = normalized
                    .convert_offsets(In::Normalized(place))
                    .context("a word lost its place in the prompt")?;
                self.usual(text, at..place.start, &mut words)?;
                words.push(Word {
                    ids: learned.ids.clone().collect(),
                    from: place.start,
                });
                at = place.end;
            }
        }
        self.usual(text, at..text.len(), &mut words)?;
        Ok(words)
    }

    /// Adds what stands at a place of a text, as the vocabulary has it.
    fn usual(&self, text: &str, place: Range<usize>, words: &mut Vec<Word>) -> Result<()> {
        let encoding = self
            .inner
            .encode(text.get(place.clone()).unwrap_or_default(), false)
            .map_err(unreadable)?;
        let each = encoding.get_ids().iter().zip(encoding.get_offsets());
        words.extend(each.map(|(id, (from, _))| Word {
            ids: vec![*id],
            from: place.start + from,
        }));
        Ok(())
    }

    /// All ids with start and end, neither cut nor padded.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let words = self.words(text)?.into_iter().flat_map(|word| word.ids);
        Ok(std::iter::once(self.start)
            .chain(words)
            .chain([self.end])
            .collect())
    }

    /// Exactly `max_tokens` ids (at most the encoder's positions): cut after the last that fits, or
    /// padded.
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

    /// All of a prompt, in chunks of `max_tokens` ids (at most the encoder's positions), at least
    /// one. As in A1111 each piece is tokenized by itself.
    pub fn chunks(&self, pieces: &[Piece], positions: usize) -> Result<Vec<Chunk>> {
        let room = self.room(positions).max(1);
        let mut filling = Filling {
            tokenizer: self,
            room,
            done: vec![],
            open: vec![],
            comma: None,
        };
        for piece in pieces {
            match piece {
                Piece::Break => filling.close(),
                Piece::Text { text, weight } => self
                    .words(text)?
                    .iter()
                    .for_each(|word| filling.push(&word.ids, *weight)),
            }
        }
        if !filling.open.is_empty() || filling.done.is_empty() {
            filling.close();
        }
        Ok(filling.done)
    }
}

/// What [`Tokenizer::chunks`] has so far.
struct Filling<'a> {
    tokenizer: &'a Tokenizer,
    room: usize,
    done: Vec<Chunk>,
    /// tokens of the chunk that is filled, with their weights
    open: Vec<(u32, f32)>,
    /// where in it its last comma stands
    comma: Option<usize>,
}

impl Filling<'_> {
    /// Adds what stands together.
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

/// Whether one text ends in the word that the next one begins with.
fn runs_on(text: &str, next: &str) -> bool {
    text.chars().next_back().is_some_and(char::is_alphabetic)
        && next.chars().next().is_some_and(char::is_alphabetic)
}

/// The merges file, less its version line.
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

/// CLIP's vocabulary in its order: bytes, bytes that end a word, merges, start and end.
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
