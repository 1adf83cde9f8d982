"""timm-csg evaluate --explanations, --filters, --encoder: what metrics.json and the tables say."""

import json

import pytest
import timm
import torch

import timm_csg
from timm_csg import explain, judging, metrics
from timm_csg.checkpoint import save_plain
from timm_csg.cli import judges, main


@pytest.fixture
def models():
    """A plain model and one with assigned filters, that know nothing."""
    plain = timm.create_model("test_resnet", num_classes=4).eval()
    torch.nn.init.normal_(plain.fc.weight)
    assigned = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=4).eval(), mechanism="assigned")
    torch.nn.init.normal_(assigned.fc.weight)
    return {"standard": plain, "assigned": assigned}


@pytest.fixture
def loader():
    pictures = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return list(zip(pictures.split(5), (torch.arange(12) % 4).split(5), strict=True))


def test_maps_that_a_model_has_are_judged_on_pictures_spread_evenly(models, loader):
    boxes = torch.tensor([[4.0, 4.0, 20.0, 28.0]] * 12)
    for name, model in models.items():
        found = judges.judge_explanations(model, loader, boxes=boxes, total=12, images=4)
        has = set(judges.MAPS) - (set() if name == "assigned" else {"evidence_map"})
        assert set(found) == has
        rows = [0, 4, 7, 11]
        pictures, targets = torch.cat([batch for batch, _ in loader])[rows], torch.arange(12)[rows] % 4
        expected = judging.judge(explain.cam, model, pictures, targets, judges=["deletion"])["deletion"]
        assert found["cam"]["deletion"]["score"] == pytest.approx(expected.score, abs=1e-6)
        assert {"pointing_game", "random_logit"} <= set(found["cam"])


def test_grids_are_shrunk_for_models_of_a_fixed_input_size(make_model):
    model = make_model("test_vit", num_classes=4, global_pool="avg")
    pictures = torch.rand(60, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.weight.mul_(1000)
        model.head.bias.zero_()
        logits = model(pictures)
        model.head.bias.sub_(logits.mean(dim=0))
        targets = model(pictures).argmax(dim=1)  # sure of all of them
    assert len(targets.unique()) == 4
    found = judges.judge_explanations(model, [(pictures, targets)], total=60, images=60)
    assert 0 < found["grad_cam"]["grid_2x2"]["score"] < 1


def test_filters_are_judged_with_a_floor(models, loader):
    features, targets = torch.rand(12, 96, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 4
    used = torch.arange(96) < 10
    found = judges.judge_the_filters(models["standard"], loader, features, targets, targets, 4, used=used)
    assert set(found) == {"purity", "class_selectivity", "class_independence", "contrastiveness", "sid5"}
    expected = judging.judge_filters(features, targets, 4, used=used)
    assert found["purity"] == {"score": expected["purity"].score, "floor": expected["purity"].chance}


def test_sid5_takes_the_five_largest_weights_of_the_predicted_class(models, loader):
    model = models["standard"]
    found = judges.judge_the_filters(
        model,
        loader,
        torch.rand(12, 96),
        torch.arange(12) % 4,
        torch.ones(12).long(),
        4,
        used=torch.ones(96, dtype=torch.bool),
    )
    best = model.fc.weight[1].topk(5).indices
    maps = explain.filter_maps(model, torch.cat([batch for batch, _ in loader]), best, upsample=False)
    assert found["sid5"]["score"] == pytest.approx(float(metrics.spatial_diversity(maps).mean()), abs=1e-5)


def test_the_command_writes_and_prints_what_was_judged(tmp_path, capsys):
    model = timm.create_model("test_resnet", num_classes=10)
    save_plain(model, tmp_path / "model")
    main(
        [
            "evaluate",
            str(tmp_path / "model"),
            "--output",
            str(tmp_path / "out"),
            "--metrics",
            "accuracy",
            "--data",
            "digits",
            "--explanations",
            "--explanation-images",
            "6",
            "--filters",
        ]
    )
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    (found,) = results["checkpoints"].values()
    assert {"cam", "grad_cam", "centre"} <= set(found["explanations"])
    assert set(found["explanations"]["cam"]["deletion"]) == {"score", "chance", "standard_error"}
    assert set(found["filters_judged"]["purity"]) == {"score", "floor"}
    shown = capsys.readouterr()
    assert "explanation maps (chance in brackets)" in shown.out + shown.err


def test_parts_are_judged_with_landmarks_of_other_pictures_for_a_floor(models, loader):
    points, owners = 32 * torch.rand(12, 3, 2, generator=torch.Generator().manual_seed(0)), torch.arange(96) % 5 - 1
    found = judges.judge_parts(models["standard"], loader, points, owners)
    places = metrics.collect_peaks(models["standard"], loader).place
    expected = judging.part_consistency(places, points, torch.arange(12) % 4, owners, half_side=36 / 224 * 32)
    assert found["part_consistency"] == {"score": expected.score, "floor": expected.chance}
    assert 0 <= found["part_stability"]["score"] <= 1


def test_nothing_judged_no_table():
    assert list(judges.tables({"checkpoints": {"a": {"accuracy": 1.0}}})) == []
