#!/usr/bin/env python3
"""What PyTorch (oneDNN) reaches in matrix products: the yardstick for kernels. GFLOP/s; M x K times K x N.

python bench_gemm.py [--threads 2] [--repetitions 5]
"""

import argparse
import os
import time

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from machine import repeat

SHAPES = [(512, 768, 3072), (512, 3072, 768), (2048, 2048, 2048), (8, 768, 3072)]


def gflops(m, k, n, dtype, seconds=0.4):
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)

    def measure():
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            torch.nn.functional.linear(x, w)
            count += 1
        return 2 * m * k * n * count / (time.perf_counter() - start) / 1e9

    measure()
    return measure


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--repetitions", type=int, default=5)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32):
            for shape in SHAPES:
                label = f"{a.threads} threads {str(dtype)[6:]} {shape[0]}x{shape[1]}x{shape[2]}"
                repeat(label, "GFLOP/s", gflops(*shape, dtype), a.repetitions)


if __name__ == "__main__":
    main()
