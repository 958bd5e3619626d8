"""Abort by id: at every stage all is free at once, the receipt says what was, and the stream ends properly."""

import math

import pytest
from client import ABORT, LENGTH, refusal, violations
from stages import LONG, LONG_DECODE, in_stage, occupied, options_in
from tidemill.v1 import tidemill_pb2 as pb


def abort_at_once(server, request_id):
    """The receipt; by the time it is out, and not soon after, the books are closed."""
    before = server.client.stats()
    receipt = server.client.abort(request_id)
    after = server.client.stats()
    if receipt.stage == pb.ABORT_STAGE_QUEUED:
        assert after.num_requests_waiting == 0
    else:
        assert after.num_requests_running == 0
        assert after.kv_blocks_owned == 0
    assert after.requests_aborted_total == before.requests_aborted_total + 1
    return receipt


def test_queued(narrow):
    with in_stage(narrow, "queued", lambda: narrow.client.start(**LONG_DECODE, request_id="waits")) as stream:
        receipt = abort_at_once(narrow, "waits")
        result = stream.result()
    assert receipt.stage == pb.ABORT_STAGE_QUEUED
    assert (receipt.completion_tokens, receipt.blocks_freed, receipt.rows_freed) == (0, 0, 0)
    assert (result.ids, result.text, result.finish) == ([], "", ABORT)


def test_in_prefill(narrow):
    options = options_in("mid-chunk", request_id="reads")
    with in_stage(narrow, "mid-chunk", lambda: narrow.client.start(**options)) as stream:
        receipt = abort_at_once(narrow, "reads")
        result = stream.result()
    assert receipt.stage == pb.ABORT_STAGE_PREFILL
    assert (receipt.completion_tokens, receipt.rows_freed) == (0, 1)
    # Whether a prompt gets all its blocks at once or as it is read is the scheduler's affair.
    assert 2 <= receipt.blocks_freed <= math.ceil(LONG / narrow.client.model().block_size)
    assert (result.ids, result.finish, result.usage.prompt_tokens) == ([], ABORT, LONG)


def test_in_decode(narrow):
    with in_stage(narrow, "decode", lambda: narrow.client.start(**LONG_DECODE, request_id="writes")) as stream:
        receipt = abort_at_once(narrow, "writes")
        result = stream.result()
    assert receipt.stage == pb.ABORT_STAGE_DECODE
    assert 2 <= receipt.completion_tokens < LONG
    assert receipt.rows_freed == 1
    tokens, block = len(LONG_DECODE["prompt"]) + receipt.completion_tokens, narrow.client.model().block_size
    # The step under way has its block already; the newest token may not have one yet.
    assert math.ceil((tokens - 1) / block) <= receipt.blocks_freed <= math.ceil(tokens / block)
    assert result.finish == ABORT
    assert result.usage.completion_tokens == receipt.completion_tokens, "the stream has every token that was made"
    assert result.text == narrow.client.detokenize(result.ids)
    alone = narrow.client.run(**{**LONG_DECODE, "max_tokens": 30})
    assert result.ids[:30] == alone.ids[: len(result.ids)]


def test_receipts_tell_the_time_to_free(narrow):
    with occupied(narrow) as stream:
        receipt = narrow.client.abort(stream.request_id)
    assert receipt.request_id == stream.request_id
    assert 0 <= receipt.seconds_to_free < 1


def test_a_freed_row_goes_to_the_next_in_the_queue(narrow):
    with occupied(narrow) as first:
        second = narrow.client.start("The tide", temperature=0, max_tokens=5, ignore_eos=True)
        narrow.wait_for_stats(lambda stats: stats.num_requests_waiting == 1, "the second waits")
        narrow.client.abort(first.request_id)
        assert second.result().finish == LENGTH


def test_several_completions_are_one_request(wide):
    stream = wide.client.start(**{**LONG_DECODE, "max_tokens": 900}, n=3).read_tokens(6)
    receipt = wide.client.abort(stream.request_id)
    result = stream.result()
    assert receipt.stage == pb.ABORT_STAGE_DECODE
    assert receipt.rows_freed == 3
    assert receipt.completion_tokens == sum(len(completion.ids) for completion in result.completions)
    assert [completion.finish for completion in result.completions] == [ABORT] * 3


def test_twice(wide):
    stream = wide.client.start(**{**LONG_DECODE, "max_tokens": 900}, request_id="twice").read_tokens(2)
    first, second = wide.client.abort("twice"), wide.client.abort("twice")
    assert first.stage == pb.ABORT_STAGE_DECODE
    assert second.stage == pb.ABORT_STAGE_FINISHED
    assert second.completion_tokens == first.completion_tokens
    assert (second.blocks_freed, second.rows_freed) == (0, 0)
    assert stream.result().finish == ABORT


def test_finished(wide):
    result = wide.client.run("a", request_id="done", temperature=0, max_tokens=4, ignore_eos=True)
    receipt = wide.client.abort("done")
    assert receipt.stage == pb.ABORT_STAGE_FINISHED
    assert (receipt.completion_tokens, receipt.blocks_freed, receipt.rows_freed) == (len(result.ids), 0, 0)


@pytest.mark.parametrize("request_id", ["", "x" * 257, "x" * 1_000_000], ids=len)
def test_an_id_that_none_can_have(wide, request_id):
    assert set(violations(refusal(lambda: wide.client.abort(request_id)))) == {"request_id"}


@pytest.mark.parametrize("request_id", ["never seen", "x" * 256, "\x00\n\N{SNOWMAN}"], ids=len)
def test_unknown(wide, request_id):
    receipt = wide.client.abort(request_id)
    assert receipt.stage == pb.ABORT_STAGE_UNSPECIFIED
    assert receipt.request_id == request_id
    assert (receipt.completion_tokens, receipt.blocks_freed, receipt.rows_freed) == (0, 0, 0)


def test_the_id_is_free_again_at_once(narrow):
    for _ in range(5):
        stream = narrow.client.start(**LONG_DECODE, request_id="again").read_tokens(1)
        assert narrow.client.abort("again").stage == pb.ABORT_STAGE_DECODE
        assert stream.result().finish == ABORT


def test_at_every_token_the_stream_ends_once(wide):
    """An abort races with the last token here; either may win, never both and never neither."""
    alone = wide.client.run("The tide", temperature=0, max_tokens=12, ignore_eos=True).ids
    for count in range(1, 13):
        stream = wide.client.start("The tide", temperature=0, max_tokens=12, ignore_eos=True).read_tokens(count)
        receipt = wide.client.abort(stream.request_id)
        result = stream.result()
        if receipt.stage == pb.ABORT_STAGE_FINISHED:
            assert (result.finish, result.ids) == (LENGTH, alone)
        else:
            assert receipt.stage == pb.ABORT_STAGE_DECODE and result.finish == ABORT
            assert result.ids == alone[: len(result.ids)] and len(result.ids) == receipt.completion_tokens


def test_before_anything_was_answered(wide):
    """The abort may overtake its request on the wire, or come late; whatever happens, the stream ends once and nothing leaks."""
    for number in range(30):
        stream = wide.client.start(**{**LONG_DECODE, "max_tokens": 40}, request_id=f"early/{number}")
        receipt = wide.client.abort(f"early/{number}")
        too_early_or_late = receipt.stage in (pb.ABORT_STAGE_UNSPECIFIED, pb.ABORT_STAGE_FINISHED)
        assert stream.result().finish == (LENGTH if too_early_or_late else ABORT)
