"""Scales the latent kernels of a result's binary convolutions; the network goes on computing what it computed.

    repbnn calibrate rep.repbnn.pt --data cifar10:DIR -o fitted.repbnn.pt
    python benchmarks/latent_scale.py fitted.repbnn.pt --by 0.5 -o halved.repbnn.pt
    repbnn finetune halved.repbnn.pt --data cifar10:DIR --calibrate 0

Where a layer's output depends on the signs of its kernel alone (IR-Net, ReCU), the size of the latent weights decides
only how soon training flips one. What it is worth: docs/inheritance.md.
"""

from __future__ import annotations

import argparse

import torch

import repbnn_cli
from repbnn_cli import writing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result")
    parser.add_argument("--by", type=float, default=0.5)
    parser.add_argument("-o", "--output", required=True)
    given = parser.parse_args()
    payload = torch.load(given.result, weights_only=True)
    binary = [row for row in payload["plan"] if row["role"] == "binary_conv" and row["action"] == "rep_conv"]
    for row in binary:
        kernel = row["tensors"][0].partition(":")[0]
        payload["tensors"][f"{row['path']}.{kernel}"] *= given.by
    writing.save(payload, given.output)
    torch.manual_seed(0)
    images = [torch.randn(64, *shape) for shape in payload["source"]["input_shape"]]
    with torch.no_grad():
        before, after = (repbnn_cli.load(path)(*images) for path in (given.result, given.output))
    difference, size = float((after - before).abs().max()), float(before.abs().max())
    print(f"{len(binary)} latent kernels × {given.by:g}; logits: max |Δ| = {difference:.1g} of {size:.1f}")


if __name__ == "__main__":
    main()
