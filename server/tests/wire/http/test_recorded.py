"""Bytes of replies as `curl --no-buffer` shows them, compared with recorded shapes.

SDKs forgive much; other clients parse these bytes by hand. What differs from run to run (ids, times) is replaced by a word.
After a wanted change: WIRE_RECORD=1 scripts/wire-test http/test_recorded.py, and read the difference.
"""

import os
import re
from pathlib import Path

import pytest
from front import MODEL, WEATHER, WEATHER_PARAMETERS, WEATHER_QUESTION, user

RECORDED = Path(__file__).with_name("recorded")
SHORT = {"model": MODEL, "messages": user(), "temperature": 0, "max_tokens": 4}
CALLING = {"model": MODEL, "messages": user(WEATHER_QUESTION), "temperature": 0, "max_tokens": 100}
TOOL = {"name": "get_weather", "description": "Get the weather for a city", "input_schema": WEATHER_PARAMETERS}
FUNCTION = {"type": "function", **WEATHER["function"]}
CASES = {
    "chat": ("/v1/chat/completions", SHORT),
    "chat_stream": ("/v1/chat/completions", {**SHORT, "stream": True}),
    "chat_stream_usage": (
        "/v1/chat/completions",
        {**SHORT, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "max_tokens": 2},
    ),
    "chat_tools": ("/v1/chat/completions", {**CALLING, "tools": [WEATHER]}),
    "chat_tools_stream": ("/v1/chat/completions", {**CALLING, "tools": [WEATHER], "stream": True}),
    "completions": ("/v1/completions", {"model": MODEL, "prompt": "The tide", "temperature": 0, "max_tokens": 3}),
    "completions_stream": (
        "/v1/completions",
        {"model": MODEL, "prompt": "The tide", "temperature": 0, "max_tokens": 3, "stream": True},
    ),
    "messages": ("/v1/messages", SHORT),
    "messages_stream": ("/v1/messages", {**SHORT, "stream": True}),
    "messages_tools_stream": ("/v1/messages", {**CALLING, "tools": [TOOL], "stream": True}),
    "responses": (
        "/v1/responses",
        {"model": MODEL, "input": "What is a KV cache?", "temperature": 0, "max_output_tokens": 4},
    ),
    "responses_stream": (
        "/v1/responses",
        {"model": MODEL, "input": "What is a KV cache?", "temperature": 0, "max_output_tokens": 4, "stream": True},
    ),
    "responses_tools_stream": (
        "/v1/responses",
        {
            "model": MODEL,
            "input": WEATHER_QUESTION,
            "temperature": 0,
            "max_output_tokens": 100,
            "tools": [FUNCTION],
            "stream": True,
        },
    ),
    "predict": ("/predict", {"messages": user(), "do_sample": False, "max_new_tokens": 4}),
    "predict_stream": ("/predict", {"messages": user(), "do_sample": False, "max_new_tokens": 4, "stream": True}),
    "error_openai": ("/v1/chat/completions", {**SHORT, "temperature": -1}),
    "error_anthropic": ("/v1/messages", {**SHORT, "temperature": -1}),
    "error_plain": ("/predict", {"prompt": "a", "temperature": -1}),
}
CHANGING = [
    (r'"(id|item_id|call_id|response_id|request_id|tool_call_id)":"[^"]*"', r'"\1":"ID"'),
    (r'"(created|created_at|completed_at)":\d+(\.\d+)?', r'"\1":TIME'),
    # How much of a prompt is cached depends on what was asked before.
    (r'"(cached_tokens|cache_read_input_tokens|cache_creation_input_tokens|input_tokens)":\d+', r'"\1":COUNT'),
    # The last digits of a logarithm depend on the machine's arithmetic.
    (r'"logprob":-?\d[^,}]*', r'"logprob":LOGPROB'),
    (r'"system_fingerprint":"[^"]*"', r'"system_fingerprint":"FINGERPRINT"'),
    (r"(?im)^(date|x-request-id|request-id|content-length): [^\r\n]*", r"\1: ..."),
]


def without_changing(body):
    """A body with words instead of what differs from run to run."""
    for pattern, word in CHANGING:
        body = re.sub(pattern, word, body)
    return body


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_as_recorded(front, name):
    path, body = CASES[name]
    said = without_changing(front.curl(path, body, "--include").decode()).replace("\r\n", "\n")
    file = RECORDED / f"{name}.txt"
    if os.environ.get("WIRE_RECORD"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(said)
    assert said == file.read_text()


def test_nothing_is_recorded_that_no_case_makes():
    assert {file.stem for file in RECORDED.glob("*.txt")} == set(CASES)


def test_heads_of_streams(front):
    """What proxies need to know not to hold a stream back."""
    said = front.curl("/v1/chat/completions", {**SHORT, "stream": True}, "--include").decode().lower()
    head = said.split("\r\n\r\n")[0]
    assert "content-type: text/event-stream" in head and "cache-control: no-cache" in head
    assert "content-length" not in head
