"""What each module of a captured network is: its role, its kernel, its tensors sized by channel.

Order of authority: a declaration in a rule file (`declared`), then our own and torch's types (`roles`), then what the
module does on its input (`tried`, with `trials` and `sides`). Every verdict carries its evidence. What cannot be told
is `unknown` with the reason; it is refused only where it would have to handle an expanded tensor.
"""

from repbnn_cli.recognize.layer import CONVOLUTIONS, Layer, type_names
from repbnn_cli.recognize.roles import recognize

__all__ = [
    "CONVOLUTIONS",
    "Layer",
    "recognize",
    "type_names",
]
