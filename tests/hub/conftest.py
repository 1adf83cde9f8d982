"""A Hub of our own for each test, and the real huggingface_hub client pointed at it."""

import os

import pytest
from hub.server import Hub
from huggingface_hub import constants

import timm_csg


@pytest.fixture(params=["regular", "lfs"])
def hub(request, tmp_path, monkeypatch):
    """The server, in the mode where it takes large files as they are, and in that of LFS."""
    yield from _running(request.param == "lfs", tmp_path, monkeypatch)


@pytest.fixture
def regular_hub(tmp_path, monkeypatch):
    yield from _running(False, tmp_path, monkeypatch)


@pytest.fixture
def lfs_hub(tmp_path, monkeypatch):
    yield from _running(True, tmp_path, monkeypatch)


def _running(lfs, tmp_path, monkeypatch):
    server = Hub(lfs=lfs)
    # What HF_ENDPOINT, HF_HOME and the like set when huggingface_hub is imported; test_process.py sets those.
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "stored_tokens"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", "hf_dummy")
    yield server
    server.close()


@pytest.fixture
def model(tiny_model, gated):
    return gated(timm_csg.differentiate(tiny_model, mechanism="csg"))


@pytest.fixture
def other(make_model, gated):
    """Another model of the same kind, with other weights and another gate."""
    return gated(timm_csg.differentiate(make_model(seed=9), mechanism="csg"), seed=9)


@pytest.fixture
def saved(model, tmp_path):
    return timm_csg.save_pretrained(model, tmp_path / "saved")


@pytest.fixture
def pushed(saved):
    """Put the model into a repository without going through a push."""

    def push(hub, repo_id="user/tiny", **options):
        files = {path.relative_to(saved).as_posix(): path.read_bytes() for path in saved.rglob("*") if path.is_file()}
        return hub.add_repo(repo_id, files, **options)

    return push
