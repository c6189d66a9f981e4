//! A structured dtype's `descr` literal -> the fields of a row.

use std::collections::HashSet;

use crate::header_error::HeaderError;
use crate::literal::Literal;
use crate::memory::{self, OutOfMemory};

/// NumPy's own bound on the size of a row.
const MAX_ITEMSIZE: u64 = i32::MAX as u64;

/// The named fields of a row, without padding.
pub struct Fields {
    pub itemsize: usize,
    pub named: Vec<Field>,
}

pub struct Field {
    pub name: String,
    pub offset: usize,
    pub dtype: Dtype,
}

/// The type of a field: what one element is, how many there are in which shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dtype {
    /// NumPy's type string; `[...]` for nested fields.
    code: String,
    shape: Vec<u64>,
    size: u64,
}

impl Dtype {
    pub fn is(&self, code: &str, shape: &[u64]) -> bool {
        let native = self.code.strip_prefix('=').is_some_and(|rest| code.get(1..) == Some(rest));
        (self.code == code || native) && self.shape == shape
    }

    pub fn describe(&self) -> String {
        match self.shape.len() {
            0 => self.code.clone(),
            1..=4 => format!("{} {:?}", self.code, self.shape),
            axes => format!("{} of {axes} axes", self.code),
        }
    }
}

impl Fields {
    /// The fields of one structured dtype: entries `(name, dtype)` or `(name, dtype, shape)`.
    pub fn parse(entries: &[Literal<'_>]) -> Result<Self, HeaderError> {
        let mut named: Vec<Field> = Vec::new();
        let mut names = HashSet::new();
        let mut itemsize: u64 = 0;
        for (position, entry) in entries.iter().enumerate() {
            let unnamed = || HeaderError::Field(format!("field number {position}"));
            let (name, descr, shape) = field_parts(entry).ok_or_else(unnamed)?;
            let mut dtype = parse_dtype(descr, name)?;
            if let Some(shape) = shape {
                dtype = sub_array(dtype, shape, name)?;
            }
            let offset = itemsize as usize;
            itemsize = itemsize
                .checked_add(dtype.size)
                .filter(|&size| size <= MAX_ITEMSIZE)
                .ok_or(HeaderError::TooLarge)?;
            if name.is_empty() {
                if !dtype.code.starts_with("|V") {
                    return Err(unnamed());
                }
                continue;
            }
            names.try_reserve(1).map_err(|_| OutOfMemory::of::<&str>(1))?;
            if !names.insert(name) {
                return Err(HeaderError::Duplicate(quoted(name)));
            }
            memory::push(&mut named, Field { name: memory::copied_text(name)?, offset, dtype })?;
        }
        Ok(Self { itemsize: itemsize as usize, named })
    }
}

/// The name, dtype and shape of an entry.
fn field_parts<'b, 'a>(
    entry: &'b Literal<'a>,
) -> Option<(&'b str, &'b Literal<'a>, Option<&'b Literal<'a>>)> {
    let Literal::Tuple(parts) = entry else { return None };
    match &parts[..] {
        [name, descr] => Some((field_name(name)?, descr, None)),
        [name, descr, shape] => Some((field_name(name)?, descr, Some(shape))),
        _ => None,
    }
}

/// A field is called `name` or `(title, name)`.
fn field_name<'b>(name: &'b Literal<'_>) -> Option<&'b str> {
    match name {
        Literal::Str(name) => Some(name),
        Literal::Tuple(parts) => match &parts[..] {
            [Literal::Str(_), Literal::Str(name)] => Some(name),
            _ => None,
        },
        _ => None,
    }
}

fn invalid(field: &str) -> HeaderError {
    HeaderError::Field(format!("field {}", quoted(field)))
}

/// Characters of a name from the file that are shown.
const SHOWN: usize = 60;

/// A name from the file, in quotes, on one line and not too long.
pub fn quoted(name: &str) -> String {
    let more = if name.chars().nth(SHOWN).is_some() { "..." } else { "" };
    let shown: String = name.chars().take(SHOWN).collect();
    format!("'{}{more}'", shown.escape_debug())
}

fn parse_dtype(descr: &Literal<'_>, field: &str) -> Result<Dtype, HeaderError> {
    match descr {
        Literal::Str(code) => scalar(code, field),
        Literal::List(entries) => {
            let size = Fields::parse(entries)?.itemsize as u64;
            Ok(Dtype { code: "[...]".to_owned(), shape: Vec::new(), size })
        }
        Literal::Tuple(parts) => match &parts[..] {
            [base, shape] => sub_array(parse_dtype(base, field)?, shape, field),
            _ => Err(invalid(field)),
        },
        _ => Err(invalid(field)),
    }
}

fn sub_array(mut dtype: Dtype, shape: &Literal<'_>, field: &str) -> Result<Dtype, HeaderError> {
    let lengths = match shape {
        Literal::Int(_) => std::slice::from_ref(shape),
        Literal::Tuple(lengths) => lengths,
        _ => return Err(invalid(field)),
    };
    let mut outer = memory::with_capacity(lengths.len() + dtype.shape.len())?;
    for length in lengths {
        let &Literal::Int(length) = length else {
            return Err(invalid(field));
        };
        dtype.size = dtype
            .size
            .checked_mul(length)
            .filter(|&size| size <= MAX_ITEMSIZE)
            .ok_or(HeaderError::TooLarge)?;
        outer.push(length);
    }
    outer.append(&mut dtype.shape);
    dtype.shape = outer;
    Ok(dtype)
}

/// A type string as `numpy.dtype.str` gives it: byte order, kind, size, and a unit for times.
fn scalar(code: &str, field: &str) -> Result<Dtype, HeaderError> {
    let invalid = || HeaderError::Dtype { field: quoted(field), code: quoted(code) };
    let body = code.strip_prefix(['<', '>', '|', '=']).unwrap_or(code);
    let kind = body.chars().next().ok_or_else(invalid)?;
    if kind == 'O' {
        return Err(HeaderError::Pickled(format!("field {}", quoted(field))));
    }
    let (size, unit) = match body.get(kind.len_utf8()..).and_then(|rest| rest.split_once('[')) {
        Some((size, unit)) => (size, Some(unit)),
        None => (body.get(kind.len_utf8()..).unwrap_or(""), None),
    };
    let digits = !size.is_empty() && size.bytes().all(|byte| byte.is_ascii_digit());
    let size: u64 =
        if digits { size.parse().map_err(|_| invalid())? } else { return Err(invalid()) };
    let valid = match kind {
        'b' => size == 1,
        'i' | 'u' => matches!(size, 1 | 2 | 4 | 8),
        'f' => matches!(size, 2 | 4 | 8 | 12 | 16),
        'c' => matches!(size, 8 | 16 | 24 | 32),
        'm' | 'M' => size == 8,
        'S' | 'U' | 'V' => size <= MAX_ITEMSIZE / 4,
        _ => false,
    };
    let valid_unit = match unit {
        None => true,
        Some(unit) => {
            let unit = unit.strip_suffix(']').unwrap_or("");
            matches!(kind, 'm' | 'M')
                && !unit.is_empty()
                && unit.bytes().all(|b| b.is_ascii_alphanumeric())
        }
    };
    if !valid || !valid_unit {
        return Err(invalid());
    }
    let size = if kind == 'U' { 4 * size } else { size };
    Ok(Dtype { code: memory::copied_text(code)?, shape: Vec::new(), size })
}
