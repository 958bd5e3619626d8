"""Deadlines: the server keeps them itself, at every stage, and says so.

The requests are written by hand, because a gRPC library would end the call on its own side and never show the server's
answer. No time is assumed: the narrow server's own pace is measured first, and a fifth of a stage is well inside it.
"""

import time
import urllib.parse

import grpc
import pytest
from client import refusal
from raw_client import GET_STATS, RawClient, frame
from stages import LONG_DECODE, LONG_PREFILL, STAGES, in_stage, is_gone, request_in

DEADLINE_EXCEEDED = str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])


def seconds_in(server, stage):
    """How long a stage lasts now when nobody ends it; a request is queued for as long as another one decodes."""
    start = time.monotonic()
    server.client.run(**(LONG_PREFILL if stage == "prefill" else LONG_DECODE))
    return time.monotonic() - start


@pytest.mark.parametrize("stage", STAGES)
def test_it_passes(narrow, stage):
    failed = narrow.client.stats().requests_failed_total
    timeout = f"{int(seconds_in(narrow, stage) / 5 * 1e3)}m"
    with RawClient(narrow.address) as raw:
        with in_stage(narrow, stage, lambda: raw.generate(request_in(stage), [("grpc-timeout", timeout)])) as number:
            stream = raw.wait(number)
            narrow.wait_for_stats(is_gone(stage), "the request is gone")
    assert stream.headers["grpc-status"] == DEADLINE_EXCEEDED, stream.headers
    assert not any(message.finish_reason for message in stream.generated()), "a status, not a finish reason"
    tokens = sum(len(message.token_ids) for message in stream.generated())
    assert f"after {tokens} tokens" in urllib.parse.unquote(stream.headers["grpc-message"]), "every token was delivered before"
    assert (tokens > 0) == (stage == "decode")
    assert narrow.client.stats().requests_failed_total == failed + 1


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


def test_a_library_sees_it_and_others_do_not(narrow):
    stream = narrow.client.start(**LONG_DECODE, timeout=seconds_in(narrow, "decode") / 5)
    error = refusal(stream.result)
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert stream.completions[0].ids, "what came before the deadline was delivered"
    narrow.wait_until_idle()


def test_a_request_that_keeps_it_is_not_touched_by_it(wide):
    options = dict(prompt="The tide", temperature=0, max_tokens=10, ignore_eos=True)
    assert wide.client.run(**options, timeout=30).tokens == wide.client.run(**options).tokens
