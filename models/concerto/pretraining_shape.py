"""Sizes of Concerto's pre-training (arXiv 2510.23607)."""

from dataclasses import dataclass, field

from models.concerto.encoder import EncoderShape


@dataclass(frozen=True)
class PretrainingShape:
    """Sizes of encoder and heads; the defaults are the paper's base model.

    Attributes:
        encoder: Of student and teacher.
        hidden: Hidden width of the clustering heads.
        embed: Channels in which they compare points and prototypes.
        prototypes: Their number.
        cluster_level: Levels above the coarsest at which points are clustered.
        cross_level: Levels above the coarsest whose points predict patches.
        image_channels: Channels D of a patch's feature.
        patch_grid: Rows and columns of patches of an image.
        match_radius: Points of two views match below this distance, in metres.
        mask_jitter: Deviation by which masked points are moved, in metres.
        student_temperature: Divides the student's similarities.
    """

    encoder: EncoderShape = field(default_factory=EncoderShape)
    hidden: int = 4096
    embed: int = 256
    prototypes: int = 4096
    cluster_level: int = 2
    cross_level: int = 3
    image_channels: int = 1536
    patch_grid: tuple[int, int] = (37, 37)
    match_radius: float = 0.32
    mask_jitter: float = 0.01
    student_temperature: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.encoder, dict):  # as a checkpoint keeps it
            object.__setattr__(self, "encoder", EncoderShape(**self.encoder))
        rows, columns = self.patch_grid
        object.__setattr__(self, "patch_grid", (rows, columns))
        for name in ("hidden", "embed", "prototypes", "image_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be >= 1")
        if min(self.patch_grid) < 1:
            raise ValueError(f"patch_grid={self.patch_grid}: must be rows and columns >= 1")
        for name in ("cluster_level", "cross_level"):
            if not 0 <= getattr(self, name) < self.encoder.levels:
                raise ValueError(
                    f"{name}={getattr(self, name)}: must be in [0, {self.encoder.levels - 1}], "
                    "the levels above the coarsest"
                )
        for name in ("match_radius", "student_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be > 0")
