#!/usr/bin/env python3
"""A plain PyTorch decoder with a static KV cache and CUDA graphs, in the manner of gpt-fast: what a careful user of PyTorch gets.

    python bench_static_kv.py [--device cuda:0] [--model NAME] [--json FILE]      --device cpu --tiny: a dry run

Random bf16 weights, fused qkv and gate_up, one captured graph for a whole decode step with its argmax, contiguous keys and
values with the context's exact length. Every case is tried with each attention library and with and without torch.compile;
the fastest counts and is named. Decoding at 1k context, batch 1 to 256; one prompt of 1k and of 8k tokens.
"""

import itertools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from timing import Bench, parser
from torch.nn.attention import SDPBackend, sdpa_kernel

CONTEXT = 1024
BATCHES = [1, 8, 64, 256]
PROMPTS = {"1k": 1024, "8k": 8192}


@dataclass(frozen=True)
class Shape:
    hidden: int
    inter: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False


MODELS = {
    "mistral-7b": Shape(4096, 14336, 32, 32, 8, 128, 32000),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    # Like ours, without its norms of queries and keys.
    "qwen3-0.6b": Shape(1024, 3072, 28, 16, 8, 128, 151936, tied=True),
}


def tiny(shape):
    return replace(shape, hidden=64, inter=128, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=256)


def rotate(x, cos, sin):
    """RoPE on the pairs (i, i + D / 2) of the last axis; cos and sin are [tokens, D / 2]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def layer(x, w, kv, rope, slots, shape):
    """One decoder layer. x [B, T, H]; kv ([B, K, S, D], same); the T new tokens of each sequence go to `slots`."""
    batch, new, _ = x.shape
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    qkv = F.linear(F.rms_norm(x, (shape.hidden,), w["norm1"]), w["qkv"])
    q, k, v = (t.view(batch, new, -1, shape.head_dim) for t in qkv.split([q_width, kv_width, kv_width], -1))
    q, k, v = rotate(q.transpose(1, 2), *rope), rotate(k.transpose(1, 2), *rope), v.transpose(1, 2)
    keys, values = kv
    keys.index_copy_(2, slots, k)
    values.index_copy_(2, slots, v)
    attended = F.scaled_dot_product_attention(q, keys, values, is_causal=new > 1, enable_gqa=True)
    x = x + F.linear(attended.transpose(1, 2).reshape(batch, new, q_width), w["o"])
    gate, up = F.linear(F.rms_norm(x, (shape.hidden,), w["norm2"]), w["gate_up"]).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, w["down"])


class Model:
    def __init__(self, shape, device):
        self.shape, self.device = shape, device
        h, i, d = shape.hidden, shape.inter, shape.head_dim
        qkv, q = (shape.heads + 2 * shape.kv_heads) * d, shape.heads * d
        sizes = {"qkv": (qkv, h), "o": (h, q), "gate_up": (2 * i, h), "down": (h, i)}
        ones = {"norm1": h, "norm2": h}
        self.layers = [
            {n: self.random(*s) for n, s in sizes.items()} | {n: self.one(s) for n, s in ones.items()}
            for _ in range(shape.layers)
        ]
        self.embed = self.random(shape.vocab, h)
        self.head = self.embed if shape.tied else self.random(shape.vocab, h)
        self.norm = self.one(h)

    def random(self, *shape):
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16).mul_(0.02)

    def one(self, size):
        return torch.ones(size, device=self.device, dtype=torch.bfloat16)

    def cache(self, batch, context):
        s = self.shape
        return [tuple(self.random(batch, s.kv_heads, context, s.head_dim) for _ in range(2)) for _ in range(s.layers)]

    def rope(self, positions):
        half = self.shape.head_dim // 2
        frequency = 10000.0 ** (-torch.arange(half, device=self.device) / half)
        angles = positions[:, None] * frequency
        return angles.cos(), angles.sin()

    def step(self, run_layer, tokens, kv, slots):
        """The likeliest next token of each sequence; tokens [B, T]."""
        x, rope = F.embedding(tokens, self.embed), self.rope(slots)
        for weights, cache in zip(self.layers, kv, strict=True):
            x = run_layer(x, weights, cache, rope, slots, self.shape)
        x = F.rms_norm(x[:, -1:], (self.shape.hidden,), self.norm)
        return F.linear(x, self.head).argmax(-1)


def measure(bench, model, batch, context, new, compiles):
    """(seconds of a step, how) of the fastest variant that runs."""
    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention 2": SDPBackend.FLASH_ATTENTION}
    if not bench.gpu:
        backends = {"math": SDPBackend.MATH}
    tokens = torch.randint(model.shape.vocab, (batch, new), device=bench.device)
    slots = torch.arange(context - new, context, device=bench.device)
    kv = model.cache(batch, context)
    best, refused = None, []
    for (name, backend), compiled in itertools.product(backends.items(), (False, True) if compiles else (False,)):
        run_layer = torch.compile(layer, dynamic=False) if compiled else layer

        def run():
            with sdpa_kernel([backend]):
                next_tokens = model.step(run_layer, tokens, kv, slots)
                if new == 1:
                    tokens.copy_(next_tokens)

        try:
            found = (bench.seconds(run, 1), name + (", compiled" if compiled else ""))
        except Exception as error:  # a compiler's errors have no common type
            refused.append(f"{name}{', compiled' if compiled else ''}: {type(error).__name__}: {error}")
            continue
        best = min(best, found) if best else found
    if not best:
        raise RuntimeError("; ".join(refused))
    return best


def main():
    p = parser(__doc__)
    p.add_argument("--model", choices=MODELS, action="append", help="default: all")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out: quicker, and a weaker peer")
    args = p.parse_args()
    bench = Bench(args, "static KV")
    torch._dynamo.config.cache_size_limit = 64
    with torch.inference_mode():
        for name in args.model or MODELS:
            shape = tiny(MODELS[name]) if args.tiny else MODELS[name]
            model = Model(shape, bench.device)
            less = 64 if args.tiny else 1
            cases = {f"{name} decode {b}": (max(1, b // less), CONTEXT // less, 1) for b in BATCHES}
            cases |= {f"{name} prefill {n}": (1, tokens // less, tokens // less) for n, tokens in PROMPTS.items()}
            for case, (batch, context, new) in cases.items():

                def one(case, batch=batch, context=context, new=new):
                    seconds, how = measure(bench, model, batch, context, new, not args.no_compile)
                    bench.report(case, seconds, tokens=batch * new, tokens_per_second=batch * new / seconds, how=how)

                bench.attempt(case, one)
            del model
    bench.write(peer="static KV")


if __name__ == "__main__":
    main()
