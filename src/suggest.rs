//! What a mistyped name may have meant.

/// Returns the candidate nearest to `name`, if any is near at all: by edit distance, in which two
/// swapped letters count once.
pub fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (strsim::damerau_levenshtein(name, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= candidate.len().max(name.len()) / 3)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swapped_and_missing_letters_are_near_and_other_words_are_not() {
        let names = || ["width", "height", "steps"].into_iter();
        assert_eq!(nearest("widht", names()), Some("width"));
        assert_eq!(nearest("stps", names()), Some("steps"));
        assert_eq!(nearest("seed", names()), None);
    }
}
