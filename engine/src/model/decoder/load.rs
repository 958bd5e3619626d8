//! From a checkpoint's tensors to weights on a device.

use std::marker::PhantomData;

use bytes::Bytes;
use tidemill_kernels::{
    Ops,
    tensor::{ExpertParts, HostMatrix, HostTensor},
};

use super::rows::{self, take_rows, transposed};
use crate::{
    error::LoadError,
    model::{
        checkpoint::Tensors,
        parts::{Change, ExpertsSource, Linear, Maker, StackedExperts, Stage, UpDown},
    },
};

/// Loads parts onto a device.
pub(super) struct Loader<'a, O> {
    pub ops: &'a O,
    pub tensors: &'a dyn Tensors,
}

impl<O: Ops> Loader<'_, O> {
    /// The parts of a matrix and their biases, as the checkpoint has them.
    fn parts(&self, linear: &Linear) -> Result<ExpertParts, LoadError> {
        let mut all = ExpertParts { parts: Vec::new(), bias: Vec::new() };
        for part in &linear.parts {
            let matrix = match part.is_transposed {
                true => {
                    let name = format!("{}.weight", part.name);
                    HostMatrix::Dense(transposed(&self.tensors.tensor(&name, &part.stored_shape())?))
                }
                false => self.tensors.matrix(&part.name, part.shape)?,
            };
            let bias = match linear.bias {
                true => Some(self.tensors.tensor(&format!("{}.bias", part.name), &part.shape[..1])?),
                false => None,
            };
            match &part.rows {
                None => {
                    all.parts.push(matrix);
                    all.bias.extend(bias);
                }
                Some(ranges) => {
                    all.parts.push(take_rows(&matrix, ranges)?);
                    all.bias.extend(bias.map(|bias| rows::take_elements(&bias, ranges)));
                }
            }
        }
        Ok(all)
    }

    /// All experts of a stacked checkpoint.
    fn stacked(&self, s: &StackedExperts) -> Result<UpDown<Vec<ExpertParts>>, LoadError> {
        let up = self.tensors.experts(&s.gate_up, [s.experts, 2 * s.width, s.hidden])?;
        let down = self.tensors.experts(&s.down, [s.experts, s.hidden, s.width])?;
        let bias = |name: &str, len: usize| self.tensors.tensor(&format!("{name}_bias"), &[s.experts, len]);
        let (up_bias, down_bias) = (bias(&s.gate_up, 2 * s.width)?, bias(&s.down, s.hidden)?);
        // Rows of gate and up alternate.
        let halves = |first: usize| (first..2 * s.width).step_by(2).map(|row| row..row + 1);
        let in_halves: Vec<_> = halves(0).chain(halves(1)).collect();
        let expert =
            |matrix: HostMatrix, bias: HostTensor| ExpertParts { parts: vec![matrix], bias: vec![bias] };
        let up = up.iter().enumerate().map(|(x, matrix)| {
            let bias = rows::take_elements(&rows::slice(&up_bias, x), &in_halves);
            Ok(expert(take_rows(matrix, &in_halves)?, bias))
        });
        let down = down.into_iter().enumerate().map(|(x, matrix)| expert(matrix, rows::slice(&down_bias, x)));
        Ok(UpDown { up: up.collect::<Result<_, LoadError>>()?, down: down.collect() })
    }
}

/// Parts that lie on a device.
pub(super) struct OnDevice<O>(PhantomData<O>);

impl<O: Ops> Stage for OnDevice<O> {
    type Weight = O::Weight;
    type Vector = O::Vector;
    type Experts = O::Experts;
}

impl<O: Ops> Maker for Loader<'_, O> {
    type Made = OnDevice<O>;

    fn table(&mut self, name: &str, shape: [usize; 2]) -> Result<O::Weight, LoadError> {
        Ok(self.ops.table(&self.tensors.matrix(name, shape)?)?)
    }

    fn linear(&mut self, linear: &Linear) -> Result<O::Weight, LoadError> {
        let ExpertParts { parts, bias } = self.parts(linear)?;
        Ok(self.ops.weight(&parts, &bias)?)
    }

    fn vector(&mut self, name: &str, shape: &[usize], change: Change) -> Result<O::Vector, LoadError> {
        let values = self.tensors.tensor(name, shape)?.to_f32();
        let values: Vec<f32> = values.iter().map(|x| (x + change.plus) * change.times).collect();
        Ok(self.ops.vector(&values)?)
    }

    fn values(&mut self, values: &[f32]) -> Result<O::Vector, LoadError> {
        Ok(self.ops.vector(values)?)
    }

    fn experts(&mut self, source: &ExpertsSource) -> Result<UpDown<O::Experts>, LoadError> {
        let host = match source {
            ExpertsSource::Each(experts) => {
                let of = |half: fn(&UpDown<Linear>) -> &Linear| {
                    experts.iter().map(|expert| self.parts(half(expert))).collect::<Result<Vec<_>, _>>()
                };
                UpDown { up: of(|expert| &expert.up)?, down: of(|expert| &expert.down)? }
            }
            ExpertsSource::Stacked(stacked) => self.stacked(stacked)?,
        };
        Ok(UpDown { up: self.ops.experts(&host.up)?, down: self.ops.experts(&host.down)? })
    }

    fn absorbed(&mut self, name: &str, heads: [usize; 4]) -> Result<[O::Experts; 2], LoadError> {
        let [count, nope, value, latent] = heads;
        let head = nope + value;
        let matrix = rows::dense(self.tensors.matrix(name, [count * head, latent])?)?;
        let part = |tensor: HostTensor| ExpertParts { parts: vec![tensor.into()], bias: Vec::new() };
        let cut = |first: usize, len: usize| {
            let bytes = latent * matrix.dtype.size();
            let data: Bytes = matrix.data.slice(first * bytes..(first + len) * bytes);
            HostTensor { name: matrix.name.clone(), dtype: matrix.dtype, shape: vec![len, latent], data }
        };
        let keys: Vec<_> = (0..count).map(|h| part(transposed(&cut(h * head, nope)))).collect();
        let values: Vec<_> = (0..count).map(|h| part(cut(h * head + nope, value))).collect();
        Ok([self.ops.experts(&keys)?, self.ops.experts(&values)?])
    }
}
