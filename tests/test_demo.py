"""The demo: what it computes, without gradio; and its page in a real browser, where gradio and Chromium are there."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from plots.browser import CHROMIUM, Browser

import timm_csg

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8))


def make(name="test_resnet", **options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options).eval()
    model.pretrained_cfg["label_names"] = ["cat", "dog", "owl"]
    return model


def test_answer_map_filters_and_second_class_belong_together(demo, picture):
    model = timm_csg.differentiate(make()).eval()
    chances, heat, kind, rows, versus, words = demo.explain_picture(model, picture, top=3)
    images = timm_csg.explain.as_batch(model, picture)
    expected = model(images).softmax(dim=1)[0]
    assert list(chances) == ["cat", "dog", "owl"]
    assert list(chances.values()) == pytest.approx(expected.tolist())
    first, second, _ = sorted(chances, key=chances.get, reverse=True)
    assert "evidence_map" in kind
    assert heat.size == (384, 384)
    assert [row[1] for row in rows] == [first] * 3  # filters that the class owns
    assert words.startswith(f"{first} is ")
    assert f"ahead of {second}; " in words
    assert versus.width > 400


@pytest.mark.parametrize(
    ("name", "mechanism", "kind"),
    [("test_resnet", "csg", "owner_map"), ("test_resnet", None, "grad_cam"), ("test_vit", None, "one token")],
)
def test_models_without_assigned_filters_get_the_map_that_they_have(demo, picture, name, mechanism, kind):
    model = make(name)
    if mechanism:
        model = timm_csg.differentiate(model, mechanism=mechanism).eval()
    _, heat, told, rows, _, _ = demo.explain_picture(model, picture)
    assert kind in told
    assert len(rows) == 5
    assert heat.size == (384, 384)


@pytest.fixture
def address(tmp_path):
    """The page, served by a process of its own."""
    pytest.importorskip("gradio", reason="needs the extra 'demo'")
    model = timm_csg.differentiate(make())
    timm_csg.save_pretrained(model, tmp_path / "model", class_names=["cat", "dog", "owl"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "examples" / "demo.py", tmp_path / "model", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, env=environment) as run:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                assert run.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/"
        run.terminate()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_page_explains_an_uploaded_picture_without_a_network(address, picture, tmp_path):
    picture.save(tmp_path / "cat.png")
    with Browser(tmp_path / "profile") as page:
        page.resize(1280, 1500)
        page.open(address)
        wait(page, "!!document.querySelector('input[type=file]')")
        root = page.send("DOM.getDocument")["root"]["nodeId"]
        node = page.send("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
        page.send("DOM.setFileInputFiles", nodeId=node, files=[str(tmp_path / "cat.png")])
        wait(page, "document.body.innerText.includes('ahead of')")
        time.sleep(1)  # pictures are drawn
        text = page.run("document.body.innerText")
        assert "evidence_map" in text
        assert page.run("document.querySelectorAll('[aria-label*=Share], [title*=Share]').length") == 0
        assert page.run("[...document.images].filter(i => i.naturalWidth > 200).length") >= 2
        foreign = [url for url in page.requests if not url.startswith((address, "blob:"))]
        assert foreign == []


def wait(page, condition, seconds=60):
    end = time.monotonic() + seconds
    while not page.run(condition):
        assert time.monotonic() < end, page.run("document.body.innerText")
        time.sleep(0.2)
