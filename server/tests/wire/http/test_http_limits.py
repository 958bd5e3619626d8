"""Bytes that no SDK would send: answered, or their connection is closed, and everybody else is served on."""

import contextlib
import json
import time
from concurrent import futures

import pytest
from front import ANSWER, MODEL, Front, request_bytes, user

CHAT = "/v1/chat/completions"
GOOD = {"model": MODEL, "messages": user(), "temperature": 0, "max_tokens": 2}
GOOD_BYTES = json.dumps(GOOD).encode()

NO_JSON = {
    "nothing": b"",
    "noise": bytes(range(256)),
    "cut short": GOOD_BYTES[:-5],
    "more behind it": GOOD_BYTES + b"x",
    "two": GOOD_BYTES * 2,
    "a list": b"[]",
    "null": b"null",
    "a number": b"17",
    "a text": b'"a"',
    "deep lists": b"[" * 100_000,
    "deep lists, closed": b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep where nobody looks": b'{"unknown":' + b"[" * 500 + b"]" * 500 + b"," + GOOD_BYTES[1:],
    "no UTF-8": GOOD_BYTES.replace(b"KV", b"\xff\xfe"),
    "overlong UTF-8": GOOD_BYTES.replace(b"KV", b"\xc0\xaf"),
    "surrogate in UTF-8": GOOD_BYTES.replace(b"KV", b"\xed\xa0\x80"),
    "lone surrogate": GOOD_BYTES.replace(b"KV", b"\\ud800"),
    "UTF-16": GOOD_BYTES.decode().encode("utf-16"),
    "NaN": GOOD_BYTES.replace(b'"temperature": 0', b'"temperature": NaN'),
    "Infinity": GOOD_BYTES.replace(b'"temperature": 0', b'"temperature": Infinity'),
    "1e999": GOOD_BYTES.replace(b'"temperature": 0', b'"temperature": 1e999'),
    "a number of a thousand digits": GOOD_BYTES.replace(b'"max_tokens": 2', b'"max_tokens": ' + b"9" * 1000),
    "minus": GOOD_BYTES.replace(b'"max_tokens": 2', b'"max_tokens": -2'),
    "hexadecimal": GOOD_BYTES.replace(b'"max_tokens": 2', b'"max_tokens": 0x2'),
    "comments": b"/* a */" + GOOD_BYTES,
    "trailing comma": GOOD_BYTES[:-1] + b",}",
    "single quotes": GOOD_BYTES.replace(b'"', b"'"),
    "control characters": GOOD_BYTES.replace(b"KV", b"\x00\x01"),
    "form": b"model=a&messages=b",
}

# Fields that a tokenizer does not ask for, so that it does not look at them either.
OTHERS_FIELDS = {"deep where nobody looks", "1e999", "a number of a thousand digits", "minus"}


def raw_post(front, path, body, **headers):
    """POST of bytes as JSON."""
    headers = {"Content-Type": "application/json", **headers}
    return front.session.post(front.url + path, data=body, headers=headers, timeout=20)


@pytest.mark.parametrize("kind", NO_JSON)
def test_bodies_that_are_no_request(front, kind):
    for path in (CHAT, "/v1/messages", "/v1/responses", "/v1/embeddings", "/v1/rerank", "/v1/score", "/predict", "/tokenize", "/abort"):
        answer = raw_post(front, path, NO_JSON[kind])
        if path == "/tokenize" and kind in OTHERS_FIELDS:
            assert answer.status_code in (200, 400)
            continue
        assert answer.status_code == 400, (path, answer.status_code, answer.text[:300])
        assert answer.json()["error"], "in words"
    assert front.chat()["choices"][0]["message"]["content"] == ANSWER, "a canary of the same connection"


def test_keys_twice(front):
    """Whatever is made of it, it is not an error of the server."""
    answer = raw_post(front, CHAT, GOOD_BYTES[:-1] + b', "max_tokens": 3}')
    assert answer.status_code in (200, 400)


def test_a_byte_order_mark(front):
    assert raw_post(front, CHAT, b"\xef\xbb\xbf" + GOOD_BYTES).status_code in (200, 400)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"])
def test_other_types_are_refused(front, kind):
    """A page of another origin can send these without asking first."""
    answer = raw_post(front, CHAT, GOOD_BYTES, **{"Content-Type": kind})
    assert answer.status_code == 415 and answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON"])
def test_types_that_are_json(front, kind):
    assert raw_post(front, CHAT, GOOD_BYTES, **{"Content-Type": kind}).status_code == 200


def test_a_body_over_the_limit(front):
    for path in (CHAT, "/v1/messages", "/predict", "/tokenize"):
        answer = front.post(path, {**GOOD, "messages": user("a" * (5 << 20))})
        assert answer.status_code == 413, (path, answer.status_code)
        assert answer.json()["error"]
    with front.wire() as wire:
        wire.send(request_bytes("POST", CHAT, b"", "Content-Length: 99999999999", "Content-Type: application/json"))
        assert wire.reply().status == 413, "refused by what it says, before it comes"


def test_a_body_over_the_limit_that_does_not_say_so(front):
    def pieces():
        for _ in range(100):
            yield b"a" * (1 << 16)

    answer = front.session.post(
        front.url + CHAT, data=pieces(), headers={"Content-Type": "application/json"}, timeout=20
    )
    assert answer.status_code == 413


def test_the_limit_is_an_option(start_server):
    front = Front(start_server("--max-body-bytes", "1000").url)
    assert front.chat(max_tokens=1)
    assert front.post(CHAT, {**GOOD, "user": "a" * 1000}).status_code == 413


def test_headers_over_the_limit(front):
    for headers in ({"x-large": "x" * 20_000}, {f"x-{number}": "x" * 500 for number in range(60)}):
        answer = front.get("/health", headers=headers)
        assert answer.status_code == 431, answer.status_code
        front.session.close()
    assert front.get("/v1/models?" + "a" * 40_000).status_code in (414, 431)
    assert front.get("/health").status_code == 200


def test_many_headers(front):
    answer = front.get("/health", headers={f"x-{number}": "1" for number in range(90)})
    assert answer.status_code in (200, 431)


SMUGGLED = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"
BAD_HEADS = {
    "length and chunks": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "two lengths": b"Content-Length: 2\r\nContent-Length: 40\r\n\r\n{}" + SMUGGLED,
    "list of lengths": b"Content-Length: 2, 40\r\n\r\n{}" + SMUGGLED,
    "a length with a sign": b"Content-Length: +2\r\n\r\n{}" + SMUGGLED,
    "a negative length": b"Content-Length: -1\r\n\r\n",
    "a length in hexadecimal": b"Content-Length: 0x2\r\n\r\n{}" + SMUGGLED,
    "an encoding of no meaning": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked, but not last": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "a blank before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "a folded line": b"X-A: b\r\n Transfer-Encoding: chunked\r\n\r\n" + SMUGGLED,
    "a bare carriage return": b"X-A: b\rTransfer-Encoding: chunked\r\n\r\n" + SMUGGLED,
    "a zero byte": b"X-A: b\x00c\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("kind", BAD_HEADS)
def test_no_request_is_smuggled_behind_another(front, kind):
    """What two servers could read differently is refused, and nothing behind it on the connection is served."""
    with front.wire() as wire:
        head = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        wire.send(head + BAD_HEADS[kind]).half_close()
        said = wire.read_to_end()
    assert b"vllm:num_requests_running" not in said, said[:600]
    assert b" 200 OK" not in said.split(b"\r\n")[0]


BAD_CHUNKS = {
    "no number": b"xyz\r\n",
    "an enormous number": b"ffffffffffffffffff\r\n",
    "a negative number": b"-1\r\n",
    "no line end behind the data": b"2\r\n{}X",
    "an endless extension": b"2;" + b"a" * 100_000,
}


@pytest.mark.parametrize("kind", BAD_CHUNKS)
def test_chunks_that_lie(front, kind):
    with front.wire() as wire:
        head = "POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        wire.send(head.encode() + BAD_CHUNKS[kind]).half_close()
        said = wire.read_to_end()
    assert not said or b" 4" in said.split(b"\r\n")[0]


NO_HTTP = {
    "nothing": b"",
    "noise": bytes(range(256)) * 16,
    "TLS": bytes.fromhex("16030100a1010000") + bytes(160),
    "half a line": b"GET /heal",
    "a version of no meaning": b"GET /health HTTP/9.9\r\nHost: a\r\n\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "a path of no meaning": b"GET \x00\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
    "above the root": b"GET /../../etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n",
    "above the root, in code": b"GET /page/%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n",
    "another host's": b"GET http://elsewhere.example/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "CONNECT": b"CONNECT elsewhere.example:443 HTTP/1.1\r\nHost: a\r\n\r\n",
    "TRACE": b"TRACE /health HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP/2 and noise": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096,
}


@pytest.mark.parametrize("kind", NO_HTTP)
def test_connections_that_speak_something_else(front, kind):
    with front.wire() as wire:
        wire.send(NO_HTTP[kind]).half_close()
        said = wire.read_to_end()
    assert b"root:" not in said and b" 500 " not in said.split(b"\r\n")[0]
    assert front.get("/health").status_code == 200


def test_http_1_0_is_answered_and_closed(front):
    with front.wire() as wire:
        wire.send(b"GET /health HTTP/1.0\r\n\r\n")
        assert b" 200 " in wire.read_to_end().split(b"\r\n")[0]


def test_requests_in_one_breath_are_answered_in_order(front):
    with front.wire() as wire:
        bodies = [json.dumps({"prompt": text, "add_special_tokens": False}).encode() for text in ("a", "a b", "a b c d")]
        wire.send(b"".join(request_bytes("POST", "/tokenize", body) for body in bodies))
        counts = [wire.reply().json()["count"] for _ in bodies]
    assert counts == sorted(counts) and len(set(counts)) == 3


def test_expect_100_continue(front):
    with front.wire() as wire:
        head = request_bytes("POST", CHAT, b"", "Expect: 100-continue", f"Content-Length: {len(GOOD_BYTES)}",
                             "Content-Type: application/json")
        wire.send(head)
        assert wire.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        wire.send(GOOD_BYTES)
        assert wire.reply().status == 200


def test_a_refused_request_is_not_asked_to_continue(keyed_front):
    with keyed_front.wire() as wire:
        wire.send(request_bytes("POST", CHAT, b"", "Expect: 100-continue", "Content-Length: 1000"))
        assert wire.reply().status == 401


def seconds_until_closed(wire, drip, seconds):
    """How long the server waits for a client that sends `drip` once a second; what it says at last stays in `wire.rest`."""
    start = time.monotonic()
    wire.socket.settimeout(1)
    while time.monotonic() - start < seconds:
        try:
            if not wire.read_some():
                return time.monotonic() - start
        except TimeoutError:
            with contextlib.suppress(OSError):
                wire.send(drip)
    raise AssertionError(f"still open after {seconds} s")


def test_requests_that_never_end_are_closed(front):
    """A byte a second keeps a connection alive; a head and a body as a whole have limits too."""
    with front.wire() as head, front.wire() as body, front.wire() as chunks:
        head.send(b"GET /health HTTP/1.1\r\nHost: a\r\n")
        body.send(request_bytes("POST", CHAT, b"", "Content-Type: application/json", "Content-Length: 1000") + b"{")
        chunks.send(request_bytes("POST", CHAT, b"", "Content-Type: application/json", "Transfer-Encoding: chunked"))
        waits = [(head, b"X", 25), (body, b" ", 45), (chunks, b"1\r\n \r\n", 45)]
        with futures.ThreadPoolExecutor() as pool:
            for waited in [pool.submit(seconds_until_closed, *wait) for wait in waits]:
                assert waited.result() > 5
        for slow in (body, chunks):
            assert slow.rest.startswith(b"HTTP/1.1 408 "), slow.rest[:200]


def test_many_connections_that_say_nothing(front):
    wires = [front.wire() for _ in range(200)]
    try:
        for wire in wires:
            wire.__enter__()
        assert front.chat()["choices"][0]["message"]["content"] == ANSWER
    finally:
        for wire in wires:
            wire.__exit__(None, None, None)
