"""`vllm.grpc.engine.VllmEngine` by itself: the same answers as tidemill.v1, in the protocol of gateways."""

import hashlib
import io
import json
import re
import zipfile

import grpc
import pytest
from client import Client, chat, refusal
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from server_process import API_KEY
from smg_grpc_proto.generated import mlx_engine_pb2, sglang_scheduler_pb2, tokenspeed_scheduler_pb2, trtllm_service_pb2
from stages import LONG_DECODE, fresh_prompt, in_stage, is_gone, options_in
from tidemill.v1 import tidemill_pb2 as pb
from vllm_client import VllmClient, common, generate, vllm

GREEDY = dict(temperature=0, max_tokens=24, ignore_eos=True)
SERVICE = vllm.DESCRIPTOR.services_by_name["VllmEngine"]
FOREIGN = [
    f"/{service.full_name}/{method.name}"
    for file in (mlx_engine_pb2, sglang_scheduler_pb2, tokenspeed_scheduler_pb2, trtllm_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if method.name == "HealthCheck"
]


@pytest.fixture
def gateway(wide):
    """A gateway's view of the server with the defaults."""
    return VllmClient(wide.client)


def as_gateway(request):
    """Options of the wire tests' stages, as this protocol says them."""
    return {name: value for name, value in request.items() if name != "prompt"}


# What the messages are


def described(server, symbol):
    """The files that define a symbol, by reflection."""
    stub = reflection_pb2_grpc.ServerReflectionStub(server.client.channel)
    question = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
    answer = next(stub.ServerReflectionInfo(iter([question])))
    files = answer.file_descriptor_response.file_descriptor_proto
    return [descriptor_pb2.FileDescriptorProto.FromString(data) for data in files]


def fields(message, package):
    """Every field of a message and of those within it: number, type and label."""
    for field in message.field:
        one_of = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else None
        yield (package + message.name, field.name), (field.number, field.type, field.label, field.type_name, one_of)
    for nested in message.nested_type:
        yield from fields(nested, f"{package}{message.name}.")


def test_our_messages_are_those_of_the_gateway_as_far_as_they_go(wide):
    theirs = {}
    for module in (vllm, common):
        file = descriptor_pb2.FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
        theirs |= dict(entry for message in file.message_type for entry in fields(message, f"{file.package}."))
    # The package of the gateway's protocols has these; it is not one of ours.
    files = [*described(wide, "vllm.grpc.engine.VllmEngine"), *described(wide, "smg.grpc.common.KvEventBatch")]
    ours = dict(entry for file in files for message in file.message_type for entry in fields(message, f"{file.package}."))
    assert len(ours) > 100
    assert {field: theirs.get(field) for field in ours} == ours
    methods = {method.name: method for file in files for service in file.service for method in service.method}
    assert set(methods) == {method.name for method in SERVICE.methods}


@pytest.mark.parametrize("method", FOREIGN)
def test_services_of_other_engines_are_not_here(wide, method):
    """By this a gateway finds out what it talks to."""
    assert refusal(lambda: wide.client.channel.unary_unary(method)(b"")).code() == grpc.StatusCode.UNIMPLEMENTED


def test_foreign_services_are_known():
    assert len(FOREIGN) >= 4


@pytest.mark.parametrize("method", [f"/{SERVICE.full_name}/{method.name}" for method in SERVICE.methods] + FOREIGN)
def test_closed_without_the_key(keyed, method):
    with Client(keyed.address) as stranger:
        error = refusal(lambda: list(stranger.channel.stream_stream(method)(iter([b""]))))
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED


def test_open_with_the_key(keyed):
    assert API_KEY in keyed.client.metadata[0][1]
    gateway = VllmClient(keyed.client)
    assert gateway.ask("HealthCheck").healthy
    ((completion,), ids) = gateway.run([72, 73], **GREEDY), keyed.client.run([72, 73], **GREEDY).ids
    assert completion.ids == ids


# Generating


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["The tide", [72, 73, 74]], ids=["text", "ids"])
def test_the_answer_is_that_of_tidemill_v1(wide, gateway, prompt, stream):
    expected = wide.client.run(prompt, **GREEDY)
    (completion,) = gateway.run(prompt, stream=stream, **GREEDY)
    complete = completion.complete
    assert completion.ids == expected.ids and completion.finish == "length" and completion.matched is None
    assert complete.prompt_tokens == expected.usage.prompt_tokens
    assert len(completion.chunks) == (len(expected.ids) if stream else 0)
    assert all(chunk.prompt_tokens == complete.prompt_tokens for chunk in completion.chunks)


def test_cached_tokens_are_told(wide, gateway):
    prompt = fresh_prompt(100)
    first, second = (gateway.run(prompt, **GREEDY)[0].complete.cached_tokens for _ in range(2))
    block = wide.client.model().block_size
    assert (first, second) == (0, (len(prompt) - 1) // block * block)


def test_sampling_parameters_arrive(wide, gateway):
    sampling = dict(temperature=1.3, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, max_tokens=20, seed=11)
    sampling |= dict(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={80: 5.0, 90: -5.0}, ignore_eos=True)
    expected = wide.client.run([72, 73], **sampling)
    assert gateway.run([72, 73], **sampling)[0].ids == expected.ids
    assert gateway.run([72, 73], **{**sampling, "seed": 12})[0].ids != expected.ids


def test_what_is_absent_is_neutral(wide, gateway):
    """The model's own defaults are not applied here: the gateway has them from GetModelInfo, and sends them."""
    neutral = dict(temperature=1, top_p=1, top_k=0, min_p=0, repetition_penalty=1)
    defaults = json.loads(gateway.ask("GetModelInfo").default_sampling_params_json)
    assert defaults == {"temperature": 0.7, "top_p": 0.9}, "these differ from the neutral ones"
    rest = dict(seed=5, max_tokens=40, ignore_eos=True)
    assert gateway.run([72, 73], **rest)[0].ids == wide.client.run([72, 73], **neutral, **rest).ids
    assert gateway.run([72, 73], **defaults, **rest)[0].ids == wide.client.run([72, 73], **rest).ids


def test_several_completions(wide, gateway):
    sampling = dict(temperature=1, seed=3, max_tokens=12, ignore_eos=True, n=3, top_p=1)
    expected = [completion.ids for completion in wide.client.run([72, 73], **sampling).completions]
    for stream in (True, False):
        assert [completion.ids for completion in gateway.run([72, 73], stream=stream, **sampling)] == expected


@pytest.mark.parametrize("stream", [True, False])
def test_logprobs(wide, gateway, stream):
    options = dict(GREEDY, logprobs=3, prompt_logprobs=2)
    prompt = [72, 73, 74, 75]
    expected = wide.client.run(prompt, **options)
    (completion,) = gateway.run(prompt, stream=stream, **options)
    told = completion.complete.output_logprobs
    assert list(told.token_ids) == expected.ids
    assert list(told.token_logprobs) == [entry.logprob for entry in expected.logprobs]
    assert [list(top.token_ids) for top in told.top_logprobs] == [
        [top.token_id for top in entry.top] for entry in expected.logprobs
    ]
    inputs = completion.complete.input_logprobs
    assert list(inputs.token_ids) == prompt
    assert [entry.HasField("value") for entry in inputs.token_logprobs] == [False, True, True, True]
    values = [entry.value for entry in inputs.token_logprobs][1:]
    assert values == [entry.logprob for entry in expected.prompt_logprobs[1:]]
    assert [len(top.values) for top in inputs.top_logprobs] == [0, 2, 2, 2]
    if stream:
        parts = [value for chunk in completion.chunks for value in chunk.output_logprobs.token_logprobs]
        assert parts == list(told.token_logprobs)
        assert completion.chunks[0].input_logprobs == inputs
        assert not any(chunk.HasField("input_logprobs") for chunk in completion.chunks[1:])


def test_logprobs_of_the_tokens_alone(gateway):
    (completion,) = gateway.run([72, 73], **GREEDY, logprobs=0)
    logprobs = completion.complete.output_logprobs
    assert len(logprobs.token_logprobs) == GREEDY["max_tokens"] and not logprobs.top_logprobs
    assert not gateway.run([72, 73], **GREEDY)[0].complete.HasField("output_logprobs")


def test_stop_strings_and_stop_tokens(wide, gateway):
    free = wide.client.run("The tide", **GREEDY)
    stop = free.text[10:14]
    expected = wide.client.run("The tide", **GREEDY, stop=[stop])
    (completion,) = gateway.run("The tide", **GREEDY, stop=[stop], skip_special_tokens=True)
    assert (completion.finish, completion.matched) == ("stop", stop)
    assert completion.ids == expected.ids, "with the tokens of the stop string: the gateway cuts its text"
    assert stop in wide.client.detokenize(completion.ids)
    token = free.ids[5]
    (completion,) = gateway.run("The tide", **GREEDY, stop_token_ids=[token])
    assert (completion.finish, completion.matched) == ("stop", token)
    assert completion.ids == free.ids[: free.ids.index(token) + 1]


def test_the_models_own_end(wide, gateway):
    prompt = wide.client.tokenize(chat(("user", "Hello!"))).token_ids
    (completion,) = gateway.run(prompt, temperature=0, max_tokens=200)
    assert (completion.finish, completion.matched) == ("stop", None)
    assert completion.ids == wide.client.run(list(prompt), temperature=0, max_tokens=200).ids


CONSTRAINTS = {
    "json schema": (
        dict(json_schema='{"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}'),
        lambda text: isinstance(json.loads(text)["age"], int),
    ),
    "regex": (dict(regex="[0-9]{3}-[a-c]{2}"), re.compile("[0-9]{3}-[a-c]{2}").fullmatch),
    "choice": (dict(choice=vllm.ChoiceConstraint(choices=["high water", "low water"])), lambda text: "water" in text),
    "lark": (dict(grammar='start: "tide" /[0-9]/'), re.compile("tide[0-9]").fullmatch),
    "ebnf": (dict(grammar='root ::= ("ebb" | "flow") "!"'), re.compile("(ebb|flow)!").fullmatch),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_answers_have_the_form_that_was_asked_for(wide, gateway, name):
    constraint, holds = CONSTRAINTS[name]
    for seed in range(3):
        sampling = dict(temperature=1, seed=seed, max_tokens=200, **constraint)
        (completion,) = gateway.run("The tide", **sampling, grammar_from_first_token=True)
        text = wide.client.detokenize(completion.ids)
        assert completion.finish == "stop" and holds(text), text


def test_any_object_is_begun_as_one(wide, gateway):
    (completion,) = gateway.run("The tide", temperature=1, seed=1, max_tokens=40, json_object=True)
    assert re.match(r'\s*{\s*("|})', wide.client.detokenize(completion.ids))


def test_a_constraint_that_asks_for_nothing(wide, gateway):
    assert gateway.run([72, 73], **GREEDY, json_object=False)[0].ids == wide.client.run([72, 73], **GREEDY).ids


def test_embeddings_are_those_of_tidemill_v1(wide, gateway):
    prompt = [72, 73, 74]
    message = pb.EmbedRequest(token_ids=pb.TokenIds(ids=prompt))
    expected = wide.client.inference.Embed(message, metadata=wide.client.metadata)
    tokenized = vllm.TokenizedInput(input_ids=prompt)
    told = gateway.ask("Embed", vllm.EmbedRequest(request_id="e", tokenized=tokenized))
    assert list(told.embedding) == list(expected.values)
    assert (told.embedding_dim, told.prompt_tokens) == (len(expected.values), 3)
    for tokenized in (None, vllm.TokenizedInput(), vllm.TokenizedInput(input_ids=[1 << 20])):
        request = vllm.EmbedRequest(tokenized=tokenized)
        error = refusal(lambda request=request: gateway.ask("Embed", request))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and error.details()


# Ending early


@pytest.mark.parametrize("stream", [True, False])
def test_abort_ends_the_stream_as_aborted(wide, gateway, stream):
    call = gateway.start([72, 73], request_id="gone", stream=stream, temperature=0, max_tokens=900, ignore_eos=True)
    wide.wait_for_stats(lambda s: s.num_requests_running == 1, "it runs")
    gateway.ask("Abort", vllm.AbortRequest(request_ids=["never seen", "gone", "gone"]))
    assert wide.client.stats().kv_blocks_owned == 0, "free before the receipt is out"
    (completion,) = call.result()
    assert completion.finish == "abort" and len(completion.ids) < 900


def test_aborting_nobody_is_no_error(gateway):
    gateway.ask("Abort", vllm.AbortRequest())
    gateway.ask("Abort", vllm.AbortRequest(request_ids=["", "x" * 10_000]))


@pytest.mark.parametrize("stage", ["queued", "mid-chunk", "decode"])
@pytest.mark.parametrize("stream", [True, False])
def test_whoever_cancels_leaves_nothing_behind(narrow, stage, stream):
    gateway, options = VllmClient(narrow.client), options_in(stage)
    start = lambda: gateway.start(options["prompt"], stream=stream, **as_gateway(options))  # noqa: E731
    with in_stage(narrow, stage, start) as request:
        aborted = narrow.client.stats().requests_aborted_total
        request.call.cancel()
        narrow.wait_for_stats(is_gone(narrow, stage), "nothing is left of it")
        assert narrow.client.stats().requests_aborted_total == aborted + 1


def test_a_channel_that_is_closed_takes_its_requests_along(wide):
    with Client(wide.address) as leaver:
        gateway = VllmClient(leaver)
        calls = [gateway.start(**{**LONG_DECODE, "max_tokens": 900}) for _ in range(5)]
        for call in calls:
            call.read_tokens(1)
    wide.wait_until_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_deadlines_hold(wide, gateway, stream):
    call = gateway.start(**{**LONG_DECODE, "max_tokens": 900}, stream=stream, timeout=0.2)
    assert refusal(call.result).code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wide.wait_until_idle()


# Bad input


def ids(*tokens):
    return dict(prompt=list(tokens))


BAD = {
    "no prompt": dict(prompt=None),
    "empty prompt": ids(),
    "empty text": dict(prompt=""),
    "token outside of the vocabulary": ids(5, 1 << 20),
    "too long": ids(*[5] * 2000),
    "too much to generate": dict(prompt=[5], max_tokens=5000),
    "temperature": dict(prompt=[5], temperature=-1),
    "no number": dict(prompt=[5], temperature=float("nan")),
    "top_p": dict(prompt=[5], top_p=1.5),
    "min_p": dict(prompt=[5], min_p=-0.1),
    "repetition_penalty": dict(prompt=[5], repetition_penalty=-1),
    "presence_penalty": dict(prompt=[5], presence_penalty=3),
    "n": dict(prompt=[5], n=9),
    "logprobs": dict(prompt=[5], logprobs=21),
    "all logprobs": dict(prompt=[5], logprobs=-1),
    "prompt_logprobs": dict(prompt=[5], prompt_logprobs=-2),
    "logit_bias": dict(prompt=[5], logit_bias={-1: 1.0}),
    "logit_bias outside of the vocabulary": dict(prompt=[5], logit_bias={1 << 20: 1.0}),
    "empty stop": dict(prompt=[5], stop=[""]),
    "stop tokens": dict(prompt=[5], stop_token_ids=[1 << 20]),
    "min_tokens": dict(prompt=[5], min_tokens=9, max_tokens=8),
    "truncation": dict(prompt=[5], truncate_prompt_tokens=3),
    "structural tag": dict(prompt=[5], structural_tag="{}"),
    "no schema": dict(prompt=[5], json_schema="{"),
    "no regex": dict(prompt=[5], regex="("),
    "no grammar": dict(prompt=[5], grammar="start: ("),
    "no EBNF": dict(prompt=[5], grammar="root ::= ("),
    "no choice": dict(prompt=[5], choice=vllm.ChoiceConstraint()),
    "images": dict(prompt=[5], request=dict(mm_inputs=vllm.MultimodalInputs(im_token_id=3))),
    "more images": dict(prompt=[5], request=dict(extra_mm_inputs=[vllm.MultimodalInputs()])),
    "media": dict(prompt=[5], request=dict(media_refs=vllm.MediaRefs())),
    "a prefill server": dict(prompt=[5], request=dict(kv_transfer_params=vllm.KvTransferParams(remote_port=1))),
    "a prefill server, as JSON": dict(prompt=[5], request=dict(kv_transfer_params_json="{}")),
    "a rank": dict(prompt=[5], request=dict(data_parallel_rank=1)),
    "long id": dict(prompt=[5], request_id="x" * 257),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_says_why(wide, gateway, name, stream):
    error = refusal(lambda: gateway.run(**{"max_tokens": 4, **BAD[name]}, stream=stream))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    assert error.details()


def test_bytes_that_are_no_message(wide):
    for garbage in (b"\xff" * 50, b"\x22\x7f", generate([5]).SerializeToString()[:-1]):
        method = wide.client.channel.unary_stream(f"/{SERVICE.full_name}/Generate")
        error = refusal(lambda method=method, garbage=garbage: list(method(garbage)))
        assert error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT)


def test_a_live_id_is_refused(wide, gateway):
    call = gateway.start(**{**LONG_DECODE, "max_tokens": 900}, request_id="twin").read_tokens(1)
    assert refusal(lambda: gateway.run([5], request_id="twin")).code() == grpc.StatusCode.ALREADY_EXISTS
    gateway.ask("Abort", vllm.AbortRequest(request_ids=["twin"]))
    assert call.result()[0].finish == "abort"


@pytest.mark.parametrize("method", ["StartProfile", "StopProfile"])
def test_there_is_no_profiler(gateway, method):
    error = refusal(lambda: gateway.ask(method))
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED and "--otlp-endpoint" in error.details()


# Operations


def test_healthy(wide, gateway):
    answer = gateway.ask("HealthCheck")
    assert answer.healthy and answer.message
    assert wide.client.serving_status(SERVICE.full_name), "the standard health check knows the service"


def test_draining_is_not_healthy_and_takes_nobody(start_server):
    server = start_server(http=False)
    gateway = VllmClient(server.client)
    call = gateway.start(**{**LONG_DECODE, "max_tokens": 900}).read_tokens(1)
    drain = server.client.control.Drain.future(pb.DrainRequest(timeout_seconds=20))
    server.wait_until(lambda: not gateway.ask("HealthCheck").healthy, "it says that it drains")
    assert gateway.ask("GetServerInfo").is_paused
    assert refusal(lambda: gateway.run([5])).code() == grpc.StatusCode.UNAVAILABLE
    call.call.cancel()
    assert drain.result().cut_off == 0


def test_the_model_is_described(wide, gateway):
    told, model = gateway.ask("GetModelInfo"), wide.client.model()
    assert told.served_model_name == told.model_path == model.served_model_name
    assert (told.is_generation, told.supports_vision) == (True, False)
    assert (told.max_context_length, told.vocab_size) == (model.max_model_len, model.vocab_size)
    assert list(told.eos_token_ids) == list(model.eos_token_ids)
    assert (told.model_type, list(told.architectures)) == ("llama", ["LlamaForCausalLM"])
    assert (told.bos_token_id, told.pad_token_id) == (2040, 2043)
    assert told.max_req_input_len == model.max_model_len - 1


def test_the_server_is_described(wide, gateway):
    gateway.run([5], max_tokens=1)
    told, model = gateway.ask("GetServerInfo"), wide.client.model()
    assert (told.server_type, told.data_parallel_size, told.is_paused) == ("vllm-grpc", 1, False)
    assert (told.block_size, told.max_num_seqs) == (model.block_size, model.max_num_seqs)
    assert told.uptime_seconds > 0 and told.last_receive_timestamp > 1.7e9
    assert told.active_requests == 0 and told.constrained_decoding_start == "first_token"


def test_loads_are_what_requests_hold_and_not_what_is_cached(wide, gateway):
    gateway.run(fresh_prompt(300), **GREEDY)
    wide.wait_until_idle()
    stats, load = wide.client.stats(), gateway.load()
    assert stats.kv_blocks_cached > 0, "the prompt is still there"
    assert (load.num_used_tokens, load.token_usage, load.num_total_reqs) == (0, 0, 0)
    block = wide.client.model().block_size
    assert load.max_total_num_tokens == stats.kv_blocks_total * block
    assert load.max_running_requests == wide.client.model().max_num_seqs
    call = gateway.start(**{**LONG_DECODE, "max_tokens": 900}).read_tokens(40)
    load = gateway.load()
    assert load.num_running_reqs == load.num_total_reqs == 1 and load.num_waiting_reqs == 0
    assert load.num_used_tokens >= 40 // block * block
    assert load.token_usage == pytest.approx(load.num_used_tokens / load.max_total_num_tokens)
    assert load.gen_throughput > 0, "it generates"
    call.call.cancel()


def test_loads_of_other_ranks_are_refused(gateway):
    assert len(gateway.ask("GetLoads", vllm.GetLoadsRequest(dp_rank=0, include=["core"])).loads) == 1
    error = refusal(lambda: gateway.ask("GetLoads", vllm.GetLoadsRequest(dp_rank=1)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_the_tokenizer_comes_as_a_zip(wide, gateway):
    chunks = list(gateway.ask("GetTokenizer"))
    archive = b"".join(chunk.data for chunk in chunks)
    assert [bool(chunk.sha256) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert hashlib.sha256(archive).hexdigest() == chunks[-1].sha256
    files = zipfile.ZipFile(io.BytesIO(archive))
    assert files.testzip() is None
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"} <= set(files.namelist())
    assert not any("safetensors" in name for name in files.namelist())
    json.loads(files.read("tokenizer.json"))
    assert list(gateway.ask("GetTokenizer")) == chunks, "always the same"


def test_flushing_forgets_prefixes(wide, gateway):
    prompt = fresh_prompt(200)
    gateway.run(prompt, **GREEDY)
    answer = gateway.ask("FlushCache")
    assert answer.success and answer.message
    assert wide.client.stats().kv_blocks_cached == 0
    assert gateway.run(prompt, **GREEDY)[0].complete.cached_tokens == 0
    for timeout in (-1, float("nan"), float("inf")):
        error = refusal(lambda timeout=timeout: gateway.ask("FlushCache", common.FlushCacheRequest(timeout_s=timeout)))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


# What the prefix cache holds


class Index:
    """What a gateway knows of a worker's cache."""

    def __init__(self, gateway):
        self.call = gateway.ask("SubscribeKvEvents")
        self.blocks, self.sequence, self.event = {}, None, 0

    def take(self):
        """Applies the next batch."""
        batch = next(self.call)
        assert self.sequence is None or batch.sequence_number == self.sequence + 1
        assert batch.sequence_number > 0 and batch.timestamp > 1.7e9
        self.sequence = batch.sequence_number
        for event in batch.events:
            kind = event.WhichOneof("data")
            if not batch.HasField("snapshot"):
                assert event.event_id == self.event + 1
                self.event = event.event_id
            if kind == "stored":
                parent = event.stored.parent_block_hash if event.stored.HasField("parent_block_hash") else None
                for block in event.stored.blocks:
                    assert parent is None or parent in self.blocks, "parents come first"
                    assert len(block.token_ids) == block.block_size
                    self.blocks[block.block_hash] = (parent, list(block.token_ids))
                    parent = block.block_hash
            elif kind == "removed":
                for block in event.removed.block_hashes:
                    del self.blocks[block]
            else:
                self.blocks.clear()
        return batch

    def prefixes(self):
        """The tokens up to the end of each block."""

        def tokens(block):
            parent, own = self.blocks[block]
            return (tokens(parent) if parent is not None else []) + own

        return [tokens(block) for block in self.blocks]


def test_a_subscriber_learns_what_is_there_and_what_changes(start_server):
    server = start_server("--enable-kv-cache-events", http=False)
    gateway, block = VllmClient(server.client), server.client.model().block_size
    known = fresh_prompt(5 * block + 3)
    gateway.run(known, **GREEDY)
    server.wait_until_idle()
    index = Index(gateway)
    snapshot = index.take()
    assert (snapshot.snapshot.index, snapshot.snapshot.count) == (0, 1)
    assert snapshot.events[0].WhichOneof("data") == "cleared"
    assert snapshot.snapshot.blocks == len(index.blocks) == server.client.stats().kv_blocks_cached
    assert known[: 5 * block] in index.prefixes()
    new = fresh_prompt(3 * block)
    answer = gateway.run(new, **GREEDY)[0].ids
    whole = (new + answer)[: (len(new) + len(answer) - 1) // block * block]
    while whole not in index.prefixes():
        index.take()
    assert len(index.blocks) == server.client.stats().kv_blocks_cached
    gateway.ask("FlushCache")
    while index.blocks:
        index.take()
    late = Index(gateway)
    late.take()
    assert late.blocks == {} and late.sequence == index.sequence
    index.call.cancel()
    late.call.cancel()


def test_no_history_is_kept(start_server):
    server = start_server("--enable-kv-cache-events", http=False)
    request = common.SubscribeKvEventsRequest(start_sequence_number=7)
    error = refusal(lambda: next(VllmClient(server.client).ask("SubscribeKvEvents", request)))
    assert error.code() == grpc.StatusCode.OUT_OF_RANGE and "0" in error.details()


def test_events_that_are_off_are_not_implemented(gateway):
    error = refusal(lambda: next(gateway.ask("SubscribeKvEvents")))
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED and "--enable-kv-cache-events" in error.details()
