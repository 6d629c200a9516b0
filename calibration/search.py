"""
The search for the blocks to keep in float, so that INT8 costs no more AP than agreed: `calibration.quantize
--max-ap-drop`.

Greedy: starting with all but the final predictions in INT8, the block that moves the detections most for each of its
multiplications goes to float, then the next, each step measured, until the budget holds. Then back: each kept block,
the largest first, goes to INT8 again where the budget still holds without it. What INT8 costs is no sum over blocks, so
that another set may be smaller still; but the one found is measured to hold.

At the end the products of the final predictions go to INT8, too, their results staying in float, if the budget still
holds and the score at the best F1 does not move.

The drop is measured on the images that the blocks were chosen by, and is a little too good for that: measure the result
on another split.

What was measured is kept in a file beside the model to write, `X.search.json`, until this is there: run again, a search
that was cut off goes on, and one whose budget could not be met takes what it knows for a larger one.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, FrozenSet, List, Mapping, Optional, Sequence, Tuple

from calibration.blocks import Block, blocks_from_graph, count_multiplications
from calibration.images import choose_images
from calibration.measure import ERROR_IMAGES, OutputError, accuracy_numbers, saved, total_error
from calibration.messages import say
from calibration.quantizer import Quantizer
from deploy.ap_drop import Drop
from deploy.contract import ModelContract
from deploy.dataset import CocoSet
from deploy.errors import CalibrationError
from deploy.files import AnyPath, write_json
from deploy.freshness import changed_keys
from deploy.schema import Maybe, Number, read_checked

PREDICTORS = "the products of the final predictions in INT8"
DROP_FIELDS = {**dict.fromkeys(("ap", "drop", "low", "high"), float), "score_shift": Maybe((float, None))}
JOURNAL: Dict[Any, Any] = {
    "key": dict,
    "float_ap": (Number(0, 1.001), None),
    "errors": {str: Number(0)},
    "drops": [{"kept": [str], "int8_predictors": Maybe(bool), **DROP_FIELDS}],
}
"""Table of the file of a `Journal`."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One set of blocks that was tried."""

    change: str
    """The change from the set before, for people."""
    kept: Tuple[str, ...]
    """Names of the blocks in float."""
    float_share: float
    """Share of the multiplications of all blocks that is in float."""
    drop: Drop
    holds: bool
    """Whether the drop is within the budget."""
    int8_predictors: bool = False
    """Whether the products of the final predictions were in INT8."""

    def to_json(self) -> Dict[str, Any]:
        document = dataclasses.asdict(self)
        return {**document, **document.pop("drop")}


class Journal:
    """
    What has been measured so far, in a file that is written after each measurement.

    Args:
        key: what the measurements depend on. Those of another key in the file are left behind, which is said.

    Raises:
        CalibrationError: the file is no JSON, or holds something else.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        self.float_ap: Optional[float] = None
        self.errors: Dict[str, float] = {}
        """Name of each block -> how far it moves the detections when it alone is in INT8."""
        self._key = dict(key)
        self._drops: Dict[Tuple[FrozenSet[str], bool], Drop] = {}
        """By the names of the blocks in float, and whether predictors are in INT8."""
        if path.is_file():
            self._read()

    def drop(self, kept: Sequence[Block], int8_predictors: bool = False) -> Optional[Drop]:
        """The drop of the model with these blocks in float, if it is known."""
        return self._drops.get((frozenset(block.name for block in kept), int8_predictors))

    def add_drop(self, kept: Sequence[Block], drop: Drop, int8_predictors: bool = False) -> None:
        self._drops[frozenset(block.name for block in kept), int8_predictors] = drop
        self._write()

    def add_error(self, block: Block, error: float) -> None:
        self.errors[block.name] = error
        self._write()

    def _read(self) -> None:
        what = "what an earlier search has measured; delete it to begin anew"
        document = read_checked(self.path, JOURNAL, CalibrationError, what)
        changed = changed_keys(document["key"], self._key)
        if changed:
            say(f"{self.path} is of other {', '.join(changed)}: the search begins anew")
            return
        self.float_ap, self.errors = document["float_ap"], document["errors"]
        for row in document["drops"]:
            drop = Drop(**{name: row.get(name) for name in DROP_FIELDS})
            self._drops[frozenset(row["kept"]), row.get("int8_predictors", False)] = drop
        say(f"{self.path}: {len(self._drops)} sets and {len(self.errors)} blocks are known from an earlier run")

    def _write(self) -> None:
        drops = [
            {"kept": sorted(kept), "int8_predictors": predictors, **dataclasses.asdict(drop)}
            for (kept, predictors), drop in self._drops.items()
        ]
        write_json(self.path, {"key": self._key, "float_ap": self.float_ap, "errors": self.errors, "drops": drops})


def journal_path(output: AnyPath) -> Path:
    """`X.search.json` for the model X that is to be written."""
    return Path(f"{output}.search.json")


def blocks_to_keep(
    blocks: Sequence[Block],
    measure: Callable[[Sequence[Block]], Drop],
    find_errors: Callable[[], Mapping[str, float]],
    budget: float,
    nearest: bool = False,
) -> Tuple[List[Block], List[Step]]:
    """
    The blocks to keep in float, and the steps of the search; the last of them that holds is of these blocks.

    Args:
        blocks: all that can be in INT8.
        measure: blocks in float -> the drop of the model with all others in INT8.
        find_errors: name of each block -> how far it moves the detections when it alone is in INT8; called once, and
            only if something has to be kept.
        budget: the largest drop, a fraction.
        nearest: where no set holds, take that of the smallest drop.

    Raises:
        CalibrationError: no set holds but that of all blocks, which would be no INT8 model; unless `nearest`.
    """
    total = sum(block.multiplications for block in blocks)
    steps: List[Step] = []

    def tried(kept: Sequence[Block], change: str) -> Step:
        share, drop = sum(block.multiplications for block in kept) / total, measure(kept)
        step = Step(change, tuple(block.name for block in kept), share, drop, drop.keeps(100 * budget))
        steps.append(step)
        verdict = "holds" if step.holds else "does not hold"
        say(
            f"step {len(steps)}: {change}; {100 * share:.1f} % of the multiplications in float; {drop}; the budget of "
            f"{100 * budget:g} {verdict}"
        )
        return step

    kept: List[Block] = []
    step = tried(kept, "all blocks in INT8")
    if step.holds:
        return kept, steps
    errors = find_errors()
    by_gain = sorted(blocks, key=lambda block: errors[block.name] / block.multiplications, reverse=True)
    for block in by_gain[:-1]:  # with the last one, too, there would be no INT8 left
        kept.append(block)
        step = tried(kept, f"{block.name} in float")
        if step.holds:
            break
    if not step.holds:
        best = min(steps, key=lambda step: step.drop.drop)
        unmet = (
            f"the budget of {100 * budget:g} points of AP cannot be met: the best of {len(steps)} models, with "
            f"{len(best.kept)} of {len(blocks)} blocks in float, has {best.drop}"
        )
        if nearest:
            say(f"{unmet}; it is taken, as the nearest")
            return [block for block in blocks if block.name in best.kept], steps
        raise CalibrationError(
            f"{unmet}. Allow a larger --max-ap-drop, try another --method or more calibration images, or measure on "
            "more images: on few, single boxes decide."
        )
    for block in sorted(kept[:-1], key=lambda block: block.multiplications, reverse=True):  # the last one was needed
        without = [other for other in kept if other is not block]
        if tried(without, f"{block.name} back in INT8").holds:
            kept = without
    return kept, steps


def text_of_result(final: Step, budget_points: float, data: CocoSet) -> str:
    """The result of a search, for people, and how far it can be relied on."""
    predictors = f"with {PREDICTORS}, their results in float: " if final.int8_predictors else ""
    text = f"{predictors}{final.drop}, on {len(data.images)} images of {data.annotations_path}"
    if not final.holds:
        text += f"\nthat is more than the budget of {budget_points:g}, and the nearest to it"
    elif 100 * final.drop.high > budget_points:
        text += f"\nthe interval reaches beyond the budget of {budget_points:g}: on more images it may not hold"
    if final.kept:
        text += (
            f"\nin float for it: {', '.join(final.kept)}, {100 * final.float_share:.1f} % of the multiplications; "
            "chosen by the drop on these very images, which is a little too good for that: measure the model on "
            "another split"
        )
    return text


def kept_for_budget(
    quantizer: Quantizer,
    budget_points: float,
    model_path: Path,
    data: CocoSet,
    contract: ModelContract,
    journal: Journal,
    nearest: bool = False,
) -> Tuple[List[str], Step, Dict[str, Any]]:
    """
    The products to keep in float so that AP drops by no more than the budget; the step of the search that says so;
    and what the sidecar says of the search.

    Args:
        model_path: of the float model.
        data: the images to measure on.
        journal: what it has is not measured again.
        nearest: as `blocks_to_keep`.

    Raises:
        CalibrationError: AP cannot be measured, the float model has none, or the budget cannot be met.
    """
    graph = quantizer.graph()
    blocks = blocks_from_graph(graph, "grouped", count_multiplications(graph, contract))

    def find_errors() -> Dict[str, float]:
        output_error = None
        for number, block in enumerate(blocks, start=1):
            if block.name not in journal.errors:
                if output_error is None:
                    output_error = OutputError(model_path, choose_images(data.images, ERROR_IMAGES, seed=0))
                with saved(quantizer.quantize(quantizer.graph_of(block.products)), contract) as path:
                    journal.add_error(block, total_error(output_error.of(path)))
            say(
                f"block {number}/{len(blocks)}: alone in INT8, {block.name} has an error of "
                f"{100 * journal.errors[block.name]:.2f} %"
            )
        return journal.errors

    with tempfile.TemporaryDirectory() as folder:
        against = Path(folder) / "float.result.json"

        def measure(kept: Sequence[Block], predictors: bool = quantizer.int8_predictors) -> Drop:
            known = journal.drop(kept, predictors)
            if known is not None:
                return known
            if not against.is_file():
                numbers = accuracy_numbers(model_path, data.annotations_path, data.images_dir, output=against)
                journal.float_ap = numbers["AP"]
                if numbers["AP"] == 0:
                    raise CalibrationError(
                        f"the float model {model_path} has AP 0 on {data.annotations_path}; expected one that finds "
                        "something, to see what INT8 costs. Is it trained, and are these images for it?"
                    )
            tried = dataclasses.replace(quantizer, int8_predictors=predictors)
            model = tried.quantize(tried.graph([name for block in kept for name in block.products]))
            with saved(model, contract) as path:
                numbers = accuracy_numbers(path, data.annotations_path, data.images_dir, against=against)
            drop = Drop.from_numbers(numbers, predictors)
            journal.add_drop(kept, drop, predictors)
            return drop

        kept, steps = blocks_to_keep(blocks, measure, find_errors, budget_points / 100, nearest)
        names = {block.name for block in kept}
        final = next(step for step in reversed(steps) if set(step.kept) == names)
        if final.holds and graph.predictors and not quantizer.int8_predictors:
            drop = measure(kept, True)
            with_them = dataclasses.replace(
                final, change=PREDICTORS, drop=drop, holds=drop.keeps(budget_points), int8_predictors=True
            )
            steps.append(with_them)
            final = with_them if with_them.holds else final
            verdict = "they stay there" if with_them.holds else "they go back to float"
            say(f"step {len(steps)}: {PREDICTORS}, their results in float; {drop}; {verdict}")
    return (
        [name for block in kept for name in block.products],
        final,
        {
            "max_ap_drop": budget_points,
            "holds": final.holds,
            "annotations": str(data.annotations_path),
            "num_images": len(data.images),
            "float_ap": journal.float_ap,
            "kept_blocks": list(final.kept),
            "float_share": final.float_share,
            **dataclasses.asdict(final.drop),
            "errors": journal.errors,
            "steps": [step.to_json() for step in steps],
        },
    )
