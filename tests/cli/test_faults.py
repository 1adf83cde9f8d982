"""Failing file operations and signals at any moment: one sentence, and a run that is finished or can be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each training is a fork of a process that has loaded everything")
def test_no_fault_loses_a_run(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("faulty_train.py")), str(tmp_path), "40", "20", "6"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.stdout.endswith("40 failures, 20 signals and 6 damages, 0 problems\n"), result.stdout + result.stderr
