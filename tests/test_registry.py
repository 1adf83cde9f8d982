"""Every architecture that timm lists, on the meta device: what is promised for 1,342, and the refusal of 29."""

import copy
import fnmatch
import math
from collections import Counter
from unittest import mock

import pytest
import timm
import torch
from timm.models import is_model_in_modules
from timm.models._input import get_model_input_config

import timm_csg
from timm_csg.head import probe_head

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LISTS = ["coat_tiny", "coat_mini", "coat_small", "crossvit_*", "efficientvim_*"]
ENCODERS = ["*_enc"]
NHWC = ["swin_*", "swinv2_*", "sequencer2d_*", "mambaout_*", "sam2_hiera_*", "hieradet_*", "test_mambaout"]
NHWC += ["qwen3_vit_*", "deepseek_vit_*"]
NOT_NHWC = ["swinv2_cr_*", "*_merge", "*_align"]
TOKEN_MODULES = ["beit", "cait", "coat", "convit", "deit", "efficientformer", "eva", "gemma4_vit", "hiera", "mlp_mixer"]
TOKEN_MODULES += ["mvitv2", "naflexvit", "pit", "tnt", "twins", "vision_transformer", "vision_transformer_hybrid"]
TOKEN_MODULES += ["vision_transformer_relpos", "vitamin", "volo", "xcit"]
TOKENS = ["levit_[0-9]*", "*_merge", "*_align"]
# Kind of head (field notes, table 5.1); the sign of the map is measured on the same models, the smallest of a family.
HEADS = {
    "halonet_h1": "linear",
    "test_byobnet": "linear",
    "convmixer_768_32": "linear",
    "test_convnext": "normed",
    "cpubone_nano": "map",
    "cspnext_tiny": "linear",
    "csatv2": "normed",
    "dla46x_c": "linear",
    "densenet121": "linear",
    "dpn48b": "linear",
    "edgenext_xx_small": "normed",
    "efficientformerv2_s0": "pooled",
    "test_efficientnet": "linear",
    "efficientvit_b0": "map",
    "efficientvit_m0": "pooled",
    "fasternet_t0": "pooled",
    "fastvit_t8": "linear",
    "gcvit_xxtiny": "linear",
    "ghostnet_050": "pooled",
    "hgnetv2_b0": "pooled",
    "hrnet_w18_small": "linear",
    "iformer_t": "pooled",
    "inception_next_atto": "pooled",
    "lcnetv2_small": "pooled",
    "levit_conv_128s": "pooled",
    "lowformer_b0": "map",
    "test_mambaout": "pooled",
    "mambaout_femto": "pooled",
    "test_coatnet": "linear",
    "poolformerv2_s12": "normed",
    "caformer_s18": "pooled",
    "lcnet_035": "pooled",
    "mobilevit_xxs": "linear",
    "nest_tiny": "linear",
    "test_nfnet": "linear",
    "pvt_v2_b0": "linear",
    "regnetx_002": "linear",
    "repghostnet_050": "pooled",
    "repvit_m0_9": "pooled",
    "resnest14d": "linear",
    "test_resnet": "linear",
    "resnetv2_18": "linear",
    "rexnet_100": "linear",
    "legacy_seresnet18": "linear",
    "sequencer2d_s": "linear",
    "shvit_s1": "pooled",
    "skresnet18": "linear",
    "starnet_s050": "linear",
    "swiftformer_xs": "pooled",
    "swin_tiny_patch4_window7_224": "linear",
    "swinv2_cr_tiny_224": "linear",
    "tiny_vit_5m_224": "normed",
    "visformer_tiny": "linear",
    "ese_vovnet19b_slim_dw": "linear",
    "legacy_xception": "linear",
    "test_vit": "linear",  # the class token, then linear
    "mixer_s32_224": "linear",  # the mean of the tokens, then linear
    "hiera_tiny_224": "normed",
}


def matches(name, patterns):
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def layout(name):
    """What the lists above say about a supported architecture."""
    if matches(name, NHWC) and not matches(name, NOT_NHWC):
        return "NHWC"
    of_tokens = any(is_model_in_modules(name, [module]) for module in TOKEN_MODULES)
    return "NLC" if of_tokens or matches(name, TOKENS) else "NCHW"


def build(name, **kwargs):
    """A model without weights; drawing some for the meta device would take a quarter of the time or more."""
    with torch.device("meta"), mock.patch("timm.layers.weight_init._trunc_normal_", lambda weight, *_: weight):
        return timm.create_model(name, **kwargs).eval()


def input_size(model):
    return get_model_input_config(model)["input_size"]


@pytest.mark.parametrize("name", timm.list_models(exclude_filters=[*LISTS, *ENCODERS]))
def test_gated_paths_of_every_supported_architecture(name, monkeypatch):
    model = timm_csg.differentiate(build(name, num_classes=3), mechanism="csg")
    features, backbone = [], model.forward_features

    @torch.no_grad()
    def recorded(images, **options):
        """The backbone, once for all mechanisms."""
        features.append(features[0].detach() if features else backbone(images, **options))
        return features[-1]

    monkeypatch.setattr(model, "forward_features", recorded)
    images = torch.empty(2, *input_size(model), device="meta")
    targets = torch.zeros(2, dtype=torch.long, device="meta")

    logits = model(images, targets)
    assert logits.shape == (2, 3)
    logits.sum().backward()
    gate = model.mechanism.gate
    assert gate.grad.shape == gate.shape

    assert features[0].ndim == len(layout(name))
    assert features[0].shape[1 if layout(name) == "NCHW" else -1] == model.mechanism.num_filters == gate.shape[1]
    assert model.mechanism.channels_last is (layout(name) == "NHWC")

    timm_csg.undifferentiate(model)
    timm_csg.differentiate(model, mechanism="assigned")
    model.mechanism.train()
    outputs = model(images, targets, paths=("gated",))
    assert outputs.gated.shape == (2, 3)
    (outputs.gated.sum() + outputs.losses["solo"]).backward()
    assert model.mechanism.scale.grad.shape == (gate.shape[1],)
    model.project_()

    timm_csg.undifferentiate(model)
    if getattr(model, "num_prefix_tokens", None):
        with pytest.raises(ValueError, match="has a class or register token; use a model without"):
            timm_csg.differentiate(model, mechanism="icnn")
        return
    timm_csg.differentiate(model, mechanism="icnn")
    if layout(name) == "NLC" and math.isqrt(features[0].shape[1]) ** 2 != features[0].shape[1]:
        with pytest.raises(ValueError, match="use a model without class and register tokens, or mechanism='csg'"):
            model(images)
    else:
        assert model(images).shape == (2, 3)


@pytest.mark.parametrize("name", [name for name in timm.list_models() if matches(name, LISTS)])
def test_architectures_with_several_streams_are_refused(name):
    with pytest.raises(ValueError, match=r"several tensors.*use a model with one stream"):
        timm_csg.differentiate(build(name))


@pytest.mark.parametrize("name", timm.list_models(ENCODERS))
def test_encoders_are_refused(name):
    with pytest.raises(TypeError, match="encoder without a classifier"):
        timm_csg.differentiate(build(name))


def test_totals_are_those_of_the_documentation():
    """The layouts counted here are measured, one by one, by the test of every supported architecture."""
    totals = Counter(
        "encoder" if matches(name, ENCODERS) else "list" if matches(name, LISTS) else layout(name)
        for name in timm.list_models()
    )
    assert totals == {"NCHW": 868, "NHWC": 44, "NLC": 430, "list": 22, "encoder": 7}


@pytest.fixture(scope="module", params=HEADS)
def built(request):
    """The name and the model of each family in turn, built once for all tests, which change copies of it."""
    torch.manual_seed(0)
    return request.param, timm.create_model(request.param, num_classes=3).eval()


def test_kind_of_head_is_that_of_the_table_before_and_after_training(built):
    name, model = built[0], copy.deepcopy(built[1])
    assert probe_head(model, model.num_features) == HEADS[name]
    with torch.no_grad():  # a trained head: nothing is 0 or 1 any more
        for tensor in (tensor for tensor in model.state_dict().values() if tensor.is_floating_point()):
            tensor += 0.05 * torch.rand(tensor.shape)
    assert probe_head(model, model.num_features) == HEADS[name]


def test_filters_are_assigned_trained_and_masked_or_the_mask_is_refused(built, monkeypatch):
    """One step of everything behind the backbone, whose features are computed once."""
    torch.manual_seed(0)
    name, model = built[0], timm_csg.differentiate(copy.deepcopy(built[1]))
    images, targets = torch.rand(3, *input_size(model)), torch.arange(3)
    with torch.no_grad():
        features = model.forward_features(images)
    monkeypatch.setattr(model, "forward_features", lambda images: features)
    own = timm_csg.assign_filters(model, [(images, targets)]).matrix
    assert own.any(dim=1).all()
    assert own.sum() == model.num_features

    loop = timm_csg.TrainingMixin()
    loop.schedule = timm_csg.Joint()
    optimizer = torch.optim.SGD(timm_csg.param_groups(model, lr=0.1))
    loop.attach(optimizer, model)
    losses = loop.losses(model.train(), images, targets, torch.nn.functional.cross_entropy)
    losses["loss"].backward()
    optimizer.step()
    assert losses["solo"].isfinite()

    weight = model.eval().read_head().weight
    if HEADS[name] in ("linear", "normed"):
        assert weight[own].any()
        assert not weight[~own].any()
        timm_csg.adapt(model, [(images, targets)])
        assert model.read_head().weight[own].any()
        assert not model.read_head().weight[~own].any()
    else:
        assert weight is None
        with pytest.raises(ValueError, match=f"its head is of kind '{HEADS[name]}', so that there is no weight"):
            timm_csg.adapt(model, [(images, targets)])


def test_found_stage_is_the_real_one(built):
    model = copy.deepcopy(built[1])
    stage = timm_csg.find_stage(model)
    with torch.no_grad():
        features = model.forward_features(torch.rand(1, *input_size(model)))
    assert stage.num_filters == features.shape[1 if stage.layout == "NCHW" else -1]
    if stage.layout != "NLC":
        assert stage.grid == tuple(features.shape[2:] if stage.layout == "NCHW" else features.shape[1:3])
    if not stage.signed:
        assert features.min() >= 0
    if stage.name != "forward_features":
        assert stage.name in dict(model.named_modules())


@pytest.mark.parametrize("name", ["test_resnet", "densenet121", "dla46x_c", "ghostnet_050", "legacy_xception"])
def test_maps_that_end_in_relu_are_found_not_signed(name):
    assert not timm_csg.find_stage(build(name)).signed
