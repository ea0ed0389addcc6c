"""What the command `quantize` says at its end."""

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from afpq._cli_output import format_change, note, print_json, print_line, print_table

if TYPE_CHECKING:
    from afpq.plan import Plan
    from afpq.quantize import Job, QuantizedModel

__all__ = ["print_dry_run", "print_result"]

_GOAL_MISSED = 3


def print_dry_run(job: "Job", plan: "Plan", *, as_json: bool) -> int:
    """What a plan leads to; returns the exit code."""
    from afpq.packed import file_bytes
    from afpq.quantize import file_size

    size, before = file_size(job, plan), file_bytes(job.model.path)
    if as_json:
        print_json(
            {
                "dry_run": True,
                "budget": job.budget,
                "source_bytes": before,
                "output_bytes": size,
                "plan": json.loads(plan.to_json()),
            }
        )
    else:
        _print_plan(plan)
        if job.plan is None and job.fit is not None:
            print_line(
                "formats by the error of the weights alone: measuring on --calib will move bits between layers, in the "
                "same budget"
            )
        print_line("dry run: nothing measured, nothing written")
        print_line(f"{job.model.path}: {format_change(before, size)}")
    return _goal(job, size, None)


def _print_plan(plan: "Plan") -> None:
    rows = [
        (
            entry.layers[0] + (f" +{len(entry.layers) - 1}" if len(entry.layers) > 1 else ""),
            "float" if entry.format is None else str(entry.format),
            f"{entry.bits_per_weight:.2f}",
            f"{4 * entry.num_weights:,}",
            f"{-(-entry.storage_bits // 8):,}",
            "" if entry.predicted_loss is None else f"{entry.predicted_loss:.2e}",
        )
        for entry in plan.entries
    ]
    columns = ("layer", "format", "bits/w", "before", "bytes", f"loss ({_short(plan.objective)})")
    print_table(columns, rows, left=2)
    print_line()
    print_line(f"{plan.bits_per_weight:.3f} bits per weight, scales included")


def print_result(job: "Job", result: "QuantizedModel", size: int, *, as_json: bool) -> int:
    """What was written, `size` bytes of it; returns the exit code."""
    from afpq.packed import file_bytes

    before = file_bytes(job.model.path)
    code = _goal(job, size, result)
    if as_json:
        print_json({**result.summary(), "goal_met": code == 0})
        return code
    assert result.plan is not None
    _print_plan(result.plan)
    _print_facts(result)
    _print_goal(result)
    print_line(f"{result.path}: {format_change(before, size)}")
    return code


def _print_facts(result: "QuantizedModel") -> None:
    from afpq.report import describe_gain

    facts = result.facts
    summary = result.summary()
    for reason in dict.fromkeys(entry["reason"] for entry in facts.left_float):
        names = [entry["name"] for entry in facts.left_float if entry["reason"] == reason]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        print_line(f"left float: {', '.join(names[:3])}{more}: {reason}")
    for remark in dict.fromkeys(e["remark"] for e in summary["layers"] if e["remark"]):
        count = sum(e["remark"] == remark for e in summary["layers"])
        print_line(f"{count} of {len(summary['layers'])} layers: {remark}")
    if result.plan is not None and result.plan.activations is not None:
        inputs = Counter(e["input_format"] for e in summary["layers"] if e["input_format"])
        print_line("layers read " + ", ".join(f"{name} {n}" for name, n in inputs.most_common()))
    if facts.correction is not None:
        losses = ", ".join(f"{n} {x:.3g}" for n, x in facts.correction["losses"].items())
        print_line(f"kept {facts.correction['kept']} (held-out loss: {losses})")
        for text in facts.correction["notes"]:
            print_line(text)
        if facts.correction["bn_recal"] is not None:
            print_line(f"restoring statistics: {describe_gain(facts.correction['bn_recal'])}")
        if facts.correction["equalization"] is not None:
            gain = facts.correction["equalization"]
            print_line(
                f"equalisation: {describe_gain(gain)}, {'kept' if gain['kept'] else 'not kept'}"
            )
    if facts.accuracy is not None:
        print_line(f"against the float model on {facts.accuracy['num_samples']} held-out samples:")
        for output in facts.accuracy["outputs"]:
            print_line(f"  {output['name']}: {_numbers(output)}")
    print_line(f"the file loads in onnxruntime and ran once: {facts.checks['run_once']}")


def _numbers(output: dict[str, Any]) -> str:
    parts = []
    if output["top1"] is not None:
        parts.append(f"top-1 {100 * output['top1_reference']:.1f} -> {100 * output['top1']:.1f} %")
    if output["agreement"] is not None:
        parts.append(f"agreement {100 * output['agreement']:.1f} %")
    if output["kl"] is not None:
        parts.append(f"KL {output['kl']:.3g}")
    if output["cosine"] is not None:
        parts.append(f"cosine {output['cosine']:.4f}")
    if output["sqnr_db"] is not None:
        parts.append(f"SQNR {output['sqnr_db']:.1f} dB")
    return ", ".join(parts) or output["kind"]


def _print_goal(result: "QuantizedModel | None") -> None:
    goal = None if result is None else result.facts.goal
    if goal is not None:
        print_line(
            f"goal: at most {goal['max_drop']:g} %; {goal['text']}, {len(goal['trials'])} models tried"
        )


def _goal(job: "Job", size: int, result: "QuantizedModel | None") -> int:
    if job.size is not None and size > job.size:
        note(f"error: goal missed: {size:,} bytes, the budget was {job.size:,}")
        return _GOAL_MISSED
    goal = None if result is None else result.facts.goal
    if goal is not None and not goal["met"]:
        note(f"error: goal missed: {goal['text']}, at most {goal['max_drop']:g} % were wanted")
        return _GOAL_MISSED
    if goal is not None and (goal["high"] is None or goal["high"] > goal["max_drop"]):
        note(f"{goal['num_rows']:,} held-out rows cannot exclude a larger drop: more samples would")
    return 0


def _short(objective: str) -> str:
    return {"kl": "KL", "squared_error": "error"}.get(objective, objective.replace("_", " "))
