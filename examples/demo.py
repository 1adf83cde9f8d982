"""A page in your browser that explains pictures, without a network: python examples/demo.py runs/photos/model

Upload a picture: the answer, what each place adds to it, the filters behind it, and what decided against the second
class. Needs the extras "demo" and "plots". Nothing leaves this machine.
"""

from __future__ import annotations

import argparse
import io
import os
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import timm_csg
from timm_csg import explain, plots
from timm_csg.labels import class_names

MAPS = (explain.evidence_map, explain.owner_map, explain.grad_cam)  # the first that the model has


def explain_picture(model: nn.Module, picture: Image.Image, top: int = 5) -> tuple[Any, ...]:
    """Probabilities by class, the map over the picture and what it is, rows of filters, what decides, and its words."""
    images = explain.as_batch(model, picture)
    with torch.no_grad():
        chances = model(images).softmax(dim=1)[0]
    names = class_names(model) or [str(index) for index in range(len(chances))]
    first, second = chances.topk(2).indices.tolist()
    shown = _pixels(model, images)
    kind, heat = _map(model, images)
    over = plots.overlay(shown[0], heat).resize((384, 384 * shown.shape[2] // shown.shape[3]))
    why = explain.explain_prediction(model, images, top=top)[0]
    owner = {None: "–", **dict(enumerate(names))}
    rows = [[found.filter, owner[found.owner], f"{found.share:.0%}"] for found in why.filters]
    against = explain.contrast(model, images, first, second, top=top)
    words = f"{names[first]} is {float(against.difference[0]):.2f} ahead of {names[second]}; "
    words += f"{int(against.deciding[0].sum())} filters decide, marked with *."
    drawn = io.BytesIO()
    plots.contrast_figure(shown, against, names=names).savefig(drawn, dpi=110)
    return dict(zip(names, chances.tolist(), strict=True)), over, kind, rows, Image.open(drawn), words


def _map(model: nn.Module, images: Tensor) -> tuple[str, Tensor]:
    for make in MAPS:
        try:
            return f"Where: {make.__name__}, red to yellow speaks for the answer", make(model, images)[0]
        except ValueError:  # the model has no such map; the next one asks less of it
            continue
    return "This model reads one token, which has no place in the picture", torch.zeros(1, 1)


def _pixels(model: nn.Module, images: Tensor) -> Tensor:
    """The pictures as the model sees them, in [0, 1]."""
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (images * std + mean).clamp(0, 1)


def serve(model: nn.Module, port: int) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    safe = {"buttons": ["download", "fullscreen"]}  # none that shares a picture on the internet
    with gr.Blocks(title="Why this class?", analytics_enabled=False) as page:
        gr.Markdown("# Why this class?\nUpload a picture. It stays on this machine.")
        with gr.Row():
            picture = gr.Image(type="pil", label="Picture", sources=["upload"], **safe)
            answer = gr.Label(num_top_classes=5, label="Answer")
        with gr.Row():
            with gr.Column():
                heat, kind = gr.Image(label="Where", **safe), gr.Markdown()
            filters = gr.Dataframe(headers=["filter", "serves", "share of the evidence"], label="The filters behind it")
        versus, words = gr.Image(label="Why not the second class?", **safe), gr.Markdown()
        picture.upload(lambda one: explain_picture(model, one), picture, [answer, heat, kind, filters, versus, words])
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # the reader's own: none is fetched
    page.launch(server_name="127.0.0.1", server_port=port, share=False, theme=gr.themes.Default(**fonts))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder made by timm_csg.save_pretrained, or model/ in a run folder")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(arguments)
    serve(timm_csg.from_pretrained(args.checkpoint), args.port)


if __name__ == "__main__":
    main()
