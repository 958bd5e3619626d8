"""HTTP/2 by hand: for clients that misbehave in ways a gRPC library would not."""

import contextlib
import socket
import struct
import time

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from tidemill.v1 import tidemill_pb2 as pb

GENERATE = "/tidemill.v1.Inference/Generate"
GET_STATS = "/tidemill.v1.Control/GetStats"


def frame(message, compressed=0, length=None):
    """A gRPC message frame, whose header may lie."""
    return struct.pack(">BI", compressed, len(message) if length is None else length) + message


def messages(data):
    """The messages in a body of frames, complete ones only."""
    found = []
    while len(data) >= 5 and len(data) >= 5 + struct.unpack(">I", data[1:5])[0]:
        end = 5 + struct.unpack(">I", data[1:5])[0]
        found.append(data[5:end])
        data = data[end:]
    return found


class RawStream:
    """What has come back on one HTTP/2 stream."""

    def __init__(self):
        self.headers = {}
        self.data = b""
        self.ended = False
        self.reset = None

    def generated(self):
        """The messages of a Generate call that have come."""
        return [pb.GenerateResponse.FromString(message) for message in messages(self.data)]

    def num_tokens(self):
        """How many tokens they carry."""
        return sum(len(message.token_ids) for message in self.generated())


class RawClient:
    """One connection. With `window`, that many bytes of each response are accepted and no more."""

    def __init__(self, address, window=None):
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        self.window = window
        config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        if window is not None:
            self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.streams = {}
        self.closed = self.holding_back = False
        self._flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def _flush(self):
        if not self.holding_back:
            self.socket.sendall(self.h2.data_to_send())

    @contextlib.contextmanager
    def one_breath(self):
        """Holds back what is sent meanwhile, and then sends it in one piece."""
        self.holding_back = True
        yield
        self.holding_back = False
        self._flush()

    def call(self, path, body, headers=(), method="POST", content_type="application/grpc", end=True):
        """Opens a stream with one body (a frame, as a rule); returns its number."""
        stream = self.h2.get_next_available_stream_id()
        pseudo = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "wire-test")]
        self.h2.send_headers(stream, [*pseudo, ("content-type", content_type), ("te", "trailers"), *headers])
        self.streams[stream] = RawStream()
        self._flush()
        while body:
            room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
            if room == 0:
                self._receive(time.monotonic() + 10)
                continue
            self.h2.send_data(stream, body[:room])
            body = body[room:]
            self._flush()
        if end:
            self.h2.end_stream(stream)
        self._flush()
        return stream

    def generate(self, request, headers=()):
        """Sends a GenerateRequest; returns the number of its stream."""
        return self.call(GENERATE, frame(request.SerializeToString()), headers)

    def _receive(self, end):
        """Takes in what the server sends next; raises TimeoutError at `end`."""
        self.socket.settimeout(max(0.001, end - time.monotonic()))
        data = self.socket.recv(1 << 16)
        if not data:
            self.closed = True
            return
        for event in self.h2.receive_data(data):
            stream = self.streams.get(getattr(event, "stream_id", None))
            if isinstance(event, h2.events.ConnectionTerminated):
                self.closed = True
            elif stream is None:
                continue
            elif isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                stream.headers.update(event.headers)
            elif isinstance(event, h2.events.DataReceived):
                stream.data += event.data
                if self.window is None:
                    with contextlib.suppress(h2.exceptions.StreamClosedError):
                        self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                stream.ended = True
            elif isinstance(event, h2.events.StreamReset):
                stream.reset, stream.ended = event.error_code, True
        self._flush()

    def wait(self, number, seconds=10):
        """Reads until a stream has ended (or the connection has) and returns it."""
        stream, end = self.streams[number], time.monotonic() + seconds
        while not stream.ended and not self.closed:
            self._receive(end)
        return stream

    def wait_for_data(self, number, size=1, seconds=10):
        """Reads until so many bytes of a response's body have come."""
        stream, end = self.streams[number], time.monotonic() + seconds
        while len(stream.data) < size:
            assert not stream.ended and not self.closed, stream.headers
            self._receive(end)
        return stream

    def wait_for_tokens(self, number, count, seconds=10):
        """Reads until so many tokens of a Generate call have come."""
        while self.streams[number].num_tokens() < count:
            self.wait_for_data(number, len(self.streams[number].data) + 1, seconds)
        return self.streams[number]

    def open_window(self, number, size):
        """Lets the server send more on a stream, and keeps it flowing from now on."""
        self.window = None
        self.h2.increment_flow_control_window(size, number)
        self._flush()

    def allow(self, number, size):
        """Lets the server send so much more on a stream, and no more than that."""
        self.h2.increment_flow_control_window(size)
        self.h2.increment_flow_control_window(size, number)
        self._flush()

    def read_for(self, seconds):
        """Takes in what comes meanwhile."""
        end = time.monotonic() + seconds
        with contextlib.suppress(TimeoutError):
            while not self.closed and time.monotonic() < end:
                self._receive(end)

    # Ways to go, from polite to rude.

    def reset_streams(self, spare=None):
        """RST_STREAM for every stream but one; the connection stays."""
        for number, stream in self.streams.items():
            if not stream.ended and number != spare:
                self.h2.reset_stream(number, error_code=8)
                stream.ended = True
        self._flush()

    def half_close(self):
        """FIN: nothing more will come from this side, which still listens."""
        self.socket.shutdown(socket.SHUT_WR)

    def close(self):
        """Closes the socket without a word of HTTP/2."""
        self.socket.close()

    def reset_connection(self):
        """RST: what a crashed machine's kernel sends."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
