"""Share of class-conditional samples that the judge takes for the class that was asked for."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.metrics.judge import Judge
from lightning_modules.pictures import from_bytes, to_bytes


class SampleAccuracy(Metric):
    """Counts the judge's verdicts by class asked for; sums over DDP ranks.

    Args:
        judge: the frozen classifier. It is used but not registered as a submodule: an evaluator
            belongs in no checkpoint and no weight average.

    Example:
        >>> metric = SampleAccuracy(train_judge(datamodule, cache_dir))
        >>> metric.update(samples, labels)
        >>> metric.compute()
        tensor(0.87)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    confusion: Tensor

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self._hidden_judge = (judge,)
        shape = (judge.num_classes, judge.num_classes)
        self.add_state("confusion", torch.zeros(shape, dtype=torch.int64), "sum")
        self._summed = torch.zeros(shape, dtype=torch.int64)

    @property
    def judge(self) -> Judge:
        """The classifier whose verdicts are counted."""
        return self._hidden_judge[0]

    @torch.no_grad()
    def update(self, images: Tensor, labels: Tensor) -> None:
        """Adds samples (B, C, H, W) in [-1, 1], rounded to 8 bits, with labels asked for (B,)."""
        count = len(self.confusion)
        with torch.autocast(images.device.type, enabled=False):
            verdicts = self.judge.to(images.device)(from_bytes(to_bytes(images))).argmax(1)
        cells = torch.bincount(labels * count + verdicts, minlength=count * count)
        self.confusion += cells.view(count, count)  # (asked for, judged)

    def compute(self) -> Tensor:
        """Share in [0, 1] of the samples judged to be of their class, over all ranks."""
        if int(self.confusion.sum()) == 0:
            raise ValueError("0 samples: sample accuracy needs at least 1; update() first")
        self._summed = self.confusion.clone()  # here, and only here, all ranks are summed
        return self.confusion.diagonal().sum() / self.confusion.sum()

    def confusion_matrix(self) -> Tensor:
        """Counts (class asked for, class judged) behind the last ``compute``, all ranks."""
        return self._summed

    def per_class(self) -> Tensor:
        """Accuracy by class (num_classes,) behind the last ``compute``; NaN if no samples."""
        return self._summed.diagonal() / self._summed.sum(1)

    def describe(self, class_names: Sequence[str]) -> str:
        """Lines for a report: total, the judge's own accuracy, and each class with its rival."""
        accuracy = float(self.compute())
        lines = [
            f"sample accuracy {accuracy:.3f} of {int(self._summed.sum()):,} samples (judge: "
            f"{self.judge.accuracy:.3f} on {self.judge.test_images:,} real test images)"
        ]
        width = max(map(len, class_names))
        for label, name in enumerate(class_names):
            row = self._summed[label].clone()
            share = float(self.per_class()[label])
            row[label] = 0
            rival = class_names[int(row.argmax())]
            tail = f", most mistaken for {rival} ({int(row.max())})" if row.any() else ""
            lines.append(f"  {name:<{width}} {share:.3f}{tail}")
        return "\n".join(lines)
