"""LoRA against the paper's formula in float64, and against peft from copied state."""

import copy
import math
import warnings

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from variants import DenseStore, LoraLinear, Variant, begin_step, by_role, inject


def layer_of(shape=(16, 33), *, bias=True, rank=3, alpha=6.0, seed=0, path="query", **options):
    generator = torch.Generator().manual_seed(1)
    W, b = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    store = DenseStore(W)
    return LoraLinear(
        store, b if bias else None, path=path, seed=seed, rank=rank, alpha=alpha, **options
    )


@torch.no_grad()
def disturb(module, std=0.3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return module


def arrays(*tensors):
    return [tensor.detach().double().numpy() for tensor in tensors]


def assert_near(actual, expected, tolerance=1e-5):
    """Within `tolerance` of the largest entry expected."""
    expected = np.asarray(expected)
    actual = actual.detach().double().numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# ---- against the formula ------------------------------------------------------------------------


@pytest.mark.parametrize(("scaling", "expected"), [("lora", 2.0), ("rslora", 2 * 3**0.5)])
def test_an_alpha_that_is_not_given_is_twice_the_rank(scaling, expected):
    """Of each layer's own rank, so that s does not depend on it."""
    assert layer_of(alpha=None, scaling=scaling).scale == pytest.approx(expected, rel=1e-12)
    assert layer_of(alpha=None, rank=5).scale == layer_of(alpha=10, rank=5).scale == 2.0


@pytest.mark.parametrize("shape", [(7, 5), (16, 33), (65, 64)], ids=str)
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("n", [11, 12])  # rows; 11 are no equal blocks
def test_values_and_gradients_are_the_papers(shape, scaling, p, n, threads):
    layer = disturb(layer_of(shape, scaling=scaling, dropout=p)).train()
    layer.bias.requires_grad_()
    begin_step({"query": layer}, 1)
    x, dy = torch.randn(n, shape[1], requires_grad=True), torch.randn(n, shape[0])
    y = layer(x)
    y.backward(dy)

    s = oracle.lora_scale(6.0, 3, scaling)
    W, b, B, A = arrays(layer.store.weight, layer.bias, layer.B, layer.A)
    keep = layer.mask()(x.shape, x.device, x.dtype).numpy() if p else None
    expected = oracle.gained_low_rank_linear(*arrays(x), W, b, B, A, s, 1.0, keep, p)
    wanted = oracle.gained_low_rank_linear_gradients(
        *arrays(x, dy), W, B, A, s, np.ones(shape[0]), keep, p
    )
    assert layer.scale == pytest.approx(s)
    assert_near(y, expected)
    assert_near(layer.adapted_weight(), oracle.lora_weight(W, B, A, s))
    for role, tensor in {"x": x, "bias": layer.bias, "B": layer.B, "A": layer.A}.items():
        assert_near(tensor.grad, wanted[role])


def test_the_offset_takes_the_start_away():
    layer = layer_of(init_B="kaiming", init_offset=True)
    B0, A0 = arrays(layer.B, layer.A)
    assert np.abs(B0 @ A0).max() > 0.01  # else there is nothing to take away
    x, base = torch.randn(5, 33), F.linear
    W, b = layer.store.weight, layer.bias
    torch.testing.assert_close(layer(x), base(x, W, b), rtol=0, atol=1e-6 * 30)
    assert layer.delta_weight().abs().max() < 1e-6
    disturb(layer)
    B, A = arrays(layer.B, layer.A)
    expected = oracle.lora_weight(*arrays(W), B, A, 2.0, B0, A0)
    assert_near(layer.adapted_weight(), expected)
    assert_near(layer(x), x.double().numpy() @ expected.T + b.double().numpy())
    assert layer.active_rank() == 3
    assert set(layer.adapter_state()) == {"A", "B", "A0", "B0"}
    other = layer_of(seed=9, init_B="kaiming", init_offset=True)
    other.load_adapter_state(layer.adapter_state())
    assert torch.equal(other(x), layer(x))


# ---- initialisation -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "std_A", "std_B"),
    [
        ({}, 1 / math.sqrt(3 * 400), 0.0),
        ({"init_A": "gaussian"}, 1 / 64, 0.0),
        ({"init_A": "zero", "init_B": "kaiming"}, 0.0, 1 / math.sqrt(3 * 64)),
        ({"init_A": "zero", "init_B": "matched"}, 0.0, 1 / math.sqrt(3 * 400)),
        ({"init_B": "kaiming"}, 1 / math.sqrt(3 * 400), 1 / math.sqrt(3 * 64)),
        ({"init_A": "zero"}, 0.0, 0.0),
        ({"init_gain": 2.5}, 2.5 / math.sqrt(3 * 400), 0.0),
    ],
    ids=str,
)
def test_initial_deviations(options, std_A, std_B):
    layer = layer_of((300, 400), rank=64, **options)
    for factor, std in ((layer.A.detach(), std_A), (layer.B.detach(), std_B)):
        assert float(factor.std()) == pytest.approx(std, rel=0.02)
        assert abs(float(factor.mean())) <= 5 * std / math.sqrt(factor.numel())
    bound = math.sqrt(3) * std_A  # uniform
    if options.get("init_A", "kaiming") == "kaiming":
        assert 0.99 * bound <= layer.A.abs().max() <= bound
    elif std_A:
        assert layer.A.abs().max() > 2 * bound


def test_the_two_factors_and_the_rows_are_drawn_independently():
    layer = layer_of((64, 64), rank=8, init_B="matched")
    rows = torch.cat([layer.A, layer.B.T]).double()
    correlations = torch.corrcoef(rows) - torch.eye(16)
    assert correlations.abs().max() < 5 / 8


def gradients_at_the_start(**options):
    layer = layer_of(**options)
    layer(torch.randn(7, 33)).square().sum().backward()
    return layer.A.grad.abs().max(), layer.B.grad.abs().max()


def test_which_starts_can_learn():
    A, B = gradients_at_the_start(init_A="zero", init_B="zero")
    assert A == 0 and B == 0  # a saddle: nothing ever moves
    A, B = gradients_at_the_start(init_A="zero", init_B="kaiming")
    assert A > 0 and B == 0
    A, B = gradients_at_the_start()
    assert A == 0 and B > 0
    A, B = gradients_at_the_start(init_B="kaiming", init_offset=True)
    assert A > 0 and B > 0


@pytest.mark.parametrize("init", [{}, {"init_A": "zero", "init_B": "kaiming"}], ids=str)
def test_a_start_with_one_zero_factor_learns(init):
    layer = layer_of(**init)
    x = torch.randn(64, 33)
    target = layer(x).detach() + x @ torch.randn(33, 1) @ torch.randn(1, 16)
    optimizer = torch.optim.Adam(layer.roles().values(), lr=0.02)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank is 0; query is 16 x 33, so it must lie in \[1, 16\]"),
        ({"rank": 17}, r"rank is 17; query is 16 x 33, so it must lie in \[1, 16\]"),
        ({"scaling": "sqrt"}, "scaling is 'sqrt'; it must be 'lora' or 'rslora'"),
        ({"init_A": "normal"}, "init_A is 'normal'; it must be kaiming, gaussian or zero"),
        ({"init_B": "ones"}, "init_B is 'ones'; it must be zero, kaiming or matched"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must lie in \[0, 1\)"),
    ],
    ids=str,
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        layer_of(**options)


# ---- peft as oracle -----------------------------------------------------------------------------


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(33, 17)
        self.second = nn.Linear(17, 9, bias=False)
        self.head = nn.Linear(9, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def bert():
    config = BertConfig(
        vocab_size=50,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=53,
        max_position_embeddings=20,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def variant_of(bias="none", **options):
    def adapter(*arguments, rank=4, alpha=12, **given):
        return LoraLinear(*arguments, rank=rank, alpha=alpha, **options, **given)

    return Variant(name="test", lr=1e-2, adapter=adapter, groups=by_role, bias=bias)


def both(base, *, targets, head, ours, peft_options, patterns=None):
    """The same disturbed adapters twice, in float64: (ours, layers, peft's, peft's names)."""
    import peft

    base = base.double().eval()
    model = copy.deepcopy(base)
    layers = inject(model, ours, seed=0, targets=targets, train_modules=[head], **(patterns or {}))
    model.double()
    disturb(model)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, modules_to_save=[head], **peft_options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        theirs = peft.get_peft_model(base, config, autocast_adapter_dtype=False).double()
    names = {}
    for path, layer in layers.items():
        root = f"base_model.model.{path}"
        names[f"{root}.lora_A.default.weight"] = layer.A
        names[f"{root}.lora_B.default.weight"] = layer.B
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        if not parameter.requires_grad or last in "AB":
            continue
        if path in layers:
            names[f"base_model.model.{path}.base_layer.{last}"] = parameter
        elif path == head:
            names[f"base_model.model.{path}.modules_to_save.default.{last}"] = parameter
        else:
            names[f"base_model.model.{name}"] = parameter
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert set(trained) == set(names)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(names[name])
    return model, theirs, [(names[name], parameter) for name, parameter in trained.items()]


def assert_equal_course(model, theirs, pairs, run, tolerance=1e-9):
    """Outputs, gradients and 20 AdamW steps agree."""
    first = [ours.detach().clone() for ours, _ in pairs]
    optimizers = [
        torch.optim.AdamW([pair[side] for pair in pairs], lr=1e-2, weight_decay=0.1)
        for side in (0, 1)
    ]
    for step in range(20):
        outputs = [run(each, step) for each in (model, theirs)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=tolerance, atol=tolerance)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().mean().backward()
        for ours, peers in pairs:
            torch.testing.assert_close(ours.grad, peers.grad, rtol=tolerance, atol=tolerance)
        for optimizer in optimizers:
            optimizer.step()
    for (ours, peers), start in zip(pairs, first, strict=True):
        torch.testing.assert_close(ours, peers, rtol=tolerance, atol=tolerance)
        assert (ours - start).abs().max() > 0.05


@pytest.mark.parametrize(
    ("ours", "peft_options", "patterns"),
    [
        ({}, {}, {}),
        ({"scaling": "rslora"}, {"use_rslora": True}, {}),
        (
            {},
            {"rank_pattern": {"second": 2}, "alpha_pattern": {"first": 5}},
            {"rank_pattern": {"second": 2}, "alpha_pattern": {"first": 5}},
        ),
        ({"bias": "all"}, {"bias": "all"}, {}),
        ({"bias": "adapted"}, {"bias": "lora_only"}, {}),
    ],
    ids=["lora", "rslora", "patterns", "bias_all", "bias_adapted"],
)
def test_peft_takes_the_same_course(ours, peft_options, patterns):
    course = both(
        TwoLayers(),
        targets=["first", "second"],
        head="head",
        ours=variant_of(**ours),
        peft_options=peft_options,
        patterns=patterns,
    )
    x = torch.randn(20, 6, 33, dtype=torch.float64)
    assert_equal_course(*course, lambda model, step: model(x[step]))


def test_peft_takes_the_same_course_on_bert():
    course = both(
        bert(),
        targets=["query", "value", "attention.output.dense"],
        head="classifier",
        ours=variant_of(),
        peft_options={"task_type": "SEQ_CLS"},
    )
    tokens = torch.randint(0, 50, (20, 3, 11))
    assert_equal_course(*course, lambda model, step: model(input_ids=tokens[step]).logits)
