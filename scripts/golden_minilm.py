#!/usr/bin/env python3
"""Embeddings of a real model, for server/tests/wire/http/test_minilm.py: what sentence-transformers makes of some texts.

    python scripts/golden_minilm.py MODEL_DIR      writes server/tests/wire/minilm/expected.json

MODEL_DIR is the folder `model` within the package that server/tests/wire/minilm/requirements.txt names. Needs sentence-transformers.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

import torch
from sentence_transformers import SentenceTransformer

OUT = Path(__file__).resolve().parent.parent / "server" / "tests" / "wire" / "minilm" / "expected.json"
TEXTS = [
    "The tide comes in.",
    "the tide comes in",
    "A fox and a lantern",
    "What is a KV cache?",
    "Where do the keys and values of earlier tokens go?",
    "1 2 3, 4.5 and 6,789!",
    "naïve café — déjà vu…",
    "潮が満ちる。",
    "It's the keeper's boat (isn't it?) — unbelievably so.",
    "😀 emoji \u200b and\ttabs\nand lines",
    "a",
    "supercalifragilisticexpialidocious " * 3,
    # Longer than the model reads: cut.
    "The lighthouse keeper found a small boat, and then it rained. " * 40,
]


def main():
    torch.set_num_threads(1)
    model = SentenceTransformer(sys.argv[1], device="cpu")
    vectors = model.encode(TEXTS, batch_size=1).astype("float64")
    rows = [{"text": text, "embedding": [round(x, 7) for x in row]} for text, row in zip(TEXTS, vectors.tolist())]
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
