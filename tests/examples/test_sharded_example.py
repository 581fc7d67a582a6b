"""The sharded example, as torchrun starts it."""

from __future__ import annotations

import pytest
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no Gloo", allow_module_level=True)

from load_example import EXAMPLES
from test_language_model_example import write_dictionary
from torchrun import torchrun


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    write_dictionary(tmp_path)
    torchrun(EXAMPLES / "sharded.py", 2, "--steps", 8, "--data", tmp_path)
