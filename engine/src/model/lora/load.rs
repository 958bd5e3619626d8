//! An adapter's folder. It is hostile input: everything is checked before a request can name it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use safetensors::{Dtype, SafeTensors};
use tidemill_kernels::{DType, HostTensor, ops::LoraPart, tensor::HostMatrix};

use super::{
    LoraWeights, SITES,
    config::{AdapterConfig, CONFIG},
    sites::{Part, SiteSpec, Sites},
};
use crate::{error::LoadError, model::decoder::take_rows};

const WEIGHTS: &str = "adapter_model.safetensors";
/// What a configuration may have.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// What the header of the weights may have, beside the weights themselves.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// What PEFT puts in front of the names of the model that it wraps.
const WRAPPED: &str = "base_model.model.";

/// Reads the adapter in the folder `dir`, whole, so that nobody who changes the file later changes the adapter. `shown` stands for the folder in messages.
///
/// # Errors
/// What is wrong with it, naming file and field or tensor: a rank over `max_rank`, a matrix that the model does not have or that cannot be changed per request, wrong
/// shapes, a matrix without its other half.
pub fn load(dir: &Path, shown: &Path, sites: &Sites, max_rank: usize) -> Result<LoraWeights, LoadError> {
    let path = shown.join(CONFIG);
    let config = read(&dir.join(CONFIG), &path, MAX_CONFIG_BYTES)?;
    let config = AdapterConfig::read(&path, &config)?;
    if config.rank > max_rank {
        let detail = format!("r is {}; this server was started with --max-lora-rank {max_rank}", config.rank);
        return Err(LoadError::Unsupported { path, detail });
    }
    let path = shown.join(WEIGHTS);
    // In f32 nothing that fits is larger.
    let most = sites.elements_of_rank(config.rank) as u64 * DType::F32.size() as u64 + MAX_HEADER_BYTES;
    let bytes = Bytes::from(read(&dir.join(WEIGHTS), &path, most)?);
    Reader { path, sites, rank: config.rank }.weights(&bytes, &config)
}

fn read(path: &Path, shown: &Path, most: u64) -> Result<Vec<u8>, LoadError> {
    let io = |source| LoadError::Io { path: shown.into(), source };
    let too_large = || LoadError::Format { path: shown.into(), detail: format!("larger than {most} bytes") };
    // A pipe has no end, and opening it may never return.
    if !fs::metadata(path).map_err(io)?.is_file() {
        return Err(LoadError::Format { path: shown.into(), detail: "not a file".into() });
    }
    let mut bytes = Vec::new();
    File::open(path).map_err(io)?.take(most + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > most { Err(too_large()) } else { Ok(bytes) }
}

struct Reader<'a> {
    path: PathBuf,
    sites: &'a Sites,
    rank: usize,
}

/// Both matrices of a module.
#[derive(Default)]
struct Pair {
    a: Option<HostTensor>,
    b: Option<HostTensor>,
}

impl Reader<'_> {
    fn weights(&self, bytes: &Bytes, config: &AdapterConfig) -> Result<LoraWeights, LoadError> {
        let mut pairs = self.pairs(bytes)?;
        let mut layer = |sites: &[Option<SiteSpec>; SITES]| -> Result<_, LoadError> {
            let mut all = [const { None }; SITES];
            for (site, all) in sites.iter().zip(&mut all) {
                let Some(site) = site else { continue };
                let part = |part: &Part| self.part(pairs.remove(part.name.as_str()), part, site.k, config);
                let parts = site.parts.iter().map(part).collect::<Result<Vec<_>, _>>()?;
                *all = parts.iter().any(Option::is_some).then_some(parts);
            }
            Ok(all)
        };
        let layers = self.sites.layers.iter().map(&mut layer).collect::<Result<_, _>>()?;
        match pairs.keys().next() {
            None => Ok(LoraWeights { layers }),
            Some(module) => Err(self.unsupported(format!(
                "{module:?} is no matrix of this model that an adapter can change; those are {}",
                self.sites.names().join(", ")
            ))),
        }
    }

    /// The tensors of the file by module.
    fn pairs(&self, bytes: &Bytes) -> Result<BTreeMap<String, Pair>, LoadError> {
        let (header, metadata) = SafeTensors::read_metadata(bytes)
            .map_err(|error| self.format(format!("not a valid safetensors file, or cut short: {error}")))?;
        let data = size_of::<u64>() + header;
        let mut pairs = BTreeMap::<String, Pair>::new();
        for (name, info) in metadata.tensors() {
            let (module, is_a) = match (
                name.strip_suffix(".lora_A.weight"),
                name.strip_suffix(".lora_B.weight"),
            ) {
                (Some(module), _) => (module, true),
                (_, Some(module)) => (module, false),
                _ => {
                    let detail = format!(
                        "tensor {name:?} is none of an adapter of projections (….lora_A.weight, ….lora_B.weight); \
                         embeddings, output layers, biases and magnitudes cannot be changed per request"
                    );
                    return Err(self.unsupported(detail));
                }
            };
            let dtype = match info.dtype {
                Dtype::BF16 => DType::Bf16,
                Dtype::F16 => DType::F16,
                Dtype::F32 => DType::F32,
                other => return Err(self.unsupported(format!("tensor {name:?} is {other:?}"))),
            };
            let (start, end) = info.data_offsets;
            let tensor = HostTensor {
                name: name.clone(),
                dtype,
                shape: info.shape.clone(),
                data: bytes.slice(data + start..data + end),
            };
            let module = self.sites.plain(module.strip_prefix(WRAPPED).unwrap_or(module)).to_owned();
            let pair = pairs.entry(module).or_default();
            let half = if is_a { &mut pair.a } else { &mut pair.b };
            if half.replace(tensor).is_some() {
                return Err(self.format(format!("tensor {name:?} is there twice, under two prefixes")));
            }
        }
        Ok(pairs)
    }

    fn part(
        &self,
        pair: Option<Pair>,
        part: &Part,
        k: usize,
        config: &AdapterConfig,
    ) -> Result<Option<LoraPart>, LoadError> {
        let Pair { a, b } = pair.unwrap_or_default();
        let last = part.name.rsplit('.').next().unwrap_or_default();
        let is_meant = config.targets.as_ref().is_some_and(|names| names.iter().any(|name| name == last));
        if a.is_none() && b.is_none() && !is_meant {
            return Ok(None);
        }
        let half = |tensor: Option<HostTensor>, which: &str, expected: [usize; 2]| {
            let name = format!("{}.{which}.weight", part.name);
            let (path, got) = (self.path.clone(), tensor.as_ref().map(|tensor| tensor.shape.clone()));
            match (tensor, got) {
                (Some(tensor), _) if tensor.shape == expected => Ok(tensor),
                (_, Some(got)) => {
                    Err(LoadError::TensorShape { path, tensor: name, got, expected: expected.into() })
                }
                _ => Err(LoadError::MissingTensor { path, tensor: name, expected: expected.into() }),
            }
        };
        let a = half(a, "lora_A", [self.rank, k])?;
        let b = half(b, "lora_B", [part.n, self.rank])?;
        let b = match &part.rows {
            None => b,
            Some(rows) => match take_rows(&b.into(), rows)? {
                HostMatrix::Dense(tensor) => tensor,
                HostMatrix::Quantized(_) => unreachable!("what is dense stays so"),
            },
        };
        Ok(Some(LoraPart { a, b, scale: config.scale }))
    }

    fn format(&self, detail: String) -> LoadError {
        LoadError::Format { path: self.path.clone(), detail }
    }

    fn unsupported(&self, detail: String) -> LoadError {
        LoadError::Unsupported { path: self.path.clone(), detail }
    }
}
