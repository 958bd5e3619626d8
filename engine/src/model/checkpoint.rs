//! Weights: one safetensors file or several shards and their index, memory-mapped.
//!
//! A checkpoint is hostile input. The `safetensors` crate checks each header: its size (100 MB at most), that the extents
//! lie in the file without holes or overlap, that shapes and dtypes fit them, all with checked arithmetic. What concerns
//! several files is checked here.

use std::{
    collections::BTreeMap,
    ops::Range,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use tidemill_kernels::tensor::{DType, GgmlType, HostMatrix, HostTensor, QuantFormat, QuantMatrix};

use crate::{
    error::LoadError,
    inspect::WeightKind,
    model::{
        decoder::transposed,
        files::{ModelFiles, WEIGHTS, WEIGHTS_INDEX, map_file},
        formats::{Raw, Scheme},
        gguf::{Format, Gguf},
        spec::{ModelSpec, TensorKind, TensorSpec},
    },
};

/// Where a model's tensors come from: a [`Checkpoint`], or whatever makes them up.
pub trait Tensors {
    /// The tensor of this name, which must have this shape.
    ///
    /// # Errors
    /// When there is none, or it has another shape or a type that we cannot read.
    fn tensor(&self, name: &str, expected_shape: &[usize]) -> Result<HostTensor, LoadError>;

    /// The matrix `[N, K]` of this name (without `.weight`), in whatever format it is stored.
    ///
    /// # Errors
    /// As [`Tensors::tensor`].
    fn matrix(&self, name: &str, expected_shape: [usize; 2]) -> Result<HostMatrix, LoadError> {
        self.tensor(&format!("{name}.weight"), &expected_shape).map(HostMatrix::Dense)
    }

    /// The matrices `[N, K]` of X experts that are stored together under this name, in whatever format: `extents` are X, N and K. Where they are not
    /// quantised, the tensor is `[X, K, N]`.
    ///
    /// # Errors
    /// As [`Tensors::tensor`].
    fn experts(&self, name: &str, extents: [usize; 3]) -> Result<Vec<HostMatrix>, LoadError> {
        dense_experts(self, name, extents)
    }
}

fn dense_experts(
    tensors: &(impl Tensors + ?Sized),
    name: &str,
    extents: [usize; 3],
) -> Result<Vec<HostMatrix>, LoadError> {
    let [experts, n, k] = extents;
    let all = tensors.tensor(name, &[experts, k, n])?;
    let bytes = n * k * all.dtype.size();
    let expert = |x: usize| {
        let data = all.data.slice(x * bytes..(x + 1) * bytes);
        transposed(&HostTensor { shape: vec![k, n], data, ..all.clone() }).into()
    };
    Ok((0..experts).map(expert).collect())
}

/// All tensors of a model folder. Nothing is read until it is used: the files are memory-mapped.
#[derive(Debug)]
pub struct Checkpoint {
    /// The single weight file or the index, for messages about what is missing.
    path: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Entry>,
    scheme: Scheme,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    bytes: Bytes,
}

#[derive(Debug)]
struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Place in the shard's bytes.
    range: Range<usize>,
    /// Blocks of GGML instead of `dtype`.
    blocks: Option<GgmlType>,
    /// Rows are heads of this width, whose two halves are to be told apart: see [`crate::model::gguf`].
    paired_heads: Option<usize>,
}

/// `model.safetensors.index.json`; its metadata is not used.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// How a file starts that Git LFS has not replaced by its content.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

impl Checkpoint {
    /// Maps the weight files and reads their headers.
    ///
    /// # Errors
    /// [`LoadError::Io`] and [`LoadError::Format`], naming the file and, where there is one, the tensor.
    pub fn open(files: &ModelFiles) -> Result<Self, LoadError> {
        if let Some(gguf) = files.gguf() {
            return Ok(Self::of_gguf(gguf));
        }
        let scheme = Scheme::read(files)?;
        if files.contains(WEIGHTS) {
            let mut checkpoint = Self::empty(files.path(WEIGHTS), scheme);
            checkpoint.add_shard(files, WEIGHTS)?;
            return Ok(checkpoint);
        }
        let path = files.path(WEIGHTS_INDEX);
        let index: Index = serde_json::from_slice(&files.require(WEIGHTS_INDEX)?).map_err(|error| {
            LoadError::Format { path: path.clone(), detail: format!("not a safetensors index: {error}") }
        })?;
        let mut checkpoint = Self::empty(path, scheme);
        let mut shard_numbers = BTreeMap::new();
        for (tensor, shard) in &index.weight_map {
            checkpoint.check_shard_name(tensor, shard)?;
            if !shard_numbers.contains_key(shard.as_str()) {
                if !files.contains(shard) {
                    let detail =
                        format!("the file is missing, but the index says that it holds tensor {tensor:?}");
                    return Err(LoadError::Format { path: files.path(shard), detail });
                }
                shard_numbers.insert(shard.as_str(), checkpoint.shards.len());
                checkpoint.add_shard(files, shard)?;
            }
        }
        for (tensor, shard) in &index.weight_map {
            checkpoint.check_place(tensor, shard, shard_numbers[shard.as_str()])?;
        }
        Ok(checkpoint)
    }

    /// Maps one weight file by itself.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_path(path: &Path) -> Result<Self, LoadError> {
        let mut checkpoint = Self::empty(path.to_path_buf(), Scheme::Plain);
        checkpoint.add_bytes(path.to_path_buf(), map_file(path)?)?;
        Ok(checkpoint)
    }

    /// Maps one weight file by its name.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and where the file is missing.
    pub fn open_file(files: &ModelFiles, name: &str) -> Result<Self, LoadError> {
        let path = files.path(name);
        if !files.contains(name) {
            let detail = "the file is missing; only safetensors weights are supported".to_owned();
            return Err(LoadError::Format { path, detail });
        }
        let mut checkpoint = Self::empty(path, Scheme::Plain);
        checkpoint.add_shard(files, name)?;
        Ok(checkpoint)
    }

    fn empty(path: PathBuf, scheme: Scheme) -> Self {
        Self { path, shards: Vec::new(), tensors: BTreeMap::new(), scheme }
    }

    fn of_gguf(gguf: &Gguf) -> Self {
        let path = gguf.path().to_path_buf();
        let mut checkpoint = Self::empty(path.clone(), Scheme::Plain);
        checkpoint.shards.push(Shard { path, bytes: gguf.bytes().clone() });
        for (name, stored) in gguf.tensors() {
            let (dtype, blocks) = match stored.format {
                Format::Plain(dtype) => (dtype, None),
                Format::Blocks(ty) => (Dtype::U8, Some(ty)),
            };
            let (shape, range) = (stored.shape.clone(), stored.range.clone());
            let entry = Entry { shard: 0, dtype, shape, range, blocks, paired_heads: stored.paired_heads };
            checkpoint.tensors.insert(name.clone(), entry);
        }
        checkpoint
    }

    /// Whether the matrices are stored quantised, and so cannot be quantised again.
    pub fn is_quantized(&self) -> bool {
        self.scheme != Scheme::Plain || self.tensors.values().any(|entry| entry.blocks.is_some())
    }

    /// Bytes of a tensor as it is stored, and the type of its elements if it is none of a quantised one.
    pub fn stored(&self, name: &str) -> Option<(usize, Option<DType>)> {
        let entry = self.tensors.get(name)?;
        Some((entry.range.len(), plain_dtype(entry.dtype)))
    }

    /// The single weight file or the index.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A tensor of any type, as it is stored.
    pub(super) fn raw(&self, name: &str) -> Option<Raw<'_>> {
        let entry = self.tensors.get(name)?;
        let shard = &self.shards[entry.shard];
        let (dtype, shape) = (entry.dtype, entry.shape.as_slice());
        let data = shard.bytes.slice(entry.range.clone());
        Some(Raw { path: &shard.path, name: name.to_owned(), dtype, shape, data })
    }

    /// Shards lie beside their index. (The files themselves may be symbolic links, as in the hub's cache.)
    fn check_shard_name(&self, tensor: &str, shard: &str) -> Result<(), LoadError> {
        let plain = shard.ends_with(".safetensors") && !shard.contains(['/', '\\', ':', '\0']);
        if plain && !shard.starts_with('.') {
            return Ok(());
        }
        let detail =
            format!("tensor {tensor:?} is said to be in {shard:?}, which is no file name of this folder");
        Err(LoadError::Format { path: self.path.clone(), detail })
    }

    fn check_place(&self, tensor: &str, shard: &str, number: usize) -> Result<(), LoadError> {
        match self.tensors.get(tensor) {
            Some(entry) if entry.shard == number => Ok(()),
            _ => {
                let detail = format!("tensor {tensor:?} is said to be in {shard}, but is not there");
                Err(LoadError::Format { path: self.path.clone(), detail })
            }
        }
    }

    fn add_shard(&mut self, files: &ModelFiles, name: &str) -> Result<(), LoadError> {
        self.add_bytes(files.path(name), files.map(name)?)
    }

    fn add_bytes(&mut self, path: PathBuf, bytes: Bytes) -> Result<(), LoadError> {
        let format = |detail: String| LoadError::Format { path: path.clone(), detail };
        if bytes.starts_with(LFS_POINTER) {
            return Err(format(
                "this is a Git LFS pointer, not the weights; fetch them with `git lfs pull`".to_owned(),
            ));
        }
        let (header, metadata) = SafeTensors::read_metadata(&bytes)
            .map_err(|error| format(format!("not a valid safetensors file, or cut short: {error}")))?;
        // The crate has checked that 8 + header + data is the length of the file.
        let data = size_of::<u64>() + header;
        let shard = self.shards.len();
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let (dtype, shape) = (info.dtype, info.shape.clone());
            let range = data + start..data + end;
            let entry = Entry { shard, dtype, shape, range, blocks: None, paired_heads: None };
            if let Some(earlier) = self.tensors.get(&name) {
                let other = self.shards[earlier.shard].path.display();
                return Err(format(format!("tensor {name:?} is in {other} too")));
            }
            self.tensors.insert(name, entry);
        }
        self.shards.push(Shard { path, bytes });
        Ok(())
    }

    /// Checks that every tensor of the specification is there with its shape and a type that we can read.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`], for the first that fails.
    pub fn verify(&self, spec: &ModelSpec) -> Result<(), LoadError> {
        spec.tensors().iter().try_for_each(|TensorSpec { name, shape, kind }| {
            let in_blocks = self.tensors.get(name).is_some_and(|entry| entry.blocks.is_some());
            match self.scheme.stored_as(self, name, *kind) {
                // Its parts are checked when they are read.
                Some(_) => Ok(()),
                None if in_blocks && *kind == TensorKind::Matrix => self.shaped(name, shape).map(drop),
                None => self.find(name, shape).map(drop),
            }
        })
    }

    /// A tensor without copying its bytes.
    ///
    /// # Errors
    /// [`LoadError::MissingTensor`], [`LoadError::TensorShape`], or [`LoadError::Unsupported`] for a type other than bf16,
    /// f16 and f32.
    pub fn tensor(&self, name: &str, expected_shape: &[usize]) -> Result<HostTensor, LoadError> {
        let (entry, dtype) = self.find(name, expected_shape)?;
        let data = self.shards[entry.shard].bytes.slice(entry.range.clone());
        let tensor = HostTensor { name: name.to_owned(), dtype, shape: entry.shape.clone(), data };
        match entry.paired_heads {
            None => Ok(tensor),
            Some(head_dim) => {
                Ok(HostTensor { data: halves_apart(&tensor.data, entry.shape[0], head_dim), ..tensor })
            }
        }
    }

    /// A matrix in blocks of GGML.
    fn blocks(&self, name: &str, expected: [usize; 2]) -> Result<Option<QuantMatrix>, LoadError> {
        let Some(Entry { blocks: Some(ty), .. }) = self.tensors.get(name) else { return Ok(None) };
        let entry = self.shaped(name, &expected)?;
        let data = self.shards[entry.shard].bytes.slice(entry.range.clone());
        let data = match entry.paired_heads {
            None => data,
            Some(head_dim) => halves_apart(&data, expected[0], head_dim),
        };
        let (scales, offsets) = (Bytes::new(), Bytes::new());
        let format = QuantFormat::Ggml(*ty);
        Ok(Some(QuantMatrix { name: name.to_owned(), shape: expected, format, data, scales, offsets }))
    }

    fn find(&self, name: &str, expected: &[usize]) -> Result<(&Entry, DType), LoadError> {
        let entry = self.shaped(name, expected)?;
        match plain_dtype(entry.dtype) {
            Some(dtype) => Ok((entry, dtype)),
            None => {
                let stored =
                    entry.blocks.map_or_else(|| format!("{:?}", entry.dtype), |ty| format!("{ty:?}"));
                let detail = format!("tensor {name:?} has type {stored}; supported: BF16, F16, F32");
                Err(LoadError::Unsupported { path: self.shards[entry.shard].path.clone(), detail })
            }
        }
    }

    fn shaped(&self, name: &str, expected: &[usize]) -> Result<&Entry, LoadError> {
        let Some(entry) = self.tensors.get(name) else {
            let (path, tensor) = (self.path.clone(), name.to_owned());
            return Err(LoadError::MissingTensor { path, tensor, expected: expected.to_vec() });
        };
        if entry.shape != expected {
            let path = self.shards[entry.shard].path.clone();
            let (tensor, got) = (name.to_owned(), entry.shape.clone());
            return Err(LoadError::TensorShape { path, tensor, got, expected: expected.to_vec() });
        }
        Ok(entry)
    }

    /// The bytes of what the specification asks for, in its order: of each tensor, or of what a quantised one is made of.
    pub fn needed(&self, spec: &ModelSpec) -> Vec<Bytes> {
        let mut slices = Vec::new();
        for TensorSpec { name, .. } in spec.tensors() {
            let parts = format!("{}.", name.strip_suffix(".weight").unwrap_or(&name));
            let related =
                self.tensors.range(parts.clone()..).take_while(|(other, _)| other.starts_with(&parts));
            let plain = self.tensors.get_key_value(&name).filter(|(name, _)| !name.starts_with(&parts));
            let entries = related.chain(plain).map(|(_, entry)| entry);
            slices.extend(entries.map(|entry| self.shards[entry.shard].bytes.slice(entry.range.clone())));
        }
        slices
    }

    /// All tensors by the type of their elements.
    pub fn kinds(&self) -> Vec<WeightKind> {
        let mut kinds: BTreeMap<String, WeightKind> = BTreeMap::new();
        for entry in self.tensors.values() {
            let plain = || format!("{:?}", entry.dtype);
            let dtype = entry.blocks.map_or_else(plain, |blocks| format!("{blocks:?}"));
            let empty = WeightKind { dtype: dtype.clone(), tensors: 0, parameters: 0, bytes: 0 };
            let kind = kinds.entry(dtype).or_insert(empty);
            kind.tensors += 1;
            kind.parameters += entry.shape.iter().product::<usize>() as u64;
            kind.bytes += entry.range.len() as u64;
        }
        kinds.into_values().collect()
    }

    /// Whether there is such a tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names of all tensors, sorted.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|entry| entry.range.len() as u64).sum()
    }

    /// Elements of all tensors together.
    pub fn num_parameters(&self) -> u64 {
        // Shapes were checked against the file's size, so products do not overflow.
        self.tensors.values().map(|entry| entry.shape.iter().product::<usize>() as u64).sum()
    }
}

fn plain_dtype(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::BF16 => Some(DType::Bf16),
        Dtype::F16 => Some(DType::F16),
        Dtype::F32 => Some(DType::F32),
        _ => None,
    }
}

/// Rows of heads in which `(i, i + D/2)` stand side by side, with each head's first half before its second.
fn halves_apart(data: &Bytes, rows: usize, head_dim: usize) -> Bytes {
    let bytes = data.len() / rows.max(1);
    let half = head_dim / 2;
    let source = |row: usize| {
        let (head, within) = (row / head_dim * head_dim, row % head_dim);
        head + within % half * 2 + within / half
    };
    (0..rows).flat_map(|row| &data[source(row) * bytes..][..bytes]).copied().collect::<Vec<u8>>().into()
}

impl Tensors for Checkpoint {
    fn tensor(&self, name: &str, expected_shape: &[usize]) -> Result<HostTensor, LoadError> {
        Checkpoint::tensor(self, name, expected_shape)
    }

    fn matrix(&self, name: &str, expected_shape: [usize; 2]) -> Result<HostMatrix, LoadError> {
        let weight = format!("{name}.weight");
        if let Some(blocks) = self.blocks(&weight, expected_shape)? {
            return Ok(HostMatrix::Quantized(blocks));
        }
        let is_plain = match self.tensors.get(&weight) {
            Some(entry) => plain_dtype(entry.dtype).is_some(),
            None => self.scheme == Scheme::Plain,
        };
        if is_plain {
            return self.tensor(&weight, &expected_shape).map(HostMatrix::Dense);
        }
        self.scheme.matrix(self, name, expected_shape)
    }

    fn experts(&self, name: &str, extents: [usize; 3]) -> Result<Vec<HostMatrix>, LoadError> {
        match self.scheme.experts(self, name, extents)? {
            Some(matrices) => Ok(matrices),
            None => dense_experts(self, name, extents),
        }
    }
}
