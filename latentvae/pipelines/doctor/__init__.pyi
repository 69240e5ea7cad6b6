from . import halves as halves
from . import rescaling as rescaling
