"""Who may come in: every route with and without the key, other origins, and the shapes of the refusals."""

import pytest
import requests
from front import MODEL, Front, user
from server_process import API_KEY

# What must not need a key: probes of orchestrators, and the page's own files, which hold nothing of anybody's.
OPEN = {"/health", "/ready", "/"}
PAGE = (".css", ".js")
METHODS = {"get", "post", "put", "patch", "delete"}
# Routes of the interface that must be in the document, so that a walk over the document is a walk over all of them.
EXPECTED = {
    ("post", "/v1/chat/completions"),
    ("post", "/v1/completions"),
    ("post", "/v1/embeddings"),
    ("post", "/v1/rerank"),
    ("post", "/v2/rerank"),
    ("post", "/rerank"),
    ("post", "/v1/score"),
    ("post", "/score"),
    ("post", "/v1/responses"),
    ("get", "/v1/responses/{id}"),
    ("delete", "/v1/responses/{id}"),
    ("post", "/v1/responses/{id}/cancel"),
    ("get", "/v1/responses/{id}/input_items"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{id}"),
    ("post", "/v1/load_lora_adapter"),
    ("post", "/v1/unload_lora_adapter"),
    ("post", "/v1/messages"),
    ("post", "/v1/messages/count_tokens"),
    ("post", "/predict"),
    ("post", "/production/predict"),
    ("post", "/environments/{env}/sync/v1/chat/completions"),
    ("post", "/tokenize"),
    ("post", "/detokenize"),
    ("post", "/abort"),
    ("get", "/health"),
    ("get", "/ready"),
    ("get", "/metrics"),
    ("get", "/openapi.json"),
    ("get", "/live"),
    ("get", "/"),
}
RIGHT = {
    "Bearer": {"Authorization": f"Bearer {API_KEY}"},
    "Api-Key": {"Authorization": f"Api-Key {API_KEY}"},
    "x-api-key": {"x-api-key": API_KEY},
}
WRONG = {
    "none": {},
    "empty": {"Authorization": ""},
    "Bearer without a key": {"Authorization": "Bearer "},
    "another": {"Authorization": "Bearer another"},
    "a beginning": {"Authorization": f"Bearer {API_KEY[:-1]}"},
    "more": {"Authorization": f"Bearer {API_KEY}x"},
    "no scheme": {"Authorization": API_KEY},
    "another scheme": {"Authorization": f"Basic {API_KEY}"},
    "another header": {"Cookie": API_KEY},
    "long": {"x-api-key": "x" * 8000},
    "empty x-api-key": {"x-api-key": ""},
}


def routes_of(front):
    """(method, path) of every route in the document."""
    paths = front.get("/openapi.json").json()["paths"]
    return [(method, path) for path, item in paths.items() for method in item if method in METHODS]


def concrete(path):
    """A path with its parameters filled in."""
    return "/".join("x" if part.startswith("{") else part for part in path.split("/"))


def is_open(path):
    """Whether a route is served to everybody."""
    return path in OPEN or path.endswith(PAGE)


def call(front, method, path, headers, **options):
    """Any route, with these headers and no others. Of a stream without end, the beginning is enough."""
    body = {"json": {}} if method in ("post", "put", "patch") else {}
    with requests.request(
        method, front.url + concrete(path), headers=headers, timeout=10, stream=True, **{**body, **options}
    ) as answer:
        if "event-stream" not in answer.headers.get("content-type", ""):
            answer.content  # noqa: B018  (reads it)
    return answer


def message_of(path, answer):
    """What a refusal says, which must have the shape of the route's family."""
    body, bare = answer.json(), path.split("/sync")[-1]
    if bare.startswith("/v1/messages"):
        assert body["type"] == "error" and body["error"].keys() >= {"type", "message"} and "request_id" in body
        return body["error"]["message"]
    if bare.startswith("/v1/"):
        assert body["error"].keys() == {"message", "type", "param", "code"}, body
        return body["error"]["message"]
    assert isinstance(body["error"], str), body
    return body["error"]


def test_the_document_has_every_route(front):
    routes = routes_of(front)
    assert set(routes) >= EXPECTED, EXPECTED - set(routes)


@pytest.mark.parametrize("wrong", WRONG)
def test_closed_without_the_key(keyed_front, wrong):
    for method, path in routes_of(keyed_front):
        answer = call(keyed_front, method, path, WRONG[wrong])
        if is_open(path):
            assert answer.status_code == 200, (path, answer.status_code)
            continue
        assert answer.status_code == 401, (method, path, answer.status_code)
        assert message_of(path, answer) and API_KEY not in answer.text
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize("right", RIGHT)
def test_open_with_the_key_in_any_of_its_forms(keyed_front, right):
    for method, path in routes_of(keyed_front):
        answer = call(keyed_front, method, path, RIGHT[right])
        assert answer.status_code not in (401, 403) and answer.status_code < 500, (method, path)


def test_one_wrong_key_beside_the_right_one_does_not_open_or_is_ignored(keyed_front):
    """Two credentials that disagree: whatever the verdict, it is the same every time, and no wrong key alone opens."""
    both = {**RIGHT["Bearer"], "x-api-key": "wrong"}
    verdicts = {call(keyed_front, "get", "/v1/models", both).status_code for _ in range(5)}
    assert len(verdicts) == 1 and verdicts <= {200, 401}


def test_who_has_no_key_cannot_learn_what_there_is(keyed_front):
    for path in ("/no/such/route", "/v1/nothing", "/v1/chat/completions/", "//v1/models", "/v1/models/../models"):
        assert call(keyed_front, "get", path, {}).status_code == 401, path
    for method in ("get", "delete", "put"):
        assert call(keyed_front, method, "/v1/chat/completions", {}).status_code == 401


def test_the_key_is_asked_for_before_the_body(keyed_front):
    """A stranger's body is neither awaited nor parsed."""
    with keyed_front.wire() as wire:
        wire.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
        assert wire.reply().status == 401


def test_the_key_is_in_no_log_and_no_metric(keyed, keyed_front):
    assert keyed_front.chat()
    keyed_front.get("/v1/models", headers={"x-api-key": API_KEY})
    assert API_KEY not in keyed.stderr() and API_KEY not in keyed_front.get("/metrics").text


def test_a_key_in_the_query_opens_nothing(keyed_front):
    for name in ("api_key", "key", "access_token"):
        assert call(keyed_front, "get", f"/v1/models?{name}={API_KEY}", {}).status_code == 401


UNKNOWN = [
    ("get", "/no/such/route", 404),
    ("get", "/v1/no/such/route", 404),
    ("get", "/v1/messages/no/such", 404),
    ("post", "/environments/a/sync/v1/nothing", 404),
    ("get", "/v1/chat/completions", 405),
    ("delete", "/v1/models", 405),
    ("get", "/v1/messages", 405),
    ("get", "/predict", 405),
    ("put", "/tokenize", 405),
    ("post", "/health", 405),
]


@pytest.mark.parametrize(("method", "path", "status"), UNKNOWN)
def test_unknown_routes_and_methods_have_the_familys_shape(front, method, path, status):
    answer = call(front, method, path, {})
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("application/json")
    assert message_of(path, answer)
    assert answer.headers["x-request-id"]
    if status == 405:
        assert answer.headers["allow"]


def test_other_origins_are_not_told_that_they_may(front):
    headers = {"Origin": "http://elsewhere.example"}
    for method, path in [("get", "/v1/models"), ("get", "/health"), ("post", "/v1/chat/completions")]:
        answer = call(front, method, path, headers)
        assert not any(name.lower().startswith("access-control-") for name in answer.headers), path
    preflight = requests.options(
        f"{front.url}/v1/chat/completions",
        headers={**headers, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"},
        timeout=10,
    )
    assert not any(name.lower().startswith("access-control-") for name in preflight.headers)
    assert preflight.status_code in (404, 405), "nor is there anything to ask"


def test_named_origins_are(start_server):
    server = start_server("--allowed-origins", "http://friend.example", "--api-key", API_KEY, api_key=API_KEY)
    front = Front(server.url, API_KEY)
    preflight = requests.options(
        f"{front.url}/v1/chat/completions",
        headers={
            "Origin": "http://friend.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        },
        timeout=10,
    )
    assert preflight.status_code in (200, 204), "a preflight carries no key"
    assert preflight.headers["access-control-allow-origin"] == "http://friend.example"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    allowed = preflight.headers["access-control-allow-headers"].lower()
    assert "authorization" in allowed and "content-type" in allowed
    answer = front.get("/v1/models", headers={"Origin": "http://friend.example"})
    assert answer.headers["access-control-allow-origin"] == "http://friend.example"
    refused = requests.get(f"{front.url}/v1/models", headers={"Origin": "http://friend.example"}, timeout=10)
    assert refused.status_code == 401
    other = front.get("/v1/models", headers={"Origin": "http://elsewhere.example"})
    assert "access-control-allow-origin" not in other.headers
    body = {"model": MODEL, "messages": user(), "max_tokens": 2}
    assert front.post("/v1/chat/completions", body, headers={"Origin": "http://friend.example"}).status_code == 200


def test_an_origin_is_taken_whole(start_server):
    server = start_server("--allowed-origins", "http://friend.example")
    front = Front(server.url)
    for origin in ("http://friend.example.evil", "https://friend.example", "http://a.friend.example", "null"):
        answer = front.get("/v1/models", headers={"Origin": origin})
        assert "access-control-allow-origin" not in answer.headers, origin


def test_pages_of_other_names_are_refused(front):
    """A name that an attacker's resolver points at the loopback address must not reach the engine from a browser."""
    answer = front.get("/v1/models", headers={"Origin": "http://attacker.example:8000", "Host": "attacker.example:8000"})
    assert "access-control-allow-origin" not in answer.headers


def test_replies_cannot_be_taken_for_pages(front):
    answer = front.get("/v1/models")
    assert answer.headers["content-type"].startswith("application/json")
    shown = front.post("/detokenize", {"tokens": [1, 2, 3]})
    assert shown.headers["content-type"].startswith("application/json")
