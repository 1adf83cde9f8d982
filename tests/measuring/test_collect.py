"""collect: ungated features, both logits, everything as found."""

import contextlib

import numpy as np
import pytest
import torch
from processes import run_in_processes
from torch import nn

import timm_csg
from timm_csg import measuring


def loader(images, targets):
    return [(images[:2], targets[:2]), (images[2:], targets[2:])]


def test_features_are_the_spatial_mean_before_the_gate(any_model, images, targets, gated):
    expected = any_model.forward_features(images)
    if expected.ndim == 4 and str(getattr(any_model, "output_fmt", "NCHW")) != "NHWC":
        expected = expected.permute(0, 2, 3, 1)
    expected = expected.reshape(len(images), -1, expected.shape[-1]).mean(1)
    model = gated(timm_csg.differentiate(any_model, mechanism="csg"))
    seen = measuring.collect(model, loader(images, targets))
    torch.testing.assert_close(seen.features, expected)
    torch.testing.assert_close(seen.logits, model(images))
    torch.testing.assert_close(seen.gated_logits, model(images, targets))
    assert torch.equal(seen.targets, targets)


def test_plain_model_has_no_gated_logits(tiny_model, images, targets):
    assert measuring.collect(tiny_model, loader(images, targets)).gated_logits is None


def test_modes_and_statistics_are_left_as_found(tiny_model, images, targets):
    tiny_model.train()
    tiny_model.layer1.eval()
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    modes = [module.training for module in tiny_model.modules()]
    measuring.collect(tiny_model, loader(images, targets))
    assert [module.training for module in tiny_model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_progress_counts_images(tiny_model, images, targets):
    counts = []
    measuring.collect(tiny_model, loader(images, targets), progress=counts.append)
    assert counts == [2, 1]


def test_empty_loader_and_soft_targets_are_refused(tiny_model, images):
    with pytest.raises(ValueError, match="no images"):
        measuring.collect(tiny_model, [])
    with pytest.raises(ValueError, match="class indices"):
        measuring.collect(tiny_model, [(images, torch.rand(3, 5))])


def test_directory_gives_the_same_values_and_can_be_opened_again(gated, make_model, images, targets, tmp_path):
    model = gated(timm_csg.differentiate(make_model(), mechanism="csg"))
    expected = measuring.collect(model, loader(images, targets))
    seen = measuring.collect(model, loader(images, targets), directory=tmp_path / "runs" / "seen")
    opened = measuring.Activations.open(tmp_path / "runs" / "seen")
    for tensor, again, other in zip(expected, seen, opened, strict=True):
        assert tensor.dtype == again.dtype
        assert torch.equal(tensor, again)
        assert torch.equal(tensor, other)
    features = np.load(tmp_path / "runs" / "seen" / "features.npy", allow_pickle=False)
    assert np.array_equal(features, expected.features.numpy())


def test_writing_into_mapped_activations_leaves_the_files_as_they_are(tiny_model, images, targets, tmp_path):
    seen = measuring.collect(tiny_model, loader(images, targets), directory=tmp_path / "seen")
    before = seen.features.clone()
    seen.features.zero_()
    assert torch.equal(measuring.Activations.open(tmp_path / "seen").features, before)


def test_an_interrupted_pass_leaves_no_directory_and_the_modes_as_found(tiny_model, images, targets, tmp_path):
    def breaks():
        yield images, targets
        raise OSError("disk gone")

    tiny_model.train()
    with pytest.raises(OSError, match="disk gone"):
        measuring.collect(tiny_model, breaks(), directory=tmp_path / "seen")
    assert list(tmp_path.iterdir()) == []
    assert tiny_model.training


def test_a_directory_with_files_in_it_is_not_touched(tiny_model, images, targets, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="new or empty"):
        measuring.collect(tiny_model, loader(images, targets), directory=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_directory_is_filled(tiny_model, images, targets, tmp_path):
    (tmp_path / "seen").mkdir()
    assert len(measuring.collect(tiny_model, loader(images, targets), directory=tmp_path / "seen").targets) == 3


def test_files_that_do_not_belong_together_are_refused(tiny_model, images, targets, tmp_path):
    with pytest.raises(ValueError, match=r"found no features.npy, targets.npy, logits.npy"):
        measuring.Activations.open(tmp_path)
    measuring.collect(tiny_model, loader(images, targets), directory=tmp_path / "seen")
    np.save(tmp_path / "seen" / "targets.npy", np.zeros(2, dtype=np.int64))
    with pytest.raises(ValueError, match=r"\[3, 2, 3\] rows"):
        measuring.Activations.open(tmp_path / "seen")


def test_bytes_are_those_of_the_tensors(gated, make_model, images, targets, tmp_path):
    model = gated(timm_csg.differentiate(make_model(), mechanism="csg"))
    seen = measuring.collect(model, loader(images, targets), directory=tmp_path / "seen")
    expected = measuring.collect_bytes(3, 96, 5, differentiated=True)
    assert sum(tensor.nbytes for tensor in seen) == expected
    assert sum(path.stat().st_size for path in (tmp_path / "seen").iterdir()) == expected + 4 * 128


def test_gated_by_prediction_uses_the_row_of_the_predicted_class(gated, make_model, images, targets):
    model = gated(timm_csg.differentiate(make_model(), mechanism="csg"))
    seen = measuring.collect(model, loader(images, targets), gated_by="prediction")
    torch.testing.assert_close(seen.gated_logits, model(images, model(images).argmax(1)))
    with pytest.raises(ValueError, match="'target' or 'prediction'"):
        measuring.collect(model, loader(images, targets), gated_by="label")


def test_autocast_gives_float32_of_the_rounded_values(tiny_model, images, targets):
    seen = measuring.collect(tiny_model, loader(images, targets), amp_dtype=torch.bfloat16)
    exact = measuring.collect(tiny_model, loader(images, targets))
    assert seen.features.dtype == seen.logits.dtype == torch.float32
    assert not torch.equal(seen.features, exact.features)
    torch.testing.assert_close(seen.features, exact.features, rtol=0.05, atol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_model_on_a_gpu_gives_the_same_on_the_cpu(tiny_model, images, targets):
    expected = measuring.collect(tiny_model, loader(images, targets))
    seen = measuring.collect(tiny_model.cuda(), loader(images, targets))
    assert not seen.features.is_cuda
    torch.testing.assert_close(seen.features, expected.features, rtol=1e-3, atol=1e-3)


def test_shards_hold_every_sample_once():
    shards = [list(measuring.ShardSampler(7, rank=rank, world_size=3)) for rank in range(3)]
    assert shards == [[0, 3, 6], [1, 4], [2, 5]]
    assert list(measuring.ShardSampler(1, rank=2, world_size=3)) == []
    with pytest.raises(ValueError, match="between 0 and world_size - 1 = 2, but is 3"):
        measuring.ShardSampler(7, rank=3, world_size=3)


def test_indices_without_distributed_are_refused(tiny_model, images, targets):
    with pytest.raises(ValueError, match="distributed=True"):
        measuring.collect(tiny_model, loader(images, targets), indices=[0, 1, 2])


def in_process(rank, folder):
    """One of two processes; images are numbers, so that rows can be told apart."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    model, images, targets = Numbers(), torch.arange(5.0)[:, None, None, None], torch.tensor([0, 1, 0, 1, 1])
    share = measuring.ShardSampler(5)
    batches = [(images[index], targets[index]) for index in torch.tensor(list(share)).split(2)]
    gathered = {"in turn": measuring.collect(model, batches, distributed=True)}
    gathered["ordered"] = measuring.collect(model, batches, distributed=True, indices=share.indices)
    options = {"distributed": True, "indices": share.indices, "directory": f"{folder}/new/seen"}
    gathered["on disk"] = measuring.collect(model, batches, **options)
    padded = list(torch.utils.data.DistributedSampler(images, shuffle=False))
    gathered["padded"] = measuring.collect(model, [(images[padded], targets[padded])], distributed=True, indices=padded)
    lonely = [(images, targets)] if rank == 1 else []
    gathered["one share is empty"] = measuring.collect(model, lonely, distributed=True, indices=range(5 * rank))
    for options, loader in (({"indices": [0]}, [(images, targets)]), ({}, [])):
        with contextlib.suppress(ValueError):
            measuring.collect(model, loader, distributed=True, **options)
            gathered["not refused"] = options
    torch.save({name: (seen.features, seen.targets) for name, seen in gathered.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_gather_each_sample_once_and_in_order(tmp_path):
    run_in_processes(in_process, str(tmp_path), count=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    order = {name: features[:, 0].tolist() for name, (features, _) in first.items()}
    assert order.pop("in turn") == [0, 2, 4, 1, 3]
    assert order == {name: [0, 1, 2, 3, 4] for name in ("ordered", "on disk", "padded", "one share is empty")}
    assert first["ordered"][1].tolist() == [0, 1, 0, 1, 1]
    assert all(torch.equal(first[name][0], second[name][0]) for name in first)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["seen"]


class Numbers(nn.Module):
    """Features are the image, logits too."""

    def __init__(self):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))

    def forward_features(self, images):
        return images

    def forward_head(self, features):
        return features.flatten(1)
