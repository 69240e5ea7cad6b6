from . import coding as coding
from . import compression as compression
from . import container as container
from . import context as context
from . import probabilities as probabilities
from . import quantisation as quantisation
from . import rivals as rivals
