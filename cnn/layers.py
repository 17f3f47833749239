"""Drop-in modules: ``torch.nn``'s own classes with ``forward`` on this library's functions.

Constructors, ``state_dict`` and ``isinstance`` are those of ``torch.nn``.
"""

from typing import Any, ClassVar, Literal

import torch.nn.functional as TF
from torch import Tensor, nn

from kernels._private import pair_of
from kernels.geometry import full_padding

from . import functional as F

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class _Layer(nn.Module):
    """What this library's layers add to the ``torch.nn`` classes that they replace."""

    def _get_name(self) -> str:
        """The printed class name: cnn.Conv2d, or Own[cnn.Conv2d] for a subclass."""
        kind = type(self)
        ours = next(base for base in kind.__mro__ if base.__module__ == __name__)
        name = f"cnn.{ours.__name__}"
        return name if kind is ours else f"{kind.__name__}[{name}]"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig" and value is not None:
            raise NotImplementedError(
                f"torch.ao.quantization knows torch's own classes only, not {self._get_name()}: "
                "call cnn.revert(model) first, or give this layer qconfig=None"
            )
        super().__setattr__(name, value)  # type: ignore[arg-type]


class Conv2d(_Layer, nn.Conv2d):
    """torch.nn.Conv2d on this library's kernels.

    ``padding`` may also be "full": dilation * (kernel_size - 1). If ``padding_mode`` is not
    "zeros", the input is padded first, as in torch.

    ``normalize``, None or (scale, shift), lets a first layer read uint8 images: see
    ``functional.conv2d``. It may be set at any time, and is not part of ``state_dict``.

    Example:
        >>> layer = cnn.Conv2d(3, 8, kernel_size=3, padding="full")
        >>> layer(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 8, 18, 18])
    """

    normalize: tuple[Any, Any] | None = None

    _activation: ClassVar[Literal["relu"] | None] = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if padding == "full":
            pairs = zip(pair_of(kernel_size), pair_of(dilation), strict=True)
            padding = tuple(full_padding(kernel, spread)[0] for kernel, spread in pairs)
        geometry = kernel_size, stride, padding, dilation, groups
        super().__init__(in_channels, out_channels, *geometry, bias, padding_mode, device, dtype)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = TF.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return self._convolve(input, weight, bias, padding)

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: Any) -> Tensor:
        geometry = self.stride, padding, self.dilation, self.groups
        options: Any = {"activation": self._activation, "normalize": self.normalize}
        return F.conv2d(input, weight, bias, *geometry, **options)


class ConvReLU2d(Conv2d):
    """Conv2d and ReLU in one kernel, with Conv2d's arguments and parameters.

    Example:
        >>> y = cnn.ConvReLU2d(3, 8, kernel_size=3)(torch.randn(2, 3, 16, 16))
        >>> bool(y.min() >= 0)
        True
    """

    _activation = "relu"


class ConvReLUMaxPool2d(Conv2d):
    """Conv2d, ReLU and MaxPool2d in one kernel, which never stores the map that is pooled.

    Its first arguments and its parameters are Conv2d's; ``pool_kernel_size``, ``pool_stride`` and
    ``pool_padding`` are MaxPool2d's.

    Example:
        >>> block = cnn.ConvReLUMaxPool2d(3, 8, kernel_size=3, padding=1, pool_kernel_size=2)
        >>> block(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 8, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        *args: Any,
        pool_kernel_size: Any,
        pool_stride: Any = None,
        pool_padding: Any = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        self.pool_kernel_size = pool_kernel_size
        self.pool_stride = pool_kernel_size if pool_stride is None else pool_stride
        self.pool_padding = pool_padding

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, pool_kernel_size={self.pool_kernel_size}, "
            f"pool_stride={self.pool_stride}, pool_padding={self.pool_padding}"
        )

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: Any) -> Tensor:
        if self.normalize is not None:
            raise NotImplementedError("ConvReLUMaxPool2d takes no bytes, got normalize")
        return F.conv2d_relu_max_pool2d(
            *(input, weight, bias, self.stride, padding, self.dilation, self.groups),
            pool_kernel_size=self.pool_kernel_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
        )


class ConvTranspose2d(_Layer, nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d on this library's kernels.

    Example:
        >>> layer = cnn.ConvTranspose2d(8, 3, kernel_size=2, stride=2)
        >>> layer(torch.randn(2, 8, 16, 16)).shape
        torch.Size([2, 3, 32, 32])
    """

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        padding: Any = self.padding
        geometry: Any = self.stride, padding, self.kernel_size, 2, self.dilation
        more: Any = self._output_padding(input, output_size, *geometry)
        numbers = self.stride, padding, more, self.groups, self.dilation
        return F.conv_transpose2d(input, self.weight, self.bias, *numbers)


class MaxPool2d(_Layer, nn.MaxPool2d):
    """torch.nn.MaxPool2d on this library's kernels.

    Example:
        >>> cnn.MaxPool2d(2)(torch.randn(2, 8, 16, 16)).shape
        torch.Size([2, 8, 8, 8])
    """

    def forward(self, input: Tensor) -> Any:
        window = self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        return F.max_pool2d(input, *window, self.return_indices)


class MaxUnpool2d(_Layer, nn.MaxUnpool2d):
    """torch.nn.MaxUnpool2d on this library's kernels.

    Example:
        >>> y, indices = cnn.MaxPool2d(2, return_indices=True)(torch.randn(2, 8, 16, 16))
        >>> cnn.MaxUnpool2d(2)(y, indices).shape
        torch.Size([2, 8, 16, 16])
    """

    def forward(self, input: Tensor, indices: Tensor, output_size: Any = None) -> Tensor:
        return F.max_unpool2d(
            input, indices, self.kernel_size, self.stride, self.padding, output_size
        )
