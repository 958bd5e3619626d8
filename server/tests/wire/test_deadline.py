"""Deadlines: the server keeps them itself, at every stage, and says so.

The requests are written by hand, because a gRPC library would end the call on its own side and never show the server's
answer. No time is assumed: the narrow server's own pace is measured first, and a quarter of a stage is inside it.
"""

import contextlib
import time
import urllib.parse

import grpc
import pytest
from client import refusal
from raw_client import GET_STATS, RawClient, frame
from stages import LONG_DECODE, LONG_PREFILL, STAGES, is_gone, occupied, request_in

DEADLINE_EXCEEDED = str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])


def seconds_in(server, stage):
    """How long a stage lasts now when nobody ends it; a request is queued for as long as another one decodes."""
    start = time.monotonic()
    server.client.run(**(LONG_PREFILL if stage == "prefill" else LONG_DECODE))
    return time.monotonic() - start


def until_the_deadline(server, stage):
    """Runs into a deadline in this stage; None when the machine's pace changed so much that it came before or after."""
    timeout = f"{int(seconds_in(server, stage) / 4 * 1e3)}m"
    with occupied(server) if stage == "queued" else contextlib.nullcontext(), RawClient(server.address) as raw:
        before = server.client.stats()
        stream = raw.wait(raw.generate(request_in(stage), [("grpc-timeout", timeout)]))
        server.wait_for_stats(is_gone(stage), "the request is gone")
        after = server.client.stats()
    tokens = sum(len(message.token_ids) for message in stream.generated())
    reached = {
        "queued": after.num_requests_running == 1,
        "prefill": tokens == 0 and after.steps_total > before.steps_total,
        "decode": tokens > 0,
    }
    if stream.headers["grpc-status"] == "0" or not reached[stage]:
        return None
    assert after.requests_failed_total == before.requests_failed_total + 1
    return stream, tokens


@pytest.mark.parametrize("stage", STAGES)
def test_it_passes(narrow, stage):
    outcome = next(filter(None, (until_the_deadline(narrow, stage) for _ in range(5))), None)
    assert outcome, "in five attempts no deadline ended the request in this stage"
    stream, tokens = outcome
    assert stream.headers["grpc-status"] == DEADLINE_EXCEEDED, stream.headers
    assert not any(message.finish_reason for message in stream.generated()), "a status, not a finish reason"
    message = urllib.parse.unquote(stream.headers["grpc-message"])
    assert f"after {tokens} tokens" in message, "every token was delivered before"


@pytest.mark.parametrize("timeout", ["1n", "0m", "1m"])
def test_it_has_passed_already(narrow, timeout):
    with RawClient(narrow.address) as raw:
        stream = raw.wait(raw.generate(request_in("decode"), [("grpc-timeout", timeout)]))
    assert stream.headers["grpc-status"] == DEADLINE_EXCEEDED, stream.headers


@pytest.mark.parametrize("timeout", ["99999999H", "10S", "99999999n"])
def test_it_is_far_away(wide, timeout):
    with RawClient(wide.address) as raw:
        request = request_in("decode", max_tokens=2)
        stream = raw.wait(raw.generate(request, [("grpc-timeout", timeout)]))
    assert stream.headers["grpc-status"] == "0", stream.headers


@pytest.mark.parametrize("timeout", ["", "soon", "1", "S", "-1S", "1.5S", "123456789S", "1s"])
def test_it_is_no_deadline(wide, timeout):
    """Malformed: refused or ignored, but answered."""
    with RawClient(wide.address) as raw:
        stream = raw.wait(raw.generate(request_in("decode", max_tokens=2), [("grpc-timeout", timeout)]))
    assert stream.headers["grpc-status"] in ("0", str(grpc.StatusCode.INVALID_ARGUMENT.value[0])), stream.headers


def test_it_counts_for_calls_without_a_stream_too(wide):
    with RawClient(wide.address) as raw:
        stream = raw.wait(raw.call(GET_STATS, frame(b""), [("grpc-timeout", "10S")]))
    assert stream.headers["grpc-status"] == "0", stream.headers


def test_a_library_sees_it(narrow):
    """The occupant has the row for longer than the deadline, whatever the machine's pace."""
    with occupied(narrow):
        stream = narrow.client.start("The tide", n=8, timeout=0.05)
        assert refusal(stream.result).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        narrow.wait_for_stats(lambda stats: stats.num_requests_waiting == 0, "the request is gone")


def test_a_request_that_keeps_it_is_not_touched_by_it(wide):
    options = dict(prompt="The tide", temperature=0, max_tokens=10, ignore_eos=True)
    assert wide.client.run(**options, timeout=30).tokens == wide.client.run(**options).tokens
