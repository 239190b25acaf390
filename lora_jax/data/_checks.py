"""What a template and a tokenizer do not agree on, found before anything is trained."""

from .._errors import InputError
from .._tokenizer import MARK, Tokenizer
from ._rendered import rendered_prompt, written_after_answer
from ._template import segments
from ._turns import Message

_SHOWN = 4


def template_problems(template: str, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Marks that the tokenizer cuts into pieces, and a beginning of sequence written twice.

    Args:
        template: One of `TEMPLATES` (see `choose_template`).
        tokenizer: The model's tokenizer.

    Returns:
        A sentence for each problem, with what to do.

    Example:
        >>> from tokenizers import Tokenizer as Backend, models, pre_tokenizers
        >>> backend = Backend(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
        >>> backend.pre_tokenizer = pre_tokenizers.Punctuation()
        >>> tokenizer = Tokenizer(backend, {"eos_token": "a"}, eos_id=0)
        >>> print(template_problems("chatml", tokenizer)[0].partition(";")[0])
        the template writes <|im_start|>, which the tokenizer cuts into pieces
    """
    text = _short_talk(template, tokenizer)
    if text is None:
        return ()
    cut = [m for m in dict.fromkeys(MARK.findall(text)) if len(tokenizer.encode(m)) > 1]
    problems = []
    if cut:
        others = f" and {len(cut) - _SHOWN} more" if len(cut) > _SHOWN else ""
        listed = ", ".join(f'"{mark}"' for mark in cut[:_SHOWN])
        problems.append(
            f"the template writes {', '.join(cut[:_SHOWN])}{others}, which the tokenizer cuts into"
            f" pieces; add them (model.add_tokens: [{listed}]), or give template: alpaca"
        )
    bos = tokenizer.special_tokens.get("bos_token")
    begins = text.lstrip()
    late = tokenizer.add_bos and begins != text
    if bos and (begins.startswith(bos + bos) or (late and begins.startswith(bos))):
        problems.append(
            f"sequences begin with {bos} twice; take it out of the chat template once, or set"
            " add_bos_token: false in tokenizer_config.json"
        )
    return tuple(problems)


def _short_talk(template: str, tokenizer: Tokenizer) -> str | None:
    """What the template writes around a question and an answer; None where it refuses them."""
    talk = [Message("user", "a"), Message("assistant", "b")]
    try:
        text = "".join(part.text for part in segments(talk, template, tokenizer))
        if template == "tokenizer":
            prompt = rendered_prompt([Message("user", "a")], tokenizer)
            text += written_after_answer(tokenizer) + "".join(part.text for part in prompt)
    except InputError:  # It is said where a real conversation is refused.
        return None
    return text
