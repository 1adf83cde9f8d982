"""location_instability: the paper's formula against literal loops, and by hand."""

import math

import pytest
import torch
from reference import parts

import timm_csg
from timm_csg import measuring, metrics


@pytest.fixture
def random_peaks():
    generator = torch.Generator().manual_seed(3)
    images, filters, landmarks = 40, 7, 3
    strength = torch.rand(images, filters, generator=generator)
    place = 60 * torch.rand(images, filters, 2, generator=generator)
    marks = 60 * torch.rand(images, landmarks, 2, generator=generator)
    marks[torch.rand(images, landmarks, generator=generator) < 0.3] = math.nan
    targets = torch.arange(images) % 4
    marks[targets == 2, 1] = math.nan  # a class that has no landmark of this kind
    return metrics.Peaks(strength, place, targets, (48, 64)), marks


@pytest.mark.parametrize("top", [3, 100])
def test_deviations_are_those_of_the_literal_loops(random_peaks, top):
    peaks, marks = random_peaks
    found = metrics.location_instability(peaks, marks, top=top)
    expected = [
        [
            [
                parts.location_deviation(
                    peaks.strength[peaks.targets == index, kernel],
                    peaks.place[peaks.targets == index, kernel],
                    marks[peaks.targets == index, landmark],
                    80.0,
                    top,
                )
                for landmark in range(3)
            ]
            for kernel in range(7)
        ]
        for index in range(4)
    ]
    torch.testing.assert_close(found.deviations, torch.tensor(expected), equal_nan=True)
    assert found.multi_class == pytest.approx(parts.multi_class_instability(expected))
    assert found.deviations[2, :, 1].isnan().all()
    assert int(found.images.max()) <= top


def test_one_class_form_by_hand():
    # Distances to the landmark: 3, 5, 7 of a diagonal of 5 (image 3 x 4), so a deviation of 2 / 5.
    place = torch.tensor([[[3.0, 0.0]], [[0.0, 5.0]], [[7.0, 0.0]]])
    peaks = metrics.Peaks(torch.ones(3, 1), place, torch.zeros(3, dtype=torch.int64), (3, 4))
    found = metrics.location_instability(peaks, torch.zeros(3, 1, 2))
    torch.testing.assert_close(found.per_class, torch.tensor([0.4]))
    assert found.multi_class == pytest.approx(0.4)


def test_a_filter_that_stays_on_a_landmark_is_perfectly_stable(random_peaks):
    peaks, marks = random_peaks
    marks = marks.nan_to_num(nan=0.0)
    place = marks[:, :1].expand(-1, 7, -1) + torch.tensor([3.0, 4.0])
    found = metrics.location_instability(peaks._replace(place=place), marks[:, :1])
    assert float(found.deviations.abs().max()) < 1e-6


def test_only_the_strongest_images_count():
    peaks = metrics.Peaks(
        strength=torch.tensor([[3.0], [2.0], [1.0]]),
        place=torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[40.0, 0.0]]]),
        targets=torch.zeros(3, dtype=torch.int64),
        image_size=(30, 40),
    )
    marks = torch.zeros(3, 1, 2)
    assert float(metrics.location_instability(peaks, marks, top=2).deviations) == 0
    assert float(metrics.location_instability(peaks, marks).deviations) > 0.4
    without_first = marks.clone()
    without_first[0] = math.nan  # does not contain the landmark, so the second and third are the strongest
    assert float(metrics.location_instability(peaks, without_first, top=2).deviations) > 0.5


def test_silent_filters_are_counted_and_can_be_left_out():
    peaks = metrics.Peaks(
        strength=torch.tensor([[3.0], [2.0], [0.0], [0.0]]),
        place=torch.tensor([[[0.0, 0.0]], [[10.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]]),
        targets=torch.zeros(4, dtype=torch.int64),
        image_size=(3, 4),
    )
    kept = metrics.location_instability(peaks, torch.zeros(4, 1, 2))
    dropped = metrics.location_instability(peaks, torch.zeros(4, 1, 2), drop_silent=True)
    assert (kept.silent, int(kept.images)) == (0.5, 4)
    assert (dropped.silent, int(dropped.images)) == (0.0, 2)
    assert float(dropped.deviations) == pytest.approx(math.sqrt(50) / 5)


def test_owner_form_takes_each_filter_on_its_own_class():
    deviations = torch.tensor([[[0.1], [0.2]], [[0.3], [0.05]]])
    found = metrics.LocationInstability(deviations, torch.ones(2, 2, 1, dtype=torch.int64), 0.0)
    torch.testing.assert_close(found.by_owner(torch.tensor([1, 1])), torch.tensor([0.3, 0.05]))
    assert found.multi_class == pytest.approx((0.1 + 0.05) / 2)


def test_wrong_shapes_and_top_are_refused(random_peaks):
    peaks, marks = random_peaks
    with pytest.raises(ValueError, match="one row per image"):
        metrics.location_instability(peaks, marks[:-1])
    with pytest.raises(ValueError, match="two"):
        metrics.location_instability(peaks, marks, top=1)


@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout"])
def test_collected_peaks_are_those_of_the_maps(make_model, images, targets, name):
    model = make_model(name)
    found = measuring.collect_peaks(model, [(images[:2], targets[:2]), (images[2:], targets[2:])])
    maps = model.forward_features(images).detach()
    maps = maps.permute(0, 3, 1, 2) if name == "test_mambaout" else maps
    field = measuring.receptive_field(model, 64)
    for image in range(3):
        for kernel in range(0, maps.shape[1], 17):
            row, column = divmod(int(maps[image, kernel].argmax()), maps.shape[3])
            place = [float(field.centre_x[column]), float(field.centre_y[row])]
            assert found.place[image, kernel].tolist() == place
            assert float(found.strength[image, kernel]) == pytest.approx(float(maps[image, kernel].max()), abs=1e-5)
    assert torch.equal(found.targets, targets)
    assert found.image_size == (64, 64)


def test_a_plateau_stands_for_its_centre_and_a_silent_map_for_its_first_position():
    maps = torch.zeros(1, 2, 3, 5)
    maps[0, 0, :, 2:] = 6.0
    centres = torch.arange(5.0)
    strength, place = metrics.peak_places(maps, centres[:3], centres)
    assert strength.tolist() == [[6.0, 0.0]]
    assert place.tolist() == [[[3.0, 1.0], [0.0, 0.0]]]


def test_a_mask_that_acts_at_inference_is_looked_through(tiny_model, images, targets):
    model = timm_csg.differentiate(tiny_model, mechanism="csg")
    loader = [(images, targets)]
    plain = measuring.collect_peaks(model, loader)

    class Mask(type(model.mechanism)):
        acts_without_targets = True

        def forward(self, features, targets=None):
            masked = torch.zeros_like(features)
            masked[:, :, 1, 0] = 7.0
            return masked

    model.mechanism.__class__ = Mask
    masked = measuring.collect_peaks(model, loader)
    assert (masked.strength == 7.0).all()
    assert not torch.equal(plain.strength, masked.strength)
    assert len(masked.place.flatten(0, 1).unique(dim=0)) == 1


def test_collecting_leaves_the_model_as_found_and_counts_images(tiny_model, images, targets):
    tiny_model.train()
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    counts = []
    measuring.collect_peaks(tiny_model, [(images[:2], targets[:2]), (images[2:], targets[2:])], progress=counts.append)
    assert counts == [2, 1]
    assert tiny_model.training
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


def test_images_of_several_sizes_and_empty_loaders_are_refused(tiny_model, images, targets):
    with pytest.raises(ValueError, match="the same size"):
        measuring.collect_peaks(tiny_model, [(images, targets), (images[:, :, :48], targets)])
    with pytest.raises(ValueError, match="no images"):
        measuring.collect_peaks(tiny_model, [])
