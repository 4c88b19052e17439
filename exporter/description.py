"""What a run found out about a checkpoint and what it had to assume, in words, for metadata and for the report."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from exporter.architecture import Architecture, joined
from exporter.errors import listed
from exporter.images import Normalisation
from exporter.request import Request
from exporter.version import VERSION


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is exported: the request, the checkpoint's facts (not its tensors), the network, the normalisation."""

    request: Request
    container: str
    others: tuple[str, ...]
    architecture: Architecture
    normalise: Normalisation

    @property
    def assumptions(self) -> dict[str, str]:
        """What the tensors do not say, as the flags that would say it again."""
        return {
            "strides": joined(self.architecture.stage_strides),
            "eps": number_text(self.architecture.bn_eps),
            "size": f"{self.request.size[0]}x{self.request.size[1]}",
            "mean": _numbers(self.normalise.mean),
            "std": _numbers(self.normalise.std),
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
        }

    @property
    def lines(self) -> list[str]:
        """The first lines of a run: what the checkpoint is, and every assumption with its way out."""
        architecture, request = self.architecture, self.request
        container = f" under {self.container}" if self.container else ""
        unused = f"; beside it, unused: {listed(list(self.others))}" if self.others else ""
        groups = sorted({block.groups for block in architecture.blocks} - {1})
        grouped = f", groups {joined(groups)}" if groups else ""
        se = ", SE" if any(block.se_channels for block in architecture.blocks) else ""
        channels = f"{architecture.in_channels} input channel{'s' if architecture.in_channels > 1 else ''}"
        eps_source = "--eps" if request.eps is not None else f"{architecture.lineage} code; --eps"
        values = self.assumptions
        lines = [
            f"{request.path.name}: {title_of(architecture)}, {architecture.lineage} naming{container}, "
            f"{architecture.form} form{unused}",
            f"  depths {joined(architecture.depths)}, widths {joined(architecture.widths)}{grouped}{se}, "
            f"{channels}, {architecture.classes} classes",
            f"assumed: {_strides_line(request, architecture)}",
            f"assumed: batch norm eps {values['eps']} ({eps_source})",
            f"assumed: size {values['size']} (--size), mean {values['mean']}, std {values['std']} (--mean, --std)",
        ]
        if architecture.form != "training":
            lines.append("note: fused blocks have no branches left to compare with, only with themselves")
        return lines

    def checkpoint_record(self, sha256: str) -> dict[str, Any]:
        """The report's ``checkpoint``."""
        return {
            "name": self.request.path.name,
            "sha256": sha256,
            "container": self.container,
            "unused_beside_it": self.others,
            "lineage": self.architecture.lineage,
            "form": self.architecture.form,
        }

    @property
    def architecture_record(self) -> dict[str, Any]:
        """The report's ``architecture``."""
        architecture = self.architecture
        return {
            "title": title_of(architecture),
            "variant": architecture.variant,
            "depths": architecture.depths,
            "widths": architecture.widths,
            "stage_strides": architecture.stage_strides,
            "strides_told_by_tensors": architecture.told_strides,
            "groups": [block.groups for block in architecture.blocks],
            "se_channels": [block.se_channels for block in architecture.blocks],
            "in_channels": architecture.in_channels,
            "classes": architecture.classes,
            "bn_eps": architecture.bn_eps,
        }


def title_of(architecture: Architecture) -> str:
    """As in "RepVGG-A0" or "RepVGG (no published variant)"."""
    return f"RepVGG-{architecture.variant}" if architecture.variant else "RepVGG (no published variant)"


def number_text(value: float) -> str:
    """The shortest text that reads back as the very same number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(number_text(value) for value in values)


def _strides_line(request: Request, architecture: Architecture) -> str:
    strides = f"stage strides {joined(architecture.stage_strides)}"
    if request.strides is not None:
        return f"{strides}, as given"
    told = [f"stage{stage}" for stage, is_told in enumerate(architecture.told_strides) if is_told]
    known = f"{', '.join(told)} told by the tensors, the others assumed" if told else "not in the tensors"
    return f"{strides} ({known}; --strides)"
