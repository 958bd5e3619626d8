"""Stop strings: found wherever token edges fall, never delivered, not even in part."""

import pytest
from client import LENGTH, STOP

STORY = dict(prompt="Once upon a time", temperature=0, max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def story(wide):
    """The same completion without stop strings."""
    return wide.client.run(**STORY)


def crossing(story, width):
    """A piece of the story's text that lies across an edge between two tokens and occurs nowhere before it."""
    position = 0
    for text, _ in story.completions[0].deltas:
        position += len(text)
        piece = story.text[position - width : position + width]
        if position > 20 and len(piece) == 2 * width and story.text.find(piece) == position - width:
            return piece
    raise AssertionError("the story repeats itself")


@pytest.mark.parametrize("width", [1, 2, 6, 12])
def test_a_stop_string_across_token_edges_ends_the_text_before_it(wide, story, width):
    stop = crossing(story, width)
    result = wide.client.run(**STORY, stop=[stop])
    assert (result.finish, result.matched_stop) == (STOP, stop)
    assert result.text == story.text[: story.text.index(stop)]
    assert result.ids == story.ids[: len(result.ids)]
    assert stop in wide.client.detokenize(result.ids), "the ids reach to the token that completed it"
    assert stop not in wide.client.detokenize(result.ids[:-1])


def test_the_first_of_several_stop_strings_wins(wide, story):
    later, first = crossing(story, 6), story.text[3:6]
    result = wide.client.run(**STORY, stop=[later, "never said", first])
    assert result.matched_stop == first
    assert result.text == story.text[: story.text.index(first)]


def test_sixteen_stop_strings_that_never_come_take_nothing_away(wide, story):
    stops = [story.text[10:14] + f"#{i}" for i in range(16)]
    result = wide.client.run(**STORY, stop=stops)
    assert (result.text, result.finish, result.matched_stop) == (story.text, LENGTH, None)


def test_a_beginning_that_is_held_back_is_given_out_at_the_end(wide, story):
    stop = story.text[-3:] + "\x00 not this"
    result = wide.client.run(**STORY, stop=[stop])
    assert (result.text, result.finish) == (story.text, LENGTH)


def test_a_stop_string_counts_only_after_min_tokens(wide, story):
    stop = story.text[3:6]
    result = wide.client.run(**STORY, stop=[stop], min_tokens=40)
    assert len(result.ids) >= 40


def test_a_stop_string_ends_one_completion_and_not_its_sisters(wide):
    options = dict(prompt="Once upon a time", temperature=1.2, seed=6, n=3, max_tokens=60, ignore_eos=True)
    free = wide.client.run(**options)
    stop = next(
        piece
        for i in range(5, len(free.text) - 8)
        if (piece := free.text[i : i + 8]) and all(piece not in c.text for c in free.completions[1:])
    )
    stopped = wide.client.run(**options, stop=[stop])
    assert stopped.completions[0].matched_stop == stop
    assert stopped.completions[0].text == free.text[: free.text.index(stop)]
    assert stopped.tokens[1:] == free.tokens[1:]


def test_a_stop_string_of_many_bytes_per_character(wide):
    ids = list(wide.client.tokenize("東").token_ids)
    assert len(ids) > 1, "the character must be split for this test to mean anything"
    # Drawn from the character's own bytes alone, so that the character comes up sooner or later.
    bias = {token: 100 for token in ids}
    options = dict(prompt="東", logit_bias=bias, temperature=5, seed=2, max_tokens=200, ignore_eos=True)
    free = wide.client.run(**options)
    assert "東" in free.text
    stopped = wide.client.run(**options, stop=["東"])
    assert (stopped.finish, stopped.matched_stop) == (STOP, "東")
    assert stopped.text == free.text[: free.text.index("東")]
