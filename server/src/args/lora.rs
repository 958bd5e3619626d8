//! Options of adapters.

use std::{num::NonZeroUsize, path::PathBuf, str::FromStr};

use clap::{ArgAction, Args};

/// Low-rank adapters that requests choose by name.
#[derive(Debug, Args)]
#[command(next_help_heading = "LoRA")]
pub struct LoraArgs {
    /// Keep room for adapters: requests name one in place of the model.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
          hide_default_value = true, hide_possible_values = true, value_name = "BOOL", action = ArgAction::Set,
          env = "TIDEMILL_ENABLE_LORA")]
    pub enable_lora: bool,
    /// An adapter's name and folder (adapter_config.json, adapter_model.safetensors), loaded at the start. May be given several times; the
    /// variable takes a comma-separated list.
    #[arg(long, value_name = "NAME=DIR", env = "TIDEMILL_LORA_MODULES", value_delimiter = ',', num_args = 1..)]
    pub lora_modules: Vec<LoraModule>,
    /// Folder below which adapters can be loaded while the server runs (/v1/load_lora_adapter, Control.LoadAdapter). Default: none can.
    #[arg(long, value_name = "DIR", env = "TIDEMILL_LORA_DIR")]
    pub lora_dir: Option<PathBuf>,
    /// Different adapters in a batch; requests of others wait.
    #[arg(long, value_name = "N", default_value = "4", env = "TIDEMILL_MAX_LORAS")]
    pub max_loras: NonZeroUsize,
    /// Highest rank of an adapter. Room for it is kept on the device for each of --max-loras.
    #[arg(long, value_name = "N", default_value = "16", env = "TIDEMILL_MAX_LORA_RANK")]
    pub max_lora_rank: NonZeroUsize,
    /// Adapters that are loaded at a time, in host memory.
    #[arg(long, value_name = "N", default_value = "64", env = "TIDEMILL_MAX_CPU_LORAS")]
    pub max_cpu_loras: NonZeroUsize,
}

/// An adapter to be loaded at the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraModule {
    /// The name that requests use.
    pub name: String,
    /// Its folder.
    pub path: PathBuf,
}

impl FromStr for LoraModule {
    type Err = String;

    /// The first `=` separates: paths may hold others.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                Ok(Self { name: name.into(), path: path.into() })
            }
            _ => Err("write NAME=DIR, such as sql=./adapters/sql".into()),
        }
    }
}
