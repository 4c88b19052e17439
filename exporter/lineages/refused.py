"""Families whose files are not exported, recognised by name, each with what its user can do instead.

A detector, or a block of another kind, that is only called "not a RepVGG that is known" leaves its user guessing. Here
stands by which tensors such a file is known, and by which classes where it is a pickled module that is not loaded. The
entries are tried in order, so that what a detector is made of does not hide that it is a detector. None of them fits a
file of a family in ``LINEAGES``.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Collection, Iterable


@dataclasses.dataclass(frozen=True)
class RefusedFamily:
    """One family that is refused.

    Attributes:
        name: how messages call it.
        sample: the name of a tensor that it has.
        tensors: regular expressions; a file is of this family where each is found in the name of some tensor,
        without: and none of these in any.
        classes: globs of the dotted names of classes in its pickled modules.
        remedy: what to do instead, as the end of a line.
        source: where the names come from.
    """

    name: str
    sample: str
    tensors: tuple[str, ...]
    classes: tuple[str, ...]
    remedy: str
    source: str
    without: tuple[str, ...] = ()

    def has(self, names: Collection[str]) -> bool:
        """Whether these are the names of a file of this family."""

        def found(pattern: str) -> bool:
            return any(re.search(pattern, name, re.ASCII) for name in names)

        return all(found(pattern) for pattern in self.tensors) and not any(found(pattern) for pattern in self.without)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What the weights are, as in ``YOLOv6``, and what to do instead."""

    name: str
    remedy: str


def refusal_from_names(names: Iterable[str]) -> Refusal | None:
    """The first refused family that has these tensors, if any; ``names`` as they stand in the file."""
    present = tuple(names)
    return next((Refusal(family.name, family.remedy) for family in REFUSED if family.has(present)), None)


def refusal_from_class(dotted: str) -> Refusal | None:
    """The first refused family that has this class, as in ``yolov6.models.yolo.Model``, if any."""
    fits = (family for family in REFUSED if any(fnmatch.fnmatchcase(dotted, glob) for glob in family.classes))
    return next((Refusal(family.name, family.remedy) for family in fits), None)


_LAYER = r"^(?:(?:.*\.)?model\.)?\d+\."  # the numbered layers of a YOLO
_BLOCK = r"(?:^|\.)stage\d+(?:\.\d+)?\."  # the blocks of a classifier
_DETECTOR = "only classifiers and backbones are exported here; "

REFUSED: tuple[RefusedFamily, ...] = (
    RefusedFamily(
        name="YOLOv6",
        sample="backbone.ERBlock_2.0.rbr_dense.conv.weight",
        tensors=(r"(?:^|\.)(?:ERBlock_\d|Rep_[np]\d)",),
        classes=("yolov6.*",),
        remedy=_DETECTOR + "its own deploy/ONNX/export_onnx.py fuses its blocks (also QARepVGG, CSLA) and exports it",
        source="github.com/meituan/YOLOv6, yolov6/layers/common.py",
    ),
    RefusedFamily(
        name="OREPA",
        sample="stage1.0.rbr_dense.weight_rbr_origin",
        tensors=(r"(?:^|\.)weight_rbr_\w+$",),
        classes=("*.OREPA*", "*.RepVGGBlock_OREPA", "*.RepConv_OREPA"),
        remedy="call switch_to_deploy() on every block in its own code and save that state_dict: a RepVGG then has the "
        "official deployed names, which are read (check it with --expect)",
        source="github.com/JUGGHM/OREPA_CVPR2022, blocks_repvgg.py",
    ),
    RefusedFamily(
        name="YOLOv7",
        sample="model.75.rbr_dense.0.weight",
        tensors=(_LAYER + r"(?:rbr_(?:dense\.0|1x1\.0|reparam)\.|i[am]\.\d+\.implicit$)",),
        classes=("models.yolo.Model",),
        remedy=_DETECTOR + "its own export.py fuses its RepConv blocks and exports it",
        source="github.com/WongKinYiu/yolov7, models/common.py",
    ),
    RefusedFamily(
        name="ultralytics YOLO or YOLOv9",
        sample="model.22.dfl.conv.weight",
        tensors=(_LAYER + r"(?:dfl2?\.conv\.weight$|one2one_cv\d\.|(?:(?:cv\d|m|\d+)\.)*conv1\.conv\.weight$)",),
        classes=("ultralytics.*", "models.yolo.*Model"),
        remedy=_DETECTOR + "yolo export (of ultralytics) or export.py (of YOLOv9) fuses its blocks and exports it",
        source="github.com/ultralytics/ultralytics, nn/modules; github.com/WongKinYiu/yolov9, models/common.py",
    ),
    RefusedFamily(
        name="RT-DETR or D-FINE",
        sample="encoder.fpn_blocks.0.bottlenecks.0.conv1.norm.weight",
        tensors=(r"(?:^|\.)encoder\.(?:fpn|pan)_blocks\.\d",),
        classes=("src.zoo.rtdetr.*", "src.zoo.dfine.*", "transformers.models.rt_detr*", "transformers.models.d_fine*"),
        remedy=_DETECTOR
        + "its own export_onnx.py fuses its blocks and exports it (from transformers: torch.onnx.export)",
        source="github.com/lyuwenyu/RT-DETR; github.com/Peterande/D-FINE; transformers/models/rt_detr",
    ),
    RefusedFamily(
        name="mmyolo detector",
        sample="bbox_head.head_module.cls_preds.0.weight",
        tensors=(r"(?:^|\.)bbox_head\.head_module\.",),
        classes=("mmyolo.*",),
        remedy=_DETECTOR + "its own projects/easydeploy/tools/export_onnx.py fuses its blocks and exports it",
        source="github.com/open-mmlab/mmyolo, mmyolo/models",
    ),
    RefusedFamily(
        name="DAMO-YOLO",
        sample="backbone.block_list.1.block_list.0.conv2.rbr_dense.conv.weight",
        tensors=(r"(?:^|\.)backbone\.block_list\.\d",),
        classes=("damo.*",),
        remedy=_DETECTOR + "its own tools/converter.py fuses its blocks and exports it",
        source="github.com/tinyvision/DAMO-YOLO, damo/base_models",
    ),
    RefusedFamily(
        name="super-gradients RepVGG",
        sample="stage1.0.branch_3x3.bn.weight",
        tensors=(_BLOCK + r"(?:branch_1x1\.bn|no_conv_branch)\.",),
        classes=("super_gradients.training.models.classification_models.repvgg.*",),
        remedy="rename stem. to stage0., branch_3x3. to rbr_dense., branch_1x1. to rbr_1x1. and no_conv_branch. to "
        "rbr_identity. and save it again; without alpha it is then an official RepVGG",
        source="github.com/Deci-AI/super-gradients, modules/repvgg_block.py",
    ),
    RefusedFamily(
        name="YOLO-NAS or another super-gradients detector",
        sample="backbone.stem.conv.post_bn.weight",
        tensors=(r"(?:^|\.)(?:branch_1x1\.(?:weight|bias)$|post_bn\.|conv2\.branch_1x1\.|heads\.head\d+\.cls_pred\.)",),
        classes=("super_gradients.*",),
        remedy=_DETECTOR + 'its own model.export("model.onnx") fuses its blocks and exports it',
        source="github.com/Deci-AI/super-gradients, modules/qarepvgg_block.py",
    ),
    RefusedFamily(
        name="diverse branch block (DBB)",
        sample="stage1.0.dbb_origin.conv.weight",
        tensors=(r"(?:^|\.)dbb_\w+\.",),
        classes=("*.DiverseBranchBlock",),
        remedy="call switch_to_deploy() on every block in its own code and use torch.onnx.export there; a plain chain "
        "of 3x3 blocks is read here once its dbb_reparam tensors are named stage1.0.rbr_reparam.weight and so on",
        source="github.com/DingXiaoH/DiverseBranchBlock, diversebranchblock.py",
    ),
    RefusedFamily(
        name="ACNet",
        sample="stage1.0.square_conv.weight",
        tensors=(r"(?:^|\.)(?:square_conv|ver_conv|hor_conv|fused_conv)\.(?:weight|bias)$",),
        classes=("*.ACBlock",),
        remedy="call switch_to_deploy() on every ACBlock in its own code and use torch.onnx.export there",
        source="github.com/DingXiaoH/ACNet, acnet/acb.py",
    ),
    RefusedFamily(
        name="RepOptimizers hyper-search (CSLA)",
        sample="stage1.0.scale_conv.weight",
        tensors=(_BLOCK + r"scale_conv\.weight$",),
        classes=("*.LinearAddBlock",),
        remedy="it finds scales for training, not a network to use: train the target network and export that one",
        source="github.com/DingXiaoH/RepOptimizers, repoptimizer/repoptvgg_model.py",
    ),
    RefusedFamily(
        name="RepOptimizers RepOpt-VGG (RealVGG)",
        sample="stage1.0.conv.weight",
        tensors=(r"(?:^|\.)stage0\.conv\.weight$", _BLOCK + r"bn\.running_mean$"),
        without=(_BLOCK + r"scale_conv\.weight$",),
        classes=("*.RealVGGBlock",),
        remedy="rename .conv. to .rbr_dense.conv. and .bn. to .rbr_dense.bn. and save it again; without post_se it is "
        "then an official RepVGG without further branches",
        source="github.com/DingXiaoH/RepOptimizers, repoptimizer/repoptvgg_model.py",
    ),
    RefusedFamily(
        name="RepOptimizers RepVGG",
        sample="stage1.0.bn_3x3.weight",
        tensors=(_BLOCK + r"conv_3x3\.weight$", _BLOCK + r"bn_3x3\."),
        classes=("repoptimizer.repoptvgg_model.RepVGGBlock", "repoptvgg.RepVGGBlock"),
        remedy="rename conv_3x3. to rbr_dense.conv., bn_3x3. to rbr_dense.bn., conv_1x1. to rbr_1x1.conv., bn_1x1. to "
        "rbr_1x1.bn. and bn_identity. to rbr_identity. and save it again; without post_se it is then an official "
        "RepVGG",
        source="github.com/DingXiaoH/RepOptimizers, repoptimizer/repoptvgg_model.py",
    ),
    RefusedFamily(
        name="experimental QARepVGG (GRE, V3, V4, V9 or V14)",
        sample="stage1.0.rbr_1x1.bias",
        tensors=(_BLOCK + r"(?:rbr_1x1\.bias|rbr_dense\.weight)$",),
        classes=("*.GRERepVGGBlock*",),
        remedy="its blocks V1 and V2 are read; where this block's switch_to_deploy() runs in its own code, save that "
        "state_dict: it has the official deployed names (check it with --expect)",
        source="github.com/cxxgtxy/QARepVGG, repvgg.py",
    ),
    RefusedFamily(
        name="experimental QARepVGG (V5)",
        sample="stage1.1.bn.weight beside stage1.1.rbr_1x1.bn.weight, without an identity",
        tensors=(_BLOCK + r"rbr_1x1\.bn\.", r"(?:^|\.)stage\d+\.[1-9]\d*\.bn\.running_mean$"),
        without=(_BLOCK + r"rbr_identity\.",),
        classes=("*.QARepVGGBlockV5",),
        remedy="its blocks V1 and V2 are read; call switch_to_deploy() on every block in its own code and save that "
        "state_dict: it has the official deployed names (check it with --expect)",
        source="github.com/cxxgtxy/QARepVGG, repvgg.py",
    ),
    RefusedFamily(
        name="RepViT",
        sample="features.2.token_mixer.0.conv.c.weight",
        tensors=(r"(?:^|\.)token_mixer\.(?:\d+\.)?conv\.c\.weight$",),
        classes=("*.RepVGGDW", "*.RepVggDw", "timm.models.repvit.*"),
        remedy="it is no RepVGG: fuse it in its own code (timm: reparameterize_model) and use torch.onnx.export there",
        source="github.com/THU-MIG/RepViT, model/repvit.py; timm/models/repvit.py",
    ),
    RefusedFamily(
        name="wespeaker RepSPK",
        sample="stage1.0.rbr_dense_dilation.conv.weight",
        tensors=(r"(?:^|\.)rbr_dense_dilation\.",),
        classes=("*.RepSPKBlock",),
        remedy="its fused kernels are 5x5 and it takes sound, not images: use wespeaker/bin/export_onnx.py",
        source="github.com/wenet-e2e/wespeaker, wespeaker/models/repvgg.py",
    ),
    RefusedFamily(
        name="Holocron RepVGG",
        sample="features.0.0.branches.0.0.weight",
        tensors=(r"(?:^|\.)features\.\d+\.\d+\.branches\.",),
        classes=("holocron.*",),
        remedy="it has one block more in every stage: call model.reparametrize() in Holocron and use torch.onnx.export",
        source="github.com/frgfm/Holocron, holocron/models/classification/repvgg.py",
    ),
    RefusedFamily(
        name="luxonis-train",
        sample="backbone.blocks.0.skip_layer.weight",
        tensors=(r"(?:^|\.)branches\.\d+\.(?:conv|bn)\.", r"(?:^|\.)(?:scale_layer|skip_layer|fused_branch)\."),
        classes=("luxonis_train.*",),
        remedy="its own command luxonis_train export fuses its blocks and exports it",
        source="github.com/luxonis/luxonis-train, luxonis_train/nodes/blocks",
    ),
    RefusedFamily(
        name="PaddleClas RepVGG",
        sample="stage1.0.rbr_dense.bn._mean",
        tensors=(r"\._(?:mean|variance)$",),
        classes=("paddle.*", "ppcls.*"),
        remedy="read it with paddle.load, rename ._mean to .running_mean and ._variance to .running_var, transpose "
        "linear.weight and save it with torch.save: it is then an official RepVGG",
        source="github.com/PaddlePaddle/PaddleClas, ppcls/arch/backbone/model_zoo/repvgg.py",
    ),
)
