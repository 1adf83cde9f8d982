"""Frozen layers that look at every picture once: maps of the last stage are then judged several times as fast."""

from __future__ import annotations

from hashlib import sha1

import torch
from torch import Tensor, nn


class FrozenOnce(nn.Module):
    """Layers in a row whose answers are kept, as long as nobody asks for a gradient and the weights are the same.

    Judges show the same picture to a network many times: for every map, every class in a grid, every shuffled weight.

    Attributes:
        limit: Bytes that are kept; what does not fit is computed again.
    """

    def __init__(self, *layers: nn.Module, limit: int = 1_000_000_000) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers).requires_grad_(False)
        self.limit, self.used = limit, 0
        self.kept: dict[tuple[str, str], Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        if images.requires_grad or type(images) is not Tensor:
            return self.layers(images)
        weights = _fingerprint(*self.layers.state_dict().values())
        keys = [(weights, _fingerprint(image)) for image in images]
        asked = dict(zip(keys, images, strict=True))
        new = {key: image for key, image in asked.items() if key not in self.kept}
        found = dict(zip(new, self.layers(torch.stack(list(new.values()))), strict=True)) if new else {}
        answer = torch.stack([found[key] if key in found else self.kept[key] for key in keys])
        for key, value in found.items():
            if self.used + value.nbytes <= self.limit:
                self.kept[key] = value.clone()
                self.used += value.nbytes
        return answer.contiguous(memory_format=torch.channels_last)


def _fingerprint(*tensors: Tensor) -> str:
    made = sha1()
    for tensor in tensors:
        made.update(tensor.detach().cpu().numpy().tobytes())
    return made.hexdigest()
