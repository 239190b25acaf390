"""The README's tables, from what the scripts have written: no figure is typed by hand.

    python experiments/claims/table.py [--check]

Between `<!-- NAME -->` and `<!-- end -->` stands what `results/NAME.json` holds.
"""

import argparse
import importlib
import re
import sys
from pathlib import Path
from typing import Any

from common import HERE, load_results

BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
OTHERS = {"full_costs": ("costs", "cost_table"), "remat": ("costs", "cost_table")}
"""Results whose table is not made by the `table` of a module of their name."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if it differs")
    options = parser.parse_args()
    differ = 0
    for readme in sorted(HERE.glob("README*.md")):
        text = readme.read_text("utf-8")
        new = BLOCK.sub(lambda found: found[1] + block(found[2]) + "\n" + found[3], text)
        differ |= new != text
        if not options.check:
            readme.write_text(new, encoding="utf-8")
    return int(differ and options.check)


def block(name: str) -> str:
    """The table of one file of results, and what it was measured with."""
    if not Path(HERE, "results", f"{name}.json").is_file():
        return "not yet measured"
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
