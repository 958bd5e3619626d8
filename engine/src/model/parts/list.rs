//! The tensors that a model takes from its checkpoint.

use std::collections::HashSet;

use super::{Change, ExpertsSource, Layer, Linear, Maker, Model, Stage, UpDown, source::StackedExperts};
use crate::{
    error::LoadError,
    model::spec::{ModelSpec, TensorKind, TensorSpec},
};

/// Every tensor that a model of this specification is made of, once, in the order in which they are loaded.
pub(crate) fn list(spec: &ModelSpec) -> Vec<TensorSpec> {
    let mut list = List::default();
    // A list fails nowhere: no tensor is touched.
    let noted = (0..spec.layers.len())
        .try_for_each(|index| Layer::make(&mut list, spec, index).map(drop))
        .and_then(|()| Model::make(&mut list, spec).map(drop));
    debug_assert!(noted.is_ok());
    list.tensors
}

#[derive(Default)]
struct List {
    tensors: Vec<TensorSpec>,
    seen: HashSet<String>,
}

impl List {
    fn add(&mut self, name: String, shape: &[usize], kind: TensorKind) {
        if self.seen.insert(name.clone()) {
            self.tensors.push(TensorSpec { name, shape: shape.to_vec(), kind });
        }
    }

    fn stacked(&mut self, s: &StackedExperts) {
        for (name, shape) in [(&s.gate_up, [s.hidden, 2 * s.width]), (&s.down, [s.width, s.hidden])] {
            self.add(name.clone(), &[s.experts, shape[0], shape[1]], TensorKind::Experts);
            self.add(format!("{name}_bias"), &[s.experts, shape[1]], TensorKind::Plain);
        }
    }
}

impl Stage for List {
    type Weight = ();
    type Vector = ();
    type Experts = ();
}

impl Maker for List {
    type Made = Self;

    fn table(&mut self, name: &str, shape: [usize; 2]) -> Result<(), LoadError> {
        self.add(format!("{name}.weight"), &shape, TensorKind::Matrix);
        Ok(())
    }

    fn linear(&mut self, linear: &Linear) -> Result<(), LoadError> {
        for part in &linear.parts {
            let kind = if part.is_transposed { TensorKind::Plain } else { TensorKind::Matrix };
            self.add(format!("{}.weight", part.name), &part.stored_shape(), kind);
            if linear.bias {
                self.add(format!("{}.bias", part.name), &part.shape[..1], TensorKind::Plain);
            }
        }
        Ok(())
    }

    fn vector(&mut self, name: &str, shape: &[usize], _: Change) -> Result<(), LoadError> {
        self.add(name.to_owned(), shape, TensorKind::Plain);
        Ok(())
    }

    fn values(&mut self, _: &[f32]) -> Result<(), LoadError> {
        Ok(())
    }

    fn experts(&mut self, source: &ExpertsSource) -> Result<UpDown<()>, LoadError> {
        match source {
            ExpertsSource::Each(experts) => {
                for expert in experts {
                    self.linear(&expert.up)?;
                    self.linear(&expert.down)?;
                }
            }
            ExpertsSource::Stacked(stacked) => self.stacked(stacked),
        }
        Ok(UpDown { up: (), down: () })
    }

    fn absorbed(
        &mut self,
        name: &str,
        [heads, nope, value, latent]: [usize; 4],
    ) -> Result<[(); 2], LoadError> {
        self.add(format!("{name}.weight"), &[heads * (nope + value), latent], TensorKind::Matrix);
        Ok([(), ()])
    }
}
