//! A layer's feed-forward block, added to the residual stream.

use tidemill_kernels::{KernelError, Ops, ops::Epilogue};

use super::{
    OnDevice,
    layer::{Input, Step, held_back},
    scratch::Scratch,
};
use crate::model::{
    parts::{Dense, Layer, Mlp, Moe, NormWeights},
    spec::{DenseSpec, LayerSpec, MlpSpec, MoeSpec},
};

impl<O: Ops> Step<'_, O> {
    /// Adds the feed-forward block of `input` to the stream.
    pub(super) fn mlp(
        &self,
        s: &mut Scratch<O>,
        layer: &Layer<OnDevice<O>>,
        spec: &LayerSpec,
        input: Input,
    ) -> Result<(), KernelError> {
        match (&layer.mlp, &spec.mlp) {
            (Mlp::Dense(weights), MlpSpec::Dense(dense)) => {
                self.inner(s, weights, dense, input)?;
                self.outer(s, weights, held_back(spec, layer.after_mlp.as_ref()))
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
        input: Input,
    ) -> Result<(), KernelError> {
        let x = input.pick(&s.hidden, &s.normed, &s.second_normed);
        let (ops, tokens, activation) = (self.ops, self.tokens, spec.activation);
        if spec.is_gated {
            ops.linear_gated(&mut s.mlp, &mut s.gate_up, x, &weights.up, tokens, activation)
        } else {
            ops.linear(&mut s.mlp, x, &weights.up, tokens, Epilogue::Activate(activation))
        }
    }

    /// Adds what `mlp` becomes to the stream, normalised before if there is a norm.
    fn outer(
        &self,
        s: &mut Scratch<O>,
        weights: &Dense<OnDevice<O>>,
        norm: Option<&NormWeights<O::Vector>>,
    ) -> Result<(), KernelError> {
        let (ops, tokens) = (self.ops, self.tokens);
        let Some(norm) = norm else {
            return ops.linear(&mut s.hidden, &s.mlp, &weights.down, tokens, Epilogue::Add);
        };
        ops.linear(&mut s.block, &s.mlp, &weights.down, tokens, Epilogue::Store)?;
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
        self.inner(s, &shared.dense, &shared_spec.dense, input)?;
        let Some(gate) = &shared.gate else { return self.outer(s, &shared.dense, None) };
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
