"""Loss and divergence on a held-out text, against numpy in float64."""

import numpy as np
import pytest
import torch

from harness.models import tiny
from harness.tasks import forgetting
from harness.tasks.forgetting import Reference, read_text

TEXT = "Exceptions are a means of breaking out of the normal flow of control. " * 9


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def by_hand(base, model, windows):
    """Mean loss of `model` and mean KL(base || model), token by token."""
    losses, divergences = [], []
    for window in windows:
        with torch.no_grad():
            p, q = (
                log_softmax(m(input_ids=window[None]).logits[0].double().numpy())
                for m in (base, model)
            )
        for place in range(1, len(window)):
            losses.append(-q[place - 1, int(window[place])])
            divergences.append((np.exp(p[place - 1]) * (p[place - 1] - q[place - 1])).sum())
    return np.mean(losses), np.mean(divergences)


@pytest.mark.parametrize(
    ("tokens", "limit"), [(1, 9), (40, 999), (255, 256), (256, 999), (300, 999), (300, 64), (9, 2)]
)
def test_what_was_forgotten(tokens, limit):
    base = tiny.load(labels=None, seed=0, architecture="llama")
    reference = Reference(base.model, base.tokenizer, TEXT, tokens, limit=limit)
    assert max(map(len, reference.windows)) <= min(256, limit)
    assert sum(len(window) - 1 for window in reference.windows) == tokens
    same = reference.compare(base.model)
    assert same["kl_nats"] == 0.0
    assert same["loss_nats_after"] == same["loss_nats_before"] and same["tokens"] == tokens
    moved = tiny.load(labels=None, seed=0, architecture="llama").model
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    found = reference.compare(moved)
    loss, kl = by_hand(base.model, moved, reference.windows)
    before, _ = by_hand(base.model, base.model, reference.windows)
    assert found["loss_nats_after"] == pytest.approx(loss, rel=1e-5)
    assert found["loss_nats_before"] == pytest.approx(before, rel=1e-5)
    assert found["kl_nats"] == pytest.approx(kl, rel=1e-3) and kl > 1e-3
    assert found["perplexity_after"] == pytest.approx(np.exp(loss), rel=1e-4)


def test_the_text_that_is_kept_here_is_the_published_one(tmp_path, monkeypatch):
    assert read_text(None).startswith("Execution model")
    damaged = tmp_path / "text.txt"
    damaged.write_text("Execution")
    monkeypatch.setattr(forgetting, "TEXT", damaged)
    with pytest.raises(ValueError, match="is not the published text"):
        read_text(None)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b" \n", "there is no text in it"), (b"\xff\xfe", "not UTF-8"), (None, "cannot be read")],
)
def test_a_file_that_is_none_is_said(content, message, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(path)


def test_a_text_of_one_token_is_none():
    base = tiny.load(labels=None, seed=0, architecture="llama")
    with pytest.raises(ValueError, match="shorter than two tokens"):
        Reference(base.model, base.tokenizer, "", 5)
