"""The two-class page: the largest confusions first, with the numbers of explain.contrast, one colour for a filter."""

import re

import pytest
import timm
import torch
from plots.colours import batches, coloured

import timm_csg
from timm_csg import explain
from timm_csg.plots import filter_colour, report
from timm_csg.plots.reporting.book import Limits, make_book
from timm_csg.plots.reporting.findings import find_out
from timm_csg.plots.reporting.pairs import make_pairs

NAMES = ["red", "green", "<b>blue</b>", "grey"]


@pytest.fixture(scope="module")
def confused():
    """A model that knows nothing, its images, and its page."""
    torch.manual_seed(1)
    model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=4)).eval()
    torch.nn.init.normal_(model.fc.weight)
    model.project_()
    loader = batches(*coloured(48, seed=3))
    findings = find_out(model, loader)
    book = make_book(model, loader, findings, NAMES, None, None, Limits())
    return model, loader, findings, make_pairs(model, loader, book)


def test_pairs_are_the_largest_confusions_first(confused):
    _, _, findings, pairs = confused
    assert [(pair.label, pair.taken, pair.images) for pair in pairs] == findings.confusions()[:12]
    assert [pair.images for pair in pairs] == sorted((pair.images for pair in pairs), reverse=True)
    for pair in pairs:
        assert (int(findings.targets[pair.shown]), int(findings.predictions[pair.shown])) == (pair.label, pair.taken)
        same = (findings.targets == pair.label) & (findings.predictions == pair.taken)
        assert findings.confidence[pair.shown] == findings.confidence[same].max()


def test_parts_are_those_of_the_contrast_and_sum_to_the_difference(confused):
    model, loader, _, pairs = confused
    images = torch.cat([batch for batch, _ in loader])
    for pair in pairs:
        found = explain.contrast(model, images[pair.shown : pair.shown + 1], pair.taken, pair.label)
        assert [part.filter for part in pair.parts] == [*found.filters[0].tolist(), -1, -2]
        assert sum(part.adds for part in pair.parts) == pytest.approx(float(found.difference[0]), abs=1e-4)
        assert pair.difference > 0
        assert pair.deciding == int(found.deciding.sum())
        assert [part.colour for part in pair.parts[:5]] == [filter_colour(part.filter) for part in pair.parts[:5]]


def test_page_shows_them_with_names_escaped_and_the_filters_colours(confused, tmp_path):
    model, loader, _, pairs = confused
    text = report(model, loader, tmp_path / "report.html", class_names=NAMES).read_text(encoding="utf-8")
    page = re.search(r'<section class="page" id="pairs".*?</section>', text, re.DOTALL)[0]
    assert '<a href="#pairs">Two classes</a>' in text
    assert page.count("<article") == len(pairs)
    assert "<b>" not in page
    for pair in pairs:
        for part in pair.parts:
            assert f">{part.adds:+.2f}</td>" in page
            assert page.count(f'fill="{part.colour}"') >= 1


def test_model_without_errors_says_so(trained, loader, tmp_path):
    model, _ = trained
    right = [
        (images[labels == model(images).argmax(dim=1)], labels[labels == model(images).argmax(dim=1)])
        for images, labels in loader
    ]
    text = report(model, right, tmp_path / "report.html", class_names=NAMES).read_text(encoding="utf-8")
    assert "No image of the classes with a page was misclassified" in text
