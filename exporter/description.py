"""What a run found out about a checkpoint and what it had to assume, in words, for metadata and for the report."""

from __future__ import annotations

import collections
import dataclasses
import json
from typing import Any

from exporter.architecture import Architecture, joined
from exporter.errors import listed
from exporter.images import Normalisation
from exporter.request import WEIGHTS, Request, size_text
from exporter.version import VERSION

NAMED_MODULES = 8
"""Modules that a line names at most."""
WEIGHTS_TITLES = {"ema": "averaged (ema)", "raw": "raw"}


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is exported: the request, the checkpoint's facts (not its tensors), the network, the normalisation."""

    request: Request
    container: str
    others: tuple[str, ...]
    weights: str | None
    architecture: Architecture
    normalise: Normalisation
    prefix: str
    dropped: dict[str, str]
    note: str | None

    @property
    def assumptions(self) -> dict[str, str]:
        """What the tensors do not say, as the flags that would say it again."""
        features = {"features": joined(self.architecture.features)} if self.architecture.features else {}
        weights = {"weights": self.weights} if self.weights is not None else {}
        resize = {"resize": str(self.request.resize)} if self.request.resize is not None else {}
        return {
            "strides": joined((*self.architecture.stage_strides, *self.architecture.cut_strides)),
            "eps": number_text(self.architecture.bn_eps),
            "size": size_text(self.request),
            "mean": _numbers(self.normalise.mean),
            "std": _numbers(self.normalise.std),
            **features,
            **weights,
            **resize,
        }

    def metadata(self, checkpoint_sha256: str, precision: str) -> dict[str, str]:
        """The ``metadata_props`` of an ONNX file: enough to make the network again from its checkpoint, no flags."""
        return {
            "exporter_version": VERSION,
            "checkpoint_sha256": checkpoint_sha256,
            "lineage": self.architecture.lineage,
            "variant": self.architecture.variant or "",
            "precision": precision,
            "assumptions": json.dumps(self.assumptions, sort_keys=True),
        }

    @property
    def preprocessing(self) -> dict[str, Any]:
        """A sidecar's ``preprocessing``: x = (pixel / 255 - mean) / std, at this size."""
        return {
            "mean": self.normalise.mean,
            "std": self.normalise.std,
            "size": self.request.size,
            "channels": self.architecture.in_channels,
            **({"resize": self.request.resize} if self.request.resize is not None else {}),
        }

    @property
    def lines(self) -> list[str]:
        """The first lines of a run: what the checkpoint is, and every assumption with its way out."""
        architecture, request = self.architecture, self.request
        container = f" under {self.container}" if self.container else ""
        container += f" with the prefix {self.prefix}" if self.prefix else ""
        unused = f"; beside it, unused: {listed(list(self.others))}" if self.others else ""
        eps_source = "--eps" if request.eps is not None else f"{architecture.lineage} code; --eps"
        values = self.assumptions
        dynamic = " (height and width are dynamic)" if request.size_range is not None else ""
        lines = [
            f"{request.path.name}: {title_of(architecture)}, {architecture.lineage} naming{container}, "
            f"{architecture.form} form{unused}",
            f"  {_shape_line(architecture)}",
            *self._outputs_lines(),
            *_dropped_lines(self.dropped),
        ]
        if self.weights is not None:
            other = next(name for name in WEIGHTS if name != self.weights)
            source = "as given" if request.weights is not None else f"the file holds both; --weights {other}"
            lines.append(f"assumed: the {WEIGHTS_TITLES[self.weights]} weights ({source})")
        lines += [
            f"assumed: {_strides_line(request, architecture)}",
            *_identity_lines(architecture),
            f"assumed: batch norm eps {values['eps']} ({eps_source})",
            f"assumed: size {values['size']}{dynamic} (--size), mean {values['mean']}, std {values['std']} "
            f"(--mean, --std)",
        ]
        if architecture.form != "training":
            lines.append("note: fused blocks have no branches left to compare with, only with themselves")
        if self.note is not None:
            lines.append(f"note: {self.note}")
        return lines

    def _outputs_lines(self) -> list[str]:
        """What comes out, where it is not the scores of a classifier."""
        architecture = self.architecture
        if architecture.classes is not None:
            return []
        shapes = []
        for output in architecture.outputs:
            height, width = architecture.size_behind(output.block or "", self.request.size)
            shapes.append(f"{output.name} (N, {output.channels}, {height}, {width})")
        reason = "as asked for" if architecture.features else "the last feature map, since the file has no classifier"
        return [f"  outputs {', '.join(shapes)}: {reason}"]

    def checkpoint_record(self, sha256: str) -> dict[str, Any]:
        """The report's ``checkpoint``."""
        return {
            "name": self.request.path.name,
            "sha256": sha256,
            "container": self.container,
            "unused_beside_it": self.others,
            "weights": self.weights,
            "left_out": sorted(self.dropped),
            "lineage": self.architecture.lineage,
            "form": self.architecture.form,
        }

    @property
    def architecture_record(self) -> dict[str, Any]:
        """The report's ``architecture``."""
        architecture = self.architecture
        return {
            "title": title_of(architecture),
            "family": architecture.family,
            "variant": architecture.variant,
            "depths": architecture.depths,
            "widths": architecture.widths,
            "stage_strides": architecture.stage_strides,
            "strides_told_by_tensors": architecture.told_strides,
            "groups": [block.groups for block in architecture.blocks],
            "kernels": [block.kernel for block in architecture.blocks],
            "se_channels": [block.se_channels for block in architecture.blocks],
            "in_channels": architecture.in_channels,
            "classes": architecture.classes,
            "features": architecture.features,
            "bn_eps": architecture.bn_eps,
        }


def title_of(architecture: Architecture) -> str:
    """As in "RepVGG-A0" or "RepVGG (no published variant)"."""
    family = architecture.family
    return f"{family}-{architecture.variant}" if architecture.variant else f"{family} (no published variant)"


def number_text(value: float) -> str:
    """The shortest text that reads back as the very same number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(number_text(value) for value in values)


def _shape_line(architecture: Architecture) -> str:
    groups = sorted({block.groups for block in architecture.blocks if block.groups not in (1, block.in_channels)})
    depthwise = any(block.groups == block.in_channels > 1 for block in architecture.blocks)
    se = sum(block.se_channels is not None for block in architecture.blocks)
    after = any(block.se_after_activation for block in architecture.blocks)
    parts = [
        f"depths {joined(architecture.depths)}",
        f"widths {joined(architecture.widths)}",
        *([f"groups {joined(groups)}"] if groups else []),
        *(["depthwise and pointwise convolutions"] if depthwise else []),
        *(["SE after the ReLU" if after else "SE" if se == len(architecture.blocks) else f"SE in {se}"] if se else []),
        f"{architecture.in_channels} input channel{'s' if architecture.in_channels > 1 else ''}",
        f"{architecture.classes} classes" if architecture.classes is not None else "no classifier",
    ]
    return ", ".join(parts)


def _dropped_lines(dropped: dict[str, str]) -> list[str]:
    """A line for each kind of tensors that are left out, by their modules."""
    kinds: dict[str, collections.Counter[str]] = {}
    for name, what in sorted(dropped.items()):
        module, dot, _ = name.partition(".")
        kinds.setdefault(what, collections.Counter())[f"{module}.*" if dot else name] += 1
    lines = []
    for what, modules in kinds.items():
        count = modules.total()
        names = listed(list(modules), NAMED_MODULES)
        lines.append(f"left out: {names} ({count} tensor{'s' if count > 1 else ''}): {what}")
    return lines


def _identity_lines(architecture: Architecture) -> list[str]:
    """Where identities and other branches are assumed, or their absence, that no tensor tells."""
    absent = _absent_branches(architecture)
    if absent:
        return [f"assumed: no {' and no '.join(absent)} branch in any block: the file has no tensors of one"]
    bare = [block.name for block in architecture.blocks if block.skips_without_tensors]
    present = [block.name for block in architecture.blocks if "bare_identity" in block.branches]
    if not bare:
        return []
    summed = "assumed: no batch norm behind the branches' sum in any block: the file has none"
    return [
        *([summed] if not any(block.post_batch_norm for block in architecture.blocks) else []),
        f"assumed: an identity branch, which has no tensors, in {len(present)} of {len(bare)} blocks: where the "
        f"channels stay and the stride is 1 (--strides; --calib asks the batch norms)",
    ]


def _absent_branches(architecture: Architecture) -> list[str]:
    """Kinds of branches that blocks could have, and none has; a family without them has no tensors of them either."""
    trained = [block for block in architecture.blocks if not block.deployed and not block.skips_without_tensors]
    could = {
        "1x1": [block for block in trained if block.kernel > 1],
        "identity": [block for block in trained if block.in_channels == block.out_channels and block.stride == 1],
    }
    has = {branch for block in trained for branch in block.branches}
    present = {"1x1": has & {"pointwise", "bare_pointwise"}, "identity": has & {"identity"}}
    return [kind for kind, blocks in could.items() if blocks and not present[kind]]


def _strides_line(request: Request, architecture: Architecture) -> str:
    strides = f"stage strides {joined((*architecture.stage_strides, *architecture.cut_strides))}"
    if request.strides is not None:
        return f"{strides}, as given"
    told = [f"stage{stage}" for stage, is_told in enumerate(architecture.told_strides) if is_told]
    known = f"{', '.join(told)} told by the tensors, the others assumed" if told else "not in the tensors"
    return f"{strides} ({known}; --strides)"
