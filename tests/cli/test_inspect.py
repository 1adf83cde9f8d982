"""timm-csg inspect: what it says of models of every tier, and what it does without."""

import json

import pytest
import timm
import torch
from rich.console import Console

import timm_csg
from timm_csg import explain, metrics
from timm_csg.checkpoint import save_plain
from timm_csg.cli import main
from timm_csg.cli.inspect import inspect
from timm_csg.cli.inspect_view import _ranges, inspection_view
from timm_csg.head import probe_head


def applying(found, what="explanations"):
    return [one["name"] for one in found[what] if one["applies"]]


@pytest.fixture
def saved(make_model, gated, tmp_path):
    model = gated(timm_csg.differentiate(make_model(), mechanism="assigned", solo_weight=2.0))
    folder = tmp_path / "mine"
    timm_csg.save_pretrained(model, folder, metrics={"recipe": "assigned", "data": "pets", "accuracy": 0.5})
    return model, folder


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_mambaout", "test_vit", "test_efficientnet"])
def test_stage_and_head_are_those_of_the_real_model(name):
    found, model = inspect(name), timm.create_model(name)
    stage = timm_csg.find_stage(model)
    assert found["stage"] == {key: getattr(stage, key) for key in ("name", "num_filters", "layout", "grid", "signed")}
    assert found["head"]["kind"] == probe_head(model, stage.num_filters)
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["supported"]


@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout", "test_efficientnet"])
def test_explanations_that_apply_are_those_that_run(name):
    model, images = timm.create_model(name).eval(), torch.rand(1, 3, 64, 64)
    found = applying(inspect(name))
    for method in ("guided_backprop", "cam", "grad_cam", "guided_grad_cam", "filter_maps"):
        try:
            getattr(explain, method)(model, images)
            runs = True
        except ValueError:
            runs = False
        assert (method in found) == runs, method


def test_head_that_reads_a_class_token_has_no_cam():
    found = inspect("test_vit")
    reasons = {one["name"]: one["reason"] for one in found["explanations"]}
    assert reasons["grad_cam"] == "the head reads a class token only"
    assert "GELU" in reasons["guided_backprop"]


def test_gate_is_counted_without_being_made():
    [csg] = [one for one in inspect("test_resnet")["mechanisms"] if one["name"] == "csg"]
    assert csg == {"name": "csg", "applies": True, "reason": None, "parameters": 1000 * 96}


def test_mechanism_that_needs_a_square_grid_is_refused_for_tokens_with_a_class_token():
    [icnn] = [one for one in inspect("test_vit")["mechanisms"] if one["name"] == "icnn"]
    assert not icnn["applies"]
    assert "grid" in icnn["reason"]


@pytest.mark.parametrize("name", ["crossvit_9_240", "qwen3_vit_88m_enc"])
def test_refused_models_are_answered_with_the_reason(name, capsys):
    assert main(["inspect", name]) == 0
    out = capsys.readouterr().out
    assert "Not supported" in out
    assert inspect(name)["refused"].split()[-1].rstrip(".") in out.replace("\n", " ")


def test_plain_names_make_no_weights(monkeypatch):
    made = []
    kaiming = torch.nn.init.kaiming_normal_
    monkeypatch.setattr(
        torch.nn.init, "kaiming_normal_", lambda tensor, *a, **k: made.append(tensor.device) or kaiming(tensor, *a, **k)
    )
    inspect("test_resnet")
    assert {device.type for device in made} == {"meta"}


def test_random_state_stays():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    inspect("test_resnet")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_checkpoint_tells_mechanism_owners_and_what_was_measured(saved):
    model, folder = saved
    own = inspect(str(folder))["differentiated"]
    matrix = model.mechanism.class_filter_matrix()
    assert own["owners"] == metrics.owners(matrix).tolist()
    assert own["density"] == pytest.approx(float(matrix.mean()))
    assert (own["mechanism"], own["config"]["solo_weight"], own["parameters"]) == ("assigned", 2.0, 96 + 5)
    assert own["metrics"]["accuracy"] == 0.5
    assert own["versions"]["timm"] == timm.__version__


def test_plain_checkpoint_is_told_apart(make_model, tmp_path):
    folder = save_plain(make_model(), tmp_path / "plain")
    found = inspect(f"local-dir:{folder}")
    assert (found["source"], found["num_classes"], "differentiated" in found) == ("plain checkpoint", 5, False)


def test_json_is_what_python_returns(saved, capsys):
    assert main(["inspect", "--json", str(saved[1]), "test_resnet"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(
        json.dumps([inspect(str(saved[1])), inspect("test_resnet")])
    )


@pytest.mark.parametrize("width", [60, 80, 120])
def test_text_fits_the_width_and_leaves_nothing_out(saved, width):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(inspection_view(inspect(str(saved[1]))))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for word in (
        "layer4",
        "96 filters",
        "solo_weight=2.0",
        "accuracy 0.500",
        "recipe assigned, data pets",
        "Owners",
    ):
        assert word in " ".join(text.split()), word


def test_unknown_names_are_answered_with_those_spelled_alike(capsys):
    assert main(["inspect", "resnet19"]) == 2
    assert "Did you mean" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the folder does not exist"):
        inspect("nothing_at_all_like_it")


def test_plugin_registers_an_architecture(tmp_path, capsys):
    (tmp_path / "own_net.py").write_text(
        "from timm.models import register_model\nfrom timm.models.resnet import test_resnet\n\n\n"
        "@register_model\ndef own_net(pretrained=False, **kwargs):\n    return test_resnet(pretrained, **kwargs)\n"
    )
    assert main(["inspect", "own_net", "--json", "--plugin", str(tmp_path / "own_net.py")]) == 0
    assert json.loads(capsys.readouterr().out)["stage"]["num_filters"] == 96


def test_filter_numbers_are_shortened_to_ranges():
    assert _ranges([0, 1, 2, 3, 7, 9, 10]) == "0-3, 7, 9, 10"
    assert _ranges([]) == ""
