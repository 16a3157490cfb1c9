"""How a kernel's error is judged: against what torch in the same dtype does to the same fp64 truth."""

import torch


def max_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference where the truth is finite; where it is not, both must agree."""
    actual, truth = actual.double(), truth.double()
    finite = truth.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(0.0, 1.0, -1.0), truth[~finite].nan_to_num(0.0, 1.0, -1.0))
    return float((actual - truth)[finite].abs().max()) if finite.any() else 0.0


def assert_as_good_as_torch(actual: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, what: str = "") -> None:
    """`actual`'s error is at most that of torch's eager computation in the same dtype, plus one rounding.

    Args:
        actual: the kernel's result.
        eager: what plain torch gives in the kernel's dtype.
        truth: the same in fp64 from the same (rounded) inputs.
    """
    scale = float(truth[truth.isfinite()].abs().max()) if truth.isfinite().any() else 0.0
    rounding = 2 * torch.finfo(eager.dtype).eps * max(scale, 1e-30)
    got, allowed = max_error(actual, truth), max_error(eager, truth)
    assert got <= allowed + rounding, f"{what}: error {got:.3g}, torch's own {allowed:.3g}, one rounding {rounding:.3g}"
