"""What people do to a timm model after it was made: everything must still hold with a mechanism in it."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from timm.utils.model import reparameterize_model
from torch import nn

import timm_csg

BOTH = ("standard", "gated")
NAMES = ["csg", "assigned", pytest.param("picnn", marks=pytest.mark.slow)]
MECHANISMS = pytest.mark.parametrize("mechanism", NAMES)


@pytest.fixture(params=NAMES)
def differentiated(request, any_model, gated):
    """A differentiated model of every layout in turn, with a random gate or random assigned filters."""
    return gated(timm_csg.differentiate(any_model, mechanism=request.param))


def own_parameter(model):
    """A parameter of the mechanism that the gated path depends on."""
    names = {"csg": "gate", "assigned": "scale", "picnn": "correspondence"}
    return getattr(model.mechanism, names[model.mechanism.name])


def outputs(model, images, targets):
    with torch.no_grad():
        return model(images, targets, paths=BOTH)


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(found.standard, expected.standard, **(tolerance or {"rtol": 0, "atol": 0}))
    torch.testing.assert_close(found.gated, expected.gated, **(tolerance or {"rtol": 0, "atol": 0}))


# Copies


@MECHANISMS
def test_deepcopy_computes_the_same_with_its_own_mechanism(any_model, images, targets, gated, mechanism):
    model = gated(timm_csg.differentiate(any_model, mechanism=mechanism))
    twin = copy.deepcopy(model)
    expected = outputs(model, images, targets)
    assert type(twin) is type(model)
    assert twin.mechanism is not model.mechanism
    nn.init.zeros_(own_parameter(model))
    assert_same(outputs(twin, images, targets), expected)


def test_ema_copy_has_its_own_mechanism(differentiated, images, targets):
    expected = outputs(differentiated, images, targets)
    ema = ModelEmaV3(differentiated, decay=0.5)
    before = own_parameter(differentiated).clone()
    nn.init.zeros_(own_parameter(differentiated))
    assert_same(outputs(ema.module, images, targets), expected)
    ema.update(differentiated)
    assert torch.equal(own_parameter(ema.module), before / 2)
    assert torch.equal(ema(images), differentiated(images))


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickled_model_computes_the_same(differentiated, images, targets, protocol):
    twin = pickle.loads(pickle.dumps(differentiated, protocol=protocol))
    assert type(twin) is type(differentiated)
    assert_same(outputs(twin, images, targets), outputs(differentiated, images, targets))


def test_whole_models_saved_by_torch_load_in_a_fresh_process(tmp_path, make_model, images, targets, gated):
    models = [gated(timm_csg.differentiate(make_model(), mechanism=name)) for name in ("csg", "assigned", "picnn")]
    for model in models:
        torch.save(model, tmp_path / f"{model.mechanism.name}.pt")
        torch.save((images, targets, model(images, targets)), tmp_path / f"{model.mechanism.name}_data.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "def same(name):\n"
        "    model = torch.load(f'{name}.pt', weights_only=False)\n"
        "    images, targets, expected = torch.load(f'{name}_data.pt', weights_only=False)\n"
        "    return torch.equal(model(images, targets), expected)\n"
        "raise SystemExit(' '.join(name for name in sys.argv[1:] if not same(name)) or None)"
    )
    subprocess.run([sys.executable, "-c", code, "csg", "assigned", "picnn"], cwd=tmp_path, check=True, timeout=120)


def test_state_dict_is_that_of_plain_timm_plus_the_gate(any_model, make_model):
    plain_keys = list(any_model.state_dict())
    assert list(timm_csg.differentiate(any_model, mechanism="csg").state_dict()) == [*plain_keys, "mechanism.gate"]


@MECHANISMS
def test_state_dict_round_trip_is_bit_equal(make_model, images, targets, gated, mechanism):
    model = gated(timm_csg.differentiate(make_model(), mechanism=mechanism))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = timm_csg.differentiate(make_model(seed=9), mechanism=mechanism)
    assert not torch.equal(other(images), model(images))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(outputs(other, images, targets), outputs(model, images, targets))


def test_model_compiled_in_place_can_still_be_copied(make_model, images, targets, gated):
    model = gated(timm_csg.differentiate(make_model(), mechanism="csg"))
    model.compile(backend="eager")
    twin = copy.deepcopy(model)
    assert twin._compiled_call_impl is None
    assert_same(outputs(twin, images, targets), outputs(model, images, targets))


# Memory format, precision, device


@MECHANISMS
def test_channels_last_gives_the_same_logits(any_model, images, targets, gated, mechanism):
    model = gated(timm_csg.differentiate(any_model, mechanism=mechanism))
    expected = outputs(model, images, targets)
    model.to(memory_format=torch.channels_last)
    found = outputs(model, images.to(memory_format=torch.channels_last), targets)
    assert_same(found, expected, rtol=1e-3, atol=1e-4)


@MECHANISMS
def test_autocast_to_bfloat16_runs_both_paths_and_reaches_the_mechanism(any_model, images, targets, gated, mechanism):
    model = gated(timm_csg.differentiate(any_model, mechanism=mechanism)).train()
    torch.manual_seed(0)  # for mechanisms that draw
    expected = outputs(copy.deepcopy(model), images, targets)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(images, targets, paths=BOTH)
        loss = F.cross_entropy(found.gated, targets) + sum(found.losses.values())
    loss.backward()
    assert found.standard.dtype == torch.bfloat16
    assert found.gated.dtype == torch.bfloat16
    assert own_parameter(model).dtype == torch.float32
    assert own_parameter(model).grad.abs().sum() > 0
    scale = expected.gated.abs().max()
    assert (found.gated.float() - expected.gated).abs().max() < 0.1 * scale


@MECHANISMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_converted_model_computes_in_its_dtype(any_model, images, targets, gated, mechanism, dtype):
    model = gated(timm_csg.differentiate(any_model, mechanism=mechanism)).to(dtype)
    found = outputs(model, images.to(dtype), targets)
    assert found.standard.dtype == dtype
    assert found.gated.dtype == (torch.promote_types(dtype, torch.float32) if mechanism == "assigned" else dtype)


def test_model_moved_to_the_meta_device_takes_its_gate_along(differentiated):
    model = differentiated.to("meta")
    assert model(torch.empty(2, 3, 64, 64, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")).shape == (
        2,
        5,
    )


def test_soft_targets_work_on_the_meta_device(differentiated):
    model = differentiated.to("meta")
    logits = model(torch.empty(2, 3, 64, 64, device="meta"), torch.empty(2, 5, device="meta"))
    assert logits.shape == (2, 5)


# Training


@MECHANISMS
def test_gradient_reaches_the_mechanism_under_gradient_checkpointing(any_model, images, targets, gated, mechanism):
    model = gated(timm_csg.differentiate(any_model, mechanism=mechanism)).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing(True)
    for each in (model, twin):
        torch.manual_seed(0)  # for mechanisms that draw
        F.cross_entropy(each(images, targets), targets).backward()
    assert own_parameter(model).grad.abs().sum() > 0
    torch.testing.assert_close(own_parameter(twin).grad, own_parameter(model).grad)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_optimizer_has_the_groups_of_plain_timm_and_no_decay_on_the_gate(any_model, optimizer, layer_decay):
    options = {"opt": optimizer, "lr": 0.1, "weight_decay": 0.05, "layer_decay": layer_decay}
    plain_groups = create_optimizer_v2(copy.deepcopy(any_model), **options).param_groups
    model = timm_csg.differentiate(any_model, mechanism="csg")
    groups = create_optimizer_v2(model, **options).param_groups
    assert len(groups) == len(plain_groups)
    own = [group for group in groups if any(p is model.mechanism.gate for p in group["params"])]
    assert [group["weight_decay"] for group in own] == [0.0]
    assert sum(len(group["params"]) for group in groups) == 1 + sum(len(group["params"]) for group in plain_groups)


def test_plain_names_without_weight_decay_are_kept(make_model):
    model = make_model("test_vit")
    expected = model.no_weight_decay()
    assert timm_csg.differentiate(model, mechanism="csg").no_weight_decay() == {*expected, "mechanism.gate"}


def test_sync_batch_norm_conversion_keeps_model_and_gate(tiny_model, images, targets, gated):
    model = gated(timm_csg.differentiate(tiny_model, mechanism="csg"))
    expected = outputs(model, images, targets)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    assert timm_csg.is_differentiated(model)
    assert_same(outputs(model, images, targets), expected)


@pytest.mark.parametrize("inplace", [False, True])
@MECHANISMS
def test_reparameterised_model_computes_the_same(images, targets, gated, mechanism, inplace):
    model = timm.create_model("repvit_m0_9", num_classes=5).eval()
    model = gated(timm_csg.differentiate(model, mechanism=mechanism))
    expected = outputs(model, images, targets)
    fused = reparameterize_model(model, inplace=inplace)
    assert timm_csg.is_differentiated(fused)
    assert sum(1 for _ in fused.modules()) < 0.8 * sum(1 for _ in timm.create_model("repvit_m0_9").modules())
    assert_same(outputs(fused, images, targets), expected, rtol=1e-2, atol=1e-3)


# Compilers and exporters


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)


@MECHANISMS
def test_every_call_of_the_model_compiles_into_one_graph(tiny_model, images, targets, gated, mechanism):
    model = gated(timm_csg.differentiate(tiny_model, mechanism=mechanism))
    expected = outputs(model, images, targets)
    fast = compiled(model)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    assert_same(outputs(fast, images, targets), expected, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), expected.standard, **tolerance)
        torch.testing.assert_close(fast(images, targets), expected.gated, **tolerance)


@MECHANISMS
def test_gated_half_compiles_into_one_graph(any_model, images, targets, gated, mechanism):
    model = gated(timm_csg.differentiate(any_model, mechanism=mechanism))
    with torch.no_grad():
        features = model.forward_features(images)
        found = compiled(lambda features: model.forward_head(features, targets=targets))(features)
        torch.testing.assert_close(found, model.forward_head(features, targets=targets), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@MECHANISMS
def test_both_paths_of_any_layout_compile_into_one_graph(any_model, images, targets, gated, mechanism):
    model = gated(timm_csg.differentiate(any_model, mechanism=mechanism))
    expected = outputs(model, images, targets)
    assert_same(outputs(compiled(model), images, targets), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["indices", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("soft", "multi-hot"))]
)
def test_training_step_of_assigned_filters_compiles_into_one_graph(tiny_model, images, targets, gated, kind):
    model = gated(timm_csg.differentiate(tiny_model)).train()
    twin = copy.deepcopy(model)
    rows = F.one_hot(targets, 5)
    given = {"indices": targets, "soft": 0.9 * rows + 0.02, "multi-hot": rows | F.one_hot((targets + 1) % 5, 5)}[kind]
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    found, expected = compiled(model)(images, given, paths=BOTH), twin(images, given, paths=BOTH)
    assert_same(found, expected, **tolerance)
    torch.testing.assert_close(found.losses["solo"], expected.losses["solo"], **tolerance)
    for each, result in ((model, found), (twin, expected)):
        (result.losses["solo"] + result.standard.sum()).backward()
        each.project_()
    torch.testing.assert_close(model.mechanism.scale.grad, twin.mechanism.scale.grad, **tolerance)
    torch.testing.assert_close(model.mechanism.mean, twin.mechanism.mean, **tolerance)


def test_compiled_model_trains_its_gate(tiny_model, images, targets):
    model = timm_csg.differentiate(tiny_model, mechanism="csg").train()
    F.cross_entropy(compiled(model)(images, targets), targets).backward()
    assert model.mechanism.gate.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["soft", "multi-hot"])
def test_rows_as_targets_compile_into_one_graph(tiny_model, images, targets, gated, kind):
    model = gated(timm_csg.differentiate(tiny_model, mechanism="csg"))
    rows = F.one_hot(targets, 5)
    rows = 0.9 * rows + 0.02 if kind == "soft" else rows | F.one_hot((targets + 1) % 5, 5)
    with torch.no_grad():
        features = model.forward_features(images)
        found = compiled(lambda features, rows: model.forward_head(features, targets=rows))(features, rows)
        torch.testing.assert_close(found, model.forward_head(features, targets=rows), rtol=1e-4, atol=1e-5)


def test_exported_standard_path_does_not_use_the_mechanism(differentiated, images):
    program = torch.export.export(differentiated, (images,))
    parameters = program.graph_signature.inputs_to_parameters
    used = {parameters[node.name] for node in program.graph.nodes if node.name in parameters and node.users}
    assert used == {name for name, _ in differentiated.named_parameters() if not name.startswith("mechanism.")}
    torch.testing.assert_close(program.module()(images), differentiated(images), rtol=1e-4, atol=1e-5)


def test_exported_plain_view_has_no_gate_in_its_state(differentiated, images):
    with timm_csg.plain(differentiated) as borrowed:
        program = torch.export.export(borrowed, (images,))
    assert not any("mechanism" in name for name in program.state_dict)


@MECHANISMS
def test_onnx_file_of_the_standard_path_has_no_mechanism(tiny_model, images, mechanism):
    pytest.importorskip("onnxscript")
    model = timm_csg.differentiate(tiny_model, mechanism=mechanism)
    program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    names = [*program.model.graph.initializers]
    assert "fc.weight" in names
    assert not any("mechanism" in name for name in names)


@MECHANISMS
def test_standard_path_can_be_traced(tiny_model, images, mechanism):
    model = timm_csg.differentiate(tiny_model, mechanism=mechanism)
    torch.testing.assert_close(torch.jit.trace(model, images)(images), model(images))


@pytest.mark.filterwarnings("ignore")
def test_plain_view_can_be_scripted_and_traced_symbolically(tiny_model, images, gated):
    expected = tiny_model(images)
    model = gated(timm_csg.differentiate(tiny_model, mechanism="csg"))
    with timm_csg.plain(model) as borrowed:
        scripted, traced = torch.jit.script(borrowed), torch.fx.symbolic_trace(borrowed)
    torch.testing.assert_close(scripted(images), expected)
    torch.testing.assert_close(traced(images), expected)
    assert timm_csg.is_differentiated(model)


def test_forward_hooks_of_the_user_stay(tiny_model, images, targets):
    seen = []
    tiny_model.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model = timm_csg.differentiate(tiny_model, mechanism="csg")
    model(images, targets)
    timm_csg.undifferentiate(model)(images)
    assert seen == [(3, 96, 2, 2)] * 2
