"""Rerankers and scores over HTTP, with requests: a tiny cross-encoder."""

from pathlib import Path

import pytest
from front import Front

FIXTURES = Path(__file__).resolve().parents[4] / "engine" / "tests" / "fixtures"
QUERY = "Where is the boat?"
DOCUMENTS = ["The tide is in.", "A fox and a lantern", "the boat is of the keeper", "rain"]


@pytest.fixture
def reranker(start_server):
    """The front of a server with a cross-encoder."""
    server = start_server("--dtype", "float32", model=FIXTURES / "bert_cross")
    yield Front(server.url)
    server.wait_until_idle()


def test_ranking(reranker):
    answer = reranker.post("/v1/rerank", {"model": "bert_cross", "query": QUERY, "documents": DOCUMENTS}).json()
    results = answer["results"]
    scores = [result["relevance_score"] for result in results]
    assert scores == sorted(scores, reverse=True) and len(scores) == len(DOCUMENTS)
    assert all(result["document"]["text"] == DOCUMENTS[result["index"]] for result in results)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0
    best = {"query": QUERY, "documents": [{"text": text} for text in DOCUMENTS], "top_n": 1, "return_documents": False}
    for path in ("/rerank", "/v2/rerank"):
        (only,) = reranker.post(path, best).json()["results"]
        assert only == {"index": results[0]["index"], "relevance_score": scores[0]}
    data = reranker.post("/v1/score", {"text_1": QUERY, "text_2": DOCUMENTS}).json()["data"]
    assert [item["index"] for item in data] == [0, 1, 2, 3]
    assert sorted((item["score"] for item in data), reverse=True) == scores


def test_the_folder_says_which_function_makes_a_score(reranker):
    """This one says that none does."""
    body = {"text_1": QUERY, "text_2": DOCUMENTS[0]}
    scores = [reranker.post("/score", {**body, **more}).json()["data"][0]["score"] for more in ({}, {"use_activation": False})]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    "change, param",
    [
        ({"documents": []}, "documents"),
        ({"documents": ["a"] * 2049}, "documents"),
        ({"documents": ["boat " * 200]}, "documents"),
        ({"documents": [""]}, "documents"),
        ({"query": ""}, "query"),
        ({"top_n": "two"}, "top_n"),
        ({"instruction": "Say."}, "instruction"),
    ],
    ids=str,
)
def test_refused(reranker, change, param):
    answer = reranker.post("/v1/rerank", {"query": QUERY, "documents": DOCUMENTS, **change})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)


def test_other_models_say_what_they_do(front, reranker):
    error = front.post("/v1/rerank", {"query": "a", "documents": ["b"]})
    assert error.status_code == 400 and "/v1/embeddings" in error.json()["error"]["message"]
    error = reranker.post("/v1/embeddings", {"input": "a"})
    assert error.status_code == 400 and "/v1/rerank" in error.json()["error"]["message"]
