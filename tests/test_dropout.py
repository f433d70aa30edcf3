"""The masks of dropout: their shares, their independence, their place in a run."""

import pytest
import torch

import variants
from variants.dropout import DropoutMasks


def mask_of(shape, p, *, seed=3, path="query", step=1):
    size, cpu = torch.Size(shape), torch.device("cpu")
    return DropoutMasks(step).keep(p, seed, path, (0, 1), size, cpu)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_a_mask_keeps_the_right_share_of_entries_independently(p):
    keep = mask_of((2**10, 2**10), p).double()
    for view in (keep, *keep.view(-1, 4).T):  # the four draws of a word too
        sigma = (p * (1 - p) / view.numel()) ** 0.5
        assert abs(float(view.mean()) - (1 - p)) < 4.5 * sigma + 2**-16
    flat = keep.flatten() - keep.mean()
    for lag in (1, 2, 3, 4, 1024):
        correlation = float((flat[:-lag] * flat[lag:]).mean() / (p * (1 - p)))
        assert abs(correlation) < 4.5 / len(flat) ** 0.5
    for other in ({"seed": 4}, {"path": "value"}, {"step": 2}):
        others = mask_of((2**10, 2**10), p, **other).double().flatten()
        assert abs(float((flat * (others - others.mean())).mean() / (p * (1 - p)))) < 4.5 / 2**10


def test_one_pass_draws_one_table_for_layers_of_a_size():
    masks, size, cpu = DropoutMasks(1), torch.Size((40, 1000)), torch.device("cpu")
    tables = {
        masks.keep(0.1, 3, path, (0, 1), size, cpu).untyped_storage().data_ptr()
        for path in ("query", "key", "query")
    }
    assert len(tables) == 1
    assert not torch.equal(
        masks.keep(0.1, 3, "query", (0, 1), size, cpu), masks.keep(0.1, 3, "key", (0, 1), size, cpu)
    )


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 7), (0, 4), (2**16,), (13, 2**15 - 1)])
def test_masks_of_every_size(shape):
    assert mask_of(shape, 0.5).shape == shape


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_dropout_outside_its_range_is_refused(p):
    with pytest.raises(ValueError, match=r"dropout is .*; it must lie in \[0, 1\)"):
        variants.LoraLinear(
            variants.DenseStore(torch.ones(4, 4)),
            None,
            path="q",
            seed=0,
            rank=1,
            alpha=1,
            dropout=p,
        )


def test_a_layer_that_drops_no_input_refuses_dropout():
    store = variants.DenseStore(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"dropout is 0.1; it must be 0, since FixedLinear drops"):
        variants.FixedLinear(store, None, path="q", seed=0, dropout=0.1)
