"""Ways to reach one HTTP front: the official SDKs, requests, curl and a bare socket."""

import contextlib
import json
import re
import socket
import struct
import subprocess

import anthropic
import openai
import requests
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser

MODEL = "tidemill-demo"
TIMEOUT = 30

# What the built-in model answers for certain, greedily.
QUESTION = "What is a KV cache?"
ANSWER = (
    "A KV cache keeps the keys and values of earlier tokens, so the model does not have to compute them again for every "
    "new token."
)
ANSWER_TOKENS = 32
PROMPT_TOKENS = 14
WEATHER_QUESTION = "What is the weather in Paris?"
WEATHER_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather for a city",
        "parameters": WEATHER_PARAMETERS,
    },
}
WEATHER_RESULT = '{"temperature": 21, "sky": "sunny"}'
WEATHER_ANSWER = "It is sunny in Paris with"  # It is not good at copying numbers.
ENDLESS = dict(temperature=0, max_tokens=900, extra_body={"ignore_eos": True})


def user(content=QUESTION):
    """A conversation of one question."""
    return [{"role": "user", "content": content}]


class Front:
    """One HTTP front at `url`."""

    def __init__(self, url, api_key=None):
        self.url, self.api_key = url, api_key
        host, port = url.split("://")[1].rsplit(":", 1)
        self.address = (host, int(port))
        self.session = requests.Session()
        if api_key:
            self.session.headers["Authorization"] = f"Bearer {api_key}"

    def openai(self, **options):
        """A client that does not try again by itself."""
        options = {"api_key": self.api_key or "none", "max_retries": 0, "timeout": TIMEOUT, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def anthropic(self, **options):
        """The same of Anthropic's."""
        options = {"api_key": self.api_key or "none", "max_retries": 0, "timeout": TIMEOUT, **options}
        return anthropic.Anthropic(base_url=self.url, **options)

    def get(self, path, **options):
        """GET by requests."""
        return self.session.get(self.url + path, **{"timeout": TIMEOUT, **options})

    def post(self, path, body=None, **options):
        """POST of JSON by requests."""
        return self.session.post(self.url + path, json=body, **{"timeout": TIMEOUT, **options})

    def chat(self, content=QUESTION, **options):
        """The answer of /v1/chat/completions as JSON."""
        body = {"model": MODEL, "messages": user(content), "temperature": 0, "max_tokens": 40, **options}
        answer = self.post("/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metric_families(self):
        """Name to metric family, by the parser that the reply's type asks for."""
        answer = self.get("/metrics")
        assert answer.status_code == 200, answer.text
        kind = answer.headers["content-type"].split(";")[0]
        chosen = {"application/openmetrics-text": openmetrics_parser, "text/plain": parser}[kind]
        return {family.name: family for family in chosen.text_string_to_metric_families(answer.text)}

    def metrics(self):
        """Sample name and labels to value."""
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in self.metric_families().values()
            for sample in family.samples
        }

    def metric(self, name):
        """The value of a metric, over all its labels."""
        return sum(value for (found, _), value in self.metrics().items() if found == name)

    def curl(self, path, body, *options):
        """What `curl --no-buffer` prints for a POST of JSON."""
        return curl(self.url + path, json.dumps(body), *options)

    @contextlib.contextmanager
    def wire(self):
        """A bare connection."""
        with Wire(self.address) as wire:
            yield wire


def curl(url, data, *options):
    """The bytes of the body as curl writes them."""
    command = ["curl", "--no-buffer", "--silent", "--show-error", "--max-time", str(TIMEOUT), "--data-binary", "@-"]
    headers = ["--header", "Content-Type: application/json"]
    ran = subprocess.run([*command, *headers, *options, url], input=data.encode(), capture_output=True, timeout=TIMEOUT)
    assert ran.returncode == 0, ran.stderr.decode()
    return ran.stdout


class Reply:
    """A reply as it stood on the wire."""

    def __init__(self, head, body):
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split(" ")[1])
        self.headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines[1:])}
        self.body = body

    def json(self):
        """The body."""
        return json.loads(self.body)


class Wire:
    """A connection on which anything can be written."""

    def __init__(self, address, receive_buffer=None):
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(address)
        self.rest = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def send(self, data):
        """Writes bytes."""
        self.socket.sendall(data)
        return self

    def post(self, path, body, *headers):
        """Writes a POST of JSON."""
        return self.send(request_bytes("POST", path, json.dumps(body).encode(), *headers))

    def read_some(self):
        """What comes next; empty when the other side has closed."""
        with contextlib.suppress(ConnectionResetError):
            data = self.socket.recv(1 << 16)
            self.rest += data
            return data
        return b""

    def read_until(self, mark):
        """What has come up to a mark and with it; the rest is kept."""
        while mark not in self.rest:
            assert self.read_some(), f"closed before {mark}: {self.rest[-300:]}"
        found, self.rest = self.rest.split(mark, 1)
        return found + mark

    def read_to_end(self):
        """Everything until the other side closes."""
        while self.read_some():
            pass
        found, self.rest = self.rest, b""
        return found

    def reply(self):
        """The next reply: its head and a body of known length or in chunks."""
        head = self.read_until(b"\r\n\r\n")[:-4]
        reply = Reply(head, b"")
        if "content-length" in reply.headers:
            length = int(reply.headers["content-length"])
            while len(self.rest) < length:
                assert self.read_some(), "closed within a body"
            reply.body, self.rest = self.rest[:length], self.rest[length:]
        elif reply.headers.get("transfer-encoding") == "chunked":
            while (size := int(self.read_until(b"\r\n"), 16)) > 0:
                while len(self.rest) < size + 2:
                    assert self.read_some(), "closed within a chunk"
                reply.body, self.rest = reply.body + self.rest[:size], self.rest[size + 2 :]
            self.read_until(b"\r\n")
        return reply

    # Ways to go, from polite to rude.

    def half_close(self):
        """FIN: nothing more will come from this side, which still listens."""
        with contextlib.suppress(OSError):  # The other side may have gone first.
            self.socket.shutdown(socket.SHUT_WR)

    def close(self):
        """Closes the socket."""
        self.socket.close()

    def reset(self):
        """RST: what a crashed machine's kernel sends."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def free_port():
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def request_bytes(method, path, body=b"", *headers):
    """An HTTP/1.1 request with a body of known length."""
    lines = [f"{method} {path} HTTP/1.1", "Host: wire-test", *headers]
    if body and not any(header.lower().startswith("content-type") for header in headers):
        lines.append("Content-Type: application/json")
    if not any(header.lower().startswith(("content-length", "transfer-encoding")) for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def events(body):
    """The events of an SSE body: (name or None, data)."""
    text = body.decode() if isinstance(body, bytes) else body
    assert text.endswith("\n\n"), f"an event must end in an empty line: {text[-100:]!r}"
    found = []
    for block in re.split(r"\r?\n\r?\n", text)[:-1]:
        name, data = None, []
        for line in block.splitlines():
            if line.startswith("event:"):
                name = line[6:].strip()
            elif line.startswith("data:"):
                data.append(line[5:].removeprefix(" "))
            else:
                assert line.startswith(":"), f"no line of SSE: {line!r}"
        if data:
            found.append((name, "\n".join(data)))
    return found


def chunks(body):
    """The JSON of an OpenAI stream, which must end in [DONE]."""
    found = [data for _, data in events(body)]
    assert found[-1] == "[DONE]" and found.count("[DONE]") == 1
    return [json.loads(data) for data in found[:-1]]
