#!/usr/bin/env python3
"""llama.cpp on the CPU: prefill of 512 tokens, decoding for 1 and 8 streams after 128 tokens of context.

    python bench_llamacpp.py MODEL.gguf [--only prefill|decode1|decode8] [--threads 2] [--bin .build/llama/bin]

One process per repetition. Prefill and one stream come from llama-bench, eight streams from llama-batched-bench.
"""

import argparse
import json
import subprocess
from pathlib import Path

from machine import repeat

CONTEXT = 128


def run(command):
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


def llama_bench(a, *extra):
    return json.loads(run([a.bin / "llama-bench", "-m", a.model, "-t", a.threads, "-r", 1, "-o", "json", *extra]))[0]["avg_ts"]


def batched(a, streams):
    """Aggregate tokens per second of the decoding phase."""
    out = run(
        [a.bin / "llama-batched-bench", "-m", a.model, "-t", a.threads, "-c", 4096, "-b", 2048, "-ub", 512]
        + ["-npp", CONTEXT, "-ntg", a.tokens, "-npl", streams]
    )
    for line in out.splitlines():
        cells = [c.strip() for c in line.split("|")]
        if len(cells) > 10 and cells[3] == str(streams):
            return float(cells[8])
    raise ValueError(out)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--only", choices=["prefill", "decode1", "decode8"])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--tokens", type=int, default=128)
    p.add_argument("--repetitions", type=int, default=5)
    p.add_argument("--bin", type=Path, default=Path(__file__).parent / ".build/llama/bin")
    a = p.parse_args()
    measures = {
        "prefill": lambda: llama_bench(a, "-p", 512, "-n", 0),
        "decode1": lambda: llama_bench(a, "-p", 0, "-n", a.tokens, "-d", CONTEXT),
        "decode8": lambda: batched(a, 8),
    }
    for name, measure in measures.items():
        if a.only in (None, name):
            measure()
            repeat(f"llama.cpp {a.model.stem} {a.threads} threads {name}", "tok/s", measure, a.repetitions)


if __name__ == "__main__":
    main()
