"""The tutorial, from its folder of pictures to a served file: every block runs as written, in the page's order.

Only the pretrained network is replaced by a tiny one without weights, and one epoch is trained.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from timm_csg.cli import main

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
TINY = "--model test_resnet --img-size 64 --recipe standard assigned --epochs 1 --warmup-epochs 0 --workers 0"


def run_command(line):
    if line.startswith("pip "):
        return
    if line.startswith("timm-csg "):
        tiny = line.replace("--model mobilenetv2_100 --pretrained", f"{TINY} --device cpu")
        assert main(shlex.split(tiny)[1:]) == 0, line
    else:
        assert line.startswith("python "), line
        subprocess.run([sys.executable, *shlex.split(line)[1:]], check=True, timeout=120)


def test_every_block_of_the_tutorial_runs(tmp_path, monkeypatch, capfd):
    pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    page, namespace = PAGE.read_text(encoding="utf-8"), {"__name__": "tutorial"}
    assert "--model mobilenetv2_100 --pretrained" in page
    for block in re.finditer(r"^```(python|bash)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        if block[1] == "bash":
            for line in block[2].replace("\\\n", " ").splitlines():
                run_command(line)
        else:
            before = page[: block.start()].count("\n") + 1
            exec(compile("\n" * before + block[2], str(PAGE), "exec"), namespace)
    assert namespace["heat"].shape == (64, 64)
    made = {path.name for path in (tmp_path / "why").glob("30_*.png")}
    assert {"30_owner_map.png", "30_versus.png"} <= made
    assert Image.open(tmp_path / "why" / "30_owner_map.png").size == (256, 256)
    told = capfd.readouterr().out
    assert "The owners of the filters can" in told  # the verdict, whichever it is
    assert "evidence {'circle': " in told  # the served file
    assert "Circles, crosses and squares" in (tmp_path / "photos.html").read_text(encoding="utf-8")
