"""What is published of RepVGG's and ResNet's accuracy and speed.

RepVGG: Making VGG-style ConvNets Great Again, Ding et al., CVPR 2021 (arXiv 2101.03697). Table 4: 120 epochs on
ImageNet, simple augmentation; images/s of the deployed form on a GTX 1080 Ti, float32, batch 128. The ablation of
RepVGG-B0 has its speed before and after re-parameterization; for no other network is one before published.
"""

from __future__ import annotations

import dataclasses

ACCURACY_SOURCE = "Ding et al., CVPR 2021, table 4: ImageNet top-1 after 120 epochs"
SPEED_SOURCE = "Ding et al., CVPR 2021, table 4: GTX 1080 Ti, float32, batch 128, deployed"
SPEED_UP_SOURCE = "Ding et al., CVPR 2021, ablation of RepVGG-B0: images/s on a GTX 1080 Ti before and after"


@dataclasses.dataclass(frozen=True)
class Published:
    """Top-1 in percent, and images per second of the deployed form."""

    top1: float
    images_per_second: int


TABLE = {
    "RepVGG-A0": Published(72.41, 3256),
    "RepVGG-A1": Published(74.46, 2339),
    "RepVGG-A2": Published(76.48, 1322),
    "RepVGG-B0": Published(75.14, 1817),
    "RepVGG-B1": Published(78.37, 685),
    "RepVGG-B1g2": Published(77.78, 792),
    "RepVGG-B1g4": Published(77.58, 868),
    "RepVGG-B2": Published(78.78, 460),
    "RepVGG-B2g4": Published(78.50, 581),
    "ResNet-18": Published(71.16, 2442),
    "ResNet-34": Published(74.17, 1419),
    "ResNet-50": Published(76.31, 719),
}
SPEED_UPS = {"RepVGG-B0": (1061, 1810)}
"""Images/s before and after re-parameterization."""
