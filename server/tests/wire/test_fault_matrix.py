"""The fault matrix: every way for a request to end early, at every stage of its life.

In each cell the request's blocks and row are back within `FREE_SECONDS` of the notice, the server counts exactly one end,
and whoever held the request up goes on. `nothing_leaks` looks for what is left, and lets the canary sing, after each.

RST_STREAM, FIN, a reset connection and the death of the client are noticed at once; of an abort and a deadline the server
gives notice itself. Only a client that falls silent is noticed late, by the keepalive: those cells stand together in one
test that waits once.
"""

import contextlib
import math
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import grpc
import pytest
from client import ABORT, LENGTH, Client
from raw_client import RawClient
from servers import SERVERS
from silent_proxy import SilentProxy
from stages import (
    LAST,
    LONG,
    READING,
    SERVER_OF,
    STAGES,
    fresh_prompt,
    held_up,
    in_stage,
    is_gone,
    num_sequences,
    options_in,
    request_in,
    rows_of,
    wait_for_stage,
)
from tidemill.v1 import tidemill_pb2 as pb

# From the notice until nothing is left. It takes milliseconds; the machine may be slow and shared.
FREE_SECONDS = 1
# A fault at the last token but one races with the end, so those cells are run several times.
RACES = 5
ATTEMPTS = 5
BREAKS = ["reset_streams", "half_close", "close", "reset_connection"]
OK, DEADLINE_EXCEEDED = "0", str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
ABORT_STAGE_OF = {
    "queued": [pb.ABORT_STAGE_QUEUED],
    "prefill": [pb.ABORT_STAGE_PREFILL],
    "mid-chunk": [pb.ABORT_STAGE_PREFILL],
    "decode": [pb.ABORT_STAGE_DECODE],
    "finishing": [pb.ABORT_STAGE_DECODE, pb.ABORT_STAGE_FINISHED],
    "preempted": [pb.ABORT_STAGE_QUEUED],
}

at_every_stage = pytest.mark.parametrize("stage", STAGES)


@pytest.fixture
def server(request, stage):
    """The server that can hold a request in this stage."""
    return request.getfixturevalue(SERVER_OF[stage])


def num_ended(stats):
    """Accepted requests that have ended, in whatever way."""
    return stats.requests_finished_total + stats.requests_aborted_total + stats.requests_failed_total


def idle_stats(server):
    """The statistics once they know of everything that went before: a stream may end a moment before it is counted."""
    server.wait_until_idle()
    return server.client.stats()


class Victim:
    """A request on a connection of its own, written by hand: a library would not show what the server sends."""

    def __init__(self, server, stage, headers=()):
        self.raw = RawClient(server.address)
        self.id = f"victim/{time.monotonic_ns()}"
        self.number = self.raw.generate(request_in(stage, request_id=self.id), headers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.raw.close()

    def read_tokens(self, count):
        """Reads until so many tokens have come."""
        self.raw.wait_for_tokens(self.number, count)

    def end(self):
        """Reads to the end; returns status, tokens and finish reasons."""
        stream = self.raw.wait(self.number)
        finishes = [message.finish_reason for message in stream.generated() if message.finish_reason]
        return stream.headers, stream.num_tokens(), finishes


class Puppet:
    """A request of a client process that can be killed."""

    def __init__(self, server):
        command = [sys.executable, Path(__file__).with_name("puppet.py"), server.address]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.process.communicate()

    def start(self, request):
        """Lets it send the request."""
        self.process.stdin.write(request.SerializeToString().hex() + "\n")
        self.process.stdin.flush()
        return self

    def read_tokens(self, count):
        """Waits until so many tokens have come to it."""
        while int(self.process.stdout.readline()) < count:
            pass

    def kill(self):
        """SIGKILL."""
        self.process.kill()


def ends_once(server, stage, before, seconds=FREE_SECONDS):
    """Waits until a request that was in this stage is gone; returns the statistics, which know of one end."""

    def over(stats):
        return num_ended(stats) > num_ended(before) and is_gone_now(stats)

    is_gone_now = is_gone(server, stage)
    server.wait_for_stats(over, "it has ended and all that it held is back", seconds)
    after = server.client.stats()
    assert num_ended(after) == num_ended(before) + 1, "one end"
    return after


def is_aborted(stage, before, after):
    """That its end was an abort, unless it raced with the natural end; and that nobody waited for a token to notice."""
    aborted = after.requests_aborted_total - before.requests_aborted_total
    finished = after.requests_finished_total - before.requests_finished_total
    assert (aborted, finished) == (1, 0) or (stage == "finishing" and (aborted, finished) == (0, 1))
    if stage in READING:
        assert after.generation_tokens_total == before.generation_tokens_total, "noticed before there was a token"


@pytest.mark.parametrize("way", BREAKS)
@at_every_stage
def test_a_connection_that_breaks(server, stage, way):
    for _ in range(RACES if stage == "finishing" else 1):
        before = idle_stats(server)
        with in_stage(server, stage, lambda: Victim(server, stage)) as victim, victim:
            getattr(victim.raw, way)()
            is_aborted(stage, before, ends_once(server, stage, before))


@at_every_stage
def test_a_client_that_is_killed(server, stage):
    with Puppet(server) as puppet:
        before = idle_stats(server)
        with in_stage(server, stage, lambda: puppet.start(request_in(stage))):
            puppet.kill()
            is_aborted(stage, before, ends_once(server, stage, before))


@at_every_stage
def test_an_abort(server, stage):
    for _ in range(RACES if stage == "finishing" else 1):
        before = idle_stats(server)
        with in_stage(server, stage, lambda: Victim(server, stage)) as victim, victim:
            receipt = server.client.abort(victim.id)
            # No waiting: the receipt says that it is done.
            assert is_gone(server, stage)(server.client.stats())
            headers, tokens, finishes = victim.end()
            is_aborted(stage, before, ends_once(server, stage, before))
        assert receipt.stage in ABORT_STAGE_OF[stage]
        raced = receipt.stage == pb.ABORT_STAGE_FINISHED
        assert finishes == [LENGTH if raced else ABORT] and headers["grpc-status"] == OK
        assert tokens == receipt.completion_tokens and (tokens == LAST or not raced)
        assert receipt.rows_freed == (stage not in ("queued", "preempted") and not raced)
        assert (receipt.blocks_freed > 0) == (receipt.rows_freed > 0)


def seconds_until(server, stage):
    """How long a request takes into this stage now."""
    with held_up(server, stage):
        before, start = server.client.stats(), time.monotonic()
        with Victim(server, stage) as victim:
            wait_for_stage(server, stage, before, victim)
            seconds = time.monotonic() - start
            server.client.abort(victim.id)
    return seconds


def missed(server, stage, before, after, tokens):
    """Whether a deadline passed before or after the stage that it was meant for, as far as the statistics can tell."""
    steps = after.steps_total - before.steps_total
    return not {
        "queued": after.num_requests_running == rows_of(server) and tokens == 0,
        "prefill": steps == 0 and tokens == 0,
        "mid-chunk": 3 <= steps < LONG - 1 and tokens == 0,
        "decode": 0 < tokens < LONG,
        "finishing": True,
        "preempted": after.preemptions_total > before.preemptions_total and num_sequences(after) == rows_of(server),
    }[stage]


def try_deadline(server, stage):
    """Lets a deadline pass in this stage; False when the machine's pace changed so much that it missed."""
    server.wait_until_idle()
    seconds = seconds_until(server, stage)
    # Every stage but the end is longer than this; how much longer depends on the machine.
    seconds += 0 if stage == "finishing" else 0.02 + seconds / 4
    with held_up(server, stage):
        before = server.client.stats()
        with Victim(server, stage, [("grpc-timeout", f"{math.ceil(seconds * 1e6)}u")]) as victim:
            headers, tokens, finishes = victim.end()
        message = urllib.parse.unquote(headers.get("grpc-message", ""))
        if "before the request could start" in message:
            return False
        after = ends_once(server, stage, before)
        if headers["grpc-status"] == OK:
            assert finishes == [LENGTH] and after.requests_finished_total == before.requests_finished_total + 1
            return stage == "finishing"
        assert headers["grpc-status"] == DEADLINE_EXCEEDED and not finishes, "a status, not a finish reason"
        assert after.requests_failed_total == before.requests_failed_total + 1
        assert f"after {tokens} tokens" in message, "every token came before"
    return not missed(server, stage, before, after, tokens)


@at_every_stage
def test_a_deadline(server, stage):
    for _ in range(RACES if stage == "finishing" else 1):
        assert any(try_deadline(server, stage) for _ in range(ATTEMPTS)), f"{ATTEMPTS} deadlines missed the stage"


# Half-open connections. The server must have something to do for longer than it takes to notice, whatever the machine: so the
# requests have eight completions, and rows are taken by eight.
KEEPALIVE = 0.4
SILENT_OPTIONS = {
    **{stage: SERVERS[SERVER_OF[stage]]["options"] for stage in STAGES},
    "queued": ("--max-num-seqs", "8", "--max-num-batched-tokens", "8", "--threads", "1"),
    "prefill": ("--max-num-seqs", "1", "--max-num-batched-tokens", "384", "--threads", "1"),
}
SILENT_REQUESTS = {
    "queued": dict(n=8),
    "prefill": dict(prompt=fresh_prompt(500), max_tokens=500, n=8),
    "mid-chunk": dict(prompt=fresh_prompt(500), max_tokens=500, n=8),
    "decode": dict(n=8),
    "finishing": {},
    "preempted": {},
}


@contextlib.contextmanager
def silent_client(server, stage):
    """A client that reaches this stage and is then cut off without a word; yields the statistics from before."""
    before = idle_stats(server)
    with SilentProxy(server.address) as proxy, Client(proxy.address) as client:
        start = lambda: client.start(**options_in(stage, **SILENT_REQUESTS[stage]))  # noqa: E731
        with in_stage(server, stage, start):
            proxy.silence()
            yield before


def test_half_open_connections(start_server):
    options = ("--keepalive-interval", str(KEEPALIVE), "--keepalive-timeout", str(KEEPALIVE))
    servers = {stage: start_server(*SILENT_OPTIONS[stage], *options) for stage in STAGES}
    with contextlib.ExitStack() as silent:
        before = {stage: silent.enter_context(silent_client(servers[stage], stage)) for stage in STAGES}
        end = time.monotonic() + 2 * KEEPALIVE + FREE_SECONDS
        for stage, server in servers.items():
            seconds = max(0, end - time.monotonic())
            after = ends_once(server, stage, before[stage], seconds)
            aborted = after.requests_aborted_total - before[stage].requests_aborted_total
            assert stage == "finishing" or aborted == 1, "cut off, not finished"
    canary = servers["decode"].canary
    for server in servers.values():
        server.assert_as_new()
        assert server.canary == canary, "the options of a server are not seen in its tokens"
        assert server.stop() == 0
