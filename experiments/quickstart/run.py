"""The figures of the main job: time, memory, held-out loss, merge, import, compile, set-up.

    python experiments/quickstart/run.py
    python experiments/quickstart/run.py --full    # all parameters trained instead, nothing else

A fresh clone is set up as a user does it, without what only the tests need (PyTorch, which
TensorBoard's writer would import too), and runs the main job and the imports.  Prints a Markdown
table and writes it into this directory's README.md, between two marks.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import LoraConfig, combine, init_adapter, lora_linen
from lora_jax._quickstart import SentenceLoss
from lora_jax.lora import KernelLayout, trainable_mask
from lora_jax.models import CausalLM, ModelConfig
from lora_jax.train import (
    TrainSection,
    init_state,
    load_config,
    make_optimizer,
    make_step,
    prepare,
    run,
)

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}


def main_job(clone: Path, output: Path) -> list[tuple[str, str, str]]:
    """Run the quickstart as a user does, in a process of its own."""
    started = time.perf_counter()
    subprocess.run(["./lora", "quickstart", "--output", str(output)], check=True, cwd=clone)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    summary = json.loads((output / "summary.json").read_text())
    fair, merge = summary["fair"], summary["merge"]
    change = 100 * (fair["after"] / fair["before"] - 1)
    return [
        ("main job, set-up aside", f"{seconds:.0f} s", "≤ 120 s"),
        ("its peak memory", f"{peak / 1e9:.2f} GB", "≤ 1.5 GB"),
        (
            "held-out loss, fairly scored",
            f"{fair['before']:.3f} → {fair['after']:.3f} ({change:+.1f} %)",
            "≤ -25 %",
        ),
        (
            "`merged/` read back against unmerged logits",
            f"{merge['largest_difference']:.1e}",
            "≤ 1e-4",
        ),
    ]


def full_tuning() -> str:
    """The same rows and scores with all parameters trained in float32: what the base allows."""
    with tempfile.TemporaryDirectory() as directory:
        words = ["--output", f"{directory}/run", "--quant", "null", "--train.method", "full"]
        words += ["--train.steps", "200", "--train.learning_rate", "1e-3"]
        job = prepare(load_config(ROOT / "configs/quickstart.yaml", words))
        score = SentenceLoss(job)
        before = min(score.instruction(job.params), score.natural(job.params))
        after = score.instruction(combine(job.base, run(job).trainable))
    return f"all parameters, 200 steps: {before:.3f} → {after:.3f} ({after / before - 1:+.1%})"


def import_time(clone: Path, repeats: int = 7) -> tuple[str, str, str]:
    """Seconds of `import lora_jax` in a fresh process, beside what it stands on alone."""

    def once(code: str) -> float:
        started = time.perf_counter()
        subprocess.run([clone / ".venv/bin/python", "-c", code], check=True, cwd=clone)
        return time.perf_counter() - started

    once("import lora_jax")
    codes = ("import lora_jax", "import jax, flax.linen, optax", "pass")
    rounds = [[once(code) for code in codes] for _ in range(repeats)]
    times = [loaded - bare for loaded, _, bare in rounds]
    alone = statistics.median(below - bare for _, below, bare in rounds)
    spread = f"{statistics.median(times):.2f} s ({min(times):.2f}–{max(times):.2f})"
    return "`import lora_jax`", f"{spread}; jax, flax and optax alone {alone:.2f} s", "≤ 1.5 s"


def compile_time(layers: int) -> float:
    """Seconds to trace, lower and compile the train step of a model of so many layers."""
    config = ModelConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    model = CausalLM(config, remat="nothing")
    ids = jnp.zeros((2, 32), jnp.int32)
    base = model.init(jax.random.key(0), ids)["params"]
    lora = LoraConfig(r=4, target_modules="all-linear")
    adapter = init_adapter(jax.random.key(1), base, lora, layouts=LAYOUTS)
    tx = make_optimizer(TrainSection(), 10, trainable_mask)
    state = init_state(adapter, tx, jax.random.key(2))
    batch = {
        "input_ids": np.zeros((1, 2, 32), np.int32),
        "positions": np.zeros((1, 2, 32), np.int32),
        "segment_ids": np.ones((1, 2, 32), np.int32),
        "loss_mask": np.ones((1, 2, 32), bool),
    }
    step = make_step(lora_linen(model), tx)
    started = time.perf_counter()
    step.lower(state, base, batch).compile()  # type: ignore[attr-defined]
    return time.perf_counter() - started


def compile_ratio(repeats: int = 3) -> tuple[str, str, str]:
    """Compile time at 32 layers over that at 4, interleaved."""
    compile_time(4)
    ratios, times = [], []
    for _ in range(repeats):
        few, many = compile_time(4), compile_time(32)
        ratios.append(many / few)
        times.append((few, many))
    few, many = (statistics.median(t) for t in zip(*times, strict=True))
    spread = f"{min(ratios):.2f}–{max(ratios):.2f}; {few:.1f} s, {many:.1f} s"
    words = f"{statistics.median(ratios):.2f} ({spread})"
    return "compile time at 32 layers over that at 4", words, "≤ 1.2"


def first_setup(clone: Path) -> tuple[str, str, str]:
    """Seconds of the first command in a fresh clone without any cache."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    home = str(clone.parent)
    fresh = {"PATH": os.environ["PATH"], "HOME": home, "UV_CACHE_DIR": f"{home}/uv"}
    started = time.perf_counter()
    subprocess.run(["./lora", "train", "--help"], check=True, cwd=clone, env=fresh, stdout=-3)
    return "first set-up", f"{time.perf_counter() - started:.0f} s", "≤ 180 s"


def table(rows: list[tuple[str, str, str]]) -> str:
    lines = ["| figure | measured | target |", "|---|---|---|"]
    lines += [f"| {name} | {value} | {target} |" for name, value, target in rows]
    hardware = f"{os.cpu_count()} CPU cores ({platform.machine()}), {time.strftime('%Y-%m-%d')}"
    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    return "\n".join([*lines, "", f"{hardware}, {versions}."])


def into_readme(text: str) -> None:
    readme = HERE / "README.md"
    head, rest = readme.read_text().split("<!-- figures -->\n", 1)
    tail = rest.split("<!-- end -->", 1)[1]
    readme.write_text(f"{head}<!-- figures -->\n{text}\n<!-- end -->{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="train all parameters, nothing else")
    if parser.parse_args().full:
        print(full_tuning())
        return
    with tempfile.TemporaryDirectory() as directory:
        clone = Path(directory, "clone")
        setup = first_setup(clone)
        rows = [*main_job(clone, Path(directory, "run")), setup, import_time(clone)]
    rows.append(compile_ratio())
    print(table(rows))
    into_readme(table(rows))


if __name__ == "__main__":
    main()
