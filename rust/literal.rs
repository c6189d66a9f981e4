//! Parser of the Python literals that a `.npy` header is made of.
//!
//! Accepts what NumPy writes: dicts, lists, tuples, strings, unsigned decimal integers, `True`,
//! `False` and `None`. The text is hostile: nesting is bounded, and no token needs more memory than
//! its text justifies.

use crate::memory::{self, OutOfMemory};

/// How deep lists, tuples and dicts may nest.
const MAX_DEPTH: usize = 32;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Literal<'a> {
    Str(String),
    Int(u64),
    Bool(bool),
    None,
    List(Vec<Literal<'a>>),
    Tuple(Vec<Literal<'a>>),
    Dict(Vec<Entry<'a>>),
}

/// One `key: value` of a dict with string keys, and the value's source text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<'a> {
    pub key: String,
    pub value: Literal<'a>,
    pub text: &'a str,
}

/// Where parsing stopped, in bytes from the start of the text, and what was wanted there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyntaxError {
    pub at: usize,
    pub expected: &'static str,
}

/// Why a text was not parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParseError {
    Syntax(SyntaxError),
    Memory(OutOfMemory),
}

impl From<SyntaxError> for ParseError {
    fn from(error: SyntaxError) -> Self {
        Self::Syntax(error)
    }
}

impl From<OutOfMemory> for ParseError {
    fn from(error: OutOfMemory) -> Self {
        Self::Memory(error)
    }
}

/// Parses `text`, which must hold one literal and white space around it.
pub fn parse(text: &str) -> Result<Literal<'_>, ParseError> {
    let mut parser = Parser { text, at: 0, depth: 0 };
    let literal = parser.literal()?;
    parser.skip_space();
    if parser.at == text.len() { Ok(literal) } else { Err(parser.expected("nothing more")) }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn expected(&self, expected: &'static str) -> ParseError {
        ParseError::Syntax(SyntaxError { at: self.at, expected })
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or("")
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r' | b'\x0c')) {
            self.at += 1;
        }
    }

    /// Takes `byte` after any white space, or leaves it.
    fn take(&mut self, byte: u8) -> bool {
        self.skip_space();
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn literal(&mut self) -> Result<Literal<'a>, ParseError> {
        self.skip_space();
        match self.peek() {
            Some(b'\'' | b'"') => Ok(Literal::Str(self.string()?)),
            Some(b'0'..=b'9') => Ok(Literal::Int(self.integer()?)),
            Some(b'[') => self.nested(Self::list),
            Some(b'(') => self.nested(Self::tuple),
            Some(b'{') => self.nested(Self::dict),
            _ => self.word(),
        }
    }

    fn nested(
        &mut self,
        body: fn(&mut Self) -> Result<Literal<'a>, ParseError>,
    ) -> Result<Literal<'a>, ParseError> {
        if self.depth == MAX_DEPTH {
            return Err(self.expected("less nesting"));
        }
        self.depth += 1;
        self.at += 1;
        let literal = body(self)?;
        self.depth -= 1;
        Ok(literal)
    }

    fn list(&mut self) -> Result<Literal<'a>, ParseError> {
        Ok(Literal::List(self.items(b']', "',' or ']'")?.0))
    }

    /// A parenthesised literal without a comma is that literal, as in Python.
    fn tuple(&mut self) -> Result<Literal<'a>, ParseError> {
        let (mut items, comma) = self.items(b')', "',' or ')'")?;
        match items.pop() {
            Some(only) if items.is_empty() && !comma => Ok(only),
            Some(last) => {
                items.push(last);
                Ok(Literal::Tuple(items))
            }
            None => Ok(Literal::Tuple(items)),
        }
    }

    /// Literals up to `close`, and whether a comma came last.
    fn items(
        &mut self,
        close: u8,
        expected: &'static str,
    ) -> Result<(Vec<Literal<'a>>, bool), ParseError> {
        let mut items = Vec::new();
        let mut comma = true;
        while !self.take(close) {
            if !comma {
                return Err(self.expected(expected));
            }
            memory::push(&mut items, self.literal()?)?;
            comma = self.take(b',');
        }
        Ok((items, comma))
    }

    fn dict(&mut self) -> Result<Literal<'a>, ParseError> {
        let mut entries: Vec<Entry<'a>> = Vec::new();
        let mut comma = true;
        while !self.take(b'}') {
            if !comma {
                return Err(self.expected("',' or '}'"));
            }
            if !matches!(self.peek(), Some(b'\'' | b'"')) {
                return Err(self.expected("a string key"));
            }
            let key = self.string()?;
            if !self.take(b':') {
                return Err(self.expected("':'"));
            }
            self.skip_space();
            let start = self.at;
            let value = self.literal()?;
            let text = self.text.get(start..self.at).unwrap_or("");
            memory::push(&mut entries, Entry { key, value, text })?;
            comma = self.take(b',');
        }
        Ok(Literal::Dict(entries))
    }

    fn word(&mut self) -> Result<Literal<'a>, ParseError> {
        let rest = self.rest();
        let length = rest.bytes().take_while(u8::is_ascii_alphanumeric).count();
        let literal = match rest.get(..length) {
            Some("True") => Literal::Bool(true),
            Some("False") => Literal::Bool(false),
            Some("None") => Literal::None,
            _ => return Err(self.expected("a literal")),
        };
        self.at += length;
        Ok(literal)
    }

    /// Python takes leading zeros of zero alone.
    fn integer(&mut self) -> Result<u64, ParseError> {
        let padded = self.peek() == Some(b'0');
        let mut value: u64 = 0;
        while let Some(digit @ b'0'..=b'9') = self.peek() {
            value = value
                .checked_mul(10)
                .and_then(|value| value.checked_add(u64::from(digit - b'0')))
                .ok_or_else(|| self.expected("an integer below 2**64"))?;
            self.at += 1;
        }
        if padded && value != 0 {
            return Err(self.expected("an integer without leading zeros"));
        }
        Ok(value)
    }

    fn string(&mut self) -> Result<String, ParseError> {
        let quote = self.peek().map(char::from);
        self.at += 1;
        let mut value = String::new();
        loop {
            let Some(next) = self.rest().chars().next() else {
                return Err(self.expected("a closing quote"));
            };
            self.at += next.len_utf8();
            match next {
                _ if Some(next) == quote => return Ok(value),
                '\n' | '\r' | '\0' => return Err(self.expected("a closing quote")),
                '\\' => memory::push_char(&mut value, self.escape()?)?,
                _ => memory::push_char(&mut value, next)?,
            }
        }
    }

    /// The character that an escape of Python's `repr` stands for.
    fn escape(&mut self) -> Result<char, ParseError> {
        let kind = self.peek();
        self.at += 1;
        match kind {
            Some(b'n') => Ok('\n'),
            Some(b'r') => Ok('\r'),
            Some(b't') => Ok('\t'),
            Some(byte @ (b'\\' | b'\'' | b'"')) => Ok(char::from(byte)),
            Some(b'x') => self.code_point(2),
            Some(b'u') => self.code_point(4),
            Some(b'U') => self.code_point(8),
            _ => {
                let expected = "an escape that Python's repr writes";
                Err(SyntaxError { at: self.at - 1, expected }.into())
            }
        }
    }

    fn code_point(&mut self, digits: usize) -> Result<char, ParseError> {
        let text =
            self.rest().get(..digits).filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()));
        let code = text.and_then(|text| u32::from_str_radix(text, 16).ok());
        let character =
            code.and_then(char::from_u32).ok_or_else(|| self.expected("a code point"))?;
        self.at += digits;
        Ok(character)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_numpy_writes() {
        let text = "{'descr': [('a', '<u4'), (('title', 'b'), '|u1', (16,))], 'shape': (3,), }  \n";
        let Ok(Literal::Dict(entries)) = parse(text) else { panic!("a dict") };
        let [descr, shape] = &entries[..] else { panic!("two entries") };
        assert_eq!(descr.key, "descr");
        assert_eq!(descr.text, "[('a', '<u4'), (('title', 'b'), '|u1', (16,))]");
        assert_eq!(shape.value, Literal::Tuple(vec![Literal::Int(3)]));
    }

    #[test]
    fn a_parenthesised_literal_is_no_tuple() {
        assert_eq!(parse("(7)"), Ok(Literal::Int(7)));
        assert_eq!(parse("(7,)"), Ok(Literal::Tuple(vec![Literal::Int(7)])));
        assert_eq!(parse("()"), Ok(Literal::Tuple(vec![])));
        assert_eq!(parse("[7]"), Ok(Literal::List(vec![Literal::Int(7)])));
    }

    #[test]
    fn words_numbers_and_strings() {
        assert_eq!(parse(" True"), Ok(Literal::Bool(true)));
        assert_eq!(parse("False "), Ok(Literal::Bool(false)));
        assert_eq!(parse("None"), Ok(Literal::None));
        assert_eq!(parse("00"), Ok(Literal::Int(0)));
        assert_eq!(parse("18446744073709551615"), Ok(Literal::Int(u64::MAX)));
        let string = |text| Ok(Literal::Str(String::from(text)));
        assert_eq!(parse(r#"'a"b'"#), string("a\"b"));
        assert_eq!(parse(r#""a'b""#), string("a'b"));
        assert_eq!(parse(r"'\\ \' \n \x41 \u00e9 \U0001f600'"), string("\\ ' \n A é 😀"));
        assert_eq!(parse("'grüße'"), string("grüße"));
    }

    #[test]
    fn refuses_everything_else() {
        let deep = "[".repeat(100_000);
        for text in [
            "",
            "  ",
            "[",
            "]",
            "(",
            "{",
            "{'a'}",
            "{'a': }",
            "{'a' 1}",
            "{1: 2}",
            "[1 2]",
            "[,]",
            "1 2",
            "'a",
            "'a\n'",
            "'a\r'",
            "'a\0'",
            "07",
            "\"a'",
            "'\\",
            "'\\q'",
            "'\\x4'",
            "'\\ud800'",
            "'\\U00110000'",
            "18446744073709551616",
            "-1",
            "1.5",
            "Tru",
            "Truest",
            "__import__('os')",
            "[1,,2]",
            "\0",
            "é",
            &deep,
        ] {
            assert!(parse(text).is_err(), "{text:.20}");
        }
    }

    #[test]
    fn says_where() {
        assert_eq!(parse("[1, x]"), Err(SyntaxError { at: 4, expected: "a literal" }.into()));
    }
}
