"""Layers and formulas compiled for the machine (torch.compile), matrix products among them.

What follows one another becomes one pass over memory. On a CPU torch leaves float32 products to
MKL, whose kernels keep an AMD core four fifths busy, where oneDNN's keep it nine tenths (71 to 99
against 95 to 110 of 117 GFLOP/s, a Zen 4 core and layers of 256 x 704). So a compiled graph has
oneDNN make them, but for the gradients of weights: it would turn both factors round first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from distrl.models import attention
from distrl.models.sharding import layers

VARIANTS = 64
"""Ways in which one function may be compiled before torch leaves it uncompiled. There are few, with
gradients and without, of weights that are trained and not; but each of a crew's threads that comes
to a new one makes it for itself."""

Function = TypeVar("Function", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("distrl", "DEF")
_LIBRARY.define("product(Tensor x, Tensor weight) -> Tensor")


@functools.partial(_LIBRARY.impl, "product", dispatch_key="CPU")
def _product(x_NK: Tensor, weight_MK: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x_NK, weight_MK, None, "none", [], "")


@torch.library.register_fake("distrl::product", lib=_LIBRARY)
def _(x_NK: Tensor, weight_MK: Tensor) -> Tensor:
    return x_NK.new_empty(x_NK.shape[0], weight_MK.shape[0])


def compile_layers(module: nn.Module, device: torch.device) -> None:
    """Have each layer compiled when it is first run, on `device`. It takes some seconds for each
    kind of pass, once on a machine."""
    if device.type == "cpu":
        attention.build()
    for layer in layers(module):
        layer.compile(**_settings())


def compiled(function: Function) -> Function:
    """`function`, compiled when it is first called."""
    return torch.compile(function, **_settings())  # pyright: ignore[reportReturnType]


def _settings() -> dict[str, Any]:
    """A batch's sizes stay open. Other whole numbers, a head's width among them, are constants (of
    all that torch compiles in this process from now on): a GPU would spend ten times a rotary
    embedding's time on finding its places."""
    torch._dynamo.config.specialize_int = True
    return {"dynamic": True, "backend": _backend(), "recompile_limit": VARIANTS}


@functools.cache
def _backend() -> Callable[..., Any]:
    """One for all: another object would count as another backend, and all be compiled again."""
    import torch._functorch.config as functorch_config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class ByOneDNN(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            products_by_onednn(graph)

        def uuid(self) -> bytes:
            return get_hash_for_files((__file__,))

    patches = {}
    if torch.backends.mkldnn.is_available():
        patches["post_grad_custom_post_pass"] = ByOneDNN()

    def compile_graph(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        with functorch_config.patch(ban_recompute_materialized_backward=not _made_anew(inputs)):
            return compile_fx(graph, inputs, config_patches=patches)

    return compile_graph


def _made_anew(inputs: Sequence[Any]) -> bool:
    """Whether what follows from what is kept anyway, as SwiGLU's product does, is made anew on the
    way back and not kept too: on a GPU. It is a third of what a pass keeps; making it takes half a
    hundredth of a GPU's time (it waits for memory), and up to three hundredths of a CPU's."""
    return any(isinstance(each, Tensor) and each.is_cuda for each in inputs)


def products_by_onednn(graph: fx.Graph) -> None:
    """Replace the float32 products of `graph` that are made on a CPU, x @ wᵀ by `product(x, w)`;
    weights' gradients, gᵀ @ x, stay."""
    permute = torch.ops.aten.permute.default

    def turned(factor: Any) -> bool:
        return factor.target is permute and list(factor.args[1]) == [1, 0]

    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
        left, right = node.args
        found = node.meta["val"]
        if turned(left) or found.device.type != "cpu" or found.dtype != torch.float32:
            continue
        with graph.inserting_before(node):
            if turned(right):
                weight = right.args[0]
            else:
                weight = graph.call_function(permute, (right, [1, 0]))
                weight.meta["val"] = right.meta["val"].permute(1, 0)
            product = graph.call_function(torch.ops.distrl.product.default, (left, weight))
        product.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
