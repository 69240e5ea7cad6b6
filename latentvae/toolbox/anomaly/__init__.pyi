from . import calibration as calibration
from . import roc as roc
from . import terms as terms
