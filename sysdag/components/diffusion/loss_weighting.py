"""Min-SNR weights of denoising errors (Hang et al. 2023, arXiv 2303.09556), as diffusers' scripts apply `snr_gamma`."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from sysdag.components.diffusion.forward_process import Prediction
from sysdag.errors import PlanError

MIN_SNR = "min_snr"
DEFAULT_GAMMA = 5.0

Weighting = Callable[[Float[Tensor, "*n"]], Float[Tensor, "*n"]]
"""From signal-to-noise ratios to the weights of the errors."""


def check_weighting(weighting: Weighting | str | None, gamma: float) -> None:
    """Raises a PlanError for an unknown name, a gamma that is out of range or that nothing reads."""
    if isinstance(weighting, str) and weighting != MIN_SNR:
        raise PlanError(f"weighting must be {MIN_SNR!r} or a function of the signal-to-noise ratio, got {weighting!r}.")
    if not gamma > 0:
        raise PlanError(f"snr_gamma must be positive, got {gamma}.")
    if weighting != MIN_SNR and gamma != DEFAULT_GAMMA:
        raise PlanError(f"snr_gamma belongs to weighting={MIN_SNR!r}.")


def min_snr(prediction: Prediction, gamma: float) -> Weighting:
    """The weights of errors in what a model predicts; in x_0 all of them weigh min(snr, gamma).

    epsilon: min(snr, gamma) / snr; v_prediction: min(snr, gamma) / (snr + 1); sample: min(snr, gamma).

    Raises:
        PlanError: for flow matching, where they are not defined.
    """
    match prediction:
        case "epsilon":
            return lambda snr: (gamma / snr).clamp(max=1)  # 1 where the ratio is 0
        case "v_prediction":
            return lambda snr: snr.clamp(max=gamma) / (snr + 1)
        case "sample":
            return lambda snr: snr.clamp(max=gamma)
        case "flow":
            raise PlanError(
                "weighting='min_snr' is not defined for flow matching; choose times by "
                "timestep_sampling='logit_normal' or 'mode', or pass weighting a function of the signal-to-noise ratio."
            )
