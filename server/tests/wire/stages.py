"""Stages of a request's life, each held for long enough to do something to a request that is in it.

The narrow server computes one token per step, so a prompt of a thousand tokens is a thousand chunks, and while one
request has its only row, the next one waits. The chunky server reads most of a long prompt in one step. On the tight one
eight rows of an older request grow until the blocks of a younger one are taken from it, which then cannot come back
before they have ended: its whole sequence is one chunk, and that needs all its blocks at once.
"""

import contextlib
import itertools

from client import generate_request

SERVER_OF = {
    "queued": "narrow",
    "prefill": "chunky",
    "mid-chunk": "narrow",
    "decode": "narrow",
    "finishing": "narrow",
    "preempted": "tight",
}
STAGES = list(SERVER_OF)
# Stages in which others hold the request up.
HELD_UP = ("queued", "preempted")
# Stages in which the prompt is being read.
READING = ("prefill", "mid-chunk")

LONG = 1000
LONG_DECODE = dict(prompt=[72, 73], temperature=0, max_tokens=LONG, ignore_eos=True)
LAST = 12  # tokens of a request that is caught finishing

_numbers = itertools.count()


def fresh_prompt(length):
    """A prompt that no request had before: whatever the server keeps of those, this one is read from its first token."""
    number = next(_numbers)
    return [5 + number % 1000, 5 + number // 1000, *(5 + i % 200 for i in range(length - 2))]


def options_in(stage, **options):
    """The options of the request that `in_stage` wants to be started."""
    of_stage = {}
    if stage in READING:
        of_stage = dict(prompt=fresh_prompt(LONG), max_tokens=8)
    elif stage == "finishing":
        of_stage = dict(max_tokens=LAST)
    elif stage == "preempted":
        of_stage = dict(prompt=fresh_prompt(800), max_tokens=200)
    return {**LONG_DECODE, **of_stage, **options}


def request_in(stage, **options):
    """The same, as a message."""
    return generate_request(**options_in(stage, **options))


def rows_of(server):
    """Rows that `occupied` takes: a request has at most 8."""
    return min(8, server.client.model().max_num_seqs)


@contextlib.contextmanager
def occupied(server):
    """A long decode has all rows that one request can have; yields its stream. Aborted at the end."""
    rows = rows_of(server)
    stream = server.client.start(**LONG_DECODE, n=rows).read_tokens(1)
    server.wait_for_stats(lambda s: s.num_requests_running == rows, "the rows are taken")
    try:
        yield stream
    finally:
        server.client.abort(stream.request_id)
        for completion in stream.result().completions:
            assert completion.ids, "whoever has the row is not disturbed"


def held_up(server, stage):
    """What has to go on around a request for it to stay in this stage."""
    return occupied(server) if stage in HELD_UP else contextlib.nullcontext()


def wait_for_stage(server, stage, before, stream):
    """Waits until the request of `stream`, the newest one, is in this stage; `before` was read before it was sent."""
    wait = server.wait_for_stats
    if stage == "queued":
        wait(lambda s: s.num_requests_waiting > before.num_requests_waiting, "the request waits")
    elif stage == "prefill":
        wait(lambda s: s.num_requests_running >= 1 and s.kv_blocks_owned >= 2, "it has a row")
    elif stage == "mid-chunk":
        wait(lambda s: s.steps_total >= before.steps_total + 3 and s.kv_blocks_owned >= 2, "it has read some chunks")
        assert server.client.stats().generation_tokens_total == before.generation_tokens_total
    elif stage == "decode":
        wait(lambda s: s.generation_tokens_total >= before.generation_tokens_total + 2, "it generates")
    elif stage == "finishing":
        # The statistics are not quick enough for that.
        stream.read_tokens(LAST - 1)
    else:
        wait(lambda s: s.preemptions_total > before.preemptions_total, "it has lost its blocks")


@contextlib.contextmanager
def in_stage(server, stage, start):
    """Calls `start()`, which sends `request_in(stage)`, and yields its value once the server has the request there."""
    with held_up(server, stage):
        before = server.client.stats()
        stream = start()
        wait_for_stage(server, stage, before, stream)
        yield stream


def is_gone(server, stage):
    """Whether, by the statistics, nothing is left of a request that was in this stage."""
    if stage not in HELD_UP:
        return lambda stats: num_sequences(stats) == 0 and stats.kv_blocks_owned == 0
    others = rows_of(server)
    return lambda stats: num_sequences(stats) == others


def num_sequences(stats):
    """Sequences that the server knows."""
    return stats.num_requests_running + stats.num_requests_waiting
