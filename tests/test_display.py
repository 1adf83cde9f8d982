"""What a notebook shows: results in one line and as tables, figures as pictures; results as data frames."""

import dataclasses
import sys

import pytest
import torch

import timm_csg
from timm_csg import explain, measuring, metrics
from timm_csg.explain import explain_prediction


def results():
    """Public named tuples and dataclasses that hold tensors."""
    for package in (metrics, measuring, explain):
        for name in package.__all__:
            found = getattr(package, name)
            if isinstance(found, type) and (hasattr(found, "_fields") or dataclasses.is_dataclass(found)):
                fields = getattr(found, "_fields", None) or [field.name for field in dataclasses.fields(found)]
                if found.__name__ == "Measurement":
                    continue  # shows its numbers
                if any("Tensor" in str(kind) for kind in found.__annotations__.values()):
                    yield pytest.param(found, len(fields), id=name)


@pytest.mark.parametrize(("result", "fields"), results())
def test_results_show_shapes_and_not_their_numbers(result, fields):
    shown = repr(result(*[torch.zeros(50, 50)] * fields))
    assert shown.startswith(f"{result.__name__}(")
    assert shown.count("<float32 [50, 50]>") == fields
    assert "\n" not in shown
    html = result(*[torch.zeros(50, 50)] * fields)._repr_html_()
    assert html.count("&lt;float32 [50, 50]&gt;") == fields
    assert len(html) < 200 + 250 * fields


def test_twelve_explanations_fit_a_screen(make_model):
    why = explain_prediction(make_model(), torch.rand(12, 3, 64, 64))
    assert len(repr(why)) < 2000
    first = why[0]
    assert repr(first).startswith(f"PredictionExplanation(target={first.target}, predicted={first.predicted}, ")
    assert f"{first.filters[0].filter}: {first.filters[0].share:.1%}" in repr(first)
    assert repr(first.standard).startswith("PathEvidence(standard: ")


def test_small_tensors_are_shown():
    assert repr(metrics.gate_counts(torch.eye(2))).startswith("GateCounts(owned=tensor(2), ")


@pytest.fixture
def named(make_model, gated):
    model = gated(timm_csg.differentiate(make_model()))
    model.pretrained_cfg["label_names"] = ["ant", "<b>", "cat", "dog", "eel"]
    return model


def test_explanation_is_a_table_in_a_notebook(named, images):
    why = explain.explain_prediction(named, images[:1], "<b>", top=2)[0]
    html = why._repr_html_()
    assert "<caption" in html
    assert "Why &lt;b&gt;? Predicted: " in html
    assert html.count("<tr>") == 1 + len(why.standard.filters) + len(why.gated.filters)
    assert f"<td {'style='}" in html
    assert f">{why.filters[0].filter}</td>" in html
    assert len(html) < 5000
    assert repr(why).startswith("PredictionExplanation(target=<b>, predicted=")


# Data frames


@pytest.fixture
def seen(named, images, targets):
    return measuring.collect(named, [(images, targets)])


NAMES = ["ant", "bee", "cat", "dog", "eel"]


def test_activations_have_a_row_for_each_image(seen):
    frame = seen.to_dataframe(NAMES)
    assert frame.shape == (3, 1 + 5 + 5 + seen.features.shape[1])
    assert frame.index.name == "sample"
    assert frame["targets"].tolist() == seen.targets.tolist()
    assert frame["logits_cat"].tolist() == seen.logits[:, 2].tolist()
    assert frame["features_7"].tolist() == seen.features[:, 7].tolist()
    plain = seen._replace(gated_logits=None).to_dataframe()
    assert "logits_2" in plain
    assert "gated_logits_2" not in plain


def test_ablation_has_a_row_for_each_removed_class():
    ablation = metrics.Ablation(torch.tensor([0.9, 0.8]), torch.tensor([[0.0, 0.8], [0.9, 0.1]]))
    frame = ablation.to_dataframe(["cat", "dog"])
    assert frame.loc["cat", "before"] == pytest.approx(0.9)
    assert frame.loc["dog", "after_cat"] == pytest.approx(0.9)
    assert frame.loc["dog", "after_dog"] == pytest.approx(0.1)


def test_matrices_and_owners_become_frames(seen):
    mi = metrics.mutual_information(seen.features, seen.targets, 5)
    frame = metrics.to_dataframe(mi, NAMES)
    assert (frame.index.name, frame.columns.name, frame.shape) == ("class", "filter", tuple(mi.shape))
    assert frame.loc["dog"].tolist() == mi[3].tolist()
    owners = metrics.owners(mi)
    frame = metrics.to_dataframe(owners, NAMES)
    assert frame["owner"].tolist() == owners.tolist()
    assert frame["owner_name"].tolist() == [NAMES[owner] for owner in owners]
    assert metrics.mutual_information_per_class(mi).to_dataframe(NAMES).loc["eel", "best"] == mi[4].max()
    assert metrics.mutual_information_per_filter(mi).to_dataframe().index.name == "filter"


def test_filters_and_images_have_a_row_for_each_rank(named, images):
    found = explain.class_filters(named, images, top=2)
    frame = found.to_dataframe()
    assert frame.index.names == ["image", "rank"]
    assert frame.loc[(1, 0), "filters"] == int(found.filters[1, 0])
    strongest = explain.strongest_images(named, [images], [4, 9], top=3)
    frame = strongest.to_dataframe()
    assert frame.loc[(1, 2), "indices"] == int(strongest.indices[1, 2])
    assert frame.loc[(0, 1), "positions_1"] == int(strongest.positions[0, 1, 1])


def test_evidence_has_a_row_for_each_filter(named, images):
    why = explain.explain_prediction(named, images[:1], top=2)[0]
    frame = metrics.to_dataframe(why)
    assert frame["filter"].tolist() == [found.filter for path in (why.standard, why.gated) for found in path.filters]
    assert set(frame["path"]) == {"standard", "gated"}
    assert set(frame["owner"]) == {why.name(why.target)}


def test_all_axes_belong_to_fields():
    for name, axes in metrics.frames.AXES.items():
        kind = next(getattr(place, name) for place in (metrics, measuring, explain) if hasattr(place, name))
        assert set(axes) <= set(kind._fields)


def test_data_frames_say_what_is_missing(monkeypatch):
    with pytest.raises(ValueError, match="one name for each of the 2 classes, but hold 3"):
        metrics.to_dataframe(torch.eye(2), ["a", "b", "c"])
    with pytest.raises(TypeError, match="found dict"):
        metrics.to_dataframe({})
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="data frames need pandas: pip install pandas"):
        metrics.to_dataframe(torch.eye(2))
