"""receptive_field: the textbook formula on plain stacks, what a NaN reaches on timm's models, nothing changed."""

import pytest
import timm
import torch
from reference.parts import dependence
from torch import nn

import timm_csg
from timm_csg.measuring import receptive_field


class Stack(nn.Module):
    """Convolutions (or poolings) one after the other."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward_features(self, images):
        return self.layers(images)


def conv(kernel, stride=1, padding=0, dilation=1, channels=3):
    return nn.Conv2d(channels, channels, kernel, stride, padding, dilation)


def formula(specification):
    """Start, step and size of the fields of kernel, stride, padding, dilation, layer by layer."""
    start, step, size = 0.5, 1, 1
    for kernel, stride, padding, dilation in specification:
        reach = dilation * (kernel - 1)
        start += (reach / 2 - padding) * step
        size += reach * step
        step *= stride
    return start, step, size


@pytest.mark.parametrize(
    "specification",
    [
        [(3, 1, 1, 1)],
        [(7, 2, 3, 1), (3, 2, 1, 1), (3, 1, 1, 1)],
        [(2, 2, 0, 1), (3, 1, 0, 1), (5, 3, 2, 1)],
        [(3, 1, 2, 2), (3, 2, 4, 4), (1, 2, 0, 1)],
        [(4, 4, 0, 1), (3, 1, 1, 3), (4, 2, 1, 1)],
    ],
)
def test_plain_stacks_follow_the_formula(specification):
    model = Stack(*(conv(*layer) for layer in specification))
    field = receptive_field(model, (61, 83))
    rows, columns = model.forward_features(torch.zeros(1, 3, 61, 83)).shape[2:]
    start, step, size = formula(specification)
    assert field.local
    assert field.size == (size, size)
    torch.testing.assert_close(field.centre_y, start + step * torch.arange(rows).float())
    torch.testing.assert_close(field.centre_x, start + step * torch.arange(columns).float())


def test_kernels_may_differ_along_height_and_width():
    field = receptive_field(Stack(nn.Conv2d(3, 4, (1, 5), stride=(1, 2), padding=(0, 2)), nn.ReLU(inplace=True)), 16)
    assert field.size == (1, 5)
    assert field.centre_y[:2].tolist() == [0.5, 1.5]
    assert field.centre_x[:2].tolist() == [0.5, 2.5]


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("length", [16, 17, 18, 19])
def test_pooling_makes_as_many_positions_as_torch(ceil_mode, length):
    for layer in (nn.MaxPool2d(3, 2, 1, ceil_mode=ceil_mode), nn.AvgPool2d(3, 2, ceil_mode=ceil_mode)):
        model = Stack(conv(1), layer)
        field = receptive_field(model, length)
        assert len(field.centre_y) == model.forward_features(torch.zeros(1, 3, length, length)).shape[2]


class Branches(nn.Module):
    """A residual sum whose branches see different places."""

    def __init__(self, even):
        super().__init__()
        self.short = conv(1, stride=2)
        self.long = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv(3, stride=2)) if even else conv(5, 2, 2)

    def forward_features(self, images):
        return self.short(images) + self.long(images)


def test_the_field_of_a_sum_is_the_union_of_its_branches():
    assert receptive_field(Branches(even=False), 16).centre_x[:2].tolist() == [0.5, 2.5]
    assert receptive_field(Branches(even=False), 16).size == (5, 5)
    assert receptive_field(Branches(even=True), 16).centre_x[:2].tolist() == [1.5, 3.5]


MODELS = {
    "test_resnet": {},
    "test_convnext": {},
    "test_mambaout": {},  # NHWC
    "mobilenetv2_035": {"pad_type": "same"},
    "densenet121": {"growth_rate": 4, "block_config": (1, 1, 1, 1)},
}


@pytest.mark.parametrize(("name", "options"), MODELS.items())
@pytest.mark.parametrize("width", [96, 107])
def test_edges_are_how_far_a_changed_pixel_reaches(name, options, width):
    model = timm.create_model(name, num_classes=2, **options).eval()
    reached = dependence(model, 64, width)
    field = receptive_field(model, (64, width))
    assert field.local
    assert len(field.centre_x) == len(reached)
    end = int(reached.any(dim=0).nonzero().max()) + 1  # strides may leave out the last columns
    for centre, row in zip(field.centre_x.tolist(), reached, strict=True):
        first, last = max(0, centre - field.size[1] / 2), min(end, centre + field.size[1] / 2)
        seen = row.nonzero().flatten()
        assert (int(seen.min()), int(seen.max()) + 1) == (first, last)


@pytest.mark.parametrize(
    ("name", "size", "centres", "field_size"),
    [  # by hand: layer by layer with the formula above
        ("resnet18", 224, [0.5, 32.5], 435),
        ("resnet50", 224, [0.5, 32.5], 427),
        ("vgg16", 224, [16.0, 48.0], 212),
        ("convnext_atto", 224, [16.0, 48.0], None),
        ("mobilenetv2_100", 160, [0.5, 32.5], 491),
    ],
)
def test_published_architectures(name, size, centres, field_size):
    options = {"mlp_ratio": 0.01} if name == "vgg16" else {}
    field = receptive_field(timm.create_model(name, num_classes=2, **options), size)
    assert field.centre_y[:2].tolist() == field.centre_x[:2].tolist() == centres
    assert field_size is None or field.size == (field_size, field_size)


def test_same_padding_moves_the_centres_with_the_image_size():
    model = timm.create_model("mobilenetv2_035", pad_type="same")
    assert receptive_field(model, 128).centre_x[:2].tolist() == [31.5, 63.5]
    assert receptive_field(model, 129).centre_x[:2].tolist() == [0.5, 32.5]


def test_gates_that_look_at_the_whole_image_are_not_counted():
    with_gate, without = timm.create_model("seresnet18"), timm.create_model("resnet18")
    assert receptive_field(with_gate, 64).size == receptive_field(without, 64).size


def test_attention_falls_back_to_grid_cells():
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=2, depths=(1, 1, 1, 1), embed_dim=24)
    field = receptive_field(model, 224)
    assert not field.local
    assert field.size == (224, 224)
    assert field.centre_x.tolist() == [16.0 + 32 * index for index in range(7)]


def test_tokens_without_a_map_are_refused(make_model):
    with pytest.raises(ValueError, match="no feature map"):
        receptive_field(make_model("test_vit"), 64)


def test_model_and_random_state_are_left_as_found(tiny_model):
    model = timm_csg.differentiate(tiny_model, mechanism="csg")
    model.train()
    model.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, state = [module.training for module in model.modules()], torch.random.get_rng_state()
    receptive_field(model, 64)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
