"""Forgetting of a language model: a held-out text before and after training.

On each token of a text that no task trains on,

    loss = -log p(token | what stands before it)        KL(p0 || p) = sum_v p0 (log p0 - log p)

with p0 of the base as it was loaded, dense, before any variant has touched it, and p of the trained
model. Both are means over tokens, in nats. Compare learning against forgetting as Biderman et al.
(2024, "LoRA Learns Less and Forgets Less", arXiv:2405.09673) do.

Shapes: t tokens of a window, v vocabulary.
"""

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.models.mode import evaluating
from harness.tasks import files
from harness.tasks.encoding import as_text, control_tokens_in
from variants.settings import check_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT = Path(__file__).parent / "data/python_reference.txt"
SHA256 = "1d8b9b9cc36375b78483e3da5bd16a270df83e73a1363c21337f7409494e06e5"
WINDOW = 256  # tokens that a model sees at a time


def read_text(file: str | Path | None) -> str:
    """The held-out text: of a file in UTF-8, or for None the one that is kept here.

    Raises ValueError if it cannot be read, is empty, or ours is damaged.
    """
    if not (file is None or isinstance(file, Path)):
        check_text("task.held_out_text", file)
    path = TEXT if file is None else Path(file).expanduser()
    text = files.read_text(path)
    if file is None and hashlib.sha256(text.encode()).hexdigest() != SHA256:
        raise ValueError(f"{path} is not the published text; reinstall the package.")
    if not text.strip():
        raise ValueError(f"{path}: there is no text in it.")
    return text


class Reference:
    """The base's predictions of the text; `compare` says how far a model has moved from it.

    It is held in float32 on the CPU: 100 MB for 500 tokens and a vocabulary of 50,000.

    Args:
        model: the base, before it is adapted.
        text: as much of its beginning is used as gives `tokens` predicted tokens.
        limit: how many the model reads at a time; no more than WINDOW are given to it.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        text: str,
        tokens: int,
        *,
        limit: int = WINDOW,
    ):
        window = min(WINDOW, limit)
        if window < 2:
            raise ValueError(f"the model reads {limit} token at a time, which predicts nothing.")
        control = as_text(control_tokens_in(tokenizer, [text]))
        ids = tokenizer(text, verbose=False, **control)["input_ids"]
        pieces = torch.tensor(ids[: tokens + math.ceil(tokens / (window - 1))]).split(window)
        self.windows = [piece for piece in pieces if len(piece) > 1]
        if not self.windows:
            raise ValueError("the held-out text is shorter than two tokens.")
        self.log_p = [self._log_p(model, window) for window in self.windows]
        self.before = self._measure(model)[0]

    def _log_p(self, model: Any, window: Tensor) -> Tensor:
        """log p of every token at every place but the first (t-1, v), float32 on the CPU."""
        with evaluating(model):
            device = next(model.parameters()).device
            logits = model(input_ids=window[None].to(device), use_cache=False).logits[0, :-1]
            return F.log_softmax(logits.float(), -1).cpu()

    def _measure(self, model: Any) -> tuple[float, float]:
        """Mean loss and mean KL from the base, in nats a token."""
        loss = kl = count = 0.0
        for window, base in zip(self.windows, self.log_p, strict=True):
            log_p = self._log_p(model, window)
            loss -= float(log_p.gather(1, window[1:, None]).double().sum())
            kl += float((base.exp() * (base - log_p)).double().sum())
            count += len(window) - 1
        return loss / count, kl / count

    def compare(self, model: Any) -> dict[str, float | int]:
        """loss_nats and perplexity before and after, kl_nats from the base, and tokens."""
        loss, kl = self._measure(model)
        return {
            "loss_nats_before": self.before,
            "loss_nats_after": loss,
            "perplexity_before": math.exp(min(self.before, 700.0)),
            "perplexity_after": math.exp(min(loss, 700.0)),
            "kl_nats": kl,
            "tokens": sum(len(window) - 1 for window in self.windows),
        }
