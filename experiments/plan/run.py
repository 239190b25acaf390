"""Write the plans that lie beside the configs: CONFIG.plan.md for every CONFIG.yaml named here.

python experiments/plan/run.py            # needs libtpu and jax[cuda13], no TPU or GPU
"""

import contextlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
EIGHT = ("--train.batch_size", "16", "--train.accumulate", "1")
PLANS = {
    "llama3_8b_qlora": (("rtx4090",), ("v5e:1x1",), ("h100x8", *EIGHT), ("v5e:4x4", *EIGHT)),
    "llama3_70b_qlora": (("h100",),),
    "llama3_70b_pod": (("v5e:4x4", "--train.batch_size", "16"), ("v5e:16x16",)),
    "llama3_405b_qlora": (("v5p:4x4x4",),),
}
"""For every config its targets, each with words laid over the config."""


def main() -> None:
    from lora_jax.plan import plan, show

    for name, targets in PLANS.items():
        config = Path("configs", f"{name}.yaml")
        lines = [f"# {config.name}", "", "Compiled, not run: memory and amounts of work, no speed."]
        for target, *words in targets:
            made = plan(config, target, words)
            versions = ", ".join(f"{package} {made.versions[package]}" for package in ("jax",))
            print(f"{name} for {target}: {made.total / 1e9:.3f} GB ({made.seconds:.0f} s)")
            command = " ".join(["./lora plan", str(config), "--target", target, *words])
            lines += ["", f"    {command}    # {versions}", "", "```", show(made), "```"]
        (ROOT / config).with_suffix(".plan.md").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    with contextlib.chdir(ROOT):
        main()
