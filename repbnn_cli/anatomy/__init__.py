"""A network as numbers that can be looked at: its graph in blocks, its tensors, its feature maps on pictures."""

from repbnn_cli.anatomy.blocks import Block, Operation, Shape, blocks

__all__ = [
    "Block",
    "Operation",
    "Shape",
    "blocks",
]
