"""The OpenAPI document against the server: schemathesis sends what the document allows, and what it does not.

Examples are drawn from a fixed seed and bounded in number, so that every run asks the same.
"""

import hypothesis
import jsonschema
import pytest
import schemathesis
from front import ANSWER, user
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

EXAMPLES = 10
ENDLESS = {"/live"}  # A stream without an end gives no reply to check.
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SETTINGS = hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.fixture
def document(front):
    """As schemathesis reads it."""
    return schemathesis.openapi.from_url(f"{front.url}/openapi.json")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "not allowed"])
def test_every_operation(front, document, mode, subtests):
    seen = 0
    for found in document.get_all_operations():
        operation = found.ok()
        seen += 1
        if operation.path in ENDLESS:
            continue
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # Any path is some path: without a body there is nothing to get wrong.

        @SETTINGS
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def ask(case):
            case.call_and_validate(session=front.session, checks=CHECKS, timeout=30)

        with subtests.test(operation.label):
            ask()
    assert seen >= 20
    assert front.chat()["choices"][0]["message"]["content"] == ANSWER


def test_every_schema_is_one(front):
    document = front.get("/openapi.json").json()
    found = [
        media["schema"]
        for item in document["paths"].values()
        for operation in item.values()
        for part in (operation.get("requestBody", {}), *operation["responses"].values())
        for media in part.get("content", {}).values()
        if "schema" in media
    ]
    assert len(found) >= 20
    for schema in found:
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_operation_says_what_it_is_and_how_it_fails(front):
    document = front.get("/openapi.json").json()
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method == "parameters":
                continue
            assert operation["summary"], (method, path)
            assert any(status.startswith("2") for status in operation["responses"]), (method, path)
            if "requestBody" in operation:
                assert {"400", "413", "415", "429", "503"} <= set(operation["responses"]), (method, path)


def test_the_key_is_in_the_document(keyed_front):
    document = keyed_front.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]
    for path in ("/v1/chat/completions", "/predict", "/metrics"):
        (operation,) = document["paths"][path].values()
        assert operation.get("security", document.get("security")), path
    assert "security" not in document and "security" not in document["paths"]["/health"]["get"]


ODD = [None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**64, 1e308, "", "a", "\u0000", "x" * 300, [], [None], [[]], ["a"],
       [-1], [{}], {}, {"a": None}, {"type": "a"}, {"": {}}]
GOOD = {
    "/v1/chat/completions": {"messages": user(), "max_tokens": 1},
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/embeddings": {"input": "a"},
    "/v1/responses": {"input": "a", "max_output_tokens": 16, "store": False},
    "/v1/messages": {"messages": user(), "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": user()},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "a"},
    "/predict": {"prompt": "a", "max_new_tokens": 1},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/abort": {"request_id": "a"},
}


@pytest.mark.parametrize("path", GOOD)
def test_every_field_with_values_of_every_kind(front, path):
    """What a field does not take is refused by name or served as if it were absent; the server's own fault it never is."""
    document = front.get("/openapi.json").json()
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    refused = 0
    for field in schema["properties"]:
        for value in ODD:
            answer = front.post(path, {**GOOD[path], field: value})
            assert answer.status_code in (200, 400, 404), (field, value, answer.status_code, answer.text)
            if answer.status_code == 400:
                refused += 1
                error = answer.json()["error"]
                assert (error if isinstance(error, str) else error["message"]), (field, value)
    assert refused > 5
    assert front.chat()["choices"][0]["message"]["content"] == ANSWER
