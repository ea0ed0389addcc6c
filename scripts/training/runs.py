"""Runs of training experiments: each one once, several at a time, kept in results/training.json as they end."""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from afpq.train import Recipe
from speed.machine import facts

from .tasks import DATA, TASKS, Outcome, device_of

ROOT = Path(__file__).resolve().parents[2]
JSON = ROOT / "results" / "training.json"
MARKDOWN = ROOT / "results" / "training.md"


@dataclass(frozen=True)
class Case:
    """One row of a paper's table: a task, trained by a recipe."""

    task: str
    name: str
    recipe: Recipe


def _run(case: Case, seed: int, epochs: int) -> tuple[Outcome, float]:
    torch.set_num_threads(1)
    begin = time.perf_counter()
    outcome = TASKS[case.task].run(case.recipe, seed, epochs)
    return outcome, time.perf_counter() - begin


def _gpu(case: Case) -> dict[str, str]:
    device = device_of(case.recipe)
    return {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}


def read_results() -> dict:
    return json.loads(JSON.read_text()) if JSON.exists() else {"runs": {}, "sections": {}}


def write_results(results: dict) -> None:
    JSON.parent.mkdir(exist_ok=True)
    temporary = JSON.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    temporary.replace(JSON)
    head = ["# Training in emulated small floats", ""]
    head += ["Made by `scripts/reproduce_*`; every section names its command.", ""]
    sections = [results["sections"][key] for key in sorted(results["sections"])]
    MARKDOWN.write_text("\n".join([*head, *sections]))


def _key(case: Case, seed: int, epochs: int) -> str:
    other = f"{DATA.name}: " if "AFPQ_TRAINING_DATA" in os.environ else ""
    return f"{other}{case.task}/{case.name}/{epochs} epochs/seed {seed}"


def options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="only these")
    parser.add_argument("--epochs", type=int, help="of every task, in place of its own number")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-j", "--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--again", action="store_true", help="repeat runs that are there")
    return parser.parse_args()


def run_cases(cases: Sequence[Case], chosen: argparse.Namespace) -> dict:
    """Runs what results/training.json lacks of the cases' tasks that are chosen and have data; returns all results."""
    results = read_results()
    missing = []
    for case in cases:
        task = TASKS[case.task]
        if chosen.tasks and case.task not in chosen.tasks:
            continue
        if not task.available():
            print(f"{case.task}: no data, left out", file=sys.stderr)
            continue
        for seed in range(chosen.seeds):
            key = _key(case, seed, chosen.epochs or task.epochs)
            if chosen.again or key not in results["runs"]:
                missing.append((key, case, seed, chosen.epochs or task.epochs))
    about = {**facts(), "torch": torch.__version__}  # what a result depends on besides its recipe
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, chosen.jobs), context) as pool:
        running = {
            pool.submit(_run, case, seed, epochs): (key, {**about, **_gpu(case)})
            for key, case, seed, epochs in missing
        }
        for done in as_completed(running):
            outcome, seconds = done.result()
            key, place = running[done]
            print(f"{key}: {outcome} in {seconds:.0f} s", file=sys.stderr, flush=True)
            results = read_results()  # another script may have written
            results["runs"][key] = {**asdict(outcome), "seconds": round(seconds, 1), **place}
            write_results(results)
    return results


def table(results: dict, cases: Sequence[Case], chosen: argparse.Namespace) -> str:
    """Mean, deviation of a run and distance to float32 (with the same seeds) of every case that has runs; below it what
    they ran on."""
    lines = ["| task | epochs | recipe | runs | result | spread | against float32 | skipped |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    places = set()
    for case in cases:
        task = TASKS[case.task]
        epochs = chosen.epochs or task.epochs

        def found(name: str, case: Case = case, epochs: int = epochs) -> dict[int, dict]:
            keys = {s: _key(Case(case.task, name, case.recipe), s, epochs) for s in range(99)}
            return {s: results["runs"][key] for s, key in keys.items() if key in results["runs"]}

        runs, base = found(case.name), found("float32")
        if not runs:
            continue
        places |= {_place(run) for run in runs.values()}
        values = [r["value"] for r in runs.values()]
        digits = 2 if task.higher_is_better else 3
        spread = f"{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        gaps = [runs[s]["value"] - base[s]["value"] for s in runs if s in base]
        gap = f"{statistics.fmean(gaps):+.{digits}f}" if gaps else ""
        lines.append(
            f"| {case.task} | {epochs} | {case.name} | {len(values)} | "
            f"{statistics.fmean(values):.{digits}f} {task.unit} | {spread} | {gap} | "
            f"{sum(r['skipped'] for r in runs.values())} |"
        )
    return "\n".join([*lines, "", *sorted(places)])


def _place(run: dict) -> str:
    gpu = f" and {run['gpu']}" if "gpu" in run else ""
    return (
        f"Ran on {run['machine']}{gpu}, {run['isa']}, torch {run['torch']}, commit {run['commit']}."
    )


def write_section(key: str, title: str, text: str) -> None:
    results = read_results()
    results["sections"][key] = f"## {title}\n\n{text}\n"
    write_results(results)
    print(results["sections"][key])
