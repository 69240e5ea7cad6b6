from . import captions as captions
from . import drawing as drawing
from . import reading as reading
from . import resizing as resizing
from . import saving as saving
from . import scans as scans
from . import tensors as tensors
