"""Servers that many tests share, and the check that follows every test: nothing has leaked, and the canary still sings.

A server starts when the first test asks for it and lives until the session ends. The check looks at the servers that
the test asked for, through the public statistics; then it repeats two requests whose tokens were recorded when the
server started. A test that leaks a block or a row, or that disturbs others' tokens, fails by this check alone.
"""

import sys

import pytest

# The stubs' `tidemill.v1` is a namespace package; nothing but PYTHONPATH leads there.
if not any(path.endswith("stubs") for path in sys.path):
    raise pytest.UsageError("run these tests by scripts/wire-test: it makes their environment")

from server_process import Server  # noqa: E402
from servers import SERVERS  # noqa: E402


def _shared(name):
    @pytest.fixture(scope="session", name=name)
    def server():
        options = dict(SERVERS[name])
        server = Server(*options.pop("options"), **options)
        yield server
        assert server.stop() == 0, "after all that, it leaves in peace"
        assert not server.complaints(), "no test of these may look like a bug of the server's own"

    return server


wide, narrow, chunky, tight, cramped, keyed = (_shared(name) for name in SERVERS)


@pytest.fixture
def start_server():
    """Starts servers that one test may stop, starve or kill."""
    started = []

    def start(*options, **keywords):
        started.append(Server(*options, **keywords))
        return started[-1]

    yield start
    for server in started:
        server.client.close()
        server.kill()


@pytest.fixture(autouse=True)
def nothing_leaks(request):
    """After every test: no block owned, nobody running or waiting, and the canary's tokens as on the first day."""
    # Those that a test asks for by name start before it; those that it chooses itself are known only after it.
    named = [request.getfixturevalue(name) for name in SERVERS if name in request.fixturenames]
    yield
    chosen = [request.getfixturevalue(name) for name in SERVERS if name in request.fixturenames]
    for server in dict.fromkeys([*named, *chosen]):
        server.assert_as_new()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure shows the end of the log of the servers that the test used."""
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        for name in set(SERVERS) & set(getattr(item, "funcargs", {})):
            report.sections.append((f"log of {name}", item.funcargs[name].stderr()[-2000:]))
