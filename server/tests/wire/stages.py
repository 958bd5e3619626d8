"""Requests that the narrow server holds in one stage for long enough to do something to them.

That server computes one token per step, so a prompt of a thousand tokens is a thousand steps of prefill, and while one
request has its only row, the next one waits.
"""

import contextlib

from client import generate_request

STAGES = ["queued", "prefill", "decode"]
LONG = 1000
LONG_PREFILL = dict(prompt=[5 + i % 200 for i in range(LONG)], temperature=0, max_tokens=8, ignore_eos=True)
LONG_DECODE = dict(prompt=[72, 73], temperature=0, max_tokens=LONG, ignore_eos=True)
REQUEST_OF = {"queued": LONG_DECODE, "prefill": LONG_PREFILL, "decode": LONG_DECODE}


@contextlib.contextmanager
def occupied(server):
    """The narrow server's only row is taken by a long decode; yields its stream. Aborted at the end."""
    stream = server.client.start(**LONG_DECODE).read_tokens(1)
    try:
        yield stream
    finally:
        server.client.abort(stream.request_id)
        for completion in stream.result().completions:
            assert completion.ids, "whoever has the row is not disturbed"


def request_in(stage, **options):
    """The request that `in_stage` wants to be started."""
    return generate_request(**{**REQUEST_OF[stage], **options})


@contextlib.contextmanager
def in_stage(server, stage, start):
    """Calls `start()`, which sends `request_in(stage)`, and yields its value once the server has the request there."""
    with occupied(server) if stage == "queued" else contextlib.nullcontext():
        before = server.client.stats().generation_tokens_total
        value = start()
        if stage == "queued":
            server.wait_for_stats(lambda s: s.num_requests_waiting == 1, "the request waits")
        elif stage == "prefill":
            server.wait_for_stats(lambda s: s.num_requests_running == 1 and s.kv_blocks_owned >= 2, "it has a row")
            assert server.client.stats().generation_tokens_total == before
        else:
            server.wait_for_stats(lambda s: s.generation_tokens_total >= before + 2, "it generates")
        yield value


def is_gone(stage):
    """Whether, by the statistics, nothing is left of a request that was in this stage."""
    if stage == "queued":
        return lambda stats: stats.num_requests_waiting == 0
    return lambda stats: stats.num_requests_running == 0 and stats.kv_blocks_free == stats.kv_blocks_total
