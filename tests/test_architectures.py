"""Architectures of transformers, tiny and random: an adapted model is the model of its W', in value
and gradient, whatever its code does with a layer's weight or output."""

import copy
import functools

import pytest
import torch
from architectures import WIDTH, causal, loss_of, plain
from torch import nn

import variants
from variants import LoraLinear
from variants.site import computes_linear


def low_rank(adapter=LoraLinear, **options):
    return variants.Variant(
        name="test", lr=1.0, groups=variants.by_role,
        adapter=functools.partial(adapter, **{"rank": 2, "alpha": 4, **options}),
    )  # fmt: skip


def adapted(name, adapter=LoraLinear, **options):
    """A copy of the model with every linear layer adapted, and all that is trained moved."""
    model = copy.deepcopy(plain(name))
    layers = variants.inject(model, low_rank(adapter, **options), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model, layers


def kept(model, layer, of=lambda parameter: parameter.data):
    """A view (o, i) of the parameter of a plain model that `layer` adapts, or of its gradient."""
    found = of(model.get_parameter(layer.site.parameter))
    return None if found is None else layer.site.matrix(found)


def with_weights_of(name, layers):
    """The plain model whose weights are W'."""
    model = copy.deepcopy(plain(name))
    for layer in layers.values():
        kept(model, layer).copy_(layer.adapted_weight())
    return model


def test_linear_layers_are_those_that_compute_x_W_plus_b():
    """Routers that return pairs are left out, and named are adapted where their code reads the
    weight; Falcon's own class is linear by another name."""
    routers = {
        name: [path for path, m in plain(name).named_modules() if "Router" in type(m).__name__]
        for name in ("llama4", "phimoe")
    }
    for name, paths in routers.items():
        assert len(paths) == 2
        assert not set(paths) & set(adapted(name)[1])
        model = copy.deepcopy(plain(name))
        layers = variants.inject(model, low_rank(), seed=0, targets=[paths[0]])
        assert list(layers) == [f"{paths[0]}.weight"]
        layers[f"{paths[0]}.weight"].B.data.normal_()
        with torch.no_grad():
            logits, expected = loss_of(model)[0], loss_of(with_weights_of(name, layers))[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert (logits - loss_of(plain(name))[0]).abs().max() > 1e-4
    assert len(adapted("falcon")[1]) == 8


class Bent(nn.Linear):
    """Nearly linear where weights and inputs are small."""

    def forward(self, x):
        return super().forward(x).tanh()


@pytest.mark.parametrize("std", [0.005, 0.02, 0.5])
def test_a_layer_that_is_nearly_linear_is_none(std):
    layer, plain_layer = Bent(64, 64), nn.Linear(64, 64)
    for module in (layer, plain_layer):
        nn.init.normal_(module.weight, std=std)
    assert not computes_linear(layer) and computes_linear(plain_layer)


def test_code_that_writes_a_weight_is_told():
    """RWKV rescales two weights of each block whenever it changes between training and not."""
    model = causal("rwkv", attention_hidden_size=WIDTH, context_length=32)
    layers = variants.inject(model, low_rank(), seed=0)
    assert len(layers) == 14
    with pytest.raises(ValueError, match=r"writes the weight of rwkv.blocks.0.attention.output in"):
        loss_of(model.eval())


@pytest.mark.parametrize("training", [True, False])
def test_dropout_where_the_weight_is_read(training):
    model, layers = adapted("mamba", dropout=0.5)
    model.train(training)
    variants.begin_step(layers, 1)
    if training:
        with pytest.raises(
            ValueError, match=r"reads the weight of .*dt_proj instead of .* dropout=0"
        ):
            loss_of(model)
    else:
        loss_of(model)


@pytest.mark.parametrize("depth", [1, 2])
def test_torchs_encoder_keeps_its_answer_in_evaluation(depth):
    """Its fast path reads the weights of linear1 and linear2, and its attention those of both of
    its projections."""
    block = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(block, depth)
    layers = variants.inject(model, low_rank(), seed=0)
    assert len(layers) == 4 * depth
    with torch.no_grad():
        for layer in layers.values():
            layer.B.normal_()
    x = torch.randn(2, 5, 16)
    expected = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)
