"""A small variational auto-encoder on real pictures, and where each of its factors looks.

python examples/factor_maps.py --output runs/factors                       # scikit-learn's digits, under a minute
python examples/factor_maps.py --data cifar10.npz --output runs/factors    # pictures of one CIFAR-10 class
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cifar_resnet20 import load_cifar
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from timm_csg.explain.factors import factor_activation_map, factor_maps
from timm_csg.plots import map_figure


class Encoder(nn.Module):
    """Pictures [batch, channels, 32, 32] to mean and log-variance of the factors; its last maps are 8x8."""

    def __init__(self, channels: int, factors: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(channels, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU()]
        self.maps = nn.Sequential(*layers, nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU())
        self.factors = nn.Linear(64 * 8 * 8, 2 * factors)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.factors(self.maps(images).flatten(1)).chunk(2, dim=1)
        return mean, log_variance


def make_decoder(channels: int, factors: int) -> nn.Module:
    layers = [nn.Linear(factors, 64 * 8 * 8), nn.ReLU(), nn.Unflatten(1, (64, 8, 8))]
    layers += [nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, channels, 4, 2, 1)]
    return nn.Sequential(*layers)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", help=".npz of encoded pictures, see cifar_resnet20.py; default: scikit-learn's digits"
    )
    parser.add_argument("--factors", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    if args.data:
        images, targets = load_cifar(args.data, "train")
        images = images[targets == 1].float() / 255  # automobiles
    else:
        images = F.interpolate(torch.from_numpy(load_digits().images).float()[:, None] / 16, 32, mode="bilinear")
    held_out, images = images[-6:], images[:-6]
    encoder, decoder = Encoder(images.shape[1], args.factors), make_decoder(images.shape[1], args.factors)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    for epoch in range(args.epochs):
        for batch in images[torch.randperm(len(images))].split(64):
            mean, log_variance = encoder(batch)
            decoded = decoder(mean + torch.randn_like(mean) * (log_variance / 2).exp())
            reconstruction = F.binary_cross_entropy_with_logits(decoded, batch, reduction="none").sum(dim=(1, 2, 3))
            distribution = (mean.square() + log_variance.exp() - log_variance - 1).sum(dim=1) / 2
            loss = (reconstruction + distribution).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: reconstruction {reconstruction.mean():.1f}, distribution {distribution.mean():.1f}")
    with torch.no_grad():
        means = torch.cat([encoder(batch)[0] for batch in images.split(500)])
        used = means.var(dim=0).topk(3).indices.tolist()  # factors that say most about these pictures
        code = encoder(held_out)[0]
        shift = torch.eye(args.factors)[used] * 2
        changed = [(decoder(code + step).sigmoid() - decoder(code - step).sigmoid()).abs().mean(1) for step in shift]
        columns = {"picture": held_out, "decoded": decoder(code).sigmoid()}
    options = {"target": "kl", "weights": "position"}
    maps = factor_maps(encoder, held_out, used, **options)
    for at, factor in enumerate(used):
        columns |= {f"factor {factor}": (held_out, maps[:, at]), f"moves {factor}": (held_out, changed[at])}
    columns["all factors"] = (held_out, factor_activation_map(encoder, held_out, **options))
    args.output.mkdir(parents=True, exist_ok=True)
    map_figure(columns).savefig(args.output / "factors.png", dpi=120)
    return {"reconstruction": reconstruction.mean().item(), "distribution": distribution.mean().item()}


if __name__ == "__main__":
    main()
