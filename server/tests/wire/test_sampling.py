"""Sampling options, each by what it must change and what it must leave alone."""

import pytest
from client import LENGTH, STOP, chat

QUESTION = chat(("user", "What is a KV cache?"))
WILD = dict(prompt="The tide", temperature=1.5, max_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_the_same_seed_gives_the_same_tokens(wide, seed):
    first, second = (wide.client.run(**WILD, seed=seed).tokens for _ in range(2))
    assert first == second


def test_other_seeds_and_no_seed_give_other_tokens(wide):
    runs = [wide.client.run(**WILD, seed=seed).ids for seed in (0, 1, 2**32, 2**63)]
    runs += [wide.client.run(**WILD).ids for _ in range(2)]
    assert len({tuple(ids) for ids in runs}) == len(runs)


def test_greedy_needs_no_seed_and_equals_top_k_1(wide):
    options = dict(prompt="The tide", max_tokens=24, ignore_eos=True)
    greedy = wide.client.run(**options, temperature=0)
    assert greedy.tokens == wide.client.run(**options, temperature=0, seed=9).tokens
    assert greedy.tokens == wide.client.run(**options, temperature=3, top_k=1).tokens
    assert greedy.tokens == wide.client.run(**options, temperature=3, top_p=1e-6).tokens
    assert greedy.tokens == wide.client.run(**options, temperature=3, min_p=1).tokens


def test_three_completions_of_one_prompt(wide):
    result = wide.client.run(**WILD, seed=5, n=3)
    assert len({tuple(c.ids) for c in result.completions}) == 3
    assert result.completions[0].ids == wide.client.run(**WILD, seed=5).ids, "the first has the client's own seed"
    assert wide.client.run(**WILD, seed=5, n=3).tokens == result.tokens
    for completion in result.completions:
        assert completion.finish == LENGTH
        assert completion.usage.completion_tokens == 24
        assert completion.text == wide.client.detokenize(completion.ids)


def test_eight_completions_that_end_at_different_times(narrow, wide):
    options = dict(prompt=QUESTION, temperature=1, seed=1, n=8, max_tokens=30)
    result = wide.client.run(**options)
    assert narrow.client.run(**options).tokens == result.tokens, "one row or many"


def test_completions_share_the_prompt_but_not_their_tokens(cramped):
    prompt = [50 + i % 100 for i in range(101)]
    options = dict(prompt=prompt, temperature=1.5, seed=4, max_tokens=40, ignore_eos=True)
    result = cramped.client.run(**options, n=4)
    assert result.completions[0].ids == cramped.client.run(**options).ids


@pytest.mark.parametrize("token", [0, 77, 2047])
def test_a_bias_of_100_decides_and_of_minus_100_forbids(wide, token):
    always = wide.client.run("The", logit_bias={token: 100}, temperature=0, max_tokens=4, ignore_eos=True)
    assert always.ids == [token] * 4
    free = wide.client.run("The", temperature=0, max_tokens=1, ignore_eos=True)
    barred = wide.client.run("The", logit_bias={free.ids[0]: -100}, temperature=0, max_tokens=1, ignore_eos=True)
    assert barred.ids != free.ids


def test_penalties_change_repetitive_text(wide):
    options = dict(prompt="la la la la la la la la", temperature=0, max_tokens=40, ignore_eos=True)
    plain = wide.client.run(**options).ids
    for penalty in (dict(repetition_penalty=1.8), dict(presence_penalty=2), dict(frequency_penalty=2)):
        punished = wide.client.run(**options, **penalty).ids
        assert len(set(punished)) > len(set(plain)), penalty


def test_neutral_values_change_nothing(wide):
    neutral = dict(top_k=0, top_p=1, min_p=0, repetition_penalty=1, presence_penalty=0, frequency_penalty=0, n=1)
    assert wide.client.run(**WILD, seed=8, **neutral).tokens == wide.client.run(**WILD, seed=8, top_p=1).tokens


def test_absent_fields_take_the_models_defaults(wide):
    """The built-in model's generation_config.json cuts the tail of the distribution off."""
    defaults = wide.client.model().default_sampling
    assert 0 < defaults.top_p < 1
    absent = wide.client.run(**WILD, seed=8).tokens
    assert wide.client.run(**WILD, seed=8, top_p=defaults.top_p).tokens == absent
    assert wide.client.run(**WILD, seed=8, top_p=1).tokens != absent


def test_top_k_beyond_the_vocabulary_keeps_all(wide):
    assert wide.client.run(**WILD, seed=8, top_k=2**32 - 1).tokens == wide.client.run(**WILD, seed=8).tokens


def test_ignore_eos_goes_on_to_max_tokens(wide):
    stopped = wide.client.run(QUESTION, temperature=0, max_tokens=120)
    assert stopped.finish == STOP and len(stopped.ids) < 120
    went_on = wide.client.run(QUESTION, temperature=0, max_tokens=120, ignore_eos=True)
    assert (went_on.finish, len(went_on.ids)) == (LENGTH, 120)
    assert went_on.ids[: len(stopped.ids)] == stopped.ids


def test_min_tokens_holds_the_end_back(wide):
    eos = wide.client.model().eos_token_ids
    early = len(wide.client.run(QUESTION, temperature=0, max_tokens=200).ids)
    held = wide.client.run(QUESTION, temperature=0, max_tokens=200, min_tokens=early + 5)
    assert len(held.ids) >= early + 5
    assert not set(held.ids[: early + 4]) & set(eos), "an end-of-sequence token was chosen too early"


def test_stop_tokens_end_a_completion_and_their_text_is_left_out(wide):
    options = dict(prompt="Once upon a time", temperature=0, max_tokens=40, ignore_eos=True)
    whole = wide.client.run(**options)
    at = next(i for i in range(3, 40) if whole.ids[i] not in whole.ids[:i])
    token = whole.ids[at]
    stopped = wide.client.run(**options, stop_token_ids=[token, 2047])
    assert (stopped.finish, stopped.matched_stop) == (STOP, token)
    assert stopped.ids == whole.ids[: at + 1], "the id is reported"
    assert stopped.text == wide.client.detokenize(whole.ids[:at])
    held = wide.client.run(**options, stop_token_ids=[token], min_tokens=at + 2)
    assert len(held.ids) >= at + 2


def test_no_max_tokens_means_what_the_context_holds(wide):
    limit = wide.client.model().max_model_len
    prompt = [72] * (limit - 30)
    assert len(wide.client.run(prompt, temperature=0, ignore_eos=True).ids) == 30
