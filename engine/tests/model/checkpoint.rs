use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;
use tidemill_engine::{
    error::LoadError,
    model::{Checkpoint, ModelFiles, ModelSource, ModelSpec},
};
use tidemill_kernels::tensor::DType;

use crate::weights::{file, sound, tensor};

fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn open(dir: &Path) -> Result<Checkpoint, LoadError> {
    Checkpoint::open(&ModelFiles::open(&ModelSource::Dir(dir.to_path_buf()))?)
}

/// Opens a single file with this content.
fn open_bytes(bytes: &[u8]) -> Result<Checkpoint, LoadError> {
    let dir = folder(&[("model.safetensors", bytes)]);
    // The map outlives the name on every system that we test on.
    open(dir.path())
}

fn example() -> Vec<u8> {
    sound(&[
        ("a", "BF16", &[3, 4], 2),
        ("b.bias", "F32", &[5], 4),
        ("c", "F16", &[2, 2, 2], 2),
        ("d", "I64", &[2], 8),
    ])
}

#[test]
fn tensors_are_slices_of_the_file() {
    let checkpoint = open_bytes(&example()).unwrap();
    assert_eq!(checkpoint.tensor_names().collect::<Vec<_>>(), ["a", "b.bias", "c", "d"]);
    assert_eq!((checkpoint.total_bytes(), checkpoint.num_parameters()), (24 + 20 + 16 + 16, 12 + 5 + 8 + 2));
    let a = checkpoint.tensor("a", &[3, 4]).unwrap();
    assert_eq!((a.dtype, a.shape.as_slice(), a.name.as_str()), (DType::Bf16, &[3, 4][..], "a"));
    assert_eq!(&a.data[..], (0..24).collect::<Vec<u8>>());
    let b = checkpoint.tensor("b.bias", &[5]).unwrap();
    assert_eq!((b.dtype, &b.data[..4]), (DType::F32, &[24, 25, 26, 27][..]));
    let again = checkpoint.tensor("a", &[3, 4]).unwrap();
    assert_eq!(a.data.as_ptr(), again.data.as_ptr(), "no copy");
    drop(checkpoint);
    assert_eq!(a.data[23], 23, "the map lives as long as a tensor of it");
}

#[test]
fn errors_name_file_tensor_and_type() {
    let checkpoint = open_bytes(&example()).unwrap();
    let text = |name: &str, shape: &[usize]| checkpoint.tensor(name, shape).unwrap_err().to_string();
    for (error, parts) in [
        (text("zzz", &[1]), ["model.safetensors", "\"zzz\"", "missing", "[1]"]),
        (text("a", &[4, 3]), ["model.safetensors", "\"a\"", "[3, 4]", "[4, 3]"]),
        (text("d", &[2]), ["model.safetensors", "\"d\"", "I64", "BF16, F16, F32"]),
    ] {
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
    assert!(checkpoint.contains("d") && !checkpoint.contains("zzz"));
}

#[test]
fn the_built_in_model_is_complete() {
    let files = ModelFiles::open(&ModelSource::Builtin).unwrap();
    let (spec, checkpoint) = (ModelSpec::load(&files).unwrap(), Checkpoint::open(&files).unwrap());
    checkpoint.verify(&spec).unwrap();
    let asked: u64 = spec.tensors().iter().map(|t| t.shape.iter().product::<usize>() as u64).sum();
    assert_eq!(checkpoint.num_parameters(), asked, "nothing is left over");
    let larger = ModelSpec { vocab_size: spec.vocab_size + 1, ..spec.clone() };
    assert!(matches!(checkpoint.verify(&larger), Err(LoadError::TensorShape { .. })));
    let untied = ModelSpec { tie_word_embeddings: false, ..spec };
    assert!(checkpoint.verify(&untied).unwrap_err().to_string().contains("lm_head.weight"));
}

#[test]
fn unsound_headers_are_refused() {
    let h = |entries: Value| entries;
    let cases = [
        ("overlap", h(json!({"a": tensor("F32", &[2], 0, 8), "b": tensor("F32", &[2], 4, 12)})), 12),
        ("same bytes twice", h(json!({"a": tensor("F32", &[2], 0, 8), "b": tensor("F32", &[2], 0, 8)})), 8),
        ("hole", h(json!({"a": tensor("F32", &[2], 0, 8), "b": tensor("F32", &[2], 12, 20)})), 20),
        ("past the end", h(json!({"a": tensor("F32", &[4], 0, 16)})), 8),
        ("bytes left over", h(json!({"a": tensor("F32", &[1], 0, 4)})), 8),
        ("backwards", h(json!({"a": tensor("F32", &[1], 4, 0)})), 4),
        ("shape against extent", h(json!({"a": tensor("F32", &[3], 0, 8)})), 8),
        ("overflowing shape", h(json!({"a": tensor("F32", &[usize::MAX, 2], 0, 8)})), 8),
        ("overflowing size", h(json!({"a": tensor("F32", &[usize::MAX / 2], 0, 8)})), 8),
        ("overflowing offset", h(json!({"a": tensor("F32", &[1], usize::MAX - 3, usize::MAX)})), 8),
        ("unknown type", h(json!({"a": tensor("F31", &[2], 0, 8)})), 8),
        ("negative offset", h(json!({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}})), 8),
        ("not an object", h(json!([1, 2])), 8),
        ("no offsets", h(json!({"a": {"dtype": "F32", "shape": [2]}})), 8),
    ];
    for (what, header, data) in cases {
        let error = open_bytes(&file(&header, data)).expect_err(what);
        assert!(error.to_string().contains("model.safetensors"), "{what}: {error}");
    }
}

#[test]
fn a_header_length_that_is_absurd_is_refused() {
    for length in [0, 1, 7, 100_000_001, u64::MAX, u64::MAX - 7, 1 << 63] {
        let mut bytes = example();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        assert!(open_bytes(&bytes).is_err(), "{length}");
    }
    assert!(open_bytes(b"").is_err());
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    assert!(open_bytes(pointer).unwrap_err().to_string().contains("git lfs pull"));
}

/// The real file, cut at 200 places, half of them in the header.
#[test]
fn truncated_files_are_refused_wherever_they_end() {
    let files = ModelFiles::open(&ModelSource::Builtin).unwrap();
    let whole = files.map("model.safetensors").unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize + 8;
    let dir = folder(&[("model.safetensors", &whole)]);
    let path = dir.path().join("model.safetensors");
    assert!(open(dir.path()).is_ok());
    let handle = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let places = (0..100).map(|i| header * i / 100);
    let places = places.chain((0..100).map(|i| header + (whole.len() - header) * i / 100));
    let mut places: Vec<usize> =
        places.chain([1, 7, 8, 9, header - 1, header + 1, whole.len() - 1]).collect();
    // From the end on, so that each cut is one system call.
    places.sort_unstable_by(|a, b| b.cmp(a));
    for place in places {
        handle.set_len(place as u64).unwrap();
        let error = open(dir.path()).expect_err("truncated").to_string();
        assert!(error.contains("model.safetensors"), "{place}: {error}");
    }
}

/// Every tensor that an opened checkpoint offers must be readable in full.
fn read_everything(checkpoint: &Checkpoint, file: &[u8]) {
    for name in checkpoint.tensor_names() {
        // A wrong shape on purpose: the error tells the right one.
        let error = checkpoint.tensor(name, &[usize::MAX]).unwrap_err();
        let LoadError::TensorShape { got, .. } = error else { panic!("{error}") };
        if let Ok(tensor) = checkpoint.tensor(name, &got) {
            assert_eq!(tensor.data.len(), tensor.elems() * tensor.dtype.size());
            assert!(tensor.data.len() <= file.len());
            let _ = tensor.to_f32();
        }
    }
    let _ = (checkpoint.total_bytes(), checkpoint.num_parameters());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn flipped_bits_give_an_error_or_sound_tensors(flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..4)) {
        let mut bytes = example();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
        for (place, bit) in flips {
            bytes[place.index(header)] ^= 1 << bit;
        }
        match open_bytes(&bytes) {
            Ok(checkpoint) => read_everything(&checkpoint, &bytes),
            Err(error) => prop_assert!(error.to_string().contains("model.safetensors")),
        }
    }

    #[test]
    fn random_bytes_give_an_error_or_sound_tensors(
        length in prop::option::of(0u64..64),
        bytes in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        let mut file = length.map_or(Vec::new(), |length| length.to_le_bytes().to_vec());
        file.extend(bytes);
        if let Ok(checkpoint) = open_bytes(&file) {
            read_everything(&checkpoint, &file);
        }
    }

    #[test]
    fn random_indices_give_an_error(index in "(\\{\"weight_map\":\\{)?(\"[ab/.]{0,3}\":\"[a./x]{0,8}(safetensors)?\",?){0,3}\\}{0,2}") {
        let dir = folder(&[("model.safetensors.index.json", index.as_bytes()), ("x.safetensors", &example())]);
        if let Err(error) = open(dir.path()) {
            prop_assert!(error.to_string().contains("safetensors"));
        }
    }
}

const INDEX: &str = "model.safetensors.index.json";

fn index(map: Value) -> String {
    json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string()
}

#[test]
fn shards_are_joined() {
    let one = sound(&[("a", "F32", &[2], 4), ("b", "F32", &[1], 4)]);
    let two = sound(&[("c", "BF16", &[3], 2)]);
    let map = index(json!({"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}));
    let dir = folder(&[(INDEX, map.as_bytes()), ("m-1.safetensors", &one), ("m-2.safetensors", &two)]);
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensor_names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(checkpoint.tensor("c", &[3]).unwrap().dtype, DType::Bf16);
    let error = checkpoint.tensor("c", &[4]).unwrap_err().to_string();
    assert!(error.contains("m-2.safetensors"), "{error}");
    let error = checkpoint.tensor("z", &[4]).unwrap_err().to_string();
    assert!(error.contains(INDEX), "{error}");
}

#[test]
fn contradictions_between_index_and_shards_are_refused() {
    let one = sound(&[("a", "F32", &[2], 4), ("b", "F32", &[1], 4)]);
    let two = sound(&[("a", "F32", &[2], 4)]);
    let cases = [
        (json!({"a": "one.safetensors", "z": "one.safetensors"}), ["\"z\"", "is not there"]),
        (json!({"a": "one.safetensors", "b": "two.safetensors"}), ["\"a\"", "too"]),
        (json!({"a": "gone.safetensors"}), ["gone.safetensors", "missing"]),
        (json!({"a": "config.json"}), ["config.json", "no file name"]),
        (json!({"a": 7}), ["not a safetensors index", "integer"]),
    ];
    for (map, parts) in cases {
        let map = index(map);
        let dir = folder(&[(INDEX, map.as_bytes()), ("one.safetensors", &one), ("two.safetensors", &two)]);
        let error = open(dir.path()).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
}

#[test]
fn shard_names_cannot_leave_the_folder() {
    let outside = TempDir::new().unwrap();
    let target = outside.path().join("x.safetensors");
    std::fs::write(&target, sound(&[("a", "F32", &[2], 4)])).unwrap();
    let absolute = target.to_str().unwrap();
    for name in [
        absolute,
        "../x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        ".safetensors",
        "C:x.safetensors",
        "a\0.safetensors",
        "",
    ] {
        let map = index(json!({ "a": name }));
        let dir = folder(&[(INDEX, map.as_bytes())]);
        let error = open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("no file name of this folder"), "{name:?}: {error}");
    }
}

/// The hub's cache keeps files in ../../blobs and links to them.
#[cfg(unix)]
#[test]
fn shards_may_be_symbolic_links() {
    let blobs = TempDir::new().unwrap();
    let blob = blobs.path().join("0a1b2c");
    std::fs::write(&blob, sound(&[("a", "F32", &[2], 4)])).unwrap();
    let dir = folder(&[]);
    std::os::unix::fs::symlink(&blob, dir.path().join("model.safetensors")).unwrap();
    assert!(open(dir.path()).unwrap().contains("a"));
    std::fs::remove_file(&blob).unwrap();
    assert!(open(dir.path()).is_err(), "a dangling link is a missing file");
}
