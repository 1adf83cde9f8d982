"""The report as a file: its numbers are those of the metrics, nothing escapes, nothing is missing or too large."""

import base64
import hashlib
import html
import io
import json
import re
import sys
from html.parser import HTMLParser

import pytest
import timm
import torch
from PIL import Image
from plots.colours import CLASS_NAMES, batches, coloured

import timm_csg
from timm_csg import explain, measuring, metrics
from timm_csg.plots import report
from timm_csg.plots.reporting.book import Limits, make_book, place_in_words
from timm_csg.plots.reporting.facts import filter_facts
from timm_csg.plots.reporting.findings import find_out
from timm_csg.plots.reporting.pictures import Pictures, displayable, fetch_images


class Outline(HTMLParser):
    """Tags, ids, links and attributes of a page; checks that elements close in the order they opened."""

    void = ("meta", "link", "img", "br", "input", "rect")
    optional = ("td",)

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.faults = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name == "href"]
        if tag not in self.void and tag not in self.optional:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag in self.optional:
            return
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"{tag} at {self.getpos()}")


@pytest.fixture(scope="module")
def text(report_file):
    return report_file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def outline(text):
    return Outline(text)


def visible(text):
    """The words of a page, without markup, style and scripts."""
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_numbers_are_those_of_the_metrics(text, trained, loader):
    model, standard = trained
    seen = measuring.collect(model, loader)
    mutual = metrics.mutual_information(seen.features, seen.targets, 4)
    gate = model.mechanism.class_filter_matrix()
    ablation = measuring.ablate(model, loader, metrics.owners(gate), 4)
    score = float(metrics.mutual_information_score(mutual))
    bound = float(metrics.mutual_information_bound(seen.targets, 4).max())
    words = visible(text)
    expected = [
        f"Correct answers {metrics.accuracy(seen.logits, seen.targets):.1%}",
        f"Correct answers from own filters only {metrics.accuracy(seen.gated_logits, seen.targets):.1%}",
        f"Classes per filter {float(gate.sum(dim=0).mean()):.2f}",
        f"(gate density {float(metrics.gate_density(gate)):.3f})",
        f"Filters that reveal most about their owner {float(metrics.owner_agreement(gate, mutual)):.1%}",
        f"A class without its own filters {ablation.own:.1%}",
        f"Meanwhile {ablation.others:.1%} of the other classes' images are recognised",
        f"Information per filter {score / bound:.1%}",
        f"({score:.3f} of {bound:.3f} nats of mutual information, ",
    ]
    theirs = measuring.collect(standard, loader)
    their_mutual = metrics.mutual_information(theirs.features, theirs.targets, 4)
    expected += [
        f"standard model: {metrics.accuracy(theirs.logits, theirs.targets):.1%}",
        f"standard model: {float(metrics.mutual_information_score(their_mutual)) / bound:.1%}",
    ]
    assert [phrase for phrase in expected if phrase not in words] == []


def test_accuracies_come_with_their_intervals(text, trained, loader):
    seen = measuring.collect(trained[0], loader)
    accuracy = metrics.accuracy_interval(seen.logits, seen.targets)
    assert f"expect {accuracy.low:.1%} to {accuracy.high:.1%} (95% interval)" in visible(text)


def test_few_classes_have_sensitivity_and_specificity(tmp_path):
    model = timm.create_model("test_resnet", num_classes=2).eval()
    images, targets = torch.rand(12, 3, 32, 32), torch.arange(12) % 2
    words = visible(report(model, [(images, targets)], tmp_path / "two.html").read_text(encoding="utf-8"))
    rates = metrics.class_rates(measuring.collect(model, [(images, targets)]).logits, targets, 2)
    for name in ("sensitivity", "specificity"):
        share, (low, high) = getattr(rates, name)[1], getattr(rates, f"{name}_interval")[1]
        assert f"{name.capitalize()} {share:.1%} (95% interval {low:.1%} to {high:.1%})." in words


def test_tables_and_script_hold_the_matrices(text, trained, loader):
    model, _ = trained
    gate = model.mechanism.class_filter_matrix()
    seen = measuring.collect(model, loader)
    mutual = metrics.mutual_information(seen.features, seen.targets, 4)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])
    for key, matrix in (("gate", gate), ("mutual", mutual)):
        stored = torch.tensor(data["matrices"][key]["values"])
        assert torch.allclose(stored.double(), matrix.double(), atol=1e-4)
    table = re.search(r"<summary>Gate as a table</summary>.*?<tbody>(.*?)</tbody>", text, re.DOTALL)[1]
    rows = [[float(value) for value in re.findall(r"<td>([\d.]+)", row)] for row in table.split("</tr>")[:-1]]
    assert torch.allclose(torch.tensor(rows), gate.T, atol=0.005001)


def test_both_matrices_keep_the_order_of_the_gate(text, trained, loader):
    findings = find_out(trained[0], loader)
    gate, mutual = findings.gate, findings.mutual
    expected = sorted(
        range(24), key=lambda index: (int(gate[:, index].argmax()), -gate[:, index].max(), -mutual[:, index].max())
    )
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])
    assert data["order"] == expected
    assert sorted(mutual.argmax(dim=0)[expected].tolist()) != mutual.argmax(dim=0)[expected].tolist()
    pictures = re.findall(r'class="still" src="data:image/png;base64,([^"]+)"', text)
    for picture, matrix in zip(pictures, (gate, mutual), strict=True):
        drawn = Image.open(io.BytesIO(base64.b64decode(picture))).getchannel("A")
        scale = 255 if matrix is gate else 255 / float(mutual.max())
        opacity = (matrix[:, expected].float() * scale).round().long()
        assert torch.tensor(list(drawn.getdata())).view(4, 24).sub(opacity).abs().max() <= 1


def test_explained_image_says_what_shown_and_own_filters_contribute(trained, loader, tmp_path):
    model = trained[0]
    findings = find_out(model, loader)
    book = make_book(model, loader, findings, CLASS_NAMES, "", None, Limits())
    words = visible(report(model, loader, tmp_path / "report.html").read_text(encoding="utf-8"))
    for answer in book.answers.values():
        shown = [found.share for found in answer.evidence.filters if found.contribution > 0]
        name, owned = answer.predicted, int((findings.owners == answer.predicted).sum())
        those = "filter below contributes" if len(shown) == 1 else f"{len(shown)} filters below contribute"
        expected = f"gives “{name}” a probability of {answer.confidence:.1%}. "
        expected += f"The {those} {sum(shown):.1%} of the evidence for it" if shown else ""
        together = f"; all {owned} filters owned by “{name}” together, {answer.evidence.owned_share:.1%}."
        assert expected + (together if owned and shown else "") in words


def test_filter_that_falls_silent_for_a_class_says_so(trained, loader):
    findings = find_out(trained[0], loader)
    label, other = int(findings.mutual[:, 5].argmax()), findings.responses[:, 5].clone()
    other[label] = other.min() - 1
    findings.responses[:, 5] = other
    assert filter_facts(findings, 5).by_silence
    findings.responses[label, 5] = other.max() + 1
    assert not filter_facts(findings, 5).by_silence


def test_overview_gives_the_verdict_of_the_metrics(text, trained, loader):
    model, standard = trained
    seen, theirs = measuring.collect(model, loader), measuring.collect(standard, loader)
    gate = model.mechanism.class_filter_matrix()
    verdict = metrics.verdict(
        gate,
        seen.features,
        seen.targets,
        accuracy=metrics.accuracy(seen.logits, seen.targets),
        removal=measuring.ablate(model, loader, metrics.owners(gate), 4),
        standard_accuracy=metrics.accuracy(theirs.logits, theirs.targets),
        masked=True,
    )
    words = visible(text)
    assert f"{verdict.sentence} {verdict.advice}".strip() in words
    assert ("the owners cannot be trusted, so owners and shares mean little" in words) is not verdict.trusted


def test_strongest_images_are_those_of_explain(trained, loader):
    model, _ = trained
    findings = find_out(model, loader)
    expected = explain.strongest_images(model, loader, top=9, by="mean")
    assert torch.equal(findings.strongest, expected.indices)


@pytest.mark.parametrize("which", [0, 1])
def test_removal_from_pooled_responses_is_that_of_metrics(which, trained, loader):
    model = trained[which]
    findings = find_out(model, loader)
    expected = measuring.ablate(model, loader, findings.owners, 4)
    assert torch.equal(findings.ablation.after, expected.after)
    assert torch.equal(findings.ablation.before, expected.before)


def test_class_names_and_title_cannot_become_markup(text, outline):
    assert "<script>alert" not in text
    assert "Colours &amp; &lt;squares&gt;" in text
    assert "&lt;script&gt;alert(&#39;blue&#39;)&lt;/script&gt;" in text
    assert [attributes.get("type") for tag, attributes in outline.tags if tag == "script"] == [
        None, "application/json", None
    ]  # fmt: skip
    assert not any(name.startswith("on") for _, attributes in outline.tags for name in attributes)


def test_policy_names_exactly_what_the_file_holds(text):
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1])
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        for content in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL):
            assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in policy
    assert " style=" not in re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)


def test_nothing_is_fetched_from_elsewhere(text, outline):
    addresses = [
        value for _, attributes in outline.tags for name, value in attributes.items() if name in ("src", "href")
    ]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert set(re.findall(r"url\((\w+):", text)) <= {"data"}
    assert "http" not in visible(text)


def test_markup_is_well_formed_and_every_link_has_its_place(outline):
    assert outline.faults == []
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    assert {link[1:] for link in outline.links if link.startswith("#")} <= set(outline.ids)


def test_every_picture_has_words_and_every_table_heads(outline):
    pictures = [attributes for _, attributes in outline.tags if attributes.get("role") == "img"]
    assert len(pictures) > 100
    assert all(picture["aria-label"] for picture in pictures)
    assert all(attributes["alt"] for tag, attributes in outline.tags if tag == "img")
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in outline.tags if tag == "th")
    assert sum(tag == "h1" for tag, _ in outline.tags) == sum(
        attributes.get("class") == "page" for _, attributes in outline.tags
    )


def test_every_class_and_filter_has_a_page(outline):
    assert {f"class-{label}" for label in range(4)} | {f"filter-{index}" for index in range(24)} <= set(outline.ids)


def test_same_input_gives_the_same_bytes(report_file, trained, loader, tmp_path):
    model, standard = trained
    again = report(
        model, loader, tmp_path / "again.html", class_names=CLASS_NAMES, reference=standard, title="Colours & <squares>"
    )
    assert again.read_bytes() == report_file.read_bytes()


def test_plain_model_gets_owners_by_mutual_information(trained, loader, tmp_path):
    words = visible(report(trained[1], loader, tmp_path / "plain.html").read_text(encoding="utf-8"))
    assert "Training did not give the filters owners" in words
    assert "Owners by mutual information" in words
    assert "Correct answers from own filters only" not in words


def test_model_with_label_gate_is_not_credited_with_labels(make_model, loader, tmp_path):
    model = timm_csg.differentiate(make_model(num_classes=4), mechanism="csg")
    words = visible(report(model, loader, tmp_path / "label.html").read_text(encoding="utf-8"))
    assert "Correct answers from own filters only" not in words


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_mambaout"])
def test_every_layout_gets_a_report(name, make_model, images, tmp_path):
    loader = batches(images.repeat(4, 1, 1, 1) + 0.1 * torch.randn(12, 3, 64, 64), torch.arange(12) % 5, size=6)
    model = timm_csg.differentiate(make_model(name), mechanism="csg")
    text = report(model, loader, tmp_path / "report.html").read_text(encoding="utf-8")
    assert Outline(text).faults == []
    assert "responds most at the" in text


def test_large_model_is_shown_in_part_and_says_so(tmp_path):
    model = timm.create_model("test_resnet", num_classes=130).eval()
    images, targets = torch.rand(140, 3, 32, 32), torch.arange(140) % 130
    text = report(model, batches(images, targets, 70), tmp_path / "large.html").read_text(encoding="utf-8")
    assert text.count('class="page" id="class-') == 100
    assert "The 100 classes with the most images have a page and are drawn; the other 30 count" in visible(text)
    assert text.count('class="card"') == 8
    table = re.search(r'id="class-table".*?<tbody>(.*?)</tbody>', text, re.DOTALL)[1]
    assert table.count("<tr>") == 130
    assert Outline(text).faults == []


def test_filters_shown_are_the_best_of_each_class_in_turn(trained, loader):
    model, _ = trained
    findings = find_out(model, loader)
    book = make_book(model, loader, findings, CLASS_NAMES, "", None, Limits(filters=8, strongest=3, explained=8))
    assert len(book.filters) == 8
    best = {findings.filters_of(label)[0] for label in range(4) if findings.filters_of(label)}
    assert best <= set(book.filters)


def test_thumbnails_shrink_until_they_fit():
    images = {number: torch.rand(3, 160, 160, generator=torch.Generator().manual_seed(number)) for number in range(6)}
    assert Pictures(images, budget=10**6).side == 160
    small = Pictures(images, budget=15_000)
    assert small.side < 160
    for number in images:
        small.image(number)
    assert len(small.style()) < 25_000


def test_too_large_a_file_is_made_again_with_less(trained, loader, tmp_path, monkeypatch):
    whole = report(trained[0], loader, tmp_path / "whole.html").stat().st_size
    monkeypatch.setattr(sys.modules["timm_csg.plots.reporting"], "_MOST_BYTES", whole * 4 // 5)
    part = report(trained[0], loader, tmp_path / "part.html")
    assert part.stat().st_size <= whole * 4 // 5


def test_shuffling_loader_is_refused(trained, tmp_path):
    class Shuffled:
        def __init__(self):
            self.images, self.targets = coloured(64, seed=2)

        def __iter__(self):
            order = torch.randperm(64)
            return iter(batches(self.images[order], self.targets[order]))

    path = tmp_path / "report.html"
    with pytest.raises(ValueError, match="different order every time"):
        report(trained[0], Shuffled(), path)
    assert list(tmp_path.iterdir()) == []


def test_names_and_reference_that_do_not_fit_are_refused(trained, loader, make_model, tmp_path):
    with pytest.raises(ValueError, match="4 classes, but there are 2 class names"):
        report(trained[0], loader, tmp_path / "report.html", class_names=["a", "b"])
    with pytest.raises(ValueError, match="the reference has 5"):
        report(trained[0], loader, tmp_path / "report.html", reference=make_model())


def test_failed_report_leaves_the_one_before(trained, loader, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("before")
    monkeypatch.setattr(sys.modules["timm_csg.plots.reporting"], "_html", lambda *book: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report(trained[0], loader, path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_model_is_left_as_found(trained, loader, tmp_path):
    model = trained[0]
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    report(model, loader, tmp_path / "report.html")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    model.eval()


def test_images_are_found_again_through_the_data_set():
    data = [(torch.full((1, 2, 2), float(index)), index % 2) for index in range(10)]
    loader = torch.utils.data.DataLoader(data, batch_size=3)
    targets = torch.arange(10) % 2
    found = fetch_images(loader, [7, 2, 7], targets)
    assert {index: float(image.mean()) for index, image in found.items()} == {2: 2.0, 7: 7.0}
    plain = fetch_images(list(loader), [7, 2], targets)
    assert all(torch.equal(plain[index], found[index]) for index in (2, 7))


def test_normalisation_is_undone(make_model):
    model = make_model()
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    pixels = torch.rand(3, 8, 8)
    assert torch.allclose(displayable((pixels - mean) / std, model), pixels, atol=1e-6)
    assert torch.allclose(displayable(2 * pixels[:1] - 1, model), pixels[:1], atol=1e-6)


@pytest.mark.parametrize(("cell", "words"), [((0, 0), "upper left"), ((2, 2), "centre"), ((4, 2), "lower")])
def test_places_have_names(cell, words):
    heat = torch.zeros(5, 5)
    heat[cell] = 1
    assert place_in_words(heat) == words


def test_filters_without_a_class_have_no_owner(make_model, loader, tmp_path):
    model = timm_csg.differentiate(make_model(num_classes=4), mechanism="assigned", filters_per_class=2)
    timm_csg.assign_filters(model, loader)
    findings = find_out(model, loader)
    assert torch.bincount(findings.owners + 1).tolist() == [88, 2, 2, 2, 2]
    assert findings.owners[findings.order].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] + [-1] * 88
    page = report(model, loader, tmp_path / "report.html").read_text(encoding="utf-8")
    unowned = (findings.owners < 0) & ~findings.silent
    assert visible(page).count("Training gave it no class") == int(unowned.sum()) > 0
    assert Outline(page).faults == []


def test_open_gate_is_not_called_ownership(make_model, loader, tmp_path):
    model = timm_csg.differentiate(make_model(num_classes=4), mechanism="csg", initial_gate=0.9)
    words = visible(report(model, loader, tmp_path / "open.html").read_text(encoding="utf-8"))
    assert "The owners of the filters cannot be trusted: " in words
    assert "the evidence for a class comes from its own filters" not in words


def test_filters_with_a_mask_have_a_category_and_no_gate(make_model, loader, tmp_path):
    model = timm_csg.differentiate(make_model(num_classes=4), mechanism="icnn").train()
    with torch.no_grad():
        for images, targets in loader:
            model(images, targets, paths=("gated",))
    page = report(model.eval(), loader, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The owners of the filters cannot be trusted: " in visible(page)  # it is not trained
    assert "the trained category" in visible(page)
    assert "gate density" not in visible(page)


def test_half_characters_of_a_folder_name_are_written_as_their_codes(tmp_path):
    model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=2), mechanism="csg")
    images = [(torch.rand(4, 3, 32, 32), torch.arange(4) % 2)]
    path = report(model, images, tmp_path / "report.html", class_names=["caf\udce9", "tea"], title="\udce9")
    assert "caf\\udce9" in path.read_text(encoding="utf-8")


def test_images_of_one_class_are_refused(tmp_path):
    model = timm.create_model("test_resnet", num_classes=2)
    with pytest.raises(ValueError, match="two classes or more, but all 4 images are of class 1"):
        report(model, [(torch.rand(4, 3, 32, 32), torch.ones(4, dtype=torch.long))], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = timm.create_model("test_resnet", num_classes=2)
    images = [(torch.rand(4, 3, 32, 32), torch.arange(4) % 2)]
    assert report(model, images, "~/report.html") == tmp_path / "report.html"
