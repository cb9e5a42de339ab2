//! CLIP's byte-level BPE (Radford et al. 2021) on the `tokenizers` crate.
//!
//! Built from a checkpoint's `tokenizer.json`, or `vocab.json` and `merges.txt`, or CLIP's own vocabulary, which is part
//! of the program: a single-file checkpoint brings none.

use super::prompt::Piece;
use crate::weights::TokenizerFiles;
use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use std::collections::HashMap;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers, replace::ReplacePattern};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, Encoding, SplitDelimiterBehavior};

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

/// A chunk is left early at a comma among so many of its last tokens, as A1111 does, so that a phrase stays whole.
const COMMA_REACH: usize = 20;

/// Turns text into token ids.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    comma: Option<u32>,
    start: u32,
    end: u32,
    pad: u32,
    max_tokens: usize,
}

impl Tokenizer {
    /// Builds the tokenizer of a checkpoint. `config` is its `tokenizer_config.json`. Errors if the files do not fit together.
    pub fn new(files: &TokenizerFiles, config: &Value) -> Result<Self> {
        let mut inner = match files {
            TokenizerFiles::Json(json) => {
                let mut inner: tokenizers::Tokenizer = json.parse().map_err(|e| anyhow!("tokenizer.json is damaged: {e}"))?;
                inner.with_padding(None);
                inner.with_truncation(None).map_err(|e| anyhow!("{e}"))?;
                inner
            }
            TokenizerFiles::VocabMerges { vocab, merges } => {
                let vocab: HashMap<String, u32> = serde_json::from_str(vocab).context("vocab.json is damaged")?;
                build(vocab, pairs(merges)?)?
            }
            TokenizerFiles::Clip => {
                let merges = pairs(CLIP_MERGES)?;
                build(clip_vocab(&merges), merges)?
            }
        };
        let named = |key: &str, default: &str| {
            let value = config.get(key);
            value.and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str())).unwrap_or(default).to_string()
        };
        let (start, end, pad) = (named("bos_token", START), named("eos_token", END), named("pad_token", END));
        // as in transformers these are never split, and stand for themselves in a prompt: SD2.x's padding `!` does
        // (transformers matches the start token, and the end token unless it pads, in lower-cased text)
        let token = |text: &str, normalized: bool| AddedToken::from(text, true).normalized(normalized);
        let special = [token(&pad, false), token(&start, true), token(&end, pad != end)];
        inner.add_special_tokens(special).map_err(|e| anyhow!("{e}"))?;
        let id = |token: &str| inner.token_to_id(token).with_context(|| format!("the tokenizer has no token `{token}`"));
        let (start, end, pad) = (id(&start)?, id(&end)?, id(&pad)?);
        let max_tokens = config.get("model_max_length").and_then(Value::as_u64).map_or(CLIP_TOKENS, |n| n.min(100_000) as usize);
        if max_tokens < 3 {
            bail!("model_max_length of the tokenizer is {max_tokens}, too few for any word");
        }
        Ok(Self { start, end, pad, max_tokens, comma: inner.token_to_id(",</w>"), inner })
    }

    /// Ids of the text between start and end, with their places in it.
    fn words(&self, text: &str) -> Result<Encoding> {
        self.inner.encode(text, false).map_err(|e| anyhow!("cannot tokenize the prompt: {e}"))
    }

    /// All ids with start and end, neither cut nor padded.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        Ok([&[self.start], self.words(text)?.get_ids(), &[self.end]].concat())
    }

    /// Exactly `max_tokens` ids (at most the encoder's positions): cut after the last that fits, or padded.
    pub fn encode(&self, text: &str, positions: usize) -> Result<Tokens> {
        let length = self.max_tokens.min(positions);
        let encoding = self.words(text)?;
        let room = length.saturating_sub(2);
        let cut = encoding.get_offsets().get(room).and_then(|(from, _)| text.get(*from..)).map(|s| s.trim().to_string());
        let words = encoding.get_ids();
        let mut ids = [&[self.start], words.get(..room).unwrap_or(words), &[self.end]].concat();
        ids.resize(length, self.pad);
        Ok(Tokens { ids, cut })
    }

    /// All of a prompt, in chunks of `max_tokens` ids (at most the encoder's positions), at least one. As in A1111 each piece
    /// is tokenized by itself.
    pub fn chunks(&self, pieces: &[Piece], positions: usize) -> Result<Vec<Chunk>> {
        let room = self.max_tokens.min(positions).saturating_sub(2).max(1);
        let mut filling = Filling { tokenizer: self, room, done: vec![], open: vec![], comma: None };
        for piece in pieces {
            match piece {
                Piece::Break => filling.close(),
                Piece::Text { text, weight } => self.words(text)?.get_ids().iter().for_each(|id| filling.push(*id, *weight)),
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
    fn push(&mut self, id: u32, weight: f32) {
        if Some(id) == self.tokenizer.comma {
            self.comma = Some(self.open.len());
        } else if self.open.len() == self.room
            && let Some(comma) = self.comma.filter(|comma| self.room - comma <= COMMA_REACH)
        {
            let next = self.open.split_off(comma + 1);
            self.close();
            self.open = next;
        }
        if self.open.len() == self.room {
            self.close();
        }
        self.open.push((id, weight));
    }

    fn close(&mut self) {
        let Tokenizer { start, end, pad, .. } = *self.tokenizer;
        let (mut ids, mut weights): (Vec<u32>, Vec<f32>) = std::iter::once((start, 1.0)).chain(self.open.drain(..)).unzip();
        ids.push(end);
        ids.resize(self.room + 2, pad);
        weights.resize(self.room + 2, 1.0);
        self.done.push(Chunk { ids, weights });
        self.comma = None;
    }
}

/// The merges file, less its version line.
fn pairs(merges: &str) -> Result<Vec<(String, String)>> {
    let lines = merges.lines().filter(|l| !l.starts_with("#version") && !l.trim().is_empty());
    lines
        .map(|l| {
            l.split_once(' ').map(|(a, b)| (a.into(), b.into())).with_context(|| format!("merges.txt has a line without two parts: `{l}`"))
        })
        .collect()
}

/// CLIP's vocabulary in its order: bytes, bytes that end a word, merges, start and end.
fn clip_vocab(merges: &[(String, String)]) -> HashMap<String, u32> {
    // GPT-2's byte alphabet: printable bytes stand for themselves, the others follow from 256 up
    let printable = |b: &u32| (33..=126).contains(b) || (161..=172).contains(b) || (174..=255).contains(b);
    let others = (0..256u32).filter(|b| !printable(b)).count() as u32;
    let alphabet = (0..256u32).filter(printable).chain(256..256 + others).filter_map(char::from_u32).map(String::from);
    let bytes: Vec<String> = alphabet.collect();
    let ends = bytes.iter().map(|b| format!("{b}</w>"));
    let merged = merges.iter().map(|(a, b)| format!("{a}{b}"));
    let all = bytes.iter().cloned().chain(ends).chain(merged).chain([START.to_string(), END.to_string()]);
    all.zip(0..).collect()
}

fn build(vocab: HashMap<String, u32>, merges: Vec<(String, String)>) -> Result<tokenizers::Tokenizer> {
    let wrong = |e: tokenizers::Error| anyhow!("the tokenizer's vocabulary and merges do not fit together: {e}");
    let bpe = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
        .unk_token(END.into())
        .end_of_word_suffix("</w>".into())
        .build()
        .map_err(wrong)?;
    let mut inner = tokenizers::Tokenizer::new(bpe);
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(wrong)?;
    inner.with_normalizer(Some(Normalizers::new(vec![NFC.into(), spaces.into(), Lowercase.into()]))).map_err(wrong)?;
    let words = Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true).map_err(wrong)?;
    let bytes = ByteLevel::new(false, true, true);
    inner.with_pre_tokenizer(Some(PreTokenizers::new(vec![words.into(), bytes.into()])));
    Ok(inner)
}
