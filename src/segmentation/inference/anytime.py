"""One ONNX file of a UNet++ that computes no more than the level which its caller chooses."""

import onnx
from onnx import helper


def join_levels(models: list[onnx.ModelProto]) -> onnx.ModelProto:
    """Join the files of level 1, 2, ..., which have the same input and outputs, to one with a second input, `level`:
    int64 without a dimension. A level above the last is the last.

    onnxruntime computes a whole graph, whichever outputs are asked for, but only one branch of an If. The levels are
    therefore branches, each with its own copy of the weights: those of level L are about a quarter of level L + 1's.
    """
    joined = models[-1]
    branch = as_branch(joined, len(models))
    for level in reversed(range(1, len(models))):
        ending = f"_from_{level}" if level > 1 else ""
        outputs = [helper.make_value_info(output.name + ending, output.type) for output in joined.graph.output]
        choice = helper.make_node(
            "If",
            [f"is_{level}"],
            [output.name for output in outputs],
            then_branch=as_branch(models[level - 1], level),
            else_branch=branch,
        )
        nodes = [
            helper.make_node("Constant", [], [f"number_{level}"], value_int=level),
            helper.make_node("LessOrEqual", ["level", f"number_{level}"], [f"is_{level}"]),
            choice,
        ]
        branch = helper.make_graph(nodes, f"from_{level}", [], outputs)
    chosen = helper.make_tensor_value_info("level", onnx.TensorProto.INT64, [])
    branch.input.extend([*joined.graph.input, chosen])
    joined.graph.CopyFrom(branch)
    return joined


def as_branch(model: onnx.ModelProto, level: int) -> onnx.GraphProto:
    """The graph with names of its own; it takes its input from the graph around it."""
    prefix = f"L{level}_"
    graph = onnx.compose.add_prefix(model, prefix).graph
    graph.ClearField("input")
    image = helper.make_node("Identity", ["image"], [f"{prefix}image"])
    graph.node.insert(0, image)
    return graph
