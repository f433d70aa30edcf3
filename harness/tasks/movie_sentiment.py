"""Sentences from film reviews, positive or negative: the default task, kept in this package.

10,605 sentences of Rotten Tomatoes reviews (Pang & Lee 2005, "Seeing stars") with the mean of some
twenty human ratings each, from -4 to 4, collected by Hutto & Gilbert 2014, "VADER: A Parsimonious
Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM; data/README.md has the origin
and the licence. The label is the sign of the mean rating; the 37 sentences rated 0 are dropped. The
source names no splits, so the sentence's hash decides (`rows.hash_split`).
"""

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Any

from harness.tasks.classification import Row, TextClassification
from harness.tasks.rows import hash_split

FILE = Path(__file__).with_name("data") / "movie_sentences.tsv.gz"
SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"  # of the content


def read_movie_sentences(path: Path = FILE) -> list[Row]:
    """The rated sentences in the order of the file, under its own ids, those rated 0 left out.

    Raises ValueError if the file is damaged or its content is not the published one.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); reinstall the package.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{path}: the sha256 of its content is {found}, expected {SHA256}; "
            "reinstall the package."
        )
    rows = []
    for line in content.decode().split("\r\n"):
        number, rating, sentence = line.split("\t")
        if float(rating) != 0.0:
            label = "positive" if float(rating) > 0.0 else "negative"
            rows.append(Row(int(number), sentence, label))
    return rows


class MovieSentiment(TextClassification):
    """`task=movie_sentiment`: 8,398 sentences to train, 1,062 to validate, 1,108 to test.

    Args:
        settings: see `TextClassification`.
    """

    def __init__(self, **settings: Any):
        rows: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
        for row in read_movie_sentences():
            rows[hash_split(row.text)].append(row)
        super().__init__("movie_sentiment", rows, ("negative", "positive"), **settings)
