"""`response_format`: whatever the model would like to say, a finished answer validates against its schema."""

import json
import random

import jsonschema
import openai
import pydantic
import pytest
from front import MODEL, user

ROSA = "Give me JSON with the name Rosa and the age 31."


def form(schema, strict=True, name="answer"):
    """A response_format."""
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": strict}}


def ask(api, response_format, content=ROSA, **options):
    """The text of a finished answer."""
    options = {"temperature": 0, "max_tokens": 400, **options}
    answer = api.chat.completions.create(
        model=MODEL, messages=user(content), response_format=response_format, **options
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop", choice
    return choice.message.content


def object_of(**properties):
    """A strict object schema."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


NODE = {
    "$defs": {
        "node": object_of(name={"type": "string", "maxLength": 5}, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})
    },
    "$ref": "#/$defs/node",
}
SCHEMAS = {
    "person": object_of(name={"type": "string", "maxLength": 20}, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "enum": object_of(colour={"enum": ["red", "green", 3, None]}, sure={"type": "boolean"}),
    "const": object_of(kind={"const": "tide"}),
    "nested": object_of(outer=object_of(inner=object_of(x={"type": "integer", "maximum": 99, "minimum": -99}))),
    "array": object_of(numbers={"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2,
                                "maxItems": 4}),
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "union": object_of(value={"anyOf": [{"type": "boolean"}, {"type": "null"}, object_of(x={"type": "boolean"})]}),
    "pattern": object_of(code={"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}),
    "date": object_of(day={"type": "string", "format": "date"}),
    "number": object_of(x={"type": "number", "minimum": 0, "maximum": 1}),
    "escapes": object_of(**{'a "quoted" key': {"const": 'back\\slash "and" \n line, ü, 東京'}}),
    "no keys": object_of(),
    "array at the top": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    "text at the top": {"type": "string", "maxLength": 8},
    "recursive": NODE,
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_finished_answers_validate(api, name):
    schema = SCHEMAS[name]
    for temperature, seed in [(0, 0), (1, 1), (1.5, 2)]:
        try:
            said = ask(api, form(schema), temperature=temperature, seed=seed)
        except AssertionError as error:
            assert name == "recursive" and "length" in str(error), "only what may be endless may run out of tokens"
            continue
        jsonschema.validate(json.loads(said), schema, format_checker=jsonschema.FormatChecker())


def test_random_schemas(api):
    """Schemas that nobody thought of."""
    draw = random.Random(20)

    def schema(depth):
        kind = draw.choice(["boolean", "null", "integer", "string", "enum", "object", "array"][: 5 if depth == 0 else 7])
        if kind == "integer":
            low = draw.randrange(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + draw.randrange(100)}
        if kind == "string":
            return {"type": "string", "maxLength": draw.randrange(1, 6)}
        if kind == "enum":
            return {"enum": draw.sample(["a", "ü", 'q"', 1, 2.5, True, None], 3)}
        if kind == "object":
            return object_of(**{f"k{i}": schema(depth - 1) for i in range(draw.randrange(1, 4))})
        if kind == "array":
            return {"type": "array", "items": schema(depth - 1), "minItems": 1, "maxItems": 2}
        return {"type": kind}

    for seed in range(20):
        wanted = object_of(value=schema(2))
        said = ask(api, form(wanted), temperature=1.2, seed=seed, max_tokens=700)
        jsonschema.validate(json.loads(said), wanted)


def test_json_object(api):
    for temperature in (0, 1):
        said = ask(api, {"type": "json_object"}, temperature=temperature, seed=4)
        assert isinstance(json.loads(said), dict)
    assert json.loads(ask(api, {"type": "json_object"})) == {"name": "Rosa", "age": 31}, "what it would say anyway stays"


def test_text(api):
    assert ask(api, {"type": "text"}) == '{"name": "Rosa", "age": 31}'


def test_streamed_and_several(api):
    schema = SCHEMAS["person"]
    options = dict(model=MODEL, messages=user(ROSA), response_format=form(schema), temperature=1, seed=3, n=4)
    answer = api.chat.completions.create(**options, max_tokens=300)
    said = [choice.message.content for choice in answer.choices]
    pieces = [""] * 4
    for chunk in api.chat.completions.create(**options, max_tokens=300, stream=True):
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
    assert pieces == said
    for text in said:
        jsonschema.validate(json.loads(text), schema)


class Person(pydantic.BaseModel):
    """Somebody."""

    name: str
    age: int


def test_pydantic(api):
    answer = api.chat.completions.parse(
        model=MODEL, messages=user(ROSA), response_format=Person, temperature=0, max_tokens=300
    )
    assert answer.choices[0].message.parsed == Person(name="Rosa", age=31)


def test_pydantic_streamed(api):
    with api.chat.completions.stream(
        model=MODEL, messages=user(ROSA), response_format=Person, temperature=0, max_tokens=300
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == Person(name="Rosa", age=31)


def test_cut_off_by_length(api):
    answer = api.chat.completions.create(
        model=MODEL, messages=user(ROSA), response_format=form(SCHEMAS["person"]), temperature=0, max_tokens=3
    )
    assert answer.choices[0].finish_reason == "length"
    assert '{"name": "Rosa", "age": 31}'.replace(" ", "").startswith(answer.choices[0].message.content.replace(" ", ""))


@pytest.mark.parametrize("seed", range(3))
def test_others_are_not_disturbed(api, wide, seed):
    """A grammar is a mask on its own row: whoever shares the batch has the same tokens as alone."""
    plain = dict(prompt="The tide", temperature=1, seed=seed, max_tokens=120, ignore_eos=True)
    alone = wide.client.run(**plain).tokens
    stream = wide.client.start(**plain)
    ask(api, form(SCHEMAS["nested"]), temperature=1, seed=seed)
    assert stream.result().tokens == alone


@pytest.mark.parametrize(
    ("response_format", "param"),
    [
        (form({"type": "no such type"}), "response_format"),
        (form({"type": "object", "properties": 5}), "response_format"),
        (form("nonsense"), "response_format"),
        ({"type": "json_schema"}, "response_format"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format"),
        ({"type": "nonsense"}, "response_format"),
        ("json", "response_format"),
        (form({"$ref": "http://127.0.0.1:1/schema.json"}), "response_format"),
        (form({"$ref": "#/$defs/missing"}), "response_format"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused(api, response_format, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, response_format)
    assert caught.value.param.startswith(param)


def test_schemas_made_to_hurt(api, front):
    """Refused or served, but soon, and without harm to anybody."""
    deep = {"type": "boolean"}
    for _ in range(60):
        deep = {"type": "array", "items": deep}
    wide_one = object_of(**{f"key{i}": {"type": "string"} for i in range(2000)})
    hungry = object_of(x={"type": "string", "pattern": "^((a{1,500}){1,500}){1,500}$"})
    loop = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    for schema in (deep, wide_one, hungry, loop):
        answer = front.post(
            "/v1/chat/completions",
            {"model": MODEL, "messages": user(), "response_format": form(schema), "max_tokens": 5},
            timeout=20,
        )
        assert answer.status_code in (200, 400), answer.text
    regex = {"model": MODEL, "messages": user(), "guided_regex": "((a{0,999}){0,999}){0,999}", "max_tokens": 5}
    assert front.post("/v1/chat/completions", regex, timeout=20).status_code in (200, 400)
