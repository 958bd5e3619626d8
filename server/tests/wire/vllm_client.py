"""A client of `vllm.grpc.engine`, made of the stubs that gateways have, with what must hold for every stream."""

import dataclasses

from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc as vllm_grpc
from smg_grpc_proto.generated import common_pb2 as common

__all__ = ["VllmClient", "common", "generate", "vllm", "vllm_grpc"]


def generate(prompt, request_id="", stream=True, request=None, **sampling):
    """A GenerateRequest for a text, a list of token ids, or no prompt at all (None)."""
    message = vllm.GenerateRequest(
        request_id=request_id, stream=stream, sampling_params=vllm.SamplingParams(**sampling), **(request or {})
    )
    if isinstance(prompt, str):
        message.text = prompt
    elif prompt is not None:
        message.tokenized.SetInParent()
        message.tokenized.input_ids.extend(prompt)
    return message


@dataclasses.dataclass
class Completion:
    """What came for one index."""

    chunks: list = dataclasses.field(default_factory=list)
    complete: object = None

    @property
    def ids(self):
        return list(self.complete.output_ids)

    @property
    def finish(self):
        return self.complete.finish_reason

    @property
    def matched(self):
        which = self.complete.WhichOneof("matched_stop")
        return getattr(self.complete, which) if which else None


class Stream:
    """A Generate call under way."""

    def __init__(self, call, request):
        self.call, self.request = call, request
        self.completions = [Completion() for _ in range(max(1, request.sampling_params.n))]

    def read(self):
        """Takes in the next message; None at the end of the stream."""
        message = next(self.call, None)
        if message is None:
            return None
        kind = message.WhichOneof("response")
        part = getattr(message, kind)
        completion = self.completions[part.index]
        assert completion.complete is None, "a message came after the end of its completion"
        if kind == "chunk":
            assert self.request.stream, "chunks were not asked for"
            assert part.token_ids and part.completion_tokens == len(part.token_ids)
            completion.chunks.append(part)
        else:
            completion.complete = part
            assert part.completion_tokens == len(part.output_ids)
            told = [token for chunk in completion.chunks for token in chunk.token_ids]
            assert told == (list(part.output_ids) if self.request.stream else []), "the end repeats the chunks"
        return message

    def read_tokens(self, count):
        """Reads until so many tokens have come in all."""
        while sum(len(chunk.token_ids) for completion in self.completions for chunk in completion.chunks) < count:
            assert self.read() is not None, "the stream ended early"
        return self

    def result(self):
        """Reads to the end: every completion has exactly one."""
        while self.read() is not None:
            pass
        assert all(completion.complete is not None for completion in self.completions)
        return self.completions


class VllmClient:
    """The service of one server, over the channel of a client that it has already."""

    def __init__(self, client):
        self.stub = vllm_grpc.VllmEngineStub(client.channel)
        self.metadata = client.metadata

    def start(self, prompt, timeout=None, **options):
        """Sends a request; the answer is read from the stream that is returned."""
        request = generate(prompt, **options)
        return Stream(self.stub.Generate(request, timeout=timeout, metadata=self.metadata), request)

    def run(self, prompt, **options):
        """Sends a request and reads its answer to the end: one completion per index."""
        return self.start(prompt, **options).result()

    def ask(self, method, request=None, **keywords):
        """Calls a method that takes one message."""
        if request is None:
            types = vllm.DESCRIPTOR.services_by_name["VllmEngine"].methods_by_name[method].input_type
            request = types._concrete_class()
        return getattr(self.stub, method)(request, metadata=self.metadata, **keywords)

    def load(self):
        """The load of the only rank."""
        (load,) = self.ask("GetLoads").loads
        return load
