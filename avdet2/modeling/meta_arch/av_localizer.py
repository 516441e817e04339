# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The audio-visual localizer and clusterer: stages 1 and 2, and the teacher of stage 3.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, Instances

from avdet2.modeling.avol import AUDIO_ENCODER_REGISTRY
from avdet2.modeling.heads import MLPHead, global_pool, joint_cluster
from avdet2.modeling.losses import clustering_loss, heatmaps
from avdet2.modeling.meta_arch.common import due_storage, normalize
from avdet2.modeling.object_dictionary import (
    class_heatmaps,
    heard_objects,
    load_dictionary,
    object_vectors,
)
from avdet2.modeling.objectives import CorrespondenceLoss, build_objective
from avdet2.modeling.self_box import self_boxes
from avdet2.modeling.spectrogram import LogSpectrogram
from avdet2.structures.batch import Batch, sample_ids_on, stacked_on


class PairFeatures(NamedTuple):
    """
    What the networks make of N pairs of frames and sounds.

    Attributes:
        visual: f^v, of shape (N, D, h, w), unit length over D (unless NORMALIZE is off).
        audio: f^a, of shape (N, D), likewise.
        logits_v, logits_a: g^v and g^a, of shape (N, K); None without clustering heads. With a
            dictionary of objects, the cosines of what is heard with its entries, and zeros.
    """

    visual: torch.Tensor
    audio: torch.Tensor
    logits_v: torch.Tensor | None
    logits_a: torch.Tensor | None


@META_ARCH_REGISTRY.register()
class AVLocalizer(nn.Module):
    """
    Two encoders q^v and q^a with four heads f^v, f^a, g^v, g^a, trained by eq. 4.

    In training it returns a dict of losses. In inference every image gets a self-box (eq. 5), its
    cluster (eq. 6), and the heatmap and logits that they come from. With a dictionary of objects
    (DSOL) there is a heatmap and a box for every kind of object that is heard.
    """

    @configurable
    def __init__(
        self,
        *,
        visual_encoder: Backbone,
        visual_feature: str,
        audio_encoder: nn.Module,
        spectrogram: LogSpectrogram,
        objective: nn.Module,
        normalize: bool,
        hidden_dim: int,
        embed_dim: int,
        num_clusters: int,
        norm: str,
        dropout: float,
        nce_weight: float,
        beta: tuple[float, float],
        multi: bool,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        objects: torch.Tensor | None = None,
    ) -> None:
        """
        Args:
            visual_encoder: any backbone; its map ``visual_feature`` is used.
            audio_encoder: maps (N, 1, F, T) to (N, C, f, t); attribute ``out_channels``.
            spectrogram: maps (N, T) waveforms to (N, 1, F, T').
            objective: see :func:`build_objective`.
            normalize: scale embeddings to unit length.
            hidden_dim, embed_dim, num_clusters, norm, dropout: of the heads.
            nce_weight: lambda of eq. 4, in [0, 1]; at 1 there are no clustering heads.
            beta, multi: of the self-boxes; in inference the middle of the range ``beta`` is used.
            pixel_mean, pixel_std: per channel, of images in 0..255.
            objects: a dictionary of objects, of shape (O, embed_dim); they are then the clusters,
                in place of those of the heads.
        """
        super().__init__()
        if not 0 <= nce_weight <= 1:
            raise ValueError(f"MODEL.LOCALIZER.LAMBDA must be in [0, 1], not {nce_weight}")
        self.visual_encoder, self.visual_feature = visual_encoder, visual_feature
        self.audio_encoder, self.spectrogram = audio_encoder, spectrogram
        shapes = visual_encoder.output_shape()
        if visual_feature not in shapes:
            raise ValueError(
                f"MODEL.LOCALIZER.VISUAL_FEATURE {visual_feature!r} is none of the backbone's "
                f"outputs {sorted(shapes)}"
            )
        visual_dim, audio_dim = shapes[visual_feature].channels, audio_encoder.out_channels
        self.visual_stride = shapes[visual_feature].stride
        # Checkpoints know it by the name of the default.
        self.nce, self.normalize = objective, normalize
        self.nce_weight = nce_weight
        self.beta, self.multi = sum(beta) / 2, multi

        def head(in_channels: int, out_channels: int) -> MLPHead:
            return MLPHead(in_channels, hidden_dim, out_channels, norm, dropout)

        self.loc_v, self.loc_a = head(visual_dim, embed_dim), head(audio_dim, embed_dim)
        # DDP fails on parameters without a gradient, so heads without a loss are not built.
        self.has_heads = nce_weight < 1
        if self.has_heads:
            self.cls_v, self.cls_a = head(visual_dim, num_clusters), head(audio_dim, num_clusters)
        self.register_buffer("objects", objects, persistent=False)
        self.num_clusters = num_clusters if objects is None else len(objects)
        # Labels y of all training clips by sample_id, set by SelfLabelHook and saved with it.
        self.register_buffer("labels", torch.empty(0, dtype=torch.long), persistent=False)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        # A fifth faster on CPUs, and what tensor cores want.
        self.to(memory_format=torch.channels_last)
        self._compiled: tuple[nn.Module, ...] = ()

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.LOCALIZER
        path = node.OBJECT_DICTIONARY
        return {
            "visual_encoder": build_backbone(cfg),
            "visual_feature": node.VISUAL_FEATURE,
            "audio_encoder": AUDIO_ENCODER_REGISTRY.get(node.AUDIO_ENCODER.NAME)(cfg),
            "spectrogram": LogSpectrogram(cfg),
            "objective": build_objective(node),
            "normalize": node.NORMALIZE,
            "hidden_dim": node.HIDDEN_DIM,
            "embed_dim": node.EMBED_DIM,
            "num_clusters": node.NUM_CLUSTERS,
            "norm": node.NORM,
            "dropout": node.DROPOUT,
            "nce_weight": node.LAMBDA,
            "beta": cfg.MODEL.SELF_BOX.BETA,
            "multi": cfg.MODEL.SELF_BOX.MULTI,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "objects": load_dictionary(path, node.EMBED_DIM) if path else None,
        }

    @property
    def has_clusters(self) -> bool:
        """
        Whether there are clusters: those of the heads, or the entries of the dictionary.
        """
        return self.has_heads or self.objects is not None

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def compile_encoders(self) -> None:
        """
        Let both encoders be compiled (torch.compile) at the next training step. Inference, with
        its images of many sizes, goes on without.
        """
        # A tuple is no submodule: names in checkpoints stay.
        self._compiled = torch.compile(self.visual_encoder), torch.compile(self.audio_encoder)

    def forward(self, batched_inputs: Batch) -> dict[str, torch.Tensor] | list[dict]:
        """
        Args:
            batched_inputs: dicts of AVMapper (a list, or a PairBatch), with "image" (3, h, w) uint8
                and "waveform" (T,) int16; in training also "sample_id", and images of one size.

        Returns:
            in training a dict of ``loss_nce`` (or of the OBJECTIVE's name) and ``loss_cluster``,
            weighted as in eq. 4. In inference a list of dicts: "instances" (the self-box in pixels
            of "height" and "width", its score in [0, 1], its cluster; empty where the heatmap has
            no peak), "heatmap" (h, w), "logits_v" and "logits_a" (K,) or None, "embed_a" (D,);
            with a dictionary also "class_heatmaps" (K, h, w), and "instances" has a box for each
            object that is heard.

        Raises:
            ValueError: in training, with a dictionary of objects.
        """
        if self.training:
            if self.objects is not None:
                raise ValueError(
                    "a dictionary of objects is for inference: train with "
                    "MODEL.LOCALIZER.OBJECT_DICTIONARY ''"
                )
            features = self.extract(*self.preprocess(batched_inputs))
            return self.losses(features, batched_inputs)
        sizes = {tuple(x["image"].shape) for x in batched_inputs}
        groups = [batched_inputs] if len(sizes) == 1 else [[x] for x in batched_inputs]
        return [output for group in groups for output in self.inference(group)]

    def preprocess(self, batched_inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Normalised images (N, 3, h, w), channels last, and log spectrograms (N, 1, F, T), both
        float32, on the model's device.
        """
        images = stacked_on(batched_inputs, "image", self.device)
        waveforms = stacked_on(batched_inputs, "waveform", self.device)
        with torch.autocast(self.device.type, enabled=False):
            images = normalize(images, self.pixel_mean, self.pixel_std)
            if not self.training:
                images = self._whole_cells(images)
            return images, self.spectrogram(waveforms)

    def _whole_cells(self, images: torch.Tensor) -> torch.Tensor:
        """
        Images resized to the nearest multiple of the map's stride: the pooling drops what is over,
        and a map without the right and lower edge would shift and stretch every box.
        """
        stride = self.visual_stride
        size = [max(1, round(side / stride)) * stride for side in images.shape[2:]]
        if tuple(size) == tuple(images.shape[2:]):
            return images
        images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return images.contiguous(memory_format=torch.channels_last)

    def extract(self, images: torch.Tensor, spectrograms: torch.Tensor) -> PairFeatures:
        """
        Run encoders and heads on what :meth:`preprocess` returns. The features are float32, also
        under autocast.
        """
        encoders = self.visual_encoder, self.audio_encoder
        if self.training and self._compiled:
            encoders = self._compiled
        visual = encoders[0](images)[self.visual_feature]
        audio = global_pool(encoders[1](spectrograms))
        logits_v = logits_a = None
        if self.has_heads:
            logits_v = self.cls_v(global_pool(visual)).flatten(1).float()
            logits_a = self.cls_a(audio).flatten(1).float()
        embed_v, embed_a = self.loc_v(visual).float(), self.loc_a(audio).flatten(1).float()
        if self.normalize:
            embed_v, embed_a = F.normalize(embed_v, dim=1), F.normalize(embed_a, dim=1)
        return PairFeatures(embed_v, embed_a, logits_v, logits_a)

    def losses(self, features: PairFeatures, batched_inputs: Batch) -> dict:
        """
        Eq. 4, as a dict of its weighted terms.
        """
        # Under AMP the products of the scores would be in half precision.
        with torch.autocast(self.device.type, enabled=False):
            loss, accuracy = self.nce(features.visual, features.audio)
            losses = {f"loss_{self.nce.name}": self.nce_weight * loss}
            if self.has_heads:
                labels = self._labels_of(batched_inputs)
                loss = clustering_loss(features.logits_v, features.logits_a, labels)
                losses["loss_cluster"] = (1 - self.nce_weight) * loss
        self._log(accuracy)
        return losses

    def _log(self, accuracy: torch.Tensor) -> None:
        storage, on_cpu = due_storage(self.device), self.device.type == "cpu"
        if storage is None:
            return
        storage.put_scalar(f"{self.nce.name}/accuracy", accuracy.item(), smoothing_hint=on_cpu)
        if hasattr(self.nce, "temperature"):
            rho = self.nce.temperature.rho()
            storage.put_scalar(f"{self.nce.name}/rho", rho, smoothing_hint=on_cpu)

    def _labels_of(self, batched_inputs: Batch) -> torch.Tensor:
        if not len(self.labels):
            raise ValueError(
                "there are no self-labels yet: with LAMBDA < 1 train through "
                "avdet2.engine.AVTrainer, whose SelfLabelHook estimates them, or set model.labels"
            )
        return self.labels[sample_ids_on(batched_inputs, self.labels.device)]

    def localize(self, batched_inputs: Batch) -> tuple[torch.Tensor, PairFeatures]:
        """
        Heatmaps of pairs whose images have one size.

        Returns:
            tuple: heatmaps (N, h, w), and the features. Heatmaps are cosines in [-1, 1] (rho * h of
            the paper: eq. 5 gives the same boxes for both), or scalar products with NORMALIZE off;
            with OBJECTIVE bce, AVOL-Net's probabilities.
        """
        features = self.extract(*self.preprocess(batched_inputs))
        with torch.autocast(self.device.type, enabled=False):
            maps = heatmaps(features.visual, features.audio)
            if isinstance(self.nce, CorrespondenceLoss):
                maps = self.nce.logits(maps).sigmoid()
            if self.objects is not None:
                nearest = object_vectors(features.visual, maps) @ self.objects.t()
                features = features._replace(logits_v=nearest, logits_a=torch.zeros_like(nearest))
        return maps, features

    def inference(self, batched_inputs: Batch) -> list[dict]:
        """
        See :meth:`forward`; images must have one size.
        """
        maps, features = self.localize(batched_inputs)
        outputs = []
        for i, inputs in enumerate(batched_inputs):
            logits_v = logits_a = None
            cluster = 0
            if self.has_clusters:
                logits_v, logits_a = features.logits_v[i], features.logits_a[i]
                cluster = int(joint_cluster(logits_v, logits_a))
            output = {
                "heatmap": maps[i],
                "logits_v": logits_v,
                "logits_a": logits_a,
                "embed_a": features.audio[i],
            }
            if self.objects is None:
                output["instances"] = self._instances(maps[i : i + 1], [cluster], inputs)
                scores = self._confidence(output["instances"].scores)
                output["instances"].scores = scores
            else:
                output |= self._objects(maps[i : i + 1], features.visual[i : i + 1], inputs)
            outputs.append(output)
        return outputs

    def _confidence(self, heat: torch.Tensor) -> torch.Tensor:
        """
        Values of a heatmap as numbers in [0, 1], in the same order.
        """
        if isinstance(self.nce, CorrespondenceLoss):
            return heat
        return (1 + heat) / 2 if self.normalize else heat.sigmoid()

    def _objects(self, heat: torch.Tensor, visual: torch.Tensor, inputs: dict) -> dict:
        """
        Heatmaps of the dictionary's entries, and boxes of those that are heard.

        Args:
            heat, visual: heatmap (1, h, w) and features (1, D, h, w) of one image.
            inputs: the image.
        """
        # Cosines say by their sign what is not heard; other scalar products have no scale.
        bounded = self.normalize or isinstance(self.nce, CorrespondenceLoss)
        with torch.autocast(self.device.type, enabled=False):
            (maps,) = class_heatmaps(self.objects, visual, heat if bounded else heat.sigmoid())
        heard = heard_objects(maps)
        instances = self._instances(maps[heard], heard.tolist(), inputs)
        return {"instances": instances, "class_heatmaps": maps}

    def _instances(self, maps: torch.Tensor, clusters: Sequence[int], inputs: dict) -> Instances:
        """
        The self-boxes of heatmaps (n, h, w) of one image that stand for n clusters; scores are the
        peaks.
        """
        size = (
            inputs.get("height", inputs["image"].shape[1]),
            inputs.get("width", inputs["image"].shape[2]),
        )
        found = [self_boxes(heatmap, size, self.beta, self.multi) for heatmap in maps]
        classes = [torch.full((len(x[0]),), cluster) for x, cluster in zip(found, clusters)]
        instances = Instances(size)
        instances.pred_boxes = Boxes(torch.cat([torch.zeros(0, 4), *(x[0] for x in found)]))
        instances.scores = torch.cat([torch.zeros(0), *(x[1] for x in found)])
        instances.pred_classes = torch.cat([torch.zeros(0, dtype=torch.long), *classes])
        return instances
