"""The certificate of a transform: `verify.verify`.

`lockstep` runs source and Rep network side by side, node by node; `stand_ins` makes what the source gets.
"""

from repbnn_cli.verify.certificate import Certificate, Check, verify

__all__ = [
    "Certificate",
    "Check",
    "verify",
]
