# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A region proposal network as a detector without classes: "COCO-trained RPN" of Table 1.
"""

import torch

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import ProposalNetwork

from avdet2.evaluation.baselines.boxes import BoxBaseline, box_instances


@META_ARCH_REGISTRY.register()
class ClassAgnosticRPN(BoxBaseline, ProposalNetwork):
    """
    The stock ProposalNetwork, whose proposals are detections; scores are the sigmoids of the
    objectness.

    Any checkpoint will do that has a network with the config's ``backbone`` and
    ``proposal_generator``: of an RPN, of a Faster or Mask R-CNN, or of a detector on self-boxes.
    """

    def __init__(self, *args, **kwargs) -> None:
        """
        Args:
            args, kwargs: see ProposalNetwork.
        """
        super().__init__(*args, **kwargs)
        self.has_learned = False
        self.register_load_state_dict_post_hook(_check_loaded)

    def forward(self, batched_inputs: list[dict]) -> list[dict] | dict[str, torch.Tensor]:
        """
        Args:
            batched_inputs: see GeneralizedRCNN.

        Returns:
            for each image {"instances": Instances} at (height, width), with `pred_boxes`, `scores`
            and `pred_classes` (all 0), at most MODEL.RPN.POST_NMS_TOPK_TEST, the highest score
            first; in training the losses of the RPN.

        Raises:
            ValueError: in inference, without weights and without training.
        """
        if self.training:
            self.has_learned = True
            return super().forward(batched_inputs)
        if not self.has_learned:
            raise ValueError(
                "ClassAgnosticRPN has no weights, and would give random boxes: set MODEL.WEIGHTS "
                "to a detector's or an RPN's checkpoint, such as the one that "
                "configs/Baselines/coco_rpn_R50_FPN.yaml names"
            )
        outputs = super().forward(batched_inputs)
        proposals = [output["proposals"] for output in outputs]
        return [
            {
                "instances": box_instances(
                    x.image_size, x.proposal_boxes.tensor, x.objectness_logits.sigmoid()
                )
            }
            for x in proposals
        ]


def _check_loaded(model: ClassAgnosticRPN, incompatible_keys) -> None:
    """
    Refuse a checkpoint without an RPN: Detectron2 would warn, and measure a random one.
    """
    model.has_learned = True
    parameters = {name for name, _ in model.named_parameters()}
    missing = sorted(parameters & set(incompatible_keys.missing_keys))
    if missing:
        raise ValueError(
            f"MODEL.WEIGHTS lack {len(missing)} tensors of the RPN or its backbone "
            f"({', '.join(missing[:3])}, ...): give a detector's or an RPN's checkpoint, with the "
            "config of that network"
        )
