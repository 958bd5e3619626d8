"""A gRPC client of Tidemill for tests, with what must hold for every message of every stream."""

import dataclasses
import json

import google.rpc.error_details_pb2 as details
import grpc
import grpc_status.rpc_status
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tidemill.v1 import tidemill_pb2 as pb
from tidemill.v1 import tidemill_pb2_grpc as pb_grpc

ABORT, LENGTH, STOP = pb.FINISH_REASON_ABORT, pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_STOP
MAX_N = 8
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def chat(*messages, tools=None, add_generation_prompt=None):
    """A chat prompt of (role, content) pairs."""
    messages = [pb.ChatMessage(role=role, content=content) for role, content in messages]
    tools_json = json.dumps(tools) if tools is not None else ""
    return pb.ChatPrompt(messages=messages, tools_json=tools_json, add_generation_prompt=add_generation_prompt)


def generate_request(prompt, request_id="", model="", output=None, **sampling):
    """A GenerateRequest for a text, a list of token ids, a ChatPrompt, or no prompt at all (None)."""
    request = pb.GenerateRequest(
        request_id=request_id, model=model, output=output, sampling=pb.SamplingParams(**sampling)
    )
    if isinstance(prompt, str):
        request.text = prompt
    elif isinstance(prompt, pb.ChatPrompt):
        request.chat.CopyFrom(prompt)
    elif prompt is not None:
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(prompt)
    return request


@dataclasses.dataclass
class Completion:
    """Everything that came for one of a request's completions."""

    text: str = ""
    ids: list = dataclasses.field(default_factory=list)
    deltas: list = dataclasses.field(default_factory=list)
    logprobs: list = dataclasses.field(default_factory=list)
    finish: int = pb.FINISH_REASON_UNSPECIFIED
    matched_stop: object = None
    usage: pb.Usage = None


@dataclasses.dataclass
class Result:
    """A finished request. Without an index the properties speak of its first completion."""

    request_id: str
    completions: list
    prompt_logprobs: list

    text = property(lambda self: self.completions[0].text)
    ids = property(lambda self: self.completions[0].ids)
    logprobs = property(lambda self: self.completions[0].logprobs)
    finish = property(lambda self: self.completions[0].finish)
    matched_stop = property(lambda self: self.completions[0].matched_stop)
    usage = property(lambda self: self.completions[0].usage)

    @property
    def tokens(self):
        """What two runs of the same request must have in common."""
        return [(c.ids, c.text, c.finish, c.matched_stop) for c in self.completions]


class Stream:
    """A Generate call under way."""

    def __init__(self, call, n=1):
        self.call = call
        self.request_id = None
        self.completions = [Completion() for _ in range(n)]
        self.prompt_logprobs = []
        self.num_messages = 0

    def read(self):
        """Takes in the next message; None at the end of the stream."""
        message = next(self.call, None)
        if message is not None:
            self._take(message)
        return message

    def _take(self, message):
        first, self.num_messages = self.num_messages == 0, self.num_messages + 1
        if first:
            self.request_id = message.request_id
        assert message.request_id and message.request_id == self.request_id
        completion = self.completions[message.index]
        assert not completion.finish, "a message came after the end of its completion"
        assert len(message.logprobs) in (0, len(message.token_ids))
        assert [entry.token_id for entry in message.logprobs] in ([], list(message.token_ids))
        if message.prompt_logprobs:
            assert message.index == 0 and not completion.deltas, "prompt logprobs come first, once"
        assert message.HasField("usage") == (message.finish_reason != pb.FINISH_REASON_UNSPECIFIED)
        self.prompt_logprobs.extend(message.prompt_logprobs)
        completion.text += message.text
        completion.ids.extend(message.token_ids)
        completion.deltas.append((message.text, list(message.token_ids)))
        completion.logprobs.extend(message.logprobs)
        if message.finish_reason:
            completion.finish, completion.usage = message.finish_reason, message.usage
            which = message.WhichOneof("matched_stop")
            completion.matched_stop = getattr(message, which) if which else None
            assert completion.usage.completion_tokens == len(completion.ids), "usage counts what was delivered"
        else:
            assert message.WhichOneof("matched_stop") is None

    def read_tokens(self, count=1):
        """Reads until so many tokens have come in all."""
        while sum(len(completion.ids) for completion in self.completions) < count:
            assert self.read() is not None, "the stream ended early"
        return self

    def result(self):
        """Reads to the end: every completion has exactly one."""
        while self.read() is not None:
            pass
        assert all(completion.finish for completion in self.completions), "the stream ended without a finish reason"
        return Result(self.request_id, self.completions, self.prompt_logprobs)

    def cancel(self):
        """Resets the stream, as a client does that has lost interest."""
        self.call.cancel()


class Client:
    """A channel of its own to one server."""

    def __init__(self, address, api_key=None):
        self.address = address
        self.metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        # Without a channel pool of its own, gRPC would let all clients of a process share one connection.
        self.channel = grpc.insecure_channel(address, [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)])
        self.inference = pb_grpc.InferenceStub(self.channel)
        self.control = pb_grpc.ControlStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def close(self):
        """Closes the connection."""
        self.channel.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def start(self, prompt, timeout=None, **options):
        """Sends a request; the answer is read from the stream that is returned."""
        request = generate_request(prompt, **options)
        call = self.inference.Generate(request, timeout=timeout, metadata=self.metadata)
        return Stream(call, min(options.get("n", 1), MAX_N))

    def run(self, prompt, **options):
        """Sends a request and reads its answer to the end."""
        return self.start(prompt, **options).result()

    def abort(self, request_id):
        """The receipt."""
        return self.control.Abort(pb.AbortRequest(request_id=request_id), metadata=self.metadata)

    def stats(self):
        """The server's statistics now."""
        return self.control.GetStats(pb.GetStatsRequest(), metadata=self.metadata).stats

    def model(self):
        """What the server has loaded."""
        return self.inference.GetModel(pb.GetModelRequest(), metadata=self.metadata)

    def tokenize(self, prompt, **options):
        """The tokens of a text or a chat."""
        field = {"text": prompt} if isinstance(prompt, str) else {"chat": prompt}
        return self.inference.Tokenize(pb.TokenizeRequest(**field, **options), metadata=self.metadata)

    def detokenize(self, ids, **options):
        """The text of tokens."""
        return self.inference.Detokenize(pb.DetokenizeRequest(token_ids=ids, **options), metadata=self.metadata).text

    def serving_status(self, service=""):
        """What grpc.health.v1 says of a service."""
        return self.health.Check(health_pb2.HealthCheckRequest(service=service)).status

    def is_serving(self):
        """Whether the server says that it is healthy."""
        return self.serving_status() == health_pb2.HealthCheckResponse.SERVING


def refusal(call):
    """The error that a call must end in."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def detail(error, kind):
    """The detail of one kind that an error carries in `grpc-status-details-bin`, or None."""
    status = grpc_status.rpc_status.from_call(error)
    for packed in status.details if status else ():
        if packed.Is(kind.DESCRIPTOR):
            found = kind()
            packed.Unpack(found)
            return found
    return None


def violations(error):
    """Field to description, of an INVALID_ARGUMENT."""
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    bad_request = detail(error, details.BadRequest)
    assert bad_request and bad_request.field_violations, "INVALID_ARGUMENT must say which fields are wrong"
    return {violation.field: violation.description for violation in bad_request.field_violations}


def retry_seconds(error):
    """How long a refused client should wait, of a RESOURCE_EXHAUSTED; None when the server does not say."""
    info = detail(error, details.RetryInfo)
    return info and info.retry_delay.seconds + info.retry_delay.nanos / 1e9
