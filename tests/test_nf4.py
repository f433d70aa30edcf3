"""The NF4 codec and store against bitsandbytes (bit for bit) and numpy in float64."""

import copy
import hashlib

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from scipy.stats import norm
from torch.utils._python_dispatch import TorchDispatchMode

from variants import DenseStore, nf4
from variants.product import gained_low_rank_linear
from variants.qlora import Nf4Store

SHAPES = [(3, 5), (1, 1), (7, 64), (2, 32), (65, 129), (37, 300), (384, 1536), (1025, 1024)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _eager_peer():
    """bitsandbytes compiles its fallback for odd widths with torch.compile; not in a test."""
    with torch.compiler.set_stance("force_eager"):
        yield


def weight_of(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0):
    """Rows of very different scale, one of them zero where there is more than one."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight *= torch.randn(shape[0], 1, generator=generator).exp()
    if shape[0] > 1:
        weight[shape[0] // 2] = 0.0
    return weight.to(dtype)


def digest(module: torch.nn.Module) -> str:
    kept = b"".join(value.numpy().tobytes() for value in module.state_dict().values())
    return hashlib.sha256(kept).hexdigest()


# ---- the codec ----------------------------------------------------------------------------------


def test_table_is_built_from_normal_quantiles():
    offset = 1 - (1 / 30 + 1 / 32) / 2
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, [0.0], negative])) / positive.max()
    assert np.abs(values - nf4.TABLE.double().numpy()).max() < 2e-7
    assert torch.equal(nf4.TABLE, bnb.get_4bit_type("nf4", "cpu"))
    assert nf4.TABLE[nf4.ZERO_CODE] == 0.0


def test_dynamic_table_is_that_of_bitsandbytes():
    assert torch.equal(nf4.DYNAMIC_TABLE, bnb.create_dynamic_map())


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64])
def test_pack_puts_the_first_code_in_the_high_nibble(count):
    codes = torch.arange(count, dtype=torch.uint8) % 16
    packed = nf4.pack(codes)
    assert packed.dtype == torch.uint8 and len(packed) == (count + 1) // 2
    assert torch.equal(nf4.unpack(packed, count), codes)
    if count > 1:
        assert packed[0] == 0x01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [32, 64, 4096])
def test_bits_of_bitsandbytes(shape, dtype, block, monkeypatch):
    if (
        block >= 2048
    ):  # its AVX-512 kernel is wrong there, as it says, wherever torch has no AVX-512
        monkeypatch.setattr("bitsandbytes.backends.cpu.ops._has_avx512", True)
    weight = weight_of(shape, dtype)
    theirs, state = bnb.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    codes, absmax = nf4.quantize(weight, block)
    assert torch.equal(codes, theirs.view(-1))
    assert torch.equal(absmax, state.absmax)
    restored = nf4.dequantize(codes, absmax, shape, block=block, dtype=dtype)
    assert torch.equal(restored, bnb.dequantize_4bit(theirs, state))

    theirs, state = bnb.quantize_4bit(
        weight, blocksize=block, quant_type="nf4", compress_statistics=True
    )
    nested_codes, nested_absmax, offset = nf4.quantize_absmax(absmax)
    assert torch.equal(nested_codes, state.absmax)
    assert torch.equal(nested_absmax, state.state2.absmax)
    assert torch.equal(offset, state.offset.view(1))
    store = Nf4Store(weight, block=block)
    assert torch.equal(store.dequantize(dtype), bnb.dequantize_4bit(theirs, state))
    state.dtype = torch.float32
    assert torch.equal(store.dequantize(torch.float32), bnb.dequantize_4bit(theirs, state))


def test_midpoints_round_down_as_in_bitsandbytes():
    middle = (nf4.TABLE[:-1] + nf4.TABLE[1:]) / 2
    up, down = middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0))
    weight = torch.cat([torch.ones(1), middle, up, down, torch.zeros(18)])  # one block, absmax 1
    codes = nf4.unpack(nf4.quantize(weight)[0], 64)
    below = torch.arange(15)
    assert torch.equal(codes[1:16].long(), below)
    assert torch.equal(codes[16:31].long(), below + 1)
    assert torch.equal(codes[31:46].long(), below)
    theirs = bnb.quantize_4bit(weight, quant_type="nf4")[0].view(-1)
    assert torch.equal(nf4.pack(codes), theirs)


def near(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rows of float32 within three rounding errors of `values` (float64) times the row's absmax."""
    largest = 1 + torch.rand(len(values), 1, generator=generator, dtype=torch.float64)
    errors = torch.randint(-3, 4, values.shape, generator=generator)
    rows = largest.float().double() * values * (1 + errors * 2.0**-24)
    return torch.cat([largest.float(), rows.float()], dim=1)


@pytest.mark.parametrize("tail", [0, 50])
def test_weights_near_a_midpoint_have_the_codes_of_bitsandbytes(tail):
    """A quotient in place of a product with the reciprocal, or the reverse, is seen here alone."""
    generator = torch.Generator().manual_seed(0)
    middle = ((nf4.TABLE[:-1] + nf4.TABLE[1:]) / 2).double()
    for _ in range(200 if tail else 1):
        rows = middle[torch.randint(0, 15, (1 if tail else 4000, 63), generator=generator)]
        weight = near(rows, generator).view(-1)
        weight = weight[:tail] if tail else weight
        theirs = bnb.quantize_4bit(weight, quant_type="nf4")[0].view(-1)
        assert torch.equal(nf4.quantize(weight)[0], theirs)


@pytest.mark.parametrize("block", [64, 256])
def test_scales_near_a_threshold_have_the_codes_of_bitsandbytes(block):
    """Values around the half points of the grid of 65,536 at which the 8-bit code may change."""
    generator = torch.Generator().manual_seed(0)
    middle = ((nf4.DYNAMIC_TABLE[:-1] + nf4.DYNAMIC_TABLE[1:]) / 2).double()
    points = ((middle + 1) * 32767.5).floor()
    points = points + torch.randint(-1, 2, (1000, 255), generator=generator)
    values = near((points + 0.5) / 32767.5 - 1, generator).view(-1)[:-3]
    theirs, state = bnb.quantize_blockwise(values, blocksize=block)
    codes, absmax = nf4.quantize_dynamic(values, block)
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("shape", [(7, 64), (65, 129)], ids=str)
def test_codes_are_the_nearest_in_float64(shape):
    weight = weight_of(shape, seed=1)
    codes, absmax = nf4.quantize(weight)
    exact = weight.double().numpy().reshape(-1)
    starts = np.arange(0, exact.size, 64)
    largest = np.maximum.reduceat(np.abs(exact), starts)
    assert np.array_equal(largest, np.where(largest == 0, 0, absmax.numpy()))
    scaled = exact / np.where(largest == 0, 1, largest).repeat(64)[: exact.size]
    distance = np.abs(scaled[:, None] - nf4.TABLE.double().numpy())
    ours = distance[np.arange(exact.size), nf4.unpack(codes, exact.size).numpy()]
    assert (ours - distance.min(1)).max() < 1e-6


@pytest.mark.parametrize("shape", [(3, 5), (2, 64), (130, 64), (65, 129)], ids=str)
def test_blocks_of_zeros(shape):
    store = Nf4Store(torch.zeros(shape))
    assert torch.equal(store.dequantize(torch.float32), torch.zeros(shape))
    theirs, state = bnb.quantize_4bit(
        torch.zeros(shape), quant_type="nf4", compress_statistics=True
    )
    assert torch.equal(store.codes, theirs.view(-1)) and torch.equal(store.absmax, state.absmax)


def test_weight_is_read_row_by_row_whatever_its_strides():
    weight = weight_of((33, 65))
    transposed = weight.T.contiguous().T
    assert not transposed.is_contiguous()
    for ours, theirs in zip(nf4.quantize(transposed), nf4.quantize(weight), strict=True):
        assert torch.equal(ours, theirs)


def test_dequantize_in_float64_and_under_compile():
    weight = weight_of((65, 129))
    codes, absmax = nf4.quantize(weight)
    restored = nf4.dequantize(codes, absmax, (65, 129))
    double = nf4.dequantize(codes, absmax, (65, 129), dtype=torch.float64)
    assert torch.equal(double, restored.double())
    store = Nf4Store(weight)
    with torch.compiler.set_stance("default"):
        traced = torch.compile(store.dequantize, backend="aot_eager", fullgraph=True)
        for dtype in DTYPES:
            assert torch.equal(traced(dtype), store.dequantize(dtype))


class _Storages(TorchDispatchMode):
    """The bytes of each storage that an operator returned, by its address."""

    def __init__(self):
        super().__init__()
        self.nbytes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            address = storage.data_ptr()
            self.nbytes[address] = max(storage.nbytes(), self.nbytes.get(address, 0))
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_holds_nothing_of_the_weight_s_size(dtype):
    store = Nf4Store(weight_of((1025, 2048)))
    with _Storages() as storages:
        dense = store.dequantize(dtype)
    for kept in [dense, *store.parameters()]:
        storages.nbytes.pop(kept.untyped_storage().data_ptr(), None)
    assert max(storages.nbytes.values()) <= 2**21 < dense.numel() * dense.element_size()


# ---- the store ----------------------------------------------------------------------------------


def test_bytes_of_a_large_weight():
    store = Nf4Store(torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0)))
    count = 2048 * 1024
    codes, scales, nested, offset, tables = count / 2, count / 64, count / 64 / 256 * 4, 4, 1088
    assert store.nbytes() == codes + scales + nested + offset + tables
    assert store.bits_per_weight == pytest.approx(4.127, abs=5e-3)
    single = Nf4Store(torch.ones(2048, 1024), double_quantization=False)
    assert single.nbytes() == count / 2 + count / 64 * 4 + 64
    assert "4.131 bits per weight" in repr(store)


def test_everything_kept_is_a_frozen_parameter_with_an_axis_to_shard():
    store = Nf4Store(weight_of((65, 129)))
    assert not list(store.buffers())
    assert set(store.state_dict()) == {name for name, _ in store.named_parameters()}
    assert all(not kept.requires_grad and kept.ndim == 1 for kept in store.parameters())


@pytest.mark.parametrize("double_quantization", [True, False])
def test_saved_and_loaded_to_the_bit(double_quantization):
    store = Nf4Store(weight_of((65, 129)), double_quantization=double_quantization)
    other = Nf4Store(weight_of((65, 129), seed=1), double_quantization=double_quantization)
    other.load_state_dict(load(save(store.state_dict())))
    assert torch.equal(other.dequantize(torch.float32), store.dequantize(torch.float32))


@pytest.mark.parametrize("double_quantization", [True, False])
@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half(),
        lambda module: module.double(),
        lambda module: module.to("cpu", torch.float16),
        copy.deepcopy,
    ],
    ids=["bfloat16", "half", "double", "device-and-half", "deepcopy"],
)
def test_no_cast_changes_the_base(cast, double_quantization):
    store = Nf4Store(weight_of((65, 129)), double_quantization=double_quantization)
    before, dense = digest(store), store.dequantize(torch.float32)
    moved = cast(torch.nn.ModuleList([store]))[0]
    assert digest(moved) == before
    assert torch.equal(moved.dequantize(torch.float32), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(65, 129), (37, 64)], ids=str)
def test_gradients_are_those_over_the_dequantised_weight_and_nothing_is_written(shape, dtype):
    out, inputs = shape
    store = Nf4Store(weight_of(shape))
    dense = DenseStore(store.dequantize(torch.float32))
    before = digest(store)
    versions = [kept._version for kept in store.parameters()]

    def run(base):
        torch.manual_seed(0)
        leaves = [
            torch.randn(size).requires_grad_()
            for size in [(2, 7, inputs), (out,), (out, 3), (3, inputs), (out,)]
        ]
        x, bias, B, A, gain = leaves
        y = gained_low_rank_linear(x, base, bias, B, A, scale=0.7, gain=gain, compute_dtype=dtype)
        y.square().sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    for ours, theirs in zip(run(store), run(dense), strict=True):
        assert torch.equal(ours, theirs)
    assert digest(store) == before
    assert [kept._version for kept in store.parameters()] == versions
    assert all(kept.grad is None for kept in store.parameters())


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.ones(4), {}, r"shape \(4,\).*2-D"),
        (torch.ones(2, 3, 4), {}, r"shape \(2, 3, 4\).*2-D"),
        (torch.ones(0, 4), {}, r"shape \(0, 4\).*non-empty"),
        (torch.ones(4, 4, dtype=torch.float64), {}, r"torch\.float64; .*bfloat16"),
        (torch.ones(4, 4, dtype=torch.int8), {}, r"torch\.int8"),
        (torch.full((65, 64), torch.nan), {}, "NaN or an infinity"),
        (torch.tensor([[1.0, -torch.inf]]), {}, "NaN or an infinity"),
        (torch.ones(4, 4), {"block": 48}, r"block is 48; .* 32, 64,.*4096"),
        (torch.ones(4, 4), {"block": 8192}, "block is 8192"),
        (torch.ones(4, 4), {"nested_block": 100}, "nested_block is 100"),
    ],
)
def test_mistakes_are_told_in_one_sentence(weight, options, message):
    with pytest.raises(ValueError, match=message) as told:
        Nf4Store(weight, **options)
    assert "\n" not in str(told.value)


@pytest.mark.gpu
def test_a_gpu_restores_the_same_bits():
    weight = weight_of((1025, 1024))
    store = Nf4Store(weight)
    for ours, theirs in zip(nf4.quantize(weight.cuda()), nf4.quantize(weight), strict=True):
        assert torch.equal(ours.cpu(), theirs)
    moved = copy.deepcopy(store).cuda()
    for dtype in DTYPES:
        assert torch.equal(moved.dequantize(dtype).cpu(), store.dequantize(dtype))
