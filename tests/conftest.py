import copy
import gc
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from harness.tracking import end_service

pytest.register_assert_rewrite("contract")
torch.set_num_threads(1)  # the tests themselves run side by side
os.fsync = lambda descriptor: None  # that shows in a power failure alone, and waits for the disk


def composing_once(compose):
    """Makes hydra.compose remember, since it takes longer than most of what is tested with it."""
    known = {}

    def composed(config_name=None, overrides=(), return_hydra_config=False):
        sources = GlobalHydra.instance().config_loader().get_sources()
        asked = (config_name, *overrides, return_hydra_config)
        key = (*asked, *(source.path for source in sources))
        if key not in known:
            known[key] = compose(config_name, list(overrides), return_hydra_config)
        return copy.deepcopy(known[key])

    return composed


hydra.compose = composing_once(hydra.compose)


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_session(tmp_path_factory):
    """Keeps the tokens of the tests out of the user's home."""
    os.environ["LORA_VARIANTS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def global_generator():
    """Every test starts from the same global generator."""
    torch.manual_seed(0)


@pytest.fixture(params=[1, 3])
def threads(request):
    """Low-rank products are shared out by blocks of rows, one for each thread."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture
def own_wandb(tmp_path_factory, monkeypatch):
    """A wandb that knows no account, no settings and no earlier run, and leaves none behind."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    yield
    end_service()
    with warnings.catch_warnings():  # artifacts leave temporary folders to the collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
