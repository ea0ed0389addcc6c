"""The first screen of a report page: the numbers that decide, and what to know before the model is used."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from afpq._drop import Drop, drop_of, share_interval
from afpq._report_charts import interval_bar
from afpq._report_numbers import bytes_text, factor_text, ms_text, number_text, percent_text

__all__ = ["Z95", "headline", "objective_unit", "outputs_table", "remarks"]

Z95 = 1.959963984540054  # half of a 95 % interval in standard errors

_FEW_ROWS = 300
_LARGE_SHARE = 0.5
_FAR_OFF = 3.0
_SIGN = str.maketrans("-", "\u2212")
_UNITS = {
    "kl": "KL, nats",
    "squared_error": "squared error",
    "output_error": "output error",
    "weight_error": "weight error",
}


def headline(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Tiles: label, value, change, detail, and a picture where there is an interval."""
    return [_accuracy(report), _size(report), _speed(report), _bits(report)]


def objective_unit(objective: str | None) -> str:
    """What losses are measured in."""
    return _UNITS.get(objective or "", "loss")


def remarks(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What to know before the model is used: (bad, warn, info or good; text)."""
    found: list[tuple[str, str]] = []
    goal, accuracy = report["goal"], report["accuracy"]
    if goal is not None:
        met = "met" if goal["met"] else "missed"
        kind = "good" if goal["met"] else "bad"
        found.append((kind, f"Goal of at most {goal['max_drop']:g} % {met}: {goal['text']}."))
    found += _accuracy_remarks(report, accuracy)
    found += _layer_remarks(report)
    for what, why in report["not_measured"].items():
        found.append(("info", f"Not measured: {what}; {why}."))
    if report["checks"].get("loaded"):
        ran = report["checks"]["run_once"]
        found.append(("good", f"The written file was loaded in onnxruntime; run once: {ran}."))
    order = ("bad", "warn", "info", "good")
    return sorted(found, key=lambda remark: order.index(remark[0]))


def outputs_table(accuracy: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every number of every output: output, metric, float, packed, and its uncertainty."""
    rows = []
    for output in accuracy["outputs"]:
        for label, before, after, sure in _metrics(output):
            rows.append(
                {
                    "output": output["name"],
                    "metric": label,
                    "before": before,
                    "after": after,
                    "sure": sure,
                }
            )
    return rows


def _metrics(output: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    def half(name: str, factor: float = 1.0) -> str:
        stderr = output.get(name)
        return "" if stderr is None else f"\u00b1 {number_text(Z95 * factor * stderr)}"

    def share_range(share: float) -> str:
        rows = output["num_rows"]
        low, high = share_interval(round(share * rows), rows)
        return f"{low:.1f} to {high:.1f} %"

    def known(name: str) -> float | None:
        value = output.get(name)
        return None if value is None else float(value)

    rows: list[tuple[str, str, str, str]] = []
    top1, reference = known("top1"), known("top1_reference")
    if top1 is not None and reference is not None:
        rows.append(
            ("top-1 accuracy", percent_text(reference), percent_text(top1), share_range(top1))
        )
        lost, gained = output["top1_lost"], output["top1_gained"]
        rows.append(("right in one only", f"{lost} samples", f"{gained} samples", ""))
    top5, reference = known("top5"), known("top5_reference")
    if top5 is not None and reference is not None:
        rows.append(("top-5 accuracy", percent_text(reference), percent_text(top5), ""))
    value = known("agreement")
    if value is not None:
        rows.append(("same answer", "", percent_text(value), share_range(value)))
    value = known("kl")
    if value is not None:
        sure = half("kl_stderr")
        rows.append(("KL divergence from float", "", f"{number_text(value)} nats", sure))
    value = known("relative_error")
    if value is not None:
        sure = half("relative_error_stderr", 100)
        rows.append(("error energy", "", f"{number_text(100 * value)} %", sure))
    value, worst = known("cosine"), known("cosine_min")
    if value is not None:
        least = "" if worst is None else f"least {worst:.5f}"
        rows.append(("cosine with float", "", f"{value:.5f}", least))
    value = known("sqnr_db")
    if value is not None:
        rows.append(("SQNR", "", f"{value:.1f} dB", ""))
    if not rows:
        rows.append((f"{output['kind']}: not compared", "", "", output["note"]))
    return rows


def _tile(
    label: str, value: str, change: str = "", detail: str = "", picture: str = ""
) -> dict[str, str]:
    return {"label": label, "value": value, "change": change, "detail": detail, "picture": picture}


def _accuracy(report: Mapping[str, Any]) -> dict[str, str]:
    accuracy = report["accuracy"]
    if accuracy is None:
        return _tile("Accuracy", "not measured", "no samples were given")
    drop = drop_of(accuracy["outputs"])
    if drop is None:
        return _tile("Accuracy", "not comparable", "no output has classes or values to compare")
    output = next(o for o in accuracy["outputs"] if o["name"] == drop.output)
    limit = None if report["goal"] is None else report["goal"]["max_drop"]
    high = drop.high if drop.high != float("inf") else drop.percent
    picture = interval_bar(drop.percent, drop.low, high, limit)
    detail = f"{drop.num_rows:,} rows"
    if len(accuracy["outputs"]) > 1:
        detail += f", worst of {len(accuracy['outputs'])} outputs: {drop.output}"
    if output["kl"] is not None:
        detail += f"; KL {number_text(output['kl'])} \u00b1 {number_text(Z95 * (output['kl_stderr'] or 0))} nats"
    if drop.metric == "top1":
        value = f"{percent_text(output['top1_reference'])} \u2192 {percent_text(output['top1'])}"
        half = (drop.high - drop.low) / 2
        moved = f"{-drop.percent:+.2f}".translate(_SIGN) if drop.percent else "0.00"
        change = f"{moved} \u00b1 {number_text(half)} points"
        return _tile("Top-1 accuracy", value, change, detail, picture)
    if drop.metric == "agreement":
        low, top = 100 - drop.high, 100 - drop.low
        change = f"95 %: {low:.1f} to {top:.1f} %"
        return _tile(
            "Same answer as float", percent_text(output["agreement"]), change, detail, picture
        )
    sqnr = output["sqnr_db"]
    value = "equal" if sqnr is None else f"{sqnr:.1f} dB SQNR"
    return _tile("Outputs against float", value, _error_text(drop), detail, picture)


def _error_text(drop: Drop) -> str:
    half = (drop.high - drop.low) / 2
    sure = "" if half == float("inf") else f" \u00b1 {number_text(half)}"
    return f"error energy {number_text(drop.percent)}{sure} %"


def _size(report: Mapping[str, Any]) -> dict[str, str]:
    size = report["size"]
    before, after, what = size["source_bytes"], size["output_bytes"], "the whole file"
    if before is None:
        before, after = size["quantizable_weights_before_bytes"], size["packed_weights_bytes"]
        what = "packed weights alone; the float file is not known"
    smaller = before / max(after, 1)
    value = (
        f"{factor_text(smaller)} smaller" if smaller >= 1 else f"{factor_text(1 / smaller)} LARGER"
    )
    return _tile("Size", value, f"{bytes_text(before)} \u2192 {bytes_text(after)}", what)


def _speed(report: Mapping[str, Any]) -> dict[str, str]:
    speed = report["speed"]
    if speed is None:
        return _tile("Speed on this machine", "not measured", "")
    now = speed["model"]
    environment = report["environment"]
    cores = speed["threads"]
    threads = f"{cores} thread{'' if cores == 1 else 's'}"
    runs = f"{speed['rounds']} interleaved runs, input {speed['inputs']}"
    detail = f"{environment['processor']}, {environment['isa']}, {threads}, {runs}"
    if speed["reference"] is None:
        change = f"10\u201390 %: {ms_text(now['p10_ms'])} to {ms_text(now['p90_ms'])}"
        return _tile("Speed on this machine", ms_text(now["median_ms"]), change, detail)
    ratio = speed["ratio"]
    slower = ratio["median"] > 1
    ends = [ratio[k] if slower else 1 / ratio[k] for k in ("median", "p10", "p90")]
    low, high = sorted(ends[1:])
    value = f"{factor_text(ends[0])} {'slower' if slower else 'faster'}"
    times = f"{ms_text(speed['reference']['median_ms'])} \u2192 {ms_text(now['median_ms'])}"
    change = f"{times}, 10\u201390 %: {factor_text(low)} to {factor_text(high)}"
    return _tile("Speed on this machine", value, change, detail)


def _bits(report: Mapping[str, Any]) -> dict[str, str]:
    bits = report["size"]["bits_per_weight"]
    if bits is None:
        return _tile("Bits per weight", "none", "nothing is packed")
    counts = Counter(e["bits"] for e in report["layers"] if not e["shared_with"])
    detail = "layers by width: " + ", ".join(f"{n}\u00d7{b} bit" for b, n in sorted(counts.items()))
    budget = "" if report["budget"] is None else f"budget: {report['budget']}"
    return _tile("Bits per weight", f"{bits:.3f}", budget or "scales included", detail)


def _accuracy_remarks(
    report: Mapping[str, Any], accuracy: Mapping[str, Any] | None
) -> list[tuple[str, str]]:
    if accuracy is None:
        known = (
            ""
            if report["objective"] != "weight_error"
            else ": formats follow from weight error alone"
        )
        return [
            ("bad", f"Accuracy was not measured{known}. Check it with afpq compare before use.")
        ]
    found = []
    drop = drop_of(accuracy["outputs"])
    if drop is not None and drop.num_rows < _FEW_ROWS:
        unit = {"top1": "points of top-1", "agreement": "% of answers", "error": "% of energy"}[
            drop.metric
        ]
        most = "any drop" if drop.high == float("inf") else f"a drop of {drop.high:.2g} {unit}"
        found.append(
            (
                "warn",
                f"Only {drop.num_rows} rows judged it: they cannot exclude {most}. afpq compare on more samples can.",
            )
        )
    kl = next((o["kl"] for o in accuracy["outputs"] if o["kl"] is not None), None)
    predicted = report["predicted_loss"]
    if report["objective"] == "kl" and kl and predicted and kl > _FAR_OFF * predicted:
        found.append(
            (
                "warn",
                f"The loss is {factor_text(kl / predicted)} what the plan predicted: the frontier is optimistic.",
            )
        )
    return found


def _layer_remarks(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    layers = report["layers"]
    speed = report["speed"]
    if speed is not None and speed["ratio"] is not None and speed["ratio"]["p10"] > 1:
        found.append(
            (
                "warn",
                f"Slower than float here, in nine of ten runs: {factor_text(speed['ratio']['median'])} the time.",
            )
        )
    slow = [e for e in layers if e["remark"]]
    if slow:
        shares = [e["time_share"] for e in slow if e["time_share"] is not None]
        taken = f", {percent_text(sum(shares))} of the time" if shares else ""
        found.append(
            ("info", f"{len(slow)} of {len(layers)} layers run off the integer path{taken}.")
        )
    stay = sum(t["nbytes"] for t in report["float_tensors"])
    if stay:
        share = stay / max(report["size"]["output_bytes"], 1)
        found.append(
            (
                "info",
                f"{_count(len(report['float_tensors']), 'float constant')} left: {bytes_text(stay)}, "
                f"{percent_text(share)} of the file.",
            )
        )
    if report["left_float"]:
        found.append(
            (
                "info",
                f"{_count(len(report['left_float']), 'weight')} left float; the reasons are below.",
            )
        )
    losses = [(e["predicted_loss"] or 0.0, e["name"]) for e in layers if not e["shared_with"]]
    total = sum(loss for loss, _ in losses)
    if len(losses) > 2 and total and max(losses)[0] > _LARGE_SHARE * total:
        loss, name = max(losses)
        found.append(
            (
                "info",
                f"{name} alone makes {percent_text(loss / total)} of the predicted loss: a wider format there "
                "helps most.",
            )
        )
    return found


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
