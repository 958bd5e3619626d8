"""A TCP proxy that can fall silent: what a machine that lost its power, or a firewall that forgot, looks like."""

import contextlib
import select
import socket
import threading

TICK = 0.05  # seconds until a thread looks whether it is to end


class SilentProxy:
    """Forwards to one address until `silence` is called; from then on nothing goes either way and nothing is closed."""

    def __init__(self, target):
        host, port = target.rsplit(":", 1)
        self.target = (host, int(port))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:{}".format(self.listener.getsockname()[1])
        self.silent, self.closed = threading.Event(), threading.Event()
        self.sockets, self.threads = [], []
        self._run(self._accept)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Closes everything at last."""
        self.closed.set()
        for thread in self.threads:
            thread.join()
        for end in (self.listener, *self.sockets):
            end.close()

    def silence(self):
        """Stops forwarding. What has been read and not forwarded yet is lost."""
        self.silent.set()

    def _run(self, function, *arguments):
        self.threads.append(threading.Thread(target=function, args=arguments, daemon=True))
        self.threads[-1].start()

    def _accept(self):
        self.listener.settimeout(TICK)
        while not self.closed.is_set():
            try:
                client, _ = self.listener.accept()
            except TimeoutError:
                continue
            server = socket.create_connection(self.target)
            self.sockets += [client, server]
            self._run(self._pump, client, server)
            self._run(self._pump, server, client)

    def _pump(self, source, sink):
        with contextlib.suppress(OSError):
            while not self.closed.is_set() and not self.silent.is_set():
                if not select.select([source], [], [], TICK)[0]:
                    continue
                data = source.recv(1 << 16)
                if self.silent.is_set():
                    return
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
