"""The promises of every variant, by kind: all adapters, the low-rank ones, drawn starts.

A subclass names its variants, YAMLs of the folder `conf`. No test branches on a variant's name.
Weights are disturbed first, since a rescaled bias or a wrong norm axis cannot be seen at the zero
start.
"""

import copy
import dataclasses
import functools
import hashlib
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import variants
from harness.loop import meter

CONF = Path(__file__).parent.parent / "conf"
STORES = {
    "dense": variants.DenseStore,
    "nf4": variants.Nf4Store,
    "int8": variants.Int8Store,
}
SMALL = ["rank=3", "alpha=6", "~groups.module_rates.head"]  # there is no head here
SHAPES = [(7, 5), (16, 33), (65, 64), (24, 24)]  # of a square one every axis is taken

every_store = pytest.mark.parametrize(
    "store", ["dense", "nf4", pytest.param("int8", marks=pytest.mark.slow)]
)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])


@functools.cache
def composed(conf, name, *overrides):
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        config = compose("config", [f"variant={name}", *SMALL, *overrides])
    return instantiate(config.variant, _convert_="all")


def model_of(shape, bias=True, layers=("query",), seed=1):
    """Linear layers side by side, with weights of no special form."""
    o, i = shape
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(OrderedDict((layer, nn.Linear(i, o, bias)) for layer in layers))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def disturb(layer, seed=2):
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.roles().values():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return layer


def inputs(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bias_of(layer):
    return 0.0 if layer.bias is None else layer.bias.double()


def digests(module):
    return {
        name: hashlib.sha256(p.detach().contiguous().view(torch.uint8).numpy().tobytes()).digest()
        for name, p in module.named_parameters()
    }


def close(actual, expected, tolerance=1e-5):
    """Within `tolerance` of the largest entry expected, or of 1."""
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


class Allocations(TorchDispatchMode):
    """The shapes of the tensors that own their memory, in order."""

    def __init__(self, known):
        super().__init__()
        self.known, self.shapes = {t.untyped_storage().data_ptr() for t in known}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.shapes.append(tuple(tensor.shape))
        return result


def x_like(weight):
    return torch.zeros(weight.size(1), dtype=weight.dtype, device=weight.device)


def in_float64(layer):
    """The same layer in float64: W' of its definition, and the parameters that it depends on."""
    twin = copy.deepcopy(layer).double()
    return twin.definition(twin.base_weight().double()), twin


class Contract:
    """Builds the layers under test."""

    conf = CONF

    def variant_of(self, name, *overrides):
        return composed(self.conf, name, *overrides)

    def dropping(self, name):
        """The overrides that make a variant drop its input, if it can."""
        return ("dropout=0.5",) if self.variant_of(name).adapter.func.drops_input else ()

    def inject(self, name, model, *, store=None, overrides=(), seed=0, **options):
        variant = self.variant_of(name, *overrides)
        if store is not None:
            variant = dataclasses.replace(variant, store=STORES[store])
        if not any(key.endswith("bias") for key, _ in model.named_parameters()):
            variant = dataclasses.replace(variant, bias="none")
        return variant, variants.inject(model, variant, seed=seed, **options)

    def layer_of(self, name, shape=(16, 33), *, bias=True, disturbed=True, **options):
        layer = self.inject(name, model_of(shape, bias), **options)[1]["query"]
        return disturb(layer) if disturbed else layer


class Adapters(Contract):
    """Every adapter, whatever map of W it is."""

    def test_the_record_carries_the_name_of_its_file_and_cannot_be_changed(self, name):
        variant = self.variant_of(name)
        assert isinstance(variant, variants.Variant) and variant.name == name
        assert variant.lr > 0
        with pytest.raises(dataclasses.FrozenInstanceError):
            variant.lr = 1.0

    @every_store
    @every_shape
    @with_and_without_bias
    def test_adapted_equals_the_definition_in_value_and_gradient(self, name, store, shape, bias):
        layer = self.layer_of(name, shape, bias=bias, store=store)
        x = inputs(11, shape[1]).requires_grad_()
        roles = dict(layer.roles())
        dy = inputs(11, shape[0], seed=4)

        y = layer.adapted(x)
        y.backward(dy)
        gradients = {role: p.grad for role, p in roles.items()} | {"x": x.grad}
        weight, twin = in_float64(layer)
        expected = x.double() @ weight.T + bias_of(twin)
        wanted = torch.autograd.grad(expected, [*twin.roles().values(), x], dy.double())

        assert y.dtype == torch.float32
        close(y, expected)
        close(layer.adapted_weight(), weight)
        for (role, gradient), reference in zip(gradients.items(), wanted, strict=True):
            assert gradient.dtype == torch.float32, role
            close(gradient, reference)

    @every_store
    def test_delta_weight_is_the_change_of_the_base(self, name, store):
        layer = self.layer_of(name, store=store)
        if layer.store is None:
            with pytest.raises(ValueError, match="no longer holds its base weight"):
                layer.delta_weight()
            return
        W = layer.base_weight()
        delta = layer.delta_weight()
        assert delta.dtype == torch.float32 and not delta.requires_grad
        close(delta, in_float64(layer)[0] - W)
        x = inputs(4, 33)
        close(layer.adapted(x) - F.linear(x, W, layer.bias), x.double() @ delta.double().T)

    @every_store
    def test_batch_axes_come_and_go(self, name, store):
        layer = self.layer_of(name, store=store)
        x = inputs(2, 3, 33)
        y = layer(x)
        assert y.shape == (2, 3, 16)
        close(y.view(6, 16), layer(x.view(6, 33)), 1e-6)
        assert layer(x[0, 0]).shape == (16,)
        close(layer(x[0, 0]), y[0, 0], 1e-6)
        close(layer(x.transpose(0, 1)), y.transpose(0, 1), 1e-6)  # rows that are not contiguous
        for empty in ((0, 33), (2, 0, 33)):
            x = inputs(*empty).requires_grad_()
            y = layer(x)
            assert y.shape == (*empty[:-1], 16)
            y.sum().backward()
            assert x.grad.shape == x.shape
        for role, parameter in layer.roles().items():
            assert torch.count_nonzero(parameter.grad) == 0, role

    @every_store
    @with_and_without_bias
    def test_bfloat16_products_stay_close_and_keep_the_dtypes(self, name, store, bias):
        layer = self.layer_of(name, bias=bias, store=store)
        x = inputs(11, 33)
        dy = inputs(11, 16, seed=4)
        roles = dict(layer.roles())

        def run(x):
            x = x.detach().requires_grad_()
            for parameter in roles.values():
                parameter.grad = None
            y = layer(x)
            y.backward(dy.to(y.dtype))
            return y, {"x": x.grad} | {role: p.grad for role, p in roles.items()}

        y, gradients = run(x)
        assert layer.compute_dtype is None
        low, low_gradients = run(x.bfloat16())
        assert low.dtype == torch.bfloat16
        layer.compute_dtype = torch.bfloat16
        mixed, mixed_gradients = run(x)
        assert mixed.dtype == torch.float32
        close(mixed, y, 0.03)
        close(low, y, 0.03)
        for role, gradient in gradients.items():
            assert mixed_gradients[role].dtype == torch.float32
            assert low_gradients[role].dtype == (torch.bfloat16 if role == "x" else torch.float32)
            close(mixed_gradients[role], gradient, 0.03)
            close(low_gradients[role], gradient, 0.03)

    @every_store
    @pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["own_dtype", "bfloat16"])
    def test_code_may_write_the_output_in_place(self, name, store, compute):
        """As ReLU(inplace=True) does to it, and DeBERTa's attention to a permutation of it."""
        layer = self.layer_of(name, store=store)
        layer.compute_dtype = compute
        dy = inputs(2, 16, 3, seed=4)

        def gradients(write):
            x = inputs(2, 3, 33).requires_grad_()
            parameters = [x, *layer.roles().values()]
            y = write(layer(x).permute(0, 2, 1), layer(x)).permute(0, 2, 1)
            return y, torch.autograd.grad(y, parameters, dy.permute(0, 2, 1))

        y, found = gradients(lambda y, z: y.div_(3).add_(F.relu(z, inplace=True).permute(0, 2, 1)))
        wanted, expected = gradients(lambda y, z: y / 3 + F.relu(z).permute(0, 2, 1))
        assert torch.equal(y, wanted)
        for actual, reference in zip(found, expected, strict=True):
            assert torch.equal(actual, reference)

    @every_store
    def test_a_compiled_layer_equals_the_eager_one(self, name, store):
        layer = self.layer_of(name, store=store)
        x = inputs(11, 33).requires_grad_()
        parameters = [x, *layer.roles().values()]
        y = layer(x)
        expected = torch.autograd.grad(y.square().sum(), parameters)
        torch.compiler.reset()
        compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
        close(compiled, y)
        for actual, wanted in zip(
            torch.autograd.grad(compiled.square().sum(), parameters), expected, strict=True
        ):
            close(actual, wanted)

    def test_a_second_derivative_is_right_or_refused(self, name):
        layer = self.layer_of(name)
        x = inputs(3, 33).requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        try:
            gradient.square().sum().backward()
        except RuntimeError as error:
            assert "once_differentiable" in str(error)
        else:
            W = in_float64(layer)[0]  # dL/dx = 2 (x W'^T + bias) W'
            close(x.grad, 4 * gradient.double() @ W.T @ W)

    @every_store
    @with_and_without_bias
    def test_merging_changes_nothing_but_speed_and_unmerging_is_exact(self, name, store, bias):
        layer = self.layer_of(name, bias=bias, store=store)
        x = inputs(6, 33)
        before = digests(layer)
        y = layer(x)
        for _ in range(3):
            layer.merge()
            close(layer(x), y)
            assert torch.equal(layer.merged_weight, layer.adapted_weight())
            assert layer(x.bfloat16()).dtype == torch.bfloat16
            layer.unmerge()
        assert torch.equal(layer(x), y)
        assert digests(layer) == before
        assert not any("merged" in key for key in layer.state_dict())

    @every_store
    @with_and_without_bias
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_export_is_an_ordinary_linear_layer(self, name, store, bias, dtype):
        layer = self.layer_of(name, bias=bias, store=store)
        linear = layer.export(dtype)
        assert type(linear) is nn.Linear
        assert (linear.out_features, linear.in_features) == (16, 33)
        assert {p.dtype for p in linear.parameters()} == {dtype}
        x = inputs(6, 33)
        close(linear(x.to(dtype)), layer(x), 1e-5 if dtype == torch.float32 else 0.02)
        before = digests(layer)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.zero_()
        assert digests(layer) == before  # nothing is shared

    @every_store
    def test_nothing_writes_the_base(self, name, store):
        model = model_of((16, 33))
        variant, layers = self.inject(name, model, store=store, overrides=self.dropping(name))
        layer = disturb(layers["query"])
        if layer.store is None:
            pytest.skip("it has no frozen base")
        bases = digests(layer.store)
        groups = variant.groups(model, lr=variant.lr) if any(layer.roles()) else []
        optimizer = torch.optim.AdamW(groups or [torch.nn.Parameter(torch.zeros(1))], fused=True)
        model.train()
        for step in (1, 2, 3):
            variants.begin_step(layers, step)
            if layer.roles():
                loss = model(inputs(6, 33)).square().sum()
                penalty = variant.penalty(layers)
                (loss if penalty is None else loss + penalty).backward()
            optimizer.step()
            variants.after_step(layers, optimizer, step)
            optimizer.zero_grad()
        layer.merge()
        model.eval()(inputs(6, 33))
        layer.unmerge()
        assert digests(layer.store) == bases
        assert not any(parameter.requires_grad for parameter in layer.store.parameters())

    @every_store
    def test_adapter_state_holds_all_but_the_base(self, name, store):
        layer = self.layer_of(name, store=store)
        fresh = self.layer_of(name, store=store, seed=5, disturbed=False)
        for key, tensor in layer.adapter_state().items():  # statistics too, but not the start
            if tensor.is_floating_point() and key not in ("A0", "B0"):
                tensor += 0.1
        state = {key: tensor.clone() for key, tensor in layer.adapter_state().items()}
        assert not any(key.startswith("store") for key in state)
        fresh.merge()
        fresh.load_adapter_state(state)
        assert fresh.merged_weight is None
        x = inputs(6, 33)
        assert torch.equal(fresh(x), layer(x))
        reread = fresh.adapter_state()
        assert set(reread) == set(state)
        assert all(torch.equal(reread[key], state[key]) for key in state)
        with pytest.raises(ValueError, match="query expects"):
            fresh.load_adapter_state({**state, "extra": torch.zeros(1)})
        for key in state:
            with pytest.raises(ValueError, match="query expects"):
                fresh.load_adapter_state({k: v for k, v in state.items() if k != key})

    @every_store
    def test_roles_name_every_trainable_parameter_once(self, name, store):
        layer = self.layer_of(name, store=store)
        named = list(layer.roles().values())
        trainable = [p for p in layer.parameters() if p.requires_grad]
        assert len({id(p) for p in named}) == len(named)
        assert {id(p) for p in named} == {id(p) for p in trainable}
        assert all(p.dtype == torch.float32 for p in named)
        assert 0 <= layer.active_rank() <= 16
        assert layer.active_parameters() <= sum(p.numel() for p in named)
        assert "query" in repr(layer)

    @every_store
    def test_code_that_reads_the_weight_gets_the_adapted_one(self, name, store):
        layer = self.layer_of(name, store=store)
        x, dy = inputs(11, 33), inputs(11, 16, seed=4)
        roles = list(layer.roles().values())
        y = F.linear(x, layer.weight, layer.bias)
        close(y, layer(x))
        if roles:
            found, wanted = (torch.autograd.grad(z, roles, dy) for z in (y, layer(x)))
            for actual, expected in zip(found, wanted, strict=True):
                close(actual, expected)
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        assert (weight.dtype, weight.shape, weight.device.type) == (torch.float32, (16, 33), "cpu")
        layer.merge()
        close(F.linear(x, layer.weight, layer.bias), y)

    def test_asking_for_a_weights_dtype_computes_nothing(self, name, monkeypatch):
        layer = self.layer_of(name)
        monkeypatch.setattr(type(layer), "definition", None)
        assert x_like(layer.weight).dtype == torch.float32
        low = self.inject(name, model_of((16, 33)).bfloat16())[1]["query"]
        assert low.weight.dtype == low.weight.data.dtype == torch.bfloat16

    def test_the_layer_follows_its_model_to_another_device(self, name):
        """The meta device stands for an accelerator."""
        model = model_of((16, 33)).to("meta")
        _, layers = self.inject(name, model, store="dense")
        assert {p.device.type for p in model.parameters()} == {"meta"}
        layers["query"].train()
        assert model(torch.empty(4, 33, device="meta")).shape == (4, 16)

    def test_no_global_generator_is_touched(self, name):
        numpy_state = np.random.get_state()[1].copy()
        states = torch.get_rng_state(), random.getstate()
        model = model_of((16, 33))
        torch.set_rng_state(states[0])  # nn.Linear's own initialisation drew
        _, layers = self.inject(name, model, overrides=self.dropping(name))
        model.train()
        variants.begin_step(layers, 1)
        x = inputs(4, 33).requires_grad_()
        model(x).sum().backward()
        layers["query"].merge()
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.array_equal(np.random.get_state()[1], numpy_state)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_penalties_are_weighted_and_reduced_over_layers(self, name, reduction):
        variant, layers = self.inject(name, model_of((16, 33), layers=("query", "value")))
        for layer in layers.values():
            disturb(layer)
        terms = [layer.penalty() for layer in layers.values()]
        found = dataclasses.replace(
            variant, penalty_weight=0.25, penalty_reduction=reduction
        ).penalty(layers)
        if terms == [None, None]:
            assert found is None
        else:
            total = float(sum(terms).detach())
            assert float(found.detach()) == pytest.approx(
                0.25 * (total / 2 if reduction == "mean" else total)
            )
        assert dataclasses.replace(variant, penalty_weight=0.0).penalty(layers) is None


class LowRank(Contract):
    """W' = diag(g) (W + s B A)."""

    @every_store
    def test_the_definition_is_the_equation(self, name, store):
        layer = self.layer_of(name, store=store)
        B, A = (factor.double() for factor in layer.factors())
        weight = layer.base_weight().double() + layer.scale * B @ A
        gain = layer.gain()
        close(layer.adapted_weight(), weight if gain is None else gain[:, None] * weight)
        assert layer.active_rank() <= len(A)

    def test_training_forms_no_second_weight(self, name):
        layer = self.layer_of(name, store="dense").train()
        x = inputs(11, 33).requires_grad_()
        with Allocations(layer.parameters()) as seen:
            layer(x).sum().backward()
        assert (11, 16) in seen.shapes  # it does see what is allocated
        assert (16, 33) not in seen.shapes and (33, 16) not in seen.shapes

    def dropping_layer(self, name, store="dense"):
        layer = self.layer_of(name, store=store, overrides=("dropout=0.5",)).train()
        variants.begin_step({"query": layer}, 1)
        return layer

    def test_masks_are_a_function_of_seed_layer_and_position(self, name):
        layer = self.dropping_layer(name)
        x = inputs(6, 33)

        def at(*position):
            variants.begin_step({"query": layer}, *position)
            return layer(x).detach()

        outputs = [at(1), at(2), at(1, 1)]
        layer.seed = 7
        outputs.append(at(1))
        layer.seed, layer.path = 0, "value"
        outputs.append(at(1))
        layer.path = "query"
        assert torch.equal(at(1), outputs[0])
        for index, output in enumerate(outputs):
            assert not any(torch.equal(output, other) for other in outputs[index + 1 :])

    @every_store
    def test_gradients_pass_the_mask_of_the_forward_pass(self, name, store):
        layer = self.dropping_layer(name, store=store)
        x = inputs(9, 33).requires_grad_()
        dy = inputs(9, 16, seed=4)
        y = layer(x)
        y.backward(dy)
        keep = layer.mask()(x.shape, x.device, x.dtype)
        assert 0 < keep.sum() < keep.numel()
        B, A = (factor.double() for factor in layer.stored_factors())
        gain = layer.gain()
        wide = x.double()
        z = wide @ layer.store.dequantize(torch.float32).double().T
        z = z + layer.scale * (wide * keep / 0.5) @ A.T @ B.T
        expected = (z if gain is None else z * gain.double()) + bias_of(layer)
        close(y, expected)
        roles = dict(layer.roles())
        wanted = torch.autograd.grad(expected, [x, *roles.values()], dy.double())
        for actual, reference in zip([x, *roles.values()], wanted, strict=True):
            close(actual.grad, reference)

    @pytest.mark.parametrize("shape", [(16, 33), (33, 16)], ids=str)
    def test_the_norms_that_are_logged(self, name, shape):
        """Of what is trained, whatever a variant makes of it in its factors."""
        layer = self.layer_of(name, shape)
        base_norm = float(layer.base_weight().norm())
        row = meter.factor_norms({"query": layer}, {"query": base_norm})
        roles = {
            role: p.detach().double().numpy() for role, p in layer.roles().items() if p.ndim == 2
        }
        B, A = (factor.detach().double().numpy() for factor in layer.factors())
        relative = layer.scale * np.linalg.norm(B @ A) / base_norm
        wanted = {f"norm/{role}/query": np.linalg.norm(array) for role, array in roles.items()}
        assert row == pytest.approx({**wanted, "norm/relative/query": relative}, rel=1e-5)

    def test_recomputation_sees_the_same_mask(self, name):
        gradients = []
        for recompute in (False, True):
            layer = self.dropping_layer(name)
            x = inputs(6, 33).requires_grad_()
            h = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
            h.square().sum().backward()
            gradients.append([x.grad, *(p.grad for p in layer.roles().values())])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    def test_training_with_dropout_needs_the_position(self, name):
        layer = self.dropping_layer(name)
        layer.masks = None
        with pytest.raises(RuntimeError, match="query has dropout but was not told the step"):
            layer(inputs(2, 33))
        assert layer.eval()(inputs(2, 33)).shape == (2, 16)

    def test_a_compiled_layer_drops_too_and_is_compiled_once(self, name):
        layer = self.dropping_layer(name)
        x = inputs(6, 33)
        graphs = []

        def backend(graph, _):
            graphs.append(graph)
            return graph.forward

        torch.compiler.reset()
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        outputs = []
        for step in range(1, 5):
            variants.begin_step({"query": layer}, step)
            outputs.append(compiled(x).detach())
        assert len(graphs) == 1
        assert not torch.equal(outputs[0], outputs[1])

    def test_evaluation_drops_nothing(self, name):
        layer = self.dropping_layer(name).eval()
        x = inputs(6, 33)
        close(layer(x), x.double() @ in_float64(layer)[0].T + bias_of(layer))

    def test_dropout_is_unbiased(self, name):
        layer = self.dropping_layer(name)
        x = inputs(2, 33)
        expected = layer.eval()(x).double()
        layer.train()
        draws = []
        with torch.no_grad():
            for step in range(600):
                variants.begin_step({"query": layer}, step)
                draws.append(layer(x).double())
        draws = torch.stack(draws)
        error = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)
        assert error.abs().max() < 4.5  # 32 entries, of standard normal error each


class Starts(Contract):
    """A fresh layer is its base: to the bit, or to `tolerance` of the largest entry."""

    tolerance = 0.0

    @every_store
    @with_and_without_bias
    def test_the_start_is_the_base(self, name, store, bias):
        model = model_of((16, 33), bias)
        x, loaded = inputs(9, 33), model.query
        layer = self.inject(name, model, store=store)[1]["query"]
        stored = STORES[store](loaded.weight.detach()).dequantize(torch.float32)
        W = layer.base_weight().detach()
        if self.tolerance:  # a residual keeps W at least as well as the store alone would
            assert (W - loaded.weight).norm() <= (stored - loaded.weight).norm() + 1e-5
        else:
            assert torch.equal(W, stored)
        close(model(x), F.linear(x, W, loaded.bias))
        assert (layer.adapted_weight() - W).abs().max() <= self.tolerance * W.abs().max()

    @every_store
    def test_a_start_is_the_same_each_time(self, name, store):
        first, again = (
            self.layer_of(name, store=store, disturbed=False).state_dict() for _ in range(2)
        )
        assert all(torch.equal(first[key], again[key]) for key in first)


class DrawnStarts(Contract):
    """Starts that depend on (seed, path, role) alone, and not on W."""

    def start_of(self, name, *, layers=("query", "value"), **options):
        model = model_of((16, 33), layers=layers)
        found = self.inject(name, model, **options)[1]
        return {
            (path, role): parameter.detach().clone()
            for path, layer in found.items()
            for role, parameter in layer.roles().items()
        }

    def test_other_targets_and_layers_do_not_change_a_layers_start(self, name):
        both = self.start_of(name)
        torch.manual_seed(99)
        for layers, targets in (
            (("query", "value"), ["query"]),
            (("other", "query"), "all-linear"),
        ):
            if layers[0] == "other":
                alone = {
                    key: v
                    for key, v in self.start_of(name, layers=layers).items()
                    if key[1] in "ABE"
                }
            else:
                alone = self.start_of(name, targets=targets)
            for (path, role), parameter in alone.items():
                if path == "query":
                    assert torch.equal(parameter, both[path, role])

    def test_the_start_depends_on_seed_path_and_role(self, name):
        start, again, other = self.start_of(name), self.start_of(name), self.start_of(name, seed=1)
        random_roles = [key for key in start if key[1] in ("A", "B") and start[key].count_nonzero()]
        assert all(torch.equal(start[key], again[key]) for key in start)
        for path, role in random_roles:
            assert not torch.equal(start[path, role], other[path, role])
            assert not torch.equal(start["query", role], start["value", role])
        if ("query", "A") in start:
            assert ("query", "A") in random_roles

    def test_a_smaller_rank_starts_as_a_prefix(self, name):
        small = self.start_of(name)
        large = self.start_of(name, rank_pattern={"query": 6})
        assert large["query", "A"].shape == (6, 33)
        assert torch.equal(large["query", "A"][:3], small["query", "A"])
        assert torch.equal(large["query", "B"][:, :3], small["query", "B"])
