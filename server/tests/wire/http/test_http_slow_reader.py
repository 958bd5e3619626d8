"""Clients of HTTP that do not read: their own sequences wait for them, nobody else does, and not for ever."""

import time

import pytest
from front import MODEL, Front, Wire, chunks
from prompts import request

# Each token brings kilobytes, so that no buffer of a kernel holds a whole answer.
SLOW = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "The tide"}],
    "max_tokens": 900,
    "ignore_eos": True,
    "temperature": 1,
    "seed": 11,
    "logprobs": True,
    "top_logprobs": 20,
    "stream": True,
    "n": 8,
}
OPTIONS = (
    *("--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--threads", "1"),
    *("--max-stream-buffer", "32"),
)


@pytest.fixture
def server(start_server):
    """A server whose streams hold 32 tokens that nobody has read."""
    server = start_server(*OPTIONS, "--slow-reader-timeout", "60")
    yield server
    server.assert_as_new()
    assert server.client.stats().num_requests_parked == 0 and not server.complaints()


def wait_until_parked(server, wire):
    """Waits until the whole request is parked."""
    wire.post("/v1/chat/completions", SLOW)
    server.wait_for_stats(lambda stats: stats.num_requests_parked == 8, "it is parked", 20)


def test_it_is_parked_and_others_are_served(server):
    with Wire(Front(server.url).address, receive_buffer=4096) as wire:
        wait_until_parked(server, wire)
        made = server.client.stats().generation_tokens_total
        time.sleep(0.2)
        stats = server.client.stats()
        assert stats.generation_tokens_total == made and stats.num_requests_running == 0, "nothing is made for nobody"
        assert stats.kv_blocks_owned == 0
        assert server.client.run(**request(1)).tokens and Front(server.url).chat()
        assert server.sing() == server.canary
        wire.close()
        server.wait_for_stats(lambda stats: stats.num_requests_parked == 0, "it is gone", 2)


def test_it_goes_on_where_it_stopped(server):
    body = {**SLOW, "n": 8, "max_tokens": 300}
    with Wire(Front(server.url).address) as reader:
        whole = reader.post("/v1/chat/completions", body).reply()
    with Wire(Front(server.url).address, receive_buffer=4096) as wire:
        wire.post("/v1/chat/completions", body)
        time.sleep(0.5)
        slow = wire.reply()
    assert tokens_by_choice(slow.body) == tokens_by_choice(whole.body)


def tokens_by_choice(body):
    """Choice to its tokens, of a stream with logprobs."""
    found = {}
    for chunk in chunks(body):
        for choice in chunk["choices"]:
            for entry in (choice.get("logprobs") or {}).get("content") or []:
                found.setdefault(choice["index"], []).append((entry["token"], entry["logprob"]))
    return found


def test_it_is_waited_for_so_long_and_no_longer(start_server):
    server = start_server(*OPTIONS, "--slow-reader-timeout", "1")
    with Wire(Front(server.url).address, receive_buffer=4096) as wire:
        wait_until_parked(server, wire)
        server.wait_for_stats(lambda stats: stats.num_requests_parked == 0, "it has ended", 5)
        said = wire.reply().body
    assert b'"error"' in said, "the end is told to whoever reads at last"
    server.assert_as_new()
