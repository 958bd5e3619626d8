//! The matrices of a model that adapters may change.

use std::collections::BTreeSet;

use tidemill_kernels::ops::LoraShape;

use crate::model::spec::ModelSpec;

/// Places in a layer; each is one matrix on the device, in which projections that read the same input are stacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Site {
    /// Queries, keys and values.
    Qkv,
    /// The projection of attention's result.
    Output,
    /// Gate and up.
    Up,
    /// The projection that ends the feed-forward block.
    Down,
}

/// How many there are.
pub const SITES: usize = 4;

/// One site of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SiteSpec {
    /// K.
    pub k: usize,
    /// What is stacked.
    pub parts: Vec<Part>,
}

/// A projection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Name of the module, without what stands before all names of the model.
    pub name: String,
    /// Its rows.
    pub n: usize,
}

impl SiteSpec {
    /// The room that `slots` adapters of up to `max_rank` need.
    pub fn shape(&self, slots: usize, max_rank: usize) -> LoraShape {
        LoraShape { slots, max_rank, k: self.k, parts: self.parts.iter().map(|part| part.n).collect() }
    }
}

/// The sites of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sites {
    /// By [`Site`], one for each layer; `None` where a layer has no such matrix, or one that adapters cannot change.
    pub layers: Vec<[Option<SiteSpec>; SITES]>,
    /// What may stand before all names.
    prefixes: Vec<String>,
}

impl Sites {
    /// Those of a model.
    pub fn of(spec: &ModelSpec) -> Self {
        let (hidden, inter) = (spec.hidden_size, spec.intermediate_size);
        let (q, kv) = (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim);
        let layer = |index: usize| {
            let site = |k, parts: &[(&str, usize)]| {
                let part = |&(name, n): &(&str, usize)| Part { name: format!("layers.{index}.{name}"), n };
                Some(SiteSpec { k, parts: parts.iter().map(part).collect() })
            };
            [
                site(hidden, &[("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)]),
                site(q, &[("self_attn.o_proj", hidden)]),
                site(hidden, &[("mlp.gate_proj", inter), ("mlp.up_proj", inter)]),
                site(inter, &[("mlp.down_proj", hidden)]),
            ]
        };
        Self { layers: (0..spec.num_layers).map(layer).collect(), prefixes: vec!["model.".into()] }
    }

    /// A module's name without what may stand before all names.
    pub(super) fn plain<'a>(&self, module: &'a str) -> &'a str {
        self.prefixes.iter().find_map(|prefix| module.strip_prefix(prefix.as_str())).unwrap_or(module)
    }

    /// Elements of an adapter of this rank that changes everything.
    pub(super) fn elements_of_rank(&self, rank: usize) -> usize {
        let of = |site: &SiteSpec| site.parts.iter().map(|part| part.n + site.k).sum::<usize>();
        rank * self.layers.iter().flatten().flatten().map(of).sum::<usize>()
    }

    /// Last components of the names of all parts.
    pub(super) fn names(&self) -> Vec<&str> {
        let parts = self.layers.iter().flatten().flatten().flat_map(|site| &site.parts);
        let names: BTreeSet<_> = parts.filter_map(|part| part.name.rsplit('.').next()).collect();
        names.into_iter().collect()
    }
}
