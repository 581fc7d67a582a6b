"""Checkpoints of sharded tables: saved by some number of processes, loaded by another, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no Gloo", allow_module_level=True)

from torchrun import torchrun


def run(ranks: int, folder: Path, *what: str) -> None:
    for report in torchrun("sharded_checkpoint.py", ranks, folder, *what):
        assert report["ran"] == ["keys", *what]
        assert not report["failures"], "\n".join(report["failures"].values())


def test_what_is_saved_is_loaded(tmp_path):
    run(2, tmp_path, "save:by2", "load:by2", "resume")


@pytest.mark.slow
def test_any_number_of_processes_loads_what_any_number_has_saved(tmp_path):
    """And makes the same table of one seed, also of fewer classes than processes; and training continues."""
    run(2, tmp_path, "save:by2", "train")
    run(4, tmp_path, "load:by2", "save:by4")
    run(1, tmp_path, "load:by2", "load:by4")
    run(3, tmp_path, "load:by2", "load:by4", "continue")
