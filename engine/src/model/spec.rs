//! What kind of model a folder holds, read from `config.json` as data.

use std::path::Path;

use tidemill_kernels::tensor::DType;

use crate::{
    error::LoadError,
    ids::TokenId,
    model::{
        fields::{Fields, parse_object},
        files::{CONFIG, ModelFiles},
        rope::{RopeScaling, RopeSpec},
    },
};

/// A family of models with one wiring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`, or `LlamaModel`.
    Llama,
    /// `MistralForCausalLM` or `MistralModel` without a sliding window, which is wired as Llama is.
    Mistral,
}

impl Architecture {
    const ALL: [Self; 2] = [Self::Llama, Self::Mistral];

    /// The class name, as in the `architectures` of `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
        }
    }

    /// The class name of the same without an output layer.
    fn headless_name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaModel",
            Self::Mistral => "MistralModel",
        }
    }

    fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
        }
    }
}

/// A model's shape and constants. Every value has been checked; see [`ModelSpec::from_json`].
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// The family.
    pub architecture: Architecture,
    /// There is no output layer, as in models that were made for embeddings: they generate nothing.
    pub is_headless: bool,
    /// V: tokens of the embedding table. Every token id is below.
    pub vocab_size: usize,
    /// H: width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated feed-forward layer.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Q: query heads.
    pub num_heads: usize,
    /// K: key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// D: width of one head; even.
    pub head_dim: usize,
    /// Added to the mean square before the root.
    pub rms_norm_eps: f64,
    /// Whether the projections of q, k, v and o have biases.
    pub attention_bias: bool,
    /// Whether the projections gate, up and down have biases.
    pub mlp_bias: bool,
    /// Whether the output layer is the embedding table.
    pub tie_word_embeddings: bool,
    /// Longest context in tokens.
    pub max_position_embeddings: usize,
    /// Start-of-sequence token.
    pub bos: Option<TokenId>,
    /// Tokens that end a generation. `generation_config.json` may add more: see
    /// [`GenerationDefaults`](super::GenerationDefaults).
    pub eos: Vec<TokenId>,
    /// Rotary position embeddings.
    pub rope: RopeSpec,
    /// The type the weights were saved in. `None` where the file does not say; the checkpoint's tensors do.
    pub dtype: Option<DType>,
}

/// A tensor that the checkpoint must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the checkpoint.
    pub name: String,
    /// Extents, slowest first.
    pub shape: Vec<usize>,
}

/// No known model has a larger layer, vocabulary or head count; what is larger is a mistake or an attack.
const MAX_EXTENT: usize = 1 << 24;
const MAX_LAYERS: usize = 4096;
const MAX_POSITIONS: usize = 1 << 30;

/// Fields of other families that we would compute wrongly if we ignored them.
const FOREIGN_FIELDS: &[&str] = &[
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_intermediate_size",
    "kv_lora_rank",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "no_rope_layers",
];

impl ModelSpec {
    /// Reads the folder's `config.json`.
    ///
    /// # Errors
    /// As [`ModelSpec::from_json`], and where the file cannot be read.
    pub fn load(files: &ModelFiles) -> Result<Self, LoadError> {
        Self::from_json(&files.path(CONFIG), &files.require(CONFIG)?)
    }

    /// Reads the bytes of a `config.json`; `path` is for messages. Both dialects are understood: `rope_parameters` and
    /// `dtype` of transformers 5, `rope_theta`, `rope_scaling` and `torch_dtype` of earlier ones.
    ///
    /// # Errors
    /// [`LoadError::Unsupported`] for a model that Tidemill does not implement, [`LoadError::Format`] for fields that are
    /// missing, of the wrong type, out of range or in contradiction. Both name the field.
    pub fn from_json(path: &Path, bytes: &[u8]) -> Result<Self, LoadError> {
        let map = parse_object(path, bytes)?;
        let fields = Fields::new(path, &map);
        let (architecture, is_headless) = architecture(&fields)?;
        refuse_what_we_lack(&fields, architecture)?;
        let vocab_size = fields.required_count("vocab_size", MAX_EXTENT)?;
        let max_position_embeddings = fields.required_count("max_position_embeddings", MAX_POSITIONS)?;
        let heads = Heads::read(&fields)?;
        let spec = Self {
            architecture,
            is_headless,
            vocab_size,
            hidden_size: heads.hidden_size,
            intermediate_size: fields.required_count("intermediate_size", MAX_EXTENT)?,
            num_layers: fields.required_count("num_hidden_layers", MAX_LAYERS)?,
            num_heads: heads.num_heads,
            num_kv_heads: heads.num_kv_heads,
            head_dim: heads.head_dim,
            rms_norm_eps: fields.required_positive("rms_norm_eps")?,
            attention_bias: fields.boolean("attention_bias")?.unwrap_or(false),
            mlp_bias: fields.boolean("mlp_bias")?.unwrap_or(false),
            tie_word_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(false),
            max_position_embeddings,
            bos: fields.token_ids("bos_token_id", vocab_size)?.first().copied(),
            eos: fields.token_ids("eos_token_id", vocab_size)?,
            rope: rope(&fields, max_position_embeddings)?,
            dtype: dtype(&fields)?,
        };
        spec.check_sizes(&fields)?;
        Ok(spec)
    }

    /// Every tensor that the checkpoint must hold, in the order of the forward pass.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let hidden = self.hidden_size;
        let mut list = TensorList::default();
        list.add(self.tensor_name("embed_tokens.weight"), &[self.vocab_size, hidden]);
        for layer in 0..self.num_layers {
            self.layer_tensors(&self.tensor_name(&format!("layers.{layer}.")), &mut list);
        }
        list.add(self.tensor_name("norm.weight"), &[hidden]);
        if self.has_lm_head() {
            list.add("lm_head.weight".to_owned(), &[self.vocab_size, hidden]);
        }
        list.0
    }

    /// The class name, as in the `architectures` of `config.json`.
    pub fn architecture_name(&self) -> &'static str {
        if self.is_headless { self.architecture.headless_name() } else { self.architecture.name() }
    }

    /// The name in the checkpoint of a tensor that is not the output layer's.
    pub fn tensor_name(&self, name: &str) -> String {
        if self.is_headless { name.to_owned() } else { format!("model.{name}") }
    }

    /// Segments that the model tells apart; 0 where it knows none.
    pub fn num_segments(&self) -> usize {
        0
    }

    /// Whether tokens see those behind them too.
    pub fn is_bidirectional(&self) -> bool {
        false
    }

    /// Whether the output layer is a matrix of its own.
    pub fn has_lm_head(&self) -> bool {
        !self.is_headless && !self.tie_word_embeddings
    }

    fn layer_tensors(&self, prefix: &str, list: &mut TensorList) {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        list.add(format!("{prefix}input_layernorm.weight"), &[hidden]);
        for (name, out, width) in [("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)] {
            list.linear(format!("{prefix}self_attn.{name}_proj"), [out, width], self.attention_bias);
        }
        list.add(format!("{prefix}post_attention_layernorm.weight"), &[hidden]);
        for (name, out, width) in [("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)] {
            list.linear(format!("{prefix}mlp.{name}_proj"), [out, width], self.mlp_bias);
        }
    }

    /// No product of extents may overflow anywhere downstream.
    fn check_sizes(&self, fields: &Fields<'_>) -> Result<(), LoadError> {
        let widest = self.vocab_size.max(self.intermediate_size).max(self.num_heads * self.head_dim);
        let bytes = widest.checked_mul(self.hidden_size).and_then(|n| n.checked_mul(size_of::<f32>()));
        match bytes {
            Some(bytes) if bytes <= 1 << 46 => Ok(()),
            _ => Err(fields.bad("hidden_size", "makes weight matrices that no machine can hold")),
        }
    }
}

#[derive(Default)]
struct TensorList(Vec<TensorSpec>);

impl TensorList {
    fn add(&mut self, name: String, shape: &[usize]) {
        self.0.push(TensorSpec { name, shape: shape.to_vec() });
    }

    /// A projection: its weight `[out, in]` and, where it has one, its bias `[out]`.
    fn linear(&mut self, name: String, shape: [usize; 2], bias: bool) {
        self.add(format!("{name}.weight"), &shape);
        if bias {
            self.add(format!("{name}.bias"), &shape[..1]);
        }
    }
}

/// The family, and whether it comes without an output layer.
fn architecture(fields: &Fields<'_>) -> Result<(Architecture, bool), LoadError> {
    let supported = [Architecture::name, Architecture::headless_name].map(|name| Architecture::ALL.map(name));
    let supported = supported.concat().join(", ");
    let name = match fields.strings("architectures")?.as_deref() {
        Some([name]) => *name,
        Some(_) => return Err(fields.bad("architectures", "must name exactly one architecture")),
        None => return Err(fields.bad("architectures", format!("is missing; supported: {supported}"))),
    };
    let is_known = |known: &Architecture| [known.name(), known.headless_name()].contains(&name);
    let Some(architecture) = Architecture::ALL.into_iter().find(is_known) else {
        return Err(fields.unsupported("architectures", format!("names {name:?}; supported: {supported}")));
    };
    match fields.string("model_type")? {
        Some(model_type) if model_type != architecture.model_type() => {
            Err(fields.bad("model_type", format!("is {model_type:?}, which contradicts architecture {name}")))
        }
        _ => Ok((architecture, name == architecture.headless_name())),
    }
}

/// Fields whose meaning we do not implement must be absent or neutral.
fn refuse_what_we_lack(fields: &Fields<'_>, architecture: Architecture) -> Result<(), LoadError> {
    for field in ["quantization_config", "compression_config"] {
        if fields.get(field).is_some() {
            return Err(fields.unsupported(field, "is set, but only unquantised checkpoints are supported"));
        }
    }
    if let Some(window) = fields.get("sliding_window") {
        return Err(fields
            .unsupported("sliding_window", format!("is {window}, but only full attention is supported")));
    }
    if architecture == Architecture::Mistral && !fields.has("sliding_window") {
        let detail = "is absent, which means a window of 4096; only full attention (null) is supported";
        return Err(fields.unsupported("sliding_window", detail));
    }
    for layer_type in fields.strings("layer_types")?.unwrap_or_default() {
        if layer_type != "full_attention" {
            return Err(
                fields.unsupported("layer_types", format!("has {layer_type:?}; only full_attention is"))
            );
        }
    }
    match fields.string("hidden_act")? {
        None | Some("silu" | "swish") => {}
        Some(other) => {
            return Err(fields.unsupported("hidden_act", format!("is {other:?}; supported: \"silu\"")));
        }
    }
    if let Some(field) = FOREIGN_FIELDS.iter().find(|field| fields.get(field).is_some()) {
        let detail = format!("is set, but {} has no such thing", architecture.name());
        return Err(fields.unsupported(field, detail));
    }
    refuse_partial_rotary(fields)
}

fn refuse_partial_rotary(fields: &Fields<'_>) -> Result<(), LoadError> {
    match fields.number("partial_rotary_factor")? {
        Some(factor) if factor != 1.0 => {
            Err(fields.unsupported("partial_rotary_factor", format!("is {factor}; supported: 1")))
        }
        _ => Ok(()),
    }
}

struct Heads {
    hidden_size: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

impl Heads {
    fn read(fields: &Fields<'_>) -> Result<Self, LoadError> {
        let hidden_size = fields.required_count("hidden_size", MAX_EXTENT)?;
        let num_heads = fields.required_count("num_attention_heads", 1 << 16)?;
        let num_kv_heads = fields.count("num_key_value_heads", 1 << 16)?.unwrap_or(num_heads);
        if !num_heads.is_multiple_of(num_kv_heads) {
            let detail =
                format!("is {num_kv_heads}, which does not divide num_attention_heads ({num_heads})");
            return Err(fields.bad("num_key_value_heads", detail));
        }
        let head_dim = match fields.count("head_dim", 1 << 16)? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
            None => {
                let detail = format!("is {hidden_size}, not a multiple of num_attention_heads ({num_heads})");
                return Err(fields.bad("hidden_size", detail));
            }
        };
        if !head_dim.is_multiple_of(2) {
            return Err(fields.bad("head_dim", format!("is {head_dim}; rotary embeddings need an even one")));
        }
        Ok(Self { hidden_size, num_heads, num_kv_heads, head_dim })
    }
}

fn dtype(fields: &Fields<'_>) -> Result<Option<DType>, LoadError> {
    let (new, old) = (fields.string("dtype")?, fields.string("torch_dtype")?);
    if let (Some(new), Some(old)) = (new, old)
        && new != old
    {
        return Err(fields.bad("dtype", format!("is {new:?}, but torch_dtype is {old:?}")));
    }
    let name = if new.is_some() { "dtype" } else { "torch_dtype" };
    match new.or(old).map(|dtype| dtype.strip_prefix("torch.").unwrap_or(dtype)) {
        None | Some("auto") => Ok(None),
        Some("bfloat16") => Ok(Some(DType::Bf16)),
        Some("float16") => Ok(Some(DType::F16)),
        Some("float32") => Ok(Some(DType::F32)),
        Some(other) => Err(fields
            .unsupported(name, format!("is {other:?}; supported: \"bfloat16\", \"float16\", \"float32\""))),
    }
}

/// The default of `RotaryEmbeddingConfigMixin.default_theta` in transformers.
const DEFAULT_THETA: f64 = 10_000.0;

fn rope(fields: &Fields<'_>, max_positions: usize) -> Result<RopeSpec, LoadError> {
    let theta = fields.positive("rope_theta")?;
    let read = |name: &'static str| match fields.object(name)? {
        // An empty object says as little as null.
        Some(object) if object.names().next().is_some() => {
            read_rope(fields, &object, theta, max_positions).map(Some)
        }
        _ => Ok(None),
    };
    match (read("rope_parameters")?, read("rope_scaling")?) {
        (Some(new), Some(old)) if new != old => {
            Err(fields.bad("rope_scaling", "contradicts rope_parameters; keep one of them"))
        }
        (Some(rope), _) | (None, Some(rope)) => Ok(rope),
        (None, None) => Ok(RopeSpec { theta: theta.unwrap_or(DEFAULT_THETA), scaling: RopeScaling::Default }),
    }
}

fn read_rope(
    top: &Fields<'_>,
    rope: &Fields<'_>,
    top_theta: Option<f64>,
    max_positions: usize,
) -> Result<RopeSpec, LoadError> {
    refuse_partial_rotary(rope)?;
    let theta = match (rope.positive("rope_theta")?, top_theta) {
        (Some(inner), Some(outer)) if inner != outer => {
            return Err(
                rope.bad("rope_theta", format!("is {inner}, but the top-level rope_theta is {outer}"))
            );
        }
        (inner, outer) => inner.or(outer).unwrap_or(DEFAULT_THETA),
    };
    let kind = match (rope.string("rope_type")?, rope.string("type")?) {
        (Some(new), Some(old)) if new != old => {
            return Err(rope.bad("rope_type", format!("is {new:?}, but type is {old:?}")));
        }
        (new, old) => new.or(old).unwrap_or("default"),
    };
    let scaling = match kind {
        "default" => match rope.number("factor")? {
            Some(factor) if factor != 1.0 => {
                return Err(
                    rope.bad("factor", format!("is {factor}, but rope_type is \"default\" or absent"))
                );
            }
            _ => RopeScaling::Default,
        },
        "linear" => RopeScaling::Linear { factor: rope.required_positive("factor")? },
        "llama3" => llama3(rope, original_positions(top, rope, max_positions)?)?,
        "yarn" => yarn(rope, original_positions(top, rope, max_positions)?, theta)?,
        other => {
            let detail = format!("is {other:?}; supported: default, linear, llama3, yarn");
            return Err(rope.unsupported("rope_type", detail));
        }
    };
    Ok(RopeSpec { theta, scaling })
}

/// `standardize_rope_params` of transformers: the top-level field wins, then the rope object's, then the full context.
fn original_positions(top: &Fields<'_>, rope: &Fields<'_>, max_positions: usize) -> Result<usize, LoadError> {
    let field = "original_max_position_embeddings";
    Ok(match top.count(field, MAX_POSITIONS)? {
        Some(positions) => positions,
        None => rope.count(field, MAX_POSITIONS)?.unwrap_or(max_positions),
    })
}

fn llama3(rope: &Fields<'_>, original: usize) -> Result<RopeScaling, LoadError> {
    let low_freq_factor = rope.required_positive("low_freq_factor")?;
    let high_freq_factor = rope.required_positive("high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        return Err(rope.bad("high_freq_factor", format!("must be over low_freq_factor ({low_freq_factor})")));
    }
    Ok(RopeScaling::Llama3 {
        factor: rope.required_positive("factor")?,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings: original,
    })
}

fn yarn(rope: &Fields<'_>, original: usize, theta: f64) -> Result<RopeScaling, LoadError> {
    let factor = rope.required_positive("factor")?;
    // As the reference reads them: a zero counts as absent.
    let given = |field: &str| Ok::<_, LoadError>(rope.number(field)?.filter(|value| *value != 0.0));
    let (mscale, mscale_all_dim) = (given("mscale")?, given("mscale_all_dim")?);
    let (beta_fast, beta_slow) = (given("beta_fast")?.unwrap_or(32.0), given("beta_slow")?.unwrap_or(1.0));
    if !(beta_slow > 0.0 && beta_fast >= beta_slow) {
        return Err(rope.bad(
            "beta_fast",
            format!("({beta_fast}) and beta_slow ({beta_slow}) must be over 0 and in order"),
        ));
    }
    if theta <= 1.0 {
        return Err(rope.bad("rope_theta", format!("is {theta}; yarn needs one over 1")));
    }
    // arXiv 2309.00071, section 3.4; with mscale: DeepSeek-V2's reference code.
    let scale = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
    let inferred = match (mscale, mscale_all_dim) {
        (Some(mscale), Some(all_dim)) => scale(mscale) / scale(all_dim),
        _ => scale(1.0),
    };
    let attention_factor = rope.positive("attention_factor")?.unwrap_or(inferred);
    if !attention_factor.is_finite() {
        return Err(rope.bad("mscale_all_dim", "makes an infinite attention factor"));
    }
    Ok(RopeScaling::Yarn {
        factor,
        attention_factor,
        beta_fast,
        beta_slow,
        original_max_position_embeddings: original,
        truncate: rope.boolean("truncate")?.unwrap_or(true),
    })
}
