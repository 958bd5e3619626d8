//! A folder that is harmed again and again, and what must hold each time.

use std::{
    fmt::Debug,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use allocation_counter::measure;
use tempfile::TempDir;
use tidemill_engine::{
    error::LoadError,
    model::{Checkpoint, ModelFiles, ModelSource, ModelSpec},
    text::TextModel,
};

/// Memory that no file of a few hundred kilobytes may cost to be read or refused.
pub const CAP: u64 = 64 << 20;

/// A small model that can be loaded.
pub fn good() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama")
}

/// A copy of the good model, or of another folder's files.
pub struct Rig {
    dir: TempDir,
}

impl Rig {
    pub fn new(sources: &[PathBuf]) -> Self {
        let dir = TempDir::new().unwrap();
        for source in sources {
            for entry in std::fs::read_dir(source).unwrap() {
                let entry = entry.unwrap();
                if entry.path().is_file() {
                    std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
                }
            }
        }
        Self { dir }
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.dir.path().join(name), bytes).unwrap();
    }

    pub fn remove(&self, name: &str) {
        std::fs::remove_file(self.dir.path().join(name)).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.dir.path().join(name)).unwrap()
    }

    pub fn files(&self) -> Result<ModelFiles, LoadError> {
        ModelFiles::open(&ModelSource::Dir(self.dir.path().to_path_buf()))
    }

    /// Reads specification and weights as an engine would.
    pub fn model(&self, cap: u64, what: &dyn Debug) -> Result<(), String> {
        self.within(cap, what, || {
            let files = self.files()?;
            let spec = ModelSpec::load(&files)?;
            Checkpoint::open(&files)?.verify(&spec)
        })
    }

    /// Loads the tokenizer as an engine would, and asks it for something.
    pub fn text(&self, spec: &ModelSpec, what: &dyn Debug) -> Result<(), String> {
        self.within(CAP, what, || {
            let model = TextModel::load(&self.files()?, spec)?;
            // What a tokenizer does with a text is the request's own affair, as long as it ends.
            if let Ok(ids) = model.encode("Once upon <s> a\u{301} time\t\0", true) {
                model.decode(&ids, true).unwrap();
            }
            Ok(())
        })
    }

    /// Runs `load`; an error must name a file of the folder. Then the good model must load as ever.
    fn within(
        &self,
        cap: u64,
        what: &dyn Debug,
        load: impl Fn() -> Result<(), LoadError>,
    ) -> Result<(), String> {
        let mut result = Ok(());
        let used = measure(|| {
            let caught = catch_unwind(AssertUnwindSafe(&load));
            result =
                caught.unwrap_or_else(|_| panic!("{what:?}: a panic")).map_err(|error| error.to_string());
        });
        assert!(used.bytes_max < cap, "{what:?}: {} bytes of memory for {result:?}", used.bytes_max);
        if let Err(error) = &result {
            assert!(error.contains(self.dir.path().to_str().unwrap()), "{what:?}: names no file: {error}");
            assert!(error.len() < 2000, "{what:?}: an error as long as a file: {error}");
        }
        canary();
        result
    }

    /// Harms a file in many ways and returns how many of them were refused.
    pub fn refused(
        &self,
        name: &str,
        harms: impl Iterator<Item = (String, Vec<u8>)>,
        check: impl Fn(&str) -> Result<(), String>,
    ) -> usize {
        let whole = self.read(name);
        let mut refused = 0;
        for (what, bytes) in harms {
            self.write(name, &bytes);
            refused += usize::from(check(&what).is_err());
        }
        self.write(name, &whole);
        check("the file as it was").unwrap();
        refused
    }
}

/// The good model loads.
pub fn canary() {
    let files = ModelFiles::open(&ModelSource::Dir(good())).unwrap();
    let spec = ModelSpec::load(&files).unwrap();
    Checkpoint::open(&files).unwrap().verify(&spec).unwrap();
}

/// The file cut short at so many places, from its first byte to its last.
pub fn truncations(whole: &[u8], count: usize) -> impl Iterator<Item = (String, Vec<u8>)> {
    (0..count).map(move |step| {
        let at = (whole.len() - 1) * step / (count - 1).max(1);
        (format!("cut at {at}"), whole[..at].to_vec())
    })
}

/// The file with one bit turned at places within `range`; the same bits every time.
pub fn flips(
    whole: &[u8],
    range: std::ops::Range<usize>,
    count: usize,
) -> impl Iterator<Item = (String, Vec<u8>)> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    (0..count).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = range.start + (state >> 33) as usize % range.len();
        let bit = (state >> 20) as u8 % 8;
        let mut bytes = whole.to_vec();
        bytes[at] ^= 1 << bit;
        (format!("bit {bit} of byte {at}"), bytes)
    })
}

/// JSON nested so deeply that a parser that recurses would run out of stack.
pub fn nested(depth: usize) -> String {
    format!("{}{}", "[".repeat(depth), "]".repeat(depth))
}
