# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Every configuration key that avdet2 adds to Detectron2's.
"""

from detectron2.config import CfgNode as CN


def add_avdet2_config(cfg: CN) -> None:
    """
    Add the keys of avdet2 to a Detectron2 config, in place.

    The defaults are the paper's where it states a value, and change nothing for stock models: a
    config without any of these keys trains as Detectron2 trains it.

    Args:
        cfg: the node that :func:`detectron2.config.get_cfg` returns.
    """
    _add_data(cfg)
    _add_weights(cfg)
    _add_avol(cfg)
    _add_localizer(cfg)
    _add_timm(cfg)
    _add_simclr(cfg)
    _add_spectrogram(cfg)
    _add_self_labels(cfg)
    _add_self_boxes(cfg)
    _add_rounds(cfg)
    _add_solver(cfg)
    _add_test(cfg)
    # The project of Weights & Biases that gets what TensorBoard gets; empty: none.
    cfg.WANDB = CN({"PROJECT": ""})
    _add_distributed(cfg)
    _add_pipeline(cfg)


def _add_data(cfg: CN) -> None:
    # A folder of videos, one video, or a clip list (csv, jsonl, parquet), that is to be used in
    # place of DATASETS.TRAIN. Empty: DATASETS.TRAIN as it stands.
    cfg.DATASETS.VIDEOS = ""
    # Videos are cut into clips of so many seconds.
    cfg.DATASETS.CLIP_SECONDS = 10.0
    # The largest share of the training clips that may be left out, as they have no sound, cannot be
    # read ...: with more, the run ends with an error that counts the reasons. 1: any.
    cfg.DATASETS.MAX_LEFT_OUT = 0.5
    # A COCO file of boxes on pictures of your own, and their folder (empty: that of the file), to
    # be used in place of DATASETS.TEST. Where its images have "audio_file" and "time" (of the
    # picture in it, in seconds), localizers are evaluated, too. Empty: DATASETS.TEST as it stands.
    cfg.DATASETS.TEST_JSON = ""
    cfg.DATASETS.TEST_IMAGES = ""
    # Folder that tools/prepare_clips.py wrote; clips that it holds are read from there, the others
    # from the original files.
    cfg.DATASETS.PREPARED = ""

    # What reads a training sample: DatasetMapper (stock), AVMapper (a frame and its sound, for the
    # localizer), SelfBoxMapper (an image with self-boxes, for the detector) or FrameMapper (frames
    # of a clip, for SimCLR).
    cfg.INPUT.MAPPER = "DatasetMapper"
    # Brightness, contrast and saturation of the images that a localizer (AVMapper) or a self-box
    # detector is trained on are multiplied by random factors from 1 - JITTER to 1 + JITTER.
    cfg.INPUT.JITTER = 0.0
    cfg.INPUT.AV = CN()
    # The short side of a frame is resized to FRAME_SIZE, then a square of CROP_SIZE is cut out
    # (Sec. 4.3). Tests see the whole frame with its short side at FRAME_SIZE.
    cfg.INPUT.AV.FRAME_SIZE = 256
    cfg.INPUT.AV.CROP_SIZE = 224
    # The sound of one sample: so many seconds around the frame's time (App. B: "24Hz" is 24 kHz).
    cfg.INPUT.AV.AUDIO_SECONDS = 1.0
    cfg.INPUT.AV.SAMPLE_RATE = 24000

    # The two views that SimCLR makes of a clip, on the device. The defaults are those of its
    # ImageNet training.
    cfg.INPUT.VIEWS = CN()
    cfg.INPUT.VIEWS.SIZE = 224
    # 1: both views are of one frame; 2: of two frames of the clip.
    cfg.INPUT.VIEWS.FRAMES_PER_CLIP = 1
    # Frames leave the loader with their short side at FRAME_SIZE at most.
    cfg.INPUT.VIEWS.FRAME_SIZE = 256
    # Share of the frame's area that a crop has.
    cfg.INPUT.VIEWS.CROP_AREA = (0.08, 1.0)
    # Strength of the colour jitter, and the probabilities of jitter, grayscale and blur.
    cfg.INPUT.VIEWS.JITTER_STRENGTH = 1.0
    cfg.INPUT.VIEWS.JITTER_PROB = 0.8
    cfg.INPUT.VIEWS.GRAYSCALE_PROB = 0.2
    cfg.INPUT.VIEWS.BLUR_PROB = 0.5


def _add_weights(cfg: CN) -> None:
    # Pickles in MODEL.WEIGHTS (and in DATASETS.PROPOSAL_FILES_*) may hold any object, as in stock
    # Detectron2, and run whatever code whoever wrote the file put there. Only the command line can
    # set it: a config file from elsewhere cannot. False: only tensors, arrays and basic types.
    cfg.MODEL.TRUST_PICKLES = False
    # In the config.yaml of a finished training MODEL.WEIGHTS are its own, for whoever uses the
    # model; here are those that it started from, as the only entry. Not to be set by hand.
    cfg.MODEL.STARTED_FROM = ()


def _add_avol(cfg: CN) -> None:
    # AVOL-Net as an image backbone (build_avol_backbone, build_avol_fpn_backbone): channels of its
    # four blocks; stride of the first convolution; the max-pooling behind blocks 1 to 3 (1: none).
    # 2 and (2, 2, 2) make the last map 1/16 of the image.
    cfg.MODEL.AVOL = CN()
    cfg.MODEL.AVOL.CHANNELS = (64, 128, 256, 512)
    cfg.MODEL.AVOL.STEM_STRIDE = 2
    cfg.MODEL.AVOL.POOLS = (2, 2, 2)
    cfg.MODEL.AVOL.NORM = "BN"
    cfg.MODEL.AVOL.OUT_FEATURES = ("conv4",)


def _add_localizer(cfg: CN) -> None:
    cfg.MODEL.LOCALIZER = CN()
    node = cfg.MODEL.LOCALIZER
    # The visual encoder is cfg.MODEL.BACKBONE (any of BACKBONE_REGISTRY; the paper's is
    # build_avol_backbone): which of its feature maps is used. "res4" of a ResNet has stride 16.
    node.VISUAL_FEATURE = "conv4"
    # AUDIO_ENCODER_REGISTRY (AVOLAudioEncoder, TimmAudioEncoder), and an AVOL-Net's shape; see
    # MODEL.AVOL.
    node.AUDIO_ENCODER = CN()
    node.AUDIO_ENCODER.NAME = "AVOLAudioEncoder"
    node.AUDIO_ENCODER.CHANNELS = (64, 128, 256, 512)
    node.AUDIO_ENCODER.STEM_STRIDE = 2
    node.AUDIO_ENCODER.POOLS = (2, 2, 2)
    # BN, SyncBN (GPUs) or naiveSyncBN (also CPUs), for the audio encoder and the heads.
    node.NORM = "BN"

    # The four heads (App. B): hidden width, common embedding, clusters K, dropout.
    node.HIDDEN_DIM = 512
    node.EMBED_DIM = 128
    node.NUM_CLUSTERS = 39
    node.DROPOUT = 0.0

    # Eq. 4: LAMBDA * L_NC + (1 - LAMBDA) * L_clust. At 1 the clustering heads are not built.
    node.LAMBDA = 0.5
    # Score of a pair from its heatmap: "max" (the paper's S), "avg" in pre-training (App. B), or
    # "attention" (Senocak et al.: the sound attends to the map).
    node.POOL = "max"
    # Temperature rho: "log" learns log(1 / rho), "linear" learns 1 / rho itself.
    node.RHO_PARAM = "log"
    node.RHO_INIT = 0.07
    # Upper bound of 1 / rho.
    node.MAX_SCALE = 100.0
    # Negatives from all processes; without GATHER_GRADIENTS those of other processes are constants.
    node.GATHER = True
    node.GATHER_GRADIENTS = True
    # Compile the encoders (torch.compile) for training: a minute or more at the start.
    node.COMPILE = False
    # In inference, and so for self-boxes, a heatmap is the mean of those of the image in these
    # sizes (1: FRAME_SIZE's), and with FLIP of its mirrored copies, on the grid of the largest.
    node.TTA = CN()
    node.TTA.SCALES = (1.0,)
    node.TTA.FLIP = False
    # The localisation objective, of OBJECTIVE_REGISTRY: "nce" (eq. 1), or, for the comparisons of
    # Table 2, "bce" (Objects that Sound: matching pairs against others; rho is then the inverse of
    # a learned scale, beside a learned shift), "attention" and "dmc" (both as DSOL's authors have
    # them; NORMALIZE must be off) or "triplet" (Senocak et al.; POOL must be "attention").
    node.OBJECTIVE = "nce"
    # False leaves the embeddings as they are, as Objects that Sound does.
    node.NORMALIZE = True
    # Of "attention" (10), "dmc" (5) and "triplet"; there 0 is Senocak et al.'s own, without margin.
    node.MARGIN = 1.0
    # Weights (.pth, .pkl) that the visual encoder starts from: SimCLR's, another localizer's, or
    # what tools/convert_simclr_to_d2.py wrote. MODEL.WEIGHTS is for the whole localizer; these are
    # then not used.
    node.BACKBONE_WEIGHTS = ""
    # A dictionary of objects (DSOL) that tools/build_object_dictionary.py wrote. With it inference
    # has a box for every kind of object in it that is heard, and these are the clusters.
    node.OBJECT_DICTIONARY = ""


def _add_timm(cfg: CN) -> None:
    # A network of timm as an image backbone (build_timm_backbone, build_timm_fpn_backbone), of
    # which MODEL.BACKBONE.FREEZE_AT freezes stages: 1 is the stem (a ViT's embeddings), 2 also the
    # first stage (a ViT's first block) ...
    cfg.MODEL.TIMM = _timm_network("resnet50", "layer3")
    # BN: as timm has it; SyncBN (over all GPUs) or FrozenBN (nothing of it is trained).
    cfg.MODEL.TIMM.NORM = "BN"
    # The same for spectrograms, as images of one channel, with AUDIO_ENCODER.NAME TimmAudioEncoder.
    cfg.MODEL.LOCALIZER.AUDIO_ENCODER.TIMM = _timm_network("resnet18", "layer4")


def _timm_network(name: str, out_feature: str) -> CN:
    node = CN()
    # timm's name, which may say of which weights, too: vit_small_patch16_224.dino.
    node.NAME = name
    # What a training starts from that has no MODEL.WEIGHTS: a file (.pth, .safetensors ...) that
    # holds this network, or "timm": the weights of NAME, which are downloaded once. Empty: random.
    node.WEIGHTS = ""
    # Maps of the network by timm's names: layer1 ... layer4 of a ResNet, blocks.0 ... of a ViT.
    # What comes after the last one is not built.
    node.OUT_FEATURES = (out_feature,)
    # [NAME, VALUE] pairs for timm.create_model, such as ["num_heads", 12].
    node.OPTIONS = ()
    return node


def _add_simclr(cfg: CN) -> None:
    # SimCLR: the backbone's feature that is pooled, the projection head (v1: 2 layers, v2: 3), the
    # temperature of NT-Xent, negatives from all processes.
    cfg.MODEL.SIMCLR = CN()
    cfg.MODEL.SIMCLR.FEATURE = "res5"
    cfg.MODEL.SIMCLR.NUM_LAYERS = 2
    cfg.MODEL.SIMCLR.HIDDEN_DIM = 2048
    cfg.MODEL.SIMCLR.OUT_DIM = 128
    cfg.MODEL.SIMCLR.NORM = "BN"
    cfg.MODEL.SIMCLR.TEMPERATURE = 0.1
    cfg.MODEL.SIMCLR.GATHER = True


def _add_spectrogram(cfg: CN) -> None:
    node = cfg.MODEL.LOCALIZER
    node.SPECTROGRAM = CN()
    # logmel (Slaney scale and norm), or linear (N_MELS is then not used).
    node.SPECTROGRAM.TYPE = "logmel"
    node.SPECTROGRAM.N_FFT = 1024
    node.SPECTROGRAM.WIN_LENGTH = 480
    node.SPECTROGRAM.HOP_LENGTH = 120
    node.SPECTROGRAM.N_MELS = 257
    node.SPECTROGRAM.F_MIN = 0.0
    node.SPECTROGRAM.F_MAX = 12000.0
    # log(power + LOG_EPS), then (x - MEAN) / STD: about zero mean, so that the zero padding of the
    # convolutions is no loud border.
    node.SPECTROGRAM.LOG_EPS = 1e-6
    node.SPECTROGRAM.MEAN = -6.5
    node.SPECTROGRAM.STD = 4.8
    # SpecAugment, in training: a band of at most FREQ_MASK of the rows, and one of at most
    # TIME_MASK of the columns, are set to the mean. 0: none.
    node.SPECTROGRAM.FREQ_MASK = 0.0
    node.SPECTROGRAM.TIME_MASK = 0.0


def _add_self_labels(cfg: CN) -> None:
    node = cfg.MODEL.LOCALIZER
    node.SELF_LABEL = CN()
    # Number of times that the labels are estimated anew, denser at the start for POWER > 1:
    # iteration MAX_ITER * (i / (NUM_OPTIMIZATIONS - 1)) ** POWER (SeLaVi's schedule).
    node.SELF_LABEL.NUM_OPTIMIZATIONS = 100
    node.SELF_LABEL.POWER = 1.5
    # Exponent of Sinkhorn-Knopp (not eq. 4's lambda), L1 tolerance of the marginals, pass limit.
    node.SELF_LABEL.SK_LAMBDA = 20.0
    node.SELF_LABEL.TOL = 1e-6
    node.SELF_LABEL.MAX_PASSES = 2000
    # Cluster sizes: "uniform" (eq. 3), "gaussian" (std SIGMA of a mean of 1), or a file with K
    # numbers.
    node.SELF_LABEL.MARGINALS = "uniform"
    node.SELF_LABEL.SIGMA = 0.1
    # First labels: "sinkhorn" (the paper), or "kmeans" on the audio embeddings f_a.
    node.SELF_LABEL.INIT = "sinkhorn"
    # Bring the clusters of both heads, which start at random, into one order before the first
    # labels (Hungarian method; not in the paper).
    node.SELF_LABEL.ALIGN_HEADS = False
    # The training ends with an error when the labels use less than two clusters so many times in a
    # row. 0: never.
    node.SELF_LABEL.MAX_COLLAPSED = 3
    # No more passes after two in a row that have changed the labels of less than this share of the
    # clips. 0: all that are planned.
    node.SELF_LABEL.STOP_BELOW = 0.0
    # Clips in a batch of the pass over the data set.
    node.SELF_LABEL.BATCH_SIZE = 64


def _add_self_boxes(cfg: CN) -> None:
    cfg.MODEL.SELF_BOX = CN()
    node = cfg.MODEL.SELF_BOX
    # Eq. 5's beta: drawn from this range in training, its middle at test time. One value twice is
    # a fixed beta.
    node.BETA = (0.7, 0.9)
    # All components above the threshold, or only the largest (the paper).
    node.MULTI = False
    # What fits a self-box to the picture: "" (nothing, the paper) or "grabcut", which sees the
    # picture with its short side at REFINE_SIZE pixels at most.
    node.REFINE = ""
    node.REFINE_SIZE = 96
    # Class of a self-box: "none" (class-agnostic warm-up), "self" (eq. 6), or "video" (the label
    # in the clip list: weak supervision).
    node.LABELS = "self"
    # The frozen localizer: the config.yaml that its training wrote, and its checkpoint.
    node.LOCALIZER_CONFIG = ""
    node.LOCALIZER_WEIGHTS = ""
    # Start the detector's bottom-up backbone from the localizer's visual encoder, which must be
    # the same network (build_avol_fpn_backbone, or the same ResNet, of which it may lack the last
    # stages).
    node.INIT_BACKBONE = False
    # Folder that tools/cache_heatmaps.py wrote: heatmaps of all prepared frames, which the mapper
    # then takes in place of running the localizer. Empty: on the fly.
    node.HEATMAPS = ""

    # The row "Center Box" of Table 1: range of the fraction of the frame's that both sides are.
    cfg.MODEL.CENTER_BOX = CN()
    cfg.MODEL.CENTER_BOX.SIZE_RANGE = (0.35, 1.0)
    # The row "Selective Search": fast, quality or single; images are searched with their short side
    # at SIZE (0: as they are); so many boxes are kept.
    cfg.MODEL.SELECTIVE_SEARCH = CN()
    cfg.MODEL.SELECTIVE_SEARCH.MODE = "fast"
    cfg.MODEL.SELECTIVE_SEARCH.SIZE = 256
    cfg.MODEL.SELECTIVE_SEARCH.MAX_BOXES = 100


def _add_rounds(cfg: CN) -> None:
    # The detector of the round before, which teaches along with the self-boxes: the config.yaml
    # that its training wrote, and its checkpoint. Empty: self-boxes alone teach (the paper).
    cfg.MODEL.SELF_BOX.DETECTOR = CN()
    node = cfg.MODEL.SELF_BOX.DETECTOR
    node.CONFIG = ""
    node.WEIGHTS = ""
    # Its boxes teach that score at least so much.
    node.SCORE_THRESH = 0.5
    # Boxes that overlap by more than this IoU are of one object. Where one is a self-box, the class
    # is the self-box's, and KEEP says whose box it is: "detector" or "self".
    node.MERGE_IOU = 0.5
    node.KEEP = "detector"
    # What fits the merged boxes to the picture: "" (nothing) or "grabcut", see
    # MODEL.SELF_BOX.REFINE_SIZE.
    node.REFINE = ""
    # What a box of the detector's teaches the ROI heads weighs as much as its score; False: 1.
    # MODEL.ROI_HEADS.NAME must then be DropLossROIHeads.
    node.SCORE_WEIGHTS = False
    # A pipeline leaves a round out, and those after it, where its teacher agrees with its own
    # teacher on more than this share of their boxes (on training images): there is nothing new to
    # teach. 1: never.
    node.MAX_AGREEMENT = 1.0
    # Proposals (anchors) of the background have no loss where they overlap all boxes that teach by
    # less than this IoU: they may be objects that nobody has found (DropLoss of CutLER, with 0.01).
    # For MODEL.ROI_HEADS.NAME DropLossROIHeads and MODEL.PROPOSAL_GENERATOR.NAME DropLossRPN. 0:
    # the stock losses.
    cfg.MODEL.ROI_HEADS.DROP_LOSS_IOU = 0.0
    cfg.MODEL.RPN.DROP_LOSS_IOU = 0.0


def _add_solver(cfg: CN) -> None:
    # SGD, Adam, AdamW or LARS.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Factor of the learning rate of the image backbone (the localizer's visual encoder; a
    # detector's network below the FPN).
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # Trust coefficient of LARS ("eeta" in SimCLR).
    cfg.SOLVER.LARS_ETA = 0.001
    # Update all parameters in one kernel, where the optimizer has one and the model is on a GPU.
    cfg.SOLVER.FUSED = True
    # With SOLVER.AMP.ENABLED: fp16 (with a scaled loss, as stock) or bf16.
    cfg.SOLVER.AMP.PRECISION = "fp16"
    # Iterations between two looks at the losses, which are then the means since the last look: each
    # waits for the device and for the other processes. 1 is stock.
    cfg.SOLVER.METRIC_PERIOD = 1
    # So many of the periodic checkpoints stay; 0: all, as stock. With 2, there is one to go on from
    # where the last is damaged.
    cfg.SOLVER.MAX_TO_KEEP = 0
    # Length of the training, and of the warm-up, in passes over the training set. Above 0 they
    # replace MAX_ITER and WARMUP_ITERS.
    cfg.SOLVER.MAX_EPOCH = 0.0
    cfg.SOLVER.WARMUP_EPOCH = 0.0
    # With MAX_EPOCH: at least so many iterations, however few the clips.
    cfg.SOLVER.MIN_ITER = 0
    # What becomes of BASE_LR where REFERENCE_WORLD_SIZE scales the batch by s: "linear" (s times,
    # as stock, for SGD), "sqrt" (the root of s, for Adam and its like) or "none".
    cfg.SOLVER.LR_SCALING = "linear"


def _add_test(cfg: CN) -> None:
    # A metric by which the best weights, of all evaluations (EVAL_PERIOD), are kept as
    # model_best.pth, for instance bbox/AP50; of several test sets NAME/bbox/AP50. Empty: none are.
    # Which is best must be told by a validation set.
    cfg.TEST.BEST_METRIC = ""
    cfg.TEST.MATCHING = CN()
    # How clusters get names, for assessment only: hungarian, argmax, manual, mshot or file.
    cfg.TEST.MATCHING.METHOD = "hungarian"
    # Which labels of the training clips vote: "representative" (those that stand for a test class;
    # the paper's 15), "mappable" (those that some test class covers; the paper's 39), or "all".
    cfg.TEST.MATCHING.SPACE = "representative"
    # A json file {label: test class} for labels that the paper's Table A.2 does not know.
    cfg.TEST.MATCHING.GROUPS = ""
    # Clips per cluster whose label is looked at by mshot.
    cfg.TEST.MATCHING.M = 1
    # A cluster_matching.json to be used again, or a run's clusters.json (METHOD "file").
    cfg.TEST.MATCHING.FILE = ""

    cfg.TEST.LOCALIZATION = CN()
    # Protocols of sound localisation that are evaluated beside AP: see
    # avdet2/evaluation/localization/protocols.py. Empty: none.
    cfg.TEST.LOCALIZATION.PROTOCOLS = ()
    # Boxes below this confidence are not part of a detector's map.
    cfg.TEST.LOCALIZATION.CONFIDENCE = 0.5
    # instances_predictions.pth of stock Detectron2, beside the json files, which hold the same.
    cfg.TEST.SAVE_INSTANCES = False
    # Pictures of the results (precision-recall curves, the clusters' confusion ...) beside the
    # json.
    cfg.TEST.PLOTS = True


def _add_distributed(cfg: CN) -> None:
    # Seconds that a process waits for the others. One that is lost, or hangs, ends the job with an
    # error after that time.
    cfg.DISTRIBUTED = CN()
    cfg.DISTRIBUTED.TIMEOUT = 1800.0


def _add_pipeline(cfg: CN) -> None:
    # Stages of tools/run_pipeline.py in order: mappings with NAME, CONFIG (a file, relative to the
    # pipeline's own) and maybe OPTIONS (KEY: VALUE). A stage's weights and localizer come from the
    # stages before it.
    cfg.PIPELINE = CN()
    cfg.PIPELINE.STAGES = ()
    # In older configs: the files of the stages, in their order, where STAGES has their names.
    cfg.PIPELINE.CONFIGS = ()
    # [KEY, VALUE] pairs for all stages, or, with STAGE:KEY, for one; those of the command line come
    # after them.
    cfg.PIPELINE.OPTIONS = ()
    # Run only these stages and those that they need. Empty: all.
    cfg.PIPELINE.ONLY = ()
    # End before a detector whose localizer is no better than guessing: it would learn nothing.
    cfg.PIPELINE.STOP_AT_CHANCE = True
