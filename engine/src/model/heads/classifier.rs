//! Heads of sequence classification, as transformers saves them with the model.

use super::{Fields, HeadLayer, LogitScore, ModelSpec, Tensors, linear, modules, no_answers};
use crate::{
    error::LoadError,
    info::PairFormat,
    pooling::{Head, HeadFunction, Pooling, Scorer},
    text::TextModel,
};

/// A head that gives one value for a prompt.
#[derive(Debug)]
pub(super) struct Classifier {
    pub pooling: Pooling,
    pub format: PairFormat,
    layers: Vec<Layer>,
    /// What a score is of its value.
    function: Option<HeadFunction>,
}

/// A layer by the names of its tensors.
#[derive(Debug, Clone, Copy)]
enum Layer {
    /// Of as many values as there are.
    Square {
        name: &'static str,
        bias: bool,
    },
    Function(HeadFunction),
    Norm {
        name: &'static str,
        bias: bool,
        eps: f64,
    },
    /// Of one value.
    Last {
        name: &'static str,
        bias: bool,
    },
}

impl Classifier {
    /// The head of a model for sequence classification; `None` for others.
    ///
    /// # Errors
    /// [`LoadError::Unsupported`] for one that has several labels, or a function that we lack.
    pub fn read(config: &Fields<'_>, _: &ModelSpec) -> Result<Option<Self>, LoadError> {
        use Layer::{Function, Last, Square};
        let tanh = Function(HeadFunction::Tanh);
        let (layers, pooling, format) = match architecture(config)? {
            "BertForSequenceClassification" => {
                let pooler = Square { name: "bert.pooler.dense", bias: true };
                (vec![pooler, tanh, Last { name: "classifier", bias: true }], Pooling::Cls, PairFormat::Pair)
            }
            "XLMRobertaForSequenceClassification" | "RobertaForSequenceClassification" => {
                let dense = Square { name: "classifier.dense", bias: true };
                let last = Last { name: "classifier.out_proj", bias: true };
                (vec![dense, tanh, last], Pooling::Cls, PairFormat::Pair)
            }
            "ModernBertForSequenceClassification" => modern_bert(config)?,
            "Qwen3ForSequenceClassification" => {
                (vec![Last { name: "score", bias: false }], Pooling::Last, PairFormat::YesNo)
            }
            _ => return Ok(None),
        };
        let labels = labels(config)?;
        if labels != 1 {
            let detail = format!(
                "say that there are {labels} labels; a model that scores pairs has 1, and classification is not supported"
            );
            return Err(config.unsupported("id2label", detail));
        }
        Ok(Some(Self { pooling, format, layers, function: score_function(config)? }))
    }

    pub fn load(&self, spec: &ModelSpec, tensors: &dyn Tensors) -> Result<Scorer, LoadError> {
        let hidden = spec.hidden_size;
        let load = |layer: &Layer| match *layer {
            Layer::Square { name, bias } => linear(tensors, name, [hidden, hidden], bias),
            Layer::Last { name, bias } => linear(tensors, name, [1, hidden], bias),
            Layer::Function(function) => Ok(HeadLayer::Function(function)),
            Layer::Norm { name, bias, eps } => {
                let vector =
                    |part| Ok::<_, LoadError>(tensors.tensor(&format!("{name}.{part}"), &[hidden])?.to_f32());
                let bias = if bias { vector("bias")? } else { Vec::new() };
                Ok(HeadLayer::LayerNorm { weight: vector("weight")?, bias, eps })
            }
        };
        let layers = self.layers.iter().map(load).collect::<Result<_, LoadError>>()?;
        Ok(Scorer { head: Head::new(layers), function: self.function })
    }
}

type Read = (Vec<Layer>, Pooling, PairFormat);

/// `ModernBertPredictionHead` and the classifier behind it.
fn modern_bert(config: &Fields<'_>) -> Result<Read, LoadError> {
    let pooling = match config.string("classifier_pooling")? {
        None | Some("cls") => Pooling::Cls,
        Some("mean") => Pooling::Mean,
        Some(other) => {
            return Err(config
                .unsupported("classifier_pooling", format!("is {other:?}; supported: \"cls\", \"mean\"")));
        }
    };
    let function = match config.string("classifier_activation")? {
        None | Some("gelu") => HeadFunction::Gelu,
        Some("relu") => HeadFunction::Relu,
        Some("silu") => HeadFunction::Silu,
        Some("tanh") => HeadFunction::Tanh,
        Some(other) => {
            let detail = format!("is {other:?}; supported: \"gelu\", \"relu\", \"silu\", \"tanh\"");
            return Err(config.unsupported("classifier_activation", detail));
        }
    };
    let flag = |field| Ok::<_, LoadError>(config.boolean(field)?.unwrap_or(false));
    let eps = config.positive("norm_eps")?.unwrap_or(1e-5);
    let layers = vec![
        Layer::Square { name: "head.dense", bias: flag("classifier_bias")? },
        Layer::Function(function),
        Layer::Norm { name: "head.norm", bias: flag("norm_bias")?, eps },
        Layer::Last { name: "classifier", bias: true },
    ];
    Ok((layers, pooling, PairFormat::Pair))
}

/// Labels, as transformers counts them: two where nothing is said.
fn labels(config: &Fields<'_>) -> Result<usize, LoadError> {
    match config.object("id2label")? {
        Some(labels) => Ok(labels.names().count()),
        None => Ok(config.count("num_labels", 1 << 20)?.unwrap_or(2)),
    }
}

/// The function that sentence-transformers applies to the one value of a cross-encoder.
fn score_function(config: &Fields<'_>) -> Result<Option<HeadFunction>, LoadError> {
    let sigmoid = Some(HeadFunction::Sigmoid);
    match config.object("sentence_transformers")? {
        Some(fields) => modules::function(&fields, "activation_fn", sigmoid),
        None => modules::function(config, "sbert_ce_default_activation_function", sigmoid),
    }
}

fn architecture<'a>(config: &Fields<'a>) -> Result<&'a str, LoadError> {
    Ok(config.strings("architectures")?.and_then(|names| names.first().copied()).unwrap_or(""))
}

/// Whether the model is of the family whose rerankers answer with yes or no.
pub(super) fn answers_yes_or_no(config: &Fields<'_>) -> Result<bool, LoadError> {
    Ok(architecture(config)? == "Qwen3ForCausalLM")
}

/// The tokens whose logits make a score, as a configuration may name them: the negative one first.
pub(super) fn answers(config: &Fields<'_>) -> Result<Option<[String; 2]>, LoadError> {
    match config.strings("classifier_from_token")?.as_deref() {
        None => Ok(None),
        Some([no, yes]) => Ok(Some([(*no).to_owned(), (*yes).to_owned()])),
        Some(_) => Err(config.bad("classifier_from_token", "must name two tokens, the negative one first")),
    }
}

/// The same by their ids.
pub(super) fn by_answers(answers: &[String; 2], text: &TextModel) -> Result<LogitScore, LoadError> {
    let id = |answer: &String| match text.encode(answer, false).as_deref() {
        Ok([id]) => Ok(*id),
        _ => Err(no_answers(&format!("{answer:?} is not one token of this model"))),
    };
    let [no, yes] = [id(&answers[0])?, id(&answers[1])?];
    Ok(LogitScore { yes, no: Some(no) })
}
