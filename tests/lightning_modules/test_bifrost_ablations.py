"""The ablations of Bifrost-1 train from the command line: other queries, latents and models."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import save_file

from lightning_modules.bifrost_frozen import DemoFoundation
from lightning_modules.bifrost_other_foundations import LanguageModelFoundation, OtherTower
from lightning_modules.bifrost_towers import DemoTower, DemoVaeTower, FluxVaeTower
from models.bifrost.flux_latents import encode_images
from models.bifrost.vae_tower import VaeTower
from tests.cli.calls import call
from tests.lightning_modules.bifrost_runs import folder, root
from tests.models.bifrost_networks import llama, qwen2
from tests.models.test_bifrost_prompts import tokenizer
from tests.models.vision_towers import MEAN, STD, build_network

__all__ = ["folder", "root"]

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "bifrost"
TOWERS, FROZEN = "lightning_modules.bifrost_towers", "lightning_modules.bifrost_frozen"
OTHERS = "lightning_modules.bifrost_other_foundations"
ENCODERS = "models.image_encoders.encoders"


@pytest.fixture(scope="module")
def language_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as downloaded."""
    path, chat = tmp_path_factory.mktemp("llama"), tokenizer()
    llama(vocab_size=len(chat)).save_pretrained(path)
    chat.save_pretrained(path)
    return path


def named(module: str, kind: str, **arguments: object) -> dict[str, Any]:
    """A class as a configuration has it."""
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}
    return {"class_path": f"{module}.{kind}", "init_args": plain}


def train_branch(
    tmp_path: Path, root: Path, foundation: dict[str, Any], **model: object
) -> dict[str, Any]:
    """Three steps of stage A through ``train.py``; the checkpoint that is left."""
    content = yaml.safe_load((CONFIGS / "demo_branch.yaml").read_text())
    content["model"]["init_args"] |= {"foundation": foundation, "decoding": {"steps": 2}, **model}
    small = {"root": str(root), "image_size": 16, "batch_size": 8, "eval_batch_size": 8}
    content["data"]["init_args"] |= small
    content["trainer"] |= {"max_steps": 3, "val_check_interval": 3, "callbacks": []}
    content["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump(content))
    outcome = call("fit", "--config", str(path), "--runs_dir", str(tmp_path / "runs"))
    assert outcome.code == 0, outcome.err
    found = tmp_path / "runs" / "latest" / "checkpoints" / "last.ckpt"
    checkpoint: dict[str, Any] = torch.load(found, weights_only=True)
    assert checkpoint["global_step"] == 3
    return checkpoint


def input_width(checkpoint: dict[str, Any]) -> tuple[int, ...]:
    """Shape of the branch's input projection."""
    return tuple(checkpoint["state_dict"]["branch.input_projection.weight"].shape)


def test_learned_queries(folder: Path, root: Path, tmp_path: Path) -> None:
    foundation = named(FROZEN, "DemoFoundation", folder=folder)
    shape, decoding = {"queries": "learned_2d"}, {"steps": 1}
    left = train_branch(tmp_path, root, foundation, shape=shape, decoding=decoding)
    weights = left["state_dict"]
    assert weights["branch.positions"].any(), "the queries are trained"
    assert "branch.mask_token" not in weights


def test_autoencoder_latents_as_bridge(folder: Path, root: Path, tmp_path: Path) -> None:
    """16 x 16 pixels: 8 x 8 latents of 4 channels, 4 x 4 packed ones of 16, 2 x 2 tokens of 64."""
    foundation = named(
        OTHERS,
        "OtherTower",
        foundation=named(FROZEN, "DemoFoundation", folder=folder),
        tower=named(TOWERS, "DemoVaeTower", folder=folder, image_size=16, tokens=4),
    )
    left = train_branch(tmp_path, root, foundation)
    assert input_width(left) == (16, 64)
    assert left["frozen_identities"]["tower"] == DemoVaeTower(folder, 16, 4).identity
    language = DemoFoundation(folder).identities["language_model"]
    assert left["frozen_identities"]["language_model"] == language


def test_tokens_of_the_autoencoder(folder: Path) -> None:
    tower = DemoVaeTower(folder, 16, 4)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae: Any = tower.network
    packed, tokens = encode_images(vae, images), tower(images)
    rows = packed.view(2, 4, 4, 16)
    for row in range(2):
        for column in range(2):
            square = rows[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(tokens[:, 2 * row + column], square.flatten(1))
    assert torch.equal(DemoVaeTower(folder, 16, 16)(images), packed)
    assert tower.identity != DemoVaeTower(folder, 16, 16).identity
    with pytest.raises(ValueError, match=r"^tokens=9: a grid of 3 x 3 must divide"):
        VaeTower(vae, 16, 9)


def test_autoencoder_of_flux(folder: Path, tmp_path: Path) -> None:
    vae: Any = DemoVaeTower(folder, 16, 4).network
    vae.save_pretrained(tmp_path / "flux" / "vae")
    tower = FluxVaeTower(tmp_path / "flux", 16, 4, dtype="float32")
    assert tower.identity == DemoVaeTower(folder, 16, 4).identity
    with pytest.raises(FileNotFoundError, match="no such folder; download black-forest-labs"):
        FluxVaeTower(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["open_clip", "siglip"])
def test_external_image_encoder(kind: str, folder: Path, root: Path, tmp_path: Path) -> None:
    stated: dict[str, object] = {"mean": list(MEAN), "std": list(STD)}
    if kind == "siglip":
        network: Any = build_network("siglip")
        network.save_pretrained(tmp_path / "siglip")
        encoder = named(ENCODERS, "TransformersEncoder", folder=tmp_path / "siglip", **stated)
    else:
        weights = tiny_open_clip(tmp_path)
        encoder = named(ENCODERS, "OpenClipEncoder", name="small", weights=weights, **stated)
    tower = named("models.bifrost.vision_tower", "EncoderTower", encoder=encoder)
    demo = named(FROZEN, "DemoFoundation", folder=folder)
    left = train_branch(tmp_path, root, named(OTHERS, "OtherTower", foundation=demo, tower=tower))
    assert input_width(left) == (16, 24)
    assert left["state_dict"]["latent_mean"].shape == (16, 24)


def tiny_open_clip(folder: Path) -> Path:
    """Weights of "small", a model that open_clip knows from now on."""
    vision = {"image_size": 32, "layers": 2, "width": 24, "head_width": 12, "patch_size": 8}
    text = {"context_length": 4, "vocab_size": 20, "width": 8, "heads": 1, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    (folder / "small.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "small.json")
    model: Any = open_clip.create_model("small")
    save_file(model.state_dict(), folder / "small.safetensors")
    return folder / "small.safetensors"


def test_shipped_configuration_of_a_plain_language_model(
    language_folder: Path, folder: Path, root: Path, tmp_path: Path
) -> None:
    content = yaml.safe_load((CONFIGS / "smollm2_branch.yaml").read_text())
    foundation = content["model"]["init_args"]["foundation"]
    foundation["init_args"]["prompt_length"] = 160  # bytes are tokens here
    foundation["init_args"]["folder"] = str(language_folder)
    foundation["init_args"]["tower"]["init_args"] = {"folder": str(folder)}
    left = train_branch(tmp_path, root, foundation)
    assert input_width(left) == (64, 16), "hidden width of the model, latents of the tower"
    given = (language_folder, DemoTower(folder), 160, False)
    expected = LanguageModelFoundation(*given, dtype="float32").identities
    assert left["frozen_identities"] == expected


@pytest.mark.parametrize("name", ["absent", "absent.gguf"])
def test_missing_language_model_says_what_to_get(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(CONFIGS / "smollm2_branch.yaml")
    outcome = call("fit", "--config", config, f"--model.foundation.folder=weights/{name}")
    assert outcome.code == 2
    [line] = [line for line in outcome.err.splitlines() if f"weights/{name}" in line]
    assert "there is no such fi" in line or "there is no such folder" in line
    assert "download a Llama or Qwen2, such as HuggingFaceTB/SmolLM2-135M-Instruct" in line


def test_packed_language_model_needs_two_packages(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A .gguf file is handed to transformers by its name; what that lacks is named."""

    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    asked: list[tuple[Path, object]] = []

    def refuse(place: Path, **options: object) -> None:
        asked.append((place, options["gguf_file"]))
        raise ImportError("gguf is not installed")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(ValueError, match=r"small\.gguf: pip install gguf accelerate \(gguf is"):
        LanguageModelFoundation(tmp_path / "small.gguf", DemoTower(folder))
    assert asked == [(tmp_path, "small.gguf")]


def test_other_tower_shares_the_language_model(
    folder: Path, language_folder: Path, tmp_path: Path
) -> None:
    demo = DemoFoundation(folder)
    other = OtherTower(demo, DemoTower(folder))
    assert other.language_model is demo.language_model
    assert other.identities == demo.identities
    assert other.text_identity == demo.text_identity
    assert torch.equal(other.prompts(["red bar"]).input_ids, demo.prompts(["red bar"]).input_ids)
    chat = tokenizer()
    qwen2(vocab_size=len(chat)).save_pretrained(tmp_path)
    chat.save_pretrained(tmp_path)
    second = LanguageModelFoundation(tmp_path, DemoTower(folder), 160, dtype="float32")
    first = LanguageModelFoundation(language_folder, DemoTower(folder), 160, dtype="float32")
    assert first.identities["tower"] == second.identities["tower"]
    assert first.identities["language_model"] != second.identities["language_model"]
