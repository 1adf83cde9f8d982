"""Embeddings are what the encoder makes of pictures that are normalised and sized for it."""

import pytest
import torch

from timm_csg import judging


def test_pictures_are_normalised_and_resized_for_the_encoder(make_model):
    encoder = make_model("test_resnet", num_classes=0)
    encoder.pretrained_cfg = encoder.pretrained_cfg | {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.4, 0.3)}
    side = encoder.pretrained_cfg["input_size"][1]
    pictures = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    for_other = (pictures - 0.4) / 0.25
    found = judging.embed(encoder, [(for_other, torch.zeros(3).long())], mean=(0.4,) * 3, std=(0.25,) * 3)
    mean, std = (torch.tensor(encoder.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(found, encoder((pictures - mean) / std), rtol=1e-3, atol=1e-4)
    small = judging.embed(encoder, [(for_other[..., ::2, ::2], torch.zeros(3).long())])
    assert small.shape == found.shape


def test_what_is_no_encoder_is_refused(make_model):
    with pytest.raises(ValueError, match="loader is empty"):
        judging.embed(make_model(num_classes=0), [])
    with pytest.raises(ValueError, match="must return a vector"):
        judging.embed(torch.nn.Conv2d(3, 2, 1), [(torch.rand(1, 3, 8, 8), torch.tensor([0]))])
