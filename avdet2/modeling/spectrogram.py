# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Waveforms to log spectrograms, in batches on the model's device.
"""

import torch
from torch import nn
from torchaudio.functional import mask_along_axis_iid, melscale_fbanks

from detectron2.config import configurable


class LogSpectrogram(nn.Module):
    """
    Log-mel (or linear) spectrogram of one second of sound, 257 x 200 with the paper's settings.

    One definition serves training, self-boxes and inference. The last frame of the centred STFT is
    dropped, which leaves one frame per hop: 24,000 samples with a hop of 120 give 200 frames. The
    paper's "24Hz" is read as 24 kHz (App. B; SeLaVi's scripts).
    """

    @configurable
    def __init__(
        self,
        *,
        kind: str,
        sample_rate: int,
        n_fft: int,
        win_length: int,
        hop_length: int,
        n_mels: int,
        f_min: float,
        f_max: float,
        log_eps: float,
        mean: float,
        std: float,
        masks: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """
        Args:
            kind: "logmel" (Slaney mel scale and area norm) or "linear" (n_fft // 2 + 1 rows).
            sample_rate: of the waveform, in Hz.
            n_fft, win_length, hop_length: of the STFT, in samples; the window is a periodic Hann.
            n_mels, f_min, f_max: the mel filters and their range in Hz.
            log_eps: added to the power before the logarithm.
            mean, std: the log spectrogram is normalised to (x - mean) / std.
            masks: the largest shares of rows and of columns that SpecAugment (Park et al., 2019)
                sets to zero, the mean, in training mode.
        """
        super().__init__()
        if kind not in ("logmel", "linear"):
            raise ValueError(f"SPECTROGRAM.TYPE must be logmel or linear, not {kind!r}")
        self.n_fft, self.win_length, self.hop_length = n_fft, win_length, hop_length
        self.log_eps, self.mean, self.std, self.masks = log_eps, mean, std, masks
        self.register_buffer("window", torch.hann_window(win_length), persistent=False)
        filters = None
        if kind == "logmel":
            filters = melscale_fbanks(
                n_fft // 2 + 1, f_min, f_max, n_mels, sample_rate, norm="slaney", mel_scale="slaney"
            ).t()
        self.register_buffer("filters", filters, persistent=False)

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.LOCALIZER.SPECTROGRAM
        return {
            "kind": node.TYPE,
            "sample_rate": cfg.INPUT.AV.SAMPLE_RATE,
            "n_fft": node.N_FFT,
            "win_length": node.WIN_LENGTH,
            "hop_length": node.HOP_LENGTH,
            "n_mels": node.N_MELS,
            "f_min": node.F_MIN,
            "f_max": node.F_MAX,
            "log_eps": node.LOG_EPS,
            "mean": node.MEAN,
            "std": node.STD,
            "masks": (node.FREQ_MASK, node.TIME_MASK),
        }

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        """
        Args:
            waveform: of shape (N, T), int16, or float in [-1, 1].

        Returns:
            Tensor: of shape (N, 1, F, T // hop_length), float32, normalised log power.
        """
        if waveform.dtype == torch.int16:
            waveform = waveform.float() / 32768.0
        # 1e-6 is subnormal in half precision, and the STFT's sums need float32.
        with torch.autocast(waveform.device.type, enabled=False):
            spectrum = torch.stft(
                waveform.float(),
                self.n_fft,
                self.hop_length,
                self.win_length,
                self.window,
                center=True,
                pad_mode="reflect",
                return_complex=True,
            )
            # Without the roots that abs would take and square undo.
            spectrum = spectrum[..., :-1]
            power = spectrum.real.square() + spectrum.imag.square()
            if self.filters is not None:
                power = self.filters @ power
            log_power = torch.log(power + self.log_eps)
        spectrograms = ((log_power - self.mean) / self.std)[:, None]
        if self.training:
            for axis, share in zip((2, 3), self.masks):
                if share:
                    most = round(share * spectrograms.shape[axis])
                    spectrograms = mask_along_axis_iid(spectrograms, most, 0.0, axis)
        return spectrograms
