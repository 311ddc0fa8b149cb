"""A run stopped in the middle of an epoch goes on with another number of processes."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from calls import call, write_tiny
from comparison import final_state, rows
from methods import SAVE_EVERY_STEP
from seen_samples import Seen, read_seen
from several_nodes import finish_nodes

TRAINER = Path(__file__).resolve().parents[2] / "configs" / "trainer"
COUNT, BATCH, EPOCHS, VALIDATE = 46, 2, 3, 5
ARGS = [
    "fit",
    "--config=tiny.yaml",
    f"--config={TRAINER / 'ddp.yaml'}",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.callbacks+=seen_samples.SeenSamples",
    f"--data.count={COUNT}",
    f"--data.batch_size={BATCH}",
    f"--trainer.max_epochs={EPOCHS}",
    f"--trainer.val_check_interval={VALIDATE}",
    *SAVE_EVERY_STEP,
]


def train(args: list[str], folder: Path, processes: int) -> None:
    """Train with so many processes, of one node each."""
    args = [*args, f"--trainer.num_nodes={processes}"]
    if processes > 1:
        finish_nodes(args, folder, "mine", processes)
    else:
        outcome = call(*args, "--trainer.strategy=auto")
        assert outcome.code == 0, outcome.err


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Gives the folder of a run with so many processes that was never stopped."""
    folders: dict[int, Path] = {}

    def reference(processes: int) -> Path:
        if processes not in folders:
            folders[processes] = tmp_path_factory.mktemp(f"reference{processes}")
            write_tiny(folders[processes])
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folders[processes])
                train(ARGS, folders[processes], processes)
        return folders[processes]

    return reference


def samples(seen: list[Seen]) -> list[int]:
    return [index for batch in seen for index in batch.indices]


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("before", "step", "after"),
    [(2, 4, 1), (2, 11, 1), (2, 15, 1), (1, 7, 2), (1, 22, 2), (2, 7, 4), (2, 10, 4)],
)
def test_another_number_of_processes_goes_on_with_the_epoch(
    before: int,
    step: int,
    after: int,
    references: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree((references(before) / "runs/latest").resolve(), run, symlinks=True)
    for later in (run / "checkpoints").glob("step-*.ckpt"):
        if later.name > f"step-{step:08d}.ckpt":
            later.unlink()
    train(["fit", "--resume=run"], tmp_path, after)

    first = [batch for batch in read_seen(references(before)) if batch.step <= step]
    rest = read_seen(tmp_path)
    steps_before, steps_after = COUNT // (BATCH * before), COUNT // (BATCH * after)
    cut = step // steps_before  # the epoch in which the run was stopped
    used = (step % steps_before) * BATCH * before
    left = (COUNT - used) // (BATCH * after)  # steps to the end of that epoch
    for epoch in range(EPOCHS):
        met = samples([batch for batch in first + rest if batch.epoch == epoch])
        assert max(Counter(met).values()) == 1, "no sample twice within an epoch"
        processes = before if epoch < cut else after
        dropped = (COUNT - used if epoch == cut else COUNT) % (BATCH * processes)
        assert len(met) == COUNT - dropped, "none skipped but the last incomplete batch"

    # Batches, epochs and validations as if the run had always had this many processes.
    counted = [(batch.step, batch.epoch, batch.batch) for batch in rest[::after]]
    numbers = [
        (epoch, number)
        for epoch in range(cut, EPOCHS)
        for number in range(steps_after - left if epoch == cut else 0, steps_after)
    ]
    assert counted == [(step + 1 + place, *number) for place, number in enumerate(numbers)]
    due = [
        batch for batch in [*first[::before], *rest[::after]] if not (batch.batch + 1) % VALIDATE
    ]
    assert sum(bool(row["val/loss"]) for row in rows(run)) == len(due)
    final = final_state(run)
    assert (final["epoch"], final["global_step"]) == (EPOCHS - 1, step + len(numbers))
