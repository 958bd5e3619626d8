"""With an API key every method is closed but health."""

import grpc
import pytest
from client import Client, refusal
from grpc_reflection.v1alpha import reflection_pb2
from server_process import API_KEY
from tidemill.v1 import tidemill_pb2 as pb

METHODS = [
    f"/{service.full_name}/{method.name}"
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
] + [f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" for version in ("v1", "v1alpha")]

WRONG = {
    "none": (),
    "empty": (("authorization", ""),),
    "another": (("authorization", "Bearer another"),),
    "a beginning": (("authorization", f"Bearer {API_KEY[:-1]}"),),
    "more": (("authorization", f"Bearer {API_KEY}x"),),
    "no scheme": (("authorization", API_KEY),),
    "another scheme": (("authorization", f"Basic {API_KEY}"),),
    "another header": (("cookie", API_KEY),),
    "long": (("x-api-key", "x" * 8000),),
}


@pytest.fixture
def stranger(keyed):
    """A client that knows no key."""
    with Client(keyed.address) as client:
        yield client


def call(client, method, metadata):
    """Calls any method with an empty message."""
    return list(client.channel.stream_stream(method)(iter([b""]), metadata=metadata))


def test_all_methods_are_walked():
    assert len(METHODS) >= 10


@pytest.mark.parametrize("method", METHODS)
def test_closed_without_the_key(keyed, stranger, method):
    assert refusal(lambda: call(stranger, method, ())).code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("wrong", WRONG)
def test_closed_to_other_keys(keyed, stranger, wrong):
    error = refusal(lambda: stranger.inference.GetModel(pb.GetModelRequest(), metadata=WRONG[wrong]))
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED
    assert API_KEY not in error.details()


def test_unknown_methods_are_closed_too(keyed, stranger):
    """Who has no key cannot even learn what there is."""
    error = refusal(lambda: call(stranger, "/tidemill.v1.Inference/Nothing", ()))
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    "metadata",
    [("authorization", f"Bearer {API_KEY}"), ("authorization", f"Api-Key {API_KEY}"), ("x-api-key", API_KEY)],
    ids=["Bearer", "Api-Key", "x-api-key"],
)
def test_open_with_the_key_in_any_of_its_forms(keyed, stranger, metadata):
    model = stranger.inference.GetModel(pb.GetModelRequest(), metadata=(metadata,))
    assert model.vocab_size
    question = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    reflect = stranger.channel.stream_stream(METHODS[-1])
    assert list(reflect(iter([question]), metadata=(metadata,)))


def test_health_is_open(keyed, stranger):
    assert stranger.is_serving()


def test_the_key_is_in_no_log(keyed):
    assert keyed.client.run("a", max_tokens=1).ids
    assert API_KEY not in keyed.stderr()
