"""The README's tables, from what the scripts have written: no figure is typed by hand.

    python experiments/claims/table.py [--check]

Between `<!-- NAME -->` and `<!-- end -->` stands what `results/NAME.json` holds; `summary` is a
line for each claim.
"""

import argparse
import importlib
import re
import sys
from pathlib import Path
from typing import Any

from outcome import HERE, load_results, markdown

NOT_YET = "not yet measured"
BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
OTHERS = {"full_costs": ("costs", "cost_table"), "remat": ("costs", "cost_table")}
"""Results whose table is not made by the `table` of a module of their name."""
CLAIMS = {
    "full": ("LoRA is on par with full fine-tuning", "Hu et al. 2021", "in part"),
    "full_costs": ("it takes a third of the memory, and less time", "Hu et al. 2021", "in part"),
    "rank": ("knowledge needs more rank than style, and a larger alpha", "folklore", "in part"),
    "alpha": ("a high rank needs alpha / √r", "Kalajdzievski 2023", "in part"),
    "targets": ("adapt all linear layers, not q and v", "Dettmers et al. 2023", "yes"),
    "forgetting": ("LoRA learns less and forgets less", "Biderman et al. 2024", "in part"),
    "four_bits": ("an adapter recovers what 4 bits cost", "Dettmers et al. 2023", "in part"),
    "remat": ("rematerialization costs 30 % more time", "Chen et al. 2016", "no, less"),
    "latency": ("a merged adapter adds no latency", "Hu et al. 2021", "yes"),
    "merged_adapters": ("adapters can be swapped", "Sheng et al. 2023 (S-LoRA)", "yes"),
}
"""By results: what is claimed, by whom, and whether it holds at this scale."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if it differs")
    options = parser.parse_args()
    readme = HERE / "README.md"
    text = readme.read_text("utf-8")
    new = BLOCK.sub(lambda found: found[1] + block(found[2]) + "\n" + found[3], text)
    if not options.check:
        readme.write_text(new, encoding="utf-8")
    return int(options.check and new != text)


def summary() -> str:
    """A line for each claim, with its number."""
    rows = [[*claim, said(name)] for name, claim in CLAIMS.items()]
    return markdown(["claim", "by", "holds at this scale?", "measured"], rows)


def said(name: str) -> str:
    if not results_file(name).is_file():
        return NOT_YET
    module = importlib.import_module("costs" if name == "full_costs" else name)
    return module.said(load_results(HERE, name))


def results_file(name: str) -> Path:
    return HERE / "results" / f"{name}.json"


def block(name: str) -> str:
    """The table of one file of results, and what it was measured with."""
    if name == "summary":
        return summary()
    if not results_file(name).is_file():
        return NOT_YET
    results = load_results(HERE, name)
    module, function = OTHERS.get(name, (name, "table"))
    made: str = getattr(importlib.import_module(module), function)(results)
    return f"{made}\n\n{told(results['conditions'])}"


def told(conditions: dict[str, Any]) -> str:
    """When, where, and how long it took."""
    minutes = conditions["processor_seconds"] / 60
    return (
        f"{conditions['date']}, {conditions['hardware']}, of which {conditions['usable_cores']}"
        f" used, jax {conditions['jax']}; {minutes:.0f} minutes of one core."
    )


if __name__ == "__main__":
    sys.exit(main())
