//! Adapters of a decoder's matrices.

use tidemill_kernels::{KernelError, Ops};

use super::{Decoder, layer::Step};
use crate::model::{
    lora::{LoraWeights, SITES, Site, Sites},
    spec::MlpSpec,
};

/// Adapters of the matrices of one layer, by [`Site`].
pub(super) type LoraLayer<O> = [Option<Adapted<O>>; SITES];

/// Adapters of one matrix.
pub(super) struct Adapted<O: Ops> {
    lora: O::Lora,
    /// How many parts the matrix stacks.
    parts: usize,
}

impl<O: Ops> Decoder<O> {
    /// Allocates room for `slots` adapters of up to `max_rank`.
    ///
    /// # Errors
    /// What the device returned.
    pub fn allocate_lora(&mut self, slots: usize, max_rank: usize) -> Result<(), KernelError> {
        let sites = Sites::of(&self.spec);
        let mut layers = Vec::with_capacity(sites.layers.len());
        for sites in &sites.layers {
            let mut layer: LoraLayer<O> = [const { None }; SITES];
            for (adapted, site) in layer.iter_mut().zip(sites) {
                let Some(site) = site else { continue };
                let lora = self.ops.lora(&site.shape(slots, max_rank))?;
                *adapted = Some(Adapted { lora, parts: site.parts.len() });
            }
            layers.push(layer);
        }
        let width = |mlp: &MlpSpec| if let MlpSpec::Dense(dense) = mlp { dense.width } else { 0 };
        let widest = self.spec.layers.iter().map(|layer| width(&layer.mlp)).max().unwrap_or(0);
        self.scratch.adapted = Some(self.ops.buffer(self.limits.max_num_batched_tokens * 2 * widest)?);
        self.lora = Some(layers);
        Ok(())
    }

    /// Puts an adapter of this model into a slot, behind the steps that are queued.
    ///
    /// # Errors
    /// What the device returned; the slot may then hold anything.
    pub fn set_adapter(&mut self, slot: usize, weights: &LoraWeights) -> Result<(), KernelError> {
        let Some(layers) = &mut self.lora else {
            let detail = "there is no room for adapters; start with --enable-lora".to_owned();
            return Err(KernelError::Unsupported { op: "set_adapter", detail });
        };
        for (layer, weights) in layers.iter_mut().zip(&weights.layers) {
            for (adapted, parts) in layer.iter_mut().zip(weights) {
                let Some(Adapted { lora, parts: count }) = adapted else { continue };
                // Where an adapter leaves a matrix as it is, what was in the slot before must go.
                let none = vec![None; *count];
                self.ops.set_lora(lora, slot, parts.as_deref().unwrap_or(&none))?;
            }
        }
        Ok(())
    }
}

impl<O: Ops> Step<'_, O> {
    /// The adapters of a matrix, in a step that has any.
    pub(super) fn site(&self, index: usize, site: Site) -> Option<&O::Lora> {
        self.lora?[index][site as usize].as_ref().map(|adapted| &adapted.lora)
    }

    /// Adds to the product `out` of a matrix with `x` what adapters make of it.
    pub(super) fn adapt(
        &self,
        out: &mut O::Buffer,
        x: &O::Buffer,
        (index, site): (usize, Site),
    ) -> Result<(), KernelError> {
        match self.site(index, site) {
            Some(lora) => self.ops.lora_add(out, x, lora, self.batch),
            None => Ok(()),
        }
    }
}
