"""The documentation is true: its code runs as written, offline, and it names what exists."""

import re
from pathlib import Path

import pytest

import timm_csg
import timm_csg.explain
import timm_csg.judging
import timm_csg.measuring
import timm_csg.metrics
import timm_csg.plots
from timm_csg.cli import main

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"  # runs with its commands, in test_tutorial.py
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHER_PACKAGES = {"captum", "pytorch_grad_cam", "quantus", "torchcam"}  # shown on a page, not needed by the tests
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    """Code blocks as (line number, code)."""
    found = BLOCK.finditer(text(page))
    return [(text(page)[: m.start()].count("\n") + 2, m[2]) for m in found if m[1] == language]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and page != TUTORIAL], ids=lambda page: page.name
)
def test_every_python_block_runs_in_sequence(page, tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace, missing = {"__name__": page.stem}, []
    for line, code in blocks(page, "python"):
        try:
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)  # so that errors name the page's line
        except ModuleNotFoundError as error:
            if error.name not in OTHER_PACKAGES:
                raise
            missing.append(f"{error.name} (line {line})")
    if missing:
        pytest.skip(f"all ran but blocks that need {', '.join(missing)}: pip install -e '.[compare]'")


def test_readme_gives_exactly_two_commands():
    commands = [code.strip() for _, code in blocks("README.md", "bash")]
    assert commands == ['pip install -e ".[plots]" && timm-csg train', 'pip install -e ".[test]" && pytest -n 2']


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_bash_blocks_parse(page, monkeypatch):
    parsed = []
    monkeypatch.setattr("timm_csg.cli.commands.train.run", lambda args: parsed.append(args) or 0)
    for _, code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            command = line.rpartition("&& ")[2].split()
            if command[:2] == ["timm-csg", "train"]:
                assert main(command[1:]) == 0
                assert parsed.pop().command == "train"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_pages_and_pictures_are_named_with_their_right_place(page):
    ours = {path.relative_to(ROOT).as_posix() for path in (*PAGES, ROOT / "CITATION.cff")}
    ours.add("docs/reproduce.md")  # docs/notebook.py makes it
    ours |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "images").glob("*.*")}
    ours |= {f"docs/images/made/{name}" for name in ("explanations.png", "filters.png", "factors.png", "contrast.png")}
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text(page)):
        if "://" not in target:
            assert (page.parent / target).resolve().relative_to(ROOT).as_posix() in ours


def test_api_pages_name_every_public_name_once():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    named = set(listed)
    assert len(listed) == len(named)
    modules = (timm_csg, timm_csg.explain, timm_csg.judging, timm_csg.measuring, timm_csg.metrics, timm_csg.plots)
    for module in modules:
        assert {f"{module.__name__}.{name}" for name in module.__all__} <= named


def test_files_on_the_index_page_exist():
    named = set(re.findall(r"`((?:timm_csg|examples)/[\w/]+\.py)`", text("docs/index.md")))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_every_file_is_one_hop_from_the_index_page():
    named = set(re.findall(r"`(timm_csg/[\w/]+\.py)`", text("docs/index.md")))
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "timm_csg").rglob("*.py") if path.stem[0] != "_"}
    assert {file for file in files - named if "/commands/" not in file} == {"timm_csg/version.py"}


def test_rooms_on_the_index_page_are_the_folders_of_the_package():
    named = set(re.findall(r"^\| `timm_csg/(\w+)/` \|", text("docs/index.md"), re.MULTILINE))
    assert named == {path.parent.name for path in (ROOT / "timm_csg").glob("*/__init__.py")}


def test_method_card_states_the_values_in_force():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text("docs/mechanisms/csg.md"), re.MULTILINE))
    default = timm_csg.CSGConfig().to_dict()
    assert {name: rows.get(name) for name in default} == {name: str(value) for name, value in default.items()}


def test_versions_agree():
    assert f"## [{timm_csg.__version__}]" in text("CHANGELOG.md")
    assert f"\nversion: {timm_csg.__version__}\n" in text("CITATION.cff")
