"""What measure() says of filters beside their floors, and of maps under their judges."""

import pytest
import timm
import torch

import timm_csg
from timm_csg import explain, judging, measuring, metrics
from timm_csg.measuring import judged


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


@pytest.fixture
def annotated(monkeypatch):
    """Boxes and landmarks without a file."""
    points = 32 * torch.rand(12, 3, 2, generator=torch.Generator().manual_seed(0))

    class Marks:
        def object_boxes(self):
            return torch.tensor([[4.0, 4.0, 20.0, 28.0]] * 12)

    Marks.points = points
    monkeypatch.setattr(judged, "read_for", lambda subject, option: Marks())
    return points


@pytest.mark.slow
def test_maps_that_a_model_has_are_judged_on_pictures_spread_evenly(models, loader, annotated):
    for name, model in models.items():
        subject = measuring.measure(model, loader, ["accuracy"], explanations=4).subject
        subject.options["boxes"] = "boxes.csv"
        found = judged.explanations(subject)
        assert set(found) == set(judged.MAPS) - (set() if name == "assigned" else {"evidence_map", "owner_map"})
        rows = [0, 4, 7, 11]
        pictures, targets = torch.cat([batch for batch, _ in loader])[rows], torch.arange(12)[rows] % 4
        expected = judging.judge(explain.cam, model, pictures, targets, judges=["deletion"])["deletion"]
        assert found["cam"]["deletion"]["score"] == pytest.approx(expected.score, abs=1e-6)
        assert {"pointing_game", "random_logit"} <= set(found["cam"])


@pytest.mark.slow
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
    found = measuring.measure(model, [(pictures, targets)], ["explanations"], explanations=60).numbers["explanations"]
    shrunk = judging.grid_pointing_game(explain.grad_cam, model, pictures, targets, side=2, shrink=True)
    assert 0 < shrunk.score < 1
    assert found["grad_cam"]["grid_2x2"]["score"] == pytest.approx(shrunk.score)


def test_numbers_of_filters_come_with_those_of_shuffled_labels(models, loader):
    for model in models.values():
        found = measuring.measure(model, loader, ["gate", "filters"], filters=True, seed=3)
        subject, numbers = found.subject, found.numbers
        used = subject.owners >= 0
        expected = judging.judge_filters(subject.seen.features, subject.seen.targets, 4, used=used, seed=3)
        for name in ("purity", "class_selectivity", "class_independence"):
            assert numbers[name] == pytest.approx(expected[name].score, abs=1e-6)
            assert numbers[f"{name}_floor"] == pytest.approx(expected[name].chance, abs=1e-6)
        assert numbers["contrastiveness"] == pytest.approx(expected["contrastiveness"].score)
        assert numbers["mono_score"] is None


def test_relearning_fits_on_one_half_and_counts_on_the_other(models, loader):
    found = measuring.measure(models["assigned"], loader, ["filters"], filters=True)
    seen, owned = found.subject.seen, found.subject.owned
    of_class = [(seen.targets == index).nonzero()[:, 0] for index in range(4)]  # three images of each
    fit = torch.cat([own[[0, 2]] for own in of_class[::2]] + [own[[1]] for own in of_class[1::2]])
    rest = torch.tensor([row for row in range(12) if row not in fit.tolist()])
    held_out = (seen.features[rest], seen.targets[rest])
    expected = metrics.relearning(seen.features[fit], seen.targets[fit], owned, held_out, 4)
    assert found.numbers["relearnt_class"] == pytest.approx(float(expected.after.nanmean()))
    assert found.numbers["relearnt_class_before"] == pytest.approx(float(expected.before.nanmean()))


def test_sid5_takes_the_five_largest_weights_of_the_predicted_class(models, loader):
    model = models["standard"]
    numbers = measuring.measure(model, loader, ["sid5"], filters=True).numbers
    pictures = torch.cat([batch for batch, _ in loader])
    best = model.fc.weight.topk(5, dim=1).indices[model(pictures).argmax(dim=1)]
    maps = explain.filter_maps(model, pictures, upsample=False)
    own = torch.stack([one[rows] for one, rows in zip(maps, best, strict=True)])
    assert numbers["sid5"] == pytest.approx(float(metrics.spatial_diversity(own).mean()), abs=1e-5)


def test_mono_score_takes_the_named_encoder(models, loader, monkeypatch):
    encoder = timm.create_model("test_byobnet", num_classes=0).eval()
    monkeypatch.setattr(judged.timm, "create_model", lambda name, pretrained, num_classes: encoder)
    found = measuring.measure(models["standard"], loader, ["mono_score"], encoder="test_byobnet")
    embeddings = judging.embed(encoder, loader)
    used = found.subject.owners >= 0
    expected = metrics.mono_score(found.subject.seen.features[:, used], embeddings).mean()
    assert found.numbers["mono_score"] == pytest.approx(float(expected), abs=1e-5)


def test_parts_are_judged_with_landmarks_of_other_pictures_for_a_floor(models, loader, annotated):
    subject = measuring.measure(models["standard"], loader, ["accuracy"]).subject
    found = judged.parts(subject)
    places = measuring.collect_peaks(models["standard"], loader).place
    options = {"half_side": 36 / 224 * 32}
    expected = judging.part_consistency(places, annotated, torch.arange(12) % 4, subject.owners, **options)
    assert found["consistency"][:2] == expected[:2]
    assert 0 <= found["stability"].score <= 1


def test_a_number_below_zero_is_refused(models, loader):
    with pytest.raises(ValueError, match="explanations must be a number of images"):
        measuring.measure(models["standard"], loader, explanations=-1)
