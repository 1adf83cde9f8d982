"""The state file: everything comes back as it was, and a damaged file says so."""

from pathlib import Path

import pytest
import torch

from timm_csg.cli.state import load_state, save_state
from timm_csg.manifest import CheckpointError


def test_nested_state_comes_back_as_it_was(tmp_path):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2, 3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 3)
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "none": None, "tuple": (1, [2.5, "text"]), 3: torch.tensor(7)}
    save_state(state, tmp_path / "state.pt")
    found = load_state(tmp_path / "state.pt")
    assert found["none"] is None
    assert found["tuple"] == (1, [2.5, "text"])
    assert found[3] == torch.tensor(7)
    assert found["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])


def test_damaged_file_is_named(tmp_path):
    path = tmp_path / "state.pt"
    save_state({"value": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
        load_state(path)


def test_code_in_a_state_file_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('code of a state file was run')",))

    torch.save({"epochs_done": Evil()}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
        load_state(tmp_path / "state.pt")


def test_full_disk_is_told_in_the_disks_own_words(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs Linux")
    with pytest.raises(OSError, match="No space left"), Path("/dev/full").open("wb") as handle:
        torch.save({"value": torch.ones(10**5)}, handle)
