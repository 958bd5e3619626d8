//! What stands around a model that embeds or scores, read from its folder.
//!
//! `modules` reads what sentence-transformers lists, `classifier` the heads of sequence classification, `texts` what texts go through before. A folder
//! without any of it is a plain decoder: the last token's state, scaled to length 1, is its embedding.

mod classifier;
mod modules;
mod texts;

use tidemill_kernels::tensor::HostTensor;

use self::modules::{Dense, LogitScore, Modules, Step};
use super::{
    checkpoint::{Checkpoint, Tensors},
    fields::{Fields, parse_object},
    files::{CONFIG, ModelFiles},
    spec::ModelSpec,
};
use crate::{
    error::LoadError,
    heads::Heads,
    ids::TokenId,
    info::{EmbeddingInfo, PairFormat, ScoringInfo},
    pooling::{Head, HeadFunction, HeadLayer, Linear, Pooling, Scorer},
    text::TextModel,
};

/// What a folder says of embeddings and scores.
#[derive(Debug)]
pub struct HeadSpec {
    /// What embeddings are; of a model that scores and nothing else, what its states are.
    pub embedding: EmbeddingInfo,
    /// How pairs are scored, if they are.
    pub scoring: Option<ScoringInfo>,
    steps: Vec<Step>,
    scorer: Option<ScorerSpec>,
}

/// Where a score comes from.
#[derive(Debug)]
enum ScorerSpec {
    /// A head of sequence classification.
    Classifier(classifier::Classifier),
    /// Logits of the last token, by ids.
    Logits(LogitScore),
    /// The same by what the tokens are, `no` first.
    Answers([String; 2]),
}

impl HeadSpec {
    /// Reads `modules.json` and `config.json`. `answers` are the tokens whose logits make scores, the negative one first; absent: what the folder says.
    ///
    /// # Errors
    /// [`LoadError::Unsupported`] and [`LoadError::Format`], which name the file and the field; [`LoadError::Option`] for answers that the model cannot give.
    pub fn read(
        files: &ModelFiles,
        spec: &ModelSpec,
        answers: Option<&[String; 2]>,
    ) -> Result<Self, LoadError> {
        let path = files.path(CONFIG);
        let map = parse_object(&path, &files.require(CONFIG)?)?;
        let config = Fields::new(&path, &map);
        if let Some(classifier) = classifier::Classifier::read(&config, spec)? {
            if answers.is_some() {
                return Err(no_answers("the model has a head for scores of its own; leave this option out"));
            }
            return Ok(Self::of_classifier(classifier, spec));
        }
        let (pooling, normalize, steps, logits) = match modules::read(files, spec)? {
            None => (Pooling::Last, true, Vec::new(), None),
            Some(Modules::Embed { pooling, steps, normalize }) => (pooling, normalize, steps, None),
            Some(Modules::Score(logits)) => (Pooling::Last, true, Vec::new(), Some(logits)),
        };
        let named =
            answers.cloned().map_or_else(|| classifier::answers(&config), |answers| Ok(Some(answers)))?;
        let scorer = match (named, logits) {
            (Some(answers), _) => Some(ScorerSpec::Answers(answers)),
            (None, Some(logits)) => Some(ScorerSpec::Logits(logits)),
            (None, None) => None,
        };
        if scorer.is_some() && !classifier::answers_yes_or_no(&config)? {
            return Err(no_answers(
                "scores by tokens are computed for Qwen3ForCausalLM, whose rerankers were trained so",
            ));
        }
        let scoring =
            scorer.as_ref().map(|_| ScoringInfo { format: PairFormat::YesNo, is_only_output: false });
        let dimensions = steps.iter().rev().find_map(Step::outputs).unwrap_or(spec.hidden_size);
        let embedding = EmbeddingInfo { dimensions, pooling, normalize, is_only_output: spec.is_headless() };
        Ok(Self { embedding, scoring, steps, scorer })
    }

    fn of_classifier(classifier: classifier::Classifier, spec: &ModelSpec) -> Self {
        let (dimensions, pooling) = (spec.hidden_size, classifier.pooling);
        Self {
            embedding: EmbeddingInfo { dimensions, pooling, normalize: false, is_only_output: true },
            scoring: Some(ScoringInfo { format: classifier.format, is_only_output: true }),
            steps: Vec::new(),
            scorer: Some(ScorerSpec::Classifier(classifier)),
        }
    }

    /// Loads the weights, and the rules for texts.
    ///
    /// # Errors
    /// As [`HeadSpec::read`], and for tensors that are missing or have other shapes.
    pub fn load(
        &self,
        files: &ModelFiles,
        spec: &ModelSpec,
        tensors: &dyn Tensors,
        text: &TextModel,
    ) -> Result<Heads, LoadError> {
        let mut layers = Vec::new();
        let mut width = spec.hidden_size;
        for step in &self.steps {
            step.load(files, width, &mut layers)?;
            width = step.outputs().unwrap_or(width);
        }
        let scorer = match &self.scorer {
            None => None,
            Some(ScorerSpec::Classifier(classifier)) => Some(classifier.load(spec, tensors)?),
            Some(ScorerSpec::Logits(logits)) => Some(logits.load(spec, tensors)?),
            Some(ScorerSpec::Answers(answers)) => {
                Some(classifier::by_answers(answers, text)?.load(spec, tensors)?)
            }
        };
        Ok(Heads { embed: Head::new(layers), scorer, texts: texts::read(files, spec)? })
    }
}

/// What a folder says of its embeddings.
///
/// # Errors
/// As [`HeadSpec::read`].
pub fn embedding_info(files: &ModelFiles, spec: &ModelSpec) -> Result<EmbeddingInfo, LoadError> {
    Ok(HeadSpec::read(files, spec, None)?.embedding)
}

fn no_answers(detail: &str) -> LoadError {
    LoadError::Option { option: "--classifier-from-token", detail: detail.into() }
}

impl Step {
    /// Values that it gives, where that is its own choice.
    fn outputs(&self) -> Option<usize> {
        match self {
            Self::Dense(dense) => Some(dense.outputs),
            Self::LayerNorm(_) | Self::Normalize => None,
        }
    }

    fn load(&self, files: &ModelFiles, width: usize, layers: &mut Vec<HeadLayer>) -> Result<(), LoadError> {
        match self {
            Self::Normalize => layers.push(HeadLayer::Normalize),
            Self::LayerNorm(folder) => {
                let weights = Checkpoint::open_file(files, &format!("{folder}/{WEIGHTS}"))?;
                let vector = |name: &str| Ok::<_, LoadError>(weights.tensor(name, &[width])?.to_f32());
                let (weight, bias) = (vector("norm.weight")?, vector("norm.bias")?);
                // PyTorch's, which no configuration changes.
                layers.push(HeadLayer::LayerNorm { weight, bias, eps: 1e-5 });
            }
            Self::Dense(Dense { folder, inputs, outputs, bias, function }) => {
                let weights = Checkpoint::open_file(files, &format!("{folder}/{WEIGHTS}"))?;
                layers.push(linear(&weights, "linear", [*outputs, *inputs], *bias)?);
                layers.extend(function.map(HeadLayer::Function));
            }
        }
        Ok(())
    }
}

/// The weights of a module, in its folder.
const WEIGHTS: &str = "model.safetensors";

fn linear(
    tensors: &dyn Tensors,
    name: &str,
    [outputs, inputs]: [usize; 2],
    bias: bool,
) -> Result<HeadLayer, LoadError> {
    let weight = tensors.tensor(&format!("{name}.weight"), &[outputs, inputs])?.to_f32();
    let bias = match bias {
        true => tensors.tensor(&format!("{name}.bias"), &[outputs])?.to_f32(),
        false => Vec::new(),
    };
    Ok(HeadLayer::Linear(Linear { weight, bias, inputs }))
}

/// A token's row of the output matrix, whose ids were checked.
fn row(matrix: &HostTensor, token: TokenId) -> Vec<f32> {
    let bytes = matrix.data.len() / matrix.shape[0];
    let start = token.0 as usize * bytes;
    HostTensor { data: matrix.data.slice(start..start + bytes), ..matrix.clone() }.to_f32()
}

impl LogitScore {
    /// The rows of the output layer as a layer of one value: the difference of two logits is the logit of their difference.
    fn load(self, spec: &ModelSpec, tensors: &dyn Tensors) -> Result<Scorer, LoadError> {
        let name = match spec.has_lm_head() {
            true => format!("{}.weight", spec.names.head),
            false => spec.embedding_name(),
        };
        let matrix = tensors.tensor(&name, &[spec.vocab_size, spec.hidden_size])?;
        let mut weight = row(&matrix, self.yes);
        if let Some(no) = self.no {
            weight.iter_mut().zip(row(&matrix, no)).for_each(|(yes, no)| *yes -= no);
        }
        let linear = Linear { weight, bias: Vec::new(), inputs: spec.hidden_size };
        let head = Head::new(vec![HeadLayer::Linear(linear)]);
        // Softmax over two values is the logistic function of their difference.
        Ok(Scorer { head, function: Some(HeadFunction::Sigmoid) })
    }
}
