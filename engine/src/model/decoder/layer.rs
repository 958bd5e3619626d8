//! A layer of a step: two blocks, their norms, and how they are added.

use tidemill_kernels::{KernelError, Ops, ops::Epilogue};

use super::{OnDevice, lora::LoraLayer, scratch::Scratch};
use crate::model::{
    lora::Site,
    parts::{Layer, NormWeights},
    spec::{AfterNorm, LayerSpec, ModelSpec},
};

/// What the ops of a step have in common.
pub(super) struct Step<'a, O: Ops> {
    pub ops: &'a O,
    pub spec: &'a ModelSpec,
    pub ropes: &'a [O::Vector],
    pub alibi: Option<&'a O::Vector>,
    pub batch: &'a O::Batch,
    /// T.
    pub tokens: usize,
    /// One for each layer, in a step that has adapters.
    pub lora: Option<&'a [LoraLayer<O>]>,
}

/// Which activation a block reads.
#[derive(Debug, Clone, Copy)]
pub(super) enum Input {
    /// The residual stream as it is.
    Stream,
    /// What was normalised for this block.
    Normed,
    /// What was normalised for the second of two parallel blocks.
    Second,
}

impl Input {
    /// The buffer, of those that are borrowed one by one: the others of the scratch are written to meanwhile.
    pub fn pick<'a, B>(self, hidden: &'a B, normed: &'a B, second: &'a B) -> &'a B {
        match self {
            Self::Stream => hidden,
            Self::Normed => normed,
            Self::Second => second,
        }
    }
}

impl<O: Ops> Step<'_, O> {
    /// Layer `index`: reads and writes the residual stream.
    pub fn layer(
        &self,
        s: &mut Scratch<O>,
        kv: &mut O::KvCache,
        layer: &Layer<OnDevice<O>>,
        index: usize,
    ) -> Result<(), KernelError> {
        let spec = &self.spec.layers[index];
        let input = self.normed(s, layer.before_attention.as_ref())?;
        // Parallel blocks read the stream before either is added to it.
        let second = match &layer.before_mlp {
            Some(norm) if spec.is_parallel => {
                self.ops.norm(&mut s.second_normed, &s.hidden, norm.of(&self.spec.norm), self.tokens)?;
                Some(Input::Second)
            }
            None if spec.is_parallel => Some(input),
            _ => None,
        };
        self.attention(s, kv, layer, (index, input))?;
        match held_back(spec, layer.after_attention.as_ref()) {
            None => {
                self.ops.linear(&mut s.hidden, &s.attention, &layer.o_proj, self.tokens, Epilogue::Add)?;
                self.adapt(&mut s.hidden, &s.attention, (index, Site::Output))?;
            }
            Some(norm) => {
                self.ops.linear(&mut s.block, &s.attention, &layer.o_proj, self.tokens, Epilogue::Store)?;
                self.adapt(&mut s.block, &s.attention, (index, Site::Output))?;
                self.ops.norm_add(&mut s.hidden, &s.block, norm.of(&self.spec.norm), self.tokens)?;
            }
        }
        self.settle(s, spec, layer.after_attention.as_ref())?;
        let input = match second {
            Some(second) => second,
            None => self.normed(s, layer.before_mlp.as_ref())?,
        };
        self.mlp(s, layer, (index, input))?;
        self.settle(s, spec, layer.after_mlp.as_ref())
    }

    /// Normalises the stream for a block, if it wants that.
    fn normed(
        &self,
        s: &mut Scratch<O>,
        norm: Option<&NormWeights<O::Vector>>,
    ) -> Result<Input, KernelError> {
        let Some(norm) = norm else { return Ok(Input::Stream) };
        self.ops.norm(&mut s.normed, &s.hidden, norm.of(&self.spec.norm), self.tokens)?;
        Ok(Input::Normed)
    }

    /// Normalises the stream itself after a block, if that is where the norm is.
    fn settle(
        &self,
        s: &mut Scratch<O>,
        spec: &LayerSpec,
        norm: Option<&NormWeights<O::Vector>>,
    ) -> Result<(), KernelError> {
        match norm.filter(|_| spec.norms.after == AfterNorm::Stream) {
            Some(norm) => self.norm_in_place(&mut s.hidden, norm),
            None => Ok(()),
        }
    }
}

/// The norm of a block's result before it is added, where there is one.
pub(super) fn held_back<'a, V>(
    spec: &LayerSpec,
    norm: Option<&'a NormWeights<V>>,
) -> Option<&'a NormWeights<V>> {
    norm.filter(|_| spec.norms.after == AfterNorm::Block)
}
