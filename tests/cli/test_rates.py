"""Accuracies in the terminal come with an interval, for two and three classes with sensitivity and specificity."""

import torch

from timm_csg import measuring, metrics
from timm_csg.cli.display import intervals


def test_line_says_interval_and_rates_by_name():
    found = {
        "accuracy": 0.75,
        "accuracy_interval": [0.3, 0.95],
        "sensitivity": [[1.0, 0.34, 1.0], [0.5, 0.09, 0.91]],
        "specificity": [[0.5, 0.09, 0.91], None],
    }
    line = "accuracy 0.750 (95 % interval 0.300 to 0.950); "
    line += "sensitivity: cat 1.000 (0.340 to 1.000), dog 0.500 (0.090 to 0.910); "
    line += "specificity: cat 0.500 (0.090 to 0.910)"
    assert intervals({"one": found}, ["cat", "dog"]) == [f"one: {line}"]
    assert intervals({"one": found | {"class_names": ["cat", "dog"]}}) == [f"one: {line}"]
    assert intervals({"one": found})[0].count("0 1.000 (0.340 to 1.000), 1 0.500") == 1


def test_runs_of_before_have_no_line():
    assert intervals({"one": {"accuracy": 0.75}}) == []


def test_measured_rates_are_those_of_the_metrics(make_model, images):
    model, targets = make_model(num_classes=3), torch.tensor([0, 2, 2])
    numbers = measuring.measure(model, [(images, targets)], ["accuracy"]).numbers
    seen = measuring.collect(model, [(images, targets)])
    rates = metrics.class_rates(seen.logits, seen.targets, 3)
    assert numbers["accuracy_interval"] == list(metrics.accuracy_interval(seen.logits, seen.targets)[1:])
    assert numbers["sensitivity"][1] is None
    assert numbers["sensitivity"][2] == [float(rates.sensitivity[2]), *rates.sensitivity_interval[2].tolist()]
    assert numbers["specificity"][0] == [float(rates.specificity[0]), *rates.specificity_interval[0].tolist()]


def test_many_classes_have_their_rates_in_the_table_only(make_model, images, targets):
    found = measuring.measure(make_model(), [(images, targets)], ["accuracy"])
    assert found.numbers["sensitivity"] is None
    assert "specificity" in found.classes
