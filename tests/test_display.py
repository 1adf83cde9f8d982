"""What a notebook shows: results in one line, figures as pictures."""

import dataclasses

import pytest
import torch

from timm_csg import explain, measuring, metrics
from timm_csg.explain import explain_prediction


def results():
    """Public named tuples and dataclasses that hold tensors."""
    for package in (metrics, measuring, explain):
        for name in package.__all__:
            found = getattr(package, name)
            if isinstance(found, type) and (hasattr(found, "_fields") or dataclasses.is_dataclass(found)):
                fields = getattr(found, "_fields", None) or [field.name for field in dataclasses.fields(found)]
                if any("Tensor" in str(kind) for kind in found.__annotations__.values()):
                    yield pytest.param(found, len(fields), id=name)


@pytest.mark.parametrize(("result", "fields"), results())
def test_results_show_shapes_and_not_their_numbers(result, fields):
    shown = repr(result(*[torch.zeros(50, 50)] * fields))
    assert shown.startswith(f"{result.__name__}(")
    assert shown.count("<float32 [50, 50]>") == fields
    assert "\n" not in shown


def test_twelve_explanations_fit_a_screen(make_model):
    why = explain_prediction(make_model(), torch.rand(12, 3, 64, 64))
    assert len(repr(why)) < 2000
    first = why[0]
    assert repr(first).startswith(f"PredictionExplanation(target={first.target}, predicted={first.predicted}, ")
    assert f"{first.filters[0].filter}: {first.filters[0].share:.1%}" in repr(first)
    assert repr(first.standard).startswith("PathEvidence(standard: ")


def test_small_tensors_are_shown():
    assert repr(metrics.gate_counts(torch.eye(2))).startswith("GateCounts(owned=tensor(2), ")
