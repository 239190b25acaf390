"""Text from text: stops, reasons, log-probabilities, and pieces that join to the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax import InputError
from lora_jax.models import SamplingParams, generate, generate_text, load_pretrained, stream_text
from lora_jax.models._text import before_stop

PROMPTS = ["one two", "seven", "Say hello."]


@pytest.fixture(scope="module")
def base(base_dir):
    return load_pretrained(base_dir)


@pytest.fixture(scope="module")
def write(base):
    def run(prompts=PROMPTS, **options):
        options = {"max_new_tokens": 24, **options}
        return generate_text(base.module, base.params, base.tokenizer, prompts, **options)

    return run


@pytest.fixture(scope="module")
def free(write):
    """What is written where nothing stops it."""
    return write(stop_ids=[])


def test_text_is_that_of_the_tokens(base, free):
    ids = [base.tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = generate(base.module, base.params, ids, max_new_tokens=24)
    assert [list(answer.tokens) for answer in free] == expected
    for answer in free:
        assert answer.text == base.tokenizer.decode(answer.tokens)
        assert (answer.finish_reason, answer.logprobs) == ("length", None)


def test_a_stop_string_is_cut_off_wherever_it_begins(base, write, free):
    for at in (3, 9):
        # From within one token to within another.
        stop = free[0].text[at : at + 4]
        found = write(stop=[stop, "never said"], stop_ids=[])
        assert found[0].text == free[0].text[: free[0].text.find(stop)]
        assert found[0].finish_reason == "stop"
        count = len(found[0].tokens)
        assert found[0].tokens == free[0].tokens[:count]
        assert stop in base.tokenizer.decode(found[0].tokens)
        assert stop not in base.tokenizer.decode(found[0].tokens[:-1])
        for answer, whole in zip(found[1:], free[1:], strict=True):
            if stop not in whole.text:
                assert answer == whole


def test_what_only_began_like_a_stop_string_is_written(write, free):
    stop = free[0].text[-2:] + "!"
    assert write(PROMPTS[:1], stop=stop, stop_ids=[]) == free[:1]


def test_a_stop_id_has_no_text(write, free):
    token = free[1].tokens[6]
    [answer] = write(PROMPTS[1:2], stop_ids=[token])
    count = free[1].tokens.index(token) + 1
    assert answer.tokens == free[1].tokens[:count] and answer.finish_reason == "stop"
    assert free[1].text.startswith(answer.text) and len(answer.text) < len(free[1].text)


def test_each_row_has_its_own_length(write, free):
    found = write(max_new_tokens=[1, 5, 24], stop_ids=[])
    assert [len(answer.tokens) for answer in found] == [1, 5, 24]
    for answer, whole in zip(found, free, strict=True):
        assert whole.text.startswith(answer.text.rstrip("\N{REPLACEMENT CHARACTER}"))


@pytest.mark.parametrize("cut", [None, slice(5, 8)])
def test_pieces_join_to_the_text(base, write, free, cut):
    options = dict(max_new_tokens=24, stop=[free[0].text[cut]] if cut else [], stop_ids=[])
    answer = stream_text(base.module, base.params, base.tokenizer, PROMPTS[0], **options)
    pieces = [next(answer)]
    assert answer.completion.finish_reason is None and len(answer.completion.tokens) < 24
    pieces += answer
    assert "".join(pieces) == answer.completion.text and all(pieces)
    assert answer.completion == write(PROMPTS[:1], **options)[0]


def test_logprobs_are_the_models_own(base, write):
    sampling = SamplingParams(temperature=2.0, top_k=5, presence_penalty=1.0, seed=3)
    options = dict(sampling=sampling, max_new_tokens=6, stop_ids=[])
    [answer] = write(PROMPTS[:1], logprobs=4, **options)
    assert answer.tokens == write(PROMPTS[:1], **options)[0].tokens
    prompt = base.tokenizer.encode(PROMPTS[0])
    ids = jnp.asarray([[*prompt, *answer.tokens]])
    logits = jax.jit(base.module.apply)({"params": base.params}, ids)[0, len(prompt) - 1 : -1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    for token, told, row in zip(answer.tokens, answer.logprobs, expected, strict=True):
        assert told.token == token and told.logprob == pytest.approx(row[token], abs=1e-5)
        best = np.argsort(-row)[:4]
        assert [i for i, _ in told.top] == best.tolist()
        np.testing.assert_allclose([p for _, p in told.top], row[best], rtol=0, atol=1e-5)


def test_one_text_or_several_or_none(write, free):
    assert write("seven", stop_ids=[]) == free[1:2]
    assert write([]) == []


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(stop=["a", ""]), "a stop string is empty"),
        (dict(logprobs=21), "logprobs must be from 0 to 20, got 21"),
        (dict(max_new_tokens=[1, 2]), "max_new_tokens has 2 values for 3 prompts"),
        (dict(sampling=SamplingParams(temperature=1.0)), "needs a key or a seed"),
    ],
    ids=str,
)
def test_bad_arguments(write, options, message):
    with pytest.raises(InputError, match=message):
        write(**options)


@given(
    pieces=st.lists(st.text("abc", max_size=3), max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stops_are_found_however_the_text_comes(pieces, stops):
    shown, held, stopped = "", "", False
    for piece in pieces:
        new, held, stopped = before_stop(held + piece, stops)
        shown += new
        if stopped:
            break
    whole = "".join(pieces)
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    # Letter by letter, the first stop string to be complete ends the text.
    assert stopped == bool(ends)
    assert shown + held == (whole[: min(ends)[1]] if ends else whole)
    assert not any(stop in shown for stop in stops)
