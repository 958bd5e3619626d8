"""What operators look at: probes, metrics, request ids, the end of a server."""

import contextlib
import json
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
import requests
from front import ANSWER, MODEL, Front, free_port, request_bytes, user
from server_process import HTTP_BOUND, Process
from stages import occupied

DEMO = Path(__file__).parents[4] / "engine" / "assets" / "demo"
BLANKS = 64 << 20
GAUGES = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "tidemill:engine_heartbeat_age_seconds": "gauge",
}
COUNTERS = [
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:num_preemptions",
    "vllm:request_success",
]
HISTOGRAMS = [
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:iteration_tokens_total",
    "tidemill:abort_to_free_seconds",
    "tidemill:step_seconds",
]


def test_every_documented_metric_is_there(front):
    front.chat()
    found = front.metric_families()
    for name, kind in GAUGES.items():
        assert name in found and found[name].type in (kind, "info", "unknown"), name
    for name in COUNTERS:
        assert name in found and found[name].type == "counter", name
    for name in HISTOGRAMS:
        assert name in found and found[name].type == "histogram", name
    assert all(family.documentation for family in found.values())


def test_the_exact_lines_that_dashboards_read(front):
    front.chat()
    text = front.get("/metrics").text
    for name in ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:num_preemptions_total"):
        assert re.search(rf"^{name}({{[^}}]*}})? [0-9.e+]+$", text, re.MULTILINE), name
    assert re.search(rf'^vllm:num_requests_running{{[^}}]*model_name="{MODEL}"[^}}]*}} ', text, re.MULTILINE)
    assert re.search(r'^vllm:request_success_total{[^}]*finished_reason="stop"', text, re.MULTILINE)
    assert re.search(r'^vllm:cache_config_info{[^}]*block_size="16"[^}]*num_gpu_blocks="\d+"', text, re.MULTILINE) or (
        re.search(r'^vllm:cache_config_info{[^}]*num_gpu_blocks="\d+"[^}]*block_size="16"', text, re.MULTILINE)
    )


def test_histograms_are_cumulative(front):
    front.chat()
    for name in HISTOGRAMS:
        series = {}
        for sample in front.metric_families()[name].samples:
            if sample.name.endswith("_bucket"):
                labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
                series.setdefault(labels, []).append((float(sample.labels["le"]), sample.value))
        assert series, name
        for buckets in series.values():
            assert buckets == sorted(buckets) and buckets[-1][0] == float("inf")
            counts = [count for _, count in buckets]
            assert counts == sorted(counts)


def test_counters_count(front, wide):
    wide.wait_until_idle()
    names = ["vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:prefix_cache_queries_total"]
    histograms = ["vllm:time_to_first_token_seconds_count", "vllm:e2e_request_latency_seconds_count"]
    before, stats = front.metrics(), wide.client.stats()
    usage = front.chat()["usage"]
    wide.wait_until_idle()
    after = front.metrics()

    def grown(name):
        return sum(after[key] - before.get(key, 0) for key in after if key[0] == name)

    assert [grown(name) for name in names[:2]] == [usage["prompt_tokens"], usage["completion_tokens"]]
    assert [grown(name) for name in histograms] == [1, 1]
    assert grown("vllm:request_success_total") == 1
    assert front.metric("vllm:generation_tokens_total") == stats.generation_tokens_total + usage["completion_tokens"]


@pytest.mark.parametrize("reason", ["stop", "length", "abort"])
def test_ends_are_counted_by_reason(front, wide, reason):
    def count():
        return sum(
            value
            for (name, labels), value in front.metrics().items()
            if name == "vllm:request_success_total" and ("finished_reason", reason) in labels
        )

    before = count()
    if reason == "abort":
        stream = wide.client.start([72, 73], max_tokens=900, ignore_eos=True).read_tokens(1)
        wide.client.abort(stream.request_id)
        stream.result()
    else:
        front.chat(max_tokens=5 if reason == "length" else 60)
    wide.wait_until(lambda: count() == before + 1, "it is counted")


def test_gauges_move(narrow, narrow_front):
    with occupied(narrow):
        waiting = narrow.client.start("The tide", max_tokens=2)
        narrow.wait_for_stats(lambda stats: stats.num_requests_waiting == 1, "one waits")
        assert narrow_front.metric("vllm:num_requests_running") == 1
        assert narrow_front.metric("vllm:num_requests_waiting") == 1
        assert 0 < narrow_front.metric("vllm:kv_cache_usage_perc") < 1
        assert narrow_front.metric("tidemill:engine_heartbeat_age_seconds") < 10
        waiting.cancel()


def test_probes(front):
    for path in ("/health", "/ready"):
        answer = front.get(path)
        assert answer.status_code == 200 and answer.headers["x-request-id"]
        assert requests.head(front.url + path, timeout=5).status_code == 200


def test_every_reply_has_an_id(front):
    seen = set()
    calls = [
        front.get("/health"),
        front.get("/metrics"),
        front.get("/v1/models"),
        front.get("/openapi.json"),
        front.get("/no/such/route"),
        front.post("/v1/chat/completions", {"model": MODEL, "messages": user(), "max_tokens": 1}),
        front.post("/v1/chat/completions", {"model": MODEL, "messages": user(), "max_tokens": 1, "stream": True}),
        front.post("/v1/chat/completions", {}),
        front.post("/v1/messages", {}),
        front.post("/predict", {}),
        front.post("/abort", {"request_id": "a"}),
    ]
    for answer in calls:
        assert answer.headers["x-request-id"], answer.url
        seen.add(answer.headers["x-request-id"])
    assert len(seen) == len(calls), "no two are the same"


@pytest.mark.parametrize("given", ["a", "0123-4567", "x" * 128])
def test_a_clients_own_id_comes_back(front, given):
    assert front.get("/health", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["x" * 300, "\x1b[31m", "ü", ""])
def test_ids_that_are_none_are_replaced(front, given):
    with front.wire() as wire:
        wire.send(b"GET /health HTTP/1.1\r\nHost: a\r\nx-request-id: " + given.encode() + b"\r\n\r\n")
        reply = wire.reply()
    assert reply.status in (200, 400)
    if reply.status == 200:
        assert reply.headers["x-request-id"] not in ("", given)


def test_the_document_says_what_it_is(front):
    document = front.get("/openapi.json").json()
    assert document["openapi"].startswith("3.") and document["info"]["title"] and document["info"]["version"]


def test_not_ready_while_loading(tmp_path):
    """It listens before its model is there. This one's tokenizer has so many blanks that they take a while to skip."""
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True)
    with open(tmp_path / "tokenizer.json", "ab") as tokenizer:
        tokenizer.write(b" " * BLANKS)
    body = json.dumps({"model": MODEL, "messages": user(), "max_tokens": 1}).encode()
    breath = [request_bytes("GET", path) for path in ("/health", "/ready", "/metrics", "/v1/models")]
    breath.append(request_bytes("POST", "/v1/chat/completions", body))
    port, replies = free_port(), []

    def ask():
        """It says where it listens when it is ready; this thread does not wait for that."""
        while not replies:
            with contextlib.suppress(ConnectionRefusedError), Front(f"http://127.0.0.1:{port}").wire() as wire:
                wire.send(b"".join(breath))
                replies.extend(wire.reply() for _ in breath)

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    ports = ("--port", str(port), "--grpc-port", "0")
    process = Process(["serve", "--model", tmp_path], *ports, bound={"url": HTTP_BOUND})
    asker.join(20)
    try:
        health, ready, metrics, models, chat = replies
        assert health.status == 200, "alive from the first moment"
        assert (ready.status, models.status, chat.status) == (503, 503, 503)
        assert metrics.status in (200, 503)
        assert chat.json()["error"]["message"]
        process.wait_until(lambda: requests.get(f"{process.url}/ready").status_code == 200, "it gets ready", 20)
    finally:
        process.kill()


def test_draining(start_server):
    server = start_server("--max-num-seqs", "1", "--max-num-batched-tokens", "1", "--threads", "1")
    front = Front(server.url)
    body = {"model": MODEL, "prompt": "The tide", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    with contextlib.ExitStack() as stack:
        whole = {}
        alone = front.post("/v1/completions", body).json()["choices"][0]["text"]
        answer = stack.enter_context(front.post("/v1/completions", {**body, "stream": True}, stream=True))
        pieces = answer.iter_content(None)
        first = next(pieces)

        def wait_for_whole():
            whole["answer"] = requests.post(f"{front.url}/v1/completions", json={**body, "max_tokens": 3}, timeout=30)

        waiter = threading.Thread(target=wait_for_whole)
        waiter.start()
        server.wait_for_stats(lambda stats: stats.num_requests_waiting == 1, "one waits")
        server.send_signal(signal.SIGTERM)
        server.wait_until(lambda: server.client.stats().draining, "it drains")
        assert requests.get(f"{front.url}/ready", timeout=5).status_code == 503
        assert requests.get(f"{front.url}/health", timeout=5).status_code == 200, "alive while it drains"
        for path, refused in [("/v1/completions", body), ("/v1/messages", {"model": MODEL, "messages": user(),
                                                                          "max_tokens": 2}), ("/predict", body)]:
            new = requests.post(f"{front.url}{path}", json=refused, timeout=5)
            assert new.status_code in (503, 529), (path, new.text)
            assert new.json()["error"]
        rest = b"".join([first, *pieces])
        assert rest.rstrip().endswith(b"data: [DONE]"), "the running may finish"
        waiter.join()
        assert whole["answer"].status_code == 200, "those that wait are served too"
    assert server.wait_for_exit() == 0
    assert alone


def test_idle_connections_do_not_hold_up_the_end(start_server):
    server = start_server("--shutdown-timeout", "1000")
    front = Front(server.url)
    with front.wire() as silent, front.wire() as used:
        assert front.get("/health").status_code == 200
        used.send(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert used.reply().status == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait_for_exit() == 0
        assert silent.read_to_end() == b""


def test_what_is_left_after_the_grace_period_is_told(start_server):
    server = start_server(
        "--shutdown-timeout", "0.05", "--max-num-seqs", "1", "--max-num-batched-tokens", "1", "--threads", "1"
    )
    front = Front(server.url)
    body = {"model": MODEL, "prompt": "The tide", "max_tokens": 1000, "ignore_eos": True, "n": 8}
    with front.wire() as streamed, front.wire() as whole:
        streamed.post("/v1/completions", {**body, "stream": True})
        streamed.read_until(b"data: ")
        whole.post("/v1/completions", body)
        server.wait_for_stats(lambda stats: stats.num_requests_waiting >= 8, "the other waits")
        server.send_signal(signal.SIGTERM)
        said = streamed.read_to_end()
        assert b'"error"' in said, said[-300:]
        assert whole.reply().status == 503
    assert server.wait_for_exit() == 0


def test_two_servers_do_not_share_a_port(wide, start_server):
    port = wide.url.rsplit(":", 1)[1]
    with pytest.raises(AssertionError) as caught:
        start_server("--port", port)
    assert port in str(caught.value) and "--port" in str(caught.value), "says which address is taken, and by which option"


def test_no_http(start_server):
    server = start_server(http=False)
    assert server.client.run("a", max_tokens=1).ids


def test_the_answer_over_http_is_the_answer_over_grpc(front, wide):
    expected = wide.client.run("Once upon a time", temperature=1, seed=4, max_tokens=50)
    body = {"model": MODEL, "prompt": "Once upon a time", "temperature": 1, "seed": 4, "max_tokens": 50}
    assert front.post("/v1/completions", body).json()["choices"][0]["text"] == expected.text
    assert front.chat()["choices"][0]["message"]["content"] == ANSWER
