"""The summary as a table."""

from collections.abc import Mapping

from cream.evaluation.rewards.rows import PAIRED
from cream.evaluation.statistics import aligned

NAMES = {"ece": "ECE", "ece_equal_mass": "ECE, equal mass", "mce": "MCE", "brier": "Brier", "nll": "NLL, nats"}
NAMES |= {"auroc": "AUROC of confidence"} | {f"accuracy_at_{n}": f"accuracy, most certain {n} %" for n in (100, 80, 50)}


def format_summary(summary: Mapping) -> str:
    """Accuracies and scores in percent, correlations and errors as they are, each with its 95 % interval and n."""
    lines = [["", "value", "95 % interval", "n"], *_scores(summary)]
    calibration = summary["calibration"]
    lines += [_line(NAMES[name], value) for name, value in calibration["all"].items()]
    if (temperature := calibration.get("temperature")) is not None:
        lines.append(["temperature", f"{temperature:.3g}", "", str(calibration["fitted_on"])])
        for name in ("ece", "nll"):
            for when in ("before", "after"):
                lines.append(_line(f"{NAMES[name]}, held out, {when}", calibration[f"held_out_{when}"][name]))
    for name, value in summary["length"].items():
        if isinstance(value, Mapping):
            lines.append(_line(f"length: {name.replace('_', ' ')}", value))
    text = aligned(lines)
    for reason, count in summary["unrewarded"]["reasons"].items():
        text += f"\n{count} of {summary['responses']} responses have no reward, so that their pairs are wrong: {reason}"
    if summary["most_responses"] > PAIRED:
        text += f"\npairs are of the first {PAIRED} responses to a prompt; best-of-N is of all"
    if best := summary.get("best_of_n", {}).get("by_n"):
        text += f"\n\n{_best_of_n(best)}"
    return text


def _scores(summary: Mapping) -> list[list[str]]:
    title, lines = summary["benchmark"], []
    for key, words in (("score", f"{title} score"), ("score_of_this_subset", f"score of a subset of {title}")):
        for name, value in summary.get(key, {}).items():
            lines.append(_line(words + name.removeprefix("score").replace(" with", ", with"), value, 100))
    for kind, words in (("all", "all pairs"), ("sections", ""), ("prior", "prior sets"), ("subsets", "  ")):
        for name, value in summary.get(kind, {}).items():
            if kind == "subsets" and name == "all" and len(summary[kind]) == 1:
                continue
            note = f" ({value['n']} of {value['of']} rows)" if value.get("of", value["n"]) != value["n"] else ""
            label = words if kind in ("all", "prior") else f"{words}{name}{note}"
            lines.append(_line(label, value, 100))
    lines += [_line(f"{name}, % right", value, 100) for name, value in summary.get("length_groups", {}).items()]
    return lines


def _line(label: str, value: Mapping, scale: int = 1) -> list[str]:
    if value["value"] is None:
        return [label, "not defined", "", str(value["n"])]
    return [label, _number(value["value"], scale), _interval(value, scale), str(value["n"])]


def _number(value: float, scale: int) -> str:
    return f"{scale * value:.1f}" if scale > 1 else f"{value:.3f}"


def _interval(value: Mapping, scale: int) -> str:
    return "" if value["low"] is None else f"{_number(value['low'], scale)} to {_number(value['high'], scale)}"


def _best_of_n(rows: list[Mapping]) -> str:
    names = [name for name, value in rows[0].items() if isinstance(value, Mapping)]
    lines = [["N", "KL, nats", *(name.replace("_", " ") for name in names)]]
    for row in rows:
        cells = [f"{own['value']:.3f} ({_interval(own, 1)})" if (own := row[name])["value"] is not None else "–"
                 for name in names]  # fmt: skip
        lines.append([str(row["n"]), f"{row['kl']:.3f}", *cells])
    return aligned(lines)


def format_comparison(found: Mapping) -> str:
    """B minus A in points."""
    lines = [["B - A", "A %", "B %", "points", "95 % interval", "only A right", "only B right", "McNemar p"]]
    for kind in ("score", "all", "sections", "prior", "length_groups", "subsets"):
        for name, row in found.get(kind, {}).items():
            if row["low"] is None:
                continue
            cells = [f"{100 * row[key]:.1f}" for key in ("a", "b")]
            cells += [f"{100 * row['value']:+.1f}", f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"]
            tests = [str(row["only_a"]), str(row["only_b"]), f"{row['p']:.2g}"] if "p" in row else ["", "", ""]
            lines.append([f"{'  ' * (kind == 'subsets')}{name}", *cells, *tests])
    return aligned(lines)
