from . import devices as devices
from . import forwards as forwards
from . import kernels as kernels
from . import memory as memory
from . import optimize as optimize
from . import patches as patches
from . import tiling as tiling
