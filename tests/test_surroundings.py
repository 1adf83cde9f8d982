"""What surrounds a model: torch's default dtype and device, vmap; inputs and heads that only some timm models have."""

import io

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import CheckpointSaver
from timm.utils.onnx import onnx_export
from torch.func import functional_call, grad, vmap

import timm_csg
from timm_csg import Joint, TrainingMixin, explain

MECHANISMS = [
    {"mechanism": "csg"},
    {"mechanism": "assigned"},
    {"mechanism": "assigned", "gated_weight": 1.0},
    {"mechanism": "icnn"},
    {"mechanism": "icnn", "variant": "released", "extra_conv": "full"},
    {"mechanism": "icnn", "gradient": "paper"},
    {"mechanism": "picnn"},
    {"mechanism": "picnn", "table": "fixed", "sampling": "concrete"},
    {"mechanism": ["icnn", "csg"]},
]
EVERY_MECHANISM = pytest.mark.parametrize("options", MECHANISMS, ids=str)


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def default_device():
    yield torch.set_default_device
    torch.set_default_device(None)


def two_epochs(model, images, targets, **options):
    """Losses of the last step of a short training with a mechanism."""
    torch.manual_seed(0)
    model = timm_csg.differentiate(model, **options).train()
    loop = TrainingMixin()
    loop.schedule = Joint()
    optimizer = torch.optim.SGD(timm_csg.param_groups(model, lr=0.01))
    loop.attach(optimizer, model)
    for epoch in range(2):
        loop.set_epoch(epoch)
        for _ in range(2):
            losses = loop.losses(model, images, targets, F.cross_entropy)
            losses["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    return losses


# Defaults of torch


@EVERY_MECHANISM
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_default_dtype_does_not_change_training(make_model, images, targets, default_dtype, options, default):
    expected = two_epochs(make_model(), images, targets, **options)
    model = make_model()
    default_dtype(default)
    found = two_epochs(model, images, targets, **options)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


@EVERY_MECHANISM
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_made_under_a_default_dtype_train(images, targets, default_dtype, options, dtype):
    default_dtype(dtype)
    model = timm.create_model("test_resnet", num_classes=5)
    losses = two_epochs(model, images.to(dtype), targets, **options)
    assert losses["loss"].isfinite()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@EVERY_MECHANISM
def test_default_device_does_not_move_a_model(make_model, images, targets, default_device, options):
    expected = two_epochs(make_model(), images, targets, **options)
    model = make_model()
    default_device("meta")
    found = two_epochs(model, images, targets, **options)
    torch.testing.assert_close(found["loss"], expected["loss"])


def test_default_device_does_not_move_explanations(make_model, images, default_device):
    model = timm_csg.differentiate(make_model(), mechanism="csg")
    default_device("meta")
    assert explain.explain_prediction(model, images)[0].standard.exact
    assert explain.strongest_images(model, [images], [0, 1], top=4).indices.device.type == "cpu"
    for method in (explain.cam, explain.grad_cam, explain.guided_backprop):
        assert method(model, images).isfinite().all()


def test_label_gate_gives_gradients_per_picture_under_vmap(make_model, images, targets):
    model = timm_csg.differentiate(make_model(), mechanism="csg", sparsity_weight=0.0)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def loss(gate, image, target):
        logits = functional_call(model, {**state, "mechanism.gate": gate}, (image[None], target[None]))
        return F.cross_entropy(logits, target[None])

    gate = state["mechanism.gate"]
    found = vmap(grad(loss), in_dims=(None, 0, 0))(gate, images, targets)
    expected = torch.stack([grad(loss)(gate, *pair) for pair in zip(images, targets, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# Heads that give no logits [batch, classes]


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_mambaout"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_heads_without_pooling_are_refused_with_the_remedy(name, device):
    with torch.device(device):
        model = timm.create_model(name, num_classes=5, global_pool="")
    with pytest.raises(ValueError, match=r"logits of shape .* does not pool; .*global_pool='avg'"):
        timm_csg.differentiate(model, mechanism="csg")
    assert not timm_csg.is_differentiated(model)


def test_head_that_takes_no_small_map_is_checked_at_its_first_batch(make_model, images, targets):
    model = make_model()

    class Odd(type(model)):
        def forward_head(self, x, pre_logits=False):
            if x.shape[-1] not in (1, 2):
                raise ValueError("only maps of images of 64 pixels")
            return self.fc(x.permute(0, 2, 3, 1))

    model.__class__ = Odd
    model = timm_csg.differentiate(model, mechanism="csg")
    with pytest.raises(ValueError, match="does not pool"):
        model(images, targets)


@pytest.mark.parametrize("paths", [("standard",), ("gated",), ("standard", "gated")])
def test_distilled_training_mode_is_refused_with_the_remedy(paths):
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, img_size=32, depth=1)
    model = timm_csg.differentiate(model, mechanism="csg").train()
    images, targets = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    model.set_distilled_training(True)
    with pytest.raises(ValueError, match=r"gives a tuple .*set_distilled_training\(False\)"):
        model(images, targets, paths=paths)
    assert len(model(images)) == 2  # without targets timm's own
    model.set_distilled_training(False)
    outputs = model(images, targets, paths=("standard", "gated"))
    assert outputs.standard.shape == outputs.gated.shape == (2, 3)


# Without targets a model does what timm's does


@pytest.fixture
def naflex():
    torch.manual_seed(0)
    model = timm.create_model("naflexvit_base_patch16_gap", num_classes=3, depth=1, embed_dim=16, num_heads=2)
    return model.eval()


@pytest.fixture
def patches():
    """As timm's NaFlex loader gives them: two pictures, the second with two patches of padding."""
    torch.manual_seed(1)
    return {
        "patches": torch.rand(2, 4, 16 * 16 * 3),
        "patch_coord": torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(2, 1, 1),
        "patch_valid": torch.tensor([[True, True, True, True], [True, True, False, False]]),
    }


def test_patch_dictionaries_pass_through_as_in_plain_timm(naflex, patches):
    expected = naflex(patches)
    model = timm_csg.differentiate(naflex, mechanism="csg")
    named = {**patches, "x": patches["patches"]}
    del named["patches"]
    assert torch.equal(model(patches), expected)
    assert torch.equal(model(**named), expected)
    assert torch.equal(model.forward_head(**model.forward_features(**patches)), expected)
    assert torch.equal(model(patches, paths=("standard",)).standard, expected)


def test_gated_path_of_patch_dictionaries_is_refused_in_one_sentence(naflex, patches):
    model, targets = timm_csg.differentiate(naflex, mechanism="csg"), torch.tensor([0, 1])
    assert model(torch.rand(2, 3, 32, 32), targets).shape == (2, 3)
    for call in (
        lambda: model(patches, targets),
        lambda: model(patches, targets, paths=("gated",)),
        lambda: model(patches["patches"], targets, patch_coord=patches["patch_coord"], patch_valid=None),
    ):
        with pytest.raises(TypeError, match="found a dict; NaFlex patch dictionaries go through the standard path"):
            call()


@pytest.mark.parametrize("mechanism", ["csg", "assigned"])
def test_patch_coordinates_are_not_taken_for_targets(naflex, patches, mechanism):
    model = timm_csg.differentiate(naflex, mechanism=mechanism)
    for others in ((patches["patch_coord"],), (None, patches["patch_valid"])):
        with pytest.raises(TypeError, match=r"name what else the timm model takes: model\(patches, patch_coord="):
            model(patches["patches"], *others)


def test_paths_may_not_be_a_single_name(make_model, images):
    with pytest.raises(ValueError, match="paths must name one or both"):
        timm_csg.differentiate(make_model(), mechanism="csg")(images, paths="standard")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mechanism", ["csg", "icnn"])
def test_onnx_exporters_of_torchscript_and_timm_take_the_model(make_model, images, tmp_path, mechanism):
    onnx = pytest.importorskip("onnx")
    model = timm_csg.differentiate(make_model(), mechanism=mechanism)
    buffer = io.BytesIO()
    torch.onnx.export(model, images, buffer, dynamo=False)
    names = {tensor.name for tensor in onnx.load_from_string(buffer.getvalue()).graph.initializer}
    assert "mechanism.gate" not in names
    onnx_export(model, str(tmp_path / "model.onnx"), input_size=(3, 64, 64), batch_size=1)
    assert (tmp_path / "model.onnx").stat().st_size > 0


def test_checkpoint_saver_without_args_writes_the_arch_of_plain_timm(make_model, tmp_path):
    model = make_model()
    timm_csg.differentiate(model, mechanism="csg")
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters(), lr=0.1), checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0)
    assert torch.load(tmp_path / "last.pth.tar", weights_only=True)["arch"] == "resnet"
