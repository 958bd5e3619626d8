//! Fixtures, and the model that is compared with them.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use safetensors::SafeTensors;
use tidemill_engine::{
    error::LoadError,
    model::{
        checkpoint::Checkpoint,
        decoder::{Decoder, DecoderLimits},
        files::{ModelFiles, ModelSource},
        rope::RopeScaling,
        spec::ModelSpec,
    },
};
use tidemill_kernels::{
    DType,
    cpu::{Compute, CpuConfig, CpuOps, Isa},
    ops::BatchMeta,
};

const BLOCK_SIZE: usize = 16;
const NUM_BLOCKS: usize = 24;

pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The reference's tensors as vectors of f32 or of token ids.
pub struct Golden {
    pub floats: HashMap<String, Vec<f32>>,
    pub ids: HashMap<String, Vec<u32>>,
}

impl Golden {
    pub fn load(name: &str) -> Self {
        let bytes = std::fs::read(fixture(name).join("golden.safetensors")).unwrap();
        let (mut floats, mut ids) = (HashMap::new(), HashMap::new());
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let words = tensor.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
            if name.starts_with("logits") {
                floats.insert(name, words.map(f32::from_le_bytes).collect());
            } else {
                ids.insert(name, words.map(u32::from_le_bytes).collect());
            }
        }
        Self { floats, ids }
    }

    pub fn prompts(&self) -> usize {
        self.floats.len()
    }
}

pub struct Model {
    decoder: Decoder<CpuOps>,
    pub vocab: usize,
    pub architecture: &'static str,
    spec: ModelSpec,
}

impl Model {
    pub fn load(source: ModelSource, compute: Compute, isa: Isa, tokens: usize) -> Self {
        let spec = ModelSpec::load(&ModelFiles::open(&source).unwrap()).unwrap();
        Self::with_spec(&source, spec, (compute, isa), tokens).unwrap()
    }

    /// For sequences of at most `tokens` tokens.
    pub fn with_spec(
        source: &ModelSource,
        spec: ModelSpec,
        (compute, isa): (Compute, Isa),
        tokens: usize,
    ) -> Result<Self, LoadError> {
        let checkpoint = Checkpoint::open(&ModelFiles::open(source).unwrap()).unwrap();
        checkpoint.verify(&spec)?;
        let dtype = if compute == Compute::F32 { DType::F32 } else { DType::Bf16 };
        let mut max_model_len = 384.min(spec.max_position_embeddings);
        for rope in &spec.ropes {
            // The reference chooses factors for each sequence; we choose them for the engine.
            if let RopeScaling::LongRope { original_max_position_embeddings: original, .. } = rope.scaling
                && tokens <= original
            {
                max_model_len = original;
            }
        }
        let limits = DecoderLimits { max_num_batched_tokens: 384, max_model_len };
        let ops = CpuOps::new(CpuConfig { compute, isa: Some(isa), threads: Some(2) })?;
        let mut decoder = Decoder::load(ops, &spec, &checkpoint, limits, |_| ())?;
        decoder.allocate_kv(spec.kv_shape(NUM_BLOCKS, BLOCK_SIZE, dtype))?;
        Ok(Self { decoder, vocab: spec.vocab_size, architecture: spec.architecture, spec })
    }

    /// Forgets keys and values, and keeps them in this type from now on.
    pub fn keep_kv_in(&mut self, dtype: DType) {
        self.decoder.allocate_kv(self.spec.kv_shape(NUM_BLOCKS, BLOCK_SIZE, dtype)).unwrap();
    }

    /// Computes `tokens` at positions from `start` on, in blocks that do not lie in order, and gives the logits of all of them.
    pub fn run(&mut self, start: usize, tokens: &[u32]) -> Vec<Vec<f32>> {
        let blocks: Vec<u32> = (0..NUM_BLOCKS as u32).map(|i| (i * 7 + 3) % NUM_BLOCKS as u32).collect();
        let end = start + tokens.len();
        let slot = |p: usize| blocks[p / BLOCK_SIZE] * BLOCK_SIZE as u32 + (p % BLOCK_SIZE) as u32;
        let meta = BatchMeta {
            token_ids: tokens.to_vec(),
            positions: (start..end).map(|p| p as u32).collect(),
            slot_mapping: (start..end).map(slot).collect(),
            cu_seqlens_q: vec![0, tokens.len() as u32],
            context_lens: vec![end as u32],
            block_tables: blocks.clone(),
            max_blocks: blocks.len(),
            logits_indices: (0..tokens.len() as u32).collect(),
            ..BatchMeta::default()
        };
        let logits = self.decoder.logits(Arc::new(meta)).unwrap();
        logits.chunks_exact(self.vocab).map(<[f32]>::to_vec).collect()
    }
}

pub fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a))).unwrap() as u32
}

pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

pub fn range(values: &[f32]) -> f32 {
    values.iter().copied().fold(f32::MIN, f32::max) - values.iter().copied().fold(f32::MAX, f32::min)
}
