"""Language modelling on the user's own files, in UTF-8: `task=local_sft` and `task=local_text`.

    python train.py task=local_sft task.files.train=train.jsonl task.files.test=test.jsonl
    python train.py task=local_text task.files.train=train.txt task.files.test=test.txt

For supervised fine-tuning, .jsonl or .json holds one object a line: {"prompt": ..., "completion":
...}, or a conversation, {"messages": [{"role": "user", "content": ...}, ...]}, whose roles are
system (at the start, if at all), user and assistant and which the assistant ends. Plain text is a
.txt of paragraphs, separated by blank lines, or a .jsonl or .json with a text field.

Blank lines are skipped. Without a validation file, about a tenth of the train rows is held out by
the hash of all but the answer; a test file is always needed, as in local.py. A row's id is its line
in its file, a paragraph's its first.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.disk import patterns
from harness.tasks.files import check_fields, read_records, read_text, shown, text_of
from harness.tasks.language import LanguageModelling
from harness.tasks.local import given_paths
from harness.tasks.rows import with_validation
from harness.tasks.turns import Row
from harness.words import did_you_mean
from variants.settings import check_type, check_types

if TYPE_CHECKING:
    import regex

JSON = (".jsonl", ".json")
ROLES = ("system", "user", "assistant")
ANSWERS = 200  # generated for an `answer_pattern`, if it is not said how many

Turns = tuple[tuple[str, str], ...]


# ---- files ---------------------------------------------------------------------------------------


def read_sft_rows(
    path: Path,
    *,
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    messages_field: str = "messages",
) -> list[Row]:
    """The rows of one file, ids being line numbers from 1.

    Raises ValueError, with the file and the line, on whatever is not such a row.
    """
    rows = []
    for line, record in read_records(path, JSON):
        where = f"{path}, line {line}"
        pair = [field for field in (prompt_field, completion_field) if field in record]
        if messages_field not in record:
            if not pair:
                raise ValueError(
                    f"{where}: neither {prompt_field!r} and {completion_field!r} nor "
                    f"{messages_field!r} among {sorted(record)}"
                    f".{did_you_mean(prompt_field, record) or did_you_mean(messages_field, record)}"
                )
            settings = ("prompt_field", "completion_field")
            check_fields(record, (prompt_field, completion_field), where, settings)
            prompt = text_of(record, prompt_field, where)
            turns: Turns = (
                ("user", prompt),
                ("assistant", text_of(record, completion_field, where)),
            )
        elif len(pair) == 2:
            raise ValueError(
                f"{where}: has {prompt_field!r} and {completion_field!r} as well as "
                f"{messages_field!r}; rename those that are not meant."
            )
        else:
            turns = _conversation(record[messages_field], messages_field, where)
        rows.append(Row(line, turns))
    if not rows:
        raise ValueError(f"{path}: no rows.")
    return rows


def _conversation(messages: Any, field: str, where: str) -> Turns:
    """The turns of a chat. Raises ValueError, with `where`, on one that cannot be learned from."""
    if not isinstance(messages, list):
        raise ValueError(f"{where}: field {field!r} is {shown(messages)}, not a list of messages.")
    turns = []
    for number, message in enumerate(messages, start=1):
        here = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{here}: expected an object with role and content.")
        check_fields(message, ("role", "content"), here)
        role = message["role"]
        if role not in ROLES:
            raise ValueError(
                f"{here}: role {shown(role)} is none of {', '.join(ROLES)}"
                f".{did_you_mean(role if isinstance(role, str) else '', ROLES)}"
            )
        if role == "system" and number > 1:
            raise ValueError(f"{here}: a system message can only be the first.")
        turns.append((role, text_of(message, "content", here)))
    roles = [role for role, _ in turns]
    if "assistant" not in roles:
        raise ValueError(f"{where}: no message of the assistant, so that nothing can be learned.")
    if "user" not in roles[: roles.index("assistant")]:
        raise ValueError(f"{where}: the assistant speaks before the user.")
    if roles[-1] != "assistant":
        raise ValueError(f"{where}: the last message is the {roles[-1]}'s, not the assistant's.")
    return tuple(turns)


def read_text_rows(path: Path, *, text_field: str = "text") -> list[Row]:
    """The paragraphs of a .txt, or the text fields of a .jsonl, ids being line numbers from 1.

    Raises ValueError, with the file and the line, on whatever cannot be read.
    """
    rows = []
    if path.suffix.lower() == ".txt":
        paragraph: list[str] = []
        lines = read_text(path).split("\n")
        for number, line in enumerate([*lines, ""], start=1):
            if line.strip():
                paragraph.append(line.rstrip())
            elif paragraph:
                rows.append(Row(number - len(paragraph), (("text", "\n".join(paragraph)),)))
                paragraph = []
    else:
        for number, record in read_records(path, (".txt", *JSON)):
            where = f"{path}, line {number}"
            check_fields(record, (text_field,), where, ("text_field",))
            rows.append(Row(number, (("text", text_of(record, text_field, where)),)))
    if not rows:
        raise ValueError(f"{path}: no rows.")
    return rows


# ---- tasks ---------------------------------------------------------------------------------------


class LocalSft(LanguageModelling):
    """`task=local_sft`.

    Args:
        files: paths of train, test and, if there is one, validation; None counts as absent.
        prompt_field, completion_field, messages_field: the fields of a row, for all files.
        answer_pattern: a regular expression with one group, which is what a generated answer is
            judged by: it must be the completion's, but for commas and spaces. None: all of it.
        generate_rows: see `LanguageModelling`; None: 200 with an answer_pattern, else none.
        settings: see `LanguageModelling`.

    Raises ValueError, with file and line, on anything that `read_sft_rows` refuses and on an answer
    of validation or test in which answer_pattern finds nothing.
    """

    def __init__(
        self,
        files: Mapping[str, str | Path | None],
        *,
        prompt_field: str = "prompt",
        completion_field: str = "completion",
        messages_field: str = "messages",
        answer_pattern: str | None = None,
        generate_rows: int | None = None,
        **settings: Any,
    ):
        fields = {
            "prompt_field": prompt_field,
            "completion_field": completion_field,
            "messages_field": messages_field,
        }
        check_types(str, **fields)
        self.pattern = _one_group(answer_pattern)
        if generate_rows is None:
            generate_rows = ANSWERS if self.pattern else 0
        elif self.pattern and generate_rows == 0:
            raise ValueError("answer_pattern has no effect with generate_rows=0.")
        paths = given_paths(files, "local_sft")
        read = {split: read_sft_rows(path, **fields) for split, path in paths.items()}
        rows, note = with_validation(read, str(paths["train"]))
        for split in ("validation", "test") if self.pattern else ():
            for row in rows[split]:
                if self.extract(row.answer) is None:
                    raise ValueError(
                        f"{paths.get(split, paths['train'])}, line {row.id}: answer_pattern "
                        f"{answer_pattern!r} finds nothing in the answer."
                    )
        super().__init__(
            "local_sft", rows, generate_rows=generate_rows, notes=[note], **settings
        )  # fmt: skip

    def extract(self, answer: str) -> str | None:
        """The first match of answer_pattern's group, without commas and spaces, or None."""
        assert self.pattern is not None
        match = patterns.Budget("task.answer_pattern").search(self.pattern, answer)
        return re.sub(r"[,\s]", "", match[1]) if match and match[1] is not None else None

    def score(self, answer: str, row: Row) -> dict[str, Any]:
        """Judges the answer, and gives the match of an answer_pattern."""
        if self.pattern is None:
            return super().score(answer, row)
        found = self.extract(answer)
        return {"correct": found == self.extract(row.answer), "found": found}

    def describe(self) -> str:
        """Says what every task says, and who writes the turns once the tokenizer is known."""
        if self._tokenizer is None:
            return super().describe()
        if self.writer.chat:
            return f"{super().describe()}; turns are written by the tokenizer's chat template"
        return f"{super().describe()}; turns are written one after another, without a chat template"


def _one_group(pattern: str | None) -> "regex.Pattern[str] | None":
    """Compiles the pattern. Raises ValueError unless it is a regular expression with one group."""
    check_type("answer_pattern", pattern, str | None)
    if pattern is None:
        return None
    compiled = patterns.compiled(pattern, f"answer_pattern {pattern!r}")
    if compiled.groups != 1:
        raise ValueError(
            f"answer_pattern {pattern!r} has {compiled.groups} groups; it must have one, around "
            "what is compared."
        )
    return compiled


class LocalText(LanguageModelling):
    """`task=local_text`.

    Args:
        files: paths of train, test and, if there is one, validation; None counts as absent.
        text_field: the field of a row, for .jsonl.
        packing, settings: see `LanguageModelling`.

    Raises ValueError, with file and line, on anything that `read_text_rows` refuses.
    """

    def __init__(
        self,
        files: Mapping[str, str | Path | None],
        *,
        text_field: str = "text",
        packing: bool = True,
        **settings: Any,
    ):
        check_type("text_field", text_field, str)
        paths = given_paths(files, "local_text")
        read = {split: read_text_rows(path, text_field=text_field) for split, path in paths.items()}
        rows, note = with_validation(read, str(paths["train"]))
        super().__init__(
            "local_text", rows, chat=False, packing=packing, notes=[note], **settings
        )  # fmt: skip
