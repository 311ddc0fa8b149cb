"""A short real training of a selector over the shipped encoder: it must find the text."""

import csv
from pathlib import Path

import pytest
import yaml
from calls import call

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "token_reduction" / "demo.yaml"
STEPS = 150


@pytest.mark.filterwarnings("ignore")
def test_selector_keeps_text_and_lets_the_rest_be_rebuilt(tmp_path: Path) -> None:
    content = yaml.safe_load(CONFIG.read_text())
    content["trainer"]["callbacks"] = []
    content["trainer"] |= {"max_steps": STEPS, "val_check_interval": STEPS}
    content["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    content["data"]["init_args"] |= {"val_size": 256}
    content["model"]["init_args"] |= {"statistics_images": 512}
    config = tmp_path / "short.yaml"
    config.write_text(yaml.safe_dump(content))
    outcome = call("fit", "--config", str(config), "--runs_dir", str(tmp_path / "runs"))
    assert outcome.code == 0, outcome.err
    rows = list(csv.DictReader((tmp_path / "runs/latest/metrics.csv").open()))
    (last,) = [row for row in rows if row["val/nmse_0.3"]]
    assert float(last["val/text_recall_0.3"]) > 0.8, "random tokens keep 0.3 of the text"
    assert float(last["val/nmse_0.5"]) < float(last["val/nmse_0.3"]) < 0.45
    assert 0.05 < float(last["val/keep"]) < 0.6
