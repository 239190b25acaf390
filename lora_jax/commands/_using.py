"""Commands that use what was trained: merge it, talk to it, serve it."""

import argparse
import dataclasses
import sys
from typing import Any, get_args

from .._errors import InputError
from .._quant_config import QuantFormat
from ._command import Command, Parser

_CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8")
_CACHE_HELP = "of the keys and values that are kept (default: that of the activations)"


def _merge_arguments(p: Parser) -> None:
    p.add_argument(
        "--model", required=True, metavar="DIR", help="in Hugging Face layout, or bundled"
    )
    p.add_argument("--adapter", required=True, metavar="DIR", help="in PEFT's layout")
    p.add_argument("--output", required=True, metavar="DIR", help="where to write; must be empty")
    p.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
        help="of the weights that are written (default float32)",
    )  # fmt: skip
    p.add_argument(
        "--quant",
        choices=get_args(QuantFormat),
        help="merge into the base as this format holds it, which is what QLoRA trained on",
    )


def _merge(options: argparse.Namespace, overrides: list[str]) -> None:
    from .._merging import merge_directories

    o = options
    print(merge_directories(o.model, o.adapter, o.output, o.dtype, o.quant))


def _generate_arguments(p: Parser) -> None:
    p.add_argument(
        "--model", required=True, metavar="DIR", help="in Hugging Face layout, or bundled"
    )
    p.add_argument("--adapter", metavar="DIR", help="in PEFT's layout")
    p.add_argument("--prompt", metavar="TEXT", help="what to continue (default: ask for it)")
    _add_sampling(p, max_new_tokens=128)


def _generate(options: argparse.Namespace, overrides: list[str]) -> None:
    from .._speaker import Speaker
    from ..data import Message

    speaker = Speaker.load(options.model, options.adapter, options.template)
    ways = _ways(options)

    def answer(prompt: str) -> None:
        ids = speaker.prompt([Message("user", prompt)])
        for piece in speaker.answer(ids, **ways):
            print(piece, end="", flush=True)
        print()

    if options.prompt is not None:
        answer(options.prompt)
        return
    while (prompt := _ask()) is not None:
        try:
            answer(prompt)
        except InputError as error:  # too long a prompt, say: the next one may be better
            print(f"error: {error}", file=sys.stderr)
        options.seed += 1
        ways = _ways(options)


def _ask() -> str | None:
    """A line from the person, or None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "") or None
    except EOFError:
        return None


def _ways(options: argparse.Namespace) -> dict[str, Any]:
    """How texts are to be drawn and what ends them."""
    from ..models import SamplingParams

    fields = [field.name for field in dataclasses.fields(SamplingParams)]
    return {
        "sampling": SamplingParams(**{name: getattr(options, name) for name in fields}),
        "max_new_tokens": options.max_new_tokens,
        "cache_dtype": options.cache_dtype,
        "stop": [text.replace("\\n", "\n") for text in options.stop],
    }


def _chat_arguments(p: Parser) -> None:
    p.add_argument("model", metavar="MODEL", help="in Hugging Face layout, or bundled")
    p.add_argument(
        "--adapter", metavar="[NAME=]DIR", action="append", default=[],
        help="talk through it; several: the first to begin with, /adapter NAME changes to another",
    )  # fmt: skip
    p.add_argument("--system", metavar="TEXT", default="", help="who the model is to be")
    _add_sampling(p, max_new_tokens=512)


def _chat(options: argparse.Namespace, overrides: list[str]) -> None:
    from .._chat import Chat, converse, named_adapters
    from .._speaker import Speaker

    adapters, ways = named_adapters(options.adapter), _ways(options)
    speaker = Speaker.load(options.model, None, options.template)
    converse(Chat(speaker, adapters, template=options.template, system=options.system, **ways))


def _serve_arguments(p: Parser) -> None:
    p.add_argument("model", metavar="MODEL", help="in Hugging Face layout, or bundled")
    p.add_argument(
        "--adapter", metavar="[NAME=]DIR", action="append", default=[],
        help="answer to NAME through it; may be given several times",
    )  # fmt: skip
    p.add_argument("--served-model-name", metavar="NAME", help="of the base (default: MODEL's)")
    p.add_argument(
        "--template",
        metavar="NAME",
        help="plain, alpaca, chatml or tokenizer (default: what an adapter was trained with, else"
        " the tokenizer's, else plain)",
    )
    p.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="(default 127.0.0.1)")
    p.add_argument("--port", type=int, default=8000, metavar="N", help="0 is any (default 8000)")
    p.add_argument(
        "--api-key-file", metavar="FILE", help="keys, one in a line: all but /health need one"
    )
    p.add_argument(
        "--allowed-host", metavar="NAME", action="append", default=[],
        help="a name that clients call the server by (default: this machine's own, where nobody"
        " else reaches it and there are no keys; else any)",
    )  # fmt: skip
    p.add_argument(
        "--adapter-root", metavar="DIR",
        help="let clients load and unload adapters that lie below it (default: they cannot)",
    )  # fmt: skip
    p.add_argument("--max-rows", type=int, metavar="N", help="answered at one time (default 16)")
    p.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of prompt and answer (default: the"
        " model's, 4096 at most)",
    )  # fmt: skip
    p.add_argument("--prefill-chunk", type=int, metavar="N", help="tokens of a prompt between two"
                   " of the others' (default 128)")  # fmt: skip
    p.add_argument("--adapter-slots", type=int, metavar="N", help="adapters on the device at one"
                   " time (default: those given, up to 8; 8 with --adapter-root)")  # fmt: skip
    p.add_argument("--max-lora-rank", type=int, metavar="N", help="(default: the largest given;"
                   " 16 with --adapter-root)")  # fmt: skip
    p.add_argument("--max-waiting", type=int, metavar="N", help="for a row (default 256)")
    p.add_argument("--max-tokens", type=int, metavar="N", help="of an answer at most")
    p.add_argument("--max-choices", type=int, default=128, metavar="N", help="of one call (default"
                   " 128)")  # fmt: skip
    p.add_argument("--max-body", type=int, default=1 << 20, metavar="BYTES", help="(default 1 MiB)")
    p.add_argument("--timeout", type=float, default=600.0, metavar="S", help="(default 600)")
    p.add_argument("--cache-dtype", choices=_CACHE_DTYPES, help=_CACHE_HELP)
    p.add_argument("--access-log", action="store_true", help="a line for each call; no prompts")


def _serve(options: argparse.Namespace, overrides: list[str]) -> None:
    from .._serving import serve_command

    serve_command(options, overrides)


def _add_sampling(p: Parser, *, max_new_tokens: int) -> None:
    """How a text is drawn, and what ends it."""
    p.add_argument(
        "--template",
        metavar="NAME",
        help="how the prompt is laid out: plain, alpaca, chatml, tokenizer"
        " (default: what the adapter was trained with, else the tokenizer's, else plain)",
    )
    p.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help="of an answer at most (default %(default)s)",
    )
    p.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy"
    )
    p.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the likeliest K; 0 is all"
    )
    p.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest that make up this share",
    )
    p.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="as a share of the likeliest token's"
    )
    p.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1 is none")
    p.add_argument(
        "--presence-penalty", type=float, default=0.0, metavar="X", help="off what was said already"
    )
    p.add_argument(
        "--frequency-penalty", type=float, default=0.0, metavar="X", help="as often as it was said"
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default 0)")
    p.add_argument(
        "--stop", metavar="TEXT", action="append", default=[],
        help="end before this text (\\n is a line break); may be given several times",
    )  # fmt: skip
    p.add_argument("--cache-dtype", choices=_CACHE_DTYPES, help=_CACHE_HELP)


USING = {
    "merge": Command(
        "Merge an adapter into its base and write a model in Hugging Face layout.",
        (
            "./lora merge --model DIR --adapter DIR --output DIR",
            "./lora merge --model DIR --adapter DIR --output DIR --quant nf4",
        ),
        _merge_arguments,
        _merge,
        stopped="stopped; if --output is there, the model in it is whole, but was not compared",
    ),
    "generate": Command(
        "Continue a prompt; without --prompt, talk to the model until an empty line.",
        (
            "./lora generate --model DIR --prompt 'Once upon a time' --template plain",
            "./lora generate --model DIR --adapter DIR --temperature 0.7 --seed 1",
        ),
        _generate_arguments,
        _generate,
        stopped="stopped",
    ),
    "chat": Command(
        "Talk to a model; /help inside shows what can be done. Lines of a file are answered too.",
        (
            "./lora chat DIR --adapter runs/mine/adapter",
            "./lora chat DIR --adapter legal=DIR --adapter poems=DIR --temperature 0.7",
            "./lora chat DIR < questions.txt > answers.txt",
        ),
        _chat_arguments,
        _chat,
        stopped=None,
    ),
    "serve": Command(
        "Answer OpenAI's HTTP interface with a model and adapters, each chosen by its name.",
        (
            "./lora serve DIR --adapter legal=DIR --adapter poems=DIR --port 8000",
            "./lora serve DIR --adapter-root adapters --api-key-file keys.txt --host 0.0.0.0",
            "./lora serve runs/mine/merged --served-model-name mine --model.dtype bfloat16",
            "curl http://127.0.0.1:8000/v1/models",
        ),
        _serve_arguments,
        _serve,
        ("model", "quant"),
        stopped="stopped before anything was answered",
    ),
}
