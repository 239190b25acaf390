"""lm-evaluation-harness over our model: its numbers are those computed directly, in few shapes."""

import dataclasses
import importlib
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from lora_jax import InputError, LoraConfig, combine, init_adapter
from lora_jax.cli import main
from lora_jax.evaluate import (
    TextModel,
    flexible_number,
    harness_model,
    run_harness,
    strict_number,
)
from lora_jax.transform import lora_linen

pytest.importorskip("lm_eval")

CONTEXTS = ["one two", "three four five six seven", "", "eight ", "nine " * 40, "ten"]
CHOICES = [" one", " two three", "four"]

ANSWERS = [
    ("9 * 2 = 18\n#### 18", "18"),
    ("#### 1,000", "1000"),
    ("#### $1,000", "1000"),
    ("#### 18.", "18"),
    ("#### 3.0", "3"),
    ("#### -7", "-7"),
    ("She makes $18.", "18"),
    ("It is 18 ...", "18"),
    ("It is 18.50 dollars", "18.5"),
    ("#### 5 or #### 6", "6"),
    ("no idea", "5"),
]


@dataclasses.dataclass
class Request:
    args: tuple


@pytest.fixture(scope="module")
def lm(text_model):
    return harness_model(text_model, batch_size=4, max_gen_toks=8)


@pytest.fixture(scope="module")
def log_p(pretrained):
    """log-softmax of every next token, computed with nothing of ours but the module."""

    @jax.jit
    def run(params, ids):
        return jax.nn.log_softmax(pretrained.module.apply({"params": params}, ids), axis=-1)

    def of(ids, params=pretrained.params):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(run(params, padded))[0, : len(ids)]

    return of


def test_loglikelihoods_are_those_of_log_softmax(lm, text_model, log_p):
    requests = [Request((context, choice)) for context in CONTEXTS for choice in CHOICES]
    tokenizer = text_model.tokenizer
    for request, (total, greedy) in zip(requests, lm.loglikelihood(requests), strict=True):
        context, choice = request.args
        whole = tokenizer.encode(context + choice)
        before = len(tokenizer.encode(context.rstrip()))
        if not context:
            whole, before = [tokenizer.bos_id, *whole], 1
        ids = whole[-129:]  # cut from the left: 128 positions, and the token they predict
        scores = log_p(ids[:-1])[len(ids) - 1 - (len(whole) - before) :]
        targets = ids[len(ids) - (len(whole) - before) :]
        assert total == pytest.approx(scores[np.arange(len(targets)), targets].sum(), abs=1e-4)
        assert greedy == (scores.argmax(-1).tolist() == targets)


def test_what_is_likeliest_is_greedy(lm, text_model, log_p):
    """Its own first token continues a context greedily, and no other does."""
    ids = text_model.tokenizer.encode("one two")
    likeliest = int(log_p(ids)[-1].argmax())
    scores = lm._loglikelihood_tokens([(None, ids, [token]) for token in (likeliest, 5)])
    assert [greedy for _, greedy in scores] == [True, likeliest == 5]


def test_whole_texts_in_windows(lm, text_model, log_p):
    """Each token counts once, from up to 128 tokens before it."""
    tokenizer = text_model.tokenizer
    for text in ("one two three", "one two " * 60, ""):
        ids = tokenizer.encode(text)
        windows = [([tokenizer.bos_id, *ids][: min(128, len(ids))], ids[:128])]
        if len(ids) > 128:
            rest = ids[128:256]
            end = 128 + len(rest)
            windows.append((ids[end - 129 : end - 1], rest))
            assert len(ids) <= 256
        expected = sum(
            log_p(inputs)[-len(targets) :][np.arange(len(targets)), targets].sum()
            for inputs, targets in windows
            if targets
        )
        assert lm.loglikelihood_rolling([Request((text,))]) == [pytest.approx(expected, abs=1e-3)]


def test_generates_until(lm, text_model, log_p):
    """Greedily, in the order asked for, cut at stops; contexts give way to new tokens."""
    options = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    requests = [Request((context, options)) for context in CONTEXTS]
    texts = lm.generate_until(requests)
    tokenizer = text_model.tokenizer
    for context, text in zip(CONTEXTS, texts, strict=True):
        ids, new = (tokenizer.encode(context) or [tokenizer.bos_id])[-122:], []
        while len(new) < 6 and tokenizer.eos_id not in new:
            new.append(int(log_p([*ids, *new])[-1].argmax()))
        assert text == tokenizer.decode(new).partition("\n\n")[0]
    stop = next(c for text in texts for c in text[1:] if c.isascii())
    cut = lm.generate_until([Request((c, {**options, "until": [stop]})) for c in CONTEXTS])
    assert cut == [text.partition(stop)[0] for text in texts]


def test_few_programs_for_many_lengths(pretrained):
    fresh = TextModel.of(pretrained, chunk=32)
    lm = harness_model(fresh, batch_size=4)
    rng = np.random.default_rng(0)
    pairs = [(None, [3] * int(n), [4] * int(m)) for n, m in rng.integers(1, 60, size=(40, 2))]
    lm._loglikelihood_tokens(pairs)
    lm._loglikelihood_tokens(pairs[:20])
    assert fresh.scorer.program._cache_size() <= 4  # 16, 32, 64 and 128


def test_an_adapter_is_part_of_the_model(pretrained, log_p):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapter = init_adapter(jax.random.key(0), pretrained.params, config, layouts=pretrained.layouts)
    params = combine(pretrained.params, adapter)
    ids = pretrained.tokenizer.encode("one two three")
    logits = lora_linen(pretrained.module).apply({"params": params}, jnp.array([ids]))
    expected = jax.nn.log_softmax(logits[0, -2])[ids[-1]]
    lm = harness_model(TextModel.of(pretrained, params))
    [(total, _)] = lm._loglikelihood_tokens([(None, ids[:-1], ids[-1:])])
    assert total == pytest.approx(float(expected), abs=1e-5)
    assert abs(total - log_p(ids[:-1])[-1][ids[-1]]) > 1e-3


@pytest.fixture
def tasks(tmp_path):
    """A task of choices, one of numbers and one of perplexity, over rows beside them."""
    rows = [
        {"question": f"one {i}", "choices": [" two", " three"], "label": i % 2, "text": "four " * i}
        for i in range(1, 6)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = (
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        "test_split: test\n"
    )
    (tmp_path / "choose.yaml").write_text(
        f"task: choose_word\n{dataset}output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        'target_delimiter: ""\nmetric_list: [{metric: acc}]\n'
    )
    (tmp_path / "write.yaml").write_text(
        f"task: write_word\n{dataset}output_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[0]}}"\n'
        'generation_kwargs: {until: ["."], max_gen_toks: 4}\n'
        "metric_list: [{metric: exact_match}]\n"
    )
    (tmp_path / "read.yaml").write_text(
        f"task: read_text\n{dataset}output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: word_perplexity}]\n'
    )
    return tmp_path, rows


def test_tasks_of_ones_own(lm, text_model, log_p, tasks):
    directory, rows = tasks
    names = ["choose_word", "write_word", "read_text"]
    found = run_harness(lm, names, directory=directory)
    assert list(found) == names
    tokenizer, right = text_model.tokenizer, []
    for row in rows:
        ids = tokenizer.encode(row["question"])
        totals = []
        for choice in row["choices"]:
            whole = tokenizer.encode(row["question"] + choice)
            scores = log_p(whole[:-1])[len(ids) - 1 :]
            totals.append(scores[np.arange(len(whole) - len(ids)), whole[len(ids) :]].sum())
        right.append(int(np.argmax(totals)) == row["label"])
    assert found["choose_word"]["acc,none"] == pytest.approx(np.mean(right))
    error = np.std(right, ddof=1) / np.sqrt(len(right))
    assert found["choose_word"]["acc_stderr,none"] == pytest.approx(error)
    texts = [lm.generate_until([Request((r["question"], {"until": ["."], "max_gen_toks": 4}))])
             for r in rows]  # fmt: skip
    exact = np.mean([text == row["choices"][0] for [text], row in zip(texts, rows, strict=True)])
    assert found["write_word"]["exact_match,none"] == pytest.approx(exact)
    nats = -sum(lm.loglikelihood_rolling([Request((row["text"],)) for row in rows]))
    words = sum(len(row["text"].split(" ")) for row in rows)
    assert found["read_text"]["word_perplexity,none"] == pytest.approx(
        np.exp(nats / words), rel=0.2
    )
    limited = run_harness(lm, ["choose_word"], directory=directory, limit=2)
    assert limited["choose_word"]["sample_len"] == 2


def test_chats_are_laid_out_by_the_tokenizer(text_model):
    """A model's template, with the BOS that it writes itself; an answer may be begun."""
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = dataclasses.replace(text_model.tokenizer, chat_template=template, add_bos=True)
    lm = harness_model(dataclasses.replace(text_model, tokenizer=tokenizer))
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    assert lm.apply_chat_template(turns[:1]) == "<s>[user]one[assistant]"
    assert lm.apply_chat_template(turns, False) == "<s>[user]one[assistant]two"
    assert lm.tok_encode("<s>[user]one").count(tokenizer.bos_id) == 1
    assert lm.tok_encode("one")[0] == tokenizer.bos_id
    assert lm.tok_encode("one", add_special_tokens=False) == tokenizer.encode("one")
    assert lm.chat_template(True) == template


def test_the_command_runs_them(base_dir, tasks, capsys):
    directory, _ = tasks
    words = ["evaluate", "--model", str(base_dir), "--harness", "write_word", "--limit", "1"]
    main([*words, "--include-path", str(directory), "--json"])
    assert json.loads(capsys.readouterr().out)["write_word"]["sample_len"] == 1


def test_what_the_task_gsm8k_finds_right_is_right():
    """By its own filters and its own exact_match; numbers that only look different are equal."""
    folder = Path(importlib.import_module("lm_eval.tasks").__file__).parent / "gsm8k"
    task = yaml.safe_load((folder / "gsm8k.yaml").read_text("utf-8"))
    metric = task["metric_list"][0]
    options = {k: metric[k] for k in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    exact_match = importlib.import_module("lm_eval.api.metrics").exact_match_hf_evaluate
    regex = importlib.import_module("lm_eval.filters.extraction").RegexFilter
    readers, only_ours = (strict_number, flexible_number), []
    for (answer, gold), (listed, read) in itertools.product(
        ANSWERS, zip(task["filter_list"], readers, strict=True)
    ):
        given = {k: v for k, v in listed["filter"][0].items() if k != "function"}
        [[found]] = regex(**given).apply([[answer]], [{}])
        theirs = exact_match([found], [f"so\n#### {gold}"], **options)["exact_match"] == 1
        ours = read(answer) == strict_number(f"#### {gold}")
        assert ours or not theirs, (answer, found)
        only_ours += [(answer, listed["name"])] if ours and not theirs else []
    assert only_ours == [
        ("#### $1,000", "strict-match"),
        ("#### 3.0", "strict-match"),
        ("#### 3.0", "flexible-extract"),
        ("It is 18 ...", "flexible-extract"),
        ("It is 18.50 dollars", "flexible-extract"),
    ]


def test_what_cannot_run_is_refused(lm, text_model, tasks):
    directory, _ = tasks
    (directory / "rows.jsonl").unlink()
    with pytest.raises(InputError, match=r"cannot load the task 'choose_word' \(FileNotFound"):
        run_harness(lm, ["choose_word"], directory=directory)
    for options, message in (
        ({"max_gen_toks": 128}, "128 new tokens .* leave no room"),
        ({"num_beams": 4}, "generates with num_beams 4, unsupported"),
    ):
        with pytest.raises(InputError, match=message):
            lm.generate_until([Request(("one", options))])
    with pytest.raises(InputError, match="a continuation of 129 tokens is longer"):
        lm._loglikelihood_tokens([(None, [1], [2] * 129)])
    with pytest.raises(InputError, match="limit must be at least 1, got 0"):
        run_harness(lm, ["choose_word"], directory=directory, limit=0)
    with pytest.raises(InputError, match="no directory of tasks"):
        run_harness(lm, ["choose_word"], directory=directory / "none")
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "one"}])
    nameless = dataclasses.replace(text_model.tokenizer, bos_id=None, eos_id=None)
    with pytest.raises(InputError, match="neither bos_token nor eos_token"):
        harness_model(dataclasses.replace(text_model, tokenizer=nameless))
