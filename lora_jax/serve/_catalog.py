"""What can be asked for by `model`: the base and its adapters, each with its template."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from .._errors import InputError, nearest
from ..adapters import adapter_notes
from ..data import BadRow, choose_template, encode_prompt, spoken_turns, stop_ids
from ..models import Pretrained
from ._api_error import ApiError, without_paths
from ._engine import Engine
from ._settings import ServerSettings


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model by its name, how conversations with it are laid out, and since when it is there.

    `adapter` is None for the plain base.
    """

    name: str
    adapter: str | None
    template: str
    created: int


class Catalog:
    """The models that an engine can be asked for.

    Args:
        engine: What answers.
        pretrained: Its base.
        settings: The base's name, the template, and where adapters may be loaded from.
    """

    def __init__(self, engine: Engine, pretrained: Pretrained, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        self.tokenizer: Any = pretrained.tokenizer
        self._ends = frozenset(pretrained.config.eos_token_ids)
        self._models = {settings.base_name: self._served(settings.base_name, None, None)}
        self._names = {Path(pretrained.directory).resolve(): settings.base_name}
        vocabulary = self.tokenizer.backend.get_vocab(with_added_tokens=True)
        self._longest = max(map(len, vocabulary))

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """All of them, the base first."""
        return tuple(self._models.values())

    def model(self, name: str | None) -> ServedModel:
        """The one of a name; the base where none is given.

        Raises:
            ApiError: 404, if there is none.
        """
        model = self._models.get(self.settings.base_name if name is None else name)
        if model is None:
            asked = str(name)[:80]
            there = nearest(asked, self._models)
            raise ApiError(404, f"no model {asked!r}{there}", "model", "model_not_found")
        return model

    def room(self, tokens: int) -> int:
        """How many tokens there is room for after a prompt of so many."""
        return self.engine.max_length - tokens

    def check_text(self, length: int, field: str) -> None:
        """Refuse a text of so many characters that no tokens there is room for can spell it.

        Raises:
            ApiError: 400, before anything long is done.
        """
        if length > self.engine.max_length * self._longest:
            raise ApiError(
                400,
                f"{field}: {length} characters are more than {self.engine.max_length} tokens can"
                " hold; shorten it",
                field,
                "context_length_exceeded",
            )

    def prompt(self, model: ServedModel, messages: Any) -> list[int]:
        """Token ids of a conversation up to where the answer begins.

        Raises:
            ApiError: 422, if the template does not take it.
        """
        try:
            # A turn of the assistant may have none, and is empty then.
            turns = spoken_turns(
                [turn | {"content": turn.get("content") or ""} for turn in messages]
            )
            self.check_text(sum(len(turn.content) for turn in turns), "messages")
            return encode_prompt(turns, model.template, self.tokenizer) or self.beginning
        except (InputError, BadRow) as error:
            raise ApiError(422, self.hidden(error), "messages") from None

    @property
    def beginning(self) -> list[int]:
        """What an empty text is: the token that texts begin with, or else that they end with."""
        marks = (self.tokenizer.bos_id, self.tokenizer.eos_id)
        return [mark for mark in marks if mark is not None][:1]

    def stop_ids(self, model: ServedModel) -> frozenset[int]:
        """What ends an answer of a conversation."""
        return self._ends.union(stop_ids(model.template, self.tokenizer))

    @property
    def text_stop_ids(self) -> frozenset[int]:
        """What ends a plain text."""
        return self._ends.union(self.tokenizer.stop_ids)

    def add(self, name: str, directory: str | Path) -> None:
        """Let an adapter be asked for by a name.

        Raises:
            InputError: if the name is the base's, or as `Engine.load_adapter` does.
        """
        if name == self.settings.base_name:
            raise InputError(f"adapter: {name!r} is the base's name; give another")
        # What errors name is this, and can be taken out of them.
        directory = Path(directory).resolve()
        model = self._served(name, name, adapter_notes(directory).get("template"))
        self.engine.load_adapter(name, directory)
        self._names[directory] = name
        self._models[name] = model

    def load(self, name: str, path: str, *, replace: bool) -> None:
        """Let an adapter below the root be asked for.

        Raises:
            ApiError: 400 for a name that is taken or a path outside of the root, 404 for one that
                is not there, 422 for files that are not an adapter of this base.
        """
        if name in self._models and not (replace and self._models[name].adapter):
            raise ApiError(400, f"a model {name!r} is there already; unload it", "lora_name")
        assert self.settings.adapter_root is not None
        directory = confined(self.settings.adapter_root, path)
        try:
            self.add(name, directory)
        except InputError as error:
            message = without_paths(str(error), {directory: name, **self._names})
            raise ApiError(422, message, "lora_path", "adapter_refused") from None

    def unload(self, name: str) -> None:
        """Let an adapter no longer be asked for.

        Raises:
            ApiError: 404, if there is none of that name.
        """
        if self.model(name).adapter is None:
            raise ApiError(400, f"{name!r} is the base, which stays", "lora_name")
        self._models.pop(name, None)
        self.engine.unload_adapter(name)
        self._names = {path: own for path, own in self._names.items() if own != name}

    def hidden(self, error: Exception | str) -> str:
        """A message without paths of the machine."""
        return without_paths(str(error), self._names)

    def _served(self, name: str, adapter: str | None, trained: str | None) -> ServedModel:
        own = "tokenizer" if self.tokenizer.chat_template else "plain"
        chosen = choose_template(self.settings.template or trained or own, None, self.tokenizer)
        return ServedModel(name, adapter, chosen, int(time.time()))


def confined(root: Path, path: str) -> Path:
    """A directory at or below a root, and files of an adapter that do not lead out of it.

    Raises:
        ApiError: 400 for one outside, 404 for none.
    """
    top = root.resolve()
    try:
        directory = (top / path).resolve()
        there = directory.is_relative_to(top) and directory.is_dir()
        inside = there and all(f.resolve().is_relative_to(top) for f in directory.iterdir())
    except (OSError, RuntimeError, ValueError):  # too long a name, a circle of links
        directory, there, inside = top, False, True
    if directory.is_relative_to(top) and not there:
        what = f"lora_path: no directory {path[:80]!r} below the adapter root"
        raise ApiError(404, what, "lora_path")
    if not inside:
        raise ApiError(400, "lora_path: must lie below the server's adapter root", "lora_path")
    return directory
