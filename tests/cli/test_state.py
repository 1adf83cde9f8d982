"""The state file: everything comes back as it was, and a damaged file says so."""

import pytest
import torch

from timm_csg.cli.state import load_state, save_state
from timm_csg.manifest import CheckpointError


def test_nested_state_comes_back_as_it_was(tmp_path):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2, 3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 3)
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "none": None, "tuple": (1, [2.5, "text"]), 3: torch.tensor(7)}
    save_state(state, tmp_path / "state.safetensors")
    found = load_state(tmp_path / "state.safetensors")
    assert found["none"] is None
    assert found["tuple"] == (1, [2.5, "text"])
    assert found[3] == torch.tensor(7)
    assert found["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])


def test_damaged_file_is_named(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state({"value": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"state\.safetensors is damaged"):
        load_state(path)
