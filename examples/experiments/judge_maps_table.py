"""Tables in Markdown of what judge_maps.py wrote: scores, and seconds for 1,000 pictures.

python examples/experiments/judge_maps_table.py judged.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from timm_csg.judging import JUDGES


def read(files: list[Path]) -> dict[tuple[str, str, str], dict[str, list[dict]]]:
    """Answers of all seeds by (set, model, map) and judge."""
    found: dict[tuple[str, str, str], dict[str, list[dict]]] = {}
    for line in (json.loads(line) for file in files for line in file.read_text().splitlines()):
        answers = found.setdefault((line["set"], line["model"], line["map"]), {})
        for judge in JUDGES:
            if judge in line:
                answers.setdefault(judge, []).append(line[judge] | {"images": line["images"]})
    return found


def cell(answers: list[dict]) -> str:
    """Mean over seeds, with their spread, and chance."""
    if not answers:
        return "–"
    scores = [answer["score"] for answer in answers]
    spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
    return short(f"{mean(scores):.3f}{spread} ({mean(answer['chance'] for answer in answers):.2f})")


def short(text: str) -> str:
    """Numbers without the zero before the point."""
    return text.replace("0.", ".")


def table(found: dict, name: str) -> str:
    """All maps of one set under every judge that was asked."""
    lines = {key[1:]: answers for key, answers in found.items() if key[0] == name}
    judges = [judge for judge in JUDGES if any(judge in answers for answers in lines.values())]
    head = f"| model, map | {' | '.join(judges)} |\n|---|{'---|' * len(judges)}\n"
    rows = [
        f"| {model}, {maps} | {' | '.join(cell(answers.get(judge, [])) for judge in judges)} |"
        for (model, maps), answers in lines.items()
    ]
    return head + "\n".join(rows)


def seconds(found: dict, name: str, maps: str) -> str:
    """Seconds for 1,000 pictures of each judge with one kind of map."""
    answers = found.get((name, "assigned", maps), {})
    times = {judge: mean(1000 * one["seconds"] / one["images"] for one in all_) for judge, all_ in answers.items()}
    return ", ".join(f"{judge} {value:.0f}" for judge, value in times.items())


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    found = read(parser.parse_args(arguments).files)
    parts = []
    for name in sorted({key[0] for key in found}):
        parts.append(table(found, name))
        parts.append(f"Seconds for 1,000 pictures of {name}, evidence map: {seconds(found, name, 'evidence map')}")
    text = "\n\n".join(parts)
    print(text)
    return text


if __name__ == "__main__":
    main()
