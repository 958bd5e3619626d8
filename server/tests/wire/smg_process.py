"""Stock SMG as a child process in front of our servers."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

START_SECONDS = 60
SMG = Path(sys.executable).with_name("smg")


def free_ports(count):
    """Ports of the loopback interface that nobody has. SMG takes no 0."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports


class Smg:
    """One gateway. Nothing of it leaves this machine: the tokenizer comes from the workers."""

    def __init__(self, workers, *options, api_key=None):
        """Starts it in front of these servers and waits until it serves their model.

        It sends a key to workers over HTTP alone, and wants the same one of its clients; without a key it speaks gRPC.
        """
        self.port, metrics = free_ports(2)
        self.headers = {"content-type": "application/json"}
        urls = [f"grpc://{worker.address}" for worker in workers]
        if api_key:
            self.headers["authorization"] = f"Bearer {api_key}"
            urls, options = [worker.url for worker in workers], (*options, "--api-key", api_key)
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = tempfile.TemporaryFile("w+", prefix="smg-wire-")
        command = [SMG, "launch", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)]
        command += ["--worker-urls", *urls]
        command += ["--worker-startup-check-interval", "1", "--health-check-interval-secs", "1", "--log-level", "info"]
        # What would look for a model on the network finds that it must not.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
        environment["https_proxy"] = environment["http_proxy"]
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [*command, *options], env=environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT
        )
        try:
            self.wait_until(lambda: len(self.workers()) == len(workers), "it knows its workers", START_SECONDS)
            if not api_key:
                # It fetches the tokenizer afterwards; until then it answers 503.
                self.wait_until(lambda: self.get("/v1/tokenizers")["tokenizers"], "it has the tokenizer", START_SECONDS)
        except BaseException:
            self.kill()
            raise

    def output(self):
        """What it has said."""
        self.log.seek(0)
        return self.log.read()

    def wait_until(self, condition, what, seconds=20):
        """Polls until `condition()` is true."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"smg ended with {self.process.returncode}:\n{self.output()[-3000:]}"
            assert time.monotonic() < end, f"not within {seconds} s: {what}\n{self.output()[-3000:]}"
            time.sleep(0.05)

    def workers(self):
        """The workers that it would send requests to."""
        try:
            workers = self.get("/workers")["workers"]
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return []
        return [worker for worker in workers if worker.get("is_healthy")]

    def get(self, path):
        """The parsed answer to a GET."""
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}{path}", headers=self.headers), timeout=5) as answer:
            return json.load(answer)

    def open(self, path, body, timeout=60):
        """The answer to a POST, to be read by the caller; also that of a refused one."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, self.headers)
        try:
            return urllib.request.urlopen(request, timeout=timeout)
        except urllib.error.HTTPError as refused:
            return refused

    def post(self, path, body):
        """Status and parsed body of a POST."""
        with self.open(path, body) as answer:
            text = answer.read().decode()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text

    def kill(self):
        """Ends it: it would take some seconds to do so by itself, whatever it has to do."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
