"""The share of a step's time that the loop takes outside the compiled step, in several processes.

    python experiments/pods/host_time.py [--processes 4]

The whole loop (rows, arrays, the agreed stop, metrics) and the bare compiled step on a batch that
lies ready take turns; each process has two CPU devices.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
STEPS, ROUNDS = 5, 9
WORDS = ["--quant.format", "nf4", "--train.batch_size", "8", "--train.log_every", "5",
         "--train.steps", "1000", "--train.save_every", "null"]  # fmt: skip


def main() -> None:
    from launch import environment, free_port

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    count = parser.parse_args().processes
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "measure", f"{directory}/run"],
                env=environment(number, count, 2, port),
            )
            for number in range(count)
        ]
        sys.exit(max(process.wait() for process in processes))


def measure(output: str) -> None:
    from lora_jax.train import join_hosts, load_config, prepare
    from lora_jax.train._hosts import agreed_stop, is_first
    from lora_jax.train._loop import _Loop
    from lora_jax.train._rundir import open_directory

    with join_hosts(), agreed_stop() as asked:
        job = prepare(load_config(ROOT / "configs/quickstart.yaml", [*WORDS, "--output", output]))
        loop = _Loop(job, None)
        with open_directory(job.config, False) as opened:
            loop.open(opened.directory, opened.begun)
            shares = list(_shares(loop, asked))
            loop.close()
        if is_first():
            low, middle, high = statistics.quantiles(shares, n=4)
            print(
                f"outside the compiled step: {middle:.1%} of a step's time (quartiles {low:.1%} .."
                f" {high:.1%}, n {len(shares)}, {STEPS} steps each)"
            )


def _shares(loop, asked):
    import jax
    import numpy as np

    batch = {name: x[None] for name, x in next(loop.batches).items() if name != "rows"}
    ready = jax.block_until_ready(loop.job.batch({k: np.asarray(v) for k, v in batch.items()}))
    numbers = itertools.count()
    loop.started = time.perf_counter()

    def whole() -> None:
        asked.is_set()
        at = next(numbers)
        loop._one_step(at)
        loop._after_step(at + 1)

    def bare() -> None:
        loop.state, _ = loop.step(loop.state, loop.job.base, ready)

    def seconds(step) -> float:
        begin = time.perf_counter()
        for _ in range(STEPS):
            step()
        jax.block_until_ready(loop.state)
        return time.perf_counter() - begin

    for step in (bare, whole):
        seconds(step)
    for _ in range(ROUNDS):
        alone, all_of_it = seconds(bare), seconds(whole)
        yield 1 - alone / all_of_it


if __name__ == "__main__":
    measure(sys.argv[2]) if sys.argv[1:2] == ["measure"] else main()
