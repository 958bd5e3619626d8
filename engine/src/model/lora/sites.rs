//! The matrices of a model that adapters may change.

use std::{cmp::Reverse, collections::BTreeSet, ops::Range};

use tidemill_kernels::ops::LoraShape;

use crate::{
    error::LoadError,
    model::{
        parts::{self, Attention, Change, Dense, ExpertsSource, Layer, Linear, Maker, Mlp, Stage, UpDown},
        spec::{MlpSpec, ModelSpec},
    },
};

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

/// A projection of the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Name of the module, without what stands before all names of the model.
    pub name: String,
    /// Its rows in the checkpoint, and in the matrix.
    pub n: usize,
    /// The order in which its rows stand in the matrix; `None`: as they are.
    pub rows: Option<Vec<Range<usize>>>,
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
    /// Those of a model: the projections of attention and of gated feed-forward blocks that are the same for all tokens. Not the projections of latent
    /// attention, which are absorbed into others; not those of experts.
    pub fn of(spec: &ModelSpec) -> Self {
        let names = &spec.names;
        let known = std::iter::once(&names.prefix).chain(names.other_prefixes);
        let mut prefixes: Vec<String> =
            known.filter(|prefix| !prefix.is_empty()).map(|prefix| prefix.to_string()).collect();
        prefixes.sort_unstable_by_key(|prefix| Reverse(prefix.len()));
        let mut sites = Self { layers: Vec::new(), prefixes };
        for (index, layer) in spec.layers.iter().enumerate() {
            // A list fails nowhere: no tensor is touched.
            let Ok(parts) = Layer::<Named>::make(&mut Namer, spec, index) else { continue };
            let qkv = match parts.attention {
                Attention::Grouped(grouped) => Some(grouped.qkv_proj),
                Attention::Latent(_) => None,
            };
            let [up, down] = match (parts.mlp, &layer.mlp) {
                (Mlp::Dense(Dense { up, down }), MlpSpec::Dense(dense)) => {
                    [Some(up).filter(|_| dense.is_gated), Some(down)]
                }
                _ => [None, None],
            };
            let site = |linear: Option<Linear>| linear.map(|linear| sites.site(&linear));
            let layer = [site(qkv), site(Some(parts.o_proj)), site(up), site(down)];
            sites.layers.push(layer);
        }
        sites
    }

    fn site(&self, linear: &Linear) -> SiteSpec {
        let part = |part: &parts::Part| Part {
            name: self.plain(&part.name).to_owned(),
            n: part.shape[0],
            rows: part.rows.clone(),
        };
        SiteSpec {
            k: linear.parts.first().map_or(0, |part| part.shape[1]),
            parts: linear.parts.iter().map(part).collect(),
        }
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

/// Parts that are known by name.
struct Named;

impl Stage for Named {
    type Weight = Linear;
    type Vector = ();
    type Experts = ();
}

/// Takes nothing over and says what it would be.
struct Namer;

impl Maker for Namer {
    type Made = Named;

    fn table(&mut self, name: &str, shape: [usize; 2]) -> Result<Linear, LoadError> {
        Ok(Linear::new(vec![parts::Part::all(name.to_owned(), shape)], false))
    }

    fn linear(&mut self, linear: &Linear) -> Result<Linear, LoadError> {
        Ok(linear.clone())
    }

    fn vector(&mut self, _: &str, _: &[usize], _: Change) -> Result<(), LoadError> {
        Ok(())
    }

    fn values(&mut self, _: &[f32]) -> Result<(), LoadError> {
        Ok(())
    }

    fn experts(&mut self, _: &ExpertsSource) -> Result<UpDown<()>, LoadError> {
        Ok(UpDown { up: (), down: () })
    }

    fn absorbed(&mut self, _: &str, _: [usize; 4]) -> Result<[(); 2], LoadError> {
        Ok([(), ()])
    }
}
