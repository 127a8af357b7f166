"""torch's ways of recording a program: export, compile, fx, jit, meta and fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

from contranorm import ContraNorm, ContraStep, GraphContraNorm, contra_norm

LAYERS = {
    "norm": lambda **form: ContraNorm(6, 0.3, **form),
    "step": lambda **form: ContraStep(0.3, dim=6, **form),
}
FORMS = [
    {},
    dict(implementation="fused"),
    dict(implementation="blocked"),
    dict(implementation="sdpa"),
    dict(axis="features", identity=True),
    dict(symmetric=True, pre_norm=True),
    dict(learnable=True, positive=True),
]
each_form = pytest.mark.parametrize("form", FORMS, ids=str)
each_layer = pytest.mark.parametrize("layer", LAYERS)
deprecated = pytest.mark.filterwarnings("ignore:.*torch.jit.(trace|script).* is deprecated:FutureWarning")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Features and masks of two shapes: a recorded program must serve both."""
    long, short = torch.arange(7) < torch.tensor([[7], [4], [2]]), torch.arange(5) < torch.tensor([[3], [5]])
    return [(random(3, 7, 6), long), (random(2, 5, 6, seed=1), short)]


def assert_equal(program, layer) -> None:
    for x, mask in batches():
        torch.testing.assert_close(program(x, mask), layer(x, mask), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@each_form
@each_layer
def test_export_with_dynamic_shapes(layer, form, strict):
    module = LAYERS[layer](**form)
    any_size = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(module, batches()[0], dynamic_shapes=(any_size, any_size), strict=strict)
    assert_equal(program.module(), module)


def check_compiled(module, backend) -> None:
    """Values at two shapes, and gradients."""
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    assert_equal(compiled, module)
    (x, mask), upstream = batches()[0], random(3, 7, 6, seed=2)
    gradients = []
    for run in (compiled, module):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(run(leaf, mask), leaf, upstream)[0])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "form", [{}, dict(implementation="sdpa"), dict(axis="features"), dict(learnable=True)], ids=str
)
def test_compile_without_graph_breaks(form):
    check_compiled(ContraNorm(6, 0.3, **form), "eager" if "axis" in form else "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@each_form
@each_layer
def test_compile_every_form(layer, form, backend):
    check_compiled(LAYERS[layer](**form), backend)


def test_compile_of_the_function_takes_tensor_scales():
    torch.compiler.reset()
    compiled = torch.compile(contra_norm, fullgraph=True, backend="eager")
    x = random(3, 7, 6)
    for scale in (0.3, torch.tensor(0.3), torch.full((6,), 0.3)):
        torch.testing.assert_close(compiled(x, scale), contra_norm(x, 0.3), atol=1e-5, rtol=1e-4)


@each_form
@each_layer
def test_fx_symbolic_trace(layer, form):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = LAYERS[layer](**form)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return 2 * self.layer(x, mask)

    model = Model()
    assert_equal(fx.symbolic_trace(model), model)


def test_fx_symbolic_trace_of_the_function():
    x = random(3, 7, 6)
    traced = fx.symbolic_trace(lambda x: contra_norm(x, 0.3))
    torch.testing.assert_close(traced(x), contra_norm(x, 0.3))


@deprecated
@each_form
@each_layer
def test_jit_trace(layer, form):
    module = LAYERS[layer](**form)
    assert_equal(torch.jit.trace(module, batches()[0]), module)


@deprecated
@pytest.mark.parametrize("form", [*FORMS, dict(scaled_identity=True), dict(symmetric=True, axis="features")], ids=str)
@each_layer
def test_jit_script(layer, form):
    module = LAYERS[layer](**form)
    scripted = torch.jit.script(module)
    assert_equal(scripted, module)
    x, mask = batches()[0]
    torch.testing.assert_close(scripted(x), module(x), atol=1e-5, rtol=1e-4)
    x = x.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    gradients = [torch.autograd.grad(run(x, mask)[mask].square().sum(), x)[0][mask] for run in (scripted, module)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    with pytest.raises(torch.jit.Error, match="mask must be bool"):
        scripted(x, mask[:1])


@deprecated
@pytest.mark.parametrize(("step", "x"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_jit_script_rounds_as_the_layer_does(step, x):
    features = random(2, 5, 4).to(x)
    for module in (
        ContraStep(0.005, dim=4, identity=True, learnable=True, dtype=step),
        ContraStep(0.1, identity=True),
    ):
        rounding = 4 * torch.finfo(x).eps
        torch.testing.assert_close(torch.jit.script(module)(features), module(features), rtol=rounding, atol=rounding)


@deprecated
def test_jit_script_of_the_fast_path_is_refused():
    """It would skip the norms of nn.TransformerEncoderLayer, and in TorchScript nothing else can stop it."""
    vanilla = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval()
    torch.jit.script(vanilla)
    vanilla.norm1, vanilla.norm2 = ContraNorm(6, 0.3), ContraNorm(6, 0.3)
    with pytest.raises(RuntimeError, match="Optional"):
        torch.jit.script(vanilla)


@each_form
@each_layer
def test_meta_and_fake_tensors(layer, form):
    module = LAYERS[layer](**form)
    x, mask = batches()[0]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module(mode.from_tensor(x), mode.from_tensor(mask)).shape == x.shape
    y = module.to("meta")(x.to("meta"), mask.to("meta"))
    assert y.is_meta and y.shape == x.shape


def test_linear_is_exact_while_recorded():
    module, (x, mask) = ContraStep(0.3, implementation="linear"), batches()[0]
    program = torch.export.export(module, (x, mask)).module()
    torch.testing.assert_close(program(x, mask), contra_norm(x, 0.3, mask=mask), atol=1e-5, rtol=1e-4)


def graphs(edges) -> list[torch.Tensor]:
    """Two graphs of one number of nodes, with different numbers of edges."""
    return [edges(9), edges(9, 0.1, symmetric=False, seed=1)]


def edge_index(adjacency: torch.Tensor) -> torch.Tensor:
    """PyG's form: sources, then targets."""
    return adjacency.to_sparse_coo().indices().flip(0)


@deprecated
def test_a_graph_layer_is_recorded(edges):
    layer, x = GraphContraNorm(0.3), random(9, 6)
    first = graphs(edges)[0]
    programs = [
        torch.export.export(layer, (x, first)).module(),
        fx.symbolic_trace(layer),
        torch.jit.trace(layer, (x, first), check_trace=False),
    ]
    for adjacency in graphs(edges):
        for program in programs:
            torch.testing.assert_close(program(x, adjacency), layer(x, adjacency), atol=1e-5, rtol=1e-4)
    assert layer(x.to("meta"), first.to("meta")).is_meta


@pytest.mark.parametrize("add_self_loops", [True, False])
def test_a_graph_layer_with_edge_index_and_batch_compiles_and_exports(edges, add_self_loops):
    torch.compiler.reset()
    layer, x = GraphContraNorm(0.3, add_self_loops=add_self_loops), random(9, 6)
    batch = torch.tensor([0] * 4 + [1] * 5)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    any_number = torch.export.Dim.AUTO
    exported = torch.export.export(
        layer, (x, edge_index(edges(9)), batch), dynamic_shapes=({0: any_number}, {1: any_number}, {0: any_number})
    ).module()
    for adjacency in graphs(edges):
        sources, targets = edge_index(adjacency)
        inside = edge_index(adjacency)[:, batch[sources] == batch[targets]]
        want = layer(x, inside, batch)
        for program in (compiled, exported):
            torch.testing.assert_close(program(x, inside, batch), want, atol=1e-5, rtol=1e-4)


def test_compile_does_not_take_sparse_adjacencies_yet(edges):
    """Once torch.compile takes sparse tensors, the graph layer's belong into the tests above."""
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="does not support sparse Tensors"):
        torch.compile(GraphContraNorm(0.3), fullgraph=True, backend="eager")(random(9, 6), edges(9))
