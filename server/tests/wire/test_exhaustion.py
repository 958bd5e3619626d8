"""A server that runs out of what the operating system gives."""

import contextlib
import os
import resource
import signal
import socket

from client import Client
from stages import LONG_DECODE


def test_out_of_file_descriptors(start_server):
    """Those that are connected are served on; when others leave, newcomers are served again."""
    server = start_server()
    in_use = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (in_use + 5, in_use + 5))
    host, port = server.address.rsplit(":", 1)
    running = server.client.start(**LONG_DECODE).read_tokens(1)
    with contextlib.ExitStack() as crowd:
        for _ in range(50):
            crowd.enter_context(socket.create_connection((host, int(port)), timeout=5))
        server.wait_until(lambda: "cannot be accepted" in server.stderr(), "it has run out")
        server.client.abort(running.request_id)
        assert running.result().completions
        server.assert_as_new()
    with Client(server.address) as newcomer:
        assert newcomer.run("The tide", temperature=0, max_tokens=2, ignore_eos=True).ids
    server.assert_as_new()
    assert server.stop() == 0


def test_nobody_reads_its_log(start_server):
    """A supervisor that closes its ends of stdout and stderr loses lines, not service."""
    server = start_server(unheard=True)
    for _ in range(3):
        server.assert_as_new()
    server.send_signal(signal.SIGTERM)
    assert server.wait_for_exit() == 0
