//! What the text side does in a second on one core: bytes encoded, tokens decoded, for each kind of tokenizer.
//!
//!     cargo bench -p tidemill-benches --bench text
//!
//! The text is the built-in model's kind: sentences of some dozen words, other scripts now and then. Small vocabularies make more tokens of a text, and
//! so more work per byte, than large ones do.

use std::{
    hint::black_box,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tidemill_engine::{
    LoadError,
    ids::TokenId,
    model::{ModelFiles, ModelSource, ModelSpec},
    text::TextModel,
};

/// What each measurement takes at least.
const LONG_ENOUGH: Duration = Duration::from_millis(800);
/// Bytes of the prompts.
const PROMPTS: [usize; 2] = [2 << 10, 256 << 10];

const SENTENCES: [&str; 6] = [
    "The tide comes in twice a day, and the mill turns with it. ",
    "She asked whether they'd seen the heron; they hadn't, but it'll be back at 10:45. ",
    "def grind(grain):\n    return sum(x * 2 for x in grain if x % 3 == 0)\n",
    "Die Mühle steht am Fluß; größer als gedacht, älter als das Dorf. ",
    "Мельница стоит на берегу реки. 水车在河边转动，水位每天涨落两次。",
    "Numbers such as 3.14159 and 1,000,000, and a 👍 at the end. ",
];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/fixtures/tokenizers")
}

fn builtin() -> Result<TextModel, LoadError> {
    let files = ModelFiles::open(&ModelSource::Builtin)?;
    TextModel::load(&files, &ModelSpec::load(&files)?)
}

/// A fixture's tokenizer: its folder holds no model, which the built-in one stands in for.
fn fixture(name: &str) -> Result<TextModel, LoadError> {
    let dir = std::env::temp_dir().join(format!("tidemill-bench-text-{}-{name}", std::process::id()));
    let io = |source| LoadError::Io { path: dir.clone(), source };
    std::fs::create_dir_all(&dir).map_err(io)?;
    for entry in std::fs::read_dir(fixtures().join(name)).map_err(io)? {
        let entry = entry.map_err(io)?;
        std::fs::copy(entry.path(), dir.join(entry.file_name())).map_err(io)?;
    }
    let kind = if name.contains("gpt2") { "gpt2" } else { "llama" };
    std::fs::write(dir.join("config.json"), format!("{{\"model_type\": \"{kind}\"}}")).map_err(io)?;
    std::fs::write(dir.join("model.safetensors"), b"").map_err(io)?;
    let files = ModelFiles::open(&ModelSource::Dir(dir.clone()))?;
    let mut spec = ModelSpec::load(&ModelFiles::open(&ModelSource::Builtin)?)?;
    spec.vocab_size = 4096;
    let model = TextModel::load(&files, &spec);
    std::fs::remove_dir_all(&dir).map_err(io)?;
    model
}

/// Seconds that one call takes, from as many as are long enough together.
fn seconds(mut call: impl FnMut()) -> f64 {
    call();
    let (started, mut calls) = (Instant::now(), 0);
    while started.elapsed() < LONG_ENOUGH {
        call();
        calls += 1;
    }
    started.elapsed().as_secs_f64() / f64::from(calls)
}

fn report(name: &str, model: &TextModel) -> Result<(), Box<dyn std::error::Error>> {
    for bytes in PROMPTS {
        let text: String = SENTENCES
            .iter()
            .cycle()
            .scan(0, |used, sentence| {
                *used += sentence.len();
                (*used <= bytes).then_some(*sentence)
            })
            .collect();
        let ids = model.encode(&text, false)?;
        let encode = seconds(|| drop(black_box(model.encode(&text, false))));
        let decode = seconds(|| {
            let mut detokenizer = model.detokenizer(false);
            let mut out = String::new();
            ids.iter().for_each(|&id: &TokenId| detokenizer.push_into(id, &mut out));
            black_box(out + &detokenizer.finish());
        });
        println!(
            "{name:<18} {:>8} bytes {:>8} tokens   encode {:>7.2} MB/s {:>9.0} tokens/s   decode {:>10.0} tokens/s",
            text.len(),
            ids.len(),
            text.len() as f64 / 1e6 / encode,
            ids.len() as f64 / encode,
            ids.len() as f64 / decode,
        );
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("one core; text to ids, and ids to text as a stream");
    report("tokenizer.json", &builtin()?)?;
    for name in ["sp_bpe", "sp_unigram", "sp_unigram_bytes", "tiktoken_llama3", "bpe_gpt2"] {
        report(name, &fixture(name)?)?;
    }
    Ok(())
}
