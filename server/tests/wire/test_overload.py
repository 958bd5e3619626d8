"""More than fits: refused at once with a hint when to come back, or served late; never lost, never changed."""

import time

import grpc
from client import ABORT, refusal, retry_seconds
from prompts import request
from stages import LONG_DECODE, occupied
from tidemill.v1 import tidemill_pb2 as pb

QUEUE = 4  # places of the narrow server


def test_a_full_queue_refuses_at_once_and_says_when_to_retry(narrow):
    refused = narrow.client.stats().requests_refused_total
    short = dict(prompt="The tide", temperature=0, max_tokens=3, ignore_eos=True)
    alone = narrow.client.run(**short).tokens
    with occupied(narrow) as running:
        waiting = [narrow.client.start(**short) for _ in range(QUEUE)]
        narrow.wait_for_stats(lambda stats: stats.num_requests_waiting == QUEUE, "the queue is full")
        start = time.monotonic()
        errors = [refusal(lambda: narrow.client.run(**short)) for _ in range(3)]
        assert time.monotonic() - start < 3, "refused at once"
        for error in errors:
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert 0 < retry_seconds(error) <= 60
        stats = narrow.client.stats()
        assert stats.num_requests_waiting == QUEUE
        assert stats.requests_refused_total == refused + 3
        narrow.client.abort(running.request_id)
        assert [stream.result().tokens for stream in waiting] == [alone] * QUEUE, "those that waited are served"


def test_a_place_in_the_queue_comes_back_with_every_way_out(narrow):
    with occupied(narrow):
        for leave in ("abort", "cancel", "abort", "cancel"):
            waiting = [narrow.client.start(**LONG_DECODE, request_id=f"place/{i}") for i in range(QUEUE)]
            narrow.wait_for_stats(lambda stats: stats.num_requests_waiting == QUEUE, "the queue is full")
            for stream, number in zip(waiting, range(QUEUE), strict=True):
                stream.cancel() if leave == "cancel" else narrow.client.abort(f"place/{number}")
            narrow.wait_for_stats(lambda stats: stats.num_requests_waiting == 0, "the queue is empty")


def test_several_completions_take_one_place(narrow):
    with occupied(narrow) as running:
        stream = narrow.client.start("The tide", temperature=1, seed=1, n=8, max_tokens=2, ignore_eos=True)
        narrow.wait_for_stats(lambda stats: stats.num_requests_waiting == 8, "its sequences wait")
        more = [narrow.client.start("a", temperature=0, max_tokens=1) for _ in range(QUEUE - 1)]
        narrow.wait_for_stats(lambda stats: stats.num_requests_waiting == 8 + QUEUE - 1, "three more requests wait")
        narrow.client.abort(running.request_id)
        assert len(stream.result().completions) == 8
        assert all(other.result().ids for other in more)


def test_first_come_first_served(narrow):
    with occupied(narrow) as running:
        streams = []
        for number in range(QUEUE):
            streams.append(narrow.client.start(**LONG_DECODE, request_id=f"place/{number}"))
            narrow.wait_for_stats(lambda stats, n=number: stats.num_requests_waiting == n + 1, "it waits")
        narrow.client.abort(running.request_id)
        for number in range(QUEUE):
            left = QUEUE - 1 - number
            narrow.wait_for_stats(lambda stats, left=left: stats.num_requests_waiting == left, "the next one runs")
            receipt = narrow.client.abort(f"place/{number}")
            assert receipt.stage in (pb.ABORT_STAGE_PREFILL, pb.ABORT_STAGE_DECODE), "the oldest has the row"
            assert streams[number].result().finish == ABORT


def test_preemption_changes_no_token(cramped):
    """Eight long sequences over blocks for two: the youngest lose theirs again and again, and nobody can tell."""
    before = cramped.client.stats().preemptions_total
    requests = [{**request(number), "max_tokens": 150, "ignore_eos": True} for number in range(8)]
    alone = [cramped.client.run(**options).tokens for options in requests]
    assert cramped.client.stats().preemptions_total == before, "a request that fits alone is never preempted alone"
    streams = [cramped.client.start(**options) for options in requests]
    results = [stream.result() for stream in streams]
    assert [result.tokens for result in results] == alone
    told = sum(result.usage.num_preemptions for result in results)
    assert cramped.client.stats().preemptions_total == before + told > before


def test_preemption_repeats_neither_logprobs_nor_prompt_logprobs(cramped):
    options = dict(
        temperature=1, max_tokens=80, ignore_eos=True, logprobs=1, prompt_logprobs=1, repetition_penalty=1.2, seed=3
    )
    prompts = [[60 + (i * 11 + number) % 150 for i in range(90)] for number in range(6)]
    alone = [cramped.client.run(prompt, **options) for prompt in prompts]
    streams = [cramped.client.start(prompt, **options) for prompt in prompts]
    together = [stream.result() for stream in streams]
    for expected, result in zip(alone, together, strict=True):
        assert result.tokens == expected.tokens
        assert result.logprobs == expected.logprobs
        assert result.prompt_logprobs == expected.prompt_logprobs
    assert any(result.usage.num_preemptions for result in together)


def test_aborts_and_cancels_of_preempted_requests(cramped):
    requests = [{**request(number), "max_tokens": 150, "ignore_eos": True} for number in range(12)]
    alone = cramped.client.run(**requests[0]).tokens
    before = cramped.client.stats().preemptions_total
    streams = [cramped.client.start(**options, request_id=f"cramped/{i}") for i, options in enumerate(requests)]
    cramped.wait_for_stats(lambda stats: stats.preemptions_total > before, "some are preempted", 20)
    for number, stream in enumerate(streams[1:], 1):
        stream.cancel() if number % 2 else cramped.client.abort(f"cramped/{number}")
    assert streams[0].result().tokens == alone


def abort_all_under_pressure(server):
    """Starts more than the cache holds, aborts all when some have lost their blocks, and checks every receipt."""
    before = server.client.stats().preemptions_total
    options = dict(temperature=0, max_tokens=150, ignore_eos=True)
    streams = [server.client.start([80 + i] * 8, request_id=f"pressed/{i}", **options) for i in range(8)]
    server.wait_for_stats(lambda stats: stats.preemptions_total >= before + 3, "some are preempted", 20)
    receipts = [server.client.abort(f"pressed/{i}") for i in range(8)]
    for stream, receipt in zip(streams, receipts, strict=True):
        result = stream.result()
        assert len(result.ids) == receipt.completion_tokens
        assert (result.finish == ABORT) == (receipt.stage != pb.ABORT_STAGE_FINISHED)
        assert (receipt.rows_freed > 0) == (receipt.blocks_freed > 0), "who has no row has no blocks"
        if receipt.stage == pb.ABORT_STAGE_QUEUED:
            assert (receipt.blocks_freed, receipt.rows_freed) == (0, 0)
    return receipts


def test_aborts_of_requests_that_lost_their_blocks(cramped):
    for _ in range(20):
        receipts = abort_all_under_pressure(cramped)
        cramped.wait_until_idle()
        if any(r.stage == pb.ABORT_STAGE_QUEUED and r.completion_tokens > 0 for r in receipts):
            return
    raise AssertionError("no abort met a request that waited for its second turn")


def test_a_cache_too_small_for_its_context_is_refused_at_start(start_server):
    try:
        start_server("--max-model-len", "1024", "--kv-cache-memory", "64KiB")
    except AssertionError as error:
        assert "--max-model-len" in str(error) and "--kv-cache-memory" in str(error)
    else:
        raise AssertionError("the server started")
