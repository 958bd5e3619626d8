//! The files of a model: a folder as it comes from the hub, or the demonstration model built into the program.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use memmap2::Mmap;

use super::gguf::Gguf;
use crate::error::LoadError;

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// The demonstration model in the program itself.
    Builtin,
    /// A folder with `config.json`, `tokenizer.json` and safetensors weights, or a GGUF file, or a folder that holds one.
    Dir(PathBuf),
}

/// The model's architecture and sizes.
pub const CONFIG: &str = "config.json";
/// Sampling defaults; optional.
pub const GENERATION_CONFIG: &str = "generation_config.json";
/// The tokenizer.
pub const TOKENIZER: &str = "tokenizer.json";
/// Special tokens and, in older folders, the chat template; optional.
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// The chat template; optional.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// The modules of an embedding model; optional.
pub const MODULES: &str = "modules.json";
/// All weights in one file.
pub const WEIGHTS: &str = "model.safetensors";
/// Which shard holds which tensor.
pub const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

/// Shown in error messages in place of a folder.
const BUILTIN_FOLDER: &str = "<built-in model>";

/// Files of the demonstration model, made by `scripts/train_demo_model.py`.
const BUILTIN: &[(&str, &[u8])] = &[
    (CONFIG, include_bytes!("../../assets/demo/config.json")),
    (GENERATION_CONFIG, include_bytes!("../../assets/demo/generation_config.json")),
    (TOKENIZER, include_bytes!("../../assets/demo/tokenizer.json")),
    (TOKENIZER_CONFIG, include_bytes!("../../assets/demo/tokenizer_config.json")),
    (CHAT_TEMPLATE, include_bytes!("../../assets/demo/chat_template.jinja")),
    (WEIGHTS, include_bytes!("../../assets/demo/model.safetensors")),
];

/// An opened model folder. Reading is by name, with a size limit that depends on the kind of file.
#[derive(Debug, Clone)]
pub struct ModelFiles {
    source: ModelSource,
    chat_template: Option<PathBuf>,
    /// Stands for the folder's files.
    gguf: Option<Gguf>,
}

impl ModelFiles {
    /// Checks that the folder is one we can load, as far as file names tell.
    ///
    /// # Errors
    /// [`LoadError::Format`] where there is no such folder or no `config.json`; [`LoadError::Unsupported`] where its
    /// weights are in another format than safetensors.
    pub fn open(source: &ModelSource) -> Result<Self, LoadError> {
        let mut gguf = None;
        if let ModelSource::Dir(dir) = source {
            match gguf_file(dir)? {
                Some(path) => {
                    gguf = Some(Gguf::open(&path, map_file(&path)?)?);
                }
                None => check_folder(dir)?,
            }
        }
        Ok(Self { source: source.clone(), chat_template: None, gguf })
    }

    /// The GGUF file that stands for all others, if the model is one.
    pub(super) fn gguf(&self) -> Option<&Gguf> {
        self.gguf.as_ref()
    }

    /// Takes the chat template from this file instead of the folder's own.
    pub fn with_chat_template(mut self, path: impl Into<PathBuf>) -> Self {
        self.chat_template = Some(path.into());
        self
    }

    /// The file of the chat template and what is in it, if there is one: the one that replaces the folder's own, or else that. Without
    /// such a file the template is in [`TOKENIZER_CONFIG`], or nowhere.
    ///
    /// # Errors
    /// As [`ModelFiles::read`].
    pub fn chat_template(&self) -> Result<Option<(PathBuf, Bytes)>, LoadError> {
        match &self.chat_template {
            Some(path) => Ok(Some((path.clone(), read_capped(path, MAX_TEMPLATE_BYTES)?))),
            None => Ok(self.read(CHAT_TEMPLATE)?.map(|bytes| (self.path(CHAT_TEMPLATE), bytes))),
        }
    }

    /// Where the model comes from.
    pub fn source(&self) -> &ModelSource {
        &self.source
    }

    /// The path of a file of this model, for reading and for messages.
    pub fn path(&self, name: &str) -> PathBuf {
        if let Some(gguf) = &self.gguf {
            return gguf.path().to_path_buf();
        }
        match &self.source {
            ModelSource::Builtin => Path::new(BUILTIN_FOLDER).join(name),
            ModelSource::Dir(dir) => dir.join(name),
        }
    }

    /// Whether there is such a file.
    pub fn contains(&self, name: &str) -> bool {
        if let Some(gguf) = &self.gguf {
            return gguf.file(name).is_some();
        }
        match &self.source {
            ModelSource::Builtin => builtin(name).is_some(),
            ModelSource::Dir(dir) => dir.join(name).is_file(),
        }
    }

    /// The first file, in the order of names, with this extension. The built-in model has none that is asked for so.
    ///
    /// # Errors
    /// [`LoadError::Io`] where the folder cannot be listed.
    pub fn find(&self, extension: &str) -> Result<Option<String>, LoadError> {
        let ModelSource::Dir(dir) = &self.source else { return Ok(None) };
        if self.gguf.is_some() {
            return Ok(None);
        }
        let io = |source| LoadError::Io { path: dir.clone(), source };
        let mut first: Option<String> = None;
        for entry in std::fs::read_dir(dir).map_err(io)? {
            let path = entry.map_err(io)?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let fits = path.extension().is_some_and(|found| found == extension) && path.is_file();
            if let Some(name) = name.filter(|name| fits && first.as_deref().is_none_or(|first| *name < first))
            {
                first = Some(name.to_owned());
            }
        }
        Ok(first)
    }

    /// Reads a file that may be absent.
    ///
    /// # Errors
    /// [`LoadError::Io`], or [`LoadError::Format`] for a file over its size limit.
    pub fn read(&self, name: &str) -> Result<Option<Bytes>, LoadError> {
        if let Some(gguf) = &self.gguf {
            return Ok(gguf.file(name));
        }
        match &self.source {
            ModelSource::Builtin => Ok(builtin(name)),
            ModelSource::Dir(_) if !self.contains(name) => Ok(None),
            ModelSource::Dir(dir) => read_capped(&dir.join(name), size_limit(name)).map(Some),
        }
    }

    /// Reads a file that must be there.
    ///
    /// # Errors
    /// As [`ModelFiles::read`], and [`LoadError::Format`] where it is missing.
    pub fn require(&self, name: &str) -> Result<Bytes, LoadError> {
        self.read(name)?.ok_or_else(|| LoadError::Format {
            path: self.path(name),
            detail: "the file is missing; the model folder must hold it".to_owned(),
        })
    }

    /// Maps a weight file into memory without reading it. The built-in one is part of the program's own image.
    ///
    /// # Errors
    /// [`LoadError::Io`] where it cannot be opened or mapped.
    pub fn map(&self, name: &str) -> Result<Bytes, LoadError> {
        if self.source == ModelSource::Builtin {
            return self.require(name);
        }
        map_file(&self.path(name))
    }
}

/// The text of a file's bytes.
pub(crate) fn utf8<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a str, LoadError> {
    std::str::from_utf8(bytes).map_err(|error| LoadError::Format {
        path: path.to_path_buf(),
        detail: format!("not UTF-8 text: {error}"),
    })
}

/// Largest accepted size of a chat template in bytes; the largest in use have 25 KB. It bounds how deep a template can nest.
pub(crate) const MAX_TEMPLATE_BYTES: u64 = 128 << 10;

/// Largest accepted size in bytes. The largest tokenizers in use have 35 MB, the largest indices 10 MB.
fn size_limit(name: &str) -> u64 {
    match name {
        TOKENIZER => 256 << 20,
        // The largest SentencePiece models and lists of ranks in use have 5 MB.
        _ if name.ends_with(".model") || name.ends_with(".tiktoken") => 16 << 20,
        WEIGHTS_INDEX => 64 << 20,
        CHAT_TEMPLATE => MAX_TEMPLATE_BYTES,
        _ => 8 << 20,
    }
}

fn builtin(name: &str) -> Option<Bytes> {
    BUILTIN.iter().find(|(file, _)| *file == name).map(|(_, bytes)| Bytes::from_static(bytes))
}

fn read_capped(path: &Path, limit: u64) -> Result<Bytes, LoadError> {
    let io = |source| LoadError::Io { path: path.to_path_buf(), source };
    let too_large = || LoadError::Format {
        path: path.to_path_buf(),
        detail: format!("the file is larger than {limit} bytes, the limit for its kind"),
    };
    // Opening a pipe would block, so the kind is asked for first.
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(io(std::io::Error::other("not a regular file")));
    }
    let file = File::open(path).map_err(io)?;
    if file.metadata().map_err(io)?.len() > limit {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    // The size may have grown since, and a special file may report none.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > limit { Err(too_large()) } else { Ok(bytes.into()) }
}

/// Maps a file into memory without reading it.
pub(crate) fn map_file(path: &Path) -> Result<Bytes, LoadError> {
    map_regular(path).map_err(|source| LoadError::Io { path: path.to_path_buf(), source })
}

fn map_regular(path: &Path) -> std::io::Result<Bytes> {
    // Opening a pipe would block, so the kind is asked for first.
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    let file = File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the map is read-only and private to this process' view. Its bytes are plain data, checked before use, so
    // another process that rewrites the file can at worst change numbers; truncating a file while it is served ends the
    // process with SIGBUS, as with every program that maps its weights, and the documentation says not to.
    let map = unsafe { Mmap::map(&file)? };
    advise(&map);
    Ok(Bytes::from_owner(map))
}

/// A hint only: large pages, where the file system has them. What is needed is read by [`Prefetch`](super::prefetch::Prefetch), and nothing else.
fn advise(map: &Mmap) {
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    #[cfg(not(target_os = "linux"))]
    let _ = map;
}

/// The path itself where it is a GGUF file, or the only one of a folder without `config.json`.
///
/// # Errors
/// [`LoadError::Format`] where there are several; [`LoadError::Io`].
fn gguf_file(path: &Path) -> Result<Option<PathBuf>, LoadError> {
    let is_gguf = |path: &Path| {
        path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) && path.is_file()
    };
    if is_gguf(path) {
        return Ok(Some(path.to_path_buf()));
    }
    if !path.is_dir() || path.join(CONFIG).is_file() {
        return Ok(None);
    }
    let io = |source| LoadError::Io { path: path.to_path_buf(), source };
    let mut found = None;
    for entry in std::fs::read_dir(path).map_err(io)? {
        let file = entry.map_err(io)?.path();
        if is_gguf(&file) && found.replace(file).is_some() {
            let detail = "there are several GGUF files in this folder; pass the path of one".to_owned();
            return Err(LoadError::Format { path: path.to_path_buf(), detail });
        }
    }
    Ok(found)
}

fn check_folder(dir: &Path) -> Result<(), LoadError> {
    let format = |detail: String| LoadError::Format { path: dir.to_path_buf(), detail };
    let metadata = match std::fs::metadata(dir) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(format(
                "no such folder; pass the path of a downloaded model folder with config.json, tokenizer.json and \
                 *.safetensors files"
                    .to_owned(),
            ));
        }
        Err(source) => return Err(LoadError::Io { path: dir.to_path_buf(), source }),
    };
    if !metadata.is_dir() {
        return Err(match foreign_format(dir) {
            Some(detail) => LoadError::Unsupported { path: dir.to_path_buf(), detail },
            None => format(
                "this is a file; pass the folder that holds config.json and the weights, or a GGUF file"
                    .to_owned(),
            ),
        });
    }
    let missing = if !dir.join(CONFIG).is_file() {
        "there is no config.json in this folder"
    } else if !dir.join(WEIGHTS).is_file() && !dir.join(WEIGHTS_INDEX).is_file() {
        "there is neither model.safetensors nor model.safetensors.index.json in this folder"
    } else {
        return Ok(());
    };
    match other_weights(dir)? {
        Some(detail) => {
            Err(LoadError::Unsupported { path: dir.to_path_buf(), detail: format!("{missing}; {detail}") })
        }
        None => Err(format(missing.to_owned())),
    }
}

/// What a folder without safetensors holds instead, if it is weights at all.
fn other_weights(dir: &Path) -> Result<Option<String>, LoadError> {
    let io = |source| LoadError::Io { path: dir.to_path_buf(), source };
    for entry in std::fs::read_dir(dir).map_err(io)? {
        if let Some(detail) = foreign_format(&entry.map_err(io)?.path()) {
            return Ok(Some(detail));
        }
    }
    Ok(None)
}

fn foreign_format(path: &Path) -> Option<String> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    let format = match extension.as_str() {
        "ggml" => "GGML",
        "bin" | "pt" | "pth" | "ckpt" => "PyTorch pickle",
        "h5" | "msgpack" => "TensorFlow or Flax",
        "onnx" => "ONNX",
        "npz" => "NumPy",
        _ => return None,
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Some(format!("{name} is in {format} format, but only safetensors and GGUF weights are supported"))
}
