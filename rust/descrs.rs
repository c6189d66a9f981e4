//! What the headers of a dataset's shards say of their rows: nearly always the same.

use std::collections::HashMap;

use crate::memory::{self, OutOfMemory};

/// A text for each shard; equal ones are stored once.
#[derive(Debug)]
pub struct Descrs {
    distinct: Vec<String>,
    /// Of each shard, the place of its text in `distinct`.
    places: Vec<usize>,
}

impl Descrs {
    pub fn new(texts: Vec<String>) -> Result<Self, OutOfMemory> {
        let mut places = memory::with_capacity(texts.len())?;
        let mut place_of = HashMap::new();
        for text in texts {
            place_of.try_reserve(1).map_err(|_| OutOfMemory::of::<(String, usize)>(1))?;
            let next = place_of.len();
            places.push(*place_of.entry(text).or_insert(next));
        }
        let mut distinct = memory::filled(String::new(), place_of.len())?;
        for (text, place) in place_of {
            distinct[place] = text;
        }
        Ok(Self { distinct, places })
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
        let new = |texts: &[&str]| {
            Descrs::new(texts.iter().map(|&text| text.to_owned()).collect()).expect("memory")
        };
        let descrs = new(&["b", "b", "a", "b", "c", "a"]);
        assert_eq!(descrs.distinct(), ["b", "a", "c"]);
        assert_eq!(descrs.places(), [0, 0, 1, 0, 2, 1]);
        assert_eq!(descrs.of(5), "a");
        assert_eq!(descrs.odd(), Some(2));
        assert_eq!(new(&["b", "b"]).odd(), None);
    }
}
