"""The real `tidemill serve` and `tidemill gateway` as child processes, and what must hold whenever nothing runs in them."""

import os
import re
import signal
import subprocess
import tempfile
import threading
import time

from client import Client

GRPC_BOUND = re.compile(r"listening on ([^/\s]+:\d+)$")
HTTP_BOUND = re.compile(r"listening on (https?://\S+:\d+)")
# Generous: the machine may be slow and shared. What takes this long has failed, whatever the machine.
START_SECONDS = 30
SETTLE_SECONDS = 5
API_KEY = "the-only-key-of-the-wire-tests"

# One greedy and one random request; both are short, so that they can follow every single test.
CANARY = [
    dict(prompt="The tide comes in", temperature=0, max_tokens=10, ignore_eos=True),
    dict(prompt="The tide goes out", temperature=1.2, seed=20, max_tokens=10, ignore_eos=True),
]


class Process:
    """A child process that says on stdout where it listens, and logs to a file that tests can read."""

    def __init__(self, command, *options, bound, unheard=False):
        """Starts it; `bound` maps names of attributes to the patterns that find their values on stdout."""
        self.log = tempfile.TemporaryFile("w+", prefix="tidemill-wire-")
        self.unheard, self.bound = unheard, bound
        stderr, our_stderr = self.log, None
        if unheard:
            our_stderr, stderr = os.pipe()
        # Options may also come from the environment; here only the command line counts.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TIDEMILL_")}
        self.process = subprocess.Popen(
            [os.environ["TIDEMILL_BIN"], *command, "--host", "127.0.0.1", *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        if unheard:
            os.close(our_stderr)
            os.close(stderr)
        self._heard = threading.Event()
        for name in bound:
            setattr(self, name, None)
        threading.Thread(target=self._read_stdout, daemon=True).start()
        if not self._heard.wait(START_SECONDS) or not self._is_bound():
            self.kill()
            raise AssertionError(f"{command} did not start:\n{self.stderr()}")

    def _is_bound(self):
        return all(getattr(self, name) is not None for name in self.bound)

    def _read_stdout(self):
        """Reads to the end, so that the process can never block on a full pipe."""
        for line in self.process.stdout:
            for name, pattern in self.bound.items():
                if (found := pattern.search(line.rstrip())) and getattr(self, name) is None:
                    setattr(self, name, found[1])
            if self._is_bound():
                self._heard.set()
                if self.unheard:
                    break
        self.process.stdout.close()
        self._heard.set()

    def stderr(self):
        """What the process has logged, without the readings that these tests take all the time."""
        self.log.seek(0)
        return "".join(line for line in self.log if 'rpc="GetStats"' not in line)

    def complaints(self):
        """What the process has logged about bugs of its own."""
        return [line for line in self.stderr().splitlines() if "panicked" in line or " ERROR " in line]

    def wait_until(self, condition, what, seconds=SETTLE_SECONDS):
        """Polls until `condition()` is true."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.stderr()}"
            assert time.monotonic() < end, f"not within {seconds} s: {what}; {self.situation()}"
            time.sleep(0.005)

    def situation(self):
        """What to show when something does not come about."""
        return self.stderr()[-500:]

    def send_signal(self, number):
        """Sends the process a signal."""
        self.process.send_signal(number)

    def wait_for_exit(self, seconds=20):
        """The exit code."""
        return self.process.wait(seconds)

    def stop(self):
        """Ends the process the polite way; returns its exit code."""
        if self.process.poll() is None:
            self.send_signal(signal.SIGTERM)
        try:
            return self.wait_for_exit()
        finally:
            self.kill()

    def kill(self):
        """Ends the process for certain."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Server(Process):
    """One server process. `client` talks gRPC to it, `url` is its HTTP; `assert_as_new` finds what a test left behind."""

    def __init__(self, *options, api_key=None, unheard=False, http=True, model="builtin"):
        """Starts it; `unheard` closes our ends of its stdout and stderr as soon as it listens. Other models do not sing."""
        self.api_key = api_key
        bound = {"address": GRPC_BOUND, **({"url": HTTP_BOUND} if http else {})}
        # Tests that start a server at a port of their own give that option themselves.
        ports = [
            *(() if "--grpc-port" in options else ("--grpc-port", "0")),
            *(("--no-http",) if not http else () if "--port" in options else ("--port", "0")),
        ]
        super().__init__(["serve", "--model", str(model)], *ports, *options, bound=bound, unheard=unheard)
        self.client = Client(self.address, api_key)
        try:
            self.wait_until(self.client.is_serving, "the server is ready", START_SECONDS)
            self.canary = self.sing() if model == "builtin" else None
        except BaseException:
            self.kill()
            raise

    def situation(self):
        """The statistics."""
        return self.client.stats()

    def sing(self):
        """The canary's tokens now. Both requests share the batch."""
        streams = [self.client.start(**request) for request in CANARY]
        return [stream.result().ids for stream in streams]

    def wait_for_stats(self, condition, what, seconds=SETTLE_SECONDS):
        """Polls the statistics until `condition(stats)` is true."""
        self.wait_until(lambda: condition(self.client.stats()), what, seconds)

    def wait_until_idle(self):
        """Waits until nothing runs, nothing waits and nobody owns a block."""
        self.wait_for_stats(is_idle, "idle, with no KV block owned")

    def assert_as_new(self):
        """Nothing leaked, and the same requests still give the same tokens as at the start."""
        self.wait_until_idle()
        assert self.client.is_serving()
        assert self.sing() == self.canary, "the canary's tokens changed"
        self.wait_until_idle()

    def stop(self):
        """Ends the process the polite way; returns its exit code."""
        self.client.close()
        return super().stop()


class Gateway(Process):
    """A gateway process in front of the server with this gRPC address. `url` is its HTTP."""

    def __init__(self, engine, *options, api_key=None):
        self.api_key = api_key
        ports = () if "--port" in options else ("--port", "0")
        super().__init__(["gateway", "--engine", engine], *ports, *options, bound={"url": HTTP_BOUND})


def is_idle(stats):
    """Whether a server with these statistics holds nothing for anybody. What is cached can be had at any time."""
    return (
        stats.kv_blocks_free + stats.kv_blocks_cached == stats.kv_blocks_total
        and stats.kv_blocks_owned == 0
        and stats.num_requests_running == 0
        and stats.num_requests_waiting == 0
    )
