"""The layout of the package, enforced on its source: who may import whom, size of files, what may not appear."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "timm_csg"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES]
# Modules and packages from the plainest to the most composed: a file may import only what stands in an earlier tier, or
# its own package.
TIERS = (
    ("checks", "peaks", "hooks"),
    ("running",),
    (
        "version",
        "methods",
        "numbers",
        "attachment",
        "stage",
        "schedule",
        "mechanisms.base",
        "metrics",
        "labels",
        "pictures",
        "tensors",
        "first_batch",
    ),
    ("mechanisms.registry",),
    ("mechanisms", "head", "manifest"),
    ("recipes",),
    ("model", "card", "reading", "responses"),
    ("differentiation",),
    ("assignment", "first_steps", "freezing", "groups", "building", "explain", "judging", "hub_errors"),
    ("training", "adaptation", "checkpoint", "loading", "explained", "measuring"),
    ("setting_up", "export", "hub", "integrations", "plots"),
    ("pushing",),
    ("cli",),
    ("__main__", ""),
)
LEVELS = {f"timm_csg.{name}".rstrip("."): level for level, names in enumerate(TIERS) for name in names}
ONLY_IN = {
    "jinja2": ("timm_csg.card", "timm_csg.plots.reporting"),
    "matplotlib": "timm_csg.plots",
    "pandas": ("timm_csg.metrics.frames", "timm_csg.explain.why"),  # the latter for types only
    "rich": "timm_csg.cli",
    "lightning": "timm_csg.integrations.lightning",
    "transformers": "timm_csg.integrations.transformers",
    "sklearn": ("timm_csg.metrics", "timm_csg.cli"),
}
FILE_LINES = 300
MODULES = list(zip(FILES, NAMES, strict=True))


@functools.cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def group(name):
    """The longest prefix of a module's name that has a level."""
    parts = name.split(".")
    return next(prefix for end in range(len(parts), 0, -1) if (prefix := ".".join(parts[:end])) in LEVELS)


def imported(path, name):
    """Full names of the modules that a file imports, anywhere in it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            # "from timm_csg import stage" imports the module stage.
            yield from (full if (full := f"{origin}.{alias.name}") in NAMES else origin for alias in node.names)


def our_imports(path, name):
    return {other for other in imported(path, name) if other.split(".")[0] == "timm_csg"}


def test_every_module_has_a_level():
    assert [name for name in NAMES if name != "timm_csg" and group(name) == "timm_csg"] == []


def test_imports_only_go_down():
    offenders = [
        f"{name} imports {other}"
        for path, name in MODULES
        for other in our_imports(path, name)
        if group(other) != group(name) and LEVELS[group(other)] >= LEVELS[group(name)]
    ]
    assert offenders == []


def test_mechanisms_import_only_what_all_of_them_share():
    shared = {
        "timm_csg.checks",
        "timm_csg.peaks",
        *(f"timm_csg.mechanisms.{other}" for other in ("base", "registry", "blind", "solo", "targets", "templates")),
    }
    offenders = [
        f"{name} imports {other}"
        for path, name in MODULES
        if name.startswith("timm_csg.mechanisms.")
        for other in our_imports(path, name) - shared
    ]
    assert offenders == []


def test_metrics_import_only_metrics():
    offenders = [
        f"{name} imports {other}"
        for path, name in MODULES
        if name.startswith("timm_csg.metrics")
        for other in our_imports(path, name)
        if not other.startswith(("timm_csg.metrics", "timm_csg.checks", "timm_csg.peaks"))
    ]
    assert offenders == []


def test_optional_and_heavy_packages_stay_in_their_place():
    offenders = [
        f"{name} imports {other}"
        for path, name in MODULES
        for other in imported(path, name)
        if not name.startswith(ONLY_IN.get(other.split(".")[0], ""))
    ]
    assert offenders == []


def test_files_have_at_most_300_lines():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for path, name in MODULES}
    offenders = {name: length for name, length in lengths.items() if length > FILE_LINES}
    assert offenders == {}


def test_no_function_hides_the_module_of_its_name():
    offenders = []
    for path, name in MODULES:
        if path.name != "__init__.py":
            continue
        bound = {node.name for node in tree(path).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module != name:  # "from package import module" hides nothing
                bound |= {alias.asname or alias.name for alias in node.names}
        offenders += [full for full in NAMES if full.rpartition(".")[0] == name and full.rpartition(".")[2] in bound]
    assert offenders == []


def test_no_print_assert_bare_except_or_pickle_load():
    offenders = [f"{name}, line {found}" for path, name in MODULES for found in forbidden(tree(path))]
    assert offenders == []


def forbidden(module):
    """What may not appear in the package, with its line."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{node.lineno}: print"
        if isinstance(node, ast.Assert):
            yield f"{node.lineno}: assert"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{node.lineno}: bare except"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
            yield f"{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if options.get("weights_only") != "True":
                yield f"{node.lineno}: torch.load without weights_only=True"


# Functions of torch that make a tensor on torch's default device unless they are told where.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand"),
    *("randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}


def test_tensors_are_made_on_a_named_device():
    """The default device is the user's; a mechanism follows it, since it is made inside its model's device."""
    offenders = [
        f"{name}, line {node.lineno}"
        for path, name in MODULES
        if not name.startswith("timm_csg.mechanisms")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {f"torch.{factory}" for factory in FACTORIES}
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]
    assert offenders == []


@pytest.mark.parametrize("code", ["import timm_csg", "from timm_csg.cli import _parser; _parser().format_help()"])
def test_imports_load_nothing_heavy_and_print_nothing(code):
    code = f"import sys; {code}; sys.stderr.write(' '.join(m for m in sys.modules if '.' not in m))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == ""
    heavy = {"torch", "timm", "numpy", "PIL", *ONLY_IN} - {"rich"}
    assert heavy & set(result.stderr.split()) == set()


def test_public_names_exist_and_are_sorted_once():
    import timm_csg

    assert sorted(set(timm_csg.__all__)) == sorted(timm_csg.__all__)
    assert all(hasattr(timm_csg, name) for name in timm_csg.__all__)
    assert {"explain", "measuring", "metrics", "plots", "recipes", *timm_csg.__all__} <= set(dir(timm_csg))


def test_submodules_come_without_an_import_of_their_own():
    code = (
        "import sys, timm_csg; assert 'timm_csg.metrics' not in sys.modules;"
        "timm_csg.measuring.collect, timm_csg.metrics.accuracy, timm_csg.recipes.RECIPES;"
        "timm_csg.plots.class_filter_figure, timm_csg.explain.cam;"
        "assert 'matplotlib' not in sys.modules and not hasattr(timm_csg, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
