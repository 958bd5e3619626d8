"""Tools through OpenAI's SDK: the model's own calls, and calls that a grammar enforces."""

import copy
import json

import jsonschema
import openai
import pytest
from front import ANSWER, MODEL, WEATHER, WEATHER_ANSWER, WEATHER_PARAMETERS, WEATHER_QUESTION, WEATHER_RESULT, user

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 999, "minimum": 0}, "b": {"type": "boolean"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
PARAMETERS = {"get_weather": WEATHER_PARAMETERS, "add": ADD["function"]["parameters"]}
CALLING = dict(model=MODEL, temperature=0, max_tokens=300)


def ask(api, content=WEATHER_QUESTION, tools=(WEATHER,), **options):
    """The first choice."""
    messages = content if isinstance(content, list) else user(content)
    return api.chat.completions.create(messages=messages, tools=list(tools), **{**CALLING, **options}).choices[0]


def assembled(api, content=WEATHER_QUESTION, tools=(WEATHER,), **options):
    """The first choice as the SDK puts it together from a stream."""
    with api.chat.completions.stream(messages=user(content), tools=list(tools), **{**CALLING, **options}) as stream:
        return stream.get_final_completion().choices[0]


def calls_of(choice):
    """Names and arguments; every call must be well-formed."""
    found = []
    for call in choice.message.tool_calls or []:
        assert call.type == "function" and call.id
        arguments = json.loads(call.function.arguments)
        jsonschema.validate(arguments, PARAMETERS[call.function.name])
        found.append((call.function.name, arguments))
    ids = [call.id for call in choice.message.tool_calls or []]
    assert len(set(ids)) == len(ids)
    return found


def test_the_models_own_call(api):
    choice = ask(api)
    assert calls_of(choice) == [("get_weather", {"city": "Paris"})]
    assert choice.finish_reason == "tool_calls" and not choice.message.content


def test_streamed(api):
    chunks = list(
        api.chat.completions.create(messages=user(WEATHER_QUESTION), tools=[WEATHER], stream=True, **CALLING)
    )
    deltas = [call for chunk in chunks for c in chunk.choices for call in c.delta.tool_calls or []]
    assert deltas[0].function.name == "get_weather" and deltas[0].id and deltas[0].index == 0
    assert all(delta.id is None and delta.function.name is None for delta in deltas[1:]), "the name comes once"
    assert json.loads("".join(delta.function.arguments or "" for delta in deltas)) == {"city": "Paris"}
    assert len(deltas) > 2, "arguments come as they are generated"
    assert not any(c.delta.content for chunk in chunks for c in chunk.choices), "nothing of the call is text"
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["tool_calls"]


def test_assembled_by_the_sdk(api):
    choice = assembled(api)
    assert calls_of(choice) == [("get_weather", {"city": "Paris"})] and choice.finish_reason == "tool_calls"


def test_the_whole_conversation(api):
    first = ask(api)
    messages = [
        *user(WEATHER_QUESTION),
        first.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": first.message.tool_calls[0].id, "content": WEATHER_RESULT},
    ]
    second = ask(api, messages)
    assert second.message.content.startswith(WEATHER_ANSWER) and second.finish_reason == "stop"
    assert not second.message.tool_calls


def test_none_is_text(api):
    choice = ask(api, tool_choice="none")
    assert not choice.message.tool_calls and choice.finish_reason == "stop" and choice.message.content
    chunks = api.chat.completions.create(
        messages=user(WEATHER_QUESTION), tools=[WEATHER], tool_choice="none", stream=True, **CALLING
    )
    assert not any(c.delta.tool_calls for chunk in chunks for c in chunk.choices)


def test_auto_may_answer_in_words(api):
    choice = ask(api, "What is a KV cache?", tool_choice="auto")
    assert choice.finish_reason in ("stop", "tool_calls")
    assert choice.message.content or choice.message.tool_calls


@pytest.mark.parametrize("temperature", [0, 1.2])
@pytest.mark.parametrize("content", ["What is a KV cache?", WEATHER_QUESTION])
def test_required(api, content, temperature):
    for seed in range(3):
        options = dict(tools=[WEATHER, ADD], tool_choice="required", temperature=temperature, seed=seed)
        choice = ask(api, content, parallel_tool_calls=False, **options)
        assert len(calls_of(choice)) == 1 and not choice.message.content
        assert choice.finish_reason == "tool_calls"
        streamed = assembled(api, content, parallel_tool_calls=False, **options)
        assert calls_of(streamed) == calls_of(choice)


@pytest.mark.parametrize("name", ["get_weather", "add"])
def test_named(api, name):
    choice = {"type": "function", "function": {"name": name}}
    for options in (dict(temperature=0), dict(temperature=1.2, seed=1)):
        answer = ask(api, "What is a KV cache?", tools=[WEATHER, ADD], tool_choice=choice, **options)
        assert [called for called, _ in calls_of(answer)] == [name]
        assert answer.finish_reason in ("stop", "tool_calls")
        streamed = assembled(api, "What is a KV cache?", tools=[WEATHER, ADD], tool_choice=choice, **options)
        assert calls_of(streamed) == calls_of(answer)


def test_allowed_tools(api):
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]},
    }
    try:
        answer = ask(api, tools=[WEATHER, ADD], tool_choice=choice)
    except openai.BadRequestError as error:
        assert error.param.startswith("tool_choice")
    else:
        assert {name for name, _ in calls_of(answer)} == {"add"}


def test_several_calls_at_once_are_well_formed(api):
    for seed in range(4):
        options = dict(tools=[WEATHER, ADD], tool_choice="required", parallel_tool_calls=True, temperature=1.4, seed=seed)
        choice = ask(api, **options, max_tokens=500)
        if choice.finish_reason == "length":
            continue
        assert calls_of(choice)
        assert calls_of(assembled(api, **options, max_tokens=500)) == calls_of(choice)


def test_several_choices(api):
    answer = api.chat.completions.create(
        messages=user(WEATHER_QUESTION), tools=[WEATHER], n=3, **{**CALLING, "temperature": 0.3}, seed=1
    )
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls or []]
    assert ids and len(set(ids)) == len(ids)
    for choice in answer.choices:
        calls_of(choice)


def test_strict_functions(api):
    strict = copy.deepcopy(ADD)
    strict["function"]["strict"] = True
    assert calls_of(ask(api, tools=[strict], tool_choice="required", parallel_tool_calls=False))


def test_a_function_without_parameters(api):
    tool = {"type": "function", "function": {"name": "now"}}
    choice = ask(api, tools=[tool], tool_choice="required", parallel_tool_calls=False)
    (call,) = choice.message.tool_calls
    assert call.function.name == "now" and isinstance(json.loads(call.function.arguments), dict)


def test_no_tools_no_calls(api):
    """Text that looks like a call, without tools, is text."""
    answer = api.chat.completions.create(
        model=MODEL,
        messages=user(),
        temperature=0,
        max_tokens=100,
        extra_body={"guided_choice": ['<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>']},
    )
    assert not answer.choices[0].message.tool_calls
    assert "get_weather" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert ask(api, "What is a KV cache?", tools=[], tool_choice="none").message.content == ANSWER


@pytest.mark.parametrize(
    ("options", "param"),
    [
        (dict(tool_choice="required", tools=[]), "tool_choice"),
        (dict(tool_choice="sometimes"), "tool_choice"),
        (dict(tool_choice={"type": "function", "function": {"name": "unknown"}}), "tool_choice"),
        (dict(tools=[{"type": "function"}]), "tools"),
        (dict(tools=[{"type": "function", "function": {"name": ""}}]), "tools"),
        (dict(tools=[{"type": "function", "function": {"name": "a b\n"}}]), "tools"),
        (dict(tools=[{"type": "no such tool"}]), "tools"),
        (dict(tools=[{"type": "function", "function": {"name": "a", "parameters": {"type": "nonsense"}}}],
              tool_choice="required"), "tools"),
        (dict(tools="a"), "tools"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_refused(api, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, **options)
    assert caught.value.param.startswith(param), caught.value.body
