"""The page about a report: what it says, and that it gives no folder away."""

import hashlib
from datetime import datetime, timezone

import pytest
from cli.folders_of_pictures import make_splits, train

import timm_csg
from timm_csg import plots
from timm_csg.cli import main
from timm_csg.cli.report import command_in_words, provenance

NOON = datetime(2026, 11, 26, 12, 0, tzinfo=timezone.utc)


def test_rows_say_date_weights_data_and_seed(tmp_path, tiny_model):
    folder = timm_csg.save_pretrained(timm_csg.differentiate(tiny_model), tmp_path / "model")
    rows = provenance(folder, seed=7, data="84 images", now=NOON)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert rows == {
        "Date": "2026-11-26 12:00 UTC",
        "Weights": f"model.safetensors, SHA-256 {weights}",
        "Data": "84 images",
        "Seed of the training": "7",
    }


def test_what_is_not_known_is_left_out():
    assert provenance(None, now=NOON) == {"Date": "2026-11-26 12:00 UTC"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/opt/bin/timm-csg", "train"], "timm-csg train"),
        (["/x/timm_csg/__main__.py", "report", "/home/me/run"], "timm-csg report run"),
        (["timm-csg", "report", "../runs/a b", "--title", "A title"], "timm-csg report 'a b' --title 'A title'"),
        (["timm-csg", "report", "user/name", "--output=/tmp/x.html"], "timm-csg report user/name --output=x.html"),
        (["timm-csg", "train", "--data", "folder:/home/me/photos"], "timm-csg train --data folder:photos"),
        (["timm-csg", "report", "~/run", "--data", "torch/cifar10"], "timm-csg report run --data torch/cifar10"),
    ],
)
def test_command_is_shown_without_folders(arguments, words):
    assert command_in_words(arguments) == words


def test_page_about_shows_the_rows_escaped(tmp_path, tiny_model, images, targets):
    loader = [(images, targets)]
    plain, told = (
        plots.report(tiny_model, loader, tmp_path / f"{at}.html", about=about).read_text(encoding="utf-8")
        for at, about in enumerate([None, {"Command": "timm-csg <b>", "Date": "today"}])
    )
    assert "<dt>Command</dt><dd>timm-csg &lt;b&gt;</dd>" in told
    assert "<dt>Date</dt><dd>today</dd>" in told
    assert "<dt>Date</dt>" not in plain


def test_report_of_a_run_says_where_it_comes_from(tmp_path):
    data = make_splits(tmp_path / "photos", ["cat", "dog"])
    assert train(data, tmp_path / "run", "--recipe", "assigned", "--seed", 11) == 0
    for again in (False, True):
        if again:
            assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "run" / "report.html")]) == 0
        page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        assert "<dt>Seed of the training</dt><dd>11</dd>" in page
        weights = hashlib.sha256((tmp_path / "run" / "model" / "model.safetensors").read_bytes()).hexdigest()
        assert f"SHA-256 {weights}" in page
        assert "<dt>Data</dt><dd>photos" in page
        assert str(tmp_path) not in page
