# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Self-labelling as a training hook.
"""

import logging
import time

import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from avdet2.data.av_mapper import AVMapper
from avdet2.data.clips import training_clips
from avdet2.evaluation.inference import predict_clips
from avdet2.evaluation.self_labels import cluster_quality, eq6_agreement, label_change
from avdet2.modeling.meta_arch import AVLocalizer
from avdet2.modeling.sinkhorn import (
    align_heads,
    gaussian_weights,
    match_marginals,
    sinkhorn_labels,
)

logger = logging.getLogger(__name__)


def label_schedule(max_iter: int, num_optimizations: int, power: float) -> list[int]:
    """
    Iterations before which the labels are estimated: max_iter * linspace(0, 1, n) ** power, as in
    SeLaVi's schedule, without the one at the end, which nothing would be trained on.
    """
    if num_optimizations < 1:
        raise ValueError(f"NUM_OPTIMIZATIONS must be at least 1, not {num_optimizations}")
    points = max_iter * np.linspace(0, 1, num_optimizations) ** power
    return sorted({int(x) for x in points if int(x) < max_iter})


class SelfLabelHook(HookBase):
    """
    Estimates the shared labels y of all training clips by Sinkhorn-Knopp (eq. 3) on a schedule.

    Labels live in the model's buffer ``labels``, indexed by sample_id (-1 for a clip that cannot
    be read), and are saved with this hook, so that a resumed training goes on with them.
    """

    def __init__(self, cfg: CfgNode, model: AVLocalizer) -> None:
        """
        Args:
            cfg: the training's config; MODEL.LOCALIZER.SELF_LABEL is read.
            model: the localizer, not wrapped in DDP.
        """
        self._cfg, self._model = cfg, model
        self._node = cfg.MODEL.LOCALIZER.SELF_LABEL
        if self._node.INIT not in ("sinkhorn", "kmeans"):
            raise ValueError(f"SELF_LABEL.INIT must be sinkhorn or kmeans, not {self._node.INIT!r}")
        self._num_clusters = cfg.MODEL.LOCALIZER.NUM_CLUSTERS
        self._weights = _marginal_weights(self._node, self._num_clusters, cfg.SEED)
        self._clips, _ = training_clips(cfg.DATASETS.TRAIN)
        self._mapper = AVMapper(cfg, "center")

    def state_dict(self) -> dict:
        # Tensors and plain values only: checkpoints are loaded with weights_only.
        return {"labels": self._model.labels.cpu(), "weights": self._weights}

    def load_state_dict(self, state_dict: dict) -> None:
        labels = state_dict["labels"]
        if len(labels) != len(self._clips):
            raise ValueError(
                f"the checkpoint has labels of {len(labels)} clips, the training set "
                f"{self._cfg.DATASETS.TRAIN} has {len(self._clips)}: resume with the same clips"
            )
        self._model.labels = labels.to(self._model.device)
        self._weights = state_dict["weights"]

    def before_train(self) -> None:
        node = self._node
        self._schedule = set(
            label_schedule(self.trainer.max_iter, node.NUM_OPTIMIZATIONS, node.POWER)
        )
        if not len(self._model.labels):
            self.update(first=True)

    def after_step(self) -> None:
        if self.trainer.iter + 1 in self._schedule:
            self.update()

    def update(self, first: bool = False) -> None:
        """
        Estimate the labels from the model as it is, on all processes together.

        Args:
            first: there are no labels yet (SELF_LABEL.INIT applies).
        """
        start = time.perf_counter()
        ids, logits_v, logits_a, audio = self._predict()
        if first and self._node.ALIGN_HEADS:
            logits_a = self._align_heads(logits_v, logits_a)
        extra = {}
        if first and self._node.INIT == "kmeans":
            local = _kmeans_labels(audio, self._num_clusters, self._cfg.SEED)
        else:
            local, extra = self._sinkhorn(logits_v, logits_a)
        labels = self._gather(ids, local)
        self._log(labels, extra, time.perf_counter() - start)
        self._model.labels = labels.to(self._model.device)

    def _predict(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Sample ids (n,), logits g_v and g_a (n, K), and audio embeddings (n, D) of this process's
        share of the clips; n may be 0 on some processes.
        """
        cfg = self._cfg
        ids = []
        logits_v = [torch.empty(0, self._num_clusters)]
        logits_a = [torch.empty(0, self._num_clusters)]
        audio = [torch.empty(0, cfg.MODEL.LOCALIZER.EMBED_DIM)]
        batches = predict_clips(
            self._model,
            self._clips,
            self._mapper,
            self._node.BATCH_SIZE,
            cfg.DATALOADER.NUM_WORKERS,
        )
        for inputs, outputs in batches:
            ids += [x["sample_id"] for x in inputs]
            logits_v += [x["logits_v"][None].cpu() for x in outputs]
            logits_a += [x["logits_a"][None].cpu() for x in outputs]
            audio += [x["embed_a"][None].cpu() for x in outputs]
        # All processes raise together: one that went on alone would wait for the others for ever.
        if not sum(comm.all_gather(len(ids))):
            raise ValueError("no training clip could be read for self-labelling")
        ids = torch.tensor(ids, dtype=torch.long)
        return ids, torch.cat(logits_v), torch.cat(logits_a), torch.cat(audio)

    def _align_heads(self, logits_v: torch.Tensor, logits_a: torch.Tensor) -> torch.Tensor:
        """
        Renumber the audio head's clusters as the visual head numbers them; its logits after that.
        """
        parts_v, parts_a = zip(*comm.all_gather((logits_v, logits_a)))
        order = align_heads(torch.cat(parts_v), torch.cat(parts_a))
        last = self._model.cls_a[-1]
        with torch.no_grad():
            last.weight.copy_(last.weight[order.to(last.weight.device)])
            last.bias.copy_(last.bias[order.to(last.bias.device)])
        return logits_a[:, order]

    def _sinkhorn(
        self, logits_v: torch.Tensor, logits_a: torch.Tensor
    ) -> tuple[torch.Tensor, dict]:
        marginals, scores = self._weights, logits_v + logits_a
        if self._node.MARGINALS == "gaussian":
            mass = (logits_v.double().softmax(dim=1) * logits_a.double().softmax(dim=1)).sum(dim=0)
            marginals = match_marginals(self._weights, sum(comm.all_gather(mass)))
        result = sinkhorn_labels(
            scores,
            marginals=marginals,
            sk_lambda=self._node.SK_LAMBDA,
            tol=self._node.TOL,
            max_iter=self._node.MAX_PASSES,
        )
        agreement = _agreement_of_all(scores, result.labels)
        return result.labels, {"passes": result.passes, "eq6_agreement": agreement}

    def _gather(self, ids: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        labels = torch.full((len(self._clips),), -1, dtype=torch.long)
        for other_ids, other_labels in comm.all_gather((ids, local.cpu())):
            labels[other_ids] = other_labels
        return labels

    def _log(self, labels: torch.Tensor, extra: dict, seconds: float) -> None:
        """
        Counts, change and, where the clip list has labels, their agreement: for assessment only.
        """
        if not comm.is_main_process():
            return
        read = labels >= 0
        counts = torch.bincount(labels[read], minlength=self._num_clusters)
        target = read.sum() / self._num_clusters
        values = {
            **extra,
            "used": int((counts > 0).sum()),
            "min_over_target": float(counts.min() / target),
            "max_over_target": float(counts.max() / target),
            "seconds": seconds,
        }
        previous = self._model.labels.cpu()
        if len(previous):
            both = read & (previous >= 0)
            values.update(label_change(previous[both], labels[both]))
        truth = torch.tensor([clip.get("label", -1) for clip in self._clips])
        known = read & (truth >= 0)
        if known.any():
            quality = cluster_quality(labels[known], truth[known], self._num_clusters)
            values.update({f"assess_{key}": quality[key] for key in ("NMI", "hungarian_accuracy")})
        text = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        logger.info(f"self-labels before iteration {self.trainer.iter + 1}: {text}")
        for key, value in values.items():
            self.trainer.storage.put_scalar(f"self_label/{key}", value, smoothing_hint=False)


def _agreement_of_all(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """
    :func:`eq6_agreement` over the clips of all processes; this one may have none.
    """
    count = len(scores)
    share = eq6_agreement(scores, labels) if count else 0.0
    matches, counts = zip(*comm.all_gather((share * count, count)))
    return sum(matches) / sum(counts)


def _marginal_weights(node: CfgNode, num_clusters: int, seed: int) -> torch.Tensor | None:
    """
    Target sizes of the clusters, None for equal ones.
    """
    if node.MARGINALS == "uniform":
        return None
    if node.MARGINALS == "gaussian":
        return torch.as_tensor(gaussian_weights(num_clusters, node.SIGMA, max(seed, 0)))
    weights = torch.from_numpy(np.loadtxt(node.MARGINALS, dtype=np.float64).ravel())
    if len(weights) != num_clusters:
        raise ValueError(
            f"{node.MARGINALS} holds {len(weights)} numbers, not one per cluster ({num_clusters})"
        )
    return weights / weights.sum()


def _kmeans_labels(audio: torch.Tensor, num_clusters: int, seed: int) -> torch.Tensor:
    """
    K-means of the audio embeddings of all processes; the labels of this process's share.
    """
    from sklearn.cluster import KMeans

    parts = comm.all_gather(audio)
    kmeans = KMeans(num_clusters, n_init=10, random_state=max(seed, 0))
    # The same input and seed on every process give the same labels.
    labels = kmeans.fit_predict(torch.cat(parts).numpy())
    start = sum(len(part) for part in parts[: comm.get_rank()])
    return torch.from_numpy(labels[start : start + len(audio)].astype(np.int64))
