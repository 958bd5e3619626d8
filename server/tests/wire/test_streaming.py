"""Streams: their deltas, their ends, and that nobody notices who else is served."""

import pytest
from client import LENGTH, STOP, Client, chat, refusal
from prompts import OPENINGS, request
from tidemill.v1 import tidemill_pb2 as pb

QUESTION = chat(("user", "What is a KV cache?"))


@pytest.mark.parametrize("number", range(len(OPENINGS)))
def test_deltas_join_to_the_text_of_all_tokens(wide, number):
    result = wide.client.run(OPENINGS[number], temperature=0.8, seed=number, max_tokens=40, ignore_eos=True)
    assert (len(result.ids), result.finish) == (40, LENGTH)
    assert result.text == wide.client.detokenize(result.ids)
    assert len(result.completions[0].deltas) > 1, "tokens are streamed as they come"


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes_are_valid_text_in_every_delta(wide, seed):
    # So hot that tokens are drawn nearly uniformly: halves of characters, bytes that are no UTF-8, special tokens. A
    # delta that is no UTF-8 would not even parse.
    result = wide.client.run("🦀", temperature=50, seed=seed, max_tokens=150, ignore_eos=True)
    assert result.text == wide.client.detokenize(result.ids)


def test_characters_of_several_tokens_come_whole(wide):
    ids = list(wide.client.tokenize("東京タワーと富士山").token_ids)
    assert len(ids) > 9, "the characters must be split for this test to mean anything"
    # A bias of 100 decides, so that the model can be made to say whatever is wanted, one token at a time.
    text, said = "", []
    for token in ids:
        result = wide.client.run([72, *said], logit_bias={token: 100}, temperature=0, max_tokens=1, ignore_eos=True)
        assert result.ids == [token]
        said.append(token)
        text = wide.client.detokenize(said)
        assert not text.replace("\N{REPLACEMENT CHARACTER}", "") or "東京タワーと富士山".startswith(
            text.rstrip("\N{REPLACEMENT CHARACTER}")
        )
    assert text == "東京タワーと富士山"


def test_an_answer_ends_with_its_stop_token_and_usage(wide):
    result = wide.client.run(QUESTION, temperature=0, max_tokens=200)
    prompt = wide.client.tokenize(QUESTION).token_ids
    assert result.finish == STOP
    assert result.ids[-1] in wide.client.model().eos_token_ids
    assert result.usage.prompt_tokens == len(prompt)
    assert result.usage.completion_tokens == len(result.ids)
    assert 0 <= result.usage.queue_seconds <= result.usage.time_to_first_token_seconds
    assert result.text == wide.client.detokenize(result.ids)


def test_the_server_names_requests_that_have_no_name(wide):
    first, second = (wide.client.run("a", max_tokens=1).request_id for _ in range(2))
    assert first and second and first != second
    assert wide.client.run("a", max_tokens=1, request_id="mine/1").request_id == "mine/1"


def test_every_answer_carries_the_id_in_its_headers(wide):
    stream = wide.client.start("a", max_tokens=1, request_id="traced")
    assert stream.result().request_id == "traced"
    assert dict(stream.call.initial_metadata())["x-request-id"] == "traced"
    error = refusal(lambda: wide.client.run("a", temperature=-1, request_id="traced too"))
    assert dict(error.trailing_metadata())["x-request-id"] == "traced too"


def test_text_chat_and_ids_are_three_ways_to_say_the_same(wide):
    options = dict(temperature=0, max_tokens=20)
    as_chat = wide.client.run(QUESTION, **options)
    as_ids = wide.client.run(list(wide.client.tokenize(QUESTION).token_ids), **options)
    text = "Once upon a time"
    as_text = wide.client.run(text, **options)
    as_text_ids = wide.client.run(list(wide.client.tokenize(text).token_ids), **options)
    assert as_chat.tokens == as_ids.tokens
    assert as_text.tokens == as_text_ids.tokens


def test_ids_only_leaves_the_text_out_and_changes_nothing_else(wide):
    options = dict(temperature=0.9, seed=3, max_tokens=20)
    ids_only = wide.client.run("The sea", output=pb.OutputOptions(token_ids_only=True), **options)
    assert ids_only.text == ""
    assert ids_only.ids == wide.client.run("The sea", **options).ids


def test_special_tokens_stand_in_the_text_when_asked_for(wide):
    ids = list(wide.client.tokenize("<|im_start|>").token_ids)
    assert len(ids) == 1, "a special token is one token"
    options = dict(logit_bias={ids[0]: 100}, temperature=0, max_tokens=3, ignore_eos=True)
    assert wide.client.run("a", **options).text == ""
    shown = wide.client.run("a", output=pb.OutputOptions(include_special_tokens=True), **options)
    assert shown.text == "<|im_start|>" * 3 == wide.client.detokenize(ids * 3, include_special_tokens=True)


def test_64_streams_at_once_equal_the_same_requests_alone(wide):
    alone = [wide.client.run(**request(number)).tokens for number in range(64)]
    streams = [wide.client.start(**request(number)) for number in range(64)]
    together = [stream.result().tokens for stream in streams]
    assert together == alone


def test_more_streams_than_rows_on_several_connections_equal_the_same_requests_alone(wide):
    numbers = [number % 24 for number in range(160)]
    alone = {number: wide.client.run(**request(number)).tokens for number in set(numbers)}
    clients = [Client(wide.address) for _ in range(4)]
    streams = [clients[i % 4].start(**request(number)) for i, number in enumerate(numbers)]
    assert [stream.result().tokens for stream in streams] == [alone[number] for number in numbers]
    for client in clients:
        client.close()


def test_steps_of_one_token_and_of_many_give_the_same(wide, narrow):
    for number in range(12):
        assert narrow.client.run(**request(number)).tokens == wide.client.run(**request(number)).tokens
    assert wide.canary == narrow.canary


def test_a_prompt_that_fills_the_context_leaves_room_for_one_token(wide):
    limit = wide.client.model().max_model_len
    result = wide.client.run([100] * (limit - 1), temperature=0, ignore_eos=True)
    assert (len(result.ids), result.finish) == (1, LENGTH)
