"""Features on disk equal features made on the fly, whatever happened while they were written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors import safe_open
from torch import Tensor
from torch.testing import assert_close

from datamodules.errors import DataError
from datamodules.feature_shards import open_split
from datamodules.token_features import TokenFeatures
from lightning_modules.callbacks.feature_cache_writer import FeatureCacheWriter, store_tokens
from lightning_modules.feature_extraction import FeatureExtraction
from models.image_encoders.frozen_encoder import FrozenEncoder
from tests.lightning_modules.feature_runs import (
    LABELS,
    Pages,
    TinyPages,
    store,
    tiny_encoder,
    tiny_trainer,
)


class StopAt(Callback):
    """Breaks a prediction off ahead of a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == self.batch:
            raise InterruptedError


def contents(folder: Path) -> dict[str, tuple[dict[str, str], dict[str, Tensor]]]:
    """Metadata and tensors of all shards by name."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            found[str(path.relative_to(folder))] = (file.metadata(), tensors)
    return found


def stored_indices(folder: Path, split: str = "train") -> list[int]:
    return [i for shard in open_split(folder, split) for i in shard.index.tolist()]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_features_are_those_made_on_the_fly(dtype: str, tmp_path: Path) -> None:
    encoder = tiny_encoder(layer=-2)
    assert store(tmp_path, encoder=encoder, writer={"dtype": dtype}) == 23
    store(tmp_path, TinyPages("val", 9), encoder=encoder, writer={"dtype": dtype})
    data = TokenFeatures(tmp_path, batch_size=4)
    data.setup("fit")
    images = TinyPages()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            page = images.pages.__getitems__([(i, 0) for i in batch["index"].tolist()])
            encoded = encoder(page["image"], attention=True)
            assert batch["tokens"].dtype == getattr(torch, dtype)
            # The batch differs from the one that was stored, hence the last float32 digits.
            rounding = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
            assert_close(batch["tokens"].float(), encoded.tokens, rtol=rounding, atol=1e-4)
            assert_close(batch["cls_attention"], encoded.cls_attention)
            for name in LABELS:
                assert torch.equal(batch[name], page[name]), name
                assert batch[name].dtype == page[name].dtype, name


def test_rounding_is_the_only_change(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    store(tmp_path, TinyPages(count=3), encoder=encoder)
    data = TokenFeatures(tmp_path, val_size=1)
    page = Pages(3).__getitems__([(i, 0) for i in range(3)])
    _, tensors = contents(tmp_path)["train/features-rank0-00000.safetensors"]
    assert torch.equal(tensors["tokens"], encoder(page["image"]).tokens.bfloat16())
    assert (data.encoder_identity, data.channels, data.grid) == (encoder.identity, 16, (4, 4))
    assert (data.kind_names, data.region_names) == (TinyPages.kind_names, TinyPages.region_names)
    assert (data.scene_names, data.source_name) == (TinyPages.scene_names, "noise")


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_an_interrupted_call_is_finished_without_encoding_twice(batch: int, tmp_path: Path) -> None:
    store(tmp_path / "whole")
    broken = tmp_path / "broken"
    with pytest.raises(InterruptedError):
        store(broken, callbacks=[StopAt(batch)])
    kept = len(stored_indices(broken))
    assert kept == batch // 2 * 6
    assert store(broken) == 23 - kept
    assert store(broken) == 0
    whole, resumed = contents(tmp_path / "whole"), contents(broken)
    assert whole.keys() == resumed.keys()
    for name, (metadata, tensors) in whole.items():
        assert resumed[name][0] == metadata
        assert all(torch.equal(resumed[name][1][key], value) for key, value in tensors.items())


def test_a_call_with_other_batches_fills_the_gaps(tmp_path: Path) -> None:
    store(tmp_path)
    (tmp_path / "train" / "features-rank0-00001.safetensors").unlink()
    assert store(tmp_path, TinyPages(eval_batch_size=8), writer={"shard_images": 1}) == 6
    assert sorted(stored_indices(tmp_path)) == list(range(23))


def test_a_substitute_for_an_unusable_image_is_stored_once(tmp_path: Path) -> None:
    assert store(tmp_path, TinyPages(unusable=(4, 11))) == 21
    assert store(tmp_path, TinyPages(unusable=(4, 11))) == 0
    assert stored_indices(tmp_path) == [i for i in range(23) if i not in (4, 11)]


def test_a_leftover_of_a_killed_process_is_overwritten(tmp_path: Path) -> None:
    leftover = tmp_path / "train" / ".features-rank0-00000.safetensors.partial"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half a shard")
    store(tmp_path)
    assert len(list(leftover.parent.iterdir())) == 4
    assert not leftover.exists()


def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("datamodules.feature_shards.save_file", no_room)
    with pytest.raises(DataError, match=r"00000.safetensors: cannot be written \(No space left"):
        store(tmp_path)
    assert not list((tmp_path / "train").iterdir())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"encoder": {"seed": 1}}, "encoder="),
    "layer": ({"encoder": {"layer": 1}}, "layer=2, now it is 1"),
    "dtype": ({"writer": {"dtype": "float16"}}, "dtype=bfloat16, now it is float16"),
    "images": ({"data": {"fingerprint": "fedcba9876543210"}}, "data=0123456789abcdef, now it"),
    "seed": ({"data": {"seed": 3}}, "seed=0, now it is 3"),
    "size": ({"data": {"count": 22}}, "num_images=23, now it is 22"),
    "precision": ({"precision": "bf16-mixed"}, "precision=32-true, now it is bf16-mixed"),
    "split of another encoder": (
        {"data": {"split": "val"}, "encoder": {"seed": 1}},
        "train/features-rank0-00000.safetensors: its features were made with encoder=",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_features_of_something_else_are_refused(case: str, tmp_path: Path) -> None:
    store(tmp_path)
    before = contents(tmp_path).keys()
    changes, expected = REFUSED[case]
    options = dict(changes)
    data = TinyPages(**options.pop("data", {}))
    encoder = tiny_encoder(**options.pop("encoder", {}))
    with pytest.raises(DataError) as caught:
        store(tmp_path, data, encoder, **options)
    assert expected in str(caught.value)
    assert "name a new folder" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert contents(tmp_path).keys() == before


def test_labels_of_another_grid_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"grid=\(2, 8\): the encoder gives \(4, 4\) tokens; set"):
        store(tmp_path, TinyPages(grid=(2, 8)))


def test_a_number_beyond_float16_is_named() -> None:
    tokens = torch.zeros(2, 3, 4)
    tokens[1, 2, 3], tokens[0, 0, 3], tokens[0, 0, 1] = -70000.0, 12.0, 500.0
    expected = r"dtype=float16: channel 3 .* from -7e\+04 to 12, beyond 65504; store bfloat16"
    with pytest.raises(ValueError, match=expected):
        store_tokens(tokens, "float16")
    assert store_tokens(tokens, "bfloat16").isfinite().all()
    tokens[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite; check its weights"):
        store_tokens(tokens, "bfloat16")


@pytest.mark.parametrize("kind", ["no class token", "not asked for"])
def test_attention_is_left_out_where_there_is_none(kind: str, tmp_path: Path) -> None:
    encoder = tiny_encoder(class_token=kind == "not asked for")
    module = FeatureExtraction(encoder, attention=kind != "not asked for")
    trainer = tiny_trainer(tmp_path, callbacks=[FeatureCacheWriter(tmp_path)])
    trainer.predict(module, TinyPages(), return_predictions=False)
    assert open_split(tmp_path, "train")[0].origin.attention_layer == 0
    assert "cls_attention" not in next(iter(TokenFeatures(tmp_path, val_size=5).val_dataloader()))


def test_the_encoder_is_in_no_checkpoint() -> None:
    module = FeatureExtraction(tiny_encoder())
    assert not module.state_dict()
    assert "encoder" not in module.hparams


def test_fit_says_what_the_module_is_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"only encodes images, it does not train: call predict"):
        tiny_trainer(tmp_path).fit(FeatureExtraction(tiny_encoder()), TinyPages())


def test_other_models_and_data_are_refused(tmp_path: Path) -> None:
    data = TinyPages()
    data.predict_split = "all"
    with pytest.raises(TypeError, match="TinyPages: FeatureCacheWriter needs data with predict_sp"):
        store(tmp_path, data)
    with pytest.raises(ValueError, match="shard_images=0: must be >= 1"):
        FeatureCacheWriter(tmp_path, shard_images=0)


def test_a_trial_writes_nothing(tmp_path: Path) -> None:
    store(tmp_path, fast_dev_run=True)
    assert not list(tmp_path.iterdir())


def test_the_last_line_says_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "features"
    store(folder, limit_predict_batches=2)
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("train: 6 of 23 images, 0.0 MB in ")
    store(folder)
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith(f"train: 23 images, 0.0 MB in {folder}; train on them: python train.py")
    assert line.endswith(f"--data datamodules.token_features.TokenFeatures --data.root {folder}")


def test_identity_is_that_of_the_moved_encoder(tmp_path: Path) -> None:
    encoder: FrozenEncoder = tiny_encoder()
    identity = encoder.identity
    store(tmp_path, encoder=encoder)
    assert open_split(tmp_path, "train")[0].origin.encoder == identity


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
def test_two_processes_share_the_images_out(tmp_path: Path) -> None:
    store(tmp_path / "one")
    store(tmp_path / "two", strategy="ddp_fork", devices=2)
    names = contents(tmp_path / "two").keys()
    assert {name.rsplit("-", 1)[0] for name in names} == {
        "train/features-rank0",
        "train/features-rank1",
    }
    assert sorted(stored_indices(tmp_path / "two")) == list(range(23))
    one, two = (TokenFeatures(tmp_path / name, val_size=3) for name in ("one", "two"))
    for alone, shared in zip(one.train_eval_dataloader(), two.train_eval_dataloader(), strict=True):
        assert_close(shared["tokens"], alone["tokens"], rtol=2.0**-7, atol=1e-4)
        assert all(torch.equal(shared[name], alone[name]) for name in LABELS)
    # One process goes on where two were stopped.
    lost = tmp_path / "two" / "train" / "features-rank1-00000.safetensors"
    missing = len(open_split(tmp_path / "two", "train")[0].index)
    lost.unlink()
    assert store(tmp_path / "two") == missing
