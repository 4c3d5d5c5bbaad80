"""What inherited weights go through before anything is trained: a fit to the source network, new BatchNorm statistics.

One preparation for `repbnn calibrate`, which writes its outcome, and for `repbnn finetune`, which trains on from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from repbnn_cli.plan import Plan
from repbnn_cli.train import measure, reconstruct
from repbnn_cli.train.feeds import Feed
from repbnn_cli.train.reconstruct import Fitted


@dataclass(frozen=True)
class Preparation:
    """plan: what made the network, None to leave its kernels as they are; fit: steps of Adam per convolution.

    images: training images to fit on, without labels, or as many as memory holds; batches: of training images over
    which BatchNorm statistics are then estimated, 0 for none. on_note, on_unit: hear what happens.
    """

    batches: int
    plan: Plan | None = None
    fit: int = 200
    images: int = 2048
    on_note: Callable[[str], None] | None = None
    on_unit: Callable[[Fitted], None] | None = None

    def key(self) -> dict[str, int]:
        """What the prepared weights depend on, beside network, data and seed."""
        fitted = self.plan is not None
        return {"batches": self.batches, "fit": self.fit if fitted else 0, "images": self.images if fitted else 0}

    def __call__(
        self, network: nn.Module, feed: Feed, after_unit: Callable[[], None] | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """Prepares the network in place; facts for its file. after_unit: is called now and then, and may raise."""
        facts: dict[str, Any] = {}
        if self.plan is not None and self.fit:
            assert isinstance(network, fx.GraphModule), f"{type(network).__name__} was not made by a plan"
            batches = reconstruct.batches_for(self.plan, feed.train.epoch(0), self.images)
            count = sum(map(len, batches))
            if self.on_note is not None:
                steps = f"{self.fit} steps per convolution, {count:,} training images"
                self.on_note(f"fitting to the source network: {steps}")

            def heard(unit: Fitted) -> None:
                if self.on_unit is not None:
                    self.on_unit(unit)
                if after_unit is not None:
                    after_unit()

            self.plan.network.module.to(measure.device_of(network))
            units = reconstruct.reconstruct(self.plan, network, batches, steps=self.fit, on_unit=heard)
            facts = {"fit_steps": self.fit, "fit_images": count, "fit": {u.path: [u.before, u.after] for u in units}}
        if self.batches:
            facts["calibrated_batches"] = measure.calibrate(network, feed.train.epoch(0), self.batches)
        return facts
