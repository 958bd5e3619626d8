"""HTTP fronts of the servers that all tests of the wire share."""

import pytest
from fronts import front_of
from server_process import GRPC_BOUND, HTTP_BOUND, Gateway, Process


@pytest.fixture
def front(wide):
    """The front of the server with its defaults."""
    return front_of(wide)


@pytest.fixture
def narrow_front(narrow):
    """The front of the server that computes one token per step."""
    return front_of(narrow)


@pytest.fixture
def keyed_front(keyed):
    """The front of the server that is closed to strangers, for those who know the key."""
    return front_of(keyed)


@pytest.fixture
def api(front):
    """OpenAI's SDK."""
    with front.openai() as client:
        yield client


@pytest.fixture
def claude(front):
    """Anthropic's SDK."""
    with front.anthropic() as client:
        yield client


@pytest.fixture
def start_gateway():
    """Starts gateways that one test may stop or kill."""
    started = []

    def start(*arguments, **keywords):
        started.append(Gateway(*arguments, **keywords))
        return started[-1]

    yield start
    for gateway in started:
        gateway.kill()


@pytest.fixture
def start_process():
    """Starts processes that our own gRPC client cannot talk to."""
    started = []

    def start(command, *options):
        bound = {"address": GRPC_BOUND, "url": HTTP_BOUND}
        started.append(Process([command], "--port", "0", *options, bound=bound))
        return started[-1]

    yield start
    for process in started:
        process.kill()
