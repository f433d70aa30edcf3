"""Finished runs in a table, and runs that do not belong in one."""

import json

import pytest
from command import CommandLine

from harness.compare.__main__ import main


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def test_a_table_of_runs_and_what_it_is_made_from(cli, capsys):
    assert cli("-m", "variant=dora,head", "train.steps=2") == 0, cli.err
    main([str(cli.root / "outputs"), "--out", str(cli.root / "study")])
    table = (cli.root / "study/table.md").read_text()
    assert capsys.readouterr().out == table
    assert "| dora | 0 | 0.002 | 2 |" in table and "One seed each" in table
    rows = [json.loads(line) for line in (cli.root / "study/runs.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["dora", "head"]


def test_runs_not_held_alike_are_refused_by_key(cli):
    for steps in (1, 2):
        assert cli("variant=head", f"train.steps={steps}") == 0, cli.err
    with pytest.raises(SystemExit, match=r"train\.steps: 1 and 2|train\.steps: 2 and 1"):
        main([str(cli.root / "outputs")])


def test_empty_and_foreign_folders(cli):
    with pytest.raises(SystemExit, match="there is no folder"):
        main([str(cli.root / "nowhere")])
    with pytest.raises(SystemExit, match="holds no finished run"):
        main([str(cli.root / "data")])
    (cli.root / "data/result.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"run\.json is missing"):
        main([str(cli.root / "data")])
