"""The schema of native.json: which adapter it is, and the config that it is rebuilt from."""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from harness.disk.kinds import Number, Positive


class _Training(TypedDict):
    compute_dtype: Literal["float32", "bfloat16", "float16"]
    device: str
    eval_batch_size: Positive
    threads: Annotated[int, Field(ge=1, le=1024)] | None  # a process may not have any number
    compile: bool


class _Texts(TypedDict, total=False):
    """A task's settings that are read without the task."""

    max_tokens: Positive | None
    max_new_tokens: Positive
    chat: bool | None
    prompt_template: str
    stop: list[str]


class Recorded(TypedDict):
    """The config in an adapter's file, but for the parts that `harness.config.build` builds and
    checks: model, variant and task."""

    seed: int
    targets: str | list[str]
    layers: str | list[int]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, Number]
    bias: str
    dropout: NotRequired[Number]
    train_modules: list[str]
    train: _Training
    task: NotRequired[_Texts]


class _Base(TypedDict):
    base: str
    tokenizer: str


class About(TypedDict):
    """native.json."""

    format: int
    base: str
    fingerprints: _Base
    labels: Annotated[list[str], Field(min_length=1)] | None
    config: Recorded
    tensors_sha256: str
    sha256: str
