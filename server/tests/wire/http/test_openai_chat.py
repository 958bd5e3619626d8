"""Chat completions through OpenAI's own SDK: every documented field does what the documentation says."""

import math

import openai
import pytest
from front import ANSWER, ANSWER_TOKENS, MODEL, PROMPT_TOKENS, QUESTION, user
from openai.types.chat import ChatCompletion, ChatCompletionChunk

STORY = "Tell me a story about a fox and a lantern."
END = "<|im_end|>"  # It was generated too, and has its place among the tokens, though not in the text.
GREEDY = dict(model=MODEL, temperature=0, max_tokens=60)
# Long enough to show differences, whatever the model would like to say.
LONG = dict(model=MODEL, max_tokens=24, extra_body={"ignore_eos": True})


def ask(api, content=QUESTION, **options):
    """A completion."""
    return api.chat.completions.create(messages=user(content), **{**GREEDY, **options})


def text(completion, index=0):
    """What one choice says."""
    return completion.choices[index].message.content


def streamed(api, content=QUESTION, **options):
    """All chunks of a stream."""
    return list(ask(api, content, stream=True, **options))


def joined(stream, index=0):
    """The text of one choice of a stream."""
    return "".join(c.delta.content or "" for chunk in stream for c in chunk.choices if c.index == index)


def finish_reasons(stream):
    """Of a stream."""
    return [c.finish_reason for chunk in stream for c in chunk.choices if c.finish_reason]


def test_one_answer(api):
    answer = ask(api)
    assert isinstance(answer, ChatCompletion)
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    assert answer.id and answer.created > 1_700_000_000
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "stop", "assistant")
    assert choice.message.content == ANSWER
    assert not choice.message.tool_calls and choice.message.refusal is None and choice.logprobs is None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (PROMPT_TOKENS, ANSWER_TOKENS)
    assert usage.total_tokens == PROMPT_TOKENS + ANSWER_TOKENS


def test_a_stream(api):
    stream = streamed(api)
    assert all(isinstance(chunk, ChatCompletionChunk) and chunk.object == "chat.completion.chunk" for chunk in stream)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in stream}) == 1
    assert stream[0].choices[0].delta.role == "assistant"
    assert joined(stream) == ANSWER
    assert finish_reasons(stream) == ["stop"]
    assert all(chunk.usage is None for chunk in stream), "usage only when it was asked for"
    with_text = [chunk for chunk in stream if chunk.choices[0].delta.content]
    assert len(with_text) > ANSWER_TOKENS / 2, "text comes as it is generated"


def test_usage_at_the_end_of_a_stream(api):
    stream = streamed(api, stream_options={"include_usage": True})
    *chunks, last = stream
    assert last.choices == [] and all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (PROMPT_TOKENS, ANSWER_TOKENS)
    assert joined(stream) == ANSWER


def test_usage_in_every_chunk(api):
    stream = streamed(api, stream_options={"include_usage": True}, extra_body={"stream_options": {
        "include_usage": True, "continuous_usage_stats": True}})
    counts = [chunk.usage.completion_tokens for chunk in stream]
    assert counts == sorted(counts) and counts[-1] == ANSWER_TOKENS
    assert len(set(counts)) > ANSWER_TOKENS / 2, "each chunk says how many tokens there are so far"


def test_the_sdks_own_accumulator(api):
    with api.chat.completions.stream(messages=user(), **GREEDY) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert text(final) == ANSWER


def test_cached_tokens_are_told(api):
    content = "Tell me a story about a fox and a lantern. " * 4
    ask(api, content, max_tokens=2)
    again = ask(api, content, max_tokens=2)
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_conversations(api):
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        *user("What is prefill?"),
        {"role": "assistant", "content": "A step."},
        *user(),
    ]
    answer = api.chat.completions.create(messages=messages, **GREEDY)
    assert text(answer) == ANSWER
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a KV cache?"}]
    assert text(ask(api, parts)) == ANSWER, "parts of text are one text"
    developer = [{"role": "developer", "content": "You are a helpful assistant."}, *user()]
    system = [{"role": "system", "content": "You are a helpful assistant."}, *user()]
    answers = [api.chat.completions.create(messages=m, **GREEDY) for m in (developer, system)]
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens, "a developer speaks as the system does"


@pytest.mark.parametrize("n", [1, 3, 8])
def test_several_choices(api, n):
    several = dict(content=STORY, n=n, temperature=1, seed=5, max_tokens=30)
    answer = ask(api, **several)
    assert [choice.index for choice in answer.choices] == list(range(n))
    assert len({choice.message.content for choice in answer.choices}) >= min(n, 2), "they differ"
    stream = streamed(api, **several)
    for index in range(n):
        assert joined(stream, index) == text(answer, index)
    assert len(finish_reasons(stream)) == n


@pytest.mark.parametrize("stop", ["values", ["values"], ["no such text", "values of"], [" values"]], ids=str)
def test_stop(api, stop):
    before = ANSWER.split(max(stop, key=len) if len(stop) == 1 else "values" if isinstance(stop, str) else stop[-1])[0]
    answer = ask(api, stop=stop)
    assert (text(answer), answer.choices[0].finish_reason) == (before, "stop")
    stream = streamed(api, stop=stop)
    assert (joined(stream), finish_reasons(stream)) == (before, ["stop"])


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_length(api, name):
    answer = api.chat.completions.create(model=MODEL, temperature=0, messages=user(), **{name: 5})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5 and ANSWER.startswith(text(answer))
    assert finish_reasons(streamed(api, max_tokens=5)) == ["length"]


def test_logprobs(api):
    answer = ask(api, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == ANSWER_TOKENS
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == ANSWER + END
    assert "".join(entry.token for entry in entries) == ANSWER + END
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token, "greedy takes the most likely"
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True) and sum(map(math.exp, values)) <= 1.001
    stream = streamed(api, logprobs=True, top_logprobs=3)
    pieces = [c.logprobs.content for chunk in stream for c in chunk.choices if c.logprobs and c.logprobs.content]
    assert [entry.model_dump() for piece in pieces for entry in piece] == [entry.model_dump() for entry in entries]


def test_logprobs_without_top(api):
    entries = ask(api, logprobs=True).choices[0].logprobs.content
    assert len(entries) == ANSWER_TOKENS and all(entry.top_logprobs == [] for entry in entries)


def test_top_logprobs_want_logprobs(api):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, top_logprobs=3)
    assert caught.value.param == "top_logprobs"


def test_a_seed_repeats_and_another_differs(api):
    options = dict(temperature=1.5, **{k: v for k, v in LONG.items() if k != "model"})
    one, again, other = (text(ask(api, STORY, seed=seed, **options)) for seed in (7, 7, 8))
    assert one == again != other
    drawn = {text(ask(api, STORY, **options)) for _ in range(3)}
    assert len(drawn) > 1, "without a seed every answer is drawn anew"


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalties(api, penalty):
    plain = ask(api, STORY, max_tokens=90)
    punished = ask(api, STORY, max_tokens=90, **{penalty: 2})

    def distinct(answer):
        words = text(answer).split()
        return len(set(words)) / len(words)

    assert distinct(punished) > distinct(plain)


def test_logit_bias(api, front):
    (token,) = front.post("/tokenize", {"prompt": " treasure", "add_special_tokens": False}).json()["tokens"]
    assert "treasure" in text(ask(api, STORY, max_tokens=90))
    assert "treasure" not in text(ask(api, STORY, max_tokens=90, logit_bias={str(token): -100}))
    answer = ask(api, STORY, max_tokens=4, logit_bias={str(token): 100})
    assert text(answer) == " treasure" * 4


def test_fields_that_only_label_a_request(api):
    labels = dict(user="someone", metadata={"a": "b"}, store=False, service_tier="auto", safety_identifier="x")
    assert text(ask(api, **labels)) == ANSWER


def test_fields_of_the_future_are_ignored(api):
    assert text(ask(api, extra_body={"no_such_field": {"deep": [1]}, "another": None})) == ANSWER


def test_null_is_absent(api):
    nulls = dict.fromkeys(["stop", "seed", "logit_bias", "tools", "tool_choice", "response_format", "top_p", "n", "user"])
    assert text(ask(api, extra_body=nulls)) == ANSWER


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-1, 101, "warm")),
        *(("top_p", value) for value in (-0.1, 1.1)),
        *(("n", value) for value in (0, 9, -1, 1.5)),
        *(("max_tokens", value) for value in (0, -5, 5000, "many")),
        *(("presence_penalty", value) for value in (2.1, -2.1)),
        *(("frequency_penalty", value) for value in (2.1, -2.1)),
        *(("top_logprobs", value) for value in (-1, 21)),
        *(("stop", value) for value in ([""], [str(i) for i in range(17)], 5)),
        *(("logit_bias", value) for value in ({"1": 101}, {"99999": 1}, {"a": 1})),
        *(("modalities", value) for value in (["audio"],)),
        *(("response_format", value) for value in ({"type": "no such type"},)),
        *(("stream_options", value) for value in ({"include_usage": True},)),
    ],
    ids=lambda value: str(value)[:24],
)
def test_values_that_cannot_be_served_are_refused_by_name(api, field, value):
    extra = {"logprobs": True} if field == "top_logprobs" else {}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, extra_body={field: value, **extra})
    error = caught.value
    assert error.type == "invalid_request_error"
    assert error.param and error.param.split(".")[0] == field, error.body
    assert error.message


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"content": "a"}],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}],
        "a",
    ],
    ids=lambda value: str(value)[:48],
)
def test_messages_that_make_no_sense(api, messages):
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(messages=messages, **GREEDY)
    assert caught.value.param and caught.value.param.startswith("messages"), caught.value.body


def test_a_prompt_longer_than_the_context(api):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, "tide " * 2000)
    assert "1024" in caught.value.message, "says what would fit"
