//! Low-rank adapters (Hu et al. 2021, LoRA): which matrices they may change, and their files.

mod config;
mod load;
mod sites;

pub use self::{
    load::load,
    sites::{Part, SITES, Site, SiteSpec, Sites},
};
use tidemill_kernels::ops::LoraPart;

/// An adapter's matrices: for each layer and [`Site`] those of its parts; `None` where it leaves a part, or the whole site, as it is.
#[derive(Debug)]
pub struct LoraWeights {
    /// One for each layer.
    pub layers: Vec<[Option<Vec<Option<LoraPart>>>; SITES]>,
}
