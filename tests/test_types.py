"""The README's code as a type checker sees it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_readme_passes_mypy(tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api", reason="needs the extra 'dev'")
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "readme.py").write_text("".join(blocks), encoding="utf-8")
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    options = ["--config-file", "", "--ignore-missing-imports", "--follow-imports", "silent"]
    found, _, status = api.run([*options, "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "readme.py")])
    assert status == 0, found
