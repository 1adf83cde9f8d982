"""One measurement and its readers: every number is known once, computed once, and means the same everywhere."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import timm_csg
from timm_csg import measuring, metrics
from timm_csg.cli.display import result_table
from timm_csg.head import head_on_pooled
from timm_csg.measuring import measurement
from timm_csg.measuring.attacked import attack, normalisation, some_images
from timm_csg.measuring.measures import CLASS_COLUMNS, FILTER_COLUMNS, MEASURES
from timm_csg.numbers import GROUPS, NUMBERS, SUMMARY, notes
from timm_csg.plots.reporting.words import measures

DEFAULT = [name for name, group in GROUPS.items() if not group.needs]


@pytest.fixture
def model(make_model, gated):
    return gated(timm_csg.differentiate(make_model(), mechanism="csg"))


@pytest.fixture
def loader(images, targets):
    return [(images[:2], targets[:2]), (images[2:], targets[2:])]


def test_every_number_has_a_measure_a_group_and_one_entry():
    keys = [number.key for number in NUMBERS]
    assert sorted(keys) == sorted(MEASURES)
    assert {number.group for number in NUMBERS} == set(GROUPS)
    assert {group for _, group, _ in (*CLASS_COLUMNS, *FILTER_COLUMNS)} <= {"", *GROUPS}


def test_numbers_are_json_and_the_groups_that_need_nothing_come_by_default(model, loader):
    found = measuring.measure(model, loader)
    assert list(found.numbers) == [number.key for group in DEFAULT for number in NUMBERS if number.group == group]
    assert json.loads(json.dumps(found.numbers, allow_nan=False)) == found.numbers


def test_numbers_are_those_of_the_metrics(model, loader):
    found = measuring.measure(model, loader).numbers
    seen, gate = measuring.collect(model, loader), model.mechanism.class_filter_matrix()
    mutual = metrics.mutual_information(seen.features, seen.targets, model.num_classes)
    removal = measuring.ablate(model, loader, metrics.owned_filters(gate), model.num_classes)
    expected = {
        "accuracy": metrics.accuracy(seen.logits, seen.targets),
        "mutual_information_score": float(metrics.mutual_information_score(mutual)),
        "gate_density": float(gate.mean()),
        "owner_agreement": float(metrics.owner_agreement(gate, mutual)),
        "chance_agreement": metrics.chance_agreement(gate, mutual),
        "class_without_its_filters": removal.own,
        "other_classes": removal.others,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, nan_ok=True)


def test_single_numbers_are_measured_alone(model, loader, monkeypatch):
    monkeypatch.setitem(MEASURES, "mutual_information_score", None)  # would fail if it were asked for
    assert measuring.measure(model, loader, ["gate_density"]).numbers == {
        "gate_density": pytest.approx(float(model.mechanism.class_filter_matrix().mean()))
    }


def test_a_plain_model_has_no_gate_and_its_filters_belong_to_the_class_they_tell_most_about(make_model, loader):
    found = measuring.measure(make_model(), loader, SUMMARY)
    without = ("gated_accuracy", "gate_density", "owner_agreement", "verdict", "owners_trusted")
    assert {key: found.numbers[key] for key in without} == dict.fromkeys(without)
    assert found.numbers["filter_owners_by"] == "mutual information"
    subject = found.subject
    owned = subject.owners >= 0
    assert torch.equal(subject.owners[owned], metrics.owners(subject.mutual)[owned])
    assert torch.equal(owned, subject.mutual.amax(dim=0) > 0)


@pytest.mark.parametrize("mask", [True, False])
def test_the_verdict_is_told_whether_the_classifier_is_masked(make_model, loader, monkeypatch, mask):
    model = timm_csg.differentiate(make_model(), mechanism="assigned", mask_classifier=mask)
    model.mechanism.project_(model.read_head())
    told = []
    monkeypatch.setattr(metrics, "verdict", lambda *args, **options: told.append(options["masked"]))
    measuring.measure(model, loader, ["verdict"])
    assert told == [mask]


def test_a_filter_without_a_class_is_nobodys_in_tables_and_similarities(model, loader):
    with torch.no_grad():
        model.mechanism.gate[:, 3] = 0
    found = measuring.measure(model, loader, ["gate", "similarity"])
    assert found.filters["owner"][3] == -1
    assert sum(found.numbers["filters_per_class"]) == len(found.filters["owner"]) - 1
    alike = metrics.activation_similarity(found.subject.seen.features)
    kept = torch.arange(len(alike)) != 3
    expected = metrics.summarize_similarity(alike[kept][:, kept], found.subject.owners[kept])
    assert found.numbers["activation_similarity_within"] == pytest.approx(expected.within)


def test_a_head_that_is_not_linear_is_left_out_beyond_the_given_number_of_classes(make_model, loader):
    for name, is_linear in (("test_resnet", True), ("test_convnext", False)):
        found = measuring.measure(make_model(name), loader, ["class_without_its_filters"], most_passes=2).numbers
        assert (found["class_without_its_filters"] is not None) == is_linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": ["acuracy"]}, "no group of metrics 'acuracy'; there are accuracy, "),
        ({"groups": []}, "no group of metrics is named; there are accuracy, information"),
        ({"groups": ["cam_iou"]}, "the metrics 'cam_iou' need --boxes, in Python boxes=..."),
        ({"attacks": ["carlini"]}, "unknown attack carlini; known are fgsm, pgd."),
        ({"attacks": ["pgd"], "eps": [0.0]}, "eps takes strengths in grey levels, more than 0"),
        ({"attacks": ["pgd"], "attack_images": 0}, "attack_images must be at least 1, but is 0."),
        ({"explanations": -1}, "explanations must be a number of images, 0 for none, but is -1."),
        ({"seed": -1}, "seed must be a whole number, 0 or more and below 2**32, but is -1."),
        ({"seed": 0.5}, "seed must be a whole number, 0 or more and below 2**32, but is 0.5."),
        ({"boxes": "nowhere.csv"}, "there is no file of annotations nowhere.csv."),
    ],
)
def test_wrong_options_are_refused_before_the_first_pass(model, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        measuring.measure(model, None, **options)


def test_attacks_clip_by_the_normalisation_of_the_loader(model, images, targets):
    mean, std = [0.2, 0.3, 0.4], [0.3, 0.2, 0.1]
    transform = SimpleNamespace(transforms=[SimpleNamespace(mean=torch.tensor(mean), std=torch.tensor(std))])
    loader = SimpleNamespace(dataset=SimpleNamespace(transform=transform))
    assert normalisation(loader) == {"mean": pytest.approx(mean), "std": pytest.approx(std)}
    subject = SimpleNamespace(model=model, loader=loader, seed=0, tick=lambda images: None)
    found = attack(subject, "fgsm", 8.0, images, targets)
    assert torch.equal(found, measuring.fgsm(model, images, targets, eps=8 / 255, mean=mean, std=std))
    assert not torch.equal(found, measuring.fgsm(model, images, targets, eps=8 / 255))


def test_images_to_attack_are_spread_over_data_sorted_by_class():
    targets = torch.arange(8) // 2
    loader = [
        (torch.arange(8.0)[:5].view(5, 1, 1, 1), targets[:5]),
        (torch.arange(8.0)[5:].view(3, 1, 1, 1), targets[5:]),
    ]
    subject = SimpleNamespace(seen=SimpleNamespace(targets=targets), options={"attack_images": 4}, loader=loader)
    images, chosen = some_images(subject)
    assert images.flatten().tolist() == [0, 2, 4, 7]
    assert chosen.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("option", "columns", "message"),
    [
        ("landmarks", "box_x0,box_y0,box_x1,box_y1\na.png,1,1,5,5", "has no landmarks: columns NAME_x and NAME_y"),
        ("boxes", "head_x,head_y\na.png,1,1", "there is no box named 'box'"),
    ],
)
def test_files_without_what_they_are_for_are_refused_before_the_first_pass(model, tmp_path, option, columns, message):
    path = tmp_path / "marks.csv"
    path.write_text(f"file,{columns}\n")
    with pytest.raises(ValueError, match=message):
        measuring.measure(model, None, **{option: path})


def test_numbers_that_do_not_exist_are_none_so_that_every_json_reader_takes_them(model, images):
    found = measuring.measure(model, [(images, torch.zeros(len(images), dtype=torch.long))]).numbers
    assert None in found.values()
    json.dumps(found, allow_nan=False)


def test_a_value_that_is_not_finite_is_none():
    assert measurement._plain(float("nan")) is None
    assert measurement._plain(torch.tensor(-float("inf"))) is None
    assert measurement._plain(torch.tensor(0.5)) == 0.5


def test_repr_is_one_line_of_the_numbers_that_people_read(model, loader):
    shown = repr(measuring.measure(model, loader, ["accuracy", "gate"]))
    assert re.match(r"Measurement\(accuracy=[01]\.\d{4}, gated_accuracy=[01]\.\d{4}, gate_density=0\.\d{3}, ", shown)
    assert "\n" not in shown
    assert "filters_per_class" not in shown


def test_stages_and_images_are_told(model, loader):
    stages, images = [], []
    measuring.measure(model, loader, ["accuracy", "gate"], progress=images.append, stage=stages.append)
    assert stages == ["images", "accuracy", "gate"]
    assert sum(images) == sum(len(targets) for _, targets in loader)


def test_readers_show_every_number_that_is_marked_for_them(model, loader):
    numbers = measuring.measure(model, loader).numbers | {"seconds": 1.0, "classes": 5, "most_frequent": 0.2}
    numbers |= {"mean_classes": 1.0, "purity_best": 1.0, "information_floor": ""}
    assert len(result_table({"one": numbers}).columns) == 2 + sum(bool(number.head) for number in NUMBERS)
    assert list(measures(numbers)) == [number.key for number in NUMBERS if number.gauge]
    facts = {"mutual_information_bound": 1.0, "least_density": 0.1}
    assert len(notes({number.key for number in NUMBERS}, facts)) == sum(
        any(number.note for number in NUMBERS if number.group == name) or bool(group.note)
        for name, group in GROUPS.items()
    )


def test_accuracy_of_each_class_is_that_of_its_images_alone():
    logits, targets = torch.randn(40, 4), torch.randint(0, 3, (40,))
    found = metrics.accuracy_per_class(logits, targets, 4)
    expected = [metrics.accuracy(logits[targets == label], targets[targets == label]) for label in range(3)]
    assert found[:3].tolist() == pytest.approx(expected)
    assert found[3].isnan()


def test_chance_agreement_is_the_mean_over_shuffled_owners():
    generator = torch.Generator().manual_seed(0)
    gate, mutual = (torch.rand(3, 60, generator=generator) ** 3 for _ in range(2))
    shuffled = [gate[:, torch.randperm(60, generator=generator)] for _ in range(2000)]
    mean = sum(float(metrics.owner_agreement(matrix, mutual)) for matrix in shuffled) / len(shuffled)
    assert metrics.chance_agreement(gate, mutual) == pytest.approx(mean, abs=0.005)


def test_owner_purity_is_that_of_a_loop_over_filters():
    generator = torch.Generator().manual_seed(1)
    features, targets = torch.rand(30, 7, generator=generator), torch.randint(0, 3, (30,), generator=generator)
    owners = torch.tensor([0, 1, 2, -1, 0, 1, 2])
    features[:, 5] = 0.5  # silent
    hits = []
    for index in (0, 1, 2, 4, 6):
        order = sorted(range(30), key=lambda image: -features[image, index])[:9]
        hits += [int(targets[image]) == int(owners[index]) for image in order]
    assert metrics.owner_purity(features, targets, owners) == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_a_model_in_training_is_measured_as_at_inference_and_left_as_found(make_model, loader, name):
    keys = ["accuracy", "ablation", "similarity"]
    model = make_model(name, drop_rate=0.5)
    expected = measuring.measure(model, loader, keys, most_passes=50).numbers
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert measuring.measure(model, loader, keys, most_passes=1).numbers.keys() == expected.keys()
    found = measuring.measure(model, loader, keys, most_passes=50).numbers
    assert found.pop("accuracy_interval") == pytest.approx(expected.pop("accuracy_interval"))
    assert found == pytest.approx(expected, nan_ok=True)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class NormedHead(nn.Module):
    """A head with statistics of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward_head(self, features):
        return self.fc(self.norm(features.mean(dim=(2, 3))))


def test_a_head_in_training_is_tried_at_inference_and_keeps_its_statistics():
    model, responses = NormedHead().eval(), torch.rand(8, 6)
    with torch.no_grad():
        logits = model.forward_head(responses[:, :, None, None])
    head = head_on_pooled(model.train(), responses, logits)
    assert head is not None
    assert model.training
    assert model.norm.running_mean.eq(0).all()
