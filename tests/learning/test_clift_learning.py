"""A short real training of CLiFT on procedural rooms: it must beat showing the nearest view."""

import json
from pathlib import Path

import pytest
import yaml
from calls import call

from lightning_modules.callbacks.token_budgets import TokenBudgets

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "clift" / "demo_stage1.yaml"
STEPS = 400


@pytest.mark.filterwarnings("ignore")
def test_renders_better_than_the_nearest_view(tmp_path: Path) -> None:
    callback = f"{TokenBudgets.__module__}.{TokenBudgets.__qualname__}"
    options = {"shares": [0.125], "view_shares": [0.125], "measure_distance": False}
    content = yaml.safe_load(CONFIG.read_text())
    content["trainer"]["callbacks"] = [{"class_path": callback, "init_args": options}]
    content["trainer"] |= {"max_steps": STEPS, "limit_val_batches": 0}
    content["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    data = content["data"]["init_args"]
    data |= {"procedural_scenes": [512, 24], "cache_dir": str(tmp_path / "rooms")}
    content["model"]["init_args"]["optimisation"]["warmup_steps"] = 20
    config = tmp_path / "short.yaml"
    config.write_text(yaml.safe_dump(content))
    outcome = call("fit", "--config", str(config), "--runs_dir", str(tmp_path / "runs"))
    assert outcome.code == 0, outcome.err
    assert call("test", "--resume", str(tmp_path / "runs/latest")).code == 0
    file = tmp_path / "runs/latest/rate_distortion/rate_distortion.json"
    rows = json.loads(file.read_text())["rows"]
    psnr = {(row["method"], row["rendered_tokens"]): row["psnr"] for row in rows}
    everything = psnr["all tokens", 256]
    assert everything > psnr["nearest view copied", None] + 2.5
    assert everything > psnr["mean of the views", None] + 1
    assert everything > psnr["random tokens", 32] + 0.3
