"""Stage 2 on stored clusters, and the cache that makes them: same results, nothing stale."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from datamodules.errors import DataError
from datamodules.multiview import MultiviewRays
from datamodules.multiview.stored_clusters import ClusterFolder
from lightning_modules.callbacks.cluster_cache import ClusterCache
from lightning_modules.clift_condensing import CliftCondensing
from models.clift.scene_file import encoder_identity
from tests.lightning_modules.clift_runs import (
    room_cache,
    rooms,
    tiny_clift,
    tiny_condensing,
    tiny_trainer,
)
from tests.models.clift_networks import shake

__all__ = ["room_cache"]


def cached(
    module: Any,  # noqa: ANN401
    data: MultiviewRays,
    folder: Path,
    passes: int = 2,
    **changes: Any,  # noqa: ANN401
) -> None:
    """Train for no more than the making of clusters and ``steps`` steps."""
    options: dict[str, Any] = {"steps": 1, "limit_val_batches": 0, **changes}
    callbacks = [ClusterCache(passes), *options.pop("callbacks", [])]
    tiny_trainer(folder, callbacks=callbacks, **options).fit(module, data)


def fresh(module: CliftCondensing) -> CliftCondensing:
    """The same weights, never trained."""
    again = tiny_condensing()
    again.load_state_dict(module.state_dict())
    return again


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.json")}


def test_cache_holds_clusters_of_every_scene_and_training_reads_them(
    room_cache: Path, tmp_path: Path
) -> None:
    module, data = tiny_condensing(), rooms(room_cache, clusters=tmp_path / "clusters")
    cached(module, data, tmp_path)
    folder = ClusterFolder(tmp_path / "clusters")
    assert not folder.missing(data.training_scenes)
    counts = set()
    for name in data.training_scenes:
        first, second = folder.read(name)
        assert first.context != second.context or not (first.labels == second.labels).all()
        for entry in (first, second):
            assert entry.encoder == encoder_identity(module.network)
            assert len(entry.labels) == 4 * 16
            counts.add(len(entry.anchors))
    assert len(counts) > 4, "every clustering has its own number of clusters"
    batch = next(iter(data.train_dataloader()))
    labels, anchors = batch["clusters"]["labels"], batch["clusters"]["anchors"]
    for row, name in enumerate(batch["scene"]):
        entries = folder.read(name)
        same = [entry for entry in entries if (labels[row].numpy() == entry.labels).all()]
        assert same, "the labels are those of one of the scene's clusterings"
        assert anchors[row, : len(same[0].anchors)].tolist() == list(same[0].anchors)
        assert batch["context"]["frame"][row].tolist() == list(same[0].context)


def test_a_stopped_cache_goes_on_and_ends_the_same(room_cache: Path, tmp_path: Path) -> None:
    module = tiny_condensing()
    cached(fresh(module), rooms(room_cache, clusters=tmp_path / "whole"), tmp_path)
    whole = contents(tmp_path / "whole")
    data = rooms(room_cache, clusters=tmp_path / "part")
    write, done = ClusterFolder.write, []

    def killed(folder: ClusterFolder, scene: str, entries: Any) -> None:  # noqa: ANN401
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(scene)
        write(folder, scene, entries)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClusterFolder, "write", killed)
        with pytest.raises(SystemExit):
            cached(fresh(module), data, tmp_path)
    assert len(contents(tmp_path / "part")) == 3 + 1
    written: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClusterFolder, "write", lambda *args: (written.append(args[1]), write(*args)))
        cached(fresh(module), data, tmp_path)
    assert len(written) == 5
    assert not set(written) & set(done)
    assert contents(tmp_path / "part") == whole


def test_clusters_of_another_encoder_are_refused_by_cache_and_training(
    room_cache: Path, tmp_path: Path
) -> None:
    data = rooms(room_cache, clusters=tmp_path / "clusters")
    first = tiny_condensing()
    cached(first, data, tmp_path)
    other = tiny_condensing()
    shake(other.network.encoder)
    with pytest.raises(DataError, match=r"made_by.json: .*encoder=") as caught:
        cached(other, data, tmp_path)
    assert "\n" not in str(caught.value)
    trainer = tiny_trainer(tmp_path, 1, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"stored clusters were made by encoder") as stale:
        trainer.fit(other, data)
    assert "\n" not in str(stale.value)
    tiny_trainer(tmp_path, 1, limit_val_batches=0).fit(fresh(first), data)


def test_clusters_of_other_pictures_are_refused(room_cache: Path, tmp_path: Path) -> None:
    module, data = tiny_condensing(), rooms(room_cache, clusters=tmp_path / "clusters")
    cached(module, data, tmp_path)
    for name in data.training_scenes:
        file = ClusterFolder(tmp_path / "clusters").file(name)
        content = json.loads(file.read_text())
        for entry in content.values():  # released files: no encoder, here of patches twice as high
            del entry["encoder"]
            kept = set(entry["labels"][:32])
            entry["labels"] = entry["labels"][:32]
            entry["anchor_idx"] = [entry["labels"].index(label) for label in sorted(kept)]
            entry["num_keep"] = len(kept)
        file.write_text(json.dumps(content))
    trainer = tiny_trainer(tmp_path, 1, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"stored clusters of \[32, 32\] tokens, the network"):
        trainer.fit(fresh(module), data)


def test_stored_clusters_are_condensed_as_they_are(room_cache: Path, tmp_path: Path) -> None:
    """The step's loss is that of the entry's clusters, whatever ``keep`` says."""
    module = tiny_condensing(keep=(1.0, 1.0))
    shake(module.network)
    data = rooms(room_cache, clusters=tmp_path / "clusters")
    root = tmp_path / "clusters"
    frames = (1, 3, 5, 7)
    for number, name in enumerate(data.training_scenes):
        labels = [(token + number) % 5 for token in range(64)]
        anchors = [labels.index(label) for label in (4, 2, 0, 1, 3)]
        entry = {"condition_view_idx": frames, "anchor_idx": anchors, "labels": labels}
        (root / name).mkdir(parents=True)
        (root / name / "metadata.json").write_text(json.dumps(entry))
    batch = next(iter(data.train_dataloader()))
    assert batch["context"]["frame"].tolist() == [list(frames)] * 2
    module.trainer = tiny_trainer(tmp_path, 1)
    module.log = lambda *args, **kwargs: None
    module.log_dict = lambda *args, **kwargs: None
    loss = module.train().training_step(batch, 0)
    losses = []
    for row in range(2):  # each scene alone, its clusters written out anew
        scenes = module.encode(batch)
        stored = batch["clusters"]
        tokens = scenes.tokens[row : row + 1]
        labels = stored["labels"][row]
        groups = [(labels == labels[a]).nonzero().squeeze(1) for a in stored["anchors"][row]]
        alone = torch.full_like(labels, -1)
        for number, group in enumerate(groups):
            alone[group] = number
        clusters = type(module._stored_clusters(stored, scenes))(
            alone[None], stored["anchors"][row : row + 1], torch.tensor([5])
        )
        few = module.network.condense(tokens, clusters)
        target = {name: value[row : row + 1] for name, value in batch["target"].items()}
        picture = module.render(module.network.remember(few), target)
        losses.append((picture - target["image"]).square().mean())
    assert_close(loss, torch.stack(losses).mean(), atol=1e-6, rtol=1e-5)


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
def test_two_processes_share_out_the_scenes(room_cache: Path, tmp_path: Path) -> None:
    module = tiny_condensing()
    cached(fresh(module), rooms(room_cache, clusters=tmp_path / "one"), tmp_path)
    data = rooms(room_cache, clusters=tmp_path / "two")
    cached(module, data, tmp_path, strategy="ddp_fork", devices=2)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    assert one == two


def test_misuse_is_named(room_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="passes=0: must be >= 1"):
        ClusterCache(0)
    with pytest.raises(ValueError, match="clusters=None: ClusterCache needs a folder"):
        cached(tiny_condensing(), rooms(room_cache), tmp_path)
    with pytest.raises(TypeError, match="Clift, MultiviewRays: ClusterCache is for"):
        cached(tiny_clift(), rooms(room_cache, clusters=tmp_path / "clusters"), tmp_path)
