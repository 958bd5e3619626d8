#!/usr/bin/env python3
"""Fixtures of the tests for encoders, embedders and rerankers: tiny seeded models and what Hugging Face transformers computes of them.

    python scripts/golden_encoders.py                   writes engine/tests/fixtures/<name>/
    python scripts/golden_encoders.py --check           makes them anew and compares
    python scripts/golden_encoders.py --check-mutations changes one field of each config.json at a time: all must be noticed

Needs torch, transformers and safetensors; no network. Each folder holds what a model folder holds, and

    golden.safetensors   input_ids.<i> [T], segments.<i> [T] where the model tells segments apart, and of each prompt
                         embedding.<i> [H] (pooled and of length 1) or score.<i> [1] (before any function)
    golden.json          hashes of all tensors

Outputs are computed in float32 from the stored (rounded) weights with eager attention, one prompt at a time. Weights come from
integers of a counter-based generator, as in make_goldens.py.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

import numpy as np
import torch
import transformers
from make_goldens import FIXTURES, TOLERANCE, gaussian, sha, write_json
from safetensors.torch import load_file, save_file

PROMPT_LENGTHS = (7, 33, 64)  # past every window below
YES, NO = 17, 42  # stand-ins for the tokens of a reranker's answers

DECODER = {
    "vocab_size": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
BERT = {
    "vocab_size": 251,
    "pad_token_id": 0,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-3,
}
MODERN_BERT = {
    "vocab_size": 251,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "hidden_activation": "gelu",
    "norm_eps": 1e-3,
    "local_attention": 18,
    "global_attn_every_n_layers": 2,
    "global_rope_theta": 1000.0,
    "local_rope_theta": 100.0,
}
ONE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}

# name: class, stored dtype, what it gives, config fields. Between them they speak both dialects and have every kind of head.
MODELS = {
    "bert_minilm": ("BertModel", "bert", "bfloat16", "mean", BERT),
    "bert_cross": (
        "BertForSequenceClassification",
        "bert",
        "float32",
        "score",
        BERT | ONE_LABEL | {"hidden_act": "gelu_new", "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
    ),
    "xlmr_rerank": (
        "XLMRobertaForSequenceClassification",
        "xlm-roberta",
        "float16",
        "score",
        BERT | ONE_LABEL | {"pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": 82},
    ),
    "modernbert": ("ModernBertModel", "modernbert", "bfloat16", "cls", MODERN_BERT),
    "modernbert_rerank": (
        "ModernBertForSequenceClassification",
        "modernbert",
        "bfloat16",
        "score",
        {k: v for k, v in MODERN_BERT.items() if not k.endswith("theta") and k != "global_attn_every_n_layers"}
        | ONE_LABEL
        | {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "classifier_pooling": "mean",
            "classifier_activation": "relu",
        },
    ),
    "qwen3_embed": ("Qwen3Model", "qwen3", "bfloat16", "last", DECODER | {"tie_word_embeddings": True}),
    "mistral_embed": ("MistralModel", "mistral", "bfloat16", "last", DECODER | {"sliding_window": 8}),
    "qwen3_rerank": ("Qwen3ForCausalLM", "qwen3", "bfloat16", "yes_no", DECODER | {"tie_word_embeddings": True}),
}

# (field, change); a field that a model does not have is left alone, and so is one for which the change gives None.
MUTATIONS = [
    ("hidden_act", lambda v: "relu"),
    ("hidden_activation", lambda v: "relu"),
    ("layer_norm_eps", lambda v: 1e-1),
    ("norm_eps", lambda v: 1e-1),
    ("rms_norm_eps", lambda v: 1e-1),
    ("num_hidden_layers", lambda v: v - 1),
    ("num_attention_heads", lambda v: v // 2),
    ("num_key_value_heads", lambda v: v // 2),
    ("head_dim", lambda v: v // 2),
    ("type_vocab_size", lambda v: v + 1),
    ("max_position_embeddings", lambda v: v - 1 if v < 128 else None),  # with rotary positions it says no more than how long prompts may be
    ("pad_token_id", lambda v: v - 1 if v else None),
    ("local_attention", lambda v: v // 2),
    ("global_attn_every_n_layers", lambda v: v + 1),
    ("layer_types", lambda v: ["full_attention"] * len(v)),
    ("global_rope_theta", lambda v: v * 10),
    ("local_rope_theta", lambda v: v * 10),
    ("rope_parameters", lambda v: {k: dict(r, rope_theta=r["rope_theta"] * 10) for k, r in v.items()}),
    ("norm_bias", lambda v: False),
    ("attention_bias", lambda v: False),
    ("mlp_bias", lambda v: False),
    ("classifier_bias", lambda v: False),
    ("classifier_pooling", lambda v: "cls"),
    ("classifier_activation", lambda v: "gelu"),
    ("sliding_window", lambda v: v * 2),
]


def config_of(name):
    cls, model_type, dtype, _, fields = MODELS[name]
    return {"architectures": [cls], "model_type": model_type, "dtype": dtype} | fields


def model_class(name):
    return getattr(transformers, MODELS[name][0])


def weights_of(name, folder):
    """Values that show a wrong kernel: no zero biases, no unit norms, attention that is not uniform."""
    rng = np.random.Generator(np.random.PCG64(1000 + list(MODELS).index(name)))
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        names = {n: p.shape for n, p in model_class(name)(config).named_parameters()}
    weights = {}
    for key, shape in sorted(names.items()):
        low = key.lower()
        is_norm = len(shape) == 1 and low.endswith("norm.weight")
        if is_norm:
            weights[key] = gaussian(rng, shape, 0.2) + np.float32(1.0)
        elif len(shape) == 1:
            weights[key] = gaussian(rng, shape, 0.2)
        elif "embed" in low:
            weights[key] = gaussian(rng, shape, 0.6)
        else:
            weights[key] = gaussian(rng, shape, 1.3 / shape[-1] ** 0.5)
    return {n: w.to(getattr(torch, MODELS[name][2])) for n, w in weights.items()}


def write_modules(name, folder):
    """What sentence-transformers keeps beside a model that embeds, or scores by logits."""
    modes = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
    kind = MODELS[name][3]
    if kind == "score":
        return
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    if kind == "yes_no":
        paths = {"Transformer": "", "LogitScore": "1_LogitScore"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{module}"}
        for i, (module, path) in enumerate(paths.items())
    ]
    write_json(folder / "modules.json", modules)
    if kind == "yes_no":
        (folder / "1_LogitScore").mkdir(exist_ok=True)
        answers = {"true_token_id": YES, "false_token_id": NO}
        return write_json(folder / "1_LogitScore" / "config.json", answers)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", {f"pooling_mode_{modes[kind]}": True})


def write_tokenizer(name, folder):
    """A small WordPiece tokenizer, for tests that send texts."""
    if MODELS[name][1] != "bert":
        return
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = "the tide sea boat fox lantern a is of and what where who why how keeper found small house rain".split()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + c for c in letters), *".,?!'-", *words[:6], *words[7:]]
    special = [
        {"id": at, "content": token, "special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
        for at, token in enumerate(vocabulary[:4])
    ]
    cls, sep = ({"SpecialToken": {"id": token, "type_id": 0}} for token in ("[CLS]", "[SEP]"))
    first, second = ({"Sequence": {"id": which, "type_id": at}} for at, which in enumerate("AB"))
    last = {"SpecialToken": {"id": "[SEP]", "type_id": 1}}
    ids = {token: {"id": token, "ids": [vocabulary.index(token)], "tokens": [token]} for token in ("[CLS]", "[SEP]")}
    template = {"single": [cls, first, sep], "pair": [cls, first, sep, second, last], "special_tokens": ids}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing"} | template,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {token: at for at, token in enumerate(vocabulary)},
        },
    }
    write_json(folder / "tokenizer.json", tokenizer)


def load_model(name, folder):
    model = model_class(name).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def prompts(name):
    """Token ids, and segments where the model tells them apart."""
    rng = np.random.Generator(np.random.PCG64(7))
    fields = MODELS[name][4]
    for length in PROMPT_LENGTHS:
        ids = torch.from_numpy(rng.integers(4, fields["vocab_size"], size=length))
        has_segments = MODELS[name][3] == "score" and fields.get("type_vocab_size", 0) > 1
        segments = (torch.arange(length) > length // 3).long() if has_segments else None
        yield ids, segments


@torch.inference_mode()
def result(name, model, ids, segments):
    """(name of the tensor, value) of one prompt."""
    kind = MODELS[name][3]
    more = {} if segments is None else {"token_type_ids": segments[None]}
    out = model(ids[None], attention_mask=torch.ones_like(ids)[None], **more)
    if kind == "score":
        return "score", out.logits[0]
    if kind == "yes_no":
        last = out.logits[0, -1]
        return "score", (last[YES] - last[NO])[None]
    states = out.last_hidden_state[0]
    pooled = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[kind]
    return "embedding", torch.nn.functional.normalize(pooled, dim=-1)


def reference(name, model):
    golden = {}
    for i, (ids, segments) in enumerate(prompts(name)):
        golden[f"input_ids.{i}"] = ids.int()
        if segments is not None:
            golden[f"segments.{i}"] = segments.int()
        what, value = result(name, model, ids, segments)
        golden[f"{what}.{i}"] = value.contiguous().clone()
    return golden


def make(name, out):
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_of(name))
    write_modules(name, folder)
    write_tokenizer(name, folder)
    weights = weights_of(name, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    golden = reference(name, load_model(name, folder))
    save_file(golden, folder / "golden.safetensors")
    hashes = {"weights": weights, "golden": golden}
    write_json(folder / "golden.json", {k: {n: sha(t) for n, t in sorted(v.items())} for k, v in hashes.items()})


def compare(committed, fresh):
    """Problems between two trees: what was computed within TOLERANCE, everything else exactly."""
    problems = []
    for path in sorted(p for p in fresh.rglob("*") if p.is_file() and p.name != "golden.json"):
        label = path.relative_to(fresh)
        other = committed / label
        if not other.exists():
            problems.append(f"{label}: missing")
        elif path.suffix != ".safetensors":
            problems += [] if path.read_bytes() == other.read_bytes() else [f"{label}: differs"]
        else:
            a, b = load_file(other), load_file(path)
            problems += [] if a.keys() == b.keys() else [f"{label}: different tensors"]
            for n in a.keys() & b.keys():
                is_close = n.startswith(("embedding", "score")) and a[n].shape == b[n].shape
                if sha(a[n]) != sha(b[n]) and not (is_close and (a[n] - b[n]).abs().max() <= TOLERANCE):
                    problems.append(f"{label}: {n} differs")
    return problems


def is_same(name, model, golden):
    worst = max(
        float((value - golden[f"{what}.{i}"]).abs().max())
        for i, (what, value) in enumerate(result(name, model, *prompt) for prompt in prompts(name))
    )
    return worst <= TOLERANCE


def check_mutations(fixtures):
    """Names of mutations that no golden notices."""
    unnoticed = []
    for name in MODELS:
        folder = fixtures / name
        config, golden = json.loads((folder / "config.json").read_text()), load_file(folder / "golden.safetensors")
        for field, change in [(None, None), *MUTATIONS]:
            value = None if field is None or config.get(field) is None else change(config[field])
            if field is not None and (value is None or value == config[field]):
                continue
            with tempfile.TemporaryDirectory() as tmp:
                (Path(tmp) / "model.safetensors").symlink_to(folder / "model.safetensors")
                write_json(Path(tmp) / "config.json", config if field is None else config | {field: value})
                try:
                    same = is_same(name, load_model(name, tmp), golden)
                except Exception as error:  # whatever refuses has noticed
                    same = False
                    value = f"{value}: refused ({type(error).__name__})"
            print(f"{name:18s} {field or 'unchanged':30s} {value} {'same' if same else 'differs'}", flush=True)
            if same == (field is not None):
                unnoticed.append(f"{name}: {field or 'unchanged'}")
    return unnoticed


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=FIXTURES)
    p.add_argument("--check", action="store_true")
    p.add_argument("--check-mutations", action="store_true")
    a = p.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    problems = []
    if a.check_mutations:
        problems = check_mutations(a.out)
    elif a.check:
        with tempfile.TemporaryDirectory() as tmp:
            for name in MODELS:
                make(name, Path(tmp))
            problems = compare(a.out, Path(tmp))
    else:
        for name in MODELS:
            make(name, a.out)
    print("\n".join(problems) or "ok")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
