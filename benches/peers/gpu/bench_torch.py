#!/usr/bin/env python3
"""The vendor's libraries through PyTorch: cuBLAS and cuBLASLt matrix products and cuDNN attention, at the shapes and under the
names of the project's own kernel benchmark. Of the two matrix libraries the faster one counts, for each shape anew.

    python bench_torch.py [--device cuda:0] [--only NAME] [--json FILE]        --device cpu --tiny: a dry run

Attention reads contiguous keys and values: the peer is spared the block table. Its cuDNN backend is forced; where cuDNN has no
such kernel, FlashAttention 2 stands in and the result says so.
"""

import torch
import torch.nn.functional as F
from timing import Bench, parser
from torch.nn.attention import SDPBackend, sdpa_kernel

# N, K of Mistral-7B's projections. gate_up is the plain product, without the activation that ours carries.
PROJECTIONS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "lm_head": (32000, 4096)}
ROWS = [1, 8, 64, 256, 1024, 8192]
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
# Sequences, context, new tokens per sequence.
ATTENTION = {
    "attention decode 64 x 1k": (64, 1024, 1),
    "attention decode 1 x 1k": (1, 1024, 1),
    "attention decode 1 x 32k": (1, 32768, 1),
    "attention prefill 1k": (1, 1024, 1024),
    "attention prefill 8k": (1, 8192, 8192),
}


def random(bench, *shape):
    return torch.randn(*shape, device=bench.device, dtype=torch.bfloat16)


def linear(bench, rows, n, k):
    def measure(name):
        num_bytes = 2 * (rows * k + n * k + rows * n)
        sets = bench.sets(num_bytes)
        inputs = [(random(bench, rows, k), random(bench, n, k)) for _ in range(sets)]
        out = torch.empty(rows, n, device=bench.device, dtype=torch.bfloat16)

        def run():
            for x, weight in inputs:
                torch.mm(x, weight.t(), out=out)

        times = {}
        for library in ("cublaslt", "cublas") if bench.gpu else ("cpu",):
            if bench.gpu:
                torch.backends.cuda.preferred_blas_library(library)
            times[library] = bench.seconds(run, sets)
        library = min(times, key=times.get)
        bench.report(name, times[library], num_bytes, 2 * rows * n * k, library=library)

    return measure


def attention(bench, sequences, context, new):
    def measure(name):
        kv_bytes = 2 * 2 * sequences * context * KV_HEADS * HEAD_DIM
        num_bytes = kv_bytes + 2 * 2 * sequences * new * HEADS * HEAD_DIM
        sets = bench.sets(num_bytes)
        shapes = [(sequences, heads, tokens, HEAD_DIM) for heads, tokens in [(HEADS, new), (KV_HEADS, context), (KV_HEADS, context)]]
        inputs = [[random(bench, *shape) for shape in shapes] for _ in range(sets)]
        causal = new > 1

        def seconds(backends):
            def run():
                with sdpa_kernel(backends):
                    for q, k, v in inputs:
                        F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

            return bench.seconds(run, sets)

        backend = "cuDNN"
        try:
            time = seconds([SDPBackend.CUDNN_ATTENTION] if bench.gpu else [SDPBackend.MATH])
        except RuntimeError as error:
            backend = f"FlashAttention 2 (cuDNN: {' '.join(str(error).split())[:120]})"
            time = seconds([SDPBackend.FLASH_ATTENTION])
        pairs = sequences * (new * (new + 1) // 2 if causal else context)
        bench.report(name, time, num_bytes, 4 * pairs * HEADS * HEAD_DIM, backend=backend if bench.gpu else "math")

    return measure


def copy(bench):
    def measure(name):
        elems = (1 << 16) if bench.args.tiny else 1 << 31
        source = torch.randn(1 << 16, device=bench.device).to(torch.bfloat16).repeat(elems >> 16)
        target = torch.empty_like(source)
        bench.report(name, bench.seconds(lambda: target.copy_(source), 1), 4 * elems)

    return measure


def main():
    args = parser(__doc__).parse_args()
    bench = Bench(args, "PyTorch")
    tiny = (lambda n: max(1, n // 64)) if args.tiny else (lambda n: n)
    with torch.inference_mode():
        bench.attempt("copy", copy(bench))
        for n in (4096, 8192):
            bench.attempt(f"gemm {n}", linear(bench, tiny(n), tiny(n), tiny(n)))
        for projection, (n, k) in PROJECTIONS.items():
            for rows in ROWS:
                bench.attempt(f"{projection} M={rows}", linear(bench, tiny(rows), tiny(n), tiny(k)))
        for name, (sequences, context, new) in ATTENTION.items():
            bench.attempt(name, attention(bench, tiny(sequences), tiny(context), tiny(new)))
    bench.write(peer="torch")


if __name__ == "__main__":
    main()
