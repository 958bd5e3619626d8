"""Thoughts and answers apart. The built-in model does not think, so its template here opens thoughts for it, and a budget
or a grammar closes them."""

from pathlib import Path

import pytest
from front import ANSWER, MODEL, Front, chunks, user
from server_process import Server

TEMPLATE = Path(__file__).with_name("template_thinking.jinja")
BUDGET = {"thinking_token_budget": 8}
# It would say nothing more once it has thought.
SPEAKS = {**BUDGET, "guided_choice": ["ebb", "flood"]}


@pytest.fixture(scope="module")
def server():
    """A server whose conversations begin in thought."""
    server = Server("--chat-template", str(TEMPLATE), "--reasoning-parser", "auto")
    yield server
    assert server.stop() == 0 and not server.complaints()


@pytest.fixture
def thinker(server):
    """Its front; nothing may be left of a test."""
    yield Front(server.url)
    server.assert_as_new()


def ask(thinker, content="What is a KV cache?", **options):
    """The first choice of a chat."""
    body = {"model": MODEL, "messages": user(content), "temperature": 0, "max_tokens": 60, **BUDGET, **options}
    answer = thinker.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_thoughts_stand_apart(thinker):
    message = ask(thinker)["message"]
    assert message["reasoning_content"].strip() and "think>" not in message["reasoning_content"]
    assert message["content"] is not None and "think>" not in message["content"]
    assert message.get("reasoning", message["reasoning_content"]) == message["reasoning_content"]


def test_a_stream_gives_the_same(thinker):
    whole = ask(thinker)["message"]
    body = {"model": MODEL, "messages": user(), "temperature": 0, "max_tokens": 60, **BUDGET, "stream": True}
    found = chunks(thinker.post("/v1/chat/completions", body).content)
    deltas = [choice["delta"] for chunk in found for choice in chunk["choices"]]
    thoughts = "".join(delta.get("reasoning_content") or "" for delta in deltas)
    text = "".join(delta.get("content") or "" for delta in deltas)
    assert thoughts.strip() == whole["reasoning_content"].strip() and text.strip() == whole["content"].strip()
    kinds = ["content" if delta.get("content") else "thought" for delta in deltas
             if delta.get("content") or delta.get("reasoning_content")]
    assert kinds == sorted(kinds, reverse=True), "thoughts come first"


def test_the_budget_is_kept(thinker):
    for budget in (1, 5, 20):
        thoughts = ask(thinker, thinking_token_budget=budget)["message"]["reasoning_content"]
        count = thinker.post("/tokenize", {"prompt": thoughts, "add_special_tokens": False}).json()["count"]
        assert count <= budget + 2, (budget, thoughts)


def test_reasoning_tokens_are_counted(thinker):
    body = {"model": MODEL, "messages": user(), "temperature": 0, "max_tokens": 60, **SPEAKS}
    usage = thinker.post("/v1/chat/completions", body).json()["usage"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]


def test_without_thinking(thinker):
    message = ask(thinker, chat_template_kwargs={"enable_thinking": False}, thinking_token_budget=None)["message"]
    assert message["content"] == ANSWER and not message.get("reasoning_content")


def test_a_form_concerns_the_answer_alone(thinker):
    choice = ask(thinker, **SPEAKS)
    assert choice["message"]["content"].strip() in ("ebb", "flood")
    assert choice["message"]["reasoning_content"].strip()


def test_messages_have_a_block_of_thoughts(thinker):
    with thinker.anthropic() as client:
        options = dict(model=MODEL, messages=user(), max_tokens=100, thinking={"type": "enabled", "budget_tokens": 8})
        extra = {"temperature": 0, "guided_choice": ["ebb", "flood"]}
        message = client.messages.create(**options, extra_body=extra)
        assert [block.type for block in message.content] == ["thinking", "text"]
        assert message.content[0].thinking.strip() and message.content[1].text.strip() in ("ebb", "flood")
        with client.messages.stream(**options, extra_body=extra) as stream:
            events = list(stream)
            final = stream.get_final_message()
        assert [block.type for block in final.content] == ["thinking", "text"]
        assert final.content[0].thinking == message.content[0].thinking
        kinds = [event.delta.type for event in events if event.type == "content_block_delta"]
        assert kinds.index("thinking_delta") < kinds.index("text_delta")


def test_responses_have_an_item_of_thoughts(thinker):
    with thinker.openai() as client:
        response = client.responses.create(model=MODEL, input=user(), temperature=0, max_output_tokens=60, extra_body=SPEAKS)
        assert [item.type for item in response.output] == ["reasoning", "message"]
        assert response.usage.output_tokens_details.reasoning_tokens > 0


def test_cut_off_within_thoughts(thinker):
    choice = ask(thinker, max_tokens=3, thinking_token_budget=50)
    assert choice["finish_reason"] == "length" and not choice["message"]["content"]
    assert choice["message"]["reasoning_content"].strip()
