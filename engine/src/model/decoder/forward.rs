//! A step through all layers.

use std::ops::Range;

use tidemill_kernels::{
    KernelError, Ops,
    ops::{Epilogue, Lookup, Norm, Slices},
};

use super::{Decoder, KV_FIRST, layer::Step, scratch::Scratch};
use crate::model::{
    parts::NormWeights,
    spec::{NormKind, NormSpec},
};

impl<O: Ops> Decoder<O> {
    /// All layers, then the hidden states that are wanted as such, then the logits in groups of at most `max_logits_rows` rows, each handed
    /// to `each`.
    pub(super) fn forward(
        &mut self,
        batch: &O::Batch,
        mut each: impl FnMut(&O, &mut O::Buffer, Range<usize>) -> Result<(), KernelError> + Send,
    ) -> Result<(), KernelError> {
        let Self { ops, spec, model, layers, ropes, kv, lora, scratch, .. } = self;
        let (kv, _) = kv.as_mut().expect(KV_FIRST);
        let (ops, extent) = (&*ops, ops.extent(batch));
        let lora = lora.as_deref().filter(|_| ops.has_adapters(batch));
        let step = Step { ops, spec, ropes, alibi: model.alibi.as_ref(), batch, tokens: extent.tokens, lora };
        let epilogue = spec.logit_soft_cap.map_or(Epilogue::Store, Epilogue::SoftCap);
        let (width, logits_norm) = (spec.hidden_size, model.logits_norm.as_ref().or(model.norm.as_ref()));
        ops.run(batch, || {
            step.embed(scratch, model)?;
            for (index, layer) in layers.iter().enumerate() {
                step.layer(scratch, kv, layer, index)?;
            }
            if extent.state_rows > 0 {
                let rows = extent.logits_rows..extent.logits_rows + extent.state_rows;
                step.ended(scratch, model.norm.as_ref(), rows)?;
                ops.states(&scratch.normed, batch, width)?;
            }
            let head = model.lm_head.as_ref().unwrap_or(&model.embed_tokens);
            for first in (0..extent.logits_rows).step_by(ops.max_logits_rows()) {
                let rows = first..extent.logits_rows.min(first + ops.max_logits_rows());
                step.ended(scratch, logits_norm, rows.clone())?;
                ops.linear(&mut scratch.logits, &scratch.normed, head, rows.len(), epilogue)?;
                each(ops, &mut scratch.logits, rows)?;
            }
            Ok(())
        })
    }
}

impl<O: Ops> Step<'_, O> {
    /// The residual stream before the first layer.
    fn embed(
        &self,
        s: &mut Scratch<O>,
        model: &crate::model::parts::Model<super::OnDevice<O>>,
    ) -> Result<(), KernelError> {
        let Self { ops, spec, batch, .. } = *self;
        let scale = spec.embedding.scale;
        ops.embedding(&mut s.hidden, &model.embed_tokens, batch, Lookup::Tokens { scale })?;
        if let (Some(table), Some(positions)) = (&model.positions, spec.embedding.positions) {
            ops.embedding(&mut s.hidden, table, batch, Lookup::Positions { offset: positions.offset })?;
        }
        if let Some(table) = &model.segments {
            ops.embedding(&mut s.hidden, table, batch, Lookup::Segments)?;
        }
        match &model.embedding_norm {
            Some(norm) => self.norm_in_place(&mut s.hidden, norm),
            None => Ok(()),
        }
    }

    /// The states of these rows after the last norm, in `normed`.
    fn ended(
        &self,
        s: &mut Scratch<O>,
        norm: Option<&NormWeights<O::Vector>>,
        rows: Range<usize>,
    ) -> Result<(), KernelError> {
        let (ops, width, count) = (self.ops, self.spec.hidden_size, rows.len());
        match norm {
            Some(norm) => {
                ops.gather_rows(&mut s.gathered, &s.hidden, self.batch, rows, width)?;
                ops.norm(&mut s.normed, &s.gathered, norm.of(&self.spec.norm), count)
            }
            None => ops.gather_rows(&mut s.normed, &s.hidden, self.batch, rows, width),
        }
    }

    /// A norm of the residual stream itself.
    pub(super) fn norm_in_place(
        &self,
        hidden: &mut O::Buffer,
        norm: &NormWeights<O::Vector>,
    ) -> Result<(), KernelError> {
        let width = self.spec.hidden_size;
        let slices = Slices { rows: self.tokens, stride: width, offset: 0, groups: 1, width };
        self.ops.norm_slices(hidden, norm.of(&self.spec.norm), slices)
    }
}

impl<V> NormWeights<V> {
    /// The norm with these weights.
    pub(super) fn of(&self, spec: &NormSpec) -> Norm<'_, V> {
        let (weight, bias, eps) = (&self.weight, self.bias.as_ref(), spec.eps as f32);
        match spec.kind {
            NormKind::Rms => Norm::Rms { weight, eps },
            NormKind::Layer { .. } => Norm::Layer { weight, bias, eps },
        }
    }
}
