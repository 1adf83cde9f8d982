"""A process as a user starts it: only environment variables point huggingface_hub at our server."""

import os
import shutil
import subprocess
import sys

import pytest
from hub.server import Hub

pytestmark = pytest.mark.slow  # each process imports torch and timm anew

PUSH_AND_PULL = """
import timm, timm_csg, torch

model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=5), mechanism="csg").eval()
first = timm_csg.push_to_hub(model, "user/tiny")
assert timm_csg.push_to_hub(model, "user/tiny").oid == first.oid
images, targets = torch.rand(2, 3, 64, 64), torch.tensor([1, 2])
for name in ("user/tiny", f"hf-hub:user/tiny@{first.oid}"):
    assert torch.equal(timm_csg.from_pretrained(name)(images, targets), model(images, targets))
plain = timm.create_model("hf-hub:user/tiny", pretrained=True).eval()
assert torch.equal(plain(images), model(images))
"""
PULL = """
import timm, timm_csg

timm_csg.from_pretrained("user/tiny")
timm.create_model("hf-hub:user/tiny", pretrained=True)
"""
PULL_ONTO_A_FULL_DISK = """
import os, timm_csg

try:
    timm_csg.from_pretrained("user/tiny")
except timm_csg.HubError as error:
    assert "the disk is full" in str(error), error
else:
    raise SystemExit("the disk was not full")
snapshots = [file for _, _, files in os.walk(os.environ["HF_HOME"]) for file in files if file == "model.safetensors"]
assert snapshots == []
"""


def run(code, hub, home, before=(), **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    ours = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_dummy", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [*before, sys.executable, "-c", code]
    return subprocess.run(command, env=kept | ours | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("environment", [{"HF_HUB_DISABLE_XET": "1"}, {}], ids=["lfs", "xet installed"])
def test_push_pull_and_offline_pull_in_a_process(tmp_path, environment):
    hub = Hub(lfs="HF_HUB_DISABLE_XET" in environment)
    result = run(PUSH_AND_PULL, hub, tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert len(hub.repos["user/tiny"].messages) == 2
    assert any(line.startswith("PUT") for line in hub.requests()) is hub.lfs
    result = run(PULL, hub, tmp_path, HF_HUB_OFFLINE="1", **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert hub.requests() == []
    hub.close()


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs Linux namespaces")
def test_full_disk_for_real(tmp_path, saved):
    disk = tmp_path / "disk"
    disk.mkdir()
    before = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=600k none "$0" && exec "$@"', str(disk)]
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    hub = Hub()
    hub.add_repo(
        "user/tiny",
        {path.relative_to(saved).as_posix(): path.read_bytes() for path in saved.rglob("*") if path.is_file()},
    )
    result = run(PULL_ONTO_A_FULL_DISK, hub, disk, before, HF_HUB_DISABLE_XET="1")
    assert result.returncode == 0, result.stderr
    hub.close()
