"""Text to tokens and back, conversations and tools."""

import json

import grpc
import pytest
from client import chat, refusal, violations
from prompts import OPENINGS
from tidemill.v1 import tidemill_pb2 as pb

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather at a place, “now”",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.mark.parametrize("text", [*OPENINGS, "", " ", "\n\n\t", "\x00", "a" * 5000, "👩‍👩‍👧‍👦" * 20])
def test_there_and_back_again(wide, text):
    tokenized = wide.client.tokenize(text)
    assert tokenized.text == text and tokenized.max_model_len == wide.client.model().max_model_len
    assert wide.client.detokenize(tokenized.token_ids) == text


def test_special_tokens_are_left_out_unless_asked_for(wide):
    ids = wide.client.tokenize("<|im_start|>user\n<|im_end|>").token_ids
    assert wide.client.detokenize(ids) == "user\n"
    assert wide.client.detokenize(ids, include_special_tokens=True) == "<|im_start|>user\n<|im_end|>"


@pytest.mark.parametrize("ids", [[2048], [0, 2**32 - 1]])
def test_tokens_outside_the_vocabulary_have_no_text(wide, ids):
    assert set(violations(refusal(lambda: wide.client.detokenize(ids)))) == {"token_ids"}


def test_nothing_to_tokenize(wide):
    error = refusal(lambda: wide.client.inference.Tokenize(pb.TokenizeRequest()))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert wide.client.detokenize([]) == ""


def test_a_conversation_is_rendered_with_the_models_template(wide):
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", "?")]
    rendered = wide.client.tokenize(chat(*turns))
    assert rendered.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert wide.client.detokenize(rendered.token_ids, include_special_tokens=True) == rendered.text


@pytest.mark.parametrize("add", [None, True, False])
def test_the_start_of_the_answer_is_added_unless_declined(wide, add):
    text = wide.client.tokenize(chat(("user", "Hello"), add_generation_prompt=add)).text
    assert text.endswith("<|im_start|>assistant\n") == (add is not False)


def test_tools_stand_in_the_prompt_as_json(wide):
    prompt = chat(("user", "How is the weather in Oslo?"), tools=[WEATHER])
    text = wide.client.tokenize(prompt).text
    line = next(line for line in text.splitlines() if "get_weather" in line)
    assert json.loads(line.removesuffix("<|im_end|>")) == WEATHER
    assert list(json.loads(line.removesuffix("<|im_end|>"))) == list(WEATHER), "keys keep their order"
    answer = wide.client.run(prompt, temperature=0, max_tokens=60)
    assert "get_weather" in answer.text and answer.usage.prompt_tokens == len(wide.client.tokenize(prompt).token_ids)


def test_tool_calls_and_their_results_stand_in_the_prompt(wide):
    call = [{"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}]
    prompt = chat(("user", "Weather in Oslo?"), tools=[WEATHER])
    prompt.messages.add(role="assistant", tool_calls_json=json.dumps(call))
    prompt.messages.add(role="tool", content="rain")
    text = wide.client.tokenize(prompt).text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in text
    assert "<tool_response>\nrain\n</tool_response>" in text


@pytest.mark.parametrize(
    "prompt",
    [
        pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="a")], tools_json="{nonsense"),
        pb.ChatPrompt(messages=[pb.ChatMessage(role="assistant", tool_calls_json="[")]),
    ],
    ids=["tools", "tool calls"],
)
def test_json_that_is_none(wide, prompt):
    for call in (lambda: wide.client.tokenize(prompt), lambda: wide.client.run(prompt, max_tokens=1)):
        assert all("json" in field or "chat" in field for field in violations(refusal(call)))


def test_a_large_text_is_tokenized(wide):
    text = "The tide comes in and the tide goes out. " * 5000
    assert wide.client.detokenize(wide.client.tokenize(text).token_ids) == text
