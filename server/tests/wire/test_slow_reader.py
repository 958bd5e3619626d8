"""Clients that do not read: their own sequences wait for them, nobody else does, and not for ever.

A stream that nobody reads is full once its buffer is. HTTP/2 and gRPC hold some messages of their own, so those are made
big (20 log-probabilities per token) and the client's window small; what is left of it is `TRANSPORT` tokens.
"""

import contextlib
import time

import grpc
import pytest
from client import ABORT, LENGTH, generate_request
from prompts import request
from raw_client import RawClient
from stages import LONG, LONG_DECODE
from tidemill.v1 import tidemill_pb2 as pb

BUFFER = 32
TRANSPORT = 400
FREE_SECONDS = 1
SLOW = dict(
    **{**LONG_DECODE, "temperature": 1, "seed": 11, "max_tokens": 900},
    logprobs=20,
    output=pb.OutputOptions(token_ids_only=True),
)
STATUS = {code: str(code.value[0]) for code in grpc.StatusCode}


@pytest.fixture
def server(start_server):
    """One row: if it is not free while its stream is parked, nobody else is served at all."""
    server = start_server(
        *("--max-num-seqs", "1", "--max-num-batched-tokens", "64", "--threads", "1"),
        *("--max-stream-buffer", str(BUFFER), "--slow-reader-timeout", "60"),
    )
    yield server
    is_left_alone(server)


@pytest.fixture
def impatient(start_server):
    """The same, for one second."""
    server = start_server(
        *("--max-num-seqs", "1", "--max-num-batched-tokens", "64", "--threads", "1"),
        *("--max-stream-buffer", str(BUFFER), "--slow-reader-timeout", "1"),
    )
    yield server
    is_left_alone(server)


def is_left_alone(server):
    """Nothing is left, and the canary still sings."""
    server.assert_as_new()
    assert server.client.stats().num_requests_parked == 0
    assert not server.complaints()


@contextlib.contextmanager
def parked(server, headers=(), **options):
    """A client whose stream is parked; yields it, the stream's number and the statistics from before."""
    server.wait_until_idle()
    before = server.client.stats()
    with RawClient(server.address, window=100) as raw:
        number = raw.generate(generate_request(**{**SLOW, **options}), headers)
        wait_until_parked(server, 1)
        yield raw, number, before


def wait_until_parked(server, count):
    """Waits until so many sequences are parked."""
    server.wait_for_stats(lambda stats: stats.num_requests_parked == count, f"{count} parked", 20)


def entries(messages):
    """Tokens and their log-probabilities."""
    return [(entry.token_id, entry.logprob) for message in messages for entry in message.logprobs]


def test_it_is_parked_and_goes_on_where_it_stopped(server):
    alone = server.client.run(**SLOW)
    with parked(server) as (raw, number, before):
        stats = server.client.stats()
        made = stats.generation_tokens_total - before.generation_tokens_total
        assert BUFFER <= made <= BUFFER + TRANSPORT, "so many fit into the buffer and the connection"
        assert (stats.num_requests_running, stats.num_requests_waiting, stats.kv_blocks_owned) == (0, 0, 0)
        time.sleep(0.2)
        assert server.client.stats().generation_tokens_total == stats.generation_tokens_total, "nothing more is made"
        assert server.client.stats().steps_total == stats.steps_total, "and nothing spins"
        raw.open_window(number, 1 << 20)
        stream = raw.wait(number, 30)
    assert stream.headers["grpc-status"] == STATUS[grpc.StatusCode.OK]
    assert entries(stream.generated()) == entries([alone]), "not a token, not a bit is different"
    assert [m.finish_reason for m in stream.generated() if m.finish_reason] == [LENGTH]


def test_others_get_its_row(server):
    numbers = range(6)
    alone = [server.client.run(**request(number)).tokens for number in numbers]
    with parked(server):
        for _ in range(3):
            streams = [server.client.start(**request(number)) for number in numbers]
            assert [stream.result().tokens for stream in streams] == alone
        assert server.client.stats().num_requests_parked == 1


def test_a_crowd_of_them_is_parked_too(server):
    """Nothing is made that nobody reads, so nothing piles up: so many tokens fit, however many were asked for."""
    crowd = 20
    before = server.client.stats()
    with contextlib.ExitStack() as clients:
        for _ in range(crowd):
            raw = clients.enter_context(RawClient(server.address, window=100))
            raw.generate(generate_request(**SLOW))
        wait_until_parked(server, crowd)
        made = server.client.stats().generation_tokens_total - before.generation_tokens_total
        assert made <= crowd * (BUFFER + TRANSPORT)
        assert server.sing() == server.canary
    server.wait_for_stats(lambda stats: stats.num_requests_parked == 0, "all are gone")
    assert server.client.stats().requests_aborted_total == before.requests_aborted_total + crowd


@pytest.mark.parametrize("way", ["reset_streams", "half_close", "close", "reset_connection"])
def test_it_goes_away(server, way):
    with parked(server) as (raw, _, before):
        getattr(raw, way)()
        server.wait_for_stats(lambda stats: stats.num_requests_parked == 0, "it is gone", FREE_SECONDS)
        server.wait_for_stats(
            lambda stats: stats.requests_aborted_total == before.requests_aborted_total + 1, "aborted", FREE_SECONDS
        )


def test_it_is_aborted(server):
    alone = server.client.run(**SLOW)
    with parked(server, request_id="parked") as (raw, number, _):
        receipt = server.client.abort("parked")
        assert server.client.stats().num_requests_parked == 0, "by the time the receipt is out"
        raw.open_window(number, 1 << 20)
        stream = raw.wait(number)
    assert receipt.rows_freed == 0 and receipt.completion_tokens >= BUFFER
    assert [m.finish_reason for m in stream.generated() if m.finish_reason] == [ABORT]
    assert stream.num_tokens() == receipt.completion_tokens, "it can still read what was made"
    assert entries(stream.generated()) == entries([alone])[: receipt.completion_tokens]


def test_its_deadline_passes(server):
    with parked(server, headers=[("grpc-timeout", "3S")]) as (raw, number, before):
        server.wait_for_stats(
            lambda stats: stats.requests_failed_total == before.requests_failed_total + 1, "its deadline passes", 10
        )
        assert server.client.stats().num_requests_parked == 0
        raw.open_window(number, 1 << 20)
        stream = raw.wait(number)
    assert stream.headers["grpc-status"] == STATUS[grpc.StatusCode.DEADLINE_EXCEEDED]
    assert not any(message.finish_reason for message in stream.generated())


def test_it_is_waited_for_so_long_and_no_longer(impatient):
    alone = impatient.client.run(**SLOW)
    with parked(impatient) as (raw, number, before):
        impatient.wait_for_stats(
            lambda stats: stats.requests_failed_total == before.requests_failed_total + 1, "it has ended", 5
        )
        stats = impatient.client.stats()
        assert (stats.num_requests_parked, stats.kv_blocks_owned) == (0, 0)
        raw.open_window(number, 1 << 20)
        stream = raw.wait(number)
    assert stream.headers["grpc-status"] == STATUS[grpc.StatusCode.RESOURCE_EXHAUSTED], stream.headers
    assert not any(message.finish_reason for message in stream.generated()), "a status, not a finish reason"
    assert BUFFER <= stream.num_tokens() < LONG
    assert entries(stream.generated()) == entries([alone])[: stream.num_tokens()]


def test_a_reader_that_is_slow_but_reads_is_never_cut_off(impatient):
    """It is parked again and again, for longer in all than an idle reader is waited for; but never as long at once."""
    alone = impatient.client.run(**SLOW)
    with parked(impatient) as (raw, number, _):
        start = time.monotonic()
        while not raw.streams[number].ended:
            raw.allow(number, 12_000)
            raw.read_for(0.1)
        stream = raw.streams[number]
    assert time.monotonic() - start > 1, "longer than it would be waited for"
    assert stream.headers["grpc-status"] == STATUS[grpc.StatusCode.OK], stream.headers
    assert entries(stream.generated()) == entries([alone])
