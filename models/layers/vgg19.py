"""VGG19 features for perceptual losses, in the units of the original network: pixels 0 to 255.

VGG19 (Simonyan and Zisserman, 2015, arXiv 1409.1556) up to its fourteenth convolution, with
average instead of max pooling, as in the perceptual loss of CLiFT (arXiv 2507.08776) and of its
predecessors. Nothing is downloaded: the weights come from a file the user names.

Example:
    >>> features = Vgg19Features(Path("imagenet-vgg-verydeep-19.mat"))
    >>> [f.shape[1] for f in features(torch.zeros(1, 3, 64, 64))]
    [64, 128, 256, 512, 512]
"""

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

MATCONVNET_FILE = "imagenet-vgg-verydeep-19.mat"
TORCHVISION_FILE = "vgg19-dcbb9e9d.pth"

# torchvision's numbering of the feature layers: convolution -> (channels in, channels out).
_CONVOLUTIONS = {
    0: (3, 64),
    2: (64, 64),
    5: (64, 128),
    7: (128, 128),
    10: (128, 256),
    12: (256, 256),
    14: (256, 256),
    16: (256, 256),
    19: (256, 512),
    21: (512, 512),
    23: (512, 512),
    25: (512, 512),
    28: (512, 512),
    30: (512, 512),
}
_POOLS = (4, 9, 18, 27)
# Where the network is tapped: features are the outputs just before these layers.
_SPLITS = (4, 9, 14, 23, 32)
# torchvision's networks see (pixel / 255 - mean) / deviation; these are the deviations.
_DEVIATION = (0.229, 0.224, 0.225)


class Vgg19Features(nn.Module):
    """Frozen features at five depths: images (B, 3, H, W) -> five maps, strides 1, 2, 4, 8, 16.

    The images are RGB in 0..255 minus the mean colour of ImageNet. The module stays in evaluation
    mode; its weights take no gradient, but the images do.

    Args:
        weights: MatConvNet's ``imagenet-vgg-verydeep-19.mat`` or torchvision's VGG19 state dict
            (``vgg19-dcbb9e9d.pth``).

    Raises:
        FileNotFoundError: there is no such file; the message says which one to get.
        ValueError: the file is not VGG19.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        state = read_vgg19(weights)
        # On the meta device construction draws no random numbers, so the caller's stay untouched.
        with torch.device("meta"):
            self.features = nn.Sequential(*(_layer(index) for index in range(_SPLITS[-1])))
        self.load_state_dict(state, assign=True)
        self.eval()
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Ignores ``mode``: the network is fixed."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps images (B, 3, H, W), H and W >= 16, to maps (B, 64..512, H / stride, W / stride)."""
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < 16:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: must be (B, 3, H, W), at least 16 x 16"
            )
        maps, x = [], images
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index + 1 in _SPLITS:
                maps.append(x)
        return maps


def _layer(index: int) -> nn.Module:
    if index in _POOLS:
        return nn.AvgPool2d(2)
    if index in _CONVOLUTIONS:
        return nn.Conv2d(*_CONVOLUTIONS[index], 3, padding=1)
    return nn.ReLU()


def read_vgg19(path: Path) -> dict[str, Tensor]:
    """Reads the convolutions of VGG19, weights only, for pixels from 0 to 255.

    MatConvNet's network is the original one and takes such pixels as they are. torchvision's was
    trained on pixels divided by a deviation; its weights are expressed in the other unit here
    (first convolution and all biases scaled), which multiplies every feature by the mean deviation
    255 x 0.226 and changes nothing else, so that the terms of a loss keep their proportions.

    Args:
        path: the file; ``.mat`` is MatConvNet's, anything else a torch state dict.

    Returns:
        Tensors by torchvision's keys ``features.<index>.weight`` (out, in, 3, 3) and ``.bias``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read or its sizes are not VGG19's.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; get {MATCONVNET_FILE} (www.vlfeat.org/matconvnet/pretrained) "
            f"or torchvision's {TORCHVISION_FILE} (download.pytorch.org/models) and put it there"
        )
    try:
        matlab = path.suffix == ".mat"
        state = _read_matconvnet(path) if matlab else _from_torchvision(_read_torch(path))
    except Exception as error:
        raise ValueError(
            f"{path}: not readable as VGG19 weights; expected {MATCONVNET_FILE} or "
            f"{TORCHVISION_FILE}"
        ) from error
    for index, (inputs, outputs) in _CONVOLUTIONS.items():
        shapes = {"weight": (outputs, inputs, 3, 3), "bias": (outputs,)}
        for leaf, shape in shapes.items():
            found = tuple(state[f"features.{index}.{leaf}"].shape)
            if found != shape:
                raise ValueError(
                    f"{path}: features.{index}.{leaf} has shape {found}, VGG19 needs {shape}; "
                    f"expected {MATCONVNET_FILE} or {TORCHVISION_FILE}"
                )
    return state


def _read_torch(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    keys = [f"features.{index}.{leaf}" for index in _CONVOLUTIONS for leaf in ("weight", "bias")]
    return {key: state[key].float() for key in keys}


def _from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Expresses weights for normalised pixels as weights for pixels from 0 to 255."""
    mean_deviation = sum(_DEVIATION) / 3
    scaled = {k: v * (255 * mean_deviation) if k.endswith("bias") else v for k, v in state.items()}
    ratio = mean_deviation / torch.tensor(_DEVIATION)
    scaled["features.0.weight"] = state["features.0.weight"] * ratio.view(3, 1, 1)
    return scaled


def _read_matconvnet(path: Path) -> dict[str, Tensor]:
    from scipy.io import loadmat

    layers = loadmat(path, variable_names=["layers"])["layers"].ravel()
    state = {}
    for index in _CONVOLUTIONS:  # MatConvNet has the same layers in the same order
        layer = layers[index].ravel()[0]
        weight, bias = _layer_weights(layer)
        filters = torch.from_numpy(np.array(weight, np.float32))  # (h, w, in, out)
        state[f"features.{index}.weight"] = filters.permute(3, 2, 0, 1).contiguous()
        state[f"features.{index}.bias"] = torch.from_numpy(np.array(bias, np.float32).ravel())
    return state


def _layer_weights(layer: Any) -> tuple[Any, Any]:  # noqa: ANN401 - numpy record of any fields
    """Filters and biases of a layer; releases before 2015 kept them in two fields."""
    if "weights" in layer.dtype.names:
        weights = layer["weights"].ravel()
        return weights[0], weights[1]
    return layer["filters"], layer["biases"]
