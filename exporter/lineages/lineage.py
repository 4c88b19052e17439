"""What a lineage of checkpoints is: the names its authors gave to the tensors of a RepVGG or one of its descendants.

Canonical names, which everything after this point uses:

    stage0.0, stage1.0, stage1.1, ...                           the blocks; stage0 has one
      .dense.weight  .dense1.weight ...  .pointwise.weight      k x k branches (MobileOne has several), the 1x1 branch
      .dense.bn.*  .pointwise.bn.*  .identity.bn.*              * = weight, bias, running_mean, running_var
      .bare_pointwise.weight                                    a 1x1 branch without a batch norm (QARepVGG)
      .post.bn.*                                                a batch norm of the branches' sum (QARepVGG)
      .fused.weight  .fused.bias                                the one convolution of the deployed form
      .se.reduce.{weight,bias}  .se.expand.{weight,bias}        squeeze-and-excitation, before or after the ReLU
    head.weight  head.bias                                      the classifier after global average pooling

A ``bare_identity`` branch has no tensor at all: y = x, with no batch norm of its own (QARepVGG).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Iterable

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
LARGEST_BRANCHES = 16
DENSE_BRANCHES = ("dense", *(f"dense{number}" for number in range(1, LARGEST_BRANCHES)))
BRANCH_TENSORS = {
    **{name: (f"{name}.weight", *(f"{name}.bn.{part}" for part in BATCH_NORM)) for name in DENSE_BRANCHES},
    "pointwise": ("pointwise.weight", *(f"pointwise.bn.{name}" for name in BATCH_NORM)),
    "bare_pointwise": ("bare_pointwise.weight",),
    "identity": tuple(f"identity.bn.{name}" for name in BATCH_NORM),
    "bare_identity": (),
}
POST_TENSORS = tuple(f"post.bn.{name}" for name in BATCH_NORM)
FUSED_TENSORS = ("fused.weight", "fused.bias")
SE_TENSORS = ("se.reduce.weight", "se.reduce.bias", "se.expand.weight", "se.expand.bias")
HEAD_TENSORS = ("head.weight", "head.bias")
COUNTER = "num_batches_tracked"


def branch_tensors(branch: str) -> tuple[str, ...]:
    """The tensors of a branch, ``fused`` included, by their names inside a block."""
    return FUSED_TENSORS if branch == "fused" else BRANCH_TENSORS[branch]


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Tensors of a family that no exported network has: the names' ``glob``, and ``what`` they are, in words."""

    glob: str
    what: str


@dataclasses.dataclass(frozen=True)
class Lineage:
    """One family of tensor names, and what its code does that no tensor says.

    Attributes:
        name: how the family is called in messages.
        title: a longer name, for tables.
        source: where the names come from.
        bn_eps: the epsilon of the batch norms in its code; a checkpoint does not hold it.
        stem: name of the first block.
        block: names of the others, with ``{stage}`` (counted from ``first_stage``) and ``{index}``.
        first_stage: the number that the family gives to the first stage after the stem.
        head: name of the classifier; None in a family of backbones.
        modules: (theirs, ours) inside a block.
        family: what its networks are called, before the name of a variant.
        split_stages: (stage, template with ``{index}``) of stages that are several modules one after the other.
        kernels: the sizes of its convolutions' kernels.
        se_after_activation: whether squeeze-and-excitation comes behind the ReLU.
        se_in_part: whether some blocks of a network have it and others not; those of a stage that do are its last.
        last_stride: of the first block of the last stage, where nothing tells it.
        dropped: tensors that are left out, and said to be.
        note: a line for every export of this family.
        starts: how many blocks of its stage come before each of ``split_stages``; see ``for_names``.
        absent: first blocks of those of ``split_stages`` that have none.
    """

    name: str
    title: str
    source: str
    bn_eps: float
    stem: str
    block: str
    first_stage: int
    head: str | None
    modules: tuple[tuple[str, str], ...]
    family: str = "RepVGG"
    split_stages: tuple[tuple[int, str], ...] = ()
    kernels: tuple[int, ...] = (3,)
    se_after_activation: bool = False
    se_in_part: bool = False
    last_stride: int = 2
    dropped: tuple[Dropped, ...] = ()
    note: str | None = None
    starts: tuple[int, ...] = ()
    absent: tuple[str, ...] = ()

    def for_names(self, names: Iterable[str]) -> Lineage:
        """This lineage as ``names`` have it.

        The blocks of a split stage are counted on, and of several names for a module the one that occurs comes first.
        """
        names = list(names)
        inside = [f"{name}." for name in names]
        modules = sorted(self.modules, key=lambda module: not any(f".{module[0]}." in name for name in inside))
        lengths = [0] * len(self.split_stages)
        for name in names:
            for number, pattern in enumerate(self._split_patterns):
                if found := pattern.match(name):
                    lengths[number] = max(lengths[number], int(found["index"]) + 1)
        starts = [
            sum(lengths[j] for j in range(number) if self.split_stages[j][0] == stage)
            for number, (stage, _) in enumerate(self.split_stages)
        ]
        lengths_and_names = zip(lengths, self.split_stages, strict=True)
        absent = tuple(template.format(index=0) for length, (_, template) in lengths_and_names if not length)
        return dataclasses.replace(self, starts=tuple(starts), modules=tuple(modules), absent=absent)

    def canonical(self, name: str) -> str | None:
        """The canonical name of a tensor of this lineage; a counter keeps its last part; None for a foreign name."""
        if self.head is not None and name.startswith(self.head + "."):
            ours = "head." + name.removeprefix(self.head + ".")
            return ours if ours in HEAD_TENSORS else None
        for number, pattern in enumerate(self._split_patterns):
            if found := pattern.match(name):
                index = int(found["index"]) + (self.starts[number] if self.starts else 0)
                return self._canonical(self.split_stages[number][0], index, found["inner"])
        found = self._pattern.match(name)
        if found is None:
            return None
        stage = 0 if found["stage"] is None else int(found["stage"]) - self.first_stage + 1
        if found["stage"] is not None and stage < 1:  # the stem has a name of its own
            return None
        if any(stage == split for split, _ in self.split_stages):  # and so have the parts of a split stage
            return None
        return self._canonical(stage, int(found["index"] or 0), found["inner"])

    def foreign(self, canonical: str) -> str:
        """The lineage's own name of a canonical tensor; the inverse of ``canonical``."""
        if canonical.startswith("head."):
            return (self.head or "head") + canonical.removeprefix("head")
        position, index, inner = canonical.split(".", 2)
        prefix = self._prefix(int(position.removeprefix("stage")), int(index))
        fitting = [(theirs, ours) for theirs, ours in self.modules if inner == ours or inner.startswith(f"{ours}.")]
        if not fitting:
            return f"{prefix}.{inner}"
        theirs, ours = max(fitting, key=lambda pair: len(pair[1]))
        return f"{prefix}.{theirs}{inner.removeprefix(ours)}"

    def recognised(self, names: Iterable[str]) -> frozenset[str]:
        """Those of ``names`` that are tensors of blocks of this lineage. The head does not count: families share it."""
        return frozenset(
            name for name in names if (ours := self.canonical(name)) is not None and not ours.startswith("head.")
        )

    def explained(self, names: Iterable[str]) -> frozenset[str]:
        """Those of ``names`` that mean something here, head and dropped ones too; none where no block is recognised."""
        names = list(names)
        if not self.recognised(names):
            return frozenset()
        return frozenset(
            name for name in names if self.canonical(name) is not None or self.dropped_as(name) is not None
        )

    def dropped_as(self, name: str) -> str | None:
        """What a tensor that is left out is, in words; None for one that is not."""
        return next((one.what for one in self.dropped if fnmatch.fnmatchcase(name, one.glob)), None)

    def _prefix(self, stage: int, index: int) -> str:
        if stage == 0:
            return self.stem
        split = [(start, name) for start, (s, name) in zip(self.starts, self.split_stages, strict=False) if s == stage]
        fitting = [(start, name) for start, name in split if start <= index]
        if fitting:
            start, template = fitting[-1]
            return template.format(index=index - start)
        return self.block.format(stage=stage - 1 + self.first_stage, index=index)

    def _canonical(self, stage: int, index: int, inner: str) -> str | None:
        ours = self._inner(inner)
        return None if ours is None else f"stage{stage}.{index}.{ours}"

    def _inner(self, inner: str) -> str | None:
        for theirs, ours in self.modules:
            if inner == theirs or inner.startswith(theirs + "."):
                renamed = ours + inner.removeprefix(theirs)
                if renamed in _KNOWN or renamed.endswith("bn." + COUNTER):
                    return renamed
        return None

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(rf"(?:{re.escape(self.stem)}|{_expression(self.block)})\.(?P<inner>.+)", re.ASCII)

    @functools.cached_property
    def _split_patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(rf"{_expression(name)}\.(?P<inner>.+)", re.ASCII) for _, name in self.split_stages)


def several_branches(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    """Modules of several k x k branches: ``theirs`` has ``{branch}`` for their number, ``ours`` for their name."""
    return tuple((theirs.format(branch=number), ours.format(branch=name)) for number, name in enumerate(DENSE_BRANCHES))


def _expression(template: str) -> str:
    number = r"0|[1-9]\d{0,3}"
    escaped = re.escape(template)
    return escaped.replace(r"\{stage\}", f"(?P<stage>{number})").replace(r"\{index\}", f"(?P<index>{number})")


_KNOWN = frozenset(
    name for names in (*BRANCH_TENSORS.values(), POST_TENSORS, FUSED_TENSORS, SE_TENSORS) for name in names
)
