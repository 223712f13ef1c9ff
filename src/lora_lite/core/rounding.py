"""What merging loses by rounding to the dtype of the weights: a report, and the limit that a user sets."""

from dataclasses import dataclass

import torch

from ..errors import LoraLiteError

LISTED = 20  # layers that a report prints


@dataclass(frozen=True)
class MergeReport:
    """What rounding to the dtype of the weights lost of each change; prints as a table, the worst layers first.

    lost    {path: |stored - exact| / |exact - base|}, Frobenius norms over weight and bias, against float64
    dtypes  {path: dtype that the merged weight is stored in}
    """

    lost: dict[str, float]
    dtypes: dict[str, torch.dtype]

    @property
    def worst(self) -> float:
        return max(self.lost.values(), default=0.0)

    def __str__(self) -> str:
        rows = sorted(self.lost.items(), key=lambda row: -row[1])
        lines = [f"  {share:8.2g}  {str(self.dtypes[path]).removeprefix('torch.'):9} {path}" for path, share in rows[:LISTED]]
        more = [f"  and {len(rows) - LISTED} more"] if len(rows) > LISTED else []
        return "\n".join([f"{len(rows)} layers merged; share of the change that rounding lost:", *lines, *more])


def refuse_lossy(report: MergeReport, limit: float | None) -> None:
    if limit is None or report.worst <= limit:
        return
    path, above = max(report.lost, key=lambda p: report.lost[p]), [p for p, share in report.lost.items() if share > limit]
    raise LoraLiteError(
        f"Rounding to {str(report.dtypes[path]).removeprefix('torch.')} loses {report.lost[path]:.2g} of the change of {path}, "
        f"and more than limit={limit:g} in {len(above)} of {len(report.lost)} layers.",
        expected="Weights that hold the change, or the adapter beside them.",
        fix=f"ll.merge(model.float(), limit={limit:g})",
    )
