"""What a run leaves on disk and in Weights & Biases, and how later calls go on with it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml
from calls import Outcome, call, fit, write_tiny
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from wandb_log import read_log

from lightning_modules.cli.wandb_loggers import leave_out_unset

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return fit(tmp_path)


def test_layout(run: Path) -> None:
    assert run.parent.name == "tiny_pair"
    assert run.name.startswith("tiny-20")
    names = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    assert names == {
        "checkpoints",
        "checkpoints/last.ckpt",
        "checkpoints/step-00000024.ckpt",
        "checkpoints/step-00000024.ckpt.sha256",
        "config.yaml",
        "metrics.csv",
    }
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 2
    assert not {"resume", "ckpt_path", "weights_only"} & config.keys()
    assert "default_root_dir" not in config["trainer"]


def test_saved_configuration_starts_an_equal_run(run: Path) -> None:
    outcome = call("fit", "--config", str(run / "config.yaml"), "--name", "again")
    assert outcome.code == 0, outcome.err
    (again,) = Path("runs/tiny_pair").glob("again-*")
    assert Path("runs/latest").resolve() == again.resolve()
    assert (again / "metrics.csv").read_text() == (run / "metrics.csv").read_text()


def _lines(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome.err
    return outcome.out


def test_test_and_predict_go_into_the_run(run: Path) -> None:
    config = (run / "config.yaml").read_text()
    out = _lines(call("test", "--resume", "runs/latest"))
    assert "test/loss" in out
    assert "fit --resume" not in out, "there is nothing to go on with after a test"
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert f"{metrics['test/loss']:.4f}" in out
    assert "val/loss" in _lines(call("validate", "--resume", "runs/latest"))
    _lines(call("predict", "--resume", "runs/latest"))
    assert (run / "config.yaml").read_text() == config
    assert len(list(run.parent.iterdir())) == 1
    assert "train/loss" in (run / "metrics.csv").read_text().splitlines()[0]


def test_last_without_resume_takes_the_newest_run_of_that_name(run: Path) -> None:
    flags = ["--config", "tiny.yaml", "--ckpt_path", "last"]
    _lines(call("fit", *flags, "--trainer.max_epochs", "3"))
    assert (run / "checkpoints" / "step-00000036.ckpt").is_file()
    _lines(call("test", *flags))
    outcome = call("test", *flags, "--name", "other")
    assert outcome.code == 2
    assert "no run runs/tiny_pair/other-* to load from" in outcome.err


def test_best_is_what_a_model_checkpoint_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    best = {"monitor": "val/loss", "dirpath": "best", "filename": "best"}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": best}
    write_tiny(tmp_path, yaml.safe_dump({"trainer": {"callbacks": [callback]}}), "best.yaml")
    fit(tmp_path, "--config", "best.yaml")
    outcome = call("test", "--resume", "runs/latest", "--ckpt_path", "best")
    assert outcome.code == 0, outcome.err
    assert Path("best/best.ckpt").is_file()


def test_trial_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    assert call("fit", "--config", "tiny.yaml", "--trainer.fast_dev_run", "true").code == 0
    assert not list(tmp_path.glob("runs/*/*"))


def test_resumed_run_keeps_its_wandb_id_and_shows_the_whole_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    warnings: list[str] = []
    monkeypatch.setattr("wandb.termwarn", lambda text, **_: warnings.append(text))
    run = fit(tmp_path, "--config", str(CONFIGS / "logger/wandb_offline.yaml"))
    time.sleep(1.1)  # W&B names the folder of an offline run by the second
    monkeypatch.chdir(run)  # its service stays in the folder where the first run started it
    assert call("fit", "--resume", ".", "--trainer.max_epochs", "3").code == 0
    assert not warnings
    identity = (run / "wandb/run_id.txt").read_text().strip()
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert {file.name for file in files} == {f"run-{identity}.wandb"}
    config = read_log(files[0]).config
    assert config["trainer"]["max_epochs"] == 2
    arguments = config["model"]["init_args"]
    assert (arguments["lr"], arguments["width"]) == (0.05, 8)
    linked = (arguments["image_size"], arguments["num_classes"], arguments["seed"])
    assert linked == (2, 3, 0)
    assert (run / "metrics.csv").is_file(), "the table stays when W&B is added"


@pytest.mark.parametrize(("given", "handed"), [({}, None), ({"anonymous": True}, "allow")])
def test_wandb_is_handed_what_the_user_sets(
    given: dict[str, bool], handed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning hands it ``anonymous`` always, at which it warns."""
    arguments: dict[str, object] = {}
    monkeypatch.setattr("wandb.run", None)
    monkeypatch.setattr("wandb.init", lambda **given: arguments.update(given))
    logger = WandbLogger(save_dir=tmp_path, offline=True, **given)
    leave_out_unset([CSVLogger(tmp_path), logger])
    _ = logger.experiment
    assert arguments["dir"] == str(tmp_path)
    assert arguments.get("anonymous") == handed
    assert ("anonymous" in arguments) == bool(given)
