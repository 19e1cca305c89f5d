"""Layer norm of all towers: torch's, except that under autocast its output is in autocast's precision."""

import torch
import torch.nn.functional as F
from torch import nn


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The precision of the autocast region for tensors of a device; None outside of one."""
    kind = device.type
    known = torch.amp.is_autocast_available(kind)  # the meta device has none
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else None


def in_stream(x: torch.Tensor) -> torch.Tensor:
    """`x` in the precision of the residual stream, which is autocast's: half the memory traffic of float32."""
    return x.to(autocast_dtype(x.device) or x.dtype)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that keeps the residual stream in autocast's precision, as nets that run in bfloat16 do.

    Autocast alone would give float32: twice the bytes here and in every sum and cast that follows. The statistics are
    in float32 either way.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = autocast_dtype(x.device)
        if dtype is None:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype),
                                self.eps)
