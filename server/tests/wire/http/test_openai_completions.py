"""Plain completions and models through OpenAI's SDK."""

import openai
import pytest
from front import MODEL
from fronts import front_of

PROMPT = "Once upon a time"
GREEDY = dict(model=MODEL, temperature=0, max_tokens=12)


def complete(api, prompt=PROMPT, **options):
    """A completion."""
    return api.completions.create(prompt=prompt, **{**GREEDY, **options})


def joined(stream, index=0):
    """The text of one choice of a stream."""
    return "".join(c.text for chunk in stream for c in chunk.choices if c.index == index)


def test_one_answer(api, wide):
    answer = complete(api)
    (choice,) = answer.choices
    expected = wide.client.run(PROMPT, temperature=0, max_tokens=12)
    assert (choice.text, choice.index, choice.finish_reason, choice.logprobs) == (expected.text, 0, "length", None)
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.usage.prompt_tokens, 12)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_stream(api):
    whole = complete(api).choices[0].text
    stream = list(complete(api, stream=True, stream_options={"include_usage": True}))
    assert joined(stream) == whole and len(stream) > 6
    assert [c.finish_reason for chunk in stream for c in chunk.choices if c.finish_reason] == ["length"]
    assert stream[-1].choices == [] and stream[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in stream[:-1])
    assert len({chunk.id for chunk in stream}) == 1


def test_sixteen_tokens_unless_said_otherwise(api):
    """As in OpenAI's documentation."""
    answer = api.completions.create(model=MODEL, prompt=PROMPT, temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


def test_token_ids(api, front):
    ids = front.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    assert complete(api, ids).choices[0].text == complete(api).choices[0].text
    assert complete(api, ids).usage.prompt_tokens == len(ids)


def test_lists_of_prompts(api, front):
    prompts = [PROMPT, "The tide", "A KV cache"]
    ids = [front.post("/tokenize", {"prompt": prompt}).json()["tokens"] for prompt in prompts]
    alone = [complete(api, prompt) for prompt in prompts]
    texts = [answer.choices[0].text for answer in alone]
    for several in (prompts, ids):
        answer = complete(api, several)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [choice.text for choice in answer.choices] == texts
        assert answer.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in alone)
        assert answer.usage.completion_tokens == 36
        stream = list(complete(api, several, stream=True))
        assert [joined(stream, index) for index in range(3)] == texts


def test_several_choices_of_several_prompts(api):
    options = dict(n=2, temperature=1, seed=3)
    answer = complete(api, [PROMPT, "The tide"], **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [c.text for c in answer.choices[:2]] == [c.text for c in complete(api, PROMPT, **options).choices]
    stream = list(complete(api, [PROMPT, "The tide"], stream=True, **options))
    assert [joined(stream, index) for index in range(4)] == [choice.text for choice in answer.choices]


def test_what_was_cached_counts_for_each_prompt(api):
    prompts = [text * 12 for text in ("The tide comes in. ", "The mill turns. ")]
    single = [complete(api, prompt).usage for prompt in prompts]
    cached = [complete(api, prompt).usage.prompt_tokens_details.cached_tokens for prompt in prompts]
    assert all(cached)
    for options in ({}, {"n": 2, "seed": 1}):
        usage = complete(api, prompts, **options).usage
        assert usage.prompt_tokens == sum(one.prompt_tokens for one in single)
        assert usage.prompt_tokens_details.cached_tokens == sum(cached)


def test_long_answers_to_several_prompts_are_read_side_by_side(start_server):
    # Whoever waits for its turn to be read would be parked, and given up after a second.
    options = ("--max-stream-buffer", "16", "--slow-reader-timeout", "1", "--threads", "1", "--max-num-seqs", "2")
    answer = front_of(start_server(*options)).openai().completions.create(
        prompt=[PROMPT] * 4, model=MODEL, temperature=0, max_tokens=900, extra_body={"ignore_eos": True}
    )
    assert [c.finish_reason for c in answer.choices] == ["length"] * 4


def test_echo(api):
    plain, echoed = complete(api), complete(api, echo=True)
    assert echoed.choices[0].text == PROMPT + plain.choices[0].text
    assert echoed.usage.completion_tokens == 12
    assert joined(complete(api, echo=True, stream=True)) == echoed.choices[0].text


def test_logprobs(api):
    answer = complete(api, logprobs=2)
    said = answer.choices[0].logprobs
    assert len(said.tokens) == len(said.token_logprobs) == len(said.top_logprobs) == len(said.text_offset) == 12
    assert "".join(said.tokens) == answer.choices[0].text
    assert said.text_offset[0] == 0
    for token, offset in zip(said.tokens, said.text_offset, strict=True):
        assert answer.choices[0].text[offset : offset + len(token)] == token
    for token, value, top in zip(said.tokens, said.token_logprobs, said.top_logprobs, strict=True):
        assert max(top, key=top.get) == token and top[token] == value <= 0
    stream = list(complete(api, logprobs=2, stream=True))
    pieces = [c.logprobs for chunk in stream for c in chunk.choices if c.logprobs]
    assert [t for piece in pieces for t in piece.tokens] == said.tokens
    assert [v for piece in pieces for v in piece.token_logprobs] == said.token_logprobs
    assert [o for piece in pieces for o in piece.text_offset] == said.text_offset


def test_zero_logprobs(api):
    said = complete(api, logprobs=0).choices[0].logprobs
    assert len(said.token_logprobs) == 12


def test_echo_with_logprobs_scores_the_prompt(api):
    answer = complete(api, echo=True, logprobs=1)
    said, prompt = answer.choices[0].logprobs, answer.usage.prompt_tokens
    assert len(said.tokens) == prompt + 12
    assert said.token_logprobs[0] is None and all(value <= 0 for value in said.token_logprobs[1:])
    assert "".join(said.tokens) == answer.choices[0].text
    fresh = complete(api, logprobs=1).choices[0].logprobs
    assert said.token_logprobs[prompt:] == fresh.token_logprobs


def test_echo_alone_scores_without_generating(api):
    """What evaluation harnesses send: echo with max_tokens 0."""
    try:
        answer = complete(api, echo=True, logprobs=1, max_tokens=0)
    except openai.BadRequestError as error:
        assert error.param == "max_tokens"
    else:
        assert answer.choices[0].text == PROMPT and answer.usage.completion_tokens == 0


def test_stop(api):
    whole = complete(api, max_tokens=30).choices[0].text
    assert "kitchen" in whole
    answer = complete(api, max_tokens=30, stop=["kitchen"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole.split("kitchen")[0], "stop")


def test_suffix_is_refused(api):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(api, suffix=" the end.")
    assert caught.value.param == "suffix" and "suffix" in caught.value.message


def test_best_of(api):
    assert complete(api, best_of=1).choices
    with pytest.raises(openai.BadRequestError) as caught:
        complete(api, best_of=3)
    assert caught.value.param == "best_of"


@pytest.mark.parametrize(
    "prompt",
    ["", [], [[]], [""], [5000], [[1], [5000]], [-1], [1.5], ["a", 1], {"a": 1}, 5, "tide " * 2000, ["a"] * 5000],
    ids=lambda prompt: str(prompt)[:20],
)
def test_prompts_that_are_none(api, prompt):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(api, prompt)
    assert caught.value.param and caught.value.param.startswith("prompt"), caught.value.body


@pytest.mark.parametrize(
    ("field", "value"), [("logprobs", 21), ("logprobs", -1), ("n", 0), ("temperature", -1), ("max_tokens", -1)]
)
def test_values_that_cannot_be_served(api, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(api, extra_body={field: value})
    assert caught.value.param == field


def test_models(api):
    (model,) = api.models.list().data
    assert (model.id, model.object) == (MODEL, "model") and model.created and model.owned_by
    assert model.max_model_len == 1024
    assert api.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        api.models.retrieve("no-such-model")
    assert "no-such-model" in caught.value.message


def test_another_model_is_not_found(api):
    for call in (
        lambda: api.completions.create(model="no-such-model", prompt="a"),
        lambda: api.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "a"}]),
        lambda: api.embeddings.create(model="no-such-model", input="a"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "model_not_found" and MODEL in caught.value.message
