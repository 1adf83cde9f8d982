"""Docstrings of the documented API: every argument with its shape, what is returned, what is raised."""

import ast
import dataclasses
import functools
import inspect
import pydoc
import re
import textwrap
from pathlib import Path

from timm_csg import Mechanism
from timm_csg.mechanisms import MechanismConfig

API = Path(__file__).parents[1] / "docs" / "api"
DOCUMENTED = sorted({name for page in API.glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)})
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):\n((?:[ \t]+.*\n|\n)*)", re.MULTILINE)
# How a shape is told: in brackets, in words, or by naming the place that has it.
SHAPE = re.compile(r"\[|\bshapes?\b|\bscalars?\b|\bnumber\b|See ``|As in ``|matrix", re.IGNORECASE)


def sections(owner):
    return dict(SECTION.findall(inspect.cleandoc(owner.__doc__ or "") + "\n"))


def entries(text):
    """Names in a section with what is said of them."""
    found = re.findall(r"^    ([\w*, ]+):((?:.|\n(?!    \S))*)", text, re.MULTILINE)
    return {name.strip().lstrip("*"): said for names, said in found for name in names.split(",")}


@functools.cache
def functions_of(path):
    return {node.name: node for node in ast.parse(Path(path).read_text()).body if isinstance(node, ast.FunctionDef)}


def raises(function):
    """Whether a function raises something, itself or through a private function of its module that it calls."""
    body = ast.parse(textwrap.dedent(inspect.getsource(function)))
    helpers = functions_of(inspect.getsourcefile(function))
    called = {node.func.id for node in ast.walk(body) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    bodies = [body, *(helpers[name] for name in called if name.startswith("_") and name in helpers)]
    return any(isinstance(node, ast.Raise) and node.exc for part in bodies for node in ast.walk(part))


def faults_of_function(function):
    if not function.__doc__:
        yield "has no docstring"
        return
    if re.match(r"As ``|Timm's ``", function.__doc__):  # of a host, or of a base class, which say the rest
        return
    found, parameters = sections(function), inspect.signature(function).parameters
    described = entries(found.get("Args", ""))
    for name, parameter in parameters.items():
        if name in ("self", "cls"):
            continue
        if name not in described:
            yield f"does not describe {name}"
        elif re.search(r"^Tensor\b", str(parameter.annotation)) and not SHAPE.search(described[name]):
            yield f"tells no shape of {name}"
    yield from (f"describes {name}, which it does not have" for name in set(described) - set(parameters))
    returned = str(inspect.signature(function).return_annotation)
    said = found.get("Returns", found.get("Yields"))
    if said is None and not set(parameters) - {"self", "cls"}:
        said = inspect.cleandoc(function.__doc__)  # as of a property: the first line says what it is
    if returned != "None" and said is None:
        yield "does not say what it returns"
    elif re.search(r"^Tensor\b", returned) and not SHAPE.search(said or ""):
        yield "tells no shape of what it returns"
    if raises(function) and "Raises" not in found:
        yield "does not say what it raises"


def parts_of_class(cls):
    """Annotations of what a class is made from, by name."""
    if issubclass(cls, (BaseException, Mechanism)):
        return {}  # mechanisms are made by ``differentiate``
    if dataclasses.is_dataclass(cls):  # options of the command line have their help text
        fields = [field for field in dataclasses.fields(cls) if "help" not in field.metadata and field.name[0] != "_"]
        return {field.name: str(field.type) for field in fields}
    if hasattr(cls, "_fields"):
        return {name: str(cls.__annotations__[name]) for name in cls._fields}
    made = inspect.signature(cls.__init__).parameters.values() if "__init__" in vars(cls) else ()
    return {parameter.name: str(parameter.annotation) for parameter in made if parameter.name != "self"}


def faults_of_class(cls):
    if not cls.__doc__:
        yield "has no docstring"
    found = sections(cls)
    described = entries(found.get("Args", "")) | entries(found.get("Attributes", ""))
    summary = SECTION.split(inspect.cleandoc(cls.__doc__ or "") + "\n")[0]
    for name, annotation in parts_of_class(cls).items():
        if name not in described:
            yield f"does not describe {name}"
        elif re.search(r"^Tensor\b", annotation) and not SHAPE.search(described[name] + summary):
            yield f"tells no shape of {name}"
    for name, member in vars(cls).items():
        function = getattr(member, "__func__", member)
        if name.startswith("_"):
            continue
        if isinstance(member, (property, functools.cached_property)):
            getter = member.fget if isinstance(member, property) else member.func
            yield from () if getter.__doc__ else [f"{name} has no docstring"]
        elif inspect.isfunction(function) and function.__module__.startswith("timm_csg"):
            above = [getattr(base, name) for base in cls.__mro__[1:] if hasattr(base, name)]
            if any(other.__module__.startswith("timm_csg") and other.__doc__ for other in above):
                yield from () if function.__doc__ else [f"{name} has no docstring"]  # its base says the rest
            else:
                yield from (f"{name} {fault}" for fault in faults_of_function(function))


CITED = re.compile(r"arxiv\.org|doi\.org|\b(?:19|20)\d\d\b")
# Names that implement no paper's formula, by reason.
OURS = {
    "counts and shares that need no source": (
        *("metrics.accuracy", "metrics.accuracy_per_class", "metrics.classes_per_filter", "metrics.filters_per_class"),
        *("metrics.pool", "metrics.activation_similarity", "metrics.summarize_similarity", "explain.normalise"),
    ),
    "who owns what, and whether that can be trusted, as this package defines it": (
        *("metrics.owned_filters", "metrics.owners", "metrics.owner_agreement", "metrics.chance_agreement"),
        *("metrics.owner_purity", "metrics.noise_floor", "metrics.verdict"),
    ),
    "explanations of this package; their docstrings say the formula": (
        *("explain.class_filters", "explain.coarse_map", "explain.contrast", "explain.evidence_map"),
        *("explain.explain_prediction", "explain.owner_map"),
    ),
    "several of the others in one call, which cite": (
        "judging.judge",
        "judging.judge_filters",
        "judging.probability_curve",
    ),
    "maps that know nothing, to compare with": ("judging.centre_map", "judging.noise_map"),
    "plumbing": (
        *("mechanisms.list_mechanisms", "mechanisms.register_mechanism", "mechanisms.Chain", "mechanisms.ChainConfig"),
        *("mechanisms.Mechanism", "mechanisms.MechanismConfig", "metrics.to_dataframe", "judging.embed"),
        *("explain.as_batch", "explain.filter_maps", "explain.patches", "explain.strongest_images"),
    ),
}


def test_every_formula_of_a_paper_cites_it():
    """In its own docstring or its module's; the rule is for functions and mechanisms, not for what they return."""
    known, uncited = {name for names in OURS.values() for name in names}, set()
    for room in ("mechanisms", "metrics", "judging", "explain"):
        package = pydoc.locate(f"timm_csg.{room}")
        for name in package.__all__:
            found = getattr(package, name)
            is_mechanism = inspect.isclass(found) and issubclass(found, (Mechanism, MechanismConfig))
            texts = (found.__doc__, getattr(inspect.getmodule(found), "__doc__", None))
            if (inspect.isfunction(found) or is_mechanism) and not any(CITED.search(text or "") for text in texts):
                uncited.add(f"{room}.{name}")
    assert sorted(uncited - known) == []
    assert sorted(known - uncited) == []  # what has a source by now needs no excuse


def test_rule_finds_what_it_is_for():
    assert raises(pydoc.locate("timm_csg.metrics.owner_agreement"))
    described = entries(sections(pydoc.locate("timm_csg.explain.grad_cam"))["Args"])
    assert described["images"].strip().startswith("[batch, channels, height, width]")

    def undocumented(images: "Tensor", *, top: int = 1) -> "Tensor":  # noqa: F821
        """Something.

        Args:
            images: Pictures.
        """
        raise ValueError("no")

    assert set(faults_of_function(undocumented)) == {
        "tells no shape of images", "does not describe top", "does not say what it returns",
        "does not say what it raises",
    }  # fmt: skip


def test_every_documented_name_says_what_it_takes_returns_and_raises():
    offenders = []
    for name in DOCUMENTED:
        found = pydoc.locate(name)
        faults = faults_of_class(found) if inspect.isclass(found) else ()
        faults = faults_of_function(found) if inspect.isfunction(found) else faults
        offenders += [f"{name} {fault}" for fault in faults]
    assert offenders == []
