from . import activations as activations
from . import diagnosis as diagnosis
from . import evaluate as evaluate
from . import lpips as lpips
from . import metrics as metrics
from . import rfid as rfid
from . import spaces as spaces
