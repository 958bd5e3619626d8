//! A layer's feed-forward block, added to the residual stream.

use tidemill_kernels::{KernelError, Ops, ops::Epilogue};

use super::{
    OnDevice,
    layer::{Input, Step, held_back},
    scratch::Scratch,
};
use crate::model::{
    lora::Site,
    parts::{Dense, Layer, Mlp, Moe, NormWeights},
    spec::{DenseSpec, LayerSpec, MlpSpec, MoeSpec},
};

impl<O: Ops> Step<'_, O> {
    /// Adds the feed-forward block of `input` to the stream.
    pub(super) fn mlp(
        &self,
        s: &mut Scratch<O>,
        layer: &Layer<OnDevice<O>>,
        (index, input): (usize, Input),
    ) -> Result<(), KernelError> {
        let spec: &LayerSpec = &self.spec.layers[index];
        match (&layer.mlp, &spec.mlp) {
            (Mlp::Dense(weights), MlpSpec::Dense(dense)) => {
                self.inner(s, weights, dense, (input, self.site(index, Site::Up)))?;
                self.outer(s, weights, held_back(spec, layer.after_mlp.as_ref()), Some(index))
            }
            (Mlp::Moe(weights), MlpSpec::Moe(moe)) => self.moe(s, weights, moe, input),
            _ => unreachable!("layers are made of their own specification"),
        }
    }

    /// Fills `mlp`.
    fn inner(
        &self,
        s: &mut Scratch<O>,
        weights: &Dense<OnDevice<O>>,
        spec: &DenseSpec,
        (input, lora): (Input, Option<&O::Lora>),
    ) -> Result<(), KernelError> {
        let x = input.pick(&s.hidden, &s.normed, &s.second_normed);
        let (ops, tokens, activation) = (self.ops, self.tokens, spec.activation);
        if let (Some(lora), Some(scratch)) = (lora, &mut s.adapted) {
            ops.lora_gated(&mut s.mlp, scratch, x, &weights.up, lora, self.batch, activation)
        } else if spec.is_gated {
            ops.linear_gated(&mut s.mlp, &mut s.gate_up, x, &weights.up, tokens, activation)
        } else {
            ops.linear(&mut s.mlp, x, &weights.up, tokens, Epilogue::Activate(activation))
        }
    }

    /// Adds what `mlp` becomes to the stream, normalised before if there is a norm; with the adapters of layer `adapted`.
    fn outer(
        &self,
        s: &mut Scratch<O>,
        weights: &Dense<OnDevice<O>>,
        norm: Option<&NormWeights<O::Vector>>,
        adapted: Option<usize>,
    ) -> Result<(), KernelError> {
        let (ops, tokens) = (self.ops, self.tokens);
        let adapt = |out: &mut O::Buffer, x: &O::Buffer| match adapted {
            Some(index) => self.adapt(out, x, (index, Site::Down)),
            None => Ok(()),
        };
        let Some(norm) = norm else {
            ops.linear(&mut s.hidden, &s.mlp, &weights.down, tokens, Epilogue::Add)?;
            return adapt(&mut s.hidden, &s.mlp);
        };
        ops.linear(&mut s.block, &s.mlp, &weights.down, tokens, Epilogue::Store)?;
        adapt(&mut s.block, &s.mlp)?;
        ops.norm_add(&mut s.hidden, &s.block, norm.of(&self.spec.norm), tokens)
    }

    fn moe(
        &self,
        s: &mut Scratch<O>,
        weights: &Moe<OnDevice<O>>,
        spec: &MoeSpec,
        input: Input,
    ) -> Result<(), KernelError> {
        let (ops, tokens, width) = (self.ops, self.tokens, self.spec.hidden_size);
        let Scratch { hidden, normed, second_normed, gate_up, mlp, moe, .. } = &mut *s;
        let m = moe.as_mut().expect("scratch is made of the same specification as the layers");
        let x = input.pick(hidden, normed, second_normed);
        ops.linear(&mut m.logits, x, &weights.router, tokens, Epilogue::Store)?;
        ops.moe_route(&mut m.routes, &m.logits, weights.choice_bias.as_ref(), &spec.routing, tokens)?;
        ops.moe_gated(mlp, gate_up, x, &weights.experts.up, &m.routes, tokens, spec.activation)?;
        ops.moe_combine(hidden, &mut m.combine, mlp, &weights.experts.down, &m.routes, tokens)?;
        let (Some(shared), Some(shared_spec)) = (&weights.shared, &spec.shared) else { return Ok(()) };
        self.inner(s, &shared.dense, &shared_spec.dense, (input, None))?;
        let Some(gate) = &shared.gate else { return self.outer(s, &shared.dense, None, None) };
        ops.linear(&mut s.block, &s.mlp, &shared.dense.down, tokens, Epilogue::Store)?;
        let Scratch { hidden, normed, second_normed, block, moe, .. } = s;
        let m = moe.as_mut().expect("it was there above");
        ops.linear(
            &mut m.shared_gate,
            input.pick(hidden, normed, second_normed),
            gate,
            tokens,
            Epilogue::Store,
        )?;
        ops.add_gated(hidden, block, &m.shared_gate, tokens, width)
    }
}
