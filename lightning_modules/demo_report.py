"""One page of what runs have shown: their tables, pictures and curves, in a file of its own.

python -m lightning_modules.demo_report runs [RUN ...] --out runs/report.html

The page opens offline and asks nothing of the network. Of a folder of runs it takes the newest of
each name.
"""

from __future__ import annotations

import argparse
import base64
import csv
import importlib.metadata
import io
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from lightning_modules.cli.overview import describe_methods
from lightning_modules.loss_curves import draw_curves_svg
from lightning_modules.run_contents import RunContents, find_runs, read_run
from lightning_modules.text_files import write_text

_ROOT = Path(__file__).resolve().parents[1]
_MOST_PICTURE_BYTES = 3_000_000
_MOST_TABLE_CHARACTERS = 100_000
_SMALL_PICTURE = 128  # pixels; narrower ones stand side by side
_OPEN_METRICS, _OPEN_ROWS = 12, 40
_PACKAGES = ("torch", "lightning", "torchvision")
_STYLE = """\
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --soft: #f3f3f0; --line: #d5d5d0;
  --faint: #666; --train: #0072b2; --val: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e0; --paper: #16181a; --soft: #202327;
  --line: #3a3f44; --faint: #a0a4a8; --train: #56b4e9; --val: #e69f00; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h2 { margin-top: 3rem; border-bottom: 2px solid var(--line); }
h3 { margin: 2rem 0 0; overflow-wrap: anywhere; }
a { color: var(--train); }
nav a { display: inline-block; margin-right: 1rem; padding: .3rem 0; }
.facts { margin: 0; color: var(--faint); font-size: .9rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; background: var(--soft); border: 1px solid var(--line); padding: .5rem; }
pre { margin: 0; font: .75rem/1.25 ui-monospace, monospace; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .5rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; }
figure.small { display: inline-block; margin: .5rem 1rem .5rem 0; }
figure.small img { width: 8rem; image-rendering: pixelated; }
figcaption, summary { color: var(--faint); font-size: .9rem; }
img { max-width: min(100%, 44rem); height: auto; background: #fff; }
svg { width: 100%; max-width: 34rem; height: auto; }
details { margin: 1rem 0; }
"""
# No script, no font, no request: whatever a run's files hold, the page can only show it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(runs: Sequence[RunContents], page: Path) -> None:
    """Write the page, methods and runs in their order here, under its name only when whole."""
    methods = dict.fromkeys(run.method for run in runs)
    sentences = describe_methods(_ROOT)
    links = "".join(
        f'<a href="#{quote(method)}">{escape(_title(method))}</a>' for method in methods
    )
    parts = [f"<nav>{links}</nav>", f"<p class=facts>{escape(_provenance())}</p>"]
    for method in methods:
        own = [run for run in runs if run.method == method]
        parts.append(f'<h2 id="{quote(method)}">{escape(_title(method))}</h2>')
        parts.append(f"<p>{escape(sentences.get(method, ''))}</p>")
        parts += _show_shared_tables(own)
        parts += [part for run in own for part in _show_run(run, page)]
    body = "\n".join(parts)
    write_text(
        page,
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Quintet: what the runs show</title>\n<style>\n{_STYLE}</style></head>\n"
        f"<body>\n<h1>Quintet: what the runs show</h1>\n{body}\n</body></html>\n",
    )


def _title(method: str) -> str:
    return method.replace("_", " ")


def _provenance() -> str:
    """When, on what and with which versions the page was made."""
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    made = time.strftime("%Y-%m-%d %H:%M")
    machine = f"{_processor()}, {os.cpu_count()} cores"
    return f"Page made {made} on {machine}; Python {platform.python_version()}, {versions}."


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _show_run(run: RunContents, page: Path) -> Iterator[str]:
    folder = os.path.relpath(run.path, page.parent.resolve())
    yield f'<h3>{escape(run.name)} <a href="{escape(quote(folder))}/">folder</a></h3>'
    if run.purpose:
        yield f"<p>{escape(run.purpose)}</p>"
    yield f"<p class=facts>{escape(_facts(run))}</p>"
    if run.curves:
        yield f"<figure>{draw_curves_svg(run.curves)}</figure>"
    for table in run.tables:
        yield _show_table(table, str(table.relative_to(run.path)))
    if run.metrics:
        yield _show_metrics(run.metrics)
    yield from _show_pictures(run, page)


def _facts(run: RunContents) -> str:
    trainer, data = run.config.get("trainer") or {}, run.config.get("data") or {}
    facts = [
        f"model {run.config['model']['class_path'].rpartition('.')[2]}",
        f"data {str(data.get('class_path', '?')).rpartition('.')[2]}",
        f"seed {run.config.get('seed_everything')}",
    ]
    for name in ("max_steps", "max_epochs", "accelerator", "devices", "precision"):
        if trainer.get(name) not in (None, "auto", -1):
            facts.append(f"{name} {trainer[name]}")
    if run.seconds is not None:
        facts.append(f"{run.seconds / 60:.1f} minutes from the first file to the last checkpoint")
    return ", ".join(facts)


def _show_metrics(metrics: dict[str, float | None]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{'–' if value is None else f'{value:.4g}'}</td></tr>"
        for name, value in metrics.items()
    )
    state = " open" if len(metrics) <= _OPEN_METRICS else ""
    table = f"<div class=wide><table>{rows}</table></div>"
    return f"<details{state}><summary>{len(metrics)} test metrics</summary>{table}</details>"


def _show_table(file: Path, name: str) -> str:
    text = file.read_text(encoding="utf-8", errors="replace")[:_MOST_TABLE_CHARACTERS]
    if file.suffix == ".csv":
        inner, state = _html_table(text), " open" if text.count("\n") <= _OPEN_ROWS else ""
    else:
        inner, state = f"<pre>{escape(text.rstrip())}</pre>", " open"
    summary = f"<summary>{escape(name)}</summary>"
    return f"<details{state}>{summary}<div class=wide>{inner}</div></details>"


def _html_table(text: str) -> str:
    rows = list(csv.reader(text.splitlines()))
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0]) if rows else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_rounded(cell))}</td>" for cell in row) + "</tr>"
        for row in rows[1:]
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _rounded(cell: str) -> str:
    try:
        return f"{float(cell):.4g}" if "." in cell or "e" in cell else cell
    except ValueError:
        return cell


def _show_pictures(run: RunContents, page: Path) -> Iterator[str]:
    """Every picture once, inside the page; what is too large for that as a link."""
    seen = set()
    for file in run.pictures:
        content = file.read_bytes()
        digest = sha256(content).digest()
        if digest in seen:
            continue
        seen.add(digest)
        name = escape(str(file.relative_to(run.path)))
        caption = f"<figcaption>{name}</figcaption>"
        if len(content) > _MOST_PICTURE_BYTES:
            address = escape(quote(os.path.relpath(file, page.parent.resolve())))
            yield f'<p><a href="{address}">{name}</a> ({len(content) / 1e6:.1f} MB)</p>'
            continue
        kind = "jpeg" if file.suffix == ".jpg" else file.suffix[1:]
        data = base64.b64encode(content).decode("ascii")
        source = f"data:image/{kind};base64,{data}"
        size = " class=small" if _width(content) <= _SMALL_PICTURE else ""
        yield f'<figure{size}><img loading="lazy" alt="{name}" src="{source}">{caption}</figure>'


def _width(picture: bytes) -> float:
    """Width in pixels; infinite if these bytes are no picture."""
    try:
        with Image.open(io.BytesIO(picture)) as image:
            return image.width
    except (OSError, Image.DecompressionBombError):
        return math.inf


def _show_shared_tables(runs: Sequence[RunContents]) -> Iterator[str]:
    """Tables over several runs, which lie beside them."""
    for folder in dict.fromkeys(run.path.parent for run in runs):
        for file in sorted(folder.glob("*.txt")):
            yield f"<h3>{escape(file.stem)}</h3>"
            yield _show_table(file, f"{folder.name}/{file.name}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page of the runs named on the command line."""
    parser = argparse.ArgumentParser(description="One HTML page of what runs have shown.")
    parser.add_argument("runs", type=Path, nargs="+", help="runs, or folders that hold runs")
    parser.add_argument("--out", type=Path, default=Path("runs/report.html"), help="the page")
    parser.add_argument("--newer", type=Path, help="leave out runs older than this file")
    chosen = parser.parse_args(arguments)
    try:
        since = chosen.newer.stat().st_mtime if chosen.newer else 0.0
        found = [run for run in find_runs(chosen.runs) if _start(run) >= since]
        runs = [read_run(run) for run in sorted(found, key=_start)]
        write_report(runs, chosen.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    size = chosen.out.stat().st_size / 1e6
    print(f"page             {chosen.out} ({len(runs)} runs, {size:.1f} MB)")


def _start(run: Path) -> float:
    return (run / "config.yaml").stat().st_mtime


if __name__ == "__main__":
    main()
