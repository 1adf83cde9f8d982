"""Exported files agree with torch for architectures of many families; minutes, so only with -m slow."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "experiments" / "export_check.py"


def load():
    spec = importlib.util.spec_from_file_location("export_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


export_check = load()


@pytest.mark.slow
@pytest.mark.parametrize("name", export_check.NAMES)
def test_file_agrees_with_torch_within_rounding(name, tmp_path):
    found = export_check.compare(name, folder=tmp_path)
    assert set(export_check.EXPLAINED) == {*found} & {*export_check.EXPLAINED} | {*found["missing"]}
    assert all(found[output] < 1e-5 for output in export_check.EXPLAINED if output in found)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["csg", "icnn"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_gates_and_masks_are_exported_too(name, mechanism, tmp_path):
    found = export_check.compare(name, mechanism, tmp_path)
    assert found["missing"] == {}
    assert all(found[output] < 1e-5 for output in export_check.EXPLAINED)


@pytest.mark.slow
def test_script_prints_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_check.timm.data, "resolve_data_config", lambda *_, **__: {"input_size": (3, 160, 160)})
    rows = export_check.main(
        ["--models", "test_resnet", "--repeats", "2", "--output", str(tmp_path / "runs" / "o.json")]
    )
    assert capsys.readouterr().out.splitlines()[-1].startswith("| test_resnet | ")
    assert rows[0]["map"] < 1e-5
