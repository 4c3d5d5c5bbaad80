"""What a recipe file may say: its keys, their values and defaults, as pydantic models.

The models hold one file as it was written. `Settings` stand at the top, for every stage, and in a stage, for it alone;
what has to be there and what goes together is checked by `recipes`, once both are put together.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from repbnn_cli.train.schedules import BinarizationName, LearningRateName

_ABSENT: Any = None  # default of a key that may stand in the other place; null itself is not a value
_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")

Augmentation = Literal["none", "cifar", "imagenet", "imagenet-lighting", "imagenet-jitter"]
DataName = Literal["cifar10", "cifar100", "digits", "folder", "imagenet"]


def _number(value: object) -> object:
    """YAML 1.1 takes 1e-4, which has no dot, for text; here it is the number that it looks like."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _finite(value: float) -> float:
    if not -1e30 < value < 1e30:
        raise ValueError("expected a finite number")
    return value


def _positive(value: float) -> float:
    if value <= 0:
        raise ValueError("expected a number above 0")
    return value


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected one line of printable text")
    return text


def _as_tuple(value: object) -> object:
    return value if isinstance(value, tuple) else (value,)


def _version(value: object) -> object:
    if type(value) is not int or value != 1:  # pydantic takes true and 1.0 for the literal 1
        raise ValueError("expected 1, the only version of this language")
    return value


Number = Annotated[float, BeforeValidator(_number), AfterValidator(_finite)]
Positive = Annotated[Number, AfterValidator(_positive)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Percent = Annotated[Number, Field(ge=0, le=100)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Text = Annotated[str, Field(min_length=1, max_length=300), AfterValidator(_one_line)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9_-]+$", max_length=100)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WeightDecay(_Model):
    """L2 decay by role."""

    kernels: NotNegative = Field(0.0, description="Kernels of convolutions, binary and float.")
    others: NotNegative = Field(0.0, description="All other parameters.")


class Optimizer(_Model):
    """SGD with momentum, or Adam. Both add weight decay to the gradient, as the published codes do."""

    name: Literal["sgd", "adam"] = Field(_ABSENT, description="Required.")
    lr: Positive = Field(_ABSENT, description="Required: the highest learning rate of the stage.")
    momentum: Share = Field(0.9, description="SGD only.")
    nesterov: bool = Field(False, description="SGD only.")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="Adam only.")
    weight_decay: WeightDecay = Field(WeightDecay.model_validate({}))


class Schedule(_Model):
    """The learning rate over a stage. Positions are epochs, or iterations where the stage's length is in iterations."""

    name: LearningRateName = Field(_ABSENT, description="Required.")
    warmup: NotNegative = Field(0.0, description="So many epochs (iterations) of a rate that rises linearly.")
    milestones: tuple[Positive, ...] = Field((), description="step only: where the rate is multiplied by factor.")
    factor: Positive = Field(0.1, description="step only.")


class Distillation(_Model):
    """Loss (1 − weight)·cross-entropy + weight·T²·KL(teacher ‖ student), over logits divided by T."""

    weight: Share = Field(0.0, description="0: no teacher; 1: the teacher alone.")
    temperature: Positive = Field(1.0, description="T.")
    teacher: Text = Field("the source network", description="Which network the recipe was published with.")


class Gates(_Model):
    """Regulariser of FracBNN's precision gates: weight·‖threshold − target‖² for each gated convolution."""

    weight: NotNegative = Field(0.0)
    target: Number = Field(0.0)


class Published(_Model):
    """Top-1 in percent that a paper states for a network after this stage."""

    table: Text = Field(description="Where it stands.")
    raw: Percent = Field(_ABSENT, description="The source network.")
    rep: Percent = Field(_ABSENT, description="Its RepBNN, β = 2, last layer way 1.")


class Settings(_Model):
    """What may differ between stages."""

    epochs: Count = Field(_ABSENT, description="Length; this or iterations is required.")
    iterations: Count = Field(_ABSENT, description="Length in optimiser steps.")
    kernels: Literal["binary", "float"] = Field(
        "binary", description="float: convolutions use their latent kernels (step 1 of two-step training)."
    )
    optimizer: Optimizer = Field(Optimizer.model_validate({}))
    schedule: Schedule = Field(Schedule.model_validate({}))
    label_smoothing: Annotated[Share, Field(lt=1)] = Field(0.0)
    distillation: Distillation = Field(Distillation.model_validate({}))
    gates: Gates = Field(Gates.model_validate({}))
    ema: Annotated[Share, Field(lt=1)] = Field(
        0.0,
        description="Decay of an exponential moving average of the weights, which is then what is evaluated; 0: none.",
    )
    accumulate: Count = Field(1, description="Parts that a batch is computed in; BatchNorm sees one part at a time.")
    hands_over: Text = Field("", description="What the next stage takes over, and what it starts anew.")
    published: dict[Name, Published] = Field({}, description="Network of the zoo → accuracy after this stage.")


class RecipeFile(Settings):
    """One recipe file as it is written."""

    schema_: Annotated[Literal[1], BeforeValidator(_version)] = Field(
        1, alias="schema", description="Version of this language."
    )
    name: Name = Field(_ABSENT, description="Default: the file's name without its ending.")
    summary: Annotated[str, Field(max_length=300), AfterValidator(_one_line)] = Field("", description="One line.")
    method: Text = Field(_ABSENT, description="Whose recipe it is.")
    data: Annotated[tuple[DataName, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = Field(
        _ABSENT, description="Required: the data sets it is for."
    )
    networks: tuple[Name, ...] = Field((), description="Networks of the zoo whose default recipe it is.")
    augmentation: Augmentation = Field("none", description="What happens to training images.")
    mean: tuple[Number, Number, Number] = Field((0.0, 0.0, 0.0), description="Subtracted from images in [0, 1].")
    std: tuple[Positive, Positive, Positive] = Field((1.0, 1.0, 1.0), description="They are then divided by it.")
    batch: Count = Field(_ABSENT, description="Required: images per optimiser step.")
    binarization: BinarizationName = Field("none", description="The method's own schedule.")
    stages: dict[Name, Settings] = Field({}, description="Name → settings, in their order; none: one stage, `train`.")
