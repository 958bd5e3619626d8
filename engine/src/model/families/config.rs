//! What families have in common in `config.json`.

use tidemill_kernels::{
    DType,
    ops::{Activation, HeadShape},
};

use crate::{
    error::LoadError,
    model::{
        fields::Fields,
        rope::RopeSpec,
        spec::{
            AttentionSpec, DenseSpec, EmbeddingSpec, Heads, LayerNorms, LayerSpec, MlpSpec, ModelSpec, Names,
            NormKind, NormSpec, Output,
        },
    },
};

/// No known model has a larger layer, vocabulary or head count; what is larger is a mistake or an attack.
pub(super) const MAX_EXTENT: usize = 1 << 24;
pub(super) const MAX_HEADS: usize = 1 << 16;
pub(super) const MAX_POSITIONS: usize = 1 << 30;
const MAX_LAYERS: usize = 4096;
/// Experts in all layers together.
const MAX_EXPERTS: usize = 1 << 19;

/// A `config.json` and the class that it names.
pub(super) struct Config<'a> {
    pub fields: Fields<'a>,
    /// The class name.
    pub class: &'static str,
    /// What models of that class give.
    pub output: Output,
}

/// What a family's configuration class says where a `config.json` says nothing, and what it calls some fields.
#[derive(Clone, Copy)]
pub(super) struct Defaults {
    pub hidden_size: &'static str,
    pub num_layers: &'static str,
    pub num_heads: &'static str,
    pub positions: &'static str,
    /// Positions where the field is absent.
    pub max_positions: Option<usize>,
    /// Tokens where the field is absent.
    pub vocab_size: Option<usize>,
    /// Query heads where the field is absent.
    pub heads: Option<usize>,
    /// The field of key and value heads, and how many there are where it is absent; otherwise as many as query heads. `None`: there is no such field.
    pub kv_heads: Option<(&'static str, Option<usize>)>,
    /// Whether there is a field of the width of a head. Where it is not, and where it is absent without a default: the hidden size over the heads.
    pub has_head_dim: bool,
    /// Width of a head where the field is absent.
    pub head_dim: Option<usize>,
    /// The field of the norms' epsilon.
    pub eps: &'static str,
    /// Its value where it is absent; otherwise it must be there.
    pub eps_value: Option<f64>,
    /// The norms.
    pub norm: NormKind,
    /// The field of the activation, and its value where it is absent.
    pub activation: (&'static str, &'static str),
    /// Whether the feed-forward block is gated.
    pub is_gated: bool,
    /// The field of the width of the feed-forward block, and how many times the hidden size it is where absent; otherwise it must be there.
    pub width: (&'static str, Option<usize>),
    pub tied: bool,
    /// Base of rotary positions.
    pub theta: f64,
    pub names: Names,
    pub norms: LayerNorms,
}

impl Defaults {
    /// Llama's, from which most families differ little.
    pub const LLAMA: Self = Self {
        hidden_size: "hidden_size",
        num_layers: "num_hidden_layers",
        num_heads: "num_attention_heads",
        positions: "max_position_embeddings",
        max_positions: None,
        vocab_size: None,
        heads: None,
        kv_heads: Some(("num_key_value_heads", None)),
        has_head_dim: true,
        head_dim: None,
        eps: "rms_norm_eps",
        eps_value: None,
        norm: NormKind::Rms,
        activation: ("hidden_act", "silu"),
        is_gated: true,
        width: ("intermediate_size", None),
        tied: false,
        theta: 10_000.0,
        names: Names::LLAMA,
        norms: LayerNorms::BEFORE,
    };
}

impl<'a> Config<'a> {
    /// The specification that these defaults and the common fields give: no rotary positions, no biases, full attention in every layer. The
    /// rest is the family's.
    pub fn spec(&self, defaults: &Defaults) -> Result<ModelSpec, LoadError> {
        let fields = &self.fields;
        let vocab_size = self.count("vocab_size", MAX_EXTENT, defaults.vocab_size)?;
        let hidden_size = fields.required_count(defaults.hidden_size, MAX_EXTENT)?;
        let positions = self.count(defaults.positions, MAX_POSITIONS, defaults.max_positions)?;
        let eps = match defaults.eps_value {
            None => fields.required_positive(defaults.eps)?,
            Some(absent) => fields.positive(defaults.eps)?.unwrap_or(absent),
        };
        let heads = self.heads(defaults, hidden_size)?;
        let width = match (defaults.width, fields.count(defaults.width.0, MAX_EXTENT)?) {
            (_, Some(width)) => width,
            ((_, Some(times)), None) => hidden_size * times,
            ((field, None), None) => fields.required_count(field, MAX_EXTENT)?,
        };
        let dense = DenseSpec {
            width,
            activation: self.activation(defaults.activation)?,
            is_gated: defaults.is_gated,
            bias: false,
        };
        let layer = LayerSpec {
            norms: defaults.norms,
            is_parallel: false,
            attention: AttentionSpec::full(heads.head_dim),
            mlp: MlpSpec::Dense(dense),
        };
        let num_layers = fields.required_count(defaults.num_layers, MAX_LAYERS)?;
        let mut names = defaults.names;
        if self.output == Output::Hidden {
            names.prefix = "";
        }
        Ok(ModelSpec {
            architecture: self.class,
            output: self.output,
            vocab_size,
            hidden_size,
            max_position_embeddings: positions,
            bos: fields.token_ids("bos_token_id", vocab_size)?.first().copied(),
            eos: fields.token_ids("eos_token_id", vocab_size)?,
            dtype: self.dtype()?,
            heads: Heads::Grouped(heads),
            alibi: None,
            embedding: EmbeddingSpec { scale: 1.0, positions: None, segments: None, norm: false },
            norm: NormSpec { kind: defaults.norm, eps, weight_offset: 0.0 },
            ropes: Vec::new(),
            layers: vec![layer; num_layers],
            final_norm: true,
            tie_word_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(defaults.tied),
            head_bias: false,
            logit_scale: 1.0,
            logit_soft_cap: None,
            names,
        })
    }

    /// As [`Config::spec`], with rotary positions in every layer.
    pub fn rotary_spec(&self, defaults: &Defaults) -> Result<ModelSpec, LoadError> {
        let mut spec = self.spec(defaults)?;
        let dim = spec.head_shape().head_dim;
        let rope = self.rope(&Rotation::whole(dim, defaults.theta, spec.max_position_embeddings))?;
        spec.set_rope(rope);
        Ok(spec)
    }

    fn heads(&self, defaults: &Defaults, hidden_size: usize) -> Result<HeadShape, LoadError> {
        let fields = &self.fields;
        let num_heads = self.count(defaults.num_heads, MAX_HEADS, defaults.heads)?;
        let num_kv_heads = match defaults.kv_heads {
            Some((field, absent)) => self.count(field, MAX_HEADS, Some(absent.unwrap_or(num_heads)))?,
            None => num_heads,
        };
        if !num_heads.is_multiple_of(num_kv_heads) {
            let detail =
                format!("is {num_kv_heads}, which does not divide {} ({num_heads})", defaults.num_heads);
            return Err(fields.bad(defaults.kv_heads.map_or("num_key_value_heads", |kv| kv.0), detail));
        }
        let given = if defaults.has_head_dim { fields.count("head_dim", 1 << 16)? } else { None };
        let head_dim = match given.or(defaults.head_dim) {
            Some(head_dim) => head_dim,
            None => self.split_evenly(defaults, hidden_size, num_heads)?,
        };
        Ok(HeadShape { num_heads, num_kv_heads, head_dim })
    }

    fn split_evenly(&self, defaults: &Defaults, hidden: usize, heads: usize) -> Result<usize, LoadError> {
        if hidden.is_multiple_of(heads) {
            return Ok(hidden / heads);
        }
        let detail = format!("is {hidden}, not a multiple of {} ({heads})", defaults.num_heads);
        Err(self.fields.bad(defaults.hidden_size, detail))
    }

    /// A count, which must be there unless it has a default.
    pub fn count(&self, field: &str, max: usize, absent: Option<usize>) -> Result<usize, LoadError> {
        match absent {
            None => self.fields.required_count(field, max),
            Some(absent) => Ok(self.fields.count(field, max)?.unwrap_or(absent)),
        }
    }

    /// A field that says whether there are biases.
    pub fn flag(&self, field: &str, absent: bool) -> Result<bool, LoadError> {
        Ok(self.fields.boolean(field)?.unwrap_or(absent))
    }

    /// A number over 0.
    pub fn positive(&self, field: &str, absent: f64) -> Result<f64, LoadError> {
        Ok(self.fields.positive(field)?.unwrap_or(absent))
    }

    /// The function of the feed-forward blocks.
    pub fn activation(&self, (field, absent): (&str, &str)) -> Result<Activation, LoadError> {
        let name = self.fields.string(field)?.unwrap_or(absent);
        match name {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu" => Ok(Activation::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluTanh),
            "relu" => Ok(Activation::Relu),
            other => {
                let known = "silu, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, relu";
                Err(self.fields.unsupported(field, format!("is {other:?}; supported: {known}")))
            }
        }
    }

    fn dtype(&self) -> Result<Option<DType>, LoadError> {
        let fields = &self.fields;
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
            Some(other) => {
                let detail = format!("is {other:?}; supported: \"bfloat16\", \"float16\", \"float32\"");
                Err(fields.unsupported(name, detail))
            }
        }
    }

    /// The kinds of attention of each layer (`layer_types`): whether it has the window. `None` where the file does not say.
    pub fn sliding_layers(&self, num_layers: usize) -> Result<Option<Vec<bool>>, LoadError> {
        let Some(types) = self.fields.strings("layer_types")? else { return Ok(None) };
        if types.len() != num_layers {
            let detail = format!("names {} layers, but there are {num_layers}", types.len());
            return Err(self.fields.bad("layer_types", detail));
        }
        let sliding = |kind: &&str| match *kind {
            "sliding_attention" => Ok(true),
            "full_attention" => Ok(false),
            other => {
                let detail = format!("has {other:?}; supported: sliding_attention, full_attention");
                Err(self.fields.unsupported("layer_types", detail))
            }
        };
        types.iter().map(sliding).collect::<Result<Vec<_>, _>>().map(Some)
    }

    /// Gives the layers for which `sliding` is true the window of `sliding_window`; `absent` where the field is missing.
    pub fn set_windows(
        &self,
        spec: &mut ModelSpec,
        sliding: &[bool],
        absent: Option<usize>,
    ) -> Result<(), LoadError> {
        let window = match self.fields.has("sliding_window") {
            true => self.fields.count("sliding_window", MAX_POSITIONS)?,
            false => absent,
        };
        if window.is_none() && sliding.contains(&true) {
            return Err(self.fields.bad("sliding_window", "is missing, but some layers have a window"));
        }
        for (layer, _) in spec.layers.iter_mut().zip(sliding).filter(|(_, sliding)| **sliding) {
            layer.attention.window = window;
        }
        Ok(())
    }

    /// As [`Config::set_windows`] where `use_sliding_window` says so: for the layers of `layer_types`, or those of `is_sliding`.
    pub fn set_optional_windows(
        &self,
        spec: &mut ModelSpec,
        is_sliding: impl Fn(usize) -> bool,
        absent: Option<usize>,
    ) -> Result<(), LoadError> {
        let given = self.sliding_layers(spec.layers.len())?;
        if !self.flag("use_sliding_window", false)? {
            // The window stands in many configurations and means nothing.
            self.fields.get("sliding_window");
            return match given {
                Some(sliding) if sliding.contains(&true) => {
                    let detail = "has sliding_attention, but use_sliding_window is not true";
                    Err(self.fields.bad("layer_types", detail))
                }
                _ => Ok(()),
            };
        }
        let sliding = given.unwrap_or_else(|| (0..spec.layers.len()).map(is_sliding).collect());
        self.set_windows(spec, &sliding, absent)
    }

    /// Gives every layer the window of `sliding_window`, if there is one.
    pub fn set_window_everywhere(
        &self,
        spec: &mut ModelSpec,
        absent: Option<usize>,
    ) -> Result<(), LoadError> {
        let fields = &self.fields;
        let is_set = match fields.has("sliding_window") {
            true => fields.get("sliding_window").is_some(),
            false => absent.is_some(),
        };
        self.set_windows(spec, &vec![is_set; spec.layers.len()], absent)
    }

    /// No product of extents may overflow anywhere downstream, and no list of tensors may fill the memory.
    pub fn check_sizes(&self, spec: &ModelSpec) -> Result<(), LoadError> {
        let mut widest = spec.vocab_size;
        let mut experts = 0_usize;
        for layer in &spec.layers {
            match &layer.mlp {
                MlpSpec::Dense(dense) => widest = widest.max(2 * dense.width),
                MlpSpec::Moe(moe) => {
                    experts += moe.routing.experts;
                    widest = widest.max(2 * moe.width).max(moe.shared.map_or(0, |s| 2 * s.dense.width));
                }
            }
        }
        if experts > MAX_EXPERTS {
            let detail =
                format!("and the experts of each make {experts} experts; at most {MAX_EXPERTS} are read");
            return Err(self.fields.bad("num_hidden_layers", detail));
        }
        let (heads, inner) = match spec.heads {
            Heads::Grouped(heads) => (heads.qkv_width(), spec.hidden_size),
            Heads::Latent(h) => {
                let head = h.nope_dim + h.rope_dim + h.value_dim + h.latent_dim;
                (h.num_heads * head, spec.hidden_size.max(h.latent_dim).max(h.query_rank.unwrap_or(0)))
            }
        };
        let bytes = widest.max(heads).checked_mul(inner).and_then(|n| n.checked_mul(size_of::<f32>()));
        match bytes {
            Some(bytes) if bytes <= 1 << 46 => Ok(()),
            _ => Err(self.fields.bad("hidden_size", "makes weight matrices that no machine can hold")),
        }
    }
}

/// What a family's rotary positions are, before `config.json` says more.
pub(super) struct Rotation {
    /// D.
    pub head_dim: usize,
    /// The share of D that is rotated where the file does not say; `None`: the whole, and nothing else is supported.
    pub partial: Option<f64>,
    pub theta: f64,
    pub max_positions: usize,
    /// Phi-3: `su` and `yarn` mean LongRoPE, there is no other scaling, and the original length stands beside the object, or is 4096.
    pub is_phi: bool,
    /// GPT-NeoX: what earlier files call base and share.
    pub is_neox: bool,
    pub is_interleaved: bool,
}

impl Rotation {
    /// Of whole heads.
    pub fn whole(head_dim: usize, theta: f64, max_positions: usize) -> Self {
        Self {
            head_dim,
            partial: None,
            theta,
            max_positions,
            is_phi: false,
            is_neox: false,
            is_interleaved: false,
        }
    }
}

impl AttentionSpec {
    /// Causal, over everything, without rotary positions.
    pub(super) fn full(head_dim: usize) -> Self {
        Self {
            qkv_bias: false,
            output_bias: false,
            qk_norm: None,
            rope: None,
            scale: (head_dim as f32).powf(-0.5),
            window: None,
            soft_cap: None,
            has_sinks: false,
            is_causal: true,
        }
    }
}

impl ModelSpec {
    /// Gives every layer these rotary positions.
    pub(super) fn set_rope(&mut self, rope: RopeSpec) {
        self.ropes = vec![rope];
        for layer in &mut self.layers {
            layer.attention.rope = Some(0);
        }
    }

    /// Gives every layer's attention biases, or none.
    pub(super) fn set_attention_bias(&mut self, qkv: bool, output: bool) {
        for layer in &mut self.layers {
            (layer.attention.qkv_bias, layer.attention.output_bias) = (qkv, output);
        }
    }

    /// Gives every dense feed-forward block biases, or none.
    pub(super) fn set_mlp_bias(&mut self, bias: bool) {
        for layer in &mut self.layers {
            if let MlpSpec::Dense(dense) = &mut layer.mlp {
                dense.bias = bias;
            }
        }
    }
}
