"""A rule for the compiler: linear layers that read the same x become one product in training (chapter 9).

A model says what it computes, layer by layer: queries, keys, values and the scores of a gate are four products of one
x. Before `torch.compile` writes code it can be told a better order. One product with the four matrices stacked reads x
once, and in the backward pass writes the gradient of x once, where four would be written and added up. Stacking itself
is nearly free: the matrices are copied anyhow as autocast rounds them, and that copy goes to the right place.

    step = torch.compile(model, backend=stacked)
"""

import inspect
import operator
import re
from collections.abc import Callable

import torch
from torch import fx

# Names of what changes the mode, or writes to a tensor: `add_`, `x += y`, `x[i] = y`.
BARRIERS = r"_enter_\w+|_exit_\w+|_set_grad_enabled|setitem|i(add|sub|mul|truediv|floordiv|mod|pow|matmul)|\w*[^\W_]_"
ROWS = 8  # of bfloat16 are 16 bytes: a token's results start at a multiple of that, as matrix units want them


def stacked(graph: fx.GraphModule, inputs: list, compiler: str = "inductor") -> Callable:
    """A backend of `torch.compile`: the rule where gradients are asked for and matrices rounded, then `compiler`.

    Elsewhere they are read where they lie: a single token would pay for stacking them at every step, and two processor
    cores in float32 lose two percent.
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
            groups = [group for group in _groups(module.graph) if not rounded or _rounds(group[0])]
            for group in groups:
                _stack(module.graph, group)
            module.recompile()
            made += len(groups)
    return made


def _groups(graph: fx.Graph) -> list[list[fx.Node]]:
    """The products without bias that read one x, two and more of them, with no barrier between."""
    groups, passed = {}, 0
    for node in graph.nodes:
        passed += _barrier(node)
        if node.target is torch._C._nn.linear and len(node.args) == 3 and node.args[2] is None:
            x, weight, _ = node.args
            if weight.op in ("placeholder", "get_attr"):  # so it is there before the first of them
                groups.setdefault((passed, x, weight.meta["example_value"].dtype), []).append(node)
    return [group for group in groups.values() if len(group) > 1]


def _rounds(node: fx.Node) -> bool:
    return node.meta["example_value"].dtype != node.args[1].meta["example_value"].dtype


def _barrier(node: fx.Node) -> bool:
    """Whether a product means something else after this: another mode, or something written to, x perhaps."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # methods, and functions that do not say what they take
        given = node.kwargs
    writes = given.get("inplace") or given.get("out") is not None
    return bool(writes or re.fullmatch(BARRIERS, name))


def _stack(graph: fx.Graph, group: list[fx.Node]) -> None:
    x, weights = group[0].args[0], [node.args[1] for node in group]
    sizes = [weight.meta["example_value"].shape[0] for weight in weights]
    with graph.inserting_before(group[0]):
        if missing := -sum(sizes) % ROWS:
            columns = weights[0].meta["example_value"].shape[1]
            weights.append(graph.call_method("new_zeros", (weights[0], (missing, columns))))
            sizes.append(missing)
        product = graph.call_function(torch._C._nn.linear, (x, graph.call_function(torch.cat, (weights,)), None))
        parts = graph.call_method("split", (product, sizes, -1))
        made = [graph.call_function(operator.getitem, (parts, i)) for i in range(len(group))]
    for old, new in zip(group, made):
        new.meta.update(old.meta)
        old.replace_all_uses_with(new)
        graph.erase_node(old)
