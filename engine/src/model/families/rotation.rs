//! Rotary positions in `config.json`.

use super::config::{Config, MAX_POSITIONS, Rotation};
use crate::{
    error::LoadError,
    model::{
        fields::Fields,
        rope::{RopeScaling, RopeSpec},
    },
};

impl Config<'_> {
    /// The model's rotary positions, in either dialect.
    pub fn rope(&self, rotation: &Rotation) -> Result<RopeSpec, LoadError> {
        let fields = &self.fields;
        let theta = match (fields.positive("rope_theta")?, rotation.is_neox) {
            (None, true) => fields.positive("rotary_emb_base")?,
            (theta, _) => theta,
        };
        let read = |name: &'static str| match fields.object(name)? {
            // An empty object says as little as null.
            Some(object) if object.names().next().is_some() => {
                refuse_nested(&object)?;
                self.read_rope(&object, theta, rotation).map(Some)
            }
            _ => Ok(None),
        };
        match (read("rope_parameters")?, read("rope_scaling")?) {
            (Some(new), Some(old)) if new != old => {
                Err(fields.bad("rope_scaling", "contradicts rope_parameters; keep one of them"))
            }
            (Some(rope), _) | (None, Some(rope)) => Ok(rope),
            (None, None) => self.rope_of_base(theta, rotation),
        }
    }

    /// Rotary positions of which nothing is said but their base, if that.
    pub fn rope_of_base(&self, theta: Option<f64>, rotation: &Rotation) -> Result<RopeSpec, LoadError> {
        Ok(RopeSpec {
            dim: self.rotary_dim(None, rotation)?,
            is_interleaved: rotation.is_interleaved,
            theta: theta.unwrap_or(rotation.theta),
            scaling: RopeScaling::Default,
        })
    }

    /// Reads an object of rotary positions; `top_theta` is the base that stands beside it.
    pub fn read_rope(
        &self,
        rope: &Fields<'_>,
        top_theta: Option<f64>,
        rotation: &Rotation,
    ) -> Result<RopeSpec, LoadError> {
        let dim = self.rotary_dim(Some(rope), rotation)?;
        let theta = match (rope.positive("rope_theta")?, top_theta) {
            (Some(inner), Some(outer)) if inner != outer => {
                return Err(
                    rope.bad("rope_theta", format!("is {inner}, but the top-level rope_theta is {outer}"))
                );
            }
            (inner, outer) => inner.or(outer).unwrap_or(rotation.theta),
        };
        let kind = match (rope.string("rope_type")?, rope.string("type")?) {
            (Some(new), Some(old)) if new != old => {
                return Err(rope.bad("rope_type", format!("is {new:?}, but type is {old:?}")));
            }
            (new, old) => new.or(old).unwrap_or("default"),
        };
        let original = || self.original_positions(rope, rotation);
        let scaling = match kind {
            "default" => match rope.number("factor")? {
                Some(factor) if factor != 1.0 => {
                    return Err(
                        rope.bad("factor", format!("is {factor}, but rope_type is \"default\" or absent"))
                    );
                }
                _ => RopeScaling::Default,
            },
            "longrope" => long_rope(rope, (original()?, rotation.max_positions), dim)?,
            "su" | "yarn" if rotation.is_phi => long_rope(rope, (original()?, rotation.max_positions), dim)?,
            "linear" if !rotation.is_phi => RopeScaling::Linear { factor: rope.required_positive("factor")? },
            "llama3" if !rotation.is_phi => llama3(rope, original()?)?,
            "yarn" => yarn(rope, original()?, theta)?,
            other => {
                let known = match rotation.is_phi {
                    true => "default, longrope",
                    false => "default, linear, llama3, yarn, longrope",
                };
                return Err(rope.unsupported("rope_type", format!("is {other:?}; supported: {known}")));
            }
        };
        Ok(RopeSpec { dim, is_interleaved: rotation.is_interleaved, theta, scaling })
    }

    /// R, from the object of rotary positions or from the top level.
    fn rotary_dim(&self, rope: Option<&Fields<'_>>, rotation: &Rotation) -> Result<usize, LoadError> {
        let inner = rope.map(|rope| rope.number("partial_rotary_factor")).transpose()?.flatten();
        let mut outer = self.fields.number("partial_rotary_factor")?;
        if rotation.is_neox && outer.is_none() {
            outer = self.fields.number("rotary_pct")?;
        }
        let factor = inner.or(outer).or(rotation.partial).unwrap_or(1.0);
        let bad = |detail: String| match (inner, rope) {
            (Some(_), Some(rope)) => rope.unsupported("partial_rotary_factor", detail),
            _ => self.fields.unsupported("partial_rotary_factor", detail),
        };
        if rotation.partial.is_none() && factor != 1.0 {
            return Err(bad(format!("is {factor}; supported: 1")));
        }
        if !(factor > 0.0 && factor <= 1.0) {
            return Err(bad(format!("is {factor}, not in (0, 1]")));
        }
        let dim = (rotation.head_dim as f64 * factor) as usize;
        if dim == 0 || !dim.is_multiple_of(2) {
            if factor == 1.0 {
                let detail = format!("is {dim}; rotary embeddings need an even one");
                return Err(self.fields.bad("head_dim", detail));
            }
            return Err(bad(format!("makes {dim} rotated elements; rotary embeddings need an even number")));
        }
        Ok(dim)
    }

    /// `standardize_rope_params` of transformers: the top-level field wins, then the rope object's, then the full context.
    fn original_positions(&self, rope: &Fields<'_>, rotation: &Rotation) -> Result<usize, LoadError> {
        let field = "original_max_position_embeddings";
        Ok(match self.fields.count(field, MAX_POSITIONS)? {
            Some(positions) => positions,
            None if rotation.is_phi => 4096,
            None => rope.count(field, MAX_POSITIONS)?.unwrap_or(rotation.max_positions),
        })
    }
}

/// Objects for kinds of layers within an object: what it would mean to ignore them is not known.
fn refuse_nested(rope: &Fields<'_>) -> Result<(), LoadError> {
    match rope.names().find(|name| rope.is_object(name)) {
        Some(name) => {
            Err(rope
                .unsupported(name, "is an object; this class has the same rotary positions in all layers"))
        }
        None => Ok(()),
    }
}

fn llama3(rope: &Fields<'_>, original: usize) -> Result<RopeScaling, LoadError> {
    let low_freq_factor = rope.required_positive("low_freq_factor")?;
    let high_freq_factor = rope.required_positive("high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        return Err(rope.bad("high_freq_factor", format!("must be over low_freq_factor ({low_freq_factor})")));
    }
    Ok(RopeScaling::Llama3 {
        factor: rope.required_positive("factor")?,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings: original,
    })
}

/// What scores are divided by at a scaling of `factor` (arXiv 2309.00071, section 3.4; with a weight: DeepSeek-V2's reference code).
pub(super) fn yarn_scale(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}

fn yarn(rope: &Fields<'_>, original: usize, theta: f64) -> Result<RopeScaling, LoadError> {
    let factor = rope.required_positive("factor")?;
    // As the reference reads them: a zero counts as absent.
    let given = |field: &str| Ok::<_, LoadError>(rope.number(field)?.filter(|value| *value != 0.0));
    let (mscale, mscale_all_dim) = (given("mscale")?, given("mscale_all_dim")?);
    let (beta_fast, beta_slow) = (given("beta_fast")?.unwrap_or(32.0), given("beta_slow")?.unwrap_or(1.0));
    if !(beta_slow > 0.0 && beta_fast >= beta_slow) {
        return Err(rope.bad(
            "beta_fast",
            format!("({beta_fast}) and beta_slow ({beta_slow}) must be over 0 and in order"),
        ));
    }
    if theta <= 1.0 {
        return Err(rope.bad("rope_theta", format!("is {theta}; yarn needs one over 1")));
    }
    let inferred = match (mscale, mscale_all_dim) {
        (Some(mscale), Some(all_dim)) => yarn_scale(factor, mscale) / yarn_scale(factor, all_dim),
        _ => yarn_scale(factor, 1.0),
    };
    let attention_factor = rope.positive("attention_factor")?.unwrap_or(inferred);
    if !(attention_factor.is_finite() && attention_factor > 0.0) {
        return Err(rope.bad("mscale_all_dim", "makes an attention factor that is not a number over 0"));
    }
    Ok(RopeScaling::Yarn {
        factor,
        attention_factor,
        beta_fast,
        beta_slow,
        original_max_position_embeddings: original,
        truncate: rope.boolean("truncate")?.unwrap_or(true),
    })
}

fn long_rope(
    rope: &Fields<'_>,
    (original, max_positions): (usize, usize),
    dim: usize,
) -> Result<RopeScaling, LoadError> {
    let factors = |field: &str| {
        let factors = rope.positives(field)?.ok_or_else(|| rope.bad(field, "is missing"))?;
        if factors.len() != dim / 2 {
            let detail = format!("has {} factors, but {} are needed", factors.len(), dim / 2);
            return Err(rope.bad(field, detail));
        }
        Ok(factors)
    };
    let factor = rope.positive("factor")?.unwrap_or(max_positions as f64 / original as f64);
    // arXiv 2402.13753, as in the reference code of Phi-3.
    let inferred = match factor <= 1.0 {
        true => 1.0,
        false => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
    };
    let attention_factor = rope.positive("attention_factor")?.unwrap_or(inferred);
    if !attention_factor.is_finite() {
        let field = "original_max_position_embeddings";
        return Err(rope.bad(field, format!("is {original}, which makes an infinite attention factor")));
    }
    Ok(RopeScaling::LongRope {
        short_factor: factors("short_factor")?,
        long_factor: factors("long_factor")?,
        attention_factor,
        original_max_position_embeddings: original,
    })
}
