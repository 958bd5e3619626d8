"""A real server, and a real browser without a screen. After every test: nothing was complained about, nothing came from elsewhere."""

import os
import re
import signal
import subprocess
import tempfile
import threading
import time
import urllib.request

import pytest
from playwright.sync_api import sync_playwright

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
BOUND = re.compile(r"listening on (https?://\S+)")
# Generous: the machine may be slow and shared. What takes this long has failed, whatever the machine.
PATIENCE = 30


class Server:
    """One server process over the built-in model."""

    def __init__(self, *options, port=0):
        self.log = tempfile.TemporaryFile("w+", prefix="tidemill-page-")
        # Options may also come from the environment; here only the command line counts.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TIDEMILL_")}
        command = [os.environ["TIDEMILL_BIN"], "serve", "--model", "builtin", "--host", "127.0.0.1", "--grpc-port", "0"]
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.url = None
        bound = threading.Event()

        def read():
            for line in self.process.stdout:
                if found := BOUND.search(line):
                    self.url = found[1]
                    bound.set()
            bound.set()

        threading.Thread(target=read, daemon=True).start()
        if not bound.wait(PATIENCE) or self.url is None:
            self.stop()
            raise AssertionError(f"the server did not start:\n{self.stderr()}")
        self.port = int(self.url.rsplit(":", 1)[1])
        self.wait_until_ready()

    def wait_until_ready(self):
        """Polls the probe."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return urllib.request.urlopen(f"{self.url}/ready", timeout=5).read()
            except OSError:
                assert time.monotonic() < end, f"never ready:\n{self.stderr()}"
                time.sleep(0.05)

    def stderr(self):
        """What the server has logged."""
        self.log.seek(0)
        return self.log.read()

    def stop(self):
        """Ends the process; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()


def pytest_addoption(parser):
    parser.addoption("--screenshot", help="take a picture of the page at work too, and write it there (PNG)")


def pytest_collection_modifyitems(config, items):
    """The picture proves nothing: it is taken when it is asked for."""
    if not config.getoption("--screenshot"):
        items[:] = [item for item in items if item.name != "test_picture"]


@pytest.fixture(scope="session")
def server():
    # Six rows, so that eight prompts fill the batch and the queue; one thread, so that a batch lasts and the browser has a core.
    shape = ("--max-num-seqs", "6", "--threads", "1", "--block-size", "16", "--kv-cache-memory", "16MiB")
    server = Server(*shape)
    yield server
    assert server.stop() == 0, f"it leaves in peace:\n{server.stderr()}"


@pytest.fixture
def start_server():
    """Starts servers that one test has for itself."""
    started = []

    def start(*options, **keywords):
        started.append(Server(*options, **keywords))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def browser():
    if not os.path.exists(CHROMIUM):
        raise pytest.UsageError(f"{CHROMIUM} is missing; on Debian: apt-get install chromium, or name another by CHROMIUM")
    # Its own sandbox does not work for root; the page comes from our own server.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


class Visit:
    """A browser window on a server's page, and what it complained about."""

    def __init__(self, browser, url, **window):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **window})
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE * 1000)
        self.url = url
        self.complaints = []
        self.provoked, self.tolerated = [], []
        self.requested = []
        self.page.on("console", lambda message: self._complain(message.type in ("error", "warning"), message.text))
        self.page.on("pageerror", lambda error: self._complain(True, str(error)))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(url)

    def _complain(self, is_one, text):
        if is_one:
            self.complaints.append(text)

    def live(self):
        """Waits until the page hears from the engine."""
        self.page.wait_for_selector("#link[data-state=live]")
        return self.page

    def provokes(self, pattern):
        """The browser will complain about what this test does, and about nothing else."""
        self.provoked.append(re.compile(pattern))
        self.tolerated.append(re.compile(pattern))

    def tolerates(self, pattern):
        """The browser may complain about what this test does."""
        self.tolerated.append(re.compile(pattern))

    def check(self):
        """Nothing was complained about that the test did not ask for, and nothing came from elsewhere."""
        left = [text for text in self.complaints if not any(pattern.search(text) for pattern in self.tolerated)]
        assert not left
        for pattern in self.provoked:
            assert any(map(pattern.search, self.complaints)), f"nothing like {pattern.pattern} among {self.complaints}"
        foreign = [url for url in self.requested if not url.startswith((f"{self.url}/", "data:"))]
        assert not foreign, "the page asks its own server and nobody else"


@pytest.fixture
def visit(browser):
    """Opens windows, and checks at the end what happened in them."""
    opened = []

    def open_window(server, **window):
        opened.append(Visit(browser, server.url, **window))
        return opened[-1]

    yield open_window
    for one in opened:
        one.context.close()
    for one in opened:
        one.check()


@pytest.fixture
def page(visit, server):
    """A window on the shared server, at work."""
    return visit(server).live()
