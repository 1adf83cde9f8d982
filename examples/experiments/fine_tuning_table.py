"""Print what fine_tuning.py has written as a table: a row for each setting, mean ± standard deviation over seeds.

python examples/experiments/fine_tuning_table.py runs.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev

SETTINGS = (
    "weights",
    "size",
    "all_layers",
    "classes",
    "hold_out",
    "method",
    "rate",
    "head_rate",
    "filters_per_class",
    "solo_weight",
)
NUMBERS = ("accuracy", "gated", "MIS", "agreement", "without", "others", "purity", "selectivity", "density")


def cell(values: list[float]) -> str:
    """Mean and, of several, standard deviation."""
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{spread}" if values else "–"


def main(arguments: list[str]) -> str:
    groups: dict[tuple, list[dict]] = {}
    for line in Path(arguments[0]).read_text().splitlines():
        run = json.loads(line) | {"weights": Path(json.loads(line)["weights"]).name}
        groups.setdefault(tuple(str(run.get(key)) for key in SETTINGS), []).append(run)
    lines = [["seeds", *SETTINGS, *NUMBERS], ["---"] * (1 + len(SETTINGS) + len(NUMBERS))]
    for settings, runs in groups.items():
        numbers = [cell([run[key] for run in runs if key in run]) for key in NUMBERS]
        lines.append([str(len(runs)), *settings, *numbers])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    print(table)
    return table


if __name__ == "__main__":
    main(sys.argv[1:])
