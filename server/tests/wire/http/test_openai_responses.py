"""Responses through OpenAI's SDK: created, streamed, stored, continued, cancelled and deleted."""

import json
import time

import jsonschema
import openai
import pydantic
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
)

GREEDY = dict(model=MODEL, temperature=0, max_output_tokens=100)
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather for a city",
    "parameters": WEATHER_PARAMETERS,
    "strict": False,
}
ENDLESS = dict(input="The tide", max_output_tokens=1000, extra_body={"ignore_eos": True})


def respond(api, input=QUESTION, **options):
    """A response."""
    return api.responses.create(input=input, **{**GREEDY, **options})


def calls_of(response):
    """Function calls among the output."""
    return [item for item in response.output if item.type == "function_call"]


def test_one_response(api):
    response = respond(api)
    assert (response.object, response.status, response.model) == ("response", "completed", MODEL)
    assert response.id.startswith("resp_") and response.created_at
    assert response.output_text == ANSWER
    (item,) = response.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed") and item.id
    assert [part.type for part in item.content] == ["output_text"]
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens) == (PROMPT_TOKENS, ANSWER_TOKENS)
    assert usage.total_tokens == PROMPT_TOKENS + ANSWER_TOKENS
    assert usage.input_tokens_details.cached_tokens >= 0 and usage.output_tokens_details.reasoning_tokens == 0
    assert response.error is None and response.incomplete_details is None


EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def without_repeats(kinds):
    """Neighbours that are equal count once."""
    return [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]


def test_a_stream(api):
    events = list(respond(api, stream=True))
    assert without_repeats([event.type for event in events]) == EVENTS
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == ANSWER and len(deltas) > ANSWER_TOKENS / 2
    item = next(event.item for event in events if event.type == "response.output_item.done")
    assert {event.item_id for event in deltas} == {item.id}
    assert next(event.text for event in events if event.type == "response.output_text.done") == ANSWER
    final = events[-1].response
    assert (final.status, final.output_text) == ("completed", ANSWER) and final.usage.output_tokens == ANSWER_TOKENS
    assert events[0].response.id == final.id and events[0].response.status == "in_progress"


def test_the_sdks_own_accumulator(api):
    with api.responses.stream(input=QUESTION, **GREEDY) as stream:
        final = stream.get_final_response()
    assert final.output_text == ANSWER


def test_instructions_and_items(api):
    plain = respond(api, instructions="You are a helpful assistant.")
    items = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
    ]
    assert respond(api, items).usage.input_tokens == plain.usage.input_tokens
    assert respond(api, items).output_text == plain.output_text
    assert plain.instructions == "You are a helpful assistant."


def test_length(api):
    response = respond(api, max_output_tokens=5)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert ANSWER.startswith(response.output_text) and response.usage.output_tokens == 5
    events = list(respond(api, max_output_tokens=5, stream=True))
    assert events[-1].type == "response.incomplete"


def test_stored_and_retrieved(api):
    response = respond(api, metadata={"a": "b"})
    again = api.responses.retrieve(response.id)
    assert again.model_dump() == response.model_dump()
    assert again.metadata == {"a": "b"}
    items = api.responses.input_items.list(response.id).data
    assert [(item.role, item.content[0].text) for item in items] == [("user", QUESTION)]


def test_not_stored(api):
    response = respond(api, store=False)
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(response.id)


def test_deleted(api):
    response = respond(api)
    api.responses.delete(response.id)
    for call in (api.responses.retrieve, api.responses.delete, api.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            call(response.id)
    with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
        respond(api, previous_response_id=response.id)


def test_streamed_ones_are_stored_too(api):
    events = list(respond(api, stream=True))
    assert api.responses.retrieve(events[-1].response.id).output_text == ANSWER


def test_continued(api):
    first = respond(api, "What is prefill?")
    second = respond(api, QUESTION, previous_response_id=first.id)
    assert second.previous_response_id == first.id
    by_hand = respond(
        api,
        [
            {"role": "user", "content": "What is prefill?"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": QUESTION},
        ],
    )
    assert second.usage.input_tokens == by_hand.usage.input_tokens
    assert second.output_text == by_hand.output_text
    third = respond(api, "And prefill?", previous_response_id=second.id)
    assert third.usage.input_tokens > second.usage.input_tokens


def test_instructions_are_not_inherited(api):
    first = respond(api, "What is prefill?", instructions="You are a very long winded assistant of many words.")
    second = respond(api, QUESTION, previous_response_id=first.id)
    plain = respond(api, QUESTION, previous_response_id=respond(api, "What is prefill?").id)
    assert second.instructions is None
    if first.output_text == respond(api, "What is prefill?").output_text:
        assert second.usage.input_tokens == plain.usage.input_tokens


def test_background_is_cancelled(api, wide):
    response = respond(api, background=True, **ENDLESS)
    assert response.status in ("queued", "in_progress") and response.background
    cancelled = api.responses.cancel(response.id)
    assert cancelled.status in ("cancelled", "completed", "incomplete")
    wide.wait_until_idle()
    assert api.responses.retrieve(response.id).status == cancelled.status


def test_background_on_the_narrow_server_is_cancelled_for_certain(narrow_front, narrow):
    with narrow_front.openai() as api:
        response = respond(api, background=True, **ENDLESS)
        narrow.wait_for_stats(lambda stats: stats.num_requests_running == 1, "it runs")
        assert api.responses.retrieve(response.id).status == "in_progress"
        assert api.responses.cancel(response.id).status == "cancelled"
        narrow.wait_until_idle()
        assert api.responses.retrieve(response.id).status == "cancelled"


def test_background_finishes(api):
    response = respond(api, background=True)
    end = time.monotonic() + 10
    while (now := api.responses.retrieve(response.id)).status in ("queued", "in_progress"):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert (now.status, now.output_text) == ("completed", ANSWER)


def test_what_is_not_in_the_background_cannot_be_cancelled(api):
    response = respond(api)
    with pytest.raises(openai.BadRequestError):
        api.responses.cancel(response.id)


def test_a_deleted_background_response_stops(narrow_front, narrow):
    with narrow_front.openai() as api:
        response = respond(api, background=True, **ENDLESS)
        narrow.wait_for_stats(lambda stats: stats.num_requests_running == 1, "it runs")
        api.responses.delete(response.id)
        narrow.wait_until_idle()


class Person(pydantic.BaseModel):
    """Somebody."""

    name: str
    age: int


ROSA = "Give me JSON with the name Rosa and the age 31."


def test_json_schema(api):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 9}, "size": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["city", "size"],
        "additionalProperties": False,
    }
    text = {"format": {"type": "json_schema", "name": "town", "schema": schema, "strict": True}}
    for seed in range(3):
        response = respond(api, ROSA, text=text, temperature=1.2, extra_body={"seed": seed})
        assert response.status == "completed"
        jsonschema.validate(json.loads(response.output_text), schema)
    assert isinstance(json.loads(respond(api, ROSA, text={"format": {"type": "json_object"}}).output_text), dict)


def test_pydantic(api):
    response = api.responses.parse(input=ROSA, text_format=Person, **GREEDY)
    assert response.output_parsed == Person(name="Rosa", age=31)


def test_function_calls(api):
    response = respond(api, WEATHER_QUESTION, tools=[WEATHER])
    (call,) = calls_of(response)
    assert (call.name, json.loads(call.arguments), call.status) == ("get_weather", {"city": "Paris"}, "completed")
    assert call.call_id and call.id and not response.output_text
    items = [
        {"role": "user", "content": WEATHER_QUESTION},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": WEATHER_RESULT},
    ]
    assert respond(api, items, tools=[WEATHER]).output_text.startswith(WEATHER_ANSWER)
    continued = respond(api, items[-1:], tools=[WEATHER], previous_response_id=response.id)
    assert continued.output_text.startswith(WEATHER_ANSWER)


def test_function_calls_streamed(api):
    events = list(respond(api, WEATHER_QUESTION, tools=[WEATHER], stream=True))
    kinds = without_repeats([event.type for event in events])
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert json.loads("".join(deltas)) == json.loads(done.arguments) == {"city": "Paris"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}], ids=str)
def test_forced_calls(api, choice):
    response = respond(api, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)
    (call,) = calls_of(response)
    jsonschema.validate(json.loads(call.arguments), WEATHER_PARAMETERS)


def test_no_calls(api):
    assert not calls_of(respond(api, WEATHER_QUESTION, tools=[WEATHER], tool_choice="none"))


@pytest.mark.parametrize(
    ("options", "param"),
    [
        (dict(previous_response_id="resp_unknown"), "previous_response_id"),
        (dict(tools=[{"type": "web_search"}]), "tools"),
        (dict(tools=[{"type": "file_search", "vector_store_ids": ["a"]}]), "tools"),
        (dict(input=[{"role": "user", "content": [{"type": "input_image", "image_url": "http://a/b.png"}]}]), "input"),
        (dict(input=[]), "input"),
        (dict(input=[{"type": "item_reference", "id": "no_such_item"}]), "input"),
        (dict(temperature=-1), "temperature"),
        (dict(max_output_tokens=0), "max_output_tokens"),
        (dict(text={"format": {"type": "nonsense"}}), "text"),
        (dict(tool_choice="required"), "tool_choice"),
        (dict(conversation="conv_1"), "conversation"),
        (dict(background=True, store=False), "background"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_refused(api, options, param):
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        respond(api, **{"input": QUESTION, **options})
    assert caught.value.param and caught.value.param.startswith(param), caught.value.body


@pytest.mark.parametrize("method", ["retrieve", "cancel", "delete"])
def test_unknown_ids(api, method):
    with pytest.raises(openai.NotFoundError) as caught:
        getattr(api.responses, method)("resp_unknown")
    assert "resp_unknown" in caught.value.message


def test_stored_responses_belong_to_their_credential(front):
    """Without keys everybody is the same client; the path must still not lead elsewhere."""
    for path in ("/v1/responses/..%2f..%2fmetrics", "/v1/responses/%00", "/v1/responses/" + "a" * 5000):
        assert front.get(path).status_code in (400, 404, 414, 431)
