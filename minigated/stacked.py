"""A rule for the compiler: linear layers that read the same x become one product in training (chapter 9).

A model says what it computes, layer by layer: queries, keys, values and the scores of a gate are four products of one
x. `torch.compile` can be told to group them before it writes code. One product with the four matrices stacked reads
x once, and in the backward pass writes the gradient of x once, where four would be written and added up. Stacking is
free where autocast rounds the matrices to bfloat16: they are copied anyhow, and the copies go side by side.

    step = torch.compile(model, backend=stacked)
"""

import operator
import re
from collections.abc import Callable

import torch
from torch import Tensor, fx

# Names of what changes the mode that products are in, and of writing to a tensor: `add_`.
BARRIERS = r"_enter_\w+|_exit_\w+|_set_grad_enabled|\w+_nesting|\w*[^\W_]_"
ROWS = 8  # of bfloat16 are 16 bytes: the results of every token start at a multiple of that, as matrix units want


def stacked(graph: fx.GraphModule, inputs: list, compiler: str = "inductor") -> Callable:
    """A backend of `torch.compile`: the rule where gradients are asked for and autocast rounds, then `compiler`.

    Elsewhere matrices are read where they lie, as stacking would copy them at every step. A layer's results are then
    part of a longer row: code that asks for them in one piece, say `view(batch, -1)` where `flatten(1)` would do,
    stops with PyTorch's error. There is no `mode` and there are no `options`.
    """
    from torch._dynamo import lookup_backend  # not at import: it takes a second

    if torch.is_grad_enabled():
        stack_products(graph, rounded=True)
    return lookup_backend(compiler)(graph, inputs)


def stack_products(graph: fx.GraphModule, rounded: bool = False) -> int:
    """Applies the rule to what Dynamo traced, in place, checkpointed parts too; returns how many products it made.

    Args:
        rounded: only where a product is in another precision than its matrices.
    """
    made = 0
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            groups = _groups(module.graph, rounded)
            for group in groups:
                _stack(module.graph, group)
            module.recompile()
            made += len(groups)
    return made


def _traced(node: fx.Node) -> Tensor:
    """What Dynamo knows of a node's tensor: all but its numbers."""
    return node.meta.get("example_value")


def _groups(graph: fx.Graph, rounded: bool) -> list[list[fx.Node]]:
    """Linear layers without bias that read one x, two and more of them, with no barrier between."""
    groups, passed, asked = {}, 0, _asked(graph)
    for node in graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        passed += bool(re.fullmatch(BARRIERS, name))
        if node.target is torch._C._nn.linear and node in asked and _fits(node):
            x, weight = _reads(node)[:2]
            matrix = _traced(weight)
            if not rounded or _traced(node).dtype != matrix.dtype:
                groups.setdefault((passed, x, matrix.dtype, matrix.requires_grad), []).append(node)
    return [group for group in groups.values() if len(group) > 1]


def _asked(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output is worked out from, as far as gradients come.

    A layer whose result nobody uses, or only detached, has no gradient, and an optimizer leaves its matrix alone. As
    part of a product it would get zeros, and weight decay would move it.
    """
    asked = set()
    for node in reversed(graph.nodes):
        made = _traced(node)
        cut = isinstance(made, Tensor) and not made.requires_grad
        if node.op == "output" or (node in asked and not cut):
            asked.update(node.all_input_nodes)
    return asked


def _reads(node: fx.Node) -> list:
    """x, weight and bias of a linear layer, however they were given."""
    given = dict(zip(("input", "weight", "bias"), node.args)) | node.kwargs
    return [given.get(name) for name in ("input", "weight", "bias")]


def _fits(node: fx.Node) -> bool:
    """Whether a layer may join: its weight is a matrix of known size and nobody writes to what it reads or makes."""
    x, weight, bias = _reads(node)
    if bias is not None or weight.op != "placeholder":  # a matrix made on the way comes too late
        return False
    seen = [_traced(part) for part in (x, weight, node)]
    if not all(isinstance(part, Tensor) and part._version == 0 for part in seen):
        return False
    return seen[1].ndim == 2 and all(type(size) is int for size in seen[1].shape)


def _stack(graph: fx.Graph, group: list[fx.Node]) -> None:
    x, matrices = _reads(group[0])[0], [_reads(node)[1] for node in group]
    sizes, columns = [_traced(matrix).shape[0] for matrix in matrices], _traced(matrices[0]).shape[1]
    with graph.inserting_before(group[0]):
        # Rounded before they are stacked, so that each is written once, and to its place.
        rounded = [graph.call_method("to", (matrix, _traced(group[0]).dtype)) for matrix in matrices]
        if missing := -sum(sizes) % ROWS:
            rounded.append(graph.call_method("new_zeros", (rounded[0], (missing, columns))))
            sizes.append(missing)
        product = graph.call_function(torch._C._nn.linear, (x, graph.call_function(torch.cat, (rounded,)), None))
        parts = graph.call_method("split", (product, sizes, -1))
        made = [graph.call_function(operator.getitem, (parts, i)) for i in range(len(group))]
    for old, new in zip(group, made):
        old.replace_all_uses_with(new)
        graph.erase_node(old)
