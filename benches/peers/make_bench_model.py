#!/usr/bin/env python3
"""Make the benchmark model: 117 M random bf16 weights, Llama shape, with a byte-level BPE tokenizer. No downloads.

    python make_bench_model.py OUT

The weights depend only on the seed. The tokenizer is trained on generated words, so it is the same on every machine.
"""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 8192
SHAPE = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=4096,
)
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


def corpus(words=20_000, lines=15_000):
    """Lines of invented words with a Zipf-like frequency, numbers and punctuation."""
    rng = random.Random(0)
    syllables = [
        c + v for c in "b c d f g h j k l m n p r s t v w z st tr pl gr sh th".split() for v in "a e i o u ea ou y".split()
    ]
    lexicon = ["".join(rng.choices(syllables, k=rng.choice([1, 2, 2, 3, 3, 4]))) for _ in range(words)]
    weights = [1 / (i + 5) for i in range(words)]
    for _ in range(lines):
        line = rng.choices(lexicon, weights, k=rng.randint(4, 30))
        if rng.random() < 0.2:
            line.insert(rng.randrange(len(line)), str(rng.randrange(10_000)))
        yield line[0].capitalize() + " " + " ".join(line[1:]) + rng.choice(".?!:;") + "\n"


def make_tokenizer():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    t.train_from_iterator(corpus(), trainer)
    assert t.get_vocab_size() == VOCAB, t.get_vocab_size()
    fast = PreTrainedTokenizerFast(tokenizer_object=t, bos_token=BEGIN, eos_token=END, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main(out):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **SHAPE,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    path = Path(out) / "config.json"  # some readers know only the older dialect
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"rope_theta": 10000.0, "torch_dtype": "bfloat16"}, indent=2) + "\n"
    )
    print(f"{out}: {model.num_parameters() / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main(sys.argv[1])
