from . import activations as activations
from . import diagnosis as diagnosis
from . import halves as halves
from . import rescaling as rescaling
