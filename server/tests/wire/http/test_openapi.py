"""The OpenAPI document against the server: schemathesis sends what the document allows, and what it does not.

Examples are drawn from a fixed seed and bounded in number, so that every run asks the same.
"""

import hypothesis
import jsonschema
import pytest
import schemathesis
from front import ANSWER
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
