import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import pytest
import torch

torch.set_num_threads(1)  # the tests themselves run side by side


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_session(tmp_path_factory):
    """What the tests tokenise is not left in the user's home."""
    os.environ["LORA_VARIANTS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def global_generator():
    """Every test starts from the same global generator."""
    torch.manual_seed(0)
