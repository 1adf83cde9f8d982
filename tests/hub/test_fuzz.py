"""Thousands of damaged and hostile repositories: each is refused with CheckpointError or loads exactly what it holds.

Two kinds. *Damage* leaves the checksums alone: what loads must compute what was saved, bit for bit. *Attacks* mend the
checksums afterwards: what loads must be exactly the tensors in the files, and no larger than they are.
"""

import copy
import json
import random
import resource
import struct
import time

import pytest
import safetensors.torch
import torch

import timm_csg
from timm_csg import CheckpointError, manifest

NAMES = ("model.safetensors", "mechanism/timm_csg.safetensors", "config.json")
HOSTILE = [
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**30, 10**400, -(10**18), 0.0, -0.5, 1e308, float("nan"),
    float("inf"), "", "max", "avg", "../../etc/passwd", "/etc/passwd", "C:\\x", "hf-hub:evil/x", "local-dir:/", "\x00",
    "\ud800", "test_vit", "test_convnext", "resnet_of_the_future", "vit_giant_patch14_dinov2", "csg",
    "swin_base_patch4_window7_224",
    "__import__('os').system('false')", "a" * 10_000, [], {}, [1, 2], [[]], [10**9] * 4, {"a": {"b": {}}}, [None] * 50,
]  # fmt: skip
KEYS = [
    "num_classes", "in_chans", "img_size", "global_pool", "layers", "channels", "depths", "embed_dim",
    "checkpoint_path", "pretrained", "pretrained_cfg", "features_only", "pruned", "cache_dir", "kwargs_filter",
    "drop_rate", "stem_width",
    "block", "act_layer", "norm_layer", "custom_load", "file", "url", "hf_hub_id", "source", "__class__", "model_cfg",
    "input_size", "fixed_input_size", "first_conv", "classifier", "new_option", "sparsity_norm", "initial_gate",
    "output_stride", "cardinality", "base_width", "block_args", "zero_init_last", "feature_cfg", "scriptable",
]  # fmt: skip


def places(value, path=()):
    """Every place in a nest of JSON values."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield from places(inner, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def mutate_json(rng, config):
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        path = rng.choice(list(places(config)))
        parent, key = at(config, path[:-1]), path[-1]
        kind = rng.randrange(5)
        if kind == 0:
            del parent[key]
        elif kind == 1:
            target = rng.choice([config, *(config.get(name) for name in ("model_args", "pretrained_cfg", "timm_csg"))])
            if isinstance(target, dict):
                target[rng.choice(KEYS)] = copy.deepcopy(rng.choice(HOSTILE))
        elif (
            kind == 2
            and isinstance(config.get("timm_csg"), dict)
            and isinstance(config["timm_csg"].get("config"), dict)
        ):
            config["timm_csg"]["config"][rng.choice(KEYS)] = copy.deepcopy(rng.choice(HOSTILE))
        elif kind == 3 and isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
            parent[key] = parent[key] * rng.choice([-1, 2, 10, 10**6]) + rng.choice([0, 1])
        else:
            parent[key] = copy.deepcopy(rng.choice(HOSTILE))
        if not config:
            return


def mutate_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        position = rng.randrange(min(len(data), rng.choice([16, 2000, len(data)])))
        data[position] ^= 1 << rng.randrange(8)
    return bytes(data)


def mutate_length(rng, data):
    end = rng.choice([0, 1, 8, 9, len(data) // 2, len(data) - 1, rng.randrange(len(data))])
    return rng.choice([data[:end], data + b"\0" * rng.randrange(1, 20), data[end:]])


def mutate_header(rng, data):
    """Hostile shapes, offsets, kinds and names in the header of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([name for name in header if name != "__metadata__"])
    kind = rng.randrange(7)
    if kind == 0:
        header[name]["shape"] = rng.choice(
            [[], [0], [2**62], [-1], [10**9, 10**9], "x", [1.5], header[name]["shape"][::-1]]
        )
    elif kind == 1:
        header[name]["data_offsets"] = rng.choice([[0, 0], [0, 2**62], [10, 5], [-1, 3], "x", []])
    elif kind == 2:
        header[name]["dtype"] = rng.choice(["I32", "F64", "BF16", "U8", "pickle", 3, "F8_E4M3", "C64"])
    elif kind == 3:
        header[rng.choice(["mechanism.gate", "../x", "fc.weight", "\x00", "gate", "x" * 5000])] = header.pop(name)
    elif kind == 4:
        del header[name]
    elif kind == 5:
        header["__metadata__"] = rng.choice([{"format": "tf"}, {}, 3, {"a": 1}])
    text = json.dumps(header).encode()
    size = len(text) if kind != 6 else rng.choice([0, 1, 2**40, 2**63, len(text) - 1])
    return struct.pack("<Q", size) + text + data[8 + length :]


def mutate_tensors(rng, data):
    """A whole file with other tensors than those that were saved."""
    state = safetensors.torch.load(data)
    name = rng.choice(list(state))
    kind = rng.randrange(6)
    if kind == 0:
        state[name] = torch.full_like(state[name], float("nan")) if state[name].is_floating_point() else state[name]
    elif kind == 1:
        state[name] = state[name].flatten()[:-1].clone()
    elif kind == 2:
        state[name] = state[name].to(rng.choice([torch.int64, torch.float64, torch.bool, torch.bfloat16]))
    elif kind == 3:
        state[rng.choice(["extra", "gate", "mechanism.gate", "fc.bias2"])] = torch.ones(2)
    elif kind == 4:
        del state[name]
    else:
        state[name] = torch.zeros_like(state[name])
    return safetensors.torch.save(state, metadata={"format": "pt"})


def mend(config, files):
    """What an attacker does: checksums that fit."""
    own = config.get("timm_csg")
    if isinstance(own, dict) and isinstance(own.get("sha256"), dict):
        own["sha256"] = {name: manifest.hashlib.sha256(files.get(name, b"")).hexdigest() for name in NAMES[:2]}
        try:
            own["sha256"]["config.json"] = manifest.fingerprint(config)
        except (KeyError, TypeError, ValueError):
            own["sha256"]["config.json"] = ""


def mutated(seed, original):
    """Files of one repository, and whether its checksums were mended."""
    rng, files = random.Random(seed), dict(original)
    attack = rng.random() < 0.5
    name = rng.choice(NAMES)
    config = json.loads(files["config.json"])
    kind = rng.randrange(10)
    if kind < 5:
        mutate_json(rng, config)
    elif kind == 5:
        files[name] = mutate_bytes(rng, files[name])
    elif kind == 6:
        files[name] = mutate_length(rng, files[name])
    elif kind == 7:
        other = rng.choice(NAMES)
        files[name], files[other] = files[other], files[name]
        if rng.random() < 0.5:
            del files[name]
    elif kind == 8:
        name = rng.choice(NAMES[:2])
        files[name] = mutate_header(rng, files[name])
    else:
        name = rng.choice(NAMES[:2])
        files[name] = mutate_tensors(rng, files[name])
    if kind < 5 or (attack and kind >= 8):
        if attack:
            mend(config, files)
        files["config.json"] = json.dumps(config).encode()
    return files, attack and (kind < 5 or kind >= 8)


def logits(model, images, targets):
    return model(images, targets, paths=("standard", "gated"))[:2]


def check(folder, name, expected, images, targets, *, attacked):
    """True if it was refused."""
    start = time.perf_counter()
    loaded, refusal = None, ""
    try:
        loaded = timm_csg.from_pretrained(name)
    except CheckpointError as error:
        refusal = str(error)
    assert time.perf_counter() - start < 20
    assert len(refusal.encode()) < 3000  # and it can be written to any log
    if loaded is None:
        return True
    if not attacked:
        assert all(
            torch.equal(found, right) for found, right in zip(logits(loaded, images, targets), expected, strict=True)
        )
        return False
    held = safetensors.torch.load_file(folder / NAMES[0])
    held |= {f"mechanism.{key}": value for key, value in safetensors.torch.load_file(folder / NAMES[1]).items()}
    assert held.keys() == loaded.state_dict().keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value.nan_to_num(), held[key].to(value.dtype).nan_to_num())
    return False


def run(seeds, saved, model, images, targets, tmp_path, hub=None):
    original = {name: (saved / name).read_bytes() for name in NAMES}
    with torch.no_grad():
        expected = logits(model, images, targets)
        counts = {"refused": 0, "loaded": 0}
        folder = tmp_path / "mutant"
        folder.mkdir()
        for seed in seeds:
            files, attacked = mutated(seed, original)
            for name in NAMES:
                (folder / name).unlink(missing_ok=True)
            for name, data in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(data)
            try:
                name = folder if hub is None else f"user/m{seed}"
                if hub is not None:
                    hub.add_repo(name, files)
                refused = check(folder, name, expected, images, targets, attacked=attacked)
            except Exception as error:
                raise AssertionError(f"repository {seed}: {type(error).__name__}: {error}") from error
            counts["refused" if refused else "loaded"] += 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 * 2**20, "some repository took gigabytes"
    return counts


def test_mutated_repositories_are_refused_or_load_what_was_saved(saved, model, images, targets, tmp_path):
    counts = run(range(150), saved, model, images, targets, tmp_path)
    assert counts["refused"] > 90


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_thousands_of_mutated_repositories(saved, model, images, targets, tmp_path, part):
    counts = run(range(1000 + 300 * part, 1300 + 300 * part), saved, model, images, targets, tmp_path)
    assert sum(counts.values()) == 300


@pytest.mark.slow
def test_mutated_repositories_on_the_hub(regular_hub, saved, model, images, targets, tmp_path):
    counts = run(range(5000, 5300), saved, model, images, targets, tmp_path, regular_hub)
    assert sum(counts.values()) == 300


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config.update(num_classes=10**9), "num_classes must be"),
        (lambda config: config.update(num_classes=10**7), "does not fit this"),
        (lambda config: config.update(num_classes=True), "num_classes must be"),
        (lambda config: config["model_args"].update(layers=[10**9] * 4), "holds the number 1000000000"),
        (lambda config: config["model_args"].update(layers=[60_000] * 4), "far more layers than its weights"),
        (lambda config: config["model_args"].update(channels=[60_000] * 4), "does not fit this"),
        (lambda config: config.update(architecture="vit_giant_patch14_dinov2", model_args={}), "does not fit this"),
        (lambda config: config.update(architecture="../../evil"), "'../../evil' is not an architecture that timm"),
        (lambda config: config.update(architecture="hf-hub:evil/x"), "is not an architecture"),
        (lambda config: config["model_args"].update(checkpoint_path="/etc/passwd"), "unexpected keyword"),
        (lambda config: config["model_args"].update(pretrained=True), "does not describe a model"),
        (lambda config: config["pretrained_cfg"].update(input_size=[3, 10**8, 10**8]), "holds the number"),
        (lambda config: config["timm_csg"].update(mechanism="evil"), "names the mechanism 'evil'"),
        (lambda config: config["timm_csg"].update(mechanism=["csg"]), "names the mechanism"),
        (lambda config: config["timm_csg"]["config"].update(initial_gate=10**400), "initial_gate must be"),
        (lambda config: config["timm_csg"].pop("sha256"), "lacks the checksums"),
        (lambda config: config["model_args"].update(global_pool="max"), "was edited .*checksum"),
        (lambda config: config["pretrained_cfg"].update(mean=[0.1, 0.2, 0.3]), "was edited .*checksum"),
        (lambda config: config["timm_csg"]["config"].update(initial_gate=0.25), "was edited .*checksum"),
    ],
)
def test_hostile_config_is_refused_before_any_memory_is_taken(saved, change, words):
    config = json.loads((saved / "config.json").read_text())
    config.setdefault("model_args", {})
    change(config)
    (saved / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=words):
        timm_csg.from_pretrained(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fc.weight", torch.int32), ("fc.weight", torch.complex64), ("bn1.num_batches_tracked", torch.complex64)],
)
def test_numbers_of_another_kind_are_refused_not_converted(saved, name, dtype):
    state = safetensors.torch.load_file(saved / NAMES[0])
    state[name] = state[name].to(dtype)
    safetensors.torch.save_file(state, saved / NAMES[0])
    config = json.loads((saved / "config.json").read_text())
    mend(config, {name: (saved / name).read_bytes() for name in NAMES})
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{name} holds another kind of number"):
        timm_csg.from_pretrained(saved)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 10_000, '{"timm_csg": ' * 50_000, "\ufeff{}", '{"a": NaN}', ""])
def test_json_of_no_end_is_refused(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        timm_csg.from_pretrained(saved)


def test_config_of_gigabytes_is_refused_unread(saved):
    with (saved / "config.json").open("r+b") as handle:
        handle.truncate(2**33)
    with pytest.raises(CheckpointError, match="too long for a config"):
        timm_csg.from_pretrained(saved)


def test_unknown_option_of_a_newer_version_is_left_out_with_a_warning(saved, model, images, targets, caplog):
    config = json.loads((saved / "config.json").read_text())
    config["timm_csg"]["versions"]["timm_csg"] = "0.9.3"
    config["timm_csg"]["config"]["shape_of_tomorrow"] = "round"
    config["timm_csg"]["sha256"]["config.json"] = manifest.fingerprint(config)
    (saved / "config.json").write_text(json.dumps(config))
    loaded = timm_csg.from_pretrained(saved)
    assert (
        "written by timm_csg 0.9.3; ignored options that this version does not know: shape_of_tomorrow" in caplog.text
    )
    assert all(map(torch.equal, logits(loaded, images, targets), logits(model, images, targets)))


@pytest.mark.parametrize("version", ["0.0.1", timm_csg.__version__, "new", None, 3])
def test_unknown_option_of_this_or_an_older_version_is_refused(saved, version):
    config = json.loads((saved / "config.json").read_text())
    config["timm_csg"]["versions"]["timm_csg"] = version
    config["timm_csg"]["config"]["typo"] = 1
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="CSGConfig has no option typo"):
        timm_csg.from_pretrained(saved)


def test_unknown_entries_beside_the_options_are_named_in_the_log(saved, caplog):
    config = json.loads((saved / "config.json").read_text())
    config["timm_csg"]["colour"] = "red"
    (saved / "config.json").write_text(json.dumps(config))
    timm_csg.from_pretrained(saved)
    assert caplog.text.count("ignored unknown entries of 'timm_csg': colour") == 1


def test_label_names_may_be_added_by_hand(saved):
    config = json.loads((saved / "config.json").read_text())
    config["label_names"] = ["a", "b", "c", "d", "e"]
    (saved / "config.json").write_text(json.dumps(config))
    timm_csg.from_pretrained(saved)
