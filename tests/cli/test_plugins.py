"""``--plugin``: the user's own code is run once, or one sentence says why not and where."""

import sys

import pytest

from timm_csg.cli import main
from timm_csg.cli.plugins import import_plugins


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("def f(:\n", r"broken_plugin.py fails: SyntaxError: .*\(broken_plugin.py, line 1\)"),
        ("x = 1\nraise RuntimeError('no')\n", r"fails: RuntimeError: no \(broken_plugin.py, line 2\)"),
        ("{}['a']\n", r"fails: KeyError: 'a' \(broken_plugin.py, line 1\)"),
        ("import a_module_that_is_not_there\n", "No module named 'a_module_that_is_not_there'"),
    ],
)
def test_code_that_fails_is_named_with_its_line(tmp_path, capfd, code, error):
    path = tmp_path / "broken_plugin.py"
    path.write_text(code)
    assert main(["inspect", "test_resnet", "--plugin", str(path)]) == 2
    with pytest.raises(ValueError, match=error):
        import_plugins([str(path)])
    assert "broken_plugin" not in sys.modules
    assert "Traceback" not in capfd.readouterr().err


def test_a_file_named_like_another_module_is_refused_not_skipped(tmp_path):
    path = tmp_path / "json.py"
    path.write_text("raise RuntimeError('never run')\n")
    with pytest.raises(ValueError, match="another module named 'json'; rename the file"):
        import_plugins([str(path)])


def test_a_file_is_run_once(tmp_path):
    path = tmp_path / "counting_plugin.py"
    path.write_text("import sys\nsys.counted_runs = getattr(sys, 'counted_runs', 0) + 1\n")
    import_plugins([str(path), str(path)])
    import_plugins([str(path)])
    assert sys.counted_runs == 1


@pytest.mark.parametrize(
    ("name", "why"), [("nowhere.py", ": the file does not exist"), ("no.such.module", " is not a module that can be")]
)
def test_what_is_not_there_is_named(name, why):
    with pytest.raises(ValueError, match=f"--plugin {name}{why}"):
        import_plugins([name])


@pytest.mark.parametrize(
    "command",
    ["train", "evaluate x", "inspect x", "explain x --checkpoint y", "export x", "report x", "push x user/name"],
)
def test_every_command_imports_plugins_before_anything_else(command, tmp_path, capsys):
    path = tmp_path / "stopping_plugin.py"
    path.write_text("raise RuntimeError('imported first')\n")
    assert main([*command.split(), "--plugin", str(path)]) == 2
    assert "stopping_plugin.py fails: RuntimeError: imported first" in capsys.readouterr().err
