"""Feature maps in a report: the picture's pixels are the activations that hooks see in both networks."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import images, planned, randomize
from PIL import Image

from repbnn_cli import graph, surgery, zoo
from repbnn_cli.anatomy import image_files, tensor_stats
from repbnn_cli.commands.report import _Inputs
from repbnn_cli.errors import DataError
from repbnn_cli.recognize import recognize
from repbnn_cli.report.montage import montage


@pytest.mark.parametrize("beta", [2, 4])
def test_the_montage_shows_what_a_hook_sees(beta: int) -> None:
    torch.manual_seed(0)
    source = randomize(zoo.build("irnet_resnet20"))
    plan = planned(source, (3, 32, 32), beta=beta)
    rep = surgery.apply(plan).eval()
    batch = images(2, 32)
    shown = tensor_stats.feature_maps(plan, rep, batch, "layer2.0.conv1", channels=5)
    before, after = (seen_at(module, "layer2.0.bn1", batch) for module in (source, rep))
    assert after.shape[1] == beta * before.shape[1]
    for n, maps in enumerate(shown):
        picture = montage(maps, n, len(shown))
        pixels = np.asarray(Image.open(io.BytesIO(picture.png)))
        assert pixels.shape == (picture.height, picture.width, 3)
        for c in range(5):
            column = [before[n, c], *(after[n, j] for j in range(c, after.shape[1], before.shape[1]))]
            assert len(column) == 1 + beta
            for row, tensor in enumerate(column):
                panel = pixels[6 + 78 * row : 78 + 78 * row, 84 + 78 * c : 156 + 78 * c]
                assert np.ptp(panel, axis=2).max() == 0
                centres = [math.floor((i + 0.5) * 72 / len(tensor)) for i in range(len(tensor))]
                assert np.abs(panel[np.ix_(centres, centres)][..., 0] - greys(tensor)).max() <= 1, (n, c, row)
                assert set(panel.ravel()) == set(panel[np.ix_(centres, centres)].ravel())
    assert f"its {beta} copies" in picture.description


def seen_at(module: torch.nn.Module, path: str, batch: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = module.get_submodule(path).register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        module(batch)
    hook.remove()
    return seen[0]


def greys(values: torch.Tensor) -> np.ndarray:
    """0 is the smallest value, 255 the largest."""
    found = values.double().numpy()
    return 255 * (found - found.min()) / (found.max() - found.min())


class LastAxis(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.sign(), self.weight.sign(), self.bias)


def test_channels_of_tokens_are_the_last_axis() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), LastAxis(16, 16), torch.nn.Linear(16, 10)).eval()
    torch.nn.init.zeros_(model[0].weight)
    with torch.no_grad():
        model[0].bias.copy_(torch.linspace(-1, 1, 16))
    network = graph.capture(model, (5, 6))
    (found,) = tensor_stats.activations(network.module, recognize(network), torch.randn(8, 5, 6))
    assert (found.constant, found.channels) == (16, 16)


def test_grey_images_of_16_bits_are_scaled_not_cut_off(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    (made,) = image_files.load([tmp_path / "ramp.png"], (1, 8, 8), (0.0,), (1.0,))
    np.testing.assert_allclose(made[0].numpy(), ramp / 65535, atol=1 / 255)


def test_an_image_as_large_as_a_bomb_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    with pytest.raises(DataError, match=r"large\.png: cannot be decoded as an image"):
        image_files.load([tmp_path / "large.png"], (1, 8, 8), (0.0,), (1.0,))


def test_a_grey_image_is_grey_in_the_montage_whatever_the_recipe_s_mean() -> None:
    image = torch.linspace(0, 1, 64).view(1, 8, 8).expand(3, 8, 8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    given = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    shown = _Inputs((given.unsqueeze(0),), given.unsqueeze(0), "", mean, std).as_seen(given)
    torch.testing.assert_close(shown, image)
    maps = tensor_stats.FeatureMaps("conv", shown, {0: image[0]}, {0: (image[0],)})
    picture = np.asarray(Image.open(io.BytesIO(montage(maps, 0, 1).png)))
    assert (picture[..., 0] == picture[..., 1]).all()
    assert (picture[..., 0] == picture[..., 2]).all()
