"""Stock SMG in front of two of our servers: its clients get our answers, and whatever goes wrong behind it or before it is mended."""

import http.client
import json
import re
import signal
import subprocess
from pathlib import Path

import jsonschema
import pytest
from client import chat
from smg_process import SMG, Smg

MODEL = "tidemill-demo"
HELLO = dict(model=MODEL, messages=[dict(role="user", content="Hello!")], temperature=0, max_tokens=30)
STORY = {**HELLO, "messages": [dict(role="user", content="Tell me a short story.")]}
ENDLESS = {**HELLO, "max_tokens": 900, "ignore_eos": True}
EVENTS = "--enable-kv-cache-events"


@pytest.fixture(scope="module")
def fleet():
    """Two servers and a gateway that spreads requests over them."""
    from server_process import Server

    servers = [Server(EVENTS, http=False) for _ in range(2)]
    smg = Smg(servers, "--policy", "round_robin")
    yield smg, servers
    smg.kill()
    for server in servers:
        assert server.stop() == 0
        assert not server.complaints()


@pytest.fixture
def smg(fleet):
    """The gateway; after the test nothing is left behind it."""
    yield fleet[0]
    for server in fleet[1]:
        server.assert_as_new()


def ours(server, request=HELLO, **more):
    """What the server says by itself to the same conversation."""
    sampling = {name: value for name, value in {**request, **more}.items() if name not in ("model", "messages")}
    return server.client.run(chat(*[(message["role"], message["content"]) for message in request["messages"]]), **sampling)


def events(answer):
    """The JSON of every event of a stream, which ends as OpenAI's do."""
    lines = [line.decode().strip() for line in answer]
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(event) for event in data]


def running(servers):
    """Requests that the servers have in their batches."""
    return sum(server.client.stats().num_requests_running for server in servers)


def aborted(servers):
    """Requests that were aborted, since the servers started."""
    return sum(server.client.stats().requests_aborted_total for server in servers)


# Answers


def test_chat(smg, fleet):
    expected = ours(fleet[1][0])
    for _ in fleet[1]:
        status, answer = smg.post("/v1/chat/completions", HELLO)
        assert status == 200, answer
        (choice,) = answer["choices"]
        assert choice["message"]["content"] == expected.text and choice["finish_reason"] == "stop"
        assert answer["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
        assert answer["usage"]["completion_tokens"] == len(expected.ids)


def test_chat_as_a_stream(smg, fleet):
    expected = ours(fleet[1][0])
    request = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
    with smg.open("/v1/chat/completions", request) as answer:
        chunks = events(answer)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    texts = [choice["delta"].get("content") or "" for choice in choices]
    assert "".join(texts) == expected.text
    assert sum(1 for text in texts if text) > 3, "it comes as it is made"
    assert choices[-1]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == len(expected.ids), "nothing is counted twice"


def test_completions_with_a_seed(smg, fleet):
    request = dict(prompt="The tide", temperature=1.1, top_p=0.9, seed=7, max_tokens=16)
    expected = fleet[1][0].client.run(request["prompt"], **{k: v for k, v in request.items() if k != "prompt"})
    status, answer = smg.post("/v1/completions", {"model": MODEL, **request})
    assert status == 200, answer
    assert answer["choices"][0]["text"] == expected.text


def test_defaults_are_those_of_the_model(smg, fleet):
    """The gateway has them from GetModelInfo; this protocol has no word for `not said`."""
    request = dict(seed=3, max_tokens=24)
    expected = fleet[1][0].client.run("The tide", **request)
    neutral = fleet[1][0].client.run("The tide", **request, temperature=1, top_p=1)
    assert expected.text != neutral.text
    status, answer = smg.post("/v1/completions", {"model": MODEL, "prompt": "The tide", **request})
    assert (status, answer["choices"][0]["text"]) == (200, expected.text)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_cut_off(smg, fleet, stream):
    stop = ours(fleet[1][0]).text[12:16]
    expected = ours(fleet[1][0], stop=[stop])
    with smg.open("/v1/chat/completions", {**HELLO, "stop": [stop], "stream": stream}) as answer:
        if stream:
            text = "".join(c["delta"].get("content") or "" for event in events(answer) for c in event["choices"])
        else:
            text = json.load(answer)["choices"][0]["message"]["content"]
    assert text == expected.text and stop not in text


def test_several_choices_with_logprobs(smg, fleet):
    request = {**STORY, "temperature": 1.2, "top_p": 1, "seed": 5, "n": 3, "max_tokens": 12}
    expected = ours(fleet[1][0], request, logprobs=2)
    status, answer = smg.post("/v1/chat/completions", {**request, "logprobs": True, "top_logprobs": 2})
    assert status == 200, answer
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert len({choice["message"]["content"] for choice in choices}) == 3
    for choice, completion in zip(choices, expected.completions, strict=True):
        assert choice["message"]["content"] == completion.text and choice["finish_reason"] == "length"
        told = choice["logprobs"]["content"]
        values = [entry.logprob for entry in completion.logprobs]
        assert [entry["logprob"] for entry in told] == pytest.approx(values, abs=1e-4)
        assert all(len(entry["top_logprobs"]) == 2 for entry in told)


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def test_answers_of_a_schema(smg):
    form = dict(type="json_schema", json_schema=dict(name="trip", schema=SCHEMA, strict=True))
    for seed in range(3):
        request = {**HELLO, "temperature": 1, "seed": seed, "max_tokens": 200, "response_format": form}
        status, answer = smg.post("/v1/chat/completions", request)
        assert status == 200, answer
        jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), SCHEMA)


TOOL = dict(type="function", function=dict(name="plan_trip", description="Plans a trip.", parameters=SCHEMA))


def test_a_tool_that_is_named_is_called(smg):
    """The gateway makes a constraint of it, and the call of the answer."""
    choice = dict(type="function", function=dict(name="plan_trip"))
    request = {**HELLO, "max_tokens": 300, "tools": [TOOL], "tool_choice": choice}
    status, answer = smg.post("/v1/chat/completions", request)
    assert status == 200, answer
    (choice,) = answer["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and call["function"]["name"] == "plan_trip"
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)


def test_a_call_that_is_required_is_begun(smg):
    """The gateway asks for an array of calls without an end; the built-in model finds none, so its answer stays a text."""
    request = {**HELLO, "max_tokens": 60, "tools": [TOOL], "tool_choice": "required"}
    status, answer = smg.post("/v1/chat/completions", request)
    assert status == 200, answer
    text = answer["choices"][0]["message"]["content"]
    assert re.match(r'\[\s*{\s*"name"\s*:\s*"plan_trip"\s*,\s*"parameters"\s*:\s*{\s*"city"\s*:\s*"', text), text


def test_both_servers_are_used(smg, fleet):
    before = [server.client.stats().requests_finished_total for server in fleet[1]]
    for _ in range(6):
        assert smg.post("/v1/chat/completions", HELLO)[0] == 200
    for server, earlier in zip(fleet[1], before, strict=True):
        server.wait_for_stats(lambda s, earlier=earlier: s.requests_finished_total == earlier + 3, "half of them")


# Bad input


def test_an_unknown_model_is_not_found(smg):
    status, answer = smg.post("/v1/chat/completions", {**HELLO, "model": "other"})
    assert status == 404 and "other" in answer["error"]["message"]


BAD = {
    "too much to generate": dict(max_tokens=100_000),
    "temperature": dict(temperature=-1),
    "top_p": dict(top_p=7),
    "presence_penalty": dict(presence_penalty=9),
    "n": dict(n=9),
    "too long": dict(messages=[dict(role="user", content="tide " * 3000)]),
    "no messages": dict(messages=[]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_the_clients_fault(smg, name):
    status, answer = smg.post("/v1/chat/completions", {**HELLO, **BAD[name]})
    assert status == 400, answer
    assert answer["error"]["message"]
    assert len(smg.workers()) == 2, "nobody is thought to be ill for it"


def test_bytes_that_are_no_json(smg):
    assert smg.post("/v1/chat/completions", b"{")[0] == 400


# Clients that leave


def disconnect(smg, servers, stream):
    """Starts an endless request, waits until it runs, and closes the connection."""
    connection = http.client.HTTPConnection("127.0.0.1", smg.port, timeout=30)
    body = json.dumps({**ENDLESS, "stream": stream})
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    if stream:
        assert connection.getresponse().readline().startswith(b"data: ")
    servers[0].wait_until(lambda: running(servers) == 1, "it runs")
    assert sum(server.client.stats().kv_blocks_owned for server in servers) > 0
    connection.sock.close()
    connection.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks_in_the_engine(smg, fleet, stream):
    servers = fleet[1]
    before = aborted(servers)
    disconnect(smg, servers, stream)
    for server in servers:
        server.wait_until_idle()
    servers[0].wait_until(lambda: aborted(servers) == before + 1, "it is aborted")


# Servers that leave


def test_when_a_server_is_killed_the_other_goes_on(start_server):
    servers = [start_server(http=False) for _ in range(2)]
    smg = Smg(servers, "--policy", "round_robin")
    try:
        expected = ours(servers[0]).text
        for _ in range(4):
            assert smg.post("/v1/chat/completions", HELLO)[0] == 200
        servers[0].send_signal(signal.SIGKILL)
        servers[0].wait_for_exit()
        before = servers[1].client.stats().requests_finished_total
        for _ in range(6):
            status, answer = smg.post("/v1/chat/completions", HELLO)
            assert status == 200, answer
            assert answer["choices"][0]["message"]["content"] == expected
        servers[1].wait_for_stats(lambda s: s.requests_finished_total == before + 6, "all went there")
        smg.wait_until(lambda: len(smg.workers()) == 1, "it knows that one is gone")
    finally:
        smg.kill()


def test_a_server_that_drains_gets_nothing_new_and_finishes_what_it_has(start_server):
    servers = [start_server("--shutdown-timeout", "30", http=False) for _ in range(2)]
    smg = Smg(servers, "--policy", "round_robin")
    try:
        with smg.open("/v1/chat/completions", {**ENDLESS, "max_tokens": 300, "stream": True}) as answer:
            answer.readline()
            (busy,) = [server for server in servers if server.client.stats().num_requests_running]
            busy.send_signal(signal.SIGTERM)
            for _ in range(6):
                assert smg.post("/v1/chat/completions", HELLO)[0] == 200
            finished = [choice["finish_reason"] for event in events(answer) for choice in event["choices"]]
        assert finished[-1] == "length", "nothing was cut off"
        assert busy.wait_for_exit() == 0
    finally:
        smg.kill()


# Servers that want a key


def test_over_http_the_gateway_shows_its_key(start_server):
    """Over gRPC it has no way to."""
    server = start_server("--api-key", "s3cret", api_key="s3cret")
    smg = Smg([server], api_key="s3cret")
    try:
        status, answer = smg.post("/v1/chat/completions", HELLO)
        assert (status, answer["choices"][0]["message"]["content"]) == (200, ours(server).text)
    finally:
        smg.kill()


# Routing by what is cached


def conversation(topic, turn):
    """A long beginning of its own, and a short end that differs from turn to turn."""
    text = " ".join(f"{topic} {number}" for number in range(120))
    return {**HELLO, "max_tokens": 4, "messages": [dict(role="user", content=f"{text}. Question {turn}?")]}


def hits(server):
    return server.client.stats().prefix_cache_hits_total


def test_requests_go_to_where_their_beginning_is_cached(start_server):
    servers = [start_server(EVENTS, http=False) for _ in range(2)]
    # Warming up new workers with a share of the requests is for fleets that live longer than a test.
    smg = Smg(servers, "--policy", "cache_aware", "--worker-warmup-secs", "0", "--worker-warmup-thin-ratio", "0")
    try:
        prompt = None
        for topic in ("stone", "river", "cloud", "lamp"):
            before = [hits(server) for server in servers]
            queries = [server.client.stats().prefix_cache_queries_total for server in servers]
            for turn in range(6):
                status, answer = smg.post("/v1/chat/completions", conversation(topic, turn))
                assert status == 200, answer
                prompt = answer["usage"]["prompt_tokens"]
                cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert (cached > prompt - 48) == (turn > 0), f"turn {turn} of {topic}: {cached} of {prompt}"
            gained = [hits(server) - earlier for server, earlier in zip(servers, before, strict=True)]
            asked = [
                server.client.stats().prefix_cache_queries_total - earlier
                for server, earlier in zip(servers, queries, strict=True)
            ]
            assert sorted(asked)[0] == 0, "one server had all of this conversation"
            assert max(gained) >= 5 * (prompt - 48)
    finally:
        smg.kill()


def test_what_was_cached_before_the_gateway_came_is_found(start_server):
    """By the snapshot: the gateway itself has never seen the conversation."""
    servers = [start_server(EVENTS, http=False) for _ in range(2)]
    for place, topic in enumerate(("stone", "river")):
        message = conversation(topic, 0)["messages"][0]["content"]
        servers[place].client.run(chat(("user", message)), temperature=0, max_tokens=4)
    smg = Smg(servers, "--policy", "cache_aware", "--worker-warmup-secs", "0", "--worker-warmup-thin-ratio", "0")
    try:
        for place, topic in ((1, "river"), (0, "stone"), (1, "river"), (0, "stone")):
            before = hits(servers[place])
            assert smg.post("/v1/chat/completions", conversation(topic, 7))[0] == 200
            assert hits(servers[place]) > before, f"{topic} is cached in {place}"
    finally:
        smg.kill()


# What we tell users


def test_the_options_that_we_recommend_exist():
    readme = (Path(__file__).parents[2] / "deploy" / "README.md").read_text().replace("\\\n", " ")
    lines = [line for line in readme.splitlines() if line.startswith("smg launch ")]
    assert len(lines) >= 4
    known = subprocess.run([SMG, "launch", "--help"], capture_output=True, text=True, check=True, timeout=60).stdout
    options = {word for line in lines for word in line.split() if word.startswith("--")}
    assert {option for option in options if not re.search(rf"{option}\b", known)} == set()
