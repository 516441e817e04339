# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The audio-visual localizer and clusterer: stages 1 and 2, and, frozen, what stage 3 learns from.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone

from avdet2.modeling.avol import AUDIO_ENCODER_REGISTRY
from avdet2.modeling.heads import HeadSettings, MLPHead, global_pool, joint_cluster
from avdet2.modeling.losses import clustering_loss
from avdet2.modeling.meta_arch.common import log_metrics, normalize
from avdet2.modeling.objectives import Objective, build_objective
from avdet2.modeling.sounding_objects import SoundingObject, build_sounding_objects
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


class TestTimeAugmentation(NamedTuple):
    """
    Views of an image whose heatmaps are averaged.

    Attributes:
        scales: of the image's size; 1 is the size that it has.
        flip: take the mirrored copies as well.
    """

    # Not a test, whatever pytest makes of the name.
    __test__ = False

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False


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
        objective: Objective,
        objective_weight: float,
        heads: HeadSettings,
        sounding: SoundingObject,
        pixel_stats: tuple[Sequence[float], Sequence[float]],
        tta: TestTimeAugmentation,
    ) -> None:
        """
        Args:
            visual_encoder: any backbone; its map ``visual_feature`` is used.
            audio_encoder: maps (N, 1, F, T) to (N, C, f, t); attribute ``out_channels``.
            spectrogram: maps (N, T) waveforms to (N, 1, F, T').
            objective: trains the localisation heads; it says what heatmaps are.
            objective_weight: lambda of eq. 4, in [0, 1]; at 1 there are no clustering heads.
            heads: of all four.
            sounding: makes self-boxes of heatmaps, in inference.
            pixel_stats: mean and standard deviation per channel, of images in 0..255.
            tta: views of an image whose heatmaps are averaged, in inference.
        """
        super().__init__()
        if not 0 <= objective_weight <= 1:
            raise ValueError(f"MODEL.LOCALIZER.LAMBDA must be in [0, 1], not {objective_weight}")
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
        self.objective, self.objective_weight = objective, objective_weight
        self.loc_v = MLPHead(visual_dim, heads, heads.embed_dim)
        self.loc_a = MLPHead(audio_dim, heads, heads.embed_dim)
        # DDP fails on parameters without a gradient, so heads without a loss are not built.
        self.has_heads = objective_weight < 1
        if self.has_heads:
            self.cls_v = MLPHead(visual_dim, heads, heads.num_clusters)
            self.cls_a = MLPHead(audio_dim, heads, heads.num_clusters)
        self.sounding, self.tta = sounding, tta
        # 0 without clusters.
        of_heads = heads.num_clusters if self.has_heads else 0
        self.num_clusters = sounding.num_clusters or of_heads
        # Labels y of all training clips by sample_id, set by SelfLabelHook and saved with it.
        self.register_buffer("labels", torch.empty(0, dtype=torch.long), persistent=False)
        for name, values in zip(("pixel_mean", "pixel_std"), pixel_stats, strict=True):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        # A fifth faster on CPUs, and what tensor cores want.
        self.to(memory_format=torch.channels_last)
        self._compiled: tuple[nn.Module, ...] = ()

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.LOCALIZER
        return {
            "visual_encoder": build_backbone(cfg),
            "visual_feature": node.VISUAL_FEATURE,
            "audio_encoder": AUDIO_ENCODER_REGISTRY.get(node.AUDIO_ENCODER.NAME)(cfg),
            "spectrogram": LogSpectrogram(cfg),
            "objective": build_objective(node),
            "objective_weight": node.LAMBDA,
            "heads": HeadSettings.from_config(node),
            "sounding": build_sounding_objects(cfg),
            "tta": TestTimeAugmentation(tuple(node.TTA.SCALES), node.TTA.FLIP),
            "pixel_stats": (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD),
        }

    @property
    def has_clusters(self) -> bool:
        """
        Whether there are clusters: those of the heads, or the entries of the dictionary.
        """
        return self.num_clusters > 0

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
            self.sounding.check_training()
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
        size = [max(1, round(int(side) / stride)) * stride for side in images.shape[2:]]
        if tuple(size) == tuple(images.shape[2:]):
            return images
        images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return images.contiguous(memory_format=torch.channels_last)

    def extract(self, images: torch.Tensor, spectrograms: torch.Tensor) -> PairFeatures:
        """
        Run encoders and heads on what :meth:`preprocess` returns. The features are float32, also
        under autocast.
        """
        compiled = self._compiled if self.training else ()
        visual_encoder, audio_encoder = compiled or (self.visual_encoder, self.audio_encoder)
        visual = visual_encoder(images)[self.visual_feature]
        audio = global_pool(audio_encoder(spectrograms))
        logits_v = logits_a = None
        if self.has_heads:
            logits_v = self.cls_v(global_pool(visual)).flatten(1).float()
            logits_a = self.cls_a(audio).flatten(1).float()
        embed_v, embed_a = self.loc_v(visual).float(), self.loc_a(audio).flatten(1).float()
        embed_v, embed_a = self.objective.embed(embed_v, embed_a)
        return PairFeatures(embed_v, embed_a, logits_v, logits_a)

    def losses(self, features: PairFeatures, batched_inputs: Batch) -> dict:
        """
        Eq. 4, as a dict of its weighted terms.
        """
        # Under AMP the products of the scores would be in half precision.
        with torch.autocast(self.device.type, enabled=False):
            loss, accuracy = self.objective(features.visual, features.audio)
            losses = {f"loss_{self.objective.name}": self.objective_weight * loss}
            if self.has_heads:
                labels = self._labels_of(batched_inputs)
                loss = clustering_loss(features.logits_v, features.logits_a, labels)
                losses["loss_cluster"] = (1 - self.objective_weight) * loss
        log_metrics(self.objective.name, self.device, lambda: self.objective.metrics(accuracy))
        return losses

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
            tuple: heatmaps (N, h, w) as the objective makes them, on the grid of the largest view
            of MODEL.LOCALIZER.TTA, and the features.
        """
        images, spectrograms = self.preprocess(batched_inputs)
        maps, features = self._respond(images, spectrograms)
        if self.tta != TestTimeAugmentation():
            maps = self._mean_heatmaps(images, features.audio, maps)
        return maps, features

    def respond(self, batched_inputs: Batch) -> tuple[torch.Tensor, PairFeatures]:
        """
        As :meth:`localize`, without its further views: heatmaps on the grid of the features.
        """
        return self._respond(*self.preprocess(batched_inputs))

    def _respond(
        self, images: torch.Tensor, spectrograms: torch.Tensor
    ) -> tuple[torch.Tensor, PairFeatures]:
        features = self.extract(images, spectrograms)
        with torch.autocast(self.device.type, enabled=False):
            maps = self.objective.heatmaps(features.visual, features.audio)
            logits = self.sounding.logits(features.visual, maps)
        if logits is not None:
            features = features._replace(logits_v=logits, logits_a=torch.zeros_like(logits))
        return maps, features

    def _mean_heatmaps(
        self, images: torch.Tensor, audio: torch.Tensor, own: torch.Tensor
    ) -> torch.Tensor:
        """
        Heatmaps, float32, on the grid of the largest view: means over the views of preprocessed
        images (N, 3, H, W), whose ``own`` heatmaps are (N, h, w).
        """
        scales, cells, total = self.tta.scales, own.shape[1:], 0.0
        grid = [max(1, round(side * max(scales))) for side in cells]
        mirrored = (False, True) if self.tta.flip else (False,)
        for scale, mirror in itertools.product(scales, mirrored):
            maps = own
            if (scale, mirror) != (1, False):
                size = [max(1, round(side * scale)) * self.visual_stride for side in cells]
                maps = self._heatmaps_of_view(images, audio, size, mirror)
            total = total + F.interpolate(maps[:, None], grid, mode="bilinear", align_corners=False)
        return total[:, 0] / (len(scales) * len(mirrored))

    def _heatmaps_of_view(
        self, images: torch.Tensor, audio: torch.Tensor, size: Sequence[int], mirror: bool
    ) -> torch.Tensor:
        view = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        view = view.flip(-1) if mirror else view
        view = view.contiguous(memory_format=torch.channels_last)
        visual = self.loc_v(self.visual_encoder(view)[self.visual_feature]).float()
        with torch.autocast(self.device.type, enabled=False):
            maps = self.objective.heatmaps(*self.objective.embed(visual, audio))
        return maps.flip(-1) if mirror else maps

    def inference(self, batched_inputs: Batch) -> list[dict]:
        """
        See :meth:`forward`; images must have one size.
        """
        maps, features = self.localize(batched_inputs)
        logits_v, logits_a = features.logits_v, features.logits_a
        clusters = [0] * len(maps)
        if logits_v is None:
            logits_v = logits_a = [None] * len(maps)
        else:
            clusters = joint_cluster(logits_v, logits_a).tolist()
        outputs = []
        for i, inputs in enumerate(batched_inputs):
            height, width = inputs["image"].shape[1:]
            size = inputs.get("height", height), inputs.get("width", width)
            with torch.autocast(self.device.type, enabled=False):
                found = self.sounding(
                    maps[i],
                    features.visual[i],
                    clusters[i],
                    self.objective,
                    inputs["image"],
                    size,
                )
            logits = {"logits_v": logits_v[i], "logits_a": logits_a[i]}
            outputs.append({"heatmap": maps[i], **logits, "embed_a": features.audio[i], **found})
        return outputs

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # In place, as what comes after reads the same dict.
        renamed = current_names(state_dict, prefix)
        state_dict.clear()
        state_dict.update(renamed)
        super()._load_from_state_dict(state_dict, prefix, *args)


def current_names(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """
    A checkpoint's state with the names that tensors of a localizer (behind ``prefix``) have today:
    the objective was once called nce.
    """
    old, new = f"{prefix}nce.", f"{prefix}objective."
    return {
        new + key.removeprefix(old) if key.startswith(old) else key: value
        for key, value in state.items()
    }
