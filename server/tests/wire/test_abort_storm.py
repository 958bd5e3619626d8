"""A storm of aborts from one client process, while others decode. How quick that is, `abort-storm` in benches/ measures."""

import concurrent.futures
import itertools
import time

from client import ABORT, Client
from tidemill.v1 import tidemill_pb2 as pb

SECONDS = 2
SURVIVORS = 4
WORKERS = 8
LIVE = (pb.ABORT_STAGE_QUEUED, pb.ABORT_STAGE_PREFILL, pb.ABORT_STAGE_DECODE)
ENDLESS = dict(prompt=[3], temperature=0, max_tokens=1000, ignore_eos=True)


def blow(client, worker, end):
    """Aborts until `end`: a live request, then one that has ended and one that never was; returns the live ones' stages."""
    stages = []
    for number in itertools.count():
        if time.monotonic() >= end:
            return stages
        live = client.start(**ENDLESS, request_id=f"storm/{worker}/{number}")
        # Its headers say that it was submitted: the abort cannot overtake it.
        live.call.initial_metadata()
        receipt = client.abort(f"storm/{worker}/{number}")
        assert receipt.stage in LIVE
        stages.append(receipt.stage)
        again = client.abort(f"storm/{worker}/{number}")
        assert (again.stage, again.rows_freed, again.blocks_freed) == (pb.ABORT_STAGE_FINISHED, 0, 0)
        assert client.abort(f"nobody/{worker}/{number}").stage == pb.ABORT_STAGE_UNSPECIFIED
        result = live.result()
        assert result.finish == ABORT and len(result.ids) == receipt.completion_tokens


def test_survivors_keep_their_tokens_and_nothing_leaks(start_server):
    # Two rows beside the survivors': some of the storm is queued when it is aborted, some decodes.
    server = start_server("--max-num-seqs", str(SURVIVORS + 2), "--max-num-queued-reqs", "1000")
    options = dict(temperature=1, max_tokens=300, ignore_eos=True)
    requests = [dict(prompt=[70, 70 + i], seed=i, **options) for i in range(SURVIVORS)]
    alone = [server.client.run(**request).tokens for request in requests]
    server.wait_until_idle()
    before = server.client.stats()
    with Client(server.address) as client, concurrent.futures.ThreadPoolExecutor(WORKERS + SURVIVORS) as pool:
        end = time.monotonic() + SECONDS

        def survive(number):
            """The same request again and again for as long as the storm lasts."""
            while time.monotonic() < end:
                assert server.client.run(**requests[number]).tokens == alone[number]

        survivors = [pool.submit(survive, number) for number in range(SURVIVORS)]
        storm = [pool.submit(blow, client, worker, end) for worker in range(WORKERS)]
        stages = [stage for worker in storm for stage in worker.result()]
        for survivor in survivors:
            survivor.result()
    assert set(stages) >= {pb.ABORT_STAGE_QUEUED, pb.ABORT_STAGE_DECODE}
    server.assert_as_new()
    assert server.client.stats().requests_aborted_total == before.requests_aborted_total + len(stages)
    assert not server.complaints() and server.stop() == 0
