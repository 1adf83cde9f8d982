"""Matrices as CSV files: what was written is what pandas reads."""

import pandas
import pytest
import torch

from timm_csg.cli.matrices import write_matrices


def test_matrices_are_read_back_by_class_and_filter(tmp_path):
    gate, mutual = torch.eye(3)[:, :2], torch.rand(3, 2, dtype=torch.float64)
    matrices = {"gate": gate, "mutual_information": mutual, "nothing": None}
    files = write_matrices(matrices, ["cat", "café, black", "=1+1"], "photos", tmp_path / "out")
    assert [file.name for file in files] == ["gate_photos.csv", "mutual_information_photos.csv"]
    read = pandas.read_csv(files[1], index_col="class")
    assert read.columns.tolist() == ["filter 0", "filter 1"]
    assert read.index.tolist() == ["cat", "café, black", "'=1+1"]
    assert read.to_numpy() == pytest.approx(mutual.numpy(), rel=1e-5)
    assert pandas.read_csv(files[0])["filter 1"].tolist() == [0, 1, 0]


def test_names_must_fit(tmp_path):
    with pytest.raises(ValueError, match="gate has 2 classes, but there are 1 names"):
        write_matrices({"gate": torch.eye(2)}, ["cat"], "photos", tmp_path)
