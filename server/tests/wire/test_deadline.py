"""Deadlines in every form in which they come; the fault matrix lets them pass at every stage.

The requests are written by hand, because a gRPC library would end the call on its own side and never show the server's
answer.
"""

import grpc
import pytest
from client import refusal
from raw_client import GET_STATS, RawClient, frame
from stages import occupied, request_in

DEADLINE_EXCEEDED = str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])


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
