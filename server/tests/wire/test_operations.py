"""What operators look at: health, reflection, statistics, the model's description."""

import itertools

import grpc
import pytest
from client import refusal, violations
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from stages import LONG_DECODE
from tidemill.v1 import tidemill_pb2 as pb

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("service", ["", "tidemill.v1.Inference", "tidemill.v1.Control"])
def test_healthy(wide, service):
    assert wide.client.serving_status(service) == SERVING
    watch = wide.client.health.Watch(health_pb2.HealthCheckRequest(service=service))
    assert next(watch).status == SERVING
    watch.cancel()


def test_health_of_an_unknown_service_is_not_found(wide):
    assert refusal(lambda: wide.client.serving_status("no.such.Service")).code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_describes_every_service(wide, version):
    # Both versions have the same messages.
    reflect = wide.client.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )

    def ask(**question):
        return next(reflect(iter([reflection_pb2.ServerReflectionRequest(**question)])))

    listed = {service.name for service in ask(list_services="").list_services_response.service}
    assert listed >= {"tidemill.v1.Inference", "tidemill.v1.Control", "grpc.health.v1.Health"}
    files = ask(file_containing_symbol="tidemill.v1.Inference").file_descriptor_response.file_descriptor_proto
    described = [descriptor_pb2.FileDescriptorProto.FromString(data) for data in files]
    methods = {m.name for file in described for service in file.service for m in service.method}
    assert methods >= {"Generate", "Tokenize", "Detokenize", "GetModel", "Abort", "Drain"}
    assert refusal(lambda: ask(file_containing_symbol="no.such.Symbol")).code() == grpc.StatusCode.NOT_FOUND


def test_the_model_is_described(wide):
    model = wide.client.model()
    assert model.served_model_name and model.architecture == "LlamaForCausalLM" and model.version
    assert model.num_parameters > 1_000_000 and model.weight_bytes_per_step > 1_000_000
    assert model.device and model.dtype and model.kv_cache_dtype and model.has_chat_template
    assert model.block_size > 0 and model.num_kv_blocks == wide.client.stats().kv_blocks_total
    assert (model.max_num_seqs, model.max_num_batched_tokens) == (64, 512)
    assert model.eos_token_ids and all(token < model.vocab_size for token in model.eos_token_ids)


def test_options_of_the_command_line_show(narrow, cramped):
    assert cramped.client.model().block_size == 4
    model = narrow.client.model()
    assert (model.max_num_seqs, model.max_num_batched_tokens) == (1, 1)


def test_counters_count(wide):
    before = wide.client.stats()
    result = wide.client.run("The tide", temperature=0, max_tokens=7, ignore_eos=True, n=2)
    stream = wide.client.start(**{**LONG_DECODE, "max_tokens": 900}).read_tokens(3)
    wide.client.abort(stream.request_id)
    aborted = stream.result()
    wide.wait_until_idle()
    after = wide.client.stats()
    made = sum(len(completion.ids) for completion in result.completions) + len(aborted.ids)
    assert after.generation_tokens_total - before.generation_tokens_total == made
    read = result.usage.prompt_tokens + aborted.usage.prompt_tokens
    assert after.prompt_tokens_total - before.prompt_tokens_total == read
    assert after.requests_finished_total == before.requests_finished_total + 1
    assert after.requests_aborted_total == before.requests_aborted_total + 1
    assert after.requests_failed_total == before.requests_failed_total
    assert after.steps_total > before.steps_total
    assert after.uptime_seconds > before.uptime_seconds
    assert not after.draining


def test_gauges_show_what_runs(wide):
    streams = [wide.client.start(**{**LONG_DECODE, "max_tokens": 900}).read_tokens(1) for _ in range(3)]
    stats = wide.client.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting) == (3, 0)
    assert stats.kv_blocks_owned >= 3
    assert stats.kv_blocks_free + stats.kv_blocks_owned + stats.kv_blocks_cached == stats.kv_blocks_total
    assert stats.engine_heartbeat_age_seconds < 10
    for stream in streams:
        wide.client.abort(stream.request_id)
    assert [len(stream.result().completions) for stream in streams] == [1] * 3


def test_watching_gives_a_reading_now_and_one_per_interval(wide):
    watch = wide.client.control.WatchStats(pb.WatchStatsRequest(interval_ms=20))
    uptimes = [answer.stats.uptime_seconds for answer in itertools.islice(watch, 5)]
    watch.cancel()
    assert uptimes == sorted(set(uptimes))
    slow = wide.client.control.WatchStats(pb.WatchStatsRequest(interval_ms=60000))
    assert next(slow).stats.kv_blocks_total, "the first one does not wait for the interval"
    slow.cancel()


@pytest.mark.parametrize("interval", [0, 9, 60001, 2**32 - 1])
def test_intervals_out_of_range(wide, interval):
    error = refusal(lambda: next(wide.client.control.WatchStats(pb.WatchStatsRequest(interval_ms=interval))))
    assert set(violations(error)) == {"interval_ms"}
