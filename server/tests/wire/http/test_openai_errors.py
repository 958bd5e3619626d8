"""The SDK's error classes, each from the reply that stands for it."""

import openai
import pytest
from front import MODEL, user
from server_process import API_KEY
from stages import occupied

SHORT = dict(model=MODEL, messages=user(), max_tokens=2)


def test_bad_request(api):
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(**{**SHORT, "temperature": -1})
    error = caught.value
    assert (error.status_code, error.type, error.param) == (400, "invalid_request_error", "temperature")
    assert error.request_id == error.response.headers["x-request-id"]
    assert error.body.keys() == {"message", "type", "param", "code"}


def test_not_found(api):
    with pytest.raises(openai.NotFoundError) as caught:
        api.chat.completions.create(**{**SHORT, "model": "no-such-model"})
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("key", ["wrong", API_KEY[:-1], API_KEY + "x"])
def test_authentication(keyed_front, key):
    with keyed_front.openai(api_key=key) as stranger, pytest.raises(openai.AuthenticationError) as caught:
        stranger.chat.completions.create(**SHORT)
    assert caught.value.code == "invalid_api_key" and API_KEY not in str(caught.value)


def test_the_right_key(keyed_front):
    with keyed_front.openai() as client:
        assert client.chat.completions.create(**SHORT).choices


def test_rate_limit(narrow_front, narrow):
    with occupied(narrow), narrow_front.openai() as client:
        waiting = [narrow.client.start("The tide", max_tokens=2) for _ in range(4)]
        narrow.wait_for_stats(lambda stats: stats.num_requests_waiting == 4, "the queue is full")
        for options in ({}, {"stream": True}):
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(**SHORT, **options)
            assert 0 < int(caught.value.response.headers["retry-after"]) <= 60
        for stream in waiting:
            stream.cancel()


def test_the_sdk_tries_again_by_itself(narrow_front, narrow):
    """429 with Retry-After is for clients that can wait: this one gets its answer without a word."""
    with narrow_front.openai(max_retries=5) as client:
        with occupied(narrow) as running:
            waiting = [narrow.client.start("The tide", max_tokens=2) for _ in range(4)]
            narrow.wait_for_stats(lambda stats: stats.num_requests_waiting == 4, "the queue is full")
            with pytest.raises(openai.RateLimitError):
                client.with_options(max_retries=0).chat.completions.create(**SHORT)
            narrow.client.abort(running.request_id)
        assert client.chat.completions.create(**SHORT).choices
        assert all(stream.result().finish for stream in waiting)


def test_a_timeout_of_the_client_frees_everything(narrow_front, narrow):
    aborted = narrow.client.stats().requests_aborted_total
    with narrow_front.openai(timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model=MODEL, messages=user(), max_tokens=990, extra_body={"ignore_eos": True})
    narrow.wait_for_stats(lambda stats: stats.requests_aborted_total == aborted + 1, "it is aborted")
    narrow.wait_until_idle()
