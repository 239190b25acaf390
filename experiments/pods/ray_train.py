"""Train one run on the hosts of a Ray cluster, with one actor on each.

    python experiments/pods/ray_train.py --hosts 2 --each '{"GPU": 8}' OUTPUT CONFIG.yaml ...

Runs in Ray's own Python.  All hosts see this checkout, its .venv made, and OUTPUT at the same
paths.  Each actor starts `./lora train CONFIG.yaml --distributed --resume auto`, and these
processes call `jax.distributed.initialize` with the address of the first actor's host.  A host that
is lost ends the attempt; the next one waits for as many hosts and goes on from the newest
checkpoint.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

LORA = Path(__file__).resolve().parents[2] / "lora"
SAVED = 75
"""For a run that has been saved, but is not finished: EX_TEMPFAIL, as in train.sh."""
WRONG_INPUT = 2
"""Exit code of what no restart mends; all hosts end with it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, required=True)
    parser.add_argument("--each", type=json.loads, default={"CPU": 1}, help="a host's resources")
    parser.add_argument("--restarts", type=int, default=100)
    parser.add_argument("output", help="the run's directory, seen by all hosts")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="CONFIG.yaml and overrides")
    options = parser.parse_args()
    ray.init()
    for _ in range(options.restarts + 1):
        codes = attempt(options.hosts, options.each, options.output, options.words)
        print(f"the hosts ended with {codes}", flush=True)
        if not any(codes):
            return 0
        if set(codes) == {WRONG_INPUT}:
            return WRONG_INPUT
    return 1


def attempt(hosts: int, each: dict[str, float], output: str, words: list[str]) -> list[int]:
    """The exit code of each host's process; 1 for a host that is gone."""
    group = placement_group([each] * hosts, strategy="STRICT_SPREAD")
    try:
        ray.get(group.ready())
        where = [
            PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i)
            for i in range(hosts)
        ]
        actors = [actor(each, strategy) for strategy in where]
        try:
            address = ray.get(actors[0].address.remote())
        except ray.exceptions.RayActorError:
            return [1]
        # All are waited for, so that none of an attempt writes beside the next one.
        running = [
            host.train.remote(output, words, address, hosts, number)
            for number, host in enumerate(actors)
        ]
        return [code_of(process) for process in running]
    finally:
        remove_placement_group(group)


def code_of(process: ray.ObjectRef) -> int:
    try:
        return ray.get(process)
    except ray.exceptions.RayActorError:
        return 1


def actor(each: dict[str, float], where: PlacementGroupSchedulingStrategy) -> ray.actor.ActorHandle:
    custom = {name: count for name, count in each.items() if name not in ("CPU", "GPU")}
    return Host.options(
        num_cpus=each.get("CPU", 0),
        num_gpus=each.get("GPU", 0),
        resources=custom,
        scheduling_strategy=where,
    ).remote()


@ray.remote
class Host:
    """One host's part of an attempt."""

    def address(self) -> str:
        """Where the first process listens for the others."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def train(self, output: str, words: list[str], address: str, hosts: int, number: int) -> int:
        own = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(hosts),
            "JAX_PROCESS_ID": str(number),
        }
        # A process of its own, as training answers to signals and may end itself at once.
        command = [str(LORA), "train", *words]
        command += ["--output", output, "--distributed", "--resume", "auto"]
        code = subprocess.run(command, env={**os.environ, **own}, check=False).returncode
        finished = any(Path(output, name).exists() for name in ("adapter", "model"))
        return SAVED if code == 0 and not finished else code


if __name__ == "__main__":
    sys.exit(main())
