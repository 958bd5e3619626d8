"""`tidemill gateway` in front of `tidemill serve`: nobody can tell it from the server itself, until the engine goes away."""

import json
import threading
import time

import openai
import pytest
import requests
from front import (
    ANSWER,
    ENDLESS,
    MODEL,
    WEATHER,
    WEATHER_QUESTION,
    Front,
    chunks,
    events,
    free_port,
    user,
)
from fronts import front_of
from prompts import request as numbered
from server_process import API_KEY, Gateway
from servers import SERVERS

FREE_SECONDS = 1
LONG = {"model": MODEL, "prompt": "The tide", "max_tokens": 900, "temperature": 0, "ignore_eos": True}


def shared_gateway(name):
    """One gateway for the whole session in front of a shared server."""

    @pytest.fixture(scope="session", name=f"gateway_of_{name}")
    def gateway(request):
        server = request.getfixturevalue(name)
        keys = ("--engine-api-key", server.api_key) if server.api_key else ()
        gateway = Gateway(server.address, *keys)
        yield gateway
        assert gateway.stop() == 0 and not gateway.complaints()

    return gateway


gateway_of_wide, gateway_of_narrow, gateway_of_keyed = map(shared_gateway, ("wide", "narrow", "keyed"))


@pytest.fixture(params=["direct", "gateway"])
def way(request):
    """By which way a test reaches the engine."""
    return request.param


@pytest.fixture
def reach(way, request):
    """A front of a shared server, by name."""

    def reach(name):
        assert name in SERVERS
        if way == "direct":
            return front_of(request.getfixturevalue(name))
        # A gateway without keys of its own brings the engine's.
        front = front_of(request.getfixturevalue(f"gateway_of_{name}"))
        wait_until_ready(front)
        return front

    return reach


def wait_until_ready(front, seconds=10):
    """A gateway may need a moment to find its engine."""
    end = time.monotonic() + seconds
    while front.get("/ready").status_code != 200:
        assert time.monotonic() < end, "not ready"
        time.sleep(0.05)


def test_chat(reach, wide):
    front = reach("wide")
    answer = front.chat()
    assert answer["choices"][0]["message"]["content"] == ANSWER and answer["usage"]["completion_tokens"] == 32
    with front.openai() as client:
        assert [model.id for model in client.models.list().data] == [MODEL]
        stream = client.chat.completions.create(
            model=MODEL, messages=user(), temperature=0, stream=True, stream_options={"include_usage": True}
        )
        found = list(stream)
    assert "".join(c.delta.content or "" for chunk in found for c in chunk.choices) == ANSWER
    assert found[-1].usage.completion_tokens == 32


def test_every_family(reach, wide):
    front = reach("wide")
    with front.anthropic() as client:
        message = client.messages.create(model=MODEL, messages=user(), max_tokens=60, extra_body={"temperature": 0})
        assert message.content[0].text == ANSWER
        assert client.messages.count_tokens(model=MODEL, messages=user()).input_tokens == 14
    with front.openai() as client:
        assert client.responses.create(model=MODEL, input=user(), temperature=0).output_text == ANSWER
        assert len(client.embeddings.create(model=MODEL, input=["a", "b"]).data) == 2
        call = client.chat.completions.create(
            model=MODEL, messages=user(WEATHER_QUESTION), tools=[WEATHER], temperature=0
        )
        assert json.loads(call.choices[0].message.tool_calls[0].function.arguments) == {"city": "Paris"}
    with front.post("/predict", {"messages": user(), "do_sample": False, "stream": True}, stream=True) as answer:
        assert b"".join(answer.iter_content(None)).decode() == ANSWER


def test_every_option_goes_through(reach, wide):
    """Sampling, logprobs, forms: what the gateway translates, it translates whole."""
    front = reach("wide")
    for number in range(6):
        options = numbered(number)
        expected = wide.client.run(**options)
        answer = front.post("/v1/completions", {"model": MODEL, **options}).json()
        assert answer["choices"][0]["text"] == expected.text
    scored = {"model": MODEL, "prompt": "The tide", "temperature": 0, "max_tokens": 5, "logprobs": 3, "echo": True, "n": 2}
    direct = Front(wide.url).post("/v1/completions", scored).json()["choices"]
    assert front.post("/v1/completions", scored).json()["choices"] == direct
    chosen = front.chat(guided_choice=["ebb", "flood"], temperature=1)["choices"][0]["message"]["content"]
    assert chosen in ("ebb", "flood")
    stopped = front.post("/v1/completions", {**scored, "stop": ["kitchen"], "seed": 2**63 - 1, "logit_bias": {"5": 1.5}})
    assert stopped.status_code == 200


def test_tokens(reach, wide):
    front = reach("wide")
    ids = front.post("/tokenize", {"prompt": "Größe 🦀"}).json()["tokens"]
    assert ids == list(wide.client.tokenize("Größe 🦀").token_ids)
    assert front.post("/detokenize", {"tokens": ids}).json()["prompt"] == "Größe 🦀"
    assert front.post("/tokenize", {"messages": user()}).json()["count"] == 14


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 9}, 400, "n"),
        ({"prompt": "tide " * 2000}, 400, "prompt"),
        ({"stop": [""]}, 400, "stop"),
        ({"guided_regex": "(", "ignore_eos": False}, 400, "response_format"),
        ({"model": "no-such-model"}, 404, None),
    ],
    ids=str,
)
def test_the_verdicts_are_the_same(reach, wide, body, status, param):
    answer = reach("wide").post("/v1/completions", {**LONG, "max_tokens": 2, **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_an_abort(reach, narrow):
    front = reach("narrow")
    with front.wire() as wire:
        wire.post("/v1/completions", {**LONG, "stream": True, "request_id": "by-name"})
        wire.read_until(b"data: ")
        receipt = front.post("/abort", {"request_id": "by-name"}).json()
        assert (receipt["stage"], receipt["rows_freed"]) == ("decode", 1)
        assert b'"finish_reason":"abort"' in wire.read_until(b"[DONE]")


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("leave", ["close", "reset", "half_close"])
def test_a_client_that_leaves(reach, narrow, stream, leave):
    front = reach("narrow")
    aborted = narrow.client.stats().requests_aborted_total
    with front.wire() as wire:
        wire.post("/v1/completions", {**LONG, "stream": stream})
        narrow.wait_for_stats(lambda stats: stats.kv_blocks_owned >= 2, "it generates")
        getattr(wire, leave)()
        narrow.wait_for_stats(lambda s: s.requests_aborted_total == aborted + 1, "it is aborted", FREE_SECONDS)
        narrow.wait_until_idle()


def test_a_client_that_leaves_the_queue(reach, narrow):
    front = reach("narrow")
    running = narrow.client.start([72, 73], max_tokens=1000, ignore_eos=True).read_tokens(1)
    with front.wire() as wire:
        wire.post("/v1/completions", LONG)
        narrow.wait_for_stats(lambda stats: stats.num_requests_waiting == 1, "it waits")
        wire.close()
        narrow.wait_for_stats(lambda stats: stats.num_requests_waiting == 0, "it is gone", FREE_SECONDS)
    running.cancel()


def test_overload(reach, narrow):
    front = reach("narrow")
    running = narrow.client.start([72, 73], max_tokens=1000, ignore_eos=True).read_tokens(1)
    waiting = [narrow.client.start("The tide", max_tokens=2) for _ in range(4)]
    narrow.wait_for_stats(lambda stats: stats.num_requests_waiting == 4, "the queue is full")
    answer = front.post("/v1/completions", LONG)
    assert answer.status_code == 429 and 0 < int(answer.headers["retry-after"]) <= 60
    for stream in (running, *waiting):
        stream.cancel()


def test_metrics(reach, wide):
    front = reach("wide")
    before = front.metric("vllm:generation_tokens_total")
    front.chat(max_tokens=5)
    wide.wait_until(lambda: front.metric("vllm:generation_tokens_total") == before + 5, "the engine's counters show")


def test_the_engines_key(reach, keyed):
    assert reach("keyed").chat()["choices"][0]["message"]["content"] == ANSWER


def test_the_gateways_own_key(wide, start_gateway):
    front = Front(start_gateway(wide.address, "--api-key", API_KEY).url)
    assert front.get("/health").status_code == 200 and front.get("/v1/models").status_code == 401
    known = Front(front.url, API_KEY)
    wait_until_ready(known)
    assert known.chat()["choices"][0]["message"]["content"] == ANSWER


def test_a_wrong_key_for_the_engine(keyed, start_gateway):
    """The client is not to blame: it gets no 401 for a key that it does not have."""
    front = Front(start_gateway(keyed.address, "--engine-api-key", "wrong").url)
    answer = front.post("/v1/completions", {**LONG, "max_tokens": 2})
    assert answer.status_code in (500, 502, 503) and "wrong" not in answer.text
    assert front.get("/ready").status_code == 503


def test_no_engine_yet(start_gateway):
    """The gateway may be started first."""
    gateway = start_gateway(f"127.0.0.1:{free_port()}")
    front = Front(gateway.url)
    assert front.get("/health").status_code == 200 and front.get("/ready").status_code == 503
    for path, body in [("/v1/completions", LONG), ("/v1/messages", {"model": MODEL, "messages": user(), "max_tokens": 2}),
                       ("/predict", LONG), ("/tokenize", {"prompt": "a"}), ("/abort", {"request_id": "a"})]:
        answer = front.post(path, body)
        assert answer.status_code in (503, 529), (path, answer.text)
        assert answer.json()["error"]
    assert front.get("/v1/models").status_code == 503


def test_the_engine_is_started_again(start_gateway, start_server):
    engine = start_server()
    front = Front(start_gateway(engine.address).url)
    wait_until_ready(front)
    assert front.chat()["choices"][0]["message"]["content"] == ANSWER
    for how in ("stop", "kill"):
        getattr(engine, how)()
        end = time.monotonic() + 5
        while (answer := front.post("/v1/completions", {**LONG, "max_tokens": 2})).status_code != 503:
            assert time.monotonic() < end, answer.text
        assert answer.json()["error"]["message"]
        assert front.get("/health").status_code == 200
        assert front.get("/ready").status_code == 503
        engine = start_server("--grpc-port", engine.address.rsplit(":", 1)[1])
        wait_until_ready(front)
        assert front.chat()["choices"][0]["message"]["content"] == ANSWER
    engine.assert_as_new()


SLOW_ENGINE = ("--max-num-seqs", "1", "--max-num-batched-tokens", "1", "--threads", "1")
STREAMS = {
    "chat": ("/v1/chat/completions", {"model": MODEL, "messages": user(), "max_tokens": 900, "ignore_eos": True}),
    "completions": ("/v1/completions", LONG),
    "messages": ("/v1/messages", {"model": MODEL, "messages": user(), "max_tokens": 900, "ignore_eos": True}),
    "responses": ("/v1/responses", {"model": MODEL, "input": "The tide", "max_output_tokens": 900, "ignore_eos": True}),
}


@pytest.mark.parametrize("family", STREAMS)
def test_an_engine_that_is_killed_under_a_stream(start_gateway, start_server, family):
    """A clear error event, no hang, and no end that looks like an ordinary one."""
    engine = start_server(*SLOW_ENGINE)
    front = Front(start_gateway(engine.address).url)
    wait_until_ready(front)
    path, body = STREAMS[family]
    with front.wire() as wire:
        wire.post(path, {**body, "stream": True})
        wire.read_until(b"\r\n\r\n")
        wire.read_until(b"delta" if family != "completions" else b"text")
        engine.kill()
        start = time.monotonic()
        said = wire.read_until(b"0\r\n\r\n")
        assert time.monotonic() - start < 10
    text = said.decode()
    assert '"finish_reason":"' not in text and "message_stop" not in text and "response.completed" not in text
    assert {"chat": '"error"', "completions": '"error"', "messages": "event: error", "responses": "response.failed"}[
        family
    ] in text, text[-500:]


def test_an_engine_that_is_killed_under_a_request(start_gateway, start_server):
    engine = start_server(*SLOW_ENGINE)
    front = Front(start_gateway(engine.address).url)
    wait_until_ready(front)
    answers = {}

    def ask():
        answers["whole"] = requests.post(f"{front.url}/v1/completions", json=LONG, timeout=20)

    asker = threading.Thread(target=ask)
    asker.start()
    engine.wait_for_stats(lambda stats: stats.kv_blocks_owned >= 2, "it generates")
    engine.kill()
    asker.join(15)
    assert answers["whole"].status_code in (502, 503) and answers["whole"].json()["error"]["message"]


def test_the_sdk_sees_the_error_in_a_stream(start_gateway, start_server):
    engine = start_server(*SLOW_ENGINE)
    front = Front(start_gateway(engine.address).url)
    wait_until_ready(front)
    with front.openai() as client:
        stream = client.chat.completions.create(model=MODEL, messages=user(), stream=True, **ENDLESS)
        pieces = iter(stream)
        next(pieces)
        engine.kill()
        with pytest.raises(openai.APIError):
            list(pieces)


def test_an_engine_that_drains(start_gateway, start_server):
    engine = start_server(*SLOW_ENGINE)
    front = Front(start_gateway(engine.address).url)
    wait_until_ready(front)
    with front.post("/v1/completions", {**LONG, "max_tokens": 400, "stream": True}, stream=True) as answer:
        pieces = answer.iter_content(None)
        first = next(pieces)
        threading.Thread(target=engine.stop, daemon=True).start()
        end = time.monotonic() + 5
        while front.get("/ready").status_code != 503:
            assert time.monotonic() < end, "the gateway says that its engine drains"
        assert front.post("/v1/completions", {**LONG, "max_tokens": 2}).status_code == 503
        assert chunks(b"".join([first, *pieces]))[-1]["choices"][0]["finish_reason"] == "length"


def test_a_gateway_that_is_killed_frees_what_it_had(start_gateway, narrow):
    gateway = start_gateway(narrow.address)
    front = Front(gateway.url)
    wait_until_ready(front)
    with front.wire() as wire:
        wire.post("/v1/completions", {**LONG, "stream": True})
        wire.read_until(b"data: ")
        gateway.kill()
        narrow.wait_until_idle()


def test_a_gateway_that_is_asked_to_stop_lets_the_running_finish(start_gateway, narrow):
    gateway = start_gateway(narrow.address)
    front = Front(gateway.url)
    wait_until_ready(front)
    with front.wire() as wire:
        wire.post("/v1/completions", {**LONG, "max_tokens": 200, "stream": True})
        head = wire.read_until(b"\r\n\r\n")
        assert b"200" in head.split(b"\r\n")[0]
        wire.read_until(b"data: ")
        stopper = threading.Thread(target=gateway.stop)
        stopper.start()
        assert b"[DONE]" in wire.read_until(b"0\r\n\r\n")
        stopper.join()
    assert gateway.process.returncode == 0


def test_two_gateways_share_an_engine(start_gateway, wide):
    fronts = [Front(start_gateway(wide.address).url) for _ in range(2)]
    for front in fronts:
        wait_until_ready(front)
    alone = [wide.client.run(**numbered(number)).text for number in range(6)]
    answers = [None] * 12

    def ask(place, front, number):
        answers[place] = front.post("/v1/completions", {"model": MODEL, **numbered(number)}).json()["choices"][0]["text"]

    threads = [
        threading.Thread(target=ask, args=(6 * which + number, front, number))
        for which, front in enumerate(fronts)
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == alone * 2


def test_events_end_like_events(reach, wide):
    front = reach("wide")
    body = front.curl("/v1/chat/completions", {"model": MODEL, "messages": user(), "temperature": 0, "stream": True})
    assert events(body)[-1] == (None, "[DONE]")
