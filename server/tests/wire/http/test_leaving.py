"""Clients that go away: noticed while queued, in prefill and in decode, streaming or not, and all is free at once."""

import contextlib
import json
import signal
import subprocess
import sys

import pytest
from front import MODEL, Wire, request_bytes, user
from prompts import request as numbered
from raw_client import RawClient
from stages import LONG_DECODE, SERVER_OF, in_stage, is_gone, options_in

FREE_SECONDS = 1
STAGES = ["queued", "prefill", "mid-chunk", "decode", "preempted"]
WAYS = ["close", "reset", "half_close"]
ENDLESS = {"max_tokens": 900, "temperature": 0, "ignore_eos": True}
# What goes on for long on the narrow server, by route.
ROUTES = {
    "/v1/completions": {"model": MODEL, "prompt": "The tide", **ENDLESS},
    "/v1/chat/completions": {"model": MODEL, "messages": user(), **ENDLESS},
    "/v1/messages": {"model": MODEL, "messages": user(), **ENDLESS},
    "/v1/responses": {"model": MODEL, "input": "The tide", "max_output_tokens": 900, "ignore_eos": True},
    "/predict": {"prompt": "The tide", **ENDLESS},
    "/environments/a/sync/v1/chat/completions": {"model": MODEL, "messages": user(), **ENDLESS},
}


def usage_of(front):
    """What the metrics say of KV blocks in use and of requests."""
    names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")
    return [front.metric(name) for name in names]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("stage", STAGES)
def test_at_every_stage(request, stage, stream, way):
    server = request.getfixturevalue(SERVER_OF[stage])
    options = {**options_in(stage), "model": MODEL, "stream": stream}
    host, port = server.url.split("://")[1].split(":")
    with Wire((host, int(port))) as wire:
        aborted = server.client.stats().requests_aborted_total
        with in_stage(server, stage, lambda: wire.post("/v1/completions", options)):
            getattr(wire, way)()
            server.wait_for_stats(is_gone(server, stage), "all is free again", FREE_SECONDS)
            server.wait_for_stats(
                lambda stats: stats.requests_aborted_total == aborted + 1, "it is aborted", FREE_SECONDS
            )


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("path", ROUTES)
def test_on_every_route_the_cache_is_given_back(narrow, narrow_front, path, stream):
    before = usage_of(narrow_front)
    assert before == [0, 0, 0]
    with narrow_front.wire() as wire:
        wire.post(path, {**ROUTES[path], "stream": stream})
        narrow.wait_for_stats(lambda stats: stats.kv_blocks_owned >= 2, "it generates")
        used, running, _ = usage_of(narrow_front)
        assert used > 0 and running == 1
        wire.close()
        narrow.wait_until(lambda: usage_of(narrow_front) == before, "the metrics are as before", FREE_SECONDS)


@pytest.mark.parametrize("n", [1, 8])
def test_several_choices_go_together(wide, front, n):
    with front.wire() as wire:
        wire.post("/v1/completions", {**ROUTES["/v1/completions"], "n": n, "stream": True})
        wire.read_until(b"data: ")
        wire.close()
        wide.wait_until_idle()


def test_several_prompts_go_together(narrow, narrow_front):
    prompts = ["The tide", "comes in", "goes out"]
    for stream in (True, False):
        with narrow_front.wire() as wire:
            wire.post("/v1/completions", {**ROUTES["/v1/completions"], "prompt": prompts, "stream": stream})
            narrow.wait_for_stats(
                lambda stats: stats.num_requests_running + stats.num_requests_waiting == 3, "all three are there"
            )
            wire.close()
            narrow.wait_until_idle()


def test_a_stream_that_is_closed_by_requests(narrow, narrow_front):
    """What `requests` does when a script leaves its loop."""
    with narrow_front.post("/v1/completions", {**ROUTES["/v1/completions"], "stream": True}, stream=True) as answer:
        assert next(answer.iter_content(None))
    narrow.wait_until_idle()


@pytest.mark.parametrize("family", ["openai", "anthropic"])
def test_a_stream_that_is_closed_by_an_sdk(narrow, narrow_front, family):
    with getattr(narrow_front, family)() as client:
        create = client.messages.create if family == "anthropic" else client.chat.completions.create
        options = dict(model=MODEL, messages=user(), max_tokens=900, extra_body={"ignore_eos": True}, stream=True)
        with create(**options) as stream:
            next(iter(stream))
        narrow.wait_until_idle()


def test_a_client_that_is_killed(narrow, narrow_front):
    program = (
        "import requests, sys\n"
        "body = {'prompt': 'The tide', 'max_tokens': 900, 'ignore_eos': True, 'stream': True}\n"
        "answer = requests.post(sys.argv[1] + '/v1/completions', json=body, stream=True)\n"
        "for chunk in answer.iter_content(None): print(len(chunk), flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, narrow_front.url], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().strip()
        process.send_signal(signal.SIGKILL)
        narrow.wait_until_idle()


def test_those_who_stay_are_not_disturbed(wide, front):
    alone = [wide.client.run(**numbered(number)).tokens for number in range(6)]
    streams = [wide.client.start(**numbered(number)) for number in range(6)]
    for _ in range(3):
        with contextlib.ExitStack() as leavers:
            for _ in range(30):
                wire = leavers.enter_context(front.wire())
                wire.post("/v1/completions", {**ROUTES["/v1/completions"], "stream": True})
    assert [stream.result().tokens for stream in streams] == alone
    wide.wait_until_idle()


def test_in_the_same_breath_as_the_request(wide, front):
    """The request may not even have been read when its client is gone."""
    for stream in (True, False):
        for _ in range(20):
            with front.wire() as wire:
                wire.post("/v1/completions", {**ROUTES["/v1/completions"], "stream": stream}).reset()
    wide.wait_until_idle()


def test_in_the_middle_of_a_body(wide, front):
    received = wide.client.stats().requests_finished_total
    with front.wire() as wire:
        whole = request_bytes("POST", "/v1/completions", b'{"prompt": "The tide", "max_tokens": 5}')
        wire.send(whole[:-10])
    wide.wait_until_idle()
    assert wide.client.stats().requests_finished_total == received


def test_a_pipelined_request_does_not_hide_the_end(narrow, narrow_front):
    """A second request is already in the buffer when the client goes: it is noticed all the same."""
    with narrow_front.wire() as wire:
        wire.post("/v1/completions", {**ROUTES["/v1/completions"], "stream": True})
        wire.read_until(b"data: ")
        wire.send(request_bytes("GET", "/health"))
        wire.reset()
        narrow.wait_until_idle()


def test_an_abort_ends_a_stream_properly(narrow, narrow_front):
    body = {**ROUTES["/v1/completions"], "stream": True, "request_id": "aborted-by-name"}
    with narrow_front.wire() as wire:
        wire.post("/v1/completions", body)
        wire.read_until(b"data: ")
        receipt = narrow_front.post("/abort", {"request_id": "aborted-by-name"}).json()
        assert receipt["stage"] == "decode" and receipt["rows_freed"] == 1
        assert b'"finish_reason":"abort"' in wire.read_until(b"[DONE]")


def test_long_decode_is_what_these_tests_assume(narrow):
    """One token per step: a request of this length cannot end before a test has looked."""
    stream = narrow.client.start(**LONG_DECODE)
    stream.read_tokens(3)
    assert narrow.client.stats().num_requests_running == 1
    narrow.client.abort(stream.request_id)
    stream.result()


def test_over_http_2_one_stream_goes_and_the_connection_stays(wide, front):
    """Gateways speak HTTP/2 to their backends: RST_STREAM is all they see of a client that left."""
    body = {**ROUTES["/v1/completions"], "stream": True}
    with RawClient("{}:{}".format(*front.address)) as raw:

        def post(**changes):
            sent = json.dumps({**body, **changes}).encode()
            return raw.call("/v1/completions", sent, content_type="application/json")

        survivor = post(max_tokens=200)
        aborted = wide.client.stats().requests_aborted_total
        for _ in range(5):
            raw.wait_for_data(post())
            raw.reset_streams(spare=survivor)
        stream = raw.wait(survivor)
        assert stream.headers[":status"] == "200" and stream.data.endswith(b"data: [DONE]\n\n")
        wide.wait_for_stats(lambda stats: stats.requests_aborted_total >= aborted + 4, "those that were reset are aborted")
        wide.wait_until_idle()
        last = raw.wait(post(max_tokens=3, stream=False))
        assert last.headers[":status"] == "200" and json.loads(last.data)["choices"]
