//! The adapters that requests can name: loaded and unloaded while the engine runs.
//!
//! Loading reads and checks files on the caller's thread; the device sees an adapter when the first request that names it comes into the
//! batch. Unloading takes the name away: who comes later is refused, who came before keeps the adapter to the end.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Component, Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use parking_lot::RwLock;

use crate::{
    adapter::{Adapter, AdapterId},
    error::{LoadError, RequestError},
    model::lora::{self, LoraWeights, Sites},
};

/// Adapters of an engine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoraConfig {
    /// Different adapters in a batch, each with a place on the device.
    pub max_loras: usize,
    /// The highest rank.
    pub max_lora_rank: usize,
    /// Adapters that are loaded at a time.
    pub max_cpu_loras: usize,
    /// Loaded at the start: names and folders.
    pub modules: Vec<(String, PathBuf)>,
    /// Folders below this one can be loaded while the engine runs; without it none can.
    pub dir: Option<PathBuf>,
}

impl LoraConfig {
    /// Checks the numbers.
    pub(crate) fn check(&self) -> Result<(), LoadError> {
        let counts = [
            ("--max-loras", self.max_loras, 256),
            ("--max-lora-rank", self.max_lora_rank, 512),
            ("--max-cpu-loras", self.max_cpu_loras, 1 << 16),
        ];
        match counts.into_iter().find(|(_, count, most)| !(1..=*most).contains(count)) {
            None => Ok(()),
            Some((option, count, most)) => {
                Err(LoadError::Option { option, detail: format!("{count} is not in [1, {most}]") })
            }
        }
    }
}

/// What can be told of a loaded adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterInfo {
    /// The name that clients use.
    pub name: String,
    /// Where it came from, as whoever loaded it said.
    pub path: String,
}

/// The adapters that requests can name.
pub struct Adapters {
    config: LoraConfig,
    sites: Option<Sites>,
    /// Taken already.
    model_name: String,
    loaded: RwLock<BTreeMap<String, Loaded>>,
    next: AtomicU64,
}

struct Loaded {
    adapter: Adapter,
    path: String,
}

impl fmt::Debug for Adapters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adapters").field("loaded", &self.list()).finish_non_exhaustive()
    }
}

impl Default for Adapters {
    fn default() -> Self {
        Self::new(LoraConfig::default(), None, String::new())
    }
}

/// Bytes of a name.
const MAX_NAME_BYTES: usize = 256;

impl Adapters {
    /// None, for a model that is called `model_name`. Without `sites` none can be loaded.
    pub fn new(config: LoraConfig, sites: Option<Sites>, model_name: String) -> Self {
        Self { config, sites, model_name, loaded: RwLock::default(), next: AtomicU64::new(1) }
    }

    /// Loads those of the configuration.
    ///
    /// # Errors
    /// The first that cannot be.
    pub fn load_modules(&self) -> Result<(), LoadError> {
        let option = |detail| LoadError::Option { option: "--lora-modules", detail };
        for (name, path) in &self.config.modules {
            let refused = |error: RequestError| option(format!("{name}: {error}"));
            self.check_name(name).map_err(refused)?;
            if let Some(sites) = &self.sites {
                let weights = lora::load(path, path, sites, self.config.max_lora_rank)?;
                self.insert(name, path.display().to_string(), weights).map_err(refused)?;
            }
        }
        Ok(())
    }

    /// Loads the adapter of a folder below the configured one, under a name of its own. Takes time: call this off any thread that must stay
    /// responsive.
    ///
    /// # Errors
    /// [`RequestError::Unsupported`] where that is not allowed, [`RequestError::AdapterExists`] for a name that is taken, and
    /// [`RequestError::Invalid`] for what is wrong with the name, the path or the files.
    pub fn load(&self, name: &str, path: &str) -> Result<(), RequestError> {
        let Some(sites) = &self.sites else {
            return Err(RequestError::Unsupported(
                "adapters need a server that runs with --enable-lora".into(),
            ));
        };
        let Some(dir) = &self.config.dir else {
            let message = "adapters are loaded at run time only where the server runs with --lora-dir";
            return Err(RequestError::Unsupported(message.into()));
        };
        self.check_name(name)?;
        let folder = below(dir, path).ok_or_else(|| {
            let message = "must name a folder below the server's --lora-dir, relative to it";
            RequestError::invalid("lora_path", message)
        })?;
        let weights = lora::load(&folder, Path::new(path), sites, self.config.max_lora_rank)
            .map_err(|error| RequestError::invalid("lora_path", error.to_string()))?;
        self.insert(name, path.to_owned(), weights)
    }

    /// Gives an adapter a name.
    fn insert(&self, name: &str, path: String, weights: LoraWeights) -> Result<(), RequestError> {
        let id = AdapterId(self.next.fetch_add(1, Relaxed));
        let adapter = Adapter { id, name: name.into(), weights: Arc::new(weights) };
        let mut loaded = self.loaded.write();
        // Somebody may have come between.
        self.check_free(name, &loaded)?;
        loaded.insert(name.to_owned(), Loaded { adapter, path });
        Ok(())
    }

    fn check_name(&self, name: &str) -> Result<(), RequestError> {
        if name.is_empty() || name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
            let message = format!("must have 1 to {MAX_NAME_BYTES} bytes and no control characters");
            return Err(RequestError::invalid("lora_name", message));
        }
        self.check_free(name, &self.loaded.read())
    }

    fn check_free(&self, name: &str, loaded: &BTreeMap<String, Loaded>) -> Result<(), RequestError> {
        if name == self.model_name || loaded.contains_key(name) {
            return Err(RequestError::AdapterExists(name.to_owned()));
        }
        if loaded.len() >= self.config.max_cpu_loras {
            let message =
                format!("{} adapters are loaded, as many as --max-cpu-loras; unload one", loaded.len());
            return Err(RequestError::Unsupported(message));
        }
        Ok(())
    }

    /// Takes an adapter's name away. Requests that named it before keep it to their ends.
    ///
    /// # Errors
    /// [`RequestError::ModelNotFound`].
    pub fn unload(&self, name: &str) -> Result<(), RequestError> {
        match self.loaded.write().remove(name) {
            Some(_) => Ok(()),
            None => {
                let served = self.model_name.clone();
                Err(RequestError::ModelNotFound { asked: name.to_owned(), served })
            }
        }
    }

    /// The adapter of this name.
    pub fn find(&self, name: &str) -> Option<Adapter> {
        self.loaded.read().get(name).map(|loaded| loaded.adapter.clone())
    }

    /// All that are loaded, by name.
    pub fn list(&self) -> Vec<AdapterInfo> {
        let info = |(name, loaded): (&String, &Loaded)| AdapterInfo {
            name: name.clone(),
            path: loaded.path.clone(),
        };
        self.loaded.read().iter().map(info).collect()
    }

    /// Adapters in a batch at a time.
    pub fn max_loras(&self) -> usize {
        if self.sites.is_some() { self.config.max_loras } else { 0 }
    }
}

/// A folder that a client named, if it is below `dir`: plain components only, and no link leads out.
fn below(dir: &Path, path: &str) -> Option<PathBuf> {
    let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    if path.is_empty() || path.contains('\0') || !plain {
        return None;
    }
    let dir = dir.canonicalize().ok()?;
    let folder = dir.join(path).canonicalize().ok()?;
    (folder.starts_with(&dir) && folder != dir && folder.is_dir()).then_some(folder)
}
