"""Inception-v3 features as in the published FID numbers, through torch-fidelity.

The network is that of Heusel et al. (2017, arXiv 1706.08500) with the weights of 2015-12-05;
torch-fidelity resizes like TensorFlow 1, as the published evaluators do. Nothing is downloaded.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from models.layers.checkpoint import check_sha256

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"


class InceptionFeatures(nn.Module):
    """Frozen Inception-v3 pool features: images (B, 1 or 3, H, W) in [-1, 1] -> (B, 2048).

    Args:
        weights_path: a copy of ``pt_inception-2015-12-05-6726825d.pth`` (torch-fidelity calls
            the same file ``weights-inception-2015-12-05-6726825d.pth``).

    Raises:
        FileNotFoundError: the file is not there, or torch-fidelity is not installed.
        ValueError: the file is not the published one.
    """

    feature_dim = 2048
    name = "inception"

    def __init__(self, weights_path: Path) -> None:
        super().__init__()
        if not weights_path.is_file():
            raise FileNotFoundError(
                f"{weights_path}: no such file; copy {INCEPTION_FILE} from torch-fidelity's or "
                "pytorch-fid's releases there"
            )
        if find_spec("torch_fidelity") is None:
            raise FileNotFoundError(
                "package torch-fidelity is not installed: run `pip install torch-fidelity`"
            )
        # torch-fidelity unpickles the file without restrictions: read nothing but the known one.
        check_sha256(weights_path, "6726825d")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.network: nn.Module = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights_path)
        )
        self.eval()
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Ignores ``mode``: an evaluator whose batch norm adapts is no fixed measure."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Maps images (B, 1 or 3, H, W) in [-1, 1] to pooled features (B, 2048)."""
        levels = images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        features: Tensor = self.network(levels.expand(-1, 3, -1, -1))[0]
        return features
