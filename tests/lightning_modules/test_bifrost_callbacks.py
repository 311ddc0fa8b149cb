"""Tables, pictures and folders of Bifrost-1, and the retrieval they rest on."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.errors import DataError
from lightning_modules.bifrost_options import BranchShape
from lightning_modules.bifrost_results import GenerationRow, generation_table
from lightning_modules.callbacks.bifrost_pictures import BifrostPictures
from lightning_modules.callbacks.bifrost_table import BifrostTable
from lightning_modules.callbacks.generation_folders import (
    GenerationFolders,
    Layout,
    join_pictures,
)
from lightning_modules.callbacks.latent_store import LatentStore
from lightning_modules.callbacks.latent_table import LatentTable, decoding_sweep
from lightning_modules.pictures import to_pil
from models.bifrost.decoding import DecodingOptions
from tests.cli.calls import call
from tests.lightning_modules.bifrost_runs import (
    folder,
    pairs,
    root,
    saved,
    tiny_branch,
    tiny_controlnet,
    tiny_trainer,
)

__all__ = ["folder", "root"]

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "bifrost"


def test_sweep_has_every_setting_once() -> None:
    options = decoding_sweep(4, (1, 8, None), (1.0, 2.0), ("random", "confidence"))
    found = [(o.order, o.guidance, o.steps) for o in options]
    random = [("random", w, k) for w in (1.0, 2.0) for k in (1, 4)]
    assert found == [*random, ("confidence", 1.0, 4), ("confidence", 2.0, 4)]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: BifrostTable(steps=()), "steps="),
        (lambda: BifrostTable(guidance=(-1.0,)), "guidance="),
        (lambda: BifrostTable(pictures=0), "pictures=0"),
        (lambda: LatentTable(queries=5, gallery=4), "queries=5"),
        (lambda: LatentTable(steps=(0,)), "steps="),
        (lambda: BifrostPictures(0, 0), "train_pictures=0"),
        (lambda: BifrostPictures(every_n_validations=-1), "every_n_validations=-1"),
        (lambda: LatentStore(Path("x"), ()), "parts="),
        (lambda: LatentStore(Path("x"), shard_mb=0), "shard_mb=0"),
    ],
)
def test_bad_numbers_are_named(make: Any, named: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=f"^{named}"):
        make()


def test_latent_table(folder: Path, root: Path, tmp_path: Path) -> None:
    module, data = tiny_branch(folder), pairs(root)
    saved(module, root, tmp_path / "two.ckpt")
    table = LatentTable((1, None), (1.0, 2.0), ("random", "confidence"), queries=12, gallery=24)
    trainer = tiny_trainer(tmp_path, callbacks=[table])
    [metrics] = trainer.test(module, data, verbose=False)
    content = json.loads((tmp_path / "bifrost" / "latents.json").read_text())
    rows = [row for row in content["rows"] if row["split"] == "train"]
    assert [row["source"] for row in rows] == ["mean latent", *["caption"] * 4] + [
        "caption, surest first"
    ] * 2
    truth = data.gallery("train", 12)
    latents = module.foundation.latents(truth["image"])
    expected = (latents - module.latent_mean).square().mean()
    assert rows[0]["figures"]["mse"] == pytest.approx(float(expected), rel=1e-4)
    keys = [(n,) for n in truth["index"].tolist()]
    options = decoding_sweep(4, (1,), (1.0,))[0]
    generated = module.generator.generate(truth["caption"], keys, options)
    error = float((generated - latents).square().mean())
    assert rows[1]["figures"]["mse"] == pytest.approx(error, rel=1e-3)
    assert set(rows[1]["seconds"]) == {"text", "latents"}
    assert metrics["test/mse_caption_k1_w1_train"] == rows[1]["figures"]["mse"]
    assert "test/reveal_1_held_out" in metrics
    text = (tmp_path / "bifrost" / "latents.txt").read_text()
    assert "held out: R@1 by chance 12.50 % of 8, 8 asked" in text
    assert "MSE of hidden tokens, empty caption, k of 4 shown: 0 " in text
    ratio = (generated - module.latent_mean).square().mean() / expected
    assert rows[1]["figures"]["spread"] == pytest.approx(float(ratio), rel=1e-3)
    # In one step no order can matter, so all latents of the empty caption are one.
    assert metrics["test/unprompted_kinds_k1"] == 1
    assert metrics["test/unprompted_kinds_k4"] >= 1
    assert "empty caption, 100 orders: nearest to different samples: K=1 1 (spread" in text


def test_latent_table_of_queries_that_read_no_latents(
    folder: Path, root: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"shape": BranchShape(queries="learned_2d")}
    module = tiny_branch(folder, **options, decoding=DecodingOptions(1))
    saved(module, root, tmp_path / "two.ckpt")
    table = LatentTable((1, None), (1.0,), queries=4, gallery=8)
    [metrics] = tiny_trainer(tmp_path, callbacks=[table]).test(module, pairs(root), verbose=False)
    assert {name for name in metrics if "_k" in name and "mse" in name} == {
        "test/mse_caption_k1_w1_train",
        "test/mse_caption_k1_w1_held_out",
    }


@pytest.mark.parametrize("with_branch", [False, True])
def test_picture_table_and_grid(
    with_branch: bool, folder: Path, root: Path, tmp_path: Path
) -> None:
    path = None
    if with_branch:
        path = saved(tiny_branch(folder), root, tmp_path / "branch.ckpt")
    module, data = tiny_controlnet(folder, branch=path), pairs(root)
    table = BifrostTable((1, None), (1.0,), pictures=4, gallery=24, judge_size=32)
    trainer = tiny_trainer(tmp_path, callbacks=[table, BifrostPictures(2, 1)])
    [metrics] = trainer.test(module, data, verbose=False)
    content = json.loads((tmp_path / "bifrost" / "pictures.json").read_text())
    found = [(row["source"], row["steps"]) for row in content["rows"] if row["split"] == "train"]
    sources = ["autoencoder", "true latents", "true latents, another's text", "text alone"]
    expected: list[tuple[str, int | None]] = [(source, None) for source in sources]
    if with_branch:
        expected += [("generated latents", 1), ("generated latents", 4)]
    assert found == expected
    # A fresh ControlNet changes nothing: with and without latents the pictures are one.
    figures = {row["source"]: row["figures"] for row in content["rows"][:4]}
    assert figures["true latents"] == figures["text alone"] != figures["autoencoder"]
    assert ("no branch was given" in " ".join(content["notes"])) is not with_branch
    assert "gain over text alone +0.0 points" in content["notes"][0]
    assert set(content["rows"][1]["seconds"]) == {"text", "FLUX", "VAE"}
    assert metrics["test/r1_true_latents_train"] == figures["true latents"]["r1"]
    grid = pixels(tmp_path / "pictures" / "bifrost-test.png")
    assert grid.shape[1] > (4 if with_branch else 3) * 96


def test_pictures_follow_validations(folder: Path, root: Path, tmp_path: Path) -> None:
    callback = BifrostPictures(1, 1, every_n_validations=2)
    options = {"callbacks": [callback], "val_check_interval": 1, "limit_val_batches": 1}
    module = tiny_controlnet(folder)
    tiny_trainer(tmp_path, 4, **options).fit(module, pairs(root))
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["bifrost-step000002.png", "bifrost-step000004.png"]
    again = BifrostPictures()
    again.load_state_dict(callback.state_dict())
    assert again.state_dict() == {"validations": 4}
    with pytest.raises(TypeError, match="draws BifrostControlNet only"):
        tiny_trainer(tmp_path, callbacks=[callback]).test(tiny_branch(folder), pairs(root))


def test_joined_pictures() -> None:
    pictures = [Image.new("RGB", (2, 3), (level, 0, 0)) for level in (10, 20, 30)]
    joined = np.asarray(join_pictures(pictures))[:, :, 0]
    assert joined.shape == (6, 4)
    assert joined[::3, ::2].tolist() == [[10, 20], [30, 0]]
    assert np.asarray(join_pictures(pictures[:1])).shape == (3, 2, 3)


def predicted(
    layout: Layout,
    copies: int,
    prompts: Path,
    folder: Path,
    root: Path,
    run: Path,
) -> list[Any]:
    """Pictures of prompts, as returned; the callback has written them."""
    branch = saved(tiny_branch(folder), root, run / "branch.ckpt")
    module = tiny_controlnet(folder, branch=branch, pictures_per_prompt=copies)
    data = pairs(root, prompts=prompts, eval_batch_size=2)
    trainer = tiny_trainer(run, callbacks=[GenerationFolders(layout)])
    found = trainer.predict(module, data)
    return [picture for batch in found or [] for picture in batch["image"]]


def pixels(path: Path) -> Any:  # noqa: ANN401
    with Image.open(path) as picture:
        return np.asarray(picture)


def same_picture(path: Path, picture: torch.Tensor) -> bool:
    return np.array_equal(pixels(path), np.asarray(to_pil(picture)))


def test_geneval_layout(folder: Path, root: Path, tmp_path: Path) -> None:
    lines = [{"tag": "two_object", "prompt": f"{n} dots", "include": [n]} for n in range(3)]
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    pictures = predicted("geneval", 2, prompts, folder, root, tmp_path)
    out = tmp_path / "predictions"
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    each = ["grid.png", "metadata.jsonl", "samples/0000.png", "samples/0001.png"]
    assert files == [f"{n:05d}/{name}" for n in range(3) for name in each] + ["index.json"]
    assert json.loads((out / "00001" / "metadata.jsonl").read_text()) == lines[1]
    assert same_picture(out / "00002" / "samples" / "0001.png", pictures[2][1])
    assert pixels(out / "00002" / "grid.png").shape == (16, 32, 3)
    height, width, _ = pixels(tmp_path / "pictures" / "predictions.png").shape
    assert height > 3 * 96
    assert width > 2 * 96  # three prompts with two pictures each, enlarged


def test_dpg_bench_layout(folder: Path, root: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name in ("COCOval2014000000000241", "whoops7"):
        (prompts / f"{name}.txt").write_text("a long prompt")
    pictures = predicted("dpg_bench", 4, prompts, folder, root, tmp_path)
    out = tmp_path / "predictions"
    grid = pixels(out / "whoops7.png")
    assert grid.shape == (32, 32, 3)
    assert np.array_equal(grid[16:, :16], np.asarray(to_pil(pictures[1][2])))
    index = json.loads((out / "index.json").read_text())
    assert [sample["files"] for sample in index["samples"]] == [
        ["COCOval2014000000000241.png"],
        ["whoops7.png"],
    ]
    with pytest.raises(ValueError, match=r"^pictures_per_prompt=3: DPG-Bench wants 4"):
        predicted("dpg_bench", 3, prompts, folder, root, tmp_path)
    with pytest.raises(ValueError, match=r"^sheet=-1: must be >= 0"):
        GenerationFolders(sheet=-1)


def test_names_stay_in_the_folder(tmp_path: Path) -> None:
    writer = GenerationFolders()
    prediction = {
        "image": torch.zeros(1, 1, 3, 4, 4),
        "name": ["../x"],
        "metadata": ['{"prompt": ""}'],
        "index": torch.tensor([0]),
    }
    trainer: Any = tiny_trainer(tmp_path)
    module: Any = torch.nn.Module()
    with pytest.raises(DataError, match="leads out of the folder"):
        writer.write_on_batch_end(trainer, module, prediction, None, None, 0, 0)
    with pytest.raises(TypeError, match="needs a dict"):
        writer.write_on_batch_end(trainer, module, None, None, None, 0, 0)


def test_table_shows_only_what_there_is() -> None:
    rows = [
        GenerationRow("train", "a", {"r1": 0.5, "mse": 0.25}, {}),
        GenerationRow("held out", "b", {"r1": 0.125}, {"FLUX": 0.002}, 8, 1.5),
    ]
    table = generation_table(rows, "title", "caption")
    headings = [str(column.header) for column in table.columns]
    assert headings == ["split", "from", "K", "guidance", "R@1 % of all", "MSE", "FLUX ms"]
    cells = [list(column.cells) for column in table.columns]
    assert cells[4] == ["50.0", "12.5"]
    assert cells[5] == ["0.2500", "–"]
    assert cells[6] == ["–", "2.0"]
    assert (rows[0].name, rows[1].name) == ("a_train", "b_k8_w1.5_held_out")


def test_commands_of_the_demo(
    folder: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both stages from their shipped configurations: fit, test, and pictures of prompts."""
    monkeypatch.chdir(tmp_path)
    tiny = [
        f"--data.root={root}", "--data.image_size=16", "--data.batch_size=8",
        "--trainer.max_steps=2", "--trainer.val_check_interval=2",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        f"--model.foundation.folder={folder}", "--model.decoding.steps=2",
    ]  # fmt: skip
    call_fine("fit", f"--config={CONFIGS / 'demo_branch.yaml'}", *tiny, "--name=a")
    first = (tmp_path / "runs" / "latest").resolve()
    call_fine("test", "--resume", str(first))
    assert (first / "bifrost" / "latents.json").is_file()
    tiny += [
        f"--model.painter.folder={folder}", "--model.sampling.steps=2",
        "--model.shape={double_layers: 1, single_layers: 1, lean_attention: true}",
    ]  # fmt: skip
    call_fine("fit", f"--config={CONFIGS / 'demo_controlnet.yaml'}", *tiny, "--name=b")
    second = (tmp_path / "runs" / "latest").resolve()
    run, branch = str(second), f"--model.branch={first}"
    call_fine("test", "--resume", run, branch)
    rows = json.loads((second / "bifrost" / "pictures.json").read_text())["rows"]
    assert {row["source"] for row in rows} > {"generated latents", "text alone"}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red bar\ngreen dot\n")
    call_fine("predict", "--resume", run, branch, f"--data.prompts={prompts}")
    index = json.loads((second / "predictions" / "index.json").read_text())
    assert [sample["prompt"] for sample in index["samples"]] == ["red bar", "green dot"]
    assert pixels(second / "predictions" / "00001.png").shape == (16, 16, 3)
    refused = call("predict", "--resume", run, f"--data.prompts={prompts}")
    assert refused.code == 2
    assert re.search(r"branch=None: .*\(model\.branch\)", refused.err)


def call_fine(*args: str) -> None:
    outcome = call(*args)
    assert outcome.code == 0, outcome.err
