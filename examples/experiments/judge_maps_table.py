"""Tables in Markdown of what judge_maps.py wrote: means over seeds ± their spread (chance).

python examples/experiments/judge_maps_table.py judged.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, median, stdev

from map_makers import BASELINES, MAKERS

from timm_csg.judging import JUDGES

SHORT = {"pointing_game": "pointing", "energy_inside": "energy", "weight_randomisation": "weights ↓"}
SHORT |= {"deletion": "deletion ↓", "random_logit": "other class ↓"}
Answers = dict[str, dict[int, dict]]
"""The answer of each judge for each seed."""


def read(files: list[Path]) -> dict[tuple[str, str, str], Answers]:
    """Answers by (set, model, map), judge and seed; the last one counts."""
    found: dict[tuple[str, str, str], Answers] = {}
    for line in (json.loads(line) for file in files for line in file.read_text().splitlines()):
        model = "(none)" if line["map"] in BASELINES else line["model"]
        answers = found.setdefault((line["set"], model, line["map"]), {})
        for judge in JUDGES:
            if judge in line:
                answers.setdefault(judge, {})[line["seed"]] = line[judge]
    return found


def cell(answers: list[dict], *, with_chance: bool) -> str:
    """Mean over seeds, with their spread, and chance."""
    if not answers:
        return "–"
    scores = [answer["score"] for answer in answers]
    spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
    chance = f" ({mean(answer['chance'] for answer in answers):.2f})" if with_chance else ""
    return short(f"{mean(scores):.3f}{spread}{chance}")


def short(text: str) -> str:
    """Numbers without the zero before the point."""
    return text.replace("0.", ".")


def the_same(chances: set[float]) -> str:
    """Chance in brackets, if it is the same for all maps."""
    return short(f" ({min(chances)})") if len(chances) == 1 else ""


def table(lines: dict[tuple[str, str], Answers]) -> str:
    """All maps of one set under every judge that was asked; chance in the head where it is the same for all maps."""
    judges = [judge for judge in JUDGES if any(judge in answers for answers in lines.values())]
    every = {judge: [one for answers in lines.values() for one in answers.get(judge, {}).values()] for judge in judges}
    chances = {judge: {round(one["chance"], 2) for one in answers} for judge, answers in every.items()}
    heads = [SHORT.get(judge, judge.replace("_", " ")) + the_same(chances[judge]) for judge in judges]
    rows = [f"| model, map | {' | '.join(heads)} |", f"|---|{'---|' * len(judges)}"]
    order = ["assigned", "standard", "(none)"], list(MAKERS)
    for model, maps in sorted(lines, key=lambda key: (order[0].index(key[0]), order[1].index(key[1]))):
        answers = lines[model, maps]
        cells = [cell(list(answers.get(judge, {}).values()), with_chance=len(chances[judge]) > 1) for judge in judges]
        rows.append(f"| {model}, {maps} | {' | '.join(cells)} |")
    errors = [short(f"{median(one['error'] for one in every[judge]):.3f}") for judge in judges]
    return "\n".join([*rows, f"| standard error over pictures, median | {' | '.join(errors)} |"])


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    found = read(parser.parse_args(arguments).files)
    parts = []
    for name in sorted({key[0] for key in found}):
        parts.append(table({key[1:]: answers for key, answers in found.items() if key[0] == name}))
    text = "\n\n".join(parts)
    print(text)
    return text


if __name__ == "__main__":
    main()
