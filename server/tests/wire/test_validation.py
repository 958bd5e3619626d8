"""What is refused, with which status, and that the answer names the field."""

import math
import time

import grpc
import pytest
from client import chat, generate_request, refusal, violations
from stages import occupied
from tidemill.v1 import tidemill_pb2 as pb

NAN, INF = math.nan, math.inf
VOCABULARY = 2048  # of the built-in model; test_model_is_what_these_tests_assume

OUT_OF_RANGE = [
    *(("temperature", value) for value in (-0.01, -1, NAN, INF, -INF, 101, 3e38)),
    *(("top_p", value) for value in (0, -0.1, 1.01, NAN, INF)),
    *(("min_p", value) for value in (-0.01, 1.01, NAN, INF)),
    *(("repetition_penalty", value) for value in (0, -1, NAN, INF, 101)),
    *(("presence_penalty", value) for value in (-2.01, 2.01, NAN, INF, -INF)),
    *(("frequency_penalty", value) for value in (-2.01, 2.01, NAN, INF, -INF)),
    *(("logit_bias", value) for value in ({1: 100.1}, {1: -100.1}, {1: NAN}, {1: INF}, {VOCABULARY: 1})),
    ("logit_bias", {2**32 - 1: 1}),
    ("logit_bias", {token: 1 for token in range(1025)}),
    *(("max_tokens", value) for value in (0, 1024, 2**32 - 1)),
    *(("min_tokens", value) for value in (9, 2**32 - 1)),
    ("stop", [str(number) for number in range(17)]),
    ("stop", [""]),
    ("stop", ["x" * 257]),
    ("stop_token_ids", [VOCABULARY]),
    ("stop_token_ids", [0, 2**32 - 1]),
    ("stop_token_ids", list(range(65))),
    *(("logprobs", value) for value in (21, 2**32 - 1)),
    *(("prompt_logprobs", value) for value in (21, 2**32 - 1)),
    *(("n", value) for value in (0, 9, 2**32 - 1)),
]


def show(value):
    """A short name for a parameter."""
    text = str(value)
    return text if len(text) < 24 else f"{text[:20]}..."


def test_model_is_what_these_tests_assume(wide):
    model = wide.client.model()
    assert (model.vocab_size, model.max_model_len) == (VOCABULARY, 1024)


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE, ids=show)
def test_out_of_range(wide, field, value):
    options = {"max_tokens": 8, field: value}
    refused = violations(refusal(lambda: wide.client.run("The tide", **options)))
    assert set(refused) == {f"sampling.{field}"}
    assert all(refused.values()), "says what is wrong"


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=100, top_p=1, min_p=1, repetition_penalty=100, presence_penalty=2, frequency_penalty=-2),
        dict(temperature=0, top_p=1e-30, min_p=0, repetition_penalty=1e-30, presence_penalty=-2, frequency_penalty=2),
        dict(top_k=2**32 - 1, logprobs=20, prompt_logprobs=20, n=8, seed=2**64 - 1),
        dict(logit_bias={token: (-1) ** token * 100 for token in range(1024)}, stop_token_ids=list(range(64))),
        dict(stop=[f"{number:0>256}" for number in range(16)]),
        dict(min_tokens=8, temperature=1e-30),
    ],
    ids=["upper", "lower", "counts", "tokens", "stops", "equal"],
)
def test_the_edges_themselves_are_accepted(wide, options):
    result = wide.client.run("The tide", **{"max_tokens": 8, "request_id": "i" * 256, **options})
    assert all(completion.finish for completion in result.completions)


def test_everything_that_is_wrong_is_named_at_once(wide):
    wrong = dict(temperature=NAN, top_p=2, n=9, stop=[""], logit_bias={5000: INF})
    refused = violations(refusal(lambda: wide.client.run("The tide", **wrong)))
    assert set(refused) == {f"sampling.{field}" for field in wrong}


EMPTY = {
    "nothing": None,
    "text": "",
    "ids": [],
    "chat": chat(),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_empty_prompt(wide, kind):
    # A conversation of nothing may still render to the start of an answer, which is a prompt.
    error = refusal(lambda: wide.client.run(EMPTY[kind], max_tokens=1))
    field = {"nothing": "prompt", "ids": "prompt.token_ids"}.get(kind, f"prompt.{kind}")
    assert set(violations(error)) == {field}


@pytest.mark.parametrize("ids", [[VOCABULARY], [0, 1, 2**32 - 1], [VOCABULARY, *range(2000)]], ids=show)
def test_prompt_tokens_outside_the_vocabulary(wide, ids):
    refused = violations(refusal(lambda: wide.client.run(ids, max_tokens=1)))
    assert set(refused) == {"prompt.token_ids"} and str(VOCABULARY) in refused["prompt.token_ids"]


@pytest.mark.parametrize("prompt", ["tide " * 1024, [72] * 1024, [72] * 1025, chat(("user", "tide " * 1024))], ids=show)
def test_prompt_longer_than_the_context(wide, prompt):
    refused = violations(refusal(lambda: wide.client.run(prompt, max_tokens=1)))
    assert len(refused) == 1 and next(iter(refused)).startswith("prompt.")
    assert "1024" in str(refused), "says what would fit"


FOUR_MB = 4 << 20
HUGE = {
    "text": lambda: "tide " * (FOUR_MB // 5),
    "one word": lambda: "a" * FOUR_MB,
    "ids": lambda: [2000] * (FOUR_MB // 2),
    "chat": lambda: chat(("user", "tide " * (FOUR_MB // 5))),
}


@pytest.mark.parametrize("kind", HUGE)
def test_gigantic_prompts_are_refused_without_delay_for_others(narrow, kind):
    request = generate_request(HUGE[kind](), max_tokens=1)
    with occupied(narrow) as running:
        start = time.monotonic()
        error = refusal(lambda: next(narrow.client.inference.Generate(request)))
        assert time.monotonic() - start < 3, "refused at once"
        running.read_tokens(len(running.completions[0].ids) + 5)
    assert len(violations(error)) == 1


def test_more_than_the_transport_takes_is_refused_too(wide):
    error = refusal(lambda: wide.client.run("a" * (65 << 20), max_tokens=1))
    assert error.code() in (grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_prompt_and_completion_beyond_the_context(wide):
    refused = violations(refusal(lambda: wide.client.run([72] * 1000, max_tokens=25)))
    assert set(refused) == {"sampling.max_tokens"} and "24" in refused["sampling.max_tokens"]
    assert len(wide.client.run([72] * 1000, max_tokens=24, ignore_eos=True).ids) == 24


def test_what_the_cache_can_never_hold(cramped):
    limit = cramped.client.model().num_kv_blocks * cramped.client.model().block_size
    assert limit < 1024, "the cache must be smaller than the model's own context for this test to mean anything"
    assert cramped.client.model().max_model_len <= limit
    assert violations(refusal(lambda: cramped.client.run([72] * 10, max_tokens=limit)))
    assert violations(refusal(lambda: cramped.client.run([72] * limit, max_tokens=1)))
    fits = cramped.client.run([72] * 10, max_tokens=limit - 10, ignore_eos=True, temperature=0)
    assert len(fits.ids) == limit - 10, "what fits exactly is served"


def test_unknown_model(wide):
    error = refusal(lambda: wide.client.run("a", model="another"))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    served = wide.client.model().served_model_name
    assert served in error.details()
    assert wide.client.run("a", model=served, max_tokens=1).ids


def test_duplicate_id(narrow):
    with occupied(narrow) as running:
        error = refusal(lambda: narrow.client.run("a", request_id=running.request_id, max_tokens=1))
        assert error.code() == grpc.StatusCode.ALREADY_EXISTS
        running.read_tokens(len(running.completions[0].ids) + 5)


@pytest.mark.parametrize("request_id", ["x" * 257, "ü" * 129, "line\nbreak", "\x00", "\x1b[31m"], ids=show)
def test_request_ids_that_are_no_names(wide, request_id):
    assert set(violations(refusal(lambda: wide.client.run("a", request_id=request_id)))) == {"request_id"}


def test_stop_strings_without_text(wide):
    options = dict(stop=["x"], output=pb.OutputOptions(token_ids_only=True))
    assert set(violations(refusal(lambda: wide.client.run("a", **options)))) == {"sampling.stop"}
