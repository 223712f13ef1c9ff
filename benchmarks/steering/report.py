"""What a record of the steering example says: table, plot and sentences of docs/steering.md; no figure is from elsewhere."""

import io
import textwrap
from typing import Any

from rich.table import Table


def values(record: dict[str, Any], kind: str, name: str) -> list[list[float]]:
    """[coefficient][seed] of one score."""
    return [
        list(column) for column in zip(*([row[name] for row in run["rows"]] for run in record["curves"][kind]), strict=True)
    ]


def mean(column: list[float]) -> float:
    return sum(column) / len(column)


def at(record: dict[str, Any], kind: str, coeff: float, name: str) -> float:
    """A score at one coefficient, mean over the seeds."""
    return mean(values(record, kind, name)[record["settings"]["coeffs"].index(coeff)])


def table(record: dict[str, Any]) -> Table:
    blocks, held_out = record["blocks"], record["data"]["held_out"]
    seeds = len(record["settings"]["seeds"])
    made = Table(
        title=f"{record['rule']['meaning']}: {record['variant']}, blocks {blocks[0]} to {blocks[-1]}",
        caption=f"P: mean log2 P(backquote) at {held_out['places_due']} places where mark-up opens (due) and at "
        f"{held_out['places_otherwise']} where it does not; KL(base || steered) and bits per byte (bpb) on "
        f"{held_out['counted_bytes']:,} other bytes; rand: mean of {seeds} draws of random directions; "
        "var: the directions of the largest variance",
        title_justify="left",
        caption_justify="left",
    )
    for head in ("coeff", "P due", "rand", "var", "P not", "KL", "rand", "var", "bpb"):
        made.add_column(head, justify="right", no_wrap=True)
    for coeff in record["settings"]["coeffs"]:
        due, kl = ([at(record, kind, coeff, name) for kind in ("contrast", "random", "variance")] for name in ("due", "kl"))
        otherwise, bits = (at(record, "contrast", coeff, name) for name in ("otherwise", "bits_per_byte"))
        made.add_row(f"{coeff:g}", *(f"{v:.2f}" for v in (*due, otherwise)), *(f"{v:.3f}" for v in (*kl, bits)))
    return made


def plot(record: dict[str, Any]) -> bytes:
    """Left: the property over coeff. Right: the harm elsewhere."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    coeffs, seeds = record["settings"]["coeffs"], len(record["settings"]["seeds"])
    names = {
        "contrast": ("difference of means", "C0"),
        "variance": ("largest variance", "C1"),
        "random": (f"random, {seeds} seed{'s' if seeds > 1 else ''}", "0.5"),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axes, name in ((left, "due"), (right, "kl")):
        axes.axvspan(0, 1, color="0.95", zorder=0)
        for kind, (label, colour) in names.items():
            columns = values(record, kind, name)
            axes.plot(coeffs, [mean(c) for c in columns], "o-", color=colour, markersize=4, label=label)
            if len(columns[0]) > 1:
                axes.fill_between(coeffs, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.25, lw=0)
        axes.set_xlabel("coeff  (0: the base model; 1: the direction removed)")
        axes.spines[["top", "right"]].set_visible(False)
    otherwise = [mean(c) for c in values(record, "contrast", "otherwise")]
    left.plot(coeffs, otherwise, "s--", color="C0", markersize=3, label="difference of means, where none opens")
    left.set_ylabel("log2 P(backquote), bits,\nwhere mark-up in backquotes opens")
    right.set_ylabel("harm on the rest of the text:\nKL(base || steered), bits per byte")
    left.set_ylim(top=0)
    right.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=8)
    blocks = record["blocks"]
    figure.suptitle(
        f"{record['variant']} on the writers of blocks {blocks[0]} to {blocks[-1]}; shaded: where no layer's output can grow",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    plt.close(figure)
    return buffer.getvalue()


def summary(record: dict[str, Any]) -> str:
    """The sentences of docs/steering.md."""
    base, blocks, low = record["base"], record["blocks"], min(record["settings"]["coeffs"])
    rows, held_out = record["data"]["calibration"]["rows_positive"], record["data"]["held_out"]
    error = {row["coeff"]: row["due_change_error"] for row in record["curves"]["contrast"][0]["rows"]}

    def moved(kind: str, coeff: float, name: str = "due") -> str:
        return f"{at(record, kind, coeff, name) - base[name]:+.2f}"

    def kl(kind: str, coeff: float = 1.0) -> str:
        return f"{at(record, kind, coeff, 'kl'):.3f}"

    sentences = (
        "`just steering` takes each layer's difference of mean outputs before mark-up in backquotes and before plain words",
        f"({rows} passages of training prose each). `{record['variant']}` removes it from the layers of blocks",
        f"{blocks[0]} to {blocks[-1]}, chosen on validation prose, that write to the residual stream. Where such mark-up",
        f"opens in held-out prose ({held_out['places_due']} places), log2 P(backquote) goes from {base['due']:.2f} by",
        f"{moved('contrast', 1.0)} ± {error[1.0]:.2f} bits at coeff 1 and by {moved('contrast', low)} ± {error[low]:.2f}",
        f"at {low:g}. Removing random directions moves it by {moved('random', 1.0)}, those of the largest variance by",
        f"{moved('variance', 1.0)}. The harm on {held_out['counted_bytes']:,} other bytes is a KL of {kl('contrast')} bits per",
        f"byte at 1, {kl('contrast', low)} at {low:g} (at 1 random {kl('random')}, variance {kl('variance')}); before plain",
        f"words log2 P(backquote), {base['otherwise']:.2f}, moves by {moved('contrast', 1.0, 'otherwise')} and",
        f"{moved('contrast', low, 'otherwise')} ([record](../benchmarks/results/steering.json)).",
    )
    return textwrap.fill(" ".join(sentences), 125, break_long_words=False, break_on_hyphens=False)
