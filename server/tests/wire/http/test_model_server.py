"""The model server's style through `requests`: one JSON in; raw text as it is generated, or one JSON, out."""

import codecs

import pytest
from front import ANSWER, ANSWER_TOKENS, MODEL, PROMPT_TOKENS, QUESTION, Front, chunks, user

PATHS = ["/predict", "/production/predict"]
CHAT = {"messages": user(), "temperature": 0, "max_tokens": 60}


def text_of(answer):
    """The text of one JSON."""
    assert answer.status_code == 200, answer.text
    return answer.json()["output"]


@pytest.mark.parametrize("path", PATHS)
def test_one_json(front, path):
    answer = front.post(path, CHAT)
    assert text_of(answer) == ANSWER
    body = answer.json()
    assert body["finish_reason"] == "stop"
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (PROMPT_TOKENS, ANSWER_TOKENS)
    assert answer.headers["content-type"].startswith("application/json") and answer.headers["x-request-id"]


@pytest.mark.parametrize("path", PATHS)
def test_raw_text(front, path):
    with front.post(path, {**CHAT, "stream": True}, stream=True) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/")
        assert answer.headers.get("transfer-encoding") == "chunked" and answer.headers["x-request-id"]
        pieces = list(answer.iter_content(chunk_size=None))
    assert b"".join(pieces).decode() == ANSWER, "the text and nothing else"
    assert len(pieces) > 3, "it comes as it is generated"


def test_raw_text_by_lines_and_bytes(front):
    for size in (1, 7, 4096):
        with front.post("/predict", {**CHAT, "stream": True}, stream=True) as answer:
            decoder = codecs.getincrementaldecoder("utf-8")()
            assert "".join(map(decoder.decode, answer.iter_content(chunk_size=size))) == ANSWER


def test_the_first_piece_comes_before_the_last_is_made(narrow_front, narrow):
    body = {"prompt": "The tide", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with narrow_front.post("/predict", body, stream=True) as answer:
        pieces = answer.iter_content(None)  # Dropping it would close the connection.
        assert next(pieces)
        narrow.wait_for_stats(lambda stats: stats.num_requests_running == 1, "it is still being generated")
    narrow.wait_until_idle()


def test_a_prompt(front, wide):
    expected = wide.client.run("Once upon a time", temperature=0, max_tokens=12).text
    assert text_of(front.post("/predict", {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 12})) == expected


@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens", "max_completion_tokens"])
def test_names_of_the_length(front, name):
    answer = front.post("/predict", {"messages": user(), "do_sample": False, name: 5})
    assert ANSWER.startswith(text_of(answer)) and answer.json()["usage"]["completion_tokens"] == 5


def test_do_sample(front):
    greedy = [text_of(front.post("/predict", {"messages": user(), "do_sample": False})) for _ in range(2)]
    assert greedy == [ANSWER] * 2
    body = {"prompt": "The tide", "do_sample": True, "temperature": 2, "max_tokens": 20, "ignore_eos": True}
    assert len({text_of(front.post("/predict", body)) for _ in range(3)}) > 1


def test_the_length_named_twice(front):
    answer = front.post("/predict", {**CHAT, "max_new_tokens": 5, "max_tokens": 7})
    assert answer.json()["usage"]["completion_tokens"] == 7, "max_tokens wins over the model servers' name"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"prompt": "a", "prompt_logprobs": 1}, "prompt_logprobs"),
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "messages": user()}, "prompt"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "max_new_tokens": 0}, "max"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "do_sample": "no"}, "do_sample"),
        ({"prompt": "tide " * 2000}, "1024"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused(front, body, word):
    answer = front.post("/predict", body)
    assert answer.status_code == 400 and word in answer.json()["error"], answer.text


@pytest.mark.parametrize("environment", ["production", "staging", "x"])
def test_environments(front, environment):
    base = f"/environments/{environment}/sync/v1"
    body = {"model": MODEL, **CHAT}
    assert front.post(f"{base}/chat/completions", body).json()["choices"][0]["message"]["content"] == ANSWER
    with front.post(f"{base}/chat/completions", {**body, "stream": True}, stream=True) as answer:
        pieces = list(answer.iter_content(None))
    found = chunks(b"".join(pieces))
    assert "".join(c["delta"].get("content") or "" for chunk in found for c in chunk["choices"]) == ANSWER
    assert front.get(f"{base}/models").json()["data"][0]["id"] == MODEL
    assert front.post(f"{base}/completions", {"model": MODEL, "prompt": QUESTION, "max_tokens": 3}).status_code == 200
    message = front.post(f"{base}/messages", {"model": MODEL, "messages": user(), "max_tokens": 60, "temperature": 0})
    assert message.json()["content"][0]["text"] == ANSWER


def test_environments_by_the_sdk(front):
    with front.openai() as client:
        client.base_url = f"{front.url}/environments/production/sync/v1"
        answer = client.chat.completions.create(model=MODEL, messages=user(), temperature=0)
    assert answer.choices[0].message.content == ANSWER


def test_with_a_key_as_its_clients_send_it(keyed_front, keyed):
    plain = Front(keyed.url)
    headers = {"Authorization": f"Api-Key {keyed.api_key}"}
    assert text_of(plain.post("/production/predict", CHAT, headers=headers)) == ANSWER
    assert plain.post("/production/predict", CHAT).status_code == 401
