"""The end of a server: what runs may finish, what is new goes elsewhere, and the exit code tells the truth."""

import signal
import threading

import grpc
import pytest
from client import LENGTH, Client, refusal
from grpc_health.v1 import health_pb2
from stages import LONG_DECODE
from tidemill.v1 import tidemill_pb2 as pb

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
INTERRUPTED = 130
SHORT = dict(prompt="The tide", temperature=0, max_tokens=3, ignore_eos=True)


def refuses_new_work(server):
    """Whether a new request is told to go elsewhere."""
    try:
        server.client.run(**SHORT)
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.UNAVAILABLE, error
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_lets_the_running_finish_and_refuses_the_new(start_server, number):
    server = start_server("--shutdown-timeout", "40")
    request = dict(**LONG_DECODE, n=4)
    alone = server.client.run(**request).tokens
    running = [server.client.start(**request).read_tokens(1) for _ in range(2)]
    server.send_signal(number)
    server.wait_until(lambda: server.client.stats().draining, "it drains")
    assert refuses_new_work(server)
    assert server.client.serving_status() == NOT_SERVING
    assert server.client.serving_status("tidemill.v1.Inference") == NOT_SERVING
    assert [stream.result().tokens for stream in running] == [alone] * 2
    assert server.wait_for_exit() == 0


def test_those_that_wait_are_served_too(start_server):
    server = start_server("--max-num-seqs", "1")
    first = server.client.start(**{**LONG_DECODE, "max_tokens": 300}).read_tokens(1)
    waiting = server.client.start(**SHORT)
    server.wait_for_stats(lambda stats: stats.num_requests_waiting == 1, "one waits")
    server.send_signal(signal.SIGTERM)
    assert first.result().finish == LENGTH
    assert waiting.result().finish == LENGTH
    assert server.wait_for_exit() == 0


def test_an_idle_server_leaves_at_once(start_server):
    server = start_server("--shutdown-timeout", "1000")
    server.send_signal(signal.SIGTERM)
    assert server.wait_for_exit() == 0


def test_idle_connections_and_watchers_do_not_hold_it_up(start_server):
    server = start_server("--shutdown-timeout", "1000", "--log-level", "debug")
    with Client(server.address) as idle:
        assert idle.is_serving()
        watch = idle.control.WatchStats(pb.WatchStatsRequest())
        health = idle.health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).stats.kv_blocks_total and next(health).status
        server.send_signal(signal.SIGTERM)
        assert server.wait_for_exit() == 0
    assert "connections are closed that did not close by themselves" not in server.stderr()


def test_what_is_left_after_the_grace_period_is_cut_off(start_server):
    server = start_server("--shutdown-timeout", "0.05", "--max-num-seqs", "1", "--max-num-batched-tokens", "1")
    running = server.client.start(**LONG_DECODE, n=8).read_tokens(1)
    waiting = server.client.start(**LONG_DECODE)
    server.wait_for_stats(lambda stats: stats.num_requests_waiting == 8, "all others wait")
    server.send_signal(signal.SIGTERM)
    for stream in (running, waiting):
        assert refusal(stream.result).code() == grpc.StatusCode.UNAVAILABLE
    assert server.wait_for_exit() == 0


def test_a_second_signal_is_immediate(start_server):
    server = start_server("--shutdown-timeout", "1000", "--max-num-seqs", "1", "--max-num-batched-tokens", "1")
    running = server.client.start(**LONG_DECODE, n=8).read_tokens(1)
    waiting = [server.client.start(**LONG_DECODE) for _ in range(10)]
    server.send_signal(signal.SIGTERM)
    server.wait_until(lambda: server.client.stats().draining, "it drains")
    server.send_signal(signal.SIGTERM)
    assert server.wait_for_exit(5) == INTERRUPTED
    for stream in (running, *waiting):
        assert refusal(stream.result).code() == grpc.StatusCode.UNAVAILABLE


def test_health_watchers_see_the_end_coming(start_server):
    server = start_server("--shutdown-timeout", "40")
    seen = []

    def watch():
        try:
            seen.extend(answer.status for answer in server.client.health.Watch(health_pb2.HealthCheckRequest()))
        except grpc.RpcError:
            pass

    watcher = threading.Thread(target=watch)
    watcher.start()
    server.wait_until(lambda: seen, "the watcher is told")
    running = server.client.start(**LONG_DECODE).read_tokens(1)
    server.send_signal(signal.SIGTERM)
    server.wait_until(lambda: NOT_SERVING in seen, "the watcher is told while the request still runs")
    assert running.result().finish == LENGTH
    assert server.wait_for_exit() == 0
    watcher.join(10)
    assert seen[0] == health_pb2.HealthCheckResponse.SERVING


def test_the_drain_rpc_waits_and_counts(start_server):
    server = start_server()
    running = [server.client.start(**{**LONG_DECODE, "max_tokens": 200}).read_tokens(1) for _ in range(2)]
    drain = server.client.control.Drain.future(pb.DrainRequest(timeout_seconds=40))
    server.wait_until(lambda: server.client.stats().draining, "it drains")
    assert refuses_new_work(server)
    assert server.client.serving_status() == NOT_SERVING
    assert not drain.done()
    assert [stream.result().finish for stream in running] == [LENGTH] * 2
    assert (drain.result().finished, drain.result().cut_off) == (2, 0)
    again = server.client.control.Drain(pb.DrainRequest())
    assert (again.finished, again.cut_off) == (0, 0)
    server.wait_until_idle()
    assert server.stop() == 0


def test_the_drain_rpc_cuts_off_what_is_left(start_server):
    server = start_server("--max-num-seqs", "1", "--max-num-batched-tokens", "1")
    stream = server.client.start(**LONG_DECODE, n=8).read_tokens(1)
    answer = server.client.control.Drain(pb.DrainRequest(timeout_seconds=0))
    assert (answer.finished, answer.cut_off) == (0, 1)
    assert refusal(stream.result).code() == grpc.StatusCode.UNAVAILABLE
    server.wait_until_idle()


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), 1e300])
def test_the_drain_rpc_refuses_times_that_are_none(start_server, seconds):
    """Refused or taken for "as long as it takes", but answered."""
    server = start_server()
    try:
        server.client.control.Drain(pb.DrainRequest(timeout_seconds=seconds))
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert server.client.run(**SHORT).ids, "nothing has happened"


def test_killed_and_started_again(start_server):
    server = start_server()
    streams = [server.client.start(**LONG_DECODE) for _ in range(5)]
    streams[4].read_tokens(1)
    canary = server.canary
    server.kill()
    for stream in streams:
        assert refusal(stream.result).code() == grpc.StatusCode.UNAVAILABLE
    assert start_server().canary == canary
