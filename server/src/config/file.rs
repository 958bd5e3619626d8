//! Options from a TOML file: they become the defaults of the command line, so that one parser checks all sources.

use std::{fs, path::Path};

use clap::{ArgAction, Command};
use toml::{Table, Value};

use crate::exit::Failure;

/// `command` with the file's values as defaults of its subcommand.
///
/// # Errors
/// When the file cannot be read, is no TOML, has a key that is no option, or a value that the option does not accept.
pub fn with_defaults(command: Command, subcommand: &str, path: &Path) -> Result<Command, Failure> {
    let bad = |detail: String| Failure::usage(format_args!("--config {}: {detail}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| bad(error.to_string()))?;
    let table: Table = text.parse().map_err(|error: toml::de::Error| bad(error.message().to_owned()))?;
    let mut defaults = Vec::new();
    for (key, value) in table {
        let values = option_values(&command, subcommand, &key, value).map_err(&bad)?;
        defaults.push((key, values));
    }
    check(command.clone(), subcommand, &defaults).map_err(bad)?;
    Ok(command.mut_subcommand(subcommand, |mut serve| {
        for (key, values) in defaults {
            let id = id_of(&serve, &key).unwrap_or_default();
            serve = serve.mut_arg(id, |arg| arg.default_values(values));
        }
        serve
    }))
}

/// The id of the option with this long name.
fn id_of(command: &Command, key: &str) -> Option<String> {
    let arg = command.get_arguments().find(|arg| arg.get_long() == Some(key))?;
    Some(arg.get_id().to_string())
}

/// A key's value as words of a command line.
fn option_values(
    command: &Command,
    subcommand: &str,
    key: &str,
    value: Value,
) -> Result<Vec<String>, String> {
    let serve = command.find_subcommand(subcommand);
    let arg = serve.into_iter().flat_map(Command::get_arguments).find(|arg| arg.get_long() == Some(key));
    // A file that names a file would never end.
    let Some(arg) = arg.filter(|_| key != "config") else {
        return Err(format!(
            "unknown key {key:?}; keys are named as the options of `tidemill {subcommand} --help`"
        ));
    };
    let word = |value: Value| match value {
        Value::String(text) => Ok(text),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(number.to_string()),
        Value::Boolean(truth) => Ok(truth.to_string()),
        Value::Datetime(_) | Value::Array(_) | Value::Table(_) => {
            Err(format!("key {key:?} must be a string, a number or a boolean"))
        }
    };
    match value {
        Value::Array(items) if matches!(arg.get_action(), ArgAction::Append) => {
            items.into_iter().map(word).collect()
        }
        value => Ok(vec![word(value)?]),
    }
}

/// Lets clap judge the file's values alone.
fn check(command: Command, subcommand: &str, defaults: &[(String, Vec<String>)]) -> Result<(), String> {
    let options =
        defaults.iter().flat_map(|(key, values)| values.iter().map(move |v| format!("--{key}={v}")));
    let line = ["tidemill".to_owned(), subcommand.to_owned()].into_iter().chain(options);
    match command.try_get_matches_from(line) {
        Ok(_) => Ok(()),
        Err(error) => {
            let text = error.to_string();
            // Its first paragraph says what is wrong; the rest is about command lines.
            let first = text.split("\n\n").next().unwrap_or(&text);
            Err(first.trim_start_matches("error: ").to_owned())
        }
    }
}
