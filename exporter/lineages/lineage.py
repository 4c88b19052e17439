"""What a lineage of checkpoints is: the names its authors gave to the tensors of a RepVGG.

Canonical names, which everything after this point uses:

    stage0.0, stage1.0, stage1.1, ...                           the blocks; stage0 has one
      .dense.weight  .pointwise.weight                          the 3x3 and the 1x1 branch
      .dense.bn.*  .pointwise.bn.*  .identity.bn.*              * = weight, bias, running_mean, running_var
      .fused.weight  .fused.bias                                the one convolution of the deployed form
      .se.reduce.{weight,bias}  .se.expand.{weight,bias}        squeeze-and-excitation, before the ReLU
    head.weight  head.bias                                      the classifier after global average pooling
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
BRANCH_TENSORS = {
    "dense": ("dense.weight", *(f"dense.bn.{name}" for name in BATCH_NORM)),
    "pointwise": ("pointwise.weight", *(f"pointwise.bn.{name}" for name in BATCH_NORM)),
    "identity": tuple(f"identity.bn.{name}" for name in BATCH_NORM),
}
FUSED_TENSORS = ("fused.weight", "fused.bias")
SE_TENSORS = ("se.reduce.weight", "se.reduce.bias", "se.expand.weight", "se.expand.bias")
HEAD_TENSORS = ("head.weight", "head.bias")
COUNTER = "num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class Lineage:
    """One family of tensor names.

    Attributes:
        name: how the family is called in messages.
        title: a longer name, for tables.
        source: where the names come from.
        bn_eps: the epsilon of the batch norms in its code; a checkpoint does not hold it.
        stem: name of the first block.
        block: names of the others, with ``{stage}`` (counted from ``first_stage``) and ``{index}``.
        first_stage: the number that the family gives to the first stage after the stem.
        head: name of the classifier.
        modules: (theirs, ours) inside a block.
    """

    name: str
    title: str
    source: str
    bn_eps: float
    stem: str
    block: str
    first_stage: int
    head: str
    modules: tuple[tuple[str, str], ...]

    def canonical(self, name: str) -> str | None:
        """The canonical name of a tensor of this lineage; a counter keeps its last part; None for a foreign name."""
        if name.startswith(self.head + "."):
            ours = "head." + name.removeprefix(self.head + ".")
            return ours if ours in HEAD_TENSORS else None
        found = self._pattern.match(name)
        if found is None:
            return None
        stage = 0 if found["stage"] is None else int(found["stage"]) - self.first_stage + 1
        if found["stage"] is not None and stage < 1:  # the stem has a name of its own
            return None
        inner = self._inner(found["inner"])
        return None if inner is None else f"stage{stage}.{int(found['index'] or 0)}.{inner}"

    def foreign(self, canonical: str) -> str:
        """The lineage's own name of a canonical tensor; the inverse of ``canonical``."""
        if canonical.startswith("head."):
            return self.head + canonical.removeprefix("head")
        position, index, inner = canonical.split(".", 2)
        stage = int(position.removeprefix("stage"))
        prefix = self.stem if stage == 0 else self.block.format(stage=stage - 1 + self.first_stage, index=index)
        theirs, ours = max((pair for pair in self.modules if inner.startswith(pair[1] + ".")), key=lambda p: len(p[1]))
        return f"{prefix}.{theirs}{inner.removeprefix(ours)}"

    def recognised(self, names: Iterable[str]) -> int:
        """How many of ``names`` are tensors of blocks of this lineage. The head does not count: families share it."""
        return sum(ours is not None and not ours.startswith("head.") for ours in map(self.canonical, names))

    def _inner(self, inner: str) -> str | None:
        for theirs, ours in self.modules:
            if inner.startswith(theirs + "."):
                renamed = ours + inner.removeprefix(theirs)
                known = renamed in _KNOWN or (renamed.endswith("bn." + COUNTER))
                return renamed if known else None
        return None

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        number = r"0|[1-9]\d{0,3}"
        block = re.escape(self.block)
        block = block.replace(r"\{stage\}", f"(?P<stage>{number})").replace(r"\{index\}", f"(?P<index>{number})")
        return re.compile(rf"(?:{re.escape(self.stem)}|{block})\.(?P<inner>.+)", re.ASCII)


_KNOWN = frozenset(name for names in (*BRANCH_TENSORS.values(), FUSED_TENSORS, SE_TENSORS) for name in names)
