"""Diagnostics of trained adapters: against dense numpy, known answers, and the command line."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from command import CommandLine
from oracle import dora_weight, lora_weight

from harness.compare.look import INK
from harness.inspect import page, spectrum
from harness.inspect.__main__ import main
from harness.inspect.measure import compare, inspect_run, measure_layer
from harness.models import tiny
from variants import DenseStore, DoraLinear, FixedLinear, LoraLinear
from variants.full import FullLinear

SHAPES = [(7, 5, 3), (5, 7, 3), (40, 33, 8), (2, 9, 2), (9, 1, 1), (6, 4, 7)]  # o i k
CLOSE = {"rtol": 1e-5, "atol": 1e-9}


def made(o, i, k, seed=0):
    """W, B, A in numpy float64, with values that float32 holds exactly."""
    rng = np.random.default_rng(seed)
    W, B, A = rng.normal(size=(o, i)), rng.normal(size=(o, k)), rng.normal(size=(k, i))
    return tuple(np.float32(x).astype(np.float64) for x in (W, 0.3 * B, A))


def tensors(*arrays):
    return tuple(torch.from_numpy(np.float32(array)) for array in arrays)


def orthonormal(rng, n, k):
    return np.linalg.qr(rng.normal(size=(n, k)))[0]


# ---- the spectrum of sBA -------------------------------------------------------------------------


@pytest.mark.parametrize(("o", "i", "k"), SHAPES)
def test_the_spectrum_is_that_of_the_dense_product(o, i, k):
    _, B, A = made(o, i, k)
    found = spectrum.low_rank(*tensors(B, A), 1.7)
    U, S, Vh = np.linalg.svd(1.7 * B @ A)
    r = np.linalg.matrix_rank(B @ A)
    assert found.rank == r == min(o, i, k)
    assert np.allclose(found.S[:r], S[:r])
    assert np.isclose(found.norm, np.linalg.norm(1.7 * B @ A))
    # subspaces, and not vectors: signs are free
    assert np.allclose(found.U @ found.U.T, U[:, :r] @ U[:, :r].T)
    assert np.allclose(found.V @ found.V.T, Vh[:r].T @ Vh[:r])
    assert np.allclose(found.U @ torch.diag(found.S[:r]) @ found.V.T, 1.7 * B @ A)


def test_directions_that_a_factor_lacks_are_not_invented():
    _, B, A = made(12, 9, 5)
    B[:, 3], B[:, 4] = 2 * B[:, 1], 0  # rank 3
    found = spectrum.low_rank(*tensors(B, A), 2.0)
    assert found.rank == 3 == np.linalg.matrix_rank(B @ A)
    assert (found.S[3:] == 0).all()
    assert found.U.shape == (12, 3) and found.V.shape == (9, 3)


@pytest.mark.parametrize("k", [0, 4])
def test_a_zero_update_has_no_directions_and_no_ranks(k):
    B, A = torch.zeros(6, k), torch.randn(k, 5)
    found = spectrum.low_rank(B, A, 2.0)
    assert found.rank == 0 and found.norm == 0
    assert spectrum.effective_rank(found.S) is None and spectrum.stable_rank(found.S) is None
    assert spectrum.rank_for(found.S, 0.9) == 0


def test_factors_that_cancel_are_zero():
    """[B, -B] [A; A], as a layer has at its start that subtracts its initial product."""
    B, A = torch.randn(20, 4), torch.randn(4, 30)
    found = spectrum.low_rank(torch.cat([B, -B], 1), torch.cat([A, A]), 2.0)
    assert found.rank == 0 and spectrum.effective_rank(found.S) is None


def test_a_small_direction_is_kept_and_rounding_is_not():
    B = torch.diag(torch.tensor([1.0, 1e-5, 1e-9]))
    assert spectrum.low_rank(B, torch.eye(3), 1.0).rank == 2


def test_ranks_of_known_spectra():
    flat = torch.ones(5, dtype=torch.float64)
    assert spectrum.effective_rank(flat) == pytest.approx(5)
    assert spectrum.stable_rank(flat) == pytest.approx(5)
    assert spectrum.rank_for(flat, 0.9) == 5
    one = torch.tensor([3.0, 0, 0], dtype=torch.float64)
    assert spectrum.effective_rank(one) == spectrum.stable_rank(one) == 1
    S = np.array([3.0, 1.0, 0.5])
    p = S / S.sum()
    assert spectrum.effective_rank(torch.tensor(S)) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert spectrum.stable_rank(torch.tensor(S)) == pytest.approx((S**2).sum() / 9)
    assert [spectrum.rank_for(torch.tensor(S), e) for e in (0.87, 0.9, 0.97, 0.98)] == [1, 2, 2, 3]


# ---- beside W ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("o", "i", "k"), SHAPES)
@pytest.mark.parametrize("gained", [False, True])
def test_rows_are_those_of_the_dense_weights(o, i, k, gained, monkeypatch):
    monkeypatch.setattr(spectrum, "ROWS", 3)  # blocks that do not divide o
    W, B, A = made(o, i, k)
    g = np.float32(np.random.default_rng(1).uniform(-1.5, 1.5, o)) if gained else np.ones(o)
    adapted = g[:, None] * (W + 0.7 * B @ A)
    gain = torch.from_numpy(g) if gained else None
    norms, old = np.linalg.norm(adapted, axis=1), np.linalg.norm(W, axis=1)
    cosines = (adapted * W).sum(1) / (norms * old)
    expected = (
        np.linalg.norm(W), np.linalg.norm(adapted - W), np.abs(norms - old).mean(),
        (1 - cosines).mean(),
    )  # fmt: skip
    weight, b, a = tensors(W, B, A)
    assert np.allclose(spectrum.rows(weight, b, a, 0.7, gain), expected, **CLOSE)
    dense = spectrum.rows_of_dense(weight, torch.from_numpy(adapted))
    assert np.allclose(dense, expected, **CLOSE)


def test_a_tiny_change_of_direction_is_not_lost_to_cancellation():
    W, d = torch.tensor([[3.0, 0.0]]), 1e-9
    found = spectrum.rows(W, torch.tensor([[1.0]]), torch.tensor([[0.0, d]]), 1.0, None)
    assert found.delta_direction == pytest.approx(
        d**2 / 18, rel=1e-6, abs=0
    )  # 1 - cos = angle^2 / 2
    assert found.delta_magnitude == pytest.approx(d**2 / 6, rel=1e-6, abs=0)


def test_rows_that_are_zero_have_no_direction():
    W, B, A = made(4, 6, 2)
    W[0] = 0
    W[1] = -B[1] @ A  # W' is zero to the rounding of W
    weight, b, a = tensors(W, B, A)
    found = spectrum.rows(weight, b, a, 1.0, None)
    adapted = W + B @ A
    cosines = (adapted * W).sum(1)[2:] / np.linalg.norm(adapted[2:], axis=1)
    cosines /= np.linalg.norm(W[2:], axis=1)
    assert found.delta_direction == pytest.approx((1 - cosines).mean())
    assert spectrum.rows(torch.zeros(3, 2), b[:3], a[:, :2], 1.0, None).delta_direction is None


@pytest.mark.parametrize(("o", "i", "k"), SHAPES)
def test_projected_norm_is_that_of_the_dense_projection(o, i, k):
    W, B, A = made(o, i, k)
    U, _, Vh = np.linalg.svd(B @ A, full_matrices=False)
    r = min(o, i, k)
    expected = np.linalg.norm(U[:, :r].T @ W @ Vh[:r].T)
    weight, b, a = tensors(W, B, A)
    assert np.isclose(spectrum.projected_norm(weight, spectrum.low_rank(b, a, 3.0)), expected)


def test_random_directions_hold_what_the_formula_says():
    rng, (o, i, r) = np.random.default_rng(0), (11, 17, 3)
    W = rng.normal(size=(o, i))
    squares = [
        np.linalg.norm(orthonormal(rng, o, r).T @ W @ orthonormal(rng, i, r)) ** 2
        for _ in range(4000)
    ]
    expected = spectrum.random_projected_norm(np.linalg.norm(W), (o, i), r) ** 2
    error = np.std(squares) / len(squares) ** 0.5
    assert abs(np.mean(squares) - expected) < 4 * error < 0.1 * expected


# ---- two subspaces -------------------------------------------------------------------------------


def test_similarity_is_the_papers_formula():
    rng = np.random.default_rng(0)
    P, Q = orthonormal(rng, 12, 3), orthonormal(rng, 12, 5)
    found = spectrum.similarity(torch.from_numpy(P), torch.from_numpy(Q))
    assert found.shape == (3, 5)
    for i in range(1, 4):
        for j in range(1, 6):
            expected = np.linalg.norm(P[:, :i].T @ Q[:, :j]) ** 2 / min(i, j)
            assert float(found[i - 1, j - 1]) == pytest.approx(expected)


def test_similarity_of_the_same_the_orthogonal_and_the_contained():
    basis = torch.from_numpy(orthonormal(np.random.default_rng(0), 10, 10))
    P, Q = basis[:, :4], basis[:, 4:9]
    assert np.allclose(spectrum.similarity(P, -P).diagonal(), 1)
    assert np.allclose(spectrum.similarity(P, Q), 0)
    turn = torch.from_numpy(orthonormal(np.random.default_rng(1), 4, 4))
    assert float(spectrum.similarity(P, P @ turn)[-1, -1]) == pytest.approx(1)
    assert np.allclose(spectrum.similarity(P[:, :2], basis[:, :4])[1, 1:], 1)  # one in the other


@pytest.mark.parametrize(("n", "p", "q"), [(9, 2, 5), (6, 6, 2), (4, 1, 1)])
def test_similarity_by_chance_is_that_of_random_subspaces(n, p, q):
    rng = np.random.default_rng(0)
    P = torch.from_numpy(orthonormal(rng, n, p))
    draws = torch.stack(
        [spectrum.similarity(P, torch.from_numpy(orthonormal(rng, n, q))) for _ in range(6000)]
    )
    chance = spectrum.similarity_by_chance(n, p, q)
    assert np.allclose(draws.mean(0), chance.mean, atol=4 * float(chance.std.max()) / 6000**0.5)
    assert np.allclose(draws.std(0), chance.std, rtol=0.06, atol=1e-9)


def test_one_dimension_has_one_subspace():
    assert float(spectrum.similarity_by_chance(1, 1, 1).mean) == 1


# ---- dense ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("o", "i"), [(8, 5), (5, 8), (6, 6)])
def test_a_new_strong_direction_is_an_intruder_and_no_other(o, i):
    """W has the first axes as left singular vectors; the update adds a direction outside them, or
    between two of them."""
    W = np.zeros((o, i))
    W[:3, :3] = np.diag([5, 4, 3])
    new = np.zeros((o, i))
    new[o - 1, i - 1] = 10.0
    found = spectrum.dense(*tensors(W, W + new), top=10)
    assert np.allclose(found.cosines, [0, 1, 1, 1])
    assert np.allclose(found.S[0], 10) and (found.S[1:] == 0).all()
    assert np.allclose(found.own_top[:3], np.sqrt(np.cumsum([25, 16, 9])))
    between = np.zeros((o, i))
    between[:2, i - 1] = 100  # (1, 1, 0, ...) / sqrt 2
    found = spectrum.dense(*tensors(W, W + between), top=1)
    assert np.allclose(found.cosines, 0.5**0.5, atol=1e-3)


def test_dense_agrees_with_numpy():
    W, B, A = made(12, 9, 4)
    adapted = W + 2.0 * B @ A
    found = spectrum.dense(torch.from_numpy(W), torch.from_numpy(adapted), top=3)
    U, S, _ = np.linalg.svd(W, full_matrices=False)
    U2 = np.linalg.svd(adapted)[0][:, :3]
    assert np.allclose(found.cosines, np.abs(U.T @ U2).max(0))
    assert np.allclose(found.S[:4], np.linalg.svd(2.0 * B @ A)[1][:4])
    assert (found.S[4:] == 0).all()
    assert np.allclose(found.own_top, np.sqrt(np.cumsum(S**2)))


def test_what_was_not_changed_has_no_intruders():
    W = torch.randn(9, 6)
    found = spectrum.dense(W, W, top=6)
    assert np.allclose(found.cosines, 1) and (found.S == 0).all()


# ---- layers --------------------------------------------------------------------------------------


def disturbed(layer):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return layer


def built(kind, **options):
    """W (11, 7) and a layer over it."""
    W = torch.from_numpy(np.float32(made(11, 7, 1)[0]))
    return W, kind(DenseStore(W), None, path="layer", seed=0, **options)


@pytest.mark.parametrize("kind", [LoraLinear, DoraLinear])
def test_a_layer_is_measured_as_the_papers_define_its_weight(kind):
    W, layer = built(kind, rank=3, alpha=6.0)
    disturbed(layer)
    w, b, a = (t.detach().double().numpy() for t in (W, layer.B, layer.A))
    low = 2.0 * b @ a
    if kind is DoraLinear:
        adapted = dora_weight(w, b, a, 2.0, layer.m.detach().double().numpy())
    else:
        adapted = lora_weight(w, b, a, 2.0)
    found, _ = measure_layer("layer", layer, None, dense=True, top=4)
    U, S, Vh = np.linalg.svd(low, full_matrices=False)
    assert np.allclose(found.singular_values, S[:3])
    assert found.low_rank_norm == pytest.approx(np.linalg.norm(low))
    assert found.gained == (kind is DoraLinear)
    assert found.relative_size == pytest.approx(
        np.linalg.norm(adapted - w) / np.linalg.norm(w), rel=1e-5
    )
    projected = np.linalg.norm(U[:, :3].T @ w @ Vh[:3].T)
    assert found.amplification == pytest.approx(np.linalg.norm(low) / projected)
    own = np.linalg.norm(np.linalg.svd(w)[1][:3])
    assert found.own_amplification == pytest.approx(np.linalg.norm(low) / own)
    assert found.random_amplification == pytest.approx(
        np.linalg.norm(low) / (3 * np.linalg.norm(w) / np.sqrt(77))
    )
    top = np.abs(np.linalg.svd(w, full_matrices=False)[0].T @ np.linalg.svd(adapted)[0][:, :4])
    assert np.allclose(found.dense.cosines, top.max(0), atol=1e-5)
    assert found.intruders(0.9) == (top.max(0) < 0.9).sum()
    if kind is DoraLinear:
        dense = np.linalg.svd(adapted - w)[1]
        assert np.allclose(found.dense.singular_values, dense, atol=1e-5)
        assert found.dense.stable_rank == pytest.approx((dense**2).sum() / dense[0] ** 2, rel=1e-4)
    else:
        assert found.dense.singular_values == []  # sBA says it


def test_a_layer_at_its_start_has_no_update():
    _, layer = built(LoraLinear, rank=3, alpha=6.0)
    found, update = measure_layer("layer", layer, None, dense=False, top=4)
    assert update.rank == found.numerical_rank == 0
    assert found.rank == 3 and found.relative_size == 0
    assert found.effective_rank is found.amplification is found.random_amplification is None
    assert found.delta_magnitude == found.delta_direction == 0


def test_a_layer_that_was_trained_whole_is_compared_with_what_it_was():
    W, layer = built(FullLinear)
    disturbed(layer)
    found, _ = measure_layer("layer", layer, W, dense=True, top=4)
    w, adapted = W.double().numpy(), layer.W.detach().double().numpy()
    assert np.allclose(found.dense.singular_values, np.linalg.svd(adapted - w)[1])
    assert found.relative_size == pytest.approx(np.linalg.norm(adapted - w) / np.linalg.norm(w))
    assert found.amplification is None and found.singular_values == []


def test_a_layer_that_is_not_trained_measures_zero():
    _, layer = built(FixedLinear)
    found, _ = measure_layer("layer", layer, None, dense=True, top=4)
    assert found.relative_size == 0 and found.rank == 0 and found.intruders(0.5) == 0


def test_no_dense_matrix_is_decomposed_unasked(monkeypatch):
    """QR of the factors, and the SVD of a core as small as the rank."""
    _, layer = built(DoraLinear, rank=3, alpha=6.0)
    disturbed(layer)
    svd = torch.linalg.svd

    def small(matrix, *args, **kwargs):
        assert max(matrix.shape) <= 3
        return svd(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", small)
    monkeypatch.setattr(type(layer), "adapted_weight", None)
    monkeypatch.setattr(type(layer), "delta_weight", None)
    measure_layer("layer", layer, None, dense=False, top=4)


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Name -> folder of a finished run."""
    root = tmp_path_factory.mktemp("runs")
    capture = SimpleNamespace(readouterr=lambda: ("", ""))
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        run = CommandLine(root, patch, capture)
        quick = ("variant.lr=0.01", "train.steps=3", "train.evaluate_test=false")
        for name, overrides in {
            "lora": ("variant=lora",),
            "other": ("variant=lora", "seed=1", "rank=4"),
            "dora": ("variant=dora",),
            "full": ("variant=full",),
            "bitfit": ("variant=bitfit",),
        }.items():
            folder = root / name
            assert run(*overrides, f"run_dir={folder}", *quick) == 0
            found[name] = folder
    return found


def inspected(out, *arguments):
    """inspect.json and page.html."""
    main([*map(str, arguments), "--out", str(out)])
    return json.loads((out / "inspect.json").read_text()), (out / "page.html").read_text()


def fails(capsys, *arguments):
    """The sentence that an inspection ends with."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    assert isinstance(stop.value.code, str)  # printed on stderr, exit code 1
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    assert not capsys.readouterr().out
    return stop.value.code


class Page(HTMLParser):
    """Tags that are open, ids, and text."""

    VOID = frozenset({"meta", "br", "wbr"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "svg"} & set(self.open):
            self.text += data


def test_two_runs_are_measured_and_compared(runs, tmp_path, capsys):
    content, text = inspected(tmp_path / "out", runs["lora"], runs["other"], "--dense")
    first, second = content["runs"]
    assert (first["name"], second["name"]) == ("lora", "other")
    assert {layer["rank"] for layer in first["layers"].values()} == {8}
    assert {layer["rank"] for layer in second["layers"].values()} == {4}
    assert all(layer["relative_size"] > 0 for layer in first["layers"].values())
    (pair,) = content["pairs"]
    for side in ("right", "left"):
        phi = [np.array(one["phi"]) for one in pair[side].values()]
        assert {one.shape for one in phi} == {(8, 4)}
        assert all((one >= 0).all() and (one <= 1 + 1e-9).all() for one in phi)
    printed = capsys.readouterr().out
    assert "attention.self.query" in printed and "all layers" in printed and "φ(1, 1)" in printed
    found = Page(text)
    ids = [attributes["id"] for _, attributes in found.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    sections = [attributes["id"] for tag, attributes in found.tags if tag == "section"]
    assert sections == ["layers", "spectrum", "rank", "size", "amplification", "direction",
                        "intruders", "similarity", "every", "made"]  # fmt: skip
    links = {a["href"] for tag, a in found.tags if tag == "a"}
    assert links == {f"#{section}" for section in sections}
    figures = re.findall(r"<svg class=\"figure\".*?</svg>", text, re.DOTALL)
    assert len(figures) == 2 * 6 + 2
    for figure in figures:
        ElementTree.fromstring(figure)
        assert INK not in figure and "mathdefault" not in figure
    assert not re.findall(r"<script|(?:href|src)=\"(?!#)|url\((?!#)|@import", text)
    assert "nan" not in found.text.lower().split()


def test_the_same_adapter_gives_the_same_bytes(runs, tmp_path):
    first = inspected(tmp_path / "a", runs["dora"], "--dense")
    again = inspected(tmp_path / "b", runs["dora"], "--dense")
    assert first == again
    assert (tmp_path / "a/inspect.json").read_bytes() == (tmp_path / "b/inspect.json").read_bytes()
    inspected(tmp_path / "a", runs["dora"])  # and replaces what was there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_run_is_like_itself(runs, tmp_path):
    content, text = inspected(tmp_path / "out", runs["lora"], runs["lora"] / "adapter")
    assert [run["name"] for run in content["runs"]] == ["lora", "lora (2)"]
    for side in ("right", "left"):
        for one in content["pairs"][0][side].values():
            assert np.allclose(np.diagonal(one["phi"]), 1)
    assert any("seed 0" in note for note in content["notes"])
    assert "To keep in mind" in text


def test_the_report_stands_beside_the_run(runs, capsys):
    main([str(runs["lora"] / "adapter")])
    assert sorted(path.name for path in (runs["lora"] / "inspect").iterdir()) == [
        "inspect.json", "page.html",
    ]  # fmt: skip


def test_gains_are_said_to_be_no_part_of_the_spectrum(runs, tmp_path):
    content, text = inspected(tmp_path / "out", runs["dora"], "--dense")
    assert any("not low-rank" in note for note in content["notes"])
    layers = content["runs"][0]["layers"].values()
    assert all(layer["gained"] and layer["dense"]["effective_rank"] > 0 for layer in layers)
    assert all(layer["delta_norm"] != layer["low_rank_norm"] for layer in layers)
    assert "effective dW" in text


def test_whole_matrices_are_looked_at_when_asked_for(runs, tmp_path, capsys):
    assert "--dense" in fails(capsys, runs["full"], "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    content, _ = inspected(tmp_path / "out", runs["full"], runs["lora"], "--dense")
    full = content["runs"][0]["layers"].values()
    assert all(layer["relative_size"] > 0 for layer in full)
    assert all(layer["dense"]["effective_rank"] > 1 for layer in full)
    assert content["pairs"] == []


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own
@pytest.mark.filterwarnings("ignore:Could not find a config file in tiny:UserWarning")  # its too
@pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
def test_an_adapter_of_peft_is_inspected(kind, runs, tmp_path):
    """The page's singular values are those of peft's own delta weight."""
    peft = pytest.importorskip("peft")
    base = tiny.load(labels=("bad", "good"), seed=0).model
    settings = {"target_modules": ["query", "value"], "lora_alpha": 6, "task_type": "SEQ_CLS"}
    config = (
        peft.AdaLoraConfig(init_r=5, target_r=2, total_step=9, tinit=1, tfinal=1, **settings)
        if kind == "adalora"
        else peft.LoraConfig(r=3, use_dora=kind == "dora", **settings)
    )
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.peft_config["default"].base_model_name_or_path = "tiny-bert"
    model.save_pretrained(tmp_path / "theirs")
    content, text = inspected(tmp_path / "out", tmp_path / "theirs", tmp_path / "theirs")
    one = content["runs"][0]
    assert (one["base"], one["base_sha256"], one["seed"]) == ("tiny-bert", None, None)
    assert any("no digest" in note for note in content["notes"])
    assert not any("seed" in note or "bases" in note for note in content["notes"])
    assert "None" not in Page(text).text
    modules = dict(model.base_model.model.named_modules())
    for path, layer in one["layers"].items():
        expected = np.linalg.svd(
            modules[path].get_delta_weight("default").detach().double().numpy(), compute_uv=False
        )
        k = len(layer["singular_values"])
        assert k == (5 if kind == "adalora" else 3)
        np.testing.assert_allclose(layer["singular_values"], expected[:k], rtol=1e-5)


def test_mistakes_are_one_sentence(runs, tmp_path, capsys):
    lora = runs["lora"]
    assert "Did you mean" in fails(capsys, lora.with_name("lorra"))
    assert "is no folder; give" in fails(capsys, tmp_path / "nowhere/at/all")
    assert "holds no adapter" in fails(capsys, tmp_path)
    assert "nothing to inspect" in fails(capsys, runs["bitfit"])
    assert "--top is 0" in fails(capsys, lora, "--dense", "--top", "0")
    assert "--epsilon is 2.0" in fails(capsys, lora, "--dense", "--epsilon", "2")
    assert "belong to --dense" in fails(capsys, lora, "--top", "3")


def test_an_unfinished_run_is_said_to_be_one(runs, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    assert "not finished" in fails(capsys, tmp_path / "run")


@pytest.mark.parametrize("foreign", ["notes.md", "page.html"])
def test_what_is_not_an_inspection_is_not_replaced(runs, tmp_path, capsys, foreign):
    (tmp_path / foreign).write_text("mine")
    assert foreign in fails(capsys, runs["lora"], "--out", tmp_path)
    assert (tmp_path / foreign).read_text() == "mine"
    assert "is a file" in fails(capsys, runs["lora"], "--out", tmp_path / foreign)


def test_other_layers_are_not_compared(runs):
    one = inspect_run(runs["lora"], "one", dense=False, top=1)
    (path, layer), *others = one.layers.items()
    fewer = dataclasses.replace(one, name="other", layers=dict(others))
    for pair in ((one, fewer), (fewer, one)):
        with pytest.raises(ValueError, match=f"^one adapts {path}, which other does not"):
            compare(*pair)
    wider = {**one.layers, path: dataclasses.replace(layer, shape=(3, 4))}
    with pytest.raises(ValueError, match="3 x 4 in other"):
        compare(one, dataclasses.replace(one, name="other", layers=wider))


def test_a_broken_page_leaves_nothing(runs, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("broken.")

    monkeypatch.setattr(page, "page", broken)
    with pytest.raises(SystemExit):
        main([str(runs["lora"]), "--out", str(tmp_path / "out")])
    assert not list(Path(tmp_path).iterdir())
