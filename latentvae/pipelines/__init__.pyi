from . import agree as agree
from . import checks as checks
from . import doctor as doctor
from . import preview as preview
from . import swap as swap
