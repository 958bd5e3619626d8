//! The tokenizer's files as a gateway wants them: a zip archive in chunks.

use std::{
    io::{Cursor, Write},
    sync::Arc,
};

use futures_util::stream;
use sha2::{Digest, Sha256};
use tidemill_engine::{
    RequestError,
    model::files::{CHAT_TEMPLATE, CONFIG, GENERATION_CONFIG, ModelFiles, TOKENIZER, TOKENIZER_CONFIG},
};
use tidemill_proto::smg::grpc::common::GetTokenizerChunk;
use zip::{CompressionMethod, ZipWriter, result::ZipError, write::SimpleFileOptions};

use super::unreadable;
use crate::grpc::{call::Call, stream::ResponseStream};

/// What a tokenizer may need beside its chat template. Of these, the folder's own are taken.
const FILES: [&str; 11] = [
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
];

/// Bytes of a chunk.
const CHUNK_BYTES: usize = 64 << 10;

/// A zip archive and its fingerprint.
#[derive(Debug)]
pub struct Archive {
    bytes: Vec<u8>,
    sha256: String,
}

impl Archive {
    /// The tokenizer's files of a model, and the chat template that this server uses: a gateway shall render as we would. The same files give
    /// the same bytes, on every replica.
    ///
    /// # Errors
    /// [`RequestError::Internal`] when a file cannot be read.
    pub fn of(files: &ModelFiles) -> Result<Self, RequestError> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        let failed = |error: ZipError| RequestError::Internal(format!("the tokenizer's archive: {error}"));
        let mut add = |name: &str, bytes: &[u8]| {
            let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
            zip.start_file(name, options).map_err(failed)?;
            zip.write_all(bytes).map_err(|error| failed(error.into()))
        };
        for name in FILES {
            if let Some(bytes) = files.read(name).map_err(|error| unreadable(&error))? {
                add(name, &bytes)?;
            }
        }
        if let Some((_, template)) = files.chat_template().map_err(|error| unreadable(&error))? {
            add(CHAT_TEMPLATE, &template)?;
        }
        let bytes = zip.finish().map_err(failed)?.into_inner();
        let sha256 = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { bytes, sha256 })
    }

    /// One of its chunks; `None` past the last, which alone has the fingerprint.
    fn chunk(&self, index: usize) -> Option<GetTokenizerChunk> {
        let mut chunks = self.bytes.chunks(CHUNK_BYTES).skip(index);
        let data = chunks.next()?.to_vec();
        let sha256 = if chunks.len() == 0 { self.sha256.clone() } else { String::new() };
        Some(GetTokenizerChunk { data, sha256 })
    }
}

/// All chunks of an archive.
pub fn stream(archive: Arc<Archive>, call: Call) -> ResponseStream<GetTokenizerChunk> {
    let state = (archive, 0, call);
    Box::pin(stream::unfold(state, |(archive, index, mut call)| async move {
        let Some(chunk) = archive.chunk(index) else {
            call.succeed();
            return None;
        };
        Some((Ok(chunk), (archive, index + 1, call)))
    }))
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Read};

    use tidemill_engine::model::files::ModelSource;
    use zip::ZipArchive;

    use super::*;

    fn unpacked(archive: &Archive) -> Vec<(String, Vec<u8>)> {
        let mut zip = ZipArchive::new(Cursor::new(&archive.bytes)).unwrap();
        let count = zip.len();
        let read = |index| {
            let mut file = zip.by_index(index).unwrap();
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            (file.name().to_owned(), bytes)
        };
        (0..count).map(read).collect()
    }

    #[test]
    fn the_built_in_models_archive_is_whole_and_always_the_same() {
        let files = ModelFiles::open(&ModelSource::Builtin).unwrap();
        let archive = Archive::of(&files).unwrap();
        let names: Vec<String> = unpacked(&archive).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, [CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE]);
        assert_eq!(archive.bytes, Archive::of(&files).unwrap().bytes);
        let chunks: Vec<_> = (0..).map_while(|index| archive.chunk(index)).collect();
        assert_eq!(chunks.iter().flat_map(|chunk| chunk.data.clone()).collect::<Vec<_>>(), archive.bytes);
        let (last, others) = chunks.split_last().unwrap();
        assert!(others.iter().all(|chunk| chunk.sha256.is_empty() && chunk.data.len() == CHUNK_BYTES));
        assert_eq!(last.sha256, archive.sha256);
        assert_eq!(archive.sha256.len(), 64);
    }

    #[test]
    fn a_folders_weights_stay_where_they_are_and_the_template_in_use_is_sent() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        for name in [CONFIG, TOKENIZER, CHAT_TEMPLATE, "model.safetensors", "notes.txt", "merges.txt"] {
            write(name, name);
        }
        write("mine.jinja", "another");
        let files = ModelFiles::open(&ModelSource::Dir(folder.path().into())).unwrap();
        let of = |files: &ModelFiles| {
            let text = |(name, bytes)| (name, String::from_utf8(bytes).unwrap());
            unpacked(&Archive::of(files).unwrap()).into_iter().map(text).collect::<Vec<_>>()
        };
        let same = |names: &[&str]| names.iter().map(|&name| (name.into(), name.into())).collect::<Vec<_>>();
        assert_eq!(of(&files), same(&[CONFIG, TOKENIZER, "merges.txt", CHAT_TEMPLATE]));
        let with = files.with_chat_template(folder.path().join("mine.jinja"));
        assert_eq!(of(&with).last().unwrap(), &(CHAT_TEMPLATE.to_owned(), "another".to_owned()));
    }
}
