//! What the headers of a pool's shards say of their rows: nearly always the same.

use std::collections::HashMap;

/// A text for each shard; equal ones are stored once.
#[derive(Debug)]
pub struct Descrs {
    distinct: Vec<String>,
    /// Of each shard, the place of its text in `distinct`.
    places: Vec<usize>,
}

impl Descrs {
    pub fn new(texts: impl IntoIterator<Item = String>) -> Self {
        let mut place_of = HashMap::new();
        let places: Vec<_> = texts
            .into_iter()
            .map(|text| {
                let next = place_of.len();
                *place_of.entry(text).or_insert(next)
            })
            .collect();
        let mut distinct: Vec<_> = place_of.into_iter().collect();
        distinct.sort_unstable_by_key(|&(_, place)| place);
        Self { distinct: distinct.into_iter().map(|(text, _)| text).collect(), places }
    }

    /// The text of a shard.
    pub fn of(&self, shard: usize) -> &str {
        &self.distinct[self.places[shard]]
    }

    /// The texts, each once, in the order in which shards first have them.
    pub fn distinct(&self) -> &[String] {
        &self.distinct
    }

    /// Of each shard, the place of its text among the distinct ones.
    pub fn places(&self) -> &[usize] {
        &self.places
    }

    /// The first shard whose text is not the first shard's.
    pub fn odd(&self) -> Option<usize> {
        self.places.iter().position(|&place| place != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_are_stored_once_and_in_order() {
        let descrs = Descrs::new(["b", "b", "a", "b", "c", "a"].map(str::to_owned));
        assert_eq!(descrs.distinct(), ["b", "a", "c"]);
        assert_eq!(descrs.places(), [0, 0, 1, 0, 2, 1]);
        assert_eq!(descrs.of(5), "a");
        assert_eq!(descrs.odd(), Some(2));
        assert_eq!(Descrs::new(["b", "b"].map(str::to_owned)).odd(), None);
    }
}
