"""What vLLM's clients send beyond OpenAI's fields, through `extra_body`."""

import json
import re

import openai
import pytest
from client import refusal
from front import ANSWER, MODEL, PROMPT_TOKENS, QUESTION, user

STORY = "Tell me a story about a fox and a lantern."


def ask(api, content=STORY, extra=None, **options):
    """A completion."""
    options = {"temperature": 0, "max_tokens": 24, **options}
    return api.chat.completions.create(model=MODEL, messages=user(content), extra_body=extra or {}, **options)


def text(completion):
    """What the first choice says."""
    return completion.choices[0].message.content


def test_top_k_of_one_is_greedy(api):
    greedy = text(ask(api))
    assert text(ask(api, extra={"top_k": 1}, temperature=2, seed=1)) == greedy
    assert text(ask(api, extra={"top_k": -1}, temperature=2, seed=1)) == text(ask(api, temperature=2, seed=1))


def test_min_p_of_one_is_greedy(api):
    assert text(ask(api, extra={"min_p": 1}, temperature=2, seed=1)) == text(ask(api))


def test_repetition_penalty(api):
    def distinct(answer):
        return len(set(text(answer).split())) / len(text(answer).split())

    plain, punished = (ask(api, extra={"repetition_penalty": p}, max_tokens=90) for p in (1.0, 1.8))
    assert distinct(punished) > distinct(plain)


def test_ignore_eos_and_min_tokens(api):
    assert ask(api, QUESTION, max_tokens=60).usage.completion_tokens < 60
    longer = ask(api, QUESTION, extra={"ignore_eos": True}, max_tokens=60)
    assert (longer.usage.completion_tokens, longer.choices[0].finish_reason) == (60, "length")
    at_least = ask(api, QUESTION, extra={"min_tokens": 40}, max_tokens=60)
    assert at_least.usage.completion_tokens >= 40


def test_stop_token_ids(api, front):
    ids = front.post("/tokenize", {"prompt": ANSWER, "add_special_tokens": False}).json()["tokens"]
    answer = ask(api, QUESTION, extra={"stop_token_ids": [ids[4]]}, max_tokens=60)
    assert answer.choices[0].finish_reason == "stop"
    assert ANSWER.startswith(text(answer)) and len(text(answer)) < len(ANSWER)
    assert answer.choices[0].stop_reason == ids[4], "the token that ended it is told"


def test_stop_reason_of_strings(api):
    assert ask(api, QUESTION, stop=["values", "keys"], max_tokens=60).choices[0].stop_reason == "keys"
    assert ask(api, QUESTION, max_tokens=60).choices[0].stop_reason is None


def test_include_stop_str_is_refused(api):
    """An option that is not supported must not be ignored where it would change the text."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, QUESTION, extra={"include_stop_str_in_output": True}, stop=["values"], max_tokens=60)
    assert caught.value.param == "include_stop_str_in_output"


def test_prompt_logprobs(api):
    answer = ask(api, QUESTION, extra={"prompt_logprobs": 2})
    entries = answer.prompt_logprobs
    assert len(entries) == PROMPT_TOKENS and entries[0] is None
    for entry in entries[1:]:
        assert 2 <= len(entry) <= 3
        for token, said in entry.items():
            assert int(token) >= 0 and said["logprob"] <= 0 and said["rank"] >= 1
            assert isinstance(said["decoded_token"], str)


def test_prompt_logprobs_have_no_place_in_a_stream(api):
    extra = {"prompt_logprobs": 2}
    for ask_for_a_stream in (
        lambda: ask(api, QUESTION, extra=extra, stream=True),
        lambda: api.completions.create(model=MODEL, prompt="The tide", stream=True, extra_body=extra),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask_for_a_stream()
        assert caught.value.param == "prompt_logprobs" and "stream" in caught.value.message


def test_request_id_names_the_request(api, front):
    raw = api.chat.completions.with_raw_response.create(
        model=MODEL, messages=user(), temperature=0, max_tokens=60, extra_body={"request_id": "named-by-the-client"}
    )
    assert "named-by-the-client" in raw.parse().id
    receipt = front.post("/abort", {"request_id": "named-by-the-client"}).json()
    assert receipt["stage"] == "finished"


def test_request_id_from_the_header(api, front):
    answer = api.chat.completions.with_raw_response.create(
        model=MODEL, messages=user(), max_tokens=4, extra_headers={"x-request-id": "by-the-header"}
    )
    assert answer.headers["x-request-id"] == "by-the-header"
    assert front.post("/abort", {"request_id": "by-the-header"}).json()["stage"] == "finished"


def test_priority_wants_its_policy(api, wide):
    """The same verdict as over gRPC."""
    assert refusal(lambda: wide.client.run("a", max_tokens=1, request_id="\n"))
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, extra={"priority": 3})
    assert caught.value.param == "priority"
    assert text(ask(api, extra={"priority": 0}))


def test_template_arguments(api):
    assert text(ask(api, QUESTION, extra={"chat_template_kwargs": {"enable_thinking": False}}, max_tokens=60)) == ANSWER
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, QUESTION, extra={"chat_template_kwargs": [1]})
    assert caught.value.param == "chat_template_kwargs"


def test_a_client_supplies_no_template(api):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, extra={"chat_template": "{{ 7 * 7 }}"})
    assert caught.value.param == "chat_template"


def test_continuing_an_answer(api):
    begun = ANSWER[:39]
    messages = [*user(), {"role": "assistant", "content": begun}]
    answer = api.chat.completions.create(
        model=MODEL,
        messages=messages,
        temperature=0,
        max_tokens=60,
        extra_body={"add_generation_prompt": False, "continue_final_message": True},
    )
    assert begun + text(answer) == ANSWER


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
LARK = 'start: "tide " ("high" | "low")'
GBNF = 'root ::= "tide " ("high" | "low")'

FORMS = {
    "guided_json": {"guided_json": SCHEMA},
    "guided_json as text": {"guided_json": json.dumps(SCHEMA)},
    "guided_regex": {"guided_regex": "[0-9]{3}-[a-f]{2}"},
    "guided_choice": {"guided_choice": ["ebb", "flood"]},
    "guided_grammar Lark": {"guided_grammar": LARK},
    "guided_grammar GBNF": {"guided_grammar": GBNF},
    "structured_outputs json": {"structured_outputs": {"json": SCHEMA}},
    "structured_outputs json_object": {"structured_outputs": {"json_object": True}},
    "structured_outputs regex": {"structured_outputs": {"regex": "[0-9]{3}-[a-f]{2}"}},
    "structured_outputs choice": {"structured_outputs": {"choice": ["ebb", "flood"]}},
    "structured_outputs grammar": {"structured_outputs": {"grammar": LARK}},
}


def has_form(name, said):
    """Whether a text has the form that was asked for."""
    kind = name.split()[1] if name.startswith("structured") else name.removeprefix("guided_").split()[0]
    if kind == "json":
        value = json.loads(said)
        return set(value) == {"name", "age"} and isinstance(value["age"], int)
    if kind == "json_object":
        return isinstance(json.loads(said), dict)
    if kind == "regex":
        return re.fullmatch("[0-9]{3}-[a-f]{2}", said)
    if kind == "choice":
        return said in ("ebb", "flood")
    return said in ("tide high", "tide low")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0, 1.3])
def test_forms(api, form, temperature):
    for seed in range(3):
        options = dict(temperature=temperature, seed=seed, max_tokens=200)
        answer = ask(api, "Give me JSON with the name Rosa and the age 31.", FORMS[form], **options)
        assert answer.choices[0].finish_reason == "stop" and has_form(form, text(answer)), text(answer)


@pytest.mark.parametrize("form", ["guided_json", "guided_regex", "guided_choice", "guided_grammar Lark"])
def test_forms_of_completions(api, form):
    answer = api.completions.create(model=MODEL, prompt="The tide", temperature=1, max_tokens=200, extra_body=FORMS[form])
    assert has_form(form, answer.choices[0].text), answer.choices[0].text


@pytest.mark.parametrize(
    "wrong",
    [
        {"guided_json": "{"},
        {"guided_json": {"type": "no such type"}},
        {"guided_regex": "("},
        {"guided_regex": r"(a)\1"},
        {"guided_choice": []},
        {"guided_choice": "ebb"},
        {"guided_grammar": "start: no_such_rule"},
        {"guided_grammar": ""},
        {"guided_regex": "a", "guided_choice": ["a"]},
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        {"structured_outputs": {}},
    ],
    ids=lambda wrong: str(wrong)[:50],
)
def test_forms_that_cannot_be(api, wrong):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, extra=wrong)
    # What the engine refuses has the name of the field that OpenAI has for it, whichever way it was given.
    accepted = {*wrong, "structured_outputs", "response_format", "grammar"}
    assert caught.value.param and caught.value.param.split(".")[0] in accepted, caught.value.body
