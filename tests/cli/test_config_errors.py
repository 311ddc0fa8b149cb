"""Every kind of wrong configuration ends with exit status 2 and one line that helps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from calls import TINY, call, write_tiny

WIDTH, BATCH, EPOCHS = "    width: 8\n", "    batch_size: 4\n", "  max_epochs: 2\n"
MODEL, DATA = "tiny_pair.TinyModel", "tiny_pair.TinyData"

# (replaced text, its replacement, what the line must say)
# fmt: off
FILES = {
    "misspelt model argument": (WIDTH, "    widht: 8\n", ":4: model.init_args.widht: unknown key; did you mean 'width'?"),
    "misspelt data argument": (BATCH, "    batchsize: 4\n", ":8: data.init_args.batchsize: unknown key; did you mean 'batch_size'?"),
    "misspelt trainer key": (EPOCHS, "  max_epoch: 2\n", ":10: trainer.max_epoch: unknown key; did you mean 'max_epochs'?"),
    "misspelt top-level key": ("trainer:\n", "trianer:\n", ":9: trianer: unknown key; did you mean 'trainer'?"),
    "misspelt checkpoint key": ("trainer:\n", "checkpoint:\n  kep: 3\ntrainer:\n", ":10: checkpoint.kep: unknown key; did you mean 'keep'?"),
    "misspelt init_args": ("  init_args:\n" + WIDTH, "  init_arg:\n" + WIDTH, ":3: model.init_arg: unknown key; did you mean 'init_args'?"),
    "argument beside init_args": (WIDTH, WIDTH + "  lr: 0.1\n", ":5: model.lr: unknown key"),
    "text for an int": (WIDTH, "    width: fast\n", ":4: model.init_args.width: expected int, got 'fast'"),
    "float for an int": (WIDTH, "    width: 1.5\n", ":4: model.init_args.width: expected int, got 1.5"),
    "list for a float": (WIDTH, "    lr: [1, 2]\n", ":4: model.init_args.lr: expected float, got [1, 2]"),
    "null for an int": (WIDTH, "    width: null\n", ":4: model.init_args.width: expected int, got None"),
    "tuple too short": (WIDTH, "    betas: [0.9]\n", ":4: model.init_args.betas: expected tuple[float, float], got [0.9]"),
    "not one of the choices": (WIDTH, "    activation: tanh\n", ":4: model.init_args.activation: expected one of relu, gelu, got 'tanh'"),
    "text for an optional int": (WIDTH, "    nan_at: soon\n", ":4: model.init_args.nan_at: expected int or null, got 'soon'"),
    "text for a trainer int": (EPOCHS, "  max_epochs: many\n", ":10: trainer.max_epochs: expected int or null, got 'many'"),
    "out of bounds in the model": (WIDTH, "    width: 0\n", ":4: model.init_args.width=0: must be >= 1"),
    "out of bounds in the data": (BATCH, "    batch_size: -1\n", ":8: data.init_args.batch_size=-1: must be >= 1"),
    "out of bounds in a callback": ("trainer:\n", "checkpoint:\n  keep: 0\ntrainer:\n", ":10: checkpoint.keep=0: must be >= 1"),
    "folder that does not exist": (BATCH, "    root: nosuch\n", ":8: data.init_args.root=nosuch: no such folder"),
    "misspelt class": (MODEL, "tiny_pair.TinyModle", ":2: model.class_path: no class 'TinyModle' in tiny_pair; did you mean 'TinyModel'?"),
    "misspelt module": (MODEL, "lightning_moduls.farmer.Farmer", ":2: model.class_path: no module 'lightning_moduls'; did you mean 'lightning_modules'?"),
    "misspelt submodule": (MODEL, "lightning_modules.callback.X", ":2: model.class_path: no module 'lightning_modules.callback'; did you mean 'lightning_modules.callbacks'?"),
    "class of the wrong kind": (MODEL, DATA, ":2: model.class_path: tiny_pair.TinyData is not a LightningModule"),
    "function for a class": (MODEL, "os.path.join", ":2: model.class_path: no class 'join' in os.path"),
    "number for a class": (MODEL, "7", ":2: model.class_path: expected a class, got 7"),
    "unknown callback": (EPOCHS, EPOCHS + "  callbacks:\n    - class_path: lightning.pytorch.callbacks.Timr\n", ":12: trainer.callbacks[0].class_path: no class 'Timr' in lightning.pytorch.callbacks; did you mean 'Timer'?"),
    "misspelt callback argument": (EPOCHS, EPOCHS + "  callbacks:\n    - class_path: lightning.pytorch.callbacks.Timer\n      init_args:\n        durations: 1\n", ":14: trainer.callbacks[0].init_args.durations: unknown key; did you mean 'duration'?"),
    "unknown strategy": (EPOCHS, EPOCHS + "  strategy: dpp\n", ":11: trainer.strategy: "),
    "no model": (TINY[: TINY.index("data:")], "", "model: missing; give --config FILE or --model CLASS"),
    "no class": ("  class_path: tiny_pair.TinyModel\n", "", "model.class_path: missing"),
    "tab": (WIDTH, "\twidth: 8\n", ":4: not valid YAML: found character '\\t'"),
    "unclosed bracket": (WIDTH, "    betas: [0.9, 0.99\n", "not valid YAML"),
    "repeated key": (WIDTH, WIDTH + WIDTH, ":5: model.init_args.width: given twice, first on line 4"),
    "missing space after colon": (EPOCHS, "  max_epochs:2\n", "not valid YAML"),
    "linked value of the model": (WIDTH, "    image_size: 5\n", ":4: model.init_args.image_size: 5 differs from the data module's 2; set data.image_size only"),
    "seed of a part": (WIDTH, "    seed: 5\n", ":4: model.init_args.seed: set seed_everything instead"),
    "random seed": ("model:\n", "seed_everything: true\nmodel:\n", ":1: seed_everything: expected int, got True"),
    "unsafe loading": ("model:\n", "weights_only: false\nmodel:\n", ":1: weights_only: must stay true"),
    "list on top": (TINY, "- model\n- data\n", ":1: expected keys such as model: and data:, found a list"),
    "text on top": (TINY, "model\n", "expected keys such as model: and data:, found a single value"),
    "empty": (TINY, "", ": the file is empty"),
    "comments only": (TINY, "# nothing\n", ": the file is empty"),
}


FLAGS = {
    "misspelt flag": (["--model.widht", "3"], "command line: model.init_args.widht: unknown key; did you mean 'width'?"),
    "wrong type": (["--model.lr=quick"], "command line: model.init_args.lr: expected float, got 'quick'"),
    "out of bounds": (["--model.width", "0"], "command line: model.init_args.width=0: must be >= 1"),
    "abbreviation": (["--trainer.max_epoch", "3"], "command line: trainer.max_epoch: unknown key; did you mean 'max_epochs'?"),
    "unknown option": (["--nmae", "x"], "command line: nmae: unknown key; did you mean 'name'?"),
    "missing file": (["--config", "tinny.yaml"], "tinny.yaml: no such file; did you mean 'tiny.yaml'?"),
    "missing folder": (["--config", "no/such.yaml"], "the folder no does not exist either"),
    "no such checkpoint": (["--ckpt_path", "no.ckpt"], "no.ckpt: no such checkpoint"),
    "no such run": (["--resume", "runs/none"], "command line: --resume: runs/none does not exist"),
    "not a run": (["--resume", "."], "--resume: . is not a run directory: it has no config.yaml"),
    "runs_dir is a file": (["--runs_dir", "tiny.yaml"], "cannot create it"),
    "devices": (["--trainer.devices", "0"], "command line: trainer.devices: "),
}


IMAGENET, TEXT_IMAGE = "datamodules.imagenet.ImageNetPixels", "datamodules.text_image.text_image.TextImagePairs"
# (class of the data, an argument, what the line must say)
DATA_MODULES = {
    "missing path": (IMAGENET, "root: data/imagenet", ":8: data.init_args.root=data/imagenet: no such file or folder; "),
    "missing absolute path": (TEXT_IMAGE, "root: /nowhere/at/all", ":8: data.init_args.root=/nowhere/at/all: no such file or folder; "),
    "missing tree": ("datamodules.paired_2d3d.PairedScenes", "root: nowhere", ":8: data.init_args.root=nowhere: no such folder; "),
    "shards of which none lies there": (IMAGENET, "root: 'train-{3..1}.tar'", ":8: data.init_args.root=train-{3..1}.tar: 3..1 runs backwards"),
    "out of range": (IMAGENET, "max_skipped_share: 1.5", ":8: data.init_args.max_skipped_share=1.5: must be 0 .. 1"),
    "out of range with a remedy": (IMAGENET, "predict_count: 0", ":8: data.init_args.predict_count=0: must be >= 1, or null for 10 per class"),
    "out of range within a group": ("datamodules.multiview.MultiviewRays", "views: {gap_steps: -1}", ":8: data.init_args.views.gap_steps=-1: must be >= 0"),
    "several arguments at fault": (IMAGENET, "embedded: digits", ":8: data.init_args.embedded: image_size=28, levels=256, channels=1: the embedded digits are 8 x 8"),
}
# fmt: on


def _check(outcome_code: int, err: str, expected: str) -> None:
    assert outcome_code == 2, err
    assert expected in err
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    assert not re.search(r"\b(\w+): (?:\w+\.)*\1=", err), f"{err} names the key twice"


@pytest.mark.parametrize("case", FILES)
def test_wrong_file(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    old, new, expected = FILES[case]
    assert old in TINY
    write_tiny(tmp_path, TINY.replace(old, new, 1))
    outcome = call("fit", "--config", "tiny.yaml")
    _check(outcome.code, outcome.err, expected)
    assert not list(tmp_path.glob("runs/*/*")), "a failed start must leave no run directory"


@pytest.mark.parametrize("case", DATA_MODULES)
def test_wrong_argument_of_a_data_module(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, argument, expected = DATA_MODULES[case]
    write_tiny(tmp_path, TINY.replace(DATA, name).replace(BATCH, f"    {argument}\n"))
    outcome = call("fit", "--config", "tiny.yaml")
    _check(outcome.code, outcome.err, f"tiny.yaml{expected}")


@pytest.mark.parametrize("case", FLAGS)
def test_wrong_flag(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    flags, expected = FLAGS[case]
    outcome = call("fit", "--config", "tiny.yaml", *flags)
    _check(outcome.code, outcome.err, expected)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["fti"], "command line: fti: unknown subcommand; did you mean 'fit'?"),
        (["--config", "a.yaml"], "the subcommand comes first"),
        (["fit", "--config"], "--config: expected the path of a YAML file"),
        (["test", "--resume"], "--resume: expected a run directory"),
    ],
)
def test_wrong_call(argv: list[str], expected: str) -> None:
    outcome = call(*argv)
    _check(outcome.code, outcome.err, expected)


def test_later_file_is_blamed_for_its_own_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    write_tiny(tmp_path, "# more\nmodel:\n  init_args:\n    lr: x\n", "more.yaml")
    outcome = call("fit", "--config", "tiny.yaml", "--config", "more.yaml")
    _check(outcome.code, outcome.err, "more.yaml:4: model.init_args.lr: expected float, got 'x'")


def test_user_errors_of_a_run_are_one_line_and_bugs_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    outcome = call("fit", "--config", "tiny.yaml", "--data.fail_in_setup", "value")
    assert (outcome.code, outcome.err.strip().splitlines()[-1]) == (1, "labels.txt: 3 of 4 bad")
    assert "Traceback" not in outcome.err
    with pytest.raises(KeyError):
        call("fit", "--config", "tiny.yaml", "--data.fail_in_setup", "bug")
    monkeypatch.setenv("QUINTET_DEBUG", "1")
    with pytest.raises(ValueError, match="3 of 4 bad"):
        call("fit", "--config", "tiny.yaml", "--data.fail_in_setup", "value")
