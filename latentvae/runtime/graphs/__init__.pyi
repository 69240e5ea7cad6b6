from . import backend as backend
from . import files as files
from . import tracing as tracing
