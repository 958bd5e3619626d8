"""Log-probabilities: they are probabilities, and they are of the model's own logits."""

import math

import pytest

PROMPT = "The tide comes in and the tide goes"


def check_entry(entry, top):
    """What holds for one position, whatever the model."""
    assert len(entry.top) == top
    assert entry.logprob <= 1e-6 and entry.rank >= 1
    values = [t.logprob for t in entry.top]
    assert values == sorted(values, reverse=True)
    assert sum(math.exp(value) for value in values) <= 1 + 1e-4
    assert len({t.token_id for t in entry.top}) == top
    listed = {t.token_id: t.logprob for t in entry.top}
    if entry.rank <= top:
        assert listed[entry.token_id] == entry.logprob
    elif top:
        assert entry.token_id not in listed and entry.logprob <= values[-1]


@pytest.mark.parametrize("top", [0, 1, 5, 20])
@pytest.mark.parametrize("sampling", [dict(temperature=0), dict(temperature=1.5, seed=1)], ids=["greedy", "random"])
def test_every_token_has_its_entry(wide, top, sampling):
    result = wide.client.run(PROMPT, logprobs=top, max_tokens=20, ignore_eos=True, **sampling)
    assert [entry.token_id for entry in result.logprobs] == result.ids
    for entry in result.logprobs:
        check_entry(entry, top)
        if sampling["temperature"] == 0:
            assert entry.rank == 1
            assert not top or entry.top[0].token_id == entry.token_id


def test_asking_changes_no_token_and_not_asking_gives_none(wide):
    options = dict(prompt=PROMPT, temperature=1.1, seed=7, max_tokens=20, prompt_logprobs=None)
    with_them, without = wide.client.run(**options, logprobs=3), wide.client.run(**options)
    assert with_them.tokens == without.tokens
    assert not without.logprobs and not without.prompt_logprobs


def test_they_are_of_the_raw_logits(wide):
    def first(**sampling):
        return wide.client.run(PROMPT, logprobs=5, max_tokens=1, ignore_eos=True, **sampling).logprobs[0].top

    raw = first(temperature=0)
    assert first(temperature=2, seed=1) == raw
    assert first(temperature=0, logit_bias={9: 100}) == raw
    assert first(temperature=1, seed=1, top_k=2, repetition_penalty=1.5) == raw


@pytest.mark.parametrize("top", [0, 4])
def test_prompt_logprobs_one_entry_per_prompt_token(wide, top):
    ids = list(wide.client.tokenize(PROMPT).token_ids)
    result = wide.client.run(ids, prompt_logprobs=top, temperature=0, max_tokens=4, ignore_eos=True)
    entries = result.prompt_logprobs
    assert len(entries) == len(ids)
    assert not entries[0].top and entries[0].logprob == 0, "nothing precedes the first token"
    assert [entry.token_id for entry in entries[1:]] == ids[1:]
    for entry in entries[1:]:
        check_entry(entry, top)


def test_prompt_logprobs_say_the_same_as_generation_did(wide):
    ids = list(wide.client.tokenize(PROMPT).token_ids)
    generated = wide.client.run(ids, logprobs=3, temperature=0, max_tokens=12, ignore_eos=True)
    again = wide.client.run([*ids, *generated.ids], prompt_logprobs=3, temperature=0, max_tokens=1)
    assert list(again.prompt_logprobs)[len(ids) :] == generated.logprobs, "one at a time or all at once"


def test_prompt_logprobs_of_a_prompt_read_in_chunks(wide, narrow):
    options = dict(prompt=[60 + i * 7 % 150 for i in range(90)], prompt_logprobs=2, temperature=0, max_tokens=2)
    assert narrow.client.run(**options).prompt_logprobs == wide.client.run(**options).prompt_logprobs


def test_prompt_logprobs_come_once_for_several_completions(wide):
    result = wide.client.run(PROMPT, prompt_logprobs=1, logprobs=1, n=3, seed=1, max_tokens=5, ignore_eos=True)
    assert len(result.prompt_logprobs) == result.usage.prompt_tokens
    for completion in result.completions:
        assert [entry.token_id for entry in completion.logprobs] == completion.ids


def test_a_prompt_of_one_token_has_one_empty_entry(wide):
    result = wide.client.run([72], prompt_logprobs=1, temperature=0, max_tokens=1)
    assert len(result.prompt_logprobs) == 1 and not result.prompt_logprobs[0].top
