//! Typed access to a JSON object from a model folder, with errors that name the file and the field.

use std::{cell::RefCell, collections::BTreeSet, path::Path};

use serde_json::{Map, Value};

use crate::{error::LoadError, ids::TokenId};

/// A JSON object, the file it came from and the path that leads to it (`rope_scaling.`, say).
pub(crate) struct Fields<'a> {
    file: &'a Path,
    prefix: String,
    map: &'a Map<String, Value>,
    /// Fields that were asked for.
    asked: RefCell<BTreeSet<String>>,
}

/// Parses a file whose top level must be an object.
pub(crate) fn parse_object(file: &Path, bytes: &[u8]) -> Result<Map<String, Value>, LoadError> {
    let fail = |detail: String| LoadError::Format { path: file.to_path_buf(), detail };
    match serde_json::from_slice::<Value>(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(fail(format!("expected a JSON object, found {}", kind(&other)))),
        Err(error) => Err(fail(format!("not valid JSON: {error}"))),
    }
}

/// Parses a file whose top level must be a list of objects.
pub(super) fn parse_array(file: &Path, bytes: &[u8]) -> Result<Vec<Map<String, Value>>, LoadError> {
    serde_json::from_slice(bytes).map_err(|error| LoadError::Format {
        path: file.to_path_buf(),
        detail: format!("not a JSON list of objects: {error}"),
    })
}

impl<'a> Fields<'a> {
    /// The top level of a file.
    pub(crate) fn new(file: &'a Path, map: &'a Map<String, Value>) -> Self {
        Self { file, prefix: String::new(), map, asked: RefCell::default() }
    }

    /// The error for one field.
    pub(crate) fn bad(&self, field: &str, detail: impl std::fmt::Display) -> LoadError {
        LoadError::Format {
            path: self.file.to_path_buf(),
            detail: format!("field `{}{field}` {detail}", self.prefix),
        }
    }

    /// The error for a field that asks for what we do not implement.
    pub(super) fn unsupported(&self, field: &str, detail: impl std::fmt::Display) -> LoadError {
        LoadError::Unsupported {
            path: self.file.to_path_buf(),
            detail: format!("field `{}{field}` {detail}", self.prefix),
        }
    }

    /// The value, or `None` where the field is absent or null.
    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(field.to_owned());
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// Whether the field is there, be it null.
    pub(super) fn has(&self, field: &str) -> bool {
        self.map.contains_key(field)
    }

    /// Names of all fields.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    /// Whether a field says something and nobody asked for it.
    pub(super) fn is_ignored(&self, field: &str) -> bool {
        self.map.get(field).is_some_and(|value| !value.is_null()) && !self.asked.borrow().contains(field)
    }

    /// Whether the field is an object.
    pub(super) fn is_object(&self, field: &str) -> bool {
        self.map.get(field).is_some_and(Value::is_object)
    }

    fn typed<T>(
        &self,
        field: &str,
        wanted: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, LoadError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(self.bad(field, format!("must be {wanted}, but is {}", shown(value)))),
        }
    }

    fn required<T>(&self, field: &str, value: Option<T>) -> Result<T, LoadError> {
        value.ok_or_else(|| self.bad(field, "is missing"))
    }

    /// A count from 1 to `max`, or `None` where absent.
    pub(super) fn count(&self, field: &str, max: usize) -> Result<Option<usize>, LoadError> {
        let wanted = format!("an integer from 1 to {max}");
        self.typed(field, &wanted, |value| {
            value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=max).contains(n))
        })
    }

    /// A count that must be there.
    pub(super) fn required_count(&self, field: &str, max: usize) -> Result<usize, LoadError> {
        let value = self.count(field, max)?;
        self.required(field, value)
    }

    /// A non-negative integer that fits `u32`.
    pub(crate) fn u32(&self, field: &str) -> Result<Option<u32>, LoadError> {
        self.typed(field, "a non-negative integer", |value| {
            value.as_u64().and_then(|n| u32::try_from(n).ok())
        })
    }

    /// A finite number.
    pub(super) fn number(&self, field: &str) -> Result<Option<f64>, LoadError> {
        self.typed(field, "a finite number", |value| value.as_f64().filter(|x| x.is_finite()))
    }

    /// A finite number over zero.
    pub(super) fn positive(&self, field: &str) -> Result<Option<f64>, LoadError> {
        self.typed(field, "a number over 0", |value| value.as_f64().filter(|x| x.is_finite() && *x > 0.0))
    }

    /// A finite number over zero that must be there.
    pub(super) fn required_positive(&self, field: &str) -> Result<f64, LoadError> {
        let value = self.positive(field)?;
        self.required(field, value)
    }

    /// True or false.
    pub(crate) fn boolean(&self, field: &str) -> Result<Option<bool>, LoadError> {
        self.typed(field, "true or false", Value::as_bool)
    }

    /// A string.
    pub(crate) fn string(&self, field: &str) -> Result<Option<&'a str>, LoadError> {
        self.typed(field, "a string", Value::as_str)
    }

    /// A list of strings.
    pub(super) fn strings(&self, field: &str) -> Result<Option<Vec<&'a str>>, LoadError> {
        self.typed(field, "a list of strings", |value| value.as_array()?.iter().map(Value::as_str).collect())
    }

    /// A list of numbers over zero.
    pub(super) fn positives(&self, field: &str) -> Result<Option<Vec<f64>>, LoadError> {
        let number = |value: &Value| value.as_f64().filter(|x| x.is_finite() && *x > 0.0);
        self.typed(field, "a list of numbers over 0", |value| value.as_array()?.iter().map(number).collect())
    }

    /// A list of non-negative integers.
    pub(super) fn counts(&self, field: &str) -> Result<Option<Vec<usize>>, LoadError> {
        let count = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
        self.typed(field, "a list of non-negative integers", |value| {
            value.as_array()?.iter().map(count).collect()
        })
    }

    /// An object, for reading its own fields.
    pub(crate) fn object(&self, field: &str) -> Result<Option<Fields<'a>>, LoadError> {
        let map = self.typed(field, "an object", Value::as_object)?;
        Ok(map.map(|map| Fields {
            file: self.file,
            prefix: format!("{}{field}.", self.prefix),
            map,
            asked: RefCell::default(),
        }))
    }

    /// One token id or a list of them, each below `vocab_size`. Absent and null give an empty list.
    pub(super) fn token_ids(&self, field: &str, vocab_size: usize) -> Result<Vec<TokenId>, LoadError> {
        let wanted = format!("a token id or a list of them, each below vocab_size ({vocab_size})");
        let id = |value: &Value| {
            let id = u32::try_from(value.as_u64()?).ok()?;
            ((id as usize) < vocab_size).then_some(TokenId(id))
        };
        let ids = self.typed(field, &wanted, |value| match value {
            Value::Array(list) => list.iter().map(id).collect::<Option<Vec<_>>>(),
            one => id(one).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value for an error message: scalars as they are, the rest by kind, nothing long.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => format!("{:?}", text.chars().take(60).collect::<String>()),
        Value::Number(_) | Value::Bool(_) => value.to_string(),
        other => kind(other).to_owned(),
    }
}
