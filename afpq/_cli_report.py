"""The command `report`: what can be found out about packed models, on a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from afpq._cli_output import (
    StageProgress,
    check_output,
    check_report_suffix,
    data_options,
    print_line,
    read_plan,
    threads_option,
)
from afpq.errors import PlanError

if TYPE_CHECKING:
    from afpq.packed import PackedModel
    from afpq.plan import Plan

__all__ = ["report"]

_FILE = click.Path(path_type=Path)


@click.command(short_help="Write a report of packed models.")
@click.argument("models", type=_FILE, nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "-o",
    "--output",
    type=_FILE,
    help="R.html, R.md or R.json; MODEL.html in this folder if not given.",
)
@click.option("--reference", type=_FILE, help="The float model, to compare with.")
@click.option(
    "--plan",
    "plans",
    type=_FILE,
    multiple=True,
    help="A plan that a model was made by, for the predicted losses. May be repeated.",
)
@click.option("--data", metavar="SRC", help="Samples to compare on; needs --reference.")
@data_options
@click.option(
    "--bench/--no-bench",
    default=True,
    help="Time the models on this machine, a second or two each (default).",
)
@click.option("--force", is_flag=True, help="Replace an existing report.")
@threads_option
def report(
    models: tuple[Path, ...],
    *,
    output: Path | None,
    reference: Path | None,
    plans: tuple[Path, ...],
    data: str | None,
    preprocess: str | None,
    samples: int | None,
    bench: bool,
    force: bool,
    threads: int,
) -> None:
    """Write a report of packed models, several side by side: accuracy, sizes, speed, formats, what stayed float.

    What a file alone does not tell is left out: the float model (--reference), samples (--data) and the plan (--plan)
    add accuracy, losses of single layers, the weights over their codebooks, and other budgets.

    \b
    Examples:
      afpq report small.onnx -o r.html --reference model.onnx --data test.npz
      afpq report a.onnx b.onnx c.onnx -o r.html
    """
    from afpq.packed import read_packed
    from afpq.report import build_report, write_report

    output = Path(models[0].with_suffix(".html").name) if output is None else output
    check_report_suffix(output)
    check_output(output, force=force, sources=[*models, reference, *plans])
    if data is not None and reference is None:
        raise click.UsageError("--data needs --reference")
    if data is None and (preprocess is not None or samples is not None):
        raise click.UsageError("--preprocess and --samples need --data")
    packed = [read_packed(path) for path in models]
    found = _match_plans(plans, packed)
    with StageProgress() as progress:
        context = _Context(reference, data, preprocess, samples, threads, bench, progress)
        facts = [context.facts(p, plan) for p, plan in zip(packed, found, strict=True)]
    reports = [build_report(p, f) for p, f in zip(packed, facts, strict=True)]
    write_report(reports if len(reports) > 1 else reports[0], output)
    print_line(f"{output}: report of {', '.join(map(str, models))}")


class _Context:
    """What is common to all models of a report."""

    def __init__(
        self,
        path: Path | None,
        data: str | None,
        preprocess: str | None,
        samples: int | None,
        threads: int,
        timed: bool,
        progress: StageProgress,
    ) -> None:
        self._threads, self._timed, self._progress = threads, timed, progress
        self._reference, self._source, self._feeds = None, None, None
        if path is None:
            return
        from afpq._examine import Reference
        from afpq.data import open_data
        from afpq.graph import load_model
        from afpq.packed import file_bytes
        from afpq.report import file_facts

        model = load_model(path)
        self._source = file_facts(path, file_bytes(path))
        opened = None
        if data is not None:
            opened = open_data(data, model.inputs, preprocess=preprocess, limit=samples)
            self._feeds = next(opened.batches(1))
        self._reference = Reference(model, opened, data or "")

    def facts(self, packed: "PackedModel", plan: "Plan | None") -> Any:
        """Everything that can be told and measured of one model."""
        from afpq._examine import examine
        from afpq.evaluate import compare
        from afpq.report import RunFacts, accuracy_facts, layer_facts

        known: dict[str, Any] = {"source": self._source}
        if plan is not None:
            known["layers"] = layer_facts(plan.entries)
            known["objective"], known["predicted_loss"] = plan.objective, plan.predicted_loss
            known["frontier"] = plan.frontier
        if self._reference is not None and self._reference.data is not None:
            result = compare(
                self._reference.model.path,
                packed.path,
                self._reference.data,
                threads=self._threads,
                progress=self._progress,
            )
            known["accuracy"] = accuracy_facts(result.to_dict(), self._reference.data_name)
        return examine(
            packed,
            RunFacts(**known),
            reference=self._reference,
            feeds=self._feeds,
            threads=self._threads,
            timed=self._timed,
            progress=self._progress,
        )


def _match_plans(paths: Sequence[Path], packed: Sequence["PackedModel"]) -> list["Plan | None"]:
    """The plan of every model, found by the hash that its file holds.

    Raises:
        PlanError: a plan is not that of any model.
    """
    hashes = [model.metadata.get("afpq.plan_hash") for model in packed]
    plans: dict[str, Plan] = {}
    for path in paths:
        plan = read_plan(path)
        if plan.plan_hash not in hashes:
            names = " or ".join(str(model.path) for model in packed)
            raise PlanError(f"{path}: not the plan that {names} was made by")
        plans[plan.plan_hash] = plan
    return [plans.get(name or "") for name in hashes]
