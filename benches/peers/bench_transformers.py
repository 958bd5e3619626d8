#!/usr/bin/env python3
"""transformers on the CPU: prefill of 512 tokens, decoding for 1 and 8 streams after 128 tokens of context.

    python bench_transformers.py MODEL [--only prefill|decode1|decode8] [--threads 2] [--dtype bfloat16]

Decoding is a bare forward loop over a DynamicCache, without generate()'s overhead: the most favourable reading for the peer.
"""

import argparse
import os
import time

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

import torch
import transformers
from machine import repeat
from transformers import AutoModelForCausalLM, DynamicCache

PREFILL, CONTEXT = 512, 128


def prefill(model):
    ids = torch.randint(3, model.config.vocab_size, (1, PREFILL))

    def measure():
        start = time.perf_counter()
        n = 0
        while time.perf_counter() - start < 1:
            model(ids, use_cache=True, logits_to_keep=1)
            n += 1
        return n * PREFILL / (time.perf_counter() - start)

    measure()
    return measure


def decode(model, streams, tokens):
    ids = torch.randint(3, model.config.vocab_size, (streams, CONTEXT))

    def measure():
        cache = DynamicCache(config=model.config)
        x = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(tokens):
            x = model(x, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        return streams * tokens / (time.perf_counter() - start)

    measure()
    return measure


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--only", choices=["prefill", "decode1", "decode8"])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--tokens", type=int, default=128)
    p.add_argument("--repetitions", type=int, default=5)
    a = p.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(a.threads)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(a.model, dtype=getattr(torch, a.dtype)).eval()
        label = f"transformers {transformers.__version__} {a.dtype} {a.threads} threads"
        for name, make in [
            ("prefill", lambda: prefill(model)),
            ("decode1", lambda: decode(model, 1, a.tokens)),
            ("decode8", lambda: decode(model, 8, a.tokens)),
        ]:
            if a.only in (None, name):
                repeat(f"{label} {name}", "tok/s", make(), a.repetitions)


if __name__ == "__main__":
    main()
