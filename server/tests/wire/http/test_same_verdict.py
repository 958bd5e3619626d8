"""One door: the same request gets the same verdict over gRPC and over HTTP, and, if it is served, the same tokens."""

import math

import grpc
import pytest
from client import MAX_N, Client, chat, generate_request
from front import MODEL, user
from tidemill.v1 import tidemill_pb2 as pb

STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
}
EDGES = {
    "temperature": [0, 1e-30, 1, 100, 100.5, -0.01],
    "top_p": [1e-30, 0.5, 1, 1.01, -0.1],
    "min_p": [0, 1, 1.01, -0.01],
    "top_k": [0, 1, 2047, 5000],
    "repetition_penalty": [1e-30, 1, 100, 100.5, 0, -1],
    "presence_penalty": [-2, 0, 2, 2.01, -2.01],
    "frequency_penalty": [-2, 0, 2, 2.01, -2.01],
    "seed": [0, 1, 2**32, 2**63 - 1],
    "max_tokens": [1, 8, 1000, 1024, 100_000, 0],
    "min_tokens": [0, 8, 9],
    "stop": [["a"], ["x" * 256], ["x" * 257], [""], [str(i) for i in range(16)], [str(i) for i in range(17)]],
    "stop_token_ids": [[0], [2047], [2048], list(range(64)), list(range(65))],
    "logit_bias": [{1: 100}, {1: 100.1}, {1: -100}, {2047: 1}, {2048: 1}, {i: 1 for i in range(1024)},
                   {i: 1 for i in range(1025)}],
    "n": [1, 8, 9, 0],
    "prompt_logprobs": [0, 20, 21],
    "ignore_eos": [True, False],
}
CORPUS = [(field, value) for field, values in EDGES.items() for value in values]
PROMPTS = {
    "text": "The tide",
    "unicode": "Größe, 東京, 🦀",
    "empty": "",
    "ids": [72, 73],
    "unknown id": [2048],
    "as long as the context": [72] * 1023,
    "too long by one": [72] * 1024,
    "long text": "tide " * 1024,
}


def over_grpc(server, prompt, **options):
    """(status of HTTP that this would be, tokens or violated fields)."""
    try:
        result = server.client.run(prompt, **options)
    except grpc.RpcError as error:
        return STATUS[error.code()], None
    return 200, [(completion.text, completion.finish) for completion in result.completions]


REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


def over_http(front, path, **body):
    """The same."""
    answer = front.post(path, {"model": MODEL, **body})
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
        return answer.status_code, None
    choices = answer.json()["choices"]
    texts = [choice["text"] if "text" in choice else choice["message"]["content"] or "" for choice in choices]
    return 200, [(text, REASONS[choice["finish_reason"]]) for text, choice in zip(texts, choices, strict=True)]


def show(value):
    """A short name."""
    return str(value)[:20]


@pytest.mark.parametrize(("field", "value"), CORPUS, ids=show)
def test_parameters(front, wide, field, value):
    options = {"temperature": 0.8, "seed": 3, "max_tokens": 8, "ignore_eos": True, field: value}
    expected = over_grpc(wide, "The tide", **options)
    if field == "logit_bias":
        options[field] = {str(token): bias for token, bias in value.items()}
    assert over_http(front, "/v1/completions", prompt="The tide", **options) == expected
    # A chat is another prompt; the verdict on its parameters is the same.
    conversation = over_http(front, "/v1/chat/completions", messages=user("The tide"), **options)
    assert conversation == over_grpc(wide, chat(("user", "The tide")), **{**options, field: value})


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts(front, wide, kind):
    prompt, options = PROMPTS[kind], dict(temperature=0, max_tokens=1)
    assert over_http(front, "/v1/completions", prompt=prompt, **options) == over_grpc(wide, prompt, **options)


@pytest.mark.parametrize("request_id", ["a", "y" * 256, "y" * 257, "line\nbreak", "\x00"], ids=show)
def test_request_ids(front, wide, request_id):
    options = dict(temperature=0, max_tokens=2, request_id=request_id)
    assert over_http(front, "/v1/completions", prompt="The tide", **options) == over_grpc(wide, "The tide", **options)


def test_models(front, wide):
    for model in (MODEL, "another"):
        status = over_http(front, "/v1/completions", prompt="a", max_tokens=1, model=model)[0]
        assert status == over_grpc(wide, "a", max_tokens=1, model=model)[0]


def test_an_id_that_is_in_use(narrow, narrow_front):
    stream = narrow.client.start([72, 73], max_tokens=900, ignore_eos=True, request_id="in-use").read_tokens(1)
    assert over_http(narrow_front, "/v1/completions", prompt="a", request_id="in-use")[0] == 409
    narrow.client.abort("in-use")
    stream.result()


def test_what_json_cannot_say_is_refused_by_grpc_alone(wide):
    """NaN is no JSON: there the front refuses the body; gRPC can carry it, and the door refuses it."""
    for value in (math.nan, math.inf):
        assert over_grpc(wide, "a", temperature=value)[0] == 400


def test_this_suite_compares_what_it_thinks(wide):
    """The limits that the corpus stands on."""
    assert MAX_N == 8 and wide.client.model().vocab_size == 2048 and wide.client.model().max_model_len == 1024
    with Client(wide.address) as client:
        assert list(client.inference.Generate(generate_request("The tide", temperature=0, max_tokens=1)))
