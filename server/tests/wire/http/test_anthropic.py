"""Messages through Anthropic's own SDK."""

import json

import anthropic
import jsonschema
import pytest
from front import (
    ANSWER,
    ANSWER_TOKENS,
    MODEL,
    PROMPT_TOKENS,
    QUESTION,
    WEATHER_ANSWER,
    WEATHER_PARAMETERS,
    WEATHER_QUESTION,
    WEATHER_RESULT,
    user,
)
from server_process import API_KEY
from stages import occupied

# What the newest models of Anthropic's do not take any more, its SDK passes on only when it is asked to.
GREEDY = dict(model=MODEL, max_tokens=100, extra_body={"temperature": 0})
TOOL = {"name": "get_weather", "description": "Get the weather for a city", "input_schema": WEATHER_PARAMETERS}


def ask(claude, content=QUESTION, **options):
    """A message."""
    messages = content if isinstance(content, list) else user(content)
    sampling = {name: options.pop(name) for name in ("temperature", "top_p", "top_k") if name in options}
    extra = {**GREEDY["extra_body"], **sampling, **options.pop("extra_body", {})}
    return claude.messages.create(messages=messages, **{**GREEDY, **options, "extra_body": extra})


def text(message):
    """Its text blocks."""
    return "".join(block.text for block in message.content if block.type == "text")


def calls_of(message):
    """Its tool calls."""
    return [block for block in message.content if block.type == "tool_use"]


def test_one_message(claude):
    message = ask(claude)
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL) and message.id
    assert [block.type for block in message.content] == ["text"] and text(message) == ANSWER
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage = message.usage
    cached = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    assert usage.input_tokens + cached == PROMPT_TOKENS and usage.output_tokens == ANSWER_TOKENS


def test_a_stream(claude):
    events = list(ask(claude, stream=True))
    kinds = [event.type for event in events if event.type != "ping"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"} and len(kinds) > ANSWER_TOKENS / 2
    start = next(event.message for event in events if event.type == "message_start")
    assert start.content == [] and start.stop_reason is None and start.usage.input_tokens > 0
    deltas = [event for event in events if event.type == "content_block_delta"]
    assert {(event.index, event.delta.type) for event in deltas} == {(0, "text_delta")}
    assert "".join(event.delta.text for event in deltas) == ANSWER
    end = next(event for event in events if event.type == "message_delta")
    assert end.delta.stop_reason == "end_turn" and end.usage.output_tokens == ANSWER_TOKENS


def test_the_sdks_own_accumulator(claude):
    with claude.messages.stream(messages=user(), **GREEDY) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == ANSWER == text(final)
    assert final.usage.output_tokens == ANSWER_TOKENS and final.stop_reason == "end_turn"


def test_stop_sequences(claude):
    for message in (
        ask(claude, stop_sequences=["no such text", "values"]),
        claude.messages.stream(messages=user(), stop_sequences=["no such text", "values"], **GREEDY)
        .__enter__()
        .get_final_message(),
    ):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "values")
        assert text(message) == ANSWER.split("values")[0]


def test_length(claude):
    message = ask(claude, max_tokens=5)
    assert message.stop_reason == "max_tokens" and message.usage.output_tokens == 5
    assert ANSWER.startswith(text(message))


def test_system_and_blocks(claude):
    plain = ask(claude, system="You are a helpful assistant.")
    blocks = ask(
        claude,
        [{"role": "user", "content": [{"type": "text", "text": QUESTION, "cache_control": {"type": "ephemeral"}}]}],
        system=[{"type": "text", "text": "You are a helpful assistant."}],
    )
    assert text(plain) == text(blocks) == ANSWER
    count = claude.messages.count_tokens(model=MODEL, messages=user(), system="You are a helpful assistant.")
    assert count.input_tokens > PROMPT_TOKENS


def test_conversations(claude):
    messages = [*user("What is prefill?"), {"role": "assistant", "content": "A step."}, *user()]
    assert text(ask(claude, messages)) == ANSWER


def test_prefilled_answers_are_continued(claude):
    begun = ANSWER[:40].rstrip()
    message = ask(claude, [*user(), {"role": "assistant", "content": begun}])
    assert begun + text(message) == ANSWER


def test_sampling(claude):
    greedy = text(ask(claude, extra_body={"top_k": 1, "temperature": 1}))
    assert greedy == ANSWER
    assert text(ask(claude, metadata={"user_id": "someone"}, service_tier="auto")) == ANSWER


def test_count_tokens(claude):
    assert claude.messages.count_tokens(model=MODEL, messages=user()).input_tokens == PROMPT_TOKENS
    with_tools = claude.messages.count_tokens(model=MODEL, messages=user(WEATHER_QUESTION), tools=[TOOL]).input_tokens
    message = ask(claude, WEATHER_QUESTION, tools=[TOOL])
    usage = message.usage
    assert with_tools == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_tool_call_and_its_result(claude):
    message = ask(claude, WEATHER_QUESTION, tools=[TOOL])
    (call,) = calls_of(message)
    assert (call.name, call.input, message.stop_reason) == ("get_weather", {"city": "Paris"}, "tool_use") and call.id
    assert not text(message)
    messages = [
        *user(WEATHER_QUESTION),
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in message.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": WEATHER_RESULT}]},
    ]
    answer = ask(claude, messages, tools=[TOOL])
    assert text(answer).startswith(WEATHER_ANSWER) and answer.stop_reason == "end_turn"
    messages[-1]["content"][0]["content"] = [{"type": "text", "text": WEATHER_RESULT}]
    assert text(ask(claude, messages, tools=[TOOL])) == text(answer)


def test_a_tool_call_streamed(claude):
    events = [event for event in ask(claude, WEATHER_QUESTION, tools=[TOOL], stream=True) if event.type != "ping"]
    start = next(event for event in events if event.type == "content_block_start")
    assert (start.content_block.type, start.content_block.name, start.content_block.input) == ("tool_use", "get_weather", {})
    pieces = [event.delta for event in events if event.type == "content_block_delta"]
    assert {piece.type for piece in pieces} == {"input_json_delta"} and len(pieces) > 1
    assert json.loads("".join(piece.partial_json for piece in pieces)) == {"city": "Paris"}
    assert next(event.delta.stop_reason for event in events if event.type == "message_delta") == "tool_use"
    with claude.messages.stream(messages=user(WEATHER_QUESTION), tools=[TOOL], **GREEDY) as stream:
        (call,) = calls_of(stream.get_final_message())
    assert call.input == {"city": "Paris"}


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=str)
def test_forced_calls(claude, choice):
    for seed in range(2):
        options = dict(tools=[TOOL], tool_choice={**choice, "disable_parallel_tool_use": True}, temperature=seed)
        message = ask(claude, max_tokens=300, **options)
        (call,) = calls_of(message)
        jsonschema.validate(call.input, WEATHER_PARAMETERS)
        assert message.stop_reason == "tool_use"


def test_no_calls(claude):
    message = ask(claude, WEATHER_QUESTION, tools=[TOOL], tool_choice={"type": "none"})
    assert not calls_of(message) and message.stop_reason == "end_turn"


def test_thinking_that_this_model_does_not_do(claude):
    """Refused by name or answered without thoughts; never an answer that pretends."""
    try:
        message = ask(claude, max_tokens=1000, thinking={"type": "enabled", "budget_tokens": 16}, temperature=1)
    except anthropic.BadRequestError as error:
        assert "thinking" in error.message
    else:
        assert [block.type for block in message.content] == ["text"]
    assert text(ask(claude, thinking={"type": "disabled"})) == ANSWER


def error_of(caught):
    """The error that the reply says, in the family's shape."""
    body = caught.value.body
    assert body["type"] == "error" and body["request_id"]
    assert caught.value.response.headers["request-id"] == body["request_id"] == caught.value.request_id
    return body["error"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(temperature=-1), "temperature"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(max_tokens=100_000), "max_tokens"),
        (dict(top_p=2), "top_p"),
        (dict(stop_sequences=[""]), "stop_sequences"),
        (dict(content=[]), "messages"),
        (dict(content=[{"role": "nobody", "content": "a"}]), "messages"),
        (dict(content=[{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://a/b"}}]}]),
         "image"),
        (dict(content=[{"role": "user", "content": [{"type": "no such block"}]}]), "messages"),
        (dict(tools=[{"name": "a b", "input_schema": {}}]), "tools"),
        (dict(tools=[{"type": "web_search_20250305", "name": "web_search"}]), "tools"),
        (dict(tool_choice={"type": "any"}), "tool"),
        (dict(tools=[TOOL], tool_choice={"type": "tool", "name": "unknown"}), "tool_choice"),
        (dict(content="tide " * 2000), "1024"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_bad_requests(claude, options, word):
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(claude, **options)
    error = error_of(caught)
    assert error["type"] == "invalid_request_error" and word in error["message"], error


def test_max_tokens_is_required(front):
    answer = front.post("/v1/messages", {"model": MODEL, "messages": user()})
    assert answer.status_code == 400 and "max_tokens" in answer.json()["error"]["message"]


def test_another_model(claude):
    with pytest.raises(anthropic.NotFoundError) as caught:
        ask(claude, model="no-such-model")
    assert error_of(caught)["type"] == "not_found_error"


def test_authentication(keyed_front):
    with keyed_front.anthropic(api_key="wrong") as stranger, pytest.raises(anthropic.AuthenticationError) as caught:
        ask(stranger)
    assert error_of(caught)["type"] == "authentication_error"
    with keyed_front.anthropic() as client:
        assert text(ask(client)) == ANSWER
    with keyed_front.anthropic(api_key=None, auth_token=API_KEY) as client:
        assert text(ask(client)) == ANSWER


def test_overload(narrow_front, narrow):
    with occupied(narrow), narrow_front.anthropic() as client:
        waiting = [narrow.client.start("The tide", max_tokens=2) for _ in range(4)]
        narrow.wait_for_stats(lambda stats: stats.num_requests_waiting == 4, "the queue is full")
        with pytest.raises(anthropic.RateLimitError) as caught:
            ask(client)
        assert error_of(caught)["type"] == "rate_limit_error"
        assert 0 < int(caught.value.response.headers["retry-after"]) <= 60
        for stream in waiting:
            stream.cancel()


def test_too_large(claude):
    with pytest.raises(anthropic.APIStatusError) as caught:
        ask(claude, "a" * (5 << 20))
    assert caught.value.status_code == 413 and error_of(caught)["type"] == "request_too_large"
