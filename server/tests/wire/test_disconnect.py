"""Clients that go away in crowds, or do worse: what they held comes back, and nobody else pays for it."""

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

from client import Client, generate_request
from prompts import request
from raw_client import RawClient
from stages import LONG_DECODE

ENDLESS = {**LONG_DECODE, "max_tokens": 900}


@contextlib.contextmanager
def crowd(server, count):
    """A process of its own with so many long streams, each with a token; killed at the end."""
    command = [sys.executable, Path(__file__).with_name("crowd.py"), server.address, str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline().strip() == f"{count} streams"
            yield process
        finally:
            process.kill()


def test_a_stream_of_several_completions_that_is_cancelled(wide):
    wide.client.start(**ENDLESS, n=8).read_tokens(9).cancel()
    wide.wait_until_idle()


def test_a_channel_that_is_closed_takes_all_its_streams_along(wide):
    alone = wide.client.run(**request(1)).tokens
    aborted = wide.client.stats().requests_aborted_total
    with Client(wide.address) as leaver:
        for stream in [leaver.start(**ENDLESS) for _ in range(10)]:
            stream.read_tokens(1)
        staying = wide.client.start(**request(1))
    assert staying.result().tokens == alone
    wide.wait_for_stats(lambda s: s.requests_aborted_total == aborted + 10, "all ten are aborted")


def test_a_client_that_is_killed(wide):
    aborted = wide.client.stats().requests_aborted_total
    with crowd(wide, 12) as process:
        process.send_signal(signal.SIGKILL)
        wide.wait_for_stats(lambda s: s.requests_aborted_total == aborted + 12, "all twelve are aborted")
        wide.wait_until_idle()


def test_a_client_that_hangs_disturbs_nobody(wide):
    """For the kernel its connection is alive; it only never reads again."""
    alone = wide.client.run(**request(2)).tokens
    with crowd(wide, 4) as process:
        process.send_signal(signal.SIGSTOP)
        assert wide.client.run(**request(2)).tokens == alone
    wide.wait_until_idle()


def test_cancels_by_the_hundred_do_not_cost_the_connection(wide):
    """A client may lose interest in many requests at once; others on the same connection must not pay for it."""
    alone = wide.client.run(**request(5)).tokens
    survivor = wide.client.start(**request(5))
    for _ in range(10):
        for stream in [wide.client.start(**ENDLESS) for _ in range(40)]:
            stream.cancel()
    assert survivor.result().tokens == alone


def test_resets_in_the_same_breath_as_their_requests(wide):
    """RST_STREAM right behind HEADERS, before the server can have looked; a stream of the same connection lives on."""
    survivor = {**LONG_DECODE, "max_tokens": 100}
    ids = wide.client.run(**survivor).ids
    with RawClient(wide.address) as raw:
        number = raw.generate(generate_request(**survivor))
        raw.wait_for_data(number)
        with raw.one_breath():
            for _ in range(200):
                raw.generate(generate_request(**ENDLESS))
            raw.reset_streams(spare=number)
        stream = raw.wait(number)
        wide.wait_until_idle()
    assert [token for message in stream.generated() for token in message.token_ids] == ids
    assert stream.headers["grpc-status"] == "0"


def test_a_slow_reader_holds_up_nobody_and_loses_nothing(wide):
    numbers = range(8)
    alone = [wide.client.run(**request(number)).tokens for number in numbers]
    slow = {**LONG_DECODE, "max_tokens": 300}
    ids = wide.client.run(**slow).ids
    with RawClient(wide.address, window=100) as raw:
        number = raw.generate(generate_request(**slow))
        raw.wait_for_data(number, 60)
        streams = [wide.client.start(**request(number)) for number in numbers]
        assert [stream.result().tokens for stream in streams] == alone
        raw.open_window(number, 1 << 20)
        stream = raw.wait(number, 30)
    assert stream.headers["grpc-status"] == "0"
    assert [token for message in stream.generated() for token in message.token_ids] == ids


def test_slow_readers_that_go_away(wide):
    with RawClient(wide.address, window=100) as raw:
        numbers = [raw.generate(generate_request(**ENDLESS)) for _ in range(4)]
        for number in numbers:
            raw.wait_for_data(number, 60)
        raw.close()
        wide.wait_until_idle()


def test_many_connections_that_say_nothing(wide):
    alone = wide.client.run(**request(3)).tokens
    with contextlib.ExitStack() as silent:
        for _ in range(100):
            silent.enter_context(RawClient(wide.address))
        with Client(wide.address) as newcomer:
            assert newcomer.run(**request(3)).tokens == alone
