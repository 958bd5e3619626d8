"""Tokens and aborts through `requests`."""

import pytest
from front import ENDLESS, MODEL, PROMPT_TOKENS, WEATHER, WEATHER_QUESTION, user
from stages import occupied

TEXTS = ["The tide", "Größe, naïveté, 東京, 🦀", "<|im_start|>", " ", "a" * 1000, "line\nbreak\ttab"]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:12])
def test_there_and_back(front, wide, text):
    answer = front.post("/tokenize", {"model": MODEL, "prompt": text}).json()
    assert answer["tokens"] == list(wide.client.tokenize(text).token_ids)
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 1024
    back = front.post("/detokenize", {"model": MODEL, "tokens": answer["tokens"]}).json()
    assert back["prompt"] == text, "special tokens stand in the text unless they are not wanted"
    bare = front.post("/detokenize", {"tokens": answer["tokens"], "skip_special_tokens": True}).json()
    assert bare["prompt"] == wide.client.detokenize(answer["tokens"])


def test_conversations(front):
    plain = front.post("/tokenize", {"messages": user()}).json()
    assert plain["count"] == PROMPT_TOKENS
    without = front.post("/tokenize", {"messages": user(), "add_generation_prompt": False}).json()
    assert without["count"] < PROMPT_TOKENS and plain["tokens"][: without["count"]] == without["tokens"]
    tools = front.post("/tokenize", {"messages": user(WEATHER_QUESTION), "tools": [WEATHER]}).json()
    asked = front.chat(WEATHER_QUESTION, tools=[WEATHER], max_tokens=1)
    assert tools["count"] == asked["usage"]["prompt_tokens"]


def test_token_strings(front):
    answer = front.post("/tokenize", {"prompt": "The tide", "return_token_strs": True})
    if answer.status_code == 400:
        assert "return_token_strs" in answer.json()["error"]
    else:
        assert len(answer.json()["token_strs"]) == answer.json()["count"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"prompt": "a", "messages": user()}),
        ("/tokenize", {"messages": "a"}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [5000]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [1.5]}),
        ("/detokenize", {"tokens": "a"}),
        ("/abort", {}),
        ("/abort", {"request_id": ""}),
        ("/abort", {"request_id": "x" * 257}),
        ("/abort", {"request_id": 5}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused(front, path, body):
    answer = front.post(path, body)
    assert answer.status_code == 400 and answer.json()["error"], answer.text


def test_another_model(front):
    for path, body in [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})]:
        assert front.post(path, {"model": "no-such-model", **body}).status_code == 404


def test_receipts(narrow, narrow_front):
    with occupied(narrow) as running:
        receipt = narrow_front.post("/abort", {"request_id": running.request_id}).json()
    assert receipt["request_id"] == running.request_id and receipt["stage"] == "decode"
    assert receipt["rows_freed"] == 1 and receipt["blocks_freed"] >= 1 and receipt["completion_tokens"] >= 1
    assert 0 <= receipt["seconds_to_free"] < 1
    again = narrow_front.post("/abort", {"request_id": running.request_id}).json()
    assert (again["stage"], again["rows_freed"], again["blocks_freed"]) == ("finished", 0, 0)


def test_of_a_queued_request(narrow, narrow_front):
    with occupied(narrow):
        waiting = narrow.client.start("The tide", max_tokens=2, request_id="waits")
        narrow.wait_for_stats(lambda stats: stats.num_requests_waiting == 1, "it waits")
        receipt = narrow_front.post("/abort", {"request_id": "waits"}).json()
        assert (receipt["stage"], receipt["rows_freed"]) == ("queued", 0)
        assert not waiting.result().ids


def test_of_nobody(front):
    receipt = front.post("/abort", {"request_id": "never seen"}).json()
    assert receipt["stage"] == "unknown" and receipt["rows_freed"] == 0


def test_of_an_sdks_request_by_the_id_of_its_answer(narrow, narrow_front):
    with narrow_front.openai() as client:
        stream = client.chat.completions.create(model=MODEL, messages=user(), stream=True, **ENDLESS)
        answer_id = next(iter(stream)).id
        receipt = narrow_front.post("/abort", {"request_id": answer_id}).json()
        assert receipt["stage"] in ("prefill", "decode") and receipt["rows_freed"] == 1
        reasons = [c.finish_reason for chunk in stream for c in chunk.choices if c.finish_reason]
    assert reasons == ["abort"]


def test_of_several_prompts_that_are_one_request(narrow, narrow_front):
    """By the name of the request, and by the id of its answer, all of them end."""
    for name in ("several", "cmpl-several"):
        with narrow_front.wire() as wire:
            body = {"model": MODEL, "prompt": ["a", "b", "c"], "max_tokens": 900, "ignore_eos": True, "stream": True}
            wire.post("/v1/completions", {**body, "request_id": "several"})
            wire.read_until(b"data: ")
            # A second one of the same name is refused, and does not hide the first.
            again = narrow_front.post("/v1/completions", {**body, "request_id": "several", "stream": False})
            assert again.status_code == 409
            receipt = narrow_front.post("/abort", {"request_id": name}).json()
            assert receipt["stage"] in ("prefill", "decode") and receipt["rows_freed"] == 1
            assert wire.read_until(b"[DONE]").count(b'"finish_reason":"abort"') == 3
        narrow.wait_until_idle()
