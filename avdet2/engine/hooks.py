# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Self-labelling as a training hook.
"""

import logging
import time
from collections import Counter

import numpy as np
import torch
import torch.distributed as dist

from detectron2.config import CfgNode
from detectron2.data.samplers import InferenceSampler
from detectron2.engine import HookBase
from detectron2.utils import comm

from avdet2.data.clips import single_labels, training_clips
from avdet2.data.mappers.av_mapper import AVMapper
from avdet2.data.mappers.read_counts import ReadCounts, describe
from avdet2.engine.clip_scores import ClipScores
from avdet2.evaluation.naming.self_labels import cluster_quality, eq6_agreement, label_change
from avdet2.modeling.meta_arch import AVLocalizer
from avdet2.modeling.sinkhorn import gaussian_weights, match_marginals, sinkhorn_labels
from avdet2.self_boxes.inference import predict_clips
from avdet2.structures.batch import sample_ids_on
from avdet2.utils.collectives import all_reduce, broadcast_buffers, of_main_process

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


class ReadReport(HookBase):
    """
    Says at the end, however the training ends, how many samples could not be read, and why.
    """

    def after_train(self) -> None:
        counts = sum((counts.total() for counts in ReadCounts.all), Counter())
        # A process that has failed must not wait for the others.
        whose = "" if comm.get_world_size() == 1 else f" (rank {comm.get_rank()})"
        if counts.total() > counts[""]:
            logger.warning(f"{describe(counts)}{whose}")


class SelfLabelHook(HookBase):
    """
    Estimates the shared labels y of all training clips by Sinkhorn-Knopp (eq. 3) on a schedule.

    Labels live in the model's buffer ``labels``, indexed by sample_id (-1 for a clip that cannot
    be read), and are saved with this hook, so that a resumed training goes on with them.
    """

    def __init__(self, cfg: CfgNode, model: AVLocalizer) -> None:
        """
        Args:
            model: the localizer, not wrapped in DDP.
        """
        self._cfg, self._model = cfg, model
        self._node = cfg.MODEL.LOCALIZER.SELF_LABEL
        if self._node.INIT not in ("sinkhorn", "kmeans"):
            raise ValueError(f"SELF_LABEL.INIT must be sinkhorn or kmeans, not {self._node.INIT!r}")
        self._num_clusters = cfg.MODEL.LOCALIZER.NUM_CLUSTERS
        self._weights = _marginal_weights(self._node, self._num_clusters, cfg.SEED)
        self._clips, _ = training_clips(cfg.DATASETS.TRAIN)
        # For assessment only.
        self._truth = torch.from_numpy(single_labels(self._clips))
        self._mapper = AVMapper(cfg, "center")
        self._collapsed = self._settled = 0

    def state_dict(self) -> dict:
        # Tensors and plain values only: checkpoints are loaded with weights_only.
        return {
            "labels": self._model.labels.cpu(),
            "weights": self._weights,
            "collapsed": self._collapsed,
            "settled": self._settled,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        labels = state_dict["labels"]
        if len(labels) != len(self._clips):
            raise ValueError(
                f"the checkpoint has labels of {len(labels)} clips, the training set "
                f"{self._cfg.DATASETS.TRAIN} has {len(self._clips)}: resume with the same clips"
            )
        self._model.labels = labels.to(self._model.device)
        self._weights, self._collapsed = state_dict["weights"], state_dict.get("collapsed", 0)
        self._settled = state_dict.get("settled", 0)

    def before_train(self) -> None:
        node = self._node
        self._schedule = set(
            label_schedule(self.trainer.max_iter, node.NUM_OPTIMIZATIONS, node.POWER)
        )
        if not len(self._model.labels):
            self.update(first=True)

    def after_step(self) -> None:
        if self.trainer.iter + 1 in self._schedule and self._settled < 2:
            self.update()
            if self._settled == 2:
                logger.info("the self-labels have settled: they stay as they are until the end")

    def update(self, first: bool = False) -> None:
        """
        Estimate the labels from the model as it is, on all processes together.

        Args:
            first: there are no labels yet, so that SELF_LABEL.INIT and ALIGN_HEADS apply.
        """
        start = time.perf_counter()
        broadcast_buffers(self._model)
        is_kmeans = first and self._node.INIT == "kmeans"
        is_unaligned = first and self._node.ALIGN_HEADS
        scores, audio = self._predict(is_unaligned, keep_audio=is_kmeans)
        if is_unaligned:
            last = self._model.cls_a[-1]
            order = scores.align().to(last.weight.device)
            with torch.no_grad():
                last.weight.copy_(last.weight[order])
                last.bias.copy_(last.bias[order])
        extra = {}
        if is_kmeans:
            local = _kmeans_labels(audio, self._num_clusters, self._cfg.SEED)
        else:
            local, extra = self._sinkhorn(scores)
        labels = torch.full((len(self._clips),), -1, dtype=torch.int32)
        labels[scores.ids] = local.cpu().int()
        labels = all_reduce(labels, op=dist.ReduceOp.MAX).long()
        self._log(labels, extra, time.perf_counter() - start)
        if len(self._model.labels):
            # All processes have the same labels, and count alike.
            changed = (labels != self._model.labels.cpu()).float().mean().item()
            self._settled = self._settled + 1 if changed < self._node.STOP_BELOW else 0
        self._model.labels = labels.to(self._model.device)
        self._check_collapse(labels, scores.values)

    def _check_collapse(self, labels: torch.Tensor, scores: torch.Tensor) -> None:
        """
        Warn, and after some times in a row raise, where the labels tell nothing apart. All
        processes have the same labels, and decide alike.
        """
        # No clip in this process: nothing differs in it.
        ends = (scores.amin(0).cpu(), scores.amax(0).cpu()) if len(scores) else None
        lows, highs = zip(*filter(None, comm.all_gather(ends)))
        if torch.stack(highs).amax(0).sub(torch.stack(lows).amin(0)).max() < 1e-6:
            logger.warning("all clips have the same scores of clusters: the heads tell none apart")
        used = len(labels[labels >= 0].unique())
        self._collapsed = self._collapsed + 1 if used < 2 else 0
        if not self._collapsed:
            return
        text = f"the clusters have collapsed: {used} of {self._num_clusters} is used"
        if 0 < self._node.MAX_COLLAPSED <= self._collapsed:
            raise ValueError(
                f"{text}, {self._collapsed} times in a row, so there is nothing to learn from the "
                "labels. Look at loss_nce of the stage before (is it below the logarithm of the "
                "batch?), give more clips, or a lower SOLVER.BASE_LR; to go on all the same, set "
                "MODEL.LOCALIZER.SELF_LABEL.MAX_COLLAPSED to 0"
            )
        logger.warning(text)

    def _predict(self, is_unaligned: bool, keep_audio: bool) -> tuple[ClipScores, torch.Tensor]:
        """
        Scores of this process's share of the clips, and their audio embeddings (n, D), or (0, D)
        where they are not kept.
        """
        cfg, model = self._cfg, self._model
        share = len(InferenceSampler(len(self._clips)))
        scores = ClipScores(share, self._num_clusters, model.device, aligned=not is_unaligned)
        audio = [torch.empty(0, cfg.MODEL.LOCALIZER.EMBED_DIM)]
        batches = predict_clips(
            model,
            self._clips,
            self._mapper,
            self._node.BATCH_SIZE,
            cfg.DATALOADER.NUM_WORKERS,
            call=lambda batch: model.respond(batch)[1],
        )
        for inputs, features in batches:
            ids = sample_ids_on(inputs, torch.device("cpu"))
            scores.add(ids, features.logits_v, features.logits_a)
            if keep_audio:
                audio.append(features.audio.cpu())
        # All processes raise together: one that went on alone would wait for the others for ever.
        if not sum(comm.all_gather(len(scores.ids))):
            raise ValueError("no training clip could be read for self-labelling")
        return scores, torch.cat(audio)

    def _sinkhorn(self, scores: ClipScores) -> tuple[torch.Tensor, dict]:
        marginals = self._weights
        if self._node.MARGINALS == "gaussian":
            marginals = match_marginals(self._weights, scores.mass())
        result = sinkhorn_labels(
            scores.values,
            marginals=marginals,
            sk_lambda=self._node.SK_LAMBDA,
            tol=self._node.TOL,
            max_iter=self._node.MAX_PASSES,
        )
        # This process may have no clip.
        count = len(result.labels)
        share = eq6_agreement(scores.values, result.labels) if count else 0.0
        matches, counts = zip(*comm.all_gather((share * count, count)))
        agreement = sum(matches) / sum(counts)
        return result.labels, {"passes": result.passes, "eq6_agreement": agreement}

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
        known = read & (self._truth >= 0)
        if known.any():
            quality = cluster_quality(labels[known], self._truth[known], self._num_clusters)
            values.update({f"assess_{key}": quality[key] for key in ("NMI", "hungarian_accuracy")})
        text = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        logger.info(f"self-labels before iteration {self.trainer.iter + 1}: {text}")
        for key, value in values.items():
            self.trainer.storage.put_scalar(f"self_label/{key}", value, smoothing_hint=False)


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

    facts = comm.all_gather((len(audio), bool(audio.isfinite().all())))
    counts, finite = zip(*facts)
    if sum(counts) < num_clusters or not all(finite):
        raise ValueError(
            f"K-means cannot make {num_clusters} clusters of {sum(counts)} audio embeddings"
            + ("" if all(finite) else ", of which some are not finite")
        )
    # On one process: others, of another machine, might round to other clusters.
    parts = comm.gather(audio.numpy())
    labels = None
    if comm.is_main_process():
        kmeans = KMeans(num_clusters, n_init=10, random_state=max(seed, 0))
        labels = kmeans.fit_predict(np.concatenate(parts))
    labels = torch.from_numpy(of_main_process(labels)).long()
    start = sum(counts[: comm.get_rank()])
    return labels[start : start + len(audio)]
