"""Our models in EleutherAI's lm-evaluation-harness, which is imported nowhere else."""

import contextlib
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from .._errors import InputError, first_line
from ..data import Message, choose_template, prompt_text
from ._model import TextModel, continue_texts

DRAWS = 1000
"""Bootstraps of a standard error that has no formula: exact to 2 % of itself."""

SAMPLING = ("temperature", "top_k", "top_p")
_NEUTRAL = {"do_sample": None, "num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}
"""Options that tasks spell out at values which change nothing (`do_sample` is in `temperature`)."""


class HarnessMethods:
    """The methods of the harness's `TemplateLM` over a `TextModel`; `harness_model` joins both.

    Every context is cut from the left where model or room for an answer is too short for it.
    """

    cache_hook: Any

    def __init__(
        self, model: TextModel, *, batch_size: int = 8, max_gen_toks: int = 256, seed: int = 0
    ) -> None:
        super().__init__()
        bos, eos = model.tokenizer.bos_id, model.tokenizer.eos_id
        prefix = eos if bos is None else bos
        if prefix is None:
            raise InputError(
                "evaluate: the tokenizer names neither bos_token nor eos_token, so a text has"
                " nothing to begin with; set one in tokenizer_config.json"
            )
        self._prefix = prefix
        self.model, self.tokenizer, self.batch_size = model, model.tokenizer, batch_size
        self.max_length, self.max_gen_toks, self.seed = model.scorer.max_length, max_gen_toks, seed

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is predicted from: BOS, else EOS."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells its caches of prompts apart."""
        return ",".join(str(file.parent) for file in self.tokenizer.files[:1])

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text, with the BOS that a model wants unless it is told not to."""
        ids = self.tokenizer.encode(string)
        return ids if add_special_tokens is False else self.tokenizer.with_bos(ids)

    def tok_decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens)

    def apply_chat_template(
        self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation in the tokenizer's template, up to where its next answer begins.

        Without `add_generation_prompt` the last turn is an answer already begun.
        """
        turns = [Message(turn["role"], turn["content"]) for turn in chat_history]
        begun = "" if add_generation_prompt else turns.pop().content
        template = choose_template("tokenizer", None, self.tokenizer)
        return prompt_text(turns, template, self.tokenizer) + begun

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations, given as (texts, context ids, continuation ids)."""
        sequences = []
        for _texts, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"evaluate: a continuation of {len(continuation)} tokens is longer than the"
                    f" model's {self.max_length} positions; leave the task out"
                )
            ids = (context + continuation)[-(self.max_length + 1) :]
            sequences.append((ids, [i >= len(ids) - len(continuation) for i in range(len(ids))]))
        model = self.model
        scores = model.scorer.score(model.params, sequences, batch_size=self.batch_size)
        found = [(score.log_likelihood, score.greedy) for score in scores]
        for (texts, _context, _continuation), pair in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, pair)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in the harness's own windows of `max_length`."""
        utils = _harness("utils")
        windows, owners = [], []
        for owner, request in enumerate(requests):
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts up to their stops, those with equal options together."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        for chosen in groups.values():
            options = self._options(requests[chosen[0]].args[1])
            room = self.max_length - options["max_new_tokens"]
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in chosen]
            prompts = [ids or [self.prefix_token_id] for ids in prompts]
            for found in continue_texts(self.model, prompts, **options):
                for n, text in found.items():
                    texts[chosen[n]] = text
                    self.cache_hook.add_partial("generate_until", requests[chosen[n]].args, text)
        return texts

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """What `continue_texts` takes, from the options of a task."""
        options = dict(_harness("models.utils").normalize_gen_kwargs(given, self.max_gen_toks))
        until, limit = options.pop("until"), options.pop("max_gen_toks")
        if not 0 < limit < self.max_length:
            raise InputError(
                f"evaluate: {limit} new tokens (max_gen_toks) leave no room for a prompt in the"
                f" model's {self.max_length} positions; lower it in the task"
            )
        sampling = {name: options.pop(name) for name in SAMPLING if name in options}
        for name, value in options.items():
            if name not in _NEUTRAL or _NEUTRAL[name] not in (None, value):
                raise InputError(f"evaluate: a task generates with {name} {value!r}, unsupported")
        if sampling.get("temperature", 0.0) > 0:
            sampling["key"] = jax.random.key(self.seed)
        return {
            "max_new_tokens": limit,
            "batch_size": self.batch_size,
            "until": until,
            "sampling": sampling,
        }


def harness_model(
    model: TextModel, *, batch_size: int = 8, max_gen_toks: int = 256, seed: int = 0
) -> Any:
    """A model as lm-evaluation-harness wants one: an `lm_eval.api.model.LM`.

    Args:
        model: What to evaluate; an adapter is part of its parameters.
        batch_size: Requests computed at a time, those of like length together.
        max_gen_toks: Tokens to generate where a task does not say.
        seed: Of tasks that sample.

    Raises:
        InputError: if lm_eval is not installed, or a tokenizer has no token to begin with.
    """
    return _lm_class()(model, batch_size=batch_size, max_gen_toks=max_gen_toks, seed=seed)


def run_harness(
    lm: Any,
    tasks: Sequence[str],
    *,
    directory: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-evaluation-harness.

    Args:
        lm: From `harness_model`.
        tasks: Names of tasks or groups, or YAML files.
        directory: Where tasks of one's own stand, beside the harness's.
        limit: Rows of each task at most.
        shots: Examples before each question, where a task does not fix it.
        chat: Lay questions out in the tokenizer's chat template.

    Returns:
        By task, its metrics under the harness's own names.

    Raises:
        InputError: if lm_eval is not installed, or a task is unknown or cannot be loaded.
    """
    manager = _manager(tasks, directory)
    if limit is not None and limit < 1:
        raise InputError(f"evaluate: limit must be at least 1, got {limit}")
    loaded = [task for name in tasks for task in _load(manager, name)]
    # It forks to draw its bootstraps, which a process with JAX's threads does not survive for sure.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it says on the way is no result
            results = _harness("evaluator").simple_evaluate(
                lm,
                tasks=loaded,
                task_manager=manager,
                limit=limit,
                num_fewshot=shots,
                apply_chat_template=chat,
                bootstrap_iters=DRAWS,
                log_samples=False,
            )
    except InputError:
        raise
    except ValueError as error:  # a task that runs generated code, say, which it asks about first
        raise InputError(f"evaluate: the harness refuses: {first_line(error)}") from None
    return {
        name: {key: value for key, value in metrics.items() if key not in ("alias", "name")}
        for name, metrics in results["results"].items()
    }


def _manager(tasks: Sequence[str], directory: str | Path | None) -> Any:
    """One that knows these tasks; to read the harness's own thousands takes a while."""
    manager = _harness("tasks").TaskManager
    if directory is None:
        return manager()
    if not Path(directory).is_dir():
        raise InputError(f"{directory}: no directory of tasks")
    own = manager(include_path=str(directory), include_defaults=False)
    known = all(name in own.all_tasks for name in tasks)
    return own if known else manager(include_path=str(directory))


def _load(manager: Any, name: str) -> list[Any]:
    """A group as it is, and the tasks of anything else."""
    try:
        found = manager.load([name])
    except Exception as error:  # Tasks are programs, which read files and the network.
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"evaluate: cannot load the task {name!r} ({reason})") from None
    return [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())


@functools.cache
def _lm_class() -> Callable[..., Any]:
    base = _harness("api.model").TemplateLM
    return type("LoraJaxLM", (HarnessMethods, base), {"__doc__": HarnessMethods.__doc__})


def _harness(module: str) -> Any:
    """A module of lm_eval, which is an extra."""
    try:
        return importlib.import_module(f"lm_eval.{module}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise InputError("evaluate: the harness needs lm_eval; run ./lora install eval") from None
