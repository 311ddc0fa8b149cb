"""`train.py doctor` says in a line each what a run lacks, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calls import Outcome, call, fit, write_tiny
from jsonargparse import Namespace
from safetensors.torch import save_file

from lightning_modules.cli.doctor.files import UnusableFile, measure_weights
from lightning_modules.cli.doctor.findings import Finding
from lightning_modules.cli.doctor.machine import (
    Devices,
    examine_devices,
    examine_disk,
    examine_memory,
    examine_wandb,
)
from lightning_modules.cli.doctor.versions import examine_versions, read_needs

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ONE_CPU = Devices("cpu", processes=1, nodes=1, shards=1)


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines(outcome: Outcome, verdict: str, subject: str = "") -> list[str]:
    """What the report says with a verdict, about a subject."""
    found = [line.split(maxsplit=1) for line in outcome.out.splitlines() if line.strip()]
    return [rest for head, rest in found if head == verdict and rest.startswith(subject)]


def test_healthy(tmp_path: Path) -> None:
    outcome = call("doctor", "--config", str(write_tiny(tmp_path)))
    assert outcome.code == 0, outcome.out
    assert not lines(outcome, "fail")
    assert "67 parameters, of which 67 are trained" in lines(outcome, "ok", "model")[0]
    assert len(lines(outcome, "ok", "data, ")) == 3
    assert "nothing stands in the way of: python train.py fit --config" in outcome.out
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml"}, "nothing is left behind"


@pytest.mark.parametrize(
    ("flags", "subject", "text"),
    [
        (["--model.widht", "4"], "settings", "unknown key; did you mean 'width'?"),
        (["--model.width", "0"], "model", "model.init_args.width=0: must be >= 1"),
        (["--data.root", "nowhere"], "data", "nowhere: no such folder"),
        (["--data.fail_in_setup", "value"], "data, train", "labels.txt: 3 of 4 bad"),
        (["--data.fail_in_setup", "bug"], "data, train", "KeyError: 'labels.txt: 3 of 4 bad'"),
        (["--data.count", "0"], "data, train", ""),
        (["--trainer.gradient_clip_algorithm", "x"], "trainer", "gradient_clip_algorithm"),
        (["--config", "none.yaml"], "settings", "none.yaml: no such file"),
    ],
)
def test_faults(tmp_path: Path, flags: list[str], subject: str, text: str) -> None:
    outcome = call("doctor", "--config", str(write_tiny(tmp_path)), *flags)
    assert outcome.code == 2, outcome.out
    assert any(text in line for line in lines(outcome, "fail", subject)), outcome.out
    assert "Traceback" not in outcome.err + outcome.out
    assert not list(tmp_path.glob("runs*"))


def test_paper_size_without_data() -> None:
    """1.1 billion parameters are counted, not allocated."""
    outcome = call("doctor", "--config", str(CONFIGS / "farmer/imagenet256_1b_p16.yaml"))
    assert outcome.code == 2
    assert "1,144,545,800 parameters" in lines(outcome, "ok", "model")[0]
    assert "data/imagenet: no such file or folder" in lines(outcome, "fail", "data")[0]


def test_paper_size_without_weights() -> None:
    outcome = call("doctor", "--config", str(CONFIGS / "concerto/large.yaml"))
    assert outcome.code == 2
    (line,) = lines(outcome, "fail", "weights")
    assert "weights/dinov2-with-registers-giant is not there" in line
    assert "--model.encoder.folder" in line


def test_model_that_reads_its_own_files() -> None:
    """What cannot be built without memory is built, if it is small."""
    outcome = call(
        "doctor",
        "--config",
        str(CONFIGS / "token_reduction/demo.yaml"),
        "--data.train_size=32",
        "--data.val_size=16",
        "--data.test_size=16",
    )
    assert outcome.code == 0, outcome.out
    assert "parameters" in lines(outcome, "ok", "model")[0]
    assert "UserWarning" not in outcome.err


def test_resume(tmp_path: Path) -> None:
    run = fit(tmp_path, "--checkpoint.every_n_train_steps", "8")
    outcome = call("doctor", "--resume", str(run))
    assert outcome.code == 0, outcome.out
    assert "goes on at step 24" in lines(outcome, "ok", "checkpoints")[0]
    first, last = sorted(run.glob("checkpoints/step-*.ckpt"))
    _flip_byte(last)
    outcome = call("doctor", "--resume", str(run))
    assert outcome.code == 0, outcome.out
    assert "goes on at step 16" in lines(outcome, "ok", "checkpoints")[0]
    assert "incomplete or damaged" in lines(outcome, "warn", "checkpoints")[0]
    outcome = call("doctor", "--resume", str(run), "--model.width", "9")
    assert "net.0.bias has shape (8,)" in lines(outcome, "fail", "checkpoints")[0]
    _flip_byte(first)
    outcome = call("doctor", "--resume", str(run))
    assert outcome.code == 2
    assert len(lines(outcome, "fail", "checkpoints")) == 2


def _flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_weight_files(tmp_path: Path) -> None:
    whole, torch_file = tmp_path / "a.safetensors", tmp_path / "b.pth"
    save_file({"x": torch.zeros(1000)}, whole)
    torch.save({"x": torch.zeros(1000)}, torch_file)
    assert measure_weights(tmp_path) == whole.stat().st_size + torch_file.stat().st_size
    for file in (whole, torch_file):
        content = file.read_bytes()
        file.write_bytes(content[:-100])
        with pytest.raises(UnusableFile, match=file.name):
            measure_weights(tmp_path)
        file.write_bytes(b"")
        with pytest.raises(UnusableFile, match="empty"):
            measure_weights(file)
        file.write_bytes(content)
    (tmp_path / "m.index.json").write_text('{"weight_map": {"x": "c.safetensors"}}')
    with pytest.raises(UnusableFile, match=r"1 of 1 parts are missing \(c.safetensors"):
        measure_weights(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnusableFile, match="no weights in it"):
        measure_weights(tmp_path / "empty")


def test_versions(tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text(
        '[project]\nrequires-python = ">=9"\ndependencies = ["torch>=99", "nowhere>=1", "rich"]\n'
        '[project.optional-dependencies]\nextra = ["neither>=1"]\n'
    )
    found = list(examine_versions(read_needs(file)))
    texts = {finding.detail for finding in found if finding.verdict == "fail"}
    assert any("expected >=9" in text for text in texts)
    assert any(text.startswith("torch ") and "expected >=99" in text for text in texts)
    assert any(text.startswith("nowhere is not installed") for text in texts)
    optional = [finding for finding in found if finding.subject == "optional"]
    assert [finding.verdict for finding in optional] == ["ok"]
    assert "pip install -e '.[extra]'" in optional[0].detail


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (finding,) = examine_devices(Devices("cuda", 1, 1, 1))
    assert finding.verdict == "fail"
    assert "configs/trainer/cpu.yaml" in finding.detail
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    _, group = examine_devices(Devices("cpu", 1, 2, 1))
    assert (group.verdict, group.subject) == ("warn", "process group")
    _, group = examine_devices(Devices("cpu", 2, 1, 1))
    assert group == Finding("ok", "process group", "2 processes over gloo")


def test_memory_and_disk(tmp_path: Path) -> None:
    assert examine_memory(ONE_CPU, 10**6, 0).verdict == "ok"
    short = examine_memory(ONE_CPU, 10**15, 0)
    assert short.verdict == "fail"
    assert "1000000.0 GB" in short.detail
    assert examine_memory(Devices("cpu", 1, 1, shards=10**9), 10**15, 0).verdict == "ok"
    runs = tmp_path / "not" / "yet"
    assert examine_disk(runs, 10**3, keep=2).verdict == "ok"
    full = examine_disk(runs, 10**15, keep=2)
    assert full.verdict == "fail"
    assert "2 + 1 checkpoints" in full.detail
    assert not runs.parent.exists()


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    logger = Namespace(class_path="x.WandbLogger", init_args=Namespace(offline=False))
    trainer = Namespace(logger=[logger])
    (finding,) = examine_wandb(trainer)
    assert finding.verdict == "fail"
    assert "wandb login" in finding.detail
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password none\n")
    netrc.chmod(0o600)
    assert [f.verdict for f in examine_wandb(trainer)] == ["ok"]
    netrc.unlink()
    logger.init_args.offline = True
    assert [f.verdict for f in examine_wandb(trainer)] == ["ok"]
    assert not list(examine_wandb(Namespace(logger=None)))


def test_help() -> None:
    outcome = call("doctor", "--help")
    assert outcome.code == 0
    assert outcome.out.startswith("python train.py doctor --config FILE.yaml")
