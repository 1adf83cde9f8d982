"""timm-csg evaluate --explanations, --filters: what metrics.json and the tables say."""

import json

import pytest
import timm

from timm_csg.checkpoint import save_plain
from timm_csg.cli import main
from timm_csg.cli.comparison import explanations_table


def test_the_command_writes_and_prints_what_was_judged(tmp_path, capsys):
    model = timm.create_model("test_resnet", num_classes=10)
    save_plain(model, tmp_path / "model")
    main(
        [
            "evaluate",
            str(tmp_path / "model"),
            "--output",
            str(tmp_path / "out"),
            "--metrics",
            "accuracy",
            "--data",
            "digits",
            "--explanations",
            "--explanation-images",
            "6",
            "--filters",
        ]
    )
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    (found,) = results["checkpoints"].values()
    assert {"cam", "grad_cam", "centre"} <= set(found["explanations"])
    assert set(found["explanations"]["cam"]["deletion"]) == {"score", "chance", "standard_error"}
    assert found["contrastiveness"] is not None
    assert found["sid5"] == pytest.approx(0.2)  # one place: the maps are 1 x 1
    assert found["mono_score"] is None
    shown = capsys.readouterr()
    assert "explanation maps (chance in brackets)" in shown.out + shown.err


def test_nothing_judged_no_table():
    assert explanations_table({"checkpoints": {"a": {"accuracy": 1.0}}}) is None


def test_no_images_to_judge_on_are_said(tmp_path, capsys):
    assert main(["evaluate", "resnet18", "--explanations", "--explanation-images", "0"]) == 2
    assert "--explanation-images must be at least 1" in capsys.readouterr().err
