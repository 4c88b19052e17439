"""How the files of many families name their tensors, and what classes are in their pickled modules.

Written down from the families' own code, apart from the expressions that recognise them. ``BN`` at the end of a name
stands for the tensors of a batch norm.
"""

from __future__ import annotations

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
OFFICIAL_BRANCHES = "rbr_dense.conv.weight rbr_dense.bn.BN rbr_1x1.conv.weight rbr_1x1.bn.BN rbr_identity.BN"
FUSED = "rbr_reparam.weight rbr_reparam.bias"


def names(prefixes, inner, others=""):
    """All names of blocks at ``prefixes`` with the tensors ``inner``; BN stands for the tensors of a batch norm."""
    tensors = [f"{prefix}.{tensor}" for prefix in prefixes.split() for tensor in inner.split()]
    return [
        name.removesuffix("BN") + part
        for name in [*tensors, *others.split()]
        for part in (BN if name.endswith(".BN") else ("",))
    ]


CLASSIFIER = "stage0 stage1.0 stage1.1 stage2.0 stage2.1"
CSLA = "conv.weight scale_conv.weight conv_1x1.weight scale_1x1.weight scale_identity.weight bn.BN"
YOLOV6 = "backbone.stem backbone.ERBlock_2.0 backbone.ERBlock_2.1.conv1 neck.Rep_p4.conv1 neck.Rep_n3.conv1"
YOLOV6_HEAD = "detect.stems.0.conv.weight detect.stems.0.bn.BN detect.cls_preds.0.weight"
RT_DETR_HEAD = "decoder.enc_score_head.weight decoder.dec_score_head.0.bias"
NAS = "backbone.stem.conv backbone.stage1.blocks.bottlenecks.0.cv1 neck.neck1.blocks.bottlenecks.0.cv1"
DBB = (
    "dbb_origin.conv.weight dbb_origin.bn.BN dbb_avg.conv.weight dbb_avg.bn.bn.BN dbb_avg.avgbn.BN "
    "dbb_1x1.conv.weight dbb_1x1.bn.BN dbb_1x1_kxk.idconv1.conv.weight dbb_1x1_kxk.bn1.bn.BN dbb_1x1_kxk.conv2.weight"
)
ACB = "square_conv.weight square_bn.BN ver_conv.weight ver_bn.BN hor_conv.weight hor_bn.BN"
OREPA = (
    "rbr_dense.weight_rbr_origin rbr_dense.weight_rbr_avg_conv rbr_dense.weight_rbr_1x1_kxk_idconv1 rbr_dense.vector "
    "rbr_dense.weight_rbr_prior rbr_dense.bn.BN rbr_1x1.conv.weight rbr_1x1.bn.BN rbr_identity.BN"
)
QA_HEAD = "linear.weight linear.bias"
YOLO_LAYERS = "model.0.conv.weight model.0.bn.BN "

TABLES = [
    ("YOLOv6", names(YOLOV6, OFFICIAL_BRANCHES, YOLOV6_HEAD)),
    ("YOLOv6", names(YOLOV6, FUSED, YOLOV6_HEAD)),
    ("YOLOv6", names(YOLOV6, "rbr_dense.conv.weight rbr_dense.bn.BN rbr_1x1.weight bn.BN", YOLOV6_HEAD)),
    ("YOLOv6", names(YOLOV6, "rbr_reparam.weight rbr_reparam.bias bn.BN", YOLOV6_HEAD)),
    ("YOLOv6", names(YOLOV6, CSLA, YOLOV6_HEAD)),
    ("YOLOv6", names(YOLOV6, "conv.weight bn.BN", YOLOV6_HEAD)),
    (
        "YOLOv7",
        names("model.75 model.88", "rbr_dense.0.weight rbr_dense.1.BN rbr_1x1.0.weight rbr_1x1.1.BN", YOLO_LAYERS),
    ),
    ("YOLOv7", names("model.75", FUSED, YOLO_LAYERS + "model.77.m.0.weight model.77.anchors")),
    ("YOLOv7", names("model.0", "conv.weight bn.BN", "model.105.ia.0.implicit model.105.im.0.implicit")),
    ("OREPA", names(CLASSIFIER, OREPA, QA_HEAD)),
    ("OREPA", names("model.75 model.88", OREPA, YOLO_LAYERS)),
    (
        "ultralytics YOLO or YOLOv9",
        names("model.2.cv1 model.2.m.0.cv1", "conv.weight bn.BN", "model.22.dfl.conv.weight"),
    ),
    (
        "ultralytics YOLO or YOLOv9",
        names("model.15", "conv1.conv.weight conv1.bn.BN conv2.conv.weight conv2.bn.BN bn.BN"),
    ),
    (
        "ultralytics YOLO or YOLOv9",
        names("model.2.cv2.0.m.0.cv1", "conv1.conv.weight conv1.bn.BN conv2.conv.weight", "model.22.dfl2.conv.weight"),
    ),
    (
        "ultralytics YOLO or YOLOv9",
        names("model.8.m.0.cv1.2", "conv.conv.weight conv1.conv.weight", "model.23.one2one_cv2.0.0.conv.weight"),
    ),
    (
        "RT-DETR or D-FINE",
        names("encoder.fpn_blocks.0.bottlenecks.0", "conv1.conv.weight conv1.norm.BN conv2.conv.weight", RT_DETR_HEAD),
    ),
    (
        "RT-DETR or D-FINE",
        names("model.encoder.pan_blocks.0.bottlenecks.1", "conv1.conv.weight conv1.norm.BN conv.weight"),
    ),
    (
        "mmyolo detector",
        names(
            "backbone.stage1.0 neck.top_down_layers.0.block.0",
            OFFICIAL_BRANCHES,
            "bbox_head.head_module.cls_preds.0.weight",
        ),
    ),
    (
        "mmyolo detector",
        names(
            "backbone.stem backbone.stage1.0", "conv.weight bn.BN", "bbox_head.head_module.cls_preds.0.0.conv.weight"
        ),
    ),
    (
        "DAMO-YOLO",
        names(
            "backbone.block_list.1.block_list.0.conv2 neck.merge_3.convs.0.conv2",
            "rbr_dense.conv.weight rbr_dense.bn.BN rbr_1x1.conv.weight rbr_1x1.bn.BN",
        ),
    ),
    ("DAMO-YOLO", names("backbone.block_list.1.block_list.0.conv2", FUSED, "head.gfl_cls.0.weight")),
    (
        "super-gradients RepVGG",
        names(
            "stem stage1.0 stage1.1",
            "branch_3x3.conv.weight branch_3x3.bn.BN branch_1x1.conv.weight branch_1x1.bn.BN no_conv_branch.BN alpha",
            QA_HEAD,
        ),
    ),
    (
        "YOLO-NAS or another super-gradients detector",
        names(
            NAS,
            "branch_3x3.conv.weight branch_3x3.bn.BN branch_1x1.weight branch_1x1.bias alpha post_bn.BN " + FUSED,
        ),
    ),
    (
        "YOLO-NAS or another super-gradients detector",
        names(NAS, "rbr_reparam.weight rbr_reparam.bias", "heads.head1.cls_pred.weight heads.head1.reg_pred.bias"),
    ),
    (
        "YOLO-NAS or another super-gradients detector",
        names(
            "backbone.stages.0.blocks.0.conv2",
            "branch_3x3.conv.weight branch_3x3.bn.BN branch_1x1.conv.weight branch_1x1.bn.BN",
        ),
    ),
    ("diverse branch block (DBB)", names("stage1.block0.conv1 stage1.0", DBB)),
    ("diverse branch block (DBB)", names("stage1.0", "dbb_reparam.weight dbb_reparam.bias")),
    ("ACNet", names("stage1.0 conv1", ACB)),
    ("ACNet", names("stage1.0 conv1", "fused_conv.weight fused_conv.bias")),
    ("RepOptimizers hyper-search (CSLA)", names(CLASSIFIER, CSLA, QA_HEAD)),
    ("RepOptimizers RepOpt-VGG (RealVGG)", names(CLASSIFIER, "conv.weight bn.BN", QA_HEAD)),
    (
        "RepOptimizers RepOpt-VGG (RealVGG)",
        names(CLASSIFIER, "conv.weight bn.BN post_se.down.weight post_se.up.weight", QA_HEAD),
    ),
    (
        "RepOptimizers RepVGG",
        names(CLASSIFIER, "conv_3x3.weight bn_3x3.BN conv_1x1.weight bn_1x1.BN bn_identity.BN", QA_HEAD),
    ),
    (
        "experimental QARepVGG (GRE, V3, V4, V9 or V14)",
        names(CLASSIFIER, "rbr_dense.conv.weight rbr_dense.bn.BN rbr_1x1.weight rbr_1x1.bias bn.BN", QA_HEAD),
    ),
    (
        "experimental QARepVGG (GRE, V3, V4, V9 or V14)",
        names(CLASSIFIER, "rbr_dense.weight rbr_1x1.weight bn.BN", QA_HEAD),
    ),
    (
        "experimental QARepVGG (V5)",
        names(CLASSIFIER, "rbr_dense.conv.weight rbr_dense.bn.BN rbr_1x1.conv.weight rbr_1x1.bn.BN bn.BN", QA_HEAD),
    ),
    ("RepViT", names("features.2.token_mixer.0", "conv.c.weight conv.bn.BN conv1.weight conv1.bias bn.BN")),
    ("RepViT", names("stages.0.blocks.0.token_mixer", "conv.c.weight conv.bn.BN conv1.weight conv1.bias bn.BN")),
    (
        "wespeaker RepSPK",
        names(
            CLASSIFIER,
            "rbr_dense.conv.weight rbr_dense.bn.BN rbr_dense_dilation.conv.weight rbr_identity.BN se.fc_1.weight",
            "seg_1.weight seg_1.bias",
        ),
    ),
    (
        "Holocron RepVGG",
        names(
            "features.0.0 features.0.1",
            "branches.0.0.weight branches.0.1.BN branches.1.0.weight branches.1.1.BN branches.2.BN",
            "head.weight head.bias",
        ),
    ),
    ("Holocron RepVGG", names("features.0.0 features.0.1", "branches.weight branches.bias", "head.weight head.bias")),
    (
        "luxonis-train",
        names(
            "backbone.blocks.0",
            "branches.0.conv.weight branches.0.bn.BN scale_layer.conv.weight scale_layer.bn.BN skip_layer.BN",
        ),
    ),
    (
        "luxonis-train",
        names("backbone.blocks.0", "branches.0.conv.weight branches.0.bn.BN fused_branch.weight fused_branch.bias"),
    ),
    (
        "PaddleClas RepVGG",
        names(
            CLASSIFIER, "rbr_dense.conv.weight rbr_dense.bn.weight rbr_dense.bn._mean rbr_dense.bn._variance", QA_HEAD
        ),
    ),
]

SUPPORTED = {
    "official": (CLASSIFIER, (OFFICIAL_BRANCHES, FUSED, f"{OFFICIAL_BRANCHES} {FUSED}"), "se.down se.up", "linear"),
    "official, quantization": (CLASSIFIER, ("rbr_reparam.conv.weight rbr_reparam.bn.BN",), "", "linear"),
    "RepVGGplus": (
        "stage0 stage1.blocks.0 stage2.blocks.1 stage3_first.blocks.0 stage3_second.blocks.0 stage4.blocks.0",
        (OFFICIAL_BRANCHES, FUSED),
        "post_se.down post_se.up",
        "linear stage1_aux.0.conv stage1_aux.0.bn stage1_aux.3 stage3_first_aux.0.conv stage3_first_aux.0.bn",
    ),
    "QARepVGG": (
        CLASSIFIER,
        ("rbr_dense.conv.weight rbr_dense.bn.BN rbr_1x1.weight bn.BN", FUSED),
        "se.down se.up",
        "linear",
    ),
    "QARepVGG, V1": (CLASSIFIER, (f"{OFFICIAL_BRANCHES} bn.BN",), "", "linear"),
    "timm": (
        "stem stages.0.0 stages.0.1 stages.3.0",
        (
            "conv_kxk.conv.weight conv_kxk.bn.BN conv_1x1.conv.weight conv_1x1.bn.BN identity.BN",
            "reparam_conv.weight reparam_conv.bias",
        ),
        "attn.fc1 attn.fc2",
        "head.fc",
    ),
    "timm MobileOne": (
        "stem stages.0.0 stages.0.1 stages.3.0",
        ("conv_kxk.0.conv.weight conv_kxk.0.bn.BN conv_kxk.3.conv.weight conv_scale.conv.weight conv_scale.bn.BN",),
        "attn.fc1 attn.fc2",
        "head.fc",
    ),
    "MobileOne": (
        CLASSIFIER,
        (
            "rbr_conv.0.conv.weight rbr_conv.0.bn.BN rbr_scale.conv.weight rbr_scale.bn.BN rbr_skip.BN",
            "reparam_conv.weight reparam_conv.bias",
        ),
        "se.reduce se.expand",
        "linear",
    ),
    "mmpretrain": (
        "backbone.stem backbone.stage_1.0 backbone.stage_4.0",
        (
            "branch_3x3.conv.weight branch_3x3.norm.BN branch_1x1.conv.weight branch_1x1.norm.BN branch_norm.BN",
            "branch_reparam.weight branch_reparam.bias",
        ),
        "se_layer.conv1.conv se_layer.conv2.conv",
        "head.fc",
    ),
    "fast-reid": (
        "backbone.stage0 backbone.stage1.0 backbone.stage1.1",
        (OFFICIAL_BRANCHES, "fused_weight fused_bias"),
        "",
        "heads.bottleneck.0 heads.classifier",
    ),
    "6DRepNet": ("layer0 layer1.0 layer1.1 layer4.0", (OFFICIAL_BRANCHES, FUSED), "", "linear_reg"),
}


CLASSES = {
    "yolov6.models.yolo.Model": "YOLOv6",
    "yolov6.layers.common.RealVGGBlock": "YOLOv6",
    "models.yolo.Model": "YOLOv7",
    "models.yolo.DetectionModel": "ultralytics YOLO or YOLOv9",
    "ultralytics.nn.tasks.DetectionModel": "ultralytics YOLO or YOLOv9",
    "ultralytics.nn.modules.block.RepVGGDW": "ultralytics YOLO or YOLOv9",
    "transformers.models.rt_detr.modeling_rt_detr.RTDetrForObjectDetection": "RT-DETR or D-FINE",
    "src.zoo.dfine.dfine.DFINE": "RT-DETR or D-FINE",
    "super_gradients.training.models.detection_models.yolo_nas.yolo_nas_variants.YoloNAS_S": (
        "YOLO-NAS or another super-gradients detector"
    ),
    "super_gradients.training.models.classification_models.repvgg.RepVggA0": "super-gradients RepVGG",
    "mmyolo.models.detectors.yolo_detector.YOLODetector": "mmyolo detector",
    "damo.detectors.detector.Detector": "DAMO-YOLO",
    "diversebranchblock.DiverseBranchBlock": "diverse branch block (DBB)",
    "acnet.acb.ACBlock": "ACNet",
    "blocks_repvgg.RepVGGBlock_OREPA": "OREPA",
    "models.common.RepConv_OREPA": "OREPA",
    "repoptimizer.repoptvgg_model.LinearAddBlock": "RepOptimizers hyper-search (CSLA)",
    "repoptimizer.repoptvgg_model.RealVGGBlock": "RepOptimizers RepOpt-VGG (RealVGG)",
    "repoptimizer.repoptvgg_model.RepVGGBlock": "RepOptimizers RepVGG",
    "repvgg.GRERepVGGBlockV3": "experimental QARepVGG (GRE, V3, V4, V9 or V14)",
    "repvgg.QARepVGGBlockV5": "experimental QARepVGG (V5)",
    "model.repvit.RepVGGDW": "RepViT",
    "wespeaker.models.repvgg.RepSPKBlock": "wespeaker RepSPK",
    "holocron.models.classification.repvgg.RepVGG": "Holocron RepVGG",
    "luxonis_train.nodes.backbones.repvgg.repvgg.RepVGG": "luxonis-train",
    "paddle.base.framework.EagerParamBase": "PaddleClas RepVGG",
}
LOADABLE = (
    "repvgg.RepVGG",
    "repvgg.RepVGGBlock",
    "repvggplus.RepVGGplus",
    "repvgg.QARepVGGBlockV2",
    "repvgg.QARepVGGBlockV1",
    "timm.models.byobnet.ByobNet",
    "timm.models.byobnet.MobileOneBlock",
    "mobileone.MobileOne",
    "models.mobileone.MobileOne",
    "mmpretrain.models.backbones.repvgg.RepVGG",
    "mmcls.models.backbones.repvgg.RepVGG",
    "sixdrepnet.model.SixDRepNet",
    "fastreid.modeling.backbones.repvgg.RepVGG",
    "torch.nn.modules.conv.Conv2d",
    "src.nn.backbone.RepVGG",
    "repoptimizer.repoptvgg_model.RepOptVGG",
    "wespeaker.models.repvgg.RepVGGBlock",
    "yacs.config.CfgNode",
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "",
)
