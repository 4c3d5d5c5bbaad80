"""Capture of networks as torch.fx graphs: `graph.capture(model, input_shape)`.

In the order of a capture: `capturing` (what is one layer, both modes), `tracing` (one trace), `tracer` and `proxies`
(fx with the values of an example), `interception`, `probe`, `products`, `functional` (what fx does not see), `static`.
"""

from repbnn_cli.graph.capturing import (
    KeptGraphModule,
    Network,
    assemble,
    bare,
    capture,
    copied_graph,
    kernel_like,
    random_inputs,
)

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
