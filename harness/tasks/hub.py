"""Text classification on a dataset of the Hugging Face Hub, through the `datasets` library.

    pip install "lora-variants[hub]"
    python train.py task=hub task.dataset=stanfordnlp/imdb task.splits.validation=null

Class names come from the dataset's ClassLabel if it has one, else from the train rows. A split that
is null is absent: without validation, about a tenth of train is held out by the hash of the text;
test is always needed. (GLUE hides its test labels: task.splits.test=validation
task.splits.validation=null.) A row's id is its position in its split, from 0.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.tasks.classification import Row, TextClassification, check_labels, label_names
from harness.tasks.files import check_fields
from harness.tasks.rows import with_validation
from harness.words import did_you_mean
from variants.settings import check_text


def load_splits(dataset: str, config: str | None, revision: str | None) -> Mapping[str, Any]:
    """Every split of the dataset by name.

    Raises ValueError if `datasets` is not installed, or cannot load this.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError('task=hub needs: pip install "lora-variants[hub]".') from error
    try:
        return datasets.load_dataset(dataset, config, revision=revision)
    except Exception as error:  # whatever it is: the network, the name, the files
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"the dataset {dataset!r} cannot be loaded (is it spelled right, and is the Hub in "
            f"reach?): {reason}"
        ) from error


def read_split(
    data: Any, where: str, *, text_field: str, label_field: str
) -> tuple[list[Row], tuple[str, ...] | None]:
    """(rows, class names or None if the dataset does not name them) of one split.

    Raises ValueError, with `where` and the row, on a missing field, an empty text or no label.
    """
    fields = (text_field, label_field)
    check_fields(data.column_names, fields, where, ("text_field", "label_field"))
    names = getattr(data.features[label_field], "names", None)
    rows = []
    for number, (text, label) in enumerate(zip(data[text_field], data[label_field], strict=True)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}, row {number}: {text_field!r} is {text!r}; it must be text.")
        if not isinstance(label, str | int) or label in (-1, ""):
            raise ValueError(
                f"{where}, row {number}: {label_field!r} is {label!r}, which is not a class; "
                "hidden test labels are marked so."
            )
        rows.append(Row(number, text, names[label] if names else str(label)))
    if not rows:
        raise ValueError(f"{where}: no rows.")
    return rows, tuple(names) if names else None


class HubClassification(TextClassification):
    """`task=hub`.

    Args:
        dataset: the Hub's id, or a local folder that `datasets` understands.
        config: the dataset's configuration (GLUE's "sst2"), or None.
        revision: a commit or tag of the dataset; pin it where results are to be repeated.
        splits: the dataset's own name of train, validation and test; None counts as absent.
        text_field, label_field: the columns of a row.
        settings: see `TextClassification`.
    """

    remote = True

    def __init__(
        self,
        dataset: str | None,
        *,
        splits: Mapping[str, str | None],
        config: str | None = None,
        revision: str | None = None,
        text_field: str = "text",
        label_field: str = "label",
        **settings: Any,
    ):
        if not dataset:
            raise ValueError("task=hub needs a dataset: task.dataset=<id on the Hub>.")
        named = {f"splits.{split}": name for split, name in splits.items()}
        texts = {"dataset": dataset, "config": config, "revision": revision, **named}
        for key, value in texts.items():
            if value is not None:
                check_text(f"task.{key}", value)
        if dataset.startswith("~"):
            dataset = str(Path(dataset).expanduser())
        wanted = {split: name for split, name in splits.items() if name is not None}
        for split in ("train", "test"):
            if split not in wanted:
                raise ValueError(f"task=hub needs a {split} split: task.splits.{split}=<name>.")
        loaded = load_splits(dataset, config, revision)
        rows, names = {}, None
        for split, name in wanted.items():
            if name not in loaded:
                hint = " (null holds out some of train)" if split == "validation" else ""
                raise ValueError(
                    f"{dataset}: no split {name!r} for task.splits.{split}{hint}; there are "
                    f"{', '.join(loaded)}.{did_you_mean(name, loaded)}"
                )
            rows[split], split_names = read_split(
                loaded[name], f"{dataset}, {name}", text_field=text_field, label_field=label_field
            )
            names = split_names if split == "train" else names
        labels = names or label_names(rows["train"], f"{dataset}, {wanted['train']}")
        for split, name in wanted.items():
            check_labels(rows[split], labels, f"{dataset}, {name}, row")
        rows, note = with_validation(rows, f"{dataset}, {wanted['train']}")
        super().__init__("hub", rows, labels, notes=[note], **settings)
