"""Embeddings through OpenAI's SDK."""

import base64
import math
import struct

import openai
import pytest
from front import MODEL

TEXTS = ["The tide comes in", "A fox and a lantern", "1 2 3"]


def embed(api, texts, **options):
    """The vectors. Without a format of ours, the SDK asks for base64 and decodes it."""
    return [item.embedding for item in api.embeddings.create(model=MODEL, input=texts, **options).data]


def norm(vector):
    """Euclidean."""
    return math.sqrt(sum(x * x for x in vector))


def test_floats(api):
    answer = api.embeddings.create(model=MODEL, input=TEXTS[0], encoding_format="float")
    (item,) = answer.data
    assert (answer.object, item.object, item.index, answer.model) == ("list", "embedding", 0, MODEL)
    assert len(item.embedding) > 64 and all(map(math.isfinite, item.embedding))
    assert norm(item.embedding) == pytest.approx(1, abs=1e-3)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0


def test_base64_is_the_same(api, front):
    floats = embed(api, TEXTS[0], encoding_format="float")[0]
    assert embed(api, TEXTS[0])[0] == pytest.approx(floats, abs=1e-6)
    raw = front.post("/v1/embeddings", {"model": MODEL, "input": TEXTS[0], "encoding_format": "base64"}).json()
    data = base64.b64decode(raw["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == pytest.approx(floats, abs=1e-6)


def test_batches(api, front):
    together = embed(api, TEXTS)
    assert together == [embed(api, text)[0] for text in TEXTS], "company changes nothing"
    ids = [front.post("/tokenize", {"prompt": text}).json()["tokens"] for text in TEXTS]
    assert embed(api, ids) == together and embed(api, ids[0]) == together[:1]
    answer = api.embeddings.create(model=MODEL, input=TEXTS)
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    many = [f"{text} {i}" for i in range(20) for text in TEXTS]
    assert len(embed(api, many)) == len(many)


def test_dimensions(api):
    whole = embed(api, TEXTS[0])[0]
    cut = embed(api, TEXTS[0], dimensions=16)[0]
    assert len(cut) == 16 and norm(cut) == pytest.approx(1, abs=1e-3)
    scale = norm(whole[:16])
    assert cut == pytest.approx([x / scale for x in whole[:16]], abs=1e-3)


def test_long_inputs_and_short(api):
    (short, long) = embed(api, ["a", "and so on " * 300])
    assert len(short) == len(long)


@pytest.mark.parametrize(
    "options",
    [
        dict(input=""),
        dict(input=[]),
        dict(input=[""]),
        dict(input=["a", ""]),
        dict(input=[[]]),
        dict(input=[99999]),
        dict(input={"a": 1}),
        dict(input="tide " * 2000),
        dict(input="a", dimensions=0),
        dict(input="a", dimensions=100_000),
        dict(input="a", encoding_format="hexadecimal"),
    ],
    ids=lambda options: str(options)[:40],
)
def test_refused(front, options):
    answer = front.post("/v1/embeddings", {"model": MODEL, **options})
    assert answer.status_code == 400, answer.text
    param = answer.json()["error"]["param"]
    wanted = next((name for name in ("dimensions", "encoding_format") if name in options), "input")
    assert param and param.startswith(wanted)


def test_the_sdk_sees_the_error(api):
    with pytest.raises(openai.BadRequestError):
        embed(api, "")
