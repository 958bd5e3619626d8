//! Compiled kernels on disk, so that only the first start on a machine waits for NVRTC.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::{Path, PathBuf},
};

const MAGIC: &[u8; 8] = b"TMCUBIN1";
const HEADER: usize = 24;

/// The images of one set of inputs: a folder with a file per kernel file.
///
/// An entry is [`MAGIC`], the image's length and its hash (both u64, little-endian), then the image. Whatever does not match is
/// as good as absent.
pub(super) struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The cache under `root` of everything that `inputs` decides.
    pub(super) fn new(root: &Path, inputs: impl Hash) -> Self {
        Self { folder: root.join(format!("cuda-kernels-{:016x}", hash(inputs))) }
    }

    /// The image of a kernel file, if it is there and whole.
    pub(super) fn load(&self, file: &str) -> Option<Vec<u8>> {
        let bytes = fs::read(self.path(file)).ok()?;
        let (header, image) = bytes.split_at_checked(HEADER)?;
        (header == Self::header(image)).then(|| image.to_vec())
    }

    /// Keeps an image. Processes that do so at once do not disturb each other: each renames a file of its own into place.
    pub(super) fn store(&self, file: &str, image: &[u8]) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let whole = self.path(file);
        let part = whole.with_extension(format!("part-{}", std::process::id()));
        let written =
            fs::write(&part, [&Self::header(image), image].concat()).and_then(|()| fs::rename(&part, &whole));
        written.inspect_err(|_| drop(fs::remove_file(&part)))
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file).with_extension("cubin")
    }

    fn header(image: &[u8]) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..16].copy_from_slice(&(image.len() as u64).to_le_bytes());
        header[16..].copy_from_slice(&hash(image).to_le_bytes());
        header
    }
}

/// Another release of the standard library may hash differently; then everything is compiled once more.
fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder under the system's temporary one, removed at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("tidemill-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn an_image_comes_back_to_those_who_ask_with_the_same_inputs() {
        let folder = Folder::new("cache-same");
        let cache = Cache::new(&folder.0, ("sm_90a", 1));
        assert_eq!(cache.load("rmsnorm"), None);
        cache.store("rmsnorm", b"image").unwrap();
        assert_eq!(Cache::new(&folder.0, ("sm_90a", 1)).load("rmsnorm").unwrap(), b"image");
        assert_eq!(Cache::new(&folder.0, ("sm_90a", 2)).load("rmsnorm"), None);
        assert_eq!(Cache::new(&folder.0, ("sm_80", 1)).load("rmsnorm"), None);
    }

    #[test]
    fn an_entry_that_is_cut_short_or_changed_anywhere_counts_as_absent() {
        let folder = Folder::new("cache-corrupt");
        let cache = Cache::new(&folder.0, 0);
        cache.store("rmsnorm", b"some image").unwrap();
        let path = cache.path("rmsnorm");
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(cache.load("rmsnorm"), None, "cut at {cut}");
            let mut flipped = whole.clone();
            flipped[cut] ^= 1;
            fs::write(&path, &flipped).unwrap();
            assert_eq!(cache.load("rmsnorm"), None, "flipped at {cut}");
        }
        cache.store("rmsnorm", b"some image").unwrap();
        assert_eq!(cache.load("rmsnorm").unwrap(), b"some image");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no partial files stay");
    }
}
