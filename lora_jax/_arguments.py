"""The commands and their arguments: what each takes, and what its help says."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

from ._errors import InputError, nearest
from ._quant_config import QuantFormat

SECTIONS = ("model", "quant", "lora", "data", "train", "mesh", "output")
"""What `--section.key value` may name; see `configs/` for all keys."""
CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8")
CACHE_HELP = "of the keys and values that are kept (default: that of the activations)"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the nearest word, and exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(action.choices)
            raise InputError(
                f"{self.prog}: unknown {action.metavar or action.dest} {value!r}"
                f"{nearest(str(value), known)}; known: {', '.join(known)}"
            )

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def parsers() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="lora",
        description="Fine-tune a model with a low-rank adapter, and use it.",
        epilog="examples:\n"
        "  ./lora quickstart\n"
        "  ./lora train configs/quickstart.yaml --train.steps 100 --output runs/longer\n"
        "  ./lora generate --model DIR --adapter DIR --prompt 'Once upon a time'\n"
        "  ./lora test        runs the tests (./lora test --all: the slow ones too)\n",
    )
    sub = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands: dict[str, Parser] = {}

    def add(name: str, text: str, examples: str, sections: Sequence[str] = ()) -> Parser:
        commands[name] = sub.add_parser(
            name, help=text, description=text, epilog=f"examples:\n{examples}"
        )
        commands[name].set_defaults(action=None, sections=sections)
        return commands[name]

    p = add(
        "quickstart",
        "Fine-tune the bundled base on the standard library's docstrings, and show the effect.",
        "  ./lora quickstart\n  ./lora quickstart --train.steps 20 --output runs/short\n",
        SECTIONS,
    )
    p.add_argument("--output", metavar="DIR", help="where to write (default runs/quickstart)")

    p = add(
        "train",
        "Train the run that a YAML file describes; --section.key VALUE changes any of its keys.",
        "  ./lora train configs/quickstart.yaml --dry-run\n"
        "  ./lora train configs/gsm8k.yaml --data.train train.jsonl --data.eval test.jsonl\n"
        "  ./lora train configs/quickstart.yaml --lora.r 8 --output runs/rank8\n"
        "  ./lora train runs/rank8/config.yaml --resume\n"
        "  ./lora train configs/gsm8k.yaml --resume auto --output runs/gsm8k\n"
        "  ./lora train CONFIG.yaml --distributed --resume auto     (the same on every host)\n",
        SECTIONS,
    )
    p.add_argument("config", metavar="CONFIG.yaml")
    p.add_argument("--output", metavar="DIR", help="where to write; must not hold a run")
    p.add_argument(
        "--resume",
        nargs="?",
        choices=("always", "auto"),
        const="always",
        help="go on from the newest whole checkpoint; auto: begin if there is no run yet, and do"
        " nothing if it is finished, so that one command line serves every restart",
    )
    p.add_argument(
        "--distributed",
        action="store_true",
        help="train together with the processes that are started with the same command: by Slurm,"
        " Cloud TPU, Kubernetes or Open MPI, or with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"
        " and JAX_PROCESS_ID",
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="everything but the steps: resolved config, matched modules, counts, bytes",
    )

    p = add(
        "sweep",
        "Train a grid of adapters over one base, several in one step, and keep the best.",
        "  ./lora sweep configs/quickstart.yaml --lora.r 1,2,4,8,16,32\n"
        "  ./lora sweep CONFIG.yaml --lora.r 4,16 --train.learning_rate 1e-3,3e-3 --output DIR\n"
        "  ./lora sweep CONFIG.yaml --lora.target_modules '[q_proj,v_proj],all-linear'\n",
        SECTIONS,
    )
    p.add_argument("config", metavar="CONFIG.yaml")
    p.add_argument("--output", metavar="DIR", help="where to write; must be empty")
    p.add_argument(
        "--at-once", type=int, default=8, metavar="N", help="adapters in one step (default 8)"
    )

    p = add(
        "plan",
        "Compile a run's train step for a machine that need not be here, and show what it takes.",
        "  ./lora plan configs/quickstart.yaml\n"
        "  ./lora plan configs/llama3_8b_qlora.yaml --target rtx4090\n"
        "  ./lora plan configs/llama3_8b_qlora.yaml --target v5e:1x1 --sweep batch,seq\n"
        "  ./lora plan configs/llama3_70b_qlora.yaml --target v5e:4x4 --mesh.fsdp 16\n",
        ("model", "quant", "lora", "data", "train", "mesh"),
    )
    p.add_argument("config", metavar="CONFIG.yaml")
    p.add_argument(
        "--target",
        default="cpu",
        metavar="NAME",
        help="cpu (default), h200, h100, a100-80, a100-40, rtx4090, h200x8 and so on, or a slice"
        " of TPUs: v4:2x2x1, v5e:4x4, v5p:4x4x4, v6e:2x2",
    )
    p.add_argument("--sweep", metavar="AXES", help="batch,seq: memory against both")
    p.add_argument("--json", action="store_true", help="one JSON object instead of text")
    p.add_argument("--picture", metavar="FILE", help="draw it into a PNG file too")
    p.add_argument("--no-search", action="store_true", help="do not look for a change that fits")

    p = add(
        "evaluate",
        "Measure the loss of a model with and without what was trained, its answers, or a task.",
        "  ./lora evaluate runs/mine\n"
        "  ./lora evaluate --model DIR --adapter DIR --data test.jsonl --json\n"
        "  ./lora evaluate --model DIR --data test.jsonl --data.template chatml"
        " --quant.format nf4\n"
        "  ./lora evaluate --model DIR --data test.jsonl --exact-match answers.jsonl\n"
        "  ./lora evaluate --model DIR --adapter DIR --harness gsm8k,arc_easy --limit 100\n",
        ("model", "quant", "data", "train.loss_chunk"),
    )
    p.add_argument("run", nargs="?", metavar="RUN", help="a run's directory: on its held-out rows")
    p.add_argument("--model", metavar="DIR")
    p.add_argument("--adapter", metavar="DIR", help="compared with the model alone")
    p.add_argument("--data", metavar="FILE", help="rows, or stdlib-heldout; they are not packed")
    p.add_argument(
        "--exact-match",
        metavar="FILE.jsonl",
        help="generate the answers of rows whose answers are numbers, as in GSM8K (columns question"
        " and answer, or by --data.columns); what was cut short goes on",
    )
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default 256)")
    p.add_argument("--harness", metavar="TASKS", help="tasks of lm-evaluation-harness, with commas")
    p.add_argument("--include-path", metavar="DIR", help="where tasks of your own for it stand")
    p.add_argument("--limit", type=int, metavar="N", help="rows of each of its tasks at most")
    p.add_argument("--shots", type=int, metavar="N", help="examples before each of its questions")
    p.add_argument(
        "--chat", action="store_true", default=None, help="its questions in the chat template"
    )
    p.add_argument("--batch-size", type=int, metavar="N", help="default 8, or the run's")
    p.add_argument("--json", action="store_true", help="one JSON object instead of text")

    p = add(
        "inspect",
        "Show what an adapter learned and the rank it needs, or what quantization does to a model.",
        "  ./lora inspect runs/mine/adapter --model DIR\n"
        "  ./lora inspect DIR --quant --data test.jsonl\n"
        "  ./lora inspect bundled --quant --data stdlib-heldout --data.train_rows 40\n",
        ("data", "train.loss_chunk", "train.batch_size"),
    )
    p.add_argument("directory", metavar="DIR", help="an adapter's, or with --quant a model's")
    p.add_argument("--model", metavar="DIR", help="of an adapter's base: compare norms with it")
    p.add_argument("--picture", metavar="FILE", help="draw an adapter's ranks into a PNG file")
    p.add_argument("--quant", action="store_true", help="compare the formats of a model")
    p.add_argument("--data", metavar="FILE", help="held-out rows, or stdlib-heldout")
    p.add_argument("--formats", metavar="A,B", help="only these, such as nf4,int4-zero")

    p = add(
        "merge",
        "Merge an adapter into its base and write a model in Hugging Face layout.",
        "  ./lora merge --model DIR --adapter DIR --output DIR\n"
        "  ./lora merge --model DIR --adapter DIR --output DIR --quant nf4\n",
    )
    p.add_argument("--model", required=True, metavar="DIR")
    p.add_argument("--adapter", required=True, metavar="DIR")
    p.add_argument("--output", required=True, metavar="DIR")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    p.add_argument(
        "--quant",
        choices=get_args(QuantFormat),
        help="merge into the base as this format holds it, which is what QLoRA trained on",
    )

    p = add(
        "generate",
        "Continue a prompt; without --prompt, talk to the model until an empty line.",
        "  ./lora generate --model DIR --prompt 'Once upon a time' --template plain\n"
        "  ./lora generate --model DIR --adapter DIR --temperature 0.7 --seed 1\n",
    )
    p.add_argument("--model", required=True, metavar="DIR")
    p.add_argument("--adapter", metavar="DIR")
    p.add_argument("--prompt", metavar="TEXT")
    _add_sampling(p, max_new_tokens=128)

    p = add(
        "chat",
        "Talk to a model; /help inside shows what can be done. Lines of a file are answered too.",
        "  ./lora chat DIR --adapter runs/mine/adapter\n"
        "  ./lora chat DIR --adapter legal=DIR --adapter poems=DIR --temperature 0.7\n"
        "  ./lora chat DIR < questions.txt > answers.txt\n",
    )
    p.add_argument("model", metavar="MODEL")
    p.add_argument(
        "--adapter", metavar="[NAME=]DIR", action="append", default=[],
        help="talk through it; several: the first to begin with, /adapter NAME changes to another",
    )  # fmt: skip
    p.add_argument("--system", metavar="TEXT", default="", help="who the model is to be")
    _add_sampling(p, max_new_tokens=512)

    p = add(
        "serve",
        "Answer OpenAI's HTTP interface with a model and adapters, each chosen by its name.",
        "  ./lora serve DIR --adapter legal=DIR --adapter poems=DIR --port 8000\n"
        "  ./lora serve DIR --adapter-root adapters --api-key-file keys.txt --host 0.0.0.0\n"
        "  ./lora serve runs/mine/merged --served-model-name mine --model.dtype bfloat16\n"
        "  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json'"
        ' -d \'{"prompt": "Hi"}\'\n',
        ("model", "quant"),
    )
    p.add_argument("model", metavar="MODEL")
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
    p.add_argument("--cache-dtype", choices=CACHE_DTYPES, help=CACHE_HELP)
    p.add_argument("--access-log", action="store_true", help="a line for each call; no prompts")

    data = add(
        "data",
        "Look at rows as the model will see them, or make rows from documents.",
        "  ./lora data show train.jsonl --model DIR\n  ./lora data make DIR --output rows\n",
    )
    data_sub = data.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add_data(name: str, text: str, examples: str, sections: Sequence[str]) -> Parser:
        made = data_sub.add_parser(name, help=text, description=text, epilog=examples)
        made.set_defaults(sections=sections)
        return made

    p = add_data(
        "show",
        "Show how rows become tokens: what is trained on, what is masked, what was dropped.",
        "examples:\n  ./lora data show train.jsonl --model DIR --count 5\n"
        "  ./lora data show stdlib --data.template chatml\n"
        "  ./lora data show configs/quickstart.yaml\n",
        ("model", "data"),
    )
    p.add_argument("source", metavar="FILE", help="rows, or a run's YAML file")
    p.add_argument("--model", metavar="DIR", help="whose tokenizer (default: the bundled base)")
    p.add_argument("--count", type=int, default=3, metavar="N", help="rows to show")
    p = add_data(
        "make",
        "Turn text, Markdown and CSV files below a directory into instruction rows.",
        "examples:\n  ./lora data make documents\n"
        "  ./lora data make documents --output rows --held-out 0.1\n",
        (),
    )
    p.add_argument("directory", metavar="DIR")
    p.add_argument("--output", metavar="DIR", help="where to write (default DIR-rows)")
    p.add_argument("--held-out", type=float, default=0.1, metavar="SHARE")
    p.add_argument("--seed", type=int, default=0, metavar="N")
    return parser, commands


def _add_sampling(p: Parser, *, max_new_tokens: int) -> None:
    """How a text is drawn, and what ends it."""
    p.add_argument(
        "--template",
        metavar="NAME",
        help="how the prompt is laid out: plain, alpaca, chatml, tokenizer"
        " (default: what the adapter was trained with, else the tokenizer's, else plain)",
    )
    p.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is all")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P")
    p.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="as a share of the likeliest token's"
    )
    p.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1 is none")
    p.add_argument("--presence-penalty", type=float, default=0.0, metavar="X")
    p.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X")
    p.add_argument("--seed", type=int, default=0, metavar="N")
    p.add_argument(
        "--stop", metavar="TEXT", action="append", default=[],
        help="end before this text (\\n is a line break); may be given several times",
    )  # fmt: skip
    p.add_argument("--cache-dtype", choices=CACHE_DTYPES, help=CACHE_HELP)
