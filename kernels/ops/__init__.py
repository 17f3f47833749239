"""The operators ``torch.ops.triton_cnn``: a file for each family, which declares all of each."""

from . import conv2d as conv2d
from . import conv2d_8bit as conv2d_8bit
from . import conv2d_relu_max_pool2d as conv2d_relu_max_pool2d
from . import max_pool2d as max_pool2d
