"""Capture of networks as torch.fx graphs: `graph.capture(model, input_shape)`.

In the order of a capture: `capturing`, `recording` (what is one layer), `tracing` (one trace, both modes), `tracer` and
`proxies` (fx with the values of an example), `interception`, `probe`, `products`, `functional` (what fx does not see),
`kept` (what runs in the end), `static`.
"""

from repbnn_cli.graph.capturing import Network, assemble, capture, random_inputs
from repbnn_cli.graph.kept import KeptGraphModule, bare, copied_graph
from repbnn_cli.graph.recording import kernel_like

__all__ = [
    "KeptGraphModule",
    "Network",
    "assemble",
    "bare",
    "capture",
    "copied_graph",
    "kernel_like",
    "random_inputs",
]
