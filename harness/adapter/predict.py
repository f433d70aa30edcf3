"""Answers of a trained adapter to texts: one JSON object a line, in the order of the texts.

python -m harness.adapter.predict outputs/<experiment>/<run> --text "a warm and moving film"
python -m harness.adapter.predict outputs/<experiment>/<run> --file reviews.txt > answers.jsonl
tail -f log.txt | python -m harness.adapter.predict outputs/<experiment>/<run> --batch-size 1
python -m harness.adapter.predict outputs/<experiment>/<run> --benchmark

A file holds one text a line or, if its name ends in .jsonl or .json, a JSON object with a field
"text" or, if in .csv or .tsv, a header and rows with a column of that name; standard input is read
where neither a text nor a file is given. Blank lines are skipped. Texts are cut where the run cut
its own, and control tokens in them are what they were to the run, by default text.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from harness import cli
from harness.adapter.folders import adapter_folder
from harness.tasks.files import check_fields, parse_json, read_records, shown

# What only --benchmark, and what only an answer, has a use for.
BENCHMARK_ONLY, ANSWERS_ONLY = ("rounds", "threads"), ("merged",)


def check_text(text: Any, where: str) -> str:
    """`text`, if a tokenizer can take it. Raises ValueError, beginning with `where`, if not."""
    if not isinstance(text, str):
        raise ValueError(f"{where}: the text is {shown(text)}, not a string.")
    if not text.strip():
        raise ValueError(f"{where}: the text is empty.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where}: the text has half of a surrogate pair.")
    return text


def texts_of_lines(lines: Iterable[bytes], name: str, *, in_json: bool) -> Iterator[str]:
    """One text per line that is not blank. Raises ValueError, with file and line, on a bad one."""
    for number, raw in enumerate(lines, 1):
        where = f"{name}, line {number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise ValueError(f"{where}: not UTF-8.") from None
        if not line.strip():
            continue
        if not in_json:
            yield check_text(line, where)
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}.") from None
        if not isinstance(record, dict) or "text" not in record:
            raise ValueError(f'{where}: not a JSON object with a field "text".')
        yield check_text(record["text"], where)


def read_texts(texts: Sequence[str] | None, file: Path | None) -> Iterator[str]:
    """The given texts, or those of a file, or those of standard input as they come."""
    if texts is not None:
        yield from (check_text(text, f"--text {n}") for n, text in enumerate(texts, 1))
    elif file is not None and file.suffix.lower() in (".csv", ".tsv"):
        for line, record in read_records(file):
            where = f"{file}, line {line}"
            check_fields(record, ("text",), where)
            yield check_text(record["text"], where)
    elif file is not None:
        in_json = file.suffix.lower() in (".jsonl", ".json")
        try:
            with file.open("rb") as lines:
                yield from texts_of_lines(lines, str(file), in_json=in_json)
        except OSError as error:
            raise ValueError(f"{file}: cannot be read: {error.strerror}.") from None
    else:
        yield from texts_of_lines(sys.stdin.buffer, "standard input", in_json=False)


def in_batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` texts, the last may be shorter. Raises ValueError if there is none at all."""
    texts = iter(texts)
    batch = list(islice(texts, size))
    if not batch:
        raise ValueError("there is no text to answer.")
    while batch:
        yield batch
        batch = list(islice(texts, size))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. A user's mistake ends it with one sentence and exit code 1."""
    parser = cli.parser("harness.adapter.predict", __doc__)
    add = parser.add_argument
    add("run", type=cli.path, help="a run's folder, or its adapter's")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", action="append", help="may be repeated")
    source.add_argument("--file", type=cli.path)
    add("--batch-size", type=positive, default=32, help="texts answered at a time (32)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:n")
    add("--merged", action="store_true", help="merge first: one matrix product a layer")
    add("--force", action="store_true", help="accept another base than it was trained on")
    add(
        "--benchmark",
        action="store_true",
        help="time base, adapter, merged and 4-bit model on the texts, or on the run's own",
    )
    add("--rounds", type=positive, help="of the benchmark (15)")
    add("--threads", type=positive, help="of the benchmark; as many as torch takes if absent")
    options = parser.parse_args(arguments)
    for option in ANSWERS_ONLY if options.benchmark else BENCHMARK_ONLY:
        if getattr(options, option):
            relation = "is one row of" if options.benchmark else "belongs to"
            parser.error(f"--{option} {relation} --benchmark")
    cli.run(_run, options)


def _run(options: argparse.Namespace) -> None:
    adapter_folder(options.run)
    if options.benchmark:
        given = options.text is not None or options.file is not None
        texts = list(read_texts(options.text, options.file)) if given else None
        from harness.adapter import answers, serving

        serving.benchmark(
            options.run,
            texts,
            batch_size=options.batch_size,
            rounds=options.rounds or serving.ROUNDS,
            threads=options.threads,
            device=lambda restored: answers.chosen_device(options.device, restored),
            force=options.force,
        )
        return
    batches = in_batches(read_texts(options.text, options.file), options.batch_size)
    first = next(batches)  # a mistake in it should not wait for torch and the model
    from harness.adapter import answers
    from harness.adapter.restore import restore

    restored = restore(options.run, force=options.force)
    for note in restored.notes:
        print(note, file=sys.stderr)
    device = answers.chosen_device(options.device, restored)
    restored.model.to(device)
    if options.merged:
        for layer in restored.layers.values():
            layer.merge()
    answer = answers.generations if restored.labels is None else answers.classifications
    for batch in answer(restored, chain([first], batches), device):
        print(*map(json.dumps, batch), sep="\n", flush=True)


if __name__ == "__main__":
    main()
